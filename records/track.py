"""Show a run in trackio, Weights & Biases or TensorBoard, live or afterwards, from the JSONL that it writes anyway.

    python records/track.py logs/ID.jsonl --to trackio|wandb|tensorboard [--follow] [--project parameter-golf]
    TRACK=wandb python train_gpt.py                            # the same, started by the run

The run waits for nothing of it: a tracker that is slow, missing or offline costs no step and changes no log. With --follow it
waits for the file and for more lines, until the run's result stands there or nothing has come for --patience seconds.
Only the tracker that is named is imported. TensorBoard writes under --folder.
"""
import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Iterator

SINKS = ("trackio", "wandb", "tensorboard")
POLL = 0.5  # seconds between looks at the file


def lines(path: Path, follow: bool, patience: float, start: int = 0) -> Iterator[str]:
    """Whole lines of a file from byte `start`; with `follow` also those to come, until none has come for `patience` seconds."""
    idle = time.monotonic()
    while follow and not path.exists() and time.monotonic() - idle < patience:
        time.sleep(POLL)
    rest = ""
    with open(path, encoding="utf-8") as file:
        file.seek(start)
        while True:
            rest += file.readline()
            if rest.endswith("\n"):  # otherwise the writer is in the middle of a line
                yield rest
                rest, idle = "", time.monotonic()
            elif not follow or time.monotonic() - idle > patience:
                return
            else:
                time.sleep(POLL)


def numbers(event: dict) -> dict[str, float]:
    """What of an event a tracker can draw: name -> number."""
    kind, name = event["event"], event.get("name", "")
    if kind == "train":
        return {"train/loss": event["loss"], "train/gradient_norm": event["norm"], "train/seconds": event["seconds"]}
    if kind == "diagnostic" and name.startswith("step "):
        return {"val/loss": event["val_loss"], "val/bpb": event["val_bpb"]}
    if kind in ("score", "diagnostic"):
        return {f"{kind}/{name}/{k}": event[k] for k in ("val_loss", "val_bpb", "seconds")}
    if kind in ("size", "spans"):
        return {f"{kind}/{k}": v for k, v in event.items() if isinstance(v, (int, float)) and k != "t"}
    return {}


class WandbLike:
    """Weights & Biases, or trackio, which has the same interface."""

    def __init__(self, module: str, project: str, run_id: str, config: dict, folder: Path):
        self.api = importlib.import_module(module)
        self.run = self.api.init(project=project, name=run_id, config=config)

    def put(self, values: dict, step: int) -> None:
        self.api.log(values, step=step)

    def close(self) -> None:
        self.api.finish()


class TensorBoard:
    """An event file under the folder; the config as text."""

    def __init__(self, module: str, project: str, run_id: str, config: dict, folder: Path):
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.writer = writer(str(folder / project / run_id))
        self.writer.add_text("config", "\n".join(f"    {k}={v}" for k, v in sorted(config.items())))

    def put(self, values: dict, step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


def track(path: Path, to: str, project: str, folder: Path, follow: bool = False, patience: float = 600.0, start: int = 0) -> int:
    """Send a run's events from byte `start` on to a tracker; returns how many events had something to draw."""
    sink, step, sent = None, 0, 0
    try:
        for line in lines(path, follow, patience, start):
            event = json.loads(line)
            if event["event"] == "config":
                if sink:  # a second launch under one RUN_ID is another run
                    sink.close()
                config = {k: v for k, v in event.items() if k not in ("event", "t")}
                sink, step = (TensorBoard if to == "tensorboard" else WandbLike)(to, project, event["run_id"], config, folder), 0
            step = event.get("step", step)
            values = numbers(event)
            if values and sink:
                sink.put(values, step)
                sent += 1
            if event["event"] == "result":
                break
    finally:
        if sink:
            sink.close()
    return sent


def main(args: list[str] | None = None) -> int:
    """Command line; exit status 2 if the tracker is not installed or the file not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jsonl", type=Path)
    parser.add_argument("--to", choices=SINKS, default=os.environ.get("TRACK") or "trackio")
    parser.add_argument("--project", default="parameter-golf")
    parser.add_argument("--folder", type=Path, default=Path("tensorboard"))
    parser.add_argument("--follow", action="store_true")
    parser.add_argument("--patience", type=float, default=600.0)
    parser.add_argument("--from-byte", type=int, default=0, help="where this run begins in the file")
    given = parser.parse_args(args)
    try:
        sent = track(given.jsonl, given.to, given.project, given.folder, given.follow, given.patience,
                     given.from_byte)
    except ImportError as e:
        print(f"track: {e}; pip install {given.to}", file=sys.stderr)
        return 2
    except FileNotFoundError as e:
        print(f"track: {e}", file=sys.stderr)
        return 2
    print(f"{sent} events to {given.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
