"""A table of what the optimizer does with which parameters, for the work directory of a run."""

import json
from pathlib import Path
from typing import Any

import torch.nn as nn
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table

from replk_mm.engine.wrappers import bare, each
from replk_mm.registry import HOOKS

COLUMNS = ('group', 'lr', 'weight_decay', 'tensors', 'parameters', 'first', 'last')


@HOOKS.register_module()
class ParameterGroupsHook(Hook):
    """Write ``parameter_groups.txt`` and ``.json`` to the work directory when training begins, after any resuming."""

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Write both."""
        write_parameter_groups(runner.optim_wrapper, runner.model, Path(runner.work_dir, 'parameter_groups.txt'))


def parameter_groups(optim_wrapper: OptimWrapper, model: nn.Module) -> list[dict[str, Any]]:
    """What the optimizer does with which parameters, one row for all groups of the same settings.

    Args:
        optim_wrapper: Any optimizer wrapper, several of them in mmengine's ``OptimWrapperDict`` included.
        model: The model whose parameters it has, wrapped for distributed training or not.

    Returns:
        Rows in the order of the optimizer, the keys of which are :data:`COLUMNS`: ``group`` is the name that a
        constructor gave, or ``'-'``; ``lr`` is the rate that schedules start from; ``tensors`` counts parameters,
        ``parameters`` their values; ``first`` and ``last`` are names. The last row, ``'frozen'``, is for what no group
        has, if there is any.
    """
    names = {id(param): name for name, param in reversed(list(bare(model).named_parameters(remove_duplicate=False)))}
    rows: dict[tuple, list[nn.Parameter]] = {}
    # Not the wrapper's own groups, to which mmengine adds one of no parameter of the model for its log.
    for group in (group for wrapper in each(optim_wrapper) for group in wrapper.optimizer.param_groups):
        settings = group.get('group_name', '-'), group.get('initial_lr', group['lr']), group.get('weight_decay', 0.0)
        rows.setdefault(settings, []).extend(group['params'])
    taken = {id(param) for params in rows.values() for param in params}
    frozen = [param for param in model.parameters() if id(param) not in taken]
    if frozen:
        rows['frozen', 0.0, 0.0] = frozen
    return [
        dict(
            zip(
                COLUMNS,
                (*settings, len(params), sum(p.numel() for p in params), names[id(params[0])], names[id(params[-1])]),
                strict=True,
            )
        )
        for settings, params in rows.items()
    ]


def write_parameter_groups(optim_wrapper: OptimWrapper, model: nn.Module, path: str | Path) -> None:
    """Write :func:`parameter_groups` as a table to ``path``, and as JSON beside it.

    Args:
        optim_wrapper: Any optimizer wrapper.
        model: The model whose parameters it has.
        path: The table's file; the other has the suffix ``.json``.
    """
    rows = parameter_groups(optim_wrapper, model)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify='left' if column in ('group', 'first', 'last') else 'right', no_wrap=True)
    for row in rows:
        table.add_row(*(f'{value:.6g}' if isinstance(value, float) else str(value) for value in row.values()))
    with Path(path).open('w') as file:
        Console(file=file, width=1000).print(table)
    Path(path).with_suffix('.json').write_text(json.dumps(rows, indent=1) + '\n')
