"""Synthetic layers of the shape of Llama-3-8B for benchmarks: 32 query heads, 8 kv heads, bfloat16; head size 128,
unless another is asked for."""

from __future__ import annotations

import math

import torch
from antkv.past import ExactTokens, QuantizedPast

from antkv_hf.attention.tables import layer_tables
from antkv_hf.codecs import LayerCodec, VectorQuantizer, VQTables
from antkv_hf.config import VQSpec
from antkv_hf.rotary import Rotary

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ANCHORS_PER_CHUNK, CHUNK, SINKS, WINDOW = 3, 128, 4, 128  # anchors: 2% of a chunk, rounded


def llama_rotary(head_dim: int = HEAD_DIM) -> Rotary:
    """Llama 3's RoPE."""
    return Rotary(500000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))


def random_tables(
    key: VQSpec, value: VQSpec, kv_heads: int = KV_HEADS, head_dim: int = HEAD_DIM, seed: int = 0
) -> tuple[VQTables, VQTables]:
    """Random tables: keys in a permutation that keeps RoPE pairs, with noise; values in an orthogonal basis."""
    g = torch.Generator().manual_seed(seed)
    pairs = llama_rotary(head_dim).channel_pairs(head_dim)
    order = [pairs[torch.randperm(head_dim // 2, generator=g)].flatten() for _ in range(kv_heads)]
    basis = torch.linalg.qr(torch.randn(kv_heads, head_dim, head_dim, generator=g))[0]
    root = torch.eye(key.sub_dim).expand(kv_heads, key.groups(head_dim), key.sub_dim, key.sub_dim)
    mean = torch.zeros(kv_heads, head_dim)
    centroids = []
    for spec in (key, value):
        size = (kv_heads, spec.groups(head_dim), spec.stages, spec.centroids, spec.sub_dim)
        centroids.append(torch.randn(size, generator=g) / math.sqrt(spec.stages))
    noise = 0.1 * root.contiguous()  # coded tokens get their bias, which is timed too
    key_tables = VQTables(centroids[0], mean, permutation=torch.stack(order), metric_root=root, noise=noise)
    return key_tables, VQTables(centroids[1], mean, synthesis=basis)


def random_codec(spec: str, seed: int = 0, device: str = "cuda", head_dim: int = HEAD_DIM) -> LayerCodec:
    """A layer's codec on `random_tables`; `spec` is that of keys and values, or both as in ``d8b8s2/d8b8``."""
    keys, _, values = spec.partition("/")
    specs = VQSpec.parse(keys), VQSpec.parse(values or keys)
    tables = random_tables(*specs, head_dim=head_dim, seed=seed)
    codecs = [VectorQuantizer(*pair, device) for pair in zip(specs, tables)]
    return LayerCodec(*codecs, rotary=llama_rotary(head_dim).to(torch.device(device)))


def random_past(codec: LayerCodec, batch: int, length: int) -> QuantizedPast:
    """`length` coded tokens with int8 anchors (3 of each 128) and bfloat16 sinks, all random."""
    device = codec.key.mean.device
    key_tables, value_tables = layer_tables(codec, torch.bfloat16)
    shape = (batch, KV_HEADS, length)
    codes = [
        torch.randint(0, 256, (*shape, t.codes.width), dtype=torch.uint8, device=device)
        for t in (key_tables, value_tables)
    ]
    places = torch.rand(batch, KV_HEADS, length // CHUNK, CHUNK, device=device)
    places[:, :, 0, :SINKS] = -1
    best = places.topk(ANCHORS_PER_CHUNK, -1).indices + torch.arange(0, length, CHUNK, device=device).unsqueeze(1)
    head_dim = codec.key.head_dim
    anchors = _tokens(best.flatten(-2).sort(-1).values, head_dim, torch.int8)
    sinks = _tokens(torch.arange(SINKS, device=device).expand(batch, KV_HEADS, SINKS), head_dim, torch.bfloat16)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    for tokens in (anchors, sinks):
        mask.scatter_(2, tokens.positions.long(), True)
    bits = (mask.unflatten(-1, (-1, 8)) * (1 << torch.arange(8, device=device))).sum(-1).to(torch.uint8)
    offset = torch.zeros(batch, dtype=torch.int64, device=device)
    return QuantizedPast(*codes, key_tables, value_tables, (sinks, anchors), bits, offset)


def _tokens(positions: torch.Tensor, head_dim: int, dtype: torch.dtype) -> ExactTokens:
    shape = (*positions.shape, head_dim)
    keys, values = (torch.randn(shape, device=positions.device) for _ in range(2))
    positions = positions.to(torch.int32).contiguous()
    if dtype != torch.int8:
        return ExactTokens(positions, keys.to(dtype), values.to(dtype))
    scale = torch.full((*positions.shape, 1), 0.03, dtype=torch.float16, device=positions.device)
    return ExactTokens(positions, (keys * 33).to(dtype), (values * 33).to(dtype), scale, scale.clone())
