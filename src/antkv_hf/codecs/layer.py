"""The codecs of one layer together with its RoPE: keys are coded as they were before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import AnTKVConfig, ScalarSpec
from ..reference.code_bias import code_bias
from ..rotary import Rotary
from .base import Codec
from .scalar import ChannelQuantizer, ScalarScales, TokenQuantizer
from .vq import VectorQuantizer

_NO_SCALES = "scalar codes mean nothing without their scales"


@dataclass(frozen=True, eq=False)
class LayerCodec:
    """Key and value codec of one layer; `rotary` is None where keys are coded as they come (no RoPE, identity)."""

    key: Codec | ChannelQuantizer
    value: Codec | TokenQuantizer
    rotary: Rotary | None = None
    kernel_tables: dict[torch.dtype, Any] = field(default_factory=dict, repr=False)  # filled by `attention.tables`

    def __deepcopy__(self, memo: dict) -> LayerCodec:
        return self  # immutable: a copied cache shares the tables

    def plain_keys(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys after RoPE ``(batch, kv_heads, n, head_dim)`` at `positions` ``(batch, n)`` -> before RoPE, float32."""
        if self.rotary is None:
            return keys
        return self.rotary.unrotate(keys.float(), positions.unsqueeze(1))

    def rotated_keys(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Inverse of `plain_keys`; `positions` is ``(batch, n)`` or ``(batch, kv_heads, n)``."""
        if self.rotary is None:
            return keys
        return self.rotary.rotate(keys, positions if positions.ndim == 3 else positions.unsqueeze(1))

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, scales: ScalarScales | None = None, excluded=None
    ) -> tuple[torch.Tensor, torch.Tensor, ScalarScales | None]:
        """Codes of `keys` before RoPE and of `values`; for scalar codecs also scales, see `ChannelQuantizer.encode`."""
        if isinstance(self.key, ChannelQuantizer) and isinstance(self.value, TokenQuantizer):
            assert scales is not None, _NO_SCALES
            key_codes, scales = self.key.encode(keys, scales, excluded)
            return key_codes, self.value.encode(values, scales), scales
        assert not isinstance(self.key, ChannelQuantizer) and not isinstance(self.value, TokenQuantizer)
        return self.key.encode(keys), self.value.encode(values), None

    def decode_plain(self, codes: torch.Tensor, scales: ScalarScales | None = None, start: int = 0) -> torch.Tensor:
        """Keys before RoPE that `codes` stand for; with `scales`, those of the tokens from index `start` on."""
        if isinstance(self.key, ChannelQuantizer):
            assert scales is not None, _NO_SCALES
            return self.key.decode(codes, scales, start)
        return self.key.decode(codes)

    def decode_values(self, codes: torch.Tensor, scales: ScalarScales | None = None) -> torch.Tensor:
        """Values that `codes` stand for."""
        if isinstance(self.value, TokenQuantizer):
            assert scales is not None, _NO_SCALES
            return self.value.decode(codes, scales)
        return self.value.decode(codes)

    def weighted_values(
        self, weights: torch.Tensor, codes: torch.Tensor, scales: ScalarScales | None = None
    ) -> torch.Tensor:
        """``weights @ decode_values(codes)``, see `Codec.weighted_sum`."""
        if isinstance(self.value, TokenQuantizer):
            assert scales is not None, _NO_SCALES
            return self.value.weighted_sum(weights, codes, scales)
        return self.value.weighted_sum(weights, codes)

    def decode_keys(
        self, codes: torch.Tensor, positions: torch.Tensor, scales: ScalarScales | None = None, start: int = 0
    ) -> torch.Tensor:
        """Keys after RoPE that the codes at `positions` ``(batch, n)`` stand for."""
        return self.rotated_keys(self.decode_plain(codes, scales, start), positions)

    def key_center(self, scales: ScalarScales | None = None) -> torch.Tensor | None:
        """What is taken off keys before RoPE, broadcastable to ``(batch, kv_heads, n, head_dim)``, if anything is."""
        if scales is not None:
            return scales.center
        mean = getattr(self.key, "mean", None)
        return None if mean is None else mean.unsqueeze(1)

    def code_bias(self, query: torch.Tensor, scale: float) -> torch.Tensor | None:
        """What logits of coded tokens get, for grouped queries after RoPE (`reference.code_bias`); None: nothing."""
        if not isinstance(self.key, VectorQuantizer) or self.key.noise is None:
            return None
        assert self.key.permutation is not None  # `VQTables.check`
        return code_bias(query, self.key.noise, self.key.permutation, scale)

    def memory_bytes(self) -> int:
        """Bytes of all tables, and of what kernels made of them so far; what both share counts once."""
        own = {
            t.untyped_storage().data_ptr()
            for quantizer in (self.key, self.value)
            for t in vars(quantizer).values()
            if isinstance(t, torch.Tensor)
        }
        kernel = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for tables in self.kernel_tables.values()
            for table in tables
            for t in (*table, *(getattr(table, "images", None) or ()))
            if isinstance(t, torch.Tensor)
        }
        made = sum(size for place, size in kernel.items() if place not in own)
        return self.key.memory_bytes() + self.value.memory_bytes() + made


# (layer index, device, kv heads, head size of keys, of values) -> codec
CodecForDevice = Callable[[int, torch.device, int, int, int], LayerCodec]


def scalar_codecs(config: AnTKVConfig, rotary: list[Rotary | None]) -> CodecForDevice:
    """A function that gives a layer's codec on a device, as `AnTKVCodebook.codec_factory` does; needs no codebook."""
    placed: dict[tuple, Rotary] = {}

    def codec(layer: int, device: torch.device, kv_heads: int, key_dim: int, value_dim: int) -> LayerCodec:
        key_spec, value_spec = config.specs(layer)
        assert isinstance(key_spec, ScalarSpec) and isinstance(value_spec, ScalarSpec)
        turn = rotary[layer] if config.rope == "pre" else None
        if turn is not None:  # one object, so one angle table, for all layers
            form = (device, tuple(turn.inv_freq.tolist()), turn.interleaved, turn.scaling)
            turn = placed.setdefault(form, turn.to(device))
        return LayerCodec(ChannelQuantizer(key_spec, key_dim), TokenQuantizer(value_spec, value_dim), turn)

    return codec
