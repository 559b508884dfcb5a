"""The tables of one layer's keys or values, learned in exactly the basis that will be stored."""

from __future__ import annotations

import torch

from ..codecs import VQTables
from ..config import VQSpec
from ..rotary import Rotary
from .basis import dense_synthesis, pair_permutation, weighted_moments
from .kmeans import residual_kmeans
from .metric import gradient_metric, metric_roots, token_weights
from .work_folder import to_half


def learn_tables(
    spec: VQSpec,
    x: torch.Tensor,
    gradients: torch.Tensor,
    exclude: torch.Tensor,
    rotary: Rotary | None = None,
    iterations: int = 10,
    seed: int = 0,
    weighted: bool = True,
) -> tuple[VQTables, float]:
    """Metric, weights, basis and centroids of one layer (RECIPE definitions 2 to 5).

    Args:
        x, gradients: samples ``(kv_heads, n, head_dim)`` float32, keys before RoPE or values.
        exclude: bool ``(kv_heads, n)``, the set X.
        rotary: for keys before RoPE: their channel pairs stay together in a permutation. None: dense basis.
        weighted: False gives all tokens outside X the same weight (the metric stays).

    Returns:
        Tables on the CPU, and the relative error sum_j w_j |x_j - x^_j|^2 / sum_j w_j |x_j - mu|^2 in the metric (its
        diagonal blocks, with a permutation). 0.25 is what one bit leaves of Gaussian noise.
    """
    heads, _, dim = x.shape
    groups = spec.groups(dim)
    metric = gradient_metric(gradients, exclude)
    root, inverse_root = metric_roots(metric)
    if weighted:
        weights = token_weights(gradients, inverse_root, exclude, power=1.0 if spec.stages == 1 else 0.5)
    else:
        weights = (~exclude).to(x.dtype)
    mean, covariance = weighted_moments(x, weights)
    mean = mean.float()
    centered = x - mean.to(x.device).unsqueeze(1)
    if rotary is None:
        synthesis = to_half(dense_synthesis(covariance, root, inverse_root, groups))
        latent = centered @ torch.linalg.inv(synthesis.double()).to(x)
        roots = None
        stored = {"synthesis": synthesis}
    else:
        permutation = pair_permutation(covariance, metric, rotary.channel_pairs(dim).cpu(), groups)
        roots = _metric_root(metric, covariance, permutation, groups)
        latent = centered.gather(-1, permutation.to(x.device).unsqueeze(1).expand_as(x))
        stored = {"permutation": permutation.to(torch.int16), "metric_root": roots}
    # One table a (head, group): (heads * groups, n, sub_dim)
    parts = latent.unflatten(-1, (groups, -1)).permute(0, 2, 1, 3).flatten(0, 1)
    to_plain = to_latent = torch.eye(spec.sub_dim, device=x.device)
    if roots is not None:
        flat = roots.to(x.device, torch.float32).flatten(0, 1)
        to_plain, to_latent = torch.linalg.inv(flat.cpu().double()).to(x).mT, flat.mT
        parts = parts @ to_latent
    parts, spread = parts.contiguous(), weights.repeat_interleave(groups, 0)
    plain: list[torch.Tensor] = []

    def rounded(centroids: torch.Tensor) -> torch.Tensor:  # through what is stored: plain channels, float16
        plain.append(to_half(centroids @ to_plain))
        return plain[-1].float() @ to_latent

    _, left = residual_kmeans(parts, spread, spec.centroids, spec.stages, iterations, seed, rounded)
    error = (left.square().sum(-1) * spread).sum() / (parts.square().sum(-1) * spread).sum().clamp_min(1e-30)
    dtype = torch.float16 if all(c.dtype == torch.float16 for c in plain) else torch.float32
    centroids = torch.stack([c.to(dtype) for c in plain], 1).unflatten(0, (heads, groups))
    tables = VQTables(centroids.cpu(), mean, **stored)
    tables.check(spec, heads, dim)
    return tables, float(error)


def _metric_root(metric: torch.Tensor, covariance: torch.Tensor, permutation: torch.Tensor, groups: int):
    """R with R^T R = M_ss in each sub-vector, up to a factor a head that makes the mean variance of R x 1.

    Args:
        metric, covariance: float64 ``(heads, D, D)``. permutation: ``(heads, D)``.

    Returns:
        ``(heads, groups, d, d)``, float16 where it fits.
    """

    def blocks(matrix: torch.Tensor) -> torch.Tensor:
        channels = permutation.unflatten(-1, (groups, -1))
        head = torch.arange(len(matrix)).view(-1, 1, 1, 1)
        return matrix[head, channels.unsqueeze(-1), channels.unsqueeze(-2)]

    blocks_of_metric = blocks(metric)
    # tr(M_ss Sigma_ss), summed over the head's sub-vectors and divided by D
    variance = (blocks_of_metric * blocks(covariance)).sum((1, 2, 3)) / metric.shape[-1]
    root, _ = metric_roots(blocks_of_metric)
    return to_half(root / variance.sqrt().view(-1, 1, 1, 1))
