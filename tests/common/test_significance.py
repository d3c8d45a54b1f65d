"""Probabilities of differences against tables, enumeration, and simulation by counting."""

from __future__ import annotations

import itertools
import math

import pytest

from shortstack.common.significance import ENOUGH_CHANGED, fisher_p, normal_p, sign_p, student_errors, student_p


@pytest.mark.parametrize(
    ("items", "errors"),
    [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (10, 2.262), (11, 2.228), (31, 2.042), (61, 2.000)],
)
def test_student_equals_the_printed_tables(items: int, errors: float) -> None:
    assert student_errors(items) == pytest.approx(errors, abs=6e-4)
    assert student_p(errors, items) == pytest.approx(0.05, abs=1e-4)
    assert student_p(-errors, items) == student_p(errors, items)


def test_student_of_many_items_is_normal_and_of_one_says_nothing() -> None:
    assert student_errors(5000) == pytest.approx(1.959964, abs=1e-5)
    assert student_p(1.5, 990) == pytest.approx(normal_p(1.5), abs=1e-3)
    assert student_p(1.5, 1001) == pytest.approx(student_p(1.5, 1002), abs=5e-4), "the two branches meet"
    assert (student_p(0.0, 9), student_p(math.inf, 9), student_p(100.0, 1)) == (1.0, 0.0, 1.0)


def enumerated(groups: list[tuple[int, int, float]]) -> float:
    """Every way in which the rows that changed could have changed."""
    weights = [weight for right, wrong, weight in groups for _ in range(right + wrong)]
    observed = abs(sum(weight * (right - wrong) for right, wrong, weight in groups))
    ways = [
        abs(sum(sign * weight for sign, weight in zip(signs, weights, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(weights))
    ]
    return sum(way >= observed - 1e-9 for way in ways) / len(ways)


@pytest.mark.parametrize(
    "groups",
    [
        [(3, 0, 0.1)], [(5, 0, 0.1)], [(6, 0, 0.1)], [(4, 4, 1.0)], [(7, 1, 0.01)], [],
        [(3, 1, 0.1), (2, 0, 0.05), (0, 0, 1.0)], [(2, 1, 1 / 3), (2, 2, 1 / 7), (3, 0, 1 / 11)],
    ],
)  # fmt: skip
def test_the_sign_test_is_every_way_counted(groups: list[tuple[int, int, float]]) -> None:
    assert sign_p(groups) == pytest.approx(enumerated(groups))


def test_three_rows_are_noise_and_six_of_one_kind_are_not() -> None:
    assert sign_p([(3, 0, 0.1)]) == 0.25
    assert sign_p([(5, 0, 0.1)]) == 0.0625
    assert sign_p([(6, 0, 0.1)]) == 0.03125


def test_the_normal_approximation_begins_where_it_holds() -> None:
    for right in range(ENOUGH_CHANGED // 2, ENOUGH_CHANGED + 1):
        wrong = ENOUGH_CHANGED - right
        exact = min(
            1.0, 2 * sum(math.comb(ENOUGH_CHANGED, k) for k in range(right, ENOUGH_CHANGED + 1)) / 2**ENOUGH_CHANGED
        )
        assert sign_p([(right, wrong, 1.0)]) == pytest.approx(exact, abs=0.17)
        assert (sign_p([(right, wrong, 1.0)]) > 0.05) == (exact > 0.05), "the two agree about what is noise"


def test_fisher_equals_the_printed_example() -> None:
    """The tea with milk: three of four cups of each kind."""
    assert fisher_p((3, 1), (4, 4)) == pytest.approx(0.4857, abs=1e-4)
    assert fisher_p((4, 0), (4, 4)) == pytest.approx(2 / 70)
    assert fisher_p((0, 0), (5, 5)) == 1.0
    assert fisher_p((3, 6), (10, 10)) == pytest.approx(0.3698, abs=1e-4)
