"""The check that a saved scheme loads, with equal logits, where llmnorm is not installed."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.modeling.operations import OPERATIONS
from llmnorm.modeling.residual import Residual
from llmnorm.placements import parse_placement
from llmnorm.testing.scheme import Scheme, expect, tokens

_IDS = tokens(2, 11)
_TIMEOUT_SECONDS = 600


def check_saving(scheme: Scheme) -> str:
    """A saved model loads with equal logits here, and in a process without llmnorm."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        check_loading(scheme, root / "saved" / "scheme")
        equal = load_as_stranger(root / "saved", without=packages(scheme), home=root / "home")
    expect(all(equal.values()), f"equal logits without llmnorm: {equal}", "true for all")
    return f"loaded without {', '.join(sorted(packages(scheme)))}"


@torch.no_grad()
def check_loading(scheme: Scheme, folder: Path) -> str:
    """Save a model and load it with equal logits; its inputs and logits are left beside it."""
    model = scheme.moved().float().eval()
    model.save_pretrained(folder)
    logits = model(_IDS).logits
    save_file({"ids": _IDS, "logits": logits}, folder.with_name(f"{folder.name}.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    expect(type(loaded) is LlmNormForCausalLM, f"a {type(loaded).__name__}", "our class")
    expect(torch.equal(loaded(_IDS).logits, logits), "other logits after loading", "equal ones")
    return "equal logits"


def packages(scheme: Scheme) -> set[str]:
    """The packages that a saved model of the scheme must do without: llmnorm and its author's."""
    known = (*OPERATIONS.values(), Residual)
    classes: set[type] = {type(m) for m in scheme.model().modules() if isinstance(m, known)}
    classes.add(type(parse_placement(scheme.placement)))
    return {cls.__module__.partition(".")[0] for cls in classes} | {"llmnorm"}


def load_as_stranger(folder: Path, *, without: set[str], home: Path) -> Mapping[str, bool]:
    """Load every model in `folder` in a fresh process that cannot import the given packages.

    Args:
        folder: holds one folder a model, and beside each its ids and logits (`check_loading`).
        without: packages whose import fails there.
        home: where transformers keeps the code of the models.

    Returns:
        For each model, and for one of them saved again, whether the logits are equal bit by bit.
    """
    answer = home / "equal.json"
    home.mkdir(parents=True, exist_ok=True)
    script, threads = Path(__file__).with_name("stranger.py"), str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(folder), str(answer), threads, *sorted(without)],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        stdin=subprocess.DEVNULL,
        cwd=home,
        env={"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": os.defpath},
        check=False,
    )
    last = " ".join(done.stderr.split())[-500:]
    expect(done.returncode == 0, f"a process without llmnorm fail: {last}", "it to load the model")
    equal: Mapping[str, bool] = json.loads(answer.read_text(encoding="utf-8"))
    return equal
