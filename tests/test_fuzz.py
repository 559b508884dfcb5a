"""2,000 damaged files: each is refused with a clean error, or loads exactly what was written. Never a wrong load."""

from __future__ import annotations

import faulthandler
import json
import random
import time

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig, VQSpec
from antkv_hf.codebook import CONFIG_FILE, TABLES_FILE
from antkv_hf.config import AnchorConfig, ScalarSpec

CONFIG = AnTKVConfig(VQSpec(4, 4), VQSpec(4, 4), window=8, chunk=16, anchors=AnchorConfig(fraction=0.1, sinks=2))
CLEAN = (ValueError, OSError)
SECONDS = 5  # that one load may take; it takes some milliseconds
INTERESTING = (0, 1, 7, 8, 127, 128, 254, 255, ord('"'), ord("{"), ord("}"), ord("9"), ord("-"), ord("\\"))


@pytest.fixture(autouse=True)
def no_hang():
    """A hang ends the run with a traceback that names its place."""
    faulthandler.dump_traceback_later(240, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture(scope="module")
def codebook(model):
    return random_codebook(model, CONFIG)


def header_end(data: bytes) -> int:
    """Where the header of a safetensors file ends; the end of any other file."""
    return min(len(data), 8 + int.from_bytes(data[:8], "little"))


def flip_bits(data: bytearray, place: int, rng: random.Random, other: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[place] ^= 1 << rng.randrange(8)
        place = rng.randrange(len(data))
    return bytes(data)


def set_byte(data: bytearray, place: int, rng: random.Random, other: bytes) -> bytes:
    data[place] = rng.choice(INTERESTING)
    return bytes(data)


def change_digit(data: bytearray, place: int, rng: random.Random, other: bytes) -> bytes:
    """Another number in the JSON: the file stays well-formed."""
    digits = [i for i, byte in enumerate(data[: header_end(data)]) if byte in b"0123456789"]
    data[rng.choice(digits)] = rng.choice(b"0123456789")
    return bytes(data)


def truncate(data: bytearray, place: int, rng: random.Random, other: bytes) -> bytes:
    return bytes(data[:place])


def cut_out(data: bytearray, place: int, rng: random.Random, other: bytes) -> bytes:
    return bytes(data[:place] + data[place + rng.randint(1, 64) :])


def insert(data: bytearray, place: int, rng: random.Random, other: bytes) -> bytes:
    return bytes(data[:place]) + rng.randbytes(rng.randint(1, 64)) + bytes(data[place:])


def repeat_part(data: bytearray, place: int, rng: random.Random, other: bytes) -> bytes:
    return bytes(data[:place] + data[place : place + rng.randint(1, 64)] + data[place:])


def blank(data: bytearray, place: int, rng: random.Random, other: bytes) -> bytes:
    end = min(place + rng.randint(1, 512), len(data))
    return bytes(data[:place]) + bytes([rng.choice((0, 32, 255))]) * (end - place) + bytes(data[end:])


def swap_bytes(data: bytearray, place: int, rng: random.Random, other: bytes) -> bytes:
    second = rng.randrange(len(data))
    data[place], data[second] = data[second], data[place]
    return bytes(data)


def wrong_length(data: bytearray, place: int, rng: random.Random, other: bytes) -> bytes:
    size = rng.choice((0, 1, 7, 99_999_999, 2**31, 2**63 - 1, 2**64 - 1, header_end(data) - 8 + rng.choice((-1, 1))))
    return size.to_bytes(8, "little") + bytes(data[8:])


def header_of_another(data: bytearray, place: int, rng: random.Random, other: bytes) -> bytes:
    return other[: header_end(other)] + bytes(data[header_end(data) :])


def end_of_another(data: bytearray, place: int, rng: random.Random, other: bytes) -> bytes:
    return bytes(data[:place]) + other[place:]


MUTATIONS = (
    flip_bits, flip_bits, set_byte, change_digit, truncate, cut_out, insert, repeat_part, blank, swap_bytes,
    wrong_length, header_of_another, end_of_another,
)  # fmt: skip


def mutate(data: bytes, other: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A damaged copy: half of the damage is in the header, where it is most interesting."""
    change = rng.choice(MUTATIONS)
    place = rng.randrange(header_end(data) if rng.random() < 0.5 else len(data))
    return change.__name__, change(bytearray(data), place, rng, other)


def fuzz(files: list[tuple], load, assert_identical, count: int) -> None:
    """Damages one of `files` (path, bytes, other bytes) at a time and loads; at least nine in ten must be noticed."""
    rng, refused, harmless = random.Random(0), 0, 0
    for i in range(count):
        path, data, other = files[i % len(files)]
        name, damaged = mutate(data, other, rng)
        while damaged == other:  # the whole of another file, which is sound
            name, damaged = mutate(data, other, rng)
        path.write_bytes(damaged)
        start = time.perf_counter()
        try:
            loaded = load()
        except CLEAN as error:
            assert str(error), name
            refused += 1
        else:
            assert_identical(loaded)
            harmless += 1
        assert time.perf_counter() - start < SECONDS, f"mutation {i} ({name}) took too long"
        path.write_bytes(data)
    assert refused + harmless == count and refused > 0.9 * count, (refused, harmless)


KINDS = {
    "codebook": CONFIG,
    "layer_bits": CONFIG.with_layer_bits("0=d4b4/d8b6"),
    "ott-2bit": AnTKVConfig.preset("ott-2bit", window=8, chunk=32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_500_damaged_caches(model, kind, tmp_path):
    """Two caches of one model with different contents: the one is damaged, also by parts of the other."""
    config = KINDS[kind]
    book = None if isinstance(config.key, ScalarSpec) else random_codebook(model, config)
    path, files, caches = tmp_path / "cache", [], []
    for n in (40, 61):
        caches.append(AnTKVCache(model.config, config, book))
        model(torch.randint(3, 128, (1, n), generator=torch.Generator().manual_seed(n)), past_key_values=caches[-1])
        caches[-1].save(path)
        files.append(path.read_bytes())
    expected = caches[0].layers[0].storage.tensors()
    assert caches[0].layers[0].storage.coded_length == 32

    def identical(loaded):
        found = loaded.layers[0].storage.tensors()
        assert loaded.antkv_config == config and list(found) == list(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    fuzz([(path, *files)], lambda: AnTKVCache.load(path, codebook=book), identical, 500)


def test_500_damaged_codebooks(model, codebook, tmp_path):
    second = random_codebook(model, CONFIG.replace(window=9), seed=5)
    codebook.save_pretrained(tmp_path / "one")
    second.save_pretrained(tmp_path / "two")
    files = [
        (tmp_path / "one" / name, *((tmp_path / folder / name).read_bytes() for folder in ("one", "two")))
        for name in (CONFIG_FILE, TABLES_FILE)
    ]

    def identical(loaded):
        assert loaded.sha256 == codebook.sha256 and loaded.config == codebook.config
        described = json.loads(json.dumps([codebook.model, codebook.calibration, codebook.evaluation]))
        assert [loaded.model, loaded.calibration, loaded.evaluation] == described

    fuzz(files, lambda: AnTKVCodebook.from_pretrained(tmp_path / "one"), identical, 500)


@pytest.mark.parametrize("data", (b"", b"[" * 100_000, b'{"a":' * 50_000, b"null", b"\xff" * 64, b"\x80\x02."))
def test_files_that_are_nothing(codebook, tmp_path, data):
    """Empty, endlessly nested, not UTF-8, a pickle."""
    path = tmp_path / "cache"
    for content in (data, len(data).to_bytes(8, "little") + data):
        path.write_bytes(content)
        with pytest.raises(CLEAN, match="is no cache file"):
            AnTKVCache.load(path, codebook=codebook)
    codebook.save_pretrained(tmp_path / "book")
    (tmp_path / "book" / CONFIG_FILE).write_bytes(data)
    with pytest.raises(CLEAN, match=r"is not the config\.json of a codebook"):
        AnTKVCodebook.from_pretrained(tmp_path / "book")


def test_a_nested_header_in_a_sound_file(codebook, tmp_path):
    """JSON that is too deep for Python inside of metadata that safetensors accepts."""
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "cache", metadata={"antkv_cache": "[" * 100_000, "sha256": ""})
    with pytest.raises(ValueError, match="is no cache file"):
        AnTKVCache.load(tmp_path / "cache", codebook=codebook)
