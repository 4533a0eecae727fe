"""Plain-text tables, and blocks of Markdown pages."""

import pytest

from replk_mm.errors import UserError
from replk_mm.text import text_table, update_page


def test_text_table_aligns_columns():
    rows = [('name', 'count', 'note'), ('a', '1', 'x'), ('longer', '[10]', 'yy')]
    assert text_table(rows, left=(0, 2)).splitlines() == [
        'name     count   note',
        '---------------------',
        'a            1   x',
        'longer    [10]   yy',
    ]


def test_one_block_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / 'page.md'
    text = 'a\n<!-- x:begin -->\n{}<!-- x:end -->\nb\n<!-- y:begin -->\nkept\n<!-- y:end -->\n'
    page.write_text(text.format('old\n'))
    update_page(page, 'x', 'new\n')
    assert page.read_text() == text.format('new\n')


@pytest.mark.parametrize(
    'content',
    [b'', b'<!-- x:end --><!-- x:begin -->', 2 * b'<!-- x:begin --><!-- x:end -->', b'\xff\xfe', None],
    ids=['no block', 'wrong order', 'two blocks', 'not UTF-8', 'no file'],
)
def test_page_without_one_block_is_rejected_and_unchanged(tmp_path, content):
    page = tmp_path / 'page.md'
    if content is not None:
        page.write_bytes(content)
    with pytest.raises(UserError, match=r'page\.md'):
        update_page(page, 'x', 'new\n')
    assert content is None or page.read_bytes() == content
