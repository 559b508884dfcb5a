"""Models spread over devices: tables and buffers follow each layer, and tokens stay those of one device."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from conftest import tiny_llama
from helpers import random_codebook
from test_calibration import calibrated, small_llama
from transformers import AutoModelForCausalLM

from antkv_hf import AnTKVCache, AnTKVConfig, VQSpec
from antkv_hf.cache.model_rotary import model_rotary

CONFIG = AnTKVConfig(VQSpec(4, 8), VQSpec(4, 8), window=8, chunk=16)
IDENTITY = AnTKVConfig.preset("identity", window=8, chunk=4)
GREEDY = dict(max_new_tokens=16, min_new_tokens=16, do_sample=False)
PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu",
          "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    llama.save_pretrained(place)
    return place


def prompt(device="cpu") -> torch.Tensor:
    return torch.randint(3, 128, (2, 60), generator=torch.Generator().manual_seed(0)).to(device)


def spread(model, first, second):
    """Layer 0 and the ends on `first`, the other layers on `second`."""
    ends = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), first)
    others = {f"model.layers.{i}": second for i in range(1, model.config.num_hidden_layers)}
    return dispatch_model(model, {**ends, **others})


@pytest.mark.parametrize("lane", ("sdpa", "antkv"))
@pytest.mark.parametrize("place", ("disk", "cpu"))
def test_offloaded_layers(llama, folder, tmp_path, lane, place):
    """Weights wait on the disk (one layer) or in the CPU's memory (all) and come for each call."""
    if place == "disk":
        offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=PLACES, offload_folder=tmp_path).eval()
    else:
        offloaded = cpu_offload(tiny_llama(), execution_device="cpu")
    assert offloaded.model.layers[1].self_attn.k_proj.weight.is_meta
    codebook = random_codebook(llama, CONFIG)
    tokens = {}
    try:
        for name, model in (("plain", llama), ("offloaded", offloaded)):
            model.set_attn_implementation(lane)
            for book, config in ((None, IDENTITY), (codebook, CONFIG)):
                cache = AnTKVCache(model.config, config, book)
                tokens[name, book is None] = model.generate(prompt(), past_key_values=cache, **GREEDY)
                assert all(layer.storage.key_codes.device.type == "cpu" for layer in cache.layers)
        plain = llama.generate(prompt(), **GREEDY)
    finally:
        llama.set_attn_implementation("sdpa")
    assert torch.equal(tokens["offloaded", True], plain)
    assert torch.equal(tokens["offloaded", False], tokens["plain", False])


@pytest.mark.gpu
@pytest.mark.parametrize("lane", ("sdpa", "antkv"))
def test_weights_in_the_memory_of_the_cpu(lane):
    """A GPU computes; codes and tables stay on it."""
    one, offloaded = tiny_llama().to("cuda:0"), cpu_offload(tiny_llama(), execution_device=torch.device("cuda:0"))
    codebook = random_codebook(one, CONFIG, rotary=model_rotary(one.config)[0])
    for config in (IDENTITY, CONFIG):
        tokens, book = [], None if config.is_identity else codebook
        for model in (one, offloaded):
            model.set_attn_implementation(lane)
            cache = AnTKVCache(model.config, config, book)
            tokens.append(model.generate(prompt("cuda:0"), past_key_values=cache, **GREEDY))
            assert {layer.storage.key_codes.device.type for layer in cache.layers} == {"cuda"}
        assert torch.equal(*tokens)


@pytest.mark.gpu
@two_gpus
def test_device_map_auto(folder):
    """As a user writes it; accelerate chooses where the layers go."""
    one = tiny_llama().to("cuda:0")
    two = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", max_memory={0: "1GB", 1: "1GB"}).eval()
    codebook = random_codebook(one, CONFIG, rotary=model_rotary(one.config)[0])
    tokens, caches = [], []
    for model in (one, two):
        model.set_attn_implementation("antkv")
        caches.append(AnTKVCache(model.config, codebook=codebook))
        tokens.append(model.generate(prompt("cuda:0"), past_key_values=caches[-1], **GREEDY))
    assert torch.equal(*tokens)
    assert {layer.storage.codec.key.mean.device.index for layer in caches[1].layers} == {0, 1}


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("lane", ("sdpa", "antkv"))
def test_layers_on_two_gpus(tmp_path, lane):
    one, two = tiny_llama().to("cuda:0"), spread(tiny_llama(), 0, 1)
    codebook = random_codebook(one, CONFIG, rotary=model_rotary(one.config)[0])
    for config in (IDENTITY, CONFIG):
        tokens, caches = [], []
        for model in (one, two):
            model.set_attn_implementation(lane)
            caches.append(AnTKVCache(model.config, config, None if config.is_identity else codebook))
            tokens.append(model.generate(prompt("cuda:0"), past_key_values=caches[-1], **GREEDY))
        assert torch.equal(*tokens)
        assert [layer.storage.key_codes.device.index for layer in caches[1].layers] == [0, 1, 1]
    codecs = [layer.storage.codec for layer in caches[1].layers]
    assert [codec.key.mean.device.index for codec in codecs] == [0, 1, 1]
    caches[1].save(tmp_path / "cache.safetensors")
    loaded = AnTKVCache.load(tmp_path / "cache.safetensors", two, codebook)
    assert [layer.storage.codec for layer in loaded.layers] == codecs, "placed once, shared by all caches"
    longer = torch.cat([tokens[1], prompt("cuda:0")[:, :5]], 1)
    expected = two.generate(longer, past_key_values=caches[1], **GREEDY)
    assert torch.equal(two.generate(longer, past_key_values=loaded, **GREEDY), expected)


@pytest.mark.gpu
@two_gpus
def test_calibration_of_a_model_on_two_gpus():
    one, two = calibrated(small_llama().to("cuda:0")), calibrated(spread(small_llama(), 0, 1))
    for name, tensor in one._tensors().items():
        torch.testing.assert_close(two._tensors()[name], tensor, msg=lambda text, name=name: f"{name}: {text}")
