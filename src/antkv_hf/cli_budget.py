"""``antkv budget``: what a cache will take, and what fits."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .cli_common import AsJson, Model, _check_model_folder, _dtype, _quiet


def budget(
    model: Model,
    tokens: Annotated[int | None, typer.Option(help="Tokens of each sequence, e.g. 131072.")] = None,
    size: Annotated[str | None, typer.Option("--bytes", help="Memory for the cache, e.g. 2GB or 1.5GiB.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    among: Annotated[
        list[str] | None,
        typer.Option(
            help="Preset (2bit, ott-4bit) or codebook; repeat. Default: the shipped codebooks of the model, and the "
            "presets that need none."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the model: float32, bfloat16 or float16; auto is what its config says, or bfloat16.",
        ),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Say what a cache of so many tokens takes, how many tokens fit into so many bytes, and what to choose.

    With --tokens and --bytes the answer is the one of the most bits that fits (a codebook's count twice beside those of
    ott- presets); if none does, exit code 1 and the bytes that are missing. Counts all that
    AnTKVCache.memory_footprint() counts, at the length that takes most; weights, tables and the working memory of a
    forward come on top. Reads no weights.

    Example: antkv budget meta-llama/Llama-3.1-8B --tokens 131072 --bytes 2GB --among 2bit --among 1bit
    """
    _quiet()
    from .cache.budget import best_of, choices, model_dtype, most_bytes
    from .evaluation.inspection import model_config

    if tokens is None and size is None:
        raise ValueError("give --tokens N, --bytes SIZE such as 2GB, or both")
    kind = _dtype(dtype)
    _check_model_folder(model)
    config = model_config(model)
    found = choices(config, tokens, size, batch, among, kind)
    best = None if tokens is None or size is None else best_of(found, config, tokens, size, batch, kind)
    held = str(model_dtype(config.get_text_config(decoder=True), kind)).removeprefix("torch.")
    if as_json:
        chosen = None if best is None else best.name
        said = {"choice": chosen, "dtype": held, "choices": [choice.to_dict() for choice in found]}
        typer.echo(json.dumps(said, indent=2))
        return
    width = max(len(choice.name) for choice in found)
    for choice in found:
        parts = [f"{choice.bits:g} code bits".rjust(14)]
        if choice.footprint is not None:
            taken = choice.footprint
            parts.append(f"{taken.total:>16,} bytes, {taken.compression:.1f}x smaller than DynamicCache in {held}")
        if choice.tokens is not None:
            one = (
                ""
                if choice.tokens
                else f": one takes {most_bytes(config, choice.config, 1, batch, kind).total:,} bytes"
            )
            parts.append(f"{choice.tokens:>12,} tokens fit{one}")
        typer.echo(f"{choice.name:<{width}}  " + "  ".join(parts))
    if best is not None:
        typer.echo(f"take {best.name}")
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and tokens is not None and tokens > longest:
        typer.echo(f"note: the model's config names {longest:,} tokens as its longest context")
