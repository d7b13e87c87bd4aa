"""A PGD attack of your own around `rnas.kernels.pgd_step` and `random_start`, beside the usual lines.

    python examples/pgd_step.py

Step, projection on the ball and clamp are one pass over the pixels, in place; the result has the same bits.
"""

import torch
from torch import nn
from torch.nn import functional as F

from rnas.kernels import pgd_step, random_start

EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 7


def input_gradient(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of the cross entropy, (N, ...)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(network(x), y), x)[0]


def plain_attack(network: nn.Module, x: torch.Tensor, y: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """STEPS steps of plain PyTorch from `start`."""
    x_adv = start.clone()
    for _ in range(STEPS):
        x_adv = x_adv + STEP_SIZE * input_gradient(network, x_adv, y).sign()
        x_adv = torch.min(torch.max(x_adv, x - EPSILON), x + EPSILON).clamp(0, 1)
    return x_adv


def fused_attack(network: nn.Module, x: torch.Tensor, y: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The same with the kernel, in place."""
    x_adv = start.clone()
    for _ in range(STEPS):
        grad = input_gradient(network, x_adv, y)
        pgd_step(x_adv, grad, x, epsilon=EPSILON, step_size=STEP_SIZE, norm="linf", out=x_adv)
    return x_adv


def main() -> float:
    """The largest difference of a pixel."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 15 * 15, 10)).eval()
    x, y = torch.rand(16, 3, 32, 32), torch.randint(10, (16,))
    start = random_start(x, epsilon=EPSILON, norm="linf", generator=torch.Generator().manual_seed(1))
    found, expected = fused_attack(network, x, y, start), plain_attack(network, x, y, start)
    losses = [F.cross_entropy(network(images), y).item() for images in (x, start, found)]
    print("cross entropy: clean {:.3f}, random start {:.3f}, attacked {:.3f}".format(*losses))
    error = (found - expected).abs().max().item()
    print(f"pgd_step agrees with plain PyTorch to {error:.1e}")
    assert error < 1e-6 and losses[2] > max(losses[:2])
    assert (start - x).abs().max() <= EPSILON + 1e-6 and 0.4 < ((start - x).abs() / EPSILON).mean() < 0.5
    return error


if __name__ == "__main__":
    main()
