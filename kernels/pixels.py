"""What a convolution takes from images, gathered in front of a fused multiplication. Linear: any derivative exists."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rnas.kernels import backend, batched, formats, fused


def gather(x: Tensor) -> Tensor:
    """The pixels (2i, 2j) and those one further in both directions, side by side; zeros beyond an odd border.

    x (N, C, H, W) -> (N, 2C, ceil(H / 2), ceil(W / 2)), channels_last.
    """
    return _Gather.apply(x)


class PatchShape(NamedTuple):
    """A kernel (height, width), how it moves, and the size of what it makes."""

    height: int
    width: int
    stride: int
    padding: int
    height_out: int
    width_out: int


def patches(x: Tensor, shape: PatchShape) -> Tensor:
    """What the kernel sees at each of its positions, zeros beyond the border.

    x (N, C, H, W) -> (N, C * height * width, height_out, width_out), channels_last, in the order of a weight.
    """
    return _Patches.apply(x, shape)


class _Gather(torch.autograd.Function):
    """The even pixels and those one further side by side: (N, C, H, W) -> (N, 2C, H', W'), channels_last."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        n, c, h, w = x.shape
        out = formats.empty_image(x, 2 * c, -(-h // 2), -(-w // 2))
        image = formats.pixels_first(x)
        if fused.is_plain([image], torch.float32):
            addresses = fused.addresses([image, out])
            backend.module("cpu").gather_pixels(n, h, w, c, *addresses, torch.get_num_threads())
            return out
        out[:, :c] = x[:, :, ::2, ::2]
        odd = out[:, c:]
        odd[:, :, : h // 2, : w // 2] = x[:, :, 1::2, 1::2]
        if h % 2:
            odd[:, :, -1] = 0
        if w % 2:
            odd[:, :, :, -1] = 0
        return out

    @staticmethod
    @batched.one_at_a_time
    def backward(ctx, gradient):
        return _Scatter.apply(gradient, ctx.shape)


class _Scatter(torch.autograd.Function):
    """The transpose of _Gather."""

    @staticmethod
    def forward(ctx, pixels, shape):
        n, c, h, w = shape
        out = formats.empty_image(pixels, c, h, w)
        gathered = formats.pixels_first(pixels)
        if fused.is_plain([gathered], torch.float32):
            addresses = fused.addresses([gathered, out])
            backend.module("cpu").scatter_pixels(n, h, w, c, *addresses, torch.get_num_threads())
            return out
        out.zero_()
        out[:, :, ::2, ::2] = pixels[:, :c]
        out[:, :, 1::2, 1::2] = pixels[:, c:, : h // 2, : w // 2]
        return out

    @staticmethod
    @batched.one_at_a_time
    def backward(ctx, direction):
        return _Gather.apply(direction), None


class _Patches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shape):
        ctx.image, ctx.shape = x.shape, shape
        n, c, _, _ = x.shape
        out = formats.empty_image(x, c * shape.height * shape.width, shape.height_out, shape.width_out)
        if fused.is_watched([x]) or not x.is_cpu or x.dtype != torch.float32:
            found = F.unfold(x, shape[:2], padding=shape.padding, stride=shape.stride)
            return out.copy_(found.view(n, -1, shape.height_out, shape.width_out))
        addresses = fused.addresses([x, out])
        backend.module("cpu").gather_patches(x.shape, x.stride(), shape, *addresses, torch.get_num_threads())
        return out

    @staticmethod
    @batched.one_at_a_time
    def backward(ctx, gradient):
        return _Fold.apply(gradient, ctx.image, ctx.shape), None


class _Fold(torch.autograd.Function):
    """The transpose of _Patches."""

    @staticmethod
    def forward(ctx, patches, image, shape):
        ctx.shape = shape
        _, c, h, w = image
        out = formats.empty_image(patches, c, h, w)
        patches = formats.pixels_first(patches)
        if fused.is_plain([patches], torch.float32):
            addresses = fused.addresses([patches, out])
            backend.module("cpu").scatter_patches(image, out.stride(), shape, *addresses, torch.get_num_threads())
            return out
        columns = patches.permute(0, 3, 1, 2).flatten(2)
        return out.copy_(F.fold(columns, (h, w), shape[:2], padding=shape.padding, stride=shape.stride))

    @staticmethod
    @batched.one_at_a_time
    def backward(ctx, direction):
        return _Patches.apply(direction, ctx.shape), None, None
