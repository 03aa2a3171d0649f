"""Work inside of a stage that is kept item by item, so that a killed process loses one item."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from cipo_jax.data.records import Record

R = TypeVar("R", bound=Record)

# From the items that are missing to (item, its records), in whatever order they come.
Work = Callable[[list[int]], Iterable[tuple[int, tuple[R, ...]]]]
# Called with each item's records and whether an earlier process had made them.
OnItem = Callable[[tuple[R, ...], bool], None]


def resumable_map(
    path: Path,
    kind: type[R],
    count: int,
    work: Work[R],
    on_item: OnItem[R],
    after: Callable[[], None],
) -> list[tuple[R, ...]]:
    """The records of `count` items in their order; each item's are kept as soon as they are there.

    Args:
      path: JSON Lines of the items that are done; made if it is not there.
      kind: class of the records.
      count: number of items.
      work: makes the items that are missing.
      on_item: reports an item.
      after: called after each item that was written; may raise to stop the work.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done: dict[int, tuple[R, ...]] = {}
    with path.open("ab+") as file:
        file.seek(0)
        whole = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):  # The process that wrote it was killed.
                break
            whole += len(line)
            item = json.loads(line)
            where = f"{path}:{number}"
            done[item["item"]] = tuple(kind.from_row(row, where) for row in item["rows"])
        file.truncate(whole)
        for index in sorted(done):
            on_item(done[index], True)
        missing = [index for index in range(count) if index not in done]
        for index, records in work(missing) if missing else ():
            row = {"item": index, "rows": [record.to_row() for record in records]}
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            done[index] = records
            on_item(records, False)
            after()
    return [done[index] for index in range(count)]
