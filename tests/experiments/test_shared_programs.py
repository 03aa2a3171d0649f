"""Trials of a comparison share a compiled update where their objectives are equal."""

import dataclasses

import jax
import pytest

from cipo_jax.config import Config, FixedTargetConfig, GradientAscentConfig, TrainConfig
from cipo_jax.experiments.comparison_rows import CompareRow
from cipo_jax.language_model import LanguageModel
from cipo_jax.training.mesh import make_mesh
from cipo_jax.training.optimizer import AdamW


@pytest.fixture(scope="module")
def model():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return LanguageModel.from_pretrained("asset:tiny_lrm/target", mesh)


PLAIN = TrainConfig(lr=1e-3, warmup_steps=0)


def step_of(model, name, settings=PLAIN, ema_decay=None, **groups):
    row = CompareRow(name, name)
    config = row.config(Config(train=settings, **groups))
    objective = row.entry.objective(config)
    return model.train_step(
        objective,
        AdamW.from_config(config.train),
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        ema_decay=ema_decay,
    )


def test_phases_of_equal_objectives_have_one_step(model):
    first = step_of(model, "ga")
    changed = dataclasses.replace(PLAIN, lr=0.1, epochs=3.0, warmup_steps=5, checkpoint_every=7)
    assert step_of(model, "ga", changed) == first
    # Settings that the objective does not have make no difference either.
    unused = GradientAscentConfig(beta=3.0)
    assert step_of(model, "ga", changed, gradient_ascent=unused) == first
    weighted = FixedTargetConfig(retain_weight=0.5)
    others = [
        step_of(model, "ga", dataclasses.replace(PLAIN, weight_decay=0.1)),
        step_of(model, "grad_diff"),
        step_of(model, "grad_diff", fixed_target=weighted),
        step_of(model, "ga", ema_decay=0.9),
        step_of(model, "kl"),
        step_of(model, "pdu"),
        step_of(model, "wga"),
        step_of(model, "wga", gradient_ascent=unused),
    ]
    assert len({first, *others}) == 9
