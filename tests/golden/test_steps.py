"""Three optimizer steps reproduce the references' weights, loss by loss and norm by norm.

Every case runs twice: in the groups of the reference, given explicitly to torch's optimizer (some
decay embeddings, norms or everything, or couple the decay to the gradient); and with the optimizer
that our training makes, which decays the matrices of linear layers and nothing else.
"""

import pytest
from goldens.adapters import adapt
from goldens.cases import Case, Manifest, entry_cases
from goldens.steps import compare_official_steps, our_run
from torch import Tensor


def golden_cases(manifests: list[Manifest]) -> list[Case]:
    return entry_cases(manifests, "optimizer_steps", "cases", "case")


def test_official_groups_reproduce_the_weights(case: Case) -> None:
    compare_official_steps(case, adapt(case))


def test_our_optimizer_reproduces_the_weights_but_for_its_decay_rule(case: Case) -> None:
    """With equal groups all steps agree; otherwise the first, up to the decay that differs."""
    run = our_run(case, adapt(case))
    if not run.deviating:
        for number in range(1, len(case.fields["lr_per_step"]) + 1):
            run.step(number)
            run.compare(number, lambda _, recorded: recorded)
        return
    start = dict(run.stack.to_ours(run.recorded(0)))
    run.step(1)
    if case.fields["coupled_l2"]:
        with pytest.raises(AssertionError, match="w1 of"):
            run.compare(1, lambda _, recorded: recorded)
        return

    def but_for_decay(name: str, recorded: Tensor) -> Tensor:
        official, ours = run.deviating.get(name, (0.0, 0.0))
        return recorded + case.fields["lr_per_step"][0] * (official - ours) * start[name]

    run.compare(1, but_for_decay)
