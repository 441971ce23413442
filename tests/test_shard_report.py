"""The tokenizer report: its figures against a plain count, sidecars, pictures, and what it refuses."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT, write_shard

sys.path.insert(0, str(ROOT / "data"))
import prepare
import shard_report as report
import shards
import sources

TEXTS = [f"The word {i} is one of many that NATO wrote, said Paris. " * (i % 5 + 1) for i in range(120)] + [
    "汉语 漢字 " * 30
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A caseops data set with pairs, the last document in an alphabet that its tokenizer does not know."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    job = prepare.Job("toy", 300, tokenizer_bytes=5000, transform="caseops", pairs=True, val_docs=20, shard_tokens=700)
    prepare.prepare(sources.Source([folder / "docs.jsonl"]), job, folder, log=lambda _: None)
    return folder / "datasets/toy"


def test_figures_are_those_of_a_plain_count(made):
    stats, coder = report.report(made)
    for split, texts in (("val", TEXTS[:20]), ("train", TEXTS[20:])):
        table, encoded = stats[split].table(), [coder.encode(t) for t in texts]
        tokens = np.concatenate(encoded)
        text = [coder.decode(e) for e in encoded]
        assert (table["documents"], table["tokens"], table["bytes of text"]) == (
            len(texts),
            len(tokens),
            sum(len(t.encode()) for t in text),
        )
        assert table["bytes per token"] == round(table["bytes of text"] / len(tokens), 4)
        assert table["tokens per document, most"] == max(map(len, encoded))
        assert table["pieces never used"] == 300 - len(set(tokens.tolist()))
        counts = sorted(np.bincount(tokens).tolist(), reverse=True)
        assert sum(counts[: table["pieces that make half of the tokens"]]) * 2 >= len(tokens)


def test_the_worst_document_is_the_one_that_the_vocabulary_does_not_know(made):
    stats, coder = report.report(made)
    worst = stats["train"].worst_documents(coder)
    assert worst[0]["document"] == 100 and worst[0]["begins"].startswith("汉语") and len(worst) == report.WORST
    assert worst == sorted(worst, key=lambda w: w["bytes per token"])


def test_command_line_writes_table_picture_and_figures(made, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert report.main([str(made), "--picture", str(tmp_path / "r.png"), "--json", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert "| documents | 101 | 20 |" in out and "fewest bytes a token" in out
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "r.png").stat().st_size > 20_000
    assert json.loads((tmp_path / "r.json").read_text())["train"]["documents"] == 101


def test_shards_without_a_manifest_need_the_tokenizer(made, tmp_path):
    folder = tmp_path / "datasets/bare"
    for path in made.glob("*.bin"):
        tokens = shards.read_shard(path)
        write_shard(folder / path.name, tokens)
    with pytest.raises(SystemExit, match="no manifest names the tokenizer"):
        report.main([str(folder)])
    stats, _ = report.report(folder, made.parent.parent / "tokenizers/toy.model")
    assert stats["val"].table()["bytes of text"] == report.report(made)[0]["val"].table()["bytes of text"], (
        "by the sidecar"
    )


def test_what_does_not_fit_is_refused(made, tmp_path):
    tokenizer = made.parent.parent / "tokenizers/toy.model"
    with pytest.raises(shards.ShardError, match="no shards"):
        report.report(tmp_path, tokenizer)
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 300])
    with pytest.raises(shards.ShardError, match="token 300, but the tokenizer has 300 pieces"):
        report.report(tmp_path, tokenizer)
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 5])
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", [0, 1, 1])
    with pytest.raises(shards.ShardError, match="2 val tokens, but sidecars for 3"):
        report.report(tmp_path, tokenizer)
