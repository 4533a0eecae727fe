"""From training to a merged network, through the functions behind the commands."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny, trained  # noqa: F401
from tool_cases import merged, plain, read  # noqa: F401

from replk_mm.deploy.equivalence import NetworkDifference
from replk_mm.engine import config, inference
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.inference import reparameterize_checkpoint
from replk_mm.engine.record import describe_protocol, evaluation_record, write_record
from replk_mm.engine.train import train
from replk_mm.errors import UserError
from replk_mm.files import sha256

# ruff: noqa: F811 (fixtures that come from another file)
pytestmark = pytest.mark.slow


def test_tiny_network_has_learned_something(plain):
    assert plain[1].metrics['mIoU'] > 5
    assert max(c['IoU'] for c in plain[1].per_class.values()) > 30
    assert plain[1].images == 2


def test_metric_equals_a_count_over_the_written_label_maps(tiny, plain):
    """The PNG files hold ids of the data set's own numbering: equal to its label files where the network is right."""
    _, result, folder = plain
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == ['demo_val_000000.png', 'demo_val_000001.png']
    labels = [np.asarray(Image.open(tiny.data / 'annotations/validation' / f.name)) for f in files]
    found = [np.asarray(Image.open(f)) for f in files]
    label, found = (np.concatenate([m.ravel() for m in maps]) for maps in (labels, found))
    assert set(np.unique(found)) <= set(range(1, 9))
    keep = label > 0
    label, found = label[keep], found[keep]
    iou = [
        100 * np.sum((label == c) & (found == c)) / np.sum((label == c) | (found == c))
        for c in range(1, 9)
        if np.any((label == c) | (found == c))
    ]
    assert result.metrics['mIoU'] == pytest.approx(np.mean(iou), abs=0.01)
    assert result.metrics['aAcc'] == pytest.approx(100 * np.mean(label == found), abs=0.01)


def test_types_of_mmseg_in_a_config_stay(tiny, trained, plain, tmp_path):
    cfg = tiny.cfg({'test_evaluator.type': 'IoUMetric', 'tta_model.type': 'SegTTAModel'})
    found = evaluate(cfg, str(trained), tiny.options(tmp_path / 'test'), predictions=tmp_path / 'p')
    assert (cfg.test_evaluator.type, cfg.tta_model.type) == ('IoUMetric', 'SegTTAModel')
    assert found.metrics['mIoU'] == pytest.approx(plain[1].metrics['mIoU'], abs=0.01)
    assert found.per_class == {} and 'mIoU_present' not in found.metrics
    assert {path.name for path in (tmp_path / 'p').iterdir()} == {path.name for path in plain[2].iterdir()}
    assert not any('predictions' in note for note in found.notes)


def test_a_training_with_types_of_mmengine_and_mmseg(tiny, tmp_path):
    options = {
        'train_cfg.type': 'IterBasedTrainLoop',
        'val_cfg.type': 'ValLoop',
        'val_evaluator.type': 'IoUMetric',
        'default_hooks.checkpoint.type': 'CheckpointHook',
        'default_hooks.checkpoint.interval': 2,
    }
    for resume in (None, str(tmp_path / 'iter_2.pth')):
        cfg, notes = tiny.prepare(tmp_path, 4, options, resume=resume)
        assert any(note.startswith('resume: train_cfg.type is IterBasedTrainLoop') for note in notes)
        assert all(
            cfg[field].type == kind
            for field, kind in (
                ('train_cfg', 'IterBasedTrainLoop'),
                ('val_cfg', 'ValLoop'),
                ('val_evaluator', 'IoUMetric'),
            )
        )
        assert train(cfg, notes).name == 'iter_4.pth'


def test_merged_checkpoint_tests_the_same(tiny, plain, merged, tmp_path):
    again = evaluate(tiny.cfg(), str(merged), tiny.options(tmp_path))
    assert again.metrics['mIoU'] == pytest.approx(plain[1].metrics['mIoU'], abs=0.01)
    assert again.per_class.keys() == plain[1].per_class.keys()
    for name, figures in plain[1].per_class.items():
        assert again.per_class[name]['IoU'] == pytest.approx(figures['IoU'], abs=0.05)
    assert again.changes is None


def test_merging_on_the_fly_tests_the_same(tiny, trained, plain, tmp_path):
    again = evaluate(tiny.cfg(), str(trained), tiny.options(tmp_path), reparam=True)
    assert again.metrics['mIoU'] == pytest.approx(plain[1].metrics['mIoU'], abs=0.01)
    assert len(again.changes.merged) == 4
    assert len(again.changes.folded) > 20


def test_merged_file_is_small_and_self_describing(trained, merged):
    before, after = read(trained), read(merged)
    assert 'optimizer' in before
    assert set(after) == {'meta', 'state_dict'}
    assert merged.stat().st_size < 0.5 * trained.stat().st_size
    record = after['meta']['replk_mm']['reparameterized']
    assert record['merge'] is True
    assert record['fold'] is True
    assert record['source_sha256'] == sha256(trained)
    assert {d['dtype'] for d in record['differences']} == {'torch.float32', 'torch.float64'}
    assert any('.lkb_reparam.' in key for key in after['state_dict'])
    assert not any('lkb_origin' in key or 'running_mean' in key for key in after['state_dict'])
    torch.load(merged, weights_only=True)


def test_merging_twice_changes_nothing(tiny, merged, tmp_path):
    out = tmp_path / 'again.pth'
    changes, _ = reparameterize_checkpoint(tiny.cfg(), str(merged), out)
    assert not changes.merged
    once, twice = read(merged)['state_dict'], read(out)['state_dict']
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)
    assert read(out)['meta']['replk_mm']['reparameterized']['merge'] is True


def test_merging_onto_the_input_is_rejected(tiny, trained):
    before = trained.read_bytes()
    with pytest.raises(UserError, match='is an input'):
        reparameterize_checkpoint(tiny.cfg(), str(trained), trained.parent / '..' / trained.parent.name / trained.name)
    with pytest.raises(UserError, match='is an input'):
        reparameterize_checkpoint(tiny.cfg(), trained.as_uri(), trained)
    assert trained.read_bytes() == before


def test_failing_proof_writes_nothing(tiny, trained, tmp_path, monkeypatch):
    bad = [NetworkDifference(torch.float32, 1.0, 1.0, 1e-4)]
    monkeypatch.setattr(inference, 'compare_networks', lambda *args: bad)
    with pytest.raises(UserError, match='nothing was written') as info:
        reparameterize_checkpoint(tiny.cfg(), str(trained), tmp_path / 'x' / 'out.pth')
    assert str(trained) in str(info.value).splitlines()[0]
    assert 'DIFFERENT' in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_test_time_augmentation_runs_and_changes_the_result(tiny, trained, plain, tmp_path):
    cfg = tiny.cfg()
    found = evaluate(cfg, str(trained), tiny.options(tmp_path), tta=True)
    assert found.metrics['mIoU'] > 5
    assert found.metrics != plain[1].metrics
    protocol = describe_protocol(cfg, True)
    assert protocol['tta'] is True
    assert protocol['pipeline'] == tiny.cfg().tta_pipeline, 'without the checks around its loading steps'
    cfg = tiny.cfg()
    cfg.tta_test_cfg = dict(mode='its own')
    with pytest.raises(UserError, match="mode='its own'"):
        evaluate(cfg, str(trained), tiny.options(tmp_path), tta=True)


def test_augmentation_that_the_config_does_not_have(tiny, trained, tmp_path):
    cfg = tiny.cfg()
    cfg.pop('tta_model')
    with pytest.raises(UserError, match='--tta'):
        evaluate(cfg, str(trained), tiny.options(tmp_path), tta=True)


def test_record_is_strict_json_with_all_that_figures_depend_on(tiny, trained, plain, tmp_path):
    cfg, result, _ = plain
    result = dataclasses.replace(result, metrics={**result.metrics, 'nothing': float('nan'), 'one': np.float32(1)})
    write_record(evaluation_record(cfg, str(trained), result, False), tmp_path / 'deep' / 'metrics.json')

    def refuse(constant):
        raise AssertionError(f'{constant} is no JSON')

    found = json.loads((tmp_path / 'deep' / 'metrics.json').read_text(), parse_constant=refuse)
    assert found['metrics']['nothing'] is None
    assert found['metrics']['one'] == 1
    assert found['metrics']['mIoU'] == pytest.approx(result.metrics['mIoU'])
    assert found['checkpoint']['sha256'] == sha256(trained)
    assert found['checkpoint']['iteration'] == 30
    assert found['protocol']['mode'] == 'whole'
    assert found['protocol']['tta'] is False
    steps = [step['type'] for step in found['protocol']['pipeline']]
    assert steps == ['LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs']
    assert found['data'] == dict(root=str(tiny.data), images=2)
    assert found['reparameterized'] is None
    assert found['environment']['torch'] == torch.__version__
    assert found['per_class'].keys() == result.per_class.keys()


def test_bfloat16_trains(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(config, 'has_bfloat16_instructions', lambda: True)
    cfg, notes = tiny.prepare(tmp_path, 2, amp='bf16')
    assert any('bfloat16' in n for n in notes)
    autocast = []
    from mmseg.models import EncoderDecoder

    forward = EncoderDecoder.extract_feat

    def watch(self, x):
        autocast.append((torch.is_autocast_enabled('cpu'), torch.get_autocast_dtype('cpu')))
        return forward(self, x)

    EncoderDecoder.extract_feat = watch
    try:
        last = train(cfg, notes, preflight=False)
    finally:
        EncoderDecoder.extract_feat = forward
    assert autocast[:2] == [(True, torch.bfloat16)] * 2
    losses = re.findall(r' loss: (\S+)', next(tmp_path.rglob('*.log')).read_text())
    assert len(losses) == 2
    assert all(np.isfinite(float(loss)) for loss in losses)
    assert all(v.isfinite().all() for v in read(last)['state_dict'].values())
