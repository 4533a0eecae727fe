"""Results of the checks: as text for a terminal, and as JSON with every problem."""

import json
from collections import defaultdict
from typing import Any

from replk_mm import __version__
from replk_mm.data.checks.audit import Audit
from replk_mm.data.problems import KINDS, SEVERITIES, SHOWN, Problem
from replk_mm.errors import printable

#: Version of the JSON format; a key that is removed or changes its meaning increments it.
FORMAT = 1
#: Characters of a finding in a terminal.
_WIDTH = 160


def text(result: Audit) -> str:
    """The data sets, a block for each kind of problem, and a summary."""
    lines = [one.line() for one in result.sets]
    kinds: dict[tuple[str, str], list[Problem]] = defaultdict(list)
    for _, problem in result.found():
        kinds[problem.severity, problem.kind].append(problem)
    for (severity, kind), problems in sorted(kinds.items(), key=lambda item: SEVERITIES.index(item[0][0])):
        lines += ['', *_block(severity, kind, problems)]
    return printable('\n'.join([*lines, '', summary(result)]))


def _block(severity: str, kind: str, problems: list[Problem]) -> list[str]:
    listed = [single for problem in problems for single in problem.listed()]
    lines = [f'{severity} {kind}: {len(listed):,}']
    for path, entry, found in listed[:SHOWN]:
        found = found if len(found) <= _WIDTH else f'{found[:_WIDTH].rpartition(" ")[0]} ...'
        lines.append(f'  {path}{f", {entry}" if entry else ""}: {found}')
    if len(listed) > SHOWN:
        lines.append(f'  ... and {len(listed) - SHOWN:,} more')
    lines += [f'  allowed: {allowed}' for allowed in dict.fromkeys(problem.allowed for problem in problems) if allowed]
    return lines + [f'  -> {remedy}' for remedy in list(dict.fromkeys(problem.remedy for problem in problems))[:SHOWN]]


def summary(result: Audit) -> str:
    """One line: how many findings of each severity, in how many images."""
    counts = result.counts()
    inspected, images = sum(one.inspected for one in result.sets), sum(len(one.tasks) for one in result.sets)
    return (
        ', '.join(f'{counts[severity]:,} {severity}{"s" * (counts[severity] != 1)}' for severity in SEVERITIES)
        + f'; {inspected:,} of {images:,} images inspected in {result.seconds:.1f} s'
        + ('' if result.full else ' (--full inspects all)')
    )


def record(result: Audit) -> dict[str, Any]:
    """All findings, class frequencies and image sizes, as the JSON file has them."""
    problems = []
    kinds: dict[str, dict[str, Any]] = {}
    for split, problem in result.found():
        for path, entry, found in problem.listed():
            problems.append(
                dict(
                    kind=problem.kind,
                    severity=problem.severity,
                    split=split,
                    path=printable(path),
                    entry=printable(entry),
                    found=printable(found),
                    allowed=problem.allowed,
                    remedy=printable(problem.remedy),
                )
            )
        kind = kinds.setdefault(problem.kind, dict(severity=problem.severity, count=0, remedy=KINDS[problem.kind][1]))
        kind['count'] += max(1, len(problem.items))
        kind['severity'] = min(kind['severity'], problem.severity, key=SEVERITIES.index)  # the worst of them
    counts = result.counts()
    return dict(
        format=FORMAT,
        version=__version__,
        config=result.config,
        full=result.full,
        seconds=round(result.seconds, 3),
        counts={severity: counts[severity] for severity in SEVERITIES},
        kinds=kinds,
        problems=problems,
        data_sets=[
            dict(
                place=one.place,
                split=one.split,
                type=one.type,
                root=printable(one.root),
                images=len(one.tasks),
                looked_into=one.inspected,
                counted='pixels' if one.objects is None else 'objects',
                classes={printable(name): count for name, count in one.class_counts().items()},
                sizes=[dict(width=w, height=h, images=count) for (w, h), count in sorted(one.sizes.items())],
            )
            for one in result.sets
        ],
    )


def as_json(result: Audit) -> str:
    """:func:`record` as text."""
    return json.dumps(record(result), indent=1, ensure_ascii=False) + '\n'
