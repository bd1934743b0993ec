"""JSON and YAML from outside: plain values, or one line that names the place; nothing of the
interpreter's own limits reaches a person."""

import json
from itertools import pairwise

import pytest
from genrec_shards.dataset import load_info
from genrec_shards.errors import DataError
from genrec_shards.readers.documents import DEEPEST, parse_object, parse_yaml, read_object

DEEP = "[" * 200_000
DIGITS = "9" * 5_000


def refusal(parse, data, place="file.x:7") -> str:
    with pytest.raises(DataError) as caught:
        parse(data, place)
    message = str(caught.value)
    assert message.startswith(place)
    assert message.isprintable()
    assert len(message) < 300
    return message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (DEEP, "nested more than 100 deep"),
        ('{"a": ' * 200_000, "nested more than 100 deep"),
        ('{"a": ' + "[" * DEEPEST + "1" + "]" * DEEPEST + "}", "nested more than 100 deep"),
        ('{"a": ' + DIGITS + "}", "a number of more than 300 digits"),
        ('{"a": ' + DIGITS[:400] + "}", "a number of more than 300 digits"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ('{"\\udfff": 1}', "half a surrogate pair"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "1e999 is no number"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff"),
        ("[1]", "not a JSON object"),
        ("", "Expecting value: column 1"),
        ('{\n"a": }', "Expecting value: line 2, column 6"),
    ],
)
def test_json_that_nothing_could_use_is_one_line(text, reason):
    assert f"not JSON ({reason}" in refusal(parse_object, text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: " + DEEP, "nested more than 100 deep"),
        ("a: &x [*x]", "nested more than 100 deep"),
        ("a: " + DIGITS, "a number of more than 300 digits"),
        ('a: "\\ud800"', "half a surrogate pair"),
        ("a: 2001-13-45", "month must be in 1..12"),
        ('!!int ""', "a value does not fit its tag"),
        ("!!timestamp x", "a value does not fit its tag"),
        (":".join(["1"] * 2000) + ".0", "too large"),
        ("a: \0", "the character U+0000"),
        (b"a: \xe9", "not UTF-8: byte 0xe9"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
    ],
)
def test_yaml_that_nothing_could_use_is_one_line(text, reason):
    assert reason in refusal(parse_yaml, text)


def test_aliases_unfold_to_no_more_than_the_text_holds():
    laughs = ["- &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    laughs += [f"- &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghi")]
    assert "aliases unfold" in refusal(parse_yaml, "\n".join(laughs))
    shared = "stage: &s {epochs: 2, learning_rate: 1.0e-3}\nfinetune: *s\npretrain: *s\n"
    assert len({str(part) for part in parse_yaml(shared, "r.yaml").values()}) == 1


def test_a_yaml_error_names_file_and_line():
    message = refusal(parse_yaml, "a: [1,\nb: }", "recipe.yaml")
    assert message == "recipe.yaml:2: not YAML (expected the node content, but found '}')"


def test_what_is_allowed_is_read_as_json_reads_it(tmp_path):
    values = {"a": [1.5, None, True, "日本 𝄞"], "b": {"c": 10**300, "d": -(2**63)}}
    values["deep"] = json.loads("[" * (DEEPEST - 1) + "]" * (DEEPEST - 1))
    for text in (json.dumps(values), json.dumps(values, ensure_ascii=False)):
        (tmp_path / "x.json").write_text("\ufeff" + text, encoding="utf-8")
        assert read_object(tmp_path / "x.json") == values


@pytest.mark.parametrize("text", ['{"a": ' + DEEP, '{"format_version": NaN}', '{"appended": [1]}'])
def test_a_dataset_json_from_outside_is_refused_by_name(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset\.json: not a dataset\.json of this program"):
        load_info(tmp_path / "dataset.json")
