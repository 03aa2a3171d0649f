"""The whole loop on the embedded model, held to what the README promises. Minutes long."""

import pytest
import user_runs


def unlearn(workdir, *overrides):
    flags = ["--config=configs/quickstart.py", f"--workdir={workdir}", *overrides]
    done = user_runs.run(user_runs.environment(), "-m", "cipo_jax", "unlearn", *flags, timeout=1200)
    assert done.returncode == 0, done.stderr
    return user_runs.read(workdir / "summary.json"), done


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
    world = user_runs.read(user_runs.ROOT / "cipo_jax/assets/tiny_lrm/world.json")
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
    rows = user_runs.read_rows(tmp_path / "run" / "counterfactuals.jsonl")
    assert rows and all(row["accepted"] for row in rows)
    if "boundary" in overrides[0]:
        assert {row["accepted"]["answer"] for row in rows} == {"unknown"}
