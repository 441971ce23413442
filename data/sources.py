"""Where documents come from: jsonl, parquet and text files, compressed or not, or the tokens of finished shards, read
in order in units of about a megabyte.

A unit is what one worker codes at a time. Documents are numbered as they stand in the source, those without text
included, so the border between validation and training never depends on what a tokenizer makes of a text, nor on where
units end.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import json_values
import numpy as np
from shards import BOS, ShardError, chunks, documents, read_json, read_manifest, read_shard, sha256_file, split_paths
from transforms import REGISTRY
from vocabulary import Coder, check_operators, sized

UNIT_BYTES = 1 << 20
TEXT_BYTES = 1 << 24  # longest document of a text file; JSON lines have no such limit, because they cannot be cut
JSONL, PARQUET, TEXT = {".jsonl", ".json", ".ndjson"}, {".parquet"}, {".txt", ".text", ".md", ""}
PACKED = {".xz", ".gz", ".bz2", ".zst"}
SAMPLE = 64  # documents of each split that a tokenizer is tried on
KNOWN = 0.9  # share that it must encode again as it was; the right one makes 1.0, a wrong one next to 0
INVALID = "with invalid UTF-8"


class SourceError(Exception):
    """A source cannot be read; the message names the file, and the document where there is one."""


class Unit(NamedTuple):
    """Neighbouring documents: lines of JSON in one piece, or a list of texts, or of tokens as uint16 in memory.
    `first`: the number of the first one.
    """

    first: int
    data: bytes | list[bytes | None]

    @property
    def count(self) -> int:
        """Documents in it."""
        if isinstance(self.data, list):
            return len(self.data)
        return self.data.count(b"\n") + (not self.data.endswith(b"\n"))

    @property
    def size(self) -> int:
        """Bytes in it."""
        return sum(len(text or b"") for text in self.data) if isinstance(self.data, list) else len(self.data)

    def cut(self, number: int) -> tuple[Unit, Unit]:
        """What stands before document `number` and the rest; both hold at least one document."""
        n = number - self.first
        if isinstance(self.data, list):
            return Unit(self.first, self.data[:n]), Unit(number, self.data[n:])
        rest = self.data.split(b"\n", n)[n]
        return Unit(self.first, self.data[: len(self.data) - len(rest)]), Unit(number, rest)


class Hashed:
    """A file whose sha256 is taken while it is read; `tell` reports bytes that have been read."""

    def __init__(self, file: BinaryIO, tell: Callable[[int], object]):
        self.file, self.tell, self.hash = file, tell, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.hash.update(data)
        self.tell(len(data))
        return data


Reader = Callable[[Unit, Counter], Iterator[str]]  # unit -> its texts; what had to be mended is counted by document


class Denominator(NamedTuple):
    """`bytes` of text that the tokens of a source's validation documents stand for: what bits per byte were divided by
    until now.

    `mended_documents` of them hold bytes that are no UTF-8 and become U+FFFD: `mended_bytes` before, `mended_bytes_now`
    after.
    """

    bytes: int = 0
    mended_documents: int = 0
    mended_bytes: int = 0
    mended_bytes_now: int = 0

    @property
    def now(self) -> int:
        """Bytes that the same documents must have with another tokenizer."""
        return self.bytes - self.mended_bytes + self.mended_bytes_now


class Source:
    """Files in the given order; folders stand for their files by name. After `units` is used up, `sha256` knows every
    file.

    `reader` reads its units, in whichever process. `val_docs`: how many of the first documents are validation, where
    the source itself says so.
    """

    val_docs: int | None = None

    def __init__(self, paths: Iterable[Path], text_key: str = "text", separator: str = ""):
        self.files = [file for path in paths for file in self.expand(Path(path))]
        self.text_key, self.separator = text_key, separator.encode()
        self.reader: Reader = partial(texts, text_key=text_key)
        self.sha256: dict[str, str] = {}
        if not self.files:
            raise SourceError("no source files")
        if len({file.name for file in self.files}) < len(self.files):
            raise SourceError("two source files of one name: the manifest could not tell them apart")

    @staticmethod
    def expand(path: Path) -> list[Path]:
        """The files that a path stands for."""
        if path.is_dir():
            return sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith(".") and format_of(f))
        if not path.is_file():
            raise SourceError(f"source {path} is missing")
        if not format_of(path):
            kinds = sorted(JSONL | PARQUET | TEXT - {""})
            raise SourceError(
                f"source {path}: unknown kind; give {kinds}, perhaps with {sorted(PACKED)}, or a folder of shards"
            )
        return [path]

    @property
    def entries(self) -> list[dict]:
        """What identifies the source without reading it."""
        return [{"name": file.name, "file_bytes": file.stat().st_size} for file in self.files]

    @property
    def is_challenge(self) -> bool:
        """True for the contest's published documents, or files that lie beside their manifest."""
        return any(
            f.name.startswith("docs_selected") or (f.parent / "docs_selected.source_manifest.json").is_file()
            for f in self.files
        )

    def denominator(self, coder: Coder) -> Denominator | None:
        """The bytes that validation must have in the tokens of `coder`; None where nothing has counted them before."""
        return None

    def units(self, tell: Callable[[int], object] = lambda _: None) -> Iterator[Unit]:
        """All documents; `tell` hears of bytes read from the files as they lie on disk."""
        first = 0
        for file in self.files:
            for data in self.read(file, tell):
                unit = Unit(first, data)
                first += unit.count
                yield unit

    def read(self, path: Path, tell: Callable[[int], object]) -> Iterator[bytes | list[bytes | None]]:
        """The data of one file's units. SourceError names a file that cannot be read to its end."""
        kind = format_of(path)
        with open(path, "rb") as raw:
            file = Hashed(raw, tell)
            try:
                if kind == "parquet":
                    yield from parquet_units(raw, self.text_key, path)
                else:
                    with unpacked(file, path) as stream:
                        yield from (
                            json_values.units(stream, self.text_key, jsonl_units)
                            if kind == "jsonl"
                            else text_units(stream, self.separator)
                        )
            except json_values.JsonError as error:
                raise SourceError(f"source {path}: {error}") from None
            except (EOFError, OSError, lzma.LZMAError) as error:
                raise SourceError(f"source {path} is damaged: {error}") from error
            if kind == "parquet":
                raw.seek(0)
            while file.read(UNIT_BYTES):
                pass  # what a reader left: the hash is that of the whole file
            self.sha256[path.name] = file.hash.hexdigest()


def format_of(path: Path) -> str:
    """jsonl, parquet, text, or nothing."""
    suffixes = path.suffixes if path.suffix in PACKED else [*path.suffixes, ""]
    last = suffixes[-2].lower() if len(suffixes) > 1 else ""
    return "jsonl" if last in JSONL else "parquet" if last in PARQUET else "text" if last in TEXT else ""


def unpacked(file: Hashed, path: Path) -> BinaryIO:
    """The stream of what a file holds."""
    if path.suffix == ".zst":
        import zstandard

        return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    openers = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
    return openers[path.suffix](file) if path.suffix in openers else Plain(file)


class Plain:
    """A file that needs no unpacking, as the unpackers' context managers."""

    def __init__(self, file: Hashed):
        self.read = file.read

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def jsonl_units(head: bytes, stream: BinaryIO) -> Iterator[bytes]:
    """Whole lines of about UNIT_BYTES together; a longer line is a unit by itself. `head`: what has been read of the
    stream.
    """
    held: list[bytes] = []
    size = 0
    blocks = (head[at : at + UNIT_BYTES] for at in range(0, len(head), UNIT_BYTES))
    for block in chain(blocks, iter(partial(stream.read, UNIT_BYTES), b"")):
        cut = block.rfind(b"\n") + 1 if size + len(block) >= UNIT_BYTES else 0
        if cut:
            yield b"".join([*held, block[:cut]])
            held, size = [], 0
        held.append(block[cut:])
        size += len(block) - cut
    if size:
        yield b"".join(held)


def parquet_units(file: BinaryIO, text_key: str, path: Path) -> Iterator[list[bytes | None]]:
    """Texts of a column, as bytes: what is no UTF-8 is the worker's to handle. SourceError without pyarrow or the
    column.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SourceError("parquet needs pyarrow; pip install -r data/requirements.txt") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        check_column(table.schema_arrow, text_key, path)
        for batch in table.iter_batches(batch_size=256, columns=[text_key]):
            yield batch.column(0).cast(pyarrow.large_binary()).to_pylist()
    except pyarrow.ArrowException as error:
        raise SourceError(f"source {path} is damaged: {error}") from error


def check_column(schema, text_key: str, path: Path) -> None:
    """SourceError if a parquet file has no such column, or one that holds no text; it names those that do."""
    import pyarrow

    plain = {
        column.name: getattr(column.type, "value_type", column.type) for column in schema
    }  # of a dictionary, what it holds
    usual = {pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary(), pyarrow.string_view()}
    texts = [
        name for name, kind in plain.items() if kind in usual and not pyarrow.types.is_nested(schema.field(name).type)
    ]
    if text_key not in plain:
        raise SourceError(
            f"source {path}: no column {text_key!r}, only {schema.names}; text is in {texts}, see --text-key"
        )
    if text_key not in texts and not pyarrow.types.is_null(plain[text_key]):
        raise SourceError(
            f"source {path}: column {text_key!r} holds {schema.field(text_key).type}, not text, which is in {texts}; "
            "see --text-key"
        )


def text_units(stream: BinaryIO, separator: bytes) -> Iterator[list[bytes]]:
    """A text file is one document, or several with a line `separator` between them; none is longer than TEXT_BYTES."""
    pending = b""
    while block := stream.read(UNIT_BYTES):
        *whole, pending = split_lines(pending + block, separator)
        if len(pending) > TEXT_BYTES:  # cut where a line ends, or where it must be
            at = pending.rfind(b"\n", 0, TEXT_BYTES) + 1 or TEXT_BYTES
            whole, pending = [*whole, pending[:at]], pending[at:]
        if whole:
            yield whole
    if pending:
        yield split_lines(pending, separator)


def split_lines(data: bytes, separator: bytes) -> list[bytes]:
    """`data` cut at lines that hold the separator alone; an empty separator never cuts."""
    return data.split(b"\n" + separator + b"\n") if separator else [data]


def texts(unit: Unit, odd: Counter, text_key: str = "text") -> Iterator[str]:
    """The texts of a unit, "" for those that have none; what had to be mended is counted in `odd` by document.

    SourceError names a line that is not JSON: half a file must not pass for a corpus.
    """
    parts = unit.data if isinstance(unit.data, list) else unit.data.removesuffix(b"\n").split(b"\n")
    for number, part in enumerate(parts, unit.first):
        text = decode(part, odd) if isinstance(unit.data, list) else decode_line(part, text_key, number, odd)
        count_nul(text, odd)
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which no encoding can write
            odd["with lone surrogates"] += 1
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield text


def count_nul(text: str, odd: Counter) -> None:
    """NUL is a character like any other, because the tokenizer has a byte for it; but it is odd."""
    if "\0" in text:
        odd["with NUL"] += 1


def decode(data: bytes | None, odd: Counter) -> str:
    """UTF-8 to text; U+FFFD stands for what is none."""
    try:
        return (data or b"").decode()
    except UnicodeDecodeError:
        odd[INVALID] += 1
        return data.decode(errors="replace")


def decode_line(line: bytes, text_key: str, number: int, odd: Counter) -> str:
    """The text of a JSON line: under `text_key` ("a.b": b inside a), or the whole line where it is a string."""
    if not line.strip():
        return ""
    try:
        record = json.loads(decode(line, odd))
    except ValueError as error:
        raise SourceError(f"document {number}, line {number + 1}: not JSON ({error}): {line[:60]!r}") from None
    text = json_values.field(record, text_key)
    return text if isinstance(text, str) else ""


# ---------------------------------------------------------------------------------------------------------------------
# Finished shards as a source
# ---------------------------------------------------------------------------------------------------------------------
class Detokenizer:
    """The reader of units of tokens: each document's text as it was before its transform. ValueError if tokenizer and
    transform do not fit. Other processes get what it is made of, not what it has built.
    """

    def __init__(self, model: bytes, transform: str, pairs: bool):
        self.made_of = model, transform, pairs
        self.coder = Coder(*self.made_of)

    def __reduce__(self) -> tuple:
        return Detokenizer, self.made_of

    def __call__(self, unit: Unit, odd: Counter) -> Iterator[str]:
        """Texts of a unit, each of uint16 in bytes."""
        return (self.text(number, np.frombuffer(data, "<u2"), odd) for number, data in enumerate(unit.data, unit.first))

    def text(self, number: int, tokens: np.ndarray, odd: Counter) -> str:
        """The text of a document's tokens [n]; U+FFFD stands for what is no UTF-8. SourceError names a document without
        a text.
        """
        try:
            text = self.coder.transform.decode(decode(self.coder.raw(tokens), odd))
        except ValueError as error:
            raise SourceError(f"document {number}: {error}") from error
        count_nul(text, odd)
        return text

    def knows(self, tokens: np.ndarray) -> bool:
        """True if a document's text has these tokens [n] again, and SentencePiece's own decoder gives the same text."""
        try:
            text = self.text(0, tokens, Counter())
            return self.coder.decode(tokens) == text and self.coder.encode(text).tolist() == tokens.tolist()
        except (ValueError, SourceError):  # it cannot even read or write it
            return False


class Shards(Source):
    """A finished folder of shards and the tokenizer that made them. Documents are numbered through, those of validation
    first.

    SourceError if the tokenizer is another one, or the text cannot be brought back; ShardError names a damaged file.
    """

    def __init__(self, folder: Path, tokenizer: Path):
        super().__init__([folder, tokenizer])
        self.folder, self.tokenizer = folder, tokenizer
        self.splits = {split: split_paths(folder, split) for split in ("val", "train")}
        beside = set(self.files) - {path for paths in self.splits.values() for path in paths}
        self.beside = {path.name: sha256_file(path) for path in beside}
        self.sha256 |= self.beside
        try:
            self.reader = Detokenizer(tokenizer.read_bytes(), *self.transform())
            self.reader.coder.check_front()
        except ShardError:
            raise
        except (ValueError, RuntimeError, OSError) as error:
            raise SourceError(f"{tokenizer}: {error}") from error
        self.check_starts()
        self.val_docs = self.count_val()
        self.check_tokenizer()

    @staticmethod
    def expand(path: Path) -> list[Path]:
        """Shards, sidecars and manifest of a folder; the tokenizer's file is one by itself."""
        if path.is_dir():
            for split in ("val", "train"):
                if not split_paths(path, split):
                    raise SourceError(f"source {path}: no fineweb_{split}_*.bin; both splits are needed")
            kinds = [split_paths(path, kind) for kind in ("val", "train", "val_bytes")]
            return [*sum(kinds, []), *path.glob("manifest.json")]
        if not path.is_file():
            raise SourceError(f"source tokenizer {path} is missing")
        return [path]

    @property
    def entries(self) -> list[dict]:
        """As of any source; but shards are all of one size, so that the tokenizer and what else is small go with their
        sha256.
        """
        return [e | ({"sha256": self.beside[e["name"]]} if e["name"] in self.beside else {}) for e in super().entries]

    @property
    def is_challenge(self) -> bool:
        """False: how these documents are split has been decided."""
        return False

    def transform(self) -> tuple[str, bool]:
        """(transform, pairs) of the text, as the folder's manifest says. SourceError where the original cannot be
        known.
        """
        path = self.folder / "manifest.json"
        manifest = read_json(path)
        if manifest is None and path.is_file():
            raise SourceError(f"{path} is damaged, so nobody knows what was done to the text")
        said = (manifest or {}).get("transform")
        if not isinstance(said, dict):  # not by prepare.py
            if said or split_paths(self.folder, "val_bytes"):
                raise SourceError(
                    f"{self.folder} has byte sidecars (fineweb_val_bytes_*.bin) or a transform, but no manifest of "
                    "data/prepare.py: its text holds operators that nothing explains, so it cannot be brought back"
                )
            check_operators(self.folder, self.tokenizer.read_bytes())
            return "none", False
        name = said.get("name")
        if name not in REGISTRY or REGISTRY[name].lossy:
            why = "is lossy: the original text is not in these shards" if name in REGISTRY else "is not known here"
            raise SourceError(f"{path}: transform {name!r} {why}")
        if read_manifest(self.folder)["tokenizer"].get("sha256") != self.beside[self.tokenizer.name]:
            raise SourceError(f"{self.tokenizer} is not the tokenizer that {path} names (sha256)")
        return name, bool(said.get("pairs"))

    def check_starts(self) -> None:
        """ShardError for a damaged shard, now and not after an hour, and for tokens in front of a split's first BOS."""
        for paths in self.splits.values():
            first, *_ = (int(read_shard(path)[0]) for path in paths)
            if first != BOS:
                raise ShardError(
                    f"shard {paths[0]} begins with token {first} in the middle of a document, whose beginning "
                    f"(BOS, {BOS}) "
                    "is in no shard"
                )

    def count_val(self) -> int:
        """Documents of validation. SourceError if a token is not of the tokenizer."""
        count, pieces = 0, len(self.reader.coder.pieces)
        for path in self.splits["val"]:
            for part in chunks(path):
                if part.max() >= pieces:
                    raise SourceError(
                        f"{self.tokenizer} is not the tokenizer of {path}, which holds token {part.max()}: it has only "
                        f"{pieces} pieces"
                    )
                count += int((part == BOS).sum())
        return count

    def check_tokenizer(self) -> None:
        """SourceError if a sample is not encoded again as it was: what a wrong tokenizer decodes is rubbish."""
        for split, paths in self.splits.items():
            same = [self.reader.knows(tokens) for tokens in islice(documents(paths), SAMPLE)]
            if sum(same) < KNOWN * len(same):
                raise SourceError(
                    f"{self.tokenizer} is not the tokenizer of {self.folder}: only {sum(same)} of {len(same)} {split} "
                    "documents give their own tokens when decoded and encoded again"
                )

    def denominator(self, coder: Coder) -> Denominator:
        """Counted by the byte table or the sidecars of the shards, each document by itself."""
        total: Counter = Counter()
        for number, (tokens, size) in enumerate(sized(self.folder, "val", self.reader.coder)):
            odd: Counter = Counter()
            text = self.reader.text(number, tokens, odd)
            total["bytes"] += size
            if odd[INVALID]:
                now = coder.table.total(coder.encode(text))
                total.update(mended_documents=1, mended_bytes=size, mended_bytes_now=now)
        return Denominator(**total)

    def units(self, tell: Callable[[int], object] = lambda _: None) -> Iterator[Unit]:
        """All documents, each with its BOS; no unit holds documents of both splits."""
        first = 0
        for paths in self.splits.values():
            for data in token_units(documents(self.hashed(paths))):
                unit = Unit(first, data)
                tell(unit.size)
                first += unit.count
                yield unit

    def hashed(self, paths: list[Path]) -> Iterator[Path]:
        """Each file when its turn comes, with its sha256 known; it is read again at once, from the system's memory."""
        for path in paths:
            self.sha256[path.name] = sha256_file(path)
            yield path


def token_units(docs: Iterable[np.ndarray]) -> Iterator[list[bytes]]:
    """Documents' tokens, uint16 in bytes, about UNIT_BYTES together."""
    held: list[bytes] = []
    size = 0
    for tokens in docs:
        held.append(tokens.astype("<u2").tobytes())
        size += len(held[-1])
        if size >= UNIT_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def open_source(
    paths: list[Path], text_key: str = "text", separator: str = "", tokenizer: Path | None = None
) -> Source:
    """Documents, or a folder of shards with the tokenizer that made them. SourceError if one is given without the
    other.
    """
    folders = [path for path in paths if path.is_dir() and any(path.glob("fineweb_*.bin"))]
    if not folders and tokenizer:
        raise SourceError(
            f"--source-tokenizer {tokenizer} is for a folder of shards (fineweb_*.bin), and {paths[0]} is none"
        )
    if not folders:
        return Source(paths, text_key, separator)
    if len(paths) > 1:
        raise SourceError(f"{folders[0]} holds shards, and then it is the only source")
    if not tokenizer:
        raise SourceError(f"{folders[0]} holds shards: name the tokenizer that made them with --source-tokenizer MODEL")
    return Shards(folders[0], tokenizer)
