"""scripts/classify.py: schedule, exact resume, checkpoints for the catalogue."""

import math

import pytest
import torch
import torch.nn as nn
from classify import Classifier, Recipe, top1_accuracy, train_classifier
from torch.utils.data import DataLoader, TensorDataset

from replk_mm.backbones.catalogue import build_backbone
from replk_mm.checkpoints.io import read_checkpoint
from replk_mm.errors import UserError

RECIPE = Recipe(epochs=3, lr=0.02)


class Tiny(nn.Module):
    """A backbone with dropout and BatchNorm, whose states a resumed training must restore."""

    feature_info = ({'num_chs': 2}, {'num_chs': 6})

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3))

    def forward(self, x):
        return x[:, :2], self.body(x)


def tiny(classes=3):
    torch.manual_seed(5)
    return Classifier(Tiny(), classes)


def data(count=40, classes=3):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % classes
    images = torch.randn(count, 3, 5, 5, generator=generator)
    images[range(count), labels] += 2  # the class is the brightest channel
    return TensorDataset(images, labels)


def fit(out, recipe=RECIPE, model=None, report=lambda line: None, batch=8):
    loader = DataLoader(data(), batch, shuffle=True)
    return train_classifier(model or tiny(), loader, DataLoader(data(21), 8), out, recipe, report=report)


def test_logits_are_a_linear_layer_on_the_mean_of_the_last_feature_map():
    model, x = tiny().eval(), torch.randn(2, 3, 7, 6)
    mean = torch.stack([model.backbone.body(x)[:, c].flatten(1).sum(1) / 20 for c in range(6)], 1)
    torch.testing.assert_close(model(x), mean @ model.head.weight.T + model.head.bias)


def test_the_rate_warms_up_and_falls_to_zero_along_a_cosine():
    recipe = Recipe(warmup=0.1)
    factors = [recipe.lr_factor(i, 100) for i in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * i / 90) for i in range(91)])


def test_it_learns_and_an_interrupted_training_continues_bit_by_bit(tmp_path):
    whole = fit(tmp_path / 'whole')
    assert len(whole) == 3 and whole[-1] > 80

    def stop(line):
        raise KeyboardInterrupt

    for epochs in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / 'parts', report=stop)
        assert len(read_checkpoint(tmp_path / 'parts/last.pth')['meta']['accuracies']) == epochs
        torch.rand(7)  # the state of other processes differs
    assert not (tmp_path / 'parts/backbone.pth').exists()
    assert fit(tmp_path / 'parts') == whole == fit(tmp_path / 'parts')
    states = [read_checkpoint(tmp_path / name / 'backbone.pth')['state_dict'] for name in ('whole', 'parts')]
    assert states[0].keys() == Tiny().state_dict().keys()
    assert states[0]['body.1.num_batches_tracked'] == 3 * 5  # each step is in training mode
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_labels_are_smoothed(tmp_path):
    model, lines = tiny(), []
    model.head.weight.data.zero_()
    model.head.bias.data = torch.tensor([0.0, 60.0, 0.0])
    fit(tmp_path, Recipe(epochs=1, label_smoothing=0.1), model, lines.append, batch=40)
    # 27 of 40 images are of another class than the second; a tenth of each label is shared by all three.
    assert f'loss {60 * (0.9 * 27 / 40 + 0.1 * 2 / 3):.3f}' in lines[0]


def test_only_matrices_and_kernels_decay(tmp_path):
    """With a learning rate that changes nothing else, a step multiplies them by 1 - lr * weight_decay."""
    recipe = Recipe(epochs=1, lr=1e-9, weight_decay=1e8, warmup=0)
    model = tiny()
    before = {key: value.clone() for key, value in model.named_parameters()}
    fit(tmp_path, recipe, model, batch=40)
    for key, value in model.named_parameters():
        torch.testing.assert_close(value, before[key] * (0.9 if value.ndim > 1 else 1), rtol=1e-5, atol=1e-7)


def test_a_folder_of_another_training_and_a_loss_that_is_not_finite_are_errors(tmp_path):
    fit(tmp_path)
    with pytest.raises(UserError, match=r'last\.pth.*other arguments'):
        fit(tmp_path, Recipe(epochs=4, lr=0.02))
    model = tiny()
    nn.init.constant_(model.head.bias, math.inf)
    with pytest.raises(UserError, match='epoch 1'):
        fit(tmp_path / 'other', model=model)
    assert not (tmp_path / 'other').exists()


def test_accuracy_counts_images_not_batches():
    model, samples = tiny(), data(9)
    model.head.weight.data.zero_()
    model.head.bias.data = torch.tensor([0.0, 1.0, 0.0])  # right for images 1, 4 and 7
    assert top1_accuracy(model.train(), DataLoader(samples, 4)) == pytest.approx(100 / 3)
    assert not model.training


def test_the_catalogue_takes_the_checkpoint_whole(tmp_path):
    arguments = dict(arch=dict(depths=[1, 1, 1, 1], channels=[4, 4, 8, 8]))
    trained = build_backbone('convnext-atto', **arguments)
    images = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])), 4)
    train_classifier(Classifier(trained, 2), images, images, tmp_path, Recipe(epochs=1), report=lambda line: None)
    loaded = build_backbone('convnext-atto', pretrained=tmp_path / 'backbone.pth', **arguments)
    x = torch.randn(1, 3, 64, 64)
    for found, expected in zip(loaded.eval()(x), trained.eval()(x), strict=True):
        assert torch.equal(found, expected)
