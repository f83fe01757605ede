"""Defects of published code (docs/errata.md), each reproduced in a few lines beside what we do."""

import ast
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from schemes import SHAPE
from torch import nn
from torch.nn.functional import silu

from llmnorm import build_config, build_model
from llmnorm.errors import ConfigError
from llmnorm.modeling.initialization import expected_std
from llmnorm.modeling.residual import ResidualSpec, constant

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]
ERRATA = (ROOT / "docs" / "errata.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", ERRATA)


# --- the page itself ---


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)))
def test_every_test_that_the_errata_name_exists(path, name):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_errata_names_its_test_or_says_that_there_is_none():
    rows = [line for line in ERRATA.splitlines() if line.startswith("| ")]
    entries = [row for row in rows if not re.match(r"\| (code|---)", row)]
    assert len(entries) > 30
    for row in entries:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 4, row
        assert "::" in cells[3] or cells[3] == "read in the code, not tested", row


def test_every_test_of_this_file_about_a_defect_stands_in_the_errata():
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    mine = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    mine = {name for name in mine if name.startswith("test_") and "errata" not in name}
    assert mine == {name for path, name in NAMED if path == "tests/test_errata.py"}


# --- LayerNorm Scaling, Mix-LN and their trainer ---


def test_a_lowered_name_never_equals_an_upper_case_one_and_no_norm_is_built():
    def official(norm_type: str, x: torch.Tensor) -> torch.Tensor:
        norm_type = norm_type.lower()
        if norm_type == "pre":
            return x + 1
        if norm_type == "LNS":
            return x + 1
        return x

    x = torch.zeros(3)
    assert torch.equal(official("LNS", x), x)
    assert torch.equal(official("lns", x), x)
    with pytest.raises(ConfigError, match="unknown placement 'LNS'"):
        build_config(SHAPE, placement="LNS")


def test_a_counter_that_starts_at_1_lowers_the_loss_by_a_share_that_depends_on_the_batches():
    tokens = torch.full((256,), 3.25, dtype=torch.float64)
    for batches in (4, 16, 256):
        means = tokens.view(batches, -1).mean(dim=1)
        total, count = 0.0, 1
        for mean in means:
            total, count = total + mean.item(), count + 1
        assert total / count == pytest.approx(3.25 * batches / (batches + 1))


def test_a_mean_of_batch_means_weighs_short_batches_too_much():
    full, padded = torch.full((8,), 2.0), torch.full((2,), 4.0)
    assert torch.stack([full.mean(), padded.mean()]).mean().item() == 3.0
    assert torch.cat([full, padded]).mean().item() == pytest.approx(2.4)


def test_bf16_weights_lose_updates_below_a_part_in_512():
    weight, update = torch.ones(4), 1.9e-3
    assert torch.equal(weight.bfloat16() - update, torch.ones(4, dtype=torch.bfloat16))
    assert (weight - update < 1).all()


@pytest.mark.parametrize(("depth", "right", "wrong"), [(12, 0.3195, 3.130), (24, 0.2686, 3.722)])
def test_the_inverted_exponent_makes_deepnorms_gain_too_large_by_the_root_of_8_l(
    depth, right, wrong
):
    config = build_config(SHAPE, placement="deepnorm", num_hidden_layers=depth)
    square = nn.Linear(64, 64)
    ratio = expected_std("model.layers.0.self_attn.o_proj", square, config) / expected_std(
        "model.layers.0.self_attn.q_proj", square, config
    )
    assert ratio == pytest.approx(right, abs=5e-5)
    assert (8 * depth) ** 0.25 == pytest.approx(wrong, abs=5e-4)
    assert (8 * depth) ** 0.25 / ratio == pytest.approx(math.sqrt(8 * depth))


def test_a_fixed_skip_of_2_8284_is_deepnorms_at_32_layers_alone():
    for depth in (12, 24, 32, 48):
        spec = build_config(SHAPE, placement="deepnorm", num_hidden_layers=depth)
        alpha = spec.residual_specs()[0][0].skip.options["value"]
        assert (abs(alpha - 2.8284) < 1e-4) == (depth == 32)


def test_a_padding_index_of_minus_1_is_the_last_row_and_keeps_it_zero():
    embedding = nn.Embedding(5, 4, padding_idx=-1)
    embedding(torch.arange(5)).sum().backward()
    assert not embedding.weight[-1].any()
    assert not embedding.weight.grad[-1].any()
    assert embedding.weight.grad[:-1].all()
    ours = build_model(build_config(SHAPE)).model.embed_tokens.weight
    assert ours.any(dim=1).all()


def test_a_gain_that_starts_at_1_over_root_l_takes_larger_relative_steps_than_a_constant_factor():
    layer, lr = 16, 1e-3
    outputs = []
    for factor, start in ((layer**-0.5, 1.0), (1.0, layer**-0.5)):
        gain = nn.Parameter(torch.full((4,), start))
        before = (factor * gain).detach()
        optimizer = torch.optim.Adam([gain], lr=lr)
        (factor * gain).sum().backward()
        optimizer.step()
        outputs.append(((factor * gain).detach() / before - 1).abs().max())
    assert outputs[1] / outputs[0] == pytest.approx(math.sqrt(layer), rel=1e-3)


# --- torchscale, fairseq ---


def test_deepnorm_alone_in_torchscales_config_is_a_pre_ln_whose_stream_is_multiplied():
    depth = 4
    config = build_config(SHAPE, placement="deepnorm", num_hidden_layers=depth)
    norm, alpha = config.residual_specs()[0][0].out, (2 * depth) ** 0.25
    model = build_model(config)
    wiring = ResidualSpec(pre=norm, skip=constant(alpha)).to_dict()
    config.norm = config.placement = None
    config.residuals = [{"attn": wiring, "mlp": wiring}] * depth
    config.final_norm, config.init = None, "plain"
    official = build_model(config)
    with torch.no_grad():
        for each in (model, official):
            for layer in each.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        ids = torch.arange(6)[None]
        start = official.model.embed_tokens(ids)
        grown = official.model(ids).last_hidden_state
        assert torch.allclose(grown, start * alpha ** (2 * depth))
        rms = model.model(ids).last_hidden_state.square().mean(-1).sqrt()
        torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0)


def test_torchs_default_init_is_smaller_than_xaviers():
    torch.manual_seed(0)
    default = nn.Linear(256, 256).weight.std().item()
    xavier = math.sqrt(2 / (256 + 256))
    assert xavier / default == pytest.approx(math.sqrt(3), rel=0.02)


# --- point-wise functions ---


def test_a_field_without_a_type_is_no_field_and_its_keyword_is_refused():
    @dataclass
    class GPTConfig:
        bias: bool = False
        norm_type = "ln"

    assert [field.name for field in fields(GPTConfig)] == ["bias"]
    with pytest.raises(TypeError, match="norm_type"):
        GPTConfig(norm_type="derf")
    with pytest.raises(ConfigError, match="no config field is called 'norm_typ'"):
        build_config(SHAPE, norm_typ="derf")


def test_decaying_alpha_shrinks_it_to_less_than_half_over_a_run():
    steps, peak, decay = 48_000, 3e-4, 0.1
    alpha = 1.0
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        alpha *= 1 - decay * peak * (0.1 + 0.9 * cosine)
    assert alpha == pytest.approx(0.45, abs=0.005)


def test_without_the_embedding_scale_the_first_tanh_gets_a_signal_of_0_056():
    torch.manual_seed(0)
    token, position = 0.02 * torch.randn(2, 100_000)
    first = torch.tanh(2.0 * (token + position)).square().mean().sqrt().item()
    assert first == pytest.approx(0.056, abs=1e-3)
    model = build_model(build_config({**SHAPE, "vocab_size": 4096}, norm="dyt"))
    trunk = model.model
    scaled = trunk.embedding_scale(trunk.embed_tokens(torch.arange(4096)[None]))
    assert scaled.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.02)


def test_a_text_never_equals_a_list_of_it_and_the_final_norm_is_not_built():
    def official(norm_type: str) -> nn.Module | None:
        return nn.LayerNorm(4) if norm_type == ["bhytstar"] else None

    assert official("bhytstar") is None
    assert build_config(SHAPE, norm="bhyt").final_norm["op"] == "rmsnorm"


# --- GPAS, nGPT ---


def test_a_gate_above_1_278_turns_the_stream_around():
    assert silu(torch.tensor(1.2784645)).item() == pytest.approx(1.0, abs=1e-6)
    assert 1 - silu(torch.tensor(1.3)).item() < 0 < 1 - silu(torch.tensor(1.25)).item()


def test_ngpts_rotary_changes_lengths_and_sees_more_than_the_distance():
    def official(x: torch.Tensor, position: int) -> torch.Tensor:
        dim = x.shape[-1]
        angles = position * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten()
        sine, cosine = table[: dim // 2], table[dim // 2 :]
        return torch.stack((-x[1::2] * cosine, x[0::2] * sine), dim=-1).flatten()

    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    assert abs(official(q, 3).norm() / q.norm() - 1) > 0.1
    scores = [official(q, n + 2) @ official(k, n) for n in (0, 5)]
    assert abs(scores[0] - scores[1]) > 0.1


def test_unit_rows_undo_ngpts_scaled_init_of_output_projections():
    torch.manual_seed(0)
    weight = torch.randn(6, 4, dtype=torch.float64)
    unit = [w / w.norm(dim=0, keepdim=True) for w in (weight, weight / math.sqrt(2 * 12))]
    torch.testing.assert_close(*unit)
