"""What tests of annotation files share: a file to spoil, what is said about it, and how it scores."""
import contextlib
import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from coco_files import coco_dict, write_images

from replk_mm.data import coco_checks
from replk_mm.data.coco_checks import Use
from replk_mm.errors import UserError

NAMES = ('person', 'car', 'dog')
SCORE = Use(train=False, scored=True, masks=True)
TRAIN = Use(train=True, scored=False, masks=True, keep_empty=False)


@pytest.fixture
def file(tmp_path) -> Path:
    """An annotation file to spoil; its images are beside it."""
    write_images(tmp_path / 'images')
    (tmp_path / 'x.json').write_text(json.dumps(coco_dict(NAMES)))
    return tmp_path / 'x.json'


def check(file: Path, use: Use = SCORE) -> str:
    return coco_checks.check(file, file.parent / 'images', use)


def refused(file: Path, *named, use: Use = SCORE) -> str:
    with pytest.raises(UserError) as info:
        check(file, use)
    message = str(info.value)
    assert message.startswith(f'{file}: ')
    for text in named:
        assert str(text) in message
    return message


def paste(message: str) -> None:
    """Give a shell the command that a message advises."""
    command = next(line.strip() for line in message.splitlines() if line.strip().startswith('python -c'))
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    subprocess.run(['bash', '-c', command], check=True, env={**os.environ, 'PATH': path})


def scored(data: dict, kind: str = 'bbox') -> float:
    """AP of detections that are the annotations themselves."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    truth = COCO()
    truth.dataset = data
    found = [dict(image_id=a['image_id'], category_id=a['category_id'], score=.9, **(
        dict(bbox=a['bbox']) if kind == 'bbox' else dict(segmentation=a['segmentation']))) for a in copy.deepcopy(
            data['annotations'])]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        if kind == 'segm':
            for detection, a in zip(found, data['annotations'], strict=True):
                detection['segmentation'] = truth.annToRLE(a)
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])
