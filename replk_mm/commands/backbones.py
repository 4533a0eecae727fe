"""List the backbones of the catalogue: size, feature maps, published results, weights. Download their weights."""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from replk_mm import cli
from replk_mm.analysis.complexity import count_complexity, reparameterize_on_meta
from replk_mm.backbones.adapters import require
from replk_mm.backbones.catalogue import (
    ADAPTERS,
    CatalogueEntry,
    find_backbone,
    is_permissive,
    licence_of,
    list_backbones,
    measure_features,
    recipe_of,
    run_on_meta,
)
from replk_mm.bench.report.field import read_rows, render_field
from replk_mm.checkpoints.io import fetch_checkpoint, hash_checkpoint
from replk_mm.errors import UserError, command
from replk_mm.files import write_atomic
from replk_mm.logs import show_progress
from replk_mm.published import METRICS
from replk_mm.registry import MODELS
from replk_mm.text import text_table, update_page

#: Height and width at which multiply-accumulates are counted, in pixels.
SHAPE = (512, 512)
HEAD = ('Backbone', 'Pretraining', 'Params, M', 'MACs, G', 'Channels', 'Strides', 'mIoU', 'AP', 'Weights licence')
NOTES = f"""\
Parameters and multiply-accumulates (MACs) are those of the backbone alone, merged, at {SHAPE[0]}x{SHAPE[1]}.
Results are quoted: mIoU single-scale / multi-scale of UperNet (of MSCAN: of SegNeXt) on ADE20K, @ the crop; AP box /
mask of Cascade Mask R-CNN on COCO after 36 epochs, or of Mask R-CNN (M), which for ConvNeXt V2 trains with large-scale
jittering and tests with soft-NMS. --json has all rows.
A name without a tag takes the weights of its first line. Many authors state a licence for their code, but not for
their weights. Those of VAN and SegNeXt (MSCAN) ask commercial users to contact them.
"""


def describe(entry: CatalogueEntry) -> Iterator[dict[str, Any]]:
    """Facts about an entry as plain data, once for each of its weights."""
    features = measure_features(entry.config)
    model = run_on_meta(lambda: MODELS.build(dict(entry.config)))
    size = count_complexity(reparameterize_on_meta(model)[0], SHAPE)
    for weights in entry.weights or (None,):
        rows = {task: entry.published(task, weights) if weights else [] for task in ('segmentation', 'detection')}
        yield dict(
            name=entry.full_name(weights),
            config=dict(entry.config),
            parameters=size.parameters,
            macs=size.macs,
            macs_shape=list(SHAPE),
            channels=[f['num_chs'] for f in features],
            strides=[f['reduction'] for f in features],
            mean=list(entry.mean),
            std=list(entry.std),
            source=entry.source,
            code_licence=entry.licence,
            weights=weights
            and dict(pretraining=weights.pretraining, url=weights.url, sha256=weights.sha256, licence=weights.licence),
            published=[
                dict(
                    task=task,
                    method=row.method,
                    dataset=row.dataset,
                    crop=row.crop,
                    schedule=row.schedule,
                    **{name: row.metrics.get(name) for name in METRICS},
                    recipe=(recipe := recipe_of(row)) and asdict(recipe),
                )
                for task, found in rows.items()
                for row in found
            ],
        )


def cells(found: dict[str, Any], licence: str) -> tuple[str, ...]:
    """One line of the table."""
    rows = found['published']

    def metrics(row: dict, first: str, second: str, after: str) -> str:
        return ' / '.join(f'{row[k]:.1f}' if row[k] is not None else '-' for k in (first, second)) + after

    segmented = [r for r in rows if r['dataset'] == 'ADE20K' and r['method'] in ('UperNet', 'SegNeXt')]
    miou = [metrics(r, 'miou_ss', 'miou_ms', f' @{r["crop"]}') for r in segmented]
    detected = [r for r in rows if r['schedule'] == '36 epochs']
    ap = [metrics(r, 'ap_box', 'ap_mask', '') for r in detected if r['method'] == 'Cascade Mask R-CNN']
    ap += [metrics(r, 'ap_box', 'ap_mask', ' M') for r in detected if r['method'] == 'Mask R-CNN']
    return (
        found['name'],
        found['weights']['pretraining'] if found['weights'] else 'none',
        f'{found["parameters"] / 1e6:.1f}',
        f'{found["macs"] / 1e9:.1f}',
        ', '.join(map(str, found['channels'])),
        ', '.join(map(str, found['strides'])),
        '; '.join(miou) or '-',
        '; '.join(ap) or '-',
        licence,
    )


def write_field(page: Path, complexity: Path, benchmarks: Iterable[Path]) -> None:
    """Write the picture of the field.

    Args:
        page: The HTML file.
        complexity: Record of the command ``complexity --published``.
        benchmarks: Records of the command ``benchmark backbone --backbone NAME``.

    Raises:
        UserError: If a record cannot be read or has other rows.
    """
    try:
        record = json.loads(complexity.read_text(encoding='utf-8'))
        measured = [json.loads(path.read_text(encoding='utf-8')) for path in benchmarks]
    except (OSError, ValueError) as error:
        raise UserError(f'--plot: {error}\nName the records with --complexity and --latency.') from error
    entries = {name: find_backbone(name)[0] for name in list_backbones()}
    licences = {
        entry.paper_name: (licence_of(entry, weights), is_permissive(entry, weights))
        for entry in entries.values()
        if entry.paper_name
        for weights in (entry.weights[0] if entry.weights else None,)
    }
    latencies: dict[str, float] = {}
    machines: set[str] = set()
    for found in measured:
        name = str((found.get('cfg_options') or {}).get('backbone')).partition('.')[0]
        points = [point for point in found.get('points', ()) if point['mode'] == 'inference']
        if found.get('what') != 'backbone' or name not in entries or not points:
            raise UserError('--latency: not a record of benchmark backbone --backbone NAME\nMeasure with this command.')
        ours = next(row for row in points[0]['rows'] if row['name'] == 'ours')
        latencies[entries[name].paper_name or name] = ours['milliseconds']['median']
        where = found['environment']
        machines.add(
            f'{where.get("cpu") or where.get("gpu") or "one machine"}, {where.get("cores")} cores, '
            f'1x3x{points[0]["height"]}x{points[0]["width"]}, float32'
        )
    if len(machines) > 1:
        raise UserError(f'--latency: records of different conditions: {"; ".join(sorted(machines))}\nUse one machine.')
    rows = read_rows(record, licences, latencies)
    write_atomic(page, render_field(rows, ''.join(machines), f'python tools/backbones.py --plot {page.name}'))


def download(name: str) -> Path:
    """Fetch and verify the weights of a name.

    Raises:
        UserError: If there are none, they cannot be fetched, or the file is damaged.
    """
    entry, weights = find_backbone(name)
    weights = weights or entry.require_weights()
    if not weights.url:
        raise UserError(f'{name}: another library loads these weights\nUse them with pretrained=True.')
    path = fetch_checkpoint(weights.url)
    digest = hash_checkpoint(path)
    if not digest.startswith(weights.sha256 or ''):
        raise UserError(
            f'{path}: SHA-256 {digest}, expected {weights.sha256}...\nRemove the file and download it again.'
        )
    checked = 'verified' if weights.sha256 else 'no published SHA-256 to verify'
    print(f'{entry.full_name(weights)}: {path} (SHA-256 {digest}, {checked})')
    return path


@command
def main() -> None:
    p = cli.parser(__doc__, 'backbones convnext', 'backbones convnext-base.in22k --download')
    p.add_argument('pattern', nargs='?', default='*', help='part of the names, or a pattern such as "convnext-*.in22k"')
    p.add_argument('--json', action='store_true', help='print JSON only, with sources, addresses and recipes')
    p.add_argument('--licence', choices=['permissive'], help='leave out weights that forbid commercial use')
    p.add_argument('--download', action='store_true', help='download and verify the weights of one name')
    p.add_argument('--write', type=Path, metavar='PAGE', help='replace the block "backbones" of this page')
    p.add_argument('--plot', type=Path, metavar='PAGE', help='write the picture of the field, an HTML page')
    p.add_argument(
        '--complexity', type=Path, default=Path('docs/complexity.json'), metavar='FILE', help='for --plot: %(default)s'
    )
    p.add_argument(
        '--latency', type=Path, nargs='+', default=[], metavar='FILE', help='for --plot: benchmark.json of backbones'
    )
    args = p.parse_args()
    if args.plot:
        write_field(args.plot, args.complexity, args.latency)
        print(f'written: {args.plot}')
        return
    if args.download:
        download(args.pattern)
        return
    adapted = re.split('[/.]', args.pattern)[0] in ADAPTERS
    base = args.pattern if adapted else args.pattern.partition('.')[0]
    known = [find_backbone(name)[0] for name in ([base] if adapted else list_backbones(base))]
    page = args.write.read_text(encoding='utf-8') if args.write and args.write.is_file() else ''
    written = [tuple(line.strip('| ').split(' | ')) for line in page.splitlines() if line.startswith('| ')]
    absent: list[CatalogueEntry] = []  # their lines in a page stay
    found: list[dict] = []
    table: list[tuple[str, ...]] = [HEAD]
    for entry in show_progress(known, 'backbones'):
        if entry.package and find_spec(entry.package) is None:
            absent.append(entry)
            table += [row for row in written if row[0].partition('.')[0] == entry.name]
            continue
        for weights, facts in zip(entry.weights or (None,), describe(entry), strict=True):
            tag = facts['name'].partition('.')[2]
            matches = args.pattern == base or fnmatchcase(tag, args.pattern.partition('.')[2])
            if matches and (not args.licence or is_permissive(entry, weights)):
                found.append(facts)
                table.append(cells(facts, licence_of(entry, weights)))
    if absent and not found:
        require(str(absent[0].package), absent[0].name)
    if absent:
        names = ', '.join(entry.name for entry in absent)
        print(f'not measured: {names}: the package {absent[0].package} is not installed', file=sys.stderr)
    if not found:
        if not known or not args.licence:
            find_backbone(args.pattern if known else base)  # its error has a hint
        raise UserError(f'{args.pattern}: all weights forbid commercial use\nOmit --licence {args.licence}.')
    if args.write:
        lines = [f'| {" | ".join(row)} |\n' for row in table]
        update_page(args.write, 'backbones', ''.join([lines[0], f'|{" --- |" * len(HEAD)}\n', *lines[1:], '\n', NOTES]))
        print(f'written: {args.write}')
    else:
        print(json.dumps(found, indent=2) if args.json else f'{text_table(table, left=(0, 1))}\n\n{NOTES}', end='')
