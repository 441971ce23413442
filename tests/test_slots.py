"""Per-document adaptation: many slots in lock step give what one plain sequential decoder gives, and nothing leaks."""
import math

import numpy as np
import pytest
import torch
from conftest import config, make_run, trainer

tg = trainer()
SHAPE = dict(NUM_LAYERS=2, MODEL_DIM=32, NUM_HEADS=2, NUM_KV_HEADS=1, VOCAB_SIZE=64, XSA_LAST_N=2, NUM_LOOPS=0,
             PARALLEL_START_LAYER=1, EVAL_SEQ_LEN=64, EVAL_STRIDE=32, TRAIN_SEQ_LEN=64, TTT_SLOTS=3, TTT_LORA_RANK=4,
             TTT_LORA_ALPHA=8, TTT_LORA_LR=0.02, TTT_CHUNK_SIZE=8, TTT_ASYM_LOGIT=0, VAL_BATCH_TOKENS=128,
             PHASED_TTT_NUM_PHASES=0)
LENGTHS = (50, 7, 33, 61, 18, 1, 40, 64)  # none longer than a window, so that recomputing it is exact


class Documents:
    """A validation set of random tokens, without a tokenizer: one byte a target."""

    def __init__(self, lengths=LENGTHS, vocab=64):
        rng = np.random.default_rng(0)
        docs = [np.append(1, rng.integers(2, vocab, n - 1)) for n in lengths]
        self.tokens = np.append(np.concatenate(docs), 1).astype(np.uint16)
        self.targets, self.isolate = len(self.tokens) - 1, True
        self.bytes = np.ones(self.targets, np.int64)
        ends = np.cumsum(lengths)
        self.starts = ends - lengths
        self.sequences = np.stack([ends - lengths, ends], 1)


def build(tmp_path, **env):
    cfg = config(**{**SHAPE, **env})
    run = make_run(tmp_path, cfg)
    model = tg.build_model(cfg, run)
    torch.manual_seed(1)
    with torch.no_grad():  # away from the identity start, so that every path carries signal
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.looping = cfg.num_loops > 0
    return model, cfg, run


def score(tmp_path, docs=None, **env):
    model, cfg, run = build(tmp_path, **env)
    before = [p.detach().clone() for p in model.parameters()]
    result = tg.score_documents(model, docs or Documents(), cfg, run, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    return result


@pytest.mark.parametrize("env", [{}, {"NUM_LOOPS": 1, "LOOP_START": 0, "LOOP_END": 1}, {"SMEAR_GATE": "post"},
                                 {"BIGRAM_VOCAB_SIZE": 50}, {"VALUE_RESIDUAL": "mix"}, {"TTT_ASYM_LOGIT": 1}])
@pytest.mark.parametrize("cache", ["keep", "recompute"])
def test_without_learning_it_scores_like_windows(cache, env, tmp_path):
    """Cached keys and values, lead tokens and masks reproduce the flat forward exactly."""
    model, cfg, run = build(tmp_path, TTT_LORA_LR=0, TTT_CACHE=cache, **env)
    plain = tg.score_windows(model, Documents(), cfg, run, cfg.eval_seq_len)
    slots = tg.score_documents(model, Documents(), cfg, run, 0.0)
    assert slots.val_loss == pytest.approx(plain.val_loss, abs=2e-6)


@pytest.mark.parametrize("env", [{}, {"TTT_WARM_START_A": 0}, {"TTT_BETA1": 0.5, "TTT_ASYM_LOGIT": 1},
                                 {"TTT_LORA_SITES": "qkvomh"}])
def test_slots_side_by_side_equal_slots_alone(env, tmp_path):
    """The score does not depend on which documents happen to be computed together."""
    model, cfg, run = build(tmp_path, **env)
    # AdamW without a first moment turns the rounding of a gradient that is zero into a whole step: here such ones stay zero
    model.renew = lambda theta, grad, *rest: tg.renew_rows(theta, grad * (grad.abs() > 1e-6), *rest)
    together = tg.score_documents(model, Documents(), cfg, run, 0.0)
    alone = [step_by_step(model, cfg, run, Documents(), s) for s in range(cfg.ttt_slots)]
    assert float(sum(alone).double().mean()) == pytest.approx(together.val_loss, abs=1e-5)


def test_adapters_move_as_much_as_their_output_weighs(tmp_path):
    """Behind an output scale: twice the scale is twice the step, and its sign, which the weights may carry, changes nothing."""
    model, cfg, run = build(tmp_path)
    scores = []
    for scale in (1, -1, 2):
        for block in model.blocks:
            for part in (block.attn.o, block.mlp.down):
                part.scale.detach().mul_(scale)
                part.weight.detach().div_(scale)  # the same network each time
        slots = tg.Slots(model, cfg, run, 1)
        unit = slots.scale.split(slots.sizes)[2 * [site[1] for site in slots.sites].index("m") + 1]
        scores.append((tg.score_documents(model, Documents(), cfg, run, 0.0).val_loss, float(unit.sum())))
    assert scores[1] == pytest.approx(scores[0], rel=1e-5) and scores[2][1] == pytest.approx(2 * scores[0][1])
    assert abs(scores[2][0] - scores[0][0]) > 1e-4


def step_by_step(model, cfg, run, docs, slot):
    """Nats of one slot's documents when no other slot exists; zeros elsewhere."""
    scorer = tg.DocumentScorer(model, docs, cfg, run)
    scorer.slots = tg.Slots(model, cfg, run, 1)
    scorer.count = 1
    for step in steps_of(scorer.plan):
        if step.end[slot] > step.begin[slot]:
            scorer.step(tg.Step(*(x[slot:slot + 1] for x in step)))
    return scorer.nll[:-1]


def steps_of(plan):
    """Lock steps of a plan, one after the other."""
    return [step for phase in plan for step in phase.steps]


def plain_decoder(model, cfg, docs):
    """One document after the other, one chunk after the other, the whole prefix recomputed, weights merged: the slow
    definition, on adapters that can be merged (q, v, head). Slots only decide whose A a document inherits."""
    rank, scale, d = cfg.ttt_lora_rank, cfg.ttt_lora_alpha / cfg.ttt_lora_rank, cfg.model_dim
    heads, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    sites = tg.adapter_sites(model, cfg)
    start = tg.Slots(model, cfg, docs.run, 1).start  # the same draw of A
    nll, a_of_slot = torch.zeros(docs.targets), {}
    steps = steps_of(tg.document_plan(docs.sequences, cfg))
    for slot in range(cfg.ttt_slots):
        for step in steps:
            doc, begin, end, more = (int(x[slot]) for x in step)
            if end == begin:
                continue
            if begin == doc:
                pairs = []
                for (i, (_, _, ones)), at in zip(enumerate(sites), np.cumsum([0] + [rank * (d + len(s[2])) for s in sites])):
                    a = a_of_slot.get((slot, i), start[at:at + rank * d].view(d, rank))
                    pairs += [a.clone().requires_grad_(), torch.zeros(rank, len(ones), requires_grad=True)]
                optimizer = torch.optim.AdamW(pairs, lr=cfg.ttt_lora_lr, betas=(cfg.ttt_beta1, cfg.ttt_beta2), eps=1e-10,
                                              weight_decay=cfg.ttt_weight_decay)
            merged = dict(model.named_parameters())
            for (visit, name, _), a, b in zip(sites, pairs[::2], pairs[1::2]):
                key = "head.weight" if visit < 0 else f"blocks.{visit}.attn.qkv.weight"
                rows = {"low": (0, cfg.vocab_size), "q": (0, heads), "v": (heads + kv, heads + 2 * kv)}[name]
                merged[key] = torch.cat((merged[key][:rows[0]], merged[key][rows[0]:rows[1]] + scale * (a @ b).T, merged[key][rows[1]:]))
            ids = torch.from_numpy(docs.tokens[doc:end + 1].astype(np.int64))
            inputs = (ids[:-1], ids[1:], torch.arange(end - doc), torch.tensor([0, end - doc], dtype=torch.int32), end - doc)
            got = torch.func.functional_call(Nats(model), {"net." + k: v for k, v in merged.items()}, inputs)[begin - doc:]
            nll[begin:end] = got.detach()
            if more:
                optimizer.zero_grad()
                got.mean().backward()
                optimizer.step()
            for i in range(len(sites)):
                a_of_slot[slot, i] = pairs[2 * i].detach()
    return nll


class Nats(torch.nn.Module):
    """The model's nll as a module's forward, for functional_call."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *batch):
        return self.net.nll(*batch)


def test_slots_equal_the_plain_sequential_decoder(tmp_path):
    """Scores of the fast engine (recomputing) and of the slow definition agree to float error, learning included."""
    model, cfg, run = build(tmp_path, TTT_CACHE="recompute", TTT_LORA_SITES="qvh", TIE_EMBEDDINGS=0)
    docs = Documents()
    docs.run = run
    fast = tg.score_documents(model, docs, cfg, run, 0.0)
    slow = float(plain_decoder(model, cfg, docs).double().mean())
    assert fast.val_loss == pytest.approx(slow, abs=2e-5)
    frozen = tg.score_windows(model, docs, cfg, run, cfg.eval_seq_len)
    assert abs(fast.val_loss - frozen.val_loss) > 1e-3  # the adapters did move


def test_a_document_never_sees_another(tmp_path):
    """Changing one document changes no other's nats: neither its slot neighbours', nor (with A reset) its successor's."""
    model, cfg, run = build(tmp_path, TTT_WARM_START_A=0)
    docs, other = Documents(), Documents()
    a, b = docs.sequences[3]
    other.tokens[a + 1:b] = np.where(other.tokens[a + 1:b] > 2, 2, 3)
    scores = []
    for d in (docs, other):
        scorer, first = tg.DocumentScorer(model, d, cfg, run), 0
        for phase in scorer.plan:
            assert scorer.run_steps(phase.steps, first, lambda: False)
            first += len(phase.steps)
        scores.append(scorer.nll[:-1])
    changed = (scores[0] != scores[1]).nonzero().flatten()
    assert len(changed) and changed.min() >= a and changed.max() < b


@pytest.mark.parametrize("env", [{}, {"TTT_ASYM_LOGIT": 1}, {"TTT_CACHE": "recompute"}])
def test_the_adapted_distribution_is_sampled(env, tmp_path, monkeypatch):
    """The ledger sees whole distributions with adapters in, and refuses a score that is not theirs."""
    verdict = score(tmp_path, **env).verdict
    assert "checked at 0 positions" not in verdict
    model, cfg, run = build(tmp_path, **env)
    real = tg.softcapped_nll
    monkeypatch.setattr(tg, "softcapped_nll", lambda *a: real(*a) - 0.5)  # every token gets e^.5 of its probability
    with pytest.raises(tg.Violation, match="normalised distribution"):
        tg.score_documents(model, Documents(), cfg, run, 0.0)


def test_schedule_covers_every_document_once():
    rng = np.random.default_rng(3)
    ends = np.cumsum(rng.integers(1, 300, 57))
    spans = np.stack([np.append(0, ends[:-1]), ends], 1)
    steps = tg.slot_schedule(spans, 8, 16)
    seen = np.zeros(ends[-1], int)
    for step in steps:
        busy = step.end > step.begin
        assert (np.diff(busy.astype(int)) <= 0).all()  # those still working come first
        for d, a, b in zip(step.doc[busy], step.begin[busy], step.end[busy]):
            seen[a:b] += 1
    assert (seen == 1).all()


def test_out_of_time_the_rest_is_scored_plainly(tmp_path):
    model, cfg, run = build(tmp_path, TTT_LORA_LR=0, EVAL_WALLCLOCK_SECONDS=1e-9)
    result = tg.score_documents(model, Documents(), cfg, run, 0.0)
    assert result.verdict.startswith(f"each of {sum(LENGTHS)} tokens")
    plain = tg.score_windows(model, Documents(), cfg, run, cfg.eval_seq_len)
    assert result.val_loss == pytest.approx(plain.val_loss, abs=1e-6)


@pytest.mark.parametrize("env", [{}, {"TTT_WARM_START_A": 0, "PHASED_TTT_NUM_PHASES": 0}, {"NGRAM_TILT_BOOST": 2, "NGRAM_TILT_ORDER": 2}], ids=str)
@pytest.mark.parametrize("groups", [2, 3, 8])
def test_slots_in_groups_score_alike(tmp_path, monkeypatch, env, groups):
    """A card that does not hold all slots runs them in turns: the same moments, the same hints, the same scores."""
    model, cfg, run = build(tmp_path, **{"PHASED_TTT_NUM_PHASES": 2, "TTT_SLOTS": 8, **env})
    together = tg.score_documents(model, Documents(), cfg, run, 0.0)
    monkeypatch.setattr(tg, "slot_groups", lambda cfg, run, slots: groups)
    apart = tg.score_documents(model, Documents(), cfg, run, 0.0)
    np.testing.assert_allclose(apart.nats, together.nats, atol=2e-5)
    assert apart.learned == together.learned > 0
    assert apart.verdict.split(";")[:2] == together.verdict.split(";")[:2]


@pytest.mark.parametrize("asked", [0, 1, 2, 3])
def test_time_may_end_between_groups(tmp_path, monkeypatch, asked):
    """What waits for its turn then is scored with fixed weights, at the moments that hints may have counted on."""
    model, cfg, run = build(tmp_path, TTT_SLOTS=8, PHASED_TTT_NUM_PHASES=1, NGRAM_TILT_BOOST=2, NGRAM_TILT_ORDER=2)
    monkeypatch.setattr(tg, "slot_groups", lambda cfg, run, slots: 3)
    calls = []
    monkeypatch.setattr(tg, "budget_is_short", lambda *rest: calls.append(0) or len(calls) > asked)
    result = tg.score_documents(model, Documents(), cfg, run, 0.0)
    assert result.verdict.startswith(f"each of {sum(LENGTHS)} tokens") and len(calls) == asked + 1


def test_counts_of_what_was_not_scored_in_time_are_refused(tmp_path):
    """The ledger finds at the end that counts were read of a position that got its score later than was planned."""
    ledger = tg.Ledger(4)
    ledger.planned = np.array([0, 1, 2, 3], np.int32)
    for at, moment in ((0, 0), (2, 2), (3, 3)):
        ledger.rely(np.array([moment - 1]), np.array([moment]), moment)
        ledger.score(np.array([[at, at + 1, at]]), moment)
    ledger.score(np.array([[1, 2, 1]]), 4)
    with pytest.raises(tg.Violation, match="1 tokens that were not scored at the moment"):
        ledger.verdict()


def test_the_phase_between_stops_when_time_is_up(tmp_path):
    """Hundreds of steps without a look at the clock could pass any budget."""
    model, cfg, run = build(tmp_path, GLOBAL_TTT_LR=0.05, TTT_BATCH_TOKENS=16, TTT_CHUNK_TOKENS=16)
    docs, moved = Documents(), {}
    for allowed in (0, 1, 99):
        scorer, asked = tg.DocumentScorer(model, docs, cfg, run), []
        scorer.scorer.ledger.when[:], scorer.scorer.ledger.now = 0, 1
        with tg.Adapter(model, docs, cfg, run, scorer.scorer.ledger) as adapter:
            before = [p.detach().clone() for p in model.parameters()]
            ended = scorer.learn_globally(adapter, docs.sequences, lambda: asked.append(0) or len(asked) > allowed)
            moved[allowed] = sum(float((a - b.detach()).norm()) for a, b in zip(before, model.parameters()))
        assert ended == (allowed == 99) and len(asked) == (math.ceil(docs.targets / 16) if ended else allowed + 1)
    assert 0 == moved[0] < moved[1] < moved[99]
