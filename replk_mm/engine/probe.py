"""Linear probe: train BatchNorm and a 1x1 convolution on the frozen features of a backbone.

The backbone sees each training image once, in evaluation mode and with the transforms of the test. Its features are
cached, so that an epoch takes a fraction of a second. The learning rate is chosen on a part of the training images, and
the result is the layer after the last epoch. The test images are not used.
"""

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import safetensors.torch
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Subset

from replk_mm import __version__
from replk_mm.backbones.catalogue import measure_features
from replk_mm.checkpoints.io import save_checkpoint
from replk_mm.data.checks.classes import check_heads
from replk_mm.data.datasets import as_list, datasets_of, task_of
from replk_mm.data.subsets import split_hold_out, use_subset
from replk_mm.data.transforms import check_loading
from replk_mm.engine.backbone import backbone_notes
from replk_mm.engine.config import build_model, fit_to_machine
from replk_mm.engine.config_errors import explain_build_errors
from replk_mm.engine.inference import load_model
from replk_mm.engine.prepare import head_class_counts, prepare_data, weights_to_start_from
from replk_mm.engine.process import RunOptions, prepare_work_dir, select_device
from replk_mm.engine.stopping import ignore_signals_in_workers
from replk_mm.errors import UserError
from replk_mm.files import GENERATOR, check_outputs, sha256, write_atomic, write_output
from replk_mm.heads.linear import LinearHead, cell_cross_entropy, count_labels
from replk_mm.logs import announce, log_notes, show_progress
from replk_mm.ops import prepack
from replk_mm.text import format_duration

#: Files in the work directory: config, checkpoint, and :attr:`ProbeResult.record`.
OUTPUTS = ('linear.py', 'linear.pth', 'probe.json')
_WEIGHT_DECAY = 1e-4
_GIB = 2**30
#: Names of files of features. Others in the folder, such as weights, are not ours to remove.
_CACHED = f'{"[0-9a-f]" * 32}.safetensors'
_ONLY_FOR_TRAINING = ('train_cfg', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr')

#: Features ``(channels, cells)`` of an image, and pixels of each class, ``(cells, classes)``.
Cells = tuple[Tensor, Tensor]
Reader = Callable[[Sequence[int]], Iterator[Cells]]


@dataclass(frozen=True)
class ProbeSettings:
    """How to train a linear probe."""

    learning_rates: Sequence[float] = (1e-3, 3e-3, 1e-2, 3e-2)  #: of AdamW; each is tried, unless there is only one
    epochs: int = 50  #: of each training
    batch_size: int = 8  #: images in a step
    seed: int = 0  #: of random weights, the hold-out and the order of images
    cache: Path | None = Path('work_dirs/features')  #: folder of the features; None computes them in every epoch
    max_cache: float = 20.0  #: largest size of the folder, GiB
    clear_cache: bool = False  #: first remove all features from the folder


@dataclass(frozen=True)
class ProbeResult:
    """A trained linear probe."""

    config: Path  #: for ``tools/test.py``
    checkpoint: Path
    record: dict[str, Any]  #: learning rate, mIoU of the hold-out by rate, settings, times


def use_linear_head(cfg: Config, features: str = 'all') -> None:
    """Replace neck and heads of a segmentor, which then takes whole images; arguments as of :func:`prepare_probe`."""
    model, heads = cfg.model, as_list(cfg.model.get('decode_head'))
    if task_of(cfg) != 'segmentation' or not heads or 'backbone' not in model:
        raise UserError(f'{cfg.filename}: a linear probe needs a segmentor with backbone and decode_head')
    if model.backbone.type in ('replk_mm.TimmBackbone', 'replk_mm.HFBackbone'):
        model.backbone.rescale = False  # its layers are not pretrained
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    channels = [info['num_chs'] for info in measure_features(model.backbone)]
    indices = [*range(len(channels))][-1 if features == 'last' else 0 :]
    for part in ('neck', 'auxiliary_head'):
        model.pop(part, None)
    model.type, model.test_cfg = 'replk_mm.EncoderDecoder', dict(mode='whole')
    model.decode_head = dict(
        type='replk_mm.LinearHead',
        in_channels=[channels[i] for i in indices],
        in_index=indices,
        num_classes=heads[-1].num_classes,
        ignore_index=heads[-1].get('ignore_index', 255),
    )


def prepare_probe(cfg: Config, options: RunOptions, features: str = 'all') -> list[str]:
    """Prepare a config for :func:`probe`: linear head, options, data, machine, weights.

    Args:
        cfg: Changed in place.
        options: Iterations, precision and launcher are not used.
        features: ``'all'`` feature maps of the backbone, or the ``'last'`` one. Defaults to ``'all'``.

    Returns:
        One line per change or check.

    Raises:
        UserError: If the config has no segmentor, or its data, classes, weights or work directory cannot be used.
    """
    device = select_device(options.device)
    cfg.launcher = 'none'
    cfg.work_dir = options.work_dir or f'{cfg.get("work_dir") or f"work_dirs/{Path(cfg.filename).stem}"}-linear'
    notes = backbone_notes(cfg) + weights_to_start_from(cfg, options)
    use_linear_head(cfg, features)
    notes += prepare_data(cfg, options, ('train', 'test'))
    if options.fraction != 100:
        notes += use_subset(cfg, options.fraction, options.seed or 0)
    for key in _ONLY_FOR_TRAINING:
        cfg.pop(key, None)
    notes += fit_to_machine(cfg, None, device, 1)
    model = build_model(cfg, 'meta')
    check_heads(cfg, head_class_counts(model), ('train', 'test'))
    folder = prepare_work_dir(cfg.work_dir, needed=4 * sum(p.numel() for p in model.parameters()))
    check_outputs([folder / name for name in OUTPUTS], overwrite=options.overwrite)
    return notes


def probe(cfg: Config, notes: list[str], settings: ProbeSettings, device: str = 'cpu') -> ProbeResult:
    """Train a linear probe. After an interruption, the same call continues with the features in the cache.

    Args:
        cfg: From :func:`prepare_probe`; changed in place.
        notes: Lines for the log.
        settings: How to train.
        device: ``'cpu'`` or ``'cuda'``. Defaults to ``'cpu'``.

    Raises:
        UserError: If data cannot be read, features do not fit the cache, or there are too few images.
    """
    log_notes(notes)
    torch.manual_seed(settings.seed)  # of random weights
    model: Any = build_model(cfg)
    model.init_weights()
    if cfg.get('load_from'):
        load_model(model, cfg.load_from, training=True, resize_kernels=cfg.get('resize_kernels'))
    for key in ('init_cfg', 'pretrained'):  # the checkpoint will set every weight
        cfg.model.backbone.pop(key, None)
    prepack(model.to(device).eval())
    dataset = _training_images(cfg)
    count, rates = len(dataset), list(settings.learning_rates)
    if min(rates, default=0) <= 0:
        raise UserError(f'--learning-rates {rates}: a rate is not positive')
    read: Reader = partial(_extract, model, dataset, cfg.train_dataloader.get('num_workers', 0))
    seconds = None
    if settings.cache:
        paths = _cache_paths(cfg, model, dataset, settings.cache)
        seconds = _fill_cache(paths, read, settings)
        read = _cache_reader(paths)
    fit = partial(_fit, model.decode_head, read, settings, device)
    scores: dict[float, float] = {}
    if len(rates) > 1:
        present = np.stack([(labels.sum(0) > 0).numpy() for _, labels in read(range(count))])
        tried, held = (part.tolist() for part in split_hold_out(present, settings.seed))
        held = [i for i in held if present[i].any()]
        if not tried or not held:
            raise UserError(f'--learning-rates: {count} training images are too few to choose a rate\nGive only one.')
        scores = dict(zip(rates, _mean_iou(fit(tried, rates)[0], read(held), device), strict=True))
        rates = [max(rates, key=lambda rate: scores[rate])]
        listed = ', '.join(f'{rate:g}: {score:.2f}' for rate, score in scores.items())
        announce(f'learning rate: {rates[0]:g}, by the mIoU of {len(held)} of {count} training images ({listed})')
        if rates[0] in (min(scores), max(scores)):
            announce('note: the best rate is the first or last one; try further ones with --learning-rates')
    trained, epoch = fit(range(count), rates)
    times = f', {seconds * count / epoch:.0f} times as fast as computing the features' if seconds else ''
    announce(f'trained: {settings.epochs} epochs of {count} images, {format_duration(epoch)} each{times}')
    model.decode_head.bn.load_state_dict(trained.bn.state_dict())
    model.decode_head.conv_seg.load_state_dict(trained.convs[0].state_dict())
    record = dict(
        learning_rate=rates[0],
        holdout_miou={f'{rate:g}': score for rate, score in scores.items()},
        **{key: getattr(settings, key) for key in ('epochs', 'batch_size', 'seed')},
        images=count,
        seconds_per_epoch=epoch,
        seconds_per_image=seconds,
    )
    cfg.pop('train_dataloader')
    cfg.load_from = None
    config, checkpoint, summary = (Path(cfg.work_dir, name) for name in OUTPUTS)
    meta = {**GENERATOR, 'dataset_meta': dict(dataset.metainfo), 'seed': settings.seed, 'linear_probe': record}
    save_checkpoint({'meta': meta, 'state_dict': model.state_dict()}, checkpoint)
    write_output(config, f'# generator: replk_mm\n{cfg.pretty_text}')
    write_output(summary, json.dumps({**GENERATOR, **record}, indent=2) + '\n')
    return ProbeResult(config, checkpoint, record)


def _training_images(cfg: Config) -> Any:
    """The training data with the transforms of the test."""
    pipeline = next(datasets_of(cfg, ('test',))).get('pipeline') or []
    if not any(str(step.get('type')).endswith('LoadAnnotations') for step in pipeline):
        raise UserError(f'{cfg.filename}: test_dataloader.dataset.pipeline loads no labels\nAdd LoadAnnotations.')
    for leaf in datasets_of(cfg, ('train',)):
        leaf.pipeline = copy.deepcopy(pipeline)
    config = cfg.train_dataloader.dataset
    while 'dataset' in config:  # repetitions of an image would be held out and trained on
        config = config.dataset
    with explain_build_errors(cfg, 'train_dataloader'):
        dataset = DATASETS.build(config)
    check_loading(dataset, cfg.model.decode_head.num_classes)
    return dataset


def _extract(model: Any, dataset: Any, workers: int, indices: Sequence[int]) -> Iterator[Cells]:
    """Compute the features of images, one by one, since they may differ in size."""
    model.eval()
    head: LinearHead = model.decode_head
    loader: DataLoader = DataLoader(Subset(dataset, indices), collate_fn=pseudo_collate, num_workers=workers)
    for data in ignore_signals_in_workers(loader):
        sample = data['data_samples'][0]
        labels, shape = sample.gt_sem_seg.data[0], sample.img_shape
        with torch.no_grad():
            images = model.data_preprocessor(data, False)['inputs']
            features = head.gather(model.extract_feat(images)).float().cpu()
        if not features.isfinite().all():
            raise UserError(f'{sample.img_path}: its features are not finite\nCheck the weights of the backbone.')
        # The preprocessor may pad images at their right and bottom; labels may have another size than images.
        sizes = zip(labels.shape, images.shape[2:], shape, strict=True)
        rows, columns = (round(n * padded / size) - n for n, padded, size in sizes)
        labels = pad(labels, (0, columns, 0, rows), value=head.ignore_index)
        counts = count_labels(labels, features.shape[2:], head.num_classes, head.ignore_index)
        yield features[0].flatten(1).contiguous(), counts


def _cache_paths(cfg: Config, model: Any, dataset: Any, folder: Path) -> list[Path]:
    """The file of each image, named by a hash of all that its features depend on."""
    weights = hashlib.sha256()
    for key, value in model.backbone.state_dict().items():
        weights.update(key.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    device, pipeline = next(model.parameters()).device.type, next(datasets_of(cfg, ('train',))).pipeline
    common = f'{__version__} {torch.__version__} {device} {weights.hexdigest()} {cfg.model} {pipeline}'
    names = []
    for info in map(dataset.get_data_info, range(len(dataset))):
        files = [sha256(info[key]) for key in ('img_path', 'seg_map_path')]
        text = f'{common} {files} {info.get("label_map")} {info.get("reduce_zero_label")}'
        names.append(f'{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors')
    return [folder / name for name in names]


def _fill_cache(paths: Sequence[Path], read: Reader, settings: ProbeSettings) -> float | None:
    """Compute and write the features that are not in the cache; returns the seconds of an image."""
    folder = prepare_work_dir(paths[0].parent, option='--cache')
    for path in folder.glob(_CACHED) if settings.clear_cache else ():
        path.unlink()
    used = sum(path.stat().st_size for path in folder.glob(_CACHED))
    missing = [index for path, index in {path: i for i, path in enumerate(paths)}.items() if not path.is_file()]
    if not missing:
        announce(f'features: all {len(paths)} images are in {folder}')
        return None
    start, written = time.perf_counter(), 0
    cells = show_progress(read(missing), 'features', len(missing))
    for done, (index, found) in enumerate(zip(missing, cells, strict=True), 1):
        data = safetensors.torch.save(dict(zip(('features', 'labels'), found, strict=True)))
        needed, free = round((written + len(data)) / done * len(missing)), shutil.disk_usage(folder).free + written
        sizes = f'{needed / _GIB:.3g} GiB for {len(missing)} images in {folder}; {used / _GIB:.3g} of '
        sizes += f'{settings.max_cache:g} GiB are used, and {free / _GIB:.3g} GiB of the disk are free'
        if used + needed > settings.max_cache * _GIB or needed > free - _GIB:  # keep 1 GiB free
            advice = 'Use --max-cache GIB, another --cache DIR, --clear-cache, --features last or --no-cache.'
            raise UserError(f'features: too large for the cache: {sizes}\n{advice}')
        if done == 1:
            announce(f'features: about {sizes}')
        write_atomic(paths[index], data)
        written += len(data)
    seconds = time.perf_counter() - start
    announce(f'features: {written / _GIB:.3g} GiB written in {format_duration(seconds)}')
    return seconds / len(missing)


def _cache_reader(paths: Sequence[Path]) -> Reader:
    """Read features from memory if they take less than half of what is free, else from mapped files."""
    load = partial(map, _load)
    if sum(path.stat().st_size for path in paths) > psutil.virtual_memory().available / 2:
        return lambda indices: load(paths[i] for i in indices)
    kept = [(features.clone(), labels.clone()) for features, labels in load(paths)]
    return lambda indices: (kept[i] for i in indices)


def _load(path: Path) -> Cells:
    try:
        found = safetensors.torch.load_file(path)  # memory-mapped
        return found['features'], found['labels']
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f'{path}: not readable ({error})\nRemove it, or all features with --clear-cache.') from error


class _Layers(nn.Module):
    """Linear layers that share the BatchNorm, one for each learning rate."""

    def __init__(self, head: LinearHead, count: int) -> None:
        super().__init__()
        self.bn = copy.deepcopy(head.bn)
        self.convs = nn.ModuleList(copy.deepcopy(head.conv_seg) for _ in range(count))

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(layers, classes, cells)`` for features ``(channels, cells)``; one product for all layers."""
        x = self.bn(features[None, :, :, None])[0, :, :, 0]
        convs: Any = self.convs
        weight = torch.cat([conv.weight[:, :, 0, 0] for conv in convs])
        bias = torch.cat([conv.bias for conv in convs])
        return torch.addmm(bias[:, None], weight, x).unflatten(0, (len(convs), -1))


def _fit(
    head: LinearHead, read: Reader, settings: ProbeSettings, device: str, images: Sequence[int], rates: Sequence[float]
) -> tuple[_Layers, float]:
    """Train one layer for each learning rate on the same batches; returns them and the seconds of an epoch."""
    layers = _Layers(head, len(rates)).to(device).train()
    groups = [dict(params=list(conv.parameters()), lr=rate) for conv, rate in zip(layers.convs, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=_WEIGHT_DECAY)
    steps = -(-len(images) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * steps)
    generator = torch.Generator().manual_seed(settings.seed)
    start = time.perf_counter()
    for _ in show_progress(range(settings.epochs), f'epochs, {len(rates)} learning rates', settings.epochs):
        order = torch.randperm(len(images), generator=generator)
        cells = read([images[i] for i in order])
        for batch in order.tensor_split(steps):  # of equal sizes, but for one image
            features, counts = zip(*(next(cells) for _ in batch), strict=True)
            logits = layers(torch.cat(features, 1).to(device))
            labels = torch.cat(counts).to(device).t()
            optimizer.zero_grad()
            cell_cross_entropy(logits, labels).sum().backward()
            optimizer.step()
            schedule.step()
    return layers.eval(), (time.perf_counter() - start) / settings.epochs


@torch.no_grad()
def _mean_iou(layers: _Layers, cells: Iterable[Cells], device: str) -> list[float]:
    """mIoU in percent of each layer over the classes in the labels, if all pixels of a cell are predicted alike."""
    confusion: Any = 0
    for features, labels in cells:
        counts = labels.double()
        empty = counts.new_zeros(counts.shape[1], counts.shape[1])
        predicted = layers(features.to(device)).argmax(1).cpu()
        confusion += torch.stack([empty.index_add(0, rows, counts) for rows in predicted])
    overlap, truth = confusion.diagonal(dim1=1, dim2=2), confusion.sum(1)
    iou = (overlap / (confusion.sum(2) + truth - overlap))[:, truth[0] > 0]
    return (100 * iou.mean(1)).tolist()
