"""Randomness that depends on where a run is, not on how it came there: resumed, it draws what it would have drawn.

mmengine seeds once, at the start: what is drawn at iteration 1000 then depends on everything drawn before, in each worker too.
Here every iteration and every sample has a seed of its own, made of the run's seed and its number, so that neither workers nor
validations nor interruptions change it, and nothing has to be stored or replayed.
"""
import random

import numpy as np
import torch

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
        position: Samples that the run, all its processes together, takes before this one.
    """
    _seed(seed, _SAMPLE, position)


def _seed(*words: int) -> None:
    # numpy's mixing of words into states is documented to stay as it is; neighbours get unrelated states.
    python, arrays, tensors = np.random.SeedSequence(words).generate_state(3, np.uint64).tolist()
    random.seed(python)
    np.random.seed(arrays % 2**32)
    torch.manual_seed(tensors % 2**63)
