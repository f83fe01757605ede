"""Write a measurement beside what is needed to judge it: command, commit, machine, versions."""

import json
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmnorm.environment import device_name, git_commit, versions

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, figures: Mapping[str, Any]) -> Path:
    """Write `results/NAME.json` and return its path."""
    record = {
        "command": " ".join(["python", *sys.argv]),
        "commit": git_commit(),
        "machine": {
            "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": versions("datasets"),
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum of several runs."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
