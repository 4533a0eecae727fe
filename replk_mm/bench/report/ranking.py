"""Which figures lead others by more than chance may have given them."""
from collections.abc import Sequence

from replk_mm.bench.report.columns import Column, Figure

RANKING = ('"Best" marks the leader of a column among rows of one protocol, and only where both it and every other row there '
           'have a spread and the ranges do not overlap: mean plus and minus one standard deviation over seeds, of times the '
           'quartiles if there is one seed. A single seed of a metric has no spread, so that nothing is marked.')


def leaders(column: Column, figures: Sequence[Figure]) -> list[int]:
    """Places of the figures that are the best of their protocol; see :data:`RANKING`.

    Args:
        column: Theirs; says whether higher is better.
        figures: Of rows that may be ranked by the metric.
    """
    by_protocol: dict[str, list[int]] = {}
    for i, figure in enumerate(figures):
        if column.better and figure.value is not None:
            by_protocol.setdefault(figure.protocol, []).append(i)
    found = []
    for members in by_protocol.values():
        spans = {i: _span(figures[i], 1 if column.better == 'higher' else -1) for i in members}
        best = max(members, key=lambda i: (figures[i].value or 0.) * (1 if column.better == 'higher' else -1))
        own, others = spans.pop(best), list(spans.values())
        if own and others and all(span and span[1] < own[0] for span in others):
            found.append(best)
    return found


def _span(figure: Figure, sign: int) -> tuple[float, float] | None:
    """The range of a figure, in the order in which higher is better."""
    if figure.low is None or figure.high is None:
        return None
    low, high = sorted((sign * figure.low, sign * figure.high))
    return low, high
