"""Check that a built model keeps the promises of its scheme; run after build and after sharding.

Public code for these schemes builds no norm on a typo, loses a scale when a buffer is wiped, or
inverts a gain. Each promise here is read off the live modules and compared with the config's specs.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llmnorm.errors import SelfTestError
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.gains import EmbeddingScale
from llmnorm.modeling.initialization import expected_std
from llmnorm.modeling.modeling_llmnorm import embedding_scale
from llmnorm.modeling.operations import operation
from llmnorm.modeling.residual import NormSpec

_RESIDUAL_SLOTS = ("entry", "pre", "post", "skip", "out")


def self_test(model: nn.Module, *, fresh: bool) -> None:
    """Raise on the first broken promise of a model's scheme.

    Args:
        model: an `LlmNormForCausalLM`, possibly wrapped by an engine (its `module` is followed).
        fresh: also check values that training changes: alpha, shift, gains, the embedding scale,
            and the std of every matrix within 5/sqrt(2 n) of the scheme's rule, n its elements.
            True at step 0 of a run that was not started from weights.

    Raises:
        SelfTestError: naming the module and what was promised.
    """
    causal: Any = model
    while hasattr(causal, "module"):
        causal = causal.module
    for name, slot, spec in _slots(causal, causal.config):
        _check_slot(name, slot, spec, fresh=fresh)
    _check_embedding(causal, fresh=fresh)
    _check_buffers_and_dtypes(causal)
    if fresh:
        _check_matrices(causal)


def _slots(model: Any, config: LlmNormConfig) -> Iterator[tuple[str, nn.Module, NormSpec | None]]:
    """Every slot of the model beside the spec it was promised."""
    trunk = model.model
    specs = config.residual_specs()
    if len(trunk.layers) != len(specs):
        raise SelfTestError(f"the model has {len(trunk.layers)} layers; {len(specs)} were promised")
    for i, (layer, (attn, mlp)) in enumerate(zip(trunk.layers, specs, strict=True)):
        prefix = f"model.layers.{i}"
        for slot in _RESIDUAL_SLOTS:
            yield (
                f"{prefix}.attn_residual.{slot}",
                getattr(layer.attn_residual, slot),
                getattr(attn, slot),
            )
            yield (
                f"{prefix}.mlp_residual.{slot}",
                getattr(layer.mlp_residual, slot),
                getattr(mlp, slot),
            )
        for slot in ("q", "k", "v"):
            module = getattr(layer.self_attn, f"{slot}_norm")
            yield f"{prefix}.self_attn.{slot}_norm", module, getattr(attn, slot)
        yield f"{prefix}.self_attn.inner", layer.self_attn.inner, attn.inner
        yield f"{prefix}.mlp.inner", layer.mlp.inner, mlp.inner
    yield "model.norm", trunk.norm, config.final_norm_spec()
    yield "model.embedding_norm", trunk.embedding_norm, config.embedding_spec().norm


def _check_slot(name: str, slot: nn.Module, spec: NormSpec | None, *, fresh: bool) -> None:
    promised = nn.Identity if spec is None else operation(spec.op)
    if type(slot) is not promised:
        raise SelfTestError(
            f"{name} is {type(slot).__name__}; the scheme promises {promised.__name__}"
        )
    if spec is None:
        return
    reference = spec.build(spec.options.get("heads", 1))
    for key, value in vars(reference).items():
        if isinstance(value, float | int | str) and not key.startswith("_") and key != "training":
            found = getattr(slot, key, None)
            if found != value:
                raise SelfTestError(f"{name}.{key} is {found!r}; the scheme promises {value!r}")
    found_parameters = {key for key, _ in slot.named_parameters()}
    promised_parameters = {key for key, _ in reference.named_parameters()}
    if found_parameters != promised_parameters:
        raise SelfTestError(
            f"{name} has parameters {sorted(found_parameters)}; "
            f"the scheme promises {sorted(promised_parameters)}"
        )
    if fresh:
        for key, parameter in slot.named_parameters():
            _check_constant(f"{name}.{key}", parameter, reference.get_parameter(key)[0].item())


def _check_constant(name: str, parameter: Any, promised: float) -> None:
    if parameter.is_meta:
        raise SelfTestError(f"{name} was never initialized: it is still on the meta device")
    values = _local(parameter).detach()
    wanted = torch.tensor(promised, dtype=values.dtype, device=values.device)
    if not torch.equal(values, wanted.expand_as(values)):
        seen = values.flatten()[(values.flatten() != wanted).nonzero()[0]].item()
        raise SelfTestError(f"{name} starts at {seen:.6g}; the scheme promises {promised:.6g}")


def _check_embedding(model: Any, *, fresh: bool) -> None:
    config: LlmNormConfig = model.config
    promised = embedding_scale(config.embedding_spec(), config)
    found = model.model.embedding_scale
    if type(found) is not type(promised):
        raise SelfTestError(
            f"model.embedding_scale is {type(found).__name__}; "
            f"embedding {config.embedding_spec().treatment!r} promises {type(promised).__name__}"
        )
    if fresh and isinstance(promised, EmbeddingScale):
        _check_constant("model.embedding_scale.weight", found.weight, promised.value)


def _check_buffers_and_dtypes(model: nn.Module) -> None:
    for name, _ in model.named_buffers():
        raise SelfTestError(f"{name} is a buffer; constants of a scheme are plain numbers")
    dtypes: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        dtypes.setdefault(parameter.dtype, name)
    if len(dtypes) > 1:
        kinds = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
        raise SelfTestError(f"parameters differ in dtype ({kinds}); expected one for all")


def _check_matrices(model: Any) -> None:
    for name, module in model.named_modules():
        tied = name == "lm_head" and module.weight is model.model.embed_tokens.weight
        if isinstance(module, nn.Linear | nn.Embedding) and not tied:
            promised = expected_std(name, module, model.config)
            found, elements = _std(module.weight)
            tolerance = 5 / math.sqrt(2 * elements)
            if not abs(found / promised - 1) <= tolerance:
                raise SelfTestError(
                    f"{name}.weight starts with std {found:.5g}; the scheme's rule promises "
                    f"{promised:.5g} (tolerance {tolerance:.1%})"
                )
            if getattr(module, "bias", None) is not None:
                _check_constant(f"{name}.bias", module.bias, 0.0)


def _local(parameter: Any) -> torch.Tensor:
    """This rank's share of a parameter (all of it unless it is sharded)."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _std(parameter: Any) -> tuple[float, int]:
    """Standard deviation and element count of a parameter; sums are reduced over its shards."""
    values = _local(parameter).detach().double()
    sums = torch.stack(
        [values.sum(), values.square().sum(), values.new_tensor(float(values.numel()))]
    )
    if hasattr(parameter, "to_local"):
        torch.distributed.all_reduce(sums, group=parameter.device_mesh.get_group())
    total, squares, count = (value.item() for value in sums)
    mean = total / count
    return math.sqrt(max(squares / count - mean * mean, 0.0)), int(count)
