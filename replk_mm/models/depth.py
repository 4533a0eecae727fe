"""Depth of every parameter of a backbone, for learning rates that fall towards the image.

The rule is that of the authors of ConvNeXt (github.com/facebookresearch/ConvNeXt, ``optim_factory.py``, and
``mmcv_custom/layer_decay_optimizer_constructor.py`` of its detection and segmentation; "A ConvNet for the 2020s",
arXiv:2201.03545, follows BEiT, arXiv:2106.08254, in this). Networks of other families with stages of blocks have it too.
"""
from abc import abstractmethod

#: Consecutive blocks of the long third stage that share a layer.
BLOCKS_A_LAYER = 3


class LayerDepth:
    """Adds the depths to a backbone that says where its parameters stand."""

    @abstractmethod
    def _blocks_of_stages(self) -> list[int]:
        """How many blocks each stage has."""

    @abstractmethod
    def _place(self, parts: list[str]) -> tuple[int, int | None] | None:
        """Where a parameter stands.

        Args:
            parts: Its name in the backbone, split at the dots.

        Returns:
            The stage and the block in it, both from 0; the block is None for what leads to the stage (to the first one:
            the stem). None for norms of the features that are handed out.

        Raises:
            ValueError: If the name is none of the backbone's.
        """

    def get_layer_depth(self, name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter by layers; mmpretrain's interface.

        Id 0 is the stem. With four stages the third has a layer for every three blocks, the last of which may be shorter,
        and each other stage is one layer; with another number of stages each is one. What leads to a stage belongs to its
        first layer. The largest id is for what learns at the full rate: everything outside the backbone, and the norms of
        the features that are handed out.

        Args:
            name: Full name of the parameter.
            prefix: What precedes the backbone's own names, such as ``'backbone.'``.

        Returns:
            The layer id of the parameter, and how many ids there are: the layers and two.

        Raises:
            ValueError: If the name has the prefix and is none of the backbone's.
        """
        blocks = self._blocks_of_stages()
        layers = [1] * len(blocks)
        if len(blocks) == 4:
            layers[2] = -(-blocks[2] // BLOCKS_A_LAYER)
        count = sum(layers) + 2
        place = self._place(name[len(prefix):].split('.')) if name.startswith(prefix) else None
        if place is None:
            return count - 1, count
        stage, block = place
        if block is None and stage == 0:
            return 0, count
        return 1 + sum(layers[:stage]) + min((block or 0) // BLOCKS_A_LAYER, layers[stage] - 1), count

    def get_stage_depth(self, name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter by stages.

        Id 0 is the stem, and everything else that leads to a stage: the authors give all downsampling layers the rate of
        the stem. Then follow the stages; the largest id is as in :meth:`get_layer_depth`.

        Args:
            name: Full name of the parameter.
            prefix: What precedes the backbone's own names, such as ``'backbone.'``.

        Returns:
            The stage id of the parameter, and how many ids there are: the stages and two.

        Raises:
            ValueError: If the name has the prefix and is none of the backbone's.
        """
        count = len(self._blocks_of_stages()) + 2
        place = self._place(name[len(prefix):].split('.')) if name.startswith(prefix) else None
        if place is None:
            return count - 1, count
        stage, block = place
        return (0 if block is None else stage + 1), count
