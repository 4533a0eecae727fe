"""Repairs of OpenMMLab packages: with packages made here, and with the real ones where they are installed."""

import importlib
import sys
from unittest.mock import patch

import pytest

from replk_mm import compat


@pytest.mark.parametrize(('transformers', 'complete'), [('4.57.1', True), ('5.0.0', False), ('5.24.0rc1', False)])
def test_mmpretrain_leaves_out_what_transformers_5_breaks(transformers, complete, tmp_path, monkeypatch):
    folder = tmp_path / 'mmpretrain' / 'utils'
    folder.mkdir(parents=True)
    choice = 'from mmpretrain.utils.dependency import WITH_MULTIMODAL\n'
    (tmp_path / 'mmpretrain' / '__init__.py').write_text(choice)
    (folder / '__init__.py').write_text('from .dependency import WITH_MULTIMODAL, require\n')
    (folder / 'dependency.py').write_text('require, WITH_MULTIMODAL = len, True\n')
    (tmp_path / f'transformers-{transformers}.dist-info').mkdir()
    (tmp_path / f'transformers-{transformers}.dist-info' / 'METADATA').write_text(
        f'Metadata-Version: 2.1\nName: transformers\nVersion: {transformers}\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    with patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition('.')[0] == 'mmpretrain']:
            del sys.modules[name]
        for _ in range(2):
            compat.disable_multimodal_models()
        assert 'mmpretrain' not in sys.modules  # mmdet imports it, if it is needed
        mmpretrain = importlib.import_module('mmpretrain')
        assert mmpretrain.__file__.startswith(str(tmp_path))
        utils = importlib.import_module('mmpretrain.utils')
        assert mmpretrain.WITH_MULTIMODAL is utils.WITH_MULTIMODAL is complete
        assert utils.require is len


@pytest.mark.extras('mmpretrain', 'transformers')
def test_mmdet_finds_mmpretrain_beside_transformers():
    """``tests/conftest.py`` has installed the repair."""
    from mmdet.models.reid import base_reid
    from mmpretrain.registry import MODELS

    assert base_reid.mmpretrain is sys.modules['mmpretrain']
    assert MODELS.get('TIMMBackbone') is not None
