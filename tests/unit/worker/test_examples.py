"""Every example is a spec that holds, and the model of one's own runs from its directory."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from pscluster.job.spec import load_spec
from psworker.trainer.preflight.prepare import prepare

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_spec_holds_with_enough_shards_for_its_workers(path: Path) -> None:
    spec = load_spec(path, ["train.max_steps=20"])

    assert spec.train.max_steps == 20
    assert spec.train.num_shards >= 4 >= (spec.workers.max or 4)


def test_the_own_model_passes_the_preflight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = shutil.copytree(EXAMPLES / "own-model", tmp_path / "own")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "task", raising=False)

    prepared = prepare(load_spec(directory / "spec.yaml"), directory, "cpu")

    assert all(check.ok for check in prepared.preflight.checks)


def test_the_own_model_learns_its_spirals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "task", raising=False)
    directory = shutil.copytree(EXAMPLES / "own-model", tmp_path / "own")
    prepared = prepare(load_spec(directory / "spec.yaml", ["task.args.points=512"]), directory, "cpu")
    task, model = prepared.task, prepared.model
    batch = task.collate([prepared.train[i] for i in range(512)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    for _ in range(150):
        loss, weight = task.loss(model, batch)
        optimizer.zero_grad()
        (loss / weight).backward()
        optimizer.step()

    right = task.metrics(model, batch)["right"]
    assert float(right) / 512 > 0.9
