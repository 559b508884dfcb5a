"""Protocols against a naive dense truth, perplexities through caches, and what is made of the rows."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import random_codebook
from transformers import DynamicCache, cache_utils

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig
from antkv_hf.anchors import get_score
from antkv_hf.cache.model_rotary import model_rotary
from antkv_hf.evaluation import (
    EvaluationRow,
    Protocol,
    ProtocolEvaluator,
    cache_losses,
    evaluate,
    format_rows,
    save_codebook,
    with_rows,
)
from antkv_hf.evaluation.baselines import cache_bits, quantized_cache, tensor_bytes
from antkv_hf.evaluation.perplexity import perplexity
from antkv_hf.evaluation.protocols import choose_anchors, read_back
from antkv_hf.evaluation.windowed import windowed_attention

WINDOW, CHUNK = 16, 8


def small_config(**changes) -> AnTKVConfig:
    return AnTKVConfig.preset("1bit", window=WINDOW, chunk=CHUNK).replace(**{"anchor_fraction": 0.25, **changes})


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 128, (2, 300), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def book(llama):
    return random_codebook(llama, small_config())


@pytest.fixture(scope="module")
def rough_book(llama):
    """Centroids near nothing, so that quantization is sure to show."""
    book = random_codebook(llama, small_config())
    tables = {
        i: tuple(dataclasses.replace(t, centroids=4 * t.centroids) for t in pair) for i, pair in book.tables.items()
    }
    return AnTKVCodebook(book.config, tables, book.model)


def random_qkv(n: int, batch: int = 2, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, 4, n, 16), (batch, 2, n, 16), (batch, 2, n, 16)
    return [1.5 * torch.randn(shape, generator=g) for shape in shapes]


def layer_codec(llama, book, config):
    factory = book.codec_factory(config, model_rotary(llama.config))
    return factory(0, torch.device("cpu"), 2, 16, 16)


# -------------------------------------------------------------------- protocols
def naive(codec, config, window, query, keys, values, scale):
    """W0 (window 0) or streaming, with whole matrices and loops: nothing shared with the implementation but codecs."""
    batch, kv_heads, n, _ = keys.shape
    group = query.shape[1] // kv_heads
    positions = torch.arange(n).expand(batch, n)
    plain = codec.plain_keys(keys, positions)
    read_k = codec.decode_keys(codec.key.encode(plain), positions)
    read_v = codec.value.decode(codec.value.encode(values))
    key_error = (codec.key.decode(codec.key.encode(plain)) - plain).square().sum(-1)
    value_error = (read_v - values).square().sum(-1)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    logits = (query * scale) @ keys.repeat_interleave(group, 1).mT
    probs = logits.masked_fill(~causal, float("-inf")).softmax(-1)
    chunk, sinks = (config.chunk if window else n), config.anchors.sinks
    exact = torch.zeros(batch, kv_heads, n, dtype=torch.bool)
    for b in range(batch):
        for h in range(kv_heads):
            heads = slice(h * group, (h + 1) * group)
            for first in range(0, n, chunk):
                tokens = range(first, min(first + chunk, n))
                seen = min(first + chunk + window, n)  # queries before this one
                c = (query[b, heads, :seen].square().sum(-1) * scale**2 / query.shape[-1]).mean()
                part = values[b, h, list(tokens)]
                spread = (part - part.mean(0)).square().sum(-1).mean()
                score = {
                    j: float(
                        probs[b, heads, :seen, j].square().sum()
                        * (c * spread * key_error[b, h, j] + value_error[b, h, j])
                    )
                    for j in tokens
                    if j >= sinks
                }
                best = sorted(score, key=lambda j: -score[j])[: max(1, round(config.anchors.fraction * chunk))]
                exact[b, h, best] = True
    read_k = torch.where(exact.unsqueeze(-1), int8_keys(codec, keys, positions), read_k)
    read_v = torch.where(exact.unsqueeze(-1), int8(values), read_v)
    read_k[:, :, :sinks], read_v[:, :, :sinks] = (x[:, :, :sinks].half().float() for x in (keys, values))
    out = torch.zeros_like(query)
    for i in range(n):
        recent = torch.arange(i + 1) > i - window
        k = torch.where(recent[:, None], keys[:, :, : i + 1], read_k[:, :, : i + 1]).repeat_interleave(group, 1)
        v = torch.where(recent[:, None], values[:, :, : i + 1], read_v[:, :, : i + 1]).repeat_interleave(group, 1)
        out[:, :, i : i + 1] = ((query[:, :, i : i + 1] * scale) @ k.mT).softmax(-1) @ v
    return out


def int8(x):
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().float()
    return (x / scale).round().clamp(-127, 127) * scale


def int8_keys(codec, keys, positions):
    mean = codec.key.mean.unsqueeze(1)
    return codec.rotated_keys(int8(codec.plain_keys(keys, positions) - mean) + mean, positions)


@pytest.mark.parametrize("window", (0, WINDOW, 5))
@pytest.mark.parametrize("n", (1, 29, 64))
def test_equals_naive(llama, book, window, n):
    config, scale = small_config(window=window or WINDOW), 0.3
    codec, (q, k, v) = layer_codec(llama, book, config), random_qkv(n)
    read_k, read_v, *_ = read_back(codec, config, window, q, k, v, scale, None, None)
    out = windowed_attention(q, k, v, read_k, read_v, window, scale)
    torch.testing.assert_close(out, naive(codec, config, window, q, k, v, scale), atol=2e-5, rtol=1e-4)


def test_softcap_and_sink_logit():
    q, k, v = random_qkv(20)
    sink = torch.randn(4)
    logits = 5 * torch.tanh((q @ k.repeat_interleave(2, 1).mT) * 0.3 / 5)
    logits = logits.masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), float("-inf"))
    logits = torch.cat([logits, sink.view(1, 4, 1, 1).expand(2, 4, 20, 1)], -1)
    expected = logits.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)
    for window in (0, 7):
        out = windowed_attention(q, k, v, k, v, window, 0.3, softcap=5.0, sink_logit=sink)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_streaming_looks_at_no_later_query(llama, book):
    config, (q, k, v) = small_config(), random_qkv(64)
    errors = (torch.rand(2, 2, 64), torch.rand(2, 2, 64))
    score = get_score("error_aware")

    def chosen(query, window):
        return choose_anchors(score, config, window, query, k, v, errors, 0.3, None, None)

    limit = 2 * CHUNK + WINDOW  # queries from here on come after chunk 1 has been encoded
    later = q.clone()
    later[:, :, limit:] = 9 * torch.randn(2, 4, 64 - limit, 16, generator=torch.Generator().manual_seed(1))
    upto = 2 * CHUNK
    before, after = chosen(q, WINDOW), chosen(later, WINDOW)
    kept = 2 * 2  # two anchors in each of the first two chunks
    assert torch.equal(before[..., :kept], after[..., :kept]) and int(before[..., :kept].max()) < upto
    assert not torch.equal(before, after)
    assert not torch.equal(chosen(q, 0), chosen(later, 0)), "W0 looks at all queries"


def test_sinks_take_no_anchor_place(llama, book):
    config, (q, k, v) = small_config(anchor_fraction=1.0), random_qkv(20)
    errors = (torch.rand(2, 2, 20), torch.rand(2, 2, 20))
    score = get_score("squared_attention")
    index = choose_anchors(score, config, WINDOW, q, k, v, errors, 0.3, None, None)
    found = sorted(j for j in index[0, 0].tolist() if j >= 0)
    assert found == list(range(4, 20)), "every token but the four sinks, once"


@pytest.mark.parametrize(
    "score", ("anchor_score", "accumulated_attention", "key_norm", "first_tokens", "random", "none")
)
def test_every_score(llama, ids, book, score):
    config = small_config(anchor_score=score)
    for protocol in ("W0", f"S{WINDOW}"):
        assert math.isfinite(perplexity(llama, ids, protocol, book, config))


# -------------------------------------------------------------------- perplexity
def test_quantization_shows_and_everything_exact_hides_it(llama, ids, rough_book):
    plain = perplexity(llama, ids)
    for protocol in ("W0", f"S{WINDOW}", "cache"):
        rough = perplexity(llama, ids, protocol, rough_book, small_config(anchor_score="none", anchor_sinks=0))
        assert abs(rough / plain - 1) > 1e-3, protocol
    exact = small_config(anchor_fraction=1.0, anchor_dtype="float16", anchor_sinks=0)
    for protocol in ("W0", f"S{WINDOW}"):
        assert perplexity(llama, ids, protocol, rough_book, exact) == pytest.approx(plain, rel=2e-4)


def test_short_texts_are_exact_in_streaming(llama, ids, rough_book):
    short = ids[:, :WINDOW]
    rows = evaluate(llama, None, short, rough_book, protocols=("FP", f"S{WINDOW}", "W0"))
    assert rows[1].perplexity == pytest.approx(rows[0].perplexity, rel=1e-6)
    assert rows[2].perplexity != pytest.approx(rows[0].perplexity, rel=1e-4)


def test_identity_equals_plain(llama, ids):
    config = AnTKVConfig.preset("identity", window=WINDOW, chunk=CHUNK)
    rows = evaluate(llama, None, ids, config=config, protocols=("FP", "W0", f"S{WINDOW}", "cache"))
    assert [row.protocol for row in rows] == ["FP", "W0", f"S{WINDOW}", "cache"]
    assert all(row.ratio == pytest.approx(1.0, rel=1e-5) for row in rows)


def test_skipped_layers_stay_exact(llama, ids, rough_book):
    config = small_config(skip_layers=(0, 1))
    evaluator = ProtocolEvaluator(llama, Protocol.parse("W0"), config, rough_book)
    assert list(evaluator.plans) == [2]


def test_last_counts_the_end_of_each_window(llama, ids, book):
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(llama(ids).logits[:, -11:-1].flatten(0, 1), ids[:, -10:].flatten())
    for protocols in (["FP"], ["FP", "cache"]):
        rows = evaluate(llama, None, ids, config=AnTKVConfig.preset("identity"), protocols=protocols, last=10)
        assert all(row.perplexity == pytest.approx(math.exp(expected), rel=1e-5) and row.counted == 10 for row in rows)


@pytest.mark.parametrize("chunk", (7, 45, 128))
@pytest.mark.parametrize("last", (None, 1, 60))
def test_cache_losses_of_a_plain_cache(llama, ids, chunk, last):
    with torch.no_grad():
        logits = llama(ids).logits[:, :-1].transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none")
    found = cache_losses(llama, ids, DynamicCache(config=llama.config), last, chunk)
    torch.testing.assert_close(found, expected[:, -(last or 299) :], atol=1e-4, rtol=1e-4)


def test_batches_do_not_matter(llama, ids, book):
    for protocol in ("W0", f"S{WINDOW}", "cache"):
        one = perplexity(llama, ids, protocol, book, batch_size=1)
        assert perplexity(llama, ids, protocol, book, batch_size=2) == pytest.approx(one, rel=1e-5)


def test_bits_are_those_of_a_real_cache(llama, book):
    ids = torch.randint(3, 128, (1, 400), generator=torch.Generator().manual_seed(0))
    w0, row = evaluate(llama, None, ids, book, protocols=("W0", f"S{book.config.window}"))
    cache = AnTKVCache(llama.config, codebook=book)
    cache_losses(llama, ids, cache)
    footprint = cache.memory_footprint()
    assert (row.bits, row.bits_with_window) == (footprint.bits_per_element, footprint.bits_per_element_with_window)
    assert w0.bits == w0.bits_with_window == row.bits, "no token of W0 is exact for being recent"
    assert row.ratio is None and row.method == "d8b8/d8b8"


def test_scalar_codes_are_read_back_as_a_cache_stores_them(llama):
    """S<n> reads the keys and values of the first layer that a real cache holds of the same tokens."""
    config = AnTKVConfig.preset("ott-2bit", window=32, chunk=32)
    config = config.replace(anchor_score="outlier_tokens", anchor_max_tokens=9)
    tokens = torch.randint(3, 128, (2, 160), generator=torch.Generator().manual_seed(3))
    cache, exact = AnTKVCache(llama.config, config), DynamicCache(config=llama.config)
    for c in (cache, exact):
        llama(tokens, past_key_values=c)
    storage = cache.layers[0].storage
    keys, values = exact.layers[0].keys, exact.layers[0].values
    query = torch.randn(2, 4, 160, 16)
    read = read_back(storage.codec, config, 32, query, keys, values, 0.25, None, None)
    assert storage.coded_length == 128 and storage.anchors.positions.shape[2] == 4
    for ours, theirs in zip(read, storage.snapshot().dense_coded(0, 128)):
        torch.testing.assert_close(ours[:, :, :96], theirs[:, :, :96], atol=1e-5, rtol=1e-4)


def test_model_is_left_as_it_was(llama, ids, book, monkeypatch):
    llama.set_attn_implementation("eager")
    try:
        evaluate(llama, None, ids, book)
        assert llama.config._attn_implementation == "eager"
        monkeypatch.setattr("antkv_hf.evaluation.protocols.read_back", None)
        with pytest.raises(TypeError):
            evaluate(llama, None, ids, book, protocols=("W0",))
        assert llama.config._attn_implementation == "eager"
    finally:
        llama.set_attn_implementation("sdpa")


def test_unusable_input(llama, ids, book):
    for names, message in ((["S0"], "use W0"), (["w1"], "protocol 'w1' is unknown")):
        with pytest.raises(ValueError, match=message):
            evaluate(llama, None, ids, book, protocols=names)
    with pytest.raises(ValueError, match="last=300 must lie between 1 and 299"):
        evaluate(llama, None, ids, book, last=300)
    with pytest.raises(ValueError, match="W0 needs a codebook"):
        evaluate(llama, None, ids, protocols=["W0"])
    with pytest.raises(ValueError, match="baseline 'int4' is unknown"):
        evaluate(llama, None, ids, baselines=["int4"])
    with (
        ProtocolEvaluator(llama, Protocol.parse("W0"), None, book).active(),
        pytest.raises(ValueError, match="without padding"),
    ):
        llama(ids, attention_mask=(torch.arange(300) > 5).long().expand(2, -1), use_cache=False)
    with (
        ProtocolEvaluator(llama, Protocol.parse("W0"), None, book).active(),
        pytest.raises(ValueError, match="one-shot protocols"),
    ):
        cache_losses(llama, ids, DynamicCache(config=llama.config), chunk=50)


# -------------------------------------------------------------------- baselines and rows
@pytest.mark.parametrize("backend, module", (("quanto", "optimum"), ("hqq", "hqq")))
def test_baseline(llama, ids, backend, module):
    if importlib.util.find_spec(module) is None:
        with pytest.raises(ImportError, match=r"antkv-hf\[evaluate\]"):
            quantized_cache(f"{backend}-int4", llama.config)
        return
    wide = torch.randint(3, 128, (1, 600), generator=torch.Generator().manual_seed(0))
    rows = evaluate(llama, None, wide, baselines=[f"{backend}-int4"])
    assert rows[1].protocol == "cache" and rows[1].ratio == pytest.approx(1.0, abs=0.05)
    assert 4 < rows[1].bits < 6 and rows[1].bits_with_window >= rows[1].bits


def test_fp8_baseline(llama, ids):
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        with pytest.raises(ImportError, match="fp8 needs a newer transformers"):
            quantized_cache("fp8", llama.config)
        return
    rows = evaluate(llama, None, ids[:1], baselines=["fp8"])
    assert rows[1].ratio == pytest.approx(1.0, abs=0.01) and rows[1].perplexity != rows[0].perplexity
    scales = 3 * 2 * 16  # a number, counted as float16, for the keys and one for the values of each layer
    assert rows[1].bits == pytest.approx(8 + scales / (3 * 2 * 2 * 16 * 300)) == rows[1].bits_with_window


def test_tensor_bytes():
    held = (torch.zeros(3, dtype=torch.uint8), {"scale": torch.zeros(2), "shape": (1, 2)}, [None, 5])
    assert tensor_bytes(held) == 3 + 8 and tensor_bytes(held, widest=2) == 3 + 4
    narrow = (torch.zeros(5, dtype=torch.float8_e4m3fn), torch.zeros(3, dtype=torch.int32))
    assert tensor_bytes(narrow, widest=2) == 5 + 12


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_scales_count_as_float16(dtype):
    """Codes with scales as hqq stores them: the bits do not depend on the model's dtype, the exact window's do."""
    scale = torch.zeros(64, dtype=dtype)  # groups of 64 of 2 x 16 x 128 elements, two codes a byte
    stored = (torch.zeros(2048, dtype=torch.uint8), {"scale": scale, "zero": scale, "shape": torch.Size((2, 16, 128))})
    exact = torch.zeros(2, 16, 1, dtype=dtype)
    layer = SimpleNamespace(_quantized_keys=stored, _quantized_values=stored, keys=exact, values=exact)
    bits, in_all = cache_bits(SimpleNamespace(layers=[layer]))
    assert bits == 4 + 2 * 16 / 64
    assert in_all == pytest.approx((bits * 4096 + 8 * dtype.itemsize * 32) / 4128)


ROW = EvaluationRow("d8b8/d8b8", "S128", "wiki", 12, 2048, 2047, 18.1234567, 1.04412, 1.2166, 2.3, 61.26)


def test_report():
    long = dataclasses.replace(ROW, window=8192, counted=4096, ratio=None)
    text = format_rows([ROW, long]).splitlines()
    assert text[0].split()[:3] == ["method", "protocol", "text"]
    assert text[1].split() == [
        "d8b8/d8b8",
        "S128",
        "wiki",
        "12",
        "x",
        "2048",
        "18.123",
        "1.0441",
        "1.217",
        "2.300",
        "61.3",
    ]
    assert "12 x 8192, last 4096" in text[2] and len({line.index("S128") for line in text[1:]}) == 1
    markdown = format_rows([ROW], "markdown").splitlines()
    assert len(markdown) == 3 and all(line.startswith("| ") and line.count("|") == 10 for line in markdown)
    assert json.loads(format_rows([ROW], "json"))[0]["perplexity"] == 18.1235
    with pytest.raises(ValueError, match="'html' is unknown"):
        format_rows([ROW], "html")


def test_rows_in_a_codebook_and_its_card(book, tmp_path):
    save_codebook(book, tmp_path)
    again = dataclasses.replace(ROW, perplexity=17.0)
    other = dataclasses.replace(ROW, protocol="W0")
    measured = with_rows(with_rows(book, [ROW]), [again, other])
    assert [row["perplexity"] for row in measured.evaluation] == [17.0, 18.1235]
    save_codebook(measured, tmp_path)
    assert AnTKVCodebook.from_pretrained(tmp_path).evaluation == measured.evaluation
    assert "| 18.123 |" in (tmp_path / "README.md").read_text(encoding="utf-8")


# -------------------------------------------------------------------- the real model
@pytest.mark.slow
def test_streaming_protocol_predicts_the_cache(antkv_data):
    """S128 and the real cache agree within 3%, and one bit costs less than 5% of perplexity on common prose."""
    from antkv_hf.demo import find_codebook
    from antkv_hf.demo_model import load_demo_model
    from antkv_hf.texts import load_texts, token_windows

    try:
        book = AnTKVCodebook.from_pretrained(find_codebook())
        model, tokenizer, _ = load_demo_model()
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))
    texts = load_texts(str(antkv_data / "wikitext2" / "wiki.test.raw"))
    # The first window is a list of roles that repeats its names: copying, which costs far more than prose does.
    windows = token_windows(tokenizer, texts, 1024, 2, skip=1)
    rows = evaluate(model, tokenizer, windows, book, protocols=("FP", "S128", "cache"))
    _, streaming, cache = rows
    assert streaming.perplexity == pytest.approx(cache.perplexity, rel=0.03)
    assert abs(streaming.ratio - 1) > 1e-5 and streaming.ratio < 1.05  # by chance it may be below 1
