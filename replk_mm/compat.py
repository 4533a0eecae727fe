"""Repairs of OpenMMLab packages for the running process. Each says what it repairs, and when."""

import sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec
from pathlib import Path


def disable_multimodal_models() -> None:
    """Let mmpretrain 1.2 leave out its vision-language models, which need names that transformers 5 has removed.

    mmpretrain imports them if transformers is installed, and mmdet imports mmpretrain: no model could be built.
    """
    name = 'mmpretrain.utils.dependency'
    mmpretrain = find_spec('mmpretrain')
    try:
        fits = int(version('transformers').partition('.')[0]) < 5
    except PackageNotFoundError:
        fits = True
    if fits or name in sys.modules or mmpretrain is None or not mmpretrain.submodule_search_locations:
        return
    utils = Path(mmpretrain.submodule_search_locations[0]) / 'utils'
    # Without its parents: importing those imports the models.
    spec = PathFinder.find_spec(name, [str(utils)])
    if spec is None or spec.loader is None:
        return
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)['WITH_MULTIMODAL'] = False
