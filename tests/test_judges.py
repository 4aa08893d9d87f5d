"""Judges: order, parsers, the local LLM judge against a plain computation, an endpoint on loopback
with all its failures."""

import json
import math
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import CORPUS, ROOT, dump, gold_rows, jsonl, make_model, ok, pair_rows, run
from core import parallel
from judges import judge as judges
from judges.comparisons import option_prompt
from judges.judge import (
    both_orders,
    parse_choice,
    parse_rating,
    rewards,
    settled,
)

CPU = torch.device("cpu")
ASK = [{"role": "user", "content": "Say."}]


def namespace(**fields):
    return types.SimpleNamespace(**{"precision": "fp32", "judge_model": "m", **fields})


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


@pytest.mark.parametrize(
    "text,value",
    [
        ("A", 1),
        ("B", 0),
        ("(A)", 1),
        ("(B) because", 0),
        (" B.", 0),
        ("**A**", 1),
        ("Answer: B", 0),
        ("The answer is (A).", 1),
        ("A\nA", 1),
        ("", None),
        ("a", None),
        ("both", None),
        ("A or B", None),
        ("ABBA", None),
        ("A's", None),
        ("C", None),
        ("\x00", None),
        ("Neither A nor B", None),
        ("(B) A bar, because", 0),
        ('"A"', 1),
        ("A bar or B", None),
        ("A and B are alike", None),
        ("Answer: A/B", None),
        ("(A) & (B)", None),
        ("A clear winner is hard to name", None),
        ("The answer is A because it helps.", 1),
        ("The better response is B.", 0),
        ("My choice: [[A]]", 1),
        ("(A) is kind, but on balance my answer is B", 0),
        ("Both have merit.\n\nB", 0),
        ("<think>(A) looks fine.</think> (B)", 0),
        ("<think>(A) looks fine", None),
        ("Option A is the better choice. B is worse.", None),
        ("Which answer is better? B is short.", None),
        ("Both (A) and (B) are alike", None),
        ("The answer is A or B", None),
        ("Answer: A clear winner is hard to name", None),
        ("(A) is better than (B)", 1),
        ("I prefer (B) over (A).", 0),
        ("The answer is not A", None),
        ("\\boxed{B}", 0),
    ],
)
def test_parse_choice(text, value):
    assert parse_choice(text) == value if value is not None else math.isnan(parse_choice(text))


@pytest.mark.parametrize(
    "text,value",
    [
        ("Rating: [[7]]", 7),
        ("[[8.5]] then [[2]]", 2),
        ("[[5]] for style. Rating: [[9]]", 9),
        ("arr[1] is never read", None),
        ("df[[1]] is a frame", None),
        ("arr[1], m[2][3] and df[[1]]: [6]", 6),
        ("<think>[[3]]</think> Rating: [[4]]", 4),
        ("<think>[[3]]", None),
        ("[6]", 6),
        ("I say [1] but [[9]]", 9),
        ("[[10]]", 10),
        ("[[ 7 ]]", None),
        ("7", None),
        ("[[rating]]", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("", None),
        ("[[7", None),
        ("[[-3]]", None),
        ("[[7/10]]", None),
    ],
)
def test_parse_rating(text, value):
    assert parse_rating(text) == value if value is not None else math.isnan(parse_rating(text))


@given(st.text(max_size=60))
def test_parsers_never_raise(text):
    assert parse_choice(text) in (0, 1) or math.isnan(parse_choice(text))
    assert 1 <= parse_rating(text) <= 10 or math.isnan(parse_rating(text))


def test_rewards_of_a_ranker_are_bradley_terry(monkeypatch):
    """A ranker that follows Bradley–Terry gets its own rewards back, up to a constant; two
    responses get log p/(1 − p)."""
    truth = {"a": 0.3, "b": -1.0, "c": 2.0}
    monkeypatch.setitem(
        judges.RANKERS,
        "llm",
        lambda args, asked, *_: [1 / (1 + math.exp(truth[y] - truth[x])) for _, x, y in asked],
    )
    (own, pair), behaviour = rewards(
        namespace(judge="llm"),
        [{"prompt": ASK, "responses": ["a", "b", "c"]}, {"prompt": ASK, "responses": ["b", "c"]}],
        0,
        1,
        CPU,
    )
    assert np.diff(own) == pytest.approx(np.diff([0.3, -1.0, 2.0])) and pair[1] - pair[
        0
    ] == pytest.approx(3.0)
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
        margins.append(math.log(p / (1 - p)))
        disagree += odds[0] * odds[1] > 0
    pairs = dump(tmp_path / "gold.jsonl", rows)
    done = ok(
        run(
            "label.py",
            "--judge",
            "llm",
            "--judge-model",
            wide,
            "--model",
            wide,
            "--pairs",
            pairs,
            "--out",
            tmp_path / "l.jsonl",
            "--precision",
            "fp32",
        )
    )
    stats = json.load(open(tmp_path / "l.jsonl.stats.json"))
    assert (
        stats["gold_agreement"] == np.mean([m > 0 for m in margins])
        and stats["order_disagreement"] == disagree / 5
    )
    for row, label, m in zip(rows, pair_rows(tmp_path / "l.jsonl"), margins):
        assert label["margin"] == pytest.approx(abs(m), abs=1e-4) and label["chosen"] == (
            row["chosen"] if m > 0 else row["rejected"]
        )
        assert label["chosen_logp"] < 0
    assert "agreement with gold" in done.stdout


def test_fine_tuning_a_judge(wide, tmp_path):
    """Supervised on the letters: the loss is −log π(letter), and the judge learns to agree with its
    gold pairs."""
    pairs = dump(tmp_path / "gold.jsonl", gold_rows(6))
    ok(run("judges/comparisons.py", "--pairs", pairs, "--out", tmp_path / "letters.jsonl"))
    flags = ["--pairs", tmp_path / "letters.jsonl", "--precision", "fp32", "--micro-tokens", "4000"]
    ok(
        run(
            "seed_dpo.py",
            "--objective",
            "supervised",
            "--model",
            wide,
            *flags,
            "--out",
            tmp_path / "judge",
            "--lr",
            "1e-2",
            "--epochs",
            "40",
            "--batch-size",
            "12",
        )
    )
    log = jsonl(tmp_path / "judge/log.jsonl")
    assert len(log) == 40 and log[-1]["loss"] < 0.2 < log[0]["loss"] and log[-1]["accuracy"] == 1
    ok(
        run(
            "label.py",
            "--judge",
            "llm",
            "--judge-model",
            tmp_path / "judge",
            "--pairs",
            pairs,
            "--out",
            tmp_path / "l.jsonl",
            "--precision",
            "fp32",
        )
    )
    assert json.load(open(tmp_path / "l.jsonl.stats.json"))["gold_agreement"] == 1


def test_pairrm_by_its_interface(monkeypatch, tmp_path):
    """A ranker with llm-blender's interface; without the package one line says what is missing."""
    responses = dump(
        tmp_path / "r.jsonl", [{"id": "x", "prompt": ASK, "responses": ["bb", "a", "cccc"]}]
    )
    command = [
        "label.py",
        "--judge",
        "pairrm",
        "--judge-model",
        "llm-blender/PairRM",
        "--responses",
        responses,
        "--out",
        tmp_path / "l.jsonl",
    ]
    monkeypatch.setitem(sys.modules, "llm_blender", None)
    done = run(*command)
    assert done.returncode == 2 and "package llm-blender, importable" in done.stderr

    class Blender:
        def loadranker(self, path, device):
            assert path == "llm-blender/PairRM" and device in ("cpu", "cuda:0")

        def compare(self, inputs, first, second, return_logits, mode):
            assert inputs == ["Say."] * 6 and return_logits and mode == "[A,B]"
            return np.array(
                [len(a) - len(b) + 5.0 for a, b in zip(first, second)]
            )  # likes length, and the first option

    monkeypatch.setitem(sys.modules, "llm_blender", types.SimpleNamespace(Blender=Blender))
    ok(run(*command))
    (row,) = pair_rows(tmp_path / "l.jsonl")
    assert (row["chosen"], row["rejected"]) == ("cccc", "a")
    assert json.load(open(tmp_path / "l.jsonl.stats.json"))["order_disagreement"] == 1


class Endpoint(BaseHTTPRequestHandler):
    """Chat completions by the tiny model, greedy; what `plan` holds goes wrong first, a failure a
    request."""

    model, tokenizer, plan, asked = None, None, [], []
    refuses: set[str] = set()  # settings that it does not take
    lock = threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.asked.append((body, self.headers["Authorization"]))
            trouble = self.plan.pop(0) if self.plan else 200
        unwanted = sorted(self.refuses & body.keys())
        if unwanted:
            trouble = 400
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
                out = self.model.generate(
                    **ids,
                    max_new_tokens=3,
                    do_sample=False,
                    pad_token_id=0,
                )
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
    monkeypatch.setattr(judges, "TIMEOUT", 0.7)
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
    monkeypatch.setattr(judges, "PARALLEL", 1)
    monkeypatch.setattr(
        judges, "parse_choice", lambda text: len(text) % 7 / 7
    )  # a random model names no letter
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    Endpoint.plan[:] = [500, 429, "silence", "hang up", 503]
    command = [
        "label.py",
        "--judge",
        "openai",
        "--judge-model",
        "tiny",
        "--base-url",
        endpoint,
        "--responses",
        responses_file(tmp_path),
    ]
    done = ok(run(*command, "--out", tmp_path / "l.jsonl"))
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
    ok(run(*command, "--out", tmp_path / "l.jsonl"))
    assert (
        len(Endpoint.asked) == 13 + 3 and jsonl(tmp_path / "l.jsonl") == before
    )  # three were not stored
    (tmp_path / "l.jsonl").unlink()
    ok(run(*command, "--out", tmp_path / "l.jsonl"))
    assert len(Endpoint.asked) == 16 and jsonl(tmp_path / "l.jsonl") == before
    everything = done.stdout + done.stderr + "".join(p.read_text() for p in tmp_path.iterdir())
    assert "secret" not in everything


@pytest.mark.parametrize("trouble", [401, 400, "no choice", "html"])
def test_endpoint_that_refuses_ends_in_one_line(endpoint, trouble, tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "PARALLEL", 1)
    Endpoint.plan[:] = [200, 200, trouble] + [401] * 20
    done = run(
        "label.py",
        "--judge",
        "openai",
        "--judge-model",
        "tiny",
        "--base-url",
        endpoint,
        "--responses",
        responses_file(tmp_path),
        "--out",
        tmp_path / "l.jsonl",
    )
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
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    command = [
        "label.py",
        "--judge",
        "openai",
        "--responses",
        responses_file(tmp_path),
        "--out",
        tmp_path / "l.jsonl",
    ]
    assert "needs --judge-model" in run(*command).stderr
    assert "OPENAI_API_KEY" in run(*command, "--judge-model", "m").stderr


def test_cache_survives_kill_9(endpoint, tmp_path, monkeypatch):
    """A process killed while an endpoint answers: what it was given is kept, and the same command
    asks for the rest alone."""
    monkeypatch.setattr(judges, "TIMEOUT", 60.0)
    responses = responses_file(tmp_path, 8)
    command = [
        sys.executable,
        "label.py",
        "--judge",
        "openai",
        "--judge-model",
        "tiny",
        "--base-url",
        endpoint,
        "--responses",
        responses,
        "--out",
        str(tmp_path / "l.jsonl"),
    ]
    Endpoint.plan[:] = [200] * 5 + ["slow"] * 30
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
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
    run(*command[1:])
    assert 5 <= kept < 16 and len(Endpoint.asked) - asked == 16 - kept


def test_a_judge_without_any_verdict_is_an_error(monkeypatch, capsys):
    monkeypatch.setitem(judges.RANKERS, "llm", lambda args, asked, *_: [math.nan] * len(asked))
    with pytest.raises(SystemExit) as stop:
        judges.compare(namespace(judge="llm"), [(ASK, "a", "b")] * 3, 0, 1, CPU)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "none of its 6 answers held a verdict" in error


def test_a_key_is_hidden_by_value_and_letters_are_left():
    assert judges.hidden("Bearer sk-12x, key sk-12x!", "sk-12x") == "Bearer …, key …!"
    assert judges.hidden("max_tokens exceeds x", "x") == "max_tokens exceeds …"
    # an address writes = as %3D, and nothing need stand between a word and the key
    for text in ("?key%3Dsk-0123456789", "api_keysk-0123456789ab"):
        assert "sk-0123456789" not in judges.hidden(text, "sk-0123456789")


def test_an_endpoint_is_asked_again_the_way_it_wants(endpoint, tmp_path, monkeypatch):
    """One that takes neither setting refuses twice in all, not twice a request."""
    monkeypatch.setattr(judges, "PARALLEL", 1)
    monkeypatch.setattr(judges, "parse_choice", lambda text: len(text) % 7 / 7)
    monkeypatch.setattr(Endpoint, "refuses", {"max_tokens", "temperature"})
    command = ["label.py", "--judge", "openai", "--judge-model", "tiny", "--base-url", endpoint]
    ok(run(*command, "--responses", responses_file(tmp_path), "--out", tmp_path / "l.jsonl"))
    bodies = [body for body, _ in Endpoint.asked]
    assert len(bodies) == 2 + 8
    for body in bodies[2:]:
        assert body["max_completion_tokens"] == 16
        assert not {"max_tokens", "temperature"} & body.keys()


def test_answers_without_verdict_are_counted(endpoint, tmp_path, monkeypatch):
    """In the summary, in the error where no row is left, and where no answer held one."""
    said = iter(["(A)", "A clear winner is hard to name", "(B)", "A and B are alike"])
    monkeypatch.setattr(judges, "ask_endpoint", lambda args, chats, _: [next(said) for _ in chats])
    command = ["label.py", "--judge", "openai", "--judge-model", "tiny"]
    command += ["--responses", responses_file(tmp_path, 2), "--out", tmp_path / "l.jsonl"]
    assert ", 2 without verdict" in ok(run(*command)).stdout
    (row,) = jsonl(tmp_path / "l.jsonl")
    assert row["id"] == "0"  # of the other row neither order held one
    (tmp_path / "l.jsonl").unlink()
    said = iter(["(A)", "both", "(A)", "both"])
    done = run(*command)
    assert done.returncode == 2 and "different reward; 2 answers without verdict" in done.stderr
    said = iter(["both"] * 4)
    done = run(*command)
    assert done.returncode == 2 and "none of its 4 answers held a verdict" in done.stderr


def test_who_waits_for_an_endpoint_does_not_time_out(monkeypatch):
    """60 000 requests in both orders at 10 s, 8 at once, are 41.7 h, on process 0 alone."""
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **k: given.update(k))
    parallel.start_processes()
    assert given["timeout"].total_seconds() > 2 * 60_000 * 10 / judges.PARALLEL
