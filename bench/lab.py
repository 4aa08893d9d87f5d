"""What the rounds and the adversary do, in a world small enough to be exact.

    π_θ(y|x) ∝ π_init(y|x) exp(θ·φ(x, y))           64 responses a prompt, Gaussian features φ

so that log-probs, expectations, the worth of a policy and its KL to π_init are sums, not estimates.
All else is the project's own: labels from label.py (S7, S8), worst cases from dro.py (T2-3, T2-5),
losses, noise flags and schedule from seed_dpo.py and train.py (S6, S9 … S11, L_i). A run takes
milliseconds, so that 200 seeds decide a hundredth; every row of one seed sees the same prompts,
features, seed labels and random numbers, and differences are paired.

    value      gold reward in standard deviations, π_init at 0
    at KL 1.5  value of c·θ, c > 0 chosen for each seed so that its KL to π_init is 1.5
    the ray    value of c·θ_0 at the row's own KL: the seed policy extrapolated, without any round

Extrapolation (S12) is left out: in a log-linear policy it scales all margins of a round by 1 + λ,
ahead of a percentile, and flags the same pairs. So is a length penalty (S13): there are no texts.

    python bench/lab.py --out runs/lab --plot bench/lab.png   200 seeds; goes on at the next block
    python bench/lab.py --out runs/quick --quick              8 seeds of fewer rows: does it run?
"""
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
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dro  # noqa: E402
from bench.stats import draw_curve, interval, is_ahead, is_behind  # noqa: E402
from core.stage import natural, parser  # noqa: E402
from judges.report import markdown  # noqa: E402
from label import best_and_worst, implicit_reward  # noqa: E402
from seed_dpo import dpo_margin, lr_at  # noqa: E402
from train import QUIET, leader_loss, threshold  # noqa: E402

RESPONSES, PROMPTS = 64, 96  # a prompt's responses; prompts of a round, and of the evaluation
GOLD, MOST_ROUNDS = 60, 2    # prompts of the seed stage alone; rounds there are prompts for
BATCH, CLIP, PERCENTILE, PIECES = 16, 1.0, 10, 6
SEED_LR, GOLD_CANDIDATES = 0.03, 4
QUESTIONS = 10               # pairs of a round whose label may be asked for
COMMON_KL = 1.5              # nats an answer, at which rows are compared
BLOCK = 25                   # seeds in one batch: 400 MB

EVALUATION = slice(GOLD + PROMPTS * MOST_ROUNDS, GOLD + PROMPTS * (MOST_ROUNDS + 1))


class Setting(NamedTuple):
    """One row of the experiment; the defaults are SPA's."""
    features: int = 64
    gold: str = "bent"        # or linear: the gold reward
    pairs: int = 40           # gold pairs of the seed stage
    flips: float = 0.0        # share of gold labels turned around
    beta: float = 0.1         # weight of the KL term: how far ξ lies from ½
    epochs: int = 3           # of the seed stage
    rounds: int = 2
    lr: float = 0.03          # peak, of the rounds
    candidates: int = 4
    judge: str = "policy"     # or seed (π_0 in every round), gold: who labels the candidates
    alpha: float = 0.1        # label smoothing of flagged pairs
    anchor: str = "previous"  # or init
    epsilon: float = 0.0
    atoms: str = "least"      # certain pairs move, as dro.py has it; random, most: as many others
    weights: str = "one"      # or margin: pairs weigh in proportion to it
    questions: str = "none"   # or least, random, most certain: ten pairs a round get a gold label
    replay: str = "none"      # or gold, self: as many pairs as the seed has join every round
    scale: float = 1.0        # c of the last policy's c·θ


class World(NamedTuple):
    """S seeds; P prompts, of the seed stage, the rounds and EVALUATION; Y responses."""
    phi: torch.Tensor      # [S, P, Y, d]
    prior: torch.Tensor    # [S, P, Y]  log π_init
    gold: dict             # kind → [S, P, Y]: mean 0, variance 1 under π_init
    gumbel: torch.Tensor   # [S, P, Y]  decides which candidates a policy draws
    uniform: torch.Tensor  # [S, P]     gold labels with less than `flips` are turned around
    order: torch.Tensor    # [S, rounds, PROMPTS]  permutations


class Pairs(NamedTuple):
    """N pairs (chosen, rejected) of every seed."""
    phi: torch.Tensor     # [S, N, 2, d]
    prior: torch.Tensor   # [S, N, 2]
    margin: torch.Tensor  # [S, N]  implicit reward of chosen minus rejected, ≥ 0; of gold labels 0
    right: torch.Tensor   # [S, N]  does gold agree?


# ---------------------------------------------------------------------------------------- the world


def make_world(features: int, seeds: range) -> World:
    """Each seed draws its own. Gold is standardised over EVALUATION."""
    shape = (EVALUATION.stop, RESPONSES)
    scale = np.linspace(1.5, 0.5, features)
    scale /= math.sqrt((scale ** 2).mean())
    parts = []
    for seed in seeds:
        rng = np.random.default_rng([seed, features])
        phi = rng.standard_normal((*shape, features)) * scale
        taste = rng.standard_normal((features, 2))
        u, v = np.moveaxis(phi @ (taste / np.linalg.norm(taste, axis=0)), -1, 0)
        # linear, and bent: no θ orders responses like the second
        gold = np.stack([u, np.tanh(1.5 * u) + np.tanh(1.5 * v)])
        order = np.argsort(rng.random((MOST_ROUNDS, PROMPTS)))
        parts.append((phi, rng.standard_normal(shape), gold, rng.gumbel(size=shape),
                      rng.random(shape[0]), order))
    stacked = [torch.from_numpy(np.stack(part)) for part in zip(*parts)]
    phi, prior, gold, gumbel, uniform, order = stacked
    prior = prior.log_softmax(-1)
    share = prior[:, None, EVALUATION].exp() / PROMPTS
    gold -= (share * gold[:, :, EVALUATION]).sum((-1, -2), keepdim=True)
    gold /= (share * gold[:, :, EVALUATION] ** 2).sum((-1, -2), keepdim=True).sqrt()
    return World(phi, prior, {"linear": gold[:, 0], "bent": gold[:, 1]}, gumbel, uniform, order)


def tilt(theta: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
    """θ·φ [S, …] from theta [S, d] and phi [S, …, d]."""
    return (phi.flatten(1, -2) @ theta[:, :, None]).view(phi.shape[:-1])


def log_policy(theta: torch.Tensor, world: World, prompts: slice) -> torch.Tensor:
    """log π_θ(y|x) [S, P, Y], exact."""
    return (world.prior[:, prompts] + tilt(theta, world.phi[:, prompts])).log_softmax(-1)


def draw(logps: torch.Tensor, gumbel: torch.Tensor, n: int) -> torch.Tensor:
    """Positions [S, N, n] of n distinct responses, drawn one after the other (Gumbel top-n)."""
    return (logps + gumbel).topk(n).indices


def make_pairs(world: World, setting: Setting, prompts: slice, policy: torch.Tensor,
               judge: torch.Tensor | None, n: int) -> Pairs:
    """S8: of n responses that `policy` draws, best against worst by the implicit reward of `judge`
    (S7), both log-probs [S, N, Y]; without a judge by gold."""
    drawn = draw(policy, world.gumbel[:, prompts], n)
    gold, prior = world.gold[setting.gold][:, prompts], world.prior[:, prompts]
    if judge is None:
        reward = gold.gather(-1, drawn)
    else:
        flat = [logps.gather(-1, drawn).flatten().tolist() for logps in (judge, prior)]
        reward = implicit_reward(*flat, setting.beta, [0] * drawn.numel(), 0.0)
        reward = torch.tensor(reward, dtype=torch.float64).view(drawn.shape)
    sides = map(best_and_worst, drawn.flatten(0, 1).tolist(), reward.flatten(0, 1).tolist())
    side = torch.tensor(list(sides)).view(*drawn.shape[:2], 2)
    ids = drawn.gather(-1, side)
    phi = world.phi[:, prompts].take_along_dim(ids[..., None], 2)
    margin = -reward.gather(-1, side).diff()[..., 0]
    right = gold.gather(-1, ids).diff()[..., 0] < 0
    return Pairs(phi, prior.gather(-1, ids), margin * (judge is not None), right)


def turn(pairs: Pairs, where: torch.Tensor) -> Pairs:
    """The pairs with the labels turned around `where` [S, N] says so."""
    phi = torch.where(where[..., None, None], pairs.phi.flip(2), pairs.phi)
    prior = torch.where(where[..., None], pairs.prior.flip(2), pairs.prior)
    return Pairs(phi, prior, pairs.margin, pairs.right ^ where)


def gold_pairs(world: World, setting: Setting) -> Pairs:
    """Of the seed stage: best and worst of four responses of π_init by gold, some turned around."""
    prompts = slice(0, setting.pairs)
    pairs = make_pairs(world, setting, prompts, world.prior[:, prompts], None, GOLD_CANDIDATES)
    return turn(pairs, world.uniform[:, prompts] < setting.flips)


def ranking(margin: torch.Tensor, which: str, order: torch.Tensor) -> torch.Tensor:
    """Positions [S, N], the least certain pair first, or the most certain, or by a random order."""
    if which == "random":
        return order
    return margin.argsort(1, descending=which == "most")


# --------------------------------------------------------------------------------------- the stages


def label(world: World, setting: Setting, t: int, theta: torch.Tensor,
          start: torch.Tensor) -> Pairs:
    """Candidates of π_{t−1} (theta) and their labels, in round t + 1; start: θ_0."""
    prompts = slice(GOLD + t * PROMPTS, GOLD + (t + 1) * PROMPTS)
    policy = judge = log_policy(theta, world, prompts)
    if setting.judge == "seed":
        judge = log_policy(start, world, prompts)
    elif setting.judge == "gold":
        judge = None
    pairs = make_pairs(world, setting, prompts, policy, judge, setting.candidates)
    if setting.questions != "none":
        rank = ranking(pairs.margin, setting.questions, world.order[:, t])
        asked = torch.zeros_like(pairs.right).scatter(1, rank[:, :QUESTIONS], True)
        # the answers are as often wrong as the seed's labels
        answer = world.uniform[:, prompts] >= setting.flips
        pairs = turn(pairs, asked & (pairs.right != answer))
    return pairs


def worst_case(margin: torch.Tensor, setting: Setting,
               order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and shifts [S, N, 2] of each pair's two atoms (T2-5), in place and moved to 0, from
    margins [S, N]; order [S, N]: who moves where that is random."""
    moved = torch.zeros_like(margin)
    lines = dro.tangents(PIECES)
    for fractions, xi in zip(moved, expit(margin.numpy())):
        tilde = dro.maximum_of(*lines, xi)
        solution = dro.solve_exact(xi, tilde, lines[1].max(), setting.epsilon)
        shares = np.bincount(solution.owner, solution.weight * (solution.shift != 0))
        fractions.copy_(torch.from_numpy(np.sort(shares)[::-1].copy()))
    # the closed form moves the least certain pairs, the last of them in part
    moved = torch.zeros_like(moved).scatter(1, ranking(margin, setting.atoms, order), moved)
    shift = torch.sigmoid(margin) * (moved > 0)
    return torch.stack([1 - moved, moved], -1), torch.stack([0 * shift, shift], -1)


def losses(margin: torch.Tensor, flag: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor,
           alpha: float) -> torch.Tensor:
    """L_i [S, m] of margins and flags [S, m] under atoms [S, m, 2]."""
    flat = [x.flatten(0, 1) for x in (margin, flag, weight, shift)]
    return leader_loss(*flat, alpha, PIECES).view(margin.shape)


def train(theta: torch.Tensor, pairs: Pairs, setting: Setting, lr: float, batches: list,
          order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """θ of π_t from θ of π_{t−1} [S, d], by batches of positions; and how many pairs these are in
    effect [S]: N (Σ g m)² / (Σ g² Σ m²), of gradient weights g = |∂L_i/∂M_i| at the start and
    margins m."""
    m = pairs.margin
    weight, shift = worst_case(m, setting, order)
    pair_weight = m / m.mean(1, keepdim=True) if setting.weights == "margin" else torch.ones_like(m)
    stored = m if setting.anchor == "init" else torch.zeros_like(m)
    margin = stored.clone().requires_grad_()
    (pair_weight * losses(margin, 0 * m, weight, shift, setting.alpha)).sum().backward()
    g = margin.grad.abs()
    signal = (g * m).sum(1) ** 2 / ((g ** 2).sum(1) * (m ** 2).sum(1) + 1e-12)

    reference = pairs.prior + tilt(theta, pairs.phi)
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theta], weight_decay=0.0)
    logs = [[] for _ in m]
    for step, batch in enumerate(batches):
        now = pairs.prior[:, batch] + tilt(theta, pairs.phi[:, batch])
        gained = dpo_margin(now.mT, reference[:, batch].mT, setting.beta)
        # de-coupled noise detection                                                        S9, S11
        p = torch.sigmoid(gained.detach())
        flagging = step >= math.ceil(QUIET * len(batches))
        tau = [threshold(log, PERCENTILE) if flagging else -math.inf for log in logs]
        flag = (p < torch.tensor(tau)[:, None]).double()
        for log, seen in zip(logs, p.tolist()):
            log.append({"p_tilde": seen})
        # refined labels under the worst case
        loss = losses(stored[:, batch] + gained, flag, weight[:, batch], shift[:, batch],
                      setting.alpha)
        # every seed on its own mean: AdamW acts on each number alone, the clip on each seed
        optimizer.zero_grad()
        (pair_weight[:, batch] * loss).mean(1).sum().backward()
        norm = theta.grad.norm(dim=1, keepdim=True)
        theta.grad *= (CLIP / (norm + 1e-6)).clamp(max=1.0)
        optimizer.param_groups[0]["lr"] = lr_at(step, len(batches), lr)
        optimizer.step()
    return theta.detach(), m.shape[1] * signal


def seed_stage(world: World, setting: Setting) -> torch.Tensor:
    """θ [S, d] of π_0: DPO (S6) on the gold pairs."""
    batches = []
    for epoch in range(setting.epochs):
        order = np.random.default_rng(epoch).permutation(setting.pairs)
        batches += torch.from_numpy(order).split(BATCH)
    start = torch.zeros(len(world.phi), setting.features, dtype=torch.float64)
    dpo = Setting(beta=setting.beta, alpha=0.0)
    return train(start, gold_pairs(world, setting), dpo, SEED_LR, batches, world.order)[0]


def train_round(theta: torch.Tensor, world: World, setting: Setting, t: int,
                start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `train`, round t + 1 of a run from θ_0 (start)."""
    pairs = label(world, setting, t, theta, start)
    batches = torch.arange(PROMPTS).split(BATCH)
    if setting.replay != "none":
        more = gold_pairs(world, setting) if setting.replay == "gold" else pairs
        pairs = Pairs(*(torch.cat([own, again[:, :setting.pairs]], 1)
                        for own, again in zip(pairs, more)))
        order = np.random.default_rng(t).permutation(PROMPTS + setting.pairs)
        batches = torch.from_numpy(order).split(BATCH)
    return train(theta, pairs, setting, setting.lr, batches, world.order[:, t])


# ----------------------------------------------------------------------------------------- measures


def scale_to(target: torch.Tensor, tilts: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """c [S] > 0 at which prior + c · tilts [S, P, Y], normalised, has KL `target` [S] to π_init.
    Newton's method on √KL, which is nearly straight in c; d KL/dc = c Var. A KL that no c reaches
    gets a large c."""
    c = torch.ones_like(target)
    for _ in range(12):
        logps = (prior + c[:, None, None] * tilts).log_softmax(-1)
        p = logps.exp()
        root = (p * (logps - prior)).sum(-1).mean(1).sqrt()
        if (root ** 2 - target).abs().max() < 1e-9:
            break
        variance = (p * tilts ** 2).sum(-1) - (p * tilts).sum(-1) ** 2
        slope = c * variance.mean(1) / (2 * root) + 1e-12
        step = (target.sqrt() - root) / slope
        c = (c + step).clamp(c / 4, c * 4)
    return c


def measure(world: World, setting: Setting, theta: torch.Tensor,
            start: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per seed: KL to π_init, what the docstring of the file says, `c` of the ray, and the value of
    π_0 as `start`."""
    gold, prior = world.gold[setting.gold][:, EVALUATION], world.prior[:, EVALUATION]
    end, seed = (tilt(each, world.phi[:, EVALUATION]) for each in (theta, start))

    def value(tilts: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        policy = (prior + c[:, None, None] * tilts).softmax(-1)
        return (policy * gold).sum(-1).mean(1)

    logps = (prior + end).log_softmax(-1)
    kl = (logps.exp() * (logps - prior)).sum(-1).mean(1)
    one = torch.ones_like(kl)
    c = scale_to(kl, seed, prior)
    return {"kl": kl, "value": value(end, one), "start": value(seed, one), "c": c,
            "equal": value(end, scale_to(COMMON_KL * one, end, prior)), "ray": value(seed, c)}


def run(world: World, setting: Setting, start: torch.Tensor) -> dict[str, list]:
    """All seeds of one setting from π_0 (start [S, d]): measure → one number a seed."""
    theta, effective = start, torch.zeros(len(start))
    for t in range(setting.rounds):
        theta, pairs = train_round(theta, world, setting, t, start)
        effective = effective + pairs / setting.rounds
    result = measure(world, setting, setting.scale * theta, start) | {"effective": effective}
    return {key: values.tolist() for key, values in result.items()}


# --------------------------------------------------------------------------------------------- rows

SPA, ANCHOR, RAY = "SPA", "anchor init, ε = 0", "no round: θ_0 scaled to SPA's KL"
EVERY = "DPO on gold labels of 232 prompts"
LEAST, RANDOM = "ten questions a round: least certain", "ten questions a round: random"
WORST, MORE, REPLAY = "ε = 0.05", "as many labels in the seed", "gold pairs replayed"
# name → how a row differs from SPA; RAY's values are worked out from SPA's row and π_0's
ROWS = {
    SPA: {},
    RAY: {"rounds": 0},
    "iterative DPO: no refinement": {"alpha": 0.0},
    "8 candidates": {"candidates": 8},
    "pairs weigh ∝ m": {"weights": "margin"},
    "π_0 judges every round": {"judge": "seed"},
    "SPA, rate 0.12": {"lr": 0.12},
    "π_0 judges every round, rate 0.12": {"judge": "seed", "lr": 0.12},
    REPLAY: {"replay": "gold"},
    "as many self-labelled pairs repeated": {"replay": "self"},
    LEAST: {"questions": "least"},
    RANDOM: {"questions": "random"},
    "ten questions a round: most certain": {"questions": "most"},
    MORE: {"pairs": 60},
    "labels by the gold judge": {"judge": "gold"},
    EVERY: {"rounds": 0, "pairs": 232},
    ANCHOR: {"anchor": "init"},
    "ε = 0.01": {"anchor": "init", "epsilon": 0.01},
    WORST: {"anchor": "init", "epsilon": 0.05},
    "ε = 0.05 on random pairs": {"anchor": "init", "epsilon": 0.05, "atoms": "random"},
    "ε = 0.05 on the most certain": {"anchor": "init", "epsilon": 0.05, "atoms": "most"},
    "ε = 0.3": {"anchor": "init", "epsilon": 0.3},
}
SWEEP = [SPA, RAY, WORST, "pairs weigh ∝ m", "π_0 judges every round", REPLAY, LEAST, RANDOM, MORE]
PHASE = [SPA, RAY, ANCHOR, WORST, "ε = 0.05 on random pairs"]
# panels of the phase diagram
DIFFERENCES = [
    ("what the rounds add to the ray\nSPA − θ₀ at SPA's KL", SPA, RAY),
    ("the adversary\nε = 0.05 − ε = 0", WORST, ANCHOR),
    ("its choice of pairs\nleast certain − random", WORST, "ε = 0.05 on random pairs"),
]
BY_ROUND = ("rounds", (0, 1, 2))
# method → how it differs from SPA, and what changes from point to point of its curve
CURVES = {
    "the ray: c·θ₀, c = 1 … 6": ({"rounds": 0}, "scale", (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
    "the seed at 3, 6, 12, 24 epochs": ({"rounds": 0}, "epochs", (3, 6, 12, 24)),
    "SPA, 0 to 2 rounds": ({}, *BY_ROUND),
    "SPA, rate 0.12": ({"lr": 0.12}, *BY_ROUND),
    "worst case, ε = 0.05": (ROWS[WORST], *BY_ROUND),
    "worst case, rate 0.12": (ROWS[WORST] | {"lr": 0.12}, *BY_ROUND),
    REPLAY: (ROWS[REPLAY], *BY_ROUND),
    "gold labels in the rounds": ({"judge": "gold"}, *BY_ROUND),
    "DPO on all gold labels, its ray": (ROWS[EVERY], "scale", (1.0, 1.5, 2.0, 3.0)),
}
FLIPS = (0.0, 0.25, 0.4)
NOISE, RATES = (0.0, 0.1, 0.25, 0.4, 0.5), (0.01, 0.03, 0.06, 0.12, 0.25)


def cell_rows(cell: Setting, names: list[str]) -> dict[str, Setting]:
    """The rows of these names in a cell; MORE has twenty gold pairs more than the cell."""
    rows = {name: cell._replace(**ROWS[name]) for name in names}
    if MORE in rows:
        rows[MORE] = cell._replace(pairs=cell.pairs + 2 * QUESTIONS)
    return rows


def rows_in(cells: list[Setting], names: list[str]) -> list[Setting]:
    """The rows of these names in every cell, each once."""
    return list(dict.fromkeys(row for cell in cells for row in cell_rows(cell, names).values()))


def sweep_cells() -> list[Setting]:
    """Features, gold, seed size, candidates and flips; rates and flips; β and flips."""
    grid = itertools.product((16, 64), ("linear", "bent"), (10, 40), FLIPS, (2, 4, 8))
    cells = [Setting(features, gold, pairs, flips, candidates=n)
             for features, gold, pairs, flips, n in grid]
    for flips in FLIPS:
        cells += [Setting(flips=flips, lr=lr) for lr in RATES if lr != 0.03]
        cells += [Setting(flips=flips, beta=beta) for beta in (0.3, 1.0, 3.0)]
    return cells


# ------------------------------------------------------------------------------------------ results


def run_block(job: tuple[Path, range, list[Setting]]) -> dict[Setting, dict]:
    """All settings of one number of features on one block of seeds, kept in a file."""
    path, seeds, settings = job
    torch.set_num_threads(1)
    if path.exists():
        rows = {Setting(*setting): row for setting, row in json.loads(path.read_text())}
        if rows.keys() >= set(settings):
            return rows
    world, starts, rows = make_world(settings[0].features, seeds), {}, {}
    for setting in settings:
        # all that the seed stage knows
        key = (setting.gold, setting.pairs, setting.flips, setting.beta, setting.epochs)
        if key not in starts:
            starts[key] = seed_stage(world, setting)
        rows[setting] = run(world, setting, starts[key])
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(list(rows.items())))
    tmp.rename(path)
    return rows


def run_all(out: Path, settings: list[Setting], seeds: range,
            processes: int) -> dict[Setting, dict[str, np.ndarray]]:
    """Every setting on every seed: measure → [seeds]. `out` keeps what is known."""
    jobs = []
    for start, features in itertools.product(seeds[::BLOCK], {s.features for s in settings}):
        block = range(start, min(start + BLOCK, seeds.stop))
        path = out / f"features-{features}-seeds-{start}-{block.stop - 1}.json"
        jobs.append((path, block, [s for s in settings if s.features == features]))
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        done = pool.imap(run_block, jobs)
        blocks = list(tqdm(done, total=len(jobs), unit="block", disable=None))
    results = {}
    for setting in settings:
        parts = [rows[setting] for rows in blocks if setting in rows]
        results[setting] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return results


def measures_of(rows: dict[str, Setting], results: dict) -> dict[str, dict[str, np.ndarray]]:
    """Name → measures; those of RAY are π_0's at SPA's KL."""
    measures = {name: results[setting] for name, setting in rows.items()}
    spa = measures[SPA]
    ray = {"value": spa["ray"], "ray": spa["ray"], "kl": spa["kl"], "c": spa["c"]}
    return measures | {RAY: measures[RAY] | ray}


def print_table(title: str, measures: dict[str, dict[str, np.ndarray]]) -> None:
    """Values, and paired differences to SPA, for rows with ε to ε = 0 at the same anchor."""
    lines = []
    for name, row in measures.items():
        base = measures[ANCHOR if name.startswith("ε") else SPA]
        gain = interval(row["value"] - base["value"])
        won = (base["value"] - base["start"]).mean()
        lines.append([name, row["value"].mean(), gain.text(), f"{gain.mean / won:.0%}",
                      interval(row["equal"] - base["equal"]).text(),
                      interval(row["value"] - row["ray"]).text(),
                      *(f"{row[key].mean():.2f}" for key in ("c", "kl")),
                      f"{row['effective'].mean():.0f}" if row["effective"].any() else "–"])
    print(f"\n**{title}**: Δ to “{SPA}”, of rows with ε > 0 to “{ANCHOR}”; π_0 is worth "
          f"{measures[SPA]['start'].mean():.3f}\n")
    print(markdown(["row", "value", "Δ value", "of what the rounds win", f"Δ at KL {COMMON_KL}",
                    "− the ray at its KL", "c of that ray", "KL", "effective pairs"], lines))


def print_sweep(cells: list[dict[str, dict[str, np.ndarray]]]) -> None:
    """In how many cells a row is ahead of SPA and behind it, at its own KL and at the same."""
    lines = []
    for one, other in [*((name, SPA) for name in SWEEP[1:]), (LEAST, RANDOM)]:
        line = [f"{one} − {other}"]
        for key in ("value", "equal"):
            gains = [interval(rows[one][key] - rows[other][key]) for rows in cells]
            line += [f"{np.mean([gain.mean for gain in gains]):+.3f}",
                     f"{sum(map(is_ahead, gains))} / {sum(map(is_behind, gains))}"]
        lines.append(line)
    print(f"\n**{len(cells)} cells**: mean difference, and in how many its interval lies above 0 "
          f"and below ({0.025 * len(cells):.1f} each by chance)\n")
    print(markdown(["difference", "value", "above / below", f"at KL {COMMON_KL}", "above / below"],
                   lines))


def plot(path: str, cells: list[Setting], phase: list[list[Setting]], results: dict) -> None:
    """Above, for each of the cells, value against √KL; below, paired differences in the cells of
    `phase`, a line a learning rate."""
    import matplotlib  # slow to import, and the plot's alone
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams["font.size"] = 11
    figure = plt.figure(figsize=(13, 10.5), layout="constrained")
    upper, lower = figure.subfigures(2, height_ratios=[1.35, 1])
    axes = upper.subplots(1, len(cells), squeeze=False)[0]
    for axis, cell in zip(axes, cells):
        for method, (change, key, values) in CURVES.items():
            points = [results[cell._replace(**{**change, key: value})] for value in values]
            draw_curve(axis, method, [(point["kl"], point["value"]) for point in points])
        axis.set(title=f"{cell.flips:.0%} of the seed labels flipped", ylabel="gold value",
                 xlabel="√KL to π_init (√nats)")
        axis.grid(color="0.9")
    handles = axes[0].get_legend_handles_labels()
    upper.legend(*handles, loc="outside lower center", ncol=3, frameon=False)

    axes = lower.subplots(1, len(DIFFERENCES))
    for axis, (title, one, other) in zip(axes, DIFFERENCES):
        means = np.zeros((len(phase), len(phase[0])))
        for y, x in np.ndindex(means.shape):
            rows = measures_of(cell_rows(phase[y][x], PHASE), results)
            gain = interval(rows[one]["value"] - rows[other]["value"])
            means[y, x] = gain.mean
            text = f"{gain.mean:+.3f}{'*' if gain.p < 0.05 else ''}".replace("-", "−")
            axis.text(x, y, text, ha="center", va="center", fontsize=9.5,
                      color="white" if abs(gain.mean) > 0.1 else "black")
        image = axis.imshow(means, "RdBu", vmin=-0.15, vmax=0.15, origin="lower", aspect="auto")
        axis.set_xticks(range(means.shape[1]), [f"{cell.flips:.0%}" for cell in phase[0]])
        axis.set_yticks(range(means.shape[0]), [line[0].lr for line in phase])
        axis.set(title=title, xlabel="seed labels flipped", ylabel="peak rate of the rounds")
    lower.colorbar(image, ax=axes, extend="both",
                   label="paired difference in gold value\n(*: its 95 % interval leaves out 0)")
    figure.savefig(path, dpi=80, format="png")
    plt.close(figure)


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--out", type=Path, required=True,
                     help="folder of the results; what is there is not run again")
    cli.add_argument("--seeds", type=natural, default=200, help="worlds of every row")
    cli.add_argument("--processes", type=natural, default=2, help="one core and 1 GB each")
    cli.add_argument("--quick", action="store_true", help="8 seeds of fewer rows")
    cli.add_argument("--plot", help="curves and phase diagram (PNG)")
    args = cli.parse_args()
    seeds = range(args.seeds)
    mains, cells = [Setting(flips=flips) for flips in FLIPS], sweep_cells()
    phase = [[Setting(flips=flips, lr=lr) for flips in NOISE] for lr in RATES]
    if args.quick:
        seeds, mains, cells = seeds[:8], mains[:1], cells[-2:]
        phase = [line[::4] for line in phase[1::3]]
    drawn = mains[::2]

    started = time.perf_counter()
    settings = [cell._replace(**{**change, key: value}) for cell in drawn
                for change, key, values in CURVES.values() for value in values]
    settings += rows_in(mains, list(ROWS))
    results = run_all(args.out / "rows", settings, seeds, args.processes)
    print(f"{len(seeds)} seeds. ± is half a 95 % t-interval.")
    for cell in mains:
        print_table(f"{cell.flips:.0%} of the seed labels flipped",
                    measures_of(cell_rows(cell, list(ROWS)), results))
    results |= run_all(args.out / "cells", rows_in(cells, SWEEP), seeds, args.processes)
    print_sweep([measures_of(cell_rows(cell, SWEEP), results) for cell in cells])
    if args.plot:
        phases = rows_in(sum(phase, []), PHASE)
        results |= run_all(args.out / "phases", phases, seeds, args.processes)
        plot(args.plot, drawn, phase, results)
    print(f"\n{len(results)} rows, {time.perf_counter() - started:.0f} s on {args.processes} "
          "processes.")


if __name__ == "__main__":
    main()
