"""Takes a GPU's memory until so many GiB are left, and keeps it until SIGTERM or its parent's end: what is left is a smaller card's.

    python tests/gpu/hog.py GIB [GPU]        prints 'free: ...' when it is done
"""
import os
import sys
import time

import torch

STEP, PIECE, LEAST = 2 << 20, 8 << 30, 16 << 20  # the driver's step; one allocation; below 10 MiB torch's allocator takes 20 for it


def take(gpu: int, leave: int) -> list[torch.Tensor]:
    """Plain allocations until `leave` bytes are free, to LEAST at most. The context is there before the first look."""
    taken = [torch.zeros(1, device=f"cuda:{gpu}")]
    torch.cuda.synchronize(gpu)
    if torch.cuda.mem_get_info(gpu)[0] < leave:
        raise SystemExit(f"GPU {gpu} has {torch.cuda.mem_get_info(gpu)[0] / 2 ** 30:.2f} GiB free, fewer than {leave / 2 ** 30:.2f}")
    while (rest := torch.cuda.mem_get_info(gpu)[0] - leave) >= LEAST:
        taken.append(torch.empty(min(rest // STEP * STEP, PIECE), dtype=torch.uint8, device=f"cuda:{gpu}"))
        if torch.cuda.mem_get_info(gpu)[0] >= rest + leave:
            raise SystemExit("an allocation took nothing: somebody else gives memory back meanwhile")
    return taken


def main(arguments: list[str]) -> None:
    leave, gpu = int(float(arguments[0]) * 2 ** 30), int(arguments[1]) if len(arguments) > 1 else 0
    parent, taken = os.getppid(), take(gpu, leave)
    left, total = torch.cuda.mem_get_info(gpu)
    if not leave <= left < leave + LEAST:
        raise SystemExit(f"{left} bytes are free, not {leave}")
    print(f"free: {left / 2 ** 30:.3f} GiB of {total / 2 ** 30:.1f} in {len(taken)} pieces, {(total - left) >> 20} MiB in use", flush=True)
    while os.getppid() == parent:
        time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1:])
