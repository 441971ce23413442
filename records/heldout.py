"""Score a shipped artifact on text that nobody tuned on, and say how new that text is.

    python records/heldout.py logs/RUN_ID.artifact --data data/datasets/SECOND --against data/datasets/fineweb10B_sp8192
    python records/heldout.py --data data/datasets/SECOND --against data/datasets/fineweb10B_sp8192
    python records/heldout.py --run out/RUN_ID.heldout.jsonl --data data/datasets/SECOND --against ...

The second gives no score; the third takes that of a finished evaluation, which --out keeps (of another machine, say).
The score is that of MODE=eval with the artifact's own program (train_gpt.py or RUN_ID.packed.py beside it, else the
checkout's) on the validation shards of --data, which the artifact's tokenizer must have made (data/prepare.py
--tokenizer MODEL).

How new the text is: a window is 13 tokens in a row within one document, as in the usual checks for contamination. A
held-out document's overlap is the share of its windows that occur, token for token, anywhere in the other text: the
validation set that the artifact was chosen by, and the training shards that are at hand (--against, one folder of
shards or several). Hashes only find candidates; every one is compared exactly. The other text streams through, 100M
tokens in 11 seconds on one core; the held-out set needs about 90 bytes of memory a token while it is indexed.

What the numbers mean. Documents with an overlap of 50 % and more are near-duplicates: reprints, mirrored pages, forms
with other names in them. A model that has seen the original can score well on them by memory alone, so the score is
also given without them; where the two differ, the table says by how much memory helped. Training text and validation
text of one crawl overlap too, so the original validation set is measured against the same training text: overlap of
that size is normal, and only more than that is news.

What they do not mean. No overlap is not new content: a translation or a paraphrase shares no window. Overlap is not
copying either: licences, navigation and scores of matches repeat everywhere. Training shards that are not at hand are
not searched. Windows of a byte or character tokenizer are a word or two (--window takes more). The interval is over
documents of this slice, for one artifact; it knows nothing of other seeds, and two slices of different text differ for
reasons that have nothing to do with memory.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))
import runs
from shards import BOS, ShardError, read_manifest, read_shard, split_paths

WINDOW = 13  # tokens
BLOCK = 1 << 20  # tokens of the other text that are looked at together
THRESHOLDS = (0.1, 0.3, 0.5, 0.8, 1.0)  # overlaps that documents are counted from
NEAR = 0.5  # from here on a document is a near-duplicate
WORST = 10


class HeldoutError(RuntimeError):
    """The data cannot be compared or scored; the message says why and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Windows
# ----------------------------------------------------------------------------------------------------------------------
class Hasher:
    """Hashes of all windows of a block of tokens: sum over j of MIX[token j] * A^j, modulo 2^64, by differences of one
    running sum.
    """

    def __init__(self, window: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.window = window
        self.mix = rng.integers(0, 2**64, 2**16, np.uint64)
        base = int(rng.integers(0, 2**63)) * 2 + 1  # odd, so that it has an inverse
        length = BLOCK + 2 * window
        self.powers, self.inverses = (
            np.multiply.accumulate(np.full(length, x, np.uint64)) for x in (base, pow(base, -1, 2**64))
        )

    def __call__(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n] of a block -> (places [m] where windows without BOS begin, their hashes [m])."""
        n = len(tokens) - self.window + 1
        if n < 1:
            return np.empty(0, np.int64), np.empty(0, np.uint64)
        sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(self.mix[tokens] * self.powers[: len(tokens)], out=sums[1:])
        hashes = (sums[self.window :] - sums[: -self.window]) * self.inverses[:n]
        borders = np.zeros(len(tokens) + 1, np.int32)
        np.cumsum(tokens == BOS, out=borders[1:])
        places = np.flatnonzero(borders[self.window :] == borders[: -self.window])
        return places, hashes[places]


def blocks(paths: list[Path], window: int) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens of a block, documents that began before it) of shards read as one stream; neighbours share window - 1
    tokens.
    """
    carry, begun = np.empty(0, np.uint16), 0
    for path in paths:
        shard = read_shard(path)
        for at in range(0, len(shard), BLOCK):
            block = np.concatenate([carry, shard[at : at + BLOCK]])
            yield block, begun
            carry = block[max(0, len(block) - window + 1) :]
            begun += int((block[: len(block) - len(carry)] == BOS).sum())


def equal_windows(a: np.ndarray, at_a: np.ndarray, b: np.ndarray, at_b: np.ndarray, window: int) -> np.ndarray:
    """Whether the windows of a at places [m] and of b at places [m] hold the same tokens: [m] bool."""
    same = np.ones(len(at_a), bool)
    for j in range(window):
        same &= a[at_a + j] == b[at_b + j]
    return same


@dataclass
class Documents:
    """The documents of one set of validation shards, and an index of their windows. Equal windows share one number."""

    name: str
    tokens: np.ndarray  # [N] uint16, documents one behind the other
    starts: np.ndarray  # [D] where they begin
    window: int = WINDOW
    hashes: np.ndarray = field(init=False)  # [U] of different windows, sorted
    first: np.ndarray = field(init=False)  # [U] place of one window with that hash
    numbers: np.ndarray = field(init=False)  # [W] number of each window
    document: np.ndarray = field(init=False)  # [W] document of each window

    def __post_init__(self):
        if not len(self.starts) or self.starts[0]:
            raise HeldoutError(f"{self.name}: validation shards do not begin with a document (BOS {BOS})")
        for seed in range(8):
            self.hasher = Hasher(self.window, seed)
            if self.index():
                break
        else:
            raise AssertionError("eight hash functions in a row gave two windows one hash")
        self.counts = np.bincount(self.document, minlength=len(self.starts))
        bits = min(31, max(16, math.ceil(math.log2(64 * max(len(self.hashes), 1)))))
        self.shift = np.uint64(64 - bits)
        self.filter = np.zeros(
            1 << bits - 3, np.uint8
        )  # one bit by a hash's first bits: most windows of other text end here
        top = self.hashes >> self.shift
        np.bitwise_or.at(self.filter, top >> np.uint64(3), np.uint8(1) << (top & np.uint64(7)).astype(np.uint8))

    def index(self) -> bool:
        """Finds all windows and numbers them; False if two different ones have the same hash."""
        parts = [[np.empty(0, np.int64)], [np.empty(0, np.uint64)]]
        for at in range(0, len(self.tokens), BLOCK):
            places, hashes = self.hasher(self.tokens[at : at + BLOCK + self.window - 1])
            parts[0].append(places + at), parts[1].append(hashes)
        places, hashes = map(np.concatenate, parts)
        order = np.argsort(hashes, kind="stable")
        hashes, places = hashes[order], places[order]
        new = np.ones(len(hashes), bool)
        new[1:] = hashes[1:] != hashes[:-1]
        ids = np.cumsum(new, dtype=np.int32) - 1
        self.hashes, self.first = hashes[new], places[new]
        again = np.flatnonzero(~new)
        if not equal_windows(self.tokens, places[again], self.tokens, self.first[ids[again]], self.window).all():
            return False
        self.numbers = np.empty(len(ids), np.int32)
        self.numbers[order] = ids
        self.document = np.empty(len(ids), np.int32)
        self.document[order] = np.searchsorted(self.starts, places, side="right") - 1
        return True

    def candidates(self, places: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places, window numbers) of those hashes [m] that windows of this set have, too."""
        top = hashes >> self.shift
        maybe = np.flatnonzero(self.filter[top >> np.uint64(3)] >> (top & np.uint64(7)).astype(np.uint8) & 1)
        at = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), max(len(self.hashes) - 1, 0))
        hit = self.hashes[at] == hashes[maybe] if len(self.hashes) else np.zeros(0, bool)
        return places[maybe[hit]], at[hit]

    def lengths(self) -> np.ndarray:
        """Tokens of each document [D], BOS included."""
        return np.diff(np.append(self.starts, len(self.tokens)))

    def search(self, name: str, paths: list[Path]) -> "Overlap":
        """Looks for every window of this set in the shards of another text, in memory that does not grow with them."""
        where = np.full(len(self.hashes), -1, np.int64)  # number of the document that holds it
        total = {"documents": 0, "tokens": 0}
        for tokens, begun in blocks(paths, self.window):
            places, numbers = self.candidates(*self.hasher(tokens))
            unknown = where[numbers] < 0
            places, numbers = places[unknown], numbers[unknown]
            same = equal_windows(tokens, places, self.tokens, self.first[numbers], self.window)
            borders = np.flatnonzero(tokens == BOS)
            # written from behind, so that a window found twice keeps the earlier document
            found = np.maximum(begun + np.searchsorted(borders, places[same], side="right") - 1, 0)
            where[numbers[same][::-1]] = found[::-1]
            total["documents"] = begun + len(borders)
        total["tokens"] = sum(len(read_shard(path)) for path in paths)
        return Overlap(self, name, where, **total)


@dataclass
class Overlap:
    """What documents share with one other text. `where` [U]: the document there that holds a window, -1 for none."""

    of: Documents
    name: str
    where: np.ndarray
    documents: int = 0
    tokens: int = 0

    @property
    def share(self) -> np.ndarray:
        """Of each document's windows, the share that occur in the other text: [D]; NaN for a document without one."""
        hits = np.bincount(self.of.document, self.where[self.of.numbers] >= 0, len(self.of.starts))
        return np.divide(hits, self.of.counts, out=np.full(len(hits), np.nan), where=self.of.counts > 0)

    def partner(self, number: int) -> int:
        """The document of the other text that holds most windows of document `number`, of those it was found in first;
        -1: none.
        """
        found = self.where[self.of.numbers[self.of.document == number]]
        values, counts = np.unique(found[found >= 0], return_counts=True)
        return int(values[counts.argmax()]) if len(values) else -1

    def row(self) -> dict:
        """Counts by threshold, and the overlap of all windows together."""
        share = self.share
        long = int((self.of.counts > 0).sum())
        return {
            "text": self.of.name,
            "searched in": self.name,
            "its documents": self.documents,
            "its tokens": self.tokens,
            "documents with windows": long,
            "with any": int((share > 0).sum()),
            **{f"from {t:.0%}": int((share >= t).sum()) for t in THRESHOLDS},
            "share of all windows": float((self.where[self.of.numbers] >= 0).mean()) if long else 0.0,
        }


def read_documents(folder: Path, window: int = WINDOW, most: int = 0) -> Documents:
    """The validation documents of a folder of shards, the first `most` of them (0: all). HeldoutError or ShardError."""
    paths = split_paths(folder, "val")
    if not paths:
        raise HeldoutError(
            f"{folder} holds no fineweb_val_*.bin; data/prepare.py makes some of any text (data/README.md)"
        )
    tokens = np.concatenate([read_shard(path) for path in paths])
    starts = np.flatnonzero(tokens == BOS)
    if 0 < most < len(starts):
        tokens, starts = tokens[: starts[most]], starts[:most]
    return Documents(str(folder), tokens, starts, window)


def tokenizer_of(folder: Path) -> dict:
    """What a manifest of data/prepare.py says of the tokenizer; {} where there is none, or another tool's."""
    try:
        return (read_manifest(folder) or {}).get("tokenizer", {})
    except ShardError:
        return {}


def check_tokenizers(data: Path, against: list[Path]) -> list[str]:
    """HeldoutError if two tokenizers made the sets, which then share no windows by nature; notes where nothing says
    which made them.
    """
    notes, own = [], tokenizer_of(data).get("sha256")
    for folder in against:
        other = tokenizer_of(folder).get("sha256")
        if own and other and own != other:
            raise HeldoutError(
                f"{data} and {folder} were made by different tokenizers (their manifests' sha256), so tokens cannot be "
                f"compared: python data/prepare.py ... --tokenizer MODEL makes the former with the latter's"
            )
        if not (own and other):
            notes.append(
                f"nothing says that one tokenizer made {data} and {folder}: without manifests of data/prepare.py "
                "that is taken on trust"
            )
    return notes


def overlap(
    data: Path, against: list[Path], window: int = WINDOW, most: int = 0
) -> tuple[Documents, list[Overlap], list[Overlap]]:
    """(held-out documents, their overlaps with each split of each folder in `against`, the same of the original
    validation sets).

    The last are what is usual: the validation documents of a folder, searched in that folder's own training shards.
    This is the function for other tools: `overlap(folder, folders)[1][0].share` is one number a document. HeldoutError
    or ShardError say what is wrong.
    """
    held = read_documents(data, window, most)
    found, usual = [], []
    for folder in against:
        splits = {split: split_paths(folder, split) for split in ("val", "train")}
        if not any(splits.values()):
            raise HeldoutError(f"{folder} holds no fineweb_val_*.bin or fineweb_train_*.bin to compare with")
        if folder.resolve() == data.resolve():  # its validation set is the held-out one itself
            splits["val"] = []
        found += [held.search(f"{split} of {folder}", paths) for split, paths in splits.items() if paths]
        if splits["val"] and splits["train"]:
            usual.append(read_documents(folder, window).search(f"train of {folder}", splits["train"]))
    return held, found, usual


def union(held: Documents, found: list[Overlap]) -> Overlap:
    """All other texts as one: a window counts if any of them holds it."""
    where = np.full(len(held.hashes), -1, np.int64)
    for one in found:
        where = np.where(where < 0, one.where, where)
    return Overlap(held, "all of them", where, sum(o.documents for o in found), sum(o.tokens for o in found))


def worst(found: list[Overlap], everything: Overlap, count: int = WORST) -> list[dict]:
    """The documents with the largest overlap, longer ones first among equals; each with the text and document that it
    resembles most.
    """
    share, lengths = everything.share, everything.of.lengths()
    order = np.lexsort((-lengths, -np.nan_to_num(share, nan=-1.0)))[:count]
    rows = []
    for number in order[np.nan_to_num(share[order]) > 0].tolist():
        best = max(found, key=lambda o: o.share[number])
        rows.append(
            {
                "document": number,
                "overlap": float(share[number]),
                "tokens": int(lengths[number]),
                "most like": best.name,
                "its document": best.partner(number),
                "overlap there": float(best.share[number]),
            }
        )
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class Losses:
    """One pass of a run: nats and bytes of each document [D]."""

    nats: np.ndarray
    bytes: np.ndarray

    def score(self, keep: np.ndarray | None = None) -> dict | None:
        """Bits a byte of the documents in `keep`, and half of its 95 % interval, as if documents had been drawn at
        random; None if there are none.
        """
        nats, size = (x if keep is None else x[keep] for x in (self.nats, self.bytes.astype(float)))
        if not size.sum():
            return None
        ratio, n = nats.sum() / size.sum(), len(nats)
        # of a ratio of sums, by the first terms of its series
        error = math.sqrt(((nats - ratio * size) ** 2).sum() * n / max(n - 1, 1)) / size.sum()
        return {
            "bpb": float(ratio / math.log(2)),
            "half_interval": float(1.96 * error / math.log(2)) if n > 1 else None,
            "documents": n,
        }


def read_losses(run: runs.Run) -> dict[str, Losses]:
    """pass -> losses by document, for those passes of a run that left a RUN_ID.<pass>.docs.npz (DOC_LOSSES=1)."""
    found = {}
    for name in run.scores:
        if run.beside(f".{name}.docs.npz").is_file():
            with np.load(run.beside(f".{name}.docs.npz")) as table:
                found[name] = Losses(table["nats"], table["bytes"])
    return found


def find_artifact(target: Path) -> Path:
    """The artifact that a path names: the file itself, or the only one in a folder. HeldoutError names the choice."""
    if target.is_file():
        return target
    found = sorted(target.glob("*.artifact"))
    if len(found) != 1:
        said = f"holds {', '.join(p.name for p in found)}: name one of them" if found else "holds no *.artifact"
        raise HeldoutError(f"{target} {said if target.is_dir() else 'is missing'}")
    return found[0]


def program_of(artifact: Path, folder: Path) -> Path:
    """The program that the artifact was shipped with, else the checkout's."""
    beside = [folder / "train_gpt.py", artifact.with_suffix(".packed.py"), ROOT / "train_gpt.py"]
    return next(path for path in beside if path.is_file())


def evaluate(
    target: Path, data: Path, tokenizer: Path | None, out: Path, documents: int = 0, ranks: int = 1
) -> runs.Run:
    """Runs MODE=eval of an artifact on the validation shards of `data` in a folder of its own, and returns what its log
    says.

    Knobs of evaluation come from the shell, as for every run. HeldoutError has the end of the output of a run without a
    score; a run that only broke a rule (its time, say) has a score, and its failures are in the result.
    """
    artifact = find_artifact(target).resolve()
    folder = target if target.is_dir() else artifact.parent
    code = program_of(artifact, folder).resolve()
    told = tokenizer_of(data).get("path")
    tokenizer = tokenizer or (data.resolve().parent.parent / told if told else None)
    env = {
        **os.environ,
        "MODE": "eval",
        "ARTIFACT": str(artifact),
        "ARTIFACT_DIR": str(out.resolve()),
        "RUN_ID": f"{artifact.stem}.heldout",
        "DATA_PATH": str(data.resolve()),
        "VAL_DOCS": str(documents),
        "DOC_LOSSES": "1",
        "TRACK": "",
        **({"TOKENIZER_PATH": str(tokenizer.resolve())} if tokenizer else {}),
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = subprocess.run([sys.executable, *launcher, str(code)], env=env, text=True, capture_output=True)
    log = out / f"{artifact.stem}.heldout.jsonl"
    run = runs.load(log) if log.is_file() else None
    if run is None or not run.scores:
        end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise HeldoutError(f"{code} MODE=eval gave no score (exit status {done.returncode}):\n{end}")
    return run


def scores(run: runs.Run, held: Documents, everything: Overlap | None, original: runs.Run | None) -> dict:
    """pass -> score on the held-out set, with and without near-duplicates, and on the original validation set."""
    told = run.validation.get("documents")
    if told is not None and told != len(held.starts):
        raise HeldoutError(
            f"{run.path} scored {told} documents, but {held.name} gives {len(held.starts)}: it is a run on other data"
        )
    losses, table = read_losses(run), {}
    before = read_losses(original) if original else {}
    for name, score in run.scores.items():
        row = {"bpb": score.bpb, "seconds": score.seconds}
        if name in losses:
            row |= {"all": losses[name].score(), **without_duplicates(losses[name], everything)}
        if original and name in original.scores:
            row |= {
                "original bpb": original.scores[name].bpb,
                "original": before[name].score() if name in before else None,
            }
        table[name] = row
    return table


def without_duplicates(losses: Losses, everything: Overlap | None) -> dict:
    """Scores of the documents below each threshold, and of those from it on. A document too short for a window counts
    as new.
    """
    if everything is None:
        return {}
    share = np.nan_to_num(everything.share)[: len(losses.nats)]  # a last document of BOS alone has no target
    return {
        "without": {f"{t:.0%}": losses.score(share < t) for t in THRESHOLDS},
        "only": {f"{t:.0%}": losses.score(share >= t) for t in THRESHOLDS},
    }


def original_of(target: Path) -> runs.Run | None:
    """The run that made an artifact, where its log lies beside it."""
    log = find_artifact(target).with_suffix(".jsonl")
    return runs.load(log) if log.is_file() else None


# ----------------------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------------------
def report(
    data: Path,
    against: list[Path],
    run: runs.Run | None = None,
    original: runs.Run | None = None,
    window: int = WINDOW,
    most: int = 0,
) -> dict:
    """Everything as data that JSON can hold."""
    notes = check_tokenizers(data, against)
    held, found, usual = overlap(data, against, window, most)
    everything = union(held, found) if found else None
    result = {
        "data": str(data),
        "window": window,
        "documents": len(held.starts),
        "tokens": len(held.tokens),
        "documents too short": int((held.counts == 0).sum()),
        "notes": notes,
        "overlap": [o.row() for o in [*found, *([everything] if len(found) > 1 else [])]],
        "usual": [o.row() for o in usual],
        "worst": worst(found, everything) if found else [],
    }
    if run is not None:
        result |= {
            "run": run.path.name,
            "failures": run.failures or [],
            "scores": scores(run, held, everything, original),
        }
    return result


def lines(r: dict) -> list[str]:
    """The report in words and tables."""
    out = [
        f"held-out: {r['data']}: {r['documents']:,} documents, {r['tokens']:,} tokens; "
        f"{r['documents too short']:,} are shorter than a window "
        f"of {r['window']} tokens",
        *(f"note: {note}" for note in r["notes"]),
    ]
    if r["overlap"]:
        head = ["searched in", "its tokens", "any", *(f">= {t:.0%}" for t in THRESHOLDS), "of all windows"]
        out += [
            "",
            f"held-out documents by the share of their {r['window']}-token windows that occur in other text:",
            *table(head, map(cells, r["overlap"])),
        ]
    if r["usual"]:
        out += ["", "for comparison, the original validation documents in their own training shards:"]
        out += table(["documents", *head], ([f"{u['documents with windows']:,}", *cells(u)] for u in r["usual"]))
    if r["worst"]:
        out += ["", "the largest overlaps:"]
        out += table(
            ["document", "overlap", "tokens", "most like", "its document", "overlap there"],
            (
                [
                    str(w["document"]),
                    f"{w['overlap']:.1%}",
                    f"{w['tokens']:,}",
                    w["most like"],
                    str(w["its document"]),
                    f"{w['overlap there']:.1%}",
                ]
                for w in r["worst"]
            ),
        )
    for name, s in r.get("scores", {}).items():
        out += ["", *score_lines(name, s)]
    out += [f"the evaluation broke a rule: {failure}" for failure in r.get("failures", [])]
    return out


def cells(row: dict) -> list[str]:
    """One row of the table of overlaps."""
    counts = [row["with any"], *(row[f"from {t:.0%}"] for t in THRESHOLDS)]
    return [
        row["searched in"],
        f"{row['its tokens']:,}",
        *(f"{c:,}" for c in counts),
        f"{row['share of all windows']:.3%}",
    ]


def score_lines(name: str, s: dict) -> list[str]:
    """The scores of one pass."""
    out = [
        f"pass {name}: held-out val_bpb {s['bpb']:.6f}"
        + (
            f", {words(s['all'])}"
            if "all" in s
            else "; no losses by document, so not without near-duplicates (DOC_LOSSES=1)"
        )
    ]
    if "original bpb" in s:
        more = f", {words(s['original'])}" if s["original"] else ""
        out.append(
            f"  original validation set: {s['original bpb']:.6f}{more}; "
            f"held-out less original: {s['bpb'] - s['original bpb']:+.6f}"
        )
    for t in (f"{t:.0%}" for t in THRESHOLDS if "without" in s):
        kept, gone = s["without"][t], s["only"][t]
        if gone and kept:
            out.append(
                f"  without the documents from {t} on: {kept['bpb']:.6f} ({kept['bpb'] - s['all']['bpb']:+.6f}), "
                f"{words(kept)}; "
                f"those alone: {gone['bpb']:.6f}, {words(gone)}"
            )
    if "without" in s and not s["only"][f"{THRESHOLDS[0]:.0%}"]:
        out.append(f"  no document has an overlap of {THRESHOLDS[0]:.0%} or more: there is nothing to leave out")
    return out


def words(score: dict) -> str:
    """The interval and the documents of a score."""
    interval = f"+- {score['half_interval']:.6f}, " if score["half_interval"] is not None else ""
    return f"{interval}{score['documents']:,} document{'s' * (score['documents'] != 1)}"


def table(head: list[str], rows) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "target",
        nargs="?",
        type=Path,
        help="an artifact, or a folder with one; without it only the overlap is reported",
    )
    p.add_argument("--data", type=Path, required=True, help="folder of the held-out fineweb_val_*.bin")
    p.add_argument(
        "--against",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="folders of other shards: the original validation set and training shards",
    )
    p.add_argument(
        "--tokenizer",
        type=Path,
        help="the artifact's SentencePiece model; default: the one that the manifest of --data names",
    )
    p.add_argument(
        "--run", type=Path, help="the .jsonl of a finished MODE=eval on --data with DOC_LOSSES=1, instead of a new one"
    )
    p.add_argument("--out", type=Path, help="keep log and losses of the new evaluation there")
    p.add_argument("--docs", type=int, default=0, help="only the first documents of --data; default: all")
    p.add_argument("--ranks", type=int, default=1, help="GPUs of the new evaluation")
    p.add_argument("--window", type=int, default=WINDOW, help="tokens that must be equal in a row")
    p.add_argument("--json", action="store_true", help="all figures as JSON")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 with a report, 2 where the data cannot be compared or scored."""
    args = parser().parse_args(argv)
    try:
        if args.window < 1 or args.docs < 0 or args.ranks < 1:
            raise HeldoutError("--window and --ranks must be at least 1, --docs at least 0")
        if not args.target and not args.run and not args.against:
            raise HeldoutError("name an artifact to score, or --against folders to compare with")
        check_tokenizers(args.data, args.against)  # before an evaluation of minutes
        read_documents(args.data, args.window, 1)
        run = runs.load(args.run) if args.run else None
        with tempfile.TemporaryDirectory() as scratch:
            out = args.out or Path(scratch)
            out.mkdir(parents=True, exist_ok=True)
            if run is None and args.target:
                run = evaluate(args.target, args.data, args.tokenizer, out, args.docs, args.ranks)
            original = original_of(args.target) if args.target else None
            result = report(args.data, args.against, run, original, args.window, args.docs)
    except (HeldoutError, ShardError, runs.Unreadable, OSError) as error:
        print(f"heldout: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1) if args.json else "\n".join(lines(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
