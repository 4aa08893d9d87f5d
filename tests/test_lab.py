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
import label
import seed_dpo
import train
from bench import lab

SMALL = lab.Setting(features=4, rounds=1)
ROUND = slice(lab.GOLD, lab.GOLD + lab.PROMPTS)


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


def brute_value_and_kl(world, theta, seed: int) -> tuple[float, float]:
    values, divergences = [], []
    for prompt in range(lab.EVALUATION.start, lab.EVALUATION.stop):
        policy = brute_policy(world, theta, seed, prompt)
        gold = world.gold["bent"][seed, prompt].tolist()
        prior = world.prior[seed, prompt].tolist()
        values.append(sum(p * g for p, g in zip(policy, gold)))
        divergences.append(sum(p * (math.log(p) - q) for p, q in zip(policy, prior)))
    return np.mean(values), np.mean(divergences)


def test_formulas_are_the_projects():
    assert lab.implicit_reward is label.implicit_reward
    assert lab.best_and_worst is label.best_and_worst
    assert lab.dro is dro
    for name in ("leader_loss", "threshold"):
        assert getattr(lab, name) is getattr(train, name)
    for name in ("dpo_margin", "lr_at"):
        assert getattr(lab, name) is getattr(seed_dpo, name)


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


def test_start_is_worth_nothing(world, theta):
    for gold in ("linear", "bent"):
        measures = lab.measure(world, SMALL._replace(gold=gold), 0 * theta, theta)
        assert measures["value"].abs().max() < 1e-12 and measures["kl"].abs().max() < 1e-12
        share = world.prior[:, lab.EVALUATION].exp() / lab.PROMPTS
        second = (share * world.gold[gold][:, lab.EVALUATION] ** 2).sum((-1, -2))
        assert second.tolist() == pytest.approx([1, 1, 1])


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
        assert torch.equal(pairs.prior[seed, k], world.prior[seed, prompt, [best, worst]])
        assert bool(pairs.right[seed, k]) == bool(gold[best] > gold[worst])


def test_gold_pairs_and_their_flips(world):
    clean = lab.gold_pairs(world, SMALL._replace(pairs=120))
    noisy = lab.gold_pairs(world, SMALL._replace(pairs=120, flips=0.25))
    assert clean.right.all()
    turned = ~noisy.right
    assert turned.float().mean().item() == pytest.approx(0.25, abs=0.1)
    assert torch.equal(noisy.phi[turned], clean.phi[turned].flip(1))
    assert torch.equal(noisy.prior[turned], clean.prior[turned].flip(1))
    assert torch.equal(noisy.phi[~turned], clean.phi[~turned])


@pytest.mark.parametrize("questions", ["least", "random", "most"])
def test_questions_are_answered_by_gold(world, theta, questions):
    """Ten pairs have gold's label, as often wrong as the seed's are; the others keep theirs."""
    setting = SMALL._replace(flips=0.25)
    plain = lab.label(world, setting, 0, theta, theta)
    asked = lab.label(world, setting._replace(questions=questions), 0, theta, theta)
    answer = world.uniform[:, ROUND] >= 0.25
    for seed in range(3):
        order = {
            "least": plain.margin[seed].argsort(),
            "most": (-plain.margin[seed]).argsort(),
            "random": world.order[seed, 0],
        }[questions]
        ten, rest = order[:10], order[10:]
        assert torch.equal(asked.right[seed, ten], answer[seed, ten])
        assert torch.equal(asked.phi[seed, rest], plain.phi[seed, rest])
    turned = asked.right != plain.right
    assert turned.any()
    assert torch.equal(asked.phi[turned], plain.phi[turned].flip(1))


@pytest.mark.parametrize("replay", ["gold", "self"])
def test_replayed_pairs_are_trained_on_once_a_round(world, theta, monkeypatch, replay):
    seen = []
    monkeypatch.setattr(lab, "train", lambda *given: seen.append(given))
    lab.train_round(theta, world, SMALL._replace(replay=replay), 0, theta)
    (_, pairs, _, _, batches, _) = seen[0]
    own = lab.label(world, SMALL, 0, theta, theta)
    more = lab.gold_pairs(world, SMALL) if replay == "gold" else own
    for one, other, both in zip(own, more, pairs):
        assert torch.equal(both, torch.cat([one, other[:, :40]], 1))
    assert sorted(torch.cat(batches).tolist()) == list(range(136))


def test_seeds_of_one_block_do_not_touch(world):
    setting = SMALL._replace(rounds=2, epsilon=0.05, anchor="init", lr=0.3, beta=2.0)
    together = lab.run(world, setting, lab.seed_stage(world, setting))
    alone = lab.make_world(4, range(2, 3))
    single = lab.run(alone, setting, lab.seed_stage(alone, setting))
    for key, values in single.items():
        np.testing.assert_allclose(together[key][2], values[0], rtol=0, atol=1e-6)


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
    for seed in (0, 1):
        t = theta[seed].clone().requires_grad_()
        optimizer = torch.optim.AdamW([t], weight_decay=0.0)
        same = (world.phi[seed, ROUND, None] == pairs.phi[seed, :, :, None]).all(-1)
        assert (same.sum(-1) == 1).all()
        ids = same.int().argmax(-1)
        for step in range(6):
            batch = torch.arange(16 * step, 16 * (step + 1))
            prompts = lab.GOLD + batch
            logp = (world.prior[seed, prompts] + world.phi[seed, prompts] @ t).log_softmax(-1)
            fixed = world.prior[seed, prompts] if anchor == "init" else policy[seed, batch]
            ratio = (logp - fixed).gather(1, ids[batch])
            loss = (weight[seed, batch] * F.softplus(-(ratio[:, 0] - ratio[:, 1]))).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([t], 1.0)
            optimizer.param_groups[0]["lr"] = seed_dpo.lr_at(step, 6, setting.lr)
            optimizer.step()
        np.testing.assert_allclose(trained[seed].numpy(), t.detach().numpy(), atol=1e-9)
    g = weight * (1 - torch.sigmoid(m) if anchor == "init" else torch.full_like(m, 0.5))
    signal, noise = (g * m).sum(1) ** 2, (g**2).sum(1)
    np.testing.assert_allclose(seen, 96 * signal / noise / (m**2).sum(1), rtol=1e-9)
    if weights == "margin":
        assert seen.tolist() == pytest.approx([96] * 3)


def test_atoms_are_the_followers():
    xi = np.random.default_rng(5).uniform(0.5, 0.9, (2, 96))
    margin = torch.from_numpy(np.log(xi / (1 - xi)))
    order = torch.arange(95, -1, -1).expand(2, 96)
    moved = {}
    for atoms in ("least", "random", "most"):
        setting = SMALL._replace(epsilon=0.05, atoms=atoms)
        weight, shift = lab.worst_case(margin, setting, order)
        assert weight.sum(-1).numpy() == pytest.approx(1)
        moved[atoms] = weight[..., 1]
        assert torch.allclose(shift[..., 1], torch.from_numpy(xi) * (moved[atoms] > 0))
        if atoms == "least":
            for s in range(2):
                tilde = dro.maximum_of(*dro.tangents(6), xi[s][:, None] - shift[s].numpy())
                mean = (weight[s].numpy() * tilde).sum(1).mean()
                losses = dro.maximum_of(*dro.tangents(6), xi[s])
                exact = dro.solve_exact(xi[s], losses, 1 + math.log(6), 0.05).value
                assert mean == pytest.approx(exact, abs=1e-12)
    for s in range(2):
        rank = xi[s].argsort()
        least, most = moved["least"][s, rank], moved["most"][s, rank]
        assert torch.equal(least, most.flip(0)) and least[0] == 1 and least[-1] == 0
        assert torch.equal(least, moved["random"][s, order[s]])


def test_quick(tmp_path):
    """Everything is printed and drawn; what is known is read, and a block that lacks a row is run
    again."""
    tables, block = [], tmp_path / "lab/rows/features-64-seeds-0-7.json"
    for _ in range(2):
        command = [sys.executable, ROOT / "bench/lab.py", "--quick", "--out", tmp_path / "lab"]
        command += ["--plot", tmp_path / "lab.png"]
        done = subprocess.run(command, capture_output=True, text=True)
        tables.append(ok(done).stdout.rpartition("\n\n")[0])
        cells = [(path, path.stat().st_mtime_ns) for path in tmp_path.glob("lab/cells/*")]
        rows = block.read_text()
        block.write_text("[]")
    assert tables[0] == tables[1] and "nan" not in tables[0] and len(rows) > 1000
    assert cells == [(path, path.stat().st_mtime_ns) for path, _ in cells]
    for name in ("0% of the seed labels flipped", "2 cells", "π_0 judges every round", lab.RAY):
        assert name in tables[0]
    assert (tmp_path / "lab.png").stat().st_size < 200_000
