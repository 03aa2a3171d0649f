"""How fast this package samples, beside transformers and Tunix: one run, same weights and prompts.

    python benchmarks/sampling.py [--model DIR] [--torch-python PYTHON] [--tunix-python PYTHON]
                                  [--write]

Linux, CPU, float32, two threads. Engines are described in sampling_peers.py. Tunix wants other
versions of the libraries, so it has an environment of its own, and is left out unless its python is
given: `python3.11 -m venv DIR && DIR/bin/pip install google-tunix`, then `--tunix-python
DIR/bin/python`. transformers runs in --torch-python, this package in the python that runs this:
without torch, if its memory is to be its own, since transformers, which reads tokenizers for us,
imports torch wherever it finds it. Every engine has one process, which stays, so that what is
compiled stays too; only one of them works at a time. Of a workload all engines make one run to warm
up, in which programs are compiled, then the timed ones in turn (A B C A B C ...); what is shown
is the median.

The machine should have nothing else to do: threads that wait for each other lose far more than the
share that others take, and torch's more than XLA's. The last lines say how busy others were.

Prompts are random ids (fixed seed) of 16 to 48 tokens. There are no stop ids: lengths are forced,
so that every engine makes the same number of tokens, and only these are counted.

- a: one prompt of 32 tokens, 256 new ones, greedy
- b: 32 prompts, 128 new tokens each, greedy
- c: 64 prompts, lengths of a long tail: geometric with mean 80, at most 512, greedy
- d: 8 prompts, 8 samples of each at temperature 1, 128 new tokens

Columns:

- ratio: our tokens/s over those of the engine.
- s: seconds of the timed runs, from the fastest to the slowest.
- peak: greatest resident memory of the process in a timed run, libraries and weights included.
- compile: what XLA's compiler took in the run to warm up, and how many programs.
- % bandwidth: seconds that moving the bytes would take at least, over those it took. The floor is
  that of the ideal schedule, the same for all engines: all rows start at once, and none is computed
  past its end. Each step reads all weights once, and of every row that goes on the keys and values
  so far; samples of one prompt read those of the prompt once:

      bytes = 4 W T + 4 * 2 L K H * sum over t = 1..T-1 of sum over prompts i with n_i > t of
              (p_i + samples * t)

  with W weights (an embedding that is not the head as well does not count), T the greatest length,
  L layers, K heads of keys, H their size, p_i and n_i tokens of prompt and completion. The first
  token comes from the prompts, which count as one reading of the weights. The bandwidth is that of
  copying 512 MiB with numpy in two threads, best of 5 before and 5 after all runs; bytes read and
  bytes written both count.
- % matmul: useful products over what the engine's own library does per second at 2048 x 2048 x 2048
  in float32, best of 5 before and 5 after all runs. A token takes 2 W operations, and 4 L N H times
  its context with N heads of queries; of a prompt only the last token takes those of the head;
  samples share their prompt.
- over ideal (workload c alone): seconds over those that its tokens would take at the engine's own
  full-batch speed, which is that of the same 64 prompts with 80 new tokens each, measured in the
  same process and in turn with it.
"""

import argparse
import statistics
import sys
import threading
import time
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

DOCUMENT = Document("sampling.md", "sampling")
PEERS = Path(__file__).with_name("sampling_peers.py")
WHAT = {
    "a": "a: 1 x {0}",
    "b": "b: 32 x {0}",
    "c": "c: 64, long tail",
    "d": "d: 8 x 8 x {0}",
}
FULL = "full"  # the workload that c is measured by
COPIED = 512 * 2**20


# ---- workloads


def workload(name, vocabulary, short):
    """Prompts, lengths and samples; with `short` an eighth of the tokens."""
    rng = np.random.default_rng(0)

    def prompts(sizes):
        return [rng.integers(1, vocabulary, size).tolist() for size in sizes]

    def forced(length):
        return max(length // 8, 2) if short else length

    samples = 1
    if name == "a":
        sizes, lengths = [32], [forced(256)]
    elif name == "b":
        sizes, lengths = rng.integers(16, 49, 32), [forced(128)] * 32
    elif name == "d":
        sizes, lengths, samples = rng.integers(16, 49, 8), [forced(128)] * 8, 8
    else:
        sizes = rng.integers(16, 49, 64)
        tail = np.minimum(rng.geometric(1 / 80, 64), 512).tolist()
        lengths = [forced(n) for n in (tail if name == "c" else [80] * 64)]
    return {"prompts": prompts(sizes), "lengths": lengths, "samples": samples}


# ---- limits


def bytes_of(model, work):
    """What the ideal schedule moves."""
    rows = list(zip(map(len, work["prompts"]), work["lengths"], strict=True))
    steps = max(work["lengths"])
    slots = sum(p + work["samples"] * t for p, n in rows for t in range(1, n))
    return 4 * (model.weights * steps + 2 * model.layers * model.kv_heads * model.head_dim * slots)


def operations(model, work):
    """Useful ones, of products of matrices."""
    head = model.vocabulary * model.d_model
    per_slot = 4 * model.layers * model.heads * model.head_dim
    total = 0
    for prompt, n in zip(map(len, work["prompts"]), work["lengths"], strict=True):
        total += 2 * (prompt * (model.weights - head) + head)
        total += per_slot * prompt * (prompt + 1) // 2
        # Token t is drawn from what token t - 1 gives; the first from the prompt.
        contexts = sum(prompt + t for t in range(1, n))
        total += work["samples"] * (2 * model.weights * (n - 1) + per_slot * contexts)
    return total


def copy_bandwidth(threads):
    """Bytes per second, read and written."""
    source = np.ones(COPIED // 8)
    into = np.zeros_like(source)
    parts = list(zip(np.array_split(into, threads), np.array_split(source, threads), strict=True))
    seconds = []
    for _ in range(6):
        workers = [threading.Thread(target=np.copyto, args=part) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds.append(time.perf_counter() - start)
    return 2 * COPIED / min(seconds[1:])


# ---- runs


def measure(engines, works, repeats, failures):
    """(engine, workload) -> (answer while warming up, timed answers)."""
    found = {}

    def attempt(engine, name, ids=False):
        try:
            report = engine.ask(works[name] | {"ids": ids})
        except Failed as error:
            failures.append(f"{engine.name} failed at {name}: {error}")
            found.pop((engine.name, name), None)
            return None
        progress(f"{engine.name} {name}: {report['seconds']:.2f} s")
        return report

    groups = [[name] if name != "c" else ["c", FULL] for name in works if name != FULL]
    for group in groups:
        for name in group:
            for engine in engines.values():
                if report := attempt(engine, name, ids=works[name]["samples"] == 1):
                    found[engine.name, name] = report, []
        for _ in range(repeats):
            for engine in engines.values():
                for name in group:
                    if (engine.name, name) in found and (report := attempt(engine, name)):
                        found[engine.name, name][1].append(report)
    return found


# ---- tables and notes


def rows_of(found, works, model, bandwidth, about):
    def speed(engine, name):
        timed = found[engine, name][1]
        return works_tokens(works[name]) / statistics.median(t["seconds"] for t in timed)

    for engine, name in sorted(found, key=lambda at: (at[1], list(about).index(at[0]))):
        if name == FULL:
            continue
        warm, timed = found[engine, name]
        seconds = statistics.median(t["seconds"] for t in timed)
        row = {
            "workload": name,
            "engine": engine,
            "tokens": works_tokens(works[name]),
            "speed": speed(engine, name),
            "ratio": None,
            "fastest": min(t["seconds"] for t in timed),
            "slowest": max(t["seconds"] for t in timed),
            "peak": max(t["peak"] for t in timed),
            "compile_seconds": warm.get("compile_seconds"),
            "compiles": warm.get("compiles"),
            "bandwidth": bytes_of(model, works[name]) / bandwidth / seconds,
            "matmul": operations(model, works[name]) / about[engine]["matmul"] / seconds,
            "over_ideal": None,
        }
        if ("ours", name) in found:
            row["ratio"] = speed("ours", name) / row["speed"]
        if name == "c" and (engine, FULL) in found:
            row["over_ideal"] = speed(engine, FULL) / row["speed"]
        yield row


def works_tokens(work):
    return sum(work["lengths"]) * work["samples"]


HEAD = (
    "workload",
    "engine",
    "tokens/s",
    "ratio",
    "s",
    "peak MiB",
    "compile s (programs)",
    "% bandwidth",
    "% matmul",
    "over ideal",
)


def cells_of(row, works):
    return [
        WHAT[row["workload"]].format(works[row["workload"]]["lengths"][0]),
        row["engine"],
        f"{row['speed']:.{0 if row['speed'] >= 100 else 1}f}",
        ratio_cell(row),
        f"{row['fastest']:.2f} to {row['slowest']:.2f}",
        f"{row['peak']:.0f}",
        compile_cell(row),
        f"{100 * row['bandwidth']:.1f}",
        f"{100 * row['matmul']:.1f}",
        "–" if row["over_ideal"] is None else f"{row['over_ideal']:.2f}",
    ]


def agreement(found, name, engine, other):
    """How many greedy rows of two engines are equal; of the others, how far they are."""
    pairs = list(zip(found[engine, name][0]["ids"], found[other, name][0]["ids"], strict=True))
    text = f"{name}: greedy ids of {engine} and {other} are equal in {{}} of {len(pairs)} rows"
    apart = [
        next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        for a, b in pairs
        if a != b
    ]
    if apart:
        text += f"; of the others the first {min(apart)} to {max(apart)} tokens are"
    return text.format(len(pairs) - len(apart))


def notes_of(found, works, model, bandwidth, about, arguments, failures):
    yield (
        f"{model.all_weights / 1e6:.1f} million parameters in float32, {arguments.threads} "
        f"threads, medians of {arguments.repeats}. Copying: {bandwidth / 1e9:.1f} GB/s."
    )
    for engine, report in about.items():
        yield (
            f"{engine}: {report['version']}; matmul {report['matmul'] / 1e9:.0f} Gflop/s; "
            f"{report['resident']:.0f} MiB resident before its first workload."
        )
    for name in (name for name in works if name != FULL):
        others = [e for e in about if e != "ours" and (e, name) in found]
        if works[name]["samples"] == 1 and ("ours", name) in found:
            for other in others:
                yield agreement(found, name, "ours", other) + "."
    for (engine, name), (_, timed) in found.items():
        if again := sum(t.get("compiles", 0) for t in timed):
            yield f"{engine} compiled {again} programs more in the timed runs of {name}."
    yield from surroundings([t for _, timed in found.values() for t in timed])
    for failure in failures:
        yield f"{failure}."


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    engines = "ours,transformers,tunix"
    add_arguments(parser, engines, DOCUMENT)
    parser.add_argument("--workloads", default="a,b,c,d")
    parser.add_argument("--torch-python", default=sys.executable, help="python that has torch")
    parser.add_argument("--tunix-python", help="python of an environment that has google-tunix")
    parser.add_argument("--rows", type=int, default=64, help="that this package decodes at a time")
    parser.add_argument("--short", action="store_true", help="few tokens, to see that all works")
    arguments = parser.parse_args()
    names = arguments.workloads.split(",")
    if unknown := set(names) - set(WHAT):
        parser.error(f"no such workloads: {', '.join(sorted(unknown))}")
    if arguments.write and arguments.short:
        parser.error("--short is no measurement, so that it cannot be written")
    wanted = check_arguments(parser, arguments, engines.split(","), DOCUMENT)
    return arguments, names, [e for e in wanted if e != "tunix" or arguments.tunix_python]


def main():
    arguments, names, wanted = parse()
    model = Model(arguments.model)
    works = {
        name: workload(name, model.vocabulary, arguments.short)
        for name in names + ([FULL] if "c" in names else [])
    }

    def make(name):
        pythons = {"tunix": arguments.tunix_python, "transformers": arguments.torch_python}
        python = pythons.get(name, sys.executable)
        words = arguments.model, arguments.threads, arguments.rows
        return Engine(name, python, PEERS, words, arguments.threads)

    bandwidth, failures = copy_bandwidth(arguments.threads), []
    with standing(wanted, make, failures) as (engines, about):
        found = measure(engines, works, arguments.repeats, failures)
    bandwidth = max(bandwidth, copy_bandwidth(arguments.threads))
    rows = list(rows_of(found, works, model, bandwidth, about))
    notes = list(notes_of(found, works, model, bandwidth, about, arguments, failures))
    lines = table(HEAD, [cells_of(row, works) for row in rows], texts=2)
    numbers = {"rows": rows, "engines": about, "bandwidth": bandwidth}
    publish(arguments, DOCUMENT, lines, notes, numbers)


if __name__ == "__main__":
    main()
