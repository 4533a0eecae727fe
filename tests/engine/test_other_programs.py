"""mmsegmentation's and mmdetection's own inference with our configs and checkpoints, in programs of others."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny import tiny, tool_environment, trained  # noqa: F401
from tiny_detector import detector, trained_detector  # noqa: F401

from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.inference import reparameterize_checkpoint

# ruff: noqa: F811 (fixtures that come from another file)
pytestmark = pytest.mark.slow
OUTCOME = """
def outcome(run):
    try:
        return repr(run())
    except Exception as error:
        return f'{type(error).__name__}: {error}'
"""
SEGMENTATION = """
import json, sys
import replk_mm.mmcv_ops
from mmengine.runner import load_checkpoint
from mmseg.apis import MMSegInferencer, inference_model, init_model
image, given, saved, trained, merged = sys.argv[1:]
assert not {'replk_mm.registry', 'replk_mm.backbones'} & sys.modules.keys()
maps = {'init_model': inference_model(init_model(given, trained, device='cpu'), image).pred_sem_seg.data.flatten()}
for name, config in dict(given=given, saved=saved, inside=None).items():
    maps[name] = MMSegInferencer(config, trained, device='cpu')(image, show=False)['predictions'].flatten()
found = {name: [int(value) for value in map] for name, map in maps.items()}
for name, run in dict(init=lambda: init_model(given, merged, device='cpu'),
                      inferencer=lambda: MMSegInferencer(saved, merged, device='cpu')).items():
    found[name] = outcome(run)
from replk_mm.reparam import reparameterize
model, _ = reparameterize(init_model(given, device='cpu'), inplace=True)
load_checkpoint(model, merged)
found['merged'] = [int(value) for value in inference_model(model, image).pred_sem_seg.data.flatten()]
print(json.dumps(found))
"""


def run(program: str, folder, *args) -> dict:
    """Run a program in a folder outside of the repository; its last line is JSON."""
    ran = subprocess.run(
        [sys.executable, '-c', OUTCOME + program, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=tool_environment(),
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert 'is not installed' not in ran.stderr + ran.stdout
    return json.loads(ran.stdout.splitlines()[-1])


def test_segmentation(tiny, trained, tmp_path):
    reparameterize_checkpoint(tiny.cfg(), str(trained), tmp_path / 'merged.pth')
    image = min((tiny.data / 'images' / 'validation').iterdir())
    saved = trained.with_name(tiny.config.name)
    found = run(SEGMENTATION, tmp_path, image, tiny.config, saved, trained, tmp_path / 'merged.pth')
    expected = found.pop('init_model')
    assert len(set(expected)) > 1 and len(expected) == 64 * 64
    assert found['given'] == found['saved'] == found['inside'] == expected
    assert np.mean(np.array(found['merged']) == expected) > 0.999
    for name in ('init', 'inferencer'):
        assert found[name].startswith('UserError: RepLKNet: the weights are in merged form (merge=True, fold=True)')


DETECTION = """
import json, sys
import replk_mm.mmcv_ops
from mmdet.apis import DetInferencer, inference_detector, init_detector
image, saved, trained, merged = sys.argv[1:]
assert not {'replk_mm.registry', 'replk_mm.backbones'} & sys.modules.keys()
model = init_detector(saved, trained, device='cpu')
found = {'init_detector': inference_detector(model, image).pred_instances.scores.tolist()}
for name, config in dict(saved=saved, inside=None).items():
    run = DetInferencer(config, trained, device='cpu', show_progress=False)
    found[name] = run(image, no_save_vis=True)['predictions'][0]['scores']
for name, run in dict(init=lambda: init_detector(saved, merged, device='cpu'),
                      inferencer=lambda: DetInferencer(saved, merged, device='cpu')).items():
    found[name] = outcome(run)
print(json.dumps(found))
"""


def test_detection(detector, trained_detector, tmp_path):
    reparameterize_checkpoint(detector.cfg(), str(trained_detector), tmp_path / 'merged.pth')
    image = min((detector.data / 'val2017').iterdir())
    saved = trained_detector.with_name(detector.config.name)
    found = run(DETECTION, tmp_path, image, saved, trained_detector, tmp_path / 'merged.pth')
    expected = found.pop('init_detector')
    assert len(expected) > 1 and found['saved'] == found['inside'] == expected
    for name in ('init', 'inferencer'):
        assert found[name].startswith('UserError: RepLKNet: the weights are in merged form (merge=True, fold=True)')


SCRIPTS = """
import json, sys
from importlib.util import find_spec
from replk_mm.mmcv_ops.__main__ import main
import mmengine.config.config
from mmengine.evaluator import Evaluator
mmengine.config.config.FormatCode = lambda text, **options: (text, True)  # it lays out configs, slowly
package, config, trained = sys.argv[1:]
scripts = find_spec(package).submodule_search_locations[0] + '/.mim/tools/'
evaluate, scores = Evaluator.evaluate, []
Evaluator.evaluate = lambda self, size: scores.append(evaluate(self, size)) or scores[-1]
short = ['train_cfg.val_interval=1', 'default_hooks.checkpoint.interval=1']
for name, *arguments in (
    ('train', config, '--cfg-options', 'load_from=' + trained, 'train_cfg.max_iters=1', *short),
    ('train', config, '--resume', '--cfg-options', 'train_cfg.max_iters=2', *short),
    ('test', config, 'work/iter_2.pth', '--cfg-options'),
    ('test', config, trained, '--cfg-options'),
):
    sys.argv = ['', f'{scripts}{name}.py', *arguments, f'experiment_name={len(scores)}', 'work_dir=work']
    main()
print(json.dumps([{key: float(value) for key, value in found.items()} for found in scores]))
"""


@pytest.mark.parametrize(('package', 'metric'), [('mmseg', 'mIoU'), ('mmdet', 'coco/bbox_mAP')])
def test_scripts_of_a_checkout(package, metric, request, tmp_path):
    """They train, resume and test, as ``python -m replk_mm.mmcv_ops tools/train.py CONFIG``."""
    names = ('tiny', 'trained') if package == 'mmseg' else ('detector', 'trained_detector')
    ours, checkpoint = map(request.getfixturevalue, names)
    found = run(SCRIPTS, tmp_path, package, checkpoint.with_name(ours.config.name), checkpoint)
    *_, validated, tested, of_ours = (scores[metric] for scores in found)
    assert validated == tested
    assert of_ours == pytest.approx(evaluate(ours.cfg(), str(checkpoint), ours.options(tmp_path)).metrics[metric])


def test_logs_do_not_claim_that_a_package_is_missing(tiny, trained, detector, trained_detector):
    for last in (trained, trained_detector):
        logs = ''.join(log.read_text() for log in last.parent.glob('*/*.log'))
        assert 'Iter(train)' in logs and 'is not installed' not in logs
