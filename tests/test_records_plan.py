"""records/plan.py: kernels and their bytes, planned without a GPU."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[1] / "records" / "plan.py"
pytestmark = pytest.mark.skipif(not torch.__version__.startswith("2.13") or torch.cuda.is_available(),
                                reason="written against torch 2.13 without a GPU")


def plan(*args):
    ended = subprocess.run([sys.executable, TOOL, *args], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-2000:]
    numbers = [float(x) for x in re.findall(r"(?:kernels|both:?),? ?:?\s?([\d.]+) passes", ended.stdout)]
    return ended.stdout, numbers, float(re.search(r"of them ([\d.]+) in kernels", ended.stdout)[1])


def test_a_blocks_kernels_and_what_they_move():
    out, (forward, backward, both), own = plan()
    assert forward + backward == pytest.approx(both, abs=0.11) and "mlp_backward" in out and "fa4_backward" in out
    # by hand, forward: mix and norm 4, products of q, k, v and o 3 and 3, heads 3.5, attention 3 to 4.5, XSA and gate 4.5,
    # norm 2, the MLP 6.5, sum 3
    assert 32 < forward < 36
    assert own < 45  # what the speed log says of today's block; 60 before scales went into their weights
    assert plan("--set", "realize_opcount_threshold=30", "realize_acc_reads_threshold=8")[2] > own + 4


def test_a_wrong_knob_is_named():
    ended = subprocess.run([sys.executable, TOOL, "NUM_HEAD=4"], capture_output=True, text=True, timeout=300)
    assert ended.returncode and "NUM_HEADS" in ended.stderr
