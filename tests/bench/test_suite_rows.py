"""What a row of a suite measures, against the commands that measure the same, and by hand."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CONFIG, ROOT, make_data, run_tool, tiny, tool_environment, trained  # noqa: F401

from replk_mm.bench import choose, records
from replk_mm.bench.rescore import rescore
from replk_mm.bench.schema import read_suite
from replk_mm.bench.suites import inputs, measurements, plan, progress, training
from replk_mm.bench.suites.worker import run_task
from replk_mm.engine.config import set_data_root
from replk_mm.engine.evaluate import Evaluation
from replk_mm.engine.export import ExportOptions, export_checkpoint
from replk_mm.errors import UserError
from replk_mm.evaluation.per_image import PerImageScores
from replk_mm.files import sha256

_count = itertools.count()


@pytest.fixture(autouse=True)
def _a_process_of_its_own(monkeypatch):
    """mmengine logs all runs of a process to the folder of the first; a row has its own process."""

    def named(task):
        cfg = inputs.load_task_config(task)
        cfg.experiment_name = cfg.visualizer.name = f'row{next(_count)}'
        return cfg

    for module in (measurements, training):
        monkeypatch.setattr(module, 'load_task_config', named)


def task_of(folder: Path, tiny, **row):  # noqa: F811
    """The task of a row with the tiny network."""
    folder.mkdir(exist_ok=True)
    path = folder / 'suite.yaml'
    path.write_text(
        json.dumps(
            dict(name='s', data=dict(root=str(tiny.data)), rows=[{'name': 'a', 'config': str(tiny.config), **row}])
        )
    )
    [task] = plan.remaining_tasks(read_suite(path), plan.SuiteOptions(folder / 'w', resume=True, device='cpu'))
    return task


def test_the_layout_states_which_classes_are_used():
    """Cityscapes has 19 classes, of which road is the first and car the 14th."""
    dataset = dict(type='CityscapesDataset', data_root='d', metainfo=dict(classes=('car', 'road')))
    found = inputs.dataset_layout(dataset, 'mmseg')
    assert found['label_map'] == {**dict.fromkeys(range(19), 255), 0: 1, 13: 0}
    assert 'label_map' not in inputs.dataset_layout({**dataset, 'metainfo': {}}, 'mmseg')


@pytest.mark.slow
def test_metric_equals_that_of_the_test_command(tiny, trained, tmp_path):  # noqa: F811
    task = task_of(tmp_path, tiny, checkpoint=str(trained), measure=['metric'])
    found = measurements.TABLE['metric'](task)
    written = json.loads((task.folder / 'test' / 'metrics.json').read_text())
    assert found.values['metrics']['mIoU'] == written['metrics']['mIoU'] > 0
    assert found.files['predictions'] == 'runs/a/0/test/predictions'
    # by hand, from the predicted and the true label maps
    labels = Path(tiny.data, found.facts['data']['labels'])
    predicted = task.folder / 'test' / 'predictions'
    both = [
        (np.array(Image.open(path)), np.array(Image.open(labels / path.name)))
        for path in sorted(predicted.glob('*.png'))
    ]
    assert len(both) == found.values['images'] == found.protocol['data']['images']
    ious = []
    for i, name in enumerate(found.facts['data']['classes'], 1):  # files hold class i as i + 1, and 0 is not scored
        kept = [(p[t != 0], t[t != 0]) for p, t in both]
        intersection = sum(int(((p == i) & (t == i)).sum()) for p, t in kept)
        union = sum(int(((p == i) | (t == i)).sum()) for p, t in kept)
        if union:
            ious.append(100 * intersection / union)
        if name in found.values['per_class']:
            assert found.values['per_class'][name]['IoU'] == pytest.approx(ious[-1])
    assert found.values['metrics']['mIoU'] == pytest.approx(np.mean(ious))
    assert found.values['reparameterized']['metrics']['mIoU'] == pytest.approx(np.mean(ious), abs=0.05)
    assert found.checkpoint['trained'] is False and found.checkpoint['iteration'] == 30
    path = task.work_dir / found.files['statistics']
    assert found.facts['statistics']['mIoU'] == dict(file='statistics.npz', sha256=sha256(path))
    counts = PerImageScores.load(path)
    assert counts.score() == pytest.approx(found.values['metrics']['mIoU']) and len(counts.images) == len(both)
    assert found.protocol['iterations'] == 30 and found.protocol['mode'] == 'whole' and found.protocol['batch'] is None


def test_values_of_a_metric_are_finite_percentages(tiny, tmp_path, monkeypatch):  # noqa: F811
    """mmdet's scores are fractions; a class or size without objects is NaN, which records do not hold."""
    torch.save(dict(state_dict={}, meta={}), tmp_path / 'x.pth')
    metrics = {'coco/bbox_mAP': 0.25, 'coco/bbox_mAP_s': math.nan, 'coco/segm_mAP': math.inf, 'time': 1.0, 'file': 'x'}
    per_class = dict(cat=dict(bbox_mAP=0.5, bbox_mAP_50=math.nan, instances=3))
    meta = dict(replk_mm=dict(reparameterized=dict(merge=True, fold=True)))
    found = Evaluation(metrics, per_class, [], None, meta, 'all', images=2, seconds=1.0, image=None)
    monkeypatch.setattr(measurements, 'evaluate', lambda *args, **options: found)
    cfg = tiny.cfg()
    set_data_root(cfg, str(tiny.data))
    monkeypatch.setattr(measurements, 'load_task_config', lambda task: cfg)  # reading it again takes a second
    task = task_of(tmp_path, tiny, checkpoint=str(tmp_path / 'x.pth'), measure=['metric'])
    values = measurements.metric(task).values
    assert values['metrics'] == {'coco/bbox_mAP': 25.0, 'coco/bbox_mAP_s': None, 'coco/segm_mAP': None}
    assert values['per_class'] == dict(cat=dict(bbox_mAP=50.0, bbox_mAP_50=None, instances=3))
    assert (values['primary'], values['unit'], values['images']) == ('coco/bbox_mAP', 'AP', 2)
    metrics['coco/bbox_mAP'] = math.nan
    with pytest.raises(UserError, match='coco/bbox_mAP is not a finite number'):
        measurements.metric(task)


@pytest.mark.parametrize(('erf', 'size', 'count'), [({}, 96, 50), (dict(size=32, count=3), 32, 3)])
def test_receptive_field_of_a_row(tiny, tmp_path, monkeypatch, erf, size, count):  # noqa: F811
    """Images of the longer side of the crop, and as many as in the paper, unless the row states others."""
    asked = []

    def measure(cfg, checkpoint, images, size, count, out, *, device, seed):
        asked.append((checkpoint, images, size, count, out, device, seed))
        return SimpleNamespace(values=dict, protocol=dict, notes=list, backbone='')

    monkeypatch.setattr('replk_mm.analysis.erf.measure_erf', measure)
    monkeypatch.setattr('replk_mm.analysis.erf_report.draw_heat_maps', lambda found, path: None)
    options = {'model.data_preprocessor.size': (96, 64)}
    task = task_of(tmp_path, tiny, measure=['erf'], erf=erf, seeds=[7], options=options)
    measurements.erf(task)
    images = tiny.data / 'images' / 'validation'
    assert asked == [(None, images, size, count, task.folder / 'erf', 'cpu', 7)]


def test_robustness_of_a_row(tiny, tmp_path, monkeypatch):  # noqa: F811
    asked = []

    def measure(cfg, checkpoint, options, settings, out):
        asked.append((checkpoint, options.data_root, options.device, settings.images, settings.corruptions, out))
        return dict(values=dict(images=9), protocol=dict(robustness=settings.model_dump()), tested=['x.jpg'])

    monkeypatch.setattr('replk_mm.analysis.robustness.measure_robustness', measure)
    torch.save(dict(state_dict={}, meta={}), tmp_path / 'x.pth')
    row = dict(
        measure=['robustness'], robustness=dict(images=9, corruptions=['fog']), checkpoint=str(tmp_path / 'x.pth')
    )
    task = task_of(tmp_path, tiny, **row)
    found = measurements.TABLE['robustness'](task)
    assert asked == [(row['checkpoint'], str(tiny.data), 'cpu', 9, ['fog'], task.folder / 'robustness')]
    assert found.files['profile'] == 'runs/a/0/robustness/robustness.png' and found.facts == dict(tested=['x.jpg'])
    assert found.protocol['mode'] == 'whole' and found.protocol['robustness']['severities'] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_all_measurements_have_the_classes_of_the_row(tiny, tmp_path):  # noqa: F811
    names = [f'kind {i}' for i in range(9)]  # one more than the config has
    row = dict(iterations=1, measure=['metric', 'complexity', 'speed'], shape=[64, 64])
    task = task_of(tmp_path, tiny, classes=names, **row)
    assert run_task(task, measurements.TABLE, measurements.environment())
    found = {one['measurement']: one for one in records.read_records([tmp_path / 'w'])[0]}
    assert set(found['metric']['values']['per_class']) <= set(names)
    assert found['metric']['facts']['data']['classes'] == names
    plain = measurements.TABLE['complexity'](task_of(tmp_path / 'plain', tiny, **row))
    assert found['complexity']['values']['parameters'] == plain.values['parameters'] + 2 * (8 + 1)  # two heads


def test_data_of_another_size_is_other_data(tiny, tmp_path):  # noqa: F811
    found = []
    for root in (tiny.data, make_data(tmp_path / 'same'), tmp_path / 'same'):
        cfg = tiny.cfg()
        set_data_root(cfg, str(root))
        found.append(inputs.describe_split(cfg, 'test')[0])
        if root == tmp_path / 'same':
            image = next((root / 'annotations' / 'validation').glob('*.png'))
            image.write_bytes(image.read_bytes() + b' ')
    assert found[0]['sha256'] == found[1]['sha256'] != found[2]['sha256']  # wherever they are


@pytest.mark.slow
def test_complexity_speed_and_memory(tiny, trained, tmp_path):  # noqa: F811
    task = task_of(tmp_path, tiny, checkpoint=str(trained), measure=['complexity', 'speed'], shape=[96, 64], batch=2)
    found = measurements.TABLE['complexity'](task)
    weights = torch.load(trained, weights_only=False)['state_dict']
    buffers = ('running_mean', 'running_var', 'num_batches_tracked')
    assert found.values['parameters'] == sum(w.numel() for name, w in weights.items() if not name.endswith(buffers))
    assert found.values['merged_parameters'] < found.values['inference_parameters'] < found.values['parameters']
    assert found.protocol['shape'] == [64, 64]
    found = measurements.TABLE['speed'](task)
    assert set(found.values['forms']) == {'training', 'reparameterized'}
    for form in found.values['forms'].values():
        assert 0 < form['low_ms'] <= form['median_ms'] <= form['high_ms']
        assert form['throughput'] == pytest.approx(2 / (form['median_ms'] / 1e3))
    assert (found.protocol['shape'], found.protocol['batch'], found.protocol['device']) == ([96, 64], 2, 'cpu')


@pytest.mark.parametrize(('batch', 'batches'), [(None, (1, 2)), (5, (5, 5))])
def test_memory_of_training_takes_a_batch_that_this_machine_can_train(tiny, tmp_path, monkeypatch, batch, batches):  # noqa: F811
    # The config's SyncBN is BN here, which cannot train on one image pooled to a pixel.
    asked = []
    monkeypatch.setattr(measurements, 'peak_memory', lambda job, *args: asked.append(job) or 1000 * len(asked))
    found = measurements.TABLE['memory'](
        task_of(
            tmp_path,
            tiny,
            measure=['memory'],
            options={'model.decode_head.norm_cfg': dict(type='SyncBN')},
            **(dict(batch=batch) if batch else {}),
        )
    )
    assert [(job.mode, job.form, job.batch) for job in asked] == [
        ('inference', 'reparameterized', batches[0]),
        ('train', 'training', batches[1]),
    ]
    assert found.values == dict(inference_bytes=1000, training_bytes=2000)
    assert found.protocol['training_batch'] == batches[1]


def test_missing_weights_fail_only_measurements_that_need_them(tiny, tmp_path):  # noqa: F811
    task = task_of(tmp_path, tiny, checkpoint='nowhere/{row}.pth', measure=['metric', 'complexity'])
    assert not run_task(task, measurements.TABLE, {})
    found = {one['measurement']: one for one in records.read_records([tmp_path / 'w'])[0]}
    assert found['complexity']['status'] == 'done'
    assert found['metric']['reason'].startswith('nowhere/a.pth: no such checkpoint')


@pytest.mark.parametrize('preflight', [True, False])
def test_a_row_can_skip_the_dry_run(tiny, tmp_path, monkeypatch, preflight):  # noqa: F811
    started = []

    def train(cfg, notes, preflight=True):
        started.append(preflight)
        raise UserError('enough')

    monkeypatch.setattr(training.engine, 'train', train)
    with pytest.raises(UserError, match='enough'):
        training.train(task_of(tmp_path, tiny, iterations=3, measure=['metric'], preflight=preflight))
    assert started == [preflight]


def test_images_of_all_processes_count(tiny, tmp_path, monkeypatch):  # noqa: F811
    """Four processes with two images each see 24 images in three iterations."""
    task = task_of(tmp_path, tiny, iterations=3, measure=['metric'])
    done = dict(iteration=3, iterations=3, seconds=1.5)
    monkeypatch.setattr(training, 'processes_of', lambda launcher: (4, 4))
    monkeypatch.setattr(
        training.engine,
        'train',
        lambda cfg, notes, preflight: records.write_json(task.folder / 'train' / 'progress.json', done),
    )
    found = training.train(task)
    assert (found.protocol['batch'], found.protocol['samples_seen']) == (2 * 4, 24)
    assert found.values == dict(seconds=1.5, iterations=3, samples_seen=24)


@pytest.mark.slow
def test_resumed_training_has_a_gapless_curve(tiny, tmp_path, monkeypatch):  # noqa: F811
    row = dict(iterations=4, measure=['curve', 'metric'], seeds=[3], options={'default_hooks.checkpoint.interval': 2})
    task = task_of(tmp_path, tiny, **row)
    original = progress.ProgressFileHook.after_train_iter

    def cut(self, runner, *args, **kwargs):
        original(self, runner, *args, **kwargs)
        if runner.iter == 2:
            raise MemoryError('a heavy image')

    with monkeypatch.context() as patched:
        patched.setattr(progress.ProgressFileHook, 'after_train_iter', cut)
        assert not run_task(task, measurements.TABLE, {})
    [failed] = records.read_records([tmp_path / 'w'])[0]
    assert 'out of memory at iteration 2' in failed['reason'] and 'a heavy image' in failed['reason']
    task = task_of(tmp_path, tiny, **row)
    assert task.measures == ('train', 'metric', 'curve')
    assert run_task(task, measurements.TABLE, {})
    found = {one['measurement']: one for one in records.read_records([tmp_path / 'w'])[0]}
    assert [step for step, _ in found['curve']['values']['loss']] == [1, 2, 3, 4]
    assert found['curve']['values']['metric'][-1] == [4, pytest.approx(found['metric']['values']['metrics']['mIoU'])]
    assert found['train']['values']['iterations'] == 4 and found['train']['values']['samples_seen'] == 4 * 2
    assert found['train']['facts']['resumed_from'].endswith('iter_2.pth')
    assert found['metric']['checkpoint']['trained'] is True and found['metric']['checkpoint']['iteration'] == 4
    assert found['metric']['protocol']['samples_seen'] == 8 and found['metric']['protocol']['crop'] == [64, 64]
    assert found['curve']['protocol'] == found['metric']['protocol']
    machine = {name: found['train']['protocol'][name] for name in ('device', 'threads', 'processes')}
    assert machine == dict(device='cpu', threads=torch.get_num_threads(), processes=1)
    assert [one.differences for one in rescore(found.values(), [tiny.data])] == [[]]
    recipe = found['metric']['protocol']['recipe']
    assert recipe['origin'] == 'common' and recipe['lr'] > 0 and recipe == found['train']['facts']['recipe']


@pytest.mark.slow
def test_the_best_learning_rate_on_held_out_training_images_is_used(tiny, tmp_path, monkeypatch):  # noqa: F811
    """One rate diverges; the record has all scores, and the last training the best rate, the fraction and no tries."""
    data = str(make_data(tmp_path / 'data', train=20))
    rates = [1e30, 1e-2, 1e-12]
    row = dict(protocol='head', fraction=25, learning_rates=rates, iterations=12, data_root=data)
    task = task_of(tmp_path, tiny, **row, measure=['metric'], pretrained='none')
    assert run_task(task, measurements.TABLE, {})
    found = {one['measurement']: one for one in records.read_records([tmp_path / 'w'])[0]}
    facts, protocol = found['train']['facts'], found['metric']['protocol']
    scores = {one['learning_rate']: one['value'] for one in facts['learning_rates']}
    assert list(scores) == rates and scores[1e30] is None and 0 <= scores[1e-12] < scores[1e-2] <= 100
    assert 'not finite' in facts['learning_rates'][0]['reason'] and facts['recipe']['lr'] == 1e-2
    assert protocol['recipe'] == 'best of 3 learning rates' and protocol['pretraining'] == 'none'
    assert protocol['protocol'] == 'head' and protocol['fraction'] == 25
    assert facts['training_images']['datasets'][0]['images'] == 5
    assert facts['learning_rates'][1]['training_images']['datasets'][0]['images'] == 4
    assert not list((task.folder / 'tries').rglob('iter_*.pth'))
    monkeypatch.setattr(training.engine, 'train', None)  # a resumed row keeps the scores
    assert training._score(task, 1e-2)['value'] == scores[1e-2]


def test_without_a_finite_training_there_is_no_learning_rate(monkeypatch):
    monkeypatch.setattr(training, '_score', lambda task, rate: dict(learning_rate=rate, value=None))
    task = SimpleNamespace(row=SimpleNamespace(protocol='head', learning_rates=[1.0, 2.0]), folder=Path())
    with pytest.raises(UserError, match='learning_rates: no training is finite'):
        training.train(task)


@pytest.mark.slow
def test_a_linear_row_measures_the_linear_network(tiny, tmp_path):  # noqa: F811
    row = dict(protocol='linear', fraction=25, data_root=str(make_data(tmp_path / 'data', train=20)))
    task = task_of(tmp_path, tiny, **row, measure=['metric', 'complexity', 'memory'])
    assert run_task(task, measurements.TABLE, {})
    found = {one['measurement']: one for one in records.read_records([tmp_path / 'w'])[0]}
    protocol = found['metric']['protocol']
    assert protocol['protocol'] == 'linear' and protocol['fraction'] == 25 and protocol['pretraining'] == 'none'
    assert found['train']['facts']['linear_probe']['images'] == 5
    assert found['metric']['values']['metrics']['mIoU'] > 0 and found['metric']['checkpoint']['trained']
    parts = {part['name']: part['parameters'] for part in found['complexity']['values']['parts']}
    classes, channels = 8, 8 + 16 + 32 + 64
    assert parts['decode_head'] == classes * (channels + 1) and 'auxiliary_head' not in parts
    memory = found['memory']['values']
    assert memory['inference_bytes'] > 0 and memory['training_bytes'] is None  # a probe trains on cached features


def test_curve_of_epochs_and_repeated_iterations(tmp_path):
    first = [dict(loss=3.0, epoch=1, step=2), dict(loss=2.0, epoch=1, step=4), {'coco/bbox_mAP': 0.1, 'step': 1}]
    second = [dict(loss=1.0, epoch=2, step=6), dict(loss=math.nan, epoch=2, step=8), {'coco/bbox_mAP': 0.3, 'step': 2}]
    for name, rows in (('1', [*first, dict(loss=9.0, epoch=2, step=6)]), ('2', second)):
        folder = tmp_path / name / 'vis_data'
        folder.mkdir(parents=True)
        (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, rows)) + '\n{"loss": 5')
    values, facts = training.read_curve(tmp_path)
    assert values == dict(loss=[[2, 3.0], [4, 2.0], [6, 1.0]], metric=[[4, 10.0], [6, 30.0]], name='coco/bbox_mAP')
    assert facts['best'] == dict(iteration=6, value=30.0)


@pytest.mark.parametrize(
    ('weights', 'name'),
    [
        (None, 'none'),
        ('torchvision://resnet50', 'ImageNet-1K'),
        ('somewhere/own_weights.pth', 'own_weights.pth'),
        ('https://dl.fbaipublicfiles.com/convnext/convnext_base_22k_224.pth', 'ImageNet-22K'),
    ],
)
def test_pretraining(tiny, weights, name):  # noqa: F811
    cfg = tiny.cfg()
    cfg.model.backbone.init_cfg = weights and dict(type='Pretrained', checkpoint=weights)
    assert training.find_pretraining(cfg) == name


# ---- whole commands


def suite_of(folder: Path, **content) -> Path:
    (folder / 'tiny.py').write_text(CONFIG)
    path = folder / 'suite.yaml'
    path.write_text(json.dumps(dict(name='whole', data=dict(scenes='demo', train=8, val=4, size=[64, 64]), **content)))
    return path


@pytest.mark.slow
def test_a_suite_from_the_command_line_killed_while_it_trains(tmp_path):
    diverging = {'optim_wrapper.optimizer.lr': 1e30, 'param_scheduler': [], 'default_hooks.checkpoint.interval': 1}
    path = suite_of(
        tmp_path,
        defaults=dict(
            config='tiny.py',
            options={'default_hooks.checkpoint.interval': 5},
            iterations=60,
            measure=['metric', 'complexity', 'memory', 'erf', 'curve'],
        ),
        rows=[dict(name='long'), dict(name='no-number', iterations=3, options=diverging)],
    )
    arguments = [str(path), '--work-dir', str(tmp_path / 'w'), '--device', 'cpu']
    command = [sys.executable, str(ROOT / 'tools' / 'suite.py'), *arguments]
    suite = subprocess.Popen(command, env=tool_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoint = tmp_path / 'w' / 'runs' / 'long' / '0' / 'train' / 'last_checkpoint'
    end = time.monotonic() + 200
    while not checkpoint.exists():
        assert suite.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.kill(suite.pid, signal.SIGKILL)
    suite.communicate()
    assert run_tool('suite', *arguments).returncode == 2  # without --resume
    done = run_tool('suite', *arguments, '--resume', timeout=500)
    assert done.returncode == 1, done.stderr
    assert 'no-number seed 0: train: iteration 2: the loss is not finite' in done.stdout
    assert not (tmp_path / 'w/runs/no-number/0/train/iter_2.pth').exists()
    found = {(one['row'], one['measurement']): one for one in records.read_records([tmp_path / 'w'])[0]}
    assert {key for key, one in found.items() if one['status'] == 'done'} == {
        ('long', m) for m in ('train', 'metric', 'complexity', 'memory', 'erf', 'curve')
    }
    assert found['long', 'train']['facts']['resumed_from']
    steps = [step for step, _ in found['long', 'curve']['values']['loss']]
    assert steps == sorted(set(steps)) and steps[-1] == 60
    assert found['long', 'memory']['values']['training_bytes'] > 0
    for one in found.values():
        assert one['environment']['torch'] == torch.__version__
        assert all((tmp_path / 'w' / file).exists() for file in one['files'].values())
    listed = run_tool('suite', *arguments, '--list').stdout.splitlines()
    assert listed[0].split()[:4] == ['0', 'long', '0', 'done']
    assert 'failed: train: iteration 2: the loss is not finite' in listed[1]
    again = run_tool('suite', *arguments, '--resume', '--only', 'long')
    assert again.returncode == 0 and 'rows and seeds: 0 to do' in again.stderr


@pytest.mark.slow
def test_two_processes_of_torchrun_train_and_test_together(tmp_path):
    path = suite_of(tmp_path, rows=[dict(name='a', config='tiny.py', iterations=4, measure=['metric', 'complexity'])])
    done = run_tool(
        'suite',
        path,
        '--work-dir',
        tmp_path / 'w',
        '--device',
        'cpu',
        '--launcher',
        'pytorch',
        '--nproc',
        2,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + (tmp_path / 'w' / 'runs' / 'a' / '0' / 'log.txt').read_text()[-3000:]
    found = {one['measurement']: one for one in records.read_records([tmp_path / 'w'])[0]}
    assert {name: one['status'] for name, one in found.items()} == dict(train='done', metric='done', complexity='done')
    assert found['train']['facts']['processes'] == 2 and found['train']['values']['samples_seen'] == 4 * 2 * 2
    assert found['metric']['values']['images'] == 4
    assert len((tmp_path / 'w' / 'results' / 'a.0.jsonl').read_text().splitlines()) == 3  # by one of the two


@pytest.mark.slow
def test_an_exported_network_is_a_row_under_the_protocol_of_its_training(tiny, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv('REPLK_MM_TRUST_EXPORTS', '1')
    row = dict(iterations=2, preflight=False, measure=['metric', 'speed'])
    task = task_of(tmp_path, tiny, **row)
    assert run_task(task, measurements.TABLE, {})
    before = records.latest_records(task.results)
    options = ExportOptions('torch', images=0, dynamic=True, data_root=str(tiny.data))
    export_checkpoint(tiny.cfg(), before['metric']['checkpoint']['path'], tmp_path / 'out', options)
    [new] = choose.artefact_rows(read_suite(tmp_path / 'suite.yaml'), task.work_dir, [tmp_path / 'out'])
    assert new['name'] == 'a-out-torch-fp32' and new['label'] == 'a, torch fp32' and new['seeds'] == [0]
    new |= dict(config=str(tiny.config), measure=['metric', 'speed', 'memory'])
    path = tmp_path / 'suite.yaml'
    rows = [{'name': 'a', 'config': str(tiny.config), **row}, new]
    path.write_text(json.dumps(dict(name='s', data=dict(root=str(tiny.data)), rows=rows)))
    [task] = plan.remaining_tasks(read_suite(path), plan.SuiteOptions(task.work_dir, resume=True, device='cpu'))
    assert run_task(task, measurements.TABLE, {})
    after = records.latest_records(task.results)
    for name in ('metric', 'speed'):
        assert after[name]['protocol'] == before[name]['protocol']
    assert after['metric']['values']['metrics']['mIoU'] == pytest.approx(
        before['metric']['values']['metrics']['mIoU'], abs=0.1
    )
    assert after['speed']['facts']['engine'] == 'torch, fp32' and before['speed']['facts']['engine'] is None
    assert after['speed']['values']['forms']['reparameterized']['median_ms'] > 0
    assert after['memory']['values']['inference_bytes'] is None
    assert after['metric']['checkpoint']['sha256'] == sha256(tmp_path / 'out' / 'manifest.json')
    assert not task.unfinished()
    assert choose.artefact_rows(read_suite(path), task.work_dir, [tmp_path / 'out']) == []
    with pytest.raises(UserError, match='was not exported from a checkpoint of'):
        choose.artefact_rows(read_suite(path), tmp_path / 'elsewhere', [tmp_path / 'out'])
