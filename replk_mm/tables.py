"""Tables as plain text, for terminals, logs and files."""

import io
from collections.abc import Collection, Sequence

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: A rule below the head, and nothing else.
_BOX = Box('    \n    \n -- \n    \n    \n    \n    \n    \n', ascii=True)


def text_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Rows in aligned columns, the first row underlined.

    Args:
        rows: Cells as text; the first row is the head.
        left: Columns that are aligned to the left. Defaults to the first; all others are aligned to the right.
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
