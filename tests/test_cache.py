"""AnTKVCache with vector and scalar codes: against a dense model of itself, its memory, its anchors, its errors."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import transformers
from helpers import random_codebook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import repeat_kv

from antkv_hf import AnTKVCache, AnTKVConfig, VQSpec
from antkv_hf.attention.reference_backend import ReferenceBackend
from antkv_hf.cache.handle import KVHandle
from antkv_hf.config import AnchorConfig
from antkv_hf.reference import attention as reference

SPEC = VQSpec(4, 8)


def config(**changes) -> AnTKVConfig:
    settings = dict(window=8, chunk=16, anchors=AnchorConfig(fraction=0.13, sinks=2))
    return AnTKVConfig(SPEC, SPEC, **{**settings, **changes})


@pytest.fixture(scope="module")
def codebook(llama):
    return random_codebook(llama, config())


@pytest.fixture(params=("vq", "scalar"))
def make(request, llama, codebook):
    """A function that makes a cache with some fields of its config changed, of either codec."""
    plain, book = config(), codebook
    if request.param == "scalar":
        plain, book = AnTKVConfig.preset("ott-2bit", window=8, chunk=32, anchors=config().anchors), None
    return lambda **changes: AnTKVCache(llama.config, plain.replace(**changes), book)


@pytest.fixture
def cache(make):
    return make()


def prompt(n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, n), generator=torch.Generator().manual_seed(seed))


def test_runs_on_the_expected_transformers():
    expected = os.environ.get("EXPECT_TRANSFORMERS", transformers.__version__)
    assert transformers.__version__ == expected


@pytest.mark.parametrize("lane", ("sdpa", "antkv"))
@pytest.mark.parametrize("padding", (0, 21))
def test_attention_equals_dense_attention_over_what_is_stored(llama, make, lane, padding):
    """The blockwise path over codes, anchors and tail equals plain attention over the materialised keys and values."""
    ids, mask = prompt(90, 2), torch.ones(2, 90, dtype=torch.int64)
    mask[1, :padding] = 0
    llama.set_attn_implementation(lane)
    try:
        ours = make()
        llama(ids[:, :70], attention_mask=mask[:, :70], past_key_values=ours)
        llama(ids[:, 70:71], attention_mask=mask[:, :71], past_key_values=ours)
        assert ours.layers[0].storage.coded_length in (48, 32)
        dense = DynamicCache(config=llama.config)
        for i, layer in enumerate(ours.layers):
            keys, values = layer.storage.snapshot().dense()
            dense.update(keys, values, i)
        position_ids = (mask.cumsum(-1) - 1).clamp_min(0)[:, 71:]
        rest = dict(input_ids=ids[:, 71:], attention_mask=mask, position_ids=position_ids)
        expected = llama(**rest, past_key_values=dense).logits
        out = llama(**rest, past_key_values=ours).logits
    finally:
        llama.set_attn_implementation("sdpa")
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("padding", (0, 21))
def test_blocks_of_queries_do_not_matter(llama, make, padding, monkeypatch):
    """A second chunk over coded tokens, answered seven queries at a time."""
    ids, mask = prompt(130, 2), torch.ones(2, 130, dtype=torch.int64)
    mask[1, :padding] = 0
    outs = []
    for limit in (reference.MAX_LOGITS, 7 * 2 * 4 * reference.BLOCK):
        monkeypatch.setattr(reference, "MAX_LOGITS", limit)
        cache = make()
        llama(ids[:, :70], attention_mask=mask[:, :70], past_key_values=cache)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, 70:]
        rest = dict(input_ids=ids[:, 70:], attention_mask=mask if padding else None, position_ids=positions)
        outs.append(llama(**rest, past_key_values=cache).logits)
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-4)


def test_left_padding_does_not_change_what_is_stored(llama, make):
    """A padded sequence stores the codes, anchors and sinks of the same sequence alone, positions shifted."""
    alone, padded = make(), make()
    # one chunk of padding, so that the chunks of both runs hold the same tokens
    ids, padding = prompt(80), alone.antkv_config.chunk
    llama(ids, past_key_values=alone)
    batch = torch.cat([torch.zeros(1, padding, dtype=torch.int64), ids], 1)
    mask = (torch.arange(80 + padding) >= padding).long().unsqueeze(0)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    llama(batch, attention_mask=mask, position_ids=positions, past_key_values=padded)
    for cache in (alone, padded):
        n = cache.get_seq_length()
        mask_now = None if cache is alone else torch.cat([mask, torch.ones(1, 1, dtype=torch.int64)], 1)
        position = torch.tensor([[80]])
        llama(ids[:, :1], attention_mask=mask_now, position_ids=position, past_key_values=cache)
        assert cache.get_seq_length() == n + 1
    for one, two in zip(alone.layers, padded.layers):
        one, two = one.storage, two.storage
        assert two.offset.tolist() == [padding]
        agree = (one.key_codes == two.key_codes[:, :, padding:]).float().mean()
        assert agree > 0.995  # a code may flip where two centroids are equally near
        assert torch.equal(one.sinks.positions + padding, two.sinks.positions)
        if one.scales is not None:
            for name in ("key_mean", "value_mean", "value_std"):
                torch.testing.assert_close(getattr(one.scales, name), getattr(two.scales, name))
        kept = two.anchors.positions[..., -one.anchors.positions.shape[2] :]
        assert (one.anchors.positions + padding == kept).float().mean() > 0.9


def test_anchors_and_sinks_are_read_back_exactly(llama, make):
    ids = prompt(100)
    reference = DynamicCache(config=llama.config)
    llama(ids, past_key_values=reference)
    for dtype, tolerance in (("float16", 2e-3), ("int8", 2e-2)):
        ours = make(anchor_dtype=dtype)
        llama(ids, past_key_values=ours)
        storage = ours.layers[0].storage
        keys, values = storage.snapshot().dense()
        for exact, limit in ((storage.sinks, 1e-3), (storage.anchors, tolerance)):
            index = exact.positions.long().unsqueeze(-1).expand(-1, -1, -1, 16)
            for mine, true in ((keys, reference.layers[0].keys), (values, reference.layers[0].values)):
                error = (mine.gather(2, index) - true.gather(2, index)).abs().max() / true.abs().max()
                assert error <= limit
        assert storage.sinks.positions[0, 0].tolist() == [0, 1]
        assert storage.anchors.positions.shape[2] == storage.coded_length // 8  # 0.13 of a chunk
        assert not torch.isin(storage.anchors.positions, torch.tensor([0, 1])).any()


def test_a_chunk_with_too_few_candidates_leaves_slots_empty(llama, make):
    """With every token an anchor, sinks and padding must not be stored twice: attention would count them twice."""
    cache = make(anchors=AnchorConfig(fraction=1.0, sinks=2, dtype="float16"))
    reference = DynamicCache(config=llama.config)
    ids, mask = prompt(60, 2), torch.ones(2, 60, dtype=torch.int64)
    mask[1, :21] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for c in (cache, reference):
        llama(ids[:, :50], attention_mask=mask[:, :50], position_ids=positions[:, :50], past_key_values=c)
    rest = dict(input_ids=ids[:, 50:], attention_mask=mask, position_ids=positions[:, 50:])
    expected = llama(**rest, past_key_values=reference).logits
    torch.testing.assert_close(llama(**rest, past_key_values=cache).logits, expected, atol=5e-3, rtol=5e-3)
    storage = cache.layers[0].storage
    assert storage.coded_length == 48 or storage.coded_length == 32
    counted = [(t.positions == 0).sum().item() for t in (storage.sinks, storage.anchors)]
    assert counted == [2, 0]  # two kv heads of the unpadded sequence, once each


@pytest.mark.parametrize("score", ["error_aware", "anchor_score", "accumulated_attention", "squared_attention",
                                   "key_norm", "outlier_tokens", "first_tokens", "random", "none"])  # fmt: skip
def test_every_score_runs(llama, make, score):
    cache = make(anchors=AnchorConfig(score=score, fraction=0.1))
    out = llama.generate(prompt(60, 2), past_key_values=cache, max_new_tokens=30, min_new_tokens=30, do_sample=False)
    assert out.shape == (2, 90)
    kept = cache.layers[0].storage.anchors
    assert (kept is None) == (score == "none")


def test_same_anchors_however_the_prompt_comes(llama, make):
    """Chunked prefill sums the same statistic as one pass, for tokens whose queries were all seen."""
    caches = [make(window=90) for _ in range(2)]
    ids = prompt(80)
    llama(ids, past_key_values=caches[0])
    for part in ids.split(23, 1):
        llama(part, past_key_values=caches[1])
    for one, two in zip(caches[0].layers, caches[1].layers):
        torch.testing.assert_close(one.storage.statistic, two.storage.statistic, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(one.storage.query_moment, two.storage.query_moment)


def test_cache_operations_act_like_a_dense_model(llama, cache):
    """reorder, repeat, select and crop on the cache equal the same operations on its materialised keys and values."""
    ids = prompt(100, 3)
    llama(ids, past_key_values=cache)
    llama(ids[:, :3], past_key_values=cache)

    def dense():
        return [tensor for layer in cache.layers for tensor in layer.storage.snapshot().dense()]

    before = dense()
    for name, argument, change in (
        ("reorder_cache", torch.tensor([2, 0, 2]), lambda t: t[[2, 0, 2]]),
        ("batch_repeat_interleave", 2, lambda t: t.repeat_interleave(2, 0)),
        ("batch_select_indices", torch.tensor([5, 1]), lambda t: t[[5, 1]]),
        ("crop", -1, lambda t: t[:, :, :-1]),
        ("crop", 0, lambda t: t),
        ("crop", -30, lambda t: t[:, :, :-30]),
    ):
        getattr(cache, name)(argument)
        before = [change(t) for t in before]
        for ours, expected in zip(dense(), before):
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    fork = copy.deepcopy(cache)
    llama(ids[:2, :60], past_key_values=cache)
    for ours, expected in zip([t for layer in fork.layers for t in layer.storage.snapshot().dense()], before):
        torch.testing.assert_close(ours, expected)
    cache.crop(-10_000)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("score", ("outlier_tokens", "random"))
def test_anchors_are_demoted_to_their_codes_when_the_budget_is_full(llama, make, score):
    """After each chunk the kept tokens are the best-scored of all so far; the others are read from their codes."""
    free, full = make(anchor_score=score), make(anchor_score=score, anchor_max_tokens=5)
    exact, ids, demoted = DynamicCache(config=llama.config), prompt(150, 2), 0
    for part in ids.split(30, 1):
        before = full.layers[0].storage and full.layers[0].storage.anchors
        for cache in (free, full, exact):
            llama(part, past_key_values=cache)
        storage, candidates = full.layers[0].storage, free.layers[0].storage.anchors
        if storage.anchors is None:
            continue
        positions = storage.anchors.positions
        assert positions.shape[2] <= 5 and storage.anchor_scores.shape == positions.shape
        assert torch.isin(positions[0, 0], candidates.positions[0, 0]).all()
        if before is not None:
            demoted += int((~torch.isin(before.positions[0, 0], positions[0, 0])).sum())
        snapshot = storage.snapshot()
        mask = snapshot.exact_mask()
        assert mask.sum() == sum((tokens.positions >= 0).sum() for tokens in snapshot.exact_tokens)
        keys, _ = snapshot.dense_coded(0, storage.coded_length)
        assert torch.equal(keys[~mask], snapshot.decode_keys(0, storage.coded_length)[~mask])  # demoted ones too
        true = exact.layers[0].keys[:, :, : storage.coded_length]
        assert (keys - true).abs()[mask].max() <= 0.02 * true.abs().max()
    assert demoted > 0
    if score == "random":  # its scores are known: the best five of all candidates
        mixed = (candidates.positions.long() + 1) * 2654435761 + torch.arange(2).view(1, -1, 1) * 40503
        known = ((mixed ^ (mixed >> 15)) * 2246822519 % 1000003).masked_fill(candidates.positions < 0, -1)
        best = candidates.positions.gather(2, known.topk(5, -1).indices).sort(-1).values
        assert torch.equal(best, positions)


def test_other_operations_materialise_with_a_warning(llama, cache):
    llama(prompt(90), past_key_values=cache)
    keys = torch.randn(1, 2, 1, 16)
    handle, values = cache.update(keys, keys, 0)
    assert isinstance(handle, KVHandle) and handle.shape == (1, 2, 91, 16)
    assert isinstance(repeat_kv(handle, 2), KVHandle) and repeat_kv(handle, 2).shape == (1, 4, 91, 16)
    with pytest.raises(RuntimeError, match="no memory"):
        handle.data_ptr()
    with pytest.warns(UserWarning, match="decode all keys"):
        total = handle + 0
    assert type(total) is torch.Tensor
    torch.testing.assert_close(total, cache.layers[0].storage.snapshot().dense()[0])
    torch.testing.assert_close(repeat_kv(values, 2) + 0, repeat_kv(values + 0, 2))


def test_long_generation_stays_bounded(llama, cache):
    """The exact tail never exceeds window + chunk, and every coded token is one byte string of its spec."""
    llama.generate(prompt(30), past_key_values=cache, max_new_tokens=100, min_new_tokens=100, do_sample=False)
    for layer in cache.layers:
        assert layer.storage.tail_keys.shape[2] < 8 + cache.antkv_config.chunk
        assert layer.storage.key_codes.shape[-1] == 4 and layer.storage.key_codes.dtype == torch.uint8


def test_from_pretrained_and_changes(llama, codebook, tmp_path):
    codebook.save_pretrained(tmp_path)
    plain = AnTKVCache.from_pretrained(tmp_path)
    fast = AnTKVCache.from_pretrained(tmp_path, model=llama, window=24, anchor_fraction=0.25)
    assert llama.config._attn_implementation == "antkv"
    llama.set_attn_implementation("sdpa")
    assert (fast.antkv_config.window, fast.antkv_config.anchors.fraction) == (24, 0.25)
    assert plain.antkv_config == codebook.config
    out = llama.generate(prompt(60), past_key_values=plain, max_new_tokens=5)
    assert out.shape == (1, 65)


@pytest.mark.skipif(os.name == "nt", reason="no permission bits")
def test_a_saved_codebook_can_be_read_by_whom_the_umask_lets(codebook, tmp_path):
    old = os.umask(0o027)
    try:
        codebook.save_pretrained(tmp_path / "book")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "book").iterdir()} == {0o640}


def test_what_a_cache_says_of_itself(llama, codebook):
    specs = f"{codebook.config.key}/{codebook.config.value}"
    said = repr(AnTKVCache(llama.config, codebook=codebook, max_length=9))
    assert said == f"AnTKVCache({specs}, 3 of 3 layers quantized, 0 tokens, max_length=9)"


def test_encoding_a_prompt_takes_few_operations(llama, codebook):
    """On a GPU a prompt waits for the host to start every one of them, whatever its length; kernels encode."""
    counted: list[str] = []
    encode = ReferenceBackend.encode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if not operation.is_view:
                counted.append(operation.overloadpacket.__name__)
            return operation(*args, **(kwargs or {}))

    class Uncounted(ReferenceBackend):
        def encode(self, *args, **kwargs):
            before = len(counted)
            coded = encode(self, *args, **kwargs)
            del counted[before:]
            return coded

    cache = AnTKVCache(llama.config, config(), codebook)
    with torch.no_grad():
        llama(prompt(8), past_key_values=cache)
    storage = cache.layers[0].storage
    storage.backend = Uncounted()
    keys = torch.randn(1, *storage.tail_keys.shape[1:2], 200, storage.tail_keys.shape[3])
    storage.append(keys, keys)
    with Count():
        storage.commit()
    assert storage.coded_length == 192 and storage.anchors is not None
    assert len(counted) <= 96, sorted(counted)
