"""Width and depth relative to a base model: muP for Adam, and CompleteP's part of it.

Under `mup` the learning rate tuned on a model of `base_width` (and `base_depth`) fits other widths
(and depths), so schemes can be compared across sizes without comparing learning rates instead. With
m_d = hidden_size / base_width, m_L = depth / base_depth (1 without a base depth) it sets

    matrices in blocks   std / sqrt(m_d), lr m_L^(alpha-1) / m_d, weight decay m_d,
                         Adam's eps / (m_d m_L^alpha)
    the rest of a block  lr m_L^(alpha-1)
    logits               / m_d
    attention scores     q k / head_dim instead of q k / sqrt(head_dim)
    everything else      as it is: embedding, learned positions, head, final norm

The residual multiplier m_L^(-alpha), without which a base depth means nothing, belongs to the
placement `completep`. Init policies that know the width (Xavier and the like) keep their own std.
Muon's update of a matrix has another size than Adam's; see `Factors`.

Sources: Yang et al., "Tensor Programs V", 2022, arXiv:2203.03466; Dey et al., "Don't be lazy:
CompleteP", 2025, arXiv:2505.01618, and the code of both in nanoGPT.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .operations import check_positive, read_choice

_KEYS = ("name", "base_width", "base_depth", "alpha")


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What an optimizer's settings are multiplied by for one parameter."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Parametrization:
    """The config field `parametrization`: `standard`, or `{name: mup, base_width, ...}`.

    Args:
        name: `standard` or `mup`.
        base_width: hidden size of the model whose learning rate is used; the default is ours.
        base_depth: its number of layers, for placements with CompleteP's residual multiplier.
        alpha: exponent of that multiplier.
    """

    name: str = "standard"
    base_width: int = 256
    base_depth: int | None = None
    alpha: float = 1.0

    @classmethod
    def parse(cls, value: "str | Mapping[str, Any]") -> "Parametrization":
        """Read the field; an unknown name or key raises ValueError."""
        given = read_choice("parametrization", value, "name")
        unknown = sorted(set(given) - set(_KEYS), key=str)
        if unknown:
            raise ValueError(
                f"parametrization has no key {unknown[0]!r}; its keys: {', '.join(_KEYS)}"
            )
        spec = cls(**given)
        if spec.name not in ("standard", "mup"):
            raise ValueError(f"parametrization is {spec.name!r}; expected standard or mup")
        if spec.name == "standard" and set(given) - {"name"}:
            raise ValueError("parametrization.base_width and the like are for 'mup' alone")
        if "alpha" in given and spec.base_depth is None:
            raise ValueError("parametrization.alpha is for a base_depth; give that too")
        check_positive("parametrization.base_width", spec.base_width)
        check_positive("parametrization.alpha", spec.alpha)
        if spec.base_depth is not None:
            check_positive("parametrization.base_depth", spec.base_depth)
        return spec

    def width_ratio(self, hidden_size: int) -> float:
        """m_d: 1 under `standard`."""
        return hidden_size / self.base_width if self.name == "mup" else 1.0

    def depth_ratio(self, depth: int) -> float:
        """m_L: 1 under `standard` and without a base depth."""
        return depth / self.base_depth if self.base_depth is not None else 1.0

    def factors(
        self, hidden_size: int, depth: int, *, matrix: bool, spectral: float | None = None
    ) -> Factors:
        """The factors of a parameter inside a block; all others have 1.

        Adam moves every element alike, so an update of a matrix acts on its input with a strength
        that grows as the width: the learning rate is divided by m_d. Muon's orthogonal update has
        one singular value; `spectral` says with which power of the width it grows, and replaces
        m_d by m_d^spectral (derived here, not from the papers), eps stays.

        Args:
            hidden_size: width of the model.
            depth: its number of layers.
            matrix: whether the parameter is the matrix of a linear layer.
            spectral: None for Adam and its kin.
        """
        width, depth_ratio = self.width_ratio(hidden_size), self.depth_ratio(depth)
        deep = depth_ratio ** (self.alpha - 1)
        if not matrix:
            return Factors(lr=deep)
        if spectral is not None:
            return Factors(lr=deep / width**spectral, weight_decay=width**spectral)
        eps = 1 / (width * depth_ratio**self.alpha)
        return Factors(lr=deep / width, weight_decay=width, eps=eps)
