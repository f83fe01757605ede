"""`model.start`: what must hold before a run continues a finished model on its own data.

The folder's config is the model's (`llmnorm/config/start.py` found it), its weights are read by
`weights.py`. Here: vocabulary and end-of-text are those of the data, and a run that continues later
still means the same weights.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmnorm.build import build_config
from llmnorm.config.start import read_config
from llmnorm.data import Mixture
from llmnorm.data.tokenizer import saved_tokenizer
from llmnorm.durable import sha256_of
from llmnorm.errors import CheckpointError, ConfigError
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig

logger = logging.getLogger(__name__)


def started_config(
    folder: Path, *, vocab_size: int, eos_token_id: int | None, seq_len: int
) -> LlmNormConfig:
    """Return the config of a model for data of this vocabulary, end-of-text (None: any) and length.

    More positions than the model had are allowed, with a notice, where they are not learned.

    Raises:
        ConfigError: if the model has too few entries, or ends its documents with another token.
    """
    try:
        config = read_config(folder)
    except ValueError as error:
        raise ConfigError(f"model.start={folder}: {error}") from error
    if config.residuals is None:
        config = build_config(folder, norm=config.norm, placement=config.placement)
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"model.start={folder} has a vocabulary of {config.vocab_size}, the data {vocab_size}; "
            f"prepare the data with its tokenizer: llmnorm data prepare --tokenizer {folder}"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if eos_token_id is not None and ends != [None] and eos_token_id not in ends:
        raise ConfigError(
            f"model.start={folder} ends a text with token {ends[0]}, the data with {eos_token_id}; "
            f"prepare the data with its tokenizer: llmnorm data prepare --tokenizer {folder}"
        )
    if config.max_position_embeddings < seq_len:
        if config.position == "learned":
            raise ConfigError(
                f"model.start={folder} has learned {config.max_position_embeddings} positions, "
                f"data.seq_len is {seq_len}; make it no larger"
            )
        logger.info(
            "model.start=%s has %d positions; data.seq_len=%d makes them as many",
            *(folder, config.max_position_embeddings, seq_len),
        )
        config.max_position_embeddings = seq_len
    config.dtype = None
    return config


def check_tokenizer(folder: Path, data: Mixture, *, key: str = "model.start") -> None:
    """Compare the vocabulary of a model's tokenizer, where it has one, with the data's.

    Raises:
        ConfigError: naming a token that has another id.
        CheckpointError: if the model's tokenizer cannot be loaded.
    """
    if not (folder / "tokenizer.json").is_file():
        logger.warning("%s=%s has no tokenizer.json to compare with the data's", key, folder)
        return
    try:
        model = saved_tokenizer(folder).get_vocab()
    except Exception as error:  # of many kinds, from transformers, the parser, the file system
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise CheckpointError(f"{key}={folder}: its tokenizer cannot be loaded: {reason}") from None
    for token, index in data.tokenizer().get_vocab().items():
        if model.get(token) != index:
            raise ConfigError(
                f"{key}={folder} has another tokenizer than the data ({token!r:.40} is "
                f"{model.get(token, 'unknown')} and {index}); prepare the data with it: "
                f"llmnorm data prepare --tokenizer {folder}"
            )


def describe_weights(folder: Path) -> dict[str, str]:
    """Return the path and one SHA-256 over all safetensors files of a model's folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return {"path": str(folder), "sha256": digest.hexdigest()}


def check_same_weights(facts: Mapping[str, Any], folder: Path, *, key: str, run: Path) -> None:
    """Refuse to continue a run whose weights to start from were replaced; gone is no matter.

    Args:
        facts: what `describe_weights` said when the run began.
        folder: the folder named now.
        key: of the run file.
        run: the run directory.

    Raises:
        CheckpointError: naming both.
    """
    if not any(folder.glob("*.safetensors")):
        return
    now = describe_weights(folder)["sha256"]
    if now != facts["sha256"]:
        raise CheckpointError(
            f"{run} began with other weights than {key}={folder} has now (SHA-256 "
            f"{facts['sha256'][:12]}, now {now[:12]}); restore them, or choose another output.dir"
        )
