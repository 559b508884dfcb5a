"""Where a run of `finetune` stands: tables and Adam's moments, in one file that appears by a rename."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """Steps of Adam over named parameters, resumed from `path` where it exists.

    Args:
        parameters: leaf tensors that require grad, changed in place.
        path: a safetensors file whose name tells the run apart from others; None: nothing is read or saved.

    Attributes:
        step: steps done. facts: JSON-ready facts that are saved beside.

    Raises:
        ValueError: the file is damaged, or does not hold these parameters.
    """

    def __init__(self, parameters: dict[str, torch.Tensor], path: Path | None):
        self.step = 0
        self.facts: dict[str, Any] = {}
        self._parameters, self._path = parameters, path
        self._adam = torch.optim.Adam(parameters.values(), lr=0.0)
        if path is not None and path.exists():
            self._load(path)

    def update(self, learning_rate: float) -> None:
        """One step of Adam by the gradients there are, which are cleared."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._adam.zero_grad()
        self.step += 1

    def save(self) -> None:
        if self._path is None:
            return
        tensors = {}
        for name, parameter in self._parameters.items():
            tensors[name] = parameter.detach()
            tensors |= {f"{name}.{moment}": self._adam.state[parameter][moment] for moment in _MOMENTS}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        save_file(tensors, part, metadata={"format": "pt", "step": str(self.step), "facts": json.dumps(self.facts)})
        os.replace(part, self._path)

    def _load(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file, torch.no_grad():
                metadata = file.metadata()
                for name, parameter in self._parameters.items():
                    parameter.copy_(file.get_tensor(name))
                    self._adam.state[parameter] = {
                        "step": torch.tensor(float(metadata["step"])),
                        **{m: file.get_tensor(f"{name}.{m}").to(parameter.device) for m in _MOMENTS},
                    }
                self.step, self.facts = int(metadata["step"]), json.loads(metadata["facts"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it to start this fine-tuning again") from error
