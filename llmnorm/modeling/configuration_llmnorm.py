"""The configuration: the shape of a Llama, and the wiring of its norms.

`norm`, `placement` and `qk_norm` say what was asked for; `residuals`, `final_norm`, `logits` and
`streams` say what that resolved to, and are what the model is built from. `wiring` seals the two:
editing one without the other raises at construction instead of being ignored. With `placement=None`
the residuals stand alone (a hand-made wiring). Without residuals the wiring is Pre-LN with `norm`,
the one placement that needs no rule; presets hold shapes only and rely on it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .initialization import InitSpec
from .lerp import Lerp  # noqa: F401 (enters the residual modules)
from .operations import check_kind, check_positive, read_choice
from .parametrization import Parametrization
from .positions import POSITIONS
from .residual import ATTENTION_SLOTS, RESIDUALS, NormSpec, ResidualSpec, parse_layer
from .reuse import ReusedMeanSquare  # noqa: F401 (enters the residual modules)
from .streams import StreamsSpec
from .weights import WeightSpec

EMBEDDINGS = ("raw", "scale", "norm")
SCALE_INITS = ("unit_rms", "sqrt_dim")
QK_NORMS = ("none", "per_head", "full_width")


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpec:
    """The config field `embedding`: what happens between the embedding and the first block.

    `raw` nothing; `scale` one learned scalar, initially 1/std of the embedding (`unit_rms`, ours:
    the stream starts at RMS 1) or sqrt(hidden_size) (`sqrt_dim`, the DyT paper's); `norm` a norm.
    Learned positions are part of the embedding that is scaled or normalized.
    """

    treatment: str = "raw"
    init: str = "unit_rms"
    norm: NormSpec | None = None

    @classmethod
    def parse(cls, value: str | Mapping[str, Any]) -> "EmbeddingSpec":
        """Read a treatment's name or a mapping; anything unknown raises ValueError."""
        given = read_choice("embedding", value, "treatment")
        unknown = sorted(set(given) - {"treatment", "init", "norm"}, key=str)
        if unknown:
            raise ValueError(
                f"embedding has no key {unknown[0]!r}; its keys: treatment, init, norm"
            )
        if given.get("norm") is not None:
            given["norm"] = NormSpec.parse_alone("embedding.norm", given["norm"])
        spec = cls(**given)
        _one_of("embedding", spec.treatment, EMBEDDINGS)
        _one_of("embedding.init", spec.init, SCALE_INITS)
        for key, treatment in (("init", "scale"), ("norm", "norm")):
            if key in given and spec.treatment != treatment:
                raise ValueError(f"embedding.{key} is for treatment {treatment!r} alone")
        return spec


class LlmNormConfig(PreTrainedConfig):
    """Configuration of an llmnorm model: the fields of Llama, and those below.

    Args:
        norm: the scheme's norm, `{"op": name, **options}`.
        placement: the scheme's placement, `{"name": name, **options}`; None for hand-made
        residuals.
        residuals: resolved specs, one `{"attn": slots, "mlp": slots}` a layer (`ResidualSpec`).
        final_norm: resolved spec of the norm before the head; None for none.
        logits: resolved spec of what multiplies the logits; None for none.
        streams: resolved spec of a second residual stream (`StreamsSpec`); None for one stream.
        wiring: seal over the fields above and the shape they were resolved for.
        qk_norm: `none`, `per_head` or `full_width`, or `{"layout": ..., "op": ..., **options}`.
        mlp: `gated` or `plain`; with `hidden_act` silu and gated this is SwiGLU, gelu GeGLU.
        position: `rope`, `learned` (a table of `max_position_embeddings` rows, added to the token
        embedding before its treatment, as in GPT-2) or `none`.
        embedding: `raw`, `scale` or `norm`, or a mapping (`EmbeddingSpec`).
        init: name of an init policy, or a mapping (`InitSpec`).
        weights: how matrices are held (`WeightSpec`): plain, weight_norm, unit, project, lawn.
        parametrization: `standard` or `mup` relative to a base model (`Parametrization`).

    Raises:
        ValueError: for a shape or a name that cannot be.
    """

    model_type = "llmnorm"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = None  # type: ignore[assignment]  # num_attention_heads
    head_dim: int = None  # type: ignore[assignment]  # hidden_size / num_attention_heads
    hidden_act: str = "silu"
    mlp: str = "gated"
    position: str = "rope"
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]  # theta 10000
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    norm: Any = "rmsnorm"
    placement: Any = "pre_ln"
    qk_norm: Any = "none"
    embedding: Any = "raw"
    init: Any = "plain"
    weights: Any = "plain"
    parametrization: Any = "standard"
    residuals: list[dict[str, Any]] | None = None
    final_norm: dict[str, Any] | None = None
    logits: dict[str, Any] | None = None
    streams: dict[str, Any] | None = None
    wiring: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if "rms_norm_eps" in kwargs:
            raise ValueError(
                "rms_norm_eps is not read; set it in the norm: {op: rmsnorm, eps: ...}"
            )
        for dtype in (self.dtype, kwargs.get("torch_dtype")):
            held = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
            if dtype is not None and not isinstance(held, torch.dtype):
                raise ValueError(f"dtype is {dtype!r}; expected a torch dtype such as 'bfloat16'")
        if not isinstance(self.rope_parameters, dict | None):
            raise ValueError(f"rope_parameters is {self.rope_parameters!r}; expected a mapping")
        if "rope_theta" in kwargs:
            self.rope_parameters = {**(self.rope_parameters or {})}
            self.rope_parameters["rope_theta"] = kwargs.pop("rope_theta")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_whole("hidden_size", "num_attention_heads")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size="
                f"{self.hidden_size}; give head_dim to mean it"
            )
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "LlmNormConfig":
        """As in transformers, but overrides pass through construction and its checks."""
        own = ({f.name for f in fields(cls)} | {"rope_theta", "rms_norm_eps"}) & set(kwargs)
        return super().from_dict({**config_dict, **{k: kwargs.pop(k) for k in own}}, **kwargs)

    def check(self) -> None:
        """Raise ValueError naming the first field that cannot be; also called by the model."""
        self._check_whole("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        self._check_whole("num_attention_heads", "num_key_value_heads", "head_dim")
        self._check_whole("max_position_embeddings")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        check_positive("initializer_range", self.initializer_range)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            given = getattr(self, name)
            several = isinstance(given, list) and name == "eos_token_id"
            for token in given if several else [given]:
                whole = isinstance(token, int) and not isinstance(token, bool)
                if not (token is None or (whole and 0 <= token < self.vocab_size)):
                    raise ValueError(f"{name} is {token!r}; the vocabulary has {self.vocab_size}")
        _one_of("mlp", self.mlp, ("gated", "plain"))
        _one_of("position", self.position, tuple(POSITIONS))
        _one_of("hidden_act", self.hidden_act, tuple(ACT2FN))
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; RoPE needs an even one")
        self._check_rope()
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache"):
            check_kind(name, getattr(self, name), like=True)
        check_kind("attention_dropout", self.attention_dropout, like=0.0)
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout is {self.attention_dropout!r}; expected 0 to 1")
        InitSpec.parse(self.init)
        EmbeddingSpec.parse(self.embedding)
        WeightSpec.parse(self.weights)
        Parametrization.parse(self.parametrization)

    def _check_whole(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                raise ValueError(
                    f"{name} is {value!r}; expected a whole number of at least 1, below 2^31"
                )

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type is {rope['rope_type']!r}; only 'default' is implemented")
        unknown = sorted(set(rope) - {"rope_type", "type", "rope_theta"}, key=str)
        if unknown:
            raise ValueError(f"rope_parameters.{unknown[0]} is not implemented; only rope_theta is")
        check_positive("rope_parameters.rope_theta", rope["rope_theta"])

    def residual_specs(self) -> list[tuple[ResidualSpec, ResidualSpec]]:
        """The specs of (attention, mlp) of every layer, resolved on use.

        Raises:
            ValueError: if the residuals do not fit the depth or were parted from norm and
            placement.
        """
        if self.residuals is None:
            return [self._default_residuals()] * self.num_hidden_layers
        if not isinstance(self.residuals, list | tuple):
            raise ValueError(f"residuals is {self.residuals!r}; expected a list of layers")
        if len(self.residuals) != self.num_hidden_layers:
            raise ValueError(
                f"residuals describes {len(self.residuals)} layers but num_hidden_layers="
                f"{self.num_hidden_layers}; apply the placement again (llmnorm.build_config)"
            )
        self._check_seal()
        layers = [parse_layer(layer) for layer in self.residuals]
        if self.mlp == "plain" and any(mlp.gate for _, mlp in layers):
            raise ValueError("slot gate is a gated mlp's; mlp is 'plain'")
        streams = 1 if self.streams is None else 2
        for module in {spec.module for pair in layers for spec in pair}:
            if RESIDUALS[module].streams != streams:
                raise ValueError(
                    f"residual module {module} joins {RESIDUALS[module].streams} stream(s), but "
                    f"the config opens {streams}; `streams` and the residuals belong together"
                )
        return layers

    def final_norm_spec(self) -> NormSpec | None:
        """The norm before the head, or None."""
        if self.residuals is None:
            return NormSpec.parse_alone("norm", self.norm).at("final", self.hidden_size)
        given = self.final_norm
        return None if given is None else NormSpec.parse_alone("final_norm", given)

    def logits_spec(self) -> NormSpec | None:
        """What multiplies the logits, or None."""
        return None if self.logits is None else NormSpec.parse_alone("logits", self.logits)

    def streams_spec(self) -> StreamsSpec | None:
        """The second residual stream, or None."""
        return None if self.streams is None else StreamsSpec.parse(self.streams)

    def embedding_spec(self) -> EmbeddingSpec:
        """The treatment of the embedding; its norm defaults to the scheme's."""
        spec = EmbeddingSpec.parse(self.embedding)
        if spec.treatment != "norm":
            return spec
        norm = self.norm if spec.norm is None else spec.norm
        if norm is None:
            raise ValueError("embedding is 'norm' without a norm: {treatment: norm, norm: ...}")
        return replace(spec, norm=NormSpec.parse_alone("norm", norm).at("final", self.hidden_size))

    def qk_norm_specs(self) -> dict[str, NormSpec]:
        """The slots that `qk_norm` fills and their norms; none for layout `none`.

        `{layout, op, **options}` may say `rope: after` to act after RoPE (per head alone) and
        `value: true` for a norm on values too (QKV-norm, HybridNorm).
        """
        given = read_choice("qk_norm", self.qk_norm, "layout")
        layout = given.pop("layout", "none")
        _one_of("qk_norm", layout, QK_NORMS)
        if layout == "none":
            if given:
                raise ValueError(
                    f"qk_norm has options {sorted(given, key=str)} but its layout is 'none'"
                )
            return {}
        rope, value = given.pop("rope", "before"), given.pop("value", False)
        _one_of("qk_norm.rope", rope, ("before", "after"))
        check_kind("qk_norm.value", value, like=False)
        norm = NormSpec.parse_alone("qk_norm", {"op": "rmsnorm", **given})
        norm = norm.at("attn", self.hidden_size)
        if rope == "after" and layout != "per_head":
            raise ValueError(f"qk_norm after RoPE is per head; its layout is {layout!r}")
        turned = "_rotated" if rope == "after" else ""
        held = {f"{slot}{turned}": norm for slot in "qk"} | ({"v": norm} if value else {})
        per_head = layout == "per_head"
        return {
            slot: replace(norm, per_head=per_head and slot in ("q", "k", "v"))
            for slot, norm in held.items()
        }

    def seal(self) -> str:
        """Digest of what was asked for, what it resolved to, and the shape it was resolved for."""
        asked = ("norm", "placement", "qk_norm", "parametrization")
        resolved = ("residuals", "final_norm", "logits", "streams")
        shape = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        content = json.dumps(
            [getattr(self, name) for name in asked + resolved + shape], sort_keys=True
        )
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _check_seal(self) -> None:
        if self.placement is None:
            if self.norm is not None or self.qk_norm not in (None, "none"):
                raise ValueError(
                    "placement is null, so residuals alone describe the wiring; "
                    "norm must be null and qk_norm 'none' then"
                )
        elif self.wiring != self.seal():
            raise ValueError(
                "norm, placement, qk_norm, parametrization or the width no longer fit the resolved "
                "residuals; apply the placement again (llmnorm.build_config), or set placement, "
                "norm and qk_norm to null to keep hand-made residuals"
            )

    def _default_residuals(self) -> tuple[ResidualSpec, ResidualSpec]:
        if self.placement not in ("pre_ln", {"name": "pre_ln"}) or self.final_norm is not None:
            raise ValueError(
                f"placement {self.placement!r} has no residuals; make the config with "
                "llmnorm.build_config"
            )
        for name in ("logits", "streams"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is for resolved residuals, and residuals is null")
        if Parametrization.parse(self.parametrization).name != "standard":
            raise ValueError(
                "parametrization is resolved with the residuals, and residuals is null"
            )
        norm = NormSpec.parse_alone("norm", self.norm)
        return (
            ResidualSpec(pre=norm.at("attn", self.hidden_size)).having(**self.qk_norm_specs()),
            ResidualSpec(pre=norm.at("mlp", self.hidden_size)),
        )

    @property
    def base_model_tp_plan(  # type: ignore[override]
        self,
    ) -> dict[str, str]:
        """Tensor-parallel plan; projections around a norm over a sharded axis are gathered.

        Weight normalization reads whole rows, so such a model is not split.
        """
        if WeightSpec.parse(self.weights).kind == "weight_norm":
            return {}
        specs = self.residual_specs()
        attn = any(
            slot == "inner" or not held.per_head
            for spec, _ in specs
            for slot, held in spec.slots().items()
            if slot in (*ATTENTION_SLOTS, "inner")
        )
        mlp = any({"gate", "up", "inner"} & set(spec.slots()) for _, spec in specs)
        attn_in, attn_out = _SHARDED if not attn else _GATHERED
        mlp_in, mlp_out = _SHARDED if not mlp else _GATHERED
        plan = {f"layers.*.self_attn.{p}_proj": attn_in for p in "qkv"}
        plan["layers.*.self_attn.o_proj"] = attn_out
        plan |= {f"layers.*.mlp.{p}_proj": mlp_in for p in ("gate", "up")}
        plan["layers.*.mlp.down_proj"] = mlp_out
        if self.mlp == "plain":
            del plan["layers.*.mlp.gate_proj"]
        return plan

    @property
    def base_model_pp_plan(  # type: ignore[override]
        self,
    ) -> dict[str, tuple[list[str], list[str]]]:
        """Pipeline plan: the parts in order, with what each reads and gives; none of two streams.

        Servers drop what stands before the layers on all stages but the first, and what stands
        after them on all but the last.
        """
        if self.streams is not None:
            return {}
        embedding = ("embed_positions", "embedding_scale", "embedding_norm")
        return {
            "embed_tokens": (["input_ids"], ["inputs_embeds"]),
            **{name: (["inputs_embeds"], ["inputs_embeds"]) for name in embedding},
            "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
            "norm": (["hidden_states"], ["hidden_states"]),
        }


_SHARDED = ("colwise", "rowwise")
_GATHERED = ("colwise_gather_output", "rowwise_split_input")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
