"""The repairs for mmengine: idempotent, and no wider than needed."""
import pytest

from replk_mm import compat


def test_register_configs_twice_wraps_once():
    from mmengine.config import utils
    compat.register_configs()
    first = utils._get_package_and_cfg_path
    compat.register_configs()
    assert utils._get_package_and_cfg_path is first
    assert first('replk_mm::a/b.py') == ('replk_mm', 'a/b.py')
    assert first('replk_mm::b.py') == ('replk_mm', 'b.py')
    assert first('mmseg::x/y.py') == ('mmsegmentation', 'x/y.py')
    with pytest.raises(ValueError):
        first('y.py')
