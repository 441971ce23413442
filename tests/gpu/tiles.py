"""Which tiles our kernels like. The MLP's: milliseconds of both directions over shapes of a tile, warps, stages and programs an SM.
Attention's: of its three kernels over stages and warps, with XSA and gate, beside torch's varlen attention.

    python tests/gpu/tiles.py [TOKENS] [HIDDEN]        one GPU, Hopper or later

Two small programs on one multiprocessor can hide one's epilogue behind the other's products, which one large program that takes
tiles in turn cannot. The fastest row belongs in TILES or ATTEND (room 6 of train_gpt.py) and in the speed log of records/README.md.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "records"))
import bench  # noqa: E402
import runs  # noqa: E402

# as TILES has them: rows, columns, depth, warps, stages, and so many programs an SM as registers and shared memory leave room for
TILES = [(128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 2, 1), (128, 128, 64, 4, 3, 2), (128, 128, 64, 4, 2, 2), (128, 128, 64, 8, 3, 1),
         (128, 128, 64, 8, 2, 2), (64, 256, 64, 4, 2, 2), (64, 256, 64, 4, 3, 1), (64, 128, 64, 4, 4, 2), (64, 128, 64, 4, 3, 2),
         (64, 128, 64, 4, 2, 3), (128, 128, 32, 4, 4, 2), (128, 128, 64, 4, 4, 2)]


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
    first, stop = tg.segment_bounds(cu, tokens).unbind()
    print(f"{tokens} tokens in {len(cu) - 1} documents; torch's varlen, forward: "
          f"{replayed(lambda: tg.attention_varlen(q, k, v, cu, 2048)):.3f} ms")
    today, want = tg.ATTEND, {}
    for stages in STAGES:
        tg.ATTEND = (*today[:2], stages)
        for xsa, factor in ((False, gate.new_empty(0)), (True, gate)):
            try:
                y, lse, along = torch.ops.golf.attend(q, k, v, factor, first, stop, xsa)
                back = (grad, q, k, v, factor, first, stop, y, lse, along, xsa)
                took = replayed(lambda: torch.ops.golf.attend(q, k, v, factor, first, stop, xsa)), replayed(
                    lambda: torch.ops.golf.attend_backward(*back))
                got = torch.cat([g.flatten().float() for g in torch.ops.golf.attend_backward(*back)])
            except Exception as e:  # more shared memory than there is
                print(f"attention stages {stages}: {type(e).__name__}", file=sys.stderr)
                continue
            same = float((got - want.setdefault(xsa, got)).norm() / got.norm()) < 1e-3
            print(f"attention{' with XSA and gate' if xsa else ''} {took[0]:.3f} and {took[1]:.3f} ms, stages {stages}{'' if same else '  WRONG'}",
                  flush=True)
    tg.ATTEND = today


def main(tokens=131072, hidden=2304, width=512):
    tg = runs.load_program(ROOT / "train_gpt.py")
    run = tg.Run(tg.load_config({}, True), (0, 0, 1), quiet=True)
    torch.manual_seed(0)
    attention(tg, tokens)
    x, w = torch.randn(tokens, width, device="cuda").bfloat16(), (torch.randn(hidden, width, device="cuda") / 20).bfloat16()
    work, rows, today = 2e-12 * tokens * hidden * width, torch.full((tokens,), 1 / 2048, device="cuda"), tg.TILES
    print(f"{tokens} tokens, {width} -> {hidden}; cuBLAS without activation: {1000 * bench.timed(lambda: x @ w.T, run):.3f} ms")
    squares = tg.hidden_rows(x, w, None, None, 0.5, 1.0)[0]
    for fp8 in (False, True):
        operands = [tg.in_e4m3(x, 16.0), tg.in_e4m3(w, tg.WEIGHT_8)] if fp8 else [x, w]
        for learn in (False, True):
            label, found = f"{'backward' if learn else 'forward'}{' in FP8' if fp8 else ''}", []
            more = (squares if learn else None, rows if fp8 else None, 0.5, 1.0)
            want = tg.hidden_rows(*operands, *more)[0].float()
            for tile in TILES:
                tg.TILES = (tile,) * len(today)
                try:
                    took = bench.timed(lambda: tg.hidden_rows(*operands, *more), run)
                    got = tg.hidden_rows(*operands, *more)[0].float()
                except Exception as e:  # too much shared memory, or a tile that the compiler cannot lay out
                    print(f"{label} {tile}: {type(e).__name__}", file=sys.stderr)
                    continue
                found.append((took, tile, float((got - want).norm() / want.norm()) < 1e-3))
            tg.TILES = today
            for took, tile, same in sorted(found):
                print(f"{label} {1000 * took:.3f} ms {work / took:.0f} TFLOP/s {tile}{'' if same else '  WRONG'}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
