"""Prepared folders read together, each with a weight; one folder is a mixture of one.

The weights are shares of the training sequences (`interleaving.py`). Every folder keeps an order
and epochs of its own: a small one with a large weight is repeated more often.
"""

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..errors import DataError
from .interleaving import Interleaving
from .prepared import Prepared, Split, open_prepared
from .tokenizer import tokenizer_hash


def open_mixture(sources: Sequence[tuple[Path, float]], verify: bool = True) -> "Mixture":
    """Open prepared folders that were made with one tokenizer.

    Args:
        sources: folder and weight of each.
        verify: compare every file's SHA-256 with its manifest, and the tokenizers.

    Raises:
        DataError: a folder is missing or damaged, is named twice, or has another tokenizer.
    """
    folders = [open_prepared(path, verify) for path, _ in sources]
    first, fingerprints = folders[0], [folder.fingerprint for folder in folders]
    for i, folder in enumerate(folders):
        if (same := fingerprints.index(folder.fingerprint)) < i:
            raise DataError(
                f"data.mix names {folders[same].path} and {folder.path}, which hold the same data; "
                "name it once, with the sum of the weights"
            )
        if _tokenizer_of(folder, verify) != _tokenizer_of(first, verify):
            raise DataError(
                f"data.mix: {folder.path} was made with another tokenizer than {first.path}; make "
                f"it again by llmnorm data prepare --tokenizer {first.path}"
            )
    return Mixture(folders, [Fraction(str(weight)) for _, weight in sources])


def _tokenizer_of(folder: Prepared, whole: bool) -> tuple[int, int, str]:
    what = tokenizer_hash(folder.tokenizer()) if whole else ""
    return folder.vocab_size, folder.eos_token_id, what


class Mixture:
    """Prepared folders with their weights. Made by `open_mixture`.

    Attributes:
        folders: in the order of the run file.
        weights: fractions that add up to 1.
        place: the folders' paths, for messages.
        fingerprint: of a single folder its own, else of all folders and weights.
    """

    def __init__(self, folders: Sequence[Prepared], weights: Sequence[Fraction]) -> None:
        self.folders = list(folders)
        self.weights = [weight / sum(weights) for weight in weights]
        self.vocab_size, self.eos_token_id = folders[0].vocab_size, folders[0].eos_token_id
        self.place = " + ".join(str(folder.path) for folder in folders)
        self.fingerprint = folders[0].fingerprint
        if len(folders) > 1:
            pairs = zip(self.folders, self.weights, strict=True)
            lines = "".join(f"{folder.fingerprint}  {weight}\n" for folder, weight in pairs)
            self.fingerprint = hashlib.sha256(lines.encode()).hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that the tokens of all folders were made with."""
        return self.folders[0].tokenizer()

    def train(self) -> list[Split]:
        """The train split of every folder."""
        return [folder.split("train") for folder in self.folders]

    def validation_documents(
        self, most: int | None = None
    ) -> Iterator[tuple[np.ndarray, int]] | None:
        """(tokens without end-of-text (length,) int64, UTF-8 bytes) of validation documents.

        Args:
            most: so many, shared among the folders by weight; None gives all.

        Returns:
            None when no folder holds anything to score.
        """
        parts = [
            (folder.split("val"), weight)
            for folder, weight in zip(self.folders, self.weights, strict=True)
            if "val" in folder.manifest.splits
        ]
        parts = [part for part in parts if part[0].tokens > part[0].documents]  # has text
        if not parts:
            return None
        limits: Sequence[int | None] = [None] * len(parts)
        if most is not None:
            limits = Interleaving([weight for _, weight in parts]).counts(most)
        return chain.from_iterable(
            split.documents_for_scoring(limit)
            for (split, _), limit in zip(parts, limits, strict=True)
        )
