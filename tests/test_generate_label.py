"""Labelling: implicit reward, best against worst."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from conftest import dump, gold_rows, jsonl, ok, pair_rows, run
from core.chat import encode_prompt, encode_response
from core.models import load_model, load_tokenizer
from core.policy import ResponseLogps, score
from judges.judge import vader
from label import best_and_worst, implicit_reward


def test_best_and_worst():
    assert best_and_worst(["a", "b", "c", "d"], [0.1, 0.9, -0.5, 0.2]) == (1, 2)
    assert best_and_worst(["a", "a", "a"], [0.1, 0.1 + 1e-9, 0.1]) is None  # identical text
    assert best_and_worst(["a", "b"], [0.3, 0.3]) is None and best_and_worst(["a"], [0.3]) is None
    assert implicit_reward([-10.0, -12.0], [-11.0, -11.0], 0.1, [7, 9], 0.0) == pytest.approx(
        [0.1, -0.1]
    )
    assert implicit_reward([-10.0, -12.0], [-11.0, -11.0], 0.1, [70, 9], 0.01) == pytest.approx(
        [-0.6, -0.19]
    )  # S13


def test_label_stage_by_hand(folder, other_folder, tmp_path):
    """Margins and log-probs in the rows against scores of single sequences; ties and empty
    candidates dropped and counted."""
    from core.chat import encode_prompt, encode_response

    ask = [{"role": "user", "content": "Write."}]
    responses = dump(
        tmp_path / "r.jsonl",
        [
            {
                "id": "x",
                "prompt": ask,
                "responses": ["one", "two lines", "three", ""],
                "ended": [True, False, True, True],
                "extra": 1,
            },
            {"id": "same", "prompt": ask, "responses": ["one", "one"], "ended": [True, True]},
            {"id": "none", "prompt": ask, "responses": ["", " "], "ended": [True, True]},
        ],
    )
    for processes in (1, 2):
        out = tmp_path / f"l{processes}.jsonl"
        ok(
            run(
                "label.py",
                "--model",
                other_folder,
                "--reference-model",
                folder,
                "--responses",
                responses,
                "--out",
                out,
                "--beta",
                "0.2",
                "--precision",
                "fp32",
                processes=processes,
            )
        )
        (row,) = pair_rows(out)
        logps = []
        for path in (other_folder, folder):
            model, tokenizer = load_model(path, torch.device("cpu")), load_tokenizer(path)
            prompt = encode_prompt(tokenizer, ask)
            logps.append(
                [
                    score(
                        ResponseLogps(model),
                        [(prompt, [encode_response(tokenizer, ask, t, e)])],
                        "fp32",
                        torch.device("cpu"),
                    )[0][0]
                    for t, e in (("one", True), ("two lines", False), ("three", True))
                ]
            )
        reward = 0.2 * (np.array(logps[0]) - logps[1])
        w, l = reward.argmax(), reward.argmin()
        assert (row["chosen"], row["rejected"]) == tuple(
            ["one", "two lines", "three"][k] for k in (w, l)
        )
        assert (row["chosen_ended"], row["rejected_ended"]) == tuple(
            [True, False, True][k] for k in (w, l)
        )
        assert (
            row["margin"] == pytest.approx(reward[w] - reward[l], abs=1e-4)
            and row["margin"] > 0
            and row["extra"] == 1
        )
        assert (row["chosen_logp"], row["rejected_logp"]) == pytest.approx(
            (logps[0][w], logps[0][l]), abs=1e-4
        )
        assert json.load(open(f"{out}.stats.json"))["ties"] == 2
    plain = [
        "label.py",
        "--model",
        other_folder,
        "--responses",
        responses,
        "--beta",
        "0.2",
        "--precision",
        "fp32",
    ]
    lengths = np.array(
        [
            len(encode_response(tokenizer, ask, t, e))
            for t, e in (("one", True), ("two lines", False), ("three", True))
        ]
    )
    for name, flags, reward in (
        ("none", ["--reference", "none"], 0.2 * np.array(logps[0])),  # Table 7's last row; S13
        (
            "short",
            ["--reference-model", folder, "--length-penalty", "0.5"],
            0.2 * (np.array(logps[0]) - logps[1]) - 0.5 * lengths,
        ),
    ):
        ok(run(*plain, *flags, "--out", tmp_path / name))
        (row,) = pair_rows(tmp_path / name)
        assert row["margin"] == pytest.approx(reward.max() - reward.min(), abs=1e-4)
        assert row["chosen"] == ["one", "two lines", "three"][reward.argmax()]
    assert (
        run(*plain, "--out", tmp_path / "x").returncode == 2
    )  # a reference forgotten is not `none`


def test_rows_go_into_trl_as_they_are(folder, other_folder, tokenizer, tmp_path):
    """Gold, labelled and worst-case rows: DPOTrainer reads them from the file, its tokens of a gold
    pair are ours, and its first loss is ln 2."""
    trl = pytest.importorskip("trl")
    import datasets

    gold, drawn = tmp_path / "data/seed.jsonl", tmp_path / "drawn.jsonl"
    labelled, worst = tmp_path / "labelled.jsonl", tmp_path / "worst.jsonl"
    raw = dump(tmp_path / "raw.jsonl", gold_rows(9))
    parts = ["--out", gold.parent, "--seed-size", "4", "--rounds", "4"]
    ok(run("data/prepare.py", "--data", raw, *parts))
    prompts = ["--prompts", gold.parent / "prompts_1.jsonl", "-n", "4", "--max-new-tokens", "8"]
    ok(run("generate.py", "--model", folder, *prompts, "--out", drawn))
    judge = ["--model", folder, "--reference-model", other_folder]
    ok(run("label.py", *judge, "--responses", drawn, "--out", labelled))
    ok(run("dro.py", "--pairs", labelled, "--epsilon", "0.1", "--out", worst))
    assert any(len(row["atoms"]) == 2 for row in jsonl(worst))
    for path in (gold, labelled, worst):
        cache = str(tmp_path / "cache")
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        config = trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=1,
            per_device_train_batch_size=4,
            max_length=None,
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        )
        model = AutoModelForCausalLM.from_pretrained(folder)
        trainer = trl.DPOTrainer(
            model, args=config, train_dataset=rows, processing_class=tokenizer
        )
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        for row, theirs in zip(pair_rows(path), trainer.train_dataset):
            assert theirs["prompt_ids"] == encode_prompt(tokenizer, row["prompt"])
            if path == gold:
                own = encode_response(tokenizer, row["prompt"], row["chosen"])
                assert theirs["chosen_ids"][: len(own)] == own


def test_vader_and_reward_model_judges(ranker, tokenizer, tmp_path):
    good, bad = "What a wonderful, lovely day.", "A terrible, awful mess."
    ((high, low),) = vader(None, [{"responses": [good, bad]}], 0, 1, torch.device("cpu"))
    assert high > 0.5 > -0.5 > low
    ask = [{"role": "user", "content": "Write."}]
    responses = dump(tmp_path / "r.jsonl", [{"id": "x", "prompt": ask, "responses": [bad, good]}])
    ok(run("label.py", "--judge", "vader", "--responses", responses, "--out", tmp_path / "v.jsonl"))
    assert pair_rows(tmp_path / "v.jsonl")[0]["chosen"] == good
    ok(
        run(
            "label.py",
            "--judge",
            "reward-model",
            "--judge-model",
            ranker,
            "--responses",
            responses,
            "--out",
            tmp_path / "m.jsonl",
            "--precision",
            "fp32",
        )
    )
    model, logits = LlamaForSequenceClassification.from_pretrained(ranker), []
    for text in (bad, good):
        ids = tokenizer.apply_chat_template(
            [*ask, {"role": "assistant", "content": text}], return_dict=False
        )
        logits.append(model(torch.tensor([ids])).logits.item())
    row = pair_rows(tmp_path / "m.jsonl")[0]
    assert row["margin"] == pytest.approx(abs(logits[0] - logits[1]), abs=1e-4)
    assert row["chosen"] == (bad, good)[int(np.argmax(logits))]


