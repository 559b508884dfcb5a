"""What an error costs: the metric of a head's keys or values, and the weight of each token, from gradients."""

from __future__ import annotations

import torch

CLIP = 0.999  # quantile at which squared gradients and token weights are cut
RIDGE = 0.01  # share of the mean eigenvalue added to the metric


def gradient_metric(gradients: torch.Tensor, exclude: torch.Tensor) -> torch.Tensor:
    """Metric M = mean over tokens outside X of g g^T, plus 0.01 tr(M)/D I (RECIPE definition 2).

    |g|^2 is cut at its 99.9th percentile (of tokens outside X), so that a few tokens do not decide. A head whose
    gradients all vanish gets the identity.

    Args:
        gradients: ``(heads, n, D)``. exclude: bool ``(heads, n)``, the set X.

    Returns:
        float64 ``(heads, D, D)`` on the CPU, positive definite.
    """
    kept = ~exclude
    norm = gradients.square().sum(-1)
    limit = masked_quantile(norm, kept, CLIP).unsqueeze(-1)
    scale = (limit / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1).sqrt() * kept
    clipped = gradients * scale.unsqueeze(-1)
    metric = (clipped.mT @ clipped).cpu().double() / kept.sum(-1).clamp_min(1).view(-1, 1, 1).cpu()
    identity = torch.eye(metric.shape[-1], dtype=metric.dtype)
    trace = metric.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1)
    return torch.where(trace > 0, metric + RIDGE * trace * identity, identity)


def metric_roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S = M^(1/2) and S^-1, symmetric: float64 ``(..., D, D)`` each."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(1e-12 * values.amax(-1, keepdim=True)).unsqueeze(-2)
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT


def token_weights(
    gradients: torch.Tensor, inverse_root: torch.Tensor, exclude: torch.Tensor, power: float = 1.0
) -> torch.Tensor:
    """w_j = |S^-1 g_j|^2 cut at its 99.9th percentile, to `power`; 0 on X (RECIPE definition 3).

    Args:
        gradients: ``(heads, n, D)``. inverse_root: S^-1 ``(heads, D, D)``. exclude: bool ``(heads, n)``.
        power: 1 for product VQ, 0.5 for residual VQ.

    Returns:
        float32 ``(heads, n)`` with mean 1; where all gradients vanish, 1 outside X.
    """
    kept = ~exclude
    weights = (gradients @ inverse_root.to(gradients)).square().sum(-1)
    weights = weights.minimum(masked_quantile(weights, kept, CLIP).unsqueeze(-1)).pow(power) * kept
    mean = weights.mean(-1, keepdim=True)
    return torch.where(mean > 0, weights / mean.clamp_min(torch.finfo(mean.dtype).tiny), kept.to(weights.dtype))


def masked_quantile(x: torch.Tensor, mask: torch.Tensor, quantile: float) -> torch.Tensor:
    """The element of `x` ``(heads, n)``, at least 0, at `quantile` of those in `mask`: ``(heads,)``; 0 if none is.

    Sorts, since `torch.quantile` refuses more than 16 million elements.
    """
    ordered = x.masked_fill(~mask, float("-inf")).sort(-1).values
    hidden = (~mask).sum(-1)
    index = hidden + ((x.shape[-1] - hidden - 1).clamp_min(0) * quantile).ceil().long()
    found = ordered.gather(-1, index.clamp_max(x.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    return found.clamp_min(0)
