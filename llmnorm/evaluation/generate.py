"""Continue a text with a trained model: what the losses mean, to read."""

import math
from typing import Any

import torch

from llmnorm.errors import CheckpointError, ConfigError
from llmnorm.evaluation.loading import Loaded

_LEAST_TEMPERATURE = 1e-6  # below it, logits divided by the temperature leave fp32
_SEEDS = range(-(2**63), 2**64)  # what torch.manual_seed takes


def continue_text(
    loaded: Loaded,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Return the continuation alone; it ends at end-of-text or after `max_new_tokens`.

    An llmnorm model sees end-of-text before the prompt, as in training; others see what their
    tokenizer adds. The global random state is left as it was.

    Args:
        loaded: a model with its tokenizer.
        prompt: may be empty.
        max_new_tokens: limit of the continuation.
        temperature: divides the logits; 0 takes the likeliest token every time.
        top_k: sample among this many likeliest tokens; 0 is off.
        top_p: sample among the likeliest tokens of this total probability; 1 is off.
        seed: of the sampling.

    Raises:
        ConfigError: a setting out of range, no token to begin with, or too long for the model.
        CheckpointError: the model gives no probabilities, as with weights that are not finite.
    """
    _check(prompt, max_new_tokens, temperature, top_k, top_p, seed)
    tokenizer = loaded.require_tokenizer()
    model: Any = loaded.model  # the mixin that generates is not in the type
    ids = _prompt_ids(loaded, prompt)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and len(ids) + max_new_tokens > positions:
        raise ConfigError(
            f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the model's"
            f" {positions} positions; use at most {max(0, positions - len(ids))} new tokens"
        )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    inputs = torch.tensor([ids], device=model.device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        _check_logits(loaded, model(inputs).logits)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    before, whole = (
        str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in (ids, output[0])
    )
    return whole.removeprefix(before)


def _check_logits(loaded: Loaded, logits: torch.Tensor) -> None:
    if not logits[:, -1].float().logsumexp(-1).isfinite().all():
        raise CheckpointError(
            f"{loaded.source.name}: the model's logits are not finite;"
            " expected sound weights: use an earlier checkpoint, or --dtype fp32"
        )


def _check(
    prompt: str, max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    if not prompt.isascii() and prompt.encode(errors="replace").decode() != prompt:
        raise ConfigError(
            f"the prompt {prompt!a} holds bytes that are no text here; expected UTF-8"
        )
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if temperature != 0 and not _LEAST_TEMPERATURE <= temperature < math.inf:
        raise ConfigError(
            f"temperature is {temperature}; expected 0 (greedy) or {_LEAST_TEMPERATURE} and more"
        )
    if seed not in _SEEDS:
        raise ConfigError(f"seed is {seed}; expected -2**63 to 2**64 - 1")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            f"top_k is {top_k} and top_p {top_p}; expected top_k >= 0, 0 < top_p <= 1"
        )


def _prompt_ids(loaded: Loaded, prompt: str) -> list[int]:
    tokenizer = loaded.require_tokenizer()
    ids: list[int] = tokenizer.encode(prompt)
    is_ours = loaded.model.config.model_type == "llmnorm"
    begin = tokenizer.eos_token_id if is_ours else tokenizer.bos_token_id
    begin = tokenizer.eos_token_id if begin is None else begin
    if begin is not None and ((is_ours and ids[:1] != [begin]) or not ids):
        ids = [begin, *ids]
    if not ids:
        raise ConfigError("an empty prompt needs a tokenizer with an end-of-text token; write one")
    return ids
