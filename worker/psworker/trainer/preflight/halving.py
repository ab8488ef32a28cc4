"""Whether loss() is a sum: the loss_sum and weight of a batch must be those of its two halves added."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from pscluster.errors import LossContractError, TaskError
from psworker.trainer.data.batches import generators_checksum, seed_step
from psworker.trainer.preflight.noise import Recording, Replaying
from psworker.trainer.preflight.probe import Probe

# A mean for a sum is wrong by a factor of two; honest float32 sums differ by about 1e-6, bf16 ones by its 8 bits.
_TOLERANCE, _NARROW_TOLERANCE = 1e-3, 3e-2
_LEAST_OF_A_MEAN, _MOST_OF_A_MEAN = 1.5, 3.0  # both halves by the whole: 2, and noise
_NOISE_SEEDS = 8
_ACTION = (
    "return (sum of the losses, number of losses), not their mean; where the loss couples the samples of a batch on "
    "purpose, set loss_adds_up = False in the task"
)


@dataclass(frozen=True, kw_only=True)
class _Halves:
    """(loss_sum, weight) of a batch and of its two halves. `noisy`: whether computing the whole drew random numbers."""

    whole: tuple[float, float]
    left: tuple[float, float]
    right: tuple[float, float]
    noisy: bool = False

    def parts(self, place: int) -> float:
        return self.left[place] + self.right[place]

    def adds_up(self, tolerance: float) -> bool:
        return self.is_sum(0, tolerance) and self.is_sum(1, _TOLERANCE)

    def is_sum(self, place: int, tolerance: float) -> bool:
        """Relative to the largest of the three: halves of opposite signs may leave a whole of little but rounding."""
        scale = max(abs(self.whole[place]), abs(self.left[place]), abs(self.right[place]))
        return (
            self.whole[place] == self.parts(place) or not abs(self.whole[place] - self.parts(place)) > tolerance * scale
        )

    def is_mean(self) -> bool:
        """Whether the loss, or the weight, of the whole is about that of each half."""
        return any(self.whole[n] and _LEAST_OF_A_MEAN < self.parts(n) / self.whole[n] < _MOST_OF_A_MEAN for n in (0, 1))


def halves_add_up(probe: Probe, samples: Sequence[Any], *, is_pure: bool = True) -> tuple[None, str]:
    """Compare in eval mode, the halves with the random numbers that the whole drew. Without `is_pure` there may be
    others that the generators do not show.

    Raises LossContractError for a mean, or a wrong weight. Does not judge a loss that couples the samples of a batch,
    as in-batch negatives do, nor one whose random numbers cannot be divided; the detail then says so."""
    if len(samples) < 2:
        return None, "skipped: a microbatch has one sample"
    if not probe.task.loss_adds_up:
        return None, "skipped: the task says loss_adds_up = False"
    tolerance = _NARROW_TOLERANCE if probe.spec.train.autocast else _TOLERANCE
    try:
        found = _halved(probe, samples, 0)
        if found.noisy or not is_pure:
            return None, _judge_noisy(probe, samples, found, tolerance)
        return None, _judge(probe, samples, found, tolerance)
    except TaskError as error:
        if type(error) is not TaskError:
            raise
        # The model computes losses in train mode only, or batches of one size only.
        return None, f"skipped: {error.cause} for a batch or half of it in eval mode"


def _judge(probe: Probe, samples: Sequence[Any], found: _Halves, tolerance: float) -> str:
    if found.adds_up(tolerance):
        return _sum_of(found)
    if found.is_mean():
        raise _error(samples, found)
    other = _halved(probe, [*samples[::2], *samples[1::2]], 0, middle=len(samples[::2]))
    parts, others = found.parts(0), other.parts(0)
    if len(samples) > 2 and not abs(parts - others) > tolerance * max(abs(parts), abs(others)):
        raise _error(samples, found)  # whatever is with a sample, it counts the same: wrong by a factor
    return "skipped: the loss couples the samples of a batch; loss_adds_up = False in the task would say so"


def _judge_noisy(probe: Probe, samples: Sequence[Any], found: _Halves, tolerance: float) -> str:
    """A mean is one whatever is drawn; where one draw tells it from a sum, it is a sum or cannot be judged."""
    if found.adds_up(tolerance):
        return f"{_sum_of(found)}, with the same random numbers"
    in_order = _halved(probe, samples, 0, replay=False)
    if in_order.adds_up(tolerance):
        return f"{_sum_of(in_order)}, with the same random numbers"
    if all(_halved(probe, samples, seed).is_mean() for seed in range(_NOISE_SEEDS)):
        raise _error(samples, found)
    return "skipped: draws noise that cannot be divided between the halves of a batch"


def _halved(probe: Probe, samples: Sequence[Any], seed: int, *, middle: int = 0, replay: bool = True) -> _Halves:
    """The generators are not seeded between the halves: what draws for one sample after another, in collate() or by
    numpy, draws the same for them as for the whole. What draws for all at once does so by `replay`."""
    middle, size = middle or len(samples) // 2, len(samples)
    halves = [(0, middle), (middle, size)]
    whole, noisy = _seeded(probe, samples, seed)
    recording = Recording()
    if noisy and replay:
        with recording:
            whole, _ = _seeded(probe, samples, seed)
    seed_step(probe.spec.train.seed, 0, seed)
    parts = []
    for first, stop in halves:
        with Replaying(recording.drawn, first, stop, size) if noisy and replay else nullcontext():
            parts.append(probe.loss_in_eval(samples[first:stop]))
    return _Halves(whole=whole, left=parts[0], right=parts[1], noisy=noisy)


def _seeded(probe: Probe, samples: Sequence[Any], seed: int) -> tuple[tuple[float, float], bool]:
    """(loss_sum, weight) from seeded generators, and whether they were used."""
    seed_step(probe.spec.train.seed, 0, seed)
    before = generators_checksum()
    return probe.loss_in_eval(samples), generators_checksum() != before


def _error(samples: Sequence[Any], found: _Halves) -> LossContractError:
    (whole, weight), (left, left_weight), (right, right_weight) = found.whole, found.left, found.right
    if not found.is_sum(1, _TOLERANCE):
        cause = (
            f"the weight of {len(samples)} samples is {weight:g}, but those of its halves are {left_weight:g} + "
            f"{right_weight:g}: the weight must count what was summed"
        )
    else:
        cause = (
            f"the loss_sum of {len(samples)} samples is {whole:.6g}, but those of its halves are {left:.6g} + "
            f"{right:.6g}: " + ("loss() returns a mean" if found.is_mean() else "loss() is not a sum over samples")
        )
    return LossContractError(cause, action=_ACTION)


def _sum_of(found: _Halves) -> str:
    return f"{found.whole[0]:.6g} = {found.left[0]:.6g} + {found.right[0]:.6g}"
