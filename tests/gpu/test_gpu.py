"""What only a GPU can show: every attention backend against the eager reference, compiled against eager, on odd shapes.

Run on a CUDA machine: python -m pytest tests/gpu -q. Elsewhere every test skips; CI covers the eager twins.
"""
import contextlib
import functools
import gc
import importlib.util
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

def load():
    """train_gpt.py as a module, once for all test files of a session (its operators register by name)."""
    if "train_gpt" not in sys.modules:
        spec = importlib.util.spec_from_file_location("train_gpt", Path(__file__).parents[2] / "train_gpt.py")
        sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["train_gpt"])
    return sys.modules["train_gpt"]


tg = load()
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    cfg = tg.load_config({"RUN_ID": "gpu", "ARTIFACT_DIR": str(tmp_path_factory.mktemp("logs"))}, True)
    return tg.Run(cfg, (0, 0, 1))


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9))


# borders with one-token segments, empty segments (padding of cu) and lengths off every tile size
BORDERS = ([0, 1, 2, 67, 300, 300, 301, 813], [0, 513], [0, 128, 256, 384, 512, 512, 512])


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("heads", [4, 8])
@pytest.mark.parametrize("name", [n for n in tg.ATTENTION if n != "eager"])
def test_attention_backend_equals_eager(name, heads, borders, run):
    cfg, wide = tg.load_config({"NUM_HEADS": str(heads), "NUM_KV_HEADS": str(heads // 2)}, True), 512 // heads
    problem = tg.try_attention(name, cfg, run)
    if problem:
        pytest.skip(f"{name}: {problem}")
    torch.manual_seed(0)
    total = borders[-1]
    cu = torch.tensor(borders, dtype=torch.int32, device="cuda")
    inputs = [torch.randn(total, h, wide, device="cuda").bfloat16().requires_grad_() for h in (heads, heads // 2, heads // 2)]
    grad = torch.randn(total, heads, wide, device="cuda").bfloat16()
    results = []
    for attend in (tg.ATTENTION[name], tg.attention_eager):
        out = attend(*inputs, cu, 512 if total > 513 else 513)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    for fast, reference in zip(*results):
        assert torch.isfinite(fast).all()
        assert relative(fast, reference) < 2e-2


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("knobs", [{}, {"ATTN_GATE": "none", "ROPE_DIMS": "0"}, {"ATTN_GATE": "scalar", "XSA_LAST_N": "0"},
                                   {"NUM_HEADS": "8", "NUM_KV_HEADS": "4", "ATTN_GATE": "out"}], ids=str)
@pytest.mark.parametrize("lanes", [False, True])
def test_attention_as_one_operator_is_as_near_to_fp32_as_its_parts(lanes, knobs, borders):
    """Norm, rotation, gains, XSA, gate and residual stream inside; values and every gradient, at a trained gain."""
    cfg, total, cu = tg.load_config(knobs, True), borders[-1], torch.tensor(borders, dtype=torch.int32, device="cuda")
    torch.manual_seed(0)
    layer = tg.Attention(cfg, 10, tg.Kernels(tg.attention_eager, attention=tg.attention_fused)).cuda()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_((torch.randn_like(p) * p.shape[-1] ** -0.5 if p.dim() > 1 else 2 + 0.2 * torch.randn_like(p)).bfloat16())
    pos = torch.cat([torch.arange(b - a) for a, b in zip(borders, borders[1:])]).cuda()
    rope = tg.Rotary(cfg.rotary_dims, cfg.rope_base).cuda()(pos)
    rows = [torch.randn(total, 512, device="cuda").bfloat16() for _ in range(3)]
    results = []
    for fused, dtype in ((tg.attention_fused, torch.bfloat16), (None, torch.bfloat16), (None, torch.float32)):
        layer.fused, (x, onto, grad) = fused, (t.to(dtype).requires_grad_() for t in rows)
        where = tg.segment_bounds(cu, total) if fused else cu
        out, _ = layer(x, x[:, :layer.reads], tg.OtherValues(), rope, where, total, tg.VisitAdapters(), None, None if lanes else onto)
        results.append([out, *torch.autograd.grad(out, [x, *[onto] * (not lanes), *layer.parameters()], grad.detach())])
    for one, parts, exact in zip(*results):
        # of gains a sum over tokens that cancel, for which gradients of scores in bf16 are the coarser
        assert torch.isfinite(one).all() and relative(one, exact) < 1.5 * relative(parts, exact) + (1e-3 if one.numel() > 8 else 2.5e-2)


@pytest.mark.parametrize("slots, chunk, window, heads, begin", [
    (5, 16, 256, (8, 4, 64), (0, 7, 255, 256, 1000)), (3, 48, 256, (4, 2, 128), (48, 300, 4096)), (4, 32, 128, (4, 2, 128), (1, 127, 129, 31)),
    (2, 5, 64, (4, 4, 64), (3, 90)), (2, 24, 3072, (8, 4, 64), (3072, 50000)), (2, 24, 3072, (4, 2, 128), (3072, 50000)), (2, 48, 3072, (4, 1, 128), (100, 50000))], ids=str)
@pytest.mark.parametrize("tile", tg.RING_TILES, ids=str)
def test_cached_attention_equals_eager(tile, slots, chunk, window, heads, begin):
    """Values and gradients, on empty, filling, full and overwritten rings; in the tiles for smaller GPUs too, which a large one can run."""
    torch.manual_seed(0)
    *heads, wide = heads
    ring = [torch.randn(slots, window + tg.Slots.SPARE, heads[1], wide, device="cuda").bfloat16() for _ in "kv"]
    begin = torch.tensor(begin, device="cuda")
    # as in the network: queries and keys side by side in one row, values behind others
    rows = torch.randn(slots * chunk, heads[0] + 3 * heads[1], wide, device="cuda").bfloat16()
    q, k, _, v = rows.split((*heads, heads[1], heads[1]), 1)
    grad, results = torch.randn(slots * chunk, heads[0], wide, device="cuda").bfloat16(), []
    for attend, dtype in ((functools.partial(tg.attention_cached_triton, tile=tile), torch.bfloat16), (tg.attention_cached_eager, torch.float32)):
        mine = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*mine, tg.Past(*(x.to(dtype) for x in ring), begin, window))
        results.append([out, *torch.autograd.grad(out, mine, grad.to(dtype))])
    for fast, reference in zip(*results):
        assert relative(fast, reference) < 5e-3


def adapting(folder):
    """A small network away from its start, and what scores documents of many lengths with it by adaptation."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from test_slots import Documents
    knobs = dict(NUM_LAYERS="4", MODEL_DIM="128", NUM_HEADS="2", NUM_KV_HEADS="1", VOCAB_SIZE="64", XSA_LAST_N="4", LOOP_START="1",
                 LOOP_END="2", PARALLEL_START_LAYER="3", EVAL_SEQ_LEN="64", EVAL_STRIDE="32", TTT_SLOTS="8", TTT_LORA_RANK="16",
                 TTT_CHUNK_SIZE="8", VAL_BATCH_TOKENS="4096", RUN_ID="replay", ARTIFACT_DIR=str(folder), PRESET="record")
    cfg = tg.load_config(knobs, True)
    run = tg.Run(cfg, (0, 0, 1), quiet=True)
    model = tg.build_model(cfg, run)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.looping = True
    return lambda: tg.score_documents(model, Documents((50, 7, 33, 61, 18, 1, 40, 64, 300, 9, 22)), cfg, run, 0.0)


def test_recorded_steps_give_the_same_digits(tmp_path, monkeypatch):
    """Documents scored by replayed CUDA graphs and by plain calls: the same kernels on the same numbers."""
    score = adapting(tmp_path)
    recorded = score()
    replay = tg.Replay.__init__
    monkeypatch.setattr(tg.Replay, "__init__", lambda self, work, pool: replay(self, work, None))
    assert (recorded.nats == score().nats).all()


@contextlib.contextmanager
def collector(*threshold):
    """Python's cycle collector with another threshold, or without one off."""
    before, on = gc.get_threshold(), gc.isenabled()
    gc.set_threshold(*threshold) if threshold else gc.disable()
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.enable() if on else gc.disable()


def test_collections_inside_every_recording_leave_adaptation_alive(tmp_path, monkeypatch):
    """A graph that is freed while another one is recorded ends the recording, so nothing may be left for the collector to find there."""
    score, begin, forced = adapting(tmp_path), torch.cuda.CUDAGraph.capture_begin, []

    def capture_begin(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        forced.append(gc.collect())
    with collector():
        expected = score()
        lost = tg.Replay(lambda: torch.ones(1, device="cuda") + 1, torch.cuda.graph_pool_handle())
        assert lost() == lost() == 2 and lost.graph is not None
        lost.itself, lost = lost, None  # a recorded graph that only the collector can free
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", capture_begin)
    with collector(50, 5, 5):
        assert all((score().nats == expected.nats).all() for _ in range(2))
    assert len(forced) >= 2


def test_after_training_its_recorded_graphs_are_gone(corpus, tmp_path, monkeypatch):
    """Evaluation needs their memory, and the cycle collector comes when it likes: here never."""
    knobs = dict(PRESET="record", NUM_LAYERS="4", MODEL_DIM="256", LOOP_START="1", LOOP_END="2", PARALLEL_START_LAYER="3", XSA_LAST_N="4",
                 COMPILE_SCOPE="none", TRAIN_BATCH_TOKENS="65536", MICRO_BATCH_TOKENS="65536", TRAIN_BATCH_SCHEDULE="", ITERATIONS="8",
                 MAX_WALLCLOCK_SECONDS="0", WARMUP_STEPS="2", RUN_ID="graphs", ARTIFACT_DIR=str(tmp_path), **corpus.env)
    cfg, born, init = tg.load_config(knobs, True), [], tg.RowGradients.__init__
    run = tg.Run(cfg, (0, 0, 1), quiet=True)
    model, stream = tg.build_model(cfg, run), tg.TrainStream(cfg, run)

    def remembered(self, *arguments):
        init(self, *arguments)
        born.append(weakref.ref(self))
    monkeypatch.setattr(tg.RowGradients, "__init__", remembered)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    with collector():
        tg.train(model, cfg, run, stream, None)
        most, after = torch.cuda.max_memory_reserved() - before, torch.cuda.memory_reserved() - before
        assert len(born) == 1 and born[0]() is None
    assert most > 1 << 30 and after < most / 4, (most >> 20, after >> 20)


def test_fused_nats_equal_their_eager_twin_in_fp32(run):
    """bf16 on the GPU, an odd number of rows, logits beyond the cap among them."""
    targets = torch.randint(0, 8192, (1003,), device="cuda")
    inputs = [(2 * torch.randn(1003, 512, device="cuda")).bfloat16(), (0.2 * torch.randn(8192, 512, device="cuda")).bfloat16()]
    grad, results = torch.randn(1003, device="cuda"), []
    for f, wide in ((tg.head_nll_fused, False), (tg.head_nll_eager, True)):
        mine = [x.float().requires_grad_() if wide else x.clone().requires_grad_() for x in inputs]
        out = f(*mine, targets, 30.0)
        results.append([out, *torch.autograd.grad(out, mine, grad.to(out.dtype))])
    for got, reference in zip(*results):
        assert torch.isfinite(got).all() and relative(got, reference) < 1e-2


@pytest.mark.parametrize("tokens, hidden", [(1, 2304), (130, 2048), (4097, 2304)])
@pytest.mark.parametrize("slope, stream", [(0.5, True), (0.0, False)])
def test_fused_mlp_is_as_near_to_fp32_as_its_eager_twin(tokens, hidden, slope, stream):
    """Rows that fill no tile; a last bit is a sign, so the bound is what bf16's own roundings cost, half as much again."""
    if not tg.large_tiles():
        pytest.skip("tensor descriptors need a Hopper GPU")
    torch.manual_seed(0)
    x, grad, onto = (torch.randn(tokens, 512, device="cuda").bfloat16() for _ in "xgo")
    layers = [tg.Linear(*shape).cuda() for shape in ((hidden, 512), (512, hidden))]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, std=layer.weight.shape[1] ** -0.5)
        layer.weight.data = layer.weight.bfloat16().float()
    results = []
    for f, dtype in ((tg.mlp_fused, torch.bfloat16), (tg.mlp_eager, torch.bfloat16), (tg.mlp_eager, torch.float32)):
        mine = [t.to(dtype).requires_grad_() for t in (x, onto)[:1 + stream]]
        out = f(mine[0], *layers, slope, *mine[1:])
        results.append([out, *torch.autograd.grad(out, [*mine, *(layer.weight for layer in layers)], grad.to(dtype))])
    for fused, eager, exact in zip(*results):
        assert torch.isfinite(fused).all() and relative(fused, exact) < 1.5 * relative(eager, exact) + 1e-3


@pytest.mark.parametrize("tokens, dim, lead", [(1, 512, 12), (4097, 512, 12), (1003, 320, 320), (1003, 320, 0)])
def test_a_blocks_start_is_as_near_to_fp32_as_its_eager_twin(tokens, dim, lead):
    torch.manual_seed(0)
    rows, weights, depth = [torch.randn(tokens, dim, device="cuda").bfloat16() for _ in range(4)], torch.randn(2, dim, device="cuda"), torch.tensor(0.3).cuda()
    results = []
    for f, dtype in ((tg.mix_fused, torch.bfloat16), (tg.mix_eager, torch.bfloat16), (tg.mix_eager, torch.float32)):
        x, x0, *grads = (t.to(dtype) for t in rows)
        mine = [t.clone().requires_grad_() for t in (x, x0, weights)]
        made = f(*mine, depth, lead, True)
        results.append([*made[:2], *torch.autograd.grad(made, mine, [*grads, grads[1][:, :lead].flip(0)])])
    for fused, eager, exact in zip(*results):
        assert torch.isfinite(fused).all() and relative(fused, exact) < 1.5 * relative(eager, exact) + 1e-3


@pytest.mark.parametrize("stream", [False, True])
def test_products_in_fp8_are_as_near_as_eight_bits_allow(stream):
    """Inputs of the sizes that training has, gradients of tokens a thousandfold apart; e4m3 rounds by 2.6 % of a number (rms)."""
    if not tg.large_tiles():
        pytest.skip("tensor descriptors need a Hopper GPU")
    torch.manual_seed(0)
    x = tg.norm(torch.randn(4097, 512, device="cuda")).bfloat16()
    grad = (1e-6 * torch.randn(4097, 512, device="cuda") * torch.randn(4097, 1, device="cuda").mul(2).exp()).bfloat16()
    up, down = ((0.05 * torch.randn(*shape, device="cuda")).bfloat16() for shape in ((2304, 512), (512, 2304)))
    results = []

    onto = torch.randn_like(x)

    def plain(x, up, down, onto, slope):
        return tg.mlp_eager(x, lambda rows: rows @ up.T, lambda rows: rows @ down.T, slope, onto)
    for form, dtype in ((tg.MLP8.apply, torch.bfloat16), (plain, torch.float32)):
        mine = [t.to(dtype).requires_grad_() for t in (x, up, down, onto)[:3 + stream]]
        out = form(*mine, *[None] * (not stream), 0.5)
        out = out - onto.detach().to(dtype) if stream else out  # its rounding would be small beside the stream's
        results.append([out, *torch.autograd.grad(out, mine, grad.to(dtype))])
    assert all(relative(got, exact) < 0.08 for got, exact in zip(*results))


def test_integers_of_the_gpu_come_back_from_the_stream():
    """Trellis inside GPTQ, the coder's tables and its reader, with weights on the device as in a run."""
    torch.manual_seed(0)
    w, x = torch.randn(3, 128, 96, device="cuda"), torch.randn(4000, 96, device="cuda")
    h = (x.T @ x / len(x)).expand(3, 96, 96).contiguous()
    step = torch.full((3, 128), 0.25, device="cuda")
    q = tg.gptq(w, tg.factor_hessians(h), step, 127, None, True)
    plain = tg.gptq(w, tg.factor_hessians(h), 2 * step, 127)
    error = [float((((w - a * b) @ h) * (w - a * b)).sum()) for a, b in ((q, 0.25), (plain, 0.5))]
    assert error[0] < 0.9 * error[1]
    tensors = {"walked": tg.Quantized(q[0], step[0].half(), None, True), "plain": tg.Quantized(plain[0], step[0].half())}
    more, stream = tg.range_sections(tensors)
    back = tg.ranged_integers({n: list(t.q.shape) for n, t in tensors.items()}, ["walked"], *more, stream)
    assert all(torch.equal(back[n], t.q.cpu()) for n, t in tensors.items())


@pytest.mark.parametrize("scope, fp8, bound", [("none", "none", 5e-2), ("block", "none", 5e-2), ("block", "mlp", 0.15)])
def test_compiled_and_fused_equal_eager(scope, fp8, bound, run):
    """Loss and gradients of the record network against the same weights run eagerly without our kernels, both plans."""
    grads = {}
    for how in (("none", "eager", "none"), (scope, "triton", fp8)):
        cfg = tg.load_config(dict(zip(("COMPILE_SCOPE", "KERNELS", "FP8"), how)), True)
        model = tg.build_model(cfg, run)
        with torch.no_grad():  # off the identity start, so that every path carries signal
            torch.manual_seed(1)
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        ids = torch.randint(2, 8192, (4097,), generator=torch.Generator().manual_seed(2)).numpy()
        ids[[0, 5, 6, 1500]] = 1
        cu = tg.cut_segments(ids[:-1], tg.np.array([0]), 2048, True)
        batch = tg.make_batch(ids[:-1], ids[1:], cu, 2048, run, 64)
        for looping in (False, True):
            model.looping = looping
            loss = model.nll(*batch).mean()
            loss.backward()
            grads[how, looping] = [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]
            for p in model.parameters():
                p.grad = None
    for looping in (False, True):
        a, b = grads[("none", "eager", "none"), looping], grads[(scope, "triton", fp8), looping]
        assert abs(float(a[0] - b[0])) < 5e-3
        assert relative(torch.cat([x.flatten() for x in a[1:]]), torch.cat([x.flatten() for x in b[1:]])) < bound


@pytest.mark.parametrize("scope", ["none", "block"])
def test_recorded_rows_have_the_gradients_of_launched_ones(scope, run):
    """Two shapes and both plans in turn, three times each: launched, recorded, replayed; they share their memory."""
    cfg = tg.load_config({"COMPILE_SCOPE": scope}, True)
    model = tg.build_model(cfg, run)
    with torch.no_grad():
        torch.manual_seed(1)
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    recorded = tg.RowGradients(model, list(model.parameters()), run)
    launched = tg.RowGradients(model, list(model.parameters()), run)
    launched.pool = None
    rng, weight = np.random.default_rng(0), torch.full((), 1e-3, device="cuda")
    with tg.deterministic(cfg):  # sums of a library's attention differ between calls otherwise
        for turn in range(3):
            for tokens in (2048, 4096):
                for model.looping in (False, True):
                    ids = rng.integers(2, 8192, tokens + 1)
                    ids[[0, 5, 6, int(rng.integers(7, tokens))]] = tg.BOS
                    cu = tg.cut_segments(ids[:-1], np.array([0]), 2048, True)
                    batch, results = tg.make_batch(ids[:-1], ids[1:], cu, 2048, run, 64), []
                    for rows in (recorded, launched):
                        torch._foreach_zero_(rows.grads)
                        results.append([rows.add(batch, weight).clone(), torch.cat([g.flatten() for g in rows.grads])])
                    (a, x), (b, y) = results
                    assert float(a) == pytest.approx(float(b), rel=1e-4) and relative(x, y) < 1e-3, (turn, tokens, model.looping)


@pytest.mark.parametrize("unit_rows", ["1", "0"])
def test_muons_steps_compiled_are_as_near_to_fp32_as_launched(unit_rows, run):
    """Four steps over three shapes, one of them cut in three; clip factor, momentum and rate change, as they do in a run."""
    cfg, torch_rng = tg.load_config({"MUON_ROW_NORMALIZE": unit_rows}, True), torch.Generator().manual_seed(0)
    shapes = [((512, 256), (256, 128, 128)), ((512, 256), (256, 128, 128)), ((1152, 256), ()), ((256, 1152), ())]
    start, grads = ([torch.randn(shape, generator=torch_rng) for shape, _ in shapes * n] for n in (1, 4))
    torch._dynamo.reset()  # a form for each bank, and dynamo has room for eight
    compiled, moved = tuple(torch.compile(f, dynamic=False, fullgraph=True) for f in (tg.nesterov, tg.settle)), []
    for device, around in (("cpu", (tg.nesterov, tg.settle)), ("cuda", (tg.nesterov, tg.settle)), ("cuda", compiled)):
        params = [torch.nn.Parameter(w.to(device, copy=True)) for w in start]
        muon = tg.Muon([(p, split) for p, (_, split) in zip(params, shapes)], cfg, run, around)
        for step in range(4):
            for p, g in zip(params, grads[step * len(shapes):]):
                p.grad = g.to(device)
            muon.step(muon.reduce()[0], torch.tensor(0.5 ** step, device=device), 0.02 * (1 + step), 0.9 + 0.02 * step)
        moved.append([p.detach().cpu() - w for p, w in zip(params, start)])
    for exact, launched, one in zip(*moved):
        assert relative(launched, exact) < 0.1 and relative(one, exact) < 1.1 * relative(launched, exact) + 1e-3


def test_bench_measures_to_its_end(corpus, tmp_path):
    """MODE=bench as a user starts it, on a small network: kernels, optimiser, Hessians, packing and every pass."""
    program = Path(__file__).parents[2] / "train_gpt.py"
    knobs = dict(PRESET="smoke", MODE="bench", RUN_ID="bench", ARTIFACT_DIR=str(tmp_path), MODEL_DIM="128", NUM_HEADS="2",
                 NUM_KV_HEADS="1", TRAIN_BATCH_TOKENS="16384", MICRO_BATCH_TOKENS="8192", VAL_DOCS="8", **corpus.env)
    ended = subprocess.run([sys.executable, program], env=os.environ | knobs, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    told = json.loads((tmp_path / "bench.bench.json").read_text())
    assert {"hessians", "quantise and pack", "pass full tok/s", "pass ttt tok/s"} <= set(told["later"])
