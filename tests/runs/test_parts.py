"""Items of a stage are kept one by one, whatever their order."""

import json

import pytest
from small_run import Text

from cipo_jax.errors import UserError
from cipo_jax.runs.parts import resumable_map


def _rows(item):
    return tuple(Text(item, f"r\u2028{i}") for i in range(2))


def _each(work):
    return lambda missing: ((item, work(item)) for item in missing)


def _never(missing):
    raise AssertionError("made again")


@pytest.fixture
def mapped(tmp_path):
    path = tmp_path / "parts" / "items.jsonl"

    def call(work, count=4, on_item=lambda rows, cached: None, after=lambda: None):
        return resumable_map(path, Text, count, work, on_item, after)

    call.path = path
    return call


EXPECTED = [_rows(item) for item in range(4)]


def test_an_item_without_rows_is_remembered_too(mapped):
    assert mapped(_each(lambda item: ()), 1) == [()]
    assert mapped(_never, 1) == [()]


def test_items_may_come_in_any_order_and_a_torn_line_is_made_again(mapped):
    def work(missing):
        for item in (2, 0):
            yield item, _rows(item)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        mapped(work)
    whole = mapped.path.read_bytes()
    mapped.path.write_bytes(whole + b'{"item": 1, "rows": [{"it')
    asked, seen = [], []

    def rest(missing):
        asked.extend(missing)
        return _each(_rows)(reversed(missing))

    assert (
        mapped(rest, on_item=lambda rows, cached: seen.append((rows[0].item, cached))) == EXPECTED
    )
    assert asked == [1, 3]
    assert seen == [(0, True), (2, True), (3, False), (1, False)]
    assert mapped.path.read_bytes().startswith(whole)
    assert mapped(_never) == EXPECTED


def test_an_item_is_in_the_file_before_it_is_reported(mapped):
    def on_item(rows, cached):
        lines = mapped.path.read_text(encoding="utf-8").split("\n")[:-1]
        assert json.loads(lines[-1])["item"] == rows[0].item

    assert mapped(_each(_rows), on_item=on_item) == EXPECTED


def test_what_stops_the_work_after_an_item_keeps_it(mapped):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mapped(_each(_rows), after=stop)
    asked = []

    def rest(missing):
        asked.extend(missing)
        return _each(_rows)(missing)

    assert mapped(rest) == EXPECTED
    assert asked == [1, 2, 3]


def test_rows_of_another_kind_are_refused_with_file_and_line(mapped):
    mapped(_each(_rows))
    lines = mapped.path.read_text(encoding="utf-8")
    mapped.path.write_text(lines.replace("text/1", "text/2", 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"items\.jsonl:1:.*schema.*another version of cipo_jax"):
        mapped(_never)
