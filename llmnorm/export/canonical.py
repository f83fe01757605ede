"""Write what a slot holds in one of three plain ways: rmsnorm, layernorm or gain.

An operation that is none of them in disguise stays as it is; a host will say that it cannot hold
it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from llmnorm.export.form import Held
from llmnorm.modeling.affine import AffineNorm
from llmnorm.modeling.residual import NormSpec

_PROBES = 3
_ROUNDING = 1e-12  # relative, of two products in float64


def canonical(held: Held, dim: int) -> Held | None:
    """The same function as `rmsnorm`, `layernorm` or `gain` over `dim` features.

    A gain of 1 is None. Norms that divide by max(|x|, eps) or by rms + eps become rmsnorms with
    eps^2 / dim or eps^2 inside the root, which differ from them by about eps/|x| or eps/rms.
    """
    module: Any = held.module(dim)
    diagonal = _diagonal(module, dim)
    if diagonal is not None:
        return gain(diagonal)
    write = _PLAIN.get(held.op)
    plain = None if write is None else write(held, module, dim)
    return held if plain is None else replace(plain, spec=_flagged(plain.spec, held.spec))


def gain(weight: torch.Tensor) -> Held | None:
    """Multiplication by (dim,) numbers; None if all are 1."""
    if bool((weight == 1).all()):
        return None
    return Held(NormSpec(op="gain", options={}), {"weight": weight})


def norm(
    op: str, eps: float, weight: torch.Tensor, bias: torch.Tensor | None = None, **flags: bool
) -> Held:
    """A plain `rmsnorm` or `layernorm` with these (dim,) tensors."""
    spec = NormSpec(op=op, options={"eps": eps, "bias": bias is not None}, **flags)
    return Held(spec, {"weight": weight} | ({} if bias is None else {"bias": bias}))


def is_norm(held: Held | None) -> bool:
    """Whether it is an rmsnorm or a layernorm written plainly."""
    if held is None or held.op not in ("rmsnorm", "layernorm"):
        return False
    return held.spec.options.keys() <= {"eps", "bias"}


def eps_of(held: Held) -> float:
    """The eps of a plain norm, inside its root."""
    return float(held.spec.options["eps"])


def _diagonal(module: torch.nn.Module, dim: int) -> torch.Tensor | None:
    """The numbers by which a module multiplies each feature, if that is all that it does."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(_PROBES, dim, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        ones = module(torch.ones(dim, dtype=torch.float64))
        far = (module(probes) - ones * probes).abs().amax()
    return ones if far <= _ROUNDING * ones.abs().amax() * probes.abs().amax() else None


def _flagged(spec: NormSpec, like: NormSpec) -> NormSpec:
    return replace(spec, per_head=like.per_head)


def _affine(op: str, eps: float, module: AffineNorm, dim: int, length: float = 1.0) -> Held:
    """The plain norm with a module's gain, times `length`, and its bias."""
    weight = torch.as_tensor(module.gain(torch.float64) * length, dtype=torch.float64)
    bias = None if module.bias is None else (module.scale * module.bias).detach()
    if bias is not None and not bool(bias.any()):
        bias = None
    return norm(op, eps, weight.detach().expand(dim).clone(), bias)


def _rmsnorm(held: Held, module: Any, dim: int) -> Held:
    eps = module.eps if module.eps_placement == "inside" else module.eps**2
    return _affine("rmsnorm", eps, module, dim)


def _plainly(op: str) -> Callable[[Held, Any, int], Held]:
    return lambda _held, module, dim: _affine(op, module.eps, module, dim)


def _by_length(held: Held, module: Any, dim: int) -> Held | None:
    """x / max(|x|, eps) is x / rms / sqrt(dim)."""
    if getattr(module, "groups", 1) != 1:
        return None
    length = getattr(module, "length", 1.0) * dim**-0.5
    return _affine("rmsnorm", module.eps**2 / dim, module, dim, length)


def _tapernorm(held: Held, module: Any, dim: int) -> Held | None:
    """Before it fades it is an rmsnorm (faded it is a gain)."""
    return _affine("rmsnorm", module.eps, module, dim) if float(module.gate) == 1 else None


_PLAIN: dict[str, Callable[[Held, Any, int], Held | None]] = {
    "rmsnorm": _rmsnorm,
    "simple_rmsnorm": _plainly("rmsnorm"),
    "layernorm": _plainly("layernorm"),
    "scalenorm": _by_length,
    "l2norm": _by_length,
    "fixnorm": _by_length,
    "tapernorm": _tapernorm,
}
