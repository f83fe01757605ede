"""Several prepared folders make one stream with exact shares, the same in any world."""

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from llmnorm.data import (
    GlobalBatches,
    Mixture,
    Prepared,
    PrepareOptions,
    SampleOrder,
    open_mixture,
    prepare,
)
from llmnorm.data.batches import samples_in
from llmnorm.data.sources import Text
from llmnorm.errors import DataError

from .conftest import make_documents

SEQ_LEN = 16


@pytest.fixture(scope="module")
def other(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A smaller folder with the same tokenizer and other text."""
    folder = tmp_path_factory.mktemp("other")
    text = "\n\n".join(document.upper() for document in make_documents(24))
    (folder / "upper.txt").write_text(text, encoding="utf-8")
    options = PrepareOptions(tokenizer=str(prepared.path), val_fraction=0.2)
    return prepare(Text(folder / "upper.txt", whole_files=False), folder / "p", options)


@pytest.fixture
def mixture(prepared: Prepared, other: Prepared) -> Mixture:
    return open_mixture([(prepared.path, 0.7), (other.path, 0.3)])


def make(mixture: Mixture, **options: object) -> GlobalBatches:
    defaults = {"seq_len": SEQ_LEN, "global_batch_size": 6, "micro_batch_size": 6, "seed": 1}
    defaults |= {"eos_token_id": mixture.eos_token_id, "weights": mixture.weights}
    return GlobalBatches(*mixture.train(), **{**defaults, **options})  # type: ignore[arg-type]


def rows(batches: GlobalBatches, steps: int) -> np.ndarray:
    """(steps * global batch size, seq_len + 1) tokens in the stream's order, on one process."""
    found = [batch for step in range(steps) for batch in batches.step(step)]
    inputs = torch.cat([batch["input_ids"] for batch in found]).numpy()
    last = torch.cat([batch["targets"][:, -1:] for batch in found]).numpy()
    return np.concatenate([inputs, last], axis=1)


def windows(mixture: Mixture, part: int) -> list[bytes]:
    split = mixture.train()[part]
    count = samples_in(split, SEQ_LEN)
    return [split.window(SEQ_LEN * i, SEQ_LEN + 1).tobytes() for i in range(count)]


def test_each_folder_gives_its_share_and_every_sample_once_an_epoch(mixture: Mixture) -> None:
    sizes = [samples_in(split, SEQ_LEN) for split in mixture.train()]
    assert sizes[1] * 5 < sizes[0]  # so that one folder is repeated within an epoch of the other
    found = [row.tobytes() for row in rows(make(mixture), -(-sizes[0] * 10 // 7 // 6))]
    large, small = set(windows(mixture, 0)), set(windows(mixture, 1))
    assert not large & small
    of_large = [row for row in found if row in large]
    of_small = [row for row in found if row in small]
    assert len(of_large) + len(of_small) == len(found)
    assert abs(len(of_small) - Fraction(3, 10) * len(found)) < 1
    assert sorted(of_large[: sizes[0]]) == sorted(windows(mixture, 0))
    epochs = [of_small[i : i + sizes[1]] for i in range(0, len(of_small) - sizes[1], sizes[1])]
    assert len(epochs) >= 2
    for epoch in epochs:
        assert sorted(epoch) == sorted(windows(mixture, 1))
    assert epochs[0] != epochs[1]


@pytest.mark.fast
def test_folders_of_one_size_are_read_in_different_orders() -> None:
    assert [SampleOrder(50, 1, part=0)(i) for i in range(50)] != [
        SampleOrder(50, 1, part=1)(i) for i in range(50)
    ]
    assert SampleOrder(50, 1, part=0)(7) == SampleOrder(50, 1)(7)


@pytest.mark.parametrize(("world", "micro"), [(2, 2), (3, 1), (4, 2), (8, 1)])
def test_any_world_sees_the_same_mixture(mixture: Mixture, world: int, micro: int) -> None:
    alone = make(mixture)
    ranks = [make(mixture, rank=r, world=world, micro_batch_size=micro) for r in range(world)]
    for step in (0, 1, 50, 777):
        shares = [rank.step(step) for rank in ranks]
        parts = [shares[r][m] for m in range(ranks[0].accumulation) for r in range(world)]
        for key, value in alone.step(step)[0].items():
            assert torch.equal(torch.cat([part[key] for part in parts])[:6], value)


def test_a_mixture_of_one_is_that_folder(prepared: Prepared) -> None:
    one = open_mixture([(prepared.path, 3.0)])
    assert one.fingerprint == prepared.fingerprint
    plain = GlobalBatches(
        prepared.split("train"),
        seq_len=SEQ_LEN,
        global_batch_size=6,
        micro_batch_size=6,
        seed=1,
        eos_token_id=prepared.eos_token_id,
    )
    assert np.array_equal(rows(make(one), 9), rows(plain, 9))
    scored = list(one.validation_documents() or ())
    assert len(scored) == prepared.split("val").documents


def test_the_fingerprint_follows_folders_and_ratios(prepared: Prepared, other: Prepared) -> None:
    def of(*sources: tuple[Prepared, float]) -> str:
        return open_mixture([(p.path, weight) for p, weight in sources], verify=False).fingerprint

    found = of((prepared, 0.7), (other, 0.3))
    assert found == of((prepared, 7), (other, 3))
    assert len({found, of((prepared, 0.6), (other, 0.4)), of((other, 0.3), (prepared, 0.7))}) == 3


def test_validation_scores_all_folders_and_shares_a_limit(
    mixture: Mixture, prepared: Prepared, other: Prepared
) -> None:
    every = list(mixture.validation_documents() or ())
    splits = [prepared.split("val"), other.split("val")]
    assert len(every) == sum(split.documents for split in splits)
    assert sum(len(tokens) + 1 for tokens, _ in every) == sum(split.tokens for split in splits)
    some = list(mixture.validation_documents(10) or ())
    expected = [
        *splits[0].documents_for_scoring(7),
        *splits[1].documents_for_scoring(3),
    ]
    assert [tokens.tolist() for tokens, _ in some] == [tokens.tolist() for tokens, _ in expected]


def test_folders_that_do_not_belong_together_are_refused(
    prepared: Prepared, text_file: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(prepared.path, tmp_path / "copy")
    with pytest.raises(DataError, match="which hold the same data; name it once, with the sum"):
        open_mixture([(prepared.path, 1), (copy, 1)])
    # as many entries and the same end-of-text, but other merges
    text = tmp_path / "other.txt"
    text.write_text("\n\n".join(f"{number:09d} zyx" for number in range(3000)))
    options = PrepareOptions(vocab_size=prepared.vocab_size)
    stranger = prepare(Text(text, whole_files=False), tmp_path / "stranger", options)
    assert stranger.vocab_size == prepared.vocab_size
    message = f"made with another tokenizer than {prepared.path}; make it again by"
    with pytest.raises(DataError, match=message):
        open_mixture([(prepared.path, 1), (stranger.path, 1)])
    with pytest.raises(DataError, match=r"nothing is not a folder"):
        open_mixture([(prepared.path, 1), (tmp_path / "nothing", 1)])
