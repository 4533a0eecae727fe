"""Checkpoints that timm, torchvision, transformers and mmpretrain write load whole, and outputs are equal."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from checkpoint_cases import CONV, DENSE
from mmengine.registry import DefaultScope
from safetensors.torch import save_file
from torch import Tensor, nn

from replk_mm.backbones import ConvNeXt
from replk_mm.checkpoints.loading import load_pretrained

#: A network of a library, the file that it writes, and its features.
Case = tuple[nn.Module, Path, Callable[[Tensor], Sequence[Tensor]]]
V2 = dict(use_grn=True, layer_scale_init_value=0.0)


def randomize(model: nn.Module) -> None:
    """Weights that every layer shows: the initial layer scale would hide the blocks."""
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0.1, 0.5)


def of_timm(folder: Path, v2: bool) -> Case:
    from timm.models.convnext import ConvNeXt as Theirs

    new = dict(use_grn=True, ls_init_value=None) if v2 else {}
    model = Theirs(depths=CONV['depths'], dims=CONV['channels'], num_classes=5, **new)
    randomize(model)
    save_file(model.state_dict(), folder / 'model.safetensors')
    return model, folder / 'model.safetensors', lambda image: [model.head.norm(model.forward_features(image))]


def of_torchvision(folder: Path, v2: bool) -> Case:
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.convnext import ConvNeXt as Theirs

    channels = CONV['channels']
    stages = zip(channels, [*channels[1:], None], CONV['depths'], strict=True)
    model = Theirs([CNBlockConfig(*stage) for stage in stages], num_classes=5)
    randomize(model)
    torch.save(model.state_dict(), folder / 'model.pth')
    return model, folder / 'model.pth', lambda image: [model.classifier[0](model.features(image))]


def of_transformers(folder: Path, v2: bool, backbone: bool = False) -> Case:
    import transformers

    name = 'ConvNextV2' if v2 else 'ConvNext'
    settings = dict(depths=CONV['depths'], hidden_sizes=CONV['channels'], num_labels=5)
    stages = {'out_features': [f'stage{i}' for i in range(1, 5)]} if backbone else {}
    config = getattr(transformers, f'{name}Config')(**settings, **stages)
    model = getattr(transformers, f'{name}{"Backbone" if backbone else "ForImageClassification"}')(config)
    randomize(model)
    model.save_pretrained(folder)

    def features(image: Tensor) -> Sequence[Tensor]:
        if backbone:
            return model(image).feature_maps
        base = getattr(model, name.lower())
        # Their norm follows the average over the map; ours would, too, but for one place.
        last = base.encoder(base.embeddings(image)).last_hidden_state
        return [base.layernorm(last.movedim(1, -1)).movedim(-1, 1)]

    return model, folder, features


def of_transformers_backbone(folder: Path, v2: bool) -> Case:
    return of_transformers(folder, v2, backbone=True)


def of_mmpretrain(folder: Path, v2: bool) -> Case:
    from mmpretrain.models import build_classifier

    with DefaultScope.overwrite_default_scope('mmpretrain'):  # other tests leave theirs
        model = build_classifier(
            dict(
                type='ImageClassifier',
                backbone=dict(type='ConvNeXt', arch=CONV, **DENSE, **(V2 if v2 else {})),
                head=dict(type='LinearClsHead', in_channels=CONV['channels'][-1], num_classes=5),
            )
        )
    randomize(model)
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / 'model.pth')
    return model, folder / 'model.pth', lambda image: model.backbone(image)


@pytest.mark.parametrize(
    ('build', 'v2'),
    [
        pytest.param(build, v2, marks=pytest.mark.extras(name), id=f'{build.__name__}-{"v2" if v2 else "v1"}')
        for build, name, versions in (
            (of_timm, 'timm', (False, True)),
            (of_torchvision, 'torchvision', (False,)),
            (of_transformers, 'transformers', (False, True)),
            (of_transformers_backbone, 'transformers', (False, True)),
            (of_mmpretrain, 'mmpretrain', (False, True)),
        )
        for v2 in versions
    ],
)
def test_outputs_are_those_of_the_library(build, v2, tmp_path):
    model, path, features = build(tmp_path, v2)
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        model.eval()
        expected = features(image)
    ours = ConvNeXt(CONV, **{**DENSE, 'out_indices': range(4 - len(expected), 4)}, **(V2 if v2 else {}))
    report = load_pretrained(ours, str(path))
    assert report.unexpected == report.missing == report.mismatched == []
    with torch.no_grad():
        found = ours.eval()(image)
    for a, b in zip(expected, found, strict=True):
        assert a.std() > 1e-3
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * a.abs().max().item())
