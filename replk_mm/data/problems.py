"""What is wrong with data: one finding, how severe its kind is, what to do about it, and how a message says it."""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from replk_mm.data.problem_kinds import KINDS
from replk_mm.errors import UserError, printable

SEVERITIES = ('error', 'warning', 'note')
#: Examples that a message gives of one kind.
SHOWN = 5


class Item(NamedTuple):
    """One of several findings of the same kind: what was found, in which entry of the file, or in which other file."""

    found: str
    entry: str = ''
    path: str = ''


@dataclass(frozen=True)
class Problem:
    """A finding, or all findings of one kind in a file or folder.

    Attributes:
        kind: A key of :data:`replk_mm.data.problem_kinds.KINDS`.
        path: The file or folder.
        found: What was found; of several findings, their number and the first ones.
        allowed: What it may be. Defaults to nothing, where that is plain.
        remedy: What to do; that of the kind unless given.
        severity: That of the kind unless given.
        items: All findings, where there are several.
    """

    kind: str
    path: str
    found: str
    allowed: str = ''
    remedy: str = ''
    severity: str = ''
    items: tuple[Item, ...] = ()

    @property
    def weight(self) -> str:
        """One of :data:`SEVERITIES`."""
        return self.severity or KINDS[self.kind].severity

    @property
    def advice(self) -> str:
        """What to do."""
        return self.remedy or KINDS[self.kind].remedy

    @property
    def text(self) -> str:
        """What was found, and what is allowed."""
        return self.found + (f'; allowed: {self.allowed}' if self.allowed else '')

    def listed(self) -> Iterable[tuple[str, str, str]]:
        """Path, entry and finding of every single one."""
        for item in self.items or (Item(self.found),):
            yield item.path or self.path, item.entry, item.found


class BadData(UserError):
    """Data that cannot be used as they are; ``problems`` has all that is known."""

    def __init__(self, message: str, problems: Sequence[Problem]) -> None:
        super().__init__(message)
        self.problems = list(problems)


def errors(problems: Iterable[Problem]) -> list[Problem]:
    """Those that forbid to use the data."""
    return [problem for problem in problems if problem.weight == 'error']


def refuse(problems: Sequence[Problem], of: str | Path | None = None) -> None:
    """Refuse data if something forbids to use them.

    Args:
        problems: What was found, of any severity.
        of: The file that they were found through, named first; None where each problem's own path is enough.

    Raises:
        BadData: With the first findings, and what to do about each kind.
    """
    bad = errors(problems)
    if not bad:
        return
    shown = SHOWN if of is None else sum(p.path == str(of) for p in bad) + SHOWN
    lines = [p.text if p.path == str(of) else f'{p.path}: {p.text}' for p in bad[:shown]]
    if of is not None:
        lines = [f'{of}: {lines[0]}', *(f'  and {line}' for line in lines[1:])]
    more = [f'... and {len(bad) - shown:,} more (tools/check_data.py names all)'] if len(bad) > shown else []
    raise BadData('\n'.join([*lines, *more, *dict.fromkeys(p.advice for p in bad if p.advice)]), problems)


def warnings(problems: Iterable[Problem]) -> list[str]:
    """A line for each kind of warning among them, with the first file and how many more there are."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.weight == 'warning':
            kinds.setdefault(problem.kind, []).append(problem)
    return [printable(f'warning: {first.path}: {first.text}' + (f' (and {len(rest)} more such files)' if rest else ''))
            for first, *rest in kinds.values()]


def some(values: Iterable) -> str:
    """The first few of ``values``, said to be more."""
    shown = [str(value) for _, value in zip(range(SHOWN + 1), values, strict=False)]
    return ', '.join(shown[:SHOWN]) + (' ...' if len(shown) > SHOWN else '')

