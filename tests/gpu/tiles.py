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
         (64, 128, 64, 4, 2, 3), (128, 128, 32, 4, 4, 2)]


def main(tokens=131072, hidden=2304, width=512):
    tg = runs.load_program(ROOT / "train_gpt.py")
    run = tg.Run(tg.load_config({}, True), (0, 0, 1), quiet=True)
    torch.manual_seed(0)
    x, w = torch.randn(tokens, width, device="cuda").bfloat16(), (torch.randn(hidden, width, device="cuda") / 8).bfloat16()
    reference = torch.empty(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    tg.hidden_rows(x, w, reference, reference, 0.5, False)
    work = 2e-12 * tokens * hidden * width
    print(f"{tokens} tokens, {width} -> {hidden}; cuBLAS without activation: {1000 * bench.timed(lambda: x @ w.T, run):.3f} ms")
    today = tg.TILES
    for learn in (False, True):
        tg.TILES, label, found, want = today, "backward" if learn else "forward", [], torch.empty_like(reference)
        tg.hidden_rows(x, w, reference, want, 0.5, learn)
        for tile in TILES:
            tg.TILES, out = (tile, tile), torch.zeros_like(reference)
            try:
                took = bench.timed(lambda: tg.hidden_rows(x, w, reference if learn else out, out, 0.5, learn), run)
            except Exception as e:  # too much shared memory, or a tile that the compiler cannot lay out
                print(f"{label} {tile}: {type(e).__name__}", file=sys.stderr)
                continue
            same = torch.equal(out, want) or float((out.float() - want.float()).norm() / want.float().norm()) < 1e-3
            found.append((took, tile, same))
        for took, tile, same in sorted(found):
            print(f"{label} {1000 * took:.3f} ms {work / took:.0f} TFLOP/s {tile}{'' if same else '  WRONG'}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
