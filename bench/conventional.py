"""The conventional way, after the study's notebooks: what a user would otherwise run.

Every image is decoded, resized and augmented alone, by Pillow in two DataLoader workers, anew in every epoch;
batches of 32; a frozen backbone is run in every epoch; loss and accuracy are read at every step; memory in
torch's default format; AdamW as torch sets it up. Written anew from the notebooks' facts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

BATCH, WORKERS = 32, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain_transform(size: int) -> transforms.Compose:
    """The study's baseline, and everybody's evaluation."""
    return transforms.Compose(
        [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )


def training_transform(size: int) -> transforms.Compose:
    """The study's improvement."""
    return transforms.Compose(
        [
            transforms.Resize((size, size)),
            transforms.RandAugment(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            transforms.RandomErasing(p=0.15),
        ]
    )


def stored_size_transform() -> transforms.Compose:
    """The same at the size of the files, up to uint8: no resizing, no normalising."""
    return transforms.Compose(
        [transforms.RandAugment(), transforms.PILToTensor(), transforms.RandomErasing(p=0.15)]
    )


def loader(folder: Path, transform: transforms.Compose, shuffle: bool) -> DataLoader:
    """Batches of a folder of class folders."""
    dataset = ImageFolder(str(folder), transform)
    return DataLoader(dataset, batch_size=BATCH, shuffle=shuffle, num_workers=WORKERS)


class Loop:
    """The notebooks' training loop. `amp`: autocast and GradScaler, as the baseline had on CUDA."""

    def __init__(self, model: nn.Module, groups: list[dict], amp: bool, label_smoothing: float = 0.0) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device, memory_format=torch.contiguous_format)
        self.optimizer = torch.optim.AdamW(groups)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.amp = amp and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.amp)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
        """One step -> (loss, correct), read at once."""
        images, labels = images.to(self.device), labels.to(self.device)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, enabled=self.amp):
            logits = self.model(images)
            loss = self.criterion(logits, labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item(), (logits.argmax(1) == labels).sum().item()

    def train_epoch(self, batches: DataLoader) -> float:
        """One epoch -> training accuracy."""
        self.model.train()
        correct = 0
        for images, labels in batches:
            correct += self.step(images, labels)[1]
        return correct / len(batches.dataset)

    @torch.no_grad()
    def evaluate(self, batches: DataLoader) -> float:
        """Accuracy over a folder."""
        self.model.eval()
        correct = 0
        for images, labels in batches:
            images, labels = images.to(self.device), labels.to(self.device)
            with torch.autocast(self.device.type, enabled=self.amp):
                correct += (self.model(images).argmax(1) == labels).sum().item()
        return correct / len(batches.dataset)

    def accuracies(self, n: int, train: DataLoader, valid: DataLoader) -> Iterator[float]:
        """Accuracy on `valid` after each of `n` epochs."""
        for _ in range(n):
            self.train_epoch(train)
            yield self.evaluate(valid)
