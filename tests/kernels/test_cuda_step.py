"""What a step in CUDA C++ leaves for its score: the logits of the tail, by the emulator and on a GPU."""

import pytest
import torch
from antkv import cuda_decode
from antkv.cuda_shape import SHARED_MEMORY, find_shape
from antkv.static_step import add_column_statistic, add_tail_statistic
from builders import assert_near, quantized_past, random_codec, random_snapshot
from test_cuda_decode import emulate, emulated, gpu, needs_compiler, tables  # noqa: F401

from antkv_hf.attention.cuda_backend import CudaBackend


def step_case(spec, group, dtype, device="cpu"):
    """A query, 32 coded tokens and buffers with a tail of 53, of which the second sequence's first 18 are padding."""
    snapshot = random_snapshot(random_codec(spec, spec, 2, 64, device=device), 2, 32, 53, dtype, offset=(0, 50))
    past = quantized_past(snapshot)
    query = torch.randn(2, 2 * group, 1, 64, device=device).to(dtype)
    room = [torch.nn.functional.pad(x, (0, 0, 0, 11)) for x in (snapshot.tail_keys, snapshot.tail_values)]
    anchors = sum(tokens.positions.shape[2] for tokens in past.exact if tokens.key_scale is not None)
    lengths = torch.tensor([32, 53, anchors], dtype=torch.int32, device=device)
    return query, past._replace(coded=32, lengths=lengths), room


def check_kept_logits(kept, query, keys, tail, offset, scale, softcap=None):
    """`kept` holds the logits of the first `tail` keys for each query head, -inf for padding, and NaN beyond."""
    heads, group = keys.shape[1], query.shape[1] // keys.shape[1]
    logits = query.float().unflatten(1, (heads, group)).squeeze(3) @ keys[:, :, :tail].float().mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits * cuda_decode.LOG2E
    for b, first in enumerate(offset):
        logits[b, ..., :first] = float("-inf")
    assert_near(kept[:, :, :tail, :group].mT, logits, 3e-3)
    assert kept[:, :, tail:].isnan().all()


# codes, query heads a kv head, softcap, splits
KEPT = [("d8b8", 4, None, 1), ("d4b8s2", 3, 5.0, 2), ("d32b8", 8, None, 3)]


@needs_compiler
@pytest.mark.parametrize("spec, group, softcap, splits", KEPT)
def test_logits_of_the_tail_are_kept(spec, group, softcap, splits, emulated):  # noqa: F811
    """Of a tail longer than a tile, where part of it is padding; in one team and in several."""
    query, past, room = step_case(spec, group, torch.float16)
    one = find_shape(*tables(past), group, softcap is not None)
    for shape in {one, one.in_teams}:
        kept, step = torch.full((2, 2, 64, shape.rows), float("nan")), (emulated(shape), shape, query, past, room)
        options = dict(scale=0.1, softcap=softcap, splits=splits, is_causal=False, hides_padding=True)
        out, lse = emulate(*step, **options, tail_logits=kept)
        check_kept_logits(kept, query, room[0], 53, (0, 50 - 32), 0.1, softcap)
        plain = emulate(*step, **options)
        assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])


@pytest.mark.parametrize("term, kept", [("squared_attention", True), ("anchor_score", False), (None, False)])
def test_a_step_keeps_logits_for_scores_that_need_no_more(term, kept, monkeypatch):
    monkeypatch.setattr(cuda_decode, "shared_memory", lambda device: SHARED_MEMORY)
    codec = random_codec("d8b8", "d8b8", 2, 64)
    past = quantized_past(random_snapshot(codec, 1, 32, 3, torch.float16))
    shape, given = find_shape(*tables(past), 4, False), []
    monkeypatch.setattr(cuda_decode, "kernel_for", lambda *arguments: shape)
    monkeypatch.setattr(cuda_decode, "decode_attention", lambda *a, **options: given.append(options) or ("out", "lse"))
    monkeypatch.setattr("antkv_hf.attention.cuda_backend.MIN_TOKENS", 32)
    tail = torch.zeros(1, 2, 9, 64).half()
    step = CudaBackend(codec, torch.float16).step_attention
    out, lse, logits = step(torch.randn(1, 8, 1, 64).half(), past, tail, tail, term=term, scale=0.125)
    assert (out, lse) == ("out", "lse") and given[0].get("tail_logits") is logits
    assert (logits is not None) == kept and (not kept or logits.shape == (1, 2, 9, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("teams", [False, True], ids=("blocks", "teams"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec, group, softcap, splits", KEPT)
def test_scores_by_logits_are_those_by_keys_on_a_gpu(spec, group, softcap, splits, dtype, teams, gpu, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda_decode, "plan", lambda shape, *sizes: (shape.in_teams if teams else shape, splits, 2))
    query, past, room = step_case(spec, group, dtype, "cuda")
    kept = torch.full((2, 2, 64, 4 if group <= 4 else 8), float("nan"), device="cuda")
    options = dict(scale=0.1, softcap=softcap)
    out, lse = cuda_decode.decode_attention(query, past, *room, is_causal=False, tail_logits=kept, **options)
    check_kept_logits(kept, query, room[0], 53, (0, 50 - 32), 0.1, softcap)
    found = []
    for by_logits in (False, True):
        statistic, moment = torch.ones(2, 2, 64, device="cuda"), torch.ones(2, 2, 2, device="cuda")
        if by_logits:
            add_tail_statistic("squared_attention", kept, query, lse, statistic, moment, past.lengths, scale=0.1)
        else:
            add_column_statistic(
                "squared_attention", query, *room, out, lse, statistic, past.lengths, past.offset, moment=moment,
                **options,
            )  # fmt: skip
        found.append((statistic - 1, moment))
    assert_near(found[1][0], found[0][0], 1e-2)
    assert_near(found[1][1], found[0][1], 1e-5)
    with pytest.raises(ValueError, match=r"not float32 \(2, 2, 64, [48]\) in order"):
        cuda_decode.decode_attention(query, past, *room, tail_logits=kept[..., :3], **options)
