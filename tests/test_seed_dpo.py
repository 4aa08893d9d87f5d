"""Chat format, response log-probabilities, the DPO loss and the optimisation loop."""

import argparse
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import core.training as training
import seed_dpo
from conftest import dump, gold_rows, jsonl, launch, make_model, ok, run
from core.chat import encode_prompt, encode_response
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
from core.models import load_model, load_tokenizer
from core.training import training_flops
from seed_dpo import dpo_loss, dpo_margin

CPU = torch.device("cpu")


def full_logits_logp(model, prompt, response):
    """The plain way: whole logits of `prompt response`, in float64."""
    ids = torch.tensor([prompt + response])
    logps = model.double()(ids).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) + j - 1, token].item() for j, token in enumerate(response))


ENCODED = [
    ([5, 6, 7, 8], [[9, 10, 11, 2], [12, 2]]),
    ([30, 31], [[40, 41, 42, 43, 44, 45], [50]]),
    ([60], [[61, 2], [62, 63, 2]]),
]


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig,
        transformers.MistralConfig,
        transformers.Phi3Config,
        transformers.Qwen2Config,
        transformers.PhiConfig,
    ],
)
def test_logps_equal_plain_full_logits(config):
    model = make_model(
        config, **({"sliding_window": None} if config is not transformers.PhiConfig else {})
    )
    assert shares_prompt(model, ENCODED) == (config is not transformers.PhiConfig)
    ours = score(ResponseLogps(model), ENCODED, "fp32", CPU)
    for (prompt, responses), values in zip(ENCODED, ours):
        assert values == pytest.approx(
            [full_logits_logp(model, prompt, y) for y in responses], abs=2e-4
        )


def test_shared_prompt_equals_two_sequences_with_gradients():
    """One sequence per pair and two sequences per pair: the same log-probs and the same
    gradients."""
    results = []
    for shared in (True, False):
        model = make_model().double()
        batch = pack(ENCODED, shared, CPU)
        assert (batch["attention_mask"] is not None) == shared
        logps = sum_by_response(
            token_logps(model.lm_head, response_hidden(model, batch), batch["target"], chunk=3)[0],
            batch,
        )
        (logps * torch.tensor([1.0, -2, 3, -4, 5, -6])).sum().backward()
        results.append((logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for one, two in zip(*results):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)  # norms compute in fp32


def test_prompt_tokens_never_count():
    """The log-prob of a response ignores how probable its prompt is: only positions that predict
    the response are read."""
    batch = pack([([5, 6, 7], [[8, 9]])], False, CPU)
    assert batch["where"].tolist() == [2, 3] and batch["target"].tolist() == [8, 9]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8]]  # the last token is predicted, never read


def test_packing_by_hand():
    batch = pack([([5, 6], [[7, 8, 2], [9, 2]])], True, CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert batch["where"].tolist() == [1, 2, 3, 1, 4] and batch["lengths"] == [3, 2]
    assert batch["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


ROWS = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=4)),
    min_size=1,
    max_size=30,
)


@given(ROWS, st.booleans(), st.integers(1, 300), st.integers(1, 5))
def test_rows_are_dealt_once_within_the_budget(lengths, shared, budget, world):
    encoded = [([0] * n, [[0] * m for m in ms]) for n, ms in lengths]
    passes = deal(encoded, range(len(encoded)), shared, budget, world)
    assert sorted(i for own in passes for p in own for i in p) == list(range(len(encoded)))
    assert len({len(own) for own in passes}) == 1 and len(passes) == world
    for p in (p for own in passes for p in own if len(p) > 1):
        assert len(p) * max(tokens_of(encoded[i], shared) for i in p) <= budget
    counts = [sum(map(len, own)) for own in passes]
    assert max(counts) - min(counts) <= 1


def test_sliding_window_decides_on_sharing(capsys):
    """Within the window sharing is exact; with a row beyond it every response gets a sequence, and
    that is said once."""
    model = make_model(transformers.MistralConfig, sliding_window=10)
    assert shares_prompt(model, ENCODED) and not shares_prompt(model, [([5] * 9, [[6, 7]])])
    long = [([5, 6, 7, 8, 9, 10, 11], [[12, 13, 14, 15, 16, 17, 18], [20, 21]]), *ENCODED]
    for encoded in (ENCODED, long):
        ours = score(
            ResponseLogps(make_model(transformers.MistralConfig, sliding_window=10)),
            encoded,
            "fp32",
            CPU,
        )
        for (prompt, responses), values in zip(encoded, ours):
            assert values == pytest.approx(
                [full_logits_logp(model, prompt, y) for y in responses], abs=2e-4
            )
    assert capsys.readouterr().err.count("one sequence a response") == 1


def test_mfu_is_left_out_where_the_yardstick_was_disturbed(monkeypatch):
    """No step is faster than a matrix product: its speed was measured while others ran."""
    row = ([1, 2, 3], [[4, 5], [6]])
    policy = ResponseLogps(make_model())
    flops = training_flops(policy.model, [row], True)
    monkeypatch.setattr(training.time, "perf_counter", lambda: 10.0)
    pairs = {"loss": [1.0], "margin": [0.0], "gain": [0.0]}
    for peak, mfu in ((flops, 0.5), (flops / 4, None)):
        args = argparse.Namespace(save_every=0)
        own = SimpleNamespace(device=CPU, encoded=[row], shared=True, policy=policy, peak=peak,
                              rank=1, args=args)
        shown = {}
        last = training.log_row(own, 0, [0], pairs, 1.0, 1e-6, started=8.0)
        assert last["mfu"] == mfu
        training.keep(own, [last], SimpleNamespace(set_postfix=shown.update))
        assert ("mfu" in shown) == (mfu is not None) and shown["loss"] == "1"


def test_training_flops_by_hand():
    """Hidden 32, 2 layers, 4 heads of 8, 2 KV heads, MLP 64: 9 216 + 64 weights a layer, a final
    norm of 32, a head of 384 · 32."""
    model, row = make_model(), ([1, 2, 3], [[4, 5], [6]])
    body, head = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 64) + 32, 384 * 32
    # prompt 3 tokens, one response token read (the last of each is not): 4 tokens; 6 pairs in the
    # prompt, 3 + 1 for the response
    assert training_flops(model, [row], True) == 6 * body * 4 + 6 * head * 3 + 12 * 2 * 32 * 10
    # apart: 3 + 1 and 3 tokens, 10 and 6 pairs
    assert training_flops(model, [row], False) == 6 * body * 7 + 6 * head * 3 + 12 * 2 * 32 * 16


def test_dpo_loss_by_hand():
    logps, reference = torch.tensor([[-10.0, -12.0]]), torch.tensor([[-11.0, -11.0]])
    margin = dpo_margin(logps, reference, beta=0.1)  # 0.1 · ((−10 + 11) − (−12 + 11)) = 0.2
    assert margin.item() == pytest.approx(0.2, abs=1e-6)
    assert dpo_loss(margin).item() == pytest.approx(math.log(1 + math.exp(-0.2)), abs=1e-6)
    assert dpo_loss(torch.tensor([0.0])).item() == pytest.approx(math.log(2))


@given(st.floats(-1e4, 1e4))
def test_dpo_loss_is_finite_with_a_gradient(m):
    margin = torch.tensor(m, dtype=torch.float64, requires_grad=True)
    loss = dpo_loss(margin)
    loss.backward()
    assert math.isfinite(loss.item())
    assert margin.grad.item() == pytest.approx(
        -1 / (1 + math.exp(m)) if m < 700 else 0.0, abs=1e-12
    )


def test_learning_rate_schedule():
    rates = [seed_dpo.lr_at(s, 100, 1.0) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0
    assert (
        rates[55] == pytest.approx(0.5)
        and rates == rates[:10] + sorted(rates[10:], reverse=True)
        and rates[-1] < 1e-3
    )


def test_seed_stage_learns_and_one_process_equals_two(folder, tmp_path):
    """D7: the update is the mean over the global batch; batch 8 of 20 pairs leaves an uneven last
    one, and 1 of 9 a lone pair."""
    commands = {}
    for count in (20, 9):
        flags = [
            "--pairs",
            dump(tmp_path / f"seed{count}.jsonl", gold_rows(count)),
            "--model",
            folder,
            "--lr",
            "1e-3",
            "--batch-size",
            "8",
            "--precision",
            "fp32",
            "--epochs",
            "2",
        ]
        ok(run("seed_dpo.py", *flags, "--micro-tokens", "2000", "--out", tmp_path / f"one{count}"))
        commands[count] = [
            "seed_dpo.py",
            *flags,
            "--micro-tokens",
            "60",
            "--out",
            tmp_path / f"two{count}",
        ]
    ok(
        launch(
            *commands.values(),
            [*commands[20][:-1], tmp_path / "sharded20", "--shard", "--save-every", "1e-9"],
        )
    )
    start = load_file(f"{folder}/model.safetensors")
    for count in commands:
        one, two = (
            load_file(tmp_path / f"{n}{count}" / "model.safetensors") for n in ("one", "two")
        )
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5)
        assert min((one[n] - start[n]).abs().max() for n in one) > 1e-4  # every tensor has learnt
    sharded, one = (
        load_file(tmp_path / f"{n}20" / "model.safetensors") for n in ("sharded", "one")
    )
    for name in one:
        torch.testing.assert_close(one[name], sharded[name], rtol=1e-3, atol=2e-5)
    log = jsonl(tmp_path / "one20/log.jsonl")
    assert (
        log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and log[-1]["loss"] < log[0]["loss"]
    )
    assert all(
        r["confidence"] == sorted(r["confidence"]) and 0 < r["mfu"] < 1 and r["memory_gb"] > 0.1
        for r in log
    )


def test_gradient_checkpointing_changes_nothing_but_memory(folder, tmp_path):
    pairs = dump(tmp_path / "seed.jsonl", gold_rows(6))
    for name, extra in {"plain": [], "saved": ["--gradient-checkpointing"]}.items():
        ok(
            run(
                "seed_dpo.py",
                "--pairs",
                pairs,
                "--model",
                folder,
                "--lr",
                "1e-3",
                "--precision",
                "fp32",
                "--out",
                tmp_path / name,
                *extra,
            )
        )
    plain, saved = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "saved"))
    assert plain.keys() == saved.keys() and all(torch.equal(plain[n], saved[n]) for n in plain)


def test_gradient_checkpointing_recomputes_each_layer():
    args = argparse.Namespace(gradient_checkpointing=True, shard=False)
    model, calls = make_model(), []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    distribute(ResponseLogps(model), CPU, 1, args)(pack(ENCODED, True, CPU))[0].sum().backward()
    assert len(calls) == 2


def test_first_update_against_a_separate_computation(folder, tmp_path):
    """One batch, one step of AdamW at a known rate, from log-probs computed the plain way."""
    rows = gold_rows(3)
    pairs = dump(tmp_path / "seed.jsonl", rows)
    ok(
        run(
            "seed_dpo.py",
            "--pairs",
            pairs,
            "--model",
            folder,
            "--lr",
            "1e-3",
            "--epochs",
            "1",
            "--precision",
            "fp32",
            "--micro-tokens",
            "60",
            "--out",
            tmp_path / "out",
        )
    )
    model, tokenizer = load_model(folder, CPU), load_tokenizer(folder)
    model.double().requires_grad_(True)
    total = 0
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        m = 0
        for key, sign in (("chosen", 1), ("rejected", -1)):
            y = encode_response(tokenizer, row["prompt"], row[key])
            lp = model(torch.tensor([prompt + y])).logits[0].log_softmax(-1)
            own = sum(lp[len(prompt) + j - 1, t] for j, t in enumerate(y))
            m = m + 0.1 * sign * (own - own.detach())
        total = total - torch.log(torch.sigmoid(m)) / len(rows)
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    logged = jsonl(tmp_path / "out/log.jsonl")[0]
    assert logged["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4) and logged[
        "loss"
    ] == pytest.approx(total.item(), abs=1e-6)
    torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0).step()
    ours = load_file(tmp_path / "out/model.safetensors")
    for name, p in model.named_parameters():
        if (
            name in ours and (strong := p.grad.abs() > 1e-5).any()
        ):  # where Adam's sign is not rounding
            torch.testing.assert_close(
                ours[name][strong], p.data.float()[strong], rtol=1e-4, atol=1e-5
            )


def test_nan_stops_before_weights_are_saved(folder, tmp_path):
    pairs = dump(tmp_path / "seed.jsonl", gold_rows(6))
    done = run(
        "seed_dpo.py",
        "--pairs",
        pairs,
        "--model",
        folder,
        "--lr",
        "1e30",
        "--batch-size",
        "2",
        "--out",
        tmp_path / "out",
    )
    assert done.returncode == 2 and "No weights are saved" in done.stderr and "g" in done.stderr
    assert not (tmp_path / "out").exists()


def test_settings_are_remembered(folder, tmp_path):
    pairs = dump(tmp_path / "seed.jsonl", gold_rows(4))
    command = [
        "seed_dpo.py",
        "--pairs",
        pairs,
        "--model",
        folder,
        "--out",
        tmp_path / "out",
        "--epochs",
        "1",
    ]
    ok(run(*command))
    assert "complete, skipped" in ok(run(*command)).stdout
    assert "lr 5e-07 → 1e-06" in ok(run(*command, "--lr", "1e-6")).stdout
    dump(tmp_path / "seed.jsonl", gold_rows(5))
    assert "pairs" in ok(run(*command, "--lr", "1e-6")).stdout
