"""Synthetic batches: random images and labels, with calls that run inference or a training step on them."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from replk_mm.analysis.benchmark.numerical_difference import CLASS_MAP
from replk_mm.analysis.gpu import DTYPES
from replk_mm.deploy.equivalence import network_outputs
from replk_mm.engine.config import fit_to_machine
from replk_mm.engine.config_errors import explain_build_errors
from replk_mm.errors import UserError, command_line
from replk_mm.ops import prepack
from replk_mm.wrappers import input_channels, num_classes_of

#: Number of objects in a synthetic image for detectors.
_OBJECTS = 8
#: Factor of the loss of which float16 gradients are computed: those of a large map underflow otherwise.
_LOSS_SCALE = 2.0**16


class Precision(NamedTuple):
    """Precision of a network."""

    dtype: str = 'float32'  #: a name in :data:`replk_mm.analysis.gpu.DTYPES`, or the precision of another engine
    how: str = ''  #: ``'autocast'``, ``'converted'`` by :func:`convert_weights`, or empty for float32 tensors


FLOAT32 = Precision()


class SyntheticBatch:
    """A batch of random images and labels, and calls that run networks of one kind on it.

    Args:
        cfg: The config, fitted to this machine.
        net: One of the networks; determines the kind and the number of classes.
        batch: Number of images.
        shape: Height and width in pixels.
        device: ``'cpu'`` or ``'cuda'``.
        file: Image that each call of :meth:`inference_call` reads and prepares as ``cfg.image_pipeline`` says, in place
            of random pixels in memory. Defaults to none.

    Raises:
        UserError: If ``net`` is a model of unknown kind.
    """

    def __init__(
        self, cfg: Config, net: Any, batch: int, shape: tuple[int, int], device: str = 'cpu', file: str | None = None
    ) -> None:
        self.cfg, self.shape, self.device, self.file = cfg, shape, device, file
        self._prepare = Compose(cfg.image_pipeline) if file else None
        generator = torch.Generator().manual_seed(0)
        self.kind = model_kind(net)
        if self.kind == 'unknown':
            raise UserError(
                f'{cfg.filename}: {type(net).__name__} is no segmentor, detector or classifier\n'
                f'Measure its backbone alone: {command_line("benchmark", "backbone", cfg.filename)}'
            )
        pixels = torch.stack([_random_image((input_channels(net), *shape), generator) for _ in range(batch)])
        self._pixels = list(pixels)
        #: Normalized images ``(batch, C, H, W)``, the input of a backbone.
        self.image = ((pixels.float() - 128) / 64).to(device)
        self._targets = [self._target(net, generator) for _ in range(batch)] if self.kind != 'backbone' else []

    def inference_call(self, net: Any, precision: Precision = FLOAT32) -> Callable[[], object]:
        """A call that runs inference: a backbone up to its features, a model up to class maps or boxes.

        Args:
            net: Set to evaluation mode.
            precision: Of the computation.
        """
        net.eval()

        def infer() -> object:
            with torch.no_grad(), self._autocast(precision):
                return net(self.image) if self.kind == 'backbone' else net.test_step(self._batch(False))

        return infer

    def training_call(self, net: Any, precision: Precision = FLOAT32) -> Callable[[], object]:
        """A call that runs a training step: forward, loss, backward, and for a model the config's optimizer.

        The learning rate is 0, so that weights do not change.

        Args:
            net: Set to training mode.
            precision: Of the computation, by autocast if tensors are not in float32.
        """
        net.train()
        if self.kind == 'backbone':

            def train() -> None:
                net.zero_grad()
                self._loss(net, precision).backward()

            return train
        wrapper = self._optimizer(net, precision)
        return lambda: net.train_step(self._batch(True), wrapper)

    def outputs(self, net: Any, precision: Precision = FLOAT32) -> dict[str, Tensor]:
        """Every dense output of inference, and the class maps of a segmentor, by name.

        Args:
            net: Set to evaluation mode.
            precision: See :meth:`inference_call`.
        """
        net.eval()
        image = self.image.to(DTYPES[precision.dtype]) if precision.how == 'converted' else self.image
        with torch.no_grad(), self._autocast(precision):
            # The last bit decides which boxes a detector selects, so only dense outputs are comparable.
            outputs = {f'output {i}': output.float() for i, output in enumerate(_dense_outputs(net, image))}
            if self.kind == 'segmentor':
                samples = net.test_step(self._batch(False))
                outputs[CLASS_MAP] = torch.stack([sample.pred_sem_seg.data[0] for sample in samples]).long()
        return outputs

    def gradients(self, net: nn.Module, precision: Precision = FLOAT32) -> dict[str, Tensor]:
        """The training loss and the gradients of all parameters, by name, for a comparison of networks.

        Gradients are computed with fixed statistics of BatchNorm and without dropout. Through batch statistics of a
        random network they would depend on the last bit of every activation, and the random numbers of dropout depend
        on the memory layout. For a detector they are those of the mean squares of its dense outputs, because its losses
        depend on the boxes that it selects, and those on the last bit.

        Args:
            net: Left unchanged; a copy runs.
            precision: See :meth:`training_call`.
        """
        net = copy.deepcopy(net).train()
        for module in net.modules():
            if isinstance(module, (_DropoutNd, DropPath)):
                setattr(module, 'p' if isinstance(module, _DropoutNd) else 'drop_prob', 0.0)
        is_detector = self.kind == 'detector'
        with torch.no_grad():
            loss = {} if is_detector else {'loss': self._loss(net, precision)}
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        scale = _LOSS_SCALE if precision.dtype == 'float16' else 1.0
        (scale * (self._mean_squares(net, precision) if is_detector else self._loss(net, precision))).backward()
        return loss | {name: p.grad / scale for name, p in net.named_parameters() if p.grad is not None}

    def normalized(self, net: Any) -> Tensor:
        """The images after the data preprocessor of ``net``, ``(batch, C, H, W)``."""
        return self.image if self.kind == 'backbone' else net.data_preprocessor(self._batch(False), False)['inputs']

    def _loss(self, net: Any, precision: Precision) -> Tensor:
        if self.kind == 'backbone':
            return self._mean_squares(net, precision)
        with self._autocast(precision):
            return net.parse_losses(net(**net.data_preprocessor(self._batch(True), True), mode='loss'))[0]

    def _mean_squares(self, net: Any, precision: Precision) -> Tensor:
        with self._autocast(precision):
            return torch.stack([output.float().square().mean() for output in _dense_outputs(net, self.image)]).sum()

    def _autocast(self, precision: Precision) -> Any:
        return torch.autocast(self.device, DTYPES[precision.dtype]) if precision.how == 'autocast' else nullcontext()

    def _optimizer(self, net: nn.Module, precision: Precision) -> OptimWrapper:
        if not self.cfg.get('optim_wrapper'):
            raise UserError(
                f"{self.cfg.filename}: the config has no 'optim_wrapper' to train with\nUse --mode inference."
            )
        cfg = copy.deepcopy(self.cfg)
        if cfg.optim_wrapper.get('type') in ('AmpOptimWrapper', 'replk_mm.BFloat16OptimWrapper'):
            cfg.optim_wrapper.type = 'OptimWrapper'
            for key in ('dtype', 'loss_scale'):
                cfg.optim_wrapper.pop(key, None)
        fit_to_machine(cfg, {'bfloat16': 'bf16', 'float16': 'fp16'}.get(precision.dtype), self.device, 1)
        with explain_build_errors(cfg, 'optim_wrapper'):
            wrapper = build_optim_wrapper(net, cfg.optim_wrapper)
        for group in wrapper.optimizer.param_groups:
            group['lr'] = 0.0
        return wrapper

    def _batch(self, training: bool) -> dict:
        if self._prepare and not training:
            return pseudo_collate([self._prepare(dict(img_path=self.file, img_id=0)) for _ in self._pixels])
        # A new batch for each call: models write into the samples.
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
        elif self.kind == 'classifier':
            from mmpretrain.structures import DataSample as Sample
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

            # Patches of one class, and a few unlabelled pixels.
            grid = (1, 1, -(-height // 32), -(-width // 32))
            patches = torch.randint(0, num_classes_of(net) or 1, grid, generator=generator)
            labels = F.interpolate(patches.float(), size=self.shape)[0].long()
            labels[torch.rand(labels.shape, generator=generator) < 0.02] = 255
            return {'gt_sem_seg': PixelData(data=labels)}
        if self.kind == 'classifier':
            return {'gt_label': torch.randint(0, net.head.num_classes, (1,), generator=generator)}
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


def convert_weights(net: Any, dtype: torch.dtype) -> None:
    """Convert the weights of ``net`` to ``dtype`` in place; it then accepts float32 images too."""
    is_model = model_kind(net) != 'backbone'
    for name, part in net.named_children() if is_model else [('', net)]:
        if name != 'data_preprocessor':  # needs float32
            part.to(dtype)
    (net.backbone if is_model else net).register_forward_pre_hook(lambda module, args: (args[0].to(dtype),))
    prepack(net)


def _dense_outputs(net: nn.Module, image: Tensor) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(network_outputs(net, image)) if isinstance(leaf, Tensor)]


def _random_image(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """An image of colored patches with noise, uint8 of shape ``(C, H, W)``.

    Noise alone has the same mean everywhere, and norms over pooled maps would amplify rounding errors.
    """
    channels, height, width = shape
    coarse = torch.randint(0, 256, (1, channels, -(-height // 32), -(-width // 32)), generator=generator).float()
    patches = F.interpolate(coarse, size=(height, width))[0] * 0.7
    patches += 30 * torch.rand(channels, 1, 1, generator=generator)
    return (patches + 20 * torch.randn(shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def model_kind(net: Any) -> str:
    """Kind of a network: ``'backbone'``, ``'segmentor'``, ``'detector'``, ``'classifier'`` or ``'unknown'``."""
    if not hasattr(net, 'data_preprocessor'):
        return 'backbone'
    if hasattr(net, 'decode_head'):
        return 'segmentor'
    if hasattr(net, 'head'):
        return 'classifier'
    return 'detector' if hasattr(net, 'roi_head') or hasattr(net, 'bbox_head') else 'unknown'
