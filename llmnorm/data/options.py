"""What to make of a source."""

from dataclasses import dataclass

from ..errors import ConfigError

DEFAULT_VOCAB_SIZE = 4096


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What to make of a source.

    Attributes:
        tokenizer: folder, file or hub name of a tokenizer; None trains one on the train split.
        vocab_size: entries of a trained tokenizer; None is 4096.
        val_fraction: share of documents held out, at most one half; see `splitting.py`.
        max_tokens: stop before the document that would pass this number; None takes all.
        shard_tokens: tokens after which a shard is closed.
    """

    tokenizer: str | None = None
    vocab_size: int | None = None
    val_fraction: float = 0.05
    max_tokens: int | None = None
    shard_tokens: int = 1 << 27

    def __post_init__(self) -> None:
        if self.tokenizer and self.vocab_size:
            raise ConfigError("--tokenizer and --vocab-size exclude each other: give one")
        if not 0 < self.val_fraction <= 0.5:
            raise ConfigError(f"--val-fraction {self.val_fraction} is not in (0, 0.5]")
        for name in ("max_tokens", "shard_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} is not a positive number")
