"""HTML and SVG from values: every text is cleaned and escaped, whoever wrote it."""
import html
import re
from typing import Any

#: Longest text that is shown of a record, in characters.
LONGEST = 600

# What no page may hold (control characters, half surrogates), and marks that turn the direction of the text around them.
_UNFIT = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]')


class Markup(str):
    """Text that is markup already."""


def clean(text: object, longest: int = LONGEST) -> str:
    """A text without characters that disturb a page, cut to a bounded length."""
    found = str(text)
    found = found if len(found) <= longest else f'{found[:longest]}…'
    return _UNFIT.sub('\ufffd', found)


def escape(text: object, longest: int = LONGEST) -> Markup:
    """A text as markup, for content and for quoted attributes; what is markup stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(clean(text, longest)))


def tag(name: str, /, *content: object, **attributes: Any) -> Markup:
    """An element.

    Args:
        name: Of the element.
        content: Texts, which are escaped, or markup; None and False are left out.
        attributes: ``class_`` and the like without the underscore at the end, other underscores as hyphens; True for one
            without a value, None and False for none. Names with capital letters, as SVG has them, stay as they are.
    """
    given = ''.join(f' {key.rstrip("_").replace("_", "-")}' + ('' if value is True else f'="{escape(value)}"')
                    for key, value in attributes.items() if value is not None and value is not False)
    inside = ''.join(escape(part) for part in content if part is not None and part is not False)
    return Markup(f'<{name}{given}>' if name in _EMPTY else f'<{name}{given}>{inside}</{name}>')


_EMPTY = frozenset(('img', 'meta', 'br', 'col'))


def join(parts: Any, between: str = '') -> Markup:
    """Markup and texts one after the other."""
    return Markup(escape(between).join(escape(part) for part in parts))
