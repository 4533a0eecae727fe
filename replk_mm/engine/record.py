"""The record of a test: metrics.json with scores, protocol and environment."""

import json
import math
import platform
import re
from pathlib import Path

import psutil
import torch
from mmengine.config import Config

from replk_mm import __version__
from replk_mm.checkpoints.io import fetch_checkpoint, hash_checkpoint
from replk_mm.data.datasets import datasets_of
from replk_mm.deploy.artefact import is_artefact, read_manifest
from replk_mm.engine.evaluate import Evaluation
from replk_mm.files import GENERATOR, sha256, write_output


def describe_protocol(cfg: Config, tta: bool) -> dict:
    """The test protocol: whole image or sliding window, pipeline, test-time augmentation."""
    model = cfg.model.get('module', cfg.model)  # wrapped for test-time augmentation
    found = dict(model.get('test_cfg') or {})
    found['pipeline'] = list(next(datasets_of(cfg, ('test',))).get('pipeline', []))
    found['tta'] = tta
    if tta:  # how it merges views
        found['tta_model'] = {key: value for key, value in cfg.model.items() if key != 'module'}
    return found


def environment_info() -> dict:
    """Versions and hardware."""
    import mmcv
    import mmengine
    import numpy

    found = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        mmengine=mmengine.__version__,
        mmcv=mmcv.__version__,
        numpy=numpy.__version__,
        replk_mm=__version__,
        system=platform.platform(),
        cpu=_cpu_name(),
        cores=psutil.cpu_count(),
        threads=torch.get_num_threads(),
    )
    if torch.cuda.is_available():
        found['gpu'] = torch.cuda.get_device_name()
    return found


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    found = re.search(r'^model name\s*: (.+)$', info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor()


def evaluation_record(
    cfg: Config, checkpoint: str, result: Evaluation, tta: bool, statistics: dict[str, dict[str, str]] | None = None
) -> dict:
    """The scores of a test with their conditions, as JSON data without NaN; ``statistics`` names its counts."""
    path = fetch_checkpoint(checkpoint)
    exported = read_manifest(checkpoint) if is_artefact(checkpoint) else None
    roots = dict.fromkeys(str(dataset.get('data_root')) for dataset in datasets_of(cfg, ('test',)))
    merged = result.meta.get('replk_mm', {}).get('reparameterized')
    return replace_non_finite(
        dict(
            metrics=result.metrics,
            per_class=result.per_class,
            absent_classes=result.absent,
            statistics=statistics or {},
            config=str(cfg.filename),
            backbone=cfg.get('catalogue'),
            checkpoint=dict(
                path=str(path), sha256=hash_checkpoint(path), iteration=result.meta.get('iter'), loaded=result.load
            ),
            reparameterized=str(result.changes) if result.changes else ('in the checkpoint' if merged else None),
            **({'artefact': {'format': exported.format, 'precision': exported.precision}} if exported else {}),
            protocol=describe_protocol(cfg, tta),
            data=dict(root=', '.join(roots), images=result.images),
            seconds=round(result.seconds, 3),
            environment=environment_info(),
        )
    )


def replace_non_finite(node):
    """Replace NaN and infinity by None in nested data, and other objects by text."""
    if isinstance(node, dict):
        return {str(key): replace_non_finite(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [replace_non_finite(value) for value in node]
    if isinstance(node, bool) or node is None or isinstance(node, (str, int)):
        return node
    try:
        number = float(node)
    except (TypeError, ValueError):
        return str(node)
    return number if math.isfinite(number) else None


def write_statistics(result: Evaluation, folder: Path) -> dict[str, dict[str, str]]:
    """Write the per-image counts of a test: of the first score to ``statistics.npz``.

    Returns:
        Name and SHA-256 of the file of each score.

    Raises:
        UserError: If a file cannot be written.
    """
    written = {}
    for i, (name, scores) in enumerate(result.statistics.items()):
        path = folder / (f'statistics_{name.replace("/", "_")}.npz' if i else 'statistics.npz')
        scores.save(path)
        written[name] = dict(file=path.name, sha256=sha256(path))
    return written


def write_record(found: dict, path: Path) -> None:
    """Write a record as JSON.

    Raises:
        UserError: If it cannot be written.
    """
    write_output(path, json.dumps({**GENERATOR, **found}, indent=2, allow_nan=False) + '\n')
