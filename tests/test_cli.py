"""The command line, through the same entry points a shell uses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.main import get_command
from typer.testing import CliRunner

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig, VQSpec, __version__, cli
from antkv_hf.cli import app
from antkv_hf.cli_common import _check_output
from antkv_hf.demo_model import naming

TEXT = "The keeper cleans the lens on Monday, with warm water and vinegar. The cat sleeps in the boat house. "
CHAT = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character: 98 ids, fits the tiny models' vocabulary of 128."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(i): i - 29 for i in range(32, 127)}}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT
    )


@pytest.fixture(scope="module")
def place(llama, tmp_path_factory):
    """A folder with a model, a codebook of it and a text."""
    folder = tmp_path_factory.mktemp("cli")
    llama.save_pretrained(folder / "model")
    character_tokenizer().save_pretrained(folder / "model")
    random_codebook(llama, AnTKVConfig.preset("1bit", window=32, chunk=16)).save_pretrained(folder / "book")
    (folder / "text.txt").write_text(TEXT * 40, encoding="utf-8")
    return folder


def antkv(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def error_of(*arguments) -> str:
    """The one line that a command fails with."""
    result = antkv(*arguments, code=1)
    lines = [line for line in result.stderr.splitlines() if line.startswith("antkv: error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]


def test_help_and_version():
    text = antkv("--help").output
    assert all(command in text for command in ("demo", "generate", "calibrate", "evaluate", "inspect", "budget"))
    for name, command in get_command(app).commands.items():
        said = antkv(name, "--help").output
        assert f"antkv {name}" in said and "Example" in said
        assert all(parameter.help for parameter in command.params), f"every argument of {name} is explained"
    assert antkv("--version").output.strip() == __version__


def test_generate(place):
    arguments = (
        "generate",
        place / "model",
        place / "book",
        "--prompt",
        TEXT,
        "--max-new-tokens",
        8,
        "--device",
        "cpu",
    )
    spoken = antkv(*arguments)
    assert "bits per coded element" in spoken.stderr
    found = json.loads(antkv(*arguments, "--json").stdout)
    assert found["text"] == spoken.stdout.rstrip("\n") and found["footprint"]["codes"] > 0
    fewer = json.loads(antkv(*arguments, "--json", "--set", "window=64", "--set", "anchor_score=none").stdout)[
        "footprint"
    ]
    assert fewer["coded_tokens"] < found["footprint"]["coded_tokens"] and fewer["anchors"] == 0
    exact = json.loads(antkv(*arguments, "--json", "--set", "skip_layers=[0,2]").stdout)["footprint"]
    assert 3 * exact["codes"] == found["footprint"]["codes"] and exact["other_layers"] > 0
    (place / "prompt.txt").write_text(TEXT, encoding="utf-8")
    from_file = antkv(*arguments[:3], "--prompt-file", place / "prompt.txt", *arguments[5:])
    assert from_file.stdout == spoken.stdout


def test_evaluate_and_save(place):
    common = ("--text", place / "text.txt", "--windows", 2, "--window", 200, "--device", "cpu")
    plain = json.loads(antkv("evaluate", place / "model", *common, "--json").stdout)
    assert [row["protocol"] for row in plain] == ["FP"]
    arguments = (
        "evaluate",
        place / "model",
        place / "book",
        *common,
        "--protocol",
        "FP",
        "--protocol",
        "S32",
        "--last",
        50,
    )
    rows = json.loads(antkv(*arguments, "--json").stdout)
    assert [(row["protocol"], row["counted"], row["text"]) for row in rows] == [
        ("FP", 50, "text.txt"),
        ("S32", 50, "text.txt"),
    ]
    table = antkv(*arguments, "--markdown", "--save").stdout
    assert table.startswith("| method") and "last 50" in table
    antkv(*arguments, "--save")
    saved = AnTKVCodebook.from_pretrained(place / "book").evaluation
    assert [(row["protocol"], row["perplexity"]) for row in saved] == [
        (row["protocol"], row["perplexity"]) for row in rows
    ]
    assert "text.txt" in (place / "book" / "README.md").read_text(encoding="utf-8")


def test_texts_of_one_name_are_told_apart(place):
    for folder, text in (("a", TEXT), ("b", TEXT[::-1])):
        (place / folder).mkdir()
        (place / folder / "same.txt").write_text(text * 40, encoding="utf-8")
    texts = [x for folder in ("a", "b") for x in ("--text", place / folder / "same.txt")]
    rows = json.loads(antkv("evaluate", place / "model", *texts, "--windows", 1, "--window", 200, "--json").stdout)
    assert [row["text"] for row in rows] == [str(place / folder / "same.txt") for folder in ("a", "b")]
    assert rows[0]["perplexity"] != rows[1]["perplexity"]


@pytest.mark.parametrize("window", (200, 40))
def test_bits_of_w0_are_those_of_coded_tokens(place, window):
    """No token is exact for being recent, also where a cache would hold the whole text in its window."""
    common = ("--text", place / "text.txt", "--windows", 1, "--window", window, "--protocol", "W0", "--protocol", "S32")
    w0, s32 = json.loads(antkv("evaluate", place / "model", place / "book", *common, "--json").stdout)
    assert w0["bits_with_window"] == w0["bits"] > 0
    assert s32["bits_with_window"] > s32["bits"] if window == 200 else s32["bits"] == 0


@pytest.mark.skipif(os.name == "nt", reason="no such signal")
def test_termination_ends_as_ctrl_c_does(monkeypatch):
    """An exit, in which folders of statistics are cleared away."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "app", lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit, match="143"):
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_presets_without_a_codebook(place):
    arguments = (place / "model", "ott-4bit", "--set", "window=32", "--set", "group=32")
    text = ("--text", place / "text.txt", "--windows", 1, "--window", 200, "--protocol", "FP", "--protocol", "S32")
    rows = json.loads(antkv("evaluate", *arguments, *text, "--json").stdout)
    assert [row["method"] for row in rows] == ["float32", "int4g32/int4g32"] and rows[1]["ratio"] < 1.1
    said = json.loads(antkv("generate", *arguments, "--prompt", TEXT[:100], "--max-new-tokens", 5, "--json").stdout)
    assert said["footprint"]["tokens"] > 100
    assert "group is a number" in error_of("evaluate", place / "model", "ott-2bit", "--set", "group=x", *text)
    assert "ott-2bit int2g32/int2g64" in antkv("inspect", "--model", place / "model").stdout


def test_inspect(place):
    found = json.loads(antkv("inspect", place / "book", "--json").stdout)
    assert found["model"]["kv_heads"] == 2 and found["bits"]["keys"] == 1.0 and found["backends"]["cpu"]
    text = antkv("inspect", place / "book", "--model", place / "model").stdout
    assert "keys        d8b8, 1 bits" in text and "fits" in text and "3 of 3 layers" in text
    text = antkv("inspect", "--model", place / "model").stdout
    assert "a 16-bit cache takes 384 bytes a token" in text and "d32b12" in text
    assert "not a multiple of sub_dim 32" in text, "head size 16 has no 0.375-bit preset"


def test_inspect_a_cache(place, llama):
    cache = AnTKVCache(llama.config, codebook=AnTKVCodebook.from_pretrained(place / "book"))
    llama(torch.randint(3, 90, (1, 50)), past_key_values=cache)
    cache.save(place / "cache")
    assert "fits" not in antkv("inspect", place / "cache").stdout
    assert f"fits        {place / 'model'}" in antkv("inspect", place / "cache", "--model", place / "model").stdout
    tiny_llama(num_key_value_heads=4).save_pretrained(place / "other")
    said = error_of("inspect", place / "cache", "--model", place / "other")
    assert (
        f"does not fit {place / 'other'}: it was filled by" in said and "(kv_heads 2)" in said and "kv_heads 4" in said
    )


def test_calibrate(place, monkeypatch):
    import antkv_hf.calibration

    seen = []

    def learned(model, tokenizer, texts, config, **options):
        seen.append((config, options))
        return random_codebook(model, config)

    monkeypatch.setattr(antkv_hf.calibration, "calibrate", learned)
    out = place / "made"
    antkv(
        "calibrate", place / "model", f"{place / 'text.txt'}=0.5", "-o", out, "--bits", 1, "--bits", 2,
        "--tokens", 4096, "--seed", 3, "--base-model", "a/b", "--license", "mit",
        "--device", "cpu", "--set", "window=64",
    )  # fmt: skip
    assert [str(config.key) for config, _ in seen] == ["d8b8", "d4b8"] and seen[0][0].window == 64
    options = seen[0][1]
    assert (options["tokens"], options["seed"], options["base_model"], options["license"]) == (4096, 3, "a/b", "mit")
    assert seen[0][1]["work_dir"] == seen[1][1]["work_dir"], "the second rate reuses the statistics of the first"
    assert str(AnTKVCodebook.from_pretrained(out / "2bit").config.value) == "d4b8"
    assert (out / "1bit" / "README.md").is_file()
    antkv(
        "calibrate", place / "model", place / "text.txt", "-o", out / "mixed", "--key-bits", "d8b8s2", "--device", "cpu"
    )
    assert (str(seen[-1][0].key), str(seen[-1][0].value)) == ("d8b8s2", "d8b8")
    antkv(
        "calibrate", place / "model", place / "text.txt", "-o", out / "layers", "--layer-bits", "0=2,2=1/d16b8",
        "--device", "cpu",
    )  # fmt: skip
    expected = {0: (VQSpec(4, 8), VQSpec(4, 8)), 2: (VQSpec(8, 8), VQSpec(16, 8))}
    assert seen[-1][0].layer_specs == expected
    assert AnTKVCodebook.from_pretrained(out / "layers").config.layer_specs == expected


def test_errors_are_one_line(place, tmp_path):
    model, book, text = place / "model", place / "book", ("--text", place / "text.txt")
    assert "give either --prompt" in error_of("generate", model, book)
    assert "the prompt is empty: give text with --prompt" in error_of("generate", model, book, "--prompt", " ")
    assert "--set 'windw=3'" in error_of("generate", model, book, "--prompt", "x", "--set", "windw=3")
    for setting, message in (
        ("window=wide", "window='wide' must be a whole number, e.g. window=128"),
        ("window=1.5", "window=1.5 must be a whole number, e.g. window=128"),
        ("anchor_fraction=some", "fraction='some' must be a number, e.g. fraction=0.02"),
        ("skip_layers=a", "skip_layers=('a',) must be layer numbers, e.g. [0, 1]"),
    ):
        assert message in error_of("generate", model, book, "--prompt", "x", "--set", setting)
    assert "window=0 must be at least 1" in error_of("generate", model, book, "--prompt", "x", "--set", "window=0")
    assert "no codebook 'nowhere'" in error_of("generate", model, "nowhere", "--prompt", "x")
    assert "config.json is missing. Give a folder that holds" in error_of("inspect", tmp_path)
    assert "--text FILE" in error_of("evaluate", model, book)
    assert "--save needs CODEBOOK" in error_of("evaluate", model, *text, "--save")
    assert "windows of 4096 tokens are needed" in error_of("evaluate", model, book, *text, "--window", 4096)
    assert "protocol 'W1' is unknown" in error_of("evaluate", model, book, *text, "--window", 64, "--protocol", "W1")
    assert "--device 'tpu' is unknown" in error_of("evaluate", model, book, *text, "--device", "tpu")
    assert "--dtype 'int8' is unknown" in error_of("evaluate", model, book, *text, "--dtype", "int8")
    assert "3 bits per element do not exist" in error_of("calibrate", model, text[1], "-o", tmp_path / "x", "--bits", 3)
    (tmp_path / "taken").write_text("x")
    for output in (tmp_path / "taken", tmp_path / "taken" / "book"):
        said = error_of("calibrate", "no/model", text[1], "-o", output)
        assert f"--output {output}: {tmp_path / 'taken'} is a file: name a folder to write" in said
    for command in (("generate", "nomodel", book, "--prompt", "x"), ("inspect", "--model", "nomodel"),
                    ("inspect", book, "--model", "nomodel"), ("budget", "nomodel", "--tokens", 9)):  # fmt: skip
        said = error_of(*command)
        assert "model 'nomodel' cannot be loaded: " in said and "or a Hub id such as owner/name" in said
    assert f"model '{tmp_path}' cannot be loaded: " in error_of("generate", tmp_path, book, "--prompt", "x")
    assert "there is no prompt file 'no.txt'" in error_of("generate", model, book, "--prompt-file", "no.txt")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "latin is not UTF-8 text (byte 3): convert it" in error_of(
        "generate", model, book, "--prompt-file", tmp_path / "latin"
    )
    assert "no codebook 'nope': it is no folder" in error_of("demo", "nope")
    assert "no codebook 'nope': it is no folder" in error_of("budget", model, "--tokens", 9, "--among", "nope")
    assert "no text file or folder" in error_of("calibrate", model, tmp_path / "no.txt", "-o", tmp_path / "x")
    assert "give a CODEBOOK (folder, Hub id, shipped name or cache file), or --model" in error_of("inspect")
    if not torch.cuda.is_available():
        assert "sees no GPU" in error_of("evaluate", model, book, *text, "--device", "cuda")


def test_debug_keeps_the_traceback(place):
    result = CliRunner().invoke(app, ["--debug", "generate", str(place / "model"), str(place / "book")])
    assert isinstance(result.exception, ValueError)


def test_an_output_that_cannot_be_written_is_refused_before_work(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.mkdir()
    asked = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != kept and asked(path, mode))  # root may all
    for output in (kept, kept / "new" / "codebook"):
        with pytest.raises(PermissionError, match=f"--output {output}: {kept} cannot be written to: name another"):
            _check_output(output, [])
    (kept / "file").touch()
    with pytest.raises(ValueError, match="file is a file: name a folder"):
        _check_output(kept / "file" / "codebook", [])
    _check_output(tmp_path / "new", ["mixed-1bit"])
    assert not (tmp_path / "new").exists()


def test_errors_of_a_model_that_is_there_keep_their_kind(tmp_path):
    class Damaged(ValueError):
        pass

    (tmp_path / "config.json").touch()
    for error, kind in ((Damaged("bad header"), Damaged), (OSError("bad header"), OSError)):
        with pytest.raises(kind, match="cannot be loaded: bad header$"), naming(str(tmp_path)):
            raise error
    with pytest.raises(PermissionError, match="13.*not yours") as caught, naming(str(tmp_path)):
        raise PermissionError(13, "not yours")
    assert caught.value.errno == 13
    with pytest.raises(OSError, match="'no/such' cannot be loaded: nothing; give a folder"), naming("no/such"):
        raise OSError("nothing")
