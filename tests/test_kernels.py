"""Our Triton kernels, run by Triton's interpreter on a CPU: every value and gradient as the eager twins give them.

What only a GPU shows (bf16, compiled blocks, speed) is in tests/gpu.
"""
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import config, make_run, trainer

tg = trainer()
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def errors():
    """Comparison -> largest relative error. A process of its own: the interpreter is chosen when Triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; tests/requirements.txt has it for Linux on x86-64")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "kernels_probe.py"], cwd=HERE, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind, cases, bound", [("nll", 3, 2e-6), ("mlp", 3, 2e-6), ("fp8", 2, 1e-2), ("mix", 2, 2e-6), ("cached", 2, 2e-6),
                                                ("attended", 3, 5e-6), ("attention", 5, 5e-6), ("network", 2, 1e-3)])
def test_interpreted_kernels_equal_their_eager_twins(kind, cases, bound, errors):
    mine = {name: e for name, e in errors.items() if name.startswith(kind)}
    assert len(mine) == cases and max(mine.values()) < bound, mine


def compiled(kernel, types, fixed, spilt=0, **options):
    """A kernel in the machine code of a Hopper GPU, which needs none; `spilt`: stores of registers to memory it may have."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    made = triton.compile(ASTSource(kernel, types | dict.fromkeys(fixed, "constexpr"), fixed), target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["sass"].count(" STL") <= spilt, "registers are spilt to memory"
    return made


@pytest.mark.parametrize("name", tg.TILES)
def test_the_products_kernel_compiles_for_hopper(name):
    """The record's widths and tiles: matrix units of the right kind, and as many programs a multiprocessor as it is launched with."""
    cfg, (end, fp8) = config(PRESET="record"), (name.removesuffix(" in FP8"), name.endswith("FP8"))
    height, width, depth, warps, stages, share = tg.TILES[name]
    kind, wide = "fp8e4nv" if fp8 else "bf16", cfg.head_dim if end == "heads" else 0
    width = width or 2 * wide
    half = f"tensordesc<bf16[{height}, {wide // 2 or width // 2}]>"
    types = {"X": f"tensordesc<{kind}[{height}, {depth}]>", "W": f"tensordesc<{kind}[{width}, {depth}]>", "MORE": half, "OUT": half,
             "LOW": half.replace("bf16", kind), **dict.fromkeys(("ROWS", "COS", "SIN", "GAIN"), "*fp32"), "T": "i32", "slope": "fp32", "gain": "fp32"}
    heads, keys = (cfg.num_heads, cfg.num_kv_heads) if end == "heads" else (0, 0)
    rows, depths = {"heads": ((heads + 2 * keys) * cfg.head_dim, cfg.model_dim), "add": (cfg.model_dim, cfg.hidden_dim)}.get(
        end, (cfg.hidden_dim, cfg.model_dim))
    fixed = {"N": rows, "K": depths, "H": heads, "TURNING": heads + keys, "E": wide, "R": cfg.rotary_dims if heads else 0, "BM": height, "BN": width,
             "BK": depth, "END": end, "FP8": fp8}
    made = compiled(tg.product_kernel, types, fixed, num_warps=warps, num_stages=stages)
    assert f"wgmma.mma_async.sync.aligned.m64n{width}k{32 if fp8 else 16}.f32.{'e4m3' if fp8 else 'bf16'}" in made.asm["ptx"]
    assert share * (made.metadata.shared + 1024) <= 228 * 1024


@pytest.mark.parametrize("ending", [False, True])
def test_attentions_kernels_compile_for_hopper(ending):
    """The record's heads: two programs a multiprocessor each; keys spill a few numbers, outside of their loops."""
    cfg, (rows, warps, stages) = config(PRESET="record"), tg.ATTEND
    tile = f"tensordesc<bf16[{rows}, {cfg.head_dim}]>"
    fixed = {"H": cfg.num_heads, "G": cfg.num_heads // cfg.num_kv_heads, "E": cfg.head_dim, "R": cfg.rotary_dims * ending, "B": rows,
             "XSA": ending, "GATED": ending}
    one = {"T": "i32", "scale": "fp32", "GATE": "*bf16", "DGATE": "*bf16", "FIRST": "*i32", "STOP": "*i32",
           **dict.fromkeys(("LSE", "DELTA", "ALONG", "ROOT", "COS", "SIN", "GAIN", "DGAIN"), "*fp32")}
    for kernel, depth in zip((tg.attend_forward, tg.attend_queries, tg.attend_keys), stages):
        names = kernel.arg_names
        made = compiled(kernel, {n: one.get(n, tile) for n in names if n not in fixed}, {n: x for n, x in fixed.items() if n in names},
                        spilt=16 if kernel is tg.attend_keys else 0, num_warps=warps, num_stages=depth)
        assert 2 * (made.metadata.shared + 1024) <= 228 * 1024 and "wgmma.mma_async" in made.asm["ptx"]


def test_the_other_kernels_compile_for_hopper():
    """Nats over the record's vocabulary, a block's start; attention of a lock step's chunks to a full ring."""
    cfg, tensor = config(PRESET="record"), "*bf16"
    compiled(tg.capped_nll, {"LOGITS": tensor, "TARGETS": "*i64", "NLL": "*fp32", "cap": "fp32"},
             {"V": cfg.vocab_size, "B": cfg.vocab_size, "SLOPE": True}, num_warps=8)
    rows, warps, _ = tg.MIX
    compiled(tg.mix_back, {**dict.fromkeys(("X", "X0", "GRAD", "NORMED", "LEAD", "DX", "DX0"), tensor), **dict.fromkeys(("MIX", "DEPTH", "SUMS"), "*fp32"), "T": "i32"},
             {"D": cfg.model_dim, "W": cfg.model_dim, "B": rows, "L": cfg.gate_window}, num_warps=warps)
    group, chunk = cfg.num_heads // cfg.num_kv_heads, cfg.ttt_chunk_size
    shape = {"W": cfg.eval_seq_len, "C": chunk, "H": cfg.num_heads, "G": group, "P": 1, "E": cfg.head_dim, "R": 128, "J": 64, "N": 64}
    assert 64 < group * chunk <= shape["R"] and 32 < chunk <= shape["J"] and tg.RING_TILES[0] == (shape["N"], 3, False)
    reads = {**dict.fromkeys(("Q", "K", "V", "OK", "OV"), tensor), "BEGIN": "*i64", "OUT": tensor, "LSE": "*fp32"}
    numbers = {"scale": "fp32", **dict.fromkeys(("cells", "qs", "ks", "vs"), "i32")}
    compiled(tg.cached_forward, reads | numbers, shape, num_warps=4)
    compiled(tg.cached_backward, reads | dict.fromkeys(("GRAD", "DQ", "DK", "DV"), tensor) | numbers, shape, num_warps=8)


def test_without_a_gpu_the_eager_twins_run(tmp_path):
    cfg = config(PRESET="record")
    chosen = tg.choose_kernels(cfg, make_run(tmp_path, cfg))
    assert chosen[1:] == (tg.head_nll_eager, tg.mlp_eager, tg.mix_eager, None, tg.attention_cached_eager)


def pretend_hopper(monkeypatch, run):
    monkeypatch.setattr(tg, "choose_attention", lambda cfg, run: tg.attention_sdpa)
    monkeypatch.setattr(tg, "choose_cached", lambda cfg, run: tg.attention_cached_eager)
    monkeypatch.setitem(tg.HAVE, "triton", True)
    monkeypatch.setattr(run, "device", tg.torch.device("cuda"))
    monkeypatch.setattr(tg, "large_tiles", lambda: True)


@pytest.mark.parametrize("fp8", ["none", "mlp"])
def test_a_hopper_gpu_runs_the_form_that_was_asked_for(fp8, tmp_path, monkeypatch):
    cfg, called = config(PRESET="record", FP8=fp8), []
    run = make_run(tmp_path, cfg)
    pretend_hopper(monkeypatch, run)
    monkeypatch.setattr(tg.MLP8, "apply", lambda *inputs: called.append(("mlp", inputs)))
    monkeypatch.setattr(tg.torch.ops.golf, "mlp", lambda *inputs: [called.append(("none", inputs))])
    layers = tg.Linear(32, 16), tg.Linear(16, 32)
    product = tg.choose_kernels(cfg, run).mlp
    stream = tg.torch.randn(3, 16)
    product(tg.torch.randn(3, 16), *layers, 0.5, stream)
    with tg.torch.no_grad():
        assert product(tg.torch.randn(3, 16), *layers, 0.5).shape == (3, 16)  # where nothing learns there is nothing to keep
    assert [(form, [x.shape for x in inputs[:3]]) for form, inputs in called] == [(fp8, [(3, 16), (32, 16), (16, 32)])]
    assert called[0][1][3] is stream


@pytest.mark.parametrize("kernels, capability, shared, heads, why", [
    ("eager", (9, 0), 227, 4, "KERNELS=eager"), ("auto", (8, 9), 227, 4, "made for Hopper and later"), ("auto", (12, 0), 99, 4, "made for Hopper"),
    ("auto", (9, 0), 227, 2, "heads of up to 128")])
def test_attentions_own_kernels_are_passed_over(kernels, capability, shared, heads, why, tmp_path, monkeypatch):
    """Where Triton was not wanted, on chips and for heads they were not made for; asked for by name they stop the run."""
    cfg = config(PRESET="record", KERNELS=kernels, NUM_HEADS=heads)
    run = make_run(tmp_path, cfg)
    for have in ("cuda", "triton"):
        monkeypatch.setitem(tg.HAVE, have, True)
    card = types.SimpleNamespace(major=capability[0], minor=capability[1], shared_memory_per_block_optin=shared << 10)
    monkeypatch.setattr(tg.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tg.torch.cuda, "get_device_properties", lambda device: card)
    assert why in tg.try_attention("triton", cfg, run)
    with pytest.raises(tg.ConfigError, match=why):
        tg.choose_attention(config(PRESET="record", KERNELS=kernels, NUM_HEADS=heads, ATTN_BACKEND="triton"), run)


@pytest.mark.parametrize("gpu, knobs, runs", [
    (False, {}, "eager fp8:none"), (False, {"FP8": "none"}, "eager fp8:none"), (True, {}, "triton fp8:mlp"), (True, {"MLP_MULT": 4.01}, "triton fp8:none"),
    (True, {"KERNELS": "eager"}, "eager fp8:none"), (True, {"FP8": "none"}, "triton fp8:none")], ids=str)
def test_whether_fp8_runs_is_told(gpu, knobs, runs, tmp_path, monkeypatch):
    """Other digits than the recipe's, under the recipe's name: a GPU that cannot says so loudly, and the verdict says it again."""
    cfg = config(PRESET="record", **knobs)
    run = make_run(tmp_path, cfg)
    if gpu:
        pretend_hopper(monkeypatch, run)
    run.open_log(cfg)
    chosen = tg.choose_kernels(cfg, run)
    run.close()
    assert f"kernels:{runs}\n" in run.path(".txt").read_text().split(tg.RULER)[-1]
    missed = gpu and cfg.fp8 != "none" and "none" in runs
    assert missed == any("FP8=mlp" in caveat for caveat in run.caveats)
    # rows that no tensor descriptor can hold go the eager twin's way
    assert getattr(chosen.mlp, "keywords", {}).get("fp8") == (None if missed or not gpu else "fp8:mlp" in runs)


@pytest.mark.parametrize("too_large", range(4))
def test_adaptations_attention_takes_the_first_tile_that_runs(too_large, tmp_path, monkeypatch):
    """As on a GPU with less shared memory, found out at the start and not after training; the eager form is the last resort."""
    cfg = config(PRESET="smoke")
    run, tiles = make_run(tmp_path, cfg), tg.RING_TILES
    assert len(tiles) == 3
    monkeypatch.setitem(tg.HAVE, "triton", True)
    monkeypatch.setattr(type(run), "gpu", property(lambda self: True))

    def attend(q, k, v, past, tile):
        if tiles.index(tile) < too_large:
            raise RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376")
        return tg.attention_cached_eager(q, k, v, past)
    monkeypatch.setattr(tg, "attention_cached_triton", attend)
    run.open_log(cfg)
    form = tg.choose_cached(cfg, run)
    run.close()
    told = run.path(".txt").read_text().split(tg.RULER)[-1]
    if too_large < len(tiles):
        assert form.keywords == {"tile": tiles[too_large]} and f"tile {tiles[too_large]}" in told
    else:
        assert form is tg.attention_cached_eager and "falls back to the eager form" in told and "131072" in told


def test_a_tile_that_computes_something_else_is_passed_over(tmp_path, monkeypatch):
    cfg = config(PRESET="smoke")
    run = make_run(tmp_path, cfg)
    monkeypatch.setitem(tg.HAVE, "triton", True)
    monkeypatch.setattr(type(run), "gpu", property(lambda self: True))
    monkeypatch.setattr(tg, "attention_cached_triton", lambda q, k, v, past, tile: tg.attention_cached_eager(q, k, 1.1 * v, past))
    assert tg.choose_cached(cfg, run) is tg.attention_cached_eager


def test_fused_kernels_that_cannot_run_stop_the_run(tmp_path):
    cfg = config(PRESET="record", KERNELS="triton")
    with pytest.raises(tg.ConfigError, match="KERNELS=triton"):
        tg.choose_kernels(cfg, make_run(tmp_path, cfg))
