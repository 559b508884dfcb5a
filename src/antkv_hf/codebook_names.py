"""How a codebook is named: a folder, a Hub id, or the name of one that ships with the package."""

from __future__ import annotations

import re
from pathlib import Path

from .config import OTT

CODEBOOK = "smollm2-135m-instruct-1bit"  # of the demo


def shipped_codebooks() -> dict[str, Path]:
    """Codebooks that come with the package, by name: in ``codebooks/`` of a checkout, else packaged with the wheel."""
    package = Path(__file__).resolve().parent
    places = (package / "codebooks", package.parents[1] / "codebooks")
    return {p.parent.name: p.parent for place in places for p in sorted(place.glob("*/config.json"))}


def find_codebook(name: str = CODEBOOK) -> str:
    """The folder of a shipped codebook; other folders and Hub ids (owner/name) as they are.

    Raises:
        FileNotFoundError: any other name: a preset or a rate, saying how it is used; else naming what there is.
    """
    if Path(name).is_dir() or "/" in name:
        return name
    shipped = shipped_codebooks()
    if name in shipped:
        return str(shipped[name])
    if name == "identity" or name.startswith(OTT):
        preset = f"AnTKVConfig.preset({name!r})"
        raise FileNotFoundError(
            f"{name!r} is a preset that needs no codebook: AnTKVCache(model.config, {preset}), or "
            f"antkv_generate(config={preset})"
        )
    what = "it is no folder, no Hub repo id (owner/name) and not shipped"
    if re.fullmatch(r"[\d.]+bit", name):
        what = f"it is a rate, which needs the codebook of a model, e.g. {CODEBOOK}"
    raise FileNotFoundError(
        f"no codebook {name!r}: {what} (shipped: {', '.join(shipped) or 'none'}); make one with `antkv calibrate`"
    )
