"""The benchmarks of networks and of the operator: what is timed, whether it is right, what is written, the command."""

import importlib.util
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from tiny import ROOT, run_tool, tiny  # noqa: F401 (a fixture)
from torch.utils.flop_counter import FlopCounterMode

from replk_mm.analysis import timing
from replk_mm.analysis.benchmark import baseline, network_benchmark, operator_benchmark, report
from replk_mm.analysis.benchmark import inference_engines as engines
from replk_mm.analysis.benchmark.baseline import OURS, PLAIN, PLAIN_TRAINING
from replk_mm.analysis.benchmark.case import BenchmarkCase, default_shape
from replk_mm.analysis.benchmark.network_benchmark import Bench, Settings
from replk_mm.analysis.benchmark.operator_benchmark import Shape
from replk_mm.analysis.benchmark.synthetic_batch import SyntheticBatch
from replk_mm.backbones import ConvNeXt
from replk_mm.errors import UserError
from replk_mm.ops import IMPLEMENTATIONS, DepthwiseConv2d

# ruff: noqa: F811 (fixtures that come from another file)
CONVNEXT = """
model = dict(backbone=dict(type='replk_mm.ConvNeXt', arch=dict(depths=[1, 1], channels=[8, 16]), out_indices=(0, 1),
                           gap_before_final_norm=False, init_cfg=dict(type='Pretrained', checkpoint='nowhere.pth')))
test_dataloader = dict()
"""


@pytest.fixture(scope='module', autouse=True)
def allocators():
    """Calls of the C library's settings, which are not made: this process runs other tests too."""
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_benchmark, 'keep_freed_memory', lambda keep=True: told.append(keep) or False)
        patch.setattr(network_benchmark, 'trim_heap', lambda: told.append('trimmed'))
        yield told


@pytest.fixture
def convnext(tmp_path):
    """A config of a small ConvNeXt, whose backbone alone can be measured."""
    path = tmp_path / 'convnext.py'
    path.write_text(CONVNEXT)
    return str(path)


@pytest.fixture(scope='module')
def operators():
    shapes = [Shape(kernel, size, 4, 1) for size in (8, 12) for kernel in (3, 9)]
    record = operator_benchmark.run(shapes, implementations=['fft', 'padded'], repeats=3, warmup=0, seconds=0.0)
    return {**record, 'environment': report.environment(False)}


QUICK = Settings(repeats=3, warmup=0, seconds=0.0, memory=False)


def row_of(point: dict, name: str) -> dict:
    return next(row for row in point['rows'] if row['name'] == name)


# -- the networks ------------------------------------------------------------------------------------------------------
def layouts(net: nn.Module, image: torch.Tensor) -> set[bool]:
    """Whether the inputs of depthwise convolutions larger than 1x1 maps are in the default layout."""
    found: set[bool] = set()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.register_forward_pre_hook(lambda module, args: found.add(args[0].is_contiguous()))
    with torch.no_grad():
        net(image)
    return found


def test_plain_convnext_is_in_the_default_layout_and_computes_the_same() -> None:
    net = ConvNeXt(dict(depths=[1, 2], channels=[8, 16]), out_indices=(0, 1), gap_before_final_norm=False).eval()
    baseline.randomize_constants(net)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(image)
        state = {key: value.clone() for key, value in net.state_dict().items()}
        other = ConvNeXt(dict(depths=[1, 2], channels=[8, 16]), out_indices=(0, 1), gap_before_final_norm=False).eval()
        other.load_state_dict(state)
        baseline.use_plain_torch(other)
        for a, b in zip(expected, other(image), strict=True):
            torch.testing.assert_close(a, b)
            assert b.is_contiguous()
    assert not any(isinstance(layer, DepthwiseConv2d) for layer in other.modules())
    assert other.state_dict().keys() == state.keys()
    assert (layouts(net, image), layouts(other, image)) == ({False}, {True})


def test_networks_that_are_compared(tiny) -> None:
    """Plain torch and ours are merged and folded alike, in different layouts; the training form is a third network."""
    found, changes = baseline.build_networks(tiny.cfg(), True, 'reparameterized')
    keys = {name: net.state_dict().keys() for name, net in found.items()}
    assert keys[PLAIN] == keys[OURS] != keys[PLAIN_TRAINING]
    assert len(changes.merged) == 4 and all('lkb_reparam' in ' '.join(keys[name]) for name in (PLAIN, OURS))
    image = torch.randn(1, 3, 64, 64)
    assert {name: layouts(net.backbone, image) for name, net in found.items()} == {
        PLAIN: {True},
        PLAIN_TRAINING: {True},
        OURS: {False},
    }


def test_images_have_the_shape_that_is_asked_for(tiny) -> None:
    """The config's preprocessor pads training images to its crop of 64."""
    bench = Bench(BenchmarkCase(str(tiny.config), True, 'train', 'training'), QUICK)
    seen = set()
    for net in bench.networks.values():
        net.backbone.register_forward_pre_hook(lambda module, args: seen.add(tuple(args[0].shape)))
    bench.run(2, (32, 48))
    assert seen == {(2, 3, 32, 48)}


@pytest.mark.parametrize('same', [False, True])
def test_each_network_has_the_memory_of_a_process_of_its_own(same, tiny, allocators) -> None:
    """Plain torch has the C library's settings, and an untimed call follows each change."""
    bench = Bench(BenchmarkCase(str(tiny.config), False), replace(QUICK, same_allocator=same))
    networks = {'a': PLAIN, 'b': PLAIN_TRAINING, 'c': OURS, 'd': OURS, 'engine': ''}
    rows = [
        network_benchmark.Row(name, partial(allocators.append, name), network=net) for name, net in networks.items()
    ]
    allocators.clear()
    timing.time_interleaved({row.name: row.call for row in rows}, 3, 0, 0.0, before=bench._allocators(rows))
    once = [False, 'trimmed', 'a', 'a', 'b', True, 'trimmed', 'c', 'c', 'd', 'engine']
    once = list(networks) if same else once
    assert allocators == 3 * once
    allocators.clear()
    bench.run(1, (64, 64))
    assert allocators == ([True] if same else 3 * [False, 'trimmed', True, 'trimmed'] + [True])


def test_randomize_leaves_nothing_constant() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), ConvNeXt(dict(depths=[1], channels=[8]), in_channels=8))
    baseline.randomize_constants(net)
    constant = [name for name, v in net.state_dict().items() if v.dim() == 1 and v.unique().numel() == 1]
    assert constant == []
    assert (net[1].running_var > 0).all()


@pytest.fixture(scope='module')
def segmentor(tiny):
    """A record of the tiny segmentor at two sizes, both modes, in both precisions."""
    job = BenchmarkCase(str(tiny.config), True, threads=torch.get_num_threads())
    settings = replace(QUICK, dtypes=('float32', 'bfloat16'))
    record = network_benchmark.run(job, settings, ['inference', 'train'], [(64, 64), (96, 96)], [0])
    return {**record, 'environment': report.environment(True)}


def test_segmentor_record(segmentor) -> None:
    assert [(p['mode'], p['form'], p['batch'], p['height']) for p in segmentor['points']] == [
        ('inference', 'reparameterized', 1, 64),
        ('inference', 'reparameterized', 1, 96),
        ('train', 'training', 2, 64),
        ('train', 'training', 2, 96),
    ]
    for point in segmentor['points']:
        names = [row['name'] for row in point['rows']]
        infers = point['mode'] == 'inference'
        assert names == [
            PLAIN,
            *[PLAIN_TRAINING] * infers,
            OURS,
            f'{OURS}, bfloat16',
            *[f'{OURS}, bfloat16 weights'] * infers,
        ]
        assert [row['how'] for row in point['rows'] if row['dtype'] == 'bfloat16'] == [
            'autocast',
            *['converted'] * infers,
        ]
        assert all(row['memory_bytes'] is None and len(row['samples']) == 3 for row in point['rows'])
        assert row_of(point, PLAIN)['times_as_fast'] == dict(median=1.0, low=1.0, high=1.0)
        assert [row['equal'] for row in point['rows']] == [None] + [True] * (len(names) - 1)
        assert (row_of(point, OURS)['differing_pixels'] is None) == (point['mode'] == 'train')
    assert any('parallel kernels merged' in note for note in segmentor['notes'])
    assert segmentor['parameters'] > 0 and segmentor['backbone'] == 'replk_mm.RepLKNet'


def test_texts_and_pictures(segmentor, operators, tmp_path) -> None:
    for record, names in ((segmentor, {'image_side.png'}), (operators, {'kernel_side_4x1.png'})):
        folder = tmp_path / record['what']
        folder.mkdir()
        files = report.write(record, folder)
        assert {f.name for f in files} == {'table.txt', 'benchmark.json'} | names == {f.name for f in folder.iterdir()}
        read = json.loads((folder / 'benchmark.json').read_text(), parse_constant=pytest.fail)
        assert read['environment']['torch'] == torch.__version__ and len(read['points']) == len(record['points'])
        table = (folder / 'table.txt').read_text()
        assert 'times as fast' in table and PLAIN in table and 'DIFFERENT' not in table and 'nan' not in table
    single = {**segmentor, 'points': segmentor['points'][:1]}
    assert report.draw(single, tmp_path) == []


@pytest.mark.parametrize('mode', ['inference', 'train'])
def test_wrong_network_is_found_out(convnext, mode) -> None:
    form = 'training' if mode == 'train' else 'reparameterized'
    bench = Bench(BenchmarkCase(convnext, False, mode, form), QUICK)
    assert row_of(bench.run(1, (32, 32)), OURS)['equal'] is True
    with torch.no_grad():
        bench.networks[OURS].stages[1][0].depthwise_conv.weight.mul_(1.1)
    point = bench.run(1, (32, 32))
    assert row_of(point, OURS)['equal'] is False
    assert not report.all_equal(dict(points=[point]))


def test_timed_training_step_has_all_gradients_and_changes_no_weight(tiny) -> None:
    bench = Bench(BenchmarkCase(str(tiny.config), True, 'train', 'training'), QUICK)
    net = bench.networks[OURS]
    before = {name: p.clone() for name, p in net.named_parameters()}
    bench.run(2, (32, 32))
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    work = SyntheticBatch(bench.cfg, net, 2, (64, 64))
    seen = []
    net.decode_head.conv_seg.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    work.training_call(net)()
    assert seen == [True]
    assert work.gradients(net).keys() == {'loss', *(name for name, p in net.named_parameters() if p.requires_grad)}


def test_a_shape_that_the_network_cannot_take(convnext) -> None:
    with pytest.raises(UserError, match='inference of 1x3x4x4 fails'):
        Bench(BenchmarkCase(convnext, False), QUICK).run(1, (4, 4))


def test_default_shape(tiny, tmp_path, convnext) -> None:
    assert default_shape(str(tiny.config), None) == (64, 64)
    resized = tmp_path / 'resized.py'
    steps = "dict(dataset=dict(pipeline=[dict(type='Resize', scale=(1333, 800))]))"
    resized.write_text(CONVNEXT.replace('test_dataloader = dict()', f'test_dataloader = {steps}'))
    assert default_shape(str(resized), None) == (800, 1344)
    with pytest.raises(UserError, match='--shape H W'):
        default_shape(convnext, None)


def test_merged_checkpoint_has_no_training_form(tiny, tmp_path) -> None:
    from replk_mm.engine.inference import reparameterize_checkpoint

    cfg = tiny.cfg()
    Bench(BenchmarkCase(str(tiny.config), True), QUICK)
    torch.save(
        dict(state_dict=baseline.build_networks(cfg, True, 'training')[0][OURS].state_dict()), tmp_path / 'x.pth'
    )
    reparameterize_checkpoint(tiny.cfg(), str(tmp_path / 'x.pth'), tmp_path / 'merged.pth')
    found, _ = baseline.build_networks(tiny.cfg(), True, 'reparameterized', str(tmp_path / 'merged.pth'))
    assert found.keys() == {PLAIN, OURS}
    with pytest.raises(UserError, match='no training form'):
        baseline.build_networks(tiny.cfg(), True, 'training', str(tmp_path / 'merged.pth'))


# -- the operator ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('shape', [Shape(5, 12, 6, 2), Shape(7, 11, 4, 1, 2), Shape(3, 8, 5, 3)])
def test_arithmetic_is_what_torch_counts(shape) -> None:
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, requires_grad=True)
    weight = torch.randn(shape.channels, 1, shape.kernel, shape.kernel)
    with FlopCounterMode(display=False) as forward:
        out = F.conv2d(x, weight, None, shape.stride, shape.kernel // 2, 1, shape.channels)
    assert out.shape[-1] == shape.out
    assert 1e9 * shape.gflop('forward') == pytest.approx(forward.get_total_flops())
    assert shape.gflop('grad_weight') == shape.gflop('grad_input') == shape.gflop('forward')
    assert shape.gflop('step') == pytest.approx(3 * shape.gflop('forward'))
    if shape.stride == 1:
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        assert 1e9 * shape.gflop('grad_input') == pytest.approx(backward.get_total_flops())


def test_operator_record(operators) -> None:
    assert len(operators['points']) == 4 * len(operator_benchmark.COMPUTATIONS)
    for point in operators['points']:
        names = [row['name'] for row in point['rows']]
        assert names[:2] == [PLAIN, OURS] and 'forward' in point['chosen']
        forced = [
            name for name in ('fft', 'padded') if name in IMPLEMENTATIONS.get(point['computation'], ('fft', 'padded'))
        ]
        assert names[2:] == [f'{OURS}, {name}' for name in forced]
        for row in point['rows']:
            assert len(row['samples']) == point['rounds'] == 3
            assert row['gflops'] == pytest.approx(1e3 * point['gflop'] / row['milliseconds']['median'])
            assert row['of_matrix_product'] == pytest.approx(row['gflops'] / operators['matrix_product_gflops'])
            assert row['equal'] is (None if row['name'] == PLAIN else True)
    assert report.all_equal(operators)


def test_wrong_operator_is_found_out(monkeypatch) -> None:
    right = DepthwiseConv2d.forward
    monkeypatch.setattr(DepthwiseConv2d, 'forward', lambda self, x: right(self, x) * 1.01)
    record = operator_benchmark.run([Shape(3, 8, 2, 1)], repeats=3, warmup=0, seconds=0.0)
    assert not report.all_equal(record)
    assert 'DIFFERENT' in report.text({**record, 'environment': report.environment(True)})


def test_layouts_that_are_timed() -> None:
    """Plain torch gets torch's default layout and ours channels-last, whatever came before."""
    layers = dict(operator_benchmark._layers(Shape(3, 8, 4, 2), 'float32', [], 'cpu'))
    x = torch.randn(2, 4, 8, 8)
    assert operator_benchmark._laid_out(x.contiguous(memory_format=torch.channels_last), PLAIN).is_contiguous()
    assert operator_benchmark._laid_out(x, OURS).is_contiguous(memory_format=torch.channels_last)
    assert type(layers[PLAIN]) is nn.Conv2d and layers[PLAIN].weight is layers[OURS].weight


# -- other engines -----------------------------------------------------------------------------------------------------
def test_engines_that_are_not_installed_are_said(convnext, monkeypatch) -> None:
    monkeypatch.setattr(engines.importlib.util, 'find_spec', lambda name: None)
    settings = replace(QUICK, engines=['openvino', 'onnxruntime'])
    record = network_benchmark.run(BenchmarkCase(convnext, False), settings, ['inference'], [(32, 32)], [1])
    assert [line for line in record['notes'] if 'not installed' in line] == [
        'openvino: not installed (pip install openvino onnx onnxscript)',
        'onnxruntime: not installed (pip install onnxruntime onnx onnxscript)',
    ]
    assert [row['name'] for row in record['points'][0]['rows']] == [PLAIN, OURS]


@pytest.mark.slow
@pytest.mark.parametrize('engine', list(engines.ENGINES))
@pytest.mark.parametrize('whole', [True, False])
def test_engines_compute_the_same(engine, whole, tiny, convnext) -> None:
    if engines.missing(engine):
        pytest.skip(engines.missing(engine))
    job = BenchmarkCase(str(tiny.config) if whole else convnext, whole, threads=torch.get_num_threads())
    point = Bench(job, replace(QUICK, engines=[engine])).run(1, (64, 64))
    found = row_of(point, engine)
    assert found['equal'] is True
    assert found['differing_pixels'] == 0.0 if whole else found['difference'] < 1e-5


@pytest.mark.slow
def test_detector(tmp_path) -> None:
    pytest.importorskip('mmdet')
    path = tmp_path / 'detector.py'
    path.write_text("""
_base_ = ['mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py', 'mmdet::_base_/datasets/coco_instance.py',
          'mmdet::_base_/schedules/schedule_1x.py', 'mmdet::_base_/default_runtime.py']
model = dict(
    backbone=dict(_delete_=True, type='replk_mm.RepLKNet', arch=dict(
        large_kernel_sizes=[7, 7, 7, 7], small_kernel=3, layers=[1, 1, 1, 1], channels=[8, 8, 8, 8], dw_ratio=1)),
    neck=dict(in_channels=[8, 8, 8, 8], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16), mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=20, max_per_img=20)),
    test_cfg=dict(rpn=dict(nms_pre=20, max_per_img=20)))
""")
    options = {
        f'model.roi_head.bbox_head.{i}.{key}': 16 for i in range(3) for key in ('in_channels', 'fc_out_channels')
    }
    settings = replace(QUICK, dtypes=('float32', 'bfloat16'), engines=['openvino'])
    record = network_benchmark.run(
        BenchmarkCase(str(path), True, options=options), settings, ['inference', 'train'], [(64, 64)], [0]
    )
    assert [row['equal'] for point in record['points'] for row in point['rows'] if row['name'] == OURS] == [True, True]
    assert report.all_equal(record)


# -- the command -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def tool():
    """tools/benchmark.py as a module."""
    module = importlib.import_module('replk_mm.commands.benchmark')
    module.keep_freed_memory = lambda: False  # this process runs other tests too
    return module


@pytest.mark.parametrize(
    'args, said',
    [
        (['model', 'nope.py'], 'nope.py: no such config'),
        (['backbone', 'CONVNEXT'], '--shape H W'),
        (['backbone', 'CONVNEXT', '--shape', '32', '32', '--checkpoint', 'no.pth'], 'no.pth'),
        (['model', 'CONVNEXT', '--shape', '32', '32'], 'model'),
        (['op', '--kernels', '2'], '--kernels 2'),
        (['op', '--implementations', 'winograd'], 'Choose from channels_last'),
    ],
)
def test_refusals_of_the_command(tool, args, said, convnext, monkeypatch, capsys, tmp_path) -> None:
    args = [convnext if arg == 'CONVNEXT' else arg for arg in args]
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *args, '--out', str(tmp_path / 'out')])
    assert tool.main() == 2
    assert said in capsys.readouterr().err


def test_json_is_all_that_is_printed(tool, convnext, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'benchmark.py',
            'backbone',
            convnext,
            '--shape',
            '64',
            '32',
            '--repeats',
            '3',
            '--batch',
            '1',
            '2',
            '--seconds',
            '0.01',
            '--no-memory',
            '--json',
            '--out',
            str(tmp_path / 'out'),
        ],
    )
    threads = torch.get_num_threads()
    assert tool.main() == 0
    assert torch.get_num_threads() == threads
    record = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert record == json.loads((tmp_path / 'out' / 'benchmark.json').read_text())
    assert [(p['mode'], p['batch'], p['height'], p['width']) for p in record['points']] == [
        (mode, batch, 64, 32) for mode in ('inference', 'train') for batch in (1, 2)
    ]
    assert {f.name for f in (tmp_path / 'out').iterdir()} == {'table.txt', 'benchmark.json', 'batch.png'}


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(convnext, tmp_path) -> None:
    ran = run_tool(
        'benchmark',
        'backbone',
        convnext,
        '--shape',
        '256',
        '256',
        '--mode',
        'inference',
        '--repeats',
        3,
        '--seconds',
        0.01,
        '--json',
        '--out',
        tmp_path / 'out',
    )
    assert ran.returncode == 0, ran.stderr
    record = json.loads(ran.stdout, parse_constant=pytest.fail)
    for row in record['points'][0]['rows']:
        # At least the outputs of stem and norm, 8 x 64 x 64 floats each; None where the system does not tell.
        assert row['memory_bytes'] is None or row['memory_bytes'] > 2 * 4 * 8 * 64 * 64
