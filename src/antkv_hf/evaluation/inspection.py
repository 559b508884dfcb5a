"""What a codebook or saved cache is, whether it fits a model, and what a model could have; reads no weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..attention.backends import select_backend
from ..cache.cache import AnTKVCache
from ..cache.persistence import FORMAT_VERSION, read_cache_file
from ..codebook import AnTKVCodebook, describe_model
from ..codebook_card import measured_table, summary
from ..codecs import LayerCodec
from ..config import BITS_TO_SPEC, OTT, SCALAR_BITS, AnTKVConfig
from ..specs import name_runs

_KINDS = {  # buffer of a saved layer -> name in `MemoryFootprint`
    "key_codes": "codes", "value_codes": "codes", "tail_keys": "window", "tail_values": "window",
    "statistic": "scores", "query_moment": "scores", "offset": "scores", "scales": "codes",
    "anchor_scores": "anchors",
    "keys": "other_layers", "values": "other_layers",
}  # fmt: skip


def inspect_codebook(place: str, model: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """A codebook (folder, or a revision of a Hub repo) as JSON-ready facts; `model`: whether it fits its config.

    Raises:
        FileNotFoundError, ValueError: as `AnTKVCodebook.from_pretrained`; ValueError also if it does not fit.
    """
    codebook = AnTKVCodebook.from_pretrained(place, revision=revision)
    config, facts = codebook.config, codebook.model
    cache = AnTKVCache(model_config(model) if model is not None else codebook.model_config(), codebook=codebook)
    key_bits, value_bits = config.bits(codebook.tables)
    memory = local_shared_memory()
    return {
        "codebook": place,
        "revision": None if Path(place).is_dir() else (codebook.source or {}).get("revision"),
        "sha256": codebook.sha256,
        "fits": model,
        "model": {k: v for k, v in facts.items() if k != "text_config"},
        "layers": sorted(codebook.tables),
        "quantized_layers": len(cache.quantized_layers),
        "config": config.to_dict(),
        "bits": {
            "keys": round(key_bits, 4),
            "values": round(value_bits, 4),
            "with_anchors": round(_bits_with_anchors(config, facts, codebook.tables), 3),
        },
        "gpu_shared_memory": memory,
        "layer_tables": _layer_tables(codebook, cache, memory),
        "table_bytes": codebook.tables_bytes(),
        "backends": _backends(config.backend),
        "calibration": codebook.calibration,
        "evaluation": codebook.evaluation,
    }


def _layer_tables(codebook: AnTKVCodebook, cache: AnTKVCache, memory: int | None) -> list[dict[str, Any]]:
    """Specs, bases and bytes of each layer's tables, and what `fastest_kernels` says of them."""
    plans = {layer.plan.layer_idx: layer.plan for layer in cache.quantized_layers}
    sizes = [codebook.model[name] for name in ("kv_heads", "head_dim", "value_dim")]
    group = codebook.model_config().get_text_config(decoder=True).num_attention_heads // sizes[0]
    known: dict[tuple, tuple[str, int | None]] = {}
    rows = []
    for layer, pair in sorted(codebook.tables.items()):
        row: dict[str, Any] = {"layer": layer, "table_bytes": 0}
        for role, tables, spec in zip(("key", "value"), pair, codebook.config.specs(layer)):
            row[f"{role}_spec"] = str(spec)
            row[f"{role}_basis"] = "dense" if tables.permutation is None else "permutation"
            row["table_bytes"] += sum(t.numel() * t.element_size() for t in tables.tensors().values())
        row["key_noise"] = pair[0].noise is not None
        form = tuple(value for name, value in row.items() if name not in ("layer", "table_bytes"))
        if layer in plans:
            if form not in known:
                known[form] = fastest_kernels(plans[layer].codec(torch.device("cpu"), *sizes), group, memory)
            row["kernels"], row["cuda_shared_memory"] = known[form]
        rows.append(row)
    return rows


def local_shared_memory() -> int | None:
    """Bytes of shared memory a block on this machine's GPU; None without one that kernels in CUDA C++ run on."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    from antkv.cuda_decode import obstacle, shared_memory

    device = torch.device("cuda", torch.cuda.current_device())
    return None if obstacle(device) else shared_memory(device)


def fastest_kernels(codec: LayerCodec, group: int, memory: int | None = None) -> tuple[str, int | None]:
    """The fastest backend that has kernels for a layer's codes and the `group` query heads of a kv head in a 16-bit
    model, on a GPU with `memory` bytes of shared memory a block (None: as many as an H100's), and how many bytes the
    kernel in CUDA C++ needs there (None: it has none, or none that an H100 has room for)."""
    if importlib.util.find_spec("triton") is None:
        return "unknown: Triton is not installed", None
    from antkv.cuda_shape import SHARED_MEMORY, find_shape, shared_bytes

    from ..attention.tables import UnsupportedTables, layer_tables

    try:
        tables = layer_tables(codec, torch.float16)
        shape = find_shape(*tables, group, softcap=False)
    except UnsupportedTables:
        return "none", None
    except ValueError:
        return "triton", None
    needed = shared_bytes(shape._replace(value_copies=1))  # a second copy is left out where it has no room
    return ("cuda" if needed <= (memory or SHARED_MEMORY) else "triton"), needed


def inspect_model(name: str) -> dict[str, Any]:
    """What a model's cache looks like, and the presets it could have; reads only the model's config."""
    text = model_config(name).get_text_config(decoder=True)
    facts = describe_model(text, text.name_or_path or name)
    probe = AnTKVCache(text, AnTKVConfig.preset("identity"))  # says which layers are full attention, or why none is
    layers = len(probe.quantized_layers)
    elements = layers * facts["kv_heads"] * (facts["head_dim"] + facts["value_dim"])  # of a token
    presets = []
    for bits, spec in BITS_TO_SPEC.items():
        row: dict[str, Any] = {"bits": float(bits), "spec": str(spec)}
        try:
            row["table_bytes"] = (
                layers * facts["kv_heads"] * sum(spec.table_bytes(facts[name]) for name in ("head_dim", "value_dim"))
            )
            row["bytes_per_token"] = round(elements * _bits_with_anchors(AnTKVConfig(spec, spec), facts) / 8, 1)
        except ValueError as error:
            row["error"] = str(error)
        presets.append(row)
    free = []
    for name in (f"{OTT}{bits}bit" for bits in SCALAR_BITS):
        config = AnTKVConfig.preset(name)
        size = round(elements * _bits_with_anchors(config, facts) / 8, 1)
        free.append({"preset": name, "spec": f"{config.key}/{config.value}", "bytes_per_token": size})
    return {
        "model": {k: v for k, v in facts.items() if k != "text_config"},
        "quantized_layers": layers,
        "bytes_per_token_16_bit": 2 * elements,
        "presets": presets,
        "without_codebook": free,
    }


def inspect_cache(path: str | Path, model: str | None = None) -> dict[str, Any]:
    """A file of `AnTKVCache.save` as JSON-ready facts; its hash is verified, its codebook is not needed.

    Args:
        model: folder or Hub id of a model, whose sizes must be those of the one that filled it.

    Raises:
        FileNotFoundError, ValueError: as `read_cache_file`; ValueError also if the model has other sizes.
    """
    saved = read_cache_file(path)
    if model is not None:
        try:
            saved.check(model_config(model))
        except ValueError as error:
            raise ValueError(f"{path} does not fit {model}: {error}") from error
    sizes: dict[str, int] = {}
    for name, tensor in saved.tensors.items():
        buffer = name if name == "prompt_ids" else name.split(".")[2]  # layers.<i>.<buffer>[.<field>]
        kind = _KINDS.get(buffer, buffer)
        sizes[kind] = sizes.get(kind, 0) + tensor.numel() * tensor.element_size()
    quantized = [record for record in saved.layers if record["type"] == "AnTKVLayer"]
    return {
        "cache": str(path),
        "format_version": FORMAT_VERSION,
        "library_version": saved.library_version,
        "fits": model,
        "model": {k: v for k, v in saved.model.items() if k != "text_config"},
        "codebook": saved.codebook,
        "config": saved.config.to_dict(),
        "quantized_layers": len(quantized),
        "batch": max(record["batch"] for record in quantized),
        "tokens": max(record["length"] for record in quantized),
        "coded_tokens": max(record.get("coded", 0) for record in quantized),
        "tensor_bytes": sizes,
        "file_bytes": Path(path).stat().st_size,
    }


def format_cache(found: dict[str, Any]) -> str:
    """The result of `inspect_cache` for people."""
    model, book, config = found["model"], found["codebook"], found["config"]
    made = "none needed" if book is None else f"{book['name_or_path'] or 'in memory'}, sha256 {book['sha256'][:12]}"
    tail = found["tokens"] - found["coded_tokens"]
    codec = "specs by layer" if config.get("layer_specs") else f"keys {config['key']}, values {config['value']}"
    lines = [
        f"Cache of {model['base_model']} ({model['model_type']}): {found['quantized_layers']} of "
        f"{model['num_hidden_layers']} layers quantized",
        f"  tokens      {found['batch']} x {found['tokens']:,}: {found['coded_tokens']:,} coded, {tail:,} exact",
        *([f"  fits        {found['fits']}"] if found["fits"] else []),
        f"  codebook    {made}",
        f"  config      {codec}, window {config['window']}",
        "  bytes       " + ", ".join(f"{kind} {size:,}" for kind, size in found["tensor_bytes"].items()),
        f"  file        {found['file_bytes']:,} bytes, hash verified; written by antkv-hf {found['library_version']}",
    ]
    return "\n".join(lines)


def model_config(name: str):
    """The transformers config of a folder, Hub id or the word smollm2."""
    from ..demo_model import WORD, load_demo_model, naming

    if name == WORD:
        return load_demo_model()[0].config
    with naming(name):
        return AutoConfig.from_pretrained(name)


def format_inspection(found: dict[str, Any]) -> str:
    """The result of either function for people."""
    model = found["model"]
    heads = f"{model['kv_heads']} kv heads of size {model['head_dim']}"
    shape = f"{found['quantized_layers']} of {model['num_hidden_layers']} layers, {heads}"
    if "presets" in found:
        lines = [
            f"{model['base_model']} ({model['model_type']}): {shape}",
            f"a 16-bit cache takes {found['bytes_per_token_16_bit']:,} bytes a token; antkv calibrate can make it:",
            "",
            f"{'--bits':>8}  {'spec':<10}{'bytes a token':>14}{'smaller':>9}{'tables':>12}",
        ]
        for row in found["presets"]:
            if "error" in row:
                lines.append(f"{row['bits']:>8g}  {row['spec']:<10}{row['error']}")
                continue
            smaller = found["bytes_per_token_16_bit"] / row["bytes_per_token"]
            size, tables = f"{row['bytes_per_token']:,.0f}", f"{row['table_bytes'] / 1e6:.1f} MB"
            lines.append(f"{row['bits']:>8g}  {row['spec']:<10}{size:>14}{smaller:>8.1f}x{tables:>12}")
        lines += ["", "without a codebook, AnTKVConfig.preset(...):"]
        for row in found["without_codebook"]:
            smaller = found["bytes_per_token_16_bit"] / row["bytes_per_token"]
            lines.append(f"{row['preset']:>9} {row['spec']:<16}{row['bytes_per_token']:>8,.0f}{smaller:>8.1f}x")
        note = "Bytes count codes, 2% int8 anchors and their positions; the exact window comes on top."
        return "\n".join([*lines, "", note])
    config, bits = found["config"], found["bits"]
    anchors, mixed = config["anchors"], config.get("layer_specs")
    form = "before RoPE" if config["rope"] == "pre" else "as they come"
    commit = f" at commit {found['revision']}" if found["revision"] else ""
    lines = [
        f"Codebook of {model['base_model']} ({model['model_type']}): {shape}",
        f"  from        {found['codebook']}{commit}",
        f"  sha256      {found['sha256']}, of the tables",
        *([f"  fits        {found['fits']}"] if found["fits"] else []),
        f"  keys        {'by layer' if mixed else config['key']}, {bits['keys']:g} bits; coded {form}",
        f"  values      {'by layer' if mixed else config['value']}, {bits['values']:g} bits",
        f"  anchors     {anchors['fraction']:.1%} {anchors['dtype']} by {anchors['score']}, {anchors['sinks']} sinks",
        f"  in all      about {bits['with_anchors']:g} bits an element, past the exact window of {config['window']}",
        f"  tables      {found['table_bytes']:,} bytes as stored",
        *(f"              {line}" for line in _layers_alike(found["layer_tables"], found["gpu_shared_memory"])),
        "  backend     " + ", ".join(f"{device}: {name}" for device, name in found["backends"].items()),
    ]
    if config["skip_layers"]:
        lines.append(f"  skipped     layers {', '.join(map(str, config['skip_layers']))}")
    lines.append("calibration" if found["calibration"] else "calibration: not recorded")
    lines += [
        f"  {name.replace('_', ' '):<16}{_plain(summary(name, value))}" for name, value in found["calibration"].items()
    ]
    lines.append("evaluation" if found["evaluation"] else "evaluation: none yet; run antkv evaluate ... --save")
    if found["evaluation"]:
        lines += [f"  {line}" for line in measured_table(found["evaluation"], "text").splitlines()]
    return "\n".join(lines)


def _layers_alike(rows: list[dict[str, Any]], memory: int | None) -> list[str]:
    """One line for all layers with the same specs, bases and bytes; `memory`: of the local GPU."""

    def kernels(row: dict[str, Any]) -> str:
        if "kernels" not in row:
            return ""
        text = f"; kernels: {row['kernels']}"
        if row["cuda_shared_memory"] is None:
            return text
        needed = f"{-(-row['cuda_shared_memory'] // 1024)} KiB of shared memory a block"
        if memory is None:
            return f"{text} (on GPUs with {needed})"
        return text if row["kernels"] == "cuda" else f"{text} (cuda needs {needed}; this GPU has {memory // 1024})"

    alike: dict[tuple, list[int]] = {}
    for row in rows:
        alike.setdefault(tuple({**row, "layer": 0}.items()), []).append(row["layer"])
    lines = []
    for items, layers in alike.items():
        row = dict(items)
        lines.append(
            (f"layer {layers[0]}" if len(layers) == 1 else f"layers {name_runs(layers)}, each")
            + f": keys {row['key_spec']} in a {row['key_basis']} basis"
            + (" with a bias for what codes lose" if row["key_noise"] else "")
            + f", values {row['value_spec']} in a "
            f"{row['value_basis']} basis, {row['table_bytes']:,} bytes" + kernels(row)
        )
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _backends(requested: str) -> dict[str, str]:
    """The backend each kind of device would get, or why it would get none."""
    chosen = {}
    for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        try:
            chosen[kind] = select_backend(requested, torch.device(kind))
        except ValueError as error:
            chosen[kind] = str(error)
    return chosen


def _bits_with_anchors(config: AnTKVConfig, facts: dict[str, Any], layers: Iterable[int] = (-1,)) -> float:
    """Expected bits an element: codes (on average over `layers`; by default those without specs of their own), and
    anchors with scales and positions (sinks are a constant, left out)."""
    from ..anchors import anchors_per_chunk

    key, value = facts["head_dim"], facts["value_dim"]
    pairs = config.layer_codecs(layers).values()
    codes = sum(pair[0].key_bytes(key) + pair[1].value_bytes(value) for pair in pairs) / len(pairs)
    anchor = (key + value + 4 if config.anchors.dtype == "int8" else 2 * (key + value)) + 4
    anchor += 4 if config.anchors.max_tokens else 0  # its score
    bitmap = 1 / 8 if config.anchors.enabled or config.anchors.sinks else 0.0  # which tokens are exact
    share = anchors_per_chunk(config.anchors.fraction, config.chunk) / config.chunk if config.anchors.enabled else 0.0
    return 8 * (codes + bitmap + share * anchor) / (key + value)
