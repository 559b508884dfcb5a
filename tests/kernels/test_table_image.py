"""Images of tables, read back one entry at a time by the rule of decode_codes.cuh: what a lane reads, and where."""

import itertools
import struct

import pytest
import torch
from antkv.table_image import TableImages, image_bytes, table_image
from antkv.tables import KeyTables, ValueTables
from builders import random_codec

from antkv_hf.attention.tables import layer_tables

SECTION, ROW = 32768, 128
CODES = (0, 1, 130, 255)
UNLIKE_HALVES = ("interleaved", "partial")  # pairs of channels that are not half a head apart
# keys, values, head size, RoPE, copies of the last stage of values
CASES = [
    ("d8b8", "d8b8", 128, "half", 2),
    ("d8b8", "d4b8", 128, "interleaved", 1),
    ("d2b8", "d2b8", 64, "half", 2),
    ("d4b8s3", "d8b8s3", 64, "partial", 2),
    ("d8b8s3", "d16b8s3", 64, "none", 1),
    ("d32b8", "d32b8s2", 128, "scaled", 1),
]


def half_at(image: bytes, place: int) -> float:
    return struct.unpack_from("<e", image, place)[0]


def key_place(dim: int, entry: int, stage: int, code: int, channel: int) -> int:
    """Where the latent channel of a code of a stage is: entry `way` of its lane in the section, channels of an entry
    two pairs at a time."""
    lane, of_lane = channel // (dim // 4), channel % (dim // 4)
    section, way, of_entry = of_lane // 16, of_lane % 16 // entry, of_lane % 16 % entry
    if entry >= 4:  # x0 y0 x1 y1 -> x0 x1 y0 y1
        of_entry = of_entry // 4 * 4 + (0, 2, 1, 3)[of_entry % 4]
    column = lane * (16 // entry) + way
    return (stage * (dim // 64) + section) * SECTION + code * ROW + column * 2 * entry + 2 * of_entry


def value_places(dim: int, entry: int, stages: int, copies: int, stage: int, code: int, channel: int) -> list[int]:
    """Where it is in a lane's step: the two tables of a section have neighbouring columns."""
    lane, of_lane = channel // (dim // 8), channel % (dim // 8)
    step, z, of_entry = of_lane // (2 * entry), of_lane // entry % 2, of_lane % entry
    lanes, tables = 16 // entry, stages - 1 + copies
    section, column = step * (8 // lanes) + lane // lanes, lane % lanes * 2 + z
    first, alone = stage // 2 * (dim // 32) * SECTION, stage == tables - 1 and stage % 2 == 0
    beside = [section % 2] if alone else [0, 1] if copies == 2 and stage == stages - 1 else [stage % 2]
    row = first + (section // 2 if alone else section) * SECTION + code * ROW
    return [row + (column * 2 + table) * 2 * entry + 2 * of_entry for table in beside]


@pytest.mark.parametrize("key, value, dim, rope, copies", CASES)
def test_an_image_has_every_entry_where_lanes_read_it(key, value, dim, rope, copies):
    keys, values = layer_tables(random_codec(key, value, 2, dim, rope=rope), torch.float16)
    images = table_image(keys, values, copies)
    key_stages, value_stages = keys.codes.stages, values.codes.stages
    assert images.dtype == torch.uint8 and images.is_contiguous()
    assert images.shape == (2, image_bytes(dim, key_stages, value_stages, copies)) and images.shape[1] % 16 == 0
    for head in range(2):
        image, read = images[head].numpy().tobytes(), set()
        entry, sub_dim = min(keys.codes.sub_dim, 8), keys.codes.sub_dim
        for stage, channel in itertools.product(range(key_stages), range(dim)):
            group, inside = channel // sub_dim, channel % sub_dim
            for code in CODES:
                expected = keys.centroids[head, group, stage, code, inside]
                if stage == 0:
                    expected = (expected.float() + keys.mean[head, channel]).half()
                place = key_place(dim, entry, stage, code, channel)
                assert half_at(image, place) == expected
                read.add(place)
        entry, sub_dim = min(values.codes.sub_dim, dim // 16), values.codes.sub_dim
        for stage, channel in itertools.product(range(value_stages), range(dim)):
            group, inside = channel // sub_dim, channel % sub_dim
            for code in CODES:
                expected = values.centroids[head, group, stage, code, inside]
                for place in value_places(dim, entry, value_stages, copies, stage, code, channel):
                    place += key_stages * (dim // 64) * SECTION
                    assert half_at(image, place) == expected
                    read.add(place)
        sections = (len(image) - 7 * dim - 16) // SECTION  # each has all of the codes' rows
        assert len(read) == sections * len(CODES) * ROW // 2 and max(read) < sections * SECTION


@pytest.mark.parametrize("rope", ["half", "interleaved", "partial", "scaled", "none"])
def test_pairs_stand_as_lanes_own_them(rope):
    dim, half = 64, 32
    keys, values = layer_tables(random_codec("d8b8", "d8b8", 2, dim, rope=rope), torch.float16)
    images = table_image(keys, values, 1)
    for head in range(2):
        image = images[head].numpy().tobytes()[-7 * dim - 16 :]
        frequency, scale = (struct.unpack_from(f"<{half}f", image, at) for at in (0, 2 * dim))
        channels = image[6 * dim : 7 * dim]
        neighbours = struct.unpack_from("<i", image, 7 * dim)[0]
        latent = keys.channels[head].tolist()
        pairs = [(latent[2 * p], latent[2 * p + 1]) for p in range(half)]
        assert neighbours == (rope == "none" or all(y == x + half for x, y in pairs)) == (rope not in UNLIKE_HALVES)
        for p, (x, y) in enumerate(pairs):
            place = x if neighbours and rope != "none" else p
            assert frequency[place] == keys.frequency[head, p] and scale[place] == keys.pair_scale[head, p]
            assert (channels[2 * place], channels[2 * place + 1]) == (x, y)
            for second, channel in enumerate((x, y)):
                if neighbours:  # also of channels that are no pair
                    place, second = channel % half, channel // half
                at = 4 * dim + place // 2 * 8 + second * 4 + place % 2 * 2
                assert half_at(image, at) == keys.mean[head, 2 * p + latent[2 * p :].index(channel)].half()


def test_an_image_is_made_once_for_the_same_tables():
    keys, values = layer_tables(random_codec("d8b8", "d8b8", 2, 64), torch.float16)
    images = TableImages()
    first = images.get(keys, values, 2)
    assert images.get(keys, values, 2) is first and images.get(KeyTables(*keys), ValueTables(*values), 2) is first
    assert images.get(keys, values, 1) is not first and len(list(images)) == 2
    others = (
        (keys, values._replace(centroids=values.centroids + 1)), (keys._replace(mean=keys.mean + 1), values),
        (keys._replace(pair_scale=2 * keys.pair_scale), values),
    )  # fmt: skip
    for pair in others:
        with pytest.raises(ValueError, match="images are of other tables; give each its own"):
            images.get(*pair, 2)
    assert images.get(keys, values, 2) is first


def test_images_count_as_memory_of_their_codec():
    codec = random_codec("d8b8", "d8b8", 2, 64)
    keys, values = layer_tables(codec, torch.float16)
    before = codec.memory_bytes()
    image = keys.images.get(keys, values, 2)
    assert codec.memory_bytes() == before + image.nbytes == before + 2 * image_bytes(64, 1, 1, 2)


def test_an_image_is_not_made_while_a_graph_is_captured(monkeypatch):
    """It would be made at each replay, and not be there before the first."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    keys, values = layer_tables(random_codec("d8b8", "d8b8", 2, 64), torch.float16)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(ValueError, match="never used: warm it up first"):
        keys.images.get(keys, values, 2)
