"""The rows of a comparison that a config asks for, and the learning rates that they try."""

import dataclasses
import re

import pytest

from cipo_jax.config import CompareConfig, Config, RowLrs, RowOverrides, TrainConfig, Variant
from cipo_jax.errors import UserError
from cipo_jax.experiments.comparison_rows import CompareRow, learning_rates, rows_of
from cipo_jax.methods.base import METHODS


def variant(name, **changes):
    return Variant(name, tuple((key.replace("__", "."), v) for key, v in changes.items()))


def rows(methods=(), variants=(), overrides=()):
    return rows_of(
        Config(
            compare=CompareConfig(
                methods=tuple(methods), variants=tuple(variants), overrides=tuple(overrides)
            )
        )
    )


def test_all_is_every_method_there_is():
    found = rows()
    assert [row.name for row in found] == [row.method for row in found] == list(METHODS)
    assert len(found) > 15
    assert all(row.changes == () for row in found)


def test_methods_are_those_named_in_their_order():
    assert [row.name for row in rows(["npo", "ga", "cipo"])] == ["npo", "ga", "cipo"]


def test_variants_take_the_place_of_methods():
    found = rows(
        ["npo"],
        [
            variant("plain"),
            variant("no NLL", cipo__nll_weight=0.0, warmup__lr=3.0),
            variant("NPO", method="npo", fixed_target__span="cot"),
        ],
    )
    assert found == [
        CompareRow("plain", "cipo"),
        CompareRow("no NLL", "cipo", (("cipo.nll_weight", 0.0), ("warmup.lr", 3.0))),
        CompareRow("NPO", "npo", (("fixed_target.span", "cot"),)),
    ]
    assert [row.folder for row in found] == ["plain", "no_NLL", "NPO"]


def test_a_row_has_the_config_of_the_comparison_but_for_its_changes():
    config = Config(seed=5, train=TrainConfig(lr=0.25))
    changes = (
        ("cipo.nll_weight", 0), ("cipo.iterations", 3), ("sampling.int8_cache", True),
        ("cipo.loss", "ipo"), ("seed", 9),
    )  # fmt: skip
    found = CompareRow("x", "cipo", changes).config(config)
    cipo = dataclasses.replace(config.cipo, nll_weight=0.0, iterations=3, loss="ipo")
    sampling = dataclasses.replace(config.sampling, int8_cache=True)
    assert found == dataclasses.replace(config, cipo=cipo, sampling=sampling, seed=9)
    assert type(found.cipo.nll_weight) is float
    assert CompareRow("npo", "npo").config(config) == dataclasses.replace(config, method="npo")
    # The overrides of a method apply, and do not replace the row's own changes.
    simpo = CompareRow("s", "cipo_simpo", (("cipo.beta", 1.5),)).config(config)
    assert (simpo.method, simpo.cipo.loss, simpo.cipo.beta) == ("cipo_simpo", "simpo", 1.5)


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ([variant("x", cipo__nll=0)], "config.cipo.nll: no such setting; nearest: cipo."),
        ([variant("x", nll_weight=0)], "config.nll_weight: no such setting; nearest: "),
        ([variant("x", cipo=0)], "config.cipo: is a group"),
        ([variant("x", cipo__nll_weight="none")], "config.cipo.nll_weight = 'none': must be"),
        ([variant("x", cipo__nll_weight="")], "config.cipo.nll_weight = '': must be of type"),
        ([variant("x", cipo__nll_weight=-1)], "config.cipo.nll_weight = -1.0: must be at least 0"),
        ([variant("x", cipo__iterations=1.5)], "config.cipo.iterations = 1.5: must be of type int"),
        ([variant("x", cipo__loss="best")], "config.cipo.loss = 'best': must be one of dpo, ipo"),
        ([variant("x", method="nop")], "config.method = 'nop': no such method; nearest: npo"),
        ([variant("x", train__lr=1.0), variant("x", train__lr=2.0)], "two rows have the same name"),
        ([variant("a b"), variant("a-b")], "two rows have the same name"),
        ([variant("x", seed=3)], "row 'x' cannot change 'seed': rows share model, data and seeds"),
    ],
)
def test_a_wrong_variant_is_named(variants, said):
    with pytest.raises(UserError) as error:
        rows(variants=variants)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("methods", "said"),
    [(["ga", "nop"], "'nop': no such method; nearest: npo"), (["ga", "npo", "ga"], "same name")],
)
def test_wrong_methods_are_named(methods, said):
    with pytest.raises(UserError, match=said):
        rows(methods)


def override(names, **changes):
    return RowOverrides(tuple(names), variant("", **changes).changes)


def test_rows_may_have_settings_of_their_own():
    overrides = (
        override(["rmu", "r2mu"], representation__layer=2, warmup__lr=4.0),
        override(["ga"], cipo__beta=3.0),
    )
    config = Config(compare=CompareConfig(methods=("ga", "npo", "rmu"), overrides=overrides))
    ga, npo, rmu = rows_of(config)
    assert npo.changes == ()
    assert ga.config(config).cipo.beta == 3.0
    assert (rmu.config(config).representation.layer, rmu.config(config).warmup.lr) == (2, 4.0)
    # A variant's own changes beat them.
    config = Config(
        compare=CompareConfig(
            variants=(variant("x", train__lr=1.0), variant("y", cipo__beta=1.0)),
            overrides=(override(["x", "y"], train__lr=2.0),),
        )
    )
    assert [row.config(config).train.lr for row in rows_of(config)] == [1.0, 2.0]
    # A row's own rate is what it is trained with.
    assert learning_rates(config, rows_of(config)) == {"x": (1.0,), "y": (2.0,)}


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (override(["rmo"], seed=2), "no row 'rmo'; rows: ga"),
        (override(["ga"], cipo__layer=2), "config.cipo.layer: no such setting"),
        (override(["ga"], seed=2), "row 'ga' cannot change 'seed': rows share model, data and"),
        (override(["ga"], forget__count=2), "row 'ga' cannot change 'forget.count'"),
        (override(["ga"], method="npo"), "row 'ga' cannot change 'method'"),
        (override(["ga"], compare__seeds=2), "row 'ga' cannot change 'compare.seeds'"),
        (override(["ga"], model__path="x"), "row 'ga' cannot change 'model.path'"),
    ],
)
def test_wrong_settings_of_rows_are_named(own, said):
    with pytest.raises(UserError, match=re.escape(said)):
        rows(["ga"], overrides=[own])


def rates(lrs=(), *row_lrs, methods=("ga", "npo", "rmu"), variants=()):
    compare = CompareConfig(methods=methods, variants=variants, lrs=lrs, row_lrs=row_lrs)
    config = Config(compare=compare, train=TrainConfig(lr=0.5))
    return learning_rates(config, rows_of(config))


def test_rows_may_have_learning_rates_of_their_own():
    assert rates() == {"ga": (0.5,), "npo": (0.5,), "rmu": (0.5,)}
    assert rates((1e-4, 2e-4))["npo"] == (1e-4, 2e-4)
    found = rates((1e-4, 2e-4), RowLrs(("rmu", "r2mu"), (1e-2, 2e-2)), RowLrs(("npo",), (3.0,)))
    assert found == {"ga": (1e-4, 2e-4), "npo": (3.0,), "rmu": (1e-2, 2e-2)}


def test_learning_rates_of_unknown_rows_are_named():
    said = "config.compare.row_lrs: no row 'rmo'; rows: ga, npo, rmu"
    with pytest.raises(UserError, match=re.escape(said)):
        rates((1e-4,), RowLrs(("rmo",), (2e-4,)))


@pytest.mark.parametrize("given", [((1e-4,),), ((), RowLrs(("x",), (1e-4,)))])
def test_a_row_has_its_learning_rate_from_one_place(given):
    with pytest.raises(UserError, match=r"row 'x' sets train\.lr; its rates go into config\.comp"):
        rates(*given, variants=(variant("x", train__lr=1.0),))
