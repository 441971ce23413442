"""Room 5 and the windows of room 14: shards are whole or named, every token is read as often as it should be."""
import dataclasses
import os
import resource
import shutil

import numpy as np
import pytest
import torch
from conftest import config, make_run, tiny, trainer, write_shard
from hypothesis import example, given
from hypothesis import strategies as st

tg = trainer()
BOS = tg.BOS

SHARDS = (64 * 5 + 1, 64 * 3, 30, 64 * 4 + 17)  # tokens; exactly 5 blocks and the last target, one target short, none, 4
BLOCKS = 5 + 2 + 0 + 4


# ----------------------------------------------------------------------------------------------------------------------
# Shards
# ----------------------------------------------------------------------------------------------------------------------
def damage(path, kind: str) -> None:
    """Do to a good shard what downloads, disks and scripts do."""
    data = path.read_bytes()
    header = np.frombuffer(data[:1024], "<i4").copy()
    if kind == "missing":
        path.unlink()
    elif kind in ("other magic", "other version"):
        header[("other magic", "other version").index(kind)] += 1
        path.write_bytes(header.tobytes() + data[1024:])
    elif kind == "other count":
        header[2] -= 1
        path.write_bytes(header.tobytes() + data[1024:])
    elif kind == "no tokens":
        header[2] = 0
        path.write_bytes(header.tobytes())
    else:
        path.write_bytes({"short": data[:-2], "half a token short": data[:-1], "long": data + b"\0\0", "no file at all": b"",
                          "part of a header": data[:100]}[kind])


KINDS = ("missing", "short", "half a token short", "long", "other magic", "other version", "other count", "no tokens",
         "no file at all", "part of a header")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_shard_is_named_with_what_to_run(tmp_path, kind):
    path = write_shard(tmp_path / "fineweb_train_000003.bin", range(100))
    assert len(tg.read_shard(path)) == 100
    damage(path, kind)
    with pytest.raises(SystemExit) as error:
        tg.read_shard(path)
    assert "fineweb_train_000003.bin" in str(error.value) and "python data/" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_shard_among_good_ones_stops_the_stream(tmp_path, kind):
    """The one in the middle: a gap in the numbers is a missing shard too, not a smaller corpus."""
    paths = [write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", range(100)) for i in range(3)]
    assert len(tg.find_shards(tmp_path, "train")) == 3
    damage(paths[1], kind)
    with pytest.raises(SystemExit, match="000001"):
        tg.find_shards(tmp_path, "train")


def test_shard_is_read_as_written(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 2 ** 16, 1000)
    assert (tg.read_shard(write_shard(tmp_path / "a.bin", tokens)) == tokens).all()


@pytest.mark.parametrize("split", ["train", "val"])
def test_folder_without_shards_is_named_with_what_to_run(tmp_path, split):
    with pytest.raises(SystemExit) as error:
        tg.find_shards(tmp_path / "nowhere", split)
    text = str(error.value)
    assert f"fineweb_{split}_" in text and str(tmp_path / "nowhere") in text and "python data/" in text


def test_byte_sidecar_is_no_validation_shard(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", [BOS, 5, 6])
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", [0, 3, 3])
    write_shard(tmp_path / "fineweb_train_000000.bin", [BOS, 7])
    assert tg.read_split(tmp_path, "val").tolist() == [BOS, 5, 6]


def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    for i in (2, 0, 1):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", [BOS, i])
    assert [int(tg.read_shard(p)[1]) for p in tg.find_shards(tmp_path, "train")] == [0, 1, 2]


def test_a_thousand_shards_need_no_thousand_descriptors(tmp_path):
    """Local preparations of the contest have 1,499 shards, and a process may usually open 1,024 files."""
    for i in range(150):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", [BOS, *range(2, 66)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 140, hard))  # the stream keeps 128 open
    try:
        stream = open_stream(tmp_path, tmp_path)
        assert sorted(int(stream.block(i)[1]) for i in range(150)) == [2] * 150
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_another_validation_set_for_want_of_a_shard_is_named(tmp_path):
    """Without the first or the last of its shards a validation set is another one, with another score."""
    sizes = {0: 6, 1: 6, 2: 6, 3: 4}
    for i, n in sizes.items():
        write_shard(tmp_path / f"fineweb_val_{i:06d}.bin", [BOS, *range(2, 1 + n)])
    assert len(tg.read_split(tmp_path, "val")) == 22
    for gone, named in ((0, "fineweb_val_000000.bin"), (2, "fineweb_val_000002.bin"), (3, "fineweb_val_000003.bin")):
        kept = (tmp_path / f"fineweb_val_{gone:06d}.bin").rename(tmp_path / "kept")
        with pytest.raises(SystemExit, match=named):
            tg.read_split(tmp_path, "val")
        kept.rename(tmp_path / f"fineweb_val_{gone:06d}.bin")


# ----------------------------------------------------------------------------------------------------------------------
# Segments
# ----------------------------------------------------------------------------------------------------------------------
def cut_slowly(ids, forced, limit: int, isolate: bool) -> list[int]:
    """The definition, a token at a time."""
    borders = [0]
    for i in range(1, len(ids)):
        if i in forced or (isolate and ids[i] == BOS) or i - borders[-1] == limit:
            borders.append(i)
    return [*borders, len(ids)]


@given(ids=st.lists(st.sampled_from([BOS, 2, 3, 4, 5, 6]), min_size=1, max_size=60), limit=st.integers(1, 70),
       isolate=st.booleans(), more=st.sets(st.integers(1, 59)))
@example(ids=[BOS], limit=1, isolate=True, more=set())
@example(ids=[BOS, BOS, BOS], limit=2, isolate=True, more=set())
@example(ids=[2] * 12, limit=4, isolate=True, more={6})
def test_cut_segments(ids, limit, isolate, more):
    ids, forced = np.array(ids, np.uint16), np.array(sorted({0} | {m for m in more if m < len(ids)}))
    cu = tg.cut_segments(ids, forced, limit, isolate)
    lengths = np.diff(cu)
    assert cu.dtype == np.int32 and cu[0] == 0 and cu[-1] == len(ids), "borders do not cover the row"
    assert lengths.min() >= 1 and lengths.max() <= limit
    assert set(forced) <= set(cu.tolist())
    assert not isolate or set(np.flatnonzero(ids == BOS)) <= set(cu.tolist()), "a document that starts no segment"
    assert cu.tolist() == cut_slowly(ids, forced, limit, isolate)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), room=st.integers(0, 20))
def test_make_batch_numbers_positions_and_pads_borders(run, lengths, room):
    cu = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.arange(cu[-1]).astype(np.uint16)
    batch = tg.make_batch(ids, ids + 1, cu, 9, run, room)
    assert batch.pos.tolist() == [p for n in lengths for p in range(n)]
    assert batch.cu[:len(cu)].tolist() == cu.tolist() and (batch.cu[len(cu):] == cu[-1]).all()
    assert len(batch.cu) == max(len(cu), room + 1) and batch.cu.dtype == torch.int32
    assert batch.ids.dtype == batch.targets.dtype == torch.int64 and batch.longest == 9


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), tiny())


# ----------------------------------------------------------------------------------------------------------------------
# Training stream
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Shards whose tokens are 0, 1, 2, ...: a token's value is its place, so a block is known by its first token.

    BOS is among them once, so documents begin where they do in real data: anywhere in a block.
    """
    folder, first = tmp_path_factory.mktemp("numbered"), 0
    for i, size in enumerate(SHARDS):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", range(first, first + size))
        first += size
    return folder


def open_stream(folder, tmp_path, rank: int = 0, world: int = 1, **env):
    cfg = tiny(DATA_PATH=folder, **{"VOCAB_SIZE": 1024, "WORLD_SIZE": world, **env})
    return tg.TrainStream(cfg, make_run(tmp_path, cfg, rank, world))


def flat(batches, part: str = "ids") -> list[int]:
    return torch.cat([getattr(b, part) for b in batches]).tolist()


def first_tokens(stream, steps: int) -> list[int]:
    """The first token of each block, in the order of the stream."""
    return [t for s in range(steps) for t in flat(stream.make(s))[::stream.pack]]


def test_every_block_is_whole_and_within_its_shard(numbered, tmp_path):
    stream = open_stream(numbered, tmp_path)
    assert stream.ends[-1] == BLOCKS and stream.tokens == sum(SHARDS)
    blocks = [stream.block(i) for i in range(BLOCKS)]
    assert [len(b) for b in blocks] == [stream.pack + 1] * BLOCKS
    starts = [0, 64, 128, 192, 256, 321, 385, 543, 607, 671, 735]
    assert [int(b[0]) for b in blocks] == starts
    assert all((np.diff(b.astype(int)) == 1).all() for b in blocks)


@pytest.mark.parametrize("micro_tokens", [64, 128, 192, 256])
@pytest.mark.parametrize("world", [2, 4])
def test_step_is_the_same_for_any_number_of_ranks(numbered, tmp_path, world, micro_tokens):
    """The union over ranks, and its order, over steps that cross the end of an epoch; however memory cuts it up."""
    one = open_stream(numbered, tmp_path)
    ranks = [open_stream(numbered, tmp_path, r, world, MICRO_BATCH_TOKENS=micro_tokens) for r in range(world)]
    for step in range(2 * BLOCKS // one.per_step + 2):
        together = [t for s in ranks for t in flat(s.make(step))]
        assert together == flat(one.make(step))
        shares = {len(flat(s.make(step))) for s in ranks}
        assert shares == {one.per_step * one.pack // world}


@pytest.mark.parametrize("isolate", [0, 1])
def test_micro_batches_cut_the_same_segments(numbered, tmp_path, isolate):
    """Segment borders, too, do not depend on how a step is spread over passes."""
    def segments(**env):
        stream = open_stream(numbered, tmp_path, DOC_ISOLATION=isolate, TTT_ENABLED=0, **env)
        return [int(b.ids[i]) for step in range(4) for b in stream.make(step) for i in b.cu[:-1]]
    assert segments(MICRO_BATCH_TOKENS=64) == segments(MICRO_BATCH_TOKENS=256)


def test_each_epoch_visits_each_block_once_in_another_order(numbered, tmp_path):
    stream = open_stream(numbered, tmp_path)  # 4 blocks a step, 11 an epoch: every epoch ends within a step
    seen = first_tokens(stream, 3 * BLOCKS // stream.per_step + 1)
    epochs = [seen[i * BLOCKS:(i + 1) * BLOCKS] for i in range(3)]
    every = sorted(int(stream.block(i)[0]) for i in range(BLOCKS))
    assert [sorted(e) for e in epochs] == [every] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and every not in epochs


def test_seed_decides_the_order_alone(numbered, tmp_path):
    orders = {seed: first_tokens(open_stream(numbered, tmp_path, SEED=seed), 3) for seed in (1, 2, 3)}
    assert len({tuple(o) for o in orders.values()}) == 3
    torch.manual_seed(99), np.random.seed(99)
    assert first_tokens(open_stream(numbered, tmp_path, SEED=2, MATRIX_LR=0.5, RUN_ID="other"), 3) == orders[2]


def equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) if torch.is_tensor(x) else x == y
                                    for p, q in zip(a, b) for x, y in zip(p, q))


def test_batches_follow_one_another_whatever_else_is_asked(numbered, tmp_path):
    """Step by step they are the whole steps' own, and what the warm-up or calibration cut meanwhile changes nothing."""
    plain, disturbed = open_stream(numbered, tmp_path), open_stream(numbered, tmp_path)
    for step in range(9):
        expected = plain.make(step)
        disturbed.make(8 - step), disturbed.calibration()
        assert equal(plain.get(1.0)[0], expected) and equal(disturbed.get(1.0)[0], expected)


def test_targets_are_the_inputs_shifted_by_one(numbered, tmp_path):
    """Also the last of a block, which is the next block's first token, and the last of a shard."""
    for step in range(6):
        for batch in open_stream(numbered, tmp_path).make(step):
            assert (batch.targets - batch.ids == 1).all()


def test_segments_of_a_row_begin_at_blocks_and_documents(numbered, tmp_path):
    stream = open_stream(numbered, tmp_path, MICRO_BATCH_TOKENS=256)
    starts = [int(b.ids[i]) for s in range(3) for b in stream.make(s) for i in b.cu[:-1]]
    assert BOS in starts and all(int(stream.block(i)[0]) in starts for i in range(BLOCKS))
    lengths = torch.cat([b.cu.diff() for s in range(3) for b in stream.make(s)])
    assert lengths.max() == stream.cfg.train_seq_len and lengths.min() >= 1
    loose = open_stream(numbered, tmp_path, DOC_ISOLATION=0, TTT_ENABLED=0)
    assert BOS not in [int(b.ids[i]) for s in range(3) for b in loose.make(s) for i in b.cu[:-1]]


def test_shorter_segments_come_first(numbered, tmp_path):
    """TRAIN_SEQ_SCHEDULE changes where rows are cut and nothing else, whatever was made ahead."""
    stream, plain = (open_stream(numbered, tmp_path, TRAIN_BATCH_SCHEDULE="", TRAIN_SEQ_SCHEDULE=text) for text in ("5:.25,9:.5", ""))
    full = stream.cfg.train_seq_len
    for step, (p, limit) in enumerate([(0.0, 5), (0.2, 5), (0.25, 9), (0.4, 9), (0.5, full), (0.9, full), (1.0, full)]):
        (cut, _), (whole, _) = stream.get(p), plain.get(p)
        assert max(int(b.cu.diff().max()) for b in cut) == limit
        assert all(torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets) and a.longest == full for a, b in zip(cut, whole))
        assert all(set(b.cu.tolist()) <= set(a.cu.tolist()) or limit < full for a, b in zip(cut, whole))
        assert equal(cut, stream.cut(step * stream.per_step, stream.per_step, limit))
    assert equal(stream.make(0), plain.make(0)), "calibration sees what training ends with"


@pytest.mark.parametrize("world", [1, 2])
def test_smaller_steps_come_first_and_nothing_is_read_twice(numbered, tmp_path, world):
    """TRAIN_BATCH_SCHEDULE changes how many blocks a step takes, not their order, whatever was made ahead or on how many ranks."""
    knobs = dict(TRAIN_BATCH_SCHEDULE="0.25:.3,0.5:.6", TRAIN_BATCH_TOKENS=512, MICRO_BATCH_TOKENS=128)
    ranks = [open_stream(numbered, tmp_path, rank, world, **knobs) for rank in range(world)]
    seen, place = [], 0
    for p, blocks in [(0.0, 2), (0.2, 2), (0.3, 4), (0.5, 4), (0.6, 8), (1.0, 8)]:
        steps = [s.get(p)[0] for s in ranks]
        seen, place = seen + [t for batches in steps for t in flat(batches)], place + blocks
        assert len(seen) == place * ranks[0].pack
        assert {b.ids.numel() for batches in steps for b in batches} == {ranks[0].pack * min(2, blocks // world)}, "as many as fit"
    one = open_stream(numbered, tmp_path)
    assert seen == flat(one.cut(0, place, one.cfg.train_seq_len))


@pytest.mark.parametrize("share, blocks", [(0.5, 2), (0.3, 2), (0.75, 3), (1.0, 4), (0.01, 1)])
def test_shares_are_rounded_up_to_whole_blocks(share, blocks):
    assert tg.step_blocks(tiny(VOCAB_SIZE=1024), share) == blocks


@pytest.mark.parametrize("pack", [8192, 16384])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 16])
def test_every_world_trains_the_contests_batches(world, pack):
    """In every stage of the record's batch schedule, at the contest's batch: the same blocks in the same order, each on one rank,
    and no rank with more than one block above another's."""
    cfg = tg.load_config({"PRESET": "record", "PACK_TOKENS": str(pack), "WORLD_SIZE": str(world)}, True)
    place = 0
    for p, tokens in [(0.0, 196_608), (0.2, 196_608), (0.35, 393_216), (0.84, 393_216), (0.85, 786_432), (1.0, 786_432)]:
        blocks = tg.step_blocks(cfg, tg.stage_at(cfg.batch_shares, p))
        assert blocks * pack == tokens
        shares = [tg.rank_blocks(blocks, rank, world) for rank in range(world)]
        assert [place + j for mine in shares for j in mine] == list(range(place, place + blocks))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        place += blocks


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 16])
def test_every_world_reads_the_same_rows(tmp_path, world):
    """The streams themselves: what ranks read together, step by step through all stages, is what one rank reads."""
    write_shard(tmp_path / "fineweb_train_000000.bin", np.random.default_rng(0).integers(2, 60, 48 * 40 * 16 + 1))
    knobs = dict(VOCAB_SIZE=64, PACK_TOKENS=16, TRAIN_BATCH_TOKENS=48 * 16, MICRO_BATCH_TOKENS=128, TRAIN_BATCH_SCHEDULE="0.25:.35,0.5:.85")
    one, *ranks = (tg.TrainStream(tiny(DATA_PATH=tmp_path, **knobs), make_run(tmp_path, tiny(), *place))
                   for place in [(0, 1), *((rank, world) for rank in range(world))])
    for p in (0.0, 0.1, 0.34, 0.35, 0.6, 0.85, 1.0):
        batches, tokens = one.get(p)
        parts = [s.get(p) for s in ranks]
        assert flat(batches) == [t for rows, _ in parts if rows for t in flat(rows)]
        assert {n for _, n in parts} == {tokens} and tokens == sum(b.ids.numel() for b in batches)


def test_too_little_data_is_named(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", range(64))  # one target short of a block
    with pytest.raises(SystemExit, match="64 training tokens, fewer than PACK_TOKENS=64"):
        open_stream(tmp_path, tmp_path)


@given(per_step=st.integers(1, 40), memory=st.integers(1, 50))
def test_micro_blocks_is_the_most_that_fits_and_divides(per_step, memory):
    micro = tg.micro_blocks(dataclasses.replace(tiny(), pack_tokens=64, micro_batch_tokens=64 * memory), per_step)
    assert per_step % micro == 0 and micro <= memory and tg.micro_blocks(tiny(), 0) == 0
    assert not any(per_step % m == 0 for m in range(micro + 1, min(memory, per_step) + 1))


# ----------------------------------------------------------------------------------------------------------------------
# Validation set
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizer(corpus):
    return tg.Tokenizer(corpus.tokenizer, corpus.vocab_size)


def load_val(corpus, tokenizer, **env):
    return tg.ValidationSet(config(**{**corpus.env, "VAL_DOCS": 0, **env}), tokenizer)


def val_tokens(corpus) -> np.ndarray:
    return np.array(tg.read_shard(corpus.data / "fineweb_val_000000.bin"))


@pytest.fixture
def altered(corpus, tmp_path):
    """altered(tokens) -> the corpus with these validation tokens."""
    def write(tokens, *more):
        folder = tmp_path / "altered"
        shutil.rmtree(folder, ignore_errors=True)
        for i, part in enumerate((tokens, *more)):
            write_shard(folder / f"fineweb_val_{i:06d}.bin", part)
        return corpus._replace(data=folder)
    return write


def test_validation_set_agrees_with_the_builders_manifest(corpus, tokenizer):
    """Its bytes were counted there by decoding every document: another program's word for the denominator."""
    val, stated = load_val(corpus, tokenizer), corpus.manifest["val"]
    fingerprint = val.fingerprint()
    assert fingerprint["bytes"] == stated["bytes"] and fingerprint["documents"] == stated["documents"]
    assert fingerprint["tokens"] == stated["tokens"] - 1 == len(val.bytes)  # the first token is nobody's target
    assert (val.tokens == val_tokens(corpus)).all()


def test_fingerprint_changes_with_one_token(corpus, tokenizer, altered):
    tokens = val_tokens(corpus)
    original = load_val(corpus, tokenizer).fingerprint()
    assert load_val(altered(tokens), tokenizer).fingerprint() == original
    at = len(tokens) // 2
    same_bytes = np.flatnonzero((tokenizer.base_V == tokenizer.base_V[tokens[at]]) & ~tokenizer.edge_V
                                & (tokenizer.space_V == tokenizer.space_V[tokens[at]]))
    tokens[at] = next(t for t in same_bytes if t != tokens[at] and not tokenizer.sp.is_byte(int(t)))
    changed = load_val(altered(tokens), tokenizer).fingerprint()
    assert changed["sha256"] != original["sha256"]  # the counts cannot tell
    assert {k: changed[k] for k in ("documents", "tokens", "bytes")} == {k: original[k] for k in ("documents", "tokens", "bytes")}


def test_fingerprint_does_not_depend_on_how_shards_are_cut(corpus, tokenizer, altered):
    tokens = val_tokens(corpus)
    assert load_val(altered(tokens[:1001], tokens[1001:]), tokenizer).fingerprint() == load_val(corpus, tokenizer).fingerprint()


@pytest.mark.parametrize("docs", [1, 2, 7])
def test_val_docs_scores_the_first_documents_whole(corpus, tokenizer, docs):
    whole, some = load_val(corpus, tokenizer), load_val(corpus, tokenizer, VAL_DOCS=docs)
    texts = np.split(whole.tokens, whole.starts[1:])[:docs]
    assert len(some.starts) == docs and some.targets == sum(map(len, texts))
    assert (some.tokens == whole.tokens[:some.targets + 1]).all() and some.tokens[-1] == BOS
    assert some.bytes.sum() == sum(len(tokenizer.sp.decode(t.tolist()).encode()) for t in texts)
    assert [tuple(s) for s in some.sequences] == [tuple(s) for s in whole.sequences[:docs]]


def test_val_docs_beyond_the_set_is_the_set(corpus, tokenizer):
    whole = load_val(corpus, tokenizer).fingerprint()
    for docs in (whole["documents"], whole["documents"] + 1, 10 ** 9):
        assert load_val(corpus, tokenizer, VAL_DOCS=docs).fingerprint() == whole


@pytest.mark.parametrize("isolate", [0, 1])
@pytest.mark.parametrize("docs", [0, 3])
def test_sequences_cover_every_target_once(corpus, tokenizer, isolate, docs):
    val = load_val(corpus, tokenizer, DOC_ISOLATION=isolate, VAL_DOCS=docs, TTT_ENABLED=0)
    spans = val.sequences
    assert spans[0, 0] == 0 and spans[-1, 1] == val.targets and (spans[1:, 0] == spans[:-1, 1]).all()
    assert (spans[:, 1] > spans[:, 0]).all()
    assert len(spans) == (len(val.starts) if isolate else 1)


@pytest.mark.parametrize("tail", [[""], ["", ""], ["tail"]])
def test_sequences_with_empty_documents(corpus, tokenizer, altered, tail):
    """A document that is only its BOS still is the target of what stands before it."""
    texts = ["", "def count(tokens):", *tail]
    tokens = np.array([t for text in texts for t in (BOS, *tokenizer.sp.encode(text))])
    val = load_val(altered(tokens), tokenizer)
    covered = [t for a, b in val.sequences for t in range(a, b)]
    assert covered == list(range(val.targets)) == list(range(len(tokens) - 1))
    assert (val.sequences[:, 1] > val.sequences[:, 0]).all(), "an empty sequence: a window without tokens"
    assert val.bytes.sum() == sum(map(len, texts))
    assert load_val(altered(tokens), tokenizer, VAL_DOCS=1).targets == 1


@pytest.mark.parametrize("tokens, reason", [
    ([300, BOS, 301], "do not begin with a document"), ([BOS], "do not begin with a document"),
    ([BOS, 300, 512], "token 512 >= VOCAB_SIZE=512")])
def test_foreign_validation_shards_are_refused(corpus, tokenizer, altered, tokens, reason):
    with pytest.raises(SystemExit, match=reason):
        load_val(altered(np.array(tokens)), tokenizer)


def test_training_shards_of_another_vocabulary_are_refused(tmp_path):
    """On a GPU the embedding would answer with a device-side assertion, minutes later and without a name."""
    write_shard(tmp_path / "fineweb_train_000000.bin", [BOS] + [64] * 400)
    assert open_stream(tmp_path, tmp_path, VOCAB_SIZE=65).make(0)
    with pytest.raises(SystemExit, match="64 >= VOCAB_SIZE=64"):
        open_stream(tmp_path, tmp_path, VOCAB_SIZE=64).make(0)


# ----------------------------------------------------------------------------------------------------------------------
# Windows
# ----------------------------------------------------------------------------------------------------------------------
@st.composite
def layouts(draw):
    """(sequences that tile the stream, window length, stride <= length)."""
    ends = np.cumsum(draw(st.lists(st.integers(1, 40), min_size=1, max_size=8)))
    length = draw(st.integers(2, 24))
    stride = draw(st.one_of(st.integers(1, length), st.just(length)))
    return np.stack([np.append(0, ends[:-1]), ends], 1), length, stride


@given(layout=layouts())
@example(layout=(np.array([[0, 24]]), 16, 8))  # ends with a window
@example(layout=(np.array([[0, 25]]), 16, 8))  # one token more
@example(layout=(np.array([[0, 16], [16, 17]]), 16, 16))
def test_windows_score_every_position_once(layout):
    sequences, length, stride = layout
    windows = tg.make_windows(sequences, length, stride)
    scored = [p for _, end, first in windows for p in range(first, end)]
    assert scored == list(range(sequences[-1, 1])), "not every position once and in order"


@given(layout=layouts())
def test_windows_read_no_more_than_they_may(layout):
    """What is scored lies within the window, the window within its sequence, and is as long as it can be."""
    sequences, length, stride = layout
    for start, end, first in tg.make_windows(sequences, length, stride):
        assert start <= first < end <= start + length
        a, b = sequences[np.searchsorted(sequences[:, 1], start, side="right")]
        assert a <= start and end == min(start + length, b)
        assert first == a if start == a else first == start + length - stride, "not all of the first, the last stride of others"
        assert end - first == stride or start == a or end == b, "only a sequence's last window may score less than a stride"


@given(layout=layouts())
def test_windows_are_no_more_than_needed(layout):
    """One for what a window holds, one for each stride beyond; so no token of a tail is read for nothing."""
    sequences, length, stride = layout
    needed = sum(1 + max(0, -(-(b - a - length) // stride)) for a, b in sequences)
    assert len(tg.make_windows(sequences, length, stride)) == needed


@given(layout=layouts())
def test_windows_give_every_later_token_its_context(layout):
    """Sliding is for context: behind the first window a token sees at least length - stride tokens before it."""
    sequences, length, stride = layout
    starts = {int(a) for a, _ in sequences}
    for start, _, first in tg.make_windows(sequences, length, stride):
        assert first - start >= length - stride or int(start) in starts


def test_windows_of_known_sequences():
    windows = tg.make_windows(np.array([[0, 10], [10, 13], [13, 19]]), 6, 2)
    assert windows.tolist() == [[0, 6, 0], [2, 8, 6], [4, 10, 8], [10, 13, 10], [13, 19, 13]]
    assert tg.make_windows(np.array([[0, 10]]), 4, 4).tolist() == [[0, 4, 0], [4, 8, 4], [8, 10, 8]]


@given(layout=layouts(), tokens=st.integers(1, 60))
def test_ledger_accepts_the_windows_chunk_by_chunk(layout, tokens):
    """Test-time training scores them in chunks: none is lost, each ends with the window that fills the next `tokens`."""
    sequences, length, stride = layout
    windows = tg.make_windows(sequences, length, stride)
    chunks = tg.group_chunks(windows, tokens)
    assert np.concatenate(chunks).tolist() == windows.tolist()
    for chunk in chunks[:-1]:
        begin, last, end = chunk[0, 2], chunk[-1, 2], chunk[-1, 1]  # positions are what has been scored before them
        assert begin // tokens == last // tokens < end // tokens
    ledger = tg.Ledger(int(sequences[-1, 1]))
    for chunk in chunks:
        ledger.score(chunk)
    ledger.verdict()
