"""The presets: each builds by name and has the shape and size that models/README.md claims."""

import json
from pathlib import Path

import pytest
from schemes import FULL

from llmnorm import build_config
from llmnorm.errors import ConfigError
from llmnorm.listing import count_parameters
from llmnorm.resources import list_presets, preset_folder

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ["debug", "9m", "20m", "60m", "71m", "130m", "250m", "350m", "1b", "3b", "7b"]
# Shapes of the C4 ladder: hidden_size, intermediate_size, heads, layers.
PUBLISHED = {
    "71m": (512, 1368, 8, 12),
    "130m": (768, 2048, 12, 12),
    "250m": (768, 2560, 16, 24),
    "350m": (1024, 2736, 16, 24),
    "1b": (2048, 5461, 32, 24),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
}
SHAPE_FIELDS = {
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "hidden_act",
    "rope_parameters",
    "tie_word_embeddings",
}


def readme_rows() -> dict[str, list[str]]:
    lines = (ROOT / "models" / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return {row[0]: row[1:] for row in rows if row[0] in PRESETS}


def test_the_presets_are_those_promised_smallest_first():
    assert list_presets() == PRESETS
    assert list(readme_rows()) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_states_shape_and_parameter_counts(name):
    config = build_config(name)
    total, inner = count_parameters(config)
    assert readme_rows()[name] == [
        f"{total:,}",
        f"{inner:,}",
        str(config.num_hidden_layers),
        str(config.hidden_size),
        str(config.intermediate_size),
        str(config.num_attention_heads),
        str(config.vocab_size),
        "tied" if config.tie_word_embeddings else "untied",
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_the_count_is_that_of_a_llama_of_this_shape(name):
    config = build_config(name)
    width, mlp, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    block = 4 * width**2 + 3 * width * mlp + 2 * width  # q k v o, gate up down, two norms
    tables = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    assert count_parameters(config) == (depth * block + width + tables, depth * block + width)


@pytest.mark.parametrize("name", PUBLISHED)
def test_ladder_presets_have_the_published_shapes(name):
    config = build_config(name)
    shape = (config.hidden_size, config.intermediate_size)
    assert (*shape, config.num_attention_heads, config.num_hidden_layers) == PUBLISHED[name]
    assert config.num_key_value_heads == config.num_attention_heads
    assert (config.vocab_size, config.tie_word_embeddings) == (32000, False)


def test_debug_has_about_1_3_million_parameters():
    assert 1.25e6 < count_parameters(build_config("debug"))[0] < 1.35e6


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_shapes_only(name):
    content = json.loads((preset_folder(name) / "config.json").read_text())
    assert set(content) == SHAPE_FIELDS
    assert content["model_type"] == "llmnorm"


@pytest.mark.parametrize(("norm", "placement"), FULL)
def test_every_scheme_fits_a_preset(norm, placement):
    config = build_config("9m", norm=norm, placement=placement)
    total, inner = count_parameters(config)
    assert 8.9e6 < total < 9.1e6
    assert 0 < inner < 1e6


def test_a_misspelt_preset_suggests_the_nearest():
    with pytest.raises(ConfigError, match="'130M'; did you mean 130m"):
        build_config("130M")
