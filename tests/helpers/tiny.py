"""A network of seconds: a tiny UperNet with RepLKNet on a few demo scenes, for tests that train, test and merge."""

import copy
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mmengine.config.config
import pytest
from mmengine.config import Config
from rank_cases import free_port

from replk_mm.data.scenes.spec import DEMO_CLASSES, DEMO_PALETTE
from replk_mm.data.scenes.writer import write_demo_data
from replk_mm.engine.config import load_config
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.process import RunOptions
from replk_mm.engine.train import train

ROOT = Path(__file__).resolve().parents[2]
CONFIG = f"""
_base_ = {str(ROOT / 'configs' / 'upernet_replk-nano_ade20k.py')!r}
crop_size = (64, 64)
data_root = 'nowhere'
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
train_pipeline = [*load, dict(type='RandomCrop', crop_size=crop_size), dict(type='RandomFlip', prob=0.5),
                  dict(type='PackSegInputs')]
test_pipeline = [*load, dict(type='PackSegInputs')]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale_factor=r, keep_ratio=True) for r in (1.0, 1.5)],
        [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)],
        [dict(type='LoadAnnotations')],
        [dict(type='PackSegInputs')]])]
kind = dict(type='BaseSegDataset', reduce_zero_label=True, data_root=data_root,
            metainfo=dict(classes={DEMO_CLASSES!r}, palette={[list(c) for c in DEMO_PALETTE]!r}))
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(arch=dict(_delete_=True, layers=[1, 1, 1, 1], channels=[8, 16, 32, 64],
                            large_kernel_sizes=[7, 7, 7, 7], small_kernel=3, dw_ratio=1)),
    decode_head=dict(in_channels=[8, 16, 32, 64], channels=8, num_classes={len(DEMO_CLASSES)}),
    auxiliary_head=dict(in_channels=32, channels=8, num_classes={len(DEMO_CLASSES)}))
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=2, **loader, dataset=dict(**kind, pipeline=train_pipeline))
val_dataloader = dict(**loader, dataset=dict(**kind, pipeline=test_pipeline))
test_dataloader = dict(**loader, dataset=dict(**kind, pipeline=test_pipeline))
optim_wrapper = dict(optimizer=dict(lr=1e-2))
default_hooks = dict(logger=dict(interval=1))
"""
_count = itertools.count()
_read: dict[str, Config] = {}


@dataclass
class Tiny:
    """Where the data set and the config lie."""

    data: Path
    config: Path

    def cfg(self, options: dict | None = None) -> Config:
        # Reading the files takes longer than training does.
        if str(self.config) not in _read:
            _read[str(self.config)] = load_config(str(self.config))
        cfg = copy.deepcopy(_read[str(self.config)])
        cfg.merge_from_dict(options or {})
        # mmengine keeps what runs of one name logged in one place, and names them by the second.
        cfg.experiment_name = f'tiny{os.getpid()}_{next(_count)}'
        return cfg

    def options(self, work_dir: Path, **changes) -> RunOptions:
        return RunOptions(**{'data_root': str(self.data), 'work_dir': str(work_dir), 'device': 'cpu', **changes})

    def prepare(self, work_dir: Path, iterations: int | None = 2, options: dict | None = None, **changes):
        cfg = self.cfg(options)
        return cfg, prepare_training(cfg, self.options(work_dir, max_iters=iterations, **changes))

    def train(self, work_dir: Path, iterations: int | None = 2, options: dict | None = None, **changes) -> Path:
        return train(*self.prepare(work_dir, iterations, options, **changes), preflight=False)


def make_data(root: Path, train: int = 4, val: int = 2) -> Path:
    write_demo_data(root, train=train, val=val, size=(64, 64))
    return root


_made: dict[str, Tiny | Path] = {}


@pytest.fixture(scope='session')
def tiny(tmp_path_factory) -> Tiny:
    """The data set and the config; shared by all files that import this fixture."""
    if 'tiny' not in _made:
        folder = tmp_path_factory.mktemp('tiny')
        # mmengine lays out the whole config anew, nicely and slowly, for its log and for each checkpoint.
        mmengine.config.config.FormatCode = lambda text, **options: (text, True)
        (folder / 'tiny.py').write_text(CONFIG)
        _made['tiny'] = Tiny(make_data(folder / 'data'), folder / 'tiny.py')
    return _made['tiny']


@pytest.fixture(scope='session')
def trained(tiny, tmp_path_factory) -> Path:
    """A checkpoint after enough iterations to be right about some classes."""
    if 'trained' not in _made:
        _made['trained'] = tiny.train(tmp_path_factory.mktemp('trained'), 30, seed=0)
    return _made['trained']


def run_tool(name: str, *args, processes: int = 1, timeout: float = 300, **env) -> subprocess.CompletedProcess:
    """Run tools/NAME.py as a user does, with torchrun if ``processes`` is more than one."""
    start = []
    if processes > 1:
        port = ['--master-port', str(free_port())]
        start = ['-m', 'torch.distributed.run', '--nproc-per-node', str(processes), *port]
        args = (*args, '--device', 'cpu', '--launcher', 'pytorch')
    return subprocess.run(
        [sys.executable, *start, str(ROOT / 'tools' / f'{name}.py'), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=tool_environment(**env),
    )


def tool_environment(**env) -> dict[str, str]:
    """The environment of a tool: one thread, and the modules of ``tests/helpers`` for ``custom_imports``."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / 'tests/helpers')])
    return {**os.environ, 'PYTHONPATH': paths, 'OMP_NUM_THREADS': '1', **env}
