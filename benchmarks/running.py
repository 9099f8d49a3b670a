"""Running and timing models on a card that several runs may share; see end_to_end.py."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.runtime.benchmarking import InductorBenchmarker


def need_gpu() -> None:
    """Ends a script that has nothing to measure on this machine."""
    if not torch.cuda.is_available():
        sys.exit(f"{Path(sys.argv[0]).name} needs an NVIDIA GPU and a PyTorch built for it")


class Jobs:
    """Work in processes of its own, ``count`` at a time; forked, so that they share what is built. 1: in this process."""

    def __init__(self, count: int) -> None:
        if count > 1:  # a process that is forked must not have threads of OpenMP
            torch.set_num_threads(1)
        self.count = count
        self.running: list[multiprocessing.process.BaseProcess] = []

    def start(self, work: Callable[..., None], *args: Any) -> None:
        if self.count == 1:
            return work(*args)
        self.wait(self.count - 1)
        self.running.append(multiprocessing.get_context("fork").Process(target=work, args=args))
        self.running[-1].start()

    def wait(self, left: int = 0) -> None:
        """Until at most ``left`` are running."""
        while len(self.running) > left:
            connection.wait([job.sentinel for job in self.running])
            self.running = [job for job in self.running if job.is_alive()]


class Turn:
    """Whose turn it is on the card, where several runs share it: one holds a lock on a file, and goes before on the CPU too."""

    def __init__(self, path: str | None) -> None:
        self.file = open(path, "w") if path else None

    def take(self) -> None:
        if self.file:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            self._priority(-10)

    def give(self) -> None:
        if self.file:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self._priority(0)
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def _priority(self, nice: int) -> None:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, nice)


def compiled_out_of_turn(
    model: nn.Module, turn: Turn, options: dict[str, Any] | None = None, fullgraph: bool = False
) -> Callable[..., Any]:
    """``torch.compile`` that leaves the card to other runs while inductor works, and has the turn from then on."""

    def inductor(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        turn.give()
        with candidates_in_turn(turn):
            compiled: Any = compile_fx(gm, inputs, config_patches=options)
        turn.take()
        return compiled

    return torch.compile(model, backend=inductor, fullgraph=fullgraph, dynamic=False)


@contextlib.contextmanager
def candidates_in_turn(turn: Turn) -> Iterator[None]:
    """Inductor takes its turn for each candidate that it times."""
    timed_alone = InductorBenchmarker.benchmark_gpu

    def benchmark_gpu(*args: Any, **options: Any) -> Any:
        turn.take()
        try:
            return timed_alone(*args, **options)
        finally:
            turn.give()

    with mock.patch.object(InductorBenchmarker, "benchmark_gpu", benchmark_gpu):
        yield


class GraphReplay:
    """A model captured as one CUDA graph on one input."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.model(images)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self.model(images)
        self.graph.replay()
        return self.out


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def timed(run: Callable[[Tensor], Tensor], images: Tensor, seconds: float) -> tuple[float, float]:
    """(median ms, peak MiB beyond what was allocated before)."""
    for _ in range(3):
        run(images)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 10:
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run(images)
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return sorted(times)[len(times) // 2], peak


def reserved() -> float:
    """MiB of device memory that PyTorch cannot give back."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 2**20


def slowest_kernels(run: Callable[[Tensor], Tensor], images: Tensor) -> str:
    """Table of the kernels of one forward by their share of GPU time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(images)
        torch.cuda.synchronize()
    kernels = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels)
    rows = [[e.key[:80], e.count, e.self_device_time_total / 1e3, e.self_device_time_total / total] for e in kernels[:10]]
    return tabulate([*rows, ["all", "", total / 1e3, 1.0]], ["kernel", "calls", "ms", "share"], floatfmt=".3f")
