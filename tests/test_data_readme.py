"""The commands of data/README.md and of the scripts' docstrings are ones that the scripts understand."""

import re
import shlex
import sys

import pytest
from conftest import ROOT, load_by_path

sys.path.insert(0, str(ROOT / "data"))
import prepare
import shard_report as report

FETCHER = load_by_path("cached_challenge_fineweb", ROOT / "data" / "cached_challenge_fineweb.py")
PARSERS = {"prepare": prepare.parser, "cached_challenge_fineweb": FETCHER.parser, "shard_report": report.parser}


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of each line that starts a script of data/; what is in brackets can be left out."""
    lines = re.findall(r"^(?:\$ |    )python data/(\w+)\.py(.*)$", text, re.M)
    return [(script, shlex.split(re.sub(r"[\[\]]", "", rest), comments=True)) for script, rest in lines]


README = commands((ROOT / "data" / "README.md").read_text(encoding="utf-8"))
DOCSTRINGS = [c for module in (prepare, report, FETCHER) for c in commands(module.__doc__)]


def test_the_readme_shows_every_script():
    parts = {"json_values", "shards", "sources", "transforms", "vocabulary"}  # modules of the others
    assert {script for script, _ in README} == {p.stem for p in (ROOT / "data").glob("*.py")} - parts
    assert len(README) >= 9 and len(DOCSTRINGS) >= 6


@pytest.mark.parametrize("script, args", [c for c in README + DOCSTRINGS if c[0] in PARSERS])
def test_a_script_understands_its_commands(script, args):
    PARSERS[script]().parse_args(args)


def test_a_mistyped_command_is_found():
    ((script, args),) = commands("$ python data/prepare.py docs.jsonl --vocab-sise 5")
    with pytest.raises(SystemExit):
        PARSERS[script]().parse_args(args)
