"""Notices a cache that is handed to `generate` with a prompt it does not hold.

transformers trusts a user's cache: with a longer, different prompt it silently writes wrong text. The cache itself
never sees token ids, but the frames above it do: the model's `forward` holds those of the keys that `update` is given,
and `generate`, when it marks a user's cache (`cache._is_user_defined = True`), holds those of the next prompt. So
every token is compared, read or generated. Where frames look different (another transformers, embeddings instead of
ids, torch.compile), the guard knows less and stays silent; tests pin both.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch

_FRAMES_TO_GENERATE = 4  # how far above the marking statement generate()'s own frame may be
_FRAMES_TO_MODEL = 60  # how far above `update` the model's forward may be: modules, hooks and wrappers between
_LOOSE = 128  # pieces of ids that may wait on the device before they are brought together on the CPU


def locals_above(function: str, variable: str, limit: int) -> Iterator[Any]:
    """Values of a local `variable` in the frames named `function`, at most `limit` frames above the caller's."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(limit):
        if frame is None:
            return
        # names first: to ask a frame for its locals copies them
        if frame.f_code.co_name == function and variable in frame.f_code.co_varnames:
            yield frame.f_locals.get(variable)
        frame = frame.f_back


class GenerateCall(NamedTuple):
    """What can be seen of a `generate` call that is marking its cache; None, or False, where frames look different.

    Args:
        config: the generation config that it goes by.
        ids: of the prompt ``(batch, n)``.
        mask_length: tokens that its attention mask covers.
        assisted: whether an assistant, or the prompt itself, proposes tokens.
    """

    config: Any | None = None
    ids: torch.Tensor | None = None
    mask_length: int | None = None
    assisted: bool = False

    def left_out(self, held: int) -> int:
        """How many of the `held` tokens of its cache the prompt leaves out: all, beside a mask over them too, or 0."""
        return held if held and self.ids is not None and self.mask_length == held + self.ids.shape[1] else 0


def marking_call() -> GenerateCall:
    """The `generate` call whose frame is above the caller's."""
    limit = _FRAMES_TO_GENERATE
    config = next(locals_above("_prepare_cache_for_generation", "generation_config", limit), None)
    ids = next(locals_above("generate", "input_ids", limit), None)
    kwargs = next(locals_above("generate", "model_kwargs", limit), None)
    mode = next(locals_above("generate", "generation_mode", limit), None)
    mask = kwargs.get("attention_mask") if isinstance(kwargs, dict) else None
    return GenerateCall(
        config,
        ids if isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.numel() else None,
        # a mask of ones is left out by newer transformers, which notes how long it was
        mask.shape[1] if isinstance(mask, torch.Tensor) and mask.ndim == 2 else getattr(config, "_mask_length", None),
        getattr(mode, "value", None) == "assisted_generation",
    )


def check_generate(use_cache: bool | None, tokens: int | None, encoder_decoder: bool) -> None:
    """Raises ValueError for a call of `generate` that would write wrong text with a cache that is given to it alone.

    Args:
        use_cache: of the generation config that the call goes by; None: not known. False: the cache would take the
            whole text at each step.
        tokens: that the cache holds; None: the call is to make a cache itself.
        encoder_decoder: whether the model is one: it would put the encoder's keys into the same cache.
    """
    if encoder_decoder:
        raise ValueError(
            "an encoder-decoder model keeps two caches: give past_key_values=EncoderDecoderCache(AnTKVCache("
            "model.config, config), DynamicCache(config=model.config))"
        )
    if use_cache is False and tokens is None:
        raise ValueError(
            "use_cache=False beside antkv_generate, which decodes with a cache: pass use_cache=True (the model's "
            "generation_config may say False), or leave custom_generate out"
        )
    if use_cache is False:
        raise ValueError(
            f"use_cache=False beside a cache that holds {tokens} tokens: every step would read the whole text into it "
            "again. Pass use_cache=True (the model's generation_config may say False), or generate without a cache"
        )


def check_room(room: int | None, prompt: int, longest: int, told: bool = False) -> bool:
    """Warns before any token is written that a cache of `room` tokens may not last for a text of `longest`.

    Args:
        prompt: its tokens, those that the cache holds included.
        told: leaves the warning out.

    Returns:
        Whether the cache may be too short.

    Raises:
        ValueError: the prompt alone is longer, with the room that the whole text needs.
    """
    needed = longest - 1  # the last token is not read again
    if room is not None and prompt > room:
        raise ValueError(
            f"{prompt} tokens of prompt and up to {longest - prompt} new ones need room for {max(needed, prompt)}, but "
            f"the cache was made with max_length={room}: make it with max_length={max(needed, prompt)}"
        )
    short = room is not None and 0 < prompt <= room < needed
    if short and not told:
        warnings.warn(
            f"AnTKVCache: {prompt} tokens of prompt and up to {longest - prompt} new ones can need room for {needed}, "
            f"but the cache was made with max_length={room}: a text that does not end before stops with an error; make "
            f"it with max_length={needed}, or ask for fewer new tokens",
            stacklevel=4,
        )
    return short


def forward_input_ids(batch: int, length: int) -> torch.Tensor | None:
    """The ids ``(batch, length)`` that the model is reading right now, or None if they cannot be found."""
    if torch.compiler.is_compiling():
        return None
    for ids in locals_above("forward", "input_ids", _FRAMES_TO_MODEL):
        if isinstance(ids, torch.Tensor) and ids.shape == (batch, length):
            return ids
    return None


class PromptGuard:
    """Remembers the tokens that a cache was filled with, from its start on, and compares the next prompt with them."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []  # int64 (batch, n) on the CPU, one behind the other
        self._loose: list[torch.Tensor] = []  # what follows, as it came
        self.length = 0  # known tokens

    def __deepcopy__(self, memo: dict) -> PromptGuard:
        copy = PromptGuard()  # tensors are never changed in place
        copy._blocks, copy._loose, copy.length = list(self._blocks), list(self._loose), self.length
        return copy

    @property
    def ids(self) -> torch.Tensor | None:
        """Known tokens ``(batch, n)``, int64 on the CPU; None if there are none."""
        self._gather()
        if len(self._blocks) > 1:
            self._blocks = [torch.cat(self._blocks, 1)]
        return self._blocks[0] if self._blocks else None

    def _gather(self) -> None:
        """Brings what is loose to the CPU: in one copy, since each waits for the device."""
        if self._loose:
            one_device = len({ids.device for ids in self._loose}) == 1
            parts = self._loose if one_device else [ids.cpu() for ids in self._loose]
            self._blocks.append(torch.cat(parts, 1).cpu())
            self._loose = []

    def read(self, ids: torch.Tensor | None, start: int) -> None:
        """Notes that the cache took the tokens `ids` ``(batch, n)`` (None: not known) after its first `start` ones."""
        self.crop(start)
        if ids is None or start != self.length:
            return
        self._loose.append(ids.detach().clone())
        self.length += ids.shape[1]
        if len(self._loose) >= _LOOSE:
            self._gather()

    def crop(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        if length == 0:
            self.forget()
        elif length < self.length:
            ids = self.ids
            assert ids is not None
            self._blocks, self.length = [ids[:, :length].clone()], length

    def map_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies `change` (a selection or repetition along dimension 0, of a tensor on the CPU)."""
        if (ids := self.ids) is not None:
            self._blocks = [change(ids)]

    def mismatch(self, call: GenerateCall, length: int) -> str | None:
        """Why a cache of `length` tokens cannot continue the prompt of `call`; None if it can, or it is not known."""
        known, ids = self.ids, call.ids
        if length == 0 or ids is None:
            return None
        if call.left_out(length):  # the new tokens follow
            return None
        if known is not None and ids.shape[0] != known.shape[0]:
            if known.shape[0] % ids.shape[0]:
                return f"it holds a batch of {known.shape[0]} and the prompt is a batch of {ids.shape[0]}"
            ids = ids.repeat_interleave(known.shape[0] // ids.shape[0], 0)  # as generate does for beams
        if ids.shape[1] <= length:  # transformers would read the whole prompt again, behind itself
            return f"it holds {length} tokens and the prompt has only {ids.shape[1]}, so none is new"
        if known is not None:  # else it was read as embeddings, for one
            n = min(known.shape[1], length)
            differs = (ids[:, :n].cpu() != known[:, :n]).any(0)
            if differs.any():
                return (
                    f"it holds {length} tokens of another prompt (they differ at token {int(differs.int().argmax())})"
                )
        if call.assisted:  # transformers hands its first step all of the prompt
            return f"it holds {length} tokens, and assisted decoding would read the whole prompt again behind them"
        return None

    def remember(self, ids: torch.Tensor) -> None:
        """Starts over with the tokens `ids` ``(batch, n)``."""
        self._blocks, self._loose, self.length = [ids.detach().cpu().clone()], [], ids.shape[1]

    def forget(self) -> None:
        self._blocks, self._loose, self.length = [], [], 0
