"""Logs and folders of other people's scripts: both dialects are read, source code in a log is not, and rules that such a
folder cannot decide are said to be undecided."""
import base64
import json
import lzma
import zlib

import pytest
import records_lab  # noqa: F401  puts records/ on the path

import check
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


def test_one_step_behind_the_budget_is_what_others_always_had(folder):
    """Their loop stops at the first step that ends behind 600 s; a tenth of a second is more than that."""
    write_logs(folder, lambda s: old_log(s, train_ms=600_038))
    assert outcome(folder, "training").status == "ok"
    write_logs(folder, lambda s: old_log(s, train_ms=600_100))
    assert outcome(folder, "training").status == "FAIL"


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
