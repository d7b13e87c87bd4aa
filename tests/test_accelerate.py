"""rnas.accelerate on supernets in the styles of other code: numbers, and everything that has to go on working.

Numbers are measured against the same network in float64. Supernets have ReLUs and maxima that hang on a rounding, where
two float32 networks differ by more than rounding; so of three draws two have to agree.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from supernets import darts, graph, hooked, nasbench201, nested, pcdarts, smooth
from torch import Tensor, nn
from torch.nn import functional as F

import rnas

STYLES: dict[str, Callable[..., nn.Module]] = {  # cells of two nodes where the style allows it: they are as good
    "darts": lambda *a: darts.build(*a, steps=2),
    "darts, affine": lambda *a: darts.build(*a, steps=2, affine=True),
    "darts, no averages": lambda *a: darts.build(*a, steps=2, affine=True, track=False),
    "pc-darts": pcdarts.build,
    "a list of candidates per edge": smooth.build,
    "perturbed weights": lambda *a: smooth.build(*a, noise=0.1),
    "drop path of candidates": lambda *a: smooth.build(*a, drop_path=0.3),
    "drop path of edges, in place": lambda *a: smooth.build(*a, edge_drop=0.3),
    "nas-bench-201": nasbench201.build,
    "nas-bench-201, affine": lambda *a: nasbench201.build(*a, affine=True, track=True),
    "nas-bench-201, biases": lambda *a: nasbench201.build(*a, bias=True),
    "nas-bench-201, biases, no averages": lambda *a: nasbench201.build(*a, bias=True, track=False),
    "nas-bench-201, one hot": lambda *a: nasbench201.build(*a, mode="hard"),
    "nas-bench-201, chosen ones": lambda *a: nasbench201.build(*a, mode="chosen"),
    "a graph": lambda *a: graph.build(*a, steps=3),  # whose layers at edges of two nodes may look like candidates
    "weights as attributes": hooked.build,
    "hooks on edges": lambda *a: hooked.build(*a, hooks=("output", "input")),
    "hooks that replace": lambda *a: hooked.build(*a, hooks=("replace",)),
    "hooks on candidates": lambda *a: hooked.build(*a, hooks=("candidate", "inner")),
    "darts, biases": lambda *a: nested.build(*a, kind="", bias=True, steps=2),
}
STYLES |= {kind: lambda *a, kind=kind: nested.build(*a, kind=kind, steps=2) for kind in nested.KINDS}
WHOLE_CELLS = ("darts", "darts, affine", "darts, no averages", "nas-bench-201", "nas-bench-201, affine")
WHOLE_CELLS += ("a list of candidates per edge", "perturbed weights", "drop path of edges, in place")
WHOLE_CELLS += ("a graph", "nas-bench-201, one hot", "nas-bench-201, chosen ones")
WHOLE_CELLS += ("nas-bench-201, biases", "nas-bench-201, biases, no averages", "darts, biases", *nested.KINDS)
FACTOR, FLOOR = 3.0, 1e-6  # the first contract of the ops: no further from float64 than three times plain PyTorch


def build(style: str, seed: int = 0, channels: int = 8, layers: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    model = STYLES[style](channels, layers, 5)
    with torch.no_grad():
        for alpha in model.arch_parameters():
            alpha.copy_(0.5 * torch.randn(alpha.shape))
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
                norm.running_mean.uniform_(-0.1, 0.1)
                norm.running_var.uniform_(0.8, 1.2)
    return model


def in_double(made: nn.Module) -> nn.Module:
    """The model in float64, tensors that are plain attributes included."""
    for module in made.double().modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, Tensor) and value.is_floating_point():
                module.__dict__[name] = value.detach().double().requires_grad_(value.requires_grad)
            elif isinstance(value, list) and value and all(isinstance(each, Tensor) for each in value):
                module.__dict__[name] = [each.detach().double().requires_grad_(each.requires_grad) for each in value]
    return made


def leaves_of(model: nn.Module) -> dict[str, list[Tensor]]:
    alphas = list(model.arch_parameters())
    known = {id(alpha) for alpha in alphas}
    return {"alpha": alphas, "weights": [each for each in model.parameters() if id(each) not in known]}


def images(seed: int = 0, n: int = 3, size: int = 8) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def same_noise() -> None:
    random.seed(0)
    torch.manual_seed(0)


def everything(model: nn.Module, x: Tensor) -> dict[str, list[Tensor | None]]:
    """Logits, BN buffers, and the gradients to images, alpha and weights."""
    dtype = next(model.parameters()).dtype
    same_noise()
    x = x.to(dtype, memory_format=torch.preserve_format).requires_grad_()
    groups = leaves_of(model)
    logits = model(x)
    towards = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    leaves = [x, *groups["alpha"], *groups["weights"]]
    grads = list(torch.autograd.grad(logits, leaves, towards, allow_unused=True))
    count = len(groups["alpha"])
    return {
        "logits": [logits.detach()],
        "images": grads[:1],
        "alpha": grads[1 : 1 + count],
        "weights": grads[1 + count :],
        "buffers": [buffer.clone() for buffer in model.buffers()],
    }


def second_derivatives(model: nn.Module, x: Tensor) -> dict[str, list[Tensor | None]]:
    """Gradients of the norm of the input gradient, as Jacobian and curvature regularisers take them."""
    dtype = next(model.parameters()).dtype
    same_noise()
    x = x.to(dtype, memory_format=torch.preserve_format).requires_grad_()
    loss = F.cross_entropy(model(x), torch.arange(x.shape[0]) % 5, reduction="sum")
    (grad_x,) = torch.autograd.grad(loss, x, create_graph=True)
    groups = leaves_of(model)
    leaves = [*groups["alpha"], *groups["weights"]]
    grads = torch.autograd.grad(grad_x.square().sum(), leaves, allow_unused=True)
    count = len(groups["alpha"])
    return {"alpha": list(grads[:count]), "weights": list(grads[count:])}


def distance(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """||found - expected|| / ||expected||, infinite where one has a tensor and the other has none."""
    if [each is None for each in found] != [each is None for each in expected]:
        return float("inf")
    pairs = [(a.double().flatten(), b.double().flatten()) for a, b in zip(found, expected) if a is not None]
    if not pairs:
        return 0.0
    a, b = (torch.cat(each) for each in zip(*pairs))
    return float((a - b).norm() / (b.norm() + 1e-30))


def disagreements(
    model: nn.Module, plain: Callable[[], nn.Module], look=everything, training: bool = True, **shape
) -> list[str]:
    """What the accelerated `model` does worse than plain PyTorch in both memory formats. plain: gives what it was."""
    found = []
    x = images(**shape)
    last = x.to(memory_format=torch.channels_last)
    references = {}
    for name, network, data in (
        ("float64", in_double(plain()), x),
        ("plain", plain(), x),
        ("channels_last", plain().to(memory_format=torch.channels_last), last),
        ("accelerated", model, x),
    ):
        references[name] = look(network.train(training), data)
    for kind, expected in references["float64"].items():
        own = max(distance(references[name][kind], expected) for name in ("plain", "channels_last"))
        ours = distance(references["accelerated"][kind], expected)
        if not ours <= FACTOR * own + FLOOR:
            found.append(f"{kind}: {ours:.1e} from float64, plain PyTorch {own:.1e}")
    return found


def check(style: str, look=everything, training: bool = True, **options) -> list:
    """Two of three draws have to agree. Returns the reports."""
    found, reports = [], []
    for seed in range(3):
        plain = partial(build, style, seed, **options)
        model = plain()
        reports.append(rnas.accelerate(model))
        found.append(disagreements(model, plain, look, training, seed=seed))
        if sum(not each for each in found) == 2:
            break
    assert sum(not each for each in found) == 2, found
    return reports


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("style", STYLES)
def test_logits_gradients_and_averages_are_those_of_before(style, training):
    for report in check(style, training=training):
        assert report.replaced and not report.left
        assert report.counts.edges > 0 or "candidates" in style, report
        whole = style in WHOLE_CELLS or (style == "drop path of candidates" and not training)
        assert (report.counts.cells > 0) == whole, report
        assert report.counts.given_back == 0


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "style",
    [
        "darts",
        "darts, biases",
        "pc-darts",
        "nas-bench-201",
        "weights as attributes",
        "drop path of edges, in place",
    ],
)
def test_second_derivatives_are_those_of_before(style, training):
    check(style, second_derivatives, training, channels=4, layers=2 if "201" not in style else 3)


def batches_of_gradients(model: nn.Module, x: Tensor) -> dict[str, list[Tensor | None]]:
    """The Jacobian of the probabilities in one call, and the gradients of its size."""
    dtype = next(model.parameters()).dtype
    same_noise()
    x = x.to(dtype, memory_format=torch.preserve_format).requires_grad_()
    groups = leaves_of(model)
    leaves, out = [x, *groups["alpha"], *groups["weights"]], model(x).softmax(1)
    towards = torch.eye(out.shape[1], dtype=dtype)[:, None].expand(-1, *out.shape).contiguous()
    found = torch.autograd.grad(out, leaves, towards, is_grads_batched=True, retain_graph=True, allow_unused=True)

    def along(direction: Tensor) -> Tensor:
        return torch.autograd.grad(out, x, direction, retain_graph=True)[0]

    mapped = torch.func.vmap(along)(towards)
    (jacobian,) = torch.autograd.grad(out, x, towards, is_grads_batched=True, create_graph=True)
    twice = torch.autograd.grad(jacobian.square().sum(), leaves[1:], allow_unused=True)
    return {"all": list(found), "mapped": [mapped], "twice": list(twice)}


@pytest.mark.parametrize(("style", "training"), [("darts", True), ("pc-darts", False), ("nas-bench-201", True)])
def test_batches_of_gradients_are_those_of_before(style, training):
    check(style, batches_of_gradients, training)


@pytest.mark.parametrize("style", ["darts", "nas-bench-201"])
def test_a_wrong_weight_is_seen(style, monkeypatch):
    from rnas.fusion import invoke

    stacked = invoke.stacked
    monkeypatch.setattr(invoke, "stacked", lambda scales, like: stacked(scales, like) * 1.001)
    with pytest.raises(AssertionError):
        check(style)


@pytest.mark.parametrize(("n", "size"), [(1, 12), (2, 9), (5, 13)])
def test_odd_sizes_and_one_image(n, size):
    found = []
    for seed in range(3):
        plain = partial(build, "weights as attributes", seed)
        model = plain()
        rnas.accelerate(model)
        found.append(disagreements(model, plain, training=False, n=n, size=size, seed=seed))
    assert sum(not each for each in found) >= 2, found


def test_only_the_gradients_that_are_asked_for_are_computed():
    model = build("darts")
    rnas.accelerate(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    (alpha, *_) = model.arch_parameters()
    with torch.no_grad():
        assert not model(images()).requires_grad
    (grad,) = torch.autograd.grad(model(images()).sum(), [alpha])
    assert grad.shape == alpha.shape


def test_gradients_twice_through_one_graph():
    model = build("darts").eval()
    rnas.accelerate(model)
    loss = model(images()).square().sum()
    leaves = leaves_of(model)["alpha"]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves)))


# What goes on working --------------------------------------------------------------------------------------------------


def test_names_parameters_buffers_and_classes_stay():
    model = build("darts")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.named_parameters())
    kinds = [(name, type(module).__name__, repr(module)) for name, module in model.named_modules()]
    dicts = [dict(module.__dict__) for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    rnas.accelerate(model)
    assert [(name, type(module).__name__, repr(module)) for name, module in model.named_modules()] == kinds
    assert all(a is b for (_, a), (_, b) in zip(parameters, model.named_parameters()))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in parameters]
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), classes))
    assert rnas.restore(model) > 0
    assert [type(module) for module in model.modules()] == classes
    assert [dict(module.__dict__) for module in model.modules()] == dicts
    assert rnas.restore(model) == 0


def test_accelerating_twice_is_accelerating_once():
    model = build("darts")
    first, second = rnas.accelerate(model), rnas.accelerate(model)
    assert [each.candidates for each in first.replaced] == [each.candidates for each in second.replaced]
    model(images())
    assert second.counts.cells > 0 and first.counts.cells == 0
    rnas.restore(model)
    assert "rnas" not in type(next(iter(model.modules()))).__mro__[0].__module__
    assert not any("_rnas" in name for module in model.modules() for name in module.__dict__)


@pytest.mark.parametrize("style", ["darts", "pc-darts", "nas-bench-201"])
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_and_their_own(style, copied, tmp_path):
    import pickle

    model = build(style)
    rnas.accelerate(model)
    if copied == "deepcopy":
        made = copy.deepcopy(model)
    elif copied == "pickle":
        made = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        made = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(made(images()), model(images()))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5)
    plain = copy.deepcopy(made)
    assert rnas.restore(plain) > 0
    made.eval(), plain.eval(), model.eval()
    assert torch.allclose(made(images()), plain(images()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(made(images()), model(images()), rtol=1e-2)


def test_optimizers_made_before_and_after_train_the_model():
    losses = []
    for moment in ("before", "after", "never"):
        model = build("darts")
        optimizer = None if moment == "after" else torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        if moment != "never":
            rnas.accelerate(model)
        optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images(n=8)), torch.arange(8) % 5)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1] and losses[0] == pytest.approx(losses[2], rel=1e-3)


def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model, plain = build("darts"), build("darts")
        rnas.accelerate(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        F.cross_entropy(wrapped(images()), torch.arange(3)).backward()
        F.cross_entropy(plain(images()), torch.arange(3)).backward()
        for ours, theirs in zip(model.parameters(), plain.parameters()):
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-2, atol=1e-3 * float(theirs.grad.abs().max()))
    finally:
        dist.destroy_process_group()


def test_replicas_of_data_parallel_run_their_own_code():
    model = build("darts").eval()
    rnas.accelerate(model)
    cell = model.cells[0]
    edge = next(module for module in cell.modules() if type(module).__name__ == "MixedOp")
    replica = edge._replicate_for_data_parallel()
    assert replica._modules is not edge._modules
    x, weights = torch.randn(2, 8, 6, 6), torch.full((8,), 0.125)
    assert torch.allclose(replica(x, weights), edge(x, weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["darts", "nas-bench-201"])
def test_torch_compile_sees_the_code_of_the_modules(style):
    model = build(style, layers=1).eval()
    expected = model(images())
    rnas.accelerate(model)
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager")(images())
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_torch_compile_of_an_edge_without_graph_breaks():
    model = build("darts").eval()
    rnas.accelerate(model)
    edge = next(module for module in model.modules() if type(module).__name__ == "MixedOp")
    x, weights = torch.randn(2, 8, 6, 6), torch.full((8,), 0.125)
    torch._dynamo.reset()
    found = torch.compile(edge, backend="eager", fullgraph=True)(x, weights)
    assert torch.allclose(found, edge(x, weights), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["float64", "autocast", "reference", "vmap", "empty batch"])
def test_what_the_kernels_do_not_take_runs_as_before(how, monkeypatch):
    style = "nas-bench-201" if how == "empty batch" else "darts"
    model, plain = build(style).eval(), build(style).eval()
    report = rnas.accelerate(model)
    x = images()
    if how == "float64":
        model, plain, x = in_double(model), in_double(plain), x.double()
    elif how == "reference":
        monkeypatch.setenv("RNAS_BACKEND", "reference")
    elif how == "empty batch":
        x = x[:0]
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = model(x), plain(x)
    elif how == "vmap":
        found, expected = (torch.func.vmap(network)(x[None, :]) for network in (model, plain))
    else:
        found, expected = model(x), plain(x)
    assert torch.equal(found, expected)
    assert report.counts.edges == 0


def test_forward_mode():
    model, plain = build("darts").eval(), build("darts").eval()
    rnas.accelerate(model)
    for network in (model, plain):
        for parameter in network.parameters():
            parameter.requires_grad_(False)
    x, direction = images(), torch.randn(3, 3, 8, 8)
    (_, found), (_, expected) = (torch.func.jvp(network, (x,), (direction,)) for network in (model, plain))
    assert torch.equal(found, expected)


def test_inference_mode():
    model, plain = build("pc-darts").eval(), build("pc-darts").eval()
    report = rnas.accelerate(model)
    with torch.inference_mode():
        assert torch.allclose(model(images()), plain(images()), rtol=1e-4, atol=1e-5)
    assert report.counts.edges > 0


@pytest.mark.parametrize("style", ["darts", "pc-darts"])
def test_the_same_inputs_give_the_same_bits(style):
    model = build(style)
    rnas.accelerate(model)
    first, second = (everything(copy.deepcopy(model), images()) for _ in range(2))
    for kind, tensors in first.items():
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(tensors, second[kind])), kind


def test_no_warnings():
    model = build("pc-darts")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnas.accelerate(model)
        model(images()).sum().backward()
