"""What methods learn from beside the data: thoughts, refusals, other answers of the model itself.

Each is a stage of the run folder, with a file that a person can read, made once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from cipo_jax.data.batches import Shape, TokenizedExample, shape_of
from cipo_jax.data.readers import read_examples
from cipo_jax.errors import UserError
from cipo_jax.sampling.sampler import Request, rules_of
from cipo_jax.typing import Params
from cipo_jax.unlearning.counterfactuals import counterfactuals_stage
from cipo_jax.unlearning.engine import Engine
from cipo_jax.unlearning.methods import Material, Method
from cipo_jax.unlearning.run_folder import Row


class Materials:
    """The materials of one run, or of several side by side.

    What is made depends on model, data, seed and the settings of counterfactuals alone.
    """

    def __init__(self, engine_of: Callable[[str], Engine], model: Callable[[], Params]):
        """Makes nothing yet.

        Args:
          engine_of: gives the engine whose folder keeps the stage of a name.
          model: gives the model to be unlearned.
        """
        self._engine_of, self._model = functools.cache(engine_of), model
        self._stages: set[str] = set()

    @property
    def _engine(self) -> Engine:
        """The engine, for what is the same whatever the stage: model, data, settings."""
        return self._engine_of("own")

    def rows(self, method: Method) -> list[Row]:
        """What a method's loss gets for each forget question, as ids.

        Returns:
          Rows {"item", "question", "forget": [prompt ids, completion ids]} and, where the method
          has a target, "target" in the same form. Questions without a target are left out; one
          with several has a row for each.
        """
        originals = self._originals()
        if method.target is None:
            targets: list[Row] = [{"item": i} for i in range(len(originals))]
        else:
            targets = self._targets(method.target, originals)
        span = self._engine.config.baseline.span
        rows = []
        for target in targets:
            item = target["item"]
            prompt, completion = originals[item]
            question = self._engine.splits.forget[item].question
            row = {"item": item, "question": question}
            rows.append(row | {"forget": self._spanned(prompt, completion, span)} | target)
        return rows

    def seconds(self, method: Method) -> float:
        """How long it took to make what a method learns from."""
        starts = {
            "counterfactual": "counterfactuals",
            "refusal": "refusals",
            "alternates": "alternates-",
            "own": "own",
        }
        start = starts.get(method.target or "", "\n")
        if method.loop == "iterative":
            start = "counterfactuals"
        spent = [
            self._engine_of(stage).folder.seconds().get(stage, 0.0)
            for stage in self._stages
            if stage.startswith(start)
        ]
        return sum(spent)

    # ---- the original

    def _prompts(self) -> list[list[int]]:
        encode = self._engine.model.format.prompt_ids
        return [encode(example.question) for example in self._engine.splits.forget]

    def _originals(self) -> list[tuple[list[int], list[int]]]:
        """(prompt, completion) of each forget question: the data's, or what the model says."""
        format, forget = self._engine.model.format, self._engine.splits.forget
        said = None if all(e.cot for e in forget) else self.own()
        found = []
        for i, (example, prompt) in enumerate(zip(forget, self._prompts(), strict=True)):
            if example.cot:
                found.append((prompt, format.completion_ids(example.cot, example.answer)))
            else:
                assert said is not None
                found.append((prompt, said[i]["ids"]))
        return found

    def _spanned(self, prompt: list[int], completion: list[int], span: str) -> list[list[int]]:
        """The part of a completion that a loss acts on; what comes before it joins the prompt."""
        start = self._engine.model.format.answer_start(completion)
        if span == "both" or start is None:  # A thought that is never closed is all there is.
            return [prompt, completion]
        if span == "cot":
            return [prompt, completion[:start]]
        return [prompt + completion[:start], completion[start:]]

    def own(self) -> list[Row]:
        """own.jsonl: what the model says to each forget question, greedily."""
        engine, file = self._engine_of("own"), "own.jsonl"
        self._stages.add("own")

        def make() -> None:
            prompts = self._prompts()
            requests = [Request(prompt, i) for i, prompt in enumerate(prompts)]
            drawn = engine.sample_rows(
                "own",
                "the model's own thoughts",
                self._model(),
                requests,
                rules_of(engine.model.format, engine.config.sampling.max_new_tokens),
                engine.key("own"),
                1,
            )
            asked = [{"question": e.question} for e in engine.splits.forget]
            rows = [q | samples[0] for q, samples in zip(asked, drawn, strict=True)]
            engine.folder.write_rows(file, rows)

        engine.folder.once("own", make, [file])
        return engine.folder.read_rows(file)

    # ---- what is to be said instead, or beside it

    def _targets(
        self, material: Material, originals: Sequence[tuple[list[int], list[int]]]
    ) -> list[Row]:
        engine, format = self._engine, self._engine.model.format
        settings = engine.config.counterfactual
        if material == "counterfactual":
            return self._traces("counterfactuals")
        if material == "refusal":
            path = engine.config.baseline.refusals
            if path:
                return self._read(path)
            return self._traces("refusals", strategy="refusal")
        if material == "alternates":
            count = engine.config.baseline.alternates
            drawn = [self._traces(f"alternates-{i}") for i in range(1, count + 1)]
            # Those of a question stand together.
            return sorted((row for rows in drawn for row in rows), key=lambda row: row["item"])
        if material == "own":
            length = engine.config.baseline.trace_tokens
            rows = []
            for item, said in enumerate(self.own()):
                end = format.answer_start(said["ids"]) or len(said["ids"])
                thought = said["ids"][: min(end, length)]
                rows.append({"item": item, "target": [originals[item][0], thought]})
            return rows
        sentence = settings.boundary_answer
        idk = format.completion_ids(sentence, sentence)
        if material == "idk":
            return [{"item": i, "target": [p, idk]} for i, (p, _) in enumerate(originals)]
        start = format.answer_start(idk)
        rows = []
        for i, (prompt, completion) in enumerate(originals):
            end = format.answer_start(completion)
            if end is not None:
                rows.append({"item": i, "target": [prompt + completion[:end], idk[start:]]})
        return rows

    def counterfactuals(self, name: str = "counterfactuals", **changes: str) -> list[Row]:
        """NAME.jsonl: the model's own traces to other answers.

        Args:
          name: of the stage; another name draws other numbers.
          **changes: to config.counterfactual.
        """
        engine = self._engine_of(name)
        self._stages.add(name)
        settings = dataclasses.replace(engine.config.counterfactual, **changes)
        config = dataclasses.replace(engine.config, counterfactual=settings)
        engine = dataclasses.replace(engine, config=config)
        return counterfactuals_stage(engine, self._model, name)

    def _traces(self, name: str, **changes: str) -> list[Row]:
        prompts = self._prompts()
        return [
            {"item": row["item"], "target": [prompts[row["item"]], row["completion_ids"]]}
            for row in self.counterfactuals(name, **changes)
            if row["accepted"]
        ]

    def _read(self, path: str) -> list[Row]:
        format, prompts = self._engine.model.format, self._prompts()
        by_question = {e.question: e for e in read_examples(path, ("cot",))}
        rows = []
        for item, example in enumerate(self._engine.splits.forget):
            refusal = by_question.get(example.question)
            if refusal is not None:
                ids = format.completion_ids(refusal.cot or "", refusal.answer)
                rows.append({"item": item, "target": [prompts[item], ids]})
        if not rows:
            raise UserError(f"{path}: has none of the forget questions in its field 'question'")
        return rows


def encoded(rows: Sequence[Row], group: str) -> tuple[list[TokenizedExample], Shape]:
    """Rows of "forget" or "target" for a batch, and the padded sizes that hold them all."""
    found = [TokenizedExample(*row[group]) for row in rows]
    return found, shape_of(found)
