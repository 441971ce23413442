"""Which tile the MLP's kernel likes: milliseconds of both directions over shapes of a tile, warps, stages and programs an SM.

    python tests/gpu/tiles.py [TOKENS] [HIDDEN]        one GPU, Hopper or later

Two small programs on one multiprocessor can hide one's epilogue behind the other's products, which one large program that takes
tiles in turn cannot. The fastest row belongs in TILES (room 6 of train_gpt.py) and in the speed log of records/README.md.
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


def main(tokens=131072, hidden=2304, width=512):
    tg = runs.load_program(ROOT / "train_gpt.py")
    run = tg.Run(tg.load_config({}, True), (0, 0, 1), quiet=True)
    torch.manual_seed(0)
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
