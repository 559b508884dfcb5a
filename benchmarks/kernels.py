"""Times of the kernels on one layer of Llama-3-8B's shape, side by side with PyTorch's attention. Needs a CUDA GPU.

    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/kernels.py --out FOLDER [--parts decode] [--bits 1 2 0.5]
        [--specs d8b8s2/d8b8 d32b8] [--head-dim 64] [--sizes 16x131072]

Writes FOLDER/kernels.csv and, where matplotlib is installed, FOLDER/kernels.png; `benchmarks/README.md` explains the
columns. Decode attention is compared with the reference first; nothing is timed if it differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from antkv import cuda_decode, cuda_shape
from antkv.anchor_score import column_statistic, query_moment
from antkv.decode_attention import decode_attention
from antkv.dequantize import dequantize
from antkv.encode import encode_keys, encode_values
from antkv.flash_attention import exact_attention
from antkv.past import QuantizedPast
from antkv.prefill import SEGMENT
from antkv.table_image import TableImages
from layers import HEAD_DIM, KV_HEADS, Q_HEADS, WINDOW, random_codec, random_past
from results import environment, print_table, write_csv
from timing import Timing, time_side_by_side
from torch.nn.attention import SDPBackend, sdpa_kernel

from antkv_hf.attention.tables import layer_tables
from antkv_hf.codecs import LayerCodec
from antkv_hf.config import VQSpec
from antkv_hf.exact_tokens import ExactTokens
from antkv_hf.reference.attention import Visibility, attention
from antkv_hf.snapshot import Snapshot
from antkv_hf.storage import ENCODE_BLOCK

DTYPE = torch.bfloat16
DECODE = [(1, 4096), (1, 32768), (1, 131072), (1, 524288), (16, 4096), (16, 32768), (16, 131072), (128, 4096)]
PREFILL = [8192, 32768]
QUICK_DECODE, QUICK_PREFILL = [(1, 32768), (16, 4096)], [8192]
CHECKED = [(1, 32768), (16, 4096)]  # one of each plan of splits: few heads, many heads
TOLERANCE = 1e-2  # of the output's largest value
READ_SPEED = {"NVIDIA H100 80GB HBM3": 3.06e12}  # bytes a second that a GPU was measured to read
INPUT_BYTES = 150e6  # of a competitor's inputs together: three times the L2 cache
ROUNDS = dict(rounds=5, round_ms=5.0)
BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
DECODERS = {"Triton": decode_attention, "CUDA": cuda_decode.decode_attention}
PARTS = ("decode", "prefill", "encode")
DENSE = "none"  # the spec of what reads no codes
Calls = Sequence[Callable[[], object]]


# ------------------------------------------------------------------------------------------------------------ decoding
def decoders(codec: LayerCodec) -> dict[str, Callable]:
    """Those of DECODERS that have a kernel for these codes on this GPU."""
    found, device = dict(DECODERS), codec.key.mean.device
    obstacle = cuda_decode.obstacle(device)
    if obstacle is None:
        memory = cuda_decode.shared_memory(device)
        try:
            cuda_shape.find_shape(*layer_tables(codec, DTYPE), Q_HEADS // KV_HEADS, False, memory)
        except ValueError as error:
            obstacle = str(error)
    if obstacle is not None:
        print(f"no CUDA kernel: {obstacle}")
        del found["CUDA"]
    return found


def check_decode(codec: LayerCodec, batch: int, n: int) -> dict[str, float]:
    """Difference of each decoder from the reference over the same past, relative to the largest output value."""
    past, dim = random_past(codec, batch, n), codec.key.head_dim
    query, tail = _query(batch, dim, past.offset.device), _tail(batch, dim, past.offset.device)
    exact = tuple(ExactTokens(*tokens) for tokens in past.exact)
    snapshot = Snapshot(codec, past.key_codes, past.value_codes, exact, *tail, past.offset, past.exact_bits)
    expected, _ = attention(snapshot, query, Visibility(None, False, 1, snapshot.length), dim**-0.5)
    expected, errors = expected.flatten(1, 2), {}
    for name, decode in decoders(codec).items():
        out, _ = decode(query, past, *tail, scale=dim**-0.5)
        errors[name] = ((out.float() - expected).abs().max() / expected.abs().max()).item()
    return errors


def decode_bytes(past: QuantizedPast, query: torch.Tensor, tail: Sequence[torch.Tensor]) -> int:
    """Bytes that decode attention has to read and write once: codes, exact tokens, tail, tables, query and output."""
    keys, values = past.key_tables, past.value_tables
    read = [past.key_codes, past.value_codes, past.exact_bits, *tail, query, query]
    read += [tensor for tokens in past.exact for tensor in tokens if tensor is not None]
    read += [keys.centroids, keys.mean, keys.channels, keys.frequency, keys.pair_scale, keys.turns]
    read += [values.centroids, values.mean, values.synthesis]
    return sum(tensor.nbytes for tensor in read)


def decode_rows(codecs: dict[str, LayerCodec], batch: int, n: int) -> list[dict]:
    """Rows of one batch and length: ours with each of the specs, and SDPA over bfloat16 keys and values."""
    device, dim = _place(codecs)
    dense_bytes = 2 * batch * KV_HEADS * (n + WINDOW) * dim * DTYPE.itemsize
    needed = 1.1 * max(dense_bytes, INPUT_BYTES) + len(codecs) * max(dense_bytes / 2, INPUT_BYTES) + (1 << 30)
    if device.type == "cuda" and needed > (free := torch.cuda.mem_get_info(device)[0]):
        print(f"decode, batch {batch} x {n} tokens: left out, {needed / 1e9:.0f} GB do not fit {free / 1e9:.0f} GB")
        return []
    query = _query(batch, dim, device)
    sizes, competitors = {DENSE: dense_bytes}, {}
    for spec, codec in codecs.items():
        inputs = [_with_own_tables(random_past(codec, batch, n))]
        sizes[spec] = decode_bytes(inputs[0], query, _tail(batch, dim, device))
        inputs += [_with_own_tables(random_past(codec, batch, n)) for _ in range(_copies(sizes[spec]) - 1)]
        for name, decode in decoders(codec).items():
            competitors[f"decode_attention {name}", spec] = [
                partial(decode, query, past, *_tail(batch, dim, device), scale=dim**-0.5) for past in inputs
            ]
    dense = [_dense(batch, n + WINDOW, dim, device) for _ in range(_copies(dense_bytes))]
    for name, backend in BACKENDS.items():
        calls = [partial(_sdpa, backend, query, *pair) for pair in dense]
        if _runs(name, calls[0]):
            competitors[name, DENSE] = calls
    times = time_side_by_side(competitors, **ROUNDS)
    speed = READ_SPEED.get(environment(device)["gpu"])
    best = min((t.median for (name, _), t in times.items() if name in BACKENDS), default=None)
    rows = []
    for (name, spec), time in times.items():
        size, speedup = sizes[spec], None if best is None else best / time.median
        floor = None if speed is None else size / speed * 1e6
        rows.append(_row(name, batch, n, spec, codecs, time, floor, speedup, None, size))
    return rows


def _place(codecs: dict[str, LayerCodec]) -> tuple[torch.device, int]:
    """Device and head size of the codecs."""
    key = next(iter(codecs.values())).key
    return key.mean.device, key.head_dim


def _query(batch: int, dim: int, device: torch.device) -> torch.Tensor:
    return torch.randn(batch, 1, Q_HEADS, dim, device=device, dtype=DTYPE).transpose(1, 2)


def _dense(batch: int, n: int, dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (torch.randn(batch, KV_HEADS, n, dim, device=device, dtype=DTYPE) for _ in range(2))
    return keys, values


def _tail(batch: int, dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return _dense(batch, WINDOW, dim, device)


def _copies(size: int) -> int:
    """Inputs that a competitor cycles through, so that none waits in the L2 cache."""
    return max(1, math.ceil(INPUT_BYTES / size))


def _with_own_tables(past: QuantizedPast) -> QuantizedPast:
    """Layers of a model share no tables, so neither do inputs."""

    def copied(tables):
        return type(tables)(*(x.clone() if isinstance(x, torch.Tensor) else x for x in tables))

    keys = copied(past.key_tables)._replace(images=TableImages())
    return past._replace(key_tables=keys, value_tables=copied(past.value_tables))


def _sdpa(backend: SDPBackend, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def _runs(name: str, call: Callable[[], object]) -> bool:
    try:
        call()
    except RuntimeError as error:
        print(f"{name} left out: {str(error).splitlines()[0]}")
        return False
    return True


# ------------------------------------------------------------------------------------------------------------- prefill
def prefill_rows(codecs: dict[str, LayerCodec], n: int, scores: bool) -> list[dict]:
    """Rows of what a prompt of `n` tokens costs a layer besides its attention, each against that attention.

    `scores`: with those of its tokens, which are the same for all specs.
    """
    device, dim = _place(codecs)
    scale = dim**-0.5
    query = torch.randn(1, n, Q_HEADS, dim, device=device, dtype=DTYPE).transpose(1, 2)
    keys, values = _dense(1, n, dim, device)
    offset = torch.zeros(1, dtype=torch.int64, device=device)
    output, lse = exact_attention(query, keys, values, scale=scale, causal_offset=0)
    columns = dict(scale=scale, first_column=0, kv_len=n)
    competitors: dict[tuple[str, str], Calls] = {
        ("flash attention", DENSE): [partial(exact_attention, query, keys, values, scale=scale, causal_offset=0)]
    }
    for term, stride in (*(("squared_attention", s) for s in (1, 8, 16)), ("anchor_score", 16)) if scores else ():
        call = partial(column_statistic, term, query, keys, values, output, lse, stride=stride, **columns)
        competitors[f"column_statistic {term} stride {stride}", DENSE] = [call]
    if scores:
        competitors["query_moment", DENSE] = [partial(query_moment, query, scale, KV_HEADS, None, n)]
    for spec, codec in codecs.items():
        for name, step in ((f"encode in blocks of {ENCODE_BLOCK}", ENCODE_BLOCK), ("encode at once", n)):
            competitors[name, spec] = [partial(_encode, codec, keys, values, offset, step)]
        scratch = _dense(1, SEGMENT, dim, device)
        call = partial(dequantize, random_past(codec, 1, SEGMENT), 0, SEGMENT, DTYPE, out=scratch)
        competitors[f"dequantize {SEGMENT} tokens", spec] = [call]
    times = time_side_by_side(competitors, **ROUNDS)
    flash = times["flash attention", DENSE].median
    return [_row(name, 1, n, spec, codecs, t, None, None, t.median / flash, None) for (name, spec), t in times.items()]


def _encode(codec: LayerCodec, keys: torch.Tensor, values: torch.Tensor, offset: torch.Tensor, step: int) -> None:
    key_tables, value_tables = layer_tables(codec, DTYPE)
    for start in range(0, keys.shape[2], step):
        encode_keys(keys[:, :, start : start + step], key_tables, start, offset)
        encode_values(values[:, :, start : start + step], value_tables)


# ------------------------------------------------------------------------------------------------------------- results
def _row(
    kernel: str, batch: int, n: int, spec: str, codecs: dict[str, LayerCodec], time: Timing, floor: float | None,
    speedup: float | None, over_flash: float | None, size: int | None,
) -> dict:  # fmt: skip
    codec = codecs.get(spec)  # None: keys and values as they are
    bits = 16 if codec is None else (codec.key.bits_per_element + codec.value.bits_per_element) / 2
    return dict(
        kernel=kernel, batch=batch, n=n, head_dim=_place(codecs)[1], spec=spec, bits=bits, median_us=time.median,
        fastest_us=time.fastest, slowest_us=time.slowest, speedup_over_sdpa=speedup, time_over_flash=over_flash,
        floor_us=floor, bytes=size,
    )  # fmt: skip


def plot(rows: list[dict], path: Path) -> None:
    """Speedup of decode attention over the best SDPA, a panel a batch; time of prefill's pieces over flash's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row["kernel"] in (*BACKENDS, "flash attention"):
            continue
        spec = f", {row['spec']}" if row["spec"] != DENSE else ""
        for column, title in (
            ("speedup_over_sdpa", f"decode, batch {row['batch']}: speedup over the best SDPA"),
            ("time_over_flash", "prefill: time over flash attention's"),
        ):
            if row[column] is not None:
                lines = panels.setdefault(title, {})
                lines.setdefault(row["kernel"] + spec, []).append((row["n"], row[column]))
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, points in lines.items():
            style = "--" if "Triton" in label else "-"
            axis.plot(*zip(*sorted(points)), marker="o", linestyle=style, label=label.removeprefix("decode_attention "))
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set(xlabel="tokens", title=title, xscale="log", yscale="log" if title.startswith("prefill") else "linear")
        axis.set_xticks(
            ticks := sorted({n for points in lines.values() for n, _ in points}), [f"{n >> 10}K" for n in ticks]
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of kernels.csv and kernels.png")
    parser.add_argument("--parts", default="decode,prefill", help="decode, prefill, or encode: prefill less its scores")
    parser.add_argument("--quick", action="store_true", help="two decode shapes and one prompt only")
    parser.add_argument(
        "--sizes", type=_size, nargs="+", metavar="BATCHxTOKENS", help="decode shapes, e.g. 16x131072 (a list of eight)"
    )
    parser.add_argument(
        "--bits", type=float, nargs="+", help="presets of VQSpec.for_bits (1, unless there are --specs)"
    )
    parser.add_argument("--specs", nargs="+", default=[], help="specs such as d8b8s2, or keys/values: d8b8s2/d8b8")
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM, help=f"channels of a head ({HEAD_DIM})")
    arguments = parser.parse_args()
    if unknown := set(parts := arguments.parts.split(",")) - set(PARTS):
        parser.error(f"part {sorted(unknown)[0]!r} does not exist; choose from {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        sys.exit("the kernels are timed with CUDA graphs: this needs a CUDA GPU")
    bits = arguments.bits or ([] if arguments.specs else [1.0])
    specs = [*(str(VQSpec.for_bits(b)) for b in bits), *arguments.specs]
    sizes = arguments.sizes or (QUICK_DECODE if arguments.quick else DECODE)
    prompts = QUICK_PREFILL if arguments.quick else PREFILL
    run(arguments.out, specs, arguments.head_dim, "cuda", sizes, prompts, parts)


def _size(text: str) -> tuple[int, int]:
    batch, n = map(int, text.split("x"))
    return batch, n


@torch.no_grad()
def run(
    out: Path, specs: Sequence[str], head_dim: int, device: str, sizes: Sequence[tuple[int, int]],
    prompts: Sequence[int], parts: Sequence[str],
) -> None:  # fmt: skip
    torch.manual_seed(0)
    codecs = {spec: random_codec(spec, device=device, head_dim=head_dim) for spec in specs}
    for spec, codec in codecs.items():
        for batch, n in CHECKED:
            for name, error in check_decode(codec, batch, n).items():
                print(f"{name}, {spec}, batch {batch} x {n}: off by {error:.1e} of the largest output value")
                if not error <= TOLERANCE:
                    sys.exit(f"decode attention is wrong (more than {TOLERANCE:g}): nothing was timed")
    rows: list[dict] = []
    for batch, n in sizes if "decode" in parts else ():
        rows += decode_rows(codecs, batch, n)
        print_table(rows[-len(codecs) * len(DECODERS) - len(BACKENDS) :])
        if device == "cuda":
            torch.cuda.empty_cache()
    for n in prompts if {"prefill", "encode"} & set(parts) else ():
        rows += prefill_rows(codecs, n, "prefill" in parts)
    print_table(rows)
    write_csv(out / "kernels.csv", rows, device)
    if importlib.util.find_spec("matplotlib"):
        plot(rows, out / "kernels.png")
    else:
        print("matplotlib is not installed: the plot was left out")


if __name__ == "__main__":
    main()
