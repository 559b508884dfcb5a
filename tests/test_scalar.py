"""Scalar codes without a codebook: error bounds, excluded tokens, crops inside a group, a huge key bias, any model."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import tiny_llama
from test_families import build
from transformers import DynamicCache

from antkv_hf import AnTKVCache, AnTKVConfig
from antkv_hf.anchors import best_tokens, within_budget
from antkv_hf.codecs import ChannelQuantizer, ScalarScales, TokenQuantizer
from antkv_hf.config import AnchorConfig, ScalarSpec
from antkv_hf.reference import scalar as reference

SPECS = [ScalarSpec(bits, group) for bits in (2, 4) for group in (32, 64, 128)]


def random_scales(keys: torch.Tensor, values: torch.Tensor) -> ScalarScales:
    """Means and deviations of all tokens."""
    batch, n = keys.shape[0], keys.shape[2]
    every, unknown = torch.ones(batch, n, dtype=torch.bool), torch.zeros(batch, dtype=torch.bool)
    return ScalarScales.none(keys, values).learn(keys, values, every, unknown)


def random_kv(n: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with channels of very different size, one of them far from 0."""
    g = torch.Generator().manual_seed(seed)
    channels = 2.0 ** torch.randint(-3, 4, (dim,), generator=g)
    keys, values = (torch.randn(2, 2, n, dim, generator=g) * channels for _ in range(2))
    keys[..., 1] += 900.0
    return keys, values


def ids(n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dim", (16, 64, 80, 128))
def test_codes_are_within_half_a_step(spec, dim):
    keys, values = random_kv(3 * spec.group - 5, dim)  # the last group is smaller
    scales = random_scales(keys, values)
    key, value = ChannelQuantizer(spec, dim), TokenQuantizer(spec, dim)
    codes, found = key.encode(keys, scales)
    assert codes.dtype == torch.uint8 and codes.shape[-1] == dim * spec.bits // 8
    assert found.starts.tolist() == [0, spec.group, 2 * spec.group]
    step = found.of_tokens(0, keys.shape[2])[0].float()
    # zero and scale are rounded to 11 bits, of a range of 2**bits steps
    rounding = 2.0**-11 * (found.of_tokens(0, keys.shape[2])[1].float().abs() + spec.levels * step) + 1e-4
    assert ((key.decode(codes, found) - keys).abs() <= step / 2 + rounding).all()
    rows = value.encode(values, scales)
    assert 8 * rows.shape[-1] / dim == value.bits_per_element
    if dim % spec.group == 0:
        assert value.bits_per_element == spec.bits_per_element
    parts = ((values - scales.value_mean.unsqueeze(2)) / scales.value_std.unsqueeze(2)).split(spec.group, -1)
    errors = ((value.decode(rows, scales) - values) / scales.value_std.unsqueeze(2)).split(spec.group, -1)
    for part, error in zip(parts, errors):
        width = part.amax(-1, keepdim=True) - part.amin(-1, keepdim=True)
        assert (error.abs() <= width / (spec.levels - 1) / 2 * 1.01 + 4e-3).all()


def test_weighted_sum_and_any_span_equal_decode():
    spec = ScalarSpec(2, 32)
    keys, values = random_kv(100, 48)
    scales = random_scales(keys, values)
    key, value = ChannelQuantizer(spec, 48), TokenQuantizer(spec, 48)
    codes, found = key.encode(keys, scales)
    whole, rows, weights = key.decode(codes, found), value.encode(values, scales), torch.rand(2, 2, 5, 100)
    torch.testing.assert_close(
        value.weighted_sum(weights, rows, scales), weights @ value.decode(rows, scales), atol=1e-3, rtol=1e-4
    )
    for start, stop in ((0, 1), (31, 33), (40, 100)):
        assert torch.equal(key.decode(codes[:, :, start:stop], found, start), whole[:, :, start:stop])
    left = found.crop(70)  # inside the third group: what is left of it reads as before
    assert left.starts.tolist() == [0, 32, 64]
    assert torch.equal(key.decode(codes[:, :, :70], left), whole[:, :, :70])


def test_excluded_tokens_do_not_widen_a_range():
    x = torch.randn(1, 1, 64, 16)
    x[:, :, 40] = 1000.0
    excluded = torch.zeros(1, 1, 64, dtype=torch.bool)
    excluded[..., 40] = True
    codec, scales = ChannelQuantizer(ScalarSpec(2, 64), 16), ScalarScales.none(x, x)
    _, wide = codec.encode(x, scales)
    codes, found = codec.encode(x, scales, excluded)
    assert wide.scale.min() > 300 and found.scale.max() < 4
    others = x[:, :, ~excluded[0, 0]]
    assert torch.equal(found.zero[:, :, 0], others.amin(2).half())
    decoded = codec.decode(codes, found)[:, :, 40]  # its code is the nearest that there is
    torch.testing.assert_close(decoded, others.amax(2), atol=1e-2, rtol=1e-2)
    _, empty = codec.encode(x, scales, torch.ones_like(excluded))
    assert empty.zero.eq(0).all() and empty.scale.gt(0).all()


def test_zero_range_and_numbers_beyond_float16():
    x = torch.full((1, 1, 3, 4), -7.0)
    scale, zero = reference.scale_and_zero(x, 2, 2)
    assert torch.equal(reference.dequantize(reference.quantize(x, scale, zero, 2), scale, zero), x)
    scale, zero = reference.scale_and_zero(torch.tensor([[-1e6, 1e6]]), 2, 1)
    assert scale.isfinite().all() and zero.isfinite().all()


def test_budget_of_a_stream_is_that_of_one_piece():
    """Chunk by chunk or at once, the same candidates find a place, ties included."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (2, 2, 40), generator=g).float()
    scores[scores == 0] = float("-inf")
    for places in (1, 5, 40):
        held, survived = scores[..., :0], []
        for chunk in scores.split(4, -1):
            survived.append(within_budget(held, chunk, 1, places))
            held = torch.cat([held, survived[-1]], -1)
            held = held.gather(2, best_tokens(held, places))
        assert torch.equal(torch.cat(survived, -1), within_budget(scores[..., :0], scores, 10, places))
        best = scores.sort(-1, descending=True).values[..., :places]
        assert torch.equal(held.sort(-1, descending=True).values, best)


CONFIG = AnTKVConfig.preset("ott-4bit", group=32, window=8, chunk=32)


def test_outlier_tokens_are_traced_while_decoding():
    """OTT's pool, token by token: of the tokens coded so far the three with the smallest keys stay exact."""
    config = CONFIG.replace(anchor_score="outlier_tokens", anchor_fraction=0.07, anchor_max_tokens=3, anchor_sinks=0)
    cache, g = AnTKVCache(tiny_llama(num_hidden_layers=1).config, config), torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 200, 16, generator=g) for _ in range(2))
    keys[..., 5] += 30.0  # the outlier channel: a small key there is an outlier token
    small = {20: 0.5, 50: 0.4, 51: 0.3, 90: 0.6, 120: 0.1, 150: 0.7}  # token -> size of its key
    for token, size in small.items():
        keys[:, :, token] *= size
    pools = []
    for n in range(200):
        cache.update(keys[:, :, n : n + 1], values[:, :, n : n + 1], 0)
        storage = cache.layers[0].storage
        if storage.anchors is not None and storage.coded_length != (pools[-1][0] if pools else 0):
            positions = storage.anchors.positions
            pools.append((storage.coded_length, *(positions[0, h][positions[0, h] >= 0].sort().values for h in (0, 1))))
    assert [coded for coded, *_ in pools] == [32, 64, 96, 128, 160]
    for coded, *heads in pools:
        seen = sorted((size, token) for token, size in small.items() if token < coded)[:3]
        for kept in heads:
            assert len(kept) <= 3 and {token for _, token in seen} <= set(kept.tolist())
    assert pools[-1][1].tolist() == [50, 51, 120], "20 and 90 have made room for better ones"
    dense = storage.snapshot().dense()[0][:, :, [50, 51, 120]]
    torch.testing.assert_close(dense, keys[:, :, [50, 51, 120]], atol=0.01 * 30 / 2, rtol=0)


@pytest.mark.parametrize("max_tokens", (0, 3))
def test_a_prompt_in_chunks_gives_the_codes_of_one_pass(llama, max_tokens):
    """Also with padding: means come from the first chunk with a real token, and groups from absolute indices."""
    config = CONFIG.replace(anchor_max_tokens=max_tokens)
    prompt, mask = ids(150, 2), torch.ones(2, 150, dtype=torch.int64)
    mask[1, :70] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    caches = [AnTKVCache(llama.config, config) for _ in range(2)]
    for cache, cuts in zip(caches, ((0, 150), (0, 33, 34, 99, 150))):
        for start, stop in pairwise(cuts):
            part = dict(attention_mask=mask[:, :stop], position_ids=positions[:, start:stop])
            llama(prompt[:, start:stop], past_key_values=cache, **part)
    for one, two in zip(*(cache.layers for cache in caches)):
        one.storage.commit()
        two.storage.commit()
        ours, theirs = one.storage.tensors(), two.storage.tensors()
        assert list(ours) == list(theirs) and one.storage.coded_length == 128
        assert torch.equal(ours["anchors.positions"], theirs["anchors.positions"])
        real = slice(70, 128)
        for name in ("key_codes", "value_codes"):
            assert (ours[name][1, :, real] == theirs[name][1, :, real]).float().mean() > 0.99
        torch.testing.assert_close(ours["scales.key_mean"], theirs["scales.key_mean"], atol=1e-5, rtol=1e-4)


def test_a_crop_inside_a_group_keeps_what_is_left(llama):
    cache = AnTKVCache(llama.config, CONFIG)
    llama(ids(120), past_key_values=cache)
    before = [layer.storage.snapshot().dense() for layer in cache.layers]
    cache.crop(-(120 - 45))
    for layer, dense in zip(cache.layers, before):
        for ours, old in zip(layer.storage.snapshot().dense(), dense):
            torch.testing.assert_close(ours, old[:, :, :45])
    llama(ids(90, seed=1), past_key_values=cache)  # groups now begin at 45 and 77
    storage = cache.layers[0].storage
    assert storage.scales.starts.tolist() == [0, 32, 45, 77]
    keys = storage.snapshot().dense_coded(0, storage.coded_length)[0]
    assert torch.equal(keys[:, :, :45], before[0][0][:, :, :45])


def test_bits_are_honest(llama):
    """What the footprint counts is every buffer; the parts of a code are as large as the spec says."""
    cache = AnTKVCache(llama.config, AnTKVConfig.preset("ott-2bit"))
    llama(ids(1200), past_key_values=cache)
    footprint = cache.memory_footprint()
    held = sum(t.numel() * t.element_size() for x in cache.layers for t in x.storage.tensors().values())
    bitmaps = sum(layer.storage.exact_bits.numel() for layer in cache.layers)
    assert footprint.total == held + bitmaps
    storage, coded = cache.layers[0].storage, cache.layers[0].storage.coded_length
    assert coded == 1024 and storage.key_codes.shape[-1] == 4 and storage.value_codes.shape[-1] == 4 + 4
    shared = sum(t.numel() * t.element_size() for n, t in storage.scales.tensors().items() if n in ("scale", "zero"))
    assert 8 * shared == 32 / 32 * 2 * coded * 16  # a bit an element of keys
    assert footprint.codes / (coded * 2 * 3) == pytest.approx(4 + 2 + 8, rel=0.03)


def int4_by_token(keys: torch.Tensor) -> torch.Tensor:
    """Keys after RoPE in 4 bits, each token's channels sharing a scale, as transformers' quantized caches do it."""
    scale, zero = reference.scale_and_zero(keys, 4, -1)
    return reference.dequantize(reference.quantize(keys, scale, zero, 4), scale, zero)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_huge_key_bias_costs_nothing(dtype):
    """Qwen2.5's first layer has a key bias of norm 1,237; without taking it off, 4 bits lose everything else."""
    model, plain = (tiny_llama(attention_bias=True) for _ in range(2))
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.view(2, 16)[:, (7, 15)] = torch.tensor([1050.0, -650.0])
    model, plain = model.to(dtype), plain.to(dtype)

    def error_of(model, make) -> float:
        """Of logits after a prompt of 400 tokens, which `make` turns into a cache."""
        exact, cache = DynamicCache(config=model.config), make(model)
        outs = [model(ids(60, seed=1), past_key_values=c).logits.float() for c in (filled(model, exact), cache)]
        return float((outs[1] - outs[0]).norm() / outs[0].norm())

    def filled(model, cache):
        model(ids(400), past_key_values=cache)
        return cache

    def ours(model):
        return filled(model, AnTKVCache(model.config, AnTKVConfig.preset("ott-4bit", window=8)))

    def int4(model):
        cache = filled(model, DynamicCache(config=model.config))
        for layer in cache.layers:
            layer.keys = int4_by_token(layer.keys.float()).to(dtype)
        return cache

    biased, unbiased = error_of(model, ours), error_of(plain, ours)
    assert biased < 1.5 * unbiased < 0.03
    assert error_of(model, int4) > 20 * biased
    assert error_of(plain, int4) < 0.1  # it is the bias


MODES = {
    "greedy": {},
    "beams": dict(num_beams=3, num_return_sequences=2),
    "prompt_lookup": dict(prompt_lookup_num_tokens=5),
    "chunked_prefill": dict(prefill_chunk_size=24),
    "assisted": {},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_generate_writes_what_the_exact_model_would(llama, mode):
    """By the exact model's logits each token is the best one or nearly so; beams are nearly as likely as exact ones."""
    prompt = ids(60)
    prompt = torch.cat([prompt, prompt[:, 10:50]], 1)
    options = dict(max_new_tokens=40, min_new_tokens=40, do_sample=False, **MODES[mode])
    if mode == "assisted":
        options["assistant_model"] = tiny_llama()
    cache = AnTKVCache(llama.config, CONFIG)
    out = llama.generate(prompt, past_key_values=cache, **options)
    assert cache.layers[0].storage.coded_length >= 96

    def judged(tokens):
        logits = llama(tokens).logits[:, 99:-1]
        logits[..., 2] = float("-inf")  # min_new_tokens forbids the end
        return logits, logits.log_softmax(-1).gather(2, tokens[:, 100:, None]).squeeze(2)

    logits, said = judged(out)
    if "num_beams" in MODES[mode]:
        exact = judged(llama.generate(prompt, **options))[1]
        assert said.mean() > exact.mean() - 0.01
    else:
        best = logits.log_softmax(-1).amax(-1)
        assert (best - said).max() < 0.05 and (best == said).float().mean() > 0.8


@pytest.mark.parametrize("family", ("gpt2", "phi", "cohere", "gpt_oss", "qwen3"))
@pytest.mark.filterwarnings("ignore:AnTKVCache quantizes")
def test_any_model_without_a_codebook(family):
    """No RoPE, partial and interleaved RoPE, hybrids with attention sinks; a wrong turn of keys would cost about 1."""
    built = build(family)
    model = built.model
    model.set_attn_implementation("antkv")
    errors = []
    for name in ("ott-4bit", "ott-2bit"):
        cache = AnTKVCache(model.config, AnTKVConfig.preset(name, group=32, window=8, chunk=32))
        exact = DynamicCache(config=model.config)
        assert len(cache.quantized_layers) == built.quantized
        for part in (ids(110) % 64, ids(9, seed=1) % 64):  # its vocabulary
            out, expected = (model(part, past_key_values=c).logits for c in (cache, exact))
        assert cache.quantized_layers[-1].storage.coded_length == 96
        errors.append(float((out - expected).norm() / expected.norm()))
    four, two = errors  # 0.05 to 0.12 and 0.20 to 0.44
    assert four < 0.16 and 3 * four < two


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnTKVConfig.preset("ott-3bit"), "3 bits do not exist without a codebook; choose ott-2bit or ott-4bit"),
        (lambda: AnTKVConfig.preset("ott-2bit", group=48), r"group=48 does not exist; choose one of \(32, 64, 128\)"),
        (lambda: AnTKVConfig.preset("2bit", group=32), "group=32 belongs to the presets ott-2bit and ott-4bit"),
        (lambda: AnTKVConfig.preset("ott-2bit", chunk=48), "chunk=48 is not a multiple of the 32 tokens"),
        (lambda: AnTKVConfig.preset("ott-2bit").replace(key=AnTKVConfig().key), "specs of different kinds"),
        (lambda: ScalarSpec(3), r"3-bit scalar codes do not exist; choose one of \(2, 4\)"),
        (lambda: ScalarSpec.parse("int2"), "write it as int<bits>g<group>"),
        (lambda: AnchorConfig(max_tokens=-1), "max_tokens=-1 must not be negative"),
        (lambda: AnTKVConfig.preset("ott-2bit").vq_specs(), "codec int2g32 has no tables"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_codebook_is_refused(llama):
    from helpers import random_codebook

    book = random_codebook(llama, AnTKVConfig.preset("1bit"))
    with pytest.raises(ValueError, match="codec int4g32 needs no codebook"):
        AnTKVCache(llama.config, CONFIG, book)


def test_config_as_json():
    for name, options in (("ott-2bit", {}), ("ott-4bit", dict(group=128)), ("ott-2bit", dict(key="int4g64"))):
        config = AnTKVConfig.preset(name, **options)
        assert AnTKVConfig.from_dict(config.to_dict()) == config
    assert str(AnTKVConfig.preset("ott-2bit", key=4).key) == "int4g64"
    assert [str(s) for s in (AnTKVConfig.preset("ott-2bit").key, AnTKVConfig.preset("ott-2bit").value)] == [
        "int2g32", "int2g64",
    ]  # fmt: skip
