"""Width and depth relative to a base model: muP for Adam, and CompleteP's part of it.

Under `mup` the learning rate tuned on a model of `base_width` and `base_depth` fits every width and
depth, so schemes can be compared across sizes without comparing learning rates instead. With
m_d = hidden_size / base_width and m_L = depth / base_depth it sets

    hidden matrices   std / sqrt(m_d), lr / m_d, Adam's eps / (m_d m_L), weight decay * m_d
    logits            / m_d
    attention scores  q k / head_dim instead of q k / sqrt(head_dim)
    everything else   as it is

The residual multiplier 1 / m_L belongs to the placement `completep`.

Sources: Yang et al., "Tensor Programs V", 2022, arXiv:2203.03466; Dey et al., "Don't be lazy:
CompleteP", 2025, arXiv:2505.01618 (residual exponent 1, where the depth factor of the learning
rates is 1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .operations import check_positive, read_choice


@dataclass(frozen=True, kw_only=True)
class Parametrization:
    """The config field `parametrization`: `standard`, or `{name: mup, base_width, base_depth}`.

    Args:
        name: `standard` or `mup`.
        base_width: hidden size of the model whose learning rate is used.
        base_depth: its number of layers; only Adam's eps reads it.
    """

    name: str = "standard"
    base_width: int = 256
    base_depth: int = 4

    @classmethod
    def parse(cls, value: "str | Mapping[str, Any]") -> "Parametrization":
        """Read the field; an unknown name or key raises ValueError."""
        given = read_choice("parametrization", value, "name")
        unknown = sorted(set(given) - {"name", "base_width", "base_depth"})
        if unknown:
            raise ValueError(
                f"parametrization has no key {unknown[0]!r}; its keys: name, base_width, base_depth"
            )
        spec = cls(**given)
        if spec.name not in ("standard", "mup"):
            raise ValueError(f"parametrization is {spec.name!r}; expected standard or mup")
        if spec.name == "standard" and len(given) > 1:
            raise ValueError("parametrization.base_width and base_depth are for 'mup' alone")
        check_positive("parametrization.base_width", spec.base_width)
        check_positive("parametrization.base_depth", spec.base_depth)
        return spec

    def width_ratio(self, hidden_size: int) -> float:
        """m_d: 1 under `standard`."""
        return hidden_size / self.base_width if self.name == "mup" else 1.0

    def depth_ratio(self, depth: int) -> float:
        """m_L: 1 under `standard`."""
        return depth / self.base_depth if self.name == "mup" else 1.0
