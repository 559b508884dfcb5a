"""Which kernel in CUDA C++ answers: shapes, their shared memory, plans, and what is refused."""

import re
from pathlib import Path

import pytest
import torch
from antkv import cuda_decode
from antkv.cuda_shape import MAX_ROWS, SHARED_MEMORY, Shape, find_shape, plan, shared_bytes
from builders import quantized_past, random_codec, random_snapshot

from antkv_hf.attention.cuda_backend import CudaBackend
from antkv_hf.attention.tables import UnsupportedTables, layer_tables
from antkv_hf.evaluation.inspection import fastest_kernels


def test_plan_gives_every_team_work():
    one = Shape(128, 1, 8, 1, 8, 1, 2, 12, 1, True, False)
    for batch, coded in ((1, 1), (1, 4096), (1, 131072), (5, 8192), (16, 131072), (33, 100), (128, 4096), (1000, 128)):
        shape, splits, blocks = plan(one, coded, batch, 8, 132)
        assert shape in (one, one.in_teams) and 1 <= splits <= 16 and 1 <= blocks <= min(16, batch * splits)
        assert shape.teams * blocks <= batch * splits
    assert plan(one, 131072, 1, 8, 132) == (one, 16, 16) and plan(one, 131072, 16, 8, 132) == (one, 1, 16)


def test_plan_makes_teams_of_batches():
    """What one sequence of a block waits for, others hide; a few sequences are shared by all warps."""
    one = Shape(128, 1, 8, 1, 8, 1, 2, 12, 1, True, False)
    assert one.in_teams.teams == 3 and one._replace(warps=8).in_teams.teams == 2
    for coded in (4096, 16384, 65536):
        assert all(plan(one, coded, batch, 8, 132)[0].teams == 1 for batch in (1, 4, 16))
        assert all(plan(one, coded, batch, 8, 132)[0].teams == 3 for batch in (48, 128, 785))


def test_plan_gives_warps_pairs_of_tiles():
    """A warp that takes two tiles together takes as long for one, so shares of an even number of spans cost no more."""
    one = Shape(128, 1, 8, 1, 8, 1, 2, 12, 1, True, False)
    assert one.tiles == 2 and plan(one, 8192, 1, 8, 132)[1] == 11  # 15 splits of 3 spans were 7% slower on an H200
    single = one._replace(value_stages=2)
    assert single.tiles == 1 and plan(single, 8192, 1, 8, 132)[1] == 15


def test_what_has_no_kernel_is_refused():
    past = quantized_past(random_snapshot(random_codec("d8b8", "d8b8", 2, 64), 1, 32, 3, torch.float16))
    with pytest.raises(ValueError, match="9 query rows a kv head; 1 to 8 have a kernel"):
        find_shape(past.key_tables, past.value_tables, 9, False)
    for spec in ("d8b8s4", "d2b8s2", "d4b6"):
        other = quantized_past(random_snapshot(random_codec(spec, "d8b8", 2, 64), 1, 32, 3, torch.float16))
        with pytest.raises(
            ValueError, match="have no CUDA kernel; 8 bits for 2, 4, 8, 16, 32 channels have, in up to 3"
        ):
            find_shape(other.key_tables, other.value_tables, 4, False)
    small = quantized_past(random_snapshot(random_codec("d8b8", "d8b8", 2, 32), 1, 32, 3, torch.float16))
    with pytest.raises(ValueError, match="head sizes 32 and 32"):
        find_shape(small.key_tables, small.value_tables, 4, False)
    for key, value in (("d4b8s3", "d32b8"), ("d8b8", "d4b8s3")):  # not by their bytes, which a later GPU may have
        large = layer_tables(random_codec(key, value, 2, 128), torch.float16)
        with pytest.raises(ValueError, match="3 stages at head size 128 have no CUDA kernel; up to 2 stages have"):
            find_shape(*large, 4, False, 1 << 20)


def test_tables_that_do_not_fit_are_refused_with_their_bytes(monkeypatch):
    """Two stages of keys and of values fit at a head size of 64, and not at 128; what a GPU has decides."""
    small, large = (layer_tables(random_codec("d8b8s2", "d8b8s2", 2, dim), torch.float16) for dim in (64, 128))
    assert shared_bytes(find_shape(*small, 4, False)) == 148192
    message = (
        "2 stages of keys and 2 of values at head size 128 take 296352 bytes of shared memory a block, of which there "
        f"are {SHARED_MEMORY}; fewer stages take less$"
    )
    with pytest.raises(ValueError, match=message):
        find_shape(*large, 4, False)
    with pytest.raises(ValueError, match="148192 bytes of shared memory a block, of which there are 101376"):
        find_shape(*small, 4, False, 101376)
    monkeypatch.setattr(cuda_decode, "shared_memory", lambda device: 101376)
    with pytest.raises(
        UnsupportedTables, match="148704 bytes .*fewer stages take less; use backend='triton' or 'auto'"
    ):
        CudaBackend(random_codec("d8b8s2", "d8b8s2", 2, 64), torch.float16)
    with pytest.raises(
        UnsupportedTables, match="1 stage of keys and 1 of .* there are 101376; use backend='triton' or"
    ):
        CudaBackend(random_codec("d8b8", "d8b8", 2, 128), torch.float16)


def test_no_step_needs_more_memory_than_a_backend_asks_for():
    """`CudaBackend` asks once, for the most rows: no step may be refused after it."""
    for key, value, dim in (("d8b8", "d8b8", 64), ("d2b8", "d2b8", 128), ("d4b8s3", "d4b8s3", 64)):
        pair = layer_tables(random_codec(key, value, 2, dim), torch.float16)
        asked = find_shape(*pair, MAX_ROWS, False)._replace(value_copies=1)
        for rows in range(1, MAX_ROWS + 1):
            for softcap in (False, True):
                assert shared_bytes(find_shape(*pair, rows, softcap, shared_bytes(asked))) <= shared_bytes(asked)


def test_inspect_names_the_kernels_of_stages():
    assert fastest_kernels(random_codec("d4b8s3", "d4b8s3", 2, 64), 3) == ("cuda", 213728)
    assert fastest_kernels(random_codec("d4b8s3", "d4b8s3", 2, 64), 3, 166912) == ("triton", 213728)
    assert fastest_kernels(random_codec("d8b8s2", "d8b8s2", 2, 128), 4) == ("triton", None)


def test_the_table_of_bytes_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) / (\d) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    assert [row[:2] for row in rows] == [(key, value) for key in "123" for value in "123"]
    for key, value, *said in rows:
        for dim, cell in zip((64, 128), said):
            stages = int(key), int(value)
            two, one = (Shape(dim, 1, 8, stages[0], 8, stages[1], n, 12, 1, True, False) for n in (2, 1))
            kib = [-(-shared_bytes(shape) // 1024) for shape in (two, one)]
            fits = [shared_bytes(shape) <= SHARED_MEMORY for shape in (two, one)]
            if not fits[1] or stages[1] == 2:
                assert cell == f"{kib[1]} KiB" + ("" if fits[1] else ": no room")
            else:
                assert cell == (f"{kib[0]} KiB, with one copy {kib[1]}" if fits[0] else f"{kib[1]} KiB, with one copy")
