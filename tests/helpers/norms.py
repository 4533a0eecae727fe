"""Random statistics for BatchNorm."""

import torch


def randomize_norms(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every BatchNorm statistics and affine parameters far from the identity, which would hide a wrong fold."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                layer.running_mean.copy_(0.3 * torch.randn(layer.running_mean.shape, generator=generator))
                layer.running_var.copy_(0.5 + torch.rand(layer.running_var.shape, generator=generator))
                if layer.affine:
                    layer.weight.copy_(1 + 0.3 * torch.randn(layer.weight.shape, generator=generator))
                    layer.bias.copy_(0.3 * torch.randn(layer.bias.shape, generator=generator))
    return module
