"""The program as a process: real command lines, environments, signals, exit statuses and files on disk.

Nothing of `train_gpt.py` is imported here. What is asserted is what a user, a log parser or a scheduler sees: standard
output, the files under logs/ and how the process ended. A process costs three seconds of imports before it does
anything, so one finished run serves most tests, and the other processes run two at a time.
"""
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 512
LIMIT = 90  # seconds after which a process is killed: only a hang takes that long
RULER = "=" * 100
STEPS = 20
SUFFIXES = (".txt", ".jsonl", ".ckpt", ".artifact", ".packed.py", ".score.json")

# The smoke run, a hundred times smaller still: every stage and every feature, in two seconds.
SMALL = dict(
    PRESET="smoke", VOCAB_SIZE=VOCAB, NUM_LAYERS=3, MODEL_DIM=32, NUM_HEADS=2, NUM_KV_HEADS=1, XSA_LAST_N=3, LOOP_START=1,
    LOOP_END=1, PARALLEL_START_LAYER=2, TRAIN_SEQ_LEN=64, EVAL_SEQ_LEN=64, EVAL_STRIDE=32, TRAIN_BATCH_TOKENS=2048,
    MICRO_BATCH_TOKENS=1024, PACK_TOKENS=256, VAL_BATCH_TOKENS=1024, VAL_DOCS=4, GPTQ_CALIBRATION_BATCHES=2,
    TTT_CHUNK_TOKENS=1024, TTT_BATCH_TOKENS=256, WARMUP_STEPS=1, TRAIN_LOG_EVERY=1, ITERATIONS=STEPS, MAX_WALLCLOCK_SECONDS=0)
ONE_PASS = dict(SLIDING_WINDOW_ENABLED=0, TTT_ENABLED=0)  # for tests in which the other scores say nothing more
FOREVER = dict(ITERATIONS=100000, CHECKPOINT_SECONDS=0.05)  # a training that only a signal ends

STEP = re.compile(r"^step:(\d+)/(\d+) train_loss:(\d+\.\d+) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms", re.M)
FINAL = re.compile(r"^final_int6_(roundtrip|sliding_window|ttt)_exact val_loss:(\d+\.\d{8}) val_bpb:(\d+\.\d{8})\b", re.M)


# ----------------------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------------------
def environment(knobs, blocked=None):
    """Only these knobs: nothing that the shell of the test happens to set may reach the program."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH", "SYSTEMROOT")
    env = {k: os.environ[k] for k in kept if k in os.environ}
    if blocked is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(blocked), env.get("PYTHONPATH"))))
    # one thread each, as two processes run at a time; no GPU, so that a machine with one tests the same
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return env | {k: str(v) for k, v in knobs.items()}


def family(pid):
    """A process and all that it started; torchrun's workers lead process groups of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [pid] + [p for child in (children.read_text().split() if children.exists() else ()) for p in family(int(child))]


def kill(pid):
    for member in family(pid):
        try:
            os.kill(member, signal.SIGKILL)
        except ProcessLookupError:
            pass


class Ended:
    """What a process leaves behind: status, output and files."""

    def __init__(self, folder, run_id, code, out, seconds):
        self.folder, self.run_id, self.code, self.out, self.seconds = folder, run_id, code, out, seconds
        self.files = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}

    def path(self, suffix):
        return self.folder / "logs" / f"{self.run_id}{suffix}"

    @property
    def text(self):
        return self.path(".txt").read_text(encoding="utf-8")

    @property
    def log(self):
        """What parsers of contest logs look at: all that stands after the ruler."""
        return self.text.partition(f"\n{RULER}\n")[2]

    @property
    def events(self):
        """All lines of the .jsonl, as strict JSON (NaN is none)."""
        return [json.loads(line, parse_constant=pytest.fail) for line in self.path(".jsonl").read_text().splitlines()]

    def event(self, kind):
        return [e for e in self.events if e["event"] == kind]

    @property
    def losses(self):
        return [e["loss"] for e in self.event("train")]

    @property
    def scores(self):
        """Digits of the final lines: pass -> (val_loss, val_bpb)."""
        return {name: digits for name, *digits in FINAL.findall(self.log)}

    def number(self, pattern):
        """The one number of a line of the log."""
        found = re.findall(pattern, self.log, re.M)
        assert len(found) == 1, f"{pattern}: {found}"
        return float(found[0])


class Live:
    """A running process whose output is read line by line; killed if it hangs."""

    def __init__(self, folder, run_id, command, env):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.run_id, self.began, self.lines = folder, run_id, time.monotonic(), []
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            # a test runner in the background ignores SIGINT, and a child would inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        self.guard = threading.Timer(LIMIT, kill, [self.process.pid])
        self.guard.daemon = True
        self.guard.start()

    def wait_for(self, start):
        """Read until a line begins with `start`."""
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith(start):
                return
        pytest.fail(f"no line {start!r} in\n{''.join(self.lines)}")

    def send(self, number):
        self.process.send_signal(number)

    def end(self):
        """Read the rest and collect what is left."""
        self.lines += self.process.stdout
        code = self.process.wait()
        self.guard.cancel()
        return Ended(self.folder, self.run_id, code, "".join(self.lines), time.monotonic() - self.began)


class Lab:
    """A copy of the program and a small corpus; starts processes, each in a folder of its own."""

    def __init__(self, root):
        self.root, self.program = root, root / "program" / "train_gpt.py"
        self.program.parent.mkdir()
        shutil.copy(ROOT / "train_gpt.py", self.program)  # an edit during the session must not mix two programs
        (self.program.parent / "records").mkdir()
        for name in ("track.py", "bench.py"):
            shutil.copy(ROOT / "records" / name, self.program.parent / "records")
        build_corpus(root / "corpus")
        self.shards = root / "corpus" / "datasets" / f"local_sp{VOCAB}"
        self.data = dict(DATA_PATH=self.shards, TOKENIZER_PATH=root / "corpus" / "tokenizers" / f"local_{VOCAB}_bpe.model")

    def small(self, **changes):
        return {**SMALL, **self.data, **changes}

    def start(self, name, knobs, command=(), cwd=None, run_id=None, blocked=None):
        """`name` is the process's folder and, where it trains, its RUN_ID. Without a command: the program itself."""
        training = knobs.get("MODE", "train") == "train"
        knobs = {**({"RUN_ID": name} if training else {}), **knobs}
        command = list(command) or [self.program]
        return Live(cwd or self.root / name, run_id or name, [sys.executable, *map(str, command)], environment(knobs, blocked))

    def run(self, name, knobs, *command, **more):
        return self.start(name, knobs, command, **more).end()

    def blocking(self, *modules):
        """A folder for PYTHONPATH that makes these modules look not installed."""
        folder = self.root / ("without_" + "_".join(modules))
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(
            "import sys\n"
            "class Block:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name.partition('.')[0] in {modules!r}:\n"
            "            raise ModuleNotFoundError(name)\n"
            "sys.meta_path.insert(0, Block())\n")
        return folder

    def witness(self):
        """A folder for PYTHONPATH in which every rank leaves the names of the threads it still has when it ends."""
        folder = self.root / "witness"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(
            "import atexit, os, pathlib\n"
            "def tell():\n"
            "    names = [t.joinpath('comm').read_text().strip() for t in pathlib.Path('/proc/self/task').iterdir()]\n"
            "    pathlib.Path(__file__).with_name('rank' + os.environ['RANK']).write_text('\\n'.join(names))\n"
            "if 'RANK' in os.environ:\n"
            "    atexit.register(tell)\n")
        return folder


def build_corpus(folder):
    spec = importlib.util.spec_from_file_location("local_corpus", ROOT / "data" / "local_corpus.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.build(folder, VOCAB, log=lambda text: None, max_bytes=300_000)


def together(jobs):
    """name -> result of every job, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(lambda job: job(), jobs.values())))


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("process"))


PROBE = """
import json, pathlib, tempfile, threading, types
import torch
import train_gpt as t

def start(seed):
    cfg = t.read_config({**t.shell_environment(), "SEED": str(seed)})
    stream = t.TrainStream(cfg, types.SimpleNamespace(rank=0, world=1, gpu=False))
    model = t.GPT(cfg)
    t.initialize(model, cfg)
    order = [int(stream.block_at(i).astype(int).sum()) for i in range(int(stream.ends[-1]))]
    return {"order": order, "init": model.input.tok_emb.weight[0, :4].tolist()}

def snapshot():
    # the writer is held up until training has gone on; weights of 1 were to be saved
    folder, gate = tempfile.TemporaryDirectory(), threading.Event()
    path = pathlib.Path(folder.name, "test.ckpt")
    run = types.SimpleNamespace(main=True, rank=0, gpu=False, asked_rows=0, path=lambda suffix: path)
    model = torch.nn.Linear(2, 2)
    model.weight.data.fill_(1.0)
    cfg = t.read_config(t.shell_environment())
    checkpoints = t.Checkpoints(model, t.Average(cfg, model), cfg, run)
    write = checkpoints.write
    checkpoints.write = lambda *a: (gate.wait(10), write(*a))
    checkpoints.save(1, 0.0)
    for shadow in checkpoints.average.shadow:
        shadow.fill_(2.0)
    gate.set()
    getattr(checkpoints, "release", lambda seen: None)(2)
    checkpoints.wait()
    return torch.load(path, weights_only=True)["weights"]["weight"].flatten().tolist()

print(json.dumps({"have": t.HAVE, "codecs": list(t.codecs()), "seeds": [start(1), start(2), start(1)],
                  "snapshot": snapshot()}))
"""


@pytest.fixture(scope="session")
def first(lab):
    """One finished run, and beside it the bare module, imported where nothing optional is installed."""
    (lab.program.parent / "probe.py").write_text(PROBE)
    blocked = lab.blocking("brotli", "zstandard", "triton")
    return together({
        "whole": lambda: lab.run("whole", lab.small()),
        "probe": lambda: lab.run("probe", lab.small(), lab.program.parent / "probe.py", blocked=blocked)})


@pytest.fixture(scope="session")
def whole(first):
    """One finished run, from nothing to a verdict."""
    return first["whole"]


# ----------------------------------------------------------------------------------------------------------------------
# One whole run: exit status, log, files
# ----------------------------------------------------------------------------------------------------------------------
def test_whole_run_ends_well(whole):
    assert whole.code == 0, whole.out
    size = whole.event("validation")[0]["bytes"]
    told = ("verdict: legal: score-first, one pass, full distribution, budgets and bytes within their limits; but not the "
            f"contest's: training without a clock, 4 documents of 50000, {size} bytes of text of about 151.07 million, "
            "world 1 of 8, on a CPU")
    assert whole.log.splitlines()[-1] == whole.out.splitlines()[-1] == told
    assert "!!" not in whole.log.replace("!" * 100, ""), "a clean run has no warnings"


def test_whole_run_leaves_these_files_and_no_others(whole):
    assert whole.files == {f"logs/whole{s}" for s in SUFFIXES}


def test_log_begins_with_the_source_and_a_ruler(whole, lab):
    source = lab.program.read_text(encoding="utf-8")
    assert whole.text.startswith(f"{source}\n{RULER}\n")
    assert whole.text.count(f"\n{RULER}\n") == 1


def test_log_goes_on_with_versions_and_every_knob(whole, lab):
    head = whole.log.splitlines()
    digest = hashlib.sha256(lab.program.read_bytes()).hexdigest()
    assert head[0].startswith("run_id:whole mode:train preset:smoke recipe:") and head[0].endswith("seed:1337")
    assert f"torch {torch.__version__}" in head[1] and f"numpy {np.__version__}" in head[1]
    assert "world_size:1" in head[1] and f"source sha256:{digest}" in head[1]
    knobs = re.findall(r"^([* ]) ([A-Z][A-Z0-9_]+)=(.*)$", whole.log, re.M)
    names = [name for _, name, _ in knobs]
    assert names == sorted(names, key=str.lower) and len(names) > 90
    assert ("*", "ITERATIONS", str(STEPS)) in knobs and (" ", "SEED", "1337") in knobs
    config = whole.event("config")[0]
    assert {n.lower() for n in names} <= set(config) and config["iterations"] == STEPS


def test_step_lines_have_the_baseline_grammar(whole):
    lines = STEP.findall(whole.log)
    assert [(int(s), int(n)) for s, n, *_ in lines] == [(i + 1, STEPS) for i in range(STEPS)]
    times = [int(ms) for *_, ms, _ in lines]
    assert times == sorted(times)
    for step, _, _, ms, average in lines:
        assert abs(float(average) - int(ms) / int(step)) <= 0.51  # the total is rounded to a millisecond
    losses = [float(loss) for _, _, loss, _, _ in lines]
    assert losses[-1] < losses[0] - 1, "it learns"


def test_final_lines_have_the_baseline_grammar(whole):
    assert list(whole.scores) == ["roundtrip", "sliding_window", "ttt"]
    for pattern in (r"^Total submission size\b.*?: (\d+) bytes", r"^Code size: (\d+) bytes", r"^model_params:(\d+)$",
                    r"^Serialized model\b.*?: (\d+) bytes"):
        assert whole.number(pattern) > 0


def test_nothing_before_the_ruler_looks_like_a_result(whole):
    source = whole.text.partition(RULER)[0]
    for pattern in (STEP, FINAL, re.compile(r"^(Total submission size|Code size|model_params|verdict|val_bpb:)", re.M)):
        assert not pattern.search(source)


def test_bits_per_byte_follow_from_nats_tokens_and_bytes(whole):
    validation = whole.event("validation")[0]
    for loss, bpb in whole.scores.values():
        expected = float(loss) / math.log(2) * validation["tokens"] / validation["bytes"]
        assert abs(float(bpb) - expected) < 2e-7


def test_spans_add_up_to_the_wall_time(whole):
    spans = dict(re.findall(r"(\S+):([\d.]+)s", re.search(r"^spans: (.*)", whole.log, re.M)[1]))
    total, wall = float(spans.pop("sum")), float(spans.pop("wall"))
    assert abs(total - wall) < 0.1
    assert abs(sum(map(float, spans.values())) - total) < 0.1
    assert {"start-up", "train", "hessians", "eval_full", "eval_sliding", "eval_ttt"} <= set(spans)
    # from the start of the process, imports included, to shortly before its end
    assert whole.seconds / 2 < wall < whole.seconds + 0.1


def test_events_agree_with_the_log(whole):
    told = [(int(s), float(loss)) for s, _, loss, *_ in STEP.findall(whole.log)]
    assert [(e["step"], round(e["loss"], 4)) for e in whole.event("train")] == told
    seen, batch = [e["tokens"] for e in whole.event("train")], whole.event("config")[0]["train_batch_tokens"]
    assert seen[0] == batch // 4 and seen == sorted(set(seen)), "the first steps are a quarter as long, and all are counted as they are"
    assert seen[-1] <= sum(e["tokens"] for e in whole.event("phase")) < batch * sum(e["steps"] for e in whole.event("phase"))
    scores = [[f"{e['val_loss']:.8f}", f"{e['val_bpb']:.8f}"] for e in whole.event("score")]
    assert scores == list(map(list, whole.scores.values()))
    assert whole.event("size")[0]["total"] == whole.number(r"^Total submission size\b.*?: (\d+) bytes")
    assert whole.event("schedules")[0]["never"] == [] and not whole.event("warning")
    moments = [e["t"] for e in whole.events]
    assert moments == sorted(moments)


def test_score_file_agrees_with_the_log(whole):
    score = json.loads(whole.path(".score.json").read_text())
    assert [f"{s['val_bpb']:.8f}" for s in score["results"].values()] == [bpb for _, bpb in whole.scores.values()]
    assert score["failures"] == [] and score["seed"] == 1337 and score["run"] == "whole"
    assert score["recipe"] == re.search(r"recipe:(\w+)", whole.log)[1]
    assert score["finished"] is True
    assert score["headline"] == "ttt", "the pass that the configuration asks for, however the others did"
    assert f"{whole.number(r'^val_bpb:([0-9.]+) '):.8f}" == whole.scores["ttt"][1]
    (caveat,) = score["caveats"]
    assert whole.log.splitlines()[-1].endswith(f"; but {caveat}") and caveat.startswith("not the contest's: ")


def test_sizes_on_disk_add_up_to_the_logged_total(whole):
    model, code = (whole.path(s).stat().st_size for s in (".artifact", ".packed.py"))
    total = whole.number(r"^Total submission size\b.*?: (\d+) bytes")
    assert model == whole.number(r"^Serialized model\b.*?: (\d+) bytes")
    assert code == whole.number(r"^Code size: (\d+) bytes")
    assert model + code == total == json.loads(whole.path(".score.json").read_text())["bytes_total"]


# ----------------------------------------------------------------------------------------------------------------------
# The other modes, on what that run left
# ----------------------------------------------------------------------------------------------------------------------
PROMPT = "import os"


@pytest.fixture(scope="session")
def again(lab, whole):
    """The other modes. No knob but theirs is set: an artifact and a checkpoint carry their own configuration."""
    artifact, checkpoint = whole.path(".artifact"), whole.path(".ckpt")
    packed = lab.root / "packed" / "golf.py"
    packed.parent.mkdir()
    shutil.copy(whole.path(".packed.py"), packed)
    text = dict(MODE="sample", SAMPLE_PROMPT=PROMPT, SAMPLE_TOKENS=40)
    return together({
        "eval": lambda: lab.run("eval", dict(MODE="eval", ARTIFACT=artifact), run_id="whole.eval"),
        "packed": lambda: lab.run("packed", dict(MODE="eval", ARTIFACT=artifact), packed, run_id="whole.eval"),
        "pack": lambda: lab.run("pack", dict(MODE="pack", CHECKPOINT=checkpoint), run_id="whole.pack"),
        "window": lambda: lab.run("window", dict(MODE="eval", ARTIFACT=artifact, EVAL_SEQ_LEN=48, **ONE_PASS)),
        "sample": lambda: lab.run("sample", dict(text, ARTIFACT=artifact)),
        "sample newest": lambda: lab.run("sample_newest", dict(text, CUDA_VISIBLE_DEVICES=-1), cwd=whole.folder),
        "sample other": lambda: lab.run("sample_other", dict(text, ARTIFACT=artifact, SEED=7, CUDA_VISIBLE_DEVICES=97)),
        "config": lambda: lab.run("config", lab.small(MODE="config", DATA_PATH="nowhere", TOKENIZER_PATH="nowhere")),
    })


def test_a_gpu_that_is_not_there_is_missed_loudly(again):
    told = "!! CUDA_VISIBLE_DEVICES=97, but torch sees no GPU: this process runs on the CPU"
    assert told in again["sample other"].out and told not in again["sample"].out
    assert "torch sees no GPU" not in again["sample newest"].out, "-1 asks for none"


@pytest.mark.parametrize("mode", ["eval", "packed", "pack"])
def test_another_mode_gives_every_digit_again(again, whole, mode):
    ended = again[mode]
    assert ended.code == 0, ended.out
    assert len(ended.scores) == 3 and ended.scores == whole.scores
    assert ended.log.splitlines()[-1].startswith("verdict: legal")


def test_doctor_measures_steps_and_keeps_nothing(lab):
    ended = lab.run("doctor", lab.small(MODE="doctor", MAX_WALLCLOCK_SECONDS=0, NUM_LOOPS=8))  # slower on a busy machine too
    assert ended.code == 0, ended.out
    (event,) = [e for e in map(json.loads, (lab.root / "doctor").rglob("*.jsonl").__next__().read_text().splitlines())
                if e["event"] == "doctor"]
    seconds = event["seconds"]
    assert set(seconds) == {"False", "True"} and 0 < seconds["False"] < seconds["True"]
    # steps are a quarter as long until 35 % of the run, where recurrence begins, and half as long until 85 %
    assert event["steps"] == pytest.approx(600 * (4 * 0.35 / seconds["False"] + (2 * 0.5 + 0.15) / seconds["True"]))
    assert f"predicted: {event['steps']:.0f} steps in 600s" in ended.out
    mine = hashlib.sha256(Path(lab.data["TOKENIZER_PATH"]).read_bytes()).hexdigest()[:16]
    assert f"sha256 {mine}" in ended.out and "attention:" in ended.out and "validation: {" in ended.out
    assert not list((lab.root / "doctor").rglob("*.artifact")) and not list((lab.root / "doctor").rglob("*.ckpt"))


FAKE_TRACKER = """
import json, os
def init(project, name, config):
    write(["init", name, config["seed"]])
def log(values, step):
    write(["log", sorted(values)])
def finish():
    write(["finish"])
def write(row):
    with open(os.environ["TRACKED"], "a") as file:
        file.write(json.dumps(row) + "\\n")
"""


def test_bench_times_every_part(lab):
    for run_id in ("bench", "again"):  # clocks are compared: what else runs here may come between two of them once
        ended = lab.run(run_id, lab.small(MODE="bench", RUN_ID=run_id, MAX_WALLCLOCK_SECONDS=0, NUM_LOOPS=8))
        assert ended.code == 0, ended.out
        told = json.loads(ended.path(".bench.json").read_text())
        if all(k["forward_ms"] < k["both_ms"] for k in told["kernels"]):
            break
    names = {k["name"].split(" (")[0].split(" ")[0] for k in told["kernels"]}
    assert names == {"attention", "head", "MLP", "GEMM"}
    for k in told["kernels"]:  # a floor is one: below a quarter of it something was not computed
        assert 0.25 * k["forward_floor_ms"] < k["forward_ms"] < k["both_ms"] < math.inf, k
    assert 0 < told["seconds_a_step"]["False"] < told["seconds_a_step"]["True"] and told["optimiser_ms"] > 0
    assert {"hessians", "quantise and pack", "pass full tok/s", "pass ttt tok/s"} <= set(told["later"])
    assert ended.out.count("model FLOP utilisation") == 2 and "of the measured product rate" in ended.out


def test_operations_of_a_step_are_counted(lab):
    """A product of a weight costs 6 a token; attention 14 a pair and channel; recurrence adds its visits."""
    import sys
    sys.path.insert(0, str(ROOT / "records"))
    import bench
    from toy import small, tg
    cfg = small(model_dim=64, num_heads=2, num_kv_heads=1, rope_dims=0)
    model = tg.GPT(cfg)
    cu = torch.tensor([0, 10, 10, 30])
    batch = tg.Batch(torch.zeros(30, dtype=torch.long), None, None, cu, 20)
    block = 64 * (64 + 2 * 32) + 64 * 64 + 2 * 64 * cfg.hidden_dim
    for looping, visits in ((False, 4), (True, 6)):
        expected = 6 * 30 * (visits * block + 64 * 64) + 14 * (10 ** 2 + 20 ** 2) / 2 * visits * 64
        assert bench.step_flops(model, cfg, [batch], looping) == expected


def test_a_tracker_gets_this_run_and_no_earlier_one(lab, whole, monkeypatch):
    """TRACK starts the follower of the run's own lines, also where an earlier run of the name wrote before it."""
    folder, told = lab.root / "tracker", lab.root / "tracked.txt"
    folder.mkdir()
    (folder / "wandb.py").write_text(FAKE_TRACKER)
    knobs = dict(MODE="eval", ARTIFACT=whole.path(".artifact"), TRACK="wandb", TRACKED=told, **ONE_PASS)
    for expected in (1, 2):
        assert lab.run("tracked", knobs, run_id="whole.eval", blocked=folder).code == 0
        for _ in range(100):  # the follower looks twice a second, and outlives the run for its last lines
            rows = [json.loads(line) for line in told.read_text().splitlines()] if told.is_file() else []
            if [r[0] for r in rows].count("finish") == expected:
                break
            time.sleep(0.1)
        assert [r[0] for r in rows].count("init") == [r[0] for r in rows].count("finish") == expected
        assert ["log", ["score/full/seconds", "score/full/val_bpb", "score/full/val_loss"]] in rows


def test_a_tracker_without_its_script_stops_the_run_before_it_costs(lab, again):
    ended = lab.run("untracked", lab.small(TRACK="wandb"), lab.root / "packed" / "golf.py")
    assert ended.code and "TRACK=wandb" in ended.out and "records" in ended.out


def test_pack_writes_an_artifact_of_its_own(again, whole):
    pack = again["pack"]
    assert pack.files == {f"logs/whole.pack{s}" for s in SUFFIXES if s != ".ckpt"}
    # only the manifest differs: it holds the config, and so MODE
    assert abs(pack.path(".artifact").stat().st_size - whole.path(".artifact").stat().st_size) < 100
    assert pack.path(".packed.py").read_bytes() == whole.path(".packed.py").read_bytes()


def test_eval_writes_no_artifact(again):
    assert again["eval"].files == {f"logs/whole.eval{s}" for s in (".txt", ".jsonl", ".score.json")}


def test_packed_program_logs_the_code_that_ran(again, whole):
    assert again["packed"].text.startswith(whole.path(".packed.py").read_text() + f"\n{RULER}\n")


def sampled(ended):
    """The text: the rest of the output, from the line that begins with the prompt."""
    assert ended.code == 0, ended.out
    return re.search(rf"^{PROMPT}.*", ended.out, re.M | re.S)[0]


def test_sample_continues_the_prompt(again):
    assert len(sampled(again["sample"]).strip()) > len(PROMPT) + 10


def test_sample_is_reproducible_by_seed(again):
    assert sampled(again["sample"]) == sampled(again["sample newest"]) != sampled(again["sample other"])


def test_config_needs_no_data_and_writes_nothing(again, whole):
    shown = again["config"]
    assert shown.code == 0, shown.out
    assert not shown.files
    assert f"* ITERATIONS={STEPS}\n" in shown.out and "  SEED=1337\n" in shown.out
    assert f"model_params:{whole.number('^model_params:([0-9]+)$'):.0f}\n" in shown.out
    assert "recipe:" + re.search(r"recipe:(\w+)", whole.log)[1] in shown.out


# ----------------------------------------------------------------------------------------------------------------------
# What cannot run stops, early, and says why
# ----------------------------------------------------------------------------------------------------------------------
def broken_shards(lab, name, change, manifest=True):
    """A data folder in which the bytes of the training shard went through `change`."""
    folder = lab.root / f"shards_{name}"
    shutil.copytree(lab.shards, folder)
    shard = folder / "fineweb_train_000000.bin"
    shard.write_bytes(change(shard.read_bytes()))
    if not manifest:  # shards of one's own come without it
        (folder / "manifest.json").unlink()
    return lab.small(DATA_PATH=folder)


def foreign_tokens(data):
    """A token in every block that the tokenizer does not have."""
    tokens = np.frombuffer(data[1024:], "<u2").copy()
    tokens[::SMALL["PACK_TOKENS"] // 2] = VOCAB
    return data[:1024] + tokens.tobytes()


def saved(lab, name, data):
    path = lab.root / name
    path.write_bytes(data)
    return path


SHARD = r"fineweb_train_000000\.bin.*python data/\w+\.py"
# name -> (knobs, what the message says)
REFUSED = {
    "knob that contradicts the artifact": (
        lambda lab, a, c: dict(MODE="eval", ARTIFACT=a, MODEL_DIM=64), r"MODEL_DIM=64.*whole\.artifact.*trained with 32"),
    "truncated artifact": (
        lambda lab, a, c: dict(MODE="eval", ARTIFACT=saved(lab, "cut.artifact", a.read_bytes()[:-100])),
        r"artifact: truncated or altered"),
    "foreign artifact": (lambda lab, a, c: dict(MODE="eval", ARTIFACT=c), r"artifact: not a file of this program"),
    "no artifact at all": (lambda lab, a, c: dict(MODE="eval"), r"no \*\.artifact in logs; train first"),
    "truncated checkpoint": (
        lambda lab, a, c: dict(MODE="pack", CHECKPOINT=saved(lab, "cut.ckpt", c.read_bytes()[:-5000])), r"cut\.ckpt"),
    "short training shard": (
        lambda lab, a, c: broken_shards(lab, "short", lambda b: b[:-2]), SHARD),
    "bad magic in a shard of one's own": (
        lambda lab, a, c: broken_shards(lab, "own", lambda b: b"\0\0\0\0" + b[4:], manifest=False), SHARD),
    "tokens of another tokenizer in a training shard": (
        lambda lab, a, c: broken_shards(lab, "tokens", foreign_tokens), r"shards_tokens.*VOCAB_SIZE=512"),
    "attention backend that needs a GPU": (
        lambda lab, a, c: lab.small(ATTN_BACKEND="triton"), r"ATTN_BACKEND=triton.*(not installed|needs a GPU)"),
    "coder that is not installed": (
        lambda lab, a, c: lab.small(COMPRESSOR="zstd", ITERATIONS=2), r"COMPRESSOR=zstd.*not installed"),
}


@pytest.fixture(scope="session")
def refused(lab, whole):
    blocked = lab.blocking("zstandard")
    artifact, checkpoint = whole.path(".artifact"), whole.path(".ckpt")

    def job(name, knobs):
        folder = "refused_" + name.replace(" ", "_").replace("'", "")
        return lambda: lab.run(folder, knobs, blocked=blocked if "coder" in name else None)
    return together({name: job(name, knobs(lab, artifact, checkpoint)) for name, (knobs, _) in REFUSED.items()})


@pytest.mark.parametrize("name", REFUSED)
def test_refused(refused, name):
    ended = refused[name]
    assert ended.code == 1, ended.out
    message = ended.out.strip().splitlines()[-1]
    assert re.search(REFUSED[name][1], message), ended.out
    assert "Traceback" not in ended.out, ended.out
    assert not STEP.search(ended.out), "it stops before training"
    assert not any(f.endswith((".artifact", ".part")) for f in ended.files)


def test_eval_knobs_are_judged_with_the_artifacts_own(again):
    """Alone, a window of 48 contradicts the default preset's stride; with the artifact's stride of 32 it does not."""
    assert again["window"].code == 0, again["window"].out


# ----------------------------------------------------------------------------------------------------------------------
# Seeds, ranks, schedules
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def repeats(lab):
    fixed = lab.small(DETERMINISTIC=1, ITERATIONS=6)
    late = lab.small(SEED=7, ITERATIONS=2, ENABLE_LOOPING_AT=0.9, **ONE_PASS)
    return together({"once": lambda: lab.run("once", fixed), "twice": lambda: lab.run("twice", fixed),
                     "other seed": lambda: lab.run("other_seed", late)})


def test_deterministic_reruns_are_bit_equal(repeats):
    once, twice = repeats["once"], repeats["twice"]
    assert once.code == twice.code == 0, once.out + twice.out
    assert len(once.losses) == 6 and once.losses == twice.losses
    assert [e["norm"] for e in once.event("train")] == [e["norm"] for e in twice.event("train")]
    assert len(once.scores) == 3 and once.scores == twice.scores


def test_another_seed_differs_from_the_first_step_on(repeats, whole):
    assert repeats["other seed"].code == 0, repeats["other seed"].out
    assert all(a != b for a, b in zip(repeats["other seed"].losses, whole.losses))


def test_schedules_that_never_fire_are_warned_about(repeats):
    ended = repeats["other seed"]  # two steps: progress never reaches ENABLE_LOOPING_AT=.9
    assert ended.event("schedules")[0]["never"] == ["looping", "batch_schedule"]
    assert any("never fired: looping, batch_schedule" in e["text"] for e in ended.event("warning"))
    assert re.search(r"^!! .*never fired: looping", ended.log, re.M)
    assert "looping never" in ended.log


@pytest.fixture(scope="session")
def pair(lab):
    """The whole run again, on two processes. Each gives its share of a step to the Hessians: the same tokens together."""
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    return lab.run("pair", lab.small(), *torchrun, lab.program, blocked=lab.witness())


def test_two_processes_train_alike(pair, whole):
    assert pair.code == 0, pair.out
    assert "world_size:2" in pair.log
    assert len(pair.losses) == STEPS
    assert max(abs(a - b) for a, b in zip(pair.losses, whole.losses)) < 1e-4


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted where Linux lists them")
def test_two_processes_leave_no_thread_of_their_group(pair, lab):
    """A thread of gloo's that outlives the interpreter aborts the process now and then, after a run that was right."""
    for rank in "01":
        names = (lab.witness() / f"rank{rank}").read_text().split("\n")
        assert names and not [n for n in names if "gloo" in n], names


def test_two_processes_score_alike(pair, whole):
    assert list(pair.scores) == list(whole.scores)
    for name, (loss, bpb) in pair.scores.items():
        assert abs(float(loss) - float(whole.scores[name][0])) < 1e-3
        assert abs(float(bpb) - float(whole.scores[name][1])) < 1e-3


def test_only_rank_0_writes_and_speaks(pair):
    assert pair.files == {f"logs/pair{s}" for s in SUFFIXES}
    assert [int(s) for s, *_ in STEP.findall(pair.out)] == list(range(1, STEPS + 1))
    assert pair.log.count("verdict: ") == pair.out.count("verdict: ") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Ends that nobody planned
# ----------------------------------------------------------------------------------------------------------------------
def weights_of(path):
    """The tensors of a checkpoint, proved to be finite."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    assert stored["weights"] and all(t.isfinite().all() for t in stored["weights"].values())
    return stored


def check_whole(ended):
    """Every file under its final name is a whole one. Files named .part may be anything."""
    for name in ended.files:
        path, suffix = ended.folder / name, "".join(Path(name).suffixes)
        data = path.read_bytes()
        if suffix == ".ckpt":
            weights_of(path)
        elif suffix == ".artifact":
            assert data[:8] == b"PGOLF\x00\x01\n" and hashlib.sha256(data[40:]).digest() == data[8:40]
        elif suffix == ".packed.py":
            compile(data, name, "exec")
        elif suffix == ".score.json":
            json.loads(data)
        elif suffix == ".jsonl":
            [json.loads(line) for line in data.decode().split("\n")[:-1]]  # what stands after the last break is a stump
        else:
            assert suffix == ".txt" or suffix.endswith(".part"), name


def stopped(lab, name, number, knobs, line, delay=0.0):
    """A run that got a signal `delay` seconds after it printed a line that begins with `line`; how long it still took."""
    live = lab.start(name, lab.small(**knobs))
    live.wait_for(line)
    time.sleep(delay)
    sent = time.monotonic()
    live.send(number)
    ended = live.end()
    ended.took, ended.delay = time.monotonic() - sent, delay
    return ended


def killed(lab, name, knobs, line, most):
    """SIGKILL at a random moment of the `most` seconds after `line`."""
    return stopped(lab, name, signal.SIGKILL, knobs, line, random.uniform(0, most))


@pytest.fixture(scope="session")
def accidents(lab):
    short, often = dict(ITERATIONS=2), dict(CHECKPOINT_SECONDS=1e-6)  # often: after every step
    return together({
        "SIGTERM": lambda: stopped(lab, "term", signal.SIGTERM, FOREVER, "step:3/"),
        "SIGINT": lambda: stopped(lab, "int", signal.SIGINT, FOREVER, "step:3/"),
        # the three places where files are being written: checkpoints, packing, the artifact itself
        "training": lambda: killed(lab, "kill_training", FOREVER | often, "step:2/", 0.6),
        "packing": lambda: killed(lab, "kill_packing", short | often, "gptq:calibrated", 1.3),
        "writing": lambda: killed(lab, "kill_writing", short | often, "Total submission size", 0.02),
        # a learning rate at which weights overflow after a few steps
        "explosion": lambda: lab.run("exploded", lab.small(MATRIX_LR=1e6, **often)),
    })


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_ends_training_in_good_order(accidents, name):
    ended, number = accidents[name], getattr(signal, name)
    assert ended.code in (128 + number, -number), ended.out
    assert ended.took < 10
    told = {"SIGTERM": "SIGTERM", "SIGINT": "KeyboardInterrupt: "}[name]
    assert re.search(rf"^interrupted: {told}$", ended.log, re.M) and "verdict" not in ended.log
    assert ended.files == {f"logs/{ended.run_id}{s}" for s in (".txt", ".jsonl", ".ckpt")}
    assert ended.events and weights_of(ended.path(".ckpt"))["config"]["run_id"] == ended.run_id


@pytest.mark.parametrize("name", ["training", "packing", "writing"])
def test_sigkill_leaves_whole_files(accidents, name):
    ended = accidents[name]
    assert ended.code in (-signal.SIGKILL, 0), ended.out  # 0: the run was faster
    assert f"logs/{ended.run_id}.ckpt" in ended.files, f"killed after {ended.delay:.3f}s"
    check_whole(ended)


@pytest.fixture(scope="session")
def exploded(accidents):
    return accidents["explosion"]


def test_explosion_stops_the_run(exploded):
    assert exploded.code == 1, exploded.out
    report = re.search(r"^interrupted: Diverged: step (\d+): loss (\S+) .*gradient norm (\S+);.*$", exploded.log, re.M)
    assert report, exploded.out
    for group in ("matrix", "embed", "scalar"):
        assert f"{group} weights" in report[0]
    assert re.search(r"^last good checkpoint: logs/exploded\.ckpt$", exploded.log, re.M)
    assert not any(f.endswith((".artifact", ".part")) for f in exploded.files)
    assert "verdict" not in exploded.log


def test_explosion_names_the_gradients_of_each_group(exploded):
    report = re.search(r"^interrupted: Diverged.*$", exploded.log, re.M)[0]
    for group in ("matrix", "embed", "scalar"):
        assert f"{group} gradient" in report, report


def diverged_at(ended):
    return int(re.search(r"Diverged: step (\d+):", ended.log)[1])


def test_explosion_counts_steps_as_the_step_lines_do(exploded):
    """The step that is named is the one whose line is missing."""
    assert diverged_at(exploded) == int(STEP.findall(exploded.log)[-1][0]) + 1


def test_checkpoint_after_an_explosion_is_finite(exploded):
    weights_of(exploded.path(".ckpt"))


def test_checkpoint_after_an_explosion_is_a_good_one(exploded):
    """It holds no weights whose own loss was never seen, or seen to be bad: finite is not enough."""
    good = len(STEP.findall(exploded.log))  # steps that went well; the weights after the last of them are the bad ones
    assert weights_of(exploded.path(".ckpt"))["step"] < good


# ----------------------------------------------------------------------------------------------------------------------
# Budgets of time and bytes
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def budgets(lab, whole):
    artifact, checkpoint = whole.path(".artifact"), whole.path(".ckpt")
    model, code = (whole.path(s).stat().st_size for s in (".artifact", ".packed.py"))
    score, pack = dict(MODE="eval", ARTIFACT=artifact, **ONE_PASS), dict(MODE="pack", CHECKPOINT=checkpoint, **ONE_PASS)
    tight, none = code + int(0.85 * model), code // 2
    return together({
        "eval": lambda: lab.run("over", dict(score, EVAL_WALLCLOCK_SECONDS=0.001, ARTIFACT_MAX_BYTES=model + code - 1),
                                run_id="whole.eval"),
        "tight": lambda: lab.run("tight", dict(pack, ARTIFACT_MAX_BYTES=tight), run_id="whole.pack"),
        "none": lambda: lab.run("none", dict(pack, ARTIFACT_MAX_BYTES=none), run_id="whole.pack"),
        # whole steps from half of it on: a step of a busy machine may take more than the last 15 %
        "timed": lambda: lab.run("timed", lab.small(MAX_WALLCLOCK_SECONDS=2, ITERATIONS=20000, TRAIN_BATCH_SCHEDULE="0.5:0.5", **ONE_PASS)),
    })


def assert_failed(ended, what):
    """Exit 1, and log, events and score file all say what went wrong."""
    assert ended.code == 1, ended.out
    assert re.search(rf"^verdict: FAILED: .*{what}", ended.log.splitlines()[-1]), ended.log.splitlines()[-1]
    assert re.search(rf"^!! FAILED: .*{what}", ended.log, re.M)
    failures = json.loads(ended.path(".score.json").read_text(), parse_constant=pytest.fail)["failures"]
    assert any(re.search(what, f) for f in failures)


def test_slow_evaluation_is_a_failure(budgets):
    assert_failed(budgets["eval"], "eval budget overrun")


def test_oversized_artifact_is_a_failure_in_eval_too(budgets):
    """The verdict of MODE=eval speaks of bytes as well, so they must have been counted."""
    assert_failed(budgets["eval"], r"\d+ bytes > \d+")


def test_cap_that_can_be_reached_is_reached_by_coarser_steps(budgets, whole):
    ended = budgets["tight"]
    assert ended.code == 0, ended.out
    size = ended.event("size")[0]
    on_disk = sum(ended.path(s).stat().st_size for s in (".artifact", ".packed.py"))
    cap = whole.path(".packed.py").stat().st_size + int(0.85 * whole.path(".artifact").stat().st_size)
    assert on_disk == size["total"] <= cap
    assert on_disk > 0.97 * cap, "no more is given up than needed"
    before = whole.event("size")[0]["coarser"]  # under a cap that nothing reaches steps become as fine as they may
    assert before < size["coarser"] < 10 * before and re.search(rf"^fit: steps x{size['coarser']:.4f}, about", ended.log, re.M)
    assert float(ended.scores["roundtrip"][1]) < float(whole.scores["roundtrip"][1]) + 0.1


def test_cap_that_cannot_be_reached_is_a_failure(budgets):
    assert_failed(budgets["none"], "artifact does not fit")


def test_artifact_that_does_not_fit_still_has_a_score(budgets):
    """Steps coarsened without end overflow fp16, and then every weight is NaN."""
    assert "roundtrip" in budgets["none"].scores, re.findall("^final_.*", budgets["none"].log, re.M)


def test_wallclock_ends_training(budgets):
    ended = budgets["timed"]
    assert re.search(r"^stopping_early: wallclock_cap train_time:\d+ms step:\d+/20000$", ended.log, re.M), ended.out
    used = ended.number(r"^budget train: ([\d.]+)s of 2s")
    assert used < 4, "stopped near the budget even on a busy machine"
    # progress follows the clock, so every schedule ran to its end within the two seconds
    assert ended.event("schedules")[0]["never"] == []
    if used <= 2:
        assert ended.code == 0, ended.out
    else:
        assert_failed(ended, "train budget overrun")


# ----------------------------------------------------------------------------------------------------------------------
# Import: what is optional is optional
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def probe(first):
    ended = first["probe"]
    assert ended.code == 0, ended.out
    assert not ended.files, "an import writes nothing"
    return json.loads(ended.out)


def test_import_without_anything_optional(probe):
    optional = ("cuda", "brotli", "zstd")
    assert {k: probe["have"][k] for k in optional} == dict.fromkeys(optional, False)
    assert probe["codecs"] == ["zlib", "lzma"]


def test_a_seed_is_an_order_of_blocks_and_an_init(probe):
    one, two, again = probe["seeds"]
    assert one == again
    assert one["order"] != two["order"] and sorted(one["order"]) == sorted(two["order"])
    assert one["init"] != two["init"]


def test_checkpoint_is_a_snapshot(probe):
    """It is written while training goes on, and holds the weights of one moment all the same, on a CPU as on a GPU."""
    assert probe["snapshot"] == [1.0] * 4
