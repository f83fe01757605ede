"""The wiring of a model with another norm, and the slots in which that differs.

Everything but the norm stays: shape, placement, embedding, how matrices are held.
"""

from collections.abc import Callable, Mapping
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


def _shape(config: LlmNormConfig) -> dict[str, Any]:
    """Everything of a config that is no wiring."""
    shape = {
        name: getattr(config, name)
        for name in LlmNormConfig.__annotations__
        if name not in _RESOLVED and name != "model_type"
    }
    embedding = config.embedding_spec()
    if embedding.norm is not None:
        shape["embedding"] = {"treatment": "norm", "norm": embedding.norm.to_dict()}
    return shape


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
    if config.placement is not None:
        with without_warnings():  # of starts, which are fitted here
            return build_config(_shape(config), norm=norm, placement=config.placement)
    asked, hidden = NormSpec.parse(norm), config.hidden_size

    def instead(site: str, held: NormSpec) -> NormSpec:
        found = asked.at(kind_of(site), hidden)
        scale = held.options.get("scale", 1.0)
        return found if scale == 1.0 else found.scaled(scale)

    return with_slots(config, instead)


def with_slots(
    config: LlmNormConfig, instead: Callable[[str, NormSpec], NormSpec]
) -> LlmNormConfig:
    """Return the config, as a wiring made by hand, with each norm that can be replaced replaced.

    Args:
        config: of the model that is converted.
        instead: gives what stands in place of a norm, from its module's name and what it holds.
    """

    def layer(index: int, kind: str, spec: ResidualSpec) -> dict[str, Any]:
        slots = {}
        for slot, held in spec.slots().items():
            if held.op in NORMS and slot in (*RESIDUAL_SLOTS, "inner"):
                site = f"model.layers.{index}.{_owner(kind, slot)}.{slot}"
                slots[slot] = replace(instead(site, held), shared=held.shared)
        return spec.having(**slots).to_dict()

    final, logits, streams = config.final_norm_spec(), config.logits_spec(), config.streams_spec()
    if final is not None and final.op in NORMS:
        final = instead("model.norm", final)
    return LlmNormConfig(
        **{
            **_shape(config),
            "qk_norm": "none",
            "norm": None,
            "placement": None,
            "residuals": [
                {"attn": layer(i, "attn", attn), "mlp": layer(i, "mlp", mlp)}
                for i, (attn, mlp) in enumerate(config.residual_specs())
            ],
            "final_norm": None if final is None else final.to_dict(),
            "logits": None if logits is None else logits.to_dict(),
            "streams": None if streams is None else streams.to_dict(),
        }
    )


def _owner(kind: str, slot: str) -> str:
    if slot == "inner":
        return "self_attn" if kind == "attn" else "mlp"
    return f"{kind}_residual"


def kind_of(site: str) -> str:
    """Return the kind of site that a module's name tells: attn, mlp or final."""
    if ".layers." not in site:
        return "final"
    return "mlp" if ".mlp_residual." in site or ".mlp." in site else "attn"


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
