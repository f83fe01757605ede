"""From a shape, a norm and a placement to a config, and from a config to a model.

Here the two halves of a scheme meet: the placement's rule is applied once to every site, and what
it says is stored in the config. `selftest.py` checks that a model keeps those promises.
"""

import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from llmnorm.calibration import calibrated
from llmnorm.errors import ConfigError
from llmnorm.modeling.configuration_llmnorm import EmbeddingSpec, LlmNormConfig
from llmnorm.modeling.initialization import InitSpec, mark
from llmnorm.modeling.modeling_llmnorm import LlmNormDecoderLayer, LlmNormForCausalLM
from llmnorm.modeling.operations import list_norms, operation, read_choice
from llmnorm.modeling.parametrization import Parametrization
from llmnorm.modeling.residual import RESIDUALS, NormSpec, ResidualSpec, constant
from llmnorm.modeling.streams import StreamsSpec
from llmnorm.modeling.weights import WeightSpec
from llmnorm.papers import PAPERS, arxiv
from llmnorm.placements import Placement, Site, parse_placement
from llmnorm.resources import shape_folder, suggest
from llmnorm.safe_files import read_json
from llmnorm.selftest import promised_slots, self_test

logger = logging.getLogger(__name__)

# Resolved by the placement, so never given by hand.
_RESOLVED = {"residuals", "final_norm", "logits", "streams", "wiring", "norm", "placement"}
_AXES = ("init", "embedding", "weights", "parametrization")  # a scheme's other defaults
# DeepNet's 1,000 layers and a vocabulary of 262,144 are the most published; ten times that or more
# is a slip of the hand, found here before anything is resolved or allocated.
_LIMITS = {"num_hidden_layers": 10_000, "vocab_size": 2**24, "hidden_size": 2**18}
# Written by transformers beside the fields.
_METADATA = {"model_type", "architectures", "auto_map", "transformers_version", "dtype"}


def build_config(
    base: str | Path | Mapping[str, Any],
    *,
    norm: str | Mapping[str, Any] = "rmsnorm",
    placement: str | Mapping[str, Any] = "pre_ln",
    **overrides: Any,
) -> LlmNormConfig:
    """Apply a scheme to a shape.

    Args:
        base: name of a preset, folder with a `config.json`, or mapping of shape fields.
        norm: name of a norm, or `{"op": name, **options}`. `alpha` of dyt and derf may be a mapping
            `{attn, mlp, final}`.
        placement: name of a placement, or `{"name": name, **options}`.
        **overrides: any config field (`vocab_size`, `num_hidden_layers`, `qk_norm`, `embedding`,
            `init`, ...). `init`, `embedding`, `weights` and `parametrization` default to what the
            placement asks for; `embedding` to `scale` for dyt and derf.

    Returns:
        A config that carries the resolved wiring of every layer.

    Raises:
        ConfigError: for an unknown name, option or field, or a shape that cannot be.
    """
    shape = _shape(base)
    _refuse_unknown(overrides)
    try:
        rule, spec = parse_placement(placement), _parse_norm(norm)
        fields_ = {**shape, **overrides, "norm": spec.to_dict(), "placement": rule.to_dict()}
        _check_accepted(rule, spec)
        _check_limits(fields_)
        if spec.pointwise:
            fields_.setdefault("embedding", "scale")
        config = LlmNormConfig(**{**{axis: getattr(rule, axis) for axis in _AXES}, **fields_})
        _resolve(config, rule, spec)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    _warn_if_doubtful(config, rule, spec)
    return config


def build_model(config: LlmNormConfig, *, seed: int = 0) -> LlmNormForCausalLM:
    """A fresh float32 model whose weights are a function of (seed, parameter name).

    Its config is the given one, but for starts that the scheme measures (`calibration.py`).

    Raises:
        ConfigError: if the config's wiring cannot be.
        SelfTestError: if the model breaks a promise of its scheme.
    """
    try:
        config = calibrated(config)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed reseeds GPUs too
            model = LlmNormForCausalLM(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    self_test(model, fresh=True)
    return model


def cite(config: LlmNormConfig) -> str:
    """The papers a scheme stands on, one a line, each once.

    Read from the docstrings of placement, operations and residual modules; those of `weights`,
    `parametrization` and `init` from `papers.py`.
    """
    parts: list[type] = []
    if config.placement is not None:
        parts.append(type(parse_placement(config.placement)))
    parts += [operation(spec.op) for spec, _ in _held(config)]
    parts += [RESIDUALS[spec.module] for pair in config.residual_specs() for spec in pair]
    chosen = {
        "weights": WeightSpec.parse(config.weights).kind,
        "parametrization": Parametrization.parse(config.parametrization).name,
        "init": InitSpec.parse(config.init).policy,
    }
    sources = [source_of(part) for part in parts]
    sources += [PAPERS[field].get(name, "") for field, name in chosen.items()]
    lines: dict[str, str] = {}
    for source in filter(None, sources):
        lines.setdefault(" ".join(arxiv(source)) or source, source)
    return "\n".join(lines.values())


def source_of(part: type) -> str:
    """The `Source:` paragraph of a norm's or placement's docstring, else its arXiv number."""
    _, found, source = (inspect.getdoc(part) or "").partition("Source: ")
    paper = getattr(part, "paper", None)
    return " ".join(source.split()) if found else f"arXiv:{paper}" if paper else ""


def _parse_norm(norm: str | Mapping[str, Any]) -> NormSpec:
    op = read_choice("norm", norm, "op").get("op")
    if op not in list_norms():
        raise ConfigError(f"unknown norm {op!r}{suggest(str(op), list_norms())}")
    return NormSpec.parse_alone("norm", norm)


def _check_accepted(rule: Placement, norm: NormSpec) -> None:
    if rule.accepts is not None and norm.op not in rule.accepts:
        raise ConfigError(
            f"placement {rule.name} is defined for norm {' or '.join(rule.accepts)}; saw {norm.op}"
        )


def _shape(base: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(base, Mapping):
        _refuse_unknown(base)
        return dict(base)
    file = shape_folder(str(base)) / "config.json"
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: expected a Hugging Face config.json; {error}") from error
    if not isinstance(content, dict) or content.get("model_type", "llmnorm") != "llmnorm":
        raise ConfigError(f"{file}: model_type must be 'llmnorm'; this is another kind of model")
    dropped = _RESOLVED | _METADATA
    if content.get("residuals") is not None:  # a model: another scheme replaces all of its own
        dropped |= {"qk_norm", *_AXES}
    shape = {name: value for name, value in content.items() if name not in dropped}
    try:
        _refuse_unknown(shape)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return shape


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    own = {f.name for f in fields(LlmNormConfig)} | {"rope_theta", "dtype"}
    for name in given:
        if name in _RESOLVED:
            raise ConfigError(f"{name} is set by the scheme; choose norm and placement instead")
        if name not in own:
            raise ConfigError(f"no config field is called {name!r}{suggest(name, sorted(own))}")


def _check_limits(given: Mapping[str, Any]) -> None:
    for name, limit in _LIMITS.items():
        value = given.get(name)
        if isinstance(value, int) and value > limit:
            raise ValueError(f"{name} is {value}; expected at most {limit}")


def _resolve(config: LlmNormConfig, rule: Placement, norm: NormSpec) -> None:
    """Apply the rule to every site and store what it says, then seal it."""
    at = {kind: norm.at(kind, config.hidden_size) for kind in ("attn", "mlp", "final")}
    residuals = []
    for layer_idx in range(config.num_hidden_layers):
        layer = {}
        for kind in ("attn", "mlp"):
            site = Site(
                kind=kind,
                layer_idx=layer_idx,
                depth=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                hidden_size=config.hidden_size,
            )
            layer[kind] = rule.residual(site, at[kind])
        layer["attn"] = _with_qk_norm(layer["attn"], config, rule)
        layer["mlp"] = _sharing(layer["mlp"], layer["attn"])
        if config.mlp == "plain":
            layer["mlp"] = replace(layer["mlp"], gate=None)
        residuals.append({kind: spec.to_dict() for kind, spec in layer.items()})
    config.residuals = residuals
    config.final_norm = _stored(rule.final_norm(at["final"]))
    config.logits = _stored(_logits(config, rule))
    config.streams = _stored(rule.streams(at["final"]))
    config.wiring = config.seal()
    _try_out(config)


def _with_qk_norm(attn: ResidualSpec, config: LlmNormConfig, rule: Placement) -> ResidualSpec:
    """Add the norms of `qk_norm`, and muP's scores: divided by head_dim, not by its root."""
    slots, qk_norm = attn.slots(), config.qk_norm_specs()
    own = {slot.removesuffix("_rotated") for slot in slots}
    for slot in sorted(qk_norm):
        if slot.removesuffix("_rotated") in own:
            raise ValueError(f"placement {rule.name} fills slot {slot} itself; set qk_norm to none")
    slots |= qk_norm
    if Parametrization.parse(config.parametrization).name == "mup":
        last = "q_rotated" if "q_rotated" in slots else "q"  # a norm after it would undo it
        slots[last] = slots.get(last, constant(1.0)).scaled(config.head_dim**-0.5)
    return attn.having(**slots)


def _sharing(mlp: ResidualSpec, attn: ResidualSpec) -> ResidualSpec:
    """Let the mlp's shared slots hold what attention's hold, with the options of that site."""
    shared = {slot: getattr(attn, slot) for slot, held in mlp.slots().items() if held.shared}
    return mlp.having(**{slot: replace(held, shared=True) for slot, held in shared.items()})


def _stored(spec: NormSpec | StreamsSpec | None) -> dict[str, Any] | None:
    return None if spec is None else spec.to_dict()


def _logits(config: LlmNormConfig, rule: Placement) -> NormSpec | None:
    """What multiplies the logits: the placement's, and muP's 1/m_d."""
    held = rule.logits(config.hidden_size)
    ratio = Parametrization.parse(config.parametrization).width_ratio(config.hidden_size)
    return held if ratio == 1 else (held or constant(1.0)).scaled(1 / ratio)


def _try_out(config: LlmNormConfig) -> None:
    """Build what each slot holds, and one block, on the meta device: options are checked there."""
    distinct = {(width, json.dumps(spec.to_dict())): spec for spec, width in _held(config)}
    with torch.device("meta"):
        for (width, _), spec in distinct.items():
            spec.build(width)
        block = LlmNormDecoderLayer(config, config.residual_specs()[0], 0)
    mark(block, config, prefix="model.layers.0")


def _held(config: LlmNormConfig) -> list[tuple[NormSpec, int]]:
    """What the filled slots hold, with its width."""
    return [(spec, width) for _, spec, width in promised_slots(config) if spec is not None]


def _warn_if_doubtful(config: LlmNormConfig, rule: Placement, norm: NormSpec) -> None:
    """Log one warning for a scheme that can be built but is not what its papers argue for."""
    doubts = []
    normed = {
        slot
        for pair in config.residual_specs()
        for spec in pair
        for slot, held in spec.slots().items()
        if held.op == norm.op
    }
    if norm.pointwise and normed & {"entry", "inner", "post", "out"}:
        doubts.append(
            f"{norm.op} bounds features but does not normalize them, as {rule.name} assumes"
        )
    if norm.pointwise and EmbeddingSpec.parse(config.embedding).treatment == "raw":
        doubts.append(f"{norm.op} is starved by a raw embedding; use embedding 'scale'")
    if rule.name == "lns" and InitSpec.parse(config.init).policy != "plain":
        doubts.append(
            "lns wants plain init; damped output projections add nothing and cost a little"
        )
    if doubts:
        logger.warning("doubtful scheme %s + %s: %s", rule.name, norm.op, "; ".join(doubts))
