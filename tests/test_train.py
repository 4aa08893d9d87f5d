"""Every piece of the leader's loss against numbers worked by hand and float64 re-derivations, and
the stage as a whole."""

import json
import math
import random
import re
import resource
import shutil
import time
import zipfile
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import dump, jsonl, launch, make_model, ok, run
from core.folder import fingerprint
from core.policy import ResponseLogps, pack, response_hidden, token_logps
from core.training import log_row
from seed_dpo import dpo_margin
from train import atoms_of, leader_loss, loss_star, pieces_of, threshold

one = torch.ones(1)
MARGINS = st.floats(-30, 30)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_refined_loss_by_hand():
    """S10 at M = ln 3, p = ¾, α = 0.1: flagged 0.9 · (−ln ¾) + 0.1 · (−ln ¼), unflagged −ln ¾."""
    m = tensor(math.log(3), math.log(3))
    loss = leader_loss(m, tensor(1, 0), torch.ones(2, 1), torch.zeros(2, 1), 0.1, 6)
    assert loss.tolist() == pytest.approx(
        [0.9 * math.log(4 / 3) + 0.1 * math.log(4), math.log(4 / 3)]
    )


def test_worst_case_loss_by_hand():
    """ξ = ¾, K = 4, two atoms: ¼ of the mass at ¾, ¾ of it at ¼ − that is 1/K, where ℓ* = −ln ¼ −
    or below it."""
    m = tensor(math.log(3))[:1]
    weight = tensor(0.25, 0.75)[None]
    at_knot = leader_loss(m, tensor(0), weight, tensor(0, 0.5)[None], 0.1, 4)
    assert at_knot.item() == pytest.approx(0.25 * math.log(4 / 3) + 0.75 * math.log(4))
    below = leader_loss(
        m, tensor(0), weight, tensor(0, 1.0)[None], 0.1, 4
    )  # at −¼: tangent 1 + ln 4 − 4 · (−¼)
    assert below.item() == pytest.approx(0.25 * math.log(4 / 3) + 0.75 * (2 + math.log(4)))
    flagged = leader_loss(m, tensor(1), weight, tensor(0, 1.0)[None], 0.2, 4)
    assert flagged.item() == pytest.approx(0.8 * below.item() + 0.2 * math.log(4))


def test_printed_form_differs_in_the_split_pair_alone():
    """D4: T2-6 as printed, Σ_j −log[w_ij (ξ − shift_ij)], has the weight inside the logarithm,
    where it adds a constant.

    An atom of weight 1 is the same in both; of a split pair the printed form counts both atoms in
    full.
    """
    margin = tensor(math.log(3), math.log(3), math.log(3)).requires_grad_()  # ξ = ¾; K = 4
    weight, shift = (
        tensor(1, 0, 1, 0, 0.25, 0.75).view(3, 2),
        tensor(0, 0, 0.5, 0, 0, 0.5).view(3, 2),
    )
    expected = leader_loss(margin, tensor(0, 0, 0), weight, shift, 0.1, 4)
    atoms = torch.sigmoid(margin)[:, None] - shift
    printed = -torch.log(torch.where(weight > 0, weight * atoms, 1.0)).sum(-1)
    slopes = [
        torch.autograd.grad(loss.sum(), margin, retain_graph=True)[0]
        for loss in (expected, printed)
    ]
    assert slopes[0].tolist() == pytest.approx([-0.25, -0.75, -0.25 * 0.25 - 0.75 * 0.75])
    assert slopes[1].tolist() == pytest.approx([-0.25, -0.75, -0.25 - 0.75])


@given(MARGINS, st.sampled_from([0.0, 1.0]), st.floats(0, 1))
def test_no_atoms_is_spa_and_no_smoothing_is_dpo(m, z, alpha):
    margin, still = tensor(m), (torch.ones(1, 1), torch.zeros(1, 1))
    p = torch.sigmoid(margin)
    spa = -((1 - alpha * z) * F.logsigmoid(margin) + alpha * z * F.logsigmoid(-margin))
    torch.testing.assert_close(
        leader_loss(margin, tensor(z), *still, alpha, 6), spa, check_dtype=False
    )
    torch.testing.assert_close(
        leader_loss(margin, tensor(z), *still, 0.0, 6),
        -torch.log(p),
        check_dtype=False,
        rtol=1e-6,
        atol=1e-6,
    )


@settings(deadline=None)
@given(
    MARGINS,
    st.sampled_from([0.0, 1.0]),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.sampled_from([1, 5, 6, 7]),
)
def test_gradient_by_finite_differences(m, z, shift, w, pieces):
    x = torch.sigmoid(tensor(m)).item() - shift
    if abs(x - 1 / pieces) < 1e-4:
        return  # the second derivative jumps there
    margin = tensor(m).requires_grad_()
    fixed = (tensor(z), tensor(1 - w, w)[None], tensor(0, shift)[None], 0.1, pieces)
    leader_loss(margin, *fixed).sum().backward()
    h = 1e-5
    with torch.no_grad():
        difference = (leader_loss(margin + h, *fixed) - leader_loss(margin - h, *fixed)).item() / (
            2 * h
        )
    assert margin.grad.item() == pytest.approx(difference, abs=1e-6, rel=1e-4)


@pytest.mark.parametrize("pieces", [1, 6])
def test_loss_star(pieces):
    x = torch.linspace(-3, 1, 4001, dtype=torch.float64, requires_grad=True)
    y = loss_star(x, pieces)
    y.sum().backward()
    above = x.detach() >= 1 / pieces
    torch.testing.assert_close(y[above], -torch.log(x[above]))
    assert (
        torch.isfinite(y).all() and (x.grad >= -pieces - 1e-9).all() and (x.grad < 0).all()
    )  # pushes everywhere: no clamp
    assert (
        x.grad.diff() > -1e-9
    ).all() and x.grad.diff().abs().max() < 0.05 * pieces**2  # convex, no jump in slope


def test_extrapolated_logps_against_the_formula():
    """S12 token by token in float64 from whole logits; probabilities sum to 1; λ = 0 is the policy
    itself."""
    model, ref = make_model(seed=0).double(), make_model(seed=1).double()
    batch = pack([([5, 6, 7], [[8, 9, 2], [10, 11]])], True, torch.device("cpu"))
    h, r = response_hidden(model, batch), response_hidden(ref, batch).detach()
    for lam in (0.0, 0.125, 0.5):
        logits = ((1 + lam) * model.lm_head(h) - lam * ref.lm_head(r)).detach()
        by_hand = torch.log(torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True))
        plain, ours = token_logps(model.lm_head, h, batch["target"], (ref.lm_head, r), lam, chunk=2)
        expected = by_hand.gather(-1, batch["target"][:, None])[:, 0]
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
        assert plain.requires_grad and not ours.requires_grad
        if lam == 0:
            torch.testing.assert_close(ours, plain.detach())
        every = [
            token_logps(
                model.lm_head, h, torch.full_like(batch["target"], v), (ref.lm_head, r), lam
            )[1]
            for v in range(384)
        ]
        torch.testing.assert_close(
            torch.stack(every).exp().sum(0).double(), torch.ones(5).double(), rtol=1e-4, atol=1e-5
        )
    alone, tilde = token_logps(model.lm_head, h, batch["target"])  # no reference: S9
    assert torch.equal(alone, tilde) and not tilde.requires_grad


def test_the_extra_pass_is_not_repeated_in_backward():
    """Recomputation of a chunk stops before the reference's head: detection costs one reference
    head a token, not two."""
    model, calls = make_model(), []
    batch = pack([([5, 6, 7], [[8, 9, 2], [10, 11]])], True, torch.device("cpu"))
    hidden = response_hidden(model, batch)

    def head_ref(states):
        calls.append(states)
        return model.lm_head(states)

    logps, _ = token_logps(
        model.lm_head, hidden, batch["target"], (head_ref, hidden.detach()), 0.5, chunk=2
    )
    logps.sum().backward()
    assert len(calls) == 3


def test_threshold_looks_back_on_fifty():
    assert threshold([], 10) == threshold([{"p_tilde": []}], 10) == -math.inf
    assert threshold(
        [{"p_tilde": [0.0] * 50}] + [{"p_tilde": [i / 49]} for i in range(50)], 10
    ) == pytest.approx(0.1)


def test_logged_accuracy_is_what_training_did():
    """Pairs that π_θ prefers otherwise than π_ref count, whatever the margin against π_init: ½ at
    the start."""
    run = SimpleNamespace(
        device=torch.device("cpu"),
        encoded=[([5, 6], [[7, 2], [8, 2]])] * 4,
        shared=True,
        policy=ResponseLogps(make_model()),
        peak=1.0,
    )
    for gain, accuracy in (([0.0] * 4, 0.5), ([0.0, 0.2, 0.1, -0.1], 0.625)):
        pairs = {"loss": [0.1] * 4, "margin": [3.0] * 4, "gain": gain}
        row = log_row(run, 0, [0, 1, 2, 3], pairs, 1.0, 0.1, time.perf_counter())
        assert row["accuracy"] == accuracy and row["margin"] == 3.0


def test_atoms_are_checked(capsys):
    weight, shift = atoms_of([{"atoms": [[0.5, 0.0], [0.5, 0.2]]}, {}], "f")
    assert weight.tolist() == [[0.5, 0.5], [1.0, 0.0]] and shift[1].tolist() == [0, 0]
    for bad in ([[0.5, 0.0]], [[1.5, 0.0], [-0.5, 0.1]], [[1.0, math.inf]], "x", [1.0], None):
        with pytest.raises(SystemExit) as stop:
            atoms_of([{"atoms": bad}], "f")
        assert stop.value.code == 2 and "f: row 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def round_rows(tmp_path_factory, folder, other_folder):
    """Rows as generate, label and dro write them, for a policy that has moved a little from
    π_init."""
    path = tmp_path_factory.mktemp("round")
    prompts = [
        {"id": f"p{i}", "prompt": [{"role": "user", "content": f"Write {i} lines."}]}
        for i in range(44)
    ]
    dump(path / "prompts.jsonl", prompts)
    ok(
        run(
            "generate.py",
            "--model",
            other_folder,
            "--prompts",
            path / "prompts.jsonl",
            "--out",
            path / "responses.jsonl",
            "-n",
            "3",
            "--max-new-tokens",
            "10",
            "--precision",
            "fp32",
        )
    )
    ok(
        run(
            "label.py",
            "--model",
            other_folder,
            "--reference-model",
            folder,
            "--responses",
            path / "responses.jsonl",
            "--out",
            path / "labelled.jsonl",
            "--precision",
            "fp32",
        )
    )
    ok(
        run(
            "dro.py",
            "--pairs",
            path / "labelled.jsonl",
            "--out",
            path / "worst.jsonl",
            "--epsilon",
            "0.05",
        )
    )
    ok(
        run(
            "dro.py",
            "--pairs",
            path / "labelled.jsonl",
            "--out",
            path / "still.jsonl",
            "--epsilon",
            "0",
        )
    )
    return path


FLAGS = ["--lr", "1e-3", "--batch-size", "8", "--precision", "fp32"]
EVERY_STEP = ["--save-every", "1e-9"]  # minutes


def test_any_number_of_processes_gives_the_same_policy(round_rows, other_folder, tmp_path):
    """D3 and D7: 1 × 8, 2 × 4, 2 × 1 with accumulation, and sharded weights agree in weights,
    thresholds and flags."""
    common = [
        "train.py",
        "--model",
        other_folder,
        "--pairs",
        round_rows / "worst.jsonl",
        "--anchor",
        "init",
        *FLAGS,
        "--percentile",
        "30",
    ]
    ok(run(*common, "--micro-tokens", "2000", "--out", tmp_path / "one"))
    ok(
        launch(
            [*common, "--micro-tokens", "2000", "--out", tmp_path / "two"],
            [*common, "--micro-tokens", "1", "--out", tmp_path / "accumulated"],
            [*common, "--micro-tokens", "90", "--shard", "--out", tmp_path / "sharded"],
        )
    )
    one, log = load_file(tmp_path / "one/model.safetensors"), jsonl(tmp_path / "one/log.jsonl")
    for other in ("two", "accumulated", "sharded"):
        assert [f.name for f in (tmp_path / other).glob("*.safetensors")] == ["model.safetensors"]
        weights = load_file(tmp_path / other / "model.safetensors")
        assert weights.keys() == one.keys()
        for name in one:
            torch.testing.assert_close(one[name], weights[name], rtol=1e-3, atol=2e-5)
        theirs = jsonl(tmp_path / other / "log.jsonl")
        assert [r["flagged"] for r in theirs] == [r["flagged"] for r in log]
        assert [r["tau"] or 0 for r in theirs] == pytest.approx(
            [r["tau"] or 0 for r in log], abs=1e-5
        )
    assert sum(len(r["flagged"]) for r in log) > 0
    quiet = math.ceil(0.2 * len(log))
    assert (
        all(not r["flagged"] and r["tau"] is None for r in log[:quiet])
        and log[quiet]["tau"] is not None
    )
    assert json.load(open(tmp_path / "one.stats.json"))["anchor"] == "init"


def test_killed_at_any_moment_ends_with_the_same_bits(round_rows, other_folder, tmp_path):
    """Killed before the first checkpoint, half-way into writing one, and between two; each time the
    same command again."""
    command = [
        "train.py",
        "--model",
        other_folder,
        "--pairs",
        round_rows / "worst.jsonl",
        "--anchor",
        "init",
        *FLAGS,
        "--percentile",
        "30",
        "--batch-size",
        "4",
        *EVERY_STEP,
    ]
    out, steps = tmp_path / "killed", math.ceil(len(jsonl(round_rows / "worst.jsonl")) / 4)
    ok(run(*command, "--out", tmp_path / "whole"))
    dice = random.Random()  # a new moment every time: any must do
    step = dice.randrange(4, steps)
    for death, start in (("0,0", 0), ("save,2", 0), (f"0,{step}", 1)):
        done = launch([*command, "--out", out], processes=1, DIE=death)
        assert done.returncode == -9 and not out.exists(), done.stderr
        assert (f"going on after step {start}\n" in done.stdout) == (start > 0)
    done = ok(
        run(*command, "--out", out, "--micro-tokens", "4096")
    )  # a flag that changes no mathematics
    assert f"going on after step {step}\n" in done.stdout
    whole, killed = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(whole[n], killed[n]) for n in whole)
    logs = [
        [
            {k: r[k] for k in ("step", "loss", "tau", "flagged", "p_tilde")}
            for r in jsonl(tmp_path / n / "log.jsonl")
        ]
        for n in ("whole", "killed")
    ]
    assert logs[0] == logs[1]
    (tmp_path / "killed.checkpoint").write_text("as if killed before it was removed")
    assert "complete, skipped" in ok(run(*command, "--out", out, "--micro-tokens", "4096")).stdout
    assert {p.name for p in tmp_path.glob("killed*")} == {
        "killed",
        "killed.stats.json",
    }  # a finished run leaves no checkpoint


@pytest.mark.parametrize(
    "processes, extra",
    [(2, ["--shard", "--gradient-checkpointing", "--precision", "bf16"]), (3, [])],
)
def test_a_dying_rank_takes_the_others_down_and_all_go_on(
    round_rows, other_folder, tmp_path, processes, extra
):
    command = [
        "train.py",
        "--model",
        other_folder,
        "--pairs",
        round_rows / "worst.jsonl",
        "--anchor",
        "init",
        *FLAGS,
        *EVERY_STEP,
        *extra,
    ]
    start = time.monotonic()
    done = launch([*command, "--out", tmp_path / "killed"], processes=processes, DIE="1,3")
    assert (
        done.returncode != 0
        and time.monotonic() - start < 60
        and "rank 1 dies" in done.stderr
        and "SIGKILL" in done.stderr
    )
    done = ok(
        launch(
            [*command, "--out", tmp_path / "killed"],
            [*command, "--out", tmp_path / "whole"],
            processes=processes,
        )
    )
    assert re.search(
        r"going on after step [34]\n", done.stdout
    )  # rank 0 may have come to the next checkpoint before it was taken down
    whole, killed = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(whole[n], killed[n]) for n in whole)


def test_a_checkpoint_outlives_a_change_of_memory(round_rows, other_folder, tmp_path):
    """Killed, and gone on with sharded weights or without: to the same weights but for rounding."""
    command = [
        "train.py",
        "--model",
        other_folder,
        "--pairs",
        round_rows / "worst.jsonl",
        "--anchor",
        "init",
        *FLAGS,
        *EVERY_STEP,
    ]
    ok(run(*command, "--out", tmp_path / "whole"))
    launch([*command, "--shard", "--out", tmp_path / "one"], processes=2, DIE="0,3")
    said = ok(run(*command, "--out", tmp_path / "one")).stdout
    launch([*command, "--out", tmp_path / "shards"], processes=1, DIE="0,3")
    said += ok(launch([*command, "--shard", "--out", tmp_path / "shards"], processes=2)).stdout
    assert len(re.findall("going on after step 3\n", said)) == 2, said
    whole = load_file(tmp_path / "whole/model.safetensors")
    for name in ("one", "shards"):
        other = load_file(tmp_path / name / "model.safetensors")
        for key in whole:
            torch.testing.assert_close(whole[key], other[key], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("processes, extra", [(1, []), (2, ["--shard"])])
def test_checkpoints_are_written_without_checksums(
    round_rows, other_folder, tmp_path, processes, extra
):
    """They take seven times as long as writing; as zip files, torch's are wrong without."""
    rows = round_rows / "labelled.jsonl"
    command = ["train.py", "--model", other_folder, "--pairs", rows, *FLAGS, *EVERY_STEP, *extra]
    launch([*command, "--out", tmp_path / "out"], processes=processes, DIE="0,2")
    saved = tmp_path / "out.checkpoint"
    saved = saved / "__0_0.distcp" if extra else saved
    assert zipfile.ZipFile(saved).testzip() is not None


def test_full_disk_is_one_line_and_keeps_what_there_is(round_rows, other_folder, tmp_path):
    """A limit on the size of files stands in for it: of the checkpoint, then of the weights."""
    command = [
        "train.py",
        "--model",
        other_folder,
        "--pairs",
        round_rows / "worst.jsonl",
        "--anchor",
        "init",
        *FLAGS,
        "--out",
        tmp_path / "out",
    ]
    ok(run(*command))
    before = (tmp_path / "out/model.safetensors").read_bytes()
    for extra in (EVERY_STEP, ["--save-every", "0"]):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            done = run(*command, *extra, "--alpha", "0.2")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (
            done.returncode == 2
            and len(done.stderr.splitlines()) == 1
            and "is the disk full?" in done.stderr
        ), done.stderr
        assert (tmp_path / "out/model.safetensors").read_bytes() == before


def test_checkpoints_of_other_settings_or_broken_ones(round_rows, other_folder, tmp_path):
    """Other settings start again; a file that is no checkpoint is named; NaN keeps the last
    checkpoint."""
    command = [
        "train.py",
        "--model",
        other_folder,
        "--pairs",
        round_rows / "worst.jsonl",
        "--anchor",
        "init",
        "--batch-size",
        "8",
        "--precision",
        "fp32",
        *EVERY_STEP,
        "--out",
        tmp_path / "out",
    ]
    done = run(*command, "--lr", "1e30")
    assert (
        done.returncode == 2
        and "is finite" not in done.stderr
        and "rows p" in done.stderr
        and not (tmp_path / "out").exists()
    )
    done = launch([*command, "--lr", "1e-3"], processes=1, DIE="0,3")
    assert (tmp_path / "out.checkpoint").exists()
    assert "of other settings (lr); starting again" in ok(run(*command, "--lr", "2e-3")).stdout
    (tmp_path / "out.checkpoint").write_bytes(b"no checkpoint")
    done = run(*command, "--lr", "3e-3")
    assert (
        done.returncode == 2 and "out.checkpoint: not a checkpoint" in done.stderr.splitlines()[-1]
    )


def test_whole_pair_loss_by_finite_differences(monkeypatch):
    """From the weights to the loss of flagged pairs under atoms, in float64: the gradient is the
    limit of differences."""
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaRMSNorm,
        "forward",  # its own computes in fp32 whatever comes
        lambda self, x: (
            self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        ),
    )
    model = make_model().double()
    net = ResponseLogps(model)
    batch = pack(
        [([5, 6, 7], [[8, 9, 2], [10, 11]]), ([12], [[13, 2], [14, 15, 16]])],
        True,
        torch.device("cpu"),
    )
    reference = net(batch)[0].detach().view(-1, 2) - tensor(0.3, -0.2)
    atoms = tensor(0.25, 0.75).expand(2, 2), tensor(0.0, 0.45).expand(2, 2)

    def loss():
        margin = tensor(0.4, 0.1) + dpo_margin(net(batch)[0].view(-1, 2), reference, 0.5)
        return leader_loss(margin, tensor(1, 0), *atoms, 0.1, 6).sum()

    loss().backward()
    assert loss().dtype == torch.float64
    for name, p in model.named_parameters():
        direction = torch.randn(
            p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        exact, h = (p.grad * direction).sum().item(), 1e-6
        with torch.no_grad():
            p.add_(h * direction)
            up = loss().item()
            p.sub_(2 * h * direction)
            down = loss().item()
            p.add_(h * direction)
        assert exact == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-7), name


def test_a_vanishing_radius_is_no_radius(round_rows, other_folder, tmp_path):
    """D6a: ε = 0 and ε = 10⁻⁹ differ in nothing else."""
    labelled = round_rows / "labelled.jsonl"
    weights = []
    for epsilon in ("0", "1e-9"):
        worst, out = tmp_path / f"{epsilon}.jsonl", tmp_path / f"policy{epsilon}"
        ok(run("dro.py", "--pairs", labelled, "--out", worst, "--epsilon", epsilon))
        pairs = ["--pairs", worst, "--anchor", "init", "--out", out]
        ok(run("train.py", "--model", other_folder, *pairs, *FLAGS))
        weights.append(load_file(out / "model.safetensors"))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)


def test_zero_epsilon_is_spa_and_without_smoothing_dpo(round_rows, other_folder, tmp_path):
    """Rows through dro.py at ε = 0 train like rows that never saw it; without smoothing the losses
    are DPO's on these pairs."""
    weights = {}
    for name, extra in {
        "still": ["--pairs", round_rows / "still.jsonl"],
        "labelled": ["--pairs", round_rows / "labelled.jsonl"],
        "plain": ["--pairs", round_rows / "still.jsonl", "--alpha", "0"],
    }.items():
        ok(run("train.py", "--model", other_folder, *extra, *FLAGS, "--out", tmp_path / name))
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    ok(
        run(
            "seed_dpo.py",
            "--model",
            other_folder,
            "--pairs",
            round_rows / "labelled.jsonl",
            *FLAGS,
            "--epochs",
            "1",
            "--out",
            tmp_path / "dpo",
        )
    )
    dpo = load_file(tmp_path / "dpo/model.safetensors")
    for name in dpo:
        assert torch.equal(weights["still"][name], weights["labelled"][name])
        torch.testing.assert_close(weights["plain"][name], dpo[name], rtol=1e-3, atol=2e-5)
    assert any(not torch.equal(weights["still"][n], weights["plain"][n]) for n in dpo)
    assert json.load(open(tmp_path / "still.stats.json"))["anchor"] == "previous"


def test_moved_atoms_say_their_k(capsys):
    still, moved = {"atoms": [[1.0, 0.0]]}, {"atoms": [[0.5, 0.0], [0.5, 0.6]]}
    assert pieces_of([{}, still], "rows") == 1  # ℓ* is never used
    assert pieces_of([still | {"pieces": 5}, moved | {"pieces": 5}], "rows") == 5
    for rows in ([still | {"pieces": 6}, moved], [moved], [{"pieces": 5}, {"pieces": 6}]):
        with pytest.raises(SystemExit):
            pieces_of(rows, "rows")
        assert "'pieces' (K) must be one number in all rows" in capsys.readouterr().err


def test_refusals(round_rows, folder, other_folder, tmp_path):
    def refused(*flags):
        done = run("train.py", "--out", tmp_path / "out", *flags)
        assert (
            done.returncode == 2
            and len(done.stderr.splitlines()) == 1
            and not (tmp_path / "out").exists()
        ), done.stderr
        return done.stderr

    assert "D6" in refused(
        "--model", other_folder, "--pairs", round_rows / "worst.jsonl", "--anchor", "previous"
    )
    assert "--alpha" in refused(
        "--model", other_folder, "--pairs", round_rows / "worst.jsonl", "--alpha", "2"
    )
    rows = jsonl(round_rows / "worst.jsonl")
    wrong = dump(
        tmp_path / "wrong.jsonl", [{**r, "chosen_logp": r["chosen_logp"] - 50} for r in rows]
    )
    done = ok(
        run(
            "train.py",
            "--model",
            other_folder,
            "--pairs",
            wrong,
            "--anchor",
            "init",
            "--out",
            tmp_path / "far",
        )
    )
    assert "not those of" in done.stderr


def test_rows_say_what_their_margin_is(round_rows, folder, other_folder, tmp_path):
    """D10: another policy's rows are refused whatever the anchor; another margin or β where the
    margin is added."""
    rows = jsonl(round_rows / "worst.jsonl")
    assert {json.dumps(row["margin_of"], sort_keys=True) for row in rows} == {
        json.dumps(
            {
                "beta": 0.1,
                "judge": "implicit",
                "length_penalty": 0.0,
                "policy": fingerprint(other_folder),
                "reference": "init",
            }
        )
    }

    def trained(path, *flags, model=other_folder):
        return run(
            "train.py", "--model", model, "--pairs", path, *FLAGS, "--out", tmp_path / "out", *flags
        )

    still = round_rows / "still.jsonl"
    for anchor in ("init", "previous"):
        done = trained(still, "--anchor", anchor, model=folder)
        assert (
            done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "policy" in done.stderr
        )
    done = trained(still, "--anchor", "init", "--beta", "0.01")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "beta" in done.stderr
    for key, value in (("reference", "none"), ("judge", "vader"), ("length_penalty", 0.1)):
        other = dump(
            tmp_path / "o.jsonl",
            [row | {"margin_of": row["margin_of"] | {key: value}} for row in jsonl(still)],
        )
        done = trained(other, "--anchor", "init")
        assert done.returncode == 2 and key in done.stderr
        ok(trained(other, "--anchor", "previous"))
    copy = tmp_path / "copy"
    shutil.copytree(other_folder, copy)  # elsewhere, and written at another time: the same policy
    ok(trained(still, "--anchor", "init", model=copy))
    silent = dump(
        tmp_path / "s.jsonl", [{k: v for k, v in row.items() if k != "margin_of"} for row in rows]
    )
    assert (
        f"{len(rows)} margins taken as against π_init"
        in ok(trained(silent, "--anchor", "init")).stdout
    )
