"""mmengine's checkpoint hook, which deletes a checkpoint only when the one that replaces it is written."""

from collections import deque
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.runner import Runner

from replk_mm.registry import HOOKS

#: Key of the message hub: the checkpoint that a signal caused, which stays until the next regular one is written.
INTERIM = 'interim_checkpoint'


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """Save checkpoints. Arguments are those of :class:`mmengine.hooks.CheckpointHook`.

    mmengine deletes the oldest checkpoint before it writes the next, so that a full disk would leave neither.

    Attributes:
        saved_iter: Iterations done when the last checkpoint that can be resumed was written, -1 if there was none.
    """

    keep_ckpt_ids: deque
    file_backend: Any
    saved_iter = -1

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        ids = self.keep_ckpt_ids if self.max_keep_ckpts > 0 else deque()
        outdated = []
        if len(ids) == self.max_keep_ckpts and ids[-1] != step:
            outdated.append(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(ids.popleft())))
        interim = runner.message_hub.get_info(INTERIM)
        if interim:
            outdated.append(str(Path(runner.work_dir, Path(interim).name)))
        runner.message_hub.update_info(INTERIM, None)
        super()._save_checkpoint_with_step(runner, step, meta)
        if self.save_optimizer and self.save_param_scheduler:
            self.saved_iter = meta['iter']
        for path in outdated if is_main_process() else ():
            if Path(path).name != Path(str(self.last_ckpt)).name and self.file_backend.isfile(path):
                self.file_backend.remove(path)
