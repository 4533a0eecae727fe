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
from torch.utils.data import DataLoader, Dataset

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
    batch_size: int = 128
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
    train: Dataset,
    val: Dataset,
    out: str | Path,
    recipe: Recipe,
    *,
    device: str = 'cpu',
    num_workers: int = 0,
    report: Callable[[str], None] = print,
) -> list[float]:
    """Train a classifier; continue after the last epoch of an earlier call with the same arguments, bit by bit.

    ``out/backbone.pth`` then has the weights of the backbone, for ``--pretrained`` and ``build_backbone``.

    Args:
        model: With its initial weights; changed in place.
        train: Images ``(3, H, W)`` of one size, normalized, and their classes.
        val: The same, for the accuracy.
        out: Folder for the checkpoints.
        recipe: Batch size, schedule and seed.
        device: Of the training.
        num_workers: Processes that load images; with any, resuming is not exact.
        report: Called with one line per epoch.

    Returns:
        Top-1 accuracy in percent after each epoch.

    Raises:
        UserError: If the loss is not finite, or ``out`` has a training with other arguments.
    """
    last = Path(out) / 'last.pth'
    arguments = dict(images=len(train), **asdict(recipe))  # type: ignore[arg-type]
    torch.manual_seed(recipe.seed)
    model.to(device)
    decayed, others = [], []
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        (decayed if parameter.ndim > 1 else others).append(parameter)
    groups = [dict(params=decayed, weight_decay=recipe.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, recipe.lr)
    batches = DataLoader(train, recipe.batch_size, shuffle=True, drop_last=True, num_workers=num_workers)
    total = recipe.epochs * len(batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: recipe.lr_factor(i, total))
    accuracies: list[float] = []
    if last.is_file():
        state = read_checkpoint(last, device)
        if state['meta']['arguments'] != arguments:
            raise UserError(f'{last}: is of a training with other arguments\nChoose another folder, or remove it.')
        for part, name in ((model, 'state_dict'), (optimizer, 'optimizer'), (scheduler, 'scheduler')):
            part.load_state_dict(state[name])
        torch.set_rng_state(state['rng_state'].cpu())
        accuracies = state['meta']['accuracies']
    for epoch in range(len(accuracies), recipe.epochs):
        model.train()
        for images, labels in batches:
            logits = model(images.to(device))
            loss = F.cross_entropy(logits, labels.to(device), label_smoothing=recipe.label_smoothing)
            if not torch.isfinite(loss):
                raise UserError(f'{out}: the loss is {loss} in epoch {epoch + 1}\nLower the learning rate.')
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
        accuracies.append(top1_accuracy(model, DataLoader(val, recipe.batch_size, num_workers=num_workers), device))
        meta = dict(arguments=arguments, accuracies=accuracies)
        state = dict(
            optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), rng_state=torch.get_rng_state()
        )
        save_checkpoint(dict(state_dict=model.state_dict(), meta=meta, **state), last)
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
