"""Rows of `benchmarks/ablations.py` as the tables and plots of a page."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .report import MARKERS, Row, grouped, heading, loss, loss_axis, markdown, pyplot, save

NOT_YET = "Not measured yet."


def part_tables(rows: Sequence[Row]) -> str:
    """Markdown of one part's rows: a table for each text and protocol, its cells the ratio of perplexity to FP."""
    tables = []
    for (setting, protocol), here in panels(rows).items():
        columns = list(dict.fromkeys(row["x"] for row in here))
        lines: dict[str, dict[str, Row]] = {}
        for row in here:
            lines.setdefault(row["group"], {})[row["x"]] = row
        cells = [[group, *(_cell(found.get(x)) for x in columns)] for group, found in lines.items()]
        tables.append(f"{heading(setting)}; {protocol}\n\n{markdown(['', *columns], cells)}")
    return "\n\n".join(tables)


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{float(row['ratio']):.3f} ({float(row['bits']):.2f})"


def panels(rows: Sequence[Row]) -> dict[tuple[tuple[str, ...], str], list[Row]]:
    """Rows of one part by text and protocol; those whose columns are windows stay together."""
    found: dict[tuple[tuple[str, ...], str], list[Row]] = {}
    for setting, here in grouped(rows).items():
        for row in here:
            protocol = "W0, S32, S128, S256" if row["part"] == "window" else row["protocol"]
            found.setdefault((setting, protocol), []).append(row)
    return {key: sorted(here, key=_order) for key, here in found.items()}


def _order(row: Row) -> tuple[float, str]:
    """By the number in a column's name, so that several processes may have written in any order."""
    number = re.search(r"\d[\d,]*(?:\.\d+)?", row["x"])
    return (float(number[0].replace(",", "")) if number else -1.0, row["x"])


def fill_page(page: Path, rows: Sequence[Row], folder: Path) -> None:
    """Replaces what stands between ``<!-- table:PART -->`` and ``<!-- end -->`` in `page`.

    Raises:
        ValueError: the rows have a part for which the page has no place.
    """
    text = page.read_text(encoding="utf-8")
    places = re.findall(r"<!-- table:([\w-]+) -->", text)
    parts = list(dict.fromkeys(row["part"] for row in rows if row["part"]))
    if missing := [part for part in parts if part not in places]:
        raise ValueError(f"{page} has no place for {missing[0]}: write <!-- table:{missing[0]} --> and <!-- end -->")
    for part in places:
        here = [row for row in rows if row["part"] == part]
        body = part_tables(here) if here else NOT_YET
        picture = folder / f"ablations-{part}.png"
        if here and picture.exists():
            link = Path(os.path.relpath(picture.resolve(), page.resolve().parent)).as_posix()
            body += f"\n\n![{part}]({link})"
        pattern = rf"(<!-- table:{part} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, body=body: f"{m[1]}\n{body}\n\n{m[2]}", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def plot_parts(rows: Sequence[Row], out: Path) -> list[Path]:
    """A figure a part: ratio of perplexity to FP over the columns of its tables, a panel for each of them."""
    plt = pyplot()
    written = []
    for part in dict.fromkeys(row["part"] for row in rows if row["part"]) if plt else ():
        found = panels([row for row in rows if row["part"] == part])
        across = min(3, len(found))
        down = -(-len(found) // across)
        figure, axes = plt.subplots(down, across, figsize=(5.5 * across, 4.5 * down), squeeze=False)
        for axis in axes.flat[len(found) :]:
            axis.axis("off")
        for axis, ((setting, protocol), here) in zip(axes.flat, found.items()):
            columns = list(dict.fromkeys(row["x"] for row in here))
            for i, group in enumerate(dict.fromkeys(row["group"] for row in here)):
                points = [(columns.index(row["x"]), loss(row)) for row in here if row["group"] == group]
                axis.plot(*zip(*points), marker=MARKERS[i % len(MARKERS)], label=group)
            loss_axis(axis)
            axis.set_xticks(range(len(columns)), columns, fontsize=8)
            axis.set_title(f"{heading(setting)}\n{protocol}", fontsize=9)
            axis.legend(fontsize=7)
        axes[0][0].set_ylabel("perplexity over FP")
        written.append(save(figure, out / f"ablations-{part}.png"))
    return written
