"""What codes lose of keys, measured on text: by it the logits of coded tokens are corrected (`reference.code_bias`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import date

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..codebook import AnTKVCodebook
from ..codecs import VectorQuantizer
from ..evaluation.protocols import AttentionCall, Protocol, ProtocolEvaluator, Read
from ..texts import TextMix, mix_windows
from .checks import check_model
from .intercept import frozen_for_statistics

WINDOWS = 8  # of text: an average over tokens and positions, so few suffice


def measure_noise(
    model: PreTrainedModel,
    tokenizer,
    texts: TextMix | Sequence[str],
    codebook: AnTKVCodebook,
    *,
    windows: int = WINDOWS,
    window: int = 2048,
    seed: int = 0,
    progress: bool = True,
    sources: Sequence[str] | None = None,
) -> AnTKVCodebook:
    """The codebook with the noise of its keys measured on text: for codebooks that have none, or other text.

    `calibrate` does this by itself. It takes `windows` forward passes of `window` tokens, on a GPU or a CPU.

    Args:
        model: the codebook's model; it is left as it was. tokenizer, texts, seed, sources: as for `calibrate`.
        codebook: it is not changed.
        windows, window: windows of text, and tokens of each, more than the codebook's exact window.

    Returns:
        The codebook without measured rows; ``calibration["noise"]`` says what was read.

    Raises:
        ValueError: too little text, windows within the exact window, a codebook of another model, or one without a
            layer that can have noise.
    """
    mix = TextMix.of(texts)
    check_model(model)
    text = mix_windows(tokenizer, mix, window, windows, seed)
    if "finetune" in codebook.calibration:
        warnings.warn(
            "this codebook was fine-tuned, and with it the size of its noise, now measured anew: what training gained "
            "by it is lost",
            stacklevel=2,
        )
    with frozen_for_statistics(model):
        book = with_noise(model, codebook, text, progress)
    if all(key.noise is None for key, _ in book.tables.values()):
        raise ValueError(
            f"none of the {len(book.tables)} layers codes its keys before RoPE in a permutation, so there is no noise "
            "to measure: the codebook works as it is"
        )
    read = {
        "sources": list(sources) if sources is not None else mix.describe(),
        "tokens": text.numel(),
        "window": window,
        "seed": seed,
        "date": date.today().isoformat(),
    }
    return AnTKVCodebook(book.config, book.tables, book.model, {**codebook.calibration, "noise": read})


def unseen_windows(tokenizer, mix: TextMix, window: int, read: int, seed: int) -> torch.Tensor:
    """Windows for `with_noise` after tables were fitted to `read` windows drawn by `seed`: text is drawn anew, since on
    what tables were fitted to codes lose less."""
    return mix_windows(tokenizer, mix, window, min(WINDOWS, read), seed + 1)


def with_noise(
    model: PreTrainedModel, codebook: AnTKVCodebook, windows: torch.Tensor, progress: bool = False
) -> AnTKVCodebook:
    """The codebook with the noise of its keys: covariance of what codes lose, over the tokens that stay coded.

    One exact forward pass over each window, in which keys are coded and anchors chosen as in streaming use. Layers
    whose keys are coded without RoPE get none.

    Args:
        model: the codebook's model. windows: token windows ``(count, n)``, longer than the codebook's exact window.

    Raises:
        ValueError: as `ProtocolEvaluator`, for windows within the exact window, or in which nothing remains coded.
    """
    window = codebook.config.window
    sinks = codebook.config.anchors.sinks
    if windows.shape[1] <= window + sinks:
        raise ValueError(
            f"windows of {windows.shape[1]} tokens lie within the exact window of {window} and {sinks} sinks: give "
            "longer ones"
        )
    products: dict[int, torch.Tensor] = {}  # by layer, of pre-RoPE codes: (kv_heads, groups, d, d)
    counts: dict[int, torch.Tensor] = {}  # (kv_heads,)
    evaluator = ProtocolEvaluator(model, Protocol(f"S{window}", window), codebook.config, codebook)
    code = evaluator.read_back

    def measure(call: AttentionCall) -> Read:
        read, (heads, _, dim) = Read(*code(call)), call.keys.shape[1:]
        codec = evaluator.plans[call.layer].codec(call.keys.device, heads, dim, call.values.shape[3])
        key = codec.key
        if codec.rotary is not None and isinstance(key, VectorQuantizer) and key.permutation is not None:
            assert read.coded is not None
            lost = (read.keys - call.keys.float()) * read.coded.unsqueeze(-1)
            lost = lost.gather(-1, key.permutation.unsqueeze(1).expand_as(lost)).unflatten(-1, (key.groups, -1))
            lost = lost.permute(1, 3, 0, 2, 4).flatten(2, 3)  # (kv_heads, groups, batch * n, d)
            products[call.layer] = products.get(call.layer, 0) + (lost.mT @ lost).double().cpu()
            counts[call.layer] = counts.get(call.layer, 0) + read.coded.sum((0, 2)).cpu()
        return Read(call.keys, call.values)

    evaluator.read_back = measure
    with torch.no_grad(), evaluator.active():
        for row in tqdm(windows, desc="noise", unit="window", disable=not progress):
            model(input_ids=row.unsqueeze(0).to(model.device), use_cache=False)
    tables = dict(codebook.tables)
    for layer, product in products.items():
        key, value = tables[layer]
        if (fewest := int(counts[layer].min())) == 0:
            raise ValueError(
                f"layer {layer}: {fewest} tokens of {windows.shape[1]} remain coded in a kv head, the others are "
                "anchors or sinks: give longer windows"
            )
        noise = product / counts[layer].view(-1, 1, 1, 1)
        tables[layer] = (replace(key, noise=((noise + noise.mT) / 2).float()), value)
    return AnTKVCodebook(codebook.config, tables, codebook.model, codebook.calibration, codebook.evaluation)
