"""What a cache will take, computed before there is one; what fits into so many bytes, and how many tokens."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..anchors import anchors_per_chunk, get_score
from ..codebook import AnTKVCodebook, describe_model
from ..codebook_names import shipped_codebooks
from ..config import OTT, SCALAR_BITS, AnTKVConfig, ScalarSpec, VQSpec
from ..specs import whole_number
from .footprint import MemoryFootprint

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_NUMBER = r"((?:\d+(?:_\d+)*)?\.?\d+(?:e\+?\d{1,2})?)"
_MOST_TOKENS = 1 << 40  # where a search for the longest text ends


def parse_bytes(size: int | float | str) -> int:
    """Reads ``2_000_000_000``, ``"2GB"`` (10^9 bytes each) or ``"1.5GiB"`` (2^30 each).

    Raises:
        ValueError: for anything else, or no positive number.
    """
    match = re.fullmatch(_NUMBER + r"\s*([kmgt]?i?)b?", str(size).strip().lower(), re.ASCII)
    if not match or match[2] not in _UNITS or (count := int(Decimal(match[1]) * _UNITS[match[2]])) < 1:
        raise ValueError(f"cannot read a number of bytes in {size!r}: write e.g. 2GB, 500MB or 1.5GiB")
    return count


def cache_bytes(
    model_config: PreTrainedConfig,
    config: AnTKVConfig,
    tokens: int,
    batch: int = 1,
    dtype: torch.dtype | None = None,
) -> MemoryFootprint:
    """What `AnTKVCache.memory_footprint` says once `tokens` of each sequence are held. Nothing is allocated.

    Exact for a cache that grows, without padding and between forwards; `tables` are those of the PyTorch backend, and
    kernels add copies of their own. While a prompt's chunk is read, its exact keys come on top, one layer at a time.

    Args:
        model_config: the model's config. dtype: of the model; by default the config's, or bfloat16.

    Raises:
        ValueError: no token, a batch of none, sizes that a spec does not divide, layers whose size is not known
            (linear attention), or what `AnTKVCache` raises for the model.
    """
    return _cache_bytes(model_config, config, tokens, batch, dtype, _cache_layers(model_config, config))


def _cache_bytes(
    model_config: PreTrainedConfig, config: AnTKVConfig, tokens: int, batch: int, dtype: torch.dtype | None,
    layers: list[int | None],
) -> MemoryFootprint:  # fmt: skip
    """`cache_bytes`, with what `_cache_layers` says."""
    _check_counts(tokens, batch)
    text = model_config.get_text_config(decoder=True)
    facts = describe_model(text)
    heads, key_dim, value_dim = (facts[name] for name in ("kv_heads", "head_dim", "value_dim"))
    item = model_dtype(text, dtype).itemsize
    coded = max(tokens - config.window, 0) // config.chunk * config.chunk
    sizes = dict(codes=0, anchors=0, sinks=0, window=0, scores=0, other_layers=0)
    rows, width = batch * heads, batch * heads * (key_dim + value_dim)  # kv heads of the batch; elements of a token
    anchors = config.anchors
    tables = dense = quantized = 0
    for layer, kept in enumerate(layers):
        if kept is not None:
            sizes["other_layers"] += min(tokens, kept) * width * item
            dense += min(tokens, kept) * width * item
            continue
        quantized += 1
        dense += tokens * width * item
        key, value = config.specs(layer)
        sizes["codes"] += _code_bytes(key, value, coded, batch, heads, key_dim, value_dim, item)
        sizes["window"] += (tokens - coded) * width * item
        observed = anchors.enabled and get_score(anchors.score).term is not None  # type: ignore[union-attr]
        sizes["scores"] += rows * (4 * (tokens - coded) * observed + 8) + 8 * batch
        if isinstance(key, VQSpec) and isinstance(value, VQSpec):
            tables += heads * (
                _loaded_bytes(key, key_dim, config.rope != "none") + _loaded_bytes(value, value_dim, False)
            )
        if not coded:
            continue
        slots = coded // config.chunk * anchors_per_chunk(anchors.fraction, config.chunk) if anchors.enabled else 0
        if anchors.max_tokens:
            slots = min(slots, anchors.max_tokens)
        each = key_dim + value_dim + 4 if anchors.dtype == "int8" else 2 * (key_dim + value_dim)
        sizes["anchors"] += rows * slots * (each + 4 + (4 if anchors.max_tokens else 0))
        exact = item if isinstance(key, ScalarSpec) else 2
        sizes["sinks"] += rows * anchors.sinks * (exact * (key_dim + value_dim) + 4)
        sizes["anchors" if slots else "sinks"] += rows * -(-coded // 8)
    return MemoryFootprint(
        **sizes, reserved=0, tables=tables, tokens=batch * tokens, coded_tokens=batch * coded,
        coded_elements=quantized * coded * width, elements=quantized * tokens * width, dense_bytes=dense,
    )  # fmt: skip


def _check_counts(tokens: int, batch: int) -> None:
    for name, number, example in (("tokens", tokens, 131072), ("batch", batch, 1)):
        if whole_number(name, number, example) < 1:
            raise ValueError(f"{name}={number} must be at least 1")


def most_bytes(
    model_config: PreTrainedConfig, config: AnTKVConfig, tokens: int, batch: int = 1, dtype: torch.dtype | None = None
) -> MemoryFootprint:
    """The largest `cache_bytes` of any length up to `tokens`: the exact tail breathes by a chunk while a text grows."""
    return _most_bytes(model_config, config, tokens, batch, dtype, _cache_layers(model_config, config))


def _most_bytes(model_config, config: AnTKVConfig, tokens: int, batch: int, dtype, layers) -> MemoryFootprint:
    _check_counts(tokens, batch)
    full = config.window + config.chunk - 1  # the longest tail
    longest = tokens - (tokens - full) % config.chunk if tokens >= full else tokens
    found = [_cache_bytes(model_config, config, n, batch, dtype, layers) for n in {tokens, longest}]
    return max(found, key=lambda footprint: footprint.total)


def most_tokens(
    model_config: PreTrainedConfig, config: AnTKVConfig, bytes: int | str, batch: int = 1,
    dtype: torch.dtype | None = None,
) -> int:  # fmt: skip
    """The longest text, in tokens of each sequence, whose cache never takes more than `bytes`; 0 if not one fits."""
    size, layers = parse_bytes(bytes), _cache_layers(model_config, config)

    def fits(tokens: int) -> bool:
        return _most_bytes(model_config, config, tokens, batch, dtype, layers).total <= size

    low, high = 0, 1
    while high < _MOST_TOKENS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Choice:
    """One way to keep a cache, and what it takes.

    Args:
        name: preset, or name or folder of a codebook: what `AnTKVCache.from_pretrained` or `AnTKVConfig.preset` takes.
        config: its config. bits: bits of codes per element.
        footprint: at the length that takes most, up to the tokens asked for; None if none were.
        tokens: what fits into the bytes asked for; None if none were.
        codebook: the tables, where a codebook was named.
    """

    name: str
    config: AnTKVConfig
    bits: float
    footprint: MemoryFootprint | None
    tokens: int | None
    codebook: AnTKVCodebook | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        taken = None if self.footprint is None else self.footprint.to_dict()
        return {"name": self.name, "bits": round(self.bits, 3), "fits_tokens": self.tokens, "footprint": taken}


def choices(
    model_config: PreTrainedConfig,
    tokens: int | None = None,
    bytes: int | str | None = None,
    batch: int = 1,
    among: Iterable[str | Path | AnTKVConfig] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Choice]:
    """What each way to keep a cache takes for `tokens`, and how many tokens of it fit into `bytes`; best first.

    Args:
        among: presets (``"2bit"``, ``"ott-4bit"``), codebooks (shipped name, folder, Hub id) or configs. By default the
            shipped codebooks of the model, then the presets that need none.

    Raises:
        ValueError: neither tokens nor bytes, an empty list, a codebook of another model, and as `cache_bytes`.
    """
    if tokens is None and bytes is None:
        raise ValueError("give a number of tokens, or of bytes")
    if isinstance(among, str):
        raise ValueError(f"among={among!r} is one name: give a list, among=[{among!r}]")
    named = [_named(item) for item in among] if among is not None else _for_model(model_config)
    if not named:
        raise ValueError("there is nothing to choose among: name presets or codebooks, e.g. 2bit or ott-4bit")
    found = []
    for name, config, book in named:
        if book is not None:
            _check(name, book, model_config, [])  # of another model: before its layers are counted against this one's
        layers = [i for i, kept in enumerate(_cache_layers(model_config, config)) if kept is None]
        if book is not None:
            _check(name, book, model_config, layers)
        taken = None if tokens is None else most_bytes(model_config, config, tokens, batch, dtype)
        room = None if bytes is None else most_tokens(model_config, config, bytes, batch, dtype)
        bits = _code_bits(config, layers, model_dtype(model_config.get_text_config(decoder=True), dtype))
        found.append(Choice(name or config.name_codec(layers), config, bits, taken, room, book))
    return sorted(found, key=_rank)


def _rank(choice: Choice) -> tuple[float, bool]:
    """Best first: by bits, of which a codebook's count twice beside scalar codes' (measured: 2 bits lose as little as
    ``ott-4bit``, 1 bit less than ``ott-2bit``)."""
    scalar = isinstance(choice.config.key, ScalarSpec)
    return (-choice.bits if scalar or choice.config.is_identity else -2 * choice.bits, scalar)


def fit(
    model_config: PreTrainedConfig,
    tokens: int,
    bytes: int | str,
    batch: int = 1,
    among: Iterable[str | Path | AnTKVConfig] | None = None,
    dtype: torch.dtype | None = None,
) -> Choice:
    """The first of `choices` whose cache of `batch` times `tokens` fits into `bytes`: that of the most bits, where
    those of a codebook count twice beside scalar codes.

    Raises:
        ValueError: none fits, naming the smallest, the bytes that are missing and the tokens that would fit; and as
            `choices`.
    """
    found = choices(model_config, tokens, None, batch, among, dtype)
    return best_of(found, model_config, tokens, bytes, batch, dtype)


def best_of(
    found: list[Choice], model_config: PreTrainedConfig, tokens: int, bytes: int | str, batch: int,
    dtype: torch.dtype | None,
) -> Choice:  # fmt: skip
    """The first of `choices` that fits, as `fit` says it."""
    size = parse_bytes(bytes)
    fitting = [c for c in found if c.footprint is not None and c.footprint.total <= size]
    if fitting:
        return fitting[0]
    least = min(found, key=lambda c: c.footprint.total)  # type: ignore[union-attr]
    total = least.footprint.total  # type: ignore[union-attr]
    room = most_tokens(model_config, least.config, size, batch, dtype)
    raise ValueError(
        f"{batch} x {tokens:,} tokens do not fit into {size:,} bytes: {least.name}, the smallest of {len(found)}, "
        f"takes {total:,}, which is {total - size:,} more; {batch} x {room:,} tokens fit. Give more bytes, or "
        "calibrate a codebook of fewer bits"
    )


def model_dtype(text_config: PreTrainedConfig, given: torch.dtype | None) -> torch.dtype:
    """The dtype that a model holds keys and values in: `given`, else the config's, else bfloat16."""
    stated = given or getattr(text_config, "dtype", None) or torch.bfloat16
    return stated if isinstance(stated, torch.dtype) else getattr(torch, stated)  # a saved config holds its name


def _code_bytes(key, value, coded: int, batch: int, heads: int, key_dim: int, value_dim: int, item: int) -> int:
    """Bytes of a layer's codes, with the scales of scalar ones."""
    rows = batch * heads
    if key is None:
        return rows * coded * (key_dim + value_dim) * item
    if isinstance(key, ScalarSpec):
        groups = coded // key.group
        scales = rows * (4 * key_dim * groups + 4 * (key_dim + 2 * value_dim)) + 4 * groups
        return rows * coded * (key.code_bytes(key_dim) + value.value_bytes(value_dim)) + scales
    return rows * coded * (key.bytes_per_vector(key_dim) + value.bytes_per_vector(value_dim))


def _loaded_bytes(spec: VQSpec, dim: int, permuted: bool) -> int:
    """Bytes of one kv head's tables in `VectorQuantizer`: centroids (for a permutation also those to encode by), basis
    (there also the noise, which older codebooks have not) and mean in float32, permutation and its inverse in int64."""
    centroids = 2 * spec.table_bytes(dim)
    if permuted:
        return 2 * centroids + 4 * dim + 2 * 8 * dim + 2 * 4 * spec.groups(dim) * spec.sub_dim**2
    return centroids + 4 * dim + 2 * 4 * dim**2


def _cache_layers(model_config: PreTrainedConfig, config: AnTKVConfig) -> list[int | None]:
    """For each layer the most tokens that it keeps exactly, None for one that is quantized."""
    from .cache import AnTKVCache
    from .layer import AnTKVLayer, check_layer_numbers

    identity = AnTKVConfig.preset("identity", skip_layers=config.skip_layers)
    with warnings.catch_warnings():  # how many layers are quantized is told where a cache is made
        warnings.simplefilter("ignore")
        layers = AnTKVCache(model_config, identity).layers
    check_layer_numbers(config, len(layers))
    found: list[int | None] = []
    for i, layer in enumerate(layers):
        if isinstance(layer, AnTKVLayer):
            found.append(None)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            found.append(layer.sliding_window - 1)
        elif type(layer) is DynamicLayer:
            found.append(_MOST_TOKENS)
        elif type(layer).__name__ == "DummyLayer":
            found.append(0)
        else:
            raise ValueError(
                f"layer {i} is a {type(layer).__name__}, whose size is not known before it is filled: fill a cache and "
                "ask its memory_footprint()"
            )
    return found


def _code_bits(config: AnTKVConfig, layers: list[int], dtype: torch.dtype) -> float:
    """Bits by which choices are ranked: those of codes alone, since scales buy no quality."""
    if config.is_identity:
        return 8.0 * dtype.itemsize
    if not isinstance(config.key, ScalarSpec):
        return sum(config.bits(layers)) / 2
    specs = [spec for pair in config.layer_codecs(layers).values() for spec in pair]
    return sum(spec.bits for spec in specs if isinstance(spec, ScalarSpec)) / len(specs)


_Named: TypeAlias = tuple[str | None, AnTKVConfig, AnTKVCodebook | None]


def _for_model(model_config: PreTrainedConfig) -> list[_Named]:
    """Shipped codebooks whose model has the sizes of this one, and the presets that need no codebook."""
    found = describe_model(model_config.get_text_config(decoder=True))
    same = ("model_type", "num_hidden_layers", "kv_heads", "head_dim", "value_dim")
    named = [_named(name) for name in shipped_codebooks()]
    fitting = [item for item in named if item[2] and all(item[2].model[field] == found[field] for field in same)]
    return fitting + [_named(f"{OTT}{bits}bit") for bits in SCALAR_BITS]


def _named(item: str | Path | AnTKVConfig) -> _Named:
    """Name (None for a config), config, and the codebook if `item` is one."""
    if isinstance(item, AnTKVConfig):
        return None, item, None
    if isinstance(item, str) and re.fullmatch(rf"identity|({OTT})?[\d.]+bit", item):
        return item, AnTKVConfig.preset(item), None
    if not isinstance(item, (str, Path)):
        raise ValueError(f"among holds {item!r}: give presets, codebooks or configs, e.g. among=['2bit', 'ott-4bit']")
    book = AnTKVCodebook.from_pretrained(item)
    return str(item), book.config, book


def _check(name: str | None, book: AnTKVCodebook, model_config: PreTrainedConfig, layers: list[int]) -> None:
    """Raises ValueError, naming the codebook, if its tables are not those of the model's `layers`."""
    try:
        book.check(model_config.get_text_config(decoder=True), book.config, layers)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
