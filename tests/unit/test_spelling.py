"""Which word is suggested for one that does not exist, and that a far one is not."""

from __future__ import annotations

import pytest

from pscluster.cli.main import psctl
from pscluster.spelling import did_you_mean, distance, nearest

VERBS = frozenset(psctl.commands)
KEYS = ("global_batch", "microbatch", "epochs", "max_steps", "optimizer", "clip_norm", "seed")


@pytest.mark.parametrize(
    ("one", "other", "mistakes"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("same", "same", 0),
        ("wait", "wit", 1),
        ("sumbit", "submit", 1),
        ("get", "generate", 5),
    ],
)
def test_a_distance_counts_letters_and_swaps(one: str, other: str, mistakes: int) -> None:
    assert distance(one, other) == distance(other, one) == mistakes


@pytest.mark.parametrize(
    ("word", "verb"),
    [
        ("sumbit", "submit"), ("SUBMIT", "submit"), ("lsit", "list"), ("pu", "up"), ("lst", "list"), ("log", "logs"),
        ("node", "nodes"),
        ("desc", "describe"), ("evaluate", "eval"), ("exprot", "export"), ("delet", "delete"), ("gen", "generate"),
    ],
)  # fmt: skip
def test_a_misspelt_or_abbreviated_verb_is_recognised(word: str, verb: str) -> None:
    assert nearest(word, VERBS) == verb


@pytest.mark.parametrize(
    "word", ["get", "top", "run", "import", "create", "cancel", "start", "ls", "u", "", "x" * 100_000]
)
def test_a_verb_of_another_program_suggests_none(word: str) -> None:
    assert nearest(word, VERBS) is None


@pytest.mark.parametrize(
    ("word", "key"),
    [("max_stesp", "max_steps"), ("max", "max_steps"), ("epoch", "epochs"), ("batch", "global_batch"),
     ("global-batch", "global_batch"), ("lr", None), ("learning_rate", None)],
)  # fmt: skip
def test_a_key_is_recognised_by_its_beginning_or_a_part(word: str, key: str | None) -> None:
    assert nearest(word, KEYS) == key


def test_of_two_equally_near_words_it_is_always_the_same() -> None:
    assert nearest("modes", ["modem", "model"]) == nearest("modes", ["model", "modem"]) == "model"
    assert nearest("steps", ["max_steps", "every_steps"]) == "max_steps", "the shorter"
    assert nearest("model", ["model"]) is None, "nothing is wrong with it"


def test_a_message_ends_with_the_suggestion_or_as_it_is() -> None:
    assert did_you_mean("accurcy", ["loss", "accuracy"]) == "; did you mean accuracy?"
    assert did_you_mean("recall", ["loss", "accuracy"]) == ""
