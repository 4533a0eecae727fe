"""Data loading that resumes at any iteration without loading what was trained on before.

mmengine resumes by loading and discarding all earlier batches. It seeds each worker once, so the augmentation after a
resume differs. Here the batch sampler skips indices, and every iteration and every sample has its own seed, derived
from the seed of the run and its position. What the network sees does not depend on workers, validations, interruptions
or the number of processes.
"""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from replk_mm.errors import UserError

# The second word of a seed: iterations and samples must not share seeds.
_ITERATION, _SAMPLE = 1, 2
_LOADER_ARGUMENTS = (
    *('num_workers', 'collate_fn', 'pin_memory', 'timeout', 'worker_init_fn', 'multiprocessing_context', 'generator'),
    *('prefetch_factor', 'persistent_workers'),
)


def seed_iteration(seed: int, iteration: int, rank: int = 0) -> None:
    """Seed the random numbers of one training step: drop path, dropout, proposals.

    Args:
        seed: Seed of the run.
        iteration: Iteration, counted from 0.
        rank: Rank of the process. Defaults to 0.
    """
    _seed(seed, _ITERATION, iteration, rank)


def seed_sample(seed: int, position: int) -> None:
    """Seed the random numbers of the data pipeline for one sample.

    Args:
        seed: Seed of the run.
        position: Number of samples that all processes of the run load before this one.
    """
    _seed(seed, _SAMPLE, position)


def _seed(*words: int) -> None:
    # SeedSequence gives neighbouring words unrelated states.
    python, arrays, tensors = np.random.SeedSequence(words).generate_state(3, np.uint64).tolist()
    random.seed(python)
    np.random.seed(arrays % 2**32)
    torch.manual_seed(tensors % 2**63)


class PositionedIndex(int):
    """A data set index with ``position``, the number of samples that the run loads before it."""

    position: int

    def __new__(cls, index: int, position: int) -> 'PositionedIndex':
        positioned = super().__new__(cls, index)
        positioned.position = position
        return positioned

    def __reduce__(self) -> tuple:
        return PositionedIndex, (int(self), self.position)


class SeededDataset(Dataset):
    """Wrap a data set: seed its pipeline for each sample, and forward everything else.

    Args:
        dataset: The data set.
        seed_for: Called with the position of a sample before the sample is loaded.
    """

    def __init__(self, dataset: Any, seed_for: Callable[[int], None]) -> None:
        vars(self).update(wrapped=dataset, seed_for=seed_for)

    def __len__(self) -> int:
        return len(self.wrapped)

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, PositionedIndex):
            return self.wrapped[index]
        self.seed_for(index.position)
        return self.wrapped[int(index)]

    def __getattr__(self, name: str) -> Any:
        if name in ('wrapped', 'seed_for'):  # while the object is unpickled
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.wrapped, name, value)  # some hooks replace the pipeline during training


class ResumableBatchSampler:
    """Wrap a batch sampler: yield :class:`PositionedIndex` instead of int, and start an epoch at any batch.

    Args:
        batches: The batch sampler.
        batch_size: Samples in a batch.
        rank: Rank of this process.
        processes: Number of processes that share the samples.
    """

    def __init__(self, batches: Any, batch_size: int, rank: int, processes: int) -> None:
        self.batches, self.batch_size, self.rank, self.processes = batches, batch_size, rank, processes
        self._remaining: Iterator[list[int]] | None = None
        self._number = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == 'batches':
            raise AttributeError(name)
        return getattr(self.batches, name)

    def start_epoch(self, number: int, skip: int = 0) -> int:
        """Prepare the next epoch.

        Args:
            number: Batches that the run loaded before this epoch.
            skip: Batches to skip at the start of the epoch. Defaults to 0.

        Returns:
            Number of batches skipped: fewer than ``skip`` if the epoch is shorter.
        """
        self._remaining = iter(self.batches)
        skipped = sum(1 for _ in islice(self._remaining, skip))
        self._number = number + skipped
        return skipped

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the samplers that shuffle anew in each one."""
        samplers: list[Any] = [self.batches, getattr(self.batches, 'sampler', None)]
        for sampler in samplers:
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._remaining if self._remaining is not None else iter(self.batches)
        self._remaining = None
        for number, batch in enumerate(batches, self._number):
            first = number * self.batch_size
            # Some samplers of videos yield pairs; their samples are not seeded.
            yield [
                PositionedIndex(int(i), (first + k) * self.processes + self.rank) if isinstance(i, Integral) else i
                for k, i in enumerate(batch)
            ]


class ResumableLoader(DataLoader):
    """A data loader with a :class:`ResumableBatchSampler`. Workers start when the first batch is requested."""

    batch_sampler: ResumableBatchSampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def make_resumable(loader: DataLoader, seed_for: Callable[[int], None], rank: int, processes: int) -> ResumableLoader:
    """The same loader with positions for its samples.

    Args:
        loader: The loader.
        seed_for: See :class:`SeededDataset`.
        rank: Rank of this process.
        processes: Number of processes that share the samples.
    """
    batches = loader.batch_sampler
    size: int = loader.batch_size or getattr(batches, 'batch_size', None) or 1
    return ResumableLoader(
        SeededDataset(loader.dataset, seed_for),
        batch_sampler=ResumableBatchSampler(batches, size, rank, processes),
        **{key: getattr(loader, key) for key in _LOADER_ARGUMENTS},
    )


def infinite_batches(loader: ResumableLoader, start: int) -> Iterator[Any]:
    """Batches of one epoch after another. The first ``start`` batches are skipped, not loaded.

    Raises:
        UserError: If an epoch has no batch.
    """
    sampler = loader.batch_sampler
    number = epoch = 0
    while True:
        sampler.set_epoch(epoch)
        before = number
        number += sampler.start_epoch(number, max(0, start - number))
        if number >= start:
            for batch in loader:
                number += 1
                yield batch
        if number == before:
            raise empty_loader_error(loader)
        epoch += 1


def empty_loader_error(loader: ResumableLoader) -> UserError:
    """The error for a loader without a batch."""
    return UserError(
        f'train_dataloader: yields no batch: {len(loader.dataset)} samples, '  # type: ignore[arg-type]
        f'batch size {loader.batch_sampler.batch_size}\nLower batch_size, or set drop_last=False.'
    )
