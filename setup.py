"""Packaging of cipo_jax: ``pip install -e .`` (extras: test, tpu, cuda, eval, plots)."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="cipo-jax",
    version="0.1.0",
    description="Unlearning for reasoning models, in chain of thought and answer: CiPO in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["cipo_jax", "cipo_jax.*"]),
    package_data={"cipo_jax": ["py.typed", "assets/tiny_lrm/*.json", "assets/tiny_lrm/*/*"]},
    install_requires=[
        "absl-py>=2.1",
        "datasets>=4.0",
        "flax>=0.12",
        "grain>=0.2.12",
        "huggingface-hub>=0.30",
        "jax>=0.10",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.25",
        "rich>=13.7",
        "safetensors>=0.5",
        "scipy>=1.13",
        "tensorboardX>=2.6",
        "transformers>=5.0",
    ],
    extras_require={
        "test": [
            "beartype>=0.20",
            "equinox>=0.13",
            "hypothesis>=6.100",
            "matplotlib>=3.8",
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
        ],
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda13]>=0.10"],
        "eval": ["rouge-score>=0.1.2"],
        "plots": ["matplotlib>=3.8"],
        "lint": ["import-linter>=2.17", "pyright[nodejs]>=1.1.390", "ruff>=0.9"],
    },
    entry_points={"console_scripts": ["cipo = cipo_jax.__main__:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
