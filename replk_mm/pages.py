"""Blocks of Markdown pages that commands write, between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``."""

from pathlib import Path

from replk_mm.errors import UserError


def renewed(text: str, name: str, content: str, page: str) -> str:
    """A page's text with a block renewed.

    Args:
        text: Of the page.
        name: Of the block.
        content: What goes between its marks.
        page: What messages call the page.

    Raises:
        UserError: If the page has not one such block.
    """
    begin, end = f'<!-- {name}:begin -->', f'<!-- {name}:end -->'
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f'{page}: expected one block from {begin} to {end}\nAdd both lines where the table belongs.')
    return f'{text.partition(begin)[0]}{begin}\n{content}{end}{text.partition(end)[2]}'


def renew(page: Path, name: str, content: str) -> None:
    """Renew a block of a page; see :func:`renewed`.

    Raises:
        UserError: If the page cannot be read or written, or has not one such block.
    """
    try:
        text = page.read_text(encoding='utf-8')
        page.write_text(renewed(text, name, content, str(page)), encoding='utf-8')
    except OSError as error:
        raise UserError(f'{page}: {error.strerror or error}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{page}: not a text in UTF-8 ({error.reason} at byte {error.start})') from error
