"""Vector quantization in plain PyTorch: nearest centroid, gather, residual stages."""

from __future__ import annotations

import torch

# Largest distance matrix held at once, in elements: bounds the workspace of nearest_centroid to 256 MB in float32. A
# CPU is twice as fast when it stays in the cache.
_MAX_DISTANCES = {"cpu": 1 << 18, "other": 1 << 26}


def nearest_centroid(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centroid, ``argmin_k |x - c_k|^2 = argmax_k (x . c_k - |c_k|^2 / 2)``.

    Args:
        x: vectors ``(tables, n, d)``.
        centroids: ``(tables, K, d)``.

    Returns:
        int64 ``(tables, n)``. The workspace stays below 256 MB (1 MB on a CPU) whatever n is.
    """
    half_norm = 0.5 * centroids.square().sum(-1).unsqueeze(1)
    limit = _MAX_DISTANCES["cpu" if x.device.type == "cpu" else "other"]
    step = max(1, limit // (centroids.shape[0] * centroids.shape[1]))
    blocks = [
        torch.baddbmm(-half_norm, x[:, i : i + step], centroids.mT).argmax(-1) for i in range(0, x.shape[1], step)
    ]
    return torch.cat(blocks, 1) if len(blocks) != 1 else blocks[0]


def gather_centroids(centroids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """``centroids[t, codes[t, i]]``: ``(tables, K, d)`` and ``(tables, n)`` -> ``(tables, n, d)``."""
    tables, size, dim = centroids.shape
    first = torch.arange(tables, device=codes.device).unsqueeze(1) * size
    return centroids.reshape(tables * size, dim).index_select(0, (codes + first).flatten()).view(tables, -1, dim)


def residual_encode(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Greedy residual codes: stage s codes what the stages before it left.

    Args:
        x: ``(tables, n, d)``.
        centroids: ``(tables, stages, K, d)``; one stage is product quantization.

    Returns:
        int64 ``(tables, n, stages)``.
    """
    codes = []
    for stage in range(centroids.shape[1]):
        codes.append(nearest_centroid(x, centroids[:, stage]))
        if stage + 1 < centroids.shape[1]:
            x = x - gather_centroids(centroids[:, stage], codes[-1])
    return torch.stack(codes, -1)


def residual_decode(codes: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Sum of the stages' centroids: ``(tables, n, stages)`` -> ``(tables, n, d)``."""
    out = gather_centroids(centroids[:, 0], codes[..., 0])
    for stage in range(1, centroids.shape[1]):
        out = out + gather_centroids(centroids[:, stage], codes[..., stage])
    return out
