"""Two caches at once: interleaved on one model, and in two threads on one codebook that neither has placed yet."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import random_codebook

from antkv_hf import AnTKVCache, AnTKVConfig, VQSpec, codebook
from antkv_hf.codecs import VectorQuantizer
from antkv_hf.config import AnchorConfig
from antkv_hf.rotary import Rotary

CONFIG = AnTKVConfig(VQSpec(4, 4), VQSpec(4, 4), window=8, chunk=16, anchors=AnchorConfig(fraction=0.13, sinks=2))
GREEDY = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False)


@pytest.fixture(autouse=True)
def eager_switching():
    """Threads take turns a thousand times more often than usual, so that a race shows itself."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(usual)


def ids(n: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 128, (1, n), generator=torch.Generator().manual_seed(seed))


def together(*jobs) -> list:
    """Runs `jobs` in a thread each, all starting at the same moment; their results."""
    barrier = threading.Barrier(len(jobs))

    def run(job):
        barrier.wait(30)
        with torch.no_grad():
            return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [f.result(timeout=120) for f in [pool.submit(run, job) for job in jobs]]


@pytest.mark.parametrize("lane", ("sdpa", "antkv"))
def test_two_generations_at_once_on_one_codebook(llama, lane):
    prompts = [ids(45, 1), ids(90, 2)]
    llama.set_attn_implementation(lane)
    try:
        book = random_codebook(llama, CONFIG)
        caches = [AnTKVCache(llama.config, codebook=book) for _ in prompts]
        expected = [llama.generate(p, past_key_values=c, **GREEDY) for p, c in zip(prompts, caches)]
        for _ in range(3):
            book = random_codebook(llama, CONFIG)  # its tables are placed in the race
            fresh = [AnTKVCache(llama.config, codebook=book) for _ in prompts]
            jobs = [lambda p=p, c=c: llama.generate(p, past_key_values=c, **GREEDY) for p, c in zip(prompts, fresh)]
            for out, one, two, alone in zip(together(*jobs), expected, fresh, caches):
                assert torch.equal(out, one)
                for ours, theirs in zip(two.layers, alone.layers):
                    assert torch.equal(ours.storage.key_codes, theirs.storage.key_codes)
            for one, two in zip(*(c.layers for c in fresh)):
                assert one.storage.codec is two.storage.codec, "tables were placed twice"
    finally:
        llama.set_attn_implementation("sdpa")


def test_one_cache_is_saved_while_another_generates(llama, tmp_path):
    book = random_codebook(llama, CONFIG)
    still, busy, alone = (AnTKVCache(llama.config, codebook=book) for _ in range(3))
    llama.generate(ids(70, 0), past_key_values=still, **GREEDY)
    expected = llama.generate(ids(60, 1), past_key_values=alone, **GREEDY)

    def save_and_load():
        for _ in range(10):
            still.save(tmp_path / "cache")
            loaded = AnTKVCache.load(tmp_path / "cache", codebook=book)
        return loaded

    out, loaded = together(lambda: llama.generate(ids(60, 1), past_key_values=busy, **GREEDY), save_and_load)
    assert torch.equal(out, expected)
    assert loaded.memory_footprint() == still.memory_footprint()


def test_two_caches_interleaved_on_one_model(llama):
    """Token by token in turn, each cache goes on as if it were alone."""
    book = random_codebook(llama, CONFIG)
    sequences = [ids(80, 1), ids(80, 2)]
    alone = []
    for tokens in sequences:
        cache = AnTKVCache(llama.config, codebook=book)
        alone.append([llama(part, past_key_values=cache).logits for part in tokens.split([30] + [1] * 50, 1)])
    caches = [AnTKVCache(llama.config, codebook=book) for _ in sequences]
    parts = [tokens.split([30] + [1] * 50, 1) for tokens in sequences]
    for step in range(51):
        for cache, mine, expected in zip(caches, parts, alone):
            assert torch.equal(llama(mine[step], past_key_values=cache).logits, expected[step])


def test_tables_are_placed_once(llama, monkeypatch):
    """Two threads that both found no tables on the device, and both make them, go on with the same ones."""
    book, both = random_codebook(llama, CONFIG), threading.Barrier(2)
    rotary = [Rotary(torch.rand(8))] * 3
    factories = [book.codec_factory(CONFIG, rotary) for _ in range(2)]  # those of two caches

    def met(*arguments):
        both.wait(30)
        return VectorQuantizer(*arguments)

    monkeypatch.setattr(codebook, "VectorQuantizer", met)
    one, two = together(*(lambda f=f: f(0, torch.device("cpu"), 2, 16, 16) for f in factories))
    assert one is two and one is factories[0](0, torch.device("cpu"), 2, 16, 16)


class ContendedTable(list):
    """An angle table that another thread exchanges for a shorter one as soon as it has been written."""

    def __setitem__(self, place, tables):
        super().__setitem__(place, [table[:3] for table in tables])


def test_angle_table_that_another_thread_exchanges():
    inv_freq, x = torch.rand(4), torch.randn(1, 1, 60, 8)
    contended = Rotary(inv_freq, _table=ContendedTable())
    for n in (60, 3, 40):
        assert torch.equal(contended.rotate_block(x[:, :, :n]), Rotary(inv_freq).rotate_block(x[:, :, :n]))
