"""The batch at which a training stopped, kept in a file and run again."""
import math
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config

from replk_mm import checkpoints
from replk_mm.data.classes import classes_of, set_classes, use_classes
from replk_mm.data.datasets import datasets_of
from replk_mm.engine import batches
from replk_mm.engine.config import build_model, fit_to_machine
from replk_mm.engine.diagnosis import Finding, Values, examine
from replk_mm.engine.machine import Options, select_device
from replk_mm.errors import UserError
from replk_mm.visualize import draw_instances, overlay

#: Layers before the first non-finite one that a report shows.
_SHOWN = 12
#: Colour of pixels that are not finite, BGR: in no photograph.
_MAGENTA = (255, 0, 255)
_DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}


def file_of(model: nn.Module, batch: Any, finding: Finding | None, seed: tuple[int, int, int],
            context: Callable[[], AbstractContextManager], cfg: Config, metainfo: dict) -> dict:
    """What a replay needs, as data that loads without running code.

    Args:
        model: Its weights are kept.
        batch: As the data loader gave it.
        finding: Of the passes in the training, None if there were none.
        seed: Of the run, iteration and rank.
        context: What the forward pass ran in.
        cfg: The run's config; the settings of its model are kept to be compared with.
        metainfo: The data set's.
    """
    device = next(model.parameters()).device.type
    with context():
        autocast = str(torch.get_autocast_dtype(device)).removeprefix('torch.') if torch.is_autocast_enabled(device) else ''
    return dict(
        replay=1, seed=list(seed), autocast=autocast, batch=batches.pack(batch),
        images=finding.images if finding else batches.image_paths(batch), losses=finding.losses if finding else {},
        first=finding.describe() if finding else '', settings=dict(_settings(cfg.get('model') or {}, 'model')),
        state_dict={key: value.detach().cpu() for key, value in model.state_dict().items()},
        classes=[str(name) for name in metainfo.get('classes') or ()],
        palette=[[int(level) for level in colour] for colour in metainfo.get('palette') or ()],
        made_by=f'torch {torch.__version__}, {platform.machine()}, {device}, {torch.get_num_threads()} threads')


def _settings(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _settings(value, f'{path}.{key}')
    elif isinstance(node, (list, tuple)) and any(isinstance(value, dict) for value in node):
        for i, value in enumerate(node):
            yield from _settings(value, f'{path}[{i}]')
    else:
        yield path, str(list(node) if isinstance(node, (list, tuple)) else node)


@dataclass
class Replay:
    """A batch that was run again.

    Attributes:
        finding: What came of it.
        stored: What the file says of the training.
        path: The file.
        pictures: Folder of the batch's pictures, None if there was nothing to draw or no place for it.
        changed: Settings of the model that are not as they were.
    """

    finding: Finding
    stored: dict
    path: Path
    pictures: Path | None
    changed: list[str]

    @property
    def status(self) -> int:
        """Exit status: 0 if loss and gradients are finite now, 1 if not."""
        return 0 if self.finding.finite else 1

    def __str__(self) -> str:
        seed, iteration, rank = self.stored['seed']
        then, now = self.stored['losses'], self.finding.losses
        lines = [f'{self.path}: iteration {iteration + 1}, rank {rank}, seed {seed}, {self.stored["autocast"] or "no"} '
                 f'autocast, written with {self.stored["made_by"]}',
                 f'images: {", ".join(self.finding.images)}',
                 *(f'changed since: {change}' for change in self.changed),
                 f'{"":32} {"then":>14} {"now":>14}',
                 *(f'{name:32} {then.get(name, math.nan):14.8g} {now.get(name, math.nan):14.8g}'
                   for name in {**then, **now})]
        if self.finding.gradients:
            lines.append(f'parameters whose gradients are not finite: {len(self.finding.gradients)}')
        if not self.finding.finite:
            lines += [f'first non-finite: {self.finding.describe()}', *self._table()]
        if self.pictures:
            lines.append(f'pictures of the batch, what is not finite in magenta: {self.pictures}')
        return '\n'.join([*lines, 'finite now' if self.finding.finite else 'not finite again'])

    def _table(self) -> Iterator[str]:
        """The values around the first non-finite ones."""
        values = self.finding.values
        first = self.finding.first
        at = next((i for i, value in enumerate(values) if value is first), len(values) - 1)
        yield f'  {"largest |value|":>15} {"nan":>8} {"inf":>8}  shape'
        for value in values[max(0, at - _SHOWN):at + 2]:
            yield _row(value)


def _row(value: Values) -> str:
    shape = 'x'.join(map(str, value.shape)) or 'scalar'
    return f'  {value.largest:15.6g} {value.nan or "":>8} {value.inf or "":>8}  {shape:18} {value.place}'


def read(path: str | Path) -> dict:
    """What :func:`file_of` made.

    Raises:
        UserError: If the file is damaged, has code in it, or is something else.
    """
    try:
        stored = checkpoints.read(path)
    except UserError as error:
        first = str(error).splitlines()[0]
        if ': refused: ' not in first:
            raise
        raise UserError(f'{first}\nA training writes replay files without code; this one is not from there.') from error
    if not _well_formed(stored):
        raise UserError(f'{path}: not a replay file, or a damaged one (it has: {", ".join(map(str, list(stored)[:8]))})\n'
                        f'A training that stops at a value that is not finite writes nonfinite_iter_N.pth to its work dir.')
    return stored


def _well_formed(stored: dict) -> bool:
    parts: dict[str, tuple[Any, type]] = dict(
        seed=(list, int), images=(list, str), losses=(dict, float), settings=(dict, str), state_dict=(dict, torch.Tensor),
        classes=(list, str), palette=(list, list))
    for name, (kind, of) in parts.items():
        part: Any = stored.get(name)
        if not isinstance(part, kind) or not all(isinstance(v, of) for v in (list(part.values()) if kind is dict else part)):
            return False
    colours = [level for colour in stored['palette'] for level in (*colour, *[None] * (len(colour) != 3))]
    return (stored.get('replay') == 1 and len(stored['seed']) == 3 and min(stored['seed']) >= 0 and 'batch' in stored
            and all(isinstance(level, int) and 0 <= level <= 255 for level in colours)
            and all(isinstance(stored.get(name), str) for name in ('autocast', 'made_by', 'first')))


def replay(cfg: Config, path: str | Path, options: Options) -> Replay:
    """Run the batch of a replay file on the config's model with the file's weights and seeds.

    No data set is needed. The batch is drawn as PNGs into a folder beside the file.

    Args:
        cfg: The config of the run, or one with something changed.
        path: ``nonfinite_iter_N.pth`` of a work dir.
        options: ``device``, ``classes`` and ``amp`` are used; without ``amp`` the precision is the file's.

    Raises:
        UserError: If the file cannot be used, or its weights do not fit the config.
    """
    stored = read(path)
    where = select_device(options.device)
    scope = cfg.get('default_scope', 'mmengine')
    if options.classes is not None:
        use_classes(cfg, options.classes, ('train',))
    elif stored['classes'] and any(list(classes_of(dataset, scope) or ()) != stored['classes']
                                   for dataset in datasets_of(cfg, ('train',))):
        set_classes(cfg, stored['classes'])
    fit_to_machine(cfg, options.amp, where, 1)
    if 'backbone' in cfg.model:
        cfg.model.backbone.pop('init_cfg', None)  # every weight comes from the file
    model = build_model(cfg)
    _load(model, stored, path)
    try:
        batch = batches.unpack(stored['batch'])
    except batches.BadPackage as error:
        raise UserError(f'{path}: its batch cannot be rebuilt: {error}\n'
                        f'The file is damaged, or was not written by a training.') from error
    seed, iteration, rank = stored['seed']
    kind = {'bf16': 'bfloat16', 'fp16': 'float16'}.get(options.amp or '', stored['autocast'])
    context = partial(torch.autocast, where, _DTYPES[kind]) if kind in _DTYPES else nullcontext
    finding = examine(model.to(where).train(), batch, (seed, iteration, rank), context)
    settings = dict(_settings(cfg.model, 'model'))
    changed = [f'{key}: {stored["settings"].get(key, "nothing")} -> {settings.get(key, "nothing")}'
               for key in {**stored['settings'], **settings} if stored['settings'].get(key) != settings.get(key)]
    return Replay(finding, stored, Path(path), _draw(batch, stored, Path(path)), changed)


def _load(model: nn.Module, stored: dict, path: str | Path) -> None:
    report = checkpoints.copy_weights(model, stored['state_dict'], parts=True)
    if report.missing or report.unexpected or report.mismatched:
        raise UserError(f'{path}: does not fit this config: {report.summary()}\n{report.details()}\n'
                        f'Replay with the config and the --cfg-options of the run that wrote it.')


def _draw(batch: Any, stored: dict, path: Path) -> Path | None:
    """Pictures of a batch with what it is labelled with, into a folder beside the file."""
    images = batch.get('inputs') if isinstance(batch, dict) else None
    samples = batches.samples_in(batch)
    if not isinstance(images, (list, torch.Tensor)) or len(images) != len(samples):
        return None
    palette, classes = stored['palette'], stored['classes']
    most = 1 + max([len(classes), *(int(s.gt_instances.labels.max()) + 1 for s in samples
                                    if 'gt_instances' in s and len(s.gt_instances))])
    classes = [*classes, *(f'class {i}' for i in range(len(classes), most))]
    if len(palette) < most:
        palette = np.random.default_rng(0).integers(0, 255, (256, 3)).tolist()
    folder = path.with_suffix('')
    names = [f'{i}_{Path(str(sample.get("img_path") or "image")).stem}.png' for i, sample in enumerate(samples)]
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return None
    drawn = [cv2.imwrite(str(folder / name), _picture(image, sample, classes, palette))
             for name, image, sample in zip(names, images, samples, strict=True)]
    return folder if all(drawn) else None


def _picture(image: torch.Tensor, sample: Any, classes: list[str], palette: list) -> np.ndarray:
    pixels = image.permute(1, 2, 0).float().numpy()
    pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, -1)
    broken = ~np.isfinite(pixels).all(-1)
    sound = pixels[~broken]
    # Pipelines hand on levels of 0..255, or have normalized them.
    low, high = (sound.min(), sound.max()) if sound.size and sound.max() <= 10 and image.is_floating_point() else (0., 255.)
    scaled = np.nan_to_num((pixels - low) / max(high - low, 1e-6) * 255, nan=0, posinf=255, neginf=0)
    picture = np.ascontiguousarray(scaled.clip(0, 255).astype(np.uint8))
    if 'gt_sem_seg' in sample:
        picture = overlay(picture, sample.gt_sem_seg.data[0].numpy().astype(np.int64), palette)
    if 'gt_instances' in sample:
        things = sample.gt_instances
        boxes = getattr(things.bboxes, 'tensor', things.bboxes).tolist() if 'bboxes' in things else []
        masks = things.masks.to_ndarray().astype(bool) if 'masks' in things else [None] * len(boxes)
        objects = [dict(label=int(label), box=box, **({} if mask is None else dict(mask=mask)))
                   for label, box, mask in zip(things.labels, boxes, masks, strict=True) if all(map(math.isfinite, box))]
        picture = draw_instances(picture, objects, classes, palette)
    picture[broken] = _MAGENTA
    return picture
