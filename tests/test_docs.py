"""What the documentation states: the worked example of the bits, and that its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from helpers import random_codebook
from test_cli import character_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_worked_example_of_bits():
    """A cache of SmolLM2 filled as the example says, against the table."""
    text = (ROOT / "docs" / "bits-accounting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \|.*\| ([\d,]+) \|$", text, re.MULTILINE)
    stated = {kind: int(number.replace(",", "")) for kind, number in rows}
    book = AnTKVCodebook.from_pretrained("smollm2-135m-instruct-1bit")
    cache = AnTKVCache(book.model_config(), book.config, book)
    g = torch.Generator().manual_seed(0)
    for tokens in (1085, 1):  # the next token is what brings codes about
        keys, values = (torch.randn(1, 3, tokens, 64, generator=g) for _ in "kv")
        for layer in range(30):
            cache.update(keys, values, layer)
    found = cache.memory_footprint()
    assert (found.tokens, found.coded_tokens) == (1086, 896)
    for kind in ("codes", "anchors", "sinks", "window", "scores", "total"):
        assert stated[kind] == getattr(found, kind), kind
    for said, value in ((1.21, found.bits_per_element), (6.64, found.bits_per_element_with_window)):
        assert f"{value:.2f}" == f"{said:.2f}" and f"**{said:.2f} bits**" in text
    assert f"{found.compression:.1f} times as much" in text


def test_the_code_under_use_runs(llama, monkeypatch, capsys):
    """README's blocks of Python, with the tiny model and a codebook of it in place of those they name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    use = text[text.index("## Use\n") : text.index("### Fast decoding")]
    fast = text[text.index("### Fast decoding") : text.index("With `max_length` a cache sets")]
    block, second = (re.search(r"```python\n(.*?)^```", part, re.MULTILINE | re.DOTALL) for part in (use, fast))
    assert block is not None and second is not None
    book = random_codebook(llama, AnTKVConfig.preset("1bit", window=8, chunk=16))
    loaded = []

    def loads(what):
        return lambda name, **options: loaded.append(name) or what

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loads(llama))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", loads(character_tokenizer()))
    monkeypatch.setattr(AnTKVCodebook, "from_pretrained", loads(book))
    names: dict = {}
    try:
        exec(block[1], names)
        grown = names["cache"]
        exec(second[1].replace("max_new_tokens=100", "max_new_tokens=3"), names)
    finally:
        llama.set_attn_implementation("sdpa")
    assert loaded == ["HuggingFaceTB/SmolLM2-135M-Instruct"] * 2 + ["smollm2-135m-instruct-1bit"] * 4
    assert names["cache"].max_length == 4096
    assert grown.get_seq_length() > names["inputs"]["input_ids"].shape[1], "generate filled the cache"


def test_links_lead_somewhere():
    seen = 0
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if link.startswith("http"):
                continue
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in anchors, f"{page.name}: {link}"
            seen += 1
    assert seen > 30
