"""What tests of procedural scenes share: digests, and classifiers that look for shortcuts."""

import hashlib

import numpy as np


def digest(scene) -> str:
    return hashlib.sha256(scene.image.tobytes() + scene.label.tobytes()).hexdigest()


def accuracy(features: np.ndarray, target: np.ndarray) -> float:
    """Balanced accuracy of the better of two classifiers, nearest mean and 15 neighbours, on the second half.

    Args:
        features: Array ``(N, D)``.
        target: Classes 0, 1 and 2 ``(N,)``.
    """
    x = (features - features.mean(0)) / (features.std(0) + 1e-9)
    half = len(x) // 2
    means = np.stack([x[:half][target[:half] == c].mean(0) for c in range(3)])
    near = ((x[half:, None] - means) ** 2).sum(2).argmin(1)
    neighbours = ((x[half:, None] - x[None, :half]) ** 2).sum(2).argsort(1)[:, :15]
    votes = np.stack([(target[:half][neighbours] == c).sum(1) for c in range(3)], 1).argmax(1)
    return max(np.mean([(guess[target[half:] == c] == c).mean() for c in range(3)]) for guess in (near, votes))
