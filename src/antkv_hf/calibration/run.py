"""`calibrate`: from a model and text to a codebook."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..codebook import AnTKVCodebook, describe_model
from ..codecs import VQTables
from ..config import AnTKVConfig, VQSpec, check_config
from ..rotary import Rotary
from ..texts import TextMix, mix_windows
from .checks import check_model, check_sizes, layers_to_learn, weights_digest
from .intercept import frozen_for_statistics
from .noise import unseen_windows, with_noise
from .processes import Processes
from .sensitivity import Mixed, check_spread, measure, measured, search
from .spread import ROLES, Place
from .statistics import LayerStatistics, window_statistics
from .tables import learn_tables
from .work_folder import WorkFolder, check_shared, digest

Wanted = tuple[int, str, VQSpec]  # tables: layer, role, spec


@dataclass(frozen=True)
class _Plan:
    """What a run does, checked before any work starts."""

    described: dict[str, Any]
    rotary: dict[int, Rotary | None]  # by quantized layer
    windows: torch.Tensor  # (count, window)
    kept: torch.Tensor  # positions of the sampled tokens (count, m)

    def disk_bytes(self) -> int:
        d = self.described
        vector = 4 * (d["head_dim"] + d["value_dim"]) + 1  # 2 bytes of data, 2 of gradient; the mask
        return self.kept.numel() * len(self.rotary) * d["kv_heads"] * vector


def calibrate(
    model: PreTrainedModel,
    tokenizer,
    texts: TextMix | Sequence[str],
    config: AnTKVConfig,
    *,
    tokens: int = 262144,
    window: int = 2048,
    seed: int = 0,
    samples: int = 131072,
    work_dir: str | Path | None = None,
    base_model: str | None = None,
    progress: bool = True,
    iterations: int = 10,
    batch_size: int = 1,
    sources: Sequence[str] | None = None,
    license: str | None = None,
    mixed: Mixed | None = None,
) -> AnTKVCodebook:
    """Learns a codebook: tables of every full-attention layer, fitted to the model's own keys, values and gradients.

    One forward and backward pass over `tokens` of text, then weighted k-means layer by layer, on the model's device; in
    the end a forward pass over a few windows measures what the codes of keys lose (`with_noise`), if windows are longer
    than the exact window of `config`.

    Several processes (`accelerate launch` or `torchrun`, each with the whole model on a device of its own) share the
    windows, then the layers (of tables a layer's keys or values), through `work_dir`. Nothing is added up across them,
    so their number changes no table; the kind of device, the number of threads a process has and `batch_size` do, by
    rounding. All must call it, and all return the codebook.

    Peak memory beside the weights is the larger of
        activations of `batch_size` windows (their whole graph) + 2 * batch_size * window * vocabulary elements
        + 3 * heads * 512 * 1024 * 4 bytes, and
        6 * samples * kv_heads * head_dim * 4 bytes + 400 MB (one layer's keys or values, and k-means).
    Disk, in `work_dir`: samples * layers * kv_heads * (4 * (head_dim + value_dim) + 1) bytes, e.g. 6 GB for 131,072
    samples of 30 layers with 3 kv heads of size 64.

    Args:
        model: any causal language model of transformers with full-attention layers; it is left as it was.
        tokenizer: the model's tokenizer.
        texts: plain strings (one domain), or several domains with shares, e.g.
            ``TextMix.from_sources(["wiki.txt=0.5", "code/"])``. Tables only serve the domains that they have seen.
        config: codec specs, rope mode and layers to skip; the rest become the codebook's defaults.
        tokens: tokens to run, a whole number of windows of `window` tokens.
        seed: decides text pieces, sampled tokens and k-means. The same seed gives the same tables on the same device.
        samples: tokens kept for the tables, spread evenly over the windows; at least ``2**code_bits``.
        work_dir: where statistics and finished tables are kept. A run that was stopped goes on from there, and another
            config of the same rope mode and layers reuses the statistics. None: a temporary folder, removed at the end.
            All processes must see it; the first one's counts.
        base_model: Hub id of the model, for the card; the model's own name by default.
        progress: show progress bars (of the first process: its share of the work).
        iterations: rounds of k-means.
        batch_size: windows in a pass.
        sources: what the card says about the texts, instead of their names. license: of the codebook, for its card.
        mixed: spread so many bits over the layers by measured sensitivity, instead of the specs of `config`: tables of
            all candidates are learned, each is tried alone in a forward of each window (layers * 2 * candidates
            forwards a window and protocol), and ``codebook.calibration["sensitivity"]`` says what was found.

    Returns:
        The codebook, with relative errors of keys and values in ``codebook.calibration["relative_error"]``: those of
        the samples themselves. With few samples new text fares worse (twice the error at 16,384), so keep the default.

    Raises:
        ValueError: before any work: too little text, an encoder or a model without full-attention layers, sizes that a
            spec does not divide, `layer_specs` of a layer without tables, fewer samples than centroids, bits or bytes
            that `mixed` cannot keep, a window in which its protocol quantizes nothing, a `work_dir` of other settings,
            too little disk. Later: a loss that is not finite.

    Example:
        >>> codebook = calibrate(model, tokenizer, TextMix.from_sources(["wiki.txt"]), AnTKVConfig.preset("1bit"))
        >>> codebook.save_pretrained("codebooks/my-model-1bit")
    """
    check_config(config)
    mix = TextMix.of(texts)
    for name, number in (("iterations", iterations), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    check_model(model)
    config.vq_specs()  # of the codebook, also where `mixed` replaces them
    rotary = layers_to_learn(model, config)
    described = describe_model(model.config.get_text_config(decoder=True), base_model)
    check_sizes(_wanted(config, mixed, rotary), described, rotary, tokens, window, samples)
    if mixed is not None:
        check_spread(mixed, rotary, described, window, config)
    windows = mix_windows(tokenizer, mix, window, tokens // window, seed)
    plan = _Plan(described, rotary, windows, _sampled_positions(len(windows), window, samples, seed))
    with ExitStack() as stack:
        processes = stack.enter_context(Processes(cpu=model.device.type == "cpu"))
        if work_dir is None and processes.rank == 0:
            work_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="antkv-calibration-"))
        place = Path(processes.agreed(str(work_dir)))
        settings = _settings(model, config, plan, seed)
        learning = {"iterations": iterations, "seed": seed}
        if processes.rank == 0:
            folder = WorkFolder(place, settings, learning)
        processes.wait()
        if processes.rank:
            check_shared(place, processes.rank)
            folder = WorkFolder(place, settings, learning)
        _collect(model, plan, folder, batch_size, progress, processes)
        wanted = _wanted(config, mixed, rotary)
        _learn(wanted, plan, folder, model.device, iterations, seed, progress, processes)
        fresh = None  # windows within the exact window have no coded tokens to measure noise on
        if window > config.window + config.anchors.sinks:
            fresh = unseen_windows(tokenizer, mix, window, len(windows), seed)
        sensitivity = None
        if mixed is not None:
            with frozen_for_statistics(model):
                rows = mixed.rows(windows)
                losses = measure(model, mixed, config, described, rotary, rows, fresh, folder, progress, processes)
            config, sensitivity, uniform = search(losses, mixed, config, described, rows, fresh is not None, folder)
        tables, errors = _tables(config, rotary, folder)
        with frozen_for_statistics(model):
            book = AnTKVCodebook(config, tables, described)
            if fresh is not None:
                book = with_noise(model, book, fresh, progress and processes.rank == 0)
            if mixed is not None and sensitivity is not None:
                sensitivity["measured"] = measured(model, mixed, book, uniform, rows, fresh, folder)
        processes.wait()  # until all have read the tables
    made = {
        "sources": list(sources) if sources is not None else mix.describe(),
        "tokens": windows.numel(),
        "window": window,
        "samples": plan.kept.numel(),
        "seed": seed,
        "iterations": iterations,
        "dtype": str(model.dtype).removeprefix("torch."),
        "relative_error": errors,
        "date": date.today().isoformat(),
        "versions": {"antkv-hf": _version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }
    if sensitivity is not None:
        made["sensitivity"] = sensitivity
    if license is not None:
        made["license"] = license
    if (commit := getattr(model.config, "_commit_hash", None)) is not None:
        made["model_revision"] = commit
    return AnTKVCodebook(config, book.tables, described, calibration=made)


def _settings(model: PreTrainedModel, config: AnTKVConfig, plan: _Plan, seed: int) -> dict[str, Any]:
    """Everything that decides the statistics."""
    return {
        "format": 1,
        "model": digest({k: v for k, v in plan.described.items() if k != "base_model"}),
        "weights": weights_digest(model),
        "dtype": str(model.dtype),
        "layers": sorted(plan.rotary),
        "rope": config.rope,
        "tokens": plan.windows.numel(),
        "window": plan.windows.shape[1],
        "samples": plan.kept.numel(),
        "seed": seed,
        "text": hashlib.sha256(plan.windows.numpy().tobytes()).hexdigest()[:16],
    }


def _sampled_positions(count: int, window: int, samples: int, seed: int) -> torch.Tensor:
    """Sorted random positions to keep in each window ``(count, m)``, m the same for all and count * m >= samples."""
    size = min(window, -(-samples // count))
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, window, generator=generator).topk(size).indices.sort().values


# -------------------------------------------------------------------- work
def _collect(
    model: PreTrainedModel, plan: _Plan, folder: WorkFolder, batch_size: int, progress: bool, processes: Processes
) -> None:
    """Writes a shard for every window that has none yet; together with the other processes."""
    count = len(plan.windows)
    # Whole batches are repeated, so that a window is always computed beside the same others.
    batches = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    missing = [batch for batch in batches if not all(folder.has_window(i) for i in batch)]
    if not missing:
        return
    needed = plan.disk_bytes() * sum(len(batch) for batch in missing) // count
    if needed > (free := shutil.disk_usage(folder.path).free):
        raise ValueError(
            f"the statistics need {needed / 1e9:.1f} GB in {folder.path}, which has {free / 1e9:.1f} GB free: give a "
            "work_dir on a larger disk, or fewer samples"
        )
    processes.wait()  # until all have seen what is missing
    own = processes.share(missing)
    done = 0 if processes.size > 1 else count - sum(len(batch) for batch in missing)
    total = sum(len(batch) for batch in own) + done
    bar = tqdm(total=total, initial=done, desc="statistics", unit="window", disable=not progress or processes.rank > 0)
    with bar, frozen_for_statistics(model):
        for batch in own:
            rows = slice(batch.start, batch.stop)
            found, nll = window_statistics(model, plan.windows[rows], plan.rotary, plan.kept[rows])
            for i, layers in zip(batch, found, strict=True):
                _check_shapes(layers, plan.described)
                folder.save_window(i, layers)
            bar.update(len(batch))
            bar.set_postfix(nll=f"{nll.mean():.3f}")
    processes.wait()


def _check_shapes(layers: dict[int, LayerStatistics], described: dict[str, Any]) -> None:
    """Raises ValueError for a layer of other sizes than the config says, which a codebook cannot hold."""
    expected = (described["kv_heads"], described["head_dim"], described["value_dim"])
    for layer, statistics in layers.items():
        found = (statistics.key.shape[0], statistics.key.shape[2], statistics.value.shape[2])
        if found != expected:
            raise ValueError(
                f"layer {layer} has {found[0]} kv heads of size {found[1]} (values {found[2]}), but the config of the "
                f"model says {expected[0]} of size {expected[1]} (values {expected[2]}): add the layer to skip_layers"
            )


def _wanted(config: AnTKVConfig, mixed: Mixed | None, layers: Iterable[int]) -> list[Wanted]:
    """Tables to learn: layer, role and spec."""
    if mixed is None:
        return [(layer, role, spec) for layer in sorted(layers) for role, spec in zip(ROLES, config.vq_specs(layer))]
    return [(layer, role, spec) for layer in sorted(layers) for spec in mixed.specs for role in ROLES]


def _learn(
    wanted: list[Wanted],
    plan: _Plan,
    folder: WorkFolder,
    device: torch.device,
    iterations: int,
    seed: int,
    progress: bool,
    processes: Processes,
) -> None:
    """Makes the tables that the folder has not; together with the other processes."""
    missing = [item for item in wanted if not folder.has_tables(*item)]
    processes.wait()  # until all have seen what is missing
    places: dict[Place, list[VQSpec]] = {}  # samples are read once for all specs of a place
    for layer, role, spec in missing:
        places.setdefault((layer, role), []).append(spec)
    own = processes.share(list(places.items()))
    total = sum(len(specs) for _, specs in own)
    with tqdm(total=total, desc="tables", disable=not (progress and own) or processes.rank > 0) as bar:
        for (layer, role), specs in own:
            x, gradients, exclude = folder.read((role, f"{role}_grad", "exclude"), layer, len(plan.windows), device)
            rotary = plan.rotary[layer] if role == "key" else None
            # Distinct seeds: stages of a table add up to 1,000, layers and roles step over them.
            own_seed = seed + 2000 * layer + (1000 if role == "value" else 0)
            for spec in specs:
                tables, error = learn_tables(spec, x, gradients, exclude, rotary, iterations, own_seed)
                folder.save_tables(layer, role, spec, tables, error)
                bar.update()
                bar.set_postfix({f"{role}_error": f"{error:.3f}"})
    processes.wait()


def _tables(
    config: AnTKVConfig, layers: Iterable[int], folder: WorkFolder
) -> tuple[dict[int, tuple[VQTables, VQTables]], dict[str, float]]:
    """Tables by layer, and the mean relative errors of keys and values."""
    tables: dict[int, tuple[VQTables, VQTables]] = {}
    errors = []
    for layer in sorted(layers):
        (key, key_error), (value, value_error) = (
            folder.read_tables(layer, role, spec) for role, spec in zip(ROLES, config.vq_specs(layer))
        )
        tables[layer] = (key, value)
        errors.append((key_error, value_error))
    means = torch.tensor(errors).mean(0).tolist()
    return tables, {"key": round(means[0], 4), "value": round(means[1], 4)}


def _version() -> str:
    from .. import __version__  # the package imports this module lazily

    return __version__
