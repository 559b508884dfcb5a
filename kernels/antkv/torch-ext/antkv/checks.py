"""What launchers check and prepare before a kernel starts."""

from __future__ import annotations

import functools

import torch


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up. (Triton's own is for kernels too, and takes the host ten times as long.)"""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is no less than `n`, which is at least 1."""
    return 1 << (n - 1).bit_length()


@functools.cache
def head_block(dim: int) -> int:
    """Channels of a tile that holds a head vector of `dim`: a power of two, at least 32 (a dot takes pairs by 16)."""
    return max(32, power_of_2(dim))


def register_limit(warps: int, x: torch.Tensor) -> dict[str, int]:
    """Launch options with which an NVIDIA GPU has the registers for two programs of 8 warps at a time."""
    return dict(maxnreg=128) if warps == 8 and x.is_cuda and torch.version.hip is None else {}


def mask_arguments(
    mask: torch.Tensor | None, batch: int, q_heads: int, q_len: int, columns: int
) -> tuple[torch.Tensor | None, str, tuple[int, int, int, int]]:
    """A mask as kernels take it: tensor, kind ("none", "bool" or "additive") and strides, 0 where it is broadcast.

    Raises:
        ValueError: if its shape is not ``(batch or 1, 1 or q_heads, 1 or q_len, columns)``.
    """
    if mask is None:
        return None, "none", (0, 0, 0, 0)
    fits = mask.ndim == 4 and mask.shape[3] == columns
    fits = fits and all(have in (1, want) for have, want in zip(mask.shape, (batch, q_heads, q_len)))
    require(fits, f"mask of shape {tuple(mask.shape)} does not fit ({batch}, {q_heads}, {q_len}, {columns})")
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride()))
    kind = "bool" if mask.dtype == torch.bool else "additive"
    require(kind == "bool" or mask.is_floating_point(), f"mask is {mask.dtype}; it must be bool or floating point")
    view = mask.view(torch.uint8) if kind == "bool" else mask
    return view, kind, (*strides, mask.stride(3))
