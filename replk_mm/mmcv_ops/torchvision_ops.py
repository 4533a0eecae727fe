"""torchvision's operators, where it imports and runs on a device."""

import functools

import torch


@functools.cache
def works_on(device_type: str) -> bool:
    """Whether torchvision's operators run on a kind of device, such as ``'cuda'``.

    False on CPUs, where the torch code of this package is faster.
    """
    if device_type == 'cpu':
        return False
    try:
        import torchvision.ops  # noqa: F401 (registers torch.ops.torchvision)

        box = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device_type)
        return torch.ops.torchvision.nms(box, box[:, 0], 0.5).tolist() == [0]
    except (ImportError, RuntimeError, AttributeError, NotImplementedError):  # absent, or built for another torch
        return False
