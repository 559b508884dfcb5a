"""Codebook tables of one layer in the form that the kernels read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .table_image import TableImages

TURNS = 64  # positions in `KeyTables.turns`: the largest tile of tokens that a decode program takes


class Codes(NamedTuple):
    """How packed codes are cut: `groups` sub-vectors of `sub_dim` channels, `stages` codes of `code_bits` bits each.

    Code (g, s) of a vector is its slot ``g * stages + s`` and takes bits ``slot * code_bits`` and up of its row of
    ``ceil(groups * stages * code_bits / 8)`` bytes, low bit first.
    """

    groups: int
    stages: int
    code_bits: int
    sub_dim: int

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return -(-self.groups * self.stages * self.code_bits // 8)


class KeyTables(NamedTuple):
    """Keys before RoPE: ``key[channels[i]] = mean[i] + latent[i]``, latent = concat of the groups' centroids.

    Latent channels come in RoPE pairs: 2p and 2p + 1 are the first and second channel of the pair that turns by
    ``position * frequency[p]``, both times `pair_scale`; pairs that do not turn have frequency 0 and scale 1.

    Args:
        codes: how rows are cut.
        centroids: ``(kv_heads, groups, stages, 2**code_bits, sub_dim)``, float16 or float32.
        mean: float32 ``(kv_heads, head_dim)``, latent order.
        channels: int32 ``(kv_heads, head_dim)``: plain channel of a latent one.
        frequency, pair_scale: float32 ``(kv_heads, head_dim // 2)``.
        rotates: False if no pair turns (model without RoPE).
        turns: ``(kv_heads, TURNS, head_dim // 2, 2)``, dtype of `centroids`: cosine and sine of ``t * frequency`` times
            `pair_scale` for t = 0, 1, ...
        encode_centroids: float32, shaped as `centroids`; encode_bias: float32 ``centroids.shape[:-1]``. The code of
            stage s is ``argmax_k  r . encode_centroids[k] + encode_bias[k]`` with r what the stages before it left of
            the latent vector (the metric is folded in; both may be scaled by any positive factor a group).
        noise: float32 ``(kv_heads, groups, sub_dim, sub_dim)``, latent order: covariance of what codes lose of keys
            after RoPE. Logits of coded tokens get ``scale^2 / 2 sum_g q_g . noise_g q_g``; None: nothing.
        images: keeps what `cuda_decode` makes of these tables and the values' beside them; None: it is made at each
            call, and not while a CUDA graph is captured. Of these tables alone: others need their own.
    """

    codes: Codes
    centroids: torch.Tensor
    mean: torch.Tensor
    channels: torch.Tensor
    frequency: torch.Tensor
    pair_scale: torch.Tensor
    rotates: bool
    turns: torch.Tensor
    encode_centroids: torch.Tensor
    encode_bias: torch.Tensor
    noise: torch.Tensor | None = None
    images: TableImages | None = None


class ValueTables(NamedTuple):
    """Values: ``value = mean + latent @ synthesis``, latent = concat of the groups' centroids.

    Args:
        codes, centroids, encode_centroids, encode_bias: as in `KeyTables`.
        mean: float32 ``(kv_heads, value_dim)``, plain channels.
        synthesis: float32 ``(kv_heads, value_dim, value_dim)``, latent to plain; analysis is its inverse.
    """

    codes: Codes
    centroids: torch.Tensor
    mean: torch.Tensor
    synthesis: torch.Tensor
    analysis: torch.Tensor
    encode_centroids: torch.Tensor
    encode_bias: torch.Tensor
