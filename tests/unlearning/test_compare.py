"""Methods side by side: the rows that are asked for, and a little comparison whole."""

import dataclasses
import os
import re
import shutil
import statistics

import pytest
import user_runs
from user_runs import read

from cipo_jax.config import CompareConfig, Config, TrainConfig
from cipo_jax.errors import UserError
from cipo_jax.reports.comparison import markdown, merit, print_comparison
from cipo_jax.unlearning.compare import Comparison, Entry, entries_of, rates_of
from cipo_jax.unlearning.methods import METHODS
from cipo_jax.unlearning.workers import cores_of

# ---- rows


def entries(methods="all", variants="", **changes):
    return entries_of(Config(compare=CompareConfig(methods=methods, variants=variants), **changes))


def test_all_is_every_method_there_is():
    found = entries()
    assert [entry.name for entry in found] == [entry.method for entry in found] == list(METHODS)
    assert all(entry.changes == {} for entry in found)


def test_methods_are_those_named_in_their_order():
    assert [entry.name for entry in entries(" npo, ga ,cipo,")] == ["npo", "ga", "cipo"]


def test_variants_take_the_place_of_methods():
    found = entries(
        "npo",
        "\nplain: \n no NLL: cipo.nll_weight=0 , warmup.lr=3\nNPO: method=npo,"
        "baseline.span=cot\n\n",
    )
    assert found == [
        Entry("plain", "cipo"),
        Entry("no NLL", "cipo", {"cipo.nll_weight": "0", "warmup.lr": "3"}),
        Entry("NPO", "npo", {"baseline.span": "cot"}),
    ]
    assert [entry.folder for entry in found] == ["plain", "no_NLL", "NPO"]


def test_a_row_has_the_config_of_the_comparison_but_for_its_changes():
    config = Config(seed=5, train=TrainConfig(lr=0.25))
    changes = {
        "cipo.nll_weight": "0", "cipo.iterations": "3", "sampling.int8_cache": "true",
        "cipo.loss": "ipo", "seed": "9",
    }  # fmt: skip
    found = Entry("x", "cipo", changes).config(config)
    cipo = dataclasses.replace(config.cipo, nll_weight=0.0, iterations=3, loss="ipo")
    sampling = dataclasses.replace(config.sampling, int8_cache=True)
    assert found == dataclasses.replace(config, cipo=cipo, sampling=sampling, seed=9)
    assert Entry("npo", "npo").config(config) == dataclasses.replace(config, method="npo")
    # The overrides of a method come in, and do not beat the row's own changes.
    simpo = Entry("s", "cipo_simpo", {"cipo.beta": "1.5"}).config(config)
    assert (simpo.method, simpo.cipo.loss, simpo.cipo.beta) == ("cipo_simpo", "simpo", 1.5)


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ("x: cipo.nll=0", "'cipo.nll' is no setting of the config"),
        ("x: nll_weight=0", "'nll_weight' is no setting of the config"),
        ("x: cipo=0", "'cipo' is no setting of the config"),
        ("x: cipo.nll_weight=none", "cipo.nll_weight=none: must be like"),
        ("x: cipo.nll_weight=", "cipo.nll_weight=: must be like"),
        ("x: cipo.nll_weight=-1", "config.cipo.nll_weight = -1.0: must be at least 0"),
        ("x: cipo.iterations=1.5", "config.cipo.iterations = 1.5: must be of type int"),
        ("x: cipo.loss=best", "config.cipo.loss = 'best': must be one of dpo, ipo, simpo"),
        ("x: method=nop", "config.method = 'nop': no such method; nearest: npo"),
        ("x cipo.nll_weight=0", "'x cipo.nll_weight=0' is not of the form 'name: key=value"),
        ("x: cipo.nll_weight", "'x: cipo.nll_weight' is not of the form 'name: key=value"),
        ("x: seed=1\nx: seed=2", "two rows have the same name"),
        ("a b: seed=1\na-b: seed=2", "two rows have the same name"),
    ],
)
def test_a_variant_that_is_off_is_named(variants, said):
    with pytest.raises(UserError) as error:
        entries(variants=variants)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("methods", "said"),
    [("ga, nop", "'nop': no such method; nearest: npo"), ("ga, npo, ga", "the same name")],
)
def test_methods_that_are_off_are_named(methods, said):
    with pytest.raises(UserError, match=said):
        entries(methods)


def test_rows_may_have_settings_of_their_own():
    own = "rmu, r2mu: baseline.layer=2, warmup.lr=4\n\nga: cipo.beta=3"
    config = Config(compare=CompareConfig(methods="ga, npo, rmu", own=own))
    ga, npo, rmu = entries_of(config)
    assert npo.changes == {}
    assert ga.config(config).cipo.beta == 3.0
    assert (rmu.config(config).baseline.layer, rmu.config(config).warmup.lr) == (2, 4.0)
    # A variant's own changes beat them.
    config = Config(
        compare=CompareConfig(variants="x: train.lr=1\ny: cipo.beta=1", own="x,y: train.lr=2")
    )
    assert [e.config(config).train.lr for e in entries_of(config)] == [1.0, 2.0]
    # A row's own rate is what it is trained with.
    assert rates_of(config, entries_of(config)) == {"x": [1.0], "y": [2.0]}


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("rmo: seed=2", "no row 'rmo'; rows: ga"),
        ("ga: cipo.layer=2", "'cipo.layer' is no setting"),
        ("ga cipo.beta=2", "'ga cipo.beta=2' is not of the form 'row, row: key=value, key=value'"),
        ("ga: cipo.beta", "'ga: cipo.beta' is not of the form"),
        ("ga: seed=2", "row 'ga' cannot change 'seed': rows share model, data and seeds"),
        ("ga: forget.count=2", "row 'ga' cannot change 'forget.count'"),
        ("ga: method=npo", "row 'ga' cannot change 'method'"),
        ("ga: compare.seeds=2", "row 'ga' cannot change 'compare.seeds'"),
    ],
)
def test_settings_of_rows_that_are_off_are_named(own, said):
    with pytest.raises(UserError, match=re.escape(said)):
        entries_of(Config(compare=CompareConfig(methods="ga", own=own)))


def rates(lrs, methods="ga, npo, rmu"):
    config = Config(compare=CompareConfig(methods=methods, lrs=lrs), train=TrainConfig(lr=0.5))
    return rates_of(config, entries_of(config))


def test_rows_may_have_learning_rates_of_their_own():
    assert rates("") == {"ga": [0.5], "npo": [0.5], "rmu": [0.5]}
    assert rates("1e-4, 2e-4")["npo"] == [1e-4, 2e-4]
    found = rates(" 1e-4, 2e-4 ; rmu , r2mu : 1e-2, 2e-2; npo: 3")
    assert found == {"ga": [1e-4, 2e-4], "npo": [3.0], "rmu": [1e-2, 2e-2]}


@pytest.mark.parametrize(
    ("lrs", "said"),
    [
        ("1e-4, fast", "'1e-4, fast': must be numbers"),
        ("1e-4; 2e-4", "'2e-4' is not of the form 'row, row: 1e-3, 1e-2'"),
        ("1e-4; rmo: 2e-4", "no row 'rmo'; rows: ga, npo, rmu"),
        ("1e-4; rmu:", "'rmu:' is not of the form"),
        ("1e-4; rmu: x", "'x': must be numbers"),
        ("nan", "'nan': must be numbers above 0"),
        ("1e-4, -1e-3", "'1e-4, -1e-3': must be numbers above 0"),
    ],
)
def test_learning_rates_that_are_off_are_named(lrs, said):
    with pytest.raises(UserError, match=f"config.compare.lrs: {re.escape(said)}"):
        rates(lrs)


# ---- the table


def final(leak, **more):
    scores = dict.fromkeys(("cot_leak", "answer_leak", "zero_leak", "less_leak"), leak)
    return scores | {"think_completion": 1.0, "retain": 0.5, "reasoning": 0.25} | more


def row(name, finals, lr=None):
    return Comparison._row(None, Entry(name, "ga"), finals, lr, [])


RESULT = {
    "before": final(0.9),
    "rows": [
        row("npo", [final(0.1, ks=0.25), final(0.2, ks=0.5), final(0.6, ks=0.75)], 2e-4),
        row("retrain", [final(0.0, ks=1.0)]),
        row("no_NLL <b> & [x]", [final(0.5)], 8e-4),
    ],
    "n": {"forget": 30, "retain": 40},
    "budget": {"lrs": {"ga": [5e-5, 2e-4], "npo": [5e-5, 2e-4], "rmu": [0.1]}, "seeds": 3},
}


def table_of(result):
    lines = markdown(result, Config()).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in rows if " | " in line
    ]


def test_mean_and_standard_deviation_are_those_of_the_seeds():
    measures = RESULT["rows"][0]["measures"]
    assert measures["cot_leak"]["values"] == [0.1, 0.2, 0.6]
    assert measures["cot_leak"]["mean"] == pytest.approx(0.3)
    assert measures["cot_leak"]["std"] == pytest.approx((0.07) ** 0.5)  # (.04 + .01 + .09) / 2
    assert measures["ks"] == {"mean": 0.5, "std": 0.25, "values": [0.25, 0.5, 0.75]}
    assert "kl" not in measures
    assert RESULT["rows"][1]["measures"]["cot_leak"]["std"] == 0.0


def test_the_table_has_every_row_and_what_is_measured():
    head, *rows = table_of(RESULT)
    assert [cells[0] for cells in rows] == ["before", "npo", "retrain", "no_NLL <b> & [x]"]
    assert {len(cells) for cells in (head, *rows)} == {len(head)}
    before, npo, retrain, _ = (dict(zip(head, cells, strict=True)) for cells in rows)
    assert npo["CoT leak % ↓"] == "30.0 ± 26.5" and npo["KS p ↑"] == "0.500 ± 0.250"
    assert (npo["lr"], retrain["lr"], before["lr"]) == ("0.0002", "–", "–")
    assert retrain["KS p ↑"] == "1.000" and before["KS p ↑"] == "–"
    assert before["CoT leak % ↓"] == "90.0" and before["reasoning % ↑"] == "25.0"
    assert not any("KL" in heading or heading == "s" for heading in head)
    text = markdown(RESULT, Config())
    assert "seed 0 among 5e-05, 0.0002 (rmu: 0.1);" in text and "over 3 seeds" in text
    assert "n: 30 forget, 40 retain questions." in text


def test_seeds_that_diverged_are_told_of():
    lost = row("ga", [final(0.1), final(0.2)], 2e-4) | {"diverged": 1}
    text = markdown(RESULT | {"rows": [lost]}, Config())
    assert "| ga (2 of 3 seeds; the others diverged) | 15.0 ± 7.1 |" in text
    none = row("ga", []) | {"diverged": 3}
    assert "| ga (0 of 3 seeds; the others diverged) | – |" in markdown(
        RESULT | {"rows": [none]}, Config()
    )


def test_settings_of_single_rows_stand_below_the_table():
    config = Config(compare=CompareConfig(own="\n  ga,  npo: cipo.beta=2\n\n rmu: train.b1=0 \n"))
    said = "Settings of single rows: ga, npo: cipo.beta=2; rmu: train.b1=0."
    assert said in markdown(RESULT, config)
    assert "single rows" not in markdown(RESULT, Config())


def test_a_name_with_a_bar_stays_one_cell():
    result = RESULT | {"rows": [row("a|b", [final(0.5)])]}
    (line,) = (x for x in markdown(result, Config()).splitlines() if x.startswith("| a"))
    assert line.replace("\\|", "").count("|") == markdown(result, Config()).splitlines()[0].count(
        "|"
    )


def test_the_terminal_shows_every_name_as_it_is(capsys):
    print_comparison(RESULT, Config())
    said = capsys.readouterr().out
    for name in ("before", "npo", "retrain", "no_NLL <b> & [x]"):
        assert f" {name} " in said
    assert " 30.0 " in said and "seed 0 among" in said


def test_merit_takes_the_greatest_leak_of_each_seed():
    finals = [
        final(0.0, zero_leak=0.4, retain=1.0, reasoning=1.0),
        final(0.0, cot_leak=0.2, retain=0.5, reasoning=1.0),
    ]
    leak, _, utility, _ = merit(row("x", finals)["measures"])
    assert leak == pytest.approx(30.0)
    assert utility == pytest.approx(100 * (1.0 + 2 / 3) / 2)
    assert merit(row("y", [final(0.1, retain=0.0, reasoning=0.0)])["measures"])[2] == 0.0


# ---- a little comparison


# The default forget set: the retrained model that ships never saw it.
SMALL = (
    "--config.compare.methods=ga,npo,retrain",
    "--config.compare.seeds=2",
    "--config.compare.lrs=1e-4,8e-4",
    "--config.forget.count=10",
    "--config.train.epochs=0.04",
    "--config.train.batch=4",
    "--config.train.retain_batch=4",
    "--config.train.reasoning_batch=4",
    "--config.train.checkpoint_every=2",
    "--config.data.valid_rows=4",
    "--config.data.eval_rows=6",
    "--config.eval.max_new_tokens=64",
    "--config.compare.workers=1",
)
# Is asked to stop in the middle of the first trial of NPO.
STOPPED = """
import os, signal, sys
from cipo_jax.training.step import Trainer
put, seen = Trainer.put, [0]
def polite(self, batch):
    seen[0] += "ref_forget" in batch
    if seen[0] == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return put(self, batch)
Trainer.put = polite
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
    environment = user_runs.environment(tmp_path_factory.mktemp("compiled"))

    def start(workdir, *extra, program=("-m", "cipo_jax")):
        flags = [
            "--config=configs/tiny_compare.py:smoke", f"--workdir={workdir}", *SMALL, *extra
        ]  # fmt: skip
        return user_runs.run(environment, *program, "compare", *flags, timeout=800)

    return start


def test_workers_share_the_cores_that_there_are(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7, 2, 3, 5, 4}, raising=False)
    assert cores_of(1) == [[2, 3, 4, 5, 7]]
    assert cores_of(2) == [[2, 3], [4, 5, 7]]
    assert cores_of(9) == [[2], [3], [4], [5], [7]]
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert cores_of(4) == [[], []]


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
    assert result["budget"] == {"lrs": lrs, "seeds": 2}
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
            assert found["measures"]["kl"]["values"][i] == scores["kl"]
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
    files = ("metrics.jsonl", "evals/think.jsonl", "pairs.jsonl")
    for path in (p for f in files for p in whole[0].glob(f"runs/*/*/{f}")):
        other = workdir / path.relative_to(whole[0])
        assert other.read_text() == path.read_text(), path


@pytest.mark.slow
def test_processes_side_by_side_come_to_the_same(whole, start, tmp_path):
    workdir = tmp_path / "run"
    done = start(workdir, "--config.compare.workers=2")
    assert done.returncode == 0, done.stderr
    assert comparable(workdir) == comparable(whole[0])
    # Nothing was done twice: each trial is told of once, by whoever did it.
    told = [line.split("  round")[0] for line in done.stderr.splitlines() if "  round" in line]
    assert len(told) == len(set(told)) == len(list(workdir.glob("runs/*/*/stages.json")))


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
    refused = start(workdir, "--config.cipo.leak_goal=0.5")
    assert refused.returncode == 2
    assert "cipo.leak_goal: 1.0 there, 0.5 now" in refused.stderr
