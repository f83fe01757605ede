"""Check that a built model keeps the promises of its scheme; run after build and after sharding.

Public code for these schemes builds no norm on a typo, loses a scale when a buffer is wiped, or
inverts a gain. Each promise here is read off the live modules and compared with the config's specs.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llmnorm.errors import SelfTestError
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.initialization import expected_std
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM, embedding_scale
from llmnorm.modeling.residual import (
    RESIDUALS,
    SOURCES,
    NormSpec,
    Shared,
    build_slot,
)
from llmnorm.modeling.streams import build_streams
from llmnorm.modeling.weights import WeightNormLinear, WeightSpec, unit_dim


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
    _check_joints(causal)
    _check_slots(causal, fresh=False)
    _check_embedding(causal, fresh=False)
    _check_buffers(causal)
    _check_parameters(causal)
    if fresh:
        _check_slots(causal, fresh=True)
        _check_embedding(causal, fresh=True)
        _check_matrices(causal)
        _check_unit_rows(causal)


def promised_slots(config: LlmNormConfig) -> Iterator[tuple[str, NormSpec | None, int]]:
    """Every slot of a model: its module's name, what it is to hold, the width of its features.

    Raises:
        ValueError: if the config's wiring cannot be (see `LlmNormConfig.residual_specs`).
    """
    hidden, head_dim = config.hidden_size, config.head_dim
    heads = {"q": config.num_attention_heads}
    heads |= dict.fromkeys(("k", "v"), config.num_key_value_heads)
    yield "model.embedding_norm", config.embedding_spec().norm, hidden
    for i, (attn, mlp) in enumerate(config.residual_specs()):
        for kind, spec in (("attn", attn), ("mlp", mlp)):
            for slot in RESIDUALS[spec.module].slots:
                yield f"model.layers.{i}.{kind}_residual.{slot}", getattr(spec, slot), hidden
        for slot, count in heads.items():
            held: NormSpec | None = getattr(attn, slot)
            width = head_dim if held is not None and held.per_head else count * head_dim
            yield f"model.layers.{i}.self_attn.{slot}_norm", held, width
        for slot in ("q_rotated", "k_rotated"):
            yield f"model.layers.{i}.self_attn.{slot}", getattr(attn, slot), head_dim
        yield f"model.layers.{i}.self_attn.inner", attn.inner, heads["q"] * head_dim
        yield f"model.layers.{i}.mlp.up", mlp.up, config.intermediate_size
        if config.mlp == "gated":
            yield f"model.layers.{i}.mlp.gate", mlp.gate, config.intermediate_size
        yield f"model.layers.{i}.mlp.inner", mlp.inner, config.intermediate_size
    if (streams := config.streams_spec()) is not None:
        yield "model.streams.first", streams.first, hidden
        yield "model.streams.second", streams.second, hidden
    yield "model.norm", config.final_norm_spec(), hidden
    yield "logits", config.logits_spec(), config.vocab_size


def _check_slots(model: Any, *, fresh: bool) -> None:
    """What each slot holds: the operation, its constants and, when fresh, its parameters."""
    for name, spec, width in promised_slots(model.config):
        found, promised = model.get_submodule(name), build_slot(spec, width)
        if spec is not None and spec.shared:
            elsewhere = model.get_submodule(name.replace("mlp_residual", "attn_residual"))
            if not (isinstance(found, Shared) and found.module is elsewhere):
                raise SelfTestError(f"{name} is not the module that attention's slot holds")
            continue
        if type(found) is not type(promised):
            raise SelfTestError(
                f"{name} is {type(found).__name__}; the scheme promises {type(promised).__name__}"
            )
        for key, value in vars(promised).items():
            if isinstance(value, float | int | str) and not key.startswith("_"):
                seen = getattr(found, key, None)
                if seen != value and key != "training":
                    raise SelfTestError(f"{name}.{key} is {seen!r}; the scheme promises {value!r}")
        if fresh:
            for key, parameter in promised.named_parameters():
                _check_equal(f"{name}.{key}", found.get_parameter(key), parameter)


def _check_joints(model: Any) -> None:
    """How each branch joins the stream: the residual module, what it reads and what it skips."""
    depth, layers = model.config.num_hidden_layers, len(model.model.layers)
    if layers != depth:
        raise SelfTestError(f"the model has {layers} layers; {depth} were promised")
    for i, pair in enumerate(model.config.residual_specs()):
        for kind, spec in zip(("attn", "mlp"), pair, strict=True):
            name = f"model.layers.{i}.{kind}_residual"
            found = model.get_submodule(name)
            if type(found) is not RESIDUALS[spec.module]:
                raise SelfTestError(
                    f"{name} is {type(found).__name__}; the scheme promises {spec.module}"
                )
            seen = (SOURCES[found.reads], SOURCES[found.skips])
            if seen != (spec.reads, spec.skips):
                raise SelfTestError(
                    f"{name} reads {seen[0]} and skips {seen[1]}; the scheme promises "
                    f"{spec.reads} and {spec.skips}"
                )
    streams = model.model.streams
    promised = build_streams(model.config.streams_spec(), model.config.hidden_size)
    if type(streams) is not type(promised):
        raise SelfTestError(
            f"model.streams is {type(streams).__name__}; "
            f"the scheme promises {type(promised).__name__}"
        )
    scale, wanted = (getattr(module, "scale", 1.0) for module in (streams, promised))
    if scale != wanted:
        raise SelfTestError(f"model.streams.scale is {scale}; the scheme promises {wanted}")


def _check_embedding(model: Any, *, fresh: bool) -> None:
    spec = model.config.embedding_spec()
    promised, found = embedding_scale(spec, model.config), model.model.embedding_scale
    if type(found) is not type(promised):
        raise SelfTestError(
            f"model.embedding_scale is {type(found).__name__}; "
            f"embedding {spec.treatment!r} promises {type(promised).__name__}"
        )
    if fresh:
        for key, parameter in promised.named_parameters():
            _check_equal(f"model.embedding_scale.{key}", found.get_parameter(key), parameter)


def _check_buffers(model: nn.Module) -> None:
    for name, _ in model.named_buffers():
        raise SelfTestError(f"{name} is a buffer; constants of a scheme are plain numbers")


def _check_parameters(model: Any) -> None:
    """Names, shapes and ties as the config asks; all there, all of one dtype."""
    with torch.device("meta"):
        promised = dict(LlmNormForCausalLM(model.config).named_parameters())
    found = dict(model.named_parameters())
    for name in sorted(promised.keys() ^ found.keys()):
        state = "is missing or shared" if name in promised else "is a parameter"
        raise SelfTestError(f"{name} {state}; the config promises otherwise")
    dtypes: dict[torch.dtype, str] = {}
    for name, parameter in found.items():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties the parameter
        if shape != promised[name].shape:
            raise SelfTestError(
                f"{name} has shape {tuple(shape)}; "
                f"the config promises {tuple(promised[name].shape)}"
            )
        if parameter.is_meta:
            raise SelfTestError(f"{name} was never initialized: it is still on the meta device")
        dtypes.setdefault(parameter.dtype, name)
    if len(dtypes) > 1:
        kinds = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
        raise SelfTestError(f"parameters differ in dtype ({kinds}); expected one for all")


def _check_matrices(model: Any) -> None:
    """The std of every matrix, zero biases, the lengths that weight normalization starts from."""
    for name, module in model.named_modules():
        tied = name == "lm_head" and module.weight is model.model.embed_tokens.weight
        if isinstance(module, nn.Linear | nn.Embedding) and not tied:
            promised = expected_std(name, module, model.config)
            found, elements = _std(module.weight)
            tolerance = 5 / math.sqrt(2 * elements)
            if not abs(found - promised) <= tolerance * promised:
                raise SelfTestError(
                    f"{name}.weight starts with std {found:.5g}; the scheme's rule promises "
                    f"{promised:.5g} (tolerance {tolerance:.1%})"
                )
            if isinstance(module, nn.Linear) and module.bias is not None:
                _check_equal(f"{name}.bias", module.bias, torch.zeros(module.out_features))
            if isinstance(module, WeightNormLinear):
                rows = _whole(module.weight).float().norm(dim=1)
                _check_lengths(f"{name}.length", module.length, _whole(module.length) / rows)


def _check_unit_rows(model: Any) -> None:
    """Where `weights` is `unit`, every matrix has rows of length 1."""
    if WeightSpec.parse(model.config.weights).kind == "unit":
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                lengths = _whole(module.weight).float().norm(dim=unit_dim(name))
                _check_lengths(f"{name}.weight", module.weight, lengths)


def _check_lengths(name: str, parameter: torch.Tensor, lengths: torch.Tensor) -> None:
    """Lengths in units of the promised ones, up to the rounding of the parameter's dtype."""
    rounding = 4 * max(torch.finfo(parameter.dtype).eps, 1e-5)
    if not torch.allclose(lengths, torch.ones_like(lengths), rtol=0, atol=rounding):
        raise SelfTestError(f"{name} has rows whose lengths are not the promised ones")


def _whole(parameter: Any) -> torch.Tensor:
    """A parameter's values, gathered if it is sharded, so that all ranks agree."""
    if hasattr(parameter, "ds_shape"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.detach()


def _check_equal(name: str, parameter: Any, promised: torch.Tensor) -> None:
    """Compare a vector with its start."""
    values = _whole(parameter).flatten()
    wanted = promised.detach().to(values.device, values.dtype).flatten()
    if not torch.equal(values, wanted):
        where = (values != wanted).nonzero()[0]
        seen, expected = values[where].item(), wanted[where].item()
        raise SelfTestError(f"{name} starts at {seen:.6g}; the scheme promises {expected:.6g}")


def _std(parameter: Any) -> tuple[float, int]:
    """Standard deviation and element count of a parameter; sums are reduced over its shards."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else _whole(parameter)
    values = local.detach().double()
    sums = torch.stack(
        [values.sum(), values.square().sum(), values.new_tensor(float(values.numel()))]
    )
    if isinstance(parameter, DTensor):
        torch.distributed.all_reduce(sums, group=parameter.device_mesh.get_group())
    total, squares, count = (value.item() for value in sums)
    mean = total / count
    return math.sqrt(max(squares / count - mean * mean, 0.0)), int(count)
