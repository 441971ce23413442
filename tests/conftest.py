"""What the tests share: the one import of train_gpt.py, small configs, quiet runs, one small corpus.

Helpers are plain functions (`from conftest import config`), because parametrised tests need them before any fixture
exists. Nothing heavy happens here at import: the architecture test runs without torch.
"""
import dataclasses
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
# two workers (-n 2) and what they start share two cores: with a thread a core each, everybody would wait for everybody
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
if THREADS == 1:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Everything a forward pass can contain, small enough for a millisecond.
TINY = dict(
    VOCAB_SIZE=64, NUM_LAYERS=4, MODEL_DIM=32, NUM_HEADS=2, NUM_KV_HEADS=1, MLP_MULT=2, XSA_LAST_N=4, ROPE_DIMS=8,
    GATE_WINDOW=8, NUM_LOOPS=1, LOOP_START=1, LOOP_END=2, PARALLEL_START_LAYER=3, TRAIN_SEQ_LEN=32, PACK_TOKENS=64,
    MICRO_BATCH_TOKENS=128, TRAIN_BATCH_TOKENS=256, EVAL_SEQ_LEN=32, EVAL_STRIDE=16, VAL_BATCH_TOKENS=128,
    TTT_CHUNK_SIZE=16, TTT_CHUNK_TOKENS=128, TTT_BATCH_TOKENS=64, VAL_DOCS=0)


def load_by_path(name: str, path: Path):
    """A module that lies in no package, registered under `name` so that pickling and dataclasses find it."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def trainer():
    """train_gpt.py as a module, imported once in a process: its custom operators can only be registered once."""
    if "train_gpt" not in sys.modules:
        load_by_path("train_gpt", ROOT / "train_gpt.py")
        import torch
        torch.set_num_threads(THREADS)
    return sys.modules["train_gpt"]


def config(cuda: bool = False, **env):
    """A Config from knobs as they stand in the environment; PRESET=smoke unless another one is named."""
    return trainer().load_config({"PRESET": "smoke", **{k: str(v) for k, v in env.items()}}, cuda=cuda)


def tiny(**env):
    """The smallest network with every part in it."""
    return config(**{**TINY, **env})


def make_run(folder: Path, cfg, rank: int = 0, world: int = 1):
    """A quiet Run on the CPU. For `rank` of `world` it is that rank in name only: no process group is opened."""
    import torch
    run = trainer().Run(dataclasses.replace(cfg, artifact_dir=str(folder), run_id=cfg.run_id or "test"), (0, 0, 1), quiet=True)
    run.device, run.dtype = torch.device("cpu"), torch.float32  # also on a machine with a GPU
    run.rank, run.world = rank, world
    return run


def write_shard(path: Path, tokens) -> Path:
    """A contest shard: 256 int32 of header, then uint16 tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


class Corpus(NamedTuple):
    """A corpus on disk. `env`: the three knobs that point a config at it; `manifest`: what its builder says of it."""
    data: Path
    tokenizer: Path
    vocab_size: int
    manifest: dict

    @property
    def env(self) -> dict[str, str]:
        return {"DATA_PATH": str(self.data), "TOKENIZER_PATH": str(self.tokenizer), "VOCAB_SIZE": str(self.vocab_size)}


@pytest.fixture(scope="session")
def tg():
    """train_gpt.py."""
    return trainer()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    """Half a megabyte of the standard library with 512 pieces; tests must not change it."""
    root, vocab_size = tmp_path_factory.mktemp("corpus"), 512
    builder = load_by_path("local_corpus", ROOT / "data" / "local_corpus.py")
    manifest = builder.build(root, vocab_size, log=lambda _: None, max_bytes=500_000)
    return Corpus(root / "datasets" / f"local_sp{vocab_size}", root / manifest["tokenizer"]["path"], vocab_size, manifest)


def settle_hypothesis() -> None:
    """Same examples every time, no deadline on a shared machine, and no .hypothesis folder in the working tree."""
    from hypothesis import HealthCheck, settings
    from hypothesis.configuration import set_hypothesis_home_dir
    set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis-train-gpt")
    settings.register_profile("house", max_examples=100, deadline=None, derandomize=True, database=None,
                              suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("house")


try:
    settle_hypothesis()
except ImportError:  # the architecture test and the corpus test do without it
    pass
