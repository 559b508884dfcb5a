"""Bits spread over layers, keys and values: the choice of specs whose losses sum to the least."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..specs import VQSpec

ROLES = ("key", "value")
Place = tuple[int, str]  # layer, role
_HALVINGS = 40  # of the price of a byte: far below a millionth of it


def spread_bits(
    costs: Mapping[Place, Mapping[VQSpec, float]], sizes: Mapping[str, int], bits: float
) -> dict[Place, VQSpec]:
    """The choice of one spec for each place whose losses sum to the least, at no more than `bits` on average. Exact.

    Args:
        costs: loss of each candidate in each place.
        sizes: head size of keys and of values, by role; codes are counted in whole bytes of a vector, as stored.
        bits: bits per element on average.

    Raises:
        ValueError: even the smallest candidates take more.
    """
    places = sorted(costs)
    taken = [[(spec, spec.bytes_per_vector(sizes[role])) for spec in costs[layer, role]] for layer, role in places]
    unit = math.gcd(*(size for options in taken for _, size in options))
    elements = sum(sizes[role] for _, role in places)
    room = math.floor(bits * elements / 8 / unit + 1e-9)
    if (least := sum(min(size for _, size in options) for options in taken)) > room * unit:
        raise ValueError(
            f"{bits:g} bits on average cannot be kept: the smallest candidates take {8 * least / elements:g}; raise "
            "the bits, or add a smaller candidate"
        )
    best = np.zeros(room + 1)  # least loss of the places so far, by units left to spend on them
    chosen = np.zeros((len(places), room + 1), dtype=np.int64)
    for i, (place, options) in enumerate(zip(places, taken)):
        losses = np.full((len(options), room + 1), np.inf)
        for j, (spec, size) in enumerate(options):
            units = size // unit
            if units <= room:
                losses[j, units:] = best[: room + 1 - units] + costs[place][spec]
        chosen[i] = losses.argmin(0)
        best = losses.min(0)
    found, left = {}, room
    for i in reversed(range(len(places))):
        spec, size = taken[i][chosen[i, left]]
        found[places[i]] = spec
        left -= size // unit
    return dict(sorted(found.items()))


def spread_within(
    costs: Mapping[Place, Mapping[VQSpec, float]],
    sizes: Mapping[str, int],
    bits: float,
    stored: Mapping[Place, Mapping[VQSpec, int]],
    most: int,
) -> dict[Place, VQSpec]:
    """`spread_bits` among the choices whose tables take at most `most` bytes.

    A price of a byte is added to the losses, the smallest by which tables fit (Lagrange): of all choices that take no
    more bytes, the best. Then single places get what they gain most by, for its bytes, as long as room is left.

    Args:
        stored: bytes of each candidate's tables in each place.

    Raises:
        ValueError: even the smallest tables take more; or as `spread_bits`.
    """

    def at(price: float) -> tuple[dict[Place, VQSpec], int]:
        priced = {p: {s: loss + price * stored[p][s] for s, loss in options.items()} for p, options in costs.items()}
        found = spread_bits(priced, sizes, bits)
        return found, sum(stored[place][spec] for place, spec in found.items())

    found, taken = at(0.0)
    if taken <= most:
        return found
    losses = [loss for options in costs.values() for loss in options.values()]
    low, high = 0.0, 1.0 + sum(map(abs, losses))  # at a price above all losses together, bytes alone decide
    found, taken = at(high)
    if taken > most:
        raise ValueError(
            f"{most:,} bytes are too few: at {bits:g} bits the smallest tables of these candidates take {taken:,}; "
            "allow more bytes or bits, add a candidate of fewer stages or of fewer bits a code (d8b6), or skip layers"
        )
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high) if low else high / 1024
        choice, taken = at(middle)
        if taken <= most:
            found, high = choice, middle
        else:
            low = middle
    return _filled(found, costs, sizes, bits, stored, most)


def _filled(
    found: dict[Place, VQSpec],
    costs: Mapping[Place, Mapping[VQSpec, float]],
    sizes: Mapping[str, int],
    bits: float,
    stored: Mapping[Place, Mapping[VQSpec, int]],
    most: int,
) -> dict[Place, VQSpec]:
    """`found` with single places changed, the largest gain a byte first, while bits and bytes allow it."""
    found = dict(found)
    room = most - sum(stored[place][spec] for place, spec in found.items())
    codes = math.floor(bits * sum(sizes[role] for _, role in found) / 8 + 1e-9)
    codes -= sum(spec.bytes_per_vector(sizes[role]) for (_, role), spec in found.items())
    while True:
        steps = []
        for (layer, role), old in found.items():
            place = (layer, role)
            for new, loss in costs[place].items():
                gain, size = costs[place][old] - loss, stored[place][new] - stored[place][old]
                more = new.bytes_per_vector(sizes[role]) - old.bytes_per_vector(sizes[role])
                if gain > 0 and size <= room and more <= codes:
                    steps.append((gain / max(size, 1), place, new, size, more))
        if not steps:
            return found
        _, place, new, size, more = max(steps, key=lambda step: step[0])
        found[place], room, codes = new, room - size, codes - more
