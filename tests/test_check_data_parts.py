"""Processes that look at files, lists of files, duplicates, and the report: the parts of the whole check."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from check_data_cases import full, kinds, line, seg_config
from many_pairs import write
from mmengine.fileio import list_dir_or_file
from test_data_workers import gone

from replk_mm.data import audit_picture, audit_report, duplicates, processes
from replk_mm.data.audit import audit
from replk_mm.data.checks import check_data
from replk_mm.data.files import listing
from replk_mm.data.problem_kinds import KINDS
from replk_mm.data.problems import SEVERITIES, printable
from replk_mm.errors import UserError


@pytest.fixture
def data(tmp_path) -> Path:
    write(tmp_path / 'data', 'training', 6)
    write(tmp_path / 'data', 'validation', 3)
    return tmp_path / 'data'


def images(root: Path, split: str = 'training') -> list[Path]:
    return sorted((root / 'images' / split).iterdir())


# -- processes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('jobs', [1, 2, 7, 50])
def test_each_task_is_done_once(jobs):
    results = list(processes.each(lambda task: (task ** 2, os.getpid()), range(40), jobs, lambda task, status: None))
    assert sorted((i, square) for i, (square, _) in results) == [(i, i * i) for i in range(40)]
    assert (os.getpid() in {process for _, (_, process) in results}) == (jobs == 1)
    assert list(processes.each(abs, [], jobs, lambda task, status: None)) == []


def test_tasks_whose_process_dies_are_told_from_the_others():
    def work(task: int) -> str:
        if task % 10 == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        if task % 10 == 7:
            os._exit(5)
        return 'done'

    results = dict(processes.each(work, range(40), 3, lambda task, status: f'{task}: {status}'))
    died = {3: f': {-signal.SIGSEGV}', 7: ': 5'}
    assert results == {i: f'{i}{died[i % 10]}' if i % 10 in died else 'done' for i in range(40)}


def test_processes_end_when_nobody_asks_for_more():
    results = processes.each(lambda task: os.getpid(), range(1000), 2, lambda task, status: None)
    workers = {next(results)[1] for _ in range(20)}
    results.close()
    assert all(map(gone, workers))


CODE = """
import os, sys, time
from replk_mm.data import processes
from replk_mm.errors import command

def work(task):
    time.sleep(float(sys.argv[1]) if task > 3 else 0)
    return os.getpid()

@command
def main():
    for i, pid in processes.each(work, range(99), 2, lambda task, status: 0):
        print(pid, flush=True)

sys.exit(main())
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize(('number', 'status', 'threads', 'task'), [
    (signal.SIGINT, 130, '1', '60'), (signal.SIGINT, 130, '8', '60'), (signal.SIGKILL, -signal.SIGKILL, '1', '0.5')])
def test_no_process_outlives_an_interrupted_check(number, status, threads, task):
    """Ctrl-C goes to the whole group, as a terminal sends it; SIGKILL to the parent alone, whose
    processes end with the task they are at."""
    child = subprocess.Popen([sys.executable, '-c', CODE, task], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': threads})
    try:
        assert child.stdout is not None
        child.stdout.readline()
        workers = [int(name) for name in Path(f'/proc/{child.pid}/task/{child.pid}/children').read_text().split()]
        assert len(workers) == 2
        if number == signal.SIGINT:
            os.killpg(child.pid, number)
        else:
            child.send_signal(number)
        _, text = child.communicate(timeout=30)  # until the last process has closed the pipe; a task of 60 s lasts longer
        assert child.returncode == status and 'Traceback' not in text
        if number == signal.SIGINT:
            assert all(map(gone, workers))
    finally:
        if child.poll() is None:
            child.kill()
        for worker in workers if number == signal.SIGKILL else ():
            os.kill(worker, signal.SIGKILL) if not gone(worker) else None


# -- lists of files ---------------------------------------------------------------------------------------------------
def test_a_folder_is_listed_as_mmengine_lists_it(tmp_path):
    for name in ('a.jpg', '.hidden.jpg', 'deep/er/b.jpg', 'c.JPG', 'deep/d.jpg.txt', '.folder/e.jpg'):
        (tmp_path / 'x' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'x' / name).touch()
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / 'f.jpg').touch()
    (tmp_path / 'x' / 'link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'x' / 'g.jpg').symlink_to(tmp_path / 'elsewhere' / 'f.jpg')
    (tmp_path / 'x' / 'dead.jpg').symlink_to('nowhere.jpg')
    found = listing(tmp_path / 'x')
    assert found.files == set(list_dir_or_file(str(tmp_path / 'x'), list_dir=False, recursive=True))
    assert found.dead == {'dead.jpg'} and found.names('.jpg') == {'a', 'deep/er/b', '.folder/e', 'link/f', 'g'}


def test_links_in_a_circle_are_followed_once(data):
    (data / 'images/training/again').symlink_to(data / 'images/training')
    assert len(listing(data / 'images/training').files) == 6
    assert not kinds(full(seg_config(data)), 'error')


def test_what_an_annotation_list_names(data):
    names = [path.stem for path in images(data)]
    (data / 'list.txt').write_text('\n'.join([*names[:3], 'ghost', '']))
    cfg = seg_config(data, ann_file='list.txt')
    cfg.pop('val_dataloader')
    result = full(cfg)
    assert line(result, 'image-missing') == f'{data}/images/training/ghost.jpg: named by list.txt, not there'
    assert kinds(result) == {'image-missing'} and result.sets[0].tally.looked == 3
    (data / 'list.txt').write_bytes(b'caf\xe9\n')
    assert 'list-unreadable' in kinds(full(cfg), 'error')


# -- duplicates -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('whole', [True, False])
def test_images_of_the_same_content(data, whole):
    shutil.copy(images(data)[0], images(data)[4])
    shutil.copy(images(data)[1], images(data, 'validation')[2])
    result = audit(seg_config(data), full=whole, jobs=1)
    assert {(problem.kind, problem.path, problem.found.split()[4].rstrip(',')) for _, problem in result.found()} == {
        ('duplicate-image', str(images(data)[4]), str(images(data)[0])),
        ('leak', str(images(data, 'validation')[2]), str(images(data)[1]))}


def test_validation_images_of_the_same_name_as_trained_ones_are_compared_when_training_starts(data):
    def lines() -> list[str]:
        return [text for text in check_data(seg_config(data), ('train', 'val'), 8) if 'which is trained with' in text]

    for number, source in enumerate(images(data)):
        for kind, suffix in (('images', 'jpg'), ('annotations', 'png')):
            target = data / kind / 'validation' / f'{source.stem}.{suffix}'
            shutil.copy(data / kind / 'training' / f'{images(data)[(number + 1) % 6].stem}.{suffix}', target)
    assert not lines(), 'the names are the same, and not the images'
    shutil.copy(images(data)[0], data / 'images/validation' / images(data)[0].name)
    assert len(lines()) == 1 and str(images(data)[0]) in lines()[0]


def test_files_that_are_no_longer_there_are_no_duplicates(tmp_path):
    assert duplicates.of_equal_size([str(tmp_path / 'a'), str(tmp_path / 'b')]) == {}


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


def test_picture_of_nothing_is_a_message(tmp_path):
    with pytest.raises(UserError, match='nothing to draw'):
        audit_picture.draw(full(seg_config(tmp_path / 'gone')), tmp_path / 'x.png')


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
