"""Arguments that cannot be meant: refused where they are given, with the value and what to give instead."""

from __future__ import annotations

import pytest
from helpers import random_codebook

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig, VQSpec, antkv_generate, calibrate
from antkv_hf.config import AnchorConfig


@pytest.fixture(scope="module")
def codebook(llama):
    return random_codebook(llama, AnTKVConfig(VQSpec(4, 8), VQSpec(4, 8), window=8, chunk=16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnTKVConfig(window=0), "window=0 must be at least 1"),
        (lambda: AnTKVConfig(window=-5), "window=-5"),
        (lambda: AnTKVConfig(chunk=0), "chunk=0"),
        (lambda: AnTKVConfig.preset("3bit"), "3 bits per element do not exist.*4, 2, 1.25, 1"),
        (lambda: AnTKVConfig.preset("1bit", key="7"), "7 bits"),
        (lambda: AnTKVConfig(rope="post"), "'post' is unknown"),
        (lambda: AnTKVConfig(rope="block"), "reserved"),
        (lambda: AnTKVConfig(skip_layers=(-1,)), "negative"),
        (lambda: AnTKVConfig(key=None), "keys None and values d8b8: .*both be None"),
        (lambda: VQSpec(8, 9), "code_bits=9 does not exist"),
        (lambda: VQSpec(0), "sub_dim=0"),
        (lambda: VQSpec(8, 8, 0), "stages=0"),
        (lambda: VQSpec.parse("8x8"), "d8b8"),
        (lambda: VQSpec(32, 8).groups(80), "head_dim 80 is not a multiple of sub_dim 32"),
        (
            lambda: AnTKVConfig().replace(windw=3),
            "unknown config field 'windw'.*window.*anchor_<field of AnchorConfig>",
        ),
        (lambda: AnTKVConfig.from_dict({"anchors": {"scor": "none"}}), "unknown config field 'scor'.*score"),
        (lambda: AnchorConfig(fraction=1.5), "1.5 must lie between 0 and 1"),
        (lambda: AnchorConfig(dtype="int4"), "'int4' is unknown"),
        (lambda: AnchorConfig(sinks=-1), "sinks=-1"),
        (lambda: AnTKVConfig(window="64"), "window='64' must be a whole number, e.g. window=128"),
        (lambda: AnTKVConfig(window=None), "window=None must be a whole number"),
        (lambda: AnTKVConfig(window=8.5), "window=8.5 must be a whole number"),
        (lambda: AnTKVConfig(chunk=16.0), "chunk=16.0 must be a whole number, e.g. chunk=128"),
        (lambda: AnTKVConfig().replace(anchor_query_stride=2.5), "query_stride=2.5 must be a whole number"),
        (lambda: AnTKVConfig().replace(anchor_sinks=1.5), "sinks=1.5 must be a whole number, e.g. sinks=4"),
        (lambda: AnTKVConfig().replace(anchor_fraction="0.1"), "fraction='0.1' must be a number, e.g. fraction=0.02"),
        (lambda: AnTKVConfig.from_dict({"window": "8"}), "window='8' must be a whole number"),
        (lambda: AnTKVConfig(skip_layers="0"), r"skip_layers='0' must be layer numbers, e.g. \[0, 1\]"),
        (lambda: AnTKVConfig(skip_layers=0), "skip_layers=0 must be layer numbers"),
        (lambda: AnTKVConfig(skip_layers=(0, 1.5)), r"skip_layers=\(0, 1.5\) must be layer numbers"),
        (lambda: AnTKVConfig(anchors="none"), "anchors='none' must be an AnchorConfig"),
        (lambda: AnTKVConfig(layer_specs=[1]), r"layer_specs=\[1\] must be"),
        (lambda: AnTKVConfig(key=4), r"key=4 must be a codec spec, e.g. VQSpec.parse\('d8b8'\)"),
        (lambda: AnTKVConfig(key="7"), "cannot read codec spec '7'"),
        (lambda: VQSpec(8.0), "sub_dim=8.0 must be a whole number"),
        (lambda: AnTKVConfig.preset("1bit", windw=3), "unknown config field 'windw'"),
        (
            lambda: AnTKVConfig.preset("ott-2bit", anchor_fractoin=0.1),
            "unknown config field 'anchor_fractoin'.*anchor_fraction",
        ),
    ],
)
def test_config_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_specs_as_text_and_anchor_fields_of_presets():
    """Text is read, not kept: as text it differed from every codebook's spec of the same name."""
    assert AnTKVConfig(key="d4b8", value="d4b8") == AnTKVConfig(VQSpec(4, 8), VQSpec(4, 8))
    assert AnTKVConfig(layer_specs={1: ("d4b8", "d16b8")}).specs(1) == (VQSpec(4, 8), VQSpec(16, 8))
    assert AnTKVConfig(skip_layers=[2, 0, 2]).skip_layers == (0, 2)
    for name in ("1bit", "ott-2bit", "identity"):
        changed = AnTKVConfig.preset(name, anchor_fraction=0.1, window=9)
        assert changed == AnTKVConfig.preset(name).replace(anchor_fraction=0.1, window=9)
        assert changed.anchors.fraction == 0.1 and changed.window == 9


def test_arguments_of_another_kind(llama, codebook, tmp_path):
    for make, message in (
        (lambda: AnTKVCache(llama), r"model_config is a LlamaForCausalLM: give the config, AnTKVCache\(model.config"),
        (
            lambda: AnTKVCache(llama.config, codebook="a/b"),
            r"codebook='a/b' is a name: AnTKVCache.from_pretrained\('a/b'",
        ),
        (
            lambda: AnTKVCache(llama.config, "ott-2bit"),
            r"config='ott-2bit' is text: give AnTKVConfig.preset\('ott-2bit'",
        ),
        (lambda: AnTKVCache(llama.config, 3), "config is of type int"),
        (lambda: AnTKVCache.from_pretrained("a/b", config="1bit"), "config='1bit' is text"),
        (lambda: antkv_generate(config="ott-2bit"), "config='ott-2bit' is text"),
        (
            lambda: antkv_generate(llama, "a/b"),
            r"codebook is a LlamaForCausalLM: .*custom_generate=antkv_generate\(repo",
        ),
        (lambda: AnTKVConfig.preset(1), r"preset 1 must be a name, e.g. AnTKVConfig.preset\('1bit'\)"),
        (lambda: AnTKVCache.load(tmp_path / "x", "book"), r"model is 'book', not a transformers model.*codebook="),
        (lambda: AnTKVCache.fit(llama.config, 9, "1GB"), r"model is a LlamaConfig.*AnTKVConfig.fit\(model.config"),
        (lambda: AnTKVCache.fit(None, 9, "1GB"), r"model is None, not a transformers model: for a config there is"),
        (lambda: calibrate(llama, None, ["text"], "1bit"), r"config='1bit' is text: give AnTKVConfig.preset\('1bit'\)"),
    ):
        with pytest.raises(TypeError, match=message):
            make()
    for make in (AnTKVCache, lambda config, **options: antkv_generate(**options)):
        for wrong in ("32k", 50.5):
            with pytest.raises(ValueError, match=f"max_length={wrong!r} must be a whole number, e.g. max_length=4096"):
                make(llama.config, codebook=codebook, max_length=wrong)


def test_names_that_are_no_codebook():
    """Each was taken for a Hub repo that had to be loaded once online."""
    for name, message in (
        (
            "ott-2bit",
            r"'ott-2bit' is a preset that needs no codebook: AnTKVCache\(model.config, AnTKVConfig.preset\('ott",
        ),
        ("identity", r"'identity' is a preset.*antkv_generate\(config=AnTKVConfig.preset\('identity'\)\)"),
        (
            "1bit",
            "no codebook '1bit': it is a rate, which needs the codebook of a model, e.g. smollm2-135m-instruct-1bit",
        ),
        ("nope", r"no codebook 'nope': it is no folder, no Hub repo id.*shipped: .*smollm2-135m-instruct-2bit"),
    ):
        for make in (AnTKVCache.from_pretrained, AnTKVCodebook.from_pretrained, antkv_generate):
            with pytest.raises(FileNotFoundError, match=message):
                make(name)


def test_budgets_that_are_none(llama):
    for changes, message in (
        (dict(among="ott-2bit"), r"among='ott-2bit' is one name: give a list, among=\['ott-2bit'\]"),
        (dict(among=[0.5]), r"among holds 0.5: give presets, codebooks or configs"),
        (dict(tokens="128K"), "tokens='128K' must be a whole number, e.g. tokens=131072"),
        (dict(tokens=1.5), "tokens=1.5 must be a whole number"),
        (dict(batch=2.0), "batch=2.0 must be a whole number, e.g. batch=1"),
    ):
        with pytest.raises(ValueError, match=message):
            AnTKVCache.fit(llama, **{**dict(tokens=9, bytes="1GB", among=["ott-2bit"]), **changes})
