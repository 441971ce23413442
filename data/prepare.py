"""Documents to shards: any jsonl, parquet, text or finished shards, any SentencePiece vocabulary, any transform of the
registry.

    python data/prepare.py docs.jsonl.xz --name mine --vocab-size 8192 --val-docs 2000
    python data/prepare.py data/docs_selected.jsonl --name fineweb10B_sp4096 --vocab-size 4096
    python data/prepare.py docs.parquet --name caps --transform caseops --pairs --val-docs 2000
    python data/prepare.py data/datasets/local_sp1024 --source-tokenizer data/tokenizers/local_1024_bpe.model
    python data/prepare.py --verify data/datasets/mine

writes data/datasets/NAME/fineweb_{train,val}_%06d.bin, data/tokenizers/NAME.model and, last of all, data/datasets/NAME/
manifest.json, whose presence means that the rest is complete. The first --val-docs documents are validation; no
document is on both sides. Same bytes for any number of workers, and for a run that was killed and started again: it
goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece as spm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is loaded by its path
import vocabulary
from shards import (
    BOS,
    CHUNK,
    HEADER_BYTES,
    ShardError,
    document_key,
    documents,
    entry_problem,
    file_entry,
    header,
    read_json,
    read_manifest,
    read_shard,
    sha256,
    shard_problem,
    split_paths,
    write_atomic,
    write_json,
)
from sources import Denominator, Reader, Source, SourceError, Unit, open_source
from transforms import REGISTRY
from vocabulary import ByteTable, Coder

REVISION = 1  # raise it when the same source and settings would give other shards
CHALLENGE_VAL_DOCS = (
    50_000  # the contest scores the first 50,000 documents, all of them (issue #2127: 10,000 leaked the rest)
)
STATE_SECONDS = 5.0  # at most so much work is lost to a kill
IN_FLIGHT = 64 << 20  # bytes of text between reader and writer
CHECK_EVERY = 64  # documents; one of so many is tokenized by SentencePiece itself as well
KEY_BYTES = 16
SPLITS = ("val", "train")


class PrepareError(RuntimeError):
    """The shards cannot be made; the message says why and what to do."""


class Job(NamedTuple):
    """What decides the bytes of the shards, apart from the documents themselves."""

    name: str
    vocab_size: int = 8192
    tokenizer: str = ""  # sha256 of a given model; empty: one is trained
    tokenizer_bytes: int = 100_000_000
    transform: str = "none"
    pairs: bool = False
    val_docs: int | None = None  # None: as the source has it, or as the contest
    shard_tokens: int = 100_000_000
    sidecar: bool = False
    text_key: str = "text"
    separator: str = ""
    revision: int = REVISION


class Coded(NamedTuple):
    """A coded unit: tokens [N] uint16 of its documents one behind the other, token counts [D] and keys of the D
    documents that have text, source_bytes: UTF-8 bytes before normalisation, odd: documents that were mended, by
    reason.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    keys: bytes
    source_bytes: int
    odd: Counter

    def without(self, known: set[bytes]) -> Coded:
        """The same less the documents whose keys are known; `odd` says how many."""
        keys = [self.keys[i : i + KEY_BYTES] for i in range(0, len(self.keys), KEY_BYTES)]
        keep = np.array([key not in known for key in keys], bool)
        if keep.all():
            return self
        odd = self.odd + Counter({"of train equal to one of validation, dropped": int((~keep).sum())})
        mask = np.repeat(keep, self.lengths)
        kept = b"".join(key for key, good in zip(keys, keep) if good)
        return Coded(self.tokens[mask], self.lengths[keep], kept, self.source_bytes, odd)


# ---------------------------------------------------------------------------------------------------------------------
# Coding, in this process or in others
# ---------------------------------------------------------------------------------------------------------------------
def code_unit(coder: Coder, unit: Unit, read: Reader) -> Coded:
    """Tokens of a unit's documents. SourceError names a document whose bytes do not add up."""
    odd: Counter = Counter()
    coded, keys, source_bytes = [], [], 0
    for number, text in enumerate(read(unit, odd), unit.first):
        try:
            tokens = coder.encode(text)
        except ValueError as error:
            raise SourceError(f"document {number}: {error}") from error
        source_bytes += len(text.encode())
        if not len(tokens):
            odd["without text, left out"] += 1
            continue
        if number % CHECK_EVERY == 0 and not coder.agrees(text, tokens):
            raise SourceError(
                f"document {number}: word by word it has other tokens than as a whole; please report its text"
            )
        coded.append(tokens)
        keys.append(document_key(tokens))
    lengths = np.array([len(t) for t in coded], np.int64)
    tokens = coded[0] if len(coded) == 1 else np.concatenate([np.zeros(0, np.uint16), *coded])
    return Coded(tokens, lengths, b"".join(keys), source_bytes, odd)


WORKER: list = []  # of a worker process: its coder and reader


def start_worker(model: bytes, transform: str, pairs: bool, read: Reader) -> None:
    """Makes this process a worker that ends when its parent does, even if the parent was killed."""
    import threading
    from multiprocessing import connection, parent_process

    parent = parent_process().sentinel
    threading.Thread(target=lambda: (connection.wait([parent]), os._exit(1)), daemon=True).start()
    WORKER[:] = Coder(model, transform, pairs), read


def work(unit: Unit) -> Coded:
    """`code_unit` in a worker."""
    return code_unit(WORKER[0], unit, WORKER[1])


def coded_units(
    units: Iterable[Unit], model: bytes, job: Job, read: Reader, workers: int
) -> Iterator[tuple[Unit, Coded]]:
    """Units with their tokens, in order; coded by other processes where workers > 1."""
    if workers == 1:
        coder = Coder(model, job.transform, job.pairs)
        yield from ((unit, code_unit(coder, unit, read)) for unit in units)
        return
    from multiprocessing import get_context

    setup = (model, job.transform, job.pairs, read)
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, setup) as pool:
        try:
            yield from in_order(pool, units, 2 * workers + 1)
        except BrokenProcessPool:
            raise PrepareError(
                "a worker process died, perhaps for want of memory; start this again, it goes on where it "
                "was (--workers N takes fewer)"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def in_order(pool: ProcessPoolExecutor, units: Iterable[Unit], most: int) -> Iterator[tuple[Unit, Coded]]:
    """Results in the order of units, with at most so many and IN_FLIGHT bytes on their way: memory does not grow."""
    waiting: deque[tuple[Unit, int, Future]] = deque()
    flying = 0
    for unit in units:
        size = unit.size
        while waiting and (len(waiting) >= most or flying + size > IN_FLIGHT):
            done, weight, future = waiting.popleft()
            flying -= weight
            yield done, future.result()
        flying += size
        waiting.append(
            (Unit(unit.first, [None] * unit.count), size, pool.submit(work, unit))
        )  # its text is not held twice
    while waiting:
        done, _, future = waiting.popleft()
        yield done, future.result()


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
class ShardWriter:
    """Tokens of one split, appended to numbered shards of exactly `limit` tokens (the last is shorter) in a folder.

    A shard has no valid header before it is whole. `state` is what `restore` needs to go on from there.
    """

    def __init__(self, folder: Path, split: str, limit: int, sidecar: bool, table: ByteTable):
        self.folder, self.split, self.limit, self.sidecar, self.table = folder, split, limit, sidecar, table
        self.done: list[dict] = []
        self.now = {"documents": 0, "tokens": 0, "bytes": 0}

    def path(self, kind: str = "") -> Path:
        """The current shard, or its sidecar."""
        return self.folder / f"fineweb_{self.split}_{kind}{len(self.done):06d}.bin"

    def parts(self) -> list[Path]:
        """The files that grow together."""
        return [self.path(), *([self.path("bytes_")] if self.sidecar else [])]

    def append(self, tokens: np.ndarray) -> None:
        """Tokens [N] of whole documents; these may cross the border between two shards, as in the contest's."""
        at = 0
        while at < len(tokens):
            part = tokens[at : at + min(CHUNK, self.limit - self.now["tokens"])]
            sizes = self.table.sizes(part, int(tokens[at - 1]) if at else BOS)
            for path, values in zip(self.parts(), (part, sizes)):
                with open(path, "ab") as file:
                    if not file.tell():
                        file.write(bytes(HEADER_BYTES))
                    file.write(values.astype("<u2").tobytes())
            self.now["documents"] += int((part == BOS).sum())
            self.now["tokens"] += len(part)
            self.now["bytes"] += int(sizes.sum(dtype=np.int64))
            at += len(part)
            if self.now["tokens"] == self.limit:
                self.close()

    def close(self) -> None:
        """Gives the current shard its header and its entry."""
        if not self.now["tokens"]:
            return
        for path in self.parts():
            with open(path, "r+b") as file:
                file.write(header(self.now["tokens"]))
                flush(file)
        shard, *sidecar = (file_entry(path, self.folder) for path in self.parts())
        self.done.append(shard | self.now | ({"sidecar": sidecar[0]} if sidecar else {}))
        self.now = dict.fromkeys(self.now, 0)

    @property
    def state(self) -> dict:
        """Counts as they are on disk."""
        for path in self.parts():
            if path.exists():
                with open(path, "r+b") as file:
                    flush(file)
        return {"done": self.done, "now": self.now}

    def restore(self, state: dict) -> None:
        """Back to `state`: what was written after it is cut off. PrepareError if less is there."""
        self.done, self.now = state["done"], state["now"]
        known = {Path(e["path"]).name for shard in self.done for e in (shard, shard.get("sidecar", shard))}
        size = HEADER_BYTES + 2 * self.now["tokens"]
        for path in self.folder.glob(f"fineweb_{self.split}_*"):
            if path.name not in known and (path not in self.parts() or not self.now["tokens"]):
                path.unlink()
        for path in self.parts() if self.now["tokens"] else []:
            if path.stat().st_size < size:
                raise PrepareError(f"{path} is shorter than it was; start anew with --force")
            os.truncate(path, size)


def flush(file) -> None:
    """Down to the disk."""
    file.flush()
    os.fsync(file.fileno())


class Totals:
    """What the manifest says of a split beside its shards."""

    def __init__(self, state: dict | None = None):
        self.source_bytes = (state or {}).get("source_bytes", 0)
        self.lengths = Counter({int(k): n for k, n in (state or {}).get("lengths", {}).items()})

    def add(self, coded: Coded) -> None:
        """One unit more."""
        self.source_bytes += coded.source_bytes
        self.lengths.update(coded.lengths.tolist())

    @property
    def state(self) -> dict:
        return {"source_bytes": self.source_bytes, "lengths": self.lengths}

    def entry(self, shards: list[dict]) -> dict:
        """`bytes`: UTF-8 bytes of the text that the tokens stand for, the denominator of bits per byte; `source_bytes`:
        those before the tokenizer folded white space.
        """
        lengths = np.repeat(*(np.array(column, np.int64) for column in zip(*sorted(self.lengths.items()))))
        median, p90 = np.percentile(lengths, [50, 90]).astype(int).tolist()
        totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
        spread = {"min": int(lengths[0]), "median": median, "p90": p90, "max": int(lengths[-1])}
        return totals | {"source_bytes": self.source_bytes, "document_tokens": spread, "shards": shards}


class Build:
    """Shards of both splits in a folder of their own, from coded units in order; it can be left and taken up again.

    `told`: what validation was divided by before, where its documents come from shards.
    """

    def __init__(
        self, folder: Path, job: Job, table: ByteTable, state: dict | None = None, told: Denominator | None = None
    ):
        self.folder, self.job, self.told = folder, job, told
        sidecar = job.sidecar or bool(REGISTRY[job.transform].operators)
        self.writers = {s: ShardWriter(folder, s, job.shard_tokens, sidecar and s == "val", table) for s in SPLITS}
        state = state or {}
        for split, writer in self.writers.items():
            writer.restore(state.get(split, {"done": [], "now": writer.now}))
        self.totals = {split: Totals(state.get("totals", {}).get(split)) for split in SPLITS}
        self.documents, self.odd = state.get("documents", 0), Counter(state.get("odd", {}))
        self.val_keys: set[bytes] | None = None

    @property
    def state(self) -> dict:
        """Everything that has been done so far, in a form that JSON can hold."""
        totals = {split: totals.state for split, totals in self.totals.items()}
        writers = {split: writer.state for split, writer in self.writers.items()}
        return {"documents": self.documents, "odd": self.odd, "totals": totals, **writers}

    def add(self, unit: Unit, coded: Coded) -> None:
        """One unit more; units do not cross the border between the splits."""
        split = "val" if unit.first < self.job.val_docs else "train"
        if split == "train":
            coded = coded.without(self.known())
        self.writers[split].append(coded.tokens)
        self.totals[split].add(coded)
        self.odd.update(coded.odd)
        self.documents = unit.first + unit.count

    def known(self) -> set[bytes]:
        """Keys of the validation documents, from the shards as they were written."""
        if self.val_keys is None:
            self.writers["val"].close()
            self.check_denominator()  # before the work of the training documents
            paths = [self.folder / shard["path"] for shard in self.writers["val"].done]
            self.val_keys = {document_key(tokens) for tokens in documents(paths)}
        return self.val_keys

    def check_denominator(self) -> None:
        """PrepareError if bits per byte would be divided by another number than those of the source's shards."""
        got = sum(shard["bytes"] for shard in self.writers["val"].done)
        if self.told and got != self.told.now:
            raise PrepareError(
                f"val has {got:,} bytes, but the source's tokens stand for {self.told.now:,}: scores could not be "
                "compared. Tokenizer or transform change the text (folded white space, lost letters); choose others"
            )

    def finish(self) -> dict:
        """Closes the last shards; the manifest's part about documents. PrepareError if a split is empty."""
        self.known()
        self.writers["train"].close()
        for split, writer in self.writers.items():
            if not writer.done:
                raise PrepareError(
                    f"no {split} documents: the source has {self.documents}, the first --val-docs "
                    f"{self.job.val_docs} are validation, and {dict(self.odd)} have no tokens"
                )
        dropped = self.odd["of train equal to one of validation, dropped"]
        entries = {split: self.totals[split].entry(self.writers[split].done) for split in SPLITS[::-1]}
        proof = {"by": "blake2b-128 of each document's tokens", "val_keys": len(self.known()), "train_dropped": dropped}
        told = {"denominator": self.told._asdict()} if self.told else {}
        return entries | {"disjoint": proof, "mended": dict(sorted(self.odd.items()))} | told


# ---------------------------------------------------------------------------------------------------------------------
# A whole data set
# ---------------------------------------------------------------------------------------------------------------------
class Places(NamedTuple):
    """Where a data set and its tokenizer lie, and the hidden folder in which they are made."""

    root: Path
    shards: Path
    tokenizer: Path

    @classmethod
    def of(cls, data_dir: Path | str, name: str) -> Places:
        root = Path(data_dir)
        return cls(root, root / "datasets" / name, root / "tokenizers" / f"{name}.model")

    @property
    def manifest(self) -> Path:
        return self.shards / "manifest.json"

    @property
    def work(self) -> Path:
        return self.shards.with_name(f".{self.shards.name}.work")


def cut_units(units: Iterable[Unit], borders: list[int]) -> Iterator[Unit]:
    """The same documents in units that do not cross a border (document numbers)."""
    for unit in units:
        for border in sorted(borders):
            if unit.first < border < unit.first + unit.count:
                head, unit = unit.cut(border)
                yield head
        yield unit


def model_of(job: Job, source: Source, work: Path, given: Path | None, log: Callable) -> bytes:
    """The tokenizer's file: the given one, or one trained on the first tokenizer_bytes of training text (once)."""
    if given is not None:
        return given.read_bytes()
    place = work / "tokenizer.model"
    if place.is_file():
        return place.read_bytes()
    if job.vocab_size == 260:
        return vocabulary.byte_model()
    started = time.perf_counter()
    used = [0]
    try:
        model = vocabulary.train(training_texts(source, job, used), job.vocab_size, REGISTRY[job.transform])
    except (ValueError, RuntimeError, OSError) as error:
        behind = "" if used[0] else f" behind the first {job.val_docs:,} documents, which are validation (--val-docs)"
        raise PrepareError(f"tokenizer: {error}{behind}") from error
    write_atomic(place, model)
    seconds = time.perf_counter() - started
    log(f"prepare: trained the {job.vocab_size}-piece tokenizer on {used[0]:,} bytes in {seconds:.1f}s")
    return model


def training_texts(source: Source, job: Job, used: list[int]) -> Iterator[str]:
    """Texts behind validation until `used` reaches tokenizer_bytes: validation documents decide nothing (rule D5)."""
    for unit in cut_units(source.units(), [job.val_docs]):
        for text in source.reader(unit, Counter()) if unit.first >= job.val_docs else ():
            if used[0] >= job.tokenizer_bytes:
                return
            used[0] += len(text.encode())
            yield text


def find_border(source: Source, job: Job) -> int:
    """Number of validation documents. PrepareError if a source that is split already is to be split otherwise."""
    natural = CHALLENGE_VAL_DOCS if source.val_docs is None else source.val_docs
    asked = natural if job.val_docs is None else job.val_docs
    if source.val_docs is not None and asked != natural:
        raise PrepareError(
            f"--val-docs {asked}: the source's validation shards hold {natural:,} documents; leave the option out"
        )
    if source.is_challenge and asked != CHALLENGE_VAL_DOCS:
        raise PrepareError(
            f"--val-docs {asked}: these are the challenge's documents, whose first {CHALLENGE_VAL_DOCS:,} "
            "are validation; with fewer the rest of them would be trained on"
        )
    return asked


def check_apart(source: Source, places: Places) -> None:
    """PrepareError if the data set would be written over what it is made of."""
    written = {path.resolve() for path in (places.tokenizer, places.manifest, *places.shards.glob("fineweb_*.bin"))}
    for file in source.files:
        if file.resolve() in written:
            raise PrepareError(f"{file} is a source and would be written over; choose another --name or --data-dir")


def check_published(source: Source, count: int) -> None:
    """PrepareError if the documents are not those that their published manifest describes."""
    for file in source.files:
        said = read_json(file.parent / "docs_selected.source_manifest.json") or {}
        if file.name.startswith("docs_selected") and (
            said.get("docs_sha256", source.sha256[file.name]) != source.sha256[file.name]
            or said.get("num_docs", count) != count
        ):
            raise PrepareError(
                f"{file} is not what docs_selected.source_manifest.json beside it describes: fetch both again"
            )


@contextlib.contextmanager
def only_one(work: Path) -> Iterator[None]:
    """The work folder, for this process alone. PrepareError if another one has it."""
    import fcntl

    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PrepareError(f"another process is at work in {work}") from None
        yield


def open_work(places: Places, settings: dict, force: bool) -> None:
    """The work folder; what lies there of other settings is removed."""
    try:
        places.work.mkdir(parents=True, exist_ok=True)
        places.tokenizer.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrepareError(f"cannot write to {places.root} ({error.strerror}): choose another --data-dir") from error
    with only_one(places.work):
        if force or read_json(places.work / "settings.json") != settings:
            for path in places.work.iterdir():
                if path.name != "lock":
                    path.unlink()
            write_json(places.work / "settings.json", settings)


def run_build(build: Build, coded: Iterable[tuple[Unit, Coded]], save: Callable[[dict], None] = lambda _: None) -> None:
    """Adds all units; the state is saved every STATE_SECONDS."""
    saved = time.monotonic()
    for unit, result in coded:
        build.add(unit, result)
        if time.monotonic() - saved > STATE_SECONDS:
            save(build.state)
            saved = time.monotonic()


def progress(source: Source, log: Callable):
    """A progress bar over the bytes of the source where tqdm is installed and somebody looks."""
    try:
        from tqdm import tqdm
    except ImportError:
        log("prepare: no progress bar; pip install -r data/requirements.txt")
        return contextlib.nullcontext(None)
    total = sum(entry["file_bytes"] for entry in source.entries)
    return tqdm(
        total=total, unit="B", unit_scale=True, desc="prepare", disable=None if log is print else True, mininterval=0.5
    )


def make_shards(
    places: Places, job: Job, source: Source, model: bytes, coder: Coder, workers: int, log: Callable
) -> dict:
    """Tokens of all documents into the work folder; the manifest's part about documents."""
    build = Build(places.work, job, coder.table, read_json(places.work / "state.json"), source.denominator(coder))
    if build.documents:
        log(f"prepare: goes on behind document {build.documents:,}")
    begin = build.documents
    with progress(source, log) as bar:
        units = cut_units(source.units(bar.update if bar is not None else lambda _: None), [job.val_docs, begin])
        new = (unit for unit in units if unit.first >= begin)
        run_build(
            build,
            coded_units(new, model, job, source.reader, workers),
            lambda state: write_json(places.work / "state.json", state),
        )
    check_published(source, build.documents)
    return build.finish()


def describe(split: str, entry: dict, who: str = "prepare") -> str:
    """One line of the log about a split."""
    lengths = " ".join(f"{key}:{value:,}" for key, value in entry["document_tokens"].items())
    return (
        f"{who}: {split} documents:{entry['documents']:,} tokens:{entry['tokens']:,} bytes:{entry['bytes']:,} "
        f"bytes_per_token:{entry['bytes'] / entry['tokens']:.3f} document_tokens {lengths}"
    )


def describe_denominator(told: dict) -> str:
    """One line of the log about a denominator that is still the same."""
    odd = (
        (
            f", but for {told['mended_documents']} documents with invalid UTF-8: {told['mended_bytes']:,} bytes there, "
            f"{told['mended_bytes_now']:,} here"
        )
        if told["mended_documents"]
        else ""
    )
    return f"prepare: val has the {told['bytes']:,} bytes that the source's tokens stand for{odd}"


def transform_entry(coder: Coder) -> dict:
    """What the manifest says of the transform."""
    names = {t: coder.pieces[t] for pair in coder.aliases.pairs for t in pair}
    pairs = [
        {"pair": [names[t] for t in pair], "ids": list(pair), "alias": i} for pair, i in coder.aliases.pairs.items()
    ]
    operators = [f"U+{ord(o):04X}" for o in coder.transform.operators]
    return {"name": coder.transform.name, "lossy": coder.transform.lossy, "operators": operators, "pairs": pairs}


def publish(places: Places, manifest: dict, work: Path) -> None:
    """Moves the files of a finished work folder to where they are read, the manifest last: its presence means that the
    rest is complete. An old manifest goes first: a build killed half-way must not leave one that vouches for other
    shards.
    """
    places.shards.mkdir(parents=True, exist_ok=True)
    places.manifest.unlink(missing_ok=True)
    names = [
        e["path"]
        for split in SPLITS[::-1]
        for shard in manifest[split]["shards"]
        for e in (shard, *([shard["sidecar"]] if "sidecar" in shard else []))
    ]
    if (work / "tokenizer.model").is_file():
        os.replace(work / "tokenizer.model", places.tokenizer)
    for name in names:
        if (work / name).is_file():  # else moved before a kill
            os.replace(work / name, places.shards / name)
    for path in set(places.shards.glob("fineweb_*.bin")) - {places.shards / name for name in names}:
        path.unlink()  # of an earlier, larger data set
    write_json(places.manifest, manifest)


def read_finished(places: Places, settings: dict, force: bool) -> dict | None:
    """The manifest of a data set that is there already. PrepareError if it was made with other settings."""
    if force or (manifest := read_json(places.manifest)) is None:
        return None
    read_manifest(places.shards)  # what another tool wrote there must not be replaced unasked
    if manifest.get("settings") != settings:
        raise PrepareError(f"{places.shards} holds a data set of other settings or another source; --force replaces it")
    if problems := [p for e in manifest_files(manifest) if (p := size_problem(places.shards / e["path"], e))]:
        raise PrepareError(f"{problems[0]}; --force builds it again")
    return manifest


def size_problem(path: Path, entry: dict) -> str:
    """What is wrong with a file at first sight."""
    size = path.stat().st_size if path.is_file() else 0
    return "" if size == entry["file_bytes"] else f"{path} has {size} bytes, the manifest says {entry['file_bytes']}"


def manifest_files(manifest: dict) -> Iterator[dict]:
    """Entries of all shards and sidecars."""
    for shard in chain(*(manifest[split]["shards"] for split in SPLITS)):
        yield shard
        yield from [shard["sidecar"]] if "sidecar" in shard else []


def prepare(
    source: Source,
    job: Job,
    data_dir: Path | str = "data",
    tokenizer: Path | None = None,
    workers: int = 1,
    force: bool = False,
    log: Callable[[str], object] = print,
) -> dict:
    """Builds the data set unless it is there already, and returns its manifest.

    Raises PrepareError, SourceError or ShardError with what is wrong and what to do.
    """
    places, started = Places.of(data_dir, job.name), time.perf_counter()
    check_apart(source, places)
    job = job._replace(val_docs=find_border(source, job), tokenizer=sha256(tokenizer.read_bytes()) if tokenizer else "")
    settings = job._asdict() | {"source": source.entries}
    if finished := read_finished(places, settings, force):
        log(f"prepare: {places.manifest} is complete, nothing to do")
        return finished
    open_work(places, settings, force)
    with only_one(places.work):
        begun = sum(t["source_bytes"] for t in (read_json(places.work / "state.json") or {}).get("totals", {}).values())
        manifest = read_json(places.work / "manifest.json") or make(
            places, job, source, settings, tokenizer, workers, log
        )
        publish(places, manifest, places.work)
    shutil.rmtree(places.work)
    seconds, size = time.perf_counter() - started, sum(manifest[split]["source_bytes"] for split in SPLITS) - begun
    for split in SPLITS[::-1]:
        log(describe(split, manifest[split]))
    if "denominator" in manifest:
        log(describe_denominator(manifest["denominator"]))
    dropped = manifest["disjoint"]["train_dropped"]
    log(f"prepare: mended {manifest['mended'] or 'nothing'}; no document is in both splits ({dropped} dropped)")
    log(f"prepare: wrote {places.manifest} in {seconds:.1f}s, {size / seconds / 1e6:.1f} MB of text a second")
    return manifest


def make(
    places: Places, job: Job, source: Source, settings: dict, tokenizer: Path | None, workers: int, log: Callable
) -> dict:
    """Everything that can be taken up again: tokenizer, shards and manifest in the work folder; the manifest."""
    model = model_of(job, source, places.work, tokenizer, log)
    try:
        coder = Coder(model, job.transform, job.pairs)
        coder.check_front()
    except (ValueError, RuntimeError, OSError) as error:
        raise PrepareError(
            f"{error}{f' ({tokenizer}); without --tokenizer one is trained' if tokenizer else ''}"
        ) from error
    parts = make_shards(places, job, source, model, coder, workers, log)
    write_atomic(places.work / "tokenizer.model", model)
    about = {"vocab_size": len(coder.pieces), "bos_id": BOS}
    manifest = {
        "name": job.name,
        "source": {
            "files": [e | {"sha256": source.sha256[e["name"]]} for e in source.entries],
            "challenge": source.is_challenge,
        },
        "sentencepiece": spm.__version__,
        "settings": settings,
        "transform": transform_entry(coder),
        "tokenizer": {"path": f"tokenizers/{places.tokenizer.name}", "file_bytes": len(model), "sha256": sha256(model)}
        | about,
        **parts,
    }
    write_json(places.work / "manifest.json", manifest)
    return json.loads(json.dumps(manifest))  # as it will be read


# ---------------------------------------------------------------------------------------------------------------------
# Proof from the files alone
# ---------------------------------------------------------------------------------------------------------------------
def verify(folder: Path, log: Callable[[str], object] = print) -> list[str]:
    """Problems of a data set: every file against the manifest (size, header, sha256), no shard too many or too few,
    sidecars as long as their shards, document counts, and validation disjoint from training. Nothing is believed but
    the bytes.
    """
    try:
        manifest = read_manifest(folder)
    except ShardError as error:
        return [str(error)]
    if manifest is None:
        return [f"{folder / 'manifest.json'} is missing"]
    problems = [p for entry in manifest_files(manifest) if (p := entry_problem(entry, folder))]
    problems += strangers(folder, manifest)
    problems += [p] if (p := entry_problem(manifest["tokenizer"], folder.parent.parent)) else []
    if problems:
        return problems
    counts, keys = {}, {}
    for split in SPLITS:
        counts[split], keys[split] = Counter(), set()
        for tokens in documents(split_paths(folder, split)):
            key = document_key(tokens)
            counts[split].update(
                {"documents": 1, "tokens": len(tokens), "shared": int(split == "train" and key in keys["val"])}
            )
            if split == "val":
                keys[split].add(key)
        problems += [
            f"{folder}: {split} has {counts[split][what]} {what}, the manifest says {manifest[split][what]}"
            for what in ("documents", "tokens")
            if counts[split][what] != manifest[split][what]
        ]
    if shared := counts["train"]["shared"]:
        problems.append(f"{folder}: {shared} training documents are validation documents")
    for split in SPLITS:
        log(f"verify: {split} {counts[split]['documents']:,} documents, {counts[split]['tokens']:,} tokens")
    return problems


def strangers(folder: Path, manifest: dict) -> list[str]:
    """Shards that the manifest does not know, and sidecars of another length than their shards."""
    known = {entry["path"] for entry in manifest_files(manifest)}
    found = [f"{path}: not in the manifest" for path in sorted(folder.glob("fineweb_*.bin")) if path.name not in known]
    pairs = [(shard["path"], shard["sidecar"]["path"]) for shard in manifest["val"]["shards"] if "sidecar" in shard]
    sound = [pair for pair in pairs if not any(shard_problem(folder / name) for name in pair)]
    lengths = {name: len(read_shard(folder / name)) for pair in sound for name in pair}
    return found + [f"{folder / b}: not as long as {a}" for a, b in sound if lengths[a] != lengths[b]]


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------
def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "source",
        nargs="*",
        type=Path,
        help="jsonl, parquet or text files (.xz .gz .bz2 .zst too), or folders of them, or a folder of finished shards",
    )
    p.add_argument(
        "--source-tokenizer", type=Path, metavar="MODEL", help="of a source of shards: the tokenizer that made them"
    )
    p.add_argument(
        "--verify", type=Path, metavar="FOLDER", help="prove a finished data set from its files alone, and stop"
    )
    p.add_argument(
        "--name", help="datasets/NAME and tokenizers/NAME.model; default: from source, vocabulary and transform"
    )
    p.add_argument("--data-dir", type=Path, default=Path("data"))
    p.add_argument(
        "--vocab-size", type=int, default=8192, help="pieces of the tokenizer to train; 260: bytes, no training"
    )
    p.add_argument("--tokenizer", type=Path, help="a SentencePiece model to use instead")
    p.add_argument(
        "--tokenizer-bytes", type=int, default=100_000_000, help="training text that the tokenizer is trained on"
    )
    p.add_argument("--transform", choices=sorted(REGISTRY), default="none")
    p.add_argument("--pairs", action="store_true", help="with caseops: one token for [space, operator]")
    p.add_argument(
        "--val-docs",
        type=int,
        help=f"first documents, which are validation; default: {CHALLENGE_VAL_DOCS:,}, or "
        "those of the shards that are the source",
    )
    p.add_argument("--shard-tokens", type=int, default=100_000_000)
    p.add_argument("--sidecar", action="store_true", help="a byte sidecar even where the byte table would do")
    p.add_argument("--text-key", default="text", help="key or column of the text")
    p.add_argument(
        "--separator", default="", help="line between documents of a text file; default: a file is one document"
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    p.add_argument("--workers", type=int, default=cores, help="processes; the bytes do not depend on it")
    p.add_argument("--force", action="store_true", help="build anew whatever is there")
    return p


def default_name(args: argparse.Namespace) -> str:
    """Source, vocabulary and transform."""
    stem = args.source[0].name.split(".")[0]
    tokenizer = (
        args.tokenizer.stem if args.tokenizer else "byte260" if args.vocab_size == 260 else f"sp{args.vocab_size}"
    )
    return "_".join(
        [stem, tokenizer, *([args.transform] if args.transform != "none" else []), *(["pairs"] if args.pairs else [])]
    )


def check_args(args: argparse.Namespace) -> None:
    """PrepareError for what cannot be."""
    if not args.source:
        raise PrepareError("name the files to read, or --verify a folder")
    if not 260 <= args.vocab_size <= 2**16:
        raise PrepareError(
            f"--vocab-size {args.vocab_size}: tokens are uint16 and 260 pieces are reserved, so 260 to 65536"
        )
    for name in ("tokenizer", "source_tokenizer"):
        if (path := getattr(args, name)) and not path.is_file():
            raise PrepareError(f"{option(name)} {path} is missing")
    for name, least in (("workers", 1), ("val_docs", 1), ("shard_tokens", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise PrepareError(f"{option(name)} must be at least {least}")


def option(name: str) -> str:
    """An argument as it is written."""
    return f"--{name.replace('_', '-')}"


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when the data set is there, or proved."""
    args = parser().parse_args(argv)
    try:
        if args.verify:
            problems = verify(args.verify)
            print(
                "\n".join(f"verify: {p}" for p in problems)
                or f"verify: {args.verify} is whole, and its splits are disjoint"
            )
            return int(bool(problems))
        check_args(args)
        job = Job(
            args.name or default_name(args),
            args.vocab_size,
            "",
            args.tokenizer_bytes,
            args.transform,
            args.pairs,
            args.val_docs,
            args.shard_tokens,
            args.sidecar,
            args.text_key,
            args.separator,
        )
        source = open_source(args.source, args.text_key, args.separator, args.source_tokenizer)
        manifest = prepare(source, job, args.data_dir, args.tokenizer, args.workers, args.force)
        places = Places.of(args.data_dir, job.name)
        knobs = {
            "DATA_PATH": places.shards,
            "TOKENIZER_PATH": places.tokenizer,
            "VOCAB_SIZE": manifest["tokenizer"]["vocab_size"],
        }
        print("prepare: use it with " + " ".join(f"{name}={shlex.quote(str(value))}" for name, value in knobs.items()))
        return 0
    except (PrepareError, SourceError, ShardError) as error:
        raise SystemExit(f"prepare: error: {error}") from error
    except OSError as error:
        raise SystemExit(f"prepare: error: {error}; started again, this goes on where it was") from error
    except KeyboardInterrupt:
        raise SystemExit("prepare: stopped; started again, it goes on where it was") from None


if __name__ == "__main__":
    sys.exit(main())
