"""Fixtures that several test files use."""

import os
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '2')

import pytest
import torch

# Assertions of theirs say what they compared, as those of tests do.
pytest.register_assert_rewrite('backbone_contract', 'config_cases')

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope='session')
def reference() -> Path:
    """Folder of photographs, which stands beside some checkouts."""
    folder = Path(os.environ.get('REPLK_MM_REFERENCE', ROOT.parent / 'shared'))
    if not (folder / 'data').is_dir():
        pytest.skip(f'no photographs at {folder} (REPLK_MM_REFERENCE names the folder)')
    return folder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """One thread of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if 'gpu' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
