"""Training against the input gradients of the logits: `rnas.kernels.jacobian_norm` beside torch.func.

    python examples/jacobian_norm.py

The norm is differentiable, so it can be added to any loss; "projection" estimates it from one backward pass.
"""

import torch
from torch import nn
from torch.nn import functional as F

from rnas.kernels import jacobian_norm


def plain(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(N,): the mean over the K rows of their norms."""
    jacobian = torch.func.vmap(torch.func.jacrev(lambda image: network(image[None])[0]))(x)  # (N, K, 1, H, W)
    return jacobian.flatten(2).norm(2, dim=2).mean(dim=1)


def main() -> float:
    """The largest relative difference, over the norms and the gradients of a loss that holds them."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8 * 7 * 7, 10)
    )
    x, y = torch.rand(16, 1, 28, 28), torch.randint(10, (16,))
    results = []
    for norms in (plain(network, x), jacobian_norm(network, x, q=2, estimator="exact")):
        loss = F.cross_entropy(network(x), y) + 0.1 * norms.mean()
        results.append([norms, *torch.autograd.grad(loss, list(network.parameters()))])
    error = max(((found - expected).norm() / expected.norm()).item() for expected, found in zip(*results))
    print(f"jacobian_norm and the gradients of the weights agree with torch.func to {error:.1e}")
    assert error < 1e-4

    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    before = jacobian_norm(network, x, create_graph=False).mean().item()
    for _ in range(20):
        optimizer.zero_grad()
        jacobian_norm(network, x, estimator="projection", samples=1).mean().backward()
        optimizer.step()
    after = jacobian_norm(network, x, create_graph=False).mean().item()
    print(f"mean norm {before:.3f}, and {after:.3f} after 20 steps on a one-sample estimate of it")
    assert after < before
    return error


if __name__ == "__main__":
    main()
