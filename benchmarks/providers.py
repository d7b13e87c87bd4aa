"""Ways to run a job: module by module in both memory formats, through torch.compile, in CUDA graphs, and fused."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import module_per_operation
import torch
from jobs import Job
from problem import Problem
from torch import Tensor, nn

from rnas.supernet import MixedOperation

Run = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Provider:
    """layout: of images and weights; compiled: mixed edges through torch.compile; graph: replayed from a CUDA graph.

    fused: the supernet as `rnas` runs it; else every candidate is a module. autocast: to that dtype; None: float32.
    """

    name: str
    layout: torch.memory_format = torch.contiguous_format
    compiled: bool = False
    graph: bool = False
    fused: bool = False
    autocast: torch.dtype | None = None


@dataclass
class Prepared:
    """A provider made ready for one job: what to time, its sample, and what a reader must know about it.

    eager: the work as separate launches, on which what autograd saves can be observed also for a CUDA graph.
    autocast: that of the provider.
    """

    run: Run
    sample: Run
    eager: Run
    note: str = ""
    autocast: torch.dtype | None = None


CPU = (
    Provider("eager"),
    Provider("channels_last", torch.channels_last),
    Provider("compile", torch.channels_last, compiled=True),
    Provider("rnas", torch.channels_last, fused=True),
)
CUDA = (
    *CPU,
    Provider("eager_graph", graph=True),
    Provider("channels_last_graph", torch.channels_last, graph=True),
    Provider("compile_graph", torch.channels_last, compiled=True, graph=True),
    Provider("rnas_graph", torch.channels_last, fused=True, graph=True),
    Provider("channels_last_bf16", torch.channels_last, autocast=torch.bfloat16),
    Provider("rnas_bf16", torch.channels_last, fused=True, autocast=torch.bfloat16),
    Provider("rnas_bf16_graph", torch.channels_last, fused=True, graph=True, autocast=torch.bfloat16),
)


def providers(device: str) -> tuple[Provider, ...]:
    """The providers of a device type, the reference first."""
    return CUDA if device == "cuda" else CPU


def prepare(provider: Provider, job: Job, problem: Problem, backend: str) -> Prepared:
    """Arranges a copy of the problem for the provider. Nothing is computed yet, but for CUDA graphs.

    backend: of torch.compile. Raises NotImplementedError, with the reason, where the provider cannot do the job.
    """
    if provider.compiled and job.compiles:
        raise NotImplementedError(job.compiles)
    problem = problem.arranged(provider.layout)
    problem.supernet.train(job.training)
    note = ""
    if provider.compiled:
        note = compile_edges(problem.supernet, problem.x.device.type, backend)
    elif not provider.fused:
        module_per_operation.use(problem.supernet)
    sample = job.sample or job.run
    cast = partial(_under_autocast, provider.autocast, problem)
    if not provider.graph:
        return Prepared(cast(job.run), cast(sample), cast(sample), note, provider.autocast)
    run, sample = job.captured or job.run, job.captured_sample or sample
    captured = CapturedGraph(cast(run))
    shorter = captured if job.sample is None else CapturedGraph(cast(sample))
    return Prepared(captured, shorter, cast(sample), note, provider.autocast)


def _under_autocast(dtype: torch.dtype | None, problem: Problem, run: Callable[[Problem], list[Tensor]]) -> Run:
    """`run` on the problem. Autocast keeps no casts of weights between calls: a CUDA graph has to contain them."""

    def cast() -> list[Tensor]:
        with torch.autocast(problem.x.device.type, dtype, cache_enabled=False):
            return run(problem)

    return partial(run, problem) if dtype is None else cast


def compile_edges(supernet: nn.Module, device: str, backend: str) -> str:
    """Sends the mixed edges through torch.compile, in place, and says which.

    Regions, because compiling the whole network takes longer than all measurements together: 5 graphs serve the 112
    edges of the full size, and one set serves all batches. On a CPU the 16 edges of stride 2 stay eager: they do a
    seventh of the work and need two fifths of the compile time.
    """
    compiled = torch.compile(module_per_operation.edge, backend=backend)

    def forward(edge: MixedOperation, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(edge, x, weights)

    def chosen(edge: MixedOperation) -> bool:
        return device == "cuda" or edge.stride == 1

    module_per_operation.use(supernet, lambda edge: forward if chosen(edge) else module_per_operation.edge)
    edges = [module for module in supernet.modules() if isinstance(module, MixedOperation)]
    count = sum(map(chosen, edges))
    return f"torch.compile ({backend}) of {count} of {len(edges)} mixed edges, channels_last, dynamic batch"


class CapturedGraph:
    """A function captured in a CUDA graph. Calling it replays the graph and returns the same output tensors each time.

    peak_bytes: the most memory that the capture held beside what was there before; a replay allocates nothing.
    """

    def __init__(self, function: Run) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazy initialisation and cuDNN's search are forbidden in a capture
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side)
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function()
        self.peak_bytes = torch.cuda.max_memory_allocated() - before

    def __call__(self) -> list[Tensor]:
        self.graph.replay()
        return self.output
