"""What tests of checkpoints share: tiny backbones, files to load into them, and an attack."""

import torch
from norms import randomize_norms

from replk_mm.backbones import RepLKNet

TINY = dict(
    large_kernel_sizes=[13, 11, 9, 7], small_kernel=5, layers=[1, 1, 2, 1], channels=[8, 12, 16, 24], dw_ratio=1
)
CONV = dict(depths=[1, 1, 2, 1], channels=[8, 12, 16, 24])
DENSE = dict(out_indices=(0, 1, 2, 3), gap_before_final_norm=False)


class Exploit:
    """Unpickled, it calls a function."""

    def __init__(self, call, *args) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple:
        return self.call, self.args


def write(path, content) -> str:
    torch.save(content, path)
    return str(path)


def tiny_backbone(seed: int = 1, **kwargs) -> RepLKNet:
    torch.manual_seed(seed)
    return randomize_norms(RepLKNet(TINY, **kwargs), seed).eval()


def assert_same(model, weights) -> None:
    own = model.state_dict()
    assert {key for key in weights if not torch.equal(own[key].float(), weights[key].float())} == set()


def first_line(error) -> str:
    return str(error.value).splitlines()[0]
