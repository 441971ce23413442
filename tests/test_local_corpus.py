"""The corpus built from the standard library: format, tokenizer, splits, determinism, crash safety, errors."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "local_corpus.py"
SMALL = {"vocab_size": 512, "max_bytes": 1_000_000}  # a second a build; the format does not depend on the size


def load_module():
    """`data/` is no package, so the script is loaded by its path."""
    spec = importlib.util.spec_from_file_location("local_corpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["local_corpus"] = module
    spec.loader.exec_module(module)
    return module


corpus = load_module()


def quiet(_: str) -> None:
    """A log that nobody reads."""


def small_build(data_dir: Path, **overrides) -> dict:
    """A corpus of 1 MB with 512 pieces."""
    return corpus.build(data_dir, log=quiet, **{**SMALL, **overrides})


def read_shard(path: Path) -> np.ndarray:
    """Tokens of a shard, with the header checked."""
    header = np.fromfile(path, dtype="<i4", count=256)
    assert header[:2].tolist() == [20240520, 1] and not header[3:].any()
    assert path.stat().st_size == 1024 + 2 * header[2]
    return np.fromfile(path, dtype="<u2", offset=1024)


def documents_of(tokens: np.ndarray) -> list[np.ndarray]:
    """Cuts at BOS; BOS stays at the head of each document."""
    return np.split(tokens, np.flatnonzero(tokens == corpus.BOS_ID)[1:])


def run_python(code: str, *args: object) -> subprocess.Popen:
    """Another interpreter with the script's directory on its path."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)})


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, dict]:
    """The corpus at its default size."""
    root = tmp_path_factory.mktemp("full")
    return root, corpus.build(root, log=quiet)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, dict]:
    """The small corpus; tests must not change it."""
    root = tmp_path_factory.mktemp("small")
    return root, small_build(root)


@pytest.fixture(scope="module")
def tokenizer(full) -> spm.SentencePieceProcessor:
    """The tokenizer of the full corpus, read from its file."""
    return spm.SentencePieceProcessor(model_file=str(full[0] / "tokenizers" / "local_1024_bpe.model"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_shard_format(full, split):
    root, manifest = full
    entry = manifest[split]
    tokens = read_shard(root / "datasets" / "local_sp1024" / f"fineweb_{split}_000000.bin")
    assert tokens[0] == corpus.BOS_ID and tokens.max() < 1024
    assert len(tokens) == entry["tokens"] and int((tokens == corpus.BOS_ID).sum()) == entry["documents"]
    assert not np.isin(tokens, [0, 2, 3]).any()  # no padding, no EOS, and byte fallback leaves nothing unknown


def test_manifest_describes_the_files(full):
    root, manifest = full
    assert json.loads((root / "datasets/local_sp1024/manifest.json").read_text()) == manifest
    for part in ("train", "val", "tokenizer"):
        data = (root / manifest[part]["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (manifest[part]["file_bytes"], manifest[part]["sha256"])
    assert str(root) not in json.dumps(manifest)  # a corpus can be moved


def test_sizes_and_length_distribution(full):
    train, val = full[1]["train"], full[1]["val"]
    assert 6_000_000 < train["source_bytes"] <= corpus.MAX_TRAIN_BYTES
    assert 300_000 < val["source_bytes"] <= corpus.MAX_VAL_BYTES and 100_000 < val["tokens"] < 160_000
    assert 300 <= train["document_tokens"]["median"] <= 600 and train["document_tokens"]["max"] > 10_000
    lengths = [len(ids) for ids in documents_of(read_shard(full[0] / train["path"]))]
    assert np.mean(np.array(lengths) > 2000) > 0.05


def test_tokenizer_settings(tokenizer):
    ids = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id(), tokenizer.vocab_size())
    assert ids == (0, 1, 2, 3, 1024)
    assert not tokenizer.encode("word", out_type=str)[0].startswith("▁")  # no dummy prefix
    assert tokenizer.encode("2024", out_type=str) == list("2024")  # digits apart
    assert tokenizer.decode(tokenizer.encode("snowman ☃ 漢")) == "snowman ☃ 漢"  # bytes for what it never saw
    assert tokenizer.decode(tokenizer.encode("ﬁne")) == "fine"  # NFKC


def test_round_trip_against_normalised_text(full, tokenizer):
    root, manifest = full
    source = Path(corpus.sysconfig.get_paths()["stdlib"])
    documents = corpus.collect(source, corpus.MAX_TRAIN_BYTES + corpus.MAX_VAL_BYTES)
    _, val = corpus.split_train_val(documents, corpus.MAX_TRAIN_BYTES, corpus.MAX_VAL_BYTES)
    stored = documents_of(read_shard(root / manifest["val"]["path"]))
    assert len(stored) == len(val)
    for ids, document in list(zip(stored, val))[:20]:
        assert tokenizer.decode(ids.tolist()) == tokenizer.normalize(document.text).replace("▁", " ")


@pytest.mark.parametrize("split", ["train", "val"])
def test_bytes_agree_with_the_contest_byte_table(full, tokenizer, split):
    """The contest counts by table: 1 for a byte piece, UTF-8 length without ▁, and 1 for ▁ after a real token."""
    base, space = np.zeros(1024, dtype=int), np.zeros(1024, dtype=int)
    for i in range(4, 1024):
        piece = tokenizer.id_to_piece(i)
        base[i] = 1 if tokenizer.is_byte(i) else len(piece.removeprefix("▁").encode("utf-8"))
        space[i] = piece.startswith("▁")
    tokens = read_shard(full[0] / full[1][split]["path"])
    after_text = np.r_[False, tokens[:-1] != corpus.BOS_ID]
    assert int((base[tokens] + space[tokens] * after_text).sum()) == full[1][split]["bytes"]


def test_train_and_val_are_disjoint(full):
    train, val = (
        {hashlib.sha256(ids.tobytes()).digest() for ids in documents_of(read_shard(full[0] / full[1][split]["path"]))}
        for split in ("train", "val")
    )
    assert not train & val
    assert (len(train), len(val)) == (full[1]["train"]["documents"], full[1]["val"]["documents"])  # no duplicates


def test_overlap_is_refused():
    one, same_text = corpus.Document("a.py", "def f():\n    pass\n"), corpus.Document("b.py", "def f(): pass")
    with pytest.raises(corpus.CorpusError, match="1 documents"):
        corpus.check_disjoint([one], [same_text])
    with pytest.raises(corpus.CorpusError, match="1 modules"):
        corpus.check_disjoint([one], [corpus.Document("a.py", "x = 1")])


def test_near_copies_leave_validation():
    words = [f"word{i}" for i in range(100)]
    train = [corpus.Document("a.py", " ".join(words))]
    copy = corpus.Document("b.py", " ".join([*words[:90], "other", "end"]))
    own = corpus.Document("c.py", " ".join(reversed(words)))
    assert corpus.drop_near_copies([copy, own], train) == [own]


def test_split_source_keeps_all_code_and_moves_long_docstrings():
    doc = "Summary line.\n\n    " + "\n    ".join(f"Line {i} of a long explanation." for i in range(20))
    blocks = [f"# about f{i}\n@decorated\ndef f{i}():\n" + "    x = 1\n" * 400 for i in range(9)]
    text = f'class A:\n    """{doc}\n    """\n    y = 2\n\n' + "\n".join(blocks)
    docstring, *code = corpus.split_source(text, "pkg/mod.py")
    assert docstring.startswith("pkg.mod.A\n\nSummary line.") and "Line 19" in docstring
    assert "Line 3" not in "".join(code) and '    """Summary line."""\n    y = 2' in code[0]
    assert "".join(code).count("x = 1") == 3600 and len(code) > 3
    assert all(part.startswith("# about") for part in code[1:] if part.strip())  # comments go with their function


def test_same_input_gives_the_same_bytes(small, tmp_path):
    """In another process with another hash seed: neither set order nor paths may matter."""
    code = "import sys, local_corpus as c; c.build(sys.argv[1], 512, log=len, max_bytes=1_000_000)"
    assert run_python(code, tmp_path).wait() == 0
    again = json.loads((tmp_path / "datasets/local_sp512/manifest.json").read_text())
    assert again == small[1]


def test_finished_corpus_is_left_alone(tmp_path):
    first = small_build(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert small_build(tmp_path) == first
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert small_build(tmp_path, force=True) == first
    assert times != {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


def test_damaged_or_other_corpus_is_rebuilt(tmp_path):
    first = small_build(tmp_path)
    train = tmp_path / first["train"]["path"]
    train.write_bytes(train.read_bytes()[:-2])
    assert small_build(tmp_path) == first
    assert train.stat().st_size == first["train"]["file_bytes"]
    assert small_build(tmp_path, max_bytes=800_000)["train"]["tokens"] < first["train"]["tokens"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_build_leaves_no_manifest(tmp_path):
    """Killed between two renames while it replaces a finished corpus: no manifest, no partial file in any glob."""
    first = small_build(tmp_path)
    code = """
        import os, signal, sys, local_corpus as c
        replace, done = os.replace, []
        def dying(source, target):
            if done: os.kill(os.getpid(), signal.SIGKILL)
            done.append(replace(source, target))
        os.replace = dying
        c.build(sys.argv[1], 512, log=len, max_bytes=1_000_000, force=True)
    """
    assert run_python(code, tmp_path).wait() == -signal.SIGKILL
    shards = tmp_path / "datasets" / "local_sp512"
    assert not (shards / "manifest.json").exists()
    visible = sorted(path.name for path in shards.glob("fineweb_*"))
    assert visible == ["fineweb_train_000000.bin", "fineweb_val_000000.bin"]
    assert small_build(tmp_path) == first


def test_interrupted_build_removes_its_partial_files(tmp_path, monkeypatch):
    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small_build(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_two_builders_at_once(small, tmp_path):
    code = "import sys, local_corpus as c; c.build(sys.argv[1], 512, log=len, max_bytes=1_000_000, force=True)"
    builders = [run_python(code, tmp_path) for _ in range(2)]
    assert [builder.wait() for builder in builders] == [0, 0]
    assert small_build(tmp_path) == small[1]
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 4  # two shards, tokenizer, manifest, nothing else
    for part in ("train", "val", "tokenizer"):
        assert hashlib.sha256((tmp_path / small[1][part]["path"]).read_bytes()).hexdigest() == small[1][part]["sha256"]


def test_unwritable_directory(tmp_path):
    occupied = tmp_path / "data"
    occupied.write_text("a file where the directory ought to be")
    with pytest.raises(corpus.CorpusError, match="cannot write to .*--data-dir"):
        small_build(occupied)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(corpus.CorpusError, match="cannot write to"):
        small_build(tmp_path)


def test_too_little_text(tmp_path):
    library = tmp_path / "python311.zip.unpacked"
    library.mkdir()
    (library / "one.py").write_text("def f():\n    return 1\n" * 50)
    (library / "broken.py").write_text("def f(:\n" * 50)
    with pytest.raises(corpus.CorpusError, match="too little text: .*not as a zip"):
        corpus.build(tmp_path / "data", log=quiet, source_dir=library)
    assert not list((tmp_path / "data").rglob("*.bin"))


@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_vocabulary_out_of_range(tmp_path, vocab_size):
    with pytest.raises(ValueError, match="300 to 65536"):
        small_build(tmp_path, vocab_size=vocab_size)


def test_command_line(tmp_path):
    command = [sys.executable, str(SCRIPT), "--data-dir", str(tmp_path), "--vocab-size", "100"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "local_corpus: error: vocab_size=100" in result.stderr
