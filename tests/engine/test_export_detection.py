"""Exported detectors: boxes, masks and AP as those of torch."""

import pytest
import tiny_detector

from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.export import ExportOptions, export_checkpoint

pytestmark = pytest.mark.slow
detector, trained_detector = tiny_detector.detector, tiny_detector.trained_detector  # fixtures


@pytest.mark.parametrize(
    ('format', 'dynamic'),
    [
        ('torch', True),
        pytest.param('onnx', True, marks=pytest.mark.extras('onnx', 'onnxscript', 'onnxruntime')),
        pytest.param('openvino', False, marks=pytest.mark.extras('onnx', 'onnxscript', 'openvino')),
    ],
)
def test_boxes_and_masks_keep_their_ap(format, dynamic, detector, trained_detector, tmp_path) -> None:
    options = ExportOptions(format, dynamic=dynamic, images=3, data_root=str(detector.data))
    manifest = export_checkpoint(detector.cfg(), str(trained_detector), tmp_path / 'out', options)
    assert [tensor.name for tensor in manifest.outputs] == ['boxes', 'scores', 'labels', 'masks']
    assert 'objects' in {comparison.output for comparison in manifest.comparisons}
    found = []
    for name, checkpoint in (('a', trained_detector), ('b', tmp_path / 'out')):
        found.append(evaluate(detector.cfg(), str(checkpoint), detector.options(tmp_path / name)).metrics)
    assert found[0]['coco/bbox_mAP'] > 0.01
    assert found[1] == pytest.approx(found[0], abs=1e-3, nan_ok=True)
