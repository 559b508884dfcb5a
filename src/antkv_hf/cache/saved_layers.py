"""Each kind of cache layer as tensors and a JSON record, and back.

Beside quantized layers, those that transformers keeps for hybrids and skipped layers are saved where they hold plain
keys and values. Kinds that keep other state (linear attention) are refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..storage_check import check_tail
from .layer import AnTKVLayer


def layer_record(index: int, layer: Any) -> dict[str, Any]:
    """JSON-ready facts of a layer: ``type``, ``length`` (0: empty), ``batch`` and what its kind needs besides.

    Raises:
        ValueError: for a kind of layer that cannot be saved.
    """
    name = type(layer).__name__
    record: dict[str, Any] = {"type": name, "length": 0, "batch": 0}
    if isinstance(layer, AnTKVLayer):
        record["record_past"] = layer.record_past
        if layer.storage is not None:
            record |= {"length": layer.storage.length, "batch": layer.batch_size, "coded": layer.storage.coded_length}
    elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        if layer_tensors(layer):
            # transformers 5.17 counts in a tensor once a sliding layer was cropped
            record |= {"length": int(layer.get_seq_length()), "batch": layer.keys.shape[0]}
        if type(layer) is DynamicSlidingWindowLayer:
            record |= {"sliding_window": layer.sliding_window, "record_past": layer.record_past}
    elif name != "DummyLayer":  # one without attention, or that reads another layer's keys: nothing to save
        raise ValueError(
            f"layer {index} is a {name}, whose state cannot be saved (AnTKVLayer, DynamicLayer and "
            "DynamicSlidingWindowLayer can): keep this cache in memory"
        )
    return record


def layer_tensors(layer: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a layer that `layer_record` knows, by name; empty for an empty layer."""
    if isinstance(layer, AnTKVLayer):
        return {} if layer.storage is None else layer.storage.tensors()
    filled = layer.is_initialized and layer.keys is not None and layer.get_seq_length() > 0
    return {"keys": layer.keys, "values": layer.values} if filled else {}


def restore_layer(index: int, layer: Any, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Fills a fresh `layer` from its record and `tensors`, which are on their device already.

    Raises:
        ValueError: naming layer and number, if they do not fit the layer.
    """
    name = type(layer).__name__
    if record["type"] != name:
        raise ValueError(
            f"layer {index} is a {record['type']} in the file and a {name} in the model: load it with the model that "
            "filled it"
        )
    try:
        if isinstance(layer, AnTKVLayer):
            layer.restore(tensors, bool(record["record_past"]))
            if (layer.get_seq_length(), max(layer.batch_size, 0)) != (record["length"], record["batch"]):
                raise ValueError(
                    f"it holds {layer.batch_size} x {layer.get_seq_length()} tokens, but states {record['batch']} x "
                    f"{record['length']}"
                )
        elif tensors or record["length"]:
            _restore_plain(layer, record, tensors)
        if isinstance(layer, DynamicSlidingWindowLayer):
            if record["sliding_window"] != layer.sliding_window:
                raise ValueError(
                    f"its sliding window is {record['sliding_window']} in the file and {layer.sliding_window} in the "
                    "model"
                )
            layer.record_past = bool(record["record_past"])
    except ValueError as error:
        raise ValueError(f"layer {index}: {error}; load it with the model that filled it, or fill it again") from error


def _restore_plain(layer: DynamicLayer, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    if sorted(tensors) != ["keys", "values"] or not isinstance(layer, DynamicLayer):
        raise ValueError(f"a {type(layer).__name__} does not hold {', '.join(sorted(tensors)) or 'nothing'}")
    keys, values = tensors["keys"], tensors["values"]
    check_tail({"tail_keys": keys, "tail_values": values})
    sliding = isinstance(layer, DynamicSlidingWindowLayer)
    length, held = record["length"], keys.shape[2]
    if (held != length and not (sliding and held < length)) or keys.shape[0] != record["batch"]:
        raise ValueError(f"it holds {keys.shape[0]} x {held} tokens, but states {record['batch']} x {length}")
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length
