"""The bias of coded tokens: its formula, what it is good for, and every place in PyTorch that adds it."""

from dataclasses import replace

import pytest
import torch
from helpers import pair_tables, random_codebook, random_noise
from transformers import LlamaConfig, LlamaForCausalLM

from antkv_hf import AnTKVCache, AnTKVCodebook
from antkv_hf.calibration import straight_through
from antkv_hf.calibration.noise import with_noise
from antkv_hf.codebook import CONFIG_FILE
from antkv_hf.codecs import VectorQuantizer
from antkv_hf.config import AnchorConfig, AnTKVConfig, VQSpec
from antkv_hf.evaluation.protocols import Protocol, ProtocolEvaluator
from antkv_hf.evaluation.windowed import windowed_attention
from antkv_hf.reference.code_bias import LARGEST, code_bias, with_bias_channel
from antkv_hf.rotary import Rotary

WINDOW, CHUNK = 16, 8
ROTARY = Rotary(10000.0 ** (-torch.arange(8) / 8))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def config():
    return AnTKVConfig.preset("1bit", window=WINDOW, chunk=CHUNK).replace(
        anchors=AnchorConfig(fraction=0.25, dtype="float16", sinks=2)
    )


@pytest.fixture(scope="module")
def book(llama, config):
    """Random tables whose keys have noise."""
    return random_codebook(llama, config, rotary=ROTARY)


def ids(count: int = 1, n: int = 90) -> torch.Tensor:
    return torch.randint(3, 128, (count, n), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- formula
@pytest.mark.parametrize("spec", ["d2b8", "d8b8", "d16b8s2"])
def test_formula(spec):
    spec = VQSpec.parse(spec)
    noise = random_noise(spec, 2, 16)
    g = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(16, generator=g), torch.randperm(16, generator=g)])
    query = 0.7 * torch.randn(3, 2, 4, 5, 16, generator=g)
    found = code_bias(query, noise, order, 0.3)
    assert found.max() < LARGEST
    for b, h, r, i in ((0, 0, 0, 0), (2, 1, 3, 4), (1, 0, 2, 3)):
        q = query[b, h, r, i][order[h]].view(-1, spec.sub_dim)
        expected = sum(0.5 * 0.3**2 * part @ noise[h, s] @ part for s, part in enumerate(q))
        torch.testing.assert_close(found[b, h, r, i], expected)
    assert (found >= 0).all()
    assert code_bias(100 * query, noise, order, 0.3).max() == LARGEST


def test_it_restores_the_mass_of_many_coded_tokens():
    """Of Gaussian errors it is the exact correction: without it coded tokens lose a third of their mass here."""
    g = torch.Generator().manual_seed(0)
    spec, n, scale = VQSpec(8, 8), 200_000, 0.25
    noise, order = random_noise(spec, 1, 16), torch.arange(16).view(1, 16)
    read = torch.randn(n, 16, generator=g)
    lost = torch.randn(2, n, 8, generator=g) @ torch.linalg.cholesky(noise[0] + 1e-6 * torch.eye(8)).mT
    query = torch.randn(16, generator=g)
    exact = ((read + torch.cat([*lost], 1)) @ query * scale).logsumexp(0)
    coded = (read @ query * scale).logsumexp(0)
    bias = code_bias(query.view(1, 1, 1, 1, 16), noise, order, scale).item()
    assert exact - coded > 0.3
    assert abs(exact - coded - bias) < 0.02


def test_the_channel_adds_the_bias_where_a_key_is_coded():
    torch.manual_seed(2)
    query, keys = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    bias, coded = torch.rand(2, 4, 3), torch.rand(2, 2, 5) > 0.5
    q, k = with_bias_channel(query, keys, bias, coded, 0.4)
    logits = 0.4 * q @ k.repeat_interleave(2, 1).mT
    expected = 0.4 * query @ keys.repeat_interleave(2, 1).mT
    expected = expected + bias.unsqueeze(-1) * coded.repeat_interleave(2, 1).unsqueeze(2)
    torch.testing.assert_close(logits, expected)


# ---------------------------------------------------------------- attention
def naive(query, keys, values, read_keys, read_values, window, scale, softcap, bias, coded):
    """Every logit by itself."""
    n, group = query.shape[2], query.shape[1] // keys.shape[1]
    wide = lambda x: x.repeat_interleave(group, 1)
    cap = (lambda x: softcap * torch.tanh(x / softcap)) if softcap else (lambda x: x)
    old = torch.arange(n).view(1, -1) <= torch.arange(n).view(-1, 1) - window
    raised = cap(scale * query @ wide(read_keys).mT) + bias.unsqueeze(-1) * wide(coded).unsqueeze(2)
    logits = torch.where(old, raised, cap(scale * query @ wide(keys).mT))
    probs = logits.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    return (probs * old) @ wide(read_values) + (probs * ~old) @ wide(values)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [0, 5, 16, 100])
def test_evaluation_and_fine_tuning(window, softcap):
    g = torch.Generator().manual_seed(window)
    rand = lambda *size: torch.randn(*size, generator=g)
    q, k, v, rk, rv = rand(2, 4, 37, 8), *(rand(2, 2, 37, 8) for _ in range(4))
    bias, coded = rand(2, 4, 37).abs(), rand(2, 2, 37) > 0
    expected = naive(q, k, v, rk, rv, window, 0.3, softcap, bias, coded)
    for attend in (windowed_attention, straight_through.windowed_attention):
        with torch.no_grad():
            out = attend(q, k, v, rk, rv, window, 0.3, softcap, None, bias, coded)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_the_student_attends_as_the_evaluator_does(llama, config, book):
    from antkv_hf.calibration.intercept import frozen_for_statistics

    for protocol in (Protocol.parse("W0"), Protocol.parse(f"S{WINDOW}")):
        with torch.no_grad():
            with ProtocolEvaluator(llama, protocol, config, book).active():
                expected = llama(ids(2), use_cache=False).logits
            with frozen_for_statistics(llama, straight_through.NAME):
                student = straight_through.Student(llama, book)
                with student.active(protocol.window):
                    found = llama(ids(2), use_cache=False).logits
            plain = {i: (replace(key, noise=None), value) for i, (key, value) in book.tables.items()}
            with ProtocolEvaluator(llama, protocol, config, AnTKVCodebook(config, plain, book.model)).active():
                without = llama(ids(2), use_cache=False).logits
        # Anchors of an evaluation went through float16; a code may tip over between two centroids that are as near.
        assert (found - expected).abs().median() < 0.005 * expected.std()
        assert (without - expected).abs().median() > 0.05 * expected.std()


@pytest.mark.parametrize("padding", [0, 11])
def test_a_cache_raises_coded_tokens_alone(llama, book, padding):
    """One decode step of the first layer equals dense attention in which only coded tokens got b(q)."""
    cache = AnTKVCache(llama.config, codebook=book)
    tokens, mask = ids(1, 91), torch.ones(1, 91, dtype=torch.long)
    mask[:, :padding] = 0
    positions = (torch.arange(91) - padding).clamp_min(0).unsqueeze(0)
    with torch.no_grad():
        llama(tokens[:, :90], attention_mask=mask[:, :90], position_ids=positions[:, :90], past_key_values=cache)
        storage = cache.layers[0].storage
        before = storage.snapshot()
        attention = llama.model.layers[0].self_attn
        original, found = attention.o_proj.forward, []
        attention.o_proj.forward = lambda x: found.append(x) or original(x)
        try:
            llama(tokens[:, 90:], attention_mask=mask, position_ids=positions[:, 90:], past_key_values=cache)
        finally:
            del attention.o_proj.forward
        hidden = llama.model.layers[0].input_layernorm(llama.model.embed_tokens(tokens[:, 90:]))
        position = torch.tensor([90 - padding])
        q = ROTARY.rotate(attention.q_proj(hidden).view(1, 1, 4, 16).transpose(1, 2), position)
        k = ROTARY.rotate(attention.k_proj(hidden).view(1, 1, 2, 16).transpose(1, 2), position)
        v = attention.v_proj(hidden).view(1, 1, 2, 16).transpose(1, 2)
        keys, values = before.dense()
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        coded = torch.zeros(1, 2, 91, dtype=torch.bool)
        coded[:, :, : before.coded_length] = ~before.exact_mask()
        bias = before.codec.code_bias(q.view(1, 2, 2, 1, 16), 0.25).flatten(1, 2)
        logits = 0.25 * q @ keys.repeat_interleave(2, 1).mT
        logits = logits + bias.unsqueeze(-1) * coded.repeat_interleave(2, 1).unsqueeze(2)
        logits[..., :padding] = float("-inf")
        expected = logits.softmax(-1) @ values.repeat_interleave(2, 1)
    assert coded.any() and (~coded[:, :, : before.coded_length]).any() and bias.max() > 0.1
    torch.testing.assert_close(found[0], expected.transpose(1, 2).flatten(2), atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------- measuring it
def test_noise_is_the_covariance_of_what_codes_lose(llama, config):
    plain = random_codebook(llama, config)
    plain.tables = {
        i: (replace(pair_tables(VQSpec(8, 8), 2, 16, ROTARY, seed=i), noise=None), value)
        for i, (_, value) in plain.tables.items()
    }
    windows = ids(2, 64)
    found = with_noise(llama, plain, windows)
    assert found.tables[0][1] is plain.tables[0][1]
    codec = VectorQuantizer(VQSpec(8, 8), plain.tables[0][0])
    attention, lost = llama.model.layers[0].self_attn, []
    with torch.no_grad():
        for row in windows:
            hidden = llama.model.layers[0].input_layernorm(llama.model.embed_tokens(row[None]))
            keys = attention.k_proj(hidden).view(1, 64, 2, 16).transpose(1, 2)
            error = ROTARY.rotate(codec.decode(codec.encode(keys)) - keys, torch.arange(64))
            lost.append(error.gather(-1, codec.permutation.view(1, 2, 1, 16).expand_as(error)))
    # sinks and a quarter of each chunk stay exact, so the measured one is of fewer tokens, the best coded of them
    every = torch.cat(lost, 2).view(2, -1, 2, 8).transpose(1, 2)
    covariance = every.mT @ every / every.shape[2]
    measured = found.tables[0][0].noise
    ratio = measured.diagonal(dim1=-2, dim2=-1).sum((-2, -1)) / covariance.diagonal(dim1=-2, dim2=-1).sum((-2, -1))
    assert measured.shape == covariance.shape and (ratio > 0.6).all() and (ratio < 1.05).all()
    none = config.replace(anchors=AnchorConfig(score="none", fraction=0.0, sinks=0), window=1)
    all_coded = with_noise(llama, AnTKVCodebook(none, plain.tables, plain.model), windows).tables[0][0].noise
    torch.testing.assert_close(all_coded, covariance, atol=1e-4, rtol=1e-3)


def test_a_codebook_without_layers_for_it_is_refused(llama, config):
    from test_texts import word_tokenizer

    from antkv_hf.calibration import measure_noise

    dense = random_codebook(llama, config.replace(rope="none"))
    with pytest.raises(ValueError, match="none of the 2 layers codes its keys before RoPE"):
        measure_noise(llama, word_tokenizer(), ["a b c " * 400], dense, window=32, windows=2, progress=False)


def test_windows_must_be_longer_than_the_exact_window(llama, book):
    with pytest.raises(ValueError, match="windows of 16 tokens lie within the exact window of 16 and 2 sinks: give"):
        with_noise(llama, book, ids(1, 16))


# ---------------------------------------------------------------- files
def test_a_codebook_keeps_it(llama, config, book, tmp_path):
    import json

    book.save_pretrained(tmp_path / "noise")
    assert json.loads((tmp_path / "noise" / CONFIG_FILE).read_text())["format_version"] == 3
    again = AnTKVCodebook.from_pretrained(tmp_path / "noise")
    assert again.sha256 == book.sha256
    torch.testing.assert_close(again.tables[1][0].noise, book.tables[1][0].noise)
    without = {i: (replace(key, noise=None), value) for i, (key, value) in book.tables.items()}
    AnTKVCodebook(config, without, book.model).save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / CONFIG_FILE).read_text())["format_version"] == 1
    assert AnTKVCodebook.from_pretrained(tmp_path / "plain").tables[0][0].noise is None


def test_what_is_no_covariance_is_refused(config, book):
    key, value = book.tables[0]
    broken, lopsided = key.noise.clone(), key.noise.clone()
    broken[1, 0, 3, 3] = -50.0
    lopsided[1, 0, 2, 3] += 1.0
    for noise, message in (
        (lopsided, "layer 0, key tables: noise is no covariance: it is not symmetric"),
        (broken, "layer 0, key tables: noise is no covariance: its smallest eigenvalue is -5"),
        (key.noise[:, :1], r"layer 0, key tables: noise has shape \(2, 1, 8, 8\), but \(2, 2, 8, 8\) is needed"),
    ):
        with pytest.raises(ValueError, match=message):
            AnTKVCodebook(config, {**book.tables, 0: (replace(key, noise=noise), value)}, book.model)
    with pytest.raises(ValueError, match="layer 0, value tables: noise goes with a permutation of keys"):
        AnTKVCodebook(config, {**book.tables, 0: (key, replace(value, noise=key.noise))}, book.model)
