"""A run that is killed anywhere and started again ends as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = {}
SMALL = (
    "--config.forget.count=1",
    "--config.data.valid_rows=4",
    "--config.data.eval_rows=8",
    "--config.sampling.rows=16",
    "--config.eval.rows=16",
    "--config.counterfactual.candidates=2",
    "--config.counterfactual.rounds=2",
    "--config.cipo.iterations=2",
    "--config.cipo.patience=2",
    "--config.model.retrained=",
    "--config.warmup.batch=8",
    "--config.warmup.retain_batch=4",
    "--config.warmup.reasoning_batch=4",
    "--config.train.batch=8",
    "--config.train.retain_batch=4",
    "--config.train.reasoning_batch=4",
    "--config.train.checkpoint_every=2",
    "--config.warmup.checkpoint_every=2",
)


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """What the runs are started with: real devices, and programs compiled once for all of them."""
    names = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    ENVIRONMENT.update({k: v for k, v in os.environ.items() if k not in names})
    ENVIRONMENT.update(
        JAX_PLATFORMS="cpu",
        JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp("compiled")),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )


def start(workdir, *extra, place="never", count=0, config=SMALL):
    program = [str(HERE / "killed_run.py"), place, str(count)]
    if place == "never":
        program = ["-m", "cipo_jax"]
    command = [
        sys.executable,
        *program,
        "unlearn",
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        *config,
        *extra,
    ]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )


def exported(workdir):
    from safetensors.numpy import load_file

    return load_file(Path(workdir) / "export" / "model.safetensors")


def comparable(summary):
    unlike = ("seconds", "seconds_share", "peak_memory_bytes")
    return {k: v for k, v in summary.items() if k not in unlike}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = start(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def test_kills_everywhere_change_nothing(whole, tmp_path):
    workdir = tmp_path / "run"
    for place, count in (
        ("counterfactuals", 3),
        ("checkpoint write", 2),
        ("rollouts", 2),
        ("update", 4),
        ("checkpoint write", 1),
        ("after checkpoint", 1),
    ):
        killed = start(workdir, place=place, count=count)
        assert killed.returncode == -9, (place, killed.stderr)
        assert not (workdir / "summary.json").exists()
    stopped = start(workdir, place="terminate", count=2)
    assert stopped.returncode == 75, stopped.stderr
    assert "run the same command again" in stopped.stderr
    done = start(workdir)
    assert done.returncode == 0, done.stderr

    expected, got = exported(whole), exported(workdir)
    assert expected.keys() == got.keys()
    for name in expected:
        np.testing.assert_array_equal(expected[name], got[name], err_msg=name)
    for file in ("summary.json", "metrics.jsonl", "counterfactuals.jsonl", "evals/after.jsonl"):
        one, two = (whole / file).read_text(), (workdir / file).read_text()
        if file == "summary.json":
            one, two = comparable(json.loads(one)), comparable(json.loads(two))
        assert one == two, file
    for iteration in ("01", "02"):
        for file in ("rollouts.jsonl", "pairs.jsonl"):
            path = Path("iterations") / iteration / file
            assert (whole / path).read_text() == (workdir / path).read_text(), path
    assert not list(workdir.rglob("*tmp*")), "leftovers of killed writes"


def test_a_finished_run_started_again_only_prints(whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    again = start(whole)
    assert again.returncode == 0, again.stderr
    assert "before" in again.stdout and "after" in again.stdout
    changed = [p for p, t in before.items() if p.stat().st_mtime_ns != t]
    assert not changed


def test_a_changed_config_is_refused_with_the_keys_that_differ(whole):
    refused = start(whole, "--config.cipo.beta=0.2")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "cipo.beta: 0.1 there, 0.2 now" in refused.stderr


def test_the_run_folder_holds_what_it_should(whole):
    summary = json.loads((whole / "summary.json").read_text())
    for name in ("before", "after"):
        scores = summary[name]
        assert set(scores["forget"]) >= {
            "cot_leak", "answer_leak", "think_completion", "word_validity", "n",
        }  # fmt: skip
        for split in ("retain", "reasoning"):
            assert set(scores[split]) == {"accuracy", "n"}
        shares = [v for s in scores.values() for k, v in s.items() if k != "n"]
        assert all(0.0 <= share <= 1.0 for share in shares)
        rows = [json.loads(line) for line in (whole / "evals" / f"{name}.jsonl").open()]
        assert len(rows) == sum(s["n"] for s in scores.values())
        assert {"question", "cot", "answer", "cot_leaks", "answer_leaks"} <= set(rows[0])
    assert summary["retrained"] is None
    seconds = summary["seconds"]
    assert seconds["total"] == pytest.approx(
        sum(v for k, v in seconds.items() if k != "total"), abs=0.01
    )
    assert summary["peak_memory_bytes"] > 10**8
    assert {"jax", "flax", "python", "cipo_jax"} <= set(summary["versions"])
    for path in (
        "config.json", "counterfactuals.jsonl", "metrics.jsonl", "iterations/01/rollouts.jsonl",
        "iterations/01/pairs.jsonl", "iterations/01/metrics.json", "export/config.json",
        "export/model.safetensors", "export/tokenizer.json", "checkpoints/warmup",
    ):  # fmt: skip
        assert (whole / path).exists(), path
    assert list((whole / "tensorboard").glob("events.*"))
    counterfactual = json.loads((whole / "counterfactuals.jsonl").open().readline())
    assert {"question", "true_answer", "target_answer", "trace", "strategy", "checks_passed",
            "rejected"} <= set(counterfactual)  # fmt: skip


def test_nothing_recompiles_after_the_first_iteration(whole):
    counts = [
        json.loads((whole / "iterations" / i / "metrics.json").read_text())["compilations"]
        for i in ("01", "02")
    ]
    assert counts[0] > 0
    assert counts[1] == 0


def test_metrics_have_every_step_once(whole):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    first = next(row for row in rows if row["phase"] == "iteration-01")
    # The policy is the reference at the first step of an iteration.
    assert first["preference"] == pytest.approx(np.log(2), abs=1e-4)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path):
    workdir = tmp_path / "run"
    stopped = start(workdir, place="nan", count=4)
    assert stopped.returncode == 3, stopped.stderr
    assert "iteration-01" in stopped.stderr and "step 4" in stopped.stderr
    assert (workdir / "checkpoints" / "iteration-01.steps" / "00000002").is_dir()
    assert not (workdir / "summary.json").exists()
    done = start(workdir)
    assert done.returncode == 0, done.stderr
