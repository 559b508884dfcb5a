"""Tokens a second of a model of Llama-3-8B's shape with random weights, over caches with synthetic contents.

    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/throughput.py --out FOLDER [--parts latency,batch,memory]
    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/throughput.py --out FOLDER --device cpu --tiny

Part "latency": one sequence. Part "batch": equal batches. Part "memory": every cache at the largest batch that fits the
same memory. With equal batches the lanes take turns; a timed step scores its tokens, and in every 128 steps a chunk is
encoded. Writes FOLDER/throughput.csv after each context, and FOLDER/throughput.png where matplotlib is installed.
`--tiny` only shows that the script runs.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
from pathlib import Path

import torch
from decoding import Lane, lanes, seconds_a_step
from decoding_rivals import quantized_bytes, rival_lane
from prefill import LLAMA_3_8B, TINY, random_codebook, random_llama
from results import print_table, write_csv

from antkv_hf import AnTKVConfig

K = 1024
PARTS = {
    "latency": [(1, n * K) for n in (1, 8, 32, 128)],
    "batch": [(8, 4 * K), (32, 4 * K), (4, 32 * K)],  # all four caches fit 80 GB together
    "memory": [(0, n * K) for n in (4, 32, 128)],
}
TINY_PARTS = {"latency": [(1, 300)], "batch": [(2, 300)], "memory": [(0, 300)]}
BASELINE = "bfloat16, graphs"


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


def rows_of(
    part: str, model, competitors: list[Lane], batch: int, context: int, arguments: argparse.Namespace
) -> list[dict]:
    """Rows of one batch (0: the largest of each lane) and context; ratios are to the baseline in the same round."""
    device, steps = arguments.device, arguments.steps
    room = steps + 64
    batches = {lane.name: batch for lane in competitors}
    if not batch:
        limit = free_memory(device, arguments.reserve_gb, arguments.memory_gb)
        batches = {lane.name: max(1, limit // cache_bytes(lane, context, room)) for lane in competitors}
        batches = {name: min(b, arguments.largest_batch) for name, b in batches.items()}
    times: dict[str, list[float]] = {lane.name: [] for lane in competitors}
    peaks: dict[str, float | None] = {}
    # Equal batches take turns; the largest ones need all the memory, so a lane runs all its rounds and makes room.
    turns = [competitors] if batch else [[lane] for lane in competitors]
    for together in turns:
        caches: dict[str, object] = {}
        free_memory(device, 0, None)
        for i in range(-2, arguments.rounds):
            for lane in together:
                if i < -lane.warm_ups or (i > -lane.warm_ups and lane.name not in caches):
                    continue
                try:
                    if lane.name not in caches:
                        caches[lane.name] = lane.make_cache(batches[lane.name], context, room)
                    if device == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    took = seconds_a_step(model, lane, caches[lane.name], context, steps)
                except torch.OutOfMemoryError as error:
                    message = str(error).splitlines()[0]
                    print(f"{part}, {lane.name}, {batches[lane.name]} x {context}: left out, {message}")
                    caches.pop(lane.name, None)
                    free_memory(device, 0, None)
                    continue
                if i >= 0:
                    times[lane.name].append(took)
                    peaks[lane.name] = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
        names = ", ".join(lane.name for lane in together)
        print(f"{part}, context {context}: {names} done", flush=True)
    rows = []
    for name, own in times.items():
        if not own:
            continue
        base = times.get(BASELINE, [])
        speeds = [batches[name] / t for t in own]
        ratios = [s / (batches[BASELINE] / t) for s, t in zip(speeds, base)] if len(base) == len(own) else []
        rows.append(
            dict(
                part=part, context=context, batch=batches[name], lane=name, ms_a_step=statistics.median(own) * 1e3,
                fastest_ms=min(own) * 1e3, slowest_ms=max(own) * 1e3, tokens_a_second=statistics.median(speeds),
                ratio=statistics.median(ratios) if ratios else None, ratio_low=min(ratios, default=None),
                ratio_high=max(ratios, default=None), peak_gb=peaks[name],
            )
        )  # fmt: skip
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """A panel a part: tokens a second of each lane by context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    parts = list(dict.fromkeys(row["part"] for row in rows))
    figure, panels = plt.subplots(1, len(parts), figsize=(6.5 * len(parts), 5), squeeze=False)
    for panel, part in zip(panels[0], parts):
        for lane in dict.fromkeys(row["lane"] for row in rows):
            own = [row for row in rows if row["part"] == part and row["lane"] == lane]
            points = sorted((row["context"], row["tokens_a_second"], row["batch"]) for row in own)
            panel.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=lane)
            for context, speed, batch in points:
                panel.annotate(f"x{batch}", (context, speed), fontsize=7, xytext=(3, 3), textcoords="offset points")
        panel.set(xlabel="tokens of context", title=f"{part}: tokens a second (x batch)")
        panel.set_xscale("log", base=2)
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
    parser.add_argument("--lanes", type=int, nargs="+", help="only these lanes, counted from 0")
    parser.add_argument("--rivals", nargs="+", default=[], help="beside them: static, quanto-int4, hqq-int4, ...")
    parser.add_argument("--bits", type=float, default=1.0, help="preset of VQSpec.for_bits")
    parser.add_argument("--steps", type=int, default=128, help="timed steps a round: a multiple of the chunk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-gb", type=float, help="of the device, for part memory; all of it by default")
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
    torch.manual_seed(0)
    config = AnTKVConfig.preset(f"{arguments.bits:g}bit")
    model = random_llama(TINY if arguments.tiny else LLAMA_3_8B, arguments.device)
    competitors = lanes(model, random_codebook(model, config))
    competitors = [competitors[i] for i in arguments.lanes or range(len(competitors))]
    competitors += [rival_lane(name, model) for name in arguments.rivals]
    rows: list[dict] = []
    for part in parts:
        for batch, context in (TINY_PARTS if arguments.tiny else PARTS)[part]:
            if arguments.contexts is None or context in arguments.contexts:
                rows += rows_of(part, model, competitors, batch, context, arguments)
                if rows:
                    write_csv(arguments.out / "throughput.csv", rows, arguments.device)
    if not rows:
        sys.exit(
            "throughput.py: nothing was measured: no context of the parts is in --contexts, or nothing fits the memory"
        )
    print(f"{config.key}, anchors by {config.anchors.score}; synthetic keys, values and codes; {arguments.steps} steps")
    print_table(rows)
    if importlib.util.find_spec("matplotlib"):
        plot(rows, arguments.out / "throughput.png")


if __name__ == "__main__":
    main()
