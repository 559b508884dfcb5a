"""Which kernel in CUDA C++ answers: what it is compiled for, the shared memory that its blocks take, how work is split.

`find_shape` goes by tables, query rows and the GPU's shared memory, `plan` by the sizes of a step; `cuda_decode`
compiles and launches what they choose.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from .checks import ceil_div, require
from .decode_plan import MAX_SPLITS
from .table_image import image_bytes
from .tables import KeyTables, ValueTables

MAX_ROWS = 8
HEAD_DIMS = (64, 128)
SUB_DIMS = (2, 4, 8, 16, 32)  # channels of a code
MAX_STAGES = 3  # with heads of 128 channels two: three would have no room
SHARED_MEMORY = 232448  # bytes that a block of an H100, H200 or B200 can have
TEAM_WARPS = 4  # of a team, where a block has several
# What a share costs besides its codes, in spans: what one team waits for, others hide.
OVERHEAD_SPANS, TEAMS_OVERHEAD_SPANS = 10, 8


class Shape(NamedTuple):
    """What a kernel is compiled for: `Shape` of layout.cuh."""

    head_dim: int
    row_groups: int
    key_dim: int
    key_stages: int
    value_dim: int
    value_stages: int
    value_copies: int
    warps: int
    teams: int
    rotates: bool
    softcap: bool

    def __str__(self) -> str:
        return f"Shape<{', '.join(str(int(x)) for x in self)}>"

    @property
    def rows(self) -> int:
        """Query rows that a kernel has room for: `Shape::ROWS` of layout.cuh."""
        return 4 * self.row_groups

    @property
    def span(self) -> int:
        """Tokens that the warps of a team take at a time."""
        return 16 * self.warps // self.teams

    @property
    def ahead(self) -> int:
        """Spans whose queries a team turns at a time: `Shape::AHEAD` of layout.cuh."""
        return 16 // self.row_groups // self.teams - (self.teams > 1)

    @property
    def tiles(self) -> int:
        """Tiles of 16 tokens that a warp has under way together from sm_90 on: `Shape::TILES` of layout.cuh."""
        if self.head_dim == 64:
            fits = min(self.key_dim, self.value_dim) > 2 and max(self.key_stages, self.value_stages) < 3
        else:
            fits = self.key_dim > 4 and self.value_dim > 2 and self.key_stages * self.value_stages == 1
            fits = fits and not self.softcap
        return 2 if fits and self.ahead % 2 == 0 else 1

    @property
    def in_teams(self) -> Shape:
        """The same kernel for a batch large enough that each team of four warps has sequences of its own."""
        return self._replace(teams=self.warps // TEAM_WARPS)


def check_tables(keys: KeyTables, values: ValueTables) -> None:
    """Raises ValueError if these tables have no kernel; the message says which have."""
    dim, value_dim = keys.mean.shape[1], values.mean.shape[1]
    require(dim == value_dim and dim in HEAD_DIMS, f"head sizes {dim} and {value_dim}; both {HEAD_DIMS} have a kernel")
    require(keys.centroids.dtype == torch.float16, f"{keys.centroids.dtype} centroids; float16 ones have a kernel")
    for codes in (keys.codes, values.codes):
        fits = codes.code_bits == 8 and codes.sub_dim in SUB_DIMS
        fits = fits and codes.stages <= (MAX_STAGES if codes.sub_dim > 2 else 1)
        require(
            fits,
            f"codes of {codes.code_bits} bits in {_stages(codes.stages)} for {codes.sub_dim} channels have no CUDA "
            f"kernel; 8 bits for {', '.join(map(str, SUB_DIMS))} channels have, in up to {MAX_STAGES} stages (for 2 "
            "channels one)",
        )
        # A lane would have more codes than packed_codes.cuh reads in order.
        require(codes.stages < 3 or dim == 64, f"3 stages at head size {dim} have no CUDA kernel; up to 2 stages have")


def _stages(count: int) -> str:
    return f"{count} stage{'s' if count > 1 else ''}"


def find_shape(
    keys: KeyTables, values: ValueTables, rows: int, softcap: bool, shared_memory: int = SHARED_MEMORY
) -> Shape:
    """The kernel for `rows` query rows a kv head on a GPU that gives a block so many bytes of shared memory.

    Its blocks are one team; `plan` decides whether they are several, which takes no more memory.

    Raises:
        ValueError: if there is none.
    """
    check_tables(keys, values)
    require(1 <= rows <= MAX_ROWS, f"{rows} query rows a kv head; 1 to {MAX_ROWS} have a kernel")
    key, value = keys.codes, values.codes
    # More warps would have fewer registers than a lane's angles, codes and sums take.
    warps = 12 if rows <= 4 and min(key.sub_dim, value.sub_dim) > 2 else 8
    shape = Shape(
        keys.mean.shape[1], 1 if rows <= 4 else 2, key.sub_dim, key.stages, value.sub_dim, value.stages, 1, warps,
        1, keys.rotates, softcap,
    )  # fmt: skip
    # The tables of two stages are read without bank conflicts, and so is one of which there are two.
    doubled = shape._replace(value_copies=1 + value.stages % 2)
    if shared_bytes(doubled) <= shared_memory:
        return doubled
    needed = shared_bytes(shape)
    fewer = "; fewer stages take less" if key.stages + value.stages > 2 else ""
    require(
        needed <= shared_memory,
        f"{_stages(key.stages)} of keys and {value.stages} of values at head size {shape.head_dim} take {needed} bytes "
        f"of shared memory a block, of which there are {shared_memory}{fewer}",
    )
    return shape


@functools.lru_cache(maxsize=1024)  # every layer of every step asks
def plan(
    shape: Shape, coded: int, batch: int, heads: int, processors: int, pairs: bool = True
) -> tuple[Shape, int, int]:
    """The kernel in one team or in several, splits of a sequence, and blocks a kv head.

    A team takes ``batch * splits / (blocks * teams)`` shares, one after the other. The most loaded one decides, so
    splits are chosen for the least of its tokens, with what a share costs by itself. A span of one of several teams
    takes as long as one of a whole block: all teams are at work. Several need sequences for each block to choose from.
    A warp that takes two tiles together takes as long where it has only one.

    Args:
        coded: tokens in codes of each of `batch` sequences. heads: kv heads. processors: of the GPU.
        pairs: whether warps take `Shape.tiles` tiles together, as from sm_90 on; else one.
    """
    blocks = max(1, processors // heads)
    several = shape.in_teams
    cheapest = math.inf, shape, 1
    for form, overhead in ((shape, OVERHEAD_SPANS), (several, TEAMS_OVERHEAD_SPANS)):
        if form is several and (shape.teams == several.teams or batch < 2 * blocks):
            continue
        spans, takers = ceil_div(coded, form.span), blocks * form.teams
        for splits in range(1, min(blocks, max(spans, 1), MAX_SPLITS) + 1):
            if form is several and batch * splits < takers:
                continue  # some would have nothing to do
            tiles = form.tiles if pairs else 1
            share = ceil_div(spans, splits * tiles) * tiles
            cost = ceil_div(batch * splits, takers) * (share + overhead)
            if cost < cheapest[0]:
                cheapest = cost, form, splits
    _, form, splits = cheapest
    return form, splits, min(blocks, batch * splits)


def shared_bytes(shape: Shape) -> int:
    """`Shape::BYTES` of layout.cuh: shared memory of a block."""
    dim, rows, warps = shape.head_dim, shape.rows, shape.warps
    tables = image_bytes(dim, shape.key_stages, shape.value_stages, shape.value_copies) + 16 + 4 * dim
    queries = 2 * (shape.ahead + (shape.teams > 1)) * dim * rows * 2
    team_warps = warps // shape.teams
    return tables + shape.teams * max(queries, 2 * team_warps * rows * 4 + team_warps * rows * dim * 4)
