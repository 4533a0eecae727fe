"""docs/complexity.md, from the record of :mod:`replk_mm.analysis.complexity_published`."""
from collections.abc import Iterable, Iterator
from typing import Any

from replk_mm.analysis.complexity_published import AUTHORS, AUTHORS_KERNELS, OURS, difference, rounds

TASKS = {'segmentation': 'Segmentation', 'detection': 'Detection'}
INTRODUCTION = """Parameters in millions; MACs are billions of multiply-accumulates of one image, which papers call FLOPs.
"Ours" is the network as it is deployed: parallel kernels merged, BatchNorm folded, no auxiliary head, counted by torch
(`torch.utils.flop_counter`, half of its figure) on the meta device, so that no weights are allocated. "As the authors
count" is our reconstruction of their way of counting (below), computed here too. Percentages are against the published
figure.
"""
CONVENTIONS = """## How the published figures were counted

The papers give the sizes of the input and no more. Both groups worked with mmsegmentation 0.x and mmdetection 2.x, whose
`get_flops.py` ran a `forward_dummy` under mmcv's counter. mmcv still has that counter, and the pass is made here as then:

- A segmentor ends with the scores of its main head; resizing them to the image, sliding windows and scales are not in it. The
  auxiliary head does not run, but its parameters are in the model that was counted.
- A detector chooses no boxes. Every box head of a two-stage detector takes the same 1000 regions, each of a cascade's three
  stages too, and every mask head the first 100 of them. RoIAlign and NMS count nothing. (Today's `get_flops.py` runs on real
  images, a cascade's mask heads on up to 1000 regions: its figures are others.)
- mmcv's counter goes by layers: besides convolutions and linear layers it counts a bias and a ReLU once for each number,
  BatchNorm, GroupNorm and torch's own LayerNorm twice; SyncBN, GELU, layer scales and the authors' own LayerNorm not at
  all. torch's counter counts convolutions and matrix products only.

Which form was counted nobody wrote down; it shows in the figures. For each way to count, rows that come out as published when
rounded, and the largest difference:
"""


def page(record: dict[str, Any]) -> str:
    """The text of the page."""
    rows, parts = record['rows'], []
    for task, title in TASKS.items():
        if any(row['task'] == task for row in rows):
            parts += [f'## {title}\n', table(rows, task)]
    libraries = ', '.join(f'{name} {number}' for name, number in record['versions'].items())
    return '\n'.join([
        f'<!-- Do not edit: written by `{record["command"]}` -->\n# Complexity\n', INTRODUCTION,
        f'Counted by `{record["command"]}` with {libraries}. For other networks and sizes, part by part:\n',
        '```bash\npython tools/complexity.py configs/upernet_replk31b_ade20k.py --shape 512 512\n'
        'python tools/complexity.py mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py --json\n```\n',
        *parts, _verdict(record), CONVENTIONS, _countings(record), *_exceptions(rows), _uncounted(rows)])


def tables(record: dict[str, Any]) -> str:
    """The tables alone."""
    return '\n'.join(table(record['rows'], task) for task in TASKS)


def table(rows: Iterable[dict[str, Any]], task: str) -> str:
    """A Markdown table of the rows of one task."""
    lines = ['| Config | Input | Params, M: published | ours | as the authors count | MACs, G: published | ours '
             '| as the authors count | Status |', f'|{" --- |" * 9}']
    for row in rows:
        if row['task'] == task:
            stated, ours = row['published'], row['counts'][OURS]
            name = row['config'].removesuffix('.py')
            cells = (f'[{name}](../configs/{row["config"]})', '{}x{}'.format(*row['input']), f'{stated["parameters_m"]:g}',
                     _figure(ours, row, 'parameters'), _figure(row['authors'], row, 'parameters'), f'{stated["macs_g"]:g}',
                     _figure(ours, row, 'macs'), _figure(row['authors'], row, 'macs'), row['status'])
            lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def _figure(count: dict[str, Any], row: dict[str, Any], what: str) -> str:
    unit, digits = (1e6, 1) if what == 'parameters' else (1e9, 2)
    return f'{count[what] / unit:.1f} ({difference(count, row, what):+.{digits}f} %)'


def _verdict(record: dict[str, Any]) -> str:
    limits = record['tolerance_percent']
    text = (f'"within": ours is within {limits["parameters"]:g} % of the published parameters and {limits["macs"]:g} % of the '
            f'published MACs. "explained": only counted as the authors did is it.')
    odd = [row['config'] for row in record['rows'] if row['status'] == 'unexplained']
    if odd:
        return f'{text} **Not explained: {", ".join(odd)}.**\n'
    return f'{text} Every row is one of the two; the next section ends with those whose last digit is still missing.\n'


def _countings(record: dict[str, Any]) -> str:
    families = [family for family in AUTHORS if any(row['backbone'].startswith(family) for row in record['rows'])]
    lines = [f'| Way to count |{"".join(f" {family}: params | {family}: MACs |" for family in families)}',
             f'| --- |{" --- |" * 2 * len(families)}']
    ways = {name: f'{text}{" (ours)" if name == OURS else ""}' for name, text in record['countings'].items()}
    for way, text in {**ways, 'authors': '**as the authors count, in the tables above**'}.items():
        cells = []
        for family in families:
            members = [(row['authors'] if way == 'authors' else row['counts'][way], row)
                       for row in record['rows'] if row['backbone'].startswith(family)]
            for what in ('parameters', 'macs'):
                equal = sum(rounds(figures, row, what) for figures, row in members)
                worst = max((difference(figures, row, what) for figures, row in members), key=abs)
                cells.append(f' {equal} of {len(members)}, {worst:+.2f} % |')
        lines.append(f'| {text} |{"".join(cells)}')
    chosen = '; '.join(f'{family}: {record["countings"][AUTHORS[family]]}' for family in families)
    return '\n'.join(lines) + f'\n\nAs the authors count, then: {chosen}.\n'


def _exceptions(rows: list[dict[str, Any]]) -> Iterator[str]:
    for backbone, kernels in AUTHORS_KERNELS.items():
        members = [row for row in rows if row['backbone'] == backbone]
        if members:
            figures = '; '.join(
                f'{row["method"]}: published {row["published"]["macs_g"]:g} G, with the released kernels '
                f'{row["counts"][row["authors"]["counting"]]["macs"] / 1e9:.1f} G, with these '
                f'{row["authors"]["macs"] / 1e9:.1f} G' for row in members)
            yield (f'{backbone}: the published figures come out with kernels {", ".join(map(str, kernels))} in the four '
                   f'stages; the network that its authors released, and ours, has others. {figures}.\n')
    missed = [row for row in rows if not (rounds(row['authors'], row, 'macs') and rounds(row['authors'], row, 'parameters'))]
    if missed:
        yield ('Rows that no way of counting known to us gives to the last digit: '
               + '; '.join(f'{row["config"].removesuffix(".py")} (published {row["published"]["parameters_m"]:g} M, '
                           f'{row["published"]["macs_g"]:g} G; as the authors count '
                           f'{row["authors"]["parameters"] / 1e6:.2f} M, {row["authors"]["macs"] / 1e9:.2f} G)'
                           for row in missed) + '.\n')


def _uncounted(rows: list[dict[str, Any]]) -> str:
    names = sorted({operator['name'] for row in rows for operator in row['uncounted']})
    share, config = max((sum(o['elements'] for o in row['uncounted']) / row['counts'][OURS]['macs'], row['config'])
                        for row in rows)
    notes = list(dict.fromkeys(note for row in rows for note in row['notes']))
    text = (f'Operators that run and have no formula: {", ".join(names)}. Were each number that they put out one '
            f'multiply-accumulate, they would add {100 * share:.2f} % at most ({config}).\n')
    return '\n'.join(['## What ours leaves out\n', text, *(f'- {note}' for note in notes), ''])
