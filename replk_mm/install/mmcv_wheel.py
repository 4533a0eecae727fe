"""A working mmcv for the torch at hand: from what is installed, from the cache, or compiled, and always seen to run.

mmcv publishes no wheel for current torch releases, and a wheel built for another torch crashes or refuses to load.
"""
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from replk_mm.errors import UserError
from replk_mm.install.compiling import compile_wheel
from replk_mm.install.probes import run_probe

MMCV_VERSION = '2.1.0'
#: In mmcv's metadata folder: the build key of the wheel that was installed.
KEY_FILE = 'BUILT_FOR'


def cache_dir() -> Path | None:
    """Where finished wheels are kept for the next clone; None when ``MMCV_CACHE=0`` forbids it."""
    if os.environ.get('MMCV_CACHE') == '0':
        return None
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache').expanduser() / 'replk_mm' / 'wheels'


def choose_cuda(torch_cuda: str | None) -> tuple[bool, str]:
    """Whether to compile the CUDA operators, and a line about it ('' when there is nothing to say).

    Args:
        torch_cuda: The CUDA version torch was built with, None for a CPU build.
    """
    cpu_only = "mmcv's operators will be CPU only: "
    if not torch_cuda:
        return False, ''
    if os.environ.get('MMCV_CUDA') == '0':
        return False, f'{cpu_only}MMCV_CUDA=0 asks for it'
    nvcc = shutil.which('nvcc')
    if not nvcc:
        return False, f'{cpu_only}torch is built for CUDA {torch_cuda}, but there is no CUDA toolkit (nvcc)'
    answer = subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout
    release = re.search(r'release (\d+)', answer)
    if not release or release.group(1) != torch_cuda.split('.')[0]:
        found = f'release {release.group(1)}' if release else 'unreadable'
        return False, f'{cpu_only}torch is built for CUDA {torch_cuda}, nvcc is {found}'
    return True, f"mmcv's operators will be compiled for CUDA {torch_cuda} too"


def build_key(torch_version: str, cuda: bool) -> str:
    """Name of everything that a compiled mmcv depends on."""
    libc = '-'.join(filter(None, platform.libc_ver())) or 'libc'
    return '-'.join((f'mmcv-{MMCV_VERSION}', f'cp{sys.version_info.major}{sys.version_info.minor}',
                     f'torch{torch_version}', 'cuda' if cuda else 'cpu', sysconfig.get_platform(), libc))


def ensure_mmcv(build_root: Path, rebuild: bool = False) -> str:
    """Install a working mmcv beside the running Python's torch.

    Args:
        build_root: Where sources and objects stay until the build is finished. An interrupted build goes on there.
        rebuild: Compile from nothing, even if an installed or cached mmcv works.

    Returns:
        One line about what was done.

    Raises:
        UserError: If torch or OpenCV does not work, the build fails, or the built operators do not run.
    """
    torch = _require('torch', 'install torch first: python -m pip install torch')
    # Asked now, or else a good wheel would be blamed for OpenCV's missing system libraries.
    _require('opencv', 'install the system library it names, or opencv-python-headless in its place')
    cuda, remark = choose_cuda(torch['cuda'])
    key = build_key(torch['version'], cuda)
    if remark:
        print(remark, flush=True)
    if not rebuild and _installed_for() in (key, '') and not _what_fails(cuda):
        return f'mmcv {MMCV_VERSION} is installed, and its operators run'
    cache = cache_dir()
    for wheel in (cache / key).glob('*.whl') if cache and not rebuild else ():
        if not _install(wheel, key, cuda):
            return f'mmcv {MMCV_VERSION} installed from {wheel}, and its operators run'
        print(f'the operators in {wheel} do not run: building again', flush=True)
        wheel.unlink()
    folder = build_root / key
    if rebuild:
        shutil.rmtree(folder, ignore_errors=True)
    wheel = compile_wheel(f'mmcv=={MMCV_VERSION}', folder, cuda)
    failure = _install(wheel, key, cuda)
    if failure:
        wheel.unlink()
        raise UserError(f'mmcv is compiled, but its operators do not run: {failure}\n'
                        f'remove {folder} to start from nothing; the log there says how it was built')
    kept = f', {_store(wheel, cache / key)}' if cache else ''
    return f'mmcv {MMCV_VERSION} compiled and installed, its operators run{kept}'


def _require(probe: str, remedy: str) -> dict:
    answer = run_probe(probe)
    if not answer['ok']:
        raise UserError(f'mmcv needs {probe}, which does not work here: {answer["error"]}\n{remedy}')
    return answer


def _installed_for() -> str | None:
    """The key noted when mmcv was installed; '' for an mmcv installed by other means, None for none or another one."""
    try:
        distribution = metadata.distribution('mmcv')
    except metadata.PackageNotFoundError:
        return None
    return (distribution.read_text(KEY_FILE) or '').strip() if distribution.version == MMCV_VERSION else None


def _what_fails(cuda: bool) -> str:
    """Why mmcv's operators do not run on the CPU or, with ``cuda``, on some device; '' when they do."""
    answer = run_probe('ops')
    if not answer['ok']:
        return answer['error']
    failures = [f'{device}: {found}' for device, found in answer['devices'].items()
                if found != 'ok' and (cuda or device == 'cpu')]
    return '; '.join(failures)


def _install(wheel: Path, key: str, cuda: bool) -> str:
    """Install ``wheel`` and note its key. Where its operators do not run, take it out again and say why."""
    pip = [sys.executable, '-m', 'pip']
    done = subprocess.run([*pip, 'install', '-q', '--no-deps', '--force-reinstall', str(wheel)],
                          capture_output=True, text=True)
    failure = done.stderr.strip() or 'pip failed' if done.returncode else _what_fails(cuda)
    if failure:
        subprocess.run([*pip, 'uninstall', '-q', '-y', 'mmcv'], capture_output=True)
        return failure
    note = metadata.distribution('mmcv').locate_file(f'mmcv-{MMCV_VERSION}.dist-info/{KEY_FILE}')
    Path(str(note)).write_text(key)
    return ''


def _store(wheel: Path, folder: Path) -> str:
    """Keep a wheel for the next clone; returns where, or why not, for it is installed already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f'{os.getpid()}.partial'
        shutil.copyfile(wheel, partial)
        return f'kept in {partial.replace(folder / wheel.name)}'  # at once: another clone may be looking
    except OSError as error:
        return f'not kept for other clones: {error}'
