"""Load a trained checkpoint into a whole segmentor or detector, merged or not."""
from collections.abc import Mapping
from pathlib import Path

import torch.nn as nn
from mmengine.config import Config
from mmengine.logging import print_log

from replk_mm.checkpoints import TRAINING_ONLY, LoadReport, copy_weights, guess_cause, read, reparameterization_of
from replk_mm.data.class_checks import advice_of, trained_on
from replk_mm.data.classes import classes_of, listed, set_classes
from replk_mm.data.datasets import datasets_of
from replk_mm.errors import UserError
from replk_mm.key_formats import convert, unwrap
from replk_mm.reparam import reparameterize


def adopt_classes(cfg: Config, checkpoint: str | Path, trust: bool = False) -> list[str]:
    """Give a config the classes that a checkpoint was trained on, where it has others.

    Args:
        cfg: Changed in place.
        checkpoint: Path or address.
        trust: See :func:`replk_mm.checkpoints.read`.

    Returns:
        What was changed, a line each.
    """
    names = trained_on(read(checkpoint, trust).get('meta') or {})
    scope = cfg.get('default_scope', 'mmengine')
    if not names or all(list(classes_of(dataset, scope) or ()) == names for dataset in datasets_of(cfg, ('test',))):
        return []
    return [f'classes: the {len(names)} that {checkpoint} was trained on: {listed(names)}', *set_classes(cfg, names)]


def load_model(model: nn.Module, checkpoint: str | Path, trust: bool = False) -> tuple[LoadReport, dict]:
    """Set all weights that inference needs, of a whole segmentor or detector (or a bare backbone).

    A merged checkpoint brings ``model`` to its own structure first.

    Args:
        model: Built from the config; changed in place.
        checkpoint: Path or address.
        trust: See :func:`replk_mm.checkpoints.read`.

    Returns:
        The report, and the checkpoint's ``meta``.

    Raises:
        UserError: If the file cannot be read, or leaves a weight that inference uses unset.
    """
    loaded = read(checkpoint, trust)
    found = convert(unwrap(loaded, str(checkpoint)))
    whole = hasattr(model, 'backbone')
    weights = {f'backbone.{key}': value for key, value in found.backbone.items()} if whole else found.backbone
    weights = {**weights, **found.rest}
    how = reparameterization_of(loaded, weights)
    if how:
        reparameterize(model, **how, inplace=True)
    report = copy_weights(model, weights, parts=whole)
    report.missing = [key for key in report.missing
                      if not key.startswith(TRAINING_ONLY) and not key.endswith('num_batches_tracked')]
    # Heads that only train, and statistics of a classifier, may be more than the model has.
    surplus = [key for key in report.unexpected if not key.startswith(TRAINING_ONLY)]
    mismatched = [key for key, *_ in report.mismatched if not key.startswith(TRAINING_ONLY)]
    if report.missing or mismatched or surplus:
        raise UserError(f'{checkpoint}: does not fit this config: {report.summary()}\n{report.details()}\n'
                        f'{guess_cause(report, found, whole)}{advice_of(loaded.get("meta") or {})}')
    print_log(f'weights {checkpoint}: {found.describe()}{", folded" if how and how["fold"] else ""}; '
              f'{report.summary()}', logger='current')
    meta = loaded.get('meta')
    return report, dict(meta) if isinstance(meta, Mapping) else {}
