"""Every example runs as it stands, as a user would start it, on a tiny model and codebook given by its arguments."""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from antkv_hf import AnTKVCodebook, AnTKVConfig
from antkv_hf.demo_text import HANDBOOK

EXAMPLES = Path(__file__).parents[1] / "examples"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens, learned from the handbook."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator([HANDBOOK], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """``--model`` and ``--codebook`` of a tiny model that knows 512 tokens."""
    folder = tmp_path_factory.mktemp("examples")
    model = tiny_llama(vocab_size=512, num_hidden_layers=2, hidden_size=32, head_dim=8)
    model.save_pretrained(folder / "model")
    trained_tokenizer().save_pretrained(folder / "model")
    random_codebook(model, AnTKVConfig.preset("1bit", window=32, chunk=16)).save_pretrained(folder / "book")
    return ["--model", str(folder / "model"), "--codebook", str(folder / "book")]


@pytest.fixture
def example(monkeypatch, capsys):
    def run(name: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with torch.random.fork_rng():
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_quickstart(example, given):
    out = example("quickstart", *given)
    assert "Q: How must the glass" in out and "x smaller than DynamicCache" in out


def test_pipeline(example, given):
    out = example("pipeline", *given)
    assert all(f"{prompt} ..." in out for prompt in ("The lighthouse keeper", "Once upon a time"))
    assert out.count(" of them codes; DynamicCache: ") == 2 and ", 0 of them codes" not in out


def test_chat(example, given, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\nAnd what do you keep?\n\nNot read any more\n"))
    out = example("chat", *given, "--max-new-tokens", 9)
    assert out.count("model: ") == 2 and "[0 of " in out and "Not read" not in out


def test_long_document(example, given, tmp_path):
    (tmp_path / "book.txt").write_text(HANDBOOK[:1500], encoding="utf-8")
    out = example("long_document", tmp_path / "book.txt", "--ask", "Who keeps the lamp?", "--ask", "When?", *given)
    read = int(out.split(" tokens once")[0].removeprefix("read ").replace(",", ""))
    assert read > 300 and out.count("\nQ: ") == 2 and "smaller than DynamicCache" in out


def test_save_and_reload(example, given, tmp_path):
    out = example("save_and_reload", *given, "--file", tmp_path / "cache.safetensors")
    assert "the same tokens from both: True" in out
    assert f"{(tmp_path / 'cache.safetensors').stat().st_size:,} bytes" in out


def test_calibrate_your_model(example, given, tmp_path):
    (tmp_path / "text.txt").write_text(HANDBOOK, encoding="utf-8")
    out = example(
        "calibrate_your_model", given[1], tmp_path / "text.txt", "--test", tmp_path / "text.txt",
        "--tokens", 1024, "--window", 256, "-o", tmp_path / "made",
    )  # fmt: skip
    book = AnTKVCodebook.from_pretrained(tmp_path / "made")
    assert str(book.config.key) == "d8b8" and book.calibration["tokens"] == 1024
    assert f"{book.tables_bytes():,} bytes of tables" in out and "S128" in out and "FP" in out


def test_multi_gpu(example, given):
    out = example("multi_gpu", *given)
    places = [line.split() for line in out.splitlines() if " bytes of cache" in line]
    assert sum(int(words[1]) for words in places) == 2  # layers; accelerate may put so small a model on one GPU
    assert torch.cuda.device_count() > 1 or "all layers go to one device" in out


def test_every_example_is_tested_short_and_in_the_readme():
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert path.stem in tests and len(path.read_text(encoding="utf-8").splitlines()) <= 60
        assert f"examples/{path.name}" in readme
