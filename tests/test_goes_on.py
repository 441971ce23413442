"""Death after training: what ten minutes of eight GPUs have made is not lost, and the log says how to go on.

A run is killed at five moments between the end of training and its verdict. By the command that stands last in its log
it goes on to the digits of a run that nobody disturbed. Adaptation that throws, and memory and disks that are full, are
the other accidents. Nothing is timed: the program's own functions are wrapped, and a wrapper strikes at a given call.
"""
import json
import re
import resource
import shlex
import subprocess
import sys
import threading
import time

import pytest
from conftest import config
from test_process import FINAL, SMALL, STEP, Ended, Lab, Live, environment, kill, together
from test_world import Seen, caught, last_launch, path_with_python

RUN = dict(DETERMINISTIC=1, ITERATIONS=4, VAL_DOCS=2, TRAIN_BATCH_SCHEDULE="")  # all three passes
GOES_ON = "goes on with: "
RESULT = re.compile(r"^val_bpb:(\d\.\d+)", re.M)

# The program with one of its functions wrapped. `program` and `plan` are the arguments; the program sees none.
WRAPPED = """
import importlib.util, os, pathlib, signal, sys
program, plan = sys.argv[1:]
sys.argv = [program]
spec = importlib.util.spec_from_file_location("train_gpt", program)
tg = importlib.util.module_from_spec(spec)
sys.modules["train_gpt"] = tg
spec.loader.exec_module(tg)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def fall(error):
    raise error

def packed():
    return any(pathlib.Path("logs").glob("*.artifact"))

def before(owner, name, strike, call=1, when=lambda *a, **k: True):
    \"\"\"`strike` in front of a function's call-th call (or every one, if call is None) for which `when` holds.\"\"\"
    work, calls = getattr(owner, name), [0]
    def wrapped(*a, **k):
        if when(*a, **k):
            calls[0] += 1
            if call in (None, calls[0]):
                strike()
        return work(*a, **k)
    setattr(owner, name, wrapped)

def behind(owner, name, strike, when):
    work = getattr(owner, name)
    def wrapped(*a, **k):
        out = work(*a, **k)
        if when(*a, **k):
            strike()
        return out
    setattr(owner, name, wrapped)

exec(plan)
sys.exit(tg.main())
"""

# moment -> what kills there
DEATHS = {
    # as soon as the log says how to go on: the checkpoint must be on disk by then
    "behind training": f"behind(tg.Run, 'log', die, lambda run, text, *a, **k: text.startswith({GOES_ON!r}))",
    "calibrating": "before(tg, 'collect_slopes', die)",
    # the whole file is written under another name, and is not there yet
    "packing": "before(os, 'replace', die, when=lambda a, b, **k: str(b).endswith('.artifact'))",
    "scoring": "before(tg.Scorer, 'score', die, when=lambda *a, **k: packed())",
    "adapting": "before(tg.DocumentScorer, 'step', die, call=3)",
}
FULL = "fall(OSError(28, 'No space left on device'))"
EMPTY = "fall(tg.torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has 23.55 GiB in all'))"
# what runs out of memory -> (plan, knobs that would help, as they are now)
NO_MEMORY = {
    "training": (f"before(tg, 'train_step', lambda: {EMPTY}, call=4)", {"MICRO_BATCH_TOKENS"}),
    "scoring": (f"before(tg.Scorer, 'score', lambda: {EMPTY}, when=lambda *a, **k: packed())", {"VAL_BATCH_TOKENS"}),
    "adaptation": (f"before(tg.DocumentScorer, 'step', lambda: {EMPTY}, call=3)",
                   {"TTT_SLOTS", "TTT_BATCH_TOKENS", "TTT_CHUNK_SIZE", "GLOBAL_TTT_CHUNK_TOKENS", "TTT_LORA_RANK"}),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("goes_on"))


def small(lab, **changes):
    return lab.small(**{**RUN, **changes})


def wrapped(lab, name, plan, run_id=None, **changes):
    """A run with a plan, in a folder of its own."""
    knobs = small(lab, **{"RUN_ID": run_id or name.replace(" ", "_"), **changes})
    command = [sys.executable, "-c", WRAPPED, str(lab.program), plan]
    return Live(lab.root / name.replace(" ", "_"), knobs["RUN_ID"], command, environment(knobs)).end()


def advice(log):
    """The commands that say how to go on."""
    return [line.removeprefix(GOES_ON) for line in log.splitlines() if line.startswith(GOES_ON)]


def go_on(lab, ended):
    """The log's last command, in the run's folder and in a shell that knows nothing of its knobs; None without one."""
    log = ended.path(".txt")
    commands = advice(last_launch(log)) if log.is_file() else []
    if not commands:
        return None
    return Live(ended.folder, "on", ["bash", "-c", commands[-1]], environment(dict(PATH=path_with_python(lab)))).end()


def killed(lab, moment):
    ended = wrapped(lab, moment, DEATHS[moment])
    return ended, go_on(lab, ended)


def with_full_log(lab):
    """A run whose log files cannot grow past the first lines behind the source."""
    most = len(lab.program.read_bytes()) + 6000
    folder, knobs, began = lab.root / "full_log", small(lab, RUN_ID="full_log"), time.monotonic()
    folder.mkdir()
    process = subprocess.Popen([sys.executable, str(lab.program)], cwd=folder, env=environment(knobs), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
    guard = threading.Timer(60, kill, [process.pid])
    guard.start()
    out = process.communicate()[0]
    guard.cancel()
    return Ended(folder, "full_log", process.returncode, out, time.monotonic() - began), most


@pytest.fixture(scope="module")
def runs(lab):
    """The undisturbed run, and all others."""
    jobs = {"whole": lambda: lab.run("undisturbed", small(lab))}
    jobs |= {moment: lambda moment=moment: killed(lab, moment) for moment in DEATHS}
    fallen = "before(tg.DocumentScorer, 'step', lambda: fall(RuntimeError('an adapter fell over')), call=3)"
    no_space = f"before(tg, 'write_atomic', lambda: {FULL}, None, lambda path, *a, **k: str(path).endswith('.ckpt'))"
    jobs |= {"exception": lambda: wrapped(lab, "exception", fallen),
             "full disk": lambda: wrapped(lab, "full disk", no_space, CHECKPOINT_SECONDS=1e-6),
             "full log": lambda: with_full_log(lab)}
    jobs |= {f"no memory for {what}": lambda what=what: wrapped(lab, f"no memory for {what}", NO_MEMORY[what][0])
             for what in NO_MEMORY}
    return Seen(together({name: lambda job=job: caught(job) for name, job in jobs.items()}))


@pytest.fixture(scope="module")
def whole(runs):
    """A run that nobody disturbed."""
    ended = runs["whole"]
    assert ended.code == 0 and len(ended.scores) == 3, ended.out
    return ended


# ----------------------------------------------------------------------------------------------------------------------
# Killed
# ----------------------------------------------------------------------------------------------------------------------
def test_an_undisturbed_run_says_twice_how_it_would_go_on(whole):
    commands = advice(whole.log)
    assert len(commands) >= 2, whole.log[-3000:]
    assert "MODE=eval" in commands[-1] and "MODE=eval" not in commands[0]
    lines = whole.log.splitlines()
    told = [i for i, line in enumerate(lines) if line.startswith(GOES_ON)]
    last_step = max(i for i, line in enumerate(lines) if STEP.match(line))
    size = next(i for i, line in enumerate(lines) if line.startswith("Total submission size"))
    first_score = next(i for i, line in enumerate(lines) if FINAL.match(line))
    assert last_step < told[0] < size and told[-1] < first_score, "each as soon as it is true"


@pytest.mark.parametrize("moment", DEATHS)
def test_a_killed_run_goes_on_to_the_same_score(runs, whole, moment):
    ended, on = runs[moment]
    assert ended.code == -9, f"it was not killed: {ended.out[-3000:]}"
    assert "verdict: " not in ended.out
    assert on is not None, "no word of how to go on:\n" + ended.out[-3000:]
    assert on.code == 0, on.out
    assert RESULT.findall(on.out) == RESULT.findall(whole.out) != []
    assert {name: digits for name, *digits in FINAL.findall(on.out)} == whole.scores
    assert re.search("^verdict: ", on.out, re.M)
    trained = len(STEP.findall(on.out))
    assert trained == 0, "it does not train again"


@pytest.mark.parametrize("moment", ["scoring", "adapting"])
def test_what_is_packed_is_not_packed_again(runs, moment):
    ended, on = runs[moment]
    commands = advice(last_launch(ended.path(".txt")))
    assert commands and "MODE=eval" in commands[-1], commands
    assert on is not None and "gptq:calibrated" not in on.out


# ----------------------------------------------------------------------------------------------------------------------
# An exception in adaptation
# ----------------------------------------------------------------------------------------------------------------------
def test_an_exception_in_adaptation_leaves_what_was_done(runs, whole):
    ended = runs["exception"]
    assert ended.code == 1, ended.out
    size, expected = (e.path(".artifact").stat().st_size for e in (ended, whole))
    assert abs(size - expected) < 100, "they differ in the name of the run"
    log = ended.log
    assert "an adapter fell over" in log and "Traceback (most recent call last)" in log, log[-3000:]
    assert "verdict: legal" not in log
    commands = advice(log)
    assert commands and "MODE=eval" in commands[-1], log[-3000:]
    score = json.loads(ended.path(".score.json").read_text())
    done = {"full": "roundtrip", "sliding": "sliding_window"}
    assert list(score["results"]) == list(done)
    for name, label in done.items():
        assert f"{score['results'][name]['val_bpb']:.8f}" == whole.scores[label][1]


# ----------------------------------------------------------------------------------------------------------------------
# Full disks
# ----------------------------------------------------------------------------------------------------------------------
def test_a_checkpoint_that_finds_no_space_does_not_end_training(runs, whole):
    ended = runs["full disk"]
    assert ended.code == 0, ended.out
    assert re.search(r"^!! .*(No space left|disk)", ended.log, re.M), "a warning"
    assert RESULT.findall(ended.out) == RESULT.findall(whole.out)
    for command in advice(ended.log):  # none that names a file which is not there
        named = dict(w.split("=", 1) for w in shlex.split(command) if re.match("(CHECKPOINT|ARTIFACT)=", w))
        assert all((ended.folder / f).is_file() for f in named.values()), command
        assert "MODE=pack" not in command or ended.path(".ckpt").is_file(), command


def test_a_log_that_finds_no_space_does_not_end_the_run(runs, whole):
    ended, most = runs["full log"]
    assert ended.code == 0, ended.out[-3000:]
    assert RESULT.findall(ended.out) == RESULT.findall(whole.out) and re.search("^verdict: ", ended.out, re.M)
    assert ended.path(".txt").stat().st_size <= most and "verdict: " not in ended.log, "it was full"
    assert "Traceback" not in ended.out, ended.out


# ----------------------------------------------------------------------------------------------------------------------
# Out of memory
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", NO_MEMORY)
def test_out_of_memory_is_answered_with_a_knob_and_a_value(runs, what):
    ended = runs[f"no memory for {what}"]
    assert ended.code == 1, ended.out
    assert "out of memory" in ended.log and "verdict: legal" not in ended.log
    told = ended.log.partition("not the record's default")[2].partition("\n")[2]  # behind the list of knobs
    advised = re.findall(rf"\b({'|'.join(NO_MEMORY[what][1])})=(\d+)", "\n".join(
        line for line in told.splitlines() if not line.startswith(GOES_ON)))
    assert advised, told[-3000:]
    before = config(**{**SMALL, **RUN})
    for name, value in advised:
        now = getattr(before, name.lower())
        assert 0 < int(value) and (not now or int(value) < now), f"{name} is {now}, {value} is no help"
        config(**{**SMALL, **RUN, name: value})  # a value that is allowed


def test_out_of_memory_after_training_says_how_to_go_on(runs):
    for what in ("scoring", "adaptation"):
        ended = runs[f"no memory for {what}"]
        commands = advice(ended.log)
        assert commands and "MODE=eval" in commands[-1], what
