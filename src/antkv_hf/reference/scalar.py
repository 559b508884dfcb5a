"""Asymmetric scalar quantization in plain PyTorch: ``x = zero + scale * code`` (KIVI, arXiv 2402.02750)."""

from __future__ import annotations

import torch

_FP16_MAX = torch.finfo(torch.float16).max
_SMALLEST = 6e-8  # float16's smallest positive number: what a group of equal elements can be divided by


def scale_and_zero(
    x: torch.Tensor, bits: int, dim: int, excluded: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero by which the elements along `dim` share the range from their smallest to their largest.

    Args:
        x: float32, any shape.
        bits: of a code.
        excluded: bool, broadcastable to `x`: elements that the range does not have to hold.

    Returns:
        float16 tensors of the shape of `x` with `dim` of size 1. A group that is excluded as a whole gets zero 0.
    """
    low = high = x
    if excluded is not None:
        low, high = x.masked_fill(excluded, float("inf")), x.masked_fill(excluded, float("-inf"))
    low, high = low.amin(dim, keepdim=True), high.amax(dim, keepdim=True)
    empty = low > high
    low, high = (t.masked_fill(empty, 0.0).clamp(-_FP16_MAX, _FP16_MAX) for t in (low, high))
    scale = ((high - low) / ((1 << bits) - 1)).clamp_min(_SMALLEST)
    return scale.to(torch.float16), low.to(torch.float16)


def quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Nearest codes ``0..2**bits - 1`` of `x` as uint8; scale and zero broadcast to it."""
    return ((x - zero.float()) / scale.float()).round_().clamp_(0, (1 << bits) - 1).to(torch.uint8)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """What codes stand for, float32."""
    return zero.float() + scale.float() * codes
