"""mmcv's operators in torch, for an mmcv without its compiled ones (``mmcv-lite``).

mmseg and mmdet import ``mmcv.ops``, which needs ``mmcv._ext``. Importing this module provides it::

    import replk_mm.mmcv_ops  # before mmseg and mmdet

``python -m replk_mm.mmcv_ops SCRIPT ARGUMENTS`` does so for an unmodified script. The commands of this project call
:func:`install`. Importing ``replk_mm`` or its other modules installs nothing.
"""

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec

from replk_mm import compat

MODULE = 'mmcv._ext'


def is_compiled() -> bool:
    """Whether the installed mmcv has compiled operators. Does not import mmcv."""
    mmcv = find_spec('mmcv')
    return mmcv is not None and PathFinder.find_spec(MODULE, mmcv.submodule_search_locations) is not None


def install() -> None:
    """Provide ``mmcv._ext`` to this process, unless it is loaded or compiled operators are installed.

    Also let mmpretrain import beside transformers 5, since mmdet imports mmpretrain.
    """
    compat.disable_multimodal_models()
    if MODULE not in sys.modules and not is_compiled():
        sys.modules[MODULE] = import_module('replk_mm.mmcv_ops.ext')


install()
