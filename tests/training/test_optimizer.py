"""Who is decayed, who is on which branch, and that two runs of a step agree bit for bit."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmnorm import build_config, build_model
from llmnorm.errors import ConfigError
from llmnorm.training.engines.plain import PlainEngine
from llmnorm.training.loop import train
from llmnorm.training.muon import MuonWithAdamW
from llmnorm.training.optimizer import describe_groups, make_optimizer, parameter_groups

from .conftest import metrics

pytestmark = pytest.mark.fast

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _settings(name: str = "adamw", **options: Any) -> Any:
    return SimpleNamespace(
        name=name, lr=1e-2, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8, options=options
    )


def _model(norm: str = "derf", tied: bool = False, **fields: Any) -> Any:
    return build_model(build_config(SHAPE, norm=norm, tie_word_embeddings=tied, **fields), seed=0)


def _with_gradients(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def test_only_matrices_of_linear_layers_are_decayed() -> None:
    model = _model(attention_bias=True, embedding="scale")
    decayed, rest = parameter_groups(model, _settings())
    assert (decayed.weight_decay, rest.weight_decay) == (0.1, 0.0)
    assert len(decayed.names) == 2 * 7 + 1
    assert all(name.endswith("_proj.weight") or name == "lm_head.weight" for name in decayed.names)
    undecayed = {name.rsplit(".", 1)[-1] for name in rest.names}
    assert {"alpha", "shift", "bias", "weight"} <= undecayed
    assert "model.embed_tokens.weight" in rest.names
    assert "model.embedding_scale.weight" in rest.names
    assert set(decayed.names) | set(rest.names) == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("weights", "decayed"),
    [
        ("plain", "blocks and head"),
        ("project", "blocks and head"),
        ("weight_norm", "head"),
        ("lawn", "head"),
        ("unit", ""),
    ],
)
def test_a_matrix_whose_length_is_held_or_learned_apart_is_not_decayed(
    weights: str, decayed: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = _model(norm="rmsnorm", weights=weights)
    with caplog.at_level("INFO"):
        records = describe_groups(model, _settings(name))
    found = {key for record in records if record["weight_decay"] for key in record["names"]}
    blocks = {key for key, p in model.named_parameters() if ".layers." in key and p.ndim == 2}
    wanted = blocks if "blocks" in decayed else set()
    assert found == wanted | ({"lm_head.weight"} if "head" in decayed else set())
    told = f"weights {weights}: its matrices are not decayed"
    assert (told in caplog.text) == ("blocks" not in decayed)
    optimizer = make_optimizer(model, _settings(name))
    held = model.model.layers[0].mlp.up_proj.weight
    (group,) = [g for g in optimizer.param_groups if any(p is held for p in g["params"])]
    assert group["weight_decay"] == (0.1 if wanted else 0.0)


def test_a_tied_unit_head_is_not_decayed_either(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        records = describe_groups(_model(norm="rmsnorm", tied=True, weights="unit"), _settings())
    assert {record["weight_decay"] for record in records} == {0.0}
    assert "share one matrix" not in caplog.text


def test_a_matrix_shared_by_head_and_embedding_is_decayed_and_said_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = _model(tied=True)
    with caplog.at_level("INFO"):
        records = describe_groups(model, _settings())
    assert "model.embed_tokens.weight" in records[0]["names"]
    assert records[0]["weight_decay"] == 0.1
    assert "share one matrix" in caplog.text


def test_an_undecayed_parameter_without_gradient_signal_keeps_its_value() -> None:
    model = _model()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_optimizer(model, _settings()).step()
    decayed, rest = parameter_groups(model, _settings())
    after = dict(model.named_parameters())
    for name in rest.names:
        assert torch.equal(after[name], before[name]), name
    for name in decayed.names:
        torch.testing.assert_close(after[name], before[name] * (1 - 1e-2 * 0.1), msg=name)


def test_fused_adamw_is_the_textbook_update_and_repeats_bit_for_bit() -> None:
    results = []
    for _ in range(2):
        model = _with_gradients(_model())
        optimizer = make_optimizer(model, _settings())
        assert optimizer.defaults["fused"]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        results.append({name: p.detach().clone() for name, p in model.named_parameters()})
    name = "model.layers.0.mlp.up_proj.weight"
    grad = dict(model.named_parameters())[name].grad
    by_hand = before[name] * (1 - 1e-3) - 1e-2 * grad / (grad.abs() + 1e-8)
    torch.testing.assert_close(results[0][name], by_hand, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_muon_takes_every_hidden_matrix_and_adamw_the_rest() -> None:
    model = _model(norm="rmsnorm")
    optimizer = make_optimizer(model, _settings("muon"))
    assert isinstance(optimizer, MuonWithAdamW)
    norms, ends = 2 * 2 + 1, 2
    assert optimizer.counts == {"muon": 2 * 7, "adamw": norms + ends}
    _with_gradients(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    slots = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    assert slots["model.layers.1.self_attn.q_proj.weight"] == {"momentum_buffer"}
    assert slots["lm_head.weight"] == {"step", "exp_avg", "exp_avg_sq"}


def test_muon_takes_its_own_learning_rate_and_options() -> None:
    optimizer = make_optimizer(
        _model(), _settings("muon", matrix_lr=0.02, momentum=0.9, adjust_lr_fn="original")
    )
    muon, *adamw = optimizer.param_groups
    assert (muon["lr"], muon["momentum"], muon["adjust_lr_fn"]) == (0.02, 0.9, "original")
    assert {group["lr"] for group in adamw} == {1e-2}


def test_muon_state_survives_a_round_trip() -> None:
    model = _with_gradients(_model())
    first = make_optimizer(model, _settings("muon"))
    first.step()
    second = make_optimizer(model, _settings("muon"))
    second.load_state_dict(first.state_dict())
    for parameter, slots in first.state.items():
        for slot, value in slots.items():
            assert torch.equal(value, second.state[parameter][slot])


def test_a_class_of_another_package_gets_groups_and_options() -> None:
    optimizer = make_optimizer(
        _model(), _settings("torch.optim:NAdam", momentum_decay=0.02, decoupled_weight_decay=True)
    )
    assert isinstance(optimizer, torch.optim.NAdam)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.defaults["momentum_decay"] == 0.02
    assert optimizer.defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("name", "options", "seen"),
    [
        ("torch.optim:Adamm", {}, "Adamm"),
        ("torch.nothere:Adam", {}, "nothere"),
        ("adamw", {"betta": 1}, "betta"),
        ("muon", {"momentum": -1.0}, "momentum"),
        ("torch.optim:Adamm", {}, r"^optimizer\.name='torch\.optim:Adamm' cannot be imported"),
        ("adamw", {"lr": 1.0}, r"set optimizer\.lr instead"),
        ("adamw", {"weight_decay": 0.5}, r"set optimizer\.weight_decay instead"),
        ("torch.optim:NAdam", {"betas": [0.5, 0.5]}, r"set optimizer\.betas instead"),
        ("adamw", {"eps": 1.0}, r"set optimizer\.eps instead"),
        ("adamw", {"params": []}, r"optimizer\.options\.params"),
        ("muon", {"lr": 1.0}, r"set optimizer\.lr instead .*options\.matrix_lr"),
        ("muon", {"weight_decay": 0.5}, r"set optimizer\.weight_decay instead"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(
    name: str, options: dict[str, Any], seen: str
) -> None:
    with pytest.raises(ConfigError, match=seen):
        make_optimizer(_model(), _settings(name, **options))


# --- muP ----------------------------------------------------------------------------------------

MUP = {"name": "mup", "base_width": 8, "base_depth": 1, "alpha": 0.5}  # m_d = 2, m_L = 2


def _record(records: list[dict[str, Any]], name: str) -> tuple[str, float, float, float]:
    (found,) = [record for record in records if name in record["names"]]
    return (
        found["branch"],
        pytest.approx(found["weight_decay"]),
        pytest.approx(found["lr_factor"]),
        pytest.approx(found["eps_factor"]),
    )


@pytest.mark.parametrize("tied", [False, True])
def test_mup_gives_the_parameters_of_blocks_their_own_numbers(
    tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = _model(norm="layernorm", tied=tied, parametrization=MUP, attention_bias=True)
    with caplog.at_level("INFO"):
        records = describe_groups(model, _settings())
    root = 2**-0.5
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        wanted = ("adamw", 0.2, root / 2, root / 2)
        assert _record(records, f"model.layers.1.{name}.weight") == wanted
    for name in ("attn_residual.pre.weight", "mlp_residual.pre.bias", "self_attn.k_proj.bias"):
        assert _record(records, f"model.layers.0.{name}") == ("adamw", 0.0, root, 1.0)
    assert _record(records, "model.norm.weight") == ("adamw", 0.0, 1.0, 1.0)
    decay = 0.1 if tied else 0.0
    assert _record(records, "model.embed_tokens.weight") == ("adamw", decay, 1.0, 1.0)
    if not tied:
        assert _record(records, "lm_head.weight") == ("adamw", 0.1, 1.0, 1.0)
    assert sum(record["elements"] for record in records) == sum(
        parameter.numel() for parameter in model.parameters()
    )
    assert "weight decay 0.2, lr x 0.353553, eps x 0.353553" in caplog.text


def test_the_optimizer_steps_with_these_numbers() -> None:
    """The first step of AdamW, by hand: w (1 - lr wd) - lr g / (|g| + eps)."""
    model = _with_gradients(_model(norm="rmsnorm", parametrization=MUP))
    settings = _settings()
    settings.eps = 0.5
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_optimizer(model, settings).step()
    root = 2**-0.5
    for name, lr, decay, eps in (
        ("model.layers.1.mlp.up_proj.weight", root / 2, 0.2, root / 2),
        ("model.layers.0.attn_residual.pre.weight", root, 0.0, 1.0),
        ("lm_head.weight", 1.0, 0.1, 1.0),
        ("model.embed_tokens.weight", 1.0, 0.0, 1.0),
    ):
        parameter = model.get_parameter(name)
        grad = parameter.grad
        wanted = before[name] * (1 - 1e-2 * lr * decay)
        wanted = wanted - 1e-2 * lr * grad / (grad.abs() + 0.5 * eps)
        torch.testing.assert_close(parameter, wanted, rtol=1e-5, atol=1e-7, msg=name)


def test_muons_matrices_have_their_own_rule_under_mup() -> None:
    model = _model(norm="rmsnorm", parametrization=MUP)
    optimizer = make_optimizer(model, _settings("muon", matrix_lr=0.04))
    muon, *adamw = optimizer.param_groups
    assert muon["lr"] == pytest.approx(0.04 * 2**-0.5 * 2**-0.5)  # root of m_d, and of m_L
    assert muon["weight_decay"] == pytest.approx(0.1 * 2**0.5)
    assert sorted(group["lr"] for group in adamw) == pytest.approx([1e-2 * 2**-0.5, 1e-2, 1e-2])
    assert {group["eps"] for group in adamw} == {1e-8}


def test_another_class_gets_the_factors_too() -> None:
    optimizer = make_optimizer(_model(parametrization=MUP), _settings("torch.optim:NAdam"))
    hidden = optimizer.param_groups[0]
    assert (hidden["lr"], hidden["weight_decay"], hidden["eps"]) == pytest.approx(
        (1e-2 * 8**-0.5, 0.2, 1e-8 * 8**-0.5)
    )


@pytest.mark.parametrize("name", ["torch.optim:SGD", "torch.optim:RMSprop"])
def test_mup_is_refused_beside_an_optimizer_that_is_not_like_adam(name: str) -> None:
    """RMSprop has eps but no betas; its factors were not derived."""
    model = _model(parametrization=MUP)
    for refusing in (parameter_groups, make_optimizer):
        with pytest.raises(ConfigError, match=rf"{name} is not like Adam .* 'mup' are Adam's"):
            refusing(model, _settings(name))
    assert make_optimizer(_model(), _settings(name)).param_groups[0]["weight_decay"] == 0.1


def test_what_takes_no_gradient_is_in_no_group() -> None:
    model = _model(norm="tapernorm")
    names = {name for group in parameter_groups(model, _settings()) for name in group.names}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert names == {name for name, _ in model.named_parameters()} - frozen


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matrices_and_the_rest_are_two_groups_whatever_the_decay(weight_decay: float) -> None:
    settings = _settings()
    settings.weight_decay = weight_decay
    decayed, rest = parameter_groups(_model(weights="weight_norm"), settings)
    assert all(name.endswith("weight") for name in decayed.names)
    assert "model.layers.0.mlp.up_proj.length" in rest.names


def test_the_schedule_multiplies_each_groups_own_rate(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []
    real = PlainEngine._step

    def step(self: PlainEngine) -> None:
        rates.append([group["lr"] for group in self.optimizer.param_groups])
        real(self)

    monkeypatch.setattr(PlainEngine, "_step", step)
    overrides = {"parametrization": MUP, "num_hidden_layers": 2, "hidden_size": 16}
    overrides |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    config = tiny(model__overrides=overrides, training__max_steps=3, eval__interval_steps=0)
    assert train(config) == 0
    facts = json.loads((config.output.dir / "environment.json").read_text())["optimizer"]
    own = [0.01 * group["lr_factor"] for group in facts]
    assert own == pytest.approx([0.01 * 8**-0.5, 0.01, 0.01 * 2**-0.5, 0.01])
    schedule = [record["lr"] / 0.01 for record in metrics(config.output.dir)]
    assert schedule[0] != schedule[1]
    for factor, seen in zip(schedule, rates, strict=True):
        assert seen == pytest.approx([factor * rate for rate in own])
