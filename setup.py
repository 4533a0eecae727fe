"""Distribution of replk_mm. Versions for development are pinned in requirements/; here stand the ranges that work."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# torch and mmcv are left out on purpose: pip would replace the torch chosen for this machine's GPU, or compile mmcv
# (it has no wheel for current torch) for many minutes, past this project's cache. `replk_mm.environment` checks both.
INSTALL_REQUIRES = [
    'mmengine>=0.10.4,<1',
    'jinja2',
    'matplotlib',
    'numpy',
    'psutil',
    'pydantic>=2',
    'pyyaml',
    'rich',
    'safetensors>=0.4.3',
    'setuptools<80',  # mmengine imports pkg_resources without asking for it
]
EXTRAS = {
    'seg': ['mmsegmentation>=1.2,<2', 'ftfy', 'regex'],  # mmsegmentation imports the last two without declaring them
    'det': ['mmdet>=3.3,<4', 'pycocotools'],
}


def version() -> str:
    """``__version__`` as text: importing the package would need its dependencies."""
    found = re.search(r"^__version__ = '([^']+)'", (ROOT / 'replk_mm' / '__init__.py').read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError('replk_mm/__init__.py holds no __version__')
    return found.group(1)


def readme() -> str:
    """The long description, empty in a tree without README."""
    path = ROOT / 'README.md'
    return path.read_text(encoding='utf-8') if path.is_file() else ''


setup(
    name='replk_mm',
    version=version(),
    description='Large-kernel ConvNets (RepLKNet) and ConvNeXt as OpenMMLab backbones for dense prediction',
    long_description=readme(),
    long_description_content_type='text/markdown',
    author='replk_mm authors',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.10',
    packages=find_packages(include=['replk_mm', 'replk_mm.*']),
    # mmengine looks for `replk_mm::NAME.py` in replk_mm/.mim/configs, a link to configs/; the wheel gets its files.
    package_data={
        'replk_mm': [
            'py.typed',
            '**/*.yaml',
            '**/*.j2',
            '**/*.css',
            '**/*.js',
            '.mim/model-index.yml',
            '.mim/configs/**/*.py',
            '.mim/configs/**/*.yaml',
        ]
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    zip_safe=False,
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
