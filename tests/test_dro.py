"""The follower: closed form, linear program and dual against one another and against a brute-force
transport problem."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.special import expit

from conftest import dump, jsonl, ok, run
from dro import Loss, gap, maximum_of, loss_star, solve_exact, average, solve_lp, tangents

CONFIDENCES = st.lists(
    st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=25
).map(np.array)
RADII = st.sampled_from([0.0, 1.0, 1.5]) | st.floats(0, 0.3)


def lines(pieces: int):
    return tangents(loss_star(pieces), np.arange(1, pieces + 1) / pieces)


def check(solution, xi, loss, epsilon, a, b, rounding):
    """What every solution must satisfy, recomputed from its atoms."""
    np.testing.assert_allclose(
        np.bincount(solution.owner, solution.weight, minlength=len(xi)), 1, atol=1e-9
    )
    assert (
        (solution.weight >= 0).all()
        and solution.transport <= epsilon + 1e-9
        and (np.diff(solution.owner) >= 0).all()
    )
    places = xi[solution.owner] - solution.shift
    assert places.min() >= a - 1e-7 and places.max() <= b + 1e-7
    assert abs((solution.weight * loss.value(places)).sum() / len(xi) - solution.value) < rounding
    assert (solution.weight * abs(solution.shift)).sum() / len(xi) == pytest.approx(
        solution.transport, abs=1e-9
    )


@settings(max_examples=300, deadline=None)
@given(CONFIDENCES, RADII, st.integers(1, 50), st.sampled_from([0.0, 0.1]))
def test_exact_equals_lp_equals_dual(xi, epsilon, pieces, a):
    xi, curve = a + (1 - a) * xi, lines(pieces)
    exact, lp = (
        solve_exact(xi, maximum_of(*curve), epsilon, a),
        solve_lp(xi, *curve, epsilon, a, 1.0),
    )
    # HiGHS meets each constraint to 1e-10 and leaves a variable of 1e-9 at 0; a unit of ξ is worth
    # up to K units of loss
    rounding = 2e-9 * pieces
    assert abs(exact.value - lp.value) < rounding and gap(exact.value, exact.dual) < 1e-10
    assert exact.dual <= lp.dual + rounding  # λ* minimises the dual, and so does the LP's
    for solution in (exact, lp):
        check(solution, xi, maximum_of(*curve), epsilon, a, 1.0, rounding)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=15).map(np.array),
    st.floats(0, 3),
    st.integers(1, 12),
)
def test_another_convex_loss_exact_equals_lp(margins, epsilon, pieces):
    """The closed form is right for any convex, non-increasing loss: here softplus(−m)."""
    softplus = Loss(lambda m: np.logaddexp(0, -m), lambda m: -expit(-m))
    a, b = margins.min() - 1, margins.max() + 1
    curve = tangents(softplus, np.linspace(a, b, pieces + 1)[1:])
    exact, lp = (
        solve_exact(margins, maximum_of(*curve), epsilon, a),
        solve_lp(margins, *curve, epsilon, a, b),
    )
    assert abs(exact.value - lp.value) < 1e-8 and gap(exact.value, exact.dual) < 1e-10
    for solution in (exact, lp):
        check(solution, margins, maximum_of(*curve), epsilon, a, b, 1e-8)


@pytest.mark.parametrize("seed", range(8))
def test_against_brute_force_transport(seed):
    """The discretised problem itself: a transport plan from every pair to every point of a grid
    that has a and all ξ in it."""
    dice = np.random.default_rng(seed)
    n, epsilon = 12, dice.uniform(0.01, 0.3)
    xi, grid = np.round(dice.random(n), 2), np.arange(0, 101) / 100
    for loss in (maximum_of(*lines(6)), loss_star(6)):
        plan = linprog(
            -np.tile(loss.value(grid), n) / n,
            A_ub=abs(xi[:, None] - grid).ravel()[None] / n,
            b_ub=[epsilon],
            A_eq=np.kron(np.eye(n), np.ones(101)),
            b_eq=np.ones(n),
        )
        assert solve_exact(xi, loss, epsilon, 0.0).value == pytest.approx(-plan.fun, abs=1e-9)


def test_by_hand():
    """ξ = ½, 1 and K = 1: ℓ̃(ξ) = 1 − ξ. A budget of 2 · 0.25 moves the first pair from ½ to 0 and
    leaves the second."""
    s = solve_exact(np.array([1.0, 0.5]), maximum_of(*lines(1)), 0.25, 0.0)
    assert (
        s.owner.tolist() == [0, 1] and s.weight.tolist() == [1, 1] and s.shift.tolist() == [0, 0.5]
    )
    assert (s.value, s.lam, s.transport) == (0.5, 1.0, 0.25)
    split = solve_exact(np.array([1.0, 0.5]), maximum_of(*lines(1)), 0.125, 0.0)  # half of it
    assert (
        split.owner.tolist() == [0, 1, 1]
        and split.weight.tolist() == [1, 0.5, 0.5]
        and split.shift.tolist() == [0, 0, 0.5]
    )


def chords(loss: Loss, knots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and intercepts of the chords between ascending knots; their maximum is ≥ ℓ there."""
    slopes = np.diff(loss.value(knots)) / np.diff(knots)
    return slopes, loss.value(knots[1:]) - slopes * knots[1:]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=30).map(np.array), st.floats(0, 0.5))
def test_loss_star_itself_is_attained_bounded_and_sandwiched(xi, epsilon):
    """−log on [0.05, 1], exactly: its dual meets it, and tangents and chords through the same knots
    close in on it."""
    a, log = 0.05, Loss(lambda x: -np.log(x), lambda x: -1 / x)
    exact = solve_exact(xi, log, epsilon, a)
    assert gap(exact.value, exact.dual) < 1e-10
    check(exact, xi, log, epsilon, a, 1.0, 1e-10)
    widths = []
    for pieces in (4, 16, 64):
        knots = np.linspace(a, 1, pieces)
        low, high = (
            solve_exact(xi, maximum_of(*bend(log, knots)), epsilon, a).value
            for bend in (tangents, chords)
        )
        assert low <= exact.value + 1e-9 and exact.value <= high + 1e-9
        widths.append(high - low)
    assert widths[2] <= widths[0] + 1e-9


@pytest.mark.parametrize("pieces", [1, 5, 6, 7, 50])
def test_tangents_lie_under_loss_star_and_touch_it(pieces):
    x, knots, curve = np.linspace(1e-3, 1, 2000), np.arange(1, pieces + 1) / pieces, lines(pieces)
    np.testing.assert_allclose(curve[0], -pieces / np.arange(1, pieces + 1))  # s_k = −K/k
    np.testing.assert_allclose(curve[1], 1 - np.log(knots), atol=1e-12)  # c_k = 1 − log(k/K)
    assert (maximum_of(*curve).value(x) <= -np.log(x) + 1e-12).all()
    np.testing.assert_allclose(maximum_of(*curve).value(knots), -np.log(knots), atol=1e-12)
    assert maximum_of(*curve).value(np.float64(0)) == pytest.approx(1 + math.log(pieces))
    star, above = loss_star(pieces).value(x), x >= 1 / pieces
    np.testing.assert_allclose(star[above], -np.log(x[above]))
    assert (star >= maximum_of(*curve).value(x) - 1e-12).all()
    assert (
        star
        <= maximum_of(*chords(loss_star(pieces), np.concatenate([[0], knots]))).value(x) + 1e-12
    ).all()


@settings(max_examples=100, deadline=None)
@given(
    CONFIDENCES,
    st.floats(0, 0.3),
    st.floats(0, 0.3),
    st.integers(1, 20),
    st.integers(1, 9),
    st.randoms(),
)
def test_properties(xi, one, two, pieces, group, dice):
    loss, low, high = maximum_of(*lines(pieces)), *sorted((one, two))

    def value(x, epsilon, loss=loss):
        return solve_exact(x, loss, epsilon, 0.0).value

    assert value(xi, low) <= value(xi, high) + 1e-12  # grows with ε
    assert (
        value(xi, low) <= value(xi, low, maximum_of(*lines(2 * pieces))) + 1e-12
    )  # and with more tangents
    assert value(xi, 0) == pytest.approx(loss.value(xi).mean())  # ε = 0: the empirical mean
    assert value(xi, 1.0) == pytest.approx(1 + math.log(pieces))  # a large ε: all mass at a
    shuffled = xi.copy()
    dice.shuffle(shuffled)
    assert value(shuffled, low) == pytest.approx(
        value(xi, low), abs=1e-12
    )  # the order of rows does not matter
    starts = list(range(0, len(xi), group))
    grouped = average(
        [solve_exact(xi[start : start + group], loss, low, 0.0) for start in starts],
        starts,
        len(xi),
    )
    assert grouped.value <= value(xi, low) + 1e-12 and gap(grouped.value, grouped.dual) < 1e-10
    check(grouped, xi, loss, low, 0.0, 1.0, 1e-9)


def labelled(margins) -> list[dict]:
    return [
        {
            "id": str(i),
            "prompt": [{"role": "user", "content": "x"}],
            "chosen": "a",
            "rejected": "b",
            "margin": m,
            "chosen_logp": -1.0,
            "rejected_logp": -2.0,
        }
        for i, m in enumerate(margins)
    ]


@pytest.mark.parametrize("solver", ["exact", "lp"])
def test_stage(tmp_path, solver):
    pairs = dump(tmp_path / "labelled.jsonl", labelled(np.random.default_rng(0).exponential(1, 60)))
    ok(
        run(
            "dro.py",
            "--pairs",
            pairs,
            "--out",
            tmp_path / "worst.jsonl",
            "--epsilon",
            "0.02",
            "--solver",
            solver,
        )
    )
    stats = json.load(open(tmp_path / "worst.jsonl.stats.json"))
    assert (
        stats["n"] == 60
        and stats["moved"] >= 1
        and abs(stats["gap"]) < 1e-8
        and stats["transport"] == pytest.approx(0.02)
    )
    rows = jsonl(tmp_path / "worst.jsonl")
    assert all(r["xi"] == pytest.approx(1 / (1 + math.exp(-r["margin"]))) for r in rows)
    assert all(sum(w for w, _ in r["atoms"]) == pytest.approx(1) for r in rows)


@pytest.mark.parametrize(
    "extra", [["--group", "7"], ["--pieces", "5", "--epsilon", "0.1"], ["--epsilon", "0"]]
)
def test_stage_variants(tmp_path, extra):
    rows = labelled(np.random.default_rng(1).exponential(1, 40))
    rows[3]["chosen"] = 'a "quoted" line\nand }'
    pairs, out = dump(tmp_path / "labelled.jsonl", rows), tmp_path / "worst.jsonl"
    ok(run("dro.py", "--pairs", pairs, "--out", out, "--plot", tmp_path / "p.png", *extra))
    stats, worst = json.load(open(f"{out}.stats.json")), jsonl(out)
    assert [
        {k: v for k, v in r.items() if k not in ("xi", "atoms", "pieces")} for r in worst
    ] == rows
    under_star = stats["worst_case_loss_star"]
    assert stats["empirical_loss"] <= stats["worst_case_loss"] <= under_star + 1e-12
    leader = loss_star(worst[0]["pieces"]).value
    under_atoms = [w * leader(np.float64(r["xi"] - s)) for r in worst for w, s in r["atoms"]]
    assert under_star == pytest.approx(sum(under_atoms) / len(worst))
    assert {r["pieces"] for r in worst} == {5 if "5" in extra else 6} and (
        tmp_path / "p.png"
    ).stat().st_size > 5000
    assert (stats["moved"] == 0) == ("0" in extra)
    ok(
        run("dro.py", "--pairs", out, "--out", tmp_path / "again.jsonl", *extra)
    )  # its own output is fine as input
    assert jsonl(tmp_path / "again.jsonl") == worst


def test_memory_does_not_grow_with_the_responses(tmp_path):
    peaks = []
    for length in (10, 4000):
        rows = [{**r, "chosen": "x" * length} for r in labelled(np.linspace(0, 3, 3000))]
        pairs = dump(tmp_path / f"{length}.jsonl", rows)
        del rows
        tracemalloc.start()
        ok(run("dro.py", "--pairs", pairs, "--out", tmp_path / f"w{length}.jsonl"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 4e6, peaks  # the rows alone are 12 MB


BAD = [
    (["--epsilon", "-0.1"], "at least 0"),
    (["--epsilon", "nan"], "--epsilon"),
    (["--epsilon", "inf"], "--epsilon"),
    (["--pieces", "0"], "at least 1"),
    (["--group", "0"], "--group"),
]


@pytest.mark.parametrize("flags, words", BAD)
def test_bad_flags(tmp_path, flags, words):
    done = run(
        "dro.py",
        "--pairs",
        dump(tmp_path / "labelled.jsonl", labelled([0.5])),
        "--out",
        tmp_path / "worst.jsonl",
        *flags,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr


@pytest.mark.parametrize("margin", ["NaN", "Infinity", "-0.5", '"1"', "true", "null"])
def test_bad_margins(tmp_path, margin):
    path = tmp_path / "labelled.jsonl"
    path.write_text(
        json.dumps(labelled([0.25])[0])
        + "\n"
        + json.dumps({**labelled([0.25])[0], "id": "b"}).replace("0.25", margin)
        + "\n"
    )
    done = run("dro.py", "--pairs", path, "--out", tmp_path / "worst.jsonl")
    assert done.returncode == 2 and f"{path}:2: 'margin' must be a finite number" in done.stderr


@pytest.mark.parametrize(
    "key, value",
    [
        ("judge", "vader"),
        ("reference", "none"),
        ("reference", "previous"),
        ("length_penalty", 0.01),
    ],
)
def test_margins_that_are_not_against_init_are_refused_where_they_are_used(tmp_path, key, value):
    """D10: with ε > 0 in one line that names the key; with ε = 0 nothing uses them. Rows that say
    nothing are counted."""
    of = {"judge": "implicit", "reference": "init", "beta": 0.1, "length_penalty": 0, "policy": "x"}
    rows = [{**row, "margin_of": of} for row in labelled([0.1, 0.2, 0.3])]
    rows[1]["margin_of"] = {**of, key: value}
    pairs = dump(tmp_path / "l.jsonl", rows)
    done = run("dro.py", "--pairs", pairs, "--out", tmp_path / "w.jsonl")
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and key in done.stderr
        and "id '1'" in done.stderr
    )
    ok(run("dro.py", "--pairs", pairs, "--out", tmp_path / "w.jsonl", "--epsilon", "0"))
    silent = ok(
        run(
            "dro.py",
            "--pairs",
            dump(tmp_path / "s.jsonl", labelled([0.1, 0.2])),
            "--out",
            tmp_path / "v.jsonl",
        )
    )
    assert "2 margins taken as against π_init" in silent.stdout
