"""Logits at the size of an image, for those who look at them."""
from collections.abc import Callable
from typing import Any

from mmengine.structures import PixelData
from torch import Tensor


def _pixel_data(data: Tensor) -> PixelData:
    return PixelData(data=data)


class DeferredLogits(PixelData):
    """Logits at the size of the image, which are computed when ``data`` is first read.

    Test-time augmentation and code that looks at ``seg_logits`` find them; ``to_dict()``, and so a metric, sees them only if
    something has read them before. Copies and pickles are plain ``PixelData``.

    Args:
        compute: Returns the logits, ``(K, H, W)``.
    """

    _compute: Callable[[], Tensor]

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, '_compute', compute)  # PixelData's own takes maps only

    def __getattr__(self, name: str) -> Any:
        if name != 'data':
            raise AttributeError(f'{type(self).__name__} has no attribute {name!r}')
        self.set_field(self._compute(), 'data')
        return self.data

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.data.shape[-2], self.data.shape[-1]

    def new(self, **kwargs: Any) -> PixelData:
        """A plain copy; arguments as for ``PixelData``."""
        return _pixel_data(self.data).new(**kwargs)

    def clone(self) -> PixelData:
        """A plain copy."""
        return _pixel_data(self.data)

    def __getitem__(self, item: tuple) -> PixelData:
        return _pixel_data(self.data)[item]

    def __reduce__(self) -> tuple:
        return _pixel_data, (self.data,)
