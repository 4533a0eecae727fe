"""Parameters and multiply-accumulates of a network."""
import copy

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """Number of parameters, training-only heads included."""
    return sum(p.numel() for p in model.parameters())


def inference_parameters(model: nn.Module) -> int:
    """Number of parameters that inference uses: without auxiliary heads."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith('auxiliary_head.'))


def macs(model: nn.Module, shape: tuple[int, int]) -> int:
    """Multiply-accumulates of one inference on one image, which papers call FLOPs.

    Counted by torch on the meta device: convolutions and matrix products, not norms, activations and interpolation.

    Args:
        model: A segmentor or backbone, on any device; not changed.
        shape: Height and width of the image in pixels.
    """
    with torch.device('meta'):
        model = copy.deepcopy(model).to('meta').eval()
        image = torch.empty(1, 3, *shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2
