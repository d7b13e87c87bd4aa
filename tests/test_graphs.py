"""Captured steps against the eager loop, bit for bit, with graphs played on the CPU; and what no graph can hold."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from conftest import final_state
from method_checks import problem
from torch import nn

from rnas import attacks, graphs, search, seeding, updates
from rnas.capture import CaptureError, Guard, Tape
from rnas.config import SearchConfig
from rnas.graphs import CudaGraphs, Graphs, fingerprint
from rnas.loop import Interrupted, Loop, set_learning_rate
from rnas.methods import options_for
from rnas.methods.method import deferred, number
from rnas.methods.racl import Racl


class Eager:
    """A backend that never captures: the same steps, the same optimizers, no graphs."""

    device_type = "cpu"

    def aside(self, function):
        return function()


def tape(**options) -> tuple[Graphs, list[str]]:
    """Graphs on the CPU, and where they report to."""
    lines: list[str] = []
    return Graphs(Tape(), report=lines.append, **options), lines


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            OrderedDict(
                convolution=nn.Conv2d(3, 6, 3, padding=1),
                norm=nn.BatchNorm2d(6),
                relu=nn.ReLU(),
                flat=nn.Flatten(),
                classifier=nn.Linear(6 * 5 * 5, 4),
            )
        )
    return model


def images(seed: int, count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeding.generator(seed, "images")
    x = torch.rand((count, 3, 5, 5), generator=generator).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(4, (count,), generator=generator)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer):
    """A step of training as a function of tensors."""

    def step(x, y):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.detach()}

    return step


def fused_sgd(model: nn.Module) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    updates.make_capturable(optimizer, torch.optim.Adam([torch.zeros(1)]), torch.device("cpu"))
    return optimizer


# ---- the class -------------------------------------------------------------------------------------------------------


def test_a_training_from_graphs_has_the_bits_of_the_eager_one_under_a_schedule():
    states, losses = [], []
    for one in (Graphs(Eager(), warmup=100), tape()[0]):
        model = network()
        optimizer = fused_sgd(model)
        step, found = step_of(model, optimizer), []
        for index in range(12):
            set_learning_rate(optimizer, 0.1 / (1 + index))
            x, y = images(index)
            watch = lambda: fingerprint(model, optimizer)  # noqa: B023, E731
            found.append(one.run("a step", step, {"x": x, "y": y}, watch=watch)["loss"])
        states.append(
            model.state_dict() | {f"{i}": s["momentum_buffer"] for i, s in enumerate(optimizer.state.values())}
        )
        losses.append(torch.stack(found))
    # one call before the momentum exists, three to warm up; one capture for eight rates
    assert one.counts["a step"] == {"eager": 4, "captures": 1, "replays": 8}
    assert torch.equal(*losses) and losses[0].unique().numel() == 12
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_capture_changes_nothing_and_its_results_are_clones():
    model, one = network(), tape()[0]
    run = lambda x: {"out": model(x), "constant": 3}  # noqa: E731
    x = images(0)[0]
    for _ in range(3):
        one.run("a step", run, {"x": x})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replay, outputs = Tape().capture(lambda: run(x))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert outputs["out"].isnan().all()  # no value before the first replay
    first = one.run("a step", run, {"x": x})
    kept = first["out"].clone()
    second = one.run("a step", run, {"x": images(1)[0]})
    assert one.counts["a step"] == {"eager": 3, "captures": 1, "replays": 2}
    assert torch.equal(first["out"], kept) and not torch.equal(kept, second["out"])
    assert first["constant"] == 3 and not first["out"].requires_grad
    assert int(model.norm.num_batches_tracked) == int(before["norm.num_batches_tracked"]) + 2


def test_python_numbers_are_constants_of_a_graph_unless_they_are_in_the_key():
    one, factor = tape(warmup=1)[0], 2.0
    x = torch.ones(2)
    run = lambda x: {"y": factor * x}  # noqa: E731
    for key, expected in ((0, 2.0), (0, 2.0), (1, 5.0), (1, 5.0), (0, 2.0)):
        factor = 5.0 if key else 2.0
        assert one.run("a step", run, {"x": x}, key=key)["y"][0] == expected
    factor = 7.0
    assert one.run("a step", run, {"x": x}, key=0)["y"][0] == 2.0  # what a key is for


@pytest.mark.parametrize(
    "change", ["shape", "dtype", "layout", "training", "weights", "requires_grad", "backend", "key"]
)
def test_what_changes_the_kernels_is_another_graph(change, monkeypatch):
    model, (one, lines) = network(), tape(warmup=1)
    x, key = images(0)[0], 0
    run = lambda x: {"y": 2 * x}  # noqa: E731
    call = lambda: one.run("a step", run, {"x": x}, key=key, watch=lambda: fingerprint(model))  # noqa: E731
    call(), call(), call()
    assert one.counts["a step"] == {"eager": 1, "captures": 1, "replays": 2}
    if change == "shape":
        x = x[:3]
    elif change == "dtype":
        x = x.double()
    elif change == "layout":
        x = x.contiguous()
    elif change == "training":
        model.norm.eval()
    elif change == "weights":
        model.norm.weight.data = model.norm.weight.data.clone()
    elif change == "requires_grad":
        model.norm.weight.requires_grad_(False)
    elif change == "backend":
        monkeypatch.setenv("RNAS_BACKEND", "reference")
    else:
        key = 1
    assert torch.equal(call()["y"], 2 * x) and torch.equal(call()["y"], 2 * x)
    assert one.counts["a step"] == {"eager": 2, "captures": 2, "replays": 3} and not lines


def test_few_graphs_are_kept_and_a_step_that_keeps_changing_stays_eager():
    one, lines = tape(warmup=1, keep=2, most=6)
    run = lambda x: {"y": x + 1}  # noqa: E731
    for size in (1, 2, 3):
        for _ in range(2):
            one.run("a step", run, {"x": torch.zeros(size)})
    assert len(one._entries["a step"]) == 2 and one.counts["a step"]["captures"] == 3
    for size in range(4, 12):
        assert one.run("a step", run, {"x": torch.zeros(size)})["y"].shape == (size,)
    assert lines == ["without a CUDA graph, a step: its shapes or settings have changed 6 times"]


UNSAFE = {
    "item": (lambda x: {"y": x * x.sum().item()}, "reads a number"),
    "float": (lambda x: {"y": x * float(x[0])}, "reads a number"),
    "branch": (lambda x: {"y": x if x.sum() > 0 else -x}, "reads a number"),
    "tolist": (lambda x: {"y": x * x.tolist()[0]}, "tolist reads"),
    "mask": (lambda x: {"y": x[x > 0.5]}, "takes a mask"),
    "masked write": (lambda x: {"y": x.clone().index_put_((x > 0.5,), x.new_zeros(()))}, "takes a mask"),
    "nonzero": (lambda x: {"y": x.nonzero()}, "shape depends on values"),
    "random": (lambda x: {"y": x + torch.rand(4)}, "draws random numbers"),
    "generator": (lambda x: {"y": x + torch.randn(4, generator=torch.Generator())}, "draws random numbers"),
    "dropout": (lambda x: {"y": nn.functional.dropout(x)}, "draws random numbers"),
    "from the host": (lambda x: {"y": x * torch.tensor(3.0)}, "copied from the host"),
    "new_tensor": (lambda x: {"y": x * x.new_tensor(3.0)}, "copied from the host"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_a_step_that_no_graph_can_hold_stays_eager_with_one_line_and_is_seen_before_its_capture(name):
    function, message = UNSAFE[name]
    one, lines = tape()
    one.backend.capture = None  # must not be called
    for _ in range(6):
        one.run("a step", function, {"x": torch.tensor([0.1, 0.7, 0.3, 0.9])})
    (line,) = lines
    assert line.startswith("without a CUDA graph, a step: ") and message in line and "test_graphs.py:" in line
    assert one.counts["a step"] == {"eager": 6, "captures": 0, "replays": 0}
    x = torch.rand(4)
    with pytest.raises(CaptureError, match=message):
        Tape().capture(lambda: function(x))


@pytest.mark.parametrize("kind", ["index", "where", "full", "cat", "max_pool2d"])
def test_what_a_graph_can_hold_is_not_refused(kind):
    x, places = torch.rand(1, 1, 4, 4), torch.tensor([0, 0])
    function = {
        "index": lambda: x[places],
        "where": lambda: torch.where(x > 0.5, x, torch.zeros_like(x)),
        "full": lambda: x + torch.full((), 3.0),
        "cat": lambda: torch.cat([x, x]).clamp(0, 1).sort().values,
        "max_pool2d": lambda: nn.functional.max_pool2d(x, 3, 2, 1),
    }[kind]
    with Guard("cpu") as guard:
        expected = function()
    assert guard.found is None
    replay, found = Tape().capture(function)
    replay()
    assert torch.equal(found, expected)


def test_a_capture_that_fails_leaves_all_state_and_ends_all_captures():
    model, (one, lines) = network(), tape(warmup=1)
    optimizer = fused_sgd(model)
    step = step_of(model, optimizer)
    x, y = images(0)
    step(x, y)  # the momentum exists
    broken = False

    def fails(x, y):
        found = step(x, y)
        if broken:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return found

    one.run("a step", fails, {"x": x, "y": y})
    state = {name: value.clone() for name, value in model.state_dict().items()}
    broken, capture = True, one.backend.capture

    def only_the_capture_fails(function):
        nonlocal broken
        try:
            return capture(function)
        finally:
            broken = False
            assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())

    one.backend.capture = only_the_capture_fails
    one.run("a step", fails, {"x": x, "y": y})
    twin = network()
    twin_step = step_of(twin, fused_sgd(twin))
    for _ in range(3):
        twin_step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))
    (line,) = lines
    assert "captures nothing more: RuntimeError: operation not permitted when stream is capturing" in line
    for _ in range(3):
        one.run("another", lambda x: {"y": x}, {"x": x})
    assert one.counts["another"] == {"eager": 3, "captures": 0, "replays": 0} and len(lines) == 1


def test_a_step_that_makes_new_state_in_its_capture_stays_eager():
    one, lines = tape(warmup=1)
    model = network()

    def replaces(x):
        model.norm.running_mean = model.norm.running_mean + x.mean()
        return {"y": x}

    for _ in range(3):
        one.run("a step", replaces, {"x": torch.ones(2)}, watch=lambda: fingerprint(model.convolution))
    assert not lines  # nobody watched
    one.run("b", lambda x: {"y": x}, {"x": torch.ones(2)}, watch=lambda: fingerprint(model))
    function = lambda x: replaces(x)  # noqa: E731
    one._entries["b"].popitem()
    watch = lambda: fingerprint(model)  # noqa: E731
    entry = one._entry("b", ("key",))
    assert "replaced tensors" in one._capture(entry, function, {"x": torch.ones(2)}, watch, watch())


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="warmup and keep must be at least 1"):
        Graphs(Tape(), warmup=0)
    with pytest.raises(ValueError, match="graphs = on needs a CUDA device; got cpu"):
        graphs.choose("on", torch.device("cpu"))
    assert graphs.choose("auto", torch.device("cpu")) == "off" == graphs.choose("off", torch.device("cuda"))
    assert graphs.choose("auto", torch.device("cuda")) == "on"


def test_deferred_numbers_have_the_bits_of_read_ones():
    a, b = torch.rand(2, dtype=torch.float32)
    formula = lambda: (number(a) + 0.01 * number(b)) / 3  # noqa: E731
    with deferred():
        later = formula()
    assert isinstance(formula(), float) and later.dtype == torch.float64
    assert updates.read({"one": later, "two": 2.5}) == {"one": formula(), "two": 2.5}


# ---- the attack ------------------------------------------------------------------------------------------------------

ATTACKS = {
    "linf": {"epsilon": 8 / 255, "step_size": 2 / 255},
    "l2": {"norm": "l2", "epsilon": 0.5, "step_size": 0.2},
    "per image": {"epsilon": torch.linspace(0.01, 0.1, 7), "step_size": torch.linspace(0.005, 0.05, 7)},
    "batch statistics": {"epsilon": 0.1, "step_size": 0.03, "statistics": "batch"},
    "targeted margin": {"epsilon": 0.1, "step_size": 0.03, "targeted": True, "loss": "margin"},
    "no random start": {"epsilon": 0.1, "step_size": 0.03, "random_start": False},
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_from_a_graph_is_the_eager_attack_and_sees_the_weights_of_its_call(name):
    model, (one, lines), found = network(), tape(), []
    for index in range(6):
        x, y = images(index)
        options = {"steps": 3, **ATTACKS[name]}
        modes = [module.training for module in model.modules()]
        buffers = {each: value.clone() for each, value in model.named_buffers()}
        results = [
            attacks.pgd(model, x, y, generator=seeding.generator(index, "start"), graphs=each, **options)
            for each in (None, one)
        ]
        assert torch.equal(*results) and results[1].stride() == x.stride()
        assert modes == [module.training for module in model.modules()]
        assert all(torch.equal(buffers[each], value) for each, value in model.named_buffers())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        found.append(results[1])
        with torch.no_grad():  # the next attack meets other weights and other averages
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=seeding.generator(index, "move")), alpha=0.3)
            model(x)
    assert not lines and one.counts["the attack"] == {"eager": 3, "captures": 1, "replays": 3}


def test_an_attack_from_a_graph_draws_from_the_default_generator_as_the_eager_one_does():
    model, (one, _) = network(), tape(warmup=1)
    x, y = images(0)
    state = torch.get_rng_state()
    calls = [attacks.pgd(model, x, y, epsilon=0.1, step_size=0.05, steps=2, graphs=g) for g in (None, one, one, one)]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(calls[0], each) for each in calls)
    torch.rand(1)
    later = [attacks.pgd(model, x, y, epsilon=0.1, step_size=0.05, steps=2, graphs=g) for g in (None, one)]
    assert torch.equal(*later) and not torch.equal(later[0], calls[0])


@pytest.mark.parametrize("name", ["epsilon", "step_size", "steps", "norm", "lower", "statistics", "loss", "model"])
def test_another_setting_or_model_is_another_attack(name):
    usual = {"model": network(), "epsilon": 0.1, "step_size": 0.04, "steps": 3, "norm": "linf", "random_start": False}
    value = {"steps": 1, "norm": "l2", "lower": -1.0, "statistics": "batch", "loss": "margin", "model": network(1)}
    other = usual | {name: value.get(name, 0.02)}
    (one, _), (x, y) = tape(warmup=1), images(0)
    for options in (usual, other, usual):
        eager = attacks.pgd(x=x, y=y, **options)
        assert all(torch.equal(eager, attacks.pgd(x=x, y=y, graphs=one, **options)) for _ in range(3))
    assert one.counts["the attack"] == {"eager": 2, "captures": 2, "replays": 7}


def test_a_label_out_of_range_is_refused_before_a_replay():
    model, (one, _) = network(), tape(warmup=1)
    x, y = images(0)
    attack = lambda y: attacks.pgd(model, x, y, epsilon=0.1, step_size=0.05, steps=2, graphs=one)  # noqa: E731
    attack(y), attack(y)
    with pytest.raises(ValueError, match="labels must be below the number of logits, 4, got 4"):
        attack(torch.full_like(y, 4))


def test_attacks_that_look_at_what_they_found_run_as_without_graphs():
    model, (one, _) = network(), tape(warmup=1)
    x, y = images(0)
    for options in ({"restarts": 2}, {"early_drop": True}):
        results = [
            attacks.pgd(model, x, y, epsilon=0.1, step_size=0.05, steps=2, graphs=each, **options)
            for each in (None, one)
        ]
        assert torch.equal(*results)
    attacks.pgd(lambda x: model(x), x, y, epsilon=0.1, step_size=0.05, steps=2, graphs=one)
    assert one.counts == {}


# ---- the steps of the methods ----------------------------------------------------------------------------------------

CAPTURED = {
    "darts": {},
    "darts, second order": {"order": 2},
    "darts, clean": {"adversarial": "none"},
    "pcdarts": {"adversarial": "both", "partial": 2},
    "rnas": {},
    "rnas, PGD": {"inputs": "pgd"},
    "advrush, curvature": {"start_epoch": 0},
    "dsara, stage 1": {},
    "dsara, stage 2": {"switch_epoch": 0},
}


def method_config(search_config: SearchConfig, case: str, options: dict) -> SearchConfig:
    name = case.split(",")[0]
    options = replace(options_for(name), **options)
    of_space = {"space": "dsara", "layers": 5} if name == "dsara" else {}
    return replace(search_config, method=name, options=options, nodes=1, channels=4, **of_space)


def iterations(config: SearchConfig, one: Graphs, count: int = 4) -> tuple[dict, list[dict]]:
    """The state of a search after so many iterations, the rate of the weights falling, and their numbers."""
    start = problem(config, dtype=torch.float32, images=4)
    sgd = torch.optim.SGD(start.supernet.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    adam = torch.optim.Adam(start.method.parameters(), lr=0.01, betas=(0.5, 0.999))
    updates.make_capturable(sgd, adam, torch.device("cpu"))
    numbers = []
    for index in range(count):
        set_learning_rate(sgd, 0.05 / (1 + index))
        purposes = seeding.purposes(0, index)
        step = replace(start.step, weight_optimizer=sgd, graphs=one, index=index, generator=purposes, epochs=2)
        numbers.append(
            search.search_step(start.supernet, start.method, start.train, start.valid, step, adam, grad_clip=5.0)
        )
    return start.supernet.state_dict() | start.method.state_dict(), numbers


@pytest.mark.parametrize("case", CAPTURED)
def test_iterations_from_graphs_have_the_bits_of_eager_ones(search_config, monkeypatch, case):
    monkeypatch.setenv("RNAS_BACKEND", "reference")  # what a GPU without kernels of its own runs
    config = method_config(search_config, case, CAPTURED[case])
    eager, numbers = iterations(config, Graphs(Eager(), warmup=100))
    one = Graphs(Tape(), warmup=1, report=pytest.fail)
    captured, found = iterations(config, one)
    assert all(each["replays"] >= 2 for each in one.counts.values()), one.counts
    assert {"the step of the weights", "the step of the architecture"} <= set(one.counts)
    assert numbers == found and all(isinstance(value, float) for each in found for value in each.values())
    assert all(torch.equal(eager[name], captured[name]) for name in eager)


def test_iterations_of_the_fused_ops_from_graphs_are_the_eager_ones(search_config, compiled):
    """Up to the rounding of batch norm averages, which the fused ops move by other code while a tape is watching."""
    config = method_config(search_config, "rnas", {})
    eager, numbers = iterations(config, Graphs(Eager(), warmup=100))
    captured, found = iterations(config, Graphs(Tape(), warmup=1, report=pytest.fail))
    assert numbers == found
    for name, value in eager.items():
        if "running" in name:
            torch.testing.assert_close(captured[name], value, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(captured[name], value), name


EAGER = {
    "racl": ({"adversarial": "both"}, ["racl reads its constants and its bound in it"]),
    "dsrna": ({"adversarial": "both"}, ["dsrna measures R in it, with random rows and numbers that it reads"]),
}


@pytest.mark.parametrize("case", EAGER)
def test_methods_that_cannot_be_captured_say_so_once_and_their_attacks_are(search_config, case):
    options, reasons = EAGER[case]
    one, lines = tape(warmup=1)
    iterations(method_config(search_config, case, options), one, 2)
    assert [line.partition(": ")[2] for line in lines] == reasons
    assert one.counts["the attack"]["replays"] > 0


@pytest.mark.parametrize("adversarial", ["both", "none"])
def test_the_weight_step_of_racl_has_the_bits_of_the_eager_one_and_a_new_sample_each_time(
    search_config, monkeypatch, adversarial
):
    monkeypatch.setenv("RNAS_BACKEND", "reference")
    config = method_config(search_config, "racl", {"adversarial": adversarial})
    eager, numbers = iterations(config, Graphs(Eager(), warmup=100))
    one, _ = tape(warmup=1)
    captured, found = iterations(config, one)
    assert one.counts["the step of the weights"]["replays"] >= 2
    assert numbers == found and all(torch.equal(eager[name], captured[name]) for name in eager)

    first = {}

    def stuck(self, source, draw=Racl.draw):
        first.update(first or draw(self, source))
        return first

    monkeypatch.setattr(Racl, "draw", stuck)
    assert iterations(config, tape(warmup=1)[0])[1] != found


def test_the_guard_finds_what_the_methods_say_of_themselves(search_config):
    """An architecture step of RACL or DSRNA that claimed to be capturable would be refused, where it reads."""
    for case, (options, _) in EAGER.items():
        start = problem(method_config(search_config, case, options), dtype=torch.float32)
        batches = start.prepared()
        with Guard("cpu") as guard:
            start.method.architecture_step(start.supernet, *batches, replace(start.step, epochs=2))
        assert guard.found is not None, case


def test_random_numbers_in_a_captured_step_are_refused(search_config):
    start = problem(method_config(search_config, "darts", {}), dtype=torch.float32)
    method, (one, _) = start.method, tape(warmup=1)
    plain = method.weight_loss

    def noisy(supernet, train, step):
        step.generator("noise")
        return plain(supernet, train, step)

    method.weight_loss = noisy
    train, _ = start.prepared()
    with pytest.raises(RuntimeError, match=r"random numbers \(noise\) cannot be drawn in a step that is captured"):
        updates.weight_update(start.supernet, method, train, replace(start.step, graphs=one), grad_clip=0)


# ---- the search ------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_tape(monkeypatch) -> list[Graphs]:
    """Searches on the CPU capture; the graphs that they used."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setenv("RNAS_BACKEND", "reference")  # see test_iterations_of_the_fused_ops
    used: list[Graphs] = []

    def make(config, device, report):
        used.append(Graphs(Tape(), warmup=1, report=pytest.fail))
        return used[-1]

    monkeypatch.setattr(search, "_graphs", make)
    return used


def test_a_search_from_graphs_has_the_bits_of_the_eager_one_and_resumes_to_them(
    search_config, tmp_path, monkeypatch, on_tape
):
    config = replace(search_config, nodes=1)
    captured = search.search(config)
    with monkeypatch.context() as patch:
        patch.setattr(search, "_graphs", lambda *_: Graphs(Eager(), warmup=100))
        eager = search.search(replace(config, run=str(tmp_path / "eager")))
    done, batches = Loop.done, []

    def stop(loop, images, **numbers):
        batches.append(images)
        loop.stop_requested = len(batches) == 4
        return done(loop, images, **numbers)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "done", stop)
        with pytest.raises(Interrupted):
            search.search(replace(config, run=str(tmp_path / "stopped")))
    resumed = search.resume(tmp_path / "stopped", quiet=True)
    states = [final_state(each.run) for each in (eager, captured, resumed)]
    for other in states[1:]:
        assert states[0].keys() == other.keys()
        assert all(torch.equal(states[0][name], other[name]) for name in other)
    assert all(each["replays"] > 0 for each in on_tape[0].counts.values()) and len(on_tape[0].counts) == 3
    records = [
        [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_second")} for line in text]
        for text in ((each.run / "metrics.jsonl").read_text().splitlines() for each in (eager, captured, resumed))
    ]
    assert records[0] == records[1] == records[2]


def test_the_fused_optimizers_are_those_of_the_cpu_up_to_rounding(search_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plain = search.search(search_config)
    monkeypatch.setattr(search, "_graphs", lambda *_: Graphs(Eager(), warmup=100))
    fused = search.search(replace(search_config, run=str(tmp_path / "fused")))
    first, second = final_state(plain.run), final_state(fused.run)
    for name, value in first.items():
        if value.is_floating_point() and "method" in name:
            torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5)


def test_on_a_cpu_nothing_is_captured(search_config):
    config, _ = search._resolve(search_config)
    assert config.graphs == "off" and search._graphs(config, torch.device("cpu"), print) is None
    with pytest.raises(ValueError, match="graphs = on needs a CUDA device"):
        search.search(replace(search_config, graphs="on"))


# ---- a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cuda_an_attack_and_a_training_from_graphs_are_the_eager_ones():
    device = torch.device("cuda", torch.cuda.current_device())
    ends = []
    for backend in (Eager(), CudaGraphs(device)):
        lines: list[str] = []
        one = Graphs(backend, warmup=3 if isinstance(backend, CudaGraphs) else 100, report=lines.append)
        model = network().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        updates.make_capturable(optimizer, torch.optim.Adam([torch.zeros(1, device=device)]), device)
        step = step_of(model, optimizer)
        for index in range(10):
            set_learning_rate(optimizer, 0.1 / (1 + index))
            x, y = (each.to(device) for each in images(index))
            source = seeding.generator(index, "start", device=device)
            x_adv = attacks.pgd(model, x, y, epsilon=0.1, step_size=0.03, steps=3, generator=source, graphs=one)
            one.run("a step", step, {"x": x_adv, "y": y}, watch=lambda: fingerprint(model, optimizer))  # noqa: B023
        ends.append(model.state_dict())
        assert not lines
    assert all(each["replays"] > 0 for each in one.counts.values())
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_cuda_a_search_captures_all_three_steps(search_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made, make = [], search._graphs
    monkeypatch.setattr(search, "_graphs", lambda *how: made.append(make(*how)) or made[-1])
    config = replace(search_config, device="cuda", epochs=4)
    captured = search.search(config)
    assert not made[0].reasons and all(each["replays"] > 0 for each in made[0].counts.values())
    eager = search.search(replace(config, graphs="off", run=str(tmp_path / "eager")))
    first, second = final_state(captured.run), final_state(eager.run)
    for name in first:
        if name.startswith("/method"):
            torch.testing.assert_close(first[name], second[name], rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_cuda_a_capture_that_fails_goes_on_eagerly():
    device = torch.device("cuda", torch.cuda.current_device())
    lines: list[str] = []
    one = Graphs(CudaGraphs(device), report=lines.append)
    x = torch.ones(4, device=device)

    def reads(x):
        torch.cuda.synchronize()  # which the guard does not see
        return {"y": 2 * x}

    before = torch.cuda.current_stream()
    for _ in range(6):
        assert torch.equal(one.run("a step", reads, {"x": x})["y"], 2 * x)
    assert torch.cuda.current_stream() == before and len(lines) == 1
