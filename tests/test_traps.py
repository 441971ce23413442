"""Traps that scripts of this field fell into, one test each: those that no other file tests, and where the others are.

    trap -> the test that would find it
    training on validation text before it is scored (#413, #490) -> test_ledger.py::test_training_before_scoring_stops_the_pass
    a mixture that is no distribution (#430) -> test_experts.py::test_an_expert_that_is_no_distribution_stops_the_pass
    a vocabulary counted in the validation text (#430) -> test_variants.py::test_a_position_gives_the_vocabulary_a_mass_of_one
    experts weighted by overlapping positions (#430) -> test_experts.py::test_the_hedge_mixes_a_distribution_and_knows_only_earlier_losses
    expert weights that differ by rank (#430) -> test_ranks.py::test_the_number_of_ranks_does_not_matter
    smearing into a document's start (#1693) -> test_model.py::test_without_isolation_windows_share_documents_but_nothing_leaves_a_window
    the target in a hash key (#886) -> test_experts.py::test_a_hint_that_knows_its_target_stops_the_pass
    attention, hash pairs over borders (#413, #1880) -> test_model.py::test_scores_depend_only_on_earlier_tokens_of_their_segment
    adapters that saw another document (#1693) -> test_slots.py::test_a_document_never_sees_another
    windows that reach over a document's start -> test_data.py::test_windows_read_no_more_than_they_may
    a stream's tail scored again and again (#430, #490) -> test_data.py::test_windows_score_every_position_once
    validation cut to whole windows (all five) -> test_data.py::test_validation_set_agrees_with_the_builders_manifest
    each rank's remainder dropped (#1693) -> test_ledger.py::test_ranks_share_rows_and_add_up
    tokens left out of a pass -> test_ledger.py::test_a_pass_that_leaves_tokens_out_gets_no_verdict
    documents made up where BOS is missing (#1693) -> test_data.py::test_foreign_validation_shards_are_refused
    two runs of one artifact that differ (#1693) -> test_process.py::test_another_mode_gives_every_digit_again
    documents by length, state from another order (#1693) -> test_experts.py::test_counts_from_another_order_stop_the_pass
    evaluation that takes too long (#430) -> test_process.py::test_slow_evaluation_is_a_failure
    a zero table behind a zero projection: pairs (#413) -> test_model.py::test_hash_embedding_is_alive_from_the_first_step
    GPTQ with the wrong factor or order (#430, #490) -> test_quant.py::test_gptq_equals_the_published_algorithm
    GPTQ that is worse than rounding (#430) -> test_quant.py::test_gptq_beats_rounding_on_correlated_inputs
    two-dimensional gates in Muon (#413, #490) -> test_model.py::test_gates_are_not_matrices
    floors under the quantiser's steps (#413, #430, #490, #1880) -> test_quant.py::test_tiny_weights_keep_their_relative_precision
    the embedding's step not from its own spread (#490) -> test_quant.py::test_steps_and_ranges_follow_the_table
    rotary tables or master weights in bf16 (#413, #1880) -> test_model.py::test_rotary_tables_stay_fp32_and_tell_neighbours_apart
    quantisation-aware training that never runs (#315) -> test_config.py::test_techniques_of_other_scripts_that_are_not_here_stop
    momentum of the warm-up at step 0 (#1693) -> test_optim.py::test_warm_up_leaves_no_trace
    an average in the weights' own storage -> test_optim.py::test_a_shadow_is_a_copy
    hooks that miss a visit, or recurrence off for them (#1855) -> test_quant.py::test_hessians_are_the_inputs_products
    recurrence left off in the reloaded network (#1855) -> test_process.py::test_another_mode_gives_every_digit_again
    a parameter that no optimiser or reduction knows (#1693) -> test_model.py::test_a_parameter_without_a_row_or_with_two_is_refused
    micro-batches reduced one by one (#1880) -> test_optim.py::test_micro_batches_equal_one_batch
    blocks unfrozen that were to be frozen (#430) -> test_ledger.py::test_only_the_chosen_parameters_move
    one knob read twice with two defaults (#490) -> test_architecture.py::test_train_gpt_keeps
    no byte sidecar, no bytes (#1855) -> test_data.py::test_validation_set_agrees_with_the_builders_manifest
    a BOS that is set late, or another (#1855) -> test_bytes.py::test_tokenizer_with_another_bos_is_refused
    seeds that share their data order (all five) -> test_data.py::test_seed_decides_the_order_alone
    gates that are no identity at the start -> test_model.py::test_identity_at_the_start
    two lanes ported wrongly (#1204) -> test_model.py::test_forward_equals_the_formulas
    a leading space counted twice, or as three bytes (#1719) -> test_bytes.py::test_leading_space_counts_one_byte_and_once
    bytes that are not those of the text (#897) -> test_bytes.py::test_counted_bytes_are_those_of_the_decoded_text
    a README against its own logs (#430) -> test_records_folder.py::test_submission_is_the_logs_arithmetic
    code counted packed and shipped readable (#1693, #1855) -> test_records_folder.py::test_shipped_code_is_the_counted_file
    a command that trains another recipe (#1693, #1855) -> test_records_folder.py::test_readme_command_trains_the_same_recipe
    Hessians behind the training budget (#490, #1855), in a record folder -> test_records_folder.py::test_check_finds_the_fault
    logs that do not say what ran (#1880) -> test_process.py::test_log_goes_on_with_versions_and_every_knob
    casefolded data that pass for the text (#1693) -> test_prepare.py::test_the_manifest_says_what_is_lossy
    a missing compressor replaced by a worse one (#430) -> test_quant.py::test_a_coder_that_is_not_here_is_named
"""
import ast
import json
import re
import shutil
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
from conftest import config, make_run, tiny, write_shard
from test_bytes import KINDS, document
from test_bytes import model as spm_model
from test_data import first_tokens, numbered, open_stream  # noqa: F401 (fixture)
from test_ledger import validation
from test_model import make_row
from test_ranks import Wires
from test_slots import Documents, build
from test_variants import TOKENIZER, live, shards, toy  # noqa: F401 (fixture)
from toy import lively, one_thread, quiet_run, run, small, tg  # noqa: F401 (fixtures)
from torch._dynamo.testing import CompileCounter


def flat(model):
    """All weights as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_every_test_of_the_table_exists():
    rows = re.findall(r"^    (\S.+) -> (\S+\.py)::(test_\w+)$", __doc__, re.M)
    assert len(rows) == __doc__.count(" -> ") - 1, "every line but the table's head is read"
    folder = Path(__file__).parent
    defined = {file: {n.name for n in ast.walk(ast.parse((folder / file).read_text(encoding="utf-8")))
                      if isinstance(n, ast.FunctionDef)} for _, file, _ in rows}
    assert not [f"{file}::{name}" for _, file, name in rows if name not in defined[file]]


# ----------------------------------------------------------------------------------------------------------------------
# Scoring
# ----------------------------------------------------------------------------------------------------------------------
def test_validation_text_does_not_reach_the_artifact(shards, tmp_path):
    """PR #490 trained on it before scoring it. Here a run is scored after every step, and none of its weights may tell."""
    other, stored = shutil.copytree(shards, tmp_path / "other"), []
    tokens = tg.read_shard(other / "fineweb_val_000000.bin").copy()
    write_shard(other / "fineweb_val_000000.bin", np.where(tokens == tg.BOS, tokens, 65 - tokens))
    for folder in (shards, other):
        _, before, _, (data, _) = live(toy("record", ITERATIONS=3, VAL_LOSS_EVERY=1, TTT_ENABLED=0, DATA_PATH=folder), tmp_path)
        stored.append((before.val_loss, tg.read_artifact(data)[1]))
    (loss, weights), (other_loss, other_weights) = stored
    assert loss != other_loss, "the texts differ"
    assert all(torch.equal(w, other_weights[n]) for n, w in weights.items())


@pytest.mark.parametrize("env", [dict(TRIGRAM_VOCAB_SIZE=50), dict(TRIGRAM_VOCAB_SIZE=50, SMEAR_GATE="channel"),
                                 dict(VE_LAYERS="0,1", VE_DIM=8)], ids=str)
def test_features_of_earlier_tokens_are_the_same_chunk_by_chunk(env, tmp_path):
    """A smear reads the token before, and that one's triple reads two more: over a chunk's border, never a document's."""
    model, cfg, run = build(tmp_path, TTT_LORA_LR=0, **env)
    plain = tg.score_windows(model, Documents(), cfg, run, cfg.eval_seq_len)
    np.testing.assert_allclose(tg.score_documents(model, Documents(), cfg, run, 0.0).nats, plain.nats, atol=1e-5)


def test_compiling_for_the_evaluation_reads_no_validation_text(run, monkeypatch):
    """PR #1530's first version compiled on validation text, with steps of an optimiser."""
    cfg, seen, sets = small(), [], [validation(seed=0), validation(seed=1)]
    monkeypatch.setattr(tg.Run, "gpu", True)  # only there is anything compiled; the passes themselves are of no interest
    monkeypatch.setattr(tg, "passes", lambda model, val, cfg, run: seen.append(val) or {})
    for val in sets:
        tg.evaluate(lively(cfg), val, cfg, run)
    assert seen[1::2] == sets
    assert not (sets[0].tokens == sets[1].tokens).all() and (seen[0].tokens == seen[2].tokens).all()


@pytest.mark.parametrize("world", [1, 4])
def test_compiling_for_the_evaluation_meets_every_shape_on_every_rank(world):
    """Slots of the real set, not of the made-up one: what is met first on the clock is compiled on the clock."""
    cfg, val = small(ttt_chunk_size=8, eval_seq_len=32, eval_stride=16, ttt_slots=8), validation()
    made, knobs = tg.random_documents(val, cfg, world)
    real, warm = (tg.document_plan(v.sequences, c) for v, c in ((val, cfg), (made, knobs)))
    assert len(warm) == 2 and sum(b - a for a, b in made.sequences[:world]) >= world * cfg.eval_seq_len  # a phase between
    assert {len(step.begin) for phase in real for step in phase.steps} == {8}
    assert all((step.end > step.begin).all() and len(step.begin) == 8 for step in warm[1].steps[:2])


def test_calibration_and_decompression_are_on_the_clock(shards, tmp_path):
    """PRs #490 and #1855 calibrated behind 600 s of training; #1693's evaluation time left out part of itself."""
    cfg, full = toy("record", ITERATIONS=1, SLIDING_WINDOW_ENABLED=1, DATA_PATH=shards), config(PRESET="record")
    booked = set(live(cfg, tmp_path)[0].clock.seconds)
    for spans in ({"train": 599.6, "hessians": 4.7}, {"eval load": 20, "eval full": 60, "eval sliding": 300, "eval ttt": 230}):
        run = make_run(tmp_path, full)
        run.clock.seconds.update(spans)
        tg.report_budgets(run, full)
        assert len(run.failures) == 1 and "budget overrun" in run.failures[0]
        assert set(spans) <= booked, "these are the names that a run books under"


@pytest.mark.parametrize("used, over", [((5, 20), False), ((20, 5), True)], ids=str)
def test_ranks_run_out_of_time_together(used, over, tmp_path):
    """PR #430 asked each rank's own clock; ranks that disagree wait for each other forever. Here rank 0's decides, and so does
    what rank 0 wants to keep, for ranks measure that too."""
    cfg, wires = config(EVAL_WALLCLOCK_SECONDS=10), Wires(2)
    runs = [wires.attach(make_run(tmp_path, cfg), rank) for rank in range(2)]
    for run, seconds in zip(runs, used):
        run.clock.seconds["eval ttt"] = seconds
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda run: tg.budget_is_short(cfg, run, 0.0), runs)) == [over] * 2
        assert list(pool.map(lambda run: tg.budget_is_short(cfg, run, 0.0 if run.main else 20.0), runs)) == [over] * 2


@pytest.mark.parametrize("sliding", [True, False])
@pytest.mark.parametrize("adapting", [True, False])
def test_a_pass_is_left_out_by_its_own_knob_only(sliding, adapting):
    """PR #1880: no sliding windows silently meant no test-time training, which was off by default."""
    cfg = config(PRESET="record", SLIDING_WINDOW_ENABLED=int(sliding), TTT_ENABLED=int(adapting))
    assert list(tg.passes(None, None, cfg, None)) == ["full"] + ["sliding"] * sliding + ["ttt"] * adapting
    assert list(tg.passes(None, None, config(PRESET="record"), None)) == ["full", "ttt"]


def test_the_network_learns_from_the_longest_documents_too(tmp_path, monkeypatch):
    """PR #1693 cut each phase's documents, sorted by length, at a round number: the longest fell out, how many by chance."""
    model, cfg, run = build(tmp_path, PHASED_TTT_PLAN="prefix", PHASED_TTT_NUM_PHASES=2, PHASED_TTT_PREFIX_DOCS=4, GLOBAL_TTT_CHUNK_TOKENS=64)
    docs, learned, learn = Documents(), [], tg.Adapter.learn
    monkeypatch.setattr(tg.Adapter, "learn", lambda self, a, b, lr: (learned.extend(self.order[a:b]), learn(self, a, b, lr)))
    tg.score_documents(model, docs, cfg, run, 0.0)
    longest = sorted(docs.sequences.tolist(), key=lambda span: span[0] - span[1])
    assert learned == [i for phase in (2, 4) for a, b in longest[:phase] for i in range(a, b)]


def test_each_half_is_learned_once_and_the_longest_come_last(tmp_path, monkeypatch):
    """PHASED_TTT_PLAN=halving: 8 documents, of which two are longer than a window; learned from after 2 and after 4 of them."""
    model, cfg, run = build(tmp_path, PHASED_TTT_NUM_PHASES=2, GLOBAL_TTT_CHUNK_TOKENS=64, EVAL_SEQ_LEN=50, EVAL_STRIDE=25)
    docs, learned, learn = Documents(), [], tg.Adapter.learn
    monkeypatch.setattr(tg.Adapter, "learn", lambda self, a, b, lr: (learned.extend(self.order[a:b]), learn(self, a, b, lr)))
    when = tg.planned_moments(tg.document_plan(docs.sequences, cfg), docs.targets)
    tg.score_documents(model, docs, cfg, run, 0.0)
    ordered = [docs.sequences[i].tolist() for i in (0, 6, 2, 4, 1, 5, 7, 3)]  # lengths 50, 40, 33, 18, 7, 1; 64, 61
    assert learned == [i for a, b in ordered[:4] for i in range(a, b)]
    phases = [[when[a:b].tolist() for a, b in group] for group in (ordered[:2], ordered[2:4], ordered[4:])]
    first, last = ([f(min(m) if f is min else max(m) for m in phase) for phase in phases] for f in (min, max))
    assert last[0] < first[1] and last[1] < first[2]


def test_case_operators_stand_for_no_bytes(tmp_path, monkeypatch):
    """Counted as text they flatter the score by 9 % (#2138); a sidecar says so, and may say nothing else that is new."""
    monkeypatch.setitem(KINDS, "operators", dict(KINDS["contest"], user_defined_symbols=["\ue001"]))
    (tmp_path / "some.model").write_bytes(spm_model("operators"))
    size = spm.SentencePieceProcessor(model_proto=spm_model("operators")).vocab_size()
    tokenizer, cfg = tg.Tokenizer(tmp_path / "some.model", size), config(DATA_PATH=tmp_path, VOCAB_SIZE=size, VAL_DOCS=0)
    tokens = np.concatenate([document(tokenizer, text) for text in ("the weather was \ue001wonderful", "\ue001in paris")])
    table = np.append(0, tokenizer.count_bytes(tokens))
    sidecar = np.where(tokens == tokenizer.sp.piece_to_id("\ue001"), 0, table)
    for name, x in ("val", tokens), ("val_bytes", sidecar):
        write_shard(tmp_path / f"fineweb_{name}_000000.bin", x)
    assert tg.ValidationSet(cfg, tokenizer).bytes.sum() == len("the weather was wonderfulin paris") == table.sum() - 2 * 3
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", sidecar + (np.arange(len(tokens)) == 2))
    told = "byte sidecar differs from the byte table by 1 of 34 bytes, more than normalisation and operators explain"
    with pytest.raises(SystemExit, match=told):
        tg.ValidationSet(cfg, tokenizer)


def test_test_time_steps_are_not_lost_in_bf16(run, monkeypatch):
    """PR #490 cast the whole network to bf16 and then took steps that are far below its 8 bits."""
    cfg, val = small(ttt_optimizer="adamw", ttt_epochs=1, ttt_batch_tokens=60), validation()
    monkeypatch.setattr(run, "dtype", torch.bfloat16)
    model, ledger = lively(cfg, dtype=torch.bfloat16), tg.Ledger(val.targets)
    ledger.score(np.array([[0, 60, 0]]))
    weight = model.blocks[0].attn.qkv.weight
    before, slots = weight.detach().clone(), tg.Slots(model, cfg, run, 2)
    with tg.Adapter(model, val, cfg, run, ledger) as adapter:
        adapter.learn(0, 60, 1e-5)  # one step, of this size where a gradient is not tiny
        assert (((weight - before).abs() - 1e-5).abs() < 1e-6).float().mean() > 0.95
    start = slots.theta.clone()
    slots.learn(torch.randn_like(start), torch.tensor([True, False]))  # the record's step of 1e-4
    assert (slots.theta != start).float().mean(1).tolist() == [1, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("knobs", [
    dict(bigram_vocab_size=37, trigram_vocab_size=37, ve_layers="0,3", ve_dim=8, smear_gate="channel", attn_gate="dense"),
    dict(x0_residual=True, parallel_residual="one", value_residual="mix", tie_embeddings=False)], ids=str)
def test_nothing_is_dead_at_its_real_start(knobs, run):
    """A product of two zeros never learns (#413's table and projection); no noise and no decay helps out here."""
    cfg = small(**knobs, embed_wd=0, muon_wd=0, adam_wd=0)
    model = tg.GPT(cfg)
    tg.initialize(model, cfg)
    start, optimizers = {n: p.detach().clone() for n, p in model.named_parameters()}, tg.Optimizers(model, cfg, run)
    for seed in range(4):
        tg.train_step(model, optimizers, [make_row(run, seed=seed)], tg.Values(1.0, 0.9, True))
    assert not [n for n, p in model.named_parameters() if torch.equal(p, start[n])]


def test_recurrence_comes_on_in_compiled_code(run, monkeypatch):
    """A flag on a module became a constant of the graph, and 'late QAT' never ran (#315); nor may a new row recompile."""
    cfg, graphs, build = small(xsa_last_n=2, bigram_vocab_size=37, compile_scope="block"), CompileCounter(), torch.compile
    # traced, but no C++ written; the inductor's options go with it
    monkeypatch.setattr(torch, "compile", lambda f, options=None, **how: build(f, backend=graphs, **how))
    model, counts = lively(cfg, looping=False), []
    ids = np.random.default_rng(0).integers(2, 64, 34)
    rows = [tg.make_batch(ids[:-1], ids[1:], np.array(cu, np.int32), 33, run, room=6) for cu in ((0, 1, 20, 33), (0, 9, 33))]
    with torch.no_grad():
        eager = [model.nll(*row) for model.looping in (False, True) for row in rows]
        tg.compile_model(model, cfg, run, 2)
        for model.looping in (False, True, False):
            for row, expected in zip(rows, eager[2:] if model.looping else eager):
                torch.testing.assert_close(model.nll(*row), expected)
                counts.append(graphs.frame_count)
    assert 0 < counts[0] == counts[1] < counts[2] == counts[-1]


def on_two_ranks(cfg, step, shares, folder):
    """step(its share, run) on two ranks, which are threads; -> what both return."""
    wires = Wires(2)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: step(shares[rank], wires.attach(make_run(folder, cfg), rank)), range(2)))


def test_the_mean_gradient_is_clipped_and_ranks_stay_equal(run, tmp_path):
    """PR #1693 clipped each rank's own gradient before the reduction: another recipe for every number of ranks. Ranks hold
    parts of the mean, which add up to it."""
    cfg, rng = small(grad_clip_norm=0.01), torch.Generator().manual_seed(0)
    grads = [[size * torch.randn(p.shape, generator=rng) for p in tg.GPT(cfg).parameters()] for size in (1, 100)]

    def step(own, run):
        model = lively(cfg)
        optimizers = tg.Optimizers(model, cfg, run)
        torch._foreach_copy_(optimizers.rows.grads, own)
        return float(optimizers.step(tg.Values(1.0, 0.9, True))), flat(model)
    norm, weights = step([a + b for a, b in zip(*grads)], run)
    one, two = on_two_ranks(cfg, step, grads, tmp_path)
    assert one[0] == two[0] == pytest.approx(norm, rel=1e-5) and norm > 1 and torch.equal(one[1], two[1])
    torch.testing.assert_close(one[1], weights, atol=1e-4, rtol=0)


def test_parameters_that_a_plan_leaves_idle_do_not_stall_ranks(tmp_path):
    """PR #413 had lambdas without a gradient, and distributed training waits for gradients; here skips that only loops use."""
    cfg = small(num_layers=1, xsa_last_n=1, loop_start=0, loop_end=0, parallel_start_layer=0)

    def step(seed, run):
        model = lively(cfg)
        model.looping = False
        model.nll(*make_row(run, seed=seed)).mean().backward()
        assert model.skip.weights.grad is None
        tg.train_step(model, tg.Optimizers(model, cfg, run), [make_row(run, seed=seed)], tg.Values(1.0, 0.9, False))
        return flat(model)
    one, two = on_two_ranks(cfg, step, (1, 2), tmp_path)
    assert one.isfinite().all() and torch.equal(one, two)


@pytest.mark.parametrize("env, weights", [
    (dict(AVERAGE="swa", SWA_START_FRAC=0.5), [0, 0, 0, 0, 1 / 3, 1 / 3, 1 / 3]),
    (dict(AVERAGE="ema", EMA_DECAY=0.5), [1 / 64, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2])], ids=["swa", "ema"])
def test_the_average_of_the_steps_is_what_training_leaves(env, weights, shards, tmp_path, monkeypatch):
    """PR #430 collected snapshots and packed something else. The start counts; steps of the warm-up do not."""
    cfg, seen, step = toy("record", ITERATIONS=6, DATA_PATH=shards, **env), [], tg.train_step
    run = make_run(tmp_path, cfg)
    model = tg.build_model(cfg, run)
    seen.append(flat(model))
    monkeypatch.setattr(tg, "train_step", lambda model, *rest: (step(model, *rest), seen.append(flat(model)))[0])
    tg.train_and_average(model, cfg, run, tg.TrainStream(cfg, run), tg.ValidationSet(cfg, TOKENIZER))
    steps = torch.stack([seen[0], *seen[-6:]])
    assert len(seen) == 9, "two steps of warm-up"
    torch.testing.assert_close(flat(model), torch.tensor(weights) @ steps, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loader", ["shuffled", "coprime"])
def test_the_seed_alone_orders_the_data(loader, numbered, tmp_path):
    """PR #1880's order came from the files' paths, so it was another on another machine and equal for every seed."""
    moved = shutil.copytree(numbered, tmp_path / "moved")
    orders = [first_tokens(open_stream(folder, tmp_path, LOADER=loader, SEED=seed), 3)
              for folder, seed in ((numbered, 1), (moved, 1), (numbered, 2))]
    assert orders[0] == orders[1] != orders[2]


# ----------------------------------------------------------------------------------------------------------------------
# Packing and reporting
# ----------------------------------------------------------------------------------------------------------------------
def test_every_matrix_is_solved_with_a_hessian(run):
    """PR #1855: a matrix without a hook was an error, or, if small, silently stored as fp16."""
    cfg = small(bigram_vocab_size=37, trigram_vocab_size=37, ve_layers="0,3", ve_dim=8, tie_embeddings=False)
    model = lively(cfg)
    hessians = tg.collect_hessians(model, cfg, [make_row(run)], run)
    matrices = {n: p for n, p in model.named_parameters() if tg.rows_of(model, cfg)[n].group in ("matrix", "head")}
    assert len(matrices) == 4 * cfg.num_layers + 4 and set(matrices) <= set(tg.quantized_rows(model, cfg))
    assert {n: len(hessians[n]) for n in matrices} == {n: p.shape[1] for n, p in matrices.items()}


def test_small_gates_and_corrections_keep_their_relative_precision(run):
    """Floors again where steps are not those of a matrix: gates stored as rows, factors of low-rank corrections."""
    coarse = dict(quantizer="rtn", matrix_bits=3, attn_clip_sigmas=3, mlp_clip_sigmas=3)  # so that there is much to correct
    cfg, errors = small(gated_attn_quant_gate=True, lqer_top_k=3, **coarse), {}
    model = lively(cfg)
    own = {n: p.data for n, p in model.named_parameters()}
    for shrink in (1, 256):
        for w in own.values():
            w.div_(shrink)
        tensors, _ = tg.Quantizer(model, cfg, {}, run).solve()
        _, stored = tg.read_artifact(tg.build_artifact(tensors, {}, {}, ["zlib"])[0])
        errors[shrink] = {n: float((w - own[n]).norm() / own[n].norm()) for n, w in stored.items()}
    assert sum(n.endswith(tg.LOW_A) for n in tensors) == 3 and "blocks.0.attn.gate.weight" in errors[1]
    assert errors[256] == pytest.approx(errors[1], rel=0.02, abs=0.002)  # fp16 steps lose that much; a power of two, as they lie on a grid of octaves


def test_samples_recur_as_training_did():
    """A reloaded network does not recur by itself (#1855). What it scores is compared elsewhere; here is what it writes."""
    cfg = small(sample_tokens=6, sample_temperature=0)
    model, run = lively(cfg, looping=False), quiet_run(cfg)
    text = types.SimpleNamespace(sp=types.SimpleNamespace(encode=lambda prompt: [7, 9], decode=list))
    written = tg.sample(model, text, cfg, run)
    n = len(written) - 1
    inputs = torch.tensor(written[:n]), torch.arange(n), torch.tensor([0, n], dtype=torch.int32), n
    best = {model.looping: model.logits(*inputs)[2:].argmax(-1).tolist() for model.looping in (True, False)}
    assert n >= 4 and written[3:] == best[True] != best[False]


def test_the_cap_is_decimal():
    """16 MB are 16,000,000 bytes; a guard in MiB let 777,216 more pass (#1019)."""
    assert {config(PRESET=preset).artifact_max_bytes for preset in tg.PRESETS if preset != "smoke"} == {16 * 1000 ** 2}


def test_a_score_on_casefolded_text_says_so(corpus, tmp_path):
    """PR #1693's bytes are those of lower-cased text, of which the original cannot be had back: its verdict must tell."""
    data = shutil.copytree(corpus.data, tmp_path / "data")
    digest = tg.sha256(corpus.tokenizer.read_bytes())
    (data / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": digest}, "transform": {"name": "casefold", "lossy": True}}))
    cfg = tiny(MODE="eval", VAL_DOCS=2, SLIDING_WINDOW_ENABLED=0, TTT_ENABLED=0, **corpus._replace(data=data).env)
    run = make_run(tmp_path, cfg)
    run.open_log(cfg)
    quantizer, path = tg.Quantizer(tg.build_model(cfg, run), cfg, {}, run), tmp_path / "some.artifact"
    path.write_bytes(tg.build_artifact(quantizer.solve()[0], quantizer.kept, {}, ["zlib"])[0])
    tg.job(cfg, run, {"path": path, "data": path.read_bytes()})
    assert re.fullmatch("verdict: .*; but LOSSY data .casefold.*", run.path(".txt").read_text().splitlines()[-1])


@pytest.mark.parametrize("extra", [0.0, 0.4])
def test_ranks_end_training_at_the_same_step(extra, shards, tmp_path, monkeypatch):
    """Each rank has a clock and a pace of its own; rank 0's are what all stop by."""
    cfg = toy("record", ITERATIONS=10000, MAX_WALLCLOCK_SECONDS=1.0, QUANTIZER="rtn", DATA_PATH=shards)
    told, steps = [], []

    def end(agree, pace):
        run = make_run(tmp_path, cfg)
        run.agree = agree
        monkeypatch.setattr(tg.Watch, "pace", pace)
        monkeypatch.setattr(tg, "report_training", lambda *args: steps.append(args[-1]))
        tg.train(tg.build_model(cfg, run), cfg, run, tg.TrainStream(cfg, run), tg.ValidationSet(cfg, TOKENIZER))

    pace = tg.Watch.pace
    end(lambda value: told.append(value) or value, pace)
    replies = iter(told)
    end(lambda value: next(replies), lambda self: pace(self) + extra)
    assert steps[0] == steps[1]
