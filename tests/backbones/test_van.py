"""VAN: its contract, and keys of the authors."""

import pytest
from van_contract import VANContract, assert_keys

from replk_mm.backbones import VAN


class TestVAN(VANContract):
    cls = VAN


@pytest.mark.parametrize('arch', ['b0', 'b2'])
def test_keys_and_shapes_of_the_authors(arch):
    assert_keys(VAN, arch, f'van_{arch}')
