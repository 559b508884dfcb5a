"""What the scripts share: arguments, the model and its texts, and a tiny stand-in for both."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from antkv_hf.texts import load_texts, token_windows

from .measuring import Text
from .statistics import Sizes, Statistics

TINY_MODEL = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, initializer_range=0.3,
)  # fmt: skip
TINY_SIZES = Sizes(tokens=512, window=128, samples=512, iterations=2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder of the CSV, the tables and the plots")
    parser.add_argument("--model", help="folder or Hub id of a causal language model")
    parser.add_argument("--model-name", help="what the CSV calls it (the folder's name)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=PATH", help="to measure on; repeat")
    parser.add_argument("--window", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=12, help="windows of each text, from its beginning")
    parser.add_argument("--last", type=int, help="count only the last N tokens of each window")
    parser.add_argument("--calibrate", nargs="+", default=[], metavar="PATH=SHARE", help="texts that tables learn from")
    parser.add_argument("--work-dir", type=Path, help="statistics and learned tables; one for each model")
    for name, value in Sizes()._asdict().items():
        what = {"tokens": "of text", "window": "of a window", "samples": "tokens kept", "iterations": "of k-means"}
        parser.add_argument(f"--calibration-{name}", type=int, default=value, help=what.get(name, "of the text"))
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th method, from the I-th on")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and text: shows that it runs")


class Bench:
    """Model, tokenizer and texts of the arguments; statistics when they are first asked for.

    Raises:
        ValueError: an argument that is missing or cannot be used; the message says what to give.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.index, self.count = _shard(arguments.shard)
        if arguments.out is None:
            raise ValueError("--out FOLDER is missing")
        if arguments.last is not None and not 0 < arguments.last < arguments.window:
            raise ValueError(f"--last {arguments.last} must lie between 1 and {arguments.window - 1}")
        self._statistics: dict[str, Statistics] = {}
        self.sizes = Sizes(*(getattr(arguments, f"calibration_{name}") for name in Sizes._fields))
        if arguments.tiny:
            self.model, self.tokenizer, self.name = tiny_model(arguments.device), tiny_tokenizer(), "tiny"
            self.sizes = TINY_SIZES
            arguments.window, arguments.windows, arguments.last = 300, 1, None
        elif arguments.model is None:
            raise ValueError("--model FOLDER is missing (or --tiny)")
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
            kind = getattr(torch, arguments.dtype)
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=kind).eval().to(arguments.device)
            self.model, self.name = model, arguments.model_name or Path(arguments.model).name
        self.model.requires_grad_(False)
        if not arguments.text and not arguments.tiny:
            raise ValueError("--text NAME=PATH is missing: which text is measured?")
        self.texts = [self.text(*named(text)) for text in arguments.text or ["random="]]

    def text(self, name: str, path: str) -> Text:
        """Windows of a text as the arguments say."""
        a = self.arguments
        texts = [tiny_text(seed=7)] if a.tiny else load_texts(path)
        return Text(name, token_windows(self.tokenizer, texts, a.window, a.windows), a.last)

    def statistics(
        self, name: str = "mix", sources: tuple[str, ...] | None = None, sizes: Sizes | None = None
    ) -> Statistics:
        """Calibration statistics of the texts of ``--calibrate``, or of `sources` in a folder of their own `name`."""
        a = self.arguments
        sources = tuple(a.calibrate) if sources is None else sources
        if not a.work_dir or not (sources or a.tiny):
            raise ValueError(
                "this method learns tables: give --calibrate PATH=SHARE ... and --work-dir FOLDER, or leave it out"
            )
        if name not in self._statistics:
            a.work_dir.mkdir(parents=True, exist_ok=True)
            if a.tiny:
                path = a.work_dir / "tiny.txt"
                path.write_text(tiny_text(seed=1), encoding="utf-8")
                sources = (str(path),)
            found = Statistics(self.model, self.tokenizer, sources, a.work_dir / name, sizes or self.sizes)
            self._statistics[name] = found
        return self._statistics[name]

    def mine(self, work: list) -> list:
        """The share of `work` that falls to this process."""
        return work[self.index :: self.count]


def named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r}: write NAME=PATH")
    return name, path


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not slash or not (index + count).isdigit() or not int(index) < int(count):
        raise ValueError(f"--shard {text!r}: write I/N with 0 <= I < N, such as 0/4")
    return int(index), int(count)


def tiny_model(device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY_MODEL)).eval().to(device)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Word ``w<i>`` is token i."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(1, 128)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def tiny_text(seed: int, words: int = 1000) -> str:
    """Words in which one predicts the next."""
    steps = torch.randint(1, 4, (words,), generator=torch.Generator().manual_seed(seed)).cumsum(0)
    return " ".join(f"w{1 + int(i) % 90}" for i in steps)
