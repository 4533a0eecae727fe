"""Loading that can resume anywhere: samples know their place in the run, and batches are skipped without being loaded.

mmengine resumes by loading and discarding all that was trained on before, and its augmentation differs then. It seeds
once, at the start: what is drawn at iteration 1000 depends on everything drawn before, in each worker. Here a batch
sampler is asked for indices only, and every iteration and every sample has a seed of its own, made of the run's seed
and its own number. Neither workers nor validations nor interruptions nor the number of processes change what the
network sees.
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

# What the words after the run's seed count, so that no two kinds of draw share a seed.
_ITERATION, _SAMPLE = 1, 2


def seed_iteration(seed: int, iteration: int, rank: int = 0) -> None:
    """Seed what a process draws in one iteration: drop path, dropout, proposals.

    Args:
        seed: Of the run.
        iteration: Counted from 0.
        rank: Of the process.
    """
    _seed(seed, _ITERATION, iteration, rank)


def seed_sample(seed: int, position: int) -> None:
    """Seed what the data pipeline draws for one sample.

    Args:
        seed: Of the run.
        position: Number of samples that all processes of the run take before this one.
    """
    _seed(seed, _SAMPLE, position)


def _seed(*words: int) -> None:
    # numpy guarantees its mixing of words into states; neighbours get unrelated states.
    python, arrays, tensors = np.random.SeedSequence(words).generate_state(3, np.uint64).tolist()
    random.seed(python)
    np.random.seed(arrays % 2**32)
    torch.manual_seed(tensors % 2**63)


class Draw(int):
    """An index of a data set that knows how many samples the run takes before it."""

    position: int

    def __new__(cls, index: int, position: int) -> 'Draw':
        draw = super().__new__(cls, index)
        draw.position = position
        return draw

    def __reduce__(self) -> tuple:
        return Draw, (int(self), self.position)


class DrawnDataset(Dataset):
    """A data set that seeds its pipeline for each sample; in all else it is the one it wraps.

    Args:
        dataset: The data set.
        seed_for: Called with a sample's position before the sample is loaded.
    """

    def __init__(self, dataset: Any, seed_for: Callable[[int], None]) -> None:
        vars(self).update(wrapped=dataset, seed_for=seed_for)

    def __len__(self) -> int:
        return len(self.wrapped)

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, Draw):
            return self.wrapped[index]
        self.seed_for(index.position)
        return self.wrapped[int(index)]

    def __getattr__(self, name: str) -> Any:
        if name in ('wrapped', 'seed_for'):  # of an object that is being unpickled
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.wrapped, name, value)  # some hooks change a data set's pipeline on the way


class Draws:
    """A batch sampler whose indices know their positions, and which can begin a pass anywhere.

    Args:
        batches: The batch sampler: yields lists of indices.
        batch_size: Samples of a batch.
        rank: Of this process.
        processes: Those that share the samples.
    """

    def __init__(self, batches: Any, batch_size: int, rank: int, processes: int) -> None:
        self.batches, self.batch_size, self.rank, self.processes = batches, batch_size, rank, processes
        self._pass: Iterator[list[int]] | None = None
        self._number = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == 'batches':
            raise AttributeError(name)
        return getattr(self.batches, name)

    def begin(self, number: int, skip: int = 0) -> int:
        """Prepare the next pass.

        Args:
            number: Batches of the run before this pass.
            skip: Batches of this pass to leave out.

        Returns:
            How many were left out: fewer than ``skip`` if the pass has fewer.
        """
        self._pass = iter(self.batches)
        skipped = sum(1 for _ in islice(self._pass, skip))
        self._number = number + skipped
        return skipped

    def __iter__(self) -> Iterator[list[int]]:
        batches, self._pass = self._pass if self._pass is not None else iter(self.batches), None
        for number, batch in enumerate(batches, self._number):
            first = number * self.batch_size
            # Some samplers of videos yield pairs; their samples are drawn as torch's loader would.
            yield [
                Draw(int(index), (first + i) * self.processes + self.rank) if isinstance(index, Integral) else index
                for i, index in enumerate(batch)
            ]


class DrawnLoader(DataLoader):
    """A data loader of :class:`Draws`, whose workers start when the first batch is asked for, not before."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def drawn(loader: DataLoader, seed_for: Callable[[int], None], rank: int, processes: int) -> DrawnLoader:
    """The same loader with samples that know their place in the run.

    Args:
        loader: With a batch sampler, its own or torch's.
        seed_for: See :class:`DrawnDataset`.
        rank: Of this process.
        processes: Those that share the samples.
    """
    batches = loader.batch_sampler
    size: int = loader.batch_size or getattr(batches, 'batch_size', None) or 1
    settings = {
        key: getattr(loader, key)
        for key in (
            'num_workers',
            'collate_fn',
            'pin_memory',
            'timeout',
            'worker_init_fn',
            'multiprocessing_context',
            'generator',
            'prefetch_factor',
            'persistent_workers',
        )
    }
    return DrawnLoader(
        DrawnDataset(loader.dataset, seed_for), batch_sampler=Draws(batches, size, rank, processes), **settings
    )


def endless(loader: DrawnLoader, start: int) -> Iterator[Any]:
    """Batches of one pass over a loader after another, from number ``start`` on.

    Args:
        loader: From :func:`drawn`; its sampler may be endless itself.
        start: Batches that are left out, without being loaded.

    Raises:
        UserError: If a pass has no batch.
    """
    draws: Draws = loader.batch_sampler  # type: ignore[assignment]
    number = epoch = 0
    while True:
        set_epoch(draws, epoch)
        before = number
        number += draws.begin(number, max(0, start - number))
        if number >= start:
            for batch in loader:
                number += 1
                yield batch
        if number == before:
            raise no_batch(loader)
        epoch += 1


def no_batch(loader: DrawnLoader) -> UserError:
    """What to say of a loader whose pass has no batch."""
    draws: Draws = loader.batch_sampler  # type: ignore[assignment]
    return UserError(
        f'train_dataloader: yields no batch: {len(loader.dataset)} samples, '  # type: ignore[arg-type]
        f'{draws.batch_size} a batch\nLower batch_size, or do without drop_last.'
    )


def set_epoch(draws: Draws, epoch: int) -> None:
    """Tell samplers that shuffle anew each time which pass it is."""
    samplers: list[Any] = [draws.batches, getattr(draws.batches, 'sampler', None)]
    for sampler in samplers:
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)
