"""Documents to shards: exact tokens, exact bytes, the same file whatever the workers or kills, and nothing on both
sides.
"""

import bz2
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import contest_writer
import pytest
import sentencepiece as spm
from conftest import ROOT, config, trainer, write_shard
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / "data"))
import prepare
import shards
import sources
import transforms
import vocabulary

WORDS = (
    "the of and a to in is you that it he was for on are as with his they I at be this have from or one had by word "
    "Paris NATO McDonald"
).split()
QUIET = dict(log=lambda _: None)


def make_texts(count: int, seed: int = 0) -> list[str]:
    """English-looking documents with capitals, digits and a little of everything else."""
    rng = random.Random(seed)
    odd = ["U.S.A.", "1984,", "naïve", "Ünïcode", "北京", "(see", "it's", "\n", "ΟΔΟΣ", "👍"]
    lengths = (rng.randint(3, 80) for _ in range(count))
    return [
        f"The {' '.join(rng.choice(WORDS if rng.random() < 0.9 else odd) for _ in range(n))} {i}."
        for i, n in enumerate(lengths)
    ]


TEXTS = make_texts(400)
MODELS = {
    name: vocabulary.train(TEXTS, 400, transforms.REGISTRY[name])
    for name in ("none", "caseops", "casefold", "caselead")
}
MODELS["bytes"] = vocabulary.byte_model()
CODERS = {kind: vocabulary.Coder(MODELS[kind], kind if kind in transforms.REGISTRY else "none") for kind in MODELS}
CODERS["pairs"] = vocabulary.Coder(MODELS["caseops"], "caseops", pairs=True)
ODD_LETTERS = "aAbBßẞéÉΣσςǅİıK\u0301\u0331ﬁﬂ㎒ 's.1_-\n\u2581\u00a0"
CASED = st.text(st.sampled_from(ODD_LETTERS + "".join(transforms.OPERATORS.values())))
ANY = st.one_of(
    st.text(), CASED, st.lists(st.sampled_from([*WORDS, "U.S.A.", "ΟΔΟΣ", "x" * 70]), max_size=12).map(" ".join)
)


def jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def job(**more) -> prepare.Job:
    return prepare.Job(
        **{"name": "toy", "vocab_size": 400, "val_docs": 50, "shard_tokens": 3000, "tokenizer_bytes": 20_000, **more}
    )


def build(
    folder: Path,
    source,
    workers: int = 1,
    force: bool = False,
    tokenizer: Path | None = None,
    log=lambda _: None,
    **more,
) -> dict:
    """A data set of a file, files, or a whole source."""
    if not isinstance(source, sources.Source):
        source = sources.Source(
            [source] if isinstance(source, Path) else source, more.get("text_key", "text"), more.get("separator", "")
        )
    return prepare.prepare(source, job(**more), folder, tokenizer, workers, force, log)


def read_split(folder: Path, kind: str) -> np.ndarray:
    """All tokens of a split, or all entries of its sidecars (`val_bytes`)."""
    return np.concatenate([shards.read_shard(path) for path in shards.split_paths(folder, kind)])


def texts_of(folder: Path, split: str) -> list[str]:
    """Documents of a split of the data set in `folder`, transform undone, by SentencePiece's own decoder."""
    transform = json.loads((folder / "datasets/toy/manifest.json").read_text())["transform"]
    coder = vocabulary.Coder(
        (folder / "tokenizers/toy.model").read_bytes(), transform["name"], bool(transform["pairs"])
    )
    return [coder.decode(tokens) for tokens in shards.documents(shards.split_paths(folder / "datasets/toy", split))]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a data set; two equal data sets have equal contents."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def units_of_2k(monkeypatch):
    """Units so small that a toy corpus has dozens."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 2000)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[Path, dict]:
    """A data set of 400 documents in several shards, with its source beside it; tests must not change it."""
    folder = tmp_path_factory.mktemp("toy")
    return folder, build(folder / "data", jsonl(folder / "docs.jsonl", TEXTS))


# ----------------------------------------------------------------------------------------------------------------------
# Transforms
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["caseops", "caselead"])
@given(st.one_of(ANY, st.text(st.characters())))
def test_case_operators_give_any_text_back(name, text):
    transform = transforms.REGISTRY[name]
    encoded = transform.encode(text)
    assert transform.decode(encoded) == text == transform.decode(transform.keep(text))
    assert not any(c in transforms.SMALL for c in encoded), "a capital was left"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The NATO iPhone", "{TITLE}the {UPPER}nato i{CAP}phone"),
        ("A", "{TITLE}a"),
        ("McD", "{CAP}mc{CAP}d"),
        ("aBC", "a{CAP}b{CAP}c"),
        ("ΟΔΟΣ ῌ ǅ", "{UPPER}οδοσ ῌ ǅ"),
        ("\ue001x\ue004", "{ESC}\ue001x{ESC}\ue004"),
        ("U.S.", "{TITLE}u.{TITLE}s."),
        ("İstanbul", "İstanbul"),
    ],
)
def test_caseops_operators(text, expected):
    assert transforms.caseops_encode(text) == expected.format(**transforms.OPERATORS)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("in The NATO iPhone", "in{TITLE} the{UPPER} nato i{CAP}phone"),
        ("He said. \n No", "{TITLE}he said.{TITLE} \n no"),
        ("a McD", "a{CAP} mc{CAP}d"),
        ("x \ue001 The", "x {ESC}\ue001{TITLE} the"),
        ('a "The', 'a "{TITLE}the'),
    ],
)
def test_operators_that_lead_stand_before_the_space(text, expected):
    assert transforms.caselead_encode(text) == expected.format(**transforms.OPERATORS)


def test_white_space_without_end_takes_no_time():
    text = " " * 1_000_000
    started = time.perf_counter()
    assert transforms.caselead_decode("\ue001" + transforms.caselead_encode(text + ".")) == text + "."
    assert time.perf_counter() - started < 5


def test_stray_operators_stand_for_nothing():
    assert transforms.caseops_decode("\ue001\ue001a \ue002 b\ue003") == "A  b"
    assert transforms.caselead_decode("\ue001\ue001a\ue003 .\ue003") == "A ."


@pytest.mark.parametrize("name", ["none", "caseops", "caselead"])
def test_transforms_of_standard_input(name):
    """The command line takes text there and back; what has no way back is no choice."""

    def through(text, *more, code=0):
        done = subprocess.run([sys.executable, transforms.__file__, *more], input=text.encode(), capture_output=True)
        assert done.returncode == code, done.stderr
        return done.stdout.decode()

    text = "In NATO's Été, iPhone\r\n\ue001 x"
    coded = through(text, name)
    assert coded == transforms.REGISTRY[name].encode(text) and (name == "none") == (coded == text)
    assert through(coded, name, "--decode") == text
    through(text, "casefold", code=2)


def test_case_pairs_are_the_same_under_every_python():
    """Letters that a newer Unicode pairs would change the shards of old text."""
    assert len(transforms.SMALL) == 632
    assert shards.sha256(repr(sorted(transforms.SMALL.items())).encode()).startswith("825b6b3b8b532b2e")


@given(st.lists(st.integers(0, 6)))
def test_aliases_are_undone(ids):
    aliases = transforms.Aliases({(1, 2): 10, (1, 3): 11, (2, 2): 12})
    short = aliases.encode(ids)
    assert aliases.decode(short) == ids and not any(pair in aliases.pairs for pair in zip(short, short[1:]))


def test_aliases_must_be_free_ids():
    with pytest.raises(ValueError, match="free id"):
        transforms.Aliases({(1, 2): 2})
    with pytest.raises(ValueError, match="occurs by itself"):
        transforms.Aliases({(1, 2): 9}).encode([1, 9])


# ----------------------------------------------------------------------------------------------------------------------
# Tokens and bytes
# ----------------------------------------------------------------------------------------------------------------------
@given(ANY)
def test_tokens_are_those_of_sentencepiece(text):
    coder = CODERS["none"]
    tokens = coder.encode(text)
    assert tokens.dtype == np.uint16 and tokens.tolist() == (
        [1, *coder.sp.encode(text)] if coder.sp.encode(text) else []
    )


@pytest.mark.parametrize("kind", ["none", "caseops", "pairs", "caselead", "bytes"])
@given(ANY)
def test_tokens_give_the_normalised_text_back_and_their_bytes_add_up(kind, text):
    coder = CODERS[kind]
    tokens = coder.encode(text)
    norm = text if kind == "bytes" else coder.sp.normalize(text)
    for _ in range(4):  # what is not stable after one normalisation is kept as it is after all of them
        again = norm if kind == "bytes" or kind == "none" else coder.sp.normalize(norm)
        if coder.decode(tokens) == norm.replace("\u2581", " "):
            break
        norm = again
    norm = norm if kind == "bytes" else norm.replace("\u2581", " ")
    assert coder.decode(tokens) == norm
    assert int(coder.table.sizes(tokens).sum()) == len(norm.encode())


@pytest.mark.parametrize("text", ["H\u0331ello", "T\u0308", "W\u030a", "Y\u030a", "J\u030c", "NATO T\u0308 A\u0331B"])
@pytest.mark.parametrize("by_runs", [True, False])
@pytest.mark.parametrize("kind", ["caseops", "caselead"])
def test_capitals_that_are_composed_only_when_small_stay_capitals(kind, by_runs, text):
    """A small t with two dots is one character, its capital is two: as small letters these would not come back."""
    coder = vocabulary.Coder(MODELS[kind], kind)
    coder.by_runs = by_runs  # as if some piece held letters and marks
    assert coder.decode(coder.encode(text)) == text


def test_what_a_second_normalisation_changes_is_tokenized_as_a_whole():
    """SentencePiece normalises once; U+0344 is the one character that comes out of that unfinished."""
    coder = CODERS["none"]
    assert coder.encode("word a\u0344b word").tolist() == [1, *coder.sp.encode("word a\u0344b word")]


def test_casefold_keeps_everything_but_capitals():
    coder = CODERS["casefold"]
    assert coder.decode(coder.encode("The NATO ΟΔΟΣ")) == "the nato οδος"


def test_pairs_save_tokens_and_nothing_else():
    plain, short = (np.concatenate([CODERS[kind].encode(text) for text in TEXTS]) for kind in ("caseops", "pairs"))
    assert len(short) < 0.95 * len(plain)
    assert CODERS["pairs"].aliases.decode(short) == plain.tolist()
    assert CODERS["pairs"].table.sizes(short).sum() == CODERS["caseops"].table.sizes(plain).sum()


@given(ANY)
def test_operators_that_lead_are_tokenized_with_what_stands_before_them(text):
    """Word by word as SentencePiece does it with the whole text, where normalisation lets the spelling be."""
    coder = CODERS["caselead"]
    norm = coder.sp.normalize(text).replace("\u2581", " ")
    spelled = coder.transform.encode(norm)
    if coder.sp.normalize(spelled).replace("\u2581", " ") == spelled and norm:
        assert coder.encode(text).tolist() == [1, *coder.sp.encode(spelled)]


def test_operators_that_lead_save_tokens_and_nothing_else():
    pairs, lead = (np.concatenate([CODERS[kind].encode(text) for text in TEXTS]) for kind in ("pairs", "caselead"))
    assert len(lead) < 0.98 * len(pairs)
    assert CODERS["pairs"].table.sizes(pairs).sum() == CODERS["caselead"].table.sizes(lead).sum()


@pytest.mark.parametrize("kind", ["caseops", "caselead"])
def test_operators_stand_for_no_bytes_and_literal_ones_for_three(kind):
    coder = CODERS[kind]
    text = "The \ue001 \ue004\ue004\ue002 NATO"
    tokens = coder.encode(text)
    sizes = dict.fromkeys(range(4), 0) | Counter()
    for token, size in zip(tokens.tolist(), coder.table.sizes(tokens).tolist()):
        if coder.pieces[token] in transforms.OPERATORS.values():
            sizes[size] += 1
    assert sizes[3] == 4 and sizes[0] == 6, "TITLE, UPPER and four escapes are free, four characters are text"
    assert coder.decode(tokens) == text


@pytest.mark.parametrize("kind", list(CODERS))
@given(ANY)
def test_raw_bytes_are_what_sentencepieces_decoder_writes(kind, text):
    coder = CODERS[kind]
    tokens = coder.encode(text)
    assert coder.raw(tokens).decode() == coder.spelled(tokens)


@given(st.lists(st.integers(0, 399).filter(lambda t: t != 3)))
def test_the_table_counts_the_raw_bytes_of_any_tokens(ids):
    """Broken UTF-8 and spaces behind control pieces, too."""
    tokens = np.array([1, *ids], np.uint16)
    assert len(CODERS["none"].raw(tokens)) == CODERS["none"].table.total(tokens)


@given(st.lists(ANY, min_size=1, max_size=4))
def test_the_sidecar_is_the_contests_table_on_untransformed_text(texts):
    """Two ways to the same denominator: the table of train_gpt.py, and the sizes that a sidecar holds."""
    tokens = np.concatenate([CODERS["none"].encode(text) for text in texts])
    if len(tokens) > 1:
        assert reference_tokenizer().count_bytes(tokens).tolist() == CODERS["none"].table.sizes(tokens)[1:].tolist()


@given(st.lists(st.integers(0, 399) | st.integers(0, 3), min_size=2))
def test_the_table_is_the_contests_on_any_tokens(ids):
    """Shards of others may hold what our coder never writes, such as a space behind BOS."""
    tokens = np.array(ids, np.uint16)
    assert reference_tokenizer().count_bytes(tokens).tolist() == CODERS["none"].table.sizes(tokens)[1:].tolist()
    assert CODERS["none"].table.total(tokens) == CODERS["none"].table.sizes(tokens).sum()


def reference_tokenizer(cache: dict = {}):
    """train_gpt.py's own tokenizer and byte table for the toy model."""
    if not cache:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "m.model").write_bytes(MODELS["none"])
            cache["it"] = trainer().Tokenizer(Path(folder) / "m.model", 400)
    return cache["it"]


def test_a_long_word_is_cut_and_loses_nothing():
    for kind in ("none", "caseops", "pairs", "caselead"):
        text = "Start " + "Ab" * vocabulary.WORD_CHARS + " end"
        assert CODERS[kind].decode(CODERS[kind].encode(text)) == text


@pytest.mark.parametrize("kind", list(CODERS))
@given(
    st.lists(st.sampled_from([*WORDS, "漢字" * 9, "x" * 70, "ΟΔΟΣ", "\n", "é", "U.S.A."]), max_size=60),
    st.integers(2, 60),
)
def test_a_long_text_has_the_same_tokens_slice_by_slice(kind, words, size):
    coder, text = CODERS[kind], " ".join(words)
    whole = coder.encode(text)
    saved, vocabulary.SLICE_CHARS = vocabulary.SLICE_CHARS, size
    try:
        sliced = coder.encode(text)
        assert coder.decode(sliced) == coder.decode(whole)
        if "漢" not in text:  # letters without spaces between them may fall into other pieces at a cut
            assert sliced.tolist() == whole.tolist()
        assert "".join(" " * lead + part for part, lead in vocabulary.slices(text)) == text
    finally:
        vocabulary.SLICE_CHARS = saved


def test_the_word_cache_does_not_change_tokens(monkeypatch):
    monkeypatch.setattr(vocabulary, "CACHED_WORDS", 3)
    coder = vocabulary.Coder(MODELS["none"])
    assert [coder.encode(t).tolist() for t in TEXTS[:50]] == [CODERS["none"].encode(t).tolist() for t in TEXTS[:50]]
    assert len(coder.later) <= 3


def train_kind(extra: list[str] = ["one of the word (of the)"] * 300, **more) -> bytes:
    """A model with other settings than the contest's, or of other texts beside ours."""
    model = io.BytesIO()
    settings = dict(
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    texts = vocabulary.sentences([*TEXTS, *extra])
    spm.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **{**settings, **more})
    return model.getvalue()


@pytest.mark.parametrize(
    "more",
    [
        dict(split_by_whitespace=False, vocab_size=600),
        dict(model_type="unigram"),
        dict(split_by_unicode_script=False, vocab_size=600),
    ],
)
def test_other_kinds_of_tokenizers_are_exact_too(more):
    """Pieces across spaces, unigram models, pieces of letters and signs: no short cut where none is sound."""
    coder = vocabulary.Coder(train_kind(**more))
    assert coder.by_words == ("split_by_unicode_script" in more) and not (coder.by_words and coder.by_runs)
    for text in TEXTS:
        assert coder.encode(text).tolist() == [1, *coder.sp.encode(text)]


def test_tokenizers_that_cannot_be_used_are_refused():
    for model, transform, pairs, message in [
        (MODELS["none"], "caseops", False, r"no piece for U\+E001; train one"),
        (MODELS["none"], "none", True, "pair aliases need"),
        (MODELS["caselead"], "caselead", True, "pair aliases need"),
        (
            train_kind(["a \ue001. \ue002 \ue003 \ue004 b"] * 3000),
            "caselead",
            False,
            "an operator may end a piece of signs",
        ),
        (train_kind(bos_id=2, eos_id=1), "none", False, "BOS must be 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            vocabulary.Coder(model, transform, pairs)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lone_space=False), r"no piece for a space by itself \(U\+2581\)"),
        (
            dict(treat_whitespace_as_suffix=True, add_dummy_prefix=True),
            r"a space behind every text \(treat_whitespace_as_suffix\).*add_dummy_prefix=False",
        ),
        (dict(add_dummy_prefix=True), r"a space in front of every text \(add_dummy_prefix\)"),
    ],
)
def test_a_tokenizer_whose_spaces_are_miscounted_is_refused_with_what_to_do(tmp_path, options, message):
    """Issue #897 and the trailing-space convention; as a given tokenizer, as that of a source of shards, and in the
    report.
    """
    import shard_report

    said = contest_writer.write_plain(tmp_path / "shards", contest_writer.sample_documents(80, 1), **options)
    source = jsonl(tmp_path / "docs.jsonl", TEXTS)
    with pytest.raises(
        prepare.PrepareError, match=message + r".*tokenizer.model\); without --tokenizer one is trained"
    ):
        build(tmp_path / "data", source, tokenizer=said["tokenizer"])
    with pytest.raises(sources.SourceError, match=f"tokenizer.model: .*{message}"):
        sources.open_source([tmp_path / "shards"], tokenizer=said["tokenizer"])
    if "front" in message:  # its bytes are counted rightly, it only cannot be used to make shards
        stats, _ = shard_report.report(tmp_path / "shards", said["tokenizer"])
        assert sum(stats["val"].bytes) == said["normalized_bytes"]
    else:
        with pytest.raises(ValueError, match=message):
            shard_report.report(tmp_path / "shards", said["tokenizer"])


def test_trailing_spaces_without_a_dummy_are_exact(tmp_path):
    said = contest_writer.write_plain(
        tmp_path / "shards", contest_writer.sample_documents(80, 1), treat_whitespace_as_suffix=True
    )
    manifest = build(
        tmp_path / "data",
        jsonl(tmp_path / "docs.jsonl", contest_writer.sample_documents(80, 1)),
        tokenizer=said["tokenizer"],
        val_docs=20,
    )
    assert manifest["val"]["bytes"] == said["normalized_bytes"] and manifest["val"]["tokens"] == said["tokens"]


def test_a_tokenizer_that_cannot_write_a_text_is_refused():
    coder = vocabulary.Coder(train_kind(byte_fallback=False))
    with pytest.raises(ValueError, match="cannot write all of 'the 漢"):
        coder.encode("the 漢 word")


def test_vocabulary_that_the_text_does_not_give_is_refused():
    with pytest.raises(ValueError, match="only .* pieces, 9000 asked"):
        vocabulary.train(["the cat sat"], 9000)


# ----------------------------------------------------------------------------------------------------------------------
# Shards
# ----------------------------------------------------------------------------------------------------------------------
def test_manifest_and_shards_agree_with_the_text(toy):
    folder, manifest = toy
    coder = vocabulary.Coder((folder / "data/tokenizers/toy.model").read_bytes())
    documents = {s: list(shards.documents(shards.split_paths(folder / "data/datasets/toy", s))) for s in prepare.SPLITS}
    normalised = [coder.sp.normalize(text).replace("\u2581", " ") for text in TEXTS]
    assert [coder.decode(d) for d in documents["val"] + documents["train"]] == normalised
    for split, first in (("val", 0), ("train", 50)):
        entry, texts = manifest[split], TEXTS[first : first + len(documents[split])]
        assert (entry["documents"], entry["tokens"]) == (len(texts), sum(map(len, documents[split])))
        assert entry["bytes"] == sum(len(coder.decode(d).encode()) for d in documents[split])
        assert entry["source_bytes"] == sum(len(t.encode()) for t in texts)
        assert [s["tokens"] for s in entry["shards"][:-1]] == [3000] * (len(entry["shards"]) - 1), (
            "all but the last are full"
        )
        assert sum(s["bytes"] for s in entry["shards"]) == entry["bytes"]
    assert len(manifest["train"]["shards"]) > 3 and str(folder) not in json.dumps(manifest)


def test_train_gpt_reads_what_was_written(toy):
    tg, (folder, manifest) = trainer(), toy
    train = (folder / "data/datasets/toy").glob("fineweb_train_*.bin")
    assert sum(len(tg.read_shard(path)) for path in train) == manifest["train"]["tokens"]
    cfg = dataclasses.replace(config(), vocab_size=400, data_path=str(folder / "data/datasets/toy"), val_docs=0)
    val = tg.ValidationSet(cfg, tg.Tokenizer(folder / "data/tokenizers/toy.model", 400))
    assert int(val.bytes.sum()) == manifest["val"]["bytes"] and len(val.starts) == 50


def test_train_gpt_counts_the_bytes_of_signs_that_an_operator_ends(tmp_path):
    """The table says 4 for a full stop with an operator behind it, the sidecar 1; nothing else may differ."""
    manifest = build(tmp_path, jsonl(tmp_path / "docs.jsonl", TEXTS), transform="caselead", shard_tokens=9000)
    cfg = config(DATA_PATH=tmp_path / "datasets/toy", VOCAB_SIZE=400, VAL_DOCS=0)
    tokenizer = trainer().Tokenizer(tmp_path / "tokenizers/toy.model", 400)
    docs = trainer().ValidationSet(cfg, tokenizer)
    merged = [i for i in range(400) if tokenizer.sp.id_to_piece(i) == "." + transforms.TITLE]
    assert merged and (docs.tokens == merged[0]).sum() > 9 and set(docs.bytes[docs.tokens[1:] == merged[0]]) == {1}
    assert (
        docs.bytes.sum()
        == manifest["val"]["bytes"]
        == sum(len(CODERS["none"].sp.normalize(t).replace("\u2581", " ").encode()) for t in TEXTS[:50])
    )
    sizes = read_split(tmp_path / "datasets/toy", "val_bytes")
    write_shard(tmp_path / "datasets/toy/fineweb_val_bytes_000000.bin", np.where(docs.tokens == merged[0], 0, sizes))
    with pytest.raises(SystemExit, match="sidecar .*differs? "):
        trainer().ValidationSet(cfg, tokenizer)


def test_a_finished_data_set_is_left_alone_and_others_are_not_overwritten(toy, tmp_path):
    folder, manifest = toy
    shutil.copytree(folder, tmp_path / "copy")
    before = contents(tmp_path / "copy")
    source = tmp_path / "copy/docs.jsonl"
    assert build(tmp_path / "copy/data", source) == manifest and contents(tmp_path / "copy") == before
    with pytest.raises(prepare.PrepareError, match="other settings or another source; --force"):
        build(tmp_path / "copy/data", source, shard_tokens=4000)
    fewer = build(tmp_path / "copy/data", source, shard_tokens=10**6, force=True)
    assert len(fewer["train"]["shards"]) == 1 and prepare.verify(tmp_path / "copy/data/datasets/toy", **QUIET) == []


def test_a_short_shard_of_a_finished_data_set_is_named(toy, tmp_path):
    shutil.copytree(toy[0], tmp_path / "copy")
    path = tmp_path / "copy/data/datasets/toy/fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(prepare.PrepareError, match="fineweb_train_000001.bin has .* bytes, the manifest says"):
        build(tmp_path / "copy/data", tmp_path / "copy/docs.jsonl")


@pytest.fixture(scope="module")
def with_sidecar(tmp_path_factory) -> Path:
    """A caseops data set in few small shards; tests must leave it as it was."""
    folder = tmp_path_factory.mktemp("sidecar")
    source = jsonl(folder / "docs.jsonl", TEXTS[:60])
    build(folder, source, transform="caseops", pairs=True, val_docs=10, shard_tokens=1000, vocab_size=330)
    return folder / "datasets/toy"


@given(st.data())
def test_any_shard_truncated_or_altered_at_any_byte_is_refused_with_its_name(with_sidecar, data):
    path = data.draw(st.sampled_from(sorted(with_sidecar.glob("*.bin"))))
    good = path.read_bytes()
    at, flip, cut = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(1, 255)), data.draw(st.booleans())
    path.write_bytes(good[:at] if cut else good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
    try:
        problems = prepare.verify(with_sidecar, **QUIET)
        assert problems and all(path.name in p for p in problems)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("fineweb_train_000000.bin", lambda p: p.unlink(), "fineweb_train_000000.bin: missing"),
        ("manifest.json", lambda p: p.unlink(), "manifest.json is missing"),
        ("manifest.json", lambda p: p.write_bytes(p.read_bytes()[:-9]), "manifest.json is damaged"),
        ("fineweb_train_000099.bin", lambda p: write_shard(p, [1, 5]), "fineweb_train_000099.bin: not in the manifest"),
        ("../../tokenizers/toy.model", lambda p: p.write_bytes(b"x" + p.read_bytes()[1:]), "toy.model: its sha256"),
    ],
)
def test_verify_names_what_is_wrong(with_sidecar, tmp_path, name, change, message):
    shutil.copytree(with_sidecar.parent.parent, tmp_path / "copy")
    folder = tmp_path / "copy/datasets/toy"
    assert prepare.verify(folder, **QUIET) == []
    change(folder / name)
    assert message in "\n".join(prepare.verify(folder, **QUIET))


def test_verify_proves_disjointness_from_the_bytes_alone(with_sidecar, tmp_path):
    """A leak with a manifest that swears otherwise."""
    shutil.copytree(with_sidecar.parent.parent, tmp_path / "copy")
    folder = tmp_path / "copy/datasets/toy"
    leak = list(shards.documents(shards.split_paths(folder, "val")))[-1]
    last = shards.split_paths(folder, "train")[-1]
    write_shard(last, np.concatenate([shards.read_shard(last), leak]))
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["train"]["shards"][-1]
    entry.update(shards.file_entry(last, folder), tokens=entry["tokens"] + len(leak), documents=entry["documents"] + 1)
    manifest["train"].update(
        tokens=manifest["train"]["tokens"] + len(leak), documents=manifest["train"]["documents"] + 1
    )
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert prepare.verify(folder, **QUIET) == [f"{folder}: 1 training documents are validation documents"]


def test_documents_on_both_sides_leave_training_and_are_counted(tmp_path):
    texts = TEXTS[:60] + [
        "  " + TEXTS[3].replace(" ", "\n"),
        TEXTS[7],
        *TEXTS[60:90],
        TEXTS[70],
    ]  # same tokens; train twice is no leak
    manifest = build(tmp_path, jsonl(tmp_path / "docs.jsonl", texts))
    assert manifest["disjoint"]["train_dropped"] == 2 and manifest["train"]["documents"] == 60 + 30 + 1 - 50
    assert prepare.verify(tmp_path / "datasets/toy", **QUIET) == []


def test_sidecars_match_their_shards_and_count_the_original_bytes(with_sidecar):
    manifest = json.loads((with_sidecar / "manifest.json").read_text())
    coder = vocabulary.Coder((with_sidecar.parent.parent / "tokenizers/toy.model").read_bytes(), "caseops", pairs=True)
    tokens, sizes = (read_split(with_sidecar, kind) for kind in ("val", "val_bytes"))
    assert len(tokens) == len(sizes) and not list(with_sidecar.glob("fineweb_train_bytes*"))
    starts = np.flatnonzero(tokens == 1)
    per_document = [int(part.sum()) for part in np.split(sizes, starts[1:])]
    assert per_document == [len(coder.sp.normalize(t).replace("\u2581", " ").encode()) for t in TEXTS[:10]]
    assert manifest["val"]["bytes"] == sum(per_document)


def test_bpb_from_sidecar_and_table_agree_where_both_apply(tmp_path):
    """On untransformed text, through train_gpt.py's own table."""
    build(tmp_path, jsonl(tmp_path / "docs.jsonl", TEXTS), sidecar=True)
    folder, tg = tmp_path / "datasets/toy", trainer()
    tokens, sizes = (read_split(folder, kind) for kind in ("val", "val_bytes"))
    table = tg.Tokenizer(tmp_path / "tokenizers/toy.model", 400).count_bytes(tokens)
    nats = np.random.default_rng(0).random(len(tokens) - 1)
    assert nats.sum() / np.log(2) / table.sum() == nats.sum() / np.log(2) / sizes[1:].astype(np.int64).sum()
    assert (table == sizes[1:]).all()


@pytest.mark.parametrize(
    "transform, lossy", [("none", False), ("casefold", True), ("caseops", False), ("caselead", False)]
)
def test_the_manifest_says_what_is_lossy(tmp_path, transform, lossy):
    manifest = build(tmp_path, jsonl(tmp_path / "docs.jsonl", TEXTS), transform=transform)
    assert manifest["transform"]["lossy"] is lossy and manifest["transform"]["name"] == transform
    sidecars = [e["sidecar"]["path"] for e in manifest["val"]["shards"] if "sidecar" in e]
    assert sidecars == [
        e["path"].replace("val_", "val_bytes_")
        for e in manifest["val"]["shards"]
        if transform.startswith("case") and not lossy
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The same bytes, whatever happens
# ----------------------------------------------------------------------------------------------------------------------
def test_the_number_of_workers_does_not_matter(toy, tmp_path, units_of_2k):
    folder, _ = toy
    for workers in (1, 3):
        build(tmp_path / str(workers), folder / "docs.jsonl", workers=workers)
        assert contents(tmp_path / str(workers)) == contents(folder / "data")


@pytest.mark.parametrize("more", [{}, dict(transform="caseops", pairs=True), dict(transform="caselead", val_docs=None)])
def test_interrupted_anywhere_and_started_again_gives_the_same_bytes(toy, tmp_path, units_of_2k, monkeypatch, more):
    """From documents, and from shards."""
    source = source_of(toy[0] / "data") if "val_docs" in more else jsonl(tmp_path / "docs.jsonl", TEXTS)
    build(tmp_path / "whole", source, **more)
    monkeypatch.setattr(prepare, "STATE_SECONDS", 0.0)
    add, plan = prepare.Build.add, random.Random(1)

    def tired(self, unit, coded):
        if plan.random() < 0.25:
            if plan.random() < 0.5:  # after the writing, before the state: what the state does not know is cut off
                add(self, unit, coded)
            raise KeyboardInterrupt
        add(self, unit, coded)

    monkeypatch.setattr(prepare.Build, "add", tired)
    for tries in itertools.count(1):
        try:
            build(tmp_path / "parts", source, **more)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "parts/datasets/toy").exists(), "nothing is visible before all of it is there"
    assert tries > 3 and contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_where_units_end_does_not_matter_when_it_goes_on(toy, tmp_path, monkeypatch):
    """Another version of Python may unpack a file in other portions."""
    monkeypatch.setattr(prepare, "STATE_SECONDS", 0.0)
    add = prepare.Build.add

    def stop(self, unit, coded):
        if unit.first > 200:
            raise KeyboardInterrupt
        add(self, unit, coded)

    with monkeypatch.context() as patch:
        patch.setattr(prepare.Build, "add", stop)
        patch.setattr(sources, "UNIT_BYTES", 2000)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, toy[0] / "docs.jsonl")
    monkeypatch.setattr(sources, "UNIT_BYTES", 3001)
    build(tmp_path, toy[0] / "docs.jsonl")
    assert contents(tmp_path) == contents(toy[0] / "data")


RUN = """
    import sys, time, sources, prepare
    sources.UNIT_BYTES, prepare.STATE_SECONDS = 2000, 0.0
    add = prepare.Build.add
    prepare.Build.add = lambda *args: (time.sleep(0.02), add(*args))
    if __name__ == "__main__":
        sys.exit(prepare.main(sys.argv[1:]))
"""


def run_killed(folder: Path, source: Path, seconds: float, workers: int) -> int:
    """prepare.py in its own process, SIGKILLed after so many seconds; its exit status."""
    (folder / "run.py").write_text(textwrap.dedent(RUN))
    command = [
        sys.executable,
        str(folder / "run.py"),
        str(source),
        "--name",
        "toy",
        "--vocab-size",
        "400",
        "--val-docs",
        "50",
        "--shard-tokens",
        "3000",
        "--tokenizer-bytes",
        "20000",
        "--data-dir",
        str(folder / "out"),
        "--workers",
        str(workers),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "data"), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return run.wait(seconds)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGKILL)
        return run.wait()


def test_killed_at_random_moments_and_started_again_gives_the_same_bytes(toy, tmp_path):
    folder, rng, kills = toy[0], random.Random(3), 0
    for attempt in range(5):
        status = run_killed(tmp_path, folder / "docs.jsonl", rng.uniform(0.3, 0.9), workers=1 + attempt % 2)
        kills += status == -signal.SIGKILL
    assert kills, "no kill came in time"
    assert run_killed(tmp_path, folder / "docs.jsonl", 60, workers=1) == 0
    assert contents(tmp_path / "out") == contents(folder / "data")


def test_a_kill_while_files_are_moved_into_place_is_mended(toy, tmp_path, monkeypatch):
    replace, left = os.replace, [3]

    def dying(a, b):
        if "000" in Path(b).name:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, toy[0] / "docs.jsonl")
    assert not (tmp_path / "datasets/toy/manifest.json").exists()
    build(tmp_path, toy[0] / "docs.jsonl")
    assert contents(tmp_path) == contents(toy[0] / "data")


def test_a_second_process_is_refused(tmp_path, toy):
    places = prepare.Places.of(tmp_path, "toy")
    places.work.mkdir(parents=True)
    with prepare.only_one(places.work), pytest.raises(prepare.PrepareError, match="another process is at work"):
        build(tmp_path, toy[0] / "docs.jsonl")


def test_a_worker_that_dies_is_said(tmp_path, toy, monkeypatch):
    class Broken:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, *_):
            raise prepare.BrokenProcessPool

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(prepare, "ProcessPoolExecutor", Broken)
    with pytest.raises(prepare.PrepareError, match="a worker process died.*start this again"):
        build(tmp_path, toy[0] / "docs.jsonl", workers=2)


# ----------------------------------------------------------------------------------------------------------------------
# Sources
# ----------------------------------------------------------------------------------------------------------------------
def pack(path: Path) -> list[Path]:
    """The same file in every packing."""
    import zstandard

    data, packed = path.read_bytes(), []
    for suffix, press in {
        ".xz": lzma.compress,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".zst": zstandard.compress,
    }.items():
        packed.append(path.with_name(path.name + suffix))
        packed[-1].write_bytes(press(data))
    return packed


def test_every_format_gives_the_same_shards(tmp_path, units_of_2k):
    model = tmp_path / "m.model"
    model.write_bytes(MODELS["none"])
    files = [jsonl(tmp_path / "docs.jsonl", TEXTS), tmp_path / "docs.txt"]
    files[1].write_text("\n---\n".join(TEXTS))
    files += pack(files[0])
    try:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "id": range(len(TEXTS))}), tmp_path / "docs.parquet")
        files.append(tmp_path / "docs.parquet")
    except ImportError:
        pass
    results = []
    for i, file in enumerate(files):
        manifest = build(tmp_path / str(i), file, tokenizer=model, separator="---" if file.suffix == ".txt" else "")
        assert manifest["source"]["files"][0]["sha256"] == shards.sha256_file(file)
        results.append({k: v for k, v in contents(tmp_path / str(i)).items() if k.endswith(".bin")})
    assert len(results) >= 6 and all(result == results[0] for result in results)


def test_several_files_and_folders_are_read_in_order(tmp_path):
    (tmp_path / "in").mkdir()
    jsonl(tmp_path / "in/b.jsonl", TEXTS[100:])
    jsonl(tmp_path / "in/a.jsonl", TEXTS[:100])
    (tmp_path / "in/picture.png").write_bytes(b"no text")
    (tmp_path / "m.model").write_bytes(MODELS["none"])
    units = list(sources.Source([tmp_path / "in"]).units())
    assert [t for u in units for t in sources.texts(u, Counter())] == TEXTS
    manifest = build(tmp_path / "data", tmp_path / "in", tokenizer=tmp_path / "m.model")
    assert [(e["name"], e["sha256"]) for e in manifest["source"]["files"]] == [
        (n, shards.sha256_file(tmp_path / "in" / n)) for n in ("a.jsonl", "b.jsonl")
    ]


ODD = [
    {"text": ""},
    {"text": " \n "},
    {"text": None},
    {"id": 3},
    {"text": 5},
    {"text": "a\0b NUL"},
    {"text": "lone \ud800 surrogate"},
    {"text": "a pair \ud83d\udc4d"},
    "a bare string",
    {"text": "\u200b"},
]


def odd_file(path: Path) -> Path:
    lines = [json.dumps(record).encode() for record in ODD]
    lines += [b"", b'{"text": "bad \xff byte"}', b'{"text": "utf-8 surrogate \xed\xa0\x80"}']
    path.write_bytes(b"\n".join([*lines, *(json.dumps({"text": t}).encode() for t in TEXTS[:100])]))
    return path


@pytest.mark.parametrize("transform, pairs", [("none", False), ("caseops", True)])
def test_odd_documents_are_handled_and_counted(tmp_path, transform, pairs):
    manifest = build(tmp_path, odd_file(tmp_path / "odd.jsonl"), transform=transform, pairs=pairs, val_docs=20)
    assert manifest["mended"] == {
        "with NUL": 1,
        "with invalid UTF-8": 2,
        "with lone surrogates": 1,
        "without text, left out": 7,
    }
    coder = vocabulary.Coder((tmp_path / "tokenizers/toy.model").read_bytes(), transform, pairs)
    got = [coder.decode(d) for d in shards.documents(shards.split_paths(tmp_path / "datasets/toy", "val"))]
    assert got[:6] == [
        "a\0b NUL",
        "lone surrogate",
        "a pair 👍",
        "a bare string",
        "bad byte",
        "utf-8 surrogate",
    ]  # U+FFFD is a space
    assert manifest["val"]["documents"] == 20 - 7, (
        "documents are numbered as they stand in the source, those without text too"
    )


def test_a_long_line_is_one_document(tmp_path):
    text = "word " * 400_000 + "X" * 300_000
    manifest = build(tmp_path, jsonl(tmp_path / "docs.jsonl", [text, *TEXTS]), shard_tokens=10**6)
    assert manifest["val"]["document_tokens"]["max"] > 400_000 and manifest["val"]["source_bytes"] > 2_300_000


def test_a_text_file_is_a_document_and_a_huge_one_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TEXT_BYTES", 5000)
    monkeypatch.setattr(sources, "UNIT_BYTES", 2000)
    (tmp_path / "book.txt").write_text("\n".join(TEXTS))
    units = list(sources.Source([tmp_path / "book.txt"]).units())
    parts = [text for u in units for text in u.data]
    assert (
        b"".join(parts).decode() == "\n".join(TEXTS) and len(parts) > 3 and all(p.endswith(b"\n") for p in parts[:-1])
    )


def test_broken_sources_are_named(tmp_path):
    good = jsonl(tmp_path / "docs.jsonl", TEXTS)
    (tmp_path / "broken.jsonl").write_bytes(good.read_bytes()[:-9])
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(good.read_bytes())[:-40])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(good.read_bytes())[:-40])
    (tmp_path / "x.bin").write_bytes(b"1")
    for name, message in [
        ("broken.jsonl", "document 399, line 400: not JSON"),
        ("cut.jsonl.xz", "cut.jsonl.xz is damaged"),
        ("cut.jsonl.gz", "cut.jsonl.gz is damaged"),
        ("none.jsonl", "none.jsonl is missing"),
        ("x.bin", "x.bin: unknown kind"),
    ]:
        with pytest.raises(sources.SourceError, match=message):
            build(tmp_path / "data", tmp_path / name)
    assert not (tmp_path / "data/datasets/toy").exists()


def read_all(path: Path, text_key: str = "text") -> list[str]:
    """All texts of a source, as prepare.py reads them."""
    source = sources.Source([path], text_key)
    return [text for unit in source.units() for text in source.reader(unit, Counter())]


RECORDS = [{"id": i, "text": text} for i, text in enumerate(TEXTS[:100])]
FORMS = {
    "array": json.dumps(RECORDS),
    "array of strings": json.dumps(TEXTS[:100]),
    "pretty array": json.dumps(RECORDS, indent=2),
    "array over lines": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "pretty objects": "\n".join(json.dumps(r, indent=1) for r in RECORDS),
    "data": json.dumps({"version": 3, "meta": {"n": 100}, "data": RECORDS}),
    "pretty rows": json.dumps({"rows": RECORDS, "partial": False}, indent=4),
    "columns": json.dumps({"id": list(range(100)), "text": TEXTS[:100]}),
    "columns by row": json.dumps({"id": dict(enumerate(range(100))), "text": dict(enumerate(TEXTS[:100]))}),
    "lines with a byte order mark": "\ufeff" + "\n".join(map(json.dumps, RECORDS)),
    "lines of other records first": "\n".join(map(json.dumps, [{"items": [1, 2], "id": 5}, *RECORDS])),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_json_in_every_usual_form_is_read(tmp_path, monkeypatch, form, block):
    import json_values

    if block == 7 and form in (
        "data",
        "columns",
        "columns by row",
    ):  # one line: whether it is a table is told by its first block
        block = 50_000
    monkeypatch.setattr(json_values, "BLOCK", block)
    (tmp_path / "docs.json").write_text(FORMS[form], encoding="utf-8")
    want = ["", *TEXTS[:100]] if "other records" in form else TEXTS[:100]
    assert read_all(tmp_path / "docs.json") == want


def test_a_table_on_one_long_line_is_read_in_bounded_memory(tmp_path):
    (tmp_path / "rows.json").write_text(
        json.dumps(
            {
                "features": ["text"],
                "rows": [{"row_idx": i, "row": {"text": f"{i} " + "word " * 2000}} for i in range(300)],
            }
        )
    )
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"text": "word " * 400_000, "items": [1]}) + "\n" + json.dumps({"text": "b"}) + "\n"
    )
    texts = read_all(tmp_path / "rows.json", "row.text")
    assert len(texts) == 300 and texts[299].startswith("299 word")
    units = list(sources.Source([tmp_path / "rows.json"], "row.text").units())
    assert len(units) > 2 and max(unit.size for unit in units) < 2 * sources.UNIT_BYTES
    assert [len(text) for text in read_all(tmp_path / "long.jsonl")] == [2_000_000, 1]


def test_bytes_that_are_no_utf8_come_through_an_array(tmp_path):
    (tmp_path / "docs.json").write_bytes(
        b'[{"text": "bad \xff byte"}, {"text": "half \\ud800 pair"}, {"text": "\xe2\x82\xac"}]'
    )
    source, odd = sources.Source([tmp_path / "docs.json"]), Counter()
    assert [t for u in source.units() for t in source.reader(u, odd)] == [
        "bad \ufffd byte",
        "half \ufffd pair",
        "\u20ac",
    ]
    assert odd == {"with invalid UTF-8": 1, "with lone surrogates": 1}


@pytest.mark.parametrize(
    "name, content, key, message",
    [
        (
            "docs.jsonl",
            '{"id": 1, "content": "some words"}\n' * 200,
            "text",
            r"docs.jsonl: the key 'text' is in none of 200 records, whose keys are \['id', 'content'\]; "
            ".*--text-key content$",
        ),
        (
            "docs.jsonl",
            '{"text": "some words"}\n' * 9,
            "txet",
            r"the key 'txet' is in none of 9 records, whose keys are \['text'\]; .*--text-key text$",
        ),
        (
            "docs.json",
            json.dumps([{"my text": "a", "n": 2}] * 3),
            "text",
            r"keys are \['my text', 'n'\]; .*--text-key 'my text'$",
        ),
        (
            "docs.json",
            json.dumps({"data": [{"row": {"body": "a"}}]}),
            "text",
            r"keys are \['row.body'\]; .*--text-key row.body$",
        ),
        (
            "docs.jsonl",
            '{"text": ["a", "b"]}\n' * 2,
            "text",
            "the key 'text' holds no text of 2 records.*none of them holds text",
        ),
        ("docs.jsonl", '{"content": "x"}\n' * 200_000, "text", "in none of 1,000 records"),
        ("docs.json", '{"train": [{"text": "a"}]}', "text", r"keys are \['train'\]"),
        ("docs.json", '[{"text": "a"}, {"text": "b"', "text", r"docs.json: not JSON .* at character 16"),
        ("docs.json", '[{"text": "a"} {"text": "b"}]', "text", r"not JSON \(',' expected\) at character 15"),
    ],
)
@pytest.mark.parametrize("tokenizer", [False, True])
def test_a_key_that_no_record_has_is_answered_with_the_keys_that_are_there(
    tmp_path, name, content, key, message, tokenizer
):
    """Never SentencePiece's INTERNAL error, whether it is the trainer that finds no text or the coder."""
    (tmp_path / name).write_text(content)
    with pytest.raises(sources.SourceError, match=message):
        build(
            tmp_path / "data",
            tmp_path / name,
            text_key=key,
            val_docs=1,
            tokenizer=save(tmp_path) if tokenizer else None,
        )


@pytest.mark.parametrize(
    "key, message",
    [
        (
            "text",
            r"no column 'text', only \['id', 'content', 'words', 'kind'\]; text is in \['content', 'kind'\], "
            "see --text-key",
        ),
        ("id", r"column 'id' holds int64, not text, which is in \['content', 'kind'\]"),
        ("words", "column 'words' holds list<.*>, not text"),
    ],
)
def test_a_column_without_text_is_answered_with_those_that_have_some(tmp_path, key, message):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    texts = pyarrow.array(TEXTS[:9])
    columns = {"id": range(9), "content": texts, "words": [["a"]] * 9, "kind": texts.dictionary_encode()}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "docs.parquet")
    with pytest.raises(sources.SourceError, match=message):
        build(tmp_path / "data", tmp_path / "docs.parquet", text_key=key, val_docs=1)
    assert read_all(tmp_path / "docs.parquet", "content") == read_all(tmp_path / "docs.parquet", "kind") == TEXTS[:9]


@pytest.mark.parametrize(
    "content, more, message",
    [
        ("", {}, "there is no text to train it on"),
        ('{"text": " "}\n' * 99, {}, "there is no text to train it on"),
        (
            '{"text": "word"}\n' * 99,
            dict(val_docs=99),
            "no text to train it on behind the first 99 documents, which are validation .--val-docs",
        ),
        (
            "".join(json.dumps({"text": "".join(map(chr, range(0x4E00 + i, 0x4E40 + i)))}) + "\n" for i in range(300)),
            {},
            r"400 pieces are too few: the bytes and the usual characters of the text alone need \d\d\d",
        ),
        ('{"text": "a word"}\n' * 99, {}, "the text gives only 2.. pieces, 400 asked"),
    ],
)
def test_text_that_gives_no_tokenizer_is_said_in_words(tmp_path, content, more, message):
    (tmp_path / "docs.jsonl").write_text(content)
    with pytest.raises(prepare.PrepareError, match="tokenizer: ") as error:
        build(tmp_path / "data", tmp_path / "docs.jsonl", **{"val_docs": 1, **more})
    assert re.search(message, str(error.value)) and "INTERNAL" not in str(error.value) and ".cc" not in str(error.value)


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=8
    ),
    st.integers(1, 40),
    st.data(),
)
def test_units_hold_every_document_once_however_they_are_cut(texts, size, data):
    raw = b"".join(json.dumps(t).encode() + b"\n" for t in texts)
    saved, sources.UNIT_BYTES = sources.UNIT_BYTES, size
    try:
        pieces, first = [], 0
        for piece in sources.jsonl_units(raw[: size // 2], io.BytesIO(raw[size // 2 :])):
            pieces.append(sources.Unit(first, piece))
            first += pieces[-1].count
    finally:
        sources.UNIT_BYTES = saved
    borders = data.draw(st.lists(st.integers(0, len(texts) + 1), max_size=3))
    units = list(prepare.cut_units(pieces, borders))
    assert [t for u in units for t in sources.texts(u, Counter())] == texts
    assert [u.first for u in units] == list(itertools.accumulate([u.count for u in units], initial=0))[:-1]
    assert not any(u.first < border < u.first + u.count for u in units for border in borders)


# ----------------------------------------------------------------------------------------------------------------------
# Shards as a source
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """transform -> the folder of a data set of 120 documents, many of which cross the borders of small shards; not to
    be changed.
    """
    root = tmp_path_factory.mktemp("made")
    source = jsonl(root / "docs.jsonl", TEXTS[:120])
    for name in ("none", "casefold", "caseops", "caselead"):
        build(
            root / name,
            source,
            tokenizer=save(root, name),
            transform=name,
            pairs=name == "caseops",
            val_docs=30,
            shard_tokens=700,
        )
    return {name: root / name for name in ("none", "casefold", "caseops", "caselead")}


def source_of(folder: Path) -> sources.Shards:
    """The data set that was built in `folder`, as a source."""
    return sources.Shards(folder / "datasets/toy", folder / "tokenizers/toy.model")


def by_hand(folder: Path, val: list, train: list, model: bytes = MODELS["none"]) -> sources.Shards:
    """A source of shards without a manifest, as others make them, of texts or of tokens [n] without BOS."""
    sp = spm.SentencePieceProcessor(model_proto=model)
    for split, documents in (("val", val), ("train", train)):
        tokens = [[1, *(sp.encode(document) if isinstance(document, str) else document)] for document in documents]
        write_shard(folder / f"datasets/toy/fineweb_{split}_000000.bin", np.concatenate(tokens))
    (folder / "tokenizers").mkdir(exist_ok=True)
    (folder / "tokenizers/toy.model").write_bytes(model)
    return source_of(folder)


@pytest.mark.parametrize("new", [{}, dict(transform="caselead"), dict(transform="caseops", pairs=True)])
@pytest.mark.parametrize("old", ["none", "caseops", "caselead"])
def test_shards_of_shards_hold_the_same_documents_bytes_and_split(made, tmp_path, old, new):
    first = shards.split_paths(made[old] / "datasets/toy", "train")
    assert len(first) > 3 and any(shards.read_shard(path)[0] != 1 for path in first), "a document crosses a border"
    log = []
    manifest = build(tmp_path, source_of(made[old]), val_docs=None, vocab_size=330, log=log.append, **new)
    before = json.loads((made[old] / "datasets/toy/manifest.json").read_text())
    for split in prepare.SPLITS:
        assert texts_of(tmp_path, split) == texts_of(made[old], split) == texts_of(made["none"], split)
        assert [manifest[split][k] for k in ("documents", "bytes")] == [
            before[split][k] for k in ("documents", "bytes")
        ]
    assert manifest["denominator"]["bytes"] == manifest["val"]["bytes"] and manifest["settings"]["val_docs"] == 30
    assert f"prepare: val has the {manifest['val']['bytes']:,} bytes that the source's tokens stand for" in log
    assert prepare.verify(tmp_path / "datasets/toy", **QUIET) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_transform_is_undone_to_the_very_tokens_of_the_documents(made, tmp_path, units_of_2k, workers):
    """caseops -> none, by any number of workers, gives the shards that the documents themselves gave."""
    given = made["none"] / "tokenizers/toy.model"
    manifest = build(tmp_path, source_of(made["caseops"]), workers, tokenizer=given, val_docs=None, shard_tokens=700)
    new, old = (contents(folder / "datasets/toy") for folder in (tmp_path, made["none"]))
    assert {k: v for k, v in new.items() if k != "manifest.json"} == {
        k: v for k, v in old.items() if k != "manifest.json"
    }
    files = {e["name"]: (e["file_bytes"], e["sha256"]) for e in manifest["source"]["files"]}
    there = [*(made["caseops"] / "datasets/toy").iterdir(), made["caseops"] / "tokenizers/toy.model"]
    assert files == {path.name: (path.stat().st_size, shards.sha256_file(path)) for path in there}


@pytest.mark.parametrize("size", [1, 2000])
def test_units_of_shards_hold_every_document_once_and_those_of_one_split(made, monkeypatch, size):
    monkeypatch.setattr(sources, "UNIT_BYTES", size)
    source, told = source_of(made["caselead"]), []
    units = list(source.units(told.append))
    texts = [text for unit in units for text in source.reader(unit, Counter())]
    assert texts == [text for split in prepare.SPLITS for text in texts_of(made["none"], split)]
    assert [u.first for u in units] == list(itertools.accumulate([u.count for u in units], initial=0))[:-1]
    assert source.val_docs == 30 and not any(u.first < 30 < u.first + u.count for u in units)
    assert len(units) > 5 and sum(told) == 2 * sum(len(read_split(source.folder, split)) for split in prepare.SPLITS)


def test_documents_of_shards_on_both_sides_leave_training(tmp_path):
    """Other tokens of the same text are the same tokens once they are made anew."""
    letters = [CODERS["none"].pieces.index(c) for c in "The\u2581to\u2581be"]
    manifest = build(
        tmp_path / "new",
        by_hand(tmp_path, ["The to be", *TEXTS[:20]], [*TEXTS[20:60], TEXTS[3], letters]),
        val_docs=None,
    )
    assert (manifest["disjoint"]["train_dropped"], manifest["val"]["documents"], manifest["train"]["documents"]) == (
        2,
        21,
        40,
    )
    assert prepare.verify(tmp_path / "new/datasets/toy", **QUIET) == []


def test_invalid_utf8_in_shards_is_mended_counted_and_told(tmp_path):
    """Half a character is two bytes to the table, U+FFFD to a decoder, and white space to the tokenizer's
    normalisation.
    """
    the, half = CODERS["none"].sp.encode("The"), [CODERS["none"].pieces.index(f"<0x{byte}>") for byte in ("E2", "82")]
    source = by_hand(
        tmp_path, [*TEXTS[:40], [*the, *half], [*the, *half, *the], half, []], [*TEXTS[40:80], [*the, *the, *half]]
    )
    log = []
    manifest = build(tmp_path / "new", source, val_docs=None, transform="caselead", log=log.append)
    assert manifest["mended"] == {"with invalid UTF-8": 4, "without text, left out": 2}
    assert manifest["denominator"] == {
        "bytes": source.denominator(CODERS["none"]).bytes,
        "mended_documents": 3,
        "mended_bytes": 5 + 8 + 2,
        "mended_bytes_now": 3 + 7 + 0,
    }
    assert manifest["val"]["bytes"] == manifest["denominator"]["bytes"] - 15 + 10 and manifest["val"]["documents"] == 42
    assert texts_of(tmp_path / "new", "val")[40:] == ["The", "The The"]
    assert any(line.endswith("but for 3 documents with invalid UTF-8: 15 bytes there, 10 here") for line in log)


def test_another_denominator_stops_before_training_documents_are_done(tmp_path, units_of_2k):
    source = by_hand(tmp_path, ["two  spaces", *TEXTS[:20]], TEXTS[20:200], MODELS["bytes"])
    before = sum(len(text.encode()) for text in ["two  spaces", *TEXTS[:20]])
    now = sum(
        len(text.encode())
        for text in map(CODERS["none"].decode, map(CODERS["none"].encode, ["two  spaces", *TEXTS[:20]]))
    )
    with pytest.raises(
        prepare.PrepareError, match=f"val has {now:,} bytes, but the source's tokens stand for {before:,}"
    ):
        build(tmp_path / "new", source, val_docs=None, tokenizer=save(tmp_path))
    assert not list(tmp_path.glob("new/datasets/*/fineweb_train*"))
    assert build(tmp_path / "bytes", source, val_docs=None, vocab_size=260)["val"]["bytes"] == before


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda made, folder, model: (folder / "fineweb_val_000000.bin").unlink(), "fineweb_val_000000.bin: missing"),
        (
            lambda made, folder, model: [p.unlink() for p in folder.glob("fineweb_train*")],
            "no fineweb_train_.*both splits",
        ),
        (
            lambda made, folder, model: write_shard(folder / "fineweb_train_000000.bin", [7, 1, 8]),
            "train_000000.bin begins with token 7",
        ),
        (
            lambda made, folder, model: write_shard(folder / "fineweb_train_000001.bin", []),
            "train_000001.bin: no contest header",
        ),
        (
            lambda made, folder, model: write_shard(folder / "fineweb_val_000001.bin", [9, 400]),
            "toy.model is not.*token 400.*only 400 pieces",
        ),
        (
            lambda made, folder, model: model.write_bytes(MODELS["casefold"]),
            r"toy.model is not.*only \d+ of 30 val documents",
        ),
        (
            lambda made, folder, model: model.write_bytes(train_kind(bos_id=2, eos_id=1)),
            "toy.model: tokenizer: BOS must be 1",
        ),
        (lambda made, folder, model: model.write_bytes(b"no model"), "toy.model: "),
        (
            lambda made, folder, model: write_shard(folder / "fineweb_val_bytes_000000.bin", [0, 1]),
            "byte sidecars.*no manifest.*operators",
        ),
        (lambda made, folder, model: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (
            lambda made, folder, model: (folder / "manifest.json").write_text('{"transform": {"name": "rot13"}}'),
            "'rot13' is not known",
        ),
        (
            lambda made, folder, model: shutil.copy(made["casefold"] / "datasets/toy/manifest.json", folder),
            "'casefold' is lossy",
        ),
        (
            lambda made, folder, model: shutil.copy(made["caselead"] / "datasets/toy/manifest.json", folder),
            "manifest.json names .sha256",
        ),
    ],
)
def test_shards_that_cannot_be_read_are_refused_by_name(made, tmp_path, change, message):
    shutil.copytree(made["none"], tmp_path / "copy")
    (tmp_path / "copy/datasets/toy/manifest.json").unlink()
    change(made, tmp_path / "copy/datasets/toy", tmp_path / "copy/tokenizers/toy.model")
    with pytest.raises((sources.SourceError, shards.ShardError), match=message):
        source_of(tmp_path / "copy")


@pytest.mark.parametrize(
    "split, token, message",
    [
        ("val", 3, "document 20: token 3 stands for unknown text"),
        ("train", 400, "document 60: token 400, but the tokenizer has 400 pieces"),
    ],
)
def test_a_token_without_text_is_named_with_its_document(tmp_path, split, token, message):
    documents = {"val": TEXTS[:20], "train": TEXTS[20:60]}
    documents[split].append([9, token])
    with pytest.raises(sources.SourceError, match=message):
        build(tmp_path / "new", by_hand(tmp_path, **documents), val_docs=None, tokenizer=save(tmp_path))


def test_the_split_of_shards_is_theirs_and_they_are_not_written_over(made, tmp_path):
    shutil.copytree(made["none"], tmp_path / "copy")
    source = source_of(tmp_path / "copy")
    with pytest.raises(prepare.PrepareError, match="--val-docs 50: the source's validation shards hold 30 documents"):
        build(tmp_path, source, val_docs=50)
    before = contents(tmp_path / "copy")
    for name in ("toy", "other"):
        shutil.copy(tmp_path / "copy/tokenizers/toy.model", tmp_path / "copy/tokenizers/other.model")
        source = sources.Shards(source.folder, tmp_path / "copy/tokenizers/other.model")
        with pytest.raises(prepare.PrepareError, match="is a source and would be written over"):
            build(tmp_path / "copy", source, val_docs=None, name=name, force=True)
    assert contents(tmp_path / "copy").items() >= before.items()
    assert build(tmp_path, source, val_docs=30, tokenizer=save(tmp_path))["val"]["documents"] == 30


def test_the_command_line_takes_shards_with_their_tokenizer_only(made, tmp_path, capsys):
    folder, model = str(made["caseops"] / "datasets/toy"), str(made["caseops"] / "tokenizers/toy.model")
    docs = str(jsonl(tmp_path / "docs.jsonl", TEXTS))
    for args, message in [
        ([folder], "name the tokenizer that made them with --source-tokenizer"),
        ([folder, docs, "--source-tokenizer", model], "holds shards, and then it is the only source"),
        ([docs, "--source-tokenizer", model], "--source-tokenizer .*toy.model is for a folder of shards"),
        ([folder, "--source-tokenizer", "no.model"], "--source-tokenizer no.model is missing"),
    ]:
        with pytest.raises(SystemExit, match=message):
            prepare.main([*args, "--data-dir", str(tmp_path)])
    args = [folder, "--source-tokenizer", model, "--vocab-size", "260", "--data-dir", str(tmp_path), "--workers", "1"]
    assert prepare.main(args) == 0
    assert f"DATA_PATH={tmp_path / 'datasets/toy_byte260'}" in capsys.readouterr().out
    assert prepare.main(args) == 0 and "nothing to do" in capsys.readouterr().out
    assert prepare.main(["--verify", str(tmp_path / "datasets/toy_byte260")]) == 0


FOREIGN = {"version": "10B", "datasets": [{"name": "fineweb10B_sp1024", "stats": {"files_train": 1}}], "tokenizers": []}


@pytest.mark.parametrize(
    "manifest", [FOREIGN, {"tokenizer": "toy.model", "transform": "caseops", "train": [], "val": []}]
)
def test_the_manifest_of_another_tool_is_named(made, tmp_path, capsys, manifest):
    """The contest's own scripts write a manifest.json, too: it is neither taken for ours nor written over."""
    shutil.copytree(made["none"], tmp_path / "copy")
    folder, model = tmp_path / "copy/datasets/toy", tmp_path / "copy/tokenizers/toy.model"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    message = "manifest.json is not of data/prepare.py: it has the keys .*no description of .*tokenizer.*move it"
    assert re.search(message, "\n".join(prepare.verify(folder, **QUIET)))
    with pytest.raises(SystemExit, match=message):
        prepare.main(
            [
                str(jsonl(tmp_path / "docs.jsonl", TEXTS)),
                "--name",
                "toy",
                "--data-dir",
                str(tmp_path / "copy"),
                "--val-docs",
                "9",
            ]
        )
    if manifest is FOREIGN:
        assert build(tmp_path / "new", sources.open_source([folder], tokenizer=model), val_docs=None)["val"][
            "documents"
        ]
    else:
        with pytest.raises(sources.SourceError, match="transform, but no manifest of data/prepare.py"):
            sources.open_source([folder], tokenizer=model)
    assert json.loads((folder / "manifest.json").read_text()) == manifest


def test_caseops_shards_without_their_sidecar_are_refused(tmp_path):
    """Nothing in them says that a fifth of the tokens stands for no text (PR #2071, #2138)."""
    import shard_report

    docs = contest_writer.sample_documents(80, 1)
    said = contest_writer.write_caseops(tmp_path / "bare", docs, sidecar=False)
    message = r"bare: [\d,]+ validation tokens are case operators.*no byte sidecars"
    with pytest.raises(shards.ShardError, match=message):
        sources.open_source([tmp_path / "bare"], tokenizer=said["tokenizer"])
    with pytest.raises(shards.ShardError, match=message):
        shard_report.report(tmp_path / "bare", said["tokenizer"])
    said = contest_writer.write_caseops(tmp_path / "whole", docs)
    assert sum(shard_report.report(tmp_path / "whole", said["tokenizer"])[0]["val"].bytes) == said["bytes"]
    plain = contest_writer.write_plain(
        tmp_path / "plain", [d.lower() for d in docs], user_defined_symbols=["\ue000", "\ue001"]
    )
    assert shard_report.report(tmp_path / "plain", plain["tokenizer"])[0], "symbols that no token uses do no harm"


# ----------------------------------------------------------------------------------------------------------------------
# The border between validation and training
# ----------------------------------------------------------------------------------------------------------------------
def test_the_challenges_documents_are_split_as_the_challenge_splits_them(tmp_path):
    source = jsonl(tmp_path / "docs_selected.jsonl", TEXTS)
    with pytest.raises(
        prepare.PrepareError, match="--val-docs 50: these are the challenge's documents, whose first 50,000"
    ):
        build(tmp_path, source)
    jsonl(tmp_path / "renamed.jsonl", TEXTS)
    (tmp_path / "docs_selected.source_manifest.json").write_text("{}")
    with pytest.raises(prepare.PrepareError, match="first 50,000"):
        build(tmp_path, tmp_path / "renamed.jsonl")


def test_documents_that_are_not_the_published_ones_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHALLENGE_VAL_DOCS", 50)
    source = jsonl(tmp_path / "docs_selected.jsonl", TEXTS)
    said = tmp_path / "docs_selected.source_manifest.json"
    said.write_text(json.dumps({"num_docs": 400, "docs_sha256": "0" * 64}))
    with pytest.raises(
        prepare.PrepareError, match="is not what docs_selected.source_manifest.json beside it describes"
    ):
        build(tmp_path, source)
    said.write_text(json.dumps({"num_docs": 400, "docs_sha256": shards.sha256_file(source)}))
    assert build(tmp_path, source)["source"]["challenge"] is True


def test_too_few_documents_are_said(tmp_path):
    with pytest.raises(prepare.PrepareError, match="no train documents: the source has 400, the first --val-docs 400"):
        build(tmp_path, jsonl(tmp_path / "docs.jsonl", TEXTS), val_docs=400, tokenizer=save(tmp_path))
    with pytest.raises(prepare.PrepareError, match="tokenizer: "):
        build(tmp_path / "b", jsonl(tmp_path / "docs.jsonl", TEXTS), val_docs=400)


def save(folder: Path, kind: str = "none") -> Path:
    (folder / "given.model").write_bytes(MODELS[kind])
    return folder / "given.model"


def test_the_tokenizer_is_not_trained_on_validation_text(tmp_path):
    one = build(tmp_path / "a", jsonl(tmp_path / "docs.jsonl", TEXTS))
    other = build(tmp_path / "b", jsonl(tmp_path / "docs.jsonl", [*make_texts(50, seed=9), *TEXTS[50:]]))
    assert one["tokenizer"]["sha256"] == other["tokenizer"]["sha256"] and one["val"] != other["val"]


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------
def test_command_line(tmp_path, capsys):
    source = jsonl(tmp_path / "docs.jsonl", TEXTS)
    args = [str(source), "--vocab-size", "260", "--val-docs", "50", "--data-dir", str(tmp_path), "--workers", "1"]
    assert prepare.main(args) == 0
    out = capsys.readouterr().out
    assert (
        f"DATA_PATH={tmp_path / 'datasets/docs_byte260'}" in out
        and "VOCAB_SIZE=260" in out
        and "no document is in both splits" in out
    )
    tokens = np.concatenate(list(shards.documents(shards.split_paths(tmp_path / "datasets/docs_byte260", "val"))))
    assert len(tokens) == 50 + sum(len(t.encode()) for t in TEXTS[:50]), "byte260: a token a byte, nothing folded"
    assert prepare.main(["--verify", str(tmp_path / "datasets/docs_byte260")]) == 0
    (tmp_path / "datasets/docs_byte260/fineweb_val_000000.bin").write_bytes(b"")
    assert prepare.main(["--verify", str(tmp_path / "datasets/docs_byte260")]) == 1
    assert "fineweb_val_000000.bin: 0 bytes" in capsys.readouterr().out


def test_the_printed_knobs_can_be_pasted(tmp_path, capsys):
    folder = tmp_path / "o'brien's $HOME data"
    source = jsonl(tmp_path / "my docs.jsonl", TEXTS)
    assert (
        prepare.main(
            [str(source), "--vocab-size", "260", "--val-docs", "50", "--data-dir", str(folder), "--workers", "1"]
        )
        == 0
    )
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("prepare: use it with ")
    said = subprocess.run(["bash", "-c", f"{line} env"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {
        f"DATA_PATH={folder}/datasets/my docs_byte260",
        f"TOKENIZER_PATH={folder}/tokenizers/my docs_byte260.model",
        "VOCAB_SIZE=260",
    } <= set(said)


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "name the files to read"),
        (["x.jsonl", "--vocab-size", "100"], "260 to 65536"),
        (["x.jsonl"], "x.jsonl is missing"),
        (["x.jsonl", "--val-docs", "0"], "--val-docs must be"),
        (["x.jsonl", "--tokenizer", "no.model"], "no.model is missing"),
    ],
)
def test_wrong_commands_are_refused(args, message):
    with pytest.raises(SystemExit, match=message):
        prepare.main(args)


@pytest.mark.parametrize(
    "error, message", [(OSError(28, "No space left on device"), "No space"), (KeyboardInterrupt(), "stopped")]
)
def test_a_full_disk_or_a_stop_says_how_to_go_on(tmp_path, monkeypatch, error, message):
    def fail(*_):
        raise error

    source = jsonl(tmp_path / "docs.jsonl", TEXTS)
    args = [
        str(source),
        "--name",
        "toy",
        "--vocab-size",
        "260",
        "--val-docs",
        "50",
        "--data-dir",
        str(tmp_path),
        "--workers",
        "1",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(prepare.ShardWriter, "append", fail)
        with pytest.raises(SystemExit, match=f"{message}.*started again, (this|it) goes on where it was"):
            prepare.main(args)
    assert not (tmp_path / "datasets/toy").exists() and prepare.main(args) == 0


def test_time_stamps_and_paths_do_not_get_into_the_files(toy, tmp_path):
    shutil.copytree(toy[0], tmp_path / "moved")
    time.sleep(0.01)
    again = build(tmp_path / "data", tmp_path / "moved/docs.jsonl")
    assert again == toy[1]
