"""What an update step costs, beside torch and TRL: one run, same weights, pairs and optimizer.

    python benchmarks/training.py [--model DIR] [--torch-python PYTHON] [--write]

Linux, CPU, float32, two threads. Engines are described in training_peers.py. Those of torch run in
the python that is given, which needs torch and transformers; where it has TRL too, TRL's own loss
is measured, else the same formula written in torch stands alone, and the last lines say so:
`python3.11 -m venv DIR && DIR/bin/pip install torch transformers trl`. The python that runs this
needs no torch, and had better not have it: transformers, which reads tokenizers for us, imports
torch wherever it finds it. Every engine has one process, which stays; only one of them works at a
time. All make one step to warm up, in which programs are compiled, then the timed ones in turn
(A B C A B C ...); what is shown is the median.

A step is forward pass, DPO loss, backward pass, clipping and AdamW, on 4 pairs of 256 tokens: a
prompt of 64 random ids (fixed seed) and completions of 192. Losses of all engines are compared step
by step: that of the first is ln 2, the later ones show whether gradients and optimizers agree.

The machine should have nothing else to do: threads that wait for each other lose far more than the
share that others take. The last lines say how busy others were.

Columns:

- s a step: median, and in brackets the fastest and the slowest.
- ratio: seconds of the engine over ours in the same round, the median over the rounds. Above 1 it
  is slower than we are.
- peak: greatest resident memory of the process in a timed step, libraries and weights included.
- beyond: the same, less what was resident before the step: weights, optimizer state and libraries.
  Freed memory is given back to the kernel before each step.
- faults: pages that the kernel had to hand out in a step, in thousands.
- % matmul: useful operations over what the engine's own library does per second at
  2048 x 2048 x 2048 in float32, best of 5 before and 5 after all runs in any process with that
  library. Useful are, forward and twice that backward, the products with the weights of the layers
  for all real tokens, with the head for the tokens of the completions alone, and causal attention:

      6 W T + 6 D V C + 12 L N H * sum over rows of t (t + 1) / 2

  with W weights of the layers, T real tokens, C those of completions, D and V sizes of the head,
  L layers, N heads of size H, t tokens of a row. What is computed again, the reference model, the
  head over prompts, and masked scores do not count.
- compile: what XLA's compiler took in the step to warm up, and how many programs.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from engines import (
    Document,
    Engine,
    Failed,
    Model,
    add_arguments,
    check_arguments,
    compile_cell,
    progress,
    publish,
    ratio_cell,
    standing,
    surroundings,
    table,
)

DOCUMENT = Document("training.md", "training")
PEERS = Path(__file__).with_name("training_peers.py")
ENGINES = ("ours", "ours-none", "ours-full", "torch", "torch-ref", "trl", "trl-default")
AGREE = 1e-4  # between losses of one step


def make_job(vocabulary, arguments):
    rng = np.random.default_rng(0)

    def ids(count):
        return rng.integers(1, vocabulary, count).tolist()

    rest = arguments.tokens - arguments.prompt
    return {
        "pairs": [
            {"prompt": ids(arguments.prompt), "chosen": ids(rest), "rejected": ids(rest)}
            for _ in range(arguments.pairs)
        ],
        "beta": 0.1,
        "lr": 1e-6,  # TRL's default
        "b1": 0.9,
        "b2": 0.999,
        "max_grad_norm": 1.0,
    }


def operations(model, job):
    """Useful ones of a step."""
    head = model.vocabulary * model.d_model
    rows = [
        (len(pair["prompt"]), len(pair[side]))
        for pair in job["pairs"]
        for side in ("chosen", "rejected")
    ]
    tokens = sum(p + n for p, n in rows)
    total = 6 * (model.weights - head) * tokens + 6 * head * sum(n for _, n in rows)
    seen = sum((p + n) * (p + n + 1) // 2 for p, n in rows)
    return total + 12 * model.layers * model.heads * model.head_dim * seen


def measure(engines, repeats, failures):
    """Engine -> answers, the first of them from the step to warm up."""
    found = {name: [] for name in engines}
    for number in range(1 + repeats):
        for name, engine in engines.items():
            if name not in found:
                continue
            try:
                report = engine.ask("step")
            except Failed as error:
                failures.append(f"{name} failed at step {number}: {error}")
                del found[name]
                continue
            found[name].append(report)
            progress(
                f"{name} {number}: {report['seconds']:.2f} s, loss {report['loss']:.6f}, "
                f"peak {report['peak']:.0f} MiB"
            )
    return found


def rows_of(found, about, useful):
    for name, (warm, *timed) in found.items():
        seconds = statistics.median(t["seconds"] for t in timed)
        ratio = None
        if "ours" in found:
            pairs = zip(timed, found["ours"][1:], strict=True)
            ratio = statistics.median(t["seconds"] / our["seconds"] for t, our in pairs)
        yield {
            "engine": name,
            "seconds": seconds,
            "fastest": min(t["seconds"] for t in timed),
            "slowest": max(t["seconds"] for t in timed),
            "ratio": ratio,
            "peak": max(t["peak"] for t in timed),
            "beyond": max(t["peak"] - t["resident"] for t in timed),
            "faults": statistics.median(t["faults"] for t in timed),
            "matmul": useful / about[name]["matmul"] / seconds,
            "compile_seconds": warm.get("compile_seconds"),
            "compiles": warm.get("compiles"),
            "losses": [t["loss"] for t in (warm, *timed)],
        }


HEAD = (
    "engine",
    "s a step",
    "ratio",
    "peak MiB",
    "beyond",
    "faults k",
    "% matmul",
    "compile s (programs)",
)


def cells_of(row):
    return [
        row["engine"],
        f"{row['seconds']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f})",
        ratio_cell(row),
        f"{row['peak']:.0f}",
        f"{row['beyond']:.0f}",
        f"{row['faults'] / 1000:.0f}",
        f"{100 * row['matmul']:.1f}",
        compile_cell(row),
    ]


def notes_of(rows, found, about, model, job, useful, arguments, failures):
    yield (
        f"{model.all_weights / 1e6:.1f} million parameters in float32, {arguments.pairs} pairs of "
        f"{arguments.tokens} tokens, prompts of {arguments.prompt}; {arguments.threads} threads, "
        f"medians of {arguments.repeats}; {useful / 1e12:.2f} Tflop are useful in a step."
    )
    for name, report in about.items():
        yield f"{name}: {report['version']}; matmul {report['matmul'] / 1e9:.0f} Gflop/s."
    if not any(name.startswith("trl") for name in found):
        yield "TRL was not there: torch computes the same formula, written in torch."
    if len(rows) > 1:
        steps = list(zip(*(row["losses"] for row in rows), strict=True))
        apart = max(max(losses) - min(losses) for losses in steps)
        text = "agree" if apart <= AGREE else "DO NOT AGREE"
        first = ", ".join(f"{loss:.5f}" for loss in rows[0]["losses"])
        yield (
            f"Losses {text}: those of one step differ by at most {apart:.1e} over {len(rows)} "
            f"engines; {rows[0]['engine']}: {first}."
        )
    for name, (_, *timed) in found.items():
        if again := sum(t.get("compiles", 0) for t in timed):
            yield f"{name} compiled {again} programs more in the timed steps."
    yield from surroundings([t for _, *timed in found.values() for t in timed])
    for failure in failures:
        yield f"{failure}."


def has_trl(python):
    question = "import importlib.util as u, sys; sys.exit(u.find_spec('trl') is None)"
    return not subprocess.run([python, "-c", question], check=False).returncode


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, "ours,ours-full,torch,torch-ref,trl,trl-default", DOCUMENT)
    parser.add_argument("--torch-python", default=sys.executable, help="python that has torch")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of prompt and completion")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--xla-flags", default="", help="XLA_FLAGS of our processes")
    arguments = parser.parse_args()
    if not 0 < arguments.prompt < arguments.tokens:
        parser.error("--prompt: at least 1, and less than --tokens")
    names = check_arguments(parser, arguments, ENGINES, DOCUMENT)
    if not has_trl(arguments.torch_python):
        names = [name for name in names if not name.startswith("trl")]
    return arguments, names


def main():
    arguments, names = parse()
    model = Model(arguments.model)
    job = make_job(model.vocabulary, arguments)
    useful = operations(model, job)

    def make(name):
        python = sys.executable if name.startswith("ours") else arguments.torch_python
        flags = {"XLA_FLAGS": arguments.xla_flags} if arguments.xla_flags else {}
        words = arguments.model, arguments.threads
        engine = Engine(name, python, PEERS, words, arguments.threads, flags)
        engine.send(job)
        return engine

    failures = []
    with standing(names, make, failures) as (engines, about):
        found = measure(engines, arguments.repeats, failures)
    for report in about.values():  # Engines of one library have one limit.
        same = [a["matmul"] for a in about.values() if a["library"] == report["library"]]
        report["matmul"] = max(same)
    rows = list(rows_of(found, about, useful))
    notes = list(notes_of(rows, found, about, model, job, useful, arguments, failures))
    numbers = {"rows": rows, "engines": about, "steps": found, "useful": useful}
    publish(arguments, DOCUMENT, table(HEAD, map(cells_of, rows)), notes, numbers)


if __name__ == "__main__":
    main()
