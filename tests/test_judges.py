"""Judges: order, parsers, the local LLM judge and PairRM against plain computations, an endpoint on
loopback with all its failures."""
import itertools
import json
import math
import shutil
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import transformers
from conftest import CORPUS, ROOT, dump, gold_rows, jsonl, make_model, ok, pair_rows, run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from core import parallel
from judges import endpoint as endpoints
from judges import judge as judges
from judges.comparisons import option_prompt
from judges.endpoint import UNANSWERABLE, hidden, parse_choice, parse_rating
from judges.flags import check_judge
from judges.judge import both_orders, rewards
from judges.measures import settled

CPU = torch.device("cpu")
ASK = [{"role": "user", "content": "Say."}]
OPENAI = "--judge openai --judge-model tiny"


def namespace(**fields):
    return types.SimpleNamespace(**{"precision": "fp32", "judge_model": "m", **fields})


def label(tmp_path, flags: str):
    """label.py with flags as one types them; the rows go to l.jsonl."""
    command = f"{flags} --precision fp32 --out {tmp_path / 'l.jsonl'}"
    return run("label.py", *command.split())


def stats_of(tmp_path) -> dict:
    return json.loads((tmp_path / "l.jsonl.stats.json").read_text())


def test_a_judge_that_always_says_a_scores_one_half():
    p, behaviour = both_orders(np.ones(2), np.ones(2))
    assert p.tolist() == [0.5, 0.5] and behaviour == {"order_disagreement": 1.0, "no_verdict": 0}


def test_verdicts_that_are_missing_are_counted():
    """One order without a verdict counts ½; both, and there is none."""
    p, behaviour = both_orders(
        np.array([1.0, math.nan, 0.2, math.nan]), np.array([0.0, math.nan, 0.3, 0.0])
    )
    assert p[[0, 2, 3]].tolist() == pytest.approx([1.0, 0.45, 0.75]) and math.isnan(p[1])
    assert behaviour == {"order_disagreement": 0.25, "no_verdict": 3}
    assert settled(p)[1] == 0.5


@given(
    st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), min_size=1, max_size=5),
    st.integers(0, 2**31),
)
def test_exchanging_the_sides_exchanges_the_preference(sides, seed):
    def ranker(a, b):  # any function of the order in which the two are shown
        return np.random.default_rng([seed, *f"{a}|{b}".encode()]).random()

    shown = np.array([ranker(a, b) for a, b in sides])
    exchanged = np.array([ranker(b, a) for a, b in sides])
    there, one = both_orders(shown, exchanged)
    back, two = both_orders(exchanged, shown)
    assert np.allclose(there, 1 - back) and one == two


CHOICES = {
    1: ["A", "a", " (A) ", "**A**", '"A"', "‘A’.", "[[A]]", "My choice: [[A]]", "[A]", "[[a]]",
        "[[B]] at first, but [[A]]", "<think>[[B]]</think> [[A]]", "**[[A]]** is kind"],
    0: ["B", " B.", "`B`", "{b}", "Both have merit.\n\n[[B]]", "<think>(A) is fine.</think> (B)"],
    None: ["", "both", "A or B", "AB", "C", "A's", "A\nA", "(B) because", "Answer: B", "\\boxed{B}",
           "(A) is better, since (B) rambles.", "Answer: A\n\nReason: (B) repeats itself.",
           "**(A)**\n\n(A) is concise; (B) is verbose.", "Response B is better.", "[A] or [B]",
           "<think>[[A]] looks fine", "[[C]]", "The answer is A", "\x00"],
}


@pytest.mark.parametrize("value", CHOICES)
def test_parse_choice(value):
    for text in CHOICES[value]:
        choice = parse_choice(text)
        assert math.isnan(choice) if value is None else choice == value, text


RATINGS = {
    "Rating: [[7]]": 7, "[[7]]/[[10]]": 7, "[[8.5]] then [[2]]": 8.5, "[6]": 6, "[[10]]": 10,
    "I say [1] but [[9]]": 9, "arr[1], m[2][3] and df[[1]]: [6]": 6,
    "<think>[[3]]</think> Rating: [[4]]": 4, "<think>[[3]]": None, "arr[1] is an index": None,
    "df[[1]] is a frame": None, "[[ 7 ]]": None, "7": None, "[[rating]]": None, "[[11]]": None,
    "[[0]]": None, "": None, "[[7": None, "[[-3]]": None, "[[7/10]]": None,
}


@pytest.mark.parametrize("text", RATINGS)
def test_parse_rating(text):
    rating = parse_rating(text)
    assert math.isnan(rating) if RATINGS[text] is None else rating == RATINGS[text]


@given(st.text(max_size=60))
def test_parsers_never_raise(text):
    assert parse_choice(text) in (0, 1) or math.isnan(parse_choice(text))
    assert 1 <= parse_rating(text) <= 10 or math.isnan(parse_rating(text))


def test_a_rankers_reward_is_its_mean_preference(monkeypatch):
    p = {"ab": 0.8, "ac": 0.1, "bc": 0.4}
    p |= {y + x: 1 - value for (x, y), value in p.items()}
    monkeypatch.setitem(judges.RANKERS, "llm",
                        lambda args, asked: [p[x + y] for _, x, y in asked])
    rows = [{"prompt": ASK, "responses": list(texts)} for texts in ("abc", "bc", "a")]
    result, behaviour = rewards(namespace(judge="llm"), rows)
    assert result == [pytest.approx([0.45, 0.3, 0.75]), pytest.approx([0.4, 0.6]), [0.0]]
    assert behaviour["order_disagreement"] == 0


def test_listing_1():
    (message,) = option_prompt(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
        ],
        "x",
        "y",
    )
    assert (
        message["role"] == "user"
        and "Human: Hi\n\nAssistant: Hello\n\nHuman: Bye\n" in message["content"]
    )
    assert (
        message["content"].endswith("Options:\n(A) x\n(B) y\nThe answer is:")
        and "most helpful, honest, and harmless" in message["content"]
    )


def test_llm_judge_against_a_plain_computation(wide, tokenizer, tmp_path):
    """Label rows and agreement with gold from logits of whole sequences, one at a time, in
    float64."""
    from transformers import AutoModelForCausalLM

    rows = gold_rows(5)
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float64)
    a, b = (tokenizer.encode(letter)[0] for letter in "AB")
    margins, disagree = [], 0
    for row in rows:
        odds = []
        for sides in ((row["chosen"], row["rejected"]), (row["rejected"], row["chosen"])):
            ids = tokenizer.apply_chat_template(
                option_prompt(row["prompt"], *sides), add_generation_prompt=True, return_dict=False
            )
            logits = model(torch.tensor([ids])).logits[0, -1]
            odds.append((logits[a] - logits[b]).item())
        p = (1 / (1 + math.exp(-odds[0])) + 1 - 1 / (1 + math.exp(-odds[1]))) / 2
        margins.append(2 * p - 1)
        disagree += odds[0] * odds[1] > 0
    pairs = dump(tmp_path / "gold.jsonl", rows)
    done = ok(label(tmp_path, f"--judge llm --judge-model {wide} --model {wide} --pairs {pairs}"))
    stats = stats_of(tmp_path)
    assert stats["gold_agreement"] == np.mean([m > 0 for m in margins])
    assert stats["order_disagreement"] == disagree / 5
    for row, labelled, m in zip(rows, pair_rows(tmp_path / "l.jsonl"), margins):
        assert labelled["margin"] == pytest.approx(abs(m), abs=1e-4)
        assert labelled["chosen"] == (row["chosen"] if m > 0 else row["rejected"])
        assert labelled["chosen_logp"] < 0
    assert "agreement with gold" in done.stdout


def test_fine_tuning_a_judge(wide, tmp_path):
    """By the letters of gold pairs: the loss is −log π(letter), and the judge learns to agree with
    them."""
    pairs = dump(tmp_path / "gold.jsonl", gold_rows(6))
    flags = f"--objective judge --model {wide} --pairs {pairs} --lr 1e-2"
    flags += " --precision fp32 --micro-tokens 4000 --epochs 40 --batch-size 12"
    ok(run("seed_dpo.py", *flags.split(), "--out", tmp_path / "judge"))
    log = jsonl(tmp_path / "judge/log.jsonl")
    assert len(log) == 40 and log[-1]["loss"] < 0.2 < log[0]["loss"] and log[-1]["accuracy"] == 1
    ok(label(tmp_path, f"--judge llm --judge-model {tmp_path / 'judge'} --pairs {pairs}"))
    assert stats_of(tmp_path)["gold_agreement"] == 1


@pytest.fixture(scope="session")
def pairrm_folder(tmp_path_factory):
    """Random weights in the layout of llm-blender/PairRM-hf, with two tasks, and a tensor that
    nothing needs."""
    folder = tmp_path_factory.mktemp("model") / "pairrm"
    specials = ["[PAD]", "[CLS]", "[SEP]", "<|source|>", "<|candidate1|>", "<|candidate2|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        additional_special_tokens=specials[3:],
    ).save_pretrained(folder)
    config = transformers.DebertaV2Config(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=2048, relative_attention=True,
        position_buckets=16, pos_att_type=["p2c", "c2p"], type_vocab_size=0, n_tasks=2,
        initializer_range=0.3, source_prefix_id=3, cand1_prefix_id=4, cand2_prefix_id=5,
    )
    config.save_pretrained(folder)
    torch.manual_seed(0)
    encoder = transformers.DebertaV2Model(config).state_dict()
    weights = {f"pretrained_model.{name}": tensor for name, tensor in encoder.items()}
    for place, out, width in ((1, 32, 64), (4, 2, 32)):
        weights[f"head_layer.{place}.weight"] = torch.randn(out, width) / width**0.5
        weights[f"head_layer.{place}.bias"] = torch.randn(out)
    weights["pretrained_model.unused"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def ranker_logit(folder, source: str, first: str, second: str) -> float:
    """The logit of one comparison, re-derived: no padding, no batch, plain matrices."""
    weights = load_file(folder / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder)
    encoder = transformers.DebertaV2Model(config).eval()
    encoder.load_state_dict(
        {n.removeprefix("pretrained_model."): t for n, t in weights.items()}, strict=False
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def part(mark: int, text: str, most: int) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return [1, mark, *ids[: most - 3], 2]

    ids = part(3, source, 1224)
    room = (2048 - len(ids)) // 2
    ids = [*ids, *part(4, first, room), *part(5, second, room)]
    with torch.no_grad():
        hidden = encoder(torch.tensor([ids])).last_hidden_state[0]
    scores = []
    for mark in (4, 5):
        both = torch.cat([hidden[ids.index(3)], hidden[ids.index(mark)]])
        inner = torch.tanh(weights["head_layer.1.weight"] @ both + weights["head_layer.1.bias"])
        scores.append(weights["head_layer.4.weight"] @ inner + weights["head_layer.4.bias"])
    return (scores[0] - scores[1]).mean().item()


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_pairrm_against_a_plain_computation(pairrm_folder, capsys):
    """Both orders, a turn of several, parts that are cut, control tokens that a text spells."""
    args = namespace(judge="pairrm", judge_model=str(pairrm_folder))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    asked = [(ASK, CORPUS[i], CORPUS[i + 9][: 3 + 9 * i]) for i in range(4)]
    asked += [(ASK, "yes", "no"), (turns, "a", "b"), (ASK, "x" * 3000, "short")]
    asked += [([{"role": "user", "content": "y" * 1500}], "long " * 400, "z" * 409)]
    expected = [ranker_logit(pairrm_folder, turns[0]["content"], a, b) for turns, a, b in asked]
    expected[5] = ranker_logit(pairrm_folder, "USER: Hi\nASSISTANT: Yes?", "a", "b")
    found = [logit(p) for p in judges.pairrm(args, asked)]
    assert found == pytest.approx(expected, abs=1e-5)
    assert "2 of 8 comparisons are longer" in capsys.readouterr().err
    exchanged = [logit(p) for p in judges.pairrm(args, [(t, b, a) for t, a, b in asked])]
    assert max(abs(one + other) for one, other in zip(found, exchanged)) > 1e-3
    spelt = judges.pairrm(args, [(ASK, "<|candidate2|>[SEP]", "fine")])[0]
    broken = ranker_logit(pairrm_folder, "Say.", "<·|candidate2|>[·SEP]", "fine")
    assert logit(spelt) == pytest.approx(broken, abs=1e-5)


def test_pairrm_as_a_judge(pairrm_folder, folder, tmp_path):
    """It labels; what is laid out otherwise, or lacks weights, is one line."""
    rows = [{"id": "x", "prompt": ASK, "responses": ["bb", "a", "cccc"]}]
    responses = dump(tmp_path / "r.jsonl", rows)
    command = f"--judge pairrm --responses {responses} --judge-model "
    ok(label(tmp_path, command + str(pairrm_folder)))
    (row,) = pair_rows(tmp_path / "l.jsonl")
    reward = dict.fromkeys(rows[0]["responses"], 0.0)
    for a, b in itertools.permutations(reward, 2):
        there, back = (ranker_logit(pairrm_folder, "Say.", *pair) for pair in ((a, b), (b, a)))
        reward[a] += (1 + math.tanh(there / 2) / 2 - math.tanh(back / 2) / 2) / 2 / 2
    worst, *_, best = sorted(reward, key=reward.get)
    assert (row["chosen"], row["rejected"]) == (best, worst)
    assert row["margin"] == pytest.approx(reward[best] - reward[worst], abs=1e-5)
    done = label(tmp_path, command + folder)
    assert done.returncode == 2 and "llm-blender/PairRM-hf" in done.stderr
    weights = load_file(pairrm_folder / "model.safetensors")
    del weights["head_layer.4.bias"]
    less = tmp_path / "less"
    shutil.copytree(pairrm_folder, less)
    save_file(weights, less / "model.safetensors", {"format": "pt"})
    done = label(tmp_path, command + str(less))
    assert done.returncode == 2 and "1 weights are missing (head_layer.4.bias)" in done.stderr


class Endpoint(BaseHTTPRequestHandler):
    """Chat completions by the tiny model, greedy; what `plan` holds goes wrong first, a failure a
    request."""

    model, tokenizer, plan, asked = None, None, [], []
    refuses: set[str] = set()  # settings that it does not take
    minds = ""  # answers of status 400 to a question that holds this
    lock = threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.asked.append((body, self.headers["Authorization"]))
            trouble = self.plan.pop(0) if self.plan else 200
        unwanted = sorted(self.refuses & body.keys())
        if unwanted:
            trouble = 400
        if self.minds and any(self.minds in m["content"] for m in body["messages"]):
            trouble = 400
            unwanted = ["maximum context length is 9 tokens"]
        if trouble in ("silence", "slow"):
            time.sleep(1.5)
        if trouble == "hang up":
            return self.connection.close()
        with self.lock:
            if trouble in (200, "slow"):
                ids = self.tokenizer.apply_chat_template(
                    body["messages"],
                    add_generation_prompt=True,
                    return_tensors="pt",
                    return_dict=True,
                )
                out = self.model.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
                text = self.tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
                answer = {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [
                        {
                            "index": 0,
                            "finish_reason": "stop",
                            "message": {"role": "assistant", "content": text},
                        }
                    ],
                }
            else:
                answer = (
                    {"choices": []}
                    if trouble == "no choice"
                    else {
                        "error": {
                            "message": f"trouble, {self.headers['Authorization']}, {unwanted[:1]}",
                            "code": trouble,
                        }
                    }
                )
        data = b"<html>not json" if trouble == "html" else json.dumps(answer).encode()
        if trouble == "silence":
            return  # nobody listens any more
        self.send_response(trouble if isinstance(trouble, int) else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(wide, tokenizer, monkeypatch):
    Endpoint.model, Endpoint.tokenizer = make_model(max_position_embeddings=4096), tokenizer
    Endpoint.plan, Endpoint.asked = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-word")
    monkeypatch.setattr(endpoints, "TIMEOUT", 0.7)
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def responses_file(
    tmp_path, count=4
):  # with a separator that Python's splitlines, but not JSONL, takes for the end of a line
    return dump(
        tmp_path / "r.jsonl",
        [
            {"id": str(i), "prompt": ASK, "responses": [CORPUS[i] + "\u2028", CORPUS[i + 9]]}
            for i in range(count)
        ],
    )


def test_endpoint_survives_trouble_and_is_never_asked_twice(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoints, "PARALLEL", 1)
    monkeypatch.setattr(
        judges, "parse_choice", lambda text: len(text) % 7 / 7
    )  # a random model names no letter
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    Endpoint.plan[:] = [500, 429, "silence", "hang up", 503]
    command = f"{OPENAI} --base-url {endpoint} --responses {responses_file(tmp_path)}"
    done = ok(label(tmp_path, command))
    assert len(Endpoint.asked) == 5 + 8 and len(jsonl(tmp_path / "l.jsonl")) > 0
    assert all(
        key == "Bearer sk-secret-word" and body["temperature"] == 0 for body, key in Endpoint.asked
    )
    cache = tmp_path / "l.jsonl.judge_cache.jsonl"
    before = jsonl(tmp_path / "l.jsonl")
    lines = cache.read_text().split("\n")
    cache.write_text(
        "\n".join(lines[:5]) + "\n" + lines[5][:30]
    )  # a kill while the sixth answer was being written
    (tmp_path / "l.jsonl").unlink()
    ok(label(tmp_path, command))
    assert (
        len(Endpoint.asked) == 13 + 3 and jsonl(tmp_path / "l.jsonl") == before
    )  # three were not stored
    (tmp_path / "l.jsonl").unlink()
    ok(label(tmp_path, command))
    assert len(Endpoint.asked) == 16 and jsonl(tmp_path / "l.jsonl") == before
    everything = done.stdout + done.stderr + "".join(p.read_text() for p in tmp_path.iterdir())
    assert "secret" not in everything


@pytest.mark.parametrize("trouble", [401, 400, "no choice", "html"])
def test_endpoint_that_refuses_ends_in_one_line(endpoint, trouble, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoints, "PARALLEL", 1)
    Endpoint.plan[:] = [200, 200, trouble] + [401] * 20
    flags = f"{OPENAI} --base-url {endpoint} --responses {responses_file(tmp_path)}"
    done = label(tmp_path, flags)
    assert (
        done.returncode == 2
        and "2 answers are kept" in done.stderr
        and "secret" not in done.stderr
        and "Traceback" not in done.stderr
    )
    assert len(done.stderr.strip().splitlines()[-1]) < 600 and not (tmp_path / "l.jsonl").exists()
    assert (
        sum(
            "answer" in line
            for line in (tmp_path / "l.jsonl.judge_cache.jsonl").read_text().splitlines()
        )
        == 2
    )


def test_endpoint_without_key_or_model(tmp_path, monkeypatch):
    responses = f"--responses {responses_file(tmp_path)}"
    assert "needs --judge-model" in label(tmp_path, f"--judge openai {responses}").stderr
    for key, words in ((" \n", "reads its key from"), ("a b", "OPENAI_API_KEY holds a blank")):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert words in label(tmp_path, f"{OPENAI} {responses}").stderr
    monkeypatch.setenv("OPENAI_API_KEY", "word")
    for url in ("http://127.0.0.1:9/v1", "host/v1"):
        done = label(tmp_path, f"{OPENAI} {responses} --base-url {url}")
        assert f"{url} does not answer" in done.stderr


@pytest.mark.parametrize("words, never", [
    ("the prompt triggering Azure OpenAI's content management policy", True),
    ("Output blocked by content filtering policy", True), ("Content Exists Risk", True),
    ("Input data may contain inappropriate content.", True),
    ("your prompt was flagged as potentially violating our usage policy", True),
    ("Prompt is blocked due to prohibited content", True), ("context_length_exceeded", True),
    ("This model's maximum context length is 8192 tokens.", True),
    ("exceeds the available context size", True), ("prompt is too long: 9 tokens > 8", True),
    ("input length and `max_tokens` exceed context limit: 199000 + 2000 > 200000", True),
    ("`inputs` tokens + `max_new_tokens` must be <= 4096", True),
    ("Range of input length should be [1, 30720]", True),
    ("Please reduce the length of the messages or completion.", True),
    ("Incorrect API key provided", False), ("Your credit balance is too low", False),
    ("Unsupported parameter: 'max_tokens'", False), ("model `x` does not exist", False),
    ("`temperature` must be 1 for this model", False), ("API key expired", False)])
def test_what_an_endpoint_will_never_answer(words, never):
    assert bool(UNANSWERABLE.search(f"Error code: 400 - {words}")) == never


def test_what_an_endpoint_will_never_answer_is_no_verdict(endpoint, tmp_path, monkeypatch):
    """Status 400 for a text too long: counted, kept, and not asked again, wherever the endpoint has
    moved; the blank around a key is no part of it."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-word\n")
    verdict = lambda text: len(text) % 7 / 7 if text else math.nan  # noqa: E731
    monkeypatch.setattr(judges, "parse_choice", verdict)
    monkeypatch.setattr(Endpoint, "minds", CORPUS[0])
    command = f"{OPENAI} --responses {responses_file(tmp_path, 8)} --base-url "
    printed = ok(label(tmp_path, command + endpoint)).stdout
    cached = jsonl(tmp_path / "l.jsonl.judge_cache.jsonl")
    refused = [row for row in cached if json.dumps(CORPUS[0])[1:-1] in row["request"]]
    assert [row["answer"] for row in refused] == ["", ""]
    # a random model may answer nothing too
    assert f", {sum(not row['answer'] for row in cached)} without verdict" in printed
    assert {key for _, key in Endpoint.asked} == {"Bearer sk-secret-word"}
    asked, rows = len(Endpoint.asked), jsonl(tmp_path / "l.jsonl")
    assert asked == 16 and rows and "0" not in [row["id"] for row in rows]
    (tmp_path / "l.jsonl").unlink()
    ok(label(tmp_path, command + endpoint.replace("127.0.0.1", "localhost")))
    assert len(Endpoint.asked) == asked and jsonl(tmp_path / "l.jsonl") == rows


def test_a_judge_is_looked_at_before_any_work(
    folder, ranker, tokenizer, tmp_path, monkeypatch, capsys
):
    def trouble(judge: str, model) -> str:
        with pytest.raises(SystemExit) as stop:
            check_judge(namespace(judge=judge, judge_model=model and str(model)))
        assert stop.value.code == 2
        return capsys.readouterr().err

    check_judge(namespace(judge="reward-model", judge_model=ranker))
    check_judge(namespace(judge="llm", judge_model=folder))
    assert "sequence classifier" in trouble("reward-model", folder)
    config = transformers.AutoConfig.from_pretrained(ranker, num_labels=2)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "two")
    assert "no tokenizer" in trouble("reward-model", tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    assert "found 2" in trouble("reward-model", tmp_path / "two")
    # What the first look could not see, as of the hub, is looked at when it is loaded.
    two = namespace(judge="reward-model", judge_model=str(tmp_path / "two"))
    row = {"prompt": [{"role": "user", "content": "?"}], "responses": ["A"]}
    with pytest.raises(SystemExit):
        judges.reward_model(two, [row])
    assert "found 2" in capsys.readouterr().err
    flags = f"--judge llm --judge-model {tmp_path / 'none'} --responses {responses_file(tmp_path)}"
    assert f"{tmp_path / 'none'}: no such" in label(tmp_path, flags).stderr
    shutil.copytree(folder, tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink()
    assert "no chat template" in trouble("llm", tmp_path / "base")
    assert "needs --judge-model" in trouble("pairrm", None)
    monkeypatch.setattr("judges.flags.importlib.util.find_spec", lambda name: None)
    assert "package vaderSentiment" in trouble("vader", None)
    assert "package openai" in trouble("openai", "m")


@pytest.mark.parametrize("judge", ["reward-model", "llm"])
def test_a_judge_reads_no_more_than_its_context(judge, tokenizer, tmp_path):
    """All rows are looked at before any is judged; a conversation that just fits is."""
    family = transformers.LlamaForSequenceClassification
    texts = ["short", "longer " * 9]
    turns = [ASK[0], {"role": "assistant", "content": texts[1]}]
    length = len(tokenizer.apply_chat_template(turns, return_dict=False))
    if judge == "llm":
        family = transformers.LlamaForCausalLM
        asked = option_prompt(ASK, *texts)
        length = 1 + len(
            tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        )
    rows = [{"id": str(i), "prompt": ASK, "responses": texts} for i in range(2)]
    for context, status in ((length, 0), (length - 1, 2)):
        path = tmp_path / str(context)
        config = transformers.LlamaConfig(
            vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4, num_labels=1, pad_token_id=0, max_position_embeddings=context,
        )
        family(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        responses = dump(tmp_path / "r.jsonl", rows)
        done = label(tmp_path, f"--judge {judge} --judge-model {path} --responses {responses}")
        assert done.returncode == status, done.stderr
    assert "'Say.'" in done.stderr and f" {length} tokens" in done.stderr
    assert f"context is {length - 1}" in done.stderr and len(done.stderr.splitlines()) == 1


def test_cache_survives_kill_9(endpoint, tmp_path, monkeypatch):
    """A process killed while an endpoint answers: what it was given is kept, and the same command
    asks for the rest alone."""
    monkeypatch.setattr(endpoints, "TIMEOUT", 60.0)
    responses = responses_file(tmp_path, 8)
    flags = f"{OPENAI} --base-url {endpoint} --responses {responses}"
    command = ["label.py", *flags.split(), "--out", str(tmp_path / "l.jsonl")]
    Endpoint.plan[:] = [200] * 5 + ["slow"] * 30
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=quiet, stderr=quiet)
    cache = tmp_path / "l.jsonl.judge_cache.jsonl"
    for _ in range(600):
        if cache.exists() and cache.read_text().count('"answer":') >= 5:
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    kept = cache.read_text().count('"answer":')
    Endpoint.plan[:], asked = [], len(Endpoint.asked)
    time.sleep(2)  # requests under way at the kill come to their end
    asked = len(Endpoint.asked)
    run(*command)
    assert 5 <= kept < 16 and len(Endpoint.asked) - asked == 16 - kept


def test_a_judge_without_any_verdict_is_an_error(monkeypatch, capsys):
    monkeypatch.setitem(judges.RANKERS, "llm", lambda args, asked, *_: [math.nan] * len(asked))
    with pytest.raises(SystemExit) as stop:
        judges.compare(namespace(judge="llm"), [(ASK, "a", "b")] * 3)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "none of its 6 answers held a verdict" in error


def test_a_key_is_hidden_by_value_and_letters_are_left():
    assert hidden("Bearer sk-0123x, key sk-0123x!", "sk-0123x") == "Bearer …, key …!"
    assert hidden("none of these", "none") == "none of these"
    # an address writes = as %3D, and nothing need stand between a word and the key
    for text in ("?key%3Dsk-0123456789", "api_keysk-0123456789ab"):
        assert "sk-0123456789" not in hidden(text, "sk-0123456789")


def test_an_endpoint_is_asked_again_the_way_it_wants(endpoint, tmp_path, monkeypatch):
    """One that takes neither setting refuses twice in all, not twice a request."""
    monkeypatch.setattr(endpoints, "PARALLEL", 1)
    monkeypatch.setattr(judges, "parse_choice", lambda text: len(text) % 7 / 7)
    monkeypatch.setattr(Endpoint, "refuses", {"max_tokens", "temperature"})
    flags = f"{OPENAI} --base-url {endpoint} --responses {responses_file(tmp_path)}"
    ok(label(tmp_path, flags))
    bodies = [body for body, _ in Endpoint.asked]
    assert len(bodies) == 2 + 8
    for body in bodies[2:]:
        assert body["max_completion_tokens"] == 16
        assert not {"max_tokens", "temperature"} & body.keys()


def test_answers_without_verdict_are_counted(endpoint, tmp_path, monkeypatch):
    """In the summary, in the error where no row is left, and where no answer held one."""
    said = iter(["(A)", "A clear winner is hard to name", "(B)", "A and B are alike"])
    monkeypatch.setattr(endpoints, "ask_endpoint", lambda args, chats: [next(said) for _ in chats])
    command = f"{OPENAI} --base-url {endpoint} --responses {responses_file(tmp_path, 2)}"
    assert ", 2 without verdict" in ok(label(tmp_path, command)).stdout
    (row,) = jsonl(tmp_path / "l.jsonl")
    assert row["id"] == "0"  # of the other row neither order held one
    (tmp_path / "l.jsonl").unlink()
    said = iter(["(A)", "both", "(A)", "both"])
    done = label(tmp_path, command)
    assert done.returncode == 2 and "different reward; 2 answers without verdict" in done.stderr
    said = iter(["both"] * 4)
    done = label(tmp_path, command)
    assert done.returncode == 2 and "none of its 4 answers held a verdict" in done.stderr


def test_who_waits_for_an_endpoint_does_not_time_out(monkeypatch):
    """60 000 requests in both orders at 10 s, 8 at once, are 41.7 h, on process 0 alone."""
    given = {}
    monkeypatch.setattr(parallel, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **k: given.update(k))
    parallel.start_processes()
    assert given["timeout"].total_seconds() > 2 * 60_000 * 10 / endpoints.PARALLEL
