"""Check record folders against the contest's rules: one line a rule, exit status 1 if one is broken.

    python records/check.py records/track_non_record_16mb/2026-01-01_Example ... [--json] [--strict]
    python records/check.py FOLDER --heldout SHARDS [--against SHARDS ...]

Folders made by others are read too (both log dialects). Nothing in a folder is ever run or imported, unless --heldout asks
for a second score, of text that nobody could have fitted: the folder's program evaluates its artifact on other shards, beside
a report of documents that are nearly in the sets of --against too (records/heldout.py). A rule ends as 'ok',
'FAIL', 'n/a' (not a rule of this track) or 'undecided': the folder does not hold what it would take, and the line says
what. --strict counts undecided as broken. Letters and numbers are those of the contest's rules as this repository lists
them: A artifact, B time, C prediction, E metric, F submission; a second column names the rule in a word.
"""
import argparse
import ast
import json
import math
import re
import shlex
import sys
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import runs

REQUIRED = {"author": str, "github_id": str, "name": str, "date": str, "val_bpb": (int, float), "blurb": str}
TOLERANCE = 5e-5  # bpb between two scorings of one artifact: sums are ordered otherwise on other GPU counts
FINEWEB_BYTES = (151_000_000, 151_200_000)  # 151.07 to 151.08 million whatever the tokenizer, from merged records' logs
# What a README may set though the program does not read it: variables of the shell, the launcher, Python and libraries.
# Many are their library's name with more behind it (TORCHDYNAMO_DISABLE, PYTHONPATH), others have an underscore there.
LIBRARIES = re.compile(
    r"(TORCH|PYTORCH|PYTHON|CUDA|NVIDIA|NVTE|NVSHMEM|NCCL|CUBLAS|CUDNN|TRITON|INDUCTOR|TOKENIZERS|TRANSFORMERS|"
    r"HUGGINGFACE|WANDB|OPENBLAS|NUMEXPR|CUTLASS)"
    r"|(AOT|C10D|DYNAMO|TF|TRACKIO|HF|OMP|MKL|KMP|GOMP|GLOO|LD|LC|XDG|UV|PIP|CONDA|VIRTUAL|XFORMERS|JAX|XLA|UCX|OMPI|"
    r"SLURM|MODAL|RUNPOD|MALLOC|TQDM|MASTER)_"
    r"|(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|NODE_RANK|NNODES|NPROC_PER_NODE|PATH|HOME|USER|LANG|TMPDIR|TERM|TZ|"
    r"SHELL|CC|CXX|CFLAGS|MAX_JOBS|DEBIAN_FRONTEND|NO_COLOR|FORCE_COLOR)$")
THIS_PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
QUEUED_STEPS = 2  # that end between the reading of the clock and the end of training
LOCAL = {"MODE", "RUN_ID", "SEED", "ARTIFACT_DIR", "ARTIFACT", "CHECKPOINT", "PRESET", "DATA_PATH", "TOKENIZER_PATH"}
NETWORK = {"requests", "urllib", "http", "socket", "huggingface_hub", "datasets", "ftplib", "boto3", "kernels"}


class Broken(Exception):
    """The folder breaks a rule."""


class Undecided(Exception):
    """The folder does not hold what it would take to decide."""


class NotHere(Exception):
    """Not a rule of this folder's track."""


@dataclass
class Outcome:
    """What came of one rule."""
    id: str
    name: str
    status: str
    text: str


@dataclass
class Folder:
    """A record folder, read once."""
    path: Path
    errors: dict = field(default_factory=dict)
    events: dict = field(default_factory=dict)

    def text(self, name: str) -> str:
        file = self.path / name
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

    @cached_property
    def json(self) -> dict:
        """submission.json; Broken if it is none."""
        try:
            found = json.loads(self.text("submission.json"))
        except json.JSONDecodeError as e:
            raise Broken(f"submission.json: {e}") from None
        if not isinstance(found, dict):
            raise Broken("submission.json is no object")
        return found

    @cached_property
    def logs(self) -> list[runs.Run]:
        """Text logs of training, in sub-folders too, each with the pass that is its result."""
        found = [runs.from_log(p) for p in runs.log_files(self.path)]
        for log in found:
            twin = self.twin(log)
            log.headline = twin.headline if twin else None
        runs.settle(found, self.path)
        return found

    def name(self, log: runs.Run) -> str:
        """A log's path as seen from the folder."""
        return str(log.path.relative_to(self.path))

    def twin(self, log: runs.Run) -> runs.Run | None:
        """A log's JSONL, None if it has none or it cannot be read; why it cannot is kept in `errors`."""
        if log.path not in self.events:
            self.events[log.path] = None
            try:
                if log.beside(".jsonl").is_file():
                    self.events[log.path] = runs.from_events(log.beside(".jsonl"))
            except (runs.Unreadable, KeyError, TypeError, AttributeError) as e:
                self.errors[log.path] = e
        return self.events[log.path]

    @property
    def ours(self) -> bool:
        return bool(self.logs) and all(r.dialect == "log" for r in self.logs)

    @cached_property
    def record(self) -> bool:
        """Whether it claims the timed track, by its own word or else by where it lies."""
        try:
            track = str(self.json.get("track") or self.path.resolve().parent.name)
        except Broken:
            track = self.path.resolve().parent.name
        return "non" not in track

    @cached_property
    def source(self) -> str | None:
        """The readable program: from a log, else unpacked from train_gpt.py."""
        held = next((r.source for r in self.logs if r.source), None) or self.text("train_gpt.py")
        return (runs.unpack_code(held) or held) if held else None

    def need_logs(self) -> list[runs.Run]:
        if not self.logs:
            raise Undecided("no training log in the folder")
        return self.logs


RULES: list[tuple] = []


def rule(id: str, name: str):
    """Register a function: it returns why the rule holds, or raises Broken, Undecided or NotHere."""
    def register(function):
        RULES.append((id, name, function))
        return function
    return register


def broken_if(faults: list[str], fine: str) -> str:
    """`fine`, or Broken with all faults."""
    if faults:
        raise Broken("; ".join(faults))
    return fine


def scored(f: Folder) -> list[runs.Run]:
    """Logs that hold a final score; Undecided if there is none."""
    found = [r for r in f.need_logs() if r.scores]
    if not found:
        raise Undecided("no log holds a final score")
    return found


def finals(f: Folder) -> list[runs.Run]:
    """Logs with a final score; Undecided if it does not show which of a log's scores is its result."""
    found = scored(f)
    for run in found:
        if run.final is None:
            raise Undecided(f"which score of {f.name(run)} is the result does not show; it has {runs.scores_text(run)}")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# F: what a submission is made of
# ----------------------------------------------------------------------------------------------------------------------
@rule("F1", "files")
def files(f: Folder) -> str:
    missing = [n for n in ("README.md", "submission.json", "train_gpt.py") if not f.text(n)]
    missing += [] if f.logs else ["a training log"]
    return broken_if([f"{n} is missing or empty" for n in missing], f"README.md, submission.json, train_gpt.py, {len(f.logs)} logs")


@rule("F1", "keys")
def keys(f: Folder) -> str:
    faults = [f"{k} is missing" if k not in f.json else f"{k} is {f.json[k]!r}" for k, kind in REQUIRED.items()
              if not isinstance(f.json.get(k), kind) or f.json[k] == ""]
    return broken_if(faults, f"{len(f.json)} keys, the usual ones among them")


@rule("F1", "date")
def date(f: Folder) -> str:
    named = re.match(r"\d{4}-\d\d-\d\d", f.path.resolve().name)
    if not named:
        raise Broken("the folder's name does not begin with a date")
    told = str(f.json.get("date", ""))[:10]
    return broken_if([f"the folder says {named[0]}, submission.json {told}"] if told != named[0] else [], told)


@rule("F1", "finished")
def finished(f: Folder) -> str:
    faults = [f"{f.name(r)} has no final score: truncated?" for r in f.need_logs() if not r.scores]
    faults += [f"{f.name(r)} ends before its verdict: truncated" for r in f.logs if r.scores and not r.finished]
    faults += [f"{f.name(r)} holds {r.launches} launches" for r in f.logs if r.launches > 1]
    return broken_if(faults, f"{len(f.logs)} logs reach their end")


@rule("F1", "twins")
def twins(f: Folder) -> str:
    """A log and its JSONL are two records of one run: an edit in one shows in the other."""
    if not f.ours:
        raise Undecided("no JSONL beside the logs")
    faults = [f"{path.stem}.jsonl: {e}" for path, e in f.errors.items()]
    for log in f.logs:
        other = f.twin(log)
        if other is None:
            faults += [] if log.path in f.errors else [f"{log.path.stem}.jsonl is missing"]
            continue
        faults += [f"{log.path.stem}: {what} is {a} in the log and {b} in the JSONL"
                   for what, a, b in twin_facts(log, other) if a != b]
    return broken_if(faults, "every log says what its JSONL says")


def twin_facts(log: runs.Run, other: runs.Run) -> list[tuple]:
    """(what, as the log has it, as the JSONL has it), at the log's precision."""
    def told(run):
        scores = {n: (f"{s.loss:.8f}", f"{s.bpb:.8f}", s.verdict) for n, s in run.scores.items()}
        return scores, {n: (f"{s.loss:.8f}", f"{s.bpb:.8f}") for n, s in run.diagnostics.items()}

    knobs = {(k, str(v)) for k, v in other.config.items()}
    apart = sorted(k for k, v in log.spans.items() if abs(v - other.spans.get(k, -1)) > 0.006)  # the log has two digits
    losses = [[(p.step, f"{p.loss:.4f}") for p in run.train] for run in (log, other)]
    return [("the scores", told(log), told(other)), ("the seed", log.seed, other.seed), ("the recipe", log.recipe, other.recipe),
            ("the source's sha256", log.source_sha, other.source_sha), ("the end", log.finished, other.finished),
            ("the size", log.size, other.size), ("the knobs apart", sorted(set(log.config.items()) ^ knobs), []),
            ("the spans apart", apart, []), ("the train losses", *losses)]


@rule("F1", "headline")
def headline(f: Folder) -> str:
    """submission.json's numbers are the logs', of the pass that is reported."""
    told = f.json.get("val_bpb")
    lost = [f"{f.name(r)} has {runs.scores_text(r)}" for r in scored(f) if r.final is None]
    if lost and isinstance(told, (int, float)):  # had one of them been it, that would be the pass that is reported
        raise Broken(f"val_bpb is {told}, which is no pass of all logs; " + "; ".join(lost))
    found, faults = finals(f), []
    for key, of in (("val_bpb", lambda r: r.final.bpb), ("val_loss", lambda r: r.final.loss)):
        real = runs.mean(map(of, found))
        # early folders give one run's score and other runs' logs beside it, and name no seeds
        right = [real] if f.json.get("seeds") else [real, *map(of, found)]
        if key in f.json and not any(runs.agrees(f.json[key], x) for x in right):
            faults.append(f"{key} is {f.json[key]}, the logs' mean is {real:.8f}")
    faults += own_result_faults(f, found)
    passes = sorted({runs.result_pass(r) for r in found})
    others = "; others there: " + ", ".join(sorted({n for r in found for n in r.scores} - set(passes)))
    return broken_if(faults, f"val_bpb {told} is the mean of {len(found)} logs, pass {', '.join(passes)}"
                     + (others if any(len(r.scores) > 1 for r in found) else ""))


def own_result_faults(f: Folder, found: list[runs.Run]) -> list[str]:
    """Logs whose last line gives another number than their result's. Older programs gave the lowest of their passes."""
    faults = []
    for run in found:
        twin = f.twin(run)
        right = [run.final.bpb] + ([] if twin and twin.headline else [min(s.bpb for s in run.scores.values())])
        if run.best is not None and not any(runs.agrees(run.best, x) for x in right):
            faults.append(f"{f.name(run)} calls {run.best:.8f} its result, but pass {runs.result_pass(run)} has "
                          f"{run.final.bpb:.8f}")
    return faults


@rule("F1", "results")
def results(f: Folder) -> str:
    """seed_results against the logs, key by key."""
    table, found, faults = f.json.get("seed_results"), finals(f), []
    if not isinstance(table, dict):
        raise Undecided("submission.json has no seed_results")
    by_seed = {str(r.seed): r for r in found}
    faults += [f"seed {s} has no log" for s in table if s not in by_seed]
    faults += [f"seed {s} has a log and no entry" for s in by_seed if s not in table]
    for seed in table.keys() & by_seed.keys():
        run, told = by_seed[seed], table[seed] if isinstance(table[seed], dict) else {"val_bpb": table[seed]}
        real = {"val_bpb": run.final.bpb, "val_loss": run.final.loss, "artifact_bytes": run.total, "steps": run.steps}
        faults += [f"seed {seed}: {k} is {told[k]}, the log says {v}" for k, v in real.items()
                   if k in told and v is not None and not runs.agrees(told[k], v)]
    return broken_if(faults, f"{len(table)} seeds as in their logs")


@rule("F1", "spread")
def spread(f: Folder) -> str:
    found, faults = finals(f), []
    for key, of in (("val_bpb_std", lambda r: r.final.bpb), ("val_loss_std", lambda r: r.final.loss)):
        values = [of(r) for r in found]
        if key in f.json and len(values) > 1:
            # both conventions are in use, n - 1 and n
            sample = runs.spread(values)
            if not any(runs.agrees(f.json[key], s, 3e-8) for s in (sample, sample * math.sqrt(1 - 1 / len(values)))):
                faults.append(f"{key} is {f.json[key]}, the logs give {sample:.8f}")
    if "val_bpb_std" not in f.json:
        raise Undecided("submission.json gives no val_bpb_std")
    return broken_if(faults, f"seed sd {f.json['val_bpb_std']}")


@rule("F1", "readme")
def readme(f: Folder) -> str:
    """The README's figures are the logs': the headline, and every seed's score."""
    numbers = [float(n) for n in re.findall(r"(?<![\w.])\d\.\d{4,}", f.text("README.md"))]
    found = finals(f)
    wanted = {"the mean": runs.mean(r.final.bpb for r in found), **{f"seed {r.seed}": r.final.bpb for r in found}}
    if len(found) > 1 and not f.ours:
        wanted.pop("the mean")  # others' headlines are a best seed as often as a mean
    faults = [f"{name}'s {value:.6f} is not in the README" for name, value in wanted.items()
              if not any(runs.agrees(n, value) for n in numbers)]
    if f.ours:  # in a table that make.py wrote, a seed's own row has its score in bold
        told = {int(s): float(x) for s, x in re.findall(r"^\| (\d+) \|.*?\*\*(\d+\.\d+)\*\*", f.text("README.md"), re.M)}
        faults += [f"the row of seed {r.seed} says {told[r.seed]}, the log {r.final.bpb:.8f}" for r in found
                   if r.seed in told and not runs.agrees(told[r.seed], r.final.bpb)]
    title = re.search(r"^# .*?(\d\.\d{4,})", f.text("README.md"), re.M)
    if title and "val_bpb" in f.json and not runs.agrees(float(title[1]), f.json["val_bpb"]):
        faults.append(f"its title says {title[1]}, submission.json {f.json['val_bpb']}")
    return broken_if(faults, "its scores are the logs'")


@rule("F1", "sizes-told")
def sizes_told(f: Folder) -> str:
    totals = [r.total for r in f.need_logs() if r.total]
    if not totals or "bytes_total" not in f.json:
        raise Undecided("no bytes_total, or no log with a total")
    told = f.json["bytes_total"]
    if told not in (max(totals), round(runs.mean(totals))):
        raise Broken(f"bytes_total is {told}, the logs say {sorted(totals)}")
    return f"bytes_total {told:,} is in the logs"


@rule("F1", "seeds")
def seeds(f: Folder) -> str:
    """Each log a seed of its own, the json's list the logs', three for a record, none left out."""
    found = [r.seed for r in f.need_logs()]
    faults = [f"seed {s} is in {found.count(s)} logs" for s in sorted({s for s in found if s is not None}) if found.count(s) > 1]
    told = f.json.get("seeds")
    told = list(map(int, told)) if isinstance(told, (list, dict)) and all(str(s).isdigit() for s in told) else None
    if told is not None and None not in found and sorted(told) != sorted(found):
        faults.append(f"submission.json says {sorted(told)}, the logs {sorted(found)}")
    faults += [f"{f.name(r)} holds seed {r.seed}" for r in f.logs
               if (named := re.search(r"seed(\d+)", r.path.stem)) and r.seed is not None and int(named[1]) != r.seed]
    if f.record and len(set(found)) < 3:
        faults.append(f"a record needs three seeds, here are {len(set(found))}")
    return broken_if(faults, f"seeds {found}")


@rule("F2", "margin")
def margin(f: Folder) -> str:
    if not f.record:
        raise NotHere("only a record must beat another")
    raise Undecided("needs the record before it: python records/compare.py FOLDER PREVIOUS")


@rule("F3", "one-recipe")
def one_recipe(f: Folder) -> str:
    """All seeds ran one program with one set of knobs."""
    found = f.need_logs()
    if not f.ours:
        raise Undecided("the logs name no recipe")
    faults = [f"the logs differ in their {what}: {sorted(values)}" for what, values in (
        ("recipe", {r.recipe for r in found}), ("source", {(r.source_sha or "none")[:12] for r in found}),
        ("ranks", {r.world for r in found}), ("device", {str(r.device) for r in found}), ("torch", {str(r.torch) for r in found}))
        if len(values) > 1]
    if f.json.get("recipe", found[0].recipe) != found[0].recipe:
        faults.append(f"submission.json says recipe {f.json['recipe']}, the logs {found[0].recipe}")
    return broken_if(faults, f"recipe {found[0].recipe}, {found[0].world} ranks")


@rule("F3", "hardware")
def hardware(f: Folder) -> str:
    if not f.record:
        raise NotHere("any machine will do off the timed track")
    found = f.need_logs()
    if any(r.world is None or r.device is None for r in found):
        raise Undecided("the logs do not name GPUs and ranks")
    wrong = [f"{f.name(r)}: {r.world}x {r.device}" for r in found if r.world != 8 or "H100" not in r.device]
    return broken_if([f"8x H100 expected; {w}" for w in wrong], f"8x {found[0].device}")


@rule("F3", "knobs")
def knobs(f: Folder) -> str:
    """No command of the README sets a knob that the program does not have."""
    given = {name for knobs_, _ in commands(f.text("README.md")) for name in knobs_}
    if not f.source:
        raise Undecided("no source to look them up in")
    known = (runs.knobs_of(f.source) if f.ours else None) or constants(f.source)
    if not commands(f.text("README.md")):
        raise (Broken if f.ours else Undecided)("the README has no command that runs train_gpt.py")
    # a variable that the command itself uses, as in NPROC=8 torchrun --nproc_per_node=$NPROC, is the shell's
    used = set(re.findall(r"\$\{?([A-Z][A-Z0-9_]*)", f.text("README.md")))
    unknown = sorted(n for n in given - set(known) - used if not LIBRARIES.match(n))
    return broken_if([f"{name}: not read by the program" for name in unknown], f"{len(given)} knobs, all read by the program")


@lru_cache(64)
def constants(source: str) -> set[str]:
    """All names in quotes: a variable that a program reads is one of them. Not parsed, so any Python finds the same."""
    return set(re.findall(r"""["']([A-Z][A-Z0-9_]*)["']""", source))


def commands(text: str) -> list[tuple[dict, str]]:
    """(knobs, line) of each command in fenced blocks that starts a train_gpt.py; exports before it count."""
    found = []
    for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.M | re.S):
        exported = {}
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            except ValueError:
                continue  # prose or output, not a command
            given = dict(w.split("=", 1) for w in words if re.match(r"[A-Z][A-Z0-9_]*=", w))
            if words and words[0] == "export":
                exported |= given
            elif any(w.endswith("train_gpt.py") for w in words) and any(re.search(r"python|torchrun", w) for w in words):
                found.append(({**exported, **given}, line.strip()))
    return found


@rule("F3", "command")
def command(f: Folder) -> str:
    """The README's command gives the logged configuration, nothing left out and nothing else."""
    known = runs.knobs_of(f.source) if f.ours and f.source else None
    if known is None:
        raise Undecided("only programs that print their knobs can be compared with a command")
    found = [k for k, _ in commands(f.text("README.md")) if k.get("MODE", "train") == "train"]
    if not found:
        raise Broken("the README has no command that trains")
    log, faults = f.logs[0].config, []
    preset = {**known, **preset_of(f.source, found[0].get("PRESET") or log.get("PRESET", ""))}
    for name in known.keys() - LOCAL:
        told = found[0].get(name, preset[name])
        if name in log and not same_value(told, log[name]):
            faults.append(f"{name}: the command gives {told or 'nothing'}, the log has {log[name]}")
    return broken_if(sorted(faults), "it gives the logged configuration")


@lru_cache(64)
def preset_of(source: str, name: str) -> dict[str, str]:
    """A preset's overrides, from the program's tables: NAME = dict(knob=value, ...), or such tables joined by |."""
    tables = {n.targets[0].id: n.value for n in ast.parse(source).body
              if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}

    def read(node) -> dict[str, str]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return {**read(node.left), **read(node.right)}
        if isinstance(node, ast.Name):
            return read(tables.get(node.id))
        return {k.arg.upper(): str(ast.literal_eval(k.value)) for k in node.keywords} if isinstance(node, ast.Call) else {}

    return read(tables.get(name.upper()))


def same_value(a: str, b: str) -> bool:
    """Equal as text, as number, or as switch."""
    a, b = ({"True": "1", "False": "0"}.get(str(x), str(x)) for x in (a, b))
    try:
        return a == b or float(a) == float(b)
    except ValueError:
        return False


@rule("F4", "same-code")
def same_code(f: Folder) -> str:
    """What ships is what ran: the packed train_gpt.py is the source in the logs, and the file that the runs counted."""
    sources = [r.source for r in f.need_logs() if r.source]
    shipped = f.text("train_gpt.py")
    if not sources or not shipped:
        raise Undecided("the logs hold no source" if shipped else "no train_gpt.py")
    faults = [f"{f.name(r)}: its source is not the one whose sha256 it names" for r in f.logs
              if r.source and r.source_sha and runs.sha256(r.source.encode()) != r.source_sha]
    packed = [twin.packed_sha for r in f.logs if (twin := f.twin(r)) and twin.packed_sha]
    if set(packed) - {runs.sha256((f.path / "train_gpt.py").read_bytes())}:
        faults.append("train_gpt.py is not the packed file that the runs counted, by its sha256")
    others = [r for r in f.logs if r.source and r.source.strip() != shipped.strip()]
    try:
        mine = runs.meaning(runs.unpack_code(shipped) or shipped) if others else ""
        faults += [f"train_gpt.py is another program than the source in {f.name(r)}" for r in others
                   if mine != runs.meaning(runs.unpack_code(r.source) or r.source)]
    except (SyntaxError, ValueError):
        # an older Python than the program's cannot compare two programs, but files it can
        if not faults and len(packed) < len(f.logs):
            raise Undecided(f"a source does not parse on Python {THIS_PYTHON}") from None
        return broken_if(faults, f"train_gpt.py is the file that {len(packed)} runs packed and counted, by its sha256")
    return broken_if(faults, f"train_gpt.py is the source in {len(sources)} logs")


@rule("F4", "python")
def python(f: Folder) -> str:
    """The folder names the Python that train_gpt.py needs. What is found does not depend on the Python that looks."""
    shipped = f.text("train_gpt.py")
    if not shipped:
        raise Undecided("no train_gpt.py")
    named = [*(r.python for r in f.logs), f.json.get("python_version")]
    ran = versions(" ".join(f"Python {v}" for v in named))
    needed = runs.needed_python(runs.unpack_code(shipped) or shipped, tuple(sorted(ran)))
    if needed is None:
        raise Undecided(f"train_gpt.py does not parse on Python {THIS_PYTHON}, and the folder names no later one")
    if needed == (3, 11):
        return "train_gpt.py is read by Python 3.11 and later"
    told = versions(f.text("README.md") + f.text("requirements.txt"))
    words = f"train_gpt.py needs Python {needed[0]}.{needed[1]} or later"
    if f.ours and not any(v >= needed for v in told):
        raise Broken(f"{words}; README.md and requirements.txt do not say so")
    return words + (", as the folder says" if told else "")


def versions(text: str) -> set[tuple[int, int]]:
    """All versions of Python 3 that a text names."""
    return {(3, int(minor)) for minor in re.findall(r"[Pp]ython\W{0,5}3\.(\d+)", text)}


@rule("F4", "repeated")
def repeated(f: Folder) -> str:
    """The shipped file itself has scored the artifacts."""
    files_ = f.path.rglob("eval_seed*.log")
    evals = {int(m[1]): runs.from_log(p) for p in files_ if (m := re.search(r"seed(\d+)", p.stem))}
    if not evals:
        raise Undecided("no eval_seed*.log: nobody ran the shipped file on the artifacts")
    shipped, trained, faults = runs.sha256((f.path / "train_gpt.py").read_bytes()), {r.seed: r for r in f.logs}, []
    for seed, run in evals.items():
        if run.source_sha != shipped:
            faults.append(f"seed {seed} was scored by another file than train_gpt.py")
        if seed not in trained or not run.finished or run.failures:
            faults.append(f"eval_seed{seed}.log: " + ("no such training" if seed not in trained else "not finished, or it failed"))
        elif trained[seed].final:
            name, before = runs.result_pass(trained[seed]), trained[seed].final
            again = run.scores[name].bpb if name in run.scores else math.nan
            if not abs(again - before.bpb) <= TOLERANCE:
                faults.append(f"seed {seed}: {again:.8f}, at the end of training {before.bpb:.8f}")
    return broken_if(faults, f"the shipped file scores {len(evals)} of {len(trained)} artifacts as the runs did")


# ----------------------------------------------------------------------------------------------------------------------
# A: the artifact
# ----------------------------------------------------------------------------------------------------------------------
@rule("A1", "bytes")
def total_bytes(f: Folder) -> str:
    totals = {f.name(r): r.total for r in f.need_logs() if r.total}
    if not totals:
        raise Undecided("no log gives a total size")
    faults = [f"{n}: {t:,} bytes are over {runs.CAP:,}" for n, t in totals.items() if t > runs.CAP]
    faults += [f"{f.name(r)}: code {r.size['code']:,} + model {r.size['model']:,} is not {r.total:,}" for r in f.logs
               if {"code", "model", "total"} <= r.size.keys() and r.size["code"] + r.size["model"] != r.total]
    return broken_if(faults, f"largest total {max(totals.values()):,} of {runs.CAP:,}")


@rule("A1", "shipped")
def shipped(f: Folder) -> str:
    """The code that is counted is the file that ships."""
    if not f.text("train_gpt.py"):
        raise Undecided("no train_gpt.py")
    real = (f.path / "train_gpt.py").stat().st_size
    counted = {f.name(r): r.size["code"] for r in f.need_logs() if "code" in r.size}
    models = [r.size["model"] for r in f.logs if "model" in r.size]
    with_it = f", with it the total is {max(models) + real:,}" if models else ""
    faults = [f"{n} counts {c:,} bytes of code, train_gpt.py has {real:,}{with_it}" for n, c in counted.items() if c != real]
    if "bytes_code" in f.json and f.json["bytes_code"] != real:
        faults.append(f"bytes_code is {f.json['bytes_code']}, train_gpt.py has {real}")
    if f.json.get("code_sha256", "") not in ("", runs.sha256((f.path / "train_gpt.py").read_bytes())):
        faults.append("code_sha256 is another file's")
    if not counted and "bytes_code" not in f.json:
        raise Undecided("neither logs nor submission.json count the code")
    return broken_if(faults, f"train_gpt.py's {real:,} bytes are the ones counted")


@rule("A1", "artifact")
def artifact(f: Folder) -> str:
    """Artifacts in the folder: size, checksum, and that they belong to these logs."""
    files_ = {p: re.search(r"seed(\d+)", p.stem) for p in f.path.rglob("*.artifact")}
    if not files_:
        raise Undecided("no artifact in the folder; sizes are the logs' word")
    logs, faults, missing = {r.seed: r for r in f.logs}, [], set()
    for path, seed in files_.items():
        try:
            manifest = runs.read_manifest(path)
        except ImportError as e:
            missing.add(e.name)
            manifest = {}
        except (runs.Unreadable, OSError, ValueError, KeyError) as e:
            faults.append(str(e))
            continue
        log = logs.get(int(seed[1])) if seed else None
        faults += [f"{path.name} belongs to no log"] if log is None else artifact_faults(path, manifest, log, f.json)
    if missing and not faults:
        raise Undecided(f"bytes and checksums are right; to read the manifests: pip install {' '.join(sorted(missing))}")
    return broken_if(faults, f"{len(files_)} artifacts are the logs'")


def artifact_faults(path: Path, manifest: dict, log: runs.Run, told: dict) -> list[str]:
    """What in an artifact is not as its log and submission.json say; of the manifest only if it could be read."""
    sha = told.get("seed_results", {}).get(str(log.seed), {}).get("artifact_sha256")
    facts = [("its bytes", path.stat().st_size, log.size.get("model")),
             ("its sha256", runs.sha256(path.read_bytes()), sha or runs.sha256(path.read_bytes()))]
    if manifest:
        facts += [("its source", manifest.get("source"), log.source_sha),
                  ("its seed", manifest.get("config", {}).get("seed"), log.seed)]
    if "validation" in manifest:  # older programs told which set the training run was scored on
        facts += [("its validation set", manifest["validation"], log.validation)]
    return [f"{path.name}: {what} is {a}, not {b}" for what, a, b in facts if a != b]


@rule("A2", "alone")
def alone(f: Folder) -> str:
    """No code beside train_gpt.py that it uses."""
    if not f.source:
        raise Undecided("no source")
    others = [p.name for p in f.path.rglob("*.py") if p.name != "train_gpt.py"]
    source = f.text("train_gpt.py") + (runs.unpack_code(f.text("train_gpt.py")) or "")
    used = [n for n in others if re.search(rf"\b{re.escape(n)}|\b(?:import|from)\s+{re.escape(n[:-3])}\b", source)]
    binaries = [p.name for p in f.path.rglob("*") if p.suffix in (".so", ".dll", ".dylib", ".whl")]
    faults = [f"train_gpt.py uses {n}, which is not counted" for n in used] + [f"{n} is not counted" for n in binaries]
    return broken_if(faults, "train_gpt.py is all the code" + (f" (it does not use {', '.join(others)})" if others else ""))


@rule("A3", "offline")
def offline(f: Folder) -> str:
    if not f.source:
        raise Undecided("no source")
    used = sorted(NETWORK & imports(f.source))
    if used:
        raise Undecided(f"the program imports {', '.join(used)}: see whether evaluation uses it")
    return "the program imports nothing that reaches the network"


@lru_cache(64)
def imports(source: str) -> set[str]:
    """Top-level names of all modules that a program imports, wherever in it; by its lines if it does not parse here."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return set(re.findall(r"(?:^|;)[ \t]*(?:import|from) +(\w+)", source, re.M))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    return {n.split(".")[0] for n in names}


# ----------------------------------------------------------------------------------------------------------------------
# B: time
# ----------------------------------------------------------------------------------------------------------------------
def limit_of(f: Folder, run: runs.Run, knob: str) -> float | None:
    """Seconds allowed: the contest's for a record, else the run's own; None for no limit."""
    if f.record:
        return runs.BUDGET
    own = float(run.config.get(knob) or 0)
    return own or None


def slack(run: runs.Run) -> float:
    """Seconds behind the cap at which a run of the contest's scripts may stop.

    Their loop ends at the first step after which the clock stands behind the cap. The clock is read while a step is
    still queued on the GPU, and stops when that one is done too: two steps, as long as they were at the end of the run.
    Six merged records stop 0.06 to 0.14 s behind 600 s with steps of 0.08 s. Of steps that are long, one, or what makes
    a second. Hessians behind the cap have not been accepted, and our own program stops before it.
    """
    if run.dialect != "upstream" or "hessians" in run.spans:
        return 0.0
    step = runs.last_step_seconds(run)
    return max(step, min(QUEUED_STEPS * step, 1.0))


def within(run: runs.Run, cap: float) -> bool | None:
    """Whether training kept to the cap; None where the log does not say how long it took."""
    return None if run.train_seconds is None else run.train_seconds <= cap + slack(run)


@rule("B1", "training")
def training(f: Folder) -> str:
    """All that reads training data, Hessians included, within the budget."""
    faults, longest, note = [], 0.0, ""
    for run in f.need_logs():
        cap, used = limit_of(f, run, "MAX_WALLCLOCK_SECONDS"), run.train_seconds
        if cap is None:
            continue
        if used is None:
            raise Undecided(f"{f.name(run)} does not say how long training took")
        step = runs.last_step_seconds(run)
        steps = f"{QUEUED_STEPS} steps" if QUEUED_STEPS * step <= 1 else "a second or one step"
        allowed = f"{slack(run):.3f} s, {steps} of {1000 * step:.1f} ms at the end"
        if not within(run, cap):
            parts = ", ".join(f"{k} {run.spans[k]:.2f} s" for k in runs.TRAIN_SPANS if k in run.spans)
            parts += f"; allowed {allowed}" if slack(run) else ""
            faults.append(f"{f.name(run)}: {used:.2f} s of {cap:.0f} s ({parts})")
        elif used > max(cap, longest):
            note = (f"; {used - cap:.2f} s behind {cap:.0f} s is within {allowed}: "
                    "the clock is read behind a queue of steps")
        longest = max(longest, used)
    if not longest and not faults:
        raise NotHere("the runs had no training budget")
    return broken_if(faults, f"{longest:.2f} s at most, calibration included{note}")


@rule("B2", "evaluation")
def evaluation(f: Folder) -> str:
    faults, longest = [], 0.0
    for run in f.need_logs():
        cap, used = limit_of(f, run, "EVAL_WALLCLOCK_SECONDS"), run.eval_seconds
        if cap is not None and used is None:
            raise Undecided(f"{f.name(run)} does not say how long evaluation took")
        longest = max(longest, used or 0.0)
        faults += [f"{f.name(run)}: {used:.2f} s of {cap:.0f} s"] if cap is not None and used > cap else []
    return broken_if(faults, f"{longest:.2f} s at most" + ("" if f.ours else ", as far as the logs count it"))


# ----------------------------------------------------------------------------------------------------------------------
# C: prediction
# ----------------------------------------------------------------------------------------------------------------------
@rule("C1-4", "ledger")
def ledger(f: Folder) -> str:
    """Every score carries its ledger's line, and that line covers every token once."""
    scored(f)
    if not f.ours:
        raise Undecided("these logs keep no ledger: causality, normalisation and score-first need the code read")
    faults = []
    for run in f.logs:
        for name, score in run.scores.items():
            line = re.match(r"each of (\d+) tokens scored once", score.verdict or "")
            if not line or "after its score" not in score.verdict or "full distribution" not in score.verdict:
                faults.append(f"{f.name(run)}: no ledger line for {name}")
            elif int(line[1]) != (tokens := run.validation.get("tokens")):
                faults.append(f"{f.name(run)}: {name} scored {line[1]} tokens, the validation set has {tokens}")
    return broken_if(faults, "every pass: each token once, learned from only after its score, full distribution")


@rule("C1-4", "verdict")
def verdict(f: Folder) -> str:
    """Every log ends with a legal verdict. What it adds behind "but" is told, and counts on the contest's track."""
    if not f.ours:
        raise Undecided("these logs give no verdict")
    faults = [f"{f.name(r)}: {'; '.join(r.failures or ['no verdict'])}" for r in f.logs if r.failures != []]
    caveats = list(dict.fromkeys(c for r in f.logs for c in r.caveats))
    if f.record:
        faults += [f"the verdict is legal, but {c}" for c in caveats if "contest" in c]
    fine = "every log ends with a legal verdict" + "".join(f"; but {c}" for c in caveats)
    if caveats and f.record and not faults:
        raise Undecided(fine)
    return broken_if(faults, fine)


@rule("D5", "disjoint")
def disjoint(f: Folder) -> str:
    raise Undecided("whether training text, tokenizer or tables saw validation text does not show in a folder")


# ----------------------------------------------------------------------------------------------------------------------
# E: the metric
# ----------------------------------------------------------------------------------------------------------------------
def is_fineweb(validation: dict) -> bool:
    """Whether this can be the contest's validation set: 50,000 documents and its number of bytes."""
    return validation.get("documents") == 50_000 and FINEWEB_BYTES[0] <= validation.get("bytes", 0) <= FINEWEB_BYTES[1]


@rule("E1", "bits-per-byte")
def bits_per_byte(f: Folder) -> str:
    """bpb follows from nats, tokens and bytes; where bytes are not logged, the ones implied are the contest's."""
    faults, shown = [], set()
    for run in scored(f):
        tokens, size = run.validation.get("tokens"), run.validation.get("bytes")
        if not tokens:
            raise Undecided(f"{f.name(run)} does not say how many tokens were scored")
        judged = {runs.result_pass(run): run.final} if run.final and not f.ours else run.scores
        for name, s in judged.items():
            if not 0 < s.bpb < math.inf or not 0 < s.loss < math.inf:
                faults.append(f"{f.name(run)}: {name} {s.bpb} and {s.loss} are no scores")
                continue
            implied = s.loss / math.log(2) * tokens / s.bpb
            shown.add(round(implied))
            if size and abs(s.loss / math.log(2) * tokens / size - s.bpb) > 3e-7:
                faults.append(f"{f.name(run)}: {name} {s.bpb} does not follow from {s.loss}, {tokens} tokens and "
                              f"{size} bytes")
            if not size and not FINEWEB_BYTES[0] <= implied <= FINEWEB_BYTES[1]:
                faults.append(f"{f.name(run)}: {name} implies {implied:,.0f} bytes; the set has 151.07 to 151.08 "
                              "million")
    return broken_if(faults, f"every score follows from its nats, over {min(shown, default=0):,} bytes")


@rule("E2", "byte-count")
def byte_count(f: Folder) -> str:
    if not f.ours:
        raise Undecided("these logs do not compare their byte table with decoded text")
    proof = re.compile(r"^val_bpb:enabled .*(byte table equals (decoded )?UTF-8 on (?!0 )|sidecar)", re.M)
    missing = [f.name(r) for r in f.logs if not proof.search(f.text(f.name(r)))]
    return broken_if([f"{n}: no comparison of the byte table with decoded text" for n in missing],
                     "the byte table was proved at start-up")


@rule("E4", "validation-set")
def validation_set(f: Folder) -> str:
    """One set for all seeds, the one that submission.json names, and for a record the contest's, whole."""
    found = [r.validation for r in scored(f)]
    if any("sha256" not in v for v in found):
        raise Undecided("the logs give no fingerprint of the validation set")
    sets, told = {v["sha256"] for v in found}, f.json.get("validation", {})
    faults = [f"the logs were scored on {len(sets)} different sets"] if len(sets) > 1 else []
    faults += [f"submission.json says {k} {told[k]}, the logs {v}" for k, v in found[0].items() if told.get(k, v) != v]
    first = int(f.logs[0].config.get("VAL_DOCS") or 0)
    if first and told.get("first_documents_only") != first:
        faults.append(f"only the first {first} documents were scored, and submission.json does not say so")
    if f.record and (first or not is_fineweb(found[0])):
        faults.append(f"not the contest's whole set: {found[0]['documents']:,} documents, {found[0]['bytes']:,} bytes")
    return broken_if(faults, f"{found[0]['documents']:,} documents, {found[0]['tokens']:,} tokens, sha256 {found[0]['sha256'][:12]}"
                     + ("" if is_fineweb(found[0]) else " (not the contest's set)"))


@rule("F1", "compliance")
def compliance(f: Folder) -> str:
    """What submission.json claims about itself is what the logs show."""
    told = f.json.get("compliance")
    if not isinstance(told, dict):
        raise Undecided("submission.json makes no compliance claims")
    found = f.need_logs()
    real = {"train_under_600s": [within(r, runs.BUDGET) for r in found],
            "eval_under_600s": [r.eval_seconds and r.eval_seconds <= runs.BUDGET for r in found],
            "artifact_under_16mb": [r.total and r.total <= runs.CAP for r in found],
            "three_seeds": [len({r.seed for r in found}) >= 3]}
    faults = [f"{k} is claimed, and the logs say otherwise" for k, v in real.items() if told.get(k) is True and False in v]
    # what a record itself denies; normalised counts and biases have been ruled on one by one, so they are only named
    open_ones = [k for k in ("no_ngram_cache", "no_etlb") if told.get(k) is False]
    faults += [f"{k} is {v}" for k, v in told.items() if v is False and f.record and k not in open_ones]
    return broken_if(faults, f"{sum(v is True for v in told.values())} claims, none against the logs"
                     + (f"; it denies {', '.join(open_ones)}" if open_ones else ""))


# ----------------------------------------------------------------------------------------------------------------------
# Running them
# ----------------------------------------------------------------------------------------------------------------------
def check(path: Path) -> list[Outcome]:
    """The outcome of every rule for one folder."""
    folder, out = Folder(Path(path)), []
    for id, name, function in RULES:
        try:
            status, text = "ok", function(folder)
        except Broken as e:
            status, text = "FAIL", str(e)
        except Undecided as e:
            status, text = "undecided", str(e)
        except NotHere as e:
            status, text = "n/a", str(e)
        except SyntaxError as e:
            status, text = "undecided", f"a source does not parse on Python {THIS_PYTHON}: {e}"
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, OSError) as e:
            # strangers' folders hold anything: one odd value must not hide what the other rules find
            status, text = "undecided", f"could not be read ({type(e).__name__}: {e})"
        out.append(Outcome(id, name, status, text))
    return sorted(out, key=lambda o: o.id)


def show(path: Path, outcomes: list[Outcome]) -> str:
    """One line a rule, and a last one that counts."""
    counts = {s: sum(o.status == s for o in outcomes) for s in ("ok", "FAIL", "undecided", "n/a")}
    rows = [f"{o.status:9} {o.id:5} {o.name:14} {o.text}" for o in outcomes]
    return "\n".join([str(path), *rows, ", ".join(f"{n} {s}" for s, n in counts.items())])


def main(args: list[str] | None = None) -> int:
    """Command line; 0 if no rule is broken in any folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="outcomes as JSON")
    parser.add_argument("--strict", action="store_true", help="undecided rules count as broken")
    parser.add_argument("--heldout", type=Path, metavar="SHARDS", help="score the folders' artifacts on these validation shards as well")
    parser.add_argument("--against", type=Path, nargs="+", default=[], metavar="SHARDS", help="look for near-duplicates in these")
    given = parser.parse_args(args)
    missing = [f for f in given.folders if not f.is_dir()]
    if missing:
        print(f"check: {missing[0]} is no folder", file=sys.stderr)
        return 2
    found = {str(f): check(f) for f in given.folders}
    if given.json:
        print(json.dumps({f: [vars(o) for o in out] for f, out in found.items()}, indent=1))
    else:
        print("\n\n".join(show(Path(f), out) for f, out in found.items()))
    bad = {"FAIL", "undecided"} if given.strict else {"FAIL"}
    status = int(any(o.status in bad for out in found.values() for o in out))
    if given.heldout:
        import heldout  # not above: it needs numpy, and the rules nothing but the standard library
    against = ["--against", *map(str, given.against)] if given.against else []
    for folder in given.folders if given.heldout else []:
        print(f"\n{folder} on held-out text")
        status = max(status, heldout.main([str(folder), "--data", str(given.heldout), *against]))
    return status


if __name__ == "__main__":
    sys.exit(main())
