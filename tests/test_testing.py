"""Every scheme passes the checks that outsiders run too, and each check finds what it is for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from schemes import FULL, PAIRS, REST, Scheme
from torch import nn

from llmnorm import list_norms, list_placements, register, register_norm
from llmnorm.errors import ConfigError
from llmnorm.modeling import operations
from llmnorm.modeling.residual import (
    RESIDUAL_SLOTS,
    RESIDUALS,
    NormSpec,
    Residual,
    ResidualSpec,
    register_residual,
)
from llmnorm.placements import PLACEMENTS, Placement, Site
from llmnorm.testing import CHECKS, CheckError, check_scheme, find_scheme, run_check
from llmnorm.testing.saving import check_loading, load_as_stranger

# --- the suite over all schemes ---------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(("norm", "placement"), FULL)
def test_every_norm_and_every_placement_builds(norm: str, placement: str) -> None:
    run_check("build", Scheme(norm=norm, placement=placement))


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in ("build", "saving")])
@pytest.mark.parametrize(("norm", "placement"), FULL)
def test_every_norm_and_every_placement_passes(norm: str, placement: str, check: str) -> None:
    run_check(check, Scheme(norm=norm, placement=placement))


@pytest.mark.parametrize("placement", list_placements())
def test_every_pair_trains_saves_and_loads(placement: str, tmp_path: Path) -> None:
    for norm, other in REST:
        if other == placement:
            scheme = Scheme(norm=norm, placement=placement)
            run_check("gradients", scheme)
            check_loading(scheme, tmp_path / norm)


def test_every_norm_and_every_placement_loads_bit_equal_without_llmnorm(tmp_path: Path) -> None:
    for norm, placement in FULL:
        check_loading(
            Scheme(norm=norm, placement=placement), tmp_path / f"saved/{norm}-{placement}"
        )
    equal = load_as_stranger(tmp_path / "saved", without={"llmnorm"}, home=tmp_path / "home")
    assert len(equal) == len(FULL) + 1
    assert all(equal.values()), [name for name, same in equal.items() if not same]


@pytest.mark.fast
def test_the_table_holds_every_norm_and_every_placement() -> None:
    assert {placement for _, placement in FULL} == set(list_placements())
    assert {norm for norm, _ in FULL} == set(list_norms())
    assert not set(FULL) & set(REST)
    assert set(PAIRS) == {*FULL, *REST}


# --- what the checks find ---------------------------------------------------------------------


@pytest.fixture
def registered() -> Iterator[Callable[[type], None]]:
    """Register a norm, residual module or placement as `planted` for one test."""
    tables: tuple[dict[str, Any], ...] = (operations.OPERATIONS, RESIDUALS, PLACEMENTS)

    def enter(cls: type) -> None:
        if issubclass(cls, Placement):
            register("planted", paper="0000.00000")(cls)
        elif issubclass(cls, Residual):
            register_residual("planted")(cls)
        else:
            register_norm("planted")(cls)

    yield enter
    for table in tables:
        table.pop("planted", None)
    if "planted" in operations._NORMS:
        operations._NORMS.remove("planted")


class Mean(nn.Module):
    """Leak: the statistic spans the sequence. Source: none."""

    def __init__(self, dim: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.dim = scale, dim
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rms = x.square().mean(dim=(1, -1), keepdim=True).sqrt() + 1e-6
        return self.scale * self.weight * (x / rms)


class Unused(Mean):
    """Own a parameter that does nothing. Source: none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6)


class Dead(Mean):
    """Own a parameter whose gradient is 0. Source: none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6)
        return self.scale * x + 0.0 * self.weight


class Overflowing(Mean):
    """Pass through a square that bfloat16 cannot hold. Source: none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        big = (x.half() if x.dtype == torch.bfloat16 else x) * 2.0**20
        rms = big.square().mean(-1, keepdim=True).sqrt()
        return self.scale * self.weight * (big / rms).to(x.dtype)


class Counting(Mean):
    """Behave otherwise at every other call. Source: none."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counting.calls += 1
        x = x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6)
        return self.scale * self.weight * x * (1 + 0.01 * Counting.calls)


class Lengthy(Mean):
    """Scale by the number of tokens it is given, which a cache changes. Source: none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6)
        return self.scale * self.weight * x * (1.0 if x.shape[1] > 1 else -1.0)


class Recompiled(Mean):
    """Hide its scale in a string, so that each layer compiles by itself. Source: none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6)
        return float(str(self.scale)) * self.weight * x


class Silent(Mean):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.weight * x


@pytest.mark.parametrize(
    ("norm", "placement", "check", "message"),
    [
        (Mean, "pre_ln", "causality", "saw token 6 changing logits before it by"),
        (Unused, "pre_ln", "gradients", "saw no gradient at model.layers.0.attn_residual.pre.weig"),
        (Dead, "pre_ln", "gradients", "saw a gradient of 0 at model.layers.0.attn_residual.pre.we"),
        (Overflowing, "pre_ln", "bfloat16", "saw loss nan; expected a finite one"),
        (Counting, "pre_ln", "checkpointing", "under checkpointing; expected the same bits"),
        (Lengthy, "pre_ln", "generation", "with a cache; expected"),
        (Recompiled, "lns", "compilation", r"saw \d graphs; expected 1 to 2 for 1 kinds of block"),
        (Silent, "pre_ln", "documentation", "saw no docstring on Silent; expected what it is"),
    ],
)
def test_a_check_names_what_it_saw_and_what_it_expected(
    registered: Callable[[type], None], norm: type, placement: str, check: str, message: str
) -> None:
    registered(norm)
    with pytest.raises(CheckError, match=message) as caught:
        run_check(check, Scheme(norm="planted", placement=placement))
    assert str(caught.value).startswith(f"planted + {placement}: {check}: saw ")
    assert "\n" not in str(caught.value)
    others = {"build", "gradients", "bfloat16"} - {check}
    for other in others:
        run_check(other, Scheme(norm="planted", placement=placement))


class Forgetful(Residual):
    """Leave its own slot unread. Source: none."""

    slots = (*RESIDUAL_SLOTS, "first")

    def forward(
        self, x: torch.Tensor, block_input: torch.Tensor, branch: Any, **kwargs: Any
    ) -> torch.Tensor:
        return x + branch(self.pre(x), **kwargs)


@dataclass(frozen=True, kw_only=True)
class Gated(Placement):
    """Put a gain that nothing reads into a slot of a residual module. Source: none."""

    def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
        gain = NormSpec(op="gain", options={})
        return ResidualSpec(pre=norm, first=gain, module="planted")


def test_a_slot_that_the_residual_module_does_not_read_is_found(
    registered: Callable[[type], None],
) -> None:
    registered(Forgetful)
    registered(Gated)
    with pytest.raises(CheckError, match=r"planted: gradients: saw no gradient at .*\.first\.wei"):
        check_scheme("planted")


def test_a_defect_that_self_test_does_not_see_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmnorm.selftest._check_joints", lambda model: None)
    with pytest.raises(CheckError, match="promises: saw self_test passing attn_residual as Lerp"):
        run_check("promises", Scheme(norm="rmsnorm", placement="pre_ln"))


def test_a_model_that_cannot_be_saved_is_found(registered: Callable[[type], None]) -> None:
    Mean.__module__, kept = "__main__", Mean.__module__
    try:
        registered(Mean)
        with pytest.raises(CheckError, match=r"saving: saw ValueError \(Mean is defined in __main"):
            run_check("saving", Scheme(norm="planted", placement="pre_ln"))
    finally:
        Mean.__module__ = kept


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "options", "found"),
    [
        (("lns",), {}, ("rmsnorm", "lns")),
        (("ngpt",), {}, ("l2norm", "ngpt")),
        (("derf",), {}, ("derf", "pre_ln")),
        (("lns",), {"norm": "dyt"}, ("dyt", "lns")),
        (({"name": "mix_ln", "fraction": 0.5},), {}, ("rmsnorm", "mix_ln")),
        (({"op": "rmsnorm", "eps": 1e-5},), {}, ("rmsnorm", "pre_ln")),
    ],
)
def test_a_scheme_is_found_by_its_placement_or_its_norm(
    arguments: tuple[Any], options: Mapping[str, Any], found: tuple[str, str]
) -> None:
    assert str(find_scheme(*arguments, **options)) == " + ".join(found)


@pytest.mark.fast
def test_a_name_that_nobody_registered_is_refused() -> None:
    with pytest.raises(ConfigError, match="no scheme is called 'pre-ln'; did you mean pre_ln"):
        check_scheme("pre-ln")
    with pytest.raises(ConfigError, match="derf is a norm, so no second one"):
        check_scheme("derf", norm="dyt")


def test_the_report_has_a_line_for_each_check() -> None:
    report = check_scheme("lns", norm="derf", num_hidden_layers=2)
    lines = str(report).splitlines()
    assert lines[0] == "derf + lns"
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(CHECKS)
    assert report.seen["saving"] == "loaded without llmnorm"
