"""Bits spread over layers: the allocation against brute force, what is measured, and calibration with it."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from helpers import random_codebook
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calibration import small_llama, small_text
from test_cli import (
    antkv,
    error_of,
    place,  # noqa: F401  # a fixture
)
from test_texts import word_tokenizer

from antkv_hf import AnTKVCodebook, AnTKVConfig, calibrate
from antkv_hf.cache.model_rotary import model_rotary
from antkv_hf.calibration import layer_losses, run, sensitivity
from antkv_hf.calibration.drop_stages import drop_stages
from antkv_hf.calibration.layer_losses import cache_cost, layer_costs, mean_divergence
from antkv_hf.calibration.sensitivity import Mixed, layer_specs
from antkv_hf.calibration.spread import spread_bits, spread_within
from antkv_hf.evaluation import evaluate
from antkv_hf.specs import VQSpec

RATES = [VQSpec(16, 8), VQSpec(8, 8), VQSpec(4, 8), VQSpec(16, 10)]
SMALL = Mixed(1.0, ("d8b4", "d4b4", "d2b4"), windows=2, protocols=("W0",))  # 0.5, 1 and 2 bits, with tables of 16


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_spread_is_the_best_of_all(data):
    places = [(layer, role) for layer in range(data.draw(st.integers(1, 3))) for role in ("key", "value")]
    sizes = {"key": data.draw(st.sampled_from([16, 32])), "value": 16}
    loss = st.floats(0, 10, allow_nan=False)
    costs = {p: {spec: data.draw(loss) for spec in RATES[: data.draw(st.integers(1, 4))]} for p in places}
    bits = data.draw(st.floats(0.4, 2.5))

    def taken(specs):
        return sum(8 * spec.bytes_per_vector(sizes[role]) for spec, (_, role) in zip(specs, places))

    elements = sum(sizes[role] for _, role in places)
    fitting = [s for s in itertools.product(*(costs[p] for p in places)) if taken(s) <= bits * elements + 1e-6]
    if not fitting:
        with pytest.raises(ValueError, match="bits on average cannot be kept: the smallest candidates take"):
            spread_bits(costs, sizes, bits)
        return
    found = spread_bits(costs, sizes, bits)
    assert list(found) == places and taken(found.values()) <= bits * elements + 1e-6
    best = min(sum(costs[p][spec] for p, spec in zip(places, specs)) for specs in fitting)
    assert sum(costs[p][spec] for p, spec in found.items()) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_spread_within_a_limit_of_bytes(data):
    """It fits if anything does, and then no single place could gain more."""
    places, sizes = [(layer, role) for layer in range(2) for role in ("key", "value")], {"key": 16, "value": 16}
    costs = {p: {spec: data.draw(st.floats(0, 10)) for spec in RATES} for p in places}
    stored = {p: {spec: data.draw(st.integers(1, 9)) * 1000 for spec in RATES} for p in places}
    most = data.draw(st.integers(3, 36)) * 1000

    def total(what, specs):
        return sum(what[p][spec] for p, spec in zip(places, specs))

    def allowed(bytes_):
        return [
            s
            for s in itertools.product(*(costs[p] for p in places))
            if total(stored, s) <= bytes_ and sum(8 * spec.bytes_per_vector(16) for spec in s) <= 2 * 64
        ]

    if not allowed(most):
        with pytest.raises(ValueError, match=f"{most:,} bytes are too few: at 2 bits the smallest tables"):
            spread_within(costs, sizes, 2.0, stored, most)
        return
    found = spread_within(costs, sizes, 2.0, stored, most)
    assert list(found) == places and tuple(found.values()) in allowed(most)
    if len(allowed(most)) == len(allowed(10**9)):
        assert found == spread_bits(costs, sizes, 2.0)
    for p, old in found.items():  # no single place could gain within what is left
        for spec in RATES:
            assert costs[p][spec] >= costs[p][old] - 1e-9 or tuple({**found, p: spec}.values()) not in allowed(most)


@pytest.mark.parametrize(("layers", "stages"), [(2, 2), (2, 3), (10, 35)])
def test_stages_go_where_they_gain_most(layers, stages):
    """Two stages gain more in earlier places; of equal places as many get one as there is room for."""
    one, two = VQSpec(8, 8), VQSpec(16, 8, 2)  # of as many bits
    places = [(layer, role) for layer in range(layers) for role in ("key", "value")]
    gains = [3.0, 2.0, 1.0, 0.5] if layers == 2 else [1.0] * len(places)
    costs = {p: {one: 4.0, two: 4.0 - gain} for p, gain in zip(places, gains)}
    stored = {p: {one: 1000, two: 2000} for p in places}
    room = stages - len(places) if layers > 2 else stages
    found = spread_within(costs, {"key": 16, "value": 16}, 1.0, stored, 1000 * (len(places) + room) + 999)
    assert sum(spec == two for spec in found.values()) == room
    if layers == 2:
        assert [p for p, spec in found.items() if spec == two] == places[:room]


def test_divergence_is_that_of_torch():
    g = torch.Generator().manual_seed(0)
    plain, logits = (torch.randn(2, 300, 20, generator=g) for _ in range(2))
    p, q = plain.softmax(-1), logits.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert mean_divergence(plain, logits) == pytest.approx(float(expected), rel=1e-5)
    assert mean_divergence(plain, plain) == 0


@pytest.mark.parametrize("protocol", ["W0", "S16"])
def test_losses_are_those_of_a_cache_with_one_coded_role(protocol):
    """Both roles of one layer coded at once, by hand and as a codebook: more than each alone; nothing coded: none."""
    model = small_llama()
    config = AnTKVConfig.preset("1bit", skip_layers=(0,))
    book = random_codebook(model, config)
    windows = torch.randint(3, 100, (2, 90), generator=torch.Generator().manual_seed(0))
    tables = {(role, VQSpec(8, 8)): book.tables[1][i] for i, role in enumerate(("key", "value"))}
    found = layer_costs(model, windows, protocol, config, 1, model_rotary(model.config)[1], tables)
    alone = [found[1, role][VQSpec(8, 8)] for role in ("key", "value")]
    both = cache_cost(model, windows, protocol, book)
    assert all(cost > 0 for cost in alone) and both > max(alone) * 0.5
    assert both < 4 * sum(alone)
    assert layer_costs(model, windows, protocol, config, 1, None, {}) == {(1, "key"): {}, (1, "value"): {}}


def calibrated(model=None, mixed=SMALL, **changes):
    options = dict(tokens=512, window=64, samples=400, iterations=3, progress=False, mixed=mixed)
    return calibrate(model or small_llama(), word_tokenizer(), [small_text()], AnTKVConfig(), **{**options, **changes})


def test_calibration_spreads_bits(tmp_path, monkeypatch):
    book = calibrated(work_dir=tmp_path)
    record = book.calibration["sensitivity"]
    assert record["windows"] == "2 x 64" and record["layers"] == [0, 1] and record["protocol"] == "W0"
    assert set(record["key"]) == set(record["value"]) == {"d8b4", "d4b4", "d2b4"}
    assert sum(book.config.bits([0, 1])) / 2 <= 1.0
    costs = {(i, r): {VQSpec.parse(s): record[r][s][i] for s in record[r]} for i in (0, 1) for r in ("key", "value")}
    assert layer_specs(spread_bits(costs, {"key": 16, "value": 16}, 1.0)) == book.config.layer_specs
    assert record["predicted"]["mixed"] <= record["predicted"]["d4b4"]
    assert set(record["measured"]) == {"mixed", "d4b4"} and record["measured"]["mixed"] > 0
    # what is there is used: other bits need no forward, no k-means and no measurement, but for that of the result
    for module, name in ((run, "window_statistics"), (run, "learn_tables"), (sensitivity, "layer_costs")):
        monkeypatch.setattr(module, name, None)
    more = calibrated(mixed=Mixed(1.5, SMALL.candidates, 2, ("W0",)), work_dir=tmp_path)
    assert sum(book.config.bits([0, 1])) < sum(more.config.bits([0, 1])) <= 3.0
    same = calibrated(work_dir=tmp_path)
    assert same.config == book.config and same.sha256 == book.sha256
    monkeypatch.undo()
    damaged = next(tmp_path.glob("sensitivity-*/0000.json"))
    damaged.write_text("", encoding="utf-8")  # a full disk: measured anew
    assert calibrated(work_dir=tmp_path).config == book.config and json.loads(damaged.read_text(encoding="utf-8"))
    uniform = calibrate(
        small_llama(), word_tokenizer(), [small_text()], AnTKVConfig(VQSpec(4, 4), VQSpec(4, 4)), tokens=512,
        window=64, samples=400, iterations=3, progress=False, work_dir=tmp_path,
    )  # fmt: skip
    assert not uniform.config.layer_specs and "sensitivity" not in uniform.calibration
    book.save_pretrained(tmp_path / "book")
    card = (tmp_path / "book" / "README.md").read_text(encoding="utf-8")
    assert "on average" in card and "'predicted'" in card and "'d2b4': [" not in card
    again = AnTKVCodebook.from_pretrained(tmp_path / "book")
    assert again.calibration["sensitivity"] == json.loads(json.dumps(record))
    row = evaluate(small_llama(), None, torch.randint(3, 99, (1, 64)), again, protocols=["W0"])[0]
    assert row.method.startswith("mixed d")


def test_several_protocols_count_alike(tmp_path, monkeypatch):
    """Each loss is a share of what the uniform spec loses by its protocol."""
    by = {name: calibrated(mixed=Mixed(1.0, SMALL.candidates, 2, (name,)), work_dir=tmp_path) for name in ("S16", "W0")}
    monkeypatch.setattr(sensitivity, "layer_costs", None)  # all is there
    both = calibrated(mixed=Mixed(1.0, SMALL.candidates, 2, ("S16", "W0")), work_dir=tmp_path)
    records = {name: book.calibration["sensitivity"] for name, book in by.items()}
    record = both.calibration["sensitivity"]
    whole = {name: sum(r[role]["d4b4"][i] for role in ("key", "value") for i in (0, 1)) for name, r in records.items()}
    assert record["protocol"] == "S16 + W0" and "relative to that of d4b4 in all layers" in record["unit"]
    for role, spec, i in itertools.product(("key", "value"), ("d8b4", "d4b4", "d2b4"), (0, 1)):
        expected = sum(r[role][spec][i] / whole[name] for name, r in records.items())
        assert record[role][spec][i] == pytest.approx(expected, rel=2e-3)
    assert record["predicted"]["mixed"] <= record["predicted"]["d4b4"] == pytest.approx(2, rel=1e-3)
    assert set(record["measured"]) == set(by)
    for name, found in record["measured"].items():
        assert set(found) == {"mixed", "d4b4"}
        assert found["d4b4"] == records[name]["measured"]["d4b4"] > 0


def test_only_what_is_missing_is_measured(tmp_path, monkeypatch):
    """Of two protocols one is there; then a file of the other is damaged in ways that are, and are not, JSON."""
    seen = []

    def watched(model, rows, protocol, config, layer, rotary, tables):
        seen.append((protocol, layer, len(tables)))
        return layer_costs(model, rows, protocol, config, layer, rotary, tables)

    both = Mixed(1.0, SMALL.candidates, 2, (" s16", "W0"))
    calibrated(mixed=Mixed(1.0, SMALL.candidates, 2, ("S16",)), work_dir=tmp_path)
    (first,) = tmp_path.glob("sensitivity-*")
    monkeypatch.setattr(sensitivity, "layer_costs", watched)
    record = calibrated(mixed=both, work_dir=tmp_path).calibration["sensitivity"]
    assert seen == [("W0", 0, 6), ("W0", 1, 6)]
    (second,) = set(tmp_path.glob("sensitivity-*")) - {first}
    for text, count in (("[]", 6), ('{"key": 1}', 6), ('{"key": {"d8b4": NaN, "d4b4": 0.1, "d2b4": 0.1}}', 4), ("", 6)):
        (second / "0001.json").write_text(text, encoding="utf-8")
        seen.clear()
        again = calibrated(mixed=both, work_dir=tmp_path).calibration["sensitivity"]
        assert seen == [("W0", 1, count)], text
        if count == 6:
            assert again == record


def test_protocols_with_a_limit_on_tables_and_noise(tmp_path):
    """Shares are of the uniform spec that the limit allows; keys have noise here, and stages can be dropped later."""
    options = dict(tokens=512, window=64, samples=400, iterations=3, progress=False, work_dir=tmp_path)
    mixed = Mixed(1.0, ("d8b4", "d4b4", "d8b4s2"), 2, ("S16", "W0"), max_table_bytes=10_000)
    book = calibrate(small_llama(), word_tokenizer(), [small_text()], AnTKVConfig(window=16), mixed=mixed, **options)
    record = book.calibration["sensitivity"]
    assert record["max_table_bytes"] == 10_000 >= book.tables_bytes()
    uniform = "d4b4"  # d8b4s2 everywhere takes 13,952
    assert f"relative to that of {uniform} in all layers" in record["unit"]
    assert record["predicted"][uniform] == pytest.approx(2, rel=1e-3)
    assert record["predicted"]["any size"] <= record["predicted"]["mixed"]
    assert all(key.noise is not None for key, _ in book.tables.values())
    free = calibrate(
        small_llama(), word_tokenizer(), [small_text()], AnTKVConfig(window=16), **options,
        mixed=Mixed(1.0, ("d16b4", "d8b4s2"), 2, ("S16", "W0")),
    )  # fmt: skip
    smaller = drop_stages(free, free.tables_bytes() - 1)
    assert smaller.tables_bytes() < free.tables_bytes() and smaller.calibration["drop_stages"]["stages"] == 1


def test_a_protocol_that_loses_nothing_does_not_count():
    costs = {
        "S16": {(0, "key"): {VQSpec(8, 4): 0.0, VQSpec(4, 4): 0.0}},
        "W0": {(0, "key"): {VQSpec(8, 4): 0.3, VQSpec(4, 4): 0.1}},
    }
    found, _ = sensitivity._together(costs, VQSpec(4, 4))
    assert found[0, "key"] == pytest.approx({VQSpec(8, 4): 3.0, VQSpec(4, 4): 1.0})


def test_a_layers_samples_are_read_once_for_all_specs(tmp_path, monkeypatch):
    reads, original = [], run.WorkFolder.read

    def counted(self, names, layer, *rest):
        reads.append((layer, names[0]))
        return original(self, names, layer, *rest)

    monkeypatch.setattr(run.WorkFolder, "read", counted)
    calibrated(work_dir=tmp_path)
    assert sorted(reads) == [(0, "key"), (0, "value"), (1, "key"), (1, "value")]


def test_candidates_are_tried_with_the_bias_that_they_will_have(tmp_path, monkeypatch):
    """Windows beyond the exact window: each candidate's keys carry noise of their own, so coarser ones more."""
    seen, original = [], layer_costs

    def watched(model, rows, protocol, config, layer, rotary, tables):
        seen.append(tables)
        return original(model, rows, protocol, config, layer, rotary, tables)

    monkeypatch.setattr(sensitivity, "layer_costs", watched)
    book = calibrate(
        small_llama(), word_tokenizer(), [small_text()], AnTKVConfig(window=16), tokens=512, window=64, samples=400,
        iterations=3, progress=False, mixed=Mixed(1.0, SMALL.candidates, 2, ("S16",)), work_dir=tmp_path,
    )  # fmt: skip
    loudness = [
        [float(t["key", VQSpec.parse(s)].noise.diagonal(dim1=-2, dim2=-1).sum()) for s in ("d8b4", "d4b4", "d2b4")]
        for t in seen
    ]
    assert len(seen) == 2 and all(a > b > c > 0 for a, b, c in loudness)
    assert all(key.noise is not None for key, _ in book.tables.values())
    (sensitivity_file,) = {f.parent for f in tmp_path.rglob("sensitivity-*/*.json")}
    calibrated(mixed=Mixed(1.0, SMALL.candidates, 2, ("W0",)), work_dir=tmp_path)  # no bias here: losses of their own
    assert len({f.parent for f in tmp_path.rglob("sensitivity-*/*.json")} - {sensitivity_file}) == 1


def test_bad_spreads_are_refused():
    for make, message in (
        (
            lambda: Mixed(0.25),
            r"0.25 bits on average cannot be kept, since the smallest candidate has 0.5 bits .d16b8.",
        ),
        (lambda: Mixed(float("nan")), "nan bits on average are no number"),
        (lambda: Mixed(float("inf")), "inf bits on average are no number"),
        (lambda: Mixed(1, ()), "smallest candidate has none"),
        (lambda: Mixed(1, windows=0), "windows=0 must be at least 1"),
        (lambda: Mixed(1, protocols=("FP",)), "protocol W0 or S<n> such as S128, not 'FP'"),
        (lambda: Mixed(1, protocols=()), r"protocols=\(\) must name at least one protocol, and none twice"),
        (lambda: Mixed(1, protocols=("W0", "w0 ")), r"protocols=\('W0', 'w0 '\) must name .*, and none twice: give"),
        (lambda: Mixed(1, protocols="W0"), r"protocols='W0' must be a tuple of names: give \('W0',\)"),
        (lambda: Mixed(1, ("3",)), "3 bits per element do not exist"),
        (lambda: calibrated(mixed=Mixed(1, ("d32b8",), 2, ("W0",))), "head_dim 16 is not a multiple of sub_dim 32"),
        (
            lambda: calibrated(mixed=Mixed(1, protocols=("W0",)), samples=200),
            "200 samples .* are fewer than the 256 centroids",
        ),
        (
            lambda: calibrated(mixed=Mixed(1, ("d8b4",))),
            "windows of 64 tokens, of which the last 128 and 4 sinks are exact.*above 132, or measure by W0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_impossible_spreads_are_refused_before_work(monkeypatch):
    for module, name in ((run, "window_statistics"), (run, "mix_windows")):
        monkeypatch.setattr(module, name, None)
    spec = VQSpec(8, 4)
    for config, mixed, message in (
        (AnTKVConfig.preset("identity"), SMALL, "the identity codec has no tables to learn"),
        (AnTKVConfig.preset("ott-2bit"), SMALL, "codec int2g32 has no tables to learn"),
        (
            AnTKVConfig(),
            Mixed(0.25, ("d16b4", "d8b4"), protocols=("W0",)),
            "0.25 bits on average cannot be kept: the smallest .* take 0.5",
        ),
        (AnTKVConfig(spec, spec, layer_specs={9: (spec, spec)}), None, "layer_specs names layer 9, .* has 2 layers"),
        (AnTKVConfig(spec, spec, skip_layers=(0,), layer_specs={0: (spec, spec)}), None, "layer 0, which is skipped"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(
                small_llama(), word_tokenizer(), [small_text()], config, tokens=512, window=64, samples=400,
                progress=False, mixed=mixed,
            )  # fmt: skip


def test_loss_that_is_not_finite_is_named_and_not_kept(tmp_path, monkeypatch):
    original, calls = layer_losses.mean_divergence, []

    def failing(plain, logits):
        calls.append(1)
        return float("nan") if len(calls) == 2 else original(plain, logits)

    monkeypatch.setattr(layer_losses, "mean_divergence", failing)
    message = "layer 0, key d4b4: the loss is nan in torch.float32, .*: load the model in bfloat16 or float32"
    with pytest.raises(ValueError, match=message):
        calibrated(work_dir=tmp_path)
    assert not list(tmp_path.rglob("sensitivity-*/*.json"))
    assert calibrated(work_dir=tmp_path).calibration["sensitivity"]["measured"]["mixed"] > 0
    assert len(list(tmp_path.rglob("sensitivity-*/*.json"))) == 2


def test_command(place, monkeypatch, tmp_path):  # noqa: F811
    import antkv_hf.calibration

    seen = []

    def learned(model, tokenizer, texts, config, **options):
        seen.append((config, options["mixed"]))
        return random_codebook(model, config)

    monkeypatch.setattr(antkv_hf.calibration, "calibrate", learned)
    common = ("calibrate", place / "model", place / "text.txt", "-o", tmp_path, "--device", "cpu")
    antkv(*common, "--layer-bits", "0=2,2=0.5/1", "--bits", 1)
    assert {i: tuple(map(str, pair)) for i, pair in seen[-1][0].layer_specs.items()} == {
        0: ("d4b8", "d4b8"), 2: ("d16b8", "d8b8"),
    }  # fmt: skip
    antkv(*common, "--mixed", 1, "--mixed", 2, "--candidate", "1", "--candidate", "d4b8", "--sensitivity", "S128",
          "--sensitivity-windows", 3)  # fmt: skip
    assert [mixed for _, mixed in seen[-2:]] == [Mixed(b, ("1", "d4b8"), 3, ("S128",)) for b in (1.0, 2.0)]
    assert (tmp_path / "mixed-2bit" / "config.json").is_file()
    antkv(*common[:-3], tmp_path / "one", *common[-2:], "--mixed", 1, "--sensitivity", "S128", "--sensitivity", "W0")
    assert seen[-1][1] == Mixed(1.0, protocols=("S128", "W0"))
    assert "leave --key-bits" in error_of(*common, "--mixed", 1, "--key-bits", 2)
    assert "0.25 bits on average cannot be kept" in error_of(*common, "--mixed", 0.25)
    assert "--candidate is of --mixed" in error_of(*common, "--bits", 1, "--candidate", "1")
    assert "--sensitivity-windows is of --mixed" in error_of(*common, "--sensitivity-windows", 2)
    assert "layers 3-1 run backwards" in error_of(*common, "--layer-bits", "3-1=2")
