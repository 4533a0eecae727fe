"""What a whole check of data found: as text for a terminal, and as JSON that has every problem."""
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from replk_mm import __version__
from replk_mm.data.audit import Audit, Audited
from replk_mm.data.problem_kinds import KINDS
from replk_mm.data.problems import SEVERITIES, SHOWN, Problem, printable
from replk_mm.errors import UserError

#: Of the JSON file; a key that is taken away or means something else raises it.
FORMAT = 1
#: Characters of a finding that a terminal is shown.
_WIDTH = 160


def text(result: Audit) -> str:
    """The data sets, a block for each kind of problem, and what it comes to."""
    lines = [line for one in result.sets for line in _about(one)]
    kinds: dict[tuple[str, str], list[Problem]] = defaultdict(list)
    for _, problem in result.found():
        kinds[problem.weight, problem.kind].append(problem)
    for severity in SEVERITIES:
        for (weight, kind), problems in kinds.items():
            if weight == severity:
                lines += ['', *_block(severity, kind, problems)]
    return '\n'.join(printable(line) for line in [*lines, '', summary(result)])


def _about(one: Audited) -> list[str]:
    known, tally = one.survey, one.tally
    sizes = sorted(tally.sizes, key=lambda size: size[0] * size[1])
    looked = f'{len(known.tasks):,} images, {tally.looked:,} looked into' if known.tasks else 'no images looked into'
    spread = f', {"x".join(map(str, sizes[0]))} to {"x".join(map(str, sizes[-1]))} pixels' if sizes else ''
    what = 'objects' if known.objects is not None else 'pixels'
    occurring = sum(bool(count) for count in one.classes.values())
    classes = (f', {occurring} of {len(one.classes)} classes occur, {sum(one.classes.values()):,} {what}'
               if one.classes else '')
    return [f'{one.split}: {known.root} ({one.type}): {looked}{spread}{classes}']


def _block(severity: str, kind: str, problems: list[Problem]) -> list[str]:
    listed = [(problem, *single) for problem in problems for single in problem.listed()]
    lines = [f'{severity} {kind}: {len(listed):,}']
    for _, path, entry, found in listed[:SHOWN]:
        found = found if len(found) <= _WIDTH else f'{found[:_WIDTH].rpartition(" ")[0]} ...'  # as lists of classes are
        lines.append(f'  {_line(path)}{f", {entry}" if entry else ""}: {found}')
    if len(listed) > SHOWN:
        lines.append(f'  ... and {len(listed) - SHOWN:,} more')
    lines += [f'  allowed: {allowed}' for allowed in dict.fromkeys(p.allowed for p in problems) if allowed]
    for advice in list(dict.fromkeys(p.advice for p in problems if p.advice))[:SHOWN]:
        lines += [f'  {"->" if i == 0 else "  "} {line}' for i, line in enumerate(advice.splitlines())]
    return lines


def _line(path: str) -> str:
    return printable(path).replace('\n', '\\n')


def summary(result: Audit) -> str:
    """One line: how many of each severity, in how many files, and whether all were looked into."""
    counts = result.counts()
    looked = sum(one.tally.looked for one in result.sets)
    images = sum(len(one.survey.tasks) for one in result.sets)
    return (', '.join(f'{counts[severity]:,} {severity}{"s" * (counts[severity] != 1)}' for severity in SEVERITIES)
            + f'; {looked:,} of {images:,} images looked into in {result.seconds:.1f} s'
            + ('' if result.full else ' (--full looks into all)'))


def record(result: Audit) -> dict[str, Any]:
    """All of it, as JSON has it."""
    problems = []
    kinds: dict[str, dict[str, Any]] = {}
    for split, problem in result.found():
        for path, entry, found in problem.listed():
            problems.append(dict(
                kind=problem.kind, severity=problem.weight, split=split, path=_line(path), entry=printable(entry),
                found=printable(found), allowed=problem.allowed, remedy=printable(problem.advice)))
        kind = kinds.setdefault(problem.kind, dict(severity=problem.weight, count=0, remedy=KINDS[problem.kind].remedy))
        kind['count'] += max(1, len(problem.items))
        kind['severity'] = min(kind['severity'], problem.weight, key=SEVERITIES.index)  # the worst of them
    counts = result.counts()
    return dict(
        format=FORMAT, version=__version__, config=result.config, full=result.full, seconds=round(result.seconds, 3),
        counts={severity: counts[severity] for severity in SEVERITIES}, kinds=kinds, problems=problems,
        data_sets=[dict(
            place=one.place, split=one.split, type=one.type, root=_line(one.survey.root), images=len(one.survey.tasks),
            looked_into=one.tally.looked, counted='objects' if one.survey.objects is not None else 'pixels',
            classes={printable(name): count for name, count in one.classes.items()},
            sizes=[dict(width=w, height=h, images=count) for (w, h), count in sorted(one.tally.sizes.items())])
            for one in result.sets])


def write(result: Audit, path: Path) -> None:
    """Write :func:`record` to a file, which is whole or not there.

    Raises:
        UserError: If it cannot be written.
    """
    part = path.with_name(f'{path.name}.part')
    try:
        part.write_text(json.dumps(record(result), indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
        part.replace(path)
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {error.strerror or error}') from error
    finally:
        part.unlink(missing_ok=True)
