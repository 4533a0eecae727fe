"""Published results, quoted from the papers and their repositories.

The rows are in ``published.yaml``; none of them was measured by this project.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).with_name('published.yaml')

#: Tasks, in the order of the tables.
TASKS = ('segmentation', 'detection', 'classification')
#: Metrics that a row may have, in the order of the columns of a table.
METRICS = ('miou_ss', 'miou_ms', 'ap_box', 'ap_mask', 'top1')


@dataclass(frozen=True)
class PublishedResult:
    """One published row: a backbone, its training, and its metrics."""

    task: str  #: one of :data:`TASKS`
    backbone: str  #: name in the paper, such as ``'RepLKNet-31B'``
    pretraining: str  #: data of the pretraining
    dataset: str  #: data of training and evaluation
    method: str  #: ``'UperNet'``, ``'Cascade Mask R-CNN'`` ...
    schedule: str  #: length of the training, as text
    crop: int | None  #: side of the training crop, or of a classifier's images, in pixels; None for detection
    metrics: Mapping[str, float]  #: in percent, by name; without those that the source does not report
    params_m: float | None  #: parameters of the whole model, in millions; None if not stated
    flops_g: float | None  #: multiply-accumulates at ``input``, in billions; None if not stated
    input: tuple[int, int] | None  #: height and width in pixels; None if not stated
    source: str  #: paper and repository
    where: str | None  #: place in the source, such as ``'readme'`` or ``'paper table 7'``
    note: str | None  #: what is unclear or contradicts the row
    trained: str  #: address of the authors' trained weights
    recipe: str | None  #: name in ``table('recipes')``; None if the chosen values are not published
    variant: str | None  #: variant of the recipe, if it has several
    config: str | None  #: file name of the config that follows the recipe, if there is one

    @property
    def family(self) -> str:
        """Name of the backbone without its size: ``'RepLKNet'`` or ``'ConvNeXt'``."""
        return self.backbone.split('-')[0]

    @property
    def link(self) -> str:
        """Address of the paper, or of the repository if the row is in its readme."""
        paper, repository = self.source.split(', ')
        if (self.where or '').startswith('paper'):
            return f'https://arxiv.org/abs/{paper.removeprefix("arXiv:")}'
        return f'https://github.com/{repository}'


@lru_cache(maxsize=1)
def _tables() -> dict[str, Any]:
    return yaml.safe_load(DATA.read_text(encoding='utf-8'))


def table(name: str) -> Any:
    """A table of ``published.yaml``: ``'kernel_size_study'``, ``'recipes'`` and so on."""
    return _tables()[name]


@dataclass(frozen=True)
class Quote:
    """A published table of a study."""

    caption: str
    headings: list[str]
    rows: list[list[Any]]


def quote(name: str) -> Quote:
    """A table that ``quotes`` of ``published.yaml`` names, such as ``'guidelines.shortcut'``."""
    stated = table('quotes')[name]
    group, _, study = name.partition('.')
    rows = table(group)[study] if study else table(group)
    return Quote(
        stated['caption'], [*stated['headings'].values()], [[row[k] for k in stated['headings']] for row in rows]
    )


def _result(task: str, row: Mapping[str, Any]) -> PublishedResult:
    source = table('sources')[row['source']]
    schedule = (
        f'{row["iters"] // 1000}k iterations'
        if 'iters' in row
        else f'{row["epochs"]} epochs'
        if row['epochs']
        else 'not stated'
    )
    schedule += f', batch {row["batch"]}' if 'batch' in row else ''
    return PublishedResult(
        task=task,
        schedule=schedule,
        method=row.get('method', 'UperNet'),
        crop=row.get('crop'),
        metrics={name: row[name] for name in METRICS if row.get(name) is not None},
        input=row['input'] and tuple(row['input']),
        source=f'{source["paper"]}, {source["repository"]}',
        trained=source.get('trained', f'https://github.com/{source["repository"]}'),
        **{name: row[name] for name in ('backbone', 'pretraining', 'dataset', 'params_m', 'flops_g')},
        **dict[str, Any]((name, row.get(name)) for name in ('where', 'note', 'recipe', 'variant', 'config')),
    )


@lru_cache(maxsize=1)
def results() -> tuple[PublishedResult, ...]:
    """Every published row, by task, in the order of ``published.yaml``."""
    return tuple(_result(task, row) for task in TASKS for row in table(task))


def for_config(config: str | Path) -> PublishedResult | None:
    """The row whose recipe a config follows.

    Args:
        config: Path or name of the config file, with or without ``.py``.

    Returns:
        The row, or None for a config without a published counterpart.
    """
    name = Path(config).name.removesuffix('.py') + '.py'
    return next((row for row in results() if row.config == name), None)
