"""The rehearsal of the contest's evaluation (tests/gpu/rehearsal.*), on a CPU: its data, its table, and the whole script in small."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import load_by_path, write_shard
from test_process import SMALL, environment

GPU = Path(__file__).parent / "gpu"
rehearsal = load_by_path("rehearsal", GPU / "rehearsal.py")


def scripts(variables):
    """The environment of a script, whose python3 is the one that runs these tests."""
    return environment(variables) | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}


def documents(rng, count, longest=400):
    """Documents of very unequal lengths, each of tokens that say which it is."""
    return [np.concatenate(([1], rng.integers(2, 500, int(n)))) for n in rng.pareto(1.2, count).clip(0.3, longest / 20) * 20]


def shards(folder, val=5, train=(60, 70, 50), seed=0):
    """A bench in small: training shards begin and end in the middle of documents."""
    rng = np.random.default_rng(seed)
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate(documents(rng, val)))
    for i, count in enumerate(train):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", np.concatenate((rng.integers(2, 500, 7), *documents(rng, count), [1, 9, 9])))
    return folder


def cut(tokens):
    return [bytes(d.tobytes()) for d in np.split(tokens, np.flatnonzero(tokens == 1))[1:]]


@pytest.mark.parametrize("count, left", [(40, [0, 1]), (85, [0]), (150, [])])
def test_a_set_of_a_given_size_is_made_of_whole_documents(count, left, tmp_path):
    """Those of the bench's own set first, others from training shards that are not trained on; few shards are shared out."""
    data = shards(tmp_path / "bench")
    there = [rehearsal.read(data / f"fineweb_train_{i:06d}.bin") for i in range(3)]
    own = rehearsal.read(data / "fineweb_val_000000.bin")
    mean = sum(map(len, there)) / 180
    facts = rehearsal.build(data, tmp_path / "set", count, int(len(own) + (count - 5) * mean), 8)
    made = rehearsal.read(tmp_path / "set" / "fineweb_val_000000.bin")
    given = cut(made)
    assert facts["documents"] == len(given) == len(set(given)) == count and facts["tokens"] == len(made)
    assert abs(len(made) - (len(own) + (count - 5) * mean)) < 0.06 * len(made)  # few documents, among them long ones
    assert np.array_equal(made[:len(own)], own)
    whole = {d for tokens in there for d in cut(tokens)[:-1]}  # a shard's last one may be cut off
    assert set(given) <= whole | set(cut(own))
    links = sorted((tmp_path / "set").glob("fineweb_train_*.bin"))
    assert [p.name for p in links] == [f"fineweb_train_{i:06d}.bin" for i in range(8)]
    trained = {p.resolve() for p in links}
    assert trained == ({(data / f"fineweb_train_{i:06d}.bin").resolve() for i in left} or {(tmp_path / "set" / "rest.bin").resolve()})
    assert not set(given) & {d for p in trained for d in cut(rehearsal.read(p))}


@pytest.mark.parametrize("mean", [800, 1000, 1300])
def test_of_many_documents_the_total_is_met(mean):
    """And their lengths stay spread: a tilt of all weights, not a cut."""
    lengths = (np.random.default_rng(0).lognormal(6.2, 1.2, 60_000)).astype(int) + 2
    chosen = lengths[rehearsal.choose(lengths, 40_000, 40_000 * mean)]
    assert len(chosen) == 40_000 and abs(chosen.sum() / 40_000 / mean - 1) < 1e-3
    assert chosen.max() > 8000 and chosen.min() < 40


def test_the_set_is_the_same_again_and_takes_the_place_of_another(tmp_path):
    data = shards(tmp_path / "bench")
    for size in ((30, 2000, 4), (50, 3000, 2), (50, 3000, 2)):
        rehearsal.build(data, tmp_path / "set", *size)
        first, second = (tmp_path / "set" / "fineweb_val_000000.bin").read_bytes(), locals().get("first")
    assert first == second and len(list((tmp_path / "set").glob("fineweb_train_*"))) == 2


def test_too_few_documents_are_said_in_numbers(tmp_path):
    with pytest.raises(SystemExit, match="180 training documents .* 495 of"):
        rehearsal.build(shards(tmp_path / "bench", train=(60, 70, 50)), tmp_path / "set", 500, 20_000)
    with pytest.raises(SystemExit, match="more than 3"):
        rehearsal.build(tmp_path / "bench", tmp_path / "set", 3, 100)


def watched(folder, gpus=2, evaluated=400.0, used=60_000, verdict="verdict: legal: one pass", more=()):
    """What a run leaves behind, second by second."""
    lines = ["run_id:rehearsal", "validation: {'documents': 50000}", "warmup_step:1/4 looping:False at:9.0s", "launch_to_first_step:50.0s",
             "stopping_early: wallclock_cap train_time:58000ms step:900/1000000", "peak memory allocated: 30000 MiB reserved: 40000 MiB",
             "gptq:calibrated 66 layers in 1.5s", "Total submission size int6+auto: 15990000 bytes", "final_int6_roundtrip_exact val_loss:3.1 val_bpb:1.2",
             "final_int6_ttt_exact val_loss:3.0 val_bpb:1.1", "spans: train:58.00s", f"budget eval: {evaluated:.2f}s of 600s", *verdict.splitlines(), *more]
    events = [e for t, line in enumerate(lines) for e in (
        {"t": 10.0 * t, "line": line}, *({"t": 10.0 * t + 1, "gpu": g, "mib": used - 1000 * ("ttt" not in line) - g} for g in range(gpus)))]
    folder.mkdir(exist_ok=True)
    (folder / "watched.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


def test_the_table_tells_phases_from_each_other(tmp_path, capsys):
    assert rehearsal.report(2, watched(tmp_path)) == []
    seconds, memory = rehearsal.in_phases([json.loads(line) for line in (tmp_path / "watched.jsonl").read_text().splitlines()])
    assert list(seconds) == [name for name, _ in rehearsal.PHASES] and seconds["training"] == 10.0 and seconds["diagnostics, Hessians"] == 20.0
    assert memory["adaptation"] == {0: 60_000, 1: 59_999} and memory["training"] == {0: 59_000, 1: 58_999}
    told = capsys.readouterr().out
    for word in ("step:900/1000000", "allocated: 30000 MiB", "GPU 1 59999 MiB", "val_bpb:1.1", "verdict: legal", "all within the contest's limits"):
        assert word in told


@pytest.mark.parametrize("gpus, what, why", [
    (2, {"evaluated": 601.0}, "601.0 s of 600"), (1, {"evaluated": 601.0}, ""), (2, {"used": 81_560}, "81560 MiB"), (1, {"used": 81_559}, ""),
    (1, {"verdict": ""}, "0 verdicts"), (1, {"verdict": "verdict: FAILED: train budget overrun"}, "train budget"),
    (1, {"more": ["peak memory allocated: 1 MiB reserved: 90000 MiB"]}, "90000 MiB")], ids=str)
def test_what_the_contest_would_not_take_fails(gpus, what, why, tmp_path):
    broken = rehearsal.report(gpus, watched(tmp_path, gpus, **what))
    assert (why in broken[0]) if why else not broken


def test_the_whole_script_in_small(corpus, tmp_path):
    """Without a GPU: it builds a set, trains, adapts, and its table comes from what the program said."""
    data, shell = tmp_path / "bench", {"DATA": tmp_path / "bench", "OUT": tmp_path / "out", "TOKENIZER": corpus.tokenizer, "LIMIT": 100}
    data.mkdir()
    for path in corpus.data.glob("fineweb_*.bin"):
        (data / path.name).symlink_to(path)
    val, train = (rehearsal.read(next(corpus.data.glob(f"fineweb_{split}_*.bin"))) for split in ("val", "train"))
    count = int((val == 1).sum()) + 3
    shell["SET"] = f"{count} {len(val) + 3 * len(train) // int((train == 1).sum())} 4"
    knobs = SMALL | {"TTT_SLOTS": 2, "SLIDING_WINDOW_ENABLED": 0, "ITERATIONS": 4, "VAL_DOCS": 6}
    done = subprocess.run([str(GPU / "rehearsal.sh"), "0", *(f"{k}={v}" for k, v in knobs.items())], env=scripts(shell), capture_output=True, text=True, timeout=150)
    told = done.stdout
    assert done.returncode == 0, told + done.stderr + (tmp_path / "out" / "console.txt").read_text()[-2000:]
    assert f'"documents": {count}' in told and "training" in told and "final_int6_ttt_exact" in told and "exit status 0" in told
    assert told.count("verdict: ") == 1 and told.rstrip().endswith("all within the contest's limits")
    assert "nothing here reads" not in told  # the script's own variables stay out of the program's environment


class Card:
    """A GPU's memory as torch and the driver deal with it: two MiB at a time, and small tensors from pieces of twenty."""

    def __init__(self, total):
        self.total = self.left = total
        self.cuda = self
        self.uint8 = None

    def mem_get_info(self, gpu):
        return self.left, self.total

    def synchronize(self, gpu):
        pass

    def zeros(self, count, device):
        self.left -= (500 << 20) + (2 << 20)  # the context, too

    def empty(self, size, dtype, device):
        self.left -= -(-(size if size >= 10 << 20 else 20 << 20) // (2 << 20)) * (2 << 20)
        assert self.left >= 0


@pytest.mark.parametrize("gib", [24, 48, 80.5, 138.98])
def test_a_hog_leaves_what_it_was_told_to(gib, monkeypatch):
    hog, card = load_by_path("hog", GPU / "hog.py"), Card(143771 << 20)
    monkeypatch.setattr(hog, "torch", card)
    hog.take(0, int(gib * 2 ** 30))
    assert 0 <= card.left - gib * 2 ** 30 < 16 << 20
    with pytest.raises(SystemExit, match="fewer than 139.50"):
        hog.take(0, int(139.5 * 2 ** 30))


def test_ten_runs_are_counted_and_gone_on_with(corpus, tmp_path):
    """Two small ones side by side, on a CPU, through the wrapper that forces collections; made again, nothing is left to do."""
    shell = scripts({"DATA": corpus.data, "OUT": tmp_path, "TOKENIZER": corpus.tokenizer, "LIMIT": 150})
    knobs = [f"{k}={v}" for k, v in (SMALL | {"TTT_SLOTS": 2, "SLIDING_WINDOW_ENABLED": 0, "ITERATIONS": 3}).items()]
    for runs, seconds in (2, 120), (2, 30), (3, 30):
        if runs == 3:
            shell["LIMIT"] = "1"
        done = subprocess.run([str(GPU / "ten_runs.sh"), str(runs), "2", *knobs], env=shell, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == (runs == 3), done.stdout + done.stderr
        assert f"2 of {runs} runs ended with a good verdict" in done.stdout and done.stdout.count("verdict: ") == 2
        assert done.stdout.count("forced collections: 0 inside") == 2 and ("run 3: not begun" in done.stdout) == (runs == 3)
