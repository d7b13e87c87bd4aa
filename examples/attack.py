"""PGD with restarts, and robust accuracy over epsilon: `rnas.attacks` beside the loops that are usually written.

    python examples/attack.py

All restarts run as one batch, all radii as another; the network, in training mode here, is left as it was. Float64,
because in float32 the order of a sum decides the sign of the smallest gradients, and with it a whole step of a pixel.
"""

import torch
from torch import nn
from torch.nn import functional as F

from rnas.attacks import pgd, pgd_sweep

EPSILON, STEPS, RESTARTS = 8 / 255, 7, 4
EPSILONS = [0, 1 / 255, 2 / 255, 4 / 255, 8 / 255]


def plain_pgd(network: nn.Module, x, y, epsilon: float, restarts: int, generator: torch.Generator) -> torch.Tensor:
    """One restart after another; of each image the example with the largest loss is kept."""
    network.eval()
    found, highest = x.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype)
    for _ in range(restarts):
        noise = epsilon * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1)
        x_adv = (x + noise).clamp(0, 1)
        for _ in range(STEPS):
            x_adv.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(network(x_adv), y, reduction="sum"), x_adv)
            x_adv = x_adv.detach() + epsilon / 4 * grad.sign()
            x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
        with torch.no_grad():
            losses = F.cross_entropy(network(x_adv), y, reduction="none")
        better = losses > highest
        found[better], highest[better] = x_adv[better], losses[better]
    network.train()
    return found


def accuracy(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """The share of images that are classified rightly."""
    network.eval()
    with torch.no_grad():
        right = (network(x).argmax(1) == y).double().mean().item()
    network.train()
    return right


def main() -> float:
    """The largest difference of a pixel."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.LazyLinear(10)
    ).double()
    x = torch.rand(16, 3, 32, 32, dtype=torch.float64)
    for _ in range(20):
        network(x)  # running statistics
    y = network.eval()(x).argmax(1)  # right about all of them, so far
    network.train()

    settings = {"epsilon": EPSILON, "step_size": EPSILON / 4, "steps": STEPS, "restarts": RESTARTS}
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = pgd(network, x, y, **settings, restarts_at_once=RESTARTS, generator=torch.Generator().manual_seed(1))
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    expected = plain_pgd(network, x, y, EPSILON, RESTARTS, torch.Generator().manual_seed(1))
    error = (found - expected).abs().max().item()

    radii = {"epsilons": EPSILONS, "step_size": [epsilon / 4 for epsilon in EPSILONS], "steps": STEPS}
    swept = pgd_sweep(network, x, y, **radii, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    expected = torch.stack([plain_pgd(network, x, y, epsilon, 1, generator) for epsilon in EPSILONS])
    error = max(error, (swept - expected).abs().max().item())
    print(f"pgd and pgd_sweep agree with plain PyTorch to {error:.1e}")
    assert error < 1e-9

    seen = []
    counter = network.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    early = pgd_sweep(network, x, y, **radii, early_drop=True, generator=torch.Generator().manual_seed(1))
    counter.remove()
    curve = [accuracy(network, examples, y) for examples in early]
    print("epsilon  " + "  ".join(f"{255 * epsilon:3.0f}/255" for epsilon in EPSILONS))
    print("accuracy " + "  ".join(f"{right:7.0%}" for right in curve))
    print(f"images through the network: {sum(seen)} with early_drop, {STEPS * len(EPSILONS) * len(x)} without")
    assert curve[0] == 1 and curve == sorted(curve, reverse=True) and curve[-1] < 0.5
    assert sum(seen) < STEPS * len(EPSILONS) * len(x)
    return error


if __name__ == "__main__":
    main()
