"""A rehearsal of the contest's evaluation: its validation set in size, an eighth of its batch per GPU, its two clocks.

    rehearsal.py build DATA FOLDER [DOCUMENTS TOKENS SHARDS]    shards of any corpus -> FOLDER: one validation shard, SHARDS training shards
    rehearsal.py run GPUS OUT LIMIT [KNOB=VALUE ...]            train, pack, score, adapt; the console with times and the GPUs' memory -> OUT
    rehearsal.py report GPUS OUT                                the table; exit status 1 if a rule of the contest did not hold
    rehearsal.py phases OUT [MIB]                               its seconds and memory by phase, less MIB that other processes have in use
    rehearsal.py lines OUT PATTERN                              lines of the console that begin with a pattern

No comparison of scores comes from it: what it shows is whether 50,000 documents fit into ten minutes and 80 GB.
"""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

BOS, MAGIC, HEADER = 1, 20240520, 1024
DOCUMENTS, TOKENS, SHARDS = 50_000, 47_800_000, 80  # FineWeb's validation set in the contest's SentencePiece 8192, and its training shards
CARD = 81_559  # MiB that nvidia-smi says of an H100 with 80 GB
SECONDS = 600.0  # of evaluation
# what begins with the first line of the console that matches; spans without a line of their own are in the one before
PHASES = (("start-up", r"$^"), ("compile and warm-up", r"warmup_step:"), ("training", r"launch_to_first_step:"),
          ("diagnostics, Hessians", r"stopping_early:|phase with"), ("quantise and pack", r"gptq:calibrated"),
          ("evaluation's warm-up, full windows", r"Total submission size"), ("adaptation", r"final_int\d+_roundtrip_exact"), ("the end", r"spans:"))


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------
def read(path: Path) -> np.ndarray:
    """A shard's tokens."""
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or header[0] != MAGIC or path.stat().st_size != HEADER + 2 * int(header[2]):
        raise SystemExit(f"{path} is no whole shard of the contest's format")
    return np.fromfile(path, "<u2", offset=HEADER)


def write(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, 1, len(tokens)
    with open(path, "wb") as f:
        f.write(header.tobytes())
        f.write(np.ascontiguousarray(tokens, "<u2").tobytes())


def whole(tokens: np.ndarray, last: bool) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, lengths of their documents) without the rest of a document in front and, unless `last` is whole, the one at the end."""
    starts = np.flatnonzero(tokens == BOS)
    if not last:
        tokens, starts = tokens[:starts[-1]] if len(starts) else tokens[:0], starts[:-1]
    if not len(starts):
        return tokens[:0], np.empty(0, np.int64)
    return tokens[starts[0]:], np.diff(np.append(starts, len(tokens)))


def choose(lengths: np.ndarray, count: int, total: int) -> np.ndarray:
    """`count` documents that are about `total` tokens long together, drawn at random with a weight length^-tilt. -> bool mask"""
    noise = np.random.Generator(np.random.PCG64(0)).gumbel(size=len(lengths))

    def draw(tilt):
        mask = np.zeros(len(lengths), bool)
        mask[np.argpartition(tilt * np.log(lengths) - noise, count - 1)[:count]] = True
        return mask
    low, high = -8.0, 8.0  # long documents first, short ones first
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if lengths[draw(middle)].sum() > total else (low, middle)
    return draw(high)


def build(data: Path, folder: Path, documents: int = DOCUMENTS, tokens: int = TOKENS, shards: int = SHARDS) -> dict:
    """A validation shard of so many documents and about so many tokens, and links to training shards that none of them is from."""
    val, kept = whole(np.concatenate([read(p) for p in sorted(data.glob("fineweb_val_[0-9]*.bin"))]), True)
    if len(kept) > documents:
        raise SystemExit(f"{data} has {len(kept)} validation documents already, more than {documents}")
    need, room = documents - len(kept), tokens - len(val)
    paths, pool = sorted(data.glob("fineweb_train_[0-9]*.bin")), []
    # whole shards from the last one on, until there is a little choice
    while need and paths and not (sum(len(n) for _, n in pool) > 1.1 * need and sum(len(t) for t, _ in pool) > 1.1 * room):
        pool.append(whole(read(paths.pop()), False))
    more, lengths = (np.concatenate(x) for x in zip(*pool)) if pool else (val[:0], kept[:0])
    if len(lengths) < need or len(more) < room:
        raise SystemExit(f"{data} has {len(lengths)} training documents of {len(more)} tokens beside its validation set; {need} of {room} are needed")
    chosen = choose(lengths, need, room) if need else np.zeros(len(lengths), bool)
    mine = np.repeat(chosen, lengths)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("fineweb_*.bin"):
        old.unlink()
    write(folder / "fineweb_val_000000.bin", np.concatenate((val, more[mine])))
    if not paths:  # few shards: what validation left over is trained on
        paths = [folder / "rest.bin"]
        write(paths[0], more[~mine])
    for i in range(shards):
        (folder / f"fineweb_train_{i:06d}.bin").symlink_to(paths[i % len(paths)].resolve())
    sizes = np.concatenate((kept, lengths[chosen]))
    facts = {"documents": len(sizes), "tokens": int(sizes.sum()), "training shards": len(paths), "links": shards,
             "lengths": dict(zip(("median", "99 %", "longest"), map(int, np.quantile(sizes, (0.5, 0.99, 1.0)))))}
    (folder / "built.json").write_text(json.dumps(facts))
    return facts


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------
def sample_memory(write_line, stop: threading.Event) -> None:
    """Memory in use of every GPU once a second, as nvidia-smi has it; nothing where there is none."""
    try:
        smi = subprocess.Popen(["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits", "-l", "1"],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return
    threading.Thread(target=lambda: (stop.wait(), smi.terminate()), daemon=True).start()
    for line in smi.stdout:
        index, _, used = line.partition(",")
        if index.strip().isdigit() and used.strip().isdigit():
            write_line({"gpu": int(index), "mib": int(used)})


def run(gpus: int, out: Path, limit: float, knobs: list[str]) -> int:
    """train_gpt.py on so many GPUs (0: a CPU) with these knobs; every line of it, and every sample, with seconds -> OUT/watched.jsonl"""
    out.mkdir(parents=True, exist_ok=True)
    script = str(Path(__file__).resolve().parents[2] / "train_gpt.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}", script] if gpus > 1 else [sys.executable, script]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"} | dict(knob.split("=", 1) for knob in knobs)
    if gpus:
        env.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    start, lock, stop = time.time(), threading.Lock(), threading.Event()
    with open(out / "watched.jsonl", "w", buffering=1) as file:
        def write_line(fields):
            with lock:
                if not file.closed:
                    file.write(json.dumps({"t": round(time.time() - start, 2), **fields}) + "\n")
        threading.Thread(target=sample_memory, args=(write_line, stop), daemon=True).start()
        # a process group of its own: a launcher and its ranks end together
        work = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)

        def end(number):
            if work.poll() is None:
                write_line({"line": f"ended after {limit:.0f} s"})
                os.killpg(work.pid, number)
        timers = [threading.Timer(limit, end, [signal.SIGTERM]), threading.Timer(limit + 15, end, [signal.SIGKILL])]
        for timer in timers:
            timer.daemon = True
            timer.start()
        for line in work.stdout:
            print(line, end="", flush=True)
            write_line({"line": line.rstrip("\n")})
        code = work.wait()
        for timer in timers:
            timer.cancel()
        stop.set()
        write_line({"line": f"exit status {code}"})
    return code


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------
def in_phases(events: list[dict]) -> tuple[dict[str, float], dict[str, dict[int, int]]]:
    """(seconds, {GPU: most MiB}) of every phase of PHASES that began."""
    seconds, memory, now, began = {}, {}, 0, 0.0
    for e in events:
        line = e.get("line", "")
        following = next((i for i in range(len(PHASES) - 1, now, -1) if re.match(PHASES[i][1], line)), now)
        if following != now:
            seconds[PHASES[now][0]] = e["t"] - began
            now, began = following, e["t"]
        elif "gpu" in e:
            most = memory.setdefault(PHASES[now][0], {})
            most[e["gpu"]] = max(most.get(e["gpu"], 0), e["mib"])
    seconds[PHASES[now][0]] = events[-1]["t"] - began if events else 0.0
    return seconds, memory


def show_phases(events: list[dict], others: int = 0) -> None:
    """A line per phase: seconds, and the most memory in use, less what other processes have, in MiB."""
    seconds, memory = in_phases(events)
    for phase, took in seconds.items():
        most = ", ".join(f"GPU {g} {m - others} MiB" for g, m in sorted(memory.get(phase, {}).items()) if m > others)
        print(f"| {phase:36s} {took:7.1f} s{f', at most {most} in use' * bool(most)}")


def watched(out: Path) -> list[dict]:
    """What `run` wrote; nothing where it did not come to that."""
    path = out / "watched.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []


def report(gpus: int, out: Path) -> list[str]:
    """Print the table; returns what was against the contest's rules."""
    events = watched(out)
    lines = [e["line"] for e in events if "line" in e]

    def found(pattern):
        return [m for line in lines if (m := re.match(pattern, line))]

    def show(label, texts):
        for i, text in enumerate(texts or ["-"]):
            print(f"| {'' if i else label:18s} | {text}")
    (_, memory), broken = in_phases(events), []
    print("\n" + "=" * 40 + f" rehearsal on {gpus or 'no'} GPU{'s' * (gpus != 1)}")
    built = out / "data" / "built.json"
    show("data", [built.read_text()] if built.is_file() else [])
    show("validation", [m[1] for m in found(r"validation: (.*)")])
    show("batch", [m[0] for m in found(r"train_batch_tokens:.*|until \d+% of the run.*")])
    show("steps", [m[0] for m in found(r"stopping_early.*|launch_to_first_step.*|phase with.*")])
    show("size", [m[0] for m in found(r"Total submission size.*")])
    show("memory, as logged", [m[0] for m in found(r"peak memory.*|memory:.*")])
    show_phases(events)
    show("spans", [m[1] for m in found(r"spans: (.*)")])
    show("scores", [m[0] for m in found(r"(diagnostic|final_int)\S* .*")] + [m[0] for m in found(r"(result|ledger \w+|val_bpb:\d).*")])
    show("warnings", sorted({m[1] for m in found(r"!! (.*)")}))
    show("budgets", [m[0] for m in found(r"budget .*")])
    verdicts = [m[0] for m in found(r"verdict: .*")]
    show("verdict", verdicts)
    show("ended", [m[0] for m in found(r"exit status .*|ended after.*|interrupted.*")])
    if len(verdicts) != 1:
        broken.append(f"{len(verdicts)} verdicts")
    broken += [text for text in verdicts if "FAILED" in text]
    evaluated = [float(m[1]) for m in found(r"budget eval: (\d+\.\d+)s")]
    if gpus > 1 and not (evaluated and evaluated[-1] <= SECONDS):
        broken.append(f"evaluation took {evaluated[-1] if evaluated else 'an unknown number of'} s of {SECONDS:.0f}")
    top = max((m for most in memory.values() for m in most.values()), default=0)
    logged = [int(m[1]) for m in found(r"peak memory .*reserved: (\d+) MiB")]
    if max([top, *logged]) > CARD:
        broken.append(f"{max([top, *logged])} MiB of GPU memory in use, more than the {CARD} of an 80 GB card")
    if gpus and not top:
        print("| nvidia-smi gave no samples: memory is known from the log alone")
    print("| rehearsal          | " + ("FAILED: " + "; ".join(broken) if broken else "all within the contest's limits"))
    return broken


def main(arguments: list[str]) -> int:
    what, *rest = arguments
    if what == "build":
        print("data:", json.dumps(build(Path(rest[0]), Path(rest[1]), *map(int, rest[2:]))))
        return 0
    if what == "lines":
        print("\n".join(dict.fromkeys(e["line"] for e in watched(Path(rest[0])) if re.match(rest[1], e.get("line", "")))))
        return 0
    if what == "phases":
        show_phases(watched(Path(rest[0])), int(rest[1] or 0) if len(rest) > 1 else 0)
        return 0
    if what == "run":
        return run(int(rest[0]), Path(rest[1]), float(rest[2]), rest[3:])
    return 1 if report(int(rest[0]), Path(rest[1])) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
