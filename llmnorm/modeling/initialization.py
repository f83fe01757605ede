"""Initial weights: the standard deviation of every matrix as each scheme asks, drawn by name.

A tensor's draw is a function of (seed, parameter name): the same on any device, engine and world,
and an extra norm in one scheme shifts no other weight, so schemes start from common random numbers.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .operations import check_positive, read_choice
from .parametrization import Parametrization
from .weights import WeightNormLinear, WeightSpec, unit_dim

# Branch matrices whose std a residual-aware policy changes.
_OUTPUT_PROJECTIONS = ("o_proj", "down_proj")
_VALUE_PATH = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A projection of one block; `number` is the paper's 1-based layer."""

    name: str
    number: int
    depth: int
    hidden_size: int
    fan_in: int
    fan_out: int
    initializer_range: float

    @property
    def xavier(self) -> float:
        """Std of Xavier's normal init, gain 1 (Glorot and Bengio 2010)."""
        return math.sqrt(2.0 / (self.fan_in + self.fan_out))


def plain(m: Matrix) -> float:
    """N(0, initializer_range) for every matrix."""
    return m.initializer_range


def scaled(m: Matrix) -> float:
    """Output projections divided by sqrt(2 L) (GPT-2, Megatron)."""
    return m.initializer_range * ((2 * m.depth) ** -0.5 if m.name in _OUTPUT_PROJECTIONS else 1.0)


def depth_scaled(m: Matrix) -> float:
    """Output projections divided by sqrt(2 l), l the 1-based layer.

    As compared in the LNS paper, arXiv:2502.05795.
    """
    return m.initializer_range * ((2 * m.number) ** -0.5 if m.name in _OUTPUT_PROJECTIONS else 1.0)


def deepnorm(m: Matrix) -> float:
    """Xavier; v, o, gate, up and down times beta = (8 L)^(-1/4) (DeepNet, arXiv:2203.00555).

    The paper's mlp has no gate; beta on it is a reading for gated mlps.
    """
    return m.xavier * ((8 * m.depth) ** -0.25 if m.name in _VALUE_PATH else 1.0)


def sub_ln(m: Matrix) -> float:
    """Xavier; v, o, gate, up and down times sqrt(log(2 L)) (Magneto, arXiv:2210.06423).

    The paper's mlp has no gate; the factor on it is a reading for gated mlps.
    """
    return m.xavier * (math.sqrt(math.log(2 * m.depth)) if m.name in _VALUE_PATH else 1.0)


def small(m: Matrix) -> float:
    """sqrt(2 / (5 d)) for every matrix, d the hidden size (SmallInit, arXiv:1910.05895).

    SDD's 1/sqrt(2.5 d) is the same number.
    """
    return math.sqrt(2 / (5 * m.hidden_size))


def fixup(m: Matrix) -> float:
    """Last matrix of a branch 0, the others times n^(-1/(2 m - 2)); n branches of m = 2 matrices.

    Zhang et al., "Fixup Initialization", 2019, arXiv:1901.09321, from memory, where the head starts
    at 0 too; here it does not. n is 2 L and m counts the matrices in sequence, v and o in
    attention, up (beside gate) and down in the mlp: our reading.
    """
    if m.name in _OUTPUT_PROJECTIONS:
        return 0.0
    inside = m.name in ("v_proj", "gate_proj", "up_proj")
    return m.initializer_range * ((2 * m.depth) ** -0.5 if inside else 1.0)


INIT_POLICIES: dict[str, Callable[[Matrix], float]] = {
    "plain": plain,
    "scaled": scaled,
    "depth_scaled": depth_scaled,
    "deepnorm": deepnorm,
    "sub_ln": sub_ln,
    "small": small,
    "fixup": fixup,
}


@dataclass(frozen=True, kw_only=True)
class InitSpec:
    """The config field `init`: a policy's name, or a mapping of `policy` and `embedding_std`.

    `embedding_std` defaults to `initializer_range`; the Mix-LN and GPAS repositories use sqrt(2/5).
    """

    policy: str = "plain"
    embedding_std: float | None = None

    @classmethod
    def parse(cls, value: "str | Mapping[str, Any]") -> "InitSpec":
        """Read the field; an unknown policy or key raises ValueError."""
        given = read_choice("init", value, "policy")
        unknown = sorted(set(given) - {"policy", "embedding_std"}, key=str)
        if unknown:
            raise ValueError(f"init has no key {unknown[0]!r}; its keys: policy, embedding_std")
        spec = cls(**given)
        if spec.policy not in INIT_POLICIES:
            raise ValueError(f"unknown init {spec.policy!r}; known: {', '.join(INIT_POLICIES)}")
        std = spec.embedding_std
        if std is not None:
            check_positive("init.embedding_std", std)
        return spec


def embedding_std(config: Any) -> float:
    """Std of the embedding as a config's `init` and `weights` ask."""
    if WeightSpec.parse(config.weights).kind == "unit":
        return config.hidden_size**-0.5
    return InitSpec.parse(config.init).embedding_std or config.initializer_range


def expected_std(name: str, module: nn.Linear | nn.Embedding, config: Any) -> float:
    """Std that the config's policy asks of a matrix, by its name in the causal model.

    Under muP matrices inside the blocks start from initializer_range / sqrt(m_d), while policies
    made of the width (Xavier, small) shrink by themselves; where `weights` is `unit`, rows of
    length 1 leave 1/sqrt(row length) whatever the policy.

    Args:
        name: module name such as `model.layers.3.mlp.down_proj`, `model.embed_tokens`, `lm_head`.
        module: the Linear or Embedding.
        config: an `LlmNormConfig`.
    """
    spec = InitSpec.parse(config.init)
    if isinstance(module, nn.Embedding):
        return embedding_std(config)
    if WeightSpec.parse(config.weights).kind == "unit":
        return (module.out_features, module.in_features)[unit_dim(name)] ** -0.5
    parts = name.split(".")
    if "layers" not in parts:
        return config.initializer_range
    ratio = Parametrization.parse(config.parametrization).width_ratio(config.hidden_size)
    matrix = Matrix(
        name=parts[-1],
        number=int(parts[parts.index("layers") + 1]) + 1,
        depth=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        fan_in=module.in_features,
        fan_out=module.out_features,
        initializer_range=config.initializer_range / math.sqrt(ratio),
    )
    return INIT_POLICIES[spec.policy](matrix)


def mark(module: nn.Module, config: Any, prefix: str = "") -> None:
    """Note on every Linear and Embedding below `module` its name and how it is drawn.

    Raises:
        ValueError: for a matrix that starts at 0 where `weights` needs a length.
    """
    weights = WeightSpec.parse(config.weights)
    frozen = weights.kind == "lawn" and weights.free_steps == 0
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, nn.Linear | nn.Embedding):
            std = expected_std(name, child, config)
            if std == 0 and (weights.kind in ("weight_norm", "project") or frozen):
                raise ValueError(
                    f"init {InitSpec.parse(config.init).policy!r} starts {name} at 0, which has no "
                    f"length for weights {weights.kind!r} to keep; use another init, or plain"
                )
            child.init_name = f"{name}.weight"  # type: ignore[assignment]
            child.init_std = std  # type: ignore[assignment]
            unit = unit_dim(name) if weights.kind == "unit" else None
            child.init_unit_dim = unit  # type: ignore[assignment]


def start(module: nn.Linear | nn.Embedding, *, std: float) -> None:
    """Draw a marked matrix, zero its bias, set the row lengths of weight normalization."""
    std = getattr(module, "init_std", std)
    name, unit = getattr(module, "init_name", "new"), getattr(module, "init_unit_dim", None)
    draw(module.weight, std=std, name=name, unit=unit)
    if isinstance(module, nn.Linear) and module.bias is not None:
        init.zeros_(module.bias)
    if isinstance(module, WeightNormLinear):
        module.reset_length()


def draw(tensor: torch.Tensor, *, std: float, name: str, unit: int | None = None) -> None:
    """Fill a tensor with N(0, std) by (torch's initial seed, name), unless it was loaded.

    With `unit`, the slices along that axis are then brought to length 1.
    """
    if tensor.is_meta or getattr(tensor, "_is_hf_initialized", False):
        return
    digest = hashlib.sha256(f"{torch.initial_seed()}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    sample = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    sample.normal_(0.0, std, generator=generator)
    if unit is not None:
        sample /= sample.norm(dim=unit, keepdim=True)
    init.copy_(tensor, sample)
