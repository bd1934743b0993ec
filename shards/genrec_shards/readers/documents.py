"""JSON and YAML that someone else may have written: plain values, or one line that names the
place."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

from genrec_shards.errors import DataError

TOO_LONG = "a number of more than 300 digits: write it as text"  # no float is as large
DEEPEST = 100
"""Lists in lists, or objects in objects, that a document may hold."""


def read_object(path: str | Path, expected: str = "JSON", remedy: str = "") -> dict[str, Any]:
    """The JSON object in a file, as `parse_object`. Raises OSError too."""
    return parse_object(Path(path).read_bytes(), str(path), expected, remedy)


def parse_object(
    data: str | bytes, place: str, expected: str = "JSON", remedy: str = ""
) -> dict[str, Any]:
    """The JSON object in a text.

    Args:
        data: the text, or its bytes in UTF-8.
        place: the file, or file and line, as messages name it.
        expected: what the text is meant to be.
        remedy: the way out.

    Raises:
        DataError: one line `PLACE: not EXPECTED (reason): REMEDY` for what is no JSON or no object,
            is nested too deeply, or holds NaN, infinity, numbers of more than 300 digits or half
            a surrogate pair.
    """
    try:
        text = _decoded(data)
        try:
            found = json.loads(text, parse_constant=_finite, parse_float=_finite)
        except json.JSONDecodeError as error:
            line = f"line {error.lineno}, " if "\n" in text.strip() else ""
            raise ValueError(f"{error.msg}: {line}column {error.colno}") from None
        _check(found, len(text))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise _refusal(error, place, expected, remedy) from None
    return found


def parse_yaml(data: str | bytes, place: str, remedy: str = "") -> Any:
    """What a YAML text says; nothing in it is run. Arguments are those of `parse_object`. Raises
    DataError, one line `PLACE:LINE: not YAML (reason): REMEDY`, also for aliases that unfold to
    more than the text holds."""
    try:
        text = _decoded(data)
        found = yaml.safe_load(text)
        _check(found, len(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        here = f"{place}:{mark.line + 1}" if mark is not None and "\n" in text.strip() else place
        raise _refusal(ValueError(error.problem or error.context), here, "YAML", remedy) from None
    except yaml.reader.ReaderError as error:
        letter = f"the character U+{error.character:04X}: {error.reason}"
        raise _refusal(ValueError(letter), place, "YAML", remedy) from None
    except (ValueError, RecursionError, OverflowError) as error:
        raise _refusal(error, place, "YAML", remedy) from None
    except (LookupError, AttributeError, TypeError):  # of scalars that do not fit their tags
        raise _refusal(ValueError("a value does not fit its tag"), place, "YAML", remedy) from None
    return found


def _decoded(data: str | bytes) -> str:
    try:
        return data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{error.object[error.start]:02x}") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is no number")
    return number


def _check(found: Any, most: int) -> None:
    """Raise ValueError for values that nothing behind this could hold or print.

    Args:
        found: the values.
        most: how many there can be in a text of this length; aliases of YAML make more.
    """
    level = [found]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.keys()
                inner += value.values()
            elif isinstance(value, list | tuple | set):
                inner += value
            elif isinstance(value, int) and value.bit_length() > 1000:
                raise ValueError(TOO_LONG)
            elif isinstance(value, str) and not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError:
                    raise ValueError("half a surrogate pair, which is no text") from None
            if len(inner) > most:
                raise ValueError("its aliases unfold to more than the text holds")
        if not inner:
            return
        level = inner
    raise ValueError(f"nested more than {DEEPEST} deep")


def _refusal(error: Exception, place: str, expected: str, remedy: str) -> DataError:
    reason = str(error)
    if isinstance(error, RecursionError):
        reason = f"nested more than {DEEPEST} deep"
    elif "set_int_max_str_digits" in reason:  # Python's own limit, thousands of digits
        reason = TOO_LONG
    tail = f": {remedy}" if remedy else ""
    return DataError(f"{place}: not {expected} ({' '.join(reason.split())}){tail}")
