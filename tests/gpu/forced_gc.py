"""train_gpt.py with Python's cycle collector as early as it can come: every 50 objects, and inside every recording of a CUDA graph.

    python tests/gpu/forced_gc.py        knobs in front, as ever

A graph that is freed while another one is recorded ends the recording with an error. In an ordinary run the collector comes by
chance, so that one run in many dies; here it comes every time.
"""
import atexit
import gc
import runpy
import sys
from pathlib import Path

import torch

begin, forced = torch.cuda.CUDAGraph.capture_begin, []


def capture_begin(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    forced.append(gc.collect())


if __name__ == "__main__":
    gc.set_threshold(50, 5, 5)
    torch.cuda.CUDAGraph.capture_begin = capture_begin
    atexit.register(lambda: print(f"forced collections: {len(forced)} inside recordings, which found {sum(forced)} objects", flush=True))
    script = Path(__file__).resolve().parents[2] / "train_gpt.py"
    sys.argv = [str(script)]
    runpy.run_path(str(script), run_name="__main__")
