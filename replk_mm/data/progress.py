"""How far a long look has come: a bar with the time to go, or a line now and then where nobody watches."""
import sys
import time

from mmengine.utils import ProgressBar

_EVERY = 15.0


class Progress:
    """Count tasks on standard error.

    Args:
        total: Number of tasks.
        what: What they are, in the plural.
    """

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.done = total, what, 0
        self.bar = ProgressBar(total, bar_width=30, file=sys.stderr) if total and sys.stderr.isatty() else None
        self.start = self.said = time.monotonic()

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        # A terminal that is written to for every small file takes as long as the files.
        if self.bar and (now - self.said > 0.1 or self.done == self.total):
            self.bar.update(self.done - self.bar.completed)
            self.said = now
        elif not self.bar and now - self.said > _EVERY:
            left = (now - self.start) / self.done * (self.total - self.done)
            print(f'{self.done:,} of {self.total:,} {self.what}, about {left:.0f} s to go', file=sys.stderr, flush=True)
            self.said = now

    def end(self) -> None:
        """Leave the line of the bar."""
        if self.bar:
            print(file=sys.stderr)
