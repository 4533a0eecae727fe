"""Plain-text tables, and blocks of Markdown pages."""

import pytest

from replk_mm.errors import UserError
from replk_mm.text import class_table, format_duration, in_percent, text_table, update_page


def test_text_table_aligns_columns():
    rows = [('name', 'count', 'note'), ('a', '1', 'x'), ('longer', '[10]', 'yy')]
    assert text_table(rows, left=(0, 2)).splitlines() == [
        'name     count   note',
        '---------------------',
        'a            1   x',
        'longer    [10]   yy',
    ]


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [
        (0.42, '0.42 s'),
        (9.9, '9.9 s'),
        (59.4, '59 s'),
        (59.6, '1 min 0 s'),
        (200, '3 min 20 s'),
        (3600 + 61 * 5, '1 h 5 min'),
        (2 * 86400 + 3 * 3600 + 59 * 60, '2 d 3 h'),
    ],
)
def test_durations_have_their_two_largest_units(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ('name', 'percent'),
    [('mIoU', 0.5), ('coco/bbox_mAP_50', 50), ('coco/AR@100', 50), ('car_precision', 50), ('mPrecision', 0.5)],
)
def test_scores_of_mmdet_are_fractions(name, percent):
    assert in_percent(name, 0.5) == percent


def test_classes_are_ordered_by_size_with_their_share():
    per_class = dict(road=dict(IoU=40.0, pixels=25), sky=dict(IoU=90.0, pixels=75))
    assert [line.split() for line in class_table(per_class).splitlines()[2:]] == [
        ['sky', '90.00', '75.0', '%'],
        ['road', '40.00', '25.0', '%'],
    ]
    assert class_table(dict(cat=dict(bbox_mAP=0.5, instances=3))).splitlines()[2].split() == ['cat', '50.00', '3']


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
