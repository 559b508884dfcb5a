"""Which kv heads of a layer this process holds under tensor parallelism (no transformers in here).

With ``tp_plan="auto"`` every process runs all layers on its share of the heads, so `AnTKVCache.update` gets
``kv_heads / tp`` of them: process r the r-th run of consecutive heads. Tables of a head go where the head is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


@dataclass(frozen=True)
class HeadShard:
    """Share `rank` of `size` equal shares of a layer's kv heads."""

    rank: int
    size: int

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of ``(kv_heads, ...)`` that belong to this share."""
        return x.chunk(self.size)[self.rank]


def tp_mesh(device_mesh: Any):
    """The one-dimensional tensor-parallel part of a model's device mesh; None if it has none."""
    if device_mesh is None or device_mesh.ndim == 1:
        names = getattr(device_mesh, "mesh_dim_names", None)
        return None if names and names != ("tp",) else device_mesh
    return device_mesh["tp"] if "tp" in (device_mesh.mesh_dim_names or ()) else None


def tp_size(config: Any, device_mesh: Any = None) -> int:
    """Processes that share each layer of a model, by its device mesh or what transformers notes in its config."""
    mesh = tp_mesh(device_mesh)
    if mesh is not None:
        return mesh.size()
    noted = getattr(config, "distributed_config", None)
    size = noted.get("tp_size") if isinstance(noted, dict) else getattr(noted, "tp_size", None)
    return size or 1


def check_heads(config: Any, kv_heads: int, size: int) -> None:
    """Raises ValueError if the plan of a model splits its kv heads among more processes than divide them."""
    plan = dict(getattr(config, "base_model_tp_plan", None) or {})
    noted = getattr(getattr(config, "distributed_config", None), "tp_plan", None)
    plan |= noted if isinstance(noted, dict) else {}
    # other styles gather the heads again
    split = any(name.rsplit(".", 1)[-1] in _KEY_PROJECTIONS and style == "colwise" for name, style in plan.items())
    if split and kv_heads % size:
        raise ValueError(
            f"{kv_heads} kv heads cannot be shared by {size} tensor-parallel processes: run on a number of processes "
            f'that divides {kv_heads}, or spread the layers instead (device_map="auto")'
        )


def head_shard(local: int, total: int, device_mesh: Any = None) -> HeadShard | None:
    """The share of the heads that this process holds; None if it holds all of them.

    Args:
        local: kv heads that the model gave. total: kv heads of the layer.
        device_mesh: the model's; without it, all processes of `torch.distributed` are taken to share each layer.

    Raises:
        ValueError: `local` is not what the processes leave of `total`, or which share this is cannot be known.
    """
    if local == total:
        return None
    mesh = tp_mesh(device_mesh)
    if mesh is None and not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            f"{local} of {total} kv heads is no share of a tensor-parallel process, since torch.distributed is not "
            "initialized: load the codebook of this model"
        )
    size = distributed.get_world_size() if mesh is None else mesh.size()
    if local * size == total:
        return HeadShard(distributed.get_rank() if mesh is None else mesh.get_local_rank(), size)
    if mesh is None and total % local == 0 and size % (total // local) == 0:
        raise ValueError(
            f"{total // local} processes share the {total} kv heads of a layer, but {size} run: which share this is "
            "cannot be known without the model. Make the cache with AnTKVCache.from_pretrained(..., model=model), or "
            "AnTKVCache(..., device_mesh=model._device_mesh)"
        )
    raise ValueError(
        f"{local} of {total} kv heads is not the share of one of {size} processes, {total} / {size}: load the codebook "
        "of this model, or run on a number of processes that divides the heads"
    )
