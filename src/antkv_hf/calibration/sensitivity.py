"""Bits where they count: what each layer's keys and values lose at each rate, and the spread that loses least.

The loss of a spec in one place (a layer's keys, or its values) is the mean KL(plain logits || logits) of a token while
nothing else is quantized, under a one-shot protocol of `evaluation.protocols` with anchors, sinks and the bias of coded
tokens as in use. Losses of several places are taken to add up; what the spread really loses is measured in the end.
Several protocols count alike, each relative to what one spec in all layers loses by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..codebook import AnTKVCodebook
from ..codecs import VQTables, least_table_bytes
from ..config import AnTKVConfig
from ..evaluation.protocols import Protocol
from ..rotary import Rotary
from ..specs import VQSpec, spec_for
from .layer_losses import Costs, cache_cost, layer_costs
from .noise import with_noise
from .processes import Processes
from .spread import ROLES, Place, spread_bits, spread_within
from .work_folder import WorkFolder, save_json


@dataclass(frozen=True)
class Mixed:
    """How to spread bits over layers.

    Args:
        bits: bits of codes per element to spend on average over all quantized layers, keys and values.
        candidates: rates (or specs such as ``"d16b8s2"``) that a layer's keys or values may get.
        windows: calibration windows on which losses are measured, taken evenly from all; more make losses surer.
        protocols: by which losses are measured: ``S<n>`` (the last n keys exact, whatever the window of the config),
            ``W0`` (every key and value quantized), or several, to serve both uses.
        max_table_bytes: the most that the tables may take, as stored; None: any size. Residual candidates take a table
            a stage, so within a limit they go where they gain most for their bytes.

    Raises:
        ValueError: bits that are no number, no candidate as small as `bits`, no window, no table byte, no protocol or
            one that is not a one-shot one.
    """

    bits: float
    candidates: tuple[str, ...] = ("0.5", "1", "2", "4")
    windows: int = 4
    protocols: tuple[str, ...] = ("S128",)
    max_table_bytes: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.bits):
            raise ValueError(f"{self.bits} bits on average are no number to spend: give e.g. 1")
        smallest = min(self.specs, key=lambda spec: spec.bits_per_element, default=None)
        if smallest is None or self.bits < smallest.bits_per_element:
            least = "none" if smallest is None else f"{smallest.bits_per_element:g} bits ({smallest})"
            raise ValueError(
                f"{self.bits:g} bits on average cannot be kept, since the smallest candidate has {least}: raise the "
                "bits, or add a smaller candidate"
            )
        if self.windows < 1:
            raise ValueError(f"windows={self.windows} must be at least 1: losses are measured on text")
        if self.max_table_bytes is not None and self.max_table_bytes < 1:
            raise ValueError(f"max_table_bytes={self.max_table_bytes} must be at least 1: give e.g. 12_000_000")
        if isinstance(self.protocols, str):
            raise ValueError(f"protocols={self.protocols!r} must be a tuple of names: give ({self.protocols!r},)")
        parsed = [Protocol.parse(name) for name in self.protocols]
        names = tuple(protocol.name for protocol in parsed)
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"protocols={tuple(self.protocols)} must name at least one protocol, and none twice: give e.g. "
                "('S128', 'W0')"
            )
        for protocol in parsed:
            if not protocol.one_shot:
                raise ValueError(f"sensitivity is measured by protocol W0 or S<n> such as S128, not {protocol.name!r}")
        object.__setattr__(self, "protocols", names)  # one spelling, by which losses are kept

    @property
    def specs(self) -> tuple[VQSpec, ...]:
        """The candidates, smallest first."""
        return tuple(
            sorted({spec_for(c) for c in self.candidates}, key=lambda spec: (spec.bits_per_element, str(spec)))
        )

    def rows(self, windows: torch.Tensor) -> torch.Tensor:
        """The windows to measure on, at even distances among `windows` ``(count, n)``; all if there are fewer."""
        wanted = min(self.windows, len(windows))
        return windows[[i * len(windows) // wanted for i in range(wanted)]]

    def uniform(self, stored: Mapping[VQSpec, int] | None = None) -> VQSpec:
        """The largest candidate that all layers could have.

        Args:
            stored: bytes of each one's tables in all layers; beyond `max_table_bytes` it is left out, unless all are.
        """
        allowed = [spec for spec in self.specs if spec.bits_per_element <= self.bits]
        most = math.inf if self.max_table_bytes is None else self.max_table_bytes
        return ([spec for spec in allowed if stored is None or stored[spec] <= most] or allowed)[-1]


def check_spread(
    mixed: Mixed, rotary: Mapping[int, Rotary | None], described: Mapping[str, Any], window: int, config: AnTKVConfig
) -> None:
    """Raises ValueError, as `spread_bits` and `spread_within`, if the layers of this model cannot have so few bits
    (codes of a vector are padded to whole bytes) or such small tables. Also if nothing in a calibration `window` of so
    many tokens would be quantized."""
    sinks = config.anchors.sinks
    for name in mixed.protocols:
        exact = Protocol.parse(name).window
        if exact and window <= exact + sinks:
            raise ValueError(
                f"sensitivity by protocol {name} reads windows of {window} tokens, of which the last {exact} and "
                f"{sinks} sinks are exact, so that nothing is quantized: raise the calibration window above "
                f"{exact + sinks}, or measure by W0"
            )
    sizes = head_sizes(described)
    costs = {(i, role): dict.fromkeys(mixed.specs, 0.0) for i in rotary for role in ROLES}
    spread_bits(costs, sizes, mixed.bits)
    if mixed.max_table_bytes is not None:
        noisy, heads = window > config.window + sinks, described["kv_heads"]
        least = {}
        for layer, role in costs:
            permuted = role == "key" and rotary[layer] is not None
            least[layer, role] = {
                spec: least_table_bytes(spec, heads, sizes[role], permuted, permuted and noisy) for spec in mixed.specs
            }
        spread_within(costs, sizes, mixed.bits, least, mixed.max_table_bytes)


def head_sizes(described: Mapping[str, Any]) -> dict[str, int]:
    """Head size of keys and of values, by role."""
    return {"key": described["head_dim"], "value": described["value_dim"]}


def layer_specs(found: Mapping[Place, VQSpec]) -> dict[int, tuple[VQSpec, VQSpec]]:
    """What `spread_bits` found as `AnTKVConfig.layer_specs`."""
    return {layer: (found[layer, "key"], found[layer, "value"]) for layer in sorted({layer for layer, _ in found})}


def measure(
    model: PreTrainedModel,
    mixed: Mixed,
    config: AnTKVConfig,
    described: Mapping[str, Any],
    rotary: Mapping[int, Rotary | None],
    rows: torch.Tensor,
    fresh: torch.Tensor | None,
    folder: WorkFolder,
    progress: bool,
    processes: Processes,
) -> dict[str, Costs]:
    """Losses by protocol, nats a token, of every place at every candidate: layer by layer, with the other processes.

    Args:
        described: see `codebook.describe_model`. rows: the windows to measure on, `Mixed.rows` of the calibration's.
        fresh: other windows, on which the noise of each candidate is measured (`with_noise`). None: no bias.
        folder: holds the tables of all candidates; what it has of losses is not measured, what is measured is kept.

    Raises:
        ValueError: a loss is not finite.
    """
    settings = {
        "windows": len(rows),
        "anchors": asdict(config.anchors),
        "chunk": config.chunk,
        "bias": fresh is not None,
    }
    layers = sorted(rotary)
    files = {(p, i): folder.costs_file({**settings, "protocol": p}, i) for p in mixed.protocols for i in layers}
    known = {at: _read_costs(file) for at, file in files.items()}
    lacking = {
        at: [(r, spec) for r in ROLES for spec in mixed.specs if str(spec) not in held.get(r, {})]
        for at, held in known.items()
    }
    processes.wait()  # until all have seen what is missing
    own = processes.share([i for i in layers if any(lacking[p, i] for p in mixed.protocols)])
    needed = {spec for (_, layer), places in lacking.items() if layer in own for _, spec in places}
    books = {
        spec: _uniform_book(model, config, spec, rotary, described, fresh, folder, progress and processes.rank == 0)
        for spec in mixed.specs
        if spec in needed
    }
    for layer in tqdm(own, desc="sensitivity", unit="layer", disable=not progress or processes.rank > 0):
        for protocol in mixed.protocols:
            if not lacking[protocol, layer]:
                continue
            held = known[protocol, layer]
            tables = {(r, spec): books[spec].tables[layer][ROLES.index(r)] for r, spec in lacking[protocol, layer]}
            for (_, role), found in layer_costs(model, rows, protocol, config, layer, rotary[layer], tables).items():
                held[role] = {**held.get(role, {}), **{str(spec): cost for spec, cost in found.items()}}
            save_json(held, files[protocol, layer])
    processes.wait()
    known = {at: _read_costs(file) for at, file in files.items()}
    return {
        p: {(i, r): {spec: known[p, i][r][str(spec)] for spec in mixed.specs} for i in layers for r in ROLES}
        for p in mixed.protocols
    }


def search(
    by_protocol: Mapping[str, Costs],
    mixed: Mixed,
    config: AnTKVConfig,
    described: Mapping[str, Any],
    rows: torch.Tensor,
    has_noise: bool,
    folder: WorkFolder,
) -> tuple[AnTKVConfig, dict[str, Any], VQSpec]:
    """Spreads the bits by the losses that `measure` found on windows `rows`.

    Args:
        has_noise: whether tables of keys will hold noise, which counts as their bytes. folder: holds the tables.

    Returns:
        `config` with `layer_specs`; what was found, JSON-ready; and the spec of all layers to compare with.
    """
    layers = sorted({layer for layer, _ in by_protocol[mixed.protocols[0]]})
    sizes, uniform = head_sizes(described), mixed.uniform()
    stored: dict[Place, dict[VQSpec, int]] = {}
    limit: dict[str, Any] = {}
    if mixed.max_table_bytes is not None:
        limit = {"max_table_bytes": mixed.max_table_bytes}
        stored = {
            (i, r): {s: _stored_bytes(folder.read_tables(i, r, s)[0], has_noise) for s in mixed.specs}
            for i in layers
            for r in ROLES
        }
        uniform = mixed.uniform({spec: sum(options[spec] for options in stored.values()) for spec in mixed.specs})
    costs, unit = _together(by_protocol, uniform)
    chosen = best = spread_bits(costs, sizes, mixed.bits)
    if mixed.max_table_bytes is not None:
        chosen = spread_within(costs, sizes, mixed.bits, stored, mixed.max_table_bytes)
    record = {
        "bits": mixed.bits,
        **limit,
        "protocol": " + ".join(mixed.protocols),
        "windows": f"{len(rows)} x {rows.shape[1]}",
        "unit": unit,
        "layers": layers,
        **{
            role: {str(spec): [rounded(costs[layer, role][spec]) for layer in layers] for spec in mixed.specs}
            for role in ROLES
        },
        "predicted": {
            "mixed": rounded(sum(costs[place][spec] for place, spec in chosen.items())),
            **({"any size": rounded(sum(costs[place][spec] for place, spec in best.items()))} if limit else {}),
            str(uniform): rounded(sum(cost[uniform] for cost in costs.values())),
        },
    }
    return config.replace(layer_specs=layer_specs(chosen)), record, uniform


def _together(costs: Mapping[str, Costs], uniform: VQSpec) -> tuple[Costs, str]:
    """Losses by protocol as one loss of each spec in each place, and its unit.

    Those of several protocols are shares of what `uniform` in all layers loses by each, summed: in nats a protocol
    that loses ten times as much, as W0 does, would decide alone. One by which nothing is lost does not count.
    """
    if len(costs) == 1:
        return next(iter(costs.values())), "KL, nats a token"
    whole = {p: sum(options[uniform] for options in found.values()) for p, found in costs.items()}
    places = next(iter(costs.values()))
    counted = [p for p in costs if whole[p] > 0]
    together = {
        place: {spec: sum(costs[p][place][spec] / whole[p] for p in counted) for spec in options}
        for place, options in places.items()
    }
    nats = ", ".join(f"{rounded(loss)} by {p}" for p, loss in whole.items())
    return together, f"KL relative to that of {uniform} in all layers (nats a token: {nats}), summed over protocols"


def _stored_bytes(tables: VQTables, has_noise: bool) -> int:
    """Bytes of a layer's tables in a codebook; those in the folder have no noise yet."""
    heads, groups, _, _, sub_dim = tables.centroids.shape
    noise = heads * groups * sub_dim**2 * 4 if has_noise and tables.permutation is not None else 0
    return noise + sum(t.numel() * t.element_size() for t in tables.tensors().values())


def measured(
    model: PreTrainedModel,
    mixed: Mixed,
    book: AnTKVCodebook,
    spec: VQSpec,
    rows: torch.Tensor,
    fresh: torch.Tensor | None,
    folder: WorkFolder,
) -> dict[str, Any]:
    """Loss of the spread and of `spec` in all layers, nats a token, on the windows of `measure`; of several protocols
    by protocol."""
    same = _uniform_book(model, book.config, spec, book.tables, book.model, fresh, folder)
    losses = {
        protocol: {
            name: rounded(cache_cost(model, rows, protocol, held))
            for name, held in (("mixed", book), (str(spec), same))
        }
        for protocol in mixed.protocols
    }
    return losses if len(losses) > 1 else next(iter(losses.values()))


def _uniform_book(
    model: PreTrainedModel,
    config: AnTKVConfig,
    spec: VQSpec,
    layers: Iterable[int],
    described: Mapping[str, Any],
    fresh: torch.Tensor | None,
    folder: WorkFolder,
    progress: bool = False,
) -> AnTKVCodebook:
    """A codebook of one candidate in all `layers`, from the tables in the folder, with noise measured on `fresh`."""
    tables = {i: (folder.read_tables(i, "key", spec)[0], folder.read_tables(i, "value", spec)[0]) for i in layers}
    book = AnTKVCodebook(config.replace(key=spec, value=spec, layer_specs={}), tables, dict(described))
    return book if fresh is None else with_noise(model, book, fresh, progress)


def without_outdated(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """`AnTKVCodebook.calibration` less what was measured of tables that have changed since."""
    kept = {name: fact for name, fact in calibration.items() if name != "relative_error"}
    if "sensitivity" in kept:
        kept["sensitivity"] = {name: fact for name, fact in kept["sensitivity"].items() if name != "measured"}
    return kept


def rounded(loss: float) -> float:
    return float(f"{loss:.4g}")


def _read_costs(file: Path) -> dict[str, dict[str, float]]:
    """Losses by role and spec; those not measured, or damaged, are left out and so measured anew."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {
            role: {spec: float(loss) for spec, loss in found[role].items() if math.isfinite(loss)}
            for role in ROLES
            if role in found
        }
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}
