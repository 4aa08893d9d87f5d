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

    python bench/lab.py --out runs/lab --plot bench/lab.png

From the top: the world, the stages of a run, what is measured, ROWS, and what is shown of them.
"""
import itertools
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import brentq
from scipy.special import log_softmax
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dro  # noqa: E402
from bench.stats import draw_curve, interval, is_ahead, is_behind  # noqa: E402
from core.stage import digest_of, natural, parser  # noqa: E402
from judges.report import markdown  # noqa: E402
from label import best_and_worst, implicit_reward  # noqa: E402
from seed_dpo import dpo_margin, lr_at  # noqa: E402
from train import QUIET, leader_loss, loss_star, threshold  # noqa: E402

RESPONSES, PROMPTS = 64, 96  # a prompt's responses; prompts of a round, and of the evaluation
GOLD, ROUNDS = 60, 2         # prompts of the seed stage alone; rounds there are prompts for
BATCH, PERCENTILE, PIECES = 16, 10, 6
QUESTIONS = 10               # pairs of a round whose label may be asked for
COMMON_KL = 1.5              # nats an answer, at which rows are compared


class Setting(NamedTuple):
    """One row of the experiment; the defaults are SPA's."""
    features: int = 64
    gold: str = "bent"        # or linear: the gold reward
    pairs: int = 40           # gold pairs of the seed stage
    flips: float = 0.0        # share of gold labels turned around
    candidates: int = 4
    beta: float = 0.1         # weight of the KL term: how far ξ lies from ½
    lr: float = 0.03          # peak
    extra: int = 0            # gold pairs of the seed stage on top
    epochs: int = 3           # of the seed stage
    rounds: int = ROUNDS
    judge: str = "policy"     # or seed (π_0 in every round), gold: who labels the candidates
    alpha: float = 0.1        # label smoothing of flagged pairs
    anchor: str = "previous"  # or init
    epsilon: float = 0.0
    atoms: str = "least"      # certain pairs move, as dro.py has it; random, most: as many others
    weights: str = "one"      # or margin: pairs weigh in proportion to it
    questions: str = "none"   # or least, random, most certain: ten pairs a round get a gold label
    replay: str = "none"      # or gold, self: as many pairs as the seed has join every round


class Prompts(NamedTuple):
    """P prompts of one seed, Y responses each."""
    phi: Tensor      # [P, Y, d]
    prior: Tensor    # [P, Y]  log π_init
    gold: Tensor     # [P, Y]  mean 0, variance 1 under π_init
    gumbel: Tensor   # [P, Y]  decides which candidates a policy draws
    uniform: Tensor  # [P]     gold labels with less than `flips` are turned around
    chance: Tensor   # [P]     a random order of a round's pairs

    def part(self, first: int, count: int) -> "Prompts":
        return Prompts(*(each[first:first + count] for each in self))


class Pairs(NamedTuple):
    """N pairs (chosen, rejected)."""
    phi: Tensor     # [N, 2, d]
    margin: Tensor  # [N]  implicit reward of chosen minus rejected, ≥ 0; of gold labels 0
    right: Tensor   # [N]  does gold agree?
    chance: Tensor  # [N]


# ---------------------------------------------------------------------------------------- the world


def make_world(setting: Setting, seed: int) -> Prompts:
    """Prompts of the seed stage, the rounds and the evaluation; gold is standardised on these."""
    rng = np.random.default_rng([seed, setting.features])
    shape = (GOLD + PROMPTS * (ROUNDS + 1), RESPONSES)
    scale = np.linspace(1.5, 0.5, setting.features)
    phi = rng.standard_normal((*shape, setting.features)) * scale / np.sqrt(np.mean(scale ** 2))
    taste = rng.standard_normal((setting.features, 2))
    u, v = (phi @ (direction / np.linalg.norm(direction)) for direction in taste.T)
    # no θ orders responses as the second does
    gold = u if setting.gold == "linear" else np.tanh(1.5 * u) + np.tanh(1.5 * v)
    chance = np.pad(rng.random(ROUNDS * PROMPTS), (GOLD, PROMPTS))
    prior = log_softmax(rng.standard_normal(shape), -1)
    share = np.exp(prior[-PROMPTS:])
    gold -= np.average(gold[-PROMPTS:], weights=share)
    gold /= math.sqrt(np.average(gold[-PROMPTS:] ** 2, weights=share))
    drawn = (phi, prior, gold, rng.gumbel(size=shape), rng.random(len(phi)), chance)
    return Prompts(*map(torch.from_numpy, drawn))


def log_policy(theta: Tensor, prompts: Prompts) -> Tensor:
    """log π_θ(y|x) [P, Y], exact."""
    return (prompts.prior + prompts.phi @ theta).log_softmax(-1)


def make_pairs(prompts: Prompts, policy: Tensor, reward: Tensor, n: int) -> Pairs:
    """S8: of n distinct responses that `policy` (log-probs [P, Y]) draws, best against worst by
    `reward` [P, Y]."""
    drawn = (policy + prompts.gumbel).topk(n).indices  # one after the other
    rewards = reward.gather(1, drawn)
    sides = [best_and_worst(*each) for each in zip(drawn.tolist(), rewards.tolist())]
    ids = drawn.gather(1, torch.tensor(sides))
    phi = prompts.phi.take_along_dim(ids[..., None], 1)
    margin, gain = (-each.gather(1, ids).diff()[:, 0] for each in (reward, prompts.gold))
    return Pairs(phi, margin * (reward is not prompts.gold), gain > 0, prompts.chance)


def ask(pairs: Pairs, asked: Tensor, prompts: Prompts, flips: float) -> None:
    """Whoever gave the seed's labels gives those of the pairs at these positions, some wrong."""
    answer = prompts.uniform[asked] >= flips
    turned = asked[pairs.right[asked] ^ answer]
    pairs.phi[turned] = pairs.phi[turned].flip(1)
    pairs.right[turned] ^= True


def gold_pairs(world: Prompts, setting: Setting) -> Pairs:
    """Of the seed stage: best and worst of four responses of π_init by gold, some turned around."""
    prompts = world.part(0, setting.pairs + setting.extra)
    pairs = make_pairs(prompts, prompts.prior, prompts.gold, 4)
    ask(pairs, torch.arange(len(pairs.phi)), prompts, setting.flips)
    return pairs


def ranking(pairs: Pairs, which: str) -> Tensor:
    """Positions [N], the least certain pair first, or the most certain, or by a random order."""
    keys = {"least": pairs.margin, "most": -pairs.margin, "random": pairs.chance}
    return keys[which].argsort()


# --------------------------------------------------------------------------------------- the stages


def label(world: Prompts, setting: Setting, t: int, theta: Tensor, start: Tensor) -> Pairs:
    """Round t + 1 of a run from θ_0 (start): candidates of π_t (theta), labelled."""
    prompts = world.part(GOLD + t * PROMPTS, PROMPTS)
    policy = log_policy(theta, prompts)
    judge = log_policy(start, prompts) if setting.judge == "seed" else policy
    (reward,) = implicit_reward([judge], [prompts.prior], setting.beta, [0], 0.0)            # S7
    reward = prompts.gold if setting.judge == "gold" else reward
    pairs = make_pairs(prompts, policy, reward, setting.candidates)
    if setting.questions != "none":
        ask(pairs, ranking(pairs, setting.questions)[:QUESTIONS], prompts, setting.flips)
    return pairs


def replay(pairs: Pairs, world: Prompts, setting: Setting, t: int) -> Pairs:
    """The round's pairs and as many more as the seed has, shuffled."""
    more = gold_pairs(world, setting) if setting.replay == "gold" else pairs
    order = np.random.default_rng(t).permutation(PROMPTS + setting.pairs)
    joined = [torch.cat([own, again[:setting.pairs]]) for own, again in zip(pairs, more)]
    return Pairs(*(each[order] for each in joined))


def worst_case(pairs: Pairs, setting: Setting) -> Tensor:
    """The fraction of each pair [N] that the adversary moves to ξ = 0 (T2-5)."""
    xi = torch.sigmoid(pairs.margin)
    at_zero = 1 + math.log(PIECES)
    losses = loss_star(xi, PIECES).numpy()
    worst = dro.solve_exact(xi.numpy(), losses, at_zero, setting.epsilon)
    moved = np.bincount(worst.owner, worst.weight * (worst.shift != 0))
    # the closed form moves the least certain pairs, the last of them in part
    moved = torch.from_numpy(moved).sort(descending=True).values
    return moved.scatter(0, ranking(pairs, setting.atoms), moved)


def train(theta: Tensor, pairs: Pairs, setting: Setting, batches: list) -> tuple[Tensor, Tensor]:
    """θ of π_t from θ of π_{t−1} [d], by batches of positions; and how many pairs these are in
    effect: N (Σ g m)² / (Σ g² Σ m²), of gradient weights g = |∂L_i/∂M_i| at the start and margins
    m."""
    m = pairs.margin
    stored = m if setting.anchor == "init" else 0 * m                                        # D6
    pair_weight = m / m.mean() if setting.weights == "margin" else torch.ones_like(m)
    moved = worst_case(pairs, setting)
    xi = torch.sigmoid(stored)
    g = pair_weight * (1 - xi) * (1 - moved + moved * PIECES * xi)
    effective = len(m) * (g @ m) ** 2 / ((g @ g) * (m @ m) + 1e-12)

    weight = torch.stack([1 - moved, moved], -1)
    shift = torch.stack([0 * m, torch.sigmoid(m)], -1)
    reference = pairs.phi @ theta  # log π_{t−1}, but for what a pair's sides have in common
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theta], weight_decay=0.0)
    log = []
    for step, batch in enumerate(batches):
        gained = dpo_margin(pairs.phi[batch] @ theta, reference[batch], setting.beta)
        # de-coupled noise detection                                                        S9, S11
        p = torch.sigmoid(gained.detach())
        flagging = step >= math.ceil(QUIET * len(batches))
        flag = (p < threshold(log, PERCENTILE)).double() * flagging
        log.append({"p_tilde": p.tolist()})
        # refined labels under the worst case
        loss = leader_loss(stored[batch] + gained, flag, weight[batch], shift[batch],
                           setting.alpha, PIECES)
        optimizer.zero_grad()
        (pair_weight[batch] * loss).mean().backward()
        torch.nn.utils.clip_grad_norm_([theta], 1.0)
        optimizer.param_groups[0]["lr"] = lr_at(step, len(batches), setting.lr)
        optimizer.step()
    return theta.detach(), effective


def seed_stage(world: Prompts, setting: Setting) -> Tensor:
    """θ [d] of π_0: DPO (S6) on the gold pairs."""
    pairs = gold_pairs(world, setting)
    batches = []
    for epoch in range(setting.epochs):
        order = np.random.default_rng(epoch).permutation(len(pairs.phi))
        batches += torch.from_numpy(order).split(BATCH)
    start = torch.zeros(setting.features, dtype=torch.float64)
    return train(start, pairs, Setting(beta=setting.beta, alpha=0.0), batches)[0]


# ----------------------------------------------------------------------------------------- measures


class Row(NamedTuple):
    """What is known of a row: of π_0 and the policy after every round [policies, seeds]."""
    value: np.ndarray
    kl: np.ndarray
    equal: np.ndarray      # value at COMMON_KL
    ray: np.ndarray        # value of c·θ_0 at the policy's own KL
    c: np.ndarray
    effective: np.ndarray  # pairs, mean over the rounds


def value_and_kl(theta: Tensor, prompts: Prompts) -> list[float]:
    """Mean gold reward of π_θ, and its KL to π_init."""
    logps = log_policy(theta, prompts)
    terms = (prompts.gold, logps - prompts.prior)
    return [(logps.exp() * term).sum(-1).mean().item() for term in terms]


def scale_to(target: float, theta: Tensor, prompts: Prompts) -> float:
    """c at which c·θ has KL `target` to π_init, or 100 where no less has."""
    def excess(c: float) -> float:
        return value_and_kl(c * theta, prompts)[1] - target

    # rounded, so that π_0 lies on its own ray
    return round(brentq(excess, 0, 100), 10) if excess(100) > 0 else 100.0


def run(world: Prompts, setting: Setting) -> list[list[float]]:
    """One seed of a Row: its numbers, policy by policy."""
    evaluation = world.part(len(world.phi) - PROMPTS, PROMPTS)
    start = theta = seed_stage(world, setting)
    effective = 0.0
    policies = []
    for t in range(setting.rounds + 1):
        value, kl = value_and_kl(theta, evaluation)
        equal, c = scale_to(COMMON_KL, theta, evaluation), scale_to(kl, start, evaluation)
        at_equal, ray = (value_and_kl(point, evaluation)[0] for point in (equal * theta, c * start))
        policies.append([value, kl, at_equal, ray, c, effective])
        if t < setting.rounds:
            pairs = label(world, setting, t, theta, start)
            if setting.replay != "none":
                pairs = replay(pairs, world, setting, t)
            batches = torch.arange(len(pairs.phi)).split(BATCH)
            theta, count = train(theta, pairs, setting, batches)
            effective += count.item() / setting.rounds
    return policies


# --------------------------------------------------------------------------------------------- rows

SPA, FAST, RAY = "SPA", "SPA, rate 0.12", "no round: θ_0 scaled to SPA's KL"
ANCHOR, WORST = "anchor init, ε = 0", "ε = 0.05"
REPLAY, JUDGE = "gold pairs replayed", "labels by the gold judge"
LEAST, RANDOM = "ten questions a round: least certain", "ten questions a round: random"
# name → how a row differs from its cell; RAY is worked out from SPA's row
SWEEP = {
    SPA: {},
    "pairs weigh ∝ m": {"weights": "margin"},
    "π_0 judges every round": {"judge": "seed"},
    REPLAY: {"replay": "gold"},
    LEAST: {"questions": "least"},
    RANDOM: {"questions": "random"},
    "as many labels in the seed": {"extra": ROUNDS * QUESTIONS},
    WORST: {"anchor": "init", "epsilon": 0.05},
}
EPOCHS = {f"no round: {n} epochs in the seed": {"rounds": 0, "epochs": n} for n in (3, 6, 12, 24)}
ROWS = SWEEP | EPOCHS | {
    "iterative DPO: no refinement": {"alpha": 0.0},
    "8 candidates": {"candidates": 8},
    FAST: {"lr": 0.12},
    "π_0 judges every round, rate 0.12": {"judge": "seed", "lr": 0.12},
    "as many self-labelled pairs repeated": {"replay": "self"},
    "ten questions a round: most certain": {"questions": "most"},
    JUDGE: {"judge": "gold"},
    "DPO on gold labels of 232 prompts": {"rounds": 0, "extra": ROUNDS * PROMPTS},
    ANCHOR: {"anchor": "init"},
    "ε = 0.01": {"anchor": "init", "epsilon": 0.01},
    "ε = 0.05 on random pairs": {"anchor": "init", "epsilon": 0.05, "atoms": "random"},
    "ε = 0.05 on the most certain": {"anchor": "init", "epsilon": 0.05, "atoms": "most"},
    "ε = 0.3": {"anchor": "init", "epsilon": 0.3},
}
FLIPS = (0.0, 0.25, 0.4)


def sweep_cells() -> list[Setting]:
    """Features, gold, seed size, flips and candidates; flips and rates; flips and β."""
    grid = itertools.product((16, 64), ("linear", "bent"), (10, 40), FLIPS, (2, 4, 8))
    cells = [Setting(*point) for point in grid]
    for flips in FLIPS:
        cells += [Setting(flips=flips, lr=lr) for lr in (0.01, 0.06, 0.12, 0.25)]
        cells += [Setting(flips=flips, beta=beta) for beta in (0.3, 1.0, 3.0)]
    return cells


def run_cell(out: str, cell: Setting, changes: dict, seeds: int) -> dict[str, Row]:
    """The rows that differ from a cell by these changes, and RAY, on so many seeds; kept in a file
    of `out` under a digest of its settings."""
    settings = {name: cell._replace(**change) for name, change in changes.items()}
    path = Path(out, f"{digest_of(settings)}-{seeds}.json")
    if not path.exists():
        runs = []
        for seed in range(seeds):
            world = make_world(cell, seed)
            runs.append([run(world, setting) for setting in settings.values()])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(runs))
        path.with_suffix(".tmp").rename(path)
    by_row = zip(*json.loads(path.read_text()))
    rows = {name: Row(*np.transpose(numbers)) for name, numbers in zip(settings, by_row)}
    spa = rows[SPA]
    return {RAY: spa._replace(value=spa.ray, equal=spa.equal[:1], effective=0 * spa.kl)} | rows


# ------------------------------------------------------------------------------------------ results


def print_table(flips: float, rows: dict[str, Row]) -> None:
    """Values, and paired differences to SPA, for rows with ε to ε = 0 at the same anchor."""
    lines = []
    for name, row in rows.items():
        base = rows[ANCHOR if name.startswith("ε") else SPA]
        value, kl, equal, ray, c, effective = (each[-1] for each in row)
        gain = interval(value - base.value[-1])
        won = base.value[-1] - base.value[0]
        lines.append([name, value.mean(), gain.text(), f"{gain.mean / won.mean():.0%}",
                      interval(equal - base.equal[-1]).text(), interval(value - ray).text(),
                      *(f"{each.mean():.2f}" for each in (c, kl)), f"{effective.mean():.0f}"])
    print(f"\n**{flips:.0%} of the seed labels flipped**: ± is half a 95 % t-interval, Δ to "
          f"“{SPA}”, of rows with ε > 0 to “{ANCHOR}”\n")
    print(markdown(["row", "value", "Δ value", "of what the rounds win", f"Δ at KL {COMMON_KL}",
                    "− the ray at its KL", "c of that ray", "KL", "effective pairs"], lines))


def print_sweep(cells: list[dict[str, Row]]) -> None:
    """In how many cells a row is ahead of SPA and behind it."""
    lines = []
    for one, other in [*((name, SPA) for name in (RAY, *SWEEP)), (LEAST, RANDOM)]:
        gains = [interval(rows[one].value[-1] - rows[other].value[-1]) for rows in cells]
        lines.append([f"{one} − {other}", sum(map(is_ahead, gains)), sum(map(is_behind, gains))])
    print(f"\n**{len(cells)} cells**: in how many the interval of a difference lies above 0 and "
          f"below ({0.025 * len(cells):.1f} each by chance)\n")
    print(markdown(["difference", "above", "below"], lines))


def plot(path: str, tables: dict[float, dict[str, Row]]) -> None:
    """Value against √KL; the policies of a row are the points of its curve."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    for axis, flips in zip(figure.subplots(1, 2), (0.0, 0.4)):
        rows = tables[flips]
        spa, fast = rows[SPA], rows[FAST]
        ray = [*zip(spa.kl, spa.ray), *zip(fast.kl[1:], fast.ray[1:])]
        draw_curve(axis, "no round: c·θ₀", ray)
        longer = [(rows[name].kl[0], rows[name].value[0]) for name in EPOCHS]
        draw_curve(axis, "no round: 3 to 24 epochs in the seed", longer)
        for name in (SPA, FAST, WORST, REPLAY, JUDGE):
            draw_curve(axis, name, list(zip(rows[name].kl, rows[name].value)))
        axis.set(title=f"{flips:.0%} of the seed labels flipped", ylabel="gold value",
                 xlabel="√KL to π_init (√nats)")
        axis.grid(color="0.9")
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncol=4, frameon=False)
    figure.savefig(path, dpi=80)


def main() -> None:
    cli = parser(__doc__, out="folder of the results; what is there is not run again")
    cli.add_argument("--seeds", type=natural, default=200, help="of the sweep at most 25")
    cli.add_argument("--plot", help="value against √KL (PNG)")
    args = cli.parse_args()
    torch.set_num_threads(1)

    tables = {}
    for flips in FLIPS:
        tables[flips] = run_cell(args.out, Setting(flips=flips), ROWS, args.seeds)
        print_table(flips, tables[flips])
    if args.plot:
        plot(args.plot, tables)
    few = min(args.seeds, 25)
    print_sweep([run_cell(args.out, cell, SWEEP, few) for cell in sweep_cells()])


if __name__ == "__main__":
    main()
