"""Evaluation adds the same numbers in the same order, however it is dealt."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pscluster.errors import TaskError
from pscluster.task import Task
from psworker.tasks.synthetic import SyntheticNorm
from psworker.trainer.data.batches import EvalBatches
from psworker.trainer.evaluation import (
    batch_statistics,
    evaluate,
    finalised,
    loss_of,
    pack_statistics,
    shard_statistics,
    unpack_metrics,
)


def held_out(task: SyntheticNorm, num_shards: int, microbatch: int = 4) -> EvalBatches:
    data = task.eval_data()
    assert data is not None
    return EvalBatches(data, task.collate, num_shards, microbatch, 0)


@pytest.mark.parametrize("weight", [np.float32(2), np.int64(2), np.array(2.0)[()], torch.tensor([2])])
def test_a_weight_is_any_real_number(weight: Any) -> None:
    class Weighted(Task):
        def loss(self, model: Any, batch: Any) -> Any:
            del model
            return batch.sum(), weight

    assert loss_of(Weighted(), torch.nn.Identity(), torch.ones(2))[1] == 2.0


def test_metrics_do_not_depend_on_how_batches_are_cut() -> None:
    task = SyntheticNorm()
    model = task.build_model()

    found = [evaluate(task, model, held_out(task, shards, size), "cpu") for shards, size in ((1, 48), (3, 4), (20, 4))]

    assert all(metrics["accuracy"] == found[0]["accuracy"] for metrics in found)
    assert all(math.isclose(metrics["loss"], found[0]["loss"], rel_tol=1e-6) for metrics in found)
    assert evaluate(task, model, held_out(task, 3), "cpu") == found[1]


def test_packing_and_unpacking_is_finalising() -> None:
    task = SyntheticNorm()
    model = task.build_model().eval()
    batch, _ = next(held_out(task, 1).of_shard(0))
    statistics = batch_statistics(task, model, batch)

    vector, shapes = pack_statistics(statistics)

    assert vector.dtype == np.float64
    assert unpack_metrics(task, vector, shapes) == finalised(task, statistics)
    with pytest.raises(TaskError, match="changed its shape"):
        unpack_metrics(task, vector[:-1], shapes)


def test_the_model_is_evaluated_in_eval_mode_and_then_put_back() -> None:
    task = SyntheticNorm()
    model = task.build_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    list(shard_statistics(task, model, held_out(task, 2), 1, "cpu"))

    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_shard_without_batches_yields_nothing() -> None:
    task = SyntheticNorm(held_out=4)

    assert list(shard_statistics(task, task.build_model(), held_out(task, 2), 1, "cpu")) == []


def test_statistics_that_change_their_shape_are_refused() -> None:
    class Growing(SyntheticNorm):
        calls = 0

        def metrics(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
            del model, batch
            self.calls += 1
            return {"confusion": torch.zeros(self.calls)}

    task = Growing()
    with pytest.raises(TaskError, match="changed its shape"):
        list(shard_statistics(task, task.build_model(), held_out(task, 1), 0, "cpu"))


def test_a_finalise_of_another_form_is_named() -> None:
    class Odd(SyntheticNorm):
        def finalise(self, statistics: Any) -> Any:
            return {"accuracy": statistics["confusion"]}

    task = Odd()
    with pytest.raises(TaskError, match=r"finalise\(\) returned a tensor of shape \(4, 4\)"):
        evaluate(task, task.build_model(), held_out(task, 1), "cpu")
