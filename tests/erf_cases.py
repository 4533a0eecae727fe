"""What tests of effective receptive fields share: networks whose field is known, images, configs."""
from pathlib import Path

import numpy as np
import pytest
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image

from replk_mm.analysis.erf import Erf

TINY = dict(layers=[1, 1, 1, 1], channels=[8, 16, 32, 64], large_kernel_sizes=[7, 7, 7, 7], small_kernel=3, dw_ratio=1)
#: 1 + x + x^2, cubed: how often each pixel is counted along an axis by three convolutions of 3 ones.
THREE_TIMES_THREE = np.array([1, 3, 6, 7, 6, 3, 1])


@MODELS.register_module(name='test_erf_ones')
class Ones(nn.Module):
    """Convolutions whose weights are all one, at the strides given; the kernels' sides are 3."""

    def __init__(self, strides=(1, 1, 1)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1 if i else 3, 1, 3, stride, 1, bias=False)
                                    for i, stride in enumerate(strides))
        for layer in self.layers:
            nn.init.ones_(layer.weight)

    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return tuple(outputs)


@MODELS.register_module(name='test_erf_given')
class Given(nn.Module):
    """What a function of the image gives."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch, request):
    """Drawing takes longer than measuring."""
    if 'drawn' not in request.fixturenames:
        monkeypatch.setattr('replk_mm.analysis.erf_report.draw', lambda found, path: None)


@pytest.fixture
def drawn():
    """For tests that look at pictures."""


def config(**model) -> Config:
    return Config(dict(model=model), cfg_text='given', filename='given.py')


def paint(folder: Path, *colours) -> Path:
    """A folder with an image of each colour (one number or three), of different shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, colour in enumerate(colours):
        shape = 20 + 7 * i, 31, 3
        Image.fromarray(np.broadcast_to(np.uint8(colour), shape).copy()).save(folder / f'{i}.png')
    return folder


@pytest.fixture
def white(tmp_path) -> Path:
    return paint(tmp_path / 'white', 255)


def result(**changes) -> Erf:
    known = dict(scores=np.eye(8), backbone='A', config='a', weights='w', trained=True, checkpoint=None, stage=3,
                 channels=4, map_size=(2, 2), size=8, images=1, image_set='0' * 64, silent=0, preprocessing={},
                 environment={})
    return Erf(**{**known, **changes})
