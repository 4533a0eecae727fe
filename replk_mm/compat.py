"""Repairs of OpenMMLab packages for the running process. Each says what it repairs, and when."""

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path

from replk_mm import mmcv_ops


def install() -> None:
    """Repair what is installed, before mmseg and mmdet are imported. The commands call it."""
    mmcv_ops.install()
    _disable_multimodal_models()


def _disable_multimodal_models() -> None:
    """Let mmpretrain 1.2 leave out its vision-language models, which need names that transformers 5 has removed.

    mmpretrain imports them if transformers is installed, and mmdet imports mmpretrain: no model could be built.
    """
    name = 'mmpretrain.utils.dependency'
    mmpretrain = find_spec('mmpretrain')
    if mmpretrain is None or name in sys.modules:
        return
    utils = Path(mmpretrain.submodule_search_locations[0]) / 'utils'
    # Without its parents: importing those imports the models.
    spec = PathFinder.find_spec(name, [str(utils)])
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.WITH_MULTIMODAL = False
