"""Sampling (distribution, seeding, resuming, processes) and labelling (implicit reward, best
against worst)."""

import copy
import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

import core.sampling as stage
from conftest import dump, gold_rows, jsonl, make_model, ok, pair_rows, run
from core.chat import encode_prompt, encode_response, end_of_turn
from core.models import load_model, load_tokenizer
from core.policy import ResponseLogps, score
from core.sampling import draw, sample, stop_tokens, uniforms
from judges.judge import vader
from label import best_and_worst, implicit_reward

STOP = torch.tensor([2])


def test_draw_follows_the_distribution():
    logits, n = torch.tensor([0.0, 1.0, 2.0, -1.0]), 20000
    tokens = draw(
        logits.expand(n, 4),
        torch.tensor(np.random.default_rng(0).random(n)),
        temperature=torch.full((n,), 0.7),
    )
    expected = (logits / 0.7).softmax(-1).numpy() * n
    assert (
        chisquare(torch.bincount(tokens, minlength=4).numpy(), expected, sum_check=False).pvalue
        > 1e-3
    )


def test_draw_at_the_ends():
    logits = torch.tensor([[-1e9, 0.0, 0.0, -1e9]])
    assert [
        draw(logits, torch.tensor([u]), torch.ones(1)).item() for u in (0.0, 0.49, 0.51, 1 - 1e-12)
    ] == [1, 1, 2, 2]
    greedy = draw(
        torch.tensor([[0.0, 3.0, 3.0]]).expand(3, 3),
        torch.tensor([0.0, 0.5, 1 - 1e-12]),
        torch.tensor([0.0, 0.0, 0.0]),
    )
    assert greedy.tolist() == [1, 1, 1]


def test_sampling_equals_uncached_one_at_a_time():
    """Against whole forward passes of one sequence: no padding, cache, sharing or compaction."""
    model = make_model()
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    u = np.concatenate([uniforms(0, str(i), 2, 30) for i in range(3)])
    stop = torch.tensor(
        [2, 7, 40, 41, 42, 43, 99, 100, 300, 310]
    )  # enough stop tokens that rows end at different times
    heat = torch.tensor([0.7, 0.7, 0.0, 1.0, 0.7, 0.2])
    ours = sample(model, prompts, torch.tensor(u), heat, stop)
    for k, tokens in enumerate(ours):
        ids = list(prompts[k // 2])
        for t in range(30):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1:]
            ids.append(draw(logits, torch.tensor(u[k, t : t + 1]), heat[k : k + 1]).item())
            if ids[-1] in stop:
                break
        assert tokens == ids[len(prompts[k // 2]) :]
    assert len({len(t) for t in ours}) > 2


def test_uniforms_differ_by_id_sample_and_seed():
    drawn = {
        uniforms(seed, i, 2, 3)[j].tobytes() for seed in (0, 1) for i in ("a", "b") for j in (0, 1)
    }
    assert len(drawn) == 8 and (uniforms(0, "a", 1, 3)[0] == uniforms(0, "a", 5, 3)[0]).all()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rows = [
        {
            "id": f"p{i}",
            "prompt": [{"role": "user", "content": "word " * (i % 5) + str(i)}],
            "extra": i,
        }
        for i in range(11)
    ]
    return dump(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


FLAGS = ["--max-new-tokens", "12", "-n", "2", "--batch-size", "4", "--precision", "fp32"]


def test_two_processes_and_resuming_give_the_same_text(folder, prompts, tmp_path):
    command = ["generate.py", "--model", folder, "--prompts", prompts, *FLAGS]
    ok(run(*command, "--out", tmp_path / "one.jsonl"))
    whole = jsonl(tmp_path / "one.jsonl")
    assert [r["extra"] for r in whole] == list(range(11)) and all(
        len(r["responses"]) == 2 for r in whole
    )
    ok(run(*command, "--out", tmp_path / "two.jsonl", processes=2))
    assert jsonl(tmp_path / "two.jsonl") == whole and not list(tmp_path.glob("*.part*"))
    # what a kill leaves: some finished rows, the last line cut; also parts of a run with other
    # settings
    header = json.dumps(json.load(open(tmp_path / "one.jsonl.stats.json"))["settings"])
    lines = [json.dumps(r) for r in whole]
    (tmp_path / "three.jsonl.part0").write_bytes(
        "\n".join([header, *lines[3:6], lines[7][:20] + "é"]).encode()[:-1]
    )  # cut in a character
    (tmp_path / "three.jsonl.part1").write_text(
        "\n".join([header.replace('"seed": 42', '"seed": 1'), lines[0].replace("word", "old")])
    )
    assert (
        "3 of 11 prompts were done before"
        in ok(run(*command, "--out", tmp_path / "three.jsonl")).stdout
    )
    assert jsonl(tmp_path / "three.jsonl") == whole and not list(tmp_path.glob("*.part*"))


def test_ended_says_whether_the_model_stopped(folder, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        stage,
        "sample",
        lambda model, prompts, u, t, stop: [
            [50, 51, 2] if k % 2 else [50, 51] for k in range(len(u))
        ],
    )
    args = stage.argparse.Namespace(
        model=folder,
        prompts=prompts,
        out=str(tmp_path / "o.jsonl"),
        n=2,
        temperature=1.0,
        max_new_tokens=3,
        batch_size=4,
        sample_tokens=1000,
        precision="fp32",
        backend="transformers",
        fit=False,
        seed=0,
    )
    stage.generate(args, 0, 1, torch.device("cpu"))
    row = jsonl(tmp_path / "o.jsonl")[0]
    assert row["ended"] == [False, True] and row["responses"][0] == row["responses"][1]


def test_vllm_backend_writes_the_same_rows(folder, prompts, tmp_path, monkeypatch):
    """A stand-in with vLLM's interface that is transformers' own greedy search."""
    asked = []

    @dataclasses.dataclass
    class SamplingParams:
        temperature: float
        max_tokens: int
        seed: int
        stop_token_ids: list
        detokenize: bool

    class LLM:
        def __init__(self, model, dtype, tensor_parallel_size):
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

        def generate(self, prompts, settings, use_tqdm):
            for prompt, own in zip(prompts, settings, strict=True):
                ids = torch.tensor([prompt["prompt_token_ids"]])
                out = self.model.generate(
                    ids,
                    do_sample=False,
                    max_new_tokens=own.max_tokens,
                    eos_token_id=own.stop_token_ids,
                    pad_token_id=0,
                )
                asked.append(own)
                yield SimpleNamespace(
                    outputs=[SimpleNamespace(token_ids=tuple(out[0, ids.shape[1] :].tolist()))]
                )

    flags = [
        "--model",
        folder,
        "--prompts",
        prompts,
        "-n",
        "2",
        "--max-new-tokens",
        "12",
        "--temperature",
        "0",
        "--precision",
        "fp32",
    ]
    error = run("generate.py", *flags, "--backend", "vllm", "--out", tmp_path / "none.jsonl")
    assert error.returncode == 2 and error.stderr.endswith("pip install 'vllm>=0.30,<0.33'\n")
    monkeypatch.setitem(
        sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams)
    )
    ok(run("generate.py", *flags, "--backend", "vllm", "--out", tmp_path / "vllm.jsonl"))
    ok(run("generate.py", *flags, "--out", tmp_path / "own.jsonl"))
    assert jsonl(tmp_path / "vllm.jsonl") == jsonl(tmp_path / "own.jsonl") and {
        a.temperature for a in asked
    } == {0.0}
    assert len({a.seed for a in asked}) == len(asked) == 2 * len(jsonl(prompts)) and all(
        a.stop_token_ids == [2] for a in asked
    )


def test_a_turn_ends_as_the_template_says(tokenizer, folder):
    """Phi-3's way: the template writes another token after a turn than the tokenizer's end of
    sequence."""
    phi = copy.deepcopy(tokenizer)
    phi.eos_token = "<|pad|>"
    assert end_of_turn(tokenizer) == 2 and end_of_turn(phi) == 2 != phi.eos_token_id
    ask = [{"role": "user", "content": "?"}]
    assert encode_response(phi, ask, "x")[-1] == 2 != encode_response(phi, ask, "x", False)[-1]
    assert stop_tokens(folder, None, phi) == [0, 2]
    phi = copy.deepcopy(phi)
    phi.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(phi) == phi.eos_token_id
    assert encode_response(phi, ask, "x") == phi("x").input_ids + [phi.eos_token_id]


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


@pytest.mark.parametrize("new, most, room", [(60, 196, 60), (200, 128, 128)])
def test_what_the_context_leaves(any_folder, tmp_path, new, most, room):
    """With --fit a prompt that leaves too little of a context of 256 tokens loses its first ones
    but BOS, and an answer what is beyond the context, both marked: against transformers' own greedy
    search. Without --fit, and in the stages that learn, it is an error."""
    model, tokenizer = load_model(any_folder, torch.device("cpu")), load_tokenizer(any_folder)
    rows = []
    for tokens in (1, 200, 300):  # at least; 60 new ones fit beside the first alone
        text = "Say "
        while len(encode_prompt(tokenizer, [{"role": "user", "content": text}])) < tokens:
            text += "abc"
        rows.append({"id": f"{tokens}", "prompt": [{"role": "user", "content": text}]})
    prompts = dump(tmp_path / "p.jsonl", rows)
    out = tmp_path / "o.jsonl"
    command = ["generate.py", "--model", any_folder, "--prompts", prompts, "--precision", "fp32"]
    command += ["--max-new-tokens", new, "--out", out, "-n", "1", "--temperature", "0"]
    done = run(*command)
    assert done.returncode == 2 and "the model's context is 256" in done.stderr
    ok(run(*command, "--fit"))
    stops = stop_tokens(any_folder, model.config, tokenizer)
    for row in jsonl(out):
        ids = encode_prompt(tokenizer, row["prompt"])
        cut = max(0, len(ids) - most)
        if cut:
            bos = [i for i in tokenizer("a").input_ids[:1] if i == tokenizer.bos_token_id]
            ids = bos + ids[-most:][len(bos) :]
        length = room if cut else min(new, 256 - len(ids))
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=length, do_sample=False, eos_token_id=stops
        )
        assert row["response_ids"] == [expected[0, len(ids) :].tolist()]
        assert row.get("prompt_cut", 0) == cut and row.get("answer_cut", False) == (length < new)
    assert ["prompt_cut" in row for row in jsonl(out)] == [False, True, True]
    label = ["label.py", "--model", any_folder, "--reference-model", any_folder]
    done = run(*label, "--responses", out, "--out", tmp_path / "l.jsonl")
    assert done.returncode == 2 and "a prompt cut to the context" in done.stderr
    ok(run(*command[:4], dump(tmp_path / "s.jsonl", rows[:1]), *command[5:]))
    assert "prompt_cut" not in jsonl(out)[0] and "answer_cut" not in jsonl(out)[0]


def test_nan_while_sampling_is_one_line(folder, tmp_path, monkeypatch):
    """Logits that become NaN in mid-answer, greedy or not, end the stage with the model's name."""
    real = stage.draw

    def draw(logits, u, temperature):
        if len(u) == 6:  # the stage's batch; the model itself is sound
            logits = logits.clone()
            logits[1, 7] = float("nan")
        return real(logits, u, temperature)

    monkeypatch.setattr(stage, "draw", draw)
    rows = [{"id": f"p{i}", "prompt": [{"role": "user", "content": "Say."}]} for i in range(3)]
    command = ["generate.py", "--model", folder, "--prompts", dump(tmp_path / "p.jsonl", rows)]
    command += ["-n", "2", "--out", tmp_path / "o.jsonl", "--max-new-tokens", "8", "--temperature"]
    for temperature in ("0", "0.7"):
        done = run(*command, temperature)
        assert done.returncode == 2 and f"{folder}: its logits are not numbers" in done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "o.jsonl").exists()
