"""Every piece of the leader's loss against numbers worked by hand and float64 re-derivations, and
the stage as a whole."""
import math
import random
import re
import resource
import shlex
import shutil
import time
import zipfile
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import dump, jsonl, launch, ok, one_line, run, stats_of, weights_of
from families import tiny_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.policy import Reference, pack, response_hidden, token_logps
from core.training import record_step
from train import atoms_of, leader_loss, loss_star, threshold

CPU = torch.device("cpu")
MARGINS = st.floats(-30, 30)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("pieces", [1, 6])
def test_loss_star_is_convex_and_pushes_everywhere(pieces):
    x = torch.linspace(-3, 1, 4001, dtype=torch.float64, requires_grad=True)
    loss_star(x, pieces).sum().backward()
    assert (x.grad >= -pieces - 1e-9).all() and (x.grad < 0).all()
    assert (x.grad.diff() > -1e-9).all() and x.grad.diff().abs().max() < 0.05 * pieces**2


def test_worst_case_loss_by_hand():
    """ξ = ¾, K = 4, two atoms: ¼ of the mass at ¾, ¾ of it at ¼ − that is 1/K, where ℓ* = −ln ¼ −
    or at −¼, where ℓ* is the tangent, 1 + ln 4 − 4 · (−¼)."""
    def loss(flag: float, shift: float, alpha: float) -> float:
        atoms = tensor(0.25, 0.75)[None], tensor(0, shift)[None]
        return leader_loss(tensor(math.log(3)), tensor(flag), *atoms, alpha, 4).item()

    below = 0.25 * math.log(4 / 3) + 0.75 * (2 + math.log(4))
    assert loss(0, 0.5, 0.1) == pytest.approx(0.25 * math.log(4 / 3) + 0.75 * math.log(4))
    assert loss(0, 1.0, 0.1) == pytest.approx(below)
    assert loss(1, 1.0, 0.2) == pytest.approx(0.8 * below + 0.2 * math.log(4))


@given(MARGINS, st.sampled_from([0.0, 1.0]), st.floats(0, 1))
def test_no_atoms_is_spa_and_no_smoothing_is_dpo(m, z, alpha):
    margin, flag = tensor(m), tensor(z)
    in_place = torch.ones(1, 1), torch.zeros(1, 1)
    spa = -((1 - alpha * z) * F.logsigmoid(margin) + alpha * z * F.logsigmoid(-margin))
    dpo = -torch.log(torch.sigmoid(margin))
    for smoothing, expected in ((alpha, spa), (0.0, dpo)):
        loss = leader_loss(margin, flag, *in_place, smoothing, 6)
        torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(
    MARGINS,
    st.sampled_from([0.0, 1.0]),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.sampled_from([1, 5, 6, 7]),
)
def test_gradient_by_finite_differences(m, z, shift, w, pieces):
    assume(abs(torch.sigmoid(tensor(m)).item() - shift - 1 / pieces) > 1e-4)  # slope's own kink

    def loss(margin):
        atoms = tensor(1 - w, w)[None], tensor(0, shift)[None]
        return leader_loss(margin, tensor(z), *atoms, 0.1, pieces).sum()

    margin, h = tensor(m).requires_grad_(), 1e-5
    loss(margin).backward()
    difference = (loss(margin + h) - loss(margin - h)).item() / (2 * h)
    assert margin.grad.item() == pytest.approx(difference, abs=1e-6, rel=1e-4)


@pytest.mark.parametrize("lam", [0.0, 0.125, 0.5])
def test_extrapolated_logps_against_the_formula(lam):
    """S12 for words of the vocabulary, against float64 from whole logits; λ = 0 is the policy
    itself (S9)."""
    model, ref = (tiny_model("llama", seed).double() for seed in (0, 1))
    batch = pack([([5, 6, 7], [[8, 9, 2], [10, 11]])], True, CPU)
    h, r = response_hidden(model, batch), response_hidden(ref, batch).detach()
    by_hand = ((1 + lam) * model.lm_head(h) - lam * ref.lm_head(r)).softmax(-1).detach()
    reference = Reference(ref.lm_head, r)
    for word in range(0, 384, 7):
        target = torch.full_like(batch["target"], word)
        plain, tilde = token_logps(model.lm_head, h, target, reference, lam, chunk=2)
        torch.testing.assert_close(tilde.exp().double(), by_hand[:, word], rtol=1e-5, atol=1e-7)
        assert not tilde.requires_grad and (lam > 0 or torch.allclose(tilde, plain))


def test_threshold_looks_back_on_fifty():
    assert threshold([], 10) == threshold([{"p_tilde": []}], 10) == -math.inf
    log = [{"p_tilde": [0.0] * 50}] + [{"p_tilde": [i / 49]} for i in range(50)]
    assert threshold(log, 10) == pytest.approx(0.1)


def test_accuracy_is_what_the_round_has_made_of_the_labels(tmp_path):
    """Pairs that π_θ prefers otherwise than π_ref count, whatever the margin against π_init, and
    those that it does not by half."""
    stage = SimpleNamespace(device=CPU, encoded=[([5, 6], [[7, 2], [8, 2]])] * 4, shared=True,
                            work=str(tmp_path), total=1, args=SimpleNamespace(save_every=0))
    pairs = {"loss": [0.1] * 4, "margin": [3.0] * 4, "round_margin": [0.0, 0.2, 0.1, -0.1]}
    log = []
    record_step(stage, log, [0, 1, 2, 3], pairs, 0.1, 1.0, 8.0)
    assert log[0]["accuracy"] == 0.625 and log[0]["margin"] == 3.0


def test_atoms_are_padded():
    weight, shift = atoms_of([{"atoms": [[0.5, 0.0], [0.5, 0.25]]}, {}])
    assert weight.tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert shift.tolist() == [[0.0, 0.25], [0.0, 0.0]]


# ---------------------------------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def rows_of_a_round(tmp_path_factory, folder, other_folder):
    """Rows as generate, label and dro write them, for a policy that has moved a little from
    π_init."""
    path = tmp_path_factory.mktemp("round")
    prompts = [{"id": f"p{i}", "prompt": [{"role": "user", "content": f"Write {i} lines."}]}
               for i in range(44)]
    dump(path / "prompts.jsonl", prompts)
    policy = ["--model", other_folder, "--precision", "fp32"]
    ok(run("generate.py", *policy, "--prompts", path / "prompts.jsonl", "-n", "3",
           "--max-new-tokens", "10", "--out", path / "responses.jsonl"))
    ok(run("label.py", *policy, "--reference-model", folder,
           "--responses", path / "responses.jsonl", "--out", path / "labelled.jsonl"))
    for name, epsilon in (("worst", "0.05"), ("still", "0"), ("tiny", "1e-9")):
        ok(run("dro.py", "--pairs", path / "labelled.jsonl", "--epsilon", epsilon,
               "--out", path / f"{name}.jsonl"))
    unstated = jsonl(path / "worst.jsonl")
    for row in unstated:
        row.pop("margin_of")
    dump(path / "unstated.jsonl", unstated)
    return path


EVERY_STEP = " --save-every 1e-9"  # minutes
WORST = "worst --anchor init --batch-size 8"


@pytest.fixture
def command(rows_of_a_round, other_folder, tmp_path):
    """command(name, 'rows flags …'): the stage on rows of the round, or on a file of its own, to
    tmp_path/name."""
    def of(name: str, flags: str, model: str = other_folder) -> list:
        rows, *flags = shlex.split(flags)
        pairs = rows if "/" in rows else rows_of_a_round / f"{rows}.jsonl"
        return ["train.py", "--model", model, "--pairs", pairs, "--lr", "1e-3", "--precision",
                "fp32", *flags, "--out", tmp_path / name]
    return of


def assert_close(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-5)


def same_bits(one, other) -> bool:
    one, other = weights_of(one), weights_of(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_any_number_of_processes_gives_the_same_policy(command, tmp_path):
    """D3 and D7: 1 × 8, 2 × 4, 2 × 1 with accumulation, and sharded weights agree in weights,
    thresholds and flags."""
    flags = f"{WORST} --percentile 30 --micro-tokens"
    ok(run(*command("one", f"{flags} 2000")))
    ok(launch(command("two", f"{flags} 2000"), command("accumulated", f"{flags} 1"),
              command("sharded", f"{flags} 90 --shard")))
    log = jsonl(tmp_path / "one/log.jsonl")
    for other in ("two", "accumulated", "sharded"):
        assert [f.name for f in (tmp_path / other).glob("*.safetensors")] == ["model.safetensors"]
        assert_close(tmp_path / "one", tmp_path / other)
        theirs = jsonl(tmp_path / other / "log.jsonl")
        assert [r["flagged"] for r in theirs] == [r["flagged"] for r in log]
        taus = [[r["tau"] or 0 for r in rows] for rows in (theirs, log)]
        assert taus[0] == pytest.approx(taus[1], abs=1e-5)
    assert sum(len(r["flagged"]) for r in log) > 0
    quiet = math.ceil(0.2 * len(log))
    assert all(not r["flagged"] and r["tau"] is None for r in log[:quiet])
    assert log[quiet]["tau"] is not None
    assert stats_of(tmp_path / "one")["anchor"] == "init"


def test_killed_at_any_moment_ends_with_the_same_bits(command, rows_of_a_round, tmp_path):
    """Killed before the first checkpoint, half-way into writing one, and between two; each time the
    same command again."""
    flags = f"{WORST} --percentile 30 --batch-size 4 {EVERY_STEP}"
    out, steps = tmp_path / "killed", math.ceil(len(jsonl(rows_of_a_round / "worst.jsonl")) / 4)
    ok(run(*command("whole", flags)))
    dice = random.Random()  # a new moment every time: any must do
    step = dice.randrange(4, steps)
    for death, start in (("0,0", 0), ("save,2", 0), (f"0,{step}", 1)):
        done = launch(command("killed", flags), processes=1, DIE=death)
        assert done.returncode == -9 and not out.exists(), done.stderr
        assert (f"going on after step {start}\n" in done.stdout) == (start > 0)
    again = command("killed", f"{flags} --micro-tokens 4096")  # changes no mathematics
    assert f"going on after step {step}\n" in ok(run(*again)).stdout
    assert same_bits(tmp_path / "whole", tmp_path / "killed")
    keys = ("step", "loss", "tau", "flagged", "p_tilde")
    logs = [[[row[key] for key in keys] for row in jsonl(tmp_path / name / "log.jsonl")]
            for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert "complete, skipped" in ok(run(*again)).stdout
    # a finished run leaves no checkpoint
    assert {p.name for p in tmp_path.glob("killed*")} == {"killed", "killed.stats.json"}


def test_a_dying_rank_takes_the_others_down_and_all_go_on(command, tmp_path):
    flags = "unstated --anchor init --batch-size 8 --shard --gradient-checkpointing"
    flags += f" --precision bf16 {EVERY_STEP}"
    start = time.monotonic()
    done = launch(command("killed", flags), DIE="1,3")
    assert done.returncode != 0 and time.monotonic() - start < 300
    assert "rank 1 dies" in done.stderr and "SIGKILL" in done.stderr
    done = ok(launch(command("killed", flags), command("whole", flags)))
    # rank 0 may have come to the next checkpoint before it was taken down
    assert re.search(r"going on after step [34]\n", done.stdout)
    assert same_bits(tmp_path / "whole", tmp_path / "killed")


def test_a_checkpoint_outlives_a_change_of_memory(command, tmp_path):
    """Killed, and gone on with sharded weights or without: to the same weights but for rounding."""
    flags = WORST + EVERY_STEP
    ok(run(*command("whole", flags)))
    launch(command("one", f"{flags} --shard"), processes=2, DIE="0,3")
    launch(command("shards", flags), processes=1, DIE="0,3")
    saved = zipfile.ZipFile(*tmp_path.glob("shards.unfinished/*/checkpoint"))
    assert saved.testzip() is not None  # no checksums: they take seven times as long as writing
    printed = ok(run(*command("one", flags))).stdout
    printed += ok(launch(command("shards", f"{flags} --shard"), processes=2)).stdout
    assert len(re.findall("going on after step 3\n", printed)) == 2, printed
    for name in ("one", "shards"):
        assert_close(tmp_path / "whole", tmp_path / name)


def test_full_disk_is_one_line_and_keeps_what_there_is(command, tmp_path):
    """A limit on the size of files stands in for it: of the checkpoint, then of the weights."""
    ok(run(*command("out", WORST)))
    before = (tmp_path / "out/model.safetensors").read_bytes()
    for extra in (EVERY_STEP, "--save-every 0"):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            done = run(*command("out", f"{WORST} --alpha 0.2 {extra}"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        one_line(done, "is the disk full?")
        assert (tmp_path / "out/model.safetensors").read_bytes() == before


def test_checkpoints_of_other_settings_or_broken_ones(command, tmp_path):
    """NaN keeps the last checkpoint; a file that is none is named, and no code in it runs; other
    settings start again and keep what there is, and it is gone on from."""
    class Planted:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    flags = WORST + EVERY_STEP
    broken = command("out", f"{flags} --lr 1e30")
    done = run(*broken)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "No weights are saved" in done.stderr and "rows p" in done.stderr
    (other,) = tmp_path.glob("out.unfinished/*")
    torch.save({"log": Planted()}, other / "checkpoint")
    done = run(*broken)
    assert not (tmp_path / "ran").exists()
    assert done.returncode == 2 and f"{other}/checkpoint: not a checkpoint" in done.stderr
    launch(command("out", flags), processes=1, DIE="0,3")
    (saved,) = set(tmp_path.glob("out.unfinished/*/checkpoint")) - {other / "checkpoint"}
    first = saved.read_bytes()
    done = ok(run(*command("out", f"{flags} --lr 2e-3")))
    assert "going on" not in done.stdout and saved.read_bytes() == first
    assert "going on after step 3\n" in ok(run(*command("out", flags))).stdout
    assert list(tmp_path.glob("out.unfinished/*")) == [other]


def test_zero_epsilon_is_spa_and_without_smoothing_dpo(command, tmp_path):
    """Rows through dro.py at ε = 0 train like rows that never saw it, and like those at ε = 10⁻⁹
    (D6a); without smoothing the losses are DPO's on these pairs."""
    for rows in ("still", "labelled"):
        ok(run(*command(rows, f"{rows} --batch-size 8")))
    assert same_bits(tmp_path / "still", tmp_path / "labelled")
    for rows in ("still", "tiny"):
        ok(run(*command(f"{rows} init", f"{rows} --anchor init --batch-size 8")))
    assert_close(tmp_path / "still init", tmp_path / "tiny init")
    ok(run(*command("plain", "still --batch-size 8 --alpha 0")))
    _, *same = command("dpo", "labelled --batch-size 8 --epochs 1")
    ok(run("seed_dpo.py", *same))
    assert_close(tmp_path / "plain", tmp_path / "dpo")
    assert not same_bits(tmp_path / "still", tmp_path / "plain")


def test_refusals(command, rows_of_a_round, folder, other_folder, tmp_path):
    """D10: another policy's rows are refused whatever the anchor, and rows of another precision;
    another margin or β where the margin is added. A copy of the policy is the policy."""
    def changed(name: str, **values) -> str:
        rows = jsonl(rows_of_a_round / "still.jsonl")
        rows = [row | {"margin_of": row["margin_of"] | values} for row in rows]
        return dump(tmp_path / f"{name}.jsonl", rows)

    rows = jsonl(rows_of_a_round / "unstated.jsonl")
    mixed = dump(tmp_path / "mixed.jsonl", [rows[0] | {"pieces": 7}, *rows[1:]])
    vader, half = changed("vader", judge="vader"), changed("half", precision="bf16")
    for flags, model, *words in [
            ("worst --anchor previous", other_folder, "D6"),
            ("worst --alpha 2", other_folder, "--alpha"),
            (f"{mixed} --anchor init", other_folder, "'pieces' (K) must be one number"),
            ("still --anchor previous", folder, "policy"),
            (f"{vader} --anchor init", other_folder, "judge"),
            (f"{half} --anchor previous", other_folder, "precision 'bf16'", "--precision")]:
        one_line(run(*command("out", flags, model=model)), *words)
        assert not (tmp_path / "out").exists()
    ok(run(*command("previous", f"{vader} --anchor previous")))
    copy = shutil.copytree(other_folder, tmp_path / "copy")
    ok(run(*command("copied", "still --anchor init", model=copy)))
    done = ok(run(*command("unstated", "unstated --anchor init")))
    assert f"{len(rows)} margins taken as against π_init" in done.stdout
