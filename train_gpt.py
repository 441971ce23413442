"""The parameter-golf training system: the best language model whose code and compressed weights fit in 16,000,000 bytes.

Trained for 600 s and scored for another 600 s on 8xH100, in bits per byte (bpb) of the FineWeb validation text.
Claim: none on FineWeb yet. On the bench (60M other tokens, 300 s on one H200) 1.1699 bpb, .0128 below PR #2135 and .0130 below
PR #1855 as trained here, three paired seeds each; on H100s capitals as operators (data/prepare.py) are .0099 more, two seeds, and the
MLP's products in FP8 .0027, three. All that was measured stands in README.md and records/README.md.

    python train_gpt.py                                              the whole job; without a GPU a 3-minute smoke run
    torchrun --standalone --nproc_per_node=8 train_gpt.py            the record run
    MODE=eval   ARTIFACT=logs/<id>.artifact python train_gpt.py      score a packed model again
    MODE=pack   CHECKPOINT=logs/<id>.ckpt   python train_gpt.py      quantise and pack saved averaged weights again
    MODE=sample SAMPLE_PROMPT="The" python train_gpt.py                     text from the newest artifact
    MODE=config python train_gpt.py                                  resolved config, layer plan and size; no data, no GPU
    MODE=doctor python train_gpt.py                                  what this machine has, and how many steps it would make
    MODE=bench  python train_gpt.py                                  the time of every part beside its floor (records/bench.py)

Every knob is an environment variable, declared once in room 2; a mistyped one stops the run. A room uses only rooms above:
     1 imports    2 config     3 runtime   4 bytes     5 data          6 kernels     7 layers    8 model     9 parameters
    10 optimisers 11 averaging 12 quantise 13 artifact 14 experts     15 scoring    16 adaptation 17 training
    18 sampling   19 main

Shapes are written as suffixes: T packed tokens, D model width, H query heads, K kv heads, E head width, V vocabulary,
S segments (a segment is a document, or a piece of one: attention, rotary positions and smearing never leave it).
Tokens of many segments lie in one flat row, so training, scoring, test-time training, calibration and sampling are one
forward pass over (ids_T, pos_T, cu_S), with cu the segments' borders and pos the position within the segment.
"""

# ----------------------------------------------------------------------------------------------------------------------
# 1. IMPORTS AND SOURCE - the file reads itself before anything else, so that the log holds the code that really ran;
#    optional libraries are found by capability, never by version, and a missing one is only an entry in HAVE.
# ----------------------------------------------------------------------------------------------------------------------
from pathlib import Path

# read before torch is imported: an edit made meanwhile cannot slip into the log
SOURCE = Path(__file__).read_text(encoding="utf-8")

import ast
import base64
import contextlib
import copy
import dataclasses
import datetime
import difflib
import errno
import functools
import gc
import hashlib
import heapq
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import math
import os
import platform
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import threading
import time
import tokenize
import traceback
import uuid
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
# Its functions take the world as it is when they are defined for their default. Loaded later, as the inductor does, they keep
# the group, gloo's threads outlive close() and end the process with an abort now and then.
import torch.distributed.nn.functional  # noqa: F401
import torch.nn.functional as F
from torch import Tensor, nn


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it (a GPU library can take seconds to import)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


try:  # on a CPU too: its interpreter runs the kernels there, for tests
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except Exception:  # missing, too old or broken: the eager twins run, and choose_kernels says so
    triton = None

HAVE = {
    "cuda": torch.cuda.is_available(),
    "triton": torch.cuda.is_available() and triton is not None,  # our own kernels; on a CPU their eager twins run
    "varlen": torch.cuda.is_available(),  # part of torch, FlashAttention-2 inside
    "brotli": installed("brotli"),
    "zstd": installed("zstandard"),
}

# ----------------------------------------------------------------------------------------------------------------------
# 2. CONFIG - one line a knob: name, default, a sentence. Environment variables only, spelled as upstream spells them.
#    The defaults are the record recipe; PRESET names a table of overrides; nothing else in the file reads os.environ.
#    Fractions are of the run (0 = start, 1 = end), so that a short run is a small record run.
# ----------------------------------------------------------------------------------------------------------------------


def knob(default, sentence: str, choices: tuple = (), low: float | None = None, high: float | None = None):
    """Declare one knob: its default, what it does, and which values are allowed (choices, or low <= value <= high)."""
    return field(default=default, metadata={"doc": sentence, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class RunKnobs:
    """What to do, where things lie, and how long it may take."""
    mode: str = knob("train", "what this process does", ("train", "eval", "pack", "sample", "config", "doctor", "bench"))
    preset: str = knob("", "table of overrides; empty: record with a GPU, smoke without",
                       ("", "record", "baseline", "pr413", "pr430", "pr490", "pr1880", "pr1693", "pr1855", "pr2135", "smoke"))
    run_id: str = knob("", "name of the run's files; empty: time and a random suffix")
    seed: int = knob(1337, "init and data order; two seeds share neither", low=0, high=2**32 - 1)
    deterministic: bool = knob(False, "bit-equal reruns: deterministic kernels, progress counted in steps; slower")
    artifact_dir: str = knob("logs", "folder of logs, checkpoints and artifacts")
    artifact: str = knob("", "artifact to eval or sample; empty: the one of RUN_ID, else the newest in ARTIFACT_DIR")
    checkpoint: str = knob("", "averaged weights for MODE=pack; empty: as for ARTIFACT")
    checkpoint_seconds: float = knob(60.0, "a checkpoint of the averaged weights this often; 0: only at the end", low=0)
    max_wallclock_seconds: float = knob(600.0, "training budget, Hessians included; 0: ITERATIONS alone decides", low=0)
    eval_wallclock_seconds: float = knob(600.0, "evaluation budget; an overrun is reported as a failure; 0: none", low=0)
    iterations: int = knob(1_000_000, "most training steps. If they end before the clock does, the schedules follow steps instead of time", low=1)
    warmup_steps: int = knob(4, "untimed steps per graph that compile it; all state is put back afterwards", low=0)
    train_log_every: int = knob(100, "steps between train_loss lines", low=1)
    val_loss_every: int = knob(0, "steps between validations during training; 0: only at the end", low=0)
    track: str = knob("", "send the log's events to this tracker (records/track.py)", ("", "trackio", "wandb", "tensorboard"))
    sample_prompt: str = knob("", "start of the text that MODE=sample continues")
    sample_tokens: int = knob(128, "tokens that MODE=sample writes", low=1)
    sample_temperature: float = knob(0.8, "sampling temperature; 0: greedy", low=0)


@dataclass(frozen=True)
class DataKnobs:
    """Shards, tokenizer and how the token stream is cut."""
    data_path: str = knob("", "folder of fineweb_{train,val}_*.bin; empty: data/datasets/fineweb10B_sp<V>")
    tokenizer_path: str = knob("", "SentencePiece model; empty: data/tokenizers/fineweb_<V>_bpe.model")
    vocab_size: int = knob(8192, "rows of the embedding; must equal the tokenizer's", low=2, high=65536)
    train_batch_tokens: int = knob(786432, "tokens in a step over all ranks, whatever their number", low=1)
    pack_tokens: int = knob(8192, "tokens in a block; blocks are what is shuffled, and no segment crosses one", low=2)
    micro_batch_tokens: int = knob(0, "most tokens in one forward pass of a rank; 0: as many as the GPU's memory holds, at most 131,072", low=0)
    train_seq_len: int = knob(2048, "longest segment in training; longer documents are split", low=2)
    train_seq_schedule: str = knob("", "shorter segments first: tokens:fraction of the run until which, ...; empty: TRAIN_SEQ_LEN")
    train_batch_schedule: str = knob("0.25:0.35,0.5:0.85", "smaller steps first, as share of TRAIN_BATCH_TOKENS:fraction of the run "
                                     "at which they end, ..., rounded up to whole blocks; the lr goes with the share's root; empty: none smaller")
    loader: str = knob("shuffled", "order of blocks: permuted anew each epoch, as they lie, or strides coprime to each shard's "
                       "length over several shards at once (PR #1880)", ("shuffled", "sequential", "coprime"))
    doc_isolation: bool = knob(True, "documents do not see each other in attention, positions and smearing")


@dataclass(frozen=True)
class ModelKnobs:
    """The network. Layer sets count physical layers from 0."""
    num_layers: int = knob(11, "physical layers", low=1)
    model_dim: int = knob(512, "width of the residual stream", low=8)
    num_heads: int = knob(4, "query heads; each is MODEL_DIM / NUM_HEADS wide", low=1)
    num_kv_heads: int = knob(2, "key/value heads (grouped-query attention)", low=1)
    mlp_mult: float = knob(4.5, "hidden width of the MLP over MODEL_DIM; the largest share of the bytes", low=0.1, high=64)
    mlp_act: str = knob("leaky_relu2", "leaky_relu2 keeps a gradient on the negative side", ("leaky_relu2", "relu2"))
    tie_embeddings: bool = knob(True, "the head is the embedding; untying costs V*D parameters")
    logit_softcap: float = knob(30.0, "logits are cap*tanh(z/cap); 0: no cap", low=0)
    qk_gain_init: float = knob(5.0, "start of the learned per-head gain on normalised queries; higher is sharper", low=0.01)
    rope_base: float = knob(10000.0, "rotary base", low=1)
    rope_dims: int = knob(16, "channels of a head that rotate; 0: all", low=0)
    ln_scale: bool = knob(True, "norm outputs times 1/sqrt(layer+1): deeper layers speak more softly")
    xsa_last_n: int = knob(11, "last layers whose attention output loses its component along the token's own value", low=0)
    value_residual: str = knob("none", "mix the first layer's values into every later layer's", ("none", "mix", "sigmoid"))
    attn_gate: str = knob("sparse", "gate on each head's output, a row of GATES", ("none", "scalar", "dense", "out", "sparse"))
    gate_window: int = knob(12, "leading channels that narrow gates read", low=1)
    smear_gate: str = knob("pre", "add a gated share of the previous token's embedding, before or after the first norm, or mix "
                           "the two a channel at a time", ("none", "pre", "post", "channel"))
    bigram_vocab_size: int = knob(0, "rows of a hashed (previous, current) token embedding; 0: none", low=0)
    trigram_vocab_size: int = knob(0, "rows of the same for the last three tokens; 0: none", low=0)
    bigram_dim: int = knob(128, "width of these tables", low=1)
    ve_layers: str = knob("", "layers, like 9,10, whose values gain an embedding of their token; empty: none")
    ve_dim: int = knob(128, "width of that embedding before it is projected to values", low=1)
    x0_residual: bool = knob(False, "blocks end by adding a learned share of the network's input (PR #430)")
    unet_skips: str = knob("gated", "first half of the visits feeds the second, last in first out", ("none", "plain", "gated"))
    num_loops: int = knob(2, "extra passes over layers LOOP_START..LOOP_END; 0: no recurrence", low=0)
    loop_start: int = knob(3, "first layer of the loop", low=0)
    loop_end: int = knob(5, "last layer of the loop", low=0)
    enable_looping_at: float = knob(0.35, "fraction of the run at which recurrence starts; cheap steps come first", low=0, high=1)
    parallel_residual: str = knob("two", "attention and MLP side by side: one stream, or two mixed ones", ("none", "one", "two"))
    parallel_start_layer: int = knob(8, "first layer that runs them side by side", low=0)
    parallel_final_lane: str = knob("mean", "what leaves two lanes at the end", ("mean", "attn", "mlp"))
    tied_embed_init_std: float = knob(0.005, "spread of the embedding at the start", low=0)


@dataclass(frozen=True)
class OptimKnobs:
    """Kernels, optimisers and schedules."""
    attn_backend: str = knob("auto", "auto: the first that works here", ("auto", "triton", "varlen", "sdpa", "eager"))
    kernels: str = knob("auto", "own operations fused in Triton (auto: on a GPU) or eager twins", ("auto", "triton", "eager"))
    fp8: str = knob("mlp", "products that run in FP8 while weights learn, on a Hopper GPU: the MLP's along the channels", ("none", "mlp"))
    compile_scope: str = knob("auto", "torch.compile sees nothing, or a block at a time (auto: on a GPU)", ("auto", "none", "block"))
    matrix_lr: float = knob(0.026, "Muon's step on matrices", low=0)
    scalar_lr: float = knob(0.02, "AdamW on vectors, gates and scalars", low=0)
    tied_embed_lr: float = knob(0.03, "AdamW on the embedding and hash tables", low=0)
    head_lr: float = knob(0.008, "AdamW on an untied head", low=0)
    muon_momentum: float = knob(0.97, "Muon's momentum after its warm-up", low=0, high=1)
    muon_momentum_warmup_start: float = knob(0.92, "momentum at step 0", low=0, high=1)
    muon_momentum_warmup_frac: float = knob(0.3, "fraction of the run over which momentum rises", low=0, high=1)
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", low=1)
    muon_coefficients: str = knob("polar", "Newton-Schulz by Polar Express or one quintic", ("polar", "quintic"))
    muon_row_normalize: bool = knob(True, "give every row of the momentum unit norm before Newton-Schulz (MuonEq-R)")
    muon_normalize_update: bool = knob(False, "give every row of the update unit norm after Newton-Schulz (PR #413)")
    muon_wd: float = knob(0.095, "decoupled decay of matrices; smaller weights also compress better", low=0)
    embed_wd: float = knob(0.085, "decay of embeddings", low=0)
    adam_wd: float = knob(0.02, "decay of vectors and scalars", low=0)
    beta1: float = knob(0.9, "AdamW", low=0, high=1)
    beta2: float = knob(0.99, "AdamW; .95 forgets faster", low=0, high=1)
    adam_eps: float = knob(1e-8, "AdamW", low=0)
    grad_clip_norm: float = knob(0.3, "clip of the global norm of the reduced gradient; 0: none", low=0)
    warmdown_frac: float = knob(0.85, "last fraction of the run over which every lr falls linearly", low=0, high=1)
    min_lr: float = knob(0.1, "where the lr multiplier ends", low=0, high=1)
    average: str = knob("ema", "what is packed: running average, mean of snapshots, last weights", ("none", "ema", "swa"))
    ema_horizon: float = knob(0.058, "EMA: fraction of the run it remembers (decay .9965 over 4,950 steps)", low=0, high=1)
    ema_decay: float = knob(0.0, "EMA: fixed decay a step instead of EMA_HORIZON; 0: by horizon", low=0, high=1)
    swa_start_frac: float = knob(0.8, "SWA: snapshots are taken after this fraction of the run", low=0, high=1)


@dataclass(frozen=True)
class PackKnobs:
    """Quantisation, artifact and evaluation."""
    quantizer: str = knob("gptq", "gptq feeds rounding errors forward through the Hessian; rtn rounds", ("gptq", "rtn"))
    step_rule: str = knob("trellis", "steps by a row's own spread; by what errors cost in nats, as fine as the cap allows; the "
                          "same with integers chosen along a trellis", ("sdclip", "fisher", "trellis"))
    weight_coder: str = knob("range", "integers of all tensors in one range-coded stream by the scales of row and column, or a "
                             "section a tensor by COMPRESSOR", ("range", "sections"))
    matrix_bits: int = knob(6, "integer range of matrices under SDClip; the sigmas, not the bits, set the size", low=2, high=8)
    embed_bits: int = knob(7, "integer range of the embedding", low=2, high=8)
    attn_clip_sigmas: float = knob(13.0, "SDClip at so many row deviations: larger is coarser; Fisher begins there", low=0.1)
    mlp_clip_sigmas: float = knob(11.5, "the same for MLP matrices", low=0.1)
    embed_clip_sigmas: float = knob(14.0, "the same for the embedding and hash tables", low=0.1)
    gated_attn_quant_gate: bool = knob(False, "store gate matrices as int8 rows instead of fp16")
    lqer_top_k: int = knob(0, "tensors, of largest quantisation error, that get a low-rank correction of it (LQER)", low=0)
    lqer_rank: int = knob(4, "rank of that correction; its factors take 2 and 4 bits", low=1)
    lqer_asym_group: int = knob(64, "weights that share a step in the second factor", low=1)
    gptq_calibration_batches: int = knob(16, "packed sequences of training data that each rank runs for the Hessians. One holds the rank's "
                                         "share of a batch, at most 131,072 tokens; where memory forces shorter ones, more are run", low=1)
    gptq_reserve_seconds: float = knob(-1.0, "training time kept for the Hessians; -1: measured in the warm-up", low=-1)
    compressor: str = knob("auto", "entropy coder; auto: smallest by section", ("auto", "brotli", "zstd", "lzma", "zlib"))
    artifact_max_bytes: int = knob(16_000_000, "cap on packed code + model; one factor of all steps brings them under it", low=1)
    eval_seq_len: int = knob(3072, "tokens in a scored window", low=2)
    eval_stride: int = knob(64, "sliding windows advance by this many tokens", low=1)
    val_batch_tokens: int = knob(131072, "tokens in one forward pass of a rank when scoring", low=1)
    val_docs: int = knob(0, "score only the first documents (the log says so); 0: all", low=0)
    sliding_window_enabled: bool = knob(False, "also score with sliding windows, on the evaluation budget")
    ttt_enabled: bool = knob(True, "also score with test-time training: a chunk is scored, then trained on")
    doc_losses: bool = knob(False, "write every pass's nats, tokens and bytes a document to RUN_ID.<pass>.docs.npz")
    ttt_method: str = knob("lora", "adapt all documents together chunk by chunk, each by low-rank adapters of its own, or only "
                           "the counts of n-gram experts", ("none", "chunk", "lora"))
    ttt_slots: int = knob(0, "lora: documents side by side over all ranks (scores depend on it, not on the ranks); 0: one for "
                          "every 40 documents, 8 to 512", low=0)
    ttt_chunk_size: int = knob(48, "lora: tokens of a document that are scored before each step", low=1)
    ttt_lora_sites: str = knob("omh", "lora: where adapters act: q, k, v, o, m (MLP), h (head)")
    ttt_lora_rank: int = knob(80, "lora: rank", low=1)
    ttt_lora_alpha: float = knob(144.0, "lora: output scale times rank", low=0)
    ttt_lora_lr: float = knob(1e-4, "lora: AdamW step (PR #2130: 2e-4 diverges)", low=0)
    ttt_weight_decay: float = knob(0.5, "lora: decoupled decay (PR #1945: 2.0 is steadier)", low=0)
    ttt_beta1: float = knob(0.0, "lora: AdamW", low=0, high=1)
    ttt_beta2: float = knob(0.99, "lora: AdamW", low=0, high=1)
    ttt_warm_start_a: bool = knob(True, "lora: a slot's next document keeps A and resets B; else both start anew")
    ttt_cache: str = knob("keep", "lora: keep keys and values of the scored past, or recompute the window with each step's "
                          "adapters (exact, slow)", ("keep", "recompute"))
    ttt_asym_logit: bool = knob(True, "lora: adapt softcaps for positive and negative logits")
    ttt_chunk_tokens: int = knob(32768, "tokens in such a chunk", low=1)
    ttt_optimizer: str = knob("sgd", "test-time optimiser; its state persists over chunks", ("sgd", "adamw"))
    ttt_lr: float = knob(0.005, "its step at the first chunk; falls with a cosine to 0 at the last", low=0)
    ttt_momentum: float = knob(0.9, "SGD momentum", low=0, high=1)
    ttt_epochs: int = knob(3, "passes over a chunk after it is scored", low=1)
    ttt_batch_tokens: int = knob(16384, "tokens in one test-time step over all ranks", low=1)
    ttt_grad_clip: float = knob(1.0, "clip of the test-time gradient norm; 0: none", low=0)
    ttt_params: str = knob("all", "what test-time training moves", ("all", "control", "last"))
    ttt_polyak: float = knob(0.0, "chunk: scores read an average of the weights with this decay a step; 0: none", low=0, high=1)
    ttt_byte_weighted: bool = knob(False, "chunk: tokens weigh as many as their bytes")
    phased_ttt_num_phases: int = knob(6, "lora: times that the network itself learns from documents that are scored", low=0)
    phased_ttt_plan: str = knob("halving", "after ..., 1/4, 1/2 of all documents from what is new; or from the longest so far", ("halving", "prefix"))
    phased_ttt_prefix_docs: int = knob(0, "prefix: documents scored by the last of its phases; 0: 1 in 20", low=0)
    global_ttt_lr: float = knob(0.01, "lora: SGD step of the network itself; falls with a cosine", low=0)
    global_ttt_momentum: float = knob(0.9, "lora: its momentum", low=0, high=1)
    global_ttt_epochs: int = knob(1, "lora: passes over each chunk of scored documents", low=1)
    global_ttt_chunk_tokens: int = knob(16384, "lora: tokens in one such step", low=1)
    ngram_tilt_boost: float = knob(2.625, "added to the logit of the token that counting expects, renormalised; 0: no tilt", low=0)
    ngram_tilt_order: int = knob(16, "tokens of context that must agree (PR #2130: 8 is far worse)", low=1)
    ngram_tilt_threshold: float = knob(0.8, "share of the context's earlier occurrences that the token must have", low=0, high=1)
    mixer: str = knob("", "experts hedged with the network when adapting: letters of u b t p (1- to 3-grams, PPM-C)")
    mixer_eta: float = knob(0.1, "how fast their weights follow the losses of earlier moments", low=0)
    ttt_unfreeze_blocks: int = knob(2, "blocks that TTT_PARAMS=last moves, with all gains and gates", low=0)


# all systems before this one
AS_PUBLISHED = dict(num_heads=8, num_kv_heads=4, fp8="none", step_rule="sdclip", weight_coder="sections", train_batch_schedule="",
                    phased_ttt_num_phases=1, phased_ttt_plan="prefix", global_ttt_lr=1e-3, global_ttt_chunk_tokens=32768)

# The published naive baseline: no tricks, int8 and zlib. Learning rates and momentum as upstream's script has them.
BASELINE = AS_PUBLISHED | dict(
    vocab_size=1024, num_layers=9, mlp_mult=2.0, mlp_act="relu2", train_seq_len=1024, eval_seq_len=1024, train_batch_tokens=524288,
    qk_gain_init=1.5, rope_dims=0, ln_scale=False, xsa_last_n=0, attn_gate="none", smear_gate="none", unet_skips="plain", num_loops=0,
    parallel_residual="none", doc_isolation=False, matrix_lr=0.04, scalar_lr=0.04, tied_embed_lr=0.05, muon_momentum=0.95,
    muon_momentum_warmup_start=0.85, muon_momentum_warmup_frac=0.036, muon_coefficients="quintic", muon_row_normalize=False, muon_wd=0.0,
    embed_wd=0.0, adam_wd=0.0, beta2=0.95, grad_clip_norm=0.0, warmdown_frac=0.087, min_lr=0.0, average="none", quantizer="rtn",
    matrix_bits=8, embed_bits=8, attn_clip_sigmas=6.0, mlp_clip_sigmas=6.0, embed_clip_sigmas=6.0, compressor="zlib", ttt_enabled=False)

# The whole job on two CPU cores in three minutes: every stage of the record at a hundredth of its size.
SMOKE = dict(
    data_path="data/datasets/local_sp1024", tokenizer_path="data/tokenizers/local_1024_bpe.model", vocab_size=1024, num_layers=5,
    model_dim=128, mlp_mult=3.0, xsa_last_n=5, num_loops=1, loop_start=1, loop_end=2, parallel_start_layer=3, train_seq_len=256,
    eval_seq_len=256, eval_stride=128, train_batch_tokens=4096, pack_tokens=1024, micro_batch_tokens=4096, val_batch_tokens=8192,
    max_wallclock_seconds=75.0, iterations=600, warmup_steps=1, train_log_every=20, gptq_calibration_batches=8, ttt_chunk_tokens=16384,
    ttt_epochs=1, ttt_batch_tokens=4096, ttt_chunk_size=64, ttt_lora_rank=16, ttt_lora_alpha=28.8, checkpoint_seconds=30.0, val_docs=150,
    phased_ttt_num_phases=2, artifact_max_bytes=400_000, sliding_window_enabled=True)

# The seed systems of the contest, each a table of what differs from the one before it that it grew out of. Counts of steps
# are turned into fractions of the run by the number of steps that the original logged, and so are the horizons of averages
# (1 / (1 - decay) steps) and counts of validation documents (2,000 and 2,500 of 50,000 before the phases end: 1 in 20, the
# default). What the originals did against the contest's rules, or by mistake (notes in records/README.md), is not repeated.
NO_EXTRAS = AS_PUBLISHED | dict(ngram_tilt_boost=0.0, ttt_asym_logit=False, phased_ttt_num_phases=0)
PR413 = BASELINE | NO_EXTRAS | dict(
    # its ablation: 1,000 steps, of which a warm-down of 3,000 leaves the last third, and a momentum warm-up of 1,500 two
    attn_gate="dense", value_residual="mix", smear_gate="channel", bigram_vocab_size=4096, train_batch_tokens=131072,
    iterations=1000, max_wallclock_seconds=0.0, matrix_lr=0.0067, scalar_lr=0.0067, tied_embed_lr=0.0167, warmdown_frac=1.0,
    muon_momentum=0.967, muon_momentum_warmup_start=0.92, muon_momentum_warmup_frac=1.0, muon_normalize_update=True,
    muon_wd=0.04, embed_wd=0.04, adam_wd=0.04, grad_clip_norm=0.3, matrix_bits=6, attn_clip_sigmas=4.0, mlp_clip_sigmas=4.0,
    compressor="auto", sliding_window_enabled=True, eval_stride=128, ttt_enabled=True, ttt_method="none", mixer="p")
PR430 = PR413 | dict(
    num_layers=11, num_kv_heads=8, mlp_mult=3.5, mlp_act="leaky_relu2", train_seq_len=2048, eval_seq_len=2048, xsa_last_n=11,
    rope_dims=16, rope_base=22082.0,  # NTK: 10,000 * 2^(16/14) for twice the length it was built for
    ln_scale=True, attn_gate="scalar", value_residual="none", x0_residual=True, ve_layers="9,10", bigram_vocab_size=6144,
    train_batch_tokens=786432, iterations=1_000_000, max_wallclock_seconds=600.0, matrix_lr=0.025, scalar_lr=0.025,
    tied_embed_lr=0.035, warmdown_frac=0.62, muon_momentum=0.99, muon_momentum_warmup_frac=0.265, muon_normalize_update=False,
    average="ema", ema_horizon=0.0589, quantizer="gptq", matrix_bits=5, eval_stride=64, ttt_method="chunk", ttt_optimizer="adamw",
    ttt_lr=5e-4, ttt_params="last", ttt_polyak=0.998, ttt_byte_weighted=True, mixer="ubt")
PR490 = PR430 | dict(
    num_kv_heads=4, mlp_mult=3.0, xsa_last_n=0, rope_dims=0, rope_base=20449.0,  # NTK again: 2^(64/62)
    ln_scale=False, attn_gate="dense", value_residual="mix", x0_residual=False, ve_layers="", bigram_vocab_size=4096,
    warmdown_frac=0.2, muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_frac=0.083,
    ema_horizon=0.0553, matrix_bits=6, ttt_lr=1e-4, ttt_chunk_tokens=131072, ttt_polyak=0.0, ttt_byte_weighted=False, mixer="")
PR1880 = NO_EXTRAS | dict(
    mlp_mult=4.0, logit_softcap=15.0, attn_gate="out", smear_gate="post", parallel_residual="one", parallel_start_layer=7,
    loader="coprime", doc_isolation=False, matrix_lr=0.022, muon_momentum=0.99, muon_momentum_warmup_frac=0.337,
    muon_coefficients="quintic", beta2=0.95, warmdown_frac=0.72, min_lr=0.0, ema_horizon=0.0642, attn_clip_sigmas=12.85,
    mlp_clip_sigmas=12.85, embed_bits=8, embed_clip_sigmas=20.0, gptq_calibration_batches=64, eval_seq_len=2048, ttt_method="chunk")
PR1693 = NO_EXTRAS | dict(
    mlp_mult=4.0, attn_gate="out", smear_gate="post", muon_momentum_warmup_frac=0.306, muon_coefficients="quintic", beta2=0.95,
    warmdown_frac=0.75, min_lr=0.0, ema_horizon=0.0583, mlp_clip_sigmas=12.0, embed_clip_sigmas=15.0, eval_seq_len=2048,
    ttt_lora_sites="qkvomh", ttt_lora_rank=96, ttt_lora_alpha=96.0, ttt_beta2=0.999, ttt_warm_start_a=False, phased_ttt_num_phases=3)
PR1855 = NO_EXTRAS | dict(
    mlp_mult=4.0, gated_attn_quant_gate=True, lqer_top_k=3, eval_seq_len=2048, ttt_lora_sites="qkvomh", phased_ttt_num_phases=3)
PR2135 = AS_PUBLISHED | dict(
    mlp_mult=4.0, matrix_lr=0.028, lqer_top_k=3, lqer_asym_group=32, gptq_calibration_batches=32, eval_seq_len=2560,
    ttt_lora_sites="qvomh", ttt_lora_lr=8e-5, ttt_weight_decay=2.0)

# An empty table: the defaults are the record.
PRESETS = {"record": {}, "baseline": BASELINE, "pr413": PR413, "pr430": PR430, "pr490": PR490, "pr1880": PR1880,
           "pr1693": PR1693, "pr1855": PR1855, "pr2135": PR2135, "smoke": SMOKE}

# Knobs of earlier versions of this file, with the value that means what their absence means now: artifacts remember them.
REMOVED = {"attn_window": "", "loop_mix": False, "muon_beta2": 0.0, "muon_cautious_wd": False, "ttt_logit_bias": False, "ttt_trust": 0.0}

# Names that other scripts of the contest use for a knob that is here under its later spelling.
RENAMED = {
    "VAL_BATCH_SIZE": "VAL_BATCH_TOKENS", "EMA_ENABLED": "AVERAGE", "SWA_ENABLED": "AVERAGE", "XSA_LAYERS": "XSA_LAST_N",
    "ATTN_OUT_GATE": "ATTN_GATE", "ATTN_OUT_GATE_ENABLED": "ATTN_GATE", "GATED_ATTENTION": "ATTN_GATE",
    "SPARSE_ATTN_GATE_ENABLED": "ATTN_GATE", "SMEAR_GATE_ENABLED": "SMEAR_GATE", "SKIP_GATES_ENABLED": "UNET_SKIPS",
    "PARTIAL_ROPE_DIMS": "ROPE_DIMS", "WEIGHT_DECAY_MUON": "MUON_WD", "WEIGHT_DECAY_ADAM": "ADAM_WD",
    "PARALLEL_RESIDUAL_START": "PARALLEL_START_LAYER", "WARMDOWN_ITERS": "WARMDOWN_FRAC", "QUANT_BITS": "MATRIX_BITS",
    "MUON_MOMENTUM_WARMUP_STEPS": "MUON_MOMENTUM_WARMUP_FRAC", "BIGRAM_HASH": "BIGRAM_VOCAB_SIZE",
    "BIGRAM_BUCKETS": "BIGRAM_VOCAB_SIZE", "TTT_BATCH_SIZE": "TTT_SLOTS",
    "TTT_K_LORA": "TTT_LORA_SITES", "TTT_O_LORA": "TTT_LORA_SITES", "TTT_MLP_LORA": "TTT_LORA_SITES",
    "TTT_EVAL_SEQ_LEN": "EVAL_SEQ_LEN", "LOAD_ARTIFACT": "ARTIFACT", "TTT_EVAL_ONLY": "MODE", "TTT_ONLY": "MODE", "EVAL_ONLY": "MODE",
    "EVAL_ONLY_PATH": "ARTIFACT", "QUANTIZE_ONLY": "MODE", "DATA_DIR": "DATA_PATH", "EMBED_LR": "TIED_EMBED_LR", "MLP_HIDDEN": "MLP_MULT",
    "MLP_RATIO": "MLP_MULT", "WEIGHT_DECAY": "MUON_WD", "LEAKY_SLOPE": "MLP_ACT", "LEAKY_RELU_SLOPE": "MLP_ACT", "MLP_LEAKY_SLOPE": "MLP_ACT",
    "NEGATIVE_SLOPE": "MLP_ACT", "LEAKY_RELU": "MLP_ACT", "LORA_RANK": "TTT_LORA_RANK", "TOKEN_BOOST": "NGRAM_TILT_BOOST",
    "TOKEN_ORDER": "NGRAM_TILT_ORDER", "TOKEN_THRESHOLD": "NGRAM_TILT_THRESHOLD", "COMPILE_ENABLED": "COMPILE_SCOPE",
    "COMPILE_MODE": "COMPILE_SCOPE", "TORCH_COMPILE": "COMPILE_SCOPE", "ENABLE_TORCH_COMPILE": "COMPILE_SCOPE", "USE_COMPILE": "COMPILE_SCOPE",
    "SKIP_COMPILE": "COMPILE_SCOPE", "RECUR_LAYERS": "LOOP_START", "RECUR_START_STEP": "ENABLE_LOOPING_AT", "VAL_MAX_SEQS": "VAL_DOCS",
    "EVAL_BATCH_SEQS": "VAL_BATCH_TOKENS", "SEQS_PER_GPU": "MICRO_BATCH_TOKENS", "GRAD_ACCUM_STEPS": "MICRO_BATCH_TOKENS",
    "LOADER_MODE": "LOADER", "USE_SMEARGATE": "SMEAR_GATE", "SDP_BACKEND": "ATTN_BACKEND", "FUSED_CE_ENABLED": "KERNELS",
    "MLP_KERNEL_MODE": "KERNELS", "TARGET_MB": "ARTIFACT_MAX_BYTES", "USE_ZSTD": "COMPRESSOR", "PARALLEL_START": "PARALLEL_START_LAYER"}

# A variable with one of these words in its name was meant for a training script of this contest; one without any of
# them, and not one slip of the keyboard away from a knob, belongs to the shell and is left alone.
FAMILIES = frozenset(
    "TTT GPTQ MUON EMA SWA QAT LQER XSA SMEAR BIGRAM TRIGRAM ROPE LOOPS LOOPING UNET WARMDOWN SOFTCAP GATED GATES GATE LR "
    "MTP DTG CASEOPS SIGMAS MIXER CROWN POLYAK SLIDING WALLCLOCK ITERATIONS QK VE VE128 POINTER OGD PHASED NGRAM TILT PPM "
    "QTTT LOGIT INT6 INT8 PRUNE PREQUANT ORTHO LAWA DISTILL CRAWLER MACRO PHRASE COMPLEMENT CUBRIC SURPRISAL NITRUST AWQ ETLB HSM MILE "
    "RECUR D2S OBF NONFINITE COPRIME MLP ATTN RESID LEAKY F1 CHOKE".split())

# Names of such scripts that no such word marks: those that three or more of 439 scripts read, and some of merged records' commands.
ELSEWHERE = frozenset(
    "CONTROL_TENSOR_NAME_PATTERNS FP16_KEEP_NAME_PATTERNS COMPILE_FULLGRAPH N_ITERS CHUNK_SIZE D_CONV D_STATE EVAL_STATEFUL EXPAND HEADDIM "
    "NGROUPS N_BLOCKS NUM_FLAT_LAYERS INST_DIM REGIME_TRACKER ADAPTIVE_DEPTH DDP_FIND_UNUSED_PARAMETERS SKIP_FINAL_EVAL TRAIN_STATEFUL "
    "VAL_DOC_FRACTION DELTA_NET_HEADS SLOT_ENABLED SLOT_STEPS SLOT_MAX_WINDOWS AMP_DTYPE EMBEDDING_DIM BLOCK_SIZE CPU_SMOKE_SEQ_LEN "
    "N_PHYSICAL_BLOCKS CONTINUE_PROBE_WEIGHT CONTINUE_PROBE_ENABLED FP_STORAGE VAL_MAX_TOKENS ANCHOR_DIM BACKOUT_INIT FLAT_WEIGHT_SHARE "
    "INIT_MODEL_PATH HEAD_DIVERSITY_WEIGHT QUANT_CLIP_RANGE SCALE_STORAGE SKIP_TRAIN ZSTD_LEVEL CACHE_ALPHA CACHE_LAYER FORCE_STOP_STEP "
    "MIXED_QUANT NUM_UNIQUE_BLOCKS N_DEPTH_ITERS SEQ_LENS_PER_GPU USE_CACHE VERTICAL_CARRY VERTICAL_CHUNK_SIZE WINDOW_SIZE WITHIN_BOOST "
    "WORD_BOOST AGREE_ADD_BOOST N_INT6_LAYERS".split())


MOST_ROW_TOKENS = 131072  # of one forward pass in training: longer ones are no faster on an H200


class ConfigError(SystemExit):
    """A configuration that cannot run. Raised before anything is loaded; its text names the knob and what to do."""

    def __init__(self, text: str):
        super().__init__(f"config: {text}")


def read_stages(name: str, text: str, least: float, last: float, example: str) -> list[tuple[float, float]]:
    """A schedule 'value:fraction,...' as [(fraction of the run at which it ends, value)], then `last` for the rest of it."""
    wrong = ConfigError(f"{name}={text}: rising 'value:fraction' pairs below {last} and 1, like {example}")
    value = r"\d+" if isinstance(last, int) else r"0?\.\d+"
    if not re.fullmatch(rf"({value}:0?\.\d+(,{value}:0?\.\d+)*)?", text):
        raise wrong
    pairs = [pair.split(":") for pair in text.split(",") if pair]
    rows = [(float(until), type(last)(value)) for value, until in pairs] + [(math.inf, last)]
    if any(a[0] >= b[0] or not least <= a[1] < b[1] for a, b in zip(rows, rows[1:])):
        raise wrong
    return rows


def stage_at(rows: list[tuple[float, float]], p: float) -> float:
    """The value of such a schedule at progress p."""
    return next(value for until, value in rows if p < until)


@dataclass(frozen=True)
class Config(PackKnobs, OptimKnobs, ModelKnobs, DataKnobs, RunKnobs):
    """All knobs, resolved and frozen. Derived values are properties."""

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        return int(self.model_dim * self.mlp_mult)

    @property
    def rotary_dims(self) -> int:
        return self.rope_dims or self.head_dim

    @property
    def dataset(self) -> Path:
        return Path(self.data_path or f"data/datasets/fineweb10B_sp{self.vocab_size}")

    @property
    def tokenizer(self) -> Path:
        return Path(self.tokenizer_path or f"data/tokenizers/fineweb_{self.vocab_size}_bpe.model")

    @property
    def timed(self) -> bool:
        """Whether progress follows the clock; bit-equal reruns must not."""
        return self.max_wallclock_seconds > 0 and not self.deterministic

    @property
    def uses_lora(self) -> bool:
        return self.ttt_enabled and self.ttt_method == "lora"

    @property
    def blocks_per_batch(self) -> int:
        return self.train_batch_tokens // self.pack_tokens

    @property
    def seq_limits(self) -> list[tuple[float, int]]:
        """[(fraction of the run at which it ends, longest segment)], the last TRAIN_SEQ_LEN; ConfigError if it says no such thing."""
        return read_stages("TRAIN_SEQ_SCHEDULE", self.train_seq_schedule, 2, self.train_seq_len, "1024:0.35")

    @property
    def batch_shares(self) -> list[tuple[float, float]]:
        """[(fraction of the run at which it ends, share of TRAIN_BATCH_TOKENS in a step)], the last 1; ConfigError likewise."""
        return read_stages("TRAIN_BATCH_SCHEDULE", self.train_batch_schedule, 1e-6, 1.0, "0.5:0.35")

    @property
    def value_layers(self) -> set[int]:
        """VE_LAYERS as a set; ConfigError if it is no list of numbers."""
        if not re.fullmatch(r"(\d+(,\d+)*)?", self.ve_layers):
            raise ConfigError(f"VE_LAYERS={self.ve_layers}: layers like 9,10")
        return {int(x) for x in self.ve_layers.split(",") if x}

    def as_dict(self) -> dict:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def recipe_hash(self) -> str:
        """12 hex digits over every knob that can change the result; equal for two seeds of one recipe."""
        skip = {"mode", "run_id", "seed", "artifact_dir", "artifact", "checkpoint", "sample_prompt", "sample_tokens", "preset",
                "sample_temperature", "data_path", "tokenizer_path", "track", "micro_batch_tokens"}
        kept = {k: v for k, v in sorted(self.as_dict().items()) if k not in skip}
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:12]

    def describe(self) -> list[str]:
        """One line a knob, sorted, `*` where it differs from the record's default."""
        return [f"{'*' if getattr(self, f.name) != f.default else ' '} {f.name.upper()}={getattr(self, f.name)}"
                for f in sorted(dataclasses.fields(self), key=lambda f: f.name)]


def parse_value(f: dataclasses.Field, text: str):
    """One environment string as the knob's own type; ConfigError names the knob, the value and what would do."""
    kind, name = type(f.default), f.name.upper()
    if kind is bool:  # 'False' as text would be true
        if text not in ("0", "1"):
            raise ConfigError(f"{name}={text!r}: 0 or 1 expected")
        return text == "1"
    try:
        value = kind(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r}: {kind.__name__} expected") from None
    check_value(f, value)
    return value


def check_value(f: dataclasses.Field, value) -> None:
    """Refuse a value outside its choices or bounds, with the nearest choice as a suggestion."""
    name, meta = f.name.upper(), f.metadata
    if meta["choices"] and value not in meta["choices"]:
        near = difflib.get_close_matches(str(value), [str(c) for c in meta["choices"]], 1, 0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{name}={value}: not one of {', '.join(filter(None, meta['choices']))}{hint}")
    bounds = meta["low"], meta["high"]
    if isinstance(value, float) and not math.isfinite(value) or \
            any(b is not None and (value < b if b is bounds[0] else value > b) for b in bounds):
        raise ConfigError(f"{name}={value}: must lie in [{bounds[0]}, {'inf' if bounds[1] is None else bounds[1]}]")


def slips(name: str) -> set[str]:
    """What a finger makes of a name: a letter dropped (not of four: SED is another program), doubled or swapped."""
    cuts = [(name[:i], name[i:]) for i in range(len(name))]
    return ({a + b[1:] for a, b in cuts if len(name) > 4} | {a + b[0] + b for a, b in cuts}
            | {a + b[1::-1] + b[2:] for a, b in cuts})


def explain_unknown(name: str, names: dict) -> str:
    """What to tell of a variable that was meant as a knob but is none; empty for one that belongs to the shell."""
    if name in RENAMED:  # known elsewhere: say where it went
        return f"{name} is called {RENAMED[name]} here: {names[RENAMED[name]].metadata['doc']}"
    if name.lower() in REMOVED:
        return f"{name} was a knob once; what it brought, and why it went, is in records/README.md"
    if "CASEOPS" in name:
        return f"{name}: case operators are a property of the data here (data/prepare.py --transform), which DATA_PATH names"
    longer = [n for n in names if len(n) > 4]  # MODEL and SPEED are as near to MODE and SEED as a slip, but are usual
    near = [n for n in names if set(name) <= set(n) and name in slips(n)] or difflib.get_close_matches(name, longer, 1, 0.87)
    if near:
        return f"unknown knob {name}; did you mean {near[0]}?"
    # TTT_LERNING_RATE is one of TTT_*, but PREQUANT_TTT_ENABLED is no TTT_ENABLED, however alike they look
    kin = difflib.get_close_matches(name, [n for n in names if n.split("_")[0] == name.split("_")[0]], 1, 0.6)
    if name in ELSEWHERE or FAMILIES & set(name.split("_")):
        return f"unknown knob {name}; " + (f"did you mean {kin[0]}?" if kin else "there is no such thing here")
    return ""


def refuse_unknown(env: dict, names: dict) -> None:
    """Stop on variables that were meant as knobs but are none, all at once; silently ignored knobs have spoilt records before."""
    wrong = [line for name in sorted(set(env) - set(names)) if (line := explain_unknown(name, names))]
    if wrong:
        raise ConfigError("\n        ".join(wrong) + "\n        (MODE=config lists all knobs)")


def load_config(env: dict, cuda: bool, base: dict | None = None, check: bool = True) -> Config:
    """Resolve preset, then `base` (an artifact's own config), then the environment; every error is a ConfigError."""
    names = {f.name.upper(): f for f in dataclasses.fields(Config)}
    refuse_unknown(env, names)
    given = {names[n].name: parse_value(names[n], v) for n, v in env.items() if n in names}
    preset = given.get("preset") or ("record" if cuda else "smoke")
    check_value(names["PRESET"], preset)
    cfg = Config(**{**PRESETS[preset], **(base or {}), **given, "preset": preset})  # later entries win
    if check:
        validate(cfg, launched(env, "WORLD_SIZE", 1))
    return cfg


def launched(env: dict, name: str, least: int = 0) -> int:
    """A number that torchrun sets, or `least` without it."""
    text = env.get(name, str(least))
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}={text!r}: a rank or a number of ranks expected, as torchrun sets it")
    return int(text)


def launch(env: dict) -> tuple[int, int, int]:
    """(rank, local rank, world size) as torchrun sets them; (0, 0, 1) without it. ConfigError for what no launcher sets."""
    cure = "start with torchrun, or unset what an earlier run has left: unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT"
    rank, local, world = launched(env, "RANK"), launched(env, "LOCAL_RANK"), launched(env, "WORLD_SIZE", 1)
    if not local <= rank < world:
        raise ConfigError(f"RANK={rank} LOCAL_RANK={local} of WORLD_SIZE={world}: no launcher sets these together; {cure}")
    missing = [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if world > 1 and n not in env]
    if missing:
        raise ConfigError(f"WORLD_SIZE={world}, but {', '.join(missing)} not set: this process would wait for others forever; {cure}")
    return rank, local, world


def help_wanted(arguments: list[str]) -> bool:
    """Whether --help stands behind the script, where nothing else is read: anything else is refused with its right spelling."""
    if arguments and not set(arguments) & {"-h", "--help"}:
        pairs = re.findall(r"(?:^|\s)-*([A-Za-z][\w-]*)(?:=|\s+(?!-))(\S+)", " ".join(arguments))
        spelled = " ".join(f"{name.upper().replace('-', '_')}={shlex.quote(value)}" for name, value in pairs) or "SEED=42"
        raise ConfigError(f"arguments are not read: {shlex.join(arguments)}. Settings stand in front, as environment variables: "
                          f"{spelled} python train_gpt.py")
    return bool(arguments)


def validate(d: Config, world: int) -> None:
    """Refuse combinations that no single bound can see. Each line: condition that must hold, knob, reason."""
    assert d.seq_limits and d.batch_shares  # reading them refuses what is no schedule
    repeated = d.num_loops * (d.loop_end - d.loop_start + 1)  # layer applications that recurrence adds
    rules = [
        (d.model_dim % d.num_heads == 0, "NUM_HEADS", f"must divide MODEL_DIM={d.model_dim}"),
        (d.num_heads % d.num_kv_heads == 0, "NUM_KV_HEADS", f"must divide NUM_HEADS={d.num_heads}"),
        (d.rotary_dims % 2 == 0 and d.rotary_dims <= d.head_dim, "ROPE_DIMS", f"even, at most the head's {d.head_dim}"),
        (d.xsa_last_n <= d.num_layers, "XSA_LAST_N", f"at most NUM_LAYERS={d.num_layers}"),
        (not d.num_loops or d.loop_start <= d.loop_end < d.num_layers, "LOOP_END",
         f"LOOP_START={d.loop_start} <= LOOP_END={d.loop_end} < NUM_LAYERS={d.num_layers} must hold"),
        (d.train_batch_tokens % d.pack_tokens == 0, "TRAIN_BATCH_TOKENS", f"must be a multiple of PACK_TOKENS={d.pack_tokens}"),
        (d.blocks_per_batch % world == 0, "TRAIN_BATCH_TOKENS",
         f"its {d.blocks_per_batch} blocks of PACK_TOKENS={d.pack_tokens} do not divide over {world} ranks"),
        (d.pack_tokens <= (d.micro_batch_tokens or MOST_ROW_TOKENS), "MICRO_BATCH_TOKENS", f"must hold one block of PACK_TOKENS={d.pack_tokens}"),
        (d.parallel_residual == "none" or d.parallel_start_layer < d.num_layers, "PARALLEL_START_LAYER",
         f"no layer runs side by side; PARALLEL_RESIDUAL=none says that, or take one below {d.num_layers}"),
        (d.parallel_residual != "two" or not d.num_loops or not d.loop_start < d.parallel_start_layer <= d.loop_end
         or d.loop_start + repeated <= (d.num_layers + repeated) // 2, "PARALLEL_START_LAYER",  # only the plan's second half has lanes
         f"the lanes would begin inside the loop: when it returns to layer {d.loop_start}, which has one stream, the second lane is lost"),
        (d.eval_stride <= d.eval_seq_len, "EVAL_STRIDE", f"at most EVAL_SEQ_LEN={d.eval_seq_len}, else tokens are skipped"),
        (d.eval_seq_len <= d.val_batch_tokens, "VAL_BATCH_TOKENS", f"must hold one window of EVAL_SEQ_LEN={d.eval_seq_len}"),
        (d.phased_ttt_plan == "prefix" or not d.phased_ttt_prefix_docs, "PHASED_TTT_PREFIX_DOCS", "only PHASED_TTT_PLAN=prefix counts them"),
        (set(d.ttt_lora_sites) <= set("qkvomh"), "TTT_LORA_SITES", "letters of q k v o m h"),
        (d.logit_softcap > 0 or not d.ttt_asym_logit, "TTT_ASYM_LOGIT", "adapts softcaps, but LOGIT_SOFTCAP=0: set it to 0 too"),
        (d.step_rule != "trellis" or d.weight_coder == "range", "STEP_RULE", "only WEIGHT_CODER=range knows a trellis; fisher without"),
        (set(d.mixer) <= set("ubtp") and len(set(d.mixer)) == len(d.mixer), "MIXER", "letters of u b t p, each once"),
        (d.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE", "at least 2: one row is for tokens without a predecessor"),
        (d.trigram_vocab_size != 1, "TRIGRAM_VOCAB_SIZE", "at least 2: one row is for tokens without predecessors"),
        (d.value_layers <= set(range(d.num_layers)), "VE_LAYERS", f"layers below NUM_LAYERS={d.num_layers}"),
        (not d.x0_residual or d.parallel_residual != "two", "X0_RESIDUAL", "two lanes have no single end of a block"),
        (d.gate_window <= d.model_dim, "GATE_WINDOW", f"at most MODEL_DIM={d.model_dim}"),
        (not d.timed or d.gptq_reserve_seconds < d.max_wallclock_seconds, "GPTQ_RESERVE_SECONDS",
         f"leaves nothing of MAX_WALLCLOCK_SECONDS={d.max_wallclock_seconds:g} for training"),
        (d.timed or d.iterations < 1_000_000 or d.mode != "train", "ITERATIONS", "without a clock (MAX_WALLCLOCK_SECONDS=0 or "
         "DETERMINISTIC=1) progress is counted in steps: say how many"),
        (d.head_dim <= 256, "NUM_HEADS", f"heads of MODEL_DIM / NUM_HEADS = {d.head_dim} channels: no fast attention goes beyond 256"),
        (not d.uses_lora or d.doc_isolation, "DOC_ISOLATION", "TTT_METHOD=lora adapts to one document at a time, so documents must be apart; "
         "TTT_METHOD=chunk or TTT_ENABLED=0"),
        (not d.uses_lora or d.ttt_chunk_size <= d.eval_seq_len, "TTT_CHUNK_SIZE", f"at most a window, EVAL_SEQ_LEN={d.eval_seq_len}"),
        (not d.uses_lora or d.ttt_lora_sites or d.ttt_asym_logit, "TTT_LORA_SITES", "nothing would adapt: name a site, or TTT_ASYM_LOGIT=1, or "
         "TTT_METHOD=none"),
        (not re.search(r"[/\\\x00-\x1f]|^[.\-]|^\s|\s$", d.run_id), "RUN_ID", "a file name: no slashes, no dot, dash or space in front"),
    ]
    for holds, name, reason in rules:
        if not holds:
            raise ConfigError(f"{name}={getattr(d, name.lower())}: {reason}")


def set_environment() -> None:
    """Variables that libraries read and that must be set before CUDA starts."""
    # two graphs and three row shapes fragment memory otherwise
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # cuBLAS is only reproducible with a fixed workspace; this is the size it takes on Hopper anyway
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def shell_environment() -> dict:
    """The process environment, read here and nowhere else."""
    return dict(os.environ)


# What names of variables begin with that libraries, launchers, schedulers and shells read. Another name that was set for this
# run alone, and is no knob, was probably meant as one.
LIBRARIES = tuple(
    "CUDA NVIDIA NCCL NV_ CUBLAS TORCH PYTORCH TRITON OMP KMP MKL GOMP OPENBLAS BLIS NUMEXPR GLOO UCX FI_ PY PIP VIRTUAL_ENV CONDA POETRY TOX "
    "MAMBA UV_ LD_ SUDO SYSTEMD INVOCATION_ID JOURNAL_STREAM JPY_ CLICOLOR MAKE DIRENV VSCODE LMOD MODULE LOADEDMODULES PATH MANPATH LANG LC_ TZ HOME USER LOGNAME MAIL SHELL SHLVL PWD OLDPWD TERM COLORTERM COLUMNS LINES DISPLAY XDG DBUS SSH TMUX "
    "STY TMP TEMP HF_ HUGGINGFACE TRANSFORMERS TOKENIZERS WANDB TRACKIO TENSORBOARD RANK LOCAL_ WORLD_SIZE GROUP_ ROLE_ MASTER_ SLURM PBS LSB OMPI "
    "PMI PRTE HYDRA MPI RAY KUBERNETES JUPYTER CI GIT HTTP NO_PROXY ALL_PROXY AWS GOOGLE AZURE RUNPOD PS1 PS2 PROMPT HOST EDITOR VISUAL PAGER LESS "
    "LS_ HIST MALLOC ASAN GLIBC TF_ JAX XLA COVERAGE DEBIAN MPLBACKEND SOURCE_DATE _".split())


def strangers(env: dict, inherited: set[str]) -> list[str]:
    """Variables that look like knobs, with a number or a truth value, that the shell did not have when it started, and that neither this
    program nor any library reads. (Paths and words are left alone: a shell's start-up files export many.)"""
    knobs = {f.name.upper() for f in dataclasses.fields(Config)}
    return sorted(n for n in env.keys() - inherited - knobs if n.isupper() and not n.startswith(LIBRARIES)
                  and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?|(?i:true|false|yes|no|on|off)", env[n]))


# ----------------------------------------------------------------------------------------------------------------------
# 3. RUNTIME - where this process runs and what it tells: ranks, device, log and JSONL, two budget clocks made of named
#    spans that add up to the wall time, atomic files, signals. Only this room prints, and only it knows the time.
# ----------------------------------------------------------------------------------------------------------------------
TRAIN_SPANS = ("train", "hessians")  # all that reads training data is on the training clock
EVAL_SPANS = ("eval load", "eval full", "eval sliding", "eval ttt")  # decompression is on the evaluation clock
RULER = "=" * 100  # parsers of contest logs start after it: what stands before is source code


def leave_console() -> None:
    """Standard output goes nowhere from now on: what is left in its buffer would otherwise end the process with another exit status."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_help() -> None:
    """What this file says of itself."""
    try:
        print(__doc__, flush=True)
    except BrokenPipeError:  # `| head` has read enough
        leave_console()


class Diverged(RuntimeError):
    """The loss or a gradient is not a usable number any more."""


def process_age() -> float:
    """Seconds since this process was started (imports included); 0 where the system does not tell."""
    try:
        # field 22, counted behind the name, which may hold spaces
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


def shell_variables() -> set[str] | None:
    """Names of the variables that the starting shell was itself started with; None where the system does not tell."""
    try:
        pid = os.getppid()
        while Path(f"/proc/{pid}/comm").read_text().strip() in ("timeout", "torchrun", "pt_elastic", "nice", "time"):  # they start it for the shell
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        return {line.split(b"=")[0].decode(errors="replace") for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}
    except (OSError, ValueError, IndexError):
        return None


def choose_threads(fixed: bool) -> None:
    """Set CPU threads: as OMP_NUM_THREADS says, or all cores, a quarter of them or one, whichever multiplies fastest just now.

    Threads wait for each other, so beside other work two were ten times slower than one. `fixed`: bit-equal reruns, always all cores.
    """
    most = torch.get_num_threads()
    if fixed or most == 1 or "OMP_NUM_THREADS" in shell_environment():
        return
    x, w, seconds = torch.ones(4096, 128), torch.ones(128, 384), {}
    for n in [most, max(most // 4, 1), 1] * 3:
        torch.set_num_threads(n)
        torch.relu(x @ w)  # the first call makes the threads
        start = time.perf_counter()
        for _ in range(4):
            torch.relu(x @ w)
        seconds[n] = seconds.get(n, 0.0) + time.perf_counter() - start  # the mean: where others work, some turns are quick by luck
    torch.set_num_threads(min(seconds, key=seconds.get))


PATIENCE = datetime.timedelta(minutes=10)  # how long ranks wait for one that does not come, or has died


def join(ranks: tuple[int, int, int]) -> None:
    """Meet the other ranks: NCCL for device tensors, gloo for numbers that must not touch the device queue. Says so when it has to wait."""
    rank, local, world = ranks
    if HAVE["cuda"] and local >= torch.cuda.device_count():
        raise SystemExit(f"LOCAL_RANK={local}, but this machine shows {torch.cuda.device_count()} GPUs: start as many ranks as it has")
    if world == 1 or dist.is_initialized():
        return
    env = shell_environment()
    place = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    told = threading.Timer(5.0, lambda: print(f"rank {rank} is waiting for {world} ranks at {place}; after {PATIENCE} it gives up", flush=True))
    told.daemon = True
    told.start()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if HAVE["cuda"] else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as e:
        raise SystemExit(f"rank {rank} did not meet its {world} ranks at {place} ({type(e).__name__}: {str(e).splitlines()[0][:200]}); are all "
                         "of them started? Without torchrun: unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT") from None
    finally:
        told.cancel()


def from_rank_0(make: Callable, ranks: tuple[int, int, int]):
    """What make() gives on rank 0, on every rank: other nodes may hold other files. Its SystemExit stops all ranks."""
    if ranks[2] == 1:
        return make()
    box = [None]
    if ranks[0] == 0:
        try:
            box = [(make(), None)]
        except (SystemExit, OSError) as e:
            box = [(None, SystemExit(str(e)))]
    dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    made, problem = box[0]
    if problem is not None:
        raise problem if ranks[0] == 0 else SystemExit(1)
    return made


class Clock:
    """Exclusive named spans: exactly one runs at any time, so their sum is the wall time since launch (seconds)."""

    def __init__(self, sync: Callable[[], None]):
        self.sync = sync
        self.mark = time.perf_counter() - process_age()  # so that importing torch is in the first span
        self.name, self.seconds = "start-up", {}  # the first span began before this line
        self.broken = ""  # the span in which an error began

    def switch(self, name: str) -> str:
        """Close the running span and open `name`; returns the closed one's name."""
        self.sync()  # work queued on the device belongs to the span that queued it
        now, before = time.perf_counter(), self.name
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self.mark
        self.mark, self.name = now, name
        return before

    @contextlib.contextmanager
    def span(self, name: str):
        """Run a block under `name`; the outer span stops meanwhile."""
        before = self.switch(name)
        try:
            yield
        except BaseException:
            self.broken = self.broken or name
            raise
        finally:
            self.switch(before)

    def read(self, *names: str) -> float:
        """Seconds spent in these spans so far, the running one included; in all spans if none is named."""
        running = time.perf_counter() - self.mark if not names or self.name in names else 0.0
        return running + sum(v for k, v in self.seconds.items() if not names or k in names)


def write_atomic(path: Path, data: bytes | Callable) -> None:
    """Write (bytes, or what a function writes to a file), fsync, rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            data(f) if callable(data) else f.write(data)
            f.flush()
            os.fsync(f.fileno())  # the rename must not reach the disk before the data
        os.replace(part, path)  # atomic within one file system
    finally:
        part.unlink(missing_ok=True)  # nothing half-written stays, whatever went wrong


def lock(file) -> bool:
    """Whether no other process that lives holds this open file; until this one ends, it does. True where a system has no such locks."""
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process, so that what it starts does not keep it
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        pass
    return True


class Voice:
    """What a process tells: a log, its JSONL and the console from rank 0, and what the verdict will say."""

    def __init__(self, cfg: Config, rank: int, world: int, quiet: bool = False):
        self.rank, self.world, self.quiet, self.folder, self.id = rank, world, quiet, Path(cfg.artifact_dir), cfg.run_id
        self.clock = Clock(torch.cuda.synchronize if HAVE["cuda"] else lambda: None)
        self.files, self.ended = [], []
        self.failures: list[str] = []  # broken rules that did not stop the run; the last line and exit status tell
        self.caveats: list[str] = []  # what the verdict must say though no rule of the run was broken
        self.goes_on = ""  # the command that goes on from what is on disk, should this process die

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name() if HAVE["cuda"] else f"CPU, {torch.get_num_threads()} threads"

    def open_log(self, cfg: Config) -> None:
        """Start logs/RUN_ID.txt and .jsonl: source, ruler, versions, device, resolved config."""
        if not self.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # line-buffered: a killed run leaves a usable log
        self.files = [open(self.path(s), "a", encoding="utf-8", buffering=1) for s in (".txt", ".jsonl")]
        if not lock(self.files[0]):
            raise ConfigError(f"RUN_ID={self.id}: in use by a run that is still alive; {self.path('.txt')} is its log")
        self.write(0, SOURCE + "\n" + RULER + "\n")
        versions = f"python {platform.python_version()} torch {torch.__version__} numpy {np.__version__}"
        self.log(f"run_id:{self.id} mode:{cfg.mode} preset:{cfg.preset} recipe:{cfg.recipe_hash()} seed:{cfg.seed}")
        self.log(f"{versions} | {self.device_name} | world_size:{self.world} | source sha256:{sha256(SOURCE.encode())}")
        self.log(f"available: {' '.join(k for k, v in HAVE.items() if v) or 'nothing optional'}")
        asked = shell_environment().get("CUDA_VISIBLE_DEVICES")
        if asked not in (None, "", "-1") and not HAVE["cuda"]:  # one that does not exist would train on the CPU for days
            self.warn(f"CUDA_VISIBLE_DEVICES={asked}, but torch sees no GPU: this process runs on the CPU")
        self.write(0, "".join(line + "\n" for line in cfg.describe()))
        changed = [line[2:] for line in cfg.describe() if line[0] == "*"]
        self.log(f"not the record's default: {' '.join(changed) or 'none'}")
        inherited = shell_variables()
        unread = strangers(shell_environment(), inherited) if inherited is not None else []
        if unread:
            self.warn(f"set for this run, but nothing here reads {'it' if len(unread) == 1 else 'them'}: {', '.join(unread)}")
        start_tracker(self, cfg)
        self.event("machine", versions=versions, device=self.device_name)
        self.event("config", recipe=cfg.recipe_hash(), source=sha256(SOURCE.encode()), world=self.world, **cfg.as_dict())

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.id}{suffix}"

    def log(self, text: str) -> None:
        """One line to the log and then to the console, from rank 0. Either may be lost without an end to the run."""
        self.write(0, text + "\n")
        if not self.main or self.quiet:
            return
        try:
            if sys.stdout is None:
                raise ValueError("closed")
            print(text, flush=True)
        except (OSError, ValueError) as e:  # its reader went away (`| head`, a dead ssh), or it was closed from the start
            self.quiet = True
            self.write(0, f"the console is gone ({type(e).__name__}): the run goes on, and what it says stands in this log alone\n")
            leave_console()

    def write(self, which: int, text: str) -> None:
        """Append to the log (0) or the JSONL (1). A full disk ends the file, not the run."""
        if not self.files or self.files[which] is None:
            return
        try:
            self.files[which].write(text)
        except OSError as e:
            lost, self.files[which] = self.files[which], None
            self.ended.append(lost)  # not closed: the run's name is locked by it
            self.log(f"!! {lost.name} ends here ({e}): the run goes on without it")

    def warn(self, text: str) -> None:
        """A line that cannot be overlooked: what runs is not what one may think."""
        self.log("!" * 100 + f"\n!! {text}\n" + "!" * 100)
        self.event("warning", text=text)

    def fail(self, text: str) -> None:
        """Record a broken rule; the run goes on, and its last line and exit status say so."""
        self.failures.append(text)
        self.warn(f"FAILED: {text}")

    def can_go_on(self, mode: str, name: str, path: Path) -> None:
        """Print the command that goes on from a file, for the case that this process dies later."""
        local = shell_environment().get("LOCAL_WORLD_SIZE", str(self.world))
        start = ["python"] if self.world == 1 else ["torchrun", "--standalone", f"--nproc_per_node={local}"]
        folder = [] if self.folder == Path("logs") else [f"ARTIFACT_DIR={shlex.quote(str(self.folder))}"]
        self.goes_on = " ".join([f"MODE={mode}", f"{name}={shlex.quote(str(path))}", *folder, *start, shlex.quote(sys.argv[0] or "train_gpt.py")])
        self.log(f"goes on with: {self.goes_on}")

    def event(self, kind: str, **fields) -> None:
        """One JSON object a line, with seconds since launch."""
        if self.files:
            # t first: two events of a kind stay sortable
            record = {"event": kind, "t": round(self.clock.read(), 3), **fields}
            self.write(1, json.dumps(record, default=str) + "\n")

    def close(self) -> None:
        """Close the log."""
        for f in filter(None, [*self.files, *self.ended]):
            with contextlib.suppress(OSError):  # a full disk was said where it was met
                f.close()
        self.files, self.ended = [], []


class Run(Voice):
    """Rank, device and voice of this process. Methods that communicate must be called by every rank."""

    def __init__(self, cfg: Config, ranks: tuple[int, int, int], quiet: bool = False):
        rank, self.local, world = ranks
        super().__init__(cfg, rank, world, quiet)
        self.device = torch.device("cuda", self.local) if HAVE["cuda"] else torch.device("cpu")
        # bf16 on a CPU is slower and only less exact
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.scorer_ready = not self.gpu  # whether the scorer is compiled
        self.asked_rows = cfg.micro_batch_tokens  # before this GPU's memory decided
        if self.gpu:
            torch.cuda.set_device(self.device)
            torch.set_num_threads(1)  # with one a core, three runs and the tests at once were not past their first weights in two minutes
        join(ranks)
        random.seed(cfg.seed), np.random.seed(cfg.seed), torch.manual_seed(cfg.seed)  # library calls that draw by themselves
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.use_deterministic_algorithms(cfg.deterministic)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def place(self, rows: list[Tensor]) -> list[Tensor]:
        """Host tensors on this rank's device, copied behind the host's back where the device allows it."""
        return [r.pin_memory().to(self.device, non_blocking=True) for r in rows] if self.gpu else rows

    def fetch(self, numbers: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """(host copy under way, function that waits until it is there): the device queue is not drained."""
        if not self.gpu:
            return numbers, lambda: None
        host = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event.synchronize

    def agree(self, value: float) -> float:
        """Rank 0's number on every rank, by gloo, so that the device queue is not waited for."""
        if self.world == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)  # on the CPU, hence through gloo
        dist.broadcast(box, 0)
        return float(box)

    def free_bytes(self) -> float:
        """Device memory that a process may still take, the smallest of all ranks'; infinite on a CPU, whose memory nobody shares out."""
        if not self.gpu:
            return math.inf
        return self.least(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())

    def least(self, value: float) -> float:
        """The smallest of all ranks' numbers, by gloo."""
        box = torch.tensor([value], dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(box, dist.ReduceOp.MIN)
        return float(box)

    def together(self, make: Callable):
        """make() on every rank; what stops one of them stops all, with its reason, instead of leaving the others waiting for it."""
        made, problem = None, None
        try:
            made = make()
        except (SystemExit, OSError) as e:
            problem = str(e) if self.world == 1 else f"rank {self.rank} on {platform.node()}: {e}"
            if self.world == 1:
                raise
        if self.world > 1:
            problems = [None] * self.world
            dist.all_gather_object(problems, problem)
            if any(problems):
                raise SystemExit("\n".join(filter(None, problems)) if self.main else 1)
        return made

    def sum_(self, tensor: Tensor) -> Tensor:
        """All-reduce (sum) in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any_problem(self, problem: str) -> str:
        """A problem that some rank has, on all of them, so that all do the same: they would go at the slowest one's pace anyway."""
        problems = [problem]
        if self.world > 1:
            problems = [""] * self.world
            dist.all_gather_object(problems, problem)
        return next((f"rank {rank}: {p}" if self.world > 1 else p for rank, p in enumerate(problems) if p), "")

    def sum_slices(self, bank: Tensor) -> Tensor:
        """This rank's slice, along the first dimension, of the sum over ranks (reduce-scatter)."""
        shard = bank.new_empty(bank.shape[0] // self.world, *bank.shape[1:])
        # torch 2.13 has renamed both of these functions
        getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(shard, bank)
        return shard

    def all_slices(self, shard: Tensor) -> Tensor:
        """All ranks' slices, one after the other along the first dimension (all-gather)."""
        full = shard.new_empty(shard.shape[0] * self.world, *shard.shape[1:])
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(full, shard.contiguous())
        return full

    def sum_all_(self, tensors: list[Tensor]) -> None:
        """All-reduce (sum) many tensors in place as one message."""
        if self.world > 1:
            flat = self.sum_(torch.cat([t.flatten() for t in tensors]))
            for t, f in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(f.view_as(t))

    def share(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank (nodes need no common file system)."""
        if self.world == 1:
            return data
        size = int(self.agree(float(len(data) if self.main else 0)))
        box = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.main else torch.empty(size, dtype=torch.uint8)
        dist.broadcast(box, 0)
        return box.numpy().tobytes()

    def close(self) -> None:
        """Close the log and leave the process group."""
        super().close()
        if dist.is_initialized():
            dist.destroy_process_group()


def script(folder: str, name: str) -> Path:
    """A script of the checkout beside this file: what a run can do without is neither counted nor shipped."""
    path = Path(__file__).resolve().parent / folder / f"{name}.py"
    if not path.is_file():
        raise SystemExit(f"{path} is missing; run from a checkout")
    return path


def tool(folder: str, name: str):
    """Such a script as a module."""
    spec = importlib.util.spec_from_file_location(name, script(folder, name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start_tracker(run: Run, cfg: Config) -> None:
    """TRACK: the follower of the JSONL that feeds a tracker; it ends by itself with the run's result, or without news."""
    if not cfg.track:
        return
    command = [sys.executable, str(script("records", "track")), str(run.path(".jsonl")), "--to", cfg.track, "--follow",
               "--from-byte", str(run.files[1].tell())]  # behind what an earlier run of this name has written
    with open(run.path(".track.txt"), "w") as said:  # a session of its own: Ctrl-C here must not cut off the last lines
        subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    run.log(f"track:{cfg.track}, its words are in {run.path('.track.txt')}")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_config(env: dict, base: dict | None = None, check: bool = True) -> Config:
    """load_config for this machine: whether it has a GPU decides the default preset."""
    return load_config(env, HAVE["cuda"], base, check)


def named(cfg: Config) -> Config:
    """The config with a run id, made of the time and a random suffix where none is given."""
    fresh = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    return cfg if cfg.run_id else dataclasses.replace(cfg, run_id=fresh)


def report_budgets(run: Run, cfg: Config) -> None:
    """All spans, their sum beside the wall time, and the two budgets; an overrun is a failure."""
    run.clock.switch(run.clock.name)  # book the running span before reading
    spans, wall = run.clock.seconds, run.clock.read()
    run.log("spans: " + " ".join(f"{k.replace(' ', '_')}:{v:.2f}s" for k, v in spans.items())
            + f" sum:{sum(spans.values()):.2f}s wall:{wall:.2f}s")
    for label, names, cap in (("train", TRAIN_SPANS, cfg.max_wallclock_seconds), ("eval", EVAL_SPANS, cfg.eval_wallclock_seconds)):
        used = run.agree(run.clock.read(*names))  # one verdict on all ranks
        run.log(f"budget {label}: {used:.2f}s of {f'{cap:.0f}s' if cap else 'no limit'}")
        if cap and used > cap and (label == "eval" or cfg.timed):
            run.fail(f"{label} budget overrun: {used:.2f}s > {cap:.0f}s")
    run.event("spans", wall=wall, **spans)


# ----------------------------------------------------------------------------------------------------------------------
# 4. TOKENIZER AND BYTES - how many bytes of text a token stands for, proved against decoded UTF-8 at start-up. This is
#    the denominator of every score, and the most common fault of this contest.
# ----------------------------------------------------------------------------------------------------------------------
BOS = 1  # every document of a contest shard begins with it


class Tokenizer:
    """A SentencePiece model and its byte table."""

    def __init__(self, path: Path, vocab_size: int):
        import sentencepiece
        if not path.is_file():
            raise SystemExit(f"tokenizer {path} is missing; see data/README.md")
        self.path, self.sp = path, sentencepiece.SentencePieceProcessor(model_file=str(path))
        if self.sp.vocab_size() != vocab_size:
            raise ConfigError(f"VOCAB_SIZE={vocab_size}, but {path} has {self.sp.vocab_size()} pieces")
        if self.sp.bos_id() != BOS:  # shards without BOS in front would merge documents
            raise SystemExit(f"{path}: BOS is {self.sp.bos_id()}, contest shards use {BOS}")
        self.sha256 = sha256(path.read_bytes())
        self.base_V, self.space_V, self.edge_V = self.byte_table()

    def byte_table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(bytes without a leading space, has one, is a control piece) for each token id.

        A byte piece is one byte; control and unknown pieces are none; a leading U+2581 is a space that counts
        except behind a control piece, where the decoder drops it.
        """
        n = self.sp.vocab_size()
        base, space, edge = np.zeros(n, np.int64), np.zeros(n, bool), np.zeros(n, bool)
        for i in range(n):
            if self.sp.is_control(i) or self.sp.is_unknown(i) or self.sp.is_unused(i):
                edge[i] = True  # no text of its own, and swallows the space behind it
            elif self.sp.is_byte(i):
                base[i] = 1  # byte fallback: one piece, one byte of UTF-8
            else:
                piece = self.sp.id_to_piece(i)
                space[i] = piece.startswith("\u2581")  # counted only where the decoder keeps it
                base[i] = len(piece[int(space[i]):].replace("\u2581", " ").encode())
        return base, space, edge

    def count_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of each token but the first, given its predecessor: [N] -> [N-1] int64."""
        before, target = tokens[:-1], tokens[1:]
        return self.base_V[target] + (self.space_V[target] & ~self.edge_V[before])

    def piece_marks(self) -> np.ndarray:
        """Bytes of each token id that are private-use characters, as case operators are (PR #1729): [V] int64."""
        pieces = map(self.sp.id_to_piece, range(self.sp.vocab_size()))
        return np.array([3 * sum("\ue000" <= c <= "\uf8ff" for c in piece) for piece in pieces], np.int64)

    def check_operators(self, tokens: np.ndarray) -> None:
        """SystemExit if tokens [N] hold case operators, whose bytes only a sidecar can tell: the table would count three for each, and
        flatter the score by 3 to 12 % (PR #2138, #2071). A private-use character now and then is the text's own."""
        marks = self.piece_marks()[tokens]
        share = marks.sum() / max(int(self.count_bytes(tokens).sum()), 1)
        if share > 5e-4:
            most = int(np.bincount(tokens[marks > 0]).argmax())
            raise SystemExit(f"{int((marks > 0).sum())} validation tokens are case operators (token {most}, {ascii(self.sp.id_to_piece(most))}, is the "
                             f"most frequent): {share:.1%} of the bytes would be counted that no text has. Such data come with byte sidecars, "
                             "fineweb_val_bytes_*.bin, which lie beside the validation shards: fetch or prepare them again (data/README.md)")

    def check_sidecar(self, tokens: np.ndarray, sizes: np.ndarray, starts: np.ndarray) -> str:
        """Compare a byte sidecar [N] with the table on tokens [N]; SystemExit where they differ by more than the contest's rules explain.

        A sidecar counts the bytes of the text before the tokenizer normalised it. So case operators stand for none (or for their own
        three where the text held one), the bytes of a character in byte fallback may all stand on its last piece, and a no-break space
        is two bytes where the table has one. Runs of byte pieces are therefore compared as one, and what normalisation changed is
        counted: more than half a percent of the text is no normalisation.
        """
        byte = np.array([self.sp.is_byte(i) for i in range(self.sp.vocab_size())])[tokens[1:]]
        first = np.flatnonzero(~(byte & np.append(False, byte[:-1])))  # one unit: a token, or a run of byte pieces
        marks, table, told = (np.add.reduceat(x, first) for x in (self.piece_marks()[tokens[1:]], self.count_bytes(tokens), sizes[1:].astype(np.int64)))
        without = table - marks
        counted = int(((marks > 0) & (told == table)).sum())
        changed = np.where((told == table) | (told == without), 0, told - without)
        wrong, text = int(np.abs(changed).sum()), int(told.sum())
        if sizes[tokens == BOS].any():
            raise SystemExit("byte sidecar: documents' first tokens (BOS) have bytes; it is not that of these shards")
        if wrong > 0.005 * text or 20 * counted > int((marks > 0).sum()) + 20:
            why = f"counts the bytes of {counted} of {int((marks > 0).sum())} case operators" if wrong <= 0.005 * text else (
                f"differs from the byte table by {wrong} of {text} bytes, more than normalisation and operators explain")
            raise SystemExit(f"the byte sidecar {why}: it is not that of these shards, or {self.path} is not their tokenizer")
        by_document = np.add.reduceat(changed, np.searchsorted(first, starts).clip(max=len(first) - 1))
        far = int(np.abs(by_document).argmax())
        return (f"byte sidecar equals the table but for {int((marks > 0).sum())} case operators and {int((changed != 0).sum())} places in "
                f"{int((by_document != 0).sum())} documents that normalisation changed ({int(changed.sum()):+d} of {text} bytes; most in document {far}: "
                f"{int(by_document[far]):+d})")

    def check_bytes(self, tokens: np.ndarray, starts: np.ndarray, sample: int = 256) -> str:
        """Prove the byte table on documents spread over the set: the shortest text that the encoder turns into just these tokens has as
        many bytes. SystemExit if one differs. The decoder only suggests a text; what proves it is that the encoder turns it back into
        the same tokens, since table and decoder can share an error. Documents cut inside a UTF-8 character, which cannot be encoded
        back, are skipped.
        """
        spaces = [self.sp.piece_to_id(f"<0x{b:02X}>") for b in "\u2581".encode()]  # what a space becomes where no piece holds it alone
        lone = np.logical_and.reduce([tokens[i:len(tokens) - 2 + i] == piece for i, piece in enumerate(spaces)])
        if self.sp.is_byte(spaces[0]) and lone.any():
            raise SystemExit(f"{self.path} has no piece for a lone space: {int(lone.sum())} of them lie in the validation tokens as three bytes "
                             "each, and would be counted so. Train a tokenizer whose pieces hold U+2581 alone, and make the shards again")
        edges, proved, size, same = np.append(starts, len(tokens)), 0, 0, 0
        picks = np.unique(np.linspace(0, len(starts) - 1, min(sample, len(starts))).astype(int))
        for i in picks:
            doc = tokens[edges[i]:edges[i + 1]]
            decoded = self.sp.decode(doc.tolist()).replace("\u2581", " ")
            own = [t for t in (decoded.strip(" "), decoded.lstrip(" "), decoded.rstrip(" "), decoded) if self.sp.encode(t) == doc[1:].tolist()]
            same += len(own) > 0
            if not own and "\ufffd" in decoded:
                continue
            counted, true = int(self.count_bytes(doc).sum()), len((own or [decoded])[0].encode())  # the first token is BOS, no target
            if counted != true:
                raise SystemExit(f"byte table and text differ on document {i}: {counted} and {true} bytes; {self.path} is not the tokenizer of these "
                                 "shards, or it marks spaces in a way that the table does not know (treat_whitespace_as_suffix)")
            proved, size = proved + 1, size + true
        if 2 * same < len(picks):  # another tokenizer's table agrees with its own decoder, but the text is rubbish
            raise SystemExit(f"{self.path} is not the tokenizer of these shards: only {same} of {len(picks)} documents "
                             "give their own tokens when decoded and encoded again")
        return f"byte table equals UTF-8 on {proved} of {len(starts)} documents ({size} bytes), {same} of them encoded again to the same tokens"


# ----------------------------------------------------------------------------------------------------------------------
# 5. DATA - contest shards in, flat rows of segments out. The training order is a pure function of (seed, step), so it is
#    the same for any number of ranks and needs no state; a missing, short or corrupt shard is named, never skipped.
# ----------------------------------------------------------------------------------------------------------------------
MAGIC, HEADER_BYTES = 20240520, 1024


class Batch(NamedTuple):
    """One flat row: ids_T, targets_T, pos_T (place in its segment), cu_S1 (segment borders, int32), longest segment."""
    ids: Tensor
    targets: Tensor
    pos: Tensor
    cu: Tensor
    longest: int


def read_shard(path: Path) -> np.ndarray:
    """Memory-map a shard's tokens [N] uint16; SystemExit names a file that is short, altered or of another kind."""
    fix = ("build it again: python data/local_corpus.py --force" if "local_" in str(path) else
           "fetch it again: python data/cached_challenge_fineweb.py (see data/README.md)")
    if not path.is_file():
        raise SystemExit(f"shard {path} is missing; {fix}")
    size, header = path.stat().st_size, np.fromfile(path, "<i4", 256)  # a header can lie about a file that was cut
    if len(header) < 256 or header[0] != MAGIC or header[1] != 1 or header[2] < 1:
        raise SystemExit(f"shard {path} has no contest header (magic {MAGIC}, version 1, tokens); {fix}")
    if size != HEADER_BYTES + 2 * int(header[2]):
        raise SystemExit(f"shard {path} has {size} bytes, its header says {HEADER_BYTES + 2 * int(header[2])}; {fix}")
    return np.memmap(path, "<u2", "r", HEADER_BYTES)  # pages are read when a block is drawn


def find_shards(folder: Path, split: str) -> list[Path]:
    """All shards of a split in order, each with a sound header; SystemExit names one that is missing. The digits keep byte sidecars
    (`fineweb_val_bytes_*`) out."""
    paths = sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))
    if not paths:
        raise SystemExit(f"no fineweb_{split}_*.bin in {folder}; fetch them: python data/cached_challenge_fineweb.py, "
                         "or run without PRESET to use text that is already on this machine")
    numbers = [int(p.stem.rsplit("_", 1)[1]) for p in paths]
    begin = numbers[0] if split == "train" else 0  # any training text trains, but another validation set is another score
    for gap in sorted(set(range(begin, numbers[-1])) - set(numbers)):
        read_shard(folder / f"fineweb_{split}_{gap:06d}.bin")  # names it as missing
    sizes = [len(read_shard(p)) for p in paths]
    if split != "train" and len(sizes) > 1 and len(set(sizes)) == 1:  # only the last shard of a set is not filled
        raise SystemExit(f"{paths[-1]} is as long as the {split} shards before it, so the last one seems to be missing: {folder}/fineweb_{split}_"
                         f"{numbers[-1] + 1:06d}.bin; fetch it again: python data/cached_challenge_fineweb.py (see data/README.md)")
    return paths


def read_split(folder: Path, split: str) -> np.ndarray:
    """All tokens of a split [N] uint16."""
    return np.concatenate([read_shard(p) for p in find_shards(folder, split)])


def cut_segments(ids: np.ndarray, forced: np.ndarray, limit: int, isolate: bool) -> np.ndarray:
    """Segment borders [S+1] int32: at `forced` places, at documents' starts, and every `limit` tokens after those."""
    first = np.zeros(len(ids), bool)
    first[forced] = True  # no segment crosses a block's border
    if isolate:
        first |= ids == BOS  # a document sees nothing before itself
    starts = np.flatnonzero(first)  # position 0 is always among them
    pieces = -(-np.diff(np.append(starts, len(ids))) // limit)  # ceiling of length / limit
    nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # number within its document
    return np.append(np.repeat(starts, pieces) + limit * nth, len(ids)).astype(np.int32)


def make_batch(ids: np.ndarray, targets: np.ndarray, cu: np.ndarray, longest: int, run: Run, room: int = 0) -> Batch:
    """Move a row to the device. `room` pads cu with empty segments at the end, so that its shape is static."""
    pos = np.arange(len(ids)) - np.repeat(cu[:-1], np.diff(cu))  # place minus its segment's start
    cu = np.pad(cu, (0, max(room + 1 - len(cu), 0)), mode="edge")  # the last border again: empty segments
    rows = [torch.from_numpy(np.ascontiguousarray(a)) for a in
            (ids.astype(np.int64), targets.astype(np.int64), pos.astype(np.int64), cu)]
    return Batch(*run.place(rows), longest)


def coprime_order(counts: list[int], per_step: int, rng: np.random.Generator) -> np.ndarray:
    """Every block once, each step drawn from many shards: within a shard in strides coprime to its length (PR #1880).

    Shards are drawn in proportion to remaining^w, with w falling from .9 to .5 over 1,800 steps, so that the data of a step
    become more even; the original's table of shards a step is left out. counts: blocks a shard.
    """
    starts, left = np.cumsum([0, *counts])[:-1], np.array(counts)
    walks = []
    for n in counts:
        strides = [k for k in range(1, n + 1) if math.gcd(k, n) == 1]
        walks.append((int(rng.integers(n)) + int(rng.choice(strides)) * np.arange(n)) % n if n else np.empty(0, int))
    order = []
    for step in range(-(-sum(counts) // per_step)):
        # an emptied shard has weight 0, not 0 to a power
        weight = np.where(left > 0, left, 1) ** (0.9 - 0.4 * min(step / 1800, 1)) * (left > 0)
        take = np.minimum(rng.multinomial(per_step, weight / weight.sum()), left)
        while take.sum() < min(per_step, left.sum()):  # what small shards could not give
            take += rng.multivariate_hypergeometric(left - take, 1)
        drawn = np.concatenate([start + walk[n - l:n - l + t] for start, walk, n, l, t in zip(starts, walks, counts, left, take)])
        order.append(rng.permutation(drawn))
        left = left - take
    # the last steps come from whatever shard is left over
    return np.concatenate(order)


def block_order(cfg: Config, counts: list[int], rng: np.random.Generator) -> np.ndarray:
    """The blocks of one epoch, each once (LOADER)."""
    if cfg.loader == "coprime":
        return coprime_order(counts, cfg.blocks_per_batch, rng)
    return rng.permutation(sum(counts)) if cfg.loader == "shuffled" else np.arange(sum(counts))


def step_blocks(cfg: Config, share: float) -> int:
    """Blocks of a step of `share` of TRAIN_BATCH_TOKENS, over all ranks: whole ones, one at least. Ranks have no say in it."""
    return max(math.ceil(share * cfg.blocks_per_batch - 1e-9), 1)


def rank_blocks(blocks: int, rank: int, world: int) -> range:
    """Which of a step's blocks a rank takes: consecutive ones, as evenly as whole blocks allow; none where there are more ranks."""
    return range(rank * blocks // world, (rank + 1) * blocks // world)


def micro_blocks(cfg: Config, blocks: int) -> int:
    """Blocks in one forward pass: the most that memory allows and that divide a rank's blocks of a step; 0 of none."""
    most = min(blocks, (cfg.micro_batch_tokens or MOST_ROW_TOKENS) // cfg.pack_tokens)
    return max((m for m in range(1, most + 1) if blocks % m == 0), default=0)


class TrainStream:
    """Blocks of PACK_TOKENS over all training shards, permuted anew by (SEED, epoch); step -> this rank's batches."""
    DEPTH = 4  # steps that are cut ahead, so that a slow read of a network disk does not stop all ranks

    def __init__(self, cfg: Config, run: Run):
        self.cfg, self.run, self.shards = cfg, run, find_shards(cfg.dataset, "train")
        self.open = functools.lru_cache(128)(read_shard)  # each open shard takes a descriptor, and there may be thousands of shards
        sizes = [len(read_shard(p)) for p in self.shards]
        self.pack, self.per_step = cfg.pack_tokens, cfg.blocks_per_batch
        counts = [(n - 1) // self.pack for n in sizes]  # one token more is the last target
        self.counts, self.ends = counts, np.cumsum(counts)  # block index -> shard by binary search
        self.tokens = sum(sizes)
        if self.ends[-1] < 1:
            raise SystemExit(f"{cfg.dataset} holds {self.tokens} training tokens, fewer than PACK_TOKENS={self.pack}")
        self.shares, self.limits = cfg.batch_shares, cfg.seq_limits  # read once
        self.place, self.rooms = 0, {}  # rooms: blocks in a row -> segments that it has room for
        self.pool, self.ahead = ThreadPoolExecutor(1), {}  # the next step is cut while this one runs
        self.order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def calibration(self) -> list[Batch]:
        """GPTQ_CALIBRATION_BATCHES of this rank's rows, from steps behind the last that training can reach."""
        steps = itertools.count(self.cfg.iterations)
        return list(itertools.islice((b for step in steps for b in self.make(step)), self.calibration_rows))

    @property
    def calibration_rows(self) -> int:
        """So many rows that their tokens do not depend on the memory that decides how long one is."""
        share = self.per_step // self.run.world
        whole = micro_blocks(dataclasses.replace(self.cfg, micro_batch_tokens=0), share)
        return math.ceil(self.cfg.gptq_calibration_batches * whole / micro_blocks(self.cfg, share))

    def frequency(self, most: int = 5_000_000) -> Tensor:
        """Share of each token among the first `most` training tokens, with one more of each: [V] fp32."""
        # a token that calibration never saw is rare, not absent
        counts = np.bincount(self.open(self.shards[0])[:most], minlength=self.cfg.vocab_size) + 1.0
        return torch.from_numpy(counts / counts.sum()).float()

    def guess_room(self, blocks: int) -> int:
        """Segments that a row of so many blocks must have room for, by 64 of them; 0 (exact) off the GPU, where shapes are free."""
        if not self.run.gpu:
            return 0
        picks = np.linspace(0, self.ends[-1] - 1, 64).astype(int)
        shortest = self.limits[0][1]  # gives the most segments
        counts = [len(cut_segments(self.block(i)[:-1], np.zeros(1, int), shortest, True)) for i in picks]
        expected = blocks * np.mean(counts) + 6 * np.sqrt(blocks) * np.std(counts)
        return 64 * math.ceil(expected / 64)

    def block(self, index: int) -> np.ndarray:
        """Block `index` of all shards: [PACK_TOKENS + 1] tokens, the last one only a target."""
        shard = int(np.searchsorted(self.ends, index, side="right"))  # the first shard whose end lies behind the index
        at = (index - (self.ends[shard - 1] if shard else 0)) * self.pack
        tokens = np.asarray(self.open(self.shards[shard])[at:at + self.pack + 1])
        if int(tokens.max()) >= self.cfg.vocab_size:
            raise SystemExit(f"shard {self.shards[shard]}: training token {int(tokens.max())} >= "
                             f"VOCAB_SIZE={self.cfg.vocab_size}: another tokenizer's shards")
        return tokens

    def block_at(self, place: int) -> np.ndarray:
        """The block at a place of the endless sequence of permuted epochs."""
        epoch, at = divmod(place, int(self.ends[-1]))  # every block once before any comes again
        known, order = self.order  # read once: another thread may be in another epoch
        if known != epoch:
            rng = np.random.Generator(np.random.PCG64([self.cfg.seed, epoch]))  # stable across numpy versions
            order = block_order(self.cfg, self.counts, rng)
            self.order = epoch, order
        return self.block(int(order[at]))

    def make(self, step: int) -> list[Batch]:
        """This rank's share of a step, were all of them whole."""
        return self.cut(step * self.per_step, self.per_step, self.cfg.train_seq_len)

    def cut(self, place: int, blocks: int, limit: int) -> list[Batch]:
        """This rank's share of a step of so many blocks from a place of the endless sequence, in segments of at most `limit` tokens.

        Ranks take consecutive blocks, so their union never depends on their number.
        """
        mine = rank_blocks(blocks, self.run.rank, self.run.world)
        micro = micro_blocks(self.cfg, len(mine))
        return [self.row([self.block_at(place + j) for j in mine[i:i + micro]], limit) for i in range(0, len(mine), max(micro, 1))]

    def row(self, blocks: list[np.ndarray], limit: int) -> Batch:
        """Blocks side by side as one flat row."""
        ids = np.concatenate([b[:-1] for b in blocks])
        targets = np.concatenate([b[1:] for b in blocks])
        forced = np.arange(len(blocks)) * self.pack  # neighbours in a row are strangers
        cu = cut_segments(ids, forced, limit, self.cfg.doc_isolation)
        room = self.rooms[len(blocks)] = self.rooms.get(len(blocks)) or self.guess_room(len(blocks))
        if room and len(cu) - 1 > room:  # rare; a new shape means one more compilation, so say it
            room = self.rooms[len(blocks)] = 2 * 64 * math.ceil((len(cu) - 1) / 64)
            self.run.warn(f"a row with {len(cu) - 1} segments: room for {room} from now on, one recompilation")
        # the longest is told as ever: another number would be another compiled graph
        return make_batch(ids, targets, cu, self.cfg.train_seq_len, self.run, room)

    def get(self, p: float) -> tuple[list[Batch], int]:
        """(this rank's batches of the next step, at progress p; the tokens of that step over all ranks). Those of the steps behind it are
        made meanwhile on a thread."""
        blocks, limit = step_blocks(self.cfg, stage_at(self.shares, p)), stage_at(self.limits, p)
        now, self.place = (self.place, blocks, limit), self.place + blocks
        # a stage that has just begun finds nothing made for it
        batches = self.ahead.pop(now).result() if now in self.ahead else self.cut(*now)
        wanted = [(self.place + i * blocks, blocks, limit) for i in range(self.DEPTH)]
        self.ahead = {w: self.ahead.get(w) or self.pool.submit(self.cut, *w) for w in wanted}
        return batches, blocks * self.pack


class ValidationSet:
    """All validation tokens, where documents begin, and the bytes of every target."""

    def __init__(self, cfg: Config, tokenizer: Tokenizer):
        tokens = read_split(cfg.dataset, "val")  # all of it: 95 MB for the contest's set
        if len(tokens) < 2 or tokens[0] != BOS:
            raise SystemExit(f"validation shards in {cfg.dataset} do not begin with a document (BOS {BOS})")
        if int(tokens.max()) >= cfg.vocab_size:
            raise SystemExit(f"validation token {int(tokens.max())} >= VOCAB_SIZE={cfg.vocab_size}: another tokenizer's shards")
        sizes = read_sidecar(cfg.dataset, tokens)
        starts = np.flatnonzero(tokens == BOS)  # where documents begin
        cut = 0 < cfg.val_docs < len(starts)
        if cut:  # the next BOS stays: it is the last document's last target
            tokens, starts = tokens[:starts[cfg.val_docs] + 1], starts[:cfg.val_docs]
        self.tokens, self.starts = tokens, starts
        self.bytes = tokenizer.count_bytes(tokens) if sizes is None else sizes[1:len(tokens)].astype(np.int64)  # BOS: none
        self.targets = len(tokens) - 1  # every token but the first is predicted
        self.oracle = tokenizer.check_bytes(tokens[:-1] if cut else tokens, starts)
        if sizes is None:
            tokenizer.check_operators(tokens)
        else:
            self.oracle += "; " + tokenizer.check_sidecar(tokens, sizes[:len(tokens)], starts)
        self.isolate = cfg.doc_isolation

    @property
    def sequences(self) -> np.ndarray:
        """[n, 2] spans of input positions that a window must not leave: documents, or the whole stream as one."""
        if not self.isolate:
            return np.array([[0, self.targets]])
        # a document's last target is the next one's BOS
        spans = np.stack([self.starts, np.append(self.starts[1:], self.targets)], 1)
        return spans[spans[:, 1] > spans[:, 0]]

    def fingerprint(self) -> dict:
        """Identity of what is scored; equal fingerprints mean equal denominators."""
        return {"documents": len(self.starts), "tokens": self.targets, "bytes": int(self.bytes.sum()),
                "sha256": sha256(np.ascontiguousarray(self.tokens, "<u2").tobytes())}


def read_sidecar(folder: Path, tokens: np.ndarray) -> np.ndarray | None:
    """Bytes of each validation token [N] where a sidecar says them (CaseOps data); None where the byte table does."""
    if not any(folder.glob("fineweb_val_bytes_[0-9]*.bin")):
        return None
    sizes = read_split(folder, "val_bytes")  # one uint16 a token, in the format of the shards
    if len(sizes) != len(tokens):
        raise SystemExit(f"{folder}: {len(tokens)} validation tokens, but byte sidecars for {len(sizes)}; fetch both again")
    return sizes


def read_manifest(folder: Path, tokenizer: Tokenizer) -> dict:
    """What data/prepare.py says of the shards; {} where it says nothing. SystemExit if they are not those that it describes."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        ours = isinstance(manifest["tokenizer"]["sha256"], str)
    except (ValueError, KeyError, TypeError):  # the contest's own lists other things, and so may any tool's
        ours = False
    if not ours:
        return {}
    if manifest["tokenizer"]["sha256"] != tokenizer.sha256:
        raise SystemExit(f"{tokenizer.path} is not the tokenizer that {path} names (sha256)")
    for split in ("train", "val"):
        said = {s["path"]: s["file_bytes"] for s in manifest.get(split, {}).get("shards", [])}
        there = {p.name: p.stat().st_size for p in folder.glob(f"fineweb_{split}_[0-9]*.bin")}
        if said and said != there:
            name = sorted(set(said.items()) ^ set(there.items()))[0][0]
            raise SystemExit(f"{folder / name}: {path} describes another {split} split; python data/prepare.py --verify {folder}")
    return manifest


def check_manifest(manifest: dict, val: ValidationSet, cfg: Config) -> None:
    """SystemExit if the manifest of data/prepare.py says another number of validation bytes than is about to be divided by."""
    said, counted = manifest.get("val", {}).get("bytes"), int(val.bytes.sum())
    if said is not None and not cfg.val_docs and said != counted:
        raise SystemExit(f"{cfg.dataset / 'manifest.json'} says {said} bytes of validation text, but {counted} are counted: "
                         f"python data/prepare.py --verify {shlex.quote(str(cfg.dataset))} tells which file is not the one it describes")


def describe_data(manifest: dict) -> str:
    """One line of the log: what the shards hold, who proved them disjoint, and what was done to the text."""
    if "disjoint" not in manifest:
        return "no manifest of data/prepare.py: nothing proves that training and validation are disjoint"
    counts = " ".join(f"{split}:{manifest[split]['documents']}docs/{manifest[split]['tokens']}tokens/{manifest[split]['bytes']}bytes"
                      for split in ("train", "val"))
    transform = manifest["transform"]
    return (f"{manifest['name']} {counts} disjoint by {manifest['disjoint']['by']} "
            f"transform:{transform['name']}{' LOSSY' if transform['lossy'] else ''}")


def build_local_corpus(cfg: Config, run: Run) -> None:
    """Make the small corpus from text already on this machine (data/local_corpus.py) where it is not there yet, on each node."""
    for turn in (run.main, not run.main and run.local == 0):  # one after the other: nodes may share a file system
        if turn and not (cfg.dataset / "manifest.json").is_file():
            tool("data", "local_corpus").build(cfg.dataset.parent.parent, cfg.vocab_size, log=run.log)
        run.agree(0.0)  # the other ranks wait for the files


# ----------------------------------------------------------------------------------------------------------------------
# 6. KERNELS - for each operation an eager reference and the fast versions, behind one choice made at start-up. All take
#    flat rows: q_THE, k_TKE, v_TKE, borders cu_S1 and the longest segment; causal within a segment, blind beyond it.
# ----------------------------------------------------------------------------------------------------------------------


def attention_eager(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
    """The definition, O(T^2) memory: softmax(q k^T / sqrt(E)) v over earlier tokens of the same segment. -> [T, H, E]"""
    T, H, E = q.shape
    place = torch.arange(T, device=q.device)
    segment = torch.searchsorted(cu, place, right=True)  # which segment a token is in
    seen = (segment[:, None] == segment[None]) & (place[:, None] >= place[None])  # same segment, not later
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # query head h reads kv head h // group
    scores = torch.einsum("qhe,khe->hqk", q.float(), k.float()) / math.sqrt(E)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hqk,khe->qhe", weights, v.float()).to(q.dtype)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA: remove from each head's output its component along the token's own value. y [T, H, E], v [T, K, E]

    A head can always copy its own token through the residual stream; this leaves attention to the others. (PR #287)
    """
    y_TKGE, v_TK1E = y.unflatten(1, (v.shape[1], -1)), v[:, :, None]  # G query heads share a kv head
    along = (y_TKGE * v_TK1E).sum(-1, keepdim=True) / v_TK1E.square().sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.addcmul(y_TKGE, along, v_TK1E, value=-1).flatten(1, 2)


def finish_heads(y: Tensor, v: Tensor, xsa: bool, gate: Tensor | None) -> Tensor:
    """What comes between attention and its output's product: XSA, and a factor a head [T, H] or [H]. y [T, H, E] -> [T, H, E]"""
    y = exclude_self(y, v) if xsa else y
    return y if gate is None else y * gate[..., None]


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
    """Segments padded to the longest, then torch's dense causal attention. Padding lies behind every real token."""
    T, H, E = q.shape
    place = cu[:-1, None] + torch.arange(longest, device=q.device)  # [S, longest]
    rows = place.clamp(max=T - 1).flatten()  # padding reads some token; nobody reads its output
    group = H // k.shape[1]
    q_, k_, v_ = (x[rows].unflatten(0, place.shape).transpose(1, 2) for x in
                  (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    y = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True).transpose(1, 2)
    t = torch.arange(T, device=q.device)
    segment = torch.searchsorted(cu, t, right=True) - 1
    return y[segment, t - cu[segment]]


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
    """torch's varlen attention (FlashAttention-2 inside); window (-1, 0) is its word for causal."""
    from torch.nn.attention.varlen import varlen_attn
    more = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **more)


def operator(name: str, like: Callable, kept: Callable | None = None) -> Callable:
    """Register a function as one opaque node of compiled graphs; `like` makes its outputs' shapes from its arguments.

    `kept` takes from inputs and outputs what the operator NAME_backward gets behind the first output's gradient: tensors,
    then numbers. It returns the gradients of the first inputs. The next one, if it takes any, was added to the output, whose
    gradient it gets as it is; the others have none.
    """
    def save(ctx, inputs, output):
        chosen = kept(*inputs, *output)
        tensors = [x for x in chosen if isinstance(x, Tensor)]
        ctx.numbers, ctx.inputs = chosen[len(tensors):], len(inputs)
        ctx.save_for_backward(*tensors)

    def gradient(ctx, grad, *_):
        found = getattr(torch.ops.golf, f"{name}_backward")(grad, *ctx.saved_tensors, *ctx.numbers)
        return *found, grad if ctx.needs_input_grad[len(found)] else None, *[None] * (ctx.inputs - len(found) - 1)

    def register(f):
        op = torch.library.custom_op(f"golf::{name}", f, mutates_args=())
        op.register_fake(like)
        if kept is not None:
            op.register_autograd(gradient, setup_context=save)
        return op
    return register


if triton is not None:
    # Rows are taken B at a time across the borders of segments, so none is padded: what a row sees begins at FIRST[row] and
    # ends with itself, and who sees it ends before STOP[row]. Only a block's own square, and one with a border, need a mask.
    @triton.jit
    def reach(FIRST, begin, T, B: tl.constexpr):
        """A block's rows and where each one's segment begins, the lowest key seen, up to where all see all, and the end."""
        row, end, low = begin + tl.arange(0, B), tl.minimum(begin + B, T), tl.load(FIRST + begin)
        plain = tl.where(tl.load(FIRST + end - 1) == low, low + (begin - low) // B * B, low)
        return row, tl.load(FIRST + row, mask=row < T, other=0), low, plain, end

    @triton.jit
    def sight(row, key, first):
        return (key[None, :] <= row[:, None]) & (key[None, :] >= first[:, None])

    @triton.jit
    def halves(x, B: tl.constexpr, N: tl.constexpr):
        """The left and the right half of a tile's N columns."""
        return tl.split(tl.permute(tl.reshape(x, (B, 2, N // 2)), (0, 2, 1)))

    @triton.jit
    def angles(COS, SIN, row, live, E: tl.constexpr, R: tl.constexpr):
        """Cosine and sine of the first R / 2 channels; 1 and 0 for the other half of a head, and for rows that do not live."""
        c = tl.arange(0, E // 2)[None, :]
        at, turns = row[:, None] * R + c, live[:, None] & (c < R // 2)
        return tl.load(COS + at, mask=turns, other=1.0), tl.load(SIN + at, mask=turns, other=0.0)

    @triton.jit
    def turn_back(d, x, gain, ROOT, COS, SIN, at, row, T, E: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
        """From the gradient of x = gain rotate(norm(z)), a head's rows: that of z, and by row the gain's."""
        own, live = tl.sum(d * x, 1) / tl.where(gain == 0, float("inf"), gain), row < T  # nothing, instead of a NaN
        d = tl.load(ROOT + at, mask=live, other=0.0)[:, None] * (gain * d - x * (own / E)[:, None])
        left, right = halves(d, B, E)
        cos, sin = angles(COS, SIN, row, live, E, R)
        d = tl.join(left * cos - right * sin, right * cos + left * sin)
        return tl.reshape(tl.permute(d, (0, 2, 1)), (B, E)), own

    @triton.jit
    def weigh(q, k, v, l, acc, seen, scale, shift):
        """Adds a block's exponentials, less a row's shift, and what they weigh."""
        z = tl.dot(q, k.T) * scale - shift[:, None]
        p = tl.exp2(z if seen is None else tl.where(seen, z, -1e30))
        return l + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc)

    @triton.jit
    def weigh_all(q, K, V, own, row, first, low, plain, end, scale, shift, E: tl.constexpr, B: tl.constexpr):
        """Sum of a block of rows' exponentials [B] and the values that they weigh [B, E]."""
        l, acc = tl.zeros([B], tl.float32), tl.zeros([B, E], tl.float32)
        for j in range(low, plain, B):
            l, acc = weigh(q, K.load([j, own]), V.load([j, own]), l, acc, None, scale, shift)
        for j in range(plain, end, B):
            l, acc = weigh(q, K.load([j, own]), V.load([j, own]), l, acc, sight(row, j + tl.arange(0, B), first), scale, shift)
        return l, acc

    @triton.jit
    def attend_forward(Q, K, V, OUT, LSE, ALONG, GATE, FIRST, T, scale, H: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
                       B: tl.constexpr, XSA: tl.constexpr, GATED: tl.constexpr):
        """OUT of a block of rows and one head: without its part ALONG the token's own value, times its gate; LSE to base 2."""
        head, begin = tl.program_id(0), tl.program_id(1) * B
        row, first, low, plain, end = reach(FIRST, begin, T, B)
        own, at, q = head // G * E, head * T + row, Q.load([begin, head * E])  # the group's keys and values
        # no running maximum: keys are normed, so no score is above |q| sqrt(E), 2^82 for heads of 128 and a gain of 5, and fp32 ends at 2^128
        shift = tl.maximum(tl.sqrt(E * tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)) * scale - 100, 0.0)
        l, acc = weigh_all(q, K, V, own, row, first, low, plain, end, scale, shift, E, B)
        if tl.min(tl.where(row < T, l, 1.0)) < 1e-30:
            # gains above 7 can leave all that a row sees so far below this bound that nothing is left of it: find the maximum after all
            shift = tl.full([B], -1e30, tl.float32)
            for j in range(low, end, B):
                z = tl.dot(q, K.load([j, own]).T) * scale
                shift = tl.maximum(shift, tl.max(tl.where(sight(row, j + tl.arange(0, B), first), z, -1e30), 1))
            l, acc = weigh_all(q, K, V, own, row, first, low, plain, end, scale, shift, E, B)
        l = tl.maximum(l, 1e-37)  # rows behind the last token, which nobody reads
        y = acc / l[:, None]
        if XSA:
            v = V.load([begin, own]).to(tl.float32)
            along = tl.sum(y * v, 1) / tl.maximum(tl.sum(v * v, 1), 1e-12)
            tl.store(ALONG + at, along, mask=row < T)
            y -= along[:, None] * v
        if GATED:
            y *= tl.load(GATE + row * H + head, mask=row < T, other=0.0).to(tl.float32)[:, None]
        OUT.store([begin, head * E], y.to(OUT.dtype))
        tl.store(LSE + at, shift + tl.log2(l), mask=row < T)

    @triton.jit
    def steep(q, k, g, v, lse, delta, seen, scale):
        """d nats / d scores of a block."""
        p = tl.exp2(tl.dot(q, k.T) * scale - lse[:, None])
        p = p if seen is None else tl.where(seen, p, 0.0)
        return (p * (tl.dot(g, v.T) - delta[:, None])).to(k.dtype)

    @triton.jit
    def attend_queries(Q, K, V, OUT, GRAD, DQ, INNER, SELF, LSE, ALONG, GATE, DELTA, DGATE, FIRST, ROOT, COS, SIN, GAIN, DGAIN, T, scale,
                       H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, R: tl.constexpr, B: tl.constexpr, XSA: tl.constexpr,
                       GATED: tl.constexpr):
        """DQ of a block of rows and one head, with R before their norm and rotation. Also what keys need then: DELTA = sum_j p_j dp_j,
        with XSA or a gate the gradient INNER of attention's own output, with XSA the gradient SELF of the token's own value. What a
        factor of 0 makes of OUT says nothing about the factor, which takes no gradient then."""
        head, begin = tl.program_id(0), tl.program_id(1) * B
        row, first, low, plain, end = reach(FIRST, begin, T, B)
        own, at, gate = head // G * E, head * T + row, tl.full([B], 1.0, tl.float32)
        delta = tl.sum(GRAD.load([begin, head * E]).to(tl.float32) * OUT.load([begin, head * E]).to(tl.float32), 1)
        tl.store(DELTA + at, delta, mask=row < T)  # neither a factor nor a projection changes it
        if GATED:
            gate = tl.load(GATE + row * H + head, mask=row < T, other=1.0).to(tl.float32)
            tl.store(DGATE + row * H + head, tl.where(gate == 0, 0.0, delta / gate).to(DGATE.dtype.element_ty), mask=row < T)
        g = GRAD.load([begin, head * E])  # again, as below: three tiles at once would not fit into registers
        g = (g.to(tl.float32) * gate[:, None]).to(g.dtype) if GATED else g
        if XSA:
            v, along = V.load([begin, own]).to(tl.float32), tl.load(ALONG + at, mask=row < T, other=0.0)
            down = tl.sum(g.to(tl.float32) * v, 1) / tl.maximum(tl.sum(v * v, 1), 1e-12)
            mine = (down * along)[:, None] * v - along[:, None] * g.to(tl.float32)
            g = (g.to(tl.float32) - down[:, None] * v).to(g.dtype)
            mine -= tl.where(gate == 0, 0.0, down / gate)[:, None] * OUT.load([begin, head * E]).to(tl.float32)
            SELF.store([begin, head * E], mine.to(SELF.dtype))
        if XSA or GATED:
            INNER.store([begin, head * E], g)
        q, lse, acc = Q.load([begin, head * E]), tl.load(LSE + at, mask=row < T, other=0.0), tl.zeros([B, E], tl.float32)
        for j in range(low, plain, B):
            k = K.load([j, own])
            acc = tl.dot(steep(q, k, g, V.load([j, own]), lse, delta, None, scale), k, acc)
        for j in range(plain, end, B):
            k, seen = K.load([j, own]), sight(row, j + tl.arange(0, B), first)
            acc = tl.dot(steep(q, k, g, V.load([j, own]), lse, delta, seen, scale), k, acc)
        acc *= scale * 0.6931471805599453  # `scale` carries log2(e) for exp2; gradients want it without
        if R:
            q = Q.load([begin, head * E]).to(tl.float32)
            acc, mine = turn_back(acc, q, tl.load(GAIN + head), ROOT, COS, SIN, at, row, T, E, R, B)
            tl.store(DGAIN + at, mine, mask=row < T)
        DQ.store([begin, head * E], acc.to(DQ.dtype))

    @triton.jit
    def gather(k, v, q, g, dk, dv, lse, delta, seen, scale):
        """Adds what a block of queries says to a block of keys; scores are [keys, queries] here."""
        p = tl.exp2(tl.dot(k, q.T) * scale - lse[None, :])
        p = p if seen is None else tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(g.dtype), g, dv)
        return tl.dot((p * (tl.dot(v, g.T) - delta[None, :])).to(q.dtype), q, dk), dv

    @triton.jit
    def attend_keys(Q, K, V, INNER, SELF, DK, DV, LSE, DELTA, FIRST, STOP, ROOT, COS, SIN, T, scale, H: tl.constexpr, G: tl.constexpr,
                    E: tl.constexpr, R: tl.constexpr, B: tl.constexpr, XSA: tl.constexpr):
        """DK and DV of a block of keys of one kv head, whose query heads take turns, so that nothing is added up in memory."""
        kv, begin = tl.program_id(0), tl.program_id(1) * B
        key, end = begin + tl.arange(0, B), tl.minimum(begin + B, T)
        stop = tl.load(STOP + end - 1)
        blocks, alone = tl.cdiv(stop - begin, B), tl.load(FIRST + end - 1) <= begin
        # blocks of queries from `early` to `late` see all keys, and none of another segment is among them
        early, late = tl.where(alone, 1, blocks), tl.where(alone, tl.maximum(1, (stop - begin) // B), blocks)
        k, v, dk, dv = K.load([begin, kv * E]), V.load([begin, kv * E]), tl.zeros([B, E], tl.float32), tl.zeros([B, E], tl.float32)
        for turn in range(early * G, late * G):
            i, head = begin + turn // G * B, kv * G + turn % G
            at = head * T + i + tl.arange(0, B)
            dk, dv = gather(k, v, Q.load([i, head * E]), INNER.load([i, head * E]), dk, dv, tl.load(LSE + at), tl.load(DELTA + at), None, scale)
        for turn in range(0, (early + blocks - late) * G):
            i, head = begin + (turn // G + tl.where(turn < early * G, 0, late - early)) * B, kv * G + turn % G
            row = i + tl.arange(0, B)
            at, real = head * T + row, row < T
            first = tl.load(FIRST + row, mask=real, other=T)
            seen = (key[:, None] <= row[None, :]) & (key[:, None] >= first[None, :])
            dk, dv = gather(k, v, Q.load([i, head * E]), INNER.load([i, head * E]), dk, dv, tl.load(LSE + at, mask=real, other=0.0),
                            tl.load(DELTA + at, mask=real, other=0.0), seen, scale)
        if XSA:
            for head in range(kv * G, kv * G + G):
                dv += SELF.load([begin, head * E]).to(tl.float32)
        DV.store([begin, kv * E], dv.to(DV.dtype))
        dk *= scale * 0.6931471805599453  # as DQ
        if R:
            dk, _ = turn_back(dk, K.load([begin, kv * E]).to(tl.float32), 1.0, ROOT, COS, SIN, (H + kv) * T + key, key, T, E, R, B)
        DK.store([begin, kv * E], dk.to(DK.dtype))


ATTEND = (64, 4, (3, 2, 2))  # rows of a block, warps, stages of the three kernels


def heads_by(rows: int, *tensors: Tensor) -> list:
    """Descriptors of heads [T, H, E] as rows [T, H E] of any stride, read and written by blocks of one head."""
    for x in tensors:
        assert x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2]), "heads must lie side by side"
    return [TensorDescriptor(x, [len(x), x.shape[1] * x.shape[2]], [x.stride(0), 1], [rows, x.shape[2]]) for x in tensors]


def attend_rows(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, first: Tensor, xsa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """finish_heads of attention [T, H, E], log-sum-exp to base 2 [H, T], and with xsa how much of its own value a token saw [H, T]."""
    assert q.dtype != torch.float16, "exponentials of scores need the range of bf16 or fp32"
    (T, H, E), (B, warps, stages) = q.shape, ATTEND
    y, lse, along = q.new_empty(q.shape), *(q.new_empty(H, T * kept, dtype=torch.float32) for kept in (1, xsa))
    attend_forward[H, triton.cdiv(T, B)](*heads_by(B, q, k, v, y), lse, along, gate, first, T, math.log2(math.e) / math.sqrt(E), H,
                                         H // k.shape[1], E, B, xsa, gate.numel() > 0, num_warps=warps, num_stages=stages[0])
    return y, lse, along


class Turned(NamedTuple):
    """How queries and keys came to be: roots of their mean squares [H + K, T], the angles' cosines and sines [T, R], gains [H]."""
    root: Tensor
    cos: Tensor
    sin: Tensor
    gain: Tensor


def attend_back(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, first: Tensor, stop: Tensor, y: Tensor, lse: Tensor,
                along: Tensor, xsa: bool, into: tuple, turned: Turned | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of q, k, v written `into` three tensors, those of the gate and, by row, of gains returned; q's and k's are of what they
    were before norm and rotation where it is told how they were turned. Two kernels without atomics: the same digits each time."""
    (T, H, E), K, (B, warps, stages), gated, grad = q.shape, k.shape[1], ATTEND, gate.numel() > 0, grad.contiguous()
    root, cos, sin, gain = turned or (lse, lse, lse, lse)
    sizes = H, H // K, E, cos.shape[-1] if turned else 0, B, xsa
    dgate, delta, dgain = gate.new_empty(gate.shape), torch.empty_like(lse), torch.empty_like(lse) if turned else lse
    inner, mine = torch.empty_like(y) if xsa or gated else grad, torch.empty_like(y) if xsa else y
    scale, blocks = math.log2(math.e) / math.sqrt(E), triton.cdiv(T, B)
    attend_queries[H, blocks](*heads_by(B, q, k, v, y, grad, into[0], inner, mine), lse, along, gate, delta, dgate, first, root, cos, sin,
                              gain, dgain, T, scale, *sizes, gated, num_warps=warps, num_stages=stages[1])
    attend_keys[K, blocks](*heads_by(B, q, k, v, inner, mine, *into[1:]), lse, delta, first, stop, root, cos, sin, T, scale, *sizes,
                           num_warps=warps, num_stages=stages[2])
    return dgate, dgain


@operator("attend", lambda q, *rest: (q.new_empty(q.shape), q.new_empty(q.shape[1], len(q), dtype=torch.float32)),
          lambda *inputs_and_outputs: inputs_and_outputs)
def attend_op(q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [T, H, E], and log-sum-exp to base 2 [H, T]."""
    return attend_rows(q, k, v, q.new_empty(0), first, False)[:2]


@operator("attend_backward", lambda grad, *qkv_and_more: tuple(x.new_empty(x.shape) for x in qkv_and_more[:3]))
def attend_backward_op(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor, stop: Tensor, y: Tensor,
                       lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    into = tuple(x.new_empty(x.shape) for x in (q, k, v))
    attend_back(grad, q, k, v, q.new_empty(0), first, stop, y, lse, lse, False, into)
    return into


def segment_bounds(cu: Tensor, tokens: int) -> Tensor:
    """Where every token's segment begins and ends [2, T]. Not for compiled code: in torch 2.11's, on a GPU, the loss was NaN."""
    segment = torch.searchsorted(cu, torch.arange(tokens, device=cu.device), right=True) - 1
    return torch.stack((cu[segment], cu[segment + 1]))


def attention_triton(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
    """Our own (Triton, Hopper and later): blocks of rows whatever the segments, faster than FlashAttention-4 on short ones.

    In the place of borders it also takes their segment_bounds, which the network makes once a row.
    """
    return torch.ops.golf.attend(q, k, v, *(cu if cu.dim() == 2 else segment_bounds(cu, len(q))).unbind())[0]


class Past(NamedTuple):
    """What one visit remembers of S documents: keys and values [S, cells, K, E], where they go on [S], cells in the ring."""
    k: Tensor
    v: Tensor
    begin: Tensor
    window: int


def ring_view(begin: Tensor, rows: int, window: int) -> Tensor:
    """Who sees whom when S documents go on at positions begin [S] by C rows: [S, C, W + C] bool, W ring cells first.

    Cell c of the ring holds the last position before `begin` that is c modulo W. Rows at positions below zero (a window
    that reaches over the document's start) are seen by nobody but themselves.
    """
    row, cell = (torch.arange(n, device=begin.device) for n in (rows, window))
    start = begin[:, None]
    there = start - 1 - (start - 1 - cell).remainder(max(window, 1))  # [S, W] the position in each cell
    old = ((there >= 0) & (there < start))[:, None] & (there[:, None] > (start + row)[..., None] - window)
    itself = row[:, None] == row
    own = (row[:, None] >= row) & ((start + row >= 0)[:, None] | itself)
    return torch.cat((old, own), 2)


def attention_cached_eager(q: Tensor, k: Tensor, v: Tensor, past: tuple) -> Tensor:
    """S documents' next C tokens, attending to their cached past (a ring of W cells) and to themselves, causally: dense attention with a
    mask over the ring and the new rows.

    q [S C, H, E], k and v [S C, K, E], a Past with k and v [S, cells, K, E] -> [S C, H, E]
    """
    S, K = len(past.begin), k.shape[1]
    k_, v_ = (torch.cat((old[:, :past.window], new.unflatten(0, (S, -1))), 1).transpose(1, 2)
              for old, new in ((past.k, k), (past.v, v)))
    q_ = q.unflatten(0, (S, -1)).unflatten(2, (K, -1))  # [S, C, K, G, E]; a group's heads become more rows of one head
    rows = q_.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [S, K, G C, E]
    seen = ring_view(past.begin, q_.shape[1], past.window).repeat(1, q_.shape[3], 1)[:, None]
    y = F.scaled_dot_product_attention(rows, k_, v_, attn_mask=seen)
    return y.unflatten(2, (q_.shape[3], -1)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)


if triton is not None:
    # Both kernels: one program per slot and group of G query heads, P groups to a kv head; its rows are the group's C new tokens. With
    # P = 1 the past is read once, block by block. It takes no gradient, so the backward pass needs no atomics either.
    @triton.jit
    def head_rows(s, head, j, stride, count, E: tl.constexpr):
        return ((s * count + j) * stride + head * E)[:, None] + tl.arange(0, E)[None, :]

    @triton.jit
    def ring_scores(q, k, cell, c, begin, W: tl.constexpr, scale):
        place = begin - 1 - (begin - 1 - cell) % W  # position in each cell; cells at or beyond `begin` are masked here
        z = tl.dot(q, tl.trans(k)) * scale
        return tl.where((cell < begin)[None, :] & (place[None, :] > (begin + c)[:, None] - W), z, float("-inf"))

    @triton.jit
    def own_scores(q, k, j, c, C: tl.constexpr, scale):
        return tl.where((j[None, :] <= c[:, None]) & (j < C)[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))

    @triton.jit
    def fold(z, v, m, l, acc):
        top = tl.maximum(m, tl.max(z, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen nothing yet
        p, old = tl.exp2(z - safe[:, None]), tl.exp2(m - safe)
        return top, l * old + tl.sum(p, 1), acc * old[:, None] + tl.dot(p.to(v.dtype), v)

    @triton.jit
    def cached_forward(Q, K, V, OK, OV, BEGIN, OUT, LSE, scale, cells, qs, ks, vs, W: tl.constexpr, C: tl.constexpr,
                       H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, E: tl.constexpr, R: tl.constexpr, J: tl.constexpr,
                       N: tl.constexpr):
        """OUT [S C, H, E] and base-2 log-sum-exp LSE [S, K P, R]; names in capitals are pointers or sizes, qs, ks, vs strides."""
        s, group, KH, r = tl.program_id(0), tl.program_id(1), H // (G * P), tl.arange(0, R)
        kv, c, head, live = group // P, r % C, group * G + r // C, (r < G * C)[:, None]
        begin = tl.load(BEGIN + s).to(tl.int32)
        q = tl.load(Q + head_rows(s, head, c, qs, C, E), mask=live, other=0.0)
        m, l, acc = tl.full([R], float("-inf"), tl.float32), tl.zeros([R], tl.float32), tl.zeros([R, E], tl.float32)
        filled = tl.minimum(begin, W)  # a young document reads little
        for first in range(0, filled, N):
            cell = first + tl.arange(0, N)
            where = head_rows(s, kv, cell, KH * E, cells, E)
            k = tl.load(OK + where, mask=(cell < filled)[:, None], other=0.0)
            v = tl.load(OV + where, mask=(cell < filled)[:, None], other=0.0)
            z = tl.where((cell < filled)[None, :], ring_scores(q, k, cell, c, begin, W, scale), float("-inf"))
            m, l, acc = fold(z, v, m, l, acc)
        j = tl.arange(0, J)
        k = tl.load(K + head_rows(s, kv, j, ks, C, E), mask=(j < C)[:, None], other=0.0)
        v = tl.load(V + head_rows(s, kv, j, vs, C, E), mask=(j < C)[:, None], other=0.0)
        m, l, acc = fold(own_scores(q, k, j, c, C, scale), v, m, l, acc)
        tl.store(OUT + head_rows(s, head, c, H * E, C, E), (acc / l[:, None]).to(OUT.dtype.element_ty), mask=live)
        tl.store(LSE + (s * KH * P + group) * R + tl.arange(0, R), m + tl.log2(l))

    @triton.jit
    def cached_backward(Q, K, V, OK, OV, BEGIN, OUT, LSE, GRAD, DQ, DK, DV, scale, cells, qs, ks, vs, W: tl.constexpr,
                        C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
                        J: tl.constexpr, N: tl.constexpr):
        """DQ over past and new keys; DK and DV [S C, K P, E] of the new ones, summed over the group's query heads."""
        s, group, KH, r = tl.program_id(0), tl.program_id(1), H // (G * P), tl.arange(0, R)
        kv, c, head, live = group // P, r % C, group * G + r // C, (r < G * C)[:, None]
        begin, at = tl.load(BEGIN + s).to(tl.int32), head_rows(s, head, c, H * E, C, E)
        q = tl.load(Q + head_rows(s, head, c, qs, C, E), mask=live, other=0.0)
        g = tl.load(GRAD + at, mask=live, other=0.0)
        out, lse = tl.load(OUT + at, mask=live, other=0.0), tl.load(LSE + (s * KH * P + group) * R + tl.arange(0, R))
        mean = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)  # sum_j p_j dp_j
        dq, filled = tl.zeros([R, E], tl.float32), tl.minimum(begin, W)
        for first in range(0, filled, N):
            cell = first + tl.arange(0, N)
            where = head_rows(s, kv, cell, KH * E, cells, E)
            k = tl.load(OK + where, mask=(cell < filled)[:, None], other=0.0)
            v = tl.load(OV + where, mask=(cell < filled)[:, None], other=0.0)
            z = tl.where((cell < filled)[None, :], ring_scores(q, k, cell, c, begin, W, scale), float("-inf"))
            p = tl.exp2(z - lse[:, None])
            dq += tl.dot((p * (tl.dot(g, tl.trans(v)) - mean[:, None])).to(k.dtype), k)
        j = tl.arange(0, J)
        k = tl.load(K + head_rows(s, kv, j, ks, C, E), mask=(j < C)[:, None], other=0.0)
        v = tl.load(V + head_rows(s, kv, j, vs, C, E), mask=(j < C)[:, None], other=0.0)
        where = head_rows(s, group, j, KH * P * E, C, E)
        p = tl.where(live, tl.exp2(own_scores(q, k, j, c, C, scale) - lse[:, None]), 0.0)
        ds = (p * (tl.dot(g, tl.trans(v)) - mean[:, None])).to(k.dtype)
        dq += tl.dot(ds, k)
        natural = scale * 0.6931471805599453  # `scale` carries log2(e) for exp2; gradients want it without
        tl.store(DQ + at, (dq * natural).to(DQ.dtype.element_ty), mask=live)
        tl.store(DK + where, (tl.dot(tl.trans(ds), q) * natural).to(DK.dtype.element_ty), mask=(j < C)[:, None])
        tl.store(DV + where, tl.dot(tl.trans(p.to(g.dtype)), g).to(DV.dtype.element_ty), mask=(j < C)[:, None])


# Ring cells that are read at a time, stages, and whether each query head has a program of its own: the first that fits this GPU's shared
# memory is taken. Two heads of 128 together want 128 KiB backward, more than the 99 KiB that consumer GPUs give a block.
RING_TILES = ((64, 3, False), (64, 2, True), (32, 1, True))


class CachedAttention(torch.autograd.Function):
    """The fused form: scores never leave the chip, only the filled part of the ring is read. bf16 or fp16, E a power of 2."""

    @staticmethod
    def forward(ctx, q, k, v, old_k, old_v, begin, window, tile):
        """Shapes as attention_cached_eager's, heads side by side in rows of any stride; E a power of two from 16 on; tile of RING_TILES."""
        S, H, E = len(begin), q.shape[1], q.shape[2]
        C, K, strides = q.shape[0] // S, k.shape[1], [x.stride(0) for x in (q, k, v)]
        cells, stages, apart = tile
        G, P = (1, H // K) if apart else (H // K, 1)
        shape = dict(W=window, C=C, H=H, G=G, P=P, E=E, R=max(16, triton.next_power_of_2(G * C)), J=max(16, triton.next_power_of_2(C)), N=cells)
        out, lse = q.new_empty(q.shape), q.new_empty(S, K * P, shape["R"], dtype=torch.float32)
        scale = math.log2(math.e) / math.sqrt(E)
        cached_forward[S, K * P](q, k, v, old_k, old_v, begin, out, lse, scale, old_k.shape[1], *strides, **shape, num_warps=4, num_stages=stages)
        ctx.save_for_backward(q, k, v, old_k, old_v, begin, out, lse)
        ctx.shape, ctx.numbers, ctx.stages = shape, (scale, old_k.shape[1], *strides), stages
        return out

    @staticmethod
    def backward(ctx, grad):
        """Gradients of q and of the new k and v; the ring takes none."""
        q, k, v, old_k, old_v, begin, out, lse = ctx.saved_tensors
        K, P = k.shape[1], ctx.shape["P"]
        dq, dk, dv = q.new_empty(q.shape), *(x.new_empty(len(x), K * P, x.shape[2]) for x in (k, v))
        cached_backward[len(begin), K * P](q, k, v, old_k, old_v, begin, out, lse, grad.contiguous(), dq, dk, dv,
                                                *ctx.numbers, **ctx.shape, num_warps=8, num_stages=ctx.stages)
        if P > 1:
            dk, dv = (x.unflatten(1, (K, P)).sum(2) for x in (dk, dv))
        return dq, dk, dv, None, None, None, None, None


def attention_cached_triton(q: Tensor, k: Tensor, v: Tensor, past: tuple, tile: tuple[int, int, bool] = RING_TILES[0]) -> Tensor:
    """attention_cached_eager without scores in memory."""
    return CachedAttention.apply(q, k, v, past.k, past.v, past.begin, past.window, tile)


@contextlib.contextmanager
def no_collection():
    """Python's cycle collector before, and not inside: freeing another CUDA graph while one is being captured invalidates the capture."""
    gc.collect()
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


class Replay:
    """A function, run as it is the first time, then recorded as a CUDA graph and replayed.

    Small steps are bound by the launching of thousands of kernels; a replay launches once. Arguments must be the same objects
    each time, and are not kept here: an owner that is among them would never be freed without the cycle collector, nor would its graphs.
    `pool`: the graph's memory, which graphs that run one at a time share; without one it is a plain call.
    """

    def __init__(self, work: Callable, pool: tuple | None):
        self.work, self.pool, self.calls, self.graph, self.result = work, pool, 0, None, None

    def __call__(self, *arguments):
        self.calls += 1
        if self.pool is None or self.calls == 1:  # the first call is also what chooses kernels and allocates their workspaces
            return self.work(*arguments)
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            # thread_local: what the loader's thread copies meanwhile is none of the graph's business
            with no_collection(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.result = self.work(*arguments)
            self.graph = graph
        self.graph.replay()
        return self.result


def renew_rows(theta: Tensor, grad: Tensor, first: Tensor | None, second: Tensor, steps: Tensor, learns: Tensor, lr: float,
               beta1: float, beta2: float, decay: float) -> None:
    """AdamW in place with a step count a row."""
    grad = grad.float()
    second.lerp_(grad.square(), 1 - beta2)
    if first is not None:
        grad = first.lerp_(grad, 1 - beta1) / (1 - beta1 ** steps.clamp_min(1))
    # bias correction by the row's own step count: every document starts its optimiser anew
    move = grad / ((second / (1 - beta2 ** steps.clamp_min(1))).sqrt() + 1e-10)
    theta.sub_((move + decay * theta) * (lr * learns))


ATTENTION = {"triton": attention_triton, "varlen": attention_varlen, "sdpa": attention_sdpa, "eager": attention_eager}


def large_tiles() -> bool:
    """Whether our tiles fit: tensor descriptors, and the shared memory of a Hopper or a large Blackwell GPU."""
    here = torch.cuda.get_device_properties(torch.cuda.current_device())
    return (here.major, here.minor) >= (9, 0) and here.shared_memory_per_block_optin >= 227 << 10


def said(e: Exception) -> str:
    """An error in a line."""
    return f"{type(e).__name__}: {str(e).splitlines()[0][:160] if str(e) else ''}"


def try_attention(name: str, cfg: Config, run: Run) -> str:
    """Run a backend forward and backward on four short segments; the error's text, empty if it agrees with eager."""
    if not HAVE.get(name, True):  # sdpa and eager are torch itself
        return "not installed, or no GPU"
    if name == "triton" and (cfg.kernels == "eager" or cfg.head_dim > 128 or not large_tiles()):
        return "KERNELS=eager" if cfg.kernels == "eager" else "made for Hopper and later, and heads of up to 128"
    # a one-token segment breaks careless kernels
    cu = torch.tensor([0, 1, 70, 200, 256], dtype=torch.int32, device=run.device)
    heads = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
    rng = torch.Generator(run.device).manual_seed(0)
    qkv = [torch.randn(256, h, cfg.head_dim, device=run.device, generator=rng).to(run.dtype).requires_grad_() for h in heads]
    try:
        got = ATTENTION[name](*qkv, cu, 256)
        got.float().sum().backward()  # a forward alone proves nothing about training
        error = float((got - attention_eager(*qkv, cu, 256)).detach().abs().max())
        return "" if error < 0.05 else f"differs from the eager reference by {error:.3g}"
    except Exception as e:  # whatever a kernel library throws here only means: take another one
        return said(e)


def choose_cached(cfg: Config, run: Run) -> Callable:
    """Attention over cached keys, as adaptation needs it: our kernels in the first tile that runs here as the eager form does, forward and
    backward, or else the eager form, said loudly: adaptation comes after training, when it would be too late."""
    if not (run.gpu and HAVE["triton"] and cfg.uses_lora and cfg.ttt_cache == "keep") or cfg.kernels == "eager":
        return attention_cached_eager
    rng, slots, cells, chunk = torch.Generator(run.device).manual_seed(0), 8, cfg.eval_seq_len + 8, cfg.ttt_chunk_size
    def draw(*shape):
        return torch.randn(*shape, cfg.head_dim, device=run.device, generator=rng).to(run.dtype)
    past = Past(draw(slots, cells, cfg.num_kv_heads), draw(slots, cells, cfg.num_kv_heads),
                torch.arange(slots, device=run.device) * chunk, cfg.eval_seq_len)
    qkv = [draw(slots * chunk, heads).requires_grad_() for heads in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)]

    def results(attend: Callable) -> list[Tensor]:
        y = attend(*qkv, past)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), qkv)]
    wanted, problems = results(attention_cached_eager), []
    for tile in RING_TILES:
        form = functools.partial(attention_cached_triton, tile=tile)
        try:
            far = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(results(form), wanted))
            problem = "" if far < 0.05 else f"differs from the eager form by {far:.2g}"
        except Exception as e:  # too little shared memory, a head's width that is no power of two, ...
            problem = said(e)
        problem = run.any_problem(problem)
        if not problem:
            break
        problems.append(f"{tile}: {problem}")
    else:
        form = attention_cached_eager
        run.warn(f"adaptation's attention falls back to the eager form, several times slower: {'; '.join(problems)}")
    run.log(f"cached attention:{'eager' if form is attention_cached_eager else f'triton, tile {tile}'}")
    return form


def choose_attention(cfg: Config, run: Run) -> Callable:
    """The first backend that works here, printed with its reason; a named one that does not work stops the run."""
    if cfg.attn_backend != "auto":
        problem = try_attention(cfg.attn_backend, cfg, run)
        if problem:
            raise ConfigError(f"ATTN_BACKEND={cfg.attn_backend} does not work here: {problem}")
        run.log(f"attention:{cfg.attn_backend} (asked for)")
        return ATTENTION[cfg.attn_backend]
    passed_over = []
    for name in ATTENTION:
        problem = try_attention(name, cfg, run)
        if not problem:
            break
        passed_over.append(f"{name}: {problem}")
    votes = run.sum_(torch.eye(len(ATTENTION))[list(ATTENTION).index(name)])  # all ranks would go at the slowest one's pace
    if votes.count_nonzero() > 1:
        raise RuntimeError(f"ranks chose different attention kernels: {dict(zip(ATTENTION, votes.int().tolist()))}; here "
                           f"{name}, {'; '.join(passed_over)}. ATTN_BACKEND names one for all")
    run.log(f"attention:{name} (first that works; passed over {'; '.join(passed_over) or 'none'})")
    if run.gpu and name in ("sdpa", "eager"):
        run.warn(f"attention falls back to {name}, several times slower than a varlen kernel")
    return ATTENTION[name]


def softcapped_nll(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """-log softmax(cap tanh(logits / cap))[target] in fp32. [T, V], [T] -> [T] nats, or [T, n] -> [T, n]."""
    if targets.dim() == 2:
        return torch.stack([softcapped_nll(logits, column, cap) for column in targets.unbind(1)], 1)
    z = soft_cap(logits.float(), cap)  # fp32 from here: 8,192 exponentials are summed
    # a mask instead of a gather: its gradient is elementwise, so it fuses, and needs no atomics to be reproducible
    own = torch.arange(z.shape[-1], device=z.device) == targets[:, None]
    return z.logsumexp(-1) - z.where(own, 0.0).sum(-1)


def soft_cap(logits: Tensor, cap: float | Tensor) -> Tensor:
    return cap * torch.tanh(logits / cap) if isinstance(cap, Tensor) or cap else logits


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, no weight."""
    # fp32 machine epsilon: torch's default for a bf16 input would leave small embeddings unnormalised
    return F.rms_norm(x, (x.shape[-1],), eps=1.2e-7)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first channels of each head, first half against second half; the rest carry no position. [T, H, E]"""
    cos, sin = rope  # [T, 1, rotary channels], sin with the sign of what it turns
    turning, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    other = turning.roll(cos.shape[-1] // 2, -1)  # each channel's partner
    return torch.cat((torch.addcmul(turning * cos, other, sin).to(x.dtype), rest), -1)


def head_nll_eager(h: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Nats of targets under softcapped logits h W^T. h [T, D], weight [V, D] -> [T]"""
    return softcapped_nll(F.linear(h, weight), targets, cap)


if triton is not None:
    @triton.jit
    def capped_nll(LOGITS, TARGETS, NLL, cap, V: tl.constexpr, B: tl.constexpr, SLOPE: tl.constexpr):
        """One row: nats in one pass, since softcapped logits need no maximum; with SLOPE logits become d nats / d logits."""
        row, c = tl.program_id(0).to(tl.int64), tl.arange(0, B)
        at, target = LOGITS + row * V, tl.load(TARGETS + row)
        short = 2 / (1 + tl.exp(2 / cap * tl.load(at + c, mask=c < V, other=0.0).to(tl.float32)))  # 1 - tanh(logit / cap)
        p = tl.where(c < V, tl.exp(-cap * short), 0.0)
        own = 2 / (1 + tl.exp(2 / cap * tl.load(at + target).to(tl.float32)))  # read before the row is written over
        total = tl.sum(p, 0)
        tl.store(NLL + row, tl.log(total) + cap * own)
        if SLOPE:
            slope = (p * (1 / total) - tl.where(c == target, 1.0, 0.0)) * short * (2 - short)
            tl.store(at + c, slope.to(LOGITS.dtype.element_ty), mask=c < V)


# The fused form as an opaque operator, like attention above: it stays one node of a compiled graph, and reads and
# writes every row once. What it saves is in the speed log of records/README.md.
@operator("head_nll", lambda h, weight, targets, cap, learns: (
    h.new_empty(len(h), dtype=torch.float32), h.new_empty(*((len(h), len(weight)) if learns else (0,)))),
    lambda h, weight, targets, cap, learns, nll, slope: (h, weight, slope))
def head_nll_op(h: Tensor, weight: Tensor, targets: Tensor, cap: float, learns: bool) -> tuple[Tensor, Tensor]:
    """head_nll_eager's nats, and where the head learns d nats / d logits [T, V], written over the logits."""
    # the only tensor of this width: 2 GB in bf16 for 131,072 tokens
    logits, nll = h @ weight.T, h.new_empty(len(h), dtype=torch.float32)
    V = len(weight)
    capped_nll[(len(h),)](logits, targets, nll, cap, V=V, B=triton.next_power_of_2(V), SLOPE=learns, num_warps=8)
    return nll, logits if learns else logits.new_empty(0)


@operator("head_nll_backward", lambda grad, h, weight, slope: (torch.empty_like(h), torch.empty_like(weight)))
def head_nll_backward_op(grad: Tensor, h: Tensor, weight: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of h and weight; a token's own gradient is a factor of its row, so it goes to the narrow sides."""
    grad = grad[:, None]
    # in place and with `out`: the products are formed in fp32 and rounded in one pass over the rows
    return (slope @ weight).mul_(grad), slope.T @ torch.mul(h, grad, out=torch.empty_like(h))


def head_nll_fused(h: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """head_nll_eager without fp32 logits in memory. cap > 0."""
    return torch.ops.golf.head_nll(h, weight, targets, cap, torch.is_grad_enabled())[0]


def programs(share: int, x: Tensor) -> int:
    """Programs that take blocks in turn: so many a multiprocessor of x's GPU, and a few in Triton's interpreter."""
    return share * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def learns(weight: Tensor) -> bool:
    """Whether this pass is one whose gradients reach the weight. Elsewhere what is fused would keep tensors for no way back, hide
    modules' inputs from their hooks, and not know adapters."""
    return torch.is_grad_enabled() and weight.requires_grad


def mix_eager(x: Tensor, x0: Tensor, weights: Tensor, depth: Tensor, lead: int, stream: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A block's start: the stream x and the network's input x0, mixed channel by channel, that normed, and of this again the `lead` first
    channels, for a gate. [T, D], weights [2, D] -> [T, D], [T, D], [T, lead]

    Without `stream` only the norm is used: two lanes go on unmixed.
    """
    kept, fresh = weights.to(x.dtype)  # starts as (1, 0): the stream alone
    base = torch.addcmul(kept * x, fresh, x0)  # every block may reach back to the input
    normed = norm(base) * depth
    return base, normed, normed[:, :lead]


if triton is not None:
    @triton.jit
    def mix_back(X, X0, MIX, DEPTH, GRAD, NORMED, LEAD, DX, DX0, SUMS, T, D: tl.constexpr, W: tl.constexpr, B: tl.constexpr, L: tl.constexpr):
        """From gradients of mix_eager's outputs, GRAD, NORMED and LEAD, those of x, x0, and by program of both weights. Rows stay on the
        chip between the norm's way back, the factors and the sums over tokens, for which the inductor goes over them again."""
        c = tl.arange(0, W)
        inside, kept_sum, fresh_sum = (c < D)[None, :], tl.zeros([B, W], tl.float32), tl.zeros([B, W], tl.float32)
        kept = tl.load(MIX + c, mask=c < D, other=0.0).to(X.dtype.element_ty).to(tl.float32)[None, :]
        fresh = tl.load(MIX + D + c, mask=c < D, other=0.0).to(X.dtype.element_ty).to(tl.float32)[None, :]
        depth = tl.load(DEPTH)
        for block in range(tl.program_id(0), tl.cdiv(T, B), tl.num_programs(0)):
            row = block * B + tl.arange(0, B)
            at, live = row[:, None] * D + c[None, :], (row < T)[:, None] & inside
            x, x0 = tl.load(X + at, mask=live, other=0.0).to(tl.float32), tl.load(X0 + at, mask=live, other=0.0).to(tl.float32)
            base, g = kept * x + fresh * x0, tl.load(NORMED + at, mask=live, other=0.0).to(tl.float32)
            g += tl.load(LEAD + row[:, None] * L + c[None, :], mask=live & (c < L)[None, :], other=0.0).to(tl.float32)
            g *= depth
            root = tl.rsqrt(tl.sum(base * base, 1) / D + 1.2e-7)  # as `norm`
            g = root[:, None] * (g - base * (root * root * tl.sum(g * base, 1) / D)[:, None])
            g += tl.load(GRAD + at, mask=live, other=0.0).to(tl.float32)
            kept_sum += g * x
            fresh_sum += g * x0
            tl.store(DX + at, (g * kept).to(DX.dtype.element_ty), mask=live)
            tl.store(DX0 + at, (g * fresh).to(DX0.dtype.element_ty), mask=live)
        tl.store(SUMS + (tl.program_id(0) * 2) * D + c, tl.sum(kept_sum, 0), mask=c < D)
        tl.store(SUMS + (tl.program_id(0) * 2 + 1) * D + c, tl.sum(fresh_sum, 0), mask=c < D)


MIX = (8, 4, 2)  # rows of a block, warps, programs a multiprocessor


@operator("mix_backward", lambda grad, normed, lead, x, x0, weights, depth: tuple(torch.empty_like(t) for t in (x, x0, weights)))
def mix_backward_op(grad: Tensor, normed: Tensor, lead: Tensor, x: Tensor, x0: Tensor, weights: Tensor,
                    depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, x0 and the weights."""
    (T, D), (rows, warps, share), grads = x.shape, MIX, [t.contiguous() for t in (grad, normed, lead)]
    dx, dx0, sums = torch.empty_like(x), torch.empty_like(x0), weights.new_empty(programs(share, x), 2, D)
    mix_back[(len(sums),)](x, x0, weights, depth, *grads, dx, dx0, sums, T, D, triton.next_power_of_2(D), rows, lead.shape[1], num_warps=warps)
    return dx, dx0, sums.sum(0)


class Mix(torch.autograd.Function):
    """mix_eager for outputs that are all used. What the gate reads is an output, so that its gradient is as narrow."""

    @staticmethod
    def forward(ctx, x, x0, weights, depth, lead):
        """x and x0 [T, D], weights [2, D], depth [] -> the mixed stream and its norm, [T, D] each, and [T, lead]"""
        ctx.save_for_backward(x, x0, weights, depth)
        base, normed, first = mix_eager(x, x0, weights, depth, lead, True)
        return base, normed, first.clone()

    @staticmethod
    def backward(ctx, grad, normed, lead):
        """Gradients of x, x0 and the weights."""
        return *torch.ops.golf.mix_backward(grad, normed, lead, *ctx.saved_tensors), None, None


def mix_fused(x: Tensor, x0: Tensor, weights: Tensor, depth: Tensor, lead: int, stream: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mix_eager, where its weights learn with its way back in one kernel."""
    return Mix.apply(x, x0, weights, depth, lead) if stream and learns(weights) else mix_eager(x, x0, weights, depth, lead, stream)


class Shared(torch.autograd.Function):
    """One tensor for many readers, whose gradients are summed in one pass, not two by two."""

    @staticmethod
    def forward(ctx, x, readers, run):
        ctx.run = run
        return tuple(x.view_as(x) for _ in range(readers))

    @staticmethod
    def backward(ctx, *grads):
        """The sum, in fp32 until the end."""
        return ctx.run(total, *grads), None, None


def total(*rows: Tensor) -> Tensor:
    return sum(t.float() for t in rows).to(rows[0].dtype)


def added(x: Tensor, onto: Tensor | None) -> Tensor:
    return x if onto is None else onto + x


def mlp_eager(x: Tensor, up: nn.Module, down: nn.Module, slope: float, onto: Tensor | None = None) -> Tensor:
    """Up, squared leaky ReLU, down, added onto the residual stream if there is one. x [T, D] -> [T, D]"""
    return added(down(F.leaky_relu(up(x), slope).square()), onto)


if triton is not None:
    @triton.jit
    def store_half(acc, MORE, OUT, LOW, rows, m, n, slope, gain, END: tl.constexpr, FP8: tl.constexpr):
        """What product_kernel does to half a tile before it is stored."""
        # a square has lost its root's sign, which the way back needs: it is the last bit of the mantissa
        bit: tl.constexpr = 1 << (32 - OUT.dtype.primitive_bitwidth)
        acc = acc * rows if FP8 and END == "square" else acc
        if END == "square":
            root, sign = tl.maximum(acc, slope * acc), (acc.to(tl.int32, bitcast=True) >> (OUT.dtype.primitive_bitwidth - 1)) & bit
            value = root * root
            # the nearest number that ends in this bit
            near = ((value.to(tl.int32, bitcast=True) + bit - sign) & (-2 * bit)) | sign
            OUT.store([m, n], near.to(tl.float32, bitcast=True).to(OUT.dtype))
        elif END == "slope":
            hidden = MORE.load([m, n]).to(tl.float32)
            below = (hidden.to(tl.int32, bitcast=True) & bit) != 0
            value = acc * (tl.sqrt(hidden) * tl.where(below, -2 * slope, 2.0))
            OUT.store([m, n], (value * rows if FP8 else value).to(OUT.dtype))
        else:
            OUT.store([m, n], (acc * gain + MORE.load([m, n]).to(tl.float32)).to(OUT.dtype))
        if FP8 and END != "add":
            LOW.store([m, n], tl.clamp(value * gain, -448.0, 448.0).to(LOW.dtype))

    @triton.jit
    def store_head(acc, OUT, ROOT, COS, SIN, GAIN, m, n, T, H: tl.constexpr, TURNING: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
                   BM: tl.constexpr):
        """norm, rotation and gain of one head's rows; of the first TURNING heads all, of H the gain."""
        row, head = m + tl.arange(0, BM), n // E
        turning, root = head < TURNING, tl.rsqrt(tl.sum(acc * acc, 1) / E + 1.2e-7)  # as `norm`
        tl.store(ROOT + head * T + row, root, mask=(row < T) & turning)
        factor = tl.where(turning, root * tl.load(GAIN + head, mask=head < H, other=1.0), 1.0)
        left, right = halves(acc * factor[:, None], BM, E)
        cos, sin = angles(COS, SIN, row, (row < T) & turning, E, R)
        OUT.store([m, n], (left * cos + right * sin).to(OUT.dtype))
        OUT.store([m, n + E // 2], (right * cos - left * sin).to(OUT.dtype))

    @triton.jit
    def product_kernel(X, W, MORE, OUT, LOW, ROWS, COS, SIN, GAIN, T, slope, gain, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
                       TURNING: tl.constexpr, E: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                       END: tl.constexpr, FP8: tl.constexpr):
        """OUT = X W^T with more done to it before it is stored, by END. "square": leaky(h)^2; "slope": X holds gradients, MORE is the
        square of then, and OUT = h dMORE/dh; "add": gain h + MORE; "heads": two of them a tile, normed and rotated, roots into ROWS.
        Persistent: a program takes tiles in turn, so loads of the next overlap stores.
        With FP8, X and W are scaled, a row's factor in ROWS takes the scales out, and LOW is OUT in FP8 for the next product."""
        columns: tl.constexpr = (N + BN - 1) // BN
        for tile in tl.range(tl.program_id(0), tl.cdiv(T, BM) * columns, tl.num_programs(0), flatten=True):
            m, n = tile // columns * BM, tile % columns * BN  # neighbours share rows of X
            acc = tl.zeros([BM, BN], tl.float32)
            for k in range(0, K, BK):
                acc = tl.dot(X.load([m, k]), W.load([n, k]).T, acc)
            left, right = halves(acc, BM, BN)  # a whole tile's stores would not fit beside the loads under way
            if END == "heads":
                store_head(left, OUT, ROWS, COS, SIN, GAIN, m, n, T, H, TURNING, E, R, BM)
                store_head(right, OUT, ROWS, COS, SIN, GAIN, m, n + E, T, H, TURNING, E, R, BM)
            else:
                at = m + tl.arange(0, BM)
                rows = tl.load(ROWS + at, mask=at < T, other=0.0)[:, None] if FP8 and END != "add" else None
                store_half(left, MORE, OUT, LOW, rows, m, n, slope, gain, END, FP8)
                store_half(right, MORE, OUT, LOW, rows, m, n + BN // 2, slope, gain, END, FP8)


# rows, columns and depth of a tile, warps, stages, programs a multiprocessor (tests/gpu/tiles.py); heads come in twos, however wide
TILES = {"square": (128, 128, 64, 4, 3, 2), "slope": (128, 256, 64, 8, 3, 1), "add": (128, 256, 64, 8, 3, 1), "heads": (128, 0, 64, 8, 3, 1),
         "square in FP8": (128, 128, 64, 4, 4, 2), "slope in FP8": (128, 128, 64, 4, 4, 2), "add in FP8": (128, 256, 128, 8, 3, 1)}
E4M3, MOST = torch.float8_e4m3fn, 448.0  # eight bits, and the largest number in them; it is as precise down to 1/64


def launch_product(end: str, x: Tensor, w: Tensor, out: Tensor, more: Tensor | None = None, low: Tensor | None = None,
                   rows: Tensor | None = None, slope: float = 0.0, gain: float = 1.0, turned: Turned | None = None) -> Tensor:
    """product_kernel over the whole device, into `out`, which is returned. x [T, K], w [N, K], out, more and low [T, N], rows [T]"""
    fp8 = x.dtype == E4M3
    height, width, depth, warps, stages, share = TILES[end + " in FP8" * fp8]
    root, cos, sin, gains = turned or (out if rows is None else rows, out, out, out)
    wide = len(w) // (2 * len(root) - len(gains)) if turned else 0  # a head
    heads, width = (len(gains), len(root), wide, cos.shape[-1]) if turned else (0,) * 4, width or 2 * wide
    tall = [(out if t is None else t, (height, wide // 2 or width // 2)) for t in (more, out, low)]
    described = [TensorDescriptor.from_tensor(t, list(block)) for t, block in [(x, (height, depth)), (w, (width, depth)), *tall]]
    product_kernel[(programs(share, x),)](*described, root, cos, sin, gains, len(x), slope, gain, len(w), w.shape[1], *heads, height, width,
                                          depth, end, fp8, num_warps=warps, num_stages=stages)
    return out


def hidden_like(x: Tensor, w: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """Room for what hidden_rows gives."""
    fp8 = x.dtype == E4M3
    out = x.new_empty(len(x), len(w), dtype=torch.bfloat16 if fp8 else x.dtype)
    return out, torch.empty_like(out, dtype=E4M3) if fp8 else out.new_empty(0)


def hidden_rows(x: Tensor, w: Tensor, hidden: Tensor | None, rows: Tensor | None, slope: float, gain: float) -> tuple[Tensor, Tensor]:
    """The MLP's hidden rows [T, N], or from x a gradient theirs, and the same in FP8 where x and w are. hidden [T, N], rows [T]"""
    out, low = hidden_like(x, w)
    return launch_product("square" if hidden is None else "slope", x, w, out, hidden, low if len(low) else None, rows, slope, gain), low


def product_onto(x: Tensor, w: Tensor, onto: Tensor | None, gain: float = 1.0) -> Tensor:
    """onto + gain x w^T in one pass: torch's addmm copies what it adds to. [T, K], [N, K], [T, N] -> [T, N]"""
    return x @ w.T if onto is None else launch_product("add", x, w, torch.empty_like(onto), onto, gain=gain)


# The whole MLP as one opaque operator, so that its backward product can have the activation's slope in its epilogue.
@operator("mlp", lambda x, up, *rest: (torch.empty_like(x), x.new_empty(len(x), len(up))),
          lambda x, up, down, onto, slope, y, hidden: (x, up, down, hidden, slope))
def mlp_op(x: Tensor, up: Tensor, down: Tensor, onto: Tensor | None, slope: float) -> tuple[Tensor, Tensor]:
    """mlp_eager's output [T, D], and for the way back its hidden rows [T, F], whose last bits are signs."""
    hidden, _ = hidden_rows(x, up, None, None, slope, 1.0)
    return product_onto(hidden, down, onto), hidden


@operator("mlp_backward", lambda grad, x, up, down, hidden, slope: tuple(torch.empty_like(t) for t in (x, up, down)))
def mlp_backward_op(grad: Tensor, x: Tensor, up: Tensor, down: Tensor, hidden: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of both weights."""
    grad = grad.contiguous()
    back, _ = hidden_rows(grad, down.T.contiguous(), hidden, None, slope, 1.0)
    return back @ up, back.T @ x, grad.T @ hidden


# What FP8 operands are multiplied by. In a trained record weights are .01 to .07 (rms of a layer) and at most 1.7, hidden rows .06 to .9
# (mean of a layer) and at most 183: two in a million are cut off, in one layer of eleven. What ends below 1/64 loses bits: 6 to 14 % of
# the weights and 5 to 19 % of the hidden rows.
WEIGHT_8, HIDDEN_8, BACK_8 = 128.0, 4.0, 2.0 ** -9


def in_e4m3(x: Tensor, factor: float) -> Tensor:
    """x times factor in FP8, row by row in memory; what would lie beyond the largest number becomes it."""
    return (x * factor).clamp(-MOST, MOST).to(E4M3).contiguous()


def headroom(dim: int) -> float:
    """The largest power of two that keeps every channel of a normed row representable: none is above sqrt(dim)."""
    return 2.0 ** math.floor(math.log2(MOST / math.sqrt(dim)))


def product_e4m3(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of FP8 matrices. [T, K], [N, K] -> [T, N] bf16"""
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


# Opaque by itself: what scales and rounds its operands fuses with what makes them.
@operator("hidden", hidden_like)
def hidden_op(x: Tensor, w: Tensor, hidden: Tensor | None, rows: Tensor, slope: float, gain: float) -> tuple[Tensor, Tensor]:
    """hidden_rows in FP8."""
    return hidden_rows(x, w, hidden, rows, slope, gain)


@operator("onto", lambda x, w, onto, gain: torch.empty_like(onto))
def onto_op(x: Tensor, w: Tensor, onto: Tensor, gain: float) -> Tensor:
    """product_onto of FP8 matrices."""
    return product_onto(x, w, onto, gain)


class MLP8(torch.autograd.Function):
    """mlp_op with its four products along the channels in FP8; the two along the tokens, weights' gradients, stay in bf16.

    Scales are fixed, not measured as training goes: e4m3 is as precise at 1/64 as at 448, rows of x are normed, and decay keeps
    weights, and so hidden rows, at one size. Only gradients have no size of their own, so each token's is normed too.
    """

    @staticmethod
    def forward(ctx, x, up, down, onto, slope):
        """x [T, D], up [F, D], down [D, F], onto [T, D] or None -> [T, D]"""
        top = headroom(x.shape[1])
        unit = torch.full((len(x),), 1 / (top * WEIGHT_8), device=x.device)
        hidden, low = torch.ops.golf.hidden(in_e4m3(x, top), in_e4m3(up, WEIGHT_8), None, unit, slope, HIDDEN_8)
        ctx.save_for_backward(x, up, down, hidden)
        ctx.slope, ctx.adds = slope, onto is not None
        down, scale = in_e4m3(down, WEIGHT_8), 1 / (HIDDEN_8 * WEIGHT_8)
        return product_e4m3(low, down) * scale if onto is None else torch.ops.golf.onto(low, down, onto, scale)

    @staticmethod
    def backward(ctx, grad):
        """Gradients of x and of both weights."""
        x, up, down, hidden = ctx.saved_tensors
        top = headroom(x.shape[1])
        size = grad.float().square().mean(1).sqrt().clamp_min(1e-30)
        unit, normed = size / (top * WEIGHT_8), in_e4m3(grad / size[:, None], top)
        back, low = torch.ops.golf.hidden(normed, in_e4m3(down.T, WEIGHT_8), hidden, unit, ctx.slope, BACK_8)
        dx = product_e4m3(low, in_e4m3(up.T, WEIGHT_8)) * (unit / (BACK_8 * WEIGHT_8))[:, None]
        return dx.to(x.dtype), back.T @ x, grad.T @ hidden, grad if ctx.adds else None, None


def mlp_fused(x: Tensor, up: nn.Module, down: nn.Module, slope: float, onto: Tensor | None = None, fp8: bool = False) -> Tensor:
    """mlp_eager, where its weights learn in one."""
    if not learns(up.weight):
        return mlp_eager(x, up, down, slope, onto)
    weights = up.matrix(x.dtype), down.matrix(x.dtype)
    return MLP8.apply(x, *weights, onto, slope) if fp8 else torch.ops.golf.mlp(x, *weights, onto, slope)[0]


# All of attention as one opaque operator too: norm, rotation and gains end the first product, XSA and the gate attention itself, the
# residual stream the last product; and the way back ends in the first product's gradient, in one piece.
def attention_like(x: Tensor, qkv: Tensor, o: Tensor, gain: Tensor, *rest) -> tuple[Tensor, ...]:
    """Room for what attention_op gives."""
    T, H, E = len(x), len(gain), o.shape[1] // len(gain)
    heads = len(qkv) // E
    numbers = [x.new_empty(*shape, dtype=torch.float32) for shape in (((heads + H) // 2, T), (H, T), (H, T * rest[-1]))]
    return x.new_empty(T, len(o)), x.new_empty(T, heads, E), numbers[0], x.new_empty(T, H, E), *numbers[1:]


@operator("attention", attention_like, lambda x, qkv, o, gain, gate, onto, cos, sin, first, stop, xsa, out, *kept: (
    x, qkv, o, gain, gate, cos, sin, first, stop, *kept, xsa))
def attention_op(x: Tensor, qkv: Tensor, o: Tensor, gain: Tensor, gate: Tensor, onto: Tensor | None, cos: Tensor, sin: Tensor, first: Tensor,
                 stop: Tensor, xsa: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention's output [T, D], and for the way back the turned heads [T, H + 2 K, E], their roots [H + K, T], and attend_rows'."""
    H, E = len(gain), o.shape[1] // len(gain)
    K = (len(qkv) // E - H) // 2
    root = x.new_empty(H + K, len(x), dtype=torch.float32)
    rows = launch_product("heads", x, qkv, x.new_empty(len(x), len(qkv)), turned=Turned(root, cos, sin, gain)).view(len(x), -1, E)
    y, lse, along = attend_rows(*rows.split((H, K, K), 1), gate, first, xsa)
    return product_onto(y.flatten(1), o, onto), rows, root, y, lse, along


@operator("attention_backward", lambda grad, *inputs: tuple(torch.empty_like(t) for t in inputs[:5]))
def attention_backward_op(grad: Tensor, x: Tensor, qkv: Tensor, o: Tensor, gain: Tensor, gate: Tensor, cos: Tensor, sin: Tensor, first: Tensor,
                          stop: Tensor, rows: Tensor, root: Tensor, y: Tensor, lse: Tensor, along: Tensor,
                          xsa: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of both weights, of gains and gate."""
    grad, back = grad.contiguous(), torch.empty_like(rows)
    parts = [len(gain), *[len(root) - len(gain)] * 2]
    dgate, dgain = attend_back((grad @ o).view_as(y), *rows.split(parts, 1), gate, first, stop, y, lse, along, xsa, back.split(parts, 1),
                               Turned(root, cos, sin, gain))
    back = back.flatten(1)
    return back @ qkv, back.T @ x, grad.T @ y.flatten(1), dgain.sum(1), dgate


def paired(w: Tensor, heads: int, wide: int, turning: int) -> Tensor:
    """The rows of w's first heads so ordered that channel i turns with i + wide / 2, as product_kernel has them, not i + turning / 2."""
    half, still = turning // 2, (wide - turning) // 2
    a, b, c, d = w[:heads * wide].unflatten(0, (heads, wide)).split((half, half, still, still), 1)
    return torch.cat((torch.cat((a, c, b, d), 1).flatten(0, 1), w[heads * wide:]))


def attention_fused(x: Tensor, qkv: nn.Module, o: nn.Module, gain: Tensor, gate: Tensor | None, rope: tuple[Tensor, Tensor], bounds: Tensor,
                    xsa: bool, onto: Tensor | None) -> Tensor:
    """Attention.forward in training, from what it makes its queries, keys and values of. [T, D] -> [T, D]"""
    wide = o.weight.shape[1] // len(gain)
    cos, sin = (t.flatten(1) for t in rope)
    w = paired(qkv.matrix(x.dtype), (len(qkv.weight) // wide + len(gain)) // 2, wide, cos.shape[1])
    gate = x.new_empty(0) if gate is None else gate.expand(len(x), -1).contiguous()
    return torch.ops.golf.attention(x, w, o.matrix(x.dtype), gain, gate, onto, cos, sin, *bounds.unbind(), xsa)[0]


class Kernels(NamedTuple):
    """The chosen form of every operation."""
    attend: Callable = attention_sdpa
    nll: Callable = head_nll_eager
    mlp: Callable = mlp_eager
    mix: Callable = mix_eager
    attention: Callable | None = None  # all of Attention.forward in one where weights learn; wants bounds of segments, not borders
    cached: Callable = attention_cached_eager


def note_bf16(cfg: Config, run: Run) -> None:
    """Have the verdict say that FP8 was asked for and did not run."""
    caveat = f"products in bf16 where FP8={cfg.fp8} was asked for"
    if cfg.fp8 != "none" and caveat not in run.caveats:
        run.caveats.append(caveat)


def choose_kernels(cfg: Config, run: Run) -> Kernels:
    """Attention's backend, and the fused operations where Triton and a GPU are there (KERNELS)."""
    attend, able = choose_attention(cfg, run), run.gpu and HAVE["triton"]
    if cfg.kernels == "triton" and not able:
        raise ConfigError("KERNELS=triton: Triton or a GPU is missing here")
    fused = able and cfg.kernels != "eager"
    nll = head_nll_fused if fused and cfg.logit_softcap else head_nll_eager
    whole = cfg.model_dim % 16 == cfg.hidden_dim % 16 == 0  # what tensor descriptors and products in FP8 ask of a row
    hopper = fused and large_tiles() and whole
    fp8 = cfg.fp8 if hopper else "none"
    run.log(f"kernels:{'triton' if fused else 'eager'} fp8:{fp8}")
    if run.gpu and fp8 != cfg.fp8:
        run.warn(f"FP8={cfg.fp8} needs our kernels, a Hopper GPU and widths that are multiples of 16: products run in bf16 here")
        note_bf16(cfg, run)
    mlp = functools.partial(mlp_fused, fp8=fp8 == "mlp") if hopper else mlp_eager
    return Kernels(attend, nll, mlp, mix_fused if fused else mix_eager, attention_fused if attend is attention_triton else None,
                   choose_cached(cfg, run))


def inductor_problem(run: Run) -> str:
    """What keeps torch.compile from working on this GPU, empty if nothing does: it needs a Triton of its own liking."""
    if not HAVE["triton"]:
        return "Triton is missing, or cannot be imported"
    try:
        torch.compile(lambda x: torch.relu(x).sum())(torch.ones(64, device=run.device))
        return ""
    except Exception as e:  # whatever a compiler throws here only means: do without
        return said(e)


def row_bytes(cfg: Config, run: Run) -> int:
    """Estimated device memory per token of a training row: what the backward pass keeps (a hidden row and eight stream-wide ones per layer
    application, in bf16, and the logits twice), times 1.35 for temporaries with all of our kernels, 2.7 without, 5.4 without torch.compile."""
    visits = cfg.num_layers + cfg.num_loops * (cfg.loop_end - cfg.loop_start + 1)
    fused = HAVE["triton"] and cfg.kernels != "eager"
    factor = 1.35 if fused and torch.cuda.get_device_capability() >= (9, 0) else 2.7 if HAVE["triton"] and cfg.compile_scope != "none" else 5.4
    return int(factor * 2 * (visits * (cfg.hidden_dim + 8 * cfg.model_dim) + 2 * cfg.vocab_size))


def fit_rows(cfg: Config, run: Run) -> Config:
    """MICRO_BATCH_TOKENS=0 as what this GPU holds: the most of MOST_ROW_TOKENS and its halves, the same on all ranks."""
    if cfg.micro_batch_tokens or not run.gpu:
        return cfg
    rows, room = MOST_ROW_TOKENS, 0.9 * run.free_bytes() - (3 << 30)  # weights, their optimiser's state and average, workspaces
    while rows > cfg.pack_tokens and rows * row_bytes(cfg, run) > room:
        rows //= 2
    return dataclasses.replace(cfg, micro_batch_tokens=max(rows, cfg.pack_tokens))


# Newton-Schulz coefficients (a, b, c) of X <- (aI + bA + cA^2)X, A = XX^T. Polar Express: per-iteration minimax
# polynomials (arXiv 2505.16932, values as PR #1787 ran them); quintic: Jordan's single polynomial (Muon).
POLAR = ((8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061), (3.2858, -2.3681, 0.4645),
         (2.3465, -1.7098, 0.4232))
QUINTIC = (3.4445, -4.7750, 2.0315)


def nesterov(g: Tensor, buf: Tensor, scale: Tensor, momentum: Tensor, unit_rows: bool) -> Tensor:
    """Where Newton-Schulz begins: gradients times scale [], taken into their momentum `buf`, and Nesterov's look ahead, of norm 1 at
    most and with rows of equal lengths if asked for. [N, R, C] fp32, on a GPU to bf16, where only the products' speed counts"""
    g = g * scale
    buf.mul_(momentum).add_(g)
    u = g + momentum * buf
    size = u.norm(dim=-1, keepdim=True) * math.sqrt(u.shape[-2]) if unit_rows else u.norm(dim=(-2, -1), keepdim=True)
    u = u / size.clamp_min(1e-7)
    return u.bfloat16() if u.is_cuda else u


def orthogonalize(g: Tensor, coefficients: tuple) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values, none above 1, to about 1. [N, R, C] -> [N, R, C]

    Three batched GEMMs an iteration, in g's own type.
    """
    x, tall = g, g.shape[-2] > g.shape[-1]
    for a, b, c in coefficients:
        gram = x.mT @ x if tall else x @ x.mT  # the smaller side squared
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)  # here and not as a X behind the product: torch's baddbmm copies what it adds to
        x = x @ factor if tall else factor @ x
    return x


def settle(weights: list[Tensor], u: Tensor, keep: Tensor, rate: Tensor) -> None:
    """weights = keep weights + rate u, in place: N of [R, C], u [N or more, R, C], keep and rate []"""
    torch._foreach_mul_(weights, keep)  # decay first, decoupled from the gradient
    torch._foreach_add_(weights, [rate * x.to(w.dtype) for w, x in zip(weights, u.unbind(0))])


# ----------------------------------------------------------------------------------------------------------------------
# 7. LAYERS - the parts of a block. One Attention.forward serves training, scoring, test-time training, calibration and
#    sampling. Weights are fp32 masters, cast where they are used. A forward asks `is not None`, never the config.
# ----------------------------------------------------------------------------------------------------------------------


class VisitAdapters(NamedTuple):
    """Low-rank corrections of one visit, one set a document slot: (A [S, in, r], B [S, r, out]) or None."""
    q: tuple | None = None
    k: tuple | None = None
    v: tuple | None = None
    o: tuple | None = None  # from attention's input to its output, beside the projection
    m: tuple | None = None  # from the MLP's input to its output


class HeadAdapters(NamedTuple):
    """The same for the head: low-rank logits, and softcaps [S, 2] for positive and negative logits."""
    low: tuple | None = None
    caps: Tensor | None = None

    def of_first(self) -> "HeadAdapters":
        """Slot 0's share."""
        return HeadAdapters(self.low and (self.low[0][:1], self.low[1][:1]), None if self.caps is None else self.caps[:1])


def corrected(y: Tensor, x: Tensor, pair: tuple[Tensor, Tensor] | None) -> Tensor:
    """y + x A B, each document slot with its own A and B. y [S C, out], x [S C, in]"""
    if pair is None:
        return y
    a, b = pair
    # as rows times matrices, so that gradients come as they lie: transposing them took a seventh of a step
    rows, y_ = (t.unflatten(0, (len(a), -1)) for t in (x, y))
    return torch.baddbmm(y_, rows @ a, b).flatten(0, 1)


class Linear(nn.Module):
    """x W^T without bias; W [out, in] is an fp32 master. `scaled`: with a learned factor for each output.

    The factor goes into the weight: on the rows it would cost three passes more over them, forward and backward (records/plan.py).
    """

    def __init__(self, out: int, into: int, scaled: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, into))
        self.scale = nn.Parameter(torch.empty(out)) if scaled else None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return (self.weight if self.scale is None else self.scale[:, None] * self.weight).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(x.dtype))


class Rotary(nn.Module):
    """Cosine and sine of position times frequency, in fp32: in bf16 neighbouring positions would merge."""

    def __init__(self, dims: int, base: float):
        super().__init__()
        half = base ** (-torch.arange(0, dims, 2).float() / dims)
        self.register_buffer("frequency", torch.cat((half, -half)), persistent=False)  # the second half turns back

    def forward(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        angle = pos[:, None, None] * self.frequency.float()  # [T, 1, dims]
        return angle.cos(), angle.sin()


class GateKind(NamedTuple):
    """gate_TH = outer * sigmoid(inner * (W x + bias)); reads: leading channels ("window"), all of them, or none."""
    reads: str
    outer: float
    inner: float
    bias: float | None


# One row a gate. Only "out" is an exact identity at the start; "dense" starts at .982, "sparse" at one half.
GATES = {
    "scalar": GateKind("none", 1.0, 1.0, 1.0),  # a learned number a head, no sigmoid (PR #430)
    "dense": GateKind("all", 1.0, 1.0, 4.0),  # PR #413
    "out": GateKind("window", 2.0, 1.0, None),  # AttnOutGate, PR #1667
    "sparse": GateKind("window", 1.0, 0.5, None),  # SparseAttnGate, PR #1787
}


class HeadGate(nn.Module):
    """A factor for every head's output, from the first `width` channels of the block's normed input."""

    def __init__(self, cfg: Config):
        super().__init__()
        reads, self.outer, self.inner, bias = GATES[cfg.attn_gate]
        # a window costs 12 weights a head, all channels 512
        self.width = {"none": 0, "window": cfg.gate_window, "all": cfg.model_dim}[reads]
        self.weight = nn.Parameter(torch.empty(cfg.num_heads, self.width)) if self.width else None
        self.bias = nn.Parameter(torch.empty(cfg.num_heads)) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """x [T, width] -> factors [T, H], or [H] for a gate that reads nothing."""
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        if self.weight is None:
            return bias
        z = F.linear(x, self.weight.to(x.dtype), bias)  # one small GEMM, fused into its neighbours
        gate = torch.sigmoid(self.inner * z)
        return gate if self.outer == 1 else self.outer * gate


class ValueMix(nn.Module):
    """Value residual: mixes the first layer's values into this layer's (arXiv 2410.17897; PR #413, #569)."""

    def __init__(self, kind: str):
        super().__init__()
        self.lambdas = nn.Parameter(torch.empty(2)) if kind == "mix" else None
        self.alpha = nn.Parameter(torch.empty(1)) if kind == "sigmoid" else None

    def forward(self, v: Tensor, v0: Tensor) -> Tensor:
        if self.lambdas is not None:
            first, own = self.lambdas.to(v.dtype)
            return first * v0 + own * v
        return v + torch.sigmoid(self.alpha).to(v.dtype) * v0


class OtherValues(NamedTuple):
    """What other places contribute to a visit's values: the first visit's [T, K, E], an embedding of the tokens [T, K E]."""
    first: Tensor | None = None
    embedded: Tensor | None = None


class Attention(nn.Module):
    """Grouped-query causal attention over segments, with normalised queries and keys."""

    def __init__(self, cfg: Config, layer: int, kernels: Kernels):
        super().__init__()
        self.heads, self.head_dim = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads), cfg.head_dim
        self.qkv = Linear(sum(self.heads) * cfg.head_dim, cfg.model_dim)  # one GEMM; Muon sees three matrices (room 9)
        self.o = Linear(cfg.model_dim, cfg.num_heads * cfg.head_dim, scaled=True)  # upstream's attn_scale
        self.q_gain = nn.Parameter(torch.empty(cfg.num_heads))
        self.xsa = layer >= cfg.num_layers - cfg.xsa_last_n  # the last N, counted from the end
        self.gate = HeadGate(cfg) if cfg.attn_gate != "none" else None
        self.reads = self.gate.width if self.gate is not None else 0
        self.value_mix = ValueMix(cfg.value_residual) if cfg.value_residual != "none" and layer > 0 else None
        self.gives_values = cfg.value_residual != "none" and layer == 0
        self.value_scale = nn.Parameter(torch.empty(1)) if layer in cfg.value_layers else None
        self.attend, self.cached = kernels.attend, kernels.cached  # chosen once, in room 6
        own = self.value_mix is None and self.value_scale is None and not self.gives_values  # values are nobody else's business
        self.fused = kernels.attention if own else None

    def forward(self, x: Tensor, lead: Tensor, values: OtherValues, rope: tuple, cu: Tensor, longest: int, lora: VisitAdapters,
                past: Past | None, onto: Tensor | None = None) -> tuple[Tensor, tuple]:
        """x [T, D], lead [T, reads]: the channels of x that the gate reads -> (output [T, D], added onto `onto`, what others want of it:
        (values for later layers, keys, values for the cache))."""
        gate = self.gate(lead) if self.gate is not None else None
        if self.fused is not None and past is None and learns(self.qkv.weight):
            return self.fused(x, self.qkv, self.o, self.q_gain, gate, rope, cu, self.xsa, onto), (None, None, None)
        y = self.qkv(x)  # one GEMM for all three; adapters of queries, keys and values are three
        if any(pair is not None for pair in lora[:3]):
            parts = y.split([n * self.head_dim for n in self.heads], -1)
            y = torch.cat([corrected(part, x, pair) for part, pair in zip(parts, lora[:3])], -1)
        queries, keys, _ = self.heads
        qk, v = y.unflatten(-1, (-1, self.head_dim)).split((queries + keys, keys), 1)
        # a row of gains a token: their gradient is then a sum over channels first, which norm's makes anyway
        gain = torch.cat((self.q_gain, self.q_gain.new_ones(keys))).to(qk.dtype).expand(len(qk), -1)
        q, k = rotate(norm(qk) * gain[..., None], rope).split((queries, keys), 1)
        # before attention and XSA, so that both use one v
        if self.value_scale is not None:
            v = v + self.value_scale.to(v.dtype) * values.embedded.view_as(v)
        if self.value_mix is not None:
            v = self.value_mix(v, values.first)
        y = self.attend(q, k, v, cu, longest) if past is None else self.cached(q, k, v, past) if past.window else attention_cached_eager(q, k, v, past)
        y = finish_heads(y, v, self.xsa, gate)  # the same v that attention used
        kept = (v if self.gives_values else None, *((k, v) if past is not None else (None, None)))
        return added(corrected(self.o(y.flatten(1)), x, lora.o), onto), kept


class MLP(nn.Module):
    """Up, squared activation, down."""

    def __init__(self, cfg: Config, kernels: Kernels):
        super().__init__()
        self.up = Linear(cfg.hidden_dim, cfg.model_dim)
        self.down = Linear(cfg.model_dim, cfg.hidden_dim, scaled=True)  # upstream's mlp_scale
        self.slope = 0.5 if cfg.mlp_act == "leaky_relu2" else 0.0  # 0 makes it ReLU squared
        self.product = kernels.mlp

    def forward(self, x: Tensor, pair: tuple | None = None, onto: Tensor | None = None) -> Tensor:
        return corrected(self.product(x, self.up, self.down, self.slope, onto), x, pair)


class Block(nn.Module):
    """Attention and MLP, one after the other or side by side, on one stream or two lanes."""

    def __init__(self, cfg: Config, layer: int, kernels: Kernels):
        super().__init__()
        self.attn, self.mlp = Attention(cfg, layer, kernels), MLP(cfg, kernels)
        self.resid_mix, self.start = nn.Parameter(torch.empty(2, cfg.model_dim)), kernels.mix
        # a buffer, not a float: compiled code is shared by all blocks, and a float would be a constant of each
        self.register_buffer("depth_scale", torch.tensor(1 / math.sqrt(layer + 1) if cfg.ln_scale else 1.0), persistent=False)
        self.abreast = cfg.parallel_residual == "one" and layer >= cfg.parallel_start_layer
        self.x0_scale = nn.Parameter(torch.empty(1)) if cfg.x0_residual else None

    def forward(self, x: Tensor, lane: Tensor | None, x0: Tensor, values: OtherValues, rope: tuple, cu: Tensor,
                longest: int, mix: tuple[Tensor, Tensor] | None, lora: VisitAdapters = VisitAdapters(),
                past: Past | None = None) -> tuple[Tensor, Tensor | None, tuple]:
        """Stream x [T, D], second lane or None, input x0, others' values; mix = (resid [2], post [2, 2]) with lanes.

        Returns the new stream, the new second lane and what attention keeps. (Two lanes: PR #1204.)
        """
        base, normed, lead = self.start(x, x0, self.resid_mix, self.depth_scale, self.attn.reads, mix is None)
        # without lanes attention adds to the stream itself, and `a` is the stream behind it
        a, keeps = self.attn(normed, lead, values, rope, cu, longest, lora, past, base if mix is None else None)
        if mix is not None:
            lane = x if lane is None else lane  # the first such visit splits the stream
            b = self.mlp_out(lane, lora)  # the MLP reads its own lane, unmixed
            resid, post = mix[0].to(x.dtype), mix[1].to(x.dtype)
            return (resid[0] * x + post[0, 0] * a + post[0, 1] * b, resid[1] * lane + post[1, 0] * a + post[1, 1] * b, keeps)
        x = self.mlp_out(base if self.abreast else a, lora, a)
        return x if self.x0_scale is None else x + self.x0_scale.to(x.dtype) * x0, None, keeps

    def mlp_out(self, x: Tensor, lora: VisitAdapters, onto: Tensor | None = None) -> Tensor:
        return self.mlp(norm(x) * self.depth_scale, lora.m, onto)


# ----------------------------------------------------------------------------------------------------------------------
# 8. MODEL - input features, the plan of visits to physical layers (recurrence, skips, lanes), one forward, and what of
#    it torch.compile sees; its gradients. `looping` picks the plan; it is the only thing about a model that changes with time.
# ----------------------------------------------------------------------------------------------------------------------


class Visit(NamedTuple):
    """One application of a physical layer: which skip row to merge before it, whether to push after it, lanes or not."""
    layer: int
    skip: int | None
    push: bool
    lanes: bool


def layer_plan(cfg: Config, looping: bool) -> list[Visit]:
    """The order in which layers run. With recurrence LOOP_START..LOOP_END run NUM_LOOPS more times (PR #1204)."""
    order = list(range(cfg.num_layers))  # without recurrence, each layer once
    if looping and cfg.num_loops:
        loop = list(range(cfg.loop_start, cfg.loop_end + 1))  # the same weights, at a new depth
        order = order[:cfg.loop_start] + loop * (cfg.num_loops + 1) + order[cfg.loop_end + 1:]
    half = len(order) // 2  # encoder visits push, decoder visits pop
    skips, lanes = cfg.unet_skips != "none", cfg.parallel_residual == "two"
    return [Visit(layer, i - half if skips and half <= i < 2 * half else None, skips and i < half,
                  lanes and i >= half and layer >= cfg.parallel_start_layer) for i, layer in enumerate(order)]


class NarrowEmbedding(nn.Module):
    """A narrow table, projected and scaled; looked up by token it feeds the values of several layers (VE128 of PR #414, #430)."""

    def __init__(self, rows: int, width: int, dim: int):
        super().__init__()
        self.table, self.proj = nn.Embedding(rows, width), Linear(dim, width)
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """rows [T] -> [T, dim]."""
        return self.scale.to(dtype) * self.proj(self.table(rows).to(dtype))


class NgramHash(NarrowEmbedding):
    """An embedding of the hashed last two or three tokens; keys are inputs only, never the target (PR #374, #486)."""
    FACTORS = 36313, 27191, 51497  # the constants of every script of the field, current token first

    def __init__(self, order: int, rows: int, width: int, dim: int):
        super().__init__(rows, width, dim)
        self.order = order

    def forward(self, ids: Tensor, pos: Tensor, dtype: torch.dtype) -> Tensor:
        """ids [T], pos [T] -> [T, D]."""
        rows, mixed = self.table.num_embeddings, self.FACTORS[0] * ids
        for back in range(1, self.order):
            mixed = mixed ^ (self.FACTORS[back] * ids.roll(back))
        wrapped = (mixed + 2 ** 31) % 2 ** 32 - 2 ** 31  # int32 wrap-around, as the field's scripts hash
        whole = pos >= self.order - 1  # a segment's first tokens have no pair or triple
        return super().forward(torch.where(whole, wrapped.remainder(rows - 1), rows - 1), dtype)


class Smear(nn.Module):
    """x_t += lambda sigmoid(w x_t[:window]) x_{t-1} within a document; lambda starts at 0 (PR #1667, mask: #1851)."""

    def __init__(self, window: int):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.empty(1, window)), nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, ids: Tensor, pos: Tensor) -> Tensor:
        w = self.weight.to(x.dtype)  # [1, window]
        gate = self.scale.to(x.dtype) * torch.sigmoid(F.linear(x[:, :w.shape[1]], w))
        gate = gate * ((pos > 0) & (ids != BOS))[:, None]  # a document's first token has no predecessor
        return x + gate * x.roll(1, 0)  # row 0 rolls in the last token, and is masked


class ChannelSmear(nn.Module):
    """x_t <- lerp(x_t, x_{t-1}, sigmoid(g)), a gate a channel; no identity at the start (PR #413's SmearGate)."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, ids: Tensor, pos: Tensor) -> Tensor:
        return torch.lerp(x, x.roll(1, 0) * (pos > 0)[:, None], torch.sigmoid(self.gate).to(x.dtype))


class Memory(NamedTuple):
    """State of S document slots during one forward: adapters and past of every visit; `kept` collects new keys, values.

    Rows begin with `lead` earlier tokens a slot, which only feed smearing and n-gram features of the ones behind them.
    """
    lora: list[VisitAdapters]
    past: list[Past]
    head: HeadAdapters
    slots: int
    lead: int
    kept: list

    def drop_lead(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.slots, -1))[:, self.lead:].flatten(0, 1)


class InputEmbedding(nn.Module):
    """Tokens (and their features) to the normalised start of the residual stream."""

    def __init__(self, cfg: Config, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.bigram = NgramHash(2, cfg.bigram_vocab_size, cfg.bigram_dim, cfg.model_dim) if cfg.bigram_vocab_size else None
        self.trigram = NgramHash(3, cfg.trigram_vocab_size, cfg.bigram_dim, cfg.model_dim) if cfg.trigram_vocab_size else None
        self.smear_before = Smear(cfg.gate_window) if cfg.smear_gate == "pre" else None
        self.smear_after = Smear(cfg.gate_window) if cfg.smear_gate == "post" else ChannelSmear(cfg.model_dim) if cfg.smear_gate == "channel" else None

    def forward(self, ids: Tensor, pos: Tensor) -> Tensor:
        """ids [T], pos [T] -> x0 [T, D]."""
        x = self.tok_emb(ids).to(self.dtype)
        for gram in (self.bigram, self.trigram):
            if gram is not None:
                x = x + gram(ids, pos, self.dtype)
        if self.smear_before is not None:
            x = self.smear_before(x, ids, pos)
        x = norm(x)  # embeddings are tiny at the start
        return self.smear_after(x, ids, pos) if self.smear_after is not None else x


class SkipMerge(nn.Module):
    """A U-Net skip: x + w * skip, or with a gate lerp(w * skip, x, sigmoid(g)), which starts half and half."""

    def __init__(self, rows: int, dim: int, gated: bool):
        super().__init__()
        self.weights = nn.Parameter(torch.empty(rows, dim))
        self.gates = nn.Parameter(torch.empty(rows, dim)) if gated else None

    def forward(self, x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
        skip = weight.to(x.dtype) * skip  # a weight a channel
        return x + skip if gate is None else torch.lerp(skip, x, torch.sigmoid(gate).to(x.dtype))


class Head(nn.Module):
    """Hidden states to nats: softcapped logits over the vocabulary, tied to the embedding or with an own weight."""

    def __init__(self, cfg: Config, kernels: Kernels):
        super().__init__()
        self.cap, self.plain_nll = cfg.logit_softcap, kernels.nll
        self.weight = None if cfg.tie_embeddings else nn.Parameter(torch.empty(cfg.vocab_size, cfg.model_dim))

    def forward(self, h: Tensor, targets: Tensor | None, tied: Tensor, tweak: HeadAdapters = HeadAdapters()) -> Tensor:
        """Per-token nats [T] fp32, or without targets the softcapped logits [T, V] fp32."""
        weight = (tied if self.weight is None else self.weight).to(h.dtype)
        if targets is not None and targets.dim() == 1 and all(t is None for t in tweak):
            return self.plain_nll(h, weight, targets, self.cap)
        logits = corrected(F.linear(h, weight), h, tweak.low).float()  # bf16 products, fp32 from here
        cap = self.cap
        if tweak.caps is not None:  # AsymLogit (PR #1923): the cap of a logit depends on its sign
            up, down = (c.repeat_interleave(len(h) // len(tweak.caps))[:, None] for c in tweak.caps.unbind(1))
            cap = torch.where(logits > 0, up, down)
        return soft_cap(logits, cap) if targets is None else softcapped_nll(logits, targets, cap)


def call(module: nn.Module, *args):
    """A module as a plain function: compiled once, it serves all modules of one shape."""
    return module(*args)


class GPT(nn.Module):
    """The language model over flat rows of segments."""

    def __init__(self, cfg: Config, kernels: Kernels = Kernels(), dtype: torch.dtype = torch.float32):
        super().__init__()
        self.input = InputEmbedding(cfg, dtype)
        values = cfg.num_kv_heads * cfg.head_dim
        self.value_embedding = NarrowEmbedding(cfg.vocab_size, cfg.ve_dim, values) if cfg.value_layers else None
        self.rotary = Rotary(cfg.rotary_dims, cfg.rope_base)
        self.blocks = nn.ModuleList(Block(cfg, i, kernels) for i in range(cfg.num_layers))
        self.plans = layer_plan(cfg, False), layer_plan(cfg, True)
        rows = len(self.plans[1]) // 2 if cfg.unet_skips != "none" else 0  # row k serves the k-th decoder visit
        self.skip = SkipMerge(rows, cfg.model_dim, cfg.unet_skips == "gated") if rows else None
        two = cfg.parallel_residual == "two"
        self.lane_resid = nn.Parameter(torch.empty(cfg.num_layers, 2)) if two else None
        self.lane_post = nn.Parameter(torch.empty(cfg.num_layers, 2, 2)) if two else None
        self.final_lane = {"attn": (1.0, 0.0), "mlp": (0.0, 1.0), "mean": (0.5, 0.5)}[cfg.parallel_final_lane]
        self.head = Head(cfg, kernels)
        self.bounds = segment_bounds if kernels.attention is not None else None
        self.looping = False  # training turns it on, evaluation always has it on
        self.run: Callable = call  # compile_model may replace it
        self.renew: Callable = renew_rows  # the optimiser step of adapters, likewise
        self.muon = nesterov, settle  # and what is around Newton-Schulz in that of matrices

    def hidden(self, ids: Tensor, pos: Tensor, cu: Tensor, longest: int, memory: Memory | None = None) -> Tensor:
        """The one forward: ids [T], pos [T], cu [S+1] -> normalised hidden states [T, D].

        With a memory, rows are slots' next tokens: their adapters act, and attention also sees their cached past.
        """
        run = self.run if memory is None else call  # rows of slots come in many shapes, and are replayed instead
        x0 = run(self.input, ids, pos)  # kept: every block mixes it in again
        if memory is not None:
            x0, pos, ids = memory.drop_lead(x0), memory.drop_lead(pos), memory.drop_lead(ids)
        plan = self.plans[self.looping]
        # a tensor for each: torch 2.13 fails on a later shape of a block that got one twice
        x, *inputs = Shared.apply(x0, len(plan) + 1, run)
        # computed once, read by a few layers
        embedded = run(self.value_embedding, ids, x.dtype) if self.value_embedding is not None else None
        if self.bounds is not None and memory is None:
            cu = self.bounds(cu, len(ids))  # once a row, not once a visit
        rope, lane, values, stack = self.rotary(pos), None, OtherValues(None, embedded), []
        for i, visit in enumerate(plan):
            if visit.skip is not None:
                gate = self.skip.gates[visit.skip] if self.skip.gates is not None else None
                x = run(self.skip, x, stack.pop(), self.skip.weights[visit.skip], gate)
            mix = (self.lane_resid[visit.layer], self.lane_post[visit.layer]) if visit.lanes else None
            lora, past = (memory.lora[i], memory.past[i]) if memory is not None else (VisitAdapters(), None)
            x, lane, keeps = run(self.blocks[visit.layer], x, lane, inputs[i], values, rope, cu, longest, mix, lora, past)
            values = values._replace(first=keeps[0]) if values.first is None else values  # the first visit's, for all
            if memory is not None:
                memory.kept.append(keeps[1:])
            if visit.push:
                stack.append(x)
        if lane is not None:
            x = self.final_lane[0] * x + self.final_lane[1] * lane  # lanes end in one stream
        return norm(x)

    def nll(self, ids: Tensor, targets: Tensor, pos: Tensor, cu: Tensor, longest: int) -> Tensor:
        """Nats of every target: [T] fp32."""
        return self.run(self.head, self.hidden(ids, pos, cu, longest), targets, self.input.tok_emb.weight)

    def logits(self, ids: Tensor, pos: Tensor, cu: Tensor, longest: int) -> Tensor:
        """Softcapped logits [T, V] fp32; their softmax is the whole predictive distribution."""
        return self.run(self.head, self.hidden(ids, pos, cu, longest), None, self.input.tok_emb.weight)


# At its own thresholds (30 and 8) the inductor writes what two kernels read in fp32 and separately: two passes over the rows
# more in a block with lanes, forward and backward (records/plan.py)
INDUCTOR = {"realize_opcount_threshold": 100, "realize_acc_reads_threshold": 16}


def compile_model(model: GPT, cfg: Config, run: Run, shapes: int) -> None:
    """Give torch.compile a block at a time: one compilation serves all layers, so start-up does not grow with depth.

    The whole network as one graph was no faster (records/README.md). `shapes`: how many shapes of rows training has.
    """
    how = cfg.compile_scope if cfg.compile_scope != "auto" else ("block" if run.gpu else "none")
    problem = run.any_problem(inductor_problem(run) if how == "block" and run.gpu else "")
    if problem and cfg.compile_scope == "auto":
        how = "none"
        run.warn(f"torch.compile does not work here ({problem}): everything runs eagerly, several times slower")
    # a shape of rows takes 8 variants of a module, scoring 7, adaptation some; one beyond the limit would end the run
    torch._dynamo.config.recompile_limit = max(64, 16 * (shapes + 2))
    torch._dynamo.config.accumulated_recompile_limit = 8 * torch._dynamo.config.recompile_limit
    if how == "block":
        # parameters are inputs: layers share the graph
        model.run = torch.compile(call, dynamic=False, fullgraph=True, options=INDUCTOR)
        model.renew = torch.compile(renew_rows, dynamic=True)
        model.muon = tuple(torch.compile(f, dynamic=False, fullgraph=True) for f in model.muon)
    run.log(f"compile:{how}")


class RowGradients:
    """Gradients of rows' weighted nats, summed in `grads`, which are the parameters' own; on a GPU recorded once a shape.

    A row is some thousand kernels, forward and backward. Launching them one by one takes a host about as long as an H200 computes
    on 65,536 tokens without recurrence, and so longer than each of eight GPUs on its share of the record's first steps.
    """

    def __init__(self, model: GPT, params: list[nn.Parameter], run: Run):
        self.model, self.params, self.pool = model, params, torch.cuda.graph_pool_handle() if run.gpu else None
        self.grads, self.rows = [torch.zeros_like(p) for p in params], {}
        for p, g in zip(params, self.grads):  # zeros: a parameter that a plan does not use must not stall ranks
            p.grad = g

    def free(self) -> None:
        """Give recorded rows, their graphs and the gradients back to the device; nothing can be added afterwards."""
        self.rows.clear()
        for p in self.params:
            p.grad = None
        self.grads = []
        if self.pool is not None:
            torch.cuda.empty_cache()

    def add(self, batch: Batch, weight: Tensor) -> Tensor:
        """Add one row's gradients; returns the sum of weight * nats, good until the next row. weight: [T], or one for all"""
        shape = batch.ids.shape, batch.cu.shape, batch.longest, weight.shape, self.model.looping
        if shape not in self.rows:
            row = *(t.clone() for t in batch[:4]), weight.clone(), batch.longest
            self.rows[shape] = row, Replay(RowGradients.compute, self.pool)
        row, replay = self.rows[shape]
        for static, fresh in zip(row, (*batch[:4], weight)):
            static.copy_(fresh)
        return replay(self, *row)

    def compute(self, ids: Tensor, targets: Tensor, pos: Tensor, cu: Tensor, weight: Tensor, longest: int) -> Tensor:
        """What is recorded: a row's passes, from and into tensors that stay where they are."""
        loss = (self.model.nll(ids, targets, pos, cu, longest) * weight).sum()
        found = torch.autograd.grad(loss, self.params, allow_unused=True)  # an idle skip row has none
        pairs = [(g, f) for g, f in zip(self.grads, found) if f is not None]
        torch._foreach_add_(*map(list, zip(*pairs)))
        return loss.detach()


# ----------------------------------------------------------------------------------------------------------------------
# 9. PARAMETER TABLE - one row a kind of parameter decides its start, its optimiser group and its quantiser. Every
#    parameter matches exactly one row; names of parameters stand here and nowhere else.
# ----------------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """pattern: full match of the name; init: (tensor, generator) -> None, in place; group: optimiser; quant: quantiser.

    split: heights of the matrices stacked in one weight; sees: the module whose input this weight multiplies, empty for
    the module that owns it (its Hessian is collected there).
    """
    pattern: str
    init: Callable[[Tensor, torch.Generator], object]
    group: str = "scalar"
    quant: str = "keep"
    split: tuple[int, ...] = ()
    sees: str = ""


def orthogonal(w: Tensor, rng: torch.Generator) -> None:
    nn.init.orthogonal_(w, generator=rng)


def constant(*values: float) -> Callable:
    """Fill with one value, or the first rows with one value each."""
    def fill(w: Tensor, rng: torch.Generator) -> None:
        w.copy_(torch.tensor(values).reshape(-1, *[1] * (w.dim() - 1)).expand_as(w))
    return fill


def normal(std: float) -> Callable:
    return lambda w, rng: w.normal_(0, std, generator=rng)


def parameter_table(cfg: Config) -> list[Row]:
    """All rows. Output projections start at zero, so that every block starts as the identity."""
    gate_bias = GATES[cfg.attn_gate].bias if cfg.attn_gate != "none" else 0
    heads = tuple(h * cfg.head_dim for h in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads))
    zero, one = constant(0), constant(1)
    return [
        Row(r"input\.tok_emb\.weight", normal(cfg.tied_embed_init_std), "embed", "embed",
            sees="head" if cfg.tie_embeddings else "none"),
        Row(r"head\.weight", zero, "head", "embed"),
        Row(r"input\.\w+gram\.table\.weight", zero, "embed", "table"),
        # not zero: a zero table behind a zero projection would never receive a gradient
        Row(r"input\.\w+gram\.proj\.weight", orthogonal, "matrix", "attn"),
        Row(r"input\.\w+gram\.scale", constant(0.05)),
        Row(r"value_embedding\.table\.weight", normal(0.01), "embed", "table"),
        Row(r"value_embedding\.proj\.weight", orthogonal, "matrix", "attn"),
        Row(r"value_embedding\.scale", constant(0.1)),
        Row(r"blocks\.\d+\.attn\.value_scale", one),
        Row(r"blocks\.\d+\.x0_scale", zero),
        Row(r"input\.smear_after\.gate", zero),
        Row(r"input\.smear_\w+\.(weight|scale)", zero),
        Row(r"blocks\.\d+\.attn\.qkv\.weight", orthogonal, "matrix", "attn", split=heads),
        Row(r"blocks\.\d+\.attn\.o\.weight", zero, "matrix", "attn"),
        Row(r"blocks\.\d+\.mlp\.up\.weight", orthogonal, "matrix", "mlp"),
        Row(r"blocks\.\d+\.mlp\.down\.weight", zero, "matrix", "mlp"),
        Row(r"blocks\.\d+\.attn\.q_gain", constant(cfg.qk_gain_init)),
        # two dimensions, but not a matrix for Muon
        Row(r"blocks\.\d+\.attn\.gate\.weight", zero, quant="gate" if cfg.gated_attn_quant_gate else "keep"),
        Row(r"blocks\.\d+\.attn\.gate\.bias", constant(gate_bias or 0)),
        Row(r"blocks\.\d+\.attn\.value_mix\.lambdas", constant(0.5)),
        Row(r"blocks\.\d+\.attn\.value_mix\.alpha", zero),
        Row(r"blocks\.\d+\.(attn\.o|mlp\.down)\.scale", one),
        Row(r"blocks\.\d+\.resid_mix", constant(1, 0)),
        Row(r"skip\.weights", one),
        Row(r"skip\.gates", zero),
        Row(r"lane_resid", constant(1.1)),
        Row(r"lane_post", one),
    ]


def rows_of(model: nn.Module, cfg: Config) -> dict[str, Row]:
    """name -> its row; RuntimeError for a parameter that no row or more than one row matches."""
    table, found = parameter_table(cfg), {}
    for name, _ in model.named_parameters():
        rows = [r for r in table if re.fullmatch(r.pattern, name)]  # a full match: no substring ever decides
        if len(rows) != 1:
            raise RuntimeError(f"parameter {name} matches {len(rows)} rows of the table, must be 1")
        found[name] = rows[0]
    return found


@torch.no_grad()
def initialize(model: nn.Module, cfg: Config) -> None:
    """Every parameter from its row and SEED, on the CPU so that all machines start alike."""
    rng = torch.Generator().manual_seed(cfg.seed)
    for (name, p), row in zip(model.named_parameters(), rows_of(model, cfg).values()):
        p.fill_(math.nan)  # what a row forgets to write is found below
        for part in p.split(row.split) if row.split else (p,):  # each stacked matrix gets its own start
            row.init(part, rng)
        if not torch.isfinite(p).all():
            raise RuntimeError(f"parameter {name} was not initialised")


def adapted_names(model: nn.Module, cfg: Config) -> set[str]:
    """Parameters that test-time training moves (TTT_PARAMS)."""
    rows = rows_of(model, cfg)
    # names begin like this
    last = tuple(f"blocks.{i}." for i in range(cfg.num_layers - cfg.ttt_unfreeze_blocks, cfg.num_layers))
    chosen = {"all": lambda n: True, "control": lambda n: rows[n].group == "scalar",
              "last": lambda n: rows[n].group == "scalar" or n.startswith(last)}[cfg.ttt_params]
    return {n for n in rows if chosen(n)}


# ----------------------------------------------------------------------------------------------------------------------
# 10. OPTIMISERS AND SCHEDULES - Muon for matrices, batched over equal shapes and sharded over ranks; AdamW for the rest.
#     Schedules are pure functions of progress in [0, 1]; what was configured and never fired is reported at the end.
# ----------------------------------------------------------------------------------------------------------------------


def lr_multiplier(p: float, warmdown: float, floor: float) -> float:
    """1 until the last `warmdown` of the run, then a straight line to `floor` at its end."""
    if p <= 1 - warmdown or warmdown == 0:
        return 1.0
    return floor + (1 - floor) * max(0.0, 1 - p) / warmdown


def cosine_to_zero(i: int, count: int) -> float:
    """From 1 at the first of `count` chunks to 0 at the last."""
    return 0.5 * (1 + math.cos(math.pi * i / max(count - 1, 1)))


def momentum_at(p: float, start: float, end: float, warmup: float) -> float:
    """A straight line from `start` to `end` over the first `warmup` of the run."""
    return end if p >= warmup else start + (end - start) * p / warmup


class Values(NamedTuple):
    """What the schedules say at one moment."""
    lr: float
    momentum: float
    looping: bool


class Schedules:
    """All schedules of a run, and when each first left its starting value."""

    def __init__(self, cfg: Config):
        self.cfg, self.limits = cfg, cfg.seq_limits  # read once
        # as rounding to whole blocks has made them
        self.shares = [(until, step_blocks(cfg, share) / cfg.blocks_per_batch) for until, share in cfg.batch_shares]
        # name -> whether this configuration expects it to happen
        self.expected = {"warmdown": cfg.warmdown_frac > 0 and cfg.min_lr < 1, "looping": cfg.num_loops > 0,
                         "momentum_warmup": cfg.muon_momentum_warmup_frac > 0, "swa": cfg.average == "swa",
                         "seq_schedule": bool(cfg.train_seq_schedule), "batch_schedule": bool(cfg.train_batch_schedule)}
        self.fired: dict[str, float] = {}

    def at(self, p: float) -> Values:
        """The values at progress p, noting what fires."""
        c = self.cfg
        lr = lr_multiplier(p, c.warmdown_frac, c.min_lr)
        v = Values(lr * math.sqrt(stage_at(self.shares, p)),  # noise of a mean over fewer tokens, kept as it was
                   momentum_at(p, c.muon_momentum_warmup_start, c.muon_momentum, c.muon_momentum_warmup_frac),
                   c.num_loops > 0 and p >= c.enable_looping_at)
        for name, on in (("warmdown", lr < 1), ("looping", v.looping), ("swa", p >= c.swa_start_frac),
                         ("momentum_warmup", v.momentum != c.muon_momentum_warmup_start),
                         ("seq_schedule", c.train_seq_schedule and p >= self.limits[-2][0]),
                         ("batch_schedule", c.train_batch_schedule and p >= self.shares[-2][0])):
            if on:
                self.fired.setdefault(name, p)
        return v

    def report(self) -> tuple[str, list[str]]:
        """(one line, names of expected schedules that never fired)"""
        words = [f"{n} fired@{self.fired[n]:.3f}" if n in self.fired else f"{n} never"
                 for n, wanted in self.expected.items() if wanted]
        return "schedules: " + ", ".join(words), [w.split()[0] for w in words if w.endswith("never")]


class Muon:
    """Momentum orthogonalised by Newton-Schulz, for lists of equally shaped matrices (Jordan 2024; row norm: MuonEq-R).

    Matrices of one shape form one batch, padded to a multiple of the ranks; each rank reduces, orthogonalises and
    returns its own slice of it (reduce-scatter, all-gather), so neither work nor momentum is held twice.
    """

    def __init__(self, params: list[tuple[nn.Parameter, tuple[int, ...]]], cfg: Config, run: Run, around: tuple = (nesterov, settle)):
        self.cfg, self.run, self.around = cfg, run, around
        shapes: dict[tuple, list] = {}  # (rows, columns) -> where they lie
        for p, split in params:
            for i, rows in enumerate(split or (p.shape[0],)):
                shapes.setdefault((rows, p.shape[1]), []).append((p, sum(split[:i]), rows))
        self.banks = list(shapes.items())
        known = POLAR if cfg.muon_coefficients == "polar" else (QUINTIC,)
        # the last polynomial is the fixed point's
        self.coefficients = (known + known[-1:] * cfg.muon_backend_steps)[:cfg.muon_backend_steps]
        self.reset()

    def reset(self) -> None:
        """Forget all momentum (after the compile warm-up)."""
        self.momenta: list[Tensor | None] = [None] * len(self.banks)

    def reduce(self) -> tuple[list[Tensor], Tensor]:
        """(this rank's slice of every bank's gradient, summed over ranks, the squares' sum over this rank's slices)"""
        shards = []
        for (rows, cols), members in self.banks:
            grads = [p.grad[at:at + n] for p, at, n in members]
            missing = -len(grads) % self.run.world  # zeros stay zeros through Newton-Schulz
            bank = torch.stack(grads + [torch.zeros_like(grads[0])] * missing)
            if self.run.world > 1:
                bank = self.run.sum_slices(bank)
            shards.append(bank)
        return shards, torch.stack(torch._foreach_norm(shards)).square().sum()

    def step(self, shards: list[Tensor], scale: Tensor, lr: float, momentum: float) -> None:
        """Update all matrices from reduced gradients times `scale` (the clip factor, a device scalar)."""
        begin, end = self.around
        # on the device: compiled code would take a number for a constant
        momentum, keep, rate = (scale.new_full((), x) for x in (momentum, 1 - lr * self.cfg.muon_wd, -lr))
        for i, ((rows, cols), members) in enumerate(self.banks):
            if self.momenta[i] is None:
                self.momenta[i] = torch.zeros_like(shards[i])
            u = orthogonalize(begin(shards[i], self.momenta[i], scale, momentum, self.cfg.muon_row_normalize), self.coefficients)
            if self.cfg.muon_normalize_update:
                u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
            if self.run.world > 1:
                u = self.run.all_slices(u)
            shape = 1.0 if self.cfg.muon_normalize_update else math.sqrt(max(1.0, rows / cols))  # unit rows have one length
            end([p.data[at:at + n] for p, at, n in members], u, keep, rate * shape)


class Optimizers:
    """Muon and AdamW over one model by the parameter table; gradients are clipped after they are reduced."""

    def __init__(self, model: GPT, cfg: Config, run: Run):
        self.cfg, self.run, self.rows = cfg, run, RowGradients(model, list(model.parameters()), run)
        by_group: dict[str, list] = {}
        for p, row in zip(model.parameters(), rows_of(model, cfg).values()):
            by_group.setdefault(row.group, []).append((p, row.split))
        self.groups = {g: [p for p, _ in members] for g, members in by_group.items()}
        self.muon = Muon(by_group.get("matrix", []), cfg, run, model.muon)
        self.small = [p for g, ps in self.groups.items() if g != "matrix" for p in ps]
        rates = {"embed": (cfg.tied_embed_lr, cfg.embed_wd), "head": (cfg.head_lr, cfg.adam_wd),
                 "scalar": (cfg.scalar_lr, cfg.adam_wd)}
        self.adam = torch.optim.AdamW(  # a group without a rate stops here: no parameter goes without an optimiser
            [{"params": ps, "base": rates[g][0], "lr": rates[g][0], "weight_decay": rates[g][1]} for g, ps in self.groups.items()
             if g != "matrix"], betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)

    def reset(self) -> None:
        """Back to the state before the first step."""
        self.muon.reset()
        self.adam.state.clear()

    def step(self, v: Values) -> Tensor:
        """Reduce, clip, update. Returns the global gradient norm before clipping, a device scalar."""
        small = [p.grad for p in self.small]
        self.run.sum_all_(small)
        shards, square = self.muon.reduce()
        norms = torch._foreach_norm(small)  # already equal on all ranks
        norm = (self.run.sum_(square) + torch.stack(norms).square().sum()).sqrt()
        clip = self.cfg.grad_clip_norm
        scale = (clip / norm.clamp_min(clip)) if clip else torch.ones_like(norm)  # min(1, clip / norm), NaN stays NaN
        torch._foreach_mul_(small, scale)
        for group in self.adam.param_groups:
            group["lr"] = group["base"] * v.lr  # AdamW reads it when it steps
        self.adam.step()  # equal on all ranks, so nothing is sent
        self.muon.step(shards, scale, self.cfg.matrix_lr * v.lr, v.momentum)
        return norm

    def group_norms(self) -> dict[str, float]:
        """Norm of weights and of the local gradient of each group, for the report of a run that went wrong."""
        return {f"{g} {what}": float(torch.stack(torch._foreach_norm(ts)).norm())
                for g, ps in self.groups.items() for what, ts in
                (("weights", [p.data for p in ps]), ("gradient", [p.grad for p in ps if p.grad is not None])) if ts}


# ----------------------------------------------------------------------------------------------------------------------
# 11. WEIGHT AVERAGING - the weights that are packed are an average over the end of the run, in fp32.
# ----------------------------------------------------------------------------------------------------------------------


class Average:
    """none: the weights themselves; ema: exponential with a horizon in progress; swa: plain mean after a start.

    The EMA forgets by progress, not by step: a run of 500 steps and one of 5,000 remember the same share of themselves.
    """

    def __init__(self, cfg: Config, model: nn.Module):
        self.cfg, self.params, self.count = cfg, [p.data for p in model.parameters()], 0
        self.shadow = [p.clone() for p in self.params] if cfg.average != "none" else self.params  # fp32, as the masters are

    def update(self, p: float, dp: float) -> None:
        """After a step that moved progress by dp to p."""
        if self.cfg.average == "ema":
            # a fixed decay only where one is asked for
            decay = self.cfg.ema_decay or math.exp(-dp / max(self.cfg.ema_horizon, 1e-9))
            torch._foreach_lerp_(self.shadow, self.params, 1 - decay)
        elif self.cfg.average == "swa" and (p >= self.cfg.swa_start_frac or not self.count):
            self.count += p >= self.cfg.swa_start_frac  # until then the shadow just follows
            torch._foreach_lerp_(self.shadow, self.params, 1 / max(self.count, 1))

    def apply(self) -> None:
        """Put the average into the model."""
        torch._foreach_copy_(self.params, self.shadow)


# ----------------------------------------------------------------------------------------------------------------------
# 12. QUANTISATION - GPTQ (arXiv 2210.17323), steps by spread (SDClip, PR #1394) or by what errors cost: Hessians of what
#     each weight multiplies, by hooks on the one model; equal shapes are solved as one batch. weight = q * step.
# ----------------------------------------------------------------------------------------------------------------------
DAMP = 0.01  # of the mean diagonal, added before the Cholesky factorisation
COLUMNS = 128  # columns solved between two updates of the remaining ones


class Quantized(NamedTuple):
    """q [R, C] int8, step of rows [R] and, where columns have their own, of columns [C]: fp16, because that is what is stored.
    walked: down each column q, then int16, follows the trellis.
    """
    q: Tensor
    step: Tensor
    column: Tensor | None = None
    walked: bool = False

    def dense(self) -> Tensor:
        w = self.q.float() * self.step.float()[:, None]
        return w if self.column is None else w * self.column.float()


def quantized_rows(model: nn.Module, cfg: Config) -> dict[str, Row]:
    """The parameters that are stored as integers; the rest is stored as fp16."""
    return {n: r for n, r in rows_of(model, cfg).items() if r.quant != "keep"}


def quant_spec(cfg: Config, kind: str) -> tuple[int, float]:
    """(qmax, clip in row standard deviations) of a quantiser column of the parameter table."""
    bits, sigmas = {"attn": (cfg.matrix_bits, cfg.attn_clip_sigmas), "mlp": (cfg.matrix_bits, cfg.mlp_clip_sigmas),
                    "embed": (cfg.embed_bits, cfg.embed_clip_sigmas), "table": (cfg.embed_bits, cfg.embed_clip_sigmas),
                    "gate": (8, 4.0)}[kind]
    return 2 ** (bits - 1) - 1, sigmas


@torch.no_grad()
def collect_hessians(model: GPT, cfg: Config, batches: list[Batch], run: Run) -> dict[str, Tensor]:
    """Mean of x x^T over tokens, visits and ranks for every quantised weight: name -> [C, C] fp32.

    Runs the model eagerly on training data in the form it is used in at the end (recurrence on).
    """
    sums: dict[str, Tensor] = {}
    modules, largest = dict(model.named_modules()), torch.zeros((), device=run.device)

    def watch(name: str, module, args):
        x = args[0].flatten(0, -2).float()  # bf16 products are exact in TF32
        if run.gpu and cfg.fp8 != "none":
            torch.maximum(largest, x.amax(), out=largest)
        sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x

    # a gate is too small to gain from more than rounding
    owners = {n: row.sees or n.rpartition(".")[0] for n, row in quantized_rows(model, cfg).items() if row.quant != "gate"}
    # an embedding's input are ids, no vectors
    hooks = [modules[m].register_forward_pre_hook(functools.partial(watch, n)) for n, m in owners.items()
             if m in modules and not isinstance(modules[m], nn.Embedding)]
    model.looping = cfg.num_loops > 0
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            model.nll(*batch)
    for h in hooks:
        h.remove()
    # A few values beyond FP8's largest number are normal (two in a million); sixteen times it means that the fixed scale no longer fits.
    if float(largest) > 16 * MOST / HIDDEN_8:
        run.warn(f"FP8: hidden values reach {float(largest):.0f}, and training cut them off at {MOST / HIDDEN_8:.0f}; FP8=none trains without that")
    tokens = sum(b.ids.numel() for b in batches) * run.world
    return {n: run.sum_(h).div_(tokens) for n, h in sums.items()}


SLOPE_TOKENS, SLOPE_LONGEST = 4096, 16384  # of each calibration batch on average, in rows of at most so many


@contextlib.contextmanager
def learning_only(model: nn.Module, names: set[str]):
    """Gradients for these parameters and no others; afterwards all have their own again."""
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    for n, p in model.named_parameters():
        p.requires_grad_(n in names)
    try:
        yield
    finally:
        for p, (learns, grad) in before.items():
            p.requires_grad_(learns)
            p.grad = grad


def collect_slopes(model: GPT, cfg: Config, batches: list[Batch], hessians: dict[str, Tensor], frequency: Tensor,
                   run: Run) -> dict[str, Tensor]:
    """What an error of each output costs: mean square of d nats / d output, for every row of a weight: name -> [R] fp32.

    With the Hessian H of its inputs an error e of a row costs about g e H e^T / 2 nats a token (K-FAC, arXiv 1503.05671, diagonal
    on the output's side). Labels are drawn from the model. A tied embedding's H becomes that of both its uses, weighted by what
    errors cost there; `frequency` [V]: how often a token is an input.
    """
    sums: dict[str, Tensor] = {}
    rows = {n: row for n, row in quantized_rows(model, cfg).items() if n in hessians}
    # the head's outputs are logits, whose expected squares are known without drawing labels
    owners = {n: n.rpartition(".")[0] for n, row in rows.items() if row.quant != "embed"}
    counts = dict.fromkeys(owners, 0)

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value

    def watch(name: str):
        scale = getattr(modules[owners[name]], "scale", None)  # an error of the weight comes out multiplied by it
        def back(g):
            counts[name] += len(g)  # tokens and visits: H is a sum over visits, so this is a mean
            add(name, (g.float() if scale is None else g.float() * scale.detach()).square().sum(0))
        return lambda module, args, out: out.register_hook(back) and None

    def use(module, args, out):
        out.register_hook(lambda g: add("input", g.float().T @ g.float()))
    modules, rng = dict(model.named_modules()), torch.Generator(run.device).manual_seed(cfg.seed + run.rank)
    hooks = [modules[m].register_forward_hook(watch(n)) for n, m in owners.items()]
    hooks.append(model.input.tok_emb.register_forward_hook(use))
    tokens = 0
    # gradients for the embeddings, and so for all activations, but for no other weight
    tables = {n for n, row in rows_of(model, cfg).items() if row.group == "embed"}
    # few long rows instead of many short ones: an eager pass takes as long to launch whatever its length
    most, every = SLOPE_LONGEST, max(min(len(batches[0].ids), SLOPE_LONGEST) // SLOPE_TOKENS, 1)
    with torch.compiler.set_stance("force_eager"), learning_only(model, tables):
        for b in batches[::every]:  # segments behind a row's first tokens become empty
            h = model.hidden(b.ids[:most], b.pos[:most], b.cu.clamp(max=most), b.longest)
            z = model.head(h, None, model.input.tok_emb.weight)
            log_p = z.log_softmax(-1)
            p, tokens = log_p.detach().exp(), tokens + len(z)
            flat = 1 - (z.detach() / cfg.logit_softcap) ** 2 if cfg.logit_softcap else 1.0  # of the softcap
            add("head", (p * (1 - p) * flat ** 2).sum(0))
            (-log_p.gather(1, torch.multinomial(p, 1, generator=rng))).sum().backward()
    for hook in hooks:
        hook.remove()
    # a parameter that this plan does not use has no gradient, and no slope: SDClip's steps are left to it
    slopes = {n: run.sum_(g) / (counts[n] * run.world) for n, g in sums.items() if n in owners}
    head, use = (run.sum_(sums[n]) / (tokens * run.world) for n in ("head", "input"))
    for n in rows.keys() - owners.keys():
        slopes[n] = head
        if rows[n].sees:  # tied: rows are also looked up, each as often as its token is an input
            read = hessians[n].diagonal().sum()
            # one Hessian for all rows: that of both uses at their average weights
            hessians[n] = hessians[n] + use / head.sum()
            slopes[n] = (head * read + frequency * use.diagonal().sum()) / hessians[n].diagonal().sum()
    return slopes


def calibrate(model: GPT, cfg: Config, batches: list[Batch], stream: TrainStream, run: Run) -> tuple[dict, dict]:
    """(Hessians, slopes), each by name and empty where the quantiser does without."""
    if cfg.quantizer != "gptq":
        return {}, {}
    hessians = collect_hessians(model, cfg, batches, run)
    if cfg.step_rule == "sdclip":
        return hessians, {}
    return hessians, collect_slopes(model, cfg, batches, hessians, stream.frequency().to(run.device), run)


class Factored(NamedTuple):
    """A batch of Hessians made ready: column order [N, C], upper Cholesky factor of the inverse [N, C, C], dead [N, C]."""
    order: Tensor
    upper: Tensor
    dead: Tensor


def factor_hessians(h: Tensor) -> Factored:
    """Order columns by falling diagonal and factor the damped inverse. [N, C, C]

    Columns whose inputs are always zero do not matter; their diagonal becomes 1 and their weights 0.
    """
    if not h.isfinite().all():
        raise RuntimeError("a Hessian is not finite: the weights that calibration ran with, or an activation, are NaN or infinite")
    h = h.clone()  # the caller's Hessians also measure the error later
    diagonal = h.diagonal(dim1=1, dim2=2)  # a view: writes below go into h
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1.0)
    order = diagonal.argsort(dim=1, descending=True, stable=True)  # columns that matter most are rounded first
    h = torch.take_along_dim(torch.take_along_dim(h, order[:, :, None], 1), order[:, None, :], 2)
    ridge = h.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(h.shape[-1], device=h.device)
    for damp in (DAMP, 10 * DAMP, 100 * DAMP):  # more only if fp32 finds the matrix indefinite
        # _ex reports failure without an exception
        lower, bad = torch.linalg.cholesky_ex(h + damp * ridge)
        if not bad.any():
            upper, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bad.any():
                return Factored(order, upper, dead)
    raise RuntimeError("a Hessian stays indefinite at damping 1.0; was the calibration data degenerate?")


# Trellis-coded rounding (Marcellin and Fischer 1990, entropy-coded as by Fischer and Wang 1992). A state admits the integers
# of one parity, and which half of those was taken leads on: an entropy coder that follows the walk pays for every second
# integer only, while a walk can come nearer to its numbers than every second integer could: errors x.785 at equal bits. All
# numbers of a walk weigh alike, which is so where steps are Fisher's; in rows at the limits of steps() it is only near.
WALK = 64  # numbers from one start, in state 0, to the next; walks twice as long err 2 % less and take twice as long
STATES = 32  # a power of two; 4, 8 and 16 err 3, 2 and 1 % more


def flips(state):
    """Which of a state's two steps takes which half: taps 1 and 4 are the best of all for 32 states (tried on Gaussian numbers)."""
    return (state >> 1 ^ state >> 4) & 1


def after(state, half):
    """The state to which one of its halves (second-lowest bit of the integer) leads; a state's parity is its lowest bit."""
    return (state & STATES // 2 - 1) << 1 | half ^ flips(state)


def nearest(x: Tensor, residue: Tensor) -> Tensor:
    """The nearest integer that is `residue` modulo 4."""
    return 4 * ((x - residue) / 4 + 0.5).floor() + residue


def trellis(x: Tensor) -> Tensor:
    """The integers [B, WALK] of the walk with the least squared error (Viterbi's algorithm)."""
    x, bit, low = x.T, torch.arange(2, device=x.device), torch.arange(STATES // 2, device=x.device)
    state = len(low) * bit[:, None] + low  # [high bit, low bits]
    residue = (state & 1)[..., None] + 2 * (flips(state)[..., None] ^ bit)
    # [WALK, high, low, bit, B]: a step leads from state (high, low) to state (low, bit)
    cost = (x[:, None] - nearest(x[:, None], torch.arange(4, device=x.device)[:, None])).square()[:, residue]
    total, best = x.new_full((2, len(low), 1, x.shape[1]), math.inf), []
    total[0, 0] = 0.0
    for c in cost:
        total, which = (total + c).min(0)
        total = total.view(2, len(low), 1, -1)
        best.append(which)
    # [WALK, STATES, B]: the state before a step, by the state after it; then, doubling, before all steps from it to the end
    back, reach = (len(low) * torch.stack(best) + low[:, None, None]).flatten(1, 2), 1
    end, last = total.flatten(0, 2).argmin(0), back
    while reach < len(back):
        last = torch.cat((last[:-reach].gather(1, last[reach:]), last[-reach:]))
        reach *= 2
    now = last.gather(1, end.expand(len(back), 1, -1)).squeeze(1)
    then = torch.cat((now[1:], end[None]))
    return nearest(x, (now & 1) + 2 * (then & 1 ^ flips(now))).T


def gptq(w: Tensor, f: Factored, step: Tensor, qmax: int, column: Tensor | None = None, walks: bool = False) -> Tensor:
    """Round columns one by one, feeding each error into the columns not yet rounded. w [N, R, C], step [N, R] -> int8 or int16

    The error of column j, over the factor's diagonal, times the factor's row j is the optimal correction. column [N, C]: factors
    of the steps. Walks of the trellis run down a column, whose rows do not feed each other: no error waits for a later choice.
    """
    column = torch.ones_like(w[:, 0]) if column is None else torch.take_along_dim(column, f.order, 1)
    w = torch.take_along_dim(w.float().masked_fill(f.dead[:, None], 0.0), f.order[:, None], 2)
    q, width = torch.empty_like(w), w.shape[2]
    for a in range(0, width, COLUMNS):
        b = min(a + COLUMNS, width)
        errors = torch.empty_like(w[:, :, a:b])
        for j in range(a, b):
            s = step * column[:, j, None]
            x = w[:, :, j] / s  # every row of every layer of the batch
            q[:, :, j] = (trellis(x.clamp(3 - qmax, qmax - 3).view(-1, WALK)).reshape(x.shape) if walks else  # it may go 2 away
                          x.round().clamp(-qmax, qmax))
            e = (w[:, :, j] - q[:, :, j] * s) / f.upper[:, j, j, None]
            w[:, :, j:b] -= e[:, :, None] * f.upper[:, j, None, j:b]  # within the block at once
            errors[:, :, j - a] = e
        w[:, :, b:] -= errors @ f.upper[:, a:b, b:]  # the rest of the matrix in one product
    return torch.take_along_dim(q, f.order.argsort(1)[:, None], 2).to(torch.int16 if walks else torch.int8)


LOW_A, LOW_B = "#a", "#b"  # suffixes of a tensor's correction: [1, R rank] and [rank C / group, group]
COLUMN = "#c"  # of its columns' factors


def to_range(x: Tensor, low: int, high: int) -> Quantized:
    """Round rows to integers in [low, high]; the largest magnitude lands half a step beyond `high`'s."""
    step = (x.abs().amax(-1) / (high + 0.5)).clamp_min(1e-7).half()
    return Quantized((x / step.float()[:, None]).round().clamp(low, high).to(torch.int8), step)


def on_grid(x: Tensor) -> Tensor:
    """Sixteenths of an octave, as fp16: neighbours of one value cost few bytes, and errors feed forward through what is stored."""
    return (torch.exp2((16 * x.float().clamp_min(1e-7).log2()).round() / 16)).half()


class Stack(NamedTuple):
    """Equally shaped tensors of one kind [N, R, C], their Hessians and factors where there are any, base steps [N, R], [N, C],
    and whether their integers walk the trellis.
    """
    kind: str
    names: list[str]
    w: Tensor
    factors: Factored | None
    h: Tensor | None
    row: Tensor
    column: Tensor | None
    walks: bool = False

    def scale(self, step: Tensor) -> Tensor:
        """The step of every weight, by its row's [N, R] and its column's: [N, R, C], or [N, R, 1] where columns have none."""
        rows = step.float()[..., None]
        return rows if self.column is None else rows * self.column[:, None]


class Quantizer:
    """Holds weights and factored Hessians, so that a search over step sizes pays for factoring once."""

    def __init__(self, model: nn.Module, cfg: Config, hessians: dict[str, Tensor], run: Run, slopes: dict[str, Tensor] = {}):
        self.cfg, self.slopes = cfg, slopes
        weights = {n: p.detach() for n, p in model.named_parameters()}
        self.kept = {n: p for n, p in weights.items() if n not in quantized_rows(model, cfg)}
        batches: dict[tuple, list[str]] = {}
        for n, row in quantized_rows(model, cfg).items():
            solved = cfg.quantizer == "gptq" and n in hessians  # without a Hessian there is nothing to feed forward
            batches.setdefault((row.quant, tuple(weights[n].shape), solved), []).append(n)
        self.stacks = [self.stack(kind, names, weights, hessians if solved else {}) for (kind, _, solved), names in batches.items()]
        self.stacks = self.equal_slopes()
        self.weights = sum(s.w.numel() for s in self.stacks)
        rounded = [n for (_, _, solved), names in batches.items() if not solved for n in names]
        if rounded:
            run.log(f"quantise: {len(rounded)} tensors by plain rounding: {rounded[0]}, ...")

    def stack(self, kind: str, names: list[str], weights: dict[str, Tensor], hessians: dict[str, Tensor]) -> Stack:
        """Tensors of one kind with SDClip's steps: a fixed entropy a row, whatever its outliers."""
        w, (qmax, sigmas) = torch.stack([weights[n] for n in names]).float(), quant_spec(self.cfg, kind)
        h = torch.stack([hessians[n] for n in names]) if hessians else None
        # a gate's row of a dozen weights is clipped nowhere
        row = w.abs().amax(-1) / qmax if kind == "gate" else sigmas / qmax * w.std(-1)
        return Stack(kind, names, w, factor_hessians(h) if hessians else None, h, row, None)

    def equal_slopes(self) -> list[Stack]:
        """Steps at which a bit more would save the same nats everywhere: U_jj / sqrt(g_r), U the factor that GPTQ feeds by.

        The errors of GPTQ cost g_r e_j^2 / U_jj^2, and under entropy coding that is water-filling; one factor, the cap's, is free.
        The common level begins where SDClip's is.
        """
        # the mean of log(step) over weights is what decides the bits
        made, shift, count = [], 0.0, 0
        for s in self.stacks:
            if s.h is None or not self.slopes.keys() >= set(s.names):
                made.append(s)
                continue
            u = torch.take_along_dim(s.factors.upper.diagonal(dim1=1, dim2=2), s.factors.order.argsort(1), 1)
            level, g = u.log().mean(1, keepdim=True).exp(), torch.stack([self.slopes[n] for n in s.names])
            row = level * g.clamp_min(1e-12).rsqrt()
            walks = self.cfg.step_rule == "trellis" and s.w.shape[1] % WALK == 0  # other heights are rounded
            made.append(s._replace(row=row, column=on_grid(u / level).float(), walks=walks))
            shift, count = shift + s.w[0, 0].numel() * float((s.row.clamp_min(1e-7) / row).log().sum()), count + s.w.numel()
        level = math.exp(shift / max(count, 1))
        return [s if s.column is None else s._replace(row=s.row * level) for s in made]

    def steps(self, s: Stack, coarser: float) -> tuple[Tensor, int]:
        """(rows' steps [N, R] fp16, largest integer)"""
        if s.kind == "gate":  # never coarsened, and its largest weight fits exactly
            return s.row.clamp_min(1e-7).half(), quant_spec(self.cfg, s.kind)[0]
        if s.column is None:
            return on_grid(coarser * s.row), quant_spec(self.cfg, s.kind)[0]
        # high-rate theory ends where a step is wider than what it divides; a symbol of the coder ends at 127
        spread, most = (s.w / s.column[:, None]).std(-1), (s.w / s.column[:, None]).abs().amax(-1)
        step = torch.maximum(torch.minimum(coarser * s.row, 1.5 * spread), most / 120)
        return on_grid(step / (1 + s.walks)), 127 * (1 + s.walks)  # on a walk every second integer is a symbol

    def plain(self, coarser: float) -> dict[str, Quantized]:
        """What plain rounding at these steps makes of all tensors: near enough for a count of bits, and quick."""
        made = {}
        for s in self.stacks:
            step, qmax = self.steps(s, coarser)
            every = 1 + s.walks  # of a walk's integers, those that are symbols
            q = (s.w / (every * s.scale(step))).round().clamp(-(qmax // every), qmax // every).to(torch.int8)
            made |= {n: Quantized(q[i], step[i]) for i, n in enumerate(s.names)}
        return made

    def solve(self, coarser: float = 1.0) -> tuple[dict[str, Quantized], dict[str, float]]:
        """All tensors with every step times `coarser`; also the relative output error of each quantiser column, and predicted nats."""
        out, wrong, total = {}, {}, {}
        for s in self.stacks:
            step, qmax = self.steps(s, coarser)
            scale = s.scale(step)
            q = (gptq(s.w, s.factors, step.float(), qmax, s.column, s.walks) if s.factors is not None else
                 (s.w / scale).round().clamp(-qmax, qmax).to(torch.int8))
            out |= {n: Quantized(q[i], step[i], None if s.column is None else s.column[i].half(), s.walks)
                    for i, n in enumerate(s.names)}
            if s.h is not None:  # tr((W - Q) H (W - Q)^T) over tr(W H W^T)
                e = s.w - q * scale
                cost = ((e @ s.h) * e).sum(-1)
                wrong[s.kind] = wrong.get(s.kind, 0.0) + float(cost.sum())
                total[s.kind] = total.get(s.kind, 0.0) + float(((s.w @ s.h) * s.w).sum())
                if s.column is not None:
                    wrong["nats"] = wrong.get("nats", 0.0) + 0.5 * float((cost * torch.stack([self.slopes[n] for n in s.names])).sum())
        return out | self.corrections(out), {k: wrong[k] / max(total.get(k, 1.0), 1e-30) for k in wrong}

    def corrections(self, out: dict[str, Quantized]) -> dict[str, Quantized]:
        """LQER: the largest errors W - Q (Frobenius) as a b of low rank; a in 2 bits, b in 4 (arXiv 2402.02446, PR #1797)."""
        if not self.cfg.lqer_top_k:
            return {}
        errors = {n: s.w[i] - out[n].dense() for s in self.stacks for i, n in enumerate(s.names)}
        made = {}
        for n in sorted(errors, key=lambda n: (-float(errors[n].norm()), n))[:self.cfg.lqer_top_k]:
            u, s, v = torch.linalg.svd(errors[n], full_matrices=False)
            rank, group = min(self.cfg.lqer_rank, len(s)), math.gcd(v.shape[1], self.cfg.lqer_asym_group)
            # singular values go into the first factor, so that rows of the second are unit vectors
            made[n + LOW_A] = to_range((u * s)[:, :rank].reshape(1, -1), -2, 1)
            made[n + LOW_B] = to_range(v[:rank].reshape(-1, group), -8, 7)
        return made


# ----------------------------------------------------------------------------------------------------------------------
# 13. ARTIFACT - one file: magic, checksum, manifest, entropy-coded sections; no pickle. Its size and that of the packed
#     code are counted on the bytes that are written, and one factor of all steps brings them under the cap.
# ----------------------------------------------------------------------------------------------------------------------
ARTIFACT_MAGIC = b"PGOLF\x00\x01\n"
PACKED_MARK = "# packed by train_gpt.py"


def codecs() -> dict[str, tuple[int, Callable[[bytes], bytes], Callable[[bytes, int], bytes]]]:
    """name -> (id in the file, compress, decompress to so many bytes and hardly more) of every entropy coder that is installed."""
    table = {"zlib": (0, lambda b: zlib.compress(b, 9), lambda b, size: zlib.decompressobj().decompress(b, size + 1)),
             "lzma": (1, lambda b: lzma.compress(b, preset=9), lambda b, size: lzma.LZMADecompressor().decompress(b, size + 1))}
    if HAVE["brotli"]:
        import brotli
        def unbrotli(b: bytes, size: int) -> bytes:
            reader = brotli.Decompressor()
            try:
                return reader.process(b, output_buffer_limit=size + 1)
            except TypeError:  # before 1.2 it has no limit: a little at a time, each a thousandfold at most
                out = bytearray()
                for at in range(0, len(b), 64):
                    if len(out) <= size:
                        out += reader.process(b[at:at + 64])
                return bytes(out)
        table["brotli"] = (2, lambda b: brotli.compress(b, quality=11, lgwin=24), unbrotli)
    if HAVE["zstd"]:
        import zstandard
        table["zstd"] = (3, lambda b: zstandard.ZstdCompressor(level=22).compress(b),
                         lambda b, size: zstandard.ZstdDecompressor().stream_reader(b).read(size + 1))
    return table


def codec_names(wanted: str, run: Run) -> list[str]:
    """Coders to try. A named one that is not installed stops the run: falling back would change the size silently."""
    names, have = ("brotli", "zstd", "lzma") if wanted == "auto" else (wanted,), codecs()
    missing = [n for n in names if n not in have]
    if missing and wanted != "auto":
        raise ConfigError(f"COMPRESSOR={wanted} is not installed; pip install -r requirements.txt")
    if missing:
        run.warn(f"COMPRESSOR=auto goes without {', '.join(missing)} (not installed): the artifact may be larger")
    return [n for n in names if n in have]


def encode_section(data: bytes, names: list[str]) -> bytes:
    """The smallest coding: id, raw length, coded length (little-endian u8, u32, u32), payload."""
    table = codecs()  # cheap, and threads need their own compressor objects
    number, best = min(((table[n][0], table[n][1](data)) for n in names), key=lambda x: len(x[1]))
    return struct.pack("<BII", number, len(data), len(best)) + best


def shuffle_bytes(a: np.ndarray) -> bytes:
    """fp16 values as all low bytes, then all high bytes: exponents next to exponents compress better."""
    return np.ascontiguousarray(a, "<f2").view(np.uint8).reshape(-1, 2).T.tobytes()


def unshuffle_bytes(data: bytes) -> np.ndarray:
    return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(2, -1).T).view("<f2").reshape(-1)


# Range coding (rANS, arXiv 1311.2540) of the integers: given the scales of their row and column, trained weights are independent
# and close to Gaussian, so the entropy by scale is nearly all there is to gain. A thousand interleaved states keep numpy busy.
# Where integers walk the trellis, half of each is coded, given its parity, which the reader knows: he walks along.
PRECISION, LANES, SCALES = 15, 1024, 128  # probabilities are multiples of 2^-15


def scales(t: Quantized) -> tuple[Tensor, Tensor]:
    """Root mean squares in eighths of an octave, of rows [R] and, relative to them, of columns [C]; uint8 with an offset."""
    square = (t.q.float() / (1 + t.walked)).square() + 1e-3  # a row of zeros has a scale too
    column = (square / square.mean(1, keepdim=True)).mean(0)
    row = (square / column).mean(1)
    return tuple((4 * x.log2() + zero).round().clamp(0, SCALES - 1).byte() for x, zero in ((row, 40), (column, 32)))


def scale_of(row: Tensor, column: Tensor) -> Tensor:
    """The frequencies' row for every weight: [R], [C] -> [R, C] int64."""
    return (row.long()[:, None] + column.long() - 32).clamp(0, SCALES - 1)


def cells(t: Quantized, row: Tensor, column: Tensor) -> Tensor:
    """Where each integer stands in the table of frequencies: (scale, and SCALES more for odd ones) * 256 + symbol. [R, C]"""
    q = t.q.long()
    odd, symbol = (q & 1, q >> 1) if t.walked else (0, q)
    return (scale_of(row, column) + SCALES * odd) * 256 + symbol + 128


def count_cells(at: Tensor) -> Tensor:
    """How often each symbol stands at each scale: [2 SCALES, 256]."""
    return torch.bincount(at.flatten(), minlength=512 * SCALES).view(-1, 256).cpu()  # counted on the tensor's own device


def to_frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts [K, 256] as frequencies that sum to 2^PRECISION in each row that occurs, at least 1 for what occurs."""
    total, seen = counts.sum(1, keepdims=True), counts > 0
    f = counts * (2 ** PRECISION - seen.sum(1, keepdims=True)) // np.maximum(total, 1) + seen
    f[np.arange(len(f)), counts.argmax(1)] += np.where(total[:, 0] > 0, 2 ** PRECISION - f.sum(1), 0)
    return f


def range_encode(parts: list[np.ndarray], frequencies: np.ndarray) -> bytes:
    """Symbols, given as cells, in parts that are read one after the other -> LANES final states (u32), then 16-bit words."""
    f, first = (x.astype(np.uint64).ravel() for x in (frequencies, frequencies.cumsum(1) - frequencies))
    # a state lies in [2^16, 2^32) and gives up 16 bits before it would overflow
    state, words = np.full(LANES, 1 << 16, np.uint64), []
    for cell in (part[at:at + LANES] for part in reversed(parts)  # last in, first out
                 for at in reversed(range(0, len(part), LANES))):
        n, x = f[cell], state[:len(cell)]
        full = x >= n << (32 - PRECISION)
        words.append(x[full].astype(np.uint16)[::-1])
        x = np.where(full, x >> 16, x)
        state[:len(cell)] = (x // n << PRECISION) + x % n + first[cell]
    return state.astype("<u4").tobytes() + np.concatenate([np.empty(0, np.uint16), *words])[::-1].astype("<u2").tobytes()


class RangeReader:
    """Reads a stream part by part: rows of frequencies [n] -> symbols [n] uint8."""

    def __init__(self, data: bytes, frequencies: np.ndarray):
        self.f, self.first = (x.astype(np.uint64).ravel() for x in (frequencies, frequencies.cumsum(1) - frequencies))
        slots = np.zeros((len(frequencies), 2 ** PRECISION), np.uint8)  # slot -> symbol
        for k in np.flatnonzero(frequencies.sum(1)):
            slots[k] = np.repeat(np.arange(256), frequencies[k])
        self.slots, self.at = slots.ravel(), 0
        self.state, self.words = np.frombuffer(data, "<u4", LANES).astype(np.uint64), np.frombuffer(data, "<u2", offset=4 * LANES)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty(len(rows), np.uint8)
        for i in range(0, len(rows), LANES):
            row, x = rows[i:i + LANES].astype(np.int64), self.state[:len(rows[i:i + LANES])]
            slot = x & np.uint64(2 ** PRECISION - 1)
            symbol = self.slots[(row << PRECISION) + slot.astype(np.int64)]
            cell = (row << 8) + symbol
            x = self.f[cell] * (x >> PRECISION) + slot - self.first[cell]
            low = x < 1 << 16  # exactly the states that gave a word up here
            count = int(low.sum())
            x[low] = x[low] << 16 | self.words[self.at:self.at + count]
            self.state[:len(row)], out[i:i + LANES], self.at = x, symbol, self.at + count
        return out


def one_row(tensors: list[Tensor]) -> Tensor:
    """All of them, one after the other."""
    return torch.cat([torch.empty(0, dtype=torch.uint8), *(x.flatten() for x in tensors)])


def in_step(tensors: list[Tensor]) -> Tensor:
    """[R, C] each -> [WALK, n]: what all walks do at once, row after row."""
    steps = [x.view(-1, WALK, x.shape[1]).transpose(0, 1).reshape(WALK, -1) for x in tensors]
    return torch.cat([torch.empty(WALK, 0, dtype=torch.uint8), *steps], 1)


def range_sections(tensors: dict[str, Quantized]) -> tuple[list[bytes], bytes]:
    """(scales of rows, of columns, the table of frequencies, to be coded like other sections; the stream of integers)"""
    found = {n: scales(t) for n, t in tensors.items()}  # once: what is coded by them and what is stored must agree
    at = {n: cells(t, *found[n]) for n, t in tensors.items()}
    frequencies = to_frequencies(sum(map(count_cells, at.values())).numpy())
    plain, walked = ([at[n].int().cpu() for n, t in tensors.items() if t.walked == kind] for kind in (False, True))
    side = [torch.cat(part).cpu().numpy().tobytes() for part in zip(*found.values())]
    parts = [one_row(plain), *in_step(walked)]
    return [*side, frequencies.astype("<u2").tobytes()], range_encode([part.numpy() for part in parts], frequencies)


def ranged_integers(shapes: dict[str, list[int]], walked: list[str], rows: bytes, columns: bytes, table: bytes,
                    stream: bytes) -> dict[str, Tensor]:
    """The inverse: name -> q [R, C]."""
    sides = [torch.frombuffer(bytearray(side), dtype=torch.uint8).split([shape[i] for shape in shapes.values()])
             for i, side in enumerate((rows, columns))]
    at = {n: scale_of(*pair).to(torch.uint8) for n, pair in zip(shapes, zip(*sides))}
    read = RangeReader(stream, np.frombuffer(table, "<u2").astype(np.int64).reshape(-1, 256))
    plain = {n: at[n] for n in shapes if n not in walked}
    parts = torch.from_numpy((read(one_row(list(plain.values())).numpy()) ^ 128).view(np.int8)).split([x.numel() for x in plain.values()])
    out = {n: q.view(shapes[n]) for n, q in zip(plain, parts)}
    steps = in_step([at[n] for n in walked]).numpy()
    q, state = np.empty(steps.shape, np.int16), np.zeros(steps.shape[1], np.uint8)
    for i, row in enumerate(steps):
        odd = state & 1
        half = read(row + SCALES * odd) ^ 128  # 127 + 128 is what a byte holds
        q[i] = 2 * half.view(np.int8).astype(np.int16) + odd
        state = after(state, half & 1)
    for n, part in zip(walked, torch.from_numpy(q).split([at[n].numel() // WALK for n in walked], 1)):
        out[n] = part.reshape(WALK, -1, shapes[n][1]).transpose(0, 1).reshape(shapes[n])
    return out


def bits_by_tensor(tensors: dict[str, Quantized]) -> dict[str, float]:
    """Entropy of each tensor's integers given their scales, by the frequencies of all: what the range coder spends on it."""
    counts = {n: count_cells(cells(t, *scales(t))) for n, t in tensors.items()}
    whole = sum(counts.values()).double()
    spent = -(whole / whole.sum(1, keepdim=True).clamp_min(1)).clamp_min(1e-12).log2()
    return {n: float((c * spent).sum()) for n, c in counts.items()}


def share_out(total: int, tensors: dict[str, Quantized]) -> dict[str, int]:
    """Bytes of one stream by tensor, in proportion to the entropy of each; the rounding goes to the last."""
    bits = bits_by_tensor(tensors)
    edges = (np.cumsum([0, *bits.values()]) / max(sum(bits.values()), 1e-9) * total).round().astype(int)
    edges[-1] = total
    return {n: int(b - a) for n, a, b in zip(bits, edges, edges[1:])}


def build_artifact(tensors: dict[str, Quantized], kept: dict[str, Tensor], meta: dict, names: list[str],
                   coder: str = "range") -> tuple[bytes, dict]:
    """(file, bytes by part). Sections: manifest, all fp16 values, then the integers: a section each, or one stream at the end."""
    columns = {n + COLUMN: t.column for n, t in tensors.items() if t.column is not None}
    halves = {**{n: t.step for n, t in tensors.items()}, **columns, **kept}
    manifest = {**meta, "integers": {n: list(t.q.shape) for n, t in tensors.items()}, "coder": coder,
                "walked": [n for n, t in tensors.items() if t.walked], "halves": {n: list(t.shape) for n, t in halves.items()}}
    # one section: neighbours of one kind
    flat = torch.cat([t.detach().half().flatten().cpu() for t in halves.values()]).numpy()
    raw = [json.dumps(manifest, separators=(",", ":")).encode(), shuffle_bytes(flat)]  # no indentation: it is counted
    # the stream comes last and has no length of its own: it ends with the file
    more, stream = range_sections(tensors) if coder == "range" else ([t.q.cpu().numpy().tobytes() for t in tensors.values()], b"")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the coders release the interpreter lock
        sections = list(pool.map(lambda b: encode_section(b, names), raw + more))
    body = struct.pack("<I", len(sections)) + b"".join(sections) + stream  # number of sections first
    parts = {"manifest": len(sections[0]), "scales and fp16": len(sections[1])}
    if stream:
        parts["scales of the stream, frequencies"] = sum(map(len, sections[2:]))
    sizes = share_out(len(stream), tensors) if stream else {n: len(s) for n, s in zip(tensors, sections[2:])}
    for n, size in sizes.items():
        part = re.sub(r"\.\d+\.", ".", n)
        parts[part] = parts.get(part, 0) + size
    return ARTIFACT_MAGIC + hashlib.sha256(body).digest() + body, parts


def read_artifact(data: bytes) -> tuple[dict, dict[str, Tensor]]:
    """(manifest, dense fp32 weights by name). SystemExit says whether a file is foreign, truncated, altered or malformed."""
    if data[:8] != ARTIFACT_MAGIC:
        raise SystemExit("artifact: not a file of this program (its first bytes differ)")
    body = data[40:]  # behind magic and checksum
    if hashlib.sha256(body).digest() != data[8:40]:
        raise SystemExit(f"artifact: truncated or altered (checksum of its {len(data)} bytes differs)")
    try:
        return read_body(body)
    except Exception as e:  # a file can say anything: a matching checksum proves that it came whole, not from whom
        raise SystemExit(f"artifact: malformed ({said(e)})") from None


MOST_WEIGHTS = 1 << 28  # of an artifact, and bytes of its sections: seven times what a model of 16 MB holds


def read_sections(body: bytes) -> tuple[list[bytes], int]:
    """(unpacked sections, where what comes behind them begins); ValueError for one that holds more or less than it says."""
    known = {number: decode for number, _, decode in codecs().values()}
    coded, at = [], 4
    for _ in range(struct.unpack_from("<I", body)[0]):
        number, size, packed = struct.unpack_from("<BII", body, at)
        if number not in known:
            raise SystemExit(f"artifact: section coded with coder {number}, which is not installed; pip install -r requirements.txt")
        coded.append((known[number], body[at + 9:at + 9 + packed], size))
        at += 9 + packed
    if sum(size for *_, size in coded) > MOST_WEIGHTS or at > len(body):
        raise ValueError("its sections are longer than any model's")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sections = list(pool.map(lambda c: c[0](c[1], c[2]), coded))
    if [len(s) for s in sections] != [size for *_, size in coded]:
        raise ValueError("a section does not hold as many bytes as it says")
    return sections, at


def read_body(body: bytes) -> tuple[dict, dict[str, Tensor]]:
    """What stands behind the checksum."""
    sections, at = read_sections(body)
    manifest = json.loads(sections[0])
    shapes = [*manifest["integers"].values(), *manifest["halves"].values()]
    if not all(type(n) is int and 0 <= n <= MOST_WEIGHTS for shape in shapes for n in shape) or sum(map(math.prod, shapes)) > MOST_WEIGHTS:
        raise ValueError("its shapes are no model's")
    flat = torch.from_numpy(unshuffle_bytes(sections[1]).astype(np.float32))
    sizes = [math.prod(s) for s in manifest["halves"].values()]
    weights = {n: t.reshape(s) for (n, s), t in zip(manifest["halves"].items(), flat.split(sizes))}
    shapes = manifest["integers"]
    integers = (ranged_integers(shapes, manifest.get("walked", []), *sections[2:], body[at:]) if manifest.get("coder") == "range" else
                {n: torch.from_numpy(np.frombuffer(b, np.int8).reshape(shapes[n]).copy()) for n, b in zip(shapes, sections[2:], strict=True)})
    for n, q in integers.items():
        weights[n] = Quantized(q, weights[n], weights.pop(n + COLUMN, None)).dense()
    for n in [n.removesuffix(LOW_A) for n in weights if n.endswith(LOW_A)]:
        a, b = weights.pop(n + LOW_A).view(len(weights[n]), -1), weights.pop(n + LOW_B).view(-1, weights[n].shape[1])
        weights[n] = weights[n] + a @ b
    return manifest, weights


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Fill every parameter; RuntimeError if names or shapes differ."""
    params = dict(model.named_parameters())
    odd = [n for n in params.keys() & weights.keys() if params[n].shape != weights[n].shape]
    if odd:
        raise RuntimeError(f"artifact and model differ in the shape of {odd[0]}: {list(weights[odd[0]].shape)} and {list(params[odd[0]].shape)}")
    if params.keys() != weights.keys():
        raise RuntimeError(f"artifact and model differ in {sorted(params.keys() ^ weights.keys())[:5]}; its RUN_ID.packed.py reads it")
    with torch.no_grad():
        for n, p in params.items():
            p.copy_(weights[n])


def bare(source: str) -> str:
    """Source without comments, docstrings and empty lines; otherwise as written, so that every Python reads and packs it alike."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines[text.lineno - 1:text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
            if len(node.body) == 1:  # a body of nothing else
                lines[text.lineno - 1] = " " * text.col_offset + "pass"
    # positions of comments stay true in what is left
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1]:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][:token.start[1]]
    return "\n".join(line.rstrip() for line in lines if line.strip()) + "\n"


@functools.cache
def pack_code(source: str) -> bytes:
    """This file without comments and docstrings, compressed, as a Python file that runs: the code that is counted.

    Deterministic. The unpacked source stays visible to `inspect` (through linecache), as kernel compilers need it.
    """
    if source.startswith(PACKED_MARK):
        return source.encode()
    text = base64.b85encode(lzma.compress(bare(source).encode(), preset=9 | lzma.PRESET_EXTREME)).decode()
    return (f"{PACKED_MARK}; the readable source is in the log of the run\n"
            "import base64,linecache,lzma\n"
            f"s=lzma.decompress(base64.b85decode({text!r})).decode()\n"
            "n=__file__+'!unpacked'\n"
            "linecache.cache[n]=(len(s),None,s.splitlines(True),n)\n"
            "exec(compile(s,n,'exec'))\n").encode()


def side_bytes(quantizer: Quantizer) -> int:
    """About what an artifact holds beside its integers: fp16 values, a byte a row and column, manifest and frequencies."""
    shapes = [s.w.shape for s in quantizer.stacks]
    return 12_000 + 2 * sum(p.numel() for p in quantizer.kept.values()) + sum(n * (rows + columns) for n, rows, columns in shapes)


def estimate(quantizer: Quantizer, wanted: float) -> float:
    """The factor of all steps at which plain rounding comes to `wanted` bits: quick beside a solve, so the search begins there."""
    coarser = 1.0
    for _ in range(4):  # each octave saves about a bit a weight
        octaves = (sum(bits_by_tensor(quantizer.plain(coarser)).values()) - wanted) / quantizer.weights
        coarser = min(max(coarser * 2 ** min(octaves, 2.0), 0.25), 4.0)
    return coarser


def fit_artifact(quantizer: Quantizer, meta: dict, cfg: Config, run: Run) -> tuple[bytes, dict, float]:
    """Pack; while code + model are over the cap, coarsen all steps; Fisher's steps also become finer, to fill it.
    -> (artifact, bytes by part, coarsening).

    A step twice as wide saves about a bit a weight; from the second try on, what it saved before (the secant). Within half a
    percent below the cap is near enough.
    """
    names, code, cap = codec_names(cfg.compressor, run), len(pack_code(SOURCE)), cfg.artifact_max_bytes
    goal, tries, best, finest = 0.9985 * cap, [], None, 0.25 if quantizer.slopes else 1.0
    coarser = estimate(quantizer, 8 * (goal - code - side_bytes(quantizer))) if quantizer.slopes else 1.0
    for attempt in range(8):
        tensors, errors = quantizer.solve(coarser)
        data, parts = build_artifact(tensors, quantizer.kept, {**meta, "coarser": coarser}, names, cfg.weight_coder)
        total, bits = len(data) + code, sum(bits_by_tensor(tensors).values())  # what is counted is what is written
        shown = " ".join(f"{k}:{v:.2e}" for k, v in errors.items())
        run.log(f"pack: steps x{coarser:.4f} entropy {bits / quantizer.weights:.3f} bits/weight "
                f"relative error {shown} total {total} of {cap}")
        run.event("pack", coarser=coarser, total=total, code=code, bits=bits, errors=errors)
        last = total, data, {"code": code, **parts}, coarser
        if total <= cap and (best is None or total > best[0]):
            best = last
        tries = [*tries, (math.log2(coarser), total)][-2:]
        # steps at their limits: an octave saved nothing
        stuck = len(tries) == 2 and tries[1][0] > tries[0][0] + 0.9 and tries[0][1] - tries[1][1] < 1e-4 * cap
        if total <= cap and (coarser == finest or total > 0.995 * cap) or stuck:
            break
        slope = -quantizer.weights / 8 if len(tries) < 2 else (tries[1][1] - tries[0][1]) / (tries[1][0] - tries[0][0])
        # never so far that steps lose their meaning, nor much farther than before: steps are rounded to sixteenths of an octave, so two
        # tries can come to one total, whose secant would point anywhere
        most = 2.0 if len(tries) < 2 else min(3 * abs(tries[1][0] - tries[0][0]), 2.0)
        octaves = min(max((goal - total) / min(slope, -1.0), -most), most)
        coarser = max(coarser * 2 ** octaves, finest)
    if best is None:
        run.fail(f"artifact does not fit: {total} bytes > {cap} at steps x{last[-1]:.2f}")
    return (best or last)[1:]


# ----------------------------------------------------------------------------------------------------------------------
# 14. N-GRAM EXPERTS - what counting can add to the network. Counts know only what was scored at earlier moments of the one
#     order; every expert is a distribution over the vocabulary, fixed before its target is seen. Pure functions.
# ----------------------------------------------------------------------------------------------------------------------


def order_by_moment(group: Tensor, moment: Tensor) -> tuple[Tensor, int]:
    """(one sortable number a row, its stride): groups apart, and within a group by moment. group and moment [N] >= 0"""
    stride = int(moment.max()) + 2
    return group * stride + moment, stride


def dense(key: Tensor) -> Tensor:
    """The same classes numbered from 0: [N] -> [N]."""
    return key.unique(return_inverse=True)[1]


def count_earlier(group: Tensor, moment: Tensor, ahead: int = 0) -> Tensor:
    """For each row, the rows of its group with a moment before its own (before its own + ahead): [N], [N] -> [N]."""
    code, stride = order_by_moment(group, moment)
    line = code.sort().values
    # rank among all rows less the rank of the group's start: two binary searches instead of a loop over groups
    return torch.searchsorted(line, code + ahead) - torch.searchsorted(line, group * stride)


def count_kinds(group: Tensor, pair: Tensor, moment: Tensor) -> Tensor:
    """For each row, how many different pairs of its group came up at an earlier moment (pair refines group): [N]."""
    # as a list of first appearances, the question is again one of ranks in a sorted line
    first = torch.full((int(pair.max()) + 1,), int(moment.max()) + 1, device=pair.device)
    first = first.scatter_reduce(0, pair, moment, "amin")  # a pair counts from its first moment on
    owner = torch.zeros_like(first).scatter_(0, pair, group)
    _, stride = order_by_moment(group, moment)
    line = (owner * stride + first).sort().values
    return torch.searchsorted(line, group * stride + moment) - torch.searchsorted(line, group * stride)


def contexts(tokens: Tensor, order: int) -> Tensor:
    """A key for the last `order` tokens up to and including each input: [N + 1] -> [N]; documents begin anew.

    Exact up to order 2, a polynomial hash modulo 2^64 above. The next token is never in it.
    """
    ids, key = tokens[:-1], torch.zeros_like(tokens[:-1])
    place = places(tokens)
    for back in range(order):
        # before its document's start every context reads the same mark
        key = key * 0x9E3779B1 + torch.where(place >= back, ids.roll(back), -1) + 2
    return key


def places(tokens: Tensor) -> Tensor:
    """Position of each input in its document: [N + 1] -> [N]."""
    at = torch.arange(len(tokens) - 1, device=tokens.device)
    return at - torch.where(tokens[:-1] == BOS, at, 0).cummax(0).values


class Counts(NamedTuple):
    """Evidence of one context: how often the token came, how often any did, how many different ones did."""
    token: Tensor
    any: Tensor
    kinds: Tensor


def smoothed(counts: Counts, vocab: int, add: float) -> Tensor:
    """(c + add) / (n + add V): every token as if seen `add` times before."""
    return (counts.token + add) / (counts.any + add * vocab)


def escaping(counts: Counts, lower: Tensor) -> Tensor:
    """PPM-C: c / (n + kinds), and the mass kinds / (n + kinds) goes to the lower order; unseen contexts pass all of it on."""
    n = counts.any + counts.kinds
    return torch.where(n > 0, (counts.token + counts.kinds * lower) / n.clamp_min(1), lower)


# letter of MIXER -> (orders of context it counts, probability from their counts, lowest order first)
EXPERTS = {
    "u": ((0,), lambda c, V: smoothed(c[0], V, 0.1)),
    "b": ((1,), lambda c, V: smoothed(c[0], V, 0.1)),
    "t": ((-2,), lambda c, V: smoothed(c[0], V, 0.01)),  # hashed into 65,536 buckets, as PR #430's
    "p": ((0, 1, 2), lambda c, V: escaping(c[2], escaping(c[1], escaping(c[0], torch.full_like(c[0].any, 1 / V))))),
}


def context_classes(tokens: Tensor, order: int) -> Tensor:
    """Dense class of each input's context; -2: the last two tokens in buckets."""
    if order >= 0:
        return dense(contexts(tokens, order))
    ids = tokens[:-1]
    before = torch.where(places(tokens) > 0, ids.roll(1), 0)  # never another document's token, which may not be scored yet
    return dense(((36313 * before) ^ (27191 * ids)) % 65536)


def expert_nats(tokens: Tensor, moment: Tensor, letters: str, vocab: int) -> Tensor:
    """-log p of every target under each expert, from counts of earlier moments: [N + 1], [N] -> [experts, N] fp64."""
    evidence = {}
    for order in sorted({o for x in letters for o in EXPERTS[x][0]}):  # experts share the orders they count
        group = context_classes(tokens, order)
        pair = dense(group * vocab + tokens[1:])
        evidence[order] = Counts(*(n.double() for n in (count_earlier(pair, moment), count_earlier(group, moment),
                                                       count_kinds(group, pair, moment))))
    return torch.stack([-EXPERTS[x][1]([evidence[o] for o in EXPERTS[x][0]], vocab).log() for x in letters])


def expert_distribution(tokens: Tensor, moment: Tensor, letter: str, vocab: int, at: int) -> Tensor:
    """The whole distribution [V] at one position, by the definition: look at all earlier moments and count."""
    found = []
    for order in EXPERTS[letter][0]:
        group = context_classes(tokens, order)
        seen = torch.bincount(tokens[1:][(group == group[at]) & (moment < moment[at])], minlength=vocab).double()
        found.append(Counts(seen, seen.sum().expand(vocab), (seen > 0).double().sum().expand(vocab)))
    return EXPERTS[letter][1](found, vocab)


def hedge(nats: Tensor, moment: Tensor, rate: float, head_start: float = 2.0) -> Tensor:
    """Mix experts [K, N] into one distribution: nats [N]. Expert 0, the network, starts e^2 ahead of the others.

    Weights are exponential in the losses of earlier moments: log w_k -= rate * mean nats at a moment, after it (PR #430).
    """
    K, moments = len(nats), int(moment.max()) + 1
    size = torch.bincount(moment, minlength=moments).double()
    mean = torch.stack([torch.zeros_like(size).index_add_(0, moment, row) for row in nats]) / size.clamp_min(1)
    log_w = torch.zeros(K, 1, device=nats.device, dtype=nats.dtype)
    log_w[0] = head_start  # counting starts with empty tables, and should not cost the first documents much
    log_w = log_w - rate * (mean.cumsum(1) - mean)  # less its own moment: weights know only earlier ones
    return -((log_w.log_softmax(0))[:, moment] - nats).logsumexp(0)


class Hints(NamedTuple):
    """For each position: the token that counting expects (-1: none), and the last moment that this rests on."""
    token: Tensor
    rests_on: Tensor


def find_hints(tokens: Tensor, moment: Tensor, order: int, least: float) -> Hints:
    """The token that most often followed the same `order` tokens at earlier moments, where its share is at least `least`.

    tokens [N + 1]; moment [N], -1 where a position is not to be scored. Ties go to the token that got there first (all of a moment comes at once).
    """
    use = ((moment >= 0) & (places(tokens) >= order - 1)).nonzero().flatten()  # the whole context lies in the document
    empty = Hints(torch.full_like(tokens[:-1], -1), torch.full_like(tokens[:-1], -1))
    if not len(use):
        return empty
    group, next_, when = dense(contexts(tokens, order)[use]), tokens[1:][use], moment[use]
    code, stride = order_by_moment(group, when)
    line, by = code.sort(stable=True)
    pair = dense(group * (int(next_.max()) + 1) + next_)
    # how often its pair had come by then, its own moment included: the running best of a context is a running maximum
    times = count_earlier(pair, when, 1)[by]
    top = int(times.max()) + 1
    best = (group[by] * top + times).cummax(0).values  # groups follow each other, so the offset restarts each
    last = torch.searchsorted(line, code) - 1  # the last row before this moment ...
    known = last >= torch.searchsorted(line, group * stride)  # ... if it is of the same context
    last = last.clamp_min(0)
    leader = next_[by][torch.searchsorted(best, best[last])]  # the first that reached the running best
    share = (best[last] - group * top).double() / count_earlier(group, when).clamp_min(1)
    sure = known & (share >= least)
    empty.token[use], empty.rests_on[use] = torch.where(sure, leader, -1), torch.where(sure, when[by][last], -1)
    return empty


def hint_by_definition(tokens: Tensor, moment: Tensor, order: int, least: float, at: int, place: Tensor | None = None) -> int:
    """One position's hint, the slow way: every earlier-scored place with the same context, token by token. place: places(tokens), if known"""
    place = places(tokens) if place is None else place
    if int(moment[at]) < 0 or int(place[at]) < order - 1:
        return -1
    found = ((tokens[:-1] == tokens[at]) & (moment >= 0) & (moment < moment[at]) & (place >= order - 1)).nonzero().flatten()
    for back in range(1, order):
        found = found[tokens[found - back] == tokens[at - back]]
    if not len(found):
        return -1
    when, by = moment[found].sort(stable=True)
    followed = tokens[1:][found[by]]
    counts = torch.bincount(followed)
    if float(counts.max()) < least * len(found):
        return -1
    # ties: whichever reached the count at the earlier moment, and of one moment whichever came first there
    came = {int(t): followed == t for t in (counts == counts.max()).nonzero().flatten()}
    return min(came, key=lambda t: int((came[t] & (when == when[came[t]][-1])).nonzero()[0]))


def with_hint(targets: Tensor, hint: Tensor | None) -> Tensor:
    """Targets [T], and beside them the hinted tokens [T, 2], whose nats `tilt` needs."""
    return targets if hint is None else torch.stack((targets, hint.clamp_min(0)), 1)


def tilt_logits(logits: Tensor, hint: Tensor, boost: float) -> Tensor:
    """The same as an operation on whole rows [T, V]: what `tilt` must be the closed form of."""
    wanted = torch.arange(logits.shape[-1], device=logits.device) == hint[:, None]
    return logits + boost * wanted


def tilt(nats: Tensor, hinted: Tensor, hint: Tensor, target: Tensor, boost: float) -> Tensor:
    """Raise one token's logit by `boost` and renormalise in closed form (PR #1437; token-only as in #2135).

    nats of target and of hint [N] -> nats of target under p'(y) = p(y) e^(boost [y = hint]) / (1 + p(hint) (e^boost - 1)).
    """
    tilted = nats - boost * (hint == target) + torch.log1p((-hinted).exp() * math.expm1(boost))
    return torch.where(hint >= 0, tilted, nats)


# ----------------------------------------------------------------------------------------------------------------------
# 15. SCORING - one scorer; full windows, sliding windows and test-time training are schedules over it. The ledger
#     makes the contest's conditions hold by construction: it knows what was scored, and refuses what may not follow.
# ----------------------------------------------------------------------------------------------------------------------


class Violation(RuntimeError):
    """An attempt to score or learn in an order that the contest forbids."""


def positions(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """All positions of spans [begin, end), one span after the other."""
    return np.concatenate([np.arange(b, e) for b, e in zip(begin, end)])


class Ledger:
    """Positions are targets in stream order; `when` is the moment at which each was scored, -1 for not yet.

    C1 causality is the model's (tests flip future tokens); here C2 full normalised distribution, C3 score before
    learning, C4 each token once, every sequence from left to right (issue #1017 of the contest). Moments are the one
    order: what is learned at a moment can only act on later ones, so one sequential decoder could do the same. Slots of
    one phase do not see each other, so groups of them may run one after the other: each score is booked at its planned moment.
    """

    def __init__(self, targets: int):
        self.when, self.now = np.full(targets, -1, np.int32), 0
        self.targets, self.learned, self.mass_error, self.sampled = targets, 0, 0.0, 0
        self.planned, self.relied = None, -1  # the moments that counts were promised, and the latest of which one was read

    def score(self, windows: np.ndarray, moment: int | np.ndarray | None = None) -> None:
        """Book windows [n, 3] (start, end, first scored) before their forward pass, in stream order, at the next moment or at one that is
        given, for all positions or by position [targets]."""
        start, end, begin = windows.T
        if start.min() < 0 or (start > begin).any() or (begin >= end).any() or end.max() > self.targets:
            raise Violation("a window scores what it does not read, or tokens that do not exist")
        at = positions(begin, end)
        again = self.when[at] >= 0
        again[1:] |= np.diff(at) <= 0  # overlapping or backward windows of one batch
        if again.any():
            raise Violation(f"position {int(at[np.argmax(again)])} would be scored a second time or out of order")
        self.when[at] = self.now if moment is None else moment[at] if isinstance(moment, np.ndarray) else moment
        # what a window reads of its sequence before its own part must have its score
        before = self.when[begin - 1]
        skipped = (start < begin) & ((before < 0) | (before > self.when[begin]))
        if skipped.any():
            raise Violation(f"positions before {int(begin[np.argmax(skipped)])} would be skipped")
        self.now = max(self.now, int(self.when[at].max()) + 1)

    def learn(self, begin: int | np.ndarray, end: int | np.ndarray, moment: int | None = None) -> None:
        """Book training on targets [begin, end), one span or many, at the end of a moment (of all so far): each must have its score by then."""
        latest = self.now - 1 if moment is None else moment
        for b, e in zip(np.atleast_1d(begin), np.atleast_1d(end)):
            if not 0 <= b < e <= self.targets or (self.when[b:e] < 0).any() or (self.when[b:e] > latest).any():
                raise Violation(f"training on position {int(e) - 1} before it is scored (its span begins at {int(b)})")
            self.learned += int(e - b)

    def rely(self, moments: np.ndarray, planned: np.ndarray, moment: int | None = None) -> None:
        """Book that the score of a moment (the next) reads counts up to these moments, in an order that was planned as `planned`."""
        now, latest = self.now if moment is None else moment, int(moments.max(initial=-1))
        if latest >= now or (planned != now).any():
            raise Violation(f"counts of moment {latest} would be read at moment {now}, which was planned as {np.unique(planned)[:3]}")
        self.relied = max(self.relied, latest)

    def check_mass(self, logits: Tensor, targets: Tensor, nll: Tensor, most: float = 1e-2) -> None:
        """For sampled rows [n, V]: the probabilities sum to 1, and the score is this distribution's."""
        p = logits.double().softmax(-1)  # the whole vocabulary, in fp64
        wrong = (p.gather(-1, targets[:, None]).log().squeeze(-1) + nll.double()).abs()
        self.mass_error = max(float(torch.maximum((p.sum(-1) - 1).abs(), wrong).max()), self.mass_error)
        self.sampled += len(targets)
        if not float(wrong.max()) <= most:  # NaN is none
            raise Violation(f"a score is {float(wrong.max()):.3g} nats away from the model's normalised distribution")

    def verdict(self) -> str:
        """One line; Violation if tokens were left out."""
        missing = int((self.when < 0).sum())
        if missing:
            raise Violation(f"{missing} of {self.targets} tokens were never scored")
        late = 0 if self.planned is None else int(((self.planned <= self.relied) & (self.planned >= 0) & (self.when != self.planned)).sum())
        if late:
            raise Violation(f"counts were read of {late} tokens that were not scored at the moment they were planned for")
        return (f"each of {self.targets} tokens scored once, left to right; {self.learned} trained on, each after its "
                f"score; full distribution checked at {self.sampled} positions (largest error {self.mass_error:.1e})")


class Score(NamedTuple):
    """Result of one pass: nats a token, bits a byte, seconds, the ledger's line, nats of every target [N] fp64, tokens that were trained on
    and that counting had a hint for."""
    val_loss: float
    val_bpb: float
    seconds: float
    verdict: str
    nats: np.ndarray
    learned: int = 0
    hinted: int = 0

    def facts(self) -> dict:
        """What belongs into a log."""
        return {k: v for k, v in self._asdict().items() if k != "nats"}


def make_windows(sequences: np.ndarray, length: int, stride: int) -> np.ndarray:
    """Windows [n, 3] = (start, end, first scored) of input positions; every position of every sequence scored once.

    In a sequence, windows start every `stride`; the first scores all of itself, a later one its last `stride`, cut at
    the end. No window is made whose scored part would be empty. stride == length: plain windows side by side.
    """
    rows = []
    for a, b in sequences:
        starts = np.arange(a, max(b - (length - stride), a + 1), stride)  # the last window still has something to score
        first = np.where(starts == a, a, starts + length - stride)  # a document's start is scored with what there is
        rows.append(np.stack([starts, np.minimum(starts + length, b), first], 1))
    return np.concatenate(rows)


class Scorer:
    """Drives a model over windows: packs them into flat rows, spreads rows over ranks, keeps every token's nats."""

    def __init__(self, model: GPT, val: ValidationSet, cfg: Config, run: Run):
        self.model, self.val, self.cfg, self.run = model, val, cfg, run
        self.length, self.row_tokens = cfg.eval_seq_len, cfg.val_batch_tokens
        # static shapes where compiled code and kernels want them, exact ones elsewhere
        self.room = 256 * math.ceil(4 * self.row_tokens / self.length / 256) if run.gpu else 0
        self.most = self.room - math.ceil(self.row_tokens / self.length) if self.room else self.row_tokens
        self.ledger = Ledger(val.targets)
        self.nll = torch.zeros(val.targets, device=run.device)
        self.start = self.told = run.clock.read()
        self.hints: Hints | None = None
        self.hinted = 0

    def rows(self, windows: np.ndarray) -> Iterator[np.ndarray]:
        """Consecutive windows that fit into one flat row."""
        first, used = 0, 0
        for i, size in enumerate(windows[:, 1] - windows[:, 0]):
            if i > first and (used + size > self.row_tokens or i - first >= self.most):
                yield windows[first:i]
                first, used = i, 0
            used += size
        yield windows[first:]

    def batch(self, windows: np.ndarray) -> Batch:
        """Windows as segments of one row; on a GPU filled up with padding segments."""
        at, sizes = positions(windows[:, 0], windows[:, 1]), windows[:, 1] - windows[:, 0]
        pad = self.row_tokens - len(at) if self.room else 0  # padding tokens sit in segments of their own
        sizes = np.concatenate([sizes, np.diff(np.append(np.arange(0, pad, self.length), pad))])
        tokens = np.pad(self.val.tokens[at], (0, pad)), np.pad(self.val.tokens[at + 1], (0, pad))
        cu = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        return make_batch(*tokens, cu, self.length, self.run, self.room)

    @torch.no_grad()
    def score(self, windows: np.ndarray, moment: np.ndarray | None = None) -> None:
        """Score windows with the model as it is now, booked at the next moment, or by position at `moment` [N]. Rows do not depend on the
        number of ranks, so scores do not."""
        self.rely_on_hints(windows[:, 2], windows[:, 1])
        self.ledger.score(windows, moment)
        for i, part in enumerate(self.rows(windows)):
            if i % self.run.world != self.run.rank:  # rows are the unit of work between ranks
                continue
            batch = self.batch(part)
            sizes = part[:, 1] - part[:, 0]
            place = np.cumsum(sizes) - sizes - part[:, 0]  # from a position of the stream to its row in this batch
            scored = positions(part[:, 2], part[:, 1])
            rows = scored + np.repeat(place, part[:, 1] - part[:, 2])
            at, rows = (torch.from_numpy(x).to(self.run.device) for x in (scored, rows))
            hint = self.hint_rows(len(batch.ids), at, rows)
            asked = batch._replace(targets=with_hint(batch.targets, hint))
            nll = self.tilted(self.model.nll(*asked), hint, batch.targets)
            if i == 0:
                self.sample_mass(batch, nll, hint)
            self.nll[at] = nll[rows]

    def sample_mass(self, batch: Batch, nll: Tensor, hint: Tensor | None, count: int = 64) -> None:
        """Show the ledger full distributions at the row's first positions, by the uncompiled head."""
        h = self.model.hidden(batch.ids, batch.pos, batch.cu, batch.longest)[:count]
        logits = self.model.head(h, None, self.model.input.tok_emb.weight)
        if hint is not None:
            logits = tilt_logits(logits, hint[:count], self.cfg.ngram_tilt_boost)
        self.ledger.check_mass(logits, batch.targets[:count], nll[:count])

    def plan_hints(self, moment: np.ndarray) -> None:
        """Decide all hints for a pass whose every position is scored at a known moment [N] (-1: not at all)."""
        if not self.cfg.ngram_tilt_boost:
            return
        when = torch.from_numpy(moment.astype(np.int64)).to(self.run.device)
        self.hints = find_hints(self.tokens, when, self.cfg.ngram_tilt_order, self.cfg.ngram_tilt_threshold)
        self.rests_on, self.planned = self.hints.rests_on.cpu().numpy(), moment
        self.ledger.planned = moment
        self.check_hints(when, 1000 if self.run.gpu else 16)
        share = float((self.hints.token >= 0).double().mean())
        self.run.log(f"ngram_tilt: {share:.2%} of {len(moment)} targets hinted, "
                     f"{float((self.hints.token == self.tokens[1:]).double().mean()) / max(share, 1e-12):.1%} of these rightly")
        self.hinted = int((self.hints.token >= 0).sum())

    def check_hints(self, when: Tensor, count: int) -> None:
        """Hints at positions spread over the pass, by their definition: compare whole contexts, look at earlier moments only."""
        place = places(self.tokens)
        for at in np.linspace(0, len(when) - 1, count).astype(int).tolist():  # fp64: fp32 cannot count to 47 million
            expected = hint_by_definition(self.tokens, when, self.cfg.ngram_tilt_order, self.cfg.ngram_tilt_threshold, at, place)
            if int(self.hints.token[at]) != expected:
                raise Violation(f"the hint at position {at} is not what earlier moments say: {int(self.hints.token[at])}, "
                                f"not {expected}")

    def rely_on_hints(self, begin: np.ndarray, end: np.ndarray, moment: int | None = None) -> None:
        """Tell the ledger what the hints of these spans rest on, for a score at this moment (the next)."""
        if self.hints is not None:
            at = positions(begin, end)
            self.ledger.rely(self.rests_on[at], self.planned[at], moment)

    def hint_rows(self, count: int, at: Tensor, rows: Tensor) -> Tensor | None:
        """Hints of a flat row [T], -1 where a position is only context; None in a pass without hints."""
        if self.hints is None:
            return None
        hint = torch.full((count,), -1, device=at.device)
        hint[rows] = self.hints.token[at]
        return hint

    def tilted(self, nats: Tensor, hint: Tensor | None, target: Tensor) -> Tensor:
        """The nats that count: [T] as they are, or [T, 2] (target, hint) tilted."""
        return nats if hint is None else tilt(nats[:, 0], nats[:, 1], hint, target, self.cfg.ngram_tilt_boost)

    @functools.cached_property
    def sizes(self) -> Tensor:
        """Bytes of every target [N] fp32 on the device, for progress lines."""
        return torch.from_numpy(self.val.bytes.astype(np.float32)).to(self.run.device)

    @functools.cached_property
    def tokens(self) -> Tensor:
        """All validation tokens [N + 1] int64 on the device."""
        return torch.from_numpy(self.val.tokens.astype(np.int64)).to(self.run.device)

    def mix(self) -> None:
        """Replace the scores by the hedged mixture's: expert 0 is what was scored, the others count (MIXER)."""
        # moments as they were booked, not as they were planned: a pass cut short by its budget mixes soundly too
        moment = torch.from_numpy(self.ledger.when.astype(np.int64)).to(self.run.device)
        nats = expert_nats(self.tokens, moment, self.cfg.mixer, self.cfg.vocab_size)
        for at in np.linspace(0, self.val.targets - 1, 8).astype(int).tolist():  # sampled: each looks at all tokens
            for letter, row in zip(self.cfg.mixer, nats):  # the definition, over the whole vocabulary
                p = expert_distribution(self.tokens, moment, letter, self.cfg.vocab_size, at)
                if abs(float(p.sum()) - 1) > 1e-9:
                    raise Violation(f"expert {letter} gives the vocabulary a mass of {float(p.sum()):.6f} at position {at}")
                self.ledger.check_mass(p.log()[None], self.tokens[at + 1:at + 2], row[at:at + 1], 1e-6)
        self.nll = hedge(torch.cat((self.nll.double()[None], nats)), moment, self.cfg.mixer_eta)

    def report(self, done: int, what: str, nll: Tensor) -> None:
        """Every ten seconds, from this rank's nats so far [N] (0: not scored): running bpb of its share, tokens a second over all
        ranks, time left."""
        now = self.run.clock.read()
        if not self.run.main or now - self.told < 10:  # it waits for the device queue: nobody else need do so
            return
        self.told, seconds = now, now - self.start
        bpb = float(nll.double().sum()) / math.log(2) / max(float(self.sizes[nll != 0].sum()), 1)
        left = seconds * (self.val.targets - done) / max(done, 1)
        self.run.log(f"{what} tokens:{done}/{self.val.targets} running_bpb:{bpb:.4f} tok/s:{done / seconds:.0f} "
                     f"time:{seconds:.1f}s left:{left:.0f}s")

    def result(self, mixed: bool = False) -> Score:
        """Sums in fp64, in one order on every rank. bpb = nats / ln 2 / bytes of text."""
        self.ledger.verdict()  # stops here if tokens were left out
        self.nll = self.run.sum_(self.nll)  # every rank holds zeros where others scored
        if mixed and self.cfg.mixer:
            self.mix()
        nats, size = self.nll.double().cpu().numpy(), float(self.val.bytes.sum())
        total, seconds = float(nats.sum()), self.run.clock.read() - self.start
        return Score(total / self.val.targets, total / math.log(2) / size, seconds, self.ledger.verdict(), nats, self.ledger.learned, self.hinted)


def score_windows(model: GPT, val: ValidationSet, cfg: Config, run: Run, stride: int) -> Score:
    """Score with fixed weights: full windows (stride = window) or sliding ones."""
    scorer = Scorer(model, val, cfg, run)
    scorer.score(make_windows(val.sequences, cfg.eval_seq_len, stride))
    return scorer.result()


# ----------------------------------------------------------------------------------------------------------------------
# 16. ADAPTATION - test-time training: objects that the scorer drives. What is scored at one moment may change the model,
#     adapters or counts only for later moments of one order, which is fixed by lengths and positions before scoring.
# ----------------------------------------------------------------------------------------------------------------------


class Adapter:
    """Full-parameter test-time training: after tokens have their scores, a few epochs of SGD or AdamW on them."""
    ROWS = 8  # a step is the sum of so many forward passes (fewer if windows are longer), so 1 to 8 ranks do the same sums

    def __init__(self, model: GPT, val: ValidationSet, cfg: Config, run: Run, ledger: Ledger):
        self.model, self.val, self.cfg, self.run, self.ledger = model, val, cfg, run, ledger
        self.order = np.arange(val.targets)  # positions in the order in which they are learned
        chosen = adapted_names(model, cfg)
        self.params = [p for n, p in model.named_parameters() if n in chosen]
        self.others_rest = learning_only(model, chosen)
        self.saved = [p.detach().clone() for p in self.params]  # the artifact's weights come back afterwards
        # Polyak: scores read an average of the weights, training goes on from the weights themselves
        self.average = [p.detach().clone() for p in self.params] if cfg.ttt_polyak else []
        self.optimizer = (torch.optim.SGD(self.params, cfg.ttt_lr, cfg.ttt_momentum) if cfg.ttt_optimizer == "sgd" else
                          torch.optim.AdamW(self.params, cfg.ttt_lr, weight_decay=0.0))
        self.room = 64  # segments that a row has room for on a GPU

    def __enter__(self):
        self.others_rest.__enter__()
        self.rows = RowGradients(self.model, self.params, self.run)
        return self

    def __exit__(self, *error):
        """Give the model back as it was, and the recorded rows' memory."""
        self.rows.free()
        self.others_rest.__exit__(*error)
        for p, s in zip(self.params, self.saved):
            p.data.copy_(s)

    def learn(self, begin: int, end: int, lr: float) -> None:
        """Train on positions order[begin:end], in steps of TTT_BATCH_TOKENS over all ranks."""
        self.book(begin, end)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.swap()
        for _ in range(self.cfg.ttt_epochs):
            for at in range(begin, end, self.cfg.ttt_batch_tokens):
                self.step(at, min(at + self.cfg.ttt_batch_tokens, end))
                for mean, p in zip(self.average, self.params):
                    mean.lerp_(p.detach(), 1 - self.cfg.ttt_polyak)
        self.swap()

    def book(self, begin: int, end: int) -> None:
        """Tell the ledger: runs of consecutive positions as spans."""
        at = self.order[max(begin, 0):end]
        cuts = np.flatnonzero(np.diff(at) != 1) + 1
        first, last = np.append(0, cuts), np.append(cuts, len(at))
        if len(at) != end - begin:
            raise Violation(f"training on position {end - 1} before it is scored (its span begins at {begin})")
        self.ledger.learn(at[first], at[last - 1] + 1)

    def swap(self) -> None:
        """Exchange weights and their average."""
        for mean, p in zip(self.average, self.params):
            kept = p.detach().clone()
            p.data.copy_(mean)
            mean.copy_(kept)

    def step(self, begin: int, end: int) -> None:
        """One step on order[begin:end]. Rows are dealt to ranks; a short one is padded and masked."""
        # as many rows on one rank as on eight: the same products in the same shapes, so the same digits
        width = min(max(self.cfg.eval_seq_len, self.cfg.ttt_batch_tokens // self.ROWS), self.cfg.ttt_batch_tokens)
        torch._foreach_zero_(self.rows.grads)
        at = self.order[begin:end]
        weight = self.val.bytes[at] if self.cfg.ttt_byte_weighted else np.ones(len(at))
        for i, first in enumerate(range(0, len(at), width)):
            if i % self.run.world == self.run.rank:
                self.accumulate(at[first:first + width], weight[first:first + width] / max(weight.sum(), 1), width)
        self.run.sum_all_(self.rows.grads)  # a rank without a row adds nothing
        if self.cfg.ttt_grad_clip:
            torch.nn.utils.clip_grad_norm_(self.params, self.cfg.ttt_grad_clip)
        self.optimizer.step()

    def accumulate(self, at: np.ndarray, weight: np.ndarray, width: int) -> None:
        """Gradient of sum(weight * nats) over positions `at`, as one row of `width` tokens."""
        pad = width - len(at)
        ids, targets = (np.pad(self.val.tokens[x], (0, pad)) for x in (at, at + 1))
        pieces = np.arange(0, width, min(self.cfg.eval_seq_len, width))  # never longer than a window
        # a document that is not followed by its own next token ends here, whether or not documents see each other
        jumps = np.flatnonzero(np.diff(at) != 1) + 1
        cu = cut_segments(ids, np.union1d(pieces, jumps), self.cfg.eval_seq_len, self.val.isolate)
        # a static number of segments on a GPU: a document every 32 tokens, or what a row has needed so far
        self.room = max(self.room, width // 32, len(cu) - 1)
        batch = make_batch(ids, targets, cu, self.cfg.eval_seq_len, self.run, self.room if self.run.gpu else 0)
        mask = torch.from_numpy(np.pad(weight, (0, pad)).astype(np.float32)).to(self.run.device)  # padding earns no gradient
        self.rows.add(batch, mask)


def group_chunks(windows: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Consecutive windows in chunks that end at the first window past each multiple of `tokens`."""
    scored = np.cumsum(windows[:, 1] - windows[:, 2])  # tokens scored up to each window
    cuts = np.searchsorted(scored, np.arange(tokens, scored[-1], tokens)) + 1
    return [c for c in np.split(windows, np.unique(cuts)) if len(c)]


def budget_is_short(cfg: Config, run: Run, reserve: float) -> bool:
    """Whether adaptation must stop, so that `reserve` seconds of EVAL_WALLCLOCK_SECONDS are left for plain scoring."""
    run.clock.sync()  # the device queue is far behind the host's clock
    # clock and reserve are rank 0's: ranks that do not stop together wait for each other forever
    return cfg.eval_wallclock_seconds > 0 and run.agree(run.clock.read(*EVAL_SPANS) + reserve) > cfg.eval_wallclock_seconds


def score_adapting(model: GPT, val: ValidationSet, cfg: Config, run: Run, reserve: float = 0.0) -> Score:
    """Score-first test-time training: score a chunk with sliding windows, then train on it; the last is only scored.

    Runs with deterministic kernels, so that MODE=eval gives the same digits again. TTT_METHOD=none: only counts learn.
    """
    scorer = Scorer(model, val, cfg, run)
    chunks = group_chunks(make_windows(val.sequences, cfg.eval_seq_len, cfg.eval_stride), cfg.ttt_chunk_tokens)
    moment = np.full(val.targets, -1, np.int32)
    for i, chunk in enumerate(chunks):  # a chunk is a moment
        moment[positions(chunk[:, 2], chunk[:, 1]).clip(0, val.targets - 1)] = i
    scorer.plan_hints(moment)
    learning = cfg.ttt_method == "chunk"
    with deterministic(cfg), Adapter(model, val, cfg, run, scorer.ledger) as adapter:
        for i, chunk in enumerate(chunks):
            scorer.score(chunk)
            if learning and budget_is_short(cfg, run, reserve * (len(chunks) - i) / len(chunks)):
                learning = False
                run.warn(f"evaluation budget: the last {len(chunks) - i - 1} of {len(chunks)} chunks are scored without adapting")
            if learning and i + 1 < len(chunks):
                adapter.learn(int(chunk[0, 2]), int(chunk[-1, 1]), cfg.ttt_lr * cosine_to_zero(i, len(chunks)))
            scorer.report(int(chunk[-1, 1]), f"ttt_chunk [{i + 1}/{len(chunks)}]", scorer.nll)
    return scorer.result(mixed=True)


class Step(NamedTuple):
    """One lock step of all slots, in target positions: document's start, begin, end (== begin: idle), more to come."""
    doc: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    more: np.ndarray


def slot_schedule(spans: np.ndarray, slots: int, chunk: int) -> list[Step]:
    """Documents over slots, longest first to the least loaded, each cut into chunks: fixed by lengths alone.

    Slots are in falling order of load, so that those still working are always the first ones.
    """
    loads, queues = [(0, s) for s in range(slots)], [[] for _ in range(slots)]
    lengths = spans[:, 1] - spans[:, 0]
    for d in np.argsort(-lengths, kind="stable"):
        load, s = heapq.heappop(loads)  # ties go to the lower slot, so the schedule is one
        queues[s].append(d)
        heapq.heappush(loads, (load - (-lengths[d] // chunk), s))
    steps = max(load for load, _ in loads)
    table = np.zeros((4, steps, slots), np.int64)
    for s, (load, which) in enumerate(sorted(loads, key=lambda x: (-x[0], x[1]))):
        at = 0
        for d in queues[which]:
            a, b = spans[d]
            begins = np.arange(a, b, chunk)
            table[:, at:at + len(begins), s] = np.stack(
                (np.full_like(begins, a), begins, np.minimum(begins + chunk, b), begins + chunk < b))
            at += len(begins)
    return [Step(*table[:, t]) for t in range(steps)]


def slot_count(spans: np.ndarray, cfg: Config) -> int:
    """TTT_SLOTS, or a power of two near one slot for 40 documents: few enough that A warms up, enough to fill 8 GPUs."""
    return cfg.ttt_slots or min(512, max(8, 1 << int(math.log2(max(len(spans) / 40, 1)))))


class Phase(NamedTuple):
    """Lock steps one after the other, and the documents [k, 2] from which the network itself then learns."""
    steps: list[Step]
    learned: np.ndarray


def document_plan(spans: np.ndarray, cfg: Config) -> list[Phase]:
    """The one order of all adaptive state, from lengths alone: PHASED_TTT_PLAN's phases, longest documents first. spans [n, 2]"""
    lengths, count = spans[:, 1] - spans[:, 0], cfg.phased_ttt_num_phases
    order, halving = np.argsort(-lengths, kind="stable"), cfg.phased_ttt_plan == "halving"
    if halving:
        # what fits in a window first: it fills all slots evenly, and the longest documents find a network that has learned
        order, cuts = order[np.argsort(lengths[order] > cfg.eval_seq_len, kind="stable")], {len(spans) >> k + 1 for k in range(count)}
    else:
        cuts = {(cfg.phased_ttt_prefix_docs or len(spans) // 20) * (k + 1) // count for k in range(count)}
    phases, ends = [], [*sorted(c for c in cuts if 0 < c < len(order)), len(order)]
    for begin, end in zip([0, *ends], ends):
        docs = order[begin:end]
        # in stream order: the schedule breaks ties by it
        steps = slot_schedule(spans[np.sort(docs)], slot_count(spans, cfg), cfg.ttt_chunk_size)
        phases.append(Phase(steps, spans[docs if halving else order[:end]]))
    return phases


def planned_moments(plan: list[Phase], targets: int) -> np.ndarray:
    """The moment at which each target is to be scored: [N]."""
    when, steps = np.full(targets, -1, np.int32), [step for phase in plan for step in phase.steps]
    for moment, step in enumerate(steps):
        for a, b in zip(step.begin, step.end):
            when[a:b] = moment
    return when


def slot_bytes(cfg: Config, run: Run) -> int:
    """About what a slot takes on the device: keys and values, adapters with their optimiser's state, and a step's activations."""
    visits, width = cfg.num_layers + cfg.num_loops * (cfg.loop_end - cfg.loop_start + 1), 2 if run.gpu else 4
    heads = {"q": cfg.num_heads * cfg.head_dim, "k": cfg.num_kv_heads * cfg.head_dim, "v": cfg.num_kv_heads * cfg.head_dim, "o": cfg.model_dim,
             "m": cfg.model_dim}
    out = sum(visits * heads[c] + visits * cfg.model_dim for c in cfg.ttt_lora_sites if c != "h")
    out += (cfg.vocab_size + cfg.model_dim) * ("h" in cfg.ttt_lora_sites)
    ring = 2 * visits * (cfg.eval_seq_len if cfg.ttt_cache == "keep" else 0) * cfg.num_kv_heads * cfg.head_dim * width
    rows = cfg.ttt_chunk_size if cfg.ttt_cache == "keep" else cfg.eval_seq_len
    states = 3 if cfg.ttt_beta1 else 2
    # eagerly, a token of a visit keeps about 3 hidden rows and 24 of the stream's width; logits are fp32, six times over
    step = rows * (visits * (3 * cfg.hidden_dim + 24 * cfg.model_dim) * width + 24 * cfg.vocab_size)
    return ring + out * cfg.ttt_lora_rank * (4 * states + 3 * width) + step


def slot_groups(cfg: Config, run: Run, slots: int) -> int:
    """Groups in which a rank's slots take turns, so that each fits into the memory that is free. Only rounding depends on it."""
    fit = 0.85 * run.free_bytes() / slot_bytes(cfg, run)
    return next((g for g in range(1, slots) if -(-slots // g) <= fit), max(slots, 1))


def adapter_sites(model: GPT, cfg: Config) -> list[tuple[int, str, Tensor]]:
    """(visit, field of VisitAdapters or HeadAdapters, scale of each output) of every adapter; visit -1 is the head."""
    queries, keys = (torch.ones(n * cfg.head_dim) for n in (cfg.num_heads, cfg.num_kv_heads))
    found = []
    for i, visit in enumerate(model.plans[1]):
        block = model.blocks[visit.layer]
        scales = {"q": queries, "k": keys, "v": keys, "o": block.attn.o.scale, "m": block.mlp.down.scale}
        found += [(i, c, scales[c].detach().cpu()) for c in cfg.ttt_lora_sites if c != "h"]
    return found + ([(-1, "low", torch.ones(cfg.vocab_size))] if "h" in cfg.ttt_lora_sites else [])


class Slots:
    """Adapters, their optimiser state and the cached past of this rank's document slots.

    All adapters of a slot are one row of `theta`, so that an optimiser step is a few kernels over a matrix.
    """
    SPARE = 8  # cells behind the ring for what must not be kept; eight keep rows of the mask aligned
    CAP_SCALE = 100.0  # a softcap moves this many times a weight's step: it is a number near 30

    def __init__(self, model: GPT, cfg: Config, run: Run, count: int):
        self.cfg = cfg
        self.sites, self.window = adapter_sites(model, cfg), cfg.eval_seq_len
        rank, into, rng, parts = cfg.ttt_lora_rank, cfg.model_dim, torch.Generator().manual_seed(cfg.seed), []
        for _, _, scale in self.sites:  # start, whether it outlives a document, what a unit of theta stands for
            a = (2 * torch.rand(rank * into, generator=rng) - 1) / math.sqrt(into)
            # its size alone: AdamW is blind to constant factors, and would go the wrong way where one is negative
            b = (scale.abs() * cfg.ttt_lora_alpha / rank).repeat(rank)
            parts += [(a, torch.full_like(a, cfg.ttt_warm_start_a, dtype=torch.bool), torch.ones_like(a)),
                      (torch.zeros_like(b), torch.zeros_like(b, dtype=torch.bool), b)]
        extra = 2 * cfg.ttt_asym_logit  # softcaps are kept like A
        extra += -(sum(len(x) for x, *_ in parts) + extra) % 64  # rows start at whole cache lines: matrix units want aligned strides
        parts.append(tuple(torch.full((extra,), x) for x in (0.0, cfg.ttt_warm_start_a, self.CAP_SCALE)))
        self.sizes = [len(x) for x, *_ in parts]
        # one row: all slots and all ranks start alike
        self.start, self.kept, self.scale = (torch.cat(x).to(run.device) for x in zip(*parts))
        self.theta = self.start.repeat(count, 1)
        self.first = torch.zeros_like(self.theta) if cfg.ttt_beta1 else None
        self.second, self.steps = torch.zeros_like(self.theta), torch.zeros(count, 1, device=run.device)
        cells = count, (self.window if cfg.ttt_cache == "keep" else 0) + self.SPARE, cfg.num_kv_heads, cfg.head_dim
        self.past = torch.zeros(2 * len(model.plans[1]), *cells, device=run.device, dtype=run.dtype)  # a visit's keys, its values, ...
        self.renew = model.renew

    def begin(self, which: Tensor) -> None:
        """Slots, by number, that take up a new document: adapters back to their start, optimiser empty. (So is the ring: a
        document's positions begin at 0, and cells at or beyond the position are not read.)"""
        self.theta[which] = torch.where(self.kept, self.theta[which], self.start)
        for state in (self.first, self.second, self.steps):
            if state is not None:
                state[which] = 0.0

    def memory(self, theta: Tensor, begin: Tensor, lead: int) -> Memory:
        """The model's view of the first n slots: adapters cut out of scaled theta [n, P], and the past before begin [n]."""
        n = len(theta)
        *pairs, extra = theta.split(self.sizes, 1)
        made: dict[int, dict] = {}
        for (visit, field_, scale), a, b in zip(self.sites, pairs[::2], pairs[1::2]):
            made.setdefault(visit, {})[field_] = a.unflatten(1, (self.cfg.model_dim, -1)), b.unflatten(1, (-1, len(scale)))
        caps = self.cfg.logit_softcap + extra[:, :2].float() if self.cfg.ttt_asym_logit else None
        head = HeadAdapters(**made.pop(-1, {}), caps=caps)
        past = [Past(k[:n], v[:n], begin, k.shape[1] - self.SPARE) for k, v in zip(self.past[::2], self.past[1::2])]
        return Memory([VisitAdapters(**made.get(i, {})) for i in range(len(past))], past, head, n, lead, [])

    @torch.no_grad()
    def remember(self, memory: Memory, pos: Tensor, real: Tensor) -> None:
        """Store the new keys and values [n C, K, E] in a ring over positions; what is not real goes to the spare cell."""
        n, ring = pos.shape[0], memory.past[0].window
        cell = torch.where(real, pos % max(ring, 1), ring)
        row = torch.arange(n, device=pos.device)[:, None].expand_as(cell)
        self.past[:, row, cell] = torch.stack([x.unflatten(0, (n, -1)) for pair in memory.kept for x in pair])

    @torch.no_grad()
    def learn(self, grad: Tensor, learns: Tensor) -> None:
        """AdamW on the first n rows; a slot that has no later chunk does not move. grad [n, P], learns [n] bool

        The gradient is of scaled theta: AdamW's steps do not see a constant factor.
        """
        n, c = len(grad), self.cfg
        self.steps[:n] += learns[:, None]
        self.renew(self.theta[:n], grad, self.first[:n] if c.ttt_beta1 else None, self.second[:n], self.steps[:n],
                   learns[:, None], c.ttt_lora_lr, c.ttt_beta1, c.ttt_beta2, c.ttt_weight_decay)


class DocumentScorer:
    """Per-document low-rank adaptation in lock step: every slot's chunk is scored, then its adapters learn from it."""

    def __init__(self, model: GPT, val: ValidationSet, cfg: Config, run: Run):
        self.scorer, self.model, self.val, self.cfg, self.run = Scorer(model, val, cfg, run), model, val, cfg, run
        self.plan = document_plan(val.sequences, cfg)
        self.planned = planned_moments(self.plan, val.targets)
        self.scorer.plan_hints(self.planned)
        count = slot_count(val.sequences, cfg)
        self.groups = slot_groups(cfg, run, -(-count // run.world))
        # a group is to a rank what a rank is to the world; loads fall, so both stay even
        self.members = [np.arange(run.rank + run.world * g, count, run.world * self.groups) for g in range(self.groups)]
        self.group = np.arange(count) // run.world % self.groups  # of every slot
        self.count = len(self.members[0])
        self.slots = Slots(model, cfg, run, self.count)
        self.at, self.rest = None, [None] * self.groups  # the group whose adapters the slots hold, and those of the others, on the host
        # one more token and hint, so that padding may look one past the end
        self.tokens = torch.cat((self.scorer.tokens, self.scorer.tokens[:1]))
        self.hints = F.pad(self.scorer.hints.token, (0, 1), value=-1) if self.scorer.hints is not None else None
        self.nll = torch.zeros(val.targets + 1, device=run.device)  # the last cell takes what padding would write
        # casting at every visit was some 5 % of a small step (profile on an H200)
        self.copies = [torch.empty_like(p, dtype=run.dtype) for p in model.parameters()]
        self.lead = 3  # a smear looks back one token, and that one's triple hash two more
        self.done, self.units, self.pool = 0, {}, torch.cuda.graph_pool_handle() if run.gpu else None

    def run_steps(self, steps: list[Step], first: int, give_up: Callable[[], bool]) -> bool:
        """All documents of a phase, whose first moment is `first`, group by group: slots do not see each other, and hints rest on what the
        moments say. False when time is up."""
        for group in range(self.groups):
            self.take_up(group)
            for t, step in enumerate(steps):
                if t % 16 == 0 and give_up():
                    return False
                busy = (step.end > step.begin) & (self.group == group)
                if not busy.any():
                    break  # the schedule's slots are in falling order of load
                self.book(step, busy, first + t)
                own = self.members[group]  # the last groups may have a slot less, which is idle
                self.step(Step(*(np.pad(x[own], (0, self.count - len(own))) for x in step)), sample=t % 16 == 0)
                self.done += int((step.end - step.begin)[busy].sum())
                self.scorer.report(self.done, f"ttt_lora step:{t + 1}/{len(steps)} slots:{int(busy.sum())}", self.nll[:-1])
        return True

    def take_up(self, group: int) -> None:
        """Put another group's adapters into the slots: what a slot keeps from one document to the next is its own."""
        if self.groups == 1:
            return
        if self.at is not None:
            self.rest[self.at] = self.slots.theta.to("cpu", copy=True)
        known = self.rest[group]
        self.slots.theta.copy_(self.slots.start if known is None else known)  # the rest is reset where a document begins
        self.at, self.rest[group] = group, None

    def book(self, step: Step, busy: np.ndarray, moment: int) -> None:
        """Tell the ledger what this moment scores and then learns in these slots, on all ranks."""
        self.scorer.rely_on_hints(step.begin[busy], step.end[busy], moment)
        first = np.maximum(step.doc, step.begin - 1)  # it reads more, but if its predecessor is scored, so is all before
        spans = np.stack([first, step.end, step.begin], 1)[busy]
        self.scorer.ledger.score(spans[spans[:, 2].argsort()], moment)  # one moment: documents do not see each other
        learns = busy & step.more.astype(bool)
        self.scorer.ledger.learn(step.begin[learns], step.end[learns], moment)

    def step(self, step: Step, sample: bool = False) -> None:
        """Score one chunk a slot and learn from it; idle slots at the end are left out."""
        busy = int(np.count_nonzero(step.end > step.begin))
        if not busy:
            return
        n = min(self.count, max(8, 1 << (busy - 1).bit_length()))  # few batch sizes: each is recorded once
        if n not in self.units:  # a recorded step is good for one shape
            inputs = torch.zeros(4, n, dtype=torch.int64, device=self.run.device)
            self.units[n] = inputs, Replay(DocumentScorer.advance, self.pool)
        fresh = np.flatnonzero((step.begin == step.doc) & (step.end > step.begin))
        if len(fresh):  # not in what is recorded: few rows of many
            self.slots.begin(*self.run.place([torch.from_numpy(fresh)]))
        inputs, unit = self.units[n]
        inputs.copy_(*self.run.place([torch.from_numpy(np.stack([x[:n] for x in step]))]))
        logits, target, nats = unit(self, inputs)
        if sample:  # slot 0's whole distributions, adapters included, by the uncompiled head
            real = int(step.end[0] - step.begin[0])
            self.scorer.ledger.check_mass(logits[:real], target[:real], nats[:real])

    def advance(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The device's part of a step, without a look at the host: score, then learn. -> slot 0's logits, targets, nats"""
        doc, begin, end, more = inputs[..., None].unbind()
        n, chunk, keep = len(doc), self.cfg.ttt_chunk_size, self.cfg.ttt_cache == "keep"
        # rows: lead tokens, then the chunk; recomputing puts the whole window before it
        back = 0 if keep else self.cfg.eval_seq_len - chunk
        index = begin + torch.arange(-self.lead - back, chunk, device=self.run.device)
        pos, ids = (index - doc).clamp_min(0), self.tokens[index.clamp(0, self.val.targets)]
        ids = torch.where((index >= doc) & (index < end), ids, BOS)
        inner = index[:, self.lead:]
        real = (inner >= begin) & (inner < end)
        # half the bytes to read, and gradients in the same precision; the masters stay fp32. Scaled and cast in one pass
        theta = torch.empty_like(self.slots.theta[:n], dtype=self.run.dtype)
        torch.mul(self.slots.theta[:n], self.slots.scale, out=theta).requires_grad_()
        memory = self.slots.memory(theta, (begin - doc).squeeze(1) - back, self.lead)
        target = self.tokens[(inner + 1).clamp(0, self.val.targets)].flatten()
        h, weight = self.model.hidden(ids.flatten(), pos.flatten(), None, chunk, memory), self.model.input.tok_emb.weight
        hint = None if self.hints is None else self.hints[torch.where(real, inner, self.val.targets)].flatten()
        nats = self.model.head(h, with_hint(target, hint), weight, memory.head)
        counted = self.scorer.tilted(nats.detach(), hint, target).view(n, -1)
        self.nll[torch.where(real, inner, self.val.targets)] = counted
        rows = slice(back, back + chunk)  # slot 0's
        with torch.no_grad():
            logits = self.model.head(h[rows], None, weight, memory.head.of_first())
            logits = logits if hint is None else tilt_logits(logits, hint[rows], self.cfg.ngram_tilt_boost)
        # the same forward was scored above; from here on it may change the adapters
        own, learns = (nats if hint is None else nats[:, 0]).view(n, -1), more.squeeze(1).bool() & (end > begin).squeeze(1)
        loss = ((own * real).sum(1) / real.sum(1).clamp_min(1) * learns).sum()
        grad = torch.autograd.grad(loss, theta)[0]
        if keep:  # only now: the backward pass reads the ring as the forward did
            self.slots.remember(memory, pos[:, self.lead:], real)
        self.slots.learn(grad, learns)
        return logits, target[rows], counted[0, rows]

    def learn_globally(self, adapter: Adapter, spans: np.ndarray, give_up: Callable[[], bool]) -> bool:
        """Train the network itself on scored documents [k, 2], one after the other, with a cosine (PR #1610).

        False when time is up.
        """
        cfg, adapter.order = adapter.cfg, positions(*spans.T)
        starts = range(0, len(adapter.order), cfg.ttt_chunk_tokens)
        # some hundred steps do not pay for compiling another shape
        with torch.compiler.set_stance("force_eager"), deterministic(cfg):
            for i, at in enumerate(starts):
                if give_up():
                    return False
                end = min(at + cfg.ttt_chunk_tokens, len(adapter.order))
                adapter.learn(at, end, cfg.ttt_lr * cosine_to_zero(i, len(starts)))
        return True

    def finish_plain(self, phase_end: int) -> None:
        """Score what is left with fixed weights: the budget is met, adaptation is not. What the phase under way had planned, moments below
        `phase_end`, keeps its moments, since hints may have counted on them: these plain scores use nothing that is learned in the phase."""
        self.scorer.hints = None  # they were made for another order
        left = np.array([(a + np.argmax(self.scorer.ledger.when[a:b] < 0), a, b) for a, b in self.val.sequences
                         if (self.scorer.ledger.when[a:b] < 0).any()])
        self.run.warn(f"evaluation budget: {sum(b - p for p, _, b in left)} tokens of {len(left)} documents are scored without "
                      "adaptation")
        w = make_windows(left[:, 1:], self.cfg.eval_seq_len, max(self.cfg.eval_seq_len // 2, 1))
        # each window's document, by its start
        w[:, 2] = np.maximum(w[:, 2], left[np.searchsorted(left[:, 1], w[:, 0], side="right") - 1, 0])
        self.scorer.score(w[w[:, 2] < w[:, 1]], np.where(self.planned < phase_end, self.planned, max(self.scorer.ledger.now, phase_end)))


@contextlib.contextmanager
def frozen(model: GPT, copies: list[Tensor]):
    """Matrices in the precision they are multiplied in, none of them learning; the fp32 masters come back afterwards.

    `copies` keeps its storage from one call to the next: recorded steps read it.
    """
    masters = [p.data for p in model.parameters()]
    with learning_only(model, set()):
        try:
            for p, copied in zip(model.parameters(), copies):
                p.data = copied.copy_(p.data)
            yield
        finally:
            for p, master in zip(model.parameters(), masters):
                p.data = master


def score_documents(model: GPT, val: ValidationSet, cfg: Config, run: Run, reserve: float) -> Score:
    """Score-first test-time training with adapters of each document's own (PR #1530; cached past: here).

    Phases of lock steps, as document_plan orders them; between phases the network itself learns from what was
    scored. `reserve`: seconds kept free of EVAL_WALLCLOCK_SECONDS for scoring the rest without adaptation.
    """
    scorer = DocumentScorer(model, val, cfg, run)
    globally = dataclasses.replace(cfg, ttt_optimizer="sgd", ttt_lr=cfg.global_ttt_lr, ttt_momentum=cfg.global_ttt_momentum,
                                   ttt_epochs=cfg.global_ttt_epochs, ttt_chunk_tokens=cfg.global_ttt_chunk_tokens, ttt_polyak=0.0,
                                   ttt_batch_tokens=cfg.global_ttt_chunk_tokens, ttt_params="all", ttt_byte_weighted=False)
    give_up = functools.partial(budget_is_short, cfg, run, reserve)
    first = 0
    with Adapter(model, val, globally, run, scorer.scorer.ledger) as adapter:
        for i, phase in enumerate(scorer.plan):
            with frozen(model, scorer.copies):
                going = scorer.run_steps(phase.steps, first, give_up)
            first += len(phase.steps)
            if going and i + 1 < len(scorer.plan):
                going = scorer.learn_globally(adapter, phase.learned, give_up)
            if not going:
                break
        if (scorer.scorer.ledger.when < 0).any():
            scorer.finish_plain(first)
    scorer.scorer.nll += scorer.nll[:-1]  # zeros wherever the other one scored
    return scorer.scorer.result(mixed=True)


@contextlib.contextmanager
def deterministic(cfg: Config):
    """Reproducible kernels where there are any, for test-time training: MODE=eval must give the same digits again."""
    torch.use_deterministic_algorithms(True, warn_only=not cfg.deterministic)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = cfg.deterministic and fills  # NaN in every new tensor costs a pass over it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(cfg.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def random_documents(val: ValidationSet, cfg: Config, world: int) -> tuple[ValidationSet, Config]:
    """Random tokens shaped like a validation set, and the knobs to score them with: a row for every rank to learn from
    between phases, two chunks in every slot of the real set, and enough tokens to learn from twice."""
    slots = slot_count(val.sequences, cfg)
    lengths = [cfg.eval_seq_len + 100] * world
    if cfg.ttt_enabled and cfg.ttt_method == "lora":
        lengths += [2 * cfg.ttt_chunk_size] * slots
    if cfg.ttt_enabled and cfg.ttt_method == "chunk":
        lengths += [cfg.eval_seq_len] * (1 + 2 * cfg.ttt_chunk_tokens // cfg.eval_seq_len)
    rng, other = np.random.Generator(np.random.PCG64(0)), copy.copy(val)
    other.starts = np.cumsum([0, *lengths])
    other.targets = int(other.starts[-1])
    other.tokens = rng.integers(2, cfg.vocab_size, other.targets + 1).astype(np.uint16)
    other.tokens[other.starts] = BOS
    other.bytes = np.ones(other.targets, np.int64)
    phases = min(cfg.phased_ttt_num_phases, 1)  # learned from by all ranks
    return other, dataclasses.replace(cfg, ttt_slots=slots, phased_ttt_plan="prefix", phased_ttt_prefix_docs=world, phased_ttt_num_phases=phases)


def passes(model: GPT, val: ValidationSet, cfg: Config, run: Run) -> dict[str, tuple[str, Callable]]:
    """Name -> (label in the log, function of the seconds that one plain pass takes)."""
    made = {"full": ("roundtrip", lambda plain: score_windows(model, val, cfg, run, cfg.eval_seq_len))}
    if cfg.sliding_window_enabled:
        made["sliding"] = "sliding_window", lambda plain: score_windows(model, val, cfg, run, cfg.eval_stride)
    if cfg.ttt_enabled:
        # what is left when the budget ends is scored in half-overlapping windows, or as the chunks go
        adapt = {"lora": lambda plain: score_documents(model, val, cfg, run, 2 + 2 * plain)}
        made["ttt"] = "ttt", adapt.get(cfg.ttt_method, lambda plain: score_adapting(
            model, val, cfg, run, 2 + plain * cfg.eval_seq_len / cfg.eval_stride))
    return made


def headline(results: dict) -> str:
    """The pass whose score is the run's: the one that the configuration asks for beyond the others, never the lowest."""
    return next(name for name in ("ttt", "sliding", "full") if name in results)


def write_scores(run: Run, cfg: Config, results: dict[str, Score], total: int | None, finished: bool) -> dict:
    """RUN_ID.score.json with the passes that are done so far; returns what it holds."""
    score = {"run": run.id, "finished": finished, "headline": headline(results), "results": {n: s.facts() for n, s in results.items()},
             "bytes_total": total, "failures": run.failures, "caveats": run.caveats, "seed": cfg.seed, "recipe": cfg.recipe_hash()}
    if run.main:
        try:
            write_atomic(run.path(".score.json"), (json.dumps(score, indent=1) + "\n").encode())
        except OSError as e:
            run.warn(f"scores not written to {run.path('.score.json')} ({e}); the log has them")
    return score


def evaluate(model: GPT, val: ValidationSet, cfg: Config, run: Run) -> dict[str, Score]:
    """All configured passes over the reloaded artifact, each on the evaluation clock, in the baseline's log grammar."""
    model.looping = cfg.num_loops > 0
    if run.gpu:  # compile on random tokens, never on validation text; on neither budget
        with run.clock.span("eval warm-up"):
            for _, score in passes(model, *random_documents(val, cfg, run.world), run).values():
                score(0.0)
    results: dict[str, Score] = {}  # each pass starts from the artifact's weights: adaptation puts them back
    for name, (label, score) in passes(model, val, cfg, run).items():
        with run.clock.span(f"eval {name}"):
            results[name] = s = score(results["full"].seconds if results else 0.0)
        run.log(f"final_int{cfg.matrix_bits}_{label}_exact val_loss:{s.val_loss:.8f} val_bpb:{s.val_bpb:.8f} "
                f"eval_time:{1000 * s.seconds:.0f}ms tok/s:{val.targets / s.seconds:.0f}")
        run.log(f"ledger {name}: {s.verdict}")
        run.event("score", name=name, **s.facts())
        if name == "ttt" and cfg.ttt_method != "none" and not s.learned:
            run.warn("adaptation trained on 0 tokens: all documents are shorter than one chunk, or time ended first; its score is that of fixed weights")
            run.caveats.append("adaptation trained on 0 tokens")
        if name == "ttt" and cfg.ngram_tilt_boost and not s.hinted:
            run.warn("NGRAM_TILT_BOOST is on, but counting had nothing to say about any of these tokens: the tilt did nothing")
        write_scores(run, cfg, results, None, False)  # should a later pass die
        if cfg.doc_losses and run.main:
            write_document_losses(s, val, run.path(f".{name}.docs.npz"))
    return results


def write_document_losses(score: Score, val: ValidationSet, path: Path) -> None:
    """Nats (fp64), tokens and bytes of every document, in stream order: what bootstrap intervals are made of."""
    starts = val.starts[val.starts < val.targets]
    sums = {name: np.add.reduceat(x, starts) for name, x in
            (("nats", score.nats), ("tokens", np.ones(val.targets, np.int64)), ("bytes", val.bytes))}
    write_atomic(path, lambda file: np.savez(file, **sums))


def diagnose(model: GPT, val: ValidationSet, cfg: Config, run: Run, label: str) -> Score:
    """A full-window score of weights that are not the artifact; on neither budget."""
    model.looping = cfg.num_loops > 0
    if not run.scorer_ready:  # compiled on random tokens, never on validation text
        with run.clock.span("eval warm-up"):
            other, small = random_documents(val, dataclasses.replace(cfg, ttt_enabled=False), run.world)
            score_windows(model, other, small, run, cfg.eval_seq_len)
        run.scorer_ready = True
    with run.clock.span("diagnostics"):
        s = score_windows(model, val, cfg, run, cfg.eval_seq_len)
    run.log(f"diagnostic {label} val_loss:{s.val_loss:.8f} val_bpb:{s.val_bpb:.8f} eval_time:{1000 * s.seconds:.0f}ms")
    run.event("diagnostic", name=label, **s.facts())
    return s


# ----------------------------------------------------------------------------------------------------------------------
# 17. TRAINING LOOP - compile on real steps, put everything back, start the clock; then validate or train until the
#     budget says stop. The host never waits for the step it has just queued: numbers are read one step late.
# ----------------------------------------------------------------------------------------------------------------------


class Watch:
    """Reads losses and norms one step late, logs them, and stops a run whose numbers are no longer usable."""

    def __init__(self, cfg: Config, run: Run, optimizers: Optimizers):
        self.cfg, self.run, self.optimizers = cfg, run, optimizers
        self.pending: deque = deque()  # steps whose numbers are on their way
        self.seconds: deque = deque(maxlen=8)  # clock at the last reads, for the pace
        self.phases: dict[bool, list[float]] = {}  # looping -> [steps, seconds, tokens]
        self.ceiling = 2 * math.log(cfg.vocab_size)  # twice the uniform guess is no language model

    def put(self, step: int, loss: Tensor, norm: Tensor, looping: bool, tokens: int) -> None:
        """Queue a step's numbers for the host: this rank's part of the loss, and the gradient's norm."""
        numbers = torch.stack([self.run.sum_(loss.clone()), norm])
        self.pending.append((step, *self.run.fetch(numbers), looping, tokens))

    def drain(self, keep: int) -> None:
        """Read all but the last `keep` queued steps, waiting for them if need be."""
        while len(self.pending) > keep:
            step, host, wait, looping, tokens = self.pending.popleft()
            wait()
            self.read(step, *host.tolist(), looping, tokens, final=not keep and not self.pending)

    def read(self, step: int, loss: float, norm: float, looping: bool, tokens: int, final: bool = False) -> None:
        """Book one step's numbers; Diverged if they are not finite, or worse than twice the uniform guess."""
        now = self.run.clock.read("train")
        last = self.seconds[-1] if self.seconds else 0.0
        self.seconds.append(now)
        steps, spent, seen = self.phases.setdefault(looping, [0, 0.0, 0])
        self.phases[looping] = [steps + 1, spent + now - last, seen + tokens]
        if not (math.isfinite(loss) and math.isfinite(norm)) or loss > self.ceiling:
            raise Diverged(f"step {step + 1}: loss {loss:.4g} (ceiling {self.ceiling:.2f}), gradient norm {norm:.4g}; groups "
                           + " ".join(f"{k} {v:.4g};" for k, v in self.optimizers.group_norms().items()))
        done = step + 1
        if done <= 10 or done % self.cfg.train_log_every == 0 or final:
            # the baseline's line, then tokens a second over the last reads and the time left
            pace = self.pace() or now / done
            left = min((self.cfg.iterations - done) * pace,
                       max(self.cfg.max_wallclock_seconds - now, 0) if self.cfg.timed else math.inf)
            self.run.log(f"step:{done}/{self.cfg.iterations} train_loss:{loss:.4f} train_time:{1000 * now:.0f}ms "
                         f"step_avg:{1000 * now / done:.2f}ms tok/s:{tokens / pace:.0f} left:{left:.0f}s")
            self.run.event("train", step=done, loss=loss, norm=norm, seconds=now, tokens=sum(p[2] for p in self.phases.values()))

    def pace(self) -> float:
        """Seconds a step lately."""
        return (self.seconds[-1] - self.seconds[0]) / (len(self.seconds) - 1) if len(self.seconds) > 1 else 0.0


def advice(e: BaseException, run: Run, cfg: Config) -> str:
    """What to do about an error that has a usual cure; empty for any other."""
    if isinstance(e, torch.OutOfMemoryError):
        span, micro = run.clock.broken or run.clock.name, micro_blocks(cfg, cfg.blocks_per_batch // run.world) * cfg.pack_tokens
        knob, value = ("TTT_SLOTS", (cfg.ttt_slots or 512) // 2) if span == "eval ttt" else (
            ("VAL_BATCH_TOKENS", max(cfg.val_batch_tokens // 2, cfg.eval_seq_len)) if span.startswith(("eval", "diag")) else
            ("MICRO_BATCH_TOKENS", max(micro // 2, cfg.pack_tokens)))
        return f"the device's memory was not enough in '{span}': {knob}={value} takes about half of it"
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: free some of it, or let ARTIFACT_DIR name a folder elsewhere than {run.folder}"
    return ""


def stored_config(cfg: Config, run: Run) -> dict:
    """What a file says of its run: all knobs as they were asked for. What memory made of MICRO_BATCH_TOKENS=0 is this machine's business."""
    return {**cfg.as_dict(), "micro_batch_tokens": run.asked_rows}


class Checkpoints:
    """The last good averaged weights on disk, written on a thread; a bad snapshot never replaces a good one."""

    def __init__(self, model: nn.Module, average: Average, cfg: Config, run: Run):
        self.names = [n for n, _ in model.named_parameters()]
        self.average, self.cfg, self.run = average, cfg, run
        self.pool, self.written, self.held, self.last = ThreadPoolExecutor(1), None, None, 0.0
        # pinned and made once, so that the device copies into it while it goes on
        self.host = [torch.empty(t.shape, pin_memory=run.gpu) for t in average.shadow] if run.main else []

    @property
    def idle(self) -> bool:
        """Whether the snapshot's memory is free: an earlier one is written."""
        return self.held is None and (self.written is None or self.written.done())

    def save(self, step: int, now: float) -> None:
        """Begin a snapshot; it is written later, without holding up the device. Rank 0 only."""
        self.last = now
        if not self.run.main:
            return
        self.wait()
        for host, t in zip(self.host, self.average.shadow):
            host.copy_(t.detach(), non_blocking=True)
        copied = torch.cuda.Event() if self.run.gpu else None
        if copied is not None:
            copied.record()
        self.held = copied, {"config": stored_config(self.cfg, self.run), "step": step, "seconds": now, "weights": dict(zip(self.names, self.host))}

    def release(self, seen: float) -> None:
        """Write the snapshot once more than `step` losses were seen: the next one was computed with its weights."""
        if self.held is not None and seen > self.held[1]["step"]:
            self.written, self.held = self.pool.submit(self.write, *self.held), None

    def write(self, copied: torch.cuda.Event | None, content: dict) -> bool:
        """On the thread. Not finite means not saved."""
        if copied is not None:
            copied.synchronize()
        # by numpy: torch would start a second team of threads here, and from then on a CPU's own team no longer waits ready for work
        if not all(np.isfinite(t.numpy()).all() for t in self.host):
            return False
        try:
            write_atomic(self.run.path(".ckpt"), functools.partial(torch.save, content))
        except RuntimeError as e:  # what torch.save makes of a disk that fills up halfway
            raise OSError(errno.ENOSPC, said(e)) from e
        return True

    def wait(self) -> bool:
        """Whether the last snapshot is on disk. One that could not be written costs what it was for, not the run."""
        try:
            return self.written is not None and self.written.result()
        except OSError as e:
            self.run.warn(f"checkpoint not written ({e}); the run goes on without it. {advice(e, self.run, self.cfg)}")
            return False
        finally:
            self.written = None


def train_step(model: GPT, optimizers: Optimizers, batches: list[Batch], v: Values, tokens: int = 0) -> tuple[Tensor, Tensor]:
    """One optimiser step over this rank's micro-batches of a step of `tokens` over all ranks (0: all have as many as this one).

    Returns (this rank's part of the mean loss, gradient norm), both on the device.
    """
    model.looping, tokens = v.looping, tokens or optimizers.run.world * sum(b.ids.numel() for b in batches)
    torch._foreach_zero_(optimizers.rows.grads)  # not after the step: the report of a run that goes wrong reads gradients
    # by tokens and not by ranks, which may have unequal shares, or none
    losses = [optimizers.rows.add(b, torch.full((), 1 / tokens, device=b.ids.device)).clone() for b in batches]
    return sum(losses) if losses else optimizers.small[0].new_zeros(()), optimizers.step(v)


def graphs(cfg: Config, world: int) -> list[tuple[int, bool]]:
    """(blocks of a step, recurrence or not) for every compiled graph of a run: one a plan and a shape of rows. The same on all ranks,
    since they warm up together."""
    found = {}
    for p in sorted([0.0, cfg.enable_looping_at, *(until for until, _ in cfg.batch_shares[:-1])]):
        blocks, looping = step_blocks(cfg, stage_at(cfg.batch_shares, p)), cfg.num_loops > 0 and p >= cfg.enable_looping_at
        shapes = tuple(micro_blocks(cfg, len(rank_blocks(blocks, rank, world))) for rank in range(world))
        found.setdefault((shapes, looping), (blocks, looping))
    return list(found.values())


def warm_up(model: GPT, optimizers: Optimizers, stream: TrainStream, cfg: Config, run: Run) -> float:
    """Run real steps on all graphs so that everything is compiled, then put parameters and optimisers back.

    Also times some calibration batches; returns the seconds to keep for the Hessians at the end.
    """
    saved = copy.deepcopy(model.state_dict())
    for blocks, looping in graphs(cfg, run.world):
        batches = stream.cut(0, blocks, cfg.train_seq_len)  # training data, the same for all graphs
        for i in range(cfg.warmup_steps):
            train_step(model, optimizers, batches, Values(1.0, cfg.muon_momentum, looping), blocks * cfg.pack_tokens)
            run.log(f"warmup_step:{i + 1}/{cfg.warmup_steps} looping:{looping} at:{run.clock.read():.1f}s")
    model.load_state_dict(saved)
    optimizers.reset()  # momentum of the warm-up must not reach step 0
    if cfg.gptq_reserve_seconds >= 0 or not cfg.timed or cfg.quantizer != "gptq":
        return max(cfg.gptq_reserve_seconds, 0.0)
    with run.clock.span("reserve probe"):
        few = SLOPE_LONGEST // SLOPE_TOKENS  # share one pass for slopes
        for count in 1, few:  # the first also chooses kernels and takes memory
            start = run.clock.read()
            calibrate(model, cfg, stream.make(0)[:1] * count, stream, run)
            run.clock.switch("reserve probe")
        part = run.clock.read() - start
    reserve, most = run.agree(0.5 + 1.1 * part * max(stream.calibration_rows / few, 1)), cfg.max_wallclock_seconds / 2
    if reserve > most:  # a busy machine is slow for a moment, and a run that only calibrates is worth nothing
        run.warn(f"Hessians seem to take {reserve:.1f}s of MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:g}: half is kept for them, and if that is "
                 "not enough the run is over its budget; fewer GPTQ_CALIBRATION_BATCHES take less")
    return min(reserve, most)


def train(model: GPT, cfg: Config, run: Run, stream: TrainStream, val: ValidationSet) -> Average:
    """Train until the budget or ITERATIONS is reached; the returned average is on disk, and has not been applied yet."""
    optimizers, schedules = Optimizers(model, cfg, run), Schedules(cfg)
    with run.clock.span("compile and warm-up"):
        reserve = warm_up(model, optimizers, stream, cfg, run)
    limit = cfg.max_wallclock_seconds - reserve
    average = Average(cfg, model)
    watch, checkpoints = Watch(cfg, run, optimizers), Checkpoints(model, average, cfg, run)
    checkpoints.save(0, 0.0)  # so that there always is a good one
    checkpoints.release(math.inf)
    run.log(f"gptq:reserving {reserve:.1f}s, effective={1000 * limit:.0f}ms" if cfg.timed else "progress by steps")
    run.log(f"launch_to_first_step:{run.clock.read():.1f}s")
    step, p, last_p = 0, 0.0, 0.0
    run.clock.switch("train")
    while True:
        watch.drain(keep=1)
        checkpoints.release(step - len(watch.pending))
        now = run.agree(run.clock.read("train"))
        # two steps, the one in flight and the next; with a pace of its own a rank would part from the others at the last one
        stop = step >= cfg.iterations or cfg.timed and now + 2 * run.agree(watch.pace()) > limit

        # --------------- VALIDATE (diagnose stops the training clock) ---------------
        if cfg.val_loss_every and step and step % cfg.val_loss_every == 0 and not stop:
            s = diagnose(model, val, cfg, run, f"step {step}")
            run.log(f"step:{step}/{cfg.iterations} val_loss:{s.val_loss:.4f} val_bpb:{s.val_bpb:.4f} "
                    f"train_time:{1000 * now:.0f}ms step_avg:{1000 * now / step:.2f}ms")
        if stop:
            break

        # --------------- TRAIN (training clock running) ---------------
        p = min(1.0, max(step / cfg.iterations, now / limit if cfg.timed else 0.0))  # whichever budget is nearer its end
        v = schedules.at(p)
        if v.looping and not model.looping and cfg.num_loops:
            run.log(f"layer_loop:enabled step:{step} frac:{p:.3f} visits:{[x.layer for x in model.plans[1]]}")
        batches, tokens = stream.get(p)
        loss, norm = train_step(model, optimizers, batches, v, tokens)
        average.update(p, p - last_p)  # in progress, not in steps
        watch.put(step, loss, norm, v.looping, tokens)
        step, last_p = step + 1, p
        if cfg.checkpoint_seconds and checkpoints.idle and now - checkpoints.last > cfg.checkpoint_seconds:
            checkpoints.save(step, now)
    watch.drain(keep=0)
    run.clock.switch("after training")
    checkpoints.save(step, now)
    checkpoints.release(math.inf)
    if checkpoints.wait():
        run.can_go_on("pack", "CHECKPOINT", run.path(".ckpt"))
    report_training(cfg, run, watch, schedules, step)
    optimizers.rows.free()
    return average


def report_training(cfg: Config, run: Run, watch: Watch, schedules: Schedules, step: int) -> None:
    """Why it stopped, speed by phase, memory, and schedules that never fired."""
    if step < cfg.iterations:
        run.log(f"stopping_early: wallclock_cap train_time:{1000 * run.clock.read('train'):.0f}ms step:{step}/{cfg.iterations}")
    for looping, (steps, spent, tokens) in watch.phases.items():
        run.log(f"phase {'with' if looping else 'without'} recurrence: {steps} steps {spent:.2f}s tok/s:{tokens / max(spent, 1e-9):.0f}")
        run.event("phase", looping=looping, steps=steps, seconds=spent, tokens=tokens)
    if run.gpu:
        run.log(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB "
                f"reserved: {torch.cuda.max_memory_reserved() >> 20} MiB")
    line, silent = schedules.report()
    run.log(line)
    run.event("schedules", fired=schedules.fired, never=silent)
    if silent:
        run.warn(f"configured but never fired: {', '.join(silent)}; the run ended before their time")


# ----------------------------------------------------------------------------------------------------------------------
# 18. SAMPLING - text from the packed artifact: proof that it is a language model.
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model: GPT, tokenizer: Tokenizer, cfg: Config, run: Run) -> str:
    """Continue SAMPLE_PROMPT by SAMPLE_TOKENS tokens, or up to the end of the document. Reproducible by SEED."""
    rng = torch.Generator().manual_seed(cfg.seed)
    ids = [BOS] + tokenizer.sp.encode(cfg.sample_prompt)  # as every document of the shards begins
    model.looping = cfg.num_loops > 0
    for _ in range(cfg.sample_tokens):
        seen = torch.tensor(ids[-cfg.eval_seq_len:], device=run.device)  # no longer context than in scoring
        cu = torch.tensor([0, len(seen)], dtype=torch.int32, device=run.device)
        with torch.compiler.set_stance("force_eager"):  # the length changes with every token
            logits = model.logits(seen, torch.arange(len(seen), device=run.device), cu, len(seen))[-1].float().cpu()
        hot = logits / max(cfg.sample_temperature, 1e-6)
        token = int(logits.argmax()) if not cfg.sample_temperature else int(torch.multinomial(hot.softmax(-1), 1, generator=rng))
        if token == BOS:  # the next document would begin here
            break
        ids.append(token)
    return tokenizer.sp.decode(ids)


# ----------------------------------------------------------------------------------------------------------------------
# 19. MAIN - prepare, train, average, quantise, pack, reload, evaluate, report; MODE picks where to enter.
# ----------------------------------------------------------------------------------------------------------------------


def find_file(cfg: Config, given: str, suffix: str) -> Path:
    """The file that was named, else the one of RUN_ID, else the newest in ARTIFACT_DIR."""
    folder = Path(cfg.artifact_dir)
    if given or cfg.run_id:
        path = Path(given) if given else folder / f"{cfg.run_id}{suffix}"
        if not path.is_file():
            raise SystemExit(f"{path} is missing")
        return path
    found = sorted(folder.glob(f"*{suffix}"), key=lambda f: f.stat().st_mtime)
    if not found:
        raise SystemExit(f"no *{suffix} in {folder}; train first, or name one")
    return found[-1]


def restore_config(env: dict, stored: dict, path: Path) -> Config:
    """The stored run's own config, with what the environment says about running it; the network's shape is fixed."""
    # what belongs to that run's files and machine, not to its recipe; before there was FP8, products were in bf16
    own = {k: v for k, v in ({"fp8": "none"} | stored).items() if (k, v) not in REMOVED.items()
           and k not in ("mode", "run_id", "artifact_dir", "artifact", "checkpoint", "track", "attn_backend")}
    known = {f.name: f for f in dataclasses.fields(Config)}
    if own.keys() - known.keys():
        raise SystemExit(f"{path}: made with knobs that are unknown here: {', '.join(sorted(own.keys() - known.keys()))}")
    for k, v in own.items():  # a file can say anything
        if not isinstance(v, (str, type(known[k].default))) and not (isinstance(known[k].default, float) and type(v) is int):
            raise SystemExit(f"{path}: {k.upper()}={v!r} is no {type(known[k].default).__name__}")
    # what was text then may be a number now
    own = {k: parse_value(known[k], v) if isinstance(v, str) and k.upper() not in env else v for k, v in own.items()}
    for k in own.keys() - {name.lower() for name in env}:  # what the environment says is checked where it is read
        check_value(known[k], own[k])
    cfg = read_config(env, own)
    now = cfg.as_dict()
    for name in (f.name for f in dataclasses.fields(ModelKnobs)):
        if now[name] != own.get(name, now[name]):
            raise ConfigError(f"{name.upper()}={now[name]}, but {path} was trained with {own[name]}")
    # RUN_ID may only have said where to look
    return dataclasses.replace(cfg, preset=own.get("preset", cfg.preset),
                               run_id=cfg.run_id if cfg.run_id not in ("", path.stem) else f"{path.stem}.{cfg.mode}")


def resolve(env: dict) -> tuple[Config, dict | None, str]:
    """(config, stored weights or None, what must be said aloud) for this MODE; without shards and without a named PRESET, the smoke run."""
    cfg = read_config(env, check=False)  # where to look; the stored config decides what fits together
    if cfg.mode in ("eval", "sample"):
        path = find_file(cfg, cfg.artifact, ".artifact")
        data = path.read_bytes()
        manifest, weights = read_artifact(data)
        return restore_config(env, manifest["config"], path), {"weights": weights, "path": path, "data": data}, ""
    if cfg.mode == "pack":
        path = find_file(cfg, cfg.checkpoint, ".ckpt")
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # torch names neither the file nor one kind of error
            raise SystemExit(f"checkpoint {path}: truncated, or not a file of this program ({type(e).__name__})") from None
        return restore_config(env, stored["config"], path), {"path": path, **{k: stored.get(k) for k in ("weights", "seconds")}}, ""
    cfg = named(read_config(env))
    if cfg.mode == "train" and cfg.preset == "smoke" and "PRESET" not in env:
        return cfg, None, "no GPU found: PRESET=smoke, the whole job at a hundredth of the size; the record recipe needs CUDA"
    if cfg.mode != "train" or cfg.preset == "smoke" or any(cfg.dataset.glob("fineweb_train_[0-9]*.bin")):
        return cfg, None, ""
    if {"PRESET", "DATA_PATH"} & set(env):
        raise SystemExit(f"no training shards in {cfg.dataset}; fetch them: python data/cached_challenge_fineweb.py (see "
                         "data/README.md), or unset PRESET to run on text that is already on this machine")
    return named(read_config({**env, "PRESET": "smoke"})), None, (
        f"no shards in {cfg.dataset} (data/README.md says how to get them) and PRESET is not set: SMOKE run on text from this machine; its "
        "score means nothing beyond this machine")


def describe_plan(model: GPT, cfg: Config, run: Run) -> None:
    """Layer plan, parameter table, size, and what batch and rates come to."""
    for looping, plan in enumerate(model.plans[:1 + (cfg.num_loops > 0)]):
        words = [f"{'+' if v.skip is not None else ''}{v.layer}{'|' if v.lanes else ''}{'^' if v.push else ''}" for v in plan]
        run.log(f"plan {'with' if looping else 'without'} recurrence: {' '.join(words)}  (^ feeds a skip, + takes one, | two lanes)")
    used: dict[Row, list[int]] = {}  # one line a row that is used
    for p, row in zip(model.parameters(), rows_of(model, cfg).values()):
        used.setdefault(row, []).append(p.numel())
    for r, n in used.items():
        run.log(f"  {r.pattern:42s} {len(n):3d} tensors {sum(n):9d} parameters  {r.group:6s} {r.quant}")
    run.log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    micro = micro_blocks(cfg, cfg.blocks_per_batch // run.world) * cfg.pack_tokens
    run.log(f"train_batch_tokens:{cfg.train_batch_tokens} = {run.world} ranks x "
            f"{cfg.train_batch_tokens // run.world // micro} micro-batches x {micro} train_seq_len:{cfg.train_seq_len} "
            f"iterations:{cfg.iterations} warmup_steps:{cfg.warmup_steps} max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}")
    for until, share in cfg.batch_shares[:-1]:  # what rounding to whole blocks has made of it
        run.log(f"until {until:.0%} of the run: steps of {step_blocks(cfg, share) * cfg.pack_tokens} tokens")
    run.log(f"matrix_lr:{cfg.matrix_lr} embed_lr:{cfg.tied_embed_lr} scalar_lr:{cfg.scalar_lr} "
            f"warmdown over the last {cfg.warmdown_frac:.0%} to {cfg.min_lr:.0%}, momentum warm-up {cfg.muon_momentum_warmup_frac:.0%}, "
            f"average {cfg.average} over {cfg.ema_horizon:.1%} of the run")


def describe_memory(cfg: Config, run: Run, val: ValidationSet) -> None:
    """What training and adaptation will take of the device's memory, before any of it is spent."""
    if not run.gpu:
        return
    rows = micro_blocks(cfg, -(-cfg.blocks_per_batch // run.world)) * cfg.pack_tokens
    line = f"memory: {run.free_bytes() / 2 ** 30:.1f} GiB free; rows of {rows} tokens take about {rows * row_bytes(cfg, run) / 2 ** 30 + 3:.1f} GiB"
    if cfg.uses_lora:
        slots = -(-slot_count(val.sequences, cfg) // run.world)
        groups = slot_groups(cfg, run, slots)
        line += (f"; adaptation about {-(-slots // groups) * slot_bytes(cfg, run) / 2 ** 30:.1f} GiB for {slots} slots a rank"
                 + f" in {groups} groups, one after the other" * (groups > 1))
    run.log(line)


def kernel_problem(kernels: Kernels, cfg: Config, run: Run) -> str:
    """Train two layers of the real widths on a short row with these kernels and with the eager ones; what is wrong, empty if nothing."""
    small = dataclasses.replace(cfg, num_layers=2, num_loops=0, xsa_last_n=min(cfg.xsa_last_n, 2), ve_layers="", parallel_residual="none")
    rng, losses = np.random.default_rng(0), []
    ids = rng.integers(2, cfg.vocab_size, 257)
    row = make_batch(ids[:-1], ids[1:], np.array([0, 1, 70, 200, 256], np.int32), cfg.train_seq_len, run)
    models = [GPT(small, form, run.dtype) for form in (kernels, Kernels(kernels.attend))]
    for model in models:
        initialize(model, small)
        for p in model.parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        model.to(run.device)
    try:
        for model in models:
            loss = model.nll(*row).mean()
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            losses.append(torch.stack([loss.detach(), torch.stack(torch._foreach_norm([g for g in found if g is not None])).norm()]))
        far = float(((losses[0] - losses[1]) / losses[1]).abs().max())
        return "" if far < 0.05 else f"loss or gradient differ from the eager reference by {far:.2%}"
    except Exception as e:  # whatever a compiler or a launch throws here only means: do without
        return said(e)


def build_model(cfg: Config, run: Run) -> GPT:
    """Initialised model on this rank's device, attention chosen, compilation arranged."""
    kernels = choose_kernels(cfg, run)
    ours = kernels._replace(attend=None, cached=None) != Kernels(None, cached=None)
    problem = run.any_problem(kernel_problem(kernels, cfg, run) if ours else "")
    if problem:
        run.warn(f"our kernels do not work here ({problem}): their eager forms run, several times slower, and in bf16")
        note_bf16(cfg, run)
        kernels = Kernels(kernels.attend if kernels.attend is not attention_triton else attention_sdpa, cached=kernels.cached)
    model = GPT(cfg, kernels, run.dtype)
    initialize(model, cfg)
    model.to(run.device)
    compile_model(model, cfg, run, len(graphs(cfg, run.world)))
    return model


def pack(model: GPT, cfg: Config, run: Run, stream: TrainStream, tokenizer: Tokenizer) -> bytes:
    """Averaged weights to an artifact on disk (rank 0) and in memory (all ranks)."""
    with run.clock.span("hessians"):  # reads training data, so it is on the training clock
        hessians, slopes = calibrate(model, cfg, stream.calibration(), stream, run)
    run.log(f"gptq:calibrated {len(hessians)} layers in {run.clock.seconds['hessians']:.1f}s")
    data = b""  # only rank 0 quantises; the others receive the file
    with run.clock.span("quantise and pack"):
        if run.main:
            meta = {"config": stored_config(cfg, run), "tokenizer": tokenizer.sha256, "source": sha256(SOURCE.encode()), "train_tokens": stream.tokens}
            data, parts, coarser = fit_artifact(Quantizer(model, cfg, hessians, run, slopes), meta, cfg, run)
            code = pack_code(SOURCE)
            report_size(data, code, parts, coarser, cfg, run)
            write_atomic(run.path(".artifact"), data)
            write_atomic(run.path(".packed.py"), code)
    data = run.share(data)
    run.can_go_on("eval", "ARTIFACT", run.path(".artifact"))
    return data


def report_size(data: bytes, code: bytes, parts: dict, coarser: float, cfg: Config, run: Run) -> None:
    """Bytes by part in the baseline's grammar, and what fitting the cap cost."""
    label = f"int{cfg.matrix_bits}+{cfg.compressor}"
    for name, size in parts.items():
        run.log(f"  {size:10d} bytes  {name}")
    total = len(data) + parts["code"]
    run.log(f"Code size: {parts['code']} bytes (packed; {len(SOURCE.encode())} readable)")
    run.log(f"Serialized model {label}: {len(data)} bytes")
    run.log(f"Total submission size {label}: {total} bytes ({cfg.artifact_max_bytes - total} below the cap)")
    if coarser != 1:
        run.log(f"fit: steps x{coarser:.4f}, about {abs(math.log2(coarser)):.3f} bits a weight {'given up' if coarser > 1 else 'more'}")
    run.event("size", total=total, model=len(data), coarser=coarser, **parts)
    run.event("files", artifact=sha256(data), code=sha256(code))


# What a submission is judged by: bytes of code and weights, seconds of training and of evaluation, documents and bytes of the FineWeb
# validation set (151.07 to 151.08 million by merged logs, whatever the tokenizer), GPUs and their kind.
CONTEST = {"cap": 16_000_000, "seconds": 600.0, "documents": 50_000, "text": (151_000_000, 151_200_000), "world": 8, "device": "H100"}


def not_the_contests(cfg: Config, run: Run, val: ValidationSet) -> list[str]:
    """One caveat that names everything in which this run is more lenient than the contest, or other; none where it is the contest's."""
    text, low, high = int(val.bytes.sum()), *CONTEST["text"]
    device = run.device_name if run.gpu else "a CPU"
    clocks = (("training", cfg.max_wallclock_seconds if cfg.timed else 0.0), ("evaluation", cfg.eval_wallclock_seconds))
    found = [f"{name} {f'of {most:g} s' if most else 'without a clock'}" for name, most in clocks if not 0 < most <= CONTEST["seconds"]]
    found += [f"cap of {cfg.artifact_max_bytes} bytes"] * (cfg.artifact_max_bytes > CONTEST["cap"])
    found += [f"{len(val.starts)} documents of {CONTEST['documents']}"] * (len(val.starts) != CONTEST["documents"])
    found += [f"{text} bytes of text of about 151.07 million"] * (not low <= text <= high)
    found += [f"world {run.world} of {CONTEST['world']}"] * (run.world != CONTEST["world"])
    found += [f"on {device}"] * (CONTEST["device"] not in device)
    return [f"not the contest's: {', '.join(found)}"] if found else []


def finish(cfg: Config, run: Run, val: ValidationSet, results: dict[str, Score], total: int | None) -> None:
    """Budgets, the one-line result and the verdict; the last line of the log says whether every rule held."""
    report_budgets(run, cfg)
    run.caveats += not_the_contests(cfg, run, val)
    score = write_scores(run, cfg, results, total, True)
    run.log("result: " + " ".join(f"{n}:{s.val_bpb:.6f}" for n, s in results.items()))
    run.log(f"val_bpb:{results[headline(results)].val_bpb:.8f}" + (f" bytes_total:{total}" if total is not None else ""))
    run.event("result", **score)
    run.log("verdict: " + (f"FAILED: {'; '.join(run.failures)}" if run.failures else
                           "legal: score-first, one pass, full distribution, budgets and bytes within their limits")
            + "".join(f"; but {caveat}" for caveat in run.caveats))


def score_artifact(data: bytes, model: GPT, cfg: Config, run: Run, val: ValidationSet) -> dict[str, Score]:
    """Decode an artifact into the model, on the evaluation clock, and run every configured pass."""
    with run.clock.span("eval load"):
        load_weights(model, read_artifact(data)[1])
    return evaluate(model, val, cfg, run)


def job(cfg: Config, run: Run, stored: dict | None) -> None:
    """Everything between an open log and a closed one."""
    if cfg.data_path == SMOKE["data_path"]:
        build_local_corpus(cfg, run)
    tokenizer = run.together(lambda: Tokenizer(cfg.tokenizer, cfg.vocab_size))
    if cfg.mode == "sample":
        model = build_model(cfg, run)
        load_weights(model, stored["weights"])
        return run.log(sample(model, tokenizer, cfg, run))
    val, manifest, stream = open_data(cfg, run, tokenizer)
    run.log(f"data: {describe_data(manifest)}")
    if manifest.get("transform", {}).get("lossy"):
        run.caveats.append(f"LOSSY data ({manifest['transform']['name']}): bits per byte of another text than the original")
    run.log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={tokenizer.path} {val.oracle}")
    run.log(f"validation: {val.fingerprint()}" + (f" (first {cfg.val_docs} documents only)" if cfg.val_docs else ""))
    run.event("validation", **val.fingerprint(), val_docs=cfg.val_docs)
    if stream:
        codec_names(cfg.compressor, run)  # a missing coder stops the run now, not after training
    model = build_model(cfg, run)
    describe_plan(model, cfg, run)
    describe_memory(cfg, run, val)
    if cfg.mode == "doctor":
        return tool("records", "bench").doctor(sys.modules[__name__], model, cfg, run, stream)
    if cfg.mode == "bench":
        return tool("records", "bench").bench(sys.modules[__name__], model, cfg, run, stream, val, tokenizer)
    if stored is not None:
        run.log(f"weights from {stored['path']}")
    if cfg.mode in ("pack", "eval"):
        known = stored.get("seconds")
        run.caveats.append("trained by another process, " + ("whose time is not checked here" if known is None else f"for {known:.1f} s"))
    if cfg.mode == "pack":
        load_weights(model, stored["weights"])
    if cfg.mode == "train":
        run.log(f"train_shards: {len(stream.shards)} train_tokens: {stream.tokens}")
        train_and_average(model, cfg, run, stream, val)
    data = stored["data"] if cfg.mode == "eval" else pack(model, cfg, run, stream, tokenizer)
    total = len(data) + len(pack_code(SOURCE))
    if cfg.mode == "eval" and total > cfg.artifact_max_bytes:  # packing says so itself
        run.fail(f"artifact does not fit: {total} bytes > {cfg.artifact_max_bytes}")
    finish(cfg, run, val, score_artifact(data, model, cfg, run, val), total)


def open_data(cfg: Config, run: Run, tokenizer: Tokenizer) -> tuple[ValidationSet, dict, TrainStream | None]:
    """Validation set, manifest and, where this MODE reads it, the training stream: the same on all ranks, or all of them stop."""
    def read():
        val, manifest = ValidationSet(cfg, tokenizer), read_manifest(cfg.dataset, tokenizer)
        check_manifest(manifest, val, cfg)
        return val, manifest, TrainStream(cfg, run) if cfg.mode in ("train", "pack", "doctor", "bench") else None
    val, manifest, stream = run.together(read)

    def compare():
        mine = json.dumps([val.fingerprint(), stream.tokens if stream else 0]).encode()
        if mine != run.share(mine):
            raise SystemExit(f"{cfg.dataset} holds other tokens here than on rank 0")
    run.together(compare)
    return val, manifest, stream


def train_and_average(model: GPT, cfg: Config, run: Run, stream: TrainStream, val: ValidationSet) -> None:
    """Train, leave the averaged weights in the model; scores of both beside each other."""
    average = train(model, cfg, run, stream, val)
    diagnose(model, val, cfg, run, "raw")
    if cfg.average != "none":
        run.log("ema:applying EMA weights" if cfg.average == "ema" else "swa:applying averaged weights")
        average.apply()
        diagnose(model, val, cfg, run, "pre-quantization post-ema")


def show_config(cfg: Config, run: Run) -> None:
    """MODE=config: everything that is known before data and device."""
    run.log("\n".join(cfg.describe()))
    with torch.device("meta"):
        model = GPT(cfg)
    describe_plan(model, cfg, run)
    run.log(f"preset:{cfg.preset} recipe:{cfg.recipe_hash()}")


def end_on_signals() -> None:
    """End the run on SIGTERM and SIGHUP the way Ctrl-C does: through the `finally` blocks, with a usable log."""
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, lambda number, frame: sys.exit(128 + number))


def tell_why(e: BaseException, run: Run, cfg: Config) -> None:
    """What ended a run, what to do about it, and from where it goes on."""
    number = e.code - 128 if isinstance(e, SystemExit) and isinstance(e.code, int) else 0
    if number > 0:
        cure = " (the terminal has gone: start long runs under nohup or in tmux)" if number == getattr(signal, "SIGHUP", 0) else ""
        run.log(f"interrupted: {signal.Signals(number).name}{cure}")
    else:
        run.log(f"interrupted: {type(e).__name__}: {e}")
    if not isinstance(e, (KeyboardInterrupt, SystemExit)):
        run.log(traceback.format_exc())
    if advice(e, run, cfg):
        run.log(f"!! {advice(e, run, cfg)}")
    if isinstance(e, Diverged):
        run.log(f"last good checkpoint: {run.path('.ckpt')}")
    if run.goes_on:
        run.log(f"goes on with: {run.goes_on}")


def main() -> int:
    """Exit status: 0 all rules held, 1 a rule was broken or the run failed, 128 + n ended by signal n."""
    env = shell_environment()
    if help_wanted(sys.argv[1:]):
        show_help()
        return 0
    ranks = launch(env)
    read_config(env, check=False)  # what is wrong with the environment alone is said by each rank, before it waits for others
    set_environment()
    join(ranks)
    cfg, stored, note = from_rank_0(lambda: resolve(env), ranks)
    run = Run(cfg, ranks)
    if not run.gpu:
        choose_threads(cfg.deterministic)
    end_on_signals()
    if cfg.mode == "config":
        show_config(cfg, run)
        return 0
    run.together(lambda: run.open_log(cfg))
    cfg = fit_rows(cfg, run)
    if note:
        run.warn(note)
    try:
        job(cfg, run, stored)
        return 1 if run.failures else 0
    except BaseException as e:
        tell_why(e, run, cfg)
        if isinstance(e, Diverged):
            return 1
        raise
    finally:
        run.close()


if __name__ == "__main__":
    sys.exit(main())
