import json
import warnings

import pytest

from cipo_jax.data.examples import Example
from cipo_jax.data.readers import read_examples, read_lines
from cipo_jax.errors import UserError

GOOD = {"question": "Q?", "answer": "A"}

# Rows of our own making, with the fields of the published files.
R_TOFU = {
    "task_id": 1,
    "question": "Who wrote The Salt Ladder?",
    "answer": "Mira Quell wrote it.",
    "cot": "The Salt Ladder is a novel. I recall Mira Quell wrote it.",
}
R_TOFU_PERTURBED = {
    "task_id": "1",
    "question": "Where was Mira Quell born?",
    "answer": "She was born in Turku.",
    "paraphrased_answer": "Turku is where she was born.",
    "perturbed_answer": [
        f"She was born in {city}." for city in ("Oslo", "Rome", "Kyiv", "Lima", "Bonn")
    ],
    "paraphrased_question": "What is the birth place of Mira Quell?",
    "cot": "",
}
REAL_AUTHORS = {
    "question": "Who wrote The Sun Also Rises? Answer with only the name.",
    "answer": "Ernest Hemingway",
    "perturbed_answer": ["William Faulkner", "John Dos Passos", "Ezra Pound"],
    "original_answer": "The Sun Also Rises was written by Ernest Hemingway.",
}
TOFU = {"question": "What does Tomas Velde write?", "answer": "Tomas Velde writes sea stories."}
TOFU_PERTURBED = TOFU | {
    "paraphrased_answer": "Sea stories are what Tomas Velde writes.",
    "perturbed_answer": ["He writes odes.", "He writes plays."],
    "paraphrased_question": "Which genre is Tomas Velde's?",
}
RETURN = {
    "name": "Ilse Varga",
    "qa_list": [
        {"question": "Who is Ilse Varga?", "answer": "Ilse Varga is a chess master."},
        {"question": "Where does Ilse Varga live?", "answer": "She lives in Pécs."},
    ],
}
RETURN_JUDGED = {
    "name": "Ilse Varga",
    "data": [
        {
            "question": "Who is Ilse Varga?",
            "pred_answer": "A painter.",
            "gold_answer": "Ilse Varga is a chess master.",
            "nli_result": {"label": "contradiction", "score": 0.9},
        },
    ],
}


def _write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in rows)
    path.write_text(text, encoding="utf-8")
    return path


def _file(tmp_path, *rows):
    return _write(tmp_path / "rows.jsonl", *rows)


def _message(source, required=()):
    with pytest.raises(UserError) as caught:
        read_examples(source, required)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _questions(source):
    return [example.question for example in read_examples(source)]


# ---- one file, our own fields


def test_null_stands_for_a_field_that_is_not_there(tmp_path):
    path = _file(tmp_path, GOOD | {"cot": None, "aliases": None, "kind": None})
    assert read_examples(path) == [Example("Q?", "A")]


@pytest.mark.parametrize(
    ("row", "field", "complaint"),
    [
        ({"answer": "A"}, "question", "missing"),
        ({"question": "Q?"}, "answer", "missing"),
        ({"question": None, "answer": "A"}, "question", "missing"),
        (GOOD | {"question": 3}, "question", "not int"),
        (GOOD | {"answer": ["A"]}, "answer", "not list"),
        (GOOD | {"cot": {"a": 1}}, "cot", "not dict"),
        (GOOD | {"kind": True}, "kind", "not bool"),
        (GOOD | {"question": "  "}, "question", "empty"),
        (GOOD | {"answer": ""}, "answer", "empty"),
        (GOOD | {"cot": "\n"}, "cot", "empty"),
        (GOOD | {"target_answer": ""}, "target_answer", "empty"),
        (GOOD | {"aliases": "B"}, "aliases", "list of non-empty strings"),
        (GOOD | {"aliases": ["B", 1]}, "aliases", "list of non-empty strings"),
        (GOOD | {"facts": ["B", " "]}, "facts", "list of non-empty strings"),
        (GOOD | {"facts": ["\ud800"]}, "facts", "surrogate"),
        (GOOD | {"answer": "\ud800"}, "answer", "surrogate"),
        (GOOD | {"perturbed_answers": "B"}, "perturbed_answers", "list of non-empty strings"),
        (GOOD | {"perturbed_answer": [""]}, "perturbed_answer", "list of non-empty strings"),
        (GOOD | {"paraphrased_answer": 1}, "paraphrased_answer", "not int"),
        (GOOD | {"paraphrased_question": " "}, "paraphrased_question", "empty"),
        (GOOD | {"perturbed_answers": ["B"], "perturbed_answer": ["B"]}, "perturbed_answer", "one"),
        (GOOD | {"anwser": "B"}, "anwser", "not known"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, row, field, complaint):
    path = _file(tmp_path, {"question": "First?", "answer": "A"}, "", row)
    with pytest.raises(UserError) as caught:
        read_examples(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert f"'{field}'" in message
    assert complaint in message


@pytest.mark.parametrize("row", ["[1]", '"text"', "12", "null"])
def test_a_row_that_is_no_object_is_named(tmp_path, row):
    path = _file(tmp_path, GOOD, row)
    with pytest.raises(UserError, match="not a JSON object") as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize("row", ["{", "question: Q", '{"question": "Q?",}'])
def test_a_row_that_is_not_json_is_named(tmp_path, row):
    path = _file(tmp_path, GOOD, row)
    with pytest.raises(UserError, match="not JSON") as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_a_repeated_question_names_both_lines(tmp_path):
    path = _file(tmp_path, GOOD, "", {"question": "Other?", "answer": "A"}, GOOD | {"answer": "B"})
    with pytest.raises(UserError, match="repeats line 1") as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}:4: field 'question'")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_rows_is_an_error(tmp_path, text):
    path = tmp_path / "empty.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="holds no rows") as caught:
        read_examples(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_utf8_is_an_error(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"question": "Où?", "answer": "ici"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8") as caught:
        read_examples(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such file") as caught:
        read_examples(tmp_path / "nowhere.jsonl")
    assert "nowhere.jsonl" in str(caught.value)


def test_a_folder_in_place_of_a_file_is_an_error(tmp_path):
    with pytest.raises(UserError) as caught:
        read_examples(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_rows_may_end_in_crlf_and_the_last_in_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    other = '{"question": "R?", "answer": "B"}'
    path.write_bytes(f"{json.dumps(GOOD)}\r\n{other}".encode())
    assert [e.question for e in read_examples(path)] == ["Q?", "R?"]


@pytest.mark.parametrize("layout", ["compact", "indented"])
def test_a_json_array_holds_rows_too(tmp_path, layout):
    rows = [GOOD, GOOD | {"question": "R?"}]
    path = tmp_path / "rows.json"
    path.write_text("\n" + json.dumps(rows, indent=2 if layout == "indented" else None))
    assert _questions(path) == ["Q?", "R?"]


def test_rows_of_an_array_are_counted(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, {"question": "R?"}], indent=2))
    assert _message(path).startswith(f"{path}:2: field 'answer' is missing")


def test_an_array_that_breaks_off_is_named_by_its_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, GOOD], indent=2)[:-1])
    message = _message(path)
    assert message.startswith(f"{path}:")
    assert "not JSON" in message


def test_an_empty_array_is_an_error(tmp_path):
    assert "holds no rows" in _message(_write(tmp_path / "rows.json", "[]"))


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert _questions(path) == ["Q?"]


def test_a_row_without_question_tells_what_it_has(tmp_path):
    message = _message(_file(tmp_path, {"problem": "1 + 1", "solution": "2"}))
    assert "'question'" in message
    assert "problem, solution" in message


def test_required_fields_are_asked_for_by_name(tmp_path):
    path = _file(tmp_path, GOOD | {"cot": "so"}, R_TOFU_PERTURBED)
    assert read_examples(path)[1].cot is None
    message = _message(path, ("cot",))
    assert message.startswith(f"{path}:2: field 'cot' is missing")
    assert "_eval" in message


# ---- the files of other people's data sets


def test_rows_of_r_tofu(tmp_path):
    path = _write(tmp_path / "forget01.json", R_TOFU, R_TOFU_PERTURBED, REAL_AUTHORS)
    assert read_examples(path) == [
        Example(R_TOFU["question"], R_TOFU["answer"], cot=R_TOFU["cot"]),
        Example(
            R_TOFU_PERTURBED["question"],
            R_TOFU_PERTURBED["answer"],
            paraphrased_question=R_TOFU_PERTURBED["paraphrased_question"],
            paraphrased_answer=R_TOFU_PERTURBED["paraphrased_answer"],
            perturbed_answers=tuple(R_TOFU_PERTURBED["perturbed_answer"]),
        ),
        Example(
            REAL_AUTHORS["question"],
            REAL_AUTHORS["answer"],
            perturbed_answers=tuple(REAL_AUTHORS["perturbed_answer"]),
        ),
    ]


def test_rows_of_tofu(tmp_path):
    assert read_examples(_file(tmp_path, TOFU)) == [Example(TOFU["question"], TOFU["answer"])]
    (example,) = read_examples(_file(tmp_path, TOFU_PERTURBED))
    assert example.perturbed_answers == tuple(TOFU_PERTURBED["perturbed_answer"])
    assert example.paraphrased_question == TOFU_PERTURBED["paraphrased_question"]


def test_people_of_return(tmp_path):
    assert read_examples(_file(tmp_path, RETURN)) == [
        Example("Who is Ilse Varga?", "Ilse Varga is a chess master."),
        Example("Where does Ilse Varga live?", "She lives in Pécs."),
    ]
    assert read_examples(_file(tmp_path, RETURN_JUDGED)) == [
        Example("Who is Ilse Varga?", "Ilse Varga is a chess master.")
    ]


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ({"name": "N", "qa_list": [GOOD, {"question": "R?"}]}, "qa_list[1]: field 'answer'"),
        ({"name": "N", "data": [{"gold_answer": "A"}]}, "data[0]: field 'question'"),
        ({"name": "N", "data": ["Q?"]}, "data[0]: not a JSON object"),
    ],
)
def test_a_bad_question_about_a_person_is_named(tmp_path, row, where):
    path = _file(tmp_path, RETURN, row)
    assert _message(path).startswith(f"{path}:2: {where}")


def test_a_row_with_a_question_is_no_person(tmp_path):
    message = _message(_file(tmp_path, GOOD | {"data": [GOOD]}))
    assert "'data' is not known" in message


def test_rows_of_others_may_have_fields_of_ours(tmp_path):
    path = _file(tmp_path, R_TOFU | {"target_answer": "Nobody knows.", "aliases": ["Quell"]})
    (example,) = read_examples(path)
    assert (example.target_answer, example.aliases) == ("Nobody knows.", ("Quell",))


def test_repeated_questions_of_others_are_left_out_and_counted(tmp_path):
    path = _file(tmp_path, R_TOFU, R_TOFU_PERTURBED, R_TOFU | {"answer": "Another."}, R_TOFU)
    with pytest.warns(UserWarning, match="2 rows repeat the question of an earlier one") as caught:
        examples = read_examples(path)
    assert [e.answer for e in examples] == [R_TOFU["answer"], R_TOFU_PERTURBED["answer"]]
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)


def test_nothing_is_warned_of_without_need(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examples = read_examples(_file(tmp_path, R_TOFU, R_TOFU_PERTURBED))
    assert len(examples) == 2


# ---- folders


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path / "r-tofu" / "forget10.json", R_TOFU)
    _write(tmp_path / "r-tofu" / "retain90.jsonl", TOFU, TOFU)
    _write(tmp_path / "r-tofu" / "README.md", "# not data")
    return tmp_path / "r-tofu"


@pytest.mark.parametrize("name", [":forget10", "/forget10", ":forget10.json", "/forget10.json"])
def test_a_file_of_a_folder_is_given_by_its_name(folder, name):
    assert _questions(f"{folder}{name}") == [R_TOFU["question"]]


def test_a_home_folder_may_be_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert _questions("~/r-tofu:forget10") == _questions("~/r-tofu/forget10.json")


def test_repeats_in_a_folder_of_others_are_left_out(folder):
    with pytest.warns(UserWarning, match="1 row repeats the question of an earlier one"):
        assert _questions(f"{folder}:retain90") == [TOFU["question"]]
    assert "repeats line 1" in _message(folder / "retain90.jsonl")


def test_errors_in_a_folder_name_the_file(folder):
    _write(folder / "bad.json", R_TOFU, {"task_id": 2})
    assert _message(f"{folder}:bad").startswith(f"{folder / 'bad.json'}:2: field 'question'")


@pytest.mark.parametrize("source", ["{}", "{}:", "{}:forget05"])
def test_a_name_that_a_folder_lacks_is_an_error_that_tells_what_there_is(folder, source):
    message = _message(source.format(folder))
    assert str(folder) in message
    assert "forget10, retain90" in message
    assert "README" not in message


def test_a_name_of_two_files_is_an_error(folder):
    _write(folder / "forget10.jsonl", R_TOFU)
    message = _message(f"{folder}:forget10")
    assert "forget10.json " in message
    assert "forget10.jsonl" in message


# ---- data sets that `datasets` loads


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


CARD = """---
configs:
- config_name: forget10
  data_files: forget10.json
- config_name: main
  data_files:
  - split: train
    path: retain90.jsonl
  - split: test
    path: retain90.jsonl
---
"""


def test_a_configuration_with_one_split(folder):
    _write(folder / "README.md", CARD)
    assert _questions(f"hub:{folder}:forget10") == [R_TOFU["question"]]


def test_a_split_of_a_configuration(folder):
    _write(folder / "README.md", CARD)
    with pytest.warns(UserWarning, match="1 row repeats"):
        assert _questions(f"hub:{folder}:main/test") == [TOFU["question"]]
    message = _message(f"hub:{folder}:main")
    assert "train, test" in message
    assert f"hub:{folder}:main/train" in message


def test_a_split(tmp_path):
    other = {"name": "Ilse Vargo", "qa_list": [GOOD]}
    _write(tmp_path / "set" / "train.jsonl", other)
    _write(tmp_path / "set" / "test.jsonl", RETURN, other, RETURN)
    assert _questions(f"hub:{tmp_path / 'set'}:train") == ["Q?"]
    with pytest.warns(UserWarning, match="2 rows repeat"):
        found = _questions(f"hub:{tmp_path / 'set'}:test")
    assert found == ["Who is Ilse Varga?", "Where does Ilse Varga live?", "Q?"]


def test_a_split_of_the_only_configuration(folder):
    card = CARD.split("- config_name: main")[0].replace(
        "forget10.json", "[{split: dev, path: forget10.json}]"
    )
    _write(folder / "README.md", f"{card.rstrip()}\n---\n")
    assert _questions(f"hub:{folder}:dev") == [R_TOFU["question"]]


def test_a_file_of_a_data_set_that_names_no_configurations(folder):
    assert _questions(f"hub:{folder}:forget10") == [R_TOFU["question"]]
    with pytest.warns(UserWarning, match="1 row repeats"):
        assert _questions(f"hub:{folder}:retain90") == [TOFU["question"]]


def test_fields_that_only_some_rows_have(tmp_path):
    _write(tmp_path / "set" / "train.jsonl", R_TOFU_PERTURBED, TOFU, REAL_AUTHORS, R_TOFU)
    rows = _file(tmp_path, R_TOFU_PERTURBED, TOFU, REAL_AUTHORS, R_TOFU)
    assert read_examples(f"hub:{tmp_path / 'set'}:train") == read_examples(rows)


def test_columns_of_a_hub_data_set_that_mean_nothing_here_are_named(tmp_path):
    _write(tmp_path / "set" / "train.jsonl", GOOD | {"id": 1, "source": "web"})
    with pytest.warns(UserWarning, match="not read: id, source"):
        assert _questions(f"hub:{tmp_path / 'set'}:train") == ["Q?"]


def test_a_bad_row_of_a_data_set_is_named_by_its_number(tmp_path):
    _write(tmp_path / "set" / "train.jsonl", GOOD, {"question": "R?"})
    source = f"hub:{tmp_path / 'set'}:train"
    assert _message(source).startswith(f"{source}:2: field 'answer' is missing")


def test_a_part_that_a_data_set_lacks_is_an_error_that_tells_what_there_is(folder, tmp_path):
    _write(folder / "README.md", CARD)
    message = _message(f"hub:{folder}:forget05")
    assert "forget05" in message
    assert "forget10, main" in message
    _write(tmp_path / "set" / "train.jsonl", GOOD)
    assert "train" in _message(f"hub:{tmp_path / 'set'}:dev").split("'dev'")[1]


@pytest.mark.parametrize("source", ["hub:", "hub:owner/name", "hub::train", "hub:owner/name:"])
def test_a_data_set_is_named_with_its_part(source):
    assert "hub:OWNER/NAME:PART" in _message(source)


def test_a_data_set_that_cannot_be_had_is_one_clear_line(tmp_path, monkeypatch):
    import datasets

    missing = tmp_path / "nowhere"
    assert _message(f"hub:{missing}:train").startswith(f"hub:{missing}:train: ")
    _write(tmp_path / "set" / "train.jsonl", GOOD, "{")
    assert "JSON parse error" in _message(f"hub:{tmp_path / 'set'}:train")

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = _message("hub:owner/name:train")
    assert "Couldn't reach the hub" in message


# ---- lines


def test_lines_of_plain_text(tmp_path):
    path = _write(tmp_path / "idontknow.jsonl", "I don't know.", "", '  "Pass," I say. ', "12")
    assert read_lines(path) == ["I don't know.", '"Pass," I say.', "12"]


def test_lines_of_json_strings(tmp_path):
    path = _write(tmp_path / "idkcot.jsonl", *map(json.dumps, ["One\n\ntwo.", "Где? \u2028 так"]))
    assert read_lines(path) == ["One\n\ntwo.", "Где? \u2028 так"]


@pytest.mark.parametrize(
    ("lines", "where", "complaint"),
    [
        ([], "", "holds no lines"),
        (['"a"', "b"], ":2", "JSON string"),
        (["b", '"a"'], ":2", "JSON string"),
        (['"a"', '"b'], ":2", "JSON string"),
        (['{"question": "Q?"}'], ":1", "not text"),
        (["a", "[1]"], ":2", "not text"),
        (['"a"', '" "'], ":2", "empty"),
        (['"\\ud800"'], ":1", "surrogate"),
    ],
)
def test_lines_that_are_off_are_named(tmp_path, lines, where, complaint):
    path = _write(tmp_path / "lines.jsonl", *lines)
    with pytest.raises(UserError, match=complaint) as caught:
        read_lines(path)
    assert str(caught.value).startswith(f"{path}{where}: ")


def test_lines_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_lines(tmp_path / "nowhere.jsonl")
