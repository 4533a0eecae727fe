"""Checkpoints: read without running code in them, loaded from any known format, with a report of what matched."""

import io
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn as nn
from mmengine.logging import print_log
from torch import Tensor

from replk_mm.checkpoints import safe_load
from replk_mm.checkpoints.key_formats import Converted, convert, unwrap
from replk_mm.checkpoints.plain_data import plain
from replk_mm.errors import UserError
from replk_mm.files import write_atomic

#: Top-level modules that a segmentor or detector has for training only.
TRAINING_ONLY = ('auxiliary_head', 'data_preprocessor')
# Weights a backbone may lack in a pretrained file: the norms of dense prediction features start as the identity.
_OUTPUT_NORM = re.compile(r'(?:norm(\d)|stages\.(\d+)\.norm)\.')
# Last layers of mmseg's and mmdet's heads, with outputs for each class.
_CLASS_LAYER = re.compile(r'\.(conv_seg|fc_cls|retina_cls|conv_cls|conv_logits|atss_cls|gfl_cls)\.(weight|bias)$')
_SHOWN = 8


class DownloadError(UserError):
    """A checkpoint's address could not be reached."""


class NoCheckpoint(UserError, FileNotFoundError):
    """There is no such file; programs that use mmengine wait for Python's own kind of it."""


def fetch(checkpoint: str | Path, folder: str | Path | None = None, progress: bool = True) -> Path:
    """The local path of a checkpoint, downloaded if it is an address.

    Args:
        checkpoint: Path or address.
        folder: Of what is downloaded. Defaults to torch's cache.
        progress: Show how far a download is.

    Raises:
        DownloadError: If the address cannot be reached.
        NoCheckpoint: If the file does not exist.
    """
    name = str(checkpoint)
    if not name.startswith(('http://', 'https://')):
        path = Path(name)
        try:
            path = path.expanduser()
            if path.is_file():
                return path
            why = ' (it is a folder)' if path.is_dir() else ''
        except (OSError, RuntimeError) as error:  # too long a name, an unknown user
            why = f' ({error})'
        raise NoCheckpoint(f'{path}: no such checkpoint{why}')
    path = Path(folder or Path(torch.hub.get_dir()) / 'checkpoints') / name.rsplit('/', 1)[-1]
    try:
        if path.is_file():
            print_log(f'{name}: not downloaded; a file of that name is there already: {path}', logger='current')
            return path
        print_log(f'downloading {name}', logger='current')
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(name, str(path), progress=progress)
    except (OSError, ValueError, HTTPException) as error:
        raise DownloadError(
            f'{name:.200}: the checkpoint could not be downloaded ({error!s:.200})\n'
            f'Check the address, or download the file yourself and name its path.'
        ) from error
    return path


def read(checkpoint: str | Path, map_location: Any = 'cpu', trust: bool = False) -> dict:
    """Read a checkpoint without running what is in it.

    Args:
        checkpoint: Path or address, of a file of torch or a ``.safetensors`` file.
        map_location: Device of the tensors, as :func:`torch.load` takes it. Defaults to the CPU.
        trust: Unpickle anything, which lets the file run any program. Only ``tools/convert_checkpoint.py`` sets it.

    Raises:
        UserError: If the file does not exist, is damaged, asks for code to be run, or holds no dict.
    """
    path = fetch(checkpoint)
    loaded = safe_load.load(path, map_location, trust)
    if not isinstance(loaded, Mapping):
        raise UserError(f'{path}: not a checkpoint but a {type(loaded).__name__}; a dict of tensors is needed')
    return {**loaded, **({'meta': _checked_meta(loaded['meta'], path)} if 'meta' in loaded else {})}


def _checked_meta(meta: Any, path: Path) -> dict[str, Any]:
    """The record of a checkpoint, empty if it is no mapping; the fields that this package uses have their types.

    Raises:
        UserError: If one has another type.
    """
    meta = dict(meta) if isinstance(meta, Mapping) else {}
    wrong = next(
        (
            key
            for key in ('iter', 'epoch', 'seed')
            if not (meta.get(key) is None or isinstance(meta[key], int) and meta[key] >= 0)
        ),
        None,
    )
    try:
        dataset = {str(key).lower(): value for key, value in (meta.get('dataset_meta') or {}).items()}
        if not (_list_of(str, dataset.get('classes')) and _list_of((list, tuple), dataset.get('palette'))):
            wrong = 'dataset_meta'
    except AttributeError:
        wrong = 'dataset_meta'
    try:
        record = meta.get('replk_mm', {}).get('reparameterized')
        if record and not (isinstance(record['merge'], bool) and isinstance(record['fold'], bool)):
            wrong = 'replk_mm'
    except (AttributeError, LookupError, TypeError):
        wrong = 'replk_mm'
    if wrong:
        raise UserError(
            f'{path}: meta.{wrong} is not what training writes: {meta[wrong]!r:.80}\nTake the file from '
            f"its source, or keep its weights only: torch.save({{'state_dict': ...}}, FILE)."
        )
    return meta


def _list_of(kind: Any, value: Any) -> bool:
    return value is None or isinstance(value, (list, tuple)) and all(isinstance(item, kind) for item in value)


def register_safe_loaders() -> None:
    """Let mmengine's own loading in this process (``init_cfg`` of any package's backbone) read as :func:`read` does.

    mmengine 0.10.7 unpickles downloads with whatever code they hold, and with torch 2.6 and newer it cannot read the
    log buffers in checkpoints that it has written itself. For commands of our own: it changes mmengine for the process.
    """
    from mmengine.runner import checkpoint

    def load_from_local(filename: str, map_location: Any = None) -> dict:
        return read(filename, map_location or 'cpu')

    def load_from_http(
        filename: str, map_location: Any = None, model_dir: str | None = None, progress: bool = True
    ) -> dict:
        return read(fetch(filename, model_dir, progress), map_location or 'cpu')

    # Loaders of other addresses call these by name.
    checkpoint.load_from_local, checkpoint.load_from_http = load_from_local, load_from_http
    checkpoint.CheckpointLoader.register_scheme('', load_from_local, force=True)
    checkpoint.CheckpointLoader.register_scheme(('http://', 'https://'), load_from_http, force=True)


def keep_apart(source: str | Path, out: str | Path) -> None:
    """Refuse to write a checkpoint over the one it is made of.

    Raises:
        UserError: If both are one file.
    """
    if Path(out).resolve() == Path(source).resolve():
        raise UserError(f'{out}: is the input itself\nName another file to write.')


def save(checkpoint: dict, path: str | Path) -> None:
    """Write a checkpoint of tensors and plain data, so that ``path`` is the whole new file or what was there before.

    Args:
        checkpoint: Of a ``.safetensors`` file only ``state_dict`` and ``meta`` are written, ``meta`` into its header.
        path: The file; its folder is created if needed.

    Raises:
        UserError: If it cannot be written, or a ``.safetensors`` file would lack a part.
    """
    path, content = Path(path), plain(checkpoint)
    if path.suffix == '.safetensors':
        if more := content.keys() - {'state_dict', 'meta'}:
            raise UserError(
                f'{path}: a safetensors file holds weights only, no {", ".join(sorted(more))}\n'
                f'Name a file that ends in .pth.'
            )
        weights = {key: value.detach().clone().contiguous() for key, value in content['state_dict'].items()}
        data = safetensors.torch.save(weights, {'format': 'pt', safe_load.META: json.dumps(content.get('meta', {}))})
    else:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        data = buffer.getvalue()
    try:
        write_atomic(path, data)
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error})\nChoose another place, or make room there.') from error


@dataclass
class LoadReport:
    """What became of every weight of a model and of a checkpoint.

    Attributes:
        total: Weights of each top-level part of the model.
        matched: Of those, how many the checkpoint set.
        missing: The model's weights that the checkpoint lacks.
        unexpected: The checkpoint's weights that the model lacks.
        mismatched: Key, the model's shape, the checkpoint's shape.
    """

    total: dict[str, int] = field(default_factory=dict)
    matched: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple, tuple]] = field(default_factory=list)

    def summary(self) -> str:
        """``'backbone 1164/1164, decode_head 46/46'``."""
        return ', '.join(f'{part} {self.matched.get(part, 0)}/{total}' for part, total in self.total.items())

    def details(self) -> str:
        """The keys that did not match, a few of each kind."""
        shapes = [f'{key}: model {ours}, checkpoint {theirs}' for key, ours, theirs in self.mismatched]
        lines = []
        for title, items in (('missing', self.missing), ('unexpected', self.unexpected), ('shape differs', shapes)):
            if items:
                lines += [f'  {title}: {len(items)}', *(f'    {item}' for item in items[:_SHOWN])]
            if len(items) > _SHOWN:
                lines.append(f'    ... and {len(items) - _SHOWN} more')
        return '\n'.join(lines)


def copy_weights(model: nn.Module, weights: Mapping[str, Tensor], parts: bool) -> LoadReport:
    """Copy every weight whose name and shape fit; a linear layer's fits a 1x1 convolution's."""
    report = LoadReport()
    own = model.state_dict()
    with torch.no_grad():
        for key, target in own.items():
            part = key.split('.')[0] if parts else 'backbone'
            report.total[part] = report.total.get(part, 0) + 1
            source = weights.get(key)
            if source is None:
                report.missing.append(key)
            elif source.shape != target.shape and not (
                source.numel() == target.numel() and source.squeeze().shape == target.squeeze().shape
            ):
                report.mismatched.append((key, tuple(target.shape), tuple(source.shape)))
            else:
                target.copy_(source.reshape(target.shape))
                report.matched[part] = report.matched.get(part, 0) + 1
    report.unexpected = [key for key in weights if key not in own]
    return report


def load_pretrained(
    backbone: Any, checkpoint: str | Path, prefix: str | None = None, strict: bool = True, map_location: str = 'cpu'
) -> LoadReport:
    """Set a backbone's weights from a file of any known format (``init_cfg=dict(type='Pretrained', ...)``).

    Args:
        backbone: A backbone of this package.
        checkpoint: Path or address.
        prefix: What precedes the backbone's keys in the file. Defaults to finding out.
        strict: Raise unless every weight is set, output norms apart. Defaults to True.
        map_location: Accepted for mmengine's configs, without effect: weights are read on the CPU and copied.

    Raises:
        UserError: If the file cannot be read, or does not fit and ``strict``.
    """
    loaded = read(checkpoint)
    found = convert(unwrap(loaded, str(checkpoint)), prefix)
    weights = found.backbone
    if (reparameterization_of(loaded, ()) or {}).get('fold'):
        raise UserError(
            f'{checkpoint}: its BatchNorm is folded, for inference; training cannot start from it\n'
            f'Start from the checkpoint it was made of.'
        )
    if found.merged and any('.lkb_origin.' in key for key in backbone.state_dict()):
        weights = _unmerge(weights, backbone)
        print_log(
            f'{checkpoint}: merged weights in a network with parallel kernels: equal in evaluation, but in '
            f'training batch statistics replace the folded ones; norm_eval=True or small_kernel_merged=True '
            f'keeps them',
            logger='current',
            level=logging.WARNING,
        )
    report = copy_weights(backbone, weights, parts=False)
    report.missing = [
        key for key in report.missing if not key.endswith('num_batches_tracked') and not _OUTPUT_NORM.match(key)
    ]
    # Norms of stages that the backbone does not return are of no use to it.
    report.unexpected = [
        key
        for key in report.unexpected
        if not (norm := _OUTPUT_NORM.match(key)) or int(norm[1] or norm[2]) in backbone.out_indices
    ]
    print_log(f'pretrained weights {checkpoint}: {found.describe()}; {report.summary()}', logger='current')
    misfits = report.missing or report.mismatched or report.unexpected
    if misfits and (strict or not report.matched):
        raise UserError(
            f'{checkpoint}: does not fit {type(backbone).__name__}: {report.summary()}\n'
            f'{report.details()}\n{guess_cause(report, found, whole=False)}'
        )
    return report


def _unmerge(weights: dict[str, Tensor], backbone: Any) -> dict[str, Tensor]:
    """Give a merged RepLKNet its training form back: the large branch takes all, the small one starts at zero."""
    own, out = backbone.state_dict(), dict(weights)
    for merged in [key for key in weights if key.endswith('.lkb_reparam.weight')]:
        base = merged.removesuffix('.lkb_reparam.weight')
        large, small = f'{base}.lkb_origin', f'{base}.small_conv'
        if f'{large}.bn.weight' not in own:
            continue
        weight = out.pop(merged)
        zeros, ones = torch.zeros(len(weight)), torch.ones(len(weight))
        norm = {'weight': zeros, 'bias': zeros, 'running_mean': zeros, 'running_var': ones}
        out |= {f'{small}.bn.{name}': value for name, value in norm.items()}
        out[f'{small}.conv.weight'] = own.get(f'{small}.conv.weight', zeros)
        # The norm divides by sqrt(1 + eps); the scale undoes it.
        norm['weight'] = ones * (1 + backbone.get_submodule(f'{large}.bn').eps) ** 0.5
        norm['bias'] = out.pop(f'{base}.lkb_reparam.bias', zeros)
        out |= {f'{large}.conv.weight': weight, **{f'{large}.bn.{name}': value for name, value in norm.items()}}
    return {key: value for key, value in out.items() if '.small_conv.' not in key or key in own}


def reparameterization_of(checkpoint: Mapping, weights: Iterable[str]) -> dict | None:
    """How a checkpoint's network was merged, by its own record or, in the authors' merged form, by its key names.

    Returns:
        ``{'merge': bool, 'fold': bool}``, or None for a network in training form.
    """
    record = (checkpoint.get('meta') or {}).get('replk_mm', {}).get('reparameterized')
    if record:
        return {'merge': record['merge'], 'fold': record['fold']}
    return {'merge': True, 'fold': False} if any('.lkb_reparam.' in key for key in weights) else None


def guess_cause(report: LoadReport, found: Converted, whole: bool) -> str:
    """The likeliest reason why a checkpoint does not fit, as a sentence with a remedy."""
    mismatched = [item for item in report.mismatched if not item[0].startswith(TRAINING_ONLY)]
    in_backbone = [key for key, *_ in mismatched if not whole or key.startswith('backbone.')]
    classes = next((item for item in mismatched if _CLASS_LAYER.search(item[0])), None)
    if not report.matched.get('backbone') and not in_backbone:
        cause = f'another architecture ({found.describe()}). Check that config and checkpoint belong together.'
    elif whole and not found.rest:
        cause = (
            'the file holds a backbone only (ImageNet weights, for example), no trained head. Train with it as '
            'init_cfg first; test the checkpoint that training writes.'
        )
    elif classes and not in_backbone:
        key, ours, theirs = classes
        cause = (
            f'number of classes: {key} has {ours[0]} outputs in the config, {theirs[0]} in the checkpoint. '
            f"Set num_classes of every head to the checkpoint's."
        )
    else:
        cause = (
            'another size or other options of the same family. Compare arch, small_kernel_merged and '
            "norm_intermediate_features with the checkpoint's config."
        )
    return f'Likely cause: {cause}'
