"""The longest context that decodes: a model of Llama-3-8B's shape with random weights, one sequence, CUDA graphs.

    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/context.py --out FOLDER [--contexts 1000000 4000000]
    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/context.py --out FOLDER --device cpu --tiny

Doubles and then halves the step from context to context until none longer fits. The cache holds synthetic codes; a
timed step scores its tokens and every 128th encodes a chunk. Writes FOLDER/context.csv after each context: tokens a
second and peak memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from decoding import Lane, lanes, seconds_a_step
from prefill import LLAMA_3_8B, TINY, random_codebook, random_llama
from results import print_table, write_csv
from throughput import free_memory, is_memory, limit_memory

from antkv_hf import AnTKVConfig


def row_of(model, lane: Lane, context: int, steps: int, device: str) -> dict | None:
    """Tokens a second and memory at `context`, or None if it does not fit."""
    free_memory(device, 0, None)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        cache = lane.make_cache(1, context, steps + 64)
        for _ in range(lane.warm_ups):
            seconds_a_step(model, lane, cache, context, steps)
        took = seconds_a_step(model, lane, cache, context, steps)
    except Exception as error:
        if not is_memory(error):  # a capture says only in its text that memory has run out
            raise
        print(f"{context:,} tokens: {str(error).splitlines()[0]}", flush=True)
        return None
    footprint = cache.memory_footprint()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    row = dict(
        context=context, ms_a_step=took * 1e3, tokens_a_second=1 / took, cache_gb=footprint.total / 1e9, peak_gb=peak,
        bits_per_element=footprint.bits_per_element,
    )  # fmt: skip
    print(f"{context:,} tokens: {row['tokens_a_second']:.1f} a second", flush=True)
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of context.csv")
    parser.add_argument("--contexts", type=int, nargs="+", help="only these, shortest first, up to the first too long")
    parser.add_argument("--first", type=int, default=1 << 20, help="where the search begins")
    parser.add_argument("--resolution", type=int, default=1 << 18, help="how far below the first too long one it ends")
    parser.add_argument("--bits", type=float, default=1.0, help="preset of VQSpec.for_bits")
    parser.add_argument("--steps", type=int, default=128, help="timed steps: a multiple of the chunk")
    parser.add_argument("--memory-gb", type=float, help="of the device that may be used; all of it by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and two contexts: shows that it runs")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("context.py: the longest context is a GPU's: this needs a CUDA GPU (or --device cpu --tiny)")
    limit_memory(arguments.device, arguments.memory_gb)
    torch.manual_seed(0)
    settings = TINY if arguments.tiny else LLAMA_3_8B
    # RoPE knows no limit; the config's only sizes masks and warnings.
    model = random_llama(settings | dict(max_position_embeddings=1 << 24), arguments.device)
    config = AnTKVConfig.preset(f"{arguments.bits:g}bit")
    lane = lanes(model, random_codebook(model, config))[-1]
    contexts = [500, 900] if arguments.tiny else arguments.contexts
    rows: list[dict] = []

    def fits(context: int) -> bool:
        row = row_of(model, lane, context, arguments.steps, arguments.device)
        if row is not None:
            rows.append(row)
            write_csv(arguments.out / "context.csv", rows, arguments.device)
        return row is not None

    if contexts:
        for context in contexts:
            if not fits(context):
                break
    else:
        longest, step = 0, arguments.first
        while fits(longest + step):
            longest += step
            step = longest
        while step > arguments.resolution:
            step //= 2
            longest += step if fits(longest + step) else 0
    print_table(sorted(rows, key=lambda row: row["context"]))


if __name__ == "__main__":
    main()
