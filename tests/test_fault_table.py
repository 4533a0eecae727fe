"""The table of injected faults: as long as promised, of tests that exist, and written as its fixture says."""
import re
from pathlib import Path

import pytest
from fault_table import plain, table

ROWS = re.compile(r'^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \| `(.+?)` \|$', re.MULTILINE)


def test_every_fault_in_the_table_has_its_test(root):
    rows = ROWS.findall((root / 'docs/faults.md').read_text())
    assert len(rows) >= 40
    assert [int(number) for number, *_ in rows] == list(range(1, len(rows) + 1))
    for _, what, sees, lost, node in rows:
        file, _, name = node.partition('::')
        assert f'def {name.partition("[")[0]}(' in (root / 'tests' / file).read_text(), node
        assert what and sees and lost
        assert '/tmp' not in sees, sees
    assert len({what for _, what, *_ in rows}) > 0.9 * len(rows), 'one fault is told in many lines'


def test_cells_hold_what_markdown_would_take_for_its_own():
    text = table([('a | b', '<x>', 'nothing', 'tests/test_a.py::test_b[c]')])
    assert '| 1 | a \\| b | &lt;x> | nothing | `test_a.py::test_b[c]` |' in text


def test_folders_of_this_machine_are_left_out(tmp_path):
    assert plain(f'error: {tmp_path}/run/x.pth: is bad') == 'run/x.pth: is bad'
    assert plain(f'{Path(__file__).resolve().parents[1]}/configs/a.py: no') == 'configs/a.py: no'
    long = plain('word ' * 100)
    assert len(long) < 210 and long.endswith(' ...')


def test_a_fault_needs_words(fault):
    with pytest.raises(StopIteration):
        fault('x', ' ')
