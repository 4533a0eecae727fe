"""mmengine's checkpoint hook, which removes a checkpoint only when the one that replaces it is written."""
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.runner import Runner

from replk_mm.registry import HOOKS

#: Key of the message hub: the checkpoint that a signal made, which stays until the next regular one is written.
INTERIM = 'interim_checkpoint'


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """Save checkpoints. Arguments are those of :class:`mmengine.hooks.CheckpointHook`.

    mmengine removes the oldest, and the best, before it writes the next, so that a full disk would leave neither.

    Attributes:
        saved_iter: Iterations done when the last checkpoint that can be resumed was written, -1 if there was none.
    """

    keep_ckpt_ids: deque
    file_backend: Any
    saved_iter = -1

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        keep, outdated = self.max_keep_ckpts, []
        if keep > 0:
            ids = [*(i for i in self.keep_ckpt_ids if i != step), step]
            outdated, self.keep_ckpt_ids = ids[:-keep], deque(ids[-keep:], keep)
            runner.message_hub.update_info('keep_ckpt_ids', ids[-keep:])
        interim = runner.message_hub.get_info(INTERIM)
        runner.message_hub.update_info(INTERIM, None)
        # A step that mmengine finds among those kept it does not remove another one for.
        super()._save_checkpoint_with_step(runner, step, meta)
        if self.save_optimizer and self.save_param_scheduler:
            self.saved_iter = meta['iter']
        self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)) for old in outdated)
        if interim and is_main_process() and Path(interim).name != Path(str(self.last_ckpt)).name:
            Path(runner.work_dir, Path(interim).name).unlink(missing_ok=True)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        backend = self.file_backend
        self.file_backend = later = _RemovingLater(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        self._remove(path for path in later.paths if path not in self._best())

    def _best(self) -> list[str]:
        return list(self.best_ckpt_path_dict.values()) if len(self.key_indicators) > 1 else [self.best_ckpt_path]

    def _remove(self, paths: Iterable[str]) -> None:
        for path in paths if is_main_process() else ():
            # The best one of a run that was resumed from another folder stays.
            if Path(path).parent == Path(self.out_dir) and self.file_backend.isfile(path):
                self.file_backend.remove(path)


class _RemovingLater:
    """A file backend that notes what it should remove."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.paths: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.paths.append(path)
