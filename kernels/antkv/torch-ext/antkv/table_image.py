"""Tables as a block of the CUDA decode kernel holds them in shared memory: it copies an image, and arranges nothing.

An image has, one after the other (`Shape` of cuda/layout.cuh names the places):

- Key tables, ``head_dim / 64`` sections a stage, of 256 rows (codes) of 64 float16. Section s has channels 16 s to
  16 s + 15 of each of the four lanes' ``head_dim / 4`` channels, in latent order. The mean is in the first stage. Codes
  of four channels and more have each two pairs as ``(x, x) (y, y)``, so that two pairs turn at a time.
- Value tables, two in the columns of the same ``head_dim / 32`` sections: those of two stages, or the last one twice.
  An entry has as many channels as a code, ``head_dim / 16`` at most; a section has two entries of each of 16 / entry
  of the eight lanes, which own ``head_dim / 8`` channels each. A table that is left over has half as many sections:
  what would be every second one is in the columns of the other table.
- RoPE pairs, in the order in which lanes own them: frequency and scale as float32, mean as float16, ``(x, x) (y, y)``,
  channels as bytes. At last 16 bytes that begin with an int32: 1 if a lane's channels are neighbours, see `_pairs`;
  of a block's copy the kernel puts lengths into the other 12.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .checks import require
from .tables import KeyTables, ValueTables


class TableImages:
    """Images of one pair of tables, made when one is first asked for and kept as long as the tables.

    Iterating gives the tensors that were made so far.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[tuple[torch.Tensor, ...], torch.Tensor]] = {}

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (image for *_, image in self._made.values())

    def get(self, keys: KeyTables, values: ValueTables, value_copies: int) -> torch.Tensor:
        """`table_image` of these tables, whose tensors must not change any more.

        Raises:
            ValueError: for other tables than before, or if it would have to be made while a CUDA graph is captured.
        """
        of = keys.centroids, keys.mean, keys.channels, keys.frequency, keys.pair_scale, values.centroids
        made_of, image = self._made.get(value_copies, (of, None))
        # A captured graph may read the image of those before.
        same = all(x is y for x, y in zip(of, made_of, strict=True))
        require(same, "these images are of other tables; give each its own: KeyTables(images=TableImages())")
        if image is None:
            # A graph would make it at each replay, and not now.
            capturing = keys.centroids.is_cuda and torch.cuda.is_current_stream_capturing()
            require(not capturing, "a CUDA graph is being captured, but its tables were never used: warm it up first")
            image = table_image(keys, values, value_copies)
            self._made[value_copies] = of, image
        return image


def table_image(keys: KeyTables, values: ValueTables, value_copies: int) -> torch.Tensor:
    """What a block's shared memory begins with, uint8 ``(kv_heads, image_bytes(...))``, on the tables' device.

    Args:
        keys, values: float16 tables of 8-bit codes for which `cuda_shape.check_tables` finds a kernel.
        value_copies: 2 if the last stage of values has a second copy (of an odd number of stages), else 1.
    """
    parts = [_key_tables(keys), *_value_tables(values, value_copies), *_pairs(keys)]
    return torch.cat([part.contiguous().view(torch.uint8).flatten(1) for part in parts], 1)


def image_bytes(head_dim: int, key_stages: int, value_stages: int, value_copies: int) -> int:
    """`Shape::IMAGE` of layout.cuh: bytes of a kv head's image."""
    return (key_stages + value_stages - 1 + value_copies) * 512 * head_dim + 7 * head_dim + 16


def _latent(centroids: torch.Tensor) -> torch.Tensor:
    """``(heads, groups, stages, 256, sub_dim)`` -> ``(heads, stages, 256, head_dim)``."""
    return centroids.permute(0, 2, 3, 1, 4).flatten(3)


def _key_tables(keys: KeyTables) -> torch.Tensor:
    """float16 ``(heads, stages, sections, 256, 4 lanes, 16 channels)``."""
    tables = _latent(keys.centroids).float()
    tables[:, 0] += keys.mean.unsqueeze(1)  # with the first stage, so that no token pays for it
    tables = tables.half().unflatten(3, (4, -1, 16)).permute(0, 1, 4, 2, 3, 5)
    return tables if keys.codes.sub_dim < 4 else _gather_pairs(tables)


def _gather_pairs(x: torch.Tensor) -> torch.Tensor:
    """``(x, y) (x, y)`` -> ``(x, x) (y, y)`` along the last dimension."""
    return x.unflatten(-1, (-1, 2, 2)).mT.flatten(-3)


def _value_tables(values: ValueTables, copies: int) -> list[torch.Tensor]:
    """Of two tables each, float16 ``(heads, sections, 256, lanes, 2 entries, 2 tables, channels of an entry)``."""
    tables = _latent(values.centroids)
    entry = min(values.codes.sub_dim, tables.shape[3] // 16)
    lanes = 16 // entry  # of a section; all eight have a section each in turn, two entries at a time
    tables = tables.unflatten(3, (8 // lanes, lanes, -1, 2, entry)).permute(1, 0, 5, 3, 2, 4, 6, 7).flatten(2, 3)
    stages = [*tables, *tables[-1:].expand(copies - 1, *tables.shape[1:])]
    beside = list(zip(stages[::2], stages[1::2]))
    if len(stages) % 2:
        beside.append((stages[-1][:, ::2], stages[-1][:, 1::2]))
    return [torch.stack(pair, -2) for pair in beside]


def _pairs(keys: KeyTables) -> list[torch.Tensor]:
    """Frequency, scale, mean and channels of RoPE pairs, and whether a lane's channels are neighbours.

    They are if every pair is ``(i, i + head_dim / 2)``: pairs then go by i. Otherwise they go in latent order. Without
    RoPE there are no pairs, and any two channels may stand together: neighbours again.
    """
    heads, half = keys.frequency.shape
    channels = keys.channels.long()
    first, second = channels.view(heads, half, 2).unbind(2)
    neighbours = (second == first + half).all(1) | (not keys.rotates)
    by_first = neighbours & keys.rotates
    order = torch.where(by_first.unsqueeze(1), first, torch.arange(half, device=first.device)).argsort(1)
    plain_mean = torch.empty_like(keys.mean).scatter(1, channels, keys.mean)
    mean = torch.where(neighbours.view(heads, 1, 1), plain_mean.view(heads, 2, half).mT, keys.mean.view(heads, half, 2))
    flag = torch.zeros(heads, 4, dtype=torch.int32, device=first.device)
    flag[:, 0] = neighbours
    return [
        keys.frequency.gather(1, order),
        keys.pair_scale.gather(1, order),
        _gather_pairs(mean.flatten(1).half()),
        torch.stack([first.gather(1, order), second.gather(1, order)], 2).to(torch.uint8),
        flag,
    ]
