"""Load a trained checkpoint into a whole segmentor or detector, merged or not."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch.nn as nn
from mmengine.config import Config
from mmengine.logging import print_log

from replk_mm.checkpoints.io import fetch_checkpoint, hash_checkpoint, local_files, read_checkpoint, save_checkpoint
from replk_mm.checkpoints.key_formats import FOLDED, find_weights
from replk_mm.checkpoints.loading import (
    TRAINING_ONLY,
    LoadReport,
    copy_weights,
    get_reparameterization,
    guess_cause,
    weights_for_training,
)
from replk_mm.data.checks.classes import checkpoint_classes, classes_advice
from replk_mm.data.classes import classes_of, set_classes
from replk_mm.data.datasets import datasets_of
from replk_mm.deploy.artefact import is_artefact
from replk_mm.deploy.equivalence import compare_networks
from replk_mm.deploy.reparameterize import Changes, reparameterize
from replk_mm.engine.artefact_model import load_artefact
from replk_mm.engine.config import build_model, fit_to_machine
from replk_mm.errors import UserError, format_list
from replk_mm.files import GENERATOR, check_outputs
from replk_mm.logs import Note, announce, log_notes
from replk_mm.ops import prepack
from replk_mm.wrappers import input_channels


def adopt_classes(cfg: Config, checkpoint: str | Path) -> list[str]:
    """Set the classes of a config to those of a checkpoint.

    Args:
        cfg: Changed in place.
        checkpoint: Path or URL.

    Returns:
        One line per change.
    """
    names = checkpoint_classes(read_checkpoint(checkpoint).get('meta') or {})
    scope = cfg.get('default_scope', 'mmengine')
    if not names or all(list(classes_of(dataset, scope) or ()) == names for dataset in datasets_of(cfg, ('test',))):
        return []
    return [
        Note(f'classes: the {len(names)} that {checkpoint} was trained on: {format_list(names)}'),
        *set_classes(cfg, names),
    ]


def load_model(
    model: nn.Module, checkpoint: str | Path, training: bool = False, resize_kernels: str | None = None
) -> tuple[LoadReport, dict]:
    """Set the weights of a whole segmentor or detector (or a bare backbone).

    Inference needs every weight; for a merged checkpoint, ``model`` is merged first. Training needs the whole backbone
    and a part of the heads, as for other classes; a warning shows what keeps its initial values.

    Args:
        model: Built from the config; changed in place.
        checkpoint: Path or URL.
        training: Load for training. Defaults to False.
        resize_kernels: Fit depthwise kernels of another size, see
            :func:`~replk_mm.checkpoints.loading.resize_kernel`. By default they are an error.

    Returns:
        The report, and the checkpoint's ``meta``.

    Raises:
        UserError: If the file cannot be read, or lacks a needed weight.
    """
    loaded = read_checkpoint(checkpoint)
    whole = hasattr(model, 'backbone')
    backbone = getattr(model, 'backbone', model)
    found = find_weights(loaded, backbone, str(checkpoint))
    own = model.state_dict().keys()
    rest = {**found.rest, **{key: value for key, value in found.classifier.items() if key in own}}
    how = get_reparameterization(loaded, found.backbone)
    weights = weights_for_training(backbone, found, loaded, str(checkpoint)) if training else found.backbone
    weights = {f'backbone.{key}': value for key, value in weights.items()} if whole else weights
    if how and not training:
        # Files of earlier versions have norms that are folded now.
        norms = [key.rpartition('.')[0] for key in [*weights, *rest] if key.endswith('.running_var')]
        reparameterize(model, **how, inplace=True, keep=norms)
    report = copy_weights(model, {**weights, **rest}, whole, resize_kernels)
    optional = () if training else TRAINING_ONLY
    report.missing = [
        key
        for key in report.missing
        if not key.startswith(optional) and not key.endswith(('num_batches_tracked', FOLDED))
    ]
    # The file may have heads that only training uses.
    keys = [*report.missing, *report.unexpected, *(key for key, *_ in report.mismatched)]
    misfits = needed = [key for key in keys if not key.startswith(optional)]
    if training and (not own.isdisjoint(rest) or not whole and any('.backbone.' in key for key in own)):
        needed = [key for key in misfits if 'backbone' in key.split('.')]  # of a student and a teacher too
    if needed:
        stored = loaded.get('meta') or {}
        same = len(checkpoint_classes(stored)) in {getattr(module, 'num_classes', None) for module in model.modules()}
        raise UserError(
            f'{checkpoint}: does not fit this config: {report.summary()}\n{report.details()}\n'
            f'{guess_cause(report, found, whole)}{"" if same else classes_advice(stored)}'
        )
    text = f'{checkpoint}: {found.describe()}{", folded" if how and how["fold"] else ""}; {report.summary()}'
    if misfits:
        announce(
            f'warning: loaded in part, the rest keeps its initial values: {text}\n{report.details()}', logging.WARNING
        )
    else:
        print_log(f'weights {text}', logger='current')
    return report, loaded.get('meta') or {}


@dataclass(frozen=True)
class Inference:
    """A network in evaluation mode, and how it was built."""

    model: nn.Module  #: in evaluation mode, on its device
    meta: dict = field(default_factory=dict)  #: metadata of the checkpoint; empty for random weights
    #: number of weights that the checkpoint set, for each part; None for random weights and exported networks
    report: LoadReport | None = None
    changes: Changes | None = None  #: changes by reparameterization; None without it


def build_for_inference(
    cfg: Config,
    checkpoint: str | Path | None = None,
    *,
    device: str = 'cpu',
    reparam: bool = False,
    classes: bool = True,
    packed: bool = True,
    exported: bool = False,
) -> Inference:
    """Build the model of a config and load a trained checkpoint into it.

    Args:
        cfg: The config it was trained with; changed in place to fit the checkpoint's classes and this machine.
        checkpoint: Path or URL, merged or not; None keeps random weights.
        device: ``'cpu'`` or ``'cuda'``.
        reparam: Merge parallel kernels and fold BatchNorm.
        classes: Whether to use the classes of the checkpoint.
        exported: Whether ``checkpoint`` may be the folder of an exported network, whose layers do not exist here.
        packed: Keep the weights of convolutions in the form that CPUs compute with, see :func:`replk_mm.ops.prepack`.

    Raises:
        UserError: If the model cannot be built or the checkpoint does not fit.
    """
    if checkpoint and is_artefact(checkpoint) and not exported:
        raise UserError(f'{checkpoint}: is an exported network\nUse the checkpoint that it was exported from.')
    log_notes(adopt_classes(cfg, checkpoint) if checkpoint and classes else [])
    log_notes(fit_to_machine(cfg, None, device, 1))
    if 'backbone' in cfg.model:
        cfg.model.backbone.pop('init_cfg', None)  # the checkpoint sets every weight
    built = load_for_inference(build_model(cfg), checkpoint, reparam, cfg.get('resize_kernels'))
    built.model.to(device).eval()
    if packed:
        prepack(built.model)
    return built


def load_for_inference(
    model: nn.Module, checkpoint: str | Path | None, reparam: bool = False, resize_kernels: str | None = None
) -> Inference:
    """Load a checkpoint into a model, which changes in place; None keeps its weights.

    For the folder of an exported network, this becomes the network of the model.
    """
    if checkpoint and is_artefact(checkpoint):
        return Inference(model, load_artefact(model, checkpoint, reparam))
    report, meta = load_model(model, checkpoint, resize_kernels=resize_kernels) if checkpoint else (None, {})
    return Inference(model, meta, report, reparameterize(model, inplace=True)[1] if reparam else None)


def reparameterize_checkpoint(
    cfg: Config, checkpoint: str, out: str | Path, shape: tuple[int, int] = (64, 64), overwrite: bool = False
) -> tuple[Changes, list]:
    """Merge and fold a trained checkpoint, check that its outputs stay the same, and write it.

    Args:
        cfg: The config it was trained with.
        checkpoint: Path or URL. A merged checkpoint is written again unchanged.
        out: File to write. Nothing is written if the check fails.
        shape: Height and width of the random test image, in pixels.
        overwrite: Whether to replace a file at ``out`` that this function did not write. Defaults to False.

    Returns:
        The changes, and the differences of the outputs.

    Raises:
        UserError: If the checkpoint does not fit, the outputs differ beyond the tolerance, or ``out`` cannot be
            written.
    """
    check_outputs([out], inputs=local_files(checkpoint), overwrite=overwrite)
    built = build_for_inference(cfg, checkpoint, packed=False)
    model, meta = built.model, built.meta
    merged, changes = reparameterize(model)
    differences = compare_networks(model, merged, (1, input_channels(model), *shape))
    if not all(d.ok for d in differences):
        raise UserError(
            f'{checkpoint}: the outputs of the merged network differ; nothing was written\n'
            + '\n'.join(map(str, differences))
        )
    record = dict(
        merge=True,
        fold=True,
        source=str(checkpoint),
        source_sha256=hash_checkpoint(fetch_checkpoint(checkpoint)),
        differences=[dict(dtype=str(d.dtype), absolute=d.absolute, relative=d.relative) for d in differences],
    )
    plain = {key: value for key, value in meta.items() if isinstance(value, (str, int, float, bool, dict, list, tuple))}
    meta = {**GENERATOR, **plain, 'replk_mm': {'reparameterized': record}}
    if not any(key.endswith(FOLDED) for key in merged.state_dict()):
        announce('note: this model has no backbone of replk_mm: programs other than ours do not notice merged weights')
    save_checkpoint({'meta': meta, 'state_dict': merged.state_dict()}, out)
    return changes, differences
