"""Fetch shards and tokenizer of the contest into the layout that train_gpt.py reads.

    pip install -r data/requirements.txt
    python data/cached_challenge_fineweb.py --variant sp1024 [--train-shards 80] [--repo OWNER/NAME] [--data-dir data]

Files come from a Hugging Face data set (MATCHED_FINEWEB_REPO_ID, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX override which); each is
checked by header and size before it gets its final name, so what lies there under that name is whole. A file that is there and
whole is not fetched again.
"""
import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

MAGIC, HEADER_BYTES = 20240520, 1024
REPO = os.environ.get("MATCHED_FINEWEB_REPO_ID", "willdepueoai/parameter-golf")
PREFIX = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets")


def hub():
    """The huggingface_hub module; SystemExit says how to get it."""
    try:
        import huggingface_hub
    except ImportError:
        raise SystemExit("huggingface_hub is not installed; pip install -r data/requirements.txt") from None
    return huggingface_hub


def shard_problem(path: Path) -> str:
    """What is wrong with a shard; empty if header and size agree."""
    header = np.fromfile(path, "<i4", 256) if path.is_file() else np.zeros(0)
    if len(header) < 256 or header[0] != MAGIC or header[1] != 1 or header[2] < 1:
        return "no contest header"
    want = HEADER_BYTES + 2 * int(header[2])
    return "" if path.stat().st_size == want else f"{path.stat().st_size} bytes, its header says {want}"


def wanted_files(names: list[str], variant: str, train_shards: int) -> dict[str, str]:
    """remote name -> place below the data folder, of all validation shards, the first training shards and tokenizers.

    Remote folders differ between publishers, so files are found by the end of their names.
    """
    found: dict[str, str] = {}
    trains = 0
    size = re.search(r"\d+", variant)
    for name in sorted(n for n in names if n.startswith(PREFIX)):
        shard = re.search(rf"fineweb10B_{re.escape(variant)}/(fineweb_(train|val)_(?:bytes_)?\d+\.bin)$", name)
        if shard and (shard[2] == "val" or trains < train_shards):
            trains += shard[2] == "train"
            found[name] = f"datasets/fineweb10B_{variant}/{shard[1]}"
        elif size and re.search(rf"fineweb_{size[0]}_bpe\.(model|vocab)$", name):
            found[name] = f"tokenizers/{Path(name).name}"
    return found


def fetch(repo: str, remote: str, place: Path) -> str:
    """One file to its place: 'there' or 'fetched'. A damaged download is an error and never gets the final name."""
    is_shard = place.suffix == ".bin"
    if place.is_file() and place.stat().st_size and not (is_shard and shard_problem(place)):
        return "there"
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".fetch-") as folder:
        got = Path(hub().hf_hub_download(repo_id=repo, filename=remote, repo_type="dataset", local_dir=folder))
        if is_shard and shard_problem(got):
            raise SystemExit(f"{remote} of {repo} arrived damaged: {shard_problem(got)}; run this again")
        whole = place.with_name(f".{place.name}.{os.getpid()}")
        shutil.move(str(got.resolve()), whole)
        os.replace(whole, place)
    return "fetched"


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when every wanted file is there and whole."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="sp1024", help="sp1024, sp8192, byte260, ...")
    parser.add_argument("--train-shards", type=int, default=80, help="first training shards, 100M tokens each")
    parser.add_argument("--repo", default=REPO, help="data set, OWNER/NAME")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    args = parser.parse_args(argv)
    files = wanted_files(hub().HfApi().list_repo_files(args.repo, repo_type="dataset"), args.variant, args.train_shards)
    if not any("_val_" in name for name in files):
        raise SystemExit(f"{args.repo} holds no fineweb10B_{args.variant} below {PREFIX}; --repo names another data set")
    for i, (remote, place) in enumerate(files.items(), 1):
        print(f"[{i}/{len(files)}] {place}: {fetch(args.repo, remote, args.data_dir / place)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
