"""The buffers of one layer and their only owner. Knows tensors and codecs, not transformers.

Every buffer is immutable: a change makes a new tensor, so a `Snapshot` handed to attention stays valid, and buffers
are exactly as large as what they hold. Codes are tiny, so concatenating them every 128 tokens is cheap.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from .anchors import AnchorScore, TokenContext, select_anchors
from .attention.backends import Backend
from .attention.reference_backend import REFERENCE
from .codecs import LayerCodec
from .config import AnTKVConfig

if TYPE_CHECKING:
    from .static_storage import StaticBuffers

ENCODE_BLOCK = 4096  # tokens encoded at a time: bounds the workspace of a long prefill


@dataclass(frozen=True)
class ExactTokens:
    """Tokens kept beside the codes: sinks (16 bits), anchors (float16, or int8 with a float16 scale a vector).

    Args:
        positions: int32 ``(batch, kv_heads, m)``, index into the sequence, -1 for an empty slot.
        keys, values: ``(batch, kv_heads, m, dim)``. Keys are as after RoPE, except int8 ones: those are before RoPE
            with the codec's mean taken off, so that a large constant key bias costs no precision.
        key_scale, value_scale: float16 ``(batch, kv_heads, m, 1)``, int8 only.
    """

    positions: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @classmethod
    def store(cls, indices, keys, values, dtype: torch.dtype, codec: LayerCodec, offset: torch.Tensor) -> ExactTokens:
        """Keeps `keys` (after RoPE) and `values` of the tokens at `indices` ``(batch, kv_heads, m)`` (-1: empty)."""
        positions = indices.to(torch.int32)
        if dtype != torch.int8:
            limit = torch.finfo(dtype).max  # float16 would turn a float32 model's outlier into infinity
            return cls(positions, *(x.clamp(-limit, limit).to(dtype) for x in (keys, values)))
        plain = keys.float()
        if codec.rotary is not None:
            plain = codec.rotary.unrotate(plain, indices - offset.view(-1, 1, 1))
        center = getattr(codec.key, "mean", None)
        if center is not None:
            plain = plain - center.unsqueeze(1)
        return cls(positions, *_to_int8(plain, values.float()))

    def read(self, codec: LayerCodec, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (after RoPE) and values ``(batch, kv_heads, m, dim)`` as attention uses them."""
        if self.key_scale is None or self.value_scale is None:
            return self.keys, self.values
        plain = self.keys.float() * self.key_scale.float()
        center = getattr(codec.key, "mean", None)
        if center is not None:
            plain = plain + center.unsqueeze(1)
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
        positions = self.positions.masked_fill(self.positions >= length, -1)
        used = (positions >= 0).flatten(0, 1).any(0)
        if not used.any():
            return None
        kept = replace(self, positions=positions)
        return kept if used.all() else kept.map(lambda t: t[:, :, used])

    def memory_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors() if t is not None)


def sink_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what sinks of a model in `dtype` are kept: 16 bits."""
    return torch.float16 if dtype == torch.float32 else dtype


def _to_int8(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    scales, rounded = [], []
    for x in (keys, values):
        # 6e-8 is float16's smallest positive number: an all-zero vector keeps a scale that can be divided by.
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(6e-8, torch.finfo(torch.float16).max).to(torch.float16)
        scales.append(scale)
        rounded.append((x / scale.float()).round().clamp_(-127, 127).to(torch.int8))
    return (*rounded, *scales)


@dataclass(frozen=True)
class Snapshot:
    """One layer as attention sees it: coded past, exact tokens, and the exact tail with the current chunk.

    Args:
        key_codes, value_codes: ``(batch, kv_heads, coded, width)`` or None while nothing is coded.
        exact_tokens: sinks and anchors among the coded tokens; `exact_bits` is uint8
            ``(batch, kv_heads, ceil(coded / 8))`` with bit ``t % 8`` of byte ``t // 8`` set for each of them.
        tail_keys, tail_values: ``(batch, kv_heads, tail, dim)`` after RoPE, model dtype.
        offset: int64 ``(batch,)``: a token's RoPE position is its index minus this (left padding).
        static: the whole buffers of a `StaticStorage`, of which codes, exact tokens and tail are views; else None.
    """

    codec: LayerCodec
    key_codes: torch.Tensor | None
    value_codes: torch.Tensor | None
    exact_tokens: tuple[ExactTokens, ...]
    tail_keys: torch.Tensor
    tail_values: torch.Tensor
    offset: torch.Tensor
    exact_bits: torch.Tensor | None = None
    static: StaticBuffers | None = None

    @property
    def coded_length(self) -> int:
        return 0 if self.key_codes is None else self.key_codes.shape[2]

    @property
    def length(self) -> int:
        return self.coded_length + self.tail_keys.shape[2]

    def positions(self, start: int, stop: int) -> torch.Tensor:
        """RoPE positions ``(batch, stop - start)`` of the tokens at indices ``start..stop-1``."""
        return torch.arange(start, stop, device=self.offset.device) - self.offset.unsqueeze(1)

    def unpadded(self) -> torch.Tensor:
        """bool ``(batch, 1, 1, length)``: True from each sequence's first real token on."""
        return (self.positions(0, self.length) >= 0)[:, None, None]

    def decode_keys(self, start: int, stop: int) -> torch.Tensor:
        """Keys after RoPE that the codes of tokens ``start..stop-1`` stand for."""
        assert self.key_codes is not None
        return self.codec.decode_keys(self.key_codes[:, :, start:stop], self.positions(start, stop))

    def block_keys(self, start: int, stop: int) -> torch.Tensor:
        """The same keys seen from the block's first token; `block_query` turns queries to match."""
        assert self.key_codes is not None
        keys = self.codec.key.decode(self.key_codes[:, :, start:stop])
        return keys if self.codec.rotary is None else self.codec.rotary.rotate_block(keys)

    def block_query(self, query: torch.Tensor, start: int) -> torch.Tensor:
        """Queries ``(batch, kv_heads, group, q_len, head_dim)`` after RoPE seen from the block at `start`."""
        if self.codec.rotary is None:
            return query
        return self.codec.rotary.turn_back(query, (start - self.offset).view(-1, 1, 1, 1))

    def exact_mask(self) -> torch.Tensor | None:
        """bool ``(batch, kv_heads, coded)``: True where an exact token stands in for the code; None if nowhere."""
        if not self.exact_tokens or self.exact_bits is None:
            return None
        bits = (self.exact_bits.unsqueeze(-1) >> torch.arange(8, device=self.exact_bits.device)) & 1
        return bits.flatten(-2)[..., : self.coded_length].bool()

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values as plain tensors ``(batch, kv_heads, length, dim)``: correct everywhere, and large."""
        if self.key_codes is None or self.value_codes is None:
            return self.tail_keys, self.tail_values
        dtype = self.tail_keys.dtype
        keys = self.decode_keys(0, self.coded_length).to(dtype, copy=True)
        values = self.codec.value.decode(self.value_codes).to(dtype, copy=True)
        for tokens in self.exact_tokens:
            batch, head, slot = (tokens.positions >= 0).nonzero(as_tuple=True)
            index = tokens.positions[batch, head, slot].long()
            exact_keys, exact_values = tokens.read(self.codec, self.offset)
            keys[batch, head, index] = exact_keys[batch, head, slot].to(dtype)
            values[batch, head, index] = exact_values[batch, head, slot].to(dtype)
        return torch.cat([keys, self.tail_keys], 2), torch.cat([values, self.tail_values], 2)


class LayerStorage:
    """Codes of all coded tokens in order, exact tokens among them, and the exact tail of recent ones.

    `statistic` holds what the anchor score needs of each tail token, ``(batch, kv_heads, tail)`` float32;
    `query_moment` is the running (sum of scale^2 |q|^2 / D, count) a kv head, ``(batch, kv_heads, 2)``.
    """

    _BATCHED = (
        "key_codes", "value_codes", "exact_bits", "tail_keys", "tail_values", "statistic", "query_moment", "offset"
    )  # fmt: skip

    def __init__(
        self, codec: LayerCodec, config: AnTKVConfig, score: AnchorScore | None, keys, values,
        backend: Backend = REFERENCE,
    ):  # fmt: skip
        self.codec, self.config, self.backend = codec, config, backend
        self.score = score if config.anchors.enabled else None
        batch, heads = keys.shape[:2]
        self.key_codes: torch.Tensor | None = None
        self.value_codes: torch.Tensor | None = None
        self.sinks: ExactTokens | None = None
        self.anchors: ExactTokens | None = None
        self.exact_bits: torch.Tensor | None = None
        self.tail_keys, self.tail_values = keys[:, :, :0], values[:, :, :0]
        self.statistic = torch.zeros(batch, heads, 0, device=keys.device)
        self.query_moment = torch.zeros(batch, heads, 2, device=keys.device)
        self.offset = torch.zeros(batch, dtype=torch.int64, device=keys.device)
        self.max_offset = 0  # of the batch, on the host: most prompts have no padding, and asking the device waits

    def __deepcopy__(self, memo: dict) -> LayerStorage:
        return copy.copy(self)  # buffers are never changed in place, so copies may share them

    @property
    def coded_length(self) -> int:
        return 0 if self.key_codes is None else self.key_codes.shape[2]

    @property
    def length(self) -> int:
        return self.coded_length + self.tail_keys.shape[2]

    def snapshot(self) -> Snapshot:
        exact = tuple(tokens for tokens in (self.sinks, self.anchors) if tokens is not None)
        return Snapshot(
            self.codec, self.key_codes, self.value_codes, exact, self.tail_keys, self.tail_values, self.offset,
            self.exact_bits,
        )  # fmt: skip

    @property
    def commits_at_once(self) -> bool:
        """Whether tokens are encoded right after the attention that scored them, or at the start of the next step."""
        return True

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Exchanges `offset`, `query_moment` or `statistic` for a tensor of the same shape."""
        setattr(self, name, tensor)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Adds new tokens ``(batch, kv_heads, n, dim)`` to the tail."""
        self.tail_keys = torch.cat([self.tail_keys, keys], 2)
        self.tail_values = torch.cat([self.tail_values, values], 2)
        if self.score is not None and self.score.term is not None:
            self.statistic = torch.nn.functional.pad(self.statistic, (0, keys.shape[2]))

    def commit(self) -> None:
        """Encodes the tokens that have left the window, in whole chunks, and keeps the best-scored of each chunk."""
        chunk, config = self.config.chunk, self.config
        ready = (self.tail_keys.shape[2] - config.window) // chunk * chunk
        if ready <= 0:
            return
        step = max(chunk, ENCODE_BLOCK // chunk * chunk)
        codes = [self._encode(start, min(start + step, ready)) for start in range(0, ready, step)]
        for name, parts in zip(("key_codes", "value_codes"), zip(*codes)):
            old = getattr(self, name)
            setattr(self, name, torch.cat([*([] if old is None else [old]), *parts], 2))
        self._mark_exact()
        # clone: a slice would keep the whole old tail alive
        self.tail_keys, self.tail_values = self.tail_keys[:, :, ready:].clone(), self.tail_values[:, :, ready:].clone()
        self.statistic = self.statistic[:, :, ready:].clone()

    def _encode(
        self, start: int, stop: int, first: int | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of the tail's tokens ``start..stop-1``; `first`: index of the first tail token, if given."""
        first = self.coded_length if first is None else first
        keys, values = self.tail_keys[:, :, start:stop], self.tail_values[:, :, start:stop]
        indices = first + torch.arange(start, stop, device=keys.device)
        # An index that only the device knows goes into the offset: what counts is their difference.
        origin, offset = (first + start, self.offset) if isinstance(first, int) else (0, self.offset - indices[0])
        coded = self.backend.encode(self.codec, keys, values, origin, offset)
        self._keep_sinks(start, indices, keys, values)
        if self.score is not None:
            positions = indices - self.offset.unsqueeze(1)
            scale = 1.0 if self.codec.rotary is None else self.codec.rotary.scaling
            moment, count = self.query_moment.unsqueeze(2).unbind(-1)  # (batch, kv_heads, 1)
            statistic = None
            if self.score.term is not None:  # if no query was seen (materialised lane), errors alone decide
                statistic = torch.where(count > 0, self.statistic[:, :, start:stop], 1.0)
            context = TokenContext(
                statistic=statistic,
                keys=keys,
                values=values,
                key_error=coded.key_error * scale**2,
                value_error=coded.value_error,
                logit_variance=moment / count.clamp_min(1),
                positions=positions,
            )
            # Padding is never attended to and sinks are exact already: neither may take a place.
            taken = (positions < self.config.anchors.sinks).unsqueeze(1)
            scores = self.score.score(context).masked_fill(taken, float("-inf"))
            best = select_anchors(scores, self.config.anchors.fraction, self.config.chunk)
            # A chunk with fewer candidates than places leaves slots empty; a sink taken again would count twice.
            index = (best + indices[0]).masked_fill(scores.gather(2, best) == float("-inf"), -1)
            dtype = torch.int8 if self.config.anchors.dtype == "int8" else torch.float16
            new = ExactTokens.store(index, *_gather(best, keys, values), dtype, self.codec, self.offset)
            self._keep_anchors(new)
        return coded.key_codes, coded.value_codes

    def _keep_anchors(self, new: ExactTokens) -> None:
        self.anchors = new if self.anchors is None else self.anchors.append(new)

    def _keep_sinks(self, start: int, indices: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        count, first = self.config.anchors.sinks, self.coded_length + start
        if count == 0 or first >= self.max_offset + count:
            return
        wanted = self.offset.unsqueeze(1) + torch.arange(count, device=keys.device)  # (batch, sinks)
        here = (wanted >= indices[0]) & (wanted <= indices[-1])
        if self.max_offset and not here.any():  # a chunk of nothing but padding
            return
        local = (wanted - indices[0]).clamp(0, len(indices) - 1).unsqueeze(1).expand(-1, keys.shape[1], -1)
        index = wanted.masked_fill(~here, -1).unsqueeze(1).expand(-1, keys.shape[1], -1)
        kept = _gather(local, keys, values)
        new = ExactTokens.store(index, *kept, sink_dtype(keys.dtype), self.codec, self.offset)
        self.sinks = new if self.sinks is None else self.sinks.append(new)

    def crop(self, length: int) -> None:
        """Forgets the tokens at indices >= `length`, coded ones included."""
        coded, tail = self.coded_length, max(length - self.coded_length, 0)
        self.tail_keys, self.tail_values = self.tail_keys[:, :, :tail].clone(), self.tail_values[:, :, :tail].clone()
        self.statistic = self.statistic[:, :, :tail].clone()
        if length == 0:  # another prompt may follow, with other padding
            self.offset, self.query_moment = torch.zeros_like(self.offset), torch.zeros_like(self.query_moment)
            self.max_offset = 0
        if length >= coded:
            return
        for name in ("key_codes", "value_codes"):
            codes = getattr(self, name)
            setattr(self, name, codes[:, :, :length].clone() if length else None)
        self.sinks = None if self.sinks is None else self.sinks.crop(length)
        self.anchors = None if self.anchors is None else self.anchors.crop(length)
        self._mark_exact()

    def _mark_exact(self) -> None:
        """Rebuilds `exact_bits` from the positions of sinks and anchors."""
        if self.key_codes is None:
            self.exact_bits = None
            return
        batch, heads, coded = self.key_codes.shape[:3]
        size = -(-coded // 8) * 8
        mask = torch.zeros(batch, heads, size + 8, dtype=torch.uint8, device=self.key_codes.device)
        for tokens in (self.sinks, self.anchors):
            if tokens is not None:  # empty slots (-1) mark the extra byte
                index = tokens.positions.long()
                mask.scatter_(2, index.masked_fill(index < 0, size), 1)
        weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
        self.exact_bits = (mask[..., :size].unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)

    def map_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies `change` (a selection or repetition along dimension 0) to every buffer."""
        for name in self._BATCHED:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, change(tensor))
        self.sinks = None if self.sinks is None else self.sinks.map(change)
        self.anchors = None if self.anchors is None else self.anchors.map(change)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every buffer by name, those of exact tokens as ``sinks.<field>`` and ``anchors.<field>``; no empty ones, and
        not `exact_bits`, which the positions of exact tokens give."""
        named = {name: getattr(self, name) for name in self._BATCHED if name != "exact_bits"}
        for kind in ("sinks", "anchors"):
            if (tokens := getattr(self, kind)) is not None:
                named |= {f"{kind}.{f.name}": getattr(tokens, f.name) for f in fields(ExactTokens)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(
        cls, codec: LayerCodec, config: AnTKVConfig, score: AnchorScore | None, tensors: dict[str, torch.Tensor],
        backend: Backend = REFERENCE,
    ) -> LayerStorage:  # fmt: skip
        """Inverse of `tensors`. Takes them as they are: `storage_check` first what comes from outside."""
        storage = cls(codec, config, score, tensors["tail_keys"], tensors["tail_values"], backend)
        for name in cls._BATCHED:
            setattr(storage, name, tensors.get(name))
        for kind in ("sinks", "anchors"):
            parts: dict[str, Any] = {f.name: tensors.get(f"{kind}.{f.name}") for f in fields(ExactTokens)}
            if parts["positions"] is not None:
                setattr(storage, kind, ExactTokens(**parts))
        storage.max_offset = int(storage.offset.max())
        storage._mark_exact()
        return storage

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of each kind of buffer, as allocated; the bitmap of exact tokens goes with the anchors."""

        def size(*tensors: torch.Tensor | None) -> int:
            return sum(t.numel() * t.element_size() for t in tensors if t is not None)

        anchors, sinks = (0 if t is None else t.memory_bytes() for t in (self.anchors, self.sinks))
        bitmap = size(self.exact_bits)
        return {
            "codes": size(self.key_codes, self.value_codes),
            "anchors": anchors + (bitmap if anchors else 0),
            "sinks": sinks + (0 if anchors else bitmap),
            "window": size(self.tail_keys, self.tail_values),
            "scores": size(self.statistic, self.query_moment, self.offset),
        }


def _gather(index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    def pick(x: torch.Tensor) -> torch.Tensor:
        return x.gather(2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))

    return pick(keys), pick(values)
