"""What one layer's keys or values lose in a spec, and what a whole codebook loses: mean KL of a token's prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..anchors import get_score
from ..cache.layer import LayerPlan
from ..codebook import AnTKVCodebook
from ..codecs import IdentityCodec, LayerCodec, VectorQuantizer, VQTables
from ..config import AnTKVConfig
from ..evaluation.protocols import Protocol, ProtocolEvaluator
from ..rotary import Rotary
from ..specs import VQSpec
from .spread import ROLES, Place

Costs = dict[Place, dict[VQSpec, float]]
_LOGIT_ROWS = 256  # rows of logits compared at a time


@torch.no_grad()
def layer_costs(
    model: PreTrainedModel,
    windows: torch.Tensor,
    protocol: str,
    config: AnTKVConfig,
    layer: int,
    rotary: Rotary | None,
    tables: Mapping[tuple[str, VQSpec], VQTables],
) -> Costs:
    """Loss of each spec for one layer's keys and values, each alone: nats a token.

    Args:
        windows: token ids ``(count, n)``. protocol: a one-shot one, ``W0`` or ``S<n>``.
        config: anchors and chunks. rotary: the layer's RoPE, None where keys are coded as they come.
        tables: of the layer, by role and spec.

    Raises:
        ValueError: a loss is not finite.
    """
    evaluator = _evaluator(model, protocol, config)
    sums: Costs = {(layer, role): {} for role in ROLES}
    for row in windows:
        ids = row.unsqueeze(0).to(model.device)
        plain = _logits(evaluator, ids, {})
        for (role, spec), held in tables.items():
            plan = _plan_of(evaluator.config, layer, role, spec, held, rotary)
            found = _checked(
                mean_divergence(plain, _logits(evaluator, ids, {layer: plan})), model, f"layer {layer}, {role} {spec}"
            )
            place = sums[layer, role]
            place[spec] = place.get(spec, 0.0) + found / len(windows)
    return sums


@torch.no_grad()
def cache_cost(model: PreTrainedModel, windows: torch.Tensor, protocol: str, codebook: AnTKVCodebook) -> float:
    """Loss of a whole codebook, nats a token.

    Args:
        windows, protocol: as for `layer_costs`.

    Raises:
        ValueError: it is not finite.
    """
    plain_evaluator = _evaluator(model, protocol, codebook.config)
    evaluator = ProtocolEvaluator(model, Protocol.parse(protocol), codebook.config, codebook)
    total = 0.0
    for row in windows:
        ids = row.unsqueeze(0).to(model.device)
        found = mean_divergence(_logits(plain_evaluator, ids, {}), _logits(evaluator, ids, evaluator.plans))
        total += _checked(found, model, f"codec {codebook.config.codec_name}")
    return total / len(windows)


def _checked(loss: float, model: PreTrainedModel, what: str) -> float:
    if not math.isfinite(loss):
        raise ValueError(
            f"{what}: the loss is {loss} in {model.dtype}, by which no bits can be spread: load the model in bfloat16 "
            "or float32, or leave this candidate out"
        )
    return loss


def mean_divergence(plain: torch.Tensor, logits: torch.Tensor) -> float:
    """KL(plain || logits) in nats, the mean over tokens: logits ``(batch, n, vocabulary)``."""
    total, (batch, n, _) = 0.0, plain.shape
    for start in range(0, n, _LOGIT_ROWS):
        rows = slice(start, start + _LOGIT_ROWS)
        expected, found = (F.log_softmax(x[:, rows].float(), -1) for x in (plain, logits))
        total += float(F.kl_div(found, expected, reduction="none", log_target=True).sum(-1).double().sum())
    return total / (batch * n)


def _evaluator(model: PreTrainedModel, protocol: str, config: AnTKVConfig) -> ProtocolEvaluator:
    """One whose plans are given in each forward: layers without a plan attend exactly, by the same code."""
    exact = AnTKVConfig(
        key=None, value=None, anchors=config.anchors, window=config.window, chunk=config.chunk, rope=config.rope
    )
    return ProtocolEvaluator(model, Protocol.parse(protocol), exact, None)


def _logits(evaluator: ProtocolEvaluator, ids: torch.Tensor, plans: dict[int, LayerPlan]) -> torch.Tensor:
    evaluator.plans = plans
    with evaluator.active():
        return evaluator.model(input_ids=ids, use_cache=False).logits


def _plan_of(
    config: AnTKVConfig, layer: int, role: str, spec: VQSpec, tables: VQTables, rotary: Rotary | None
) -> LayerPlan:
    """Plan of a layer whose keys or values alone are coded."""

    def codec(layer: int, device: torch.device, *sizes: int) -> LayerCodec:
        coded = VectorQuantizer(spec, tables, device)
        key, value = (coded if role == r else IdentityCodec() for r in ROLES)
        return LayerCodec(key, value, None if rotary is None else rotary.to(device))

    return LayerPlan(layer, config, get_score(config.anchors.score), codec)
