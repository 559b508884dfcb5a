"""What quantizing costs a prefill: time and memory of a model of Llama-3-8B's shape with random weights.

    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/prefill.py --out FOLDER [--parts share,long]
    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/prefill.py --out FOLDER --device cpu --tiny

Part "share": one forward over 8K and over 32K tokens, AnTKVCache against DynamicCache in turns, and the time by kind of
kernel. Part "long": a prompt of 128K tokens in chunks of 8K, its time and peak memory. Writes FOLDER/prefill.csv.
`--tiny` only shows that the script runs.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from antkv.flash_attention import exact_attention
from layers import random_tables
from results import print_table, write_csv
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.initialization import no_init_weights

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig
from antkv_hf.codebook import describe_model

LLAMA_3_8B = dict(
    vocab_size=32768,  # 128,256 in the original: the table of embeddings takes no part in what is measured
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, max_position_embeddings=131072, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)  # fmt: skip
TINY = LLAMA_3_8B | dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
)  # fmt: skip
WARM_UPS = 2
# Kernels by kind: the first whose part of a name fits. Flash attention's templates name cutlass, so it comes first.
KINDS = {
    "scoring": ("column_statistic_kernel", "query_moment_kernel"),
    "encoding": ("encode_keys_kernel", "encode_values_kernel", "value_error_kernel"),
    "dequantizing": ("dequantize_", "write_exact_kernel"),
    "attention": ("flash", "fmha", "merge_segments", "merge_splits", "decode_kernel", "scaled_dot_product"),
    "matrix products": ("gemm", "nvjet", "xmma", "cutlass", "cublas", "aten::mm", "aten::addmm", "aten::bmm"),
}


class Sizes(NamedTuple):
    """Tokens: prompts of part "share", the prompt of part "long", and its chunks."""

    share: tuple[int, ...] = (8192, 32768)
    long: int = 131072
    chunk: int = 8192


class Lane(NamedTuple):
    """A cache and the attention implementation that serves it."""

    name: str
    implementation: str
    make_cache: Callable[[], AnTKVCache | DynamicCache]


def random_llama(settings: dict, device: str) -> torch.nn.Module:
    """A LlamaForCausalLM with weights from normal(0, 0.02), made on `device`: bfloat16 on CUDA, else float32."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.normal_(0.0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    return model.eval()


def random_codebook(model, config: AnTKVConfig) -> AnTKVCodebook:
    """Random tables, the same for every layer (each layer still places its own copy on the device)."""
    described = describe_model(model.config, "random Llama")
    assert config.key is not None and config.value is not None
    tables = random_tables(config.key, config.value, described["kv_heads"], described["head_dim"])
    return AnTKVCodebook(config, dict.fromkeys(range(described["num_hidden_layers"]), tables), described)


def lanes(model, config: AnTKVConfig) -> list[Lane]:
    """AnTKVCache; DynamicCache in transformers' sdpa lane; and DynamicCache with flash attention for any chunk.

    The last is the fairer one in chunks: transformers gives sdpa a dense mask there, with which no flash kernel works.
    """
    codebook = random_codebook(model, config)
    AttentionInterface.register("dense_any_chunk", _dense_any_chunk)
    AttentionMaskInterface.register("dense_any_chunk", lambda *args, **kwargs: None)
    return [
        Lane("AnTKVCache", "antkv", lambda: AnTKVCache(model.config, config, codebook)),
        Lane("DynamicCache", "sdpa", lambda: DynamicCache(config=model.config)),
        Lane("DynamicCache, flash", "dense_any_chunk", lambda: DynamicCache(config=model.config)),
    ]


def _dense_any_chunk(module, query, key, value, attention_mask, scaling=None, **kwargs):
    out, _ = exact_attention(query, key, value, scale=scaling, causal_offset=key.shape[2] - query.shape[2])
    return out.transpose(1, 2).contiguous(), None


def prefill(model, ids: torch.Tensor, cache, chunk: int | None = None) -> None:
    """Fills `cache` with the prompt `ids` ``(1, n)``, `chunk` tokens a forward (None: all at once)."""
    step = chunk or ids.shape[1]
    for start in range(0, ids.shape[1], step):
        model(ids[:, start : start + step], past_key_values=cache, use_cache=True, logits_to_keep=1)


def seconds(run: Callable[[], None], device: str) -> float:
    """Seconds of one run: by CUDA events on a GPU."""
    if device != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


# --------------------------------------------------------------------------------------------------------------- parts
def share_rows(model, competitors: list[Lane], tokens: int, device: str, rounds: int) -> list[dict]:
    """One forward over `tokens` tokens in each lane, in turns; ratios are to DynamicCache of the same round."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    times: dict[str, list[float]] = {lane.name: [] for lane in competitors}
    for i in range(WARM_UPS + rounds):
        for lane in competitors:
            cache = lane.make_cache()
            model.set_attn_implementation(lane.implementation)
            took = seconds(lambda cache=cache: prefill(model, ids, cache), device)
            if i >= WARM_UPS:
                times[lane.name].append(took)
    rows = []
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times["DynamicCache"])]
        rows.append(_row("share", "one forward", tokens, name, own, ratios))
    for lane in competitors:
        model.set_attn_implementation(lane.implementation)
        kinds = breakdown(lambda lane=lane: prefill(model, ids, lane.make_cache()), device)
        total = sum(kinds.values())
        rows += [_row("kernels", kind, tokens, lane.name, [s], [s / total]) for kind, s in kinds.items()]
    return rows


def breakdown(run: Callable[[], None], device: str) -> dict[str, float]:
    """Seconds of a run's kernels by kind, as torch.profiler measured them (operators' own time on a CPU)."""
    with profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    found: Counter[str] = Counter(dict.fromkeys([*KINDS, "other"], 0.0))
    for event in profiler.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(p in event.key for p in parts)), "other")
        found[kind] += (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e6
    return dict(found)


def long_rows(model, competitors: list[Lane], sizes: Sizes, device: str) -> list[dict]:
    """A long prompt in chunks, and in one forward with DynamicCache: seconds, and memory above the weights."""
    ids = torch.randint(0, model.config.vocab_size, (1, sizes.long), device=device)
    # Not transformers' sdpa lane in chunks: its dense masks rule out flash kernels, and it takes minutes.
    whole = next(lane for lane in competitors if lane.name == "DynamicCache")
    runs: list[tuple[Lane, int | None]] = [(lane, sizes.chunk) for lane in competitors if lane is not whole]
    runs.append((whole, None))
    rows, took = [], {}
    for lane, chunk in runs:
        case = "one forward" if chunk is None else f"chunks of {chunk}"
        model.set_attn_implementation(lane.implementation)
        prefill(model, ids[:, : 2 * sizes.chunk], lane.make_cache(), chunk)  # compiles, and places the tables
        cache, held = lane.make_cache(), _allocated(device)
        try:
            took[lane.name, case] = seconds(lambda cache=cache, chunk=chunk: prefill(model, ids, cache, chunk), device)
        except torch.OutOfMemoryError as error:
            print(f"{lane.name}, {case}: left out, {str(error).splitlines()[0]}")
        else:
            peak = (torch.cuda.max_memory_allocated() - held) if device == "cuda" else None
            row = _row("long", case, sizes.long, lane.name, [took[lane.name, case]], None, peak, cache_bytes(cache))
            rows.append(row)
            print_table([row])  # a run takes a minute: show what is known
        del cache
    base = took.get(("DynamicCache", "one forward"))
    for row in rows:
        row["ratio"] = None if base is None else row["seconds"] / base
    return rows


def cache_bytes(cache: AnTKVCache | DynamicCache) -> int:
    """Bytes that a filled cache holds."""
    if isinstance(cache, AnTKVCache):
        return cache.memory_footprint().total
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _allocated(device: str) -> int:
    """Bytes in use once garbage is collected (weights, tables); restarts the measurement of the peak."""
    gc.collect()
    if device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _row(
    part: str, case: str, tokens: int, cache: str, times: list[float], ratios: list[float] | None,
    peak: int | None = None, held: int | None = None,
) -> dict:  # fmt: skip
    def gigabytes(size: int | None) -> float | None:
        return None if size is None else size / 1e9

    return dict(
        part=part, case=case, tokens=tokens, cache=cache, seconds=statistics.median(times), fastest=min(times),
        slowest=max(times), ratio=statistics.median(ratios) if ratios else None,
        ratio_low=min(ratios) if ratios else None, ratio_high=max(ratios) if ratios else None,
        peak_gb=gigabytes(peak), cache_gb=gigabytes(held),
        workspace_gb=gigabytes(None if peak is None or held is None else peak - held),
    )  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of prefill.csv")
    parser.add_argument("--parts", default="share,long", help="share, long or both")
    parser.add_argument("--bits", type=float, default=1.0, help="preset of VQSpec.for_bits")
    parser.add_argument("--query-stride", type=int, help="AnchorConfig.query_stride; its default if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short prompts: shows that it runs")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - {"share", "long"}:
        parser.error(f"part {sorted(unknown)[0]!r} does not exist; choose from share, long")
    device = arguments.device
    sizes = Sizes((256, 512), 1024, 256) if arguments.tiny else Sizes()
    torch.manual_seed(0)
    config = AnTKVConfig.preset(f"{arguments.bits:g}bit")
    if arguments.query_stride is not None:
        config = config.replace(anchor_query_stride=arguments.query_stride)
    model = random_llama(TINY if arguments.tiny else LLAMA_3_8B, device)
    everyone = lanes(model, config)
    rows: list[dict] = []
    if "share" in parts:
        for tokens in sizes.share:
            rows += share_rows(model, everyone[:2], tokens, device, arguments.rounds)
            print_table(rows[-len(KINDS) * 2 - 4 :])
    if "long" in parts:
        # On a CPU the kernel of the third lane would need Triton's interpreter.
        rows += long_rows(model, everyone if device == "cuda" else everyone[:2], sizes, device)
    print(f"{config.key}, anchors by {config.anchors.score}, query_stride {config.anchors.query_stride}")
    print_table(rows)
    write_csv(arguments.out / "prefill.csv", rows, device)


if __name__ == "__main__":
    main()
