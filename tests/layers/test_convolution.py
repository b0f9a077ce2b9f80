from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from genlora_lightning import LoRAConfig, inject_adapters, load_adapter, merge_adapters, save_adapter, unmerge_adapters
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.layers.convolution import AdaptedConv
from genlora_lightning.layers.sharing import set_fused
from tests.conftest import perturb, small_config


class Standardised(nn.Conv2d):
    """Computes with another weight than it holds, as BiT's convolutions do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class SameAsInput(nn.Conv2d):
    """Pads by the input's size, as EfficientNet's convolutions do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 2, 0, 2)), self.weight, self.bias, self.stride)


CASES = {
    "1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
    "3d": lambda: nn.Conv3d(4, 6, 2, padding=1),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    "replicate": lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"),
    "circular": lambda: nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"),
    "depthwise": lambda: nn.Conv1d(4, 8, 3, groups=4),
    "standardised": lambda: Standardised(4, 6, 3),
    "same": lambda: SameAsInput(4, 6, 3, stride=2),
    "point": lambda: nn.Conv2d(4, 6, 1),
}
KINDS = {"genlora": small_config(rank=3), "lora": LoRAConfig(rank=3)}
each_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


def adapted(base: nn.Module, config=KINDS["lora"]) -> AdaptedConv:
    layer = AdaptedConv(base.double(), config).double()
    perturb(layer)
    return layer


def inputs(base: nn.Module, *batch: int) -> Tensor:
    return torch.randn(*batch, 4, *[7] * len(base.kernel_size)).double()


@each_case
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_outputs_and_gradients_are_those_of_the_update_added_to_the_kernel(make, config, fused):
    layer = adapted(make(), config)
    set_fused(layer, fused)
    base = layer.base_layer
    x = inputs(base, 2).requires_grad_()
    over = [x, *(p for p in layer.update.parameters() if p.requires_grad)]
    wanted = functional_call(base, {"weight": base.weight + layer.stored_delta()}, (x,))
    direction = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * direction).sum(), over)
    given = layer(x)
    torch.testing.assert_close(given, wanted, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(given, base(x), rtol=1e-3)
    for one, other in zip(torch.autograd.grad((given * direction).sum(), over), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@each_case
def test_new_adapter_changes_no_bit_and_merging_goes_back_and_forth(make):
    base = make().double()
    x = inputs(base, 2)
    before = base(x)
    model = nn.ModuleDict({"conv": base})
    inject_adapters(model, LoRAConfig(rank=2, target_modules=["conv"]))
    model.double()
    assert torch.equal(model["conv"](x), before)
    perturb(model)
    wanted = model["conv"](x)
    merge_adapters(model)
    torch.testing.assert_close(model["conv"](x), wanted, rtol=1e-11, atol=1e-11)
    unmerge_adapters(model)
    assert torch.equal(model["conv"](x), wanted)


def test_input_without_a_batch_is_taken():
    layer = adapted(nn.Conv2d(4, 6, 3))
    x = inputs(layer.base_layer)
    torch.testing.assert_close(layer(x), layer(x[None])[0], rtol=1e-12, atol=1e-12)


def test_dropout_drops_entries_of_the_input_of_the_update_alone():
    layer = adapted(nn.Conv2d(4, 6, 1), LoRAConfig(rank=2, dropout=0.5))
    x = inputs(layer.base_layer, 2)
    torch.manual_seed(0)
    given = layer.train()(x)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    wanted = layer.base_layer(x) + F.conv2d(dropped, layer.stored_delta())
    torch.testing.assert_close(given, wanted, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(given, layer.eval()(x))


def test_autocast_computes_in_its_dtype():
    layer = AdaptedConv(nn.Conv2d(4, 6, 3), KINDS["genlora"])
    perturb(layer)
    x = inputs(layer.base_layer, 2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.1)


def test_computed_kernel_is_adapted_beside_and_not_merged():
    layer = adapted(weight_norm(nn.Conv2d(4, 6, 3)))
    x = inputs(layer.base_layer, 2)
    wanted = F.conv2d(x, layer.base_layer.weight + layer.stored_delta(), layer.base_layer.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="its weight is computed in each forward"):
        layer.merge()


class Reader(nn.Module):
    """Calls its convolution, or hands its weight to a kernel, as Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.training else F.conv1d(x, self.conv.weight, self.conv.bias)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ModuleDict({"conv": nn.ConvTranspose2d(4, 6, 3)}), "conv cannot be adapted: transposed convolutions"),
        (nn.ModuleDict({"conv": weight_norm(Standardised(4, 6, 3))}), "conv cannot be adapted: the forward of Param"),
        (Reader(), "conv cannot be adapted: Reader reads its weight"),
    ],
    ids=["transposed", "computed", "read"],
)
def test_convolution_that_is_none_of_its_weight_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, small_config(target_modules=["conv"]))
    assert not adapter_layers(model)


def test_an_obstacle_is_told_where_a_file_names_the_layer(tmp_path):
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3)})
    inject_adapters(model, small_config(target_modules=["conv"]))
    folder = save_adapter(model, tmp_path / "adapter")
    other = nn.ModuleDict({"conv": nn.ConvTranspose2d(6, 6, 3)})
    with pytest.raises(ValueError, match="conv cannot be adapted: transposed"):
        load_adapter(other, folder, base_check="off")
