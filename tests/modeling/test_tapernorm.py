"""TaperNorm against its formula: gate, schedule, fitted constant, fold."""

import math

import pytest
import torch
from features import DIM, assert_follows_formula, assert_same, features, norm_of, shaken
from schemes import SHAPE

from llmnorm import build_config
from llmnorm.modeling.norms import RMSNorm, TaperNorm
from llmnorm.modeling.residual import NormSpec

pytestmark = pytest.mark.fast


def rms(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def taper(**options: float) -> TaperNorm:
    """A float64 norm with weights off 1 and everything else as it starts."""
    norm = TaperNorm(DIM, **options).double()
    with torch.no_grad():
        norm.weight += 0.3 * features(DIM, seed=9)
    return norm


def move(norm: TaperNorm, step: int) -> None:
    """What follows an optimizer step on one rank."""
    norm.after_step(step, norm.measured(step))


def train(norm: TaperNorm, steps: int, start: int = 0) -> list[torch.Tensor]:
    """`steps` steps without an optimizer; the features of each."""
    seen = [features(3, 5, DIM, seed=100 + start + i) * (1 + i) for i in range(steps)]
    for i, x in enumerate(seen, start=start + 1):
        norm(x)
        move(norm, i)
    return seen


def test_tapernorm_blends_a_norm_and_a_fixed_gain() -> None:
    norm = norm_of("tapernorm", eps=0.05, scale=0.7)
    with torch.no_grad():
        norm.gate.fill_(0.4)
    assert_follows_formula(
        norm,
        lambda x, p: (
            0.7
            * (
                p["gate"] * p["weight"] * x / rms(x, 0.05)
                + (1 - p["gate"]) * p["c"] * p["taper_weight"] * x
            )
        ),
    )


def test_tapernorm_starts_as_rmsnorm_and_its_gate_takes_no_gradient() -> None:
    x, norm = features(4, DIM), taper()
    plain = RMSNorm(DIM).double()
    with torch.no_grad():
        plain.weight.copy_(norm.weight)
    assert_same(norm(x), plain(x))
    still = {name for name, p in norm.named_parameters() if not p.requires_grad}
    assert still == {"gate", "c", "mean_over_rms", "mean_square"}


def test_the_gate_waits_then_follows_a_half_cosine_to_zero() -> None:
    norm, gates = taper(warmup_steps=3, taper_steps=4), []
    for step in range(1, 10):
        norm(features(2, DIM, seed=step))
        move(norm, step)
        gates.append(norm.gate.item())
    cosine = [(1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3)]
    assert gates == pytest.approx([1.0, 1.0, 1.0, *cosine, 0.0, 0.0, 0.0])
    assert gates[-1] == 0.0  # exactly: cos(pi) in float leaves nothing behind


def test_the_constant_is_the_least_squares_fit_over_the_averaged_steps() -> None:
    norm = taper(warmup_steps=3, taper_steps=4, momentum=0.8)
    weight = norm.weight.detach().clone()
    over, square = 0.0, 0.0
    for x in train(norm, 3):
        energy = (x * weight).pow(2).sum(-1, keepdim=True)
        over = 0.8 * over + 0.2 * (energy / rms(x)).mean().item()
        square = 0.8 * square + 0.2 * energy.mean().item()
    assert norm.c.item() == pytest.approx(over / square, rel=1e-12)
    assert torch.equal(norm.taper_weight, weight)


def test_the_constant_of_one_batch_leaves_the_smallest_squared_error() -> None:
    norm = taper(warmup_steps=1)
    (x,) = train(norm, 1)
    with torch.no_grad():
        normed, plain = norm.weight * x / rms(x), norm.weight * x
    errors = [(normed - f * norm.c.item() * plain).pow(2).sum() for f in (0.99, 1.0, 1.01)]
    assert errors[1] == min(errors)


def test_after_the_warm_up_constant_and_averages_are_frozen_and_the_new_gain_is_not() -> None:
    norm = taper(warmup_steps=2, taper_steps=6)
    train(norm, 2)
    before = {name: p.detach().clone() for name, p in norm.named_parameters()}
    with torch.no_grad():
        norm.taper_weight *= 2.0
        norm.weight *= 3.0
    train(norm, 2, start=2)
    for name in ("c", "mean_over_rms", "mean_square"):
        assert torch.equal(norm.get_parameter(name), before[name])
    assert torch.equal(norm.taper_weight, 2.0 * before["taper_weight"])
    assert 0 < norm.gate.item() < 1
    g_old, g_new = torch.autograd.grad(
        norm(features(2, DIM)).sum(), [norm.weight, norm.taper_weight]
    )
    assert g_old.all()
    assert g_new.all()


def test_the_schedule_is_a_function_of_the_step_so_that_a_resumed_run_goes_on() -> None:
    whole, resumed = taper(warmup_steps=2, taper_steps=4), taper(warmup_steps=2, taper_steps=4)
    train(whole, 3)
    resumed.load_state_dict(whole.state_dict())
    for norm in (whole, resumed):
        train(norm, 1, start=3)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_means_of_a_step_are_averaged_over_ranks_until_the_warm_up_is_over() -> None:
    norm = taper(warmup_steps=1)
    norm(features(3, DIM))
    sums = norm.measured(1)
    weights = torch.tensor([1.0, 3.0, 1.0])  # of another rank: thrice the squares, as many tokens
    norm.after_step(1, (sums + weights * sums) / 2)
    assert norm.mean_square.item() == pytest.approx(0.01 * 2 * sums[1].item() / 3)
    norm(features(3, DIM))
    assert norm.measured(2) is None


def test_a_step_averages_over_the_tokens_of_its_micro_batches_without_padding() -> None:
    whole, split = taper(), taper()
    x = features(5, 3, DIM)
    whole(x)
    split.before(torch.ones(2, dtype=torch.bool), first=True)
    split(features(2, 3, DIM, seed=7))  # of a step that was not applied
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        part = torch.cat([x, torch.ones(1, 3, DIM, dtype=x.dtype)])[rows]
        counted = torch.arange(6)[rows] < 5
        split.before(counted, first=rows.start == 0)
        split(part)
        split(part)  # recomputed
    assert_same(split.measured(1), 2 * whole.measured(1))
    for norm in (whole, split):
        move(norm, 1)
    assert_same(split.mean_over_rms, whole.mean_over_rms)
    assert_same(split.mean_square, whole.mean_square)


def test_compiled_it_adds_up_over_micro_batches_in_one_graph() -> None:
    norm, plain, graphs = taper().float(), taper().float(), []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(norm, backend=backend)
    for step in (1, 2):
        for micro in range(3):
            for one in (norm, plain):
                one.before(torch.tensor([True, micro < 2]), first=micro == 0)
            x = features(2, 3, DIM, seed=10 * step + micro).float()
            torch.testing.assert_close(compiled(x), plain(x))
        torch.testing.assert_close(norm.measured(step), plain.measured(step))
        for one in (norm, plain):
            move(one, step)
    assert len(graphs) == 1


def test_averages_of_a_bfloat16_model_are_kept_in_float32_while_they_move() -> None:
    """A change of 1 % of a difference is below bfloat16's spacing and would be lost."""
    norm, precise = taper(warmup_steps=40).bfloat16(), taper(warmup_steps=40)
    for step in range(1, 41):
        x = features(3, DIM, seed=step)
        for one in (norm, precise):
            one(x.to(one.gate.dtype))
            move(one, step)
        assert norm.mean_square.dtype == (torch.float32 if step < 40 else torch.bfloat16)
    assert precise.mean_square.dtype == torch.float64
    for name in ("mean_square", "mean_over_rms", "c"):
        wanted = precise.get_parameter(name).item()
        assert norm.get_parameter(name).item() == pytest.approx(wanted, rel=1e-2), name
    assert {p.dtype for p in norm.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("steps_before", [2, 3, 5], ids=["closing", "half", "closed"])
def test_a_model_that_has_begun_to_taper_is_not_opened_again(steps_before: int) -> None:
    """Started from its weights, a new run counts its steps from 1."""
    first, then = taper(warmup_steps=1, taper_steps=4), taper(warmup_steps=3, taper_steps=4)
    train(first, steps_before)
    then.load_state_dict(first.state_dict())
    with torch.no_grad():
        then.weight *= 2.0
        then.taper_weight *= 3.0
    gate, c, gain = then.gate.item(), then.c.item(), then.taper_weight.detach().clone()
    gates = [gate]
    for step in range(1, 9):
        train(then, 1, start=step - 1)
        gates.append(then.gate.item())
        cosine = (1 + math.cos(math.pi * min(max(step - 3, 0) / 4, 1))) / 2
        assert gates[-1] == pytest.approx(min(gate, cosine))
        assert then.c.item() == c
        assert torch.equal(then.taper_weight, gain)
    assert gates == sorted(gates, reverse=True)


def test_evaluation_measures_nothing_and_a_warm_up_step_without_training_is_refused() -> None:
    norm = taper()
    norm.eval()(features(2, DIM))
    assert norm.seen is None
    with pytest.raises(ValueError, match="saw no forward in training mode"):
        norm.measured(1)
    norm.train()(features(2, DIM))
    move(norm, 1)
    with pytest.raises(ValueError, match="saw no forward in training mode"):
        norm.measured(2)  # the means of step 1 are not counted twice


def test_once_the_gate_is_closed_the_norm_is_its_fold_and_no_sooner() -> None:
    norm = taper(warmup_steps=2, taper_steps=3, scale=0.7)
    train(norm, 4)
    with pytest.raises(ValueError, match=r"gate is 0\.25; it folds at 0, after 5 steps"):
        norm.fold()
    train(norm, 1, start=4)
    x = features(4, DIM)
    assert_same(norm(x), norm.fold() * x)
    linear = torch.nn.Linear(DIM, 3, bias=False).double()
    folded = torch.nn.functional.linear(x, linear.weight * norm.fold())
    assert_same(folded, linear(norm(x)))


def test_a_closed_gate_is_linear_and_an_open_one_scale_free() -> None:
    x, norm = features(4, DIM), shaken(TaperNorm(DIM, eps=1e-12))
    with torch.no_grad():
        norm.gate.fill_(0.0)
        assert_same(norm(2 * x), 2 * norm(x))
        norm.gate.fill_(1.0)
        assert_same(norm(2 * x), norm(x))


@pytest.mark.parametrize(("final", "op"), [("keep", "rmsnorm"), ("taper", "tapernorm")])
def test_the_final_norm_is_kept_or_tapered(final: str, op: str) -> None:
    config = build_config(SHAPE, norm={"op": "tapernorm", "final": final, "eps": 1e-5})
    assert config.final_norm["op"] == op
    assert config.final_norm["eps"] == 1e-5
    assert config.residuals[0]["attn"]["pre"]["op"] == "tapernorm"


def test_an_unknown_final_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tapernorm\.final is 'none'; expected 'keep' or 'taper'"):
        NormSpec.parse({"op": "tapernorm", "final": "none"}).at("attn", 64)
