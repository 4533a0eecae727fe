"""Epochs that start at any batch."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from replk_mm.data.sampler import PositionedIndex, infinite_batches, make_resumable, seed_iteration, seed_sample
from replk_mm.errors import UserError


class Shuffled:
    """Another order in every epoch, as the DefaultSampler of mmengine."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self):
        return iter(np.random.default_rng(self.epoch).permutation(self.size))  # numpy's integers


def loader(size: int, drop_last: bool = False, batch_size: int = 2):
    seeds: list[int] = []
    plain = DataLoader(range(100, 100 + size), batch_sampler=BatchSampler(Shuffled(size), batch_size, drop_last))
    return make_resumable(plain, seeds.append, rank=0, processes=1), seeds


@pytest.mark.parametrize('size', [2, 4, 5])
@pytest.mark.parametrize('start', range(8))
def test_batches_continue_from_any_iteration(size, start):
    """All epochs in a row, without the first ``start`` batches."""
    rows = [(np.random.default_rng(epoch).permutation(size) + 100).tolist() for epoch in range(20)]
    whole = [row[i : i + 2] for row in rows for i in range(0, size, 2)]
    batches, seeds = loader(size)
    found = [batch.tolist() for batch in islice(infinite_batches(batches, start), 6)]
    assert found == whole[start : start + 6]
    sizes = [len(batch) for batch in found]
    assert seeds[: sum(sizes)] == [2 * (start + i) + j for i, n in enumerate(sizes) for j in range(n)]


@pytest.mark.parametrize('start', [0, 3])
def test_epoch_without_a_batch_is_an_error(start):
    batches, _ = loader(1, drop_last=True)
    with pytest.raises(UserError, match='train_dataloader: yields no batch: 1 samples'):
        next(infinite_batches(batches, start))


def test_numpy_integers_have_positions():
    batches, _ = loader(4)
    assert all(isinstance(index, PositionedIndex) for batch in batches.batch_sampler for index in batch)


def test_sampler_of_torch():
    plain = DataLoader(range(5), batch_size=2, sampler=RandomSampler(range(5)))
    batches = islice(infinite_batches(make_resumable(plain, lambda position: None, 0, 1), 0), 3)
    seen = [value for batch in batches for value in batch.tolist()]
    assert sorted(seen) == list(range(5))


def test_seeds_depend_on_run_iteration_rank_and_sample():
    seen = []
    for seed, *words in (
        (seed_iteration, 1, 5),
        (seed_iteration, 1, 6),
        (seed_iteration, 2, 5),
        (seed_iteration, 1, 5, 1),
        (seed_sample, 1, 5),
        (seed_iteration, 1, 5),
    ):
        seed(*words)
        seen.append((random.random(), float(torch.rand(()))))
    assert seen[0] == seen[-1] and len(set(seen)) == len(seen) - 1
