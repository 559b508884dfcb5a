"""Codec specs: how a head vector becomes codes, the presets by bits, and the specs of single layers."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

CODE_BITS = (4, 6, 8, 10, 12)
MOST_LAYERS = 10_000  # that any model has
SCALAR_BITS, SCALAR_GROUPS = (2, 4), (32, 64, 128)


def whole_number(name: str, value: Any, example: int) -> int:
    """`value` as an int. Raises ValueError, naming it and an `example`, if it is no whole number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name}={value!r} must be a whole number, e.g. {name}={example}")
    return int(value)


def check_numbers(made: Any) -> None:
    """Raises ValueError, naming field and value, if a dataclass has no number where its default is one."""
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if type(field.default) is int:
            object.__setattr__(made, field.name, whole_number(field.name, value, field.default))
        elif type(field.default) is float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
            raise ValueError(f"{field.name}={value!r} must be a number, e.g. {field.name}={field.default}")


@dataclass(frozen=True)
class VQSpec:
    """How one head vector becomes codes: sub-vectors, each the sum of `stages` centroids out of ``2**code_bits``.

    One stage is product VQ, several are residual VQ inside each sub-vector (a group).

    Args:
        sub_dim: channels of a sub-vector; must divide head_dim.
        code_bits: bits of one code, one of 4, 6, 8, 10, 12.
        stages: residual stages, >= 1.

    Raises:
        ValueError: if a number is out of range; the message says which are allowed.
    """

    sub_dim: int = 8
    code_bits: int = 8
    stages: int = 1

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.sub_dim < 1:
            raise ValueError(f"sub_dim={self.sub_dim} must be at least 1: it is the number of channels in a sub-vector")
        if self.code_bits not in CODE_BITS:
            raise ValueError(f"code_bits={self.code_bits} does not exist; choose one of {CODE_BITS}")
        if self.stages < 1:
            raise ValueError(f"stages={self.stages} must be at least 1 (1 is product quantization, more is residual)")

    @property
    def bits_per_element(self) -> float:
        """Bits of codes a cached element costs (anchors, window and tables not counted)."""
        return self.code_bits * self.stages / self.sub_dim

    @property
    def centroids(self) -> int:
        """Entries in one table."""
        return 1 << self.code_bits

    def groups(self, head_dim: int) -> int:
        """Sub-vectors in a head vector; raises ValueError if `sub_dim` does not divide `head_dim`."""
        if head_dim % self.sub_dim:
            raise ValueError(
                f"head_dim {head_dim} is not a multiple of sub_dim {self.sub_dim}; "
                f"choose a spec whose sub_dim divides {head_dim}, e.g. d{math.gcd(head_dim, self.sub_dim)}b8"
            )
        return head_dim // self.sub_dim

    def bytes_per_vector(self, head_dim: int) -> int:
        """Bytes of packed codes a token and head take; a vector's codes are padded to whole bytes."""
        return -(-self.groups(head_dim) * self.stages * self.code_bits // 8)

    key_bytes = value_bytes = bytes_per_vector

    def table_bytes(self, head_dim: int) -> int:
        """Bytes of one kv head's centroids in float16."""
        return 2 * self.groups(head_dim) * self.stages * self.centroids * self.sub_dim

    @classmethod
    def parse(cls, text: str) -> VQSpec:
        """Reads ``"d8b8"`` (sub_dim 8, 8-bit codes) or ``"d16b8s2"`` (two residual stages)."""
        match = re.fullmatch(r"d(\d+)b(\d+)(?:s(\d+))?", text.strip())
        if not match:
            raise ValueError(
                f"cannot read codec spec {text!r}; write it as d<sub_dim>b<code_bits>[s<stages>], e.g. d8b8"
            )
        return cls(int(match[1]), int(match[2]), int(match[3] or 1))

    @classmethod
    def for_bits(cls, bits: float | str) -> VQSpec:
        """The preset spec for that many bits per element; raises ValueError for a rate that has none."""
        key = f"{float(bits):g}" if not isinstance(bits, str) else bits.removesuffix("bit")
        if key not in BITS_TO_SPEC:
            raise ValueError(
                f"{key} bits per element do not exist as a preset; choose one of {', '.join(BITS_TO_SPEC)} "
                "or give a spec such as d8b8 (8-bit codes for 8 channels = 1 bit)"
            )
        return BITS_TO_SPEC[key]

    def __str__(self) -> str:
        return f"d{self.sub_dim}b{self.code_bits}" + (f"s{self.stages}" if self.stages > 1 else "")


@dataclass(frozen=True)
class ScalarSpec:
    """Asymmetric scalar quantization, ``x = zero + scale * code``, which needs no codebook (KIVI, OTT).

    Keys share a float16 scale and zero over `group` consecutive tokens of a channel, values over `group` channels of
    a token (all of them in a smaller head).

    Args:
        bits: bits of a code, 2 or 4.
        group: elements that share a scale and a zero, one of 32, 64, 128.

    Raises:
        ValueError: if a number is none of those.
    """

    bits: int = 2
    group: int = 32

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.bits not in SCALAR_BITS:
            raise ValueError(f"{self.bits}-bit scalar codes do not exist; choose one of {SCALAR_BITS}")
        if self.group not in SCALAR_GROUPS:
            raise ValueError(f"group={self.group} does not exist; choose one of {SCALAR_GROUPS}")

    @property
    def bits_per_element(self) -> float:
        """Bits a cached element costs with its share of scale and zero (anchors and window not counted)."""
        return self.bits + 32 / self.group

    @property
    def levels(self) -> int:
        return 1 << self.bits

    def channel_groups(self, head_dim: int) -> int:
        """Groups that the channels of one value make; the last may be smaller."""
        return -(-head_dim // self.group)

    def code_bytes(self, head_dim: int) -> int:
        """Bytes of one vector's packed codes."""
        return -(-head_dim * self.bits // 8)

    def key_bytes(self, head_dim: int) -> float:
        """Bytes of one key with its share of the float16 scales and zeros of its group of tokens."""
        return self.code_bytes(head_dim) + 4 * head_dim / self.group

    def value_bytes(self, head_dim: int) -> int:
        """Bytes of one value with its float16 scales and zeros."""
        return self.code_bytes(head_dim) + 4 * self.channel_groups(head_dim)

    @classmethod
    def parse(cls, text: str) -> ScalarSpec:
        """Reads ``"int2g32"``: 2-bit codes, groups of 32."""
        match = re.fullmatch(r"int(\d+)g(\d+)", text.strip())
        if not match:
            raise ValueError(f"cannot read scalar spec {text!r}; write it as int<bits>g<group>, e.g. int2g32")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"int{self.bits}g{self.group}"


Spec: TypeAlias = VQSpec | ScalarSpec
SpecPair: TypeAlias = tuple[Spec, Spec]  # of keys and values

BITS_TO_SPEC = {
    "4": VQSpec(2, 8),
    "2": VQSpec(4, 8),
    "1.25": VQSpec(8, 10),
    "1": VQSpec(8, 8),
    "0.75": VQSpec(32, 8, 3),
    "0.5": VQSpec(16, 8),
    "0.375": VQSpec(32, 12),
}


def parse_spec(text: str) -> VQSpec | ScalarSpec:
    """Reads a spec of either kind, as `str` writes it."""
    return ScalarSpec.parse(text) if text.strip().startswith("int") else VQSpec.parse(text)


def spec_for(bits: float | str) -> VQSpec:
    """The spec of a rate, or the spec that `bits` writes out."""
    return VQSpec.parse(bits) if isinstance(bits, str) and bits.startswith("d") else VQSpec.for_bits(bits)


def scalar_spec_for(bits: float | str, group: int | None, role: str) -> ScalarSpec:
    """The scalar spec of 2 or 4 bits for keys or values (`role`), or the spec that `bits` writes out."""
    text = bits.removesuffix("bit") if isinstance(bits, str) else f"{bits:g}"
    if text.startswith("int"):
        return ScalarSpec.parse(text)
    if text not in map(str, SCALAR_BITS):
        raise ValueError(f"{text} bits do not exist without a codebook; choose ott-2bit or ott-4bit")
    if group is None:
        group = 32 if (text, role) == ("2", "key") else 64
    return ScalarSpec(int(text), group)


def parse_layer_bits(text: str, scalar: bool = False, group: int | None = None) -> dict[int, SpecPair]:
    """Reads ``"0-9=0.5,10-24=2,25=1/d16b8s2"``: bits, or specs, of layers; after a slash those of the values.

    Args:
        scalar: read bits as those of scalar codes (``ott-2bit``). group: of theirs, as in `AnTKVConfig.preset`.

    Raises:
        ValueError: naming what cannot be read, a span that runs backwards, a layer that is named twice, one
            that no model has, bits that do not exist.
    """
    found: dict[int, SpecPair] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?=([\w.]+)(?:/([\w.]+))?", part.strip())
        if not match:
            raise ValueError(
                f"cannot read {part!r} of the layer bits {text!r}; write LAYER=BITS or FIRST-LAST=BITS with commas "
                "between, e.g. 0-9=0.5,10-24=2 (BITS may be a spec, or KEYS/VALUES)"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"layers {first}-{last} run backwards: write {last}-{first}={match[3]}")
        if last >= MOST_LAYERS:  # before a list of them fills memory
            raise ValueError(
                f"layer {last} of the layer bits {text!r} does not exist: layers end below {MOST_LAYERS:,}"
            )
        bits = match[3], match[4] or match[3]
        key, value = (
            scalar_spec_for(b, group, role) if scalar else spec_for(b) for b, role in zip(bits, ("key", "value"))
        )
        for layer in range(first, last + 1):
            if layer in found:
                raise ValueError(f"layer {layer} is named twice in the layer bits {text!r}: name it once")
            found[layer] = key, value
    return found


def name_runs(layers: Sequence[int]) -> str:
    """Sorted numbers, neighbours as a range: ``"0-5, 7"``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    return ", ".join("-".join(map(str, run)) for run in runs)


def describe_layers(specs: Mapping[int, SpecPair]) -> str:
    """Layers with their specs, runs of equal ones together: ``"0-9: d16b8/d16b8, 10: d4b8/d8b8"``."""
    runs: list[tuple[int, int, str]] = []
    for layer, (key, value) in sorted(specs.items()):
        name = f"{key}/{value}"
        if runs and runs[-1][1] == layer - 1 and runs[-1][2] == name:
            runs[-1] = runs[-1][0], layer, name
        else:
            runs.append((layer, layer, name))
    return ", ".join(f"{first if first == last else f'{first}-{last}'}: {name}" for first, last, name in runs)
