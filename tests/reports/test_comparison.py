"""Cells and notes of a comparison's table, its plot, and the table of a sequence."""

import dataclasses

import pytest

from cipo_jax.config import CompareConfig, Config, FixedTargetConfig, RowOverrides, TrainConfig
from cipo_jax.evals.leakage import AccuracyScores, ForgetScores, Scores
from cipo_jax.experiments.compare import ComparisonResult, Measured, table_row
from cipo_jax.experiments.comparison_measures import Measures
from cipo_jax.experiments.comparison_rows import CompareRow
from cipo_jax.experiments.sequential import RequestResult, SequenceResult
from cipo_jax.reports.comparison import (
    budget_line,
    draw,
    markdown,
    merit,
    print_comparison,
    print_sequence,
    write_comparison,
)

LEAKS = ("cot_leak", "answer_leak", "zero_leak", "less_leak")
NONE = dict.fromkeys((f.name for f in dataclasses.fields(Measures)), None)


def final(leak, **more):
    scores = dict.fromkeys(LEAKS, leak)
    return scores | {"think_completion": 1.0, "retain": 0.5, "reasoning": 0.25} | more


def row(name, finals, lr=None, diverged=0):
    return table_row(CompareRow(name, "ga"), finals, lr, (), diverged)


RESULT = ComparisonResult(
    before=Measures(**NONE | final(0.9)),
    retrained=None,
    rows=(
        row("npo", [final(0.1, ks=0.25), final(0.2, ks=0.5), final(0.6, ks=0.75)], 2e-4),
        row("retrain", [final(0.0, ks=1.0)]),
        row("no_NLL <b> & [x]", [final(0.5)], 8e-4),
    ),
    n={"forget": 30, "retain": 40},
    lrs={"ga": (5e-5, 2e-4), "npo": (5e-5, 2e-4), "rmu": (0.1,)},
    seeds=3,
    seconds=1.0,
)


def with_rows(*rows, **changes):
    return dataclasses.replace(RESULT, rows=rows, **changes)


def table_of(result):
    lines = markdown(result, Config()).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in rows if " | " in line
    ]


def test_mean_and_standard_deviation_are_those_of_the_seeds():
    measures = RESULT.rows[0].measures
    assert measures["cot_leak"].values == (0.1, 0.2, 0.6)
    assert measures["cot_leak"].mean == pytest.approx(0.3)
    assert measures["cot_leak"].std == pytest.approx((0.07) ** 0.5)  # (.04 + .01 + .09) / 2
    assert measures["ks"] == Measured(0.5, 0.25, (0.25, 0.5, 0.75))
    assert "kl" not in measures
    assert RESULT.rows[1].measures["cot_leak"].std == 0.0


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


def test_seconds_and_memory_have_no_spread():
    measured = row("x", [final(0.1, seconds=3.0, peak_gib=1.0, steps=4), final(
        0.1, seconds=6.0, peak_gib=2.0, steps=8)])  # fmt: skip
    head, _, cells = table_of(with_rows(measured))
    found = dict(zip(head, cells, strict=True))
    assert (found["s"], found["GiB"], found["steps"]) == ("4", "1.50", "6 ± 3")


def test_seeds_that_diverged_are_noted():
    # After a validated round the seed is measured.
    late = row("ga", [final(0.1), final(0.2), final(0.3)], 2e-4, diverged=1)
    assert "| ga (diverged: 1 of 3 seeds) | 20.0 ± 10.0 |" in markdown(with_rows(late), Config())
    # Before any, there is nothing to measure of it.
    lost = row("ga", [final(0.1), final(0.2)], 2e-4, diverged=1)
    text = markdown(with_rows(lost), Config())
    assert "| ga (diverged: 1 of 3 seeds; 2 measured) | 15.0 ± 7.1 |" in text
    none = row("ga", [], diverged=3)
    text = markdown(with_rows(none), Config())
    assert "| ga (diverged: 3 of 3 seeds; 0 measured) | – |" in text


def test_the_budget_is_that_of_every_row():
    config = Config(train=TrainConfig(epochs=0.5), fixed_target=FixedTargetConfig(rounds=4))
    line = budget_line(config, RESULT)
    assert line.startswith("Every row: learning rate chosen by validation with seed 0 among ")
    assert "at most 4 rounds of 0.5 epochs" in line
    one = dataclasses.replace(RESULT, lrs={"ga": (2e-4,), "npo": (2e-4,)}, seeds=1)
    assert budget_line(config, one).startswith("Every row: learning rate 0.0002; at most 4 rounds")
    assert "over 1 seeds" in budget_line(config, one)
    several = RESULT.lrs | {"r2mu": (0.1,), "simnpo": (0.1, 0.2)}
    line = budget_line(config, dataclasses.replace(RESULT, lrs=several))
    assert " (rmu, r2mu: 0.1; simnpo: 0.1, 0.2);" in line


def test_settings_of_single_rows_stand_below_the_table():
    overrides = (
        RowOverrides(("ga", "npo"), (("cipo.beta", 2.0),)),
        RowOverrides(("rmu",), (("train.b1", 0.0), ("train.b2", 0.5))),
    )
    config = Config(compare=CompareConfig(overrides=overrides))
    said = "Settings of single rows: ga, npo: cipo.beta=2.0; rmu: train.b1=0.0, train.b2=0.5."
    assert said in markdown(RESULT, config)
    assert "single rows" not in markdown(RESULT, Config())


def test_a_name_with_a_bar_stays_one_cell():
    result = with_rows(row("a|b", [final(0.5)]))
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
    leak, _, utility, _ = merit(row("x", finals).measures)
    assert leak == pytest.approx(30.0)
    assert utility == pytest.approx(100 * (1.0 + 2 / 3) / 2)
    assert merit(row("y", [final(0.1, retain=0.0, reasoning=0.0)]).measures)[2] == 0.0


# ---- a split that is missing


def without(*keys):
    scores = [final(0.1), final(0.3)]
    return [{k: v for k, v in s.items() if k not in keys} for s in scores]


def test_a_missing_split_is_in_no_column():
    before = dataclasses.replace(RESULT.before, reasoning=None)
    result = with_rows(row("ga", without("reasoning")), before=before)
    head, *_ = table_of(result)
    assert "retain % ↑" in head and not any("reasoning" in heading for heading in head)
    assert "0.0" not in {cell for cells in table_of(result)[1:] for cell in cells}


@pytest.mark.parametrize(
    ("missing", "utility"), [(("reasoning",), 50.0), (("retain",), 25.0), ((), 100 / 3)]
)
def test_merit_is_of_the_splits_that_there_are(missing, utility):
    assert merit(row("x", without(*missing)).measures)[2] == pytest.approx(utility)


def test_without_anything_retained_there_is_no_merit_and_no_point(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    keys = ("retain", "reasoning")
    before = dataclasses.replace(RESULT.before, retain=None, reasoning=None)
    result = with_rows(row("ga", without(*keys)), row("npo", [], diverged=3), before=before)
    assert merit(result.rows[0].measures)[2] != merit(result.rows[0].measures)[2]  # nan
    written = write_comparison(result, Config(), tmp_path)
    assert [path.name for path in written] == [
        "comparison.json", "comparison.md", "comparison.png"
    ]  # fmt: skip
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "nan" not in text and "retain" not in text.splitlines()[0]
    print_comparison(result, Config())
    assert "nan" not in capsys.readouterr().out


def test_the_plot_has_a_point_for_each_measured_row(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = []
    errorbar = Axes.errorbar

    def spy(self, *args, **more):
        drawn.append((more["label"], *args))
        return errorbar(self, *args, **more)

    monkeypatch.setattr(Axes, "errorbar", spy)
    result = with_rows(row("ga", without("reasoning")), row("lost", [], diverged=3))
    draw(result, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    assert [label for label, *_ in drawn] == ["before", "ga"] * 2
    assert drawn[1][1:] == (pytest.approx(20.0), pytest.approx(50.0))


# ---- a sequence


def test_a_sequence_has_a_line_a_request_and_says_what_is_missing(capsys):
    forget = ForgetScores(0.5, 0.25, 1.0, 1.0, 8)
    before = Scores(ForgetScores(1.0, 1.0, 1.0, 1.0, 8), AccuracyScores(0.75, 4), None)
    requests = (
        RequestResult(("A", "B"), 1, Scores(forget, AccuracyScores(0.5, 4), None), 0.125),
        RequestResult(("C",), 2, Scores(forget, None, None), None),
    )
    print_sequence(SequenceResult(before, requests))
    lines = capsys.readouterr().out.splitlines()
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [
        ["0", "100.0 %", "100.0 %", "", "75.0 %", "n/a"],
        ["2", "50.0 %", "25.0 %", "12.5 %", "50.0 %", "n/a"],
        ["3", "50.0 %", "25.0 %", "n/a", "n/a", "n/a"],
    ]
