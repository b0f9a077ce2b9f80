"""Find gradients that are NaN or infinite before they spoil the weights, without waiting for the device.

::

    backward ─► norms ─► flag ──► found_inf of the fused optimizer: the device leaves the step out by itself
                          │
                          └─────► read once in a while: the run stops

The flag stays set once it is, so that all later steps are left out, too, and it does not matter when Python reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from genlora_lightning.distributed.shards import is_dtensor, local_part, plain_name
from genlora_lightning.overrides import put_on, take_off

# Fused kernels that skip their step where `found_inf` is 1; made for gradient scalers.
_SKIPPING_OPTIMIZERS = (Adam, AdamW, SGD)
# What is kept of each step until it is read must not grow for as long as a trainer does not log.
_MOST_UNREAD = 1000


@dataclass(frozen=True)
class NonFiniteStep:
    """An optimizer step whose gradient was NaN or infinite, and which was not made."""

    step: int
    epoch: int
    batch: int
    names: list[str]
    loss_was_finite: bool | None


@dataclass(frozen=True)
class _Check:
    step: int
    epoch: int
    batch: int
    parameters: list[nn.Parameter]
    norms: Tensor | None
    loss: Tensor | None
    flag: Tensor


class FiniteWatch:
    """Watches the gradients of a run.

    Args:
        device: Where the flag is, if a rank has no gradient.
        any_rank: Sets a flag, in place, where any rank has set it; for ranks that see pieces of the gradients.
    """

    def __init__(self, device: torch.device, any_rank: Callable[[Tensor], None]) -> None:
        self._device = device
        self._any_rank = any_rank
        self._flag: Tensor | None = None
        self._unread: list[_Check] = []
        self._watched: list[Optimizer] = []

    def check(self, optimizer: Optimizer, loss: Tensor | None, *, step: int, epoch: int, batch: int) -> bool:
        """Look at the gradients before an optimizer step; what is found is said by :meth:`read`.

        Args:
            optimizer: The optimizer that is about to step.
            loss: The last loss, for the report.
            step: Number of the step, from 1.
            epoch: Where it is.
            batch: Where it is.

        Returns:
            Whether it must be read before the step: where reading costs nothing (on a CPU), where the optimizer cannot
            leave out the step by itself, and after 1,000 steps.
        """
        held = (p for group in optimizer.param_groups for p in group["params"])
        parameters = [p for p in held if p.grad is not None]
        norms, flag = None, torch.zeros((), device=self._device)
        if parameters:
            norms = torch.stack(torch._foreach_norm([local_part(p.grad) for p in parameters]))
            flag = (~norms.sum().isfinite()).float()
        self._any_rank(flag)
        if self._flag is not None:
            flag = torch.maximum(flag, self._flag.to(flag.device))
        self._flag = flag
        self._unread.append(_Check(step, epoch, batch, parameters, norms, loss, flag))
        if not (waits_to_read(flag) and leaves_out_steps(optimizer)) or len(self._unread) >= _MOST_UNREAD:
            return True
        put_on(optimizer, found_inf=flag)
        if not any(optimizer is other for other in self._watched):
            self._watched.append(optimizer)
        return False

    def read(self, module: nn.Module) -> NonFiniteStep | None:
        """Find the first step whose gradient was not finite; waits for the device if there is something to read.

        Args:
            module: Where parameters have their names from.
        """
        unread, self._unread = self._unread, []
        if not unread or not bool(unread[-1].flag):
            return None
        flags = torch.stack([check.flag.to(unread[-1].flag.device) for check in unread]).tolist()
        found = unread[flags.index(1.0)]
        names: list[str] = []
        if found.norms is not None:
            finite = found.norms.isfinite().tolist()
            bad = {id(p) for p, is_finite in zip(found.parameters, finite, strict=True) if not is_finite}
            names = [plain_name(name) for name, p in module.named_parameters() if id(p) in bad]
        loss = None if found.loss is None else bool(found.loss.isfinite().all())
        return NonFiniteStep(found.step, found.epoch, found.batch, names, loss)

    def end(self) -> None:
        """Leave the optimizers as they were."""
        for optimizer in self._watched:
            take_off(optimizer, "found_inf")
        self._watched, self._unread, self._flag = [], [], None


def waits_to_read(tensor: Tensor) -> bool:
    """Whether reading a tensor's value makes Python wait for a device."""
    return tensor.device.type != "cpu"


def leaves_out_steps(optimizer: Optimizer) -> bool:
    """Whether the optimizer leaves out a step by itself if its ``found_inf`` says so: torch's fused ones do."""
    return (
        type(optimizer) in _SKIPPING_OPTIMIZERS
        and all(group.get("fused") for group in optimizer.param_groups)
        and all(
            p.device.type in ("cpu", "cuda") and not is_dtensor(p)
            for group in optimizer.param_groups
            for p in group["params"]
        )
    )
