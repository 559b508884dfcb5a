"""With the identity codec a cache equals `DynamicCache`, token for token, in every mode and lane."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

from antkv_hf import AnTKVCache, AnTKVConfig
from antkv_hf.cache.interface import antkv_attention_forward

NEW_TOKENS = 24
LANES = ("sdpa", "antkv", "eager")


def identity_cache(model, **changes) -> AnTKVCache:
    """Small windows and chunks, so that tokens really go through the codes."""
    return AnTKVCache(model.config, AnTKVConfig.preset("identity", window=8, chunk=4, **changes))


@pytest.fixture(scope="module")
def prompts():
    g = torch.Generator().manual_seed(1)
    one = torch.randint(3, 128, (1, 50), generator=g)
    one = torch.cat([one, one[:, 10:30], one[:, 10:22]], 1)  # repeats: prompt lookup finds candidates
    batch = torch.randint(3, 128, (3, 60), generator=g)
    mask = torch.ones_like(batch)
    for row, padding in ((1, 37), (2, 9)):
        batch[row, :padding], mask[row, :padding] = 0, 0
    return {
        "one": dict(input_ids=one, attention_mask=torch.ones_like(one)),
        "left_padded": dict(input_ids=batch, attention_mask=mask),
    }


MODES = {
    "greedy": ("one", {}),
    "greedy_left_padded": ("left_padded", {}),
    "beam4_left_padded": ("left_padded", dict(num_beams=4)),
    "beam3_return2": ("one", dict(num_beams=3, num_return_sequences=2)),
    "chunked_prefill": ("one", dict(prefill_chunk_size=24)),
    "chunked_prefill_left_padded": ("left_padded", dict(prefill_chunk_size=24)),
    "prompt_lookup_5": ("one", dict(prompt_lookup_num_tokens=5)),
    "prompt_lookup_40": ("one", dict(prompt_lookup_num_tokens=40)),
    "sampling": ("left_padded", dict(do_sample=True, top_p=0.9, num_return_sequences=2)),
}


def generate(model, inputs, cache, **options):
    torch.manual_seed(7)
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, **options}
    return model.generate(**inputs, past_key_values=cache, **options)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.*decode all keys")
def test_equals_dynamic_cache(llama, prompts, lane, mode):
    name, options = MODES[mode]
    llama.set_attn_implementation("eager" if lane == "eager" else "sdpa")
    expected = generate(llama, prompts[name], DynamicCache(config=llama.config), **options)
    llama.set_attn_implementation(lane)
    try:
        cache = identity_cache(llama)
        out = generate(llama, prompts[name], cache, **options)
    finally:
        llama.set_attn_implementation("sdpa")
    assert torch.equal(out, expected)
    assert all(layer.storage.coded_length > 40 for layer in cache.layers), "nothing was coded: the test shows nothing"


def test_chunks_without_padding_need_no_mask(llama, monkeypatch):
    """The "antkv" lane counts causality from the end, in layers that are not quantized too."""
    model = copy.deepcopy(llama)
    ids = torch.randint(3, 128, (2, 90), generator=torch.Generator().manual_seed(1))
    masks = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return antkv_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "antkv", attend)
    logits = {}
    for lane, cache in (
        ("antkv", identity_cache(model, skip_layers=(1,))),
        ("sdpa", DynamicCache(config=model.config)),
    ):
        model.set_attn_implementation(lane)
        parts = [model(ids[:, i : i + 30], past_key_values=cache).logits for i in range(0, 90, 30)]
        logits[lane] = torch.cat(parts, 1)
    assert len(masks) == 9 and all(mask is None for mask in masks)
    torch.testing.assert_close(logits["antkv"], logits["sdpa"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lane", ("sdpa", "antkv"))
def test_assisted_decoding(llama, prompts, lane):
    expected = generate(llama, prompts["one"], DynamicCache(config=llama.config))
    llama.set_attn_implementation(lane)
    try:
        out = generate(llama, prompts["one"], identity_cache(llama), assistant_model=llama)
    finally:
        llama.set_attn_implementation("sdpa")
    assert torch.equal(out, expected)


def test_turns_after_prompt_lookup_are_coded_again(llama, prompts):
    cache = identity_cache(llama)
    said = generate(llama, prompts["one"], cache, prompt_lookup_num_tokens=3)
    nxt = dict(input_ids=said, attention_mask=torch.ones_like(said))
    out = generate(llama, nxt, cache, max_new_tokens=60, min_new_tokens=60)
    expected = generate(llama, nxt, DynamicCache(config=llama.config), max_new_tokens=60, min_new_tokens=60)
    assert torch.equal(out, expected)
    assert all(layer.storage.tail_keys.shape[2] < 8 + 4 + 1 for layer in cache.layers)


def test_multi_turn_and_deepcopy(llama, prompts):
    first, cache = prompts["one"], identity_cache(llama)
    said = generate(llama, first, cache)
    fork = copy.deepcopy(cache)
    for turn in (5, 7):
        nxt = dict(input_ids=torch.cat([said, torch.full((1, turn), 9)], 1))
        expected = generate(llama, nxt, DynamicCache(config=llama.config))
        assert torch.equal(generate(llama, nxt, copy.deepcopy(fork)), expected)
    assert fork.layers[0].storage.codec is cache.layers[0].storage.codec


def test_crop_into_coded_tokens(llama, prompts):
    inputs, cache = prompts["one"], identity_cache(llama)
    expected = generate(llama, inputs, cache)
    assert cache.layers[0].storage.coded_length > 60
    cache.crop(-(cache.get_seq_length() - 30))
    assert cache.get_seq_length() == 30
    assert cache.layers[0].storage.coded_length == 30
    assert torch.equal(generate(llama, inputs, cache), expected)


def test_batch_selection_and_repetition(llama, prompts):
    ids = prompts["left_padded"]["input_ids"][:, -20:]
    dense, ours = DynamicCache(config=llama.config), identity_cache(llama)
    for cache in (dense, ours):
        llama(ids, past_key_values=cache)
        llama(ids[:, :3], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0, 3]))
        cache.reorder_cache(torch.tensor([2, 1, 1]))
    out = [llama(ids[:, :5], past_key_values=cache).logits for cache in (dense, ours)]
    torch.testing.assert_close(out[0], out[1], atol=1e-5, rtol=1e-5)


def test_reset(llama, prompts):
    cache = identity_cache(llama)
    generate(llama, prompts["left_padded"], cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    out = generate(llama, prompts["one"], cache)
    assert torch.equal(out, generate(llama, prompts["one"], DynamicCache(config=llama.config)))


def test_autocast_and_bfloat16(llama, prompts):
    from conftest import tiny_llama

    inputs = prompts["one"]
    with torch.autocast("cpu", torch.bfloat16):
        expected = llama(**inputs, past_key_values=DynamicCache(config=llama.config)).logits
        out = llama(**inputs, past_key_values=identity_cache(llama)).logits
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    half = tiny_llama().to(torch.bfloat16)
    expected = half(**inputs, past_key_values=DynamicCache(config=half.config)).logits
    out = half(**inputs, past_key_values=identity_cache(half)).logits
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
