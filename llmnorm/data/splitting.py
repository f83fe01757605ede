"""Which documents are validation: decided from a document's number alone, while reading.

Of every k = round(1 / fraction) documents in a row one is held out, named by a hash of the row's
number; in the first row it is the first document, so that two documents suffice for both splits.
A corpus of a single document is cut by position instead.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

from .sources import Document


def split_rule(val_fraction: float) -> str:
    """The rule in words, for the manifest."""
    every = round(1 / val_fraction)
    return (
        f"by document: one of every {every} non-empty documents in a row, named by BLAKE2b of the "
        f"row's number (the first document in the first row), is validation; a single document is "
        f"cut by position, its last 1/{every} being validation; a source with its own splits "
        "keeps them"
    )


def is_validation(index: int, every: int) -> bool:
    """Whether the non-empty document number ``index`` (0-based) is held out."""
    row, place = divmod(index, every)
    if row == 0:
        return place == 0
    digest = hashlib.blake2b(f"validation|{row}".encode(), digest_size=8).digest()
    return place == int.from_bytes(digest, "little") % every


def assign_splits(
    documents: Iterator[Document], val_fraction: float, start: int = 0
) -> Iterator[list[Document]]:
    """For every source document in order, the pieces to store, each with its split.

    There are two pieces only for a single document. An empty one may stand in either split.

    Args:
        documents: what is left of the source.
        val_fraction: share of documents to hold out, at most one half.
        start: non-empty documents that came before.
    """
    every = round(1 / val_fraction)
    index = start
    held: list[Document] = []  # until it is known that the first document is not a single one
    for document in documents:
        if index == 0 or (len(held) and not len(document.content)):
            held.append(document)
        else:
            yield from ([_placed(one, 0, every)] for one in held)
            held = []
            yield [_placed(document, index, every)]
        index += len(document.content) > 0
    for one in held:
        yield _cut(one, every) if len(one.content) and not one.split else [_placed(one, 0, every)]


def _placed(document: Document, index: int, every: int) -> Document:
    split = document.split or ("val" if is_validation(index, every) else "train")
    return Document(document.content, split)


def _cut(document: Document, every: int) -> list[Document]:
    content = document.content
    border = max(len(content) - max(len(content) // every, 1), 1)
    if isinstance(content, np.ndarray):
        return [Document(content[:border], "train"), Document(content[border:], "val")]
    line = (
        content.rfind("\n", border // 2, border) + 1
    )  # rather between lines, if there is one near
    border = line or border
    return [Document(content[:border], "train"), Document(content[border:], "val")]
