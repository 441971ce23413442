"""Which tile the MLP's kernel likes: milliseconds of both directions over shapes of a tile, warps, stages and programs an SM.

    python tests/gpu/tiles.py [TOKENS] [HIDDEN]        one GPU, Hopper or later; half a minute

Two small programs on one multiprocessor can hide one's epilogue behind the other's products, which one large program that takes
tiles in turn cannot. The fastest row belongs in TILE (room 6 of train_gpt.py) and in the speed log of records/README.md.
"""
import importlib.util
import sys
from pathlib import Path

import torch

spec = importlib.util.spec_from_file_location("train_gpt", Path(__file__).parents[2] / "train_gpt.py")
tg = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tg)

# tile, warps, stages, programs an SM: those whose registers and shared memory leave room for so many
CHOICES = [((128, 256, 64), 8, 3, 1), ((128, 256, 64), 8, 2, 1), ((128, 128, 64), 4, 3, 2), ((128, 128, 64), 4, 2, 2),
           ((128, 128, 64), 8, 3, 1), ((128, 128, 64), 8, 2, 2), ((64, 256, 64), 4, 2, 2), ((64, 256, 64), 4, 3, 1),
           ((64, 128, 64), 4, 4, 2), ((64, 128, 64), 4, 3, 2), ((64, 128, 64), 4, 2, 3), ((128, 128, 32), 4, 4, 2)]


def launch(x, w, hidden, out, learn, tile, warps, stages, programs):
    rows, columns, depth = tile
    described = [tg.TensorDescriptor.from_tensor(t, list(b)) for t, b in
                 ((x, (rows, depth)), (w, (columns, depth)), (hidden, (rows, columns // 2)), (out, (rows, columns // 2)))]
    count = programs * torch.cuda.get_device_properties(0).multi_processor_count
    tg.hidden_product[(count,)](*described, len(x), 0.5, len(w), w.shape[1], *tile, learn, num_warps=warps, num_stages=stages)


def milliseconds(work, count=10):
    work(), work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in "ab"]
    marks[0].record()
    for _ in range(count):
        work()
    marks[1].record()
    marks[1].synchronize()
    return marks[0].elapsed_time(marks[1]) / count


def main(tokens=131072, hidden=2304, width=512):
    torch.manual_seed(0)
    x, w = torch.randn(tokens, width, device="cuda").bfloat16(), (torch.randn(hidden, width, device="cuda") / 8).bfloat16()
    reference = torch.empty(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    tg.hidden_rows(x, w, reference, reference, 0.5, False)
    work = 2e-9 * tokens * hidden * width
    print(f"{tokens} tokens, {width} -> {hidden}; cuBLAS without activation: {milliseconds(lambda: x @ w.T):.3f} ms")
    for learn in (False, True):
        found, want = [], torch.empty_like(reference)
        tg.hidden_rows(x, w, reference, want, 0.5, learn)
        for tile, warps, stages, programs in CHOICES:
            out = torch.zeros_like(reference)
            try:
                ms = milliseconds(lambda: launch(x, w, reference if learn else out, out, learn, tile, warps, stages, programs))
            except Exception as e:  # too much shared memory, or a tile that the compiler cannot lay out
                print(f"{'backward' if learn else 'forward'} {tile} {warps} warps {stages} stages x{programs}: {type(e).__name__}", file=sys.stderr)
                continue
            same = torch.equal(out, want) or float((out.float() - want.float()).norm() / want.float().norm()) < 1e-3
            found.append((ms, tile, warps, stages, programs, same))
        for ms, tile, warps, stages, programs, same in sorted(found):
            print(f"{'backward' if learn else 'forward '} {ms:.3f} ms {work / ms:.0f} TFLOP/s  tile {tile} {warps} warps {stages} stages "
                  f"{programs} programs an SM{'' if same else '  WRONG'}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
