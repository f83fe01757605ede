"""Start every new operation where it is nearest to the norm that it replaces, on calibration text.

Point-wise norms: alpha by a search, gain and bias of each feature by least squares. What computes
the same from the start (a norm that will fade or be removed) takes the norm's gain and bias.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmnorm.errors import ConfigError
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM

_ALPHAS = (1e-3, 1e2)  # times 1 / rms of what the site reads: below, a line; above, a sign
_COARSE, _FINE, _ROUNDS = 31, 9, 3


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """How near a site's new operation is to the norm it replaces.

    Args:
        site: name of the module.
        rms: of what the site reads, over tokens and features.
        alpha: the steepness found; None where there is none.
        error: root mean square of the difference, relative to that of the norm's output.
    """

    site: str
    rms: float
    alpha: float | None
    error: float


@torch.no_grad()
def fit_sites(
    model: LlmNormForCausalLM, converted: LlmNormForCausalLM, sites: list[str], ids: Tensor
) -> list[Fitted]:
    """Fit the sites of `converted` to those of `model`, one after the other in one forward.

    Each site sees what the sites before it, already fitted, make of the text, and is fitted to
    what the norm would make of the same: so errors do not move the stream away from the fits.

    Args:
        model: as trained, in evaluation mode.
        converted: with the same weights; its operations at `sites` are set.
        sites: names of modules that both have.
        ids: tokens (rows, seq) to calibrate on.

    Returns:
        One record a site, in the order in which the text meets them.

    Raises:
        ConfigError: if an operation cannot take the place of a norm.
    """
    found: list[Fitted] = []
    done: set[str] = set()

    def fitting(site: str) -> Callable[..., Tensor]:
        new = converted.get_submodule(site)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if site not in done:  # a shared module is met twice
                done.add(site)
                found.append(fit_site(site, module, new, inputs[0], output))
            return new(inputs[0])

        return hook

    handles = [model.get_submodule(site).register_forward_hook(fitting(site)) for site in sites]
    try:
        model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def fit_site(site: str, old: Any, new: Any, x: Tensor, y: Tensor) -> Fitted:
    """Set the parameters of `new` so that new(x) is near y = old(x); x, y are (..., dim)."""
    if getattr(new, "pointwise", False):
        fit_pointwise(new, x.flatten(0, -2), y.flatten(0, -2))
    else:
        take_affine(site, old, new)
    reached = (new(x).double() - y.double()).square().sum() / y.double().square().sum()
    return Fitted(
        site=site,
        rms=x.double().square().mean().sqrt().item(),
        alpha=new.alpha.item() if hasattr(new, "alpha") else None,
        error=reached.sqrt().item(),
    )


def fit_pointwise(new: Any, x: Tensor, y: Tensor) -> None:
    """Fit scale * (weight * f(alpha x + shift) + bias), the shift at 0, to (tokens, dim) y.

    For each alpha, weight and bias are the least squares of every feature; alpha is searched on a
    logarithmic grid that is refined around its best.
    """
    if hasattr(new, "shift"):
        new.shift.zero_()
    x, y = x.float(), y.float()
    centre = 1 / x.square().mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny).item()
    low, high = (centre * bound for bound in _ALPHAS)
    for count in (_COARSE, *[_FINE] * _ROUNDS):
        grid = torch.logspace(
            torch.tensor(low).log10().item(), torch.tensor(high).log10().item(), count
        ).tolist()
        errors = [_try_alpha(new, alpha, x, y) for alpha in grid]
        best = errors.index(min(errors))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, count - 1)]
    _try_alpha(new, grid[best], x, y)


def _try_alpha(new: Any, alpha: float, x: Tensor, y: Tensor) -> float:
    """Set alpha and the best weight and bias for it; return the sum of squares that is left."""
    new.alpha.fill_(alpha)
    f = new.normalized(x)
    biased = new.bias is not None
    f_mean, y_mean = (t.mean(0) if biased else torch.zeros_like(t[0]) for t in (f, y))
    across = ((f - f_mean) * (y - y_mean)).sum(0)
    weight = across / (f - f_mean).square().sum(0).clamp_min(torch.finfo(f.dtype).tiny)
    bias = y_mean - weight * f_mean
    new.weight.copy_(weight / new.scale)
    if biased:
        new.bias.copy_(bias / new.scale)
    return (weight * f + bias - y).double().square().sum().item()


def take_affine(site: str, old: Any, new: Any) -> None:
    """Give an operation that begins as a norm that norm's gain and bias.

    Raises:
        ConfigError: if it has no bias to take one.
    """
    with torch.no_grad():
        weight = torch.as_tensor(old.gain(torch.float64)).expand(len(new.weight))
        new.weight.copy_(weight / new.scale)
        if old.bias is not None and bool(old.bias.any()) and new.bias is None:
            raise ConfigError(f"{site} has a bias, which {type(new).__name__} has not")
        if new.bias is not None:
            new.bias.zero_()
            if old.bias is not None:
                new.bias.copy_(old.scale * old.bias / new.scale)
