"""The whole loop on the embedded model, held to what the README promises. Minutes long."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def unlearn(workdir, *overrides):
    names = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    clean = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [
            sys.executable, "-m", "cipo_jax", "unlearn", "--config=configs/quickstart.py",
            f"--workdir={workdir}", *overrides,
        ],
        cwd=ROOT, env=clean | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((Path(workdir) / "summary.json").read_text()), done


def check(summary):
    before, after = summary["before"], summary["after"]
    assert before["forget"]["cot_leak"] >= 0.95
    assert before["forget"]["answer_leak"] >= 0.95
    assert after["forget"]["cot_leak"] <= 0.02
    assert after["forget"]["answer_leak"] <= 0.02
    assert after["forget"]["think_completion"] >= 0.98
    assert after["forget"]["word_validity"] >= 0.995
    assert after["retain"]["accuracy"] >= before["retain"]["accuracy"] - 0.03
    assert after["reasoning"]["accuracy"] >= before["reasoning"]["accuracy"] - 0.03
    # Fluency under the model before has not collapsed: within a quarter of a nat a token.
    assert summary["fluency"]["after"] >= summary["fluency"]["before"] - 0.25


@pytest.mark.slow
def test_the_default_forget_set(tmp_path):
    summary, done = unlearn(tmp_path / "run")
    check(summary)
    assert summary["retrained"]["forget"]["answer_leak"] <= 0.10
    assert summary["retrained"]["retain"]["accuracy"] >= 0.95
    assert "retrained" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 23])
def test_another_forget_set(tmp_path, seed):
    summary, done = unlearn(tmp_path / "run", f"--config.forget.seed={seed}")
    check(summary)
    assert summary["retrained"] is None
    assert "no retrained column" in done.stderr


SMALL = (
    "--config.data.valid_rows=16",
    "--config.data.eval_rows=32",
    "--config.model.retrained=",
    "--config.cipo.iterations=2",
)


def some_name():
    world = json.loads((ROOT / "cipo_jax/assets/tiny_lrm/world.json").read_text())
    return world["people"][3]["name"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("--config.counterfactual.strategy=alternative",),
        ("--config.counterfactual.strategy=boundary",),
        ("--config.cipo.loss=simpo", "--config.cipo.beta=2.0"),
        ("--config.cipo.loss=ipo", "--config.cipo.reference=initial"),
        ("--config.cipo.reference=ema", "--config.cipo.reject=all"),
    ],
    ids=["alternative", "boundary", "simpo", "ipo-initial", "ema-all"],
)
def test_every_strategy_loss_and_reference_forgets_one_person(tmp_path, overrides):
    person = (f"--config.forget.people={some_name()}",)
    summary, _ = unlearn(tmp_path / "run", *person, *SMALL, *overrides)
    assert summary["before"]["forget"]["cot_leak"] >= 0.9
    assert summary["after"]["forget"]["cot_leak"] <= 0.15
    assert summary["after"]["forget"]["think_completion"] >= 0.95
    rows = [json.loads(r) for r in (tmp_path / "run" / "counterfactuals.jsonl").open()]
    assert all(row["accepted"] for row in rows)
    if "boundary" in overrides[0]:
        assert {row["answer"] for row in rows} == {"unknown"}
