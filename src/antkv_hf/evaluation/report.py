"""Measured rows as text, Markdown or JSON, and in a codebook and its card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..codebook import AnTKVCodebook
from .perplexity import EvaluationRow

HEADINGS = ("method", "protocol", "text", "tokens", "perplexity", "x FP", "bits", "bits+window", "seconds")
_NUMBERS = HEADINGS[4:]  # right-aligned


def format_rows(rows: Sequence[EvaluationRow], style: str = "text") -> str:
    """A table of `rows`.

    Args:
        style: ``text`` (aligned columns), ``markdown`` or ``json`` (a list of objects, all fields).

    Raises:
        ValueError: for another style.
    """
    if style == "json":
        return json.dumps([row.to_dict() for row in rows], indent=2)
    cells = [_cells(row) for row in rows]
    if style == "markdown":
        align = ["---:" if name in _NUMBERS else "---" for name in HEADINGS]
        return "\n".join("| " + " | ".join(line) + " |" for line in (HEADINGS, align, *cells))
    if style == "text":
        widths = [max(len(line[i]) for line in (HEADINGS, *cells)) for i in range(len(HEADINGS))]
        return "\n".join(
            "  ".join(
                text.rjust(width) if name in _NUMBERS else text.ljust(width)
                for text, width, name in zip(line, widths, HEADINGS)
            ).rstrip()
            for line in (HEADINGS, *cells)
        )
    raise ValueError(f"style {style!r} is unknown; choose text, markdown or json")


def with_rows(codebook: AnTKVCodebook, rows: Sequence[EvaluationRow]) -> AnTKVCodebook:
    """A codebook with `rows` in its evaluation; a new measurement of the same thing replaces the old one."""
    same = ("method", "protocol", "text", "windows", "window", "counted")
    new = [row.to_dict() for row in rows]
    replaced = {tuple(row[name] for name in same) for row in new}
    kept = [row for row in codebook.evaluation if tuple(row.get(name) for name in same) not in replaced]
    return AnTKVCodebook(codebook.config, codebook.tables, codebook.model, codebook.calibration, kept + new)


def save_codebook(codebook: AnTKVCodebook, folder: str | Path) -> None:
    """Saves with a fresh card; `save_pretrained` alone would keep an old one."""
    codebook.save_pretrained(folder)
    codebook.generate_model_card().save(Path(folder) / "README.md")


def _cells(row: EvaluationRow) -> tuple[str, ...]:
    tokens = f"{row.windows} x {row.window}" + (f", last {row.counted}" if row.counted < row.window - 1 else "")
    ratio = "" if row.ratio is None else f"{row.ratio:.4f}"
    return (
        row.method, row.protocol, row.text, tokens, f"{row.perplexity:.3f}", ratio, f"{row.bits:.3f}",
        f"{row.bits_with_window:.3f}", f"{row.seconds:.1f}",
    )  # fmt: skip
