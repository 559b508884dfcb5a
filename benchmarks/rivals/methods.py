"""The methods of `benchmarks/quality.py` by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from results import locked
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from antkv_hf import AnTKVCodebook, AnTKVConfig
from antkv_hf.config import VQSpec

from .kvquant import KVQuant
from .measuring import Subject
from .scalar import Fp8, Kivi, TurboQuant
from .statistics import Statistics, rotaries
from .tables import ANTKV_ANCHORS, ANTKV_SINKS, NO_ANCHORS, LearnRole, contiguous, learned, own

IN_A_CACHE = ("W0", "S128", "cache")  # what `AnTKVCache` holds is measured through one, too


@dataclass(frozen=True)
class Setting:
    """What a method is built from; `statistics` calls for them only when a method has tables to learn."""

    model: PreTrainedModel
    statistics: Callable[[], Statistics]
    seed: int


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Args:
        name: with its bits, as in the table. family: methods that one line of the plot joins.
        build: makes the subject, learning tables where it has any.
        protocols: those that it can be measured by.
        specs: vector codecs, whose sub-vectors must fit the model's heads.
        random: False for a method that no seed changes.
        learns: whether its tables are learned from the statistics.
        tables: of a codebook that was given, the beginning of its hash: another of the same name is another row.
    """

    name: str
    family: str
    build: Callable[[Setting], Subject]
    protocols: tuple[str, ...] = ("W0", "S128")
    specs: tuple[VQSpec, ...] = ()
    random: bool = False
    learns: bool = False
    tables: str = ""


def _rival(name: str, family: str, make: Callable, random: bool = False, learns: bool = False) -> Method:
    return Method(name, family, lambda setting: Subject(rival=make(setting)), random=random, learns=learns)


def _codebook(
    name: str, family: str, config: AnTKVConfig, learn: Callable[[Statistics], LearnRole],
    tables: tuple[str, AnTKVConfig] | None = None,
) -> Method:  # fmt: skip
    """A codebook learned from the statistics; `tables`: the name and config of the method whose tables it reads."""
    of, learned_as = tables or (name, config)

    def build(setting: Setting) -> Subject:
        statistics = setting.statistics()
        book = learned(statistics, of, learned_as, learn(statistics), setting.seed, noise=learn is own)
        return Subject(config, book)

    return Method(name, family, build, IN_A_CACHE, config.vq_specs(), random=True, learns=True)


def _kvquant(bits: int) -> Callable[[Setting], KVQuant]:
    def make(setting: Setting) -> KVQuant:
        statistics = setting.statistics()
        rotary = rotaries(setting.model)
        folder = statistics.folder / "learned"
        folder.mkdir(exist_ok=True)
        path = folder / f"kvquant-{bits}bit-seed{setting.seed}-{statistics.key}.safetensors"
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                save_file(KVQuant.learn(statistics, bits, rotary, setting.seed).tables, path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
        return KVQuant(load_file(path), bits, rotary)

    return make


def all_methods() -> dict[str, Method]:
    """Every method but codebooks given by path, in the order of the table."""
    found = [_rival("fp8", "fp8", lambda setting: Fp8())]
    for name in ("fp8", "quanto-int4", "quanto-int2", "hqq-int4", "hqq-int2"):
        build = lambda setting, name=name: Subject(baseline=name)
        found.append(Method(f"transformers-{name}", f"transformers {name.partition('-')[0]}", build, ("cache",)))
    for bits in (4, 2):
        found.append(_rival(f"kivi-{bits}bit", "KIVI", lambda setting, bits=bits: Kivi(bits)))
    for bits in (4, 2):
        config = AnTKVConfig.preset(f"ott-{bits}bit")
        found.append(Method(f"ott-{bits}bit", "OTT preset", lambda setting, config=config: Subject(config), IN_A_CACHE))
    for bits in (4, 3, 2):
        make = lambda setting, bits=bits: TurboQuant(bits, setting.seed)
        found.append(_rival(f"turboquant-{bits}bit", "TurboQuant-like", make, random=True))
    for bits in (4, 3, 2, 1):
        found.append(_rival(f"kvquant-{bits}bit", "KVQuant-like, 1%", _kvquant(bits), random=True, learns=True))
    for bits in (4, 2, 1):
        config = AnTKVConfig.preset(f"{bits}bit", anchors=NO_ANCHORS)
        for name, weights in (("cq", "one"), ("cq-fisher", "fisher")):
            family = "CQ" if weights == "one" else "CQ, Fisher"
            learn = lambda s, weights=weights: contiguous(s, weights, clip=False)
            found.append(_codebook(f"{name}-{bits}bit", family, config, learn))
    published = {"key": "anchor_score", "value": "accumulated_attention"}
    for spec, bits in (("d8b8", "1"), ("d32b12", "0.375")):
        config = AnTKVConfig(VQSpec.parse(spec), VQSpec.parse(spec), anchors=ANTKV_ANCHORS)
        learn = lambda s: contiguous(s, published, clip=False)
        name = f"antkv-paper-{bits}bit"
        found.append(_codebook(name, "AnTKV as published", config, learn))
        sinks, family = config.replace(anchors=ANTKV_SINKS), "AnTKV as published, 4 sinks"
        found.append(_codebook(f"{name}-sinks", family, sinks, learn, (name, config)))
    for bits in ("4", "2", "1", "0.5"):
        config = AnTKVConfig.preset(f"{bits}bit")
        found.append(_codebook(f"ours-{bits}bit", "ours, k-means", config, own))
    return {method.name: method for method in found}


def given_codebook(text: str) -> Method:
    """A codebook by its folder or shipped name, with its own config; ``NAME=PATH`` calls it otherwise."""
    name, equals, path = text.rpartition("=")
    book = AnTKVCodebook.from_pretrained(path)
    build = lambda setting: Subject(book.config, book)
    return Method(
        name if equals else Path(path).name, "ours, codebooks given", build, IN_A_CACHE, book.config.vq_specs(),
        tables=book.sha256[:16],
    )  # fmt: skip
