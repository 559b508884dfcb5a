"""`AnTKVCodebook`: the immutable tables of one model, as a folder or Hub repo.

A codebook is ``config.json`` (format, model, specs, hash) and ``codebooks.safetensors`` (tensors named
``layers.<i>.<key|value>.<centroids|mean|permutation|metric_root|synthesis|noise>``), with a generated card.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .codebook_card import card_content, is_repo_id
from .codebook_names import find_codebook, shipped_codebooks
from .codecs import LayerCodec, VectorQuantizer, VQTables
from .config import AnTKVConfig
from .hashing import json_sha256, tensors_sha256
from .hub_files import download
from .rotary import Rotary
from .tensor_parallel import head_shard

# 1: all layers have the specs of the config. 2: there are layer_specs. 3: keys' tables have noise.
_READS = (1, 2, 3)
# fields of a config that say where a model came from, not what it is
_NOT_THE_MODEL = (
    "_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures",
    "quantization_config",
)  # fmt: skip
CONFIG_FILE, TABLES_FILE = "config.json", "codebooks.safetensors"
_CONFIG_FIELDS = {"format_version", "model", "antkv", "layers", "tables", "calibration", "evaluation", "sha256"}


class AnTKVCodebook(ModelHubMixin, library_name="antkv-hf", tags=["kv-cache", "quantization", "antkv"]):
    """Tables of one model, with what is needed to check that they fit it. Immutable.

    Args:
        config: codec specs and the defaults of window and anchors.
        tables: ``{layer index: (key tables, value tables)}`` of the quantized layers.
        model: description of the model: ``base_model``, ``model_type``, ``num_hidden_layers``, ``kv_heads``,
            ``head_dim``, ``value_dim`` and ``text_config`` (the text config's dict).
        calibration: how the tables were learned (texts, tokens, seed, date).
        evaluation: measured rows shown in the card.

    Raises:
        ValueError: if a table does not fit the specs.
    """

    HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")

    def __init__(
        self,
        config: AnTKVConfig,
        tables: dict[int, tuple[VQTables, VQTables]],
        model: dict[str, Any],
        calibration: dict[str, Any] | None = None,
        evaluation: list[dict[str, Any]] | None = None,
    ):
        config.vq_specs()
        for layer, (key, value) in tables.items():
            key_spec, value_spec = config.vq_specs(layer)
            for role, spec, part, dim in (
                ("key", key_spec, key, model["head_dim"]),
                ("value", value_spec, value, model["value_dim"]),
            ):
                try:
                    part.check(spec, model["kv_heads"], dim)
                except ValueError as error:
                    raise ValueError(f"layer {layer}, {role} tables: {error}") from error
            if value.noise is not None:
                raise ValueError(f"layer {layer}, value tables: noise is of keys alone, whose logits it corrects")
        self.config, self.tables, self.model = config, tables, model
        self.calibration, self.evaluation = calibration or {}, evaluation or []
        self.source: dict[str, str | None] | None = None  # name or path, and revision, of one that was loaded
        self._codecs: dict[tuple, LayerCodec] = {}
        self._rotaries: dict[tuple | None, Rotary] = {}

    # ---------------------------------------------------------------- use
    def check(self, text_config, config: AnTKVConfig, layers: list[int]) -> None:
        """Raises ValueError, naming the numbers, if the codebook does not fit this model, config or set of layers."""
        found = describe_model(text_config)
        mine = self.model
        for name in ("model_type", "num_hidden_layers", "kv_heads", "head_dim", "value_dim"):
            if found[name] != mine[name]:
                raise ValueError(
                    f"this codebook was made for {mine['base_model']} ({name} {mine[name]}), but the model has {name} "
                    f"{found[name]}: load the codebook of this model, or make one with `antkv calibrate`"
                )
        for layer in layers:
            (key, value), held = config.specs(layer), self.config.specs(layer)
            if (key, value) != held or config.rope != self.config.rope:
                raise ValueError(
                    f"the config asks for keys {key}, values {value}, rope {config.rope!r} in layer {layer}, but the "
                    f"codebook holds {held[0]}, {held[1]}, {self.config.rope!r}: load a codebook of those bits"
                )
        if missing := [i for i in layers if i not in self.tables]:
            raise ValueError(
                f"the codebook has no tables for layer {missing[0]} (it has {len(self.tables)} layers); "
                f"add the layer to skip_layers or calibrate it"
            )

    def codec_factory(self, config: AnTKVConfig, rotary: list[Rotary | None], device_mesh: Any = None):
        """A function that gives a layer's codec on a device; tables are placed once and shared by all caches.

        A layer that gets a share of its kv heads (tensor parallelism, see `tensor_parallel`) gets their tables.
        """

        def codec(layer: int, device: torch.device, kv_heads: int, key_dim: int, value_dim: int) -> LayerCodec:
            key, value = self.tables[layer]
            key_spec, value_spec = config.vq_specs(layer)
            sizes = (*key.mean.shape, value.mean.shape[1])
            try:
                if sizes[1:] != (key_dim, value_dim):
                    raise ValueError("sizes differ: load the codebook of this model")
                shard = head_shard(kv_heads, sizes[0], device_mesh)
            except ValueError as error:
                raise ValueError(
                    f"layer {layer}: the model gave {kv_heads} kv heads of size {key_dim} (values {value_dim}), the "
                    f"codebook of {self.model['base_model']} has {sizes[0]} of size {sizes[1]} (values {sizes[2]}): "
                    f"{error}"
                ) from error
            turn = rotary[layer] if config.rope == "pre" else None
            form = None if turn is None else (device, tuple(turn.inv_freq.tolist()), turn.interleaved, turn.scaling)
            place = (layer, device, form, shard)
            if place in self._codecs:
                return self._codecs[place]
            # setdefault: of two threads that start at once, both get the tables that the first has placed
            if turn is not None:  # one object, so one angle table, for all layers
                turn = self._rotaries.setdefault(form, turn.to(device))
            if shard is not None:
                key, value = key.map(shard.part), value.map(shard.part)
            made = LayerCodec(VectorQuantizer(key_spec, key, device), VectorQuantizer(value_spec, value, device), turn)
            return self._codecs.setdefault(place, made)

        return codec

    def model_config(self):
        """The transformers config of the model that the tables belong to, rebuilt from the codebook."""
        from transformers import AutoConfig

        return AutoConfig.for_model(**self.model["text_config"])

    def tables_bytes(self) -> int:
        """Bytes of the tables as stored."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the tables, by which a saved cache knows its codebook; independent of where and how it is stored."""
        return tensors_sha256(self._tensors())

    def __deepcopy__(self, memo: dict) -> AnTKVCodebook:
        return self

    # ---------------------------------------------------------------- files
    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"layers.{layer}.{role}.{name}": tensor.contiguous()
            for layer, pair in sorted(self.tables.items())
            for role, tables in zip(("key", "value"), pair)
            for name, tensor in tables.tensors().items()
        }

    def _format_version(self) -> int:
        if any(key.noise is not None for key, _ in self.tables.values()):
            return 3
        return 2 if self.config.layer_specs else 1

    def _save_pretrained(self, save_directory: Path) -> None:
        save_file(self._tensors(), save_directory / TABLES_FILE, metadata={"format": "pt"})
        data = {
            "format_version": self._format_version(),
            "model": self.model,
            "antkv": self.config.to_dict(),
            "layers": sorted(self.tables),
            "tables": {
                "file": TABLES_FILE,
                "sha256": _sha256(save_directory / TABLES_FILE),
                "bytes": (save_directory / TABLES_FILE).stat().st_size,
            },
            "calibration": self.calibration,
            "evaluation": self.evaluation,
        }
        data["sha256"] = json_sha256(data)
        (save_directory / CONFIG_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(save_directory / CONFIG_FILE, save_directory / TABLES_FILE)  # safetensors writes 0600

    def generate_model_card(self, *args: Any, repo_id: str | None = None, **kwargs: Any) -> ModelCard:
        return ModelCard(card_content(self, repo_id))

    def push_to_hub(  # type: ignore[override]  # what a card needs is asked for here
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        license: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        **options: Any,
    ) -> str:
        """Uploads config, tables and a fresh card as one commit; makes the repo if there is none.

        Args:
            base_model: Hub id of the model, if the codebook was calibrated on a folder. license: of these tables, if
                calibration was not told; both are only what the pushed repo says.
            private, token, branch, options: see `huggingface_hub.ModelHubMixin.push_to_hub`.

        Returns:
            URL of the commit.

        Raises:
            ValueError: the base model is no Hub id.
            huggingface_hub.errors.HfHubHTTPError: not logged in, no right to write there, no such branch.
        """
        base_model = base_model or self.model["base_model"]
        if not is_repo_id(base_model):
            raise ValueError(
                f"the base model {base_model!r} of this codebook is no Hub id, so nobody could load the model: "
                'push_to_hub(..., base_model="owner/name")'
            )
        calibration = self.calibration if license is None else {**self.calibration, "license": license}
        model = {**self.model, "base_model": base_model}
        book = AnTKVCodebook(self.config, self.tables, model, calibration, self.evaluation)
        if "/" not in repo_id:  # the card names the repo in full
            repo_id = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
        options.setdefault("commit_message", f"Codebook of {base_model}: {self.config.name_codec(self.tables)}")
        options.setdefault("model_card_kwargs", {"repo_id": repo_id})
        return ModelHubMixin.push_to_hub(book, repo_id, private=private, token=token, branch=branch, **options)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # tables are no keyword arguments
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> AnTKVCodebook:
        """Loads a codebook from a local folder, a Hub repo (offline from the Hub's cache) or by its shipped name.

        Args:
            revision: branch, tag or commit of the repo. ``source["revision"]`` is the commit that was found.
            token, cache_dir, local_files_only, force_download: see `huggingface_hub.hf_hub_download`.

        Raises:
            FileNotFoundError: no such folder, repo or revision, a file of it is missing, or the name of a preset.
            PermissionError: the repo is gated.
            ValueError: see `from_files`.
        """
        model_id = str(name_or_path)
        folder = Path(find_codebook(model_id))
        if folder.is_dir():
            paths = [folder / CONFIG_FILE, folder / TABLES_FILE]
            for path in paths:
                if not path.is_file():
                    raise FileNotFoundError(
                        f"{folder} is no codebook folder: {path.name} is missing. Give a folder that holds "
                        f"{CONFIG_FILE} and {TABLES_FILE}, or make one with `antkv calibrate`"
                    )
        else:
            try:
                paths, revision = download(
                    model_id, (CONFIG_FILE, TABLES_FILE), revision=revision, cache_dir=cache_dir, token=token,
                    force_download=force_download, local_files_only=local_files_only,
                )  # fmt: skip
            except FileNotFoundError as error:
                shipped = ", ".join(shipped_codebooks()) or "none"
                raise FileNotFoundError(
                    f"{error} (there is no folder {folder.absolute()}; codebooks that ship with the package: {shipped})"
                ) from error
        codebook = cls.from_files(*paths)
        if folder.is_dir():  # one that ships with the package is found again by its name, on any machine
            names = {path: name for name, path in shipped_codebooks().items()}
            model_id = names.get(folder.resolve(), str(folder.resolve()))
        codebook.source = {"name_or_path": model_id, "revision": revision}
        return codebook

    @classmethod
    def from_files(cls, config_path: Path, tables_path: Path) -> AnTKVCodebook:
        """Reads and verifies the two files.

        Raises:
            ValueError: unreadable JSON, unknown format_version or field, a size or hash that does not match, tables
                that do not fit their config. Nothing is unpickled.
        """
        try:
            data = json.loads(config_path.read_text(encoding="utf-8"))
            version = data["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{config_path} is not the config.json of a codebook: {error!r}. Download or make it again"
            ) from error
        if version not in _READS:
            raise ValueError(
                f"{config_path}: format_version {version!r} is not known (this antkv-hf reads "
                f"{_READS[0]} to {_READS[-1]}); upgrade antkv-hf or calibrate again"
            )
        if unknown := sorted(set(data) - _CONFIG_FIELDS):
            raise ValueError(f"{config_path}: unknown field {unknown[0]!r}; the file was changed: download it again")
        try:
            expected, size = data["tables"]["sha256"], data["tables"]["bytes"]
            model, config = data["model"], AnTKVConfig.from_dict(data["antkv"])
        except ValueError as error:
            raise ValueError(f"{config_path}: {error}") from error
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{config_path}: a field is missing or of the wrong kind: {error!r}. Download or make it again"
            ) from error
        if (found := tables_path.stat().st_size) != size:
            raise ValueError(
                f"{tables_path} has {found:,} bytes, config.json says {size:,}: the file is truncated or changed; "
                "download it again"
            )
        if (digest := _sha256(tables_path)) != expected:
            raise ValueError(
                f"{tables_path} has sha256 {digest[:12]}..., config.json says {str(expected)[:12]}...: the file was "
                "changed; download it again"
            )
        try:
            tensors = load_file(tables_path)
            grouped: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
            for name, tensor in tensors.items():
                _, layer, role, part = name.split(".")
                grouped.setdefault(int(layer), {}).setdefault(role, {})[part] = tensor
            tables = {i: (VQTables(**g["key"]), VQTables(**g["value"])) for i, g in grouped.items()}
            codebook = cls(config, tables, model, data.get("calibration"), data.get("evaluation"))
        except ValueError as error:
            raise ValueError(f"{tables_path}: {error}") from error
        except (SafetensorError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{tables_path} does not hold the tables of a codebook: {error!r}. Download or make it again"
            ) from error
        if "sha256" in data:  # last, so that whatever else is wrong has been named
            stated = data.pop("sha256")
            if stated != json_sha256(data):
                raise ValueError(
                    f"{config_path} has not the sha256 that it states ({str(stated)[:12]}...): it was changed; "
                    "download it again (defaults can be changed where a cache is made: from_pretrained(..., window=64))"
                )
        return codebook


def describe_model(text_config, base_model: str | None = None) -> dict[str, Any]:
    """What a codebook remembers of its model; `text_config` is a transformers text config."""
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    kept = text_config.to_diff_dict()
    for name in _NOT_THE_MODEL:
        kept.pop(name, None)
    return {
        "base_model": base_model or text_config.name_or_path or text_config.model_type,
        "model_type": text_config.model_type,
        "num_hidden_layers": text_config.num_hidden_layers,
        "kv_heads": _kv_heads(text_config),
        "head_dim": head_dim,
        "value_dim": getattr(text_config, "v_head_dim", None) or head_dim,
        "text_config": {**kept, "model_type": text_config.model_type},
    }


def _kv_heads(text_config) -> int:
    if getattr(text_config, "new_decoder_architecture", False):  # Falcon
        return text_config.num_kv_heads
    if getattr(text_config, "multi_query", False):  # Falcon 7B, GPT-BigCode
        return 1
    return getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_310(file)


def _sha256_310(file) -> str:
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()
