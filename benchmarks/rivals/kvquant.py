"""A KVQuant-like rival (arXiv 2401.18079): non-uniform scalar codes, outliers kept apart as a sparse matrix."""

from __future__ import annotations

import torch

from antkv_hf.calibration.kmeans import weighted_kmeans
from antkv_hf.codecs.packing import pack_codes, unpack_codes
from antkv_hf.rotary import Rotary

from .base import Rival, Stored
from .statistics import Statistics

ROUNDS = 30  # of k-means over numbers
MOST_NUMBERS = 1 << 18  # that the levels of a layer's values are fitted to
MOST_TOKENS = 1 << 14  # that the levels of a channel are fitted to


class KVQuant(Rival):
    """Keys before RoPE with levels of each channel, values by token with levels of the layer, 1% outliers in float16.

    - A channel's ``2**b`` levels are k-means of its calibration samples weighted by squared gradients; numbers beyond
      its 0.5% and 99.5% quantiles are outliers.
    - Of a token's values, those of all kv heads together, the largest and smallest 0.5% are outliers; the range of the
      others is a float16 scale and zero, the levels of ``(v - zero) / scale`` are the layer's.
    - Outliers are float16 numbers with an int16 channel each; of the keys also an int16 count a token.
    - The first token is exact (float16).

    Bits, W = kv_heads * D elements of a token's keys or values, o the share of outliers that were found:
    ``b + 32 o + 16 / W`` for keys, ``b + 32 * 2 m / W + 32 / W`` with ``m = max(1, round(0.005 W))`` for values, and
    ``16 / n`` more for the first token. Indices are narrower than the paper's, and the levels of the keys are of each
    channel, not of the layer: both in its favour. Not here: Q-Norm.
    """

    def __init__(self, tables: dict[str, torch.Tensor], bits: int, rotary: list[Rotary | None], outliers: float = 0.01):
        super().__init__()
        self.tables, self.code_bits, self.rotary, self.outliers = tables, bits, rotary, outliers
        self.table_bytes = sum(2 * t.numel() for t in tables.values())
        self._placed: dict[tuple, torch.Tensor] = {}

    @classmethod
    def learn(cls, statistics: Statistics, bits: int, rotary: list[Rotary | None], seed: int, outliers: float = 0.01):
        """Levels and limits of every layer from calibration statistics."""
        tables = {}
        for layer in statistics.layers:
            key, gradient = statistics.read(("key", "key_grad"), layer)
            step = -(-key.shape[1] // MOST_TOKENS)
            low, high, levels = channel_levels(key[:, ::step], gradient[:, ::step], bits, outliers, seed + 2 * layer)
            value, gradient = statistics.read(("value", "value_grad"), layer)
            of_values = value_levels(value, gradient, bits, outliers, seed + 2 * layer + 1)
            found = {"low": low, "high": high, "key_levels": levels, "value_levels": of_values}
            tables |= {f"layers.{layer}.{name}": t.cpu().contiguous() for name, t in found.items()}
        return cls(tables, bits, rotary, outliers)

    def encode(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Stored:
        device = keys.device
        plain = self._turned(layer, keys.float(), back=True)
        low, high, levels = (self._table(layer, name, device) for name in ("low", "high", "key_levels"))
        middles = (levels[..., 1:] + levels[..., :-1]) / 2  # (kv_heads, D, 2**b - 1)
        codes = (plain.unsqueeze(-1) > middles.unsqueeze(1)).sum(-1)
        outlier = rows_of((plain < low.unsqueeze(1)) | (plain > high.unsqueeze(1)))  # (batch, n, W)
        batch, token, channel = outlier.nonzero(as_tuple=True)
        stored = {
            "key_codes": pack_codes(codes, self.code_bits),
            "key_counts": outlier.sum(-1).to(torch.int16),
            "key_channels": channel.to(torch.int16),
            "key_outliers": to_float16(rows_of(plain)[batch, token, channel]),
        }
        rows = rows_of(values.float())
        zero, scale, outside = token_range(rows, self.outliers)
        zero, scale = to_float16(zero), to_float16(scale).clamp_min(6e-8)
        levels = self._table(layer, "value_levels", device)
        codes = torch.bucketize((rows - zero) / scale, (levels[1:] + levels[:-1]) / 2)
        of_heads = codes.unflatten(-1, (values.shape[1], -1)).transpose(1, 2)
        stored |= {
            "value_codes": pack_codes(of_heads, self.code_bits),
            "value_zero": zero, "value_scale": scale,
            "value_channels": outside.to(torch.int16), "value_outliers": to_float16(rows.gather(-1, outside)),
            "first_key": to_float16(keys[:, :, :1]), "first_value": to_float16(values[:, :, :1]),
        }  # fmt: skip
        return stored

    def decode(self, layer: int, stored: Stored, dims: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        device, dim = stored["key_codes"].device, dims[0]
        levels = self._table(layer, "key_levels", device)
        codes = unpack_codes(stored["key_codes"], self.code_bits, dim)  # (batch, kv_heads, n, D)
        plain = (
            levels.unsqueeze(1).expand(*codes.shape[1:], -1).expand(*codes.shape, -1).gather(-1, codes.unsqueeze(-1))
        )
        rows = rows_of(plain.squeeze(-1)).contiguous()
        width, counts = rows.shape[-1], stored["key_counts"].flatten().long()
        token = torch.arange(counts.numel(), device=device).repeat_interleave(counts)
        rows.view(-1)[token * width + stored["key_channels"].long()] = stored["key_outliers"].float()
        heads = codes.shape[1]
        keys = self._turned(layer, rows.unflatten(-1, (heads, dim)).transpose(1, 2), back=False)

        codes = unpack_codes(stored["value_codes"], self.code_bits, dims[1])
        rows = rows_of(self._table(layer, "value_levels", device)[codes])
        rows = rows * stored["value_scale"].float() + stored["value_zero"].float()
        rows = rows.scatter(-1, stored["value_channels"].long(), stored["value_outliers"].float())
        values = rows.unflatten(-1, (heads, -1)).transpose(1, 2)
        keys, values = keys.clone(), values.clone()
        keys[:, :, :1], values[:, :, :1] = stored["first_key"].float(), stored["first_value"].float()
        return keys, values

    def _turned(self, layer: int, keys: torch.Tensor, back: bool) -> torch.Tensor:
        if (rotary := self.rotary[layer]) is None:
            return keys
        rotary, positions = rotary.to(keys.device), torch.arange(keys.shape[2], device=keys.device)
        return rotary.unrotate(keys, positions) if back else rotary.rotate(keys, positions)

    def _table(self, layer: int, name: str, device: torch.device) -> torch.Tensor:
        place = (layer, name, device)
        if place not in self._placed:
            self._placed[place] = self.tables[f"layers.{layer}.{name}"].to(device)
        return self._placed[place]


def channel_levels(keys: torch.Tensor, gradients: torch.Tensor, bits: int, outliers: float, seed: int):
    """Limits ``(kv_heads, D)`` beyond which a key's number is an outlier, and levels ``(kv_heads, D, 2**bits)``.

    Args:
        keys, gradients: ``(kv_heads, n, D)``, before RoPE.
    """
    heads, n, dim = keys.shape
    ordered = keys.sort(1).values
    cut = int(outliers / 2 * n)
    low, high = ordered[:, cut], ordered[:, n - 1 - cut]
    inside = (keys >= low.unsqueeze(1)) & (keys <= high.unsqueeze(1))
    weights = (gradients.square() * inside).mT.flatten(0, 1)
    weights = weights / weights.mean(-1, keepdim=True).clamp_min(1e-30) + 1e-6 * inside.mT.flatten(0, 1)
    numbers = keys.mT.flatten(0, 1).unsqueeze(-1)
    levels = weighted_kmeans(numbers, weights, 1 << bits, ROUNDS, seed)
    return low, high, levels.squeeze(-1).sort(-1).values.unflatten(0, (heads, dim))


def value_levels(values: torch.Tensor, gradients: torch.Tensor, bits: int, outliers: float, seed: int) -> torch.Tensor:
    """Levels ``(2**bits,)`` of a layer's values ``(kv_heads, n, D)`` brought to their tokens' ranges."""
    rows = rows_of(values.unsqueeze(0))
    zero, scale, outside = token_range(rows, outliers)
    inside = torch.ones_like(rows).scatter_(-1, outside, 0.0)
    weights = (rows_of(gradients.unsqueeze(0)).square() * inside).flatten()
    weights = weights / weights.mean().clamp_min(1e-30) + 1e-6 * inside.flatten()
    numbers = ((rows - zero) / scale.clamp_min(6e-8)).flatten()
    generator = torch.Generator(rows.device).manual_seed(seed)
    some = torch.randint(len(numbers), (min(MOST_NUMBERS, len(numbers)),), generator=generator, device=rows.device)
    levels = weighted_kmeans(numbers[some].view(1, -1, 1), weights[some].view(1, -1), 1 << bits, ROUNDS, seed)
    return levels.flatten().sort().values


def token_range(rows: torch.Tensor, outliers: float):
    """Zero and scale ``(..., 1)`` of each row without its outliers, and the outliers' places ``(..., 2 m)``."""
    count = max(1, round(outliers / 2 * rows.shape[-1]))
    high, low = rows.topk(count + 1, -1), rows.topk(count + 1, -1, largest=False)
    top, bottom = high.values[..., -1:], low.values[..., -1:]
    outside = torch.cat([high.indices[..., :-1], low.indices[..., :-1]], -1)
    return (top + bottom) / 2, (top - bottom) / 2, outside


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``(batch, kv_heads, n, D)`` -> a row of all heads for each token, ``(batch, n, kv_heads * D)``."""
    return x.transpose(1, 2).flatten(2)


def to_float16(x: torch.Tensor) -> torch.Tensor:
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).half()
