"""Fetch shards and tokenizer of the contest into the layout that train_gpt.py reads.

    pip install -r data/requirements.txt
    python data/cached_challenge_fineweb.py --variant sp1024 [--train-shards 80] [--with-docs] [--repo OWNER/NAME]
    python data/cached_challenge_fineweb.py --verify

Files come from a Hugging Face data set (MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name another
one). Each is checked by size, header and the hash that the hub publishes before it gets its final name, so what lies
there under that name is whole. What is whole is not fetched again; what was cut off goes on where it ended.
data/manifest.json keeps size, sha256 and revision of every file, so that --verify can check them without a network.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path
from shards import ShardError, entry_problem, read_json, sha256_file, shard_problem, write_json

REPO = os.environ.get("MATCHED_FINEWEB_REPO_ID", "willdepueoai/parameter-golf")
PREFIX = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets")
DOCS = ("docs_selected.jsonl", "docs_selected.source_manifest.json")
SPARE_BYTES = 100 << 20  # that a download leaves free on the disk


class Remote(NamedTuple):
    """A file of a data set: its name there, size in bytes, and hash (sha256, or a small file's git blob sha1)."""

    name: str
    size: int
    sha256: str
    blob: str


def hub():
    """The huggingface_hub module; SystemExit says how to get it."""
    try:
        import huggingface_hub
    except ImportError:
        raise SystemExit("huggingface_hub is not installed; pip install -r data/requirements.txt") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are told by the bar standing still
    return huggingface_hub


class Stopped(Exception):
    """Another file has failed in a way that this one would, too."""


def passes(error: Exception) -> bool:
    """True for what may go away by itself: a busy hub, a connection that is cut or cannot be made."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 429, 500, 502, 503, 504)
    library = type(error).__module__.startswith(
        ("http", "requests", "urllib3")
    )  # of several versions of the hub library
    return library or (isinstance(error, OSError) and error.errno is None)  # a number would be the disk's


def patiently(what: str, action, *args):
    """`action(*args)`, again after 1, 2, 4 and 8 s (or when the hub says) where the error may pass; SystemExit when it
    does not.
    """
    for wait in (1, 2, 4, 8, None):
        try:
            return action(*args)
        except Exception as error:
            if isinstance(error, Stopped) or (isinstance(error, OSError) and error.errno):
                raise
            if wait is None or not passes(error):
                raise SystemExit(
                    f"{what}: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}"
                ) from None
            headers = getattr(getattr(error, "response", None), "headers", {})
            time.sleep(float(headers.get("Retry-After", wait)))


def list_remote(repo: str, revision: str) -> tuple[str, list[Remote]]:
    """(commit, files) of a data set."""
    api = hub().HfApi(endpoint=os.environ.get("HF_ENDPOINT"))

    def ask() -> tuple[str, list[Remote]]:
        commit = api.dataset_info(repo, revision=revision).sha
        tree = api.list_repo_tree(repo, repo_type="dataset", revision=commit, recursive=True)
        files = [f for f in tree if hasattr(f, "blob_id")]  # the others are folders
        return commit, [Remote(f.path, f.size, f.lfs.sha256 if f.lfs else "", f.blob_id) for f in files]

    return patiently(f"data set {repo}", ask)


# ---------------------------------------------------------------------------------------------------------------------
# What to fetch
# ---------------------------------------------------------------------------------------------------------------------
def wanted_files(names: list[str], variant: str, train_shards: int, docs: bool = False) -> dict[str, str]:
    """remote name -> place below the data folder, of all validation shards and sidecars, the first training shards, the
    tokenizer, and the documents if they are asked for.

    Remote folders differ between publishers, so files are found by the end of their names.
    """
    below = [name for name in sorted(names) if name.startswith(PREFIX)] or sorted(names)
    found: dict[str, str] = {}
    trains = 0
    for name in below:
        shard = re.search(rf"fineweb10B_{re.escape(variant)}/(fineweb_(train|val)_(?:bytes_)?\d+\.bin)$", name)
        if shard and (shard[2] == "val" or trains < train_shards):
            trains += shard[2] == "train"
            found[name] = f"datasets/fineweb10B_{variant}/{shard[1]}"
        elif docs and name.rsplit("/", 1)[-1] in DOCS:
            found[name] = name.rsplit("/", 1)[-1]
    return found | {name: f"tokenizers/{Path(name).name}" for name in tokenizers(below, variant)}


def tokenizers(names: list[str], variant: str) -> list[str]:
    """The tokenizer's files: by the variant's vocabulary size, and by what follows it (sp8192_NAME) where a file has
    that too.
    """
    parts = re.match(r"\D*(\d+)_?(.*)", variant)
    if not parts:
        return []
    size, suffix = parts.groups()
    fits = [
        n for n in names if re.search(rf"(^|/)[^/]*_{size}(_[^/]*)?\.(model|vocab|json)$", n) and "manifest" not in n
    ]
    end = re.compile(rf"{re.escape(suffix)}$" if suffix else rf"_{size}(_bpe)?$")
    exact = [n for n in fits if end.search(Path(n).stem)]
    return exact or fits


def is_there(place: Path, remote: Remote, entry: dict | None) -> bool:
    """True if a file is whole: right size, sound header, and the hub's hash - known from its entry, or taken now."""
    if not place.is_file() or place.stat().st_size != remote.size or (place.suffix == ".bin" and shard_problem(place)):
        return False
    entry = {} if not entry or "damaged" in entry else entry
    known = entry.get("sha256") if remote.sha256 else entry.get("blob")
    return known == (remote.sha256 or remote.blob) or not hash_problem(place, remote)


def hash_problem(path: Path, remote: Remote) -> str:
    """How a file's content differs from what the hub says of it; empty if it does not."""
    if remote.sha256:
        return "" if sha256_file(path) == remote.sha256 else "its sha256 is not that of the hub"
    blob = hashlib.sha1(b"blob %d\0" % remote.size)  # git's name of a small file
    blob.update(path.read_bytes())
    return "" if blob.hexdigest() == remote.blob else "its git hash is not that of the hub"


def check_space(folder: Path, sizes: dict[Path, int]) -> None:
    """SystemExit if the disk has no room for what is still to come: place -> size in bytes."""
    missing = sum(size - (partial(p).stat().st_size if partial(p).is_file() else 0) for p, size in sizes.items())
    free = shutil.disk_usage(folder).free
    if missing and missing + SPARE_BYTES > free:
        raise SystemExit(
            f"{folder}: {missing / 1e9:.2f} GB are to be fetched, {free / 1e9:.2f} GB are free; --train-shards takes "
            "fewer shards, --data-dir another disk"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Fetching
# ---------------------------------------------------------------------------------------------------------------------
def partial(place: Path) -> Path:
    """Where a file grows before it gets its name."""
    return place.with_name(f".{place.name}.partial")


class Counting:
    """A file that tells a progress bar what is written to it, and stops at `stop`."""

    def __init__(self, file, bar, stop: threading.Event):
        self.file, self.bar, self.stop = file, bar, stop

    def write(self, data: bytes) -> int:
        if self.stop.is_set():
            raise Stopped
        self.bar.update(len(data))
        return self.file.write(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


@contextlib.contextmanager
def only_one(data_dir: Path) -> Iterator[None]:
    """The data folder, for one download at a time; a second one waits."""
    import fcntl

    data_dir.mkdir(parents=True, exist_ok=True)
    with open(data_dir / ".download.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"another download is at work in {data_dir}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch(repo: str, commit: str, remote: Remote, place: Path, bar, stop: threading.Event) -> dict:
    """One file to its place, and its manifest entry. OSError or SystemExit say what went wrong; a damaged file never
    gets the final name, and is fetched anew once.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    for last in (False, True):
        patiently(f"{remote.name} of {repo}", grow, repo, commit, remote, partial(place), bar, stop)
        problem = hash_problem(partial(place), remote) or (
            shard_problem(partial(place)) if place.suffix == ".bin" else ""
        )
        if not problem:
            break
        partial(place).unlink()
        bar.update(-remote.size)
        if last:
            raise SystemExit(f"{remote.name} of {repo} arrived damaged twice: {problem}")
    os.replace(partial(place), place)
    return entry_of(repo, commit, remote, place)


def entry_of(repo: str, commit: str, remote: Remote, place: Path) -> dict:
    """What the manifest says of a file that is whole."""
    return {
        "repo": repo,
        "revision": commit,
        "remote": remote.name,
        "file_bytes": remote.size,
        "sha256": remote.sha256 or sha256_file(place),
        "blob": remote.blob,
    }


def grow(repo: str, commit: str, remote: Remote, path: Path, bar, stop: threading.Event) -> None:
    """Adds to a partial file what it lacks. Whatever ends it early, what has come is kept.

    The hub library's own download begins anew after a kill; its transfer of one file can go on from any byte.
    """
    from huggingface_hub.file_download import http_get

    url = hub().hf_hub_url(
        repo, remote.name, repo_type="dataset", revision=commit, endpoint=os.environ.get("HF_ENDPOINT")
    )
    with open(path, "ab") as file:
        at = file.tell()
        if at > remote.size:  # of another revision
            file.truncate(0)
            at = 0
        if at < remote.size:
            headers = hub().utils.build_hf_headers()
            http_get(url, Counting(file, bar, stop), resume_size=at, headers=headers, expected_size=remote.size)


def fetch_all(repo: str, commit: str, wanted: dict[Path, Remote], data_dir: Path, workers: int) -> list[str]:
    """Fetches files side by side and enters each into the manifest as it comes; the failures."""
    from tqdm import tqdm

    hub().utils.disable_progress_bars()  # one bar for everything instead of one a file
    stop, failures = threading.Event(), []
    begun = sum(partial(p).stat().st_size for p in wanted if partial(p).is_file())
    total = sum(remote.size for remote in wanted.values())
    with (
        tqdm(total=total, initial=begun, unit="B", unit_scale=True, desc="fetch", mininterval=0.5) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        jobs = {
            pool.submit(fetch, repo, commit, remote, place, bar, stop): (place, remote)
            for place, remote in wanted.items()
        }
        try:
            for job in as_completed(jobs):
                place, remote = jobs[job]
                if (error := job.exception()) is None:
                    record(data_dir, {place.relative_to(data_dir).as_posix(): job.result()})
                else:
                    failures.append(explain(error, remote, place))
                    if isinstance(error, OSError) and error.errno == 28:  # a full disk stays full
                        stop.set()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return failures


def explain(error: BaseException, remote: Remote, place: Path) -> str:
    """One line about a file that did not come."""
    if isinstance(error, (SystemExit, Stopped)):
        return str(error) or f"{remote.name}: stopped"
    if isinstance(error, OSError) and error.errno == 28:
        return f"{place}: the disk is full; what has come is kept, run this again when there is room"
    return f"{remote.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


# ---------------------------------------------------------------------------------------------------------------------
# Manifest
# ---------------------------------------------------------------------------------------------------------------------
def known(data_dir: Path) -> dict:
    """What data/manifest.json says; {} where there is none, or one that another tool wrote: the contest's has the same
    name.
    """
    manifest = read_json(data_dir / "manifest.json") or {}
    return manifest if all(isinstance(manifest.get(key), dict) for key in ("files", "upstream")) else {}


def keep_foreign(data_dir: Path) -> None:
    """Another tool's manifest.json gets another name, so that it is not written over."""
    path, place = data_dir / "manifest.json", data_dir / "manifest.other.json"
    if read_json(path) and not known(data_dir):
        os.replace(path, place)
        print(f"{path} was not written by this script: it is kept as {place}")


def record(data_dir: Path, files: dict[str, dict], upstream: dict[str, dict] | None = None) -> None:
    """Enters files (place -> entry) and the publishers' own manifests (repo -> manifest) into data/manifest.json."""
    path, manifest = data_dir / "manifest.json", known(data_dir)
    merged = {key: manifest.get(key, {}) | (more or {}) for key, more in (("files", files), ("upstream", upstream))}
    if {"version": 1, **merged} != manifest:
        write_json(path, {"version": 1, **merged})


def refresh_upstream(repo: str, commit: str, files: list[Remote], data_dir: Path) -> None:
    """The publisher's manifest as it is now: one that is kept for ever describes shards that are no longer there."""
    for remote in files:
        if remote.name in {f"{PREFIX}/manifest.json", "manifest.json"}:
            place = data_dir / ".upstream_manifest.json"
            from tqdm import tqdm

            fetch(repo, commit, remote, place, tqdm(disable=True), threading.Event())
            record(data_dir, {}, {repo: {"revision": commit, "manifest": read_json(place)}})
            place.unlink()
            return


def verify(data_dir: Path) -> int:
    """Every file of the manifest by size, header and sha256, without a network; prints the problems and returns their
    number.

    The manifest remembers what was damaged, so that the next download looks at its content and not only at its size.
    """
    files = known(data_dir).get("files")
    if not files:
        raise SystemExit(
            f"{data_dir / 'manifest.json'} knows no files that this script fetched; run it without --verify first"
        )
    found = {place: entry_problem(entry | {"path": place}, data_dir) for place, entry in sorted(files.items())}
    problems = {place: problem for place, problem in found.items() if problem}
    for problem in problems.values():
        print(f"damaged: {problem}")
    record(data_dir, {place: files[place] | {"damaged": problem} for place, problem in problems.items()})
    advice = "; the command that fetched them mends the others" if problems else ""
    print(f"{len(files) - len(problems)} of {len(files)} files are whole{advice}")
    return len(problems)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------
def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--variant", default="sp1024", help="sp1024, sp8192, byte260, ...: folder fineweb10B_VARIANT of the data set"
    )
    p.add_argument("--train-shards", type=int, default=80, help="first training shards, 100M tokens each")
    p.add_argument("--skip-manifest", action="store_true", help="do not fetch the publisher's manifest.json")
    p.add_argument(
        "--with-docs", action="store_true", help="also docs_selected.jsonl, to make other shards from (48 GB)"
    )
    p.add_argument("--repo", default=REPO, help="data set, OWNER/NAME")
    p.add_argument("--revision", default="main", help="commit, branch or tag of the data set")
    p.add_argument("--data-dir", type=Path, default=Path("data"))
    p.add_argument("--workers", type=int, default=8, help="files fetched side by side")
    p.add_argument("--verify", action="store_true", help="check the files that are there, fetch nothing")
    return p


def fetch_missing(args: argparse.Namespace, commit: str, wanted: dict[Path, Remote]) -> list[str]:
    """Looks which files are whole, fetches the others; the failures."""
    names = {place: place.relative_to(args.data_dir).as_posix() for place in wanted}
    entries = known(args.data_dir).get("files", {})
    there = {place for place, remote in wanted.items() if is_there(place, remote, entries.get(names[place]))}
    missing = {place: remote for place, remote in wanted.items() if place not in there}
    check_space(args.data_dir, {place: remote.size for place, remote in missing.items()})
    record(args.data_dir, {names[p]: entry_of(args.repo, commit, wanted[p], p) for p in there})
    size = sum(remote.size for remote in missing.values())
    print(
        f"{args.repo} at {commit[:12]}: {len(there)} files are there, {len(missing)} to fetch ({size:,} bytes)",
        flush=True,
    )
    return fetch_all(args.repo, commit, missing, args.data_dir, args.workers) if missing else []


def warn_of_operators(data_dir: Path, places: Iterable[str]) -> None:
    """Says so where CaseOps shards were published without the byte sidecars that their scores need."""
    from vocabulary import check_operators

    folders = {data_dir / Path(place).parent for place in places if "_val_" in place}
    for model in (data_dir / place for place in places if place.endswith(".model")):
        try:
            for folder in folders:
                check_operators(folder, model.read_bytes())
        except ShardError as error:
            print(f"warning: {error}")
        except (ValueError, RuntimeError, OSError):
            pass  # not there, or no model: whoever reads the shards says it


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when every wanted file is there and whole."""
    args = parser().parse_args(argv)
    if args.verify:
        return int(bool(verify(args.data_dir)))
    commit, files = list_remote(args.repo, args.revision)
    by_name = {remote.name: remote for remote in files}
    places = wanted_files(list(by_name), args.variant, args.train_shards, args.with_docs)
    if not any("_val_" in name for name in places):
        found = sorted({m[1] for n in by_name if (m := re.search(r"fineweb10B_([^/]+)/", n))})
        raise SystemExit(
            f"{args.repo} holds no fineweb10B_{args.variant} below {PREFIX}, only {found}; "
            "--repo names another data set"
        )
    with only_one(args.data_dir):
        keep_foreign(args.data_dir)
        if not args.skip_manifest:
            refresh_upstream(args.repo, commit, files, args.data_dir)
        failures = fetch_missing(args, commit, {args.data_dir / place: by_name[name] for name, place in places.items()})
    trains = sum("_train_" in name for name in places)
    if trains < args.train_shards:
        print(f"note: {args.repo} has {trains} training shards of {args.variant}, {args.train_shards} were asked for")
    warn_of_operators(args.data_dir, places.values())
    if failures:
        raise SystemExit(
            "\n".join([*failures, f"{len(failures)} files are missing; run this again, it goes on where it was"])
        )
    print(f"{len(places)} files are whole: {args.data_dir / 'datasets' / f'fineweb10B_{args.variant}'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
