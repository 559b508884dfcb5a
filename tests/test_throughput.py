"""`benchmarks/throughput.py`: rows are kept as they come, and a lane that fails leaves the others alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import decoding
import throughput
from decoding import BASELINE, COMPILED, Lane, lanes, seconds_a_step
from prefill import random_codebook
from results import read_csv, update_csv

from antkv_hf import AnTKVConfig


def arguments(**changes) -> argparse.Namespace:
    settings = dict(device="cpu", steps=4, slow_steps=2, rounds=2, lane_seconds=None, reserve_gb=0.0, memory_gb=0.001)
    return argparse.Namespace(**settings | dict(largest_batch=100) | changes)


class FakeCache:
    def __init__(self, batch: int, context: int):
        self.filled = self.layers = ()
        self.batch, self.bytes = batch, 1000 * context * batch


def lane(name: str, most: int = 1 << 30, error: Exception | None = None, **options) -> Lane:
    def make(batch: int, context: int, room: int) -> FakeCache:
        if error is not None:
            raise error
        if batch > most:
            raise torch.OutOfMemoryError("no room\nat all")
        return FakeCache(batch, context)

    return Lane(name, "sdpa", make, lambda cache, tokens: None, lambda cache: cache.batch, **options)


@pytest.fixture
def timed(monkeypatch):
    """A step of a lane takes a second a sequence; the lanes' steps, as they ran."""
    seen: list[tuple[str, int, int]] = []

    def step(model, lane, cache, context, steps, limit):
        seen.append((lane.name, cache.batch, steps))
        return float(cache.batch)

    monkeypatch.setattr(throughput, "seconds_a_step", step)
    monkeypatch.setattr(throughput, "quantized_bytes", lambda cache: cache.bytes)
    return seen


def test_rows_are_kept_round_by_round_and_failures_left_out(timed, capsys):
    kept: list[list[str]] = []
    competitors = [lane(BASELINE), lane("broken", error=RuntimeError("not here")), lane("slow", slow=True, warm_ups=1)]
    contest = throughput.Contest(
        "batch", tiny_llama(), competitors, 2, 10, arguments(), lambda rows: kept.append([r["lane"] for r in rows])
    )
    contest.run()
    assert kept == [[BASELINE, "slow"]] * 2 and "broken, 2 x 10: RuntimeError: not here" in capsys.readouterr().out
    assert timed == [("slow", 2, 2), *[(BASELINE, 2, 4), ("slow", 2, 2)] * 2]
    assert [row["ratio"] for row in contest.rows()] == [1.0, 1.0]


def test_equal_memory_finds_the_largest_batch(timed):
    competitors = [lane("tight", most=70), lane(BASELINE), lane("beside", layers_beside=1.0), lane("none", most=0)]
    contest = throughput.Contest("memory", tiny_llama(), competitors, 0, 10, arguments(), lambda rows: None)
    contest.run()
    beside = 1_000_000 // (10_000 + 2 * 2 * 16 * 10 * 4)  # a layer in float32: 2 kv heads of 16 channels
    assert contest.batches["tight"] == 64 and contest.batches["beside"] == beside  # 100, 80, 64
    assert [row["lane"] for row in contest.rows()] == ["tight", BASELINE, "beside"]
    assert [row["ratio"] for row in contest.rows()] == [1.0, 1.0, 1.0]


def test_rows_of_other_lanes_and_contexts_stay(tmp_path):
    path = tmp_path / "throughput.csv"
    update_csv(path, [dict(part="memory", lane="a", x=1), dict(part="memory", lane="b", x=2)], ["part", "lane"], "cpu")
    rows = update_csv(path, [dict(part="memory", lane="b", x=3)], ["part", "lane"], "cpu")
    assert [(row["lane"], int(row["x"])) for row in rows] == [("a", 1), ("b", 3)]
    assert [row["x"] for row in read_csv(path)] == ["1", "3"] and read_csv(path)[0]["gpu"] == "none"
    with pytest.raises(ValueError, match="has the columns part, lane, x, .*, not part, lane, y, .*another folder"):
        update_csv(path, [dict(part="memory", lane="b", y=3)], ["part", "lane"], "cpu")


def test_lanes_run_with_compiled_mlps_and_a_limit():
    model = tiny_llama(num_hidden_layers=1)
    book = random_codebook(model, AnTKVConfig.preset("1bit"))
    found = {x.name: x for x in lanes(model, book, compile_mlps=dict(backend="eager"))}
    assert len(found) == 6 and found["AnTKV, graphs" + COMPILED].baseline == BASELINE + COMPILED
    for name in (BASELINE, BASELINE + COMPILED, "DynamicCache"):
        cache = found[name].make_cache(2, 20, 70)
        assert seconds_a_step(model, found[name], cache, 20, 6) > 0
        assert seconds_a_step(model, found[name], cache, 20, 6, limit=0.0) > 0  # one timed step
        assert cache.get_seq_length() == 20
    assert all("forward" not in module.__dict__ for module in model.modules())
    clock = decoding.Clock(limit=0.0)
    ids = torch.zeros(2, 1, dtype=torch.long)
    assert [bool(clock(ids, None).any()) for _ in range(decoding.WARM_UP + 1)] == [False] * decoding.WARM_UP + [True]
