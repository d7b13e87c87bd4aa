"""What an attack is given, checked once and brought into one form.

Legend: N images, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """The clean images under attack with all that belongs to each, and `index`, their places in the caller's batch."""

    x: Tensor
    y: Tensor
    epsilon: float | Tensor
    step_size: float | Tensor
    index: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, epsilon: float | Tensor, step_size: float | Tensor) -> Images:
        x = _plain(x)
        x = x.contiguous(memory_format=_memory_format(x))
        index = torch.arange(x.shape[0], device=x.device)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        epsilon, step_size = (
            _plain(value).to(x.device, dtype) if isinstance(value, Tensor) else value for value in (epsilon, step_size)
        )
        return cls(x, _plain(y).to(x.device, torch.int64), epsilon, step_size, index)

    @property
    def count(self) -> int:
        return self.x.shape[0]

    def take(self, chosen: Tensor | slice) -> Images:
        epsilon, step_size = (
            value[chosen] if isinstance(value, Tensor) else value for value in (self.epsilon, self.step_size)
        )
        return Images(take_images(self.x, chosen), self.y[chosen], epsilon, step_size, self.index[chosen])

    def repeat(self, copies: int) -> Images:
        """The whole batch `copies` times, one copy behind the other."""
        if copies == 1:
            return self
        epsilon, step_size = (
            value.repeat(copies) if isinstance(value, Tensor) else value for value in (self.epsilon, self.step_size)
        )
        x = torch.cat([self.x] * copies)  # keeps the memory format, which x.repeat does not
        return Images(x, self.y.repeat(copies), epsilon, step_size, self.index.repeat(copies))


def _plain(tensor: Tensor) -> Tensor:
    """Autograd refuses to save tensors made in inference mode, so those are copied; others share their memory."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def take_images(x: Tensor, chosen: Tensor | slice) -> Tensor:
    """x[chosen] in the memory format of x, which indexing alone does not keep."""
    return x[chosen].contiguous(memory_format=_memory_format(x))


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError, naming the choices, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_images(x: Tensor, lower: float, upper: float) -> None:
    """Raise TypeError unless x holds floating-point images (N, ...), ValueError unless all are inside the box."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        came = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating point tensor of images, got {came}: for bytes type x.float() / 255")
    if x.dim() < 2:
        raise ValueError(f"x must have shape (N, C, H, W) or (N, ...), got {tuple(x.shape)}")
    if not lower <= upper:
        raise ValueError(f"lower must not exceed upper, got [{lower}, {upper}]")
    if x.numel() == 0:
        return
    smallest, largest = torch.stack(x.detach().aminmax()).tolist()
    if not (lower <= smallest and largest <= upper):  # written so that NaN fails
        raise ValueError(
            f"x must lie in [lower, upper] = [{lower}, {upper}], got values in [{smallest}, {largest}]: "
            "attacks work on pixels, so normalisation belongs into the model"
        )


def check_labels(y: Tensor, count: int) -> int:
    """The highest label, -1 if there is none: looked at here, once, because later a look would stall the device."""
    if not isinstance(y, Tensor) or y.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        came = f"a tensor of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y must be a tensor of integer labels, got {came}: type y.long(), or y.argmax(1) for one-hot")
    if y.shape != (count,):
        raise ValueError(f"y must have shape (N,) = ({count},), one label per image, got {tuple(y.shape)}")
    if count == 0:
        return -1
    lowest, highest = torch.stack(y.aminmax()).tolist()
    if lowest < 0:
        raise ValueError(f"labels must be at least 0, got {lowest}")
    return highest


def check_per_image(name: str, value: float | Tensor, x: Tensor, limit: float = math.inf) -> float | Tensor:
    """A number, or a tensor (N,), checked to lie in [0, limit] and to be finite."""
    count = x.shape[0]
    if isinstance(value, Tensor):
        if value.shape not in ((), (count,)):
            hint = f": type {name}.reshape(-1)" if value.numel() == count else ""
            raise ValueError(
                f"{name} must be a number or a tensor of shape (N,) = ({count},), one value per image, "
                f"got shape {tuple(value.shape)}{hint}"
            )
        if value.dim() == 0:
            value = value.item()
    if isinstance(value, Tensor):
        lowest, highest = torch.stack(value.detach().aminmax()).tolist() if count else (0.0, 0.0)
    elif isinstance(value, Real):
        lowest = highest = value = float(value)
    else:
        raise TypeError(f"{name} must be a number or a tensor of shape (N,) = ({count},), got {type(value).__name__}")
    if not (lowest >= 0 and highest < math.inf):
        wrong = highest if lowest >= 0 else lowest
        raise ValueError(f"{name} must be finite and not negative, in pixel units, got {wrong}")
    if highest > limit:
        raise ValueError(
            f"{name} must not exceed the width of the box [lower, upper], {limit}, got {highest}: for "
            "8 of 255 grey levels type 8 / 255"
        )
    return value


def check_radii(
    name: str, values: float | Sequence[float | Tensor] | Tensor, x: Tensor, limit: float = math.inf, *, count: int = 0
) -> Tensor:
    """(E, N): one row for each radius, from E numbers, a tensor (E,), or E rows (N,) with a value per image.

    With `count` there must be as many rows, and a number stands for all of them.
    """
    if count and (isinstance(values, Real) or (isinstance(values, Tensor) and values.dim() == 0)):
        values = [values] * count
    shapes = "E numbers or a tensor (E,) or (E, N), one row for each radius"
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise TypeError(f"{name} must be {shapes}, got {type(values).__name__}: for one radius type [8 / 255]")
    if isinstance(values, Tensor) and values.dim() not in (1, 2):
        raise ValueError(f"{name} must be {shapes}, got shape {tuple(values.shape)}")
    if len(values) != count if count else len(values) == 0:
        raise ValueError(f"{name} must be {shapes}, {f'E = {count}' if count else 'at least one'}, got {len(values)}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = [check_per_image(f"{name}[{index}]", value, x, limit) for index, value in enumerate(values)]
    return torch.stack([torch.as_tensor(row, dtype=dtype, device=x.device).detach().expand(x.shape[0]) for row in rows])


def check_ascending(name: str, radii: Tensor) -> None:
    """Raise ValueError unless every column of radii (E, N) ascends."""
    if (radii.diff(dim=0) < 0).any():
        raise ValueError(
            f"{name} must ascend, for every image, so that a ball holds the smaller ones: "
            f"type torch.as_tensor({name}).sort(dim=0).values"
        )
