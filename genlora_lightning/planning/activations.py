"""Count the memory of a training step without data, weights or a device.

The step runs on fake tensors (shapes and dtypes only), and every storage that an operator makes is counted from its
making to its release, through forward, loss and backward. What is counted is what autograd keeps and what operators
hand to each other: nothing of it is a formula for one architecture. Not seen are buffers inside a kernel and what a
memory allocator keeps in reserve.

A step has two moments that may be its peak. In the model's own pass, most is what its layers keep. When that is freed,
the gradients of all matrices go back through the generators, where most is what the arithmetic hands on.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from genlora_lightning.adapters.base import Factor
from genlora_lightning.backbone.architectures import repeated_blocks
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.layers.sharing import batch_key, generated, layers_of, number_at_once, sharing_modules

_FEW = 2


_EXPERTS = "_experts_implementation"
_GROUPED = [op.default for op in (getattr(torch.ops.aten, "_grouped_mm", None),) if op is not None]


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step at its peak, beside parameters and inputs.

    Args:
        activations: All that is alive at the peak: what the backward pass will read, and what is being computed.
            Gradients that were already made for the adapters are among it.
        factors: Of this, what was made inside the generators: A and B of all layers, from the forward's beginning to
            their gradients, also with gradient checkpointing.
    """

    activations: int
    factors: int


def count_step(
    model: nn.Module,
    batch: int,
    tokens: int,
    *,
    autocast: bool,
    num_labels: int | None = None,
    generation: StepMemory | None = None,
) -> StepMemory:
    """Count the memory of one forward and backward pass of a transformers model.

    Of a model with many equal layers, a few and some more are counted: each further one adds the same.

    Args:
        model: On any device, also the meta device; it is not changed. Its mode (training, gradient checkpointing) is
            the one that is counted.
        batch: Sequences.
        tokens: Length of each; all of them are predicted, so that a run that learns from answers only needs less.
        autocast: Whether matrix products are in bfloat16, as under ``precision="bf16-mixed"``.
        num_labels: For a sequence classifier, its number of classes.
        generation: What :func:`count_generation` gives for the model, if it is known: it is the same in every mode.
    """
    generation = generation or count_generation(model, autocast)
    with _grouped_experts(model):
        own = _count_pass(model, batch, tokens, autocast, num_labels)
    return max(own, generation, key=lambda moment: moment.activations)


@contextmanager
def _grouped_experts(model: nn.Module) -> Iterator[None]:
    """Context manager in which a mixture computes its experts by grouped products, whatever its configuration says.

    A loop over the experts that have tokens cannot run without values, and holds as much.
    """
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, _EXPERTS)}
    before = [(config, getattr(config, _EXPERTS)) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = "grouped_mm"
        yield
    finally:
        for config, way in before:
            config._experts_implementation = way


def _count_pass(model: nn.Module, batch: int, tokens: int, autocast: bool, num_labels: int | None) -> StepMemory:
    return _by_blocks(model, _FEW, 1, lambda: _count(_Step(model, autocast, num_labels), batch, tokens))


def count_generation(model: nn.Module, autocast: bool) -> StepMemory:
    """Count the memory of making all layers' matrices, and of passing their gradients on.

    Args:
        model: As :func:`count_step` takes it.
        autocast: As there.
    """
    blocks = repeated_blocks(model)
    period = 1 if blocks is None or not len(blocks) else _blocks_of_whole_batches(model, blocks[0], autocast)
    count = 0 if blocks is None else len(blocks)
    # As many as are left over by whole batches, and one period of those: the last batches are then those of the model.
    return _by_blocks(model, period + count % period, period, lambda: _count(_Generation(model, autocast), 1, 1))


def _blocks_of_whole_batches(model: nn.Module, block: nn.Module, autocast: bool) -> int:
    """Of how many blocks the matrices fill whole batches, of each kind that is made at once."""
    dtype = torch.bfloat16 if autocast else torch.float32
    pairs = [layer.pair for layer in layers_of(block) if layer.pair is not None]
    keys = Counter(batch_key(factor, dtype)._replace(device=torch.device("cpu")) for pair in pairs for factor in pair)
    return math.lcm(*(n // math.gcd(n, of_block) for key, of_block in keys.items() for n in (number_at_once(key),)))


def _by_blocks(model: nn.Module, few: int, more: int, count: Callable[[], StepMemory]) -> StepMemory:
    """Count with a few of a model's equal blocks, and with some more, which add what as many others add."""
    blocks = repeated_blocks(model)
    if blocks is None or len(blocks) <= few + more:
        return count()
    first, second = (_shortened(blocks, n, count) for n in (few, few + more))
    times = (len(blocks) - few) // more
    return StepMemory(
        first.activations + times * (second.activations - first.activations),
        first.factors + times * (second.factors - first.factors),
    )


def _shortened(blocks: nn.ModuleList, number: int, count: Callable[[], StepMemory]) -> StepMemory:
    whole = blocks._modules
    blocks._modules = dict(list(whole.items())[:number])
    try:
        return count()
    finally:
        blocks._modules = whole


def _count(step: _Step | _Generation, batch: int, tokens: int) -> StepMemory:
    with FakeTensorMode():
        fake: dict[str, Tensor] = {
            name: torch.empty(p.shape, dtype=p.dtype, device="cpu").requires_grad_(p.requires_grad)
            for name, p in step.named_parameters()
        }
        fake |= {name: torch.empty(b.shape, dtype=b.dtype, device="cpu") for name, b in step.named_buffers()}
        ids = torch.zeros(batch, tokens, dtype=torch.long, device="cpu")
        counter = _Counter([*fake.values(), ids])
        with torch.device("cpu"), counter, step.attributed(counter):
            torch.func.functional_call(step, fake, (ids,))
    return StepMemory(counter.peak, counter.factors_at_peak)


class _Step(nn.Module):
    """Forward, loss and backward in one call, so that parameters are replaced in all of it."""

    def __init__(self, model: nn.Module, autocast: bool, num_labels: int | None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.num_labels = num_labels

    @override
    def forward(self, ids: Tensor) -> None:
        self._loss(ids).backward()  # type: ignore[no-untyped-call]

    def attributed(self, counter: _Counter) -> AbstractContextManager[None]:
        """Tell the counter when a generator computes."""
        return _attributed(self.model, counter)

    def _loss(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if self.num_labels is not None:
                logits = self.model(**inputs).logits
                return F.cross_entropy(logits.float(), torch.zeros(len(ids), dtype=torch.long))
            # As CausalLMModule does: logits of the positions with an answer, then of the answer's tokens.
            logits = self.model(**inputs, use_cache=False).logits.flatten(0, 1)
            answer = logits.index_select(0, torch.arange(ids.numel()))
            return F.cross_entropy(answer.float(), ids.flatten(), reduction="sum")


class _Generation(nn.Module):
    """Generation for all layers, and its backward when the gradients of all matrices are there."""

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self._counter: _Counter | None = None

    @contextmanager
    def attributed(self, counter: _Counter) -> Iterator[None]:
        """Let the counter count all as the generators', but for the gradients that they are given."""
        self._counter = counter
        yield

    @override
    def forward(self, ids: Tensor) -> None:
        assert self._counter is not None
        self._counter.inside = True
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast), generated(self.model) as matrices:
            self._counter.inside = False
            gradients = [torch.empty_like(matrix) for matrix in matrices]
            self._counter.inside = True
            torch.autograd.backward(matrices, gradients)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that live, and of those made inside generators."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.factors_now = self.factors_at_peak = 0
        self.inside = False
        self.paused = False  # whether this is no moment to look for the peak
        self._known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        for tensor in given:  # of which views are made
            self._known[tensor.untyped_storage()] = True

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return False  # transformers 4 asks whether the attention mask is all true, and makes its own otherwise
        product = _grouped_product if func in _GROUPED else func
        results = product(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._add(result.untyped_storage())
        return results

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        factors = size if self.inside else 0
        self.now += size
        self.factors_now += factors
        if self.now > self.peak and not self.paused:
            self.peak, self.factors_at_peak = self.now, self.factors_now
        weakref.finalize(storage, self._release, size, factors)

    def _release(self, size: int, factors: int) -> None:
        self.now -= size
        self.factors_now -= factors


def _grouped_product(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """What torch's grouped product of experts gives without values: its own shape rule takes bfloat16 alone.

    Rows ``(S, K)`` with a stack ``(E, K, N)`` give ``(S, N)``; two without a stack, whose inner dimension is cut into
    groups, ``(E, M, N)``; and so on.
    """
    if a.dim() == b.dim() == 2:
        assert offs is not None
        shape = (len(offs), a.shape[0], b.shape[1])
    elif a.dim() == b.dim() == 3:
        shape = (a.shape[0], a.shape[1], b.shape[2])
    else:
        shape = (a.shape[-2], b.shape[-1])  # type: ignore[assignment]
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


@contextmanager
def _attributed(model: nn.Module, counter: _Counter) -> Iterator[None]:
    """Tell the counter when a generator computes, and when generation for all layers does, which is counted apart."""

    def enter(*_: Any) -> None:
        counter.inside = True

    def leave(*_: Any) -> None:
        counter.inside = False

    def enter_all(*_: Any) -> None:
        counter.inside = counter.paused = True

    def leave_all(*_: Any) -> None:
        counter.inside = counter.paused = False

    def leave_and_watch(module: nn.Module, *_: Any) -> None:
        leave_all()
        given = [layer.store.for_forward for layer in adapter_layers(module).values() if layer.store.is_served]
        nodes = {matrix.grad_fn for one in given if one for matrix in (one.A, one.B) if matrix is not None}
        for node in nodes:
            if node is not None:
                hooks.extend((node.register_prehook(enter_all), node.register_hook(leave_all)))

    generators = [module for module in model.modules() if isinstance(module, Factor)]
    hooks: list[Any] = [g.register_forward_pre_hook(enter) for g in generators]
    hooks += [g.register_forward_hook(leave) for g in generators]
    for module in sharing_modules(model):  # around the hook that generates for all of a module's layers
        hooks.append(module.register_forward_pre_hook(enter_all, prepend=True))
        hooks.append(module.register_forward_pre_hook(leave_and_watch))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
