"""Export of trained checkpoints: the folder is tested, predicted with and compared in place of the checkpoint."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny as segmentors
import torch
from mmseg.structures import SegDataSample
from tiny import ROOT, run_tool

from replk_mm.commands import export as export_command
from replk_mm.deploy import export as formats
from replk_mm.deploy.artefact import MANIFEST, TRUST, read_manifest
from replk_mm.engine import export
from replk_mm.engine.config import load_config
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.export import ExportOptions, export_checkpoint
from replk_mm.engine.inference import build_for_inference
from replk_mm.errors import UserError

pytestmark = pytest.mark.slow
tiny, trained = segmentors.tiny, segmentors.trained  # fixtures
TORCH = ExportOptions(format='torch', images=2)
EXTRAS = {
    'torch': (),
    'onnx': pytest.mark.extras('onnx', 'onnxscript', 'onnxruntime'),
    'openvino': pytest.mark.extras('onnx', 'onnxscript', 'openvino', 'nncf'),
}


@pytest.fixture(autouse=True)
def _trusted(monkeypatch):
    monkeypatch.setenv(TRUST, '1')


def with_format(name: str, *values: object):
    return pytest.param(name, *values, marks=EXTRAS[name])


@pytest.fixture(scope='module')
def exported(tiny, trained, tmp_path_factory) -> Path:
    """An export of the segmentor for any size, and for torch, which needs no other package."""
    out = tmp_path_factory.mktemp('exported') / 'out'
    options = ExportOptions(format='torch', images=2, dynamic=True, data_root=str(tiny.data))
    export_checkpoint(tiny.cfg(), str(trained), out, options)
    return out


def scores(tiny, checkpoint, tmp_path, options: dict | None = None, **changes) -> dict[str, float]:
    return evaluate(tiny.cfg(options), str(checkpoint), tiny.options(tmp_path), **changes).metrics


WHOLE, WINDOWS = dict(mode='whole'), dict(mode='slide', crop_size=(40, 48), stride=(24, 16))


@pytest.mark.parametrize(('test', 'tta'), [(WHOLE, False), (WINDOWS, False), (WHOLE, True)])
def test_windows_and_augmentation_stay_outside_of_the_network(test, tta, tiny, trained, exported, tmp_path) -> None:
    options = {'model.test_cfg': dict(test, _delete_=True)}
    before = scores(tiny, trained, tmp_path / 'a', options, tta=tta)
    after = scores(tiny, exported, tmp_path / 'b', options, tta=tta)
    assert before['mIoU'] > 5
    assert after == pytest.approx(before, abs=0.1)  # a pixel of two images is 0.01 points


@pytest.mark.parametrize(
    ('format', 'precision', 'fixed'),
    [
        with_format('torch', 'fp32', True),
        with_format('onnx', 'fp32', False),
        with_format('onnx', 'fp32', True),
        with_format('onnx', 'fp16', False),
        with_format('onnx', 'int8', True),
        with_format('openvino', 'fp32', False),
        with_format('openvino', 'fp16', True),
        with_format('openvino', 'int8', True),
    ],
)
def test_every_format_keeps_the_score(format, precision, fixed, tiny, trained, tmp_path) -> None:
    options = ExportOptions(
        format, precision, (64, 64) if fixed else None, None if fixed else True, images=2, data_root=str(tiny.data)
    )
    manifest = export_checkpoint(tiny.cfg(), str(trained), tmp_path / 'out', options)
    assert manifest.inputs[0].shape == ([1, 3, 64, 64] if fixed else ['batch', 3, 'height', 'width'])
    assert manifest.comparisons and all(comparison.ok for comparison in manifest.comparisons)
    before, after = (scores(tiny, path, tmp_path / name) for path, name in ((trained, 'a'), (tmp_path / 'out', 'b')))
    assert after['mIoU'] == pytest.approx(before['mIoU'], abs=10 if precision == 'int8' else 0.5)


def test_the_manifest_names_classes_normalization_and_origin(exported, tiny, trained) -> None:
    manifest = read_manifest(exported)
    head = tiny.cfg().model.data_preprocessor
    assert manifest.classes == list(tiny.cfg().test_dataloader.dataset.metainfo.classes)
    assert manifest.normalization.mean == pytest.approx(list(head.mean))
    assert manifest.normalization.channel_order == 'RGB'
    assert manifest.checkpoint['name'] == trained.name
    assert 'parallel kernels merged' in manifest.reparameterization
    assert [tensor.name for tensor in manifest.outputs] == ['logits']


def test_nothing_is_written_if_the_outputs_differ(tiny, trained, tmp_path, monkeypatch) -> None:
    trace = formats.trace

    def broken(module, example, dynamic):
        with torch.no_grad():
            module.model.decode_head.conv_seg.bias[0] += 1
        return trace(module, example, dynamic)

    monkeypatch.setattr(export, 'trace', broken)
    with pytest.raises(UserError, match='differs from torch; nothing was written\n.*logits.*BEYOND the tolerance'):
        export_checkpoint(tiny.cfg(), str(trained), tmp_path / 'out', ExportOptions('torch', data_root=str(tiny.data)))
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_kept_and_own_ones_replaced(tiny, trained, exported, tmp_path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / 'out'))
    for name in ('notes.txt', 'network.pth'):
        (folder / name).write_text('mine')
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match='network.pt2: exists, and is not marked as written by replk_mm'):
        export_checkpoint(tiny.cfg(), str(trained), folder, ExportOptions('torch', images=0))
    shutil.copy(exported / MANIFEST, folder)
    export_checkpoint(tiny.cfg(), str(trained), folder, ExportOptions('torch', shape=(64, 32), images=0))
    assert (folder / 'notes.txt').read_text() == (folder / 'network.pth').read_text() == 'mine'
    assert read_manifest(folder).inputs[0].shape == [1, 3, 64, 32]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            {'model.decode_head.num_classes': 3, 'model.auxiliary_head.num_classes': 3},
            'number of classes: 8 there, 3 in .*\n.* use them: --classes sky,',
        ),
        (
            {'model.data_preprocessor.mean': [0.0, 0.0, 0.0]},
            'normalization.mean: .* there, \\[0.0, 0.0, 0.0\\] in the config\n.*use that config with the same options',
        ),
        ({'model.backbone.arch.layers': [1, 1, 2, 1]}, 'weights: '),
        ({'model.type': 'mmseg.EncoderDecoder', 'model.keep_logits': None}, None),
    ],
)
def test_a_manifest_that_does_not_fit_the_config_is_an_error(options, message, exported, tiny, tmp_path) -> None:
    from replk_mm.deploy.artefact import Artefact
    from replk_mm.engine.artefact_model import use_artefact
    from replk_mm.engine.config import build_model

    options = {key: value for key, value in options.items() if value is not None}
    model = build_model(tiny.cfg(options))
    if message is None:  # mmseg's own class has the same name and the same results
        use_artefact(model, Artefact(exported))
        return
    with pytest.raises(UserError, match=f'does not fit the config: .*{message}'):
        use_artefact(model, Artefact(exported))


@pytest.mark.extras('onnx', 'onnxscript')
def test_an_operator_that_onnx_lacks_is_named(tiny, trained, tmp_path, monkeypatch) -> None:
    def forward(self, inputs):
        return self.cls_seg(torch.special.bessel_j0(self._forward_feature(inputs)))

    monkeypatch.setattr('replk_mm.heads.segmentation.UPerHead.forward', forward, raising=False)
    with pytest.raises(UserError, match='EncoderDecoder: has no form in ONNX: .*bessel_j0'):
        export_checkpoint(tiny.cfg(), str(trained), tmp_path / 'out', ExportOptions(shape=(64, 64), images=0))
    assert list(tmp_path.iterdir()) == []


def test_merging_an_export_is_an_error(exported, tiny, tmp_path) -> None:
    with pytest.raises(UserError, match='is merged already\nOmit --reparam'):
        scores(tiny, exported, tmp_path, reparam=True)


def test_other_commands_ask_for_the_checkpoint(exported, tiny) -> None:
    with pytest.raises(UserError, match='is an exported network\nUse the checkpoint that it was exported from'):
        build_for_inference(tiny.cfg(), str(exported))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(batch=2, dynamic=True), '--batch 2: the number of images is not fixed'),
        (dict(precision='int8', images=0), '--images 0: int8 is compared on test images only'),
    ],
)
def test_options_without_effect_are_errors(options, message, tiny, trained, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export, 'check_format', lambda *_: None)
    with pytest.raises(UserError, match=message):
        export_checkpoint(tiny.cfg(), str(trained), tmp_path / 'out', ExportOptions('torch', **options))


def test_int8_without_training_images_is_an_error(tiny, trained, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export, 'check_format', lambda *_: None)
    with pytest.raises(UserError, match='nowhere'):
        export_checkpoint(tiny.cfg(), str(trained), tmp_path / 'out', ExportOptions('onnx', 'int8'))


def test_commands_take_the_folder(tiny, trained, tmp_path) -> None:
    cfg = tmp_path / 'tiny.py'
    cfg.write_text(f'_base_ = {str(tiny.config)!r}\n')
    done = run_tool(
        'export', cfg, trained, tmp_path / 'out', '--format', 'torch', '--data-root', tiny.data, '--dynamic'
    )
    assert done.returncode == 0, done.stderr
    assert f'next: {TRUST}=1 python {Path("tools/test.py")}' in done.stdout.replace(f'{ROOT}/', '')
    assert '--classes' not in done.stdout
    where = ['--data-root', tiny.data, '--work-dir', tmp_path / 'w', '--device', 'cpu']
    done = run_tool('test', cfg, tmp_path / 'out', *where, '--out', tmp_path / 'scores')
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / 'scores' / 'metrics.json').read_text())
    assert record['artefact'] == dict(format='torch', precision='fp32')
    image = next((tiny.data / 'images' / 'validation').iterdir())
    for name, checkpoint in (('torch', trained), ('exported', tmp_path / 'out')):
        done = run_tool('predict', cfg, checkpoint, image, '--out', tmp_path / name, '--device', 'cpu')
        assert done.returncode == 0, done.stderr
    labels = [(tmp_path / name / f'{image.stem}_labels.png').read_bytes() for name in ('torch', 'exported')]
    assert labels[0] == labels[1] and np.frombuffer(labels[0], np.uint8).size


def test_the_next_command_names_the_classes_of_the_checkpoint(tiny, trained, tmp_path, monkeypatch, capsys) -> None:
    cfg = tmp_path / 'other.py'
    head = dict(num_classes=9)
    classes = dict(dataset=dict(metainfo=dict(classes=tuple('abcdefghi'), palette=[[0, 0, 0]] * 9)))
    cfg.write_text(
        f'_base_ = {str(tiny.config)!r}\nmodel = dict(decode_head={head}, auxiliary_head={head})\n'
        f'test_dataloader = {classes}\nval_dataloader = {classes}\ntrain_dataloader = {classes}\n'
    )
    words = ['export', cfg, trained, tmp_path / 'out', '--format', 'torch', '--data-root', tiny.data, '--images', 0]
    monkeypatch.setattr(sys, 'argv', list(map(str, words)))
    assert export_command.main() == 0
    trust, _, tool, *words = shlex.split(capsys.readouterr().out.rpartition('next: ')[2])
    assert trust == f'{TRUST}=1' and tool == 'test'
    classes = words[words.index('--classes') + 1]
    assert classes.split(',') == list(tiny.cfg().test_dataloader.dataset.metainfo.classes)
    options = tiny.options(tmp_path)
    found = evaluate(load_config(str(cfg)), words[1], replace(options, classes=classes))
    assert found.metrics == scores(tiny, trained, tmp_path)
    with pytest.raises(UserError, match='use them: --classes sky,'):
        evaluate(load_config(str(cfg)), words[1], options)


def test_the_benchmark_times_the_folder(exported, tiny, trained, tmp_path) -> None:
    args = ['benchmark', 'model', tiny.config, '--checkpoint', trained, '--compare', exported, '--shape', 64, 64]
    args += ['--mode', 'inference', '--repeats', 3, '--seconds', 0.1, '--no-memory', '--device', 'cpu', '--json']
    done = run_tool(*args, '--out', tmp_path / 'bench')
    assert done.returncode == 0, done.stderr
    rows = {row['name']: row for row in json.loads(done.stdout)['points'][0]['rows']}
    found = rows['out (torch, fp32)']
    assert found['equal'] is True and found['differing_pixels'] < 1e-3
    assert found['milliseconds']['median'] > 0 and found['dtype'] == 'float32'


@pytest.mark.extras('onnx', 'onnxscript', 'onnxruntime')
@pytest.mark.parametrize('size', [(64, 64), (51, 83)])
def test_the_example_of_the_docs_needs_neither_torch_nor_this_package(size, tiny, trained, root, tmp_path) -> None:
    options = ExportOptions('onnx', dynamic=True, labels=True, images=0)
    export_checkpoint(tiny.cfg(), str(trained), tmp_path / 'out', options)
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    np.save(tmp_path / 'image.npy', image)
    code = (root / 'docs' / 'export.md').read_text().split('```python\n')[1].split('```')[0]
    blocked = "import sys\nsys.modules |= {name: None for name in ('torch', 'mmengine', 'replk_mm')}\n"
    command = [sys.executable, '-c', blocked + code, tmp_path / 'out', tmp_path / 'image.npy']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    # What mmseg's own functions make of the same image.
    network = build_for_inference(tiny.cfg(), str(trained), classes=False).model
    data = dict(inputs=[torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)], data_samples=[SegDataSample()])
    labels = network.predict(network.data_preprocessor(data, False)['inputs'])[0].pred_sem_seg.data
    names = read_manifest(tmp_path / 'out').classes
    shares = {names[i]: count / labels.numel() for i, count in enumerate(labels.flatten().bincount().tolist()) if count}
    printed = dict(line.removesuffix(' of the pixels').split(': ') for line in done.stdout.splitlines())
    assert {name: float(share.rstrip('%')) for name, share in printed.items()} == pytest.approx(
        {name: 100 * share for name, share in shares.items()}, abs=0.3
    )
