"""Measured rows as text, Markdown or JSON, and in a codebook and its card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..codebook import AnTKVCodebook
from ..codebook_card import measured_table
from .perplexity import EvaluationRow


def format_rows(rows: Sequence[EvaluationRow], style: str = "text") -> str:
    """A table of `rows`.

    Args:
        style: ``text`` (aligned columns), ``markdown`` or ``json`` (a list of objects, all fields).

    Raises:
        ValueError: for another style.
    """
    if style == "json":
        return json.dumps([row.to_dict() for row in rows], indent=2)
    return measured_table([row.to_dict() for row in rows], style)


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
