"""What a class's config and llmnorm's share, and settings that llmnorm does not have."""

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

if TYPE_CHECKING:
    from llmnorm.export.hosts.base import Host

_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "tie_word_embeddings"),
    *("attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"),
)


def shape_fields(host: "Host") -> list[str]:
    """Our config fields that the class has too."""
    return [name for name in _SHARED if host.has(name)]


def check_settings(host: "Host", config: PreTrainedConfig) -> None:
    """Demand of a class's config what llmnorm has.

    Raises:
        ValueError: naming the first setting that it does not have, and its value.
    """
    known: Any = config
    for name, only in host.fixed.items():
        seen = getattr(known, name, only)
        if seen != only and (seen or only):  # None and False are one
            raise ValueError(
                f"{name} is {seen!r}; llmnorm has nothing like it (only {name}={only!r} comes in)"
            )
    act = getattr(known, host.renamed.get("hidden_act", "hidden_act"))
    if act not in ACT2FN:
        raise ValueError(f"the activation is {act!r}; llmnorm has no such")
    _check_windows(known)


def check_default_rope(rope: Any) -> float:
    """Return RoPE's base, of a config's `rope_parameters`.

    Raises:
        ValueError: for a scaled or partial RoPE, which llmnorm does not have.
    """
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind != "default":
        raise ValueError(f"rope_type is {kind!r}; llmnorm has 'default' alone (no scaled RoPE)")
    if part not in (None, 1):
        raise ValueError(f"partial_rotary_factor is {part}; llmnorm turns whole heads (1.0)")
    return float(rope["rope_theta"])


def _check_windows(config: Any) -> None:
    """Windows that reach over the whole context are none."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise ValueError(f"layer_types has {other[0]}; llmnorm has full_attention alone")
    short = window is not None and window < config.max_position_embeddings
    if "sliding_attention" in kinds and short:
        raise ValueError(
            f"sliding_window is {window}, shorter than the context of "
            f"{config.max_position_embeddings}; llmnorm attends to all of it"
        )
