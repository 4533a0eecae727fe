"""Where the names of points go in a plot: beside them, and on nothing else."""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: 'Box') -> bool:
        """Whether the two share a part."""
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom

    def holds(self, other: 'Box') -> bool:
        """Whether the other lies within."""
        return (self.left <= other.left and other.right <= self.right and self.top <= other.top
                and other.bottom <= self.bottom)

    def near(self, x: float, y: float) -> tuple[float, float]:
        """The point of the rectangle that is nearest to a point."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)

    def distance(self, x: float, y: float) -> float:
        """From a point; 0 within."""
        return math.dist((x, y), self.near(x, y))


def place(spots: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], taken: Sequence[Box], area: Box,
          reach: float) -> list[Box] | None:
    """A rectangle for the name of every point, none of them on another, on what is taken, or out of the area.

    Args:
        spots: The points.
        sizes: Width and height of each name.
        taken: What must stay free of names.
        area: Where names may be.
        reach: How far from its point a name may be.

    Returns:
        The rectangles; None if there is no room for one within ``reach``. With an infinite reach a name for which the area has
        no room left lies on others.
    """
    placed: list[Box] = []
    for (x, y), (width, height) in zip(spots, sizes, strict=True):
        farthest = min(reach, math.hypot(area.right, area.bottom))
        places = [box for box in _around(x, y, width, height, farthest) if area.holds(box)]
        free = next((box for box in places if not any(box.meets(other) for other in (*taken, *placed))), None)
        if free is None and reach < math.inf:
            return None
        placed.append(free or (places or [Box(x, y, x + width, y + height)])[0])
    return placed


def _around(x: float, y: float, width: float, height: float, reach: float) -> Iterator[Box]:
    """Rectangles about a point: to its right, left, above, below, then on ever wider circles."""
    near = ((8, -height / 2), (-8 - width, -height / 2), (-width / 2, -9 - height), (-width / 2, 9))
    for dx, dy in near:
        yield Box(x + dx, y + dy, x + dx + width, y + dy + height)
    radius = 14.
    while radius <= reach:
        for turn in range(16):
            across, down = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
            left = x + radius * across - width * (1 - across) / 2
            top = y + radius * down - height * (1 - down) / 2
            yield Box(left, top, left + width, top + height)
        radius += 6
