"""Small builders shared by tests."""

from __future__ import annotations

import torch

from antkv_hf import AnTKVCodebook, AnTKVConfig
from antkv_hf.calibration.basis import pair_permutation
from antkv_hf.codebook import describe_model
from antkv_hf.codecs import VQTables
from antkv_hf.config import VQSpec
from antkv_hf.rotary import Rotary


def random_tables(
    spec: VQSpec, kv_heads: int, head_dim: int, dense: bool, seed: int = 0, scale: float = 1.0
) -> VQTables:
    """Valid tables with random centroids: a dense basis near a rotation, or a random permutation and metric."""
    g = torch.Generator().manual_seed(seed)
    groups = spec.groups(head_dim)
    size = (kv_heads, groups, spec.stages, spec.centroids, spec.sub_dim)
    centroids = torch.randn(size, generator=g)
    centroids = centroids * 0.5 ** torch.arange(spec.stages).view(1, 1, -1, 1, 1)
    mean = 0.1 * torch.randn(kv_heads, head_dim, generator=g)
    if dense:
        basis = torch.linalg.qr(torch.randn(kv_heads, head_dim, head_dim, generator=g))[0]
        return VQTables(centroids, mean, synthesis=basis * torch.linspace(0.5, 2, head_dim).unsqueeze(1))
    order = torch.stack([torch.randperm(head_dim, generator=g) for _ in range(kv_heads)])
    root = torch.eye(spec.sub_dim) + 0.2 * torch.randn(kv_heads, groups, spec.sub_dim, spec.sub_dim, generator=g)
    return VQTables(centroids, mean, permutation=order.to(torch.int16), metric_root=root)


def random_noise(spec: VQSpec, kv_heads: int, head_dim: int, seed: int = 0) -> torch.Tensor:
    """Covariances of what keys' codes lose, of a size that moves attention."""
    d = spec.sub_dim
    root = torch.randn(kv_heads, spec.groups(head_dim), d, d, generator=torch.Generator().manual_seed(seed))
    return 2 * root @ root.mT / d


def pair_tables(
    spec: VQSpec, kv_heads: int, head_dim: int, rotary: Rotary | None, seed: int = 0, noise: bool = True
) -> VQTables:
    """Random tables of keys whose permutation keeps RoPE pairs together."""
    tables = random_tables(spec, kv_heads, head_dim, dense=False, seed=seed)
    pairs = torch.arange(head_dim).view(-1, 2) if rotary is None else rotary.channel_pairs(head_dim)
    g = torch.Generator().manual_seed(seed + 100)
    covariance, metric = (
        torch.diag_embed(0.1 + torch.rand(kv_heads, head_dim, generator=g, dtype=torch.float64)) for _ in range(2)
    )
    order = pair_permutation(covariance, metric, pairs, spec.groups(head_dim))
    lost = random_noise(spec, kv_heads, head_dim, seed) if noise else None
    return VQTables(
        tables.centroids, tables.mean, permutation=order.to(torch.int16), metric_root=tables.metric_root, noise=lost
    )


def random_codebook(model, config: AnTKVConfig, seed: int = 0, rotary: Rotary | None = None) -> AnTKVCodebook:
    """A codebook of random tables for all layers of `model`; with `rotary`, of such that kernels read."""
    described = describe_model(model.config.get_text_config(decoder=True), "test/model")
    heads, dim = described["kv_heads"], described["head_dim"]

    def key_tables(spec: VQSpec, seed: int) -> VQTables:
        if rotary is not None:
            return pair_tables(spec, heads, dim, rotary, seed)
        return random_tables(spec, heads, dim, dense=config.rope == "none", seed=seed)

    tables = {
        i: (
            key_tables(config.specs(i)[0], seed + 2 * i),
            random_tables(config.specs(i)[1], heads, described["value_dim"], dense=True, seed=seed + 2 * i + 1),
        )
        for i in range(described["num_hidden_layers"])
    }
    return AnTKVCodebook(config, tables, described)


def static_contents(cache) -> list[torch.Tensor]:
    """Copies of all that a cache with `max_length` holds on its device."""
    storages = [layer.storage for layer in cache.layers]
    return [t.clone() for s in storages for t in (*s.buffers.tensors(), s.buffers.lengths, s.offset, s.query_moment)]
