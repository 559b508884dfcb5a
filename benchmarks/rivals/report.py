"""Measured rows as Markdown and plots."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

Row = dict[str, str]


def setting_of(row: Row) -> tuple[str, ...]:
    """What one table holds: a model, a text and its windows."""
    return tuple(row[name] for name in ("model", "dtype", "text", "windows", "window", "counted"))


def heading(setting: tuple[str, ...]) -> str:
    model, dtype, text, windows, window, counted = setting
    last = "" if int(counted) == int(window) - 1 else f", last {int(counted):,}"
    return f"{model} ({dtype}), {text}, {windows} x {int(window):,} tokens{last}"


def grouped(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(setting_of(row), []).append(row)
    return found


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of text; the first column to the left."""
    rows = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *map(list, lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def quality_markdown(rows: Sequence[Row]) -> str:
    """A table for each model and text: methods by bits, perplexity and its ratio to FP under each protocol."""
    parts = []
    for setting, here in grouped(rows).items():
        exact = next((row for row in here if row["protocol"] == "FP"), None)
        protocols = sorted({row["protocol"] for row in here} - {"FP"}, key=("W0", "S128", "cache").index)
        methods: dict[tuple[str, str], dict[str, Row]] = {}
        for row in here:
            if row["protocol"] != "FP":
                methods.setdefault((row["method"], row["seed"]), {})[row["protocol"]] = row
        lines = []
        for (name, seed), found in sorted(methods.items(), key=lambda item: _bits(item[1])):
            some = next(iter(found.values()))
            streaming = found.get("S128") or found.get("cache")
            with_window = "" if streaming is None else f"{float(streaming['bits_with_window']):.2f}"
            cells = [
                f"{float(found[p]['perplexity']):.2f} ({float(found[p]['ratio']):.3f} x)" if p in found else ""
                for p in protocols
            ]
            label = name if seed == "0" else f"{name}, seed {seed}"
            lines.append([label, f"{_bits(found):.2f}", with_window, f"{float(some['table_mb']):.1f}", *cells])
        plain = "" if exact is None else f"FP: {float(exact['perplexity']):.3f}.\n\n"
        table = markdown(["method", "bits", "with window", "tables, MB", *protocols], lines)
        parts.append(f"### {heading(setting)}\n\n{plain}{table}\n")
    return "\n".join(parts)


def _bits(found: dict[str, Row]) -> float:
    return max(float(row["bits"]) for row in found.values())


def plot_quality(rows: Sequence[Row], out: Path, largest: float = 3.0) -> list[Path]:
    """Ratio of perplexity to FP against bits, a figure a protocol, a panel a text; worse than `largest` at the top."""
    if not importlib.util.find_spec("matplotlib"):
        print("matplotlib is not installed: the plots were left out")
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    families = list(dict.fromkeys(row["family"] for row in rows if row["protocol"] != "FP"))
    written = []
    for protocol in ("W0", "S128", "cache"):
        panels = grouped(row for row in rows if row["protocol"] == protocol)
        if not panels:
            continue
        figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 5), squeeze=False)
        for axis, (setting, here) in zip(axes[0], panels.items()):
            for i, family in enumerate(families):
                own = [(float(r["bits"]), float(r["ratio"])) for r in here if r["family"] == family]
                style = dict(color=plt.get_cmap("tab20")(i % 20), marker="o*sDv^"[i % 6], label=family)
                line = sorted((bits, min(ratio, largest)) for bits, ratio in own)
                if line:
                    axis.plot(*zip(*line), linewidth=1.2, markersize=5, **style)
            axis.axhline(1.0, color="gray", linewidth=0.8)
            axis.set(xlabel="bits an element, all counted", title=heading(setting))
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_ylim(0.99, largest * 1.03)
            ticks = [t for t in (1, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3) if t <= largest]
            axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
            axis.set_yticks([], minor=True)
            axis.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel(f"perplexity over FP, {protocol} (top: {largest:g} and worse)")
        axes[0][-1].legend(fontsize=8)
        figure.tight_layout()
        path = out / f"quality-{protocol.lower()}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        written.append(path)
    return written
