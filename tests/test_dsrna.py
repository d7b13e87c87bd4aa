"""DSRNA: its objective by definition, both orders, what the certificate is asked, and whole searches."""

from __future__ import annotations

import json
import math
import signal
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import final_state
from test_methods import snapshot
from test_search import StopAt, assert_same_bits
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from rnas import attacks, search, seeding
from rnas.config import AttackConfig, DataConfig
from rnas.loop import Interrupted
from rnas.methods import METHODS, Batch, SearchStep
from rnas.methods.darts import Darts, DartsOptions
from rnas.methods.dsrna import Dsrna, DsrnaOptions
from rnas.spaces import DARTS
from rnas.supernet import Supernet

SPACE = replace(DARTS, nodes=2)
NAMES = ("variant", "norm", "estimator", "statistics", "scale", "order", "adversarial")


class Certificate:
    """Stands in for rnas.certify: the true margins less epsilon times a smooth slope, and a record of what was asked."""

    def __init__(self) -> None:
        self.calls = []

    def __call__(self, supernet, mixing, x, y, epsilon, *, norm="linf", edge_weights=None) -> Tensor:
        assert not any(module.training for module in supernet.modules()), "bounds need fixed statistics"
        assert all(norm.running_mean is not None for norm in supernet.modules() if hasattr(norm, "running_mean"))
        self.calls.append({"images": len(x), "epsilon": epsilon, "norm": norm, "edge_weights": edge_weights})
        logits = supernet(x.to(supernet.classifier.weight.dtype), mixing, edge_weights)
        own = y[:, None]
        slope = 1 + logits.square().mean(dim=1, keepdim=True)
        return (logits.gather(1, own) - logits - epsilon * slope).scatter(1, own, math.inf)


@pytest.fixture
def certificate(monkeypatch) -> Certificate:
    found = Certificate()
    module = types.ModuleType("rnas.certify")
    module.certified_margin = found
    monkeypatch.setitem(sys.modules, "rnas.certify", module)
    return found


@pytest.fixture(scope="module")
def trained():
    """A float64 supernet in training mode with running statistics as after some training, and two batches of images."""
    torch.manual_seed(5)
    net = Supernet(SPACE, channels=4, layers=3, num_classes=3).double()
    mixing = {name: torch.full((5, 8), 1 / 8, dtype=torch.float64) for name in SPACE.cell_types}
    batches = [Batch(torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.randint(3, (6,))) for _ in range(2)]
    with torch.no_grad():
        for _ in range(15):
            net(torch.cat([batch.x for batch in batches]), mixing)
    return net, batches


@pytest.fixture
def level(trained):
    """The supernet with an optimizer and the batches of D_T and D_V; its state is put back after the test."""
    net, batches = trained
    state = {name: value.clone() for name, value in net.state_dict().items()}
    yield net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=3e-4), *batches
    net.load_state_dict(state)
    net.zero_grad()


def make_step(optimizer=None, *, epoch: int = 8, epochs: int = 20, norm: str = "linf") -> SearchStep:
    attack = AttackConfig(norm=norm, epsilon=8 / 255, step_size=2 / 255, steps=2)
    return SearchStep(epoch, 0, attack, optimizer, lambda purpose: seeding.generator(0, purpose), epochs)


def make(**options) -> Dsrna:
    return Dsrna(DsrnaOptions(**options), SPACE, 0).double()


def gradients(method) -> list[Tensor]:
    return [parameter.grad for parameter in method.parameters()]


def jacobian_measure(net, method, batch: Batch, q: int) -> float:
    """R_jac by definition: one image at a time, PyTorch's own Jacobian."""
    with attacks.frozen(net):
        found = [
            torch.autograd.functional.jacobian(lambda x: net(x[None], method.mixing())[0], image) for image in batch.x
        ]
    return -float(torch.stack([each.flatten(1).norm(q, dim=1).mean() for each in found]).mean())


SCALES = {
    "log": lambda bound: math.copysign(math.log(1 + abs(bound)), bound),
    "clip": lambda bound: min(max(bound, -10), 10),
    "none": lambda bound: bound,
}


def certified_measure(net, method, batch: Batch, epsilon: float, images: int, scale: str = "log") -> float:
    """R_cb by definition, with the stand-in's margins, image by image."""
    bounds = []
    with attacks.frozen(net), torch.no_grad():
        logits = net(batch.x[:images], method.mixing())
    for row, y in zip(logits.tolist(), batch.y.tolist()):
        slope = 1 + sum(value**2 for value in row) / len(row)
        margins = [row[y] - value - epsilon * slope for k, value in enumerate(row) if k != y]
        bounds.append(SCALES[scale](-math.log(sum(math.exp(-m) for m in margins))))
    return sum(bounds) / len(bounds)


def slope(parameters: list[Tensor], function, h: float = 1e-6) -> tuple[float, list[Tensor]]:
    """Central difference of `function` along a random unit vector of the parameters, and that vector."""
    directions = [
        torch.randn(p.shape, generator=seeding.generator(i, "direction"), dtype=p.dtype)
        for i, p in enumerate(parameters)
    ]
    length = torch.stack([direction.norm() for direction in directions]).norm()
    directions = [direction / length for direction in directions]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=sign * h)
        values.append(function())
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=-sign * h)
    return (values[0] - values[1]) / (2 * h), directions


def along(gradients: list[Tensor], directions: list[Tensor]) -> float:
    return sum(float((g * d).sum()) for g, d in zip(gradients, directions) if g is not None)


# ---- R ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "q"), [("linf", 1), ("l2", 2)])
def test_the_jacobian_measure_is_that_of_the_dual_norm(level, norm, q):
    net, _, _, valid = level
    method = make(estimator="exact")
    expected = jacobian_measure(net, method, valid, q)
    for options, step in (({}, make_step(norm=norm)), ({"norm": norm}, make_step(norm="l2" if q == 1 else "linf"))):
        value, numbers = make(estimator="exact", **options).robustness(net, valid, step)
        assert value.item() == pytest.approx(expected, rel=1e-10) and numbers == {"jacobian": value.item()}
    part = make(estimator="exact", jacobian_images=2).robustness(net, valid, make_step(norm=norm))[0]
    assert part.item() == pytest.approx(jacobian_measure(net, method, Batch(valid.x[:2], valid.y[:2]), q), rel=1e-10)


@pytest.mark.parametrize("scale", SCALES)
def test_the_certified_measure_is_the_soft_minimum_of_the_margins(level, certificate, scale):
    net, _, _, valid = level
    method = make(variant="certified", certified_images=4, epsilon=0.5, scale=scale)
    value, numbers = method.robustness(net, valid, make_step())
    expected = certified_measure(net, method, valid, 0.5, 4, scale)
    assert value.item() == pytest.approx(expected, rel=1e-10)
    assert numbers == {"certified": value.item(), "epsilon": 0.5} | ({"clipped": 0.0} if scale == "clip" else {})
    assert certificate.calls[-1] == {"images": 4, "epsilon": 0.5, "norm": "linf", "edge_weights": None}


def test_a_bound_that_says_nothing_is_clipped_and_without_gradient(level, certificate):
    net, _, _, valid = level
    method = make(variant="certified", epsilon=1e3, scale="clip", clip=3.0)
    value, numbers = method.robustness(net, valid, make_step())
    assert value.item() == -3 and numbers["clipped"] == 1
    assert all(not gradient.any() for gradient in torch.autograd.grad(value, list(method.parameters())))
    assert make(variant="certified", epsilon=1e3, scale="none").robustness(net, valid, make_step())[0] < -1e3


def test_a_loose_bound_still_has_a_gradient_on_the_logarithmic_scale(level, certificate):
    net, _, _, valid = level
    method = make(variant="certified", epsilon=1e30)
    value, _ = method.robustness(net, valid, make_step())
    assert -80 < value.item() < -60
    gradients = torch.autograd.grad(value, list(method.parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-6


def test_combined_is_the_sum(level, certificate):
    net, _, _, valid = level
    values = {
        variant: make(variant=variant, estimator="exact").robustness(net, valid, make_step())[0].item()
        for variant in ("jacobian", "certified", "combined")
    }
    assert values["combined"] == pytest.approx(values["jacobian"] + values["certified"], rel=1e-12)
    assert abs(values["jacobian"]) > 1e-3 and abs(values["certified"]) > 1e-3


def test_the_radius_rises_over_the_first_epochs_to_its_full_size():
    method = make(variant="certified", epsilon_ramp=0.4)
    found = [method.epsilon(make_step(epoch=epoch, epochs=50), channels=3) * 255 for epoch in (0, 5, 10, 20, 49)]
    assert found == pytest.approx([0, 0.5, 1, 2, 2])
    step = make_step(epoch=49, epochs=50)
    assert method.epsilon(step, channels=1) == 0.1 and method.epsilon(replace(step, epoch=10), channels=1) == 0.05
    assert make(norm="l2").epsilon(step, channels=3) == 0.125 and make(norm="l2").epsilon(step, channels=1) == 0.5
    assert make(epsilon=0.3).epsilon(step, channels=3) == 0.3
    at_once = make(epsilon_ramp=0.0)
    assert at_once.epsilon(make_step(epoch=0, epochs=0), channels=3) == 2 / 255
    with pytest.raises(ValueError, match="epsilon_ramp needs the number of epochs of the search; got 0"):
        method.epsilon(make_step(epochs=0), channels=3)


# ---- the architecture step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
def test_without_r_it_is_darts_on_clean_images(level, order):
    net, optimizer, train, valid = level
    method = make(gamma=0.0, order=order)
    darts = Darts(DartsOptions(order=order, adversarial="none"), SPACE, 0).double()
    for each in (method, darts):
        result = each.architecture_step(net, train, valid, make_step(optimizer))
    assert result.numbers == {}
    assert all(torch.equal(*pair) for pair in zip(gradients(method), gradients(darts)))


@pytest.mark.parametrize(("variant", "norm"), [("jacobian", "linf"), ("combined", "l2")])
def test_the_first_order_gradient_is_that_of_the_objective(level, certificate, variant, norm):
    net, optimizer, train, valid = level
    method, step = make(variant=variant, gamma=0.3, estimator="exact", epsilon=0.5), make_step(optimizer, norm=norm)
    with torch.no_grad():  # away from uniform weights, where all operations look alike
        for alpha in method.parameters():
            alpha.copy_(torch.randn(alpha.shape, generator=seeding.generator(1, "alpha")))
    result = method.architecture_step(net, train, valid, step)

    def objective() -> float:
        with attacks.frozen(net, statistics="batch"), torch.no_grad():
            loss = cross_entropy(net(valid.x, method.mixing()), valid.y).item()
        robustness = jacobian_measure(net, method, valid, 1 if norm == "linf" else 2)
        if variant == "combined":
            robustness += certified_measure(net, method, valid, 0.5, 16)
        return loss - 0.3 * robustness

    assert result.loss == pytest.approx(objective(), rel=1e-10)
    assert result.numbers["cross_entropy"] - 0.3 * result.numbers["robustness"] == pytest.approx(result.loss)
    expected, directions = slope(list(method.parameters()), objective)
    assert along(gradients(method), directions) == pytest.approx(expected, rel=1e-5)
    of_r = along(gradients(method), directions)
    method.options = replace(method.options, gamma=0.27)
    method.architecture_step(net, train, valid, step)
    assert along(gradients(method), directions) != pytest.approx(of_r, rel=1e-5), "gamma wrong by 10% must be seen"


@pytest.mark.parametrize("variant", ["jacobian", "certified"])
def test_the_second_order_gradient_is_that_of_the_unrolled_objective(level, certificate, variant):
    net, optimizer, train, valid = level
    # a short radius: ReLU and max pooling make gradients jump within any larger one
    method = make(variant=variant, gamma=1.0, order=2, radius=1e-6, estimator="exact", norm="l2", epsilon=0.5)
    step, names = make_step(optimizer), [name for name, _ in net.named_parameters()]
    method.architecture_step(net, train, valid, step)

    def unrolled(gamma: float = 1.0) -> float:
        weights = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        with attacks.frozen(net, statistics="batch"), torch.enable_grad():
            loss = cross_entropy(functional_call(net, weights, (train.x, method.mixing())), train.y)
            found = torch.autograd.grad(loss, [weights[name] for name in names])
            moved = {name: weights[name] - 0.05 * (g + 3e-4 * weights[name]) for name, g in zip(names, found)}
            loss = cross_entropy(functional_call(net, moved, (valid.x, method.mixing())), valid.y).item()
        kept = {name: p.detach().clone() for name, p in net.named_parameters()}
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(moved[name])
            if variant == "jacobian":
                robustness = jacobian_measure(net, method, valid, 2)
            else:
                robustness = certified_measure(net, method, valid, 0.5, 16)
            for name, p in net.named_parameters():
                p.copy_(kept[name])
        return loss - gamma * robustness

    expected, directions = slope(list(method.parameters()), unrolled)
    found = along(gradients(method), directions)
    assert found == pytest.approx(expected, rel=1e-3)
    first = make(variant=variant, gamma=1.0, order=1, estimator="exact", norm="l2", epsilon=0.5)
    first.architecture_step(net, train, valid, step)
    assert along(gradients(first), directions) != pytest.approx(expected, rel=1e-3), "the orders must differ"


@pytest.mark.parametrize(
    ("order", "options"),
    [
        (2, {"variant": "combined"}),
        (1, {"estimator": "projection", "adversarial": "both"}),
        (2, {"statistics": "batch", "samples": 2}),
    ],
    ids=["combined", "projection", "batch statistics"],
)
def test_the_architecture_step_moves_nothing_but_its_own_gradients(level, certificate, order, options):
    net, optimizer, train, valid = level
    method, step = make(order=order, **options), make_step(optimizer)
    batches = [
        method.prepare(net, train.x, train.y, step, "weights"),
        method.prepare(net, valid.x, valid.y, step, "architecture"),
    ]
    assert all((batch.x_adv is not None) == ("adversarial" in options) for batch in batches)
    before, modes = snapshot(net), [module.training for module in net.modules()]
    result = method.architecture_step(net, *batches, step)
    first = [gradient.clone() for gradient in gradients(method)]
    after = snapshot(net)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert modes == [module.training for module in net.modules()] and all(p.requires_grad for p in net.parameters())
    assert all(math.isfinite(value) for value in (result.loss, *result.numbers.values()))
    method.architecture_step(net, *batches, step)
    assert all(torch.equal(*pair) and pair[0].any() for pair in zip(first, gradients(method)))


def test_the_fused_supernet_gives_the_gradient_of_float64(level):
    """Float32 where the compiled kernels are built; the certificate is not theirs."""
    net, optimizer, train, valid = level
    exact = make(gamma=0.3)
    exact.architecture_step(net, train, valid, make_step(optimizer))
    single = Supernet(SPACE, channels=4, layers=3, num_classes=3)
    single.load_state_dict(net.state_dict())
    method = Dsrna(DsrnaOptions(gamma=0.3), SPACE, 0)
    method.architecture_step(single, *(Batch(each.x.float(), each.y) for each in (train, valid)), make_step())
    for found, expected in zip(gradients(method), gradients(exact)):
        assert (found.double() - expected).norm() < 1e-4 * expected.norm()


def test_a_large_gamma_finds_mixing_weights_with_smaller_gradients(level):
    net, optimizer, train, valid = level
    found = {}
    for gamma in (0.0, 100.0):
        method = make(gamma=gamma, norm="l2")
        adam = torch.optim.Adam(method.parameters(), lr=0.1)
        for _ in range(4):
            method.architecture_step(net, train, valid, make_step(optimizer))
            adam.step()
        found[gamma] = jacobian_measure(net, method, valid, 2)
    assert found[100.0] > 0.9 * found[0.0] > found[0.0], found


# ---- the weight step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["jacobian", "certified"])
def test_r_joins_the_loss_of_the_weights_from_its_epoch_on(level, certificate, variant):
    net, _, train, _ = level
    options = dict(variant=variant, estimator="exact", norm="l2", epsilon=0.5, epsilon_ramp=0.0, weight_epoch=3)
    plain, method = make(**options), make(on_weights=True, weight_gamma=0.5, **options)
    parameters = list(net.parameters())
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def weight_loss(method, epoch):
        net.load_state_dict(before)
        loss, _ = method.weight_loss(net, train, make_step(epoch=epoch))
        return loss, torch.autograd.grad(loss, [*parameters, *method.parameters()], allow_unused=True)

    loss, expected = weight_loss(plain, 3)
    moved = {name: value.clone() for name, value in net.state_dict().items()}
    early, same = weight_loss(method, 2)
    assert torch.equal(loss, early) and all(torch.equal(a, b) for a, b in zip(expected, same) if a is not None)
    late, found = weight_loss(method, 3)
    assert all(torch.equal(value, moved[name]) for name, value in net.state_dict().items()), "averages move once"
    assert all(gradient is None for gradient in found[len(parameters) :]), "the architecture is a constant"
    assert all(p.grad is None for p in parameters) and net.training

    def robustness() -> float:
        if variant == "jacobian":
            return jacobian_measure(net, method, train, 2)
        return certified_measure(net, method, train, 0.5, 16)

    assert late.item() == pytest.approx(loss.item() - 0.5 * robustness(), rel=1e-10)
    of_r, directions = slope(parameters, robustness, h=1e-7)
    differences = [b - a for a, b in zip(expected, found[: len(parameters)])]
    assert along(differences, directions) == pytest.approx(-0.5 * of_r, rel=1e-4)


# ---- options, partial channels, whole searches -----------------------------------------------------------------------


def test_edge_weights_are_a_softmax_over_the_edges_into_a_node():
    assert make().edge_weights() is None and make().partial == 1
    method = make(partial=2)
    assert method.partial == 2
    with torch.no_grad():
        for beta in method.beta.values():
            beta.copy_(torch.randn(beta.shape, generator=seeding.generator(0, "beta")))
    for name, weights in method.edge_weights().items():
        beta = method.beta[name].exp()
        for edges in (slice(0, 2), slice(2, 5)):
            torch.testing.assert_close(weights[edges], beta[edges] / beta[edges].sum())


BAD_OPTIONS = {
    **{name: ({name: "nonsense"}, f"options.{name} must be one of .*got 'nonsense'") for name in NAMES},
    "gamma": ({"gamma": -0.01}, "options.gamma must be a finite number of at least 0; got -0.01"),
    "samples": ({"samples": 0}, "options.samples must be a finite number of at least 1; got 0"),
    "images": ({"certified_images": -1}, "options.certified_images must be a finite number of at least 0"),
    "clip": ({"clip": float("nan")}, "options.clip must be"),
    "epsilon": ({"epsilon": -0.1}, "options.epsilon must be"),
    "ramp": ({"epsilon_ramp": 1.5}, "options.epsilon_ramp is a share of the epochs, at most 1; got 1.5"),
    "radius": ({"radius": 0.0}, "options.radius must be above 0"),
    "bounds by batch": (
        {"variant": "combined", "statistics": "batch"},
        "needs options.statistics 'running'; got 'batch'",
    ),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_refused(case):
    changes, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        DsrnaOptions(**changes)


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "combined", "partial": 2, "order": 2, "on_weights": True, "weight_epoch": 1},
        {"statistics": "batch", "estimator": "projection", "adversarial": "weights"},
    ],
    ids=["combined", "batch statistics"],
)
def test_a_stopped_search_resumes_to_the_same_bits(search_config, tmp_path, monkeypatch, certificate, options):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures take longer than these searches
    config = replace(search_config, method="dsrna", options=DsrnaOptions(**options))
    whole = search.search(config)
    stopped = replace(config, run=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        StopAt(patch, 4, signal.SIGTERM)
        with pytest.raises(Interrupted):
            search.search(stopped)
    result = search.resume(stopped.run, quiet=True)
    state = final_state(whole.run)
    assert_same_bits(state, final_state(result.run))
    assert result.genotype == whole.genotype
    start = METHODS["dsrna"](config.options, SPACE, config.seed)
    assert all(not torch.equal(state[f"/method/{name}"], value) for name, value in start.state_dict().items())
    records = [json.loads(line) for line in (whole.run / "metrics.jsonl").read_text().splitlines()]
    assert all(record["robustness"] != 0 for record in records)
    if "variant" in options:
        assert [record["epsilon"] for record in records] == [0, 2 / 255]  # 2 epochs, of which the ramp takes 0.8
        assert all(set(call["edge_weights"]) == {"normal", "reduction"} for call in certificate.calls)


def test_one_image_channel_and_l2_reach_the_certificate(search_config, data_of_one_channel, certificate, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    config = replace(
        search_config,
        method="dsrna",
        options=DsrnaOptions(variant="certified", certified_images=3, epsilon_ramp=0.0),
        data=data_of_one_channel,
        attack=replace(search_config.attack, norm="l2"),
        epochs=1,
    )
    search.search(config)
    assert certificate.calls and all(
        call == {"images": 3, "epsilon": 0.5, "norm": "l2", "edge_weights": None} for call in certificate.calls
    )


@pytest.fixture
def data_of_one_channel(small_images, tmp_path):

    arrays = dict(np.load(small_images))
    path = tmp_path / "grey.npz"
    np.savez(path, **{name: value[..., :1] if name.startswith("x") else value for name, value in arrays.items()})
    return DataConfig(dataset=str(path))
