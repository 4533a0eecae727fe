"""Tables and figures as plain text, and blocks of Markdown pages that commands write."""

import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from replk_mm.errors import UserError, format_list
from replk_mm.files import write_atomic

#: A line below the head, and no other lines.
_BOX = Box('    \n    \n -- \n    \n    \n    \n    \n    \n', ascii=True)
#: Longest text of a record that is shown, in characters.
LONGEST = 600

# Characters that no page may hold (control characters, lone surrogates), and marks that change the direction of text.
_UNFIT = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]')
# What Markdown or the HTML within it would interpret; not the underscores within words.
_MARKDOWN = re.compile(r'([\\`*{}\[\]<>#|~&]|(?<!\w)_|_(?!\w))')


def clean(text: object, longest: int = LONGEST) -> str:
    """A text without characters that disturb a page, cut to a bounded length. It is not escaped: Jinja2 does that."""
    found = str(text)
    return _UNFIT.sub('\ufffd', found if len(found) <= longest else f'{found[:longest]}…')


def markdown_text(text: object) -> str:
    """A text that Markdown shows as it is, in one line."""
    return _MARKDOWN.sub(r'\\\1', ' '.join(clean(text).split()))


def text_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Format rows as a table with aligned columns and an underlined head.

    Args:
        rows: Cells as text; the first row is the head.
        left: Indices of left-aligned columns; the others are right-aligned. Defaults to the first.
    """
    table = Table(box=_BOX, show_edge=False, pad_edge=False)
    for i, name in enumerate(rows[0]):
        table.add_column(Text(name), justify='left' if i in left else 'right', no_wrap=True)
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    with console.capture() as text:
        console.print(table)
    return '\n'.join(line.rstrip() for line in text.get().splitlines())


def markdown_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """The same table in Markdown, after an empty line; see :func:`text_table`."""
    rule = ['---' if i in left else '---:' for i in range(len(rows[0]))]
    return '\n'.join(['', *(f'| {" | ".join(row)} |' for row in (rows[0], rule, *rows[1:]))])


def format_duration(seconds: float) -> str:
    """A duration in its two largest units: ``'0.4 s'``, ``'24 s'``, ``'3 min 20 s'``, ``'2 h 5 min'``."""
    if seconds < 10:
        return f'{seconds:.2g} s'
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, 'd', 3600, 'h'), (3600, 'h', 60, 'min'), (60, 'min', 1, 's')):
        if whole >= size:
            return f'{whole // size} {unit} {whole % size // smaller} {name}'
    return f'{whole} s'


def in_percent(name: str, score: float) -> float:
    """A score in percent, as those of mmseg are. AP and AR of mmdet are fractions."""
    return 100 * score if re.search(r'AP|AR@|_precision$', name) else score


def class_table(per_class: dict[str, dict[str, float]], absent: Sequence[str] = ()) -> str:
    """The scores of each class in percent, largest classes first; ``absent`` have no ground truth."""
    size = next(name for name in ('pixels', 'instances') if name in next(iter(per_class.values())))
    total = sum(figures[size] for figures in per_class.values())
    names = [name for name in next(iter(per_class.values())) if name != size]
    rows = [('class', *names, 'share of pixels' if size == 'pixels' else 'objects')]
    for name, figures in sorted(per_class.items(), key=lambda item: -item[1][size]):
        amount = f'{100 * figures[size] / total:.1f} %' if size == 'pixels' else f'{figures[size]}'
        scores = [f'{in_percent(key, figures[key]):.2f}' if key in figures else '' for key in names]
        rows.append((name, *scores, amount))
    amount = 'no pixels' if size == 'pixels' else 'no objects'
    return text_table([*rows, *((name, *('-' for _ in names), amount) for name in absent)])


def format_metrics(metrics: Mapping[str, Any], absent: Sequence[str] = ()) -> str:
    """The scores among metrics in one line, AP in percent, and the classes without ground truth.

    Durations are left out, and NaN (of mmdet: -1), the value of an area or a class without ground truth.
    """
    text = '  '.join(
        f'{name} {in_percent(name, float(value)):{".2f" if in_percent(name, 1) > 1 else ".4g"}}'
        for name, value in metrics.items()
        if isinstance(value, Real)  # of numpy too
        and name not in ('data_time', 'time')
        and value != -1
        and not math.isnan(value)
    )
    return text + (f' ({len(absent)} classes have no ground truth: {format_list(absent)})' if absent else '')


def update_page(page: Path, name: str, content: str) -> None:
    """Replace the content of a block in a page, from ``<!-- NAME:begin -->`` to ``<!-- NAME:end -->``.

    Raises:
        UserError: If the page cannot be read or written, or does not have exactly one block of that name.
    """
    begin, end = f'<!-- {name}:begin -->', f'<!-- {name}:end -->'
    try:
        text = page.read_text(encoding='utf-8')
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise UserError(
                f'{page}: expected one block from {begin} to {end}\nAdd both lines where the table belongs.'
            )
        new = f'{text.partition(begin)[0]}{begin}\n{content}{end}{text.partition(end)[2]}'
        write_atomic(page.resolve(), new)
    except OSError as error:
        raise UserError(f'{page}: {error.strerror or error}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{page}: not a text in UTF-8 ({error.reason} at byte {error.start})') from error
