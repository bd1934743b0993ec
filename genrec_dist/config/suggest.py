"""The known word that a mistyped one may have meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str], most: int = 2) -> str:
    """A question that goes behind the message about an unknown word.

    Args:
        word: what was given.
        known: what it could have been. Of dotted names the last parts are compared too, so that
            `learning_rate` finds `finetune.learning_rate`; so are first letters, as in `lr`.
        most: names in the question.

    Returns:
        "; did you mean `X` or `Y`?", or "" where nothing is close.
    """
    names = list(dict.fromkeys(known))
    found = get_close_matches(word, names, n=most, cutoff=0.75)
    last = word.rpartition(".")[2]
    by_last: dict[str, list[str]] = {}
    for name in names:
        by_last.setdefault(name.rpartition(".")[2], []).append(name)
    for close in get_close_matches(last, by_last, n=most, cutoff=0.75):
        found += by_last[close]
    found += [name for name in names if last == _initials(name.rpartition(".")[2])]
    # Names of the same section are the likelier ones.
    section = word.removesuffix(last)
    found.sort(key=lambda name: name.rpartition(".")[0] + "." != section)
    shown = [f"`{name}`" for name in dict.fromkeys(found)][:most]
    return f"; did you mean {' or '.join(shown)}?" if shown else ""


def _initials(name: str) -> str:
    """lr of learning_rate; of one word "", since a letter is close to anything."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""
