"""One, two and eight ranks give one score. Ranks are threads here, each with its own model, which add tensors in order."""
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import config, make_run, trainer
from test_slots import SHAPE, Documents
from toy import one_thread  # noqa: F401 (fixture)

tg = trainer()
LENGTHS = (50, 7, 33, 61, 18, 1, 40, 64, 9, 22, 64, 30, 5, 12, 47, 28, 3, 36, 15, 55)
KNOBS = dict(TTT_SLOTS=8, TTT_BATCH_TOKENS=128, TTT_CHUNK_TOKENS=256, GLOBAL_TTT_CHUNK_TOKENS=128, PHASED_TTT_NUM_PHASES=2,
             GLOBAL_TTT_LR=0.02, TTT_LR=0.02, EVAL_SEQ_LEN=16, EVAL_STRIDE=8, TRAIN_SEQ_LEN=16, NGRAM_TILT_ORDER=1,
             NGRAM_TILT_THRESHOLD=0.2)


class Wires:
    """What connects `world` threads: every sum is formed by all of them, in the order of ranks."""

    def __init__(self, world):
        self.world, self.barrier, self.box = world, threading.Barrier(world, timeout=60), [None] * world

    def exchange(self, rank, value):
        self.box[rank] = value
        self.barrier.wait()
        everyone = list(self.box)
        self.barrier.wait()
        return everyone

    def attach(self, run, rank):
        run.rank, run.world, run.quiet = rank, self.world, True
        run.sum_ = lambda tensor: tensor.copy_(sum(t.clone() for t in self.exchange(rank, tensor.clone())))
        run.sum_slices = lambda bank: sum(self.exchange(rank, bank)).chunk(self.world)[rank]
        run.all_slices = lambda shard: torch.cat(self.exchange(rank, shard))
        run.agree = lambda value: self.exchange(rank, value)[0]
        return run


def score(tmp_path, world, **env):
    """Scores of all ranks."""
    cfg = config(**{**SHAPE, **KNOBS, **env})
    runs = [make_run(tmp_path, cfg) for _ in range(world)]
    models = []
    for run in runs:  # built one after the other: they draw from the one global generator
        model = tg.build_model(cfg, run)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
        models.append(model)
    wires = Wires(world)

    def one(rank):
        run = wires.attach(runs[rank], rank)
        docs = Documents(LENGTHS)
        if cfg.ttt_method == "lora":
            return tg.score_documents(models[rank], docs, cfg, run, 0.0)
        return tg.score_adapting(models[rank], docs, cfg, run)

    with ThreadPoolExecutor(world) as pool:
        scores = list(pool.map(one, range(world)))
    torch.compiler.set_stance("default")  # a process's, and these ranks, which are threads, left it in no order
    return scores


@pytest.mark.parametrize("env", [
    {"TTT_METHOD": "lora"}, {"TTT_METHOD": "lora", "MIXER": "ubtp", "TTT_ASYM_LOGIT": 1}, {"TTT_METHOD": "chunk"},
    {"TTT_METHOD": "chunk", "TTT_OPTIMIZER": "adamw", "TTT_LR": 0.002, "TTT_POLYAK": 0.9, "TTT_BYTE_WEIGHTED": 1},
    {"TTT_METHOD": "none", "MIXER": "up"}], ids=lambda e: " ".join(map(str, e.values())))
def test_the_number_of_ranks_does_not_matter(env, tmp_path):
    alone = score(tmp_path, 1, **env)[0]
    for world in (2, 8):
        everyone = score(tmp_path, world, **env)
        assert len({s.val_loss for s in everyone}) == 1, "all ranks report one number"
        assert everyone[0].val_loss == pytest.approx(alone.val_loss, abs=1e-6)
        assert everyone[0].verdict.split(";")[:2] == alone.verdict.split(";")[:2]
