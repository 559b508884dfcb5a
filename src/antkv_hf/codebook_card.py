"""The generated model card of a codebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .codebook import AnTKVCodebook


def card_content(codebook: AnTKVCodebook) -> str:
    """Markdown of ``README.md``: metadata, what it is, use, how it was made, measured numbers."""
    model, config, made = codebook.model, codebook.config, codebook.calibration
    assert config.key is not None and config.value is not None
    bits = f"{config.key.bits_per_element:g}-bit keys, {config.value.bits_per_element:g}-bit values"
    metadata = ["---", "library_name: antkv-hf", f"base_model: {model['base_model']}"]
    if made.get("license"):
        metadata.append(f"license: {made['license']}")
    metadata += ["tags:", "- kv-cache", "- quantization", "- antkv", "---"]
    lines = [
        *metadata,
        f"# KV-cache codebook of {model['base_model']}: {bits}",
        "",
        f"Vector-quantization tables for `antkv-hf` ({codebook.tables_bytes() / 1e6:.1f} MB): "
        f"{len(codebook.tables)} of {model['num_hidden_layers']} layers, {model['kv_heads']} kv heads of size "
        f"{model['head_dim']}; keys `{config.key}`, values `{config.value}`, keys coded "
        f"{'before RoPE' if config.rope == 'pre' else 'as they come'}; "
        f"{config.anchors.fraction:.1%} {config.anchors.dtype} anchors by `{config.anchors.score}`, "
        f"{config.anchors.sinks} sinks, window {config.window}.",
        "",
        "```python",
        "from antkv_hf import AnTKVCache",
        'cache = AnTKVCache.from_pretrained("<this repo or folder>")',
        "model.generate(**inputs, past_key_values=cache)",
        "```",
        "",
        "## How it was made",
        "",
        *(f"- {name}: {value}" for name, value in made.items()),
        "",
        "## Measured",
        "",
    ]
    if codebook.evaluation:
        columns = list(dict.fromkeys(name for row in codebook.evaluation for name in row))
        lines.append("| " + " | ".join(columns) + " |")
        lines.append("|" + "---|" * len(columns))
        lines += ["| " + " | ".join(str(row.get(name, "")) for name in columns) + " |" for row in codebook.evaluation]
    else:
        lines.append("Not evaluated yet: run `antkv evaluate`.")
    return "\n".join(lines) + "\n"
