"""Blocks of Markdown pages that commands write."""

import pytest

from replk_mm.errors import UserError
from replk_mm.text import renew


def test_one_block_is_renewed_and_nothing_else(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n<!-- y:begin -->\nkept\n<!-- y:end -->\n')
    renew(page, 'x', 'new\n')
    assert page.read_text() == 'a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb\n<!-- y:begin -->\nkept\n<!-- y:end -->\n'


@pytest.mark.parametrize(
    'content, told',
    [
        (b'', 'expected one block'),
        (b'<!-- x:end --><!-- x:begin -->', 'expected one block'),
        (2 * b'<!-- x:begin --><!-- x:end -->', 'expected one block'),
        (b'\xff\xfe', 'not a text'),
        (None, 'No such file'),
    ],
)
def test_a_page_without_the_block_is_refused_and_kept(tmp_path, content, told):
    page = tmp_path / 'page.md'
    if content is not None:
        page.write_bytes(content)
    with pytest.raises(UserError, match=told):
        renew(page, 'x', 'new\n')
    assert content is None or page.read_bytes() == content
