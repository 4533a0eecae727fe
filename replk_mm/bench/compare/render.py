"""A comparison of two results as Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from replk_mm.engine.record import write_record
from replk_mm.errors import UserError, printable
from replk_mm.files import write_atomic


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
        finalize=lambda value: value if isinstance(value, Markup) else _one_line(value),  # names come from files
    )
    environment.globals |= dict(table=_table)
    environment.filters |= dict(
        figure=_figure, pair=_pair, fields=lambda row, *keys: [row[key] for key in keys], format_head='{} A, B'.format
    )
    unit = '%' if found['task'] == 'segmentation' else ''
    return environment.get_template('compare.md.j2').render(found=found, unit=unit)


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
    try:
        write_atomic(text, render_comparison(found))
    except OSError as error:
        raise UserError(f'{text}: cannot be written ({error.strerror})\nChoose another --out DIR.') from error
    return [data, text, *(out / name for name in found.get('pictures', ()))]


def _one_line(value: object) -> str:
    return printable(str(value)).replace('\n', ' ')


def _figure(value: float | None, unit: str, signed: bool = False) -> str:
    return '-' if value is None else f'{value:{"+" if signed else ""}.{2 if unit == "%" else 4}f}'


def _pair(row: dict[str, Any], unit: str, more: Sequence[str] = ()) -> list[str]:
    """Cells of a row: name or image, A, B, difference, and further keys or pairs of keys (``found_a, found_b``)."""
    cells = [row.get('name') or row['image'], *(_figure(row[x], unit) for x in 'ab')]
    cells.append(_figure(row['difference'], unit, True))
    for key in more:
        values = [row[key]] if key in row else [row[f'{key}_a'], row[f'{key}_b']]
        cells.append(', '.join('-' if v is None else f'{v:.2f}' if isinstance(v, float) else f'{v:,}' for v in values))
    return cells


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A Markdown table with aligned columns, those after the first to the right."""
    cells = [[_one_line(cell).replace('|', r'\|') for cell in row] for row in [head, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ['-' * widths[0], *(f'{"-" * (width - 1)}:' for width in widths[1:])])
    first, *others = widths
    lines = [' | '.join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in cells]
    return Markup('\n'.join(f'| {line} |' for line in lines))
