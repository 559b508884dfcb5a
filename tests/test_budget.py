"""What a cache will take against what it takes, what fits, and what is refused."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook
from test_cli import antkv, error_of
from transformers import Gemma3TextConfig

from antkv_hf import AnTKVCache, AnTKVConfig
from antkv_hf.cache.budget import cache_bytes, choices, fit, most_bytes, most_tokens, parse_bytes
from antkv_hf.rotary import Rotary
from antkv_hf.specs import VQSpec

MIXED = AnTKVConfig.preset("1bit", window=32, chunk=16, layer_specs={1: (VQSpec(4, 8), VQSpec(8, 10))})
CONFIGS = {
    "mixed": MIXED,
    "skipped": MIXED.replace(skip_layers=(0,), anchor_dtype="float16", anchor_sinks=0),
    "no_anchors": MIXED.replace(anchor_score="none"),
    "key_norm": MIXED.replace(anchor_score="key_norm", anchor_fraction=0.2, anchor_max_tokens=5),
    "ott": AnTKVConfig.preset("ott-2bit", window=32, chunk=64).with_layer_bits("2=4"),
    "identity": AnTKVConfig.preset("identity", window=32, chunk=16),
}


def filled(model_config, config, codebook, steps, batch=2, dtype=torch.float32):
    """Footprints of a cache as `steps` of random keys and values go in, each encoded before it is looked at."""
    cache = AnTKVCache(model_config, config, codebook)
    g = torch.Generator().manual_seed(0)
    dim = model_config.head_dim
    for n in steps:
        for i, layer in enumerate(cache.layers):
            cache.update(*(torch.randn(batch, 2, n, dim, generator=g).to(dtype) for _ in "kv"), i)
            if hasattr(layer, "storage"):
                layer.storage.commit()
        yield cache.get_seq_length(), cache.memory_footprint()


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_those_of_a_filled_cache(llama, name):
    config = CONFIGS[name]
    rotary = Rotary(10000.0 ** (-torch.arange(8) / 8))  # with it, keys have noise
    book = random_codebook(llama, config, rotary=rotary) if isinstance(config.key, VQSpec) else None
    dtype = torch.float16 if name == "ott" else torch.float32
    for length, found in filled(llama.config, config, book, (20, 27, 1, 80, 15, 100), dtype=dtype):
        assert cache_bytes(llama.config, config, length, 2, dtype) == found, length


def test_dtype_is_the_one_that_the_config_states(llama):
    config = copy.deepcopy(llama.config)
    for stated, dtype in ((torch.float16, torch.float16), ("float32", torch.float32), (None, torch.bfloat16)):
        config.dtype = stated
        assert cache_bytes(config, MIXED, 200) == cache_bytes(config, MIXED, 200, dtype=dtype)


def test_hybrids_count_their_other_layers():
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    keep = AnTKVConfig.preset("identity", window=32, chunk=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length, found in filled(config, keep, None, (10, 60, 1)):
            expected = cache_bytes(config, keep, length, 2, torch.float32)
            assert expected.total == pytest.approx(found.total, rel=0.01)
            assert expected.other_layers == pytest.approx(found.other_layers, abs=16)  # their own counters


def test_most_tokens_is_the_longest_that_always_fits(llama):
    for size in (40_000, 61_234, 90_000):
        longest = most_tokens(llama.config, MIXED, size)
        taken = [cache_bytes(llama.config, MIXED, n).total for n in range(max(longest - 40, 1), longest + 2)]
        assert longest > 32 and max(taken[:-1]) <= size < max(taken)
        assert most_bytes(llama.config, MIXED, longest).total == max(taken[:-1])
    assert most_tokens(llama.config, MIXED, 10) == 0


def test_the_largest_that_fits_is_chosen(llama):
    found = choices(llama.config, tokens=4096, bytes="400kB", among=["1bit", "4bit", "ott-4bit", "2bit", "ott-2bit"])
    assert [choice.name for choice in found] == ["4bit", "2bit", "ott-4bit", "1bit", "ott-2bit"]
    total = {choice.name: choice.footprint.total for choice in found}
    assert sorted(total, key=total.get) == ["1bit", "2bit", "ott-2bit", "4bit", "ott-4bit"]
    among = [choice.name for choice in found]
    for name in ("4bit", "2bit", "1bit"):  # exactly as many bytes as it takes are enough, one less are not
        assert fit(llama.config, 4096, total[name], among=among).name == name
        if name != "1bit":
            assert fit(llama.config, 4096, total[name] - 1, among=among).name != name
    need = total["1bit"]
    message = f"1 x 4,096 tokens do not fit into {need - 7:,} bytes: 1bit, .* takes {need:,}, which is 7 more; 1 x 4,0"
    with pytest.raises(ValueError, match=message):
        fit(llama.config, 4096, need - 7, among=among)
    config = AnTKVConfig.fit(llama.config, 4096, "400kB", among=[MIXED, AnTKVConfig.preset("4bit")])
    assert config == MIXED


def test_a_cache_that_fits(tmp_path):
    model = tiny_llama()
    random_codebook(model, MIXED).save_pretrained(tmp_path)
    assert AnTKVCache.fit(model, 4096, "1MB", among=[str(tmp_path)]).antkv_config == MIXED
    assert AnTKVCache.fit(model, 4096, "4MB").antkv_config == AnTKVConfig.preset("ott-4bit")
    assert model.config._attn_implementation == "antkv"


def test_fit_takes_what_needs_no_codebook_and_codebooks_of_the_model_alone(llama, tmp_path):
    model = tiny_llama()
    random_codebook(model, MIXED).save_pretrained(tmp_path)
    one, other = AnTKVConfig.preset("1bit"), "smollm2-135m-instruct-1bit"
    for among, message in (
        ([one], "d8b8/d8b8 needs a codebook: name one .folder, Hub id., or ask AnTKVConfig.fit for its config"),
        (["ott-2bit", "1bit"], "1bit needs a codebook"),
        (["ott-2bit", other], f"{other}: this codebook was made for .*num_hidden_layers 30.*, but the model has"),
    ):
        with pytest.raises(ValueError, match=message):
            AnTKVCache.fit(model, 1000, "1GB", among=among)
    with pytest.raises(ValueError, match="on_new_prompt='x' must be"):
        AnTKVCache.fit(model, 1000, "1GB", among=["ott-2bit"], on_new_prompt="x")
    with pytest.raises(TypeError, match="max_length"):
        AnTKVCache.fit(model, 1000, "1GB", max_length=4000)
    assert model.config._attn_implementation == "sdpa", "what is refused leaves the model as it was"
    found = AnTKVCache.fit(model, 1000, "1GB", among=["identity", tmp_path, "ott-4bit"])
    assert found.antkv_config.is_identity, "it keeps the most bits"
    taken = cache_bytes(model.config, MIXED, 1000, dtype=torch.float32).total
    found = AnTKVCache.fit(model, 1000, taken + 5000, among=[tmp_path, AnTKVConfig.preset("identity")])
    assert found.antkv_config == MIXED
    model(torch.randint(3, 99, (1, 100)), past_key_values=found)
    assert found.get_seq_length() == 100
    assert choices(llama.config, 1000, among=[MIXED])[0].name == "mixed d8b8+d8b10+d4b8"
    with pytest.raises(ValueError, match="this codebook was made for"):
        AnTKVConfig.fit(llama.config, 1000, "1GB", among=[other])


def test_bad_numbers_are_refused(llama):
    assert parse_bytes("2GB") == 2 * 10**9 and parse_bytes("1.5 GiB") == 3 * 2**29 and parse_bytes(12) == 12
    assert parse_bytes(2e16) == parse_bytes("20_000 TB") == 2 * 10**16 and parse_bytes("9007199254740993") % 10 == 3
    for size in ("2 XB", "GB", "-1", 0, "i", "_1", "1__0", "\u0661GB", float("inf")):
        with pytest.raises(ValueError, match="cannot read a number of bytes in"):
            parse_bytes(size)
    for call, message in (
        (lambda: cache_bytes(llama.config, MIXED, 0), "tokens=0 must be at least 1"),
        (lambda: cache_bytes(llama.config, MIXED, 5, 0), "batch=0 must be at least 1"),
        (
            lambda: cache_bytes(llama.config, MIXED.with_layer_bits("0-99=2"), 5),
            "layer_specs names layer 3, but the mod",
        ),
        (lambda: choices(llama.config), "give a number of tokens, or of bytes"),
        (lambda: choices(llama.config, 5, among=[]), "nothing to choose among"),
        (lambda: fit(llama.config, 5, "1GB", among=["0.375bit"]), "head_dim 16 is not a multiple of sub_dim 32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_command(tmp_path):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    arguments = ("budget", tmp_path, "--tokens", 4096, "--bytes", "2MB", "--among", "4bit", "--among", "1bit")
    text = antkv(*arguments).stdout
    assert "4 code bits" in text and "tokens fit" in text and text.endswith("take 4bit\n")
    found = json.loads(antkv(*arguments, "--json", "--dtype", "float16").stdout)
    taken = cache_bytes(model.config, AnTKVConfig.preset("1bit"), 4096, dtype=torch.float16)
    assert found["choice"] == "4bit" and found["choices"][1]["footprint"]["codes"] <= taken.codes
    note = "note: the model's config names 4,096 tokens as its longest context\n"
    assert antkv(*arguments[:3], 4097, "--among", "1bit").stdout.endswith(note) and note not in text
    assert "do not fit into 1,000 bytes: 1bit" in error_of(*arguments[:4], "--bytes", "1kB", *arguments[6:])
    assert "give --tokens N, --bytes SIZE such as 2GB, or both" in error_of("budget", tmp_path)
    assert "0 tokens fit: one takes" in antkv("budget", tmp_path, "--bytes", "10", "--among", "1bit").stdout
    for command in (("budget", "--tokens", "5"), ("inspect", "--model"), ("generate",)):
        extra = ("ott-2bit", "--prompt", "x") if command == ("generate",) else ()
        assert f"there is no model folder '{tmp_path}/none'" in error_of(*command, f"{tmp_path}/none", *extra)
    assert "'ott-2bit' is a preset that needs no codebook" in error_of("inspect", "ott-2bit")
    assert "--dtype 'int8' is unknown" in error_of(*arguments, "--dtype", "int8")
