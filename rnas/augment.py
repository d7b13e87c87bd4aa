"""Augmentation of a whole batch at once: random crop with padding, horizontal flip, cutout.

N images, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Augment:
    """Random crop after zero padding, then horizontal flip with probability 1/2, then cutout.

    Cutout draws the centre of its square over the whole image and cuts off what hangs over the edge (DeVries and
    Taylor 2017, arXiv:1708.04552). Zeros are black, since images are in [0, 1] here and normalised in the network.
    """

    crop_padding: int = 0
    """Zero padding of a random crop, pixels per side (4 is usual for 32 x 32 images); 0 is off."""
    flip: bool = False
    """Random horizontal flip."""
    cutout: int = 0
    """Side of the square that cutout blanks, pixels; 0 is off."""

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"augment.{name} must be 0 (off) or a number of pixels; got {getattr(self, name)}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augmented copy of `images` (N, C, H, W) of any dtype, on the device of `generator`; same shape and dtype."""
        count, _, height, width = images.shape

        def draw(bound: int) -> Tensor:
            return torch.randint(bound, (count,), generator=generator, device=generator.device)

        # Drawn whether used or not, so that turning one part on leaves the others' numbers as they were.
        top, left = draw(2 * self.crop_padding + 1), draw(2 * self.crop_padding + 1)
        mirrored, row, column = draw(2).bool(), draw(height), draw(width)
        if self.crop_padding or self.flip:
            images = crop_and_flip(images, top, left, mirrored & self.flip, self.crop_padding)
        if self.cutout:
            images = cut_out(images, row, column, self.cutout)
        return images


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Crop the zero-padded `images` (N, C, H, W) back to their size and mirror some of them left to right.

    top, left: (N,) int64 in [0, 2 * padding], upper left corner of the crop in the padded image. mirrored: (N,) bool.
    Returns a new tensor in channels_last memory format.
    """
    count, channels, height, width = images.shape
    padded = pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    _, padded_height, padded_width, _ = padded.shape
    rows = top[:, None] + torch.arange(height, device=top.device)
    columns = torch.arange(width, device=left.device).expand(count, width)
    columns = left[:, None] + torch.where(mirrored[:, None], width - 1 - columns, columns)
    first_rows = torch.arange(count, device=top.device)[:, None] * padded_height
    pixels = (first_rows + rows)[:, :, None] * padded_width + columns[:, None, :]
    cropped = padded.reshape(-1, channels).index_select(0, pixels.reshape(-1))
    return cropped.reshape(count, height, width, channels).permute(0, 3, 1, 2)


def cut_out(images: Tensor, row: Tensor, column: Tensor, size: int) -> Tensor:
    """Zero a square of `size` x `size` pixels per image (N, C, H, W), cut off where it hangs over the edge.

    row, column: (N,) int64, its centre (for an even size the pixel right below it). Returns a new tensor.
    """

    def covered(centre: Tensor, length: int) -> Tensor:
        distance = torch.arange(length, device=centre.device) - (centre[:, None] - size // 2)
        return (distance >= 0) & (distance < size)

    square = covered(row, images.shape[2])[:, :, None] & covered(column, images.shape[3])[:, None, :]
    return images.masked_fill(square[:, None], 0)
