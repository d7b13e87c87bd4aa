"""ReLU, 1x1 convolution and batch norm in plain PyTorch."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def relu_conv_norm(x: Tensor, weight: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """`norm(conv(relu(x)))`: x (N, C, H, W), weight (K, C, 1, 1) -> (N, K, H, W). No argument checks."""
    return norm(F.conv2d(F.relu(x), weight))
