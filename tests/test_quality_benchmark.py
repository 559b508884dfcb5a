"""Rivals of `benchmarks/quality.py` against plain formulas, their bits against their bytes, and the scripts."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook

from antkv_hf import AnTKVCodebook, AnTKVConfig
from antkv_hf.cache.model_rotary import model_rotary
from antkv_hf.calibration.run import _sampled_positions
from antkv_hf.codecs import VectorQuantizer
from antkv_hf.config import VQSpec
from antkv_hf.evaluation import AttentionCall, Protocol, ProtocolEvaluator, one_shot_losses

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import ablations  # noqa: E402
import quality  # noqa: E402
import rivals.methods as methods  # noqa: E402
import rivals.tables as tables  # noqa: E402
from results import append_csv, read_csv  # noqa: E402
from rivals.ablation_page import _order  # noqa: E402
from rivals.kvquant import KVQuant, channel_levels, value_levels  # noqa: E402
from rivals.measuring import Subject, Table, Text, measure  # noqa: E402
from rivals.methods import all_methods  # noqa: E402
from rivals.scalar import Fp8, Kivi, TurboQuant, gaussian_levels  # noqa: E402
from rivals.setup import tiny_model, tiny_text, tiny_tokenizer  # noqa: E402
from rivals.statistics import Sizes, Statistics  # noqa: E402
from rivals.tables import contiguous, learned, own, plain_tables, table_bytes  # noqa: E402
from rivals.variants import Ablations  # noqa: E402

HEADS, D, N = 2, 16, 70
MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def keys_values(n: int = N, batch: int = 2, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, n, D, generator=g) * torch.linspace(0.3, 3, D) for _ in "kv"]


def call(keys, values) -> AttentionCall:
    return AttentionCall(0, keys.repeat_interleave(2, 1), keys, values, 0, D**-0.5)


def kvquant(llama, bits: int, outliers: float = 0.1) -> KVQuant:
    """Tables of layer 0 learned from other keys and values than those that are coded."""
    (key, value), (key_grad, value_grad) = ([x[0] for x in keys_values(400, 1, seed)] for seed in (1, 2))
    low, high, levels = channel_levels(key, key_grad, bits, outliers, 0)
    of_values = value_levels(value, value_grad, bits, outliers, 0)
    tables = {"low": low, "high": high, "key_levels": levels, "value_levels": of_values}
    return KVQuant({f"layers.0.{n}": t for n, t in tables.items()}, bits, model_rotary(llama.config), outliers)


def rivals(llama) -> dict[str, list]:
    """By family, from few bits to many."""
    return {
        "kivi": [Kivi(2), Kivi(4), Fp8()],
        "turboquant": [TurboQuant(b) for b in (1, 2, 3, 4)],
        "kvquant": [kvquant(llama, b) for b in (1, 2, 3)],
    }


# -------------------------------------------------------------------- codecs
def test_fp8_is_the_nearest_e4m3_number():
    keys, values = keys_values()
    for read, x in zip(Fp8()(call(keys, values)), (keys, values)):
        scale = x.abs().max() / 448
        exponent = (x / scale).abs().clamp_min(2.0**-6).log2().floor()
        step = torch.exp2(exponent - 3) * scale
        torch.testing.assert_close(read, (x / step).round() * step, rtol=1e-5, atol=1e-6)


def test_kivi_by_loops():
    keys, values = keys_values()
    read_keys, read_values = Kivi(2)(call(keys, values))

    def coded(group: torch.Tensor) -> torch.Tensor:
        zero, scale = group.min().half().float(), ((group.max() - group.min()) / 3).half().float()
        return ((group - zero) / scale).round().clamp(0, 3) * scale + zero

    for start in (0, 32, 64):  # the last group has 6 tokens
        tokens = slice(start, start + 32)
        for channel in range(D):
            expected = coded(keys[1, 0, tokens, channel])
            torch.testing.assert_close(read_keys[1, 0, tokens, channel], expected, atol=2e-3, rtol=1e-3)
    for token in (0, 41):
        torch.testing.assert_close(read_values[0, 1, token], coded(values[0, 1, token]), atol=2e-3, rtol=1e-3)


def test_gaussian_levels_are_those_of_lloyd_and_max():
    known = {1: ([0.7979], 0.3634), 2: ([0.4528, 1.5104], 0.1175), 3: ([0.2451, 0.7560, 1.3439, 2.1520], 0.03454)}
    x = torch.linspace(-8, 8, 400001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    for bits, (positive, distortion) in known.items():
        levels = gaussian_levels(bits)
        expected = torch.tensor([*[-v for v in reversed(positive)], *positive])
        torch.testing.assert_close(levels, expected, atol=1e-4, rtol=0)
        nearest = levels.double()[torch.bucketize(x, ((levels[1:] + levels[:-1]) / 2).double())]
        assert float(((x - nearest).square() * density).sum() / density.sum()) == pytest.approx(distortion, rel=1e-3)


def test_turboquant_rounds_rotated_unit_vectors():
    keys, values = keys_values()
    rival = TurboQuant(2, seed=3)
    read, _ = rival(call(keys, values))
    rotation, levels = rival.rotation(D, keys.device), gaussian_levels(2)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(D), atol=1e-5, rtol=0)
    assert not torch.equal(rotation, TurboQuant(2, seed=4).rotation(D, keys.device))
    x = keys[1, 1, 7]
    y = rotation @ x / x.norm() * math.sqrt(D)
    nearest = levels[(y.unsqueeze(-1) - levels).abs().argmin(-1)]
    expected = rotation.mT @ nearest * x.norm() / math.sqrt(D)
    torch.testing.assert_close(read[1, 1, 7], expected, atol=2e-3, rtol=2e-3)


def test_kvquant_by_loops(llama):
    keys, values = keys_values()
    keys[0, 1, 9, 3], values[1, 0, 5, 2] = 40.0, -50.0
    rival, rotary = kvquant(llama, 2), model_rotary(llama.config)[0]
    read_keys, read_values = rival(call(keys, values))
    position = torch.arange(N)
    plain, found = rotary.unrotate(keys, position), rotary.unrotate(read_keys, position)
    low, high, levels, of_values = (
        rival.tables[f"layers.0.{n}"] for n in ("low", "high", "key_levels", "value_levels")
    )
    for b, h, t, c in ((0, 0, 5, 1), (1, 1, 60, 15), (0, 1, 9, 3), (1, 0, 33, 8)):
        x = plain[b, h, t, c]
        inside = bool(low[h, c] <= x <= high[h, c])
        expected = levels[h, c][(levels[h, c] - x).abs().argmin()] if inside else x
        assert float(found[b, h, t, c]) == pytest.approx(float(expected), rel=2e-3, abs=2e-3)
    assert not low[1, 3] <= plain[0, 1, 9, 3] <= high[1, 3]
    row = values[1, :, 5].flatten()
    order = row.argsort()
    outside, inner = torch.cat([order[:2], order[-2:]]), row[order[2:-2]]  # 10% of 32 numbers, half at each end
    zero, scale = (inner.max() + inner.min()).half() / 2, (inner.max() - inner.min()) / 2
    nearest = of_values[((row - zero).div(scale).unsqueeze(-1) - of_values).abs().argmin(-1)] * scale + zero
    expected = nearest.scatter(0, outside, row[outside])
    torch.testing.assert_close(read_values[1, :, 5].flatten(), expected, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(read_keys[:, :, 0], keys[:, :, 0], atol=2e-3, rtol=2e-3)


def test_bits_are_the_formulas(llama):
    keys, values = keys_values(n=96)
    width, n, elements = HEADS * D, 96, 2 * HEADS * D * 96
    expected = {
        Fp8: lambda r: 8 + 2 * 64 / (2 * elements),
        Kivi: lambda r: r.spec.bits + (32 / 32 + 32 / D) / 2,  # a head of 16 channels is one group
        TurboQuant: lambda r: r.code_bits + 16 / D,
    }
    for family in rivals(llama).values():
        for rival in family:
            rival(call(keys, values))
            stored = rival.encode(0, keys, values)
            size = sum(t.numel() * t.element_size() for t in stored.values())
            assert rival.bits == pytest.approx(8 * size / (2 * elements))
            if isinstance(rival, KVQuant):
                share = stored["key_outliers"].numel() / (elements)
                of_keys = rival.code_bits + 32 * share + 16 / width
                of_values = rival.code_bits + 32 * 4 / width + 32 / width
                assert rival.bits == pytest.approx((of_keys + of_values) / 2 + 16 / n)
            else:
                assert rival.bits == pytest.approx(expected[type(rival)](rival), rel=0.02)


def test_more_bits_less_error(llama):
    keys, values = keys_values()
    for name, family in rivals(llama).items():
        errors, bits = [], []
        for rival in family:
            read = rival(call(keys, values))
            errors.append(sum(float((r - x).square().sum()) for r, x in zip(read, (keys, values))))
            bits.append(rival.bits)
        assert errors == sorted(errors, reverse=True) and bits == sorted(bits), (name, errors, bits)
        assert errors[-1] < 0.2 * errors[0], name


def test_plain_tables_are_product_vq():
    spec = VQSpec(4, 4)
    centroids = torch.randn(HEADS, D // 4, 1, 16, 4, generator=torch.Generator().manual_seed(0))
    x, _ = keys_values()
    codec = VectorQuantizer(spec, plain_tables(centroids, spec))
    read = codec.decode(codec.encode(x))
    for head, group in ((0, 1), (1, 3)):
        part, table = x[0, head, :, 4 * group : 4 * group + 4], centroids[head, group, 0]
        nearest = table[torch.cdist(part, table).argmin(-1)]
        torch.testing.assert_close(read[0, head, :, 4 * group : 4 * group + 4], nearest, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------- the seam
def test_read_back_is_what_attention_reads(llama):
    """Keys and values that come back as they are give the plain model; what a rival changes is seen by every layer."""
    ids = torch.randint(3, 128, (1, 60), generator=torch.Generator().manual_seed(0))
    exact, seen = one_shot_losses(llama, ids), []

    def same(call: AttentionCall):
        seen.append((call.layer, call.window, tuple(call.query.shape)))
        return call.keys.float(), call.values.float()

    with ProtocolEvaluator(llama, Protocol.parse("S16"), read_back=same).active():
        torch.testing.assert_close(one_shot_losses(llama, ids), exact, atol=1e-4, rtol=1e-4)
    assert seen == [(layer, 16, (1, 4, 60, 16)) for layer in range(3)]
    with ProtocolEvaluator(llama, Protocol.parse("W0"), read_back=lambda c: (c.keys, 0 * c.values)).active():
        assert not torch.allclose(one_shot_losses(llama, ids), exact, atol=1e-3)
    config = AnTKVConfig.preset("identity", skip_layers=(0, 1))
    assert list(ProtocolEvaluator(llama, Protocol.parse("W0"), config, read_back=same).plans) == [2]


def test_query_stride_only_matters_far_away():
    model = tiny_llama(initializer_range=0.3, num_hidden_layers=1)
    ids = torch.randint(3, 128, (1, 640), generator=torch.Generator().manual_seed(0))
    config = AnTKVConfig.preset("ott-2bit")
    text = Text("random", ids)
    for protocol, same in (("W0", False), ("S128", True)):
        rows = [measure(model, Subject(config, query_stride=s), Protocol.parse(protocol), text) for s in (1, 64)]
        assert (rows[0]["perplexity"] == rows[1]["perplexity"]) == same, protocol


# -------------------------------------------------------------------- tables and scripts
class FakeStatistics:
    """Samples of one layer with two clusters a sub-vector, of which one has nearly all the weight."""

    layers = (0,)

    def __init__(self, model):
        g = torch.Generator().manual_seed(0)
        self.model, self.sizes = model, type("Sizes", (), {"iterations": 4})
        self.x = torch.randn(HEADS, 600, D, generator=g)
        self.gradients = (
            torch.randn(HEADS, 600, D, generator=g) * torch.where(torch.arange(600) < 60, 30.0, 0.1)[:, None]
        )

    def read(self, names, layer, windows=None):
        exclude = torch.zeros(HEADS, 600, dtype=torch.bool)
        return [{"exclude": exclude}.get(n, self.gradients if n.endswith("grad") else self.x) for n in names]

    def column_weights(self, name, layer):
        return self.gradients.norm(dim=-1)

    def positions(self, windows=None):
        return torch.arange(600)


def test_weights_of_kmeans(llama):
    """Weighted tables serve the tokens that weigh; gradients come back in the metric of rotated keys."""
    found, spec = FakeStatistics(llama), VQSpec(8, 4)

    def error(learn) -> float:
        codec = VectorQuantizer(spec, learn(0, "value", spec, 0))
        x = found.x[:, :60].unsqueeze(0)
        return float((codec.decode(codec.encode(x)) - x).square().sum())

    plain = error(contiguous(found, "one"))
    for weights in ("fisher", "anchor_score"):
        assert error(contiguous(found, weights)) < 0.8 * plain, weights
    assert error(own(found)) < 0.8 * error(own(found, weighted=False))
    for form in ("permutation", "dense", "rotated"):
        tables = own(found, form=form)(0, "key", spec, 0)
        assert (tables.permutation is None) == (form != "permutation")


def test_published_weights_are_not_cut(llama, monkeypatch):
    """Of 4,000 tokens one has a thousand times the weight of the others: ours is cut, those of the papers are not."""
    found, seen = FakeStatistics(llama), []
    found.x, found.gradients = found.x.repeat(1, 7, 1)[:, :4000], torch.ones(HEADS, 4000, D)
    found.gradients[:, 7] = 1000**0.5
    monkeypatch.setattr(tables, "weighted_kmeans", lambda x, w, count, *_: seen.append(w) or x[:, :count])
    contiguous(found, "fisher")(0, "value", VQSpec(8, 4), 0)
    monkeypatch.setattr(methods, "learned", lambda statistics, name, config, learn, seed, noise: learn)
    setting = methods.Setting(llama, lambda: found, 0)
    for name in ("cq-fisher-1bit", "antkv-paper-1bit-sinks"):
        all_methods()[name].build(setting).codebook(0, "value", VQSpec(8, 4), 0)
    cut, *whole = [float(w.max() / w.min()) for w in seen]
    assert cut == pytest.approx(1) and min(whole) > 25


def test_methods_that_lack_samples_are_left_out(llama, capsys):
    bench = SimpleNamespace(model=llama, sizes=Sizes(tokens=2048, samples=200))
    names = ("ours-1bit", "cq-4bit", "fp8", "ott-2bit", "kvquant-2bit")
    fitting = [name for name in names if quality.fits(all_methods()[name], bench)]
    assert fitting == ["fp8", "ott-2bit", "kvquant-2bit"]
    assert "ours-1bit: left out, 200 samples are fewer than 256 centroids" in capsys.readouterr().out


def arguments(script, *words: str) -> None:
    before, sys.argv = sys.argv, [script.__name__, *map(str, words)]
    try:
        script.main()
    finally:
        sys.argv = before


def test_methods_come_in_the_order_asked_for():
    names = [
        method.name for method in quality.chosen(["ours-1bit", "kivi-*", "*-1bit"], ["mine=smollm2-135m-instruct-1bit"])
    ]
    assert names[:4] == ["mine", "ours-1bit", "kivi-4bit", "kivi-2bit"] and len(names) == len(set(names))
    assert {"cq-1bit", "antkv-paper-1bit"} < set(names)


def test_quality_script(tmp_path, capsys, monkeypatch):
    options = ["--out", tmp_path, "--work-dir", tmp_path / "work", "--device", "cpu", "--tiny"]
    arguments(quality, *options, "--methods", "fp8", "kivi-2bit", "kvquant-1bit", "antkv-paper-*", "ours-1bit")
    assert "antkv-paper-0.375bit: left out, 16 channels" in capsys.readouterr().out
    rows = read_csv(tmp_path / "quality.csv")
    assert [r["method"] for r in rows if r["protocol"] == "FP"] == ["FP"]
    found = {(r["method"], r["protocol"]): r for r in rows}
    codebooks = {"antkv-paper-1bit", "antkv-paper-1bit-sinks", "ours-1bit"}
    assert {m for m, _ in found} == {"FP", "fp8", "kivi-2bit", "kvquant-1bit"} | codebooks
    learned = {r["statistics"] for (m, _), r in found.items() if m in codebooks | {"kvquant-1bit"}}
    assert len(learned) == 1 and learned.pop().endswith("-2rounds")
    assert {found[m, "W0"]["statistics"] for m in ("fp8", "kivi-2bit")} == {""}
    places = sorted(path.name for path in (tmp_path / "work" / "mix" / "learned").glob("antkv-paper-*[!k]"))
    assert len(places) == 1, "with sinks it reads the same tables"
    assert found["antkv-paper-1bit", "W0"]["perplexity"] != found["antkv-paper-1bit-sinks", "W0"]["perplexity"]
    for (method, protocol), row in found.items():
        assert float(row["ratio"]) == pytest.approx(
            float(row["perplexity"]) / float(found["FP", "FP"]["perplexity"]), 1e-4
        )
        assert protocol == "FP" or {(method, "W0"), (method, "S128")} <= found.keys()
        assert protocol == "FP" or ((method, "cache") in found) == (method in codebooks)
    assert float(found["fp8", "W0"]["bits"]) == pytest.approx(8, abs=0.1)
    assert 1 < float(found["antkv-paper-1bit", "W0"]["bits"]) < 1.5
    assert (
        float(found["ours-1bit", "S128"]["bits_with_window"]) > 8 > float(found["ours-1bit", "W0"]["bits_with_window"])
    )
    assert abs(float(found["kivi-2bit", "W0"]["ratio"]) - 1) > abs(float(found["fp8", "W0"]["ratio"]) - 1)
    table = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert "| method | bits | with window | tables, MB | W0 | S128 | cache |" in table and "| kivi-2bit | 3.5" in table

    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == ({"quality-w0.png", "quality-s128.png", "quality-cache.png"} if MATPLOTLIB else set())

    monkeypatch.setattr(quality, "plot_quality", lambda rows, out: [])
    before = (tmp_path / "quality.csv").read_bytes()
    arguments(quality, *options, "--methods", "fp8", "kivi-2bit", "ours-1bit")
    assert (tmp_path / "quality.csv").read_bytes() == before, "a rerun measures nothing twice"
    arguments(quality, *options, "--methods", "kivi-*", "--shard", "1/2")
    assert (tmp_path / "quality.csv").read_bytes() == before, "kivi-2bit is the second of two"
    arguments(quality, *options, "--methods", "kivi-*", "--protocols", "cache")
    assert (tmp_path / "quality.csv").read_bytes() == before
    assert "kivi-4bit: left out, it is measured by W0, S128 only" in capsys.readouterr().out
    arguments(quality, *options, "--methods", "turboquant-2bit", "--seed", "0", "1", "--protocols", "W0")
    seeds = {r["seed"]: r["perplexity"] for r in read_csv(tmp_path / "quality.csv") if r["method"] == "turboquant-2bit"}
    assert set(seeds) == {"0", "1"} and seeds["0"] != seeds["1"]


def test_ablations_script(tmp_path):
    options = ["--out", tmp_path, "--work-dir", tmp_path / "work", "--device", "cpu", "--tiny"]
    arguments(ablations, *options, "--parts", "window", "rope")
    rows = read_csv(tmp_path / "ablations.csv")
    assert len({r["statistics"] for r in rows if r["protocol"] != "FP"}) == 1
    windows = {r["protocol"] for r in rows if r["part"] == "window"}
    assert windows == {"W0", "S32", "S128", "S256"} and sum(r["part"] == "window" for r in rows) == 8
    ratios = {r["group"]: float(r["ratio"]) for r in rows if r["part"] == "rope" and r["protocol"] == "W0"}
    assert ratios["before RoPE"] != ratios["after RoPE"]
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- table:rope -->\nold\n<!-- end -->\n<!-- table:kmeans -->\n<!-- end -->\n", "utf-8")
    with pytest.raises(SystemExit, match="no place for window"):
        arguments(ablations, "--out", tmp_path, "--write", page)
    page.write_text((BENCHMARKS.parent / "docs" / "ablations.md").read_text(encoding="utf-8"), encoding="utf-8")
    for _ in range(2):  # filling twice changes nothing more
        arguments(ablations, "--out", tmp_path, "--write", page)
        text = page.read_text(encoding="utf-8")
        assert text.count("| before RoPE |") == 2 and text.count("Not measured yet.") == len(ablations.PARTS) - 2
        assert text.count("| no anchors |") == 1 and ("![rope](ablations-rope.png)" in text) == MATPLOTLIB


def domains(tokens: int, codebook=None) -> list:
    """Variants where the mix has 128 windows of 2,048 tokens, of which 1,024 are sampled."""
    bench = SimpleNamespace(sizes=Sizes(), statistics=lambda *given: SimpleNamespace(key="mix", given=given))
    return Ablations(bench, codebook, {"wiki": "wiki.txt"}, tokens).all()


def test_a_domain_gives_as_many_samples_as_the_mix():
    mix, wiki = (variant for variant in domains(131072) if variant.part == "calibration-domain")
    assert mix.learned_from().given == () and wiki.learned_from().given[:2] == ("domain-wiki", ("wiki.txt",))
    sizes = wiki.learned_from().given[2]
    assert (sizes.tokens, sizes.samples) == (131072, _sampled_positions(128, *Sizes()[1:3], 0)[:64].numel())
    for tokens in (2047, 262144 + 2048):
        with pytest.raises(ValueError, match=f"--domain-tokens {tokens} must be at least a window of 2048"):
            domains(tokens)


def test_a_given_codebook_belongs_to_no_statistics():
    found = {variant.part: variant.learned_from for variant in domains(131072, codebook=object())}
    assert [part for part, source in found.items() if source is None] == [
        "bias",
        "scores",
        "window",
        "anchor-dtype",
        "query-stride",
    ]


def test_order_of_columns():
    names = ["wiki.valid", "64 tokens", "1,024 tokens", "n = 16", "0.5%"]
    assert [row["x"] for row in sorted(({"x": name} for name in names), key=_order)] == [
        "wiki.valid", "0.5%", "n = 16", "64 tokens", "1,024 tokens",
    ]  # fmt: skip


def test_every_part_has_its_place():
    page = (BENCHMARKS.parent / "docs" / "ablations.md").read_text(encoding="utf-8")
    assert [line[11:-4] for line in page.splitlines() if line.startswith("<!-- table:")] == list(ablations.PARTS)


def test_unusable_arguments(tmp_path):
    tiny = ["--out", tmp_path, "--work-dir", tmp_path / "work", "--device", "cpu", "--tiny"]
    for words, message in (
        (["--methods", "kivy-*"], "no method is called so; there are fp8"),
        (["--shard", "4/4"], "write I/N with 0 <= I < N"),
        (["--codebooks", *[f"{BENCHMARKS.parent}/codebooks/smollm2-135m-instruct-1bit"] * 2], "call one otherwise by"),
        (["--methods", "fp8", "--text", "a=b", "--codebooks", "nowhere/to/be/found"], "nowhere"),
    ):
        with pytest.raises(SystemExit, match=message):
            arguments(quality, *tiny, *words)
    with pytest.raises(SystemExit, match="--model FOLDER is missing"):
        arguments(quality, "--out", tmp_path)
    append_csv(tmp_path / "ablations.csv", {"part": "rope"})
    with pytest.raises(SystemExit, match="No such file or directory: .*gone.md"):
        arguments(ablations, "--out", tmp_path, "--write", tmp_path / "gone.md")
    with pytest.raises(SystemExit, match="must lie between 1 and 2047"):
        arguments(quality, "--out", tmp_path, "--model", "nowhere", "--last", "2048")
    path = tmp_path / "other.csv"
    append_csv(path, {"a": 1}, "cpu")
    with pytest.raises(ValueError, match="has the columns a, gpu"):
        append_csv(path, {"b": 1}, "cpu")


def test_a_table_belongs_to_its_model(tmp_path, llama):
    text = Text("random", torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(0)))
    what = dict(method="fp8", family="fp8", seed=0)
    for name in ("one", "two", "one"):
        Table(tmp_path / "t.csv", llama, name).row(what, "W0", text, lambda: Subject(rival=Fp8()))
    assert [r["model"] for r in read_csv(tmp_path / "t.csv")] == ["one", "one", "two", "two"]


def test_table_bytes_of_plain_tables(llama):
    book = random_codebook(llama, AnTKVConfig.preset("1bit"))
    assert table_bytes(book) == book.tables_bytes()
    spec = VQSpec(8, 8)
    plain = plain_tables(torch.zeros(HEADS, D // 8, 1, 256, 8, dtype=torch.float16), spec)
    book = AnTKVCodebook(book.config, dict.fromkeys(book.tables, (plain, plain)), book.model)
    assert table_bytes(book) == 3 * 2 * HEADS * D * 256 * 2 < book.tables_bytes()


def test_a_failing_method_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    options = ["--out", tmp_path, "--device", "cpu", "--tiny", "--protocols", "W0"]
    monkeypatch.setattr(quality, "plot_quality", lambda rows, out: [])
    with pytest.raises(SystemExit, match="failed: kvquant-1bit"):
        arguments(quality, *options, "--methods", "kvquant-1bit", "kivi-2bit", "fp8")
    assert "kvquant-1bit: failed, this method learns tables: give --calibrate" in capsys.readouterr().out
    assert {r["method"] for r in read_csv(tmp_path / "quality.csv")} == {"FP", "fp8", "kivi-2bit"}


def test_ours_get_the_noise_of_calibrate(tmp_path):
    """On the same text, so that a benchmark's tables are those that a user would get; others get none."""
    model, tokenizer = tiny_model("cpu"), tiny_tokenizer()
    (tmp_path / "text.txt").write_text(tiny_text(seed=3), encoding="utf-8")
    sizes = Sizes(tokens=480, window=160, samples=480, iterations=1)
    found = Statistics(model, tokenizer, [str(tmp_path / "text.txt")], tmp_path / "work", sizes)
    book = learned(found, "ours-1bit", found.codebook.config, own(found), noise=True)
    for layer, (key, value) in book.tables.items():
        torch.testing.assert_close(key.noise, found.codebook.tables[layer][0].noise)
        assert value.noise is None
    assert learned(found, "ours-1bit", found.codebook.config, own(found)).tables[0][0].noise is None
