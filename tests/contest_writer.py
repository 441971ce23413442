"""Data in the contest's own format, as the contest's and its participants' scripts write it: an independent writer.

It is made from the specification alone and imports neither train_gpt.py nor data/, so that a reader and a writer with
one misunderstanding in common cannot agree here.

A shard is 256 little-endian int32 words [20240520, 1, tokens, 0...] and then uint16 tokens, BOS (1) in front of each
document. CaseOps (PR #1729) writes words of ASCII letters in lower case behind private-use operators, which are pieces
of the tokenizer. Its validation shards have a byte sidecar of the same layout: for each token the bytes of ORIGINAL
text that it stands for, taken from the surface that SentencePiece reports for the piece. Three things follow that a
table of bytes by piece does not know:

* a character in byte fallback has all of its bytes on its LAST byte piece, so an emoji is 0, 0, 0, 4;
* a surface is the text before NFKC, so a piece for a no-break space and "cat" has 5 bytes, where the piece's own text
  has 4;
* operators and BOS have none.
"""

import io
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece as spm

BOS = 1
SPACE = "\u2581"  # SentencePiece's sign for a space
SENTINEL, TITLE, UPPER, NEXT, ESCAPE = "\ue000\ue001\ue002\ue003\ue004"
OPERATORS = TITLE + UPPER + NEXT + ESCAPE
TRAIN_TOKENS = 60_000  # a training shard holds so many at least: enough for some steps of a toy run

COMMON = (
    "the of and a to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then"
).split()
SYLLABLES = (
    "al an ar ca con da de en er es fi ga ha in is ka la le lo ma men mi na ne "
    "nor on or pa per po ra re ri sa se si ta te ti tor un ve"
).split()
NAMES = "Paris London NATO USA McDonald iPhone NASA Anna Berlin eBay PhD O'Neill".split()
# Each of these is changed by NFKC, needs byte fallback, or is white space that becomes a single space.
ODD = [
    "caf\u00e9\u00a0noir",
    "o\ufb03ce",
    "\ufb01nd",
    "\uff21\uff22\uff11",
    "5\u339e",
    "e\u0301t\u00e9",
    "x\u00b2",
    "\u2122",
    "two  spaces",
    "a\ttab",
    "line\nbreak",
    "zero\u200bwidth",
    "\u00a7",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u0395\u03bb\u03bb\u03ac\u03c2",
]


# ----------------------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------------------
def sample_documents(n: int, seed: int = 0) -> list[str]:
    """English-like documents with capitals, ALLCAPS, emoji, no-break spaces, ligatures, double spaces, tabs and CJK.

    No document begins or ends with white space, because a tokenizer drops that and nothing in the shards would stand
    for it.
    """
    rng = random.Random(seed)
    made = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(500)]

    def word() -> str:
        kind = rng.random()
        if kind < 0.45:
            return rng.choice(COMMON)
        if kind < 0.88:
            return rng.choice(made)
        if kind < 0.92:
            return rng.choice(made).upper()
        if kind < 0.95:
            return rng.choice(NAMES)
        if kind < 0.96:
            return chr(rng.randrange(0x1F600, 0x1F640))  # an emoji: four bytes
        if kind < 0.97:
            return "".join(
                chr(rng.randrange(0x4E00, 0x9F00)) for _ in range(rng.randint(1, 3))
            )  # CJK: three bytes each
        return rng.choice(ODD) if kind < 0.99 else str(rng.randrange(10_000))

    def sentence() -> str:
        text = " ".join(word() for _ in range(rng.randint(4, 18)))
        return text[0].upper() + text[1:] + rng.choice([".", ".", "!", "?", " \u2026", ";"])

    return [" ".join(sentence() for _ in range(rng.randint(2, 12))) for _ in range(n)]


def caseops(text: str) -> str:
    """ASCII words in lower case behind operators: "The NATO iPhone" -> TITLE "the " UPPER "nato i" NEXT "phone"."""
    out, word = [], ""

    def close() -> None:
        if len(word) > 1 and word.isupper():
            out.append(UPPER + word.lower())
        elif word and word[0].isupper():
            out.append(TITLE + word[0].lower() + marked(word[1:]))
        else:
            out.append(word[:1] + marked(word[1:]))

    for c in text:
        if c.isascii() and c.isalpha():
            word += c
            continue
        close()
        word = ""
        out.append(ESCAPE + c if c in OPERATORS else c)
    close()
    return "".join(out)


def marked(rest: str) -> str:
    """What follows a word's first letter, each capital in lower case behind NEXT."""
    return "".join(NEXT + c.lower() if c.isupper() else c for c in rest)


# ----------------------------------------------------------------------------------------------------------------------
# Pieces and the bytes that they stand for
# ----------------------------------------------------------------------------------------------------------------------
def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol buffer message that holds numbers and byte strings only."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
        else:
            size = number()
            at += size
            yield key >> 3, message[at - size : at]


def pieces(sp: spm.SentencePieceProcessor, text: str) -> tuple[list[int], list[str]]:
    """(ids, surfaces) of a text, from SentencePiece's serialised answer, because its own reader needs protobuf."""
    message = sp.encode(text, out_type="serialized_proto")
    found = [dict(fields(piece)) for number, piece in fields(message) if number == 2]  # SentencePieceText.pieces
    return [p.get(2, 0) for p in found], [p.get(3, b"").decode() for p in found]


def sidecar_entries(surfaces: list[str]) -> list[int]:
    """Bytes of original text of each surface: operators have none, unless an ESCAPE says that the text held one."""
    sizes, escaped = [], False
    for surface in surfaces:
        size = 0
        for c in surface:
            if escaped or c not in OPERATORS:
                size += len(c.encode())
                escaped = False
            else:
                escaped = c == ESCAPE
        sizes.append(size)
    return sizes


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------
def write_shard(path: Path, numbers: list[int] | np.ndarray) -> None:
    """One shard, or one part of a byte sidecar."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(numbers)
    path.write_bytes(header.tobytes() + np.asarray(numbers, "<u2").tobytes())


def write_split(folder: Path, split: str, numbers: list[int], shards: int = 1) -> None:
    """A split, cut into shards of about one length; documents may cross a border, as in the contest's."""
    assert len(numbers) >= shards
    for i in range(shards):
        part = numbers[i * len(numbers) // shards : (i + 1) * len(numbers) // shards]
        write_shard(folder / f"fineweb_{split}_{i:06d}.bin", part)


def train_tokenizer(texts: list[str], vocab_size: int, lone_space: bool = True, **options) -> bytes:
    """A SentencePiece model with the contest's settings, which `options` of the trainer override.

    CJK and emoji are kept from it: in FineWeb they are too rare to get pieces, but a small corpus cannot show that.
    lone_space=False leaves out the piece for a space by itself: the tokenizer then writes three byte pieces for such a
    space, and its decoder makes the character U+2581 of them.
    """
    model = io.BytesIO()
    usual = ("".join(c for c in text if c < "\u3000" or c in SENTINEL + OPERATORS) for text in texts)
    spm.SentencePieceTrainer.train(
        sentence_iterator=usual,
        model_writer=model,
        minloglevel=2,
        **{
            **dict(
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                character_coverage=0.999,
                split_digits=True,
                normalization_rule_name="nmt_nfkc",
                add_dummy_prefix=False,
                hard_vocab_limit=False,
                pad_id=0,
                bos_id=BOS,
                eos_id=2,
                unk_id=3,
            ),
            **options,
        },
    )
    found = model.getvalue()
    if lone_space:
        return found
    named = (
        b"\x0a\x03" + SPACE.encode()
    )  # the field that holds this piece's text; another character of three bytes takes its place
    assert found.count(named) == 1
    return found.replace(named, b"\x0a\x03" + "\u25c6".encode())


def write(
    folder: Path,
    docs: list[str],
    vocab_size: int,
    transform,
    symbols: list[str],
    sidecar: bool,
    val_docs: int | None,
    val_shards: int,
    train_shards: int,
    **options,
) -> dict:
    """Tokenizer and both splits in `folder`; what `write_plain` says of it."""
    folder.mkdir(parents=True, exist_ok=True)
    count = max(1, len(docs) // 4) if val_docs is None else val_docs
    spelled = [transform(text) for text in docs]
    more = {"user_defined_symbols": symbols} if symbols else {}
    path = folder / "tokenizer.model"
    path.write_bytes(train_tokenizer(spelled, vocab_size, **more, **options))
    sp = spm.SentencePieceProcessor(model_file=str(path))
    val, sizes, train = [], [], []
    for i, text in enumerate(spelled):
        ids, surfaces = pieces(sp, text)
        (val if i < count else train).extend([BOS, *ids])
        if i < count:
            sizes += [0, *sidecar_entries(surfaces)]
    write_split(folder, "val", val, val_shards)
    write_split(folder, "train", train * -(-TRAIN_TOKENS // max(len(train), 1)), train_shards)
    if sidecar:
        write_split(folder, "val_bytes", sizes, val_shards)
    normal = [sp.normalize(text).strip(SPACE).replace(SPACE, " ") for text in docs[:count]]
    env = {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(path), "VOCAB_SIZE": str(sp.vocab_size())}
    return {
        "tokenizer": path,
        "vocab_size": sp.vocab_size(),
        "docs": count,
        "tokens": len(val),
        "env": env,
        "bytes": sum(len(text.encode()) for text in docs[:count]),
        "normalized_bytes": sum(len(text.encode()) for text in normal),
        "sidecar_bytes": sum(sizes),
    }


def write_plain(
    folder: Path,
    docs: list[str],
    vocab_size: int = 600,
    *,
    val_docs: int | None = None,
    val_shards: int = 1,
    train_shards: int = 1,
    **options,
) -> dict:
    """Shards of documents as they stand; the first quarter (or `val_docs`) is validation, the rest is repeated for
    training.

    Returns tokenizer (a path), vocab_size, docs and tokens of validation, env (the knobs that point a run there), and
    three sums over the validation documents: bytes of the original text, normalized_bytes after the tokenizer's
    normalisation, and sidecar_bytes, which a sidecar holds or would hold. `options` are those of `train_tokenizer`:
    lone_space=False, treat_whitespace_as_suffix=True, ...
    """
    return write(folder, docs, vocab_size, str, [], False, val_docs, val_shards, train_shards, **options)


def write_caseops(
    folder: Path,
    docs: list[str],
    vocab_size: int = 600,
    sidecar: bool = True,
    *,
    val_docs: int | None = None,
    val_shards: int = 1,
    train_shards: int = 1,
    **options,
) -> dict:
    """CaseOps shards and their byte sidecar, which can be left out as careless publishers do; returns what
    `write_plain` does.
    """
    symbols = [SENTINEL, *OPERATORS]  # the published tokenizers reserve a fifth character, which nothing uses
    return write(folder, docs, vocab_size, caseops, symbols, sidecar, val_docs, val_shards, train_shards, **options)
