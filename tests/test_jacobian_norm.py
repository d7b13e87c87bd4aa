"""The Jacobian norm: its definition, its estimators without bias, its gradients, and the care it takes of the model."""

from __future__ import annotations

import copy
import math
import re
import textwrap
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnas import attacks
from rnas.kernels import backend, jacobian_norm
from rnas.spaces import DARTS
from rnas.supernet import Supernet

SPACE = replace(DARTS, nodes=2)
DRAWS = 20_000
SIGMAS = 4.5  # a correct estimator is further off once in 150,000 tests
ESTIMATORS = ("exact", "sampled", "projection", "top")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(model, x: Tensor) -> Tensor:
    """The Jacobians (N, K, D), one image at a time by PyTorch's own function."""
    found = [torch.autograd.functional.jacobian(lambda image: model(image)[0], image[None]) for image in x]
    return torch.stack([each.flatten(1) for each in found])


def smooth(classes: int = 5, seed: int = 0) -> nn.Module:
    """A classifier of (N, 2, 3, 3) images without kinks, its BN on running statistics that are not the usual 0 and 1."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    layers = (nn.Conv2d(2, 4, 3, padding=1), norm, nn.Tanh(), nn.Flatten(), nn.Linear(36, classes))
    return nn.Sequential(*layers).double().eval()


def images(count: int = 3, seed: int = 1) -> Tensor:
    return torch.rand(count, 2, 3, 3, generator=seeded(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def trained():
    """A supernet of two nodes in float64 with running statistics as after some training, images, and alpha."""
    torch.manual_seed(3)
    net = Supernet(SPACE, channels=4, layers=3, num_classes=3).double()
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    alpha = {name: torch.randn(5, 8, dtype=torch.float64) for name in SPACE.cell_types}
    with torch.no_grad():
        for _ in range(20):
            net(x, softmax(alpha))
    return net.eval(), x, alpha


@pytest.fixture
def supernet(trained):
    return copy.deepcopy(trained)


def fused_where_built(monkeypatch) -> None:
    """From here on the compiled CPU kernels serve float32, without a way around them, where they are built."""
    monkeypatch.setenv("RNAS_BACKEND", "reference" if isinstance(backend.load("cpu"), str) else "cpu")


def softmax(alpha: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.softmax(dim=1) for name, each in alpha.items()}


# ---- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1, 2])
def test_exact_and_top_are_norms_of_the_rows_of_the_jacobian(q):
    model, x = smooth(), images()
    norms = rows(model, x).norm(q, dim=2)
    torch.testing.assert_close(jacobian_norm(model, x, q=q), norms.mean(dim=1), rtol=1e-12, atol=0)
    top = norms[torch.arange(3), model(x).argmax(dim=1)]
    torch.testing.assert_close(jacobian_norm(model, x, q=q, estimator="top"), top, rtol=1e-12, atol=0)
    every = jacobian_norm(model, x, q=q, estimator="sampled", samples=5, generator=seeded())
    torch.testing.assert_close(every, norms.mean(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("q", [1, 2])
def test_the_fused_supernet_gives_the_norms_of_float64(supernet, monkeypatch, q):
    net, x, alpha = supernet
    exact = rows(lambda image: net(image, softmax(alpha)), x).norm(q, dim=2).mean(dim=1)
    net, x = net.float(), x.float()
    fused_where_built(monkeypatch)
    found = jacobian_norm(lambda z: net(z, {name: each.float() for name, each in softmax(alpha).items()}), x, q=q)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.parametrize("estimator", ["sampled", "projection"])
def test_with_one_logit_every_estimator_is_exact(q, estimator):
    model, x = smooth(classes=1), images()
    found = jacobian_norm(model, x, q=q, estimator=estimator, generator=seeded())
    torch.testing.assert_close(found, jacobian_norm(model, x, q=q), rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", ["exact", "top"])
@pytest.mark.parametrize("q", [1, 2])
def test_an_image_is_measured_alike_in_every_batch(estimator, q):
    model, x = smooth(), images(5)
    whole = jacobian_norm(model, x, q=q, estimator=estimator)
    single = torch.cat([jacobian_norm(model, image[None], q=q, estimator=estimator) for image in x])
    torch.testing.assert_close(whole, single, rtol=1e-12, atol=0)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(jacobian_norm(model, x[order], q=q, estimator=estimator), whole[order])
    assert whole.std() > 0.01 * whole.mean(), "images that measure alike would prove nothing"


# ---- estimators: the mean over many draws, within its standard error -------------------------------------------------


def expected(estimator: str, q: int, model, image: Tensor) -> tuple[float, object]:
    """What is estimated without bias, by definition, and the function of the returned values whose mean it is."""
    jacobian = rows(model, image)[0]
    if estimator == "sampled":
        return jacobian.norm(q, dim=1).mean().item(), lambda values: values
    if q == 2:
        return jacobian.square().sum().item(), lambda values: jacobian.shape[0] * values.square()
    return jacobian.square().mean(dim=0).sqrt().sum().item(), lambda values: values


def deviation(values: Tensor, truth: float) -> float:
    """Distance of the mean from the truth in standard errors."""
    return abs(values.mean().item() - truth) / (values.std().item() / math.sqrt(len(values)))


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("estimator", "q"), [("projection", 2), ("projection", 1), ("sampled", 1), ("sampled", 2)])
def test_an_estimator_has_no_bias(estimator, q, samples):
    model, image = smooth(), images(1)
    truth, transform = expected(estimator, q, model, image)
    many = image.expand(DRAWS, -1, -1, -1)
    values = jacobian_norm(
        model, many, q=q, estimator=estimator, samples=samples, generator=seeded(7), create_graph=False
    )
    values = transform(values)
    assert deviation(values, truth) < SIGMAS
    assert deviation(1.03 * values, truth) > SIGMAS, "a scale wrong by 3% must be seen"


def test_a_wrong_constant_of_the_projection_is_seen(monkeypatch):
    import sys

    model, image = smooth(), images(1)
    truth, _ = expected("projection", 1, model, image)
    # Gaussian directions in place of unit vectors: sqrt(2 / pi) for E|v_1| and no sqrt(K)
    monkeypatch.setattr(sys.modules["rnas.kernels.jacobian_norm"], "_mean_coordinate", lambda k: math.sqrt(2 / math.pi))
    values = jacobian_norm(model, image.expand(DRAWS, -1, -1, -1), q=1, estimator="projection", generator=seeded(7))
    assert deviation(values.detach(), truth) > SIGMAS


def test_the_gradient_of_sampled_rows_has_no_bias():
    """Each copy of the image has its own copy of one weight, and so its own gradient."""
    model, image = smooth(), images(1)
    bend = torch.ones(DRAWS, 1, 1, 1, dtype=torch.float64, requires_grad=True)

    def bent(x):
        return model[3:](torch.tanh(model[:2](x) * (bend if len(x) == DRAWS else one)))

    values = jacobian_norm(bent, image.expand(DRAWS, -1, -1, -1), q=1, estimator="sampled", generator=seeded(7))
    (found,) = torch.autograd.grad(values.sum(), bend)
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    (truth,) = torch.autograd.grad(jacobian_norm(bent, image, q=1).sum(), one)
    assert deviation(found.flatten(), truth.item()) < SIGMAS
    assert deviation(1.03 * found.flatten(), truth.item()) > SIGMAS


@pytest.mark.parametrize("q", [1, 2])
def test_the_projections_mean_lies_between_the_exact_value_and_sqrt_k_times_it(q):
    jacobian = rows(smooth(), images())
    exact, projected = jacobian.norm(q, dim=2).mean(dim=1), jacobian.square().mean(dim=1).sqrt().norm(q, dim=1)
    assert (exact <= projected).all() and (projected <= math.sqrt(5) * exact).all()


def test_a_generator_decides_the_draws():
    model, x = smooth(), images()
    for estimator in ("sampled", "projection"):
        first, again, other = (
            jacobian_norm(model, x, estimator=estimator, generator=seeded(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("q", [1, 2])
def test_gradients_to_weights_and_images_are_those_of_the_returned_value(estimator, q):
    model, x = smooth(), images(2).requires_grad_()
    weight = model[0].weight.detach().clone().requires_grad_()

    def value(weight, x):
        def call(z):
            return torch.func.functional_call(model, {"0.weight": weight}, z)

        return jacobian_norm(call, x, q=q, estimator=estimator, samples=2, generator=seeded(5))

    assert torch.autograd.gradcheck(value, (weight, x), eps=1e-6, atol=1e-6, rtol=1e-5)
    assert value(weight, x).sum().requires_grad


def test_a_regulariser_with_a_weight_for_each_sample_is_what_the_docstring_says():
    (code,) = re.findall(r"As a regulariser.*?::\n\n(.*?)\n\n", jacobian_norm.__doc__, flags=re.DOTALL)
    model, x, y = smooth().train(), images(), torch.tensor([0, 3, 1])
    weight = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    names = {"F": F, "jacobian_norm": jacobian_norm, "model": model, "x": x, "y": y, "weight": weight}
    exec(textwrap.dedent(code), names)
    found = torch.autograd.grad(names["loss"], list(model.parameters()))
    assert model.training

    by_hand = smooth().train()
    loss = F.cross_entropy(by_hand(x), y, reduction="none")
    by_hand.eval()
    leaf = x.clone().requires_grad_()
    logits = by_hand(leaf)
    rows_of_j = [torch.autograd.grad(logits[:, k].sum(), leaf, create_graph=True)[0] for k in range(5)]
    norms = torch.stack([row.flatten(1).norm(dim=1) for row in rows_of_j]).mean(dim=0)
    expected = torch.autograd.grad((loss + weight * norms).mean(), list(by_hand.parameters()))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("estimator", "q"), [("exact", 1), ("sampled", 2), ("projection", 2), ("top", 1)])
def test_gradients_of_the_supernet_equal_finite_differences(supernet, estimator, q):
    net, x, alpha = supernet
    for leaf in alpha.values():
        leaf.requires_grad_()

    def value() -> Tensor:
        def call(z):
            return net(z, softmax(alpha))

        return jacobian_norm(call, x, q=q, estimator=estimator, samples=2, generator=seeded(5)).mean()

    for leaves in (list(alpha.values()), list(net.parameters())):
        gradients = torch.autograd.grad(value(), leaves, allow_unused=True)
        # Short steps along one random unit vector of all leaves: a ReLU that turns around makes the Jacobian jump.
        directions = [torch.randn(leaf.shape, generator=seeded(11), dtype=torch.float64) for leaf in leaves]
        length = torch.stack([direction.norm() for direction in directions]).norm()
        directions = [direction / length for direction in directions]
        slope = sum((g * d).sum().item() for g, d in zip(gradients, directions) if g is not None)

        def moved(step: float, leaves=leaves, directions=directions) -> float:
            with torch.no_grad():
                torch._foreach_add_(leaves, directions, alpha=step)
                result = value().item()
                torch._foreach_add_(leaves, directions, alpha=-step)
            return result

        expected = (moved(1e-7) - moved(-1e-7)) / 2e-7
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-6 * value().item())
        assert abs(expected) > 1e-3 * value().item(), "a slope of zero would prove nothing"


def test_fused_gradients_to_alpha_and_weights_are_those_of_float64(supernet, monkeypatch):
    net, x, alpha = supernet

    def gradients(net, x, alpha):
        leaves = [*(each.requires_grad_() for each in alpha.values()), net.stem[0].weight]
        values = jacobian_norm(lambda z: net(z, softmax(alpha)), x, q=1)
        return torch.autograd.grad(values.mean(), leaves)

    exact = gradients(net, x, alpha)
    fused_where_built(monkeypatch)
    single = gradients(
        copy.deepcopy(net).float(), x.float(), {name: each.detach().float() for name, each in alpha.items()}
    )
    for found, expected in zip(single, exact):
        assert (found.double() - expected).norm() < 2e-5 * expected.norm()


@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_image_without_any_influence_measures_zero_with_gradient_zero(q, estimator):
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    values = jacobian_norm(lambda x: scale * x.flatten(1), images(), q=q, estimator=estimator, generator=seeded())
    assert torch.equal(values, torch.zeros(3, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(values.square().sum(), scale)
    assert gradient == 0


# ---- care for what belongs to the caller -----------------------------------------------------------------------------


def test_no_grad_field_no_hook_and_no_buffer_is_touched():
    model, x = smooth(), images().requires_grad_()
    called = []
    x.register_hook(lambda gradient: called.append("x"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    value = jacobian_norm(model, x)
    assert not called and x.grad is None and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    value.sum().backward()
    assert called and x.grad is not None and all(p.grad is not None for p in [model[0].weight, model[4].weight])


def test_the_graph_is_made_only_where_it_is_wanted():
    model, x = smooth(), images()
    wanted = jacobian_norm(model, x)
    assert wanted.requires_grad
    assert torch.equal(jacobian_norm(model, x, create_graph=False), wanted)
    assert not jacobian_norm(model, x, create_graph=False).requires_grad
    with torch.no_grad():
        assert torch.equal(jacobian_norm(model, x), wanted) and not jacobian_norm(model, x).requires_grad
    with torch.inference_mode():
        assert torch.equal(jacobian_norm(model, x + 0), wanted)


def test_dtypes_layouts_and_an_empty_batch():
    model, x = smooth(), images()
    exact = jacobian_norm(model, x)
    last = jacobian_norm(model, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, exact)
    half = jacobian_norm(copy.deepcopy(model).bfloat16(), x.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, rtol=0.05, atol=0)
    assert jacobian_norm(model, x[:0]).shape == (0,)


def test_batch_statistics_are_refused_by_name():
    model = smooth().train()
    with pytest.raises(ValueError, match=r"model\.1 normalises by batch statistics.*model\.eval\(\)"):
        jacobian_norm(model, images())
    with attacks.frozen(model):
        assert jacobian_norm(model, images()).shape == (3,)
    untracked = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten()).double().eval()
    with pytest.raises(ValueError, match="batch statistics"):
        jacobian_norm(untracked, images())
    layered = nn.Sequential(nn.InstanceNorm2d(2), nn.Flatten()).double()  # mixes pixels, not images
    assert jacobian_norm(layered, images()).shape == (3,)


BAD_CALLS = {
    "model": (lambda x: jacobian_norm(3, x), TypeError, "model must be a function"),
    "bytes": (lambda x: jacobian_norm(smooth(), x.byte()), TypeError, "x must be a floating point tensor"),
    "vector": (lambda x: jacobian_norm(smooth(), x.flatten()), ValueError, r"x must have shape \(N, \.\.\.\)"),
    "q": (lambda x: jacobian_norm(smooth(), x, q=3), ValueError, "q must be 1 .against Linf. or 2 .against L2., got 3"),
    "norm for q": (lambda x: jacobian_norm(smooth(), x, q="linf"), ValueError, "q must be 1"),
    "estimator": (
        lambda x: jacobian_norm(smooth(), x, estimator="topp"),
        ValueError,
        "estimator must be one of 'exact'",
    ),
    "samples": (
        lambda x: jacobian_norm(smooth(), x, samples=0),
        ValueError,
        "samples must be an integer of at least 1",
    ),
    "more rows than there are": (
        lambda x: jacobian_norm(smooth(), x, estimator="sampled", samples=6),
        ValueError,
        "samples must be at most the number of logits, 5, got 6",
    ),
    "generator": (lambda x: jacobian_norm(smooth(), x, generator=3), TypeError, "generator must be a torch.Generator"),
    "tuple": (lambda x: jacobian_norm(lambda z: (z, z), x), TypeError, r"must return logits of shape \(N, K\)"),
    "maps": (lambda x: jacobian_norm(lambda z: z, x), ValueError, r"\(N, K\) = \(3, K\), got \(3, 2, 3, 3\)"),
    "lost images": (lambda x: jacobian_norm(lambda z: z.flatten(1)[:2], x), ValueError, r"got \(2, 18\)"),
    "no logit": (lambda x: jacobian_norm(lambda z: z.flatten(1)[:, :0], x), ValueError, r"got \(3, 0\)"),
    "detach": (lambda x: jacobian_norm(lambda z: smooth()(z.detach()), x), ValueError, "logits do not depend on x"),
    "constant": (lambda x: jacobian_norm(lambda z: torch.ones(3, 4), x), ValueError, "logits do not depend on x"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_refused(case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call(images())
