"""The follower: closed form, linear program and dual against one another and against a brute-force transport problem."""
import json
import math

import numpy as np
import pytest
from conftest import dump, jsonl, ok, run
from hypothesis import given, settings, strategies as st
from scipy.optimize import linprog

from dro import relative_gap, solve_exact, solve_lp, surrogate, tangents

CONFIDENCES = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=25).map(np.array)
RADII = st.sampled_from([0.0, 1.0, 1.5]) | st.floats(0, 0.3)


@settings(max_examples=300, deadline=None)
@given(CONFIDENCES, RADII, st.integers(1, 50), st.sampled_from([0.0, 0.1]))
def test_exact_equals_lp_equals_dual(xi, epsilon, pieces, a):
    xi = a + (1 - a) * xi
    curve = tangents(pieces)
    exact, lp = (solve(xi, *curve, epsilon, a=a) for solve in (solve_exact, solve_lp))
    rounding = 1e-9 * pieces  # HiGHS meets each constraint to 1e-10, and a unit of ξ is worth up to K units of loss
    assert abs(exact.value - lp.value) < rounding and relative_gap(exact.value, exact.dual) < 1e-10
    assert exact.dual <= lp.dual + rounding  # λ* minimises the dual, and so does the LP's
    for solution in (exact, lp):
        totals = np.bincount(solution.owner, solution.weight, minlength=len(xi))
        np.testing.assert_allclose(totals, 1, atol=1e-9)
        assert (solution.weight >= 0).all() and solution.transport <= epsilon + 1e-9
        places = xi[solution.owner] - solution.shift
        assert places.min() >= a - 1e-7 and places.max() <= 1 + 1e-7
        attained = (solution.weight * surrogate(places, *curve)).sum() / len(xi)
        assert abs(attained - solution.value) < rounding
        assert (solution.weight * abs(solution.shift)).sum() / len(xi) == pytest.approx(solution.transport, abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_against_brute_force_transport(seed):
    """The discretised problem itself: a transport plan from every pair to every point of a grid that has a and all ξ in it."""
    dice = np.random.default_rng(seed)
    n, pieces, epsilon = 12, 6, dice.uniform(0.01, 0.3)
    xi = np.round(dice.random(n), 2)
    grid = np.arange(0, 101) / 100
    cost = abs(xi[:, None] - grid)
    gain = np.tile(surrogate(grid, *tangents(pieces)), (n, 1))
    plan = linprog(-gain.ravel() / n, A_ub=cost.ravel()[None] / n, b_ub=[epsilon], A_eq=np.kron(np.eye(n), np.ones(101)), b_eq=np.ones(n))
    assert solve_exact(xi, *tangents(pieces), epsilon).value == pytest.approx(-plan.fun, abs=1e-9)


def test_by_hand():
    """ξ = ½, 1 and K = 1: ℓ̃(ξ) = 1 − ξ. A budget of 2 · 0.25 moves the first pair from ½ to 0 and leaves the second."""
    s = solve_exact(np.array([1.0, 0.5]), *tangents(1), 0.25)
    assert s.owner.tolist() == [0, 1] and s.weight.tolist() == [1, 1] and s.shift.tolist() == [0, 0.5]
    assert (s.value, s.lam, s.transport) == (0.5, 1.0, 0.25)
    split = solve_exact(np.array([1.0, 0.5]), *tangents(1), 0.125)  # half of it
    assert split.owner.tolist() == [0, 1, 1] and split.weight.tolist() == [1, 0.5, 0.5] and split.shift.tolist() == [0, 0, 0.5]


@pytest.mark.parametrize("pieces", [1, 5, 6, 7, 50])
def test_tangents_lie_under_minus_log_and_touch_it(pieces):
    x = np.linspace(1e-3, 1, 2000)
    curve = tangents(pieces)
    assert (surrogate(x, *curve) <= -np.log(x) + 1e-12).all()
    knots = np.arange(1, pieces + 1) / pieces
    np.testing.assert_allclose(surrogate(knots, *curve), -np.log(knots), atol=1e-12)
    assert surrogate(np.float64(0), *curve) == pytest.approx(1 + math.log(pieces))


@settings(max_examples=100, deadline=None)
@given(CONFIDENCES, st.floats(0, 0.3), st.floats(0, 0.3), st.integers(1, 20), st.randoms())
def test_properties(xi, one, two, pieces, dice):
    curve, low, high = tangents(pieces), *sorted((one, two))
    value = solve_exact(xi, *curve, low).value
    assert value <= solve_exact(xi, *curve, high).value + 1e-12                       # grows with ε
    assert value <= solve_exact(xi, *tangents(2 * pieces), low).value + 1e-12         # and with more tangents
    assert solve_exact(xi, *curve, 0).value == pytest.approx(surrogate(xi, *curve).mean())
    assert solve_exact(xi, *curve, 1.0).value == pytest.approx(1 + math.log(pieces))  # all mass at a
    shuffled = xi.copy()
    dice.shuffle(shuffled)
    assert solve_exact(shuffled, *curve, low).value == pytest.approx(value, abs=1e-12)


def labelled(margins) -> list[dict]:
    return [{"id": str(i), "prompt": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b", "margin": m,
             "chosen_logp": -1.0, "rejected_logp": -2.0} for i, m in enumerate(margins)]


@pytest.mark.parametrize("solver", ["exact", "lp"])
def test_stage(tmp_path, solver):
    pairs = dump(tmp_path / "labelled.jsonl", labelled(np.random.default_rng(0).exponential(1, 60)))
    ok(run("dro.py", "--pairs", pairs, "--out", tmp_path / "worst.jsonl", "--epsilon", "0.02", "--solver", solver))
    stats = json.load(open(tmp_path / "worst.jsonl.stats.json"))
    assert stats["n"] == 60 and stats["moved"] >= 1 and abs(stats["gap"]) < 1e-8 and stats["transport"] == pytest.approx(0.02)
    rows = jsonl(tmp_path / "worst.jsonl")
    assert all(r["xi"] == pytest.approx(1 / (1 + math.exp(-r["margin"]))) for r in rows)
    assert all(sum(w for w, _ in r["atoms"]) == pytest.approx(1) for r in rows)


@pytest.mark.parametrize("flags", [["--epsilon", "-0.1"], ["--epsilon", "nan"], ["--pieces", "0"]])
def test_bad_flags(tmp_path, flags):
    pairs = dump(tmp_path / "labelled.jsonl", labelled([0.5]))
    done = run("dro.py", "--pairs", pairs, "--out", tmp_path / "worst.jsonl", *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
