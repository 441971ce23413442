"""The downloader against a local server that speaks the hub's protocol: layout, checks, resumption, and every fault."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time

import contest_writer
import hub as local
import pytest
from conftest import ROOT, load_by_path, write_shard

pytest.importorskip("huggingface_hub", reason="pip install -r data/requirements.txt")
SCRIPT = ROOT / "data" / "cached_challenge_fineweb.py"
fetcher = load_by_path("cached_challenge_fineweb", SCRIPT)
SET, PLACE = "datasets/datasets/fineweb10B_sp64", "datasets/fineweb10B_sp64"
TRAIN, VAL = [f"fineweb_train_{i:06d}.bin" for i in range(3)], "fineweb_val_000000.bin"
cut, wrong, busy, missing = local.cut, local.wrong, local.busy, local.missing


@pytest.fixture
def remote(tmp_path_factory, monkeypatch):
    """A published data set of three training shards, one validation shard with sidecar, tokenizers, documents, a
    manifest.
    """
    root = tmp_path_factory.mktemp("remote")
    for i, name in enumerate([*TRAIN, VAL, "fineweb_val_bytes_000000.bin"]):
        write_shard(root / SET / name, [1, 5, 6, i + 7] * 500)
    write_shard(root / "datasets/datasets/fineweb10B_sp6/fineweb_val_000000.bin", [1, 5])
    for name, text in {
        "tokenizers/fineweb_64_bpe.model": "model",
        "tokenizers/fineweb_64_bpe.vocab": "vocabulary",
        "tokenizers/fineweb_6_bpe.model": "another",
        "manifest.json": '{"num_docs": 3}',
        "docs_selected.jsonl": '{"text": "a"}\n',
        "docs_selected.source_manifest.json": '{"num_docs": 1}',
    }.items():
        (root / "datasets" / name).parent.mkdir(exist_ok=True)
        (root / "datasets" / name).write_text(text)
    server = local.Hub(root)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(
        "huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000
    )  # what the library holds back; really 10 MB
    nap = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: nap(min(seconds, 0.01)))
    yield server
    server.close()


def fetch(folder, *more, variant="sp64", shards="2") -> int:
    return fetcher.main(
        ["--repo", "owner/name", "--variant", variant, "--train-shards", shards, "--data-dir", str(folder), *more]
    )


def visible(folder) -> set[str]:
    """Names that a glob or a person would see."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}


WANTED = {f"{PLACE}/{name}" for name in (*TRAIN[:2], VAL, "fineweb_val_bytes_000000.bin")} | {
    "tokenizers/fineweb_64_bpe.model",
    "tokenizers/fineweb_64_bpe.vocab",
}


def test_files_land_in_the_layout_that_training_reads(remote, tmp_path):
    assert fetch(tmp_path / "data") == 0
    assert visible(tmp_path / "data") == WANTED | {"manifest.json"}
    for place in WANTED:
        assert (tmp_path / "data" / place).read_bytes() == (remote.root / "datasets" / place).read_bytes()


def test_the_manifest_knows_size_hash_and_revision_of_every_file(remote, tmp_path):
    fetch(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert set(manifest["files"]) == WANTED and manifest["upstream"]["owner/name"]["manifest"] == {"num_docs": 3}
    entry = manifest["files"]["tokenizers/fineweb_64_bpe.vocab"]  # a small file: the hub has no sha256 of it
    assert entry["revision"] == local.COMMIT and entry["file_bytes"] == len("vocabulary")
    assert fetcher.verify(tmp_path) == 0


def test_a_stale_publishers_manifest_is_refreshed_and_can_be_skipped(remote, tmp_path):
    fetch(tmp_path / "with")
    (remote.root / "datasets/manifest.json").write_text('{"num_docs": 4}')
    fetch(tmp_path / "with")
    fetch(tmp_path / "without", "--skip-manifest")
    manifests = [json.loads((tmp_path / place / "manifest.json").read_text()) for place in ("with", "without")]
    assert manifests[0]["upstream"]["owner/name"]["manifest"] == {"num_docs": 4} and not manifests[1]["upstream"]


def test_documents_come_when_asked_for(remote, tmp_path):
    fetch(tmp_path, "--with-docs")
    assert {"docs_selected.jsonl", "docs_selected.source_manifest.json"} <= visible(tmp_path)


def test_what_is_whole_is_not_fetched_again_and_what_is_not_is(remote, tmp_path):
    fetch(tmp_path)
    damaged = tmp_path / PLACE / TRAIN[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    remote.requests.clear()
    fetch(tmp_path, "--skip-manifest")
    assert remote.fetched() == [f"{SET}/{TRAIN[1]}"] and fetcher.verify(tmp_path) == 0


def test_a_file_that_changed_at_the_publishers_is_fetched_again(remote, tmp_path):
    fetch(tmp_path)
    write_shard(remote.root / SET / VAL, [1, 9, 9, 9] * 500)  # same size, other tokens
    remote.requests.clear()
    fetch(tmp_path, "--skip-manifest")
    assert remote.fetched() == [f"{SET}/{VAL}"]
    assert (tmp_path / PLACE / VAL).read_bytes() == (remote.root / SET / VAL).read_bytes()


@pytest.mark.parametrize("sidecar", [True, False])
def test_caseops_sets_without_sidecars_are_warned_of(remote, tmp_path, capsys, sidecar):
    """Their scores would be 3 to 12 % too good."""
    made = contest_writer.write_caseops(tmp_path / "made", contest_writer.sample_documents(40, 2), sidecar=sidecar)
    for place in remote.root.rglob("fineweb_val_*.bin"):
        place.unlink()
    for path in (tmp_path / "made").glob("fineweb_val_*.bin"):
        (remote.root / SET / path.name).write_bytes(path.read_bytes())
    for place in remote.root.rglob("fineweb_64_bpe.model"):
        place.write_bytes(made["tokenizer"].read_bytes())
    assert fetch(tmp_path / "data", "--skip-manifest") == 0
    assert (
        bool(re.search(r"warning: .*sp64: [\d,]+ validation tokens are case operators", capsys.readouterr().out))
        != sidecar
    )


@pytest.mark.parametrize(
    "foreign", [{"datasets": [{"name": "fineweb10B_sp64"}]}, {"version": "10B", "files": ["a.bin"], "upstream": {}}]
)
def test_another_tools_manifest_is_kept_and_not_believed(remote, tmp_path, capsys, foreign):
    """The contest's own scripts put a manifest.json at the same place."""
    (tmp_path / "manifest.json").write_text(json.dumps(foreign))
    with pytest.raises(SystemExit, match="knows no files that this script fetched"):
        fetcher.verify(tmp_path)
    assert fetch(tmp_path, "--skip-manifest") == 0 and "it is kept as" in capsys.readouterr().out
    assert json.loads((tmp_path / "manifest.other.json").read_text()) == foreign and fetcher.verify(tmp_path) == 0


def test_files_that_were_there_before_the_manifest_are_hashed_not_believed(remote, tmp_path):
    fetch(tmp_path)
    (tmp_path / "manifest.json").unlink()
    write_shard(tmp_path / PLACE / TRAIN[0], [1, 2, 3, 4] * 500)  # sound header and size, wrong tokens
    remote.requests.clear()
    fetch(tmp_path, "--skip-manifest")
    assert remote.fetched() == [f"{SET}/{TRAIN[0]}"] and fetcher.verify(tmp_path) == 0


def test_verify_finds_any_altered_byte_without_a_network(remote, tmp_path, capsys):
    fetch(tmp_path)
    remote.close()
    for place in sorted(WANTED):
        path = tmp_path / place
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
        capsys.readouterr()
        assert fetcher.main(["--verify", "--data-dir", str(tmp_path)]) == 1
        assert place in capsys.readouterr().out
        path.write_bytes(data)
    assert fetcher.main(["--verify", "--data-dir", str(tmp_path)]) == 0


def test_what_verify_found_damaged_is_fetched_again(remote, tmp_path):
    """Header and size are sound and the manifest knew the file as whole, so only its content can tell."""
    fetch(tmp_path)
    path = tmp_path / PLACE / TRAIN[1]
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    assert fetcher.verify(tmp_path) == 1
    remote.requests.clear()
    assert fetch(tmp_path, "--skip-manifest") == 0 and remote.fetched() == [f"{SET}/{TRAIN[1]}"]
    assert fetcher.verify(tmp_path) == 0 and "damaged" not in (tmp_path / "manifest.json").read_text()


def test_verify_names_a_missing_file_and_an_empty_folder(remote, tmp_path, capsys):
    with pytest.raises(SystemExit, match="knows no files"):
        fetcher.verify(tmp_path / "nothing")
    fetch(tmp_path)
    (tmp_path / PLACE / VAL).unlink()
    assert fetcher.verify(tmp_path) == 1 and f"{VAL}: missing" in capsys.readouterr().out


@pytest.mark.parametrize("fault, times", [(cut, 1), (cut, 4), (busy, 1), (busy, 3)])
def test_a_passing_fault_is_outlived(fault, times, remote, tmp_path):
    remote.plant(TRAIN[1], fault, times)
    assert fetch(tmp_path) == 0 and not remote.faults
    assert fetcher.verify(tmp_path) == 0


def test_a_cut_connection_goes_on_from_the_byte_where_it_was_cut(remote, tmp_path):
    remote.plant(f"/cdn/x/x/x/x/{SET}/{VAL}", cut)
    fetch(tmp_path)
    ranges = [r for path, r in remote.requests if path.startswith("/cdn") and path.endswith(VAL) and "sp64" in path]
    assert ranges == ["", "bytes=2000-"]  # of 2,512 that were sent; the library passes on whole chunks


def test_a_busy_hub_is_outlived_in_the_listing_too(remote, tmp_path):
    remote.plant("/revision/main", busy, 2)
    remote.plant(f"/tree/{local.COMMIT}", busy, 2)
    assert fetch(tmp_path) == 0 and not remote.faults


def test_wrong_bytes_are_fetched_again_once(remote, tmp_path):
    remote.plant(f"/cdn/x/x/x/x/{SET}/{VAL}", wrong)
    assert fetch(tmp_path) == 0 and fetcher.verify(tmp_path) == 0


def test_bytes_that_stay_wrong_never_get_their_name(remote, tmp_path):
    remote.plant(f"/cdn/x/x/x/x/{SET}/{VAL}", wrong, 9)
    with pytest.raises(
        SystemExit, match=rf"{VAL} .*damaged twice: its sha256(.|\n)*1 files are missing; run this again"
    ):
        fetch(tmp_path)
    assert visible(tmp_path) == WANTED - {f"{PLACE}/{VAL}"} | {"manifest.json"}, "the other files are kept"


@pytest.mark.parametrize("damage", [lambda b: b[:-2], lambda b: b"\0" * 8 + b[8:], lambda b: b""])
def test_a_shard_that_was_published_damaged_never_gets_its_name(damage, remote, tmp_path):
    shard = remote.root / SET / VAL
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(SystemExit, match=f"{VAL}.*damaged"):
        fetch(tmp_path / "data")
    assert f"{PLACE}/{VAL}" not in visible(tmp_path / "data")


def test_a_file_that_is_listed_and_missing_is_named_and_the_rest_comes(remote, tmp_path):
    remote.plant(f"resolve/{local.COMMIT}/{SET}/{TRAIN[0]}", missing, 9)
    with pytest.raises(SystemExit, match=f"{TRAIN[0]}"):
        fetch(tmp_path)
    assert visible(tmp_path) == WANTED - {f"{PLACE}/{TRAIN[0]}"} | {"manifest.json"}
    remote.faults.clear()
    remote.requests.clear()
    assert fetch(tmp_path, "--skip-manifest") == 0 and remote.fetched() == [f"{SET}/{TRAIN[0]}"]


def test_a_hub_that_is_away_is_named(remote, tmp_path):
    remote.close()
    with pytest.raises(SystemExit, match="data set owner/name: "):
        fetch(tmp_path)


def test_too_small_a_disk_is_seen_before_anything_is_fetched(remote, tmp_path, monkeypatch):
    usage = fetcher.shutil.disk_usage(tmp_path)._replace(free=fetcher.SPARE_BYTES + 10_000)
    monkeypatch.setattr(fetcher.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SystemExit, match=r"0\.00 GB are to be fetched, 0\.10 GB are free; --train-shards"):
        fetch(tmp_path, "--skip-manifest")
    assert not remote.fetched()


def test_a_disk_that_fills_up_on_the_way_is_named_and_keeps_what_has_come(remote, tmp_path, monkeypatch):
    def full(self, data):
        self.file.write(data[:3000])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fetcher.Counting, "write", full)
        with pytest.raises(SystemExit, match="the disk is full; what has come is kept"):
            fetch(tmp_path, "--skip-manifest", "--workers", "1")
    assert not visible(tmp_path) - {"manifest.json"}
    remote.requests.clear()
    assert fetch(tmp_path) == 0 and "bytes=1000-" in {r for _, r in remote.requests}


def test_a_killed_download_goes_on_where_it_was(remote, tmp_path):
    """SIGKILL in the middle of a file: nothing under its final name, and only the rest is fetched by the next run."""
    halted, go = threading.Event(), threading.Event()

    def stall(handler, path):
        data = path.read_bytes()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:23_000_000])
        halted.set()
        go.wait(20)
        handler.close_connection = True

    write_shard(remote.root / SET / VAL, [1] * 12_000_000)
    remote.plant(f"/cdn/x/x/x/x/{SET}/{VAL}", stall)
    command = [
        sys.executable,
        str(SCRIPT),
        "--repo",
        "owner/name",
        "--variant",
        "sp64",
        "--train-shards",
        "0",
        "--skip-manifest",
        "--data-dir",
        str(tmp_path),
    ]
    run = subprocess.Popen(
        command,
        env={**os.environ, "HF_ENDPOINT": remote.url, "HF_HUB_DOWNLOAD_TIMEOUT": "20"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    partial, deadline = tmp_path / PLACE / f".{VAL}.partial", time.monotonic() + 20
    while time.monotonic() < deadline and not (halted.is_set() and partial.is_file() and partial.stat().st_size > 0):
        threading.Event().wait(0.02)
    run.kill()
    run.wait()
    go.set()
    size = partial.stat().st_size
    assert 0 < size < 24_001_024 and f"{PLACE}/{VAL}" not in visible(tmp_path)
    remote.requests.clear()
    assert fetch(tmp_path, "--skip-manifest", shards="0") == 0
    assert (
        f"bytes={size}-" in {r for path, r in remote.requests if path.endswith(VAL)} and fetcher.verify(tmp_path) == 0
    )


def test_an_unknown_variant_is_named_with_those_there_are(remote, tmp_path):
    with pytest.raises(SystemExit, match=r"no fineweb10B_sp7 .*\['sp6', 'sp64'\]"):
        fetch(tmp_path, variant="sp7")


def test_fewer_shards_than_asked_for_are_said(remote, tmp_path, capsys):
    assert (
        fetch(tmp_path, shards="80") == 0 and "3 training shards of sp64, 80 were asked for" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "variant, names, expected",
    [
        (
            "sp8192",
            ["a/fineweb_8192_bpe.model", "a/fineweb_8192_bpe_caps_v1.model", "a/fineweb_1024_bpe.model"],
            ["a/fineweb_8192_bpe.model"],
        ),
        (
            "sp8192_caps_v1",
            ["a/fineweb_8192_bpe.model", "a/fineweb_8192_bpe_caps_v1.model"],
            ["a/fineweb_8192_bpe_caps_v1.model"],
        ),
        ("sp8192_other", ["a/fineweb_8192_bpe.model", "a/b_81920.model"], ["a/fineweb_8192_bpe.model"]),
        ("byte260", ["a/fineweb_pure_byte_260.json", "a/manifest_260.json"], ["a/fineweb_pure_byte_260.json"]),
        ("odd", ["a/x_1.model"], []),
    ],
)
def test_tokenizers_of_other_publishers_are_found(variant, names, expected):
    assert fetcher.tokenizers(names, variant) == expected


def test_without_the_library_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit, match="pip install -r data/requirements.txt"):
        fetch(tmp_path)
