"""Storage of one layer in buffers of fixed size, changed in place, with its lengths on the device as well.

A decode step then starts the same kernels on the same addresses every time and never waits for the host, so that it
can be captured in a CUDA graph (`graphs`). The host knows the lengths too: a chunk is encoded whenever window and chunk
are full, whatever the tokens are.

A prompt's chunk is held exactly beside the buffers until it is encoded, as in `LayerStorage`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from .anchors import AnchorScore, anchors_per_chunk
from .attention.backends import Backend
from .attention.reference_backend import REFERENCE
from .codecs import LayerCodec
from .config import AnTKVConfig, ScalarSpec
from .exact_tokens import ExactTokens, sink_dtype
from .snapshot import Snapshot, StaticBuffers
from .storage import ENCODE_BLOCK, LayerStorage
from .storage_check import code_form

ALIGNMENT = 64  # the capacity is a multiple of as many coded tokens


def size_obstacle(config: AnTKVConfig) -> str | None:
    """Why buffers of fixed size cannot hold what `config` keeps; None if they can."""
    if isinstance(config.key, ScalarSpec):
        return f"a cache of scalar codes ({config.key}) grows, scales of its groups with it"
    if config.anchors.max_tokens:
        return f"anchors.max_tokens={config.anchors.max_tokens} lets anchors go, which fixed slots do not"
    return None


class Counts(NamedTuple):
    """What is in use, as the host knows it: coded tokens, tail tokens, slots of anchors."""

    coded: int = 0
    tail: int = 0
    slots: int = 0


class _Used:
    """The part in use of a buffer, or what a prompt holds beside it: a view, made anew when lengths have changed."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, storage: StaticStorage, owner: type | None = None) -> Any:
        return storage._parts()[self.name]

    def __set__(self, storage: StaticStorage, value: Any) -> None:
        raise AttributeError(f"{self.name} of a StaticStorage is changed in place")


class StaticStorage(LayerStorage):
    """`LayerStorage` of up to `max_length` tokens in preallocated buffers.

    Same codes, anchors and numbers; tokens that have left the window are encoded at the start of the next step instead
    of the end of this one. The batch keeps its size.

    Args:
        max_length: tokens of a sequence that there is room for. The others: as `LayerStorage`'s.

    Raises:
        ValueError: by `commit` and `encode_chunk`, with nothing changed: crops have left too few slots for anchors.
    """

    key_codes: Any = _Used()
    value_codes: Any = _Used()
    exact_bits: Any = _Used()
    tail_keys: Any = _Used()
    tail_values: Any = _Used()
    statistic: Any = _Used()
    sinks: Any = _Used()
    anchors: Any = _Used()

    def __init__(
        self, codec: LayerCodec, config: AnTKVConfig, score: AnchorScore | None, keys, values,
        backend: Backend = REFERENCE, *, max_length: int,
    ):  # fmt: skip
        self.codec, self.config, self.backend, self.max_length = codec, config, backend, max_length
        self.score = score if config.anchors.enabled else None
        self.scales = self.anchor_scores = None  # see `size_obstacle`
        batch, heads = keys.shape[:2]
        place = dict(device=keys.device)
        self.query_moment = torch.zeros(batch, heads, 2, **place)
        self.offset = torch.zeros(batch, dtype=torch.int64, **place)
        self.max_offset = 0
        chunk, sinks = config.chunk, config.anchors.sinks
        capacity = max(max_length - config.window, chunk)
        capacity = -(-capacity // ALIGNMENT) * ALIGNMENT
        self.slots_per_chunk = 0 if self.score is None else anchors_per_chunk(config.anchors.fraction, chunk)
        # More slots than sinks: by that kernels tell the two apart.
        slots = max(self.slots_per_chunk * -(-capacity // chunk), sinks + 1)
        rows = config.window + chunk

        def codes(of, like: torch.Tensor) -> torch.Tensor:
            width, dtype = code_form(of, like)
            return torch.zeros(batch, heads, capacity, width, dtype=dtype, **place)

        def exact(slots: int, dtype: torch.dtype) -> ExactTokens:
            parts = [torch.zeros(batch, heads, slots, x.shape[3], dtype=dtype, **place) for x in (keys, values)]
            if dtype == torch.int8:
                parts += [torch.zeros(batch, heads, slots, 1, dtype=torch.float16, **place) for _ in range(2)]
            return ExactTokens(torch.full((batch, heads, slots), -1, dtype=torch.int32, **place), *parts)

        observed = self.score is not None and self.score.term is not None
        anchor_dtype = torch.int8 if config.anchors.dtype == "int8" else torch.float16
        self.buffers = StaticBuffers(
            key_codes=codes(codec.key, keys),
            value_codes=codes(codec.value, values),
            sinks=exact(sinks, sink_dtype(keys.dtype, codec)) if sinks else None,
            anchors=exact(slots, anchor_dtype) if self.slots_per_chunk else None,
            exact_bits=torch.zeros(batch, heads, capacity // 8, dtype=torch.uint8, **place),
            tail_keys=torch.zeros(batch, heads, rows, keys.shape[3], dtype=keys.dtype, **place),
            tail_values=torch.zeros(batch, heads, rows, values.shape[3], dtype=values.dtype, **place),
            statistic=torch.zeros(batch, heads, rows if observed else 0, **place),
            lengths=torch.zeros(3, dtype=torch.int32, **place),
        )
        self._encoding = torch.tensor([chunk, -chunk, self.slots_per_chunk], dtype=torch.int32, **place)
        self._counts = Counts()
        self._beside: tuple[torch.Tensor, ...] | None = None  # keys, values and statistic of a prompt's tail
        self._cached: dict[str, Any] | None = None
        self._planned: int | None = None
        self.set_counts(self._counts)

    # ------------------------------------------------------------------------------------------------------- lengths

    def __deepcopy__(self, memo: dict) -> StaticStorage:
        """Buffers are changed in place, so a copy has its own."""
        clone = copy.copy(self)
        shared = {"codec", "config", "backend", "score"}
        clone.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in shared})
        return clone

    @property
    def counts(self) -> Counts:
        return self._counts

    @property
    def coded_length(self) -> int:
        return self._counts.coded

    @property
    def length(self) -> int:
        return self._counts.coded + self._counts.tail

    @property
    def planned(self) -> int | None:
        """Coded tokens that the next step is to be planned for, if it is captured: see `StaticBuffers`."""
        return self._planned

    @planned.setter
    def planned(self, tokens: int | None) -> None:
        self._planned, self._cached = tokens, None

    def note_counts(self, counts: Counts) -> None:
        """Sets the lengths on the host, to what the device has by now."""
        self._counts, self._cached = counts, None

    def set_counts(self, counts: Counts) -> None:
        """Sets the lengths on host and device."""
        self.note_counts(counts)
        sinks = self.buffers.sinks
        slots = sinks.positions.shape[2] if self.buffers.anchors is None and sinks is not None else counts.slots
        self.buffers.lengths.copy_(torch.tensor([counts.coded, counts.tail, slots], dtype=torch.int32))

    @property
    def must_encode(self) -> bool:
        """Whether a chunk has left the window: it is encoded before the next token comes."""
        return self._counts.tail >= self.config.window + self.config.chunk

    @property
    def commits_at_once(self) -> bool:
        return self._beside is not None

    def _parts(self) -> dict[str, Any]:
        if self._cached is not None:
            return self._cached
        (coded, tail, slots), b = self._counts, self.buffers
        keys, values, statistic = self._beside or (
            b.tail_keys[:, :, :tail], b.tail_values[:, :, :tail], b.statistic[:, :, :tail]
        )  # fmt: skip
        self._cached = {
            "key_codes": b.key_codes[:, :, :coded] if coded else None,
            "value_codes": b.value_codes[:, :, :coded] if coded else None,
            "exact_bits": b.exact_bits[:, :, : -(-coded // 8)] if coded else None,
            "tail_keys": keys,
            "tail_values": values,
            "statistic": statistic,
            "sinks": b.sinks if coded else None,
            "anchors": b.anchors.map(lambda t: t[:, :, :slots]) if b.anchors is not None and slots else None,
        }
        return self._cached

    def snapshot(self) -> Snapshot:
        parts = self._parts()
        if "snapshot" not in parts:
            held, padded = self._beside is None, self.max_offset > 0
            static = replace(self.buffers, holds_tail=held, padded=padded, planned=self._planned)
            parts["snapshot"] = replace(super().snapshot(), static=static)
        return parts["snapshot"]

    # ------------------------------------------------------------------------------------------------------ new tokens
    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Adds new tokens ``(batch, kv_heads, n, dim)``: one behind the tail in place, more beside the buffers."""
        b, (coded, tail, slots) = self.buffers, self._counts
        if keys.shape[2] == 1 and self._beside is None and tail < b.tail_keys.shape[2]:
            self.backend.append_token(keys, values, b.tail_keys, b.tail_values, b.lengths)
            self.note_counts(Counts(coded, tail + 1, slots))
            return
        statistic = self.statistic
        if b.statistic.shape[2]:
            statistic = torch.nn.functional.pad(statistic, (0, keys.shape[2]))
        self._hold_beside(torch.cat([self.tail_keys, keys], 2), torch.cat([self.tail_values, values], 2), statistic)

    def _hold_beside(self, *parts: torch.Tensor) -> None:
        self._beside = parts
        self.note_counts(self._counts._replace(tail=parts[0].shape[2]))

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        if name == "statistic" and self._beside is not None:
            self._hold_beside(*self._beside[:2], tensor)
        else:
            getattr(self, name).copy_(tensor)

    def commit(self) -> None:
        """Encodes the chunks that have left the window, and moves what a prompt has left into the buffers."""
        if self._beside is None:
            while self.must_encode:
                self.encode_chunk()
            return
        chunk, config = self.config.chunk, self.config
        coded, tail, slots = self._counts
        ready = max((tail - config.window) // chunk * chunk, 0)
        new_slots = ready // chunk * self.slots_per_chunk
        self._require_slots(new_slots)
        step = max(chunk, ENCODE_BLOCK // chunk * chunk)
        with self._all_or_nothing():
            for start in range(0, ready, step):
                stop = min(start + step, ready)
                slot = slots + start // chunk * self.slots_per_chunk
                self._write_codes(coded + start, self._encode(start, stop, coded, slot))
            rest = [t[:, :, ready:] for t in self._beside]
            for buffer, part in zip((self.buffers.tail_keys, self.buffers.tail_values), rest):
                buffer[:, :, : part.shape[2]] = part
            self.buffers.statistic.zero_()
            self.buffers.statistic[:, :, : rest[2].shape[2]] = rest[2]
            self._beside = None
            self.set_counts(Counts(coded + ready, tail - ready, slots + new_slots))

    def encode_chunk(self) -> None:
        """Encodes the tail's first chunk: the same work on the same buffers every time, and no wait for the host."""
        (coded, tail, slots), chunk, b = self._counts, self.config.chunk, self.buffers
        self._require_slots(self.slots_per_chunk)
        first = b.lengths[0].long()
        with self._all_or_nothing():
            self._write_codes(first, self._encode(0, chunk, first, b.lengths[2]))
            moved = [t[:, :, chunk:].clone() for t in (b.tail_keys, b.tail_values)]  # they may overlap
            statistic = torch.nn.functional.pad(b.statistic[:, :, chunk:], (0, min(chunk, b.statistic.shape[2])))
            for buffer, part in zip((b.tail_keys, b.tail_values), moved):
                buffer[:, :, :-chunk] = part
            b.statistic.copy_(statistic)
            b.lengths.add_(self._encoding)
            self.note_counts(Counts(coded + chunk, tail - chunk, slots + self.slots_per_chunk))

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Inside, new exact tokens are taken back if something fails, so that a second try finds their bits unset."""
        try:
            yield
        except BaseException:
            if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):  # then nothing was done
                b, (coded, _, slots) = self.buffers, self._counts
                if b.anchors is not None:
                    b.anchors.positions[:, :, slots:] = -1
                if b.sinks is not None:
                    b.sinks.positions.masked_fill_(b.sinks.positions >= coded, -1)
                self._mark_all()
            raise

    def _write_codes(self, first: int | torch.Tensor, codes: tuple[torch.Tensor, torch.Tensor]) -> None:
        index = first + torch.arange(codes[0].shape[2], device=self.offset.device)
        for buffer, new in zip((self.buffers.key_codes, self.buffers.value_codes), codes):
            buffer.index_copy_(2, index, new)

    def _keep_anchors(self, new: ExactTokens, scores: torch.Tensor, slot: int | torch.Tensor) -> None:
        buffers = self.buffers.anchors
        assert buffers is not None
        places = slot + torch.arange(new.positions.shape[2], device=self.offset.device)
        for buffer, part in zip(buffers.tensors(), new.tensors()):
            if buffer is not None and part is not None:
                buffer.index_copy_(2, places, part)
        self._mark(new.positions)

    def _keep_sinks(self, start: int, indices: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        buffers = self.buffers.sinks
        if buffers is None:
            return
        wanted = self.offset.unsqueeze(1) + torch.arange(buffers.positions.shape[2], device=keys.device)
        local = (wanted - indices[0]).unsqueeze(1).expand(-1, keys.shape[1], -1)  # (batch, kv_heads, sinks)
        here = (local >= 0) & (local < keys.shape[2])
        place = local.clamp(0, keys.shape[2] - 1).unsqueeze(-1)
        kept_keys, kept_values = (x.gather(2, place.expand(*local.shape, x.shape[3])) for x in (keys, values))
        index = (local + indices[0]).masked_fill(~here, -1)
        new = ExactTokens.store(index, kept_keys, kept_values, buffers.keys.dtype, self.codec, self.offset, None)
        for buffer, part in zip(buffers.tensors(), new.tensors()):
            if buffer is not None and part is not None:
                buffer.copy_(torch.where(here if part.ndim == 3 else here.unsqueeze(-1), part, buffer))
        self._mark(new.positions)

    def _mark(self, positions: torch.Tensor) -> None:
        """Sets the bits of tokens that have just become exact (-1: none): their bits are 0, so adding sets them."""
        index = positions.long()
        bit = torch.where(index >= 0, 1 << (index % 8), 0).to(torch.uint8)
        self.buffers.exact_bits.scatter_add_(2, index.clamp_min(0) // 8, bit)

    def _mark_all(self) -> None:
        """Rebuilds the bits from the positions of sinks and anchors."""
        self.buffers.exact_bits.zero_()
        for tokens in (self.buffers.sinks, self.buffers.anchors):
            if tokens is not None:
                self._mark(tokens.positions)

    def check_slots(self, new_tokens: int) -> None:
        """Raises ValueError, with nothing changed, if they push out of the window chunks whose anchors have no slot."""
        tail, config = self._counts.tail, self.config
        tail += new_tokens if new_tokens > 1 else 0  # one alone is added after what is ready has been encoded
        self._require_slots(max((tail - config.window) // config.chunk, 0) * self.slots_per_chunk)

    def _require_slots(self, new: int) -> None:
        anchors, used = self.buffers.anchors, self._counts.slots
        if anchors is not None and used + new > anchors.positions.shape[2]:
            raise ValueError(
                f"{used} slots of anchors are in use and {new} more are needed, but max_length={self.max_length} has "
                f"{anchors.positions.shape[2]}: crop so often only in a cache without max_length"
            )

    # ------------------------------------------------------------------------------------------------ other operations
    def crop(self, length: int) -> None:
        """Forgets the tokens at indices >= `length`, coded ones included."""
        coded, _, slots = self._counts
        b, tail = self.buffers, max(length - coded, 0)
        if self._beside is not None and tail:
            self._hold_beside(*(t[:, :, :tail] for t in self._beside))
            return
        self._beside = None
        b.statistic[:, :, tail:] = 0
        if length == 0:  # another prompt may follow, with other padding
            self.offset.zero_()
            self.query_moment.zero_()
            self.max_offset = 0
        if length < coded:
            for tokens in (b.sinks, b.anchors):
                if tokens is not None:
                    tokens.positions.masked_fill_(tokens.positions >= length, -1)
            slots = self._close_gaps()
            self._mark_all()
            coded = length
        self.set_counts(Counts(coded, tail, slots))

    def _close_gaps(self) -> int:
        """Moves the anchors of every sequence and kv head to its first slots; how many slots are in use then."""
        anchors = self.buffers.anchors
        if anchors is None:
            return 0
        order = (anchors.positions < 0).to(torch.uint8).argsort(dim=-1, stable=True)
        for tensor in anchors.tensors():
            if tensor is not None:
                index = order if tensor.ndim == 3 else order.unsqueeze(-1).expand_as(tensor)
                tensor.copy_(tensor.gather(2, index))
        return int((anchors.positions >= 0).sum(-1).max())

    def map_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies `change` (a selection along dimension 0) to every buffer.

        Raises:
            ValueError: if it changes the size of the batch.
        """
        self.check_batch(change(self.offset).shape[0])
        for tensor in (*self.buffers.tensors(), self.offset, self.query_moment):
            tensor.copy_(change(tensor))
        if self._beside is not None:
            self._hold_beside(*(change(t) for t in self._beside))

    def check_batch(self, sequences: int) -> None:
        """Raises ValueError if they are not as many as the buffers are for."""
        if sequences != (batch := self.offset.shape[0]):
            raise ValueError(
                f"a cache with max_length keeps its batch of {batch}, but {sequences} sequences are asked for: leave "
                "max_length out (beams and num_return_sequences on a filled cache need that)"
            )

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of each kind that are in use, and under ``reserved`` those that are allocated for tokens to come."""
        used = super().memory_bytes()
        held = [*self.buffers.tensors(), self.buffers.lengths, self.offset, self.query_moment, *(self._beside or ())]
        return {**used, "reserved": sum(t.numel() * t.element_size() for t in held) - sum(used.values())}
