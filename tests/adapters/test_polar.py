from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genlora_lightning import GenLoRAFinetuning, OptimizerConfig, PoLARConfig, inject_adapters
from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.adapters.polar import Directions, landing_field
from genlora_lightning.adapters.steps import hook_steps, largest_diagnostics
from genlora_lightning.injection.inject import adapter_layers, adapter_parameters
from genlora_lightning.training.optim import build_optimizer, parameter_groups
from tests.plain import PlainMLP, mlp_loader, trainer

CONFIG = PoLARConfig(rank=3, alpha=6.0, landing=0.5, target_modules=["net.0", "net.2"])
CLIP = 0.05
Loss = Callable[[], Tensor]


class Oracle:
    """The paper's update in float64, with the dense matrices of the formula, on weights W + s X Θ Yᵀ."""

    def __init__(self, module: PlainMLP, make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        self.layers, self.state = adapter_layers(module), {}
        for name, layer in self.layers.items():
            A, B = layer.update.A, layer.update.B
            found = {"X": B.matrix.T, "core": B.core, "Y": A.matrix.T}
            self.state[name] = {
                key: t.detach().double().contiguous().clone().requires_grad_() for key, t in found.items()
            }
        self.net = module.net
        self.optimizer = make_optimizer([t for own in self.state.values() for t in own.values()])

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.double()
        for number, part in enumerate(self.net):
            if isinstance(part, nn.Tanh):
                x = part(x)
                continue
            name = f"net.{number}"
            base = part.base_layer if name in self.state else part
            weight = base.weight.detach().double()
            if name in self.state:
                own = self.state[name]
                weight = weight + CONFIG.alpha / CONFIG.rank * own["X"] @ own["core"] @ own["Y"].T
            x = nn.functional.linear(x, weight, base.bias.detach().double())
        return nn.functional.mse_loss(x, y.double())

    def step(self, losses: Iterable[Tensor], clip: float = 0.0, *, turn_first: bool = False) -> float:
        self.optimizer.zero_grad()
        sum(losses).backward()  # type: ignore[union-attr]
        parameters = [t for own in self.state.values() for t in own.values()]
        norm = 0.0
        if turn_first:
            self.turn()
        if clip:
            norm = float(nn.utils.clip_grad_norm_(parameters, clip))
        if not turn_first:
            self.turn()
        self.optimizer.step()
        return norm

    @torch.no_grad()
    def turn(self) -> None:
        for own in self.state.values():
            for X in (own["X"], own["Y"]):
                G, identity = X.grad, torch.eye(CONFIG.rank, dtype=X.dtype)
                X.grad = (G @ X.T - X @ G.T) @ X + CONFIG.landing * X @ (X.T @ X - identity)

    def compare(self, atol: float) -> None:
        for name, layer in self.layers.items():
            own, A, B = self.state[name], layer.update.A, layer.update.B
            for mine, theirs in ((A.matrix.T, own["Y"]), (B.matrix.T, own["X"]), (B.core, own["core"])):
                torch.testing.assert_close(mine.detach().double(), theirs.detach(), rtol=0, atol=atol)
            assert own["core"].abs().max() > 1e-3


def adapted(module: PlainMLP | None = None) -> PlainMLP:
    module = module or PlainMLP()
    inject_adapters(module, CONFIG)
    return module


def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    # A large eps: Adam makes steps of full length out of gradients that are nothing but rounding.
    return torch.optim.AdamW(parameters, lr=0.02, eps=1e-4, weight_decay=0.1)


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
@pytest.mark.parametrize("closure", ["none", "by position", "by name"])
def test_twenty_steps_equal_the_papers_update_in_float64(make_optimizer, closure):
    module = adapted().double()
    oracle = Oracle(module, make_optimizer)
    optimizer = make_optimizer([p for p in module.parameters() if p.requires_grad])
    hook_steps(module, optimizer)
    x, y = next(iter(mlp_loader()))

    def compute() -> Tensor:
        optimizer.zero_grad()
        loss = module.step([x.double(), y.double()])
        loss.backward()
        return loss

    for _ in range(20):
        if closure == "none":
            compute()
            optimizer.step()
        elif closure == "by position":
            optimizer.step(compute)
        else:
            optimizer.step(closure=compute)
        oracle.step([oracle.loss(x, y)])
    oracle.compare(1e-12)


class Polar(PlainMLP):
    """With an optimizer whose order of parameters does not matter."""

    make: Any = staticmethod(sgd)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make([p for p in self.parameters() if p.requires_grad])


class ByHand(Polar):
    """Optimizes manually, and clips."""

    raw = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=not self.raw)
        optimizer.zero_grad()
        self.manual_backward(self.step(batch))
        self.clip_gradients(optimizer, CLIP, "norm")
        optimizer.step()


class ByClosure(ByHand):
    """Optimizes manually, by a closure."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> None:
            optimizer.zero_grad()
            self.manual_backward(self.step(batch))
            self.clip_gradients(optimizer, CLIP, "norm")

        optimizer.step(closure=closure)


class RawByHand(ByHand):
    """Optimizes manually with torch's own optimizer."""

    raw = True


@pytest.mark.parametrize(
    ("cls", "settings", "generate"),
    [
        (Polar, {"gradient_clip_val": CLIP}, "forward"),
        (Polar, {"gradient_clip_val": CLIP, "accumulate_grad_batches": 2}, "forward"),
        (Polar, {"gradient_clip_val": CLIP, "accumulate_grad_batches": 2}, "step"),
        (ByHand, {}, "forward"),
        (RawByHand, {}, "forward"),
        (ByClosure, {}, "forward"),
    ],
)
def test_directions_take_the_place_of_the_gradients_after_accumulation_and_clipping(tmp_path, cls, settings, generate):
    module = adapted(cls())
    oracle, other = (Oracle(module, sgd) for _ in range(2))
    callback = GenLoRAFinetuning(CONFIG, save_adapter=False, generate=generate)
    trainer(tmp_path, callback, max_epochs=3, **settings).fit(module, mlp_loader())
    window = settings.get("accumulate_grad_batches", 1)
    batches = list(mlp_loader()) * 3
    for start in range(0, len(batches), window):
        some = batches[start : start + window]
        norm = oracle.step([oracle.loss(x, y) / window for x, y in some], CLIP)
        assert norm > 1.5 * CLIP  # it is clipped
        other.step([other.loss(x, y) / window for x, y in some], CLIP, turn_first=True)
    oracle.compare(1e-6)
    with pytest.raises(AssertionError):  # another order gives something else
        other.compare(1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_nothing(fused):
    x, y = next(iter(mlp_loader()))
    found = []
    for scale in (None, 64.0):
        torch.manual_seed(0)
        module = adapted()
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 0.02, eps=1e-4, fused=fused)
        hook_steps(module, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(module.step([x, y])).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append({name: p.detach().clone() for name, p in adapter_parameters(module).items()})
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0, atol=1e-6)


def test_landing_field_is_the_dense_formula_and_leads_back_to_orthonormal_rows():
    X, G = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    wanted = (G @ X.T - X @ G.T) @ X + 0.3 * X @ (X.T @ X - torch.eye(3))
    torch.testing.assert_close(landing_field(X.T, G.T, 0.3), wanted.T, rtol=0, atol=1e-12)
    factor = Directions(9, rank=3, landing=1.0).double()
    assert factor.diagnostics()["orthogonality_gap"] < 1e-6
    with torch.no_grad():
        factor.matrix.add_(0.1 * torch.randn(3, 9))
        start = float(factor.diagnostics()["orthogonality_gap"])
        for _ in range(60):
            factor.matrix.sub_(0.2 * Directions.directions([factor], "matrix", [torch.zeros(3, 9).double()])[0])
    other = Directions(9, rank=3, landing=0.0).double()
    gradients = [torch.randn(3, 9).double() for _ in range(2)]
    both = Directions.directions([factor, other], "matrix", gradients)
    for one, direction, gradient in zip((factor, other), both, gradients, strict=True):
        torch.testing.assert_close(direction, landing_field(one.matrix, gradient, one.landing))
    assert start > 0.1
    assert factor.diagnostics()["orthogonality_gap"] < 1e-3 * start


def test_each_optimizer_turns_what_it_holds_once_and_nothing_without_a_gradient():
    module = adapted()
    layers = adapter_layers(module)
    first, second = ([p for p in layers[name].parameters() if p.requires_grad] for name in ("net.0", "net.2"))
    optimizers = [torch.optim.SGD(some, lr=0.0) for some in (first, second)]
    for optimizer in optimizers:
        hook_steps(module, optimizer)
        hook_steps(module, optimizer)  # changes nothing
    with torch.no_grad():
        for layer in layers.values():
            layer.update.B.core.normal_()
    x, y = next(iter(mlp_loader()))
    module.step([x, y]).backward()
    before = {p: p.grad.clone() for p in (*first, *second)}
    Y = layers["net.0"].update.A.matrix
    wanted = landing_field(Y.detach(), Y.grad, CONFIG.landing)
    layers["net.0"].update.B.matrix.grad = None
    optimizers[0].step()
    torch.testing.assert_close(Y.grad, wanted)
    assert not torch.allclose(wanted, before[Y])
    assert layers["net.0"].update.B.matrix.grad is None
    assert torch.equal(layers["net.0"].update.B.core.grad, before[layers["net.0"].update.B.core])
    assert all(torch.equal(p.grad, before[p]) for p in second)


def test_the_librarys_optimizer_turns_by_itself_and_decays_no_directions():
    module = adapted()
    optimizer = build_optimizer(module, OptimizerConfig(weight_decay=0.1))
    groups = parameter_groups(module, OptimizerConfig(weight_decay=0.1, lr_factors={"polar_core": 2.0}))
    assert {g["name"]: g["weight_decay"] for g in groups} == {"polar_directions": 0.0, "polar_core": 0.1}
    module.step(next(iter(mlp_loader()))).backward()
    Y = adapter_layers(module)["net.0"].update.A.matrix
    wanted = landing_field(Y.detach().clone(), Y.grad.clone(), CONFIG.landing)
    optimizer.step()
    torch.testing.assert_close(Y.grad, wanted)


def test_distance_to_orthonormal_columns_is_logged(tmp_path):
    module = adapted(Polar())
    with torch.no_grad():
        adapter_layers(module)["net.2"].update.A.matrix.mul_(2)
    expected = float(largest_diagnostics(module)["orthogonality_gap"])
    assert expected == pytest.approx(3 * math.sqrt(CONFIG.rank))
    run = trainer(tmp_path, GenLoRAFinetuning(CONFIG, save_adapter=False), max_steps=1, log_every_n_steps=1)
    run.fit(module, mlp_loader())
    assert float(run.callback_metrics["orthogonality_gap"]) == pytest.approx(expected)


def test_rank_above_a_side_and_landing_below_zero_are_errors():
    module = PlainMLP()
    with pytest.raises(ValueError, match=r"`rank` is 9, but net.0 has 16 outputs and 8 inputs: .*Lower `rank` to 8"):
        inject_adapters(module, PoLARConfig(rank=9, target_modules=["net.0"]))
    assert not adapter_layers(module)
    with pytest.raises(ValueError, match=r"`rank` is 9, but the matrix has 16 outputs"):
        PoLARConfig(rank=9).make(MatrixShape(16, 8))
    with pytest.raises(ValueError, match=r"`landing` must be finite and at least 0, got -1\.0"):
        PoLARConfig(landing=-1.0)
