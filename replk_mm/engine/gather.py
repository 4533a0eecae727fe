"""What processes tell each other beside gradients, as JSON text in tensors.

mmengine's metrics hand over pickles, which run what they hold when they are read. Text is only read, and keeps every number as
it is: Python writes a float with as many digits as bring back its very bits.
"""
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather, broadcast, gather, get_rank, get_world_size
from mmengine.evaluator import BaseMetric
from torch import Tensor

from replk_mm.errors import UserError


def gather_records(records: list, size: int) -> list:
    """Records of the samples of a data set that several processes share out, in its order, each once.

    Record ``j`` of rank ``r`` is of sample ``j * processes + r``, as mmengine's ``DefaultSampler`` deals them; what lies
    beyond ``size`` are samples that it deals twice, so that all processes have equally many.

    Args:
        records: Of this process: numbers, text, bytes, arrays, tensors, and lists and dicts of them.
        size: Samples of the data set.

    Returns:
        On rank 0 the records, those of other processes with lists for tuples and arrays for tensors; nothing on other ranks.
    """
    processes, rank = get_world_size(), get_rank()
    if processes == 1:
        return records[:size]
    padded, lengths = _padded(_bytes(records if rank else []))
    parts = [_value(part[:length]) for part, length in zip(gather(padded), lengths, strict=False)]
    parts[:1] = [records] if rank == 0 else []  # its own need not become text
    found = {j * processes + r: record for r, part in enumerate(parts) for j, record in enumerate(part)}
    return [found[i] for i in sorted(found) if i < size]


def share(value: Any) -> list:
    """``value`` of every process, in the order of their ranks, in every process."""
    if get_world_size() == 1:
        return [value]
    padded, lengths = _padded(_bytes(value))
    return [_value(part[:length]) for part, length in zip(all_gather(padded), lengths, strict=True)]


def from_first(compute: Callable[[], Any]) -> Any:
    """What ``compute`` returns on rank 0, the same in every process; the others do not call it.

    Raises:
        UserError: In every process, if it fails on rank 0; there it is the exception itself, whatever its type.
    """
    answer: dict[str, Any] = {}
    failure: Exception | None = None
    if get_rank() == 0:
        try:
            answer = dict(value=compute())
        except Exception as error:  # the others wait for an answer, whatever it is
            failure = error
            answer = dict(error=str(error) if isinstance(error, UserError) else f'rank 0 failed: {error!r}')
    if get_world_size() > 1:
        text = _bytes(answer)
        length = torch.tensor(text.numel())
        broadcast(length)
        if get_rank() != 0:
            text = torch.empty(int(length), dtype=torch.uint8)
        broadcast(text)
        answer = answer if get_rank() == 0 else _value(text)
    if failure is not None:
        raise failure
    if 'error' in answer:
        raise UserError(answer['error'])
    return answer['value']


def mean_of_processes(values: dict[str, float]) -> dict[str, float]:
    """The mean of each of ``values`` over the processes that have it."""
    parts = share(values)
    return {name: sum(part.get(name, 0.) for part in parts) / sum(name in part for part in parts) for name in values}


def _padded(text: Tensor) -> tuple[Tensor, list[int]]:
    """``text``, in all processes as long as the longest, and their lengths."""
    lengths = [int(length) for length in all_gather(torch.tensor([text.numel()]))]
    return torch.cat([text, text.new_zeros(max(lengths) - text.numel())]), lengths


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value, default=_plain).encode()), dtype=torch.uint8)


def _value(text: Tensor) -> Any:
    return json.loads(text.cpu().numpy().tobytes(), object_hook=_restored)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return {'__array__': value.ravel().tolist(), 'shape': value.shape, 'dtype': value.dtype.str}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        return {'__bytes__': value.decode('latin-1')}
    raise TypeError(f'{type(value).__name__} {value!r:.80} cannot cross between processes: it is no number, text or array')


def _restored(found: dict) -> Any:
    if '__array__' in found:
        return np.array(found['__array__'], dtype=found['dtype']).reshape(found['shape'])
    return found['__bytes__'].encode('latin-1') if '__bytes__' in found else found


class GatheringMetric(BaseMetric):
    """A metric that is computed once, on rank 0, from what all processes have found, with no pickle between them.

    ``collect_device`` and ``collect_dir`` of mmengine's metrics say how pickles are handed over, and have no effect.

    Attributes:
        per_class: Figures of every class, see the subclass; the same in every process.
    """

    results: list
    per_class: dict[str, dict[str, float]]

    def _collect(self, size: int) -> tuple[list, int]:
        """What :meth:`compute_metrics` needs, on rank 0, and of how many samples it is."""
        records = gather_records(self.results, size)
        return records, len(records)

    def evaluate(self, size: int) -> dict[str, float]:
        """Figures of a data set, the same in every process, with ``prefix`` before their names.

        Args:
            size: Samples of the data set.

        Raises:
            UserError: If a sample was not evaluated, or the metric refuses what it was given.
        """
        self.per_class = {}
        records, number = self._collect(size)

        def compute() -> dict:
            if number != size:
                raise UserError(
                    f'evaluation: {number} of {size} images were evaluated by {get_world_size()} processes\n'
                    f"Let every image be dealt to one: sampler=dict(type='DefaultSampler') in val_dataloader and "
                    f'test_dataloader, without drop_last.')
            prefix = f'{self.prefix}/' if self.prefix else ''
            metrics = {f'{prefix}{name}': value for name, value in self.compute_metrics(records).items()}
            return dict(metrics=metrics, per_class=self.per_class)

        answer = from_first(compute)
        self.per_class = answer['per_class']
        self.results.clear()
        return answer['metrics']
