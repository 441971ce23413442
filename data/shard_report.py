"""What a tokenizer makes of a corpus, from shards and the tokenizer alone: a table, and a picture.

    python data/shard_report.py data/datasets/local_sp1024 --tokenizer data/tokenizers/local_1024_bpe.model

Works on any shards of the contest's format, downloaded ones too; where a manifest names the tokenizer, --tokenizer can
be left out. Bytes are those of the text that the tokens stand for, by the sidecar where there is one. A document with
few bytes a token is one that the vocabulary does not know: another language, a table, a list of numbers.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from shards import ShardError, read_manifest
from vocabulary import Coder, check_operators, sized

WORST = 5
LEAST_TOKENS = 32  # of a document that is called the worst: short ones are odd by chance
RARE = 100  # a piece seen less often has hardly been trained
EXCERPT = 64  # tokens


class Stats:
    """Counts over the documents of one split; memory grows by two numbers a document, no more."""

    def __init__(self, vocab_size: int):
        self.used = np.zeros(vocab_size, np.int64)
        self.tokens: list[int] = []
        self.bytes: list[int] = []
        self.worst: list[tuple[float, int, list[int]]] = []  # a heap: (-bytes a token, -number, first tokens)

    def add(self, tokens: np.ndarray, size: int) -> None:
        """One document: tokens [n] with BOS, and its bytes."""
        self.used += np.bincount(tokens, minlength=len(self.used))
        number = len(self.tokens)
        self.tokens.append(len(tokens))
        self.bytes.append(size)
        if len(tokens) >= LEAST_TOKENS:
            heapq.heappush(self.worst, (-size / len(tokens), -number, tokens[:EXCERPT].tolist()))
            if len(self.worst) > WORST:
                heapq.heappop(self.worst)

    def table(self) -> dict[str, int | float]:
        """name -> figure."""
        counts, sizes = np.array(self.tokens), np.array(self.bytes)
        share = np.sort(self.used)[::-1].cumsum() / counts.sum()
        spread = {"median": 50, "90 %": 90, "99 %": 99, "most": 100}
        return {
            "documents": len(counts),
            "tokens": int(counts.sum()),
            "bytes of text": int(sizes.sum()),
            "bytes per token": round(float(sizes.sum() / counts.sum()), 4),
            **{f"tokens per document, {name}": int(np.percentile(counts, q)) for name, q in spread.items()},
            "pieces never used": int((self.used == 0).sum()),
            f"pieces used under {RARE} times": int((self.used < RARE).sum()),
            "pieces that make half of the tokens": int(np.searchsorted(share, 0.5) + 1),
        }

    def worst_documents(self, coder: Coder) -> list[dict]:
        """The documents with the fewest bytes a token, the worst first: number, bytes a token, and how they begin."""
        return [
            {"document": -number, "bytes per token": round(-score, 3), "begins": coder.decode(tokens)[:60]}
            for score, number, tokens in sorted(self.worst, reverse=True)
        ]


def open_coder(folder: Path, given: Path | None) -> Coder:
    """The tokenizer of a data set, with its transform. ShardError if nothing names it, or nothing says what its
    operators stand for.
    """
    try:
        manifest, why = read_manifest(folder), ""
    except ShardError as error:  # the shards can be read without it
        manifest, why = None, f" ({error})"
    path = given or (folder.parent.parent / manifest["tokenizer"]["path"] if manifest else None)
    if path is None or not path.is_file():
        raise ShardError(f"{folder}: no manifest names the tokenizer; give --tokenizer{why}")
    model = path.read_bytes()
    if manifest is None:
        check_operators(folder, model)
        return Coder(model)
    return Coder(model, manifest["transform"]["name"], bool(manifest["transform"]["pairs"]))


def report(folder: Path, tokenizer: Path | None = None) -> tuple[dict[str, Stats], Coder]:
    """Counts of each split that is there. ShardError if none is, or if shards and tokenizer do not fit."""
    coder = open_coder(folder, tokenizer)
    stats = {}
    for split in ("train", "val"):
        one = Stats(len(coder.pieces))
        for tokens, size in sized(folder, split, coder):
            one.add(tokens, size)
        if one.tokens:
            stats[split] = one
    if not stats:
        raise ShardError(f"{folder}: no shards")
    return stats, coder


def show(stats: dict[str, Stats], coder: Coder) -> str:
    """The table as Markdown, and the worst documents."""
    tables = {split: one.table() for split, one in stats.items()}
    lines = ["| | " + " | ".join(tables) + " |", "|---" * (len(tables) + 1) + "|"]
    for name in next(iter(tables.values())):
        lines.append(f"| {name} | " + " | ".join(f"{table[name]:,}" for table in tables.values()) + " |")
    for split, one in stats.items():
        lines += ["", f"{split}: documents with the fewest bytes a token"]
        lines += [
            f"  {w['bytes per token']:.3f}  {w['document']:>9,}  {w['begins']!r}" for w in one.worst_documents(coder)
        ]
    return "\n".join(lines)


def draw(stats: dict[str, Stats], path: Path, title: str) -> None:
    """Lengths of documents, bytes a token of documents, and use of the vocabulary, side by side in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (lengths, ratio, use) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for split, one in stats.items():
        counts, sizes = np.array(one.tokens), np.array(one.bytes)
        share = np.full(len(counts), 1 / len(counts))
        lengths.hist(counts, np.geomspace(1, counts.max() + 1, 60), weights=share, histtype="step", label=split)
        ratio.hist(sizes / counts, 60, weights=share, histtype="step", label=split)
        use.loglog(np.arange(1, len(one.used) + 1), np.maximum(np.sort(one.used)[::-1], 0.5), label=split)
    lengths.set(xscale="log", xlabel="tokens of a document", ylabel="share of documents")
    ratio.set(xlabel="bytes a token of a document", ylabel="share of documents")
    use.axhline(RARE, color="grey", linestyle=":")
    use.set(xlabel="pieces by rank", ylabel="times used (0.5: never)")
    for axes in (lengths, ratio, use):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="folder of fineweb_{train,val}_*.bin")
    p.add_argument("--tokenizer", type=Path, help="SentencePiece model; default: the one that the manifest names")
    p.add_argument("--picture", type=Path, help="write a picture there (needs matplotlib)")
    p.add_argument("--json", type=Path, help="write the figures there")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when the report was made."""
    args = parser().parse_args(argv)
    try:
        stats, coder = report(args.folder, args.tokenizer)
    except (ShardError, ValueError) as error:
        raise SystemExit(f"report: error: {error}") from error
    print(show(stats, coder))
    if args.json:
        figures = {split: one.table() | {"worst": one.worst_documents(coder)} for split, one in stats.items()}
        args.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.picture:
        try:
            draw(stats, args.picture, f"{args.folder.name}, {len(coder.pieces):,} pieces")
        except ImportError:
            raise SystemExit("--picture needs matplotlib; pip install -r data/requirements.txt") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
