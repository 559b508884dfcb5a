"""One measured perplexity, and a folder of them: rows appended as they finish, none measured twice."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import append_csv, read_csv
from transformers import PreTrainedModel

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig
from antkv_hf.evaluation import Protocol, ProtocolEvaluator, cache_losses, one_shot_losses, real_bits
from antkv_hf.evaluation.baselines import quantized_cache
from antkv_hf.evaluation.perplexity import fast_lane

from .base import Rival
from .tables import table_bytes

_REAL_BITS: dict[tuple, tuple[float, float]] = {}  # W0 and S128 of one cache hold the same


@dataclass(frozen=True)
class Subject:
    """What is measured: a config with its codebook, a rival, or a cache of transformers' by name. None: the model."""

    config: AnTKVConfig | None = None
    codebook: AnTKVCodebook | None = None
    rival: Rival | None = None
    baseline: str | None = None
    query_stride: int = 1

    @property
    def table_bytes(self) -> int:
        if self.rival is not None:
            return self.rival.table_bytes
        return 0 if self.codebook is None else table_bytes(self.codebook)


@dataclass(frozen=True)
class Text:
    """Windows ``(count, window)`` of one text; only the `last` tokens of each count, all but the first if None."""

    name: str
    windows: torch.Tensor
    last: int | None = None

    def key(self) -> dict[str, Any]:
        count, window = self.windows.shape
        return dict(text=self.name, windows=count, window=window, counted=self.last or window - 1)


def measure(model: PreTrainedModel, subject: Subject, protocol: Protocol, text: Text) -> dict[str, Any]:
    """Columns perplexity, bits (an element of the coded tokens, everything stored counted), bits_with_window (of all
    tokens, the exact window in the model's dtype included), table_mb and seconds."""
    start = time.perf_counter()
    size = 8 * torch.empty(0, dtype=model.dtype).element_size()
    n = text.windows.shape[1]
    window = min(protocol.window or 0, n)
    first = text.windows[:1]
    plain = partial(one_shot_losses, model, last=text.last)
    if protocol.name == "FP":
        losses, bits = _losses(model, text, plain), (size, size)
    elif subject.baseline is not None:
        make = quantized_cache(subject.baseline, model.config)
        bits = real_bits(model, first, make)
        losses = _losses(model, text, lambda ids: cache_losses(model, ids, make(), text.last))
    elif subject.rival is not None:
        rival = subject.rival
        rival.stored_bytes = rival.elements = 0
        with ProtocolEvaluator(model, protocol, read_back=rival).active():
            losses = _losses(model, text, plain)
        bits = (rival.bits, (rival.bits * (n - window) + size * window) / n)
    else:
        config = subject.config
        assert config is not None
        config = config.replace(backend="reference", window=protocol.window or config.window)
        book = subject.codebook
        make = partial(AnTKVCache, model.config, config, book)
        known = (id(model), text.name, n, config, None if book is None else book.sha256)
        if known not in _REAL_BITS:
            _REAL_BITS[known] = real_bits(model, first, make)
        bits = _REAL_BITS[known]
        if protocol.one_shot:
            evaluator = ProtocolEvaluator(model, protocol, config, book, query_stride=subject.query_stride)
            with evaluator.active():
                losses = _losses(model, text, plain)
        else:
            with fast_lane(model):
                losses = _losses(model, text, lambda ids: cache_losses(model, ids, make(), text.last))
        if protocol.window == 0:
            bits = (bits[0], bits[0])
    return dict(
        perplexity=round(math.exp(losses.double().mean().item()), 4), bits=round(bits[0], 4),
        bits_with_window=round(bits[1], 4), table_mb=round(subject.table_bytes / 1e6, 3),
        seconds=round(time.perf_counter() - start, 1),
    )  # fmt: skip


@torch.no_grad()
def _losses(model: PreTrainedModel, text: Text, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return torch.cat([run(row.unsqueeze(0).to(model.device)).flatten().cpu() for row in text.windows])


class Table:
    """A CSV of measured rows. A row is known by all its columns but those that `measure` and the environment give."""

    def __init__(self, path: Path, model: PreTrainedModel, model_name: str):
        self.path, self.model = path, model
        self.common = dict(model=model_name, dtype=str(model.dtype).removeprefix("torch."))

    def row(self, what: dict[str, Any], protocol: str, text: Text, subject: Callable[[], Subject]) -> dict[str, str]:
        """The row of `what` (its own columns), measured if it is not there yet; `ratio` is to FP on the same tokens."""
        key = {**self.common, **what, "protocol": protocol, **text.key()}
        if (found := self.find(key)) is not None:
            return found
        made = measure(self.model, subject(), Protocol.parse(protocol), text)
        exact = made["perplexity"]
        if protocol != "FP":
            nothing = {name: "FP" if name == "method" else "" for name in what}
            exact = float(self.row(nothing, "FP", text, Subject)["perplexity"])
        row = {**key, **made, "ratio": round(made["perplexity"] / exact, 5)}
        if (found := self.find(key)) is not None:  # another process may have been faster
            return found
        append_csv(self.path, row, self.model.device)
        said = " ".join(str(value) for value in what.values() if value != "")
        print(f"{said} {protocol} {text.name} {text.windows.shape[1]}: {row['bits']:.3f} bits, "
              f"perplexity {row['perplexity']:.3f} ({row['ratio']:.4f} x), {row['seconds']} s", flush=True)  # fmt: skip
        return {name: str(value) for name, value in row.items()}

    def find(self, key: dict[str, Any]) -> dict[str, str] | None:
        wanted = {name: str(value) for name, value in key.items()}
        return next((row for row in read_csv(self.path) if wanted.items() <= row.items()), None)
