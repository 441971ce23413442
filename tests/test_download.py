"""The downloader against a data set in a folder that speaks the hub library's two calls, faults included."""
import shutil
import sys
import types
from pathlib import Path

import pytest
from conftest import ROOT, load_by_path, write_shard

fetcher = load_by_path("cached_challenge_fineweb", ROOT / "data" / "cached_challenge_fineweb.py")
SET = "datasets/datasets/fineweb10B_sp64"


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A published data set of three training shards, one validation shard and a tokenizer; .fetched counts downloads."""
    root = tmp_path / "remote"
    for name in ("train_000000", "train_000001", "train_000002", "val_000000"):
        (root / SET).mkdir(parents=True, exist_ok=True)
        write_shard(root / SET / f"fineweb_{name}.bin", [1, 5, 6, 7])
    (root / "datasets/tokenizers").mkdir(parents=True)
    (root / "datasets/tokenizers/fineweb_64_bpe.model").write_bytes(b"model")
    hub = types.ModuleType("huggingface_hub")
    hub.fetched = []

    class HfApi:
        def list_repo_files(self, repo, repo_type):
            return [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()]

    def hf_hub_download(repo_id, filename, repo_type, local_dir):
        hub.fetched.append(filename)
        target = Path(local_dir) / filename
        target.parent.mkdir(parents=True)
        return str(shutil.copy(root / filename, target))

    hub.HfApi, hub.hf_hub_download, hub.root = HfApi, hf_hub_download, root
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def fetch(folder, **more):
    args = {"--variant": "sp64", "--train-shards": "2", "--data-dir": str(folder), **more}
    return fetcher.main([word for pair in args.items() for word in pair])


def test_files_land_in_the_layout_that_training_reads(remote, tmp_path):
    assert fetch(tmp_path / "data") == 0
    names = sorted(str(p.relative_to(tmp_path / "data")) for p in (tmp_path / "data").rglob("*") if p.is_file())
    assert names == ["datasets/fineweb10B_sp64/fineweb_train_000000.bin", "datasets/fineweb10B_sp64/fineweb_train_000001.bin",
                     "datasets/fineweb10B_sp64/fineweb_val_000000.bin", "tokenizers/fineweb_64_bpe.model"]


def test_what_is_whole_is_not_fetched_again_and_what_is_not_is(remote, tmp_path):
    fetch(tmp_path)
    damaged = tmp_path / "datasets/fineweb10B_sp64/fineweb_train_000001.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    remote.fetched.clear()
    fetch(tmp_path)
    assert remote.fetched == [f"{SET}/fineweb_train_000001.bin"] and not fetcher.shard_problem(damaged)


@pytest.mark.parametrize("damage", [lambda b: b[:-2], lambda b: b"\0" * 8 + b[8:], lambda b: b""])
def test_a_damaged_download_never_gets_its_name(damage, remote, tmp_path):
    shard = remote.root / SET / "fineweb_val_000000.bin"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(SystemExit, match="fineweb_val_000000.bin.*damaged"):
        fetch(tmp_path / "data")
    left = {p.name for p in (tmp_path / "data").rglob("*")}
    assert "fineweb_train_000000.bin" in left and not any("val" in n or n.startswith(".fetch-") for n in left)


def test_an_unknown_variant_is_named(remote, tmp_path):
    with pytest.raises(SystemExit, match="no fineweb10B_sp7"):
        fetch(tmp_path, **{"--variant": "sp7"})


def test_without_the_library_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit, match="pip install -r data/requirements.txt"):
        fetch(tmp_path)
