"""The first cell of a supernet by itself, on what the supernet called it on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


class OneCell(nn.Module):
    """Calls the cell on the arguments that it had in a forward of the supernet: leaves, as far as they are numbers.

    A supernet that samples its candidates gives one call for each of the seeds.
    """

    def __init__(self, model: nn.Module, x: Tensor, seeds: range) -> None:
        super().__init__()
        self.cell = model.cells[0]
        self.method = "forward_hard" if getattr(model, "mode", "soft") != "soft" else "forward"
        self.calls: list[tuple[tuple, dict]] = []
        outputs: list[Tensor] = []
        original = getattr(self.cell, self.method)

        def record(*arguments, **options):
            self.calls.append((arguments, options))
            out = original(*arguments, **options)
            outputs.append(_images(out).detach())
            return out

        setattr(self.cell, self.method, record)
        try:
            for seed in seeds:
                model.seed = seed
                model(x)
        finally:
            delattr(self.cell, self.method)
        self.calls = tree_map_only(Tensor, _leaf, self.calls)
        self.cotangents = [torch.randn_like(out) for out in outputs]
        for module in self.cell.modules():  # weights that the supernet hands over as attributes
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    setattr(module, name, _leaf(value))

    def forward(self, call: int) -> Tensor:
        """The cell's output in one of the calls."""
        arguments, options = self.calls[call]
        return _images(getattr(self.cell, self.method)(*arguments, **options))

    def arranged(self, layout: torch.memory_format) -> OneCell:
        """Itself, its weights and all images in a memory format."""
        self.calls = tree_map_only(Tensor, lambda each: _leaf(each, layout), self.calls)
        self.cotangents = [each.contiguous(memory_format=layout) for each in self.cotangents]
        return self.to(memory_format=layout)

    def leaves(self) -> list[Tensor]:
        """What gradients are asked for: parameters, states and mixing weights, each once."""
        attributes = [value for module in self.cell.modules() for value in vars(module).values()]
        found = [*self.cell.parameters(), *tree_leaves(self.calls), *attributes]
        return list({id(each): each for each in found if isinstance(each, Tensor) and each.requires_grad}.values())

    def gradients(self, leaves: list[Tensor]) -> list[Tensor]:
        """Those of a fixed random sum of the output, for each of the calls."""
        found: list[Tensor | None] = []
        for call, cotangent in enumerate(self.cotangents):
            seed_drop_path(call, cotangent.device)
            found += torch.autograd.grad(self(call), leaves, cotangent, allow_unused=True)
        return [each for each in found if each is not None]


def seed_drop_path(seed: int, device: torch.device) -> None:
    """Of the generator that drop path draws from: `torch.manual_seed` formats a stack trace where CUDA sleeps."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _images(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out if isinstance(out, Tensor) else out[-1]


def _leaf(x: Tensor, layout: torch.memory_format = torch.preserve_format) -> Tensor:
    layout = layout if x.dim() == 4 else torch.preserve_format
    return x.detach().clone(memory_format=layout).requires_grad_(x.is_floating_point())

