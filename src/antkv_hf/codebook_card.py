"""The generated model card of a codebook, and its measured rows as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

if TYPE_CHECKING:
    from .codebook import AnTKVCodebook

HEADINGS = ("method", "protocol", "text", "tokens", "perplexity", "x FP", "bits", "bits+window", "seconds")
_NUMBERS = HEADINGS[4:]  # right-aligned
_USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

from antkv_hf import AnTKVCache

model = AutoModelForCausalLM.from_pretrained("{model}")
tokenizer = AutoTokenizer.from_pretrained("{model}")
cache = AnTKVCache.from_pretrained("{repo}", model=model)
inputs = tokenizer("The lighthouse", return_tensors="pt").to(model.device)
out = model.generate(**inputs, past_key_values=cache, max_new_tokens=40)
print(tokenizer.decode(out[0]))
print(cache.memory_footprint())
```"""


def card_content(codebook: AnTKVCodebook, repo_id: str | None = None) -> str:
    """Markdown of ``README.md``: metadata, what it is, use, how it was made, measured numbers.

    Args:
        repo_id: where the codebook goes, for the usage; None for a folder.
    """
    model, config, made = codebook.model, codebook.config, codebook.calibration
    key_bits, value_bits = config.bits(codebook.tables)
    bits = f"{key_bits:.3g}-bit keys, {value_bits:.3g}-bit values" + (" on average" if config.layer_specs else "")
    known = model["base_model"] if is_repo_id(model["base_model"]) else None  # the Hub refuses anything else
    metadata = ModelCardData(
        library_name="antkv-hf",
        base_model=known,
        license=made.get("license"),
        tags=["kv-cache", "quantization", "antkv"],
    )
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        f"# KV-cache codebook of {model['base_model']}: {bits}",
        "",
        f"Vector-quantization tables for `antkv-hf` ({codebook.tables_bytes() / 1e6:.1f} MB): "
        f"{len(codebook.tables)} of {model['num_hidden_layers']} layers, {model['kv_heads']} kv heads of size "
        f"{model['head_dim']}; {config.describe_codec(codebook.tables)}, keys coded "
        f"{'before RoPE' if config.rope == 'pre' else 'as they come'}; "
        f"{config.anchors.fraction:.1%} {config.anchors.dtype} anchors by `{config.anchors.score}`, "
        f"{config.anchors.sinks} sinks, window {config.window}.",
        *([] if made.get("license") else ["", "No licence was stated for these tables."]),
        "",
        _USAGE.format(model=model["base_model"], repo=repo_id or "<this repo or folder>"),
        "",
        "## How it was made",
        "",
        *(f"- {name}: {summary(name, value)}" for name, value in made.items()),
        "",
        "## Measured",
        "",
        measured_table(codebook.evaluation, "markdown")
        if codebook.evaluation
        else "Not evaluated yet: run `antkv evaluate`.",
    ]
    return "\n".join(lines) + "\n"


def summary(name: str, value: Any) -> Any:
    """What a card says of one entry of `AnTKVCodebook.calibration`: of sensitivity without the loss of every layer."""
    if name != "sensitivity" or not isinstance(value, dict):
        return value
    return {k: v for k, v in value.items() if k not in ("layers", "key", "value")}


def is_repo_id(name: str) -> bool:
    """Whether `name` can be a model on the Hub: owner/name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def measured_table(rows: Sequence[dict[str, Any]], style: str) -> str:
    """Rows of `antkv_hf.evaluation` (``EvaluationRow.to_dict``; older ones lack some fields) as a table.

    Args:
        style: ``text`` (aligned columns) or ``markdown``.

    Raises:
        ValueError: for another style.
    """
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


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def number(name: str, digits: int) -> str:
        value = row.get(name)
        return f"{value:.{digits}f}" if isinstance(value, (int, float)) else ""

    windows, window, counted = (row.get(name, "") for name in ("windows", "window", "counted"))
    part = isinstance(counted, int) and isinstance(window, int) and counted < window - 1
    return (
        *(str(row.get(name, "")) for name in ("method", "protocol", "text")),
        f"{windows} x {window}" + (f", last {counted}" if part else ""),
        number("perplexity", 3), number("ratio", 4), number("bits", 3), number("bits_with_window", 3),
        number("seconds", 1),
    )  # fmt: skip
