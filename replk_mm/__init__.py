"""Large-kernel ConvNets (RepLKNet) and ConvNeXt as first-class OpenMMLab backbones."""

from contextlib import suppress
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__version__ = '0.1.0'


def register_configs() -> None:
    """Let ``_base_`` and ``Config.fromfile`` name our configs, as ``'replk_mm::upernet_replk31b_ade20k.py'``.

    The commands of this project call it; another program calls it once, before it reads such a config. mmengine
    (0.10.7) resolves such names in ``_base_`` for a fixed table of packages only, requires a folder in them, and needs
    ``pkg_resources``, which setuptools 82 removed, to find those packages.
    """
    from mmengine.config import Config
    from mmengine.config.utils import MODULE2PACKAGE, _get_external_cfg_base_path, _get_external_cfg_path

    original, fromfile = Config._get_cfg_path, Config.fromfile
    if getattr(original, 'knows_replk_mm', False):
        return

    def path_of(cfg_path: str, filename: str) -> tuple[str, str | None]:
        scope, _, name = cfg_path.partition('::')
        if scope == 'replk_mm' and name:
            return str(Path(__file__).resolve().parent / '.mim' / 'configs' / name), scope
        spec = find_spec(scope) if name and scope in MODULE2PACKAGE else None
        if spec is None or not spec.submodule_search_locations:
            return original(cfg_path, filename)
        package = spec.submodule_search_locations[0]
        # Metafiles do not list the files in _base_, and mmengine would parse all of them, 0.2 s.
        if not name.startswith('_base_/'):
            with suppress(ValueError):
                return _get_external_cfg_path(package, name), scope
        return _get_external_cfg_base_path(package, name), scope

    @wraps(fromfile)
    def read(filename: str | Path, *args: Any, **kwargs: Any) -> Config:
        return fromfile(path_of(str(filename), '')[0] if '::' in str(filename) else filename, *args, **kwargs)

    path_of.knows_replk_mm = True  # type: ignore[attr-defined]
    Config._get_cfg_path = staticmethod(path_of)
    Config.fromfile = staticmethod(read)
