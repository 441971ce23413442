"""Every preset and every value of every choice: trains, packs, comes back, scores the same; and scores soundly.

Full-size networks are only counted (on the meta device); lives are lived at toy size.
"""
import dataclasses
import math
import types

import numpy as np
import pytest
import torch
from conftest import config, make_run, trainer, write_shard
from test_slots import Documents
from toy import one_thread  # noqa: F401 (fixture)

tg = trainer()
SEEDS = ("pr413", "pr430", "pr490", "pr1880", "pr1693", "pr1855", "pr2135")
V = 64
TOY = dict(
    VOCAB_SIZE=V, NUM_LAYERS=4, MODEL_DIM=32, NUM_HEADS=2, MLP_MULT=2, GATE_WINDOW=8, TRAIN_SEQ_LEN=32, PACK_TOKENS=64,
    MICRO_BATCH_TOKENS=128, TRAIN_BATCH_TOKENS=256, EVAL_SEQ_LEN=32, EVAL_STRIDE=16, VAL_BATCH_TOKENS=128, TTT_CHUNK_TOKENS=128,
    TTT_BATCH_TOKENS=64, GLOBAL_TTT_CHUNK_TOKENS=64, VAL_DOCS=0, MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=1, TTT_SLOTS=8,
    GPTQ_CALIBRATION_BATCHES=1, TTT_LORA_RANK=4, TTT_LORA_ALPHA=8, TTT_CHUNK_SIZE=8, COMPRESSOR="zlib", BIGRAM_DIM=8,
    SLIDING_WINDOW_ENABLED=0, NGRAM_TILT_ORDER=2, LQER_ASYM_GROUP=16, VE_DIM=8, EVAL_WALLCLOCK_SECONDS=0,
    CHECKPOINT_SECONDS=0, ITERATIONS=100)  # without a clock somebody has to say how many


def toy(preset, **env):
    """The preset's techniques at toy size: sizes and layer numbers shrink, choices stay."""
    full = config(PRESET=preset)
    kv = 1 if full.num_kv_heads < full.num_heads else 2
    shrunk = dict(TOY, NUM_KV_HEADS=kv, XSA_LAST_N=min(full.xsa_last_n, 4), ROPE_DIMS=min(full.rope_dims, 8),
                  BIGRAM_VOCAB_SIZE=min(full.bigram_vocab_size, 50), VE_LAYERS="2,3" if full.ve_layers else "",
                  PHASED_TTT_PREFIX_DOCS=3 * (full.phased_ttt_plan == "prefix"), PARALLEL_START_LAYER=2)
    if full.num_loops:
        shrunk.update(NUM_LOOPS=1, LOOP_START=1, LOOP_END=2)
    return config(**{"PRESET": preset, **shrunk, **env})


# ----------------------------------------------------------------------------------------------------------------------
# Full size
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset, count", [
    ("baseline", 17_059_912),
    # baseline, a dense gate of 512 + 1 a head a layer, two lambdas on eight layers, a smear gate, the hash table
    ("pr413", 17_059_912 + 9 * 8 * 513 + 16 + 512 + 4096 * 128 + 128 * 512 + 1),
    ("pr430", 33_318_079), ("pr490", 27_137_221), ("pr1880", 35_945_605), ("pr1693", 35_945_671), ("pr1855", 35_945_671),
    # the original counts its two softcap scalars, which are no parameters here but adapter state
    ("pr2135", 35_945_673 - 2), ("record", 35_945_671 + 11 * (2 * 256 * 512 - 4 * 13))])  # 256 hidden channels a layer more, four heads less
def test_published_parameter_counts(preset, count):
    with torch.device("meta"):
        model = tg.GPT(config(PRESET=preset))
    assert sum(p.numel() for p in model.parameters()) == count


def test_visits_of_the_records():
    layers = [v.layer for v in tg.layer_plan(config(PRESET="pr1855"), True)]
    assert layers == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]


# ----------------------------------------------------------------------------------------------------------------------
# Lives
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Documents with structure to learn: each word follows from the one before it, with some noise."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)

    def stream(count):
        tokens = []
        while len(tokens) < count:
            word, tokens = int(rng.integers(2, V)), tokens + [1]
            for _ in range(int(rng.integers(1, 60))):
                word = (word * 5 + 3) % (V - 2) + 2 if rng.random() < 0.8 else int(rng.integers(2, V))
                tokens.append(word)
        return np.array(tokens)
    for i in range(2):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", stream(6000))
    write_shard(folder / "fineweb_val_000000.bin", stream(400))
    return folder


TOKENIZER = types.SimpleNamespace(sha256="none", count_bytes=lambda tokens: np.ones(len(tokens) - 1, np.int64),
                                  check_operators=lambda tokens: None,
                                  check_bytes=lambda tokens, starts: "one byte a token")


def live(cfg, tmp_path):
    """Train, pack, reload into a network that never trained, score. -> (run, first loss, last loss, scores)"""
    run = make_run(tmp_path, cfg)
    run.open_log(cfg)
    val, stream = tg.ValidationSet(cfg, TOKENIZER), tg.TrainStream(cfg, run)
    model = tg.build_model(cfg, run)
    before = tg.score_windows(model, val, cfg, run, cfg.eval_seq_len)
    tg.train_and_average(model, cfg, run, stream, val)
    data = tg.pack(model, cfg, run, stream, TOKENIZER)
    assert data == run.path(".artifact").read_bytes()
    fresh = tg.build_model(dataclasses.replace(cfg, seed=cfg.seed + 1), run)
    scores = tg.score_artifact(data, fresh, cfg, run, val)
    run.close()
    return run, before, scores, (data, val)


def check_life(cfg, tmp_path):
    run, before, scores, (data, val) = live(cfg, tmp_path)
    assert not run.failures
    again = tg.build_model(dataclasses.replace(cfg, seed=cfg.seed + 2), run)
    repeated = tg.score_artifact(data, again, cfg, run, val)
    assert {n: s.val_loss for n, s in scores.items()} == {n: s.val_loss for n, s in repeated.items()}
    assert all(math.isfinite(s.val_loss) for s in scores.values())
    return before, scores


@pytest.mark.parametrize("preset", ["baseline", "record", *SEEDS])
def test_every_preset_learns_packs_and_comes_back(preset, shards, tmp_path):
    before, scores = check_life(toy(preset, ITERATIONS=20, SLIDING_WINDOW_ENABLED=1, DATA_PATH=shards), tmp_path)
    assert scores["full"].val_loss < before.val_loss - 0.05
    assert set(scores) == {"full", "sliding"} | (set() if preset == "baseline" else {"ttt"})


# one value of each choice and each toggle that the record does not use
CHOICES = [
    {"VALUE_RESIDUAL": "mix"}, {"VALUE_RESIDUAL": "sigmoid"}, {"ATTN_GATE": "none"}, {"ATTN_GATE": "scalar"}, {"ATTN_GATE": "dense"},
    {"ATTN_GATE": "out"}, {"SMEAR_GATE": "none"}, {"SMEAR_GATE": "post"}, {"SMEAR_GATE": "channel"}, {"BIGRAM_VOCAB_SIZE": 50},
    {"TRIGRAM_VOCAB_SIZE": 50}, {"VE_LAYERS": "0,3"}, {"X0_RESIDUAL": 1, "PARALLEL_RESIDUAL": "none"},
    {"X0_RESIDUAL": 1, "PARALLEL_RESIDUAL": "one"}, {"UNET_SKIPS": "none"}, {"UNET_SKIPS": "plain"}, {"PARALLEL_RESIDUAL": "none"},
    {"PARALLEL_RESIDUAL": "one"}, {"PARALLEL_FINAL_LANE": "attn"}, {"PARALLEL_FINAL_LANE": "mlp"}, {"MLP_ACT": "relu2"},
    {"TIE_EMBEDDINGS": 0}, {"LN_SCALE": 0}, {"LOGIT_SOFTCAP": 0, "TTT_ASYM_LOGIT": 0}, {"NUM_LOOPS": 0}, {"XSA_LAST_N": 0}, {"ROPE_DIMS": 0},
    {"DOC_ISOLATION": 0, "TTT_METHOD": "chunk"}, {"LOADER": "sequential"}, {"LOADER": "coprime"}, {"TRAIN_SEQ_SCHEDULE": "16:.5"}, {"TRAIN_BATCH_SCHEDULE": ""}, {"MUON_COEFFICIENTS": "quintic"},
    {"MUON_ROW_NORMALIZE": 0}, {"MUON_NORMALIZE_UPDATE": 1}, {"AVERAGE": "none"}, {"AVERAGE": "swa"}, {"QUANTIZER": "rtn"},
    {"GATED_ATTN_QUANT_GATE": 1}, {"LQER_TOP_K": 2}, {"STEP_RULE": "sdclip"}, {"STEP_RULE": "fisher"}, {"TIE_EMBEDDINGS": 0, "LQER_TOP_K": 2},
    {"WEIGHT_CODER": "sections", "STEP_RULE": "fisher"}, {"COMPRESSOR": "lzma"}, {"TTT_METHOD": "none"}, {"TTT_METHOD": "chunk"},
    {"TTT_METHOD": "chunk", "TTT_OPTIMIZER": "adamw", "TTT_PARAMS": "last", "TTT_POLYAK": 0.9, "TTT_BYTE_WEIGHTED": 1},
    {"TTT_METHOD": "chunk", "TTT_PARAMS": "control"}, {"TTT_CACHE": "recompute"}, {"TTT_ASYM_LOGIT": 0},
    {"TTT_LORA_SITES": "qkvomh"}, {"TTT_WARM_START_A": 0}, {"TTT_BETA1": 0.9}, {"PHASED_TTT_NUM_PHASES": 0},
    {"PHASED_TTT_NUM_PHASES": 3, "PHASED_TTT_PLAN": "prefix", "PHASED_TTT_PREFIX_DOCS": 3}, {"MIXER": "ubtp"}, {"MIXER": "p", "TTT_METHOD": "none"}, {"NGRAM_TILT_BOOST": 0},
    {"SLIDING_WINDOW_ENABLED": 1}, {"DOC_LOSSES": 1}]


@pytest.mark.parametrize("env", CHOICES, ids=lambda e: " ".join(f"{k}={v}" for k, v in e.items()))
def test_every_choice_lives_three_steps(env, shards, tmp_path):
    check_life(toy("record", ITERATIONS=3, DATA_PATH=shards, **env), tmp_path)


def test_the_list_of_choices_is_complete():
    """Every value of every enumerated knob and both states of every toggle are lived somewhere above."""
    elsewhere = {"mode", "preset", "attn_backend", "compile_scope", "kernels", "fp8", "track"}  # processes, presets and kernels have tests of their own
    lived = [config(PRESET="record"), *(toy("record", **env) for env in CHOICES)]
    for f in dataclasses.fields(tg.Config):
        values = {getattr(cfg, f.name) for cfg in lived}
        if f.name in elsewhere or f.name == "compressor":
            continue
        if f.metadata["choices"]:
            assert values == set(f.metadata["choices"]), f.name
        elif isinstance(f.default, bool) and f.name not in ("deterministic", "ttt_enabled"):
            assert values == {True, False}, f.name


# ----------------------------------------------------------------------------------------------------------------------
# Soundness of every preset's adaptive score, mixers and tilt included
# ----------------------------------------------------------------------------------------------------------------------
LENGTHS = (11, 25, 3, 14, 1, 30, 8, 19, 22, 6, 17, 12)


def sound(preset, tmp_path):
    """(score of a validation set, config): a lively network of few words, hints easy to come by."""
    cfg = toy(preset, VOCAB_SIZE=16, NGRAM_TILT_THRESHOLD=0.05, NGRAM_TILT_ORDER=1, EVAL_SEQ_LEN=16, EVAL_STRIDE=8, TRAIN_SEQ_LEN=16,
              TTT_CHUNK_TOKENS=40, TTT_BATCH_TOKENS=32, TTT_LORA_LR=0.01, GLOBAL_TTT_LR=0.02, TTT_LR=0.01)
    run = make_run(tmp_path, cfg)
    model = tg.build_model(cfg, run)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.looping = cfg.num_loops > 0

    def score(docs):
        if cfg.ttt_method == "lora":
            return tg.score_documents(model, docs, cfg, run, 0.0)
        return tg.score_adapting(model, docs, cfg, run)
    return score, cfg


def documents(cfg):
    docs = Documents(LENGTHS, vocab=12)  # few words, so that counting experts have something to say
    if not cfg.doc_isolation:
        docs.isolate, docs.sequences = False, np.array([[0, docs.targets]])
    return docs


@pytest.mark.parametrize("preset", SEEDS + ("record",))
def test_a_position_gives_the_vocabulary_a_mass_of_one(preset, tmp_path):
    """Every possible next token in turn, everything else equal: their probabilities add up to 1."""
    score, cfg = sound(preset, tmp_path)
    at, mass = 117, 0.0
    for token in range(cfg.vocab_size):
        docs = documents(cfg)
        docs.tokens[at + 1] = token
        mass += math.exp(-score(docs).nats[at])
    assert mass == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("preset", SEEDS + ("record",))
@pytest.mark.parametrize("at", [2, 37, 90, 150])
def test_no_score_knows_a_token_that_comes_later_in_its_order(preset, at, tmp_path):
    """Another token at one place changes only its own score, its document's later ones, and those of later moments."""
    score, cfg = sound(preset, tmp_path)
    docs, other = documents(cfg), documents(cfg)
    other.tokens[at + 1] = 2 + (other.tokens[at + 1] + 3) % 9
    changed = np.abs(score(docs).nats - score(other).nats) > 1e-9
    here = np.arange(docs.targets)
    if cfg.ttt_method == "lora":
        moment = tg.planned_moments(tg.document_plan(docs.sequences, cfg), docs.targets)
        start, end = next(s for s in docs.sequences if s[0] <= at < s[1])
        may = (moment > moment[at]) | ((here >= at) & (here < end))
    else:
        may = here >= at
    assert not (changed & ~may).any() and changed[at]
    assert at == 150 or (changed & (here != at)).any(), "it is context, or adaptation carries it on"


# ----------------------------------------------------------------------------------------------------------------------
# Single techniques against their definitions
# ----------------------------------------------------------------------------------------------------------------------
def test_trigram_buckets():
    """Three-token keys with int32 wrap-around; a segment's first two tokens share the last bucket."""
    ids = torch.randint(0, 8192, (200,), generator=torch.Generator().manual_seed(0))
    module = tg.NgramHash(3, 1000, 4, 4)
    with torch.no_grad():
        module.table.weight.copy_(torch.arange(1000.)[:, None].expand(1000, 4))
        module.proj.weight.copy_(torch.eye(4))
        module.scale.fill_(1)
    got = module(ids, torch.arange(200), torch.float32)[:, 0].long().tolist()
    for i, bucket in enumerate(got):
        key = np.int32((36313 * int(ids[i])) ^ (27191 * int(ids[i - 1])) ^ (51497 * int(ids[i - 2])))
        assert bucket == (999 if i < 2 else int(key) % 999)


def test_channel_smear_is_a_mean_of_neighbours():
    smear = tg.ChannelSmear(4)
    with torch.no_grad():
        smear.gate.copy_(torch.tensor([0.0, 100.0, -100.0, 0.0]))
    x = torch.arange(12.).view(3, 4)
    y = smear(x, torch.tensor([1, 5, 6]), torch.arange(3)).detach()
    assert torch.allclose(y[:, 0], torch.tensor([0.0, 2.0, 6.0])) and torch.allclose(y[:, 1], torch.tensor([0.0, 1.0, 5.0]))
    assert torch.allclose(y[:, 2], x[:, 2])


@pytest.mark.parametrize("counts", [[7], [10, 1, 25], [3, 0, 8], [40, 40, 41]])
def test_coprime_order_visits_every_block_once(counts):
    order = tg.coprime_order(counts, 6, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(sum(counts)))
    assert order.tolist() != sorted(order.tolist()) or sum(counts) < 8
    assert order.tolist() == tg.coprime_order(counts, 6, np.random.default_rng(0)).tolist()


def test_coprime_steps_draw_from_many_shards():
    counts = [200] * 8
    order = tg.coprime_order(counts, 48, np.random.default_rng(1))
    steps = (order[:1584].reshape(-1, 48) // 200)
    assert all(len(set(step)) >= 6 for step in steps[:-4])


@pytest.mark.parametrize("rank, group", [(2, 16), (4, 8), (64, 5)])
def test_lqer_lowers_the_error_and_comes_back(rank, group, tmp_path, shards):
    """The corrected tensors are those of largest error, their factors are 2- and 4-bit, and the file returns W + a b."""
    cfg = toy("record", LQER_TOP_K=2, LQER_RANK=rank, LQER_ASYM_GROUP=group, QUANTIZER="rtn", MATRIX_BITS=3, DATA_PATH=shards)
    run = make_run(tmp_path, cfg)
    model = tg.build_model(cfg, run)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tensors, _ = tg.Quantizer(model, cfg, {}, run).solve()
    plain = {n: t for n, t in tensors.items() if "#" not in n}
    errors = {n: float((dict(model.named_parameters())[n].detach() - t.dense()).norm()) for n, t in plain.items()}
    corrected = {n.removesuffix(tg.LOW_A) for n in tensors if n.endswith(tg.LOW_A)}
    assert corrected == set(sorted(errors, key=errors.get)[-2:])
    for n in corrected:
        a, b = tensors[n + tg.LOW_A].q, tensors[n + tg.LOW_B].q
        assert set(a.unique().tolist()) <= {-2, -1, 0, 1} and -8 <= int(b.min()) and int(b.max()) <= 7
    data, _ = tg.build_artifact(tensors, {}, {}, ["zlib"])
    _, weights = tg.read_artifact(data)
    assert set(weights) == set(plain)
    for n, t in plain.items():
        w = dict(model.named_parameters())[n].detach()
        assert (float((w - weights[n]).norm()) < errors[n]) if n in corrected else torch.equal(weights[n], t.dense())


def test_gates_as_int8_rows(tmp_path):
    cfg = toy("record", GATED_ATTN_QUANT_GATE=1)
    run = make_run(tmp_path, cfg)
    model = tg.build_model(cfg, run)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "gate.weight" in n:
                p.normal_()
    tensors, _ = tg.Quantizer(model, cfg, {}, run).solve(coarser=3.0)
    name = "blocks.0.attn.gate.weight"
    w = dict(model.named_parameters())[name].detach()
    assert int(tensors[name].q.abs().max()) == 127, "the largest of a row is kept, coarsened or not"
    assert float((tensors[name].dense() - w).abs().max()) <= float(w.abs().max()) / 127


def test_updates_with_unit_rows():
    """MUON_NORMALIZE_UPDATE: whatever the shape, every row of a first update has length lr."""
    cfg = toy("record", MUON_NORMALIZE_UPDATE=1, MUON_WD=0)
    w = torch.nn.Parameter(torch.zeros(48, 16))
    w.grad = torch.randn(48, 16)
    muon = tg.Muon([(w, ())], cfg, types.SimpleNamespace(world=1, rank=0))
    shards, _ = muon.reduce()
    muon.step(shards, torch.ones(()), 0.1, 0.0)
    assert torch.allclose(w.detach().norm(dim=1), torch.full((48,), 0.1), rtol=1e-4)


def test_layers_of_value_embeddings_are_checked():
    for text in ("a", "1,", "4"):
        with pytest.raises(tg.ConfigError, match="VE_LAYERS"):
            toy("record", VE_LAYERS=text)
