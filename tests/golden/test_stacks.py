"""Whole decoders give the references' outputs, losses, hidden states and gradients."""

from goldens.adapters import adapt
from goldens.cases import Case, stack_cases
from goldens.comparison import compare_stack

golden_cases = stack_cases


def test_stack_equals_the_reference(case: Case) -> None:
    compare_stack(case, adapt(case))
