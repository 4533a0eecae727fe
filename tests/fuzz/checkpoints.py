"""Readers of checkpoints, and whoever uses what was read."""
import contextlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from replk_mm.errors import UserError


def prepare(folder: Path, file: Path) -> Callable[[], object]:
    """Reads a checkpoint, and does what loading, resuming and converting do with it."""
    from mmengine.config import Config
    from mmengine.logging import MMLogger

    from fuzz.checkpoint_files import contents, network, saved
    from replk_mm import checkpoints, loading
    from replk_mm.data.class_checks import advice_of, trained_on
    from replk_mm.engine.machine import Options
    from replk_mm.engine.resuming import resume
    from replk_mm.key_formats import convert

    MMLogger.get_current_instance().setLevel('CRITICAL')
    model = network()
    options = Options(resume=str(file))

    def one() -> None:
        loaded = checkpoints.read(file)
        meta = loaded.get('meta') or {}
        trained_on(meta), advice_of(meta)
        # They would read the same again.
        with mock.patch.object(checkpoints, 'read', lambda *_: loaded), mock.patch.object(loading, 'read', lambda *_: loaded):
            for use in (
                lambda: convert(checkpoints.unwrap(loaded, str(file))).describe(),
                lambda: loading.load_model(model, file),
                lambda: checkpoints.load_pretrained(model.backbone, file, strict=False),
                lambda: resume(Config({'work_dir': str(folder)}), options, model),
            ):
                with contextlib.suppress(UserError):
                    use()

    for content in contents():  # what is imported late is not imported while the guard looks
        file.write_bytes(saved(content))
        one()
    for broken in (b'', b'x', saved({'a': 1})[:-30]):
        file.write_bytes(broken)
        with contextlib.suppress(UserError):
            checkpoints.read(file)
    'x'.encode('cp437')  # zipfile's, of names of entries
    return one


