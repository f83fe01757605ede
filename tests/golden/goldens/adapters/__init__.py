"""One adapter per family of reference code, by the family's name in the manifests."""

from collections.abc import Callable

from ..cases import Case, NotImplementedCaseError
from ..stack import Stack
from . import (
    bhyt,
    derf_gpt2,
    dyt_llama,
    gpas,
    hf,
    hybridnorm,
    mixln,
    ngpt,
    normformer,
    prerms,
    siamese,
    torchscale,
)

ADAPTERS: dict[str, Callable[[Case], Stack]] = {
    "llama": hf.llama,
    "qwen3": hf.qwen3,
    "olmo2": hf.olmo2,
    "gemma2": hf.gemma2,
    "gemma3": hf.gemma3,
    "lns_mixln": mixln.adapt,
    "lns_head": mixln.lns,
    "dyt_llama": dyt_llama.adapt,
    "derf_gpt2": derf_gpt2.adapt,
    "torchscale": torchscale.adapt,
    "normformer": normformer.adapt,
    "hybridnorm": hybridnorm.adapt,
    "prerms": prerms.adapt,
    "bhyt": bhyt.adapt,
    "gpas": gpas.adapt,
    "siamese": siamese.hybrid,
    "siamese_deit": siamese.deit,
    "ngpt": ngpt.adapt,
}


def adapter_of(family: str) -> Callable[[Case], Stack]:
    """The adapter of a family; `llama_pre` is of the family `llama`."""
    fitting = [name for name in ADAPTERS if f"{family}_".startswith(f"{name}_")]
    if not fitting:
        raise NotImplementedCaseError(f"family {family}")
    return ADAPTERS[max(fitting, key=len)]


def adapt(case: Case) -> Stack:
    """Our config and map for a case.

    Raises:
        NotImplementedCaseError: for a family or a switch that no adapter knows.
    """
    return adapter_of(case.manifest.family)(case)
