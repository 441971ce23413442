"""Where documents come from: jsonl, parquet and text files, compressed or not, read in order in units of about a megabyte.

A unit is what one worker codes at a time. Documents are numbered as they stand in the source, those without text included, so
the border between validation and training never depends on what a tokenizer makes of a text, nor on where units end.
"""
from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

UNIT_BYTES = 1 << 20
TEXT_BYTES = 1 << 24  # longest document of a text file; JSON lines have no such limit, because they cannot be cut
JSONL, PARQUET, TEXT = {".jsonl", ".json", ".ndjson"}, {".parquet"}, {".txt", ".text", ".md", ""}
PACKED = {".xz", ".gz", ".bz2", ".zst"}


class SourceError(Exception):
    """A source cannot be read; the message names the file, and the document where there is one."""


class Unit(NamedTuple):
    """Neighbouring documents: lines of JSON in one piece, or a list of texts. `first`: the number of the first one."""
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
        return Unit(self.first, self.data[:len(self.data) - len(rest)]), Unit(number, rest)


class Hashed:
    """A file whose sha256 is taken while it is read; `tell` reports bytes that have been read."""

    def __init__(self, file: BinaryIO, tell: Callable[[int], object]):
        self.file, self.tell, self.hash = file, tell, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.hash.update(data)
        self.tell(len(data))
        return data


class Source:
    """Files in the given order; folders stand for their files by name. After `units` is used up, `sha256` knows every file."""

    def __init__(self, paths: Iterable[Path], text_key: str = "text", separator: str = ""):
        self.files = [file for path in paths for file in self.expand(Path(path))]
        self.text_key, self.separator = text_key, separator.encode()
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
            raise SourceError(f"source {path}: unknown kind; give {kinds}, perhaps with {sorted(PACKED)}")
        return [path]

    @property
    def entries(self) -> list[dict]:
        """What identifies the source without reading it."""
        return [{"name": file.name, "file_bytes": file.stat().st_size} for file in self.files]

    @property
    def is_challenge(self) -> bool:
        """True for the contest's published documents, or files that lie beside their manifest."""
        return any(f.name.startswith("docs_selected") or (f.parent / "docs_selected.source_manifest.json").is_file()
                   for f in self.files)

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
                        yield from jsonl_units(stream) if kind == "jsonl" else text_units(stream, self.separator)
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


def jsonl_units(stream: BinaryIO) -> Iterator[bytes]:
    """Whole lines of about UNIT_BYTES together; a longer line is a unit by itself."""
    held: list[bytes] = []
    size = 0
    while block := stream.read(UNIT_BYTES):
        cut = block.rfind(b"\n") + 1 if size + len(block) >= UNIT_BYTES else 0
        if cut:
            yield b"".join([*held, block[:cut]])
            held, size = [], 0
        held.append(block[cut:])
        size += len(block) - cut
    if size:
        yield b"".join(held)


def parquet_units(file: BinaryIO, text_key: str, path: Path) -> Iterator[list[bytes | None]]:
    """Texts of a column, as bytes: what is no UTF-8 is the worker's to handle. SourceError without pyarrow or the column."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SourceError("parquet needs pyarrow; pip install -r data/requirements.txt") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if text_key not in table.schema_arrow.names:
            raise SourceError(f"source {path}: no column {text_key!r}, only {table.schema_arrow.names}; see --text-key")
        for batch in table.iter_batches(batch_size=256, columns=[text_key]):
            yield batch.column(0).cast(pyarrow.large_binary()).to_pylist()
    except pyarrow.ArrowException as error:
        raise SourceError(f"source {path} is damaged: {error}") from error


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


def texts(unit: Unit, text_key: str, odd: Counter) -> Iterator[str]:
    """The texts of a unit, "" for those that have none; what had to be mended is counted in `odd` by document.

    SourceError names a line that is not JSON: half a file must not pass for a corpus.
    """
    parts = unit.data if isinstance(unit.data, list) else unit.data.removesuffix(b"\n").split(b"\n")
    for number, part in enumerate(parts, unit.first):
        text = decode(part, odd) if isinstance(unit.data, list) else decode_line(part, text_key, number, odd)
        if "\0" in text:
            odd["with NUL"] += 1  # a character like any other: the tokenizer has a byte for it
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which no encoding can write
            odd["with lone surrogates"] += 1
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield text


def decode(data: bytes | None, odd: Counter) -> str:
    """UTF-8 to text; U+FFFD stands for what is none."""
    try:
        return (data or b"").decode()
    except UnicodeDecodeError:
        odd["with invalid UTF-8"] += 1
        return data.decode(errors="replace")


def decode_line(line: bytes, text_key: str, number: int, odd: Counter) -> str:
    """The text of a JSON line: under `text_key`, or the whole line where it is a string."""
    if not line.strip():
        return ""
    try:
        record = json.loads(decode(line, odd))
    except ValueError as error:
        raise SourceError(f"document {number}, line {number + 1}: not JSON ({error}): {line[:60]!r}") from None
    text = record.get(text_key) if isinstance(record, dict) else record
    return text if isinstance(text, str) else ""
