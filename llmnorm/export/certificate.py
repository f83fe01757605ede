"""The parity certificate: a folder, loaded by a stranger, computes what its source does.

A fresh process that cannot import llmnorm (`visiting.py`) loads the folder through
AutoModelForCausalLM in float64, float32 and the dtype it is stored in. Its logits, loss and greedy
continuation are compared with the source's in float64. How far the source itself strays when
rounded to that dtype says how far the folder may: three times as far, or `FLOOR` if that is more.

bfloat16 would hide a wrong activation behind its own rounding. So the folder is loaded once more
with the weights as they were before they were cast, and must then be our model to `EXACT`.

Memory: the source and its form, 8 bytes a parameter each, and one more model of 8 bytes at a time,
here or in the other process. Disk: 8 bytes a parameter beside the folder, for a while.
"""

import copy
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from llmnorm.durable import sha256_of, write_durably
from llmnorm.environment import versions
from llmnorm.export.fitting import Fit
from llmnorm.export.form import Tensors
from llmnorm.export.hosts.base import with_one_eps
from llmnorm.export.stranger import STATE, measure
from llmnorm.export.verdict import about_errors, about_generation, about_loading, summary
from llmnorm.export.visiting import Visit, kinds, name_of, new_tokens, visit
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM

FLOOR = 1e-4
"""Differences of logits below this many standard deviations of theirs are nothing."""
EXACT = 1e-8
"""The same in float64, of the class and our model with the class's wiring."""
SLACK = 3.0
"""How many times its source's own rounding error a folder may have."""


def certify(
    folder: Path,
    source: LlmNormForCausalLM,
    fit: Fit | None,
    dtype: torch.dtype,
    text: torch.Tensor,
    *,
    trust_remote_code: bool,
    text_source: str = "given",
    write_to: Path | None = None,
    timeout_seconds: float = 3600,
) -> dict[str, Any]:
    """Compare a folder with the model that it came from, and write `parity.json` beside it.

    Args:
        folder: a Hugging Face folder: an export, or what `source` was imported from.
        source: our model in float64 and eval mode, on the CPU; it is left as it is.
        fit: how it was folded; None where the folder has the very wiring of `source`.
        dtype: of the folder's weights.
        text: token ids (batch, seq), at most the model's positions; a few hundred are enough.
        trust_remote_code: whether the folder's code is ours and may run.
        text_source: where the text is from.
        write_to: where `parity.json` goes; default: the folder.
        timeout_seconds: how long the other process may take.

    Returns:
        The content of `parity.json`. `passed` is the verdict, `failures` say why not, `summary` are
        lines for a person.

    Raises:
        EnvironmentProblem: if the other process cannot be run to its end.
    """
    begun, file = time.monotonic(), (write_to or folder) / "parity.json"
    file.unlink(missing_ok=True)  # one from before says nothing of these weights
    with uncast(folder, fit) as copies:
        seen, *exact = visit(
            {folder: kinds(dtype), **copies},
            text,
            trust_remote_code=trust_remote_code,
            timeout_seconds=timeout_seconds,
        )
    parity = compare(seen, exact[0] if exact else None, source, fit, dtype, text)
    known = versions()
    parity |= {
        "text": {
            "tokens": text.numel(),
            "sha256": hashlib.sha256(text.to(torch.int64).numpy().tobytes()).hexdigest(),
            "source": text_source,
        },
        "files": {
            path.relative_to(folder).as_posix(): sha256_of(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "parity.json"
        },
        "versions": {name: known[name] for name in ("llmnorm", "torch", "transformers", "python")},
        "seconds": round(time.monotonic() - begun, 1),
    }
    write_durably(file, json.dumps(parity, indent=2) + "\n")
    return parity


@contextmanager
def uncast(folder: Path, fit: Fit | None) -> Iterator[dict[Path, list[torch.dtype]]]:
    """The folder with float64 weights, for as long as it is needed; none if nothing is folded."""
    if fit is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
        twin = Path(place)
        shutil.copy(folder / "config.json", twin)
        tensors = fit.host.write(fit.form, torch.float64)
        whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        save_file(whole, twin / "model.safetensors", metadata={"format": "pt"})
        yield {twin: [torch.float64]}


def compare(
    seen: Visit,
    exact: Visit | None,
    source: LlmNormForCausalLM,
    fit: Fit | None,
    dtype: torch.dtype,
    text: torch.Tensor,
) -> dict[str, Any]:
    """Judge what a stranger found by what the source computes.

    Args:
        seen: of the folder.
        exact: of the same with `uncast` weights.
        source, fit, dtype, text: as in `certify`.
    """
    parity: dict[str, Any] = {
        "passed": False,
        "summary": [],
        "failures": about_loading(seen, exact),
        "first_deviating_layer": None,
        "target": "custom" if fit is None else fit.host.name,
        "scheme": _scheme(source),
        "dtype": name_of(dtype),
        "class": seen.facts.get("class"),
        "attention": seen.facts.get("attention"),
        "errors": {},
        "tolerances": {},
        "generation": None,
    }
    if not any("failure" in one.facts for one in (seen, exact) if one):
        exactly = None if exact is None else exact.passes["float64"]
        ours = Ours.of(source, fit, dtype, text)
        errors, limits = ours.judge(seen.passes, exactly)
        generation = ours.judge_generation(seen.passes["float64"], limits["float64"])
        parity |= {"errors": errors, "tolerances": limits, "generation": generation}
        parity["failures"] += about_errors(errors, limits, ours.scale)
        parity["failures"] += about_generation(generation)
        if parity["failures"] and (fit is None or getattr(fit.host, "layerwise", True)):
            found = ours.first_deviation(seen.passes["float64"], exactly)
            parity["first_deviating_layer"] = found
    parity["passed"] = not parity["failures"]
    parity["summary"] = summary(parity)
    return parity


@dataclass
class Ours:
    """What our side computes on the text, each as `measure` gives it.

    Args:
        wanted: the source in float64.
        folded: its form in float64; the source itself where nothing is folded.
        twin: the form with the class's one eps, with hidden states.
        near: the twin, its weights rounded to the dtype, in float64.
        rounded: the source rounded to the dtype, by the dtype that computes.
    """

    wanted: Tensors
    folded: Tensors
    twin: Tensors
    near: Tensors
    rounded: dict[str, Tensors] = field(default_factory=dict)

    @classmethod
    def of(
        cls, source: LlmNormForCausalLM, fit: Fit | None, dtype: torch.dtype, text: torch.Tensor
    ) -> "Ours":
        """Run everything; one model beside the source and the form at a time."""
        wanted = folded = twin = measure(source, text, states=True, new_tokens=new_tokens(text))
        if fit is None:
            near = measure(_rounded(source, dtype, torch.float64), text, states=True)
        else:
            folded = measure(fit.form.to_model(), text)
            model = with_one_eps(fit.form).to_model()
            twin = measure(model, text, states=True)
            near = measure(_rounded(model, dtype, torch.float64), text, states=True)
            del model
        ours = cls(wanted, folded, twin, near)
        for kind in kinds(dtype):
            ours.rounded[name_of(kind)] = measure(_rounded(source, dtype, kind), text)
        return ours

    @property
    def scale(self) -> float:
        """Standard deviation of the source's logits; 1 if they are all the same."""
        return float(self.wanted["logits"].std()) or 1.0

    def judge(
        self, passes: Mapping[str, Tensors], exact: Tensors | None
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """The errors, and the largest `rel` that each may have."""
        gap = self._gap
        errors = {"fold": gap(self.folded, self.wanted), "eps": gap(self.twin, self.folded)}
        limits = {"fold": FLOOR, "eps": FLOOR}
        if exact is not None:
            errors["class"], limits["class"] = gap(exact, self.twin), EXACT
        floors = {"float64": EXACT} if exact is None else {}  # nothing lies between the two
        for name, rounded in self.rounded.items():
            errors[name] = gap(passes[name], self.wanted)
            own = gap(rounded, self.wanted)["rel"]
            limits[name] = max(floors.get(name, FLOOR), SLACK * own)
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
        """The first part whose output is further from the twin's than rounding explains."""
        pairs = (
            [(theirs, self.near)] if exact is None else [(exact, self.twin), (theirs, self.near)]
        )
        names = [*filter(lambda name: name.startswith(STATE), self.twin), "logits"]
        for got, rounded in pairs:
            for name in names:
                own = _distance(rounded[name], self.twin[name])
                if not _distance(got[name], self.twin[name]) <= max(EXACT, SLACK * own):
                    return "head" if name == "logits" else name.removeprefix(STATE)
        return None


def _scheme(source: LlmNormForCausalLM) -> str:
    """Placement and norm; a model that was wired by hand has neither."""
    placement, norm = source.config.placement or {}, source.config.norm or {}
    return " + ".join(filter(None, (placement.get("name"), norm.get("op")))) or "wired by hand"


def _rounded(model: LlmNormForCausalLM, dtype: torch.dtype, compute: torch.dtype) -> nn.Module:
    """A copy whose weights are rounded to one dtype and which computes in another."""
    rounded: nn.Module = copy.deepcopy(model)
    return rounded.to(dtype).to(compute)


def _distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The root mean square of a difference, over that of what was wanted."""
    if got.shape != wanted.shape:
        return float("inf")
    return float((got - wanted).norm() / (wanted.norm() or 1.0))
