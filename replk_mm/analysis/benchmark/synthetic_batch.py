"""Synthetic batches, and what a network does with them: inference from image to result, and a training step."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from replk_mm.analysis.benchmark.numerical_difference import CLASS_MAP
from replk_mm.deploy.equivalence import network_outputs
from replk_mm.engine.config import fit_to_machine
from replk_mm.engine.explain import explaining
from replk_mm.engine.wrappers import num_classes_of
from replk_mm.errors import UserError
from replk_mm.ops import pack

#: Objects of a synthetic image for detectors.
_OBJECTS = 8


class SyntheticBatch:
    """Batches of one shape, and calls that run networks of one kind on them.

    Args:
        cfg: The config, fitted to this machine.
        net: One of the networks, for its kind and its classes.
        batch: Images.
        shape: Height and width in pixels.
        device: ``'cpu'`` or ``'cuda'``.
        seed: Of images and labels.

    Raises:
        UserError: If ``net`` is a whole model of unknown kind.
    """

    def __init__(
        self, cfg: Config, net: Any, batch: int, shape: tuple[int, int], device: str = 'cpu', seed: int = 0
    ) -> None:
        self.cfg, self.shape, self.device = cfg, shape, device
        generator = torch.Generator().manual_seed(seed)
        self.kind = model_kind(net)
        if self.kind == 'unknown':
            raise UserError(
                f'{cfg.filename}: {type(net).__name__} is neither a segmentor nor a detector\n'
                f'Its backbone alone can be measured: benchmark.py backbone.'
            )
        pixels = torch.stack([_scene(shape, generator) for _ in range(batch)])
        self._pixels = list(pixels)
        #: Normalized images, ``(batch, 3, H, W)``: what a backbone sees.
        self.image = ((pixels.float() - 128) / 64).to(device)
        self._targets = [self._target(net, generator) for _ in range(batch)] if self.kind != 'backbone' else []

    def inference_call(self, net: Any, how: str = 'float32') -> Callable[[], object]:
        """A call that runs ``net`` as a test does: a backbone to its features, a model to class maps or boxes.

        Args:
            net: Set to evaluation mode.
            how: ``'float32'``, ``'autocast'`` to bfloat16, or ``'converted'`` by :func:`convert_to_bfloat16`.
        """
        net.eval()

        def run() -> object:
            with torch.no_grad(), self._autocast(how == 'autocast'):
                return net(self.image) if self.kind == 'backbone' else net.test_step(self._batch(False))

        return run

    def training_call(self, net: Any, how: str = 'float32') -> Callable[[], object]:
        """A call that trains ``net`` for one step: forward, loss, backward, and for a model its config's optimizer.

        The learning rate is 0, so that the weights do not change.

        Args:
            net: Set to training mode.
            how: ``'float32'``, or ``'autocast'`` to bfloat16.
        """
        net.train()
        if self.kind == 'backbone':

            def run() -> None:
                net.zero_grad()
                self._loss(net, how).backward()

            return run
        wrapper = self._optimizer(net, how)
        return lambda: net.train_step(self._batch(True), wrapper)

    def outputs(self, net: Any, how: str = 'float32') -> dict[str, Tensor]:
        """What inference computes: every dense output, and for a segmentor its class maps.

        Args:
            net: Set to evaluation mode.
            how: See :meth:`inference`.
        """
        net.eval()
        image = self.image.to(torch.bfloat16) if how == 'converted' else self.image
        with torch.no_grad(), self._autocast(how == 'autocast'):
            # The last bit decides which boxes a detector selects; its dense outputs can be compared.
            found = {f'output {i}': output.float() for i, output in enumerate(_outputs(net, image))}
            if self.kind == 'segmentor':
                samples = net.test_step(self._batch(False))
                found[CLASS_MAP] = torch.stack([sample.pred_sem_seg.data[0] for sample in samples]).long()
        return found

    def gradients(self, net: nn.Module, how: str = 'float32') -> dict[str, Tensor]:
        """Loss and gradients of all parameters, by name, for comparison.

        The loss is that of training. Gradients are of a step with fixed statistics of BatchNorm, because through batch
        statistics of a random network they depend on the last bit of every activation, and without dropout, whose
        random numbers depend on the memory layout. A detector's are of the mean squares of its dense outputs, because
        its losses depend on which boxes it selects, which the last bit decides too.

        Args:
            net: A copy is run.
            how: See :meth:`training`.
        """
        net = copy.deepcopy(net).train()
        for module in net.modules():
            if isinstance(module, (_DropoutNd, DropPath)):
                setattr(module, 'p' if isinstance(module, _DropoutNd) else 'drop_prob', 0.0)
        detects = self.kind == 'detector'
        with torch.no_grad():
            found = {} if detects else {'loss': self._loss(net, how)}
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        (self._mean_squares(net, how) if detects else self._loss(net, how)).backward()
        return found | {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    def normalized(self, net: Any) -> Tensor:
        """The batch after ``net``'s data preprocessor, ``(batch, 3, H, W)``."""
        return self.image if self.kind == 'backbone' else net.data_preprocessor(self._batch(False), False)['inputs']

    def _loss(self, net: Any, how: str) -> Tensor:
        if self.kind == 'backbone':
            return self._mean_squares(net, how)
        with self._autocast(how == 'autocast'):
            return net.parse_losses(net(**net.data_preprocessor(self._batch(True), True), mode='loss'))[0]

    def _mean_squares(self, net: Any, how: str) -> Tensor:
        with self._autocast(how == 'autocast'):
            return torch.stack([output.float().square().mean() for output in _outputs(net, self.image)]).sum()

    def _autocast(self, enabled: bool) -> Any:
        return torch.autocast(self.device, torch.bfloat16) if enabled else nullcontext()

    def _optimizer(self, net: nn.Module, how: str) -> OptimWrapper:
        if not self.cfg.get('optim_wrapper'):
            raise UserError(
                f"{self.cfg.filename}: the config has no 'optim_wrapper' to train with\nUse --mode inference."
            )
        cfg = copy.deepcopy(self.cfg)
        if cfg.optim_wrapper.get('type') in ('AmpOptimWrapper', 'replk_mm.BFloat16OptimWrapper'):
            cfg.optim_wrapper.type = 'OptimWrapper'
            for key in ('dtype', 'loss_scale'):
                cfg.optim_wrapper.pop(key, None)
        fit_to_machine(cfg, 'bf16' if how == 'autocast' else None, self.device, 1)
        with explaining(cfg, 'optim_wrapper'):
            wrapper = build_optim_wrapper(net, cfg.optim_wrapper)
        for group in wrapper.optimizer.param_groups:
            group['lr'] = 0.0
        return wrapper

    def _batch(self, training: bool) -> dict:
        # Anew for every call: models write into the samples, and a loader's batch lives for a step.
        height, width = self.shape
        meta = dict(
            ori_shape=self.shape,
            img_shape=self.shape,
            pad_shape=self.shape,
            scale_factor=(1.0, 1.0),
            batch_input_shape=(height, width),
        )
        if self.kind == 'segmentor':
            from mmseg.structures import SegDataSample as Sample
        else:
            from mmdet.structures import DetDataSample as Sample
        samples = []
        for target in self._targets:
            sample = Sample(metainfo=meta)
            if training:
                sample.set_data({key: value.clone() for key, value in target.items()})
            samples.append(sample)
        return dict(inputs=list(self._pixels), data_samples=samples)

    def _target(self, net: Any, generator: torch.Generator) -> dict[str, Any]:
        height, width = self.shape
        if self.kind == 'segmentor':
            from mmengine.structures import PixelData

            # Patches of one class, a few pixels without label.
            grid = (1, 1, -(-height // 32), -(-width // 32))
            patches = torch.randint(0, num_classes_of(net) or 1, grid, generator=generator)
            labels = F.interpolate(patches.float(), size=self.shape)[0].long()
            labels[torch.rand(labels.shape, generator=generator) < 0.02] = 255
            return {'gt_sem_seg': PixelData(data=labels)}
        from mmdet.structures.mask import BitmapMasks
        from mmengine.structures import InstanceData

        size = torch.tensor([width, height])
        sides = (0.1 + 0.4 * torch.rand(_OBJECTS, 2, generator=generator)) * size
        corner = torch.rand(_OBJECTS, 2, generator=generator) * (size - sides)
        boxes = torch.cat([corner, corner + sides], 1)
        masks = np.zeros((_OBJECTS, height, width), np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        head: Any = net.roi_head.bbox_head if hasattr(net, 'roi_head') else net.bbox_head
        first: Any = head[0] if isinstance(head, nn.ModuleList) else head
        labels = torch.randint(0, first.num_classes, (_OBJECTS,), generator=generator)
        return {'gt_instances': InstanceData(bboxes=boxes, labels=labels, masks=BitmapMasks(masks, height, width))}


def convert_to_bfloat16(net: Any) -> None:
    """Convert the layers of ``net`` to bfloat16 in place; images may stay in float32."""
    whole = model_kind(net) != 'backbone'
    for name, part in net.named_children() if whole else [('', net)]:
        if name != 'data_preprocessor':  # which needs float32
            part.to(torch.bfloat16)
    (net.backbone if whole else net).register_forward_pre_hook(lambda module, args: (args[0].to(torch.bfloat16),))
    pack(net)


def _outputs(net: nn.Module, image: Tensor) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(network_outputs(net, image)) if isinstance(leaf, Tensor)]


def _scene(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """An image of coloured patches with noise, ``(3, H, W)`` uint8. Noise alone has the same mean everywhere, and norms
    over pooled maps would amplify rounding errors."""
    coarse = torch.randint(0, 256, (1, 3, -(-shape[0] // 32), -(-shape[1] // 32)), generator=generator).float()
    patches = F.interpolate(coarse, size=shape)[0] * 0.7 + 30 * torch.rand(3, 1, 1, generator=generator)
    return (patches + 20 * torch.randn(3, *shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def model_kind(net: Any) -> str:
    """``'backbone'``, ``'segmentor'``, ``'detector'`` or ``'unknown'``."""
    if not hasattr(net, 'data_preprocessor'):
        return 'backbone'
    if hasattr(net, 'decode_head'):
        return 'segmentor'
    return 'detector' if hasattr(net, 'roi_head') or hasattr(net, 'bbox_head') else 'unknown'
