"""Log-normal algebra against its definition, second moments by brute force, and a million samples."""

from __future__ import annotations

import math

import pytest
import torch

from rnas.methods.lognormal import (
    LogNormal,
    LogNormalParameter,
    log_quantile,
    probability_within,
    product_of_lognormals,
    product_over_cells,
    standard_quantile,
    sum_of_lognormals,
    sums_of_lognormals,
)
from rnas.spaces import DARTS

EDGES, CHOICES, SAMPLES, ETA = len(DARTS.edges), len(DARTS.primitives), 1_000_000, 0.9
TARGETS = torch.tensor([target - 2 for _, target in DARTS.edges])
INCOMING = torch.tensor([float((target == TARGETS).sum()) for target in TARGETS], dtype=torch.float64)
TYPES = [spec.cell_type for spec in DARTS.layout(8, 16)]
BASE = torch.tensor([0, 2, 1.2, 1, 3, 4, 2, 2.5], dtype=torch.float64)  # lambda of none, the pools, skip, convolutions
TOLERANCE = {0.1: 0.01, 0.3: 0.01, 0.6: 0.03}  # sigma: relative error of the quantile of ln lambda_F


def random_covariance(size: int, generator: torch.Generator, scale: float = 0.3) -> torch.Tensor:
    factor = scale * torch.randn(size, size, generator=generator, dtype=torch.float64) / math.sqrt(size)
    return factor @ factor.T


@pytest.fixture
def source() -> torch.Generator:
    return torch.Generator().manual_seed(int(torch.randint(2**31, ()).item()))


def test_the_normal_quantile_inverts_the_normal_distribution():
    for eta in (0.001, 0.1, 0.5, 0.9, 0.999):
        assert 0.5 * (1 + math.erf(standard_quantile(eta) / math.sqrt(2))) == pytest.approx(eta, rel=1e-9)
    assert standard_quantile(0.9) == pytest.approx(1.2815515655446004, rel=1e-12)
    for eta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="eta is a probability between 0 and 1"):
            standard_quantile(eta)


def test_a_sum_has_the_mean_and_the_variance_of_its_definition(source):
    mu, variance, weights = (torch.rand(3, 6, generator=source, dtype=torch.float64) for _ in range(3))
    weights[:, 0] = 0
    found = sum_of_lognormals(mu, variance, weights)
    expected = (weights * (mu + variance / 2).exp()).sum(1)
    spread = (weights**2 * (variance.exp() - 1) * (2 * mu + variance).exp()).sum(1)
    torch.testing.assert_close((found.mu + found.variance / 2).exp(), expected)
    torch.testing.assert_close((found.variance.exp() - 1) * expected**2, spread)
    matrices = torch.diag_embed(variance)
    torch.testing.assert_close(tuple(sum_of_lognormals(mu, matrices, weights)), tuple(found))


def test_one_summand_and_products_are_exact(source):
    mu, variance = (torch.rand(4, generator=source, dtype=torch.float64) for _ in range(2))
    alone = sum_of_lognormals(mu[:, None], variance[:, None], torch.full((4, 1), 2.0, dtype=torch.float64))
    torch.testing.assert_close(tuple(alone), (mu + math.log(2), variance))
    product = product_of_lognormals(LogNormal(mu, variance))
    assert float(product.mu) == pytest.approx(float(mu.sum()))
    assert float(product.variance) == pytest.approx(float(variance.sum()))


def test_joint_sums_have_the_covariances_of_brute_force(source):
    x = LogNormal(torch.rand(5, generator=source, dtype=torch.float64), random_covariance(5, source))
    weights = torch.rand(3, 5, generator=source, dtype=torch.float64)
    found = sums_of_lognormals(x, weights)
    means = [(x.mu[m] + x.variance[m, m] / 2).exp() for m in range(5)]
    for f in range(3):
        for g in range(3):
            expected = sum(
                weights[f, m] * weights[g, n] * means[m] * means[n] * x.variance[m, n].exp()
                for m in range(5)
                for n in range(5)
            )
            both = found.mu[f] + found.mu[g] + (found.variance[f, f] + found.variance[g, g]) / 2 + found.variance[f, g]
            assert float(both.exp()) == pytest.approx(float(expected), rel=1e-12)
    single = sum_of_lognormals(x.mu, x.variance, weights[1])
    torch.testing.assert_close((found.mu[1], found.variance[1, 1]), tuple(single))


def distributions(sigma: float) -> tuple[LogNormal, LogNormal]:
    alpha = torch.full((EDGES * CHOICES,), -math.log(CHOICES), dtype=torch.float64)
    eye = torch.eye(EDGES * CHOICES, dtype=torch.float64)
    return LogNormal(alpha, sigma**2 * eye), LogNormal(-INCOMING.log(), sigma**2 * eye[:EDGES, :EDGES])


def chain(sigma: float, constants: torch.Tensor, independent: bool) -> LogNormal:
    factors = [
        product_over_cells(
            *distributions(sigma),
            constants[[index for index, each in enumerate(TYPES) if each == name]],
            TARGETS,
            independent=independent,
        )
        for name in DARTS.cell_types
    ]
    return LogNormal(sum(factor.mu for factor in factors), sum(factor.variance for factor in factors))


def network(source: torch.Generator, spread: float = 0.3) -> torch.Tensor:
    return BASE * (spread * torch.randn(8, EDGES, CHOICES, generator=source, dtype=torch.float64)).exp()


def test_the_chain_by_covariances_equals_the_chain_of_independent_sums(source):
    """Within a cell of diagonal covariance all summands are independent, so the plain formulas hold step by step."""
    sigma, constants = 0.4, network(source)
    alpha, beta = distributions(sigma)
    mu, variance = 0.0, 0.0
    for cell in constants:
        edges = sum_of_lognormals(alpha.mu.view(EDGES, CHOICES), torch.full_like(cell, sigma**2), cell)
        weighted = LogNormal(edges.mu + beta.mu, edges.variance + sigma**2)
        for node in range(DARTS.nodes):
            own = TARGETS == node
            factor = sum_of_lognormals(weighted.mu[own], weighted.variance[own], torch.ones_like(weighted.mu[own]))
            mu, variance = mu + factor.mu, variance + factor.variance
    torch.testing.assert_close(tuple(chain(sigma, constants, independent=True)), (mu, variance))


def test_n_equal_cells_that_share_alpha_have_n_squared_times_the_variance(source):
    cell = network(source)[:1]
    one = product_over_cells(*distributions(0.3), cell, TARGETS)
    for independent, factor in ((True, 5), (False, 25)):
        five = product_over_cells(*distributions(0.3), cell.repeat(5, 1, 1), TARGETS, independent=independent)
        torch.testing.assert_close(tuple(five), (5 * one.mu, factor * one.variance))


def test_operations_and_edges_of_lambda_zero_add_nothing_and_leave_gradients_finite(source):
    cell = network(source)[:1]
    cell[0, 3] = 0  # an edge into the second node
    alpha, beta = distributions(0.3)
    mu = alpha.mu.clone().requires_grad_()
    found = product_over_cells(LogNormal(mu, alpha.variance), beta, cell, TARGETS)
    (gradient,) = torch.autograd.grad(log_quantile(found, ETA), mu)
    assert gradient.isfinite().all() and not gradient.view(EDGES, CHOICES)[3].any()
    assert (gradient.view(EDGES, CHOICES)[2, 1:] > 0).all()
    cell[0, 3] = 1e-12
    almost = product_over_cells(alpha, beta, cell, TARGETS)
    torch.testing.assert_close(tuple(found), tuple(almost))


def sample(sigma: float, constants: torch.Tensor, source: torch.Generator) -> dict[bool, torch.Tensor]:
    """ln lambda_F of samples, by whether cells are independent. Those take the noise of other samples in every cell."""
    chunk, found = 50_000, {True: [], False: []}
    into = (torch.arange(DARTS.nodes).unsqueeze(1) == TARGETS).float()
    for _ in range(SAMPLES // chunk):
        totals = {True: 0.0, False: 0.0}
        for name in DARTS.cell_types:
            alpha = (sigma * torch.randn(chunk, EDGES * CHOICES, generator=source)).exp_() / CHOICES
            beta = (sigma * torch.randn(chunk, EDGES, generator=source)).exp_() / INCOMING.float()
            for index in (index for index, each in enumerate(TYPES) if each == name):
                edges = beta * (alpha @ torch.block_diag(*constants[index].float()).T)
                cell = (edges @ into.T).log().sum(1)
                totals[False] = totals[False] + cell
                totals[True] = totals[True] + cell.roll(7 * index)
        for independent, total in totals.items():
            found[independent].append(total)
    return {independent: torch.cat(totals).double() for independent, totals in found.items()}


@pytest.mark.parametrize("sigma", TOLERANCE)
def test_the_quantile_of_the_network_is_that_of_a_million_samples(sigma, source):
    """Eight cells of 14 edges and 8 operations. Measured once: errors of 0.001% to 0.07%, confidences of 0.898 to 0.901."""
    constants = network(source)
    for independent, totals in sample(sigma, constants, source).items():
        lambda_f = chain(sigma, constants, independent)
        found = float(log_quantile(lambda_f, ETA))
        expected = float(totals.kthvalue(int(ETA * SAMPLES)).values)
        assert abs(found - expected) <= TOLERANCE[sigma] * abs(expected)
        # the quantile is dominated by mu; the confidence is what tells whether the spread is right too
        assert float((totals <= found).double().mean()) == pytest.approx(ETA, abs=0.005)
        wrong = chain(sigma, constants, not independent)
        if sigma > 0.1:
            assert float((totals <= float(log_quantile(wrong, ETA))).double().mean()) != pytest.approx(ETA, abs=0.03)


def test_the_probability_is_the_share_of_samples_and_inverts_the_quantile(source):
    mu, variance = torch.randn(5, generator=source).double(), 0.1 + torch.rand(5, generator=source).double()
    x = LogNormal(mu, variance)
    bounds = mu + torch.tensor([-1.5, -0.3, 0.0, 0.6, 2.0])
    samples = mu + variance.sqrt() * torch.randn(200_000, 5, generator=source, dtype=torch.float64)
    torch.testing.assert_close(
        probability_within(x, bounds), (samples <= bounds).double().mean(0), atol=0.006, rtol=0
    )  # 5 standard deviations of a share of 200,000
    for eta in (0.05, 0.5, 0.9, 0.999):
        torch.testing.assert_close(probability_within(x, log_quantile(x, eta)), torch.full_like(mu, eta))


@pytest.mark.parametrize("full", [False, True])
def test_the_parameter_is_the_distribution_that_it_says(full, source):
    start = torch.rand(2, 3, generator=source)
    parameter = LogNormalParameter(start, sigma=0.2, log_sigma_limits=(-4.0, 0.5), full=full).double()
    with torch.no_grad():
        for each in parameter.parameters():
            each.copy_(0.3 * torch.randn(each.shape, generator=source))
        mu, covariance = parameter.log_normal()
        z = torch.randn(200_000, 6, generator=source)
        samples = torch.stack([parameter(each) for each in z[:4]])
        logs = mu + z.double() @ parameter.factor().T
        torch.testing.assert_close(samples.flatten(1).log(), logs[:4])
        torch.testing.assert_close(logs.T.cov(), covariance, rtol=0.05, atol=2e-3)
        torch.testing.assert_close(logs.exp().mean(0), parameter(None).flatten(), rtol=0.01, atol=0)
    assert bool((covariance - covariance.diagonal().diag()).abs().max() > 1e-3) == full


def test_a_log_sigma_beyond_its_limits_counts_as_the_limit_and_comes_back():
    parameter = LogNormalParameter(torch.zeros(3), sigma=0.1, log_sigma_limits=(-4.0, 0.5), full=False)
    with torch.no_grad():
        parameter.log_sigma_offset.copy_(torch.tensor([-9.0, 0.0, 9.0]))
    expected = torch.tensor([math.exp(-4), 0.1, math.exp(0.5)])
    torch.testing.assert_close(parameter.sigma, expected)
    parameter.project()
    torch.testing.assert_close(parameter.sigma, expected)
    torch.testing.assert_close(parameter.log_sigma_offset.detach(), (expected / 0.1).log())
    assert (torch.autograd.grad(parameter.sigma.sum(), parameter.log_sigma_offset)[0] > 0).all()
