"""records/compare.py and stats.py: the figures against formulas written out here, and every kind of side."""
import json
import math

import numpy as np
import pytest
import records_lab  # noqa: F401  puts records/ on the path

import compare
import runs
import stats
from test_records_foreign import old_log

TOKENS, BYTES = 143_001, 318_739
RATE = TOKENS / BYTES / math.log(2)


def write_run(folder, name, seed, loss, modes=("full", "ttt"), recipe="abc", **more):
    """A finished run's JSONL with the documented keys only."""
    scores = {m: {"val_loss": loss - 0.01 * i, "val_bpb": (loss - 0.01 * i) * RATE, "seconds": 1.0, "verdict": ""} for i, m in enumerate(modes)}
    events = [
        {"event": "config", "t": 0, "recipe": recipe, "source": "0", "world": 1, "seed": seed, "train_batch_tokens": 64},
        {"event": "validation", "t": 0, "documents": 3, "tokens": TOKENS, "bytes": BYTES, "sha256": "f" * 64, "val_docs": 0},
        *({"event": "score", "t": 1, "name": m, **s} for m, s in scores.items()),
        {"event": "result", "t": 2, "run": name, "results": scores, "bytes_total": 10, "failures": [], "seed": seed, "recipe": recipe}]
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({**e, **more}) + "\n" for e in events))
    return path


@pytest.fixture
def sides(tmp_path):
    """A is .02 nats better than B at the same seeds, with a spread of its own."""
    for seed, shift in ((1, 0.0), (2, 0.004), (3, -0.002)):
        write_run(tmp_path / "a", f"a{seed}", seed, 3.00 + shift)
        write_run(tmp_path / "b", f"b{seed}", seed, 3.02 + 1.1 * shift)
    return tmp_path


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------
def test_welch_by_hand():
    """t and df by Welch's own formulas; p of two values a side and equal variances is that of the textbook's table."""
    a, b, margin = [1.00, 1.02, 1.01], [1.05, 1.06, 1.10, 1.07], 0.01
    va, vb = np.var(a, ddof=1) / 3, np.var(b, ddof=1) / 4
    found = stats.welch(a, b, margin)
    assert found.t == pytest.approx((np.mean(a) + margin - np.mean(b)) / math.sqrt(va + vb))
    assert found.df == pytest.approx((va + vb) ** 2 / (va ** 2 / 2 + vb ** 2 / 3))
    assert found.difference == pytest.approx(-0.06) and found.margin == margin
    # df 2: the distribution function of t is 1/2 + t / (2 sqrt(2 + t^2))
    two = stats.welch([0.0, 1.0], [2.0, 3.0])
    assert two.df == pytest.approx(2) and two.p == pytest.approx(0.5 - 2 * math.sqrt(2) / (2 * math.sqrt(2 + 8)))


def test_margin_makes_it_harder():
    a, b = [1.0, 1.001, 0.999], [1.004, 1.005, 1.003]
    assert stats.welch(a, b).p < 0.01 < stats.welch(a, b, 0.0035).p < 0.5 < stats.welch(a, b, 0.0045).p


@pytest.mark.parametrize("a, b", [([1.0], [1.1, 1.2]), ([1.0, 1.0], [1.1, 1.1])])
def test_no_p_without_spread(a, b):
    assert stats.welch(a, b).p is None


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [i.low <= 0 <= i.high for i in (stats.t_interval(list(x)) for x in rng.normal(size=(2000, 3)))]
    assert 0.935 < np.mean(inside) < 0.965


def test_pairing_takes_out_what_seeds_share():
    seeds = {1: 0.0, 2: 0.5, 3: -0.4}
    found = stats.paired({s: x - 0.01 for s, x in seeds.items()}, {**seeds, 9: 7.0})
    assert found.n == 3 and found.decided and found.mean == pytest.approx(-0.01) and found.high < 0
    assert stats.paired({1: 0.0}, {2: 0.0}) is None and stats.paired({1: 1.0}, {1: 0.5}).low is None


def documents(tmp_path, name, nats, size):
    path = tmp_path / name
    np.savez(path, nats=nats, tokens=size // 2, bytes=size)
    return path


def test_document_bootstrap_against_the_delta_method(tmp_path):
    """A ratio of sums has a standard error in closed form; the percentile interval is twice 1.96 of it."""
    rng = np.random.default_rng(1)
    size = rng.integers(200, 20_000, 4000)
    nats_b = 0.7 * size + rng.normal(0, 30, 4000)
    nats_a = nats_b + rng.normal(-1, 8, 4000)
    sides = [stats.read_documents([documents(tmp_path, f"{n}.npz", x, size)]) for n, x in (("a", nats_a), ("b", nats_b))]
    found = stats.document_bootstrap(*sides)
    ratio = (nats_a - nats_b).sum() / size.sum()
    error = np.sqrt(((nats_a - nats_b - ratio * size) ** 2).sum()) / size.sum() / math.log(2)
    assert found.mean == pytest.approx(ratio / math.log(2)) and found.n == 4000
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert stats.document_bootstrap(*sides) == found, "the draws are seeded"


def test_documents_are_averaged_over_seeds(tmp_path):
    size = np.array([10, 20])
    paths = [documents(tmp_path, f"{i}.npz", np.array(x), size) for i, x in enumerate(([1.0, 2.0], [3.0, 6.0]))]
    assert stats.read_documents(paths).nats.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("nats, size", [([1.0, 2.0], [10, 21]), ([1.0, math.nan], [10, 20]), ([1.0], [10, 20])])
def test_other_documents_are_refused(tmp_path, nats, size):
    good = documents(tmp_path, "good.npz", np.array([1.0, 2.0]), np.array([10, 20]))
    with pytest.raises(ValueError):
        stats.read_documents([good, documents(tmp_path, "bad.npz", np.array(nats), np.array(size))])


# ----------------------------------------------------------------------------------------------------------------------
# compare
# ----------------------------------------------------------------------------------------------------------------------
def test_comparison(sides):
    r = compare.compare(compare.side(str(sides / "a"), None), compare.side(str(sides / "b"), None))
    assert r["a"]["n"] == r["b"]["n"] == 3 and r["same_tokenizer"]
    assert r["nats"]["zero"]["difference"] == pytest.approx(-0.02 - 0.1 * 0.002 / 3)
    assert r["bpb"]["zero"]["difference"] == pytest.approx(r["nats"]["zero"]["difference"] * RATE)
    assert r["margin_bpb"] == pytest.approx(0.005 * RATE)
    # a linear change of unit changes no p
    assert r["bpb"]["margin"]["p"] == pytest.approx(r["nats"]["margin"]["p"]) and r["bpb"]["zero"]["p"] < r["bpb"]["margin"]["p"] < 0.01
    assert r["paired_seeds"] == [1, 2, 3] and r["paired"]["high"] < 0 and "documents" not in r


def test_what_is_printed(sides, capsys):
    assert compare.main([str(sides / "a"), str(sides / "b")]) == 0
    out = capsys.readouterr().out
    assert f"0.005 nats a token = {0.005 * RATE:.6f} bpb" in out and out.count("< .01") == 4
    assert "H0 'A is not better than B by more than the margin'" in out and "seeds [1, 2, 3]" in out


def test_the_result_or_a_named_pass(sides):
    assert compare.side(str(sides / "a"), None).loss[1] == pytest.approx(2.99)
    assert compare.side(str(sides / "a"), "full").loss[1] == pytest.approx(3.00)
    with pytest.raises(runs.Unreadable, match=r"no score named sliding; it has full 1\.\d+, ttt 1\.\d+"):
        compare.side(str(sides / "a"), "sliding")


@pytest.mark.parametrize("more, modes, expected", [
    ({}, ("ttt", "full"), "ttt"), ({}, ("sliding", "full"), "sliding"), ({}, ("full",), "full"),
    ({"headline": "full"}, ("full", "ttt"), "full"),  # the run's own word goes before the order of the passes
    ({"ttt_enabled": True}, ("full", "sliding"), None),  # what was asked for is missing: nothing stands in for it
    ({"ttt_enabled": False, "sliding_window_enabled": True}, ("full", "sliding"), "sliding")])
def test_a_runs_result_is_the_pass_that_was_meant(tmp_path, more, modes, expected):
    """Later passes of `modes` score lower: neither the place in the log nor the number decides."""
    run = runs.load(write_run(tmp_path, "x", 1, 3.0, modes, **more))
    assert runs.result_pass(run) == expected
    assert (run.final.bpb if run.final else None) == (run.scores[expected].bpb if expected else None)


def test_a_text_log_follows_the_score_file_beside_it(tmp_path):
    """Without its JSONL a log has two files: the text, and RUN_ID.score.json, which may name the pass."""
    text = ("run_id:x mode:train preset:smoke recipe:abc seed:1\n"
            "final_int6_roundtrip_exact val_loss:3.00000000 val_bpb:2.00000000\n"
            "final_int6_ttt_exact val_loss:2.00000000 val_bpb:1.50000000\n")
    (tmp_path / "x.txt").write_text(text)
    assert runs.result_pass(runs.load(tmp_path / "x.txt")) == "ttt"
    (tmp_path / "x.score.json").write_text(json.dumps({"headline": "full"}))
    assert runs.load(tmp_path / "x.txt").final.loss == 3
    (tmp_path / "x.score.json").write_text(json.dumps({"headline": "full", "finished": False}))
    assert runs.load(tmp_path / "x.txt").final.loss == 2


def test_what_cannot_be_decided_is_listed(sides, capsys):
    write_run(sides / "c", "c1", 1, 3.0, ("full",), ttt_enabled=True)
    assert compare.main([str(sides / "c"), str(sides / "b")]) == 2
    assert "undecided which score is the result (--mode names one); it has full 1.94177838" in capsys.readouterr().err
    assert compare.main([str(sides / "c"), str(sides / "b"), "--mode", "full"]) == 0


def test_sides_of_different_passes_are_named(sides, capsys):
    write_run(sides / "c", "c1", 1, 3.0, ("full",))
    compare.main([str(sides / "c"), str(sides / "b")])
    out = capsys.readouterr().out
    assert "; pass full)" in out and "; pass ttt)" in out and "differently named passes" in out


def test_a_side_is_a_file_a_glob_or_a_run_id(sides):
    assert list(compare.side(str(sides / "a" / "a2.jsonl"), None).bpb) == [2]
    assert list(compare.side(str(sides / "a" / "a2"), None).bpb) == [2]
    assert sorted(compare.side(str(sides / "*" / "a[23].jsonl"), None).bpb) == [2, 3]


def test_unfinished_runs_do_not_count(sides):
    file = sides / "a" / "a1.jsonl"
    file.write_text(file.read_text().rpartition('{"event": "result"')[0])
    assert sorted(compare.side(str(sides / "a"), None).bpb) == [2, 3]


@pytest.mark.parametrize("spoil, words", [
    (lambda f: write_run(f / "a", "again", 1, 3.0), "two runs of seed 1"), (lambda f: (f / "a" / "a1.jsonl").write_text("{]\n"), "is no JSON"),
    (lambda f: [p.unlink() for p in (f / "a").iterdir()], "no run there")])
def test_unusable_sides(sides, spoil, words, capsys):
    spoil(sides)
    assert compare.main([str(sides / "a"), str(sides / "b")]) == 2
    assert words in capsys.readouterr().err


def test_documents_beside_the_runs(sides, capsys):
    rng = np.random.default_rng(2)
    size = rng.integers(100, 1000, 300)
    for name, shift in (("a", -2.0), ("b", 0.0)):
        for seed in (1, 2, 3):
            documents(sides / name, f"{name}{seed}.ttt.docs.npz", 0.7 * size + shift + rng.normal(0, 1, 300), size)
    r = compare.compare(compare.side(str(sides / "a"), None), compare.side(str(sides / "b"), None))
    assert r["documents"]["n"] == 300 and r["documents"]["high"] < 0
    assert r["documents"]["mean"] == pytest.approx(-2 * 300 / size.sum() / math.log(2), rel=0.1)
    # the pass that is compared is the one whose documents count
    assert "documents" not in compare.compare(compare.side(str(sides / "a"), "full"), compare.side(str(sides / "b"), "full"))


def test_other_tokenizers_compare_in_bits_a_byte_only(sides):
    for i, loss in enumerate((2.06, 2.07, 2.08)):
        (sides / f"train_seed{i}.log").write_text(old_log(i, loss))
    other = compare.side(str(sides / "train_seed*.log"), None)
    r = compare.compare(compare.side(str(sides / "a"), None), other)
    assert not r["same_tokenizer"] and "nats" not in r and r["margin_bpb"] == pytest.approx(0.005 * max(RATE, other.rate))


def test_a_records_logs_in_a_sub_folder_are_read(sides, capsys):
    folder = sides / "2026-01-01_Record"
    (folder / "logs").mkdir(parents=True)
    for seed in (1, 2):
        (folder / "logs" / f"train_seed{seed}.log").write_text(old_log(seed, 2.07))
    (folder / "submission.json").write_text(json.dumps({"val_bpb": 1.0, "val_loss": 2.0}))
    side = compare.side(str(folder), None)
    assert sorted(side.bpb) == [1, 2] and side.loss == {1: 2.07, 2: 2.07} and side.source == "logs"


def test_a_record_without_logs_is_read_from_its_json(sides, capsys):
    folder = sides / "2026-01-01_Record"
    folder.mkdir()
    scores = {"42": {"val_bpb": 1.0611, "val_loss": 2.3221}, "0": {"val_bpb": 1.0605, "val_loss": 2.3208}}
    (folder / "submission.json").write_text(json.dumps({"val_bpb": 1.0608, "val_loss": 2.32145, "seed_results": scores}))
    side = compare.side(str(folder), None)
    assert side.bpb == {42: 1.0611, 0: 1.0605} and side.rate == pytest.approx(1.0608 / 2.32145)
    assert compare.main([str(folder), str(sides / "a")]) == 0
    assert capsys.readouterr().out.count("these are the word of its submission.json") == 1
    (folder / "submission.json").write_text(json.dumps({"val_bpb": 1.0608}))
    assert compare.main([str(folder), str(sides / "a")]) == 2
