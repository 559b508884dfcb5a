"""Times of GPU work, side by side: each competitor is captured in a CUDA graph and they take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Microseconds of one call: median over rounds, and the span between the fastest and the slowest round."""

    median: float
    fastest: float
    slowest: float


def time_side_by_side(
    competitors: dict[str, Sequence[Callable[[], object]]], rounds: int = 7, round_ms: float = 10.0
) -> dict[str, Timing]:
    """Times every competitor in turn, `rounds` times over.

    Args:
        competitors: name -> calls that do the same work on different inputs, so that no input waits in the L2 cache.
        round_ms: how long a round of one competitor should take.
    """
    replays = {name: _graph(calls, round_ms) for name, calls in competitors.items()}
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, (replay, calls_in_graph) in replays.items():
            times[name].append(_elapsed_ms(replay) * 1e3 / calls_in_graph)
    return {name: Timing(statistics.median(t), min(t), max(t)) for name, t in times.items()}


def _graph(calls: Sequence[Callable[[], object]], round_ms: float) -> tuple[Callable[[], None], int]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles
            call()
        once = _elapsed_ms(lambda: [call() for call in calls]) / len(calls)
    torch.cuda.current_stream().wait_stream(stream)
    repeats = max(1, int(round_ms / max(once, 1e-3) / len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    return graph.replay, repeats * len(calls)


def _elapsed_ms(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)
