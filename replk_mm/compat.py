"""What installed versions of mmengine, numpy and torch need before anything else of this package works.

Each function mends one thing, may be called any number of times, and says which versions it is for.
"""
import functools
import sys
from pathlib import Path


def register_configs() -> None:
    """Let mmengine find our configs as ``replk_mm::NAME.py``.

    mmengine (seen in 0.10.7) keeps a fixed table of the packages whose configs can be inherited, and asks for a slash in
    the name, which flat config folders do not have. Does nothing where mmengine is not installed.
    """
    try:
        import mmengine.utils
        from mmengine.config import config, utils
    except ImportError:
        return
    utils.MODULE2PACKAGE.setdefault('replk_mm', 'replk_mm')
    original, original_path = utils._get_package_and_cfg_path, mmengine.utils.get_installed_path
    if getattr(original, 'knows_replk_mm', False):
        return

    @functools.wraps(original)
    def package_and_path(cfg_path: str) -> tuple[str, str]:
        scope, _, name = cfg_path.partition('::')
        return ('replk_mm', name) if scope == 'replk_mm' and name else original(cfg_path)

    def installed_path(package: str) -> str:
        # mmengine looks beside the metadata, which `pip install -e` puts where the package is not.
        return str(Path(__file__).resolve().parent) if package == 'replk_mm' else original_path(package)

    package_and_path.knows_replk_mm = True  # type: ignore[attr-defined]
    hub = sys.modules.get('mmengine.hub.hub')  # imported after us, it takes the names from `utils` and `mmengine.utils`
    for module in filter(None, (utils, config, hub)):
        module._get_package_and_cfg_path = package_and_path
    for module in filter(None, (mmengine.utils, config, hub)):
        module.get_installed_path = installed_path
