"""Generated patches as a data set of torch, for ``classify.py``."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from replk_mm.backbones.catalogue import IMAGENET
from replk_mm.data.scenes.patches import make_patch


class PatchDataset(Dataset):
    """Patches as float tensors ``(3, side, side)`` with ImageNet's normalization, and their classes.

    All patches are drawn at once and kept in memory. Those of the split 'train' are flipped at random.
    """

    def __init__(self, seed: int, split: str, count: int, side: int = 96) -> None:
        patches = [make_patch(seed, split, index, side) for index in range(count)]
        self.images = torch.from_numpy(np.stack([image for image, _ in patches])).permute(0, 3, 1, 2)
        self.labels = [label for _, label in patches]
        self.flips = split == 'train'
        self.mean, self.std = (torch.tensor(value)[:, None, None] for value in IMAGENET)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = (self.images[index] - self.mean) / self.std
        return image.flip(-1) if self.flips and torch.rand(()) < 0.5 else image, self.labels[index]
