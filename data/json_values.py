"""JSON that does not stand one record a line: an array of records, a table inside an object, records spread over
several lines.

Exports come in all of these forms under the names .json and .jsonl. They are read value by value, so that memory does
not grow with the file, and become the JSON lines that the rest of data/ reads; `field` finds the text of a record.
"""

from __future__ import annotations

import codecs
import json
import re
import shlex
from collections.abc import Callable, Iterator
from typing import BinaryIO

BLOCK = 1 << 20  # bytes that are read at a time
WRAPPERS = (
    "data",
    "rows",
    "documents",
    "docs",
    "records",
    "examples",
    "items",
    "texts",
)  # keys under which exporters put the records
BLANK = re.compile(r"\s*")
DECODER = json.JSONDecoder()
TRIED = 1000  # records; where none of so many has the key, the rest of a large file is not searched for it


class JsonError(ValueError):
    """The file holds no records that can be read; the message says why and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Records and their keys
# ---------------------------------------------------------------------------------------------------------------------
def field(record: object, key: str) -> object:
    """What a record holds under a key; "a.b" is b inside a where there is no key of that very name. A bare string is
    its own text.
    """
    if not isinstance(record, dict):
        return record
    if key in record or "." not in key:
        return record.get(key)
    outer, inner = key.split(".", 1)
    return field(record[outer], inner) if isinstance(record.get(outer), dict) else None


def keys_of(record: dict, front: str = "") -> Iterator[tuple[str, object]]:
    """(key, value) of a record and of the records inside it, the latter as "outer.inner"."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{front}{key}.")
        else:
            yield front + key, value


class KeyCheck:
    """Looks whether records have the key of the text, until the first one has. JsonError names the keys that they do
    have.
    """

    def __init__(self, key: str):
        self.key, self.found, self.records, self.seen = key, False, 0, {}

    def add(self, record: object) -> None:
        """One record more."""
        if isinstance(field(record, self.key), str):
            self.found = True
        elif isinstance(record, dict):
            self.records += 1
            for key, value in keys_of(record):
                self.seen[key] = self.seen.get(key, False) or isinstance(value, str)
            if self.records >= TRIED:
                self.end()

    def lines(self, data: bytes) -> None:
        """The records of JSON lines; a line that is not JSON is left to the reader, who names it."""
        for line in data.splitlines():
            if self.found:
                return
            try:
                record = json.loads(line) if line.strip() else None
            except ValueError:
                continue
            self.add(record)

    def end(self) -> None:
        """No record follows."""
        if self.found or not self.records:
            return
        texts = [key for key, is_text in self.seen.items() if is_text]
        wrong = (
            "holds no text"
            if self.key in self.seen or any(k.startswith(self.key + ".") for k in self.seen)
            else "is in none"
        )
        advice = (
            f"name the text's with --text-key, for example --text-key {shlex.quote(texts[0])}"
            if texts
            else "none of them holds text"
        )
        raise JsonError(
            f"the key {self.key!r} {wrong} of {self.records:,} records, whose keys are {list(self.seen)}; {advice}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Values, one behind the other
# ---------------------------------------------------------------------------------------------------------------------
class Text:
    """The characters of a stream, read as far as they are needed. Bytes that are no UTF-8 come through unchanged
    (surrogateescape).
    """

    def __init__(self, head: bytes, stream: BinaryIO):
        self.stream, self.decoder = stream, codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.held, self.at, self.passed, self.ended = self.decoder.decode(head), 0, 0, False

    def more(self, size: int = BLOCK) -> bool:
        """Reads on; False at the end of the stream. What has been taken is forgotten."""
        data = self.stream.read(size)
        self.ended = not data
        self.passed += self.at
        self.held, self.at = self.held[self.at :] + self.decoder.decode(data, not data), 0
        return not self.ended

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self.at = BLANK.match(self.held, self.at).end()
            if self.at < len(self.held) or not self.more():
                return self.held[self.at : self.at + 1]

    def take(self, expected: str) -> None:
        """Passes over the next character, which is one of the expected ones."""
        found = self.peek()
        if not found or found not in expected:
            raise self.error(f"{expected!r} expected")
        self.at += 1

    def value(self) -> object:
        """The next value, whole."""
        self.peek()
        size = BLOCK
        while True:
            try:
                value, end = DECODER.raw_decode(self.held, self.at)
                if end < len(self.held) or self.ended:  # else a number could go on
                    self.at = end
                    return value
            except ValueError as error:
                if self.ended:
                    raise self.error(str(error)) from None
            self.more(size)
            size *= 2  # a value of many blocks is not tried once a block

    def error(self, why: str) -> JsonError:
        """What is wrong here."""
        return JsonError(
            f"not JSON ({why}) at character {self.passed + self.at:,}: {self.held[self.at : self.at + 60]!r}"
        )


def records(text: Text, key: str) -> Iterator[object]:
    """Records of all values of a text: elements of arrays, tables inside objects (under `key` or one of WRAPPERS),
    other objects.
    """
    while start := text.peek():
        if start == "[":
            yield from elements(text)
        elif start == "{":
            yield from table(text, key)
        else:
            yield text.value()


def elements(text: Text) -> Iterator[object]:
    """The elements of an array."""
    text.take("[")
    while text.peek() != "]":
        yield text.value()
        if text.peek() != "]":
            text.take(",")
    text.take("]")


def table(text: Text, key: str) -> Iterator[object]:
    """The records inside an object, or the object as a record where no array in it is a table."""
    text.take("{")
    record, inside = {}, False
    while text.peek() != "}":
        name = text.value()
        text.take(":")
        if text.peek() == "[" and name in (key, *WRAPPERS):
            inside = True
            yield from ({key: value} if name == key else value for value in elements(text))
        else:
            record[name] = text.value()
        if text.peek() != "}":
            text.take(",")
    text.take("}")
    column = record.get(key)
    if isinstance(column, dict) and all(isinstance(value, str) for value in column.values()):
        yield from ({key: value} for value in column.values())  # as pandas writes a table: row number -> text
    elif not inside:
        yield record


def is_lines(head: bytes, ended: bool, key: str) -> bool:
    """True if a file that begins with `head` (all of it if `ended`) holds one record a line, as far as its first line
    tells.
    """
    line, newline, rest = head.lstrip().partition(b"\n")
    if line[:1] != b"{":
        return line[:1] != b"["
    if newline or ended:
        try:
            record = json.loads(line)
        except ValueError:
            return not (
                newline and line.rstrip()[-1:] in b"{[,:"
            )  # these go on in the next line; others are cut or damaged
        only = ended and not rest.strip()
        tables = {name for name in (key, *WRAPPERS) if isinstance(record.get(name), list)}
        return not (only and (tables or isinstance(record.get(key), dict)) and not isinstance(field(record, key), str))
    names = b"|".join(re.escape(name.encode()) for name in (key, *WRAPPERS))
    opens = re.search(
        rb'"(?:%s)"\s*:\s*\[' % names, line
    )  # one line of over a block: a long document, or a whole table
    text = re.search(rb'"%s"\s*:\s*"' % re.escape(key.encode()), line)
    return not opens or text is not None and text.start() < opens.start()


def as_lines(head: bytes, stream: BinaryIO, key: str) -> Iterator[bytes]:
    """JSON lines of about BLOCK bytes together, for the records of a stream whose first bytes have been read."""
    held, size = [], 0
    for record in records(Text(head, stream), key):
        held.append(line_of(record))
        size += len(held[-1])
        if size >= BLOCK:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def line_of(record: object) -> bytes:
    """A record as one line, its bytes as they stood in the file, also those that are no UTF-8."""
    try:
        return json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(record).encode() + b"\n"


def units(stream: BinaryIO, key: str, cut: Callable[[bytes, BinaryIO], Iterator[bytes]]) -> Iterator[bytes]:
    """JSON lines of a stream in any of these forms; `cut(head, stream)` cuts those that are lines already. JsonError if
    no record has the key.
    """
    head = b""
    while len(head) < BLOCK and (data := stream.read(BLOCK - len(head))):
        head += data
    ended, head = len(head) < BLOCK, head.removeprefix(codecs.BOM_UTF8)
    check = KeyCheck(key)
    for data in cut(head, stream) if is_lines(head, ended, key) else as_lines(head, stream, key):
        if not check.found:
            check.lines(data)
        yield data
    check.end()
