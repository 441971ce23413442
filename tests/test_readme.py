"""README.md tells the truth: its knob table is the program's, and every command in it is one that the program accepts.

    python tests/test_readme.py --write          write the knob table between <!-- knobs --> and <!-- /knobs -->
"""
import dataclasses
import math
import re
import shlex
import sys
from itertools import takewhile

import pytest
from conftest import ROOT, trainer

tg = trainer()
README = ROOT / "README.md"
BEGIN, END = "<!-- knobs -->", "<!-- /knobs -->"
ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")


# ----------------------------------------------------------------------------------------------------------------------
# Knob table
# ----------------------------------------------------------------------------------------------------------------------
def knob_table() -> str:
    """The knobs as a Markdown table, as README.md carries it (a test keeps the two equal)."""
    rows = ["| knob | default | what it does |", "|---|---|---|"]
    for group in (tg.RunKnobs, tg.DataKnobs, tg.ModelKnobs, tg.OptimKnobs, tg.PackKnobs):
        rows.append(f"| **{group.__name__.removesuffix('Knobs')}** | | {group.__doc__} |")
        for f in dataclasses.fields(group):
            options = ", ".join(c for c in f.metadata["choices"] if c)
            default = int(f.default) if isinstance(f.default, bool) else f.default
            rows.append(f"| `{f.name.upper()}` | `{default}` | {f.metadata['doc']}{f' ({options})' if options else ''} |")
    return "\n".join(rows)


def split_at_table(text: str) -> tuple[str, str, str]:
    """(what stands before the table, the table, what follows); AssertionError unless it is marked once."""
    assert text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END), f"mark one {BEGIN} ... {END}"
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    return before + BEGIN, table.strip(), END + after


def with_table(text: str) -> str:
    """README's text with the table as the program prints it."""
    before, _, after = split_at_table(text)
    return f"{before}\n{knob_table()}\n{after}"


# ----------------------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------------------
def code_lines(text: str) -> list[str]:
    """Lines of fenced code blocks; those that end in a backslash are joined."""
    blocks = re.findall(r"^ *```.*?\n(.*?)^ *```", text, re.M | re.S)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands(line: str) -> list[tuple[dict, int, str]]:
    """(knobs before the command, ranks, program) of each train_gpt.py that a shell line starts.

    What follows on the line, redirections or a comment, does not matter; a line that does not name it may be any program's output.
    """
    if "train_gpt.py" not in line:
        return []
    lexer = shlex.shlex(line.removeprefix("$ ").split(" #")[0], posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words, found = list(lexer), []
    for i, word in enumerate(words):
        if not re.fullmatch(r"python3?|torchrun", word):
            continue
        options = list(takewhile(lambda w: w.startswith("-"), words[i + 1:]))
        script = words[i + 1 + len(options):][:1]
        if script and script[0].endswith("train_gpt.py"):
            sizes = re.findall(r"--(?:nproc[-_]per[-_]node|nnodes)=(\d+)", " ".join(options))
            found.append((assignments(words[:i]), math.prod(map(int, sizes)), word))
    return found


def assignments(words: list[str]) -> dict:
    """The NAME=value words right before a command. Values that a shell would compute stand for the knob's default."""
    given = dict(w.split("=", 1) for w in takewhile(ASSIGNMENT.match, reversed(words)))
    return {k: default_text(k) if "$" in v else v for k, v in given.items()}


def default_text(name: str) -> str:
    """A knob's default as one would set it; nothing for what is no knob."""
    default = getattr(tg.Config, name.lower(), "")
    return str(int(default) if isinstance(default, bool) else default)


def try_command(env: dict, ranks: int, program: str) -> None:
    """ConfigError if the program would refuse it: under torchrun on GPUs, otherwise on a machine with one or without."""
    for cuda in (True,) if program == "torchrun" else (False, True):
        tg.load_config({**env, "WORLD_SIZE": str(ranks)}, cuda)


def readme() -> str:
    if not README.is_file():
        pytest.skip("README.md is not written yet")
    return README.read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Tests
# ----------------------------------------------------------------------------------------------------------------------
def test_readme_has_the_programs_knob_table():
    assert split_at_table(readme())[1] == knob_table(), "stale: python tests/test_readme.py --write"


def test_commands_of_the_readme_pass_the_config():
    found = [(line, c) for line in code_lines(readme()) for c in commands(line)]
    assert found, "README.md shows no command"
    for line, command in found:
        try:
            try_command(*command)
        except tg.ConfigError as error:
            pytest.fail(f"{line}\n{error}")


def test_every_command_that_names_the_script_is_seen():
    """A line that the parser above does not understand would pass unread."""
    for line in code_lines(readme()):
        assert len(commands(line)) == len(re.findall(r"(?:python3?|torchrun) [^;&|]*?\btrain_gpt\.py", line.split(" #")[0])), line


def test_commands_of_the_docstring_pass_the_config():
    lines = [line.strip() for line in tg.__doc__.splitlines() if "train_gpt.py" in line and line.startswith("    ")]
    found = [c for line in lines for c in commands(line)]
    assert len(found) == len(lines) >= 5
    for command in found:
        try_command(*command)


@pytest.mark.parametrize("line, expected", [
    ("$ python train_gpt.py", [({}, 1, "python")]),
    ("SEED=7 MODE=config python3 -u train_gpt.py > log.txt  # an apostrophe's mark",
     [({"SEED": "7", "MODE": "config"}, 1, "python3")]),
    ('MODE=sample SAMPLE_PROMPT="The cat; SEED=1" python train_gpt.py',
     [({"MODE": "sample", "SAMPLE_PROMPT": "The cat; SEED=1"}, 1, "python")]),
    ("SEED=1 torchrun --standalone --nproc_per_node=8 train_gpt.py", [({"SEED": "1"}, 8, "torchrun")]),
    ("torchrun --nnodes=2 --nproc-per-node=8 train_gpt.py", [({}, 16, "torchrun")]),
    ("for s in 1 2; do SEED=$s python train_gpt.py; done", [({"SEED": "1337"}, 1, "python")]),
    ("cd records && SEED=3 python ../train_gpt.py && MODE=eval python train_gpt.py",
     [({"SEED": "3"}, 1, "python"), ({"MODE": "eval"}, 1, "python")]),
    ("python data/local_corpus.py; cp train_gpt.py records/", []),
    ("python records/check.py train_gpt.py", [])])
def test_parser_of_commands(line, expected):
    assert commands(line) == expected


@pytest.mark.parametrize("line", [
    "TTT_LERNING_RATE=1 python train_gpt.py", "SEED=x python train_gpt.py", "PRESET=fast python train_gpt.py",
    "torchrun --nproc_per_node=7 train_gpt.py", "EVAL_STRIDE=4096 python train_gpt.py"])
def test_wrong_commands_are_refused(line):
    (command,) = commands(line)
    with pytest.raises(tg.ConfigError):
        try_command(*command)


def test_knob_table_has_one_row_a_knob():
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \|", knob_table(), re.M)
    assert sorted(rows) == sorted(f.name.upper() for f in dataclasses.fields(tg.Config))
    cells = [len(re.split(r"(?<!\\)\|", line)) for line in knob_table().splitlines()]
    assert set(cells) == {5}, "a knob's sentence holds a bare | and breaks the table"


def test_table_is_written_in_place():
    stale = f"# Title\n\n{BEGIN}\n| old |\n{END}\n\nafter\n"
    fresh = with_table(stale)
    assert split_at_table(fresh)[1] == knob_table()
    assert fresh.startswith("# Title\n\n") and fresh.endswith("\n\nafter\n") and with_table(fresh) == fresh


def test_code_lines_joins_continuations_and_skips_prose():
    text = "python train_gpt.py in prose\n```bash\nSEED=1 \\\n  python train_gpt.py\n```\nmore\n"
    assert [line.split() for line in code_lines(text)] == [["SEED=1", "python", "train_gpt.py"]]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(__doc__)
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
