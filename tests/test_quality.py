"""The shipped codebooks on the real model: what the README says of them holds on a slice of the same text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig
from antkv_hf.demo import find_codebook
from antkv_hf.demo_model import load_demo_model, load_model
from antkv_hf.evaluation import evaluate
from antkv_hf.texts import load_texts, token_windows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    try:
        model, tokenizer, _ = load_demo_model()
    except (ImportError, OSError) as error:
        pytest.skip(f"SmolLM2 is not installed: {error}")
    return model, tokenizer


@pytest.mark.parametrize(
    ("bits", "protocols", "limits"),
    [
        ("1", ("FP", "W0", "S128", "cache"), {"W0": 1.4, "S128": 1.02, "cache": 1.02}),
        ("2", ("FP", "S128"), {"S128": 1.008}),
        ("4", ("FP", "S128"), {"S128": 1.004}),
        ("0.5", ("FP", "S128"), {"S128": 1.05}),
    ],
)
def test_perplexity_of_wikitext(smollm2, antkv_data, bits, protocols, limits):
    """The third window of 2,048 tokens; the first is by far the hardest.

    Over the first twelve the ratios are 1.254 (W0), 1.013 (S128) and, at 2 and 0.5 bits, 1.002 and 1.033 (S128). On one
    window coded keys may predict better than exact ones by chance, but never alike.
    """
    model, tokenizer = smollm2
    codebook = AnTKVCodebook.from_pretrained(find_codebook(f"smollm2-135m-instruct-{bits}bit"))
    texts = load_texts(str(antkv_data / "wikitext2" / "wiki.test.raw"))
    windows = token_windows(tokenizer, texts, 2048, count=1, skip=2)
    rows = evaluate(model, tokenizer, windows, codebook, protocols=protocols, windows=1)
    for row in rows:
        if row.protocol in limits:
            assert abs(row.ratio - 1) > 1e-5 and row.ratio <= limits[row.protocol], row
            assert row.bits <= float(bits) + (0.18 if bits != "0.5" else 0.1)


def test_scalar_codes_of_wikitext(smollm2, antkv_data):
    """Without a codebook; the same window. Over the first four S128 costs 1.097 x."""
    model, tokenizer = smollm2
    texts = load_texts(str(antkv_data / "wikitext2" / "wiki.test.raw"))
    windows = token_windows(tokenizer, texts, 2048, count=1, skip=2)
    config = AnTKVConfig.preset("ott-2bit")
    row = evaluate(model, tokenizer, windows, config=config, protocols=("FP", "S128"), windows=1)[1]
    assert 1.0 < row.ratio <= 1.10 and row.bits <= 3.2, row


@pytest.mark.parametrize(("subject", "limit"), [("ott-4bit", 1.01), ("qwen2.5-coder-1.5b-instruct-1bit", 1.03)])
def test_a_model_with_a_large_key_bias(antkv_data, subject, limit):
    """Qwen2.5-Coder-1.5B: the key bias of its first layer has norm 1,237, and ruins transformers' int4 (34.7 x)."""
    if not (folder := os.environ.get("ANTKV_QWEN")):
        pytest.skip("set ANTKV_QWEN to a folder with Qwen2.5-Coder-1.5B-Instruct (6 GB of memory)")
    model, tokenizer = load_model(folder)
    texts = load_texts(str(antkv_data / "wikitext2" / "wiki.test.raw"))
    windows = token_windows(tokenizer, texts, 1024, count=1)
    given = subject.startswith("ott-")
    book = None if given else AnTKVCodebook.from_pretrained(find_codebook(subject))
    config = AnTKVConfig.preset(subject) if given else None
    row = evaluate(model, tokenizer, windows, book, config=config, protocols=("FP", "S128"), windows=1)[1]
    assert abs(row.ratio - 1) > 1e-5 and row.ratio <= limit, row


def test_two_thousand_tokens_are_at_least_seven_times_smaller(smollm2):
    model, _ = smollm2
    cache = AnTKVCache.from_pretrained(find_codebook("smollm2-135m-instruct-1bit"))
    ids = torch.randint(10, 40_000, (1, 2048), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
    footprint = cache.memory_footprint()
    assert footprint.tokens == 2048 and footprint.compression >= 7
    assert footprint.bits_per_element <= 1.25


def test_shipped_codebooks_are_small_and_say_how_they_were_made():
    names = [
        f"{model}-{bits}bit"
        for model in ("smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct")
        for bits in ("0.5", "1", "2", "4")
    ]
    for name in names:
        folder = Path(find_codebook(name))
        codebook = AnTKVCodebook.from_pretrained(folder)
        assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
        assert codebook.calibration["command"].startswith("antkv calibrate")
        assert {row["protocol"] for row in codebook.evaluation} >= {"FP", "W0", "S128"}, name
