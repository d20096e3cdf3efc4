"""Sums of the scores of pairs, and how far the noise draws leave them uncertain."""

from collections.abc import Mapping, Sequence

import numpy as np

from dtrak_jax.attribution.groups import group_scores, names_hash
from dtrak_jax.attribution.inputs import Array
from dtrak_jax.attribution.scores import Scores
from dtrak_jax.checks import at_least
from dtrak_jax.features.store import Features


class PairSum:
    """Adds up the scores of pairs, and measures their scatter over noise draws.

    Pairs are (timestep, draw), a timestep's R draws one after the other. The sum tau =
    sum_t sum_r tau_tr has the standard error

      SE^2 = sum_t R / (R - 1) sum_r (tau_tr - mean_r tau_tr)^2,

    which is the jackknife's that leaves out a draw at a time within its timestep (Efron
    and Stein 1981, "The jackknife estimate of variance"): without draw r of timestep t
    the others of t count R / (R - 1) times, and tau becomes tau + R / (R - 1) (mean_r
    tau_tr - tau_tr). It is the error of tau as an estimate of sum_t R E[tau_tr], the
    score that many draws at the same timesteps would give, as a sum over as many pairs.
    A draw's kernel is a part of its scatter. Draws must be independent.

    Timesteps whose scores scatter more decide the error, and few draws tell little of it.
    With v_t timestep t's part of SE^2, summed over queries and examples, it has

      freedom = (R - 1) (sum_t v_t)^2 / sum_t v_t^2

    degrees of freedom, from R - 1 to T (R - 1) (Satterthwaite 1946, "An approximate
    distribution of estimates of variance components").

    A group's scores are summed within each draw first, so that its error knows how its
    images' scores vary together.

    Attributes:
      total: tau, float64 [q, n].
    """

    def __init__(
        self, draws: int = 1, columns: Mapping[str, Sequence[str]] | None = None
    ):
        """Begins a sum over pairs of `draws` draws each, 1 if they are not known.

        `columns` has the groups' names for each grouping, [n].
        """
        self.draws, self.pairs = draws, 0
        self.total = self._mean = self._squares = 0.0
        self._by_timestep = []
        # Numbers in the names' order are sorted faster than names.
        self._groups = {
            name: (np.unique(column, return_inverse=True)[1], PairSum(draws))
            for name, column in (columns or {}).items()
        }

    def add(self, tau: np.ndarray) -> None:
        """Adds the scores of the next pair, [q, n]."""
        self.total = self.total + tau
        self.pairs += 1
        if self.draws == 1:
            return
        # Squares about a running mean (Welford 1962), since sums of squares cancel.
        count = (self.pairs - 1) % self.draws + 1
        previous = self._mean if count > 1 else 0.0
        self._mean = previous + (tau - previous) / count
        added = (tau - previous) * (tau - self._mean)
        self._squares = self._squares + added
        self._by_timestep += [0.0] * (count == 1)
        self._by_timestep[-1] += added.sum(axis=1)
        for column, sums in self._groups.values():
            sums.add(group_scores(tau, column)[1])

    @property
    def errors(self) -> np.ndarray | None:
        """The standard error of every sum, float64 [q, n]; None where there is one draw."""
        if self.draws == 1:
            return None
        return np.sqrt(self.draws / (self.draws - 1) * self._squares)

    @property
    def group_errors(self) -> dict[str, np.ndarray]:
        """The standard errors of each grouping's sums, float64 [q, G], by grouping; {}
        where there is one draw."""
        if self.draws == 1:
            return {}
        return {name: sums.errors for name, (_, sums) in self._groups.items()}

    def group_freedom(self, rows: slice = slice(None)) -> dict[str, float]:
        """Returns the degrees of freedom of `group_errors`, by grouping."""
        groups = self._groups.items() if self.draws > 1 else ()
        return {name: sums.freedom(rows) for name, (_, sums) in groups}

    def freedom(self, rows: slice = slice(None)) -> float:
        """Returns the degrees of freedom of the errors of some queries; 0 without errors."""
        parts = np.array([part[rows].sum() for part in self._by_timestep])
        if not parts.any():
            return float(self.pairs - self.pairs // self.draws)
        return float((self.draws - 1) * parts.sum() ** 2 / (parts**2).sum())


def draws_of(sets: Sequence[Array], draws: int | None = None) -> int:
    """Returns the independent noise draws at each timestep of features of some sets.

    It is 1, so that there are no errors, for averaged features; for cyclic noise, where
    neighbouring pairs share their noise; and for arrays, unless `draws` says how many
    their pairs have. Another number than that of `Features`, or one that does not divide
    the number of pairs, is a ValueError.
    """
    shape = sets[0].shape
    made_with = [each.fingerprint for each in sets if isinstance(each, Features)]
    stated = {fingerprint.get("draws", 1) for fingerprint in made_with}
    if draws is not None:
        pairs = shape[0] if len(shape) == 3 else 1
        at_least("draws", draws, 1)
        if pairs % draws or stated - {draws}:
            raise ValueError(
                f"draws is {draws}; it must be that of the features' own task, and "
                f"divide their number of pairs, {pairs}."
            )
    if len(shape) == 2 or any(made.get("noise") == "cyclic" for made in made_with):
        return 1
    return draws or next(iter(stated), 1)


def summed(total: PairSum, rows: slice = slice(None), **fields) -> Scores:
    """Returns the scores of some rows of a sum over pairs, with their errors; `fields` are
    others of `Scores`."""
    errors = total.errors
    return Scores(
        total.total[rows].astype(np.float32),
        errors=None if errors is None else errors[rows].astype(np.float32),
        group_errors={
            names_hash(fields["columns"][name]): array[rows]
            for name, array in total.group_errors.items()
        },
        freedom=total.freedom(rows),
        group_freedom={
            names_hash(fields["columns"][name]): freedom
            for name, freedom in total.group_freedom(rows).items()
        },
        **fields,
    )
