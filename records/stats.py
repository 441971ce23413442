"""The statistics of this contest: a few seeds a side, a margin in nats, documents as the unit of the validation set.

Differences are A - B throughout, and lower is better: a negative one means that A is better.
"""
import math
from dataclasses import dataclass

import numpy as np
from scipy import stats as sps

LEVEL = 0.95  # of every interval


@dataclass
class Test:
    """One-sided Welch test of H0 'A is not better than B by more than the margin'."""
    difference: float
    margin: float
    t: float | None
    df: float | None
    p: float | None


def welch(a: list[float], b: list[float], margin: float = 0.0) -> Test:
    """Test H0: mean(A) >= mean(B) - margin. p is None with fewer than two values a side, or without any spread."""
    difference = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2 or np.ptp(a) == 0 == np.ptp(b):
        return Test(difference, margin, None, None, None)
    result = sps.ttest_ind(np.asarray(a, float) + margin, b, equal_var=False, alternative="less")
    return Test(difference, margin, float(result.statistic), float(result.df), float(result.pvalue))


@dataclass
class Interval:
    """A mean with its interval at LEVEL; the bounds are None where one value allows none."""
    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and (self.low > 0 or self.high < 0)


def t_interval(values: list[float]) -> Interval:
    """Student's interval for the mean of a few values."""
    n, middle = len(values), float(np.mean(values))
    if n < 2:
        return Interval(middle, None, None, n)
    half = float(sps.t.ppf(0.5 + LEVEL / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(middle, middle - half, middle + half, n)


def paired(a: dict[int, float], b: dict[int, float]) -> Interval | None:
    """Mean difference over the seeds that both sides have, which share init and data order; None if there are none."""
    seeds = sorted(a.keys() & b.keys())
    return t_interval([a[s] - b[s] for s in seeds]) if seeds else None


@dataclass
class Documents:
    """Per-document losses of one side, averaged over its seeds: nats [N], bytes [N]."""
    nats: np.ndarray
    bytes: np.ndarray
    seeds: int


def read_documents(paths: list) -> Documents:
    """Average files of `nats`, `tokens`, `bytes` in document order; ValueError if they are of different documents."""
    tables = [np.load(p) for p in paths]
    first = tables[0]["bytes"]
    for path, table in zip(paths, tables):
        if not np.array_equal(table["bytes"], first):
            raise ValueError(f"{path}: other documents than {paths[0]}")
        if not np.isfinite(table["nats"]).all() or table["nats"].shape != first.shape:
            raise ValueError(f"{path}: not one finite loss a document")
    return Documents(np.mean([t["nats"] for t in tables], axis=0), first.astype(float), len(paths))


def document_bootstrap(a: Documents, b: Documents, draws: int = 2000, seed: int = 0) -> Interval:
    """Percentile interval of bpb(A) - bpb(B) when documents are drawn anew, the same ones for both sides.

    bpb is a ratio of sums, as the contest defines it, and never a mean over documents. What the interval covers is
    the choice of documents; the seeds' spread is not in it.
    """
    if not np.array_equal(a.bytes, b.bytes):
        raise ValueError("the two sides were scored on different documents")

    def difference(nats_a, nats_b, size, axis=-1):
        return (nats_a.sum(axis) - nats_b.sum(axis)) / size.sum(axis) / math.log(2)

    found = sps.bootstrap((a.nats, b.nats, a.bytes), difference, paired=True, vectorized=True, method="percentile",
                          n_resamples=draws, batch=max(1, 2_000_000 // len(a.nats)), confidence_level=LEVEL,
                          rng=np.random.default_rng(seed))
    low, high = found.confidence_interval
    return Interval(float(difference(a.nats, b.nats, a.bytes)), float(low), float(high), len(a.nats))
