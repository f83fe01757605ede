"""A model as data: config fields and float64 tensors, which folds rewrite."""

import copy
from collections import UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from llmnorm.modeling.configuration_llmnorm import EmbeddingSpec, LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.modeling.residual import ATTENTION_SLOTS, MLP_SLOTS, NormSpec, ResidualSpec
from llmnorm.modeling.streams import StreamsSpec
from llmnorm.modeling.weights import UnitRowLinear, WeightNormLinear

Tensors = dict[str, torch.Tensor]
Kind = Literal["attn", "mlp"]

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
POSITIONS = "model.embed_positions"
_WIRED = ("norm", "placement", "qk_norm", "residuals", "final_norm", "logits", "streams", "wiring")
_INSIDE = {"inner", *ATTENTION_SLOTS, *MLP_SLOTS}  # slots of the branch, not of its joint
_NORMED = ("q", "k", "v")  # slots whose module is called q_norm


class ByModule(UserDict[str, torch.Tensor]):
    """Tensors by name, which finds those of a module at once: deep models are asked often."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._modules: dict[str, Tensors] = {}
        super().__init__(tensors)

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        super().__setitem__(name, tensor)
        module, _, part = name.rpartition(".")
        self._modules.setdefault(module, {})[part] = tensor

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        module, _, part = name.rpartition(".")
        del self._modules[module][part]

    def __copy__(self) -> "ByModule":
        return ByModule(self.data)

    def parts(self, module: str) -> Tensors:
        """The tensors of a module, by their names in it."""
        return dict(self._modules.get(module, {}))


@dataclass(frozen=True)
class Held:
    """What a slot holds: its operation, and its tensors by their names in the module."""

    spec: NormSpec
    tensors: Tensors = field(default_factory=dict)

    @property
    def op(self) -> str:
        """Name of the operation."""
        return self.spec.op

    def module(self, dim: int) -> nn.Module:
        """The operation over `dim` features, in float64 and eval mode."""
        module = self.spec.build(dim).double().eval()
        module.load_state_dict(self.tensors)
        return module


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of a form: what its slots hold, and the names of its linear layers."""

    form: "Form"
    index: int
    kind: Kind

    @property
    def spec(self) -> ResidualSpec:
        """Its wiring."""
        return self.form.layers[self.index][self.kind]

    @property
    def name(self) -> str:
        """How a person calls it."""
        return f"layer {self.index} {'attention' if self.kind == 'attn' else 'mlp'}"

    @property
    def branch(self) -> str:
        """Name of its branch's module."""
        part = "self_attn" if self.kind == "attn" else "mlp"
        return f"model.layers.{self.index}.{part}"

    @property
    def readers(self) -> list[str]:
        """The linear layers that read what `pre` gives."""
        if self.kind == "attn":
            return [self.linear(name) for name in ("q", "k", "v")]
        gated = self.form.shape["mlp"] == "gated"
        return [self.linear(name) for name in (("gate", "up") if gated else ("up",))]

    @property
    def writer(self) -> str:
        """The linear layer that writes the branch's output."""
        return self.linear("o" if self.kind == "attn" else "down")

    def linear(self, name: str) -> str:
        """Name of a projection's module: q, k, v, o, gate, up or down."""
        return f"{self.branch}.{name}_proj"

    def module_name(self, slot: str) -> str:
        """Name of the module that a slot's operation is."""
        if slot in _INSIDE:
            return f"{self.branch}.{slot}{'_norm' if slot in _NORMED else ''}"
        return f"model.layers.{self.index}.{self.kind}_residual.{slot}"

    def get(self, slot: str) -> Held | None:
        """What a slot holds."""
        spec: NormSpec | None = getattr(self.spec, slot)
        return None if spec is None else Held(spec, self.form.parts(self.module_name(slot)))

    def put(self, slot: str, held: Held | None) -> None:
        """Fill or empty a slot."""
        self.form.drop(name := self.module_name(slot))
        spec = None if held is None else held.spec
        self.form.layers[self.index][self.kind] = replace(self.spec, **{slot: spec})  # type: ignore[arg-type]
        for part, tensor in ({} if held is None else held.tensors).items():
            self.form.tensors[f"{name}.{part}"] = tensor


@dataclass
class Form:
    """An llmnorm model as data. Equal rewritings of it are called folds.

    Every form is a model: `to_config` and `to_model` give it, so a fold is tested by running both.

    Args:
        shape: the config's fields but for its wiring and its biases.
        layers: the wiring of every layer's sublayers.
        final: the norm before the head.
        logits: what multiplies the logits.
        streams: the second stream.
        tensors: parameters by name, in float64. Biases of 0 may be left out; a tied head
            is.
        notes: what was done that a user should know, one sentence each.
    """

    shape: dict[str, Any]
    layers: list[dict[Kind, ResidualSpec]]
    final: NormSpec | None
    logits: NormSpec | None
    streams: StreamsSpec | None
    tensors: ByModule
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: LlmNormForCausalLM) -> "Form":
        """Read a model. Matrices under weight normalization are taken as they act.

        The tensors of a float64 model are shared with it: folds replace, and change nothing.
        """
        config: LlmNormConfig = model.config
        shape = {k: v for k, v in config.to_dict().items() if k not in _WIRED}
        tied = bool(config.tie_word_embeddings)
        tensors = {name: held.detach().double() for name, held in model.state_dict().items()}
        for name, module in model.named_modules():
            if isinstance(module, WeightNormLinear | UnitRowLinear):
                tied = tied and not isinstance(module, UnitRowLinear)
                _make_plain(module, name, tensors)
        if tied:
            tensors.pop(f"{HEAD}.weight", None)
        form = cls(
            shape={**shape, "tie_word_embeddings": tied, "weights": "plain", "init": "plain"},
            layers=[{"attn": attn, "mlp": mlp} for attn, mlp in config.residual_specs()],
            final=config.final_norm_spec(),
            logits=config.logits_spec(),
            streams=config.streams_spec(),
            tensors=ByModule(tensors),
        )
        form.shape["parametrization"] = "standard"  # its factors are in the slots
        embedding = config.embedding_spec().norm  # resolved, as `norm` will be gone
        if embedding is not None:
            form.shape["embedding"] = {"treatment": "norm", "norm": embedding.to_dict()}
        return form

    def copy(self) -> "Form":
        """An independent copy; tensors are shared, since folds replace and never change them."""
        layers = [dict(layer) for layer in self.layers]
        shape, notes = copy.deepcopy(self.shape), list(self.notes)
        return replace(
            self, shape=shape, layers=layers, tensors=copy.copy(self.tensors), notes=notes
        )

    @property
    def hidden(self) -> int:
        """Width of the stream."""
        return int(self.shape["hidden_size"])

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding's table."""
        return bool(self.shape["tie_word_embeddings"])

    @property
    def embedding(self) -> EmbeddingSpec:
        """What is done to the embedding."""
        return EmbeddingSpec.parse(self.shape["embedding"])

    def sublayers(self) -> Iterator[Sublayer]:
        """All sublayers, in the order the stream meets them."""
        for index in range(len(self.layers)):
            yield Sublayer(self, index, "attn")
            yield Sublayer(self, index, "mlp")

    def parts(self, name: str) -> Tensors:
        """The tensors of a module, by their names in it."""
        return self.tensors.parts(name)

    def drop(self, name: str) -> None:
        """Forget a module's tensors."""
        for part in self.parts(name):
            del self.tensors[f"{name}.{part}"]

    def get_final(self) -> Held | None:
        """The norm before the head."""
        return None if self.final is None else Held(self.final, self.parts("model.norm"))

    def put_final(self, held: Held | None) -> None:
        """Replace the norm before the head."""
        self.drop("model.norm")
        self.final = None if held is None else held.spec
        for part, tensor in ({} if held is None else held.tensors).items():
            self.tensors[f"model.norm.{part}"] = tensor

    def weight(self, linear: str) -> torch.Tensor:
        """The matrix (out, in) of a linear layer, a tied head's too."""
        name = EMBEDDING if linear == HEAD and self.tied else linear
        return self.tensors[f"{name}.weight"]

    def bias(self, linear: str) -> torch.Tensor | None:
        """The bias (out,) of a linear layer; None where there is none."""
        return self.tensors.get(f"{linear}.bias")

    def scale_rows(self, linear: str, factor: torch.Tensor | float) -> None:
        """Multiply what a linear layer gives by numbers, (out,) or one."""
        factor = torch.as_tensor(factor, dtype=torch.float64)
        self.tensors[f"{linear}.weight"] = self.weight(linear) * factor.reshape(-1, 1)
        if (bias := self.bias(linear)) is not None:
            self.tensors[f"{linear}.bias"] = bias * factor

    def scale_columns(self, linear: str, factor: torch.Tensor | float) -> None:
        """Multiply what a linear layer reads by numbers, (in,) or one."""
        factor = torch.as_tensor(factor, dtype=torch.float64)
        self.tensors[f"{linear}.weight"] = self.weight(linear) * factor

    def add_bias(self, linear: str, bias: torch.Tensor) -> None:
        """Add (out,) to what a linear layer gives."""
        held = self.bias(linear)
        self.tensors[f"{linear}.bias"] = bias if held is None else held + bias

    def untie(self, why: str) -> None:
        """Give the head a matrix of its own, and say what that costs."""
        if not self.tied:
            return
        self.tensors[f"{HEAD}.weight"] = self.weight(HEAD)
        self.shape["tie_word_embeddings"] = False
        count = self.weight(HEAD).numel()
        self.notes.append(f"untied the head ({count:,} parameters more): {why}")

    def has_bias(self, kind: Kind) -> bool:
        """Whether any linear layer of this kind of sublayer has a bias."""
        part = ".self_attn." if kind == "attn" else ".mlp."
        return any(part in name and name.endswith("_proj.bias") for name in self.tensors)

    def to_config(self) -> LlmNormConfig:
        """The config of the form, its wiring given by residuals alone."""
        return LlmNormConfig(
            **{
                **{k: v for k, v in self.shape.items() if k != "auto_map"},
                "attention_bias": self.has_bias("attn"),
                "mlp_bias": self.has_bias("mlp"),
                "norm": None,
                "placement": None,
                "residuals": [
                    {kind: spec.to_dict() for kind, spec in layer.items()} for layer in self.layers
                ],
                "final_norm": None if self.final is None else self.final.to_dict(),
                "logits": None if self.logits is None else self.logits.to_dict(),
                "streams": None if self.streams is None else self.streams.to_dict(),
            }
        )

    def to_model(self, config: LlmNormConfig | None = None) -> LlmNormForCausalLM:
        """The form as a float64 model in eval mode.

        Args:
            config: one of the same wiring, to have a scheme's name on it; default: `to_config()`.

        Raises:
            RuntimeError: if the tensors are not those of the config's model.
        """
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return filled(config or self.to_config(), tensors)


def filled(config: LlmNormConfig, tensors: Mapping[str, torch.Tensor]) -> LlmNormForCausalLM:
    """A float64 model in eval mode that has these tensors; see `complete` for what may be missing.

    Raises:
        RuntimeError: if they are not those of the config's model.
    """
    with torch.device("meta"):
        model = LlmNormForCausalLM(config).double()
    whole = complete(tensors, model.state_dict(), tied=config.tie_word_embeddings)
    model.load_state_dict(whole, assign=True)
    model.tie_weights()
    return model.eval()


def complete(
    tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], *, tied: bool
) -> Tensors:
    """The tensors of a whole model: biases of 0 and the tied head are written out."""
    found = dict(tensors)
    if tied:
        found[f"{HEAD}.weight"] = found[f"{EMBEDDING}.weight"]
    for name, tensor in wanted.items():
        if name.endswith("_proj.bias"):
            found.setdefault(name, torch.zeros(tensor.shape, dtype=torch.float64))
    return found


def tables(form: Form) -> list[str]:
    """Names of the tables whose rows are added up to the embedding."""
    names = (f"{EMBEDDING}.weight", f"{POSITIONS}.weight")
    return [name for name in names if name in form.tensors]


def _make_plain(module: nn.Linear, name: str, tensors: Tensors) -> None:
    """Replace a parametrized matrix by the matrix that acts."""
    weight = tensors[f"{name}.weight"]
    length = tensors.pop(f"{name}.length", torch.ones(len(weight), dtype=torch.float64))
    tensors[f"{name}.weight"] = weight * (length / weight.norm(dim=1)).unsqueeze(1)
