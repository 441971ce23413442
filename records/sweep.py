"""Run a table of environment overrides over paired seeds, on all GPUs or on the CPU, and say what they changed.

    python records/sweep.py records/examples/smoke.toml [--slots 2] [--gpus-per-run 1] [--out sweeps] [--retry] [--base KNOB=VALUE ...]

A spec is TOML:

    name = "gates"
    seeds = [1, 2, 3]              # every setting runs every seed: equal seeds share init and data order

    [base]                         # knobs of all runs; alone they are the setting "control"
    PRESET = "record"

    [settings.no_gate]             # a list of settings, each a change of base
    ATTN_GATE = "none"

    [settings.no_tilt]             # what only evaluation (or packing) reads needs no training of its own:
    MODE = "eval"                  # the control's artifact of the same seed is scored ("pack": its checkpoint packed) again
    NGRAM_TILT_BOOST = 0

    [grid]                         # and/or a grid: all combinations but that of the first values, which is the control
    MUON_WD = [0.095, 0.05]

Without settings and grid it is the seeds of one recipe, as a record needs them. Everything lies in OUT/NAME: logs/, a copy of the program (an edit meanwhile does not mix two programs), console/, failed/,
results.md, results.json, sweep.png. Start it again after a kill: a run is done only when its JSONL holds a result, so what
was cut off runs again, what was finished does not, and runs that outlived a killed sweep are waited for and kept. A run
that failed by itself stays failed, with its last lines, until --retry. Exit status: 0 all done, 1 some failed.
"""
import argparse
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import runs

ROOT = Path(__file__).resolve().parents[1]
POLL = 0.2  # seconds between looks at the runs
CONTROL = "control"
# a run that uses the control's file instead of training: mode -> (the knob that names the file, its suffix, the first knob that
# such a run reads; the program declares them in the order of use)
LATER = {"eval": ("ARTIFACT", ".artifact", "EVAL_SEQ_LEN"), "pack": ("CHECKPOINT", ".ckpt", "QUANTIZER")}


class Refused(SystemExit):
    """A sweep that cannot start; the text says why."""

    def __init__(self, text: str):
        super().__init__(f"sweep: {text}")


# ----------------------------------------------------------------------------------------------------------------------
# What to run
# ----------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """One run: a setting and a seed."""
    setting: str
    seed: int
    knobs: tuple  # (name, text), sorted

    @property
    def id(self) -> str:
        return f"{self.setting}.s{self.seed}"

    @property
    def mode(self) -> str | None:
        """eval or pack for a run that waits for the control's files; None for one that trains."""
        return dict(self.knobs).get("MODE")


@dataclass
class Spec:
    """A parsed spec: name and setting -> knobs, control first."""
    name: str
    seeds: list
    settings: dict

    @property
    def jobs(self) -> list[Job]:
        """Seed by seed: a sweep that is cut short has whole pairs."""
        return [Job(s, seed, tuple(sorted(knobs.items()))) for seed in self.seeds for s, knobs in self.settings.items()]


def knob_text(value) -> str:
    """A TOML value as the environment has it."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def read_spec(path: Path, more: dict = {}) -> Spec:
    """Parse a spec, its base with `more` knobs; Refused names what is wrong with it."""
    try:
        told = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as e:
        raise Refused(f"{path}: {e}") from None
    unknown = told.keys() - {"name", "seeds", "base", "settings", "grid"}
    if unknown:
        raise Refused(f"{path}: {', '.join(sorted(unknown))} means nothing here; name, seeds, base, settings, grid do")
    seeds, base = told.get("seeds", [1337]), {**told.get("base", {}), **more}
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds) or len(set(seeds)) < len(seeds):
        raise Refused(f"{path}: seeds must be different whole numbers")
    grid = {k: v if isinstance(v, list) else [v] for k, v in told.get("grid", {}).items()}
    settings = {CONTROL: {**base, **{k: v[0] for k, v in grid.items()}}}
    if "MODE" in settings[CONTROL]:
        raise Refused(f"{path}: MODE is a setting's, not the base's: the control trains")
    for name, knobs in told.get("settings", {}).items():
        if knobs.get("MODE", "eval") not in LATER:
            raise Refused(f"{path}: {name} has MODE={knobs['MODE']}; without training it can be {' or '.join(LATER)}")
        # the artifact knows its own knobs; only what is changed is told again
        settings[name] = knobs if "MODE" in knobs else {**settings[CONTROL], **knobs}
    for values in list(itertools.product(*grid.values()))[1:] if grid else []:
        changed = {k: v for k, v in zip(grid, values) if v != grid[k][0]}
        settings[",".join(f"{k}={knob_text(v)}" for k, v in changed.items())] = {**settings[CONTROL], **changed}
    if any(k in knobs for knobs in settings.values() for k in ("SEED", "RUN_ID", "ARTIFACT_DIR", "ARTIFACT", "CHECKPOINT")):
        raise Refused(f"{path}: SEED, RUN_ID, ARTIFACT_DIR, ARTIFACT and CHECKPOINT are the sweep's own")
    if "/" in "".join(settings):
        raise Refused(f"{path}: no / in the names of settings, which are names of files")
    texts = {s: {k: knob_text(v) for k, v in knobs.items()} for s, knobs in settings.items()}
    return Spec(told.get("name", Path(path).stem), seeds, texts)


# ----------------------------------------------------------------------------------------------------------------------
# Where to run it
# ----------------------------------------------------------------------------------------------------------------------
def visible_gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; torch need not be imported for it."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [g for g in named.split(",") if g.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return []
    return [str(i) for i, line in enumerate(x for x in listed.splitlines() if x.startswith("GPU "))]


def slots(cpu_slots: int, gpus_per_run: int) -> list[dict]:
    """The environment of each place in which a run can run at the same time as the others."""
    gpus = visible_gpus()
    groups = [gpus[i:i + gpus_per_run] for i in range(0, len(gpus) - gpus_per_run + 1, gpus_per_run)]
    if groups:
        return [{"CUDA_VISIBLE_DEVICES": ",".join(g)} for g in groups]
    if gpus:
        raise Refused(f"{gpus_per_run} GPUs a run, but {len(gpus)} here")
    # together the runs take as many threads as there are cores
    return [{"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // cpu_slots))} for _ in range(cpu_slots)]


@dataclass
class Live:
    """A run under way. `process` is None for one that a killed sweep has left behind."""
    job: Job
    slot: int
    process: subprocess.Popen | None
    began: float = field(default_factory=time.monotonic)


def take_lock(path: Path) -> int | None:
    """A locked file descriptor, or None if another process holds the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except BlockingIOError:
        os.close(descriptor)
        return None


class Sweep:
    """A sweep's folder and the runs in it."""

    def __init__(self, spec: Spec, out: Path, root: Path, places: list[dict], ranks: int, retry: bool, say=print):
        self.spec, self.root, self.places, self.ranks, self.say = spec, root, places, ranks, say
        self.folder = out.resolve() / spec.name
        self.logs = self.folder / "logs"
        for name in ("logs", "console", "failed", "locks", "program/data"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.guard = take_lock(self.folder / "locks" / "sweep")
        if self.guard is None:
            raise Refused(f"{self.folder}: another sweep is at work there")
        self.live: list[Live] = []
        self.seconds: list[float] = []  # how long finished runs took, for the time left
        self.keep_program()
        self.keep_plan()
        # a knob that the shell happens to set must not reach the runs
        knobs = runs.knobs_of((self.folder / "program" / "train_gpt.py").read_text(encoding="utf-8")) or {}
        self.shell = {k: v for k, v in os.environ.items() if k not in knobs}
        self.refuse_unread(list(knobs))
        self.tell_strangers(knobs)
        if retry:
            for file in (self.folder / "failed").glob("*.json"):
                file.unlink()

    # ---------------- what is there ----------------
    def keep_program(self) -> None:
        """Copy the program at the first start; later starts go on with that copy."""
        mine, given = self.folder / "program" / "train_gpt.py", self.root / "train_gpt.py"
        if not mine.is_file():
            for script in (self.root / "data").glob("*.py"):  # the smoke preset builds its corpus with them
                shutil.copyfile(script, self.folder / "program" / "data" / script.name)
            part = mine.with_suffix(".part")
            shutil.copyfile(given, part)
            part.rename(mine)  # whole or not there, whenever a kill comes
        elif mine.read_bytes() != given.read_bytes():
            self.say(f"goes on with its own copy of train_gpt.py, from when it began; {given} is another one by now")

    def refuse_unread(self, knobs: list[str]) -> None:
        """Refused if a setting without training changes what is only read in training: it would silently do nothing."""
        for setting, changed in self.spec.settings.items():
            if "MODE" in changed and knobs:
                read = knobs[knobs.index(LATER[changed["MODE"]][2]):]
                unread = [k for k in changed if k in knobs and k not in read and k != "MODE"]
                if unread:
                    raise Refused(f"{setting}: MODE={changed['MODE']} does not read {', '.join(unread)}")

    def tell_strangers(self, knobs: dict) -> None:
        """Say what is no knob of the program: it may be meant for a library, or mistyped, and then every run with it ends at once."""
        told = {k for changed in self.spec.settings.values() for k in changed if knobs and k not in knobs}
        if told:
            self.say(f"no knob of the program, passed on as it is: {', '.join(sorted(told))}")

    def keep_plan(self) -> None:
        """Remember every run's knobs; Refused if one that exists was made with others."""
        file, plan = self.folder / "sweep.json", {j.id: dict(j.knobs) for j in self.spec.jobs}
        before = json.loads(file.read_text()) if file.is_file() else {}
        for id in sorted(plan.keys() & before.keys()):
            if plan[id] != before[id] and (self.logs / f"{id}.jsonl").is_file():
                raise Refused(f"{id} was run with other knobs than the spec has now; give the sweep another name")
        part = file.with_suffix(".part")
        part.write_text(json.dumps({**before, **plan}, indent=1))
        part.rename(file)

    def run_of(self, job: Job) -> runs.Run | None:
        """The job's run if it is done: its JSONL says so, and nothing else counts."""
        path = self.logs / f"{job.id}.jsonl"
        try:
            run = runs.from_events(path) if path.is_file() else None
        except (runs.Unreadable, KeyError):
            return None
        return run if run and run.finished else None

    def failure(self, job: Job) -> Path:
        return self.folder / "failed" / f"{job.id}.json"

    # ---------------- running ----------------
    def work(self) -> None:
        """Run all that is left."""
        pending = [j for j in self.spec.jobs if not self.run_of(j) and not self.failure(j).exists()]
        done = len(self.spec.jobs) - len(pending)
        self.say(f"{self.spec.name}: {len(self.spec.settings)} settings x {len(self.spec.seeds)} seeds; {done} of "
                 f"{len(self.spec.jobs)} are there, {len(pending)} to run, {len(self.places)} at a time")
        pending = self.adopt(pending)
        try:
            while pending or self.live:
                free = [i for i in range(len(self.places)) if i not in {r.slot for r in self.live}]
                for slot, job in zip(free, (j for j in list(pending) if self.ready(j, pending))):
                    pending.remove(job)
                    self.start(job, slot)
                    if not self.seconds:
                        self.wait_for_data(self.live[-1])
                if pending and not self.live:  # only such as wait for a control that will not come
                    self.say(f"not run, since their control failed: {', '.join(j.id for j in pending)}")
                    break
                time.sleep(POLL)
                self.collect(len(pending))
        finally:
            self.stop()

    def control_of(self, job: Job) -> Job:
        return next(j for j in self.spec.jobs if (j.setting, j.seed) == (CONTROL, job.seed))

    def ready(self, job: Job, pending: list[Job]) -> bool:
        """Whether what the job starts from is there."""
        if not job.mode:
            return True
        control = self.control_of(job)  # its log is read only once it is no longer to run
        return control not in pending and control not in [r.job for r in self.live] and self.run_of(control) is not None

    def adopt(self, pending: list[Job]) -> list[Job]:
        """Take over runs that go on after their sweep was killed; returns those still to start."""
        left = []
        for job in pending:
            lock = take_lock(self.folder / "locks" / job.id)
            if lock is not None:
                os.close(lock)
                left.append(job)
                continue
            slot = int((self.folder / "locks" / job.id).read_text() or 0) % len(self.places)
            self.say(f"{job.id} still runs, started by a sweep that was killed; waiting for it")
            self.live.append(Live(job, slot, None))
        return left

    def start(self, job: Job, slot: int) -> None:
        """Start one run. It inherits a lock, which so lasts exactly as long as the run, whatever becomes of the sweep."""
        self.set_aside(job)
        lock = take_lock(self.folder / "locks" / job.id)
        os.ftruncate(lock, 0), os.write(lock, str(slot).encode())
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"] if self.ranks > 1 else []
        # relative, so that logs, which are published and hold the command that goes on, do not show this machine's folders
        program = os.path.relpath(self.folder / "program" / "train_gpt.py", self.root)
        folder = os.path.relpath(self.logs, self.root)
        own = {"RUN_ID": job.id, "SEED": str(job.seed), "ARTIFACT_DIR": folder}
        if job.mode:
            knob, suffix, _ = LATER[job.mode]
            own[knob] = f"{folder}/{self.control_of(job).id}{suffix}"
        with open(self.folder / "console" / f"{job.id}.txt", "w") as console:
            process = subprocess.Popen([sys.executable, *launch, program], cwd=self.root, stdout=console,
                                       stderr=subprocess.STDOUT,
                                       env={**self.shell, **self.places[slot], **dict(job.knobs), **own},
                                       pass_fds=[lock], start_new_session=True)
        os.close(lock)
        self.live.append(Live(job, slot, process))

    def set_aside(self, job: Job) -> None:
        """Move what an unfinished attempt has left, since the program appends to a log of its name."""
        names = [f"{job.id}.{suffix}" for suffix in ("txt", "jsonl", "ckpt", "artifact", "packed.py", "score.json")]
        left = [self.logs / name for name in names if (self.logs / name).exists()]
        if left:
            folder = next(p for i in itertools.count(1) if not (p := self.folder / "failed" / f"{job.id}.{i}").exists())
            folder.mkdir()
            for file in left:
                file.rename(folder / file.name)

    def wait_for_data(self, run: Live) -> None:
        """Let the first run find its data before others start: on a fresh checkout it builds a corpus that all share."""
        file = self.logs / f"{run.job.id}.jsonl"
        while run.process.poll() is None and not (file.is_file() and '"validation"' in file.read_text()):
            time.sleep(POLL)

    def ended(self, run: Live) -> bool:
        """Whether a run is over; one that was adopted is no child, so its lock has to tell."""
        if run.process is not None:
            return run.process.poll() is not None
        lock = take_lock(self.folder / "locks" / run.job.id)
        if lock is not None:
            os.close(lock)
        return lock is not None

    def collect(self, waiting: int) -> None:
        """Book the runs that are over."""
        for run in [r for r in self.live if self.ended(r)]:
            self.live.remove(run)
            result, took = self.run_of(run.job), time.monotonic() - run.began
            if result:
                self.seconds.append(took)
                score = f"{result.final.bpb:.6f} bpb" if result.final else f"undecided: {runs.scores_text(result)}"
                self.say(f"{run.job.id} {score}, {took:.0f} s{self.outlook(waiting)}"
                         + (f"  !! {'; '.join(result.failures)}" if result.failures else ""))
            else:
                self.keep_failure(run, took)

    def keep_failure(self, run: Live, took: float) -> None:
        """Write down that and how a run failed. An adopted one may have been killed too: the next start tries it again."""
        lines = (self.folder / "console" / f"{run.job.id}.txt").read_text(errors="replace").splitlines()[-12:]
        status = run.process.returncode if run.process else None
        if status is not None:
            self.failure(run.job).write_text(json.dumps({"status": status, "seconds": took, "last": lines}, indent=1))
        self.say(f"{run.job.id} FAILED (exit status {status}) after {took:.0f} s; last lines:\n    " + "\n    ".join(lines[-4:]))

    def outlook(self, waiting: int) -> str:
        """How long the rest will take, as finished runs took."""
        one = sum(self.seconds) / len(self.seconds)
        begun = sum(max(one - (time.monotonic() - r.began), 0.0) for r in self.live)
        left = (one * waiting + begun) / len(self.places)
        return f"; about {left / 60:.1f} min left" if waiting or self.live else ""

    def stop(self) -> None:
        """End runs that are still going (Ctrl-C, SIGTERM): they will run again at the next start."""
        mine = [r.process for r in self.live if r.process is not None and r.process.poll() is None]
        for process in mine:
            process.terminate()
        for process in mine:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
                process.wait()


# ----------------------------------------------------------------------------------------------------------------------
# What came of it
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class Row:
    """One setting against the control."""
    setting: str
    n: int
    failed: int
    mean: float | None
    sd: float | None
    paired: dict | None
    p: float | None
    bytes: int | None
    train_seconds: float | None
    eval_seconds: float | None
    documents: dict | None = None  # interval over documents drawn anew, where the runs had DOC_LOSSES=1
    passes: list = field(default_factory=list)  # names of those that the scores are of
    undecided: list = field(default_factory=list)  # finished runs without a score that counts, in words


def summarise(sweep: Sweep, mode: str | None = None) -> list[Row]:
    """A row a setting, the control first; scores are each run's result, or those of the pass `mode`."""
    import stats  # only now: a sweep that is killed and started again should not wait for scipy

    done, undecided = {s: {} for s in sweep.spec.settings}, {s: [] for s in sweep.spec.settings}
    for job in sweep.spec.jobs:
        run = sweep.run_of(job)
        try:
            if run and runs.result(run, mode):
                done[job.setting][job.seed] = run
        except runs.Unreadable as e:
            undecided[job.setting].append(str(e).replace(str(run.path), job.id))
    scores = {s: {seed: runs.result(r, mode).bpb for seed, r in mine.items()} for s, mine in done.items()}
    control, rows = scores[CONTROL], []
    for setting, mine in scores.items():
        against = setting != CONTROL and mine and control
        pair = stats.paired(mine, control) if against else None
        test = stats.welch(list(mine.values()), list(control.values())) if against else None
        members = done[setting].values()
        rows.append(Row(setting, len(mine), sum(sweep.failure(j).exists() for j in sweep.spec.jobs if j.setting == setting),
                        runs.mean(mine.values()) if mine else None, runs.spread(mine.values()) if len(mine) > 1 else None,
                        asdict(pair) if pair else None, test.p if test else None,
                        max((r.total or 0 for r in members), default=None),
                        mean_of(r.train_seconds for r in members), mean_of(r.eval_seconds for r in members),
                        documents(done[setting], done[CONTROL], mode) if against else None,
                        sorted({mode or runs.result_pass(r) for r in members}), undecided[setting]))
    return rows


def mean_of(values) -> float | None:
    """The mean of what is there; None of nothing (a run without training has no training seconds)."""
    there = [v for v in values if v is not None]
    return runs.mean(there) if there else None


def documents(mine: dict, control: dict, mode: str | None) -> dict | None:
    """The bootstrap over documents, of the seeds that both sides have; None where a run has not saved its losses."""
    import compare
    import stats

    seeds = sorted(mine.keys() & control.keys())
    sides = [compare.documents_of([side[s] for s in seeds], mode) for side in (mine, control)] if seeds else [None]
    return asdict(stats.document_bootstrap(*sides)) if all(sides) else None


def table(rows: list[Row], mode: str | None) -> str:
    """The rows as Markdown."""
    def number(value, form):
        return "" if value is None else format(value, form)

    def bounds(interval):
        return "" if not interval or interval["low"] is None else f"[{interval['low']:+.6f}, {interval['high']:+.6f}]"

    wide, passes = any(r.documents for r in rows), sorted({p for r in rows for p in r.passes})
    head = ["setting", "n", "mean bpb", "seed sd", "minus control, paired", "95 % interval", "Welch p (better)", "bytes", "train s", "eval s"]
    lines = [head + ["95 % over documents"] * wide, ["---"] * (len(head) + wide)]
    for r in rows:
        apart = f" (pass {', '.join(r.passes)})" if len(passes) > 1 and r.passes else ""
        name = r.setting + apart + (f" ({r.failed} failed)" if r.failed else "")
        lines.append([name, str(r.n), number(r.mean, ".6f"), number(r.sd, ".6f"),
                      number((r.paired or {}).get("mean"), "+.6f"), bounds(r.paired), number(r.p, ".3g"), number(r.bytes, ","), number(r.train_seconds, ".1f"),
                      number(r.eval_seconds, ".1f"), *[bounds(r.documents)] * wide])
    which = "the pass" if mode else "of each run the pass that its configuration reports:"
    note = (f"Scores: {which} {', '.join(passes) or 'none yet'}. Lower is better, so a negative difference is a gain. "
            "Intervals are Student's over paired seeds; where a setting does nothing, one interval in twenty leaves out "
            f"zero all the same ({len(rows) - 1} here).")
    note += "".join(f"\n\nNot counted: {text}." for r in rows for text in r.undecided)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n\n" + note + "\n"


def finish(sweep: Sweep, mode: str | None) -> list[Row]:
    """Write results.md, results.json and, where matplotlib is installed, sweep.png."""
    rows = summarise(sweep, mode)
    text = f"# {sweep.spec.name}\n\n{table(rows, mode)}"
    failures = [j for j in sweep.spec.jobs if sweep.failure(j).exists()]
    for job in failures:
        told = json.loads(sweep.failure(job).read_text())
        text += f"\n## {job.id} failed (exit status {told['status']})\n\n```\n" + "\n".join(told["last"]) + "\n```\n"
    (sweep.folder / "results.md").write_text(text, encoding="utf-8")
    (sweep.folder / "results.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    if len(rows) == 1:  # seeds of one recipe: nothing to set against each other
        return rows
    try:
        import report
        report.save(report.forest(rows, sweep.spec.name), sweep.folder / "sweep.png")
    except ImportError:
        sweep.say("no picture: pip install -r records/requirements.txt")
    return rows


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, default=Path("sweeps"), help="folder of the sweep's folder")
    parser.add_argument("--base", nargs="*", type=runs.pair, default=[], metavar="KNOB=VALUE", help="in place of the spec's base")
    parser.add_argument("--root", type=Path, default=ROOT, help="where train_gpt.py and data/ lie")
    parser.add_argument("--slots", type=int, default=1, help="runs at a time without GPUs")
    parser.add_argument("--gpus-per-run", type=int, default=1, help="more than one: torchrun over so many GPUs a run")
    parser.add_argument("--mode", help="compare this pass (full, sliding, ttt) instead of each run's result")
    parser.add_argument("--retry", action="store_true", help="run again what failed by itself")
    return parser


def main(args: list[str] | None = None) -> int:
    """Command line."""
    def end(number, frame):
        raise SystemExit(128 + number)  # through the `finally` that ends the runs

    signal.signal(signal.SIGTERM, end)
    given = options().parse_args(args)
    ranks = given.gpus_per_run if visible_gpus() else 1
    sweep = Sweep(read_spec(given.spec, dict(given.base)), given.out, given.root.resolve(), slots(max(1, given.slots), given.gpus_per_run), ranks,
                  given.retry, lambda text: print(text, flush=True))
    sweep.work()
    rows = finish(sweep, given.mode)
    print(f"\n{table(rows, given.mode)}\n{sweep.folder / 'results.md'}")
    return int(any(r.failed for r in rows) or any(r.n + r.failed < len(sweep.spec.seeds) for r in rows))


if __name__ == "__main__":
    sys.exit(main())
