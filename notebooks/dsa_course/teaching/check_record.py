"""Notebook 13: what a recorded difference is worth, given its errors and its seeds."""

from ..checking import Check, expect, expect_number

verdict = Check("verdict")  # (ratios, errors), a float for each seed -> 1, -1 or 0


def verdict_of(ratios, errors) -> int:
    """The right verdict: 1 above, -1 below, 0 where chance would do; one float a seed in both."""
    both = list(zip(ratios, errors, strict=True))
    if len(both) > 1 and all(ratio - 2 * error > 1 for ratio, error in both):
        return 1
    return -1 if len(both) > 1 and all(ratio + 2 * error < 1 for ratio, error in both) else 0


def _expect(solution, ratios, errors, cause):
    got, wanted = expect_number(solution(list(ratios), list(errors))), verdict_of(ratios, errors)
    expect(got == wanted, f"ratios {list(ratios)}, errors {list(errors)}: got {got:g}, expected {wanted}", cause)


@verdict.property("clear cases")
def verdict_clear_cases(solution):
    small = [0.001] * 3
    _expect(solution, [1.02, 1.03, 1.025], small, "higher at every seed by far more than its errors: 1")
    _expect(solution, [0.97, 0.96, 0.975], small, "lower at every seed by far more than its errors: -1")
    _expect(solution, [1.0, 1.0, 1.0], small, "no difference at all: 0")


@verdict.property("two errors")
def verdict_two_errors(solution):
    cause = "chance gives differences of up to two errors: a ratio must be further than that from 1, however many seeds"
    for far, near in ((1.004, 1.001), (1.04, 1.01)):
        for ratio, error in ((far, 0.0018), (far, 0.0022), (near, 0.0018), (near, 0.0003)):
            _expect(solution, [ratio] * 3, [error] * 3, cause)
            _expect(solution, [2 - ratio] * 3, [error] * 3, cause)
    cause = "an error is that of the ratio as it stands: neither times the ratio nor divided by it"
    for error in (0.7, 0.8):
        _expect(solution, [2.5] * 3, [error] * 3, cause)
    cause = "more than two errors: neither just two nor a little less, such as 1.96"
    for distance in (0.25, 0.248, 0.252):  # of errors of 0.125, so that 1.25 and 0.75 are two away to the last bit
        _expect(solution, [1 + distance] * 3, [0.125] * 3, cause)
        _expect(solution, [1 - distance] * 3, [0.125] * 3, cause)


@verdict.property("every seed")
def verdict_every_seed(solution):
    cause = "one seed that does not show it is enough for 0: neither the mean nor the best seed decides"
    for odd in (0.998, 1.0, 1.0015):
        for place in range(4):
            ratios = [1.05] * 4
            ratios[place] = odd
            _expect(solution, ratios, [0.001] * 4, cause)
            _expect(solution, [2 - ratio for ratio in ratios], [0.001] * 4, cause)


@verdict.property("each seed's own error")
def verdict_each_seeds_own_error(solution):
    cause = (
        "each seed is judged by its own error: neither by their mean nor by the least, the largest or another seed's"
    )
    for place in range(3):
        for error in (0.004, 0.006):  # of one seed; that of the others is small
            errors = [0.001] * 3
            errors[place] = error
            _expect(solution, [1.01] * 3, errors, cause)
            _expect(solution, [0.99] * 3, errors, cause)
            for far in range(3):  # and one ratio is far from 1, that seed's or another's
                ratios = [1.01] * 3
                ratios[far] = 1.05
                _expect(solution, ratios, errors, cause)
                _expect(solution, [2 - ratio for ratio in ratios], errors, cause)


@verdict.property("one seed")
def verdict_one_seed(solution):
    cause = "one seed cannot say what another would have given: 0"
    for ratio in (1.5, 0.5):
        _expect(solution, [ratio], [0.001], cause)
    _expect(solution, [1.5, 1.4], [0.001, 0.001], "two seeds are enough here")
