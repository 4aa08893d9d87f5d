"""Response log-probabilities and their layout, the DPO loss, the learning rate and the loop."""
import math
import shlex

import numpy as np
import pytest
import torch
from conftest import (
    dump,
    gold_rows,
    jsonl,
    launch,
    ok,
    plain_logp,
    run,
    saved,
    stats_of,
    weights_of,
)
from families import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

import seed_dpo
from core.chat import encode_prompt, encode_response
from core.models import load_model, load_tokenizer
from core.parallel import distribute
from core.policy import (
    ResponseLogps,
    deal,
    pack,
    response_hidden,
    score,
    shares_prompt,
    sum_by_response,
    token_logps,
    tokens_of,
)
from seed_dpo import dpo_loss, dpo_margin

CPU = torch.device("cpu")
ENCODED = [
    ([5, 6, 7, 8], [[9, 10, 11, 2], [12, 2]]),
    ([30, 31], [[40, 41, 42, 43, 44, 45], [50]]),
    ([60], [[61, 2], [62, 63, 2]]),
]


# ---------------------------------------------------------------------------------------- log-probs


LONG = [([5, 6, 7, 8, 9, 10, 11], [[12, 13, 14, 15, 16, 17, 18], [20, 21]]), *ENCODED]


@pytest.mark.parametrize("family, window, encoded, shared", [
    ("llama", None, ENCODED, True), ("phi3", None, ENCODED, True), ("phi", None, ENCODED, False),
    # Within the window sharing is exact; with a row beyond it every response gets a sequence.
    ("mistral", 10, ENCODED, True), ("mistral", 10, LONG, False)])
def test_logps_equal_plain_full_logits(family, window, encoded, shared):
    model = tiny_model(family, sliding_window=window)
    assert shares_prompt(model, encoded) == shared
    scores = score(ResponseLogps(model), encoded, "fp32")
    model.double()
    for (prompt, responses), values in zip(encoded, scores):
        plain = [plain_logp(model, prompt, y).item() for y in responses]
        assert values == pytest.approx(plain, abs=2e-4)


def test_shared_prompt_equals_two_sequences_with_gradients():
    """One sequence per pair and two sequences per pair: the same log-probs and the same
    gradients."""
    results = []
    for shared in (True, False):
        model = tiny_model("llama").double()
        batch = pack(ENCODED, shared, CPU)
        assert (batch["attention_mask"] is not None) == shared
        hidden = response_hidden(model, batch)
        values, _ = token_logps(model.lm_head, hidden, batch["target"], chunk=3)
        logps = sum_by_response(values, batch)
        (logps * torch.tensor([1.0, -2, 3, -4, 5, -6])).sum().backward()
        results.append((logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for one, two in zip(*results):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)  # norms compute in fp32


LENGTHS = st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=4))


@given(st.lists(LENGTHS, min_size=1, max_size=30), st.booleans(), st.integers(1, 300),
       st.integers(1, 5))
def test_rows_are_dealt_once_within_the_budget(lengths, shared, budget, world):
    encoded = [([0] * n, [[0] * m for m in ms]) for n, ms in lengths]
    dealt = deal(encoded, range(len(encoded)), shared, budget, world)
    passes = [one for rank in dealt for one in rank]
    assert sorted(i for one in passes for i in one) == list(range(len(encoded)))
    assert len({len(rank) for rank in dealt}) == 1 and len(dealt) == world
    for one in passes:
        if len(one) > 1:
            assert len(one) * max(tokens_of(encoded[i], shared) for i in one) <= budget
    counts = [sum(map(len, rank)) for rank in dealt]
    assert max(counts) - min(counts) <= 1


# -------------------------------------------------------------------------------- loss and schedule


@pytest.mark.parametrize("m", [-1e4, -30, 0, 0.2, 30, 1e4])
def test_dpo_loss_by_hand(m):
    """0.1 · ((−10 + 11) − (−12 + 11)) = 0.2; the loss is finite wherever the margin is, and its
    slope is −σ(−margin)."""
    logps, reference = torch.tensor([[-10.0, -12.0]]), torch.tensor([[-11.0, -11.0]])
    assert dpo_margin(logps, reference, beta=0.1).item() == pytest.approx(0.2, abs=1e-6)
    margin = torch.tensor(m, dtype=torch.float64, requires_grad=True)
    loss = dpo_loss(margin)
    loss.backward()
    assert loss.item() == pytest.approx(np.logaddexp(0, -m))
    assert margin.grad.item() == pytest.approx(-expit(-m))


def test_learning_rate_schedule():
    rates = [seed_dpo.lr_at(s, 100, 1.0) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[-1] < 1e-3
    assert rates == rates[:10] + sorted(rates[10:], reverse=True)


# ---------------------------------------------------------------------------------------- the stage


@pytest.fixture
def command(folder, tmp_path):
    """command(name, 'flags …', pairs): the seed stage on that many gold pairs, to tmp_path/name."""
    def of(name: str, flags: str = "", pairs: int = 6, model: str = folder) -> list:
        path = dump(tmp_path / f"seed{pairs}.jsonl", gold_rows(pairs))
        return ["seed_dpo.py", "--pairs", path, "--model", model, "--lr", "1e-3",
                *shlex.split(flags), "--out", tmp_path / name]
    return of


def test_seed_stage_learns_and_one_process_equals_two(folder, command, tmp_path):
    """D7: the update is the mean over the global batch; batch 8 of 20 pairs leaves an uneven last
    one, and 1 of 9 a lone pair."""
    flags = "--batch-size 8 --precision fp32 --epochs 2 --micro-tokens"
    for count in (20, 9):
        ok(run(*command(f"one{count}", f"{flags} 2000", count)))
    ok(launch(command("two20", f"{flags} 60", 20), command("two9", f"{flags} 60", 9),
              command("sharded20", f"{flags} 60 --shard --save-every 1e-9", 20)))
    start = weights_of(folder)
    for name, other in (("one20", "two20"), ("one9", "two9"), ("one20", "sharded20")):
        one, two = weights_of(tmp_path / name), weights_of(tmp_path / other)
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=2e-5)
        assert min((one[n] - start[n]).abs().max() for n in one) > 1e-4  # every tensor has learnt
    log = jsonl(tmp_path / "one20/log.jsonl")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[-1]["loss"] < log[0]["loss"]


def test_a_vision_tower_is_left_alone(command, tokenizer, tmp_path):
    """On two processes as well: DDP waits for the gradient of everything that it is given."""
    tower = saved(tmp_path / "tower", tiny_model("gemma3"), tokenizer)
    flags = "--epochs 1 --precision fp32 --save-every 1e-9"
    ok(launch(command("copied", flags, model=tower),
              command("sharded", f"{flags} --shard", model=tower)))
    before = weights_of(tower)
    for name in ("copied", "sharded"):
        after = weights_of(tmp_path / name)
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert before.keys() == after.keys() and moved
        assert moved == {key for key in before if "language_model" in key or "lm_head" in key}


def test_gradient_checkpointing_recomputes_each_layer_and_changes_nothing():
    gradients, calls = [], []
    for recompute in (False, True):
        model = tiny_model("llama")
        model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
        net = distribute(ResponseLogps(model), False, recompute)
        net(pack(ENCODED, True, CPU))[0].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert len(calls) == 1 + 2
    assert all(torch.equal(plain, saved) for plain, saved in zip(*gradients))


def test_first_update_against_a_separate_computation(folder, command, tmp_path):
    """One batch, one step of AdamW at a known rate, from log-probs computed the plain way."""
    ok(run(*command("out", "--epochs 1 --precision fp32 --micro-tokens 60", 3)))
    model, tokenizer = load_model(folder, CPU), load_tokenizer(folder)
    model.double().requires_grad_(True)
    losses = []
    for row in gold_rows(3):
        prompt = encode_prompt(tokenizer, row["prompt"])
        chosen, rejected = (
            plain_logp(model, prompt, encode_response(tokenizer, row["prompt"], row[side]))
            for side in ("chosen", "rejected"))
        ratio = (chosen - chosen.detach()) - (rejected - rejected.detach())
        losses.append(-torch.log(torch.sigmoid(0.1 * ratio)))
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    (logged,) = jsonl(tmp_path / "out/log.jsonl")
    assert logged["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert logged["loss"] == pytest.approx(loss.item(), abs=1e-6)
    torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0).step()
    ours = weights_of(tmp_path / "out")
    for name, p in model.named_parameters():
        strong = p.grad.abs() > 1e-5  # where Adam's sign is not rounding
        if name in ours:
            expected = p.data.float()[strong]
            torch.testing.assert_close(ours[name][strong], expected, rtol=1e-4, atol=1e-5)


def test_divergence_short_of_nan_is_said(command, tmp_path):
    for flags, said in (("--epochs 1", False), ("--lr 5 --epochs 1 --batch-size 4", True)):
        printed = ok(run(*command("out", flags, 20))).stdout
        assert ("DIVERGED" in printed) == said
        assert ("lower --lr" in stats_of(tmp_path / "out")["diverged"]) == said
