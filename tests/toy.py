"""Toy networks for the tests of the model, the optimisers, the quantiser and the scorer: every technique, milliseconds."""
from unittest import mock

import pytest
import torch
from conftest import trainer

tg = trainer()

# every technique of the record at toy size, recurrence and lanes overlapping
SMALL = dict(preset="record", vocab_size=64, num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2, rope_dims=4,
             xsa_last_n=4, num_loops=1, loop_start=1, loop_end=2, parallel_start_layer=2, bigram_dim=8, pack_tokens=64,
             train_batch_tokens=256, train_seq_len=64, eval_seq_len=64, val_batch_tokens=256)


def small(**knobs):
    """A Config of SMALL with other knobs in it, given by field name and Python value."""
    given = {**SMALL, **knobs}
    return tg.load_config({k.upper(): str(int(v) if isinstance(v, bool) else v) for k, v in given.items()}, False)


def quiet_run(cfg):
    """A quiet rank on the CPU, also where a GPU is present."""
    with mock.patch.dict(tg.HAVE, cuda=False):
        return tg.Run(cfg, (0, 0, 1), quiet=True)


def lively(cfg, attend=None, looping=True, dtype=torch.float32, spread=0.2):
    """A model with noise on every parameter, so that all of its paths carry signal."""
    model = tg.GPT(cfg, tg.Kernels(attend or tg.attention_sdpa), dtype)
    tg.initialize(model, cfg)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn(p.shape, generator=rng))
    model.looping = looping
    return model


@pytest.fixture(scope="module")
def run():
    return quiet_run(small())


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Toy matrices gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)  # in case a caught violation left them on
