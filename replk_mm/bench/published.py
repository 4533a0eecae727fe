"""Published results: what the papers and their repositories report, quoted, row by row.

The rows live in ``published.yaml``; nothing in it was measured by this project.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).with_name('published.yaml')

#: The metrics a row may state, in the order in which a table shows them.
METRICS = ('miou_ss', 'miou_ms', 'ap_box', 'ap_mask')


@dataclass(frozen=True)
class Result:
    """One published row: a backbone, what it was trained on, and what it reached.

    Args:
        task: ``'segmentation'`` or ``'detection'``.
        backbone: the paper's name, such as ``'RepLKNet-31B'``.
        pretraining: what the backbone was pretrained on.
        dataset: what the whole model was trained and evaluated on.
        method: ``'UperNet'``, ``'Cascade Mask R-CNN'`` ...
        schedule: length of the training, in words.
        crop: side of the square training crop in pixels; None for detection.
        metrics: percent, by name (:data:`METRICS`); a metric the source does not state is absent.
        params_m: parameters of the whole model, millions.
        flops_g: billions of multiply-accumulates at ``input``.
        input: height and width in pixels.
        source: paper and repository.
        recipe: name in ``table('recipes')``.
        variant: which of the recipe's variants; None where it has one only.
        config: name of the config file that follows the recipe; None where there is none.
    """

    task: str
    backbone: str
    pretraining: str
    dataset: str
    method: str
    schedule: str
    crop: int | None
    metrics: Mapping[str, float]
    params_m: float
    flops_g: float
    input: tuple[int, int]
    source: str
    recipe: str
    variant: str | None
    config: str | None

    @property
    def family(self) -> str:
        """Name of the backbone without its size: ``'RepLKNet'`` or ``'ConvNeXt'``."""
        return self.backbone.split('-')[0]


@lru_cache(maxsize=1)
def _tables() -> dict[str, Any]:
    return yaml.safe_load(DATA.read_text(encoding='utf-8'))


def table(name: str) -> Any:
    """A table of ``published.yaml``: ``'kernel_size_study'``, ``'weights'``, ``'recipes'`` and so on."""
    return _tables()[name]


def _result(task: str, row: Mapping[str, Any]) -> Result:
    source = table('sources')[row['source']]
    schedule = f'{row["iters"] // 1000}k iterations' if 'iters' in row else f'{row["epochs"]} epochs'
    return Result(
        task=task, schedule=schedule, method=row.get('method', 'UperNet'), crop=row.get('crop'),
        metrics={name: row[name] for name in METRICS if row.get(name) is not None},
        input=tuple(row['input']), source=f'{source["paper"]}, {source["repository"]}',
        **{name: row[name] for name in ('backbone', 'pretraining', 'dataset', 'params_m', 'flops_g', 'recipe',
                                        'variant', 'config')})


@lru_cache(maxsize=1)
def results() -> tuple[Result, ...]:
    """Every published row, segmentation first, in the order of ``published.yaml``."""
    return tuple(_result(task, row) for task in ('segmentation', 'detection') for row in table(task))


def for_config(config: str | Path) -> Result | None:
    """The row whose recipe a config follows.

    Args:
        config: path or bare name of the config file, with or without ``.py``.

    Returns:
        The row, or None for a config without a published counterpart.
    """
    name = Path(config).name.removesuffix('.py') + '.py'
    return next((row for row in results() if row.config == name), None)
