"""What the commands of `cli` share: argument types, how models and codebooks are named, messages and progress."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from .calibration.sensitivity import Mixed
    from .codebook import AnTKVCodebook
    from .config import AnTKVConfig

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a causal language model, or the word smollm2.")
]
Codebook = Annotated[
    str,
    typer.Argument(
        metavar="CODEBOOK",
        help="Codebook of that model: folder, Hub id, or a shipped one: smollm2-135m-instruct-1bit. ott-2bit and "
        "ott-4bit need none.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1; auto takes the GPU if there is one.")]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto is float32 on a CPU, else the model's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a setting for this run, e.g. window=64 or anchor_fraction=0.01; repeat for several.",
    ),
]


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _quiet() -> None:
    """Short warnings, and no progress bars of transformers while it loads weights."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.showwarning = lambda message, *args, **kwargs: _say(f"antkv: warning: {message}")


def _codec(name: str, settings: list[str] | None) -> tuple[AnTKVCodebook | None, AnTKVConfig]:
    """Codebook and config of the argument CODEBOOK; a preset that needs no codebook also takes
    ``--set group=64`` and ``--set layer_bits=0-9=4``."""
    from .codebook import AnTKVCodebook
    from .config import OTT, AnTKVConfig

    if not name.startswith(OTT):
        book = AnTKVCodebook.from_pretrained(name)
        return book, _changed(book.config, settings)
    groups = [setting for setting in settings or [] if setting.startswith("group=")]
    layers = [setting for setting in settings or [] if setting.startswith("layer_bits=")]
    rest = [setting for setting in settings or [] if setting not in groups + layers]
    if groups and not groups[-1][6:].isdigit():
        raise ValueError(f"--set {groups[-1]!r}: group is a number, e.g. group=64")
    group = int(groups[-1][6:]) if groups else None
    config = _changed(AnTKVConfig.preset(name, group=group), rest)
    return None, config.with_layer_bits(layers[-1].partition("=")[2], group) if layers else config


def _given_prompt(prompt: str | None, file: Path | None) -> str:
    """The text of ``--prompt`` or ``--prompt-file``."""
    from .texts import read_utf8

    if (prompt is None) == (file is None):
        raise ValueError("give either --prompt TEXT or --prompt-file FILE")
    if file is not None:
        if str(file) != "-" and not file.is_file():
            raise FileNotFoundError(f"there is no prompt file {str(file)!r}: give a UTF-8 text file, or - for stdin")
        prompt = sys.stdin.read() if str(file) == "-" else read_utf8(file)
    if not prompt or not prompt.strip():
        raise ValueError("the prompt is empty: give text with --prompt TEXT or --prompt-file FILE")
    return prompt


def _check_output(output: Path, names: list[str]) -> None:
    """Raises if `output`, or a folder of `names` within it, cannot be written: before hours of work.

    ValueError: a part of the path is a file. PermissionError: the folder is there and not to be written, or not there
    and its nearest parent is not.
    """
    for place in (output, *output.absolute().parents, *(output / name for name in names)):
        if place.exists() and not place.is_dir():
            raise ValueError(f"--output {output}: {place} is a file: name a folder to write")
    for wanted in (output, *(output / name for name in names)):
        place = next(p for p in (wanted, *wanted.absolute().parents) if p.exists())
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(f"--output {output}: {place} cannot be written to: name another folder")


def _check_model_folder(name: str) -> None:
    """Raises FileNotFoundError for a path that is none, which transformers would take for a badly written Hub id."""
    place = Path(name).expanduser()
    if (place.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1) and not place.exists():
        raise FileNotFoundError(f"there is no model folder {name!r}: give a folder, or a Hub id such as owner/name")


def _load_model(name: str, device: str, dtype: str):
    """Model in evaluation mode and tokenizer; `name` is a folder, a Hub id or the word smollm2."""
    import torch

    from .demo_model import WORD, load_demo_model, load_model

    cuda = torch.cuda.is_available()
    where = torch.device(("cuda" if cuda else "cpu") if device == "auto" else _checked_device(device))
    if where.type == "cuda" and not cuda:
        raise ValueError(f"--device {device}: this PyTorch sees no GPU; use --device cpu")
    kind: Any = _dtype(dtype) or (torch.float32 if where.type == "cpu" else "auto")
    if name == WORD:
        model, tokenizer, place = load_demo_model()
        _say(f"model: {place}")
        return model.to(where, dtype=None if kind == "auto" else kind), tokenizer
    _check_model_folder(name)
    model, tokenizer = load_model(name, kind)
    return model.to(where), tokenizer


def _dtype(name: str) -> torch.dtype | None:
    """What ``--dtype`` names; None for auto."""
    import torch

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name != "auto" and name not in kinds:
        raise ValueError(f"--dtype {name!r} is unknown; choose auto, {', '.join(kinds)}")
    return kinds.get(name)


def _checked_device(name: str) -> str:
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} is unknown; choose auto, cpu, cuda or cuda:<number>")
    return name


def _changes(settings: list[str] | None) -> dict[str, Any]:
    """``["window=64", "anchor_score=none"]`` -> ``{"window": 64, "anchor_score": "none"}``, names checked."""
    from .config import AnchorConfig, AnTKVConfig

    given_otherwise = ("key", "value", "anchors", "layer_specs")
    fields = {f.name: f for f in dataclasses.fields(AnTKVConfig) if f.name not in given_otherwise}
    fields |= {f"anchor_{f.name}": f for f in dataclasses.fields(AnchorConfig)}
    changes: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, text = setting.partition("=")
        if not equals or name not in fields:
            raise ValueError(f"--set {setting!r}: write FIELD=VALUE with a field of {', '.join(fields)}")
        try:
            changes[name] = json.loads(text)
        except ValueError:
            changes[name] = text
        if name == "skip_layers":
            changes[name] = tuple(changes[name] if isinstance(changes[name], list) else [changes[name]])
    return changes


def _changed(config: AnTKVConfig, settings: list[str] | None, layer_bits: str | None = None) -> AnTKVConfig:
    config = config.replace(**_changes(settings))
    return config if layer_bits is None else config.with_layer_bits(layer_bits)


def _mixed_runs(
    bits: list[float] | None, candidates: list[str] | None, protocols: list[str] | None, windows: int | None,
    settings: list[str] | None, max_table_bytes: int | None,
) -> list[tuple[str, AnTKVConfig, Mixed | None]]:  # fmt: skip
    """Name, config and spread of each `--mixed`; the config's specs are replaced by what is found."""
    from .calibration.sensitivity import Mixed
    from .config import AnTKVConfig

    for name, given in (("candidate", candidates), ("sensitivity", protocols), ("sensitivity-windows", windows)):
        if given and not bits:
            raise ValueError(f"--{name} is of --mixed: add --mixed BITS, e.g. --mixed 1")
    runs: list[tuple[str, AnTKVConfig, Mixed | None]] = []
    for b in bits or []:
        found = Mixed(
            b, tuple(candidates or Mixed.candidates), Mixed.windows if windows is None else windows,
            tuple(protocols or Mixed.protocols), max_table_bytes,
        )  # fmt: skip
        spec = str(found.uniform())
        runs.append((f"mixed-{b:g}bit", _changed(AnTKVConfig.preset("1bit", key=spec, value=spec), settings), found))
    return runs


def _bytes_of(option: str, megabytes: float | None) -> int | None:
    """Bytes of an option given in MB (10^6 bytes); raises ValueError for what is no size."""
    if megabytes is not None and not 1e-6 <= megabytes < 1e12:
        raise ValueError(f"{option} {megabytes:g} is no size of tables: give e.g. 12")
    return None if megabytes is None else int(megabytes * 1e6)


def _check_from(**given: Any) -> None:
    """Raises ValueError if an option is given beside --from that would not be heard."""
    if names := [f"--{name.replace('_', '-')}" for name, value in given.items() if value not in (None, [])]:
        raise ValueError(
            f"--from keeps the bits, settings, licence and model of its codebook, and learns none: leave out "
            f"{', '.join(names)}"
        )


class _Bar:
    """Progress of `evaluate` on stderr: one bar a row."""

    def __init__(self) -> None:
        self.name, self.bar = "", None  # type: str, Any

    def __call__(self, name: str, done: int, total: int) -> None:
        from tqdm.auto import tqdm

        if self.bar is None or name != self.name:
            self.name, self.bar = name, tqdm(total=total, desc=name, unit="window")
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()
            self.bar = None
