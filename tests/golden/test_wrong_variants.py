"""The comparison can fail: errors met in public code for these schemes are each found out."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from goldens.adapters import adapt, dyt_llama
from goldens.cases import Case, Manifest, NotImplementedCaseError, entry_cases, stack_cases
from goldens.comparison import compare_stack
from goldens.fresh import compare_fresh, fresh
from goldens.stack import Stack, rewire
from goldens.steps import compare_official_steps
from torch import Tensor
from torch.nn.functional import silu

from llmnorm import build_config, build_model, self_test
from llmnorm.errors import ConfigError, SelfTestError
from llmnorm.modeling.gains import GPASGate

Slots = dict[str, Any]


def first(manifests: list[Manifest], fits: Callable[[Case, Stack], bool]) -> tuple[Case, Stack]:
    """The first float64 case with a fitting stack; skips when the folder has none."""
    for case in stack_cases(manifests):
        if case.variant == "f64":
            try:
                stack = adapt(case)
            except NotImplementedCaseError:
                continue
            if fits(case, stack):
                return case, stack
    pytest.skip("this folder has no case of that scheme")


def placed(name: str) -> Callable[[Case, Stack], bool]:
    def fits(case: Case, stack: Stack) -> bool:
        placement = stack.config.placement or {}
        return placement.get("name") == name and stack.config.num_hidden_layers > 1

    return fits


def refuse(case: Case, stack: Stack, change: Callable[[int, str, Slots], Slots]) -> None:
    """The right stack passes, and fails once its wiring is changed."""
    compare_stack(case, stack)
    with pytest.raises(AssertionError, match="logits"):
        compare_stack(case, replace(stack, config=rewire(stack.config, change)))


def test_lost_scale_of_lns_is_found(manifests: list[Manifest]) -> None:
    case, stack = first(manifests, placed("lns"))
    refuse(case, stack, lambda i, kind, slots: {"pre": {**slots["pre"], "scale": 1.0}})


def test_scale_of_lns_counted_from_the_wrong_layer_is_found(manifests: list[Manifest]) -> None:
    case, stack = first(manifests, placed("lns"))
    wrong = lambda i, kind, slots: {"pre": {**slots["pre"], "scale": (i + 2) ** -0.5}}  # noqa: E731
    refuse(case, stack, wrong)


def test_wrong_alpha_of_deepnorm_is_found(manifests: list[Manifest]) -> None:
    """(8L)^(1/4) belongs to the init; the residual's is (2L)^(1/4)."""
    case, stack = first(manifests, placed("deepnorm"))
    skip = {"op": "constant", "value": (8 * stack.config.num_hidden_layers) ** 0.25}
    refuse(case, stack, lambda i, kind, slots: {**slots, "skip": skip})


def test_wrong_boundary_of_mix_ln_is_found(manifests: list[Manifest]) -> None:
    def is_mixed(case: Case, stack: Stack) -> bool:
        return placed("mix_ln")(case, stack) and 0 < stack.config.placement["fraction"] < 0.9

    case, stack = first(manifests, is_mixed)
    layers = stack.config.residuals
    boundary = next(i for i, layer in enumerate(layers) if "pre" in layer["attn"])

    def one_more(i: int, kind: str, slots: Slots) -> Slots:
        return {"out": slots["pre"]} if i == boundary else slots

    def to_ours(reference: dict[str, Tensor]) -> dict[str, Tensor]:
        moved = f"model.layers.{boundary}."
        return {
            name.replace(".pre.", ".out.") if name.startswith(moved) else name: value
            for name, value in stack.to_ours(reference).items()
        }

    compare_stack(case, stack)
    config = rewire(stack.config, one_more)
    with pytest.raises(AssertionError, match="logits"):
        compare_stack(case, replace(stack, config=config, to_ours=to_ours))


def test_missing_final_norm_is_found(manifests: list[Manifest]) -> None:
    case, stack = first(manifests, placed("pre_ln"))

    def to_ours(reference: dict[str, Tensor]) -> dict[str, Tensor]:
        state = stack.to_ours(reference)
        return {name: v for name, v in state.items() if not name.startswith("model.norm.")}

    config = rewire(stack.config, final_norm=None)
    with pytest.raises(AssertionError, match="logits"):
        compare_stack(case, replace(stack, config=config, to_ours=to_ours))


def test_forgotten_one_in_gains_is_found(manifests: list[Manifest]) -> None:
    case, stack = first(manifests, lambda case, _: case.manifest.family.startswith("gemma"))

    def to_ours(reference: dict[str, Tensor]) -> dict[str, Tensor]:
        state = stack.to_ours(reference)
        return {n: v - 1 if "_residual." in n else v for n, v in state.items()}

    compare_stack(case, stack)
    with pytest.raises(AssertionError, match="logits"):
        compare_stack(case, replace(stack, to_ours=to_ours))


def test_interleaved_rope_taken_for_half_rotation_is_found(
    manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, _ = first(manifests, lambda case, _: case.manifest.family == "dyt_llama")
    monkeypatch.setattr(dyt_llama, "half_rotation", lambda rows, head_dim: rows)
    with pytest.raises(AssertionError, match="logits"):
        compare_stack(case, adapt(case))


def test_parameter_left_at_its_initial_value_is_found(manifests: list[Manifest]) -> None:
    case, stack = first(manifests, placed("pre_ln"))

    def to_ours(reference: dict[str, Tensor]) -> dict[str, Tensor]:
        state = stack.to_ours(reference)
        state.popitem()
        return state

    with pytest.raises(AssertionError, match="names and shapes differ"):
        compare_stack(case, replace(stack, to_ours=to_ours))


def gradients_off_by(factor: float) -> Callable[[Tensor], Tensor]:
    """A parameter with the right value whose gradient is `factor` times too large."""
    return lambda value: factor * value - (factor - 1) * value.detach()


def test_wrong_gradient_behind_a_right_output_is_found(manifests: list[Manifest]) -> None:
    case, stack = first(manifests, placed("pre_ln"))
    double = gradients_off_by(2.0)

    def to_ours(reference: dict[str, Tensor]) -> dict[str, Tensor]:
        state = stack.to_ours(reference)
        return {n: double(v) if ".layers." in n else v for n, v in state.items()}

    with pytest.raises(AssertionError, match=r"grad"):
        compare_stack(case, replace(stack, to_ours=to_ours))


def test_gradient_through_the_gate_of_gpas_is_found(
    manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its stop-gradient the outputs are right, but gradients shrink with the stream."""
    case, stack = first(manifests, placed("gpas"))
    compare_stack(case, stack)
    through = lambda gate, x: gate.scale * (1 - silu(gate.gate)) * x  # noqa: E731
    monkeypatch.setattr(GPASGate, "forward", through)
    with pytest.raises(AssertionError, match=r"/grad\."):
        compare_stack(case, stack)


def test_hybrid_norm_with_a_raw_skip_around_the_mlp_is_found(manifests: list[Manifest]) -> None:
    case, stack = first(manifests, placed("hybrid_norm"))

    def to_ours(reference: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n.replace(".entry.", ".pre."): v for n, v in stack.to_ours(reference).items()}

    def raw(i: int, kind: str, slots: Slots) -> Slots:
        return {"pre": slots["entry"]} if kind == "mlp" else slots

    compare_stack(case, stack)
    with pytest.raises(AssertionError, match="logits"):
        compare_stack(case, replace(stack, config=rewire(stack.config, raw), to_ours=to_ours))


def damped(manifests: list[Manifest]) -> Iterator[Case]:
    """Init variants of DeepNorm that llmnorm builds."""
    for case in entry_cases(manifests, "init", "variants", "variant"):
        try:
            if fresh(case).stack.config.init in ("deepnorm", {"policy": "deepnorm"}):
                yield case
        except NotImplementedCaseError:
            continue


def test_flipped_exponent_of_deepnorm_gain_is_found(manifests: list[Manifest]) -> None:
    case = next(damped(manifests), None)
    if case is None:
        pytest.skip("this folder has no initialization of DeepNorm")
    wanted = fresh(case)
    model = build_model(wanted.stack.config)
    compare_fresh(case, wanted, model.state_dict())
    flip = (8 * model.config.num_hidden_layers) ** 0.5
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.mul_(flip)
    with pytest.raises(AssertionError, match=r"std of .*v_proj"):
        compare_fresh(case, wanted, model.state_dict())
    with pytest.raises(SelfTestError, match="v_proj"):
        self_test(model, fresh=True)


def test_decoupled_decay_in_place_of_coupled_is_found(manifests: list[Manifest]) -> None:
    for case in entry_cases(manifests, "optimizer_steps", "cases", "case"):
        decays = max(group["weight_decay"] for group in case.fields["groups"])
        if case.fields["coupled_l2"] and decays:
            wrong = {**case.fields, "optimizer": "AdamW", "coupled_l2": False}
            with pytest.raises(AssertionError, match="w1"):
                compare_official_steps(replace(case, fields=wrong), adapt(case))
            return
    pytest.skip("this folder has no coupled decay")


@pytest.mark.parametrize("typo", ["deepnrom", "LNS ", "mixln", "pre-ln", ""])
def test_typo_in_a_scheme_raises_instead_of_building_no_norm(typo: str) -> None:
    with pytest.raises(ConfigError, match="unknown placement"):
        build_config({"hidden_size": 32, "num_attention_heads": 4}, placement=typo)
