"""Reversible and lossy changes of text before the tokenizer, and of token pairs behind it: a small registry.

`caseops` writes capitals as an operator in front of lower-case letters, so that a vocabulary does not hold every word
twice (idea: PR #1729). It undoes exactly, so bits per byte of the original text can be counted, with a byte sidecar.
`casefold` throws capitals away (PR #1578): what is scored then is another, easier text, so whatever is made with it is
marked lossy. `caselead` is caseops with the operator in front of the space: a word is spelled alike with and without
its capital, and a tokenizer may merge the operator with the full stop that it follows. Pair aliasing (PR #2109) gives a
frequent pair of tokens, [space, operator], one id of its own.

    python data/transforms.py caselead --decode < sampled.txt

prints what a model of such data writes as text; without --decode it goes the other way.
"""

from __future__ import annotations

import argparse
import re
import sys
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Private-use characters: no text that is meant for others holds them, and no normalisation changes them.
TITLE, UPPER, CAP, ESC = "\ue001", "\ue002", "\ue003", "\ue004"
OPERATORS = {"TITLE": TITLE, "UPPER": UPPER, "CAP": CAP, "ESC": ESC}


# ---------------------------------------------------------------------------------------------------------------------
# caseops
# ---------------------------------------------------------------------------------------------------------------------
def case_pairs() -> dict[str, str]:
    """capital -> small letter, where that is undone by one letter and changes no byte count.

    Only letters of Unicode 3.2: Python carries that version for ever, and pairs are never taken back, so every Python
    gives the same table (a newer letter would make the same text other shards after an update). Left out, and so kept
    as they stand: letters whose capital is several letters, has another UTF-8 length, or is changed by NFKC.
    """
    old, pairs = unicodedata.ucd_3_2_0, {}
    for code in range(0x10450):  # the last letters of Unicode 3.2 with case
        upper = chr(code)
        lower = upper.lower()
        if upper == lower or len(lower) != 1 or lower.upper() != upper or 0xD800 <= code < 0xE000:
            continue
        known = all(old.category(c) != "Cn" and unicodedata.normalize("NFKC", c) == c for c in (upper, lower))
        if known and len(upper.encode()) == len(lower.encode()):
            pairs[upper] = lower
    return pairs


SMALL = case_pairs()
CAPITAL = {lower: upper for upper, lower in SMALL.items()}
TO_SMALL, TO_CAPITAL = str.maketrans(SMALL), str.maketrans(CAPITAL)
_U, _L, _OPS = "".join(SMALL), "".join(CAPITAL), "".join(OPERATORS.values())


def _patterns(before: str, behind: str) -> tuple[re.Pattern, re.Pattern]:
    """(a run from its first capital on, the same encoded); before, behind: the space that its operator changes places
    with.
    """
    return (
        re.compile(f"(?P<gap>{before})(?P<inside>(?<=[{_L}]))?(?P<word>[{_U}][{_U}{_L}]*)|[{_OPS}]"),
        re.compile(
            f"{ESC}(?P<literal>[{_OPS}])|{UPPER}(?P<gap>{behind})(?P<run>[{_L}]+)|"
            f"[{TITLE}{CAP}](?P<space>{behind})(?P<one>[{_L}])|[{_OPS}]"
        ),
    )


_ENCODE, _DECODE = _patterns("", "")
_LEAD, _UNLEAD = _patterns(r"(?:(?<!\s)\s+)?", r"\s*")  # tried once a run of white space, however long


def _encode_match(match: re.Match) -> str:
    """The small letters of a run, with what brings its capitals back."""
    word, gap = match["word"], match["gap"]
    if word is None:
        return ESC + match[0]  # a character of the text that looks like an operator
    small = word.translate(TO_SMALL)
    if match["inside"] is None and word[1:] == small[1:]:
        return TITLE + gap + small
    if match["inside"] is None and not any(c in CAPITAL for c in word):
        return UPPER + gap + small
    return CAP + gap + small[0] + "".join(CAP + s if s != c else c for c, s in zip(word[1:], small[1:]))


def _decode_match(match: re.Match) -> str:
    """The capitals of a run again, and what was escaped; nothing for an operator that operates on nothing (a model
    wrote it).
    """
    letters = (match["run"] or match["one"] or "").translate(TO_CAPITAL)
    return match["literal"] or (match["gap"] or match["space"] or "") + letters


def caseops_encode(text: str) -> str:
    """Text without the capitals of `case_pairs`: "The NATO iPhone" -> TITLE "the " UPPER "nato i" CAP "phone"."""
    return _ENCODE.sub(_encode_match, text)


def caseops_keep(text: str) -> str:
    """Capitals as they are, only characters that look like operators are marked; `caseops_decode` undoes this, too."""
    return re.sub(f"[{_OPS}]", lambda m: ESC + m[0], text)


def caseops_decode(text: str) -> str:
    """The inverse of `caseops_encode`, for any text."""
    return _DECODE.sub(_decode_match, text)


def caselead_encode(text: str) -> str:
    """`caseops_encode` with operators before white space: "in The NATO" -> "in" TITLE " the" UPPER " nato"."""
    return _LEAD.sub(_encode_match, text)


def caselead_decode(text: str) -> str:
    """The inverse of `caselead_encode`, for any text."""
    return _UNLEAD.sub(_decode_match, text)


# ---------------------------------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------------------------------
class Transform(NamedTuple):
    """encode: text -> text that the tokenizer sees; decode: back, None where nothing leads back (lossy).

    operators: characters that stand for no text; a tokenizer needs a piece for each. keep: a second spelling that
    decodes alike and changes as little as can be, for words that normalisation would spoil in the first (a capital H
    with a line below is two characters, the small one is composed to a letter without a capital). All functions work
    word by word: what they do to text between two spaces does not depend on what stands outside; but where an operator
    `leads`, it stands before the space, and then it is a character like others to the tokenizer's trainer, which may
    merge it with what it follows.
    """

    name: str
    encode: Callable[[str], str]
    decode: Callable[[str], str] | None
    operators: tuple[str, ...] = ()
    keep: Callable[[str], str] = str
    leads: bool = False

    @property
    def lossy(self) -> bool:
        return self.decode is None


REGISTRY = {
    t.name: t
    for t in (
        Transform("none", str, str),
        Transform("casefold", str.lower, None),
        Transform("caseops", caseops_encode, caseops_decode, tuple(OPERATORS.values()), caseops_keep),
        Transform("caselead", caselead_encode, caselead_decode, tuple(OPERATORS.values()), caseops_keep, leads=True),
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Pair aliasing
# ---------------------------------------------------------------------------------------------------------------------
UNUSED_BYTES = (0xC0, 0xC1, *range(0xF5, 0x100))  # never part of UTF-8, so a tokenizer's pieces for them are never used


class Aliases:
    """Pairs of token ids, each with one id that stands for both: exact, because that id never occurs by itself."""

    def __init__(self, pairs: dict[tuple[int, int], int]):
        if {t for pair in pairs for t in pair} & set(pairs.values()) or len(set(pairs.values())) < len(pairs):
            raise ValueError(f"aliases {pairs}: an alias must be a free id")
        self.pairs = pairs
        self.back = {alias: pair for pair, alias in pairs.items()}

    def encode(self, ids: list[int]) -> list[int]:
        """ids with every pair replaced, from left to right; ValueError if an alias stands there already."""
        if not self.back.keys().isdisjoint(ids):
            raise ValueError("a token that is kept free for a pair occurs by itself")
        out: list[int] = []
        for token in ids:
            alias = self.pairs.get((out[-1], token)) if out else None
            if alias is None:
                out.append(token)
            else:
                out[-1] = alias
        return out

    def decode(self, ids: list[int] | np.ndarray) -> list[int]:
        """The pairs again."""
        return [t for i in ids for t in self.back.get(int(i), (int(i),))]


def main(argv: list[str] | None = None) -> None:
    """Standard input, UTF-8, through a transform or back, to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("transform", choices=[t.name for t in REGISTRY.values() if not t.lossy])
    parser.add_argument("--decode", action="store_true", help="from what the tokenizer sees to text")
    given = parser.parse_args(argv)
    chosen, text = REGISTRY[given.transform], sys.stdin.buffer.read().decode()
    sys.stdout.buffer.write((chosen.decode if given.decode else chosen.encode)(text).encode())


if __name__ == "__main__":
    main()
