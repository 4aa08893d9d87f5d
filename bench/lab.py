"""What the adversary does, in a world small enough to be exact.

    π_θ(y|x) ∝ π_init(y|x) exp(θ·φ(x, y))           64 responses a prompt, Gaussian features φ

so that log-probs, expectations and the worth of a policy are sums, not estimates. All else is the
project's own: labels from label.py (S7, S8), worst cases from dro.py (T2-3, T2-5), losses, noise
flags and schedule from seed_dpo.py, core/policy.py and train.py (S6, S9 … S12, L_i). A run takes
milliseconds, so that 200 seeds decide a hundredth; every arm of one seed sees the same prompts,
features, seed labels and random numbers, and differences are paired.

What has no meaning here: a length penalty (S13), since there are no texts, and extrapolation
(S12), since in a log-linear policy it scales every margin by 1 + λ, ahead of a percentile: the
same pairs are flagged but for rare ties. The candidates of a prompt are distinct, so that no pair
is dropped. Labels by another judge carry no implicit margin: they are for anchor previous alone
(D10).

    python bench/lab.py --out runs/lab --plot bench/lab.png   200 seeds; goes on where it stopped
    python bench/lab.py --out runs/quick --quick              8 seeds of fewer rows: does it run?
"""
import argparse
import itertools
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import expit
from scipy.stats import t as student
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dro  # noqa: E402
from core.policy import token_logps  # noqa: E402
from label import best_and_worst, implicit_reward  # noqa: E402
from seed_dpo import dpo_loss, dpo_margin, lr_at  # noqa: E402
from train import QUIET, leader_loss, loss_star, threshold  # noqa: E402

RESPONSES, PROMPTS = 64, 96  # a prompt's responses; prompts of a round, and of each evaluation
GOLD, MOST_ROUNDS = 120, 5   # prompts of the seed stage alone; rounds there are prompts for
BATCH, CLIP, PERCENTILE = 16, 1.0, 10
SEED_LR, SEED_EPOCHS, GOLD_CANDIDATES = 0.03, 3, 4
RADII = (0.0, 0.01, 0.05, 0.1, 0.2)  # of the held-out worst case
BLOCK = 25                   # seeds in one batch: 700 MB

START = GOLD
EVALUATION = slice(START + PROMPTS * MOST_ROUNDS, START + PROMPTS * (MOST_ROUNDS + 1))
SHIFTED = slice(EVALUATION.stop, EVALUATION.stop + PROMPTS)


class Setting(NamedTuple):
    """One row of the experiment. The defaults are the thesis's anchor without its adversary."""
    features: int = 64
    gold: str = "bent"        # or linear: the gold reward
    pairs: int = 40           # gold pairs of the seed stage
    draw: int = 0             # which of three disjoint seed sets
    flips: float = 0.0        # share of gold labels turned around
    beta: float = 0.1         # weight of the KL term: how far ξ lies from ½
    rounds: int = 2
    lr: float = 0.03          # peak, of the rounds
    candidates: int = 4
    labels: str = "implicit"  # or gold, noisy: who judges the candidates
    reference: str = "init"   # or previous, none: of the implicit judgement
    alpha: float = 0.1        # label smoothing of flagged pairs
    lam: float = 0.5          # extrapolation in round 1, halved in every later round; 0: S9
    # or previous; permuted: each pair has another's margin; weights: previous, times 2(1 − ξ)
    anchor: str = "init"
    epsilon: float = 0.0
    pieces: int = 6
    group: int | None = None  # pairs a ball
    # the least certain move, as dro.py has it; random, most: the same fractions of random pairs, of
    # the most certain; dual: each pair where it hurts most at θ, max(ℓ*(ξ_θ), ℓ*(0) − λ* ξ_θ)
    atoms: str = "least"


SPA = Setting(anchor="previous")


class World(NamedTuple):
    """S seeds; P prompts: of the seed stage, the rounds, EVALUATION, SHIFTED; Y responses."""
    phi: torch.Tensor      # [S, P, Y, d]
    prior: torch.Tensor    # [S, P, Y]  log π_init
    gold: dict             # kind → [S, P, Y]: mean 0, variance 1 under π_init
    gumbel: torch.Tensor   # [S, P, Y]  decides which candidates a policy draws
    noise: torch.Tensor    # [S, P, Y]  of the noisy judge, one standard deviation of gold
    uniform: torch.Tensor  # [S, P]     gold labels with less than `flips` are turned around
    order: torch.Tensor    # [S, rounds, PROMPTS]  permutations


class Pairs(NamedTuple):
    """N pairs (chosen, rejected) of every seed."""
    phi: torch.Tensor     # [S, N, 2, d]
    prior: torch.Tensor   # [S, N, 2]
    margin: torch.Tensor  # [S, N]  the judge's reward of chosen minus rejected, ≥ 0
    right: torch.Tensor   # [S, N]  does gold agree?


class Atoms(NamedTuple):
    """What dro.py found: each pair's two atoms, left in place and moved; λ* of every seed."""
    weight: torch.Tensor  # [S, N, 2]
    shift: torch.Tensor   # [S, N, 2]
    lam: torch.Tensor     # [S, N], one number a seed


# ---------------------------------------------------------------------------------------- the world


def logits(theta: torch.Tensor, phi: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """log π_θ [S, …] but for its normaliser, from theta [S, d], phi [S, …, d], prior [S, …]."""
    flat = phi.flatten(1, -2) @ theta[:, :, None]
    return prior + flat.view(prior.shape)


def log_policy(theta: torch.Tensor, world: World, prompts: slice) -> torch.Tensor:
    """log π_θ(y|x) [S, P, Y], exact."""
    return logits(theta, world.phi[:, prompts], world.prior[:, prompts]).log_softmax(-1)


def make_world(features: int, seeds: range) -> World:
    """Each seed draws its own. Features fall in scale, and rise in SHIFTED: there counts what
    training saw little of. Gold is standardised over EVALUATION, and over SHIFTED on its own."""
    prompts = SHIFTED.stop
    scale = np.linspace(1.5, 0.5, features)
    scale /= math.sqrt((scale ** 2).mean())
    parts = []
    for seed in seeds:
        rng = np.random.default_rng([seed, features])
        phi = rng.standard_normal((prompts, RESPONSES, features))
        phi[:SHIFTED.start] *= scale
        phi[SHIFTED] *= scale[::-1]
        taste = rng.standard_normal((features, 2))
        u, v = np.moveaxis(phi @ (taste / np.linalg.norm(taste, axis=0)), -1, 0)
        # linear, and bent: no θ orders responses like the second
        gold = np.stack([u, np.tanh(1.5 * u) + np.tanh(1.5 * v)])
        shape = (prompts, RESPONSES)
        order = np.argsort(rng.random((MOST_ROUNDS, PROMPTS)))
        parts.append((phi, rng.standard_normal(shape), gold, rng.gumbel(size=shape),
                      rng.standard_normal(shape), rng.random(prompts), order))
    stacked = [torch.from_numpy(np.stack(part)) for part in zip(*parts)]
    phi, prior, gold, gumbel, noise, uniform, order = stacked
    prior = prior.log_softmax(-1)
    for part, measured in ((slice(0, SHIFTED.start), EVALUATION), (SHIFTED, SHIFTED)):
        share = prior[:, None, measured].exp() / PROMPTS
        mean = (share * gold[:, :, measured]).sum((-1, -2), keepdim=True)
        variance = (share * (gold[:, :, measured] - mean) ** 2).sum((-1, -2), keepdim=True)
        gold[:, :, part] = (gold[:, :, part] - mean) / variance.sqrt()
    kinds = {"linear": gold[:, 0], "bent": gold[:, 1]}
    return World(phi, prior, kinds, gumbel, noise, uniform, order)


def candidates(logps: torch.Tensor, gumbel: torch.Tensor, n: int) -> torch.Tensor:
    """Positions [S, N, n] of n distinct responses, drawn one after the other (Gumbel top-n)."""
    return (logps + gumbel).topk(n).indices


def make_pairs(world: World, prompts: slice, drawn: torch.Tensor, reward: torch.Tensor,
               gold: torch.Tensor) -> Pairs:
    """S8: best against worst of the drawn responses by their rewards, both [S, N, n]; gold
    [S, N, Y] knows whether that is right."""
    each = zip(drawn.flatten(0, 1).tolist(), reward.flatten(0, 1).tolist())
    side = torch.tensor([best_and_worst(ids, own) for ids, own in each]).view(*drawn.shape[:2], 2)
    ids, reward = drawn.gather(-1, side), reward.gather(-1, side)
    phi = world.phi[:, prompts]
    phi = phi.gather(2, ids[..., None].expand(*ids.shape, phi.shape[-1]))
    gold = gold.gather(-1, ids)
    prior = world.prior[:, prompts].gather(-1, ids)
    return Pairs(phi, prior, reward[..., 0] - reward[..., 1], gold[..., 0] > gold[..., 1])


def gold_pairs(world: World, setting: Setting, prompts: slice, flips: float) -> Pairs:
    """Best and worst of four responses of π_init by gold, some turned around."""
    drawn = candidates(world.prior[:, prompts], world.gumbel[:, prompts], GOLD_CANDIDATES)
    gold = world.gold[setting.gold][:, prompts]
    pairs = make_pairs(world, prompts, drawn, gold.gather(-1, drawn), gold)
    turned = world.uniform[:, prompts] < flips
    phi = torch.where(turned[..., None, None], pairs.phi.flip(2), pairs.phi)
    prior = torch.where(turned[..., None], pairs.prior.flip(2), pairs.prior)
    return Pairs(phi, prior, pairs.margin, ~turned)


# --------------------------------------------------------------------------------------- the stages


def update(theta: torch.Tensor, optimizer: torch.optim.Optimizer, loss: torch.Tensor,
           lr: float) -> None:
    """One step of every seed on its own mean loss, from loss [S, m]. AdamW acts on each number
    alone, the clip on each seed."""
    optimizer.zero_grad()
    loss.mean(1).sum().backward()
    norm = theta.grad.norm(dim=1, keepdim=True)
    theta.grad *= (CLIP / (norm + 1e-6)).clamp(max=1.0)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()


def margins(theta: torch.Tensor, phi: torch.Tensor, prior: torch.Tensor,
            beta: float) -> torch.Tensor:
    """M [S, m] of π_θ against π_init: normalisers cancel between two responses of one prompt."""
    policy, reference = logits(theta, phi, prior).flatten(0, 1), prior.flatten(0, 1)
    return dpo_margin(policy, reference, beta).view(prior.shape[:2])


def seed_stage(world: World, setting: Setting) -> torch.Tensor:
    """θ [S, d] of π_0: DPO on the gold pairs (S6)."""
    first = setting.draw * setting.pairs
    pairs = gold_pairs(world, setting, slice(first, first + setting.pairs), setting.flips)
    theta = torch.zeros(len(world.phi), setting.features, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([theta], weight_decay=0.0)
    per_epoch = math.ceil(setting.pairs / BATCH)
    for step in range(SEED_EPOCHS * per_epoch):
        epoch, k = divmod(step, per_epoch)
        order = np.random.default_rng(epoch).permutation(setting.pairs)
        batch = torch.from_numpy(order[k * BATCH:(k + 1) * BATCH])
        phi, prior = pairs.phi[:, batch], pairs.prior[:, batch]
        loss = dpo_loss(margins(theta, phi, prior, setting.beta))
        update(theta, optimizer, loss, lr_at(step, SEED_EPOCHS * per_epoch, SEED_LR))
    return theta.detach()


def label(world: World, setting: Setting, prompts: slice, policy: torch.Tensor,
          before: torch.Tensor) -> Pairs:
    """Candidates of π_{t−1} and their labels, from log-probs of π_{t−1} and π_{t−2}, [S, N, Y]."""
    drawn = candidates(policy, world.gumbel[:, prompts], setting.candidates)
    gold = world.gold[setting.gold][:, prompts]
    if setting.labels == "implicit":
        references = {"init": world.prior[:, prompts], "previous": before,
                      "none": torch.zeros_like(policy)}
        logps = (policy, references[setting.reference])
        flat = [own.gather(-1, drawn).flatten().tolist() for own in logps]
        reward = implicit_reward(*flat, setting.beta, [0] * drawn.numel(), 0.0)
        reward = torch.tensor(reward, dtype=torch.float64).view(drawn.shape)
    else:
        judged = gold + world.noise[:, prompts] if setting.labels == "noisy" else gold
        reward = judged.gather(-1, drawn)
    return make_pairs(world, prompts, drawn, reward, gold)


@torch.no_grad()
def extrapolated(policy: torch.Tensor, reference: torch.Tensor, lam: float) -> torch.Tensor:
    """log π̃ [m, 2] (S12) of pairs from logits [m, 2] of policy and reference. What it is
    normalised over cancels in a margin, so the two responses will do for a vocabulary."""
    head = torch.nn.Identity()
    sides = [torch.full((len(policy),), side) for side in (0, 1)]
    return torch.stack([token_logps(head, policy, side, (head, reference), lam)[1]
                        for side in sides], 1)


def follower(xi: np.ndarray, pieces: int, epsilon: float) -> dro.WorstCase:
    """The worst case of confidences xi [N] within ε (T2-3)."""
    lines = dro.tangents(pieces)
    return dro.solve_exact(xi, dro.maximum_of(*lines, xi), lines[1].max(), epsilon)


def worst_case(xi: np.ndarray, setting: Setting, order: torch.Tensor) -> Atoms:
    """Atoms (T2-5) of each seed's confidences xi [S, N]; order [S, N]: whose fraction a pair gets
    where they are random."""
    moved = np.zeros_like(xi)
    lam = np.zeros_like(xi)
    size = setting.group or xi.shape[1]
    starts = list(range(0, xi.shape[1], size))
    for s, own in enumerate(xi):
        solution = dro.average([follower(own[start:start + size], setting.pieces, setting.epsilon)
                                for start in starts])
        moved[s] = np.bincount(solution.owner, solution.weight * (solution.shift != 0), len(own))
        lam[s] = solution.price
    moved = torch.from_numpy(moved)
    if setting.atoms == "random":
        moved = moved.gather(1, order)
    elif setting.atoms == "most":
        rank = torch.from_numpy(xi).argsort(1)
        moved = torch.zeros_like(moved).scatter(1, rank, moved.gather(1, rank.flip(1)))
    shift = torch.from_numpy(xi) * (moved > 0)  # the closed form moves mass to 0
    weight = torch.stack([1 - moved, moved], -1)
    return Atoms(weight, torch.stack([0 * shift, shift], -1), torch.from_numpy(lam))


def losses(margin: torch.Tensor, flag: torch.Tensor, atoms: Atoms,
           setting: Setting) -> torch.Tensor:
    """L_i [m] of margins [m] and flags [m] under atoms [m, 2]."""
    alpha, pieces = setting.alpha, setting.pieces
    if setting.atoms == "dual" and setting.epsilon > 0:
        xi = torch.sigmoid(margin)
        moved = loss_star(0 * xi, pieces) - atoms.lam * xi
        hurts = torch.maximum(loss_star(xi, pieces), moved)
        smoothing = leader_loss(margin, flag, 0 * atoms.weight, atoms.shift, alpha, pieces)
        return (1 - alpha * flag) * hurts + smoothing
    return leader_loss(margin, flag, atoms.weight, atoms.shift, alpha, pieces)


def effective_pairs(margin: torch.Tensor, atoms: Atoms, setting: Setting) -> torch.Tensor:
    """(Σ g)² / Σ g² [S] of gradient weights g = |∂L_i/∂M_i| at margins [S, N]; alike: N."""
    margin = margin.detach().flatten().requires_grad_()
    flat = Atoms(atoms.weight.flatten(0, 1), atoms.shift.flatten(0, 1), atoms.lam.flatten())
    losses(margin, torch.zeros_like(margin), flat, setting).sum().backward()
    g = margin.grad.abs().view(atoms.lam.shape)
    return g.sum(1) ** 2 / (g ** 2).sum(1)


def train_round(theta: torch.Tensor, pairs: Pairs, setting: Setting, t: int,
                order: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """θ of π_t from θ of π_{t−1} [S, d], and what is seen on the way, per seed."""
    seeds, n = pairs.margin.shape
    xi = expit(pairs.margin.numpy())
    atoms = worst_case(xi, setting, order)
    stored = torch.zeros_like(pairs.margin)
    if setting.anchor == "init":
        stored = pairs.margin
    elif setting.anchor == "permuted":
        stored = pairs.margin.gather(1, order)
    elif setting.anchor == "weights":
        atoms = atoms._replace(weight=atoms.weight * 2 * (1 - torch.from_numpy(xi))[..., None])
    effective = effective_pairs(stored, atoms, setting)

    reference = logits(theta, pairs.phi, pairs.prior)
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theta], weight_decay=0.0)
    total = math.ceil(n / BATCH)
    logs = [[] for _ in range(seeds)]
    flags = []
    for step in range(total):
        batch = slice(step * BATCH, (step + 1) * BATCH)
        ref, prior = reference[:, batch].flatten(0, 1), pairs.prior[:, batch]
        now = logits(theta, pairs.phi[:, batch], prior).flatten(0, 1)
        # de-coupled noise detection                                                   S11, S12
        tilde = extrapolated(now, ref, setting.lam / 2 ** t)
        p = torch.sigmoid(dpo_margin(tilde, ref, setting.beta)).view(seeds, -1)
        tau = torch.full((seeds, 1), -math.inf, dtype=torch.float64)
        if setting.alpha > 0 and step >= math.ceil(QUIET * total):
            tau[:, 0] = torch.tensor([threshold(log, PERCENTILE) for log in logs])
        flag = (p < tau).double()
        for log, own in zip(logs, p.tolist()):
            log.append({"p_tilde": own})
        flags.append(flag)
        # refined labels under the worst case
        margin = stored[:, batch].flatten() + dpo_margin(now, ref, setting.beta)
        part = Atoms(*(x[:, batch].flatten(0, 1) for x in atoms))
        loss = losses(margin, flag.flatten(), part, setting).view(seeds, -1)
        update(theta, optimizer, loss, lr_at(step, total, setting.lr))

    flag, moved, right = torch.cat(flags, 1), atoms.weight[..., 1], pairs.right.double()
    ranked = right.gather(1, pairs.margin.argsort(1))
    deciles = [part.mean(1) for part in ranked.tensor_split(10, dim=1)]
    seen = {"accuracy": right.mean(1),
            "effective": effective,
            "moved": moved.mean(1),
            "moved_right": (moved * right).mean(1),
            "flagged": flag.mean(1),
            "flagged_right": (flag * right).mean(1),
            "transport": (moved * torch.from_numpy(xi)).mean(1),
            "xi": torch.from_numpy(xi).mean(1),
            "deciles": torch.stack(deciles, 1)}
    return theta.detach(), seen


# ----------------------------------------------------------------------------------------- measures


def measure(world: World, setting: Setting, theta: torch.Tensor) -> dict:
    """Per seed: value (of π_init: 0), its worst tenth of prompts, value under shifted prompts,
    KL to π_init, and the worst case of gold pairs that nobody trained on, at each of RADII."""
    gold = world.gold[setting.gold]
    logps = log_policy(theta, world, EVALUATION)
    value = (logps.exp() * gold[:, EVALUATION]).sum(-1)
    tenth = value.sort(1).values[:, :PROMPTS // 10].mean(1)
    kl = (logps.exp() * (logps - world.prior[:, EVALUATION])).sum(-1)
    shifted = (log_policy(theta, world, SHIFTED).exp() * gold[:, SHIFTED]).sum(-1)
    pairs = gold_pairs(world, setting, EVALUATION, 0.0)
    xi = torch.sigmoid(margins(theta, pairs.phi, pairs.prior, setting.beta)).numpy()
    heldout = [[follower(own, 6, radius).value for radius in RADII] for own in xi]
    return {"value": value.mean(1), "tenth": tenth, "shifted": shifted.mean(1), "kl": kl.mean(1),
            "heldout": torch.tensor(heldout)}


def run(world: World, setting: Setting, start: torch.Tensor) -> dict[str, list]:
    """All seeds of one setting from π_0 (start [S, d]): measure → one number or list a seed."""
    theta, rounds = start, []
    before = theta * 0
    for t in range(setting.rounds):
        prompts = slice(START + t * PROMPTS, START + (t + 1) * PROMPTS)
        older = log_policy(before, world, prompts) if setting.reference == "previous" else None
        pairs = label(world, setting, prompts, log_policy(theta, world, prompts), older)
        before = theta
        theta, seen = train_round(theta, pairs, setting, t, world.order[:, t])
        rounds.append(seen)
    result = measure(world, setting, theta)
    for key in rounds[0] if rounds else {}:
        result[key] = torch.stack([seen[key] for seen in rounds]).mean(0)
    if rounds:
        result["first"] = rounds[0]["accuracy"]
    return {key: values.tolist() for key, values in result.items()}


# --------------------------------------------------------------------------------------------- rows


class Table(NamedTuple):
    title: str
    base: str  # the row that the others are compared with
    rows: dict[str, Setting]


BASE = "anchor init, ε = 0"
LEAST = Setting(epsilon=0.05)
ARMS = {BASE: {},
        "SPA (anchor previous)": {"anchor": "previous"},
        "ε = 0.01": {"epsilon": 0.01},
        "ε = 0.05": {"epsilon": 0.05},
        "ε = 0.05, random pairs": {"epsilon": 0.05, "atoms": "random"},
        "ε = 0.05, dual leader": {"epsilon": 0.05, "atoms": "dual"}}
PHASE_ARMS = {2: list(ARMS)[:5], 5: [BASE, "ε = 0.05", "ε = 0.05, random pairs"]}
NOISE, RATES = (0.0, 0.1, 0.25, 0.4, 0.5), (0.01, 0.03, 0.06, 0.12, 0.25)
STRENGTHS = (0.1, 0.3, 1.0, 3.0)


def papers(flips: float) -> Table:
    """The papers' rows. π_init is worth 0."""
    rows = {"DPO on the 40 gold pairs": SPA._replace(rounds=0),
            "DPO on gold pairs of all 232 prompts": SPA._replace(rounds=0, pairs=232),
            "self-labels alone (DE)": SPA._replace(alpha=0.0),
            "+ refined labels (SR)": SPA._replace(lam=0.0),
            "+ de-coupled detection (DND): SPA": SPA,
            "SPA, judged against π_{t−2}": SPA._replace(reference="previous"),
            "SPA, judged without a reference": SPA._replace(reference="none"),
            "SPA, labels by the gold judge": SPA._replace(labels="gold"),
            "SPA, labels by a noisy judge": SPA._replace(labels="noisy"),
            "SPA, 10 gold pairs": SPA._replace(pairs=10),
            "SPA, 20 gold pairs": SPA._replace(pairs=20),
            "SPA, 80 gold pairs": SPA._replace(pairs=80),
            "SPA, second initial seed": SPA._replace(draw=1),
            "SPA, third initial seed": SPA._replace(draw=2),
            "SPA, 2 candidates": SPA._replace(candidates=2),
            "SPA, 8 candidates": SPA._replace(candidates=8)}
    return Table("The papers' rows", "+ de-coupled detection (DND): SPA",
                 {name: s._replace(flips=flips) for name, s in rows.items()})


def adversary(flips: float) -> Table:
    rows = {BASE: Setting()}
    rows |= {f"ε = {e}": Setting(epsilon=e) for e in (0.01, 0.03, 0.05, 0.1, 0.3)}
    rows |= {f"ε = 0.05, K = {k}": LEAST._replace(pieces=k) for k in (5, 7)}
    rows |= {f"ε = 0.05, groups of {g}": LEAST._replace(group=g) for g in (10, 25)}
    return Table("The radius, K and G (K acts through ℓ* alone)", BASE,
                 {name: s._replace(flips=flips) for name, s in rows.items()})


def causes(flips: float) -> Table:
    rows = {BASE: Setting(),
            "anchor previous, ε = 0 (SPA)": SPA,
            "anchor init, ε = 0.05": LEAST,
            "anchor previous, ε = 0.05": LEAST._replace(anchor="previous"),
            "ε = 0.05, random pairs": LEAST._replace(atoms="random"),
            "ε = 0.05, most certain pairs": LEAST._replace(atoms="most"),
            "ε = 0.3": LEAST._replace(epsilon=0.3),
            "ε = 0.3, random pairs": LEAST._replace(epsilon=0.3, atoms="random"),
            "ε = 0.05, dual leader": LEAST._replace(atoms="dual"),
            "ε = 0.3, dual leader": LEAST._replace(epsilon=0.3, atoms="dual"),
            "ε = 0, stored margins permuted": Setting(anchor="permuted"),
            "weights 2(1 − ξ), anchor previous": Setting(anchor="weights"),
            "ε = 0, peak rate 0.025": Setting(lr=0.025)}
    return Table("What separates causes", BASE,
                 {name: s._replace(flips=flips) for name, s in rows.items()})


def arms(cell: Setting) -> Table:
    return Table("cell", BASE, {name: cell._replace(**change) for name, change in ARMS.items()})


def cells(quick: bool) -> list[Table]:
    """The six arms everywhere: features, gold, seed size, candidates, flips."""
    if quick:
        return [arms(Setting(candidates=2))]
    grid = itertools.product((16, 64), ("linear", "bent"), (10, 40), (2, 4, 8), (0.0, 0.25, 0.4))
    return [arms(Setting(features, gold, pairs, flips=flips, candidates=n))
            for features, gold, pairs, n, flips in grid]


def strengths(quick: bool) -> list[Table]:
    """The six arms over β: the larger, the further ξ lies from ½ and the more the anchor does."""
    if quick:
        return [arms(Setting(beta=1.0))]
    return [arms(Setting(flips=flips, beta=beta))
            for beta in STRENGTHS for flips in (0.0, 0.25, 0.4)]


def phase(rounds: int, quick: bool) -> dict[tuple[float, float], Table]:
    """Over label noise and learning rate; the seed stage shows where the rounds themselves lose."""
    grid = {}
    for flips in NOISE[::4] if quick else NOISE:
        for lr in RATES[::4] if quick else RATES:
            cell = Setting(flips=flips, lr=lr, rounds=rounds)
            rows = {name: cell._replace(**ARMS[name]) for name in PHASE_ARMS[rounds]}
            # the seed stage knows nothing of the rounds' rate: one row serves all
            rows["seed stage"] = SPA._replace(flips=flips, rounds=0)
            grid[flips, lr] = Table("cell", BASE, rows)
    return grid


# ------------------------------------------------------------------------------------------ results


def finished(path: Path) -> dict[Setting, dict]:
    """Rows that an earlier run wrote, one a setting; a line cut short is taken off the file."""
    rows, text = {}, path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[:text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    for line in whole.splitlines():
        row = json.loads(line)
        rows[Setting(**row["setting"])] = row["measures"]
    return rows


def run_block(job: tuple[Path, range, list[Setting]]) -> tuple[Path, dict[Setting, dict]]:
    """All settings of one number of features on one block of seeds; a row is written when known."""
    path, seeds, settings = job
    torch.set_num_threads(1)
    rows = finished(path)
    missing = [setting for setting in settings if setting not in rows]
    if not missing:
        return path, rows
    world, starts = make_world(missing[0].features, seeds), {}
    with open(path, "a", encoding="utf-8") as file:
        for setting in missing:
            # all that the seed stage knows
            seed = (setting.gold, setting.pairs, setting.draw, setting.flips, setting.beta)
            if seed not in starts:
                starts[seed] = seed_stage(world, setting)
            rows[setting] = run(world, setting, starts[seed])
            row = {"setting": setting._asdict(), "seeds": list(seeds), "measures": rows[setting]}
            file.write(json.dumps(row) + "\n")
            file.flush()
    return path, rows


def run_all(out: Path, settings: list[Setting], seeds: int,
            processes: int) -> dict[Setting, dict[str, np.ndarray]]:
    """Every setting on every seed: measure → [seeds] or [seeds, …]."""
    jobs = []
    for first in range(0, seeds, BLOCK):
        block = range(first, min(first + BLOCK, seeds))
        for features in sorted({s.features for s in settings}):
            path = out / f"features-{features}-seeds-{block.start}-{block.stop - 1}.jsonl"
            jobs.append((path, block, [s for s in settings if s.features == features]))
    blocks = {}
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        done = pool.imap_unordered(run_block, jobs)
        for path, rows in tqdm(done, total=len(jobs), unit="block", disable=None):
            blocks[path] = rows
    results = {}
    for setting in settings:
        parts = [blocks[path][setting] for path, _, own in jobs if setting in own]
        results[setting] = {key: np.concatenate([np.array(part[key]) for part in parts])
                            for key in parts[0]}
    return results


class Difference(NamedTuple):
    """A paired difference over seeds: mean, half the width of its 95 % t-interval, two-sided p."""
    mean: float
    half: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half:.3f}"


def difference(one: np.ndarray, other: np.ndarray) -> Difference:
    gain = one - other
    n = len(gain)
    error = gain.std(ddof=1) / math.sqrt(n)
    if error == 0:
        return Difference(float(gain.mean()), 0.0, 1.0)
    return Difference(float(gain.mean()), float(student.ppf(0.975, n - 1) * error),
                      float(2 * student.sf(abs(gain.mean()) / error, n - 1)))


def by_chance(found: list[Difference]) -> str:
    """How many intervals exclude zero, how many would without any effect, how many stay by Holm's
    correction."""
    p = sorted(d.p for d in found)
    holm = 0
    while holm < len(p) and p[holm] <= 0.05 / (len(p) - holm):
        holm += 1
    return (f"{sum(x < 0.05 for x in p)} of {len(p)} differ at 95 %; {0.05 * len(p):.1f} would by "
            f"chance; {holm} after Holm's correction")


def share(part: np.ndarray, of: np.ndarray) -> str:
    return f"{part.mean() / of.mean():.2f}" if of.mean() > 1e-9 else "–"


def show(heads: list[str], lines: list[list]) -> None:
    """A Markdown table."""
    for line in (heads, ["---"] * len(heads), *lines):
        print(f"| {' | '.join(map(str, line))} |")


def print_table(table: Table, results: dict, seeds: int) -> None:
    """Values, and paired differences to the base row."""
    flips = next(iter(table.rows.values())).flips
    print(f"\n**{table.title}**, {flips:.0%} of the seed labels flipped; {seeds} seeds; "
          f"Δ against “{table.base}”\n")
    base = results[table.rows[table.base]]
    lines, against = [], []
    for name, setting in table.rows.items():
        own = results[setting]
        line = [name, f"{own['value'].mean():.3f}"]
        if name == table.base:
            line += [""] * 4
        else:
            found = [difference(own[key], base[key]) for key in ("value", "tenth", "shifted")]
            against.append(found[0])
            line += [*found, difference(own["heldout"][:, 2], base["heldout"][:, 2])]
        line.append(f"{own['kl'].mean():.2f}")
        if setting.rounds:
            right = own["accuracy"]
            line += [f"{right.mean():.2f}", share(own["moved_right"], own["moved"]),
                     share(right - own["moved_right"], 1 - own["moved"]),
                     share(own["flagged_right"], own["flagged"]),
                     f"{own['effective'].mean():.0f}", f"{own['transport'].mean():.3f}"]
        else:
            line += [""] * 6
        lines.append(line)
    show(["row", "value", "Δ value", "Δ worst tenth", "Δ shifted prompts",
          f"Δ held-out worst case, {RADII[2]}", "KL", "labels right", "moved", "others", "flagged",
          "effective pairs", "transport"], lines)
    print(f"\nValue: {by_chance(against)}.")


def print_deciles(results: dict, noise: tuple) -> None:
    """Are the least certain pairs the wrong ones?"""
    print("\n**Labels right, by decile of ξ** (the adversary moves from the left; ε = 0)\n")
    lines = []
    for flips in noise:
        own = results[Setting(flips=flips)]
        lines.append([f"{flips:.0%}", *(f"{x:.2f}" for x in own["deciles"].mean(0)),
                      f"{own['accuracy'].mean():.2f}", f"{own['xi'].mean():.3f}"])
    show(["flips", *range(1, 11), "all", "mean ξ"], lines)


def print_radii(results: dict, noise: tuple) -> None:
    """What the method promises: is the worst case lower on gold pairs of other prompts?"""
    print("\n**Held-out worst-case loss ℓ̃ against the radius**: of ε = 0, and Δ against it\n")
    names = ["anchor previous, ε = 0 (SPA)", "ε = 0.01", "ε = 0.05", "ε = 0.3",
             "ε = 0.05, random pairs", "ε = 0.05, dual leader"]
    lines, against = [], []
    for flips in noise:
        rows = adversary(flips).rows | causes(flips).rows
        base = results[rows[BASE]]["heldout"]
        lines.append([f"{flips:.0%}", "ε = 0", *(f"{x:.3f}" for x in base.mean(0))])
        for name in names:
            held = results[rows[name]]["heldout"]
            found = [difference(held[:, k], base[:, k]) for k in range(len(RADII))]
            against += found
            lines.append([f"{flips:.0%}", name,
                          *(f"{d.mean:+.4f} ± {d.half:.4f}" for d in found)])
    show(["flips", "trained with", *(f"radius {radius}" for radius in RADII)], lines)
    print(f"\n{by_chance(against)}.")


def print_insurance(results: dict, noise: tuple) -> None:
    """Does it pay in the bad draws? Seeds by round 1's right labels, which no arm can change."""
    print("\n**ε = 0.05 where the first labels are bad, and where they are good**: Δ value in the "
          "quarter of the seeds with the fewest and with the most right\n")
    lines = []
    for flips in noise:
        base = results[Setting(flips=flips)]
        order = np.argsort(base["first"], kind="stable")
        quarter = len(order) // 4
        parts = [order[:quarter], order[-quarter:]]
        right = [f"{base['first'][part].mean():.2f}" for part in parts]
        for name, atoms in (("least certain", "least"), ("random", "random")):
            own = results[LEAST._replace(flips=flips, atoms=atoms)]
            found = [difference(own["value"][part], base["value"][part]) for part in parts]
            correlation = np.corrcoef(base["first"], own["value"] - base["value"])[0, 1]
            lines.append([f"{flips:.0%}", name, *right, *found, f"{correlation:+.2f}"])
    show(["flips", "moved pairs", "right: fewest", "most", "Δ fewest", "Δ most",
          "correlation of Δ and right"], lines)


def print_cells(title: str, tables: list[Table], results: dict) -> None:
    """Many cells: the mean of their differences to ε = 0, and in how many an arm is ahead."""
    print(f"\n**{title}**: Δ against “{BASE}” over {len(tables)} cells; in how many the "
          f"interval lies above zero, and below ({0.025 * len(tables):.1f} each by chance)\n")
    lines = []
    for name in tables[0].rows:
        if name in (BASE, "seed stage"):
            continue
        line = [name]
        for key in ("value", "tenth", "shifted", "heldout"):
            found = []
            for table in tables:
                own, base = results[table.rows[name]][key], results[table.rows[BASE]][key]
                if key == "heldout":
                    own, base = own[:, -1], base[:, -1]
                found.append(difference(own, base))
            means = [d.mean for d in found]
            above = sum(d.p < 0.05 and d.mean > 0 for d in found)
            below = sum(d.p < 0.05 and d.mean < 0 for d in found)
            line.append(f"{np.mean(means):+.4f} ({min(means):+.3f} … {max(means):+.3f}): "
                        f"{above} above, {below} below")
        lines.append(line)
    show(["arm", "Δ value: mean (least … greatest)", "Δ worst tenth", "Δ shifted prompts",
          f"Δ held-out worst case, {RADII[-1]} (below is better)"], lines)


def print_strengths(tables: list[Table], results: dict) -> None:
    """How far ξ lies from ½ decides what the anchor and the atoms do to the weights."""
    print(f"\n**The strength of β**: Δ value against “{BASE}”\n")
    lines = []
    for table in tables:
        own = {name: results[setting] for name, setting in table.rows.items()}
        base, least, cell = own[BASE], own["ε = 0.05"], table.rows[BASE]
        names = [name for name in own if name != BASE]
        lines.append([cell.beta, f"{cell.flips:.0%}", f"{base['xi'].mean():.2f}",
                      f"{base['effective'].mean():.0f}", f"{least['effective'].mean():.0f}",
                      f"{base['value'].mean():.3f}",
                      *(difference(own[name]["value"], base["value"]) for name in names)])
    show(["β", "flips", "mean ξ", "effective pairs, ε = 0", "ε = 0.05", "value",
          *(f"Δ {name}" for name in tables[0].rows if name != BASE)], lines)


def print_phase(grid: dict, results: dict, rounds: int) -> None:
    print(f"\n**Label noise and learning rate, {rounds} rounds**: Δ value but for the last\n")
    lines = []
    for (flips, lr), table in grid.items():
        own = {name: results[setting] for name, setting in table.rows.items()}
        seed, base, least = own["seed stage"], own[BASE], own["ε = 0.05"]
        random = own["ε = 0.05, random pairs"]
        pairs = [(base, seed), (least, base), (random, base), (least, random)]
        found = [difference(one["value"], other["value"]) for one, other in pairs]
        won = found[0]
        tax = f"{-found[1].mean / won.mean:.0%}" if won.mean > won.half else "–"
        lines.append([f"{flips:.0%}", lr, f"{seed['value'].mean():.3f}", *found, tax,
                      difference(least["tenth"], base["tenth"])])
    heads = ["flips", "peak rate", "seed stage", "ε = 0 − seed stage", "ε = 0.05 − ε = 0",
             "random pairs − ε = 0", "ε = 0.05 − random pairs", "cost of ε in what the rounds win",
             "worst tenth: ε = 0.05 − ε = 0"]
    show(heads, lines)


def plot(path: str, grids: dict[int, dict], results: dict, seeds: int) -> None:
    """Colour: paired differences; a star where the 95 % interval leaves zero out."""
    import matplotlib  # slow to import, and the plot's alone
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    random = "ε = 0.05, random pairs"
    panels = [(BASE, "seed stage", "value", "what the rounds win\n(ε = 0 − seed stage)"),
              ("ε = 0.05", BASE, "value", "the adversary\n(ε = 0.05 − ε = 0)"),
              ("ε = 0.05", random, "value", "its choice of pairs\n(least certain − random)"),
              ("ε = 0.05", BASE, "tenth", "worst tenth of prompts\n(ε = 0.05 − ε = 0)")]
    figure, axes = plt.subplots(len(grids), len(panels), figsize=(15, 3.6 * len(grids)),
                                squeeze=False, constrained_layout=True)
    for line, (rounds, grid) in zip(axes, grids.items()):
        noise, rates = (sorted({key[i] for key in grid}) for i in (0, 1))
        for axis, (one, other, key, title) in zip(line, panels):
            limit, digits = (1.0, 2) if other == "seed stage" else (0.1, 3)
            means = np.zeros((len(rates), len(noise)))
            for i, j in np.ndindex(means.shape):
                rows = grid[noise[j], rates[i]].rows
                found = difference(results[rows[one]][key], results[rows[other]][key])
                means[i, j] = found.mean
                text = f"{found.mean:+.{digits}f}{'*' if found.p < 0.05 else ''}"
                color = "white" if abs(found.mean) > 0.7 * limit else "black"
                axis.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
            axis.imshow(means, cmap="RdBu", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
            axis.set_xticks(range(len(noise)), [f"{flips:.0%}" for flips in noise])
            axis.set_yticks(range(len(rates)), rates)
            axis.set(xlabel="seed labels flipped", ylabel=f"peak learning rate, {rounds} rounds",
                     title=title)
    figure.suptitle(f"Gold value in the exact world, paired over {seeds} seeds. Blue gains, red "
                    "loses; a star: the 95 % interval leaves zero out")
    figure.savefig(path, dpi=80, format="png")
    plt.close(figure)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, required=True,
                     help="folder of the results; what is there is not run again")
    cli.add_argument("--seeds", type=int, default=200, help="worlds of every row")
    cli.add_argument("--processes", type=int, default=2, help="one core and 1.5 GB each")
    cli.add_argument("--quick", action="store_true", help="8 seeds of fewer rows")
    cli.add_argument("--plot", help="phase diagram (PNG)")
    args = cli.parse_args()
    seeds, noise, lengths = args.seeds, (0.0, 0.25, 0.4), (2, 5)
    if args.quick:
        seeds, noise, lengths = 8, (0.0,), (2,)
    if seeds < 8:
        cli.error("--seeds must be at least 8: a quarter of them is compared")
    tables = [make(flips) for make in (papers, adversary, causes) for flips in noise]
    sweep, betas = cells(args.quick), strengths(args.quick)
    grids = {rounds: phase(rounds, args.quick) for rounds in lengths}
    every = [*tables, *sweep, *betas]
    for grid in grids.values():
        every += grid.values()
    settings = list(dict.fromkeys(s for table in every for s in table.rows.values()))
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    results = run_all(args.out, settings, seeds, args.processes)
    print(f"{len(settings)} rows of {seeds} seeds, {time.perf_counter() - started:.0f} s on "
          f"{args.processes} processes. ± is half a 95 % t-interval.")
    for table in tables:
        print_table(table, results, seeds)
    print_deciles(results, noise)
    print_radii(results, noise)
    print_insurance(results, noise)
    print_strengths(betas, results)
    print_cells("Features, gold, seed size, candidates, flips", sweep, results)
    for rounds, grid in grids.items():
        title = f"Label noise and learning rate, {rounds} rounds"
        print_cells(title, list(grid.values()), results)
        print_phase(grid, results, rounds)
    if args.plot:
        plot(args.plot, grids, results, seeds)


if __name__ == "__main__":
    main()
