"""Fixtures that tests of methods share."""

import functools

import jax
import pytest
from quick_options import QUICK

from cipo_jax.data.tiny_world import World, questions_about
from cipo_jax.hub import load_tokenizer, resolve
from cipo_jax.text.chat_format import ChatFormat
from cipo_jax.training import step
from cipo_jax.training.mesh import replicated


@pytest.fixture(scope="session")
def chat():
    return ChatFormat(load_tokenizer(resolve("asset:tiny_lrm/target")))


@pytest.fixture(scope="session")
def examples():
    """Three questions about one person, with thoughts of different lengths."""
    world = World.load(resolve("asset:tiny_lrm/world.json"))
    found = questions_about(world.people[:1], "train", per_topic=1)
    return (found[0], found[-1], found[1])


@pytest.fixture(scope="module")
def quick_updates():
    """The update with options that shorten compilation; shapes are computed once."""

    def jitted(self, state):
        shardings = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(
            step._update,
            static_argnames="step",
            donate_argnames="state",
            out_shardings=(shardings, replicated(self.mesh)),
            compiler_options=QUICK,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.TrainStep, "_jitted", jitted)
        patch.setattr(step, "abstract_trainable", functools.cache(step.abstract_trainable))
        yield
