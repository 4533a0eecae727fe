"""The data of a suite's rows: those it names, or procedural scenes that are written on first use."""
import fcntl
from pathlib import Path
from typing import Any

from mmengine.config import Config

from replk_mm.bench.records import fingerprint
from replk_mm.bench.suites.definition import Row, Suite
from replk_mm.data.datasets import datasets_of
from replk_mm.data.demo_writer import META, write_demo_data
from replk_mm.data.scene_kinds import SCENES
from replk_mm.errors import UserError

#: Of scenes, where the suite does not say otherwise.
_USUAL = dict(train=200, val=40, seed=0, size=[256, 256])
#: What reads images of the data set.
_SEEING = ('train', 'metric', 'erf', 'shape_bias')


def data_of(suite: Suite, row: Row, cfg: Config, work_dir: Path, given: str | None) -> tuple[str | None, dict[str, Any]]:
    """Where a row's data are, written if need be, and what defines them.

    Args:
        suite: The suite.
        row: One of its rows.
        cfg: The row's config.
        work_dir: Of the suite.
        given: Data root that the command line names; None for none.

    Returns:
        The data root, None for the config's own or where none is needed; and plain data that is the same for the same data.

    Raises:
        UserError: If there are no such scenes, or they cannot be written.
    """
    root = given or row.data_root or suite.data.get('root')
    if root or not suite.data:
        return root, dict(root=root)
    wanted = {**_USUAL, 'layout': _layout_of(cfg), **suite.data}
    kind = SCENES.get(wanted['scenes'])
    if kind is None:
        raise UserError(f'{suite.path}: data: scenes: {wanted["scenes"]!r} is unknown\nThere are: {", ".join(SCENES)}.')
    wanted['version'] = kind.version
    if not set(_SEEING) & set(row.measurements()):
        return None, wanted  # as if it saw them, so that a measurement that comes to it later changes nothing else
    folder = work_dir / 'data' / f'{kind.name}-{wanted["layout"]}-{fingerprint(wanted)[:8]}'
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / 'lock').open('a') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # suites of several machines may write into one folder
        if not (folder / META).is_file():
            write_demo_data(folder, wanted['layout'], train=wanted['train'], val=wanted['val'], seed=wanted['seed'],
                            size=tuple(wanted['size']), progress=True, kind=kind)
    return str(folder), wanted


def _layout_of(cfg: Config) -> str:
    """The layout of scenes that a config reads as it is."""
    if cfg.get('default_scope') == 'mmdet':
        return 'coco'
    types = [str(dataset.get('type')) for dataset in datasets_of(cfg, ('test',))]
    return 'cityscapes' if types and types[0].endswith('CityscapesDataset') else 'ade20k'
