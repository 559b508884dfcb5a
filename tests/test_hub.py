"""Codebooks on the Hub: what a push makes, and every way to load it, against a server that speaks the Hub's HTTP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch
from conftest import tiny_llama
from helpers import random_codebook
from hub_stand_in import TOKEN, HubStandIn
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from test_calibration import calibrated, small_llama
from test_cli import character_tokenizer
from typer.testing import CliRunner

from antkv_hf import AnTKVCache, AnTKVCodebook, AnTKVConfig
from antkv_hf.cli import app
from antkv_hf.evaluation import EvaluationRow, with_rows

REPO = "someone/tiny-1bit"
ROW = EvaluationRow("d8b8/d8b8", "S128", "wiki.txt", 12, 2048, 2047, 21.7634, 1.0664, 1.233, 3.172, 9.2)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that this process takes for the Hub, logged in, with an empty cache."""
    stand_in = HubStandIn()
    changes = dict(
        ENDPOINT=stand_in.url, HUGGINGFACE_CO_URL_HOME=stand_in.url + "/",
        HUGGINGFACE_CO_URL_TEMPLATE=stand_in.url + "/{repo_id}/resolve/{revision}/{filename}",
        HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True, HF_HUB_CACHE=str(tmp_path / "hub"),
    )  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield stand_in
    stand_in.close()


@pytest.fixture(scope="module")
def codebook(llama) -> AnTKVCodebook:
    made = {"sources": ["wiki.txt (100%)"], "tokens": 4096, "date": "2026-11-22", "license": "apache-2.0"}
    book = random_codebook(llama, AnTKVConfig.preset("1bit", window=32, chunk=16))
    return AnTKVCodebook(book.config, book.tables, {**book.model, "base_model": "someone/tiny"}, made)


def other(codebook, seed: int = 7) -> AnTKVCodebook:
    """Other tables of the same model."""
    tables = random_codebook(tiny_llama(), codebook.config, seed).tables
    return AnTKVCodebook(codebook.config, tables, codebook.model, codebook.calibration)


def test_a_push_makes_a_complete_repo(hub, codebook):
    measured = with_rows(codebook, [ROW])
    url = measured.push_to_hub(REPO)
    repo = hub.repos[REPO]
    head = repo.branches["main"]
    assert str(url) == f"{hub.url}/{REPO}/commit/{head}"
    assert repo.messages == ["initial commit", "Codebook of someone/tiny: d8b8/d8b8"]
    files = repo.commits[head]
    assert set(files) == {".gitattributes", "README.md", "config.json", "codebooks.safetensors"}
    config = json.loads(files["config.json"][1])
    is_lfs, oid = files["codebooks.safetensors"]
    assert is_lfs and oid == config["tables"]["sha256"] and len(hub.objects[oid]) == config["tables"]["bytes"]
    assert any(call.startswith("PUT /lfs/") for call in hub.calls) and f"POST /lfs/{oid}/verify" in hub.calls
    card = ModelCard(files["README.md"][1].decode())
    assert card.data.to_dict() == {
        "library_name": "antkv-hf", "base_model": "someone/tiny", "license": "apache-2.0",
        "tags": ["kv-cache", "quantization", "antkv"],
    }  # fmt: skip
    assert "| d8b8/d8b8 | S128 | wiki.txt | 12 x 2048 | 21.763 | 1.0664 | 1.233 | 3.172 | 9.2 |" in card.text
    assert f'AnTKVCache.from_pretrained("{REPO}", model=model)' in card.text and "- tokens: 4096" in card.text


def test_the_usage_of_the_card_runs(hub, codebook, llama, tmp_path, monkeypatch, capsys):
    """As it stands; the model itself lies in a folder of that name, since only the codebook is on the stand-in."""
    codebook.push_to_hub(REPO)
    card = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]["README.md"][1].decode()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    llama.save_pretrained(tmp_path / "someone" / "tiny")
    character_tokenizer().save_pretrained(tmp_path / "someone" / "tiny")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.startswith("The lighthouse") and "tables, shared by all caches" in said


def test_push_edit_push_and_every_revision(hub, codebook):
    api = HfApi()
    codebook.push_to_hub(REPO)
    first = hub.repos[REPO].branches["main"]
    api.create_branch(REPO, branch="old")
    changed = other(codebook)
    changed.push_to_hub(REPO)
    second = hub.repos[REPO].branches["main"]
    assert len(hub.objects) == 2 and first != second
    for revision, expected, commit in (
        (None, changed, second), ("main", changed, second), ("old", codebook, first), (first, codebook, first),
        (second, changed, second),
    ):  # fmt: skip
        loaded = AnTKVCodebook.from_pretrained(REPO, revision=revision)
        assert loaded.sha256 == expected.sha256 and loaded.calibration == expected.calibration
        assert loaded.source == {"name_or_path": REPO, "revision": commit}
    with_rows(changed, [ROW]).push_to_hub(REPO)  # the tables are there already: only config and card go up
    assert len(hub.objects) == 2 and sum(call.startswith("PUT") for call in hub.calls) == 2
    assert AnTKVCodebook.from_pretrained(REPO).evaluation == [ROW.to_dict()]
    codebook.push_to_hub(REPO, branch="old", commit_message="again")
    assert hub.repos[REPO].messages[-1] != "again", "nothing had changed"


def test_a_cache_finds_its_codebook_after_another_push(hub, codebook, llama, tmp_path):
    codebook.push_to_hub(REPO)
    cache = AnTKVCache.from_pretrained(REPO, window=8)
    ids = torch.randint(3, 128, (1, 60), generator=torch.Generator().manual_seed(0))
    llama.generate(ids, past_key_values=cache, max_new_tokens=4)
    cache.save(tmp_path / "cache.safetensors")
    other(codebook).push_to_hub(REPO)
    assert AnTKVCache.load(tmp_path / "cache.safetensors").codebook.sha256 == codebook.sha256


def test_a_repo_of_one_files_commit(hub, codebook, monkeypatch):
    """A push between the two downloads does not mix commits."""
    codebook.push_to_hub(REPO)
    import antkv_hf.hub_files as hub_files

    original, names = hub_files.hf_hub_download, []

    def pushing(repo_id, name, **options):
        path = original(repo_id, name, **options)
        if not names:
            other(codebook).push_to_hub(REPO)
        names.append(name)
        return path

    monkeypatch.setattr(hub_files, "hf_hub_download", pushing)
    assert AnTKVCodebook.from_pretrained(REPO).sha256 == codebook.sha256
    assert names == ["config.json", "codebooks.safetensors"]


def test_offline_after_one_download(hub, codebook, monkeypatch, tmp_path):
    codebook.push_to_hub(REPO)
    with pytest.raises(FileNotFoundError, match=f"config.json of Hub repo {REPO} is not in the cache .*load it once"):
        AnTKVCodebook.from_pretrained(REPO, local_files_only=True)
    commit = AnTKVCodebook.from_pretrained(REPO).source["revision"]
    hub.calls.clear()
    for revision in (None, "main", commit):
        loaded = AnTKVCodebook.from_pretrained(REPO, revision=revision, local_files_only=True)
        assert loaded.sha256 == codebook.sha256 and loaded.source["revision"] == commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert AnTKVCodebook.from_pretrained(REPO).sha256 == codebook.sha256
    with pytest.raises(FileNotFoundError, match="at revision 'v9' is not in the cache"):
        AnTKVCodebook.from_pretrained(REPO, revision="v9")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        AnTKVCodebook.from_pretrained(REPO, cache_dir=tmp_path / "empty")
    assert hub.calls == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.close()  # the Hub is down: what was downloaded still loads
    assert AnTKVCodebook.from_pretrained(REPO).sha256 == codebook.sha256


def test_errors_name_the_repo_and_the_way_out(hub, codebook, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no Hub repo someone/nothing that you may read.*hf auth login.*ship"):
        AnTKVCodebook.from_pretrained("someone/nothing")
    codebook.push_to_hub(REPO)
    with pytest.raises(FileNotFoundError, match=f"{REPO} has no revision 'v9': leave it out .*/{REPO}/commits/main"):
        AnTKVCodebook.from_pretrained(REPO, revision="v9")
    HfApi().create_repo("someone/empty")
    with pytest.raises(FileNotFoundError, match=r"someone/empty is no codebook, since it has no config.json.*push_to"):
        AnTKVCodebook.from_pretrained("someone/empty")
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="someone/empty")
    with pytest.raises(FileNotFoundError, match="it has no codebooks.safetensors"):
        AnTKVCodebook.from_pretrained("someone/empty")
    hub.repos[REPO].gated = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match=f"{REPO} is gated: accept its terms at {hub.url}/{REPO}.*token="):
        AnTKVCodebook.from_pretrained(REPO)
    with pytest.raises(FileNotFoundError, match="someone/nothing that you may read"):
        AnTKVCodebook.from_pretrained("someone/nothing")
    assert AnTKVCodebook.from_pretrained(REPO, token=TOKEN).sha256 == codebook.sha256
    with pytest.raises(HfHubHTTPError, match="401"):
        codebook.push_to_hub("someone/new")
    assert "someone/new" not in hub.repos


def test_what_a_card_needs_can_be_given_at_the_push(hub, llama, codebook):
    book = random_codebook(llama, codebook.config)
    book = AnTKVCodebook(book.config, book.tables, {**book.model, "base_model": "./tiny"})
    assert "base_model" not in ModelCard(book.generate_model_card().content).data.to_dict()
    assert "No licence was stated" in book.generate_model_card().content
    with pytest.raises(ValueError, match=r"'./tiny' of this codebook is no Hub id.*base_model=\"owner/name\""):
        book.push_to_hub(REPO)
    assert not hub.repos
    book.push_to_hub("tiny-1bit", base_model="someone/tiny", license="mit")  # the account's own name goes before
    loaded = AnTKVCodebook.from_pretrained(REPO)
    assert loaded.model["base_model"] == "someone/tiny" and loaded.calibration["license"] == "mit"
    card = ModelCard.load(REPO)
    assert (card.data.license, card.data.base_model) == ("mit", "someone/tiny") and f'"{REPO}"' in card.text
    assert "Not evaluated yet" in card.text


def test_damage_on_the_way_is_noticed(hub, codebook):
    codebook.push_to_hub(REPO)
    (oid,) = hub.objects
    good = hub.objects[oid]
    with pytest.raises(urllib.error.HTTPError, match="400"):  # the stand-in checks what it is given
        urllib.request.urlopen(urllib.request.Request(f"{hub.url}/lfs/{oid}", data=good[:-1], method="PUT"))
    hub.objects[oid] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(ValueError, match="sha256 .* download it again"):
        AnTKVCodebook.from_pretrained(REPO)
    hub.objects[oid] = good
    assert AnTKVCodebook.from_pretrained(REPO, force_download=True).sha256 == codebook.sha256


# -------------------------------------------------------------------- antkv inspect
def test_inspect_says_what_a_repo_holds(hub, codebook):
    with_rows(codebook, [ROW]).push_to_hub(REPO)
    commit = hub.repos[REPO].branches["main"]
    found = json.loads(CliRunner().invoke(app, ["inspect", REPO, "--json"]).stdout)
    assert (found["codebook"], found["revision"], found["sha256"]) == (REPO, commit, codebook.sha256)
    assert found["model"]["base_model"] == "someone/tiny" and found["evaluation"] == [ROW.to_dict()]
    assert [row["layer"] for row in found["layer_tables"]] == [0, 1, 2]
    assert sum(row["table_bytes"] for row in found["layer_tables"]) == found["table_bytes"] == codebook.tables_bytes()
    text = CliRunner().invoke(app, ["inspect", REPO]).stdout
    for part in (
        f"{REPO} at commit {commit}", "Codebook of someone/tiny (llama)", codebook.sha256[:16], "apache-2.0",
        "wiki.txt (100%)", "2026-11-22", "S128", "1.0664", "layers 0-2", "permutation",
    ):  # fmt: skip
        assert part in text, part
    first = hub.repos[REPO].branches["main"]
    other(codebook).push_to_hub(REPO)
    found = json.loads(CliRunner().invoke(app, ["inspect", REPO, "--revision", first, "--json"]).stdout)
    assert (found["revision"], found["sha256"]) == (first, codebook.sha256)
    missing = CliRunner().invoke(app, ["inspect", "someone/nothing"])
    assert missing.exit_code == 1 and missing.stderr.startswith("antkv: error: there is no Hub repo someone/nothing")


def test_the_environment_variable_of_a_user(hub, codebook, tmp_path):
    """Push and load in a process of its own that knows nothing but HF_ENDPOINT."""
    codebook.save_pretrained(tmp_path / "book")
    settings = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0")
    code = (
        "from antkv_hf import AnTKVCodebook as B\n"
        f"B.from_pretrained({str(tmp_path / 'book')!r}).push_to_hub({REPO!r})\n"
        f"print(B.from_pretrained({REPO!r}).sha256)"
    )
    environment = {**os.environ, **settings}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, codebook.sha256), done.stderr
    assert REPO in hub.repos


def test_calibration_notes_the_revision_of_the_model():
    model = small_llama()
    model.config._commit_hash = "0123abc"
    assert calibrated(model).calibration["model_revision"] == "0123abc"
