"""N-gram experts: the fast counts equal their definition, every expert is a distribution, nothing knows its target."""
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import config, make_run, trainer
from test_slots import SHAPE, Documents, build
from toy import one_thread  # noqa: F401 (fixture)

tg = trainer()
V = 7


@pytest.fixture(params=[0, 1, 2])
def stream(request):
    """(tokens [N + 1], moment [N]): short documents over few words, scored in a shuffled order, some positions together."""
    rng = np.random.default_rng(request.param)
    docs = [np.append(1, rng.integers(2, V, n)) for n in rng.integers(0, 30, 8)]
    tokens = torch.from_numpy(np.append(np.concatenate(docs), 1))
    moment = torch.from_numpy(rng.permutation(len(tokens) - 1) // (1 + 2 * request.param))
    return tokens, moment


@functools.lru_cache(maxsize=64)
def all_contexts(tokens, order):
    """The last `order` tokens up to each place inside its document, as tuples."""
    starts = list(itertools.accumulate((i if t == 1 else 0 for i, t in enumerate(tokens[:-1])), max))
    return [tokens[max(start, at - order + 1):at + 1] for at, start in enumerate(starts)]


def context(tokens, at, order):
    return all_contexts(tuple(tokens.tolist()), order)[at]


def evidence(tokens, moment, at, order, bucket=False):
    """Targets that followed the same context at earlier moments."""
    def key(c):
        return ((36313 * (c[0] if len(c) == 2 else 0)) ^ (27191 * c[-1])) % 65536 if bucket else c
    all_, when, now = all_contexts(tuple(tokens.tolist()), order), moment.tolist(), int(moment[at])
    return [int(tokens[j + 1]) for j in range(len(when)) if when[j] < now and key(all_[j]) == key(all_[at])]


def slow_probability(tokens, moment, at, letter, token):
    if letter == "p":
        p = 1 / V
        for order in (0, 1, 2):
            seen = evidence(tokens, moment, at, order)
            if seen:
                kinds = len(set(seen))
                p = (seen.count(token) + kinds * p) / (len(seen) + kinds)
        return p
    order, add, bucket = {"u": (0, 0.1, False), "b": (1, 0.1, False), "t": (2, 0.01, True)}[letter]
    seen = evidence(tokens, moment, at, order, bucket)
    return (seen.count(token) + add) / (len(seen) + add * V)


@pytest.mark.parametrize("letter", "ubtp")
def test_fast_counts_equal_the_definition(letter, stream):
    tokens, moment = stream
    nats = tg.expert_nats(tokens, moment, letter, V)[0]
    slow = [-math.log(slow_probability(tokens, moment, i, letter, int(tokens[i + 1]))) for i in range(len(moment))]
    np.testing.assert_allclose(nats, slow, rtol=1e-12)


@pytest.mark.parametrize("letter", "ubtp")
def test_every_expert_is_a_distribution(letter, stream):
    tokens, moment = stream
    nats = tg.expert_nats(tokens, moment, letter, V)[0]
    for at in range(0, len(moment), 3):
        p = tg.expert_distribution(tokens, moment, letter, V, at)
        assert float(p.sum()) == pytest.approx(1, abs=1e-12) and float(p.min()) > 0
        assert float(p[tokens[at + 1]].log()) == pytest.approx(-float(nats[at]), abs=1e-12)


@pytest.mark.parametrize("letter", "ubtp")
def test_later_moments_do_not_matter(letter, stream):
    """Another token at one place changes nothing at its own or an earlier moment, itself aside; nor its own distribution."""
    tokens, moment = stream
    for start in (tokens[:-1] == 1).nonzero().flatten().tolist():  # as every pass does it: a document from left to right
        end = start + 1 + int((tokens[start + 1:] == 1).nonzero()[0])
        moment[start:end] = moment[start:end].sort().values
    nats = tg.expert_nats(tokens, moment, letter, V)[0]
    for at in range(0, len(moment), 5):
        if tokens[at + 1] == 1:
            continue  # a document's end: another token there would join two documents
        other = tokens.clone()
        other[at + 1] = 2 + (tokens[at + 1] - 1) % (V - 2)
        changed = tg.expert_nats(other, moment, letter, V)[0] != nats
        chunk_mates = torch.arange(len(moment)) > at  # later tokens of its own chunk may read it as context
        assert not (changed & (moment <= moment[at]) & ~((moment == moment[at]) & chunk_mates))[torch.arange(len(moment)) != at].any()
        assert torch.equal(*(tg.expert_distribution(x, moment, letter, V, at) for x in (tokens, other)))


def test_the_hedge_mixes_a_distribution_and_knows_only_earlier_losses():
    rng = torch.Generator().manual_seed(0)
    moment = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    whole = torch.rand(3, 7, V, generator=rng).double()
    whole /= whole.sum(-1, keepdim=True)  # three experts' distributions at seven positions
    target = torch.randint(V, (7,), generator=rng)
    nats = -whole[:, torch.arange(7), target].log()
    log_w, expected = torch.tensor([2.0, 0, 0]).double(), []
    for m in range(4):
        here = (moment == m).nonzero().flatten()
        mixed = (log_w.softmax(0)[:, None, None] * whole[:, here]).sum(0)
        assert torch.allclose(mixed.sum(-1), torch.ones(len(here)).double())
        expected += (-mixed[torch.arange(len(here)), target[here]].log()).tolist()
        log_w = log_w - 0.5 * nats[:, here].mean(1)
    np.testing.assert_allclose(tg.hedge(nats, moment, 0.5), expected, rtol=1e-12)


def slow_hint(tokens, moment, at, order, least):
    all_, when = all_contexts(tuple(tokens.tolist()), order), moment.tolist()
    if len(all_[at]) < order:
        return -1
    same = sorted((j for j in range(len(when)) if when[j] < when[at] and all_[j] == all_[at]), key=lambda j: (when[j], j))
    counts, best = {}, (0, -1)
    for j in same:
        token = int(tokens[j + 1])
        counts[token] = counts.get(token, 0) + 1
        if counts[token] > best[0] and len({int(moment[k]) for k in same}) == len(same):
            best = counts[token], token
    if not same:
        return -1
    if len({int(moment[k]) for k in same}) != len(same):  # several at one moment: only the counts decide, ties aside
        top = max(counts.values())
        return [t for t, c in counts.items() if c == top] if top >= least * len(same) else -1
    return best[1] if best[0] >= least * len(same) else -1


@pytest.mark.parametrize("order, least", [(1, 0.0), (1, 0.5), (2, 0.3), (3, 0.8)])
def test_hints_equal_their_definition(order, least, stream):
    tokens, moment = stream
    hints = tg.find_hints(tokens, moment, order, least)
    for at in range(len(moment)):
        slow, got = slow_hint(tokens, moment, at, order, least), int(hints.token[at])
        assert got in slow if isinstance(slow, list) else got == slow, at
        assert got == tg.hint_by_definition(tokens, moment, order, least, at)
        assert int(hints.rests_on[at]) < int(moment[at])
        assert (got < 0) == (int(hints.rests_on[at]) < 0)
    assert (hints.token >= 0).any()


def test_a_tie_within_one_moment_goes_to_what_stands_first_there():
    """5 is followed by 7, 8, 8 and 7, all scored at once: nothing of a moment comes before the rest of it."""
    tokens, moment = torch.tensor([1, 5, 7, 5, 8, 5, 8, 5, 7, 5, 9]), torch.tensor([0] * 9 + [1])
    assert int(tg.find_hints(tokens, moment, 1, 0.0).token[9]) == tg.hint_by_definition(tokens, moment, 1, 0.0, 9) == 7


def test_unplanned_positions_neither_give_nor_get_hints(stream):
    tokens, moment = stream
    moment = moment.clone()
    moment[::3] = -1
    hints = tg.find_hints(tokens, moment, 1, 0.0)
    assert (hints.token[::3] == -1).all()
    for at in range(len(moment)):
        assert int(hints.token[at]) == tg.hint_by_definition(tokens, moment, 1, 0.0, at)


@pytest.mark.parametrize("boost", [0.5, 2.625, -1.0])
def test_the_tilt_is_a_softmax_with_one_logit_raised(boost):
    logits, target, hint = torch.randn(40, V).double(), torch.arange(40) % V, torch.arange(40) % (V + 1) - 1
    nats = -logits.log_softmax(-1)
    at = torch.arange(40)
    got = tg.tilt(nats[at, target], nats[at, hint.clamp_min(0)], hint, target, boost)
    whole = tg.tilt_logits(logits, hint, boost).softmax(-1)
    assert torch.allclose(got, -whole[at, target].log())
    assert torch.equal(got[hint < 0], nats[at, target][hint < 0])


# ----------------------------------------------------------------------------------------------------------------------
# In a pass: planted cheats
# ----------------------------------------------------------------------------------------------------------------------
TILT = dict(NGRAM_TILT_BOOST=2.0, NGRAM_TILT_ORDER=2, NGRAM_TILT_THRESHOLD=0.3, TTT_LORA_LR=0)


class Echoes(Documents):
    """Documents that repeat themselves and each other, so that counting finds something."""

    def __init__(self):
        super().__init__()
        for a, b in self.sequences:
            self.tokens[a + 1:b] = 2 + np.arange(b - a - 1) ** 2 % 11 % 5


@pytest.mark.parametrize("how", ["lora", "chunk", "none"])
def test_a_tilted_pass_scores_what_the_closed_form_says(how, tmp_path):
    """Without learning: nats are the plain ones, tilted by hints that slow counting makes for the pass's own moments."""
    docs, order = Echoes(), 2
    model, cfg, run = build(tmp_path, TTT_METHOD=how, TTT_LR=0, TTT_CHUNK_TOKENS=64, TTT_BATCH_TOKENS=64, **TILT)
    plain_cfg = config(**{**SHAPE, "TTT_METHOD": how, "TTT_LR": 0, "TTT_CHUNK_TOKENS": 64, "TTT_BATCH_TOKENS": 64, **TILT,
                          "NGRAM_TILT_BOOST": 0})
    def score(c):
        return tg.score_documents(model, docs, c, run, 0.0) if how == "lora" else tg.score_adapting(model, docs, c, run)
    tilted, plain = score(cfg), score(plain_cfg)
    changed = np.abs(tilted.nats - plain.nats) > 1e-6
    assert changed.any() and not changed.all()
    tokens = torch.from_numpy(docs.tokens.astype(np.int64))
    moment = (torch.from_numpy(tg.planned_moments(tg.document_plan(docs.sequences, cfg), docs.targets)).long() if how == "lora"
              else torch.cat([torch.full((int((c[:, 1] - c[:, 2]).sum()),), i) for i, c in enumerate(
                  tg.group_chunks(tg.make_windows(docs.sequences, cfg.eval_seq_len, cfg.eval_stride), 64))]))
    for at in range(docs.targets):
        hint = slow_hint(tokens, moment, at, order, 0.3)
        gain = plain.nats[at] - tilted.nats[at]
        if hint == -1:
            assert abs(gain) < 1e-6
        elif not isinstance(hint, list):  # a raised token gains at most the boost, the others lose
            assert (0 < gain < 2.0) if hint == int(tokens[at + 1]) else gain < 0
    assert tilted.val_loss < plain.val_loss


@pytest.mark.parametrize("how", ["lora", "chunk"])
def test_a_hint_that_knows_its_target_stops_the_pass(how, tmp_path, monkeypatch):
    """Target in the hash key: the cheat of many n-gram caches."""
    honest = tg.contexts
    monkeypatch.setattr(tg, "contexts", lambda tokens, order: honest(tokens, order) * 64 + tokens[1:])
    model, cfg, run = build(tmp_path, TTT_METHOD=how, TTT_LR=0, TTT_CHUNK_TOKENS=64, TTT_BATCH_TOKENS=64, **TILT)
    with pytest.raises(tg.Violation, match="not what earlier moments say"):
        tg.score_documents(model, Echoes(), cfg, run, 0.0) if how == "lora" else tg.score_adapting(model, Echoes(), cfg, run)


@pytest.mark.parametrize("how", ["lora", "chunk"])
def test_counts_from_another_order_stop_the_pass(how, tmp_path, monkeypatch):
    """Hints made for documents in stream order, scores in another: state from both orders could not be one decoder."""
    plan = tg.Scorer.plan_hints
    monkeypatch.setattr(tg.Scorer, "plan_hints", lambda self, moment: plan(self, np.arange(len(moment))))
    model, cfg, run = build(tmp_path, TTT_METHOD=how, TTT_LR=0, TTT_CHUNK_TOKENS=64, TTT_BATCH_TOKENS=64, **TILT)
    with pytest.raises(tg.Violation, match="would be read at moment"):
        tg.score_documents(model, Echoes(), cfg, run, 0.0) if how == "lora" else tg.score_adapting(model, Echoes(), cfg, run)


def test_a_tilt_that_does_not_renormalise_stops_the_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "tilt", lambda nats, hinted, hint, target, boost: nats - boost * (hint == target))
    model, cfg, run = build(tmp_path, TTT_METHOD="lora", TTT_CHUNK_SIZE=2, **TILT)
    with pytest.raises(tg.Violation, match="normalised distribution"):
        tg.score_documents(model, Echoes(), cfg, run, 0.0)


@pytest.mark.parametrize("letters", ["u", "b", "t", "p", "ubtp"])
@pytest.mark.parametrize("how", ["lora", "none"])
def test_a_mixed_pass_is_sound_and_helps_on_echoes(letters, how, tmp_path):
    model, cfg, run = build(tmp_path, TTT_METHOD=how, MIXER=letters, TTT_LORA_LR=0, TTT_CHUNK_TOKENS=32, MIXER_ETA=2)
    bare = config(**{**SHAPE, "TTT_METHOD": how, "TTT_LORA_LR": 0, "TTT_CHUNK_TOKENS": 32})
    score = (lambda c: tg.score_documents(model, Echoes(), c, run, 0.0)) if how == "lora" else (lambda c: tg.score_adapting(model, Echoes(), c, run))
    mixed, plain = score(cfg), score(bare)
    assert mixed.val_loss < plain.val_loss
    assert "checked at" in mixed.verdict


@pytest.mark.parametrize("cheat", [
    lambda c, V: c[0].token * 0 + 0.5,  # the "entropy expert": the same number for every token
    lambda c, V: (c[0].token + 0.1) / (c[0].any + 0.1),  # smoothing without its share of the vocabulary
])
def test_an_expert_that_is_no_distribution_stops_the_pass(cheat, tmp_path, monkeypatch):
    monkeypatch.setitem(tg.EXPERTS, "u", ((0,), cheat))
    model, cfg, run = build(tmp_path, TTT_METHOD="none", MIXER="u", TTT_CHUNK_TOKENS=32)
    with pytest.raises(tg.Violation):
        tg.score_adapting(model, Echoes(), cfg, run)


def test_letters_of_the_mixer_are_checked():
    for text in ("x", "uu", "u,b"):
        with pytest.raises(tg.ConfigError, match="MIXER"):
            config(**{**SHAPE, "MIXER": text})


def test_phases_move_the_network_and_put_it_back(tmp_path):
    """After the first documents the network learns from them; the others' scores change, the weights come back."""
    knobs = dict(TTT_METHOD="lora", PHASED_TTT_PLAN="prefix", PHASED_TTT_PREFIX_DOCS=4, GLOBAL_TTT_CHUNK_TOKENS=64, GLOBAL_TTT_LR=0.05)
    model, cfg, run = build(tmp_path, PHASED_TTT_NUM_PHASES=2, **knobs)
    still = config(**{**SHAPE, **knobs, "GLOBAL_TTT_LR": 0, "PHASED_TTT_NUM_PHASES": 2})
    before = [p.detach().clone() for p in model.parameters()]
    docs = Documents()
    moved, plain = (tg.score_documents(model, docs, c, run, 0.0) for c in (cfg, still))
    assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(model.parameters(), before))
    first = np.argsort(-(docs.sequences[:, 1] - docs.sequences[:, 0]), kind="stable")[:2]
    early = np.concatenate([np.arange(a, b) for a, b in docs.sequences[first]])
    late = np.setdiff1d(np.arange(docs.targets), early)
    np.testing.assert_allclose(moved.nats[early], plain.nats[early], atol=1e-6)
    assert (np.abs(moved.nats[late] - plain.nats[late]) > 1e-6).mean() > 0.9
    taught = sum(b - a for a, b in docs.sequences[np.argsort(docs.sequences[:, 0] - docs.sequences[:, 1], kind="stable")[:4]])
    assert taught < int(moved.verdict.split(";")[1].split()[0])
