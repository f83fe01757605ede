"""Every world sees the same global batch at the same step; no sample is lost or repeated."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnorm.data import GlobalBatches, Prepared, SampleOrder, open_prepared
from llmnorm.errors import ConfigError, DataError


def make(prepared: Prepared, **options: object) -> GlobalBatches:
    defaults = {
        "seq_len": 16,
        "global_batch_size": 6,
        "micro_batch_size": 2,
        "seed": 1,
        "eos_token_id": prepared.eos_token_id,
    }
    return GlobalBatches(prepared.split("train"), **{**defaults, **options})  # type: ignore[arg-type]


def global_batch(
    prepared: Prepared, step: int, world: int, micro: int, size: int, **options: object
) -> dict[str, np.ndarray]:
    """All ranks' rows of a step put at their positions, padding checked and cut off."""
    ranks = [
        make(
            prepared,
            rank=rank,
            world=world,
            micro_batch_size=micro,
            global_batch_size=size,
            **options,
        )
        for rank in range(world)
    ]
    assert len({rank.accumulation for rank in ranks}) == 1
    per_rank = [rank.step(step) for rank in ranks]
    assert {len(batches) for batches in per_rank} == {ranks[0].accumulation}
    rows: dict[str, list[np.ndarray]] = {}
    for m in range(ranks[0].accumulation):
        for batches in per_rank:
            for key, value in batches[m].items():
                assert value.dtype == torch.int64
                assert value.shape == (micro, ranks[0].seq_len)
                rows.setdefault(key, []).append(value.numpy())
    whole = {key: np.concatenate(parts) for key, parts in rows.items()}
    assert (whole["targets"][size:] == -100).all()
    assert len(whole["targets"]) - size < micro * world
    return {key: value[:size] for key, value in whole.items()}


@pytest.mark.fast
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    world=st.integers(1, 8),
    micro=st.integers(1, 5),
    size=st.integers(1, 24),
    step=st.integers(0, 200),
    seed=st.integers(0, 9),
    document_mask=st.booleans(),
)
def test_any_world_sees_the_same_global_batch(
    prepared: Prepared,
    world: int,
    micro: int,
    size: int,
    step: int,
    seed: int,
    document_mask: bool,
) -> None:
    options = {"seed": seed, "document_mask": document_mask}
    found = global_batch(prepared, step, world, micro, size, **options)
    alone = global_batch(prepared, step, 1, size, size, **options)
    assert found.keys() == alone.keys()
    for key in alone:
        assert np.array_equal(found[key], alone[key])


@pytest.mark.fast
def test_a_rank_without_a_row_has_micro_batches_of_the_same_shape(prepared: Prepared) -> None:
    options = {"world": 4, "micro_batch_size": 2, "global_batch_size": 9}
    ranks = [make(prepared, rank=rank, **options).step(3) for rank in range(4)]
    shapes = {tuple(batch["targets"].shape) for batches in ranks for batch in batches}
    assert {len(batches) for batches in ranks} == {2}
    assert shapes == {(2, 16)}
    rows = [[int((b["targets"][:, 0] != -100).sum()) for b in batches] for batches in ranks]
    assert rows == [[2, 1], [2, 0], [2, 0], [2, 0]]


@pytest.mark.fast
def test_an_epoch_reads_every_sample_once(prepared: Prepared) -> None:
    split = prepared.split("train")
    samples = (split.tokens - 1) // 16
    expected = [split.window(16 * i, 17) for i in range(samples)]
    steps = -(-samples // 6)
    rows = [global_batch(prepared, step, 3, 2, 6) for step in range(steps)]
    seen = np.concatenate(
        [np.column_stack([row["input_ids"], row["targets"][:, -1:]]) for row in rows]
    )[:samples]
    assert sorted(map(tuple, seen.tolist())) == sorted(tuple(w.tolist()) for w in expected)


@pytest.mark.fast
def test_a_row_is_the_sample_the_order_names(prepared: Prepared) -> None:
    split = prepared.split("train")
    samples = (split.tokens - 1) // 16
    order = SampleOrder(samples, seed=1)
    step = 2 * samples // 6 + 1  # in the third epoch
    batch = global_batch(prepared, step, 2, 3, 6)
    for position in range(6):
        window = split.window(16 * order(step * 6 + position), 17)
        assert np.array_equal(batch["input_ids"][position], window[:-1])
        assert np.array_equal(batch["targets"][position], window[1:])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(prepared: Prepared, workers: int) -> None:
    alone = make(prepared, rank=1, world=2, document_mask=True)
    random_state = torch.get_rng_state()
    found = make(prepared, rank=1, world=2, document_mask=True, num_workers=workers).iterate(5)
    for step in range(5, 12):
        for one, other in zip(alone.step(step), next(found), strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
    found.close()  # type: ignore[attr-defined]
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_met_while_training_is_one_line(
    prepared: Prepared, tmp_path: Path, workers: int
) -> None:
    copy = open_prepared(shutil.copytree(prepared.path, tmp_path / "copy"))
    for shard in (copy.path / "train").glob("tokens-*.npy"):
        os.truncate(shard, 130)
    batches = make(copy, num_workers=workers).iterate(0)
    with pytest.raises(DataError, match="ends at byte 130") as error:
        next(batches)
    assert "\n" not in str(error.value)


@pytest.mark.fast
def test_a_split_goes_to_another_process_by_name(prepared: Prepared) -> None:
    split = prepared.split("train")
    rebuild, arguments = split.__reduce__()
    again = rebuild(*arguments)
    assert np.array_equal(again.window(100, 300), split.window(100, 300))
    assert len(pickle.dumps(split)) < 10_000 < split.tokens * 2


@pytest.mark.fast
def test_iteration_may_start_anywhere(prepared: Prepared) -> None:
    batches = make(prepared)
    later = batches.iterate(7)
    for step in (7, 8, 9):
        assert torch.equal(next(later)[0]["input_ids"], batches.step(step)[0]["input_ids"])


@pytest.mark.fast
def test_positions_restart_at_every_document(prepared: Prepared) -> None:
    for step in range(20):
        batch = global_batch(prepared, step, 1, 6, 6, document_mask=True)
        for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
            expected = -1
            for i, (token, position) in enumerate(zip(ids, positions, strict=True)):
                expected = 0 if i == 0 or token == prepared.eos_token_id else expected + 1
                assert position == expected


@pytest.mark.fast
def test_impossible_sizes_are_refused(prepared: Prepared) -> None:
    with pytest.raises(ConfigError, match="micro_batch_size is 0"):
        make(prepared, micro_batch_size=0)
    with pytest.raises(ConfigError, match="rank 2 is not in a world of 2"):
        make(prepared, rank=2, world=2)
    with pytest.raises(DataError, match=r"fewer than one sample.*lower data\.seq_len"):
        make(prepared, seq_len=10**6)
