"""Our operators in ONNX against torch."""

import pytest
import torch
from torch import Tensor

from replk_mm.deploy.operators import OPSET, conv2d_same, nms_mask, onnx_translations, roi_align_levels

pytestmark = pytest.mark.extras('onnx', 'onnxscript', 'onnxruntime')


def run_onnx(module: torch.nn.Module, inputs: tuple[Tensor, ...], folder, traced: Tensor | None = None) -> Tensor:
    """Run the ONNX form, traced for any size if ``traced`` is the image to trace."""
    import onnxruntime

    changes = torch.export.Dim.DYNAMIC
    program = (
        torch.export.export(module, inputs)
        if traced is None
        else torch.export.export(module, (traced,), dynamic_shapes=({0: changes, 2: changes, 3: changes},))
    )
    path, names = folder / 'operator.onnx', [f'x{i}' for i in range(len(inputs))]
    table = onnx_translations()
    found = torch.onnx.export(
        program, dynamo=True, custom_translation_table=table, input_names=names, opset_version=OPSET, verbose=False
    )
    found.save(path)
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


class Suppress(torch.nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
        return nms_mask(boxes, scores, 0.4, 0.3, 6).float()


@pytest.mark.parametrize('candidates', [True, False])
def test_suppression(candidates, tmp_path) -> None:
    corner = torch.rand(2, 50, 2) * 40
    boxes, scores = torch.cat([corner, corner + 5 + torch.rand(2, 50, 2) * 30], 2), torch.rand(2, 50)
    scores = scores if candidates else scores * 0.3
    expected = nms_mask(boxes, scores, 0.4, 0.3, 6).float()
    assert expected.sum(1).tolist() == ([6.0, 6.0] if candidates else [0.0, 0.0])
    assert torch.equal(run_onnx(Suppress(), (boxes, scores), tmp_path), expected)


class Pool(torch.nn.Module):
    def __init__(self, sampling_ratio: int) -> None:
        super().__init__()
        self.sampling_ratio = sampling_ratio

    def forward(self, fine: Tensor, coarse: Tensor, rois: Tensor, levels: Tensor) -> Tensor:
        return roi_align_levels([fine, coarse], rois, levels, [0.25, 0.125], 3, self.sampling_ratio)


@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('levels', [[0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])  # none on the first level
def test_regions(sampling_ratio, levels, tmp_path) -> None:
    rois = torch.tensor([[0, 3, 4, 50, 60], [1, 8, 8, 24, 24], [1, 0, 5.5, 63, 40], [0, 30, 2, 33, 9], [1, 0, 0, 0, 0]])
    inputs = (torch.randn(2, 4, 16, 16), torch.randn(2, 4, 8, 8), rois, torch.tensor(levels))
    found = run_onnx(Pool(sampling_ratio), inputs, tmp_path)
    torch.testing.assert_close(found, Pool(sampling_ratio)(*inputs), rtol=1e-4, atol=1e-5)


class Same(torch.nn.Module):
    def __init__(self, kernel: int, stride: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.weight, self.stride, self.groups = torch.randn(4, 4 // groups, kernel, kernel), [stride, stride], groups
        self.bias = torch.randn(4) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return conv2d_same(x, self.weight, self.bias, self.stride, [1, 1], self.groups)


@pytest.mark.parametrize('size', [(16, 16), (17, 22), (19, 13)])
@pytest.mark.parametrize('kernel, stride, groups, bias', [(3, 2, 1, True), (5, 2, 4, False), (2, 3, 2, True)])
def test_same_padding(kernel, stride, groups, bias, size, tmp_path) -> None:
    module, x = Same(kernel, stride, groups, bias), torch.randn(3, 4, *size)
    found = run_onnx(module, (x,), tmp_path, torch.randn(2, 4, 16, 16))
    torch.testing.assert_close(found, module(x), rtol=1e-5, atol=1e-5)
