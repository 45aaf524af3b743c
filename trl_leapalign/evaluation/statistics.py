"""Means with standard errors that know that images of one prompt are alike, and the paired test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Estimate:
    """A mean and how far off it may be.

    Args:
        mean (float): NaN if there is nothing to average.
        standard_error (float): NaN if it is not known, as with one prompt.
        degrees (float): of freedom of the standard error.
        num_images (int): how many values the mean is over.
        num_prompts (int): how many different prompts they belong to.
    """

    mean: float
    standard_error: float
    degrees: float
    num_images: int
    num_prompts: int

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the t-test that the mean is 0; NaN if the standard error is not known.

        Raises:
            ImportError: if scipy is not installed (the extra `compare`).
        """
        from scipy import stats

        if self.standard_error == 0:
            return float(self.mean == 0)
        return float(2 * stats.t.sf(abs(self.mean / self.standard_error), self.degrees))

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        return f"{self.mean:.4g}" + ("" if math.isnan(self.standard_error) else f" ± {self.standard_error:.2g}")


UNKNOWN = Estimate(math.nan, math.nan, math.nan, 0, 0)
"""Mean of nothing."""


def clustered_mean(values: Sequence[float], clusters: Sequence[str]) -> Estimate:
    """Average values and give the standard error that is clustered: values of one cluster may depend on each other.

    With x the values, m their mean, N their number and G that of clusters, its square is
    G / (G - 1) · Σ_g (Σ_{i in g} (x_i - m))² / N². With one value a cluster that is the usual one, with equally many it
    is the usual one of the clusters' means.

    Args:
        values (Sequence[float]): length N; NaN are left out.
        clusters (Sequence[str]): what each value belongs to, such as its prompt, length N.

    Returns:
        Estimate: with G - 1 degrees of freedom.
    """
    kept = [(value, cluster) for value, cluster in zip(values, clusters, strict=True) if not math.isnan(value)]
    if not kept:
        return UNKNOWN
    mean = math.fsum(value for value, _ in kept) / len(kept)
    residuals: dict[str, float] = {}
    for value, cluster in kept:
        residuals[cluster] = residuals.get(cluster, 0.0) + value - mean
    count = len(residuals)
    error = math.nan
    if count > 1:
        error = math.sqrt(count / (count - 1) * math.fsum(value**2 for value in residuals.values())) / len(kept)
    return Estimate(mean, error, count - 1 if count > 1 else math.nan, len(kept), count)


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Average the results of runs that differ in their seed alone.

    Args:
        values (Sequence[float]): one a run.

    Returns:
        Estimate: NaN if one of them is not finite.
    """
    if not all(map(math.isfinite, values)):
        return UNKNOWN
    return clustered_mean(values, [str(number) for number in range(len(values))])


def share(count: float, total: int) -> Estimate:
    """The share of independent cases in which something holds.

    Args:
        count (float): cases in which it holds.
        total (int): all cases, at least 1.

    Returns:
        Estimate: with the standard error of the binomial distribution.
    """
    mean = count / total
    return Estimate(mean, math.sqrt(mean * (1 - mean) / total), total - 1 if total > 1 else math.nan, total, total)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Subtract an estimate from another that does not depend on it; its `p_value` is Welch's.

    Args:
        first (Estimate): what is compared.
        second (Estimate): what it is compared with.

    Returns:
        Estimate: of first - second.
    """
    negative = replace(second, mean=-second.mean)
    half = mean_of([first, negative])
    return replace(half, mean=2 * half.mean, standard_error=2 * half.standard_error)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Average estimates that do not depend on each other, each with the same weight.

    Args:
        estimates (Sequence[Estimate]): at least one.

    Returns:
        Estimate: with the degrees of freedom by Welch and Satterthwaite.
    """
    count = len(estimates)
    variances = [estimate.standard_error**2 for estimate in estimates]
    spread = math.fsum(
        variance**2 / estimate.degrees for variance, estimate in zip(variances, estimates, strict=True) if variance
    )
    return Estimate(
        math.fsum(estimate.mean for estimate in estimates) / count,
        math.sqrt(math.fsum(variances)) / count,
        math.fsum(variances) ** 2 / spread if spread else math.fsum(estimate.degrees for estimate in estimates),
        sum(estimate.num_images for estimate in estimates),
        sum(estimate.num_prompts for estimate in estimates),
    )
