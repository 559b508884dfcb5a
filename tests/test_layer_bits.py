"""Specs of single layers: config, codebook, caches in every form, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import random_codebook

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig
from antkv_hf.cli_common import _codec
from antkv_hf.codebook_names import find_codebook
from antkv_hf.evaluation import inspection
from antkv_hf.evaluation.inspection import fastest_kernels, format_inspection, inspect_codebook
from antkv_hf.specs import ScalarSpec, VQSpec, describe_layers, parse_layer_bits

SPECS = {0: (VQSpec(16, 8), VQSpec(16, 8)), 2: (VQSpec(4, 8), VQSpec(8, 4, 2))}
MIXED = AnTKVConfig.preset("1bit", window=32, chunk=16, layer_specs=SPECS)


@pytest.fixture(scope="module")
def book(llama) -> AnTKVCodebook:
    return random_codebook(llama, MIXED)


def prompt(batch: int = 1, n: int = 150) -> torch.Tensor:
    return torch.randint(3, 128, (batch, n), generator=torch.Generator().manual_seed(7))


def generated(model, cache, ids, new: int = 24, **options) -> list:
    out = model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, **options)
    return out[:, ids.shape[1] :].tolist()


# -------------------------------------------------------------------- config and codebook
def test_config_round_trip():
    again = AnTKVConfig.from_dict(json.loads(json.dumps(MIXED.to_dict())))
    assert again == MIXED and hash(again) == hash(MIXED) and again.specs(2) == SPECS[2]
    assert again.specs(1) == (VQSpec(8, 8), VQSpec(8, 8))
    assert "layer_specs" not in AnTKVConfig.preset("1bit").to_dict(), "earlier versions read what has none"
    assert MIXED.bits([0, 1, 2]) == (pytest.approx(3.5 / 3), pytest.approx(2.5 / 3))
    assert MIXED.codec_name == "mixed d16b8+d8b4s2+d8b8+d4b8" and AnTKVConfig.preset("2bit").codec_name == "d4b8/d4b8"
    assert MIXED.name_codec([0, 1, 2]) == MIXED.codec_name, "layer 1 has the default"
    assert MIXED.name_codec([0, 2]) == "mixed d16b8+d8b4s2+d4b8" and MIXED.name_codec([0]) == "d16b8/d16b8"
    one = AnTKVConfig.preset("1bit").with_layer_bits("0=0.5")
    assert one.codec_name == "mixed d16b8+d8b8"


def test_layer_bits_of_the_command_line():
    config = AnTKVConfig.preset("1bit").with_layer_bits("0-1=0.5, 4=2/d16b8s2")
    half = (VQSpec(16, 8), VQSpec(16, 8))
    assert config.layer_specs == {0: half, 1: half, 4: (VQSpec(4, 8), VQSpec(16, 8, 2))}
    assert describe_layers(config.layer_specs) == "0-1: d16b8/d16b8, 4: d4b8/d16b8s2"
    scalar = AnTKVConfig.preset("ott-2bit").with_layer_bits("1=4")
    assert scalar.specs(1) == (ScalarSpec(4, 64), ScalarSpec(4, 64))
    grouped = _codec("ott-2bit", ["group=128", "layer_bits=1=4"])[1]
    assert grouped.specs(0) == (ScalarSpec(2, 128),) * 2 and grouped.specs(1) == (ScalarSpec(4, 128),) * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_layer_bits("0-9"), "cannot read '0-9' of the layer bits"),
        (lambda: parse_layer_bits("9-3=1"), "layers 9-3 run backwards: write 3-9=1"),
        (lambda: parse_layer_bits("0-3=1,2=2"), "layer 2 is named twice"),
        (lambda: parse_layer_bits("0-99999999999=1"), "layer 99999999999 of the layer bits .* end below 10,000"),
        (lambda: parse_layer_bits("0=3"), "3 bits per element do not exist"),
        (lambda: AnTKVConfig(layer_specs={-1: SPECS[0]}), "layer_specs names layer -1; count layers from 0"),
        (lambda: AnTKVConfig(layer_specs={1: VQSpec()}), "layer_specs of layer 1 is .*; give a pair"),
        (lambda: AnTKVConfig(layer_specs={1: (ScalarSpec(), ScalarSpec())}), "layer 1 holds int2g32, .* have d8b8"),
        (lambda: AnTKVConfig.preset("identity", layer_specs=SPECS), "layer 0 holds d16b8, .* the identity codec"),
        (lambda: AnTKVConfig.preset("ott-4bit", chunk=64).with_layer_bits("0=int4g128"), "chunk=64 is not a multiple"),
        (lambda: AnTKVConfig.from_dict({"layer_specs": {"x": ["d8b8", "d8b8"]}}), "layer_specs holds 'x'"),
        (lambda: AnTKVConfig.from_dict({"layer_specs": {"0": ["d8b8"]}}), "layer_specs holds '0'"),
        (lambda: AnTKVConfig.from_dict({"layer_specs": [1]}), "layer_specs is .1.: give an object"),
    ],
)
def test_bad_specs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_codebook_round_trip(llama, book, tmp_path):
    book.save_pretrained(tmp_path)
    again = AnTKVCodebook.from_pretrained(tmp_path)
    assert again.config == MIXED and again.sha256 == book.sha256
    stated = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert stated["format_version"] == 2 and stated["antkv"]["layer_specs"]["2"] == ["d4b8", "d8b4s2"]
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "1.17-bit keys, 0.833-bit values on average" in card
    assert "layers (keys/values) 0: d16b8/d16b8, 1: d8b8/d8b8, 2: d4b8/d8b4s2" in card
    uniform = random_codebook(llama, AnTKVConfig.preset("1bit"))
    uniform.save_pretrained(tmp_path / "uniform")
    stated = json.loads((tmp_path / "uniform" / "config.json").read_text(encoding="utf-8"))
    assert stated["format_version"] == 1 and "layer_specs" not in stated["antkv"]


def test_codebook_must_hold_the_specs_of_each_layer(llama, book):
    with pytest.raises(ValueError, match="layer 0, key tables: centroids has shape"):
        AnTKVCodebook(MIXED.replace(layer_specs={}), book.tables, book.model)
    with pytest.raises(ValueError, match="keys d8b8, values d8b8, rope 'pre' in layer 0, .* holds d16b8, d16b8"):
        AnTKVCache(llama.config, MIXED.replace(layer_specs={}), book)
    with pytest.raises(ValueError, match="layer_specs names layer 3, but the model has 3 layers"):
        AnTKVCache(llama.config, AnTKVConfig.preset("ott-2bit").with_layer_bits("3=4"))
    AnTKVCache(llama.config, MIXED.replace(skip_layers=(0,), layer_specs={2: SPECS[2]}), book)  # 0 is not asked for


def test_inspect_says_what_each_layer_has(book, tmp_path):
    book.save_pretrained(tmp_path)
    found = inspect_codebook(str(tmp_path))
    assert [row["key_spec"] for row in found["layer_tables"]] == ["d16b8", "d8b8", "d4b8"]
    assert found["bits"]["keys"] == 1.1667
    text = format_inspection(found)
    assert "keys        by layer, 1.1667 bits" in text and "layer 2: keys d4b8" in text
    rows = [{**found["layer_tables"][layer == 3], "layer": layer} for layer in range(7)]
    lines = [line for line in format_inspection({**found, "layer_tables": rows}).splitlines() if ": keys d" in line]
    assert [line.split(":")[0].strip() for line in lines] == ["layers 0-2, 4-6, each", "layer 3"]
    # head size 16: codes 4 + 2 and 2 x 2 bytes ...; what anchors and bitmap add is the same for every spec
    codes = 8 * (1 + 1 + 2 + 2 + 4 + 2) / (3 * 32)
    assert found["bits"]["with_anchors"] == pytest.approx(codes + 8 * (1 / 8 + (32 + 8) / 16) / 32, abs=1e-3)


def test_kernels_of_a_layer_are_named(llama, book):
    pytest.importorskip("triton")
    one, two = (AnTKVCodebook.from_pretrained(f"smollm2-135m-instruct-{bits}bit") for bits in (1, 2))
    cpu = torch.device("cpu")
    layers = [AnTKVCache(made.model_config(), codebook=made).quantized_layers[3] for made in (one, two)]
    found = [fastest_kernels(layer.plan.codec(cpu, 3, 64, 64), 3) for layer in layers]
    too_many = fastest_kernels(layers[0].plan.codec(cpu, 3, 64, 64), 16)
    assert too_many == ("triton", None), "more query heads than CUDA's take"
    assert [kernels for kernels, _ in found] == ["cuda", "cuda"]
    random = AnTKVCache(llama.config, codebook=book).quantized_layers[1]
    separated = fastest_kernels(random.plan.codec(cpu, 2, 16, 16), 2)
    assert separated == ("none", None), "its permutation separates the channels of RoPE pairs"


@pytest.mark.parametrize(
    "memory, said",
    [
        (None, "kernels: cuda (on GPUs with 81 KiB of shared memory a block)"),
        (101376, "kernels: cuda\n"),
        (65536, "kernels: triton (cuda needs 81 KiB of shared memory a block; this GPU has 64)"),
    ],
)
def test_inspect_goes_by_the_gpu_of_the_machine(memory, said, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(inspection, "local_shared_memory", lambda: memory)
    found = inspect_codebook(str(find_codebook("smollm2-135m-instruct-1bit")))
    assert found["gpu_shared_memory"] == memory
    assert {(row["kernels"], row["cuda_shared_memory"]) for row in found["layer_tables"]} == {
        ("triton" if memory == 65536 else "cuda", 82656)
    }
    assert said in format_inspection(json.loads(json.dumps(found)))


# -------------------------------------------------------------------- caches
def test_each_layer_is_coded_by_its_own_specs(llama, book):
    """A mixed cache beside one uniform cache for each pair of specs, all fed the same keys and values."""
    g = torch.Generator().manual_seed(1)
    states = [[torch.randn(2, 2, 120, 16, generator=g) for _ in "kv"] for _ in range(3)]
    mixed = AnTKVCache(llama.config, codebook=book)
    for i, (keys, values) in enumerate(states):
        mixed.update(keys, values, i)
        mixed.layers[i].storage.commit()
        key, value = MIXED.specs(i)
        only = AnTKVConfig(key, value, window=32, chunk=16, skip_layers=tuple({0, 1, 2} - {i}))
        alone = AnTKVCache(llama.config, only, AnTKVCodebook(only, {i: book.tables[i]}, book.model))
        alone.update(keys, values, i)
        alone.layers[i].storage.commit()
        found, expected = mixed.layers[i].storage, alone.layers[i].storage
        assert found.key_codes.shape[3] == key.bytes_per_vector(16)
        assert found.value_codes.shape[3] == value.bytes_per_vector(16)
        assert found.tensors().keys() == expected.tensors().keys()
        assert all(torch.equal(t, expected.tensors()[name]) for name, t in found.tensors().items())
        for a, b in zip(found.snapshot().dense(), expected.snapshot().dense()):
            assert torch.equal(a, b)
    footprint = mixed.memory_footprint()
    assert footprint.codes == 2 * 2 * 80 * (1 + 1 + 2 + 2 + 4 + 2)
    assert mixed.backends == {0: "reference", 1: "reference", 2: "reference"}


def test_tokens_are_the_same_in_every_form(llama, book, tmp_path):
    """Materialised and fast lane, fixed size, chunked prefill, saved and loaded again."""
    ids = prompt()
    expected = generated(llama, AnTKVCache(llama.config, codebook=book), ids)
    llama.set_attn_implementation("antkv")
    try:
        cache = AnTKVCache(llama.config, codebook=book)
        assert generated(llama, cache, ids) == expected
        assert generated(llama, AnTKVCache(llama.config, codebook=book, max_length=180), ids) == expected
        first = AnTKVCache(llama.config, codebook=book)
        begun = generated(llama, first, ids, new=8)
        first.save(tmp_path / "cache")
        book.save_pretrained(tmp_path / "book")
        loaded = AnTKVCache.load(tmp_path / "cache", llama, tmp_path / "book")
        assert loaded.antkv_config == MIXED
        longer = torch.cat([ids, torch.tensor(begun)], 1)
        assert begun[0] + generated(llama, loaded, longer, new=16)[0] == expected[0]
        scalar = AnTKVConfig.preset("ott-2bit", window=32, chunk=64).with_layer_bits("1=4")
        cache = AnTKVCache(llama.config, scalar)
        generated(llama, cache, ids)
        assert [layer.storage.key_codes.shape[3] for layer in cache.quantized_layers] == [4, 8, 4]
    finally:
        llama.set_attn_implementation("sdpa")
