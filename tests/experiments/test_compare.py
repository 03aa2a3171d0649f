"""A little comparison whole: stopped, started again, by one process and by two."""

import os
import shutil
import statistics

import pytest
import user_runs
from user_runs import read

from cipo_jax.runs.worker_pool import core_shares

# The default forget set: the retrained model that ships never saw it.
SMALL = (
    "--config.compare.methods=ga,npo,retrain",
    "--config.compare.seeds=2",
    "--config.compare.lrs=1e-4,8e-4",
    "--config.forget.count=10",
    "--config.train.epochs=0.04",
    "--config.train.batch_size=4",
    "--config.train.retain_batch_size=4",
    "--config.train.reasoning_batch_size=4",
    "--config.train.checkpoint_every=2",
    "--config.data.valid_rows=4",
    "--config.data.eval_rows=6",
    "--config.eval.max_new_tokens=64",
    "--config.compare.workers=1",
)
# Is asked to stop in the middle of the first trial of NPO.
STOPPED = """
import os, signal, sys
from cipo_jax.training.step import TrainStep
put, seen = TrainStep.put, [0]
def polite(self, batch):
    seen[0] += "ref_forget" in batch
    if seen[0] == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return put(self, batch)
TrainStep.put = polite
from cipo_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
# Is asked to stop when its processes have begun.
STOPPED_AS_ONE = """
import os, signal, sys, threading
if __name__ == "__main__":
    import time
    from pathlib import Path
    workdir = next(Path(a.partition("=")[2]) for a in sys.argv if a.startswith("--workdir="))
    def stop():
        while not list(workdir.glob("runs/*/*/stages.json")):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    from cipo_jax.__main__ import main
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "poison.py").write_text(POISON)
    environment = user_runs.environment(folder / "programs")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])

    def start(workdir, *extra, program=("-m", "cipo_jax"), poisoned=False):
        flags = [
            "--config=configs/tiny/compare.py:smoke", f"--workdir={workdir}", *SMALL, *extra
        ]  # fmt: skip
        found = environment | ({"PYTHONPATH": path} if poisoned else {})
        return user_runs.run(found, *program, "compare", *flags, timeout=800)

    return start


def test_workers_share_the_cores_that_there_are(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7, 2, 3, 5, 4}, raising=False)
    assert core_shares(1) == [[2, 3, 4, 5, 7]]
    assert core_shares(2) == [[2, 3], [4, 5, 7]]
    assert core_shares(9) == [[2], [3], [4], [5], [7]]
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert core_shares(4) == [[], []]


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A comparison that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("compare") / "run"
    done = start(workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done


def comparable(workdir):
    """comparison.json without what no two processes have alike."""
    result = read(workdir / "comparison.json")
    result.pop("seconds")
    for found in result["rows"]:
        for name in ("seconds", "peak_gib"):
            found["measures"].pop(name, None)
    return result


@pytest.mark.slow
def test_a_comparison_has_a_row_a_method_and_the_gold_standard(whole):
    workdir, done = whole
    result = read(workdir / "comparison.json")
    assert [r["name"] for r in result["rows"]] == ["ga", "npo", "retrain"]
    assert result["n"] == {"forget": 6, "retain": 6, "reasoning": 6}
    lrs = {name: [1e-4, 8e-4] for name in ("ga", "npo", "retrain")}
    assert (result["lrs"], result["seeds"]) == (lrs, 2)
    for found in result["rows"][:2]:
        assert [t["lr"] for t in found["tried"]] == [1e-4, 8e-4]
        assert found["lr"] in (1e-4, 8e-4)
        assert {"cot_leak", "zero_leak", "less_leak", "ks", "kl", "steps", "seconds", "peak_gib",
                "retain", "reasoning"} <= set(found["measures"])  # fmt: skip
        for measure in found["measures"].values():
            assert len(measure["values"]) == 2
            assert measure["mean"] == pytest.approx(statistics.mean(measure["values"]))
            assert measure["std"] == pytest.approx(statistics.stdev(measure["values"]))
        # Of each trial what its own folder says.
        for i, seed in enumerate((0, 1)):
            folder = workdir / "runs" / found["name"] / f"lr-{found['lr']:g}-seed-{seed}"
            scores = read(folder / "stages.json")["stages"]["scores"]["result"]
            assert found["measures"]["kl"]["values"][i] == scores["measures"]["kl"]
            assert read(folder / "config.json")["seed"] == seed
        assert found["measures"]["kl"]["mean"] > 0.0
    retrain = result["rows"][2]
    assert retrain["lr"] is None and "kl" not in retrain["measures"]
    assert retrain["measures"]["answer_leak"]["mean"] <= 0.2
    assert result["before"]["answer_leak"] >= 0.8
    table = (workdir / "comparison.md").read_text(encoding="utf-8")
    for name in ("before", "ga", "npo", "retrain"):
        assert f"| {name} |" in table and name in done.stdout


@pytest.mark.slow
def test_the_rate_that_validation_likes_best_is_taken(whole):
    workdir, _ = whole
    for found in read(workdir / "comparison.json")["rows"][:2]:
        for tried in found["tried"]:
            folder = workdir / "runs" / found["name"] / f"lr-{tried['lr']:g}-seed-0"
            record = read(folder / "iterations" / "01" / "metrics.json")
            assert {k: record[k] for k in ("leak", "clean", "utility")} == {
                k: tried[k] for k in ("leak", "clean", "utility")
            }

        def merit(tried):
            parts = (1.0 - tried["leak"], tried["utility"])
            return statistics.harmonic_mean(parts)

        # With a leak goal of 1 all are clean; of equals the first is taken.
        assert all(tried["clean"] for tried in found["tried"])
        assert found["lr"] == max(found["tried"], key=merit)["lr"]


@pytest.mark.slow
def test_a_trial_leaves_no_weights_behind(whole):
    workdir, _ = whole
    assert list(workdir.rglob("*.safetensors")) == []
    assert list(workdir.glob("runs/*/*/checkpoints")) == []


@pytest.mark.slow
def test_a_finished_comparison_started_again_does_nothing_new(whole, start):
    workdir, _ = whole
    kept = {p: p.read_bytes() for p in workdir.rglob("*") if p.suffix in (".json", ".jsonl", ".md")}
    again = start(workdir)
    assert again.returncode == 0, again.stderr
    assert [str(p) for p, text in kept.items() if p.read_bytes() != text] == []
    assert len(kept) == len(
        [p for p in workdir.rglob("*") if p.suffix in (".json", ".jsonl", ".md")]
    )


@pytest.mark.slow
def test_a_trial_that_is_undone_comes_to_the_same(whole, start, tmp_path):
    """As if the process had been killed before the trial; its materials are still there."""
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    lr = read(workdir / "comparison.json")["rows"][1]["lr"]
    (workdir / "comparison.json").unlink()
    (workdir / "runs" / "npo" / f"lr-{lr:g}-seed-1" / "stages.json").unlink()
    again = start(workdir)
    assert again.returncode == 0, again.stderr
    assert comparable(workdir) == comparable(whole[0])


@pytest.mark.slow
def test_a_comparison_that_is_stopped_goes_on_to_the_same(whole, start, tmp_path):
    workdir = tmp_path / "run"
    stopped = start(workdir, program=("-c", STOPPED))
    assert stopped.returncode == 75, stopped.stderr
    assert "run the same command again" in stopped.stderr
    assert not (workdir / "comparison.json").exists()
    # In the middle of a trial: what came before is whole.
    assert len(list(workdir.glob("runs/ga/*/stages.json"))) == 3
    assert len(list(workdir.glob("runs/npo/*"))) == 1
    done = start(workdir)
    assert done.returncode == 0, done.stderr
    assert comparable(workdir) == comparable(whole[0])
    files = ("metrics.jsonl", "evals/scores-think.jsonl", "pairs.jsonl")
    paths = [p for f in files for p in whole[0].glob(f"runs/*/*/{f}")]
    # Only the chosen rate of seed 0 is scored: 4 trials of 6.
    assert len(paths) == 6 + 4 + 6
    for path in paths:
        other = workdir / path.relative_to(whole[0])
        assert other.read_text() == path.read_text(), path


@pytest.mark.slow
def test_processes_side_by_side_come_to_the_same(whole, start, tmp_path):
    workdir = tmp_path / "run"
    done = start(workdir, "--config.compare.workers=2")
    assert done.returncode == 0, done.stderr
    assert comparable(workdir) == comparable(whole[0])
    # Nothing was done twice: each trial is reported once, by whoever did it.
    reported = [line.split("  round")[0] for line in done.stderr.splitlines() if "  round" in line]
    assert len(reported) == len(set(reported)) == len(list(workdir.glob("runs/*/*/stages.json")))


@pytest.mark.slow
def test_processes_side_by_side_stop_together_and_go_on(whole, start, tmp_path):
    workdir = tmp_path / "run"
    stopped = start(workdir, "--config.compare.workers=2", program=("-c", STOPPED_AS_ONE))
    assert stopped.returncode == 75, stopped.stderr
    assert stopped.stderr.count("run the same command again") >= 2
    assert not (workdir / "comparison.json").exists()
    done = start(workdir, "--config.compare.workers=2")
    assert done.returncode == 0, done.stderr
    assert comparable(workdir) == comparable(whole[0])


@pytest.mark.slow
def test_a_worker_that_cannot_go_on_is_told_of(whole, start, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    (workdir / "comparison.json").unlink()
    record = next(workdir.glob("runs/npo/*/config.json"))
    record.write_text("{", encoding="utf-8")
    failed = start(workdir, "--config.compare.workers=2")
    assert failed.returncode == 2, failed.stderr
    assert f"{record}: not JSON" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_other_rows_may_be_asked_for_in_the_same_folder_but_no_other_settings(
    whole, start, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    kept = {p: p.read_bytes() for p in workdir.glob("runs/**/stages.json")}
    other = start(workdir, "--config.compare.methods=npo", "--config.compare.seeds=1")
    assert other.returncode == 0, other.stderr
    (found,) = comparable(workdir)["rows"]
    before = comparable(whole[0])["rows"][1]
    assert {k: found[k] for k in ("name", "lr", "tried")} == {
        k: before[k] for k in ("name", "lr", "tried")
    }
    for name, measure in found["measures"].items():
        assert measure["values"] == before["measures"][name]["values"][:1]
    assert [p for p, text in kept.items() if p.read_bytes() != text] == []
    refused = start(workdir, "--config.selection.leak_goal=0.5")
    assert refused.returncode == 2
    assert "selection.leak_goal: 1.0 there, 0.5 now" in refused.stderr


# ---- what is compiled


@pytest.mark.slow
def test_trials_of_a_method_share_their_programs(whole):
    """Another learning rate or seed is data of the programs of the first trial."""
    workdir, _ = whole
    for name in ("ga", "npo"):
        compiled = {
            folder.name: read(folder / "iterations" / "01" / "metrics.json")["compilations"]
            for folder in workdir.glob(f"runs/{name}/*")
        }
        assert len(compiled) == 3
        assert compiled.pop("lr-0.0001-seed-0") > 0  # The first.
        assert set(compiled.values()) == {0}, compiled


# ---- a loss that stops being a number


# As a plugin it is also imported by the processes of workers.
POISON = """
import numpy as np
from cipo_jax.methods import fixed_target
from cipo_jax.runs.training import Batches

make_batches = fixed_target._batches


def poisoned(run, rows, retained, number):
    batches = make_batches(run, rows, retained, number)
    row, seed = run.folder.parent.name, run.config.seed
    late = row == "late" and seed == 1 and number == 2
    if not (late or (row == "lost" and number == 1)):
        return batches

    def at(step):
        batch = batches.at(step)
        return batch | {"ref_forget": batch["ref_forget"] * np.float32("nan")} if step else batch

    return Batches(at, batches.num_steps)


fixed_target._batches = poisoned
"""
DIVERGING = (
    "--config.compare.variants=(('late', {'method': 'npo'}), ('lost', {'method': 'npo'}),"
    " ('sound', {'method': 'npo'}))",
    "--config.compare.lrs=(8e-4,)",
    "--config.fixed_target.rounds=2",
    "--config.model.retrained=",
    "--config.plugins=poison",
)


@pytest.fixture(scope="module")
def diverged(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("diverged") / "run"
    done = start(workdir, *DIVERGING, poisoned=True)
    assert done.returncode == 0, done.stderr
    return workdir, done


def contents(workdir):
    files = (p for p in workdir.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(workdir)): p.read_bytes() for p in files}


@pytest.mark.slow
def test_a_trial_that_diverges_is_noted_and_the_others_go_on(diverged):
    workdir, done = diverged
    late, lost, sound = read(workdir / "comparison.json")["rows"]
    assert [r["diverged"] for r in (late, lost, sound)] == [1, 2, 0]
    # A seed that diverges after a validated round has the scores of that round.
    assert all(len(m["values"]) == 2 for m in late["measures"].values())
    assert late["measures"]["steps"]["values"][1] < sound["measures"]["steps"]["values"][1]
    assert lost["measures"] == {}
    folder = workdir / "runs" / "late" / "lr-0.0008-seed-1"
    stages = read(folder / "stages.json")["stages"]
    assert "loss is nan at step 2" in stages["diverged"]["result"]["message"]
    assert stages["scores"]["result"]["iteration"] == 1
    assert "iterations/02/validate" not in stages
    # Before the poisoned batch both rows are the same.
    first = [r["measures"]["cot_leak"]["values"][0] for r in (late, sound)]
    assert first[0] == first[1]
    table = (workdir / "comparison.md").read_text(encoding="utf-8")
    assert "| late (diverged: 1 of 2 seeds) |" in table
    assert "| lost (diverged: 2 of 2 seeds; 0 measured) | –" in table
    assert "| sound |" in table
    assert done.stderr.count("loss is nan at step 2") == 3
    assert "lost                     diverged with every seed" in done.stderr


@pytest.mark.slow
def test_a_comparison_that_diverged_started_again_adds_nothing(diverged, start):
    workdir, _ = diverged
    kept = contents(workdir)
    again = start(workdir, *DIVERGING, poisoned=True)
    assert again.returncode == 0, again.stderr
    assert "loss is nan" not in again.stderr
    found = contents(workdir)
    assert found.keys() == kept.keys()
    same = {"comparison.png"}  # Of the same numbers; its metadata may differ.
    assert [name for name in kept.keys() - same if found[name] != kept[name]] == []


@pytest.mark.slow
def test_processes_side_by_side_diverge_alike(diverged, start, tmp_path):
    workdir = tmp_path / "run"
    done = start(workdir, *DIVERGING, "--config.compare.workers=2", poisoned=True)
    assert done.returncode == 0, done.stderr
    assert comparable(workdir) == comparable(diverged[0])
    assert done.stderr.count("loss is nan at step 2") == 3
