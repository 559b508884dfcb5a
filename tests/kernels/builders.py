"""Small builders shared by the kernels' tests: random codecs, filled storages, and the tensors that kernels take."""

from __future__ import annotations

import pytest
import torch
from antkv.past import ExactTokens, QuantizedPast
from helpers import pair_tables, random_tables

from antkv_hf.anchors import get_score
from antkv_hf.attention.tables import layer_tables
from antkv_hf.codecs import LayerCodec, VectorQuantizer, VQTables
from antkv_hf.config import AnchorConfig, AnTKVConfig, VQSpec
from antkv_hf.rotary import Rotary
from antkv_hf.snapshot import Snapshot
from antkv_hf.storage import LayerStorage

ROPE = ("half", "interleaved", "partial", "scaled", "none")


def rotary_of(kind: str, head_dim: int) -> Rotary | None:
    """RoPE with pairs (i, i + D/2) or (2i, 2i + 1), on half of the channels, with YaRN's scaling, or none."""
    if kind == "none":
        return None
    pairs = head_dim // 4 if kind == "partial" else head_dim // 2
    frequency = 10000.0 ** (-torch.arange(pairs) / pairs)
    return Rotary(frequency, interleaved=kind == "interleaved", scaling=1.2 if kind == "scaled" else 1.0)


def random_codec(
    key: str, value: str, kv_heads: int, head_dim: int, value_dim: int | None = None, rope: str = "half",
    device: torch.device | str = "cpu", seed: int = 0, noise: bool = True,
) -> LayerCodec:  # fmt: skip
    """Random codecs of one layer; centroids are float16 numbers, so that float16 tables lose nothing."""
    rotary = rotary_of(rope, head_dim)
    key_spec, value_spec = VQSpec.parse(key), VQSpec.parse(value)
    key_tables = pair_tables(key_spec, kv_heads, head_dim, rotary, seed, noise)
    value_tables = random_tables(value_spec, kv_heads, value_dim or head_dim, dense=True, seed=seed + 1)
    codecs = []
    for spec, tables in ((key_spec, key_tables), (value_spec, value_tables)):
        tensors = {**tables.tensors(), "centroids": tables.centroids.half().float()}
        codecs.append(VectorQuantizer(spec, VQTables(**tensors), device))
    return LayerCodec(*codecs, rotary=None if rotary is None else rotary.to(torch.device(device)))


def random_snapshot(
    codec: LayerCodec, batch: int, coded: int, tail: int, dtype: torch.dtype = torch.float32,
    anchor_dtype: str = "int8", sinks: int = 4, fraction: float = 0.05, offset: tuple[int, ...] | None = None,
    chunk: int = 32, seed: int = 0,
) -> Snapshot:  # fmt: skip
    """A layer after `coded` + `tail` random tokens; `coded` is a multiple of `chunk`, `tail` at least 1."""
    assert coded % chunk == 0 and tail >= 1
    heads, dim, value_dim = codec.key.kv_heads, codec.key.head_dim, codec.value.head_dim
    device = codec.key.mean.device
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, coded + tail, dim, generator=g).to(device, dtype)
    values = torch.randn(batch, heads, coded + tail, value_dim, generator=g).to(device, dtype)
    anchors = AnchorConfig(score="random" if fraction else "none", fraction=fraction, dtype=anchor_dtype, sinks=sinks)
    window = min(tail, chunk)
    storage = LayerStorage(
        codec, AnTKVConfig(anchors=anchors, window=window, chunk=chunk), get_score(anchors.score), keys, values
    )
    if offset is not None:
        storage.offset, storage.max_offset = torch.tensor(offset, device=device), max(offset)
    storage.append(keys[:, :, : coded + window], values[:, :, : coded + window])
    storage.commit()
    storage.append(keys[:, :, coded + window :], values[:, :, coded + window :])
    snapshot = storage.snapshot()
    assert snapshot.coded_length == coded and snapshot.tail_keys.shape[2] == tail
    return snapshot


def quantized_past(snapshot: Snapshot) -> QuantizedPast | None:
    """The snapshot's coded tokens as kernels read them; None where nothing is coded."""
    if snapshot.key_codes is None or snapshot.value_codes is None:
        return None
    key_tables, value_tables = layer_tables(snapshot.codec, snapshot.tail_keys.dtype)
    return QuantizedPast(
        key_codes=snapshot.key_codes,
        value_codes=snapshot.value_codes,
        key_tables=key_tables,
        value_tables=value_tables,
        exact=tuple(ExactTokens(*tokens.tensors()) for tokens in snapshot.exact_tokens),
        exact_bits=snapshot.exact_bits,
        offset=snapshot.offset,
    )  # fmt: skip


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what ``torch.empty`` returns with NaN (255 for integers): what a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else -1 if out.is_signed() else 255)

    monkeypatch.setattr(torch, "empty", poisoned)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest difference relative to the largest value; infinities must be the same and NaN is nowhere."""
    actual, expected = actual.float(), expected.float()
    assert actual.shape == expected.shape and not actual.isnan().any()
    finite = expected.isfinite()
    assert torch.equal(finite, actual.isfinite()) and torch.equal(actual[~finite], expected[~finite])
    largest = expected[finite].abs().max().item() if finite.any() else 0.0
    difference = (actual - expected)[finite].abs().max().item() if finite.any() else 0.0
    assert difference <= tolerance * max(largest, 1e-3), f"off by {difference:.3g} of {largest:.3g}"
