"""`model.start`: a run that continues a finished model, whatever its wiring."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmnorm import LlmNormConfig, build_config, build_model
from llmnorm.config import RunConfig, load_run_config
from llmnorm.config.start import HAND_MADE
from llmnorm.data import Prepared
from llmnorm.errors import CheckpointError, ConfigError
from llmnorm.evaluation.runs import open_run
from llmnorm.training.loop import train

from .conftest import Killed, metrics, numbers, stop_after

SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,  # fewer than the runs read
}

Tiny = Callable[..., RunConfig]


def started(folder: Path, **changes: Any) -> dict[str, Any]:
    """Changes to a tiny run that starts it from a model."""
    return {
        "model__start": str(folder),
        "model__preset": None,
        "model__overrides": {},
        "optimizer__lr": 1e-3,
        **changes,
    }


def save_model(data: Prepared, folder: Path, **choices: Any) -> Path:
    """Write an untrained model for the corpus, with its tokenizer."""
    ends = {"bos_token_id": data.eos_token_id, "eos_token_id": data.eos_token_id}
    shape = {**SHAPE, "vocab_size": data.vocab_size, **ends}
    build_model(build_config(shape, **choices), seed=5).save_pretrained(folder)
    data.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(data: Prepared, tmp_path: Path) -> Path:
    return save_model(data, tmp_path / "model", norm="layernorm", placement="lns")


def test_a_finished_run_is_continued_with_its_scheme_and_weights(tiny: Tiny) -> None:
    first = tiny("first", model__norm__op="layernorm", model__placement__name="lns")
    train(first)
    second = tiny("second", **started(first.output.dir), training__max_steps=1)
    train(second)
    before = metrics(first.output.dir)
    assert metrics(second.output.dir)[0]["train/loss"] < before[3]["train/loss"]
    config = LlmNormConfig.from_pretrained(second.output.dir / "final")
    assert config.residuals == LlmNormConfig.from_pretrained(first.output.dir / "final").residuals
    assert open_run(second.output.dir).scheme == open_run(first.output.dir).scheme
    resolved = load_run_config(second.output.dir / "config.yaml")
    assert resolved.fingerprint() == second.fingerprint()
    facts = json.loads((second.output.dir / "environment.json").read_text())
    assert len(facts["model.start"]["sha256"]) == 64


def test_the_first_loss_is_that_of_the_model_and_positions_grow(tiny: Tiny, model: Path) -> None:
    config = tiny("run", **started(model, training__max_steps=1, optimizer__lr=1e-30))
    assert train(config) == 0
    before = AutoModelForCausalLM.from_pretrained(model)
    after = AutoModelForCausalLM.from_pretrained(config.output.dir / "final")
    assert after.config.max_position_embeddings == config.data.seq_len
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(after(ids).logits, before(ids).logits)


def test_wiring_by_hand_is_continued_and_named(tiny: Tiny, data: Prepared, tmp_path: Path) -> None:
    config = build_config(dict(SHAPE), vocab_size=data.vocab_size)
    config.residuals[1]["mlp"] = {"out": {"op": "layernorm"}}
    config.norm = config.placement = None
    config.wiring = config.seal()
    build_model(config).save_pretrained(tmp_path / "hand")
    run = tiny("run", **started(tmp_path / "hand"), training__max_steps=1)
    train(run)
    assert (run.model.norm.op, run.model.placement.name) == (HAND_MADE, HAND_MADE)
    assert load_run_config(run.output.dir / "config.yaml") == run
    stored = LlmNormConfig.from_pretrained(run.output.dir / "final")
    assert stored.residuals == config.residuals


def test_a_continued_run_refuses_other_weights_but_needs_none(
    tiny: Tiny, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, stopped = (tiny(name, **started(model)) for name in ("straight", "stopped"))
    train(straight)
    stop_after(8, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(stopped)
    kept = shutil.copytree(model, model.with_name("kept"))
    changed = AutoModelForCausalLM.from_pretrained(model)
    changed.lm_head.weight.data[0, 0] += 1
    changed.save_pretrained(model)
    with pytest.raises(CheckpointError, match=r"began with other weights than model\.start="):
        train(stopped)
    (model / "model.safetensors").unlink()
    assert train(stopped) == 0
    assert numbers(stopped.output.dir) == numbers(straight.output.dir)
    moved = tiny("moved", **started(kept))
    assert moved.fingerprint() == straight.fingerprint()  # no path is in it


def refusal(tiny: Tiny, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        tiny("refused", **changes)
    return str(caught.value)


def test_keys_that_the_model_gives_must_agree_with_it(tiny: Tiny, model: Path) -> None:
    same = {"model__norm": {"op": "layernorm"}, "model__placement": {"name": "lns"}}
    assert tiny("same", **started(model), **same).model.norm.op == "layernorm"
    for key, value in (("norm__op", "derf"), ("placement__name", "peri_ln"), ("preset", "debug")):
        text = refusal(tiny, **{**started(model), f"model__{key}": value})
        assert "model.start gives it" in text
        assert len(text.splitlines()) == 1
    text = refusal(tiny, **started(model, model__overrides={"hidden_size": 64}))
    assert "model.start is taken as it is" in text
    text = refusal(tiny, **started(model, training__init_from=str(model)))
    assert "give one of the two" in text


def test_what_is_no_model_of_ours_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "expected a finished run or" in refusal(tiny, **started(tmp_path / "empty"))
    (tmp_path / "empty" / "config.yaml").touch()
    assert "this run is not finished" in refusal(tiny, **started(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    text = refusal(tiny, **started(tmp_path / "empty"))
    assert "this is a llama model; llmnorm import" in text
    (tmp_path / "empty" / "config.json").write_text("{")
    text = refusal(tiny, **started(tmp_path / "empty"))
    assert "cannot be read" in text
    assert len(text.splitlines()) == 1


def test_a_model_of_another_tokenizer_is_refused(
    tiny: Tiny, data: Prepared, model: Path, tmp_path: Path
) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    path.write_text(json.dumps(content))
    assert AutoTokenizer.from_pretrained(model).get_vocab()["A"] == vocab["A"]
    with pytest.raises(ConfigError, match=r"another tokenizer than the data \('[AB]' is"):
        train(tiny("a", **started(model)))
    path.unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    with pytest.raises(ConfigError, match="ends a text with token 7"):
        train(tiny("b", **started(model)))
    small = build_model(build_config(dict(SHAPE), vocab_size=data.vocab_size - 1))
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match=f"the data {data.vocab_size}; prepare"):
        train(tiny("c", **started(tmp_path / "small")))


def test_the_resolved_run_file_names_the_scheme(tiny: Tiny, model: Path) -> None:
    document = yaml.safe_load(tiny("run", **started(model)).to_yaml())["model"]
    assert (document["norm"]["op"], document["placement"]["name"]) == ("layernorm", "lns")
    assert document["start"] == str(model)
