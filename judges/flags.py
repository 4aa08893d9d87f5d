"""The flags that name a judge, what of them decides a judgement, and a look at the judge before any
work. Needs no torch: a stage reads its flags before it loads it."""
import argparse
import http.client
import importlib.util
import os
import urllib.error
import urllib.request

from core.folder import check_tokenizer, folder_of, read_json
from core.rows import fail
from core.stage import natural, start

JUDGES = ("vader", "reward-model", "pairrm", "llm", "openai")  # who they are: judges/judge.py
PACKAGES = {"vader": "vaderSentiment", "openai": "openai"}
MARKERS = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")  # in PairRM's config.json


def judge_flags(cli: argparse.ArgumentParser, default: str) -> None:
    """The flags of label.py and evaluate.py that name a judge; `default` is what the stage does
    without one."""
    cli.add_argument("--judge", choices=[default, *JUDGES], default=default,
                     help="who judges (see judges/judge.py)")
    endpoint_flags(cli, 16)


def endpoint_flags(cli: argparse.ArgumentParser, tokens: int) -> None:
    """The flags that name the judge's model and where it answers."""
    cli.add_argument("--judge-model", help="folder or hub id of the judging model; with openai the "
                                           "endpoint's name for it")
    cli.add_argument("--base-url", help="the endpoint of --judge openai; its key is read from "
                                        "OPENAI_API_KEY, never from a flag")
    cli.add_argument("--judge-tokens", type=natural, default=tokens,
                     help="room for an answer of --judge openai; more where it reasons first")


def files_by_name(pairs: list[str]) -> dict[str, str]:
    """{name: path} of NAME=FILE arguments."""
    table = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(table) != len(pairs) or any(not name or "/" in name for name in table):
        fail(f"{' '.join(pairs)}: expected NAME=FILE, each name once and without '/'")
    return table


def refuse_existing(out: str) -> None:
    """Ends the program where something stands at `out`, which a converter does not replace."""
    if os.path.lexists(out):
        fail(f"{out}: is there, and is not replaced: move it away, or name another --out")


def start_judging(args: argparse.Namespace) -> None:
    """`start` of a stage that has a judge, with a look at the judge. What the stage does not use
    with this judge becomes None."""
    if args.judge in ("vader", "openai", "none") and not vars(args).get("model"):
        args.precision = None
    if args.judge != "openai":
        args.judge_tokens = None
    start(args)
    check_judge(args)


def check_judge(args: argparse.Namespace) -> None:
    """Ends the program where the judge cannot judge: its package, its model, its key or its
    endpoint is missing, or its model is of another kind."""
    judge, model = args.judge, args.judge_model
    needs_model = judge in ("reward-model", "pairrm", "llm", "openai")
    if needs_model != bool(model):
        fail(f"--judge {judge} {'needs' if needs_model else 'takes no'} --judge-model "
             "(GOLD_MODEL, JUDGE_MODEL)")
    package = PACKAGES.get(judge)
    if package and importlib.util.find_spec(package) is None:
        fail(f"--judge {judge} needs the package {package} (pip install {package})")
    if judge == "openai":
        key_of_endpoint()
        check_endpoint(args.base_url)
    if judge in ("reward-model", "pairrm", "llm"):
        check_model_of(judge, model)


def key_of_endpoint() -> str:
    """The key in OPENAI_API_KEY, without blanks and line ends around it."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        fail("--judge openai reads its key from the environment variable OPENAI_API_KEY (any word "
             "for a server that asks for none)")
    if len(key.split()) > 1 or not key.isascii():
        fail("OPENAI_API_KEY holds a blank, a line end or a letter that no key has")
    return key


def check_endpoint(url: str | None) -> None:
    """Any HTTP answer, a refusal too, shows that the endpoint is there."""
    url = url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/models", timeout=5).close()
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError, http.client.HTTPException) as error:
        fail(f"--base-url {url} does not answer: {getattr(error, 'reason', error)}")


def check_model_of(judge: str, model: str) -> None:
    """The judge's tokenizer and config.json are those of such a judge; what only the hub has is
    looked at when it is loaded."""
    if judge != "pairrm":
        check_tokenizer(model)
    folder = folder_of(model)
    if folder is None or judge == "llm":
        return
    config = read_json(folder / "config.json")
    if judge == "pairrm":
        if any(not isinstance(config.get(key), int) for key in MARKERS):
            fail(f"{model}: its config.json has no {', '.join(MARKERS)}; --judge pairrm reads "
                 "llm-blender/PairRM-hf and what is laid out like it")
        return
    # Of no sequence classifier transformers takes two.
    logits = len(config.get("id2label") or range(config.get("num_labels", 2)))
    if logits != 1:
        fail(f"{model}: a reward model is a sequence classifier of one logit; found {logits}")
