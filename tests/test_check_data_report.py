"""What the whole check shows: how far it has come, its report, its file and its picture."""
import io
import json
import re
import sys

import pytest
from check_data_cases import full, seg_config
from coco_files import change, leaf, write_coco_root
from mmengine.config import Config
from test_check_data_parts import data, images  # noqa: F401 (a fixture)

from replk_mm.data import audit_picture, audit_report, progress
from replk_mm.data.problem_kinds import KINDS
from replk_mm.data.problems import SEVERITIES, printable
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)


# -- progress ---------------------------------------------------------------------------------------------------------
class Terminal(io.StringIO):
    """Standard error that is a terminal or none, and a clock that stands still."""

    def __init__(self, monkeypatch, tty: bool) -> None:
        super().__init__()
        self.tty, self.now = tty, 0.
        monkeypatch.setattr(sys, 'stderr', self)
        monkeypatch.setattr(progress.time, 'monotonic', lambda: self.now)

    def isatty(self) -> bool:
        return self.tty


def test_bar_on_a_terminal(monkeypatch):
    shown = Terminal(monkeypatch, tty=True)
    bar = progress.Progress(5, 'images')
    for seconds in (0.2, 0.05, 0.06, 0.01, 0.01):  # too soon to be written but for three, of which the last is the end
        shown.now += seconds
        bar.step()
    bar.end()
    assert re.findall(r'(\d)/5', shown.getvalue()) == ['0', '1', '3', '5']
    assert shown.getvalue().endswith('\n') and '[>>' in shown.getvalue()


def test_bar_of_a_whole_check(data, monkeypatch):
    shown = Terminal(monkeypatch, tty=True)
    full(seg_config(data))
    assert '0/9' in shown.getvalue() and '9/9' in shown.getvalue().rpartition('\r')[2]


def test_lines_where_nobody_watches(monkeypatch):
    shown = Terminal(monkeypatch, tty=False)
    lines = progress.Progress(1000, 'images')
    for seconds in (10, 6, 1):
        shown.now += seconds
        lines.step()
    lines.end()
    assert shown.getvalue() == '2 of 1,000 images, about 7984 s to go\n'  # 8 s each


# -- report -----------------------------------------------------------------------------------------------------------
def test_report_shows_five_and_the_file_has_all(data, tmp_path):
    for path in images(data):
        path.write_bytes(b'')
    result = full(seg_config(data))
    shown = audit_report.text(result)
    assert shown.count('the file is empty') == 5
    assert 'error empty-file: 6' in shown and '... and 1 more' in shown and KINDS['empty-file'].remedy in shown
    assert shown.splitlines()[-1].startswith('6 errors, 0 warnings, 0 notes; 9 of 9 images looked into')
    audit_report.write(result, tmp_path / 'x.json')
    found = json.loads((tmp_path / 'x.json').read_text())
    assert found['counts'] == dict(error=6, warning=0, note=0)
    assert [problem['path'] for problem in found['problems']] == [str(path) for path in images(data)]
    assert set(found['problems'][0]) == {'kind', 'severity', 'split', 'path', 'entry', 'found', 'allowed', 'remedy'}
    assert found['data_sets'][1]['sizes'] == [dict(width=64, height=64, images=3)]
    assert not (tmp_path / 'x.json.part').exists()


def test_every_kind_has_a_severity_and_a_remedy():
    assert all(kind.severity in SEVERITIES and kind.remedy for kind in KINDS.values())


@pytest.mark.parametrize(('text', 'safe'), [
    ('plain', 'plain'), ('é 図', 'é 図'), ('a\udce9b', 'a\\udce9b'), ('a\x1b[2J', 'a\\x1b[2J'),
    ('a\r\x00', 'a\\r\\x00'), ('two\nlines', 'two\nlines')])
def test_any_name_can_be_printed(text, safe):
    assert printable(text) == safe and safe.encode()


def test_the_file_tells_the_worst_of_each_kind(tmp_path):
    """A flat box among many is an accident, a warning; keys that only scoring needs are notes of a file that is not scored."""
    root = write_coco_root(tmp_path / 'data', ('person', 'car'))
    train, val = (root / f'annotations/instances_{split}2017.json' for split in ('train', 'val'))
    cfg = Config(dict(
        default_scope='mmdet', model=dict(bbox_head=dict(num_classes=2)),
        val_evaluator=dict(type='CocoMetric', ann_file=str(val), metric='bbox'),
        **{f'{split}_dataloader': dict(dataset=leaf(root, split, metainfo=dict(classes=('person', 'car'))))
           for split in ('train', 'val')}), cfg_text=' ', filename='own.py')

    def severities() -> dict[str, str]:
        record = audit_report.record(full(cfg))
        assert record['kinds'].keys() == {problem['kind'] for problem in record['problems']}
        return {name: kind['severity'] for name, kind in record['kinds'].items()}

    change(train, lambda d: (d['annotations'][0].update(bbox=[4, 6, 0, 12]), d['annotations'][1].pop('iscrowd')))
    found = severities()
    assert (KINDS['bbox-flat'].severity, found['bbox-flat'], found['iscrowd-missing']) == ('error', 'warning', 'note')
    change(val, lambda d: (d['annotations'][1].pop('iscrowd'), [a.update(bbox=[4, 6, 0, 12]) for a in d['annotations']]))
    found = severities()
    assert (KINDS['iscrowd-missing'].severity, found['bbox-flat'], found['iscrowd-missing']) == ('note', 'error', 'error')


def test_there_is_no_picture_of_nothing(tmp_path):
    assert not audit_picture.draw(full(seg_config(tmp_path / 'gone')), tmp_path / 'x.png')
    assert not (tmp_path / 'x.png').exists()


@pytest.mark.parametrize('name', ['x.png', 'x.JPG', 'x.webp', 'x.pdf', 'x.svg', 'x', 'x.foo', 'x.png.', 'x.pgf'])
def test_suffixes_of_pictures(data, tmp_path, name):
    path = tmp_path / name
    if path.suffix.lower() in ('.png', '.jpg', '.webp', '.pdf', '.svg'):
        audit_picture.check_suffix(path)
        assert audit_picture.draw(full(seg_config(data)), path) and path.stat().st_size > 1000
    else:
        with pytest.raises(UserError, match=r'ends with \.png'):
            audit_picture.check_suffix(path)


@pytest.mark.parametrize('classes', [3, 60])
def test_picture_names_every_class_that_occurs(data, tmp_path, classes, monkeypatch):
    drawn = []
    original = audit_picture.Figure.savefig
    monkeypatch.setattr(audit_picture.Figure, 'savefig', lambda self, path, **options: (drawn.append(self), original(
        self, path, **options)))
    result = full(seg_config(data))
    result.crop = (32, 48)
    result.sets[0].classes = {f'name ${i}': 10 ** (i % 7) for i in range(classes)} | {'never': 0}
    audit_picture.draw(result, tmp_path / 'x.png')
    names = [tick.get_text() for panel in drawn[0].axes[:-1] for tick in panel.get_yticklabels()]
    assert len(names) == classes + 8 and r'name \$0' in names and 'never' not in names
    assert drawn[0].axes[0].get_xscale() == 'log'
    assert drawn[0].axes[-1].patches[0].get_bbox().bounds == (0, 0, 48, 32)
    assert (tmp_path / 'x.png').stat().st_size > 1000
