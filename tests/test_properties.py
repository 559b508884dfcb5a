"""Random sequences of everything that can happen to a cache, against a dense model of what it must hold.

With the identity codec the model is exact: whatever the order of operations, keys and values read back bit for bit
(numbers that float16 holds, so exact tokens are exact) and attention over them equals plain attention. With vector
quantization, codes must be those of a fresh cache that was fed the same tokens, and everything else as exact as it is
stored.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from helpers import random_codebook
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import LlamaConfig

from antkv_hf import AnTKVCache, AnTKVConfig, VQSpec
from antkv_hf.config import AnchorConfig

LAYERS, KV_HEADS, GROUP, DIM = 2, 2, 2, 8
MODEL = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=KV_HEADS * GROUP,
    num_key_value_heads=KV_HEADS, head_dim=DIM,
)  # fmt: skip
SDPA = torch.nn.functional.scaled_dot_product_attention
# The same sequences on every machine: a failure is a change of the code, not of luck.
SETTINGS = settings(
    max_examples=100, stateful_step_count=20, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

rows = st.lists(st.integers(0, 5), min_size=1, max_size=4)
seeds = st.integers(0, 2**16)


class CacheOperations(RuleBasedStateMachine):
    """The rules; subclasses choose the cache and say what must hold after each of them.

    ``true[layer]`` is (keys, values) ``(batch, kv_heads, length, dim)``: all tokens that the cache should hold;
    ``padding`` ``(batch,)`` is what the attention mask hides at the left.
    """

    pads = False

    def new_cache(self) -> AnTKVCache:
        raise NotImplementedError

    @initialize(batch=st.integers(1, 3))
    def start(self, batch):
        self.cache = self.new_cache()
        self.begin(batch)

    def begin(self, batch: int) -> None:
        self.true = [(torch.zeros(batch, KV_HEADS, 0, DIM),) * 2 for _ in range(LAYERS)]
        self.padding = torch.zeros(batch, dtype=torch.int64)

    @property
    def batch(self) -> int:
        return self.true[0][0].shape[0]

    @property
    def length(self) -> int:
        return self.true[0][0].shape[2]

    def change(self, operation) -> None:
        self.true = [(operation(keys), operation(values)) for keys, values in self.true]

    # ------------------------------------------------------------ rules
    @rule(n=st.sampled_from((1, 1, 2, 5, 17, 40)), attend=st.booleans(), seed=seeds, padding=rows)
    def update(self, n, attend, seed, padding):
        if self.pads and self.length == 0:
            self.padding = torch.tensor([(padding * self.batch)[i] for i in range(self.batch)]).clamp_max(n - 1)
        self.feed(n, attend, seed)

    def feed(self, n: int, attend: bool, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        for layer, (keys, values) in enumerate(self.true):
            new = [torch.randint(-64, 65, (self.batch, KV_HEADS, n, DIM), generator=g) / 16 for _ in range(2)]
            handles = self.cache.update(*new, layer)
            keys, values = (torch.cat([old, x], 2) for old, x in zip((keys, values), new))
            self.true[layer] = (keys, values)
            if attend:
                query = torch.randn(self.batch, KV_HEADS * GROUP, n, DIM, generator=g)
                self.attention(layer, query, *handles)

    def attention(self, layer: int, query, keys, values) -> None:
        n, length = query.shape[2], self.length_of(layer)
        last = torch.arange(length - n, length)
        columns = torch.arange(length)
        mask = (columns <= last.unsqueeze(1)) & (columns >= self.padding.view(-1, 1, 1))
        out = SDPA(query, keys, values, attn_mask=mask.unsqueeze(1), enable_gqa=True)
        assert torch.isfinite(out).all()
        self.check_attention(layer, query, mask.unsqueeze(1), out)

    def length_of(self, layer: int) -> int:
        return self.true[layer][0].shape[2]

    def check_attention(self, layer: int, query, mask, out) -> None:
        pass

    @rule(tokens=st.sampled_from((0, 1, 3, 10, 30, 90)))
    def crop(self, tokens):
        self.cache.crop(-tokens)
        left = max(self.length - tokens, 0)
        if self.cache.quantized_layers[0].storage is not None:
            self.change(lambda t: t[:, :, :left])
        if left <= int(self.padding.max()):
            self.padding = torch.zeros_like(self.padding)

    @precondition(lambda self: self.length > 0)
    @rule(order=rows)
    def reorder(self, order):
        index = torch.tensor(order) % self.batch
        self.cache.reorder_cache(index)
        self.change(lambda t: t[index])
        self.padding = self.padding[index]

    @precondition(lambda self: self.length > 0 and self.batch <= 2)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats):
        self.cache.batch_repeat_interleave(repeats)
        self.change(lambda t: t.repeat_interleave(repeats, 0))
        self.padding = self.padding.repeat_interleave(repeats, 0)

    @precondition(lambda self: self.length > 0)
    @rule(chosen=rows)
    def select(self, chosen):
        index = torch.tensor(chosen) % self.batch
        self.cache.batch_select_indices(index)
        self.change(lambda t: t[index])
        self.padding = self.padding[index]

    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            before = [storage.tensors() for storage in self.storages()]
            self.cache.save(Path(folder) / "cache")
            self.cache = AnTKVCache.load(Path(folder) / "cache", codebook=self.cache.codebook)
        after = [storage.tensors() for storage in self.storages()]
        assert [list(tensors) for tensors in before] == [list(tensors) for tensors in after]
        for old, new in zip(before, after):
            assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())

    @rule()
    def copy(self):
        self.cache = copy.deepcopy(self.cache)

    @rule()
    def begin_recording(self):
        self.cache.activate_past_recording()

    @rule()
    def stop_recording(self):
        self.cache._is_user_defined = True  # as generate() does

    @precondition(lambda self: self.length > 40)  # else most sequences would be too short to be coded
    @rule(batch=st.integers(1, 3))
    def reset(self, batch):
        self.cache.reset()
        self.begin(batch)

    # ------------------------------------------------------------ what always holds
    @invariant()
    def counts_agree(self):
        if not hasattr(self, "cache"):
            return
        footprint = self.cache.memory_footprint()
        assert {layer.get_seq_length() for layer in self.cache.layers} == {self.length}
        assert footprint.tokens == self.batch * self.length or self.length == 0
        assert footprint.elements == 2 * LAYERS * KV_HEADS * DIM * self.batch * self.length

    @invariant()
    def exact_tokens_are_coded_and_named_once(self):
        for storage in self.storages():
            kinds = [t.positions for t in (storage.sinks, storage.anchors) if t is not None]
            if not kinds:
                continue
            positions = torch.cat(kinds, 2)
            assert int(positions.max()) < storage.coded_length
            for row in positions.flatten(0, 1):
                used = row[row >= 0]
                assert len(used.unique()) == len(used), row

    def storages(self):
        layers = self.cache.layers if hasattr(self, "cache") else []
        return [layer.storage for layer in layers if layer.storage is not None]


class IdentityMachine(CacheOperations):
    pads = True

    def new_cache(self):
        anchors = AnchorConfig(score="error_aware", fraction=0.2, dtype="float16", sinks=2)
        return AnTKVCache(MODEL, AnTKVConfig.preset("identity", window=6, chunk=5, anchors=anchors))

    def check_attention(self, layer, query, mask, out):
        keys, values = self.true[layer]
        expected = SDPA(query, keys, values, attn_mask=mask, enable_gqa=True)
        seen = mask.any(-1).expand(out.shape[:3])  # a padded query sees nothing
        torch.testing.assert_close(out[seen], expected[seen], atol=1e-5, rtol=1e-4)

    @invariant()
    def reads_back_bit_for_bit(self):
        for storage, (keys, values) in zip(self.storages(), getattr(self, "true", [])):
            ours = storage.snapshot().dense()
            assert torch.equal(ours[0], keys) and torch.equal(ours[1], values)


VQ_CONFIG = AnTKVConfig(
    VQSpec(4, 4), VQSpec(4, 4), window=6, chunk=8, anchors=AnchorConfig(fraction=0.2, dtype="int8", sinks=2)
)
CODEBOOK = random_codebook(SimpleNamespace(config=MODEL), VQ_CONFIG)
FRESH = AnTKVCache(MODEL, codebook=CODEBOOK)


class VectorQuantizationMachine(CacheOperations):
    def new_cache(self):
        return AnTKVCache(MODEL, codebook=CODEBOOK)

    @invariant()
    def the_tail_is_exact(self):
        for storage, (keys, values) in zip(self.storages(), getattr(self, "true", [])):
            coded = storage.coded_length
            assert torch.equal(storage.tail_keys, keys[:, :, coded:])
            assert torch.equal(storage.tail_values, values[:, :, coded:])

    @invariant()
    def exact_tokens_are_as_exact_as_int8(self):
        for storage, true in zip(self.storages(), getattr(self, "true", [])):
            for tokens, limit in ((storage.sinks, 1e-6), (storage.anchors, 0.04)):
                if tokens is None:
                    continue
                batch, head, slot = (tokens.positions >= 0).nonzero(as_tuple=True)
                index = tokens.positions[batch, head, slot].long()
                for kept, exact in zip(tokens.read(storage.codec, storage.offset, storage.snapshot().key_center), true):
                    error = (kept[batch, head, slot].float() - exact[batch, head, index]).abs()
                    assert error.numel() == 0 or error.max() <= limit  # 4 / 127: half a step, and RoPE's float32

    @invariant()
    def codes_are_those_of_a_fresh_cache(self):
        if not hasattr(self, "cache") or not self.length:
            return
        FRESH.reset()
        for layer, (keys, values) in enumerate(self.true):
            FRESH.update(keys, values, layer)
        for storage, other in zip(self.storages(), FRESH.layers):
            other.storage.commit()
            shared = min(storage.coded_length, other.storage.coded_length)
            if not shared:
                continue
            for name in ("key_codes", "value_codes"):
                pair = [getattr(s, name)[:, :, :shared] for s in (storage, other.storage)]
                differ = int((pair[0] != pair[1]).sum())  # one may flip where two centroids are equally near
                assert differ <= 1 + 0.002 * pair[0].numel()


class ScalarMachine(VectorQuantizationMachine):
    """A budget demotes anchors; groups of keys are cut short by crops. Codes depend on how a sequence came about."""

    def new_cache(self):
        anchors = AnchorConfig(score="outlier_tokens", fraction=0.1, sinks=2, max_tokens=5)
        return AnTKVCache(MODEL, AnTKVConfig.preset("ott-4bit", group=32, window=6, chunk=32, anchors=anchors))

    @rule(n=st.sampled_from((40, 75, 110)), attend=st.booleans(), seed=seeds)
    def prefill(self, n, attend, seed):
        """A chunk is four times as large as with vector quantization."""
        self.feed(n, attend, seed)

    @invariant()
    def codes_are_those_of_a_fresh_cache(self):
        for storage in self.storages():
            starts = storage.scales.starts.tolist()
            ends = [*starts[1:], storage.coded_length]
            assert all(0 < end - start <= 32 for start, end in zip(starts, ends)) and (not starts or starts[0] == 0)
            kept = 0 if storage.anchors is None else storage.anchors.positions.shape[2]
            assert kept <= 5 and (storage.anchors is None) == (storage.anchor_scores is None)

    @invariant()
    def codes_are_near(self):
        for storage, true in zip(self.storages(), getattr(self, "true", [])):
            if not storage.coded_length:
                continue
            snapshot = storage.snapshot()
            keys, values = snapshot.dense_coded(0, storage.coded_length)
            # Numbers from -4 to 4: half a step of 4 bits is at most 0.27; a key that was exact once may be clamped.
            near = (keys - true[0][:, :, : storage.coded_length]).abs().amax(-1) < 0.5
            assert near.float().mean() > 0.8
            assert (values - true[1][:, :, : storage.coded_length]).abs().max() < 0.6


TestIdentity = IdentityMachine.TestCase
TestVectorQuantization = VectorQuantizationMachine.TestCase
TestScalar = ScalarMachine.TestCase
TestIdentity.settings = TestVectorQuantization.settings = SETTINGS
TestScalar.settings = settings(SETTINGS, max_examples=40)
