"""The exact world against brute force, and its arms against what they claim to be."""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from scipy.stats import ttest_rel

import dro
import label
import seed_dpo
import train
from bench import lab
from core import policy as core_policy

SMALL = lab.Setting(features=4, rounds=1)
ROUND = slice(lab.START, lab.START + lab.PROMPTS)


@pytest.fixture(scope="module")
def world() -> lab.World:
    return lab.make_world(4, range(3))


@pytest.fixture(scope="module")
def theta(world) -> torch.Tensor:
    return lab.seed_stage(world, SMALL)


def brute_policy(world, theta, seed: int, prompt: int) -> list[float]:
    """π_θ(y|x) from its definition, response by response."""
    weights = []
    for y in range(lab.RESPONSES):
        score = sum(float(a * b) for a, b in zip(theta[seed], world.phi[seed, prompt, y]))
        weights.append(math.exp(float(world.prior[seed, prompt, y])) * math.exp(score))
    return [weight / sum(weights) for weight in weights]


def test_formulas_are_the_projects():
    assert lab.implicit_reward is label.implicit_reward
    assert lab.best_and_worst is label.best_and_worst
    assert lab.dro is dro
    assert lab.token_logps is core_policy.token_logps
    for name in ("leader_loss", "loss_star", "threshold"):
        assert getattr(lab, name) is getattr(train, name)
    for name in ("dpo_margin", "dpo_loss", "lr_at"):
        assert getattr(lab, name) is getattr(seed_dpo, name)


def test_policy_and_value_against_brute_force(world, theta):
    found = lab.measure(world, SMALL, theta)
    for seed, (name, prompts) in itertools.product(
        (0, 2), [("value", lab.EVALUATION), ("shifted", lab.SHIFTED)]
    ):
        values = []
        for prompt in range(prompts.start, prompts.stop):
            policy = brute_policy(world, theta, seed, prompt)
            gold = world.gold["bent"][seed, prompt].tolist()
            values.append(sum(p * g for p, g in zip(policy, gold)))
        assert found[name][seed].item() == pytest.approx(np.mean(values), abs=1e-12)
        if name == "value":
            lowest = np.mean(sorted(values)[:9])
            assert found["tenth"][seed].item() == pytest.approx(lowest, abs=1e-12)
    prompt = lab.EVALUATION.start
    exact = lab.log_policy(theta, world, slice(prompt, prompt + 1))[1, 0].exp()
    assert exact.tolist() == pytest.approx(brute_policy(world, theta, 1, prompt), abs=1e-14)


def test_start_is_worth_nothing(world):
    start = torch.zeros(3, 4, dtype=torch.float64)
    for gold in ("linear", "bent"):
        found = lab.measure(world, SMALL._replace(gold=gold), start)
        for name in ("value", "shifted", "kl"):
            assert found[name].abs().max() < 1e-12
        share = world.prior[:, lab.EVALUATION].exp() / lab.PROMPTS
        second = (share * world.gold[gold][:, lab.EVALUATION] ** 2).sum((-1, -2))
        assert second.tolist() == pytest.approx([1, 1, 1])


def test_candidates_are_drawn_one_after_the_other():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    gumbel = torch.from_numpy(np.random.default_rng(0).gumbel(size=(1, 40000, 4)))
    drawn = lab.candidates(p.log().expand(1, 40000, 4), gumbel, 2)[0].tolist()
    for first, second in itertools.permutations(range(4), 2):
        exact = float(p[first] * p[second] / (1 - p[first]))
        error = math.sqrt(exact * (1 - exact) / 40000)
        assert abs(drawn.count([first, second]) / 40000 - exact) < 4.5 * error


@pytest.mark.parametrize("reference", ["init", "previous", "none"])
def test_labels_against_brute_force(world, theta, reference):
    setting = SMALL._replace(reference=reference, beta=0.3)
    older = 0.5 * theta
    before = lab.log_policy(older, world, ROUND)
    pairs = lab.label(world, setting, ROUND, lab.log_policy(theta, world, ROUND), before)
    for seed, k in ((0, 0), (1, 50), (2, 95)):
        prompt = lab.START + k
        now = np.log(brute_policy(world, theta, seed, prompt))
        against = {
            "init": world.prior[seed, prompt].numpy(),
            "none": np.zeros(lab.RESPONSES),
            "previous": np.log(brute_policy(world, older, seed, prompt)),
        }[reference]
        reward = 0.3 * (now - against)
        order = np.argsort(-(now + world.gumbel[seed, prompt].numpy()))[:4]
        best, worst = order[reward[order].argmax()], order[reward[order].argmin()]
        margin = reward[best] - reward[worst]
        assert pairs.margin[seed, k].item() == pytest.approx(margin, abs=1e-12)
        assert torch.equal(pairs.phi[seed, k], world.phi[seed, prompt, [best, worst]])
        gold = world.gold["bent"][seed, prompt]
        assert bool(pairs.right[seed, k]) == bool(gold[best] > gold[worst])


def test_gold_pairs_and_their_flips(world):
    clean, noisy = (lab.gold_pairs(world, SMALL, slice(0, 120), flips) for flips in (0.0, 0.25))
    assert clean.right.all()
    turned = ~noisy.right
    assert turned.float().mean().item() == pytest.approx(0.25, abs=0.1)
    assert torch.equal(noisy.phi[turned], clean.phi[turned].flip(1))
    assert torch.equal(noisy.prior[turned], clean.prior[turned].flip(1))
    assert torch.equal(noisy.phi[~turned], clean.phi[~turned])


def test_seeds_of_one_block_do_not_touch(world):
    setting = SMALL._replace(rounds=2, epsilon=0.05, lr=0.3, beta=2.0)
    together = lab.run(world, setting, lab.seed_stage(world, setting))
    alone = lab.make_world(4, range(2, 3))
    single = lab.run(alone, setting, lab.seed_stage(alone, setting))
    for key, values in single.items():
        np.testing.assert_allclose(together[key][2], values[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("anchor", ["previous", "init"])
def test_a_round_against_plain_autograd(world, theta, anchor):
    """One seed, DPO on normalised log-probs of all 64 responses, written from the definitions."""
    setting = SMALL._replace(alpha=0.0, anchor=anchor, beta=1.0)
    policy = lab.log_policy(theta, world, ROUND)
    pairs = lab.label(world, setting, ROUND, policy, policy)
    trained, seen = lab.train_round(theta, pairs, setting, 0, world.order[:, 0])
    for seed in (0, 1):
        t = theta[seed].clone().requires_grad_()
        optimizer = torch.optim.AdamW([t], weight_decay=0.0)
        same = (world.phi[seed, ROUND, None] == pairs.phi[seed, :, :, None]).all(-1)
        assert (same.sum(-1) == 1).all()
        ids = same.int().argmax(-1)
        for step in range(6):
            batch = torch.arange(16 * step, 16 * (step + 1))
            prompts = lab.START + batch
            logp = (world.prior[seed, prompts] + world.phi[seed, prompts] @ t).log_softmax(-1)
            fixed = world.prior[seed, prompts] if anchor == "init" else policy[seed, batch]
            ratio = (logp - fixed).gather(1, ids[batch])
            loss = F.softplus(-(ratio[:, 0] - ratio[:, 1])).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([t], 1.0)
            optimizer.param_groups[0]["lr"] = seed_dpo.lr_at(step, 6, setting.lr)
            optimizer.step()
        np.testing.assert_allclose(trained[seed].numpy(), t.detach().numpy(), atol=1e-9)
    if anchor == "init":
        g = 1 - torch.sigmoid(pairs.margin)
        expected = g.sum(1) ** 2 / (g**2).sum(1)
        np.testing.assert_allclose(seen["effective"].numpy(), expected.numpy(), rtol=1e-12)
    else:
        assert seen["effective"].tolist() == pytest.approx([96] * 3)


def confidences() -> np.ndarray:
    return np.random.default_rng(5).uniform(0.5, 0.9, (2, 96))


def test_atoms_are_the_followers():
    xi, order = confidences(), torch.arange(95, -1, -1).expand(2, 96)
    least = lab.worst_case(xi, SMALL._replace(epsilon=0.05), order)
    for s in range(2):
        places = xi[s][:, None] - least.shift[s].numpy()
        mean = (least.weight[s].numpy() * dro.maximum_of(*dro.tangents(6), places)).sum(1).mean()
        assert mean == pytest.approx(lab.follower(xi[s], 6, 0.05).value, abs=1e-12)
    random = lab.worst_case(xi, SMALL._replace(epsilon=0.05, atoms="random"), order)
    assert torch.equal(random.weight, least.weight.flip(1))
    moved = random.weight[..., 1] > 0
    assert torch.equal(random.shift[..., 1], torch.from_numpy(xi) * moved)
    assert (random.weight[..., 1] * random.shift[..., 1]).mean() > 0.05
    most = lab.worst_case(xi, SMALL._replace(epsilon=0.05, atoms="most"), order)
    for s in range(2):
        fractions = [atoms.weight[s, :, 1].numpy()[xi[s].argsort()] for atoms in (least, most)]
        np.testing.assert_array_equal(fractions[0], fractions[1][::-1])
        assert fractions[0][0] == 1 and fractions[0][-1] == 0


def test_dual_leader_starts_at_the_followers_dual():
    xi = confidences()
    setting = SMALL._replace(epsilon=0.05, atoms="dual", alpha=0.0)
    atoms = lab.worst_case(xi, setting, torch.arange(96).expand(2, 96))
    margin = torch.from_numpy(np.log(xi / (1 - xi)))
    for s in range(2):
        own = lab.Atoms(*(part[s] for part in atoms))
        none = torch.zeros(96, dtype=torch.float64)
        found = lab.losses(margin[s], none, own, setting).mean().item()
        lam = float(atoms.lam[s, 0])
        exact = dro.dual_value(xi[s], -np.log(xi[s]), 1 + math.log(6), lam, 0.05)
        assert found + lam * 0.05 == pytest.approx(exact, abs=1e-12)


def test_weights_are_the_anchors_first_gradient(world, theta):
    """2(1 − ξ) on SPA's loss is what adding the stored margin does at the start of a round."""
    weights = SMALL._replace(anchor="weights", beta=1.0, alpha=0.0)
    policy = lab.log_policy(theta, world, ROUND)
    pairs = lab.label(world, weights, ROUND, policy, policy)
    effective = [
        lab.train_round(theta, pairs, s, 0, world.order[:, 0])[1]["effective"]
        for s in (weights, weights._replace(anchor="init"))
    ]
    np.testing.assert_allclose(effective[0].numpy(), effective[1].numpy(), rtol=1e-12)
    assert effective[0].max() < 95


def test_extrapolation_scales_margins_alone(world, theta):
    """What bench/lab.py says of S12 in a log-linear policy, so that its row equals SPA's."""
    phi, prior = world.phi[:, :50, :2], world.prior[:, :50, :2]
    now, ref = (lab.logits(own, phi, prior).flatten(0, 1) for own in (theta, 0.3 * theta))
    tilde = lab.dpo_margin(lab.extrapolated(now, ref, 0.5), ref, 0.1)
    np.testing.assert_allclose(tilde, 1.5 * lab.dpo_margin(now, ref, 0.1), atol=1e-12)
    settings = [SMALL._replace(anchor="previous", lr=0.1, lam=lam) for lam in (0, 0.5)]
    one, other = (lab.run(world, setting, theta) for setting in settings)
    assert max(one["flagged"]) > 0
    np.testing.assert_allclose(one["value"], other["value"], atol=1e-3)


def test_differences_and_chance():
    rng = np.random.default_rng(0)
    one, other = rng.normal(0.3, 1, 20), rng.normal(0, 1, 20)
    found, oracle = lab.difference(one, other), ttest_rel(one, other)
    interval = oracle.confidence_interval(0.95)
    assert found.p == pytest.approx(oracle.pvalue)
    assert found.mean - found.half == pytest.approx(interval.low)
    assert found.mean + found.half == pytest.approx(interval.high)
    rows = [lab.Difference(0, 0, p) for p in (0.2, 0.001, 0.04, 0.02)]
    # Holm: 0.001 ≤ 0.05/4; 0.02 > 0.05/3 ends it
    said = "3 of 4 differ at 95 %; 0.2 would by chance; 1 after Holm's correction"
    assert lab.by_chance(rows) == said


def test_a_killed_block_goes_on(tmp_path):
    settings = [SMALL, SMALL._replace(epsilon=0.05), SMALL._replace(rounds=0)]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    lab.run_block((whole, range(2), settings))
    text = whole.read_text()
    cut.write_text(text[: len(text) - 40])
    _, rows = lab.run_block((cut, range(2), settings))
    assert cut.read_text() == text and set(rows) == set(settings)
    lab.run_block((cut, range(2), settings))
    assert cut.read_text() == text


def test_quick(tmp_path, monkeypatch, capsys):
    """Everything is printed and drawn; a second call reads what the first one wrote."""
    flags = ["--quick", "--out", str(tmp_path / "lab"), "--plot", str(tmp_path / "lab.png")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/lab.py"), *flags],
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first = done.stdout.split("\n", 1)[1]
    assert "nan" not in first
    for name in (
        "The papers' rows",
        "What separates causes",
        "by decile of ξ",
        "against the radius",
        "The strength of β",
        "learning rate, 2 rounds",
    ):
        assert name in first
    assert (tmp_path / "lab.png").stat().st_size < 200_000
    monkeypatch.setattr(sys, "argv", ["lab.py", *flags])
    lab.main()
    assert capsys.readouterr().out.split("\n", 1)[1] == first
