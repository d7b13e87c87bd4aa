"""Convolutions with their batch norms in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv2d(x: Tensor, weight: Tensor, *, stride: int, padding: int = 0) -> Tensor:
    """`F.conv2d`, x (N, C, H, W), weight (K, C, h, w); on the CPU 1x1 convolutions take every `stride`-th pixel first.

    On machines with AVX2 and no more, oneDNN (of torch 2.14) otherwise gets the gradient of its weight wrong where C is
    no multiple of 8 and images are channels last, and writes where it may not.
    """
    if weight.shape[2:] == (1, 1) and padding == 0 and x.device.type == "cpu":
        x, stride = x[:, :, ::stride, ::stride], 1
    return F.conv2d(x, weight, stride=stride, padding=padding)


def relu_conv_norm(x: Tensor, weight: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """`norm(conv(relu(x)))`: x (N, C, H, W), weight (K, C, 1, 1) -> (N, K, H, W). No argument checks."""
    return norm(F.conv2d(F.relu(x), weight))


def conv_norm(x: Tensor, weight: Tensor, norm: nn.BatchNorm2d, *, stride: int = 1, padding: int = 0) -> Tensor:
    """`norm(conv(x))`: x (N, C, H, W), weight (K, C, h, w) -> (N, K, H', W'). No argument checks."""
    return norm(conv2d(x, weight, stride=stride, padding=padding))


def factorized_reduce(x: Tensor, even: Tensor, odd: Tensor | None, norm: nn.BatchNorm2d) -> Tensor:
    """Half of the channels from the even pixels, half from those one further, with zeros beyond an odd border.

    x (N, C, H, W), even (K', C, 1, 1), odd (K'', C, 1, 1) or None -> (N, K' + K'', ceil(H / 2), ceil(W / 2)).
    """
    x = F.relu(x)
    out = conv2d(x, even, stride=2)
    if odd is None:
        return norm(out)
    shifted = F.pad(x[:, :, 1:, 1:], (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    return norm(torch.cat([out, conv2d(shifted, odd, stride=2)], dim=1))
