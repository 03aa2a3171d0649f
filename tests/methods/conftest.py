"""The chat format and the examples that tests of methods share."""

import pytest

from cipo_jax.data.tiny_world import World, questions_about
from cipo_jax.hub import load_tokenizer, resolve
from cipo_jax.text.chat_format import ChatFormat


@pytest.fixture(scope="session")
def chat():
    return ChatFormat(load_tokenizer(resolve("asset:tiny_lrm/target")))


@pytest.fixture(scope="session")
def examples():
    """Three questions about one person, with thoughts of different lengths."""
    world = World.load(resolve("asset:tiny_lrm/world.json"))
    found = questions_about(world.people[:1], "train", per_topic=1)
    return (found[0], found[-1], found[1])
