"""A cache with `max_length`: the numbers of one that grows, in buffers that stay where they are."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import random_codebook, static_contents

from antkv_hf import AnTKVCache, AnTKVConfig, VQSpec
from antkv_hf.config import AnchorConfig

WINDOW, CHUNK = 4, 8
STATE = ("key_codes", "value_codes", "exact_bits", "tail_keys", "tail_values", "statistic", "query_moment", "offset")


def config(**changes) -> AnTKVConfig:
    settings = dict(window=WINDOW, chunk=CHUNK, anchors=AnchorConfig(fraction=0.13, sinks=2))
    return AnTKVConfig(VQSpec(4, 8), VQSpec(4, 8), **{**settings, **changes})


@pytest.fixture(scope="module")
def codebook(llama):
    return random_codebook(llama, config())


def pair(model, codebook, max_length: int = 256, **changes) -> tuple[AnTKVCache, AnTKVCache]:
    """A cache that grows and one of `max_length`."""
    settings = config(**changes)
    return tuple(AnTKVCache(model.config, settings, codebook, max_length=n) for n in (None, max_length))


def prompt(n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, n), generator=torch.Generator().manual_seed(seed))


def padded(n: int, *padding: int) -> dict[str, torch.Tensor]:
    mask = torch.arange(n) >= torch.tensor(padding).unsqueeze(1)
    return dict(input_ids=prompt(n, len(padding)).masked_fill(~mask, 0), attention_mask=mask.long())


def exact_tokens(storage) -> list[dict]:
    """What each (sequence, kv head) keeps exactly, by position: where in its buffer a token is does not matter."""
    found: list[dict] = []
    past = storage.snapshot()
    keys_values = [(t.positions, *t.read(past.codec, past.offset, past.key_center)) for t in past.exact_tokens]
    for b in range(storage.offset.shape[0]):
        for h in range(keys_values[0][0].shape[1] if keys_values else 0):
            rows = [
                (int(p[b, h, i]), k[b, h, i], v[b, h, i])
                for p, k, v in keys_values
                for i in range(p.shape[2])
                if p[b, h, i] >= 0
            ]
            assert len({row[0] for row in rows}) == len(rows)
            found.append({position: (key, value) for position, key, value in rows})
    return found


def assert_same(grown: AnTKVCache, static: AnTKVCache) -> None:
    """The same state to the bit, once the static cache has encoded what has left its window."""
    assert grown.get_seq_length() == static.get_seq_length()
    for one, two in zip(grown.layers, static.layers):
        one, two = one.storage, two.storage
        two.commit()
        for name in STATE:
            a, b = getattr(one, name), getattr(two, name)
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name
        for a, b in zip(exact_tokens(one), exact_tokens(two), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(x, y) for p in a for x, y in zip(a[p], b[p]))
        assert two.buffers.lengths.tolist()[:2] == list(two.counts)[:2]
        assert two.buffers.anchors is None or int(two.buffers.lengths[2]) == two.counts.slots
        assert not two.buffers.statistic[:, :, two.counts.tail :].any()


def generate(model, inputs, cache, new: int, **options) -> torch.Tensor:
    torch.manual_seed(3)
    lengths = dict(max_new_tokens=new, min_new_tokens=new)
    return model.generate(**inputs, past_key_values=cache, do_sample=False, **lengths, **options)


@pytest.mark.parametrize("lane, score", [("sdpa", "error_aware"), ("antkv", "error_aware"), ("antkv", "none")])
def test_same_tokens_and_state_as_a_cache_that_grows(llama, codebook, lane, score):
    anchors = AnchorConfig(score=score, fraction=0.13, sinks=2, query_stride=4)
    llama.set_attn_implementation(lane)
    try:
        for inputs in (dict(input_ids=prompt(3)), padded(45, 0, 20)):
            caches = pair(llama, codebook, 120, anchors=anchors)
            tokens = [generate(llama, inputs, cache, 30) for cache in caches]
            assert torch.equal(*tokens)
            assert caches[1].layers[0].storage.coded_length >= 3 * CHUNK
            assert_same(*caches)
    finally:
        llama.set_attn_implementation("sdpa")


def test_nothing_moves_and_the_host_is_not_asked(llama, codebook, monkeypatch):
    """A step of an unpadded batch reads no tensor on the host and leaves every buffer where it is."""
    _, cache = pair(llama, codebook, 100)
    llama(prompt(20, 2), past_key_values=cache)
    storage = cache.layers[0].storage
    before = [t.data_ptr() for t in (*storage.buffers.tensors(), storage.buffers.lengths, storage.query_moment)]
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name, **__: pytest.fail(f"asked a tensor for {name}"))
    for step in range(2 * CHUNK):
        llama(torch.full((2, 1), 7), position_ids=torch.full((1, 1), 20 + step), past_key_values=cache)
    monkeypatch.undo()
    after = [t.data_ptr() for t in (*storage.buffers.tensors(), storage.buffers.lengths, storage.query_moment)]
    assert before == after and storage.length == 20 + 2 * CHUNK and storage.coded_length == 3 * CHUNK


@pytest.mark.parametrize(
    "mode",
    [dict(prefill_chunk_size=24), dict(prompt_lookup_num_tokens=5), dict(num_beams=3)],
    ids=lambda m: next(iter(m)),
)
def test_other_modes(llama, codebook, mode):
    ids = torch.cat([prompt(50), prompt(50)[:, 10:30], prompt(50)[:, 10:22]], 1)
    caches = pair(llama, codebook, 160)
    tokens = [generate(llama, dict(input_ids=ids), cache, 24, **mode) for cache in caches]
    assert torch.equal(*tokens)
    assert_same(*caches)


def test_turns_crop_reorder_and_copies(llama, codebook):
    caches = pair(llama, codebook, 300)

    def both(change) -> None:
        for cache in caches:
            change(cache)
        copies = copy.deepcopy(caches)
        assert_same(*copies)
        for cache in copies:
            llama(prompt(30, 2, seed=5), past_key_values=cache)
        assert_same(*copies)

    both(lambda cache: llama(prompt(100, 2), past_key_values=cache))
    both(lambda cache: cache.crop(-3))
    both(lambda cache: [llama(prompt(1, 2, seed=i), past_key_values=cache) for i in range(CHUNK)])
    both(lambda cache: cache.crop(-5))
    both(lambda cache: cache.reorder_cache(torch.tensor([1, 0])))
    both(lambda cache: cache.batch_select_indices(torch.tensor([1, 1])))
    both(lambda cache: cache.crop(-45))  # into coded tokens, in the middle of a chunk
    both(lambda cache: [llama(prompt(1, 2, seed=i), past_key_values=cache) for i in range(3 * CHUNK)])
    both(lambda cache: cache.crop(-10_000))
    both(lambda cache: llama(**padded(60, 5, 25), past_key_values=cache))


def test_identity_codec_and_one_token_prompts(llama):
    settings = AnTKVConfig.preset("identity", window=8, chunk=4)
    caches = [AnTKVCache(llama.config, settings, max_length=n) for n in (None, 80)]
    tokens = [generate(llama, dict(input_ids=prompt(1)), cache, 30) for cache in caches]
    assert torch.equal(*tokens)
    assert_same(*caches)


def test_a_saved_static_cache_goes_on(llama, codebook, tmp_path):
    caches = pair(llama, codebook, 200)
    for cache in caches:
        said = generate(llama, dict(input_ids=prompt(40)), cache, 30)
    caches[1].save(tmp_path / "cache.safetensors")
    loaded = AnTKVCache.load(tmp_path / "cache.safetensors", llama, codebook)
    assert loaded.max_length is None and loaded.get_seq_length() == 69
    llama.set_attn_implementation("sdpa")
    turn = dict(input_ids=torch.cat([said, prompt(40, seed=1)], 1))
    tokens = [generate(llama, turn, cache, 40) for cache in (caches[0], loaded)]
    assert torch.equal(*tokens)


def test_too_long_is_an_error_before_anything_changes(llama, codebook):
    _, cache = pair(llama, codebook, 50)
    assert cache.get_max_length() == 50 and not cache.is_compileable
    with pytest.raises(ValueError, match=r"max_length=50 tokens, but 0 cached and 51 new ones are 51"):
        llama(prompt(51), past_key_values=cache)
    assert cache.get_seq_length() == 0
    llama(prompt(50), past_key_values=cache)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=r"50 cached and 1 new ones are 51: make it with max_length=51 or more"):
        llama(prompt(1), past_key_values=cache)
    for one, two in zip(before.layers, cache.layers):
        assert all(torch.equal(a, b) for a, b in zip(one.storage.buffers.tensors(), two.storage.buffers.tensors()))
    cache.reset()
    llama(prompt(50, 3), past_key_values=cache)
    assert cache.get_seq_length() == 50
    with pytest.raises(ValueError, match="keeps its batch of 3, but 6 sequences are asked for: leave max_length out"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
        AnTKVCache(llama.config, codebook=codebook, max_length=0)


@pytest.mark.parametrize("new", (1, 2, 20))
def test_anchors_without_a_slot_are_an_error_before_anything_changes(llama, codebook, new):
    """Crops leave layers different numbers of anchors: the last layer's are asked for before the first one changes."""
    _, cache = pair(llama, codebook, 60)
    tail = WINDOW + CHUNK - (new == 2)  # one token more, or those that come, and a chunk has left the window
    llama(prompt(CHUNK + WINDOW), past_key_values=cache)
    for i in range(cache.get_seq_length(), CHUNK + tail):
        llama(prompt(1, seed=i), past_key_values=cache)
    storages = [layer.storage for layer in cache.layers]
    assert storages[0].counts.tail == tail
    storages[-1].set_counts(storages[-1].counts._replace(slots=storages[-1].buffers.anchors.positions.shape[2]))
    before = static_contents(cache)
    with pytest.raises(ValueError, match="slots of anchors are in use and .* more are needed, but max_length=60"):
        llama(prompt(new, seed=99), past_key_values=cache)
    assert all(torch.equal(a, b) for a, b in zip(before, static_contents(cache), strict=True))
    assert cache.get_seq_length() == CHUNK + tail


@pytest.mark.parametrize(
    "settings, why",
    [
        (AnTKVConfig.preset("ott-2bit"), r"a cache of scalar codes \(int2g32\) grows"),
        (config(anchors=AnchorConfig(max_tokens=9)), "anchors.max_tokens=9 lets anchors go"),
    ],
    ids=("scalar", "budget"),
)
def test_what_has_no_fixed_size_is_refused(llama, codebook, settings, why):
    tables = codebook if isinstance(settings.key, VQSpec) else None
    with pytest.raises(ValueError, match=f"max_length=80 cannot be kept: {why}.*Leave max_length out"):
        AnTKVCache(llama.config, settings, tables, max_length=80)


def test_memory_is_stated_allocated_and_in_use(llama, codebook):
    caches = pair(llama, codebook, 1000)
    for cache in caches:
        llama(prompt(100, 2), past_key_values=cache)
    grown, static = (cache.memory_footprint() for cache in caches)
    for kind in ("codes", "sinks", "window", "scores", "coded_tokens", "bits_per_element"):
        assert getattr(grown, kind) == getattr(static, kind), kind
    stored = [layer.storage for layer in caches[1].layers]
    held = [t for s in stored for t in (*s.buffers.tensors(), s.buffers.lengths, s.offset, s.query_moment)]
    assert static.total == sum(t.nbytes for t in held) and grown.reserved == 0 < static.reserved
    assert f"reserved {static.reserved:,}" in str(static)
    llama(prompt(900, 2), past_key_values=caches[1])
    full = caches[1].memory_footprint()
    assert full.total == static.total and full.tokens == 2000 and full.reserved < 0.2 * full.total
