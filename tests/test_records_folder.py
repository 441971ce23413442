"""records/make.py and records/check.py: a folder made from three real tiny runs passes, and each planted fault is found."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, trainer
from records_lab import RECORDS, environment, train, train_seeds, world

import check
import make
import runs

SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, corpus):
    """A checkout with three finished runs that had the contest's budgets."""
    folder = world(tmp_path_factory.mktemp("records") / "checkout", corpus)
    train_seeds(folder, SEEDS, MAX_WALLCLOCK_SECONDS=600)
    return folder


@pytest.fixture(scope="module")
def made(lab):
    """The folder that make.py makes of them, as its command line does."""
    command = [sys.executable, RECORDS / "make.py", "logs/toy1", "logs/toy2", "logs/toy3", "--name", "Toy gates", "--author", "Ada",
               "--github-id", "ada", "--date", "2026-01-02", "--root", ".", "--out", "records", "--artifacts",
               "--blurb", "Three tiny runs.", "--credits", "Builds on nobody."]
    done = subprocess.run(list(map(str, command)), cwd=lab, text=True, capture_output=True, env=environment(EVAL_STRIDE=7))
    assert done.returncode == 0, done.stdout + done.stderr
    return lab / "records" / "track_non_record_16mb" / "2026-01-02_Toy_gates"


@pytest.fixture
def copy(made, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / made.name))


def failing(folder: Path) -> set[str]:
    outcomes = check.check(folder)
    assert not [vars(o) for o in outcomes if o.text.startswith("could not be read")]
    return {o.name for o in outcomes if o.status == "FAIL"}


# ----------------------------------------------------------------------------------------------------------------------
# make
# ----------------------------------------------------------------------------------------------------------------------
def test_made_folder_passes(made):
    outcomes = {o.name: o for o in check.check(made)}
    assert not failing(made), [vars(o) for o in outcomes.values() if o.status == "FAIL"]
    assert {n for n, o in outcomes.items() if o.status == "undecided"} == {"disjoint"}
    assert {n for n, o in outcomes.items() if o.status == "n/a"} == {"margin", "hardware"}


def test_made_folder_holds_these_files(made):
    assert {f.name for f in made.iterdir()} == {"README.md", "submission.json", "train_gpt.py", "requirements.txt"} | {
        f"{stem}{s}{suffix}" for s in SEEDS for stem, suffix in (("train_seed", ".log"), ("train_seed", ".jsonl"), ("eval_seed", ".log"), ("seed", ".artifact"))}


def test_shipped_code_is_the_counted_file(made, lab):
    packed = (lab / "logs" / "toy1.packed.py").read_bytes()
    told = json.loads((made / "submission.json").read_text())
    assert (made / "train_gpt.py").read_bytes() == packed and told["bytes_code"] == len(packed)
    assert told["code_sha256"] == runs.sha256(packed)


def test_submission_is_the_logs_arithmetic(made, lab):
    told = json.loads((made / "submission.json").read_text())
    results = [json.loads((lab / "logs" / f"toy{s}.score.json").read_text()) for s in SEEDS]
    meant = [r["results"][r.get("headline", "ttt")]["val_bpb"] for r in results]
    assert told["val_bpb"] == pytest.approx(sum(meant) / 3, abs=1e-12) and told["headline"] == "ttt"
    assert told["val_bpb_std"] == pytest.approx((sum((b - sum(meant) / 3) ** 2 for b in meant) / 2) ** 0.5, abs=1e-12)
    assert told["seeds"] == list(SEEDS) and told["bytes_total"] == max(r["bytes_total"] for r in results)
    assert [told["seed_results"][str(s)]["val_bpb"] for s in SEEDS] == meant
    assert told["track"] == "non-record-16mb"
    assert all(v for k, v in told["compliance"].items() if k != "no_ngram_cache")
    assert told["config_diff"]["knobs"]["NUM_LAYERS"] == {"here": "3", "preset": "11"}


@pytest.mark.parametrize("knobs, expected", [
    ({}, True), ({"NGRAM_TILT_BOOST": 0.0, "MIXER": ""}, True), ({"NGRAM_TILT_BOOST": 2.6, "MIXER": ""}, False),
    ({"NGRAM_TILT_BOOST": 0.0, "MIXER": "ub"}, False), ({"NGRAM_TILT_BOOST": 2.6, "TTT_ENABLED": False}, True)])
def test_counts_of_tokens_are_not_denied(lab, knobs, expected):
    """An n-gram tilt or mixer in the adaptive pass is a cache in the contest's words; the flag says so."""
    run = runs.load(lab / "logs" / "toy1.jsonl")
    run.config = {k: v for k, v in run.config.items() if k not in ("NGRAM_TILT_BOOST", "MIXER")} | knobs
    assert make.compliance([run])["no_ngram_cache"] is expected


def test_shipped_file_was_run_without_the_shells_knobs(made):
    """EVAL_STRIDE=7 stood in the shell of make.py; the runs had 32."""
    for seed in SEEDS:
        again = runs.from_log(made / f"eval_seed{seed}.log")
        assert again.config["EVAL_STRIDE"] == "32" and again.config["MODE"] == "eval"
        assert again.source_sha == runs.sha256((made / "train_gpt.py").read_bytes())
        assert again.final.bpb == runs.from_log(made / f"train_seed{seed}.log").final.bpb


def test_readme_command_trains_the_same_recipe(made, lab):
    """What the README says to type gives the recipe hash of the logs."""
    (knobs, line), = [c for c in check.commands((made / "README.md").read_text()) if c[0].get("MODE") is None]
    assert line.endswith("train_gpt.py") and knobs["SEED"] == "1"
    done = subprocess.run([sys.executable, made / "train_gpt.py"], cwd=lab, text=True, capture_output=True,
                          env=environment(**knobs, MODE="config"))
    recipe = re.search(r"^preset:smoke recipe:(\w+)$", done.stdout, re.M)
    assert recipe and recipe[1] == json.loads((made / "submission.json").read_text())["recipe"], done.stdout + done.stderr


def test_folder_without_artifacts_is_undecided_about_them(copy):
    for file in copy.glob("*.artifact"):
        file.unlink()
    outcomes = {o.name: o.status for o in check.check(copy)}
    assert outcomes["artifact"] == "undecided" and "FAIL" not in outcomes.values()


@pytest.mark.parametrize("spoil, words", [
    (lambda logs: cut(logs / "toy2.jsonl", '"event": "result"'), "did not reach its end"),
    (lambda logs: (logs / "toy2.artifact").unlink(), "is missing"),
    (lambda logs: swap(logs / "toy2.jsonl", '"seed": 2', '"seed": 1'), "seed is there twice"),
    (lambda logs: swap(logs / "toy2.jsonl", '"recipe": "', '"recipe": "f'), "differ in their recipe"),
    (lambda logs: (logs / "toy2.packed.py").write_text("pass\n"), "differ in their packed code"),
    (lambda logs: swap(logs / "toy2.jsonl", '"failures": []', '"failures": ["too large"]'), "broke a rule: too large")],
    ids=["unfinished", "no artifact", "seed twice", "other recipe", "other code", "failed run"])
def test_make_refuses(lab, tmp_path, spoil, words):
    logs = shutil.copytree(lab / "logs", tmp_path / "logs")
    spoil(logs)
    with pytest.raises(make.Refused, match=words):
        make.gather([str(logs / f"toy{s}") for s in SEEDS])


def test_make_refuses_an_artifact_that_scores_otherwise(lab, tmp_path):
    """Another seed's artifact under this seed's name: the shipped file does not repeat the score, so no folder appears."""
    logs = Path(shutil.copytree(lab / "logs", tmp_path / "logs"))
    shutil.copy(logs / "toy2.artifact", logs / "toy1.artifact")
    told = make.Told("x", "Ada", "ada", "", "", "2026-01-02", "non-record", "record")
    with pytest.raises(make.Refused, match="seed 1: the shipped file scores"):
        make.make(make.gather([str(logs / "toy1")]), told, tmp_path / "out", lab)
    assert not list((tmp_path / "out").rglob("*.py"))


def test_make_does_not_overwrite(made, lab):
    told = make.Told("Toy gates", "Ada", "ada", "", "", "2026-01-02", "non-record", "record")
    with pytest.raises(make.Refused, match="exists already"):
        make.make([], told, lab / "records", lab)


# ----------------------------------------------------------------------------------------------------------------------
# check: planted faults
# ----------------------------------------------------------------------------------------------------------------------
def swap(file: Path, old: str, new: str, count: int = -1) -> None:
    """Replace text in a file; the test is wrong if it is not there."""
    text = file.read_text()
    assert old in text, f"{old} is not in {file.name}"
    file.write_text(text.replace(old, new, count))


def sub(file: Path, pattern: str, new: str) -> None:
    text, count = re.subn(pattern, new, file.read_text(), flags=re.M)
    assert count, f"{pattern} is not in {file.name}"
    file.write_text(text)


def cut(file: Path, before: str) -> None:
    """Truncate a file in front of the last line that holds a text."""
    text = file.read_text()
    file.write_text(text[:text.rindex("\n", 0, text.rindex(before)) + 1])


def edit(folder: Path, **changes) -> None:
    """Change submission.json; a callable gets the old value."""
    file = folder / "submission.json"
    told = json.loads(file.read_text())
    for key, value in changes.items():
        told[key] = value(told[key]) if callable(value) else value
    file.write_text(json.dumps(told))


def event(folder: Path, seed: int, kind: str, **changes) -> None:
    """Change fields of an event of one run's JSONL."""
    file = folder / f"train_seed{seed}.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    chosen = [e for e in events if e["event"] == kind]
    assert chosen
    for e in chosen:
        e.update(changes)
    file.write_text("".join(json.dumps(e) + "\n" for e in events))


def span(folder: Path, name: str, seconds: float) -> None:
    """Give a span of seed 1 another length, in the log and in the JSONL alike."""
    event(folder, 1, "spans", **{name: seconds})
    sub(folder / "train_seed1.log", rf"^(spans: .*\b{name.replace(' ', '_')}):[\d.]+s", rf"\g<1>:{seconds:.2f}s")


def one_byte_too_many(folder: Path) -> None:
    """A total of 16,000,001 bytes that log, JSONL and submission.json agree on."""
    log = runs.from_log(folder / "train_seed2.log")
    model = runs.CAP + 1 - log.size["code"]
    sub(folder / "train_seed2.log", r"^(Serialized model [^:]*): \d+", rf"\g<1>: {model}")
    sub(folder / "train_seed2.log", r"^(Total submission size[^:]*): \d+", rf"\g<1>: {runs.CAP + 1}")
    event(folder, 2, "size", model=model, total=runs.CAP + 1)
    edit(folder, bytes_total=runs.CAP + 1)


def seed_changed(folder: Path, **changes) -> None:
    edit(folder, seed_results=lambda table: {**table, "2": {**table["2"], **changes}})


def drop_seed(folder: Path) -> None:
    for file in folder.glob("*seed3*"):
        file.unlink()


def same_seed_twice(folder: Path) -> None:
    for suffix in (".log", ".jsonl"):
        shutil.copy(folder / f"train_seed1{suffix}", folder / f"train_seed2{suffix}")


def readable_code(folder: Path) -> None:
    """Ship the readable source, and go on counting the packed one."""
    (folder / "train_gpt.py").write_text(runs.from_log(folder / "train_seed1.log").source)


def other_code(folder: Path) -> None:
    """A packed file of the same size that is another program: one literal changed inside."""
    source = runs.unpack_code((folder / "train_gpt.py").read_text())
    assert "1e-4" in source
    (folder / "train_gpt.py").write_text(source.replace("1e-4", "2e-4", 1))


def helper_module(folder: Path) -> None:
    (folder / "extra.py").write_text("SECRET = 1\n")
    with open(folder / "train_gpt.py", "a") as file:
        file.write("import extra\n")


def later_python(folder: Path) -> None:
    """Quotes of one kind inside each other, in the shipped file; its logs ran on the Python that reads them."""
    (folder / "train_gpt.py").write_text(runs.unpack_code((folder / "train_gpt.py").read_text()) + 'X = f"{"x"}"\n')
    for file in folder.glob("train_seed*.log"):
        sub(file, r"^python \S+", "python 3.12.1")
    edit(folder, python_version="3.12.1")
    sub(folder / "README.md", r"Python \d\S+", "Python 3.11.7")


def validation_of_another_set(folder: Path) -> None:
    digest = json.loads((folder / "submission.json").read_text())["validation"]["sha256"]
    for file in (folder / "train_seed3.log", folder / "train_seed3.jsonl"):
        swap(file, digest, "0" * 64)


def better_score_everywhere_but_nats(folder: Path) -> None:
    """A better bpb of seed 1's best pass in log and JSONL, as a wrong byte count would give."""
    log = runs.from_log(folder / "train_seed1.log")
    name, score = next((n, s) for n, s in log.scores.items() if s is not None and s.bpb == log.final.bpb)
    swap(folder / "train_seed1.log", f"val_bpb:{score.bpb:.8f}", f"val_bpb:{score.bpb - 0.1:.8f}")
    file = folder / "train_seed1.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    for e in events:
        if e["event"] == "score" and e["name"] == name:
            e["val_bpb"] -= 0.1
        if e["event"] == "result":
            e["results"][name]["val_bpb"] -= 0.1
    file.write_text("".join(json.dumps(e) + "\n" for e in events))


FAULTS = {
    "score in the json altered": (lambda f: edit(f, val_bpb=lambda x: x - 0.001), {"headline", "readme"}),
    "loss in the json altered": (lambda f: edit(f, val_loss=lambda x: x - 0.001), {"headline"}),
    "a best seed instead of the mean": (lambda f: edit(f, val_bpb=lambda _: min(r.final.bpb for r in check.Folder(f).logs)), {"headline"}),
    "spread in the json altered": (lambda f: edit(f, val_bpb_std=1e-4), {"spread"}),
    "a seed's score altered": (lambda f: seed_changed(f, val_bpb=4.0), {"results"}),
    "a seed's steps altered": (lambda f: seed_changed(f, steps=99), {"results"}),
    "a seed's log missing": (drop_seed, {"seeds", "results", "headline"}),
    "one seed twice": (same_seed_twice, {"seeds"}),
    "key missing": (lambda f: edit(f, author=""), {"keys"}),
    "no json": (lambda f: (f / "submission.json").write_text("{"), {"keys"}),
    "other date": (lambda f: edit(f, date="2025-12-31"), {"date"}),
    "score in the README altered": (lambda f: sub(f / "README.md", r"^(# .*: )\d\.\d+", r"\g<1>1.00000"), {"readme"}),
    "a seed's row in the README altered": (lambda f: sub(f / "README.md", r"\*\*\d\.\d{8}\*\*", "**1.00000000**"), {"readme"}),
    "unknown knob in the README": (lambda f: swap(f / "README.md", "PRESET=smoke", "PRESET=smoke TTT_LERNING_RATE=1"), {"knobs"}),
    "knob left out of the README": (lambda f: sub(f / "README.md", r"NUM_LAYERS=3 ", ""), {"command"}),
    "knob with another value in the README": (lambda f: swap(f / "README.md", "MODEL_DIM=32", "MODEL_DIM=64"), {"command"}),
    "16,000,001 bytes": (one_byte_too_many, {"bytes"}),
    "code counted but not shipped": (readable_code, {"shipped"}),
    "shipped code is another program": (other_code, {"same-code", "repeated"}),
    "code size in the json altered": (lambda f: edit(f, bytes_code=1000), {"shipped"}),
    "total in the json altered": (lambda f: edit(f, bytes_total=50_000), {"sizes-told"}),
    "code beside train_gpt.py": (helper_module, {"alone"}),
    "artifact altered": (lambda f: (f / "seed1.artifact").write_bytes((f / "seed1.artifact").read_bytes()[:-1] + b"?"), {"artifact"}),
    "artifact of another seed": (lambda f: shutil.copy(f / "seed1.artifact", f / "seed2.artifact"), {"artifact"}),
    "training of 600.1 s": (lambda f: span(f, "train", 600.1), {"training"}),
    "Hessians behind 600 s": (lambda f: (span(f, "train", 599.6), span(f, "hessians", 4.7)), {"training"}),
    "evaluation of 600.1 s": (lambda f: span(f, "eval ttt", 600.1), {"evaluation"}),
    "ledger of test-time training missing": (lambda f: sub(f / "train_seed1.log", r"^ledger ttt: .*\n", ""), {"ledger"}),
    "tokens not scored": (lambda f: sub(f / "train_seed1.log", r"^(ledger ttt: each of )\d+", r"\g<1>17"), {"ledger"}),
    "needs a Python that nothing names": (later_python, {"python", "same-code"}),
    "verdict of failure": (lambda f: sub(f / "train_seed2.log", r"^verdict: .*", "verdict: FAILED: eval budget overrun"), {"verdict"}),
    "truncated log": (lambda f: cut(f / "train_seed2.log", "\nspans: "), {"finished", "verdict", "twins"}),
    "log cut before its scores": (lambda f: cut(f / "train_seed2.log", "\nCode size"), {"finished", "results"}),
    "truncated JSONL": (lambda f: cut(f / "train_seed2.jsonl", '"event": "result"'), {"twins"}),
    "JSONL missing": (lambda f: (f / "train_seed2.jsonl").unlink(), {"twins"}),
    "score in a log altered": (lambda f: sub(f / "train_seed1.log", r"^(final_int6_ttt_exact val_loss:\d)\.\d", r"\g<1>.0"), {"twins", "bits-per-byte"}),
    "train loss in a log altered": (lambda f: sub(f / "train_seed1.log", r"^(step:12/12 train_loss):\d\.\d+", r"\g<1>:1.0000"), {"twins"}),
    "bits a byte that do not follow from nats": (better_score_everywhere_but_nats, {"bits-per-byte", "headline"}),
    "source in a log altered": (lambda f: swap(f / "train_seed1.log", "import numpy as np", "import numpy as np  # ours", 1), {"same-code"}),
    "another validation set": (validation_of_another_set, {"validation-set"}),
    "part of the validation set, unsaid": (lambda f: edit(f, validation=lambda v: {**v, "first_documents_only": 0}), {"validation-set"}),
    "byte table not proved": (lambda f: sub(f / "train_seed3.log", " byte table equals .*", ""), {"byte-count"}),
    "seeds of two recipes": (lambda f: [swap(f / f"train_seed2{s}", json.loads((f / "submission.json").read_text())["recipe"], "0123456789ab")
                                        for s in (".log", ".jsonl")], {"one-recipe"}),
    "evaluated by another file": (lambda f: sub(f / "eval_seed1.log", r"source sha256:\w+", "source sha256:00"), {"repeated"}),
    "evaluation gave another score": (lambda f: sub(f / "eval_seed1.log", r"^(final_int6_ttt_exact .* val_bpb:)\d\.\d+", r"\g<1>3.00000000"), {"repeated"}),
    "two launches in one log": (lambda f: (f / "train_seed1.log").write_text((f / "train_seed1.log").read_text() * 2), {"finished"}),
    "a claim against the logs": (lambda f: (drop_seed(f), edit(f, compliance=lambda c: {**c, "three_seeds": True})), {"compliance"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds_the_fault(copy, fault):
    plant, expected = FAULTS[fault]
    plant(copy)
    assert expected <= failing(copy)
    assert check.main([str(copy)]) == 1


def test_faults_are_enough_and_reach_most_rules():
    reached = {name for _, expected in FAULTS.values() for name in expected}
    assert len(FAULTS) >= 20
    # for these it takes the timed track, or a file that is not there at all (tested below)
    assert {name for _, name, _ in check.RULES} - reached == {"files", "margin", "hardware", "offline", "disjoint"}


def test_presets_are_read_from_the_programs_tables():
    source = "A = dict(x=1, y='b')\nB = A | C | dict(y='c', z=0.5)\nC = dict(x=2)\n"
    assert check.preset_of(source, "b") == {"X": "2", "Y": "c", "Z": "0.5"} and check.preset_of(source, "record") == {}


def test_every_preset_is_read_as_the_program_resolves_it():
    program = trainer()
    for name, table in program.PRESETS.items():
        assert check.preset_of(program.SOURCE, name) == {k.upper(): str(v) for k, v in table.items()}, name


def test_missing_files_are_named(copy):
    (copy / "README.md").unlink()
    assert "files" in failing(copy)


@pytest.mark.parametrize("value", [None, "x", [["a"]], {"1": None}])
def test_odd_values_never_stop_the_other_rules(copy, value):
    """Every key in turn: whatever it holds, a line comes out for every rule."""
    for key in json.loads((copy / "submission.json").read_text()):
        before = (copy / "submission.json").read_text()
        edit(copy, **{key: value})
        assert len(check.check(copy)) == len(check.RULES)
        (copy / "submission.json").write_text(before)


def test_an_unseen_network_import_is_undecided(copy):
    for file in copy.glob("train_seed*.log"):
        swap(file, "import numpy as np\n", "import numpy as np\nimport urllib.request\n", 1)
    (offline,) = [o for o in check.check(copy) if o.name == "offline"]
    assert offline.status == "undecided" and "urllib" in offline.text


def test_timed_track_asks_for_more(copy):
    """The same folder, claimed for the timed track: CPU runs on four documents are none."""
    edit(copy, track="10min_16mb")
    outcomes = {o.name: o for o in check.check(copy)}
    assert outcomes["hardware"].status == "FAIL" and "8x H100" in outcomes["hardware"].text
    assert outcomes["validation-set"].status == "FAIL" and outcomes["margin"].status == "undecided"
    drop_seed(copy)
    assert "three seeds" in next(o for o in check.check(copy) if o.name == "seeds").text


def test_timed_track_accepts_eight_h100(copy):
    edit(copy, track="10min_16mb")
    for file in copy.glob("train_seed*.log"):
        sub(file, r"^(python .*? \| ).*?( \| world_size:)1", r"\g<1>NVIDIA H100 80GB HBM3\g<2>8")
    assert "hardware" not in failing(copy)


def test_a_record_in_order_passes(copy, monkeypatch):
    """Three seeds on eight H100s over the whole set: nothing is broken, and the margin waits for the record before it."""
    monkeypatch.setattr(check, "is_fineweb", lambda validation: True)
    edit(copy, track="10min_16mb", validation=lambda v: {**v, "first_documents_only": 0})
    swap(copy / "README.md", "VAL_DOCS=4", "VAL_DOCS=0")
    for file in copy.glob("train_seed*.log"):
        sub(file, r"^(python .*? \| ).*?( \| world_size:)1", r"\g<1>NVIDIA H100 80GB HBM3\g<2>8")
        sub(file, r"^\* VAL_DOCS=4", "  VAL_DOCS=0")
        sub(file, r"^(verdict: legal: [^;\n]*)[^\n]*$", r"\1")
        swap(file.with_suffix(".jsonl"), '"val_docs": 4', '"val_docs": 0')
    assert not failing(copy)
    assert {o.name for o in check.check(copy) if o.status == "undecided"} == {"margin", "disjoint"}


LOSSY = "LOSSY data (casefold): bits per byte of another text than the original"
CAVEAT = "not the contest's: world 1 of 8, 150 documents of 50,000"


@pytest.mark.parametrize("track, caveats, expected", [
    ("non-record-16mb", (), "ok"), ("non-record-16mb", (CAVEAT,), "ok"), ("non-record-16mb", (LOSSY, CAVEAT), "ok"),
    ("10min_16mb", (), "ok"), ("10min_16mb", (CAVEAT,), "FAIL"), ("10min_16mb", (LOSSY,), "undecided")])
def test_what_a_legal_verdict_adds(copy, track, caveats, expected):
    """Off the timed track a caveat is told; where the contest's track is claimed, it is the fault that it names."""
    edit(copy, track=track)
    for file in copy.glob("train_seed*.log"):
        sub(file, r"^(verdict: legal: [^;\n]*)[^\n]*$", r"\1" + "".join(f"; but {c}" for c in caveats))
    found = next(o for o in check.check(copy) if o.name == "verdict")
    assert found.status == expected and all(c in found.text for c in caveats), found
    assert not [r.failures for r in check.Folder(copy).logs if r.failures != []]


@pytest.mark.parametrize("text, failures, caveats", [
    ("legal: score-first", [], []), ("legal: score-first; but A; but B", [], ["A", "B"]),
    ("FAILED: x; y", ["x; y"], []), ("FAILED: x; but A", ["x"], ["A"])])
def test_grammar_of_the_last_line(copy, text, failures, caveats):
    sub(copy / "train_seed1.log", r"^verdict: .*$", f"verdict: {text}")
    run = runs.from_log(copy / "train_seed1.log")
    assert (run.failures, run.caveats) == (failures, caveats)


def test_the_headline_that_a_run_names_is_the_result(copy):
    """The event `result` may name the pass; log, table and figures follow it, and what they said before is a fault."""
    assert check.Folder(copy).logs[0].headline == "ttt"
    for seed in SEEDS:
        event(copy, seed, "result", headline="full")
    folder = check.Folder(copy)
    assert all(r.final == r.scores["full"] for r in folder.logs)
    assert all(r.final.bpb == r.scores["full"].bpb for r in runs.find(str(copy)))
    assert {"headline", "results", "readme"} <= failing(copy)


@pytest.mark.parametrize("documents, size, expected", [
    (50_000, 151_079_963, True), (50_000, 151_074_498, True), (49_999, 151_079_963, False), (50_000, 157_317_000, False)])
def test_the_contests_validation_set_is_known_by_its_bytes(documents, size, expected):
    assert check.is_fineweb({"documents": documents, "bytes": size}) is expected


def test_json_output_and_strict(made, capsys):
    assert check.main([str(made), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)[str(made)]
    assert {tuple(o) for o in told} == {("id", "name", "status", "text")} and len(told) == len(check.RULES)
    assert check.main([str(made), "--strict"]) == 1


def test_check_runs_nothing_from_the_folder(copy, tmp_path):
    """A folder of a stranger is only read."""
    (copy / "train_gpt.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    check.check(copy)
    assert not (tmp_path / "ran").exists()


def test_check_needs_only_the_standard_library(made):
    """A reviewer can run it anywhere: without site-packages, only what brotli would unpack stays undecided."""
    done = subprocess.run([sys.executable, "-S", RECORDS / "check.py", made, "--json"], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (outcomes,) = json.loads(done.stdout).values()
    undecided = {o["name"]: o["text"] for o in outcomes if o["status"] == "undecided"}
    assert set(undecided) == {"artifact", "disjoint"} and "pip install brotli" in undecided["artifact"]


def test_packed_run_can_be_submitted_again(made, lab):
    """Training from the packed file: source in the log, counted code and shipped file are one."""
    folder = lab / "again"
    folder.mkdir()
    shutil.copy(made / "train_gpt.py", folder / "train_gpt.py")
    shutil.copy(ROOT / "requirements.txt", folder)
    shutil.copytree(lab / "data", folder / "data")
    path = train(folder, "again1", SEED=1)
    told = make.Told("Again", "Ada", "ada", "b", "c", "2026-01-02", "non-record", "record")
    result = make.make(make.gather([str(path)]), told, folder / "records", folder, "none")
    outcomes = {o.name: o.status for o in check.check(result)}
    assert "FAIL" not in outcomes.values() and outcomes["repeated"] == "undecided" and outcomes["same-code"] == "ok"
