"""Pictures of runs: loss curves, what each step after training costs or gains, bytes, schedules, sweeps.

    python records/report.py logs/a logs/b ... [--out report]        runs, globs, record folders
    python records/report.py sweeps/gates                            a sweep: its runs and its forest plot

Writes curves.png, waterfall.png, bytes.png, schedules.png (and sweep.png) and index.html, one page with the pictures and a
table inside it, which needs no other file. Runs of one recipe share a colour and a name; seeds are single lines.
"""
import argparse
import base64
import dataclasses
import html
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor touched
import matplotlib.pyplot as plt
import matplotlib.ticker
from matplotlib.figure import Figure

import runs

ROOT = Path(__file__).resolve().parents[1]
# Okabe and Ito's colours, which most colour-blind readers can tell apart; the last ones only for many parts
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#B8A000", "#8C6BB1", "#A6611A")
GAIN, LOSS, REST = "#009E73", "#D55E00", "#9AA5B1"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.grid": True,
         "grid.color": "#E6E6E6", "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.titlesize": 11, "axes.titlelocation": "left",
         "legend.frameon": False, "figure.facecolor": "white", "axes.labelcolor": "#333333", "xtick.color": "#555555",
         "ytick.color": "#555555", "figure.constrained_layout.use": True}
plt.rcParams.update(STYLE)  # some of it is read when a legend is made, some when the file is written
STAGES = (("raw", "raw"), ("pre-quantization post-ema", "averaged"), ("full", "quantised"), ("sliding", "sliding\nwindow"),
          ("ttt", "test-time\ntraining"))


# ----------------------------------------------------------------------------------------------------------------------
# Groups
# ----------------------------------------------------------------------------------------------------------------------
def group(found: list[runs.Run]) -> dict[str, list[runs.Run]]:
    """Runs by recipe, under the name that their files share; foreign logs, which have none, by folder."""
    by_recipe: dict[str, list] = {}
    for run in found:
        by_recipe.setdefault(run.recipe or str(run.path.resolve().parent), []).append(run)
    named: dict[str, list] = {}
    for recipe, members in by_recipe.items():
        name = common_name(members)
        while name in named:  # two recipes under one name are not one
            name += f" ({recipe[:6]})"
        named[name] = members
    # a sweep's control takes the first colour and the first row
    return dict(sorted(named.items(), key=lambda item: item[0] != "control"))


def common_name(members: list[runs.Run]) -> str:
    """What the runs' ids begin with, without what marks a seed; a record's logs go by their folder."""
    stems = [r.path.stem for r in members]
    if all(s.startswith("train") for s in stems):
        return members[0].path.resolve().parent.name
    shared = os.path.commonprefix(stems) if len(stems) > 1 else stems[0].rsplit(".s", 1)[0]
    return shared.removesuffix(".s").rstrip("._-") or stems[0]


def colours(groups: dict) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(groups)}


def figure(width: float, height: float, **grid):
    """(figure, axes as a table)"""
    return plt.subplots(figsize=(width, height), squeeze=False, **grid)


def save(fig: Figure, path: Path) -> Path:
    """Write a PNG and forget the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return path


def note(ax, text: str) -> None:
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color="#777777")


# ----------------------------------------------------------------------------------------------------------------------
# Loss curves
# ----------------------------------------------------------------------------------------------------------------------
def curves(groups: dict[str, list[runs.Run]]) -> Figure:
    """Training loss over steps, tokens and seconds; validations as dots; with several recipes, differences to the first."""
    several = len(groups) > 1
    fig, table = figure(12, 7.6, ncols=2, nrows=2) if several else figure(12, 4.2, ncols=3)
    axes = table.flat
    # steps need not be equally long; runs that do not tell their tokens are older than that
    units = (("steps", lambda r, p: p.step), ("million tokens", lambda r, p: (p.tokens or p.step * r.batch) / 1e6),
             ("seconds of training", lambda r, p: p.seconds))
    limits = loss_limits([r for members in groups.values() for r in members])
    for ax, (unit, x) in zip(axes, units):
        for name, colour in colours(groups).items():
            for i, run in enumerate(groups[name]):
                ax.plot([x(run, p) for p in run.train], [p.loss for p in run.train], color=colour, lw=1.3,
                        alpha=0.9 if len(groups[name]) == 1 else 0.6, label=name if not i else None)
        ax.set_xlabel(unit), ax.set_xlim(left=0), ax.set_ylim(*limits)
    for name, colour in colours(groups).items():
        for run in groups[name]:
            axes[0].plot([s for s, *_ in run.checks], [loss for _, loss, _ in run.checks], "o", ms=4, color=colour)
    for ax in table[:, 0]:
        ax.set_ylabel("training loss (nats a token)")
    if several:
        draw_differences(axes[3], groups)
    legend(fig, axes[0], len(groups))
    return fig


def draw_differences(ax, groups: dict[str, list[runs.Run]]) -> None:
    """Loss minus the first recipe's, means over seeds: where curves lie on each other, this shows which is lower."""
    first, *others = groups
    base, values = mean_losses(groups[first]), []
    for name in others:
        mine = mean_losses(groups[name])
        steps = sorted(base.keys() & mine.keys())
        gaps = [mine[s] - base[s] for s in steps]
        # a batch's luck is common to both, but not all of it: average over five points
        smooth = [runs.mean(gaps[max(0, i - 2):i + 3]) for i in range(len(gaps))]
        ax.plot(steps, smooth, color=colours(groups)[name], lw=1.5)
        values += smooth[len(smooth) // 5:]
    ax.axhline(0, color=colours(groups)[first], lw=1.5)
    room = 0.1 * (max(values) - min(values)) if values else 1.0
    ax.set_ylim(min([*values, 0]) - room, max([*values, 0]) + room)
    ax.set_xlabel("steps"), ax.set_xlim(left=0), ax.set_title(f"minus {first}, five points' mean")


def mean_losses(members: list[runs.Run]) -> dict[int, float]:
    """Step -> training loss, mean over the seeds that reached it, where all did."""
    tables = [{p.step: p.loss for p in r.train} for r in members]
    return {s: runs.mean(t[s] for t in tables) for s in sorted(set.intersection(*map(set, tables)))}


def loss_limits(found: list[runs.Run]) -> tuple[float, float]:
    """Axis from just under the lowest loss to where the curves are after a fifth of the run: the first fall says little."""
    losses = [p.loss for r in found for p in r.train]
    longest = max((r.train[-1].step for r in found if r.train), default=0)  # a run that broke off early is all first fall
    later = [p.loss for r in found for p in r.train if p.step >= 0.2 * longest]
    if not losses:
        return 0.0, 1.0
    room = 0.05 * (max(later) - min(losses)) or 0.1
    return min(losses) - room, max(later) + room


def legend(fig: Figure, ax, count: int) -> None:
    """One legend for all panels, under them, so that it hides no curve."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        fig.legend(handles, labels, loc="outside lower center", ncols=min(count, 4))


# ----------------------------------------------------------------------------------------------------------------------
# Waterfall
# ----------------------------------------------------------------------------------------------------------------------
def stage_scores(run: runs.Run) -> dict[str, float]:
    """Stage -> bpb, in the order of STAGES; stages that the run did not have are left out."""
    known = {**run.diagnostics, **run.scores}
    return {label: known[key].bpb for key, label in STAGES if key in known}


def stages_to_result(run: runs.Run) -> dict[str, float]:
    """Stage -> bpb up to the pass that is the run's result, so that a picture ends with the number of the table.

    Passes behind it in STAGES are only in the table of runs. Others' passes have other names and come last.
    """
    stages, result = stage_scores(run), runs.result_pass(run)
    labels = dict(STAGES)
    if result in labels:
        order = list(labels.values())
        return {n: v for n, v in stages.items() if order.index(n) <= order.index(labels[result])}
    return {**stages, result: run.final.bpb} if result else stages


def waterfall(groups: dict[str, list[runs.Run]], most: int = 6) -> Figure:
    """bpb from raw weights to the final score, means over seeds, a panel a recipe; all panels share one scale."""
    stages = {n: mean_stages(g) for n, g in groups.items()}
    stages = {n: s for n, s in stages.items() if s}
    names = list(stages)[:most]
    columns = min(3, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    fig, axes = figure(max(6.5, 4.4 * columns), 3.8 * rows, ncols=columns, nrows=rows, sharey=True)
    for ax in axes.flat[len(names):]:
        ax.set_axis_off()
    values = [v for n in names for v in stages[n].values()] or [0.0]
    room = 0.14 * (max(values) - min(values)) or 0.01
    for ax, name in zip(axes.flat, names):
        ax.set_ylim(min(values) - 2 * room, max(values) + room)  # a bar from zero would hide all differences
        draw_waterfall(ax, stages[name])
        ends = [r.final.bpb for r in groups[name] if r.final]
        words = f"n = {len(ends)}" + (f", seed sd {runs.spread(ends):.4f}" if len(ends) > 1 else "")
        if not ends:
            words = "undecided which score is the result" if any(r.scores for r in groups[name]) else "no result"
        ax.set_title(f"{name}\n{words}")
    for ax in axes[:, 0]:
        ax.set_ylabel("bits per byte")
    if not names:
        axes[0, 0].set_axis_on(), note(axes[0, 0], "no run has scores yet")
    elif len(stages) > most:
        fig.suptitle(f"the first {most} of {len(stages)} recipes", fontsize=9, color="#777777")
    return fig


def mean_stages(members: list[runs.Run]) -> dict[str, float]:
    """Stage -> mean bpb over the runs that have a result, or else over all, for the stages that all of these have."""
    scored = [s for s in map(stages_to_result, [r for r in members if r.final] or members) if s]
    shared = [label for label in (scored[0] if scored else ()) if all(label in s for s in scored)]
    return {label: runs.mean(s[label] for s in scored) for label in shared}


def draw_waterfall(ax, stages: dict[str, float]) -> None:
    """Floating bars between neighbouring stages, each with its difference; the first and the last with their values."""
    means, low = list(stages.values()), ax.get_ylim()[0]
    for i, value in enumerate(means):
        before = means[i - 1] if i else low
        colour = REST if not i else GAIN if value < before else LOSS
        ax.bar(i, abs(value - before), 0.62, bottom=min(before, value), color=colour)
        ax.annotate(f"{value - before:+.4f}" if i else f"{value:.4f}", (i, max(value, before)), xytext=(0, 4),
                    textcoords="offset points", ha="center", fontsize=9)
        if i + 1 < len(means):
            ax.plot([i + 0.31, i + 0.69], [value, value], color="#888888", lw=0.8)
    if len(means) > 1:
        ax.annotate(f"{means[-1]:.4f}", (len(means) - 1, min(means[-2:])), xytext=(0, -13), textcoords="offset points",
                    ha="center", fontsize=9, fontweight="bold")
    ax.set_xticks(range(len(means)), stages, fontsize=8.5), ax.grid(False, axis="x")


# ----------------------------------------------------------------------------------------------------------------------
# Bytes
# ----------------------------------------------------------------------------------------------------------------------
def sizes(groups: dict[str, list[runs.Run]]) -> Figure:
    """Bytes by part, a stacked bar for the largest run of each recipe, with the cap where it is near."""
    largest = {n: max((r for r in g if r.parts), key=lambda r: r.total, default=None) for n, g in groups.items()}
    largest = {n: r for n, r in largest.items() if r is not None}
    fig, axes = figure(11, 1.9 + 0.5 * max(1, len(largest)))
    ax = axes[0, 0]
    totals: dict[str, int] = {}
    for run in largest.values():
        for part, size in run.parts.items():
            totals[part] = totals.get(part, 0) + size
    order = sorted(totals, key=totals.get, reverse=True)
    peak = max((sum(r.parts.values()) for r in largest.values()), default=1)
    unit, word = (1e6, "MB") if peak >= 1e6 else (1e3, "kB")
    for y, run in enumerate(largest.values()):
        stack(ax, y, run.parts, order, unit, peak)
    for i, part in enumerate(order):
        ax.barh(0, 0, color=part_colour(i), label=part)
    ax.set_yticks(range(len(largest)), largest), ax.invert_yaxis(), ax.grid(False, axis="y")
    if peak > 0.7 * runs.CAP:
        ax.axvline(runs.CAP / unit, color="#333333", lw=1, ls="--")
        ax.annotate(f"cap {runs.CAP / unit:g}", (runs.CAP / unit, 1), xycoords=("data", "axes fraction"), xytext=(-4, 3),
                    textcoords="offset points", fontsize=8.5, ha="right", color="#333333")
    ax.set_xlim(0, max(peak, runs.CAP if peak > 0.7 * runs.CAP else 0) / unit * 1.02)
    ax.set_xlabel(f"{word} of packed code and model") if largest else note(ax, "no run has been packed yet")
    legend(fig, ax, 5)
    return fig


def part_colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def stack(ax, y: int, parts: dict, order: list, unit: float, peak: int) -> None:
    """One run's bar; a part's bytes stand in it where there is room."""
    left = 0
    for i, part in enumerate(order):
        size = parts.get(part, 0)
        ax.barh(y, size / unit, 0.66, left=left / unit, color=part_colour(i), edgecolor="white", lw=0.6)
        if size > 0.055 * peak:
            ax.text((left + size / 2) / unit, y, f"{size / unit:.{2 if unit == 1e6 else 1}f}", ha="center", va="center",
                    color="white", fontsize=8.5)
        left += size


# ----------------------------------------------------------------------------------------------------------------------
# Schedules
# ----------------------------------------------------------------------------------------------------------------------
def schedules(groups: dict[str, list[runs.Run]], program) -> Figure:
    """Learning rate, momentum and recurrence over progress, as the program computes them from each run's config."""
    fig, axes = figure(12, 3.6, ncols=3)
    panels = ("learning rate, times its base", "Muon's momentum", "passes over the loop")
    progress = [i / 400 for i in range(401)]
    alike: dict[tuple, list[str]] = {}  # recipes with one schedule are one line
    for name, members in groups.items():
        # knobs that are younger than the run have their defaults, but it followed no schedule that it did not know, and
        # its batch was no multiple of a block
        told = {"train_batch_schedule": "", "pack_tokens": members[0].batch}
        told |= {k.lower(): v for k, v in members[0].config.items()}
        config = program.Config(**{f.name: told[f.name] for f in dataclasses.fields(program.Config) if f.name in told})
        values = [program.Schedules(config).at(p) for p in progress]
        alike.setdefault(tuple((v.lr, v.momentum, 1 + v.looping * config.num_loops) for v in values), []).append(name)
    for i, (values, names) in enumerate(alike.items()):
        label = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for ax, y in zip(axes[0], zip(*values)):
            ax.plot(progress, y, color=COLOURS[i % len(COLOURS)], lw=1.8 / (i + 1) + 1.0, label=label)
    for ax, title in zip(axes[0], panels):
        ax.set_title(title), ax.set_xlabel("progress of the run"), ax.set_xlim(0, 1)
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 2].yaxis.get_major_locator().set_params(integer=True)
    legend(fig, axes[0, 0], min(len(alike), 3))
    return fig


# ----------------------------------------------------------------------------------------------------------------------
# Sweeps
# ----------------------------------------------------------------------------------------------------------------------
def forest(rows: list, title: str) -> Figure:
    """Paired differences to the control with intervals; best at the top, filled where zero is left out."""
    def pair(row):
        return row.paired or {}

    shown = sorted((r for r in rows if r.paired), key=lambda r: pair(r)["mean"])
    fig, axes = figure(8.5, 1.7 + 0.42 * max(1, len(shown)))
    ax = axes[0, 0]
    ax.axvline(0, color="#333333", lw=1)
    for y, row in enumerate(shown):
        p = pair(row)
        decided = p["low"] is not None and (p["low"] > 0 or p["high"] < 0)
        colour = REST if not decided else GAIN if p["mean"] < 0 else LOSS
        if p["low"] is not None:
            ax.plot([p["low"], p["high"]], [y, y], color=colour, lw=2.2, solid_capstyle="butt")
        ax.plot(p["mean"], y, "s", ms=7, color=colour)
        ax.annotate(f"{p['mean']:+.4f}  n = {p['n']}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    ax.set_yticks(range(len(shown)), [r.setting for r in shown]), ax.grid(False, axis="y")
    ax.set_ylim(max(len(shown), 1) - 0.5, -0.5)
    ax.set_xlabel("bpb minus control, paired seeds, 95 % interval  (left is better)")
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
    control = next((r for r in rows if not r.paired and r.mean is not None), None)
    ax.set_title(title + (f": control {control.mean:.4f} bpb, n = {control.n}" if control else ""))
    if not shown:
        note(ax, "no setting shares a seed with the control yet")
    return fig


# ----------------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------------
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 1150px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e3e3e3; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: #555; font-weight: 600; }
img { max-width: 100%; height: auto; } .bad { color: #b3261e; font-weight: 600; }
"""


def html_table(head: list[str], rows: list[list[str]]) -> str:
    def line(tag, cells):
        return "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"

    return f'<div class="wide"><table>{line("th", head)}{"".join(line("td", r) for r in rows)}</table></div>'


def runs_table(groups: dict[str, list[runs.Run]]) -> str:
    """A row a run: what it was and what came of it."""
    head = ["run", "seed", "recipe", "steps", "ms a step", *(label.replace("\n", " ") for _, label in STAGES), "result",
            "bytes", "train s", "eval s", "end"]
    rows = []
    for name, members in groups.items():
        for r in members:
            stages, end = stage_scores(r), how_it_ended(r)
            fine = r.finished and not r.failures
            rows.append([html.escape(name), r.seed, r.recipe or "", r.steps or "", f"{r.step_ms:.1f}" if r.step_ms else "",
                         *(f"{stages[label]:.5f}" if label in stages else "" for _, label in STAGES),
                         html.escape(result_text(r)),
                         f"{r.total:,}" if r.total else "", f"{r.train_seconds:.1f}" if r.train_seconds else "",
                         f"{r.eval_seconds:.1f}" if r.eval_seconds else "",
                         html.escape(end) if fine else f'<span class="bad">{html.escape(end)}</span>'])
    return html_table(head, rows)


def result_text(run: runs.Run) -> str:
    """The score that counts and its pass, or what there is to choose from."""
    if run.final:
        return f"{run.final.bpb:.5f} {runs.result_pass(run)}"
    return f"undecided: {runs.scores_text(run)}" if run.scores else ""


def how_it_ended(run: runs.Run) -> str:
    """In a word or the run's own; foreign logs give no verdict."""
    if not run.finished:
        return "unfinished"
    if run.dialect == "upstream":
        return "no verdict"
    return ("; ".join(run.failures) or "legal") + "".join(f"; but {c}" for c in run.caveats)


def knobs_table(groups: dict[str, list[runs.Run]]) -> str:
    """Knobs in which the recipes differ, a column a recipe."""
    own = {"RUN_ID", "SEED", "ARTIFACT_DIR", "ARTIFACT", "CHECKPOINT", "MODE"}  # say which run, not what it did
    configs = {n: {k: v for k, v in g[0].config.items() if k not in own} for n, g in groups.items()}
    names = sorted({k for c in configs.values() for k in c})
    apart = [k for k in names if len({str(c.get(k)) for c in configs.values()}) > 1]
    if not apart:
        return "<p>The recipes do not differ in any knob.</p>" if len(groups) > 1 else ""
    rows = [[k, *(html.escape(str(c.get(k, ""))) for c in configs.values())] for k in apart]
    return html_table(["knob", *map(html.escape, configs)], rows)


def page(title: str, groups: dict, pictures: dict[str, Path]) -> str:
    """One HTML file with everything in it."""
    blocks = [f"<h1>{html.escape(title)}</h1>", "<h2>Runs</h2>", runs_table(groups)]
    for name, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        blocks.append(f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    if len(groups) > 1:
        blocks += ["<h2>Knobs that differ</h2>", knobs_table(groups)]
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{CSS}</style></head><body>{''.join(blocks)}</body></html>\n")


def build(found: list[runs.Run], out: Path, title: str, program=None, rows: list | None = None) -> Path:
    """All pictures and the page; returns the page."""
    groups = group(found)
    pictures = {"Sweep": save(forest(rows, title), out / "sweep.png")} if rows else {}
    pictures["Training loss"] = save(curves(groups), out / "curves.png")
    pictures["From raw weights to the score"] = save(waterfall(groups), out / "waterfall.png")
    pictures["Bytes"] = save(sizes(groups), out / "bytes.png")
    configured = {n: [r for r in g if r.dialect == "events"] for n, g in groups.items()}
    configured = {n: g for n, g in configured.items() if g}
    if program is not None and configured:
        pictures["Schedules"] = save(schedules(configured, program), out / "schedules.png")
    (out / "index.html").write_text(page(title, groups, pictures), encoding="utf-8")
    return out / "index.html"


def sweep_rows(folder: Path) -> list | None:
    """The rows of a sweep's results.json, as sweep.py made them."""
    file = folder / "results.json"
    return [SimpleNamespace(**r) for r in json.loads(file.read_text())] if file.is_file() else None


def main(args: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("report"))
    parser.add_argument("--title", help="default: the name of the first argument")
    parser.add_argument("--program", type=Path, default=ROOT / "train_gpt.py", help="asked for the schedules")
    given = parser.parse_args(args)
    rows = next((r for r in map(sweep_rows, map(Path, given.runs)) if r), None)
    try:
        places = [str(Path(n) / "logs") if (Path(n) / "sweep.json").is_file() else n for n in given.runs]
        found = [r for place in places for r in runs.find(place)]
    except runs.Unreadable as e:
        print(f"report: {e}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    print(build(found, given.out, given.title or Path(given.runs[0]).name, runs.load_program(given.program), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
