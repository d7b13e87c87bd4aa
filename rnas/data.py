"""Images in memory: loading with checks, balanced subsets, halves for a search, and batches that resume exactly.

N images, C channels, H W pixels, K classes. Pixels are uint8 in 0..255 or float32 in [0, 1]; batches are float32 in
[0, 1]. Normalisation is the network's business, since threat models live in pixel units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .augment import Augment
from .config import DataConfig
from .datasets import NAMES, balanced_indices, read
from .seeding import generator

__all__ = ["Augment", "Dataset", "Split", "batches", "halves", "load", "number_of_batches"]

# One grey level: a channel that varies less carries no picture, and dividing by less would only magnify its noise.
SMALLEST_STD = 1 / 255


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images, on the CPU.

    images: (N, C, H, W), uint8 in 0..255 or float32 in [0, 1]. labels: (N,) int64.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype not in (torch.uint8, torch.float32):
            raise ValueError(
                "images must be (N, C, H, W) of uint8 or float32; "
                f"got {tuple(self.images.shape)} of {self.images.dtype}"
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be ({len(self.images)},) of torch.int64, one per image; "
                f"got {tuple(self.labels.shape)} of {self.labels.dtype}"
            )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images of one data set.

    mean, std: per channel of the training images, in pixel units of [0, 1]; std is at least 1/255.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.train.images.shape[1:])


def load(config: DataConfig) -> Dataset:
    """Load the data set of `config` into memory, checked.

    `config.dataset` is a name of `rnas.datasets.NAMES` or the path of an .npz file with x_train, y_train, x_test and
    y_test. Images there are uint8 in 0..255 or float32/float64 in [0, 1], shaped (N, H, W), (N, H, W, C) or
    (N, C, H, W) with C 1 or 3: the last axis is the channels if it is 1 or 3, else axis 1. Labels are integers (N,),
    and the training labels use each of 0..K-1.

    Raises FileNotFoundError for missing files, ValueError for all else that is wrong with the data or the settings.
    """
    for name in ("train_images", "test_images", "image_size"):
        if getattr(config, name) < 0:
            raise ValueError(f"data.{name} must not be negative; got {getattr(config, name)}")
    arrays = read(config)
    where = config.dataset
    num_classes = count_classes(arrays.y_train, f"{where}: y_train")
    check_labels(arrays.y_test, f"{where}: y_test")
    if int(arrays.y_test.max()) >= num_classes:
        raise ValueError(
            f"{where}: y_test has label {arrays.y_test.max()}; the training labels go from 0 to {num_classes - 1}"
        )
    train = subset(as_split(arrays.x_train, arrays.y_train, where, "train"), config.train_images, "data.train_images")
    test = subset(as_split(arrays.x_test, arrays.y_test, where, "test"), config.test_images, "data.test_images")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"{where}: training images are (C, H, W) = {tuple(train.images.shape[1:])}, "
            f"test images {tuple(test.images.shape[1:])}; they must agree"
        )
    mean, std = channel_statistics(train.images)
    return Dataset(where if where in NAMES else Path(where).stem, train, test, num_classes, mean, std)


def check_labels(labels: np.ndarray, what: str) -> None:
    """Raise ValueError unless `labels` is a non-empty (N,) array of integers of at least 0."""
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{what} must be (N,) integers, one label per image; got shape {labels.shape} of {labels.dtype}"
        )
    if labels.size == 0:
        raise ValueError(f"{what} is empty")
    if labels.min() < 0:
        raise ValueError(f"{what} must be labels from 0 on; got {labels.min()}")


def count_classes(labels: np.ndarray, what: str) -> int:
    """K, the largest training label + 1.

    A class without training images is refused: it comes of labels that start at 1 or of a file cut short, and would
    leave an output that no image ever trains.
    """
    check_labels(labels, what)
    present = np.unique(labels)
    if len(present) < 2:
        raise ValueError(f"{what} has a single class; expected at least two")
    if present[-1] != len(present) - 1:
        absent = int(np.flatnonzero(present != np.arange(len(present)))[0])
        raise ValueError(
            f"{what} must use every label from 0 to its largest, {present[-1]}; "
            f"no image has label {absent}: relabel to 0..K-1"
        )
    return len(present)


def as_split(images: np.ndarray, labels: np.ndarray, where: str, kind: str) -> Split:
    """Check and bring into the form of `Split` the images x_`kind` and their checked labels."""
    what = f"{where}: x_{kind}"
    layouts = "(N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3"
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    elif images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"{what} must be {layouts}; got {images.shape}")
    if len(images) != len(labels):
        raise ValueError(f"{what} has {len(images)} images, y_{kind} {len(labels)} labels; they must be as many")
    if images.size == 0:
        raise ValueError(f"{what} is empty: (N, C, H, W) = {images.shape}")
    if images.dtype != np.uint8:
        images = unit_range(images, what)
    return Split(torch.from_numpy(np.require(images, requirements="W")), torch.from_numpy(labels.astype(np.int64)))


def unit_range(images: np.ndarray, what: str) -> np.ndarray:
    """Float images as float32, after checking that every pixel lies in [0, 1]."""
    if images.dtype not in (np.float32, np.float64):
        raise ValueError(f"{what} must be uint8 in 0..255, or float32 or float64 in [0, 1]; got {images.dtype}")
    low, high = images.min(), images.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{what} has NaN or infinite pixels; expected numbers in [0, 1]")
    if low < 0 or high > 1:
        raise ValueError(
            f"{what} has float pixels from {low:g} to {high:g}; expected [0, 1]: "
            "store 0..255 as uint8, and leave normalisation to the network"
        )
    return images.astype(np.float32)


def subset(split: Split, count: int, what: str) -> Split:
    """A class-balanced subset in the order of the file; the split itself if `count` is 0."""
    if count == 0:
        return split
    indices = torch.from_numpy(balanced_indices(split.labels.numpy(), count, what))
    return Split(split.images[indices], split.labels[indices])


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of `images` (N, C, H, W), in pixel units of [0, 1]."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    # Summed in chunks, since float64 copies of a whole data set need eight times its memory. Sums of uint8 are exact.
    for chunk in images.split(1024):
        chunk = chunk.double()
        total += chunk.sum((0, 2, 3))
        squares += chunk.square_().sum((0, 2, 3))
    pixels = images.numel() // images.shape[1]
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    mean = total / pixels / scale
    std = (squares / pixels / scale**2 - mean.square()).clamp(min=SMALLEST_STD**2).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def halves(split: Split, seed: int) -> tuple[Split, Split]:
    """Two random halves without common images (D_T and D_V of a search); the first has the odd image out.

    Depends on the seed and the number of images only. Raises ValueError for fewer than two images.
    """
    if len(split) < 2:
        raise ValueError(f"cannot halve {len(split)} images; at least 2 are needed")
    order = torch.randperm(len(split), generator=generator(seed, "halves"))
    first, second = (part.sort().values for part in order.tensor_split(2))
    return Split(split.images[first], split.labels[first]), Split(split.images[second], split.labels[second])


def number_of_batches(split: Split, batch_size: int, drop_last: bool = False) -> int:
    """How many batches one epoch has. Raises ValueError for a batch size below 1 or an epoch without a batch."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    count = len(split) // batch_size if drop_last else -(-len(split) // batch_size)
    if count == 0:
        raise ValueError(
            f"{len(split)} images do not fill one batch of {batch_size}; use a smaller batch_size or more images"
        )
    return count


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    augment: Augment | None = None,
    drop_last: bool = False,
    device: str | torch.device = "cpu",
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over batches number `start` up to but without `stop` of one epoch.

    Batch number i depends on (seed, epoch, i) only, so `start=k` continues an interrupted epoch exactly. Crops, flips
    and order are the same on every device. drop_last leaves out an incomplete last batch.

    Yields x (n, C, H, W) float32 in [0, 1], channels_last, and y (n,) int64, both on `device`.
    Raises ValueError, when called, as `number_of_batches` does and for a negative start or stop.
    """
    count = number_of_batches(split, batch_size, drop_last)
    if start < 0 or (stop is not None and stop < 0):
        raise ValueError(f"start and stop must not be negative; got start {start}, stop {stop}")
    device = torch.device(device)

    def iterate() -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(split))
        if shuffle:
            order = torch.randperm(len(split), generator=generator(seed, "order", epoch))
        white = torch.tensor(255.0, device=device)
        for number in range(start, count if stop is None else min(stop, count)):
            chosen = order[number * batch_size : (number + 1) * batch_size]
            images, labels = split.images[chosen], split.labels[chosen]
            if augment is not None:
                images = augment(images, generator(seed, "augment", epoch, number))
            if device.type == "cuda":
                images, labels = images.pin_memory(), labels.pin_memory()
            yield as_input(images.to(device, non_blocking=True), white), labels.to(device, non_blocking=True)

    # An inner generator, so that bad arguments raise at the call and not at the first batch.
    return iterate()


def as_input(images: Tensor, white: Tensor) -> Tensor:
    """`images` (N, C, H, W) as new float32 in [0, 1], channels_last.

    The division is by a tensor on the same device, `white`: CUDA divides by a Python number by multiplying with its
    reciprocal, which rounds half of the 256 grey levels differently than the CPU.
    """
    # Allocated here because conversions leave the strides of one-channel images as they are; later layers go by them.
    x = torch.empty(images.shape, dtype=torch.float32, device=images.device, memory_format=torch.channels_last)
    x.copy_(images)
    return x.div_(white) if images.dtype == torch.uint8 else x
