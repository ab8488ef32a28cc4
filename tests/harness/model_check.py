"""A model check: visits every state that can be reached, and asks whether the end can be reached from each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, Generic, TypeVar

W = TypeVar("W")  # a state; immutable


class Model(ABC, Generic[W]):
    """What can happen next in a job of `steps` steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def key(self, w: W) -> Hashable:
        """Equal for states that need to be visited once."""
        return w

    @abstractmethod
    def is_over(self, w: W) -> bool:
        """Whether the job has ended as it should."""

    @abstractmethod
    def progress(self, w: W) -> Iterable[W]:
        """What happens by itself, sooner or later."""

    @abstractmethod
    def disturbances(self, w: W) -> Iterable[W]:
        """What a fault makes of it."""

    @abstractmethod
    def check(self, w: W) -> None:
        """Assert what must hold in every state."""


def put(items: tuple[Any, ...], place: int, item: Any) -> tuple[Any, ...]:
    return (*items[:place], item, *items[place + 1 :])


def explore(start: W, model: Model[W], max_states: int = 400_000) -> int:
    """Visit every state; returns how many. AssertionError for one in which the check fails, or from which the end
    cannot be reached without a further fault."""
    numbers: dict[Hashable, int] = {model.key(start): 0}
    comes_from: list[list[int]] = [[]]
    over: list[int] = []
    waiting: deque[tuple[int, W]] = deque([(0, start)])
    while waiting:
        number, world = waiting.popleft()
        model.check(world)
        if model.is_over(world):
            over.append(number)
        for following, is_progress in _next(world, model):
            key = model.key(following)
            known = numbers.get(key)
            if known is None:
                known = numbers[key] = len(numbers)
                assert known < max_states, "too many states"
                comes_from.append([])
                waiting.append((known, following))
            if is_progress:
                comes_from[known].append(number)
    if stuck := _cannot_reach(over, comes_from):
        first = next(key for key, number in numbers.items() if number == min(stuck))
        raise AssertionError(f"{len(stuck)} of {len(numbers)} states are stuck, first {first}")
    return len(numbers)


def _next(world: W, model: Model[W]) -> Iterator[tuple[W, bool]]:
    yield from ((following, True) for following in model.progress(world))
    yield from ((following, False) for following in model.disturbances(world))


def _cannot_reach(ends: list[int], comes_from: list[list[int]]) -> set[int]:
    reached, waiting = set(ends), list(ends)
    while waiting:
        for before in comes_from[waiting.pop()]:
            if before not in reached:
                reached.add(before)
                waiting.append(before)
    return set(range(len(comes_from))) - reached
