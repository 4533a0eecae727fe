"""Whether anything looks at the operators or modules themselves: then the parts run as they are written."""
import torch
import torch.nn as nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


def observed() -> bool:
    """Whether something looks at the operators: a compiler, an exporter, a counter, a transform, forward-mode derivatives."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0
            or torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.maybe_current_level() is not None)


def hooked(*modules: nn.Module | None) -> bool:
    """Whether calls of any of ``modules`` have hooks, their own or those of all modules."""
    return _has_any_global_hook() or any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules if module is not None)
