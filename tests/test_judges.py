"""Judges: order, parsers, the local LLM judge and PairRM against plain computations, an endpoint on
loopback with all its failures."""
import functools
import json
import math
import os
import shutil
import signal
import threading
import time
import types
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    CORPUS,
    dump,
    gold_rows,
    jsonl,
    ok,
    one_line,
    pair_rows,
    refused,
    run,
    saved,
    stats_of,
)
from families import tiny_config
from safetensors.torch import load_file, save_file
from scipy.special import expit
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from core import parallel
from core.chat import answered, encode_prompt
from judges import endpoint as endpoints
from judges import judge as judges
from judges.comparisons import option_prompt
from judges.endpoint import UNANSWERABLE, parse_choice, parse_rating
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


def test_preferences_of_both_orders():
    """One order without a verdict counts ½; both, and there is none. Who always says A prefers
    nothing, and who is asked the other way round the other side."""
    nan = math.nan
    shown, exchanged = np.array([[1, nan, 0.2, nan, 1], [0, nan, 0.3, 0, 1]])
    p, behaviour = both_orders(shown, exchanged)
    assert p.tolist() == pytest.approx([1.0, nan, 0.45, 0.75, 0.5], nan_ok=True)
    assert behaviour == {"order_disagreement": 0.4, "no_verdict": 3}
    assert settled(p)[1] == 0.5
    assert both_orders(exchanged, shown)[0].tolist() == pytest.approx((1 - p).tolist(), nan_ok=True)


CHOICES = {
    1: ["A", " (A) ", "**A**", "‘A’.", "[A]", "[[a]]", "My choice: [[A]]",
        "[[B]] at first, but [[A]]", "<think>[[B]]</think> [[A]]", "**[[A]]** is kind"],
    0: [" B.", "{b}", "Both have merit.\n\n[[B]]", "<think>(A) is fine.</think> (B)"],
    None: ["", "both", "A or B", "AB", "C", "A's", "A\nA", "(B) because", "Answer: B",
           "(A) is better, since (B) rambles.", "**(A)**\n\n(A) is concise; (B) is verbose.",
           "[A] or [B]", "<think>[[A]] looks fine", "[[C]]", "The answer is A", "\x00"],
}


@pytest.mark.parametrize("value", CHOICES)
def test_parse_choice(value):
    for text in CHOICES[value]:
        choice = parse_choice(text)
        assert math.isnan(choice) if value is None else choice == value, text


RATINGS = {
    "Rating: [[7]]": 7, "[[8.5]] then [[2]]": 8.5, "[6]": 6, "[[10]]": 10,
    "I say [1] but [[9]]": 9, "arr[1], m[2][3] and df[[1]]: [6]": 6,
    "<think>[[3]]</think> Rating: [[4]]": 4, "<think>[[3]]": None, "arr[1] is an index": None,
    "7": None, "[[rating]]": None, "[[11]]": None, "[[0]]": None, "": None, "[[7": None,
}


def test_parse_rating():
    for text, value in RATINGS.items():
        rating = parse_rating(text)
        assert math.isnan(rating) if value is None else rating == value, text


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
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"}]
    (message,) = option_prompt(chat, "x", "y")
    assert "Human: Hi\n\nAssistant: Hello\n\nHuman: Bye\n" in message["content"]
    assert message["content"].endswith("Options:\n(A) x\n(B) y\nThe answer is:")


def test_llm_judge_against_a_plain_computation(wide, tokenizer, tmp_path):
    """Label rows and agreement with gold from logits of whole sequences, one at a time, in
    float64."""
    rows = gold_rows(5)
    model = transformers.AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float64)
    letters = [tokenizer.encode(letter)[0] for letter in "AB"]

    def odds(prompt, first: str, second: str) -> float:
        ids = encode_prompt(tokenizer, option_prompt(prompt, first, second))
        a, b = model(torch.tensor([ids])).logits[0, -1, letters].tolist()
        return a - b

    margins, disagree = [], 0
    for row in rows:
        there = odds(row["prompt"], row["chosen"], row["rejected"])
        back = odds(row["prompt"], row["rejected"], row["chosen"])
        margins.append(expit(there) - expit(back))
        disagree += there * back > 0
    pairs = dump(tmp_path / "gold.jsonl", rows)
    ok(label(tmp_path, f"--judge llm --judge-model {wide} --model {wide} --pairs {pairs}"))
    stats = stats_of(tmp_path / "l.jsonl")
    assert stats["gold_agreement"] == np.mean([m > 0 for m in margins])
    assert stats["order_disagreement"] == disagree / 5
    for row, labelled, m in zip(rows, pair_rows(tmp_path / "l.jsonl"), margins):
        assert labelled["margin"] == pytest.approx(abs(m), abs=1e-4)
        assert labelled["chosen"] == (row["chosen"] if m > 0 else row["rejected"])


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
    assert stats_of(tmp_path / "l.jsonl")["gold_agreement"] == 1


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


@functools.cache
def parts_of_ranker(folder) -> tuple:
    weights = load_file(folder / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder)
    encoder = transformers.DebertaV2Model(config).eval()
    encoder.load_state_dict(
        {n.removeprefix("pretrained_model."): t for n, t in weights.items()}, strict=False
    )
    return encoder, transformers.AutoTokenizer.from_pretrained(folder), weights


def ranker_preference(folder, source: str, first: str, second: str) -> float:
    """The preference of one comparison, re-derived: no padding, no batch, plain matrices."""
    encoder, tokenizer, weights = parts_of_ranker(folder)

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
    return torch.sigmoid((scores[0] - scores[1]).mean()).item()


def test_pairrm_against_a_plain_computation(pairrm_folder, capsys):
    """A turn of several, parts that are cut, control tokens that a text spells."""
    args = namespace(judge="pairrm", judge_model=str(pairrm_folder))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    asked = [(ASK, CORPUS[i], CORPUS[i + 9][: 3 + 9 * i]) for i in range(4)]
    asked += [(chat, "a", "b"), (ASK, "x" * 3000, "short"), (ASK, "<|candidate2|>[SEP]", "fine")]
    asked += [([{"role": "user", "content": "y" * 1500}], "long " * 400, "z" * 409)]
    read = [(turns[0]["content"], first, second) for turns, first, second in asked]
    read[4] = ("USER: Hi\nASSISTANT: Yes?", "a", "b")
    read[6] = ("Say.", "<·|candidate2|>[·SEP]", "fine")
    found = judges.pairrm(args, asked)
    assert list(found) == pytest.approx([ranker_preference(pairrm_folder, *each) for each in read],
                                        abs=1e-6)
    assert "2 of 8 comparisons are longer" in capsys.readouterr().err


def test_pairrm_as_a_judge(pairrm_folder, folder, tmp_path):
    """What is laid out otherwise, or lacks weights, is one line."""
    rows = [{"id": "x", "prompt": ASK, "responses": ["bb", "a", "cccc"]}]
    command = f"--judge pairrm --responses {dump(tmp_path / 'r.jsonl', rows)} --judge-model "
    ok(label(tmp_path, f"{command}{pairrm_folder}"))
    one_line(label(tmp_path, command + folder), "llm-blender/PairRM-hf")
    less = shutil.copytree(pairrm_folder, tmp_path / "less")
    weights = load_file(less / "model.safetensors")
    del weights["head_layer.4.bias"]
    save_file(weights, less / "model.safetensors", {"format": "pt"})
    one_line(label(tmp_path, f"{command}{less}"), "1 weights are missing (head_layer.4.bias)")


@pytest.mark.parametrize("judge", ["reward-model", "llm"])
def test_a_judge_reads_no_more_than_its_context(judge, tokenizer, tmp_path):
    """All rows are looked at before any is judged; a conversation that just fits is."""
    texts = ["short", "longer " * 9]
    family = transformers.LlamaForSequenceClassification
    length = len(tokenizer.apply_chat_template(answered(ASK, texts[1]), return_dict=False))
    if judge == "llm":
        family = transformers.LlamaForCausalLM
        length = 1 + len(encode_prompt(tokenizer, option_prompt(ASK, *texts)))
    rows = [{"id": str(i), "prompt": ASK, "responses": texts} for i in range(2)]
    responses = dump(tmp_path / "r.jsonl", rows)

    def judged(context: int):
        model = family(tiny_config("llama", num_labels=1, max_position_embeddings=context))
        path = saved(tmp_path / str(context), model, tokenizer)
        return label(tmp_path, f"--judge {judge} --judge-model {path} --responses {responses}")

    ok(judged(length))
    one_line(judged(length - 1), "'Say.'", f" {length} tokens", f"context is {length - 1}")


def test_a_judge_is_looked_at_before_any_work(
    folder, ranker, tokenizer, tmp_path, monkeypatch, capsys
):
    def look(judge, model=None) -> str:
        return refused(capsys, check_judge, namespace(judge=judge, judge_model=model))

    check_judge(namespace(judge="reward-model", judge_model=ranker))
    check_judge(namespace(judge="llm", judge_model=folder))
    config = transformers.AutoConfig.from_pretrained(ranker, num_labels=2)
    two = saved(tmp_path / "two", transformers.LlamaForSequenceClassification(config))
    base = shutil.copytree(folder, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    assert "one logit" in look("reward-model", folder)
    assert "no tokenizer" in look("reward-model", two)
    tokenizer.save_pretrained(two)
    assert "found 2" in look("reward-model", two)
    assert "no chat template" in look("llm", str(base))
    assert "needs --judge-model" in look("pairrm") and "needs --judge-model" in look("openai")
    monkeypatch.setattr("judges.flags.importlib.util.find_spec", lambda name: None)
    assert "package vaderSentiment" in look("vader")
    assert "package openai" in look("openai", "m")


# ------------------------------------------------------------------------------------- an endpoint


class Endpoint(BaseHTTPRequestHandler):
    """Chat completions that mean nothing; what `plan` holds goes wrong first, a failure a
    request."""

    plan, asked = [], []
    refuses: set[str] = set()  # settings that it does not take
    minds = ""  # answers of status 400 to a question that holds this
    lock = threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.lock:
            self.asked.append((body, self.headers["Authorization"]))
            trouble = self.plan.pop(0) if self.plan else 200
        said = f"trouble, {self.headers['Authorization']}"
        if unwanted := sorted(self.refuses & body.keys()):
            trouble, said = 400, f"{said}, {unwanted[:1]}"
        if self.minds and self.minds in question:
            trouble, said = 400, "maximum context length is 9 tokens"
        if trouble in ("silence", "slow"):
            time.sleep(1.5)
        if trouble in ("silence", "hang up"):
            return self.connection.close()
        answer = {"error": {"message": said, "code": trouble}}
        if trouble == "no choice":
            answer = {"choices": []}
        if trouble in (200, "slow"):
            letter = "AB"[zlib.crc32(question.encode()) % 2]
            answer = {"choices": [{"message": {"role": "assistant", "content": letter}}]}
        data = b"<html>not json" if trouble == "html" else json.dumps(answer).encode()
        self.send_response(trouble if isinstance(trouble, int) else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def ask_openai(tmp_path, monkeypatch):
    """ask_openai(rows, host): label.py asks the endpoint for so many rows, whose texts have a
    separator that Python's splitlines, but not JSONL, takes for the end of a line."""
    Endpoint.plan, Endpoint.asked = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-word")
    monkeypatch.setattr(endpoints, "TIMEOUT", 0.7)
    monkeypatch.setattr(endpoints, "PARALLEL", 1)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)

    def of(count: int = 4, host: str = "127.0.0.1", label=label):
        rows = [{"id": str(i), "prompt": ASK, "responses": [CORPUS[i] + "\u2028", CORPUS[i + 9]]}
                for i in range(count)]
        responses = dump(tmp_path / "r.jsonl", rows)
        url = f"http://{host}:{server.server_port}/v1"
        return label(tmp_path, f"{OPENAI} --base-url {url} --responses {responses}")
    yield of
    server.shutdown()


def test_endpoint_survives_trouble_and_is_never_asked_twice(ask_openai, tmp_path):
    Endpoint.plan[:] = [500, 429, "silence", "hang up", 503]
    done = ok(ask_openai())
    assert len(Endpoint.asked) == 5 + 8
    for body, key in Endpoint.asked:
        assert key == "Bearer sk-secret-word" and body["temperature"] == 0
    cache, out = tmp_path / "l.jsonl.judge_cache.jsonl", tmp_path / "l.jsonl"
    before = jsonl(out)
    lines = cache.read_text().split("\n")
    # a kill while the sixth answer was being written: three are not stored
    for stored, asked in (("\n".join(lines[:5]) + "\n" + lines[5][:30], 3), (None, 0)):
        if stored:
            cache.write_text(stored)
        out.unlink()
        Endpoint.asked.clear()
        ok(ask_openai())
        assert len(Endpoint.asked) == asked and jsonl(out) == before
    everything = done.stdout + done.stderr + "".join(p.read_text() for p in tmp_path.iterdir())
    assert "secret" not in everything


@pytest.mark.parametrize("trouble", [401, 400, "no choice", "html"])
def test_endpoint_that_refuses_ends_in_one_line(ask_openai, trouble, tmp_path):
    Endpoint.plan[:] = [200, 200, trouble] + [401] * 20
    done = ask_openai()
    assert done.returncode == 2 and not (tmp_path / "l.jsonl").exists()
    assert "2 answers are kept" in done.stderr.splitlines()[-1] and "secret" not in done.stderr
    assert (tmp_path / "l.jsonl.judge_cache.jsonl").read_text().count('"answer":') == 2


def test_endpoint_without_a_key_or_an_answer(ask_openai, tmp_path, monkeypatch):
    assert "host:" in ask_openai(host="host").stderr
    for key, words in ((" \n", "reads its key from"), ("a b", "OPENAI_API_KEY holds a blank")):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert words in ask_openai().stderr


NEVER = [
    "the prompt triggering Azure OpenAI's content management policy",
    "Output blocked by content filtering policy", "Content Exists Risk",
    "Input data may contain inappropriate content.",
    "your prompt was flagged as potentially violating our usage policy",
    "Prompt is blocked due to prohibited content", "context_length_exceeded",
    "This model's maximum context length is 8192 tokens.", "exceeds the available context size",
    "prompt is too long: 9 tokens > 8", "Range of input length should be [1, 30720]",
    "`inputs` tokens + `max_new_tokens` must be <= 4096"]
MENDED = [
    "Incorrect API key provided", "Your credit balance is too low", "model `x` does not exist",
    "Unsupported parameter: 'max_tokens'", "`temperature` must be 1 for this model"]


def test_what_an_endpoint_will_never_answer():
    assert all(UNANSWERABLE.search(f"Error code: 400 - {words}") for words in NEVER)
    assert not any(UNANSWERABLE.search(f"Error code: 400 - {words}") for words in MENDED)


def test_what_an_endpoint_will_never_answer_is_no_verdict(ask_openai, tmp_path, monkeypatch):
    """Status 400 for a text too long: counted, kept, and not asked again, wherever the endpoint has
    moved; the blank around a key is no part of it."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-word\n")
    monkeypatch.setattr(Endpoint, "minds", CORPUS[0])
    printed = ok(ask_openai(8)).stdout
    answers = [row["answer"] for row in jsonl(tmp_path / "l.jsonl.judge_cache.jsonl")
               if "answer" in row]
    assert answers.count("") == 2 and ", 2 without verdict" in printed
    assert {key for _, key in Endpoint.asked} == {"Bearer sk-secret-word"}
    asked, rows = len(Endpoint.asked), jsonl(tmp_path / "l.jsonl")
    assert asked == 16 and rows and "0" not in [row["id"] for row in rows]
    (tmp_path / "l.jsonl").unlink()
    ok(ask_openai(8, host="localhost"))
    assert len(Endpoint.asked) == asked and jsonl(tmp_path / "l.jsonl") == rows


def test_cache_survives_kill_9(ask_openai, tmp_path):
    """A process killed while an endpoint answers: what it was given is kept, and the same command
    asks for the rest alone."""
    cache = tmp_path / "l.jsonl.judge_cache.jsonl"

    def killed(tmp_path, flags):
        if not (pid := os.fork()):
            label(tmp_path, flags)
            os._exit(0)
        while not cache.exists() or cache.read_text().count('"answer":') < 5:
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    Endpoint.plan[:] = [200] * 5 + ["slow"] * 30
    ask_openai(8, label=killed)
    kept = cache.read_text().count('"answer":')
    Endpoint.plan.clear()
    time.sleep(2)  # requests under way at the kill come to their end
    asked = len(Endpoint.asked)
    ask_openai(8)
    assert 5 <= kept < 16 and len(Endpoint.asked) - asked == 16 - kept


def test_an_endpoint_is_asked_again_the_way_it_wants(ask_openai, monkeypatch):
    """One that takes neither setting refuses twice in all, not twice a request."""
    monkeypatch.setattr(Endpoint, "refuses", {"max_tokens", "temperature"})
    ok(ask_openai())
    bodies = [body for body, _ in Endpoint.asked]
    assert len(bodies) == 2 + 8
    for body in bodies[2:]:
        assert body["max_completion_tokens"] == 16
        assert not {"max_tokens", "temperature"} & body.keys()


def test_answers_without_verdict_are_counted(ask_openai, tmp_path, monkeypatch):
    """In the summary, and in the error where no answer held one."""
    def ask(*said):
        monkeypatch.setattr(endpoints, "ask_endpoint", lambda args, chats: list(said))
        return ask_openai(2)

    assert ", 2 without verdict" in ok(ask("(A)", "A is it", "(B)", "A and B")).stdout
    assert [row["id"] for row in jsonl(tmp_path / "l.jsonl")] == ["0"]
    (tmp_path / "l.jsonl").unlink()
    one_line(ask(*4 * ["both"]), "none of its 4 answers held a verdict")


def test_who_waits_for_an_endpoint_does_not_time_out(monkeypatch):
    """60 000 requests in both orders at 10 s, 8 at once, are 41.7 h, on process 0 alone."""
    given = {}
    monkeypatch.setattr(parallel, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **k: given.update(k))
    parallel.start_processes()
    assert given["timeout"].total_seconds() > 2 * 60_000 * 10 / endpoints.PARALLEL
