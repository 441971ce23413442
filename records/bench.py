"""What a machine does with the program: MODE=doctor looks, MODE=bench measures every part beside its floor.

    MODE=doctor python train_gpt.py        versions, devices, data, a probe of the steps, how many a budget would hold
    MODE=bench python train_gpt.py         the same, then kernels, optimiser, calibration, packing and the scorer

The program loads this file and hands itself over as `tg`; nothing is trained that is kept, and validation text is not read:
the scorer runs on random documents of the validation set's lengths. Floors: bytes over the rate of a large copy, operations
over the rate of a large bf16 product (fp32 on a CPU), both measured here at the start: what runs in FP8 can be faster than
that (FP8=none times what has a floor). The figures go to
ARTIFACT_DIR/RUN_ID.bench.json; keep that file beside a speed log.
"""
import copy
import json
import math
import os
import statistics
import subprocess
import time
from pathlib import Path


# ----------------------------------------------------------------------------------------------------------------------
# Steps
# ----------------------------------------------------------------------------------------------------------------------
def doctor(tg, model, cfg, run, stream) -> dict:
    """Devices, what ranks talk through, and a probe of both phases' steps: {looping: seconds a step}."""
    for line in devices(run):
        run.log(line)
    run.log(f"data: {len(stream.shards)} training shards, {stream.tokens} tokens; tokenizer {cfg.tokenizer} sha256 "
            f"{tg.sha256(cfg.tokenizer.read_bytes())[:16]}")
    optimizers, batches, rates = tg.Optimizers(model, cfg, run), stream.make(0), {}
    for looping in sorted({False, cfg.num_loops > 0}):
        v = tg.Values(1.0, cfg.muon_momentum, looping)
        for _ in range(max(cfg.warmup_steps, 1)):  # compiles
            tg.train_step(model, optimizers, batches, v)
        rates[looping] = probe_step(lambda: tg.train_step(model, optimizers, batches, v), run)
        work = step_flops(model, cfg, batches, looping) * run.world
        run.log(f"step {'with' if looping else 'without'} recurrence: {1000 * rates[looping]:.1f} ms "
                f"tok/s:{cfg.train_batch_tokens / rates[looping]:.0f} {work / 1e12:.2f} TFLOP "
                f"{work / rates[looping] / run.world / 1e12:.1f} TFLOP/s a device")
    # progress follows the clock, so each phase gets its share of the seconds, not of the steps
    budget, loops = cfg.max_wallclock_seconds or 600.0, cfg.enable_looping_at if cfg.num_loops else 1.0
    moments = [(i + 0.5) / 1000 for i in range(1000)]
    whole = [budget / 1000 / rates[p >= loops] for p in moments]  # steps that each thousandth of the budget would hold
    steps = sum(n / tg.stage_at(cfg.batch_shares, p) for n, p in zip(whole, moments))
    run.log(f"predicted: {steps:.0f} steps in {budget:.0f}s of training, {sum(whole) * cfg.train_batch_tokens / 1e6:.1f}M tokens")
    run.event("doctor", steps=steps, budget=budget, seconds={str(k): t for k, t in rates.items()})
    return rates


def devices(run) -> list[str]:
    """What this node has: GPUs, NCCL, shared memory, processor."""
    import torch
    lines = [f"processor: {os.cpu_count()} cores, {torch.get_num_threads()} threads a rank"]
    if Path("/dev/shm").is_dir():
        room = os.statvfs("/dev/shm")  # NCCL and data loaders fail obscurely where it is small
        lines.append(f"shared memory: {room.f_bavail * room.f_frsize >> 20} MiB free")
    if run.gpu:
        lines += clocks()
        lines.append(f"nccl: {'.'.join(map(str, torch.cuda.nccl.version()))} over {run.world} ranks")
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        lines += [f"gpu {i}: {c.name} {c.total_memory >> 20} MiB {c.multi_processor_count} multiprocessors"
                  for i, c in enumerate(cards)]
    return lines


def clocks() -> list[str]:
    """Each GPU's clocks, limits and load as nvidia-smi has them: a card that is held back, or shared, is slow for no other reason."""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,utilization.gpu,memory.used"
    try:
        told = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ["clocks: nvidia-smi does not answer"]
    return [f"clocks of gpu {i} ({fields}): {line}" for i, line in enumerate(told.stdout.splitlines())]


def probe_step(step, run, seconds: float = 1.5) -> float:
    """Mean seconds of a step over at least `seconds`; all ranks stop at the same one."""
    with run.clock.span("step probe"):
        start, count = run.clock.read(), 0
        while count < 2 or run.agree(run.clock.read() - start) < seconds:
            step()
            run.clock.sync()
            count += 1
        return run.agree(run.clock.read() - start) / count


def step_flops(model, cfg, batches, looping: bool) -> float:
    """Operations of this rank's forward and backward passes: 6 a weight and token, and 14 H E a pair that attention sees.

    A product costs 2 a weight forward and 4 backward; attention's two forward products and five backward ones are causal.
    """
    visits = [v.layer for v in model.plans[looping]]
    matrices = sum(p.numel() for i in visits for n, p in model.blocks[i].named_parameters() if p.dim() == 2 and min(p.shape) >= 64)
    head = cfg.vocab_size * cfg.model_dim
    tokens = sum(b.ids.numel() for b in batches)
    pairs = sum(float((b.cu.diff().double() ** 2).sum()) / 2 for b in batches)
    return 6.0 * tokens * (matrices + head) + 14.0 * pairs * len(visits) * cfg.num_heads * cfg.head_dim


# ----------------------------------------------------------------------------------------------------------------------
# Kernels
# ----------------------------------------------------------------------------------------------------------------------
def timed(work, run, seconds: float = 0.15) -> float:
    """Median seconds of a call, by device events on a GPU."""
    import torch
    for _ in range(3):
        work()
    run.clock.sync()
    took, begun = [], time.perf_counter()
    while len(took) < 3 or time.perf_counter() - begun < seconds:
        if run.gpu:
            marks = [torch.cuda.Event(enable_timing=True) for _ in "ab"]
            marks[0].record(), work(), marks[1].record()
            marks[1].synchronize()
            took.append(marks[0].elapsed_time(marks[1]) / 1000)
        else:
            start = time.perf_counter()
            work()
            took.append(time.perf_counter() - start)
    return statistics.median(took)


def ceilings(run) -> tuple[float, float]:
    """(bytes a second of a copy, read and written both counted; operations a second of a square product)."""
    import torch
    n, side = (2 ** 29, 8192) if run.gpu else (2 ** 23, 768)
    a, b = (torch.randn(n, device=run.device).to(run.dtype) for _ in "ab")
    x, y = (torch.randn(side, side, device=run.device).to(run.dtype) for _ in "xy")
    return 2 * n * a.element_size() / timed(lambda: a.copy_(b), run), 2.0 * side ** 3 / timed(lambda: x @ y, run)


def passes(f, inputs):
    """(forward, forward and backward) of f as functions without arguments; the gradient is of the outputs' own kind."""
    import torch
    mine = [x.detach().clone().requires_grad_() for x in inputs]
    out = f(*mine)
    out = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(o) for o in out]

    def both():
        made = f(*mine)
        torch.autograd.grad(made if isinstance(made, tuple) else (made,), mine, grads)

    def forward():
        with torch.no_grad():
            f(*mine)
    return forward, both


def kernels(tg, model, cfg, run, batch) -> list[tuple]:
    """(name, function, inputs, bytes forward, bytes of both, operations forward, operations of both) of every operation.

    Bytes: each input read and each output written once; backward also reads the outputs' gradients and writes the inputs'.
    """
    import torch
    T, D, E, V = batch.ids.numel(), cfg.model_dim, cfg.head_dim, cfg.vocab_size
    counts, size = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads), torch.empty(0, dtype=run.dtype).element_size()
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device=run.device).to(run.dtype)

    def product(name, out, into):
        w, x = random(out, into), random(T, into)
        moved, work = size * (T * (out + into) + out * into), 2.0 * T * out * into
        return f"GEMM {name} {into}->{out}", lambda x, w: x @ w.T, [x, w], moved, 3 * moved, work, 3 * work

    pairs = float((batch.cu.diff().double() ** 2).sum()) / 2
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    where = tg.segment_bounds(batch.cu, T) if attn.fused else batch.cu  # as the network, which makes them once a row
    wide, seen, products = size * T * (counts[0] + sum(counts)) * E, 4 * pairs * counts[0] * E, 2.0 * T * D * E * (counts[0] + sum(counts))
    rope, rest = model.rotary(batch.pos), (where, batch.longest, tg.VisitAdapters(), None)
    # the second is one operator where weights learn; forward alone it is its parts, launched one by one, as in scoring
    rows = [("attention", lambda *a: attn.attend(*a, where, batch.longest), [random(T, n, E) for n in counts], wide, 3 * wide, seen, 3.5 * seen),
            ("attention (layer)", lambda x, onto: attn(x, x[:, :attn.reads], tg.OtherValues(), rope, *rest, onto)[0], [random(T, D), random(T, D)],
             size * T * 3 * D, size * T * 9 * D, products + seen, 3 * products + 3.5 * seen)]
    h, head = random(T, D), (0.1 * torch.randn(V, D, device=run.device)).to(run.dtype)
    logits, work = size * T * V, 2.0 * T * V * D
    # with the head's product: written, read and written over, read twice by its gradients
    for f, label in (model.head.plain_nll, "chosen"), (tg.head_nll_eager, "eager twin"):
        f = compiled(f, label, run)
        rows.append((f"head and nats ({label})", lambda a, w, f=f: f(a, w, batch.targets, cfg.logit_softcap or 30.0), [h, head],
                     2 * logits, 5 * logits, work, 3 * work))
    wide, work = size * 2 * T * (D + cfg.hidden_dim), 4.0 * T * D * cfg.hidden_dim
    weights = [random(cfg.hidden_dim, D), random(D, cfg.hidden_dim)]
    for f, label in (mlp.product, "chosen"), (tg.mlp_eager, "eager twin"):  # forward alone is the eager form, as in scoring
        f = compiled(f, label, run)
        rows.append((f"MLP ({label})", lambda x, up, down, f=f: f(x, Matrix(up), Matrix(down), mlp.slope),
                     [random(T, D), *weights], wide, 3 * wide, work, 3 * work))
    shapes = {"qkv": (sum(counts) * E, D), "o": (D, counts[0] * E), "up": (cfg.hidden_dim, D), "down": (D, cfg.hidden_dim)}
    return rows + [product(name, *shape) for name, shape in shapes.items()]


class Matrix:
    """A weight as the MLP takes one: something to call, and to ask for the matrix behind it."""

    def __init__(self, weight):
        self.weight = weight

    def matrix(self, dtype):
        return self.weight.to(dtype)

    def __call__(self, x):
        return x @ self.weight.T


def compiled(f, label: str, run):
    """The eager twin as training would run it without our kernels."""
    import torch
    return torch.compile(f, dynamic=False) if label == "eager twin" and run.gpu else f


def kernel_table(tg, model, cfg, run, batch, rates: tuple[float, float]) -> list[dict]:
    """Times every operation forward, and forward with backward, beside the larger of its two floors."""
    copy_rate, gemm_rate = rates
    run.log(f"ceilings: copy {copy_rate / 1e9:.0f} GB/s, product {gemm_rate / 1e12:.1f} TFLOP/s; rows of {batch.ids.numel()} tokens")
    run.log(f"{'kernel':28s} {'forward':>10s} {'floor':>10s} {'both':>10s} {'floor':>10s}   ms")
    table = []
    for name, f, inputs, *costs in kernels(tg, model, cfg, run, batch):
        took = [timed(work, run) for work in passes(f, inputs)]
        floors = [max(moved / copy_rate, work / gemm_rate) for moved, work in zip(costs[:2], costs[2:])]
        cells = [1000 * x for pair in zip(took, floors) for x in pair]
        run.log(f"{name:28s} " + " ".join(f"{c:10.3f}" for c in cells))
        table.append(dict(zip(("name", "forward_ms", "forward_floor_ms", "both_ms", "both_floor_ms"), (name, *cells))))
    return table


# ----------------------------------------------------------------------------------------------------------------------
# What comes after training
# ----------------------------------------------------------------------------------------------------------------------
def fake_documents(tg, val, cfg, tokens: int):
    """Random tokens in documents of the validation set's own lengths, about `tokens` of them, spread over the set."""
    import numpy as np
    lengths = np.diff(np.append(val.starts, val.targets))
    take = min(len(lengths), max(8, int(tokens / lengths.mean())))
    made = copy.copy(val)
    made.starts = np.cumsum([0, *lengths[np.linspace(0, len(lengths) - 1, take).astype(int)]])
    made.starts, made.targets = made.starts[:-1], int(made.starts[-1])
    rng = np.random.Generator(np.random.PCG64(0))
    made.tokens = rng.integers(2, cfg.vocab_size, made.targets + 1).astype(np.uint16)
    made.tokens[made.starts] = tg.BOS
    made.bytes = np.ones(made.targets, np.int64)
    return made


def after_training(tg, model, cfg, run, stream, val, tokenizer) -> dict[str, float]:
    """Seconds of Hessians and of quantising and packing; tokens a second of every configured pass."""
    found = {}

    def clocked(name, work):
        with run.clock.span(name):
            run.clock.sync()
            start = time.perf_counter()
            made = work()
            run.clock.sync()
            found[name] = time.perf_counter() - start
        return made

    hessians, slopes = clocked("hessians", lambda: tg.calibrate(model, cfg, stream.calibration(), stream, run))
    meta = {"config": cfg.as_dict(), "tokenizer": tokenizer.sha256, "validation": {}, "source": "", "train_tokens": 0}
    clocked("quantise and pack", lambda: tg.fit_artifact(tg.Quantizer(model, cfg, hessians, run, slopes), meta, cfg, run))
    docs = fake_documents(tg, val, cfg, 1_000_000 if run.gpu else 10_000)
    for name, (_, score) in tg.passes(model, docs, cfg, run).items():
        if run.gpu:  # what has to be compiled or recorded
            tg.passes(model, *tg.random_documents(docs, cfg, run.world), run)[name][1](0.0)
        clocked(f"pass {name}", lambda: score(0.0))
        found[f"pass {name} tok/s"] = docs.targets / found[f"pass {name}"]
    for name, value in found.items():
        run.log(f"{name}: {value:.2f}" + ("" if name.endswith("tok/s") else " s"))
    return found


def bench(tg, model, cfg, run, stream, val, tokenizer) -> None:
    """Everything, as lines of the log and as one JSON file."""
    import torch
    saved = copy.deepcopy(model.state_dict())  # the probes below move the weights
    rates, batches = doctor(tg, model, cfg, run, stream), stream.make(0)
    optimizers = tg.Optimizers(model, cfg, run)
    tg.train_step(model, optimizers, batches[:1], tg.Values(1.0, cfg.muon_momentum, False))
    optimiser = timed(lambda: optimizers.step(tg.Values(0.0, cfg.muon_momentum, False)), run)
    run.log(f"optimiser: {1000 * optimiser:.2f} ms a step")
    ceiling = ceilings(run)
    for looping, seconds in rates.items():
        used = step_flops(model, cfg, batches, looping) / seconds / ceiling[1]
        run.log(f"model FLOP utilisation {'with' if looping else 'without'} recurrence: {used:.1%} of the measured product rate")
    table = kernel_table(tg, model, cfg, run, batches[0], ceiling)
    model.zero_grad()
    model.load_state_dict(saved)
    model.looping = cfg.num_loops > 0
    later = after_training(tg, model, cfg, run, stream, val, tokenizer)
    peak = torch.cuda.max_memory_allocated() >> 20 if run.gpu else None
    result = {"config": cfg.as_dict(), "world": run.world, "seconds_a_step": {str(k): t for k, t in rates.items()},
              "copy_bytes_s": ceiling[0], "product_flop_s": ceiling[1], "optimiser_ms": 1000 * optimiser, "kernels": table, "later": later, "peak_MiB": peak,
              "spans": dict(run.clock.seconds)}
    if run.main:
        tg.write_atomic(run.path(".bench.json"), (json.dumps(result, indent=1) + "\n").encode())
    bad = [t["name"] for t in table if not all(math.isfinite(v) for v in list(t.values())[1:])]
    if bad:
        run.fail(f"no time for {', '.join(bad)}")
    run.log(f"peak memory allocated: {peak} MiB; {run.path('.bench.json')}")
    tg.report_budgets(run, cfg)
