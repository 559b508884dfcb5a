"""The buffers of one layer and their only owner. Knows tensors and codecs, not transformers.

Every buffer is immutable: a change makes a new tensor, so a `Snapshot` handed to attention stays valid, and buffers
are exactly as large as what they hold. Codes are tiny, so concatenating them every 128 tokens is cheap.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from .anchors import AnchorScore, TokenContext, best_tokens, select_anchors, within_budget
from .attention.backends import Backend, Encoded
from .attention.reference_backend import REFERENCE
from .codecs import ChannelQuantizer, LayerCodec, ScalarScales
from .config import AnTKVConfig
from .exact_tokens import ExactTokens, sink_dtype, take
from .snapshot import Snapshot

ENCODE_BLOCK = 8192  # tokens encoded at a time: bounds the workspace of a long prefill, and fills a GPU


class LayerStorage:
    """Codes of all coded tokens in order, exact tokens among them, and the exact tail of recent ones.

    `statistic` holds what the anchor score needs of each tail token, ``(batch, kv_heads, tail)`` float32;
    `query_moment` is the running (sum of scale^2 |q|^2 / D, count) a kv head, ``(batch, kv_heads, 2)``.
    `anchor_scores`, float32 ``(batch, kv_heads, anchors)``, -inf for an empty slot, are kept where a budget may demote
    anchors to their codes, and None elsewhere.
    """

    _BATCHED = (
        "key_codes", "value_codes", "exact_bits", "tail_keys", "tail_values", "statistic", "query_moment", "offset",
        "anchor_scores",
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
        self.anchor_scores: torch.Tensor | None = None
        self.exact_bits: torch.Tensor | None = None
        self.scales = ScalarScales.none(keys, values) if isinstance(codec.key, ChannelQuantizer) else None
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
            self.exact_bits, self.scales,
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
        """Encodes the tokens that have left the window, in whole chunks, and keeps the best-scored of each chunk.

        All or nothing: what fails midway (no memory, Ctrl-C) can be tried again.
        """
        ready = (self.tail_keys.shape[2] - self.config.window) // self.config.chunk * self.config.chunk
        if ready <= 0:
            return
        before = vars(self).copy()  # buffers are never changed in place
        try:
            self._commit(ready)
        except BaseException:
            vars(self).update(before)
            raise

    def _commit(self, ready: int) -> None:
        """Encodes the tail's first `ready` tokens."""
        chunk = self.config.chunk
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
        self, start: int, stop: int, first: int | torch.Tensor | None = None, slot: int | torch.Tensor = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of the tail's tokens ``start..stop-1``; `first`: index of the first tail token, if given; `slot`: the
        first for their anchors, where slots are fixed."""
        first = self.coded_length if first is None else first
        keys, values = self.tail_keys[:, :, start:stop], self.tail_values[:, :, start:stop]
        if isinstance(first, int):
            indices = torch.arange(first + start, first + stop, device=keys.device)
            origin, offset = first + start, self.offset
        else:  # an index that only the device knows goes into the offset: what counts is their difference
            indices = first + torch.arange(start, stop, device=keys.device)
            origin, offset = 0, self.offset - indices[0]
        positions = indices - self.offset.unsqueeze(1)
        # Padding is never attended to and sinks are exact already: neither may take an anchor's place, or widen the
        # range of a group of keys.
        taken = (positions < self.config.anchors.sinks).unsqueeze(1)
        self._learn_scales(start)
        coded = self._code(keys, values, origin, offset, taken)
        self._keep_sinks(start, indices, keys, values)
        if self.score is not None:
            places = self._choose_anchors(start, indices, positions, keys, values, taken, coded, slot)
            if self.scales is not None:  # anchors, now known, do not widen ranges either
                chosen = torch.zeros(*keys.shape[:2], stop - start + 1, dtype=torch.bool, device=keys.device)
                chosen.scatter_(2, places, True)
                coded = self._code(keys, values, origin, offset, taken | chosen[:, :, :-1])
        if self.scales is not None and coded.scales is not None:
            self.scales = self.scales.append(coded.scales, self.coded_length + start)
        return coded.key_codes, coded.value_codes

    def _code(self, keys, values, first: int, offset: torch.Tensor, excluded: torch.Tensor) -> Encoded:
        if self.scales is None:
            return self.backend.encode(self.codec, keys, values, first, offset)
        excluded = excluded.expand(keys.shape[:3])
        return self.backend.encode(self.codec, keys, values, first, offset, self.scales, excluded)

    def _learn_scales(self, start: int) -> None:
        """Takes each sequence's means and deviations from its first chunk, less sinks and counted without padding."""
        first, sinks, chunk = self.coded_length + start, self.config.anchors.sinks, self.config.chunk
        if self.scales is None or first > self.max_offset + sinks:
            return
        count = (sinks // chunk + 1) * chunk
        # behind the padding that chunk may go on in what still stays exact
        here = slice(start, self.max_offset + count - self.coded_length)
        keys, values = self.tail_keys[:, :, here], self.tail_values[:, :, here]
        positions = torch.arange(first, first + keys.shape[2], device=keys.device) - self.offset.unsqueeze(1)
        plain = self.codec.plain_keys(keys, positions).float()
        counted = (positions >= sinks) & (positions < count)
        self.scales = self.scales.learn(plain, values, counted, known=first > self.offset + sinks)

    def _choose_anchors(
        self, start: int, indices, positions, keys, values, taken: torch.Tensor, coded: Encoded,
        slot: int | torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Stores the best of the n tokens that find a place; returns where they are, n for an empty slot:
        ``(batch, kv_heads, slots)``."""
        anchors, score, n = self.config.anchors, self.score, keys.shape[2]
        assert score is not None
        scale = 1.0 if self.codec.rotary is None else self.codec.rotary.scaling
        moment, count = self.query_moment.unsqueeze(2).unbind(-1)  # (batch, kv_heads, 1)
        statistic = None
        if score.term is not None:  # if no query was seen (materialised lane), errors alone decide
            statistic = torch.where(count > 0, self.statistic[:, :, start : start + n], 1.0)
        context = TokenContext(
            statistic=statistic,
            keys=keys,
            values=values,
            key_error=coded.key_error if scale == 1.0 else coded.key_error * scale**2,
            value_error=coded.value_error,
            logit_variance=moment / count.clamp_min(1),
            positions=positions,
        )
        scores = score.score(context).masked_fill(taken, float("-inf"))
        best = select_anchors(scores, anchors.fraction, self.config.chunk)
        best_scores = scores.gather(2, best)
        if anchors.max_tokens:
            held = scores[:, :, :0] if self.anchor_scores is None else self.anchor_scores
            best_scores = within_budget(held, best_scores, n // self.config.chunk, anchors.max_tokens)
        # A chunk with fewer candidates than places leaves slots empty; a sink taken again would count twice.
        empty = best_scores == float("-inf")
        dtype = torch.int8 if anchors.dtype == "int8" else torch.float16
        new = ExactTokens.store(
            (best + indices[0]).masked_fill(empty, -1), take(keys, best), take(values, best), dtype, self.codec,
            self.offset, self.codec.key_center(self.scales),
        )  # fmt: skip
        self._keep_anchors(new, best_scores, slot)
        return best if self.scales is None else best.masked_fill(empty, n)

    def _keep_anchors(self, new: ExactTokens, scores: torch.Tensor, slot: int | torch.Tensor) -> None:
        """Adds anchors with their scores ``(batch, kv_heads, m)``; beyond the budget the worst of all are let go."""
        self.anchors = new if self.anchors is None else self.anchors.append(new)
        budget = self.config.anchors.max_tokens
        if not budget:
            return
        self.anchor_scores = scores if self.anchor_scores is None else torch.cat([self.anchor_scores, scores], 2)
        if self.anchor_scores.shape[2] > budget:  # the worst are demoted to their codes
            left = best_tokens(self.anchor_scores, budget)
            self.anchors, self.anchor_scores = self.anchors.select(left), take(self.anchor_scores, left)

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
        new = ExactTokens.store(
            index,
            take(keys, local),
            take(values, local),
            sink_dtype(keys.dtype, self.codec),
            self.codec,
            self.offset,
            None,
        )
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
        if self.scales is not None:
            self.scales = self.scales.crop(length) if length else ScalarScales.none(self.tail_keys, self.tail_values)
        if self.anchors is not None and self.anchor_scores is not None:
            scores = self.anchor_scores.masked_fill(self.anchors.positions >= length, float("-inf"))
            slots = self.anchors.slots_below(length)
            self.anchor_scores = scores[:, :, slots] if slots.any() else None
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
        exact = [tokens.positions for tokens in (self.sinks, self.anchors) if tokens is not None]
        if exact:
            index = torch.cat(exact, 2).long()
            mask.scatter_(2, index.masked_fill(index < 0, size), 1)  # empty slots (-1) mark the extra byte
        weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
        self.exact_bits = (mask[..., :size].unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)

    def map_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies `change` (a selection or repetition along dimension 0) to every buffer."""
        for name in self._BATCHED:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, change(tensor))
        self.sinks = None if self.sinks is None else self.sinks.map(change)
        self.anchors = None if self.anchors is None else self.anchors.map(change)
        self.scales = None if self.scales is None else self.scales.map(change)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every buffer by name, those of parts as ``sinks.<field>``, ``anchors.<field>`` and ``scales.<field>``; no
        empty ones, and not `exact_bits`, which the positions of exact tokens give."""
        named = {name: getattr(self, name) for name in self._BATCHED if name != "exact_bits"}
        for kind in ("sinks", "anchors"):
            if (tokens := getattr(self, kind)) is not None:
                named |= {f"{kind}.{f.name}": getattr(tokens, f.name) for f in fields(ExactTokens)}
        if self.scales is not None and self.coded_length:
            named |= {f"scales.{name}": tensor for name, tensor in self.scales.tensors().items()}
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
        if "scales.starts" in tensors:
            storage.scales = ScalarScales(**{f.name: tensors[f"scales.{f.name}"] for f in fields(ScalarScales)})
        storage.max_offset = int(storage.offset.max())
        storage._mark_exact()
        return storage

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of each kind of buffer, as allocated; the bitmap of exact tokens goes with the anchors, scales of key
        groups with the codes."""

        def size(*tensors: torch.Tensor | None) -> int:
            return sum(t.numel() * t.element_size() for t in tensors if t is not None)

        anchors, sinks = (0 if t is None else t.memory_bytes() for t in (self.anchors, self.sinks))
        bitmap = size(self.exact_bits)
        groups = 0 if self.scales is None else self.scales.memory_bytes()
        return {
            "codes": size(self.key_codes, self.value_codes) + groups,
            "anchors": anchors + size(self.anchor_scores) + (bitmap if anchors else 0),
            "sinks": sinks + (0 if anchors else bitmap),
            "window": size(self.tail_keys, self.tail_values),
            "scores": size(self.statistic, self.query_moment, self.offset),
        }
