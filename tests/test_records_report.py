"""records/report.py and records/track.py: pictures hold what the runs say, the page needs no other file, trackers get the events."""
import json
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import trainer
from records_lab import RECORDS, environment

import compare
import report
import runs
import sweep
import track
from test_records_foreign import new_log

STAGES = {"raw": 3.0, "pre-quantization post-ema": 2.9}
SCORES = {"full": 2.95, "sliding": 2.93, "ttt": 2.90}


def events(seed=1, recipe="abc", shift=0.0, **config):
    """A whole run's events, in the order in which the program writes them."""
    base = {"world": 1, "seed": seed, "run_id": f"toy.s{seed}", "train_batch_tokens": 1000, "warmdown_frac": 0.5, "min_lr": 0.1, "average": "ema",
            "muon_momentum": 0.97, "muon_momentum_warmup_start": 0.92, "muon_momentum_warmup_frac": 0.3, "num_loops": 2,
            "enable_looping_at": 0.35, "swa_start_frac": 0.8, **config}
    yield {"event": "config", "recipe": recipe, "source": "0", **base}
    yield {"event": "validation", "documents": 3, "tokens": 100, "bytes": 200, "sha256": "f", "val_docs": 0}
    for step in range(1, 21):
        told = {"tokens": 700 * step} if seed > 1 else {}  # an older run does not say
        yield {"event": "train", "step": step, "loss": 6 - 0.1 * step + shift, "norm": 1.0, "seconds": 0.5 * step, **told}
    for name, bpb in STAGES.items():
        yield {"event": "diagnostic", "name": name, "val_loss": 2 * bpb, "val_bpb": bpb + shift, "seconds": 1.0, "verdict": ""}
    yield {"event": "size", "total": 15_500_000, "model": 15_450_000, "coarser": 1.0, "code": 50_000, "blocks": 15_000_000, "embed": 450_000}
    scores = {n: {"val_loss": 2 * b, "val_bpb": b + shift, "seconds": 1.0, "verdict": ""} for n, b in SCORES.items()}
    for name, score in scores.items():
        yield {"event": "score", "name": name, **score}
    yield {"event": "spans", "wall": 30.0, "train": 10.0, "hessians": 1.0, "eval full": 2.0}
    yield {"event": "result", "run": f"toy.s{seed}", "results": scores, "bytes_total": 15_500_000, "failures": []}


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"t": 0, **e}) + "\n" for e in rows))
    return path


@pytest.fixture
def logs(tmp_path):
    """Two recipes with two seeds each."""
    for seed in (1, 2):
        write(tmp_path / "logs" / f"control.s{seed}.jsonl", events(seed, "abc", 0.01 * seed))
        write(tmp_path / "logs" / f"gate.s{seed}.jsonl", events(seed, "def", 0.01 * seed - 0.02, warmdown_frac=0.8))
    return tmp_path / "logs"


@pytest.fixture
def groups(logs):
    return report.group(runs.find(str(logs)))


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------
def test_runs_are_grouped_by_recipe_and_named_by_what_they_share(groups):
    assert {n: [r.seed for r in g] for n, g in groups.items()} == {"control": [1, 2], "gate": [1, 2]}


def test_curves_over_steps_tokens_and_seconds(groups):
    fig = report.curves(groups)
    first = [ax.lines[0].get_xydata().tolist() for ax in fig.axes[:3]]
    losses = [pytest.approx(6 - 0.1 * s + 0.01) for s in range(1, 21)]
    assert [[x for x, _ in line] for line in first] == [list(range(1, 21)), [pytest.approx(s / 1000) for s in range(1, 21)],
                                                        [0.5 * s for s in range(1, 21)]]
    assert all([y for _, y in line] == losses for line in first)
    # what a run tells of its tokens goes before what its batch would come to
    assert fig.axes[1].lines[1].get_xdata().tolist() == [pytest.approx(7 * s / 10000) for s in range(1, 21)]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["control", "gate"]
    # after a fifth of the run the loss is 5.62: the first fall does not squeeze the rest
    assert 5.6 < fig.axes[0].get_ylim()[1] < 5.8


def test_curves_of_two_recipes_end_with_their_difference(groups):
    ax = report.curves(groups).axes[3]
    assert ax.lines[0].get_ydata().tolist() == [pytest.approx(-0.02)] * 20 and ax.get_title(loc="left").startswith("minus control")


def test_one_recipe_has_no_difference(groups):
    assert len(report.curves({"control": groups["control"]}).axes) == 3


def test_waterfall_shows_each_difference(groups):
    fig = report.waterfall(groups)
    words = [t.get_text() for t in fig.axes[0].texts]
    assert words == ["3.0150", "-0.1000", "+0.0500", "-0.0200", "-0.0300", "2.9150"]
    heights = [b.get_height() for b in fig.axes[0].patches]
    assert heights[1:] == [pytest.approx(x) for x in (0.1, 0.05, 0.02, 0.03)]
    assert fig.axes[0].get_title(loc="left") == "control\nn = 2, seed sd 0.0071"


def test_every_number_of_a_sweep_is_that_of_one_pass(tmp_path):
    """Each seed's lowest pass is another one; table, waterfall and compare.py all show the one that is configured."""
    for seed, full, sliding, adapted in ((1, 2.80, 2.93, 2.90), (2, 2.95, 2.81, 2.92)):
        scores = {"full": full, "sliding": sliding, "ttt": adapted}
        rows = [e for e in events(seed, "abc") if e["event"] != "score"]
        told = {n: {"val_loss": 2 * b, "val_bpb": b, "seconds": 1.0, "verdict": ""} for n, b in scores.items()}
        rows[-1]["results"] = told
        rows[-2:-2] = [{"event": "score", "name": n, **s} for n, s in told.items()]
        write(tmp_path / "logs" / f"control.s{seed}.jsonl", rows)
    spec = sweep.Spec("s", [1, 2], {"control": {}})
    seen = SimpleNamespace(spec=spec, run_of=lambda j: runs.from_events(tmp_path / "logs" / f"{j.id}.jsonl"),
                           failure=lambda j: tmp_path / "none")
    (row,) = sweep.summarise(seen)
    fig = report.waterfall(report.group(runs.find(str(tmp_path / "logs"))))
    bold = [t.get_text() for t in fig.axes[0].texts if t.get_fontweight() == "bold"]
    assert row.mean == pytest.approx(2.91) and row.passes == ["ttt"] and bold == ["2.9100"]
    assert "the pass that its configuration reports: ttt" in sweep.table([row], None)
    assert compare.side(str(tmp_path / "logs"), None).bpb == {1: 2.90, 2: 2.92}
    table = report.runs_table(report.group(runs.find(str(tmp_path / "logs"))))
    assert "2.90000 ttt" in table and "2.92000 ttt" in table


def test_waterfall_ends_with_the_pass_that_the_run_names(logs):
    for path in logs.glob("control.*"):
        path.write_text(path.read_text().replace('"failures": []', '"failures": [], "headline": "full"'))
    fig = report.waterfall(report.group(runs.find(str(logs))))
    assert [t.get_text() for t in fig.axes[0].texts if t.get_fontweight() == "bold"] == ["2.9650"]
    assert [t.get_text() for t in fig.axes[1].texts if t.get_fontweight() == "bold"] == ["2.8950"]


def test_others_logs_end_with_their_own_label(tmp_path):
    for seed in (1, 42):
        (tmp_path / f"train_seed{seed}.log").write_text(new_log(seed))
    groups = report.group(runs.find(str(tmp_path)))
    ((_, stages),) = [(n, report.mean_stages(g)) for n, g in groups.items()]
    assert list(stages) == ["averaged", "quantized_ttt_phased"]


def test_what_cannot_be_decided_is_written_into_the_picture(tmp_path):
    (tmp_path / "train.log").write_text(new_log() + "final_other val_loss:2.30000000 val_bpb:1.05000000\n")
    groups = report.group(runs.find(str(tmp_path)))
    assert report.waterfall(groups).axes[0].get_title(loc="left").endswith("undecided which score is the result")
    assert "undecided: quantized_ttt_phased 1.0" in report.runs_table(groups)


def test_waterfall_of_a_run_without_scores_says_so(tmp_path):
    path = write(tmp_path / "x.jsonl", list(events())[:10])
    fig = report.waterfall(report.group(runs.find(str(path))))
    assert fig.axes[0].texts[0].get_text() == "no run has scores yet"


def test_bytes_add_up_to_the_total(groups):
    ax = report.sizes(groups).axes[0]
    bars = [b for b in ax.patches if b.get_width()]
    assert sum(b.get_width() for b in bars) == pytest.approx(2 * 15.5)
    assert any(line.get_xdata()[0] == 16 for line in ax.lines), "the cap is drawn where it is near"


def test_schedules_are_the_programs_own(groups):
    fig = report.schedules(groups, trainer())
    lr = fig.axes[0].lines[0].get_xydata()
    assert lr[0][1] == 1 and lr[200][1] == 1 and lr[-1][1] == pytest.approx(0.1) and lr[300][1] == pytest.approx(0.5 + 0.05, abs=0.06)
    loops = fig.axes[2].lines[0].get_ydata()
    assert set(loops) == {1, 3}
    assert len(fig.axes[0].lines) == 2, "two recipes, two schedules"


def test_equal_schedules_are_one_line(logs):
    groups = report.group(runs.find(str(logs / "control.s*.jsonl")) + [runs.load(write(logs / "other.s1.jsonl", events(1, "ghi")))])
    fig = report.schedules(groups, trainer())
    assert len(fig.axes[0].lines) == 1 and fig.axes[0].lines[0].get_label() == "control, other"


def row(setting, mean, low, high):
    paired = None if mean is None else {"mean": mean, "low": low, "high": high, "n": 3}
    return SimpleNamespace(setting=setting, paired=paired, mean=3.0, n=3)


def test_forest_best_first_and_zero_marked():
    fig = report.forest([row("control", None, None, None), row("worse", 0.02, 0.01, 0.03), row("unsure", -0.01, -0.02, 0.01),
                         row("better", -0.05, -0.06, -0.04)], "toy")
    ax = fig.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["better", "unsure", "worse"]
    colours = [line.get_color() for line in ax.lines if line.get_marker() == "s"]
    assert colours == [report.GAIN, report.REST, report.LOSS]
    assert [t.get_text() for t in ax.texts] == ["-0.0500  n = 3", "-0.0100  n = 3", "+0.0200  n = 3"]


def test_page_needs_no_other_file(logs, tmp_path):
    done = subprocess.run([sys.executable, RECORDS / "report.py", logs, "--out", tmp_path / "page", "--title", "A <b> & c"], text=True,
                          capture_output=True, env=environment())
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "page" / "index.html").read_text()
    pictures = re.findall(r'src="([^"]{30})', text)
    assert len(pictures) == 4 and all(p.startswith("data:image/png;base64,") for p in pictures)
    assert not re.search(r'(?:href|src)="(?!data:)', text) and "A &lt;b&gt; &amp; c" in text
    assert "2.91000" in text and "legal" in text and "WARMDOWN_FRAC" in text
    assert {p.name for p in (tmp_path / "page").iterdir()} == {"index.html", "curves.png", "waterfall.png", "bytes.png", "schedules.png"}


def test_report_without_runs(tmp_path, capsys):
    assert report.main([str(tmp_path / "nothing")]) == 2
    assert "no run there" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Trackers
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def tracker(monkeypatch):
    """A tracker with the interface that wandb and trackio share; it keeps what it is given."""
    seen = SimpleNamespace(init=None, log=[], finished=0)
    module = SimpleNamespace(init=lambda **kw: setattr(seen, "init", kw), log=lambda values, step: seen.log.append((step, values)),
                             finish=lambda: setattr(seen, "finished", seen.finished + 1))
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, module)
    return seen


@pytest.mark.parametrize("to", ["wandb", "trackio"])
def test_a_finished_run_is_sent(tracker, logs, to):
    assert track.main([str(logs / "control.s1.jsonl"), "--to", to, "--project", "p"]) == 0
    assert tracker.init["project"] == "p" and tracker.init["name"] == "toy.s1" and tracker.init["config"]["warmdown_frac"] == 0.5
    assert tracker.log[0] == (1, {"train/loss": pytest.approx(5.91), "train/gradient_norm": 1.0, "train/seconds": 0.5})
    names = {n for _, values in tracker.log for n in values}
    assert {"score/ttt/val_bpb", "diagnostic/raw/val_loss", "size/total", "spans/train"} <= names
    assert tracker.log[-1][0] == 20 and tracker.finished == 1


def test_a_run_is_followed_while_it_writes(tracker, tmp_path, monkeypatch):
    """Lines come in pieces and late; the follower ends with the result."""
    monkeypatch.setattr(track, "POLL", 0.01)
    path = tmp_path / "live.jsonl"
    text = "".join(json.dumps({"t": 0, **e}) + "\n" for e in events())

    def writer():
        time.sleep(0.1)
        with open(path, "w", buffering=1) as file:
            for i in range(0, len(text), 97):
                file.write(text[i:i + 97]), file.flush()
                time.sleep(0.001)

    thread = threading.Thread(target=writer)
    thread.start()
    sent = track.track(path, "wandb", "p", tmp_path, follow=True, patience=20)
    thread.join()
    assert sent == 20 + 2 + 1 + 3 + 1 and tracker.finished == 1


def test_a_run_that_died_is_given_up(tracker, tmp_path, monkeypatch):
    monkeypatch.setattr(track, "POLL", 0.01)
    path = write(tmp_path / "x.jsonl", list(events())[:5])
    assert track.track(path, "wandb", "p", tmp_path, follow=True, patience=0.1) == 3 and tracker.finished == 1


def test_a_missing_tracker_is_named(logs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert track.main([str(logs / "control.s1.jsonl"), "--to", "wandb"]) == 2
    assert "pip install wandb" in capsys.readouterr().err


def test_no_tracker_is_imported_unasked():
    code = f"import sys; sys.path.insert(0, {str(RECORDS)!r}); import track; print(sorted({{'wandb','trackio','torch'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], text=True, capture_output=True).stdout.strip() == "[]"
