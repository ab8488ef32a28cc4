"""The reference: a plain single-process PyTorch loop that adds the same microbatch gradients in tree order.

It shares the task, the sampler and the seeds with the product, and nothing of its layout, gate, wire or optimizer
pass: gradients are added per parameter, the optimizer is torch.optim's with fused=True.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from pscluster.job.spec import JobSpec, parse_spec
from pscluster.step.layout import parameters_sha256
from psworker.numerics import settle_numerics
from psworker.replica import named_bytes
from psworker.trainer.data.batches import Batches, EvalBatches, sampler_of, seed_step
from psworker.trainer.data.loading import build_model, load_task
from psworker.trainer.evaluation import evaluate


@dataclass
class Plain:
    """The results of the loop."""

    model: nn.Module
    digest: str
    losses: list[float] = field(default_factory=list)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)


@dataclass
class Leaf:
    """One microbatch: gradients by parameter name (None: untouched), loss, weight, buffers after it."""

    gradients: dict[str, torch.Tensor | None]
    loss: float
    weight: float
    buffers: dict[str, torch.Tensor]


def train_plainly(spec_data: Mapping[str, Any]) -> Plain:
    """Train to the end; deterministic, one thread."""
    spec = parse_spec(spec_data)
    settle_numerics(1, "cpu")
    task = load_task(spec, None)
    model = build_model(task)
    train, held_out = task.train_data(), task.eval_data()
    sampler = sampler_of(spec, len(train))
    batches = Batches(train, task.collate, sampler, spec.train.seed)
    final_step = sampler.final_step(spec.train.max_steps, spec.train.epochs)
    optimizer, schedule = _optimizer(model, spec, final_step)
    plain = Plain(model, "")
    for step in range(final_step):
        _freeze(model, spec, step)
        committed = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with _pulled(model, spec.network.pull_codec):
            leaves = [_microbatch(spec, task, model, batches, step, d, committed) for d in range(spec.train.num_shards)]
        weight = tree_sum([leaf.weight for leaf in leaves], lambda a, b: a + b)
        plain.losses.append(tree_sum([leaf.loss for leaf in leaves], lambda a, b: a + b) / weight)
        _set_gradients(model, leaves)
        _scale(model, weight, spec.train.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        _set_buffers(model, leaves, committed, weight)
        every = spec.evaluate.every_steps
        if held_out is not None and ((every and (step + 1) % every == 0) or step + 1 == final_step):
            held_out_batches = EvalBatches(
                held_out, task.collate, spec.train.num_shards, spec.train.microbatch, spec.train.seed
            )
            plain.evaluations[step + 1] = evaluate(task, model, held_out_batches, "cpu")
    plain.digest = parameters_sha256(named_bytes(dict(model.state_dict())))
    return plain


def _freeze(model: nn.Module, spec: JobSpec, step: int) -> None:
    """Parameters that the spec freezes require no gradient, until their step if they have one."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        steps = [at for glob, at in spec.train.unfreeze_at.items() if fnmatchcase(name, glob)]
        if steps or any(fnmatchcase(name, glob) for glob in spec.train.freeze):
            parameter.requires_grad_(bool(steps) and step >= min(steps))


@contextmanager
def _pulled(model: nn.Module, codec: str) -> Iterator[None]:
    """Within the block the parameters have the values that the pull codec gives."""
    exact = [parameter.data for parameter in model.parameters()]
    if codec == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    yield
    for parameter, data in zip(model.parameters(), exact, strict=True):
        parameter.data = data


def tree_sum(leaves: list[Any], add: Callable[[Any, Any], Any]) -> Any:
    """The sum over RFC 6962's tree, as in its definition."""
    if len(leaves) == 1:
        return leaves[0]
    left = 1 << ((len(leaves) - 1).bit_length() - 1)
    return add(tree_sum(leaves[:left], add), tree_sum(leaves[left:], add))


def _microbatch(
    spec: JobSpec, task: Any, model: nn.Module, batches: Batches, step: int, shard: int,
    committed: dict[str, torch.Tensor],
) -> Leaf:  # fmt: skip
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(committed[name])
    seed_step(spec.train.seed, step, shard)
    batch, num_samples = batches.microbatch(step, shard)
    model.train()
    loss, weight = 0.0, 0.0
    if num_samples:
        loss_sum, batch_weight = task.loss(model, batch)
        loss_sum.backward()
        loss, weight = float(loss_sum.detach()), float(batch_weight)
    gradients = {name: _pushed(p.grad, spec.network.push_codec) for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    return Leaf(gradients, loss, weight, {name: b.clone() for name, b in model.named_buffers()})


def _pushed(gradient: torch.Tensor | None, codec: str) -> torch.Tensor | None:
    """As the push codec rounds it; sums of such tensors are rounded by torch."""
    return gradient.bfloat16() if gradient is not None and codec == "bf16" else gradient


def _set_gradients(model: nn.Module, leaves: list[Leaf]) -> None:
    for name, parameter in model.named_parameters():
        found = [leaf.gradients[name] for leaf in leaves]
        if any(gradient is not None for gradient in found):
            zeros = next(torch.zeros_like(g) for g in found if g is not None)
            dense = [zeros if g is None else g for g in found]
            parameter.grad = tree_sum(dense, lambda a, b: a + b).float()


def _scale(model: nn.Module, weight: float, clip_norm: float | None) -> None:
    """Mean over the weight and clip by global norm, the norm from float64 sums (torch's own is float32)."""
    touched = [p.grad for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in touched)) / weight
    clip = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
    for gradient in touched:
        gradient.mul_(clip / weight)


def _set_buffers(model: nn.Module, leaves: list[Leaf], committed: dict[str, torch.Tensor], weight: float) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if not buffer.is_floating_point():
                buffer.copy_(leaves[0].buffers[name])
            elif any(not torch.equal(leaf.buffers[name], committed[name]) for leaf in leaves):
                buffer.copy_(
                    tree_sum([leaf.buffers[name] * leaf.weight for leaf in leaves], lambda a, b: a + b) / weight
                )
            else:
                buffer.copy_(committed[name])


def _optimizer(model: nn.Module, spec: JobSpec, final_step: int) -> tuple[torch.optim.Optimizer, Any]:
    options = spec.train.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": options.weight_decay},
        {
            "params": [p for p in model.parameters() if p.ndim < 2],
            "weight_decay": options.weight_decay if options.decay_norms_and_biases else 0.0,
        },
    ]
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True),
        "adam": lambda: torch.optim.Adam(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True),
        "sgd": lambda: torch.optim.SGD(
            groups, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov, fused=True
        ),
    }
    optimizer = kinds[options.name]()

    def ratio(step: int) -> float:
        plan = spec.train.schedule
        if step < plan.warmup_steps:
            return (step + 1) / plan.warmup_steps
        if plan.name == "constant":
            return 1.0
        done = min(1.0, (step - plan.warmup_steps) / max(1, final_step - plan.warmup_steps))
        return plan.final_ratio + (1 - plan.final_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, ratio)


def train_in_large_batches(spec_data: Mapping[str, Any]) -> list[float]:
    """The usual training loop: one batch of all the step's samples, mean loss, clip_grad_norm_, step.

    Returns the loss of each step. Without dropout it differs from the product's only by rounding."""
    spec = parse_spec(spec_data)
    settle_numerics(1, "cpu")
    task = load_task(spec, None)
    model = build_model(task)
    train = task.train_data()
    sampler = sampler_of(spec, len(train))
    final_step = sampler.final_step(spec.train.max_steps, spec.train.epochs)
    optimizer, schedule = _optimizer(model, spec, final_step)
    losses = []
    for step in range(final_step):
        indices = [i for shard in range(spec.train.num_shards) for i in sampler.indices(step, shard)]
        loss_sum, weight = task.loss(model, task.collate([train[i] for i in indices]))
        loss = loss_sum / weight
        loss.backward()
        if spec.train.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), spec.train.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses
