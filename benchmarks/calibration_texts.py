"""Writes the texts that the shipped codebooks were calibrated on, from three public sources.

    python benchmarks/calibration_texts.py WIKI_VALID_TOKENS SHERLOCK_TXT OUTPUT

WIKI_VALID_TOKENS: validation split of WikiText-2, word level (``wiki.valid.tokens``).
SHERLOCK_TXT: The Adventures of Sherlock Holmes, Project Gutenberg number 1661, plain text.
The third source is the standard library of the Python that runs this (3.11 for the shipped codebooks).
Modules from n to z are left for evaluation, as is everything else of WikiText.
"""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
from pathlib import Path

SKIPPED = ("test", "site-packages", "pydoc_data", "encodings")


def python_sources(library: Path, first: str, last: str, packages: bool) -> str:
    """Modules (and, with `packages`, packages) whose name starts with a letter from `first` to `last`."""
    found = library.rglob("*.py") if packages else library.glob("*.py")
    wanted = []
    for path in found:
        inside = path.relative_to(library)
        if packages and any(part in str(inside) for part in SKIPPED):
            continue
        if first <= inside.parts[0][0].lower() <= last:
            wanted.append(path)
    return "\n\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in sorted(wanted))


def main(wiki: Path, sherlock: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    shutil.copy(wiki, output / "wiki.valid.tokens")  # detokenised when read
    words = wiki.read_text(encoding="utf-8").replace("<unk> ", "").replace("<unk>", "")
    (output / "wiki.valid.txt").write_text(words, encoding="utf-8")  # with its tokenisation marks
    book = sherlock.read_text(encoding="utf-8")
    book = book[book.index("ADVENTURE I. A SCANDAL") : book.index("End of the Project Gutenberg")]
    book = re.sub(r"(?<!\n)\n(?!\n)", " ", book)  # lines of a paragraph belong together
    (output / "sherlock_holmes.txt").write_text(book, encoding="utf-8")
    library = Path(sysconfig.get_path("stdlib"))
    for name, first, last, packages in (
        ("python_a_to_m.txt", "a", "m", True),
        ("python_modules_a_to_m.txt", "a", "m", False),
        ("python_n_to_z.txt", "n", "z", False),
    ):
        (output / name).write_text(python_sources(library, first, last, packages), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
