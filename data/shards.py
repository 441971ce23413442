"""The contest's shard format and what keeps files trustworthy: headers, checks, hashes, atomic writes.

A shard is 256 little-endian int32 [20240520, 1, N, 0...] and N uint16 tokens, so 1024 + 2*N bytes; every document
begins with BOS (id 1) and has no EOS. A byte sidecar `fineweb_val_bytes_*.bin` has the same layout; its entry is the
number of UTF-8 bytes of the original text that the token at the same place stands for (layout of PR #1729's data, which
the contest accepted).
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_WORDS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_WORDS
BOS = 1
CHUNK = 1 << 20  # bytes, or tokens, that are looked at together: memory must not grow with the file


class ShardError(RuntimeError):
    """A file is not what it should be; the message names it."""


def header(tokens: int) -> bytes:
    """The first 1,024 bytes of a shard of that many tokens."""
    words = np.zeros(HEADER_WORDS, "<i4")
    words[:3] = MAGIC, VERSION, tokens
    return words.tobytes()


def shard_bytes(tokens: np.ndarray) -> bytes:
    """The whole file for tokens [N], values below 65,536."""
    return header(len(tokens)) + np.asarray(tokens, "<u2").tobytes()


def shard_problem(path: Path) -> str:
    """What is wrong with a shard or a sidecar, judged by header and size; empty if nothing is."""
    if not path.is_file():
        return "missing"
    words = np.fromfile(path, "<i4", HEADER_WORDS)
    if len(words) < HEADER_WORDS or words[0] != MAGIC or words[1] != VERSION or words[2] < 1 or words[3:].any():
        return "no contest header"
    want = HEADER_BYTES + 2 * int(words[2])
    return "" if path.stat().st_size == want else f"{path.stat().st_size} bytes, its header says {want}"


def read_shard(path: Path) -> np.ndarray:
    """Tokens [N] of a shard, memory-mapped; ShardError names one that is damaged."""
    if problem := shard_problem(path):
        raise ShardError(f"shard {path}: {problem}")
    return np.memmap(path, "<u2", "r", HEADER_BYTES)


def chunks(path: Path) -> Iterator[np.ndarray]:
    """Tokens of a shard, at most CHUNK at a time, in memory of their own."""
    tokens = read_shard(path)
    for at in range(0, len(tokens), CHUNK):
        yield np.array(tokens[at : at + CHUNK])


def sha256(data: bytes) -> str:
    """Hexadecimal sha256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file of any size."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path, root: Path) -> dict:
    """What a manifest says of any file: path under `root`, size in bytes, sha256."""
    return {"path": path.relative_to(root).as_posix(), "file_bytes": path.stat().st_size, "sha256": sha256_file(path)}


def entry_problem(entry: dict, root: Path) -> str:
    """How a file differs from its manifest entry, its name in front; empty if it does not."""
    path = root / entry["path"]
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != entry["file_bytes"]:
        return f"{path}: {path.stat().st_size} bytes, the manifest says {entry['file_bytes']}"
    if path.suffix == ".bin" and (problem := shard_problem(path)):
        return f"{path}: {problem}"
    return "" if sha256_file(path) == entry["sha256"] else f"{path}: its sha256 is not that of the manifest"


def write_atomic(path: Path, data: bytes) -> None:
    """Writes under a hidden name of its own, then renames: readers see the whole file or none, and of two writers
    at once the last rename wins."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict | None:
    """The object in a JSON file; None where there is none, or no object: half a file says nothing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_manifest(folder: Path) -> dict | None:
    """What data/prepare.py or data/local_corpus.py says of the shards of a folder; None where it says nothing.

    ShardError if the file is damaged, or another tool's: the contest's own manifest.json has the same name.
    """
    path = folder / "manifest.json"
    manifest = read_json(path)
    if manifest is None:
        if path.is_file():
            raise ShardError(f"{path} is damaged: it is no JSON object")
        return None
    if lacks := [
        name for name in ("tokenizer", "transform", "train", "val") if not isinstance(manifest.get(name), dict)
    ]:
        raise ShardError(
            f"{path} is not of data/prepare.py: it has the keys {list(manifest)}, but no description of "
            f"{', '.join(lacks)}; "
            "where another tool wrote it, move it to another folder"
        )
    return manifest


def document_key(tokens: np.ndarray) -> bytes:
    """128 bits that stand for a document: blake2b of its tokens [n], BOS included, as little-endian uint16.

    Of tokens, not of text: two texts that the tokenizer makes equal are the same document to a model, and anybody can
    compute the keys again from the shards alone.
    """
    return hashlib.blake2b(np.ascontiguousarray(tokens, "<u2"), digest_size=16).digest()


def documents(paths: Iterable[Path]) -> Iterator[np.ndarray]:
    """The documents of shards in order, each [n] uint16 with its BOS; those that cross a border are put together."""
    held: list[np.ndarray] = []
    for path in paths:
        for part in chunks(path):
            *whole, rest = np.split(part, np.flatnonzero(part == BOS))
            for piece in whole:
                held.append(piece)
                if sum(map(len, held)):  # np.split gives an empty head where a chunk begins with BOS
                    yield np.concatenate(held)
                held = []
            held.append(rest)
    if sum(map(len, held)):
        yield np.concatenate(held)


def split_paths(folder: Path, split: str) -> list[Path]:
    """Shards of a split in order; `val_bytes` gives the sidecars. ShardError names a gap in the numbers."""
    paths = sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))
    numbers = [int(path.stem.rsplit("_", 1)[1]) for path in paths]
    for number in set(range(len(numbers))) - set(numbers):
        raise ShardError(f"shard {folder / f'fineweb_{split}_{number:06d}.bin'}: missing")
    return paths
