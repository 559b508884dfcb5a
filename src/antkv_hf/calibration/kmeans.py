"""Weighted k-means of many tables at once, and its residual stages."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..reference.vq import gather_centroids, nearest_centroid

_ONE_HOT = 1 << 24  # largest assignment matrix held at once on an accelerator, in elements


def weighted_kmeans(
    x: torch.Tensor, weights: torch.Tensor, size: int, iterations: int = 10, seed: int = 0
) -> torch.Tensor:
    """Lloyd's algorithm: centroid c_k = sum_j w_j x_j / sum_j w_j over the j nearest to it, `iterations` times.

    Starts from distinct random samples of positive weight. A cell without weight is seeded again with a sample drawn in
    proportion to w_j |x_j - c(x_j)|^2, without replacement.

    Args:
        x: ``(tables, n, d)`` float. weights: ``(tables, n)``, at least 0.
        size: centroids in a table, at most n.
        seed: decides start and new seeds; the same seed gives the same tables on the same device.

    Returns:
        ``(tables, size, d)``.

    Raises:
        ValueError: fewer samples than centroids.
    """
    tables, n, _ = x.shape
    if n < size:
        raise ValueError(f"{size} centroids need at least {size} samples, got {n}: raise `samples` (and `tokens`)")
    generator = torch.Generator(x.device).manual_seed(seed)
    order = torch.rand(tables, n, generator=generator, device=x.device) - (weights <= 0).float()
    centroids = gather_centroids(x, order.topk(size, -1).indices)
    for _ in range(iterations):
        codes = nearest_centroid(x, centroids)
        sums, totals = cell_sums(x, weights, codes, size)
        empty = totals <= 0
        means = sums / totals.masked_fill(empty, 1.0).unsqueeze(-1)
        if empty.any():
            means = torch.where(empty.unsqueeze(-1), _new_seeds(x, weights, centroids, codes, empty, generator), means)
        centroids = means
    return centroids


def residual_kmeans(
    x: torch.Tensor,
    weights: torch.Tensor,
    size: int,
    stages: int,
    iterations: int = 10,
    seed: int = 0,
    rounded: Callable[[torch.Tensor], torch.Tensor] = lambda centroids: centroids,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of several stages, each fitted to what those before it left (RECIPE definition 5).

    Args:
        x, weights, size, iterations, seed: see `weighted_kmeans`.
        rounded: what storing does to centroids ``(tables, size, d)``; later stages see the rounded ones.

    Returns:
        centroids ``(tables, stages, size, d)`` as rounded, and what is left of x ``(tables, n, d)``.
    """
    found = []
    for stage in range(stages):
        centroids = rounded(weighted_kmeans(x, weights, size, iterations, seed + stage))
        x = x - gather_centroids(centroids, nearest_centroid(x, centroids))
        found.append(centroids)
    return torch.stack(found, 1), x


def cell_sums(
    x: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the vectors and sum of the weights in each cell, added in an order that is always the same.

    Args:
        x: ``(tables, n, d)``. weights, codes: ``(tables, n)``.

    Returns:
        ``(tables, size, d)`` and ``(tables, size)``.
    """
    if x.device.type != "cpu":  # where index_add_ adds in an order that changes from run to run
        return _cell_sums_by_product(x, weights, codes, size)
    tables, _, dim = x.shape
    cells = (codes + torch.arange(tables).unsqueeze(1) * size).flatten()
    sums = torch.zeros(tables * size, dim).index_add_(0, cells, (x * weights.unsqueeze(-1)).flatten(0, 1))
    totals = torch.zeros(tables * size).index_add_(0, cells, weights.flatten())
    return sums.view(tables, size, dim), totals.view(tables, size)


def _cell_sums_by_product(x, weights, codes, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`cell_sums` as a product with the weighted assignment matrix, in blocks."""
    tables, n, dim = x.shape
    sums, totals = x.new_zeros(tables, size, dim), x.new_zeros(tables, size)
    step = max(1, _ONE_HOT // (tables * size))
    for start in range(0, n, step):
        block = slice(start, min(start + step, n))
        one_hot = x.new_zeros(tables, size, block.stop - block.start)
        one_hot.scatter_(1, codes[:, block].unsqueeze(1), weights[:, block].unsqueeze(1))
        sums.baddbmm_(one_hot, x[:, block])
        totals += one_hot.sum(-1)
    return sums, totals


def _new_seeds(x, weights, centroids, codes, empty: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A sample for each empty cell ``(tables, size, d)``; other cells get anything.

    The largest of log(p_j) + Gumbel noise are a draw without replacement in proportion to p_j, which unlike
    `torch.multinomial` has no limit on the number of samples.
    """
    error = (x - gather_centroids(centroids, codes)).square().sum(-1) * weights
    noise = torch.rand(error.shape, generator=generator, device=x.device).clamp_min(1e-30).log().neg().log()
    wanted = int(empty.sum(-1).max())
    picks = (error.log() - noise).topk(wanted, -1).indices  # (tables, wanted)
    rank = (empty.cumsum(-1) - 1).clamp(0, wanted - 1)
    return gather_centroids(x, picks.gather(-1, rank))
