"""Processes that look at files, lists of files, and duplicates: parts of the whole check."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from check_data_cases import full, kinds, line, seg_config
from many_pairs import data  # noqa: F401
from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS, init_default_scope
from test_data_workers import gone

from replk_mm.data import duplicates, processes
from replk_mm.data.audit import audit
from replk_mm.data.checks import check_data
from replk_mm.data.files import listing
from replk_mm.data.image_files import digest
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)


def images(root: Path, split: str = 'training') -> list[Path]:
    return sorted((root / 'images' / split).iterdir())


# -- processes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('jobs', [1, 2, 7, 50])
def test_each_task_is_done_once(jobs):
    results = list(processes.each(lambda task: (task ** 2, os.getpid()), range(40), jobs, lambda task, status: None))
    assert sorted((i, square) for i, (square, _) in results) == [(i, i * i) for i in range(40)]
    assert os.getpid() not in {process for _, (_, process) in results}
    assert list(processes.each(abs, [], jobs, lambda task, status: None)) == []


@pytest.mark.parametrize('jobs', [1, 3])
def test_tasks_whose_process_dies_are_told_from_the_others(jobs):
    def work(task: int) -> str:
        if task % 10 == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        if task % 10 == 7:
            os._exit(5)
        return 'done'

    results = dict(processes.each(work, range(40), jobs, lambda task, status: f'{task}: {status}'))
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


def test_folders_that_are_linked_to_one_are_each_read(data):
    """As fog of two kinds, whose label maps are those of clear sight, and images linked twice: mmseg reads all."""
    for kind, target in (('images', ('clear', 'fog1', 'fog2')), ('annotations', ('clear', ))):
        folder = data / kind / 'training'
        (folder / 'clear').mkdir()
        for path in [p for p in folder.iterdir() if p.is_file()]:
            for place in target:
                (folder / place).mkdir(exist_ok=True)
                shutil.copy(path, folder / place / path.name)
            path.unlink()
    for name in ('fog1', 'fog2', 'again'):
        (data / 'annotations/training' / name).symlink_to('clear')
    (data / 'images/training/again').symlink_to('clear')
    cfg = seg_config(data)
    cfg.pop('val_dataloader')
    result = full(cfg)
    init_default_scope('mmseg')
    read = DATASETS.build({**cfg.train_dataloader.dataset, 'lazy_init': True, 'pipeline': []}).load_data_list()
    assert not kinds(result, 'error') and len(read) == 24
    assert [(task.image, task.label) for task in result.sets[0].survey.tasks] == [
        (info['img_path'], info['seg_map_path']) for info in read]


def test_links_to_each_other_end(tmp_path):
    for name, other in (('a', 'b'), ('b', 'a')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'x.jpg').touch()
        (tmp_path / name / 'other').symlink_to(tmp_path / other)
        (tmp_path / name / 'up').symlink_to('..')
    assert listing(tmp_path).files == {'a/x.jpg', 'b/x.jpg', 'a/other/x.jpg', 'b/other/x.jpg'}


@pytest.mark.parametrize('name', ['{absolute}', './{name}', '../training/{name}', 'deeper/../{name}', '.{name}', ' {name} '])
def test_names_in_a_list_are_taken_as_mmseg_takes_them(data, name):
    first, second = [path.stem for path in images(data)[:2]]
    for kind, suffix in (('images', '.jpg'), ('annotations', '.png')):
        (data / kind / 'training/deeper').mkdir()
        shutil.copy(data / kind / 'training' / f'{first}{suffix}', data / kind / 'training' / f'.{first}{suffix}')
        (data / 'elsewhere').mkdir(exist_ok=True)
        shutil.copy(data / kind / 'training' / f'{first}{suffix}', data / 'elsewhere' / f'{first}{suffix}')
    named = name.format(absolute=data / 'elsewhere' / first, name=first)
    (data / 'list.txt').write_text(f'{second}\n{named}\n')
    cfg = seg_config(data, ann_file='list.txt')
    cfg.pop('val_dataloader')
    init_default_scope('mmseg')
    dataset = DATASETS.build({**cfg.train_dataloader.dataset, 'lazy_init': True, 'pipeline': []})
    read = [(info['img_path'], info['seg_map_path']) for info in dataset.load_data_list()]
    assert all(Path(path).is_file() for pair in read for path in pair)
    result = full(cfg)
    assert not kinds(result)
    same = [{os.path.realpath(task.image) for task in result.sets[0].survey.tasks}, {os.path.realpath(one) for one, _ in read}]
    assert same[0] == same[1] and result.sets[0].tally.labels == 2
    Path(read[1][1]).unlink()
    assert kinds(full(cfg)) == {'label-missing'}
    Path(read[1][0]).unlink()
    assert kinds(full(cfg)) == {'image-missing'}


def test_empty_line_in_a_list_is_a_name_to_mmseg(data):
    names = [path.stem for path in images(data)]
    (data / 'list.txt').write_text(f'{names[0]}\n\n{names[1]}\n')
    cfg = seg_config(data, ann_file='list.txt')
    cfg.pop('val_dataloader')
    init_default_scope('mmseg')
    read = DATASETS.build({**cfg.train_dataloader.dataset, 'lazy_init': True, 'pipeline': []}).load_data_list()
    assert not Path(read[1]['img_path']).is_file()
    with pytest.raises(UserError, match='1 of 3 images are not in .*: an empty line') as info:
        check_data(cfg, ('train',), 8)


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


def test_only_files_that_are_alike_in_part_are_read_as_a_whole(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    contents = [rng.bytes(100_000) for _ in range(20)]
    paths = [tmp_path / f'{i:02}' for i in range(20)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    paths[7].write_bytes(contents[3])
    near = bytearray(contents[3])
    near[10] ^= 1  # neither in the middle nor at the end
    paths[9].write_bytes(near)
    (tmp_path / 'other').write_bytes(b'of a size of its own')
    whole = []
    monkeypatch.setattr(duplicates, 'digest', lambda path: whole.append(path) or digest(path))
    shown = []
    monkeypatch.setattr('sys.stderr', SimpleNamespace(isatty=lambda: True, write=shown.append, flush=lambda: None))
    found = duplicates.of_equal_size(map(str, [*paths, tmp_path / 'other']))
    assert sorted(whole) == sorted(found) == [str(paths[i]) for i in (3, 7, 9)]
    assert found[str(paths[3])] == found[str(paths[7])] != found[str(paths[9])]
    assert '20/20' in ''.join(shown)


def test_files_that_are_no_longer_there_are_no_duplicates(tmp_path):
    assert duplicates.of_equal_size([str(tmp_path / 'a'), str(tmp_path / 'b')]) == {}
