"""Which known word a misspelt one may be: the rule behind every "did you mean".

Letters are wrong, missing, superfluous or swapped with their neighbour: one mistake in four letters is a misspelling.
Of a shorter word two are swapped, or one behind the first is missing: `lst` is `list`, but `top` is not `stop`.
"""

from __future__ import annotations

from collections.abc import Iterable

_LETTERS_PER_MISTAKE = 4
_SHORTEST_PART = 3  # a shorter beginning is no abbreviation
_FAR = 1 << 30


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` most likely stands for; None when none is likely. Case and `-` for `_` do not matter.

    First a misspelling, then a beginning of a known word, or a known word with more behind it (`desc`, `evaluate`),
    then a part of one (`batch` of `global_batch`). Of equals the shortest, then the first in the alphabet."""
    likely = [
        (*likeness, len(name), name)
        for name in known
        if name != word and (likeness := _likeness(_plain(word), _plain(name))) is not None
    ]
    return min(likely)[-1] if likely else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known word as the end of a message: "; did you mean submit?"; empty when none is near."""
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else ""


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")


def _likeness(word: str, name: str) -> tuple[int, int] | None:
    """(kind of likeness, number of mistakes), the smaller the likelier; None when they are not alike."""
    mistakes, allowed = _FAR, len(word) // _LETTERS_PER_MISTAKE
    if abs(len(word) - len(name)) <= max(1, allowed):  # a foreign word may be long
        mistakes = distance(word, name)
    lacks_one = len(name) > len(word) >= _SHORTEST_PART and name[0] == word[0]
    if mistakes <= allowed or (mistakes == 1 and (lacks_one or sorted(word) == sorted(name))):
        return 0, mistakes
    shorter, longer = sorted((word, name), key=len)
    if len(shorter) >= _SHORTEST_PART and longer.startswith(shorter):
        return 1, len(longer) - len(shorter)
    if len(word) >= _SHORTEST_PART and word in name.split("_"):
        return 2, 0
    return None


def distance(one: str, other: str) -> int:
    """How many letters to replace, add, drop or swap with their neighbour: the optimal string alignment distance."""
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, wanted in enumerate(other, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]
