"""Measured rows as Markdown and plots."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

Row = dict[str, str]
MARKERS = "o*sDv^"
RATIOS = (1.0005, 1.001, 1.002, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 4)  # ticks of the plots


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
        methods: dict[tuple[str, str, str], dict[str, Row]] = {}
        for row in here:
            if row["protocol"] != "FP":
                methods.setdefault((row["method"], row["seed"], row.get("statistics", "")), {})[row["protocol"]] = row
        lines = []
        for (name, seed, statistics), found in sorted(methods.items(), key=lambda item: _bits(item[1])):
            some = next(iter(found.values()))
            streaming = found.get("S128") or found.get("cache")
            with_window = "" if streaming is None else f"{float(streaming['bits_with_window']):.2f}"
            cells = [
                f"{float(found[p]['perplexity']):.2f} ({float(found[p]['ratio']):.3f} x)" if p in found else ""
                for p in protocols
            ]
            label = name if seed == "0" else f"{name}, seed {seed}"
            if any(other[:2] == (name, seed) and other[2] != statistics for other in methods):
                label += f", {statistics}"
            lines.append([label, f"{_bits(found):.2f}", with_window, f"{float(some['table_mb']):.1f}", *cells])
        plain = "" if exact is None else f"FP: {float(exact['perplexity']):.3f}.\n\n"
        table = markdown(["method", "bits", "with window", "tables, MB", *protocols], lines)
        parts.append(f"### {heading(setting)}\n\n{plain}{table}\n")
    return "\n".join(parts)


def _bits(found: dict[str, Row]) -> float:
    return max(float(row["bits"]) for row in found.values())


def pyplot():
    """matplotlib's pyplot without a screen, or None (with a line) where matplotlib is not installed."""
    if not importlib.util.find_spec("matplotlib"):
        print("matplotlib is not installed: the plots were left out")
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def loss(row: Row) -> float:
    """Ratio of perplexity to FP, less 1, within the axis of `loss_axis`: its height on the plots."""
    return min(max(float(row["ratio"]) - 1, RATIOS[0] - 1), RATIOS[-1] - 1)


def loss_axis(axis) -> None:
    """A logarithmic axis of ratio - 1, labelled with the ratio, so that 1.001 and 2 are both legible."""
    axis.set_yscale("log")
    axis.set_ylim((RATIOS[0] - 1) * 0.9, (RATIOS[-1] - 1) * 1.1)
    axis.set_yticks([ratio - 1 for ratio in RATIOS], [f"{ratio:g}" for ratio in RATIOS], fontsize=8)
    axis.set_yticks([], minor=True)
    axis.grid(alpha=0.3)


def save(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    figure.clear()
    return path


def plot_quality(rows: Sequence[Row], out: Path) -> list[Path]:
    """Ratio of perplexity to FP against bits: a figure a protocol, a panel a text. Worse than 4 stands at the top."""
    plt = pyplot()
    families = list(dict.fromkeys(row["family"] for row in rows if row["protocol"] != "FP"))
    written = []
    for protocol in ("W0", "S128", "cache") if plt else ():
        found = grouped(row for row in rows if row["protocol"] == protocol)
        if not found:
            continue
        figure, axes = plt.subplots(1, len(found), figsize=(6.5 * len(found), 5.5), squeeze=False)
        for axis, (setting, here) in zip(axes[0], found.items()):
            for i, family in enumerate(families):
                line = sorted((float(row["bits"]), loss(row)) for row in here if row["family"] == family)
                color = plt.get_cmap("tab20")(2 * i % 20 + 2 * i // 20)
                if line:
                    axis.plot(*zip(*line), color=color, marker=MARKERS[i % len(MARKERS)], markersize=5, label=family)
            loss_axis(axis)
            axis.set(xlabel="bits an element, all counted", title=heading(setting))
            axis.set_xscale("log", base=2)
            axis.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        axes[0][0].set_ylabel(f"perplexity over FP, {protocol}")
        lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}  # of all panels
        axes[0][-1].legend(lines.values(), lines.keys(), fontsize=8)
        written.append(save(figure, out / f"quality-{protocol.lower()}.png"))
    return written
