"""Shape bias of networks with known decisions, and of a trained checkpoint by mmseg's own inference."""

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from tiny import tiny, trained  # noqa: F401 (fixtures)

from replk_mm.analysis import shape_bias
from replk_mm.analysis.shape_bias import Decision, ShapeBias, majority_class, measure_shape_bias
from replk_mm.commands import shape_bias as command
from replk_mm.data.scenes.cue_conflict import CueConflictDataset, CueConflictObject, CueConflictScene
from replk_mm.data.scenes.kinds import SCENES
from replk_mm.data.scenes.spec import DEMO_CLASSES, DEMO_PALETTE
from replk_mm.data.scenes.writer import write_demo_data
from replk_mm.engine.predict import load_for_prediction
from replk_mm.errors import UserError

VAL = 6  # scenes of one object, so that there are 12 conflict scenes, 2 of each ordered pair
GROUND = DEMO_CLASSES.index('ground')


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('shape_bias') / 'data'
    write_demo_data(root, train=1, val=VAL, seed=1, size=(64, 64), kind=SCENES['conflict'])
    return root


def objects_of(data: Path, image: Path) -> list[dict]:
    listing = json.loads((data / 'conflict.json').read_text())
    return next(s['objects'] for s in (*listing['conflict'], *listing['agreeing']) if str(image).endswith(s['image']))


@pytest.fixture
def network(data, tmp_path, monkeypatch):
    """Measure a fake network; ``answer`` returns the class that it predicts for an object."""
    checkpoint = tmp_path / 'fake.pth'
    torch.save({}, checkpoint)
    (tmp_path / 'fake.py').write_text('model = dict()\n')
    cfg = Config.fromfile(tmp_path / 'fake.py')

    def measured(answer, classes=DEMO_CLASSES, root=data):
        model = SimpleNamespace(decode_head=None, dataset_meta=dict(classes=list(classes), palette=list(DEMO_PALETTE)))

        def predict(_, images):
            for image in map(Path, images):
                file = str(image).replace('/images/', '/annotations/').replace('.jpg', '.png')
                labels = np.array(Image.open(file)).astype(int) - 1
                predicted = np.full_like(labels, GROUND)
                for item in objects_of(data, image):
                    predicted[labels == DEMO_CLASSES.index(item['shape'])] = answer(item)
                found = torch.from_numpy(predicted)[None]
                yield image, cv2.imread(str(image)), SimpleNamespace(pred_sem_seg=SimpleNamespace(data=found))

        monkeypatch.setattr(shape_bias, 'load_for_prediction', lambda *args, **options: model)
        monkeypatch.setattr(shape_bias, 'predict', predict)
        monkeypatch.setattr(shape_bias, '_draw_decisions', lambda *args: None)
        return measure_shape_bias(cfg, str(checkpoint), root, tmp_path / 'out').values()

    return measured


def bias(shape: int, texture: int, other: int) -> dict:
    share = shape / (shape + texture) if shape + texture else None
    total = shape + texture + other
    accuracies = dict(shape_accuracy=shape / total, texture_accuracy=texture / total)
    return dict(shape_decisions=shape, texture_decisions=texture, other=other, shape_bias=share, **accuracies)


# -- networks of known bias -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ('answer', 'counts', 'per_class', 'mean', 'agreeing'),
    [
        (lambda item: item['shape'], (12, 0, 0), dict(disc=(4, 0, 0), square=(4, 0, 0), star=(4, 0, 0)), 1.0, 1.0),
        (lambda item: item['texture'], (0, 12, 0), dict(disc=(0, 4, 0), square=(0, 4, 0), star=(0, 4, 0)), 0.0, 1.0),
        (lambda item: 'disc', (4, 4, 4), dict(disc=(4, 0, 0), square=(0, 2, 2), star=(0, 2, 2)), 1 / 3, 1 / 3),
        (lambda item: 'ground', (0, 0, 12), dict(disc=(0, 0, 4), square=(0, 0, 4), star=(0, 0, 4)), None, 0.0),
        (lambda item: 'triangle_h', (0, 0, 12), dict(disc=(0, 0, 4), square=(0, 0, 4), star=(0, 0, 4)), None, 0.0),
        (
            lambda item: item['texture' if item['shape'] == 'square' else 'shape'],
            (8, 4, 0),
            dict(disc=(4, 0, 0), square=(0, 4, 0), star=(4, 0, 0)),
            2 / 3,
            1.0,
        ),
    ],
)
def test_networks_of_known_bias(network, answer, counts, per_class, mean, agreeing):
    values = network(lambda item: DEMO_CLASSES.index(answer(item)))
    assert values == dict(
        **bias(*counts),
        mean_over_classes=mean if mean is None else pytest.approx(mean),
        per_class={name: bias(*each) for name, each in per_class.items()},
        agreeing_accuracy=pytest.approx(agreeing),
        agreeing_objects=6,
    )


def test_shares_of_no_objects_are_none():
    decided = {('disc', 'star'): 'disc', ('disc', 'square'): 'star', ('star', 'disc'): 'disc', ('star', 'square'): None}
    values = ShapeBias([Decision('', *cues, name) for cues, name in decided.items()], [], {}).values()
    per_class = dict(disc=bias(1, 0, 1), star=bias(0, 1, 1))
    expected = dict(per_class=per_class, mean_over_classes=0.5, agreeing_accuracy=None, agreeing_objects=0)
    assert values == bias(1, 1, 2) | expected
    empty = ShapeBias([], [], {}).values()
    assert empty['shape_bias'] is empty['shape_accuracy'] is empty['mean_over_classes'] is None


def test_share_of_a_rarely_used_cue_is_beside_the_ratio():
    rare = [Decision('', 'disc', 'star', 'disc'), *[Decision('', 'disc', 'star', None)] * 999]
    values = ShapeBias(rare, [], {}).values()
    assert (values['shape_bias'], values['shape_accuracy'], values['texture_accuracy']) == (1.0, 0.001, 0.0)


# -- the decision -----------------------------------------------------------------------------------------------------
def test_majority_class_by_counting_pixels():
    rng = np.random.default_rng(0)
    known = {'a': 2, 'b': 3, 'c': 5}
    outcomes = set()
    for _ in range(200):
        predicted, mask = rng.integers(0, 7, (4, 5)), rng.random((4, 5)) < 0.5
        counts = dict.fromkeys(known, 0)
        for row in range(4):
            for column in range(5):
                for name, index in known.items():
                    if mask[row, column] and predicted[row, column] == index:
                        counts[name] += 1
        best = sorted(counts, key=counts.__getitem__)[-1]
        alone = counts[best] > 0 and sum(count == counts[best] for count in counts.values()) == 1
        expected = best if alone else None
        assert majority_class(predicted, mask, known) == expected
        outcomes.add(expected)
    assert outcomes == {'a', 'b', 'c', None}


def test_mask_of_an_object_is_limited_to_its_box():
    labels = np.zeros((6, 12), int)
    labels[1:5, 1:5] = labels[1:5, 7:11] = 4
    item = CueConflictObject('a', 'b', (6, 0, 12, 6))
    scene = CueConflictScene('scene.jpg', Path('scene.jpg'), Path('scene.png'), (item,))
    mask = CueConflictDataset({'a': 4, 'b': 5}, (scene,), (), {}, '').mask(scene, item, labels)
    assert mask.sum() == 16 and mask[1:5, 7:11].all()


# -- a network that learned -------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_trained_checkpoint_by_mmsegs_inference(tiny, trained, data, tmp_path):  # noqa: F811
    from mmseg.apis import inference_model

    model = load_for_prediction(tiny.cfg(), str(trained), 'cpu')
    listing = json.loads((data / 'conflict.json').read_text())
    count = dict(shape=0, texture=0, other=0)
    for scene in listing['conflict']:
        predicted = inference_model(model, str(data / scene['image'])).pred_sem_seg.data[0].numpy()
        labels = np.array(Image.open(data / scene['labels']))
        for item in scene['objects']:
            inside = predicted[labels == DEMO_CLASSES.index(item['shape']) + 1]
            votes = [(inside == k).sum() if k > 2 else 0 for k in range(len(DEMO_CLASSES))]
            top = [DEMO_CLASSES[k] for k in range(len(votes)) if votes[k] == max(votes) > 0]
            cue = [key for key in ('shape', 'texture') if [item[key]] == top]
            count[cue[0] if cue else 'other'] += 1
    cfg = tiny.cfg()
    before = str(cfg)
    values = measure_shape_bias(cfg, str(trained), data, tmp_path / 'out').values()
    assert str(cfg) == before
    assert [values[f'{key}_decisions'] for key in ('shape', 'texture')] + [values['other']] == list(count.values())
    assert sum(count.values()) == 2 * VAL


@pytest.mark.slow
def test_command(tiny, trained, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    arguments = [tiny.config, trained, '--data-root', data, '--out', tmp_path / 'out', '--device', 'cpu']
    monkeypatch.setattr('sys.argv', ['shape_bias.py', *map(str, arguments)])
    assert command.main() == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / 'out/shape_bias.json').read_text(), parse_constant=pytest.fail)
    values = record['values']
    total = next(line for line in printed.splitlines() if line.startswith('all '))
    keys = ('shape_decisions', 'texture_decisions', 'other')
    assert list(map(int, total.split()[1:4])) == [values[key] for key in keys]
    assert [float(x) for x in total.split()[4:6]] == pytest.approx(
        [100 * values[f'{key}_accuracy'] for key in ('shape', 'texture')], abs=0.051
    )
    assert 'by shape / (by shape + by texture)' in printed and 'Geirhos' in record['protocol']['definition']
    assert record['protocol']['scenes']['seed'] == 1 and record['protocol']['scenes']['conflict'] == 2 * VAL
    assert len(record['decisions']) == 3 * VAL
    by_shape = [d for d in record['decisions'] if d['shape'] == d['decided'] != d['texture']]
    assert len(by_shape) == values['shape_decisions']
    picture = cv2.imread(str(tmp_path / 'out/shape_bias.png'))
    assert picture.std() > 20 and min(picture.shape[:2]) > 300


# -- mistakes ---------------------------------------------------------------------------------------------------------
def changed(data: Path, folder: Path, change) -> Path:
    """The data set with another listing."""
    root = folder / 'changed'
    root.mkdir()
    for name in ('images', 'annotations'):
        (root / name).symlink_to(data / name)
    listing = json.loads((data / 'conflict.json').read_text())
    text = change(listing)
    (root / 'conflict.json').write_text(text if isinstance(text, str) else json.dumps(listing))
    return root


def first(found: dict) -> dict:
    return found['conflict'][0]['objects'][0]


@pytest.mark.parametrize(
    ('change', 'fragment'),
    [
        (lambda found: '{"conflict": [', 'Invalid JSON'),
        (lambda found: '[]', 'object'),
        (lambda found: found.pop('agreeing') and None, 'agreeing'),
        (lambda found: found['conflict'].clear(), 'conflict'),
        (lambda found: first(found).pop('box') and None, r'conflict\.0\.objects\.0\.box'),
        (lambda found: first(found).update(box=[5, 5, 5, 9]), 'contains no'),
        (lambda found: first(found).update(box=[0, 0, 10**9, 10**9]), 'exceeds'),
        (lambda found: first(found).update(texture='fur'), 'fur'),
        (lambda found: first(found).update(texture=first(found)['shape']), 'differ in "conflict"'),
        (lambda found: found['object_classes'].update(disc='4'), r'object_classes\.disc'),
        (lambda found: found['conflict'][2].update(image='images/none.jpg'), r'none\.jpg'),
        (lambda found: found['conflict'][0].update(labels=found['conflict'][0]['image']), '3 channels'),
    ],
)
def test_invalid_listings(network, data, tmp_path, change, fragment):
    with pytest.raises(UserError, match=fragment):
        network(lambda item: 0, root=changed(data, tmp_path, change))


def test_networks_and_folders_that_do_not_fit(network, tmp_path):
    with pytest.raises(UserError, match='--scenes conflict'):
        network(lambda item: 0, root=tmp_path)
    with pytest.raises(UserError, match='disc, star'):
        network(lambda item: 0, classes=['sky', 'ground', 'square'])
