"""The network: what a score may depend on, that toggles do what their papers say, that no parameter is lost or dead.

Every check runs with all parameters pushed away from their zero or identity start: a zero output projection would hide
any leak behind it. The checks that matter are run once more on leaks planted on purpose, which they must find.
"""
import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
import torch
from toy import lively, one_thread, run, small, tg  # noqa: F401 (fixtures)


# lanes from the loop's first layer on: those that begin inside it would be lost where the loop starts again, which is refused
VALUES_MIX = dict(value_residual="mix", num_loops=2, parallel_residual="two", parallel_start_layer=1,
                  bigram_vocab_size=37)
COMBINATIONS = [
    VALUES_MIX, dict(VALUES_MIX, value_residual="sigmoid", loop_start=0, loop_end=3, parallel_start_layer=0),
    dict(VALUES_MIX, xsa_last_n=0),
    dict(bigram_vocab_size=37, smear_gate="none", tie_embeddings=False), dict(bigram_vocab_size=37, smear_gate="post"),
    dict(parallel_residual="one", attn_gate="dense", unet_skips="plain"), dict(num_loops=0, unet_skips="none"),
    dict(parallel_residual="two", parallel_start_layer=0), dict(rope_dims=0, logit_softcap=0, ttt_asym_logit=False, num_kv_heads=4, xsa_last_n=2),
    dict(trigram_vocab_size=37, bigram_vocab_size=37, smear_gate="channel", ve_layers="1,3", ve_dim=8),
    dict(num_kv_heads=1, ln_scale=False, num_layers=5, num_loops=3, loop_start=2, loop_end=2)]


def toggles():
    """One change to the record each: every value of every enum and boolean of ModelKnobs, so a new one is tested too."""
    for f in dataclasses.fields(tg.ModelKnobs):
        for value in f.metadata["choices"] or ((False, True) if type(f.default) is bool else ()):
            yield {f.name: value} | ({"parallel_residual": "one"} if (f.name, value) == ("x0_residual", True) else {})


VARIANTS = [*toggles(), *COMBINATIONS]


def name(knobs):
    """The id of a parametrised case; other arguments keep pytest's own."""
    return None if not isinstance(knobs, dict) else ",".join(f"{k}={v}" for k, v in knobs.items()) or "record"


# one-token segments, an empty one (padding of the borders), lengths off every block size
BORDERS = (0, 1, 8, 19, 20, 20, 33)
DOCUMENTS = (0, 8, 20)  # these segments begin a document; the others continue one that was split
PROBES = (0, 1, 4, 7, 8, 12, 18, 19, 20, 26, 31)


def make_row(run, borders=BORDERS, documents=DOCUMENTS, seed=0):
    """A flat row of random tokens with BOS at `documents`."""
    tokens = np.random.default_rng(seed).integers(2, 64, borders[-1] + 1)
    tokens[list(documents)] = tg.BOS
    return tg.make_batch(tokens[:-1], tokens[1:], np.array(borders, np.int32), max(np.diff(borders)), run)


@torch.no_grad()
def moved(model, batch, t):
    """Which scores change, by any amount, when the input token at t does (targets stay, so a score's own target too)."""
    before = model.nll(*batch)
    ids = batch.ids.clone()
    ids[t] = 2 + (ids[t] + 17) % 62 if ids[t] != tg.BOS else 5
    return model.nll(*batch._replace(ids=ids)) != before


def check_reach(model, batch, probes=PROBES):
    """A token moves its own score and some later one of its segment, and nothing before it or in another segment."""
    borders = batch.cu.tolist()
    for t in probes:
        end = min(b for b in borders if b > t)
        hit = moved(model, batch, t)
        outside = torch.cat([hit[:t], hit[end:]])
        assert not outside.any(), f"token {t} moves scores {hit.nonzero().flatten().tolist()} of [{t}, {end})"
        assert hit[t], f"token {t} does not move the score of what follows it"
        assert t + 1 == end or hit[t + 1:end].any(), f"token {t} moves no later score: attention is dead"


# ----------------------------------------------------------------------------------------------------------------------
# Causality and isolation
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attend", [tg.attention_sdpa, tg.attention_eager], ids=["sdpa", "eager"])
@pytest.mark.parametrize("knobs", VARIANTS, ids=name)
def test_scores_depend_only_on_earlier_tokens_of_their_segment(knobs, attend, run):
    cfg = small(**knobs)
    for looping in (True, False):
        check_reach(lively(cfg, attend, looping), make_row(run), PROBES if looping else PROBES[2:8:3])


def test_a_target_moves_only_its_own_score(run):
    model, batch = lively(small(bigram_vocab_size=37)), make_row(run)
    targets = batch.targets.clone()
    targets[12] = 2 + (targets[12] + 17) % 62
    with torch.no_grad():
        hit = model.nll(*batch) != model.nll(*batch._replace(targets=targets))
    assert hit.nonzero().flatten().tolist() == [12]


def test_without_isolation_windows_share_documents_but_nothing_leaves_a_window(run):
    """DOC_ISOLATION=0: borders every 16 tokens; within a window a new document sees the old one, by attention only."""
    tokens = np.random.default_rng(0).integers(2, 64, 49)
    tokens[[0, 8, 16, 30]] = tg.BOS
    cu = tg.cut_segments(tokens[:-1], np.array([0]), 16, False)
    assert cu.tolist() == [0, 16, 32, 48]
    batch = tg.make_batch(tokens[:-1], tokens[1:], cu, 16, run)
    together = dict(doc_isolation=False, ttt_method="chunk")
    check_reach(lively(small(**together, bigram_vocab_size=37)), batch, (0, 5, 7, 15, 16, 29, 31, 32, 47))
    model = lively(small(**together))
    assert moved(model, batch, 5)[8:16].any()
    # smearing still stops at a document's first token: with attention silenced, nothing passes the border
    for block in model.blocks:
        block.attn.o.weight.data.zero_()
    assert moved(model, batch, 6)[7] and not moved(model, batch, 7)[8:].any()


def whole_row(q, k, v, cu, longest):
    """Attention that forgot the segments."""
    return tg.attention_eager(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), len(q))


def both_ways(q, k, v, cu, longest):
    """Attention that forgot causality."""
    return tg.attention_eager(q.flip(0), k.flip(0), v.flip(0), len(q) - cu.flip(0), longest).flip(0) \
        + tg.attention_eager(q, k, v, cu, longest)


def smear_everything(self, x, ids, pos):
    w = self.weight.to(x.dtype)
    return x + self.scale * torch.sigmoid(x[:, :w.shape[1]] @ w.T) * x.roll(1, 0)


def smear_the_next(self, x, ids, pos):
    return x + self.scale * x.roll(-1, 0) * (pos < pos.roll(-1))[:, None]


def pair_everything(self, ids, pos, dtype, forward=tg.NgramHash.forward):
    return forward(self, ids, torch.ones_like(pos), dtype)


@pytest.mark.parametrize("planted", [
    dict(attend=whole_row), dict(attend=both_ways), dict(owner=tg.Smear, forward=smear_everything),
    dict(owner=tg.Smear, forward=smear_the_next), dict(owner=tg.NgramHash, forward=pair_everything),
], ids=["no segments", "not causal", "smear unmasked", "smear backwards", "bigram over a border"])
def test_a_planted_leak_is_found(planted, run, monkeypatch):
    if "owner" in planted:
        monkeypatch.setattr(planted["owner"], "forward", planted["forward"])
    model = lively(small(bigram_vocab_size=37), planted.get("attend"))
    with pytest.raises(AssertionError, match="moves scores"):
        check_reach(model, make_row(run))


def test_the_mask_of_document_starts_is_needed_inside_a_window(run, monkeypatch):
    """The check of DOC_ISOLATION=0 sees a smear masked by position alone: the fault of PR #1693."""
    forward = tg.Smear.forward
    monkeypatch.setattr(tg.Smear, "forward", lambda self, x, ids, pos: forward(self, x, torch.full_like(ids, 2), pos))
    with pytest.raises(AssertionError):
        test_without_isolation_windows_share_documents_but_nothing_leaves_a_window(run)


# ----------------------------------------------------------------------------------------------------------------------
# Attention backends
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("borders", [(0, 1), (0, 1, 2, 3), (0, 5, 5, 5), (0, 1, 1, 18, 37, 37), (0, 33), BORDERS], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)], ids=str)
def test_sdpa_equals_eager(borders, heads):
    """Values and gradients in fp32, tight enough that one misplaced token shows."""
    rng = torch.Generator().manual_seed(0)
    cu, total = torch.tensor(borders, dtype=torch.int32), borders[-1]
    qkv = [torch.randn(total, h, 8, generator=rng, requires_grad=True) for h in (heads[0], heads[1], heads[1])]
    grad = torch.randn(total, heads[0], 8, generator=rng)
    results = []
    for attend in (tg.attention_sdpa, tg.attention_eager):
        out = attend(*qkv, cu, int(max(np.diff(borders))) + 3)  # static shapes give a longest that no segment reaches
        results.append([out, *torch.autograd.grad(out, qkv, grad)])
    for fast, reference in zip(*results):
        torch.testing.assert_close(fast, reference, atol=2e-6, rtol=1e-5)


def test_a_backend_that_is_wrong_is_not_chosen(run, monkeypatch):
    monkeypatch.setitem(tg.ATTENTION, "sdpa", whole_row)
    assert "differs" in tg.try_attention("sdpa", small(), run)
    assert tg.choose_attention(small(), run) is tg.attention_eager
    with pytest.raises(SystemExit, match="does not work here"):
        tg.choose_attention(small(attn_backend="sdpa"), run)


def test_ranks_with_different_backends_stop(run, monkeypatch):
    """Otherwise seven fast ranks wait for a slow one in every step, and only the first rank's choice is in the log."""
    monkeypatch.setattr(run, "sum_", lambda votes: votes + torch.eye(len(votes))[-1])  # the other rank's: eager
    with pytest.raises(RuntimeError, match="different attention kernels.*'sdpa': 1, 'eager': 1"):
        tg.choose_attention(small(), run)


# ----------------------------------------------------------------------------------------------------------------------
# Parameters: every one matched, started, optimised, alive
# ----------------------------------------------------------------------------------------------------------------------
def test_a_parameter_without_a_row_or_with_two_is_refused(monkeypatch):
    cfg = small()
    model = tg.GPT(cfg)
    table = tg.parameter_table(cfg)
    monkeypatch.setattr(tg, "parameter_table", lambda cfg: table + [tg.Row(r"skip\..*", tg.constant(0))])
    with pytest.raises(RuntimeError, match=r"skip\.weights matches 2 rows"):
        tg.rows_of(model, cfg)
    monkeypatch.setattr(tg, "parameter_table", lambda cfg: table)
    model.blocks[1].attn.novelty = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn\.novelty matches 0 rows"):
        tg.initialize(model, cfg)


def test_a_row_that_does_not_fill_its_parameter_is_refused(monkeypatch):
    cfg = small()
    table = [r._replace(init=lambda w, rng: None) if r.pattern == r"skip\.gates" else r for r in tg.parameter_table(cfg)]
    monkeypatch.setattr(tg, "parameter_table", lambda cfg: table)
    with pytest.raises(RuntimeError, match=r"skip\.gates was not initialised"):
        tg.initialize(tg.GPT(cfg), cfg)


@pytest.mark.parametrize("knobs", VARIANTS, ids=name)
def test_every_parameter_starts_finite_and_receives_a_gradient(knobs, run):
    cfg = small(**knobs)
    model = tg.GPT(cfg)
    for p in model.parameters():
        p.data.fill_(math.nan)
    tg.initialize(model, cfg)
    assert all(p.isfinite().all() for p in model.parameters())
    model = lively(cfg)
    model.nll(*make_row(run)).mean().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead, f"no gradient reaches {dead}"


class TwinRank(tg.Run):
    """One of two ranks that hold equal gradients: what a collective would bring is computed in place."""

    def sum_(self, tensor):
        return tensor.mul_(2)

    def sum_slices(self, bank):
        return 2 * bank[:len(bank) // 2]

    def all_slices(self, shard):
        return torch.cat([shard, shard])


@pytest.mark.parametrize("knobs", [
    dict(parallel_start_layer=4), dict(num_layers=1, xsa_last_n=1, loop_start=0, loop_end=0, parallel_start_layer=0),
    dict(bigram_vocab_size=1)], ids=name)
def test_a_plan_that_leaves_parameters_idle_is_refused_or_trains_on_two_ranks(knobs):
    """Lanes that never begin, skips that only recurrence has, a hash of one bucket: say so, or take a step."""
    try:
        cfg = small(**knobs)
    except tg.ConfigError:
        return
    with mock.patch.dict(tg.HAVE, cuda=False):
        twin = TwinRank(cfg, (0, 0, 1), quiet=True)
    twin.world = 2
    model = tg.GPT(cfg)
    tg.initialize(model, cfg)
    optimizers = tg.Optimizers(model, cfg, twin)
    for looping in (False, True):
        tg.train_step(model, optimizers, [make_row(twin)], tg.Values(1.0, 0.9, looping))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", sorted(tg.GATES))
def test_gates_are_not_matrices(kind, run):
    """Trap of PR #413: a two-dimensional gate that reaches Muon is orthogonalised and decayed as a matrix."""
    cfg = small(attn_gate=kind, bigram_vocab_size=37, value_residual="mix", parallel_residual="two")
    model = tg.GPT(cfg)
    rows, muon = tg.rows_of(model, cfg), tg.Optimizers(model, cfg, run).muon
    assert {rows[n].group for n in rows if ".gate." in n or "smear" in n or "skip" in n or "lane" in n} == {"scalar"}
    matrices = {id(p) for _, members in muon.banks for p, _, _ in members}
    own = {n.rpartition(".weight")[0].rpartition(".")[2] for n, p in model.named_parameters() if id(p) in matrices}
    assert own == {"qkv", "o", "up", "down", "proj"}


def test_muon_sees_queries_keys_and_values_apart(run):
    cfg = small()
    shapes = {shape: len(members) for shape, members in tg.Optimizers(tg.GPT(cfg), cfg, run).muon.banks}
    # 32 x 32: q and o of four layers; 16 x 32: k and v; up and down
    assert shapes == {(32, 32): 8, (16, 32): 8, (64, 32): 4, (32, 64): 4}


def test_queries_keys_and_values_each_start_orthogonal():
    cfg = small()
    model = tg.GPT(cfg)
    tg.initialize(model, cfg)
    for part in model.blocks[0].attn.qkv.weight.detach().split((32, 16, 16)):
        torch.testing.assert_close(part @ part.T, torch.eye(len(part)), atol=1e-5, rtol=0)


def test_seed_decides_the_start():
    def weights(**knobs):
        model = tg.GPT(small(**knobs))
        tg.initialize(model, small(**knobs))
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(weights(), weights())
    assert not torch.equal(weights(), weights(seed=7))


def test_hash_embedding_is_alive_from_the_first_step(run):
    """Trap: a zero table behind a zero projection never receives a gradient."""
    cfg = small(bigram_vocab_size=37)
    model = tg.GPT(cfg)
    tg.initialize(model, cfg)
    bigram = model.input.bigram
    start = [p.detach().clone() for p in (bigram.table.weight, bigram.proj.weight)]
    optimizers = tg.Optimizers(model, cfg, run)
    for step in range(4):
        model.nll(*make_row(run, seed=step)).mean().backward()
        if step == 0:
            assert bigram.table.weight.grad.any() or bigram.proj.weight.grad.any()
        optimizers.step(tg.Values(1.0, 0.9, False))
        model.zero_grad()
    for before, after in zip(start, (bigram.table.weight, bigram.proj.weight)):
        assert (after - before).norm() > 1e-3


def test_hash_wraps_like_32_bit_integers(run):
    """The bucket of a pair as the field's scripts compute it, with tokens large enough to overflow."""
    model = tg.NgramHash(2, 1000, 4, 4)
    ids = torch.tensor([65535, 64000, 3, 65535])
    with torch.no_grad():
        model.table.weight.copy_(torch.arange(1000.)[:, None].expand(-1, 4))
        model.proj.weight.copy_(torch.eye(4))
        model.scale.fill_(1)
        got = model(ids, torch.tensor([0, 1, 2, 0]), torch.float32)[:, 0].long().tolist()

    def bucket(now, before):
        with np.errstate(over="ignore"):
            mixed = (np.int32(36313) * np.int32(now)) ^ (np.int32(27191) * np.int32(before))
        return int(mixed) % 999

    assert got == [999, bucket(64000, 65535), bucket(3, 64000), 999]


# ----------------------------------------------------------------------------------------------------------------------
# Traps and identities
# ----------------------------------------------------------------------------------------------------------------------
def test_rotary_tables_stay_fp32_and_tell_neighbours_apart(run):
    """Trap: in bf16, 2,048 positions collapse to 641."""
    cfg = small(train_seq_len=2048, eval_seq_len=2048, pack_tokens=4096, train_batch_tokens=4096, val_batch_tokens=4096)
    with mock.patch.object(run, "dtype", torch.bfloat16):
        model = tg.build_model(cfg, run)
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "masters are fp32"
    cos, sin = model.rotary(torch.arange(2048))
    assert cos.dtype == sin.dtype == torch.float32
    assert len(torch.unique(torch.cat([cos, sin], -1).flatten(1), dim=0)) == 2048
    x = torch.ones(2, 1, 8, dtype=torch.bfloat16)
    early, late = tg.rotate(x, model.rotary(torch.tensor([2000, 2001])))
    assert early.dtype == torch.bfloat16 and not torch.equal(early[:, :4], late[:, :4])
    assert torch.equal(early[:, 4:], x[0, :, 4:]), "channels beyond ROPE_DIMS carry no position"


@pytest.mark.parametrize("knobs, plain", [
    (dict(attn_gate="out"), dict(attn_gate="none")), (dict(smear_gate="pre"), dict(smear_gate="none")),
    (dict(smear_gate="post"), dict(smear_gate="none")), (dict(attn_gate="scalar"), dict(attn_gate="none")),
], ids=name)
def test_identity_at_the_start(knobs, plain, run):
    """These toggles change no bit of a model whose other weights are equal, until they are trained."""
    def score(switched, base):
        model, cfg = tg.GPT(small(**switched)), small(**switched)
        tg.initialize(model, cfg)
        params = dict(model.named_parameters())
        for n, p in base.named_parameters():
            if n in params and not n.startswith("input.smear"):
                params[n].data.copy_(p.data)
        return model.nll(*make_row(run))
    base = lively(small(**plain))
    assert torch.equal(score(knobs, base), score(plain, base))


def test_excluded_self_is_orthogonal_to_the_own_value():
    rng = torch.Generator().manual_seed(0)
    y, v = torch.randn(9, 4, 8, generator=rng), torch.randn(9, 2, 8, generator=rng)
    out = tg.exclude_self(y, v)
    assert (out * v.repeat_interleave(2, 1)).sum(-1).abs().max() < 1e-5
    assert (out - y).abs().max() > 0.1
    assert tg.exclude_self(y, torch.zeros_like(v)).equal(y), "a zero value removes nothing, and is no NaN"


def test_plan_of_the_record():
    cfg = tg.load_config({"PRESET": "record"}, False)
    plan = tg.layer_plan(cfg, True)
    assert [v.layer for v in plan if v.push] == [0, 1, 2, 3, 4, 5, 3, 4]
    assert [v.layer for v in plan if not v.push] == [5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [v.skip for v in plan if not v.push] == [0, 1, 2, 3, 4, 5, 6, 7, None]
    assert [v.layer for v in plan if v.lanes] == [8, 9, 10]
    short = tg.layer_plan(cfg, False)
    assert [(v.layer, v.skip) for v in short if not v.push] == [(5, 0), (6, 1), (7, 2), (8, 3), (9, 4), (10, None)]
    with torch.device("meta"):
        assert tg.GPT(cfg).skip.weights.shape == (8, 512)


EIGHT = dict(num_heads=8, num_kv_heads=4)  # as published


@pytest.mark.parametrize("knobs, count", [
    (dict(), 38828683), (dict(mlp_mult=4.0, attn_gate="out", **EIGHT), 35945671), (dict(preset="baseline"), 17059912),
    (dict(mlp_mult=4.0, parallel_residual="one", smear_gate="post", attn_gate="out", **EIGHT), 35945605)], ids=name)
def test_parameter_counts(knobs, count):
    env = {"PRESET": "record", **{k.upper(): v for k, v in knobs.items()}}
    with torch.device("meta"):
        model = tg.GPT(tg.load_config(env, False))
    assert sum(p.numel() for p in model.parameters()) == count


# ----------------------------------------------------------------------------------------------------------------------
# The same network once more, from the formulas: plain fp64 loops over tokens and heads
# ----------------------------------------------------------------------------------------------------------------------
def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1.2e-7)


class Reference:
    """nll of one flat row, token by token and head by head, straight from the techniques' definitions."""

    def __init__(self, cfg, model):
        self.c = cfg
        self.w = {n: p.detach().double().numpy() for n, p in model.named_parameters()}

    def smear(self, x, ids, starts, where):
        """x_t + lambda sigmoid(w x_t[:12]) x_{t-1}, not into a segment's first token and not into a BOS."""
        w, lam = self.w[f"input.smear_{where}.weight"][0], self.w[f"input.smear_{where}.scale"][0]
        return np.stack([x[t] + (lam * sigmoid(w @ x[t, :12]) * x[t - 1] if starts[t] != t and ids[t] != 1 else 0)
                         for t in range(len(x))])

    def pair(self, ids, starts, t):
        rows = self.c.bigram_vocab_size
        bucket = ((36313 * ids[t]) ^ (27191 * ids[t - 1])) % (rows - 1) if starts[t] != t else rows - 1
        return self.w["input.bigram.scale"][0] * self.w["input.bigram.proj.weight"] @ self.w["input.bigram.table.weight"][bucket]

    def inputs(self, ids, starts):
        x = self.w["input.tok_emb.weight"][ids]
        if self.c.bigram_vocab_size:
            x = x + np.stack([self.pair(ids, starts, t) for t in range(len(ids))])
        if self.c.smear_gate == "pre":
            x = self.smear(x, ids, starts, "before")
        x = rms(x)
        return self.smear(x, ids, starts, "after") if self.c.smear_gate == "post" else x

    def turn(self, x, place):
        """y1 = x1 cos + x2 sin, y2 = -x1 sin + x2 cos on the first rope_dims channels, halves against each other."""
        half, y = self.c.rotary_dims // 2, x.copy()
        for j in range(half):
            angle = place * self.c.rope_base ** (-2 * j / self.c.rotary_dims)
            y[j] = x[j] * math.cos(angle) + x[j + half] * math.sin(angle)
            y[j + half] = -x[j] * math.sin(angle) + x[j + half] * math.cos(angle)
        return y

    def values(self, layer, own, first):
        block = f"blocks.{layer}.attn.value_mix"
        if self.c.value_residual == "none" or layer == 0:
            return own
        if self.c.value_residual == "mix":
            return self.w[f"{block}.lambdas"][0] * first + self.w[f"{block}.lambdas"][1] * own
        return own + sigmoid(self.w[f"{block}.alpha"][0]) * first

    def gate(self, layer, x):
        """Factors of the heads for one token's attention input."""
        w, b = (self.w.get(f"blocks.{layer}.attn.gate.{n}") for n in ("weight", "bias"))
        return {"none": lambda: np.ones(self.c.num_heads), "scalar": lambda: b, "dense": lambda: sigmoid(w @ x + b),
                "out": lambda: 2 * sigmoid(w @ x[:12]), "sparse": lambda: sigmoid(0.5 * (w @ x[:12]))}[self.c.attn_gate]()

    def attention(self, layer, x, starts, first):
        """(outputs, unmixed values of this layer)"""
        c, block, E = self.c, f"blocks.{layer}.attn", self.c.head_dim
        H, K = c.num_heads, c.num_kv_heads
        qkv = np.stack([self.w[f"{block}.qkv.weight"] @ row for row in x]).reshape(len(x), H + 2 * K, E)
        q, k, own = np.split(qkv, (H, H + K), 1)
        v, out = self.values(layer, own, first), []
        for t in range(len(x)):
            factors, heads = self.gate(layer, x[t]), []
            for h in range(H):
                g, seen = h // (H // K), range(starts[t], t + 1)
                query = self.w[f"{block}.q_gain"][h] * self.turn(rms(q[t, h]), t - starts[t])
                weights = np.exp([query @ self.turn(rms(k[s, g]), s - starts[s]) / math.sqrt(E) for s in seen])
                y = sum(a * v[s, g] for a, s in zip(weights / weights.sum(), seen))
                if layer >= c.num_layers - c.xsa_last_n:
                    unit = v[t, g] / np.linalg.norm(v[t, g])
                    y = y - (y @ unit) * unit
                heads.append(factors[h] * y)
            out.append(self.w[f"{block}.o.weight"] @ np.concatenate(heads))
        return np.stack(out), own

    def mlp(self, layer, x):
        z = x @ self.w[f"blocks.{layer}.mlp.up.weight"].T
        act = np.where(z > 0, z, (0.5 if self.c.mlp_act == "leaky_relu2" else 0.0) * z) ** 2
        return self.w[f"blocks.{layer}.mlp.down.scale"] * (act @ self.w[f"blocks.{layer}.mlp.down.weight"].T)

    def nll(self, ids, targets, borders, order):
        """Blocks in `order`; the first half of the visits is the encoder."""
        c, half, stack, lane, first = self.c, len(order) // 2, [], None, None
        starts = [max(b for b in borders if b <= t) for t in range(len(ids))]
        x = x0 = self.inputs(ids, starts)
        for i, layer in enumerate(order):
            scale = 1 / math.sqrt(layer + 1) if c.ln_scale else 1.0
            if c.unet_skips != "none" and half <= i < 2 * half:
                skip = self.w["skip.weights"][i - half] * stack.pop()
                s = sigmoid(self.w["skip.gates"][i - half]) if c.unet_skips == "gated" else None
                x = x + skip if s is None else (1 - s) * skip + s * x
            mix = self.w[f"blocks.{layer}.resid_mix"]
            base = mix[0] * x + mix[1] * x0
            a, own = self.attention(layer, rms(base) * scale, starts, first)
            a, first = self.w[f"blocks.{layer}.attn.o.scale"] * a, own if first is None else first
            if c.parallel_residual == "two" and i >= half and layer >= c.parallel_start_layer:
                lane = x if lane is None else lane
                b, r, p = self.mlp(layer, rms(lane) * scale), self.w["lane_resid"][layer], self.w["lane_post"][layer]
                x, lane = r[0] * x + p[0, 0] * a + p[0, 1] * b, r[1] * lane + p[1, 0] * a + p[1, 1] * b
            elif c.parallel_residual == "one" and layer >= c.parallel_start_layer:
                x = base + a + self.mlp(layer, rms(base) * scale)
            else:
                x = base + a
                x = x + self.mlp(layer, rms(x) * scale)
            if i < half:
                stack.append(x)
        if lane is not None:
            x = {"mean": (x + lane) / 2, "attn": x, "mlp": lane}[c.parallel_final_lane]
        z = rms(x) @ self.w["input.tok_emb.weight" if c.tie_embeddings else "head.weight"].T
        z = c.logit_softcap * np.tanh(z / c.logit_softcap) if c.logit_softcap else z
        return np.array([math.log(np.exp(row).sum()) - row[y] for row, y in zip(z, targets)])


THREE = dict(num_layers=3, num_loops=0, parallel_start_layer=1, xsa_last_n=3, model_dim=16, num_heads=4, num_kv_heads=2)
ORDERS = {0: [0, 1, 2], 1: [0, 1, 0, 1, 2]}


@pytest.mark.parametrize("knobs", [
    dict(), dict(num_loops=1, loop_start=0, loop_end=1), dict(parallel_final_lane="mlp", xsa_last_n=1),
    dict(attn_gate="out", smear_gate="post", parallel_residual="one"), dict(attn_gate="dense", unet_skips="plain", rope_dims=0),
    dict(attn_gate="scalar", value_residual="mix", num_loops=1, loop_start=0, loop_end=1),
    dict(attn_gate="none", value_residual="sigmoid", bigram_vocab_size=37, mlp_act="relu2", tie_embeddings=False),
    dict(ln_scale=False, logit_softcap=0, ttt_asym_logit=False, unet_skips="none", smear_gate="none", parallel_residual="none"),
], ids=name)
def test_forward_equals_the_formulas(knobs, run):
    cfg = small(**{**THREE, **knobs})
    model, borders = lively(cfg, dtype=torch.float64), (0, 1, 6, 13)
    batch = make_row(run, borders, (0, 6))
    expected = Reference(cfg, model).nll(batch.ids.tolist(), batch.targets.tolist(), borders, ORDERS[cfg.num_loops])
    got = model.nll(*batch).detach().double().numpy()
    assert np.abs(got - expected).max() < 1e-5
    # and the check can tell: one weight nudged by a hundredth is far outside the tolerance
    model.blocks[1].attn.qkv.weight.data[0, 0] += 0.01
    assert np.abs(model.nll(*batch).detach().double().numpy() - expected).max() > 1e-5
