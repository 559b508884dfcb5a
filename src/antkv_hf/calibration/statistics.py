"""Statistics of calibration windows: keys before RoPE, values, their gradients, and the tokens to leave out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..rotary import Rotary
from .intercept import Attended, recording

EXCLUDED = 0.01  # share of a window's tokens, best by AnS, that tables need not serve: they become anchors
_LOGIT_ROWS = 256  # rows of logits turned into gradients at a time


@dataclass(frozen=True)
class LayerStatistics:
    """Of one layer and window, or of all windows together; m sampled tokens.

    Args:
        key, key_grad: ``(kv_heads, m, head_dim)``, the key as it is coded (before RoPE where rope is "pre") and the
            gradient of the summed token NLL by it.
        value, value_grad: ``(kv_heads, m, value_dim)``.
        exclude: bool ``(kv_heads, m)``, the set X: top 1% of the window's tokens by AnS.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_grad: torch.Tensor
    value_grad: torch.Tensor
    exclude: torch.Tensor


def window_statistics(
    model: PreTrainedModel, windows: torch.Tensor, rotary: dict[int, Rotary | None], kept: torch.Tensor
) -> tuple[list[dict[int, LayerStatistics]], torch.Tensor]:
    """One forward and backward pass over some windows (RECIPE definition 1). Call inside `frozen_for_statistics`.

    Args:
        windows: token ids ``(batch, n)``, no padding.
        rotary: by layer to record, its RoPE, or None where keys are coded as they come.
        kept: positions of the sampled tokens ``(batch, m)``, the same for all layers.

    Returns:
        For each window a dict by layer, on the CPU in float32, and the mean NLL of a token ``(batch,)``.

    Raises:
        ValueError: if the model's attention could not be seen, or a gradient is not finite.
    """
    windows, kept = windows.to(model.device), kept.to(model.device)
    with recording(list(rotary)) as recorder, torch.enable_grad():
        logits = model(input_ids=windows, use_cache=False).logits
        if missing := sorted(set(rotary) - set(recorder.seen)):
            raise ValueError(
                f"the attention of layer {missing[0]} of {type(model).__name__} was not seen: its attention does not "
                "go through transformers' AttentionInterface, so it cannot be calibrated (add it to skip_layers?)"
            )
        nll, gradient = nll_gradient(logits.detach(), windows.to(logits.device))
        logits.backward(gradient)
        del logits, gradient
    out: list[dict[int, LayerStatistics]] = [{} for _ in range(len(windows))]
    for layer, turn in rotary.items():
        attended = recorder.seen.pop(layer)  # frees the graph layer by layer
        for i, statistics in enumerate(_sampled(attended, turn, kept, layer)):
            out[i][layer] = statistics
    return out, nll


def nll_gradient(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL of the next tokens and its gradient by the logits, softmax(logits) - one_hot(next), in blocks of rows.

    Args:
        logits: ``(batch, n, vocabulary)``. ids: ``(batch, n)``.

    Returns:
        mean NLL of each window ``(batch,)``; the gradient of their sum over tokens, like `logits` (0 in the last row).
    """
    gradient = torch.zeros_like(logits)
    total = torch.zeros(len(ids), device=ids.device)
    for start in range(0, ids.shape[1] - 1, _LOGIT_ROWS):
        rows = slice(start, min(start + _LOGIT_ROWS, ids.shape[1] - 1))
        target = ids[:, rows.start + 1 : rows.stop + 1].unsqueeze(-1)
        logs = F.log_softmax(logits[:, rows].float(), -1)
        total -= logs.gather(-1, target).sum((1, 2))
        gradient[:, rows] = logs.exp_().scatter_add_(-1, target, -torch.ones_like(target, dtype=logs.dtype))
    return total / (ids.shape[1] - 1), gradient


def top_tokens(score: torch.Tensor, fraction: float = EXCLUDED) -> torch.Tensor:
    """The best `fraction` of tokens, at least one: score ``(..., n)`` -> bool ``(..., n)``."""
    count = max(1, round(fraction * score.shape[-1]))
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(count, -1).indices, True)


def unrotated_gradient(gradient: torch.Tensor, rotary: Rotary, positions: torch.Tensor) -> torch.Tensor:
    """Gradient by the key before RoPE, g_pre = J^T g_post with k_post = J k_pre, J = scaling * rotation.

    `Rotary.unrotate` divides the rotated channels by the scaling where the transpose multiplies.
    """
    turned = rotary.unrotate(gradient, positions)
    if rotary.scaling != 1.0:
        turned[..., : rotary.rotary_dim] *= rotary.scaling**2
    return turned


def _sampled(attended: Attended, rotary: Rotary | None, kept: torch.Tensor, layer: int) -> list[LayerStatistics]:
    """The kept tokens of one layer, in the form in which they are coded, a `LayerStatistics` for each window."""
    kept = kept.to(attended.key.device)  # layers may be spread over several

    def sample(x: torch.Tensor) -> torch.Tensor:  # (batch, kv_heads, n, d) -> (batch, kv_heads, m, d) float32
        index = kept.view(len(kept), 1, -1, 1).expand(-1, x.shape[1], -1, x.shape[3])
        return x.detach().gather(2, index).float()

    key, value = sample(attended.key), sample(attended.value)
    if attended.key.grad is None or attended.value.grad is None:
        raise ValueError(f"layer {layer}: no gradient reached its keys and values, so the layer cannot be calibrated")
    key_grad, value_grad = sample(attended.key.grad), sample(attended.value.grad)
    if rotary is not None:
        rotary, positions = rotary.to(key.device), kept.unsqueeze(1)
        key, key_grad = rotary.unrotate(key, positions), unrotated_gradient(key_grad, rotary, positions)
    exclude = top_tokens(attended.anchor_score)
    exclude = exclude.gather(2, kept.unsqueeze(1).expand(-1, exclude.shape[1], -1))
    parts = (key, value, key_grad, value_grad, exclude)
    for name, tensor in zip(("keys", "values", "key gradients", "value gradients"), parts[:4], strict=True):
        if not torch.isfinite(tensor).all():
            kind = attended.key.dtype
            raise ValueError(f"layer {layer}: {name} are not finite in {kind}: load the model in bfloat16 or float32")
    return [LayerStatistics(*(part[i].cpu() for part in parts)) for i in range(len(kept))]
