"""Codebooks learned from `Statistics`: ours, CQ's and AnTKV's as published, in one format that one cache reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace

import torch
from results import locked

from antkv_hf import AnTKVCodebook, AnTKVConfig
from antkv_hf.calibration.kmeans import weighted_kmeans
from antkv_hf.calibration.metric import CLIP, masked_quantile
from antkv_hf.calibration.noise import unseen_windows, with_noise
from antkv_hf.calibration.tables import learn_tables
from antkv_hf.calibration.work_folder import to_half
from antkv_hf.codecs import VQTables
from antkv_hf.config import AnchorConfig, VQSpec

from .statistics import Statistics, rotaries

NO_ANCHORS = AnchorConfig(score="none", fraction=0.0, sinks=0)
# 1% of the tokens by AnS in float16, no token exact for its place (arXiv 2506.19505); the first ones score highest.
ANTKV_ANCHORS = AnchorConfig(score="anchor_score", fraction=0.01, dtype="float16", sinks=0)
# A choice within chunks of 128 keeps one of the first tokens, where the paper's choice among all tokens keeps them all.
ANTKV_SINKS = replace(ANTKV_ANCHORS, sinks=4)
# (layer, "key" or "value", spec, seed of k-means) -> tables
LearnRole = Callable[[int, str, VQSpec, int], VQTables]


def learned(
    statistics: Statistics, name: str, config: AnTKVConfig, learn: LearnRole, seed: int = 0, noise: bool = False
) -> AnTKVCodebook:
    """Codebook of all layers, kept in the statistics' folder under `name` and learned once; `noise`: with that of its
    keys, as `antkv_hf.calibrate` measures it (where windows are longer than the exact window)."""
    noise = noise and statistics.sizes.window > config.window
    name += "-noise" if noise else ""
    folder = statistics.folder / "learned"
    folder.mkdir(exist_ok=True)
    place = folder / f"{name}-seed{seed}-{statistics.key}"
    with locked(folder / f"{name}-seed{seed}.lock"):
        if place.is_dir():
            return AnTKVCodebook.from_pretrained(place)
        key, value = config.vq_specs()
        tables = {}
        for layer in statistics.layers:
            own_seed = statistics.sizes.seed + seed + 2000 * layer  # as `calibrate` spaces them
            tables[layer] = (learn(layer, "key", key, own_seed), learn(layer, "value", value, own_seed + 1000))
        book = AnTKVCodebook(config, tables, statistics.codebook.model, {"learned": name, "seed": seed})
        if noise:
            sizes = statistics.sizes
            text = unseen_windows(statistics.tokenizer, statistics.mix, sizes.window, statistics.windows, sizes.seed)
            book = with_noise(statistics.model, book, text)
        part = place.with_name(place.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        book.save_pretrained(part)
        part.rename(place)
    return book


def own(
    statistics: Statistics, weighted: bool = True, windows: int | None = None, form: str = "permutation"
) -> LearnRole:
    """Tables as `antkv_hf.calibrate` learns them.

    Args:
        weighted: False gives every sampled token outside X the same weight in k-means.
        windows: how many of the windows the samples come from.
        form: of the keys: ``permutation`` (before RoPE, pairs of channels together, the default), ``dense`` (before
            RoPE in a full basis) or ``rotated`` (after RoPE in a full basis).
    """
    rotary = rotaries(statistics.model)

    def learn(layer: int, role: str, spec: VQSpec, seed: int) -> VQTables:
        x, gradients, exclude = statistics.read((role, f"{role}_grad", "exclude"), layer, windows)
        turn = rotary[layer].to(x.device) if role == "key" and rotary[layer] is not None else None
        if turn is not None and form == "rotated":
            positions = statistics.positions(windows)
            # gradients turn as keys do, but for the scaling, by which they are divided where keys are multiplied
            x, gradients = turn.rotate(x, positions), turn.rotate(gradients, positions)
            gradients[..., : turn.rotary_dim] /= turn.scaling**2
        basis = turn if form == "permutation" else None
        rounds = statistics.sizes.iterations
        return learn_tables(spec, x, gradients, exclude, basis, rounds, seed, weighted=weighted)[0]

    return learn


def contiguous(statistics: Statistics, weights: str | dict[str, str], clip: bool = True) -> LearnRole:
    """Product VQ of neighbouring channels by k-means in plain coordinates, keys before RoPE.

    Args:
        weights: of a token in k-means, or by role: ``one``; ``fisher``, the squared gradient by the sub-vector (CQ,
            arXiv 2405.03917); ``anchor_score`` or ``accumulated_attention`` (AnTKV).
        clip: whether weights are cut at the 99.9th percentile, as ours are; the papers say nothing of that.
    """

    def learn(layer: int, role: str, spec: VQSpec, seed: int) -> VQTables:
        kind = weights if isinstance(weights, str) else weights[role]
        x, gradients = statistics.read((role, f"{role}_grad"), layer)
        heads, n, dim = x.shape
        groups = spec.groups(dim)
        parts = sub_vectors(x, groups)
        if kind == "one":
            w = x.new_ones(heads * groups, n)
        elif kind == "fisher":
            w = sub_vectors(gradients, groups).square().sum(-1)
        else:
            w = statistics.column_weights(kind, layer).repeat_interleave(groups, 0)
        if clip:
            w = w.minimum(masked_quantile(w, torch.ones_like(w, dtype=torch.bool), CLIP).unsqueeze(-1))
        w = w / w.mean(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        centroids = weighted_kmeans(parts, w, spec.centroids, statistics.sizes.iterations, seed)
        return plain_tables(to_half(centroids.unflatten(0, (heads, groups)).unsqueeze(2).cpu()), spec)

    return learn


def plain_tables(centroids: torch.Tensor, spec: VQSpec) -> VQTables:
    """Tables ``(kv_heads, groups, 1, K, sub_dim)`` of neighbouring channels, without mean, basis or metric."""
    heads, groups = centroids.shape[:2]
    dim = groups * spec.sub_dim
    order = torch.arange(dim, dtype=torch.int16).expand(heads, dim).contiguous()
    root = torch.eye(spec.sub_dim, dtype=torch.float16).expand(heads, groups, -1, -1).contiguous()
    tables = VQTables(centroids, torch.zeros(heads, dim, dtype=torch.float16), permutation=order, metric_root=root)
    tables.check(spec, heads, dim)
    return tables


def sub_vectors(x: torch.Tensor, groups: int) -> torch.Tensor:
    """``(kv_heads, n, D)`` -> ``(kv_heads * groups, n, D / groups)``."""
    return x.unflatten(-1, (groups, -1)).permute(0, 2, 1, 3).flatten(0, 1).contiguous()


def table_bytes(codebook: AnTKVCodebook) -> int:
    """Bytes of a codebook's tables; of plain ones, whose basis is no basis, those of the centroids."""
    plain = all(
        t.permutation is not None and torch.equal(t.permutation.long(), torch.arange(t.mean.shape[1]).expand_as(t.mean))
        for pair in codebook.tables.values()
        for t in pair
    )
    if not plain:
        return codebook.tables_bytes()
    return sum(t.centroids.numel() * t.centroids.element_size() for pair in codebook.tables.values() for t in pair)
