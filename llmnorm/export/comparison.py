"""How far a folder's numbers are from its source's, and how far they may be.

Used by `certificate.py`, which says what for. What both sides measure is in `stranger.py`.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmnorm.export.fitting import Fit
from llmnorm.export.form import Form, Tensors
from llmnorm.export.hosts.base import with_one_eps
from llmnorm.export.stranger import STATE, measure
from llmnorm.export.visiting import kinds, name_of, new_tokens
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM

FLOOR = 1e-4
"""Differences of logits below this many standard deviations of theirs are nothing."""
EXACT = 1e-8
"""The same in float64, where nothing was rounded."""
SLACK = 3.0
"""How many times its source's own rounding error a folder may have."""


@dataclass(frozen=True)
class Claim:
    """What a certificate proves: that a folder computes what `source` does.

    Args:
        source: our model in float64 and eval mode.
        fit: the class of the folder; None if the code is ours, and for an import.
        form: what the folder holds; None if that is `source` itself.
        dtype: of the folder's weights.
        text: token ids (batch, seq).
    """

    source: LlmNormForCausalLM
    fit: Fit | None
    form: Form | None
    dtype: torch.dtype
    text: torch.Tensor

    @property
    def scheme(self) -> str:
        """Placement and norm of the source; a model that was wired by hand has neither."""
        config = self.source.config
        placement, norm = config.placement or {}, config.norm or {}
        names = placement.get("name"), norm.get("op")
        return " + ".join(filter(None, names)) or "wired by hand"

    @property
    def layerwise(self) -> bool:
        """Whether the folder's layers give what ours give, so that one can be blamed."""
        return self.fit is None or self.fit.host.layerwise


@dataclass(frozen=True)
class Ours:
    """What our side computes on the text, each as `measure` gives it.

    Args:
        wanted: the source in float64.
        folded: the form in float64.
        twin: the form with the class's one eps in float64, with hidden states.
        near: the same with weights rounded to the folder's dtype.
        own: the source that runs in the folder's dtype, and in float32.
        dtype: name of the folder's.
    """

    wanted: Tensors
    folded: Tensors
    twin: Tensors
    near: Tensors
    own: Mapping[str, Tensors]
    dtype: str

    @classmethod
    def of(cls, claim: Claim) -> "Ours":
        """Run everything, one model beside source and form at a time."""
        source, text, dtype = claim.source, claim.text, claim.dtype
        wanted = measure(source, text, states=True, new_tokens=new_tokens(text))
        own = {
            name_of(kind): measure(_rounded(source, kind, kind), text)
            for kind in kinds(dtype)
            if kind != torch.float64
        }
        model, folded = source, wanted
        if claim.form is not None:
            model = claim.form.to_model()
            folded = measure(model, text, states=True)
        twin = folded
        if claim.fit is not None:
            del model
            model = with_one_eps(claim.fit.form).to_model()
            twin = measure(model, text, states=True)
        near = measure(_rounded(model, dtype, torch.float64), text, states=True)
        return cls(wanted, folded, twin, near, own, name_of(dtype))

    @property
    def scale(self) -> float:
        """Standard deviation of the source's logits; 1 if they are all the same."""
        return float(self.wanted["logits"].std()) or 1.0

    def judge(
        self, passes: Mapping[str, Tensors], exact: Tensors | None
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """The errors, and the largest `rel` that each may have.

        `fold` and `eps` are what folding and the class's one eps change, `class` what its code
        changes beside: these three before anything is rounded. The others are all together.
        """
        gap = self._gap
        errors = {"fold": gap(self.folded, self.wanted), "eps": gap(self.twin, self.folded)}
        errors["class"] = gap(passes["float64"] if exact is None else exact, self.twin)
        rounding = gap(self.near, self.twin)["rel"] if exact is None else 0.0
        limits = {"fold": FLOOR, "eps": FLOOR, "class": max(EXACT, SLACK * rounding)}
        own = {name: gap(found, self.wanted)["rel"] for name, found in self.own.items()}
        stored = own.get(self.dtype, 0.0)  # no precision makes up for how weights are stored
        for name in dict.fromkeys(("float64", "float32", self.dtype)):
            errors[name] = gap(passes[name], self.wanted)
            limits[name] = max(FLOOR, SLACK * own.get(name, 0.0), SLACK * stored)
        return errors, limits

    def _gap(self, got: Tensors, wanted: Tensors) -> dict[str, float]:
        if got["logits"].shape != wanted["logits"].shape:
            return dict.fromkeys(("max_abs_logit", "rel", "loss_diff"), float("inf"))
        far = float((got["logits"].double() - wanted["logits"]).abs().max())
        loss = abs(float(got["loss"].double() - wanted["loss"]))
        return {"max_abs_logit": far, "rel": far / self.scale, "loss_diff": loss}

    def judge_generation(self, theirs: Tensors, limit: float) -> dict[str, Any]:
        """Compare greedy continuations; another token is forgiven where the source is undecided.

        That is where its logits of the two are no further apart than twice the limit.
        """
        mine, other = self.wanted["generated"], theirs["generated"]
        apart = (mine != other).nonzero()
        first = int(apart[0]) if len(apart) else None
        tie = False
        if first is not None:
            logits = self.wanted["scores"][first]
            tie = bool(logits[mine[first]] - logits[other[first]] <= 2 * limit * self.scale)
        return {
            "tokens": len(mine),
            "equal": first is None,
            "first_difference": first,
            "tie": tie,
            "cached_equal_uncached": torch.equal(other, theirs["generated_uncached"]),
        }

    def first_deviation(self, theirs: Tensors, exact: Tensors | None) -> str | None:
        """The first part whose output is further from the twin's than rounding explains.

        The weights before they were rounded show it best, but may not have what is wrong.
        """
        found = None if exact is None else self._first(exact, self.twin)
        return found or self._first(theirs, self.near)

    def _first(self, got: Tensors, rounded: Tensors) -> str | None:
        def strays(name: str) -> bool:
            own = _distance(rounded[name], self.twin[name])
            return not _distance(got[name], self.twin[name]) <= max(EXACT, SLACK * own)

        if not strays("logits"):  # states may differ by a factor that the head takes back
            return None
        states = (name for name in self.twin if name.startswith(STATE) and strays(name))
        return next(states, "head").removeprefix(STATE)


def _rounded(model: LlmNormForCausalLM, dtype: torch.dtype, compute: torch.dtype) -> nn.Module:
    """A copy whose weights are rounded to one dtype and which computes in another."""
    rounded: nn.Module = copy.deepcopy(model)
    return rounded.to(dtype).to(compute)


def _distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The root mean square of a difference, over that of what was wanted."""
    if got.shape != wanted.shape:
        return float("inf")
    return float((got - wanted).norm() / (wanted.norm() or 1.0))
