"""Loading texts and cutting windows: every source, every error, no network."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from antkv_hf import texts as module
from antkv_hf.texts import TextMix, detokenize_wikitext, load_texts, mix_windows, parse_source, token_windows


def word_tokenizer(size: int = 100, bos: bool = False) -> PreTrainedTokenizerFast:
    """Word "w<i>" is token i; with `bos`, texts begin with token 1."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1} | {f"w{i}": i for i in range(2, size)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def words(first: int, last: int, repeats: int = 1) -> str:
    return " ".join(f"w{i}" for _ in range(repeats) for i in range(first, last))


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.md", "a.py", "noending"])
def test_text_file_is_one_text(tmp_path, name):
    (tmp_path / name).write_text("one\n\ntwo\n", encoding="utf-8")
    assert load_texts(str(tmp_path / name)) == ["one\n\ntwo\n"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a", "other": "b"}, "a"),
        ({"question": "q", "answer": "a", "id": 3}, "q\na"),
        ({"prompt": "only", "id": 3}, "only"),
    ],
)
def test_jsonl_fields(tmp_path, row, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n", encoding="utf-8")
    assert load_texts(str(tmp_path / "a.jsonl")) == [expected, expected]


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"a": "x", "b": "y"}', "line 1 has string fields"), ("{oops", "line 1 is not JSON"), ("[1]", "is a list")],
)
def test_jsonl_errors_name_the_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_texts(str(tmp_path / "a.jsonl"))


def test_folder_is_read_recursively_and_sorted(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("z.txt", "b/a.py", "b/c.jsonl", "skip.bin", ".git/d.txt"):
        (tmp_path / name).write_text('{"text": "row"}' if name.endswith("jsonl") else name, encoding="utf-8")
    assert load_texts(str(tmp_path)) == ["b/a.py", "row", "z.txt"]


def test_source_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.txt"):
        load_texts(str(tmp_path / "missing.txt"))
    with pytest.raises(FileNotFoundError, match="data/missing.txt"):
        load_texts("data/missing.txt")
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="holds no text"):
        load_texts(str(tmp_path / "blank.txt"))
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text \(byte 3\)"):
        load_texts(str(tmp_path / "latin.txt"))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="has no .txt"):
        load_texts(str(tmp_path / "none"))


def test_hub_and_parquet_need_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"no file or folder 'owner/name'; as a Hub data set .*antkv-hf\[data\]"):
        load_texts("owner/name")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match="a.parquet"):
        load_texts(str(tmp_path / "a.parquet"))


def test_hub_id_parts_and_limit(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return ({"text": "t" * 10, "body": f"row {i}"} for i in range(100))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(module, "HUB_CHARACTERS", 25)
    assert load_texts("owner/name") == ["t" * 10] * 3
    assert load_texts("owner/name:small:test:body")[0] == "row 0"
    assert asked[1] == (("owner/name", "small"), {"split": "test", "streaming": True})
    with pytest.raises(ValueError, match="no string field 'nope'"):
        load_texts("owner/name:::nope")


def test_wikitext_marks_are_undone(tmp_path):
    marked = ' \n = The lobster = \n \n It is well @-@ known ( 1 @,@ 250 m , " big " ) , <unk> one \'s 5 @.@ 5 kg . \n'
    plain = '\n= The lobster =\n\nIt is well-known (1,250 m, "big"), one\'s 5.5 kg.\n'
    assert detokenize_wikitext(marked) == plain
    (tmp_path / "wiki.tokens").write_text(marked, encoding="utf-8")
    (tmp_path / "wiki.txt").write_text(marked, encoding="utf-8")
    (tmp_path / "plain.txt").write_text(marked.replace("<unk>", ""), encoding="utf-8")
    assert load_texts(str(tmp_path / "wiki.tokens")) == load_texts(str(tmp_path / "wiki.txt")) == [plain]
    assert "@-@" in load_texts(str(tmp_path / "plain.txt"))[0]


def test_token_windows_are_contiguous():
    tokenizer = word_tokenizer()
    texts = [words(2, 30), "", words(30, 42)]
    windows = token_windows(tokenizer, texts, 10)
    assert windows.dtype == torch.int64 and windows.tolist() == [list(range(i, i + 10)) for i in (2, 12, 22, 32)]
    assert torch.equal(token_windows(tokenizer, texts, 10, count=2, skip=1), windows[1:3])


def test_token_windows_in_pieces_are_those_of_the_whole(monkeypatch):
    tokenizer = word_tokenizer()
    text = words(2, 100, 20)
    expected = token_windows(tokenizer, [text], 10)
    monkeypatch.setattr(module, "PIECE", 37)
    assert torch.equal(token_windows(tokenizer, [text], 10), expected)
    monkeypatch.setattr(module, "PIECE", 64)
    assert "".join(module._pieces(["x" * 200, "y\nz" * 50])) == "x" * 200 + "\n\n" + "y\nz" * 50


def test_token_windows_errors_have_the_numbers():
    with pytest.raises(ValueError, match=r"5 windows of 10 tokens are needed \(50 tokens\), but .* has 40 tokens"):
        token_windows(word_tokenizer(), [words(2, 42)], 10, count=5)
    with pytest.raises(ValueError, match="1 windows of 100"):
        token_windows(word_tokenizer(), [words(2, 42)], 100)
    with pytest.raises(ValueError, match="window=0"):
        token_windows(word_tokenizer(), ["w2"], 0)
    with pytest.raises(TypeError, match="got a dict"):
        token_windows(word_tokenizer(), [{"text": "w2"}], 1)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("a.txt", ("a.txt", None)), ("a.txt=0.5", ("a.txt", 0.5)), ("a=b.t=2", ("a=b.t", 2.0)), ("a=b", ("a=b", None))],
)
def test_parse_source(source, expected):
    assert parse_source(source) == expected


def test_a_share_that_is_no_number(tmp_path):
    (tmp_path / "a.txt").write_text("w1")
    with pytest.raises(ValueError, match="a.txt=2x: the share after = is a number, e.g. .*a.txt=0.5"):
        parse_source(f"{tmp_path}/a.txt=2x")


def mix(tmp_path, *sources: str) -> TextMix:
    (tmp_path / "low.txt").write_text(words(2, 50, 20))
    (tmp_path / "high.txt").write_text(words(50, 100, 20))
    return TextMix.from_sources([str(tmp_path / source) for source in sources])


@pytest.mark.parametrize(
    ("sources", "low"),
    [(("low.txt", "high.txt"), 5), (("low.txt=0.2", "high.txt"), 2), (("low.txt=3", "high.txt=1"), 8)],
)
def test_mix_windows_keep_shares(tmp_path, sources, low):
    windows = mix_windows(word_tokenizer(), mix(tmp_path, *sources), 16, 10, seed=3)
    assert windows.shape == (10, 16)
    assert ((windows < 50).all(1).sum(), (windows >= 50).all(1).sum()) == (low, 10 - low)


def test_mix_windows_by_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 200)
    both = mix(tmp_path, "low.txt", "high.txt")
    draw = [mix_windows(word_tokenizer(), both, 16, 10, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


@pytest.mark.parametrize("windows_of", [mix_windows, token_windows])
def test_windows_begin_with_bos_where_texts_do(windows_of):
    windows = windows_of(word_tokenizer(bos=True), [words(2, 50, 4)], 16, 4)
    assert windows[:, 0].tolist() == [1] * 4 and (windows[:, 1:] != 1).all()
    assert (windows_of(word_tokenizer(), [words(2, 50, 4)], 16, 4) != 1).all()


def test_mix_errors(tmp_path):
    with pytest.raises(ValueError, match=r"low.txt has 960 tokens \(60 windows of 16\), but its share of 50% needs"):
        mix_windows(word_tokenizer(), mix(tmp_path, "low.txt", "high.txt"), 16, 200)
    with pytest.raises(ValueError, match="add up to 1.5"):
        mix(tmp_path, "low.txt=1.5", "high.txt")
    with pytest.raises(ValueError, match="low.txt has 960 tokens .0 windows of 2000.*or lower window to 960 or less"):
        mix_windows(word_tokenizer(), mix(tmp_path, "low.txt=0.5", "high.txt"), 2000, 2)
    with pytest.raises(ValueError, match="share 0 of"):
        mix(tmp_path, "low.txt=0", "high.txt")
    for nothing in ([], [""], ["  "]):
        with pytest.raises(ValueError, match="empty"):
            TextMix.of(nothing)
    with pytest.raises(TypeError, match="not one string"):
        TextMix.of("text")
    with pytest.raises(TypeError, match="got a int"):
        TextMix.of([3])


def test_mix_is_described_without_folders(tmp_path):
    assert mix(tmp_path, "low.txt", "high.txt=0.25").describe() == ["low.txt (75%)", "high.txt (25%)"]
