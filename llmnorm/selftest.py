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
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM, embedding_scale
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
    while not isinstance(causal, LlmNormForCausalLM):
        inner = getattr(causal, "module", getattr(causal, "_orig_mod", None))
        if inner is None:
            raise SelfTestError(f"{type(causal).__name__} is no llmnorm model")
        causal = inner
    slots = list(_slots(causal, causal.config))
    for name, slot, spec in slots:
        _check_slot(name, slot, spec)
    _check_embedding(causal)
    _check_buffers(causal)
    _check_parameters(causal)
    if fresh:
        _check_values(causal, slots)


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


def _check_slot(name: str, slot: nn.Module, spec: NormSpec | None) -> None:
    promised = nn.Identity if spec is None else operation(spec.op)
    if type(slot) is not promised:
        raise SelfTestError(
            f"{name} is {type(slot).__name__}; the scheme promises {promised.__name__}"
        )
    for key, value in vars(_reference(spec)).items():
        if isinstance(value, float | int | str) and not key.startswith("_") and key != "training":
            found = getattr(slot, key, None)
            if found != value:
                raise SelfTestError(f"{name}.{key} is {found!r}; the scheme promises {value!r}")


def _reference(spec: NormSpec | None) -> nn.Module:
    """What a spec builds, one feature (or one a head) wide."""
    return nn.Identity() if spec is None else spec.build(spec.options.get("heads", 1))


def _check_values(model: Any, slots: list[tuple[str, nn.Module, NormSpec | None]]) -> None:
    """What training changes, as it should be before: parameters of slots, scale, matrices."""
    for name, slot, spec in slots:
        for key, promised in _reference(spec).named_parameters():
            _check_constant(f"{name}.{key}", slot.get_parameter(key), promised[0].item())
    scale = model.model.embedding_scale
    if isinstance(scale, EmbeddingScale):
        twin: Any = embedding_scale(model.config.embedding_spec(), model.config)
        _check_constant("model.embedding_scale.weight", scale.weight, twin.value)
    _check_matrices(model)


def _check_constant(name: str, parameter: Any, promised: float) -> None:
    values = _local(parameter).detach()
    wanted = torch.tensor(promised, dtype=values.dtype, device=values.device)
    if not torch.equal(values, wanted.expand_as(values)):
        seen = values.flatten()[(values.flatten() != wanted).nonzero()[0]].item()
        raise SelfTestError(f"{name} starts at {seen:.6g}; the scheme promises {promised:.6g}")


def _check_embedding(model: Any) -> None:
    spec = model.config.embedding_spec()
    promised, found = embedding_scale(spec, model.config), model.model.embedding_scale
    if type(found) is not type(promised):
        raise SelfTestError(
            f"model.embedding_scale is {type(found).__name__}; "
            f"embedding {spec.treatment!r} promises {type(promised).__name__}"
        )


def _check_buffers(model: nn.Module) -> None:
    for name, _ in model.named_buffers():
        raise SelfTestError(f"{name} is a buffer; constants of a scheme are plain numbers")


def _check_parameters(model: Any) -> None:
    """Names, shapes and ties as the config asks; all there, all of one dtype."""
    with torch.device("meta"):
        promised = dict(type(model)(model.config).named_parameters())
    found = dict(model.named_parameters())
    for name in sorted(promised.keys() ^ found.keys()):
        state = "is missing or shared" if name in promised else "is a parameter"
        raise SelfTestError(f"{name} {state}; the config promises otherwise")
    dtypes: dict[torch.dtype, str] = {}
    for name, parameter in found.items():
        if parameter.shape != promised[name].shape:
            raise SelfTestError(
                f"{name} has shape {tuple(parameter.shape)}; "
                f"the config promises {tuple(promised[name].shape)}"
            )
        if parameter.is_meta:
            raise SelfTestError(f"{name} was never initialized: it is still on the meta device")
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
