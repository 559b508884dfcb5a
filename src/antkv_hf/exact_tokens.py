"""Tokens that are kept beside their codes: sinks and anchors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import torch

from .codecs import ChannelQuantizer, LayerCodec


@dataclass(frozen=True)
class ExactTokens:
    """Tokens kept beside the codes: sinks (16 bits), anchors (float16, or int8 with a float16 scale a vector).

    Args:
        positions: int32 ``(batch, kv_heads, m)``, index into the sequence, -1 for an empty slot.
        keys, values: ``(batch, kv_heads, m, dim)``. Keys are as after RoPE, except int8 ones: those are before RoPE
            with their center (`LayerCodec.key_center`) taken off, so that a large constant key bias costs no precision.
        key_scale, value_scale: float16 ``(batch, kv_heads, m, 1)``, int8 only.
    """

    positions: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @classmethod
    def store(
        cls, indices, keys, values, dtype: torch.dtype, codec: LayerCodec, offset: torch.Tensor,
        center: torch.Tensor | None,
    ) -> ExactTokens:  # fmt: skip
        """Keeps `keys` (after RoPE) and `values` of the tokens at `indices` ``(batch, kv_heads, m)`` (-1: empty)."""
        positions = indices.to(torch.int32)
        if dtype != torch.int8:
            limit = torch.finfo(dtype).max  # float16 would turn a float32 model's outlier into infinity
            return cls(positions, *(x.clamp(-limit, limit).to(dtype) for x in (keys, values)))
        plain = keys.float()
        if codec.rotary is not None:
            plain = codec.rotary.unrotate(plain, indices - offset.view(-1, 1, 1))
        if center is not None:
            plain = plain - center
        return cls(positions, *_to_int8(plain, values.float()))

    def read(
        self, codec: LayerCodec, offset: torch.Tensor, center: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (after RoPE) and values ``(batch, kv_heads, m, dim)`` as attention uses them."""
        if self.key_scale is None or self.value_scale is None:
            return self.keys, self.values
        plain = self.keys.float() * self.key_scale.float()
        if center is not None:
            plain = plain + center
        keys = codec.rotated_keys(plain, self.positions - offset.view(-1, 1, 1))
        return keys, self.values.float() * self.value_scale.float()

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ExactTokens:
        return self._of(None if t is None else change(t) for t in self.tensors())

    def tensors(self) -> list[torch.Tensor | None]:
        return [getattr(self, f.name) for f in fields(self)]

    def append(self, other: ExactTokens) -> ExactTokens:
        pairs = zip(self.tensors(), other.tensors())
        return self._of(None if a is None or b is None else torch.cat([a, b], 2) for a, b in pairs)

    @classmethod
    def _of(cls, tensors: Iterable[torch.Tensor | None]) -> ExactTokens:
        return cls(*tensors)  # type: ignore[arg-type]  # positions, keys and values are never None

    def crop(self, length: int) -> ExactTokens | None:
        """Without the tokens at positions >= `length`; None if nothing is left."""
        used = self.slots_below(length)
        if not used.any():
            return None
        kept = replace(self, positions=self.positions.masked_fill(self.positions >= length, -1))
        return kept if used.all() else kept.map(lambda t: t[:, :, used])

    def slots_below(self, length: int) -> torch.Tensor:
        """bool ``(m,)``: which slots hold a token before index `length` in any sequence and head."""
        return ((self.positions >= 0) & (self.positions < length)).flatten(0, 1).any(0)

    def select(self, slots: torch.Tensor) -> ExactTokens:
        """The tokens in `slots`, int64 ``(batch, kv_heads, k)``, in that order."""
        return self._of(None if t is None else take(t, slots) for t in self.tensors())

    def memory_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors() if t is not None)


def sink_dtype(dtype: torch.dtype, codec: LayerCodec) -> torch.dtype:
    """In what sinks of a model in `dtype` are kept: 16 bits, but as they come beside codes by channel, which serve
    models with a key bias so large that float16 would round it by more than the codes lose."""
    by_channel = isinstance(codec.key, ChannelQuantizer)
    return torch.float16 if dtype == torch.float32 and not by_channel else dtype


def _to_int8(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if keys.shape == values.shape:  # in one go: decoding encodes a few tokens at a time, and waits for launches
        (key, value), (key_scale, value_scale) = (x.unbind(0) for x in _vectors_to_int8(torch.stack([keys, values])))
    else:
        (key, key_scale), (value, value_scale) = _vectors_to_int8(keys), _vectors_to_int8(values)
    return key, value, key_scale, value_scale


def _vectors_to_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # 6e-8 is float16's smallest positive number: an all-zero vector keeps a scale that can be divided by.
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(6e-8, torch.finfo(torch.float16).max).to(torch.float16)
    return (x / scale.float()).round().clamp_(-127, 127).to(torch.int8), scale


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens `index` ``(batch, kv_heads, m)`` of `x` ``(batch, kv_heads, n)`` or ``(batch, kv_heads, n, dim)``."""
    if x.ndim == 3:
        return x.gather(2, index)
    return x.gather(2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
