"""Schemes of two residual streams: ResiDual and SiameseNorm.

Between the embedding and the last block their state is (2, batch, seq, hidden). `streams` in the
config says how the state is opened from the embedding and closed to one hidden state; the residual
modules here join a branch to both streams. A model of one stream opens and closes with identity.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .operations import check_mapping, check_positive
from .residual import RESIDUAL_SLOTS, NormSpec, Residual, build_slot, register_residual


@dataclass(frozen=True, kw_only=True)
class StreamsSpec:
    """The config field `streams` of a scheme with two: what each holds at the end.

        open(x) = (x, scale x);  close(p, r) = first(p) + second(r)

    The final norm, if any, follows.
    """

    first: NormSpec | None = None
    second: NormSpec | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive("streams.scale", self.scale)

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> "StreamsSpec":
        """Read the field; an unknown key raises ValueError."""
        check_mapping("streams", value)
        unknown = sorted(set(value) - {"first", "second", "scale"}, key=str)
        if unknown:
            raise ValueError(f"streams has no key {unknown[0]!r}; its keys: first, second, scale")
        norms = {
            key: NormSpec.parse_alone(f"streams.{key}", value[key])
            for key in ("first", "second")
            if key in value
        }
        return cls(**norms, scale=value.get("scale", 1.0))

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `parse` reads."""
        norms = {"first": self.first, "second": self.second}
        held = {key: norm.to_dict() for key, norm in norms.items() if norm is not None}
        return {**held, "scale": self.scale}


class OneStream(nn.Module):
    """The ordinary residual stream: opened and closed as it is."""

    def open(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def close(self, state: torch.Tensor) -> torch.Tensor:
        return state


class TwoStreams(nn.Module):
    """Two copies of the embedding, joined again at the end (`StreamsSpec`).

    Shape: x and the closed state are (batch, seq, hidden), the state is (2, batch, seq, hidden).
    """

    def __init__(self, spec: StreamsSpec, dim: int) -> None:
        super().__init__()
        self.scale = float(spec.scale)
        self.first = build_slot(spec.first, dim)
        self.second = build_slot(spec.second, dim)

    def open(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack((x, self.scale * x))

    def close(self, state: torch.Tensor) -> torch.Tensor:
        p, r = state
        return self.first(p) + self.second(r)


def build_streams(spec: StreamsSpec | None, dim: int) -> OneStream | TwoStreams:
    """The module that opens and closes the streams of a model."""
    return OneStream() if spec is None else TwoStreams(spec, dim)


@register_residual("residual_dual")
class ResidualDual(Residual):
    r"""Join a branch to a Post-LN stream p and, not normalized, to a second stream r.

        s = entry(p);  f = branch(pre(s));  p' = out(skip(s) + post(f));  r' = r + second(f)

    Shape: the state x = (p, r) is (2, batch, seq, hidden).

    Source: Xie et al., "ResiDual", 2023, arXiv:2304.14802.
    """

    slots = (*RESIDUAL_SLOTS, "second")
    streams = 2
    routed = False

    def forward(
        self,
        x: torch.Tensor,
        block_input: torch.Tensor,
        branch: Callable[..., torch.Tensor],
        **kwargs: Any,
    ) -> torch.Tensor:
        p, r = x
        s = self.entry(p)
        f = branch(self.pre(s), **kwargs)
        return torch.stack((self.out(self.skip(s) + self.post(f)), r + self.second(f)))


@register_residual("siamese")
class Siamese(Residual):
    r"""Join a branch that reads two streams to both: p normalized, r as it is.

        s = entry(p);  f = branch(pre(first(s) + second(r)))
        p' = out(skip(s) + post(f));  r' = r + f

    Shape: the state x = (p, r) is (2, batch, seq, hidden).

    Source: "SiameseNorm", 2026, arXiv:2602.08064, algorithm 1.
    """

    slots = (*RESIDUAL_SLOTS, "first", "second")
    streams = 2
    routed = False

    def forward(
        self,
        x: torch.Tensor,
        block_input: torch.Tensor,
        branch: Callable[..., torch.Tensor],
        **kwargs: Any,
    ) -> torch.Tensor:
        p, r = x
        s = self.entry(p)
        f = branch(self.pre(self.first(s) + self.second(r)), **kwargs)
        return torch.stack((self.out(self.skip(s) + self.post(f)), r + f))
