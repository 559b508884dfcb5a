"""What the benchmarks write: a CSV of their rows, with what they ran on, and the same as a table."""

from __future__ import annotations

import csv
import fcntl
import importlib.metadata
import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch


def environment(device: torch.device | str) -> dict[str, str]:
    """Columns that every row ends with: the GPU's name, and the versions of torch, triton and transformers."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "none"
    versions = {"torch": torch.__version__}
    for package in ("triton", "transformers"):
        found = importlib.util.find_spec(package) is not None
        versions[package] = importlib.metadata.version(package) if found else "none"
    return {"gpu": gpu, **versions}


def write_csv(path: Path, rows: Sequence[dict], device: torch.device | str) -> None:
    """Writes `rows`, which have the same keys, and `environment` after each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common = environment(device)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *common])
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)


def update_csv(path: Path, rows: Sequence[dict], key: Sequence[str], device: torch.device | str) -> list[dict]:
    """Puts `rows` into a CSV in place of those that agree with them in the columns `key`; all others stay.

    Returns:
        all rows of the file, those that were there as text.

    Raises:
        ValueError: the file has other columns.
    """
    common = environment(device)
    new = [{**row, **common} for row in rows]
    known = {tuple(str(row[k]) for k in key) for row in new}
    old = read_csv(path)
    if old and new and list(old[0]) != list(new[0]):
        raise ValueError(
            f"{path} has the columns {', '.join(old[0])}, not {', '.join(new[0])}: write to another folder"
        )
    together = [row for row in old if tuple(row[k] for k in key) not in known] + new
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")  # whoever is cut off while writing leaves the file as it was
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(together[0]))
        writer.writeheader()
        writer.writerows(together)
    part.replace(path)
    return together


def append_csv(path: Path, row: dict, device: torch.device | str | None = None) -> None:
    """Adds one row to a CSV that several processes may be writing, with the `environment` of `device` after it.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    row = row if device is None else {**row, **environment(device)}
    with path.open("a+", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        header = next(csv.reader(file), None)
        if header is not None and header != list(row):
            raise ValueError(
                f"{path} has the columns {', '.join(header)}, not {', '.join(row)}: write to another folder"
            )
        writer = csv.DictWriter(file, list(row))
        if header is None:
            writer.writeheader()
        writer.writerow(row)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, this process alone holds the lock of that name; others wait."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV as text, in order; none if there is no such file yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_names(option: str, names: Sequence[str]) -> None:
    """Raises ValueError if two of `names`, by which rows are known, are the same."""
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"{option}: two are called {twice[0]}; call one otherwise by NAME=PATH")


def wilson(correct: int, of: int) -> tuple[float, float]:
    """95% confidence interval of a share of successes (Wilson, 1927)."""
    z2, share = 1.959964**2, correct / of
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = math.sqrt(z2 * (share * (1 - share) / of + z2 / (4 * of * of))) / (1 + z2 / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def print_table(rows: Sequence[dict]) -> None:
    """Prints `rows`, which have the same keys, in aligned columns; None is left blank."""
    lines = [list(rows[0]), *([_text(x) for x in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        first, *rest = (text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths)))
        print("  ".join([first, *rest]))


def _text(value) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
