"""The benchmark of networks: which networks are compared, what is timed, and the detection of wrong results."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
from tiny import tiny  # noqa: F401 (a fixture)

from replk_mm.analysis import timing
from replk_mm.analysis.benchmark import network_benchmark, report
from replk_mm.analysis.benchmark.case import (
    OURS,
    PLAIN,
    PLAIN_CHANNELS_LAST,
    PLAIN_TRAINING,
    BenchmarkCase,
    build_networks,
    default_shape,
    peak_memory,
    randomize_constants,
    use_plain_torch,
)
from replk_mm.analysis.benchmark.network_benchmark import BenchmarkSettings, NetworkBenchmark, benchmark_networks
from replk_mm.analysis.benchmark.synthetic_batch import FLOAT32, Precision, SyntheticBatch
from replk_mm.backbones import ConvNeXt
from replk_mm.backbones.overlock import ResidualDepthwiseConv2d
from replk_mm.bench import costs
from replk_mm.deploy import artefact
from replk_mm.engine.inference import reparameterize_checkpoint
from replk_mm.errors import UserError
from replk_mm.ops import DepthwiseConv2d

# ruff: noqa: F811 (fixtures that come from another file)
CONVNEXT = """
model = dict(backbone=dict(type='replk_mm.ConvNeXt', arch=dict(depths=[1, 1], channels=[8, 16]), out_indices=(0, 1),
                           gap_before_final_norm=False, init_cfg=dict(type='Pretrained', checkpoint='nowhere.pth')))
test_dataloader = dict()
"""
QUICK = BenchmarkSettings(repeats=3, warmup=0, seconds=0.0, memory=False)


@pytest.fixture(scope='module', autouse=True)
def allocator_calls():
    """Changes of the allocator's settings, recorded instead of made: this process runs other tests too."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_benchmark, 'keep_freed_memory', lambda keep=True: calls.append(keep) or False)
        patch.setattr(network_benchmark, 'trim_heap', lambda: calls.append('trimmed'))
        yield calls


@pytest.fixture
def convnext(tmp_path) -> str:
    """A config of a small ConvNeXt, which has a backbone only."""
    path = tmp_path / 'convnext.py'
    path.write_text(CONVNEXT)
    return str(path)


def row_of(point: dict, name: str) -> dict:
    return next(row for row in point['rows'] if row['name'] == name)


# -- the networks ------------------------------------------------------------------------------------------------------
def depthwise_layouts(net: nn.Module, image: torch.Tensor) -> set[bool]:
    """Whether the inputs of depthwise convolutions are in the default layout."""
    contiguous: set[bool] = set()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.register_forward_pre_hook(lambda module, args: contiguous.add(args[0].is_contiguous()))
    with torch.no_grad():
        net(image)
    return contiguous


def test_plain_convnext_uses_the_default_layout_and_computes_the_same() -> None:
    arch = dict(depths=[1, 2], channels=[8, 16])
    ours, plain = (ConvNeXt(arch, out_indices=(0, 1), gap_before_final_norm=False).eval() for _ in range(2))
    randomize_constants(ours)
    plain.load_state_dict(ours.state_dict())
    use_plain_torch(plain)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for expected, actual in zip(ours(image), plain(image), strict=True):
            torch.testing.assert_close(expected, actual)
            assert actual.is_contiguous()
    assert not any(isinstance(layer, DepthwiseConv2d) for layer in plain.modules())
    assert plain.state_dict().keys() == ours.state_dict().keys()
    assert (depthwise_layouts(ours, image), depthwise_layouts(plain, image)) == ({False}, {True})


def test_plain_torch_keeps_what_a_depthwise_layer_adds() -> None:
    """OverLoCK has a subclass with a shortcut."""
    torch.manual_seed(0)
    net = nn.Sequential(ResidualDepthwiseConv2d(8))
    x = torch.randn(2, 8, 9, 9)
    expected = x + nn.functional.conv2d(x, net[0].weight, net[0].bias, padding=1, groups=8)
    torch.testing.assert_close(use_plain_torch(net)(x), expected)


def test_baseline_and_ours_are_merged_alike_in_different_layouts(tiny) -> None:
    """The training form is a third network."""
    networks, changes = build_networks(tiny.cfg(), True, 'reparameterized')
    keys = {name: net.state_dict().keys() for name, net in networks.items()}
    assert keys[PLAIN] == keys[OURS] != keys[PLAIN_TRAINING]
    assert len(changes.merged) == 4 and all('lkb_reparam' in ' '.join(keys[name]) for name in (PLAIN, OURS))
    image = torch.randn(1, 3, 64, 64)
    assert {name: depthwise_layouts(net.backbone, image) for name, net in networks.items()} == {
        PLAIN: {True},
        PLAIN_TRAINING: {True},
        PLAIN_CHANNELS_LAST: {False},
        OURS: {False},
    }


def test_randomize_constants_leaves_no_constant() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), ConvNeXt(dict(depths=[1], channels=[8]), in_channels=8))
    randomize_constants(net)
    assert not [name for name, v in net.state_dict().items() if v.dim() == 1 and v.unique().numel() == 1]
    assert (net[1].running_var > 0).all()


def test_reparameterized_checkpoint_has_no_training_form(tiny, tmp_path) -> None:
    trained, merged = tmp_path / 'x.pth', tmp_path / 'merged.pth'
    torch.save(dict(state_dict=build_networks(tiny.cfg(), True, 'training')[0][OURS].state_dict()), trained)
    reparameterize_checkpoint(tiny.cfg(), str(trained), merged)
    assert build_networks(tiny.cfg(), True, 'reparameterized', str(merged))[0].keys() == {
        PLAIN,
        PLAIN_CHANNELS_LAST,
        OURS,
    }
    with pytest.raises(UserError, match=r'merged\.pth'):
        build_networks(tiny.cfg(), True, 'training', str(merged))


# -- measurements ------------------------------------------------------------------------------------------------------
def test_images_have_the_requested_shape(tiny) -> None:
    """The config's preprocessor would pad training images to its crop of 64."""
    benchmark = NetworkBenchmark(BenchmarkCase(str(tiny.config), True, 'train', 'training'), QUICK)
    shapes = set()
    for net in benchmark.networks.values():
        net.backbone.register_forward_pre_hook(lambda module, args: shapes.add(tuple(args[0].shape)))
    benchmark.measure(2, (32, 48))
    assert shapes == {(2, 3, 32, 48)}


@pytest.mark.parametrize('same', [False, True])
def test_each_network_has_the_allocator_of_a_process_of_its_own(same, tiny, allocator_calls) -> None:
    """Plain torch has the C library's settings, and an untimed call follows each change."""
    benchmark = NetworkBenchmark(BenchmarkCase(str(tiny.config), False), replace(QUICK, same_allocator=same))
    networks = {'a': PLAIN, 'b': PLAIN_TRAINING, 'c': OURS, 'd': OURS, 'engine': ''}
    rows = [
        network_benchmark.BenchmarkRow(name, partial(allocator_calls.append, name), network=net)
        for name, net in networks.items()
    ]
    allocator_calls.clear()
    before = benchmark._allocator_changes(rows)
    timing.time_interleaved({row.name: row.call for row in rows}, 3, 0, 0.0, before=before)
    once = [False, 'trimmed', 'a', 'a', 'b', True, 'trimmed', 'c', 'c', 'd', 'engine']
    assert allocator_calls == 3 * (list(networks) if same else once)
    allocator_calls.clear()
    benchmark.measure(1, (64, 64))
    assert allocator_calls == ([True] if same else 3 * [False, 'trimmed', True, 'trimmed'] + [True])


def test_every_measurement_starts_with_the_same_statistics(tiny) -> None:
    """Training steps at one shape change the statistics of BatchNorm."""
    benchmark = NetworkBenchmark(BenchmarkCase(str(tiny.config), True, 'train', 'training'), QUICK)
    norm = next(m for m in benchmark.networks[OURS].modules() if isinstance(m, nn.BatchNorm2d))
    seen, before = [], norm.running_mean.clone()
    norm.register_forward_pre_hook(lambda module, args: seen.append(norm.running_mean.clone()))
    for _ in range(2):
        seen.clear()
        benchmark.measure(2, (32, 32))
        assert torch.equal(seen[0], before) and not torch.equal(seen[-1], before)


@pytest.fixture(scope='module')
def record(tiny) -> dict:
    """The tiny segmentor in both modes and both precisions."""
    case = BenchmarkCase(str(tiny.config), True, threads=torch.get_num_threads())
    settings = replace(QUICK, dtypes=('float32', 'bfloat16'), channels_last=True)
    found = benchmark_networks(case, settings, ['inference', 'train'], [(32, 32)], [0])
    return {**found, 'environment': report.describe_environment(True)}


def test_record_of_a_segmentor(record) -> None:
    assert [(p['mode'], p['form'], p['batch'], p['height']) for p in record['points']] == [
        ('inference', 'reparameterized', 1, 32),
        ('train', 'training', 2, 32),
    ]
    bfloat16, weights = f'{OURS}, bfloat16', f'{OURS}, bfloat16 weights'
    for point in record['points']:
        is_inference = point['mode'] == 'inference'
        names = [PLAIN, PLAIN_CHANNELS_LAST, OURS, bfloat16]
        if is_inference:
            names = [PLAIN, PLAIN_TRAINING, *names[1:], weights]
        assert [row['name'] for row in point['rows']] == names
        precisions = ['autocast', 'converted'] if is_inference else ['autocast']
        assert [row['how'] for row in point['rows'] if row['dtype'] == 'bfloat16'] == precisions
        assert all(row['memory_bytes'] is None and len(row['samples']) == 3 for row in point['rows'])
        assert row_of(point, PLAIN)['times_as_fast'] == dict(median=1.0, low=1.0, high=1.0)
        ratios = np.divide(row_of(point, PLAIN)['samples'], row_of(point, OURS)['samples'])
        assert row_of(point, OURS)['times_as_fast']['median'] == pytest.approx(np.median(ratios))
        assert [row['equal'] for row in point['rows']] == [None] + [True] * (len(names) - 1)
        assert (row_of(point, OURS)['differing_pixels'] is None) == (not is_inference)
    assert any('parallel kernels merged' in note for note in record['notes'])
    assert record['parameters'] > 0 and record['backbone'] == 'replk_mm.RepLKNet'


def test_precisions_of_gpus(convnext, monkeypatch) -> None:
    """Rows of float16 and TF32, whose setting holds for their calls alone; on GPUs of plain torch too."""
    monkeypatch.setattr(network_benchmark, 'energy_per_call', lambda *args: None)
    settings = replace(QUICK, dtypes=('tf32', 'float16'))
    seen = []
    for mode, ways in (('inference', ['autocast', 'converted']), ('train', ['autocast'])):
        form = 'training' if mode == 'train' else 'reparameterized'
        benchmark = NetworkBenchmark(BenchmarkCase(convnext, False, mode, form), settings)
        on_gpu = replace(benchmark.case, device='cuda')
        monkeypatch.setattr(benchmark, 'case', on_gpu)
        assert benchmark._other_precisions(ways) == [
            (name, Precision(dtype, how))
            for dtype, hows in (('tf32', ['']), ('float16', ways))
            for name in (PLAIN, OURS)
            for how in hows
        ]
        monkeypatch.setattr(benchmark, 'case', replace(on_gpu, device='cpu'))
        for net in benchmark.networks.values():
            net.register_forward_pre_hook(lambda *args: seen.append(torch.backends.cuda.matmul.allow_tf32))
        rows = benchmark.measure(1, (32, 32))['rows']
        weights = [f'{OURS}, float16 weights'] if mode == 'inference' else []
        assert [row['name'] for row in rows] == [PLAIN, f'{OURS}, tf32', f'{OURS}, float16', *weights]
        assert [row['how'] for row in rows] == ['float32', 'tf32', *ways]
        assert [row['equal'] for row in rows] == [None] + [True] * (len(rows) - 1)
        assert rows[2]['difference'] > 0 and (mode == 'train' or rows[2]['difference'] < 2**-6)
    # In each mode a trial, and three rounds of an untimed call for the allocator and a timed one. Outputs take one
    # call more, loss and gradients two.
    assert sum(seen) == 2 * (1 + 3 * 2) + 1 + 2


def test_written_record(record, tmp_path) -> None:
    [cost] = costs.read_costs([report.write_record(record, tmp_path)[1]]).values()
    [form] = cost['speed']['values']['forms'].values()
    assert form['median_ms'] == row_of(record['points'][0], OURS)['milliseconds']['median']
    assert cost['speed']['protocol']['shape'] == [32, 32] and 'memory' not in cost
    row = {**record['points'][0]['rows'][0], 'memory_bytes': 777 * 2**20}
    assert ' 777 ' in report.format_record({**record, 'points': [{**record['points'][0], 'rows': [row]}]})
    files = report.write_record(record, tmp_path)
    assert sorted(f.name for f in files) == ['benchmark.json', 'table.txt']
    read = json.loads((tmp_path / 'benchmark.json').read_text(), parse_constant=pytest.fail)
    assert read['environment']['torch'] == torch.__version__ and len(read['points']) == len(record['points'])
    table = (tmp_path / 'table.txt').read_text()
    assert table.count(f'\n{PLAIN} ') == table.count(f'\n{OURS} ') == len(record['points'])
    assert 'DIFFERENT' not in table and 'nan' not in table


@pytest.mark.parametrize('mode', ['inference', 'train'])
def test_wrong_results_are_marked(convnext, mode) -> None:
    form = 'training' if mode == 'train' else 'reparameterized'
    benchmark = NetworkBenchmark(BenchmarkCase(convnext, False, mode, form), QUICK)
    assert row_of(benchmark.measure(1, (32, 32)), OURS)['equal'] is True
    with torch.no_grad():
        benchmark.networks[OURS].stages[1][0].depthwise_conv.weight.mul_(1.1)
    point = benchmark.measure(1, (32, 32))
    assert row_of(point, OURS)['equal'] is False
    assert not report.all_equal(dict(points=[point]))


def test_training_step_has_all_gradients_and_changes_no_weight(tiny) -> None:
    benchmark = NetworkBenchmark(BenchmarkCase(str(tiny.config), True, 'train', 'training'), QUICK)
    net = benchmark.networks[OURS]
    before = {name: p.clone() for name, p in net.named_parameters()}
    benchmark.measure(2, (32, 32))
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    batch = SyntheticBatch(benchmark.cfg, net, 2, (32, 32))
    requires_grad = []
    net.decode_head.conv_seg.register_forward_hook(lambda module, args, out: requires_grad.append(out.requires_grad))
    batch.training_call(net)()
    assert requires_grad == [True]
    assert batch.gradients(net).keys() == {'loss', *(name for name, p in net.named_parameters() if p.requires_grad)}


def test_shape_that_the_network_cannot_take(convnext) -> None:
    with pytest.raises(UserError, match='1x3x4x4'):
        NetworkBenchmark(BenchmarkCase(convnext, False), QUICK).measure(1, (4, 4))


def test_default_shape(tiny, tmp_path, convnext) -> None:
    assert default_shape(str(tiny.config), None) == (64, 64)
    resized = tmp_path / 'resized.py'
    steps = "dict(dataset=dict(type='CocoDataset', pipeline=[dict(type='Resize', scale=(1333, 800))]))"
    resized.write_text(f'{CONVNEXT}train_dataloader = {steps}')
    assert default_shape(str(resized), None) == (800, 1333)
    with pytest.raises(UserError, match='--shape'):
        default_shape(convnext, None)


@pytest.mark.slow
def test_peak_memory_of_a_process_of_its_own(convnext) -> None:
    found = peak_memory(BenchmarkCase(convnext, False, batch=1, shape=(256, 256)), OURS, FLOAT32, True)
    # At least the outputs of stem and norm, 8 x 64 x 64 floats each; None where the system does not report memory.
    assert found is None or found > 2 * 4 * 8 * 64 * 64


@pytest.mark.slow
def test_detector(tmp_path) -> None:
    pytest.importorskip('mmdet')
    from tiny_detector import CONFIG

    path = tmp_path / 'detector.py'
    path.write_text(CONFIG)
    settings = replace(QUICK, dtypes=('float32', 'bfloat16'), engines=['openvino'])
    found = benchmark_networks(BenchmarkCase(str(path), True), settings, ['inference', 'train'], [(64, 64)], [0])
    assert [row['equal'] for point in found['points'] for row in point['rows'] if row['name'] == OURS] == [True, True]
    assert report.all_equal(found)


# -- other engines -----------------------------------------------------------------------------------------------------
def test_missing_engines_are_noted(convnext, monkeypatch) -> None:
    monkeypatch.setattr(artefact.importlib.util, 'find_spec', lambda name: None)
    settings = replace(QUICK, engines=['openvino', 'onnxruntime'])
    found = benchmark_networks(BenchmarkCase(convnext, False), settings, ['inference'], [(32, 32)], [1])
    assert [line.partition('pip install ')[2] for line in found['notes'] if 'pip install' in line] == [
        'openvino onnx onnxscript)',
        'onnxruntime onnx onnxscript)',
    ]
    assert [row['name'] for row in found['points'][0]['rows']] == [PLAIN, OURS]


@pytest.mark.slow
@pytest.mark.parametrize(
    'engine',
    [
        pytest.param('openvino', marks=pytest.mark.extras('openvino', 'onnx', 'onnxscript')),
        pytest.param('onnxruntime', marks=pytest.mark.extras('onnxruntime', 'onnx', 'onnxscript')),
    ],
)
@pytest.mark.parametrize('whole_model', [True, False])
def test_engines_compute_the_same(engine, whole_model, tiny, convnext) -> None:
    config = str(tiny.config) if whole_model else convnext
    case = BenchmarkCase(config, whole_model, threads=torch.get_num_threads())
    row = row_of(NetworkBenchmark(case, replace(QUICK, engines=[engine])).measure(1, (64, 64)), engine)
    assert row['equal'] is True
    assert row['differing_pixels'] == 0.0 if whole_model else row['difference'] < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize('whole_model', [True, False])
def test_gpu(whole_model, tiny) -> None:
    case = BenchmarkCase(str(tiny.config), whole_model, device='cuda')
    settings = replace(QUICK, dtypes=('float32', 'tf32', 'float16', 'bfloat16'), channels_last=True)
    found = benchmark_networks(case, settings, ['inference', 'train'], [(64, 64)], [2])
    assert report.all_equal(found) and not any('not possible' in note for note in found['notes'])
    for point in found['points']:
        assert point['clock'] == (timing.WALL_TIME if whole_model else timing.CUDA_EVENTS)
        assert {row['dtype'] for row in point['rows']} == set(settings.dtypes)
        assert all(min(row['samples']) > 0 for row in point['rows'])
