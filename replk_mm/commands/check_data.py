"""Check the data sets of a config: folders, pairs, annotations, classes and images.

Without --full a sample of the images is decoded, as before training. Exit status: 0 without errors (there may be
warnings and notes), 1 with errors, 2 for a mistake in the command.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from replk_mm import __version__, cli
from replk_mm.data.checks.audit import Audit, audit
from replk_mm.data.checks.dataset import DatasetReport
from replk_mm.data.classes import use_classes
from replk_mm.data.datasets import crop_of
from replk_mm.data.findings import CODES, SEVERITIES, SHOWN, Finding
from replk_mm.engine.config import load_config, set_data_root
from replk_mm.engine.process import prepare_work_dir
from replk_mm.errors import UserError, command, printable
from replk_mm.files import GENERATOR, check_outputs, write_output
from replk_mm.visualize import write_figure

#: Version of the JSON format. It increases when a key is removed or changes its meaning.
FORMAT = 2
#: Characters of a message in a terminal.
_WIDTH = 160
# Colours of Okabe and Ito, which colour-blind readers can tell apart; the markers differ as well.
_STYLES = {'train': ('#0072B2', 'o'), 'val': ('#D55E00', '^'), 'test': ('#009E73', 's')}


def format_audit(result: Audit) -> str:
    """The data sets, a block for each code of findings, and a summary."""
    lines = [str(dataset) for dataset in result.datasets]
    groups: dict[tuple[int, str], list[Finding]] = defaultdict(list)
    for _, finding in result.findings():
        groups[SEVERITIES.index(finding.severity), finding.code].append(finding)
    for (severity, code), findings in sorted(groups.items(), key=lambda item: item[0][0]):
        lines += ['', *_format_findings(SEVERITIES[severity], code, findings)]
    return printable('\n'.join([*lines, '', *_summarize(result)]))


def _format_findings(severity: str, code: str, findings: list[Finding]) -> list[str]:
    occurrences = [occurrence for finding in findings for occurrence in finding.occurrences]
    lines = [f'{severity} {code}: {len(occurrences):,}']
    for message, entry, path in occurrences[:SHOWN]:
        message = message if len(message) <= _WIDTH else f'{message[:_WIDTH].rpartition(" ")[0]} ...'
        lines.append(f'  {path}{f", {entry}" if entry else ""}: {message}')
    if len(occurrences) > SHOWN:
        lines.append(f'  ... and {len(occurrences) - SHOWN:,} more')
    expected = dict.fromkeys(finding.expected for finding in findings if finding.expected)
    fixes = list(dict.fromkeys(finding.fix for finding in findings))[:SHOWN]
    return [*lines, *(f'  expected: {values}' for values in expected), *(f'  fix: {fix}' for fix in fixes)]


def _summarize(result: Audit) -> list[str]:
    """What was checked, and the number of findings of each severity."""
    counts = result.counts()
    inspected = sum(dataset.inspected for dataset in result.datasets)
    total = sum(len(dataset.samples) for dataset in result.datasets)
    found = ', '.join(f'{counts[severity]:,} {severity}{"s" * (counts[severity] != 1)}' for severity in SEVERITIES)
    lines = [
        f'checked: folders, annotations and classes of {len(result.datasets)} data sets, {inspected:,} of {total:,} '
        f'images, in {result.seconds:.1f} s',
        f'found: {found}',
    ]
    if not result.full:
        others = 'other images, ' if inspected < total else ''
        lines.insert(1, f'not checked without --full: {others}copies of an image under another name')
    return lines


def to_json(result: Audit) -> str:
    """All findings, class frequencies and image sizes as JSON."""
    findings = []
    codes: dict[str, dict[str, Any]] = {}
    for split, finding in result.findings():
        for message, entry, path in finding.occurrences:
            record = dict(
                code=finding.code,
                severity=finding.severity,
                split=split,
                path=path,
                entry=entry,
                message=message,
                expected=finding.expected,
                fix=finding.fix,
            )
            findings.append({key: printable(value) for key, value in record.items()})
        code = codes.setdefault(finding.code, dict(severity=finding.severity, count=0, fix=CODES[finding.code][1]))
        code['count'] += len(finding.occurrences)
        code['severity'] = min(code['severity'], finding.severity, key=SEVERITIES.index)  # the worst of them
    counts = result.counts()
    content = dict(
        **GENERATOR,
        format=FORMAT,
        version=__version__,
        config=result.config,
        full=result.full,
        seconds=round(result.seconds, 3),
        counts={severity: counts[severity] for severity in SEVERITIES},
        codes=codes,
        findings=findings,
        datasets=[
            dict(
                key=dataset.key,
                split=dataset.split,
                type=dataset.type,
                root=printable(dataset.root),
                images=len(dataset.samples),
                inspected=dataset.inspected,
                unit=dataset.unit,
                classes={printable(name): count for name, count in dataset.class_counts().items()},
                sizes=[dict(width=w, height=h, images=count) for (w, h), count in sorted(dataset.sizes.items())],
            )
            for dataset in result.datasets
        ],
    )
    return json.dumps(content, indent=1, ensure_ascii=False) + '\n'


def plot(result: Audit, path: Path, crop: tuple[int, int] | None = None) -> bool:
    """Plot class frequencies and image sizes.

    Args:
        result: The audit.
        path: The file to write; its suffix sets the format.
        crop: Height and width of the training crop, pixels. Defaults to none.

    Returns:
        Whether there was something to plot: the checks may have read no data set.

    Raises:
        UserError: If the file cannot be written.
    """
    datasets = [dataset for dataset in result.datasets if dataset.class_counts() or dataset.sizes]
    if not datasets:
        return False
    totals: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_STYLES, 0))
    for dataset in datasets:
        for name, count in dataset.class_counts().items():
            totals[name][dataset.split] += count
    names = sorted((name for name in totals if any(totals[name].values())), key=lambda name: sum(totals[name].values()))
    figure = Figure(figsize=(11, max(5, 1.5 + 0.16 * len(names))), layout='constrained')
    frequencies, sizes = figure.subplots(1, 2)
    for split in dict.fromkeys(dataset.split for dataset in datasets):
        colour, marker = _STYLES[split]
        counts = [totals[name][split] or np.nan for name in names]
        frequencies.plot(counts, np.arange(len(names)), marker, color=colour, markersize=4, label=split)
    labels = [printable(name).strip().replace('$', r'\$') for name in names]
    frequencies.set_yticks(range(len(names)), labels, fontsize=7)
    frequencies.set(
        xscale='log',
        xlabel=f'{" and ".join(sorted({dataset.unit for dataset in datasets}))}, log scale',
        ylim=(-0.6, max(1, len(names)) - 0.4),
        title=f'{len(names)} of {len(totals)} classes occur',
    )
    _plot_sizes(sizes, datasets, crop)
    for panel in (frequencies, sizes):
        panel.grid(True, color='#dddddd', linewidth=0.6)
        panel.legend(fontsize=8)
    inspected = 'every file' if result.full else 'a sample of the images'
    figure.suptitle(f'{printable(Path(result.config).stem)}: {inspected} inspected')
    write_figure(path, figure, dpi=130)
    return True


def _plot_sizes(panel: Axes, datasets: list[DatasetReport], crop: tuple[int, int] | None) -> None:
    """Plot width against height; the area of a marker shows the number of images."""
    largest = max((count for dataset in datasets for count in dataset.sizes.values()), default=1)
    for dataset in datasets:
        colour, marker = _STYLES[dataset.split]
        if dataset.sizes:
            widths, heights = zip(*dataset.sizes, strict=True)
            areas = [14 + 240 * count / largest for count in dataset.sizes.values()]
            label = f'{dataset.split}: {sum(dataset.sizes.values()):,} images'
            panel.scatter(widths, heights, s=areas, marker=marker, color=colour, alpha=0.4, label=label)
    if crop:
        height, width = crop
        panel.add_patch(Rectangle((0, 0), width, height, fill=False, linestyle='--', label=f'crop {width}x{height}'))
    panel.set(
        xlim=(0, None),
        ylim=(0, None),
        xlabel='width, pixels',
        ylabel='height, pixels',
        title='image sizes (larger markers: more images)',
        aspect='equal',
        anchor='N',
    )


def _check_outputs(args: argparse.Namespace) -> None:
    """Reject outputs that cannot be written, before the long check."""
    suffixes = Figure().canvas.get_supported_filetypes()
    if args.picture and args.picture.suffix.lower().removeprefix('.') not in suffixes:
        raise UserError(
            f'--picture {args.picture}: unknown picture format {args.picture.suffix!r}\n'
            f'Name a file that ends with .png, .jpg, .webp, .pdf or .svg.'
        )
    for option, path in (('--json', args.json), ('--picture', args.picture)):
        if path:
            prepare_work_dir(path.parent, option=option)
            check_outputs([path], inputs=[args.config], overwrite=args.overwrite)


def _next_step(args: argparse.Namespace, has_errors: bool) -> str:
    if has_errors:
        return 'fix the errors, then run this command again'
    return cli.follow_up('train', args)


@command
def main() -> int:
    p = cli.parser(__doc__, 'check_data configs/upernet_replk31b_ade20k.py --full --json data.json')
    p.add_argument('config', help='config file, or PACKAGE::NAME.py (replk_mm::, mmseg::, ...)')
    p.add_argument('--data-root', metavar='DIR', help='folder of the data set (default: as in the config)')
    p.add_argument('--full', action='store_true', help='decode every image, label map and mask')
    cli.add_classes(p)
    p.add_argument('--json', type=Path, metavar='FILE', help='write all findings, class frequencies and image sizes')
    p.add_argument('--picture', type=Path, metavar='FILE.png', help='plot class frequencies and image sizes')
    p.add_argument('--jobs', type=cli.positive_int, metavar='N', help='number of processes (default: one per core)')
    cli.add_overwrite(p)
    cli.add_config_options(p)
    args = p.parse_args()
    _check_outputs(args)
    cfg = load_config(args.config, args.cfg_options)
    if args.data_root:
        set_data_root(cfg, args.data_root)
    for note in use_classes(cfg, args.classes, ('train', 'val')) if args.classes is not None else []:
        print(note)
    result = audit(cfg, args.full, args.jobs)
    print(format_audit(result))
    if args.json:
        write_output(args.json, to_json(result))
        print(f'written: {args.json}')
    if args.picture:
        crop = crop_of(cfg) if 'model' in cfg else None
        is_written = plot(result, args.picture, crop)
        print(f'written: {args.picture}' if is_written else f'not written: {args.picture} (nothing to plot)')
    has_errors = result.counts()['error'] > 0
    print(f'next: {_next_step(args, has_errors)}')
    return 1 if has_errors else 0
