"""Is a difference more than the luck of which images are in the data set? The paired bootstrap over images."""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: Resamplings computed at a time, which bounds the memory.
_CHUNK = 50
#: Below so many images an interval is said to be rough.
FEW_IMAGES = 30


@dataclass(frozen=True)
class Interval:
    """A difference, B less A, and where it falls in 95 % of the resamplings of the images.

    Attributes:
        difference: On the images as they are.
        low: The 2.5th percentile.
        high: The 97.5th percentile.
        b_higher: Share of the resamplings in which B is higher.
        draws: Resamplings.
        seed: Of the random numbers.
        images: Images.
    """

    difference: float
    low: float
    high: float
    b_higher: float
    draws: int
    seed: int
    images: int

    @property
    def is_beyond_luck(self) -> bool:
        """Whether the interval does not contain 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(difference: Callable[[np.ndarray], np.ndarray], images: int, draws: int = 1000,
                     seed: int = 0) -> Interval:
    """Percentile bootstrap (Efron 1979) of a difference between two results on the same images.

    Each draw takes as many images as there are, with replacement; both results are scored on the same ones, so that what makes
    an image hard for both cancels. It says how much hangs on the choice of test images, nothing of other training seeds.

    Args:
        difference: From how often each image was drawn, ``(draws, images)`` float64, the difference B less A of each draw,
            ``(draws,)``.
        images: Images, at least 1.
        draws: Resamplings.
        seed: Of the random numbers.
    """
    rng = np.random.default_rng(seed)
    share = np.full(images, 1 / images)
    found = np.concatenate([difference(rng.multinomial(images, share, size=min(_CHUNK, draws - start)).astype(float))
                            for start in range(0, draws, _CHUNK)])
    found = found[~np.isnan(found)]  # an image without labels, drawn again and again, has no score
    as_is = float(difference(np.ones((1, images)))[0])
    low, high = np.percentile(found, [2.5, 97.5])
    return Interval(as_is, float(low), float(high), float((found > 0).mean()), draws, seed, images)


def mean_difference(a: np.ndarray, b: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """For :func:`paired_bootstrap`: of the mean of a score of every image, ``(images,)`` each."""
    change = b - a
    return lambda times: times @ change / times.sum(1)
