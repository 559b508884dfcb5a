"""Fine-tuning of tables: the student's attention against the evaluator's, gradients by hand, training, resuming."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest
import torch
from helpers import random_codebook, random_noise, random_tables
from test_calibration import noise, one_thread, small_llama, small_text, tables_equal
from test_families import CONFIG, build
from test_texts import word_tokenizer
from torch.nn import functional as F
from typer.testing import CliRunner

from antkv_hf import AnTKVCodebook, AnTKVConfig, VQSpec, calibrate
from antkv_hf.anchors import get_score
from antkv_hf.calibration import measure_noise
from antkv_hf.calibration.exact_choice import exact_mask
from antkv_hf.calibration.finetune import finetune, kl_gradient
from antkv_hf.calibration.intercept import frozen_for_statistics
from antkv_hf.calibration.straight_through import (
    NAME,
    Student,
    TrainedQuantizer,
    straight_through,
)
from antkv_hf.cli import app
from antkv_hf.codecs import VectorQuantizer
from antkv_hf.config import AnchorConfig
from antkv_hf.evaluation.protocols import Protocol, ProtocolEvaluator, choose_anchors
from antkv_hf.evaluation.windowed import windowed_attention

__all__ = ["one_thread"]  # an autouse fixture
finetuning = sys.modules["antkv_hf.calibration.finetune"]  # by its name the package exports the function
straight_through_module = sys.modules["antkv_hf.calibration.straight_through"]
SPEC = AnTKVConfig(key=VQSpec(4, 4), value=VQSpec(8, 4), window=16, chunk=16)


def with_noise(codebook):
    """The codebook with random noise of its keys."""
    tables = {}
    for layer, (key, value) in codebook.tables.items():
        kv_heads, dim = key.mean.shape
        lost = random_noise(codebook.config.specs(layer)[0], kv_heads, dim, seed=layer)
        tables[layer] = (dataclasses.replace(key, noise=0.3 * lost), value)
    return AnTKVCodebook(codebook.config, tables, codebook.model)


def sharp_llama(**changes):
    """A model whose logits differ enough that an error of its cache shows."""
    model = small_llama(**changes)
    for parameter in model.parameters():
        parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


# -------------------------------------------------------------------- the student's attention
@pytest.mark.parametrize("score", ["error_aware", "anchor_score", "key_norm"])
@pytest.mark.parametrize(("window", "n"), [(0, 40), (8, 40), (8, 48), (8, 10)])
def test_exact_tokens_are_those_of_the_evaluator(score, window, n):
    config = SPEC.replace(anchors=AnchorConfig(score=score, fraction=0.1, sinks=2))
    q, k, v = noise(2, 4, n, 8), noise(2, 2, n, 8, seed=1), noise(2, 2, n, 8, seed=2)
    errors = noise(2, 2, n, seed=3).abs(), noise(2, 2, n, seed=4).abs()
    for softcap, sink in ((None, None), (5.0, noise(4, seed=5))):
        index = choose_anchors(get_score(score), config, window, q, k, v, errors, 0.3, softcap, sink)
        expected = torch.zeros(2, 2, n + 1, dtype=torch.bool).scatter_(2, index.masked_fill(index < 0, n), True)
        expected[..., :2] = True
        found = exact_mask(config, window, q, k, v, errors, 0.3, softcap, sink)
        assert torch.equal(found, expected[..., :n])


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("window", [0, 5, 16, 100])
def test_attention_and_its_gradients_equal_the_evaluator(window, capped, monkeypatch):
    monkeypatch.setattr(straight_through_module, "ROWS", 16)
    q, k, v = noise(2, 4, 40, 8), noise(2, 2, 40, 8, seed=1), noise(2, 2, 40, 8, seed=2)
    read = noise(2, 2, 40, 8, seed=3), noise(2, 2, 40, 8, seed=4)
    more = (5.0, noise(4, seed=5)) if capped else ()
    tensors = [x.requires_grad_() for x in (q, k, v, *read)]
    gradients = []
    for attend in (straight_through_module.windowed_attention, windowed_attention):
        out = attend(*tensors, window, 0.3, *more)
        found = torch.autograd.grad(out.square().sum(), tensors, allow_unused=True)
        gradients.append((out, *(torch.zeros_like(x) if g is None else g for x, g in zip(tensors, found))))
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("changes", [{}, {"rope": "none"}], ids=["pairs", "dense"])
@pytest.mark.parametrize("protocol", ["W0", "S16"])
def test_student_attends_as_the_evaluator_does(changes, protocol):
    model = sharp_llama()
    config = SPEC.replace(anchors=AnchorConfig(fraction=0.1, dtype="float16"), skip_layers=(), **changes)
    codebook = random_codebook(model, config)
    ids = torch.randint(3, 100, (2, 70), generator=torch.Generator().manual_seed(1))
    protocol = Protocol.parse(protocol)
    with torch.no_grad():
        with ProtocolEvaluator(model, protocol, config, codebook).active():
            expected = model(ids, use_cache=False).logits
        with frozen_for_statistics(model, NAME), Student(model, codebook).active(protocol.window):
            found = model(ids, use_cache=False).logits
    # Anchors of an evaluation went through float16; a code may tip over between two centroids that are as near.
    assert (found - expected).abs().median() < 0.02 * expected.std()


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "phi", "gemma3_text", "llama-yarn", "llama-bfloat16"])
def test_other_families_and_dtypes(name):
    """Logit caps, sink logits, partial and scaled RoPE, sliding layers: as the evaluator, with finite gradients."""
    family = build(name.removesuffix("-bfloat16"))
    model, config = family.model, CONFIG.replace(anchors=AnchorConfig(fraction=0.13, dtype="float16"))
    codebook = AnTKVCodebook(config, family.codebook.tables, family.codebook.model)
    if name.endswith("bfloat16"):
        model.bfloat16()
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), ProtocolEvaluator(model, Protocol.parse("S8"), config, codebook).active():
        expected = model(ids, use_cache=False).logits
    student = Student(model, codebook)
    with frozen_for_statistics(model, NAME), student.active(8):
        found = model(ids, use_cache=False).logits
        found.float().logsumexp(-1).sum().backward()
    assert (found - expected).abs().median() < 0.02 * expected.std()
    gradients = [parameter.grad for parameter in student.parameters().values()]
    assert len(gradients) == 2 * family.quantized
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradients_of_the_size_of_noise(softcap, monkeypatch):
    monkeypatch.setattr(straight_through_module, "PACE", 2.0)
    model = sharp_llama()
    codebook = with_noise(random_codebook(model, SPEC.replace(anchors=AnchorConfig(fraction=0.1))))
    student = Student(model, codebook)
    q, k, v = noise(1, 4, 60, 16), noise(1, 2, 60, 16, seed=1), noise(1, 2, 60, 16, seed=2)
    weights = noise(1, 4, 60, 16, seed=3)

    def loss():
        return (student.attend(0, q, k, v, 0.3, softcap) * weights).sum()

    loss().backward()
    loud = student.parameters()["layers.0.noise"]
    assert loud.shape == (2, 4)
    for place in [(0, 0), (1, 1)]:
        ends = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                loud[place] += step
                ends.append(float(loss()))
                loud[place] -= step
        torch.testing.assert_close(float(loud.grad[place]), (ends[0] - ends[1]) / 2e-2, rtol=2e-2, atol=1e-4)
    with torch.no_grad():
        loud[1, 0] = 0.5
    found, given = student.tables()[0][0].noise, codebook.tables[0][0].noise
    torch.testing.assert_close(found[1, 0], math.e * given[1, 0])
    assert torch.equal(found[0], given[0]) and torch.equal(found[1, 1:], given[1, 1:])


def test_skipped_layers_stay_exact():
    model = sharp_llama()
    codebook = random_codebook(model, SPEC.replace(skip_layers=(0,)))
    student = Student(model, codebook)
    assert 0 not in student and 1 in student
    with frozen_for_statistics(model, NAME):
        student.prepare(model, torch.arange(3, 20).unsqueeze(0))
    noisy = ["layers.1.noise"] if codebook.tables[1][0].noise is not None else []
    assert list(student.parameters()) == ["layers.1.key", "layers.1.value", *noisy]
    assert student.tables()[0] == codebook.tables[0]


# -------------------------------------------------------------------- gradients
def test_straight_through_by_hand():
    x = torch.tensor([0.2, 0.9, 1.1]).requires_grad_()
    centroids = torch.tensor([0.0, 1.0]).requires_grad_()
    out = straight_through(x, centroids[torch.tensor([0, 1, 1])])
    assert out.tolist() == [0, 1, 1]
    (out * torch.tensor([2.0, 3.0, 5.0])).sum().backward()
    assert x.grad.tolist() == [2, 3, 5] and centroids.grad.tolist() == [2, 8]


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("spec", ["d4b4", "d8b4s2"])
def test_gradients_reach_the_centroids_that_were_chosen(spec, dense):
    spec = VQSpec.parse(spec)
    quantizer = VectorQuantizer(spec, random_tables(spec, 2, 8, dense))
    trained, x = TrainedQuantizer(quantizer), noise(1, 2, 3, 8)
    live = trained.live()
    codes = live.encode(x)
    assert torch.equal(codes, quantizer.encode(x))
    torch.testing.assert_close(live.decode(codes), quantizer.decode(codes))
    gradient = noise(1, 2, 3, 8, seed=1)
    live.decode(codes).backward(gradient)
    step = 1e-2 * noise(*trained.parameter.shape, seed=2)
    before = live.decode(codes).detach()
    with torch.no_grad():
        trained.parameter += step  # what is decoded is linear in the centroids
        after = trained.live().decode(codes)
    torch.testing.assert_close(((after - before) * gradient).sum(), (step * trained.parameter.grad).sum())
    assert 0 < (trained.parameter.grad != 0).float().mean() < 1


def test_kl_gradient_equals_autograd(monkeypatch):
    monkeypatch.setattr(finetuning, "_LOGITS", 100)
    logits, target = noise(2, 11, 30).requires_grad_(), noise(2, 11, 30, seed=1)
    expected = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)
    (2 * expected).backward()
    loss, gradient = kl_gradient(logits.detach(), target, 2.0)
    torch.testing.assert_close(gradient, logits.grad)
    torch.testing.assert_close(loss * 22, expected.detach())


# -------------------------------------------------------------------- finetune
SETTINGS = dict(steps=12, batch=2, window=64, tokens=1024, windowed=0.5, learning_rate=0.02, progress=False)


@pytest.fixture(scope="module")
def codebook() -> AnTKVCodebook:
    options = dict(tokens=512, window=64, samples=400, iterations=2, progress=False, license="mit")
    return calibrate(sharp_llama(), word_tokenizer(), [small_text()], SPEC, **options)


def tuned(codebook, model=None, **changes) -> AnTKVCodebook:
    return finetune(model or sharp_llama(), word_tokenizer(), [small_text()], codebook, **{**SETTINGS, **changes})


def test_finetuning_lowers_the_held_out_loss_and_keeps_the_form(codebook, tmp_path):
    codebook.calibration["sensitivity"] = {"bits": 1.0, "measured": {"mixed": 0.5}}
    model = sharp_llama(attn_implementation="eager").train()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    found = tuned(codebook, model)
    facts = found.calibration["finetune"]
    for name in ("W0", "S16"):
        before, after = facts["loss"][name]
        assert 0 < after < 0.97 * before, name
    assert model.config._attn_implementation == "eager" and model.training
    for i, (name, parameter) in enumerate(model.named_parameters()):
        assert parameter.requires_grad == (i % 2 == 0) and parameter.grad is None
        assert torch.equal(parameter, weights[name])
    assert found.config == codebook.config and found.model == codebook.model and not found.evaluation
    assert facts["steps"] == 12 and facts["windowed"] == 0.5 and facts["sources"] == ["one text"]
    assert found.calibration["license"] == "mit" and "relative_error" not in found.calibration
    assert found.calibration["sensitivity"] == {"bits": 1.0}, "the loss that was measured is of the untuned tables"
    for layer, pair in codebook.tables.items():
        for old, new in zip(pair, found.tables[layer]):
            assert old.tensors().keys() == new.tensors().keys()
            for name, tensor in old.tensors().items():
                other = new.tensors()[name]
                assert other.shape == tensor.shape and other.dtype == tensor.dtype
                assert torch.equal(other, tensor) == (name not in ("centroids", "noise")), name
    factors = [found.tables[i][0].noise / codebook.tables[i][0].noise for i in codebook.tables]
    for factor in factors:  # one for each sub-vector, whose noise keeps its form
        torch.testing.assert_close(factor, factor[..., :1, :1].expand_as(factor))
    found.save_pretrained(tmp_path)
    again = AnTKVCodebook.from_pretrained(tmp_path)
    assert tables_equal(found, again) and again.calibration == json.loads(json.dumps(found.calibration))


def test_resumed_run_gives_the_tables_of_an_uninterrupted_one(codebook, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "SAVE_EVERY", 2)
    options = dict(steps=5, work_dir=tmp_path)
    original, calls = finetuning.kl_gradient, []

    def stopping(logits, target, weight):
        calls.append(weight)
        if sum(weight != 0 for weight in calls) == 4:  # the first step after the second file
            raise KeyboardInterrupt
        return original(logits, target, weight)

    monkeypatch.setattr(finetuning, "kl_gradient", stopping)
    with pytest.raises(KeyboardInterrupt):
        tuned(codebook, **options)
    (path,) = tmp_path.glob("finetune-*.safetensors")
    resumed = tuned(codebook, **options)
    assert sum(weight != 0 for weight in calls) == 4 + 3, "steps 3 to 5 were still to do"
    expected = tuned(codebook, steps=5)
    assert tables_equal(resumed, expected) and not tables_equal(expected, codebook)
    assert resumed.calibration["finetune"]["loss"] == expected.calibration["finetune"]["loss"]
    again = tuned(codebook, micro_batch=1, **options)
    assert list(tmp_path.glob("finetune-*")) == [path] and tables_equal(again, expected), "memory decides nothing"
    assert not tables_equal(tuned(codebook, steps=5, seed=1), expected), "the seed decides"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged .* remove it"):
        tuned(codebook, **options)


def test_loss_that_is_not_finite_is_named(codebook):
    model = sharp_llama()
    model.model.norm.weight[:] = float("inf")
    with pytest.raises(ValueError, match="step 0: the loss is nan in torch.float32: load the model in bfloat16"):
        tuned(codebook, model)


def test_bad_input_is_refused_before_work(codebook, monkeypatch):
    monkeypatch.setattr(finetuning, "kl_gradient", None)
    for changes, message in (
        ({"steps": 0}, "steps=0"),
        ({"batch": 0}, "batch=0"),
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number"),
        ({"windowed": 1.5}, "windowed=1.5 must lie between 0 and 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"window": 16}, "window=16 must be at least 21: 20 tokens stay exact"),
        ({"window": 1, "windowed": 0.0}, "window=1 must be at least 2"),
        ({"tokens": 600}, "tokens=600 are 9 windows of 64, but a batch of 2 and 8 held-out windows need 10"),
        ({"tokens": 4096}, r"has 4,000 tokens \(62 windows of 64\), but its share of 100% needs 4,096"),
    ):
        with pytest.raises(ValueError, match=message):
            tuned(codebook, **changes)
    with pytest.raises(
        ValueError, match="no tables to train in a AnTKVConfig: .* scalar and identity codecs have none"
    ):
        tuned(AnTKVConfig.preset("ott-2bit"))
    with pytest.raises(ValueError, match="num_hidden_layers 2"):
        tuned(codebook, sharp_llama(num_hidden_layers=3))


def test_command_line(tmp_path):
    model, tokenizer, text = sharp_llama(), word_tokenizer(), tmp_path / "text.txt"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text.write_text(small_text(20000), encoding="utf-8")
    small = AnTKVConfig.preset("1bit", key="d8b4", value="d8b4", window=16)
    random_codebook(model, small).save_pretrained(tmp_path / "book")
    command = ["calibrate", str(tmp_path / "model"), str(text), "--device", "cpu", "-o", str(tmp_path / "out")]
    tuning = ["--finetune", "1", "--tokens", "1024", "--finetune-window", "32"]
    tuning += ["--finetune-batch", "2", "--micro-batch", "1", "--finetune-windowed", "0.5", "--finetune-rate", "0.004"]
    given = ["--from", str(tmp_path / "book")]
    runner = CliRunner()
    assert runner.invoke(app, [*command, *tuning, *given]).exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "- finetune: {'steps': 1, 'batch': 2, 'window': 32, 'windowed': 0.5, 'learning_rate': 0.004" in card
    assert set(AnTKVCodebook.from_pretrained(tmp_path / "out").calibration["finetune"]["loss"]) == {"W0", "S16"}
    assert runner.invoke(app, [*command, *given, "--window", "64"]).exit_code == 0
    measured = AnTKVCodebook.from_pretrained(tmp_path / "out")
    assert measured.tables[0][0].noise.shape == (2, 2, 8, 8) and measured.calibration["noise"]["tokens"] == 8 * 64
    for arguments, message in (
        ([*given, "--window", "16"], "windows of 16 tokens lie within the exact window of 16"),
        ([*given, *tuning, "--window", "64"], "leave out --window"),
        ([*given, "--tokens", "99", "--work-dir", "kept"], "leave out --tokens, --work-dir"),
        ([*given, *tuning, "--bits", "2"], "leave out --bits"),
        ([*given, *tuning, "--license", "mit", "--samples", "7"], "leave out --samples, --license"),
        ([*given, *tuning, "--sensitivity", "S128", "--candidate", "1"], "leave out --candidate, --sensitivity"),
        (["--finetune", "1", "--tokens", "9000"], "tokens=9000 are 8 windows of 1024"),
        (["--finetune", "1", "--tokens", "9000"], "or lower --finetune-window"),
        (["--finetune", "1", "--tokens", "9000", "--finetune-batch", "1"], "8 held-out windows need 9"),
        ([*tuning, "--finetune-windowed", "2"], "windowed=2.0 must lie between 0 and 1"),
        ([*given, "--finetune-rate", "0.1"], "--finetune-rate is of fine-tuning: give --finetune STEPS"),
        (["--micro-batch", "1", "--finetune-rate", "0.1"], "--micro-batch is of fine-tuning"),
    ):
        result = runner.invoke(app, [*command, *arguments])
        assert result.exit_code == 1 and message in result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finetuning_on_a_gpu(codebook, dtype):
    before = torch.get_float32_matmul_precision()
    found = tuned(codebook, sharp_llama().to("cuda", dtype))
    assert all(after < start for start, after in found.calibration["finetune"]["loss"].values())
    assert torch.get_float32_matmul_precision() == before
    assert found.tables[0][0].centroids.device.type == "cpu"


def test_warnings_about_a_loss_that_rose_and_noise_that_is_lost(codebook, monkeypatch):
    losses = iter([{"W0": 0.1, "S16": 0.1}, {"W0": 0.09, "S16": 0.2}])
    monkeypatch.setattr(finetuning, "_losses", lambda *_: next(losses))
    with pytest.warns(UserWarning, match="raised the held-out loss of S16 from 0.1 to 0.2 nats"):
        found = tuned(codebook, steps=1)
    with pytest.warns(UserWarning, match="was fine-tuned, and with it the size of its noise"):
        measure_noise(sharp_llama(), word_tokenizer(), [small_text()], found, windows=2, window=64, progress=False)
