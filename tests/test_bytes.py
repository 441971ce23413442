"""Room 4: the bytes that tokens stand for, which every score is divided by, against text that was really decoded.

Several tokenizers, because SentencePiece treats spaces by settings that a model carries within it: the contest's, one
with SentencePiece's defaults (a space is put before every text, and taken off again), one that keeps runs of spaces
and has pieces with spaces within, one without byte pieces.
"""
import dataclasses
import io
import re
from functools import cache

import numpy as np
import pytest
import sentencepiece as spm
from conftest import config, trainer, write_shard
from contest_writer import sample_documents, write_caseops, write_plain
from hypothesis import example, given, settings
from hypothesis import strategies as st

tg = trainer()

PROSE = """The denominator of every score is the number of bytes of text, and it is the most common fault of all.
In Köln gießt es, à Paris aussi; señor Núñez déjà vu, naïve façade. Привет, мир! Как дела сегодня? Γειά σου Κόσμε.
def count(tokens): return sum(len(piece) for piece in tokens)  # a comment, 3.14159 and [brackets] and {braces}
we walk, we walked, we are walking through the woods; the weather was wonderful while we were walking there
你好世界 数据 模型 语言 字节 こんにちは 안녕하세요 x = y + z; print("hello world") 0 1 2 3 4 5 6 7 8 9
""".splitlines() * 4

KINDS = {
    "contest": dict(model_type="bpe", byte_fallback=True, add_dummy_prefix=False),
    "unigram": dict(model_type="unigram", byte_fallback=True),
    "spaces": dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
                   split_by_whitespace=False),
    "no_bytes": dict(model_type="bpe", byte_fallback=False, vocab_size=220, character_coverage=1.0),
    "kept": dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
                 add_dummy_prefix=False),
    "other_bos": dict(model_type="bpe", byte_fallback=True, pad_id=-1, unk_id=0, bos_id=2, eos_id=1),
}
TOTAL = ("contest", "unigram", "spaces")  # those that can encode any text

TEXTS = {
    "leading spaces of words": "the weather was wonderful",
    "spaces within pieces": PROSE[0],
    "byte fallback": "Ӂ ᚠᛇᚻ ℵ ∮ \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "byte piece before a space": "ᚠ the ᚠ the",
    "non-Latin": "Привет, мир! 你好世界 안녕하세요",
    "emoji": "fine 👍🏽 family 👨‍👩‍👧‍👦 flag 🇩🇪",
    "runs of spaces": "a   b      c  ",
    "line breaks and tabs": "def f():\n\treturn 1\n\n\n",
    "empty": "",
    "only a space": " ",
    "only spaces": "     ",
    "starts with a space": " the weather",
    "starts with two spaces": "  the weather",
    "the mark of a space itself": "a▁b ▁c ▁",
    "text that looks like pieces": "<s> <0x41> <unk> </s> <pad>",
    "replacement character": "broken \ufffd text",
    "combining marks": "e\u0301 a\u0308 \u0915\u094d\u0937",
    "zero bytes": "a\x00b",
}


@cache
def model(kind: str, seed: int = 0) -> bytes:
    """A trained model file. Another seed gives another language, so other pieces."""
    lines = [line[::-1].swapcase() for line in PROSE] if seed else PROSE
    common = dict(vocab_size=480, normalization_rule_name="nmt_nfkc", character_coverage=0.985, hard_vocab_limit=False,
                  pad_id=0, bos_id=1, eos_id=2, unk_id=3, num_threads=1, minloglevel=2)
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **{**common, **KINDS[kind]})
    return out.getvalue()


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(kind, seed=0) -> tg.Tokenizer; remembered."""
    folder, made = tmp_path_factory.mktemp("tokenizers"), {}

    def build(kind: str, seed: int = 0):
        if (kind, seed) not in made:
            path = folder / f"{kind}{seed}.model"
            path.write_bytes(model(kind, seed))
            made[kind, seed] = tg.Tokenizer(path, spm.SentencePieceProcessor(model_proto=model(kind, seed)).vocab_size())
        return made[kind, seed]
    return build


def document(tokenizer, text: str) -> np.ndarray:
    """A document as shards hold it: BOS, then the text."""
    return np.array([tg.BOS, *tokenizer.sp.encode(text)], np.uint16)


def decoded_bytes(tokenizer, doc: np.ndarray) -> int:
    return len(tokenizer.sp.decode(doc.tolist()).encode())


def check(tokenizer, docs: list[np.ndarray]) -> str:
    """check_bytes on a set made of these documents."""
    starts = np.cumsum([0] + [len(d) for d in docs[:-1]])
    return tokenizer.check_bytes(np.concatenate(docs), starts)


# ----------------------------------------------------------------------------------------------------------------------
# Table against decoder
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("kind", TOTAL)
def test_counted_bytes_are_those_of_the_decoded_text(make, kind, text):
    tokenizer = make(kind)
    doc = document(tokenizer, text)
    assert tokenizer.count_bytes(doc).sum() == decoded_bytes(tokenizer, doc)


@pytest.mark.parametrize("kind", TOTAL)
@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("  \t\n▁aeth.Яя你👍"))))
@example(text=" ")
@settings(max_examples=150)
def test_counted_bytes_on_any_text(make, kind, text):
    tokenizer = make(kind)
    doc = document(tokenizer, text)
    assert tokenizer.count_bytes(doc).sum() == decoded_bytes(tokenizer, doc)


@given(words=st.lists(st.sampled_from(" ".join(PROSE).split())))
def test_counted_bytes_without_byte_pieces_on_text_it_knows(make, words):
    tokenizer = make("no_bytes")
    doc = document(tokenizer, " ".join(words))
    assert not (doc == tokenizer.sp.unk_id()).any()
    assert tokenizer.count_bytes(doc).sum() == decoded_bytes(tokenizer, doc)


@given(texts=st.lists(st.text("ab 你👍\n", max_size=8), min_size=1, max_size=6))
def test_documents_side_by_side_count_what_they_count_alone(make, texts):
    """Also the BOS of the next document, a target like any other, stands for no byte."""
    tokenizer = make("unigram")
    docs = [document(tokenizer, t) for t in texts]
    together = tokenizer.count_bytes(np.concatenate(docs)).sum()
    assert together == sum(decoded_bytes(tokenizer, d) for d in docs)


def test_kinds_are_what_they_claim(make):
    """The cases above mean nothing if no byte piece, no leading space and no run of spaces came up in them."""
    fallback = document(make("contest"), TEXTS["byte fallback"])
    assert sum(make("contest").sp.is_byte(int(t)) for t in fallback) > 10
    assert len(make("spaces").sp.decode(document(make("spaces"), "a   b").tolist())) == 5
    within = document(make("spaces"), TEXTS["spaces within pieces"])
    assert any("▁" in make("spaces").sp.id_to_piece(int(t))[1:] for t in within)
    assert make("unigram").space_V[document(make("unigram"), "the")[1]]  # a space that the decoder takes off again
    assert not make("contest").space_V[document(make("contest"), "the")[1]]


# ----------------------------------------------------------------------------------------------------------------------
# Known traps, token by token
# ----------------------------------------------------------------------------------------------------------------------
def ids(tokenizer, *pieces: str) -> np.ndarray:
    """Tokens by their pieces; fails if the vocabulary lacks one."""
    found = [tokenizer.sp.piece_to_id(p) for p in pieces]
    assert [tokenizer.sp.id_to_piece(i) for i in found] == list(pieces)
    return np.array(found)


def test_leading_space_counts_one_byte_and_once(make):
    """The trap: U+2581 has three bytes in UTF-8, and a space added to a piece that already holds it counts twice."""
    tokenizer = make("contest")
    tokens = ids(tokenizer, "<s>", "t", "▁the", "▁we", "▁", "▁")
    assert tokenizer.count_bytes(tokens).tolist() == [1, 4, 3, 1, 1]


def test_space_behind_a_document_start_is_none(make):
    """The decoder drops it, so it is not text; behind any other token, byte pieces included, it is."""
    tokenizer = make("unigram")
    assert tokenizer.count_bytes(ids(tokenizer, "<s>", "▁the", "▁the", "<0x0A>", "▁the")).tolist() == [3, 4, 1, 4]


def test_control_pieces_are_no_bytes_and_byte_pieces_are_one(make):
    tokenizer = make("contest")
    tokens = ids(tokenizer, "<s>", "<s>", "</s>", "<pad>", "<unk>", "<0xE4>", "<0x41>", "ö")
    assert tokenizer.count_bytes(tokens).tolist() == [0, 0, 0, 0, 1, 1, 2]


# ----------------------------------------------------------------------------------------------------------------------
# The check at start-up
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [*TOTAL, "no_bytes"])
def test_right_tokenizer_passes(make, kind):
    tokenizer = make(kind)
    docs = [document(tokenizer, line) for line in PROSE] + [document(tokenizer, "")]
    size, n = sum(decoded_bytes(tokenizer, doc) for doc in docs), len(docs)
    proof = f"byte table equals UTF-8 on {n} of {n} documents ({size} bytes), {n} of them encoded again to the same tokens"
    assert check(tokenizer, docs) == proof


@pytest.mark.parametrize("off", [1, -1])
def test_table_that_is_off_by_one_byte_is_refused(make, off):
    tokenizer = make("contest")
    doc = document(tokenizer, PROSE[0])
    wrong = tokenizer.base_V.copy()
    wrong[doc[3]] += off
    broken = object.__new__(tg.Tokenizer)
    broken.__dict__.update(vars(tokenizer), base_V=wrong)
    with pytest.raises(SystemExit, match="byte table and text differ on document 1"):
        check(broken, [document(tokenizer, "x"), doc])


def test_unknown_tokens_are_refused(make):
    """Text that a tokenizer could not encode is lost, so its bytes cannot be counted."""
    tokenizer = make("no_bytes")
    doc = document(tokenizer, "the 👍 weather")
    assert (doc == tokenizer.sp.unk_id()).any()
    with pytest.raises(SystemExit, match="differ on document 0"):
        check(tokenizer, [doc])


def test_documents_that_are_passed_over_are_not_counted_as_checked(make):
    """A document cut within a character cannot be compared; the log must not claim that it was."""
    tokenizer = make("contest")
    broken = np.concatenate([document(tokenizer, "a"), ids(tokenizer, "<0xE4>")])
    assert check(tokenizer, [broken, document(tokenizer, "fine")]) == (
        "byte table equals UTF-8 on 1 of 2 documents (4 bytes), 1 of them encoded again to the same tokens")


def test_nothing_to_compare_is_no_proof(make):
    """What another tokenizer makes of text outside its language is often no UTF-8 at all: passed over, all of it."""
    broken = np.array([tg.BOS, *ids(make("contest"), "<0xE4>", "t", "<0xFF>")])
    with pytest.raises(SystemExit, match="tokenizer"):
        check(make("contest"), [broken] * 4)


def test_a_kept_leading_space_is_never_miscounted_in_silence(make):
    """Without dummy prefix and without removal of spaces the decoder keeps a document's first space: count or refuse."""
    tokenizer = make("kept")
    doc = document(tokenizer, " the weather")
    assert tokenizer.sp.decode(doc.tolist()) == " the weather"
    try:
        check(tokenizer, [doc])
    except SystemExit:
        return
    assert tokenizer.count_bytes(doc).sum() == 12


# ----------------------------------------------------------------------------------------------------------------------
# Sidecars of the contest's own form
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cased(tmp_path_factory):
    """(tokenizer, tokens, sidecar, starts) of case operators in the contest's own form, odd characters among them."""
    texts = [f"{text} {' the weather was wonderful' * 12}" for text in sample_documents(160, 3)]
    folder = tmp_path_factory.mktemp("cased")
    said = write_caseops(folder, texts)
    tokenizer = tg.Tokenizer(said["tokenizer"], said["vocab_size"])
    tokens, sizes = (tg.read_split(folder, split) for split in ("val", "val_bytes"))
    assert sizes.sum() == said["bytes"]
    return tokenizer, tokens, sizes, np.flatnonzero(tokens == tg.BOS)


def test_a_sidecar_of_the_contest_is_accepted_and_told_of(cased):
    tokenizer, tokens, sizes, starts = cased
    operators = int((tokenizer.piece_marks()[tokens] > 0).sum())
    text = tokenizer.check_sidecar(tokens, sizes, starts)
    assert text.startswith(f"byte sidecar equals the table but for {operators} case operators and ") and operators > 100
    found = re.search(r"and (\d+) places in (\d+) documents that normalisation changed", text)
    places, documents = map(int, found.groups())
    table = tokenizer.count_bytes(tokens) - tokenizer.piece_marks()[tokens[1:]]
    assert 0 < documents <= len(starts) and places >= documents
    assert f"({int(sizes.sum() - table.sum()):+d} of {int(sizes.sum())} bytes; " in text


@pytest.mark.parametrize("change, told", [
    (lambda t, x, sizes: np.roll(sizes, 1), "documents' first tokens"),
    (lambda t, x, sizes: sizes + 3 * (t.piece_marks()[x] > 0), "counts the bytes of [0-9]+ of [0-9]+ case operators"),
    (lambda t, x, sizes: sizes + (np.arange(len(x)) % 20 == 7) * (x != tg.BOS), "more than normalisation"),
    # the table itself counts operators
    (lambda t, x, sizes: np.append(0, t.count_bytes(x)), "counts the bytes of"),
], ids=["shifted", "operators counted", "a byte here and there", "the table"])
def test_a_sidecar_that_is_none_is_refused(cased, change, told):
    tokenizer, tokens, sizes, starts = cased
    with pytest.raises(SystemExit, match=told):
        tokenizer.check_sidecar(tokens, change(tokenizer, tokens, sizes.astype(np.int64)), starts)


def test_operators_want_a_sidecar_and_a_sign_of_the_texts_own_does_not(cased, make):
    tokenizer, tokens, _, _ = cased
    with pytest.raises(SystemExit, match="validation tokens are case operators"):
        tokenizer.check_operators(tokens)
    plain = make("contest")
    plain.check_operators(np.concatenate([document(plain, line) for line in PROSE]))
    rare = np.where(tokenizer.piece_marks()[tokens] > 0, tokenizer.sp.piece_to_id("e"), tokens)
    tokenizer.check_operators(rare)
    rare[100] = tokens[tokenizer.piece_marks()[tokens] > 0][0]  # a private-use character that a page holds
    tokenizer.check_operators(np.tile(rare, 4))


@pytest.mark.parametrize("options, told", [
    (dict(lone_space=False), "has no piece for a lone space: [0-9]+ of them lie in the validation tokens"),
    (dict(treat_whitespace_as_suffix=True, add_dummy_prefix=True), "byte table and text differ on document 0"),
], ids=str)
def test_tokenizers_whose_decoder_errs_with_the_table_are_refused(options, told, tmp_path):
    """Table and decoder agree on too many bytes (issue #897, PR #755): only the encoder can tell."""
    said = write_plain(tmp_path, sample_documents(160, 3), **options)
    tokenizer = tg.Tokenizer(said["tokenizer"], said["vocab_size"])
    tokens = tg.read_split(tmp_path, "val")
    with pytest.raises(SystemExit, match=told):
        tokenizer.check_bytes(tokens, np.flatnonzero(tokens == tg.BOS))


# ----------------------------------------------------------------------------------------------------------------------
# Wrong tokenizers
# ----------------------------------------------------------------------------------------------------------------------
def test_tokenizer_of_another_size_is_refused(make):
    with pytest.raises(tg.ConfigError, match=r"VOCAB_SIZE=1024, but .* has \d+ pieces"):
        tg.Tokenizer(make("contest").path, 1024)


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere\.model is missing; see data/README\.md"):
        tg.Tokenizer(tmp_path / "nowhere.model", 400)


def test_tokenizer_with_another_bos_is_refused(make):
    with pytest.raises(SystemExit, match="BOS is 2, contest shards use 1"):
        make("other_bos")


def test_tokenizer_of_the_same_size_with_other_pieces_is_refused(make, tmp_path):
    """Its table agrees with its own decoder on anything, so the comparison alone cannot see that the text is not text."""
    right, wrong = make("contest"), make("contest", seed=1)
    assert len(right.base_V) == len(wrong.base_V)
    write_shard(tmp_path / "fineweb_val_000000.bin", np.concatenate([document(right, line) for line in PROSE]))
    cfg = dataclasses.replace(config(), vocab_size=len(right.base_V), data_path=str(tmp_path), val_docs=0)
    tg.ValidationSet(cfg, right)
    with pytest.raises(SystemExit, match="tokenizer"):
        tg.ValidationSet(cfg, wrong)
