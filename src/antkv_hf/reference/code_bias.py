"""What is added to the logits of coded tokens, because a centroid is the mean of many keys.

A coded key is k = c + e: c is read, e is lost, with mean 0 and covariance N. Of what a softmax sums,

    E exp(q.k) = exp(q.c) E exp(q.e) ~ exp(q.c + Var(q.e) / 2)          (the second cumulant; exact for Gaussian e)

so coded tokens weigh too little beside exact ones (window, anchors, sinks) unless their logits get

    b(q) = scale^2 / 2 sum_g q_g^T N_g q_g,

summed over sub-vectors g, which are coded apart, so that their errors have little to do with each other. It depends on
the query alone: it joins once a query, where the parts of an attention are merged. N is that of keys after RoPE,
averaged over the positions on which it was measured. Far beyond them only the share of N that couples different RoPE
pairs is stale. b is held within 0 and `LARGEST`: the second cumulant says little so far out, and kernels that subtract
(for the chunk of a prompt) lose as many digits as exp(b) has.
"""

from __future__ import annotations

import torch

LARGEST = 3.0  # nats: twenty-fold; kernels/antkv/torch-ext/antkv/merge_splits.py holds to the same


def code_bias(query: torch.Tensor, noise: torch.Tensor, permutation: torch.Tensor, scale: float) -> torch.Tensor:
    """b(q) for each query, between 0 and `LARGEST`.

    Args:
        query: ``(batch, kv_heads, group, q_len, head_dim)`` after RoPE.
        noise: ``(kv_heads, sub-vectors, d, d)``, covariance N of what is lost of a key's sub-vectors.
        permutation: int64 ``(kv_heads, head_dim)``: sub-vector g holds channels ``permutation[g * d : (g + 1) * d]``.
        scale: factor on q.k.

    Returns:
        float32 ``(batch, kv_heads, group, q_len)``.
    """
    heads, groups, d = noise.shape[:3]
    q = query.float().gather(-1, permutation.view(1, heads, 1, 1, -1).expand(query.shape))
    q = q.unflatten(-1, (groups, d)).movedim(-2, 2)  # (batch, kv_heads, sub-vectors, group, q_len, d)
    bias = ((q @ noise.float().view(1, heads, groups, 1, d, d)) * q).sum((2, 5)) * (0.5 * scale**2)
    return bias.clamp(0.0, LARGEST)


def with_bias_channel(
    query: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor, coded: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and keys with one more channel, so that ``scale * q.k`` holds the bias where a key is coded.

    Args:
        query: ``(batch, q_heads, n, head_dim)``. keys: ``(batch, kv_heads, m, head_dim)``.
        bias: ``(batch, q_heads, n)``, natural log. coded: bool ``(batch, kv_heads, m)``.

    Returns:
        ``(batch, q_heads, n, head_dim + 1)`` and ``(batch, kv_heads, m, head_dim + 1)``, in their dtypes.
    """
    query = torch.cat([query, (bias / scale).to(query.dtype).unsqueeze(-1)], -1)
    return query, torch.cat([keys, coded.to(keys.dtype).unsqueeze(-1)], -1)
