"""Faults that an audit of this program found, one test each: those that no other file tests, and where the others are.

fault -> the test that would find it
sidecars of the contest's own scripts refused -> test_audit.py::test_the_contests_own_shards_are_read
operators counted as text -> test_audit.py::test_operators_without_their_sidecar_are_refused
legal, whatever the cap, the clock and the set -> test_audit.py::test_the_verdict_names_what_is_not_the_contests
a validation set that lacks its first or last shard -> test_audit.py::test_a_missing_validation_shard_is_noticed
the lowest of several passes as the score -> test_audit.py::test_the_score_is_the_configured_pass_and_not_the_lowest
schedules of fast machines follow steps -> test_audit.py::test_schedules_follow_the_clock_however_fast_the_machine
another batch for another number of ranks -> test_audit.py::test_any_number_of_ranks_takes_the_same_batches
adaptation's attention too large for a GPU -> test_kernels.py::test_adaptations_attention_takes_the_first_tile_that_runs
adaptation too large for a GPU -> test_audit.py::test_slots_take_turns_where_memory_is_short
slots in groups that score otherwise -> test_slots.py::test_slots_in_groups_score_alike
graphs that only the cycle collector frees -> test_audit.py::test_recorded_rows_are_freed_without_the_cycle_collector
graphs of the evaluation likewise -> test_audit.py::test_a_pass_with_adaptation_frees_all_it_recorded
zeros for large gains -> test_audit.py::test_attention_bears_large_gains
no Triton, or a broken one -> test_audit.py::test_a_broken_triton_leaves_the_program_importable
compiled code without Triton -> test_audit.py::test_nothing_is_compiled_where_triton_is_missing
compiling on validation text in training -> test_audit.py::test_diagnostics_compile_on_random_tokens
progress lines that cost time on every rank -> test_audit.py::test_only_rank_0_computes_progress
more shards than open files -> test_audit.py::test_more_shards_than_a_process_may_open
lanes lost in a loop -> test_config.py::test_lanes_are_refused_just_where_a_visit_would_lose_them
knobs that break only after training -> test_config.py::test_rule_refuses
sections that unpack without end -> test_audit.py::test_no_more_is_unpacked_than_a_section_says
malformed files that end in a traceback -> test_audit.py::test_a_malformed_artifact_ends_in_one_line
weights of one shape that fill another -> test_audit.py::test_weights_of_another_shape_fill_nothing
stored numbers beyond their bounds -> test_audit.py::test_stored_numbers_are_checked
a checkpoint on a full disk -> test_audit.py::test_a_checkpoint_on_a_full_disk_costs_only_itself
the last step's loss not in the log -> test_audit.py::test_the_last_step_is_logged
validation's checksum in the counted file -> test_audit.py::test_the_artifact_knows_nothing_of_the_validation_text
other arithmetic than asked for, unsaid -> test_audit.py::test_products_in_another_precision_than_asked_are_a_caveat
half an hour for a dead rank -> test_audit.py::test_ranks_wait_ten_minutes
several nodes -> test_world.py::test_two_nodes_train_one_model
a limit of recompilations -> test_audit.py::test_every_shape_of_rows_may_be_compiled
a row of very many segments -> test_audit.py::test_a_row_of_many_segments_makes_room_for_the_next
a Hessian of NaN -> test_audit.py::test_a_hessian_that_is_not_finite_is_called_so
every new tensor filled with NaN -> test_audit.py::test_test_time_training_fills_no_tensors
no advice when memory ends -> test_goes_on.py::test_out_of_memory_is_answered_with_a_knob_and_a_value
two threads and one order -> test_audit.py::test_a_block_comes_from_one_reading_of_the_order
one step cut ahead -> test_audit.py::test_four_steps_are_cut_ahead
deprecated collectives -> test_audit.py::test_two_ranks_step_as_one_without_a_warning
hints checked at sixteen places -> test_audit.py::test_hints_are_checked_at_many_places
"""

import ast
import contextlib
import dataclasses
import datetime
import gc
import hashlib
import json
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import types
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, config, make_run, write_shard
from contest_writer import sample_documents, write_caseops
from test_ledger import validation
from test_slots import Documents, build
from test_variants import live, shards, toy  # noqa: F401 (fixture)
from toy import one_thread, quiet_run, small, tg  # noqa: F401 (fixture)


def test_every_test_of_the_table_exists():
    rows = re.findall(r"^(\S.+) -> (\S+\.py)::(test_\w+)$", __doc__, re.M)
    assert len(rows) == __doc__.count(" -> ") - 1, "every line but the table's head is read"
    folder = Path(__file__).parent
    defined = {
        file: {
            n.name
            for n in ast.walk(ast.parse((folder / file).read_text(encoding="utf-8")))
            if isinstance(n, ast.FunctionDef)
        }
        for _, file, _ in rows
    }
    assert not [f"{file}::{name}" for _, file, name in rows if name not in defined[file]]


def python(code, folder, **env):
    """What a fresh process prints for this code, started beside the program; it must end well."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "OMP_NUM_THREADS": "1",
            **env,
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Bytes
# ----------------------------------------------------------------------------------------------------------------------
# one odd character in some hundreds, as in text of the web
DOCS = [
    f"{text} {'the weather was wonderful while we were walking there ' * 8}end" for text in sample_documents(160, 3)
]


def opened(said):
    """The validation set of a folder that the contest's writer made."""
    cfg = config(**said["env"], VAL_DOCS=0)
    return tg.ValidationSet(cfg, tg.Tokenizer(cfg.tokenizer, cfg.vocab_size))


def test_the_contests_own_shards_are_read(tmp_path):
    """Bytes of a character in byte fallback stand on its last piece, and bytes are those before NFKC."""
    said = write_caseops(tmp_path, DOCS)
    val = opened(said)
    assert val.bytes.sum() == said["bytes"] and "byte sidecar equals the table but for " in val.oracle


def test_operators_without_their_sidecar_are_refused(tmp_path):
    said = write_caseops(tmp_path, DOCS, sidecar=False)
    with pytest.raises(SystemExit, match=r"validation tokens are case operators .* Such data come with byte sidecars"):
        opened(said)


def test_a_missing_validation_shard_is_noticed(tmp_path):
    """Of shards 0 to 3 the first, one between, or the last, which alone is shorter than the others."""
    sizes = {0: 8, 1: 8, 2: 8, 3: 5}
    for lost in (None, *sizes):
        folder = tmp_path / f"without_{lost}"
        for i in sizes.keys() - {lost}:
            write_shard(folder / f"fineweb_val_{i:06d}.bin", np.arange(1, 1 + sizes[i]))
        with (
            contextlib.nullcontext()
            if lost is None
            else pytest.raises(SystemExit, match=f"fineweb_val_{lost or 0:06d}.bin")
        ):
            assert len(tg.find_shards(folder, "val")) == 4


# ----------------------------------------------------------------------------------------------------------------------
# What a run is judged by
# ----------------------------------------------------------------------------------------------------------------------
def judged(cfg, folder, val, bpb):
    """(last line, the line of the score) of a finished run with these scores by pass."""
    run = make_run(folder, cfg)
    run.open_log(cfg)
    scores = {name: tg.Score(1.0, b, 1.0, "fine", np.zeros(1)) for name, b in bpb.items()}
    tg.finish(cfg, run, val, scores, 1000)
    run.close()
    lines = run.path(".txt").read_text(encoding="utf-8").splitlines()
    return (
        lines[-1],
        next(line for line in lines[::-1] if line.startswith("val_bpb:")),
        json.loads(run.path(".score.json").read_text()),
    )


def validation_of(documents, size):
    """As much of a validation set as a verdict looks at."""
    return types.SimpleNamespace(bytes=np.array([size]), starts=np.zeros(documents))


def test_the_verdict_names_what_is_not_the_contests(tmp_path):
    cfg = config(
        ARTIFACT_MAX_BYTES=999_999_999, EVAL_WALLCLOCK_SECONDS=0, MAX_WALLCLOCK_SECONDS=0, ITERATIONS=5, VAL_DOCS=8
    )
    verdict, _, score = judged(cfg, tmp_path, validation_of(8, 12345), {"full": 1.0})
    caveat = (
        "not the contest's: training without a clock, evaluation without a clock, cap of 999999999 bytes, "
        "8 documents of 50000, "
        "12345 bytes of text of about 151.07 million, world 1 of 8, on a CPU"
    )
    assert verdict == (
        "verdict: legal: score-first, one pass, full distribution, budgets and bytes within their limits; but " + caveat
    )
    assert score["caveats"] == [caveat]


@pytest.mark.parametrize(
    "change, told",
    [
        ({}, None),
        ({"max_wallclock_seconds": 600.5}, "training of 600.5 s"),
        ({"deterministic": True}, "training without a clock"),
        ({"eval_wallclock_seconds": 1200.0}, "evaluation of 1200 s"),
        ({"artifact_max_bytes": 16_000_001}, "cap of 16000001 bytes"),
        ({"documents": 49_999}, "49999 documents of 50000"),
        ({"size": 164_600_000}, "164600000 bytes of text of about 151.07 million"),
        ({"world": 1}, "world 1 of 8"),
        ({"device": "NVIDIA H200"}, "on NVIDIA H200"),
    ],
    ids=str,
)
def test_only_the_contests_own_run_has_nothing_to_add(change, told, tmp_path, monkeypatch):
    """Eight H100s, ten minutes each, 16 MB, the whole set; then one thing after the other is another."""
    there = dict(documents=50_000, size=151_074_309, world=8, device="NVIDIA H100 80GB HBM3")
    own = {k: change.get(k, v) for k, v in there.items()}
    cfg = dataclasses.replace(config(PRESET="record"), **{k: v for k, v in change.items() if k not in there})
    run = make_run(tmp_path, cfg, world=own["world"])
    monkeypatch.setattr(tg.Run, "gpu", True)
    monkeypatch.setattr(tg.Run, "device_name", own["device"])
    found = tg.not_the_contests(cfg, run, validation_of(own["documents"], own["size"]))
    assert found == ([] if told is None else [f"not the contest's: {told}"])


@pytest.mark.parametrize(
    "passes, reported",
    [
        ({"full": 1.0, "sliding": 1.1, "ttt": 1.2}, "ttt"),
        ({"full": 1.0, "sliding": 1.1}, "sliding"),
        ({"full": 1.3}, "full"),
    ],
    ids=str,
)
def test_the_score_is_the_configured_pass_and_not_the_lowest(passes, reported, tmp_path):
    _, line, score = judged(config(), tmp_path, validation_of(8, 100), passes)
    assert line == f"val_bpb:{passes[reported]:.8f} bytes_total:1000"
    assert score["headline"] == reported and score["finished"] is True and set(score["results"]) == set(passes)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------
class Anything:
    """Stands for what a test does not look at."""

    def __init__(self, **known):
        self.__dict__.update(known)

    def __getattr__(self, name):
        return Anything()

    def __call__(self, *args, **named):
        return Anything()

    def __getitem__(self, at):
        return ()


@pytest.mark.parametrize("speed", [1.0, 2.0])
def test_schedules_follow_the_clock_however_fast_the_machine(speed, tmp_path, monkeypatch):
    """Eight H100s take 15,000 steps in ten minutes, and later ones more: a count of steps has no say in it."""
    cfg, seen, reserve = tg.load_config({}, True), [], 5.3
    run, clock = make_run(tmp_path, cfg), types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(
        run,
        "clock",
        Anything(read=lambda *names: clock.now, span=lambda name: contextlib.nullcontext(), switch=lambda name: name),
    )
    sizes = {until: tg.step_blocks(cfg, share) * cfg.pack_tokens for until, share in cfg.batch_shares}

    def step(model, optimizers, batches, v, tokens):
        clock.now += tokens / ((6.5e6 if v.looping else 8.9e6) * speed)
        model.looping = v.looping
        return torch.zeros(()), torch.zeros(())

    def get(p):
        seen.append((clock.now / (cfg.max_wallclock_seconds - reserve), p))
        return [], next(size for until, size in sizes.items() if p < until)

    for name in ("Optimizers", "Average", "Checkpoints", "report_training"):
        monkeypatch.setattr(tg, name, lambda *args: Anything(last=0.0, idle=False))
    monkeypatch.setattr(tg, "Watch", lambda *args: Anything(pending=(), pace=lambda: 0.0))
    monkeypatch.setattr(tg, "warm_up", lambda *args: reserve)
    monkeypatch.setattr(tg, "train_step", step)
    tg.train(Anything(looping=False, plans=((), ())), cfg, run, Anything(get=get), None)
    assert 14_500 * speed < len(seen) < 15_500 * speed
    assert all(p == pytest.approx(by_clock, abs=1e-9) for by_clock, p in seen) and seen[-1][1] > 0.99


def stream_of(folder, rank, world, **env):
    cfg = config(
        PRESET="record",
        DATA_PATH=folder,
        PACK_TOKENS=16,
        TRAIN_BATCH_TOKENS=48 * 16,
        MICRO_BATCH_TOKENS=128,
        VOCAB_SIZE=1000,
        **env,
    )
    return tg.TrainStream(cfg, make_run(folder, cfg, rank, world))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """48 blocks of 16 tokens for each of 40 steps, no two of them alike."""
    tokens = np.random.default_rng(0).integers(2, 1000, 48 * 40 * 16 + 1)
    tokens[::97] = tg.BOS
    folder = tmp_path_factory.mktemp("numbers")
    write_shard(folder / "fineweb_train_000000.bin", tokens)
    return folder


@pytest.mark.parametrize("p, blocks", [(0.0, 12), (0.5, 24), (0.9, 48)], ids=str)
def test_any_number_of_ranks_takes_the_same_batches(p, blocks, numbers):
    """A quarter of 48 blocks is no whole number for each of 8 ranks, nor for 16, of which some then have none."""
    taken = {}
    for world in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48):
        taken[world] = []
        streams = [stream_of(numbers, rank, world) for rank in range(world)]
        for _ in range(2):
            shares = [s.get(p) for s in streams]
            assert {tokens for _, tokens in shares} == {blocks * 16}
            taken[world].append(torch.cat([b.ids for batches, _ in shares for b in batches]).tolist())
    assert all(len(step) == blocks * 16 for step in taken[1]) and all(own == taken[1] for own in taken.values())


def test_four_steps_are_cut_ahead(numbers):
    stream = stream_of(numbers, 0, 1)
    stream.get(0.0)
    ready = {place: [b.ids.tolist() for b in ahead.result()] for (place, *_), ahead in stream.ahead.items()}
    assert sorted(ready) == [12, 24, 36, 48]
    assert [[b.ids.tolist() for b in stream.get(0.0)[0]] for _ in range(4)] == [ready[place] for place in sorted(ready)]


def test_a_block_comes_from_one_reading_of_the_order(numbers):
    """Calibration and a late prefetch may be in another epoch on another thread."""
    stream = stream_of(numbers, 0, 1)
    expected, epochs = stream.block_at(5).tolist(), [stream.order, (1, stream.order[1][::-1].copy())]
    assert stream.block(int(epochs[1][1][5])).tolist() != expected

    class Restless(tg.TrainStream):
        @property
        def order(self):
            return epochs[0] if not reads.append(0) and len(reads) % 2 else epochs[1]

        @order.setter
        def order(self, value):
            pass

    reads = []
    stream.__class__ = Restless
    assert stream.block_at(5).tolist() == expected


def test_a_row_of_many_segments_makes_room_for_the_next(numbers, monkeypatch):
    """A row with more than twice the segments that were expected must leave a shape that a later one fits."""
    stream = stream_of(numbers, 0, 1)
    stream.rooms[40] = 64
    blocks = [np.full(17, tg.BOS)] * 40  # each token a document
    first, second = stream.row(blocks, 16), stream.row([np.full(17, tg.BOS)] * 39 + [np.arange(17) + 2], 16)
    assert len(first.cu) == len(second.cu) == stream.rooms[40] + 1 >= 641


def test_more_shards_than_a_process_may_open(tmp_path):
    for i in range(300):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", np.full(17, 2 + i))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        stream = stream_of(tmp_path, 0, 1)
        assert sorted(int(stream.block_at(i)[0]) for i in range(300)) == list(range(2, 302))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def lived(shards, tmp_path_factory):
    """Twelve steps to an artifact and its score."""
    return live(
        toy("record", ITERATIONS=12, TRAIN_LOG_EVERY=100, TTT_ENABLED=0, DATA_PATH=shards),
        tmp_path_factory.mktemp("lived"),
    )


def test_the_last_step_is_logged(lived):
    steps = re.findall(r"^step:(\d+)/12 train_loss", lived[0].path(".txt").read_text(), re.M)
    assert steps == [str(i) for i in (*range(1, 11), 12)]


def test_the_artifact_knows_nothing_of_the_validation_text(lived):
    data, val = lived[-1]
    manifest = tg.read_artifact(data)[0]
    assert "validation" not in manifest and val.fingerprint()["sha256"] not in json.dumps(manifest)


def test_a_checkpoint_on_a_full_disk_costs_only_itself(tmp_path, monkeypatch):
    cfg = small()
    run, model = make_run(tmp_path, cfg), tg.GPT(cfg)
    tg.initialize(model, cfg)
    checkpoints = tg.Checkpoints(model, tg.Average(cfg, model), cfg, run)

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tg, "write_atomic", full)
        checkpoints.save(1, 0.0)
        checkpoints.release(2)
        assert checkpoints.wait() is False
    checkpoints.save(2, 1.0)
    checkpoints.release(3)
    assert checkpoints.wait() is True and torch.load(run.path(".ckpt"), weights_only=True)["step"] == 2


HALF = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import make_run, tiny, trainer
tg = trainer()
cfg = tiny(RUN_ID="half", VOCAB_SIZE=8192)
model = tg.GPT(cfg)
tg.initialize(model, cfg)
saved = tg.Checkpoints(model, tg.Average(cfg, model), cfg, make_run(Path(sys.argv[2]), cfg))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
saved.save(0, 0.0)
saved.release(1)
print(saved.wait())
"""


def test_a_disk_that_fills_in_the_middle_of_a_checkpoint_costs_only_the_checkpoint(tmp_path):
    """torch.save makes a RuntimeError of it, which says nothing of a disk."""
    done = subprocess.run([sys.executable, "-c", HALF, str(ROOT / "tests"), str(tmp_path)], text=True, capture_output=True)
    assert done.stdout.split() == ["False"], done.stdout + done.stderr


def test_scores_that_cannot_be_written_do_not_end_the_evaluation(tmp_path, monkeypatch):
    cfg = small()
    run, told = make_run(tmp_path, cfg), []
    monkeypatch.setattr(run, "warn", told.append)

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tg, "write_atomic", full)
    score = tg.Score(1.0, 2.0, 3.0, "", np.zeros(1))
    assert tg.write_scores(run, cfg, {"full": score}, None, False)["headline"] == "full"
    assert len(told) == 1 and "scores not written" in told[0]


def test_files_hold_what_was_asked_and_not_what_memory_made_of_it(tmp_path):
    """An artifact of a large GPU is packed again on a small one: rows that fit there are found there."""
    asked = config(PRESET="record")
    run = make_run(tmp_path, asked)
    resolved = dataclasses.replace(asked, micro_batch_tokens=65536)
    assert asked.micro_batch_tokens == 0 == tg.stored_config(resolved, run)["micro_batch_tokens"]
    assert {k: v for k, v in tg.stored_config(resolved, run).items() if k != "micro_batch_tokens"} == {
        k: v for k, v in resolved.as_dict().items() if k != "micro_batch_tokens"
    }


@pytest.mark.parametrize("world, batch, schedule", [(8, 48, "0.25:.4,0.3:.8"), (8, 16, "0.4:.4,0.5:.8"), (4, 8, "0.5:.4,0.75:.8")])
def test_a_rank_meets_no_row_that_it_has_not_warmed_up_with(world, batch, schedule):
    """Two stages can have the same two shapes of rows over all ranks, and not the same on each of them."""
    cfg = config(PRESET="record", PACK_TOKENS=1024, TRAIN_BATCH_TOKENS=1024 * batch, TRAIN_BATCH_SCHEDULE=schedule, WORLD_SIZE=world)
    for rank in range(world):
        def row(blocks):
            return tg.micro_blocks(cfg, len(tg.rank_blocks(blocks, rank, world)))
        met = {(row(tg.step_blocks(cfg, tg.stage_at(cfg.batch_shares, p))), p >= cfg.enable_looping_at) for p in np.linspace(0, 0.999, 500)}
        assert met <= {(row(blocks), looping) for blocks, looping in tg.graphs(cfg, world)}


def test_products_in_another_precision_than_asked_are_a_caveat(tmp_path, monkeypatch):
    """A GPU without our FP8 kernels: another recipe than its hash says."""
    cfg, told = config(PRESET="record"), []
    run = make_run(tmp_path, cfg)
    monkeypatch.setattr(tg.Run, "gpu", True)
    monkeypatch.setattr(run, "warn", told.append)
    monkeypatch.setattr(tg, "choose_attention", lambda *args: tg.attention_eager)
    assert cfg.fp8 == "mlp" and tg.choose_kernels(cfg, run).mlp is tg.mlp_eager
    assert any("products run in bf16" in text for text in told) and run.caveats == [
        "products in bf16 where FP8=mlp was asked for"
    ]


def test_a_hessian_that_is_not_finite_is_called_so():
    h = torch.eye(8)[None].repeat(2, 1, 1)
    for bad in (float("nan"), float("inf")):
        h[1, 2, 3] = bad
        with pytest.raises(RuntimeError, match="Hessian is not finite"):
            tg.factor_hessians(h)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks
# ----------------------------------------------------------------------------------------------------------------------
def test_ranks_wait_ten_minutes(monkeypatch):
    told = []
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tg.dist, "init_process_group", lambda *args, **named: told.append(named))
    monkeypatch.setattr(tg.Run, "open_log", None)
    with contextlib.suppress(Exception):  # what follows wants the group
        tg.Run(config(), (0, 0, 2), quiet=True)
    assert told == [{"timeout": datetime.timedelta(minutes=10)}]


TWO = """
import json, os, sys, warnings
rank, world, port = map(int, sys.argv[1:])
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
import torch
from toy import lively, small, tg
from test_model import make_row
torch.set_num_threads(1)
shares = [[0], [1, 2]] if world == 2 else [[0, 1, 2]]
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    cfg = small()
    run = tg.Run(cfg, (rank, rank, world), quiet=True)
    model = lively(cfg)
    optimizers = tg.Optimizers(model, cfg, run)
    for turn in (0, 1):  # unequal shares, then one that is empty
        mine = shares[rank] if not turn else [3] * (rank == world - 1)
        rows = [make_row(run, seed=seed) for seed in mine]
        tokens = len(make_row(run).ids) * (3 if not turn else 1)
        loss, norm = tg.train_step(model, optimizers, rows, tg.Values(1.0, 0.9, True), tokens)
        loss = float(run.sum_(loss.clone()))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    run.close()
told = [str(w.message) for w in told if issubclass(w.category, FutureWarning)]
with open(f"{rank}of{world}.json", "w") as file:  # the console is also the ranks' that wait for each other
    json.dump([loss, float(norm), weights.tolist(), told], file)
"""


def test_two_ranks_step_as_one_without_a_warning(tmp_path):
    """By the collectives themselves, over gloo; torch 2.13 has given two of them other names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, *map(str, (rank, world, port))],
            cwd=tmp_path,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for world in (2, 1)
        for rank in range(world)
    ]
    ended = [p.communicate(timeout=120) for p in started]
    assert [p.returncode for p in started] == [0, 0, 0], ended
    one, other, alone = (json.loads((tmp_path / name).read_text()) for name in ("0of2.json", "1of2.json", "0of1.json"))
    assert one == other and not one[3], "no warning, equal weights"
    assert one[:2] == pytest.approx(alone[:2], rel=1e-4)
    np.testing.assert_allclose(one[2], alone[2], atol=2e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("free, world", [(16, 1), (22, 1), (44, 1), (78, 1), (140, 1), (78, 8)], ids=str)
def test_slots_take_turns_where_memory_is_short(free, world):
    """The record's 512 slots are 50 GB on one GPU; each group of them fits, and no more are made than needed."""
    cfg, run = config(PRESET="record"), types.SimpleNamespace(gpu=True, free_bytes=lambda: free * 2.0**30)
    slots = 512 // world
    size, groups = tg.slot_bytes(cfg, run), tg.slot_groups(cfg, run, slots)
    assert 512 * size > 45e9, "as keys, values and adapters alone are"
    assert -(-slots // groups) * size <= 0.85 * free * 2**30
    assert groups == 1 or -(-slots // (groups - 1)) * size > 0.85 * free * 2**30
    assert (groups == 1) == (free == 140 or world == 8 or 512 * size <= 0.85 * free * 2**30)


@contextlib.contextmanager
def counted_only():
    """No cycle collector: what is gone now is gone by its references."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_recorded_rows_are_freed_without_the_cycle_collector(run):
    from test_model import make_row

    cfg = small()
    model = tg.GPT(cfg)
    tg.initialize(model, cfg)
    with counted_only():
        optimizers = tg.Optimizers(model, cfg, run)
        tg.train_step(model, optimizers, [make_row(run)], tg.Values(1.0, 0.9, True))
        rows, grads = weakref.ref(optimizers.rows), [weakref.ref(g) for g in optimizers.rows.grads]
        kept = [weakref.ref(t) for row, _ in optimizers.rows.rows.values() for t in row if torch.is_tensor(t)]
        assert kept and grads
        optimizers.rows.free()
        assert not any(ref() is not None for ref in (*kept, *grads)), (
            "the rows themselves, also while the optimisers live"
        )
        del optimizers
        assert rows() is None


@pytest.fixture(scope="module")
def run():
    return quiet_run(small())


def test_a_pass_with_adaptation_frees_all_it_recorded(tmp_path, monkeypatch):
    model, cfg, run = build(tmp_path, PHASED_TTT_NUM_PHASES=2, GLOBAL_TTT_CHUNK_TOKENS=64)
    made = []
    for kind in (tg.DocumentScorer, tg.RowGradients, tg.Slots):

        def remember(self, *args, start=kind.__init__):
            made.append(weakref.ref(self))
            start(self, *args)

        monkeypatch.setattr(kind, "__init__", remember)
    with counted_only():
        tg.score_documents(model, Documents(), cfg, run, 0.0)
        assert len(made) == 3 and not [type(ref()).__name__ for ref in made if ref() is not None]


# ----------------------------------------------------------------------------------------------------------------------
# Kernels, compiled code
# ----------------------------------------------------------------------------------------------------------------------
GAIN = """
import json
import torch
from triton.runtime import interpreter
from conftest import trainer
patch = interpreter._patch_lang_tensor
def patched(tensor, scope):
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())
interpreter._patch_lang_tensor = patched
tg, wrong = trainer(), {}
torch.set_num_threads(1), torch.manual_seed(0)
borders = torch.tensor([0, 40, 64], dtype=torch.int32)
cu = tg.segment_bounds(borders, 64)
k, v, q = tg.norm(torch.randn(64, 1, 128)), torch.randn(64, 1, 128), tg.norm(torch.randn(64, 2, 128))
for gain in (5.0, 10.0, 14.0, 18.0, 20.0, 24.0, 30.0):
    got, expected = tg.attention_triton(q * gain, k, v, cu, 64), tg.attention_eager(q * gain, k, v, borders, 64)
    wrong[gain] = int(((got - expected).abs().amax(-1) > 0.05).sum())
print(json.dumps(wrong))
"""


def test_attention_bears_large_gains(tmp_path):
    """Nothing keeps a trained gain below 7; at 24 every row of a head of 128 was zero, and nobody was told."""
    pytest.importorskip("triton")
    wrong = json.loads(python(GAIN, tmp_path, TRITON_INTERPRET="1"))
    assert len(wrong) == 7 and not any(wrong.values()), wrong


@pytest.mark.parametrize(
    "broken", ["raise ImportError('built for another machine')", "raise RuntimeError('no driver')", "language = None"]
)
def test_a_broken_triton_leaves_the_program_importable(broken, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(broken + "\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert (
        python(
            "import train_gpt as t; print(t.HAVE['triton'], t.Kernels().mlp is t.mlp_eager)", tmp_path, PYTHONPATH=path
        )
        == "False True\n"
    )


def test_nothing_is_compiled_where_triton_is_missing(run, monkeypatch):
    """The inductor needs it on a GPU; without it the first step of the warm-up would end the run."""
    cfg, told = small(), []
    model = tg.GPT(cfg)
    before = model.run
    monkeypatch.setattr(tg.Run, "gpu", True)
    monkeypatch.setattr(run, "warn", told.append, raising=False)
    monkeypatch.setitem(tg.HAVE, "triton", False)
    assert cfg.compile_scope == "auto"
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    try:
        tg.compile_model(model, cfg, run, 3)
    finally:
        torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits
    assert model.run is before
    assert told == [
        "torch.compile does not work here (Triton is missing, or cannot be imported): everything runs eagerly, "
        "several times slower"
    ]


@pytest.mark.parametrize("shapes", [1, 3, 40])
def test_every_shape_of_rows_may_be_compiled(shapes, run, monkeypatch):
    """Eight variants a shape of rows in training, seven in scoring: one beyond the limit ends a run."""
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    try:
        tg.compile_model(tg.GPT(small()), small(), run, shapes)
        assert torch._dynamo.config.recompile_limit >= max(64, 8 * shapes + 7)
        assert torch._dynamo.config.accumulated_recompile_limit >= 4 * torch._dynamo.config.recompile_limit
    finally:
        torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------
def test_diagnostics_compile_on_random_tokens(tmp_path, monkeypatch):
    """MODE=train scores the validation set before evaluation warms up: what compiles then must not see its text."""
    model, cfg, run = build(tmp_path)
    docs, seen, plain = validation(seed=1), [], tg.score_windows
    monkeypatch.setattr(
        tg, "score_windows", lambda model, val, *rest: (seen.append(val.tokens), plain(model, val, *rest))[1]
    )
    monkeypatch.setattr(run, "scorer_ready", False, raising=False)
    for _ in "ab":
        tg.diagnose(model, docs, cfg, run, "test")
    assert len(seen) == 3 and seen[1] is seen[2] is docs.tokens
    both = min(len(seen[0]), len(docs.tokens))
    assert both > 100 and (seen[0][:both] == docs.tokens[:both]).mean() < 0.1


def test_only_rank_0_computes_progress(tmp_path):
    """It waits for the device queue, and sums over the whole set."""
    model, cfg, run = build(tmp_path)
    scorer = tg.Scorer(model, Documents(), cfg, run)
    scorer.told, said = -100.0, []
    run.rank, run.log = 1, said.append
    scorer.report(10, "what", None)  # nothing is asked of the numbers
    run.rank = 0
    nll = torch.zeros(scorer.val.targets)
    nll[:10] = 2.0
    scorer.report(10, "what", nll)
    assert len(said) == 1 and f"tokens:10/{scorer.val.targets} running_bpb:{2 / np.log(2):.4f} " in said[0]


def test_test_time_training_fills_no_tensors():
    """torch fills each new tensor with NaN in its deterministic mode, which is one more pass over it."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with tg.deterministic(config()):
        assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
    assert (
        torch.utils.deterministic.fill_uninitialized_memory is fills
        and not torch.are_deterministic_algorithms_enabled()
    )


def test_hints_are_checked_at_many_places(tmp_path, monkeypatch):
    """On a GPU, where one check is a scan of a millisecond."""
    model, cfg, run = build(tmp_path, NGRAM_TILT_BOOST=1.0, NGRAM_TILT_ORDER=1, NGRAM_TILT_THRESHOLD=0.1)
    docs, seen, define = Documents((900, 300)), set(), tg.hint_by_definition
    scorer = tg.Scorer(model, docs, cfg, run)
    monkeypatch.setattr(tg, "hint_by_definition", lambda *args: (seen.add(args[4]), define(*args))[1])
    monkeypatch.setattr(tg.Run, "gpu", True)
    scorer.plan_hints(tg.planned_moments(tg.document_plan(docs.sequences, cfg), docs.targets))
    assert len(seen) == 1000


# ----------------------------------------------------------------------------------------------------------------------
# Files from elsewhere
# ----------------------------------------------------------------------------------------------------------------------
def sealed(body):
    """An artifact's bytes around a body, with the right checksum: the checksum is nobody's signature."""
    return tg.ARTIFACT_MAGIC + hashlib.sha256(body).digest() + body


def section(raw, said=None):
    """One section of a body, coded with zlib; its header may say another raw size."""
    packed = zlib.compress(raw, 9)
    return struct.pack("<BII", 0, len(raw) if said is None else said, len(packed)) + packed


def body_of(*sections):
    return struct.pack("<I", len(sections)) + b"".join(sections)


def test_no_more_is_unpacked_than_a_section_says(tmp_path):
    """15 KB that say they are ten bytes, and are 200 MB."""
    data = sealed(body_of(section(b" " * 200_000_000, 10)))
    path = tmp_path / "bomb"
    path.write_bytes(data)
    code = (
        "import resource, train_gpt as t\n"
        "def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "data, before = open('bomb', 'rb').read(), most()\n"
        "try: t.read_artifact(data)\n"
        "except SystemExit as e: print(most() - before, e)\n"
    )
    assert len(data) < 300_000
    grown, _, message = python(code, tmp_path).partition(" ")
    assert int(grown) < 100_000 and message.startswith("artifact: "), (grown, message)


def packed(manifest, *more):
    return sealed(
        body_of(
            section(manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()), *map(section, more)
        )
    )


HALVES = np.ones(12, "<f2").tobytes()
MALFORMED = {
    "nothing": sealed(b""),
    "no sections": sealed(struct.pack("<I", 0)),
    "more sections than bytes": sealed(struct.pack("<I", 1 << 30)),
    "a section beyond the end": sealed(struct.pack("<I", 1) + struct.pack("<BII", 0, 10, 1 << 31)),
    "no zlib": sealed(struct.pack("<I", 1) + struct.pack("<BII", 0, 4, 4) + b"abcd"),
    "no JSON": packed(b"{"),
    "no UTF-8": packed(b"\xff\xfe"),
    "a list": packed([1, 2]),
    "empty": packed({}),
    "halves alone": packed({"halves": {}}),
    "halves that are numbers": packed({"halves": {"a": 3}, "integers": {}}, HALVES),
    "a shape of text": packed({"halves": {"a": ["x"]}, "integers": {}}, HALVES),
    "a negative shape": packed({"halves": {"a": [-3, -4]}, "integers": {}}, HALVES),
    "a huge shape": packed({"halves": {"a": [1 << 62, 4]}, "integers": {}}, HALVES),
    "too small a shape": packed({"halves": {"a": [5]}, "integers": {}}, HALVES),
    "a fractional shape": packed({"halves": {"a": [1.5, 8]}, "integers": {}}, HALVES),
    "integers without their section": packed({"halves": {"a": [12]}, "integers": {"b": [3, 4]}}, HALVES),
    "integers of another size": packed({"halves": {"b": [12]}, "integers": {"b": [12, 9]}}, HALVES, b"\1" * 12),
    "a range coder without a stream": packed(
        {"halves": {"b": [12]}, "integers": {"b": [12, 9]}, "coder": "range"}, HALVES
    ),
    "deep": packed(b"[" * 100_000),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_artifact_ends_in_one_line(name):
    with pytest.raises(SystemExit, match="^artifact"):
        tg.read_artifact(MALFORMED[name])


@pytest.mark.parametrize("shape", [(1,), (32, 1), (1, 32), (33,), (2, 16)], ids=str)
def test_weights_of_another_shape_fill_nothing(shape):
    """copy_ broadcasts: one number would become a whole matrix."""
    model = torch.nn.Linear(32, 32, bias=False)
    before = model.weight.detach().clone()
    with pytest.raises((SystemExit, RuntimeError), match="weight"):
        tg.load_weights(model, {"weight": torch.zeros(shape)})
    assert torch.equal(model.weight, before)


def test_stored_numbers_are_checked():
    """A file can say anything: its configuration is held to the bounds of every knob, and to its kind."""
    stored, path = config().as_dict(), Path("some.artifact")
    for name, value in {"mlp_mult": 1e5, "num_layers": -3, "vocab_size": 1 << 20, "attn_gate": "nonsense"}.items():
        with pytest.raises(SystemExit, match=f"{name.upper()}={value}"):
            tg.restore_config({}, {**stored, name: value}, path)
    for name, value in {"num_layers": None, "model_dim": [512], "ttt_enabled": "x", "seed": {}}.items():
        with pytest.raises(SystemExit, match=name.upper()):
            tg.restore_config({}, {**stored, name: value}, path)


TEAM = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from conftest import make_run, tiny, trainer
tg = trainer()
torch.set_num_threads(2)
torch.ones(1 << 20).exp()  # starts the one team of threads that there should be
cfg = tiny(RUN_ID="team", VOCAB_SIZE=8192)  # large enough for torch to share out
model = tg.GPT(cfg)
tg.initialize(model, cfg)
saved = tg.Checkpoints(model, tg.Average(cfg, model), cfg, make_run(__import__("pathlib").Path(sys.argv[2]), cfg))
before = len(os.listdir("/proc/self/task"))
saved.save(0, 0.0)
saved.release(1)
print(saved.wait(), len(os.listdir("/proc/self/task")) - before)
"""


def test_a_checkpoint_starts_no_second_team_of_threads(tmp_path):
    """With more threads than cores libgomp's threads no longer wait ready for work, and a step on two cores took 1.5 times as long."""
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", TEAM, str(ROOT / "tests"), str(tmp_path)], env=env, text=True, capture_output=True)
    assert done.stdout.split() == ["True", "1"], done.stdout + done.stderr
