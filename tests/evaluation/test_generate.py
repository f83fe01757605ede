"""Sampling settings mean what their names say."""

import pytest
import torch

from llmnorm.errors import CheckpointError, ConfigError
from llmnorm.evaluation.generate import continue_text
from llmnorm.evaluation.loading import load

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load(str(model_folder))


def test_greedy_takes_the_likeliest_token_each_time(loaded):
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = tokenizer.encode("hello")
    for _ in range(6):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    wanted = tokenizer.decode(ids).removeprefix("hello")
    assert continue_text(loaded, "hello", max_new_tokens=6, temperature=0) == wanted
    nearly = continue_text(loaded, "hello", max_new_tokens=6, top_k=1, seed=5)
    assert nearly == wanted


def test_the_seed_decides_and_the_global_state_stays(loaded):
    before = torch.get_rng_state()
    first, again, other = (
        continue_text(loaded, "hello", max_new_tokens=20, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


def test_an_empty_prompt_begins_with_end_of_text(loaded):
    assert isinstance(continue_text(loaded, "", max_new_tokens=3), str)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1e-45}, "temperature is 1e-45"),
        ({"seed": 2**64}, "seed is"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 124}, "use at most 123 new tokens"),
    ],
)
def test_settings_out_of_range_are_refused(loaded, setting, message):
    with pytest.raises(ConfigError, match=message):
        continue_text(loaded, "hello", **setting)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_finite_give_no_text(model_folder, temperature):
    spoilt = load(str(model_folder))
    spoilt.model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="logits are not finite"):
        continue_text(spoilt, "hello", temperature=temperature)


def test_a_prompt_that_is_no_text_is_refused(loaded):
    with pytest.raises(ConfigError, match="expected UTF-8"):
        continue_text(loaded, "caf\udce9")
    assert isinstance(continue_text(loaded, "café", max_new_tokens=1), str)
