"""A checkpoint to resume from is data: nothing in it runs, and a state that does not fit is a user error."""

import os

import pytest
import torch
from checkpoint_cases import Exploit
from tiny import tiny, trained  # noqa: F401
from tool_cases import read

from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)


def spoiled(trained, path, change) -> str:
    checkpoint = read(trained)
    change(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


def test_the_config_in_a_checkpoint_is_not_run(tiny, trained, tmp_path):
    """mmengine compares it with the run's own, and to read it runs it."""
    proof = tmp_path / 'proof'
    hostile = f'open({str(proof)!r}, "w").close()\nmodel = dict()\n'
    path = spoiled(trained, tmp_path / 'hostile.pth', lambda c: c['meta'].update(config=hostile, cfg=hostile))
    last = tiny.train(tmp_path / 'work', 32, resume=path)
    assert not proof.exists()
    assert read(last)['meta']['iter'] == 32


@pytest.mark.parametrize('resume', [True, False])
def test_code_in_a_checkpoint_is_refused(resume, tiny, trained, tmp_path):
    proof = tmp_path / 'proof'
    exploit = Exploit(os.mkdir, str(proof))
    path = spoiled(trained, tmp_path / 'hostile.pth', lambda c: c['message_hub']['runtime_info'].update(x=exploit))
    with pytest.raises(UserError, match='refused') as info:
        tiny.train(tmp_path / 'work', 2, **({'resume': path} if resume else {'options': {'load_from': path}}))
    assert not proof.exists() and str(info.value).startswith(path)


STATES = {
    'a log that is a list': lambda c: c.update(message_hub=[1]),
    'a log without its parts': lambda c: c.update(message_hub={}),
    'losses that are a list': lambda c: c['message_hub'].update(log_scalars=[1]),
    'an optimizer that is a text': lambda c: c.update(optimizer='x'),
    'parameter groups without parameters': lambda c: c['optimizer'].update(param_groups=[{}]),
    'parameters that are a number': lambda c: c['optimizer'].update(param_groups=[{'params': 3, 'lr': 1.0}]),
    'moments that are a list': lambda c: c['optimizer'].update(state=[1]),
    'the state of another optimizer': lambda c: [g.pop('betas') for g in c['optimizer']['param_groups']],
    'schedules that are numbers': lambda c: c.update(param_schedulers=[1]),
    'no iteration': lambda c: c['meta'].pop('iter'),
}


@pytest.mark.parametrize('name', STATES)
def test_states_that_no_training_leaves_are_a_user_error(name, tiny, trained, tmp_path):
    path = spoiled(trained, tmp_path / 'hostile.pth', STATES[name])
    with pytest.raises(UserError, match='cannot be resumed') as info:
        tiny.train(tmp_path / 'work', 32, resume=path)
    assert str(info.value).startswith(path)
