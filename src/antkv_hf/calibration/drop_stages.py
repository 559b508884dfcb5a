"""Smaller tables: the last residual stages are left out where the model misses them least.

A residual table without its last stage is the table that fewer stages would have given, since each stage was fitted to
what those before it left. Only keys' noise grows, and is to be measured anew (`noise.with_noise`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ..codebook import AnTKVCodebook
from ..codecs import VQTables
from ..specs import VQSpec
from .sensitivity import layer_specs, rounded, without_outdated
from .spread import ROLES


def drop_stages(codebook: AnTKVCodebook, max_bytes: int) -> AnTKVCodebook:
    """The codebook with so few residual stages that its tables take at most `max_bytes`; fewer bits for its codes, too.

    One after the other the stage goes whose loss rises least for the bytes it frees, by what ``--mixed`` measured
    (``codebook.calibration["sensitivity"]``). The loss of a spec that was no candidate follows from the others, by
    its bits.

    Args:
        codebook: as `calibrate` made it with `mixed`, not fine-tuned: training moves all stages together.
        max_bytes: of all tables as stored (`AnTKVCodebook.tables_bytes`).

    Returns:
        The codebook itself if its tables fit, however it was made. Else one with `layer_specs` of its own: keys that
        lost a stage keep the noise measured with it, which is too small now. ``calibration["drop_stages"]`` says how
        many went and what the losses sum to before and after.

    Raises:
        ValueError: tables do not fit, and there are no measured losses, the codebook is fine-tuned, or it has too few
            stages to drop; the message says how small it can get.
    """
    if codebook.tables_bytes() <= max_bytes:
        return codebook
    record = codebook.calibration.get("sensitivity")
    if record is None:
        raise ValueError(
            "the codebook says nothing of what each layer's codes lose, by which stages could be dropped: calibrate it "
            "with mixed (--mixed)"
        )
    if "finetune" in codebook.calibration:
        raise ValueError("the codebook was fine-tuned, all stages together: drop stages first, then fine-tune")
    tables = {(layer, role): codebook.tables[layer][i] for layer in codebook.tables for i, role in enumerate(ROLES)}
    specs = {(i, role): codebook.config.vq_specs(i)[j] for i in codebook.tables for j, role in enumerate(ROLES)}
    losses = {
        (layer, role): {VQSpec.parse(spec): costs[n] for spec, costs in record[role].items()}
        for role in ROLES
        for n, layer in enumerate(record["layers"])
    }
    before, free, dropped = dict(specs), codebook.tables_bytes() - max_bytes, 0
    while free > 0:
        steps = []
        for place, spec in specs.items():
            if spec.stages > 1:
                less, size = replace(spec, stages=spec.stages - 1), _stage_bytes(tables[place])
                steps.append(((_loss(losses[place], less) - _loss(losses[place], spec)) / size, place, less, size))
        if not steps:
            least = max_bytes + free
            raise ValueError(
                f"{max_bytes:,} bytes are too few: with one stage in every layer the tables take {least:,}; allow "
                "more, or calibrate with candidates of fewer bits a code, such as d8b6"
            )
        _, place, less, size = min(steps, key=lambda step: (step[0], step[1]))
        specs[place], free, dropped = less, free - size, dropped + 1
    cut = {place: _cut(t, specs[place].stages) for place, t in tables.items()}
    said = {
        "stages": dropped,
        "loss": [rounded(sum(_loss(losses[p], s) for p, s in chosen.items())) for chosen in (before, specs)],
    }
    return AnTKVCodebook(
        codebook.config.replace(layer_specs=layer_specs(specs)),
        {layer: (cut[layer, "key"], cut[layer, "value"]) for layer in codebook.tables},
        codebook.model,
        {**without_outdated(codebook.calibration), "drop_stages": said},
    )


def _stage_bytes(tables: VQTables) -> int:
    return tables.centroids[:, :, 0].numel() * tables.centroids.element_size()


def _cut(tables: VQTables, stages: int) -> VQTables:
    return replace(tables, centroids=tables.centroids[:, :, :stages].contiguous())


def _loss(measured: Mapping[VQSpec, float], spec: VQSpec) -> float:
    """Loss of a spec: as measured, or between and beyond measured ones, its logarithm a line by bits."""
    if spec in measured:
        return measured[spec]
    known: dict[float, float] = {}  # the best of equal bits
    for other, loss in measured.items():
        bits = other.bits_per_element
        known[bits] = min(known.get(bits, math.inf), max(loss, 1e-12))
    bits = spec.bits_per_element
    if bits in known or len(known) == 1:
        return known.get(bits, next(iter(known.values())))
    rates = sorted(known)
    above = next((i for i, rate in enumerate(rates) if rate > bits), len(rates) - 1)
    low, high = rates[max(above - 1, 0)], rates[max(above, 1)]
    slope = (math.log(known[high]) - math.log(known[low])) / (high - low)
    return math.exp(math.log(known[low]) + slope * (bits - low))
