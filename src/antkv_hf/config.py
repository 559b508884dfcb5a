"""What a cache is made of: codec specs, anchors, window; presets by bits per element; validation with messages."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .specs import (
    BITS_TO_SPEC,
    CODE_BITS,
    SCALAR_BITS,
    SCALAR_GROUPS,
    ScalarSpec,
    SpecPair,
    VQSpec,
    check_numbers,
    describe_layers,
    parse_layer_bits,
    parse_spec,
    scalar_spec_for,
    spec_for,
)

__all__ = [
    "BITS_TO_SPEC",
    "CODE_BITS",
    "OTT",
    "SCALAR_BITS",
    "SCALAR_GROUPS",
    "AnTKVConfig",
    "AnchorConfig",
    "ScalarSpec",
    "VQSpec",
    "parse_spec",
]

ANCHOR_DTYPES = ("int8", "float16")
ROPE_MODES = ("pre", "none", "block")
OTT = "ott-"  # presets that need no codebook
OUTLIERS, OUTLIER_POOL = 0.04, 256  # their outlier tokens: share of a chunk, and most that a kv head keeps


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
        check_numbers(self)
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
            or two None for the identity codec (nothing is quantized; for tests). Text such as ``"d8b8"`` is read.
        anchors: which tokens stay exact, and how.
        window: most recent tokens that always stay exact, >= 1 (default 128).
        chunk: tokens that are encoded at a time and share an anchor budget (default 128); a multiple of a scalar
            spec's key group.
        rope: form in which keys are coded: ``pre`` (before RoPE), ``none`` (model without RoPE), ``block`` (reserved).
        skip_layers: layer indices left unquantized.
        layer_specs: specs of single layers, ``{layer index: (key spec, value spec)}``, of the kind of `key` and
            `value`, which all other layers have. `with_layer_bits` makes them from bits.
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
    layer_specs: Mapping[int, SpecPair] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("key", "value"):
            object.__setattr__(self, name, _spec(name, getattr(self, name)))
        if not isinstance(self.anchors, AnchorConfig):
            raise ValueError(f"anchors={self.anchors!r} must be an AnchorConfig, e.g. AnchorConfig(fraction=0.02)")
        if (self.key is None) != (self.value is None):
            raise ValueError(
                f"keys {self.key} and values {self.value}: key and value must both have a codec spec, or both be None "
                "(identity)"
            )
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
        object.__setattr__(self, "layer_specs", self._checked_layer_specs())
        for key in (self.key, *(pair[0] for pair in self.layer_specs.values())):
            if isinstance(key, ScalarSpec) and self.chunk % key.group:
                raise ValueError(
                    f"chunk={self.chunk} is not a multiple of the {key.group} tokens whose keys share a scale: choose "
                    f"a multiple of {key.group}, or another group"
                )
        if self.rope not in ROPE_MODES:
            raise ValueError(f"rope mode {self.rope!r} is unknown; choose one of {ROPE_MODES}")
        if self.rope == "block":
            raise ValueError("rope='block' is reserved for a later format and cannot be used yet; use rope='pre'")
        object.__setattr__(self, "skip_layers", _layer_numbers(self.skip_layers))

    def _checked_layer_specs(self) -> dict[int, SpecPair]:
        if not isinstance(self.layer_specs, Mapping):
            raise ValueError(f"layer_specs={self.layer_specs!r} must be {{layer: (key spec, value spec)}}")
        checked: dict[int, SpecPair] = {}
        for layer, pair in self.layer_specs.items():
            if not isinstance(layer, int) or layer < 0:
                raise ValueError(f"layer_specs names layer {layer!r}; count layers from 0")
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(f"layer_specs of layer {layer} is {pair!r}; give a pair (key spec, value spec)")
            specs = [_spec(f"layer_specs[{layer}]", spec) for spec in pair]
            if other := [spec for spec in specs if self.key is None or type(spec) is not type(self.key)]:
                raise ValueError(
                    f"layer_specs of layer {layer} holds {other[0]}, but the other layers have "
                    f"{'the identity codec' if self.key is None else self.key}: all layers have specs of one kind"
                )
            checked[layer] = (specs[0], specs[1])  # type: ignore[assignment]  # None is of no kind
        return dict(sorted(checked.items()))

    @property
    def is_identity(self) -> bool:
        return self.key is None

    def specs(self, layer: int) -> tuple[VQSpec | ScalarSpec | None, VQSpec | ScalarSpec | None]:
        """Specs of one layer's keys and values; None for the identity codec."""
        return self.layer_specs.get(layer, (self.key, self.value))  # type: ignore[arg-type]

    def vq_specs(self, layer: int | None = None) -> tuple[VQSpec, VQSpec]:
        """Specs of keys and values whose tables a codebook holds, of one layer or of those without specs of their own.

        Raises:
            ValueError: for a codec without tables.
        """
        key, value = (self.key, self.value) if layer is None else self.specs(layer)
        if not isinstance(key, VQSpec) or not isinstance(value, VQSpec):
            name = "the identity codec" if key is None else f"codec {key}"
            raise ValueError(f"{name} has no tables to learn or hold: choose e.g. AnTKVConfig.preset('1bit')")
        return key, value

    def layer_codecs(self, layers: Iterable[int]) -> dict[int, SpecPair]:
        """Specs of each of `layers`; empty for the identity codec."""
        return {} if self.is_identity else {layer: self.specs(layer) for layer in layers}  # type: ignore[misc]

    def bits(self, layers: Iterable[int]) -> tuple[float, float]:
        """Bits of codes per element, of keys and of values, on average over `layers`; nan for the identity codec."""
        pairs = self.layer_codecs(layers).values()
        if not pairs:
            return float("nan"), float("nan")
        sums = [sum(spec.bits_per_element for spec in specs) for specs in zip(*pairs)]
        return sums[0] / len(pairs), sums[1] / len(pairs)

    @property
    def codec_name(self) -> str:
        """A short name: ``d8b8/d8b8`` (keys/values), ``mixed d16b8+d8b8`` (the specs there are), ``identity``."""
        return self.name_codec()

    def name_codec(self, layers: Iterable[int] | None = None) -> str:
        """`codec_name` of quantized `layers`: without the default specs where all have specs of their own."""
        if not self.layer_specs:
            return "identity" if self.is_identity else f"{self.key}/{self.value}"
        pairs = self.layer_codecs([-1, *self.layer_specs] if layers is None else layers).values()  # -1: the default
        if len(set(pairs)) == 1:
            return "{}/{}".format(*next(iter(pairs)))
        specs = {spec for pair in pairs for spec in pair}
        return "mixed " + "+".join(map(str, sorted(specs, key=lambda spec: (spec.bits_per_element, str(spec)))))

    def describe_codec(self, layers: Iterable[int]) -> str:
        """Specs in words: ``keys d8b8, values d8b8``, or those of each run of `layers` (keys/values)."""
        if not self.layer_specs:
            return f"keys {self.key}, values {self.value}"
        return f"layers (keys/values) {describe_layers(self.layer_codecs(layers))}"

    def with_layer_bits(self, text: str, group: int | None = None) -> AnTKVConfig:
        """With the bits of single layers, e.g. ``"0-9=0.5,10-24=2,25=1/2"``: see `specs.parse_layer_bits`."""
        return self.replace(layer_specs=parse_layer_bits(text, isinstance(self.key, ScalarSpec), group))

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
            overrides: any other field of the config, as `replace` takes them, e.g. ``window=64``,
                ``anchor_fraction=0.01``.

        Raises:
            ValueError: for bits, a group or a field that do not exist; the message lists those that do.
        """
        if not isinstance(name, str):
            raise TypeError(f"preset {name!r} must be a name, e.g. AnTKVConfig.preset('{name}bit')")
        if name.startswith(OTT):
            bits = [name.removeprefix(OTT) if own is None else own for own in (key, value)]
            scalar = [scalar_spec_for(b, group, role) for b, role in zip(bits, ("key", "value"))]
            anchors = AnchorConfig(fraction=OUTLIERS, max_tokens=OUTLIER_POOL)
            return cls(key=scalar[0], value=scalar[1], anchors=anchors).replace(**overrides)
        if group is not None:
            raise ValueError(f"group={group} belongs to the presets ott-2bit and ott-4bit, not to {name!r}")
        if name == "identity":
            return cls(key=None, value=None, anchors=AnchorConfig(score="none", sinks=0)).replace(**overrides)
        specs = [name if bits is None else bits for bits in (key, value)]
        return cls(key=spec_for(specs[0]), value=spec_for(specs[1])).replace(**overrides)

    @classmethod
    def fit(cls, model_config: Any, tokens: int, bytes: int | str, batch: int = 1, **options: Any) -> AnTKVConfig:
        """The config of the most bits whose cache of `batch` times `tokens` fits into `bytes`; see `cache.budget.fit`.

        Example:
            >>> AnTKVConfig.fit(model.config, tokens=131072, bytes="2GB", among=["4bit", "2bit", "1bit"])
        """
        from .cache.budget import fit

        return fit(model_config, tokens, bytes, batch, **options).config

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        out = dataclasses.asdict(self)
        out["key"], out["value"] = (None if spec is None else str(spec) for spec in (self.key, self.value))
        out["skip_layers"] = list(self.skip_layers)
        out["layer_specs"] = {str(layer): [str(k), str(v)] for layer, (k, v) in self.layer_specs.items()}
        if not self.layer_specs:  # what has none is read by earlier versions too
            del out["layer_specs"]
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AnTKVConfig:
        """Inverse of `to_dict`. Raises ValueError naming any field it does not know."""
        _check_fields(cls, data)
        data = dict(data)
        if isinstance(data.get("anchors"), dict):
            _check_fields(AnchorConfig, data["anchors"])
            data["anchors"] = AnchorConfig(**data["anchors"])
        if "layer_specs" in data:
            data["layer_specs"] = _layer_specs(data["layer_specs"])
        return cls(**data)

    def replace(self, **changes: Any) -> AnTKVConfig:
        """A copy with some fields changed; fields of `AnchorConfig` may be given as ``anchor_<field>``."""
        anchor_changes = {k.removeprefix("anchor_"): changes.pop(k) for k in list(changes) if k.startswith("anchor_")}
        _check_fields(AnchorConfig, anchor_changes, "anchor_")
        _check_fields(AnTKVConfig, changes)
        if anchor_changes:
            changes["anchors"] = dataclasses.replace(changes.get("anchors", self.anchors), **anchor_changes)
        return dataclasses.replace(self, **changes)


def check_config(config: Any) -> None:
    """Raises TypeError, saying how one is made, unless `config` is an `AnTKVConfig` or None."""
    if isinstance(config, str):
        raise TypeError(f"config={config!r} is text: give AnTKVConfig.preset({config!r})")
    if config is not None and not isinstance(config, AnTKVConfig):
        raise TypeError(f"config is of type {type(config).__name__}: give one such as AnTKVConfig.preset('ott-2bit')")


def _spec(name: str, spec: Any) -> VQSpec | ScalarSpec | None:
    """`spec`, read if it is text; ValueError if it is none."""
    if isinstance(spec, str):
        return parse_spec(spec)
    if spec is not None and not isinstance(spec, (VQSpec, ScalarSpec)):
        raise ValueError(f"{name}={spec!r} must be a codec spec, e.g. VQSpec.parse('d8b8'), or None")
    return spec


def _layer_numbers(layers: Any) -> tuple[int, ...]:
    """`skip_layers` sorted, each once; ValueError for anything but layer numbers."""
    try:
        found = sorted({operator.index(layer) for layer in layers})
    except TypeError as error:
        raise ValueError(f"skip_layers={layers!r} must be layer numbers, e.g. [0, 1]") from error
    if found and found[0] < 0:
        raise ValueError(f"skip_layers {layers} holds a negative layer index; count layers from 0")
    return tuple(found)


def _layer_specs(data: Any) -> dict[int, SpecPair]:
    """`layer_specs` as `AnTKVConfig.to_dict` writes it; ValueError for anything else."""
    if not isinstance(data, dict):
        raise ValueError(f"layer_specs is {data!r}: give an object {{layer: [key spec, value spec]}}")
    found: dict[int, SpecPair] = {}
    for layer, pair in data.items():
        strings = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(spec, str) for spec in pair)
        if not strings or not str(layer).isdecimal():
            raise ValueError(
                f"layer_specs holds {layer!r}: {pair!r}; write a layer's number and [key spec, value spec]"
            )
        found[int(layer)] = parse_spec(pair[0]), parse_spec(pair[1])
    return found


def _check_fields(cls: type, given: dict[str, Any], prefix: str = "") -> None:
    """Raises ValueError for a name in `given` that is no field of `cls`; in the message all have the `prefix`."""
    known = sorted(prefix + f.name for f in dataclasses.fields(cls))
    if unknown := sorted({prefix + name for name in given} - set(known)):
        known += ["anchor_<field of AnchorConfig>"] if cls is AnTKVConfig else []
        raise ValueError(f"unknown config field {unknown[0]!r}; known fields are {', '.join(known)}")
