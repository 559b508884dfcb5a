"""The folder of a calibration run: shards of statistics, finished tables, and what they belong to. Resumable."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..codecs import VQTables
from ..config import VQSpec
from .statistics import LayerStatistics

_GRADIENTS = ("key_grad", "value_grad")


def digest(settings: dict[str, Any]) -> str:
    """Hash of JSON-ready settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class WorkFolder:
    """``manifest.json``, ``windows/<i>.safetensors``, ``tables-<hash>/<layer>-<role>-<spec>.safetensors`` and
    ``sensitivity-<hash>/<layer>.json``.

    Every file appears by `os.replace`, so what exists is complete; each carries the hash of its run's settings. Tables
    of several specs can be learned from the same statistics.

    Args:
        path: the folder, made if missing.
        settings: all that decides the statistics, JSON-ready.
        table_settings: all that decides the tables besides, but for their specs.

    Raises:
        ValueError: the folder holds a run of other settings; the message names the first that differs.
    """

    def __init__(self, path: Path, settings: dict[str, Any], table_settings: dict[str, Any]):
        self.path, self.hash = path, digest(settings)
        self.table_hash = digest({**table_settings, "statistics": self.hash})
        self._windows, self._tables = path / "windows", path / f"tables-{self.table_hash}"
        manifest = path / "manifest.json"
        if known := manifest.exists():
            self._compare(manifest, settings)
        self._windows.mkdir(parents=True, exist_ok=True)
        self._tables.mkdir(exist_ok=True)
        if known:
            return
        save_json({"hash": self.hash, "settings": settings}, manifest)

    @staticmethod
    def _compare(manifest: Path, settings: dict[str, Any]) -> None:
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest} is damaged: remove the folder {manifest.parent} and start again") from error
        for name in sorted(set(found) | set(settings)):
            if found.get(name) != settings.get(name):
                raise ValueError(
                    f"work_dir {manifest.parent} holds a calibration with {name} {found.get(name)!r}, this one has "
                    f"{settings.get(name)!r}: give another work_dir, or remove the folder to start again"
                )

    # ---------------------------------------------------------------- statistics
    def has_window(self, index: int) -> bool:
        return _is_valid(self._window(index), self.hash)

    def save_window(self, index: int, layers: dict[int, LayerStatistics]) -> None:
        """Writes one window's statistics: keys and values float16 where they fit, gradients bfloat16."""
        tensors = {}
        for layer, statistics in layers.items():
            for field in fields(LayerStatistics):
                tensor = getattr(statistics, field.name)
                if field.name in _GRADIENTS:
                    tensor = tensor.to(torch.bfloat16)
                elif tensor.is_floating_point():
                    tensor = to_half(tensor)
                tensors[f"layers.{layer}.{field.name}"] = tensor.contiguous()
        _save(tensors, self._window(index), {"hash": self.hash})

    def read(self, names: tuple[str, ...], layer: int, windows: int, device: torch.device) -> list[torch.Tensor]:
        """Fields of `LayerStatistics` of one layer over all windows, float32 (masks bool), tokens along axis 1."""
        parts: list[list[torch.Tensor]] = [[] for _ in names]
        for index in range(windows):
            with safe_open(self._window(index), "pt") as file:
                for part, name in zip(parts, names, strict=True):
                    tensor = file.get_tensor(f"layers.{layer}.{name}")
                    part.append(tensor.to(device, torch.float32 if tensor.is_floating_point() else None))
        return [torch.cat(part, 1) for part in parts]

    # ---------------------------------------------------------------- tables
    def has_tables(self, layer: int, role: str, spec: VQSpec) -> bool:
        return _is_valid(self._tables_file(layer, role, spec), self.table_hash)

    def save_tables(self, layer: int, role: str, spec: VQSpec, tables: VQTables, error: float) -> None:
        tensors = {name: t.contiguous() for name, t in tables.tensors().items()}
        metadata = {"hash": self.table_hash, "error": json.dumps(error)}
        _save(tensors, self._tables_file(layer, role, spec), metadata)

    def read_tables(self, layer: int, role: str, spec: VQSpec) -> tuple[VQTables, float]:
        """Tables of a layer's keys or values, and their relative weighted error."""
        with safe_open(self._tables_file(layer, role, spec), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            return VQTables(**tensors), json.loads(file.metadata()["error"])

    # ---------------------------------------------------------------- sensitivity
    def costs_file(self, settings: dict[str, Any], layer: int) -> Path:
        """Where a layer's losses, measured with `settings`, are kept."""
        folder = self.path / f"sensitivity-{digest({**settings, 'tables': self.table_hash})}"
        folder.mkdir(exist_ok=True)
        return folder / f"{layer:04d}.json"

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _window(self, index: int) -> Path:
        return self._windows / f"{index:06d}.safetensors"

    def _tables_file(self, layer: int, role: str, spec: VQSpec) -> Path:
        return self._tables / f"{layer:04d}-{role}-{spec}.safetensors"


def check_shared(path: Path, rank: int) -> None:
    """Raises ValueError if process `rank` does not see the folder that process 0 has begun."""
    if not (path / "manifest.json").exists():
        raise ValueError(
            f"process {rank} does not see the work_dir {path} of process 0: give one on a file system that all "
            "machines share, or run on one machine"
        )


def to_half(x: torch.Tensor) -> torch.Tensor:
    """float16 where every element fits, else float32."""
    half = x.half()
    return half if torch.isfinite(half).all() else x.float()


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt", **metadata})
    os.replace(part, path)


def save_json(data: Any, path: Path) -> None:
    """Writes JSON that appears by a rename."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def _is_valid(path: Path, expected: str) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("hash") == expected
    except (SafetensorError, OSError):
        return False
