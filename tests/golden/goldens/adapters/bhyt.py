"""BHyT's LLaMA: Pre-LN with RMSNorm, with the star form at every site, or with the full form."""

from typing import Any

from torch import Tensor

from llmnorm import build_config

from ..cases import Case, NotImplementedCaseError, Switches
from ..stack import Reference, Stack
from .hf import PRE, llama_names
from .mixln import take_llama


def adapt(case: Case) -> Stack:
    switches = Switches(case.fields["config"])
    kind, kappa = switches.take("norm_type"), switches.take("kappa", 10.0)
    placement: Any = "pre_ln"
    if kind in ("bhyt", "bhytline"):  # the second is the first in another order of kernels
        placement = {"name": "bhyt", "seq_len": switches.take("seq_len", 2048)}
    given = {site: switches.take(f"{site}_layer_lam", None) for site in ("input", "post", "last")}
    shape, rmsnorm = take_llama(switches)
    shape["num_key_value_heads"] = switches.take("num_key_value_heads", None)
    switches.done()
    if kind not in ("bhyt", "bhytline", "bhytstar", "rms"):
        raise NotImplementedCaseError(f"norm_type={kind!r}")
    norm = rmsnorm
    if kind != "rms":
        lam = {"attn": given["input"] or 2.0, "mlp": given["post"] or 1.0}
        last = _last(case, given["last"])
        norm = {"op": "bhyt", "lam": lam, "kappa": kappa, "eps": 1e-6, "last_lam": last}
    config = build_config(
        shape, norm=norm, placement=placement, **{"embedding": "raw", **case.overrides}
    )

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        state = llama_names(reference, config, lambda i: PRE)
        names = {"model.norm": "model.norm"}
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}"
            names |= {f"{layer}.{ours}": f"{layer}.{theirs}" for ours, theirs in PRE.items()}
        lams = {f"{ours}.lam": f"{theirs}.lam" for ours, theirs in names.items()}
        found = {ours: theirs for ours, theirs in lams.items() if theirs in reference}
        return state | {ours: reference[theirs].reshape(1) for ours, theirs in found.items()}

    return Stack(config=config, to_ours=to_ours)


def _last(case: Case, given: float | None) -> float:
    """Initial lam of the final norm; 0 where the case has an RMSNorm there."""
    if given is not None:
        return given
    return 2.0 if "model.norm.lam" in case.fields["params"] else 0
