"""Logs and folders of other people's scripts: both dialects are read, source code in a log is not, and rules that such a
folder cannot decide are said to be undecided."""
import base64
import json
import lzma
import re
import shutil
import subprocess
import zlib

import pytest
from records_lab import RECORDS

import check
import compare
import runs

RULER = "=" * 100
# Lines that look like results to a careless parser: a log begins with the program that printed it.
PROGRAM = '''"""A training script."""
import os
import torch
ITERATIONS = int(os.environ.get("ITERATIONS", 20000))
SEED = int(os.environ.get("SEED", 1337))
MATRIX_LR = float(os.environ["MATRIX_LR"])
TEXT = """
step:5/10 train_loss:9.0000 train_time:99ms step_avg:9.00ms
Total submission size int8+zlib: 1 bytes
final_int8_zlib_roundtrip_exact val_loss:9.00000000 val_bpb:9.00000000
"""


def report(log, step, loss, total):
    log(f"step:{step}/{ITERATIONS} train_loss:{loss:.4f} train_time:{step:.0f}ms step_avg:{step:.2f}ms")
    log(f"Total submission size int8+zlib: {total} bytes")
'''
BYTES = 151_079_963  # of the contest's validation text
TOKENS = 62_021_632  # of it, in 1,024 pieces


def bpb(loss, tokens=TOKENS):
    return loss / 0.6931471805599453 * tokens / BYTES


def old_log(seed=1337, loss=2.07, code=len(PROGRAM), model=15_800_000, train_ms=599_900):
    """The first dialect: source, ruler, versions, ruler, lines."""
    return "\n".join([
        PROGRAM, RULER, "Running Python 3.12", "Running PyTorch 2.9.1", "|   0  NVIDIA H100 80GB HBM3          On  |", RULER,
        f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=x.model", f"val_loader:shards pattern=val tokens:{TOKENS}",
        "model_params:17059912", "world_size:8 grad_accum_steps:1", f"seed:{seed}", "warmup_step:20/20",
        "step:0/20000 val_loss:6.9357 val_bpb:4.1077 train_time:0ms step_avg:0.01ms",
        "step:1/20000 train_loss:6.9370 train_time:44ms step_avg:44.00ms",
        "step:13700/20000 train_loss:2.0317 train_time:596577ms step_avg:43.55ms",
        f"step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:{train_ms}ms step_avg:43.54ms",
        f"stopping_early: wallclock_cap train_time:{train_ms}ms step:13780/20000",
        "peak memory allocated: 10184 MiB reserved: 10200 MiB", "Serialized model: 67224983 bytes", f"Code size: {code} bytes",
        f"Total submission size: {67224983 + code} bytes",
        f"Serialized model int8+zlib: {model} bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)",
        f"Total submission size int8+zlib: {model + code} bytes",
        f"final_int8_zlib_roundtrip val_loss:{loss:.4f} val_bpb:{bpb(loss):.4f} eval_time:1401ms",
        f"final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb(loss):.8f}", ""])


def new_log(seed=42, loss=2.32, train_ms=599_590, hessians=None, eval_s=440.0, tokens=47_851_520):
    """The second dialect: a dump of knobs, the source between rulers, lines with spaces."""
    return "\n".join([
        RULER, "Hyperparameters:", "  adam_wd: 0.02", f"  seed: {seed}", "  world_size: 8", RULER, "Source code:", RULER, PROGRAM, RULER,
        "Running Python 3.12", f"train_shards: 80", f"val_tokens: {tokens}", "model_params:35945671",
        "gptq:reserving 0s, effective=599500ms", "0/20000 val_loss: 9.0047 val_bpb: 4.1100",
        "1/20000 train_loss: 9.0053 train_time: 0.0m tok/s: 16500000", "4500/20000 train_loss: 2.4000 train_time: 9.1m tok/s: 6500000",
        "layer_loop:enabled step:2100 frac:0.350 encoder:[0, 1] decoder:[2, 3]",
        f"stopping_early: wallclock_cap train_time: {train_ms}ms step: 4945/20000",
        "peak memory allocated: 39000 MiB reserved: 42000 MiB",
        "diagnostic pre-quantization post-ema val_loss:2.33000000 val_bpb:1.06600000 eval_time:7000ms",
        *([f"GPTQ:collected 67 Hessians in {hessians}s"] if hessians else []),
        f"Code size (uncompressed): {len(PROGRAM)} bytes", "Code size (compressed): 30000 bytes",
        "Serialized model quantized+brotli: 15860000 bytes", "Total submission size quantized+brotli: 15890000 bytes",
        "diagnostic quantized val_loss:2.34000000 val_bpb:1.07100000 eval_time:9000ms",
        "ttpp: phase:1/3 pd:100 gd:50 t:200.1s",
        f"quantized_ttt_phased val_loss:{loss:.8f} val_bpb:{bpb(loss, tokens):.8f} eval_time:{1000 * eval_s:.0f}ms",
        f"total_eval_time:{eval_s}s", ""])


README = """# Somebody's record

Mean val_bpb {mean:.4f}. Seeds: {seeds}

```bash
SEED=1337 ITERATIONS=20000 MATRIX_LR=0.04 torchrun --standalone --nproc_per_node=8 train_gpt.py
```
"""


@pytest.fixture
def folder(tmp_path):
    """A record folder of the first dialect with three seeds, all in order as far as it can be."""
    path = tmp_path / "track_10min_16mb" / "2026-03-20_Somebody"
    path.mkdir(parents=True)
    losses = {1337: 2.07, 42: 2.071, 2025: 2.0705}
    for seed, loss in losses.items():
        (path / f"train_seed{seed}.log").write_text(old_log(seed, loss))
    scores = {s: round(bpb(x), 8) for s, x in losses.items()}
    mean = sum(scores.values()) / 3
    (path / "train_gpt.py").write_text(PROGRAM)
    (path / "README.md").write_text(README.format(mean=mean, seeds=", ".join(f"{x:.6f}" for x in scores.values())))
    (path / "submission.json").write_text(json.dumps({
        "author": "Somebody", "github_id": "somebody", "name": "Somebody's", "date": "2026-03-20", "blurb": "b", "val_bpb": round(mean, 6),
        "val_loss": round(sum(losses.values()) / 3, 6), "bytes_total": 15_800_000 + len(PROGRAM), "bytes_code": len(PROGRAM), "seeds": list(losses),
        "seed_results": {str(s): {"val_bpb": x, "steps": 13780} for s, x in scores.items()}}))
    return path


def outcome(path, name):
    return next(o for o in check.check(path) if o.name == name)


# ----------------------------------------------------------------------------------------------------------------------
# Logs
# ----------------------------------------------------------------------------------------------------------------------
def test_first_dialect(tmp_path):
    path = tmp_path / "train.log"
    path.write_text(old_log())
    run = runs.load(path)
    assert run.dialect == "upstream" and run.finished and run.source == PROGRAM
    assert (run.seed, run.world, run.params, run.steps) == (1337, 8, 17059912, 13780)
    assert [(p.step, p.loss) for p in run.train] == [(1, 6.937), (13700, 2.0317)] and run.checks[-1] == (13780, 2.0606, 1.2172)
    assert run.size == {"code": len(PROGRAM), "model": 15_800_000, "total": 15_800_000 + len(PROGRAM)}
    assert run.final == runs.Score(2.07, round(bpb(2.07), 8), 1.401)
    assert run.train_seconds == 599.9 and run.validation == {"tokens": TOKENS} and "H100" in run.device


def test_second_dialect(tmp_path):
    path = tmp_path / "train_seed42.log"
    path.write_text(new_log(hessians=4.7))
    run = runs.load(path)
    assert (run.seed, run.world, run.steps, run.params) == (42, 8, 4945, 35945671)
    assert run.train[-1] == runs.Point(4500, 2.4, pytest.approx(546)) and run.source == PROGRAM
    assert list(run.scores) == ["quantized_ttt_phased"] and set(run.diagnostics) == {"pre-quantization post-ema", "quantized"}
    assert run.train_seconds == pytest.approx(604.29) and run.eval_seconds == 440.0
    assert run.size == {"code": 30000, "model": 15_860_000, "total": 15_890_000}


def test_seed_from_the_files_name_where_the_log_is_silent(tmp_path):
    path = tmp_path / "train_seed314.log"
    path.write_text(old_log().replace("seed:1337\n", ""))
    assert runs.load(path).seed == 314


def test_source_in_a_log_is_never_a_result(tmp_path):
    """A log that ends with its source, before anything ran: the text inside the program has all the right words."""
    path = tmp_path / "train.log"
    path.write_text(f"{PROGRAM}\n{RULER}\nRunning Python 3.12\n")
    run = runs.load(path)
    assert not run.scores and not run.train and not run.size and not run.finished


@pytest.mark.parametrize("wrap", [
    lambda s: f"import lzma,base64\nexec(lzma.decompress(base64.b85decode({base64.b85encode(lzma.compress(s)).decode()!r})))",
    lambda s: f"import zlib,base64\nexec(zlib.decompress(base64.b64decode({base64.b64encode(zlib.compress(s))!r})))",
    lambda s: f"import lzma\nexec(lzma.decompress({lzma.compress(s)!r}))"], ids=["lzma b85", "zlib b64", "raw lzma"])
def test_wrappers_are_unpacked_without_being_run(wrap, folder):
    (folder / "train_gpt.py").write_text(wrap(PROGRAM.encode()))
    assert runs.unpack_code((folder / "train_gpt.py").read_text()) == PROGRAM
    assert outcome(folder, "same-code").status == "ok" and outcome(folder, "shipped").status == "FAIL"


def test_plain_code_is_no_wrapper():
    assert runs.unpack_code(PROGRAM) is None and runs.unpack_code("not python (") is None


@pytest.mark.parametrize("line, label", [
    ("final_sliding stride:64 val_loss:1.9 val_bpb:1.2", "final_sliding stride:64"),
    ("final_sliding_exact stride:64 val_loss:1.90000000 val_bpb:1.20000000", "final_sliding stride:64"),
    ("final_sliding: val_loss: 1.9, val_bpb: 1.2", "final_sliding:"),
    ("final_int6 (stride 64) val_loss=1.9 val_bpb=1.2", "final_int6 (stride 64)"),
    ("quantized_ttt docs:50000 val_loss:1.9 val_bpb:1.2 stride:64 eval_time:2000ms", "quantized_ttt docs:50000")])
def test_words_may_stand_around_a_score(tmp_path, line, label):
    path = tmp_path / "train.log"
    path.write_text(f"seed:1\n{line}\n")
    (name, score), = runs.load(path).scores.items()
    assert (name, score.loss, score.bpb, score.seconds) == (label, 1.9, 1.2, 2.0 if "eval_time" in line else None)


def test_validations_in_training_are_no_scores(tmp_path):
    path = tmp_path / "train.log"
    path.write_text("step:5/9 val_loss:1.9 val_bpb:1.2 train_time:9ms\n5/9 val_loss: 1.9 val_bpb: 1.2\n"
                    "step 5 val_loss:1.9 val_bpb:1.2\n")
    run = runs.load(path)
    assert not run.scores and not run.diagnostics and [c[0] for c in run.checks] == [5, 5]


def test_a_second_try_under_one_label_replaces_nothing(tmp_path):
    path = tmp_path / "train.log"
    path.write_text("final_ttt_exact val_loss:1.90000000 val_bpb:1.20000000\n"
                    "final_ttt_exact val_loss:2.90000000 val_bpb:1.80000000\n")
    assert {n: s.bpb for n, s in runs.load(path).scores.items()} == {"final_ttt": 1.2, "final_ttt (2)": 1.8}


# ----------------------------------------------------------------------------------------------------------------------
# Folders
# ----------------------------------------------------------------------------------------------------------------------
def test_folder_in_order(folder):
    outcomes = {o.name: o for o in check.check(folder)}
    assert not [vars(o) for o in outcomes.values() if o.status == "FAIL"]
    assert {n for n, o in outcomes.items() if o.status == "undecided"} == {
        "ledger", "verdict", "twins", "repeated", "artifact", "byte-count", "validation-set", "one-recipe", "command", "spread",
        "compliance", "margin", "disjoint"}
    assert not [o for o in outcomes.values() if o.text.startswith("could not be read")]


def swap_json(folder, **changes):
    file = folder / "submission.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def write_logs(folder, make):
    for seed in (1337, 42, 2025):
        (folder / f"train_seed{seed}.log").write_text(make(seed))


# Contradictions that stood in real folders of the contest, or nearly so.
FAULTS = {
    "json with a score that no log has": (lambda f: swap_json(f, val_bpb=1.15015), "headline"),
    "json copies the model's size as the total": (lambda f: swap_json(f, bytes_total=15_800_000), "sizes-told"),
    "all logs are of one seed": (lambda f: write_logs(f, lambda s: old_log(1337, 2.07)), "seeds"),
    "totals over the cap": (lambda f: write_logs(f, lambda s: old_log(s, model=16_970_000)), "bytes"),
    "calibration behind the budget": (lambda f: write_logs(f, lambda s: new_log(s, hessians=4.7)), "training"),
    "evaluation of 612.6 s": (lambda f: write_logs(f, lambda s: new_log(s, eval_s=612.6)), "evaluation"),
    "stub that runs an uncounted file": (lambda f: [(f / "train_gpt.py").write_text("exec(open('train_gpt_human.py').read())\n"),
                                                    (f / "train_gpt_human.py").write_text(PROGRAM)], "alone"),
    "hypothetical code is counted": (lambda f: write_logs(f, lambda s: old_log(s, code=100)), "shipped"),
    "knob that is read nowhere": (lambda f: (f / "README.md").write_text((f / "README.md").read_text().replace(
        "ITERATIONS=20000", "PHASED_TTT_ENABLED=1")), "knobs"),
    "bytes counted twice": (lambda f: write_logs(f, lambda s: old_log(s).replace(f"{bpb(2.07):.8f}", f"{bpb(2.07) / 1.0413:.8f}")), "bits-per-byte"),
    "two seeds only": (lambda f: (f / "train_seed42.log").unlink(), "seeds"),
    "one GPU": (lambda f: write_logs(f, lambda s: old_log(s).replace("world_size:8", "world_size:1")), "hardware"),
    "logs cut off": (lambda f: write_logs(f, lambda s: old_log(s).partition("Code size")[0]), "finished"),
    "shipped script is not the one in the logs": (lambda f: (f / "train_gpt.py").write_text(PROGRAM.replace("1337", "1338")), "same-code"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_contradictions_are_found(folder, fault):
    plant, name = FAULTS[fault]
    plant(folder)
    found = outcome(folder, name)
    assert found.status == "FAIL", vars(found)


@pytest.mark.parametrize("train_ms, steps, expected", [
    (600_038, 13_780, "ok"), (600_140, 6_900, "ok"), (600_070, 7_150, "ok"),  # as far behind as merged records
    (600_100, 13_780, "FAIL"), (600_190, 6_900, "FAIL"), (601_000, 6_900, "FAIL"),
    (600_618, 539, "ok"), (601_100, 700, "FAIL")])  # long steps: one of them, or what makes a second
def test_two_steps_behind_the_budget_are_what_others_always_had(folder, train_ms, steps, expected):
    """Their loop stops at the first step behind which the clock stands over 600 s, and one more is queued by then."""
    log = old_log(1, train_ms=train_ms).replace("step:13780/", f"step:{steps}/")
    log = log.replace("step:13700/20000 train_loss", "step:0/9 train_loss")
    write_logs(folder, lambda s: log.replace("seed:1\n", f"seed:{s}\n"))
    found = outcome(folder, "training")
    assert found.status == expected and f"{1000 * train_ms / 1000 / steps:.1f} ms" in found.text, found.text
    swap_json(folder, compliance={"train_under_600s": True})
    assert outcome(folder, "compliance").status == expected


def test_a_step_is_measured_at_the_end_of_the_run(folder):
    """With recurrence switched on late, the last steps are longer than the mean of all."""
    def log(seed):
        text = old_log(seed, train_ms=600_220).replace("13780/", "6609/")
        text = text.replace("step:1/20000 train_loss:6.9370 train_time:44ms",
                            "step:5000/20000 train_loss:2.1 train_time:400000ms")
        return text.replace("step:13700/20000 train_loss:2.0317 train_time:596577ms",
                            "step:6600/20000 train_loss:2.0 train_time:599100ms")
    write_logs(folder, log)
    found = outcome(folder, "training")
    words = "0.22 s behind 600 s is within 0.249 s, 2 steps of 124.4 ms at the end"
    assert found.status == "ok" and words in found.text


# ----------------------------------------------------------------------------------------------------------------------
# Which score is the result
# ----------------------------------------------------------------------------------------------------------------------
def score_line(label, loss):
    return f"{label} val_loss:{loss:.8f} val_bpb:{bpb(loss):.8f} eval_time:70000ms\n"


def append(folder, seed, text):
    with open(folder / f"train_seed{seed}.log", "a") as file:
        file.write(text)


def without(folder, *keys):
    told = json.loads((folder / "submission.json").read_text())
    (folder / "submission.json").write_text(json.dumps({k: v for k, v in told.items() if k not in keys}))


ROUNDTRIP = "final_int8_zlib_roundtrip"


@pytest.mark.parametrize("drop", [(), ("seed_results",)], ids=["seeds told", "mean told"])
@pytest.mark.parametrize("label", ["final_int6_ttt", ROUNDTRIP, "quantized_ttt"])
def test_a_later_broken_pass_is_not_the_result(folder, drop, label):
    """As in a merged record: test-time training that the README does not report went wrong in one of three logs."""
    without(folder, *drop)
    append(folder, 42, score_line(label, 2.5))
    assert {runs.result_pass(r) for r in runs.find(str(folder))} == {ROUNDTRIP}
    assert not [vars(o) for o in check.check(folder) if o.status == "FAIL"]
    assert runs.mean(r.final.loss for r in runs.find(str(folder))) == pytest.approx(2.0705)


def test_a_later_reported_pass_is_the_result(folder):
    losses = {1337: 1.97, 42: 1.971, 2025: 1.9705}
    for seed, loss in losses.items():
        append(folder, seed, score_line("final_sliding_window_eval stride:64", loss))
    mean = sum(map(bpb, losses.values())) / 3
    table = {str(s): {"val_bpb": round(bpb(x), 6)} for s, x in losses.items()}
    swap_json(folder, val_bpb=round(mean, 6), val_loss=1.9705, seed_results=table)
    words = f"pass final_sliding_window_eval stride:64; others there: {ROUNDTRIP}"
    assert outcome(folder, "headline").text.endswith(words)
    assert outcome(folder, "results").status == "ok" and outcome(folder, "headline").status == "ok"
    # one log by itself has the same result
    assert runs.find(str(folder / "train_seed42.log"))[0].final.loss == 1.971


def test_a_pass_that_no_score_confirms_is_not_guessed(folder):
    """A number that no log has is a fault, and the line lists what there is; without any number it is undecided."""
    for seed in (1337, 42, 2025):
        append(folder, seed, score_line("final_int6_ttt", 1.9))
    without(folder, "seed_results")
    swap_json(folder, val_bpb=1.15015)
    found = outcome(folder, "headline")
    assert found.status == "FAIL" and "final_int6_ttt 1.1" in found.text
    assert f"train_seed42.log has {ROUNDTRIP} {bpb(2.071):.8f}" in found.text
    assert outcome(folder, "spread").status == "undecided"
    without(folder, "val_bpb")
    (folder / "README.md").write_text("# Somebody's record\n")
    found = outcome(folder, "headline")
    assert found.status == "undecided" and "final_int6_ttt 1.1" in found.text and ROUNDTRIP in found.text
    with pytest.raises(runs.Unreadable, match="undecided which score is the result"):
        runs.result(runs.find(str(folder))[0])


@pytest.mark.parametrize("readme", [
    f"# A record {bpb(2.07):.5f}\n", f"# A record\n\n{ROUNDTRIP}_exact val_loss:2.07 is it.\n"], ids=["title", "text"])
def test_the_readme_tells_where_submission_json_is_silent(folder, readme):
    without(folder, "seed_results", "val_bpb", "seeds")
    (folder / "README.md").write_text(readme)
    for seed in (1337, 42, 2025):
        append(folder, seed, score_line("final_int6_ttt", 1.9))
    assert {runs.result_pass(r) for r in runs.find(str(folder))} == {ROUNDTRIP}


def test_a_diagnostic_of_the_packed_model_may_be_what_is_reported(folder):
    write_logs(folder, lambda s: new_log(s))
    swap_json(folder, val_bpb=1.071, val_loss=2.34, seed_results={})
    assert {runs.result_pass(r) for r in runs.find(str(folder))} == {"quantized"}
    assert outcome(folder, "headline").status == "ok"
    # a score of weights that were not packed is none that could be reported
    swap_json(folder, val_bpb=1.066, val_loss=2.33)
    assert {runs.result_pass(r) for r in runs.find(str(folder))} == {"quantized_ttt_phased"}
    assert outcome(folder, "headline").status == "FAIL"


@pytest.mark.parametrize("text", ["0.00000000", "1e999"])
def test_scores_that_are_none(folder, text):
    """A pass that broke prints zeros or infinities: a fault, said in words, and nothing to compare."""
    for file in folder.glob("train_seed*.log"):
        broken = rf"\1 val_loss:{text} val_bpb:{text}"
        file.write_text(re.sub(r"^(final_.*) val_loss:.*", broken, file.read_text(), flags=re.M))
    found = outcome(folder, "bits-per-byte")
    assert found.status == "FAIL" and "are no scores" in found.text
    assert not [vars(o) for o in check.check(folder) if o.text.startswith("could not be read")]
    with pytest.raises(runs.Unreadable, match="are no scores"):
        compare.side(str(folder), None)


@pytest.mark.parametrize("value", [None, "x", [["a"]], {"42": None}, True, -1, {"1337": "x"}])
def test_odd_values_in_others_folders(folder, value):
    """Whatever a key of submission.json holds, each rule says something about it, and compare.py does too."""
    told = json.loads((folder / "submission.json").read_text())
    for key in [*told, "headline", "compliance", "validation", "track", "python_version", "code_sha256"]:
        (folder / "submission.json").write_text(json.dumps({**told, key: value}))
        outcomes = check.check(folder)
        assert len(outcomes) == len(check.RULES)
        assert not [(key, vars(o)) for o in outcomes if o.text.startswith("could not be read")]
        assert compare.main([str(folder), str(folder)]) in (0, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Layouts, variables, Pythons
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["logs/train_seed{}.log", "logs/run_{}.txt", "seed{}/train.log"])
def test_logs_in_sub_folders(folder, place):
    before = {o.name: o.status for o in check.check(folder)}
    for seed in (1337, 42, 2025):
        target = folder / place.format(seed)
        target.parent.mkdir(exist_ok=True)
        (folder / f"train_seed{seed}.log").rename(target)
    (folder / "requirements.txt").write_text("torch\n")
    assert {o.name: o.status for o in check.check(folder)} == before
    assert len(runs.find(str(folder))) == 3


def test_a_sub_folder_names_the_seed_of_a_silent_log(folder):
    (folder / "seed7").mkdir()
    (folder / "seed7" / "train.log").write_text(old_log().replace("seed:1337\n", ""))
    assert runs.from_log(folder / "seed7" / "train.log").seed == 7


def test_own_logs_go_before_those_in_sub_folders(folder):
    (folder / "ablations").mkdir()
    (folder / "ablations" / "train_seed1.log").write_text(old_log(1, 2.5))
    assert len(runs.find(str(folder))) == 3 == len(check.Folder(folder).logs)


@pytest.mark.parametrize("name", [
    "TORCHDYNAMO_DISABLE", "PYTHONPATH", "PYTHONUNBUFFERED", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS",
    "NCCL_IB_DISABLE", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "TORCH_LOGS", "TORCHINDUCTOR_CACHE_DIR",
    "PYTORCH_CUDA_ALLOC_CONF", "TRITON_CACHE_DIR", "WANDB_MODE", "MASTER_PORT", "CUBLAS_WORKSPACE_CONFIG",
    "TRANSFORMERS_OFFLINE", "LD_LIBRARY_PATH", "MKL_NUM_THREADS", "KMP_AFFINITY", "TF_CPP_MIN_LOG_LEVEL", "TMPDIR"])
def test_variables_of_libraries_are_no_knobs(folder, name):
    readme = (folder / "README.md").read_text()
    (folder / "README.md").write_text(readme.replace("ITERATIONS=20000", f"{name}=1 ITERATIONS=20000"))
    assert outcome(folder, "knobs").status == "ok"


@pytest.mark.parametrize("name", ["HOMES", "PATHS", "TOKENIZER_PARALLELISM", "LOCAL_ATTENTION", "RANKS", "MASTERS"])
def test_names_like_those_of_libraries_are_knobs(folder, name):
    readme = (folder / "README.md").read_text()
    (folder / "README.md").write_text(readme.replace("ITERATIONS=20000", f"{name}=1 ITERATIONS=20000"))
    assert outcome(folder, "knobs").status == "FAIL"


def test_a_variable_that_the_command_itself_uses_is_no_knob(folder):
    readme = (folder / "README.md").read_text()
    (folder / "README.md").write_text(readme.replace("ITERATIONS", "GPUS=8 ITERATIONS").replace("node=8", "node=$GPUS"))
    assert outcome(folder, "knobs").status == "ok"


LATER = PROGRAM + 'TEXT2 = f"{os.environ["TEXT2"]}"\n'  # Python 3.12 allows quotes of one kind inside each other


@pytest.mark.parametrize("source, expected", [
    ('f"{x["a"]}"', (3, 12)), ("f'{x[\"a\"]}'", (3, 11)), ('f"""{x["a"]}"""', (3, 11)), ("type X = int", (3, 12)),
    ("f'{x!r:>{w}}' 'y'", (3, 11)), ('f"{", ".join(x)}"', (3, 12)), ('f"{\'\\n\'.join(x)}"', (3, 12)),
    ('f"{chr(10)}\\n" f"{x}"', (3, 11)), ("(", None)])
def test_the_python_that_a_syntax_needs(source, expected):
    """Whichever Python looks. Where it cannot read newer syntax itself, a log must have named a Python that does."""
    named = () if expected is None else ((3, 12),)
    assert runs.needed_python(source, named) == expected


def test_a_program_of_a_later_python_is_checked_alike(folder):
    """On Python 3.11 its source does not parse; it is a source all the same, and no rule is lost."""
    (folder / "train_gpt.py").write_text(LATER)
    for file in folder.glob("train_seed*.log"):
        text = file.read_text().replace(PROGRAM, LATER)
        for kind, model in (("Code size", 0), ("int8+zlib", 15_800_000)):
            text = text.replace(f"{kind}: {model + len(PROGRAM)} bytes", f"{kind}: {model + len(LATER)} bytes")
        file.write_text(text)
    swap_json(folder, bytes_total=15_800_000 + len(LATER), bytes_code=len(LATER))
    outcomes = {o.name: o for o in check.check(folder)}
    assert all(outcomes[name].status == "ok" for name in ("same-code", "python", "offline", "knobs", "headline"))
    assert "needs Python 3.12 or later" in outcomes["python"].text
    assert not [vars(o) for o in outcomes.values() if o.status == "FAIL"]


@pytest.mark.parametrize("shipped", sorted((RECORDS / "track_non_record_16mb").iterdir()), ids=lambda p: p.name)
@pytest.mark.parametrize("python", ["python3.11", "python3.12", "python3.13"])
def test_shipped_folders_check_alike_on_every_python(shipped, python):
    """The running Python's outcomes are those of any other that is installed here."""
    if not shutil.which(python):
        pytest.skip(f"no {python} here")
    done = subprocess.run([python, RECORDS / "check.py", shipped, "--json"], text=True, capture_output=True)
    if not done.stdout:
        pytest.skip(f"{python} does not start: {done.stderr[:80]}")
    there = {o["name"]: o["status"] for o in json.loads(done.stdout)[str(shipped)]}
    assert there == {o.name: o.status for o in check.check(shipped)} and "FAIL" not in there.values()
    assert there["same-code"] == there["python"] == "ok"


def test_network_libraries_are_for_a_reader_to_judge(folder):
    (folder / "train_gpt.py").write_text("import huggingface_hub\n" + PROGRAM)
    write_logs(folder, lambda s: old_log(s).replace("import os\n", "import os\nimport huggingface_hub\n", 1))
    assert outcome(folder, "offline").status == "undecided"


def test_folder_with_nothing_in_it(tmp_path, capsys):
    path = tmp_path / "2026-01-01_Empty"
    path.mkdir()
    assert check.main([str(path)]) == 1
    assert "could not be read" not in capsys.readouterr().out
    assert check.main([str(tmp_path / "none")]) == 2
