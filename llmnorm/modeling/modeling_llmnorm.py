"""The model: embedding, blocks of two residual lines, final norm, head. A citizen of transformers
5.

Everything scheme-specific is data in `configuration_llmnorm.py`; nothing here asks which scheme
runs.
"""

import math
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import Attention, AttentionCore
from .configuration_llmnorm import EmbeddingSpec, LlmNormConfig
from .gains import EmbeddingScale
from .initialization import embedding_std, mark, start
from .mlp import MLPS
from .operations import compute_dtype
from .positions import POSITIONS, build_positions
from .residual import ResidualSpec, build_residual, build_slot
from .rotary import rotary_table
from .streams import build_streams
from .travel import foreign_sources, write_sources
from .weights import WeightSpec, build_head


def embedding_scale(spec: EmbeddingSpec, config: LlmNormConfig) -> nn.Module:
    """The learned scalar that an embedding treatment `scale` asks for, else identity."""
    if spec.treatment != "scale":
        return nn.Identity()
    std = embedding_std(config) * math.sqrt(1 + POSITIONS[config.position].learned)
    return EmbeddingScale({"unit_rms": 1 / std, "sqrt_dim": config.hidden_size**0.5}[spec.init])


class LlmNormDecoderLayer(GradientCheckpointingLayer):
    """One block: attention, then mlp, each joined to the stream by its `Residual`."""

    def __init__(
        self, config: LlmNormConfig, specs: tuple[ResidualSpec, ResidualSpec], layer_idx: int
    ) -> None:
        super().__init__()
        attn, mlp = specs
        self.attn_residual = build_residual(attn, config.hidden_size)
        self.self_attn = Attention(config, attn, layer_idx)
        self.mlp_residual = build_residual(mlp, config.hidden_size, block=self)
        self.mlp = MLPS[config.mlp](config, mlp)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        h = self.attn_residual(x, x, self.self_attn, **kwargs)
        return self.mlp_residual(h, x, self.mlp)


class LlmNormPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about every llmnorm model."""

    config_class = LlmNormConfig
    config: LlmNormConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlmNormDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012 (transformers declares it as a plain dict)
        "hidden_states": LlmNormDecoderLayer,
        "attentions": OutputRecorder(AttentionCore, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            start(module, std=self.config.initializer_range)
        elif (reset := getattr(module, "reset_parameters", None)) is not None:
            reset()  # an operation, or the embedding's scale; not by class: there may be two copies

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; norms registered outside llmnorm travel along (`travel.py`)."""
        sources = foreign_sources(self)
        super().save_pretrained(save_directory, *args, **kwargs)
        write_sources(sources, Path(save_directory))


def close_hidden_states(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let the recorded hidden states be closed: one (batch, seq, hidden) for any streams."""

    @wraps(forward)
    def closing(self: Any, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        outputs = forward(self, *args, return_dict=True, **kwargs)
        if outputs.hidden_states is not None:
            *states, last = outputs.hidden_states  # the last one is closed and normalized already
            outputs.hidden_states = (*map(self.streams.close, states), last)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if as_dict else outputs.to_tuple()

    return closing


class LlmNormModel(LlmNormPreTrainedModel):
    """The trunk: token embedding, learned positions if any, their treatment, blocks, final norm.

    Raises:
        ValueError: if the config's wiring cannot be (see `LlmNormConfig.residual_specs`).
    """

    def __init__(self, config: LlmNormConfig) -> None:
        super().__init__(config)
        config.check()
        embedding = config.embedding_spec()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = build_positions(config)
        self.embedding_scale = embedding_scale(embedding, config)
        self.embedding_norm = build_slot(embedding.norm, config.hidden_size)
        self.layers = nn.ModuleList(
            LlmNormDecoderLayer(config, specs, layer_idx)
            for layer_idx, specs in enumerate(config.residual_specs())
        )
        self.streams = build_streams(config.streams_spec(), config.hidden_size)
        self.norm = build_slot(config.final_norm_spec(), config.hidden_size)
        self.gradient_checkpointing = False
        mark(self, config, prefix="model")
        self.post_init()

    @close_hidden_states
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids (batch, seq), or embeddings (batch, seq, hidden), to hidden states.

        `inputs_embeds` stands for the embedding table's output: learned positions, the scale or the
        norm are still applied.
        Position ids that start again within a row keep attention inside each document.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        positions = position_ids
        if positions is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            positions = (torch.arange(x.shape[1], device=x.device) + seen).unsqueeze(0)
        x = self.embed_positions(x, positions, cached=past_key_values is not None)
        x = self.embedding_norm(self.embedding_scale(x))
        # Before a cache is made, which would hide where documents start. Positions that nobody gave
        # are not searched for them: the search waits for the device.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        rotary = rotary_table(
            positions,
            head_dim=self.config.head_dim,
            theta=self.config.rope_parameters["rope_theta"],
            dtype=x.dtype,
        )
        x = self.streams.open(x)
        for layer in self.layers:
            x = layer(
                x,
                rotary=rotary,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(self.streams.close(x)), past_key_values=past_key_values
        )


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Mean cross entropy in nats of each token's successor, in float32 or higher.

    Shape: logits are (batch, seq, vocab), labels (batch, seq); labels are shifted here.

    Args:
        num_items_in_batch: divisor when a batch is split over calls; default: the targets counted.
    """
    logits = logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten().to(logits.device)
    total = cross_entropy(
        logits.to(compute_dtype(logits)), targets, ignore_index=ignore_index, reduction="sum"
    )
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


class LlmNormForCausalLM(LlmNormPreTrainedModel, GenerationMixin):
    """The trunk with a linear head on top."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: LlmNormConfig) -> None:
        super().__init__(config)
        self.model = LlmNormModel(config)
        self.lm_head = build_head(config)
        self.logits = build_slot(config.logits_spec(), config.vocab_size)
        mark(self.lm_head, config, prefix="lm_head")
        self.post_init()

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., hidden) after the final norm to logits (..., vocab)."""
        return self.logits(self.lm_head(hidden_states))

    @torch.no_grad()
    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; gains of the logits follow, new rows get the length `weights` asks.

        Gains of new entries start as those of a fresh model.
        """
        before = self.model.embed_tokens.num_embeddings
        table = super().resize_token_embeddings(*args, **kwargs)
        if table.num_embeddings == before:
            return table
        if WeightSpec.parse(self.config.weights).kind == "unit":
            for matrix in {table.weight, self.lm_head.weight}:  # one, if tied
                matrix[before:] /= matrix[before:].norm(dim=1, keepdim=True)
        old, logits = self.logits, build_slot(self.config.logits_spec(), table.num_embeddings)
        logits.to(table.weight.device, table.weight.dtype).train(self.training)
        for parameter, kept in zip(logits.parameters(), old.parameters(), strict=True):
            shared = min(len(parameter), len(kept))
            parameter[:shared] = kept[:shared]
            parameter.requires_grad_(kept.requires_grad)
        self.logits = logits
        return table

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids (batch, seq) to logits (batch, seq, vocab) and, with labels, the mean loss.

        Args:
            labels: token ids, shifted here; -100 is no target.
            logits_to_keep: compute the logits of the last so many positions (0: all), or of these.
            num_items_in_batch: divisor of the loss; default: the targets of this call.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.compute_logits(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = causal_lm_loss(logits, labels, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


LlmNormConfig.register_for_auto_class()
LlmNormModel.register_for_auto_class("AutoModel")
LlmNormForCausalLM.register_for_auto_class("AutoModelForCausalLM")
