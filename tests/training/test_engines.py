"""Only the engines know which engine runs."""

import re
from pathlib import Path

import pytest

import llmnorm
from llmnorm.errors import EnvironmentProblem
from llmnorm.training.engines import Engine, choose_engine
from llmnorm.training.engines.plain import PlainEngine

pytestmark = pytest.mark.fast

PACKAGE = Path(llmnorm.__file__).parent
VERBS = {"prepare", "backward", "clip_and_step", "pieces", "load_pieces", "finish"}
ASKING = re.compile(
    r"DistributedDataParallel|deepspeed|fsdp|fully_shard|Accelerator\(|distributed_type"
    r"|PlainEngine|isinstance\([^)]*engine|engine\.name\s*(==|in)",
    re.IGNORECASE,
)


def test_nothing_outside_engines_asks_which_engine_runs() -> None:
    asked = []
    files = [*(PACKAGE / "training").glob("*.py"), *(PACKAGE.parent / "train").glob("*.py")]
    assert len(files) > 10
    for path in files:
        if path.name == "finetuning.py":
            continue  # it runs TRL's loop, not ours
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
        for line in code.splitlines():
            if ASKING.search(line.partition("#")[0]):
                asked.append(f"{path.name}: {line.strip()}")
    assert asked == []


def test_the_protocol_is_six_verbs_and_the_plain_engine_has_them() -> None:
    declared = {name for name in vars(Engine) if not name.startswith("_")}
    assert declared == VERBS
    assert all(callable(getattr(PlainEngine, verb)) for verb in VERBS)


def test_script_and_loop_are_short() -> None:
    script = PACKAGE.parent / "train" / "pretrain.py"
    assert len(script.read_text().splitlines()) <= 60
    loop = PACKAGE / "training" / "loop.py"
    assert len(loop.read_text().splitlines()) < 300


def test_processes_that_form_no_group_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: PlainEngine, *, cpu: bool) -> None:
        raise RuntimeError("connectFullMesh failed: timed out\nand forty lines more")

    monkeypatch.setattr(PlainEngine, "__init__", refused)
    with pytest.raises(EnvironmentProblem, match=r"form a group: .*timed out; llmnorm"):
        choose_engine()
