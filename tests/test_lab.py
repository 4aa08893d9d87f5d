"""The exact world against brute force, and its rows against what they claim to be."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dro
import label
import seed_dpo
import train
from bench import lab

SMALL = lab.Setting(features=4)


@pytest.fixture(scope="module")
def world() -> lab.Prompts:
    return lab.make_world(SMALL, 2)


@pytest.fixture(scope="module")
def theta(world) -> torch.Tensor:
    return lab.seed_stage(world, SMALL)


def brute_policy(world, theta, prompt: int) -> np.ndarray:
    """π_θ(y|x) from its definition."""
    weights = np.exp((world.prior[prompt] + (world.phi[prompt] * theta).sum(-1)).numpy())
    return weights / weights.sum()


def brute_value_and_kl(world, theta) -> np.ndarray:
    both = []
    for prompt in range(lab.GOLD + 2 * lab.PROMPTS, len(world.phi)):
        policy, prior = brute_policy(world, theta, prompt), world.prior[prompt].numpy()
        both.append((policy @ world.gold[prompt].numpy(), policy @ (np.log(policy) - prior)))
    return np.mean(both, 0)


def test_formulas_are_the_projects():
    assert lab.dro is dro
    for owner, names in ((label, ("implicit_reward", "best_and_worst")),
                         (train, ("leader_loss", "threshold")),
                         (seed_dpo, ("dpo_margin", "lr_at"))):
        assert all(getattr(lab, name) is getattr(owner, name) for name in names)


def test_measures_against_brute_force(world, theta):
    """Value and KL; c·θ at KL 1.5; and c·θ_0 at the row's own KL."""
    evaluation = world.part(lab.GOLD + 2 * lab.PROMPTS, lab.PROMPTS)
    assert lab.value_and_kl(theta, evaluation) == pytest.approx(brute_value_and_kl(world, theta))
    c = lab.scale_to(1.5, theta, evaluation)
    assert brute_value_and_kl(world, c * theta)[1] == pytest.approx(1.5)
    assert lab.scale_to(99.0, theta, evaluation) == 100

    first, *_, last = lab.run(world, SMALL)
    first, last = lab.Row(*first), lab.Row(*last)
    assert first.c == 1 and first.value == first.ray != first.equal
    assert (first.value, first.kl) == pytest.approx(brute_value_and_kl(world, theta))
    assert (last.ray, last.kl) == pytest.approx(brute_value_and_kl(world, last.c * theta))


@pytest.mark.parametrize("judge", ["policy", "seed", "gold"])
def test_labels_against_brute_force(world, theta, judge):
    start = 0.5 * theta.flip(0)
    pairs = lab.label(world, SMALL._replace(judge=judge, beta=0.3), 0, theta, start)
    for k in (0, 50, 95):
        prompt = lab.GOLD + k
        now = np.log(brute_policy(world, theta, prompt))
        judging = now if judge == "policy" else np.log(brute_policy(world, start, prompt))
        gold = world.gold[prompt].numpy()
        reward = gold if judge == "gold" else 0.3 * (judging - world.prior[prompt].numpy())
        order = np.argsort(-(now + world.gumbel[prompt].numpy()))[:4]
        best, worst = order[reward[order].argmax()], order[reward[order].argmin()]
        margin = 0 if judge == "gold" else reward[best] - reward[worst]
        assert pairs.margin[k].item() == pytest.approx(margin, abs=1e-12)
        assert torch.equal(pairs.phi[k], world.phi[prompt, [best, worst]])
        assert bool(pairs.right[k]) == bool(gold[best] > gold[worst])


def test_gold_pairs_and_their_flips(world):
    clean, noisy = (lab.gold_pairs(world, SMALL._replace(extra=80, flips=share))
                    for share in (0, 0.25))
    turned = ~noisy.right
    assert clean.right.all() and turned.double().mean().item() == pytest.approx(0.25, abs=0.1)
    assert torch.equal(noisy.phi[turned], clean.phi[turned].flip(1))
    assert torch.equal(noisy.phi[~turned], clean.phi[~turned])


@pytest.mark.parametrize("questions", ["least", "random", "most"])
def test_questions_are_answered_by_gold(world, theta, questions):
    """Ten pairs have gold's label, as often wrong as the seed's are; the others keep theirs."""
    setting = SMALL._replace(flips=0.25, judge="seed")
    plain, asked = (lab.label(world, setting._replace(questions=which), 0, theta, theta.flip(0))
                    for which in ("none", questions))
    key = {"least": plain.margin, "most": -plain.margin, "random": plain.chance}[questions]
    ten, rest = key.argsort().split([10, 86])
    assert torch.equal(asked.right[ten], world.uniform[lab.GOLD + ten] >= 0.25)
    assert torch.equal(asked.phi[rest], plain.phi[rest])
    turned = asked.right != plain.right
    assert turned.any() and torch.equal(asked.phi[turned], plain.phi[turned].flip(1))


@pytest.mark.parametrize("anchor, weights", [("previous", "one"), ("init", "one"),
                                             ("previous", "margin")])
def test_a_round_against_plain_autograd(world, theta, anchor, weights):
    """DPO on normalised log-probs of all 64 responses, written from the definitions."""
    setting = SMALL._replace(alpha=0.0, anchor=anchor, weights=weights, beta=1.0)
    prompts = world.part(lab.GOLD, 96)
    pairs = lab.label(world, setting, 0, theta, theta)
    batches = torch.arange(96).split(16)
    trained, seen = lab.train(theta, pairs, setting, batches)
    m = pairs.margin
    weight = m / m.mean() if weights == "margin" else torch.ones_like(m)
    fixed = prompts.prior if anchor == "init" else lab.log_policy(theta, prompts)
    ids = (prompts.phi[:, None] == pairs.phi[:, :, None]).all(-1).int().argmax(-1)
    t = theta.clone().requires_grad_()
    optimizer = torch.optim.AdamW([t], weight_decay=0.0)
    for step, batch in enumerate(batches):
        ratio = (lab.log_policy(t, prompts) - fixed).gather(1, ids)[batch]
        loss = (weight[batch] * F.softplus(ratio[:, 1] - ratio[:, 0])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([t], 1.0)
        optimizer.param_groups[0]["lr"] = seed_dpo.lr_at(step, 6, setting.lr)
        optimizer.step()
    np.testing.assert_allclose(trained.numpy(), t.detach().numpy(), atol=1e-9)
    g = weight * (1 - torch.sigmoid(m) if anchor == "init" else 0.5)
    assert seen.item() == pytest.approx((96 * (g @ m) ** 2 / (g @ g) / (m @ m)).item())


def test_atoms_are_the_followers():
    """Those of the least confident pairs attain the exact worst case; the most confident have the
    mirror image, random ones a permutation; a moved pair's gradient is K ξ times as large."""
    xi = np.random.default_rng(5).uniform(0.5, 0.9, 96)
    margin = torch.from_numpy(np.log(xi / (1 - xi)))
    chance = torch.arange(96.0).flip(0)
    pairs = lab.Pairs(torch.zeros(96, 2, 4), margin, margin > 0, chance)
    setting = SMALL._replace(epsilon=0.05, anchor="init")
    least, mirror, random = (lab.worst_case(pairs, setting._replace(atoms=atoms))
                             for atoms in ("least", "most", "random"))
    star = train.loss_star(torch.from_numpy(xi), 6).numpy()
    value = (1 - least.numpy()) * star + least.numpy() * (1 + math.log(6))
    exact = dro.solve_exact(xi, star, 1 + math.log(6), 0.05).value
    assert value.mean() == pytest.approx(exact, abs=1e-12)
    rank = xi.argsort()
    assert torch.equal(least[rank], mirror[rank].flip(0))
    assert torch.equal(least[rank], random.flip(0))

    m = margin.clone().requires_grad_()
    weight = torch.stack([1 - least, least], -1)
    shift = torch.stack([0 * margin, torch.sigmoid(margin)], -1)
    train.leader_loss(m, 0 * margin, weight, shift, 0.1, 6).sum().backward()
    g = m.grad
    effective = 96 * (g @ margin) ** 2 / (g @ g) / (margin @ margin)
    _, seen = lab.train(torch.zeros(4), pairs, setting, [])
    assert seen.item() == pytest.approx(effective.item())


def test_main(tmp_path, monkeypatch, capsys):
    """Everything is printed and drawn; what is known is read."""
    cells = [SMALL, SMALL._replace(pairs=10)]
    monkeypatch.setattr(lab, "sweep_cells", lambda: cells)
    monkeypatch.setattr(lab, "FLIPS", (0.0, 0.4))
    out, png = tmp_path / "lab", tmp_path / "lab.png"
    monkeypatch.setattr(sys, "argv", ["lab.py", f"--out={out}", "--seeds=2", f"--plot={png}"])
    lab.main()
    printed = capsys.readouterr().out
    assert len(list(out.iterdir())) == 4 and png.exists() and "nan" not in printed
    for name in ("0% of the seed labels flipped", "2 cells", lab.RAY):
        assert name in printed
    monkeypatch.setattr(lab, "make_world", None)
    lab.main()
    assert capsys.readouterr().out == printed
