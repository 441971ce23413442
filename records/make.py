"""Turn finished runs into a record folder: logs, generated submission.json and README.md, and the code that is counted.

    python records/make.py logs/a logs/b logs/c --name "Sparse gates" --author "Ada" --github-id ada

The folder's train_gpt.py is the RUN_ID.packed.py that the runs counted, byte for byte, and it is run here from inside the
folder in MODE=eval on every run's artifact: score and sha256 must repeat, or there is no folder. All figures come from
the runs' own files. What is typed is only name, author, github id, one sentence (--blurb) and credits. The folder appears
whole or not at all, and check.py has the last word.
"""
import argparse
import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import check
import runs

ROOT = Path(__file__).resolve().parents[1]
TRACKS = {"record": ("track_10min_16mb", "10min_16mb"), "non-record": ("track_non_record_16mb", "non-record-16mb")}
LOCAL = {"MODE", "RUN_ID", "SEED", "ARTIFACT_DIR", "ARTIFACT", "CHECKPOINT", "PRESET"}  # say where or which, not what
PLACES = {"DATA_PATH", "TOKENIZER_PATH"}
# Between machines, or between GPU counts, sums are ordered otherwise: 1.6e-5 bpb was the most seen (records/README.md).
TOLERANCE = 5e-5


class Refused(SystemExit):
    """Runs that cannot make one folder; the text says which and why."""

    def __init__(self, text: str):
        super().__init__(f"make: {text}")


@dataclass
class Told:
    """What is not in the runs' files and has to be typed."""
    name: str
    author: str
    github_id: str
    blurb: str
    credits: str
    date: str
    track: str  # a key of TRACKS
    against: str  # preset of the config diff


@dataclass
class Repeat:
    """One artifact scored again by the shipped file."""
    bpb: float
    difference: float
    code_sha: str
    artifact_sha: str
    log: str


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------
def gather(names: list[str]) -> list[runs.Run]:
    """The runs of one submission, by seed; Refused unless they are finished runs of one recipe."""
    found = sorted((r for n in names for r in runs.find(n)), key=lambda r: r.seed or 0)
    for run in found:
        if run.dialect != "events":
            raise Refused(f"{run.path}: its .jsonl is needed")
        if not run.finished:
            raise Refused(f"{run.path}: the run did not reach its end")
        if run.failures:
            raise Refused(f"{run.path}: the run broke a rule: {'; '.join(run.failures)}")
        try:
            runs.result(run)
        except runs.Unreadable as e:
            raise Refused(str(e)) from None
        for suffix in (".txt", ".packed.py", ".artifact"):
            if not run.beside(suffix).is_file():
                raise Refused(f"{run.beside(suffix)} is missing")
    for what, of in (("recipe", lambda r: r.recipe), ("source", lambda r: r.source_sha), ("number of ranks", lambda r: r.world),
                     ("device", lambda r: r.device), ("packed code", lambda r: runs.sha256(r.beside(".packed.py").read_bytes())),
                     ("validation set", lambda r: r.validation.get("sha256")),
                     ("pass that is reported", runs.result_pass)):
        if len({of(r) for r in found}) > 1:
            raise Refused(f"the runs differ in their {what}: " + ", ".join(f"{r.path.stem} {of(r)}" for r in found))
    if len({r.seed for r in found}) < len(found):
        raise Refused(f"a seed is there twice: {[r.seed for r in found]}")
    return found


def clean_environment(config: dict) -> dict:
    """This process's environment without anything that is a knob."""
    return {k: v for k, v in os.environ.items() if k not in config}


def preset_config(code: Path, preset: str, config: dict) -> dict[str, str]:
    """KNOB -> value of a preset, as the shipped file itself resolves it."""
    done = subprocess.run([sys.executable, code.name], cwd=code.parent, text=True, capture_output=True,
                          env={**clean_environment(config), "MODE": "config", "PRESET": preset})
    if done.returncode:
        raise Refused(f"{code} MODE=config PRESET={preset} failed:\n{tail(done.stdout + done.stderr)}")
    return {name: value for _, name, value in runs.KNOB.findall(done.stdout)}


def tail(text: str, count: int = 8) -> str:
    return "\n".join(text.strip().splitlines()[-count:])


# ----------------------------------------------------------------------------------------------------------------------
# Running the shipped file
# ----------------------------------------------------------------------------------------------------------------------
def repeat(folder: Path, run: runs.Run, root: Path) -> Repeat:
    """Score the run's artifact with the folder's train_gpt.py, from inside the folder; Refused if the score differs."""
    config, logs = run.config, folder / "eval"
    # where the program looks without these knobs, but seen from the folder
    data = config["DATA_PATH"] or f"data/datasets/fineweb10B_sp{config['VOCAB_SIZE']}"
    tokenizer = config["TOKENIZER_PATH"] or f"data/tokenizers/fineweb_{config['VOCAB_SIZE']}_bpe.model"
    places = {"ARTIFACT": run.beside(".artifact"), "ARTIFACT_DIR": logs, "DATA_PATH": root / data,
              "TOKENIZER_PATH": root / tokenizer}
    # relative: the log of this is shipped, and another machine's folders mean nothing to its reader
    env = {k: os.path.relpath(v, folder) for k, v in places.items()}
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.world}"] if run.world > 1 else []
    done = subprocess.run([sys.executable, *ranks, "train_gpt.py"], cwd=folder, text=True, capture_output=True,
                          env={**clean_environment(config), **env, "MODE": "eval"})
    written = logs / f"{run.path.stem}.eval.jsonl"
    again = runs.load(written) if written.is_file() else None
    if done.returncode or not (again and again.finished):
        raise Refused(f"the shipped train_gpt.py failed on {run.beside('.artifact')}:\n{tail(done.stdout + done.stderr)}")
    if again.scores.keys() != run.scores.keys():
        raise Refused(f"seed {run.seed}: the shipped file ran the passes {', '.join(again.scores)}, "
                      f"the run {', '.join(run.scores)}")
    difference = max(abs(again.scores[n].bpb - s.bpb) for n, s in run.scores.items())
    bpb = again.scores[runs.result_pass(run)].bpb
    if difference > TOLERANCE:
        raise Refused(f"seed {run.seed}: the shipped file scores {bpb:.8f}, the run said {run.final.bpb:.8f}; "
                      f"the largest difference of a pass is {difference:.1e}")
    name = f"eval_seed{run.seed}.log"
    shutil.move(written.with_suffix(".txt"), folder / name)
    shutil.rmtree(logs)
    return Repeat(bpb, difference, again.source_sha, runs.sha256(run.beside(".artifact").read_bytes()), name)


# ----------------------------------------------------------------------------------------------------------------------
# submission.json
# ----------------------------------------------------------------------------------------------------------------------
def seed_result(run: runs.Run, again: Repeat | None) -> dict:
    """Everything about one seed, from its log."""
    s = run.final
    result = {"val_bpb": s.bpb, "val_loss": s.loss, "artifact_bytes": run.total, "model_bytes": run.size["model"],
              "artifact_sha256": runs.sha256(run.beside(".artifact").read_bytes()), "steps": run.steps,
              "step_avg_ms": round(run.step_ms, 3), "train_time_s": round(run.train_seconds, 3),
              "eval_time_s": round(run.eval_seconds, 3), "passes": {n: x.bpb for n, x in run.scores.items()},
              "log": f"train_seed{run.seed}.log"}
    if again:
        result["repeated_by_shipped_code"] = {"val_bpb": again.bpb, "largest_difference": again.difference, "log": again.log}
    return result


def compliance(found: list[runs.Run]) -> dict[str, bool]:
    """The de-facto flags, each computed from the runs' own figures and ledgers."""
    ledgers = all(s.verdict for r in found for s in r.scores.values())
    biased = any(adapts(r) and str(r.config.get("TTT_LOGIT_BIAS")) == "True" and r.config.get("TTT_METHOD") == "lora" for r in found)
    return {"train_under_600s": all(r.train_seconds <= runs.BUDGET for r in found),
            "eval_under_600s": all(r.eval_seconds <= runs.BUDGET for r in found),
            "artifact_under_16mb": all(r.total <= runs.CAP for r in found),
            "three_seeds": len({r.seed for r in found}) >= 3,
            # the ledger raises when a token is trained on before its score, so a finished run with its line has these
            "score_first_ttt": ledgers, "single_pass": ledgers, "no_slot": ledgers, "no_pre_quant_ttt": ledgers,
            # and it compares scores with the full distribution that they are of
            "full_distribution": ledgers, "no_etlb": ledgers and not biased,
            # counts of scored text, however well normalised, are what others call an n-gram cache
            "no_ngram_cache": ledgers and not any(map(counts_tokens, found))}


def adapts(run: runs.Run) -> bool:
    """Whether the run had the pass that learns from what it has scored."""
    return str(run.config.get("TTT_ENABLED")) == "True"


def counts_tokens(run: runs.Run) -> bool:
    """Whether counts of scored tokens act on the distribution: the n-gram tilt or the mixer (absent in older programs)."""
    return adapts(run) and (float(run.config.get("NGRAM_TILT_BOOST", 0)) != 0 or bool(run.config.get("MIXER")))


def submission(found: list[runs.Run], again: dict, told: Told, code: bytes, changed: dict) -> dict:
    """The whole submission.json; floats are the log's, never rounded by hand."""
    bpb, loss, totals = ([f(r) for r in found] for f in (lambda r: r.final.bpb, lambda r: r.final.loss, lambda r: r.total))
    first = found[0]
    return {
        "author": told.author, "github_id": told.github_id, "name": told.name, "blurb": told.blurb, "date": told.date,
        "track": TRACKS[told.track][1], "headline": runs.result_pass(first),
        "val_bpb": runs.mean(bpb), "val_bpb_std": runs.spread(bpb),
        "val_loss": runs.mean(loss), "val_loss_std": runs.spread(loss), "seeds": [r.seed for r in found],
        "seed_results": {str(r.seed): seed_result(r, again.get(r.seed)) for r in found},
        "bytes_total": max(totals), "bytes_code": len(code), "artifact_bytes_mean": runs.mean(totals),
        "artifact_bytes_max": max(totals), "train_steps_mean": runs.mean(r.steps for r in found),
        "hardware": f"{first.world}x {first.device}", "pytorch_version": first.torch, "python_version": first.python,
        "code_sha256": runs.sha256(code), "source_sha256": first.source_sha, "recipe": first.recipe,
        "preset": first.config["PRESET"], "config_diff": {"against": told.against, "knobs": changed},
        "validation": {**{k: first.validation[k] for k in ("documents", "tokens", "bytes", "sha256")},
                       "first_documents_only": int(first.config["VAL_DOCS"])},
        "compliance": compliance(found), "attribution": {"credits": told.credits, "in_source": credited(first.source or "")}}


def credited(source: str) -> list[str]:
    """Papers and pull requests that the source names where it uses their ideas."""
    pulls = sorted(set(re.findall(r"PR #(\d+)", source)), key=int)
    return [f"PR #{n}" for n in pulls] + [f"arXiv {n}" for n in sorted(set(re.findall(r"arXiv:? ?(\d{4}\.\d{5})", source)))]


# ----------------------------------------------------------------------------------------------------------------------
# README.md
# ----------------------------------------------------------------------------------------------------------------------
def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in row) + " |" for row in lines)


COLUMNS = (("raw", lambda r: r.diagnostics.get("raw")),
           ("averaged", lambda r: r.diagnostics.get("pre-quantization post-ema")),
           ("quantised", lambda r: r.scores.get("full")), ("sliding", lambda r: r.scores.get("sliding")),
           ("test-time trained", lambda r: r.scores.get("ttt")))


def results_table(found: list[runs.Run]) -> str:
    """A row a seed, then mean and spread; passes that no run has are left out."""
    columns = [(n, f) for n, f in COLUMNS if any(f(r) for r in found)]
    head = ["seed", "steps", "ms a step", *(n for n, _ in columns), "**val_bpb**", "val_loss", "bytes", "train s", "eval s"]
    rows = [[r.seed, f"{r.steps:,}", f"{r.step_ms:.2f}", *(f"{f(r).bpb:.5f}" if f(r) else "" for _, f in columns),
             f"**{r.final.bpb:.8f}**", f"{r.final.loss:.8f}", f"{r.total:,}", f"{r.train_seconds:.1f}",
             f"{r.eval_seconds:.1f}"] for r in found]
    middle = [f"{runs.mean(f(r).bpb for r in found):.5f}" if all(f(r) for r in found) else "" for _, f in columns]
    bpb, loss = [r.final.bpb for r in found], [r.final.loss for r in found]
    rows.append(["mean", "", "", *middle, f"**{runs.mean(bpb):.8f}**", f"{runs.mean(loss):.8f}", "", "", ""])
    if len(found) > 1:
        rows.append(["sd", "", "", *[""] * len(columns), f"{runs.spread(bpb):.8f}", f"{runs.spread(loss):.8f}", "", "", ""])
    return table(head, rows)


def environment_text(value) -> str:
    """A knob's value as one sets it in a shell."""
    text = {"True": "1", "False": "0"}.get(str(value), str(value))
    return shlex.quote(text) if text else "''"


def place(text: str) -> str:
    """A path without what belongs to one machine."""
    path = Path(text)
    if not path.is_absolute():
        return text
    return str(Path(*path.parts[path.parts.index("data"):])) if "data" in path.parts else f"path/to/{path.name}"


def differences(config: dict, preset: dict[str, str], keep=frozenset()) -> dict[str, str]:
    """KNOB -> value, as text, of what is not as in the preset."""
    return {k: str(v) for k, v in sorted(config.items())
            if k in preset and str(v) != preset[k] and (k not in LOCAL | PLACES or k in keep)}


def command(run: runs.Run, preset: dict[str, str]) -> str:
    """What to type, from inside the folder, to train this seed again."""
    knobs = {k: place(v) if k in PLACES else v for k, v in differences(run.config, preset, PLACES).items()}
    words = [f"PRESET={run.config['PRESET']}", f"SEED={run.seed}", *(f"{k}={environment_text(v)}" for k, v in knobs.items())]
    launch = f"torchrun --standalone --nproc_per_node={run.world} train_gpt.py" if run.world > 1 else "python train_gpt.py"
    return " \\\n".join([" ".join(words[i:i + 4]) for i in range(0, len(words), 4)] + [launch])


def plan_lines(run: runs.Run) -> list[str]:
    """The layer plan and parameter count, as the run printed them."""
    body = runs.split_log(run.beside(".txt").read_text(encoding="utf-8"))[1]
    return re.findall(r"^(?:plan with.*|model_params:.*|attention:.*|train_batch_tokens:.*)$", body, re.M)


ARCHITECTURE = ("VOCAB_SIZE NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT MLP_ACT XSA_LAST_N ATTN_GATE SMEAR_GATE UNET_SKIPS "
                "NUM_LOOPS LOOP_START LOOP_END PARALLEL_RESIDUAL TIE_EMBEDDINGS QUANTIZER MATRIX_BITS EMBED_BITS").split()


def validation_line(told: dict) -> str:
    """What was scored, and whether it is the contest's own set."""
    v = told["validation"]
    line = (f"Scored on {v['documents']:,} documents, {v['tokens']:,} tokens, {v['bytes']:,} bytes "
            f"(sha256 of the tokens {v['sha256'][:16]}...).")
    if v["first_documents_only"]:
        line += f" Only the first {v['first_documents_only']:,} documents of the set (VAL_DOCS)."
    if not check.is_fineweb(v):
        line += " This is not the contest's validation set: scores compare only with others on the same set."
    return line


def readme(found: list[runs.Run], told: Told, data: dict, preset: dict[str, str]) -> str:
    """README.md of the folder, all of it generated."""
    first, largest = found[0], max(found, key=lambda r: r.total)
    knobs = data["config_diff"]["knobs"]
    changed = table(["knob", "here", f"PRESET={told.against}"],
                    [[f"`{k}`", f"`{v['here']}`", f"`{v['preset']}`"] for k, v in knobs.items()])
    shape = [[f"`{k}`", f"`{first.config[k]}`"] for k in ARCHITECTURE if k in first.config]
    repeated = [r["repeated_by_shipped_code"] for r in data["seed_results"].values() if "repeated_by_shipped_code" in r]
    proof = (f"It was run from this folder in MODE=eval on {len(repeated)} of {len(found)} artifacts; the scores repeat "
             f"(largest difference {max(r['largest_difference'] for r in repeated):.1e} bpb)." if repeated else
             "It was not run again from this folder.")
    sections = [
        f"# {told.name}: {data['val_bpb']:.5f} bpb", *([told.blurb] if told.blurb != told.name else []),
        f"## Results\n\n{results_table(found)}\n\n{validation_line(data)} {data['hardware']}, "
        f"Python {first.python}, torch {first.torch}. **val_bpb** is the score of the pass `{data['headline']}`, which "
        "the configuration names.",
        f"## What changed against PRESET={told.against}\n\n{changed if knobs else 'Nothing.'}",
        "## Architecture\n\n" + table(["knob", "value"], shape) + "\n\n```\n" + "\n".join(plan_lines(first)) + "\n```",
        f"## Size by part (seed {largest.seed}, the largest)\n\n" + table(["part", "bytes"], [
            *([n, f"{b:,}"] for n, b in sorted(largest.parts.items(), key=lambda x: -x[1])),
            ["**total**", f"**{largest.total:,}** of {runs.CAP:,}"]]),
        "## Compliance\n\n" + "\n".join(f"- {'yes' if holds else 'NO'}: `{name}`" for name, holds in data["compliance"].items())
        + ("\n\nCounts of scored tokens act on the distribution, which stays normalised over the whole vocabulary: "
           f"NGRAM_TILT_BOOST={first.config.get('NGRAM_TILT_BOOST')} MIXER={first.config.get('MIXER') or 'none'}."
           if counts_tokens(first) else "")
        + "\n\n" + "\n".join(f"Ledger, seed {first.seed}, {n}: {s.verdict}.  " for n, s in first.scores.items()),
        f"## Reproduction\n\n`train_gpt.py` here is the packed file that is counted ({data['bytes_code']:,} bytes, sha256 "
        f"{data['code_sha256'][:16]}...); the readable source stands at the top of every log. {proof}\n\n"
        f"```bash\npip install -r requirements.txt\n{command(first, preset)}\n```\n\nOther seeds: the same with "
        f"SEED={', '.join(str(r.seed) for r in found[1:]) or 'any'}.",
        "## Credits\n\n" + (f"{told.credits}\n\n" if told.credits else "")
        + f"Named in the source: {', '.join(data['attribution']['in_source']) or 'nobody'}."]
    return "\n\n".join(sections) + "\n"


def requirements(run: runs.Run, root: Path) -> str:
    """The program's requirements, at the versions that ran: torch as its log says, the others as installed here."""
    lines = (root / "requirements.txt").read_text().splitlines()
    names = [re.split(r"[<>=~! ]", line.strip())[0] for line in lines if line.strip()]
    versions = {"torch": run.torch.partition("+")[0]}
    for name in names:
        try:
            versions.setdefault(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue  # not installed, so the runs did without it
    return "".join(f"{n}=={versions[n]}\n" for n in names if n in versions)


# ----------------------------------------------------------------------------------------------------------------------
# The folder
# ----------------------------------------------------------------------------------------------------------------------
def copy_runs(found: list[runs.Run], folder: Path, extras: frozenset) -> None:
    """Logs under the names that the contest uses; artifacts and per-document losses where asked for."""
    for run in found:
        stem = f"train_seed{run.seed}"
        shutil.copyfile(run.beside(".txt"), folder / f"{stem}.log")
        shutil.copyfile(run.path, folder / f"{stem}.jsonl")
        if "artifacts" in extras:
            shutil.copyfile(run.beside(".artifact"), folder / f"seed{run.seed}.artifact")
        for name in run.scores if "documents" in extras else ():
            if not run.beside(f".{name}.docs.npz").is_file():
                raise Refused(f"{run.beside(f'.{name}.docs.npz')} is missing: train with DOC_LOSSES=1, or leave --documents out")
            shutil.copyfile(run.beside(f".{name}.docs.npz"), folder / f"{stem}.{name}.docs.npz")


def build(found: list[runs.Run], told: Told, folder: Path, root: Path, repeats: str, extras: frozenset) -> None:
    """Write all files of the submission into an empty folder."""
    code, first = found[0].beside(".packed.py").read_bytes(), found[0]
    (folder / "train_gpt.py").write_bytes(code)
    chosen = {"all": found, "first": found[:1], "none": []}[repeats]
    again = {}
    for run in chosen:
        again[run.seed] = second = repeat(folder, run, root)
        print(f"seed {run.seed}: the shipped file repeats {second.bpb:.8f} (difference {second.difference:.1e})", flush=True)
    copy_runs(found, folder, extras)
    own, other = (preset_config(folder / "train_gpt.py", p, first.config) for p in (first.config["PRESET"], told.against))
    changed = {k: {"here": v, "preset": other[k]} for k, v in differences(first.config, other).items()}
    data = submission(found, again, told, code, changed)
    (folder / "submission.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(found, told, data, own), encoding="utf-8")
    (folder / "requirements.txt").write_text(requirements(first, root))


def make(found: list[runs.Run], told: Told, out: Path, root: Path, repeats: str = "all",
         extras: frozenset = frozenset()) -> Path:
    """Build the folder beside its place and move it there when it is whole; returns it."""
    slug = re.sub(r"[^A-Za-z0-9.+-]+", "_", told.name).strip("_")
    folder = out.resolve() / TRACKS[told.track][0] / f"{told.date}_{slug}"
    if folder.exists():
        raise Refused(f"{folder} exists already")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # left by a make that was killed
    part.mkdir(parents=True)
    try:
        build(found, told, part, root, repeats, extras)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def git_user() -> str:
    """The name that git commits with, or nothing."""
    try:
        return subprocess.run(["git", "config", "user.name"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:
        return ""


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="a RUN_ID's path (logs/ID), .jsonl file, glob or folder; one run a seed")
    parser.add_argument("--name", required=True, help="title; the folder's name is made from it")
    parser.add_argument("--author", default=git_user(), help="default: git's user.name")
    parser.add_argument("--github-id", default="")
    parser.add_argument("--blurb", default="", help="one sentence on what is new")
    parser.add_argument("--credits", default="", help="whose work this builds on")
    parser.add_argument("--track", choices=TRACKS, default="non-record")
    parser.add_argument("--against", default="record", help="preset that the config diff is against")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path, default=ROOT / "records", help="folder of the track folders")
    parser.add_argument("--root", type=Path, default=ROOT, help="where the runs' relative paths start")
    parser.add_argument("--repeat", choices=("all", "first", "none"), default="all",
                        help="artifacts that the shipped file scores again")
    parser.add_argument("--artifacts", action="store_true", help="put the artifacts into the folder")
    parser.add_argument("--documents", action="store_true", help="put the per-document losses into it (compare.py reads them)")
    return parser


def main(args: list[str] | None = None) -> int:
    """Command line; exit status is check.py's on the new folder."""
    given = options().parse_args(args)
    try:
        found = gather(given.runs)
    except runs.Unreadable as e:
        raise Refused(str(e)) from None
    told = Told(given.name, given.author or "anonymous", given.github_id or (given.author or "anonymous"),
                given.blurb or given.name, given.credits, given.date, given.track, given.against)
    extras = frozenset(name for name in ("artifacts", "documents") if getattr(given, name))
    folder = make(found, told, given.out, given.root.resolve(), given.repeat, extras)
    print(folder)
    return check.main([str(folder)])


if __name__ == "__main__":
    sys.exit(main())
