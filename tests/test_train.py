"""Every piece of the leader's loss against numbers worked by hand and float64 re-derivations, and the stage as a whole."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import dump, jsonl, make_model, ok, run
from hypothesis import given, settings, strategies as st

import seed_dpo
from seed_dpo import pack, response_hidden
from train import atoms_of, extrapolated_logps, leader_loss, loss_star, threshold

one = torch.ones(1)
MARGINS = st.floats(-30, 30)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_refined_loss_by_hand():
    """S10 at M = ln 3, p = ¾, α = 0.1: flagged 0.9 · (−ln ¾) + 0.1 · (−ln ¼), unflagged −ln ¾."""
    m = tensor(math.log(3), math.log(3))
    loss = leader_loss(m, tensor(1, 0), torch.ones(2, 1), torch.zeros(2, 1), 0.1, 6)
    assert loss.tolist() == pytest.approx([0.9 * math.log(4 / 3) + 0.1 * math.log(4), math.log(4 / 3)])


def test_worst_case_loss_by_hand():
    """ξ = ¾, K = 4, two atoms: ¼ of the mass at ¾, ¾ of it at ¼ − that is 1/K, where ℓ* = −ln ¼ − or below it."""
    m = tensor(math.log(3))[:1]
    weight = tensor(0.25, 0.75)[None]
    at_knot = leader_loss(m, tensor(0), weight, tensor(0, 0.5)[None], 0.1, 4)
    assert at_knot.item() == pytest.approx(0.25 * math.log(4 / 3) + 0.75 * math.log(4))
    below = leader_loss(m, tensor(0), weight, tensor(0, 1.0)[None], 0.1, 4)  # at −¼: tangent 1 + ln 4 − 4 · (−¼)
    assert below.item() == pytest.approx(0.25 * math.log(4 / 3) + 0.75 * (2 + math.log(4)))
    flagged = leader_loss(m, tensor(1), weight, tensor(0, 1.0)[None], 0.2, 4)
    assert flagged.item() == pytest.approx(0.8 * below.item() + 0.2 * math.log(4))
    printed = leader_loss(m, tensor(0), weight, tensor(0, 0.5)[None], 0.1, 4, printed=True)
    assert printed.item() == pytest.approx(-math.log(0.25 * 0.75) - math.log(0.75 * 0.25))  # −log[α(ξ − q/α)], T2-6


def test_margin_space_by_hand():
    """Shifts of margins: softplus(−(M − shift)), whatever K."""
    loss = leader_loss(tensor(0.5), tensor(0), tensor(0.5, 0.5)[None], tensor(0, 2.0)[None], 0.1, 6, margin_space=True)
    assert loss.item() == pytest.approx(0.5 * math.log1p(math.exp(-0.5)) + 0.5 * math.log1p(math.exp(1.5)))


@given(MARGINS, st.sampled_from([0.0, 1.0]), st.floats(0, 1))
def test_no_atoms_is_spa_and_no_smoothing_is_dpo(m, z, alpha):
    margin, still = tensor(m), (torch.ones(1, 1), torch.zeros(1, 1))
    p = torch.sigmoid(margin)
    spa = -((1 - alpha * z) * F.logsigmoid(margin) + alpha * z * F.logsigmoid(-margin))
    torch.testing.assert_close(leader_loss(margin, tensor(z), *still, alpha, 6), spa, check_dtype=False)
    torch.testing.assert_close(leader_loss(margin, tensor(z), *still, 0.0, 6), -torch.log(p), check_dtype=False, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(MARGINS, st.sampled_from([0.0, 1.0]), st.floats(0.01, 1), st.floats(0, 1), st.sampled_from([1, 5, 6, 7]), st.booleans())
def test_gradient_by_finite_differences(m, z, shift, w, pieces, printed):
    x = torch.sigmoid(tensor(m)).item() - shift
    if abs(x - 1 / pieces) < 1e-4:
        return  # the second derivative jumps there
    margin = tensor(m).requires_grad_()
    fixed = (tensor(z), tensor(1 - w, w)[None], tensor(0, shift)[None], 0.1, pieces, printed)
    leader_loss(margin, *fixed).sum().backward()
    h = 1e-5
    with torch.no_grad():
        difference = (leader_loss(margin + h, *fixed) - leader_loss(margin - h, *fixed)).item() / (2 * h)
    assert margin.grad.item() == pytest.approx(difference, abs=1e-6, rel=1e-4)


@pytest.mark.parametrize("pieces", [1, 6])
def test_loss_star(pieces):
    x = torch.linspace(-3, 1, 4001, dtype=torch.float64, requires_grad=True)
    y = loss_star(x, pieces)
    y.sum().backward()
    above = x.detach() >= 1 / pieces
    torch.testing.assert_close(y[above], -torch.log(x[above]))
    assert torch.isfinite(y).all() and (x.grad >= -pieces - 1e-9).all() and (x.grad < 0).all()  # pushes everywhere: no clamp
    assert (x.grad.diff() > -1e-9).all() and x.grad.diff().abs().max() < 0.05 * pieces ** 2     # convex, no jump in slope


def test_extrapolated_logps_against_the_formula():
    """S12 token by token in float64 from whole logits; probabilities sum to 1; λ = 0 is the policy itself."""
    model, ref = make_model(seed=0).double(), make_model(seed=1).double()
    batch = pack([([5, 6, 7], [[8, 9, 2], [10, 11]])], True, torch.device("cpu"))
    h, r = response_hidden(model, batch), response_hidden(ref, batch)
    for lam in (0.0, 0.125, 0.5):
        logits = ((1 + lam) * model.lm_head(h) - lam * ref.lm_head(r)).detach()
        by_hand = torch.log(torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True))
        ours = extrapolated_logps(model.lm_head, h, ref.lm_head, r, batch["target"], lam, chunk=2)
        torch.testing.assert_close(ours.double(), by_hand.gather(-1, batch["target"][:, None])[:, 0], rtol=1e-5, atol=1e-5)
        everything = torch.stack([extrapolated_logps(model.lm_head, h, ref.lm_head, r, torch.full_like(batch["target"], v), lam)
                                  for v in range(384)])
        torch.testing.assert_close(everything.exp().sum(0), torch.ones(5), rtol=1e-4, atol=1e-5)
    plain = seed_dpo.token_logps(model.lm_head, h, batch["target"]).detach()
    torch.testing.assert_close(extrapolated_logps(model.lm_head, h, ref.lm_head, r, batch["target"], 0.0), plain)


def test_threshold_looks_back_on_fifty():
    assert threshold([], 10) == -math.inf
    assert threshold([0.0] * 50 + [i / 49 for i in range(50)], 10) == pytest.approx(0.1)


def test_atoms_are_checked(capsys):
    weight, shift = atoms_of([{"atoms": [[0.5, 0.0], [0.5, 0.2]]}, {}], "f")
    assert weight.tolist() == [[0.5, 0.5], [1.0, 0.0]] and shift[1].tolist() == [0, 0]
    for bad in ([[0.5, 0.0]], [[1.5, 0.0], [-0.5, 0.1]], [[1.0, math.inf]], "x", [1.0], None):
        with pytest.raises(SystemExit) as stop:
            atoms_of([{"atoms": bad}], "f")
        assert stop.value.code == 2 and "f: row 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def round_rows(tmp_path_factory, folder, other_folder):
    """Rows as generate, label and dro write them, for a policy that has moved a little from π_init."""
    path = tmp_path_factory.mktemp("round")
    prompts = [{"id": f"p{i}", "prompt": [{"role": "user", "content": f"Write {i} lines."}]} for i in range(44)]
    dump(path / "prompts.jsonl", prompts)
    ok(run("generate.py", "--model", other_folder, "--prompts", path / "prompts.jsonl", "--out", path / "responses.jsonl", "-n", "3",
           "--max-new-tokens", "10", "--precision", "fp32"))
    ok(run("label.py", "--model", other_folder, "--reference-model", folder, "--responses", path / "responses.jsonl",
           "--out", path / "labelled.jsonl", "--precision", "fp32"))
    ok(run("dro.py", "--pairs", path / "labelled.jsonl", "--out", path / "worst.jsonl", "--epsilon", "0.05"))
    ok(run("dro.py", "--pairs", path / "labelled.jsonl", "--out", path / "still.jsonl", "--epsilon", "0"))
    return path


FLAGS = ["--lr", "1e-3", "--batch-size", "8", "--precision", "fp32"]


def test_one_process_equals_two_with_detection(round_rows, other_folder, tmp_path):
    """D3 and D7: weights, thresholds and flags do not depend on the number of processes or the micro-batch."""
    from safetensors.torch import load_file
    common = ["train.py", "--model", other_folder, "--pairs", round_rows / "worst.jsonl", *FLAGS, "--percentile", "30"]
    ok(run(*common, "--micro-batch", "8", "--out", tmp_path / "one"))
    ok(run(*common, "--micro-batch", "3", "--out", tmp_path / "two", processes=2))
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5)
    logs = [jsonl(tmp_path / n / "log.jsonl") for n in ("one", "two")]
    assert [r["flagged"] for r in logs[0]] == [r["flagged"] for r in logs[1]]
    assert sum(len(r["flagged"]) for r in logs[0]) > 0
    quiet = math.ceil(0.2 * len(logs[0]))
    assert all(not r["flagged"] and r["tau"] is None for r in logs[0][:quiet]) and logs[0][quiet]["tau"] is not None
    assert json.load(open(tmp_path / "one.stats.json"))["anchor"] == "init"


def test_zero_epsilon_is_spa_and_without_smoothing_dpo(round_rows, other_folder, tmp_path):
    """Rows through dro.py at ε = 0 train like rows that never saw it; without smoothing the losses are DPO's on these pairs."""
    from safetensors.torch import load_file
    weights = {}
    for name, extra in {"still": ["--pairs", round_rows / "still.jsonl"], "labelled": ["--pairs", round_rows / "labelled.jsonl"],
                        "plain": ["--pairs", round_rows / "still.jsonl", "--alpha", "0"]}.items():
        ok(run("train.py", "--model", other_folder, *extra, *FLAGS, "--out", tmp_path / name))
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    ok(run("seed_dpo.py", "--model", other_folder, "--pairs", round_rows / "labelled.jsonl", *FLAGS, "--epochs", "1", "--out", tmp_path / "dpo"))
    dpo = load_file(tmp_path / "dpo/model.safetensors")
    for name in dpo:
        assert torch.equal(weights["still"][name], weights["labelled"][name])
        torch.testing.assert_close(weights["plain"][name], dpo[name], rtol=1e-3, atol=2e-5)
    assert any(not torch.equal(weights["still"][n], weights["plain"][n]) for n in dpo)
    assert json.load(open(tmp_path / "still.stats.json"))["anchor"] == "previous"


def test_refusals(round_rows, folder, other_folder, tmp_path):
    def refused(*flags):
        done = run("train.py", "--out", tmp_path / "out", *flags)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists(), done.stderr
        return done.stderr
    assert "D6" in refused("--model", other_folder, "--pairs", round_rows / "worst.jsonl", "--anchor", "previous")
    assert "--alpha" in refused("--model", other_folder, "--pairs", round_rows / "worst.jsonl", "--alpha", "2")
    rows = jsonl(round_rows / "worst.jsonl")
    wrong = dump(tmp_path / "wrong.jsonl", [{**r, "chosen_logp": r["chosen_logp"] - 50} for r in rows])
    assert "not those of" in refused("--model", other_folder, "--pairs", wrong)
