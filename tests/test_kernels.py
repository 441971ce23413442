"""Our Triton kernels, run by Triton's interpreter on a CPU: every value and gradient as the eager twins give them.

What only a GPU shows (bf16, compiled blocks, speed) is in tests/gpu.
"""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import config, make_run, trainer

tg = trainer()
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def errors():
    """Comparison -> largest relative error. A process of its own: the interpreter is chosen when Triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; tests/requirements.txt has it for Linux on x86-64")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "kernels_probe.py"], cwd=HERE, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind, cases, bound", [("nll", 3, 2e-6), ("mlp", 3, 2e-6), ("cached", 2, 2e-6), ("network", 2, 1e-3)])
def test_interpreted_kernels_equal_their_eager_twins(kind, cases, bound, errors):
    mine = {name: e for name, e in errors.items() if name.startswith(kind)}
    assert len(mine) == cases and max(mine.values()) < bound, mine


def test_without_a_gpu_the_eager_twins_run(tmp_path):
    cfg = config(PRESET="record")
    chosen = tg.choose_kernels(cfg, make_run(tmp_path, cfg))
    assert chosen[1:] == (tg.head_nll_eager, tg.mlp_eager)


def test_fused_kernels_that_cannot_run_stop_the_run(tmp_path):
    cfg = config(PRESET="record", KERNELS="triton")
    with pytest.raises(tg.ConfigError, match="KERNELS=triton"):
        tg.choose_kernels(cfg, make_run(tmp_path, cfg))
