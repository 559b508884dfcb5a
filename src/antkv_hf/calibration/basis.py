"""The basis in which vectors are cut into sub-vectors: dense balanced PCA, or a permutation that keeps RoPE pairs."""

from __future__ import annotations

import torch

MAX_SWAPS = 1000  # of pairs in a head; about one for three pairs is usual
_GAIN = 1e-6  # relative fall of the cost that a swap must bring
_TINY = 1e-6  # share of the mean variance added to a covariance: channels may be constant


def weighted_moments(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """mu = sum_j w_j x_j / sum_j w_j and Sigma, the same mean of (x_j - mu)(x_j - mu)^T.

    Args:
        x: ``(heads, n, D)``. weights: ``(heads, n)``.

    Returns:
        float64 on the CPU: mu ``(heads, D)`` and Sigma ``(heads, D, D)``, positive definite.
    """
    total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    share = (weights / total).unsqueeze(-1)
    mean = (x * share).sum(1)
    centered = x - mean.unsqueeze(1)
    covariance = ((centered * share).mT @ centered).cpu().double()
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(variance > 0, _TINY * variance, 1.0).view(-1, 1, 1)
    return mean.cpu().double(), covariance + ridge * torch.eye(x.shape[-1], dtype=torch.float64)


def dense_synthesis(covariance: torch.Tensor, root: torch.Tensor, inverse_root: torch.Tensor, groups: int):
    """Balanced PCA basis (RECIPE definition 4): S Sigma S = U diag(l) U^T, T = U^T S scaled to mean variance 1.

    In row vectors x - mu = y @ synthesis with synthesis = U^T S^-1 / scale. The rows (eigen-dimensions) come sub-vector
    by sub-vector, dealt by `balanced_order` of log l.

    Args:
        covariance, root, inverse_root: Sigma, S and S^-1, float64 ``(heads, D, D)``.
        groups: sub-vectors.

    Returns:
        synthesis, float64 ``(heads, D, D)``.
    """
    values, vectors = torch.linalg.eigh(root @ covariance @ root)
    values = values.clamp_min(1e-12 * values.amax(-1, keepdim=True))
    order = balanced_order(values.log(), groups)
    scale = values.mean(-1).sqrt().view(-1, 1, 1)  # y = scale^-1 U^T S (x - mu) has mean variance 1
    rows = vectors.mT.gather(1, order.unsqueeze(-1).expand_as(vectors))
    return rows @ inverse_root * scale


def balanced_order(logs: torch.Tensor, groups: int) -> torch.Tensor:
    """Deals items, largest first, to the group that is not full and has the smallest sum so far.

    Args:
        logs: size of each item ``(heads, items)``, counted from the smallest, so that every item adds to its group.

    Returns:
        int64 ``(heads, items)``: the items of group 0, then of group 1, ...
    """
    capacity = logs.shape[1] // groups
    orders = []
    for row in (logs - logs.amin(-1, keepdim=True) + 1e-3).tolist():
        members: list[list[int]] = [[] for _ in range(groups)]
        sums = [0.0] * groups
        for item in sorted(range(len(row)), key=row.__getitem__, reverse=True):
            group = min((g for g in range(groups) if len(members[g]) < capacity), key=sums.__getitem__)
            members[group].append(item)
            sums[group] += row[item]
        orders.append([item for group in members for item in group])
    return torch.tensor(orders)


def pair_permutation(covariance: torch.Tensor, metric: torch.Tensor, pairs: torch.Tensor, groups: int) -> torch.Tensor:
    """Optimised pair permutation (RECIPE, last section): both channels of a RoPE pair stay in one sub-vector.

    Pairs are dealt by balanced log(Sigma_ii Sigma_i'i' M_ii M_i'i'), then two pairs of different sub-vectors are
    swapped, the best swap first, while it makes sum_s (det M_ss det Sigma_ss)^(1/d) fall: the error that d-dimensional
    cells of equal number leave.

    Args:
        covariance, metric: float64 ``(heads, D, D)``.
        pairs: channels ``(D / 2, 2)``.
        groups: sub-vectors; each holds D / 2 / groups pairs.

    Returns:
        int64 ``(heads, D)``: latent channel i is plain channel ``permutation[i]``.
    """
    sizes = (covariance.diagonal(dim1=-2, dim2=-1) * metric.diagonal(dim1=-2, dim2=-1)).log()
    start = balanced_order(sizes[:, pairs].sum(-1), groups).unflatten(-1, (groups, -1))
    permutations = []
    for head in range(len(covariance)):
        matrices = torch.stack([covariance[head], metric[head]])
        matrices = matrices / matrices.diagonal(dim1=-2, dim2=-1).mean(-1).view(2, 1, 1)
        members = _swapped(matrices, pairs, start[head]) if groups > 1 else start[head]
        permutations.append(pairs[members].flatten())
    return torch.stack(permutations)


def _cost(matrices: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """(det M_ss det Sigma_ss)^(1/d) of sub-vectors: matrices ``(2, D, D)``, channels ``(..., d)`` -> ``(...)``."""
    blocks = matrices[:, channels.unsqueeze(-1), channels.unsqueeze(-2)]
    return (torch.linalg.slogdet(blocks).logabsdet.sum(0) / channels.shape[-1]).exp()


def _swapped(matrices: torch.Tensor, pairs: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Steepest descent from `members` ``(groups, pairs in a group)``, the pair numbers of each sub-vector."""
    groups, capacity = members.shape
    count, members = groups * capacity, members.clone()
    cost = _cost(matrices, pairs[members].flatten(-2))  # (groups,)
    replaced = torch.empty(groups, capacity, count, dtype=torch.float64)  # cost of a group with one pair replaced
    changed = torch.arange(groups)
    for _ in range(MAX_SWAPS):
        tried = members[changed].view(-1, 1, 1, capacity).repeat(1, capacity, count, 1)
        slots = torch.arange(capacity)
        tried[:, slots, :, slots] = torch.arange(count).view(1, 1, -1)
        # A pair that the group already holds makes its block singular: the cost 0 is masked out below.
        replaced[changed] = _cost(matrices, pairs[tried].flatten(-2))
        by_place = replaced[:, :, members.flatten()].view(count, count)  # (place, place of the pair that comes in)
        group_of = torch.arange(groups).repeat_interleave(capacity)
        now = cost[group_of]
        gain = now.unsqueeze(1) + now - by_place - by_place.mT
        gain = gain.masked_fill(group_of.unsqueeze(1) == group_of, float("-inf"))
        best = int(gain.argmax())
        a, b = divmod(best, count)
        if gain[a, b] <= _GAIN * cost.sum():
            break
        flat = members.view(-1)
        flat[[a, b]] = flat[[b, a]]
        changed = group_of[[a, b]]
        cost[changed] = _cost(matrices, pairs[members[changed]].flatten(-2))
    return members
