"""Tokens a second of a model of Llama-3-8B's shape with random weights, over caches with synthetic contents.

    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/throughput.py --out FOLDER [--parts latency,batch,memory]
    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/throughput.py --out FOLDER --device cpu --tiny

Part "latency": one sequence. Part "batch": equal batches. Part "memory": every cache at the largest batch that fits the
same memory. With equal batches the lanes take turns; a timed step scores its tokens, and in every 128 steps a chunk is
encoded. Writes FOLDER/throughput.csv after each round (rows of other lanes and contexts that are there stay), and
FOLDER/throughput.png where matplotlib is installed. `--tiny` only shows that the script runs.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from decoding import Lane, lanes, seconds_a_step
from decoding_rivals import quantized_bytes, rival_lane
from prefill import LLAMA_3_8B, TINY, random_codebook, random_llama
from results import print_table, read_csv, update_csv

from antkv_hf import AnTKVConfig

K = 1024
PARTS = {
    "latency": [(1, n * K) for n in (1, 8, 32, 128)],
    "batch": [(8, 4 * K), (32, 4 * K), (4, 32 * K)],  # all four caches fit 80 GB together
    "memory": [(0, n * K) for n in (4, 8, 32, 128)],
}
TINY_PARTS = {"latency": [(1, 300)], "batch": [(2, 300)], "memory": [(0, 300)]}
LANES = 4  # that `lanes` has without compiled MLPs
RETRIES = 6  # batches, each four fifths of the one before, that a lane tries at equal memory
KEY = ("part", "context", "lane")  # what makes a row; with equal batches, the batch as well


def limit_memory(device: str, budget: float | None) -> None:
    """Lets this process have `budget` GB of the device, as if it were a smaller card; None: all of it."""
    if budget is not None and device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget * 1e9 / torch.cuda.mem_get_info()[1]))


def free_memory(device: str, reserve: float, budget: float | None) -> int:
    """Bytes that a cache may take: what is free on the device, or `budget` in GB, less `reserve` for the workspace."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] if budget is None else budget * 1e9 - torch.cuda.memory_allocated()
    else:
        free = (budget or 0.01) * 1e9
    return int(free - reserve * 1e9)


def cache_bytes(lane: Lane, context: int, room: int) -> int:
    """Bytes of one sequence."""
    cache = lane.make_cache(1, context, room)
    if hasattr(cache, "memory_footprint"):
        return cache.memory_footprint().total
    if hasattr(cache, "filled"):
        return quantized_bytes(cache)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def is_memory(error: Exception) -> bool:
    """Whether `error` says that memory has run out: also of a capture, which only names what went wrong."""
    return isinstance(error, torch.OutOfMemoryError) or "OutOfMemory" in str(error) or "out of memory" in str(error)


class Contest:
    """The lanes' rounds at one batch (0: the largest of each lane) and context; rows as far as they have come.

    Args:
        keep: takes the rows after each round, so that a run that is cut off has them.
    """

    def __init__(
        self, part: str, model, competitors: list[Lane], batch: int, context: int, arguments: argparse.Namespace,
        keep: Callable[[list[dict]], object],
    ) -> None:  # fmt: skip
        self.part, self.model, self.context, self.arguments, self.keep = part, model, context, arguments, keep
        self.competitors, self.equal = competitors, batch > 0
        self.batches = {lane.name: batch for lane in competitors}
        self.caches: dict[str, object] = {}
        self.times: dict[str, list[float]] = {lane.name: [] for lane in competitors}
        self.peaks: dict[str, float | None] = {}

    def run(self) -> None:
        # Equal batches take turns; the largest ones need all the memory, so a lane runs all its rounds and makes room.
        for together in [self.competitors] if self.equal else [[lane] for lane in self.competitors]:
            self.caches.clear()
            free_memory(self.arguments.device, 0, None)
            if not self.equal:
                self._largest(together[0])
            left = list(together)
            for i in range(-2, self.arguments.rounds):
                for lane in list(left):
                    if i >= -lane.warm_ups and not self._round(lane, i):
                        left.remove(lane)
                if i >= 0 and left:
                    self.keep(self.rows())
            names = ", ".join(lane.name for lane in together)
            print(f"{self.part}, context {self.context}: {names} done", flush=True)
            if not self.equal and together[0].slow:
                torch.compiler.reset()  # graphs that generate() captured itself keep their cache

    def _largest(self, lane: Lane) -> None:
        """Finds how many sequences fit the memory, workspace of a step included."""
        arguments, text, room = self.arguments, self.model.config, self._steps(lane) + 64
        dense = 2 * text.num_key_value_heads * text.head_dim * self.context * self.model.dtype.itemsize  # of a layer
        try:
            held = cache_bytes(lane, self.context, room)
        except Exception as error:
            print(f"{self.part}, {lane.name}: no cache of {self.context} tokens, {error}", flush=True)
            held = 1
        each = held + int(lane.layers_beside * dense)
        limit = free_memory(arguments.device, arguments.reserve_gb, arguments.memory_gb)
        self.batches[lane.name] = min(max(1, limit // each), arguments.largest_batch)

    def _steps(self, lane: Lane) -> int:
        return min(self.arguments.steps, self.arguments.slow_steps) if lane.slow else self.arguments.steps

    def _round(self, lane: Lane, i: int) -> bool:
        """Runs one round, a warm-up if `i` is negative; False if the lane is to be left out from now on."""
        for _ in range(RETRIES):
            error = self._try(lane, i)
            if error is None:
                return True
            batch = self.batches[lane.name]
            print(f"{self.part}, {lane.name}, {batch} x {self.context}: {error[1]}", flush=True)
            self.caches.pop(lane.name, None)
            free_memory(self.arguments.device, 0, None)
            if self.equal or batch == 1 or not error[0] or self.times[lane.name]:
                return False
            self.batches[lane.name] = batch * 4 // 5
        return False

    def _try(self, lane: Lane, i: int) -> tuple[bool, str] | None:
        """One round; whether it was memory, and what was said, if that failed."""
        device, steps = self.arguments.device, self._steps(lane)
        try:
            if lane.name not in self.caches:
                self.caches[lane.name] = lane.make_cache(self.batches[lane.name], self.context, steps + 64)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            limit = self.arguments.lane_seconds
            took = seconds_a_step(self.model, lane, self.caches[lane.name], self.context, steps, limit)
        except Exception as error:  # of another library's cache as well: the other lanes go on
            return is_memory(error), f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if i >= 0:
            self.times[lane.name].append(took)
            self.peaks[lane.name] = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
        return None

    def rows(self) -> list[dict]:
        """What has been measured; ratios are to each lane's baseline in the same round."""
        rows = []
        for lane in self.competitors:
            own, base = self.times[lane.name], self.times.get(lane.baseline, [])
            if not own:
                continue
            batch = self.batches[lane.name]
            speeds = [batch / t for t in own]
            ratios = [speed * t / self.batches[lane.baseline] for speed, t in zip(speeds, base)]
            rows.append(
                dict(
                    part=self.part, context=self.context, batch=batch, lane=lane.name,
                    ms_a_step=statistics.median(own) * 1e3, fastest_ms=min(own) * 1e3, slowest_ms=max(own) * 1e3,
                    tokens_a_second=statistics.median(speeds), ratio=statistics.median(ratios) if ratios else None,
                    ratio_low=min(ratios, default=None), ratio_high=max(ratios, default=None),
                    peak_gb=self.peaks[lane.name],
                )
            )  # fmt: skip
        return rows


def plot(rows: list[dict], path: Path) -> None:
    """A panel a part: tokens a second of each lane by context, or by batch and context where batches are equal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def place(row: dict) -> tuple[int, ...]:
        return (int(row["context"]),) if row["part"] == "memory" else (int(row["context"]), int(row["batch"]))

    def label(context: int, batch: int | None = None) -> str:
        tokens = f"{context // K}K" if context % K == 0 else str(context)
        return tokens if batch is None else f"{batch} x {tokens}"

    parts = list(dict.fromkeys(row["part"] for row in rows))
    lanes_there = list(dict.fromkeys(row["lane"] for row in rows))  # a lane has one color in all panels
    figure, panels = plt.subplots(1, len(parts), figsize=(6.5 * len(parts), 5), squeeze=False)
    for panel, part in zip(panels[0], parts):
        here = [row for row in rows if row["part"] == part]
        places = sorted({place(row) for row in here})
        for i, lane in enumerate(lanes_there):
            own = sorted((row for row in here if row["lane"] == lane), key=place)
            points = [(places.index(place(row)), float(row["tokens_a_second"])) for row in own]
            if not points:
                continue
            panel.plot(*zip(*points), marker="o", color=f"C{i}", label=lane)
            for point, row in zip(points, own if part == "memory" else ()):
                panel.annotate(f"x{row['batch']}", point, fontsize=7, xytext=(3, 3), textcoords="offset points")
        equal = "" if part == "memory" else "batch x "
        of_each = ", each at its largest batch" if part == "memory" else ""
        panel.set(xlabel=f"{equal}tokens of context", title=f"{part}: tokens a second{of_each}")
        panel.set_xticks(range(len(places)), [label(*x) for x in places])
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of throughput.csv")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of latency, batch, memory")
    parser.add_argument("--contexts", type=int, nargs="+", help="only these contexts")
    parser.add_argument(
        "--lanes", type=int, nargs="*", choices=range(LANES), help="only these of lanes 0 to 3; no number: none"
    )
    parser.add_argument("--compile", action="store_true", help="beside them: lanes 1 and 3 with compiled MLPs")
    parser.add_argument("--rivals", nargs="+", default=[], help="beside them: static, compileable, quanto-int4, ...")
    parser.add_argument("--bits", type=float, default=1.0, help="preset of VQSpec.for_bits")
    parser.add_argument("--steps", type=int, default=128, help="timed steps a round: a multiple of the chunk")
    parser.add_argument("--slow-steps", type=int, default=128, help="as many in lanes where the host takes part")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lane-seconds", type=float, help="after so many of timed steps a round of a lane ends")
    parser.add_argument("--memory-gb", type=float, help="of the device that may be used; all of it by default")
    parser.add_argument("--reserve-gb", type=float, default=6.0, help="kept free for activations and workspace")
    parser.add_argument("--largest-batch", type=int, default=1024)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short contexts: shows that it runs")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"part {sorted(unknown)[0]!r} does not exist; choose from {', '.join(PARTS)}")
    if arguments.tiny:
        arguments.steps, arguments.rounds, arguments.reserve_gb, arguments.largest_batch = 128, 1, 0.0, 3
    limit_memory(arguments.device, arguments.memory_gb)
    torch.manual_seed(0)
    config = AnTKVConfig.preset(f"{arguments.bits:g}bit")
    model = random_llama(TINY if arguments.tiny else LLAMA_3_8B, arguments.device)
    backend = {"backend": "eager"} if arguments.tiny else True  # no compiler is needed to see that it runs
    codebook = random_codebook(model, config)
    competitors = lanes(model, codebook, arguments.compile and backend)
    if arguments.lanes is not None:
        competitors = [competitors[i] for i in arguments.lanes] + competitors[LANES:]
    for name in arguments.rivals:
        try:
            competitors.append(rival_lane(name, model, codebook))
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)
    rows: list[dict] = []
    path = arguments.out / "throughput.csv"
    for part in parts:
        for batch, context in (TINY_PARTS if arguments.tiny else PARTS)[part]:
            if arguments.contexts is None or context in arguments.contexts:
                keep = partial(update_csv, path, key=(*KEY, *(("batch",) if batch else ())), device=arguments.device)
                contest = Contest(part, model, competitors, batch, context, arguments, keep)
                contest.run()
                rows += contest.rows()
    if not rows:
        sys.exit(
            "throughput.py: nothing was measured: no context of the parts is in --contexts, or nothing fits the memory"
        )
    print(f"{config.key}, anchors by {config.anchors.score}; synthetic keys, values and codes; {arguments.steps} steps")
    print_table(rows)
    if importlib.util.find_spec("matplotlib"):
        plot(read_csv(path), arguments.out / "throughput.png")


if __name__ == "__main__":
    main()
