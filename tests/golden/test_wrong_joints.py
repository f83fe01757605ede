"""The comparison can fail for two streams and nGPT too: each plausible mistake is found out."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from goldens.adapters import adapt
from goldens.cases import Case, Manifest, entry_cases, stack_cases
from goldens.comparison import compare_stack
from goldens.stack import Stack, rewire
from goldens.steps import compare_official_steps

from llmnorm.modeling.rotary import rotate

pytestmark = pytest.mark.fast

Slots = dict[str, Any]


def case_of(manifests: list[Manifest], family: str, name: str) -> tuple[Case, Stack]:
    for case in stack_cases(manifests):
        if (case.manifest.family, case.name, case.variant) == (family, name, "f64"):
            return case, adapt(case)
    pytest.skip(f"this folder has no {family}/{name}")


def refused(case: Case, stack: Stack, change: Callable[[int, str, Slots], Slots]) -> None:
    compare_stack(case, stack)
    with pytest.raises(AssertionError, match=r"logits|^y"):
        compare_stack(case, replace(stack, config=rewire(stack.config, change)))


def test_last_norm_of_residual_dual_with_the_eps_of_the_others_is_found(
    manifests: list[Manifest],
) -> None:
    case, stack = case_of(manifests, "normformer", "residual")
    compare_stack(case, stack)
    config = rewire(stack.config)
    config.streams = copy.deepcopy(config.streams)
    config.streams["second"]["eps"] = 1e-5
    with pytest.raises(AssertionError, match=r"^y"):
        compare_stack(case, replace(stack, config=config))


def test_second_stream_of_residual_dual_without_its_scale_is_found(
    manifests: list[Manifest],
) -> None:
    case, stack = case_of(manifests, "normformer", "residual_scaled")
    refused(case, stack, lambda i, kind, slots: {n: s for n, s in slots.items() if n != "second"})


@pytest.mark.parametrize("family", ["siamese", "siamese_deit"])
def test_divisor_of_the_paper_in_place_of_the_codes_is_found(
    manifests: list[Manifest], family: str
) -> None:
    name = {"siamese": "hybrid_pre", "siamese_deit": "post_pre"}[family]
    case, stack = case_of(manifests, family, name)
    papers = lambda i: {"op": "constant", "value": (i + 1) ** -0.5}  # noqa: E731
    refused(case, stack, lambda i, kind, slots: {**slots, "post": papers(i)})


def test_mlp_skip_around_the_norm_of_the_first_stream_is_found(manifests: list[Manifest]) -> None:
    """The star's wiring in every layer: same parameters, another skip."""
    case, stack = case_of(manifests, "siamese", "hybrid_pre")

    def change(i: int, kind: str, slots: Slots) -> Slots:
        return {("first" if name == "entry" else name): held for name, held in slots.items()}

    def to_ours(reference: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = stack.to_ours(reference)
        return {n.replace(".entry.", ".first."): value for n, value in state.items()}

    with pytest.raises(AssertionError, match="logits"):
        compare_stack(case, replace(stack, config=rewire(stack.config, change), to_ours=to_ours))


def test_textbook_rope_in_place_of_ngpts_is_found(manifests: list[Manifest]) -> None:
    case, stack = case_of(manifests, "ngpt", "ngpt")
    with pytest.raises(AssertionError, match="logits"):
        compare_stack(case, replace(stack, position=rotate))


def test_rates_stored_on_another_scale_are_found(manifests: list[Manifest]) -> None:
    case, stack = case_of(manifests, "ngpt", "ngpt")
    wrong = {"op": "ngpt_rate", "value": 0.05, "stored": 1.0}
    refused(case, stack, lambda i, kind, slots: {**slots, "first": wrong})


def test_missing_norm_of_the_branch_is_found(manifests: list[Manifest]) -> None:
    case, stack = case_of(manifests, "ngpt", "ngpt")
    refused(case, stack, lambda i, kind, slots: {n: s for n, s in slots.items() if n != "post"})


def test_steps_without_their_renormalization_are_found(
    manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    for case in entry_cases(manifests, "optimizer_steps", "cases", "case"):
        if case.manifest.family == "ngpt":
            monkeypatch.setattr("goldens.steps.renormalize", lambda weights: None)
            with pytest.raises(AssertionError, match=r"^w1\."):
                compare_official_steps(case, adapt(case))
            return
    pytest.skip("this folder has no steps of nGPT")
