"""The Triton backend does what the reference does, for a layer's whole life and for a real model."""

import pytest
import torch
from builders import assert_near, random_codec

from antkv_hf import AnTKVCache, AnTKVCodebook
from antkv_hf.anchors import get_score
from antkv_hf.attention.attend import attend
from antkv_hf.attention.backends import CALLS, make_backend
from antkv_hf.attention.reference_backend import REFERENCE
from antkv_hf.codecs import IdentityCodec, LayerCodec
from antkv_hf.config import AnchorConfig, AnTKVConfig
from antkv_hf.storage import LayerStorage


def life(backend, codec, score, padding, device="cpu", dtype=torch.float32):
    """A prompt in two chunks, then steps of 1 and 3 tokens: outputs, and what the storage holds in the end."""
    config = AnTKVConfig(anchors=AnchorConfig(score=score, fraction=0.1, query_stride=4), window=16, chunk=32)
    g = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(2, 2, 100, 32, generator=g).to(device, dtype) for _ in range(2))
    query = torch.randn(2, 100, 4, 32, generator=g).to(device, dtype).transpose(1, 2)
    storage = LayerStorage(codec, config, get_score(score), keys, values, backend)
    outputs, length = [], 0
    for n in (60, 36, 1, 3):
        new = slice(length, length + n)
        length += n
        storage.append(keys[:, :, new], values[:, :, new])
        mask = None
        if padding is not None:
            columns = torch.arange(length, device=device)
            causal = columns <= torch.arange(length - n, length, device=device).unsqueeze(1)
            mask = (causal & (columns >= torch.tensor(padding, device=device).view(2, 1, 1))).unsqueeze(1)
        out = attend(
            storage.snapshot(), query[:, :, new], mask, is_causal=True, backend=backend, observer=storage, commit=True
        )
        outputs.append(out)
    return torch.cat(outputs, 2), storage


@pytest.mark.parametrize("score, padding", [("error_aware", None), ("anchor_score", (0, 21))])
def test_life_of_a_layer(score, padding):
    codec = random_codec("d8b8", "d8b8", 2, 32)
    triton = make_backend("triton", codec, torch.device("cpu"), torch.float32)
    expected, reference = life(REFERENCE, codec, score, padding)
    CALLS.clear()
    out, storage = life(triton, codec, score, padding)
    answered = {"prefill_attention", "decode_attention", "column_statistic", "encode"}
    assert set(CALLS) == {f"triton.{name}" for name in answered}
    real = slice(None) if padding is None else slice(max(padding), None)
    assert_near(out[:, :, real], expected[:, :, real], 1e-4)
    assert storage.coded_length == reference.coded_length == 64
    assert torch.equal(storage.key_codes, reference.key_codes)
    assert torch.equal(storage.value_codes, reference.value_codes)
    assert torch.equal(storage.anchors.positions, reference.anchors.positions)
    assert torch.equal(storage.exact_bits, reference.exact_bits)
    assert_near(storage.statistic, reference.statistic, 1e-3)
    assert_near(storage.query_moment, reference.query_moment, 1e-5)


def test_a_score_of_the_users_own_runs_in_pytorch():
    class Cubed:
        @staticmethod
        def term(probs, query, values, output):
            return probs.pow(3).sum(2)

        def score(self, tokens):
            return tokens.received()

    codec = random_codec("d8b8", "d8b8", 2, 32)
    backend = make_backend("triton", codec, torch.device("cpu"), torch.float32)
    keys, values, query = (torch.randn(1, heads, 40, 32) for heads in (2, 2, 4))
    storage = LayerStorage(codec, AnTKVConfig(window=16, chunk=16), Cubed(), keys, values, backend)
    storage.append(keys, values)
    attend(storage.snapshot(), query, is_causal=True, backend=backend, observer=storage, commit=True)
    assert storage.coded_length == 16 and storage.anchors is not None


def test_codecs_without_a_kernel(monkeypatch):
    identity = LayerCodec(IdentityCodec(), IdentityCodec())
    assert make_backend("triton", identity, torch.device("cpu"), torch.float32) is REFERENCE  # nothing to be fast at
    codec = random_codec("d8b8", "d8b8", 2, 32)
    dense = LayerCodec(codec.value, codec.value, codec.rotary)
    with pytest.raises(ValueError, match="dense basis"):
        make_backend("triton", dense, torch.device("cpu"), torch.float32)
    monkeypatch.setenv("ANTKV_BACKEND", "cuda")
    with pytest.raises(ValueError, match="'cuda' is not available on cpu: CUDA C\\+\\+ kernels need an NVIDIA GPU"):
        make_backend("auto", codec, torch.device("cpu"), torch.float32)
    monkeypatch.setenv("ANTKV_BACKEND", "fast")
    with pytest.raises(ValueError, match="backend 'fast' is unknown"):
        make_backend("auto", codec, torch.device("cpu"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("lane", ["antkv", "sdpa"])
def test_smollm2_writes_the_same_200_tokens(lane, monkeypatch):
    from antkv_hf.demo import find_codebook
    from antkv_hf.demo_model import load_demo_model
    from antkv_hf.demo_text import HANDBOOK

    try:
        model, tokenizer, _ = load_demo_model()
    except (ImportError, OSError) as error:
        pytest.skip(f"SmolLM2 is not installed: {error}")
    model = model.cuda()
    model.set_attn_implementation(lane)
    codebook = AnTKVCodebook.from_pretrained(find_codebook("smollm2-135m-instruct-1bit"))
    chat = [{"role": "user", "content": f"{HANDBOOK}\n\nRetell this in your own words."}]
    options = dict(add_generation_prompt=True, return_dict=True, return_tensors="pt")
    inputs = tokenizer.apply_chat_template(chat, **options).to("cuda")
    written = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("ANTKV_BACKEND", backend)
        CALLS.clear()
        cache = AnTKVCache(model.config, codebook=codebook)
        written[backend] = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=200, min_new_tokens=200, do_sample=False
        )
        assert cache.backend == backend and {name.split(".")[0] for name in CALLS} == {backend}
    assert torch.equal(written["triton"], written["reference"])
