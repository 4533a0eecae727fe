"""Train a backbone of the catalogue as an image classifier, in plain torch."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from replk_mm.checkpoints.io import read_checkpoint, save_checkpoint
from replk_mm.errors import UserError


class Classifier(nn.Module):
    """A backbone of :func:`~replk_mm.backbones.catalogue.build_backbone`, global average pooling, a linear layer."""

    def __init__(self, backbone: Any, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.feature_info[-1]['num_chs'], num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``."""
        return self.head(self.backbone(images)[-1].mean((2, 3)))


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, a linear warm-up and a cosine to zero."""

    epochs: int = 300
    lr: float = 1e-3
    weight_decay: float = 0.05  #: of weights with two or more dimensions
    warmup: float = 0.05  #: share of all iterations
    label_smoothing: float = 0.1
    seed: int = 0  #: of the order of the images, and of drop path

    def lr_factor(self, iteration: int, total: int) -> float:
        """Factor of the learning rate in iteration ``iteration`` of ``total``, from 0."""
        warmup = round(self.warmup * total)
        if iteration < warmup:
            return (iteration + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (iteration - warmup) / (total - warmup))) / 2


def train_classifier(
    model: Classifier,
    train: DataLoader,
    val: DataLoader,
    out: str | Path,
    recipe: Recipe,
    device: str = 'cpu',
    report: Callable[[str], None] = print,
) -> list[float]:
    """Train a classifier; continue after the last epoch of an earlier call with the same arguments.

    ``out/backbone.pth`` then has the weights of the backbone, for ``--pretrained`` and ``build_backbone``. A resumed
    training on a CPU repeats an uninterrupted one bit by bit, unless workers load the images.

    Args:
        model: With its initial weights; changed in place.
        train: Batches of normalized images ``(N, 3, H, W)`` and their classes, shuffled.
        val: The same, for the accuracy.
        out: Folder for the checkpoints.
        recipe: Schedule and seed.
        device: Of the training.
        report: Called with one line per epoch.

    Returns:
        Top-1 accuracy in percent after each epoch.

    Raises:
        UserError: If the loss is not finite, or ``out`` has a training with other arguments.
    """
    last = Path(out) / 'last.pth'
    arguments = dict(iterations=len(train), **asdict(recipe))
    torch.manual_seed(recipe.seed)
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in filter(lambda p: p.requires_grad, model.to(device).parameters()):
        (decayed if parameter.ndim > 1 else others).append(parameter)
    groups = [dict(params=decayed, weight_decay=recipe.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, recipe.lr)
    total = recipe.epochs * len(train)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: recipe.lr_factor(i, total))
    parts: dict[str, Any] = dict(state_dict=model, optimizer=optimizer, scheduler=scheduler)
    accuracies: list[float] = []
    if last.is_file():
        state = read_checkpoint(last)
        if state['meta']['arguments'] != arguments:
            raise UserError(f'{last}: is of a training with other arguments\nChoose another folder, or remove it.')
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state['rng_state'])
        accuracies = state['meta']['accuracies']
    for epoch in range(len(accuracies), recipe.epochs):
        model.train()
        for images, labels in train:
            logits = model(images.to(device))
            loss = F.cross_entropy(logits, labels.to(device), label_smoothing=recipe.label_smoothing)
            if not torch.isfinite(loss):
                raise UserError(f'{out}: the loss is {loss} in epoch {epoch + 1}\nLower the learning rate.')
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
        accuracies.append(top1_accuracy(model, val, device))
        state = {name: part.state_dict() for name, part in parts.items()} | {'rng_state': torch.get_rng_state()}
        save_checkpoint({'meta': dict(arguments=arguments, accuracies=accuracies), **state}, last)
        report(f'{out}: epoch {epoch + 1}/{recipe.epochs}, loss {loss.item():.3f}, top-1 {accuracies[-1]:.2f} %')
    meta = dict(arguments=arguments, accuracies=accuracies)
    save_checkpoint(dict(state_dict=model.backbone.state_dict(), meta=meta), Path(out) / 'backbone.pth')
    return accuracies


@torch.no_grad()
def top1_accuracy(model: nn.Module, batches: DataLoader, device: str = 'cpu') -> float:
    """Top-1 accuracy in percent, in evaluation mode."""
    model.eval()
    correct = [(model(images.to(device)).argmax(1).cpu() == labels) for images, labels in batches]
    return 100 * torch.cat(correct).double().mean().item()
