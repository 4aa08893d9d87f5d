"""The follower: closed form, linear program and dual against one another and against a brute-force
transport problem."""
import math

import numpy as np
import pytest
import torch
from conftest import dump, jsonl, ok, one_line, run, stats_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.special import expit

from core.rows import answer_turn
from dro import average, gap, maximum_of, solve_exact, solve_lp, tangents
from train import loss_star

CONFIDENCES = st.lists(
    st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=25).map(np.array)
RADII = st.sampled_from([0.0, 1.0, 1.5]) | st.floats(0, 0.3)


def exact_of(xi, loss, epsilon):
    """The closed form for a loss that is a function."""
    return solve_exact(xi, loss(xi), float(loss(np.zeros(1))[0]), epsilon)


def surrogate(pieces):
    """ℓ̃ as a function."""
    return lambda x: maximum_of(*tangents(pieces), x)


def check(solution, xi, loss, epsilon, rounding):
    """What every solution must satisfy, recomputed from its atoms."""
    owner, weight, shift = solution[:3]
    np.testing.assert_allclose(np.bincount(owner, weight, minlength=len(xi)), 1, atol=1e-9)
    assert weight.min() >= 0 and shift.min() >= 0 and (np.diff(owner) >= 0).all()
    places = xi[owner] - shift
    assert places.min() >= 0
    assert weight @ loss(places) / len(xi) == pytest.approx(solution.value, abs=rounding)
    assert weight @ shift / len(xi) == pytest.approx(solution.transport, abs=1e-9)
    assert solution.transport <= epsilon + 1e-9


@settings(max_examples=200, deadline=None)
@given(CONFIDENCES, RADII, st.integers(1, 50))
def test_exact_equals_lp_equals_dual(xi, epsilon, pieces):
    lines = tangents(pieces)
    # HiGHS meets each constraint to 1e-10 and leaves a variable of 1e-9 at 0; a unit of ξ is worth
    # as many units of loss as the steepest slope says.
    rounding = 2e-9 * max(1, abs(lines[0]).max())
    exact = exact_of(xi, lambda x: maximum_of(*lines, x), epsilon)
    program = solve_lp(xi, *lines, epsilon)
    assert abs(exact.value - program.value) < rounding
    assert gap(exact.value, exact.dual) < 1e-10
    assert exact.dual <= program.dual + rounding  # λ* minimises the dual, and so does the LP's
    for solution in (exact, program):
        check(solution, xi, lambda x: maximum_of(*lines, x), epsilon, rounding)


@pytest.mark.parametrize("seed", range(8))
def test_against_brute_force_transport(seed):
    """The discretised problem itself: a transport plan from every pair to every point of a grid
    that has 0 and all ξ in it. The atoms for ℓ̃ are the worst case of ℓ* too."""
    dice = np.random.default_rng(seed)
    n, epsilon = 12, dice.uniform(0.01, 0.3)
    xi = np.round(dice.random(n), 2)
    grid = np.arange(0, 101) / 100
    atoms = exact_of(xi, surrogate(6), epsilon)
    for loss in (surrogate(6), lambda x: loss_star(torch.from_numpy(x), 6).numpy()):
        plan = linprog(-np.tile(loss(grid), n) / n, b_ub=[epsilon],
                       A_ub=abs(xi[:, None] - grid).ravel()[None] / n,
                       A_eq=np.kron(np.eye(n), np.ones(101)), b_eq=np.ones(n))
        assert exact_of(xi, loss, epsilon).value == pytest.approx(-plan.fun, abs=1e-9)
        attained = atoms.weight @ loss(xi[atoms.owner] - atoms.shift) / n
        assert attained == pytest.approx(-plan.fun, abs=1e-9)


def test_by_hand():
    """ξ = ½, 1 and K = 1: ℓ̃(ξ) = 1 − ξ. A budget of 2 · 0.25 moves the first pair from ½ to 0 and
    leaves the second."""
    xi = np.array([1.0, 0.5])
    moved = exact_of(xi, surrogate(1), 0.25)
    assert [part.tolist() for part in moved[:3]] == [[0, 1], [1, 1], [0, 0.5]]
    assert (moved.value, moved.price, moved.transport) == (0.5, 1.0, 0.25)
    split = exact_of(xi, surrogate(1), 0.125)  # half of it
    assert [part.tolist() for part in split[:3]] == [[0, 1, 1], [1, 0.5, 0.5], [0, 0, 0.5]]


@pytest.mark.parametrize("pieces", [1, 5, 6, 50])
def test_tangents_lie_under_loss_star_and_touch_it(pieces):
    x = np.linspace(1e-3, 1, 2000)
    knots = np.arange(1, pieces + 1) / pieces
    np.testing.assert_allclose(surrogate(pieces)(knots), -np.log(knots), atol=1e-12)
    star = loss_star(torch.from_numpy(x), pieces).numpy()
    assert (surrogate(pieces)(x) <= star + 1e-12).all() and (star <= -np.log(x) + 1e-12).all()
    np.testing.assert_allclose(star[x >= 1 / pieces], -np.log(x[x >= 1 / pieces]))


@settings(max_examples=100, deadline=None)
@given(CONFIDENCES, st.floats(0, 0.3), st.integers(1, 20), st.integers(1, 9))
def test_groups_are_never_stronger(xi, epsilon, pieces, group):
    loss = surrogate(pieces)
    parts = np.split(xi, range(group, len(xi), group))
    grouped = average(list(map(len, parts)), [exact_of(part, loss, epsilon) for part in parts])
    assert grouped.value <= exact_of(xi, loss, epsilon).value + 1e-12
    assert gap(grouped.value, grouped.dual) < 1e-10
    check(grouped, xi, loss, epsilon, 1e-9)


def labelled(margins) -> list[dict]:
    return [{"id": str(i), "prompt": [{"role": "user", "content": "x"}],
             "chosen": answer_turn("a"), "rejected": answer_turn("b"), "margin": m,
             "chosen_logp": -1.0, "rejected_logp": -2.0}
            for i, m in enumerate(margins)]


@pytest.mark.parametrize("solver", ["exact", "lp"])
@pytest.mark.parametrize("extra", [[], ["--group", "7"], ["--pieces", "5", "--epsilon", "0.1"],
                                   ["--epsilon", "0"]])
def test_stage(tmp_path, solver, extra):
    rows = labelled(np.random.default_rng(1).exponential(1, 40))
    out = tmp_path / "worst.jsonl"
    command = ["--epsilon", "0.02", "--solver", solver, *extra]
    ok(run("dro.py", "--pairs", dump(tmp_path / "l.jsonl", rows), "--out", out, *command))
    stats, worst = stats_of(out), jsonl(out)
    added = ("xi", "atoms", "pieces")
    assert [{k: v for k, v in row.items() if k not in added} for row in worst] == rows
    epsilon, pieces = (stats["settings"][key] for key in ("epsilon", "pieces"))
    assert (stats["n"], stats["transport"]) == (40, pytest.approx(epsilon, abs=1e-9))
    assert abs(stats["gap"]) < 1e-8 and (stats["moved"] == 0) == (epsilon == 0)
    for row in worst:
        assert row["xi"] == pytest.approx(expit(row["margin"])) and row["pieces"] == pieces
    assert stats["empirical_loss"] <= stats["worst_case_loss"] + 1e-9
    # its own output is fine as input
    ok(run("dro.py", "--pairs", out, "--out", tmp_path / "again.jsonl", *command))
    assert jsonl(tmp_path / "again.jsonl") == worst


@pytest.mark.parametrize("margin, flags, words", [
    (0.5, ["--epsilon", "-0.1"], "at least 0"), (0.5, ["--epsilon", "nan"], "--epsilon"),
    (0.5, ["--pieces", "0"], "at least 1"), (0.5, ["--group", "0"], "--group"),
    *((margin, [], "1: 'margin' must be \"number ≥ 0\"") for margin in (math.nan, -0.5, "1"))])
def test_bad_flags_and_margins(tmp_path, margin, flags, words):
    pairs = dump(tmp_path / "labelled.jsonl", labelled([margin]))
    one_line(run("dro.py", "--pairs", pairs, "--out", tmp_path / "worst.jsonl", *flags), words)


def test_margins_that_are_not_against_init_are_refused_where_they_are_used(tmp_path):
    """D10: with ε > 0; with ε = 0 nothing uses them."""
    of = {"judge": "implicit", "reference": "previous", "beta": 0.1, "length_penalty": 0}
    rows = [{**row, "margin_of": of} for row in labelled([0.1, 0.2])]
    command = ["dro.py", "--out", tmp_path / "w.jsonl", "--pairs"]
    pairs = dump(tmp_path / "l.jsonl", rows)
    one_line(run(*command, pairs), "reference", "id '0'")
    ok(run(*command, pairs, "--epsilon", "0"))
