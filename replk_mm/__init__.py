"""Large-kernel ConvNets (RepLKNet) and ConvNeXt as first-class OpenMMLab backbones."""

from pathlib import Path

__version__ = '0.1.0'


def register_configs() -> None:
    """Let ``_base_`` of a config name ours: ``_base_ = 'replk_mm::upernet_replk31b_ade20k.py'``.

    The commands of this project call it; another program calls it once, before it reads such a config. mmengine
    (0.10.7) resolves such names for a fixed table of packages only, and requires a folder in them.
    """
    from mmengine.config import Config
    from mmengine.config.utils import MODULE2PACKAGE, _get_external_cfg_base_path
    from mmengine.utils import get_installed_path, is_installed

    original = Config._get_cfg_path
    if getattr(original, 'knows_replk_mm', False):
        return

    def path_of(cfg_path: str, filename: str) -> tuple[str, str | None]:
        scope, _, name = cfg_path.partition('::')
        if scope == 'replk_mm' and name:
            return str(Path(__file__).resolve().parent / '.mim' / 'configs' / name), scope
        package = MODULE2PACKAGE.get(scope, '')
        if name.startswith('_base_/') and is_installed(package):
            # mmengine would parse all metafiles of the package, 0.2 s, and find no such name in them.
            return _get_external_cfg_base_path(get_installed_path(package), name), scope
        return original(cfg_path, filename)

    path_of.knows_replk_mm = True  # type: ignore[attr-defined]
    Config._get_cfg_path = staticmethod(path_of)
