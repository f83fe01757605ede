"""Freshly built models: our initial values beside what the references' code asks for.

Where our default is the reference's, or an option of ours, the recorded theory is the expectation.
Where we follow the paper instead, `DEVIATIONS` names the parameters, gives the paper's value and
says why; those values come from the papers and the manifest's shapes, not from our code.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .adapters import ADAPTERS
from .cases import Case, NotImplementedCaseError, assert_equal
from .stack import Stack

PLAIN_STD = 0.02
_RESIDUAL_PATH = r"\.(v_proj|o_proj|gate_proj|up_proj|down_proj)\.weight$"


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """Parameters of ours (a pattern) that start elsewhere than the reference's, and where."""

    pattern: str
    value: Callable[[Tensor], float]
    """Standard deviation of a matrix, or the value of a constant, from its shape."""
    why: str


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """A variant as one of our schemes, with the options that its code uses."""

    stack: Stack
    deviations: tuple[Deviation, ...] = ()


def xavier(weight: Tensor) -> float:
    return math.sqrt(2 / sum(weight.shape))


def theory(case: Case) -> dict[str, Tensor]:
    """The recorded value of constants and standard deviation of draws, in the stored shapes."""
    return {
        name: torch.full(entry["shape"], entry["theory"].get("value", entry["theory"]["std"]))
        for name, entry in case.fields["params"].items()
    }


def compare_fresh(case: Case, fresh: Fresh, state: Mapping[str, Tensor]) -> list[str]:
    """Compare every parameter that the map reaches; return the names that follow the paper.

    A matrix has mean 0 and the expected std within 6 standard errors; the rest is constant.
    """
    followed = []
    for name, recorded in fresh.stack.to_ours(theory(case)).items():
        value = recorded.flatten()[0].item()
        assert (recorded == value).all(), f"{name} mixes tensors of different theory"
        for deviation in fresh.deviations:
            if re.search(deviation.pattern, name):
                paper = deviation.value(recorded)
                assert paper != value, f"{name}: no deviation after all ({deviation.why})"
                value = paper
                followed.append(name)
        _compare(name, state[name], value)
    return followed


def _compare(name: str, ours: Tensor, expected: float) -> None:
    if ours.ndim < 2:
        assert_equal(name, ours, torch.full_like(ours, expected), {"rtol": 1e-7, "atol": 0.0})
        return
    values, count = ours.double(), ours.numel()
    error = 6 * expected / math.sqrt(2 * count)
    std = values.std(correction=0)
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert_equal(f"std of {name}", std, wanted, {"rtol": 0.0, "atol": error})
    mean_error = {"rtol": 0.0, "atol": 6 * expected / math.sqrt(count)}
    assert_equal(f"mean of {name}", values.mean(), torch.zeros_like(wanted), mean_error)


def fresh(case: Case) -> Fresh:
    """Our scheme for a variant of an init manifest.

    Raises:
        NotImplementedCaseError: for a family or variant that llmnorm does not have.
    """
    stem = case.manifest.path.stem
    fitting = [name for name in _FAMILIES if stem.startswith(name)]
    if not fitting:
        raise NotImplementedCaseError(f"family {stem}")
    shape = case.manifest.content["shape"]
    return _FAMILIES[fitting[0]](case, shape)


def _adapt(case: Case, adapter: str, config: dict[str, Any], **overrides: Any) -> Stack:
    fields = {**case.fields, "config": config}
    return ADAPTERS[adapter](replace(case, fields=fields, overrides=overrides))


def _llama_shape(shape: Mapping[str, int]) -> dict[str, Any]:
    return {
        "vocab_size": shape["V"],
        "hidden_size": shape["d"],
        "intermediate_size": shape["ff"],
        "num_hidden_layers": shape["L"],
        "num_attention_heads": shape["h"],
        "rms_norm_eps": 1e-6,
    }


def _hf(case: Case, shape: Mapping[str, int]) -> Fresh:
    family = case.name.partition("_")[0]
    if family not in ("llama", "olmo2", "gemma2"):
        raise NotImplementedCaseError(f"variant {case.name}")
    # A padding row that starts at zero (pad_token_id) is not part of any scheme of ours.
    given = {k: v for k, v in case.fields["config"].items() if k != "pad_token_id"}
    return Fresh(stack=_adapt(case, family, {**_llama_shape(shape), **given}))


def _mixln(case: Case, shape: Mapping[str, int]) -> Fresh:
    """The three LLaMA repositories; their embedding std is an option of ours."""
    given = dict(case.fields["config"])
    kind = given["norm_type"]
    embedding_std = case.fields["params"]["model.embed_tokens.weight"]["theory"]["std"]
    policy = {"deeppost": "deepnorm"}.get(kind, "plain")  # deeppost_gpas: plain, by its code's slip
    if kind in ("scale_pre", "scale_post_pre"):  # Pre-LN or Mix-LN with the scaled init
        given["norm_type"], policy = kind.removeprefix("scale_"), "scaled"
    init = {"policy": policy, "embedding_std": embedding_std}
    adapter = "gpas" if kind.endswith("_gpas") else "lns_mixln"
    stack = _adapt(case, adapter, {**_llama_shape(shape), **given}, init=init)
    if kind == "scale_post_pre":
        return Fresh(stack=stack, deviations=_scaled_everywhere(shape, given["post_num"]))
    if kind != "deeppost" or _corrected(case):
        return Fresh(stack=stack)
    beta = (8 * shape["L"]) ** -0.25
    return Fresh(
        stack=stack,
        deviations=(
            Deviation(
                pattern=_RESIDUAL_PATH,
                value=lambda weight: beta * xavier(weight),
                why="DeepNorm's gain is (8L)^(-1/4); this code has the exponent's sign flipped",
            ),
        ),
    )


def _scaled_everywhere(shape: Mapping[str, int], post_num: int) -> tuple[Deviation, ...]:
    """Output projections of the Post-LN layers, which this code leaves plain."""
    post = "|".join(str(i) for i in range(post_num))
    outputs = Deviation(
        pattern=rf"\.layers\.({post})\..*(o_proj|down_proj)\.weight$",
        value=lambda weight: PLAIN_STD * (2 * shape["L"]) ** -0.5,
        why="our init `scaled` is one rule for all layers; this code applies it to Pre-LN ones",
    )
    return (outputs,) if post_num else ()


def _corrected(case: Case) -> bool:
    """Whether this repository's DeepNorm gain is below 1, as the paper's is."""
    theories = [entry["theory"] for entry in case.fields["params"].values()]
    return min(entry.get("gain", 1.0) for entry in theories) < 1


def _torchscale(case: Case, shape: Mapping[str, int]) -> Fresh:
    """Its xavier initialization is never called: everything keeps torch's defaults."""
    given = dict(case.fields["config"])
    config = {
        "vocab_size": shape["V"],
        "embed_dim": shape["d"],
        "layers": shape["L"],
        "heads": shape["h"],
        "ffn": shape["ff"],
        "eps": 1e-5,
        **given,
    }
    damped = given.get("deepnorm", False)
    scaled = damped or given.get("subln", True)
    overrides = {"init": "deepnorm"} if damped else {}
    factor = given.get("scale_on_v_out_fc", 1.0)  # the paper's beta or gamma, recorded

    def of_paper(weight: Tensor) -> float:
        return xavier(weight) if scaled else PLAIN_STD

    deviations = (
        Deviation(
            pattern=r"(q|k)_proj\.weight$",
            value=of_paper,
            why="xavier in the papers, torch's uniform default here; plain Pre-LN is ours",
        ),
        Deviation(
            pattern=_RESIDUAL_PATH,
            value=lambda weight: factor * of_paper(weight),
            why="the papers' factor multiplies xavier, not torch's uniform default",
        ),
        Deviation(
            pattern=r"_proj\.bias$",
            value=lambda bias: 0.0,
            why="biases start at 0 in the papers, uniform here",
        ),
        Deviation(
            pattern=r"^lm_head\.weight$",
            value=lambda weight: PLAIN_STD,
            why="the head is N(0, 0.02) in all our schemes, 1/sqrt(width) here",
        ),
    )
    return Fresh(stack=_adapt(case, "torchscale", config, **overrides), deviations=deviations)


def _dyt_llama(case: Case, shape: Mapping[str, int]) -> Fresh:
    """The alphas by site are options; the embedding scale is its `sqrt_dim`."""
    given = {k: v for k, v in case.fields["config"].items() if k != "official_for"}
    config = {
        "vocab_size": shape["V"],
        "emb_dim": shape["d"],
        "nheads": shape["h"],
        "nlayers": shape["L"],
        "ffn": shape["ff"],
        **given,
    }
    return Fresh(stack=_adapt(case, "dyt_llama", config))


def _derf_gpt2(case: Case, shape: Mapping[str, int]) -> Fresh:
    """Output projections divided by sqrt(2L): our init `scaled`; the scale is `sqrt_dim`."""
    config = {
        "vocab_size": shape["V"],
        "n_embd": shape["d"],
        "n_head": shape["h"],
        "n_layer": shape["L"],
        "ffn": case.fields["params"]["transformer.h.0.mlp.c_fc.weight"]["shape"][0],
        **case.fields["config"],
    }
    return Fresh(stack=_adapt(case, "derf_gpt2", config, init="scaled"))


def _hybridnorm(case: Case, shape: Mapping[str, int]) -> Fresh:
    """Its draws are truncated at 3 std (realized 0.9866 of the nominal std), ours are not."""
    given, params = case.fields["config"], case.fields["params"]
    if given["init_fn"] not in ("normal", "full_megatron"):
        raise NotImplementedCaseError(f"init_fn={given['init_fn']!r}")
    has = {name.split(".")[3] for name in params if ".blocks.0." in name}
    config = {
        "vocab_size": shape["V"],
        "d_model": shape["d"],
        "n_heads": shape["h"],
        "n_layers": shape["L"],
        "ffn": shape["ff"],
        "eps": 1e-5,
        "use_query_norm": "q_norm" in has,
        "use_key_norm": "k_norm" in has,
        "use_value_norm": "v_norm" in has,
        "attn_norm": "attn_norm" in has,
        "ffn_norm": "ff_norm" in has,
        "attn_residual_after_norm": False,
        "ffn_residual_after_norm": True,
    }
    std = given["init_std"]
    init = "scaled" if given["init_fn"] == "full_megatron" else "plain"
    stack = _adapt(case, "hybridnorm", config, init=init, initializer_range=std)
    if init == "plain":
        return Fresh(stack=stack)
    head = Deviation(
        pattern=r"^lm_head\.weight$",
        value=lambda weight: std,
        why="our head has the std of the other matrices, theirs 1/sqrt(width)",
    )
    return Fresh(stack=stack, deviations=(head,))


def _ngpt(case: Case, shape: Mapping[str, int]) -> Fresh:
    """Unit rows from the start; the baseline's output projections are divided by sqrt(2L)."""
    given = dict(case.fields["config"])
    normalized = given.pop("after_normalize_matrices")
    config = {
        "vocab_size": shape["V"],
        "n_embd": shape["d"],
        "n_head": shape["h"],
        "n_layer": shape["L"],
        "ffn": case.fields["params"]["transformer.h.0.mlp_c_proj.weight"]["shape"][1],
        **given,
    }
    if not given["use_nGPT"]:
        return Fresh(stack=_adapt(case, "ngpt", config, init="scaled"))
    stack = _adapt(case, "ngpt", config)
    if normalized:
        return Fresh(stack=stack)
    outputs = Deviation(
        pattern=r"\.(o_proj|down_proj)\.weight$",
        value=lambda weight: weight.shape[0] ** -0.5,
        why="recorded before the first normalization, which undoes this code's 1/sqrt(2L)",
    )
    return Fresh(stack=stack, deviations=(outputs,))


def _bhyt(case: Case, shape: Mapping[str, int]) -> Fresh:
    """The lams by site are options; whether they are learned is nothing to a start."""
    given = {k: v for k, v in case.fields["config"].items() if k != "learnable_lam"}
    return Fresh(stack=_adapt(case, "bhyt", {**_llama_shape(shape), **given}))


_FAMILIES: dict[str, Callable[[Case, Mapping[str, int]], Fresh]] = {
    "hf_": _hf,
    "mixln_": _mixln,
    "torchscale": _torchscale,
    "dyt_llama": _dyt_llama,
    "derf_gpt2": _derf_gpt2,
    "hybridnorm": _hybridnorm,
    "ngpt": _ngpt,
    "bhyt": _bhyt,
}
