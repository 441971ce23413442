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
import json
import lzma
import math
import re
import statistics
import struct
import sys
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
    failures: list | None = None  # None: the run did not reach its end
    warnings: list = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the run reached its last line; a foreign log has none, so there a final score must do."""
        return bool(self.scores) if self.dialect == "upstream" else self.failures is not None

    @property
    def final(self) -> Score | None:
        """The score that counts: our runs report their best pass, others' logs end with it."""
        if not self.scores:
            return None
        return list(self.scores.values())[-1] if self.dialect == "upstream" else min(self.scores.values(), key=lambda s: s.bpb)

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
        run.failures, run.best = event["failures"], min(s["val_bpb"] for s in event["results"].values())
        run.size.setdefault("total", event.get("bytes_total"))
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
SCORE = re.compile(rf"^((?:diagnostic )?[A-Za-z][\w +-]*?) val_loss: ?{NUMBER} val_bpb: ?{NUMBER}"
                   rf"(?: eval_time: ?{NUMBER}ms)?", re.M)
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
    """(source code in the log, what stands after it). Blocks lie between rulers; the source is the one that parses."""
    blocks = re.split(rf"^{RULER}\n", text, flags=re.M)
    for i, block in enumerate(blocks[:-1]):
        if "import" in block and parses(block):
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
    plain = label.removeprefix("diagnostic ").removesuffix("_exact")
    final = label.startswith(("final_", "quantized", "legal_ttt"))
    table = run.scores if final else run.diagnostics
    before = table.get(plain)
    if before:
        score = Score(score.loss, score.bpb, score.seconds or before.seconds) if exact else before
    table[plain] = score


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
        run.failures = [] if verdict[-1].startswith("legal") else [verdict[-1].removeprefix("FAILED: ")]


def read_foreign(run: Run, body: str) -> None:
    """What only the contest's scripts print, and what the file's name says."""
    run.config = {k.upper(): v for k, v in FOREIGN_KNOB.findall(body)}
    run.seed = last(re.compile(r"^ *seed: ?(\d+)", re.M), body)
    if run.seed is None:
        named = re.search(r"(?:seed|_s)(\d+)", run.path.stem)
        run.seed = int(named[1]) if named else None
    run.world = last(re.compile(r"\bworld_size: ?(\d+)"), body)
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
        return run
    return from_log(path)


def find(what: str) -> list[Run]:
    """Runs named by a file, a RUN_ID path without suffix, a glob, or a folder (a record's, or ARTIFACT_DIR)."""
    path = Path(what)
    if path.is_dir():
        files = sorted(path.glob("*.jsonl")) or sorted([*path.glob("*.log"), *path.glob("*.txt")])
        files = [f for f in files if ".eval." not in f.name and not f.name.startswith(("eval_", "requirements"))]
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
    return [load(f) for f in files]


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
