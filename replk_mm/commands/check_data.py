"""Check the data sets of a config: folders, pairs, annotations, classes and images, with every problem found.

Without --full a sample of the images is decoded, as before a training. Exit status: 0 without errors (there may be
warnings and notes), 1 with errors, 2 for a mistake in the command.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from replk_mm import __version__, cli
from replk_mm.data.checks.audit import Audit, audit
from replk_mm.data.checks.dataset import DataSet
from replk_mm.data.classes import use_classes
from replk_mm.data.findings import KINDS, SEVERITIES, SHOWN, Problem
from replk_mm.engine.config import load_config, set_data_root
from replk_mm.engine.machine import prepare_work_dir
from replk_mm.errors import UserError, command, printable
from replk_mm.files import write_atomic

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
    listed = [single for problem in problems for single in problem.occurrences()]
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
        for path, entry, found in problem.occurrences():
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


# Colours of Okabe and Ito, which people who see fewer of them can tell apart; markers say the same again.
_STYLES = {'train': ('#0072B2', 'o'), 'val': ('#D55E00', '^'), 'test': ('#009E73', 's')}
_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.pdf', '.svg')


def check_suffix(path: Path) -> None:
    """Refuse a file whose suffix is of no format that can be drawn.

    Raises:
        UserError: With the formats that can.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(
            f'{path}: no picture can be written as {path.suffix or "a file without suffix"}\n'
            f'Name a file that ends with {", ".join(_SUFFIXES)}.'
        )


def draw(result: Audit, path: Path) -> bool:
    """Write the picture, if there is something to draw: no data set may have been read.

    Args:
        result: Of a whole check.
        path: The file; its suffix says the format.

    Returns:
        Whether it was written.

    Raises:
        UserError: If it cannot be written.
    """
    sets = [one for one in result.sets if one.class_counts() or one.sizes]
    if not sets:
        return False
    totals: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_STYLES, 0))
    for one in sets:
        for name, count in one.class_counts().items():
            totals[name][one.split] += count
    names = sorted((name for name in totals if any(totals[name].values())), key=lambda name: sum(totals[name].values()))
    figure = Figure(figsize=(11, max(5, 1.5 + 0.16 * len(names))), layout='constrained')
    FigureCanvasAgg(figure)
    frequencies, sizes = figure.subplots(1, 2)
    for split in dict.fromkeys(one.split for one in sets):
        colour, marker = _STYLES[split]
        counts = [totals[name][split] or np.nan for name in names]
        frequencies.plot(counts, np.arange(len(names)), marker, color=colour, markersize=4, label=split)
    frequencies.set_yticks(
        range(len(names)), [printable(name).strip().replace('$', r'\$') for name in names], fontsize=7
    )
    unit = ' and '.join(sorted({'objects' if one.objects is not None else 'pixels' for one in sets}))
    frequencies.set(
        xscale='log',
        xlabel=f'{unit}, log scale',
        ylim=(-0.6, max(1, len(names)) - 0.4),
        title=f'{len(names)} of {len(totals)} classes occur',
    )
    _sizes(sizes, result, sets)
    for panel in (frequencies, sizes):
        panel.grid(True, color='#dddddd', linewidth=0.6)
        panel.legend(fontsize=8)
    what = 'every file' if result.full else 'a sample of the images'
    figure.suptitle(f'{printable(Path(result.config).stem)}: {what} inspected')
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: the picture cannot be written: {error}\nName another file.') from error
    return True


def _sizes(panel: Axes, result: Audit, sets: list[DataSet]) -> None:
    """Width against height, areas of the marks as the number of images; the crop is the corner within the rectangle."""
    most = max((count for one in sets for count in one.sizes.values()), default=1)
    for one in sets:
        colour, marker = _STYLES[one.split]
        if one.sizes:
            widths, heights = zip(*one.sizes, strict=True)
            panel.scatter(
                widths,
                heights,
                s=[14 + 240 * count / most for count in one.sizes.values()],
                marker=marker,
                color=colour,
                alpha=0.4,
                label=f'{one.split}: {sum(one.sizes.values()):,} images',
            )
    if result.crop:
        height, width = result.crop
        panel.add_patch(Rectangle((0, 0), width, height, fill=False, linestyle='--', label=f'crop {width}x{height}'))
    panel.set(
        xlim=(0, None),
        ylim=(0, None),
        xlabel='width, pixels',
        ylabel='height, pixels',
        title='sizes of the images (larger marks: more of them)',
        aspect='equal',
        anchor='N',
    )


@command
def main() -> int:
    p = cli.parser(__doc__, 'check_data configs/upernet_replk31b_ade20k.py --full --json data.json')
    p.add_argument('config', help='config file, or PACKAGE::NAME.py (replk_mm::, mmseg::, ...)')
    p.add_argument('--data-root', metavar='DIR', help='folder of the data set (default: as in the config)')
    p.add_argument('--full', action='store_true', help='decode every image, label map and mask')
    cli.add_classes(p)
    p.add_argument('--json', type=Path, metavar='FILE', help='write all problems, class frequencies and image sizes')
    p.add_argument('--picture', type=Path, metavar='FILE.png', help='draw class frequencies and image sizes')
    p.add_argument('--jobs', type=cli.positive, metavar='N', help='processes (default: one a core)')
    cli.add_config_options(p)
    args = p.parse_args()
    if args.picture:
        check_suffix(args.picture)
    for option, path in (('--json', args.json), ('--picture', args.picture)):
        if path and path.is_dir():
            raise UserError(f'{option} {path}: is a folder\nName a file.')
        if path:  # before the long look, not after it
            prepare_work_dir(path.parent, option=option)
    cfg = load_config(args.config, args.cfg_options)
    if args.data_root:
        set_data_root(cfg, args.data_root)
    for note in use_classes(cfg, args.classes, ('train', 'val')) if args.classes is not None else []:
        print(note)
    result = audit(cfg, args.full, args.jobs)
    print(text(result))
    if args.json:
        write_atomic(args.json, as_json(result))
        print(f'written: {args.json}')
    if args.picture:
        drawn = draw(result, args.picture)
        print(f'written: {args.picture}' if drawn else f'not written: {args.picture}; no data set has anything to draw')
    return 1 if result.counts()['error'] else 0
