"""The benchmarks measure what they say, refuse wrong results, and the README shows what was measured."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rnas import kernels
from rnas.kernels.profile import KINDS
from rnas.methods import METHODS

REPOSITORY = Path(__file__).resolve().parents[1]
JOBS = ("forward", "training_step", "alpha_gradient", "pgd_7", "jacobian_norm")
PROVIDERS = ("eager", "channels_last", "compile", "rnas")
STEP = "architecture_step"
KERNEL_PROVIDERS = ("eager", "eager_in_place", "compile", "rnas")
BUILT = not isinstance(kernels.backend.load("cpu"), str)


@pytest.fixture(scope="module")
def benchmarks():
    """The modules of the benchmarks folder, which is no package."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at tiny sizes a second thread only waits
    try:
        import comparison
        import jobs
        import measure
        import problem
        import profiles
        import providers
        import report

        modules = (comparison, jobs, measure, problem, profiles, providers, report)
        yield {module.__name__: module for module in modules}
    finally:
        torch.set_num_threads(threads)
        sys.path.remove(str(REPOSITORY / "benchmarks"))


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> Path:
    """A whole run at tiny sizes on the CPU; the folder of its results, with pytest-benchmark's own record."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "--device", "cpu", "--results", str(folder)]
    command += [f"--benchmark-json={folder / 'pytest-benchmark'}", "-q", "-p", "no:cacheprovider"]
    # One thread: at these sizes a second one only waits, and where other work holds the cores it waits long.
    # pytest-benchmark switches itself off where it believes to be in a worker of pytest-xdist.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**inherited, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def results(quick_run) -> dict:
    (path,) = quick_run.glob("cpu-*.json")
    return json.loads(path.read_text())


def render(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "scripts" / "render_readme.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_run_has_every_row(results):
    found = {(row["job"], row["provider"]): row["status"] for row in results["rows"]}
    expected = {(job, provider): "measured" for job in JOBS for provider in PROVIDERS}
    expected |= {(f"pgd_step_{side}", name): "measured" for side in (32, 224) for name in KERNEL_PROVIDERS}
    expected["jacobian_norm", "compile"] = "unsupported"
    edges = {(job, provider) for job, provider in found if job.startswith("mixed_edge_")}
    assert len(edges) == 2 * 2 * 2 * 3  # training and attack, widths, sizes, providers
    expected |= dict.fromkeys(edges, "measured")
    steps = {(job, provider) for job, provider in found if job == STEP}
    assert {provider.partition(",")[0] for _, provider in steps} == set(METHODS) - {"random"}
    expected |= dict.fromkeys(steps, "measured")
    styles = {(job, provider) for job, provider in found if job.startswith("accelerate")}
    assert len(styles) == 2 * 8 * 4  # supernet and cell, styles, providers
    expected |= dict.fromkeys(styles, "measured")
    assert found == expected
    assert results["complete"]


def test_a_row_has_every_number(results):
    for row in results["rows"]:
        if row["status"] != "measured":
            assert row["seconds_best"] is None
            assert row["note"]
            continue
        assert 0 < row["seconds_best"] <= row["seconds_median"]
        assert row["rounds"] >= 2
        assert row["batch"] == 2
        assert row["error"] < 2e-2
        assert row["launches"] is None  # a GPU's
        no_flops = row["job"] in ("jacobian_norm", STEP) or row["job"].startswith("pgd_step")
        assert (row["flops"] is None) == no_flops
        assert (row["bytes_moved"] is None) == (not row["job"].startswith("pgd_step"))
        if row["job"] in JOBS:
            assert (row["saved_bytes"] > 0) == (row["job"] != "forward")
            assert row["peak_bytes"] is not None or not Path("/proc/self/statm").exists()
        assert (row["profile"] is not None) == (BUILT and row["job"] in JOBS and row["provider"] == "rnas")


@pytest.mark.skipif(not BUILT, reason="rnas._cpu is not built")
def test_rows_of_the_fused_supernet_say_where_the_time_goes(results):
    flops = {row["job"]: row["flops"] for row in results["rows"] if row["provider"] == "rnas"}
    found = {row["job"]: row["profile"] for row in results["rows"] if row.get("profile")}
    assert set(found) == set(JOBS)
    for job, profile in found.items():
        assert list(profile["seconds"]) == list(profile["multiply_adds"]) == list(KINDS)
        assert min(profile["seconds"].values()) >= 0
        inside = profile["total_seconds"]
        assert 0 < sum(profile["seconds"].values()) <= 1.05 * inside
        assert inside <= 1.05 * results["threads"] * profile["wall_seconds"]
        adds = profile["multiply_adds"]
        gradients = {kind for kind in KINDS if kind.endswith(("_input", "_weight")) and adds[kind]}
        to_input, to_weight = {"depthwise_input", "pointwise_input"}, {"depthwise_weight", "pointwise_weight"}
        expected = {"forward": set(), "pgd_7": to_input, "alpha_gradient": to_input}
        assert gradients == expected.get(job, to_input | to_weight), job
    # The stem's convolution is outside the kernels; the halves of a reduction are computed with zeros for each other.
    assert 0.5 < 2 * sum(found["forward"]["multiply_adds"].values()) / flops["forward"] < 1.5


def test_jobs_cost_what_they_should_in_proportion(results):
    rows = {(row["job"], row["provider"]): row for row in results["rows"]}
    flops = {job: rows[job, "eager"]["flops"] for job in JOBS}
    # Input gradients are the products of the forward pass again, weight gradients once more. Training needs none to the
    # images; the gradient to alpha also ends at the first cell's edges and at the preprocessing of its inputs.
    assert 2.5 * flops["forward"] < flops["training_step"] < 3 * flops["forward"]
    assert 1.3 * flops["forward"] < flops["alpha_gradient"] < 2 * flops["forward"]
    assert flops["pgd_7"] == 7 * 2 * flops["forward"]
    saved = {job: rows[job, "eager"]["saved_bytes"] for job in JOBS}
    assert saved["jacobian_norm"] > 1.5 * saved["training_step"]
    assert saved["pgd_7"] < 1.1 * saved["training_step"], "steps of an attack are saved one at a time"


def test_the_head_says_what_was_measured_on_what(results):
    assert results["kind"] == "cpu"
    assert results["threads"] >= 1
    assert results["versions"]["torch"] == torch.__version__
    assert len(results["load_before"]) == 3
    assert min(results["ceilings"].values()) > 0
    assert results["command"].startswith("python -m pytest benchmarks --quick")
    assert results["size"] == {"channels": 4, "layers": 3, "nodes": 2, "image": 16, "batches": [2]}


def test_no_folder_of_the_machine_gets_into_the_results(quick_run, results):
    text = json.dumps(results)
    assert str(quick_run) not in text
    assert str(REPOSITORY) not in text


def test_pytest_benchmark_reports_the_same_times(quick_run, results):
    record = json.loads((quick_run / "pytest-benchmark").read_text())
    theirs = {
        (each["extra_info"]["job"], each["extra_info"]["provider"]): each["stats"] for each in record["benchmarks"]
    }
    ours = {(row["job"], row["provider"]): row for row in results["rows"] if row["status"] == "measured"}
    assert theirs.keys() == ours.keys()
    for key, row in ours.items():
        assert theirs[key]["min"] == pytest.approx(row["seconds_best"])
        assert theirs[key]["median"] == pytest.approx(row["seconds_median"])
        assert theirs[key]["rounds"] == row["rounds"]


class TestComparison:
    """Which candidates get a time."""

    @pytest.fixture
    def compare(self, benchmarks):
        comparison, prepared = benchmarks["comparison"], benchmarks["providers"].Prepared
        expected = torch.arange(1.0, 101.0)

        def distance(found, wanted):
            return float((found[0] - wanted[0]).norm() / wanted[0].norm())

        def run(*, outcome=None, **others):
            runs = {"eager": lambda: [expected.clone()], **others}
            candidates = {name: lambda run=run: prepared(run, run, run) for name, run in runs.items()}
            gate = comparison.Gate(distance, 1e-3, outcome)
            rows = comparison.compare("job", 1, candidates, gate, device="cpu", budget_seconds=0.0)
            return {row.provider: row for row in rows}

        run.expected = expected
        return run

    @pytest.mark.parametrize("factor", [1.002, -1.0, float("nan"), 0.0])
    def test_a_wrong_provider_is_refused(self, compare, factor):
        rows = compare(wrong=lambda: [compare.expected * factor], right=lambda: [compare.expected * 1.0001])
        assert rows["wrong"].status == "refused"
        assert rows["wrong"].seconds == []
        assert rows["wrong"].as_dict()["seconds_best"] is None
        assert "distance to the reference" in rows["wrong"].note
        assert rows["right"].status == rows["eager"].status == "measured"
        assert len(rows["right"].seconds) == len(rows["eager"].seconds) == 2

    def test_one_that_raises_leaves_the_others(self, compare):
        def broken():
            raise RuntimeError("no such kernel\nmore")

        def absent():
            raise NotImplementedError("not offered")

        rows = compare(broken=broken, absent=absent)
        assert (rows["broken"].status, rows["broken"].note) == ("failed", "RuntimeError: no such kernel")
        assert (rows["absent"].status, rows["absent"].note) == ("unsupported", "not offered")
        assert rows["eager"].status == "measured"

    def test_a_reference_that_raises_is_an_error(self, benchmarks, compare):
        def broken():
            raise RuntimeError("no memory")

        with pytest.raises(RuntimeError, match="the reference eager does not run: RuntimeError: no memory"):
            compare(eager=broken)

    def test_a_run_that_ends_elsewhere_than_its_sample_promised_is_refused(self, benchmarks):
        comparison, prepared = benchmarks["comparison"], benchmarks["providers"].Prepared

        def same():
            return [torch.ones(1)]

        candidates = {
            "eager": lambda: prepared(same, same, same),
            "weak": lambda: prepared(lambda: [torch.full((1,), 0.5)], same, same),
        }
        gate = comparison.Gate(lambda found, wanted: 0.0, 0.0, outcome=lambda output: float(output[0]))
        eager, weak = comparison.compare("job", 1, candidates, gate, device="cpu", budget_seconds=0.0)
        assert eager.status == "measured"
        assert (weak.status, weak.seconds) == ("refused", [])

    def test_profiles_are_of_the_sample_and_of_what_was_asked_for(self, benchmarks, monkeypatch):
        comparison, prepared = benchmarks["comparison"], benchmarks["providers"].Prepared
        samples = []

        def sample():
            samples.append(1)
            return [torch.ones(1)]

        def candidate(outcome):
            return lambda: prepared(lambda: [torch.full((1,), outcome)], sample, sample)

        def row(outcome, profiled):
            samples.clear()
            candidates = {"eager": candidate(1.0), "other": candidate(outcome)}
            gate = comparison.Gate(lambda found, wanted: 0.0, 0.0, outcome=lambda output: float(output[0]))
            options = {"device": "cpu", "budget_seconds": 0.0, "profiled": profiled}
            eager, other = comparison.compare("job", 1, candidates, gate, **options)
            assert eager.profile is None
            return other

        assert row(1.0, ()).profile is None
        without = len(samples)
        assert row(1.0, ("other",)).profile is None, "no kernel has run"
        assert len(samples) == without + 1
        monkeypatch.setattr(benchmarks["profiles"], "take", lambda run: run() and PROFILE)
        assert row(1.0, ("other",)).as_dict()["profile"] == PROFILE
        assert len(samples) == without + 1
        refused = row(0.5, ("other",))
        assert (refused.status, refused.profile) == ("refused", None)

    def test_a_refused_row_fails_its_test(self, benchmarks):
        row = benchmarks["comparison"].Row("job", "wrong", 1, status="refused")
        assert benchmarks["report"].broken(row)
        assert not benchmarks["report"].broken(benchmarks["comparison"].Row("job", "absent", 1, status="unsupported"))


class TestProviders:
    """On the jobs themselves, at tiny sizes."""

    @pytest.fixture
    def problem(self, benchmarks):
        return benchmarks["problem"].build(benchmarks["problem"].QUICK, 2, "cpu")

    def prepare(self, benchmarks, name, job, problem, backend="eager"):
        (provider,) = (each for each in benchmarks["providers"].CUDA if each.name == name)
        return benchmarks["providers"].prepare(provider, benchmarks["jobs"].JOBS[job], problem, backend)

    @pytest.mark.parametrize("name", JOBS)
    def test_one_forgotten_operation_is_out_of_tolerance(self, benchmarks, problem, name):
        job = benchmarks["jobs"].JOBS[name]
        expected = self.prepare(benchmarks, "eager", name, problem).sample()
        for right in ("channels_last", "rnas"):
            again = self.prepare(benchmarks, right, name, problem).sample()
            assert job.distance(again, expected) <= job.tolerance, right
        edge = problem.supernet.cells[1].mixed[0]
        edge.candidates[4].register_forward_hook(lambda module, inputs, output: output * 0)
        found = self.prepare(benchmarks, "eager", name, problem).sample()
        assert job.distance(found, expected) > job.tolerance

    @pytest.mark.parametrize("name", JOBS)
    def test_one_wrong_weight_of_the_fused_supernet_is_out_of_tolerance(self, benchmarks, problem, name):
        job = benchmarks["jobs"].JOBS[name]
        expected = self.prepare(benchmarks, "eager", name, problem).sample()
        with torch.no_grad():
            problem.supernet.cells[1].mixed[0].convolution_weights[1].zero_()
        found = self.prepare(benchmarks, "rnas", name, problem).sample()
        assert job.distance(found, expected) > job.tolerance

    @pytest.mark.parametrize("name", JOBS)
    def test_plain_autocast_is_the_measure_of_rnas_under_it(self, benchmarks, problem, name):
        job, comparison = benchmarks["jobs"].JOBS[name], benchmarks["comparison"]
        names = ("eager", "channels_last_bf16", "rnas_bf16")
        candidates = {each: functools.partial(self.prepare, benchmarks, each, name, problem) for each in names}
        gate = comparison.Gate(job.distance, job.tolerance)
        rows = comparison.compare(name, 2, candidates, gate, device="cpu", budget_seconds=0)
        assert [row.status for row in rows] == ["measured"] * 3
        assert rows[1].error > rows[0].error == 0

    def test_a_wrong_provider_under_autocast_is_refused(self, benchmarks):
        comparison, prepared = benchmarks["comparison"], benchmarks["providers"].Prepared

        def candidate(value, autocast=None):
            def run():
                return [torch.tensor([value])]

            return lambda: prepared(run, run, run, autocast=autocast)

        bf16 = torch.bfloat16
        candidates = {"eager": candidate(1.0), "plain": candidate(1.1, bf16), "as good": candidate(0.9, bf16)}
        candidates |= {"worse": candidate(1.2, bf16), "fp32": candidate(1.1)}
        gate = comparison.Gate(benchmarks["jobs"].relative_error, 1e-4)
        rows = comparison.compare("job", 1, candidates, gate, device="cpu", budget_seconds=0)
        assert [row.status for row in rows] == ["measured", "measured", "measured", "refused", "refused"]

    def test_a_search_iteration_is_its_parts(self, benchmarks, problem):
        """On a GPU alone it is a row of its own."""
        job = benchmarks["jobs"].JOBS["search_iteration"]
        expected, ours = (self.prepare(benchmarks, name, job.name, problem).sample() for name in ("eager", "rnas"))
        assert job.distance(ours, expected) <= job.tolerance
        assert job.distance(ours[1:], [2 * each for each in expected[1:]]) > job.tolerance
        captured = job.captured_sample(problem.arranged(torch.channels_last))
        assert job.distance(captured, expected) <= job.tolerance
        assert len(expected) == len(problem.alpha) + len(list(problem.supernet.parameters()))

    def test_only_one_provider_calls_the_fused_ops(self, benchmarks, problem, monkeypatch):
        calls = []
        for name in ("mixed_op", "mixed_cell", "relu_conv_norm"):
            original = getattr(kernels, name)
            monkeypatch.setattr(kernels, name, lambda *a, o=original, n=name, **k: calls.append(n) or o(*a, **k))
        for name in PROVIDERS:
            calls.clear()
            self.prepare(benchmarks, name, "forward", problem).run()
            assert set(calls) == ({"mixed_cell", "relu_conv_norm"} if name == "rnas" else set()), name

    def test_jobs_leave_the_problem_to_the_next_provider(self, benchmarks, problem):
        before = {name: each.clone() for name, each in problem.supernet.state_dict().items()}
        for name in JOBS:
            self.prepare(benchmarks, "eager", name, problem).run()
        for name, each in problem.supernet.state_dict().items():
            assert torch.equal(each, before[name]), name

    def test_channels_last_is_so_throughout(self, benchmarks, problem):
        arranged = problem.arranged(torch.channels_last)
        assert arranged.x.is_contiguous(memory_format=torch.channels_last)
        assert not arranged.x.is_contiguous()
        for weight in arranged.supernet.parameters():
            assert weight.dim() != 4 or weight.is_contiguous(memory_format=torch.channels_last)
        assert problem.x.is_contiguous()

    def test_compiled_edges_share_graphs_over_cells_and_batches(self, benchmarks):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        for batch in (4, 3):
            problem = benchmarks["problem"].build(benchmarks["problem"].QUICK, batch, "cpu")
            prepared = self.prepare(benchmarks, "compile", "training_step", problem, backend)
            prepared.run()
            assert len(graphs) == 3, "one per width"
        assert "7 of 15 mixed edges" in prepared.note

    def test_what_torch_compile_cannot_do_is_said(self, benchmarks, problem):
        with pytest.raises(NotImplementedError, match="double backward"):
            self.prepare(benchmarks, "compile", "jacobian_norm", problem)


class TestInstruments:
    """Against amounts that are known."""

    def test_rounds_are_interleaved(self, benchmarks):
        calls = []
        functions = {name: lambda name=name: calls.append(name) for name in "abc"}
        times = benchmarks["measure"].interleaved(functions, "cpu", rounds=4)
        assert ["".join(calls[i : i + 3]) for i in range(0, 12, 3)] == ["abc", "bca", "cab", "abc"]
        assert {name: len(each) for name, each in times.items()} == {"a": 4, "b": 4, "c": 4}

    def test_saved_bytes_count_each_storage_once_while_it_lives(self, benchmarks):
        network = torch.nn.Linear(8, 8, bias=False)
        x = torch.rand(4, 8, requires_grad=True)

        def one_step():
            y = torch.tanh(network(x))  # saves x and the output of tanh
            z = y.view(8, 4) * y.view(8, 4)  # saves two views of the same output
            torch.autograd.grad(z.sum(), [x, network.weight])

        def two_steps():
            one_step()
            one_step()

        expected = 2 * 4 * 8 * 4
        assert benchmarks["measure"].saved_bytes(one_step, network) == expected
        assert benchmarks["measure"].saved_bytes(two_steps, network) == expected

    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
    @pytest.mark.parametrize("resettable", [True, False])
    def test_peak_bytes_see_what_is_held_for_a_moment(self, benchmarks, monkeypatch, resettable):
        if not resettable:
            monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError()))
        size = 256 * 2**20

        def hold():
            block = torch.ones(size, dtype=torch.uint8)
            block.add_(1)

        assert 0.95 * size < benchmarks["measure"].peak_bytes(hold, "cpu") < 1.2 * size
        assert benchmarks["measure"].peak_bytes(lambda: None, "cpu") < 0.1 * size

    def test_peak_bytes_see_what_the_kernels_keep_for_their_next_call(self, benchmarks):
        if not Path("/proc/self/statm").exists():
            pytest.skip("needs Linux")
        kernels.empty_cache()
        size = 64 * 2**20

        def call():
            kernels.fused.POOL.take(size).fill_(1)

        for _ in range(2):
            assert 0.9 * size < benchmarks["measure"].peak_bytes(call, "cpu") < 1.5 * size
        kernels.empty_cache()

    @pytest.mark.parametrize("groups", [1, 8])
    def test_arithmetic_of_convolutions(self, benchmarks, groups):
        convolution = torch.nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=groups, bias=False)
        x = torch.rand(3, 8, 9, 9, requires_grad=True)
        forward = 2 * 3 * 8 * 5 * 5 * (8 // groups) * 9
        for wanted, factor in (((), 1), ((x,), 2), ((convolution.weight,), 2), ((x, convolution.weight), 3)):
            with benchmarks["measure"].ConvolutionCounter() as counter:
                y = convolution(x)
                if wanted:
                    torch.autograd.grad(y.sum(), wanted)
            assert counter.total == factor * forward


PROFILE = {  # on two threads, that is of one second
    "seconds": {"tiles": 0.1, "pointwise": 0.5, "depthwise_input": 0.0},
    "multiply_adds": {"tiles": 0, "pointwise": 10**10, "depthwise_input": 0},
    "total_seconds": 0.75,
    "wall_seconds": 0.5,
}


def test_another_width_is_another_file(benchmarks, tmp_path):
    make = benchmarks["report"].Session
    usual, wider = make("cpu", True, tmp_path, ""), make("cpu", True, tmp_path, "", channels=36)
    assert wider.path.name == usual.path.name.replace(".json", ".c36.json")
    assert (wider.size.channels, wider.size.layers) == (36, usual.size.layers) and usual.size.channels != 36


def test_edges_of_each_batch_have_a_table(monkeypatch):
    head = {"threads": 2, "kind": "cuda", "versions": {}, "device": "a GPU", "precision": "float32", "commit": "c"}
    head |= {"date": "2026-01-01", "command": "python -m pytest benchmarks", "complete": True}
    head["ceilings"] = dict.fromkeys(("flops_per_second", "copy_bytes_per_second", "in_place_bytes_per_second"), 1e12)
    row = {"provider": "rnas", "flops": 10**9, "bytes_moved": None, "note": "", "profile": None, "status": "measured"}
    rows = [
        row | {"job": "mixed_edge_attack_16_28x28", "batch": batch, "provider": name, "seconds_best": seconds}
        for batch, factor in ((64, 1.0), (256, 4.0))
        for name, seconds in (("channels_last", 0.006 * factor), ("rnas", 0.002 * factor))
    ]
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    text = importlib.import_module("render_readme").device_section(head | {"rows": rows})
    assert "batch 64: time" in text and "batch 256: time" in text
    assert "| C=16 | 2.00 ms (3.0x), 50% |" in text and "| C=16 | 8.00 ms (3.0x), 12% |" in text


def test_the_terminal_shows_where_the_time_goes(benchmarks, capsys):
    session = benchmarks["report"].Session("cpu", True, None, "")
    session.head |= {"threads": 2, "ceilings": {"flops_per_second": 100e9}}
    rows = [
        benchmarks["comparison"].Row("forward", name, 16, seconds=[0.5], profile=profile)
        for name, profile in (("eager", None), ("rnas", PROFILE))
    ]
    session.row(("forward", 16), "rnas", lambda: rows)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        "forward batch 16 eager 500.000 ms".split(),
        "forward batch 16 rnas 500.000 ms".split(),
        "of one sample, 500.000 ms, threads: 2".split(),
        "tiles 10.0%".split(),
        "pointwise 50.0% 80% of the ceiling".split(),
        "waiting, tables 15.0%".split(),
        "outside the kernels 25.0%".split(),
    ]


DEMO = "<!-- demo:begin -->\nstale demo\n<!-- demo:end -->\n"


def test_readme_is_rendered_from_the_results(tmp_path, quick_run):
    readme = tmp_path / "README.md"
    readme.write_text(f"{DEMO}before\n<!-- benchmarks:begin -->\nstale table\n<!-- benchmarks:end -->\nafter\n")
    assert render("--readme", readme, "--results", quick_run, "--check").returncode == 1
    assert "stale table" in readme.read_text()
    assert render("--readme", readme, "--results", quick_run).returncode == 0
    text = readme.read_text()
    assert "<!-- demo:end -->\nbefore\n<!-- benchmarks:begin -->\n" in text
    assert text.endswith("\n<!-- benchmarks:end -->\nafter\n")
    assert "stale table" not in text
    assert "Not measured on a GPU yet" in text
    for words in (
        "training step",
        "gradient to alpha",
        "PGD-7",
        "channels_last",
        "torch.compile",
        "x)",
        torch.__version__,
    ):
        assert words in text
    assert ("| outside the kernels |" in text) == BUILT
    assert render("--readme", readme, "--results", quick_run, "--check").returncode == 0


def test_the_readme_shows_where_the_time_goes_at_the_largest_batch(tmp_path, results):
    readme = tmp_path / "README.md"
    (like,) = (row for row in results["rows"] if (row["job"], row["provider"]) == ("forward", "rnas"))

    def table(*profiles):
        readme.write_text(f"{DEMO}<!-- benchmarks:begin -->\n<!-- benchmarks:end -->\n")
        rows = [like | {"job": job, "batch": batch, "profile": profile} for job, batch, profile in profiles]
        head = {"threads": 2, "ceilings": results["ceilings"] | {"flops_per_second": 100e9}}
        (tmp_path / "cpu.json").write_text(json.dumps(results | head | {"rows": rows}))
        done = render("--readme", readme, "--results", tmp_path)
        assert done.returncode == 0, done.stderr
        _, found, rest = readme.read_text().partition("| where the time goes")
        return (found + rest).partition("\n\n")[0].splitlines()

    gradients = PROFILE | {
        "seconds": {"tiles": 0.2, "pointwise": 0.0, "depthwise_input": 0.25},
        "multiply_adds": {"tiles": 0, "pointwise": 0, "depthwise_input": 5 * 10**9},
        "wall_seconds": 1.0,
    }
    smaller = PROFILE | {"wall_seconds": 7.0}
    profiles = [("pgd_7", 64, gradients), ("forward", 16, smaller), ("forward", 64, PROFILE), ("pgd_7", 16, smaller)]
    assert table(*profiles, ("jacobian_norm", 16, None)) == [
        "| where the time goes | forward, 64 | PGD-7, 64 |",
        "| --- | ---: | ---: |",
        "| ReLU, into tiles | 10.0% | 10.0% |",
        "| pointwise | 50.0% (80%) | - |",
        "| depthwise, to the input | - | 12.5% (80%) |",
        "| waiting, tables | 15.0% | 15.0% |",
        "| outside the kernels | 25.0% | 62.5% |",
    ]
    assert table(("forward", 64, None)) == [], "as in the results of a GPU"
    older = {name: value for name, value in like.items() if name != "profile"}
    (tmp_path / "cpu.json").write_text(json.dumps(results | {"rows": [older]}))
    assert render("--readme", readme, "--results", tmp_path).returncode == 0, "as in older files"
    assert "| forward | 2 |" in readme.read_text() and "here the time" not in readme.read_text()


def test_the_readme_compares_a_step_of_every_method_with_plain_darts(tmp_path, results):
    readme = tmp_path / "README.md"
    readme.write_text(f"{DEMO}<!-- benchmarks:begin -->\n<!-- benchmarks:end -->\n")
    like = next(row for row in results["rows"] if row["job"] == STEP)
    rows = [
        like | {"provider": "darts", "seconds_best": 0.2, "peak_bytes": 2**30},
        like | {"provider": "racl", "seconds_best": 0.5, "peak_bytes": 2**21},
        like | {"provider": "dsara", "seconds_best": None, "peak_bytes": None, "status": "failed", "note": "why"},
    ]
    (tmp_path / "cpu.json").write_text(json.dumps(results | {"rows": rows}))
    assert render("--readme", readme, "--results", tmp_path).returncode == 0
    text = readme.read_text()
    assert "| darts | 200 ms | 1x | 1.00 GiB |" in text and "| racl | 500 ms | 2.5x | 2 MiB |" in text
    assert "| dsara | failed | - | - |" in text


def test_every_kind_of_work_has_words_in_the_readme():
    words = (REPOSITORY / "scripts" / "render_readme.py").read_text().partition("KINDS = {")[2].partition("}")[0]
    assert re.findall(r'"(\w+)": ', words) == list(KINDS)


def test_the_demo_table_shows_the_evaluation(tmp_path):
    readme, demo = tmp_path / "README.md", tmp_path / "evaluation.json"
    readme.write_text(f"{DEMO}<!-- benchmarks:begin -->\n<!-- benchmarks:end -->\n")
    networks = [
        {"recipe": "pgd-at", "parameters": 1234, "accuracies": {"clean": 0.975, "pgd-20": 0.9}},
        {"recipe": "standard", "parameters": 1234, "accuracies": {"clean": 0.98, "pgd-20": 0.01}},
    ]
    demo.write_text(json.dumps({"threat": {"norm": "linf", "epsilon": 0.2}, "images": 2000, "networks": networks}))
    assert render("--readme", readme, "--results", tmp_path / "none", "--demo", demo).returncode == 0
    text = readme.read_text()
    assert "| trained against PGD | 1,234 | 97.5% | 90.0% |" in text and "stale demo" not in text
    assert "| trained on clean images | 1,234 | 98.0% | 1.0% |" in text and "Linf ball of radius 0.2" in text


def test_readme_without_results_or_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{DEMO}<!-- benchmarks:begin -->\n<!-- benchmarks:end -->\n")
    assert render("--readme", readme, "--results", tmp_path).returncode == 0
    assert "Not measured on a CPU yet" in readme.read_text()
    readme.write_text("no markers")
    failed = render("--readme", readme, "--results", tmp_path)
    assert failed.returncode == 1
    assert "expected one <!-- benchmarks:begin -->" in failed.stderr
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json is not valid JSON" in render("--readme", readme, "--results", tmp_path).stderr


def test_readme_is_up_to_date():
    checked = render("--check")
    assert checked.returncode == 0, checked.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_the_gpu_script_says_that_it_needs_a_gpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    script = REPOSITORY / "scripts" / "gpu.sh"
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no CUDA device is visible" in done.stderr
    assert not (tmp_path / "out").exists()
