"""Bad input: a clear error that names the number and the way out, before any state has changed."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook
from test_cli import character_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig, VQSpec, antkv_generate
from antkv_hf.cache.model_rotary import _is_interleaved

CONFIG = AnTKVConfig(VQSpec(4, 8), VQSpec(4, 8), window=8, chunk=16)


@pytest.fixture(scope="module")
def codebook(llama):
    return random_codebook(llama, CONFIG)


@pytest.fixture
def cache(llama, codebook):
    return AnTKVCache(llama.config, codebook=codebook)


def ids(n: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 128, (batch, n), generator=torch.Generator().manual_seed(seed))


def test_codebook_of_another_model(codebook):
    for changes, message in (
        (dict(num_hidden_layers=2), "num_hidden_layers 3.*num_hidden_layers 2"),
        (dict(num_key_value_heads=4), "kv_heads 2.*kv_heads 4"),
        (dict(head_dim=32), "head_dim 16.*head_dim 32"),
    ):
        with pytest.raises(ValueError, match=message):
            AnTKVCache(tiny_llama(**changes).config, codebook=codebook)


def test_config_and_codebook_of_different_bits(llama, codebook):
    with pytest.raises(ValueError, match="asks for keys d8b8.*holds d4b8"):
        AnTKVCache(llama.config, AnTKVConfig.preset("1bit"), codebook)
    with pytest.raises(ValueError, match="needs a codebook"):
        AnTKVCache(llama.config, AnTKVConfig.preset("1bit"))
    with pytest.raises(TypeError, match="codebook="):
        AnTKVCache(llama.config, codebook)


def test_truncated_edited_and_foreign_files(codebook, tmp_path):
    codebook.save_pretrained(tmp_path)
    tables, config = tmp_path / "codebooks.safetensors", tmp_path / "config.json"
    good_tables, good_config = tables.read_bytes(), config.read_text()

    tables.write_bytes(good_tables[:-100])
    size = len(good_tables)
    with pytest.raises(ValueError, match=rf"has {size - 100:,} bytes, config.json says {size:,}"):
        AnTKVCodebook.from_pretrained(tmp_path)
    tables.write_bytes(good_tables[:-1] + bytes([good_tables[-1] ^ 1]))
    with pytest.raises(ValueError, match="sha256 .* config.json says"):
        AnTKVCodebook.from_pretrained(tmp_path)
    tables.write_bytes(good_tables)

    for edit, message in (
        (lambda d: d.update(format_version=7), "format_version 7 is not known .this antkv-hf reads 1 to 3."),
        (lambda d: d.pop("tables"), "a field is missing .*tables.*Download or make it again"),
        (lambda d: d.update(format_version="1"), r"config.json: format_version '1' is not known"),
        (lambda d: d["antkv"].update(key="d8b8"), "codebooks.safetensors: layer 0, key tables: centroids has shape"),
        (lambda d: d["antkv"].update(window=-1), r"config.json: window=-1 must be at least 1"),
        (lambda d: d["antkv"].update(key="d9"), r"config.json: cannot read codec spec 'd9'"),
        (lambda d: d["antkv"].update(wrong=1), "unknown config field 'wrong'"),
        (lambda d: d["model"].update(kv_heads=5), "kv_heads|5"),
    ):
        data = json.loads(good_config)
        edit(data)
        config.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=message):
            AnTKVCodebook.from_pretrained(tmp_path)
    config.write_text("{ no json")
    with pytest.raises(ValueError, match=r"is not the config\.json of a codebook.*Download or make it again"):
        AnTKVCodebook.from_pretrained(tmp_path)
    config.write_text(good_config)
    assert AnTKVCodebook.from_pretrained(tmp_path).config == codebook.config
    tables.unlink()
    with pytest.raises(FileNotFoundError, match=r"codebooks\.safetensors is missing. Give a folder that holds"):
        AnTKVCodebook.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repo id"):
        AnTKVCodebook.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("lane", ("sdpa", "antkv"))
def test_empty_prompt(llama, cache, lane):
    llama.set_attn_implementation(lane)
    try:
        with pytest.raises(ValueError, match="0 new tokens"):
            llama(torch.zeros(1, 0, dtype=torch.int64), past_key_values=cache)
        with pytest.raises(ValueError, match="0 new tokens"):
            llama.generate(torch.zeros(1, 0, dtype=torch.int64), past_key_values=cache, max_new_tokens=3)
    finally:
        llama.set_attn_implementation("sdpa")
    assert cache.get_seq_length() == 0


def test_reuse_with_another_prompt(llama, cache):
    llama.generate(ids(40), past_key_values=cache, max_new_tokens=4)
    held = cache.get_seq_length()
    with pytest.raises(ValueError, match=rf"holds {held} tokens of another prompt .* token 0.*reset"):
        llama.generate(ids(60, seed=1), past_key_values=cache, max_new_tokens=4)
    with pytest.raises(ValueError, match=rf"holds {held} tokens and the prompt has only 20"):
        llama.generate(ids(20), past_key_values=cache, max_new_tokens=4)
    assert cache.get_seq_length() == held, "a refused call must leave the cache as it was"
    cache.reset()
    llama.generate(ids(60, seed=1), past_key_values=cache, max_new_tokens=4)


@pytest.mark.parametrize("extra", ({}, dict(prompt_lookup_num_tokens=4), dict(num_beams=3), "custom"))
@pytest.mark.parametrize("lane", ("sdpa", "antkv"))
def test_a_prompt_without_a_new_token(llama, cache, codebook, lane, extra):
    """transformers would read it all again, behind itself, and write another text without a word."""
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    options |= dict(custom_generate=antkv_generate()) if extra == "custom" else extra
    llama.set_attn_implementation(lane)
    try:
        expected = llama.generate(ids(40), past_key_values=AnTKVCache(llama.config, codebook=codebook), **options)
        starting_over = AnTKVCache(llama.config, codebook=codebook, on_new_prompt="reset")
        for held in (cache, starting_over):
            llama(ids(40), past_key_values=held)
        with pytest.raises(ValueError, match="holds 40 tokens and the prompt has only 40, so none is new|a batch of 3"):
            llama.generate(ids(40), past_key_values=cache, **options)
        assert torch.equal(llama.generate(ids(40), past_key_values=starting_over, **options), expected)
    finally:
        llama.set_attn_implementation("sdpa")
    assert cache.get_seq_length() == 40


def test_use_cache_false_beside_a_cache(llama, cache, codebook):
    """Every step would append the whole text: 40 + 12 tokens became 546."""
    llama(ids(39), past_key_values=cache)
    with pytest.raises(ValueError, match="use_cache=False beside a cache that holds 39 tokens.*Pass use_cache=True"):
        llama.generate(ids(40), past_key_values=cache, use_cache=False, max_new_tokens=12)
    with pytest.raises(ValueError, match="use_cache=False beside antkv_generate, which decodes.*leave custom_gen"):
        llama.generate(ids(40), custom_generate=antkv_generate(codebook), use_cache=False, max_new_tokens=12)
    assert cache.get_seq_length() == 39 and not cache._is_user_defined
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    fresh = AnTKVCache(llama.config, codebook=codebook)
    llama(ids(39), past_key_values=fresh)
    expected = llama.generate(ids(40), past_key_values=fresh, **options)
    assert torch.equal(llama.generate(ids(40), past_key_values=cache, **options), expected), (
        "it goes on as if not asked"
    )


def test_reset_on_new_prompt(llama, codebook):
    cache = AnTKVCache(llama.config, codebook=codebook, on_new_prompt="reset")
    for seed, n in ((0, 40), (1, 60), (2, 20)):
        fresh = AnTKVCache(llama.config, codebook=codebook)
        options = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
        expected = llama.generate(ids(n, seed), past_key_values=fresh, **options)
        assert torch.equal(llama.generate(ids(n, seed), past_key_values=cache, **options), expected)
    with pytest.raises(ValueError, match="must be 'error' or 'reset'"):
        AnTKVCache(llama.config, codebook=codebook, on_new_prompt="ignore")


def test_batch_size_changed(llama, cache):
    llama(ids(20, batch=2), past_key_values=cache)
    with pytest.raises(ValueError, match="batch size changed from 2 to 3"):
        llama(ids(1, batch=3), past_key_values=cache)
    assert cache.get_seq_length() == 20
    with pytest.raises(ValueError, match="batch of 2 and the prompt is a batch of 3"):
        cache._guard.remember(ids(20, batch=2))
        llama.generate(ids(30, batch=3), past_key_values=cache, max_new_tokens=2)


def test_grad_enabled(cache):
    model = tiny_llama().requires_grad_(True)
    with pytest.raises(ValueError, match="require grad.*no_grad"):
        model(ids(10), past_key_values=cache)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(ids(10), past_key_values=cache)


def test_grad_in_the_fast_lane_of_layers_without_cache():
    """Gemma 2's softcap sends plain layers through our attention too: gradients must not vanish silently."""
    config = AutoConfig.for_model(
        "gemma2", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.set_attn_implementation("antkv")
    tokens = torch.randint(3, 60, (1, 9))
    with pytest.raises(ValueError, match="9 cached keys was called with grad enabled"):
        model(tokens, labels=tokens, use_cache=False)
    with torch.no_grad():
        assert model(tokens, use_cache=False).logits.shape == (1, 9, 64)


def test_removed_decoding_mode(llama, codebook):
    with pytest.raises(
        ValueError, match="decoding mode contrastive_search is not part of this transformers; use greedy"
    ):
        llama.generate(ids(9), custom_generate=antkv_generate(codebook), penalty_alpha=0.6, top_k=4, max_new_tokens=2)


def test_stop_strings_with_a_custom_function(llama, codebook):
    """transformers gives it no tokenizer, and says so; with a cache they work."""
    with pytest.raises(ValueError, match="stop strings.*tokenizer"):
        llama.generate(ids(9), custom_generate=antkv_generate(codebook), stop_strings=["x"], max_new_tokens=2)
    cache, tokenizer = AnTKVCache(llama.config, codebook=codebook), character_tokenizer()
    options = dict(stop_strings=["~~~~"], tokenizer=tokenizer, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert llama.generate(ids(9), past_key_values=cache, **options).shape == (1, 13)


def test_refused_models_and_options(llama, codebook):
    mla = AutoConfig.for_model("deepseek_v3", num_hidden_layers=2)
    with pytest.raises(ValueError, match="latent attention .kv_lora_rank=512.*DynamicCache"):
        AnTKVCache(mla, AnTKVConfig.preset("identity"))
    sliding = AutoConfig.for_model("mistral", num_hidden_layers=2, sliding_window=16)
    with pytest.raises(ValueError, match="none of the 2 layers of mistral can be quantized"):
        AnTKVCache(sliding, AnTKVConfig.preset("identity"))
    with pytest.raises(ValueError, match=r"3 skipped.*DynamicCache for this model, or leave layers out of skip_layers"):
        AnTKVCache(llama.config, AnTKVConfig.preset("identity", skip_layers=(0, 1, 2)))
    with pytest.raises(ValueError, match=r"offloading=True.*Leave offloading out"):
        AnTKVCache(llama.config, codebook=codebook, offloading=True)
    with pytest.raises(NotImplementedError, match=r"layer 2 of AnTKVCache cannot be offloaded.*fewer bits.*save"):
        AnTKVCache(llama.config, codebook=codebook).offload(2)
    with pytest.raises(ValueError, match="skip_layers names layer 9, but the model has 3 layers"):
        AnTKVCache(llama.config, CONFIG.replace(skip_layers=(0, 9)), codebook)
    with pytest.raises(ValueError, match="nothing to go by"):
        AnTKVCache(llama.config)


def test_positive_crop(llama, cache):
    llama(ids(20), past_key_values=cache)
    for crop in (cache.crop, cache.layers[0].crop):
        with pytest.raises(ValueError, match=r"crop\(5\) must not be positive"):
            crop(5)


def test_keys_of_another_kind(llama, cache):
    llama(ids(20), past_key_values=cache)
    good = torch.randn(1, 2, 1, 16)
    with pytest.raises(ValueError, match="changed from 2 x 16 to 4 x 16"):
        cache.update(good.repeat(1, 2, 1, 1), good.repeat(1, 2, 1, 1), 0)
    with pytest.raises(ValueError, match="torch.float32 on cpu to torch.bfloat16"):
        cache.update(good.bfloat16(), good.bfloat16(), 0)
    with pytest.raises(ValueError, match=r"\(1, 2, 1, 16\) and values \(1, 2, 2, 16\) do not belong together: both"):
        cache.update(good, torch.randn(1, 2, 2, 16), 0)
    with pytest.raises(ValueError, match="layer_idx 3 is beyond the 3 layers"):
        cache.update(good, good, 3)
    assert cache.get_seq_length() == 20


def test_attention_that_does_not_fit(cache):
    """As a caller of its own would meet it; models give masks and queries that fit."""
    attend = torch.nn.functional.scaled_dot_product_attention
    handles = cache.update(torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16), 0)
    query, mask = torch.randn(1, 4, 1, 16), torch.ones(1, 1, 1, 50, dtype=torch.bool)
    with pytest.raises(ValueError, match="covers 50 keys, but the cache holds 20: give a mask over all of them"):
        attend(query, *handles, attn_mask=mask, enable_gqa=True)
    for wrong in (query[..., :8], query[:, :3], query.repeat(2, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"of shape .* batch 1, 2 kv heads and head size 16: give \(batch, heads"):
            attend(wrong, *handles, enable_gqa=True)


def test_rope_of_an_unknown_form():
    module = ModuleType("modeling_odd")
    with pytest.raises(ValueError, match="pairs channel 0 with 2 in RoPE, not with 1 or 4.*use DynamicCache"):
        module.apply_rotary_pos_emb = lambda x, *_: x.roll(2, -1)
        _is_interleaved(module, 4)
    with pytest.raises(ValueError, match="modeling_odd takes arguments of an unknown form.*use DynamicCache"):
        module.apply_rotary_pos_emb = lambda x: x
        _is_interleaved(module, 4)


def test_unknown_backend_and_score(llama, codebook, monkeypatch):
    with pytest.raises(ValueError, match="score 'best' is unknown"):
        AnTKVCache(llama.config, CONFIG.replace(anchor_score="best"), codebook)
    cache = AnTKVCache(llama.config, CONFIG.replace(backend="tpu"), codebook)
    with pytest.raises(ValueError, match="backend 'tpu' is unknown"):
        llama(ids(10), past_key_values=cache)
    monkeypatch.setenv("ANTKV_BACKEND", "cuda")
    with pytest.raises(ValueError, match="'cuda' is not available on cpu"):
        llama(ids(10), past_key_values=AnTKVCache(llama.config, codebook=codebook))


def test_custom_generate_replaces_no_cache_of_the_user(llama, codebook):
    held = DynamicCache(config=llama.config)
    llama(ids(20), past_key_values=held)
    with pytest.raises(ValueError, match="is a DynamicCache of 20 tokens, which antkv_generate would replace.*leave"):
        llama.generate(ids(30), past_key_values=held, custom_generate=antkv_generate(codebook), max_new_tokens=2)
    assert held.get_seq_length() == 20


def test_rows_that_are_not_in_the_batch(llama, cache):
    llama(ids(20, batch=2), past_key_values=cache)
    before = [layer.storage.tail_keys for layer in cache.layers]
    for change, message in (
        (
            lambda: cache.reorder_cache(torch.tensor([0, 2])),
            "reorder_cache names row 2 of a batch of 2: rows run",
        ),
        (lambda: cache.reorder_cache(torch.tensor([0.0, 1.0])), "reorder_cache got rows of torch.float32: give whole"),
        (lambda: cache.batch_select_indices(torch.tensor([5])), "batch_select_indices names row 5 of a batch of 2"),
        (lambda: cache.batch_select_indices(torch.tensor([-3])), "names row -3 of a batch of 2: rows run from -2 to 1"),
        (lambda: cache.reorder_cache(torch.tensor([0, -1])), "reorder_cache names row -1 of a batch of 2: rows run"),
        (lambda: cache.batch_select_indices(torch.tensor([True])), r"got a mask \(1,\) for a batch of 2: give one of"),
        (lambda: cache.batch_repeat_interleave(0), r"repeats=0 must be at least 1.*cache.reset\(\)"),
        (lambda: cache.batch_repeat_interleave(1.5), "repeats=1.5 must be a whole number, e.g. repeats=2"),
    ):
        with pytest.raises(ValueError, match=message):
            change()
        assert all(layer.storage.tail_keys is keys for layer, keys in zip(cache.layers, before))
    cache.batch_select_indices(torch.tensor([-1, 0]))
    assert torch.equal(cache._guard.ids, ids(20, batch=2).flip(0))
    cache.batch_select_indices(torch.tensor([True, False]))
    assert cache.layers[0].batch_size == 1 and torch.equal(cache._guard.ids, ids(20, batch=2)[1:])


def test_a_prompt_with_no_new_token_after_embeddings(llama, codebook):
    """Their ids are not known, but how many they are."""
    cache = AnTKVCache(llama.config, codebook=codebook)
    llama(inputs_embeds=llama.get_input_embeddings()(ids(20)), past_key_values=cache)
    with pytest.raises(ValueError, match="it holds 20 tokens and the prompt has only 20, so none is new"):
        llama.generate(ids(20), past_key_values=cache, max_new_tokens=3)
    assert cache.get_seq_length() == 20
    llama.generate(ids(21), past_key_values=cache, max_new_tokens=3)


def test_custom_generate_starts_afresh_for_every_prompt(llama, codebook):
    generate = antkv_generate(codebook)
    options = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False)
    for extra in ({}, dict(num_beams=3), dict(prompt_lookup_num_tokens=4)):
        for seed in (0, 1):
            prompt = ids(40, seed)
            expected = llama.generate(
                prompt, past_key_values=AnTKVCache(llama.config, codebook=codebook), **options, **extra
            )
            assert torch.equal(llama.generate(prompt, custom_generate=generate, **options, **extra), expected)
