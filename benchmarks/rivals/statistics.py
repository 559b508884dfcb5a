"""Calibration statistics that all methods with tables learn from: same model, text and sampled tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from results import locked
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from antkv_hf import AnTKVConfig, calibrate
from antkv_hf.cache.model_rotary import model_rotary
from antkv_hf.calibration.run import _sampled_positions
from antkv_hf.calibration.work_folder import WorkFolder
from antkv_hf.evaluation import AttentionCall, Protocol, ProtocolEvaluator
from antkv_hf.evaluation.windowed import exact_with_lse
from antkv_hf.reference.attention import Visibility, grouped
from antkv_hf.reference.scores import accumulated_attention_term, anchor_score_term, column_statistic
from antkv_hf.texts import TextMix, mix_windows

COLUMN_TERMS = {"anchor_score": anchor_score_term, "accumulated_attention": accumulated_attention_term}


class Sizes(NamedTuple):
    """What `antkv_hf.calibrate` takes: tokens of text, tokens of a window, sampled tokens, rounds of k-means."""

    tokens: int = 262144
    window: int = 2048
    samples: int = 131072
    iterations: int = 10
    seed: int = 0


class Statistics:
    """Keys before RoPE, values, gradients and attention weights of the sampled tokens of a calibration run.

    The first use collects them by `antkv_hf.calibrate` at one bit (whose tables fall out of it); other processes with
    the same folder wait for it.

    Args:
        texts: sources with shares, as for ``antkv calibrate``.
        folder: where they are kept; another run with the same settings goes on from there.
    """

    def __init__(self, model: PreTrainedModel, tokenizer, texts: Sequence[str], folder: Path, sizes: Sizes):
        self.model, self.tokenizer, self.folder, self.sizes = model, tokenizer, folder, sizes
        self.mix = TextMix.from_sources(list(texts))
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "collecting.lock"):
            tokens, window, samples, iterations, seed = sizes
            self.codebook = calibrate(
                model, tokenizer, self.mix, AnTKVConfig.preset("1bit"), tokens=tokens, window=window, samples=samples,
                iterations=iterations, seed=seed, work_dir=folder,
            )  # fmt: skip
        settings = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["settings"]
        self.windows, self.layers = settings["tokens"] // settings["window"], settings["layers"]
        self._shards = WorkFolder(folder, settings, {"reader": "benchmarks"})
        self.hash = self._shards.hash
        self.key = f"{self.hash}-{iterations}rounds"  # of all tables that are learned from them

    def read(self, names: tuple[str, ...], layer: int, windows: int | None = None) -> list[torch.Tensor]:
        """Fields of `LayerStatistics` of one layer, of the first `windows` windows; tokens along axis 1."""
        return self._shards.read(names, layer, windows or self.windows, self.model.device)

    def positions(self, windows: int | None = None) -> torch.Tensor:
        """Position of each sampled token in its window ``(tokens,)``, in the order of `read`."""
        kept = _sampled_positions(self.windows, self.sizes.window, self.sizes.samples, self.sizes.seed)
        return kept[: windows or self.windows].flatten().to(self.model.device)

    def column_weights(self, name: str, layer: int, windows: int | None = None) -> torch.Tensor:
        """What the sampled tokens received from the later queries of their window ``(kv_heads, tokens)`` float32.

        Args:
            name: ``anchor_score`` (AnTKV's AnS) or ``accumulated_attention``.
        """
        path = self.folder / f"columns-{self.hash}.safetensors"
        with locked(self.folder / "columns.lock"):
            if not path.exists():
                self._collect_columns(path)
        with safe_open(path, "pt") as file:
            found = file.get_tensor(f"layers.{layer}.{name}")
        kept = (windows or self.windows) * found.shape[1] // self.windows
        return found[:, :kept].to(self.model.device)

    def _collect_columns(self, path: Path) -> None:
        sizes = self.sizes
        ids = mix_windows(self.tokenizer, self.mix, sizes.window, self.windows, sizes.seed)
        kept = self.positions().view(self.windows, -1)
        found: dict[str, list[torch.Tensor]] = {}
        with torch.no_grad():
            for i, row in enumerate(ids):
                recorder = ColumnRecorder(kept[i])
                with ProtocolEvaluator(self.model, Protocol.parse("W0"), read_back=recorder).active():
                    self.model(row.unsqueeze(0).to(self.model.device), use_cache=False, logits_to_keep=1)
                for name, weights in recorder.found.items():
                    found.setdefault(name, []).append(weights.cpu())
        part = path.with_suffix(".part")
        save_file({name: torch.cat(parts, 1) for name, parts in found.items()}, part)
        part.replace(path)


class ColumnRecorder:
    """A read-back that changes nothing and keeps what the tokens at `kept` ``(m,)`` received."""

    def __init__(self, kept: torch.Tensor):
        self.kept, self.found = kept, {}  # type: ignore[var-annotated]

    def __call__(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        n = call.keys.shape[2]
        out, lse = exact_with_lse(call.query, call.keys, call.values, call.scale, call.softcap, call.sink_logit)
        for name, term in COLUMN_TERMS.items():
            received = column_statistic(
                term, grouped(call.query, call.keys.shape[1]), call.keys, call.values, out, lse,
                Visibility(None, n > 1, n, n), 0, call.scale, call.softcap,
            )  # fmt: skip
            self.found[f"layers.{call.layer}.{name}"] = received[0, :, self.kept]
        return call.keys.float(), call.values.float()


def rotaries(model: PreTrainedModel) -> list:
    """RoPE of every layer of a model, None where there is none."""
    return model_rotary(model.config)
