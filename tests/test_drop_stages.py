"""Residual stages left out until tables are small enough: which go, what is left, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_calibration import small_llama, small_text
from test_cli import (
    antkv,
    error_of,
    place,  # noqa: F401  # a fixture
)
from test_texts import word_tokenizer

from antkv_hf import AnTKVCodebook, AnTKVConfig, calibrate
from antkv_hf.calibration.drop_stages import _loss, drop_stages
from antkv_hf.calibration.sensitivity import Mixed
from antkv_hf.evaluation import evaluate
from antkv_hf.specs import VQSpec

S1, S2, S3 = (VQSpec(4, 4, stages) for stages in (1, 2, 3))


def residual_codebook(work_dir=None, candidates=("d4b4s3",), bits=3.0):
    return calibrate(
        small_llama(), word_tokenizer(), [small_text()], AnTKVConfig(window=16), tokens=512, window=64, samples=400,
        iterations=3, progress=False, mixed=Mixed(bits, candidates, 2, ("S16",)), work_dir=work_dir,
    )  # fmt: skip


def with_losses(book: AnTKVCodebook, losses: dict[str, dict[VQSpec, list[float]]]) -> AnTKVCodebook:
    record = {"layers": [0, 1], **{role: {str(s): v for s, v in costs.items()} for role, costs in losses.items()}}
    return AnTKVCodebook(book.config, book.tables, book.model, {"sensitivity": record})


def test_the_stages_that_matter_least_go(tmp_path):
    book = residual_codebook(tmp_path)
    stage = book.tables[0][0].centroids[:, :, 0].numel() * book.tables[0][0].centroids.element_size()
    losses = {
        "key": {S3: [1.0, 1.0], S2: [1.1, 3.0], S1: [9.0, 9.0]},
        "value": {S3: [1.0, 1.0], S2: [1.2, 1.3], S1: [1.25, 9.0]},
    }
    found = drop_stages(with_losses(book, losses), book.tables_bytes() - 4 * stage + 1)
    # key 0 for 0.1, value 0 for 0.2 and then 0.05, value 1 for 0.3
    assert found.config.layer_specs == {0: (S2, S1), 1: (S3, S2)}
    assert found.tables_bytes() == book.tables_bytes() - 4 * stage
    assert found.calibration["drop_stages"] == {"stages": 4, "loss": [4.0, 4.65]}
    for layer, specs in found.config.layer_specs.items():
        for old, new, spec in zip(book.tables[layer], found.tables[layer], specs):
            assert torch.equal(new.centroids, old.centroids[:, :, : spec.stages])
    assert sum(found.config.bits([0, 1])) == sum(book.config.bits([0, 1])) - 2.0
    row = evaluate(small_llama(), None, torch.randint(3, 99, (1, 64)), found, protocols=["W0"])[0]
    assert row.perplexity > 0
    assert drop_stages(book, book.tables_bytes()) is book
    # A table without its last stage is what fewer stages learn.
    fewer = residual_codebook(tmp_path, ("d4b4s2",), 2.0)
    assert torch.equal(fewer.tables[1][0].centroids, book.tables[1][0].centroids[:, :, :2])


def test_losses_of_other_specs_follow_from_their_bits():
    measured = {VQSpec(8, 4): 0.4, VQSpec(4, 4): 0.1, VQSpec(8, 4, 2): 0.2, VQSpec(2, 4): 0.025}  # 0.5, 1, 1 and 2 bits
    assert _loss(measured, VQSpec(8, 4, 2)) == 0.2
    assert _loss(measured, VQSpec(16, 4, 4)) == 0.1  # the best of 1 bit
    assert _loss(measured, VQSpec(8, 6, 2)) == pytest.approx(0.05)  # 1.5 bits
    assert _loss(measured, VQSpec(16, 4)) == pytest.approx(0.8)  # 0.25 bits
    assert _loss(measured, VQSpec(4, 4, 3)) == pytest.approx(0.00625)  # 3 bits
    assert _loss({VQSpec(4, 4, 3): 0.3}, VQSpec(4, 4)) == 0.3


def test_what_cannot_be_made_smaller_is_refused():
    book = residual_codebook()
    with pytest.raises(ValueError, match=r"1,000 bytes are too few: with one stage in every layer .* take [\d,]{5,}"):
        drop_stages(book, 1000)
    plain = AnTKVCodebook(book.config, book.tables, book.model, {})
    with pytest.raises(ValueError, match="says nothing of what each layer's codes lose.*--mixed"):
        drop_stages(plain, 1000)
    tuned = AnTKVCodebook(book.config, book.tables, book.model, {**book.calibration, "finetune": {}})
    with pytest.raises(ValueError, match="drop stages first, then fine-tune"):
        drop_stages(tuned, 1000)
    for fits in (plain, tuned):
        assert drop_stages(fits, fits.tables_bytes()) is fits


def test_command(place, tmp_path):  # noqa: F811
    """--max-table-mb drops stages and measures the noise anew, which has grown."""
    model, text = place / "model", place / "text.txt"
    sizes = ("--tokens", 2048, "--window", 256, "--samples", 512, "--set", "window=64", "--device", "cpu")
    antkv("calibrate", model, text, "--mixed", 2, "--candidate", "d8b8s2", "-o", tmp_path / "large", *sizes)
    large = AnTKVCodebook.from_pretrained(tmp_path / "large")
    limit = large.tables_bytes() / 1e6 * 0.8
    antkv(
        "calibrate", model, text, "--from", tmp_path / "large", "--max-table-mb", limit, "-o", tmp_path / "small",
        "--window", 256, "--device", "cpu",
    )  # fmt: skip
    small = AnTKVCodebook.from_pretrained(tmp_path / "small")
    assert small.tables_bytes() <= limit * 1e6
    changed = [i for i, (key, _) in small.config.layer_specs.items() if key == replace(key, stages=1)]
    for layer in changed:
        assert small.tables[layer][0].noise.diagonal(dim1=-2, dim2=-1).sum() > (
            large.tables[layer][0].noise.diagonal(dim1=-2, dim2=-1).sum()
        )
    assert changed or any(value.stages == 1 for _, value in small.config.layer_specs.values())
    # The same limit while bits are spread: what is stored fits, and tables that do not are refused with their bytes.
    mixed = ("--mixed", 2, "--candidate", "d8b8s2", "--candidate", 1, "--sensitivity-windows", 1)
    antkv("calibrate", model, text, *mixed, "--max-table-mb", limit, "-o", tmp_path / "within", *sizes)
    within = AnTKVCodebook.from_pretrained(tmp_path / "within")
    stages = {spec.stages for specs in within.config.layer_specs.values() for spec in specs}
    assert within.tables_bytes() <= limit * 1e6 and stages == {1, 2}
    refused = error_of("calibrate", model, text, *mixed, "--max-table-mb", 0.01, "-o", tmp_path / "no", *sizes)
    assert "10,000 bytes are too few: at 2 bits" in refused
    for wrong in (0, -1, "nan", "inf"):
        refused = error_of("calibrate", model, text, *mixed, "--max-table-mb", wrong, "-o", tmp_path / "no", *sizes)
        assert "is no size of tables: give e.g. 12" in refused
    for asked in ((), ("--bits", 1), ("--bits", 1, *mixed)):
        refused = error_of("calibrate", model, text, *asked, "--max-table-mb", 5, "-o", tmp_path / "no")
        assert "a limit of --mixed (not of --bits)" in refused and "name it with --from" in refused
