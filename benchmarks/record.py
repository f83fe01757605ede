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


def write_result(name: str, headline: str, figures: Mapping[str, Any]) -> Path:
    """Write `results/NAME.json`, bring README.md up to date, and return the result's path."""
    record = {
        "headline": headline,
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
    _write_readme()
    return path


def _write_readme() -> None:
    """List every result in README.md, so that the table says nothing that was not measured."""
    lines = [
        "# Benchmarks",
        "",
        "Each script writes its result and this table; ratios are of runs side by side.",
        "",
        "| result | what was measured | command | machine | commit |",
        "| --- | --- | --- | --- | --- |",
    ]
    for file in sorted(RESULTS.glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        machine, commit = found["machine"], str(found["commit"])[:12]
        lines.append(
            f"| [{file.stem}](results/{file.name}) | {found['headline']} | `{found['command']}` "
            f"| {machine['device']}, {machine['threads']} threads | {commit} |"
        )
    readme = RESULTS.parent / "README.md"
    readme.write_text("\n".join(lines) + "\n", encoding="utf-8")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum of several runs."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
