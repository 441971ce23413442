"""Scoring: planted cheats are caught, and every schedule equals a brute-force account of what it should compute.

Positions are targets: position i is the score of tokens[i + 1], predicted from tokens up to i.
"""
import math
from unittest import mock

import numpy as np
import pytest
import torch
import toy
from toy import one_thread, run, tg  # noqa: F401 (fixtures)


SHAPE = dict(vocab_size=64, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2, rope_dims=4,
             xsa_last_n=3, num_loops=1, loop_start=1, loop_end=1, parallel_start_layer=2, bigram_vocab_size=37, bigram_dim=8,
             pack_tokens=64, train_batch_tokens=256, train_seq_len=24, eval_seq_len=24, eval_stride=5, val_batch_tokens=120,
             ttt_method="chunk", ngram_tilt_boost=0, ttt_chunk_tokens=60, ttt_batch_tokens=32, ttt_lr=0.05, ttt_epochs=2)


def small(**knobs):
    return toy.small(**{**SHAPE, **knobs})


# lengths below, at and over the window of 24, on and off the stride of 5; the BOS at the end is a document of no target
LENGTHS = (20, 40, 24, 2, 25, 61, 1, 29, 30, 7)


def validation(isolate=True, lengths=LENGTHS, seed=0, tokens=None):
    """A validation set of random documents, made without a tokenizer: one to four bytes a token."""
    val = tg.ValidationSet.__new__(tg.ValidationSet)
    rng = np.random.default_rng(seed)
    if tokens is None:
        tokens = rng.integers(2, 64, sum(lengths) + 1).astype(np.uint16)
        tokens[np.cumsum((0, *lengths))] = tg.BOS
    val.tokens, val.starts, val.isolate = tokens, np.flatnonzero(tokens == tg.BOS), isolate
    val.targets, val.bytes = len(tokens) - 1, rng.integers(0, 5, len(tokens) - 1)
    return val


def lively(cfg):
    """Recurrence on where there is any, as evaluation has it."""
    return toy.lively(cfg, looping=cfg.num_loops > 0)


class Scorers:
    """Keeps every Scorer that a pass makes, for its single scores."""

    def __init__(self, monkeypatch):
        self.made = made = []
        build = tg.Scorer.__init__
        monkeypatch.setattr(tg.Scorer, "__init__", lambda self, *args: (made.append(self), build(self, *args))[1])

    @property
    def nll(self):
        return self.made[-1].nll


@pytest.fixture
def scorers(monkeypatch):
    return Scorers(monkeypatch)


# ----------------------------------------------------------------------------------------------------------------------
# The ledger alone
# ----------------------------------------------------------------------------------------------------------------------
HONEST = [(0, 10, 0), (5, 15, 10), (10, 18, 15)]


def book(rows, targets=18, before=()):
    ledger = tg.Ledger(targets)
    for part in (*before, rows):
        ledger.score(np.array(part))
    return ledger


def test_honest_windows_are_booked():
    ledger = book(HONEST)
    assert (ledger.when >= 0).all() and "each of 18 tokens scored once" in ledger.verdict()


@pytest.mark.parametrize("before, rows, words", [
    ([HONEST[:1]], HONEST[:1], "second time"),  # scoring again, and keeping the better one
    ([HONEST[:1]], [(3, 13, 9)], "second time"),
    ([], [(0, 10, 0), (5, 15, 9)], "second time"),  # windows whose scored parts overlap
    ([], [(0, 10, 1)], "skipped"), ([], [(0, 10, 0), (5, 15, 11)], "skipped"), ([HONEST[:1]], HONEST[2:], "skipped"),
    ([], [(0, 10, 0), (12, 18, 10)], "does not read"),  # the window begins behind what it scores
    ([], [(0, 19, 0)], "do not exist"),
    ([], [(0, 10, 0), (5, 8, 10)], None),  # ends before it begins: would move the frontier back and free 8 and 9 again
    ([], [(-4, 10, 0)], None),  # a negative start reads the end of the stream, which is the future
], ids=str)
def test_windows_that_cheat_are_refused(before, rows, words):
    with pytest.raises(tg.Violation, match=words):
        book(rows, before=before)


@pytest.mark.parametrize("begin, end", [(0, 16), (15, 18), (16, 16), (-3, 5)], ids=str)
def test_learning_before_scoring_is_refused(begin, end):
    """A negative begin wraps around to the end of the stream."""
    ledger = book(HONEST[:2])
    ledger.learn(0, 15)
    with pytest.raises(tg.Violation):
        ledger.learn(begin, end)
    assert ledger.learned == 15


def test_a_pass_that_leaves_tokens_out_gets_no_verdict():
    with pytest.raises(tg.Violation, match="3 of 18 tokens were never scored"):
        book(HONEST[:2]).verdict()


def test_the_verdict_counts():
    ledger = book(HONEST[:2])
    ledger.learn(0, 10), ledger.learn(10, 15)
    ledger.score(np.array(HONEST[2:]))
    logits, targets = torch.randn(7, 9), torch.arange(7)
    ledger.check_mass(logits, targets, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert ledger.verdict().startswith("each of 18 tokens scored once, left to right; 15 trained on")
    assert "checked at 7 positions" in ledger.verdict()


@pytest.mark.parametrize("cheat", [
    lambda nll: 0.9 * nll, lambda nll: nll - 0.02, lambda nll: torch.where(torch.arange(7) == 3, 0.0, nll),
    lambda nll: nll * math.nan, lambda nll: torch.where(torch.arange(7) == 3, math.nan, nll), lambda nll: nll - math.inf,
], ids=["sharper", "more mass", "one certain", "no number", "one no number", "infinite"])
def test_scores_that_are_not_the_distributions_are_refused(cheat):
    logits, targets = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)), torch.arange(7)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    tg.Ledger(7).check_mass(logits, targets, nll)
    with pytest.raises(tg.Violation):
        tg.Ledger(7).check_mass(logits, targets, cheat(nll))


# ----------------------------------------------------------------------------------------------------------------------
# Cheats planted in the passes
# ----------------------------------------------------------------------------------------------------------------------
def cheat_with_windows(change):
    make = tg.make_windows
    return lambda sequences, length, stride: change(make(sequences, length, stride))


@pytest.mark.parametrize("change", [
    lambda w: np.concatenate([w[:3], w[2:]]), lambda w: np.delete(w, 4, 0), lambda w: w[:-1], lambda w: w[1:], lambda w: w[::-1],
    lambda w: w + (w == w[-1, 1]) * np.array([0, 1, 0]), lambda w: w - np.array([0, 0, 1]) * (w[:, 2:] > w[:, :1]),
    lambda w: w - np.array([3, 0, 0]) * (np.arange(len(w)) == 0)[:, None],
], ids=["rescored", "skipped", "tail left out", "head left out", "backwards", "past the end", "overlapping", "before the start"])
@pytest.mark.parametrize("adapting", [False, True], ids=["sliding", "ttt"])
def test_a_schedule_that_cheats_stops_the_pass(change, adapting, run, monkeypatch):
    cfg, val = small(), validation()
    monkeypatch.setattr(tg, "make_windows", cheat_with_windows(change))
    with pytest.raises(tg.Violation):
        tg.score_adapting(lively(cfg), val, cfg, run) if adapting else tg.score_windows(lively(cfg), val, cfg, run, 5)


@pytest.mark.parametrize("reach", [1, 40], ids=["one token", "the next chunk"])
def test_training_past_the_scored_tokens_stops_the_pass(reach, run, monkeypatch):
    learn = tg.Adapter.learn
    monkeypatch.setattr(tg.Adapter, "learn", lambda self, begin, end, lr: learn(self, begin, end + reach, lr))
    with pytest.raises(tg.Violation, match="before it is scored"):
        tg.score_adapting(lively(small()), validation(), small(), run)


def test_training_before_scoring_stops_the_pass(run, monkeypatch):
    """The order of a chunk turned round: adapt first, then score."""
    held = []
    score, adapter = tg.Scorer.score, tg.Adapter.__init__
    monkeypatch.setattr(tg.Adapter, "__init__", lambda self, *args: (held.append(self), adapter(self, *args))[1])

    def learn_then_score(self, windows):
        held[-1].learn(int(windows[0, 2]), int(windows[-1, 1]), 0.1)
        score(self, windows)

    monkeypatch.setattr(tg.Scorer, "score", learn_then_score)
    with pytest.raises(tg.Violation, match="before it is scored"):
        tg.score_adapting(lively(small()), validation(), small(), run)


@pytest.mark.parametrize("cheat", [
    lambda z, y: z.logsumexp(-1) - 1.1 * z.gather(-1, y[:, None])[:, 0],
    lambda z, y: z.logsumexp(-1) - z.gather(-1, y[:, None])[:, 0] - 0.05,
    lambda z, y: z[:, :32].logsumexp(-1) - z.gather(-1, y[:, None])[:, 0],
    lambda z, y: -torch.maximum(z.log_softmax(-1), (2 * z).log_softmax(-1)).gather(-1, y[:, None])[:, 0],
], ids=["own logit raised", "bonus", "half the vocabulary", "better of two experts"])
@pytest.mark.parametrize("how", ["full", "ttt"])
def test_a_head_that_is_no_distribution_stops_the_pass(cheat, how, run, monkeypatch):
    monkeypatch.setattr(tg, "softcapped_nll", lambda logits, targets, cap: cheat(tg.soft_cap(logits.float(), cap), targets))
    cfg = small()
    with pytest.raises(tg.Violation, match="normalised distribution"):
        tg.score_adapting(lively(cfg), validation(), cfg, run) if how == "ttt" else \
            tg.score_windows(lively(cfg), validation(), cfg, run, 24)


def test_weights_that_are_no_numbers_get_no_score(run):
    """A model of NaN has no distribution; its pass must not end in a verdict."""
    model = lively(small())
    model.blocks[0].attn.qkv.weight.data[0, 0] = math.nan
    with pytest.raises(tg.Violation):
        tg.score_windows(model, validation(), small(), run, 24)


# ----------------------------------------------------------------------------------------------------------------------
# Windows
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("length, stride", [(24, 24), (24, 5), (24, 1), (24, 23), (7, 3), (100, 10)], ids=str)
@pytest.mark.parametrize("isolate", [True, False], ids=["documents", "stream"])
def test_windows_score_everything_once_inside_their_sequence(length, stride, isolate):
    val = validation(isolate)
    windows = tg.make_windows(val.sequences, length, stride)
    scored = np.concatenate([np.arange(first, end) for _, end, first in windows])
    assert scored.tolist() == list(range(val.targets))
    assert (windows[:, 1] - windows[:, 0] <= length).all() and (windows[:, 2] < windows[:, 1]).all()
    owner = np.searchsorted(val.sequences[:, 0], windows[:, :2] - [0, 1], side="right")
    assert (owner[:, 0] == owner[:, 1]).all(), "a window lies in one sequence"


@pytest.mark.parametrize("tokens", [1, 60, 100, 10 ** 6])
def test_chunks_are_the_windows_in_order(tokens):
    windows = tg.make_windows(validation().sequences, 24, 5)
    chunks = tg.group_chunks(windows, tokens)
    assert np.concatenate(chunks).tolist() == windows.tolist()
    ends = np.cumsum([(c[:, 1] - c[:, 2]).sum() for c in chunks])
    assert all(end >= tokens * (i + 1) for i, end in enumerate(ends[:-1])), "chunk i ends at or behind i * TTT_CHUNK_TOKENS"


# ----------------------------------------------------------------------------------------------------------------------
# Scores against brute force
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def nll_alone(model, val, start, position):
    """The score of one position by a forward pass over its own context and nothing else."""
    ids, targets = (torch.from_numpy(val.tokens[start + d:position + 1 + d].astype(np.int64)) for d in (0, 1))
    n = len(ids)
    return float(model.nll(ids, targets, torch.arange(n), torch.tensor([0, n], dtype=torch.int32), n)[-1])


def context_start(position, begin, length, stride):
    """Where the window that scores this position starts: the first one, else the earliest that reaches it by stride."""
    start = begin
    while position >= start + length:
        start += stride
    return start


@pytest.mark.parametrize("isolate", [True, False], ids=["documents", "stream"])
@pytest.mark.parametrize("stride", [5, 24])
def test_scores_equal_brute_force(isolate, stride, run, scorers):
    """Every position from its own window, by a direct call; and the sums recomputed by hand in fp64."""
    cfg, val = small(doc_isolation=isolate), validation(isolate)
    model = lively(cfg)
    score = tg.score_windows(model, val, cfg, run, stride)
    begins = [max(a for a, _ in val.sequences if a <= i) for i in range(val.targets)]
    expected = [nll_alone(model, val, context_start(i, begins[i], 24, stride), i) for i in range(val.targets)]
    np.testing.assert_allclose(scorers.nll.numpy(), expected, atol=1e-5)
    nats = sum(float(x) for x in scorers.nll)
    assert score.val_loss == pytest.approx(nats / val.targets, rel=1e-12)
    assert score.val_bpb == pytest.approx(nats / math.log(2) / sum(int(b) for b in val.bytes), rel=1e-12)
    assert f"each of {val.targets} tokens scored once" in score.verdict and "; 0 trained on" in score.verdict


def test_full_windows_are_sliding_ones_with_the_windows_stride(run, scorers):
    cfg, val = small(eval_stride=24, sliding_window_enabled=True), validation()
    model = lively(cfg)
    results = tg.evaluate(model, val, cfg, run)
    full, sliding = (s.nll for s in scorers.made[:2])
    assert torch.equal(full, sliding)
    assert results["full"].val_bpb == results["sliding"].val_bpb and list(results) == ["full", "sliding", "ttt"]


def test_a_smaller_stride_gives_more_context(run, scorers):
    """Only positions behind a document's first window change; there the context is at least length - stride."""
    cfg, val = small(), validation(lengths=(24, 61))
    tg.score_windows(lively(cfg), val, cfg, run, 24)
    full = scorers.nll
    tg.score_windows(lively(cfg), val, cfg, run, 5)
    assert torch.allclose(full[:48], scorers.nll[:48], atol=1e-5)
    assert not torch.isclose(full[48:], scorers.nll[48:], atol=1e-5).any()


def test_the_number_of_rows_does_not_matter(run, scorers):
    """One row with all windows, or a row a window."""
    val, scores = validation(), []
    for tokens in (24, 100, 100000):
        cfg = small(val_batch_tokens=tokens)
        tg.score_windows(lively(cfg), val, cfg, run, 5)
        scores.append(scorers.nll)
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], atol=1e-5, rtol=0)


def test_ranks_share_rows_and_add_up(run, scorers):
    """Each of three ranks scores its rows and leaves zeros elsewhere; their sum is the score of one rank."""
    cfg, val = small(), validation()
    model = lively(cfg)
    tg.score_windows(model, val, cfg, run, 5)
    alone, parts = scorers.nll, []
    windows = tg.make_windows(val.sequences, 24, 5)
    for rank in range(3):
        with mock.patch.multiple(run, rank=rank, world=3):
            scorer = tg.Scorer(model, val, cfg, run)
            scorer.score(windows)
            parts.append(scorer.nll)
    assert torch.equal(sum(parts), alone)
    assert all(p.any() for p in parts) and not any((a * b).any() for a, b in ((parts[0], parts[1]), (parts[1], parts[2])))


# ----------------------------------------------------------------------------------------------------------------------
# Test-time training
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_adapting_with_no_step_is_the_sliding_score(optimizer, run, scorers):
    cfg, val = small(ttt_lr=0, ttt_optimizer=optimizer), validation()
    model = lively(cfg)
    tg.score_windows(model, val, cfg, run, 5)
    sliding = scorers.nll
    score = tg.score_adapting(model, val, cfg, run)
    torch.testing.assert_close(scorers.nll, sliding, atol=1e-5, rtol=0)
    chunks = tg.group_chunks(tg.make_windows(val.sequences, 24, 5), 60)
    assert len(chunks) > 2 and f"; {int(chunks[-1][0, 2])} trained on" in score.verdict, "all but the last chunk"


@pytest.mark.parametrize("params", ["all", "control", "last"])
def test_adapting_leaves_the_model_as_it_was(params, run):
    cfg, val = small(ttt_params=params, ttt_unfreeze_blocks=1), validation()
    model = lively(cfg)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = tg.score_adapting(model, val, cfg, run)
    assert all(torch.equal(p, before[n]) and p.requires_grad and p.grad is None for n, p in model.named_parameters())
    assert not torch.are_deterministic_algorithms_enabled()
    assert tg.score_adapting(model, val, cfg, run)[:2] == first[:2], "so a second pass gives the same digits"


def test_a_violation_also_leaves_the_model_as_it_was(run, monkeypatch):
    model = lively(small())
    before = [p.detach().clone() for p in model.parameters()]
    windows = cheat_with_windows(lambda w: w[np.arange(len(w)) != len(w) - 3])
    monkeypatch.setattr(tg, "make_windows", windows)
    with pytest.raises(tg.Violation):
        tg.score_adapting(model, validation(), small(ttt_params="control"), run)
    assert all(torch.equal(p, b) and p.requires_grad for p, b in zip(model.parameters(), before))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("params, moves", [
    ("all", lambda n: True), ("control", lambda n: not n.endswith(".weight") or "gate" in n or "smear" in n),
    ("last", lambda n: n.startswith("blocks.2.") or not n.endswith(".weight") or "gate" in n or "smear" in n)])
def test_only_the_chosen_parameters_move(params, moves, run):
    cfg, val = small(ttt_params=params, ttt_unfreeze_blocks=1), validation()
    model = lively(cfg)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ledger = tg.Ledger(val.targets)
    ledger.score(np.array([[0, 60, 0]]))
    with tg.Adapter(model, val, cfg, run, ledger) as adapter:
        adapter.learn(0, 60, 0.1)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if moves(n.replace("skip.weights", "skip"))}


def test_adapting_learns_from_what_it_has_scored(run, scorers):
    """A stream that repeats itself: the first chunk scores as without adapting, later ones far better."""
    rng = np.random.default_rng(3)
    document = np.concatenate([[tg.BOS], rng.integers(2, 64, 29)])
    val = validation(tokens=np.append(np.tile(document, 16), tg.BOS).astype(np.uint16))
    cfg = small(ttt_epochs=4, ttt_optimizer="adamw", ttt_lr=0.01)
    model = lively(cfg)
    tg.score_windows(model, val, cfg, run, 5)
    still = scorers.nll
    tg.score_adapting(model, val, cfg, run)
    torch.testing.assert_close(scorers.nll[:60], still[:60], atol=1e-5, rtol=0)
    assert scorers.nll[-60:].mean() < 0.5 * still[-60:].mean()


@pytest.mark.parametrize("at", [1, 59, 60, 61, 130, 200])
def test_no_score_knows_a_later_token_even_through_training(at, run, scorers):
    """C1 and C3 end to end: another token at `at` moves no score before its own, and does move the scores after it."""
    cfg, val = small(), validation()
    other = validation()
    other.tokens = val.tokens.copy()
    other.tokens[at] = 2 + (val.tokens[at] + 11) % 62
    tg.score_adapting(lively(cfg), val, cfg, run)
    first = scorers.nll
    tg.score_adapting(lively(cfg), other, cfg, run)
    changed = (first != scorers.nll).numpy()
    assert not changed[:at - 1].any() and changed[at - 1]
    chunk_end = int(next(c[-1, 1] for c in tg.group_chunks(tg.make_windows(val.sequences, 24, 5), 60) if c[-1, 1] >= at))
    assert chunk_end == val.targets or changed[chunk_end:].all(), "through training it reaches every later chunk"


@pytest.mark.parametrize("chunk", [37, 60])
def test_a_test_time_step_trains_on_its_tokens_and_no_others(chunk, run, monkeypatch):
    """Ranges of `step` tile the chunk; the loss of a short last step is the mean over its real tokens."""
    cfg, val = small(ttt_epochs=1, ttt_optimizer="sgd", ttt_momentum=0, ttt_grad_clip=1e9), validation()
    model, steps = lively(cfg), []
    step = tg.Adapter.step
    monkeypatch.setattr(tg.Adapter, "step", lambda self, a, b: (steps.append((a, b)), step(self, a, b))[1])
    ledger = tg.Ledger(val.targets)
    ledger.score(np.array([[0, chunk, 0]]))
    before = [p.detach().clone() for p in model.parameters()]
    with tg.Adapter(model, val, cfg, run, ledger) as adapter:
        adapter.learn(0, chunk, 0.1)
        after = [p.detach().clone() for p in model.parameters()]
    assert steps == [(a, min(a + 32, chunk)) for a in range(0, chunk, 32)]
    for p, b in zip(model.parameters(), before):
        p.data.copy_(b)
    for a, b in steps:  # the same steps by hand: segments begin at the step, every window, and every document
        borders = [i for i in range(a, b) if i == a or (i - a) % 24 == 0 or val.tokens[i] == tg.BOS]
        total = 0.0
        for s, e in zip(borders, borders[1:] + [b]):
            ids, targets = (torch.from_numpy(val.tokens[s + d:e + d].astype(np.int64)) for d in (0, 1))
            total = total + model.nll(ids, targets, torch.arange(e - s), torch.tensor([0, e - s], dtype=torch.int32), e - s).sum()
        grads = torch.autograd.grad(total / (b - a), list(model.parameters()), allow_unused=True)
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads):
                p -= 0.1 * g if g is not None else 0
    for p, expected in zip(model.parameters(), after):
        torch.testing.assert_close(p.detach(), expected, atol=2e-4, rtol=1e-3)


def test_polyak_scores_read_the_average(run, scorers):
    """Decay 1: the average never leaves the artifact, so nothing changes; a tiny decay: as without averaging."""
    val, model = validation(), lively(small())
    tg.score_windows(model, val, small(), run, 5)
    still, nats = scorers.nll, {}
    for decay in (0, 1e-9, 0.9, 1):
        tg.score_adapting(model, val, small(ttt_polyak=decay), run)
        nats[decay] = scorers.nll
    torch.testing.assert_close(nats[1], still, atol=1e-5, rtol=0)
    torch.testing.assert_close(nats[1e-9], nats[0], atol=1e-4, rtol=0)
    assert not torch.isclose(nats[0.9][-60:], nats[0][-60:], atol=1e-5).any()


def test_bytes_can_weigh_the_loss(run, monkeypatch):
    """The gradient of one step is that of sum(bytes * nats) / sum(bytes) over its tokens."""
    cfg, val = small(ttt_epochs=1, ttt_momentum=0, ttt_grad_clip=0, ttt_byte_weighted=True, ttt_batch_tokens=24), validation()
    model, ledger = lively(cfg), tg.Ledger(validation().targets)
    ledger.score(np.array([[0, 20, 0]]))
    ids, targets = (torch.from_numpy(val.tokens[d:20 + d].astype(np.int64)) for d in (0, 1))
    weight = torch.from_numpy(val.bytes[:20]).float()
    nats = model.nll(ids, targets, torch.arange(20), torch.tensor([0, 20], dtype=torch.int32), 20)
    grads = torch.autograd.grad((nats * weight).sum() / weight.sum(), list(model.parameters()), allow_unused=True)
    before = [p.detach().clone() for p in model.parameters()]
    with tg.Adapter(model, val, cfg, run, ledger) as adapter:
        adapter.learn(0, 20, 0.1)
        for p, b, g in zip(model.parameters(), before, grads):
            torch.testing.assert_close(p.detach(), b - 0.1 * (g if g is not None else 0), atol=1e-4, rtol=1e-3)


def test_the_rate_falls_with_a_cosine_and_the_last_chunk_is_only_scored(run, monkeypatch):
    calls = []
    monkeypatch.setattr(tg.Adapter, "learn", lambda self, begin, end, lr: calls.append((begin, end, lr)))
    cfg, val = small(), validation()
    tg.score_adapting(lively(cfg), val, cfg, run)
    chunks = tg.group_chunks(tg.make_windows(val.sequences, 24, 5), 60)
    rates = [0.05 * 0.5 * (1 + math.cos(math.pi * i / (len(chunks) - 1))) for i in range(len(chunks) - 1)]
    assert calls == [(c[0, 2], c[-1, 1], pytest.approx(r)) for c, r in zip(chunks, rates)]


def test_no_clip_is_no_clip(run):
    """TTT_GRAD_CLIP=0 means none, as GRAD_CLIP_NORM=0 does; it must not silently scale every gradient to nothing."""
    cfg, val = small(ttt_grad_clip=0), validation()
    model = lively(cfg)
    ledger = tg.Ledger(val.targets)
    ledger.score(np.array([[0, 60, 0]]))
    before = model.skip.weights.detach().clone()
    with tg.Adapter(model, val, cfg, run, ledger) as adapter:
        adapter.learn(0, 60, 0.1)
        assert not torch.equal(model.skip.weights, before)
