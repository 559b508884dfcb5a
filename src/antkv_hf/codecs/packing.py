"""Bit packing of codes: little-endian bit order, each vector padded to whole bytes."""

from __future__ import annotations

import torch


def pack_codes(codes: torch.Tensor, code_bits: int) -> torch.Tensor:
    """Packs integer codes ``(..., n)`` of `code_bits` bits each into uint8 ``(..., ceil(n * code_bits / 8))``.

    Code i occupies bits ``i*code_bits`` to ``(i+1)*code_bits - 1`` of the byte string, low bit first.
    """
    if code_bits == 8:
        return codes.to(torch.uint8)
    bits = (codes.to(torch.int32).unsqueeze(-1) >> torch.arange(code_bits, device=codes.device)) & 1
    bits = bits.flatten(-2)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def unpack_codes(packed: torch.Tensor, code_bits: int, n: int) -> torch.Tensor:
    """Inverse of `pack_codes`: uint8 ``(..., bytes)`` to int64 codes ``(..., n)``."""
    if code_bits == 8:
        return packed.to(torch.int64)
    if 8 % code_bits == 0:  # no code spans two bytes
        shifts = torch.arange(0, 8, code_bits, dtype=torch.uint8, device=packed.device)
        codes = (packed.unsqueeze(-1) >> shifts) & ((1 << code_bits) - 1)
        return codes.flatten(-2)[..., :n].to(torch.int64)
    first_bit = torch.arange(n, device=packed.device) * code_bits
    byte, shift = first_bit // 8, first_bit % 8
    wide = torch.nn.functional.pad(packed, (0, 2)).to(torch.int64)  # a code spans three bytes at most
    word = wide[..., byte] | (wide[..., byte + 1] << 8) | (wide[..., byte + 2] << 16)
    return (word >> shift) & ((1 << code_bits) - 1)
