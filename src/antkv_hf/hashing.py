"""SHA-256 of what files hold: tensors by name, and JSON whatever its spacing and order."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch


def tensors_sha256(tensors: dict[str, torch.Tensor], first: str = "") -> str:
    """Hash of the text `first` and of every tensor's name, dtype, shape and bytes, in the order of their names.

    Unlike a file's hash it does not depend on how a version of safetensors lays a file out.
    """
    digest = hashlib.sha256(first.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def json_sha256(data: dict[str, Any]) -> str:
    """Hash of JSON-ready `data` as it reads back from a file."""
    plain = json.loads(json.dumps(data))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
