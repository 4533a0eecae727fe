"""What tests of the whole check share: configs of small data sets, and what was found in them."""
from pathlib import Path

from mmengine.config import Config

from replk_mm.data.audit import Audit, audit

PREFIX = {'train': dict(img_path='images/training', seg_map_path='annotations/training'),
          'val': dict(img_path='images/validation', seg_map_path='annotations/validation')}


def seg_config(root: Path, classes: int = 8, **changes) -> Config:
    """A segmentor's config with the data sets of a root in ADE20K's layout."""
    loaders = {}
    for split, prefix in PREFIX.items():
        dataset = dict(type='BaseSegDataset', reduce_zero_label=True, data_root=str(root), data_prefix=dict(prefix),
                       pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]) | changes
        loaders[f'{split}_dataloader'] = dict(dataset=dataset)
    model = dict(decode_head=dict(type='FCNHead', num_classes=classes))
    return Config(dict(default_scope='mmseg', model=model, **loaders), cfg_text=' ', filename='own.py')


def found(result: Audit) -> set[tuple[str, str]]:
    """Kind and file, or entry of an annotation file, of every problem."""
    return {(problem.kind, entry or path) for _, problem in result.found() for path, entry, _ in problem.listed()}


def kinds(result: Audit, *weights: str) -> set[str]:
    return {problem.kind for _, problem in result.found() if not weights or problem.weight in weights}


def full(cfg: Config, jobs: int = 1) -> Audit:
    return audit(cfg, full=True, jobs=jobs)


def line(result: Audit, kind: str) -> str:
    """The first finding of a kind, as a user sees it."""
    return next(f'{path}: {text}' for _, problem in result.found() if problem.kind == kind
                for path, _, text in problem.listed())
