"""Which tiles our kernels like. The products': milliseconds over shapes of a tile, warps, stages and programs an SM, beside cuBLAS.
Attention's: of its three kernels over stages, alone and as the whole layer, beside torch's varlen attention.

    python tests/gpu/tiles.py [TOKENS] [HIDDEN]        one GPU, Hopper or later

Two small programs on one multiprocessor can hide one's epilogue behind the other's products, which one large program that takes
tiles in turn cannot. The fastest row belongs in TILES or ATTEND (room 6 of train_gpt.py) and in the speed log of records/README.md.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "records"))
import runs  # noqa: E402

# as TILES has them: rows, columns, depth, warps, stages, and so many programs an SM as registers and shared memory leave room for
TILES = [(128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 2, 1), (128, 128, 64, 4, 3, 2), (128, 128, 64, 4, 2, 2), (128, 128, 64, 8, 3, 1),
         (128, 128, 64, 8, 2, 2), (128, 128, 64, 8, 4, 1), (64, 256, 64, 4, 2, 2), (64, 256, 64, 4, 3, 1), (64, 128, 64, 4, 4, 2), (64, 128, 64, 4, 3, 2),
         (64, 128, 64, 4, 2, 3), (128, 128, 32, 4, 4, 2), (128, 128, 64, 4, 4, 2), (128, 256, 32, 8, 4, 1)]
STAGES = [(3, 2, 2), (2, 2, 2), (4, 2, 2), (3, 3, 2), (3, 1, 2), (3, 2, 3), (3, 2, 1)]  # of forward, queries and keys, blocks of 64 rows


def replayed(work) -> float:
    """Milliseconds of a call's kernels, without the host's time: the median of replays of a CUDA graph."""
    import triton
    return triton.testing.do_bench_cudagraph(work, return_mode="median")


def attention(tg, tokens: int, heads=(4, 2), wide=128) -> None:
    """Documents of 870 tokens on average, cut at 2,048, as in the speed log."""
    lengths = torch.empty(tokens // 100).exponential_(1 / 870).clamp(30, 2048).int()
    ends = lengths.cumsum(0)
    cu = torch.cat((ends.new_zeros(1), ends[ends < tokens], ends.new_full((1,), tokens))).int().cuda()
    rows = torch.randn(tokens, sum(heads) + heads[1], wide, device="cuda")
    q, k = (2.3 * tg.norm(rows[:, :sum(heads)])).bfloat16().split(heads, 1)
    v, gate = rows[:, sum(heads):].bfloat16(), torch.rand(tokens, heads[0], device="cuda").bfloat16()
    grad = torch.randn(tokens, heads[0], wide, device="cuda").bfloat16()
    bounds = tg.segment_bounds(cu, tokens)
    print(f"{tokens} tokens in {len(cu) - 1} documents; torch's varlen, forward: "
          f"{replayed(lambda: tg.attention_varlen(q, k, v, cu, 2048)):.3f} ms")
    today, want, width = tg.ATTEND, {}, heads[0] * wide
    x, onto, back = (torch.randn(tokens, width, device="cuda").bfloat16() for _ in "xog")
    weights = [(torch.randn(n, width, device="cuda") / width ** 0.5).bfloat16() for n in (rows.shape[1] * wide, width)]
    angles = [torch.rand(tokens, 16, device="cuda") for _ in "cs"]
    layer = x, *weights, torch.full((heads[0],), 2.3, device="cuda"), gate
    for stages in STAGES:
        tg.ATTEND = (*today[:2], stages)
        for name in ("attend", "attention"):
            forward, backward = (getattr(torch.ops.golf, name + s) for s in ("", "_backward"))
            inputs = (q, k, v, *bounds) if name == "attend" else (*layer, onto, *angles, *bounds, True)
            try:
                kept = forward(*inputs)
                more = (grad, *inputs, *kept) if name == "attend" else (back, *layer, *angles, *bounds, *kept[1:], True)
                took = replayed(lambda: forward(*inputs)), replayed(lambda: backward(*more))
                got = torch.cat([g.flatten().float() for g in backward(*more)])
            except Exception as e:  # more shared memory than there is
                print(f"{name} stages {stages}: {type(e).__name__}", file=sys.stderr)
                continue
            same = float((got - want.setdefault(name, got)).norm() / got.norm()) < 1e-3
            print(f"{name} {took[0]:.3f} and {took[1]:.3f} ms, stages {stages}{'' if same else '  WRONG'}", flush=True)
    tg.ATTEND = today


def try_tiles(tg, name, label, tiles, work, launch) -> None:
    """Rows of one kind of product, the fastest first; `launch` returns what it made."""
    today, found = tg.TILES, []
    want = launch().float()
    for tile in tiles:
        tg.TILES = today | {name: tile}
        try:
            took, got = replayed(launch), launch().float()
        except Exception as e:  # too much shared memory, or a tile that the compiler cannot lay out
            print(f"{label} {tile}: {type(e).__name__}", file=sys.stderr)
            continue
        found.append((took, tile, float((got - want).norm() / want.norm()) < 1e-3))
    tg.TILES = today
    for took, tile, same in sorted(found):
        print(f"{label} {took:.3f} ms {work / took:.0f} TFLOP/s {tile}{'' if same else '  WRONG'}", flush=True)


def products(tg, tokens: int, width=512, heads=(4, 2), wide=128) -> None:
    """What attention's layer and the MLP's second half multiply: normed and rotated heads, and onto the residual stream."""
    def random(*shape):
        return torch.randn(*shape, device="cuda").bfloat16()
    angles, gain = [torch.rand(tokens, 16, device="cuda") for _ in "cs"], torch.full((heads[0],), 2.3, device="cuda")
    turned = tg.Turned(torch.empty(sum(heads), tokens, device="cuda"), *angles, gain)
    x, w = random(tokens, width), random((heads[0] + 2 * heads[1]) * wide, width)
    rows = random(tokens, len(w))
    print(f"512 -> {len(w)}; cuBLAS: {replayed(lambda: x @ w.T):.3f} ms")
    try_tiles(tg, "heads", "heads", [(t[0], 0, *t[2:]) for t in TILES if t[1] == 2 * wide],
              2e-9 * tokens * len(w) * width, lambda: tg.launch_product("heads", x, w, rows, turned=turned))
    for deep in (512, 2304):
        x, w, onto = random(tokens, deep), random(width, deep), random(tokens, width)
        print(f"{deep} -> {width}; cuBLAS: {replayed(lambda: x @ w.T):.3f} ms, addmm {replayed(lambda: torch.addmm(onto, x, w.T)):.3f} ms")
        try_tiles(tg, "add", f"add {deep}", TILES, 2e-9 * tokens * deep * width, lambda: tg.product_onto(x, w, onto))


def mixing(tg, tokens: int, width=512) -> None:
    """A block's start, way back."""
    rows, weights = [torch.randn(tokens, width, device="cuda").bfloat16() for _ in range(4)], torch.randn(2, width, device="cuda")
    today, depth, lead = tg.MIX, torch.ones((), device="cuda"), rows[0][:, :12].contiguous()
    for rows_, warps in ((8, 8), (4, 4), (4, 8), (16, 8), (2, 4), (8, 4)):
        for share in (1, 2, 3, 4, 6):
            tg.MIX = rows_, warps, share
            print(f"mix {replayed(lambda: torch.ops.golf.mix_backward(*rows[:2], lead, *rows[2:], weights, depth)):.3f} ms {tg.MIX}", flush=True)
    tg.MIX = today


def main(tokens=131072, hidden=2304, width=512):
    tg = runs.load_program(ROOT / "train_gpt.py")
    torch.manual_seed(0)
    attention(tg, tokens)
    products(tg, tokens)
    mixing(tg, tokens)
    x, w = torch.randn(tokens, width, device="cuda").bfloat16(), (torch.randn(hidden, width, device="cuda") / 20).bfloat16()
    work, rows = 2e-9 * tokens * hidden * width, torch.full((tokens,), 1 / 2048, device="cuda")
    print(f"{tokens} tokens, {width} -> {hidden}; cuBLAS without activation: {replayed(lambda: x @ w.T):.3f} ms")
    squares = tg.hidden_rows(x, w, None, None, 0.5, 1.0)[0]
    for fp8 in (False, True):
        operands = [tg.in_e4m3(x, 16.0), tg.in_e4m3(w, tg.WEIGHT_8)] if fp8 else [x, w]
        for end in ("square", "slope"):
            more, name = (squares if end == "slope" else None, rows if fp8 else None, 0.5, 1.0), end + " in FP8" * fp8
            try_tiles(tg, name, name, TILES, work, lambda: tg.hidden_rows(*operands, *more)[0])
    down, onto = (torch.randn(width, hidden, device="cuda") / 20).bfloat16(), torch.randn(tokens, width, device="cuda").bfloat16()
    low, down = tg.in_e4m3(squares, tg.HIDDEN_8), tg.in_e4m3(down, tg.WEIGHT_8)
    print(f"{hidden} -> {width} in FP8; cuBLAS without the stream: {replayed(lambda: tg.product_e4m3(low, down)):.3f} ms")
    deep = [(*t[:2], 2 * t[2], *t[3:]) for t in TILES]  # half as many bytes a number leave room for twice the depth
    try_tiles(tg, "add in FP8", "add in FP8", TILES + deep, work, lambda: torch.ops.golf.onto(low, down, onto, 2.0 ** -9))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
