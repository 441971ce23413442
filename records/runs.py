"""What the files of a run say, read in one place for all the tools here.

A run of train_gpt.py leaves RUN_ID.jsonl (events, the truth) and RUN_ID.txt (source, a ruler, then lines). Scripts of
the contest leave only a text log, in one of two dialects; both begin with source code, whose f-strings look like
results, so a line counts only where digits stand in the places of the numbers. Whatever a file does not say is None.
"""
import argparse
import ast
import base64
import functools
import hashlib
import importlib.util
import io
import json
import lzma
import math
import re
import statistics
import struct
import sys
import tokenize
import zlib
from dataclasses import dataclass, field
from pathlib import Path

RULER = "=" * 100
TRAIN_SPANS = ("train", "hessians")  # all that reads training data
EVAL_SPANS = ("eval_load", "eval_full", "eval_sliding", "eval_ttt")
CAP = 16_000_000
BUDGET = 600.0
NATS = 0.005  # by how much a record must beat the one before it


@dataclass
class Score:
    """One pass over the validation set: nats a token, bits a byte, seconds, the ledger's line."""
    loss: float
    bpb: float
    seconds: float | None = None
    verdict: str | None = None


@dataclass
class Point:
    """A training loss: steps done, seconds on the training clock, tokens seen (None where the file does not say)."""
    step: int
    loss: float
    seconds: float
    tokens: int | None = None


@dataclass
class Run:
    """One run as its files tell it. `dialect`: 'events', 'log' (ours, from the text) or 'upstream'."""
    path: Path
    dialect: str
    seed: int | None = None
    recipe: str | None = None
    source_sha: str | None = None
    world: int | None = None
    device: str | None = None
    torch: str | None = None
    python: str | None = None
    source: str | None = None
    launches: int = 1
    config: dict = field(default_factory=dict)  # KNOB -> value as the log prints it
    changed: list = field(default_factory=list)  # knobs that are not the record's default
    train: list = field(default_factory=list)
    checks: list = field(default_factory=list)  # validations during training
    diagnostics: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)
    validation: dict = field(default_factory=dict)
    size: dict = field(default_factory=dict)  # code, model, total, then bytes by part
    parts: dict = field(default_factory=dict)
    spans: dict = field(default_factory=dict)
    phases: list = field(default_factory=list)
    schedules: dict = field(default_factory=dict)
    steps: int | None = None
    params: int | None = None
    best: float | None = None  # the val_bpb that the run itself calls its result
    headline: str | None = None  # the pass that is the result, where the run or its submission says so
    packed_sha: str | None = None  # of the packed code that the run counted
    failures: list | None = None  # None: the run did not reach its end
    caveats: list = field(default_factory=list)  # what a legal verdict adds behind "but"
    warnings: list = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the run reached its last line; a foreign log has none, so there a final score must do."""
        return bool(self.scores) if self.dialect == "upstream" else self.failures is not None

    @property
    def final(self) -> Score | None:
        """The score that counts, by the label of its pass; None if there is none or it cannot be told which it is."""
        return self.scores.get(result_pass(self))

    @property
    def total(self) -> int | None:
        return self.size.get("total")

    @property
    def train_seconds(self) -> float | None:
        """All seconds that read training data; None where the log does not say."""
        return spent(self.spans, TRAIN_SPANS) if "train" in self.spans else None

    @property
    def eval_seconds(self) -> float | None:
        """The evaluation budget's seconds; None where the log does not say."""
        return spent(self.spans, EVAL_SPANS) if any(n in self.spans for n in EVAL_SPANS) else None

    @property
    def step_ms(self) -> float | None:
        return 1000 * self.spans["train"] / self.steps if self.steps and "train" in self.spans else None

    @property
    def batch(self) -> int:
        """Tokens a step; 0 where the log does not say."""
        return int(self.config.get("TRAIN_BATCH_TOKENS", 0))

    @property
    def rate(self) -> float | None:
        """Bits a byte for one nat a token, which is a property of the tokenizer and the validation text."""
        if self.validation.get("bytes"):
            return self.validation["tokens"] / self.validation["bytes"] / math.log(2)
        return self.final.bpb / self.final.loss if self.final and self.final.loss else None

    def beside(self, suffix: str) -> Path:
        """A file of this run that lies beside its log: RUN_ID + suffix."""
        return self.path.with_name(self.path.stem + suffix)


def last_step_seconds(run: Run) -> float:
    """Seconds of a step at the end of training: between the last two losses; the mean if these are rounded or missing."""
    mean = (run.step_ms or 0.0) / 1000
    if len(run.train) < 2 or run.train[-1].step <= run.train[-2].step:
        return mean
    before, after = run.train[-2:]
    return max(mean, (after.seconds - before.seconds) / (after.step - before.step))


def spent(spans: dict, names: tuple) -> float:
    """Seconds of these spans; any later evaluation span counts too."""
    return sum(v for k, v in spans.items() if k in names or names is EVAL_SPANS and k.startswith("eval_") and "warm" not in k)


class Unreadable(Exception):
    """A file that is not what it should be; its text is for the user."""


# ----------------------------------------------------------------------------------------------------------------------
# Events
# ----------------------------------------------------------------------------------------------------------------------
def read_events(path: Path) -> list[dict]:
    """All whole lines of a JSONL file, from its last launch on. A last line without its end is left out."""
    text = path.read_text(encoding="utf-8")
    lines = text[:text.rfind("\n") + 1].splitlines()
    try:
        events = [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as e:
        raise Unreadable(f"{path}: a line is no JSON ({e})") from None
    starts = [i for i, e in enumerate(events) if e.get("event") == "config"]
    return events[starts[-1]:] if starts else events


def from_events(path: Path) -> Run:
    """A run from its JSONL file; what has not happened yet is missing."""
    run = Run(path, "events")
    for event in read_events(path):
        book(run, dict(event))
    if run.train and run.steps is None:
        run.steps = run.train[-1].step
    return run


def book(run: Run, event: dict) -> None:
    """Enter one event into the run."""
    kind, _ = event.pop("event"), event.pop("t", None)
    if kind == "config":
        run.recipe, run.source_sha, run.world = (event.pop(k) for k in ("recipe", "source", "world"))
        run.seed, run.config = event["seed"], {k.upper(): v for k, v in event.items()}
    elif kind == "train":
        run.train.append(Point(event["step"], event["loss"], event["seconds"], event.get("tokens")))
    elif kind in ("score", "diagnostic"):
        table = run.scores if kind == "score" else run.diagnostics
        table[event["name"]] = Score(event["val_loss"], event["val_bpb"], event["seconds"], event.get("verdict"))
    elif kind == "size":
        run.parts = {k: v for k, v in event.items() if k not in ("total", "model", "coarser")}
        run.size = {k: event[k] for k in ("code", "model", "total")}
    elif kind == "spans":
        run.spans = {k.replace(" ", "_"): v for k, v in event.items() if k != "wall"}
    elif kind == "phase":
        run.phases.append(event)
        run.steps = (run.steps or 0) + event["steps"]
    elif kind == "result":
        run.failures, run.headline = event["failures"], event.get("headline")
        run.caveats = event.get("caveats") or []
        run.size.setdefault("total", event.get("bytes_total"))
    elif kind == "files":
        run.packed_sha = event.get("code")
    elif kind in ("validation", "schedules"):
        setattr(run, kind, event)
    elif kind == "warning":
        run.warnings.append(event["text"])


# ----------------------------------------------------------------------------------------------------------------------
# Text logs
# ----------------------------------------------------------------------------------------------------------------------
NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
STEP = re.compile(rf"^(?:step:)?(\d+)/\d+ train_loss: ?{NUMBER} train_time: ?{NUMBER}(ms|m|s)\b", re.M)
CHECK = re.compile(rf"^(?:step:)?(\d+)/\d+ val_loss: ?{NUMBER} val_bpb: ?{NUMBER}", re.M)
# Words may stand between a label and its score, and behind it, as in `LABEL stride:64 val_loss:..`. A validation during
# training is no score.
SCORE = re.compile(rf"^(?!step\b|iter|epoch)([A-Za-z][^\n]*?) val_loss[:=] ?{NUMBER},? val_bpb[:=] ?{NUMBER}"
                   rf"(?:[^\n]*? eval_time[:=] ?{NUMBER}ms)?", re.M)
TOTAL = re.compile(r"^Total submission size\b[^:\n]*: (\d+)", re.M)
MODEL = re.compile(r"^Serialized model [^:\n]+: (\d+)", re.M)
CODE = re.compile(r"^Code size(?! \(uncompressed)[^:\n]*: (\d+)", re.M)
STOP = re.compile(rf"^stopping_early: wallclock_cap train_time: ?{NUMBER}ms step: ?(\d+)/", re.M)
HESSIANS = re.compile(rf"^(?:GPTQ:collected|gptq:calibrated) \d+ \w+ in {NUMBER}s", re.M)
KNOB = re.compile(r"^([* ]) ([A-Z][A-Z0-9_]+)=(.*)$", re.M)
FOREIGN_KNOB = re.compile(r"^  ([a-z]\w*): (\S.*)$", re.M)
LEDGER = re.compile(r"^ledger (\w+): (.*)$", re.M)
HEADER = re.compile(r"^run_id:(\S*) mode:\w+ preset:\w+ recipe:(\w+) seed:(\d+)$", re.M)
VERSIONS = re.compile(r"^python (\S+) torch (\S+) numpy \S+ \| (.*?) \| world_size:(\d+) \| source sha256:(\w+)$", re.M)
FINGERPRINT = re.compile(r"^validation: \{'documents': (\d+), 'tokens': (\d+), 'bytes': (\d+), 'sha256': '(\w+)'\}(.*)$", re.M)
PROGRAM = re.compile(r"^(?:import|from) \w.*?^(?:def|class) \w", re.M | re.S)
PASSES = {"roundtrip": "full", "sliding_window": "sliding"}  # labels in our log that the events spell otherwise
MINUTES = {"ms": 1e-3, "s": 1.0, "m": 60.0}


def from_log(path: Path) -> Run:
    """A run from its text log, ours or upstream's."""
    text = path.read_text(encoding="utf-8", errors="replace")
    source, body = split_log(text)
    ours = HEADER.search(body)
    run = Run(path, "log" if ours else "upstream", source=source, launches=len(HEADER.findall(body)) or 1)
    if ours:
        body = body[list(HEADER.finditer(body))[-1].start():]  # a second launch under one RUN_ID appends
    read_common(run, body)
    (read_ours if ours else read_foreign)(run, body)
    return run


def split_log(text: str) -> tuple[str | None, str]:
    """(source code in the log, what stands after it). Blocks lie between rulers; the source is the one that is code."""
    blocks = re.split(rf"^{RULER}\n", text, flags=re.M)
    for i, block in enumerate(blocks[:-1]):
        # a program of a later Python does not parse here, and is one all the same
        if "import" in block and (parses(block) or PROGRAM.search(block)):
            # our logs end the source with one newline more than the file has
            return block.removesuffix("\n"), "\n".join(blocks[:i] + blocks[i + 1:])
    return None, text


@functools.lru_cache(64)  # the logs of one folder hold one source, and parsing it takes half a second
def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def last(pattern: re.Pattern, body: str, kind=int):
    """The last match's only group as a number, or None."""
    found = pattern.findall(body)
    return kind(found[-1]) if found else None


def read_common(run: Run, body: str) -> None:
    """What both dialects print: steps, scores, sizes."""
    run.train = [Point(int(s), float(loss), float(t) * MINUTES[unit]) for s, loss, t, unit in STEP.findall(body)]
    run.checks = [(int(s), float(loss), float(bpb)) for s, loss, bpb in CHECK.findall(body)]
    sizes = {"code": last(CODE, body), "model": last(MODEL, body), "total": last(TOTAL, body)}
    run.size = {k: v for k, v in sizes.items() if v is not None}
    run.params = last(re.compile(r"^model_params: ?(\d+)", re.M), body)
    run.steps = run.train[-1].step if run.train else None
    stop = STOP.findall(body)
    if stop:
        run.spans["train"], run.steps = float(stop[-1][0]) / 1000, int(stop[-1][1])
    for label, loss, bpb, ms in SCORE.findall(body):
        book_score(run, label, Score(float(loss), float(bpb), float(ms) / 1000 if ms else None), exact=len(loss) > 7)


def book_score(run: Run, label: str, score: Score, exact: bool) -> None:
    """A score line. Upstream prints a final score twice, rounded with its time and exact without: they are merged."""
    plain = re.sub(r"^diagnostic |_exact\b", "", label, flags=re.I)
    table = run.scores if label.startswith(("final_", "quantized", "legal_ttt")) else run.diagnostics
    before, count = table.get(plain), 1
    while before and abs(before.loss - score.loss) > 1e-4:
        count += 1  # a second pass under one label, which does not replace the first
        before = table.get(f"{plain} ({count})")
    if before:
        score = Score(score.loss, score.bpb, score.seconds or before.seconds) if exact else before
    table[plain if count == 1 else f"{plain} ({count})"] = score


def read_ours(run: Run, body: str) -> None:
    """What only train_gpt.py of this repository prints."""
    _, run.recipe, seed = HEADER.search(body).groups()
    run.seed = int(seed)
    versions = VERSIONS.search(body)
    if versions:
        run.python, run.torch, run.device, world, run.source_sha = versions.groups()
        run.world = int(world)
    run.config = {name: value for _, name, value in KNOB.findall(body)}
    run.changed = [name for mark, name, _ in KNOB.findall(body) if mark == "*"]
    found = FINGERPRINT.search(body)
    if found:
        run.validation = dict(zip(("documents", "tokens", "bytes"), map(int, found.groups()[:3])), sha256=found[4])
    ledger = dict(LEDGER.findall(body))
    plain = {re.sub(r"^final_int\d+_", "", label): s for label, s in run.scores.items()}
    renamed = {PASSES.get(label, label): s for label, s in plain.items()}
    run.scores = {n: Score(s.loss, s.bpb, s.seconds, ledger.get(n)) for n, s in renamed.items()}
    spans = re.search(r"^spans: (.*) sum:", body, re.M)
    if spans:
        run.spans = {k: float(v) for k, v in re.findall(r"(\S+):([\d.]+)s", spans[1])}
    run.best = last(re.compile(r"^val_bpb:(\d+\.\d+)", re.M), body, float)
    verdict = re.findall(r"^verdict: (.*)$", body, re.M)
    if verdict:
        told, *run.caveats = verdict[-1].split("; but ")
        run.failures = [] if told.startswith("legal") else [told.removeprefix("FAILED: ")]


def read_foreign(run: Run, body: str) -> None:
    """What only the contest's scripts print, and what the file's name says."""
    run.config = {k.upper(): v for k, v in FOREIGN_KNOB.findall(body)}
    run.seed = last(re.compile(r"^ *seed: ?(\d+)", re.M), body)
    if run.seed is None:
        run.seed = named_seed(run.path)
    run.world = last(re.compile(r"\bworld_size: ?(\d+)"), body)
    run.python = last(re.compile(r"^Running Python (\d+\.\d+[.\d]*)", re.M), body, str)
    tokens = last(re.compile(r"^val_(?:tokens|loader:.*tokens): ?(\d+)", re.M), body)
    run.validation = {"tokens": tokens} if tokens else {}
    hessians = last(HESSIANS, body, float)
    if hessians is not None:
        run.spans["hessians"] = hessians
    total = last(re.compile(rf"^total_eval_time: ?{NUMBER}s", re.M), body, float)
    seconds = [s.seconds for s in run.scores.values() if s.seconds]
    if total or seconds:  # without a total, what the passes took one by one
        run.spans["eval_full"] = total or sum(seconds)
    device = re.search(r"NVIDIA [A-Z0-9][\w -]*?(?=  |\n|$)", body)
    run.device = device[0].strip() if device else None


def named_seed(path: Path) -> int | None:
    """The seed in a log's name, or in that of the sub-folder which a record gives each of its seeds."""
    inside = record_folder(path) not in (None, path.parent)
    for name in (path.stem, path.parent.name if inside else ""):
        named = re.search(r"(?:seed|_s)_?(\d+)", name)
        if named:
            return int(named[1])
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Which score is the result
# ----------------------------------------------------------------------------------------------------------------------
# the passes of our program, the one that adapts first, and the knobs that switch them on
ORDER = {"ttt": "TTT_ENABLED", "sliding": "SLIDING_WINDOW_ENABLED", "full": ""}
UNPACKED = re.compile(r"pre.?quant|ema\b|\braw\b|\bswa\b|average", re.I)  # labels of weights that were not packed


def result_pass(run: Run) -> str | None:
    """The pass whose score is a run's result: never the last one of a log, nor the lowest, but the one that was meant.

    That is what the run or its submission says. Where neither does, our own run's is the last one that its
    configuration asks for, and a log of others has a result only if all its scores are one number. None if it cannot
    be told.
    """
    if run.headline:
        wanted = run.headline
    elif run.dialect == "upstream":
        wanted = next(iter(run.scores), None) if len({s.bpb for s in run.scores.values()}) == 1 else None
    else:
        wanted = next((name for name, knob in ORDER.items() if asked(run, name, knob)), None)
    return wanted if wanted in run.scores else None


def asked(run: Run, name: str, knob: str) -> bool:
    """Whether the configuration asks for a pass; where it does not say, whether the pass was run."""
    return str(run.config[knob]) in ("True", "1") if knob in run.config else name in run.scores


def result(run: Run, name: str | None = None) -> Score:
    """The score of the named pass, or else the run's result; Unreadable, with all scores, where there is none."""
    score = run.scores.get(name) if name else run.final
    if score is None:
        what = "undecided which score is the result (--mode names one)"
        if name or run.headline:
            what = f"no score named {name}" if name else f"no score of {run.headline}, which is the result"
        raise Unreadable(f"{run.path}: {what}; it has {scores_text(run) or 'none'}")
    return score


def scores_text(run: Run, most: int = 6) -> str:
    """All scores with their labels."""
    told = [f"{name} {s.bpb:.8f}" for name, s in run.scores.items()]
    return ", ".join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "")


def decimals(value: float) -> int:
    """Digits behind the point of a number as it was typed."""
    text = repr(value)
    return len(text.partition(".")[2]) if "e" not in text else 12


def agrees(told, real: float, floor: float = 1.01e-8) -> bool:
    """Whether a number in a document is the logs' one, rounded or cut to its own digits (at least four)."""
    if isinstance(told, bool) or not isinstance(told, (int, float)) or not math.isfinite(told):
        return False
    return abs(told - real) <= max(10.0 ** -max(decimals(told), 4), floor)


def record_folder(path: Path) -> Path | None:
    """The record folder that a log lies in, itself or in a sub-folder of it; None if it lies in none."""
    return next((p for p in list(path.resolve().parents)[:3] if (p / "submission.json").is_file()), None)


def settle(found: list[Run], folder: Path) -> None:
    """Let each run know which pass its record folder reports, where the run itself does not say."""
    try:
        told = json.loads((folder / "submission.json").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        told = {}
    told = told if isinstance(told, dict) else {}
    for run in found:
        if run.dialect != "upstream" and run.headline is None and isinstance(told.get("headline"), str):
            run.headline = told["headline"]
    others = [r for r in found if r.dialect == "upstream"]
    if others:
        readme = folder / "README.md"
        settle_others(others, told, readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else "")


def settle_others(found: list[Run], told: dict, readme: str) -> None:
    """The pass that others report: the label under which the logs have the number of submission.json.

    A seed's own number decides for its log, then the mean of all, then one log's. Without such a number it is that of
    the README's title, or the only label that the README writes out.
    """
    title = re.search(r"^# .*?(\d\.\d{4,})", readme, re.M)
    claim = told.get("val_bpb", float(title[1]) if title else None)
    entries = seed_scores(told.get("seed_results"))
    own = {id(r): agreeing(claims(r), entries.get(r.seed)) for r in found}
    kinds = [label for labels in own.values() for label in labels]
    shared = set.intersection(*(set(claims(r)) for r in found))
    if not kinds:
        kinds = agreeing({n: Score(0.0, mean(claims(r)[n].bpb for r in found)) for n in shared}, claim)
    if not kinds:
        kinds = [label for r in found for label in agreeing(claims(r), claim)]
    if not kinds:
        named = {n for r in found for n in r.scores if re.search(rf"\b{re.escape(n)}(?:_exact)?(?![\w-])", readme)}
        kinds = list(named) if len(named) == 1 else []
    for run in found:
        labels = own[id(run)] or [k for k in kinds if k in claims(run)] or kinds
        if labels:
            run.headline = labels[0]
            if labels[0] in run.diagnostics:  # the log calls it a diagnostic, and the submission its result
                run.scores.setdefault(labels[0], run.diagnostics[labels[0]])


def claims(run: Run) -> dict[str, Score]:
    """What a submission can report: all scores, and of what the log calls diagnostics those of packed weights."""
    return {**{n: s for n, s in run.diagnostics.items() if not UNPACKED.search(n)}, **run.scores}


def agreeing(scores: dict[str, Score], value) -> list[str]:
    """Labels whose score a document's number is, the nearest first."""
    labels = [n for n, s in scores.items() if agrees(value, s.bpb)]
    return sorted(labels, key=lambda n: abs(scores[n].bpb - value))


def seed_scores(table, key: str = "val_bpb") -> dict[int, float]:
    """Seed -> score of a submission's table of seeds; empty if it is none. An entry that is a number is its val_bpb."""
    found = {}
    for seed, entry in table.items() if isinstance(table, dict) else ():
        number = re.search(r"(\d+)$", str(seed))
        value = entry.get(key) if isinstance(entry, dict) else entry if key == "val_bpb" else None
        if number and isinstance(value, (int, float)) and not isinstance(value, bool):
            found[int(number[1])] = value
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Finding runs
# ----------------------------------------------------------------------------------------------------------------------
def load(path: Path) -> Run:
    """A run from its JSONL, completed with what only its text log holds; or from the text log alone."""
    path = Path(path)
    if path.suffix == ".jsonl":
        run, text = from_events(path), next((t for t in map(path.with_suffix, (".txt", ".log")) if t.is_file()), None)
        if text:
            told = from_log(text)
            for name in ("device", "torch", "python", "params", "source", "changed", "checks", "launches"):
                setattr(run, name, getattr(told, name))
            run.caveats = run.caveats or told.caveats
        return run
    run = from_log(path)
    if run.dialect == "log" and run.beside(".score.json").is_file():
        score = json.loads(run.beside(".score.json").read_text(encoding="utf-8"))
        # before the end it names one of the passes that are done so far
        run.headline = score.get("headline") if score.get("finished", True) else None
    return run


def log_files(folder: Path) -> list[Path]:
    """The text logs in a folder, or else in its sub-folders; in a record folder those called train* before others."""
    texts = [p for p in folder.rglob("*") if p.suffix in (".log", ".txt") and p.is_file()]
    files = sorted(p for p in texts if ".eval." not in p.name and not p.name.startswith(("requirements", "eval_")))
    own = [p for p in files if p.parent == folder]
    if not (folder / "submission.json").is_file():
        return own or files
    for place in (own, files):
        found = [p for p in place if p.name.startswith("train")] or [p for p in place if tells(p)]
        if found:
            return found
    return own


def tells(path: Path) -> bool:
    """Whether a text is the log of a run: it has steps or scores."""
    run = from_log(path)
    return bool(run.train or run.scores or run.recipe)


def find(what: str) -> list[Run]:
    """Runs named by a file, a RUN_ID path without suffix, a glob, or a folder (a record's, or ARTIFACT_DIR)."""
    path = Path(what)
    if path.is_dir():
        files = [f for f in sorted(path.glob("*.jsonl")) if ".eval." not in f.name] or log_files(path)
        files = [f.with_suffix(".jsonl") if f.with_suffix(".jsonl").is_file() else f for f in files]
    elif path.is_file():
        files = [path]
    elif path.with_name(path.name + ".jsonl").is_file():
        files = [path.with_name(path.name + ".jsonl")]
    else:
        files = sorted(f for f in Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path))
                       if f.suffix in (".jsonl", ".log", ".txt"))
        if any(f.suffix == ".jsonl" for f in files):
            files = [f for f in files if f.suffix == ".jsonl"]
    if not files:
        raise Unreadable(f"{what}: no run there (a .jsonl or .log file, a RUN_ID's path, a glob or a folder)")
    found = [load(f) for f in files]
    for folder in {f for f in map(record_folder, files) if f}:
        mine = [r for r in found if record_folder(r.path) == folder]
        paths = {r.path.resolve() for r in mine}
        beside = []
        # one log of three does not show whose mean submission.json gives
        if any(r.dialect == "upstream" for r in mine):
            beside = [from_log(p) for p in log_files(folder) if p.resolve() not in paths]
        settle(mine + beside, folder)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Code and artifact
# ----------------------------------------------------------------------------------------------------------------------
def load_program(path: Path):
    """train_gpt.py as a module; None where torch is not installed. What it knows is asked, not written a second time."""
    if importlib.util.find_spec("torch") is None:
        return None
    if "train_gpt" in sys.modules:
        return sys.modules["train_gpt"]
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module
    spec.loader.exec_module(module)
    return module


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@functools.lru_cache(64)
def unpack_code(text: str) -> str | None:
    """The source inside a self-extracting script, read without running it; None if none is recognised.

    Any string or bytes literal that base85 or base64, then LZMA, zlib or brotli turn into Python counts.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    literals = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, (str, bytes))]
    longest = max(literals, key=len, default=b"")
    if len(longest) < len(text) / 5:  # written as \\x.., a byte takes four characters
        return None
    data = longest.encode() if isinstance(longest, str) else longest
    for decode in (base64.b85decode, base64.b64decode, lambda d: d):
        for inflate in (lzma.decompress, zlib.decompress, unbrotli, unlzma):
            try:
                return inflate(decode(data)).decode()
            except Exception:  # a wrong coder fails in its own way; the next one is tried
                continue
    return None


def unbrotli(data: bytes) -> bytes:
    import brotli  # optional: only some scripts of others are packed with it
    return brotli.decompress(data)


def unlzma(data: bytes) -> bytes:
    """Raw LZMA2, as wrappers that count every byte use it."""
    return lzma.decompress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])


@functools.lru_cache(64)
def needed_python(source: str, named: tuple) -> tuple[int, int] | None:
    """(3, 11), or (3, 12) if a source's syntax asks for it, whichever Python runs this. None if it does not parse.

    Before 3.12 a source of that syntax does not parse, so there it takes a log that `named` such a Python.
    """
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return (3, 12) if sys.version_info < (3, 12) and any(v >= (3, 12) for v in named) else None
    return (3, 12) if sys.version_info >= (3, 12) and later_syntax(source) else (3, 11)


def later_syntax(source: str) -> bool:
    """Whether a source that parses here did not before 3.12: newer statements, or f-strings with what they now hold."""
    try:
        ast.parse(source, feature_version=(3, 11))
    except SyntaxError:
        return True
    quotes = []  # of the f-strings that are open
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        quote = quote_of(token.string)
        starts = token.type == tokenize.FSTRING_START
        if quotes and (token.type == tokenize.COMMENT or token.type == tokenize.STRING and "\\" in token.string
                       or (starts or token.type == tokenize.STRING) and any(q in quote for q in quotes)):
            return True
        if starts:
            quotes.append(quote)
        elif token.type == tokenize.FSTRING_END:
            quotes.pop()
    return False


def quote_of(token: str) -> str:
    """The quotes with which a string begins, behind its prefix."""
    text = token.lstrip("rRbBfFuU")
    return text[:3] if text[:3] in ('"""', "'''") else text[:1]


@functools.lru_cache(64)
def meaning(source: str) -> str:
    """What two sources must share to be the same program: their syntax tree without docstrings and positions."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    # written out and read again: an f-string's parts may be grouped otherwise in the tree that was never text
    return ast.dump(ast.parse(ast.unparse(tree)))


@functools.lru_cache(64)
def knobs_of(source: str) -> dict[str, str] | None:
    """KNOB -> default's text of a source built like train_gpt.py (a class per group, knob(...) a field); None if not."""
    found = {}
    for cls in (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name.endswith("Knobs")):
        for field_ in (n for n in cls.body if isinstance(n, ast.AnnAssign) and isinstance(n.value, ast.Call)):
            found[field_.target.id.upper()] = str(ast.literal_eval(field_.value.args[0]))
    return found or None


def read_manifest(path: Path) -> dict:
    """The manifest inside an artifact; Unreadable if the file is foreign, truncated or altered."""
    data = path.read_bytes()
    body = data[40:]
    if data[:5] != b"PGOLF" or hashlib.sha256(body).digest() != data[8:40]:
        raise Unreadable(f"{path.name}: truncated, altered or not an artifact")
    number, _, packed = struct.unpack_from("<BII", body, 4)
    payload = body[13:13 + packed]
    coders = {0: zlib.decompress, 1: lzma.decompress, 2: unbrotli, 3: unzstd}
    return json.loads(coders[number](payload))


def unzstd(data: bytes) -> bytes:
    import zstandard
    return zstandard.ZstdDecompressor().decompress(data)


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE on a command line as (name, value)."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


# ----------------------------------------------------------------------------------------------------------------------
# Small numbers
# ----------------------------------------------------------------------------------------------------------------------
def mean(values) -> float:
    return statistics.fmean(values)


def spread(values) -> float:
    """Sample standard deviation (n - 1); 0 for one value."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else 0.0
