"""The exact world against brute force, and its rows against what they claim to be."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, ok
from scipy.optimize import brentq

import dro
import seed_dpo
from bench import lab

SMALL = lab.Setting(features=4, rounds=1)
ROUND = slice(lab.GOLD, lab.GOLD + lab.PROMPTS)


@pytest.fixture(scope="module")
def world() -> lab.World:
    return lab.make_world(4, range(3))


@pytest.fixture(scope="module")
def theta(world) -> torch.Tensor:
    return lab.seed_stage(world, SMALL)


def brute_policy(world, theta, seed: int, prompt: int) -> np.ndarray:
    """π_θ(y|x) from its definition, response by response."""
    scores = (world.phi[seed, prompt] * theta[seed]).sum(-1).numpy()
    weights = np.exp(world.prior[seed, prompt].numpy() + scores)
    return weights / weights.sum()


def brute_value_and_kl(world, theta, seed: int) -> tuple[float, float]:
    values, divergences = [], []
    for prompt in range(lab.EVALUATION.start, lab.EVALUATION.stop):
        policy = brute_policy(world, theta, seed, prompt)
        values.append(policy @ world.gold["bent"][seed, prompt].numpy())
        divergences.append(policy @ (np.log(policy) - world.prior[seed, prompt].numpy()))
    return np.mean(values), np.mean(divergences)


def test_measures_against_brute_force(world, theta):
    """Value and KL; at KL 1.5, and on the ray of another policy at the row's own KL."""
    start = theta.flip(0)
    measures = lab.measure(world, SMALL, theta, start)
    for seed in (0, 2):
        value, kl = brute_value_and_kl(world, theta, seed)
        assert measures["value"][seed].item() == pytest.approx(value, abs=1e-12)
        assert measures["kl"][seed].item() == pytest.approx(kl, abs=1e-12)
        assert measures["start"][seed].item() == pytest.approx(
            brute_value_and_kl(world, start, seed)[0], abs=1e-12
        )
    for key, direction, target in (("equal", theta, lab.COMMON_KL), ("ray", start, kl)):
        def excess(c, direction=direction, target=target):
            return brute_value_and_kl(world, c * direction, 2)[1] - target

        c = brentq(excess, 0.1, 20)
        value, _ = brute_value_and_kl(world, c * direction, 2)
        assert measures[key][2].item() == pytest.approx(value, abs=1e-6)
    assert measures["c"][2].item() == pytest.approx(c, abs=1e-6)


@pytest.mark.parametrize("judge", ["policy", "seed", "gold"])
def test_labels_against_brute_force(world, theta, judge):
    setting = SMALL._replace(judge=judge, beta=0.3)
    start = 0.5 * theta.flip(1)
    pairs = lab.label(world, setting, 0, theta, start)
    for seed, k in ((0, 0), (1, 50), (2, 95)):
        prompt = lab.GOLD + k
        now = np.log(brute_policy(world, theta, seed, prompt))
        judging = now if judge == "policy" else np.log(brute_policy(world, start, seed, prompt))
        gold = world.gold["bent"][seed, prompt].numpy()
        reward = 0.3 * (judging - world.prior[seed, prompt].numpy())
        if judge == "gold":
            reward = gold
        order = np.argsort(-(now + world.gumbel[seed, prompt].numpy()))[:4]
        best, worst = order[reward[order].argmax()], order[reward[order].argmin()]
        margin = 0 if judge == "gold" else reward[best] - reward[worst]
        assert pairs.margin[seed, k].item() == pytest.approx(margin, abs=1e-12)
        assert torch.equal(pairs.phi[seed, k], world.phi[seed, prompt, [best, worst]])
        assert bool(pairs.right[seed, k]) == bool(gold[best] > gold[worst])


def test_gold_pairs_and_their_flips(world):
    clean, noisy = (lab.gold_pairs(world, SMALL._replace(pairs=120, flips=share))
                    for share in (0, 0.25))
    turned = ~noisy.right
    assert clean.right.all() and turned.float().mean().item() == pytest.approx(0.25, abs=0.1)
    assert torch.equal(noisy.phi[turned], clean.phi[turned].flip(1))
    assert torch.equal(noisy.phi[~turned], clean.phi[~turned])


def test_seeds_of_one_block_do_not_touch(world):
    setting = SMALL._replace(rounds=2, epsilon=0.05, anchor="init", lr=0.3, beta=2.0)
    together = lab.run(world, setting, lab.seed_stage(world, setting))
    alone = lab.make_world(4, range(2, 3))
    single = lab.run(alone, setting, lab.seed_stage(alone, setting))
    for key, values in single.items():
        np.testing.assert_allclose(together[key][2], values[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("questions", ["least", "random", "most"])
def test_questions_are_answered_by_gold(world, theta, questions):
    """Ten pairs have gold's label, as often wrong as the seed's are; the others keep theirs."""
    setting = SMALL._replace(flips=0.25)
    plain = lab.label(world, setting, 0, theta, theta)
    asked = lab.label(world, setting._replace(questions=questions), 0, theta, theta)
    order = {"least": plain.margin.argsort(1), "most": (-plain.margin).argsort(1),
             "random": world.order[:, 0]}[questions]
    answer = world.uniform[:, ROUND] >= 0.25
    for seed in range(3):
        ten, rest = order[seed, :10], order[seed, 10:]
        assert torch.equal(asked.right[seed, ten], answer[seed, ten])
        assert torch.equal(asked.phi[seed, rest], plain.phi[seed, rest])
    turned = asked.right != plain.right
    assert turned.any() and torch.equal(asked.phi[turned], plain.phi[turned].flip(1))


@pytest.mark.parametrize("anchor, weights", [("previous", "one"), ("init", "one"),
                                             ("previous", "margin")])
def test_a_round_against_plain_autograd(world, theta, anchor, weights):
    """One seed, DPO on normalised log-probs of all 64 responses, written from the definitions."""
    setting = SMALL._replace(alpha=0.0, anchor=anchor, weights=weights, beta=1.0)
    policy = lab.log_policy(theta, world, ROUND)
    pairs = lab.label(world, setting, 0, theta, theta)
    trained, seen = lab.train_round(theta, world, setting, 0, theta)
    m = pairs.margin
    weight = m / m.mean(1, keepdim=True) if weights == "margin" else torch.ones_like(m)
    t = theta[1].clone().requires_grad_()
    optimizer = torch.optim.AdamW([t], weight_decay=0.0)
    same = (world.phi[1, ROUND, None] == pairs.phi[1, :, :, None]).all(-1)
    assert (same.sum(-1) == 1).all()
    ids = same.int().argmax(-1)
    for step in range(6):
        batch = torch.arange(16 * step, 16 * (step + 1))
        prompts = lab.GOLD + batch
        logp = (world.prior[1, prompts] + world.phi[1, prompts] @ t).log_softmax(-1)
        fixed = world.prior[1, prompts] if anchor == "init" else policy[1, batch]
        ratio = (logp - fixed).gather(1, ids[batch])
        loss = (weight[1, batch] * F.softplus(-(ratio[:, 0] - ratio[:, 1]))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([t], 1.0)
        optimizer.param_groups[0]["lr"] = seed_dpo.lr_at(step, 6, setting.lr)
        optimizer.step()
    np.testing.assert_allclose(trained[1].numpy(), t.detach().numpy(), atol=1e-9)
    g = weight * (1 - torch.sigmoid(m) if anchor == "init" else torch.full_like(m, 0.5))
    signal, noise = (g * m).sum(1) ** 2, (g**2).sum(1)
    np.testing.assert_allclose(seen, 96 * signal / noise / (m**2).sum(1), rtol=1e-9)


def test_atoms_are_the_followers():
    """Those of the least confident pairs attain the exact worst case; the most confident have the
    mirror image, random ones a permutation."""
    xi = np.random.default_rng(5).uniform(0.5, 0.9, (1, 96))
    margin, order = torch.from_numpy(np.log(xi / (1 - xi))), torch.arange(95, -1, -1)
    moved = {}
    for atoms in ("least", "random", "most"):
        setting = SMALL._replace(epsilon=0.05, atoms=atoms)
        weight, shift = lab.worst_case(margin, setting, order[None])
        moved[atoms] = weight[0, :, 1]
        if atoms == "least":
            tilde = dro.maximum_of(*dro.tangents(6), xi[0][:, None] - shift[0].numpy())
            losses = dro.maximum_of(*dro.tangents(6), xi[0])
            exact = dro.solve_exact(xi[0], losses, 1 + math.log(6), 0.05).value
            assert (weight[0].numpy() * tilde).sum(1).mean() == pytest.approx(exact, abs=1e-12)
    rank = xi[0].argsort()
    assert torch.equal(moved["least"][rank], moved["most"][rank].flip(0))
    assert torch.equal(moved["least"][rank], moved["random"][order])


def test_quick(tmp_path):
    """Everything is printed and drawn; what is known is read, and a block that lacks a row is run
    again."""
    tables, block = [], tmp_path / "lab/rows/features-64-seeds-0-7.json"
    command = [sys.executable, ROOT / "bench/lab.py", "--quick", "--out", tmp_path / "lab"]
    for _ in range(2):
        done = subprocess.run([*command, "--plot", tmp_path / "lab.png"], capture_output=True,
                              text=True)
        tables.append(ok(done).stdout.rpartition("\n\n")[0])
        cells = {path: path.stat().st_mtime_ns for path in tmp_path.glob("lab/cells/*")}
        rows = block.read_text()
        block.write_text("[]")
    assert tables[0] == tables[1] and "nan" not in tables[0] and len(rows) > 1000
    assert cells == {path: path.stat().st_mtime_ns for path in cells}
    for name in ("0% of the seed labels flipped", "2 cells", lab.RAY):
        assert name in tables[0]
    assert (tmp_path / "lab.png").exists()
