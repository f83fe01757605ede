"""A run on several prepared folders: described, resumed, and refused with other weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from training.conftest import Killed, make_documents, numbers, stop_after, tiny_words

from llmnorm.config import RunConfig, load_run_config
from llmnorm.data import Prepared, PrepareOptions, prepare
from llmnorm.data.sources import Text
from llmnorm.errors import ConfigError
from llmnorm.training.loop import train


@pytest.fixture(scope="module")
def other(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A second, smaller corpus with the first one's tokenizer."""
    folder = tmp_path_factory.mktemp("second")
    (folder / "second.txt").write_text(make_documents(30, seed=8), encoding="utf-8")
    options = PrepareOptions(tokenizer=str(data.path), val_fraction=0.1)
    return prepare(Text(folder / "second.txt", whole_files=False), folder / "prepared", options)


def _config(output: Path, *folders: tuple[Prepared, float], **changes: Any) -> RunConfig:
    mix = [{"path": str(folder.path), "weight": weight} for folder, weight in folders]
    changes = {"data__path": None, "data__mix": mix, **changes}
    return load_run_config(None, tiny_words(Path("unused"), output, **changes))


def test_a_run_on_a_mixture_says_what_it_read_and_continues_exactly(
    data: Prepared, other: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = (data, 0.75), (other, 0.25)
    assert train(_config(tmp_path / "whole", *mixed)) == 0
    stop_after(7, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(_config(tmp_path / "run", *mixed))
    with pytest.raises(ConfigError, match=r"another configuration \(data\.mix: "):
        train(_config(tmp_path / "run", (data, 0.5), (other, 0.5)))
    assert train(_config(tmp_path / "run", *mixed)) == 0
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")

    facts = json.loads((tmp_path / "run" / "environment.json").read_text())["data"]
    assert [folder["path"] for folder in facts["folders"]] == [str(data.path), str(other.path)]
    assert [folder["weight"] for folder in facts["folders"]] == [0.75, 0.25]
    for folder, sequences in zip(facts["folders"], (54, 18), strict=True):  # of 12 steps of 6
        samples = (folder["train_tokens"] - 1) // 32
        assert folder["epochs"] == pytest.approx(sequences / samples)
        assert folder["skipped_documents"] == 0
