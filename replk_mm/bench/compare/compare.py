"""Compare two test results: conditions, metrics, classes, images, confidence interval; as data and as Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from replk_mm.analysis.statistics import paired_difference
from replk_mm.bench.compare import results
from replk_mm.bench.compare.results import DataSource
from replk_mm.engine.record import write_record
from replk_mm.files import write_output
from replk_mm.text import in_percent, markdown_text


def compare_results(
    path_a: str,
    path_b: str,
    source: DataSource | None = None,
    *,
    images: int | None = 8,
    kind: str = 'bbox',
    score: float = 0.3,
    out: Path | None = None,
) -> dict[str, Any]:
    """Compare two results of the test command.

    Args:
        path_a: See :func:`replk_mm.bench.compare.results.read_result`.
        path_b: The other result.
        source: Where data, config and classes are. Defaults to the places that the results state.
        images: Number of most changed images to list and draw; None compares no images.
        kind: For detection: ``'bbox'`` or ``'segm'``, the AP of the classes and the IoU of the images.
        score: For detection: minimum score of detections in the comparison of images.
        out: Folder for pictures of the most changed images.

    Returns:
        Plain data for JSON: ``task``, ``a``, ``b``, ``differences``, ``metrics`` and ``per_class``; with images also
        ``images``, ``statistics`` and, for ``out``, ``pictures``.

    Raises:
        UserError: If the results cannot be compared, or data or predictions are missing.
    """
    a, b = results.read_result(path_a, 'A'), results.read_result(path_b, 'B')
    results.check_comparable(a, b)
    source = source or DataSource()
    figure = 'IoU' if a.task == 'segmentation' else f'{kind}_mAP'
    found: dict[str, Any] = dict(
        version=2,
        task=a.task,
        a=a.facts(),
        b=b.facts(),
        differences=results.compare_conditions(a, b),
        metrics=results.compare_metrics(a, b),
        per_class=dict(figure=figure, size=results.SIZE[a.task], rows=results.compare_classes(a, b, figure)),
    )
    if images is None:
        return found
    root = results.find_data_root(a, b, source)
    compared: Any
    if a.task == 'segmentation':
        from replk_mm.bench.compare.segmentation import SegmentationImages

        compared = SegmentationImages((a, b), source, root)
    else:
        from replk_mm.bench.compare.detection import DetectionImages  # imports pycocotools

        compared = DetectionImages((a, b), source, root, kind, score)
    scores = compared.scores()
    changed = _most_changed(scores, images)
    found['images'] = _summarize(scores, compared) | dict(changed=changed, scores=scores)
    one, other = compared.statistics
    interval = paired_difference([other], [one])
    found['statistics'] = dict(
        figure=compared.overall_figure,
        unit=compared.unit,
        difference=interval.value,
        low=interval.low,
        high=interval.high,
        p=interval.p,
        images=interval.images,
    )
    found |= compared.extras()
    if out:
        from replk_mm.bench.compare.pictures import draw_label_maps, draw_objects, write_sheets

        sheet = (draw_label_maps if a.task == 'segmentation' else draw_objects)(compared, changed)
        titles = ['image', 'ground truth', f'A: {a.name}', f'B: {b.name}', 'where they differ']
        found['pictures'] = write_sheets(out, sheet, titles)
    return found


def _most_changed(scores: Sequence[dict], images: int) -> list[dict]:
    """Equal F1 may hide a change: ties are ordered by the change of objects found minus false detections."""

    def hidden(score: dict) -> int:
        return score['found_b'] - score['false_b'] - score['found_a'] + score['false_a'] if 'found_a' in score else 0

    changed = [score for score in scores if score['difference'] or hidden(score)]
    return sorted(changed, key=lambda s: (-abs(s['difference']), -abs(hidden(s)), s['image']))[:images]


def _summarize(scores: Sequence[dict], compared: Any) -> dict[str, Any]:
    differences = np.array([score['difference'] for score in scores])
    return dict(
        figure=compared.figure,
        unit=compared.unit,
        definition=compared.definition,
        count=compared.count,
        scored=len(scores),
        higher_in_b=int((differences > 0).sum()),
        higher_in_a=int((differences < 0).sum()),
        equal=int((differences == 0).sum()),
        median_difference=float(np.median(differences)),
    )


def render_comparison(found: dict[str, Any]) -> str:
    """A comparison as Markdown, conditions before figures; tables are aligned for terminals.

    Args:
        found: From :func:`replk_mm.bench.compare.compare.compare_results`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=ChainableUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else markdown_text(value),  # names come from files
    )
    environment.globals |= dict(table=_table)
    environment.filters |= dict(figure=_figure, pair=_pair, format_head='{} A, B'.format)
    environment.filters['fields'] = lambda row, *keys: [row[key] for key in keys]
    return environment.get_template('compare.md.j2').render(found=found)


def write_comparison(found: dict[str, Any], out: Path) -> list[Path]:
    """Write ``compare.json`` and ``compare.md``.

    Args:
        found: From :func:`replk_mm.bench.compare.compare.compare_results`.
        out: Existing folder; pictures are in it.

    Returns:
        All files of the comparison.

    Raises:
        UserError: If a file cannot be written.
    """
    data, text = out / 'compare.json', out / 'compare.md'
    write_record(found, data)
    write_output(text, render_comparison(found))
    return [data, text, *(out / name for name in found.get('pictures', ()))]


def _figure(value: float | None, unit: str, signed: bool = False) -> str:
    return '-' if value is None else f'{value:{"+" if signed else ""}.{2 if unit == "%" else 4}f}'


def _pair(row: dict[str, Any], unit: str, more: Sequence[str] = (), score: str = '') -> list[str]:
    """Cells of a row: name or image, A, B, difference, and further keys or pairs of keys (``found_a, found_b``)."""
    name = row.get('name') or row['image']
    a, b, difference = (row[x] and in_percent(score or name, row[x]) for x in ('a', 'b', 'difference'))
    cells = [name, _figure(a, unit), _figure(b, unit), _figure(difference, unit, True)]
    for key in more:
        values = [row[key]] if key in row else [row[f'{key}_a'], row[f'{key}_b']]
        cells.append(', '.join('-' if v is None else f'{v:.2f}' if isinstance(v, float) else f'{v:,}' for v in values))
    return cells


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A Markdown table with aligned columns, those after the first to the right."""
    cells = [[markdown_text(cell) for cell in row] for row in [head, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ['-' * widths[0], *(f'{"-" * (width - 1)}:' for width in widths[1:])])
    first, *others = widths
    lines = [' | '.join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in cells]
    return Markup('\n'.join(f'| {line} |' for line in lines))
