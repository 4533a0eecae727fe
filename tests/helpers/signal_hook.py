"""A hook that sends its own process a signal, once: in the middle of an iteration, as a signal would come.

``TEST_SIGNAL=NAME:train|val:ITERATION`` in the environment says which, and when. The first process gets it.
"""

import os
import signal

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SignalHook(Hook):
    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self._at('train', runner.iter)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        self._at('val', runner.iter)

    def _at(self, where, iteration):
        name, place, at = os.environ.get('TEST_SIGNAL', 'none:none:-1').split(':')
        if place == where and iteration == int(at) and get_rank() == 0:
            os.environ.pop('TEST_SIGNAL')
            os.kill(os.getpid(), getattr(signal, name))
