"""The supernet on the fused kernels against the same supernet in plain PyTorch."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from rnas import attacks, seeding
from rnas.config import AttackConfig
from rnas.methods import SearchStep
from rnas.methods.darts import Darts, DartsOptions
from rnas.search import search_step
from rnas.spaces import DARTS, DSARA
from rnas.supernet import FixedMixture, Supernet

SPACES = {"darts": DARTS, "dsara": DSARA, "darts, 2 nodes": replace(DARTS, nodes=2)}
STATES = ("train", "eval", "frozen running", "frozen batch")
BACKENDS = ("reference", "auto")


def draw(
    space, channels: int, seed: int = 0, size: tuple[int, int] = (17, 17)
) -> tuple[Supernet, dict, Tensor, Tensor]:
    """A supernet with running statistics of its own batch, mixing weights, images and labels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = 4 if "robust" in space.cell_types else 3  # the fewest with a cell of every type
        supernet = Supernet(space, channels=channels, layers=layers, num_classes=5)
        shape = (len(space.edges), len(space.primitives))
        mixing = {cell_type: torch.randn(shape).softmax(dim=1) for cell_type in space.cell_types}
        x, y = torch.rand(3, 3, *size), torch.tensor([0, 3, 1])
        norms = [module for module in supernet.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:  # else activations fade or explode in eval mode
            norm.momentum = 1.0
        with torch.no_grad():
            supernet(x, mixing)
        for norm in norms:
            norm.momentum = 0.1
    return supernet, mixing, x, y


def evaluate(problem, state: str, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    """Logits, all gradients that the state has, and the buffers behind the call."""
    supernet, mixing, x, y = copy.deepcopy(problem)
    supernet.to(dtype).train(state == "train")
    mixing = {name: weights.to(dtype).requires_grad_() for name, weights in mixing.items()}
    x = x.to(dtype).requires_grad_()
    found = {}

    def call(model, inputs, names) -> None:
        logits = model(x, mixing) if model is supernet else model(x)
        gradients = torch.autograd.grad(cross_entropy(logits, y), inputs, materialize_grads=True)
        found["logits"] = [logits.detach()]
        found.update(zip(names, ([gradient] for gradient in gradients)))

    weights, alphas = dict(supernet.named_parameters()), [f"mixing of {name}" for name in mixing]
    if state.startswith("frozen"):
        with attacks.frozen(supernet, statistics=state.split()[1]):
            call(supernet, [x, *mixing.values()], ["images", *alphas])
            found = {f"architecture step: {name}": each for name, each in found.items()}
            call(FixedMixture(supernet, mixing), [x], ["images"])
    else:
        call(supernet, [x, *mixing.values(), *weights.values()], ["images", *alphas, *weights])
    return found | {name: [buffer.clone()] for name, buffer in supernet.named_buffers()}


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """|found - expected|."""
    return max((a.double() - b.double()).norm().item() for a, b in zip(found, expected))


def difference(problem, state: str, tight: float, monkeypatch) -> str | None:
    """The first tensor in which the backends differ by more than rounding, or by more than `tight` if a gradient."""
    results = {}
    for backend in BACKENDS:
        monkeypatch.setenv("RNAS_BACKEND", backend)
        results[backend] = evaluate(problem, state)
    exact = evaluate(problem, state, torch.float64)
    assert exact.keys() == results["auto"].keys() == results["reference"].keys()
    norm = {name: max(each.double().norm().item() for each in tensors) for name, tensors in exact.items()}
    largest = max((norm[name] for name in norm if name.endswith("weight")), default=0.0)
    for name, tensors in exact.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(results["auto"][name][0], results["reference"][name][0]), name
            continue
        allowed = 1e-5 * norm[name]
        if name.endswith("running_mean"):  # can be near zero
            allowed += 1e-6 * exact[name.replace("mean", "var")][0].sqrt().norm().item()
        elif not name.endswith(("logits", "var", "normalize.mean", "normalize.std")):
            allowed = tight * max(norm[name], 0.03 * largest)
        found = error(results["auto"][name], tensors)
        if not found <= 3 * error(results["reference"][name], tensors) + allowed:
            return f"{name}: {found:.2e} of {norm[name]:.2e}"
    return None


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("state", STATES)
def test_both_backends_agree(state, space, channels, monkeypatch):
    """Gradients to 2e-5 on one of a few draws: on the others a ReLU or maximum inside may lie on a rounding."""
    found = []
    for seed in range(6):
        problem = draw(SPACES[space], channels, seed)
        found.append(difference(problem, state, 2e-5, monkeypatch))
        if found[-1] is None:
            return
        assert difference(problem, state, 2e-2, monkeypatch) is None
    pytest.fail(f"the backends differ: {found}")


def test_the_kernels_serve_the_supernet(monkeypatch, compiled):
    """On the whole, in training: else the comparison above compares plain PyTorch with itself."""
    if not compiled:
        pytest.skip("rnas._cpu is not built")
    problem = draw(DARTS, 4)
    for state in STATES:
        evaluate(problem, state)
    monkeypatch.setenv("RNAS_BACKEND", "auto")
    from rnas.kernels.reference import mixed_op, relu_conv_norm

    for module, name in ((mixed_op, "mixed_cell"), (relu_conv_norm, "relu_conv_norm")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the reference was called"))
    for state in STATES:
        evaluate(problem, state)


@pytest.mark.parametrize("size", [(17, 17), (9, 14), (8, 8), (5, 33)], ids=str)
def test_odd_images(size, monkeypatch):
    problem = draw(SPACES["darts, 2 nodes"], 4, size=size)
    for state in STATES:
        results = []
        for backend in BACKENDS:
            monkeypatch.setenv("RNAS_BACKEND", backend)
            results.append(evaluate(problem, state)["logits"])
        assert error(*results) <= 1e-4 * results[0][0].norm().item()


def test_the_state_is_named_after_the_candidates():
    supernet, *_ = draw(SPACES["darts, 2 nodes"], 4)
    keys = set(supernet.state_dict())
    edge = "cells.1.mixed.2.candidates"
    for key in (
        f"{edge}.4.1.weight",  # sep_conv_3x3: ReLU, depthwise, pointwise, BN, twice
        f"{edge}.4.2.weight",
        f"{edge}.4.7.running_var",
        f"{edge}.1.1.num_batches_tracked",  # the norm of a pool
        f"{edge}.6.3.running_mean",
        "cells.1.mixed.0.candidates.3.conv_2.weight",  # a skip connection at stride 2
        "cells.0.preprocess.0.1.weight",
        "cells.0.preprocess.1.2.running_mean",
        "stem.0.weight",
        "classifier.bias",
    ):
        assert key in keys, key
    owners = ("normalize.", "stem.", "classifier.")
    assert all(".candidates." in key or ".preprocess." in key for key in keys if not key.startswith(owners))
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in supernet.modules())
    assert len(keys) == len(list(supernet.parameters())) + 3 * norms + 2


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "load_state_dict"])
def test_copies_compute_with_their_own_parameters(way):
    supernet, mixing, x, _ = draw(SPACES["darts, 2 nodes"], 4)
    supernet.eval()
    expected = supernet(x, mixing)
    if way == "deepcopy":
        other = copy.deepcopy(supernet)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(supernet))
    else:
        other = draw(SPACES["darts, 2 nodes"], 4, seed=1)[0].eval()
        other.load_state_dict(supernet.state_dict())
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.fill_(0.0)
        assert torch.equal(other(x, mixing), expected)
        for parameter in other.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(other(x, mixing), expected)
    other.train()(x, mixing).sum().backward()
    assert all(parameter.grad is None for parameter in supernet.parameters())
    assert sum(parameter.grad is not None for parameter in other.parameters()) > 100


@pytest.mark.parametrize("buffers", [False, True])
def test_functional_call_takes_other_tensors(buffers):
    supernet, mixing, x, y = draw(SPACES["darts, 2 nodes"], 4)
    other = draw(SPACES["darts, 2 nodes"], 4, seed=1)[0]
    values = {name: parameter.detach().clone().requires_grad_() for name, parameter in other.named_parameters()}
    averages = {name: buffer.clone() for name, buffer in other.named_buffers()}
    before = {name: each.clone() for name, each in supernet.state_dict().items()}
    expected = other(x, mixing)
    wanted = torch.autograd.grad(cross_entropy(expected, y), list(other.parameters()), materialize_grads=True)
    logits = functional_call(supernet, values | (averages if buffers else {}), (x, mixing))
    assert torch.equal(logits, expected)
    found = torch.autograd.grad(cross_entropy(logits, y), list(values.values()), materialize_grads=True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    for name, each in supernet.state_dict().items():
        if buffers or name not in averages:
            assert torch.equal(each, before[name]), name
    if buffers:
        assert all(torch.equal(averages[name], buffer) for name, buffer in other.named_buffers())


@pytest.mark.parametrize("order", [1, 2])
def test_a_search_step_gives_the_same_gradient_to_the_architecture(order, monkeypatch):
    space = SPACES["darts, 2 nodes"]
    supernet, _, x, y = draw(space, 4, size=(16, 16))
    results = []
    for backend in BACKENDS:
        monkeypatch.setenv("RNAS_BACKEND", backend)
        network, method = copy.deepcopy(supernet), Darts(DartsOptions(order=order), space, 0)
        weights = torch.optim.SGD(network.parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4)
        attack = AttackConfig(epsilon=8 / 255, step_size=8 / 255, steps=1, random_start=False)
        step = SearchStep(0, 0, attack, weights, seeding.purposes(0, 0, 0, device=torch.device("cpu")))
        gradients = {}

        class Keeper(torch.optim.SGD):
            def step(self, closure=None, gradients=gradients, method=method):
                gradients.update({name: alpha.grad.clone() for name, alpha in method.named_parameters()})

        numbers = search_step(
            network, method, (x, y), (x.flip(3), y), step, Keeper(method.parameters(), lr=0.1), grad_clip=5.0
        )
        results.append((gradients, numbers, network.state_dict()))
    (expected, numbers, state), (found, other_numbers, other_state) = results
    assert found.keys() == expected.keys() and len(found) == 2
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= (1e-2 if order == 1 else 5e-2) * gradient.norm(), name
    for name, number in numbers.items():
        assert other_numbers[name] == pytest.approx(number, rel=1e-3), name
    for name, each in state.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(each, other_state[name])
        else:
            assert (each - other_state[name]).norm() <= 5e-3 * each.norm() + 1e-4, name
