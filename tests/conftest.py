"""Shared fixtures: tiny random models, and the real SmolLM2 where it is installed."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never touch the network

import pytest
import torch

if not torch.cuda.is_available():  # Triton's interpreter runs the kernels; it must be chosen before they are defined
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import LlamaConfig, LlamaForCausalLM


def pytest_collection_modifyitems(items):
    for item in items:
        on_gpu = item.get_closest_marker("gpu") is not None
        if on_gpu and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        elif not on_gpu and torch.cuda.is_available() and item.path.parent.name == "kernels":
            item.add_marker(
                pytest.mark.skip(reason="runs in Triton's interpreter: hide the GPU (CUDA_VISIBLE_DEVICES=)")
            )


@pytest.fixture
def fresh_compiler():
    """Nothing that another test compiled, before and after."""
    from torch._dynamo.utils import counters  # loads a compiler that few tests need

    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def tiny_llama(**changes) -> LlamaForCausalLM:
    """A random Llama: 3 layers, 4 heads, 2 kv heads, head size 16, 128 tokens of vocabulary."""
    settings = dict(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def antkv_data() -> Path:
    folder = os.environ.get("ANTKV_DATA")
    if not folder:
        pytest.skip("ANTKV_DATA is not set: it names the folder with wikitext2/wiki.test.raw")
    return Path(folder)
