"""Networks for images of one or four channels, through the functions behind all commands."""

import shutil

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny  # noqa: F401

from replk_mm.analysis.benchmark.case import BenchmarkCase, build_networks, load_case_config
from replk_mm.analysis.benchmark.synthetic_batch import SyntheticBatch
from replk_mm.analysis.complexity import config_complexity
from replk_mm.analysis.erf import measure_erf, read_image
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.inference import reparameterize_checkpoint
from replk_mm.engine.predict import label_map, load_for_prediction, predict
from replk_mm.engine.train import train
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)
MEAN, STD = [10.0, 20.0, 30.0, 40.0], [50.0, 60.0, 70.0, 80.0]


def options(channels: int) -> dict:
    loading = dict(type='LoadImageFromFile', color_type='grayscale' if channels == 1 else 'unchanged')
    changes = {f'{split}_dataloader.dataset.pipeline.0': loading for split in ('train', 'val', 'test')}
    changes |= {f'{split}_dataloader.dataset.img_suffix': '.png' for split in ('train', 'val', 'test')}
    normalization = {f'model.data_preprocessor.{k}': v[:channels] for k, v in (('mean', MEAN), ('std', STD))}
    return {
        **changes,
        **normalization,
        'model.backbone.in_channels': channels,
        'model.data_preprocessor.bgr_to_rgb': False,
    }


@pytest.mark.slow
@pytest.mark.parametrize('channels', [1, 2, 4])
def test_networks_without_data(tiny, channels):
    found, rgb = (config_complexity(str(tiny.config), (64, 64), given) for given in (options(channels), None))
    stem = 8 * 3 * 3 * (channels - 3)  # weights of each of 32x32 positions
    assert found.deployed.parameters - rgb.deployed.parameters == stem
    assert found.deployed.macs - rgb.deployed.macs == stem * 32 * 32
    case = BenchmarkCase(str(tiny.config), True, options=options(channels), shape=(64, 64), batch=1)
    cfg, _ = load_case_config(case)
    networks, _ = build_networks(cfg, True, 'reparameterized')
    batch = SyntheticBatch(cfg, networks['ours'], 1, (64, 64))
    assert batch.image.shape == (1, channels, 64, 64)
    batch.inference_call(networks['ours'])()


def test_images_of_the_receptive_field(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'x.png')
    for rgb, order in ((True, [0, 1, 2, 3]), (False, [2, 1, 0, 3])):  # OpenCV reads BGRA
        expected = (torch.tensor(pixels[..., order]).float() - torch.tensor(MEAN)) / torch.tensor(STD)
        torch.testing.assert_close(read_image(tmp_path / 'x.png', 32, MEAN, STD, rgb)[0], expected.permute(2, 0, 1))
    with pytest.raises(UserError, match='x.png: 4 channels; the network takes 2'):
        read_image(tmp_path / 'x.png', 32, MEAN[:2], STD[:2], True)


@pytest.mark.slow
@pytest.mark.parametrize('channels', [1, 4])
def test_chain(tiny, channels, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(tiny.data, data)
    for path in data.glob('images/*/*.jpg'):
        image = cv2.imread(str(path))
        image = np.concatenate([image, 255 - image[..., :1]], -1) if channels == 4 else image[..., 0]
        cv2.imwrite(str(path.with_suffix('.png')), image)
        path.unlink()
    last = train(*tiny.prepare(tmp_path / 'run', 2, options(channels), data_root=str(data)))
    result = evaluate(tiny.cfg(options(channels)), str(last), tiny.options(tmp_path / 'test', data_root=str(data)))
    assert result.images == 2
    model = load_for_prediction(tiny.cfg(options(channels)), str(last), 'cpu')
    path = data / 'images/validation/demo_val_000000.png'
    ((_, shown, found),) = predict(model, [str(path)])
    assert shown.shape == (64, 64, 3)
    image = torch.tensor(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)).float().reshape(64, 64, channels)
    image = (image - torch.tensor(MEAN[:channels])) / torch.tensor(STD[:channels])
    with torch.no_grad():
        scores = model.encode_decode(image.permute(2, 0, 1)[None], [dict(ori_shape=(64, 64), img_shape=(64, 64))])
    scores = torch.nn.functional.interpolate(scores.float(), (64, 64), mode='bilinear')
    assert np.mean(label_map(found) == scores.argmax(1)[0].numpy()) > 0.99
    _, differences = reparameterize_checkpoint(tiny.cfg(options(channels)), str(last), tmp_path / 'merged.pth')
    assert all(difference.ok for difference in differences)
    erf = measure_erf(tiny.cfg(options(channels)), str(last), path.parent, 64, 1, tmp_path / 'erf')
    assert erf.images == 1 and np.isfinite(erf.scores).all()


@pytest.mark.slow
def test_image_with_other_channels_is_rejected_by_its_path(tiny, tmp_path):
    last = tiny.train(tmp_path / 'run', 1)
    cfg = tiny.cfg(
        {'test_dataloader.dataset.pipeline.0.color_type': 'unchanged', 'model.data_preprocessor.bgr_to_rgb': False}
    )
    path = str(tmp_path / 'x.png')
    cv2.imwrite(path, np.zeros((64, 64, 4), np.uint8))
    with pytest.raises(UserError, match=f'^{path}: prediction fails: .*\nCheck that the image has the channels'):
        list(predict(load_for_prediction(cfg, str(last), 'cpu'), [path]))
