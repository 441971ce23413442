"""records/sweep.py: what a spec means, and that a sweep killed at any moment runs nothing twice and loses nothing.

The program here is a stand-in that writes the events that the tools read, and counts how often it was started and how
often it came to its end; the tutorial's test sweeps the real one.
"""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, trainer
from records_lab import RECORDS, environment

import sweep

PROGRAM = '''
import json, os, pathlib, sys, time
env = os.environ
name, folder = env["RUN_ID"], pathlib.Path(env["ARTIFACT_DIR"])
def told(file):
    with open(file, "a") as f:
        f.write(name + "\\n")
told("starts.txt")
with open(folder / f"{name}.jsonl", "a", buffering=1) as log:
    def event(kind, **fields):
        log.write(json.dumps({"event": kind, "t": 0, **fields}) + "\\n")
    event("config", recipe=env.get("GAIN", "0"), source="0", world=1, seed=int(env["SEED"]), train_batch_tokens=64)
    event("validation", documents=3, tokens=100, bytes=200, sha256="f")
    for step in range(1, 6):
        time.sleep(float(env.get("PACE", "0.02")))
        event("train", step=step, loss=5.0 - 0.1 * step, norm=1.0, seconds=0.1 * step)
    if env.get("FAIL"):
        print("what went wrong"), sys.exit(3)
    score = {"val_bpb": 2.0 - float(env.get("GAIN", "0")) + 0.1 * int(env["SEED"]) ** 2, "val_loss": 3.0, "seconds": 1.0, "verdict": ""}
    event("score", name="full", **score)
    event("size", total=1000, model=900, coarser=1.0, code=100)
    event("spans", wall=1.0, train=0.5)
    told("ends.txt")
    event("result", run=name, results={"full": score}, bytes_total=1000, failures=[], seed=int(env["SEED"]), recipe="0")
'''

SPEC = '''
name = "kill"
seeds = [1, 2, 3]
[base]
PACE = 0.06
[settings.better]
GAIN = 0.05
[settings.worse]
GAIN = -0.01
'''


@pytest.fixture
def place(tmp_path):
    """A checkout with the stand-in program and a spec."""
    (tmp_path / "train_gpt.py").write_text(PROGRAM)
    (tmp_path / "spec.toml").write_text(SPEC)
    return tmp_path


def command(place, *more):
    return [sys.executable, str(RECORDS / "sweep.py"), str(place / "spec.toml"), "--root", str(place), "--out", str(place / "out"), *more]


def start(place, *more):
    return subprocess.Popen(command(place, *more), cwd=place, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(place, *more):
    return subprocess.run(command(place, *more), cwd=place, env=environment(), text=True, capture_output=True, timeout=120)


def told(place, file):
    path = place / file
    return Counter(path.read_text().split()) if path.exists() else Counter()


def results(place, name="kill"):
    return {r["setting"]: r for r in json.loads((place / "out" / name / "results.json").read_text())}


IDS = {f"{s}.s{i}" for s in ("control", "better", "worse") for i in (1, 2, 3)}


# ----------------------------------------------------------------------------------------------------------------------
# Specs
# ----------------------------------------------------------------------------------------------------------------------
def spec_of(tmp_path, text):
    (tmp_path / "s.toml").write_text(text)
    return sweep.read_spec(tmp_path / "s.toml")


def test_settings_change_the_base(tmp_path):
    spec = spec_of(tmp_path, 'seeds=[5, 6]\n[base]\nA=1\nB="x"\n[settings.one]\nB="y"\n[settings.two]\nTTT_ENABLED=false\n')
    assert spec.name == "s" and spec.settings == {
        "control": {"A": "1", "B": "x"}, "one": {"A": "1", "B": "y"}, "two": {"A": "1", "B": "x", "TTT_ENABLED": "0"}}
    # whole pairs first
    assert [j.id for j in spec.jobs] == ["control.s5", "one.s5", "two.s5", "control.s6", "one.s6", "two.s6"]


@pytest.mark.parametrize("path", sorted((RECORDS / "examples").glob("*.toml")), ids=lambda p: p.stem)
def test_every_example_holds_knobs_that_the_program_has(path):
    """A removed knob would stop a sweep on its first rented minute; and each setting changes something of the control."""
    tg = trainer()
    spec = sweep.read_spec(path)
    configs = {}
    for name, knobs in spec.settings.items():
        told = {**spec.settings[sweep.CONTROL], **knobs}
        configs[name] = tg.load_config({k: v for k, v in told.items() if k != "MODE"}, cuda=True)
    control = configs.pop(sweep.CONTROL)
    assert all(c != control for c in configs.values()), configs


def test_grid_is_all_combinations_and_its_first_is_the_control(tmp_path):
    spec = spec_of(tmp_path, "seeds=[1]\n[base]\nC=3\n[grid]\nA=[1, 2]\nB=[0.1, 0.2]\n")
    assert spec.settings == {"control": {"C": "3", "A": "1", "B": "0.1"}, "B=0.2": {"C": "3", "A": "1", "B": "0.2"},
                             "A=2": {"C": "3", "A": "2", "B": "0.1"}, "A=2,B=0.2": {"C": "3", "A": "2", "B": "0.2"}}


@pytest.mark.parametrize("text, words", [
    ("seeds=[1, 1]\n[grid]\nA=[1, 2]", "different whole numbers"), ("seed=[1]\n[grid]\nA=[1, 2]", "seed means nothing here"),
    ("seeds=[1]\n[base]\nMODE='eval'", "MODE is a setting's"), ("seeds=[1]\n[settings.x]\nMODE='train'", "it can be eval or pack"),
    ("seeds=[1]\n[settings.x]\nARTIFACT='y'", "the sweep's own"), ("seeds=[1]\n[settings.'a/b']\nA=1", "no / in the names"), ("seeds=[1]\n[grid]\nSEED=[1, 2]", "the sweep's own"), ("seeds=[", "s.toml")])
def test_wrong_specs_are_refused(tmp_path, text, words):
    with pytest.raises(sweep.Refused, match=words):
        spec_of(tmp_path, text)


@pytest.mark.parametrize("visible, per_run, expected", [
    ("0,1,2,3", 1, ["0", "1", "2", "3"]), ("4,5,6,7", 2, ["4,5", "6,7"]), ("0,1,2", 2, ["0,1"])])
def test_one_place_a_gpu_or_a_group_of_them(monkeypatch, visible, per_run, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert sweep.slots(1, per_run) == [{"CUDA_VISIBLE_DEVICES": g} for g in expected]


def test_places_without_a_gpu_share_the_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert sweep.slots(3, 1) == [{"OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(sweep.Refused, match="2 GPUs a run, but 1 here"):
        sweep.slots(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------------------
def test_whole_sweep(place):
    done = run(place, "--slots", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert told(place, "starts.txt") == told(place, "ends.txt") == Counter(IDS)
    rows = results(place)
    assert rows["better"]["paired"]["mean"] == pytest.approx(-0.05) and rows["worse"]["paired"]["mean"] == pytest.approx(0.01)
    # seeds differ widely, and pairing takes that out: the interval is a point here
    assert rows["better"]["sd"] > 0.3 and rows["better"]["paired"]["high"] == pytest.approx(-0.05)
    folder = place / "out" / "kill"
    assert "| better | 3 | 2.416667 |" in (folder / "results.md").read_text() and (folder / "sweep.png").stat().st_size > 5000
    assert "min left" in done.stdout


def test_a_run_without_the_pass_that_it_was_asked_for_is_not_counted(place):
    """No other score stands in for it: the table has one run less, and says which."""
    asked = PROGRAM.replace('train_batch_tokens=64)', 'train_batch_tokens=64, ttt_enabled=name == "better.s2")')
    (place / "train_gpt.py").write_text(asked)
    done = run(place, "--slots", "3")
    rows = results(place)
    assert done.returncode == 1 and rows["better"]["n"] == rows["better"]["paired"]["n"] == 2, done.stdout + done.stderr
    words = "Not counted: better.s2: undecided which score is the result (--mode names one); it has full 2.35000000."
    assert words in (place / "out/kill/results.md").read_text() and "better.s2 undecided: full 2.35" in done.stdout
    # a named pass decides
    assert run(place, "--mode", "full").returncode == 0 and results(place)["better"]["n"] == 3


def test_settings_with_another_pass_say_so(place):
    named = PROGRAM.replace('event("score", name="full"', 'event("score", name=env.get("PASS", "full")')
    (place / "train_gpt.py").write_text(named)
    (place / "spec.toml").write_text(SPEC + 'PASS = "sliding"\n')
    done = run(place, "--slots", "3")
    assert "| worse (pass sliding) | 3 |" in done.stdout, done.stdout + done.stderr
    assert "| control (pass full) | 3 |" in done.stdout
    assert "reports: full, sliding." in done.stdout


def test_documents_give_a_second_interval(place):
    """Runs with DOC_LOSSES=1 leave their losses by document; the table then has a column for them."""
    saved = PROGRAM.replace('told("ends.txt")', """told("ends.txt")
    import numpy as np
    size = np.arange(100, 300)
    np.savez(folder / f"{name}.full.docs.npz", nats=(0.7 - 0.1 * float(env.get("GAIN", "0"))) * size + np.cos(size), tokens=size, bytes=size)
    """.strip())
    (place / "train_gpt.py").write_text(saved)
    done = run(place, "--slots", "3")
    assert done.returncode == 0 and "95 % over documents" in done.stdout, done.stdout + done.stderr
    found = results(place)["better"]["documents"]
    assert found["n"] == 200 and found["low"] <= found["mean"] <= found["high"] and found["mean"] == pytest.approx(-0.005 / math.log(2))
    assert results(place)["control"]["documents"] is None


def test_seeds_of_one_recipe(place):
    """What a record needs: no other setting, so a table of one row and no picture."""
    (place / "spec.toml").write_text('name = "record"\nseeds = [1, 2, 3]\n[base]\nPACE = 0.01\n')
    done = run(place, "--slots", "3")
    assert done.returncode == 0 and results(place, "record")["control"]["n"] == 3, done.stdout + done.stderr
    assert not (place / "out/record/sweep.png").exists()


def test_starting_again_runs_nothing(place):
    run(place, "--slots", "3")
    again = run(place)
    assert again.returncode == 0 and told(place, "starts.txt") == Counter(IDS) and "9 of 9 are there, 0 to run" in again.stdout


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", ["sweep killed", "sweep and runs killed", "sweep told to end"])
def test_killed_at_a_random_moment(place, how, seed):
    """Twice killed, then left alone: every run comes to its end exactly once, and no finished one starts again."""
    rng = random.Random(f"{how}{seed}")
    for _ in range(2):
        live = start(place, "--slots", "2")
        time.sleep(rng.uniform(0.2, 2.0))
        if how == "sweep told to end":
            live.send_signal(signal.SIGTERM)
            live.wait(20)
        else:
            live.kill()
            live.wait()
            if how == "sweep and runs killed":
                kill_runs(place)
    last = run(place, "--slots", "2")
    assert last.returncode == 0, last.stdout + last.stderr
    starts, ends = told(place, "starts.txt"), told(place, "ends.txt")
    assert ends == Counter(IDS), "no run ended twice, and none is missing"
    assert set(results(place)) == {"control", "better", "worse"} and all(r["n"] == 3 for r in results(place).values())
    if how == "sweep killed":
        assert starts == Counter(IDS), "runs outlive their sweep and are adopted, so none starts twice"
    # two places, killed twice: no more than four runs can have been cut off
    assert sum(starts.values()) <= len(IDS) + 4


def kill_runs(place):
    """SIGKILL what the sweep had started: processes whose program lies in this place."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(place / "out") in (entry / "cmdline").read_text():
                    os.kill(int(entry.name), signal.SIGKILL)
            except (OSError, ProcessLookupError):
                continue


def test_what_was_cut_off_is_set_aside(place):
    live = start(place)
    while not told(place, "starts.txt")["control.s1"]:
        time.sleep(0.02)
    live.send_signal(signal.SIGTERM)
    assert live.wait(20) == 128 + signal.SIGTERM
    assert not told(place, "ends.txt")
    run(place, "--slots", "3")
    assert told(place, "starts.txt")["control.s1"] == 2 and told(place, "ends.txt")["control.s1"] == 1
    assert (place / "out/kill/failed/control.s1.1/control.s1.jsonl").is_file(), "the first attempt's log is kept"
    assert (place / "out/kill/logs/control.s1.jsonl").read_text().count('"config"') == 1


def test_groups_of_gpus_run_under_torchrun(place):
    """Two ranks a run, on GPUs of its own, and only rank 0 writes. No GPU is needed: the stand-in only says what it sees."""
    ranks = "import os, sys\nwith open('ranks.txt', 'a') as f:\n    f.write(f\"{os.environ['RUN_ID']}:{os.environ['RANK']}/" \
            "{os.environ['WORLD_SIZE']}@{os.environ['CUDA_VISIBLE_DEVICES']}\\n\")\nif os.environ['RANK'] != '0':\n    sys.exit()\n"
    (place / "train_gpt.py").write_text(ranks + PROGRAM)
    (place / "spec.toml").write_text(SPEC.replace("[1, 2, 3]", "[1]"))
    done = subprocess.run(command(place, "--gpus-per-run", "2"), cwd=place, text=True, capture_output=True, timeout=120,
                          env=environment(CUDA_VISIBLE_DEVICES="4,5,6,7"))
    assert done.returncode == 0 and "2 at a time" in done.stdout, done.stdout + done.stderr
    seen = told(place, "ranks.txt")
    for run_id in ("control.s1", "better.s1", "worse.s1"):
        mine = sorted(x.partition(":")[2] for x in seen if x.startswith(run_id))
        assert mine in (["0/2@4,5", "1/2@4,5"], ["0/2@6,7", "1/2@6,7"])
    assert {x.partition("@")[2] for x in seen} == {"4,5", "6,7"}


def test_two_sweeps_do_not_share_a_folder(place):
    live = start(place)
    while not told(place, "starts.txt"):
        time.sleep(0.02)
    assert "another sweep is at work there" in run(place).stderr
    live.send_signal(signal.SIGTERM)
    live.wait(20)


def test_failures_are_kept_and_not_repeated(place):
    with open(place / "spec.toml", "a") as spec:
        spec.write("[settings.bad]\nFAIL = 1\n")
    done = run(place, "--slots", "3")
    assert done.returncode == 1 and results(place)["bad"]["failed"] == 3 and results(place)["bad"]["n"] == 0
    kept = json.loads((place / "out/kill/failed/bad.s1.json").read_text())
    assert kept["status"] == 3 and kept["last"] == ["what went wrong"]
    assert "what went wrong" in (place / "out/kill/results.md").read_text() and "FAILED (exit status 3)" in done.stdout
    run(place)
    assert told(place, "starts.txt")["bad.s1"] == 1
    run(place, "--retry", "--slots", "3")
    assert told(place, "starts.txt")["bad.s1"] == 2 and told(place, "starts.txt")["control.s1"] == 1


LATER = '''
[settings.no_tilt]
MODE = "eval"
GAIN = -0.02
[settings.rounded]
MODE = "pack"
GAIN = -0.03
'''
# the stand-in leaves an artifact and a checkpoint; without training it must find those of the control, of its own seed
LEAVES = PROGRAM.replace('told("starts.txt")', """told("starts.txt")
mode = env.get("MODE", "train")
if mode == "train":
    for suffix in ("artifact", "ckpt"):
        (folder / f"{name}.{suffix}").write_text(env["SEED"])
else:
    assert pathlib.Path(env["ARTIFACT" if mode == "eval" else "CHECKPOINT"]).read_text() == env["SEED"] and "PACE" not in env
""".strip())


def test_settings_of_evaluation_wait_for_the_control_and_use_its_files(place):
    (place / "train_gpt.py").write_text(LEAVES)
    with open(place / "spec.toml", "a") as spec:
        spec.write(LATER)
    done = run(place, "--slots", "3")
    rows = results(place)
    assert done.returncode == 0 and sum(told(place, "ends.txt").values()) == 15, done.stdout + done.stderr
    assert rows["no_tilt"]["paired"]["mean"] == pytest.approx(0.02) and rows["rounded"]["paired"]["mean"] == pytest.approx(0.03)
    order = (place / "ends.txt").read_text().split()
    assert all(order.index(f"control.s{seed}") < order.index(f"{s}.s{seed}") for seed in (1, 2, 3) for s in ("no_tilt", "rounded"))


def test_settings_of_evaluation_do_not_run_without_their_control(place):
    (place / "train_gpt.py").write_text(LEAVES.replace('if env.get("FAIL"):', 'if name == "control.s2":'))
    with open(place / "spec.toml", "a") as spec:
        spec.write(LATER)
    done = run(place, "--slots", "2")
    assert done.returncode == 1 and "their control failed: no_tilt.s2, rounded.s2" in done.stdout, done.stdout + done.stderr
    assert told(place, "starts.txt")["no_tilt.s2"] == 0 and results(place)["no_tilt"]["n"] == 2


def test_settings_of_evaluation_cannot_change_training(tmp_path):
    """With the real program's knobs: what comes before the quantiser's in its tables is read by training alone."""
    (tmp_path / "train_gpt.py").write_text((ROOT / "train_gpt.py").read_text())
    for mode, knob, words in (("eval", "MATRIX_LR", "MODE=eval does not read MATRIX_LR"), ("eval", "STEP_RULE", "does not read STEP_RULE"),
                              ("pack", "MLP_MULT", "MODE=pack does not read MLP_MULT"), ("pack", "STEP_RULE", ""), ("eval", "TTT_LORA_RANK", "")):
        spec = spec_of(tmp_path, f'name="{mode}{knob}"\nseeds=[1]\n[settings.x]\nMODE="{mode}"\n{knob}=1\n')
        if not words:
            sweep.Sweep(spec, tmp_path / "out", tmp_path, [{}], 1, False)
            continue
        with pytest.raises(sweep.Refused, match=words):
            sweep.Sweep(spec, tmp_path / "out", tmp_path, [{}], 1, False)


def test_what_is_no_knob_is_told_before_the_first_run(tmp_path):
    (tmp_path / "train_gpt.py").write_text((ROOT / "train_gpt.py").read_text())
    said = []
    spec = spec_of(tmp_path, 'name="s"\nseeds=[1]\n[base]\nNCCL_DEBUG="INFO"\n[settings.x]\nATTN_GATEE="none"\n[settings.y]\nATTN_GATE="none"\n')
    sweep.Sweep(spec, tmp_path / "out", tmp_path, [{}], 1, False, said.append)
    assert said == ["no knob of the program, passed on as it is: ATTN_GATEE, NCCL_DEBUG"]


def test_a_run_that_says_it_broke_a_rule_is_done_and_shown(place):
    (place / "train_gpt.py").write_text(PROGRAM.replace("failures=[]", 'failures=["eval budget overrun"]'))
    done = run(place, "--slots", "3")
    assert "!! eval budget overrun" in done.stdout and done.returncode == 0


def test_finished_runs_refuse_another_spec(place):
    run(place, "--slots", "3")
    (place / "spec.toml").write_text(SPEC.replace("GAIN = 0.05", "GAIN = 0.06"))
    assert "better.s1 was run with other knobs" in run(place).stderr
    # more seeds are only more runs
    (place / "spec.toml").write_text(SPEC.replace("[1, 2, 3]", "[1, 2, 3, 4]"))
    assert run(place, "--slots", "3").returncode == 0 and sum(told(place, "starts.txt").values()) == 12


def test_the_program_is_copied_at_the_start(place):
    run(place, "--slots", "3")
    (place / "train_gpt.py").write_text("raise SystemExit('edited')\n")
    (place / "spec.toml").write_text(SPEC.replace("[1, 2, 3]", "[1, 2, 3, 4]"))
    done = run(place, "--slots", "3")
    assert done.returncode == 0 and "goes on with its own copy" in done.stdout


def test_knobs_of_the_shell_stay_outside(place):
    """Names that the program declares as knobs are taken out of the environment of its runs."""
    declared = "class RunKnobs:\n    gain: float = dict(0)\n"
    (place / "train_gpt.py").write_text(PROGRAM.replace("import json", declared.replace("dict(0)", "max(0, 0)") + "import json", 1))
    done = subprocess.run(command(place, "--slots", "3"), cwd=place, env=environment(GAIN="0.7"), text=True, capture_output=True)
    assert done.returncode == 0 and results(place)["control"]["mean"] == pytest.approx(2.0 + 0.1 * 14 / 3)


def test_knobs_of_the_command_line_go_in_place_of_the_base(place):
    done = run(place, "--slots", "3", "--base", "PACE=0.01", "GAIN=0.2")
    planned = json.loads((place / "out/kill/sweep.json").read_text())
    assert done.returncode == 0 and planned["control.s1"] == {"PACE": "0.01", "GAIN": "0.2"}, done.stdout + done.stderr
    assert planned["better.s1"] == {"PACE": "0.01", "GAIN": "0.05"}
    assert "'PACE' is not NAME=VALUE" in run(place, "--base", "PACE").stderr


def test_an_hour_on_a_gpu_takes_knobs_and_ends_in_time(tmp_path):
    """tests/gpu/hour.sh with a second's time: every step is cut off, and the sweep it would have run is the spec with these knobs."""
    stub = tmp_path / "bin" / "python3"  # says how it was called, and takes too long
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >> {tmp_path}/calls.txt\nsleep 30\n')
    stub.chmod(0o755)
    spec = tmp_path / "s.toml"
    spec.write_text('name = "late"\nseeds = [1]\n[base]\nDATA_PATH = "here"\nSEEDLESS = 1\n[settings.x]\nDATA_PATH = "own"\n')
    began = time.monotonic()
    done = subprocess.run([ROOT / "tests/gpu/hour.sh", "1", spec, tmp_path / "out", "DATA_PATH=/there", "TRAIN_SEQ_LEN=64"], text=True,
                          capture_output=True, env=environment(PATH=f"{stub.parent}:{os.environ['PATH']}"), timeout=60)
    assert time.monotonic() - began < 20 and "sweep ended" in done.stdout, done.stdout + done.stderr
    *_, last = calls = [line.split() for line in (tmp_path / "calls.txt").read_text().splitlines()]
    assert [c[0] for c in calls] == ["-m", "tests/gpu/tiles.py", "records/sweep.py"]
    given = sweep.options().parse_args(last[1:])
    made = sweep.read_spec(given.spec, dict(given.base))
    base = {"DATA_PATH": "/there", "SEEDLESS": "1", "TRAIN_SEQ_LEN": "64"}
    assert made.name == "late" and made.settings == {"control": base, "x": base | {"DATA_PATH": "own"}}
