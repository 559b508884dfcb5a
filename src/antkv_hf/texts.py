"""Texts for calibration and evaluation: from files, folders or Hub data sets to windows of token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
PIECE = 1 << 16  # characters given to the tokenizer at a time
HUB_CHARACTERS = 64_000_000  # most that is read of a Hub data set, which may hold terabytes


# -------------------------------------------------------------------- sources
def load_texts(source: str) -> list[str]:
    """Texts of a local file or folder, or of a data set on the Hub.

    Args:
        source: one of

            - a text file (any suffix: .txt, .raw, .md, .py, ...), one text; WikiText's word-level files (.tokens) get
              their tokenisation marks undone (`detokenize_wikitext`);
            - a .jsonl file, one text a line: field `text`, or `question` and `answer`, or the only string field;
            - a .parquet file (needs the extra ``antkv-hf[data]``), the same fields;
            - a folder: its .txt, .md, .py and .jsonl files, at any depth, sorted by path;
            - ``owner/name[:config[:split[:column]]]``, a Hub data set (the same extra; split ``train`` by default). It
              is streamed, and at most the first 64 million characters are read.

    Returns:
        Texts that are not empty, at least one.

    Raises:
        FileNotFoundError: no such file, and not a data set id.
        ValueError: nothing in it, not UTF-8, or a row without a usable field.
        ImportError: the `datasets` package is needed and missing.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        texts = _folder_texts(path)
    elif path.is_file():
        texts = _file_texts(path)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[^:]*){0,3}", source) and not _looks_like_file(source):
        texts = _hub_texts(source)
    else:
        raise FileNotFoundError(
            f"no text file or folder at {source!r}, and it is no Hub data set id (owner/name[:config[:split[:column]]])"
        )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{source} holds no text: it is empty, or has only blank lines")
    return texts


def read_utf8(path: Path) -> str:
    """The text of a file. Raises ValueError, naming it and the byte, if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it, or give another") from error


def detokenize_wikitext(text: str) -> str:
    """Undoes WikiText's tokenisation marks, so that a model sees prose as it was written.

    `` @-@ ``, `` @,@ `` and `` @.@ `` become ``-``, ``,`` and ``.``; spaces before punctuation, inside brackets and
    quotes and around apostrophes go; the placeholder ``<unk>`` of words outside the vocabulary is left out, since to
    many tokenizers it is a control token.
    """
    text = re.sub(r"<unk> ?", "", text)
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r"(?<=s) '(?= )", "'", text)
    text = re.sub(r" ('(?:s|t|re|ve|m|ll|d)\b)", r"\1", text)
    text = re.sub(r" n't\b", "n't", text)
    text = re.sub(r" +([.,;:!?%)\]}])", r"\1", text)
    text = re.sub(r"([(\[{$£]) +", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) ?"', r'"\1"', text)
    text = re.sub(r"= (?==)", "=", text)
    return re.sub(r"[ \t]*\n[ \t]*", "\n", text)


def _looks_like_file(source: str) -> bool:
    known = FOLDER_SUFFIXES + (".raw", ".tokens", ".parquet", ".json", ".csv")
    return source.partition(":")[0].lower().endswith(known)


def _folder_texts(folder: Path) -> list[str]:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in FOLDER_SUFFIXES and p.is_file())
    paths = [p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    if not paths:
        raise ValueError(f"folder {folder} has no {', '.join(FOLDER_SUFFIXES)} files: give one that has, or a file")
    return [text for path in paths for text in _file_texts(path)]


def _file_texts(path: Path) -> list[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return [_row_text(row, f"{path}, row {i}") for i, row in enumerate(_datasets("parquet", str(path)))]
    content = read_utf8(path)
    if suffix == ".jsonl":
        return [_line_text(line, f"{path}, line {i}") for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    if suffix == ".tokens" or (" @-@ " in content and "<unk>" in content):
        content = detokenize_wikitext(content)
    return [content]


def _line_text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}, not an object with a field `text`")
    return _row_text(row, where)


def _row_text(row: dict[str, Any], where: str, column: str | None = None) -> str:
    """The text of a row; see `load_texts` for which fields count."""
    strings = {name: value for name, value in row.items() if isinstance(value, str)}
    if column is not None:
        if column not in strings:
            raise ValueError(f"{where} has no string field {column!r}; its string fields are {sorted(strings)}")
        return strings[column]
    if "text" in strings:
        return strings["text"]
    if "question" in strings and "answer" in strings:
        return f"{strings['question']}\n{strings['answer']}"
    if len(strings) != 1:
        raise ValueError(
            f"{where} has string fields {sorted(strings)}: one called `text`, or `question` and `answer`, or a single "
            "one is needed"
        )
    return next(iter(strings.values()))


def _hub_texts(source: str) -> list[str]:
    name, config, split, column = (source.split(":") + [""] * 3)[:4]
    texts, characters = [], 0
    for i, row in enumerate(_datasets(name, None, config or None, split or "train")):
        texts.append(_row_text(row, f"{source}, row {i}", column or None))
        characters += len(texts[-1])
        if characters >= HUB_CHARACTERS:
            break
    return texts


def _datasets(name: str, file: str | None, config: str | None = None, split: str = "train") -> Iterable[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            ("" if file else f"there is no file or folder {name!r}; as a Hub data set ")
            + f"{file or name} needs the `datasets` package: pip install 'antkv-hf[data]'"
        ) from error
    files = {} if file is None else {"data_files": file}
    return load_dataset(name, config, split=split, streaming=True, **files)


# -------------------------------------------------------------------- windows
def token_windows(
    tokenizer, texts: Iterable[str], window: int, count: int | None = None, skip: int = 0
) -> torch.Tensor:
    """Contiguous windows of the texts' tokens, in order.

    The texts are joined by a blank line and tokenized without special tokens, a piece at a time, and no further than
    needed. Where the tokenizer begins texts with a BOS token, that takes the place of each window's first token.

    Args:
        tokenizer: a transformers tokenizer.
        texts: plain strings.
        window: tokens in a window. count: windows, or None for all that there are. skip: windows to leave out first.

    Returns:
        int64 ``(count, window)``.

    Raises:
        ValueError: fewer tokens than asked for; the message has both numbers.
    """
    if window < 1 or skip < 0 or (count is not None and count < 1):
        raise ValueError(f"window={window} and count={count} must be at least 1, skip={skip} at least 0")
    needed = None if count is None else (skip + count) * window
    ids = _token_ids(tokenizer, _pieces(texts), needed)
    found = len(ids) // window - skip
    if found < (count or 1):
        raise ValueError(
            f"{skip + (count or 1)} windows of {window} tokens are needed ({(skip + (count or 1)) * window:,} tokens), "
            f"but the text has {len(ids):,} tokens ({len(ids) // window} windows): give more text, or ask for less"
        )
    count = count or found
    windows = torch.tensor(ids[skip * window : (skip + count) * window], dtype=torch.int64).view(count, window)
    return _begun(tokenizer, windows)


def _token_ids(tokenizer, pieces: Iterable[str], needed: int | None) -> list[int]:
    ids: list[int] = []
    for piece in pieces:
        # verbose=False: no warning that the text is longer than the model's context, it is cut into windows
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if needed is not None and len(ids) >= needed:
            break
    return ids


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Cuts the joined texts before a word, where byte-level tokenizers cut too: the tokens stay the same."""
    rest = ""
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings, got a {type(text).__name__}; of a data set, pass one column")
        if not text:
            continue
        rest = f"{rest}\n\n{text}" if rest else text
        begin = 0
        while len(rest) - begin > PIECE:
            breaks = [m.end() for m in re.finditer(r"\S(?= [^\W\d_])", rest[begin : begin + PIECE])]
            cut = breaks[-1] if breaks else max(rest.rfind("\n", begin + 1, begin + PIECE) - begin, 0) or PIECE
            yield rest[begin : begin + cut]
            begin += cut
        rest = rest[begin:]
    if rest:
        yield rest


# -------------------------------------------------------------------- mixtures
@dataclass(frozen=True)
class Domain:
    """Texts of one kind, and their weight in a mixture."""

    name: str
    texts: Sequence[str]
    share: float


@dataclass(frozen=True)
class TextMix:
    """Texts of several domains with shares that add up to 1; tables learned from one domain alone ruin the others.

    Example:
        >>> TextMix.from_sources(["wiki.valid.tokens=0.5", "shakespeare.txt", "src/"])  # 50, 25 and 25 percent
    """

    domains: tuple[Domain, ...]

    @classmethod
    def from_sources(cls, sources: Sequence[str]) -> TextMix:
        """Loads sources as `load_texts` takes them, each with an optional ``=share``.

        Sources without a share divide equally what the others leave of 1; shares alone are weights (``=2 =1``).

        Raises:
            ValueError: no source, a share that is not positive, or shares that leave nothing.
            FileNotFoundError, ImportError: from `load_texts`.
        """
        if isinstance(sources, str) or not sources:
            raise ValueError("give a list of at least one source of text, e.g. ['wiki.txt=0.5', 'code/']")
        parsed = [parse_source(source) for source in sources]
        shares = _shares([share for _, share in parsed])
        names = [_name(source) for source, _ in parsed]
        return cls(tuple(Domain(n, load_texts(s), w) for n, (s, _), w in zip(names, parsed, shares, strict=True)))

    @classmethod
    def of(cls, texts: TextMix | Sequence[str]) -> TextMix:
        """A mixture as it is, or plain strings as a mixture of one domain."""
        if isinstance(texts, TextMix):
            return texts
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings or TextMix.from_sources([...]), not one string")
        texts = list(texts)
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"texts must be strings, got a {type(text).__name__}; of a data set, pass one column")
        if not any(text.strip() for text in texts):
            raise ValueError(f"texts are empty: {len(texts)} strings without a word")
        return cls((Domain("one text" if len(texts) == 1 else f"{len(texts)} texts", texts, 1.0),))

    def describe(self) -> list[str]:
        """Names with shares, as a codebook's card shows them; of local paths only the last part."""
        if len(self.domains) == 1:
            return [self.domains[0].name]
        return [f"{domain.name} ({domain.share:.0%})" for domain in self.domains]


def parse_source(source: str) -> tuple[str, float | None]:
    """``"path=0.5"`` -> (path, 0.5); without a share (path, None)."""
    match = re.fullmatch(r"(.+)=([^=/]+)", source)
    if not match or Path(source).exists():
        return source, None
    try:
        share = float(match[2])
    except ValueError as error:
        if not Path(match[1]).expanduser().exists():
            return source, None
        raise ValueError(f"{source}: the share after = is a number, e.g. {match[1]}=0.5") from error
    if not 0 < share < float("inf"):
        raise ValueError(f"share {match[2]} of {match[1]} must be positive")
    return match[1], share


def mix_windows(tokenizer, mix: TextMix | Sequence[str], window: int, count: int, seed: int = 0) -> torch.Tensor:
    """Windows drawn from all domains by their shares and shuffled.

    Each domain is cut into pieces of about 65,000 characters, which are shuffled, so that a sample of a long text
    covers all of it. Where the tokenizer begins texts with a BOS token, so does every window: models with one rely on
    it.

    Args:
        tokenizer: a transformers tokenizer.
        mix: see `TextMix`; plain strings are one domain.
        window: tokens in a window. count: windows in all. seed: decides pieces and order.

    Returns:
        int64 ``(count, window)``.

    Raises:
        ValueError: a domain has fewer tokens than its share asks for; the message names it and both numbers.
    """
    mix = TextMix.of(mix)
    if window < 2 or count < 1:
        raise ValueError(f"window={window} must be at least 2 tokens and count={count} at least 1 window")
    generator = torch.Generator().manual_seed(seed)
    windows = []
    for domain, part in zip(mix.domains, _apportion([d.share for d in mix.domains], count), strict=True):
        if part == 0:
            continue
        pieces = list(_pieces(domain.texts))
        order = torch.randperm(len(pieces), generator=generator).tolist()
        ids = _token_ids(tokenizer, (pieces[i] for i in order), part * window)
        if len(ids) < part * window:
            less = f"fewer tokens ({int(len(ids) // window * window / domain.share):,} would do for this one)"
            if len(ids) < window:
                less = f"lower window to {len(ids)} or less"
            raise ValueError(
                f"{domain.name} has {len(ids):,} tokens ({len(ids) // window} windows of {window}), but its share of "
                f"{domain.share:.0%} needs {part * window:,}: give more text, a smaller share, or {less}"
            )
        windows.append(torch.tensor(ids[: part * window], dtype=torch.int64).view(part, window))
    return _begun(tokenizer, torch.cat(windows)[torch.randperm(count, generator=generator)])


def _begun(tokenizer, windows: torch.Tensor) -> torch.Tensor:
    """`windows` with the token that begins a text in first place, where the tokenizer puts one before texts: a model
    that has always seen it is another model without (Gemma 3's perplexity doubles)."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        windows[:, 0] = bos
    return windows


def _shares(given: list[float | None]) -> list[float]:
    known = sum(share for share in given if share is not None)
    open_ones = given.count(None)
    if not open_ones:
        return [share / known for share in given if share is not None]
    if known >= 1:
        raise ValueError(f"the given shares add up to {known:g}, leaving nothing for {open_ones} source(s) without one")
    return [(1 - known) / open_ones if share is None else share for share in given]


def _apportion(shares: list[float], count: int) -> list[int]:
    """Whole numbers in proportion to `shares` that add up to `count` (largest remainders)."""
    exact = [share * count for share in shares]
    parts = [int(value) for value in exact]
    for i in sorted(range(len(shares)), key=lambda i: parts[i] - exact[i])[: count - sum(parts)]:
        parts[i] += 1
    return parts


def _name(source: str) -> str:
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source
