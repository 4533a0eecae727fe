"""List the configs: what each trains, what was published for it, and its parameters."""

import argparse
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from replk_mm import cli, published
from replk_mm.errors import UserError, command

COMMAND = 'python tools/list_configs.py --write docs/configs.md'


@dataclass(frozen=True)
class Task:
    """A table: its title, the name of its metrics and which they are, and what tells its configs apart."""

    title: str
    metric_names: str
    metrics: tuple[str, str]
    kind: str


#: By the scope of a config.
TASKS = {
    'mmseg': Task('Segmentation', 'mIoU ss / ms', ('miou_ss', 'miou_ms'), 'Crop'),
    'mmdet': Task('Detection', 'AP box / mask', ('ap_box', 'ap_mask'), 'Method'),
}

#: What the end of a config's name stands for.
DATA = {
    'ade20k': 'ADE20K',
    'cityscapes': 'Cityscapes',
    'coco': 'COCO',
    'demo': 'demo scenes',
    'context': 'context scenes',
}

#: What mmdet's classes are called in the papers.
METHODS = {'CascadeRCNN': 'Cascade Mask R-CNN', 'MaskRCNN': 'Mask R-CNN'}

NOTES = """\
- mIoU (single-scale / multi-scale with flips) and AP (val2017) are **quoted** from the papers and their repositories;
  nobody reproduced them with this project.
- "Params" counts the model that the config builds for training, in millions: all heads, with the parallel small kernels
  and, for segmentation, the auxiliary head. The RepLKNet authors count the deployed model: small kernels merged, no
  auxiliary head. The ConvNeXt authors count the auxiliary head in. Detectors have none; there merging saves half a
  million at most, and the merged models round to the quoted numbers. For Cityscapes the RepLKNet authors state 110
  million; their network for 19 classes, counted as they count for ADE20K, comes to 111.7.
- Batch is the images of one iteration on all GPUs together, which the learning rate belongs to. The RepLKNet authors do
  not state it for COCO: it is inferred from the images a GPU of their configurations.
"""


@dataclass(frozen=True)
class Row:
    """What a table says of one config."""

    path: Path
    scope: str
    backbone: str
    pretraining: str
    data: str
    kind: str
    schedule: str
    result: published.PublishedResult | None
    params_m: float


def count_params_m(cfg: Config) -> float:
    """Parameters, in millions, of the model of a config; nothing is allocated or initialised."""
    with (
        warnings.catch_warnings(),
        MODELS.switch_scope_and_registry(cfg.default_scope) as registry,
        torch.device('meta'),
    ):
        warnings.simplefilter('ignore')
        model = registry.build(cfg.model)
    return sum(p.numel() for p in model.parameters()) / 1e6


def read_config(path: Path) -> Row:
    """The row of one config file."""
    cfg = Config.fromfile(path)
    result = published.for_config(path)
    backbone = cfg.model.backbone
    weights = (backbone.get('init_cfg') or {}).get('checkpoint')
    # What the backbone starts from names it as the papers do, also where a config has no published row of its own.
    known: dict = next(
        (entry for entry in published.table('weights') if entry['url'] == weights),
        dict(backbone=_name(backbone), pretraining='none'),
    )
    length = cfg.train_cfg.get('max_iters')
    schedule = f'{length / 1000:g}k iterations' if length else f'{cfg.train_cfg.max_epochs} epochs'
    data = path.stem.rpartition('_')[2].partition('-')[0]
    return Row(
        path=path,
        scope=cfg.default_scope,
        backbone=known['backbone'],
        pretraining=result.pretraining if result else known['pretraining'],
        data=DATA.get(data, data),
        kind=(str(cfg.crop_size[0]) if cfg.default_scope == 'mmseg' else METHODS.get(cfg.model.type, cfg.model.type)),
        schedule=f'{schedule}, batch {cfg.auto_scale_lr.base_batch_size}',
        result=result,
        params_m=count_params_m(cfg),
    )


def _name(backbone: Config) -> str:
    family = backbone.type.rpartition('.')[2]
    if isinstance(backbone.arch, str):
        return f'{family}-{backbone.arch}'
    return f'{family}, {len(backbone.arch.channels)} stages'


def read_configs(folder: Path) -> list[Row]:
    """The rows of all configs directly in ``folder``: those with published results first, in the papers' order.

    Raises:
        UserError: if there are none.
    """
    paths = sorted(folder.glob('*.py'))
    if not paths:
        raise UserError(f'no configs in {folder}\nRun this at the root of the repository, or name their folder.')
    order = {result.config: i for i, result in enumerate(published.results())}
    return [read_config(path) for path in sorted(paths, key=lambda p: order.get(p.name, len(order)))]


def to_markdown(rows: Iterable[Row], link_to: str = 'configs') -> str:
    """Markdown tables of ``rows``, one a task.

    Args:
        rows: what :func:`read_configs` returned.
        link_to: folder of the configs, relative to the page that the text goes to.
    """
    rows, parts = list(rows), []
    for scope, task in TASKS.items():
        chosen = [row for row in rows if row.scope == scope]
        if not chosen:
            continue
        lines = [
            f'**{task.title}**',
            '',
            f'| Config | Backbone | Pretraining | Data | {task.kind} | Schedule | {task.metric_names} (quoted) '
            '| Params, M (quoted) | Params, M |',
            f'|{" --- |" * 9}',
        ]
        for row in chosen:
            stated = row.result.metrics if row.result else {}
            figures = ' / '.join(f'{stated[m]:.1f}' if m in stated else '–' for m in task.metrics)
            quoted = f'{row.result.params_m:g}' if row.result else '–'
            cells = (
                f'[{row.path.stem}]({link_to}/{row.path.name})',
                row.backbone,
                row.pretraining,
                row.data,
                row.kind,
                row.schedule,
                figures,
                quoted,
                f'{row.params_m:.1f}',
            )
            lines.append(f'| {" | ".join(cells)} |')
        parts.append('\n'.join(lines) + '\n')
    return '\n'.join(parts)


def page(rows: Iterable[Row]) -> str:
    """The text of ``docs/configs.md``."""
    return f'<!-- Do not edit: written by `{COMMAND}` -->\n# Configs\n\n{to_markdown(rows, "../configs")}\n{NOTES}'


def parse_args() -> argparse.Namespace:
    parser = cli.parser(__doc__, 'list_configs', 'list_configs --write docs/configs.md')
    parser.add_argument(
        '--configs', type=Path, default=Path('configs'), metavar='DIR', help='folder of the configs (default: configs)'
    )
    parser.add_argument(
        '--write', type=Path, metavar='PAGE', help='write the tables to this page, such as docs/configs.md'
    )
    return parser.parse_args()


def write_if_changed(path: Path, text: str) -> None:
    """Write ``text``, and say whether that changed anything."""
    if path.is_file() and path.read_text(encoding='utf-8') == text:
        print(f'{path}: up to date')
        return
    if not path.parent.is_dir():
        raise UserError(f'{path}: there is no folder {path.parent}\nCreate it first.')
    path.write_text(text, encoding='utf-8')
    print(f'{path}: written')


@command
def main() -> None:
    args = parse_args()
    rows = read_configs(args.configs)
    if args.write:
        write_if_changed(args.write, page(rows))
    else:
        print(to_markdown(rows, args.configs.as_posix()), end='')
