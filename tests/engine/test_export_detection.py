"""Exported detectors: boxes, masks and AP as those of torch."""

import pytest
import tiny_detector
import torch

from replk_mm.deploy.artefact import TRUST, Artefact
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.export import ExportOptions, export_checkpoint
from replk_mm.errors import UserError

pytestmark = pytest.mark.slow
detector, trained_detector = tiny_detector.detector, tiny_detector.trained_detector  # fixtures


@pytest.fixture(autouse=True)
def _trusted(monkeypatch):
    monkeypatch.setenv(TRUST, '1')


FORMATS = pytest.mark.parametrize(
    ('format', 'dynamic'),
    [
        ('torch', True),
        pytest.param('onnx', True, marks=pytest.mark.extras('onnx', 'onnxscript', 'onnxruntime')),
        pytest.param('openvino', False, marks=pytest.mark.extras('onnx', 'onnxscript', 'openvino')),
    ],
)


@FORMATS
def test_boxes_and_masks_keep_their_ap(format, dynamic, detector, trained_detector, tmp_path) -> None:
    options = ExportOptions(format, dynamic=dynamic, images=3, data_root=str(detector.data))
    manifest = export_checkpoint(detector.cfg(), str(trained_detector), tmp_path / 'out', options)
    assert [tensor.name for tensor in manifest.outputs] == ['boxes', 'scores', 'labels', 'masks']
    assert 'objects' in {comparison.output for comparison in manifest.comparisons}
    found = []
    for name, checkpoint in (('a', trained_detector), ('b', tmp_path / 'out')):
        merged = checkpoint == trained_detector
        options = detector.options(tmp_path / name)
        found.append(evaluate(detector.cfg(), str(checkpoint), options, reparam=merged).metrics)
    assert found[0]['coco/bbox_mAP'] > 0.01
    # It was hardly trained, and finds many objects of almost the same score.
    assert found[1] == pytest.approx(found[0], abs=0.02, nan_ok=True)
    changed = detector.cfg({'model.test_cfg.rcnn.score_thr': 0.3})  # is a part of the network
    with pytest.raises(UserError, match='does not fit the config: test_cfg'):
        evaluate(changed, str(tmp_path / 'out'), detector.options(tmp_path / 'c'))


@FORMATS
def test_an_image_without_objects(format, dynamic, detector, trained_detector, tmp_path) -> None:
    cfg = detector.cfg({'model.test_cfg.rcnn.score_thr': 1.1})
    options = ExportOptions(format, dynamic=dynamic, images=1, data_root=str(detector.data))
    manifest = export_checkpoint(cfg, str(trained_detector), tmp_path / 'out', options)
    assert all(comparison.difference == 0 for comparison in manifest.comparisons)
    count = 4 if dynamic else 1
    image = torch.zeros(count, 3, 96, 128 if dynamic else 96)
    found = Artefact(tmp_path / 'out')(image, torch.tensor([[90.0, 96.0]] * count))
    assert (found['scores'] == 0).all() and (found['labels'] == -1).all() and (found['boxes'] == 0).all()
    assert found['masks'].shape[:2] == (count, 20)
