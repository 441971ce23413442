"""Tiny real runs for the tests of records/: every stage of the program in a few seconds, and its tools as modules."""
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conftest import ROOT

RECORDS = ROOT / "records"
sys.path.insert(0, str(RECORDS))

# The smoke preset, a hundred times smaller still.
SMALL = dict(
    PRESET="smoke", VOCAB_SIZE=512, NUM_LAYERS=3, MODEL_DIM=32, NUM_HEADS=2, NUM_KV_HEADS=1, XSA_LAST_N=3, LOOP_START=1,
    LOOP_END=1, PARALLEL_START_LAYER=2, TRAIN_SEQ_LEN=64, EVAL_SEQ_LEN=64, EVAL_STRIDE=32, TRAIN_BATCH_TOKENS=2048,
    MICRO_BATCH_TOKENS=1024, PACK_TOKENS=256, VAL_BATCH_TOKENS=1024, VAL_DOCS=4, GPTQ_CALIBRATION_BATCHES=2,
    TTT_CHUNK_TOKENS=2048, TTT_BATCH_TOKENS=1024, WARMUP_STEPS=1, TRAIN_LOG_EVERY=2, ITERATIONS=12, MAX_WALLCLOCK_SECONDS=0,
    TTT_METHOD="chunk")  # the fastest here; how the evaluation adapts is nothing to these tests


def environment(**knobs) -> dict:
    """Only these knobs, one thread, no GPU: whatever the shell of the test sets stays outside."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH", "SYSTEMROOT")
    env = {k: os.environ[k] for k in kept if k in os.environ}
    return {**env, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **{k: str(v) for k, v in knobs.items()}}


def world(folder: Path, corpus) -> Path:
    """A folder with the program, its requirements and the corpus at relative places, as in a checkout."""
    folder.mkdir(parents=True)
    for name in ("train_gpt.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(corpus.data, folder / "data" / "datasets" / "toy")
    (folder / "data" / "tokenizers").mkdir()
    shutil.copy(corpus.tokenizer, folder / "data" / "tokenizers" / "toy.model")
    return folder


def train(folder: Path, run_id: str, **knobs) -> Path:
    """Train one tiny run in a world; returns the path of its JSONL."""
    knobs = {**SMALL, "DATA_PATH": "data/datasets/toy", "TOKENIZER_PATH": "data/tokenizers/toy.model", **knobs}
    done = subprocess.run([sys.executable, "train_gpt.py"], cwd=folder, text=True, capture_output=True, timeout=120,
                          env=environment(**knobs, RUN_ID=run_id))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "logs" / f"{run_id}.jsonl"


def train_seeds(folder: Path, seeds, name="toy", **knobs) -> list[Path]:
    """One run a seed, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda s: train(folder, f"{name}{s}", SEED=s, **knobs), seeds))
