"""Suite files: what is read, what is refused with which words, and what is left of them to do."""
import hashlib
import json
from pathlib import Path

import pytest
import yaml

from replk_mm.bench import published, records
from replk_mm.bench.suites import plan
from replk_mm.bench.suites.definition import Row, read_suite
from replk_mm.data.demo_writer import META
from replk_mm.engine.config import load_config
from replk_mm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SUITES = sorted((ROOT / 'configs' / 'suites').glob('*.yaml'))
TRAINED = dict(config='config.py', iterations=5)


def write(folder: Path, **content) -> Path:
    (folder / 'config.py').write_text("model = dict(a=1)\ntest_dataloader = dict()\ndefault_scope = 'mmseg'\n")
    path = folder / 'suite.yaml'
    path.write_text(yaml.safe_dump(dict(name='s', **content), sort_keys=False))
    return path


def read(folder: Path, **content):
    return read_suite(write(folder, **content))


def test_rows_take_what_the_defaults_say_and_their_own_over_it(tmp_path):
    suite = read(tmp_path, question='Why\n  not?', defaults=dict(
        config='a.py', seeds=[3, 4], iterations=10, options={'x.y': 1, 'z': 2}, measure=['speed', 'complexity']), rows=[
            dict(name='one'),
            dict(name='two', label='Two', seeds=[0], options={'z': 3}, config='b.py', schedule='full', measure=['curve']),
            dict(name='three', checkpoint='w/{row}.{seed}.pth', shape=[64, 96], erf=dict(size=7)),
            dict(name='four', schedule='full')])
    assert suite.rows == (
        Row('one', 'one', 'a.py', {'x.y': 1, 'z': 2}, (3, 4), iterations=10, measure=('speed', 'complexity')),
        Row('two', 'Two', 'b.py', {'x.y': 1, 'z': 3}, (0,), schedule='full', measure=('curve',)),
        Row('three', 'three', 'a.py', {'x.y': 1, 'z': 2}, (3, 4), checkpoint='w/{row}.{seed}.pth',
            measure=('speed', 'complexity'), shape=(64, 96), erf=dict(size=7)),
        Row('four', 'four', 'a.py', {'x.y': 1, 'z': 2}, (3, 4), schedule='full', measure=('speed', 'complexity')))
    assert suite.question == 'Why not?'
    assert [(row.name, seed) for row, seed in suite.pairs()] == [
        ('one', 3), ('one', 4), ('two', 0), ('three', 3), ('three', 4), ('four', 3), ('four', 4)]
    assert suite.rows[0].measurements() == ('train', 'complexity', 'speed')  # as they are done, not as they are named
    assert suite.rows[2].measurements() == ('complexity', 'speed')
    assert suite.rows[2].checkpoint_of(4) == 'w/three.4.pth'


@pytest.mark.parametrize(('content', 'words'), [
    (dict(rows=[]), ['rows is missing']),
    (dict(rows=[dict(TRAINED)]), ['rows[0]', 'name is missing']),
    (dict(rows=[dict(name='a', iterations=5)]), ['rows[0] (a)', 'config is missing']),
    (dict(rows=[dict(TRAINED, name='a', colour='red')]), ['rows[0]', "unknown key 'colour'"]),
    (dict(rows=[dict(TRAINED, name='a', option={})]), ["unknown key 'option'", 'Did you mean options?']),
    (dict(row=[dict(TRAINED, name='a')]), ["unknown key 'row'", 'Did you mean rows?']),
    (dict(rows=[dict(TRAINED, name='a'), dict(TRAINED, name='a')]), ["'a' names 2 rows"]),
    (dict(rows=[dict(TRAINED, name='A b')]), ["'A b' does not do"]),
    (dict(rows=[dict(TRAINED, name='..')]), ["'..' does not do", 'a letter or digit first']),
    (dict(rows=[dict(TRAINED, name='a', options={5: 6})]), ['options: 5 names no field']),
    (dict(rows=[dict(TRAINED, name='12')]), ["'12' does not do", '--only']),
    (dict(rows=[dict(TRAINED, name='a', checkpoint='x')]), ['has both iterations and checkpoint']),
    (dict(rows=[dict(TRAINED, name='a', schedule='full')]), ['has both iterations and schedule']),
    (dict(rows=[dict(name='a', config='c.py', schedule='half')]), ["schedule: 'half'"]),
    (dict(rows=[dict(TRAINED, name='a', iterations=0)]), ['iterations is at least 1; found 0']),
    (dict(rows=[dict(TRAINED, name='a', iterations='5')]), ["iterations is a whole number; found '5'"]),
    (dict(rows=[dict(TRAINED, name='a', erf=dict(count=0))]), ['count is at least 1; found 0']),
    (dict(rows=[dict(TRAINED, name='a', erf=dict(side=5))]), ["erf: unknown key 'side'"]),
    (dict(rows=[dict(TRAINED, name='a', published=1)]), ['published is yes or no']),
    (dict(rows=[dict(TRAINED, name='a', seeds=[0, 0])]), ['seeds are different']),
    (dict(rows=[dict(TRAINED, name='a', seeds=[-1])]), ['seeds are different whole numbers from 0']),
    (dict(rows=[dict(TRAINED, name='a', seeds=[])]), ['seeds are different']),
    (dict(rows=[dict(TRAINED, name='a', measure=['metric', 'taste'])]), ["'taste' is unknown", 'shape_bias']),
    (dict(rows=[dict(TRAINED, name='a', measure=['train'])]), ["'train' is unknown"]),
    (dict(rows=[dict(TRAINED, name='a', shape=[64])]), ['shape: [HEIGHT, WIDTH]']),
    (dict(rows=[dict(name='a', config='c.py', measure=['metric'])]), ['metric needs trained weights']),
    (dict(rows=[dict(name='a', config='c.py', measure=[])]), ['nothing to train and nothing to measure']),
    (dict(rows=[dict(name='a', config='c.py', checkpoint='x', measure=['curve'])]), ['curve needs a training']),
    (dict(rows=[dict(name='a', config='c.py', checkpoint='x', seeds=[0, 1])]), ['2 seeds, but one checkpoint', '{seed}']),
    (dict(rows=['a']), ['a mapping is needed']),
    (dict(rows=[dict(TRAINED, name='a')], data=dict(root='x', scenes='demo')), ['data: either root, or scenes']),
    (dict(rows=[dict(TRAINED, name='a')], data=dict(train=4)), ['data: either root, or scenes']),
    (dict(rows=[dict(TRAINED, name='a')], data=dict(scenes='demo', size=[1, 2, 3])), ['size: [HEIGHT, WIDTH]']),
    (dict(defaults=dict(name='x'), rows=[dict(TRAINED, name='a')]), ["defaults: unknown key 'name'"]),
])
def test_what_is_wrong_is_named_with_its_place(tmp_path, content, words):
    with pytest.raises(UserError) as caught:
        read(tmp_path, **content)
    assert str(caught.value).startswith(f'{tmp_path / "suite.yaml"}: ')
    for word in words:
        assert word in str(caught.value)


def test_numbers_are_numbers(tmp_path):
    path = write(tmp_path, rows=[dict(TRAINED, name='a')])
    path.write_text(f'{path.read_text()}\n  options: {{a: 1e-3, b: -2E5, c: 1.5e+2, d: 1e, e: 3, f: 0x10, g: 1e3.py}}\n')
    assert read_suite(path).rows[0].options == dict(a=0.001, b=-200000., c=150., d='1e', e=3, f=16, g='1e3.py')


def test_parts_may_be_merged(tmp_path):
    path = write(tmp_path, rows=[dict(TRAINED, name='a')])
    path.write_text(f'{path.read_text()}\n  options: &a {{x: 1, y: 2}}\n'
                    '- {name: b, config: config.py, iterations: 5, options: {<<: [*a, {z: 3}], y: 4}}\n')
    assert read_suite(path).rows[1].options == dict(x=1, y=4, z=3)


def test_parts_that_merge_to_very_many(tmp_path):
    levels = [f'a{i}: &a{i}\n  <<: [{", ".join([f"*a{i - 1}"] * 10)}]' for i in range(1, 40)]
    (tmp_path / 'merged.yaml').write_text('\n'.join(['a0: &a0 {x: 1}', *levels]))
    with pytest.raises(UserError, match='merged.yaml: no YAML: << adds more than 100,000 keys') as caught:
        read_suite(tmp_path / 'merged.yaml')


def test_no_suite_and_no_yaml(tmp_path):
    with pytest.raises(UserError, match='no such suite'):
        read_suite(tmp_path / 'absent.yaml')
    (tmp_path / 'bad.yaml').write_text('rows: [')
    with pytest.raises(UserError, match='bad.yaml: no YAML.*line 1'):
        read_suite(tmp_path / 'bad.yaml')
    (tmp_path / 'twice.yaml').write_text('name: a\nrows:\n- {name: a, options: {a: 1}, options: {b: 1}}')
    with pytest.raises(UserError, match="twice.yaml: no YAML: the key 'options' is there twice.*line 3"):
        read_suite(tmp_path / 'twice.yaml')
    (tmp_path / 'deep.yaml').write_text('[' * 3000)
    with pytest.raises(UserError, match='deep.yaml: no YAML: maximum recursion depth'):
        read_suite(tmp_path / 'deep.yaml')
    for place in ('name: {}', 'rows: [{}]', 'rows: [{{name: a, config: c.py, options: {{? {} : 1}}}}]', '{}'):
        (tmp_path / 'digits.yaml').write_text(place.format(f'0x{"f" * 4000}'))
        with pytest.raises(UserError, match='digits.yaml: a number in it has more than 100 digits, it begins with 0xffff'):
            read_suite(tmp_path / 'digits.yaml')
    (tmp_path / 'date.yaml').write_text('name: a\nrows: [{name: a, config: c.py, options: {a.time: 2001-02-03}}]')
    with pytest.raises(UserError, match='date.yaml: 2001-02-03 is read as a date'):
        read_suite(tmp_path / 'date.yaml')
    (tmp_path / 'list.yaml').write_text('- a')
    with pytest.raises(UserError, match='a mapping is needed'):
        read_suite(tmp_path / 'list.yaml')


@pytest.mark.parametrize('path', SUITES, ids=lambda path: path.stem)
def test_the_suites_that_come_along_can_be_read(path):
    suite = read_suite(path)
    assert suite.name == path.stem and suite.question.endswith('?')
    for row in suite.rows:
        if row.options or '::' in row.config:  # the others are configs of this project as they are
            load_config(plan.config_path(row, suite), dict(row.options) or None)
        else:
            assert (ROOT / 'configs' / row.config).is_file()


def test_the_published_suite_has_every_published_row_once():
    suite = read_suite(ROOT / 'configs' / 'suites' / 'published.yaml')
    named = [row.config for row in suite.rows if '::' not in row.config]
    assert sorted(named) == sorted(result.config for result in published.results())
    assert len(named) == 23
    others = [row.config for row in suite.rows if '::' in row.config]
    assert {name.partition('::')[0] for name in others} == {'mmseg', 'mmdet'}
    for row in suite.rows:
        result = published.for_config(row.config.rpartition('::')[2])
        assert (result is None) == ('::' in row.config)
        for word in (result.backbone, result.pretraining, result.dataset) if result else ():
            assert word in row.label
        assert row.checkpoint_of(0) == f'weights/{row.name}.pth'


# ---- what is left to do

def tasks_left(folder: Path, work_dir: Path, resume: bool = False, only=(), data_root=None, **content):
    return plan.tasks_left(read(folder, **content), plan.Choice(work_dir, resume, only, data_root))


ROWS = [dict(TRAINED, name='a'), dict(TRAINED, name='ab', seeds=[1, 2]), dict(TRAINED, name='c')]


def finish(task, *measures) -> None:
    for name in measures:
        records.append(task.record(name, plan.now(), {}), task.results)


@pytest.mark.parametrize(('only', 'found'), [
    ([], 'a0 ab1 ab2 c0'), (['a'], 'a0'), (['a*'], 'a0 ab1 ab2'), (['2'], 'ab2'), (['c', '0'], 'a0 c0')])
def test_only(tmp_path, only, found):
    tasks, failed = tasks_left(tmp_path, tmp_path / 'w', only=only, rows=ROWS)
    assert [f'{task.row}{task.seed}' for task in tasks] == found.split() and not failed


@pytest.mark.parametrize('name', ['b', '4', 'A'])
def test_only_what_there_is(tmp_path, name):
    with pytest.raises(UserError, match=f'--only {name}: .* has no such row\nThere are: a, ab, c; or 0 to 3'):
        tasks_left(tmp_path, tmp_path / 'w', only=[name], rows=ROWS)


def test_what_is_done_is_left_out_and_a_second_run_needs_to_be_asked_for(tmp_path):
    tasks, _ = tasks_left(tmp_path, tmp_path / 'w', rows=ROWS)
    assert tasks[0].measures == ('train', 'complexity', 'metric', 'speed', 'memory')
    finish(tasks[0], 'train', 'complexity', 'speed')
    finish(tasks[1], *tasks[1].measures)
    with pytest.raises(UserError, match='are begun already.*\nGo on with --resume'):
        tasks_left(tmp_path, tmp_path / 'w', rows=ROWS)
    left, _ = tasks_left(tmp_path, tmp_path / 'w', resume=True, rows=ROWS)
    assert [(task.row, task.seed, task.measures) for task in left] == [
        ('a', 0, ('metric', 'memory')), ('ab', 2, tasks[2].measures), ('c', 0, tasks[3].measures)]
    states = [state for _, _, _, state in plan.states(read(tmp_path, rows=ROWS), tmp_path / 'w')]
    assert states == ['3 of 5 done', 'done', '-', '-']


def test_a_row_that_has_changed_is_measured_anew_or_refused(tmp_path):
    def left(**changes) -> tuple[str, ...]:
        tasks, _ = tasks_left(tmp_path, tmp_path / 'w', resume=True, rows=[{**ROWS[0], **changes}])
        return tasks[0].measures if tasks else ()

    finish(tasks_left(tmp_path, tmp_path / 'w', rows=ROWS[:1])[0][0], 'train', 'complexity', 'metric', 'speed', 'memory')
    assert left() == () == left(label='Another', published=False)
    assert left(shape=[32, 32]) == ('speed', 'memory')
    assert left(macs_shape=[32, 32]) == ('complexity',)
    assert left(measure=['erf', 'metric']) == ('erf',)
    for change, words in ((dict(iterations=6), 'another iterations .*: 5 then, 6 now'),
                          (dict(options={'model.a': 2}), "another options .*: {} then, {'model.a': 2} now")):
        with pytest.raises(UserError, match=f'was begun with {words}\nRemove that folder'):
            left(**change)


def test_other_weights_are_measured_anew(tmp_path):
    rows = [dict(name='a', config='config.py', checkpoint=str(tmp_path / '{row}.pth'), measure=['metric'])]
    (tmp_path / 'a.pth').write_bytes(b'weights')
    [task], _ = tasks_left(tmp_path, tmp_path / 'w', rows=rows)
    digest = hashlib.sha256(b'weights').hexdigest()
    records.append(task.record('metric', plan.now(), {}, checkpoint=dict(path='a.pth', sha256=digest)), task.results)
    assert tasks_left(tmp_path, tmp_path / 'w', resume=True, rows=rows)[0] == []
    (tmp_path / 'a.pth').write_bytes(b'others')
    assert [t.measures for t in tasks_left(tmp_path, tmp_path / 'w', resume=True, rows=rows)[0]] == [('metric',)]


def test_a_config_that_cannot_be_read_fails_its_row_and_no_other(tmp_path):
    rows = [dict(TRAINED, name='a', config='nowhere.py'), dict(TRAINED, name='b')]
    tasks, failed = tasks_left(tmp_path, tmp_path / 'w', rows=rows)
    assert [task.row for task in tasks] == ['b']
    assert failed[0][0] == 'a seed 0' and 'nowhere.py: no such config' in failed[0][1]
    [found] = records.read([tmp_path / 'w'])[0]
    assert (found['row'], found['status'], found['config']['sha256']) == ('a', 'failed', None)
    # once it is there, the failure is history
    (tmp_path / 'nowhere.py').write_text("model = dict()\ntest_dataloader = dict()\ndefault_scope = 'mmseg'\n")
    [task, _], _ = tasks_left(tmp_path, tmp_path / 'w', resume=True, rows=rows)
    finish(task, 'train')
    assert [(one['row'], one['status']) for one in records.read([tmp_path / 'w'])[0]] == [('a', 'done')]
    assert records.read([tmp_path / 'w'])[1] == []  # nothing that counts was passed over
    # and once it is gone again, what is done stays done
    (tmp_path / 'nowhere.py').rename(tmp_path / 'moved.py')
    _, [(_, reason)] = tasks_left(tmp_path, tmp_path / 'w', resume=True, rows=rows)
    assert reason.startswith('complexity: ') and 'nowhere.py: no such config' in reason
    (tmp_path / 'moved.py').rename(tmp_path / 'nowhere.py')
    [task, _], _ = tasks_left(tmp_path, tmp_path / 'w', resume=True, rows=rows)
    assert task.measures == ('complexity', 'metric', 'speed', 'memory')
    finish(task, *task.measures)
    [task], failed = tasks_left(tmp_path, tmp_path / 'w', resume=True, rows=rows)
    assert task.row == 'b' and not failed


def test_a_measurement_that_sees_images_may_be_added(tmp_path):
    content = dict(data=dict(scenes='demo', train=2, val=1, size=[64, 64]))
    row = dict(name='a', config='config.py', checkpoint=str(tmp_path / 'x.pth'))
    [task], _ = tasks_left(tmp_path, tmp_path / 'w', rows=[dict(row, measure=['complexity'])], **content)
    finish(task, 'complexity')
    [task], _ = tasks_left(tmp_path, tmp_path / 'w', True, rows=[dict(row, measure=['complexity', 'metric'])], **content)
    assert task.measures == ('metric',) and Path(task.data_root, META).is_file()


def test_data_of_a_row(tmp_path):
    suite, row = dict(root='suite'), dict(data_root='row')
    cases = [({}, {}, None, None), (suite, {}, None, 'suite'), (suite, row, None, 'row'), (suite, row, 'given', 'given')]
    keys = set()
    for i, (data, row, given, expected) in enumerate(cases):
        rows = [{**TRAINED, 'name': 'a', **row}]
        [task], _ = tasks_left(tmp_path, tmp_path / f'w{i}', rows=rows, data=data, data_root=given)
        assert task.data_root == expected
        keys.add(task.keys['metric'])
    assert len(keys) == len(cases)


def test_scenes_are_written_once_in_the_layout_of_the_config(tmp_path, monkeypatch):
    data = dict(scenes='demo', train=2, val=1, size=[64, 64])
    content = dict(rows=[dict(TRAINED, name='a'), dict(TRAINED, name='b', options={'default_scope': 'mmdet'}),
                         dict(name='c', config='config.py', measure=['complexity'])], data=data)
    tasks, _ = tasks_left(tmp_path, tmp_path / 'w', **content)
    roots = [task.data_root for task in tasks]
    assert [json.loads(Path(root, META).read_text())['layout'] for root in roots[:2]] == ['ade20k', 'coco']
    assert roots[2] is None  # sees no images
    assert json.loads(Path(roots[0], META).read_text())['scenes']['train'] == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'w' / 'data').rglob('*.*')}
    again, _ = tasks_left(tmp_path, tmp_path / 'w', resume=True, **content)
    assert [task.data_root for task in again] == roots
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / 'w' / 'data').rglob('*.*')} == before
    with pytest.raises(UserError, match="scenes: 'mountains' is unknown\nThere are: demo"):
        tasks_left(tmp_path, tmp_path / 'v', rows=[dict(TRAINED, name='a')], data=dict(scenes='mountains'))


def test_where_a_config_is(tmp_path):
    suite = read(tmp_path, rows=[dict(TRAINED, name='a')])

    def found(name: str) -> str:
        return plan.config_path(Row('a', 'a', name), suite)

    assert found('config.py') == str(tmp_path / 'config.py')  # beside the suite
    assert found('upernet_replk31b_ade20k.py') == 'replk_mm::upernet_replk31b_ade20k.py'
    assert found('mmseg::a/b.py') == 'mmseg::a/b.py'
    assert found(str(ROOT / 'configs' / 'upernet_replk-nano_ade20k.py')).endswith('configs/upernet_replk-nano_ade20k.py')


def test_published_figures_and_git_come_along(tmp_path):
    rows = [dict(name='a', config='upernet_replk31b_ade20k.py', checkpoint='x.pth'),
            dict(name='b', config='upernet_replk31b_ade20k.py', checkpoint='x.pth', published=False)]
    (one, other), _ = tasks_left(tmp_path, tmp_path / 'w', rows=rows)
    assert one.published == dict(miou_ss=49.9, miou_ms=50.6, params_m=112, flops_g=1170, input=[512, 2048],
                                 source=published.for_config('upernet_replk31b_ade20k').source)
    assert other.published is None and (one.pretraining, other.pretraining) == ('ImageNet-1K', None)
    if (ROOT / '.git').exists():
        assert len(one.git['commit']) == 40 and isinstance(one.git['dirty'], bool)
    else:
        assert one.git is None
