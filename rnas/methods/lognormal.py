"""Log-normal algebra: sums by moment matching, products exactly, quantiles; differentiable, plain PyTorch.

A log-normal vector X = exp(Z), Z ~ N(mu, covariance), is held as (mu, covariance) of its logarithm. Sums of its entries
are approximated by the log-normal vector of the same means and covariances (Fenton, 1960; Wilkinson): E[S_f] and
E[S_f S_g] are exact, the shape of the distribution is not.

Legend: M summands, F sums, L cells, E edges of a cell, K candidate operations of an edge.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LogNormal(NamedTuple):
    """X = exp(Z), Z Gaussian: for numbers mu (...) and variance (...) of Z, for a vector mu (M,), covariance (M, M)."""

    mu: Tensor
    variance: Tensor


def standard_quantile(eta: float) -> float:
    """Phi^{-1}(eta) of the standard normal distribution. Raises ValueError unless 0 < eta < 1."""
    if not 0 < eta < 1:
        raise ValueError(f"eta is a probability between 0 and 1, both excluded; got {eta}")
    return math.sqrt(2) * float(torch.special.erfinv(torch.tensor(2 * eta - 1, dtype=torch.float64)))


def log_quantile(x: LogNormal, eta: float) -> Tensor:
    """ln of the eta-quantile of a log-normal number, `mu + Phi^{-1}(eta) s`: Pr(ln X <= it) = eta."""
    return x.mu + standard_quantile(eta) * x.variance.clamp_min(0).sqrt()


def probability_within(x: LogNormal, log_bound: Tensor | float) -> Tensor:
    """`Pr(ln X <= log_bound) = Phi((log_bound - mu) / s)` of a log-normal number: what `log_quantile` inverts."""
    return torch.special.ndtr((log_bound - x.mu) / x.variance.clamp_min(0).sqrt())


def mean(mu: Tensor, variance: Tensor) -> Tensor:
    """E[X] = exp(mu + variance / 2), elementwise."""
    return (mu + variance / 2).exp()


def sum_of_lognormals(mu: Tensor, variance: Tensor, weights: Tensor) -> LogNormal:
    """`sum_m weights[m] X_m` as one log-normal number, by its mean and variance.

    Args:
        mu: (..., M) of ln X.
        variance: (..., M) for independent X, or their covariance matrix (..., M, M).
        weights: (..., M), none negative, not all zero.

    Equivalent to, for independent X:
        E, V = (weights * mean).sum(-1), (weights**2 * expm1(variance) * mean**2).sum(-1)
        s2 = log(1 + V / E**2); LogNormal(log(E) - s2 / 2, s2)
    """
    covariance = variance.dim() == mu.dim() + 1
    parts = weights * mean(mu, variance.diagonal(dim1=-2, dim2=-1) if covariance else variance)
    if covariance:
        spread = (parts.unsqueeze(-2) @ variance.expm1() @ parts.unsqueeze(-1)).squeeze(-1).squeeze(-1)
    else:
        spread = (parts.square() * variance.expm1()).sum(-1)
    total = parts.sum(-1)
    matched = torch.log1p(spread / total.square())
    return LogNormal(total.log() - matched / 2, matched)


def sums_of_lognormals(x: LogNormal, weights: Tensor) -> LogNormal:
    """F sums `weights @ X` of one log-normal vector as a log-normal vector, by all their means and covariances.

    x: mu (M,), covariance (M, M). weights: (F, M), none negative, no row all zero. Returns mu (F,), covariance (F, F).
    The diagonal is `sum_of_lognormals` of every row.
    """
    parts = weights * mean(x.mu, x.variance.diagonal())
    total = parts.sum(1)
    covariance = torch.log1p(parts @ x.variance.expm1() @ parts.T / torch.outer(total, total))
    return LogNormal(total.log() - covariance.diagonal() / 2, covariance)


def product_of_lognormals(x: LogNormal, dim: int = -1) -> LogNormal:
    """The product of independent log-normal numbers along `dim`: mu and variance add. Exact."""
    return LogNormal(x.mu.sum(dim), x.variance.sum(dim))


def product_over_cells(
    alpha: LogNormal, beta: LogNormal, constants: Tensor, targets: Tensor, *, independent: bool = True
) -> LogNormal:
    """`prod_cells prod_nodes sum_i beta_ij sum_o alpha_ij,o lambda_ij,o` for the cells of one type, as one number.

    In the order of the formula: sum over operations, times beta, sum over a node's edges, product over nodes and cells.

    Args:
        alpha: mu (E * K,) and covariance (E * K, E * K) of ln alpha.
        beta: mu (E,) and covariance (E, E) of ln beta, independent of alpha.
        constants: lambda (L, E, K) of every cell of the type, none negative.
        targets: (E,) the node of each edge, counted from 0.
        independent: take the cells for independent factors, as the paper does: variances add. Else they are what they
            are, functions of one alpha and beta, and their covariances add too: n cells of equal lambda have n^2 times
            the variance of one.

    Source: RACL, arXiv 2009.00902, section 3.
    """
    cells, edges, _ = constants.shape
    nodes = int(targets.max()) + 1
    rows = torch.eye(edges, dtype=constants.dtype, device=constants.device)
    over_operations = (rows.unsqueeze(-1) * constants.unsqueeze(1)).reshape(cells * edges, -1)
    summed = sums_of_lognormals(alpha, _without_empty_rows(over_operations))
    weighted = LogNormal(summed.mu + beta.mu.repeat(cells), summed.variance + beta.variance.repeat(cells, cells))
    # an edge of which every lambda is 0 was given one only so that its logarithm exists: it adds nothing to its node
    alive = (constants.sum(2) > 0).to(constants.dtype)
    into_nodes = (targets == torch.arange(nodes, device=targets.device).unsqueeze(1)).to(constants.dtype)
    over_edges = torch.block_diag(*(into_nodes * cell for cell in alive))
    factors = sums_of_lognormals(weighted, over_edges)
    covariance = factors.variance
    if independent:
        same_cell = torch.arange(cells, device=constants.device).repeat_interleave(nodes)
        covariance = covariance * (same_cell.unsqueeze(0) == same_cell.unsqueeze(1))
    return LogNormal(factors.mu.sum(), covariance.sum())


def _without_empty_rows(weights: Tensor) -> Tensor:
    """Ones in rows that are all zero: the logarithm of their sum would be infinite, and its gradient NaN."""
    return torch.where((weights > 0).any(dim=1, keepdim=True), weights, torch.ones_like(weights))


class LogNormalParameter(nn.Module):
    """A trainable log-normal tensor `exp(mu + L z)`, z standard normal, L the Cholesky factor of the covariance.

    mu and log sigma are learned as offsets from where they start: the weight decay of their optimizer then pulls them
    there, to the uniform mixture as in DARTS, and not to weights of 1 (ours). L is diag(sigma), times a unit lower
    triangular matrix for a full covariance.

    Args:
        start: mu at the start, of any shape.
        sigma: standard deviations at the start.
        log_sigma_limits: between which ln sigma stays.
        full: train the whole covariance; else its diagonal.
    """

    def __init__(self, start: Tensor, *, sigma: float, log_sigma_limits: tuple[float, float], full: bool) -> None:
        super().__init__()
        self.register_buffer("start", start, persistent=False)
        self.mu_offset = nn.Parameter(torch.zeros_like(start))
        self.log_sigma_offset = nn.Parameter(torch.zeros_like(start))
        self.lower = nn.Parameter(start.new_zeros(start.numel(), start.numel())) if full else None
        self.log_sigma_start = math.log(sigma)
        self.limits = tuple(limit - self.log_sigma_start for limit in log_sigma_limits)

    @property
    def mu(self) -> Tensor:
        """Of the logarithm, in the shape of the tensor."""
        return self.start + self.mu_offset

    @property
    def sigma(self) -> Tensor:
        """Diagonal of L, in the shape of the tensor."""
        offset = self.log_sigma_offset
        # clamp has no gradient on its limits, where `project` puts what would leave: nothing would ever come back
        offset = offset + (offset.clamp(*self.limits) - offset).detach()
        return (self.log_sigma_start + offset).exp()

    def factor(self) -> Tensor:
        """L, (M, M)."""
        sigma = self.sigma.flatten()
        if self.lower is None:
            return sigma.diag()
        return sigma.diag() + sigma.unsqueeze(1) * self.lower.tril(-1)

    def log_normal(self) -> LogNormal:
        """mu (M,) and covariance (M, M) of the logarithms, in float64: ln lambda_F is a sum of many."""
        factor = self.factor().double()
        return LogNormal(self.mu.flatten().double(), factor @ factor.T)

    def forward(self, z: Tensor | None) -> Tensor:
        """The sample of z, in the shape of the tensor; None: the mean."""
        factor = self.factor()
        if z is None:
            return mean(self.mu, factor.square().sum(1).view_as(self.mu))
        return (self.mu + (factor @ z.to(factor).flatten()).view_as(self.mu)).exp()

    @torch.no_grad()
    def project(self) -> None:
        """Put log sigma back between its limits, so that it leaves them again as soon as its gradient turns."""
        self.log_sigma_offset.clamp_(*self.limits)
