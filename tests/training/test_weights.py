"""Weights start a new run only where they mean the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmnorm import build_config, build_model
from llmnorm.errors import CheckpointError
from llmnorm.training.weights import load_weights

pytestmark = pytest.mark.fast

SHAPE = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}


def _model(seed: int = 0, **changes: Any) -> Any:
    return build_model(build_config(SHAPE, **{"num_attention_heads": 2, **changes}), seed=seed)


def _folder(path: Path, **changes: Any) -> Path:
    _model(seed=1, **changes).save_pretrained(path)
    return path


def test_the_same_model_takes_all_weights(tmp_path: Path) -> None:
    model = _model(placement="lns")
    load_weights(model, _folder(tmp_path, placement="lns"))
    for name, value in _model(seed=1, placement="lns").state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_tied_model_takes_an_untied_head_only_if_it_is_the_embedding(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not model\.embed_tokens"):
        load_weights(_model(tie_word_embeddings=True), _folder(tmp_path / "untied"))
    source = _model(seed=1)
    with torch.no_grad():
        source.lm_head.weight.copy_(source.model.embed_tokens.weight)
    source.save_pretrained(tmp_path / "equal")
    model = _model(tie_word_embeddings=True)
    load_weights(model, tmp_path / "equal")
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)


def test_an_untied_model_refuses_a_tied_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        load_weights(_model(), _folder(tmp_path, tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"placement": "lns"}, r"its residuals\.1\.attn\.pre\.scale is 0\.7"),
        ({"norm": {"op": "rmsnorm", "eps": 1e-3}}, r"residuals\.0\.attn\.pre\.eps is 0\.001"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, this run's 2"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"position": "none"}, "position is none"),
        ({"rope_theta": 5e5}, r"rope_theta is 500000\.0, this run's 10000"),
    ],
    ids=["lns", "eps", "heads", "act", "position", "rope"],
)
def test_equal_shapes_of_another_wiring_are_refused(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = _folder(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=named):
        load_weights(_model(), folder)


@pytest.mark.parametrize("weights", ["unit", "project", "lawn"])
def test_matrices_trained_freely_do_not_start_a_run_that_holds_their_length(
    weights: str, tmp_path: Path
) -> None:
    """The first step would rescale them, and with them the function."""
    folder = _folder(tmp_path)
    with pytest.raises(CheckpointError, match=f"its weights is plain, this run's {weights}"):
        load_weights(_model(weights=weights), folder)
    path = folder / "config.json"  # another library's file of the same names and shapes
    path.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=f"its weights is plain, this run's {weights}"):
        load_weights(_model(weights=weights), folder)
    load_weights(_model(), folder)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"initializer_range": 0.06}, r"projected\.initializer_range is 0.06, this run's 0.02"),
        ({"init": "scaled"}, r"projected\.init is scaled, this run's plain"),
    ],
)
def test_projected_matrices_of_another_length_are_refused(
    other: dict[str, Any], named: str, tmp_path: Path
) -> None:
    project: Any = {"kind": "project", "interval_steps": 3}
    folder = _folder(tmp_path, weights="project", **other)
    with pytest.raises(CheckpointError, match=named):
        load_weights(_model(weights=project), folder)
    load_weights(_model(weights=project, **other), folder)
    free = _folder(tmp_path / "free", **other)
    load_weights(_model(), free)  # where nothing keeps a length, init tells nothing


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone/config\.json cannot be read"):
        load_weights(_model(), tmp_path / "gone")


@pytest.mark.parametrize("text", ["[]", "residuals"])
def test_a_config_of_odd_types_is_one_line(text: str, tmp_path: Path) -> None:
    path = _folder(tmp_path) / "config.json"
    if text == "residuals":
        text = json.dumps({**json.loads(path.read_text()), "residuals": 5})
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_weights(_model(), tmp_path)
