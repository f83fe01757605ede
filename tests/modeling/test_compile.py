"""Per-layer constants do not multiply the graphs of a deep stack, and inductor equals eager.

Every scheme is compiled with `aot_eager` in `tests/test_testing.py`, at four layers.
"""

import pytest
from schemes import Scheme

from llmnorm.testing.checks import check_compilation


@pytest.mark.parametrize("placement", ["lns", "deepnorm"])
def test_constants_of_24_layers_compile_to_two_graphs(placement: str) -> None:
    scheme = Scheme(norm="rmsnorm", placement=placement)
    check_compilation(scheme, num_hidden_layers=24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "placement"), [("rmsnorm", "lns"), ("derf", "pre_ln"), ("l2norm", "ngpt")]
)
def test_inductor_equals_eager(norm: str, placement: str) -> None:
    scheme = Scheme(norm=norm, placement=placement)
    check_compilation(scheme, "inductor", num_hidden_layers=2)
