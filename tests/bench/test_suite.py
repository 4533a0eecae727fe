"""Suite files, and what is left of them to do."""

import hashlib
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from replk_mm import published
from replk_mm.backbones import list_backbones
from replk_mm.backbones.catalogue import find_backbone
from replk_mm.bench import records, schema
from replk_mm.bench.schema import SuiteRow, fingerprint, read_suite
from replk_mm.bench.suites import plan
from replk_mm.bench.suites.task import utc_now
from replk_mm.data.scenes.writer import META
from replk_mm.engine.backbone import published_result
from replk_mm.engine.config import load_config
from replk_mm.errors import UserError
from replk_mm.text import update_page

ROOT = Path(__file__).resolve().parents[2]
SUITES = sorted((ROOT / 'configs' / 'suites').glob('*.yaml'))
FIRST_VERSION = Path(__file__).parents[1] / 'data' / 'first_version'
TRAINED = dict(config='config.py', iterations=5)


def write(folder: Path, **content) -> Path:
    (folder / 'config.py').write_text("model = dict(a=1)\ntest_dataloader = dict()\ndefault_scope = 'mmseg'\n")
    path = folder / 'suite.yaml'
    path.write_text(yaml.safe_dump(dict(name='s', **content), sort_keys=False))
    return path


def test_rows_take_the_defaults_and_override_them(tmp_path):
    common = dict(config='a.py', seeds=[3, 4], options={'x.y': 1, 'z': 2}, measure=['speed', 'complexity'])
    two = dict(label='Two', seeds=[0], config='b.py', schedule='full', measure=['curve'])
    three = dict(checkpoint='w/{row}.{seed}.pth', shape=[64, 96], erf=dict(size=7))
    given = [dict(name='one'), dict(two, name='two', options={'z': 3}), dict(three, name='three')]
    path = write(tmp_path, question='Why\n  not?', defaults=dict(common, iterations=10), rows=given)
    suite = read_suite(path)
    assert suite.rows == [
        SuiteRow(name='one', label='one', iterations=10, **common),
        SuiteRow(name='two', options={'x.y': 1, 'z': 3}, **two),
        SuiteRow(name='three', label='three', **common, **three),
    ]
    assert suite.question == 'Why not?'
    pairs = [(row.name, seed) for row, seed in suite.pairs()]
    assert pairs == [('one', 3), ('one', 4), ('two', 0), ('three', 3), ('three', 4)]
    assert suite.rows[0].measurements() == ('train', 'complexity', 'speed')  # in the order of measuring
    assert suite.rows[2].measurements() == ('complexity', 'speed')
    assert suite.rows[2].checkpoint_of(4) == 'w/three.4.pth'


def test_a_word_is_a_row_with_that_backbone(tmp_path):
    common = dict(config='upernet_replk-nano_demo.py', iterations=2, options={'a.b': 1}, recipe='common')
    suite = read_suite(write(tmp_path, defaults=common, rows=['convnext-atto', 'timm/resnet50.a1_in1k']))
    assert [(row.name, row.label, row.backbone) for row in suite.rows] == [
        ('convnext-atto', 'convnext-atto', 'convnext-atto'),
        ('timm-resnet50.a1_in1k', 'timm/resnet50.a1_in1k', 'timm/resnet50.a1_in1k'),
    ]
    assert suite.rows[0].options == {'a.b': 1, 'backbone': 'convnext-atto', 'recipe': 'common'}


def test_protocols_set_options_and_replace_budgets(tmp_path):
    common = dict(config='a.py', iterations=5, pretrained='w/{backbone}.{seed}.pth', measure=['metric'])
    protocols = [dict(name=name, protocol=name, backbone='b') for name in ('linear', 'head', 'finetune')]
    suite = read_suite(write(tmp_path, defaults=common, rows=[*protocols, dict(name='d', pretrained='none')]))
    assert [row.iterations for row in suite.rows] == [None, 5, 5, 5] and all(row.trains for row in suite.rows)
    frozen = dict(backbone='b', recipe='common', freeze_backbone=True)
    assert [row.options for row in suite.rows] == [frozen, frozen, dict(backbone='b'), {}]
    assert [row.pretrained_of(3) for row in suite.rows] == [*['w/b.3.pth'] * 3, 'none']
    scratch = read_suite(write(tmp_path, **rows(protocol='scratch', recipe='common'))).rows[0]
    assert scratch.pretrained_of(0) == 'none' and scratch.options == dict(recipe='common')
    assert scratch.training_keys() == dict(protocol='scratch') and suite.rows[2].training_keys().keys() == {
        'pretrained'
    }


def rows(**changes) -> dict:
    """A suite of one valid row with changes."""
    return dict(rows=[{**TRAINED, 'name': 'a', **changes}])


UNTRAINED = dict(name='a', config='c.py')


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (dict(), 'rows is missing'),
        (dict(rows=[TRAINED]), 'rows[0] (?): name is missing'),
        (dict(rows=[dict(name='a', iterations=5)]), 'rows[0] (a): config is missing'),
        (rows(colour='red'), 'rows[0] (a): colour: unknown key\nKnown keys: backbone, batch, checkpoint, '),
        (rows(option={}), 'rows[0] (a): option: unknown key\nDid you mean options? '),
        (rows(erf=dict(side=5)), 'rows[0] (a): erf: side: unknown key\nDid you mean size? Known keys: count, size.'),
        (rows(robustness=dict(corruptions=['frost'])), 'rows[0] (a): robustness: corruptions: unknown: frost\n'),
        (rows(robustness=dict(sizes=[1])), 'rows[0] (a): robustness: sizes: unknown key\n'),
        (
            dict(row=[]),
            'row: unknown key\nDid you mean rows? Known keys: data, defaults, name, question, quotes, rows.',
        ),
        (dict(quotes=['guidelines.none']), 'quotes: guidelines.none is no published table\nKnown tables: guidelines.'),
        (dict(rows=[dict(TRAINED, name='a')] * 2), "rows: 'a' names 2 rows"),
        (rows(name='A b'), "rows[0] (A b): name: 'A b' cannot name files\nUse lower-case"),
        (rows(name='12'), 'not digits alone, which number rows for --only'),
        (rows(checkpoint='x'), 'rows[0] (a): has both iterations and checkpoint'),
        (rows(iterations='5'), "iterations: Input should be a valid integer; found '5'"),
        (rows(seeds=[0, 0]), 'seeds: a value is listed twice'),
        (rows(learning_rates=[0.1, 0.1]), 'learning_rates: a value is listed twice'),
        (rows(learning_rates=[0.1]), 'learning_rates: List should have at least 2 items'),
        (rows(fraction=2), 'fraction: Input should be 1, 5, 10, 25 or 100'),
        (rows(protocol='linear'), 'has both iterations and protocol: linear'),
        (rows(protocol='scratch', pretrained='x.pth'), 'scratch starts from random weights'),
        (rows(protocol='head', recipe='authors'), 'recipe authors is for fine-tuning'),
        (rows(recipe='tries'), "recipe: Input should be 'authors' or 'common'"),
        (dict(rows=[dict(UNTRAINED, fraction=5, measure=['speed'])]), 'fraction has no effect without a training'),
        (dict(rows=[dict(UNTRAINED, protocol='linear', measure=['curve'])]), 'curve needs a training'),
        (
            dict(rows=[dict(TRAINED, name=str(n) + 'a', learning_rates=[0.1, 0.2, 0.3][:n]) for n in (2, 3)]),
            'rows: 2a has 2 learning_rates, 3a has 3',
        ),
        (rows(measure=['metric', 'taste']), "measure[1]: Input should be 'complexity', 'metric', "),
        (dict(rows=[dict(UNTRAINED, measure=['metric'])]), 'metric needs trained weights'),
        (dict(rows=[dict(UNTRAINED, measure=[])]), 'nothing to train and nothing to measure'),
        (dict(rows=[dict(UNTRAINED, checkpoint='x', measure=['curve'])]), 'curve needs a training'),
        (dict(rows=[dict(UNTRAINED, checkpoint='x', seeds=[0, 1])]), '2 seeds, but one checkpoint'),
        (dict(rows=[5]), 'rows[0]: Input should be'),
        (dict(rows=['convnext-atto']), 'rows[0]: config is missing'),
        (dict(data=dict(root='x', scenes='demo'), **rows()), 'data: expected either root, or scenes'),
        (dict(data=dict(train=4), **rows()), 'data: expected either root, or scenes'),
    ],
)
def test_errors_name_file_row_and_field(tmp_path, content, words):
    path = write(tmp_path, **content)
    with pytest.raises(UserError) as caught:
        read_suite(path)
    assert str(caught.value).startswith(f'{path}: ') and words in str(caught.value)


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('rows: [', 'not valid YAML: .*line 1'),
        ('- a', 'expected a mapping'),
        ('name: !!python/object/apply:os.getcwd []', 'not valid YAML'),
    ],
)
def test_files_that_are_not_suites(tmp_path, text, words):
    (tmp_path / 'bad.yaml').write_text(text)
    with pytest.raises(UserError, match=f'bad.yaml: {words}'):
        read_suite(tmp_path / 'bad.yaml')
    with pytest.raises(UserError, match='no such suite'):
        read_suite(tmp_path / 'absent.yaml')


def test_numbers_are_those_of_python_and_parts_may_be_merged(tmp_path):
    path = write(tmp_path, **rows())
    path.write_text(
        f'{path.read_text()}  options: &a {{a: 1e-3, b: -2E5, c: 1.5e+2, d: 1e, e: 3, g: 1e3.py}}\n'
        '- {name: b, config: config.py, iterations: 5, options: {<<: *a, e: 4}}\n'
    )
    one, two = read_suite(path).rows
    assert one.options == dict(a=0.001, b=-200000.0, c=150.0, d='1e', e=3, g='1e3.py')
    assert two.options == {**one.options, 'e': 4}


def test_docs_describe_the_schema(tmp_path):
    """``python -m replk_mm.bench.schema docs/suites.md`` writes the tables."""
    page = Path(shutil.copy(ROOT / 'docs' / 'suites.md', tmp_path))
    text = page.read_text()
    for name, model in schema.TABLES.items():
        update_page(page, name, schema.table(model))
    assert page.read_text() == text


@pytest.mark.parametrize('path', SUITES, ids=lambda path: path.stem)
def test_shipped_suites_can_be_read(path):
    suite = read_suite(path)
    assert suite.name == path.stem and suite.question.endswith('?')
    for row in suite.rows:
        if '::' in row.config and not row.backbone:  # test_shipped_suites.py builds the others
            load_config(plan.config_path(row, suite), dict(row.options) or None)
        elif '::' not in row.config:
            assert (ROOT / 'configs' / row.config).is_file()


def test_the_published_suite_has_the_published_rows():
    rows = read_suite(ROOT / 'configs' / 'suites' / 'published.yaml').rows
    own = [row for row in rows if '::' not in row.config and not row.backbone]
    assert sorted(row.config for row in own) == sorted(
        r.config for r in published.results() if r.config and r.task != 'classification'
    )
    exchanged = [row for row in rows if row.backbone]
    others = [row for row in rows if '::' in row.config and not row.backbone]
    assert len(others) == 5 and all(published.for_config(row.config.rpartition('::')[2]) is None for row in others)
    for row in own:
        result = published.for_config(row.config)
        assert all(word in row.label for word in (result.backbone, result.pretraining, result.dataset))
    names = {entry.paper_name: entry for entry in (find_backbone(name)[0] for name in list_backbones())}
    methods = {'UperNet', 'RetinaNet', 'Mask R-CNN', 'Cascade Mask R-CNN', 'Semantic FPN'}
    for result in published.results():
        entry = names.get(result.backbone)
        weights = [w for w in entry.weights if result in entry.published(result.task, w)] if entry else []
        if weights and not result.config and result.method in methods:
            parts = (f'{result.backbone}, {result.pretraining}, {result.method}', result.dataset)
            found = [row for row in exchanged if all(part in row.label for part in parts)]
            found = [r for r in found if result.task == 'segmentation' or result.schedule.split(',')[0] in r.label]
            assert [row for row in found if row.backbone == entry.full_name(weights[0])], result
    assert all(row.checkpoint_of(0) == f'weights/{row.name}.pth' for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'schedule'),
    [
        ('mask-rcnn_moganet-tiny-in1k_coco', '36 epochs'),
        ('mask-rcnn_moganet-tiny-in1k_coco-12e', '12 epochs'),
        ('cascade-mask-rcnn_internimage-l-in22k-384_coco-12e', '12 epochs'),
        ('semantic-fpn_van-b0-in1k_ade20k', '40k iterations, batch 32'),
    ],
)
def test_rows_of_the_published_suite_find_their_figures(name, schedule):
    suite = read_suite(ROOT / 'configs' / 'suites' / 'published.yaml')
    row = next(row for row in suite.rows if row.name == name)
    found = published_result(load_config(plan.config_path(row, suite), dict(row.options)), row.config)
    assert found.schedule == schedule and row.label.startswith(f'{found.backbone}, {found.pretraining}, {found.method}')


def test_missing_weights_of_a_published_row_are_skipped(tmp_path, capsys):
    row = dict(name='a', config='upernet_convnext-tiny_ade20k.py', measure=['metric', 'complexity', 'speed'])
    weights = tmp_path / 'a.pth'
    content = dict(rows=[dict(row, checkpoint=str(weights))], data=dict(root=str(tmp_path)))
    (task,) = tasks_left(tmp_path, tmp_path / 'w', **content)
    assert task.measures == ('complexity',)
    printed = capsys.readouterr().err
    assert 'skips metric, speed' in printed and 'https://github.com/facebookresearch/ConvNeXt' in printed
    weights.touch()
    assert [t.measures for t in tasks_left(tmp_path, tmp_path / 'w', **content)] == [('complexity', 'metric', 'speed')]


# ---- what is left to do

ROWS = [dict(TRAINED, name='a'), dict(TRAINED, name='ab', seeds=[1, 2]), dict(TRAINED, name='c')]


def tasks_left(folder: Path, work_dir: Path, resume: bool = True, only=(), data_root=None, **content):
    options = plan.SuiteOptions(work_dir, resume, only, data_root)
    return plan.remaining_tasks(read_suite(write(folder, **content)), options, build=False)


def finish(task, *measures) -> None:
    for name in measures:
        records.append_record(task.record(name, utc_now(), {}), task.results)


def test_records_of_the_first_version_count(tmp_path, monkeypatch):
    """Its work dir is complete for --resume; a row that is defined differently is not."""
    work_dir = tmp_path / 'w'
    shutil.copytree(FIRST_VERSION, work_dir)
    monkeypatch.chdir(FIRST_VERSION)
    suite = read_suite('suite.yaml')
    found, complaints = records.read_records([work_dir])
    written = [json.loads(line) for path in work_dir.glob('results/*') for line in path.read_text().splitlines()]
    assert sorted(map(str, found)) == sorted(map(str, written)) and len(found) == 14 and not complaints
    assert plan.remaining_tasks(suite, plan.SuiteOptions(work_dir, resume=True)) == []
    assert {state for *_, state in plan.row_states(suite, work_dir)} == {'done'}
    changed = suite.model_copy(
        update=dict(rows=[row.model_copy(update=dict(batch=3, erf=schema.ErfImages(size=65))) for row in suite.rows])
    )
    left = plan.remaining_tasks(changed, plan.SuiteOptions(work_dir, resume=True), build=False)
    assert [task.measures for task in left] == [('speed',), ('speed',), ('erf',), ('memory',)]


def test_types_that_the_first_version_did_not_name_change_no_key(tmp_path):
    def key(**options) -> str:
        [task] = tasks_left(tmp_path, tmp_path / str(options), **rows(options=options))
        return task.shared['config']['sha256']

    keys = [key(val_cfg=dict(type=name)) for name in ('ValLoop', 'replk_mm.ValLoop', 'TestLoop')]
    assert keys[0] == keys[1] != keys[2]
    assert key(**{'model.backbone': dict(type='ConvNeXt')}) != key(**{'model.backbone': dict(type='replk_mm.ConvNeXt')})


def test_a_fingerprint_does_not_depend_on_the_order_of_keys():
    one, other = dict(a=1, b=dict(c=2, d=[3, 4])), dict(b=dict(d=[3, 4], c=2), a=1)
    assert fingerprint(one) == fingerprint(other) != fingerprint(one | dict(b=dict(c=2, d=[4, 3])))


@pytest.mark.parametrize(
    ('only', 'found'),
    [([], 'a0 ab1 ab2 c0'), (['a'], 'a0'), (['a*'], 'a0 ab1 ab2'), (['2'], 'ab2'), (['c', '0'], 'a0 c0')],
)
def test_only(tmp_path, only, found):
    tasks = tasks_left(tmp_path, tmp_path / 'w', only=only, rows=ROWS)
    assert [f'{task.row.name}{task.seed}' for task in tasks] == found.split()
    for name in 'b', '4', 'A':
        with pytest.raises(UserError, match=f'--only {name}: .* has no such row\nKnown rows: a, ab, c; or 0 to 3'):
            tasks_left(tmp_path, tmp_path / 'w', only=[name], rows=ROWS)


def test_finished_measurements_are_left_out_with_resume(tmp_path):
    tasks = tasks_left(tmp_path, tmp_path / 'w', rows=ROWS)
    assert tasks[0].measures == ('train', 'complexity', 'metric', 'speed', 'memory')
    finish(tasks[0], 'train', 'complexity', 'speed')
    finish(tasks[1], *tasks[1].measures)
    with pytest.raises(UserError, match='exist already.*\nContinue with --resume'):
        tasks_left(tmp_path, tmp_path / 'w', resume=False, rows=ROWS)
    left = tasks_left(tmp_path, tmp_path / 'w', rows=ROWS)
    assert [(task.row.name, task.seed, task.measures) for task in left] == [
        ('a', 0, ('metric', 'memory')),
        ('ab', 2, tasks[2].measures),
        ('c', 0, tasks[3].measures),
    ]
    states = [state for *_, state in plan.row_states(read_suite(tmp_path / 'suite.yaml'), tmp_path / 'w')]
    assert states == ['3 of 5 done', 'done', '-', '-']
    # A job that was killed together with its suite leaves no record.
    records.write_json(tasks[3].folder / 'train' / 'progress.json', dict(iteration=3, iterations=5, seconds=1.0))
    *_, (*_, state) = plan.row_states(read_suite(tmp_path / 'suite.yaml'), tmp_path / 'w')
    assert state == 'training: iteration 3 of 5'


def test_a_changed_row_is_measured_again_or_rejected(tmp_path):
    def left(**changes) -> tuple[str, ...]:
        tasks = tasks_left(tmp_path, tmp_path / 'w', rows=[{**ROWS[0], **changes}])
        return tasks[0].measures if tasks else ()

    [task] = tasks_left(tmp_path, tmp_path / 'w', rows=ROWS[:1])
    finish(task, *task.measures)
    assert left() == () == left(label='Another', published=False)
    assert left(shape=[32, 32]) == ('speed', 'memory')
    assert left(macs_shape=[32, 32]) == ('complexity',)
    assert left(measure=['erf', 'metric']) == ('erf',)
    for change, words in (
        (dict(iterations=6), 'another iterations .*: 5 then, 6 now'),
        (dict(options={'model.a': 2}), "another options .*: {} then, {'model.a': 2} now"),
        (dict(fraction=10), 'another fraction .*: None then, 10 now'),
        (dict(protocol='scratch'), 'another protocol .*: None then, scratch now'),
    ):
        with pytest.raises(UserError, match=f'was begun with {words}\nRemove that folder'):
            left(**change)


def test_a_changed_protocol_is_noticed_both_ways_and_weights_must_exist(tmp_path):
    tasks_left(tmp_path, tmp_path / 'w', **rows(fraction=10))
    with pytest.raises(UserError, match='another fraction .*: 10 then, None now'):
        tasks_left(tmp_path, tmp_path / 'w', **rows())
    with pytest.raises(UserError, match='a: pretrained: nowhere.pth: no such file'):
        tasks_left(tmp_path, tmp_path / 'v', **rows(pretrained='nowhere.pth'))


def test_other_weights_are_measured_again(tmp_path):
    content = dict(
        rows=[dict(name='a', config='config.py', checkpoint=str(tmp_path / '{row}.pth'), measure=['metric'])]
    )
    (tmp_path / 'a.pth').write_bytes(b'weights')
    [task] = tasks_left(tmp_path, tmp_path / 'w', **content)
    digest = hashlib.sha256(b'weights').hexdigest()
    records.append_record(
        task.record('metric', utc_now(), {}, checkpoint=dict(path='a.pth', sha256=digest)), task.results
    )
    assert tasks_left(tmp_path, tmp_path / 'w', **content) == []
    (tmp_path / 'a.pth').write_bytes(b'others')
    assert [task.measures for task in tasks_left(tmp_path, tmp_path / 'w', **content)] == [('metric',)]


NANO = 'upernet_replk-nano_demo.py'


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (dict(config='nowhere.py'), 'config: replk_mm::nowhere.py: no such config'),
        (dict(config='mmseg::pspnet/pspnet_r50.py'), 'Did you mean mmseg::pspnet/pspnet_r50'),
        (dict(config=NANO, options={'model.backbone.type': 'ResNett'}), "config: .*model.backbone.type='ResNett'"),
        (dict(config=NANO, options={'model.decode_head.chanels': 8}), 'config: .*model.decode_head.chanels'),
        (dict(config=NANO, options={'model': 8}), 'config: options: model=8'),
        (dict(config=NANO, classes='a,a'), "classes: classes: a,a: 'a' occurs twice"),
        (dict(config=NANO, classes='auto'), 'classes: classes: auto: no file names the classes'),
    ],
)
def test_no_row_runs_if_the_model_of_another_cannot_be_built(tmp_path, changes, words):
    row = dict(name='b', measure=['complexity'], **changes)
    content = dict(data=dict(root=str(tmp_path)), rows=[dict(name='a', config=NANO, measure=['complexity']), row])
    suite = read_suite(write(tmp_path, **content))
    with pytest.raises(UserError, match=words) as info:
        plan.remaining_tasks(suite, plan.SuiteOptions(tmp_path / 'w'))
    assert str(info.value).startswith(f'{suite.path}: rows[1] (b): ')
    assert '--' not in str(info.value).replace('--shape', '') and '.mim' not in str(info.value)
    assert not (tmp_path / 'w').exists(), 'a second try needs no --resume'
    assert [task.row.name for task in plan.remaining_tasks(suite, plan.SuiteOptions(tmp_path / 'w', only=['a']))] == [
        'a'
    ]


@pytest.fixture
def plainly_written_configs(monkeypatch):
    """mmengine formats what it writes, slowly."""
    monkeypatch.setattr('mmengine.config.config.FormatCode', lambda text, **options: (text, True))


@pytest.mark.parametrize(
    ('row', 'option', 'expected'),
    [
        (dict(classes='auto'), None, 'ab'),
        (dict(classes=['x', 'y', 'z']), None, 'xyz'),
        (dict(classes='x,y,z'), 's,t', 'st'),
        ({}, 's,t', 'st'),
    ],
)
def test_classes_of_a_row(tmp_path, plainly_written_configs, row, option, expected):
    (tmp_path / 'classes.txt').write_text('a\nb\n')
    row = dict(name='a', config=NANO, options={'crop_size': [32, 32]}, measure=['complexity'], **row)
    suite = read_suite(write(tmp_path, data=dict(root=str(tmp_path)), rows=[row]))
    [task] = plan.remaining_tasks(suite, plan.SuiteOptions(tmp_path / 'w', classes=option), build=False)
    cfg = load_config(task.config, task.row.options)
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == len(expected)
    assert ''.join(cfg.val_dataloader.dataset.metainfo.classes) == expected and cfg.crop_size == (32, 32)
    assert cfg.test_dataloader.dataset.data_root == str(tmp_path)
    assert task.shared['config']['options'] == row['options']


def test_other_classes_are_other_measurements(tmp_path, plainly_written_configs):
    content = dict(data=dict(root=str(tmp_path)), rows=[dict(name='a', config=NANO, iterations=5, classes='auto')])
    keys = []
    for i, names in enumerate(('a\nb', 'a\nb', 'b\na')):
        (tmp_path / 'classes.txt').write_text(names)
        [task] = tasks_left(tmp_path, tmp_path / f'w{i}', **content)
        keys.append(task.keys['metric'])
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(UserError, match="another classes .*'a', 'b'.* then, .*'b', 'a'"):
        tasks_left(tmp_path, tmp_path / 'w0', **content)


def test_data_of_a_row(tmp_path):
    suite, row = dict(root='suite'), dict(data_root='row')
    keys = set()
    for i, (data, own, option, expected) in enumerate(
        [({}, {}, None, None), (suite, {}, None, 'suite'), (suite, row, None, 'row'), (suite, row, 'cli', 'cli')]
    ):
        [task] = tasks_left(tmp_path, tmp_path / f'w{i}', data=data, data_root=option, **rows(**own))
        assert task.data_root == expected
        keys.add(task.keys['metric'])
    assert len(keys) == 4


def test_scenes_are_written_once_in_the_layout_of_the_config(tmp_path):
    data = dict(scenes='demo', train=2, val=1, size=[64, 64])
    content = dict(
        rows=[
            dict(TRAINED, name='a'),
            dict(TRAINED, name='b', options={'default_scope': 'mmdet'}),
            dict(name='c', config='config.py', measure=['complexity']),
        ],
        data=data,
    )
    tasks = tasks_left(tmp_path, tmp_path / 'w', **content)
    folders = [task.data_root for task in tasks]
    assert [json.loads(Path(root, META).read_text())['layout'] for root in folders[:2]] == ['ade20k', 'coco']
    assert folders[2] is None  # needs no images
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'w' / 'data').rglob('*.*')}
    finish(tasks[2], 'complexity')
    content['rows'][2]['measure'].append('erf')  # one that needs images may be added
    again = tasks_left(tmp_path, tmp_path / 'w', **content)
    assert [task.data_root for task in again] == [*folders[:2], folders[0]] and again[2].measures == ('erf',)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / 'w' / 'data').rglob('*.*')} == before
    with pytest.raises(UserError, match="scenes: 'mountains' is unknown\nKnown scenes: demo"):
        tasks_left(tmp_path, tmp_path / 'v', data=dict(scenes='mountains'), **rows())


@pytest.mark.parametrize(
    ('name', 'found'),
    [
        ('config.py', '{beside}/config.py'),
        ('mmseg::a/b.py', 'mmseg::a/b.py'),
        ('upernet_replk31b_ade20k.py', 'replk_mm::upernet_replk31b_ade20k.py'),
        (__file__, __file__),
    ],
)
def test_config_path(tmp_path, name, found):
    suite = read_suite(write(tmp_path, **rows(config=name)))
    assert plan.config_path(suite.rows[0], suite) == found.format(beside=tmp_path)


def test_published_figures_and_git_state_are_in_the_task(tmp_path):
    row = dict(config='upernet_replk31b_ade20k.py', checkpoint='x.pth')
    one, other = tasks_left(tmp_path, tmp_path / 'w', rows=[dict(row, name='a'), dict(row, name='b', published=False)])
    assert one.shared['published'] == dict(
        miou_ss=49.9,
        miou_ms=50.6,
        dataset='ADE20K',
        params_m=112,
        flops_g=1170,
        input=[512, 2048],
        source=published.for_config('upernet_replk31b_ade20k').source,
    )
    assert other.shared['published'] is None and (one.pretraining, other.pretraining) == ('ImageNet-1K', None)
    if (ROOT / '.git').exists():
        assert len(one.shared['git']['commit']) == 40 and isinstance(one.shared['git']['dirty'], bool)


# ---- the command


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Calls tools/suite.py with a suite of one row whose config does not exist; returns its exit status."""
    tool = importlib.import_module('replk_mm.commands.suite')
    suite = write(tmp_path, rows=[dict(name='a', config='absent.py', measure=['complexity'])])

    def call(*args) -> int:
        monkeypatch.setattr('sys.argv', ['suite.py', str(suite), '--work-dir', str(tmp_path / 'w'), *map(str, args)])
        return tool.main()

    return call


def test_command_lists_and_fails(command, capsys):
    assert command('--list') == 0 and capsys.readouterr().out.split() == ['0', 'a', '0', '-']
    for _ in range(2):  # nothing was begun, so that the second time is as the first
        assert command() == 2
        assert 'rows[0] (a): config: replk_mm::absent.py: no such config' in capsys.readouterr().err


def test_list_shows_the_rows_of_only(command, capsys):
    assert command('--list', '--only', '0') == 0 and capsys.readouterr().out.split() == ['0', 'a', '0', '-']
    assert command('--list', '--only', 'b') == 2 and 'no such row' in capsys.readouterr().err


@pytest.mark.parametrize('text', ['', ' , '])
def test_only_of_nothing_is_not_everything(command, text, capsys):
    with pytest.raises(SystemExit) as caught:  # an unset variable, as of a job array
        command('--only', text, '--list')
    assert caught.value.code == 2 and 'names no row' in capsys.readouterr().err


def test_command_rejects_impossible_requests(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert command('--launcher', 'slurm') == 2 and '--launcher slurm: there is no srun' in capsys.readouterr().err
    assert command('--launcher', 'slurm', '--list') == 0
    monkeypatch.setattr('shutil.which', lambda name: name)
    monkeypatch.setitem(sys.modules, 'submitit', None)
    monkeypatch.delenv('SLURM_JOB_ID', raising=False)
    assert command('--launcher', 'slurm') == 2 and 'pip install submitit' in capsys.readouterr().err
    assert command('--slurm', 'gpus=1') == 2 and '--slurm: has an effect only' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command('--launcher', 'slurm', '--slurm', 'time=4:00:00')
    assert 'number of minutes' in capsys.readouterr().err
    assert command('--nproc', 2) == 2 and 'needs a launcher' in capsys.readouterr().err
    assert not (tmp_path / 'w').exists()
    assert command('--work-dir', tmp_path / 'suite.yaml' / 'w') == 2
    assert 'suite.yaml/w: cannot be written to' in capsys.readouterr().err
