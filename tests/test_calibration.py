"""Calibration: statistics against hooks and eager maps, k-means, bases, tables, resuming, and every refusal."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_llama
from helpers import random_tables
from test_texts import word_tokenizer, words
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, MistralConfig, MistralForCausalLM

from antkv_hf import AnTKVCodebook, AnTKVConfig, VQSpec, calibrate
from antkv_hf.cache.model_rotary import model_rotary
from antkv_hf.calibration import kmeans, run
from antkv_hf.calibration.basis import balanced_order, dense_synthesis, pair_permutation, weighted_moments
from antkv_hf.calibration.intercept import NAME, anchor_score, frozen_for_statistics, recording
from antkv_hf.calibration.kmeans import cell_sums, residual_kmeans, weighted_kmeans
from antkv_hf.calibration.metric import gradient_metric, masked_quantile, metric_roots, token_weights
from antkv_hf.calibration.statistics import nll_gradient, top_tokens, window_statistics
from antkv_hf.calibration.tables import learn_tables
from antkv_hf.codecs import VectorQuantizer, VQTables
from antkv_hf.reference.attention import Visibility
from antkv_hf.reference.vq import gather_centroids, nearest_centroid
from antkv_hf.rotary import Rotary

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are so small that several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_llama(**changes):
    return tiny_llama(**{"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, **changes})


def small_text(count: int = 4000, seed: int = 0) -> str:
    """Words in which one predicts the next, so that gradients are not mere noise."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (count,), generator=generator).cumsum(0)
    return " ".join(f"w{2 + int(i) % 90}" for i in steps)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def structured(heads: int, n: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Vectors around 40 centers in a skewed basis; the world is the same for all seeds, the draw is not."""
    centers = noise(heads, 40, dim, seed=99) * torch.linspace(3, 0.2, dim)
    which = torch.randint(0, 40, (heads, n), generator=torch.Generator().manual_seed(seed))
    x = gather_centroids(centers, which) + 0.2 * noise(heads, n, dim, seed=seed + 1)
    return x @ torch.linalg.qr(noise(dim, dim, seed=98))[0] + 0.5


def tables_equal(a: AnTKVCodebook, b: AnTKVCodebook) -> bool:
    x, y = a._tensors(), b._tensors()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


# -------------------------------------------------------------------- statistics
@pytest.mark.parametrize("changes", [{}, {"rope_parameters": YARN}], ids=["llama", "yarn"])
def test_statistics_equal_what_hooks_see(changes):
    model = small_llama(**changes)
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, inputs, output):
            output.requires_grad_() if output.is_leaf else output.retain_grad()
            seen[name] = output

        return hook

    hooks = [
        getattr(layer.self_attn, f"{role}_proj").register_forward_hook(keep(f"{i}.{role}"))
        for i, layer in enumerate(model.model.layers)
        for role in "kv"
    ]
    logits = model(ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    for hook in hooks:
        hook.remove()

    def heads(x):
        return x.unflatten(-1, (2, -1)).transpose(1, 2)

    rotary = dict(enumerate(model_rotary(model.config)))
    with frozen_for_statistics(model):
        found, nll = window_statistics(model, ids, rotary, torch.arange(40).expand(2, -1))
    torch.testing.assert_close(nll.sum() * 39, loss.detach(), rtol=1e-5, atol=1e-4)
    for window in range(2):
        for layer in range(2):
            got = found[window][layer]
            for name, role in (("key", "k"), ("value", "v")):
                expected = seen[f"{layer}.{role}"]
                scale = expected.grad.abs().max()
                assert scale > 0
                torch.testing.assert_close(getattr(got, name), heads(expected.detach())[window], atol=1e-4, rtol=1e-4)
                gradient = getattr(got, f"{name}_grad") / scale
                torch.testing.assert_close(gradient, heads(expected.grad)[window] / scale, atol=1e-4, rtol=1e-4)


def test_anchor_score_equals_eager_attention_maps():
    model = small_llama()
    ids = torch.randint(3, 100, (2, 70), generator=torch.Generator().manual_seed(1))
    with frozen_for_statistics(model), recording([0, 1]) as recorder:
        model(ids, use_cache=False)
    eager = small_llama(attn_implementation="eager")
    states = {}
    for i, layer in enumerate(eager.model.layers):
        for role in "qv":
            projection = getattr(layer.self_attn, f"{role}_proj")
            projection.register_forward_hook(lambda m, x, y, name=(i, role): states.__setitem__(name, y))
    maps = eager(ids, use_cache=False, output_attentions=True).attentions
    for i in range(2):
        q = states[i, "q"].unflatten(-1, (4, 16)).transpose(1, 2)
        v = states[i, "v"].unflatten(-1, (2, 16)).transpose(1, 2).repeat_interleave(2, 1)
        distance = (v.unsqueeze(2) - (maps[i] @ v).unsqueeze(3)).norm(dim=-1)  # (batch, head, query, key)
        terms = maps[i] * distance * q.norm(dim=-1, keepdim=True)
        expected = terms.sum(2).unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(recorder.seen[i].anchor_score, expected, atol=1e-4, rtol=1e-3)


def test_anchor_score_with_softcap_and_sink_logits():
    q, k, v = noise(1, 4, 33, 8), noise(1, 2, 33, 8, seed=1), noise(1, 2, 33, 8, seed=2)
    sink = noise(4, seed=3)
    found = anchor_score(q, k, v, Visibility(None, True, 33, 33), 0.3, 5.0, sink)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    logits = 5 * torch.tanh(0.3 * q @ k.mT / 5)
    logits = logits.masked_fill(~torch.ones(33, 33, dtype=torch.bool).tril(), float("-inf"))
    probs = torch.cat([logits, sink.view(1, 4, 1, 1).expand(1, 4, 33, 1)], -1).softmax(-1)[..., :33]
    distance = (v.unsqueeze(2) - (probs @ v).unsqueeze(3)).norm(dim=-1)
    expected = (probs * distance * q.norm(dim=-1, keepdim=True)).sum(2).unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_nll_gradient_equals_autograd(monkeypatch):
    monkeypatch.setattr("antkv_hf.calibration.statistics._LOGIT_ROWS", 4)
    logits, ids = noise(2, 11, 30).requires_grad_(), torch.randint(0, 30, (2, 11))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    nll, gradient = nll_gradient(logits.detach(), ids)
    torch.testing.assert_close(gradient, logits.grad)
    torch.testing.assert_close(nll.sum() * 10, loss.detach())


def test_model_is_left_as_it_was_also_on_error():
    model = small_llama(attn_implementation="eager").train()
    model.model.layers[1].eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    with pytest.raises(RuntimeError, match="stop"), frozen_for_statistics(model):
        assert model.config._attn_implementation == NAME and not model.training
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "eager" and model.training and not model.model.layers[1].training
    assert [p.requires_grad for p in model.parameters()] == [i % 2 == 0 for i in range(len(list(model.parameters())))]


# -------------------------------------------------------------------- metric
def test_metric_clips_excludes_and_regularises():
    gradients, exclude = noise(2, 5000, 4), torch.zeros(2, 5000, dtype=torch.bool)
    clean = gradient_metric(gradients, exclude)
    torch.testing.assert_close(clean, 1.01 * torch.eye(4).double().expand(2, 4, 4), atol=0.1, rtol=0)
    gradients[:, 0], gradients[:, 1], exclude[:, 1] = 1e4, 1e6, True
    torch.testing.assert_close(gradient_metric(gradients, exclude), clean, atol=0.05, rtol=0)
    root, inverse = metric_roots(clean)
    torch.testing.assert_close(root @ root, clean)
    torch.testing.assert_close(root @ inverse, torch.eye(4).double().expand(2, 4, 4))


def test_token_weights_clip_exclude_and_soften():
    gradients, exclude = noise(1, 2000, 4), torch.zeros(1, 2000, dtype=torch.bool)
    gradients[0, 7], exclude[0, 3] = 1e3, True
    eye = torch.eye(4).double().expand(1, 4, 4)
    weights, soft = (token_weights(gradients, eye, exclude, power) for power in (1.0, 0.5))
    assert weights[0, 3] == 0 and weights[0, 7] == weights.max() < 10
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    torch.testing.assert_close((soft / soft.max()).square(), weights / weights.max(), atol=1e-5, rtol=1e-5)


def test_vanishing_gradients_give_identity_and_unit_weights():
    gradients, exclude = torch.zeros(1, 50, 4), torch.zeros(1, 50, dtype=torch.bool)
    exclude[0, 5] = True
    assert torch.equal(gradient_metric(gradients, exclude)[0], torch.eye(4).double())
    weights = token_weights(gradients, torch.eye(4).double().expand(1, 4, 4), exclude)
    assert torch.equal(weights, (~exclude).float())


def test_masked_quantile_and_top_tokens():
    x = torch.arange(101.0).flip(0).expand(2, -1)
    mask = torch.ones(2, 101, dtype=torch.bool)
    mask[1, :50] = False  # leaves 50 .. 0
    assert masked_quantile(x, mask, 0.9).tolist() == [90, 45]
    assert masked_quantile(x, ~mask, 0.5).tolist()[0] == 0
    assert top_tokens(x, 0.02).sum(-1).tolist() == [2, 2] and top_tokens(x, 0.0).nonzero().tolist() == [[0, 0], [1, 0]]


# -------------------------------------------------------------------- k-means
def weighted_error(x, weights, centroids) -> torch.Tensor:
    left = x - gather_centroids(centroids, nearest_centroid(x, centroids))
    return (left.square().sum(-1) * weights).sum(-1)


def test_kmeans_lowers_the_weighted_error():
    x, weights = noise(3, 1000, 4), noise(3, 1000, seed=1).exp()
    errors = torch.stack([weighted_error(x, weights, weighted_kmeans(x, weights, 16, n)) for n in range(8)])
    assert (errors.diff(dim=0) <= 1e-3 * errors[0]).all() and (errors[-1] < 0.8 * errors[0]).all()


@pytest.mark.parametrize("sums_of", [cell_sums, kmeans._cell_sums_by_product])
def test_kmeans_centroids_are_weighted_means(sums_of, monkeypatch):
    monkeypatch.setattr(kmeans, "_ONE_HOT", 2 * 8 * 70)
    x, weights = noise(2, 500, 3), noise(2, 500, seed=1).exp()
    codes = torch.randint(0, 7, (2, 500))
    sums, totals = sums_of(x, weights, codes, 8)
    for table in range(2):
        for k in range(8):
            inside = codes[table] == k
            torch.testing.assert_close(sums[table, k], (x[table] * weights[table, :, None])[inside].sum(0))
            torch.testing.assert_close(totals[table, k], weights[table, inside].sum())


def test_kmeans_seeds_empty_cells_again():
    # 600 copies of one point and 40 others: nearly all starts coincide, so nearly all cells start empty
    x = torch.cat([torch.zeros(1, 600, 2), 10 * noise(1, 40, 2)], 1)
    weights = torch.ones(1, 640)
    centroids = weighted_kmeans(x, weights, 41, 30)
    assert len(centroids[0].unique(dim=0)) >= 38
    assert weighted_error(x, weights, centroids) < 0.05 * weighted_error(x, weights, weighted_kmeans(x, weights, 41, 0))


def test_kmeans_ignores_tokens_without_weight():
    x, weights = noise(1, 300, 2), torch.ones(1, 300)
    x[0, :100], weights[0, :100] = 1000.0, 0.0
    assert weighted_kmeans(x, weights, 32, 5).abs().max() < 10


def test_kmeans_by_seed():
    x, weights = noise(2, 500, 4), torch.ones(2, 500)
    first, again, other = (weighted_kmeans(x, weights, 16, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_kmeans_needs_enough_samples():
    with pytest.raises(ValueError, match="256 centroids need at least 256 samples, got 100"):
        weighted_kmeans(noise(1, 100, 2), torch.ones(1, 100), 256)


def test_residual_stages_lower_the_error_and_see_rounded_centroids():
    x, weights = structured(2, 800, 4), torch.ones(2, 800)
    coarse = []

    def rounded(centroids):
        coarse.append((centroids * 4).round() / 4)
        return coarse[-1]

    centroids, left = residual_kmeans(x, weights, 16, 3, 6, 0, rounded)
    assert torch.equal(centroids, torch.stack(coarse, 1)) and centroids.shape == (2, 3, 16, 4)
    _, left_of_one = residual_kmeans(x, weights, 16, 1, 6)
    assert left.square().sum() < 0.5 * left_of_one.square().sum()


# -------------------------------------------------------------------- bases
def covariance_of(x: torch.Tensor) -> torch.Tensor:
    return weighted_moments(x, torch.ones(x.shape[:2]))[1]


def test_balanced_order_evens_out_sums():
    logs = torch.tensor([[9.0, 1, 2, 8, 3, 7, 4, 6]])
    order = balanced_order(logs, 4)
    assert sorted(order[0].tolist()) == list(range(8))
    sums = logs[0, order[0]].view(4, 2).sum(-1)
    assert sums.max() - sums.min() <= 1


def test_dense_basis_is_orthonormal_in_the_metric_and_has_unit_variance():
    x = structured(2, 4000, 8)
    metric = gradient_metric(noise(2, 4000, 8) @ noise(8, 8, seed=5), torch.zeros(2, 4000, dtype=torch.bool))
    root, inverse = metric_roots(metric)
    synthesis = dense_synthesis(covariance_of(x), root, inverse, 4)
    gram = synthesis @ metric @ synthesis.mT  # |x|_M^2 = scale^2 |y|^2
    torch.testing.assert_close(gram, gram[:, :1, :1] * torch.eye(8).double())
    latent = (x - x.mean(1, keepdim=True)).double() @ torch.linalg.inv(synthesis)
    covariance = latent.mT @ latent / 4000
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal.mean(-1), torch.ones(2).double(), atol=1e-3, rtol=0)
    assert (covariance - torch.diag_embed(diagonal)).abs().max() < 1e-3


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sub_dim", [2, 4, 8])
def test_pair_permutation_keeps_pairs_and_lowers_the_cost(interleaved, sub_dim):
    dim, groups = 16, 16 // sub_dim
    pairs = Rotary(torch.ones(6), interleaved).channel_pairs(dim)  # partial RoPE: channels 12 to 15 pass
    x = structured(3, 2000, dim)
    covariance, metric = covariance_of(x), covariance_of(noise(3, 2000, dim) @ noise(dim, dim, seed=7))
    permutation = pair_permutation(covariance, metric, pairs, groups)
    assert (permutation.sort(-1).values == torch.arange(dim)).all()
    partner = torch.empty(dim, dtype=torch.int64)
    partner[pairs[:, 0]], partner[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    for row in permutation.view(3 * groups, sub_dim).tolist():
        assert {int(partner[i]) for i in row} == set(row)

    def cost(order: torch.Tensor) -> torch.Tensor:
        out = []
        for head in range(3):
            channels = order[head].view(groups, sub_dim)
            blocks = [torch.linalg.det(m[head][c][:, c]) for m in (covariance, metric) for c in channels]
            out.append((torch.stack(blocks).view(2, groups).prod(0) ** (1 / sub_dim)).sum())
        return torch.stack(out)

    logs = (covariance.diagonal(dim1=-2, dim2=-1) * metric.diagonal(dim1=-2, dim2=-1)).log()
    start = pairs[balanced_order(logs[:, pairs].sum(-1), groups)].flatten(1)
    assert (cost(permutation) <= cost(start) * (1 + 1e-9)).all()
    # no single swap is better
    best = cost(permutation)
    members = permutation.view(3, -1, 2)
    for a in range(dim // 2):
        for b in range(a):
            swapped = members.clone()
            swapped[:, [a, b]] = members[:, [b, a]]
            assert (cost(swapped.view(3, dim)) >= best * (1 - 1e-5)).all()


# -------------------------------------------------------------------- tables
@pytest.mark.parametrize("rotary", [None, Rotary(torch.ones(8))], ids=["dense", "pairs"])
@pytest.mark.parametrize("spec", ["d8b4", "d8b8", "d2b4", "d4b6", "d16b4s2", "d16b8s3", "d16b10", "d16b12"])
def test_learned_tables_beat_random_ones_on_new_data(spec, rotary):
    spec = VQSpec.parse(spec)
    n = max(3000, spec.centroids + 500)
    x, new = structured(2, n, 16), structured(2, 500, 16, seed=10)
    exclude = torch.zeros(2, n, dtype=torch.bool)
    tables, error = learn_tables(spec, x, noise(2, n, 16, seed=3), exclude, rotary, iterations=4)
    assert tables.centroids.dtype == torch.float16 and (tables.permutation is None) == (rotary is None)
    wild = random_tables(spec, 2, 16, dense=rotary is None)
    wild = VQTables(**{**wild.tensors(), "mean": x.mean(1)})

    def relative(t: VQTables) -> float:
        codec = VectorQuantizer(spec, t)
        left = new - codec.decode(codec.encode(new.unsqueeze(0)))[0]
        return float(left.square().sum() / (new - x.mean(1, keepdim=True)).square().sum())

    assert 0 <= error < 1 and relative(tables) < 0.9 * relative(wild)


@pytest.mark.parametrize("rotary", [None, Rotary(torch.ones(4))], ids=["dense", "pairs"])
def test_tables_reproduce_vectors_whose_codes_are_exact(rotary):
    x = structured(2, 16, 8).repeat(1, 30, 1)  # 16 different vectors, 16 centroids
    tables, error = learn_tables(
        VQSpec(8, 4), x, noise(2, 480, 8), torch.zeros(2, 480, dtype=torch.bool), rotary, iterations=30
    )
    codec = VectorQuantizer(VQSpec(8, 4), tables)
    assert error < 1e-5
    torch.testing.assert_close(codec.decode(codec.encode(x.unsqueeze(0)))[0], x, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("rotary", [None, Rotary(torch.ones(4))], ids=["dense", "pairs"])
def test_tables_of_degenerate_data_are_finite(rotary):
    n, exclude = 64, torch.zeros(1, 64, dtype=torch.bool)
    for x in (torch.zeros(1, n, 8), torch.full((1, n, 8), 3.0), 1e-6 * noise(1, n, 8), 1e3 * noise(1, n, 8)):
        tables, _ = learn_tables(VQSpec(4, 4), x, torch.zeros(1, n, 8), exclude, rotary, iterations=2)
        codec = VectorQuantizer(VQSpec(4, 4), tables)
        assert torch.isfinite(codec.decode(codec.encode(x.unsqueeze(0)))).all()


# -------------------------------------------------------------------- calibrate
SETTINGS = dict(tokens=512, window=64, samples=400, iterations=3, progress=False)
SPEC = AnTKVConfig(key=VQSpec(4, 4), value=VQSpec(8, 6))


def calibrated(model=None, config: AnTKVConfig = SPEC, **changes) -> AnTKVCodebook:
    return calibrate(model or small_llama(), word_tokenizer(), [small_text()], config, **{**SETTINGS, **changes})


@pytest.mark.parametrize(
    "config",
    [
        AnTKVConfig.preset("1bit", key="d16b4s2"),
        AnTKVConfig.preset("1bit", key="d4b6", value="d16b6", rope="none"),
        AnTKVConfig.preset("1bit", key="d8b4", value="d8b4", skip_layers=(0,)),
    ],
    ids=["residual", "rope none", "skip"],
)
def test_calibrate_gives_a_codebook_that_saves_and_loads(tmp_path, config):
    model = small_llama()
    codebook = calibrated(model, config, license="apache-2.0", base_model="org/tiny")
    assert set(codebook.tables) == {0, 1} - set(config.skip_layers)
    for key, value in codebook.tables.values():
        assert (key.permutation is not None) == (config.rope == "pre") and value.synthesis is not None
    made = codebook.calibration
    assert made["tokens"] == 512 and made["samples"] == 400 and made["license"] == "apache-2.0"
    assert 0 < made["relative_error"]["key"] < 1 and made["sources"] == ["one text"]
    codebook.save_pretrained(tmp_path)
    again = AnTKVCodebook.from_pretrained(tmp_path)
    assert tables_equal(codebook, again) and again.calibration == json.loads(json.dumps(made))
    codebook.check(model.config, config, sorted(codebook.tables))
    assert codebook.model["base_model"] == "org/tiny"


def test_calibrate_is_decided_by_its_seed():
    first, again, other = calibrated(), calibrated(), calibrated(seed=1)
    assert tables_equal(first, again) and not tables_equal(first, other)


def test_codes_of_new_text_are_better_than_random():
    model = small_llama()
    codebook = calibrated(model, tokens=2048, samples=2048)
    ids = word_tokenizer()(small_text(100, seed=9), return_tensors="pt")["input_ids"]
    states = {}
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda m, x, y: states.__setitem__("key", y))
    model(ids)
    key = states["key"].unflatten(-1, (2, 16)).transpose(1, 2)
    left = {}
    for name, tables in (("learned", codebook.tables[1][0]), ("random", random_tables(SPEC.key, 2, 16, dense=False))):
        codec = VectorQuantizer(SPEC.key, tables)
        left[name] = (key - codec.decode(codec.encode(key))).square().mean()
    assert left["learned"] < 0.5 * left["random"]


@pytest.mark.parametrize("where", ["window", "tables"])
def test_resumed_run_gives_the_tables_of_an_uninterrupted_one(tmp_path, monkeypatch, where):
    expected = calibrated(batch_size=2)
    name = {"window": "window_statistics", "tables": "learn_tables"}[where]
    original, calls = getattr(run, name), []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(run, name, stopping)
    with pytest.raises(KeyboardInterrupt):
        calibrated(batch_size=2, work_dir=tmp_path)
    (tmp_path / "windows" / "000001.safetensors").write_bytes(b"cut off")  # a damaged shard is made again
    resumed = calibrated(batch_size=2, work_dir=tmp_path)
    assert tables_equal(resumed, expected)
    assert len(calls) < 7  # 4 batches, 4 tables: some were kept
    calls.clear()
    assert tables_equal(calibrated(batch_size=2, work_dir=tmp_path), expected) and not calls


def test_other_specs_reuse_the_statistics(tmp_path, monkeypatch):
    calibrated(work_dir=tmp_path)
    monkeypatch.setattr(run, "window_statistics", None)
    other = AnTKVConfig(key=VQSpec(8, 4), value=VQSpec(8, 4))
    reused = calibrated(config=other, work_dir=tmp_path)
    monkeypatch.undo()
    assert tables_equal(reused, calibrated(config=other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed 0, this one has 1|text"),
        ({"samples": 200}, "samples 400, this one has 200"),
        ({"tokens": 448}, "samples|tokens 512, this one has 448"),
        ({"config": SPEC.replace(rope="none")}, "rope 'pre', this one has 'none'"),
        ({"config": SPEC.replace(skip_layers=(1,))}, r"layers \[0, 1\], this one has \[0\]"),
    ],
)
def test_work_dir_of_other_settings_is_refused(tmp_path, changes, message):
    calibrated(work_dir=tmp_path)
    with pytest.raises(ValueError, match=message):
        calibrated(**changes, work_dir=tmp_path)


def test_work_dir_of_other_weights_is_refused(tmp_path):
    calibrated(work_dir=tmp_path)
    model = small_llama()
    model.model.norm.weight[0] += 1
    with pytest.raises(ValueError, match="with weights"):
        calibrated(model, work_dir=tmp_path)


def test_damaged_manifest_and_full_disk_are_refused(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        calibrated(work_dir=tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(ValueError, match="GB free"):
        calibrated()


def test_bad_input_is_refused_before_work(monkeypatch):
    monkeypatch.setattr(run, "window_statistics", None)
    llama, tokenizer = small_llama(), word_tokenizer()
    for changes, message in (
        ({"tokens": 63}, "tokens=63 is less than one window of 64"),
        ({"tokens": 8192}, r"has 4,000 tokens \(62 windows of 64\), but its share of 100% needs 8,192"),
        ({"samples": 63}, "63 samples .* are fewer than the 64 centroids of the value spec d8b6"),
        ({"window": 1}, "window=1"),
        ({"iterations": 0}, "iterations=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"config": AnTKVConfig.preset("0.5bit", key="d32b8")}, "head_dim 16 is not a multiple of sub_dim 32"),
        ({"config": AnTKVConfig(key=VQSpec(1, 4), value=VQSpec(8, 4))}, "odd sub_dim 1"),
        ({"config": AnTKVConfig.preset("identity")}, "identity codec"),
        ({"config": SPEC.replace(skip_layers=(0, 1))}, r"no layer to calibrate among its 2 \(\{'DynamicLayer': 2\}"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrated(llama, **changes)
    with pytest.raises(ValueError, match="texts are empty"):
        calibrate(llama, tokenizer, [], SPEC)
    sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(ValueError, match="BertForMaskedLM does not generate text"):
        calibrated(BertForMaskedLM(BertConfig(**sizes)))
    mistral = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=32))
    with pytest.raises(ValueError, match="MistralForCausalLM has no layer to calibrate among its 2"):
        calibrated(mistral)


def test_plain_words_are_known():  # the tokenizer of these tests maps word i to token i
    assert word_tokenizer()(words(2, 5))["input_ids"] == [2, 3, 4]
