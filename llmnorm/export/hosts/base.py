"""What a host is: a class of transformers, as the wiring that it has and the names that it uses.

To add one, write a file like `llama.py` and enter it in `__init__.py`, in the order in which `auto`
tries them. The tests run over the table. Next: `obstacles.py`, what a class cannot hold, in words.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from llmnorm.export.folds import centre_stream, fill_with_neutral_norms, fold_biases
from llmnorm.export.form import Form, Kind, Sublayer, Tensors
from llmnorm.export.hosts.layout import LINEARS, Layout, interleaved, repeat_heads
from llmnorm.export.hosts.obstacles import Place, obstacles
from llmnorm.export.hosts.one_eps import eps, with_one_eps
from llmnorm.export.hosts.settings import check_default_rope, check_settings, shape_fields

PRE_NORMS: dict[Place, str] = {
    ("attn", "pre"): "input_layernorm",
    ("mlp", "pre"): "post_attention_layernorm",
}
QK_NORMS: dict[Place, str] = {
    ("attn", "q"): "self_attn.q_norm",
    ("attn", "k"): "self_attn.k_norm",
}
QKV = ("q", "k", "v")
QKVO = (*QKV, "o")
MLP = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Host:
    """A class of transformers that holds models of one wiring.

    Args:
        name: what users call it: transformers' model type.
        architecture: name of the class.
        norms: the slots that hold a norm, and the module that it is in a layer of the class. All of
            them must be filled, and no other slot may be. Two slots of one module share it.
        holds: the scheme that it is made for, for people.
        placement: the placement that a model read from it has; None: it can only be written.
        op: `rmsnorm` or `layernorm`: what these norms are.
        norm_options: options of these norms as llmnorm reads them, beside eps.
        norm_bias: whether these norms have biases.
        unit_offset: whether their weights are gains minus 1.
        final: whether there is a norm before the head.
        embedding: the treatment of the embedding that it holds; others go into the table.
        gains: slots that may hold a gain.
        parallel: whether the mlp reads what attention reads.
        qk_per_head: whether norms at q and k see each head.
        mlp: `gated` or `plain`.
        position: as in the config.
        interleaved: whether RoPE turns neighbours (2i, 2i + 1) instead of halves (i, i + half).
        partial_rotary: whether it turns a part of each head unless told otherwise.
        biases: projections that may have biases, by the field of the class's config that gives them
            some; the empty name: those that always have.
        eps_field: name of eps in the class's config; empty where it is fixed.
        renamed: our config fields that have another name there.
        fixed: settings that it must have for llmnorm to hold the same, written and demanded.
        layout: how it lays out its tensors.
        layerwise: whether what a layer gives is what the form's layer gives. False where a norm
            moved to the next layer: certificates then name no layer.
        served: who serves the class natively, for the table of the documentation.
    """

    name: str
    architecture: str
    norms: Mapping[Place, str]
    holds: str
    placement: str | None = None
    op: str = "rmsnorm"
    norm_options: Mapping[str, Any] = field(default_factory=dict)
    norm_bias: bool = False
    unit_offset: bool = False
    final: bool = True
    embedding: str = "raw"
    gains: frozenset[Place] = frozenset()
    parallel: bool = False
    qk_per_head: bool = True
    mlp: str = "gated"
    position: str = "rope"
    interleaved: bool = False
    partial_rotary: bool = False
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    eps_field: str = "rms_norm_eps"
    renamed: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout = field(default_factory=Layout)
    layerwise: bool = True
    served: str = ""

    # Out of llmnorm.

    def prepare(self, form: Form) -> None:
        """Rewrite a simplified form, in place, as far as this class wants it."""
        if self.op == "rmsnorm":
            centre_stream(form)
        if not self.norm_bias:
            fold_biases(form)
        if self.op == "rmsnorm" and self.norms == PRE_NORMS:
            fill_with_neutral_norms(form)
        if not self.has("num_key_value_heads"):
            repeat_heads(form)

    def obstacles(self, form: Form) -> list[str]:
        """What of a prepared form the class cannot hold; empty if it holds all.

        Each is the end of a sentence that begins with the class: `has no place for ...`.
        """
        return list(dict.fromkeys([*obstacles(self, form), *self.more_obstacles(form)]))

    def more_obstacles(self, form: Form) -> Iterable[str]:
        """Obstacles that are this class's own."""
        return ()

    def settings(self, form: Form, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the class's config that are this class's own."""
        return {}

    def config(self, form: Form, dtype: torch.dtype) -> PreTrainedConfig:
        """The config of the class for a prepared form, saved in `dtype`."""
        given = {self.renamed.get(ours, ours): form.shape[ours] for ours in shape_fields(self)}
        given |= {"architectures": [self.architecture], "dtype": dtype}
        if self.eps_field:
            given[self.eps_field] = eps(form)
        if self.position == "rope":
            given["rope_parameters"] = self.rope(form.shape["rope_parameters"]["rope_theta"])
        if self.has("layer_types"):
            given["layer_types"] = ["full_attention"] * len(form.layers)
        given |= {flag: bool(self._biased(form, names)) for flag, names in self.biases.items()}
        given.pop("", None)
        return self.config_class(**{**given, **self.fixed, **self.settings(form, dtype)})

    def rope(self, theta: float) -> dict[str, Any]:
        """RoPE as the class's config says it."""
        part = {"partial_rotary_factor": 1.0} if self.partial_rotary else {}
        return {"rope_type": "default", "rope_theta": theta, **part}

    def write(self, form: Form, dtype: torch.dtype) -> Tensors:
        """The tensors of the class by its names, in float64; `dtype` is what they will be cast to.

        A tied head is left out.
        """
        tensors = {name: tensor for name, tensor in form.tensors.items() if ".bias" not in name}
        for sub in form.sublayers():
            for flag, names in self.biases.items():
                if not flag or self._biased(form, names):
                    tensors |= self._biases(sub, names)
        for name in self.norm_modules(form):
            tensors |= self._norm(form.parts(name), name)
        if self.interleaved:
            tensors = interleaved(tensors, form.shape["head_dim"])
        modules = self.names(len(form.layers))
        return self.layout.theirs(tensors, modules, form.shape["num_attention_heads"])

    def _biases(self, sub: Sublayer, names: tuple[str, ...]) -> Tensors:
        """The biases of a sublayer's projections; 0 where it has none."""
        linears = [sub.linear(n) for n in names if f"{sub.linear(n)}.weight" in sub.form.tensors]
        held = {linear: sub.form.bias(linear) for linear in linears}
        zero = {linear: torch.zeros_like(sub.form.weight(linear)[:, 0]) for linear in linears}
        return {f"{n}.bias": zero[n] if bias is None else bias for n, bias in held.items()}

    def _norm(self, parts: Tensors, name: str) -> Tensors:
        """A norm's tensors as the class holds them."""
        weight = parts["weight"]
        bias = {f"{name}.bias": parts.get("bias", torch.zeros_like(weight))}
        held = {f"{name}.weight": weight - 1 if self.unit_offset else weight}
        return {**held, **(bias if self.norm_bias else {})}

    def _biased(self, form: Form, names: tuple[str, ...]) -> list[str]:
        """Those of some projections that have a bias other than 0 in any layer."""
        found = {n: f".{LINEARS[n]}.bias" for n in names}
        held = [(name, tensor) for name, tensor in form.tensors.items() if ".bias" in name]
        return [n for n, end in found.items() if any(k.endswith(end) and t.any() for k, t in held)]

    def unheld_biases(self, form: Form) -> list[str]:
        """Projections whose biases the class has no place for."""
        allowed = {name for names in self.biases.values() for name in names}
        return self._biased(form, tuple(name for name in LINEARS if name not in allowed))

    # Into llmnorm.

    def scheme(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The arguments of `build_config` beside the shape that the class calls by Llama's names.

        Raises:
            ValueError: for a setting of the class that llmnorm does not have.
        """
        if self.placement is None:
            raise ValueError(f"{self.architecture} can be written, not read")
        check_settings(self, config)
        known: Any = config
        norm = {"op": self.op, "eps": getattr(known, self.eps_field), **self.norm_options}
        layout = "per_head" if self.qk_per_head else "full_width"
        return {
            **{ours: getattr(known, theirs) for ours, theirs in self.renamed.items()},
            **({"rope_theta": self.rope_theta(known)} if self.position == "rope" else {}),
            "norm": norm,
            "placement": self.placement,
            "qk_norm": {"layout": layout, **norm} if ("attn", "q") in self.norms else "none",
            "embedding": "raw",
            "mlp": self.mlp,
            "position": self.position,
        }

    def rope_theta(self, config: Any) -> float:
        """The base of RoPE.

        Raises:
            ValueError: for a RoPE that llmnorm does not have.
        """
        return check_default_rope(config.rope_parameters)

    def read(self, model: PreTrainedModel) -> Tensors:
        """The tensors of llmnorm by its names, in float64, of a model of the class.

        Biases of 0 that llmnorm has and the class has not are left out (`form.complete`).
        """
        config: Any = model.config
        state = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
        names = self.names(config.num_hidden_layers)
        tensors = self.layout.ours(state, names, config.num_attention_heads)
        if self.interleaved:
            head_dim = config.hidden_size // config.num_attention_heads
            tensors = interleaved(tensors, getattr(config, "head_dim", head_dim), back=True)
        return tensors

    # Both.

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class itself."""
        return getattr(transformers, self.architecture)

    @property
    def config_class(self) -> Any:
        """The class of its config."""
        return self.model_class.config_class

    def has(self, name: str) -> bool:
        """Whether the class's config has a field, under our name or its own."""
        made = self.config_class
        known = {one.name for one in fields(made)} | set(made.attribute_map)
        return self.renamed.get(name, name) in known

    def names(self, layers: int) -> dict[str, str]:
        """Our modules' names, and the class's."""
        return self.layout.names(self._norm_names(), layers)

    def norm_modules(self, form: Form) -> list[str]:
        """Our names of all norms of a form that the class holds."""
        inside = [sub.module_name(slot) for sub in form.sublayers() for slot in sub.spec.slots()]
        held = [*inside, "model.norm", "model.embedding_norm"]
        return [name for name in held if f"{name}.weight" in form.tensors]

    def _norm_names(self) -> dict[str, str]:
        """Our norms' names inside a layer, and the class's."""
        some: Any = None
        subs = {kind: Sublayer(some, 0, kind) for kind in _KINDS}
        prefix = len("model.layers.0.")
        return {
            subs[kind].module_name(slot)[prefix:]: theirs
            for (kind, slot), theirs in self.norms.items()
        }


_KINDS: tuple[Kind, ...] = ("attn", "mlp")


__all__ = [
    "MLP",
    "PRE_NORMS",
    "QKV",
    "QKVO",
    "QK_NORMS",
    "Host",
    "Layout",
    "Place",
    "check_default_rope",
    "eps",
    "with_one_eps",
]
