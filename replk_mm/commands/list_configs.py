"""List the configs: backbone, data, schedule, published results, and parameters."""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from replk_mm import cli, published
from replk_mm.analysis.complexity import build_on_meta, count_parameters
from replk_mm.backbones.catalogue import weights_by_url
from replk_mm.engine.backbone import METHODS
from replk_mm.errors import UserError, command
from replk_mm.files import check_outputs, write_output
from replk_mm.logs import show_progress

COMMAND = 'python tools/list_configs.py --write docs/configs.md'


@dataclass(frozen=True)
class TaskTable:
    """Headings of the table of one task."""

    title: str
    metrics: dict[str, str]  #: metrics of a published result, by heading
    variant: str  #: heading of the column with the crop or the method


#: Tables by default scope of the config.
TASKS = {
    'mmseg': TaskTable('Segmentation', {'mIoU ss': 'miou_ss', 'ms': 'miou_ms'}, 'Crop'),
    'mmdet': TaskTable('Detection', {'AP box': 'ap_box', 'mask': 'ap_mask'}, 'Method'),
    'mmpretrain': TaskTable('Classification', {'top-1': 'top1'}, 'Size'),
}

#: Data sets by the last part of a config's name.
DATA = {
    'ade20k': 'ADE20K',
    'cityscapes': 'Cityscapes',
    'coco': 'COCO',
    'demo': 'demo scenes',
    'context': 'context scenes',
    'imagenet': 'ImageNet-1K',
    'shapes': 'generated shapes',
}

NOTES = """\
- mIoU (single-scale / multi-scale with flips), AP (val2017) and top-1 accuracy are **quoted** from the papers and
  their repositories; nobody reproduced them with this project.
- "Params" counts the model that the config builds for training, in millions: all heads, with the parallel small kernels
  and, for segmentation, the auxiliary head. The authors of RepLKNet and UniRepLKNet count the deployed model: kernels
  merged, no auxiliary head. The ConvNeXt authors count the auxiliary head in. Detectors have none; there merging saves
  a million at most, and the merged models round to the quoted numbers. For Cityscapes the RepLKNet authors state 110
  million; their network for 19 classes, counted as they count for ADE20K, comes to 111.7.
- Batch is the images of one iteration on all GPUs together, which the learning rate belongs to. The RepLKNet authors do
  not state it for COCO: it is inferred from the images a GPU of their configurations.
"""


@dataclass(frozen=True)
class ConfigRow:
    """The cells of one config."""

    path: Path
    scope: str  #: default scope, a key of :data:`TASKS`
    backbone: str
    pretraining: str
    data: str
    variant: str  #: crop size or method
    schedule: str
    result: published.PublishedResult | None
    params_m: float  #: parameters of the model as built for training, in millions


def read_config(path: Path) -> ConfigRow:
    """Read the cells of one config file, without allocating its model."""
    cfg = Config.fromfile(path)
    result = published.for_config(path)
    backbone = cfg.model.backbone
    url = (backbone.get('init_cfg') or {}).get('checkpoint')
    # The pretrained weights give the name in the papers, also for a config without a published row.
    entry, weights = weights_by_url().get(url, (None, None))
    length = cfg.train_cfg.get('max_iters')
    schedule = f'{length / 1000:g}k iterations' if length else f'{cfg.train_cfg.max_epochs} epochs'
    data = path.stem.rpartition('_')[2].partition('-')[0]
    is_detector = cfg.default_scope == 'mmdet'
    return ConfigRow(
        path=path,
        scope=cfg.default_scope,
        backbone=(entry and entry.paper_name) or (result.backbone if result else _backbone_name(backbone)),
        pretraining=result.pretraining if result else weights.pretraining if weights else 'none',
        data=DATA.get(data, data),
        variant=METHODS.get(cfg.model.type, cfg.model.type) if is_detector else str(cfg.crop_size[0]),
        schedule=f'{schedule}, batch {cfg.auto_scale_lr.base_batch_size}',
        result=result,
        params_m=count_parameters(build_on_meta(cfg)) / 1e6,
    )


def _backbone_name(backbone: Config) -> str:
    family = backbone.type.rpartition('.')[2]
    if isinstance(backbone.arch, str):
        return f'{family}-{backbone.arch}'
    return f'{family}, {len(backbone.arch.channels)} stages'


def read_configs(folder: Path) -> list[ConfigRow]:
    """The rows of all configs directly in a folder; first those with published results, in the papers' order.

    Raises:
        UserError: If there are none.
    """
    paths = sorted(folder.glob('*.py'))
    if not paths:
        raise UserError(f'{folder}: no configs\nRun this at the root of the repository, or use --configs DIR.')
    order = {result.config: i for i, result in enumerate(published.results())}
    paths.sort(key=lambda p: order.get(p.name, math.inf))
    return [read_config(path) for path in show_progress(paths, 'configs')]


def to_markdown(rows: Iterable[ConfigRow], link_to: str = 'configs') -> str:
    """Markdown tables of configs, one per task.

    Args:
        rows: From :func:`read_configs`.
        link_to: Folder of the configs, relative to the page.
    """
    rows, parts = list(rows), []
    for scope, task in TASKS.items():
        chosen = [row for row in rows if row.scope == scope]
        if not chosen:
            continue
        lines = [
            f'**{task.title}**',
            '',
            f'| Config | Backbone | Pretraining | Data | {task.variant} | Schedule '
            f'| {" / ".join(task.metrics)} (quoted) | Params, M (quoted) | Params, M |',
            f'|{" --- |" * 9}',
        ]
        for row in chosen:
            stated = row.result.metrics if row.result else {}
            cells = (
                f'[{row.path.stem}]({link_to}/{row.path.name})',
                row.backbone,
                row.pretraining,
                row.data,
                row.variant,
                row.schedule,
                ' / '.join(f'{stated[m]:.1f}' if m in stated else '–' for m in task.metrics.values()),
                f'{row.result.params_m:g}' if row.result and row.result.params_m else '–',
                f'{row.params_m:.1f}',
            )
            lines.append(f'| {" | ".join(cells)} |')
        parts.append('\n'.join(lines) + '\n')
    return '\n'.join(parts)


def render_page(rows: Iterable[ConfigRow]) -> str:
    """The text of ``docs/configs.md``."""
    head = f'<!-- generator: replk_mm. Do not edit: written by `{COMMAND}` -->\n# Configs'
    return f'{head}\n\n{to_markdown(rows, "../configs")}\n{NOTES}'


def parse_args() -> argparse.Namespace:
    parser = cli.parser(__doc__, 'list_configs', 'list_configs --write docs/configs.md')
    parser.add_argument(
        '--configs',
        type=Path,
        default=Path('configs') if Path('configs').is_dir() else Path(__file__).parents[1] / '.mim' / 'configs',
        metavar='DIR',
        help='folder of the configs (default: configs, or those of the installed package)',
    )
    parser.add_argument(
        '--write', type=Path, metavar='PAGE', help='write the tables to this page, such as docs/configs.md'
    )
    cli.add_overwrite(parser)
    return parser.parse_args()


@command
def main() -> None:
    args = parse_args()
    rows = read_configs(args.configs)
    if not args.write:
        print(to_markdown(rows, args.configs.as_posix()), end='')
        return
    check_outputs([args.write], overwrite=args.overwrite)
    write_output(args.write, render_page(rows))
    print(f'written: {args.write}')
