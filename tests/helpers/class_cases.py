"""What tests of classes share: configs for COCO, a data set with other categories, rejections."""

from pathlib import Path

import mmdet
import pytest
from coco_files import write_coco_root
from mmengine.config import Config

from replk_mm.engine.config import set_data_root
from replk_mm.engine.prepare import prepare_data
from replk_mm.engine.process import RunOptions
from replk_mm.errors import UserError

MMDET = Path(mmdet.__file__).parent / '.mim' / 'configs'
OWN = ('helmet', 'vest', 'traffic light')
BOTH = ('train', 'val')


def coco_config(name: str = 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py') -> Config:
    cfg = Config.fromfile(str(MMDET / name))
    cfg.model.backbone.pop('init_cfg', None)
    return cfg


@pytest.fixture
def own(tmp_path) -> Path:
    """A data set with other categories than COCO."""
    return write_coco_root(tmp_path / 'data', OWN)


def at(root: Path, **options) -> Config:
    """A config for COCO with the data root ``root``."""
    cfg = coco_config(**options)
    set_data_root(cfg, str(root))
    return cfg


def rejection(cfg: Config, classes: str | None = None, splits=BOTH) -> str:
    with pytest.raises(UserError) as info:
        prepare_data(cfg, RunOptions(classes=classes), splits)
    return str(info.value)
