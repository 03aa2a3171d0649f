"""cipo_jax: unlearning for reasoning models, in their chain of thought and in their answers.

Nothing is imported here, so that ``import cipo_jax.losses`` needs jax alone and ``--help`` is
quick.
"""

__version__ = "0.1.0"
