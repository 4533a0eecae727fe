"""What installed versions of mmengine, numpy and torch need before anything else of this package works.

Each function mends one thing, may be called any number of times, and says which versions it is for.
"""
import functools
import os
import sys
from pathlib import Path
from typing import Any


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


def read_checkpoints_as_data() -> None:
    """Let mmengine read checkpoints, local ones and downloads, as :mod:`replk_mm.safe_load` does.

    mmengine 0.10.7 unpickles what it has downloaded with whatever code it holds, whichever the version of torch, and local
    files too with torch before 2.6; with later ones it cannot read the checkpoints that it has written itself. Weights stay on
    the CPU unless ``map_location`` names another device.
    """
    import torch
    from mmengine.runner import checkpoint

    def load_from_local(filename: str, map_location: object = None) -> dict:
        return read(Path(filename).expanduser(), map_location)

    def load_from_http(filename: str, map_location: object = None, model_dir: str | None = None,
                       progress: bool = os.isatty(0)) -> dict:
        from replk_mm.checkpoints import fetch
        return read(fetch(filename, model_dir, progress), map_location)

    def read(path: Path, map_location: object) -> dict:
        from replk_mm.checkpoints import fetch
        from replk_mm.safe_load import load
        found = load(fetch(path), 'A checkpoint of plain weights needs no code. If you know who made this file and trust '
                     f'them, make one of it: python tools/convert_checkpoint.py {path} NEW --trust-checkpoint')
        return _moved(found, map_location) if isinstance(map_location, (str, torch.device)) else found

    # Loaders of other addresses call them by these names, and mmengine's log has what follows `load_from_`.
    checkpoint.load_from_local, checkpoint.load_from_http = load_from_local, load_from_http
    checkpoint.CheckpointLoader.register_scheme('', checkpoint.load_from_local, force=True)
    checkpoint.CheckpointLoader.register_scheme(('http://', 'https://'), checkpoint.load_from_http, force=True)


def _moved(node: Any, device: Any) -> Any:
    """Nested containers whose tensors are on a device: the same dicts and lists, which keep their attributes."""
    import torch
    if isinstance(node, torch.Tensor):
        return node.to(device)
    if isinstance(node, dict):
        for key, value in node.items():
            node[key] = _moved(value, device)
    elif isinstance(node, list):
        node[:] = [_moved(value, device) for value in node]
    elif type(node) is tuple:
        return tuple(_moved(value, device) for value in node)
    return node
