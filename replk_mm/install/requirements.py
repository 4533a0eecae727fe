"""What the project needs: distributions, the versions known to work, and the command that brings each."""
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Requirement:
    """A distribution, the module by which it is known to be there, and the versions known to work."""

    name: str
    module: str
    at_least: str = ''
    below: str = ''
    needed_for: str = 'everything'
    #: Distributions that bring the same module.
    instead: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """Such as ``>=1.2,<2``; empty when any version does."""
        return ','.join(sign + bound for sign, bound in (('>=', self.at_least), ('<', self.below)) if bound)


#: The ranges of setup.py, and those of what setup.py leaves to the user.
REQUIREMENTS = (
    Requirement('torch', 'torch', '2.4', '3'),
    Requirement('numpy', 'numpy', '1.22', '3'),
    Requirement('mmengine', 'mmengine', '0.10.4', '1'),
    Requirement('mmcv', 'mmcv', '2.0.1', '2.2'),
    Requirement('setuptools', 'pkg_resources', '', '80'),
    Requirement('opencv-python', 'cv2', '3', '', instead=('opencv-python-headless', 'opencv-contrib-python')),
    Requirement('PyYAML', 'yaml'),
    Requirement('mmsegmentation', 'mmseg', '1.2', '2', 'segmentation'),
    Requirement('ftfy', 'ftfy', needed_for='segmentation'),
    Requirement('regex', 'regex', needed_for='segmentation'),
    Requirement('mmdet', 'mmdet', '3.3', '4', 'detection'),
    Requirement('pycocotools', 'pycocotools', needed_for='detection'),
    Requirement('matplotlib', 'matplotlib', needed_for='plots'),
    Requirement('onnx', 'onnx', needed_for='export'),
    Requirement('onnxruntime', 'onnxruntime', needed_for='export'),
)


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``2.13.0+cpu`` is (2, 13, 0)."""
    found = re.match(r'\d+(\.\d+)*', version)
    return tuple(map(int, found.group(0).split('.'))) if found else ()


def in_range(version: str, at_least: str, below: str) -> bool:
    """Whether ``at_least <= version < below``; empty bounds hold always."""
    width = 8
    number, low, high = ((*release(text), *(0,) * width)[:width] for text in (version, at_least, below))
    return number >= low and (not below or number < high)


def make_setup() -> str:
    """``make setup`` from wherever the user is."""
    return 'make setup' if Path.cwd() == ROOT else f'make -C {ROOT} setup'


def is_managed() -> bool:
    """Whether ``make setup`` looks after this Python, or ought to: the project's own environment, or no environment.

    In any other one a user chose the packages, torch above all.
    """
    own = Path(sys.prefix) == ROOT / '.venv'
    return own or (sys.prefix == sys.base_prefix and 'CONDA_PREFIX' not in os.environ)


def fix_for(requirement: Requirement) -> str:
    """The command that brings a requirement into this environment; '' for an optional one."""
    if requirement.needed_for == 'export':
        return ''
    if is_managed():
        return make_setup()
    return build_mmcv() if requirement.name == 'mmcv' else \
        f"{sys.executable} -m pip install '{requirement.name}{requirement.range}'"


def build_mmcv() -> str:
    """The command that brings a working mmcv beside the torch of this Python."""
    return f'{sys.executable} {ROOT / "tools" / "build_mmcv.py"}'


def reinstall(name: str) -> str:
    """The command for a package that is there and does not work."""
    return make_setup().removesuffix('setup') + 'distclean setup' if is_managed() else \
        f'{sys.executable} -m pip install --force-reinstall --no-deps {name}'
