"""The wiring of a model with another norm, and the slots in which that differs.

Everything but the norm stays: shape, placement, embedding, how matrices are held.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from llmnorm.build import build_config
from llmnorm.config.choices import without_warnings
from llmnorm.errors import ConfigError
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.modeling.residual import RESIDUAL_SLOTS, NormSpec, ResidualSpec
from llmnorm.selftest import promised_slots

NORMS = ("rmsnorm", "layernorm")
"""What may be replaced: the norms that divide a token by its own size."""

_RESOLVED = ("residuals", "final_norm", "logits", "streams", "wiring", "norm", "placement")


def rewired(config: LlmNormConfig, norm: Mapping[str, Any]) -> LlmNormConfig:
    """Return the config with another norm: by its placement's rule, or in the slots themselves.

    Norms of queries, keys and values stay, unless the placement puts the scheme's norm there; so
    does the embedding's, which is a part of the table.

    Args:
        config: of the model that is converted.
        norm: `{"op": name, **options}`.

    Raises:
        ConfigError: if the norm or the placement does not allow it.
    """
    shape = {
        name: getattr(config, name)
        for name in LlmNormConfig.__annotations__
        if name not in _RESOLVED and name != "model_type"
    }
    embedding = config.embedding_spec()
    if embedding.norm is not None:
        shape["embedding"] = {"treatment": "norm", "norm": embedding.norm.to_dict()}
    if config.placement is not None:
        with without_warnings():  # of starts, which are fitted here
            return build_config(shape, norm=norm, placement=config.placement)
    return _in_slots(LlmNormConfig(**{**shape, **_wiring(config)}), NormSpec.parse(norm))


def _wiring(config: LlmNormConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _RESOLVED if name != "wiring"}


def _in_slots(config: LlmNormConfig, norm: NormSpec) -> LlmNormConfig:
    """Replace the norms of a wiring made by hand, whose seal is made anew."""
    hidden = config.hidden_size

    def instead(spec: NormSpec, kind: str) -> NormSpec:
        found = norm.at(kind, hidden)
        scale = spec.options.get("scale", 1.0)
        return replace(found if scale == 1.0 else found.scaled(scale), shared=spec.shared)

    def sublayer(spec: ResidualSpec, kind: str) -> ResidualSpec:
        slots = {
            slot: instead(held, kind)
            for slot, held in spec.slots().items()
            if held.op in NORMS and slot in (*RESIDUAL_SLOTS, "inner")
        }
        return spec.having(**slots)

    config.residuals = [
        {"attn": sublayer(attn, "attn").to_dict(), "mlp": sublayer(mlp, "mlp").to_dict()}
        for attn, mlp in config.residual_specs()
    ]
    final = config.final_norm_spec()
    if final is not None and final.op in NORMS:
        config.final_norm = instead(final, "final").to_dict()
    config.wiring = config.seal()
    return config


def changed_sites(before: LlmNormConfig, after: LlmNormConfig) -> list[str]:
    """Return the names of the modules that another operation takes the place of, in order.

    Raises:
        ConfigError: if there is none, or one is no norm that can be replaced.
    """
    changed = []
    slots = zip(promised_slots(before), promised_slots(after), strict=True)
    for (name, old, _), (_, new, _) in slots:
        if old is None or new is None or old.op == new.op or old.shared:
            continue
        if old.op not in NORMS:
            raise ConfigError(f"{name} holds {old.op}; expected one of {', '.join(NORMS)}")
        changed.append(name)
    if not changed:
        raise ConfigError(
            f"there is nothing to convert: the model has no {' or '.join(NORMS)} to replace"
        )
    return changed


@torch.no_grad()
def with_weights_of(model: LlmNormForCausalLM, config: LlmNormConfig) -> LlmNormForCausalLM:
    """Return a model of another wiring with the parameters that both have by name."""
    weights = dict(model.named_parameters())
    like = next(iter(weights.values()))
    converted = LlmNormForCausalLM(config)
    converted.to(like.device, like.dtype)  # type: ignore[arg-type]  # a decorator hides the types
    for name, parameter in converted.named_parameters():
        if name in weights and weights[name].shape == parameter.shape:
            parameter.copy_(weights[name])
    return converted.eval()
