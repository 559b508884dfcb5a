"""What a cache is made of: codec specs, anchors, window; presets by bits per element; validation with messages."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

CODE_BITS = (4, 6, 8, 10, 12)
ANCHOR_DTYPES = ("int8", "float16")
ROPE_MODES = ("pre", "none", "block")
SCALAR_BITS, SCALAR_GROUPS = (2, 4), (32, 64, 128)
OTT = "ott-"  # presets that need no codebook
OUTLIERS, OUTLIER_POOL = 0.04, 256  # their outlier tokens: share of a chunk, and most that a kv head keeps


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

    @classmethod
    def parse(cls, text: str) -> ScalarSpec:
        """Reads ``"int2g32"``: 2-bit codes, groups of 32."""
        match = re.fullmatch(r"int(\d+)g(\d+)", text.strip())
        if not match:
            raise ValueError(f"cannot read scalar spec {text!r}; write it as int<bits>g<group>, e.g. int2g32")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"int{self.bits}g{self.group}"


BITS_TO_SPEC = {
    "4": VQSpec(2, 8),
    "2": VQSpec(4, 8),
    "1.25": VQSpec(8, 10),
    "1": VQSpec(8, 8),
    "0.75": VQSpec(32, 8, 3),
    "0.5": VQSpec(16, 8),
    "0.375": VQSpec(32, 12),
}


@dataclass(frozen=True)
class AnchorConfig:
    """Which tokens stay exact.

    Args:
        score: name of the score (``antkv_hf.anchors.SCORES``): ``error_aware`` (default), ``anchor_score`` (AnTKV's),
            ``accumulated_attention``, ``squared_attention``, ``outlier_tokens`` (OTT's), ``key_norm``,
            ``first_tokens``, ``random``, ``none``.
        fraction: share of each chunk and kv head that is kept, 0 to 1.
        max_tokens: most anchors that a sequence and kv head keeps in all; the worst-scored is demoted to its code when
            a better one comes. 0 keeps every chunk's.
        dtype: ``int8`` (a float16 scale per vector) or ``float16``.
        sinks: first tokens of each sequence, always kept in 16 bits (float16, or bfloat16 in a bfloat16 model); beside
            scalar codes in the model's dtype.
        query_stride: of the queries more than two blocks of 128 tokens after a token, every how many-th scores it
            (weighted by as much); nearer ones all do. 1 counts every query: slightly better anchors (0.2% of SmolLM2's
            perplexity at 1 bit), but to score a Llama-3-8B's prompt of 32K tokens then takes 0.63 s on an H100, not
            0.07 (the whole prefill with DynamicCache: 1.4 s).
    """

    score: str = "error_aware"
    fraction: float = 0.02
    dtype: str = "int8"
    sinks: int = 4
    query_stride: int = 16
    max_tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens={self.max_tokens} must not be negative (0 keeps the anchors of every chunk)")
        if self.query_stride < 1:
            raise ValueError(f"query_stride={self.query_stride} must be at least 1 (1 counts every query)")
        if not 0.0 <= self.fraction <= 1.0:
            raise ValueError(f"anchor fraction {self.fraction} must lie between 0 and 1 (default 0.02 = 2% of tokens)")
        if self.dtype not in ANCHOR_DTYPES:
            raise ValueError(f"anchor dtype {self.dtype!r} is unknown; choose one of {ANCHOR_DTYPES}")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must not be negative (default 4, 0 switches them off)")

    @property
    def enabled(self) -> bool:
        return self.score != "none" and self.fraction > 0


@dataclass(frozen=True)
class AnTKVConfig:
    """Everything that decides what an `AnTKVCache` keeps.

    Args:
        key, value: codec specs, separately choosable: two `VQSpec` (a codebook is needed), two `ScalarSpec` (none is),
            or two None for the identity codec (nothing is quantized; for tests).
        anchors: which tokens stay exact, and how.
        window: most recent tokens that always stay exact, >= 1 (default 128).
        chunk: tokens that are encoded at a time and share an anchor budget (default 128); a multiple of a scalar
            spec's key group.
        rope: form in which keys are coded: ``pre`` (before RoPE), ``none`` (model without RoPE), ``block`` (reserved).
        skip_layers: layer indices left unquantized.
        backend: ``auto``, ``reference``, ``triton`` or ``cuda``; the environment variable ANTKV_BACKEND overrides it.
    """

    key: VQSpec | ScalarSpec | None = field(default_factory=VQSpec)
    value: VQSpec | ScalarSpec | None = field(default_factory=VQSpec)
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    window: int = 128
    chunk: int = 128
    rope: str = "pre"
    skip_layers: tuple[int, ...] = ()
    backend: str = "auto"

    def __post_init__(self) -> None:
        if (self.key is None) != (self.value is None):
            raise ValueError("key and value must both have a codec spec, or both be None (identity)")
        if type(self.key) is not type(self.value):
            raise ValueError(
                f"keys {self.key} and values {self.value} are specs of different kinds: give both as d<..>b<..> "
                "(vector quantization, from a codebook) or both as int<..>g<..>"
            )
        if self.window < 1:
            raise ValueError(
                f"window={self.window} must be at least 1: tokens are scored for anchors while they are in the window "
                "(default 128; to measure without a window use `antkv evaluate --protocol W0`)"
            )
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1 token (default 128)")
        if isinstance(self.key, ScalarSpec) and self.chunk % self.key.group:
            raise ValueError(
                f"chunk={self.chunk} is not a multiple of the {self.key.group} tokens whose keys share a scale: choose "
                f"a multiple of {self.key.group}, or another group"
            )
        if self.rope not in ROPE_MODES:
            raise ValueError(f"rope mode {self.rope!r} is unknown; choose one of {ROPE_MODES}")
        if self.rope == "block":
            raise ValueError("rope='block' is reserved for a later format and cannot be used yet; use rope='pre'")
        if any(i < 0 for i in self.skip_layers):
            raise ValueError(f"skip_layers {self.skip_layers} holds a negative layer index; count layers from 0")
        object.__setattr__(self, "skip_layers", tuple(sorted(set(self.skip_layers))))

    @property
    def is_identity(self) -> bool:
        return self.key is None

    def vq_specs(self) -> tuple[VQSpec, VQSpec]:
        """Specs of keys and values whose tables a codebook holds; raises ValueError for a codec without tables."""
        if not isinstance(self.key, VQSpec) or not isinstance(self.value, VQSpec):
            name = "the identity codec" if self.key is None else f"codec {self.key}"
            raise ValueError(f"{name} has no tables to learn or hold: choose e.g. AnTKVConfig.preset('1bit')")
        return self.key, self.value

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        key: float | str | None = None,
        value: float | str | None = None,
        group: int | None = None,
        **overrides: Any,
    ) -> AnTKVConfig:
        """A named configuration: ``"1bit"``, ``"2bit"``, ... (see `BITS_TO_SPEC`), ``"ott-2bit"``, ``"ott-4bit"`` (no
        codebook needed) or ``"identity"``. OTT's own choice of outlier tokens, which looks at no query, is
        ``.replace(anchor_score="outlier_tokens")``; the default costs less quality.

        Args:
            name: bits per element of keys and values.
            key, value: other bits (or a spec such as ``"d16b8s2"`` or ``"int4g64"``) for keys or values alone.
            group: elements that share a scale, 32, 64 or 128, of the ``ott-`` presets only; by default 64, and 32 for
                2-bit keys.
            overrides: any other field of the config, e.g. ``window=64``.

        Raises:
            ValueError: for bits or a group that do not exist; the message lists those that do.
        """
        if name.startswith(OTT):
            bits = [name.removeprefix(OTT) if own is None else own for own in (key, value)]
            scalar = [_scalar_spec(b, group, role) for b, role in zip(bits, ("key", "value"))]
            anchors = AnchorConfig(fraction=OUTLIERS, max_tokens=OUTLIER_POOL)
            return cls(key=scalar[0], value=scalar[1], **{"anchors": anchors, **overrides})
        if group is not None:
            raise ValueError(f"group={group} belongs to the presets ott-2bit and ott-4bit, not to {name!r}")
        if name == "identity":
            return cls(key=None, value=None, **{"anchors": AnchorConfig(score="none", sinks=0), **overrides})
        specs = [name if bits is None else bits for bits in (key, value)]
        return cls(key=_spec(specs[0]), value=_spec(specs[1]), **overrides)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        out = dataclasses.asdict(self)
        out["key"], out["value"] = (None if spec is None else str(spec) for spec in (self.key, self.value))
        out["skip_layers"] = list(self.skip_layers)
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AnTKVConfig:
        """Inverse of `to_dict`. Raises ValueError naming any field it does not know."""
        _check_fields(cls, data)
        data = dict(data)
        for name in ("key", "value"):
            if isinstance(data.get(name), str):
                data[name] = parse_spec(data[name])
        if isinstance(data.get("anchors"), dict):
            _check_fields(AnchorConfig, data["anchors"])
            data["anchors"] = AnchorConfig(**data["anchors"])
        if "skip_layers" in data:
            data["skip_layers"] = tuple(data["skip_layers"])
        return cls(**data)

    def replace(self, **changes: Any) -> AnTKVConfig:
        """A copy with some fields changed; fields of `AnchorConfig` may be given as ``anchor_<field>``."""
        anchor_changes = {k.removeprefix("anchor_"): changes.pop(k) for k in list(changes) if k.startswith("anchor_")}
        _check_fields(AnchorConfig, anchor_changes)
        _check_fields(AnTKVConfig, changes)
        if anchor_changes:
            changes["anchors"] = dataclasses.replace(changes.get("anchors", self.anchors), **anchor_changes)
        return dataclasses.replace(self, **changes)


def _check_fields(cls: type, given: dict[str, Any]) -> None:
    known = sorted(f.name for f in dataclasses.fields(cls))
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"unknown config field {unknown[0]!r}; known fields are {', '.join(known)}")


def parse_spec(text: str) -> VQSpec | ScalarSpec:
    """Reads a spec of either kind, as `str` writes it."""
    return ScalarSpec.parse(text) if text.strip().startswith("int") else VQSpec.parse(text)


def _spec(bits: float | str) -> VQSpec:
    return VQSpec.parse(bits) if isinstance(bits, str) and bits.startswith("d") else VQSpec.for_bits(bits)


def _scalar_spec(bits: float | str, group: int | None, role: str) -> ScalarSpec:
    text = bits.removesuffix("bit") if isinstance(bits, str) else f"{bits:g}"
    if text.startswith("int"):
        return ScalarSpec.parse(text)
    if text not in map(str, SCALAR_BITS):
        raise ValueError(f"{text} bits do not exist without a codebook; choose ott-2bit or ott-4bit")
    if group is None:
        group = 32 if (text, role) == ("2", "key") else 64
    return ScalarSpec(int(text), group)
