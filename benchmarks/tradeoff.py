"""Quality against speed: perplexity of uniform tables over times of decode attention over the same codes.

    python benchmarks/tradeoff.py --out FOLDER --kernels results/kernels-d64-h200.csv --quality results/quality.csv

Joins rows of kernels.py (heads of 64, which are SmolLM2's) with those of quality.py (S128, WikiText-2, 12 windows of
2,048 tokens), prints them and, where matplotlib is installed, writes FOLDER/tradeoff.png. Measures nothing itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from results import print_table, read_csv
from rivals.report import pyplot, save

MODEL, HEAD_DIM = "SmolLM2-135M-Instruct", "64"
SLICE = dict(model=MODEL, protocol="S128", text="wikitext2", windows="12", window="2048")
METHODS = {  # tables of one spec in all layers, as quality.csv calls them
    "d16b8": "0.5bit", "d8b8": "1bit", "d16b8s2": "1bit-residual", "d4b8": "2bit", "d8b8s2": "2bit-residual",
    "d2b8": "4bit",
}  # fmt: skip
STAGES = {"kmeans": "k-means", "tuned": "fine-tuned"}
# Not in this package. Block form: times as fast (block-form-h200.csv, 16 x 128K, heads of 128, an older kernel) and
# perplexity that it loses, of a study of SmolLM2 with other tables.
BLOCK_FORM_SPEED, BLOCK_FORM_LOSS = 1.305, 18.41 / 18.13


class Point(NamedTuple):
    """A spec as it was learned: how fast it is over the best SDPA, and its perplexity over FP."""

    tables: str
    learned: str
    speedup: float
    ratio: float


def points(kernels: list[dict], quality: list[dict], batch: int, n: int) -> list[Point]:
    """What both tables have, the kernel in CUDA C++ only.

    Raises:
        ValueError: if `kernels` has no row of that size.
    """
    rows = [r for r in kernels if r["kernel"].endswith("CUDA") and r["head_dim"] == HEAD_DIM]
    speeds = {r["spec"]: float(r["speedup_over_sdpa"]) for r in rows if (r["batch"], r["n"]) == (str(batch), str(n))}
    if not speeds:
        sizes = sorted({f"{r['batch']}x{r['n']}" for r in rows})
        raise ValueError(f"no row of {batch} x {n} tokens with heads of {HEAD_DIM}; there are {', '.join(sizes)}")
    ratios = {r["method"]: float(r["ratio"]) for r in quality if all(r[k] == v for k, v in SLICE.items())}
    return [
        Point(spec, learned, speeds[spec], ratios[f"{method}-{stage}"])
        for spec, method in METHODS.items()
        for stage, learned in STAGES.items()
        if spec in speeds and f"{method}-{stage}" in ratios
    ]


def plot(plt, found: list[Point], path: Path, batch: int, n: int) -> None:
    """Right and down is better. `plt`: matplotlib's pyplot."""
    figure, axis = plt.subplots(figsize=(8, 5))
    for learned, marker in zip(STAGES.values(), "os", strict=True):
        some = [p for p in found if p.learned == learned]
        axis.plot([p.speedup for p in some], [p.ratio for p in some], marker, label=f"keys before RoPE, {learned}")
        for p in some:
            axis.annotate(p.tables, (p.speedup, p.ratio), xytext=(6, 4), textcoords="offset points", fontsize=8)
    for p in found:
        if (p.tables, p.learned) == ("d8b8", STAGES["kmeans"]):
            there = (p.speedup * BLOCK_FORM_SPEED, p.ratio * BLOCK_FORM_LOSS)
            axis.plot(*there, "x", color="gray", label="block form of d8b8 (not here), from heads of 128")
            axis.annotate("", there, (p.speedup, p.ratio), arrowprops=dict(arrowstyle="->", color="gray", alpha=0.5))
    axis.axhline(1.0, color="gray", linewidth=0.8)
    axis.set(
        xlabel=f"decode attention, times as fast as the best SDPA ({batch} x {n >> 10}K tokens, heads of {HEAD_DIM})",
        ylabel=f"perplexity over FP (S128, {MODEL}, WikiText-2)",
        title="Quality against speed of uniform tables",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of tradeoff.png")
    parser.add_argument("--kernels", type=Path, required=True, help="CSV of kernels.py --head-dim 64")
    parser.add_argument("--quality", type=Path, required=True, help="CSV of quality.py")
    parser.add_argument("--size", type=int, nargs=2, default=(16, 131072), metavar=("BATCH", "TOKENS"))
    arguments = parser.parse_args()
    try:
        found = points(read_csv(arguments.kernels), read_csv(arguments.quality), *arguments.size)
    except ValueError as error:
        sys.exit(f"{arguments.kernels}: {error}")
    print_table([p._asdict() for p in found])
    if plt := pyplot():
        arguments.out.mkdir(parents=True, exist_ok=True)
        plot(plt, found, arguments.out / "tradeoff.png", *arguments.size)


if __name__ == "__main__":
    main()
