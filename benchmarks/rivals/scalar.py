"""Rivals that look at no calibration text: fp8, KIVI and a TurboQuant-like quantizer."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch

from antkv_hf.codecs import ChannelQuantizer, ScalarScales, TokenQuantizer
from antkv_hf.codecs.packing import pack_codes, unpack_codes
from antkv_hf.config import ScalarSpec

from .base import Rival, Stored


class Fp8(Rival):
    """float8 e4m3 with one float32 scale for a layer's keys and one for its values, as transformers' fp8 cache.

    Bits: ``8 + 64 / (kv_heads * n * (Dk + Dv))``. transformers takes the scale of the first prompt and keeps it; here
    it is that of the whole text.
    """

    def encode(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Stored:
        stored = {}
        for name, x in (("keys", keys.float()), ("values", values.float())):
            scale = (x.abs().amax() / torch.finfo(torch.float8_e4m3fn).max).clamp_min(1e-30)
            stored |= {name: (x / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.view(1)}
        return stored

    def decode(self, layer: int, stored: Stored, dims: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (stored[name].float() * stored[f"{name}_scale"] for name in ("keys", "values"))
        return keys, values


class Kivi(Rival):
    """KIVI (arXiv 2402.02750): keys after RoPE by channel over 32 tokens, values by token over 32 channels, asymmetric.

    Bits: ``b + 32 / 32`` for keys (a float16 scale and zero for each channel and 32 tokens) and for values. Its recent
    tokens in full precision are the protocol's window. Codes are those of this library's scalar codecs, which go on
    from here (`AnTKVConfig.preset("ott-2bit")`): no means are taken off and no token is left out.
    """

    def __init__(self, bits: int, group: int = 32):
        super().__init__()
        self.spec = ScalarSpec(bits, group)

    def encode(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Stored:
        scales = ScalarScales.none(keys, values)
        key_codes, found = ChannelQuantizer(self.spec, keys.shape[-1]).encode(keys.float(), scales)
        value_codes = TokenQuantizer(self.spec, values.shape[-1]).encode(values, scales)
        return {"keys": key_codes, "key_scale": found.scale, "key_zero": found.zero, "values": value_codes}

    def decode(self, layer: int, stored: Stored, dims: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = stored["keys"], stored["values"]
        empty = [torch.empty(*keys.shape[:2], 0, dim, device=keys.device) for dim in dims]
        starts = torch.arange(0, keys.shape[2], self.spec.group, dtype=torch.int32, device=keys.device)
        scales = replace(ScalarScales.none(*empty), starts=starts, scale=stored["key_scale"], zero=stored["key_zero"])
        key, value = ChannelQuantizer(self.spec, dims[0]), TokenQuantizer(self.spec, dims[1])
        return key.decode(keys, scales), value.decode(values, scales)


class TurboQuant(Rival):
    """Like TurboQuant (arXiv 2504.19874), its form for the mean square error: ``y = R x``, R a random rotation.

    Every channel of ``sqrt(D) y / |x|`` is nearly N(0, 1) and is coded by the best `bits`-bit scalar table for that;
    the norm is kept in float16. Keys after RoPE. Bits: ``b + 16 / D``. Not here: the paper's second stage (a sketch of
    signs that makes inner products unbiased), and its coding of outlier channels with more bits.
    """

    def __init__(self, bits: int, seed: int = 0):
        super().__init__()
        self.code_bits, self.seed = bits, seed
        self.levels = gaussian_levels(bits)
        self._rotations: dict[tuple, torch.Tensor] = {}

    def encode(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Stored:
        stored = {}
        for name, x in (("keys", keys.float()), ("values", values.float())):
            dim = x.shape[-1]
            norm = x.norm(dim=-1, keepdim=True).clamp(6e-8, torch.finfo(torch.float16).max)
            y = x @ self.rotation(dim, x.device).mT * (math.sqrt(dim) / norm)
            levels = self.levels.to(x.device)
            codes = torch.bucketize(y, (levels[1:] + levels[:-1]) / 2)
            packed = pack_codes(codes.to(torch.uint8), self.code_bits)
            stored |= {name: packed, f"{name}_norm": norm.half()}
        return stored

    def decode(self, layer: int, stored: Stored, dims: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for name, dim in zip(("keys", "values"), dims):
            codes, norm = stored[name], stored[f"{name}_norm"].float()
            y = self.levels.to(codes.device)[unpack_codes(codes, self.code_bits, dim)]
            found.append(y * (norm / math.sqrt(dim)) @ self.rotation(dim, codes.device))
        return found[0], found[1]

    def rotation(self, dim: int, device: torch.device) -> torch.Tensor:
        """R, orthogonal ``(dim, dim)``: the same for all layers and heads."""
        place = (dim, device)
        if place not in self._rotations:
            noise = torch.randn(dim, dim, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
            q, r = torch.linalg.qr(noise)
            self._rotations[place] = (q * r.diagonal().sign()).float().to(device)  # uniform among all rotations
            self.table_bytes = sum(2 * t.numel() for t in self._rotations.values()) + 2 * self.levels.numel()
        return self._rotations[place]


@cache
def gaussian_levels(bits: int, rounds: int = 500) -> torch.Tensor:
    """Levels of the scalar quantizer of N(0, 1) with the least mean square error (Lloyd, Max), ascending float32.

    Each level is the mean of its cell, ``(phi(a) - phi(b)) / (Phi(b) - Phi(a))``; cells end halfway between levels.
    """
    levels = torch.linspace(-2, 2, 1 << bits, dtype=torch.float64)
    ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    for _ in range(rounds):
        edges = torch.cat([ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges)
        levels = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    return levels.float()
