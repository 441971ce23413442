"""A small real corpus from text that every machine with Python already has: no network, under a minute.

    python data/local_corpus.py             # -> data/datasets/local_sp1024/, data/tokenizers/local_1024_bpe.model
    python data/local_corpus.py --data-dir elsewhere --vocab-size 4096 --force

The text is the running Python's standard library: its sources cut into documents at top-level def/class borders,
its long docstrings, the language reference that `help()` prints, and the plain-text files beside them. It is English
and code, about 9 MB: enough to exercise tokenizer, shards, document boundaries, training and scoring for real, not
enough to compare models by. The steps:

    find -> split -> drop copies -> choose validation modules -> shuffle -> train tokenizer -> encode -> write

The last three are those of prepare.py, so what this corpus proves of them holds for any other.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import os
import platform
import random
import re
import sys
import sysconfig
import tempfile
import time
import tokenize
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece as spm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # train_gpt.py loads this file by its path
import prepare
import vocabulary
from shards import read_json, sha256
from shards import BOS as BOS_ID
from sources import SourceError, Unit, texts

REVISION = 2  # raise it when the same text would give other shards or another manifest: older corpora are rebuilt
SEED = 1337

MAX_TRAIN_BYTES = 20_000_000  # UTF-8 bytes; above what any Python ships, so in practice: everything
MAX_VAL_BYTES = 400_000  # a validation pass must stay a matter of seconds on a CPU
MIN_BYTES = 4_000_000  # a whole standard library has over 8 MB; under this something is missing
TOKENIZER_BYTES = 3_000_000  # merges of a small vocabulary no longer change much beyond this; time is linear in it
DOCSTRING_CHARS = 400  # shorter docstrings stay in the code
DOCUMENT_CHARS = 64  # shorter leftovers are dropped
CODE_CHARS, PROSE_CHARS = 900, 3_000  # median length at which a document may end; paragraphs need their context
TARGET_SPREAD = 0.9  # standard deviation of the logarithm of that length
SHINGLE_WORDS, NEAR_COPY_SHARE = 13, 0.3  # as language-model papers look for contamination: runs of 13 words

# Tests are mostly tables of cases, encodings are character tables, the rest is not of the standard library or is data.
SKIPPED_DIRS = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "lib-dynload"}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")  # build settings: they name paths of the machine
PROSE_SUFFIXES = {".txt", ".rst", ".md"}
TOPICS = "pydoc_data/topics.py"

Definition = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class CorpusError(RuntimeError):
    """The corpus cannot be built here; the message says what is missing and what to do."""


class Document(NamedTuple):
    """One document: the module (path under the standard library) it comes from, and its text."""

    module: str
    text: str

    @property
    def size(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode("utf-8"))

    @property
    def key(self) -> str:
        """sha256 of the text as the tokenizer sees it, that is without its line breaks and indentation."""
        return sha256(" ".join(self.text.split()).encode("utf-8"))


class Paths(NamedTuple):
    """Where the outputs lie."""

    root: Path
    train: Path
    val: Path
    tokenizer: Path
    manifest: Path

    @classmethod
    def of(cls, data_dir: Path | str, vocab_size: int) -> Paths:
        """The layout of the contest: datasets/<name>/fineweb_{train,val}_%06d.bin and tokenizers/<name>.model."""
        root = Path(data_dir)
        shards = root / "datasets" / f"local_sp{vocab_size}"
        tokenizer = root / "tokenizers" / f"local_{vocab_size}_bpe.model"
        train, val = (shards / f"fineweb_{split}_000000.bin" for split in ("train", "val"))
        return cls(root, train, val, tokenizer, shards / "manifest.json")


# ---------------------------------------------------------------------------------------------------------------------
# Find: which files of the standard library are text worth learning from
# ---------------------------------------------------------------------------------------------------------------------
def is_wanted(relative: Path) -> bool:
    """True for sources and plain-text files that are neither tests, nor tables, nor third-party."""
    if SKIPPED_DIRS & set(relative.parts) or any(part.startswith(SKIPPED_PREFIXES) for part in relative.parts):
        return False
    return relative.suffix == ".py" or relative.suffix.lower() in PROSE_SUFFIXES or relative.name == "README"


def walk(root: Path) -> Iterator[Path]:
    """All files under `root`, without entering skipped directories (site-packages can hold 100,000 files)."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_DIRS]
        yield from (Path(folder, name) for name in files)


def find_modules(root: Path) -> list[str]:
    """Paths relative to `root`, in the order of the hash of the path: random to the eye, equal on every machine."""
    relative = (path.relative_to(root) for path in walk(root))
    return sorted((path.as_posix() for path in relative if is_wanted(path)), key=lambda name: sha256(name.encode()))


# ---------------------------------------------------------------------------------------------------------------------
# Split: a module becomes documents
# ---------------------------------------------------------------------------------------------------------------------
def pack(blocks: Iterable[str], name: str, median_chars: int) -> list[str]:
    """Joins neighbouring blocks into documents.

    A document ends at the first border past a length drawn for it (log-normal, in characters), so that lengths spread
    as those of web pages do, many short and a long tail, and do not pile up at one limit. The draws depend on the
    module's name alone.
    """
    rng = random.Random(f"{SEED}/{name}")
    documents, current, target = [], "", 0.0
    for block in blocks:
        target = target or rng.lognormvariate(math.log(median_chars), TARGET_SPREAD)
        current += block
        if len(current) >= target:
            documents.append(current)
            current, target = "", 0.0
    return [*documents, current]


def split_prose(text: str, name: str) -> list[str]:
    """Documents of a plain text, cut between paragraphs."""
    return pack(re.split(r"(?<=\n)(?=\s*\n)", text), name, PROSE_CHARS)


def named_definitions(node: ast.AST, name: str) -> Iterator[tuple[ast.AST, str]]:
    """The module, its classes and functions at any depth, each with its dotted name."""
    if isinstance(node, (ast.Module, *Definition)):
        yield node, name
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.ExceptHandler)):
            inner = f"{name}.{child.name}" if isinstance(child, Definition) else name
            yield from named_definitions(child, inner)


def docstring_of(node: ast.AST) -> ast.Constant | None:
    """The literal that is the docstring of `node`, if there is one."""
    first = next(iter(getattr(node, "body", [])), None)
    literal = first.value if isinstance(first, ast.Expr) else None
    return literal if isinstance(literal, ast.Constant) and isinstance(literal.value, str) else None


def take_docstrings(tree: ast.Module, lines: list[str], name: str) -> list[str]:
    """Moves the long docstrings out of `lines` (changed in place) into documents headed by the dotted name.

    Moved, not copied: text that stands twice would flatter a model which adapts to what it has just scored. The
    summary line stays as the docstring, so that the code left behind is still Python.
    """
    documents = []
    for node, dotted in named_definitions(tree, name):
        literal = docstring_of(node)
        text = inspect.cleandoc(literal.value) if literal else ""
        if literal is None or len(text) < DOCSTRING_CHARS or lines[literal.lineno - 1][: literal.col_offset].strip():
            continue
        documents.append(f"{dotted}\n\n{text}\n")
        summary = text.split("\n", 1)[0].replace("\\", "/").replace('"', "'")
        lines[literal.lineno - 1] = f'{" " * literal.col_offset}"""{summary}"""\n'
        lines[literal.lineno : literal.end_lineno] = [""] * (literal.end_lineno - literal.lineno)
    return documents


def drop_tables(tree: ast.Module, lines: list[str]) -> None:
    """Empties the lines of top-level statements that are mostly numbers or escapes (entity and locale tables)."""
    for node in tree.body:
        text = "".join(lines[node.lineno - 1 : node.end_lineno])
        if isinstance(node, Definition) or len(text) < 1_000:
            continue
        digits, letters = (sum(map(test, text)) for test in (str.isdigit, str.isalpha))
        if digits > 0.06 * len(text) or letters < 0.5 * len("".join(text.split())):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)


def first_line(node: ast.AST, lines: list[str]) -> int:
    """Index of the line where a definition begins, with its decorators and the comments right above."""
    start = min(part.lineno for part in (node, *node.decorator_list)) - 1
    while start and lines[start - 1].startswith("#"):
        start -= 1
    return start


def split_source(text: str, name: str) -> list[str]:
    """Documents of a Python source: long docstrings, then code cut before top-level definitions.

    Raises SyntaxError or ValueError where `text` is not Python for the running interpreter.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules hold invalid escapes; they are no concern of the reader
        tree = ast.parse(text)
    lines = [line + "\n" for line in text.split("\n")]  # not splitlines(): it also breaks at form feeds, ast does not
    dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    docstrings = take_docstrings(tree, lines, dotted)
    drop_tables(tree, lines)
    borders = [first_line(node, lines) for node in tree.body if isinstance(node, Definition)]
    edges = sorted({0, *borders, len(lines)})
    return docstrings + pack(("".join(lines[a:b]) for a, b in zip(edges, edges[1:])), name, CODE_CHARS)


def split_topics(text: str) -> list[str]:
    """Documents of the language reference behind `help()`: the file is one literal dict, topic -> plain text."""
    topics = next(node.value for node in ast.parse(text).body if isinstance(node, ast.Assign))
    pages = ast.literal_eval(topics)
    return [document for topic in sorted(pages) for document in split_prose(pages[topic], topic)]


def read_module(root: Path, name: str) -> list[Document]:
    """The documents of one file; none where it cannot be read as text (a broken or foreign file is not our concern)."""
    try:
        if not name.endswith(".py"):
            parts = split_prose((root / name).read_text(encoding="utf-8"), name)
        else:
            with tokenize.open(root / name) as file:  # honours the coding cookie of old modules
                text = file.read()
            parts = split_topics(text) if name == TOPICS else split_source(text, name)
    except (OSError, SyntaxError, ValueError, StopIteration):
        return []
    return [Document(name, part) for part in parts if len(part.strip()) >= DOCUMENT_CHARS]


def collect(root: Path, max_bytes: int) -> list[Document]:
    """Reads modules until `max_bytes` UTF-8 bytes of text are there; exact duplicates are dropped.

    Raises CorpusError if the machine has too little text.
    """
    seen: dict[str, Document] = {}
    total = modules = 0
    for name in find_modules(root):
        for document in read_module(root, name):
            if document.key not in seen:
                seen[document.key] = document
                total += document.size
        modules += 1
        if total >= max_bytes:
            break
    if total < min(MIN_BYTES, max_bytes):
        raise CorpusError(
            f"too little text: {total:,} bytes in {modules} files under {root}, {min(MIN_BYTES, max_bytes):,} needed. "
            "The standard library must lie there as plain .py files, not as a zip, not as .pyc alone and not as the "
            "distribution's minimal Python: install the full one, or run this under another interpreter."
        )
    return list(seen.values())


# ---------------------------------------------------------------------------------------------------------------------
# Choose: validation by whole modules, the rest is for training
# ---------------------------------------------------------------------------------------------------------------------
def choose_val_modules(documents: list[Document], max_bytes: int) -> set[str]:
    """Whole modules, in the order of the hash of their path, that fit into `max_bytes` UTF-8 bytes together.

    A module over a quarter of that is left to training, or it alone would decide the validation loss.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.module] = sizes.get(document.module, 0) + document.size
    chosen: set[str] = set()
    total = 0
    for name in sorted(sizes, key=lambda name: sha256(f"val/{name}".encode())):
        if sizes[name] <= max_bytes // 4 and total + sizes[name] <= max_bytes:
            chosen.add(name)
            total += sizes[name]
    return chosen


def cut(documents: list[Document], max_bytes: int) -> list[Document]:
    """The longest head of `documents`, whole documents only, of at most `max_bytes` UTF-8 bytes."""
    ends = np.cumsum([document.size for document in documents])
    return documents[: int(np.searchsorted(ends, max_bytes, side="right"))]


def shingles(text: str) -> set[int]:
    """Hashes of every run of SHINGLE_WORDS words."""
    words = text.split()
    return {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(len(words) - SHINGLE_WORDS + 1)}


def drop_near_copies(val: list[Document], train: list[Document]) -> list[Document]:
    """Validation documents of whose runs of words less than NEAR_COPY_SHARE also stand in training.

    The library holds edited copies of its own modules (lib2to3 one of tokenize), which no exact hash finds.
    """
    known = set().union(*(shingles(document.text) for document in train))
    runs = [(document, shingles(document.text)) for document in val]
    return [document for document, own in runs if len(own & known) <= NEAR_COPY_SHARE * len(own)]


def split_train_val(documents: list[Document], max_train: int, max_val: int) -> tuple[list[Document], list[Document]]:
    """Shuffled training and validation documents (limits in UTF-8 bytes). Raises CorpusError if they overlap."""
    held_out = choose_val_modules(documents, max_val)
    shuffled = random.Random(SEED).sample(documents, len(documents))
    train = cut([document for document in shuffled if document.module not in held_out], max_train)
    val = drop_near_copies([document for document in shuffled if document.module in held_out], train)
    if not train or not val:
        raise CorpusError(f"too little text to split: {len(train)} train and {len(val)} validation documents are left")
    check_disjoint(train, val)
    return train, val


def check_disjoint(train: list[Document], val: list[Document]) -> None:
    """Proof that no document and no module is on both sides. Raises CorpusError: it would be a bug of this file."""
    shared = {document.key for document in train} & {document.key for document in val}
    modules = {document.module for document in train} & {document.module for document in val}
    if shared or modules:
        raise CorpusError(f"{len(shared)} documents and {len(modules)} modules are in both train and validation")


# ---------------------------------------------------------------------------------------------------------------------
# Write
# ---------------------------------------------------------------------------------------------------------------------
def check_writable(paths: Paths) -> None:
    """Creates the output folders and tries them before the work of half a minute. Raises CorpusError."""
    for folder in (paths.train.parent, paths.tokenizer.parent):
        probe = folder / f".{uuid.uuid4().hex}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise CorpusError(f"cannot write to {folder} ({error.strerror}): choose another --data-dir") from error


def read_finished(paths: Paths, settings: dict) -> dict | None:
    """The manifest of a finished corpus with these settings whose files have the stated sizes, else None."""
    manifest = read_json(paths.manifest)
    try:
        sizes = [paths.root.joinpath(manifest[part]["path"]).stat().st_size for part in ("train", "val", "tokenizer")]
        stated = [manifest[part]["file_bytes"] for part in ("train", "val", "tokenizer")]
        return manifest if sizes == stated and manifest["settings"] == settings else None
    except (OSError, KeyError, TypeError):
        return None  # absent, half-deleted or of another make: build anew


def units(documents: list[Document], first: int) -> Iterator[Unit]:
    """The documents' texts in units of a hundred, numbered from `first`."""
    for at in range(0, len(documents), 100):
        yield Unit(first + at, [document.text.encode() for document in documents[at : at + 100]])


def write_shards(paths: Paths, work: Path, model: bytes, train: list[Document], val: list[Document]) -> dict:
    """Shards in `work`; what the manifest says of them. Each split is one shard, so its entry names the file itself,
    too.
    """
    job = prepare.Job(paths.train.parent.name, val_docs=len(val), shard_tokens=2**31 - 1)
    build = prepare.Build(work, job, vocabulary.Coder(model).table)
    prepare.run_build(
        build, prepare.coded_units([*units(val, 0), *units(train, len(val))], model, job, texts, workers=1)
    )
    parts = build.finish()
    for split, documents in (("train", train), ("val", val)):
        shard = parts[split]["shards"][0]
        place = {"path": (paths.train.parent / shard["path"]).relative_to(paths.root).as_posix()}
        file = place | {key: shard[key] for key in ("file_bytes", "sha256")}
        parts[split] = file | {"modules": len({document.module for document in documents})} | parts[split]
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Build
# ---------------------------------------------------------------------------------------------------------------------
def build_anew(paths: Paths, settings: dict, root: Path, log: Callable[[str], object]) -> dict:
    """The steps of the build, from the sources under `root` to the manifest. Raises CorpusError."""
    started = time.perf_counter()
    vocab_size, max_train = settings["vocab_size"], settings["max_bytes"]
    max_val = min(MAX_VAL_BYTES, max_train // 10)
    train, val = split_train_val(collect(root, max_train + max_val), max_train, max_val)
    log(f"local_corpus: read {len(train) + len(val):,} documents at {time.perf_counter() - started:.1f}s")

    model = vocabulary.train((document.text for document in cut(train, TOKENIZER_BYTES)), vocab_size)
    log(f"local_corpus: trained the {vocab_size}-piece tokenizer at {time.perf_counter() - started:.1f}s")

    with tempfile.TemporaryDirectory(dir=paths.train.parent.parent, prefix=".local_corpus_") as folder:
        work = Path(folder)
        parts = write_shards(paths, work, model, train, val)
        (work / "tokenizer.model").write_bytes(model)
        tokenizer = {
            "path": paths.tokenizer.relative_to(paths.root).as_posix(),
            "file_bytes": len(model),
            "sha256": sha256(model),
        }
        manifest = {
            "name": paths.train.parent.name,
            "source": "sources, docstrings, help() topics and text files of the Python standard library (PSF licence)",
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "sentencepiece": spm.__version__,
            "settings": settings,
            "transform": prepare.transform_entry(vocabulary.Coder(model)),
            "tokenizer": tokenizer | {"vocab_size": vocab_size, "bos_id": BOS_ID},
            **parts,
        }
        for split in ("train", "val"):
            log(prepare.describe(split, manifest[split], "local_corpus"))
        prepare.publish(prepare.Places(paths.root, paths.train.parent, paths.tokenizer), manifest, work)
    log(f"local_corpus: wrote {paths.manifest} at {time.perf_counter() - started:.1f}s")
    return manifest


def build(
    data_dir: Path | str = "data",
    vocab_size: int = 1024,
    log: Callable[[str], object] = print,
    *,
    force: bool = False,
    max_bytes: int = MAX_TRAIN_BYTES,
    source_dir: Path | str | None = None,
) -> dict:
    """Builds the corpus below `data_dir` unless it is there already, and returns its manifest.

    vocab_size: pieces of the tokenizer, 300 to 65,536 (256 of them are the byte pieces). max_bytes: UTF-8 bytes of
    training text at most; validation takes a tenth of it, at most 400,000. source_dir: the directory to read instead
    of the running Python's standard library. Same Python and same arguments give the same bytes.
    Raises CorpusError (unwritable directory, too little text) and ValueError (vocab_size).
    """
    if not 300 <= vocab_size <= 2**16:
        raise ValueError(f"vocab_size={vocab_size}: tokens are uint16 and 260 pieces are reserved, so 300 to 65536")
    paths = Paths.of(data_dir, vocab_size)
    settings = {"revision": REVISION, "seed": SEED, "vocab_size": vocab_size, "max_bytes": max_bytes}
    finished = None if force else read_finished(paths, settings)
    if finished is not None:
        log(f"local_corpus: {paths.manifest} is complete, nothing to do")
        return finished

    check_writable(paths)
    root = Path(source_dir or sysconfig.get_paths()["stdlib"])
    try:
        return build_anew(paths, settings, root, log)
    except (ValueError, SourceError, prepare.PrepareError) as error:
        raise CorpusError(str(error)) from error


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build a small corpus from the Python standard library, offline.")
    parser.add_argument("--data-dir", default="data", help="directory that gets datasets/ and tokenizers/")
    parser.add_argument("--vocab-size", type=int, default=1024, help="pieces of the tokenizer, 300 to 65536")
    parser.add_argument("--force", action="store_true", help="build even if a finished corpus is there")
    args = parser.parse_args()
    try:
        build(args.data_dir, args.vocab_size, force=args.force)
    except (CorpusError, ValueError) as error:
        raise SystemExit(f"local_corpus: error: {error}") from error


if __name__ == "__main__":
    main()
