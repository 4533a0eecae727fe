"""Fixtures and settings for all tests."""

import os
import signal
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # read when torch is imported; each xdist worker has one core

import pytest
import torch

import replk_mm.mmcv_ops  # noqa: F401 (before mmseg and mmdet, where mmcv has no compiled operators)

replk_mm.register_configs()  # as our commands do; setuptools may lack pkg_resources, which mmengine needs

# Some tests interrupt their children. Shells start background jobs with SIGINT ignored, which children would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Failed assertions in these helpers show the compared values, as in test files.
pytest.register_assert_rewrite('backbone_contract', 'config_cases', 'van_contract')

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope='session')
def reference() -> Path:
    """Folder of photographs that are not part of the repository."""
    folder = Path(os.environ.get('REPLK_MM_REFERENCE', ROOT.parent / 'shared'))
    if not (folder / 'data').is_dir():
        pytest.skip(f'no photographs in {folder} (set REPLK_MM_REFERENCE to their folder)')
    return folder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Run torch on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_xdist_auto_num_workers() -> int:
    """Number of workers for ``-n auto``: the cores that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(cores, 8)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose extras are not installed; fail it if ``REPLK_MM_REQUIRE_EXTRAS`` is set, as CI does."""
    names = [name for marker in item.iter_markers('extras') for name in marker.args]
    if missing := [name for name in names if find_spec(name) is None]:
        stop = pytest.fail if os.environ.get('REPLK_MM_REQUIRE_EXTRAS') else pytest.skip
        stop(f'not installed: {", ".join(missing)} (make setup EXTRAS=...)')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU, and start with the files that have the most slow tests.

    xdist hands out whole files in this order: a long file at the end would leave the other workers idle.
    """
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):  # among the keywords are also the names of folders
                item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
    slow = Counter(item.path for item in items if item.get_closest_marker('slow'))
    items.sort(key=lambda item: -slow[item.path])
