"""Requests to forget, one after another, each on the model that the last one left."""

import dataclasses

import numpy as np

from cipo_jax.config import Config
from cipo_jax.data.splits import load_splits
from cipo_jax.data.tiny_world import World
from cipo_jax.errors import UserError
from cipo_jax.models.hub import resolve
from cipo_jax.progress import Reporter
from cipo_jax.unlearning import methods
from cipo_jax.unlearning.engine import Engine
from cipo_jax.unlearning.run import best_of, iteration_name
from cipo_jax.unlearning.run_folder import Row
from cipo_jax.unlearning.start import run_of


def requests_of(config: Config) -> list[tuple[str, ...]]:
    """Whom each request names, drawn by config.forget.seed.

    Raises:
      UserError: without a tiny world, or where it has too few people.
    """
    if not config.data.world:
        raise UserError("config.data.world is empty: requests in sequence name people of a world")
    names = [p.name for p in World.load(resolve(config.data.world)).people]
    count, size = config.sequence.requests, config.sequence.people
    if count * size >= len(names):
        raise UserError(
            f"config.sequence: {count} requests of {size} people leave nobody of {len(names)}"
        )
    order = np.random.default_rng(config.forget.seed).permutation(len(names))
    drawn = [names[i] for i in order[: count * size]]
    return [tuple(drawn[i * size : (i + 1) * size]) for i in range(count)]


def unlearn_in_sequence(config: Config, workdir: str, reporter: Reporter) -> Row:
    """Every request by config.method; resumable anywhere.

    Returns:
      {"before", "requests": [{"people", "round", "all": scores of everybody forgotten so far, of
      who is still retained, and of reasoning, "own": leak of this request's people}]}; also in
      sequence.json.
    """
    wanted = requests_of(config)
    if methods.find(config.method).loop == "none":
        raise UserError(f"config.method = {config.method!r}: trains nothing; choose another")

    if config.lora.path:
        raise UserError(
            "config.lora.path: each request would add these adapters once more; export the model "
            "with them worked in (`export`), and give that as config.model.path"
        )

    def settings(number: int, path: str) -> Config:
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, path=path, retrained=""),
            forget=dataclasses.replace(
                config.forget,
                people=", ".join(wanted[number]),
                earlier=", ".join(name for names in wanted[:number] for name in names),
            ),
        )

    root = Engine.open(settings(0, config.model.path), workdir, reporter)
    root.folder.listen()

    def start() -> Row:
        splits = root.splits.for_evaluation()
        return root.evaluate("before", "start", root.assemble(root.start()), splits)[1]

    before, told = root.folder.once("before", start), []
    path = config.model.path
    for number, people in enumerate(wanted):
        reporter.line(f"request {number + 1} of {len(wanted)}: {', '.join(people)}")
        folder = root.folder.path / f"request-{number + 1:02d}"
        engine = root.child(settings(number, path), folder, reporter)
        engine.folder.listen()
        told.append({"people": people} | _request(engine))
        all_, own = told[-1]["all"], told[-1]["own"]
        reporter.line(
            f"request {number + 1}: leak of all so far {all_['forget']['cot_leak']:.1%} in CoT, "
            f"{all_['forget']['answer_leak']:.1%} in answers (of this one {own['leak']:.1%}); "
            f"retain {all_['retain']['accuracy']:.1%}, reasoning "
            f"{all_['reasoning']['accuracy']:.1%}"
        )
        path = str(folder / "export")
    result = {"before": before, "requests": told}
    root.folder.write_json("sequence.json", result)
    return result


def _request(engine: Engine) -> Row:
    run, config = run_of(engine), engine.config
    records = run.rounds()
    best = best_of(records)["iteration"]
    run.export(iteration_name(best))

    def make() -> Row:
        both = f"{config.forget.people}, {config.forget.earlier}".strip(", ")
        forget = dataclasses.replace(config.forget, people=both, earlier="")
        splits = load_splits(dataclasses.replace(config, forget=forget)).for_evaluation()
        rows, scores = engine.evaluate("all", "all so far", run.model(iteration_name(best)), splits)
        engine.folder.write_rows("evals/all.jsonl", rows)
        asked = {e.question for e in engine.splits.forget_eval}
        own = [r for r in rows if r["split"] == "forget" and r["question"] in asked]
        leaks = [bool(r["cot_leaks"] or r["answer_leaks"]) for r in own]
        return {"round": best, "all": scores, "own": {"leak": sum(leaks) / len(leaks)}}

    return engine.folder.once("all", make, ["evals/all.jsonl"])
