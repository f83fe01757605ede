"""Send a stranger to folders: a fresh process without llmnorm loads and measures them.

What it does there is in `stranger.py`; what is made of it, in `certificate.py`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llmnorm.errors import EnvironmentProblem
from llmnorm.export import stranger
from llmnorm.export.form import Tensors

_NEW_TOKENS = 16
_LAUNCHED = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "ACCELERATE_", "TORCHELASTIC_")


@dataclass(frozen=True)
class Visit:
    """What a stranger found in a folder: facts of loading, and what `measure` gave, by dtype."""

    facts: Mapping[str, Any]
    passes: Mapping[str, Tensors] = field(default_factory=dict)


def visit(
    folders: Mapping[Path, Sequence[torch.dtype]],
    text: torch.Tensor,
    *,
    trust_remote_code: bool,
    timeout_seconds: float = 3600,
) -> list[Visit]:
    """Measure each folder in its dtypes, one after the other, in one fresh process.

    The class's own attention is used, as a user's would be. What a folder's files or code raise is
    among the facts, as `failure`.

    Args:
        folders: Hugging Face folders, and what to load each in.
        text: token ids (batch, seq).
        trust_remote_code: whether code in the folders may run.
        timeout_seconds: for all of them.

    Raises:
        EnvironmentProblem: if the process cannot be run to its end.
    """
    with tempfile.TemporaryDirectory(prefix="llmnorm-parity-") as place:
        out = Path(place)
        request = {
            "folders": [str(folder.absolute()) for folder in folders],
            "dtypes": [[name_of(kind) for kind in asked] for asked in folders.values()],
            "ids": text.tolist(),
            "new_tokens": new_tokens(text),
            "trust_remote_code": trust_remote_code,
            "threads": torch.get_num_threads(),
        }
        (out / "request.json").write_text(json.dumps(request), encoding="utf-8")
        _run(out, timeout_seconds)
        return [_read(out, number) for number in range(len(folders))]


def kinds(dtype: torch.dtype) -> list[torch.dtype]:
    """The dtypes that a folder is measured in."""
    return list(dict.fromkeys((torch.float64, torch.float32, dtype)))


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def new_tokens(text: torch.Tensor) -> int:
    """Tokens to generate after half a row, so that no more positions are used than the text has."""
    return min(_NEW_TOKENS, text.shape[1] - text.shape[1] // 2)


def _run(out: Path, timeout_seconds: float) -> None:
    # -P: modules are not looked for beside the script. -I would also lose PYTHONPATH and the user's
    # site, where torch may be.
    command = [sys.executable, "-P", stranger.__file__, str(out / "request.json"), str(out)]
    env = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHED)}
    env |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(out / "modules")}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            cwd=out,
            env=env,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(
            f"the process that loads the export was not done after {timeout_seconds:g} s"
        ) from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it said nothing; is there enough memory?"]
        raise EnvironmentProblem(
            f"the process that loads the export ended with {done.returncode}: {lines[-1][:400]}"
        )


def _read(out: Path, number: int) -> Visit:
    facts = json.loads((out / f"{number}.json").read_text(encoding="utf-8"))
    files = sorted(out.glob(f"{number}.*.safetensors"))
    return Visit(facts, {file.name.split(".")[1]: load_file(file) for file in files})
