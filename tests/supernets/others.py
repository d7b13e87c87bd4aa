"""Networks without a mixed operation: a plain CNN, two residual ones, a small vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Plain(nn.Sequential):
    """Convolutions of stride 2 with BN and ReLU, as many as `layers`, then a linear classifier."""

    def __init__(self, channels: int, layers: int, classes: int):
        modules: list[nn.Module] = []
        width = 3
        for layer in range(layers):
            wider = channels * 2 ** min(layer, 2)
            modules += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.BatchNorm2d(wider), nn.ReLU(inplace=True)]
            width = wider
        super().__init__(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride > 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, channels, ceil(H / stride), ceil(W / stride))."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class Residual(nn.Module):
    """A stem, `layers` stages of one block each, a linear classifier."""

    def __init__(self, channels: int, layers: int, classes: int):
        super().__init__()
        widths = [channels * 2**stage for stage in range(layers)]
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        pairs = zip([channels, *widths], widths)
        self.stages = nn.Sequential(*(Block(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairs)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes)."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class Attention(nn.Module):
    """Norm, attention and a hidden layer, each with a residual connection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) -> (N, tokens, width)."""
        batch, tokens, width = x.shape
        parts = self.query_key_value(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        attended = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.hidden(self.norm2(x))


class Transformer(nn.Module):
    """Patches of 8x8 pixels of a 32x32 image, `layers` attention blocks, the mean of the tokens classified."""

    def __init__(self, channels: int, layers: int, classes: int):
        super().__init__()
        width = 2 * channels
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*(Attention(width, 4) for _ in range(layers)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) -> logits (N, classes)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.blocks(tokens).mean(1))


class PaddedBlock(nn.Module):
    """Two convolutions in a Sequential each, and modules that do nothing in the place of a shortcut."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels_in, channels, 3, 1, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels))
        self.shortcut = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, channels, H, W)."""
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class Blocks(nn.Module):
    """Blocks of one width, `layers` of them, a linear classifier."""

    def __init__(self, channels: int, layers: int, classes: int):
        super().__init__()
        widths = [3, *[channels] * layers]
        self.blocks = nn.ModuleList(map(PaddedBlock, widths, widths[1:]))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes)."""
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


KINDS = {"plain": Plain, "residual": Residual, "blocks": Blocks, "transformer": Transformer}


def build(channels: int = 16, layers: int = 3, classes: int = 10, *, kind: str = "plain") -> nn.Module:
    """The network of one of `KINDS`: images (N, 3, 32, 32) -> logits (N, classes)."""
    return KINDS[kind](channels, layers, classes)
