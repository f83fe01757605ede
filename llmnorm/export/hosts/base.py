"""What a host is: a class of transformers, as the wiring that it has and the names that it uses.

To add one, write a file like `llama.py` and enter it in `__init__.py`, in the order in which `auto`
tries them. The tests run over the table.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from llmnorm.export.canonical import eps_of, is_norm
from llmnorm.export.folds import fill_with_neutral_norms, fold_biases
from llmnorm.export.form import HEAD, Form, Held, Kind, Sublayer, Tensors
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig

Place = tuple[Kind, str]

PRE_NORMS: dict[Place, str] = {
    ("attn", "pre"): "input_layernorm",
    ("mlp", "pre"): "post_attention_layernorm",
}
QK_NORMS: dict[Place, str] = {
    ("attn", "q"): "self_attn.q_norm",
    ("attn", "k"): "self_attn.k_norm",
}
_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "tie_word_embeddings"),
    *("attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"),
)


@dataclass(frozen=True, kw_only=True)
class Host:
    """A class of transformers that holds models of one wiring.

    Args:
        name: what users call it: transformers' model type.
        architecture: name of the class.
        norms: the slots that hold a norm, and the module that it is in a layer of the class. All of
            them must be filled, and no other slot may be.
        op: `rmsnorm` or `layernorm`: what these norms are.
        norm_bias: whether these norms have biases.
        final: the norm before the head.
        qk_per_head: whether norms at q and k see each head.
        mlp: `gated` or `plain`.
        position: as in the config.
        acts: the activations that it may have (None: any).
        biases: kinds of sublayers whose linear layers may have biases.
        served: who serves the class natively, for the table of the documentation.
    """

    name: str
    architecture: str
    norms: Mapping[Place, str]
    op: str = "rmsnorm"
    norm_bias: bool = False
    final: str = "model.norm"
    qk_per_head: bool = True
    mlp: str = "gated"
    position: str = "rope"
    acts: tuple[str, ...] | None = None
    biases: frozenset[str] = field(default_factory=frozenset)
    served: str = ""

    # Out of llmnorm.

    def prepare(self, form: Form) -> None:
        """Rewrite a simplified form, in place, as far as this class wants it."""
        fold_biases(form)
        fill_with_neutral_norms(form)

    def obstacles(self, form: Form) -> list[str]:
        """What of a prepared form the class cannot hold, in words; empty if it holds all."""
        found = [*self._about_slots(form), *self._about_shape(form), *self.more_obstacles(form)]
        return list(dict.fromkeys(found))

    def more_obstacles(self, form: Form) -> list[str]:
        """Obstacles that are this class's own."""
        return []

    def settings(self, form: Form, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments of the class's config beside the shape (`config`)."""
        return {}

    def config(self, form: Form, dtype: torch.dtype) -> PreTrainedConfig:
        """The config of the class for a prepared form, saved in `dtype`."""
        shape = form.shape
        fields: dict[str, Any] = {name: shape[name] for name in _SHARED}
        rope = {"rope_type": "default", "rope_theta": shape["rope_parameters"]["rope_theta"]}
        fields |= {"rope_parameters": rope, "rms_norm_eps": eps(form)}
        fields |= {"architectures": [self.architecture], "dtype": dtype}
        made: Any = self.model_class.config_class
        return made(**{**fields, **self.settings(form, dtype)})

    def write(self, form: Form, dtype: torch.dtype) -> Tensors:
        """The tensors of the class by its names, in float64; `dtype` is what they will be cast to.

        Raises:
            ValueError: for a tensor that has no name in the class (a defect of `obstacles`).
        """
        names = self.names(form.shape["num_hidden_layers"])
        config = form.to_config()
        biased = {"self_attn": config.attention_bias, "mlp": config.mlp_bias}
        tensors = dict(form.tensors)
        for sub in form.sublayers():
            for linear in {*sub.readers, sub.writer} if biased[sub.branch.split(".")[-1]] else ():
                tensors.setdefault(f"{linear}.bias", torch.zeros_like(form.weight(linear)[:, 0]))
        return {_renamed(name, names): tensor for name, tensor in tensors.items()}

    # Into llmnorm.

    def scheme(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The arguments of `build_config` beside the shape: norm, placement, qk_norm and others.

        Raises:
            ValueError: for a setting of the class that llmnorm does not have.
        """
        raise ValueError(f"{self.architecture} can be written, not read")

    def read(self, model: PreTrainedModel) -> Tensors:
        """The tensors of llmnorm by its names, in float64, of a model of the class."""
        back = {theirs: ours for ours, theirs in self.names(len(model.model.layers)).items()}
        state = {k: v.detach().double() for k, v in model.state_dict().items()}
        return {_renamed(name, back): tensor for name, tensor in state.items()}

    # Both.

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class itself."""
        return getattr(transformers, self.architecture)

    def names(self, layers: int) -> dict[str, str]:
        """Our modules' names and the class's, of all modules whose names differ or are norms."""
        ours = {
            f"model.layers.{i}.{module}": f"model.layers.{i}.{theirs}"
            for i in range(layers)
            for module, theirs in self._layer_names().items()
        }
        return {**ours, "model.norm": self.final}

    def _layer_names(self) -> dict[str, str]:
        """The same inside a layer."""
        some: Any = None
        subs = {kind: Sublayer(some, 0, kind) for kind in ("attn", "mlp")}
        prefix = len("model.layers.0.")
        return {
            subs[kind].module_name(slot)[prefix:]: theirs
            for (kind, slot), theirs in self.norms.items()
        }

    def _about_slots(self, form: Form) -> Iterable[str]:
        problems: Counter[str] = Counter()
        for sub in form.sublayers():
            problems.update(self._about_sublayer(sub))
        layers = len(form.layers)
        for problem, count in problems.items():
            yield problem if count == layers else f"{problem} (in {count} of {layers} layers)"
        yield from self._about_norm(form.get_final(), "the final norm", final=True)
        if form.logits is not None:
            yield f"{form.logits.op} on the logits"
        if form.embedding.treatment != "raw":
            yield f"an embedding treatment that is not in the table ({form.embedding.treatment})"
        if form.streams is not None:
            yield "two residual streams"

    def _about_sublayer(self, sub: Sublayer) -> Iterable[str]:
        where = "attention" if sub.kind == "attn" else "the mlp"
        wanted = {slot for kind, slot in self.norms if kind == sub.kind}
        spec = sub.spec
        if spec.module != "residual":
            yield f"the joint {spec.module} of {where}"
        for word, value in (("reads", spec.reads), ("skips", spec.skips)):
            if value != "stream":
                yield f"{where}, which {word} the block's input"
        for slot in sorted(set(spec.slots()) - wanted - self.other_slots(sub.kind)):
            yield f"{_article(spec.slots()[slot].op)} in slot {slot} of {where}"
        for slot in sorted(wanted):
            place = f"slot {slot} of {where}"
            held = sub.get(slot)
            yield from self._about_norm(held, place)
            if held is not None and slot in ("q", "k") and held.spec.per_head != self.qk_per_head:
                layouts = ("over all features", "per head")
                yield f"a norm in {place} that is {layouts[held.spec.per_head]}"

    def other_slots(self, kind: Kind) -> set[str]:
        """Slots that hold something else than a norm, which `more_obstacles` judges."""
        return set()

    def _about_norm(self, held: Held | None, place: str, *, final: bool = False) -> Iterable[str]:
        if held is None:
            yield f"no norm in {place}"
        elif held.op != self.op or not is_norm(held):
            yield f"{_article(held.op)} in {place}"
        elif "bias" in held.tensors and not self.norm_bias:
            yield f"a bias of {place}" + (", which no head can take" if final else "")

    def _about_shape(self, form: Form) -> Iterable[str]:
        shape = form.shape
        if shape["mlp"] != self.mlp:
            yield f"a {shape['mlp']} mlp"
        if shape["position"] != self.position:
            yield f"position {shape['position']!r}"
        if self.acts is not None and shape["hidden_act"] not in self.acts:
            yield f"the activation {shape['hidden_act']}"
        for kind, what in (("attn", "attention"), ("mlp", "the mlp")):
            if form.has_bias(kind) and kind not in self.biases:  # type: ignore[arg-type]
                yield f"biases in {what}"


def eps(form: Form) -> float:
    """The one eps that stands for those of all norms: the commonest, the greater of equals.

    What that changes is measured with every export (`certificate.py`).
    """
    counts = Counter(eps_of(held) for held in _norms(form))
    return max(counts, key=lambda value: (counts[value], value)) if counts else 1e-6


def with_one_eps(form: Form) -> Form:
    """A copy whose norms all have `eps(form)`, as the class will have it."""
    form, one = form.copy(), eps(form)
    for sub in form.sublayers():
        for slot in sub.spec.slots():
            held = sub.get(slot)
            if held is not None and is_norm(held):
                sub.put(slot, Held(held.spec.having(eps=one), held.tensors))
    final = form.get_final()
    if final is not None and is_norm(final):
        form.put_final(Held(final.spec.having(eps=one), final.tensors))
    return form


def check_default_rope(config: LlmNormConfig | PreTrainedConfig) -> float:
    """Return RoPE's base of a config.

    Raises:
        ValueError: for a scaled or partial RoPE, which llmnorm does not have.
    """
    rope: Any = config.rope_parameters
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind != "default" or part not in (None, 1, 1.0):
        raise ValueError(f"rope_parameters has {rope}; llmnorm has plain RoPE over whole heads")
    return float(rope["rope_theta"])


def _norms(form: Form) -> list[Held]:
    held = [sub.get(slot) for sub in form.sublayers() for slot in sub.spec.slots()]
    return [one for one in (*held, form.get_final()) if one is not None and is_norm(one)]


def _renamed(name: str, names: Mapping[str, str]) -> str:
    module, _, part = name.rpartition(".")
    return f"{names.get(module, module)}.{part}"


def _article(op: str) -> str:
    return f"{'an' if op[0] in 'aeiourl' and op != 'layernorm' else 'a'} {op}"


__all__ = ["HEAD", "PRE_NORMS", "QK_NORMS", "Host", "check_default_rope", "eps", "with_one_eps"]
