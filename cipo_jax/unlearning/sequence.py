"""Requests to forget, one after another, each on the model that the last one left.

Two things are lost on the way unless something keeps them: what was forgotten earlier comes back,
and the model no longer writes what the next request learns from. So later requests also retain what
the model says, without a leak, to the questions of earlier ones (`config.sequence.replay`), and how
the model at the start writes counterfactuals about who is retained (`config.sequence.skills`). The
method retains them as it retains facts: by these texts, or by what the model that comes in makes of
them.
What a request is given of these holds nothing that it or an earlier one is to forget.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cipo_jax.config import Config
from cipo_jax.data.examples import Example
from cipo_jax.data.splits import Splits, load_splits, spread
from cipo_jax.data.tiny_world import World
from cipo_jax.errors import UserError
from cipo_jax.hub import resolve
from cipo_jax.progress import Reporter
from cipo_jax.unlearning import methods
from cipo_jax.unlearning.counterfactuals import text_faults, written_examples
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
    config = methods.configured(config)
    wanted = requests_of(config)
    if methods.find(config.method).loop == "none":
        raise UserError(f"config.method = {config.method!r}: trains nothing; choose another")

    if config.lora.path:
        raise UserError(
            "config.lora.path: each request would add these adapters once more; export the model "
            "with them worked in (`export`), and give that as config.model.path"
        )

    def settings(number: int, path: str, rehearse: str = "") -> Config:
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, path=path, retrained=""),
            data=dataclasses.replace(config.data, rehearse=rehearse),
            forget=dataclasses.replace(
                config.forget,
                people=", ".join(wanted[number]),
                earlier=", ".join(name for names in wanted[:number] for name in names),
            ),
        )

    if config.data.rehearse:
        raise UserError("config.data.rehearse: a sequence makes its own; see config.sequence")
    # Requests are given paths in it, which are part of their settings.
    root = Engine.open(settings(0, config.model.path), Path(workdir).resolve(), reporter)
    root.folder.listen()

    def start() -> Row:
        splits = root.splits.for_evaluation()
        return root.evaluate("before", "start", root.assemble(root.start()), splits)[1]

    before, told = root.folder.once("before", start), []
    path, skills, said = config.model.path, _skills(root), list[Row]()
    for number, people in enumerate(wanted):
        reporter.line(f"request {number + 1} of {len(wanted)}: {', '.join(people)}")
        name = f"request-{number + 1:02d}"
        rehearse = _rehearsal(root, name, load_splits(settings(number, path)), skills, said)
        engine = root.child(settings(number, path, rehearse), root.folder.path / name, reporter)
        engine.folder.listen()
        told.append({"people": people} | _request(engine))
        if _retains(config) and config.sequence.replay:
            said += engine.folder.read_rows("said.jsonl")
        all_, own = told[-1]["all"], told[-1]["own"]
        reporter.line(
            f"request {number + 1}: leak of all so far {all_['forget']['cot_leak']:.1%} in CoT, "
            f"{all_['forget']['answer_leak']:.1%} in answers (of this one {own['leak']:.1%}); "
            f"retain {all_['retain']['accuracy']:.1%}, reasoning "
            f"{all_['reasoning']['accuracy']:.1%}"
        )
        path = str(engine.folder.path / "export")
    result = {"before": before, "requests": told}
    root.folder.write_json("sequence.json", result)
    return result


def _retains(config: Config) -> bool:
    """Whether the method trains on what is retained."""
    method = methods.find(config.method)
    if method.loop == "iterative":
        return config.cipo.retain_weight > 0
    return method.settings(config.baseline).retain != "none"


def _skills(root: Engine) -> list[Row]:
    """skills.jsonl: how the model at the start writes what the method learns from."""
    config, file = root.config, "skills.jsonl"
    method, count = methods.find(config.method), config.sequence.skills
    refuses = method.target == "refusal" and not config.baseline.refusals
    writes = method.loop == "iterative" or method.target in ("counterfactual", "alternates")
    if not (count and _retains(config) and (writes or refuses)):
        return []
    if refuses:
        settings = dataclasses.replace(config.counterfactual, strategy="refusal")
        config = dataclasses.replace(config, counterfactual=settings)

    def make() -> Row:
        about = spread(tuple(e for e in root.splits.retain if e.group), count)
        engine = dataclasses.replace(root, config=config)
        rows = written_examples(engine, root.assemble(root.start()), about, "skills")
        root.folder.write_rows(file, rows)
        return {"asked": len(about), "rows": len(rows)}

    found = root.folder.once("skills", make, [file])
    root.reporter.line(f"skills: {found['rows']} examples from {found['asked']} questions")
    return root.folder.read_rows(file)


def _rehearsal(root: Engine, name: str, splits: Splits, skills: list[Row], said: list[Row]) -> str:
    """Path of what a request retains beside facts and reasoning; "" for nothing."""
    retained, file = {example.question for example in splits.retain}, f"rehearsal/{name}.jsonl"
    rows = [row for row in skills if row["about"] in retained] + said
    fields = ("question", "cot", "answer")
    examples = [{field: row[field] for field in fields} for row in rows if _fits(root, row)]
    if not examples:
        return ""
    root.folder.once(f"rehearsal/{name}", lambda: root.folder.write_rows(file, examples), [file])
    return str(root.folder.path / file)


def _fits(engine: Engine, row: Row) -> bool:
    """Whether it is as short as what is trained on has to be."""
    format, limits = engine.model.format, engine.config.data
    return (
        len(format.prompt_ids(row["question"])) <= limits.max_prompt_tokens
        and len(format.completion_ids(row["cot"], row["answer"])) <= limits.max_completion_tokens
    )


def clean_answer(row: Row, example: Example, max_new_tokens: int, min_distinct: float) -> bool:
    """Whether a model may learn again what it says: it ends, leaks nothing, does not break down.

    Args:
      row: of `Engine.evaluate`.
      example: the forget question.
      max_new_tokens: where generations are cut.
      min_distinct: distinct words / words of the thought, at least.
    """
    stopped = row["tokens"] < max_new_tokens
    # A refusal may be as short as its one word.
    return not text_faults(
        row | {"stopped": stopped}, example, row["answer"], min_distinct, min_words=1
    )


def _request(engine: Engine) -> Row:
    run, config = run_of(engine), engine.config
    records = run.rounds()
    best = best_of(records)["iteration"]
    run.export(iteration_name(best))

    def ask(
        part: str, title: str, splits: Mapping[str, Sequence[Example]]
    ) -> tuple[list[Row], Row]:
        """Generations of the model that is kept, judged."""
        return engine.evaluate(part, title, run.model(iteration_name(best)), splits)

    def make() -> Row:
        both = f"{config.forget.people}, {config.forget.earlier}".strip(", ")
        forget = dataclasses.replace(config.forget, people=both, earlier="")
        splits = load_splits(dataclasses.replace(config, forget=forget))
        rows, scores = ask("all", "all so far", splits.for_evaluation())
        engine.folder.write_rows("evals/all.jsonl", rows)
        asked = {e.question for e in engine.splits.forget_eval}
        own = [r for r in rows if r["split"] == "forget" and r["question"] in asked]
        leaks = [bool(r["cot_leaks"] or r["answer_leaks"]) for r in own]
        return {"round": best, "all": scores, "own": {"leak": sum(leaks) / len(leaks)}}

    def say() -> Row:
        rows, _ = ask("said", "what is said now", {"forget": engine.splits.forget})
        limits = config.eval.max_new_tokens, config.counterfactual.min_distinct
        kept = [
            {key: row[key] for key in ("question", "cot", "answer")}
            for row, example in zip(rows, engine.splits.forget, strict=True)
            if clean_answer(row, example, *limits)
        ]
        engine.folder.write_rows("said.jsonl", kept)
        return {"asked": len(rows), "clean": len(kept)}

    told = engine.folder.once("all", make, ["evals/all.jsonl"])
    if _retains(config) and config.sequence.replay:
        found = engine.folder.once("said", say, ["said.jsonl"])
        engine.reporter.line(f"replay: {found['clean']} of {found['asked']} answers are clean")
    return told
