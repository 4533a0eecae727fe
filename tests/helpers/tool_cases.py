"""What tests of the chain from training to a merged network share."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny, trained  # noqa: F401

from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.inference import reparameterize_checkpoint

# ruff: noqa: F811 (fixtures that come from another file)


@pytest.fixture(scope='module')
def merged(tiny, trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('merged') / 'merged.pth'
    changes, differences = reparameterize_checkpoint(tiny.cfg(), str(trained), out)
    assert len(changes.merged) == 4
    assert all(d.ok for d in differences)
    return out


@pytest.fixture(scope='module')
def plain(tiny, trained, tmp_path_factory):
    """The trained checkpoint's test, with label maps."""
    out = tmp_path_factory.mktemp('plain')
    cfg = tiny.cfg()
    return cfg, evaluate(cfg, str(trained), tiny.options(out), predictions=out / 'predictions'), out / 'predictions'


def tool_main(name: str, *args, monkeypatch) -> int:
    """Run a command in this process."""
    module = importlib.import_module(f'replk_mm.commands.{name}')
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, args)])
    return module.main()


def read(path) -> dict:
    return torch.load(path, map_location='cpu', weights_only=False)
