"""The parity certificate: a folder, loaded by a stranger, computes what its source does.

A fresh process that cannot import llmnorm (`visiting.py`) loads the folder through
AutoModelForCausalLM in float64, float32 and the dtype that it is stored in. Its logits, loss and
greedy continuation are compared with the source's in float64. What the source itself strays when
it runs in that dtype says how far the folder may: `SLACK` times as far, or `FLOOR`.

bfloat16 would hide a wrong activation behind its own rounding. So a fold is loaded once more with
its weights as they were before they were cast, and must then be our model to `EXACT`.

Memory: the source and its form, 8 bytes a parameter each, and one more model of 8 bytes at a time,
here or in the other process. Disk: 8 bytes a parameter beside the folder, for a while. How the
errors come about is in `comparison.py`.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llmnorm.durable import sha256_of, write_durably
from llmnorm.environment import versions
from llmnorm.export.comparison import Claim, Ours
from llmnorm.export.fitting import Fit
from llmnorm.export.form import HEAD, Form
from llmnorm.export.verdict import about_errors, about_generation, about_loading, summary
from llmnorm.export.visiting import Visit, kinds, name_of, visit
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM


def certify(
    folder: Path,
    source: LlmNormForCausalLM,
    fit: Fit | None,
    dtype: torch.dtype,
    text: torch.Tensor,
    *,
    trust_remote_code: bool,
    text_source: str = "given",
    form: Form | None = None,
    write_to: Path | None = None,
    timeout_seconds: float = 3600,
) -> dict[str, Any]:
    """Compare a folder with the model that it came from, and write `parity.json` beside it.

    Args:
        folder: a Hugging Face folder: an export, or what `source` was imported from.
        source: our model in float64 and eval mode, on the CPU; it is left as it is.
        fit: the class of the folder and the form that it holds; None if the code is ours, and for
            an import.
        dtype: of the folder's weights.
        text: token ids (batch, seq), at most the model's positions; a few hundred are enough.
        trust_remote_code: whether the folder's code is ours and may run.
        text_source: where the text is from.
        form: what a folder with our code holds, if `source` was folded for it.
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
    claim = Claim(source, fit, fit.form if fit else form, dtype, text)
    with uncast(folder, claim) as twin:
        seen, *exact = visit(
            {folder: kinds(dtype), **twin},
            text,
            trust_remote_code=trust_remote_code,
            timeout_seconds=timeout_seconds,
        )
    parity, known = compare(claim, seen, *exact), versions()
    parity |= {
        "text": {
            "tokens": text.numel(),
            "sha256": hashlib.sha256(text.to(torch.int64).numpy().tobytes()).hexdigest(),
            "source": text_source,
        },
        "files": {
            path.name: sha256_of(path)
            for path in sorted(folder.iterdir())
            if path.is_file() and path.name != file.name
        },
        "versions": {name: known[name] for name in ("llmnorm", "torch", "transformers", "python")},
        "seconds": round(time.monotonic() - begun, 1),
    }
    write_durably(file, json.dumps(_finite(parity), indent=2, allow_nan=False) + "\n")
    return parity


@contextmanager
def uncast(folder: Path, claim: Claim) -> Iterator[dict[Path, list[torch.dtype]]]:
    """The folder with float64 weights, for as long as it is needed; none if nothing was folded."""
    form, fit = claim.form, claim.fit
    if form is None:
        yield {}
        return
    tensors = fit.host.write(form, torch.float64) if fit else form.to_model().state_dict()
    if fit is None and form.tied:
        del tensors[f"{HEAD}.weight"]
    twin = folder.with_name(f"{folder.name}.twin")
    shutil.rmtree(twin, ignore_errors=True)  # of one that was killed
    twin.mkdir()
    try:
        for file in folder.iterdir():
            if file.suffix == ".py" or file.name == "config.json":
                shutil.copy(file, twin)
        whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        save_file(whole, twin / "model.safetensors", metadata={"format": "pt"})
        del tensors, whole
        yield {twin: [torch.float64]}
    finally:
        shutil.rmtree(twin, ignore_errors=True)


def compare(claim: Claim, seen: Visit, exact: Visit | None = None) -> dict[str, Any]:
    """Judge what a stranger found in a folder; `exact` is of the same with `uncast` weights."""
    parity: dict[str, Any] = {
        "passed": False,
        "summary": [],
        "failures": about_loading(seen, exact),
        "first_deviating_layer": None,
        "target": claim.fit.host.name if claim.fit else "custom",
        "scheme": claim.scheme,
        "dtype": name_of(claim.dtype),
        "class": seen.facts.get("class"),
        "attention": seen.facts.get("attention"),
        "errors": {},
        "tolerances": {},
        "generation": None,
    }
    if not any("failure" in one.facts for one in (seen, exact) if one):
        twin = exact.passes["float64"] if exact else None
        ours = Ours.of(claim)
        errors, limits = ours.judge(seen.passes, twin)
        generation = ours.judge_generation(seen.passes["float64"], limits["float64"])
        parity |= {"errors": errors, "tolerances": limits, "generation": generation}
        parity["failures"] += about_errors(errors, limits, ours.scale)
        parity["failures"] += about_generation(generation)
        if parity["failures"] and claim.layerwise:
            parity["first_deviating_layer"] = ours.first_deviation(seen.passes["float64"], twin)
    parity["passed"] = not parity["failures"]
    parity["summary"] = summary(parity)
    return parity


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
