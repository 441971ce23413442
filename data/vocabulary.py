"""Tokenizers: training one with the contest's settings, counting the bytes of its tokens, and coding documents fast.

A `Coder` gives exactly the tokens of SentencePiece's own `encode`, several times faster: no piece of a BPE model of the
contest crosses a space, so every word has the same tokens wherever it stands, and words come again. What is not of that
kind (pieces across spaces, unigram models) goes through SentencePiece as a whole.
"""

from __future__ import annotations

import io
import re
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece as spm
from shards import BOS, CHUNK, ShardError, chunks, documents, read_shard, split_paths
from transforms import CAP, ESC, OPERATORS, REGISTRY, TITLE, UNUSED_BYTES, UPPER, Aliases, Transform

SPACE = "\u2581"  # how SentencePiece writes a space
SENTENCE_CHARS = 1_000  # the SentencePiece trainer silently drops sentences over 4,192 bytes
WORD_CHARS = 1 << 16  # longer words are tokenized in parts: SentencePiece needs about 100 bytes of memory a character
SLICE_CHARS = 1 << 20  # longer texts are coded a slice at a time, so that memory does not grow with them
CACHED_CHARS = 32  # longer words hardly ever come again
CACHED_WORDS = 300_000  # about 60 MB; emptied when full
RUNS = re.compile(r"[^\W\d_]+|[\W\d_]+")  # letters, and what stands between them
# Where a long text may be cut: at a space between plain letters or digits, else between East Asian letters.
# No normalisation, piece or transform reaches over either.
CUT = re.compile(r"(?<=[0-9A-Za-z]) (?=[0-9A-Za-z])")
TIGHT_CUT = re.compile("(?<=[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3])(?=[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3])")


# ---------------------------------------------------------------------------------------------------------------------
# Making tokenizers
# ---------------------------------------------------------------------------------------------------------------------
def sentences(texts: Iterable[str], encode: Callable[[str], str] = str) -> Iterator[str]:
    """Encoded pieces of at most SENTENCE_CHARS characters, cut at white space, for the tokenizer's trainer."""
    for text in texts:
        folded = encode(" ".join(text.split()))
        yield from (match[0] for match in re.finditer(rf"\S.{{0,{SENTENCE_CHARS - 1}}}(?:(?=\s)|$)|\S+", folded))


def train(texts: Iterable[str], vocab_size: int, transform: Transform = REGISTRY["none"]) -> bytes:
    """A SentencePiece BPE model file for transformed texts with the settings of the contest; every operator gets a
    piece of its own.

    ValueError if there is no text, or it does not give vocab_size pieces. The thread count is fixed and the model is
    written to memory: neither machine load nor a path gets into the bytes.
    """
    model = io.BytesIO()
    operators = (
        {"required_chars": "".join(transform.operators)}
        if transform.leads
        else {"user_defined_symbols": list(transform.operators)}
    )  # the latter never merge
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts, transform.encode),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=BOS,
            eos_id=2,
            unk_id=3,
            hard_vocab_limit=False,
            num_threads=4,
            minloglevel=2,
            **(operators if transform.operators else {}),
        )
    except RuntimeError as error:  # SentencePiece names the line of its own source that found out
        raise ValueError(explain_training(str(error), vocab_size)) from error
    got = spm.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if got != vocab_size:
        raise ValueError(f"the text gives only {got} pieces, {vocab_size} asked: use a smaller vocabulary")
    return model.getvalue()


def explain_training(error: str, vocab_size: int) -> str:
    """What the trainer's message means for whoever chose text and vocabulary."""
    if "sentences_.empty()" in error:
        return "there is no text to train it on"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return f"{vocab_size} pieces are too few: the bytes and the usual characters of the text alone need {least[1]}"
    return error.rsplit("] ", 1)[-1].strip() or error


def varint(value: int) -> bytes:
    """Protocol buffers' base-128 integer."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffer: bytes, float32 or integer."""
    kind = 2 if isinstance(value, bytes) else 5 if isinstance(value, float) else 0
    body = {2: lambda: varint(len(value)) + value, 5: lambda: struct.pack("<f", value), 0: lambda: varint(value)}[
        kind
    ]()
    return varint(number << 3 | kind) + body


def byte_model() -> bytes:
    """A SentencePiece model of 260 pieces that maps every byte to its value + 4 and changes no text at all (`byte260`).

    No trainer makes one: it would need a piece for the space, and fold white space. Field numbers are those of
    sentencepiece_model.proto: piece 1 {text 1, score 2, type 3}, trainer 2, normalizer 3.
    """
    special = [("<pad>", 3), ("<s>", 3), ("</s>", 3), ("<unk>", 2)]
    pieces = special + [(f"<0x{i:02X}>", 6) for i in range(256)]
    body = b"".join(field(1, field(1, text.encode()) + field(2, 0.0) + field(3, kind)) for text, kind in pieces)
    trainer = {3: 2, 4: len(pieces), 35: 1, 40: 3, 41: BOS, 42: 2, 43: 0}  # BPE, size, byte fallback, ids
    keep = {3: 0, 4: 0, 5: 0}  # no dummy prefix, no folding, spaces as they are
    settings = (b"".join(field(k, v) for k, v in spec.items()) for spec in (trainer, keep))
    return body + field(2, next(settings)) + field(3, field(1, b"identity") + next(settings))


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, place behind it)."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a protocol buffer's fields; fixed-width ones as bytes."""
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        if tag & 7 == 0:
            value, at = read_varint(data, at)
        else:
            size, at = read_varint(data, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value, at = data[at : at + size], at + size
        yield tag >> 3, value


def is_bpe(model: bytes) -> bool:
    """True for a BPE model: trainer_spec (2) holds model_type (3) = 2."""
    return any(dict(fields(value)).get(3) == 2 for number, value in fields(model) if number == 2)


# ---------------------------------------------------------------------------------------------------------------------
# Counting bytes
# ---------------------------------------------------------------------------------------------------------------------
class ByteTable:
    """UTF-8 bytes of the text that each token stands for: the contest's table rule, and zero for operators."""

    def __init__(self, sp: spm.SentencePieceProcessor, operators: tuple[str, ...] = ()):
        size = sp.vocab_size()
        self.base, self.space, self.edge = np.zeros(size, np.uint16), np.zeros(size, bool), np.zeros(size, bool)
        for i in range(size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                self.edge[i] = True  # no text of its own, and the decoder drops a space behind it
            elif sp.is_byte(i):
                self.base[i] = 1
            else:
                piece = sp.id_to_piece(i).translate(dict.fromkeys(map(ord, operators)))  # operators vanish
                self.space[i] = piece.startswith(SPACE)
                self.base[i] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode())
        self.escape = sp.piece_to_id(ESC) if ESC in operators else -1

    def sizes(self, tokens: np.ndarray, before: int = BOS) -> np.ndarray:
        """Bytes of each token [N] -> [N] uint16; `before` is the token in front of the first."""
        previous = np.concatenate([np.array([before], tokens.dtype), tokens[:-1]])
        sizes = self.base[tokens] + (self.space[tokens] & ~self.edge[previous])
        behind = previous == self.escape
        if self.escape >= 0 and behind.any():
            sizes[literals(behind)] = len(ESC.encode())  # characters of the text that look like operators
        return sizes.astype(np.uint16)

    def total(self, tokens: np.ndarray) -> int:
        """Bytes of all tokens [N] together, in memory that does not grow with N."""
        return sum(
            int(self.sizes(tokens[at : at + CHUNK], int(tokens[at - 1]) if at else BOS).sum(dtype=np.int64))
            for at in range(0, len(tokens), CHUNK)
        )


def literals(behind: np.ndarray) -> np.ndarray:
    """[N] bool -> places behind an escape that is no literal itself: escapes in a row take turns. There are next to
    none.
    """
    literal = np.zeros(len(behind), bool)
    for i in np.flatnonzero(behind):
        literal[i] = not (i and literal[i - 1])
    return literal


# ---------------------------------------------------------------------------------------------------------------------
# Coding documents
# ---------------------------------------------------------------------------------------------------------------------
class Unstable(ValueError):
    """A word that the tokenizer's normalisation changes once more."""


class Words(dict):
    """word -> its tokens as uint16 in memory, made where they are missing; `lead`: what stands in front of the word."""

    def __init__(self, make: Callable[[str, str], bytes], lead: str):
        super().__init__()
        self.make, self.lead = make, lead

    def __missing__(self, word: str) -> bytes:
        tokens = self.make(word, self.lead)
        if len(word) <= CACHED_CHARS:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = tokens
        return tokens


class Coder:
    """Documents to tokens and back, for one tokenizer, one transform and perhaps pair aliases. ValueError if they do
    not fit.
    """

    def __init__(self, model: bytes, transform: str = "none", pairs: bool = False):
        self.sp = spm.SentencePieceProcessor(model_proto=model)
        self.transform = REGISTRY[transform]
        self.pieces = [self.sp.id_to_piece(i) for i in range(self.sp.vocab_size())]
        self.check_fit()
        self.table = ByteTable(self.sp, self.transform.operators)
        self.aliases = self.find_aliases() if pairs else Aliases({})
        self.byte_zero = self.find_bytes()
        self.by_words = self.words_are_independent(model)
        self.by_runs = not any(
            len(RUNS.findall(piece.removeprefix(SPACE))) > 1
            for i, piece in enumerate(self.pieces)
            if not (self.table.edge[i] or self.sp.is_byte(i))
        )
        self.front = self.sp.encode("a")  # some text for a word to stand behind
        self.first, self.later = Words(self.word_tokens, ""), Words(self.word_tokens, "a ")

    def check_fit(self) -> None:
        """ValueError if shards cannot hold the tokenizer's ids, or it lacks pieces for the transform."""
        if self.sp.bos_id() != BOS or len(self.pieces) > 2**16:
            raise ValueError(
                f"tokenizer: BOS must be {BOS} and at most 65,536 pieces; it has BOS {self.sp.bos_id()} and "
                f"{len(self.pieces)} pieces"
            )
        norm = self.sp.normalize("a b")
        if (
            SPACE in norm and SPACE not in self.pieces
        ):  # the byte pieces of U+2581 take its place, and the decoder writes U+2581
            raise ValueError(
                "tokenizer: it has no piece for a space by itself (U+2581), so some spaces count as three bytes and "
                "bits per byte come out too good"
            )
        if norm.endswith(SPACE):
            raise ValueError(
                "tokenizer: it writes a space behind every text (treat_whitespace_as_suffix), which would count as "
                "a byte of each document; one trained with add_dummy_prefix=False does not"
            )
        for operator in self.transform.operators:
            if operator not in self.pieces:
                raise ValueError(
                    f"tokenizer: no piece for U+{ord(operator):04X}; train one with --transform {self.transform.name}"
                )
            # else what follows an escape could not be told from an operator, nor a word from what stands before it
            wrong = [
                p
                for p in self.pieces
                if operator in p[:-1] or p.endswith(operator) and p[-2:-1].isalpha() or p != ESC and ESC in p
            ]
            if wrong:
                raise ValueError(f"tokenizer: an operator may end a piece of signs, but not stand as in {wrong[0]!r}")

    def check_front(self) -> None:
        """ValueError if the tokenizer puts a space in front of every text: reading its tokens is exact, making them is
        not.
        """
        if self.sp.normalize("a").startswith(SPACE):
            raise ValueError(
                "tokenizer: it writes a space in front of every text (add_dummy_prefix), where the contest's write "
                "none; one trained with add_dummy_prefix=False does not"
            )

    def find_aliases(self) -> Aliases:
        """[space, operator] for each operator that makes capitals, on ids of bytes that UTF-8 never holds."""
        free = [f"<0x{byte:02X}>" for byte in UNUSED_BYTES]
        if not self.transform.operators or self.transform.leads or not {SPACE, *free} <= set(self.pieces):
            raise ValueError(
                "pair aliases need a transform with operators behind spaces and a tokenizer with byte pieces"
            )
        space, *ids = map(self.pieces.index, (SPACE, TITLE, UPPER, CAP))
        return Aliases({(space, operator): self.pieces.index(alias) for operator, alias in zip(ids, free)})

    def find_bytes(self) -> int | None:
        """The id of byte 0 if the tokenizer consists of the 256 bytes in a row and control pieces."""
        zero = self.pieces.index("<0x00>") if "<0x00>" in self.pieces else len(self.pieces)
        text = [i for i in range(len(self.pieces)) if not self.table.edge[i]]
        return (
            zero
            if self.pieces[zero : zero + 256] == [f"<0x{i:02X}>" for i in range(256)] and len(text) == 256
            else None
        )

    def words_are_independent(self, model: bytes) -> bool:
        """True if a text's tokens are those of its words side by side: BPE, folded spaces, no piece across a space."""
        folds = self.sp.normalize(f" a  b{SPACE}{SPACE}c ") == f"a{SPACE}b{SPACE}c"
        return folds and is_bpe(model) and not any(SPACE in piece[1:] for piece in self.pieces)

    def word_tokens(self, word: str, lead: str) -> bytes:
        """Tokens of a word (with the space in front of it, behind a lead) as uint16 in memory. Unstable: no spelling
        survives.
        """
        parts = RUNS.findall(word) if self.by_runs else ()
        if len(parts) > 1:  # "word," is a new word, but "word" is not
            head = self.later if lead else self.first
            return b"".join([head[parts[0]], *map(self.first.__getitem__, parts[1:])])
        leads = self.transform.leads  # then the word is spelled already, and cannot be spelled otherwise by itself
        for spell in (str,) if leads else (self.transform.encode, self.transform.keep):
            text = lead + spell(word)
            ids = self.sp.encode(text) if len(text) < WORD_CHARS else array("H")
            for at in range(0, len(text), WORD_CHARS) if not ids else ():
                ids.extend(self.sp.encode(text[at : at + WORD_CHARS]))
            back = self.spelled if leads else self.decode
            if self.transform.lossy or word.isascii() or back(ids) == lead + word:  # ASCII has one normal form
                ids = ids[len(self.front) :] if lead else ids
                return array("H", self.aliases.encode(ids) if self.aliases.pairs else ids).tobytes()
        raise Unstable(f"{word[:60]!r}")

    def agrees(self, text: str, tokens: np.ndarray) -> bool:
        """True if SentencePiece makes the same tokens [n] of the text as a whole; of long and transformed ones it is
        not asked.
        """
        return (
            self.transform.name != "none" or len(text) > WORD_CHARS or [BOS, *self.sp.encode(text)] == tokens.tolist()
        )

    def spelled(self, ids: list[int] | np.ndarray) -> str:
        """The transformed text that tokens stand for; BOS and other control pieces have none."""
        return self.sp.decode(self.aliases.decode(ids))

    @cached_property
    def spellings(self) -> list[bytes]:
        """What each token writes, in bytes; b"" for control and other pieces without text of their own."""
        raw = [
            b""
            if self.table.edge[i]
            else bytes([int(piece[3:5], 16)])
            if self.sp.is_byte(i)
            else piece.replace(SPACE, " ").encode()
            for i, piece in enumerate(self.pieces)
        ]
        return [b"".join(raw[part] for part in self.aliases.back.get(i, (i,))) for i in range(len(raw))]

    def raw(self, tokens: np.ndarray) -> bytes:
        """The bytes that tokens [n] of a document write, transform and all: those that the byte table counts.

        SentencePiece's decoder writes U+FFFD for bytes that are no UTF-8; these come as they are, so that they can be
        seen. ValueError for a token that the tokenizer lacks, or that says itself that its text is lost.
        """
        if tokens.max(initial=0) >= len(self.pieces):
            raise ValueError(f"token {tokens.max()}, but the tokenizer has {len(self.pieces)} pieces")
        if self.sp.unk_id() in tokens:
            raise ValueError(f"token {self.sp.unk_id()} stands for unknown text, which is not in the shards")
        parts = list(map(self.spellings.__getitem__, tokens.tolist()))
        for i in np.flatnonzero(self.table.space[tokens[1:]] & self.table.edge[tokens[:-1]]) + 1:
            parts[i] = parts[i][1:]  # the decoder drops a space behind a control piece, and the table does not count it
        return b"".join(parts)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """The text that tokens stand for, transform undone where it can be."""
        text = self.spelled(ids)
        return text if self.transform.lossy else self.transform.decode(text)

    def encode(self, text: str) -> np.ndarray:
        """Tokens [n] uint16 of a document, BOS first; none at all for a text of which normalisation leaves nothing.

        ValueError if the tokens stand for another number of bytes than the normalised text has.
        """
        parts, want = [np.full(1, BOS, np.uint16)], 0
        for piece, lead in slices(text):
            norm = self.sp.normalize(piece)
            if norm:
                tokens, norm = self.tokens_of(piece, norm, lead)
                parts.append(tokens)
                want += (
                    lead + len(norm.encode()) - 2 * norm.count(SPACE) * (self.byte_zero is None)
                )  # SPACE has 3 bytes, a space 1
        tokens = np.concatenate(parts)
        if not self.transform.lossy and (got := self.table.total(tokens)) != want:
            raise ValueError(
                f"{want} bytes of text, but tokens for {got}: the tokenizer cannot write all of {text[:60]!r}"
            )
        return tokens if len(tokens) > 1 else tokens[:0]

    def tokens_of(self, text: str, norm: str, lead: bool) -> tuple[np.ndarray, str]:
        """(tokens, the normalised text that they stand for) of a slice; `lead`: a space stands in front of it."""
        if self.byte_zero is not None:
            data = (" " * lead + self.transform.encode(norm)).encode()
            return np.frombuffer(data, np.uint8) + np.uint16(self.byte_zero), norm
        if not self.by_words:
            return self.whole(text, norm, lead)
        if self.transform.leads:  # operators stand before spaces, so the text is spelled before it is cut at them
            first, *later = self.transform.encode((SPACE * lead + norm).replace(SPACE, " ")).split(" ")
        else:
            first, *later = norm.split(SPACE)
        try:
            head = self.later if lead and not self.transform.leads else self.first
            return np.frombuffer(b"".join([head[first], *map(self.later.__getitem__, later)]), np.uint16), norm
        except Unstable:
            return self.whole(text, norm, lead)

    def whole(self, text: str, norm: str, lead: bool) -> tuple[np.ndarray, str]:
        """`tokens_of` without words: SentencePiece on the whole slice."""
        front, skip = ("a ", len(self.front)) if lead else ("", 0)
        if self.transform.name == "none":
            return np.array(self.sp.encode(front + text)[skip:], np.uint16), norm
        for _ in range(4):  # until normalisation changes nothing
            norm = self.sp.normalize(norm.replace(SPACE, " "))
        plain = norm.replace(SPACE, " ")
        for spell in (self.transform.encode, self.transform.keep):
            ids = self.sp.encode(spell(front + plain))
            if self.transform.lossy or self.decode(ids) == front + plain:
                return np.array(self.aliases.encode(ids[skip:]), np.uint16), norm
        raise ValueError(f"no spelling of {text[:60]!r} survives the tokenizer's normalisation")


def slices(text: str) -> Iterator[tuple[str, bool]]:
    """(part of a text, whether a space stood in front of it), of about SLICE_CHARS characters where it can be cut."""
    at, size, lead = 0, SLICE_CHARS, False
    while len(text) - at > size:
        middle, end = at + size // 2, at + size
        cut = CUT.search(text, middle, end) or TIGHT_CUT.search(text, middle, end)
        if cut is None:
            size *= 2
            continue
        yield text[at : cut.start()], lead
        at, size, lead = cut.end(), SLICE_CHARS, cut.end() > cut.start()
    yield text[at:], lead


def operators_of(model: bytes) -> list[int]:
    """Ids of pieces that stand for no text of their own: case operators (PR #1729) and private-use symbols that a user
    defined.

    The numbers are those of sentencepiece_model.proto: pieces are field 1, of {text 1, score 2, type 3}, and type 4 is
    user-defined.
    """
    spm.SentencePieceProcessor(model_proto=model)  # RuntimeError for a file that is no model
    pieces = [dict(fields(value)) for number, value in fields(model) if number == 1]
    texts = [piece.get(1, b"").decode() for piece in pieces]
    return [
        i
        for i, (piece, text) in enumerate(zip(pieces, texts))
        if set(text) & set(OPERATORS.values()) or piece.get(3) == 4 and any("\ue000" <= c <= "\uf8ff" for c in text)
    ]


def check_operators(folder: Path, model: bytes) -> None:
    """ShardError if validation tokens hold case operators, but no sidecar counts the bytes of the original text: a
    table of pieces counts an operator as text, and bits per byte come out 3 to 12 % too good. For shards without a
    manifest that explains them.
    """
    operators = operators_of(model)
    if not operators or split_paths(folder, "val_bytes"):
        return
    count = sum(int(np.isin(part, operators).sum()) for path in split_paths(folder, "val") for part in chunks(path))
    if count:
        raise ShardError(
            f"{folder}: {count:,} validation tokens are case operators, which stand for no text, but there are no byte "
            "sidecars (fineweb_val_bytes_*.bin): fetch them with their shards, or make the shards again"
        )


def sized(folder: Path, split: str, coder: Coder) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens, bytes) of each document of a split, by its sidecars if there are any. ShardError if they do not fit."""
    sidecars = split_paths(folder, f"{split}_bytes")
    entries = np.concatenate([read_shard(path) for path in sidecars]) if sidecars else None
    at = 0
    for tokens in documents(split_paths(folder, split)):
        if int(tokens.max()) >= len(coder.pieces):
            raise ShardError(f"{folder}: token {int(tokens.max())}, but the tokenizer has {len(coder.pieces)} pieces")
        sizes = coder.table.sizes(tokens) if entries is None else entries[at : at + len(tokens)]
        at += len(tokens)
        yield tokens, int(sizes.sum(dtype=np.int64))
    if entries is not None and at != len(entries):
        raise ShardError(f"{folder}: {at} {split} tokens, but sidecars for {len(entries)}")
