"""The variants of `benchmarks/ablations.py`: a codebook or config with one thing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from antkv_hf import AnTKVCodebook, AnTKVConfig
from antkv_hf.anchors import SCORES

from .measuring import Subject
from .setup import Bench
from .statistics import Statistics
from .tables import LearnRole, contiguous, learned, own

CONFIG = AnTKVConfig.preset("1bit")
BOTH = ("W0", "S128")
PARTS_OF_BASE = ("bias", "scores", "window", "anchor-dtype", "query-stride")  # they learn no tables of their own
PUBLISHED_WEIGHTS = {"key": "anchor_score", "value": "accumulated_attention"}


@dataclass(frozen=True)
class Variant:
    """One number of a table: `group` is its line, `x` its column.

    Args:
        subject: makes what is measured, learning tables where it needs its own.
        learned_from: the statistics of its tables; None for a codebook that was given.
    """

    part: str
    group: str
    x: str
    subject: Callable[[], Subject]
    protocols: tuple[str, ...] = BOTH
    learned_from: Callable[[], Statistics] | None = None


class Ablations:
    """All variants, lazily: tables are learned from the same statistics when a variant is measured.

    Args:
        codebook: measured where no tables of its own are asked for; by default learned from the statistics.
        domains: sources by name, each a calibration text of its own.
        domain_tokens: tokens of each, and of the mix beside them.
    """

    def __init__(self, bench: Bench, codebook: AnTKVCodebook | None, domains: dict[str, str], domain_tokens: int):
        self.bench, self.given, self.domains, self.domain_tokens = bench, codebook, domains, domain_tokens

    def all(self) -> list[Variant]:
        parts = (
            self.kmeans,
            self.bias,
            self.scores,
            self.windows,
            self.sizes,
            self.of_domains,
            self.dtypes,
            self.rope,
            self.stride,
        )
        return [self._with_source(variant) for part in parts for variant in part()]

    def _with_source(self, variant: Variant) -> Variant:
        given = self.given is not None and variant.part in PARTS_OF_BASE
        return variant if given or variant.learned_from else replace(variant, learned_from=self.bench.statistics)

    # ------------------------------------------------------------ tables
    def base(self) -> AnTKVCodebook:
        return self.given if self.given is not None else self.tables("ours-1bit", own)

    def tables(
        self, name: str, learn: Callable[[Statistics], LearnRole], config: AnTKVConfig = CONFIG,
        statistics: Callable[[], Statistics] | None = None,
    ) -> AnTKVCodebook:  # fmt: skip
        found = (statistics or self.bench.statistics)()
        return learned(found, name, config, learn(found), noise=getattr(learn, "func", learn) is own)

    def _changed(self, query_stride: int = 1, **changes) -> Subject:
        book = self.base()
        return Subject(book.config.replace(**changes), book, query_stride=query_stride)

    def _raised(self, factor: float) -> Subject:
        book = self.base()
        tables = {
            layer: (replace(key, noise=key.noise * factor if factor and key.noise is not None else None), value)
            for layer, (key, value) in book.tables.items()
        }
        return Subject(book.config, AnTKVCodebook(book.config, tables, book.model))

    def _learned(self, *given, **options) -> Subject:
        book = self.tables(*given, **options)
        return Subject(book.config, book)

    # ------------------------------------------------------------ parts
    def kmeans(self) -> Iterator[Variant]:
        for x, weights in (("no weights", "one"), ("AnS", PUBLISHED_WEIGHTS), ("squared gradient", "fisher")):
            name = {"no weights": "plain", "AnS": "plain-ans", "squared gradient": "plain-fisher"}[x]
            learn = partial(contiguous, weights=weights)
            yield Variant("kmeans", "neighbouring channels", x, partial(self._learned, name, learn))
        unweighted = partial(self._learned, "ours-1bit-unweighted", partial(own, weighted=False))
        yield Variant("kmeans", "this library's basis and metric", "no weights", unweighted)
        weighted = partial(self._learned, "ours-1bit", own)
        yield Variant("kmeans", "this library's basis and metric", "squared gradient", weighted)

    def bias(self) -> Iterator[Variant]:
        for factor in (0.0, 0.5, 1.0, 2.0):
            subject = partial(self._raised, factor)
            yield Variant(
                "bias", "bias of coded tokens", f"{factor:g} x", subject, BOTH if factor in (0, 1) else ("S128",)
            )

    def scores(self) -> Iterator[Variant]:
        none = partial(self._changed, anchor_score="none")
        yield Variant("scores", "none", "0%", none)
        for name in SCORES:
            if name == "none":
                continue
            for percent in (0.5, 1.0, 2.0, 4.0):
                subject = partial(self._changed, anchor_score=name, anchor_fraction=percent / 100)
                # 0.5% and 1% of a chunk of 128 are the same one token
                yield Variant("scores", name, f"{percent:g}%", subject, ("W0",) if percent == 0.5 else BOTH)

    def windows(self) -> Iterator[Variant]:
        for group, changes in (("2% anchors", {}), ("no anchors", {"anchor_score": "none"})):
            for window in (0, 32, 128, 256):
                protocol = f"S{window}" if window else "W0"
                yield Variant("window", group, f"{window} tokens", partial(self._changed, **changes), (protocol,))

    def sizes(self) -> Iterator[Variant]:
        for share in (32, 16, 8, 4, 2, 1):
            sizes = self.bench.sizes
            windows = sizes.tokens // share // sizes.window
            if windows * sizes.samples // (sizes.tokens // sizes.window) < CONFIG.vq_specs()[0].centroids:
                continue  # fewer samples than centroids
            subject = partial(self._of_windows, windows)
            yield Variant("calibration-size", "tokens of text", f"{windows * sizes.window:,}", subject)

    def _of_windows(self, windows: int) -> Subject:
        return self._learned(f"ours-1bit-{windows}windows", partial(own, windows=windows))

    def of_domains(self) -> Iterator[Variant]:
        if not self.domains:
            return
        sizes = self.bench.sizes
        window, windows = sizes.window, self.domain_tokens // sizes.window
        # Of each window as many samples as of the mix, whose first windows they are compared with.
        samples = windows * sizes.samples // (sizes.tokens // window)
        if not 0 < windows <= sizes.tokens // window or samples < CONFIG.vq_specs()[0].centroids:
            raise ValueError(
                f"--domain-tokens {self.domain_tokens} must be at least a window of {window}, hold "
                f"{CONFIG.vq_specs()[0].centroids} samples and be no more than the {sizes.tokens} of the mix"
            )
        yield Variant("calibration-domain", "calibrated on", "the mix", partial(self._of_windows, windows))
        sizes = sizes._replace(tokens=windows * window, samples=samples)
        for name, source in self.domains.items():
            statistics = partial(self.bench.statistics, f"domain-{name}", (source,), sizes)
            subject = partial(self._learned, "ours-1bit", own, statistics=statistics)
            yield Variant("calibration-domain", "calibrated on", name, subject, learned_from=statistics)

    def dtypes(self) -> Iterator[Variant]:
        for dtype in ("float16", "int8"):
            for percent in (1.0, 2.0, 4.0):
                subject = partial(self._changed, anchor_dtype=dtype, anchor_fraction=percent / 100)
                yield Variant("anchor-dtype", dtype, f"{percent:g}%", subject)

    def rope(self) -> Iterator[Variant]:
        forms = {"pair permutation": "permutation", "full basis": "dense"}
        for x, form in forms.items():
            name = "ours-1bit" if form == "permutation" else "ours-1bit-dense"
            yield Variant("rope", "before RoPE", x, partial(self._learned, name, partial(own, form=form)))
        after = partial(self._learned, "ours-1bit-rotated", partial(own, form="rotated"), CONFIG.replace(rope="none"))
        yield Variant("rope", "after RoPE", "full basis", after)

    def stride(self) -> Iterator[Variant]:
        for stride in (1, 4, 16, 64):
            subject = partial(self._changed, query_stride=stride)
            yield Variant("query-stride", "every n-th far query scores", f"n = {stride}", subject, ("W0",))
