"""A cache as one file: `AnTKVCache.save` and `AnTKVCache.load`.

The file is safetensors: tensors ``layers.<i>.<buffer>`` and ``prompt_ids``; its metadata has ``antkv_cache``, a JSON
text that says what they are, and ``sha256`` of that text and all tensors. One file, because it appears by one rename:
a kill in the middle leaves the old file or none. Nothing is unpickled. The codebook is not in it, only its hash.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel

from ..codebook import AnTKVCodebook, describe_model
from ..config import AnTKVConfig
from ..hashing import tensors_sha256
from ..tensor_parallel import tp_size
from . import interface
from .saved_layers import layer_record, layer_tensors, restore_layer

if TYPE_CHECKING:
    from .cache import AnTKVCache

FORMAT, FORMAT_VERSION = "antkv-cache", 1
_HEADER, _SHA256 = "antkv_cache", "sha256"  # keys of the safetensors metadata
_MODEL_FACTS = (
    "model_type", "num_hidden_layers", "kv_heads", "head_dim", "value_dim", "num_attention_heads", "hidden_size",
    "vocab_size",
)  # fmt: skip
_FIELDS = "{}: a field is missing or of the wrong kind: {!r}. Fill the cache again"


@dataclass(frozen=True)
class CacheFile:
    """What a file of `AnTKVCache.save` holds, read and verified, on the CPU.

    Args:
        config: the cache's config. on_new_prompt: see `AnTKVCache`.
        model: facts of the model, as `describe_model` gives them, with heads, hidden size and vocabulary.
        codebook: ``sha256``, ``name_or_path``, ``revision`` and ``base_model`` of the codebook; None for identity.
        layers: one record a layer, see `saved_layers.layer_record`.
        library_version: the antkv-hf that wrote the file.
        tensors: all tensors by name.
    """

    config: AnTKVConfig
    on_new_prompt: str
    model: dict[str, Any]
    codebook: dict[str, Any] | None
    layers: list[dict[str, Any]]
    library_version: str
    tensors: dict[str, torch.Tensor]

    def layer_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Tensors of one layer by their names within it."""
        prefix = f"layers.{index}."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def check(self, model_config) -> None:
        """Raises ValueError, naming both numbers, if a model has not the sizes of the one that filled the cache."""
        found = _describe(model_config.get_text_config(decoder=True))
        for name in _MODEL_FACTS:
            if self.model[name] != found[name]:
                raise ValueError(
                    f"it was filled by {self.model['base_model']} ({name} {self.model[name]}), but the model has "
                    f"{name} {found[name]}: load it with that model, or fill a new cache"
                )

    def warn_of_dtype(self, model: PreTrainedModel) -> None:
        """Warns if the model's weights have another dtype than the cache: right under autocast, refused at a step else.

        `AnTKVLayer.check` refuses such a step before anything changes; only it knows the dtype of its keys.
        """
        held = next((t.dtype for name, t in self.tensors.items() if name.endswith(".tail_keys")), model.dtype)
        if held != model.dtype:
            warnings.warn(
                f"the cache was filled in {held}, but the model is {model.dtype}: unless it goes on under the autocast "
                f"that the cache was filled under, load the model in {held}, or fill a new cache",
                stacklevel=4,
            )


# -------------------------------------------------------------------- save
def save_cache(cache: AnTKVCache, path: str | Path) -> None:
    """See `AnTKVCache.save`."""
    from .. import __version__

    _check_whole(cache.tp_size, "save")
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file, such as {path / 'cache.safetensors'}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.absolute().parent} to write {path.name} to: make it first")
    records = [layer_record(i, layer) for i, layer in enumerate(cache.layers)]
    tensors = {
        f"layers.{i}.{name}": _own(tensor)
        for i, layer in enumerate(cache.layers)
        for name, tensor in layer_tensors(layer).items()
    }
    if cache._guard.ids is not None:
        tensors["prompt_ids"] = _own(cache._guard.ids)
    book = cache.codebook
    header = json.dumps(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "library_version": __version__,
            "config": cache.antkv_config.to_dict(),
            "on_new_prompt": cache.on_new_prompt,
            "model": _describe(cache._text_config, None if book is None else book.model["base_model"]),
            "codebook": None
            if book is None
            else {
                "sha256": book.sha256,
                "base_model": book.model["base_model"],
                **(book.source or {"name_or_path": None, "revision": None}),
            },
            "layers": records,
        }
    )
    metadata = {"format": "pt", _HEADER: header, _SHA256: tensors_sha256(tensors, header)}
    _write(path, tensors, metadata)


def _check_whole(processes: int, action: str) -> None:
    if processes > 1:
        raise ValueError(
            f"cannot {action} a cache under tensor parallelism: each of {processes} processes holds a share of the kv "
            "heads, and a file holds all of them. Fill and save it with the model on one device, or spread by "
            'device_map="auto"; under tensor parallelism read the prompt again'
        )


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, contiguous, and no part of a larger buffer (which safetensors would refuse)."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes beside `path`, then renames over it once everything is on the disk."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode  # as the user's umask has it; safetensors would write 0600
        save_file(tensors, part, metadata=metadata)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(mode)
        os.replace(part, path)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the rename itself; not every system can open a folder
        folder = os.open(path.absolute().parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# -------------------------------------------------------------------- load
def read_cache_file(path: str | Path) -> CacheFile:
    """Reads and verifies a file of `AnTKVCache.save`; needs neither model nor codebook.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, an unknown format_version, or a hash that does not match.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.absolute()}: give one that AnTKVCache.save wrote")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            header = metadata.get(_HEADER, "null")
            facts = json.loads(header)
            if not isinstance(facts, dict) or facts.get("format") != FORMAT:
                raise ValueError("it was not written by AnTKVCache.save")
            if facts.get("format_version") != FORMAT_VERSION:
                raise ValueError(
                    f"format_version {facts.get('format_version')!r} is not known (this antkv-hf reads "
                    f"{FORMAT_VERSION}): upgrade antkv-hf, or fill the cache again"
                )
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no cache file: {error}. Give one that AnTKVCache.save wrote") from error
    digest, stated = tensors_sha256(tensors, header), str(metadata.get(_SHA256))
    if digest != stated:
        raise ValueError(
            f"{path} has contents of sha256 {digest[:12]}..., but states {stated[:12]}...: it was damaged or changed; "
            "fill the cache again"
        )
    try:
        return CacheFile(
            AnTKVConfig.from_dict(facts["config"]), facts["on_new_prompt"], facts["model"], facts["codebook"],
            facts["layers"], facts["library_version"], tensors,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(_FIELDS.format(path, error)) from error


def load_cache(
    cls: type[AnTKVCache],
    path: str | Path,
    model: PreTrainedModel | None,
    codebook: AnTKVCodebook | str | Path | None,
    device: torch.device | str | None,
) -> AnTKVCache:
    """See `AnTKVCache.load`."""
    if model is not None:
        _check_whole(tp_size(model.config, getattr(model, "_device_mesh", None)), "load")
    saved = read_cache_file(path)
    try:
        book = _find_codebook(saved, codebook)
        if model is not None:
            saved.check(model.config)
            saved.warn_of_dtype(model)
        config = model.config if model is not None else _model_config(saved, book)
        cache = cls(config, saved.config, book, on_new_prompt=saved.on_new_prompt)
        if len(saved.layers) != len(cache.layers):
            raise ValueError(
                f"it holds {len(saved.layers)} layers, but the model has {len(cache.layers)}: load it with the model "
                "that filled it"
            )
        devices = {} if model is None or device is not None else _layer_devices(model)
        default = _device(device) if device is not None else torch.device("cpu") if model is None else model.device
        batches = set()
        for i, (layer, record) in enumerate(zip(cache.layers, saved.layers)):
            tensors = {name: t.to(devices.get(i, default)) for name, t in saved.layer_tensors(i).items()}
            restore_layer(i, layer, record, tensors)
            batches |= {record["batch"]} if tensors else set()  # found to be the layer's by restore_layer
        if len(batches) > 1:
            raise ValueError(f"its layers hold batches of different sizes: {sorted(batches)}; fill the cache again")
        if (ids := saved.tensors.get("prompt_ids")) is not None:
            if ids.ndim != 2 or ids.dtype != torch.int64:
                raise ValueError(
                    f"prompt_ids are {ids.dtype} of shape {tuple(ids.shape)}, not int64 (batch, n): fill it again"
                )
            cache._guard.remember(ids)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(_FIELDS.format(path, error)) from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    if model is not None:
        model.set_attn_implementation(interface.NAME)
    return cache


def _find_codebook(saved: CacheFile, given: AnTKVCodebook | str | Path | None) -> AnTKVCodebook | None:
    """The codebook that the cache was made with: `given`, or where it was loaded from then."""
    wanted = saved.codebook
    if wanted is None:
        return given if isinstance(given, AnTKVCodebook) or given is None else AnTKVCodebook.from_pretrained(given)
    if given is None and wanted["name_or_path"] is None:
        raise ValueError(
            f"its codebook (of {wanted['base_model']}) was never loaded from anywhere, so it cannot be found again: "
            "pass codebook="
        )
    if given is None:
        try:
            book = AnTKVCodebook.from_pretrained(wanted["name_or_path"], revision=wanted["revision"])
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the codebook of the cache is not where it was; pass codebook=. {error}"
            ) from error
    else:
        book = given if isinstance(given, AnTKVCodebook) else AnTKVCodebook.from_pretrained(given)
    if book.sha256 != wanted["sha256"]:
        raise ValueError(
            f"it was made with a codebook of {wanted['base_model']} with sha256 {wanted['sha256'][:12]}..., but "
            f"{(book.source or {}).get('name_or_path') or 'this one'} has {book.sha256[:12]}...: codes mean something "
            "only with their own tables; pass the codebook that made it as codebook="
        )
    return book


def _describe(text_config, base_model: str | None = None) -> dict[str, Any]:
    sizes = {name: getattr(text_config, name, None) for name in ("num_attention_heads", "hidden_size", "vocab_size")}
    return {**describe_model(text_config, base_model), **sizes}


def _model_config(saved: CacheFile, book: AnTKVCodebook | None):
    if book is not None:
        return book.model_config()
    try:
        return AutoConfig.for_model(**saved.model["text_config"])
    except Exception as error:  # transformers' validation raises kinds of its own
        raise ValueError(f"its model's config is not understood ({error}); pass model=") from error


def _device(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is unknown: give cpu, cuda or cuda:<number>") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(name)!r}, but this PyTorch sees {torch.cuda.device_count()} GPUs: give cpu")
    return device


def _layer_devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """Where each attention layer computes, for models spread over devices or offloaded by accelerate."""
    devices: dict[int, torch.device] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or index in devices:
            continue
        # an offloaded layer's parameters are "meta" between its calls; the hook of a child knows where it runs
        hooks = (getattr(child, "_hf_hook", None) for child in module.modules())
        hooked = next((d for h in hooks if (d := getattr(h, "execution_device", None)) is not None), None)
        first = next(module.parameters(), None)
        if hooked is not None:
            devices[index] = torch.device(hooked)
        elif first is not None and first.device.type != "meta":
            devices[index] = first.device
    return devices
