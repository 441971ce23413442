"""The held-out report against plain counts: planted duplicates, borders of shards, scores with and without them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import contest_writer
import numpy as np
import pytest
import sentencepiece as spm
from conftest import ROOT, write_shard
from hypothesis import given
from hypothesis import strategies as st

sys.path[:0] = [str(ROOT / "records"), str(ROOT / "data")]
import heldout
import runs

rng = np.random.default_rng(0)


def random_document(length: int) -> list[int]:
    """BOS and tokens that no other document has in the same order."""
    return [1, *rng.integers(2, 500, length).tolist()]


def write_documents(folder: Path, split: str, docs: list[list[int]], shards: int = 1) -> Path:
    """Documents as shards; borders of shards fall anywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    contest_writer.write_split(folder, split, [t for doc in docs for t in doc], shards)
    return folder


def plain_share(doc: list[int], others: list[list[int]], window: int = 13) -> float:
    """The definition, slowly: the share of a document's windows that occur in some other document."""

    def windows(d):
        return [tuple(d[i : i + window]) for i in range(1, len(d) - window + 1)]

    known = {w for other in others for w in windows(other)}
    own = windows(doc)
    return sum(w in known for w in own) / len(own) if own else float("nan")


def shares(
    held: list[list[int]], others: list[list[int]], folder: Path, shards: int = 1, window: int = 13
) -> np.ndarray:
    write_documents(folder / "held", "val", held)
    write_documents(folder / "other", "train", others, shards)
    return heldout.overlap(folder / "held", [folder / "other"], window)[1][0].share


# ----------------------------------------------------------------------------------------------------------------------
# Overlap
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block, shards", [(1 << 20, 1), (50, 1), (64, 3), (13, 5), (1000, 7)])
def test_planted_duplicates_are_found_wherever_blocks_and_shards_end(tmp_path, monkeypatch, block, shards):
    monkeypatch.setattr(heldout, "BLOCK", block)
    train = [random_document(n) for n in (200, 90, 13, 12, 300, 5, 60)]
    half = [1, *train[4][50:150], *random_document(88)[1:]]  # 88 of its 176 windows are whole within the copied part
    held = [random_document(100), list(train[0]), half, [1, *train[6][1:]], random_document(8), list(train[2]), [1]]
    share = shares(held, train, tmp_path, shards)
    np.testing.assert_allclose(share, [plain_share(doc, train) for doc in held])
    assert share.tolist()[:4] == [0, 1, 0.5, 1] and np.isnan(share[[4, 6]]).all() and share[5] == 1


@given(st.data())
def test_shares_are_those_of_the_definition(tmp_path_factory, data):
    """Few tokens and short windows, so that windows recur within and between documents all the time."""
    document = st.lists(st.integers(2, 4), max_size=12).map(lambda d: [1, *d])
    held, others = (
        data.draw(st.lists(document, min_size=1, max_size=6)),
        data.draw(st.lists(document, min_size=1, max_size=6)),
    )
    window, before = data.draw(st.integers(1, 4)), heldout.BLOCK
    heldout.BLOCK = data.draw(st.integers(4, 30))
    shards = data.draw(st.integers(1, min(3, sum(map(len, others)))))
    try:
        share = shares(held, others, tmp_path_factory.mktemp("x"), shards, window)
    finally:
        heldout.BLOCK = before
    np.testing.assert_allclose(share, [plain_share(doc, others, window) for doc in held])


def test_equal_hashes_of_different_windows_count_for_nothing(tmp_path, monkeypatch):
    """Every hash is equal here: only the exact comparison is left, and the held-out set asks for another hash."""
    right = heldout.Hasher.__call__
    held, train = [random_document(40)], [random_document(60)]
    write_documents(tmp_path / "held", "val", held), write_documents(tmp_path / "other", "train", train)
    docs = heldout.read_documents(tmp_path / "held")
    monkeypatch.setattr(
        heldout.Hasher,
        "__call__",
        lambda self, tokens: ((found := right(self, tokens))[0], np.full(len(found[0]), docs.hashes[3], np.uint64)),
    )
    overlap = docs.search("x", [tmp_path / "other/fineweb_train_000000.bin"])
    assert (overlap.where < 0).all() and overlap.share.tolist() == [0]
    with pytest.raises(AssertionError, match="eight hash functions"):
        heldout.read_documents(tmp_path / "held")


def test_the_worst_documents_are_named_with_what_they_resemble(tmp_path):
    train, val = [random_document(100) for _ in range(9)], [random_document(100) for _ in range(5)]
    held = [random_document(50) for _ in range(20)]
    held[7], held[3] = list(train[6]), [1, *val[2][1:80], *random_document(33)[1:]]
    write_documents(tmp_path / "held", "val", held)
    write_documents(tmp_path / "other", "train", train, 2), write_documents(tmp_path / "other", "val", val)
    r = heldout.report(tmp_path / "held", [tmp_path / "other"])
    first, second = r["worst"]
    assert (
        first
        | {
            "document": 7,
            "overlap": 1.0,
            "most like": f"train of {tmp_path / 'other'}",
            "its document": 6,
            "tokens": 101,
        }
        == first
    )
    assert second | {"document": 3, "most like": f"val of {tmp_path / 'other'}", "its document": 2} == second
    assert 0.5 < second["overlap"] == second["overlap there"] < 0.8
    assert [(o["with any"], o["from 50%"], o["from 100%"]) for o in r["overlap"]] == [(1, 1, 0), (1, 1, 1), (2, 2, 1)]
    assert [o["its documents"] for o in r["overlap"]] == [5, 9, 14] and r["usual"][0]["with any"] == 0
    assert json.loads(json.dumps(r)) == r and r["notes"]


def test_the_usual_overlap_is_that_of_the_original_validation_set(tmp_path):
    train = [random_document(100) for _ in range(9)]
    (
        write_documents(tmp_path / "other", "train", train),
        write_documents(tmp_path / "other", "val", [train[0], random_document(90)]),
    )
    write_documents(tmp_path / "held", "val", [random_document(90)])
    held, found, usual = heldout.overlap(tmp_path / "held", [tmp_path / "other"])
    assert usual[0].share.tolist() == [1, 0] and [o.share.tolist() for o in found] == [[0], [0]]
    _, found, usual = heldout.overlap(tmp_path / "other", [tmp_path / "other"])
    assert len(found) == 1 and not usual, "a validation set is not compared with itself"


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    held = write_documents(tmp_path / "held", "val", [random_document(50)])
    other = write_documents(tmp_path / "other", "train", [random_document(50)])
    for folder, sha in ((held, "a"), (other, "b")):
        (folder / "manifest.json").write_text(
            json.dumps({"tokenizer": {"sha256": sha}, "transform": {}, "train": {}, "val": {}})
        )
    (tmp_path / "empty").mkdir()
    write_shard(tmp_path / "middle/fineweb_val_000000.bin", [7, 1, 8])
    for args, message in [
        ((held, "--against", other), "different tokenizers"),
        ((tmp_path / "empty", "--against", other), "holds no fineweb_val_"),
        ((held, "--against", tmp_path / "empty"), "to compare with"),
        ((tmp_path / "middle", "--against", tmp_path / "middle"), "do not begin with a document"),
        ((held,), "name an artifact to score, or --against"),
        ((held, "--window", "0"), "--window and --ranks"),
    ]:
        assert heldout.main(["--data", *map(str, args)]) == 2
        assert message in capsys.readouterr().err
    assert (
        heldout.main([str(tmp_path / "empty"), "--data", str(held)]) == 2
        and "holds no *.artifact" in capsys.readouterr().err
    )


# ----------------------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------------------
def test_a_score_and_its_interval_are_those_of_a_ratio_of_sums():
    size = rng.integers(50, 5000, 4000).astype(float)
    nats = size * 0.7 + rng.normal(0, 20, 4000)
    score = heldout.Losses(nats, size).score()
    assert score["bpb"] == pytest.approx(nats.sum() / size.sum() / np.log(2)) and score["documents"] == 4000
    draws = [np.random.default_rng(i).integers(0, 4000, 4000) for i in range(400)]
    spread = np.std([nats[d].sum() / size[d].sum() for d in draws]) / np.log(2)
    assert score["half_interval"] == pytest.approx(1.96 * spread, rel=0.12)
    assert heldout.Losses(nats, size).score(np.zeros(4000, bool)) is None


def test_scores_are_given_without_near_duplicates(tmp_path):
    train = [random_document(100) for _ in range(4)]
    held = [random_document(100), list(train[1]), random_document(100), random_document(5)]
    write_documents(tmp_path / "held", "val", held), write_documents(tmp_path / "other", "train", train)
    docs, found, _ = heldout.overlap(tmp_path / "held", [tmp_path / "other"])
    losses = heldout.Losses(np.array([70.0, 10.0, 72.0, 8.0]), np.array([100, 100, 100, 10]))
    told = heldout.without_duplicates(losses, found[0])
    assert (
        told["without"]["50%"]["bpb"] == pytest.approx(150 / 210 / np.log(2))
        and told["without"]["50%"]["documents"] == 3
    )
    assert (
        told["only"]["100%"]["bpb"] == pytest.approx(0.1 / np.log(2)) and told["only"]["100%"]["half_interval"] is None
    )


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """An original set, and a second slice by its tokenizer: 40 new documents and ten of the original's training."""
    root = tmp_path_factory.mktemp("slices")
    docs, new = contest_writer.sample_documents(240, 3), contest_writer.sample_documents(40, 77)
    said = contest_writer.write_plain(root / "original", docs, 600, val_docs=30)
    sp = spm.SentencePieceProcessor(model_file=str(said["tokenizer"]))
    write_documents(root / "second", "val", [[1, *sp.encode(text)] for text in [*new[:20], *docs[100:110], *new[20:]]])
    return root, said


FAKE = """
import json, os, pathlib
import numpy as np
env, out = os.environ, pathlib.Path(os.environ["ARTIFACT_DIR"])
assert env["MODE"] == "eval" and env["VAL_DOCS"] == "0" and pathlib.Path(env["ARTIFACT"]).read_bytes() == b"model"
assert all(pathlib.Path(env[k]).is_absolute() for k in ("ARTIFACT", "ARTIFACT_DIR", "DATA_PATH", "TOKENIZER_PATH"))
if env.get("BROKEN"):
    raise SystemExit("no such knob")
tokens = np.fromfile(pathlib.Path(env["DATA_PATH"]) / "fineweb_val_000000.bin", "<u2")[512:]
size = np.diff(np.append(np.flatnonzero(tokens == 1), len(tokens)))
nats = size * np.where((np.arange(len(size)) >= 20) & (np.arange(len(size)) < 30), 1.0, 2.0)
np.savez(out / (env["RUN_ID"] + ".full.docs.npz"), nats=nats, tokens=size, bytes=size)
bpb = float(nats.sum() / size.sum() / np.log(2))
events = [dict(event="validation", documents=len(size), tokens=int(size.sum()), bytes=int(size.sum())),
          dict(event="score", name="full", val_loss=1.0, val_bpb=bpb, seconds=1.0, verdict="legal")]
(out / (env["RUN_ID"] + ".jsonl")).write_text("".join(json.dumps({"t": 0.0, **e}) + chr(10) for e in events))
"""


@pytest.fixture
def shipped(tmp_path):
    """A folder with an artifact and the program that it was shipped with."""
    (tmp_path / "ship").mkdir()
    (tmp_path / "ship/run.artifact").write_bytes(b"model")
    (tmp_path / "ship/train_gpt.py").write_text(FAKE)
    return tmp_path / "ship"


@pytest.mark.parametrize("name", ["", "run.artifact"])
def test_the_shipped_program_scores_the_second_slice(slices, shipped, tmp_path, capsys, name):
    root, said = slices
    args = [
        str(shipped / name),
        "--data",
        str(root / "second"),
        "--against",
        str(root / "original"),
        "--tokenizer",
        str(said["tokenizer"]),
    ]
    assert heldout.main([*args, "--json", "--out", str(tmp_path / "kept")]) == 0
    told = json.loads(capsys.readouterr().out)
    score = told["scores"]["full"]
    assert (
        told["documents"] == 50
        and [w["document"] for w in told["worst"]]
        and {w["document"] for w in told["worst"]} == set(range(20, 30))
    )
    assert score["without"]["50%"]["bpb"] == pytest.approx(2 / np.log(2)) and score["only"]["50%"][
        "bpb"
    ] == pytest.approx(1 / np.log(2))
    assert score["without"]["50%"]["documents"] == 40 and score["bpb"] == pytest.approx(score["all"]["bpb"])
    again = ["--run", str(tmp_path / "kept/run.heldout.jsonl"), *args[1:]]
    assert heldout.main([*again, "--json"]) == 0 and json.loads(capsys.readouterr().out)["scores"] == told["scores"]
    assert heldout.main(again) == 0
    out = capsys.readouterr().out
    assert "| all of them |" in out and "without the documents from 50% on: 2.885390" in out and "10 documents" in out
    other = ["--run", str(tmp_path / "kept/run.heldout.jsonl"), "--data", str(root / "original")]
    assert heldout.main(other) == 2 and "it is a run on other data" in capsys.readouterr().err


def test_check_asks_for_a_second_score(slices, shipped, capsys, monkeypatch):
    """One command checks a folder and scores its artifact on text that nobody could have fitted."""
    import check

    root, _ = slices
    monkeypatch.setattr(check, "check", lambda folder: [])  # a folder of two files breaks most rules, which is not the point
    told = []
    monkeypatch.setattr(heldout, "main", lambda args: told.append(args) or 0)
    assert check.main([str(shipped), "--heldout", str(root / "second"), "--against", str(root / "original")]) == 0
    assert told == [[str(shipped), "--data", str(root / "second"), "--against", str(root / "original")]]
    assert "on held-out text" in capsys.readouterr().out
    monkeypatch.setattr(heldout, "main", lambda args: 2)
    assert check.main([str(shipped), "--heldout", str(root / "second")]) == 2, "no score is no good end"


def test_an_evaluation_without_a_score_shows_the_end_of_its_output(slices, shipped, monkeypatch, capsys):
    monkeypatch.setenv("BROKEN", "1")
    root, said = slices
    assert heldout.main([str(shipped), "--data", str(root / "second"), "--tokenizer", str(said["tokenizer"])]) == 2
    assert "gave no score (exit status 1):\nno such knob" in capsys.readouterr().err


def test_which_artifact_and_program_are_meant(shipped, tmp_path):
    artifact = shipped / "run.artifact"
    assert heldout.program_of(artifact, shipped) == shipped / "train_gpt.py"
    (shipped / "train_gpt.py").unlink()
    assert heldout.program_of(artifact, shipped) == ROOT / "train_gpt.py"
    (shipped / "run.packed.py").write_text("")
    assert heldout.program_of(artifact, shipped) == shipped / "run.packed.py"
    (shipped / "two.artifact").write_bytes(b"")
    with pytest.raises(heldout.HeldoutError, match="holds run.artifact, two.artifact: name one"):
        heldout.find_artifact(shipped)
    with pytest.raises(heldout.HeldoutError, match="is missing"):
        heldout.find_artifact(tmp_path / "none")


TINY = dict(
    PRESET="smoke",
    ITERATIONS=2,
    TTT_ENABLED=0,
    WARMUP_STEPS=0,
    CHECKPOINT_SECONDS=0,
    MODEL_DIM=64,
    NUM_LOOPS=0,
    DOC_LOSSES=1,
    GPTQ_CALIBRATION_BATCHES=1,
    SLIDING_WINDOW_ENABLED=0,
    QUANTIZER="rtn",
    STEP_RULE="sdclip",
    PARALLEL_RESIDUAL="none",
)


def test_a_real_artifact_is_scored_on_the_second_slice(slices, tmp_path):
    """The whole way, with the checkout's own program: two steps of training, then the report beside the first score."""
    root, said = slices
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    knobs = {k: str(v) for k, v in TINY.items()} | said["env"] | {"RUN_ID": "t", "ARTIFACT_DIR": str(tmp_path / "logs")}
    done = subprocess.run(
        [sys.executable, ROOT / "train_gpt.py"], env=clean | knobs, text=True, capture_output=True, cwd=tmp_path
    )
    assert (tmp_path / "logs/t.artifact").is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    args = [
        "logs/t.artifact",
        "--data",
        root / "second",
        "--against",
        root / "original",
        "--tokenizer",
        said["tokenizer"],
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "records/heldout.py", *args], env=clean, text=True, capture_output=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)["scores"]["full"]
    assert (
        score["all"]["documents"] == 50
        and score["without"]["50%"]["documents"] == 40
        and score["original"]["documents"] == 30
    )
    assert score["all"]["bpb"] == pytest.approx(score["bpb"], rel=1e-6) and score["original bpb"] == pytest.approx(
        score["original"]["bpb"], rel=1e-6
    )
    assert runs.load(tmp_path / "logs/t.jsonl").scores["full"].bpb == score["original bpb"]
