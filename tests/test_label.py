"""Labelling: implicit reward, best against worst, what is left out and why, other judges."""
import math

import numpy as np
import pytest
import torch
from conftest import dump, gold_rows, jsonl, ok, one_line, pair_rows, plain_logp, run, stats_of
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from core.chat import answered, encode_prompt, encode_response
from core.models import load_model, load_tokenizer
from core.rows import scored_digest
from core.stage import fingerprint
from label import best_and_worst, implicit_reward

ASK = [{"role": "user", "content": "Write."}]
CPU = torch.device("cpu")
TEXTS = [("one", True), ("two lines", False), ("three", True)]
FLAGS = ["--beta", "0.2", "--precision", "fp32"]


def test_best_and_worst():
    assert best_and_worst(["a", "b", "c", "d"], [0.1, 0.9, -0.5, 0.2]) == (1, 2)
    assert best_and_worst(["a", "a", "a"], [0.1, 0.1 + 1e-9, 0.1]) is None  # identical text
    assert best_and_worst(["a", "b"], [0.3, 0.3]) is None
    assert best_and_worst(["a"], [0.3]) is None
    reward = implicit_reward([-10.0, -12.0], [-11.0, -11.0], 0.1, [70, 9], 0.01)  # S13
    assert reward == pytest.approx([-0.6, -0.19])


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    """Three answers of which one was cut; rows without a preference."""
    texts, ended = map(list, zip(*TEXTS))
    rows = [{"id": "x", "prompt": ASK, "responses": [*texts, ""], "ended": [*ended, True],
             "extra": 1},
            {"id": "same", "prompt": ASK, "responses": ["one", "one"], "ended": [True, True]},
            {"id": "single", "prompt": ASK, "responses": ["one", ""], "ended": [True, True]},
            {"id": "none", "prompt": ASK, "responses": ["", " "], "ended": [True, True]}]
    return dump(tmp_path_factory.mktemp("responses") / "r.jsonl", rows)


@pytest.fixture(scope="module")
def logps(folder, other_folder):
    """log π of the three answers by policy and reference, each sequence scored alone."""
    scored = []
    for path in (other_folder, folder):
        model, tokenizer = load_model(path, CPU), load_tokenizer(path)
        prompt = encode_prompt(tokenizer, ASK)
        scored.append([plain_logp(model, prompt, encode_response(tokenizer, ASK, *answer)).item()
                       for answer in TEXTS])
    return np.array(scored)


@pytest.mark.parametrize("processes", [1, 2])
def test_label_stage_by_hand(folder, other_folder, responses, logps, tmp_path, processes):
    """Margins and log-probs in the rows against scores of single sequences; what is left out is
    counted, each reason by itself."""
    out = tmp_path / "l.jsonl"
    models = ["--model", other_folder, "--reference-model", folder]
    done = ok(run("label.py", *models, "--responses", responses, "--out", out, *FLAGS,
                  processes=processes))
    (row,) = pair_rows(out)
    reward = 0.2 * (logps[0] - logps[1])
    for side, k in (("chosen", reward.argmax()), ("rejected", reward.argmin())):
        assert (row[side], row[f"{side}_ended"]) == TEXTS[k]
        assert row[f"{side}_logp"] == pytest.approx(logps[0][k], abs=1e-4)
    assert row["margin"] == pytest.approx(reward.max() - reward.min(), abs=1e-4)
    assert row["margin"] > 0 and row["extra"] == 1
    ids = {key: row[key] for key in ("chosen_ids", "rejected_ids")}
    assert row["margin_of"] == {
        "judge": "implicit", "reference": "init", "beta": 0.2, "length_penalty": 0.0,
        "policy": fingerprint(other_folder), "precision": "fp32",
        "scored": scored_digest({"prompt": ASK, "chosen": row["chosen"],
                                 "rejected": row["rejected"], **ids})}
    counts = {"prompts": 4, "labelled": 1, "ties": 0, "identical": 1, "fewer_than_two": 2,
              "empty": 4}
    assert counts.items() <= stats_of(out).items()
    assert "2 rows with fewer than two" in done.stdout and "ties" not in done.stdout


def test_gold_pairs_join_with_their_own_labels(folder, other_folder, responses, tmp_path):
    """Scored by the policy, which may disagree; the others' rows stay what they are, and no worst
    case takes a label that is no confidence."""
    gold = gold_rows(6)
    alone, joined = tmp_path / "alone.jsonl", tmp_path / "joined.jsonl"
    command = ["label.py", "--model", other_folder, "--reference-model", folder, *FLAGS,
               "--responses", responses, "--out"]
    ok(run(*command, alone))
    done = ok(run(*command, joined, "--gold", dump(tmp_path / "gold.jsonl", gold)))
    assert "1 pairs by implicit" in done.stdout and "6 gold pairs appended" in done.stdout
    (own,), new = pair_rows(alone), pair_rows(joined)
    assert (new[0]["chosen"], new[0]["rejected"]) == (own["chosen"], own["rejected"])
    assert stats_of(joined)["median_margin"] == pytest.approx(own["margin"], abs=1e-4)
    model, tokenizer = load_model(other_folder, CPU), load_tokenizer(other_folder)
    for row, given in zip(new[1:], gold, strict=True):
        prompt = encode_prompt(tokenizer, given["prompt"])
        for side in ("chosen", "rejected"):
            response = encode_response(tokenizer, given["prompt"], given[side], True)
            logp = plain_logp(model, prompt, response)
            assert row[side] == given[side]
            assert row[f"{side}_logp"] == pytest.approx(logp.item(), abs=1e-4)
        assert (row["margin"], row["margin_of"]["judge"]) == (0, "gold")
    refused = run("dro.py", "--pairs", joined, "--out", tmp_path / "worst.jsonl")
    one_line(refused, "judge 'gold'")
    train = ["train.py", "--model", other_folder, "--out", tmp_path / "policy", "--pairs", joined,
             "--precision", "fp32"]
    one_line(run(*train, "--anchor", "init"), "--anchor previous")
    # one step: no later loss would show it
    one_line(run(*train, "--lr", "1e300", "--batch-size", "9"), "not finite, and nothing is saved")
    ok(run(*train))
    twice = dump(tmp_path / "twice.jsonl", [gold[0] | {"id": own["id"]}])
    one_line(run(*command, tmp_path / "twice", "--gold", twice), "ids must differ")


@pytest.mark.parametrize("flags, weights, penalty", [
    (["--reference", "none"], (0.2, 0.0), 0.0),              # Table 7's last row
    (["--length-penalty", "0.5"], (0.2, -0.2), 0.5)])        # S13
def test_other_rewards(folder, other_folder, tokenizer, responses, logps, tmp_path, flags, weights,
                       penalty):
    plain = ["label.py", "--model", other_folder, "--responses", responses, *FLAGS]
    if penalty:
        assert run(*plain, "--out", tmp_path / "x").returncode == 2  # forgotten is not `none`
        flags = ["--reference-model", folder, *flags]
    ok(run(*plain, *flags, "--out", tmp_path / "l.jsonl"))
    lengths = [len(encode_response(tokenizer, ASK, *answer)) for answer in TEXTS]
    reward = weights @ logps - penalty * np.array(lengths)
    (row,) = pair_rows(tmp_path / "l.jsonl")
    assert row["margin"] == pytest.approx(reward.max() - reward.min(), abs=1e-4)
    assert row["chosen"] == TEXTS[reward.argmax()][0]


def test_ties_are_ties_alone(tmp_path):
    rows = [{"id": "tie", "prompt": ASK, "responses": ["Good.", "Great."]},
            {"id": "pair", "prompt": ASK, "responses": ["Good.", "Terrible!"]}]
    command = ["label.py", "--judge", "vader", "--out", tmp_path / "l.jsonl", "--responses"]
    done = ok(run(*command, dump(tmp_path / "r.jsonl", rows)))
    assert "1 pairs by vader, 1 ties left out, median" in done.stdout


def test_a_new_label_takes_the_old_ones_place(tmp_path):
    """Log-probs, ids and worst case of a pair that another judge turned round are not its own."""
    row = {"id": "x", "prompt": ASK, "chosen": "Terrible!", "rejected": "Good.", "margin": 0.0,
           "chosen_logp": -1.0, "rejected_logp": -2.0, "rejected_ids": [5], "xi": 0.5, "pieces": 6,
           "atoms": [[1.0, 0.0]], "extra": 1}
    pairs = dump(tmp_path / "pairs.jsonl", [row])
    done = ok(run("label.py", "--judge", "vader", "--pairs", pairs, "--out", tmp_path / "l.jsonl"))
    assert "agreement with gold 0.000" in done.stdout
    (new,) = pair_rows(tmp_path / "l.jsonl")
    assert (new["chosen"], new["rejected"], new["chosen_ids"]) == ("Good.", "Terrible!", [5])
    assert new["margin"] > 0 and new["extra"] == 1
    assert not {"chosen_logp", "rejected_logp", "rejected_ids", "xi", "pieces", "atoms"} & set(new)


def test_rows_go_into_trl_as_they_are(folder, other_folder, tokenizer, tmp_path):
    """Gold, labelled and worst-case rows: DPOTrainer reads them from the file, its tokens of a gold
    pair are ours, and its first loss is ln 2."""
    trl = pytest.importorskip("trl")
    import datasets
    gold, labelled, worst = (tmp_path / f"{name}.jsonl" for name in ("gold", "labelled", "worst"))
    rows = [row | {side: [{"role": "assistant", "content": row[side]}]
                   for side in ("chosen", "rejected")} for row in gold_rows(4)]
    ok(run("label.py", "--model", folder, "--reference-model", other_folder, "--out", labelled,
           "--pairs", dump(gold, rows)))
    ok(run("dro.py", "--pairs", labelled, "--epsilon", "0.1", "--out", worst))
    assert any(len(row["atoms"]) == 2 for row in jsonl(worst))
    for path in (gold, labelled, worst):
        rows = datasets.load_dataset("json", data_files=str(path), split="train",
                                     cache_dir=str(tmp_path / "cache"))
        config = trl.DPOConfig(
            output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=4,
            max_length=None, use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
            report_to=[])
        trainer = trl.DPOTrainer(AutoModelForCausalLM.from_pretrained(folder), args=config,
                                 train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        for row, theirs in zip(pair_rows(path), trainer.train_dataset):
            assert theirs["prompt_ids"] == encode_prompt(tokenizer, row["prompt"])
            ids = encode_response(tokenizer, row["prompt"], row["chosen"])
            assert theirs["chosen_ids"][:len(ids)] == ids


def test_a_reward_model_judges(ranker, tokenizer, tmp_path):
    texts = ["A terrible, awful mess.", "What a wonderful, lovely day."]
    responses = dump(tmp_path / "r.jsonl", [{"id": "x", "prompt": ASK, "responses": texts}])
    ok(run("label.py", "--responses", responses, "--out", tmp_path / "l.jsonl", "--judge",
           "reward-model", "--judge-model", ranker, "--precision", "fp32"))
    model, logits = LlamaForSequenceClassification.from_pretrained(ranker), []
    for text in texts:
        ids = tokenizer.apply_chat_template(answered(ASK, text), return_dict=False)
        logits.append(model(torch.tensor([ids])).logits.item())
    (row,) = pair_rows(tmp_path / "l.jsonl")
    assert row["margin"] == pytest.approx(abs(logits[0] - logits[1]), abs=1e-4)
    assert row["chosen"] == texts[np.argmax(logits)]
