"""Is A better than B? Means, seed spread, Welch's test against the contest's margin, paired seeds, documents.

    python records/compare.py A B [--mode ttt] [--json]

A and B are each a folder of runs (a record's, or an ARTIFACT_DIR), a .jsonl or .log file, a RUN_ID's path, or a quoted
glob such as 'logs/sparse.s*'. Record folders of others are read from their logs, in sub-folders too, or from
submission.json alone, which is then said. A run's score is that of the pass that is reported (runs.result_pass); where
that does not show, all scores are listed. The margin is 0.005 nats a token, so in bits a byte it depends on the
tokenizer; both units are shown, and where the tokenizers differ only bits a byte are compared. Exit status 0 whatever
the answer, 2 if it cannot be computed.
"""
import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import runs
import stats


@dataclass
class Side:
    """One side of a comparison: seed -> score, and per-document losses where they were saved."""
    name: str
    bpb: dict
    loss: dict
    rate: float  # bits a byte for a nat a token
    documents: stats.Documents | None = None
    passes: tuple = ()  # names of those that the scores are of
    source: str = "logs"


def side(what: str, mode: str | None) -> Side:
    """Read one side; Unreadable where it holds no finished run."""
    try:
        found = [r for r in runs.find(what) if r.finished]
    except runs.Unreadable:
        if not (Path(what) / "submission.json").is_file():
            raise
        found = []
    if not found and (Path(what) / "submission.json").is_file():
        return from_submission(Path(what))
    if not found:
        raise runs.Unreadable(f"{what}: no finished run")
    scores = {}
    for i, run in enumerate(found):
        score = runs.result(run, mode)
        if not 0 < score.bpb < math.inf or not 0 < score.loss < math.inf:
            raise runs.Unreadable(f"{run.path}: {score.bpb} bpb and {score.loss} nats are no scores")
        seed = i if run.seed is None else run.seed
        if seed in scores:
            raise runs.Unreadable(f"{what}: two runs of seed {seed} ({run.path.name}); name fewer runs")
        scores[seed] = score
    return Side(what, {s: x.bpb for s, x in scores.items()}, {s: x.loss for s, x in scores.items()},
                found[0].rate, documents_of(found, mode), tuple(sorted({mode or runs.result_pass(r) for r in found})))


def documents_of(found: list, mode: str | None) -> stats.Documents | None:
    """Per-document losses of all runs of a side, or None if one of them did not save them."""
    names = [mode or runs.result_pass(r) for r in found]
    paths = [r.beside(f".{n}.docs.npz") for r, n in zip(found, names)]
    return stats.read_documents(paths) if all(p.is_file() for p in paths) else None


def from_submission(folder: Path) -> Side:
    """A record folder whose logs are missing: what its submission.json says of every seed."""
    told = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    table = told.get("seed_results") or {"0": told}
    bpb, loss = runs.seed_scores(table), runs.seed_scores(table, "val_loss")
    if not bpb or not told.get("val_loss"):
        raise runs.Unreadable(f"{folder}: no logs, and submission.json lacks seed_results or val_loss")
    return Side(str(folder), bpb, loss, float(told["val_bpb"]) / float(told["val_loss"]), source="submission.json")


def compare(a: Side, b: Side) -> dict:
    """All figures of a comparison, as data."""
    # rates of one tokenizer and text agree to the digits that a log prints
    same = abs(a.rate / b.rate - 1) < 1e-5
    # between tokenizers a nat a token is not one thing: take the side where the margin is wider
    margin = runs.NATS * max(a.rate, b.rate)
    result = {
        "a": describe(a), "b": describe(b), "same_tokenizer": same, "margin_nats": runs.NATS, "margin_bpb": margin,
        "bpb": {"zero": asdict(stats.welch(list(a.bpb.values()), list(b.bpb.values()))),
                "margin": asdict(stats.welch(list(a.bpb.values()), list(b.bpb.values()), margin))},
        "paired": as_dict(stats.paired(a.bpb, b.bpb)),
        "paired_seeds": sorted(a.bpb.keys() & b.bpb.keys())}
    if same and a.loss and b.loss:
        result["nats"] = {"zero": asdict(stats.welch(list(a.loss.values()), list(b.loss.values()))),
                          "margin": asdict(stats.welch(list(a.loss.values()), list(b.loss.values()), runs.NATS))}
    if a.documents and b.documents:
        result["documents"] = as_dict(stats.document_bootstrap(a.documents, b.documents))
    return result


def as_dict(interval: stats.Interval | None) -> dict | None:
    return asdict(interval) if interval else None


def describe(s: Side) -> dict:
    values = list(s.bpb.values())
    return {"name": s.name, "source": s.source, "passes": list(s.passes), "n": len(values),
            "mean_bpb": runs.mean(values), "sd_bpb": runs.spread(values),
            "mean_nats": runs.mean(s.loss.values()) if s.loss else None, "seeds": sorted(s.bpb)}


def lines(r: dict) -> list[str]:
    """The comparison in words."""
    out = []
    for key in ("a", "b"):
        s = r[key]
        nats = f" = {s['mean_nats']:.6f} nats a token" if s["mean_nats"] else ""
        passes = f"; pass {', '.join(s['passes'])}" if s["passes"] else ""
        out.append(f"{key.upper()}: {s['mean_bpb']:.6f} bpb{nats}, seed sd {s['sd_bpb']:.6f}, n = {s['n']} "
                   f"(seeds {', '.join(map(str, s['seeds']))}{passes})  {s['name']}")
        if s["source"] != "logs":
            out.append(f"   no log of a finished run lies in this folder: these are the word of its {s['source']}")
    if r["a"]["passes"] and r["b"]["passes"] and r["a"]["passes"] != r["b"]["passes"]:
        out.append("the two sides' results are of differently named passes")
    nats = f" = {r['nats']['zero']['difference']:+.6f} nats" if "nats" in r else ""
    out.append(f"A - B: {r['bpb']['zero']['difference']:+.6f} bpb{nats} (negative: A is better)")
    out.append(f"the contest's margin: {r['margin_nats']} nats a token = {r['margin_bpb']:.6f} bpb for this tokenizer"
               + ("" if r["same_tokenizer"] else "; the tokenizers differ, so this is the wider of two, and only bpb is compared"))
    for key, words in (("zero", "A is not better than B"), ("margin", "A is not better than B by more than the margin")):
        for unit in ("bpb", "nats"):
            if unit in r:
                out.append(f"Welch, one-sided, {unit:4}  H0 '{words}': {chance(r[unit][key])}")
    out.append("paired seeds: " + (interval_line(r["paired"], f"seeds {r['paired_seeds']}") if r["paired"] else
                                   "none in common"))
    out.append("documents: " + (interval_line(r["documents"], f"{r['documents']['n']} documents drawn anew, seeds averaged")
                                if "documents" in r else "no *.docs.npz beside the runs of both sides"))
    return out


def chance(test: dict) -> str:
    if test["p"] is None:
        return "needs two seeds a side with some spread"
    return f"t = {test['t']:.2f}, df = {test['df']:.1f}, p = {test['p']:.4g}" + (" < .01" if test["p"] < 0.01 else "")


def interval_line(i: dict, note: str) -> str:
    if i["low"] is None:
        return f"{i['mean']:+.6f} bpb, one pair, so no interval ({note})"
    return f"{i['mean']:+.6f} bpb, 95 % interval [{i['low']:+.6f}, {i['high']:+.6f}] ({note})"


def main(args: list[str] | None = None) -> int:
    """Command line; exit status 2 if a side cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a"), parser.add_argument("b")
    parser.add_argument("--mode", help="compare this pass (full, sliding, ttt) instead of each run's result")
    parser.add_argument("--json", action="store_true", help="all figures as JSON")
    given = parser.parse_args(args)
    try:
        result = compare(side(given.a, given.mode), side(given.b, given.mode))
    except (runs.Unreadable, ValueError) as e:
        print(f"compare: {e}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1) if given.json else "\n".join(lines(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
