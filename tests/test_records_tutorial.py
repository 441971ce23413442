"""The tutorial of records/README.md, run as it is written: every command of its block, in order, from a bare checkout.

By default its spec is replaced by a tiny one; RECORDS_SLOW=1 runs the very one (minutes).
"""
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, trainer
from records_lab import RECORDS, SMALL, environment, world

import check
import sweep

SPEC = RECORDS / "examples" / "smoke.toml"
MINUTES = 10  # that the tutorial may take on two cores


def tutorial() -> list[str]:
    """The commands of the tutorial's block; installing is not the test's business."""
    section = (RECORDS / "README.md").read_text(encoding="utf-8").partition("\n## Tutorial")[2].partition("\n## ")[0]
    commands = re.search(r"^```bash\n(.*?)^```", section, re.M | re.S)[1].splitlines()
    assert commands[0].startswith("pip install -r requirements.txt -r records/requirements.txt")
    return commands[1:]


def checkout(folder: Path, corpus) -> Path:
    """The program, the data scripts and the tools, with a small corpus instead of none."""
    world(folder, corpus)
    for part, pattern in (("records", "*.*"), ("data", "*.py"), ("records/examples", "*.toml")):
        (folder / part).mkdir(exist_ok=True)
        for file in (ROOT / part).glob(pattern):
            shutil.copy(file, folder / part / file.name)
    return folder


def tiny_spec() -> str:
    """The tutorial's settings over a base of a hundredth of its size."""
    knobs = {**SMALL, "DATA_PATH": "data/datasets/toy", "TOKENIZER_PATH": "data/tokenizers/toy.model", "VAL_DOCS": 3, "ITERATIONS": 8}
    base = "\n".join(f"{k} = {json.dumps(v)}" for k, v in knobs.items())
    settings = SPEC.read_text(encoding="utf-8")
    return f'name = "smoke"\nseeds = [1, 2]\n[base]\n{base}\n\n' + settings[settings.index("[settings."):]


def python_on_path(folder: Path) -> str:
    """A PATH on which `python` is the one that runs the tests."""
    folder.mkdir()
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def follow(place: Path, path: str) -> dict[str, str]:
    """Run the commands; output by tool."""
    out = {}
    for command in tutorial():
        done = subprocess.run(["bash", "-c", command], cwd=place, text=True, capture_output=True, timeout=60 * MINUTES,
                              env={**environment(), "PATH": path})
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        out[re.search(r"records/(\w+)\.py", command)[1]] = done.stdout
    return out


def look(place: Path, out: dict[str, str]) -> None:
    """What a reader of the tutorial is promised."""
    rows = {r["setting"]: r for r in json.loads((place / "sweeps/smoke/results.json").read_text())}
    assert set(rows) == {"control", "no_gate", "no_loop"} and all(r["n"] == 2 and not r["failed"] for r in rows.values())
    assert rows["no_gate"]["paired"]["low"] < rows["no_gate"]["paired"]["mean"] < rows["no_gate"]["paired"]["high"]
    assert (place / "sweeps/smoke/sweep.png").stat().st_size > 5000
    page = (place / "sweeps/smoke/report/index.html").read_text()
    assert page.count("data:image/png") == 5 and "NUM_LOOPS" in page
    difference = rows["no_gate"]["paired"]["mean"]
    assert f"A - B: {difference:+.6f} bpb" in out["compare"] and "95 % interval" in out["compare"]
    (folder,) = (place / "sweeps/smoke/records/track_non_record_16mb").iterdir()
    assert not [o for o in check.check(folder) if o.status == "FAIL"] and " 0 FAIL" in out["check"]
    assert json.loads((folder / "submission.json").read_text())["config_diff"]["knobs"]["ATTN_GATE"] == {"here": "none", "preset": "sparse"}
    # what is made here may be published: no folder of this machine is in it
    for file in folder.iterdir():
        assert str(place).encode() not in file.read_bytes(), file.name


def test_tutorial_with_a_tiny_spec(tmp_path, corpus):
    place = checkout(tmp_path / "checkout", corpus)
    (place / "records/examples/smoke.toml").write_text(tiny_spec())
    look(place, follow(place, python_on_path(tmp_path / "bin")))


@pytest.mark.skipif(os.environ.get("RECORDS_SLOW") != "1", reason="minutes: RECORDS_SLOW=1 runs it")
def test_tutorial_as_it_is(tmp_path, corpus):
    place = checkout(tmp_path / "checkout", corpus)
    look(place, follow(place, python_on_path(tmp_path / "bin")))


def test_specs_are_accepted_by_the_program():
    """Every setting of every example resolves to a config, so no sweep starts that would fail at once."""
    for file in (RECORDS / "examples").glob("*.toml"):
        settings = sweep.read_spec(file).settings
        for knobs in settings.values():  # without training the control's come with its files
            whole = {**(settings["control"] if "MODE" in knobs else {}), **knobs}
            assert trainer().load_config(whole, cuda=False).preset == whole["PRESET"]


def test_functions_stay_short():
    """The house's rule for train_gpt.py holds here too: up to 60 lines a function, and a docstring for what others call."""
    import ast
    for file in RECORDS.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), file.name
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{file.name}: {node.name}"
