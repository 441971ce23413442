"""The independent writer does what the contest's format says: checked by hand-made cases, not by the readers that it is
there to test.
"""

import numpy as np
import pytest
import sentencepiece as spm
from contest_writer import (
    NEXT,
    TITLE,
    UPPER,
    caseops,
    pieces,
    sample_documents,
    sidecar_entries,
    write_caseops,
    write_plain,
)

DOCS = sample_documents(160, 3)


def numbers(path) -> np.ndarray:
    data = path.read_bytes()
    header = np.frombuffer(data[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, (len(data) - 1024) // 2] and not header[3:].any()
    return np.frombuffer(data[1024:], "<u2")


@pytest.fixture(scope="module")
def cased(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cased")
    return folder, write_caseops(folder, DOCS, val_shards=3)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The NATO iPhone", f"{TITLE}the {UPPER}nato i{NEXT}phone"),
        ("A McD", f"{TITLE}a {TITLE}mc{NEXT}d"),
        ("x\ue001", "x\ue004\ue001"),
        ("ÉCOLE", f"É{UPPER}cole"),
        ("", ""),
    ],
)
def test_caseops_spelling(text, expected):
    assert caseops(text) == expected


def test_sidecar_rule(cased):
    sp = spm.SentencePieceProcessor(model_file=str(cased[1]["tokenizer"]))

    def sizes(text):
        ids, surfaces = pieces(sp, text)
        assert ids == sp.encode(text)
        return sidecar_entries(surfaces)

    assert sizes("\U0001f47d") == [0, 0, 0, 4]
    assert sum(sizes("a\u00a0cat")) == 6 and sum(sizes("two  \t spaces")) == 13 and sum(sizes("\ufb03")) == 3
    assert sizes(caseops("A"))[:2] == [0, 1] and sum(sizes("x\ue004\ue001")) == 4


def test_caseops_shards(cased):
    folder, said = cased
    val = np.concatenate([numbers(folder / f"fineweb_val_{i:06d}.bin") for i in range(3)])
    sizes = np.concatenate([numbers(folder / f"fineweb_val_bytes_{i:06d}.bin") for i in range(3)])
    assert (
        len(val) == len(sizes) == said["tokens"]
        and (val == 1).sum() == said["docs"] == 40
        and not sizes[val == 1].any()
    )
    true = sum(len(text.encode()) for text in DOCS[:40])
    assert sizes.sum() == true == said["bytes"] == said["sidecar_bytes"] != said["normalized_bytes"]
    assert len(numbers(folder / "fineweb_train_000000.bin")) >= 60_000 and said["vocab_size"] == 600
    assert (sizes == 4).any() and (np.convolve(sizes == 0, [1, 1, 1]) == 3).any(), "no emoji in byte fallback"


def test_plain_shards_decode_to_their_text(tmp_path):
    said = write_plain(tmp_path, DOCS, 700, val_docs=20)
    sp = spm.SentencePieceProcessor(model_file=str(said["tokenizer"]))
    val = numbers(tmp_path / "fineweb_val_000000.bin")
    texts = [sp.decode(doc.tolist()) for doc in np.split(val, np.flatnonzero(val == 1)[1:])]
    assert len(texts) == said["docs"] == 20 and sum(len(text.encode()) for text in texts) == said["normalized_bytes"]
    assert not list(tmp_path.glob("*bytes*"))


def test_the_two_bad_tokenizers(tmp_path):
    """Their decoders give more bytes than the text has: by table and decoder alone they look right."""
    for name, options in (
        ("no_lone_space", {"lone_space": False}),
        ("suffix", {"treat_whitespace_as_suffix": True, "add_dummy_prefix": True}),
    ):
        said = write_plain(tmp_path / name, DOCS, **options)
        sp = spm.SentencePieceProcessor(model_file=str(said["tokenizer"]))
        if name == "suffix":
            assert any(sp.id_to_piece(i).endswith("e\u2581") for i in range(sp.vocab_size()))
            continue
        assert sp.piece_to_id("\u2581") == sp.unk_id()
        val = numbers(tmp_path / name / "fineweb_val_000000.bin")
        text = sp.decode(val.tolist())
        assert "\u2581" in text and len(text.encode()) > said["normalized_bytes"]


def test_documents_are_the_same_every_time():
    assert sample_documents(160, 3) == DOCS != sample_documents(160, 4)
    text = "".join(DOCS)
    assert all(sign in text for sign in ("\u00a0", "\ufb03", "  ", "\t", "\u200b", "NATO")) and all(
        d == d.strip() for d in DOCS
    )
