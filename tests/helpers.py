"""Small builders shared by tests."""

from __future__ import annotations

import torch

from antkv_hf import AnTKVCodebook, AnTKVConfig
from antkv_hf.codebook import describe_model
from antkv_hf.codecs import VQTables
from antkv_hf.config import VQSpec


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


def random_codebook(model, config: AnTKVConfig, seed: int = 0) -> AnTKVCodebook:
    """A codebook of random tables for all layers of `model`."""
    described = describe_model(model.config.get_text_config(decoder=True), "test/model")
    heads, dim = described["kv_heads"], described["head_dim"]
    tables = {
        i: (
            random_tables(config.specs(i)[0], heads, dim, dense=config.rope == "none", seed=seed + 2 * i),
            random_tables(config.specs(i)[1], heads, described["value_dim"], dense=True, seed=seed + 2 * i + 1),
        )
        for i in range(described["num_hidden_layers"])
    }
    return AnTKVCodebook(config, tables, described)
