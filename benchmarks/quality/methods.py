"""The methods that are compared: how each is put on a model, and how large it is made for a budget.

A budget is a number of adapter parameters in units of LoRA of rank 1 on the same linears, ``Σ (in + out)``: LoRA of
rank r has budget r. Every method adapts every linear of the blocks. `Method.size` gives the settings whose parameters
come nearest to the budget:

| method | what is chosen | parameters per linear |
|---|---|---|
| LoRA, rsLoRA, LoRA+, sine | rank | r · (in + out), exact |
| DoRA | rank, one higher on the kinds of linears that fill the budget best | r · (in + out) + out |
| PoLAR, Stiefel retraction | rank | r · (in + out) + r² |
| Compacter's products | inner rank K, of P = 4 products | K · (in + out), and P³ for all |
| VeRA | nothing: rank 256 as in PEFT (below) | out + r |
| RandLoRA | rank of the bases | n · (r + min(in, out)), n = ⌈min(in, out) / r⌉ |
| FourierFT | number of frequencies, the same for every linear | n |
| VB-LoRA | number h of vectors; their length v divides all sizes | 4 · h · (in + out) / v, and h · v for all |
| LoKr | Kronecker factor and rank | a · b + r · (in / b + out / a), or the second factor in full |
| HiRA, SHiRA | rank | r · (in + out) |
| GraLoRA | rank, in 2 × 2 blocks | r · (in + out) |
| MiSS | rank | r · out |
| C3A | size b of the circulant blocks, a divisor of all sizes | in · out / b |
| WaveFT | number of coefficients, the same for every linear | n |
| PSOFT | rank | r · (r − 1) / 2 + 2 · r |
| PEANuT | rank, no hidden layers | 2 · r · out |
| Lily | rank of A, 4 shared B for each kind of linear | counted on the model |
| UniLoRA | length of the one vector that all share | that length |
| GenLoRA | groups of B, at given rank and numbers of latents | Q_A · in + Q_B · out + R · (Q_A · G_A + Q_B · G_B) |

VeRA is not matched: with LoRA rank 2's parameters its frozen matrices would have rank 1,728 on MiniLM, and a step would
take several times as long. VB-LoRA's logits are counted in full, as trained, although two of each h are kept.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genlora_lightning import CompacterConfig, GenLoRAConfig, PoLARConfig, inject_adapters
from genlora_lightning.adapters.base import trained_by_role
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.layers.sharing import set_fused

from .adapters import SineConfig, StiefelConfig
from .variants import inject_variant

Shapes = dict[str, tuple[int, int]]  # name: (in_features, out_features)
Settings = dict[str, Any]
Group = dict[str, Any]  # "params", and a "factor" on the learning rate


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        apply: Put it on a frozen model with the settings and a seed; returns the parameters in groups.
        size: Settings for the shapes of the linears and a budget; further arguments are settings held fixed.
        full: Trains the base itself: float32 weights under bf16 autocast, where the others have a bf16 base.
    """

    apply: Callable[[nn.Module, Settings, int], list[Group]]
    size: Callable[..., Settings]
    full: bool = False


def linear_shapes(base: nn.Module) -> Shapes:
    """The linears that are adapted: all in the model without its head."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
    }


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def lora_unit(shapes: Shapes) -> int:
    """Parameters of LoRA of rank 1."""
    return sum(sum(shape) for shape in shapes.values())


# --- PEFT -------------------------------------------------------------------------------------------------------------

_CONFIGS = {
    "lora": "LoraConfig",
    "vera": "VeraConfig",
    "randlora": "RandLoraConfig",
    "fourierft": "FourierFTConfig",
    "vblora": "VBLoRAConfig",
    "lokr": "LoKrConfig",
    "hira": "HiraConfig",
    "shira": "ShiraConfig",
    "gralora": "GraloraConfig",
    "miss": "MissConfig",
    "c3a": "C3AConfig",
    "waveft": "WaveFTConfig",
    "psoft": "PsoftConfig",
    "peanut": "PeanutConfig",
    "lily": "LilyConfig",
    "unilora": "UniLoraConfig",
}
_SEEDS = {
    "vera": "projection_prng_key",
    "randlora": "projection_prng_key",
    "fourierft": "random_loc_seed",
    "shira": "random_seed",
    "waveft": "random_loc_seed",
    "psoft": "random_seed",
    "unilora": "proj_seed",
}
_RATES = ("b_rate", "logits_rate")  # settings of ours: factors on the learning rate of some of the parameters


def _peft(kind: str) -> Callable[[nn.Module, Settings, int], list[Group]]:
    def apply(base: nn.Module, settings: Settings, seed: int) -> list[Group]:
        import peft

        given = {key: value for key, value in settings.items() if key not in _RATES}
        if kind in _SEEDS:
            given[_SEEDS[kind]] = seed
        config = getattr(peft, _CONFIGS[kind])(target_modules=list(linear_shapes(base)), **given)
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(base, config)  # changes the base in place; adapters become float32
        state = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        base.saved_bytes = _num_bytes(state.values())
        _exact_magnitudes(base)
        slow, fast = [], []
        for name, parameter in base.named_parameters():
            if parameter.requires_grad:
                is_fast = ("lora_B" in name and "b_rate" in settings) or "vblora_logits" in name
                (fast if is_fast else slow).append(parameter)
        factor = settings.get("b_rate", settings.get("logits_rate", 1.0))
        return [g for g in ({"params": slow, "factor": 1.0}, {"params": fast, "factor": factor}) if g["params"]]

    return apply


@torch.no_grad()
def _exact_magnitudes(base: nn.Module) -> None:
    """DoRA's magnitudes in float32: PEFT rounds the norms to the base's bfloat16, which would change the outputs."""
    for module in base.modules():
        if vectors := getattr(module, "lora_magnitude_vector", None):
            vectors["default"].weight = nn.Parameter(torch.linalg.norm(module.get_base_layer().weight.float(), dim=1))


def _lora_size(**fixed: Any) -> Callable[..., Settings]:
    def size(shapes: Shapes, budget: float) -> Settings:
        rank = max(1, round(budget))
        return {"r": rank, "lora_alpha": 2 * rank, **fixed}

    return size


def _dora_size(shapes: Shapes, budget: float) -> Settings:
    """Uniform rank below the budget, and one more on the kinds of linears that come nearest to it."""
    target = budget * lora_unit(shapes)
    magnitudes = sum(out for _, out in shapes.values())
    rank = max(1, int((target - magnitudes) // lora_unit(shapes)))
    kinds: dict[str, int] = {}
    for name, (n_in, n_out) in shapes.items():
        kind = re.sub(r".*\.\d+\.", "", name)
        kinds[kind] = kinds.get(kind, 0) + n_in + n_out
    spare = target - magnitudes - rank * lora_unit(shapes)
    subsets = itertools.chain.from_iterable(itertools.combinations(kinds, n) for n in range(len(kinds) + 1))
    raised = min(subsets, key=lambda subset: abs(sum(kinds[kind] for kind in subset) - spare))
    # PEFT anchors the pattern as `^…$` after an optional prefix.
    patterns = {rf".*\.\d+\.{re.escape(kind)}": rank + 1 for kind in raised}
    return {
        "r": rank,
        "lora_alpha": 2 * rank,
        "use_dora": True,
        "rank_pattern": patterns,
        "alpha_pattern": dict.fromkeys(patterns, 2 * (rank + 1)),
    }


def _vera_size(shapes: Shapes, budget: float) -> Settings:
    return {"r": 256, "d_initial": 0.1}


def _randlora_size(shapes: Shapes, budget: float) -> Settings:
    def count(rank: int) -> int:
        return sum(math.ceil(min(shape) / rank) * (rank + min(shape)) for shape in shapes.values())

    largest = max(min(shape) for shape in shapes.values())
    rank = min(range(8, largest + 1), key=lambda rank: abs(count(rank) - budget * lora_unit(shapes)))
    return {"r": rank, "randlora_alpha": 20 * rank}


def _fourierft_size(shapes: Shapes, budget: float) -> Settings:
    # `init_weights` starts at zero. PEFT's default, a random spectrum, changes a small model's weights by as much as
    # they are themselves.
    frequencies = round(budget * lora_unit(shapes) / len(shapes))
    return {"n_frequency": frequencies, "scaling": 150.0, "init_weights": True}


def _vblora_size(shapes: Shapes, budget: float) -> Settings:
    length = math.gcd(*(n for shape in shapes.values() for n in shape))
    rank = 4
    vectors = round(budget * lora_unit(shapes) / (rank * lora_unit(shapes) / length + length))
    # The authors train the logits at ten times the rate of the bank.
    return {"r": rank, "num_vectors": max(2, vectors), "vector_length": length, "topk": 2, "logits_rate": 10.0}


def _lokr_size(shapes: Shapes, budget: float) -> Settings:
    from peft.tuners.lokr.layer import factorization

    def count(factor: int, rank: int) -> int:
        total = 0
        for n_in, n_out in shapes.values():
            (b, inner_in), (a, inner_out) = factorization(n_in, factor), factorization(n_out, factor)
            full = rank >= max(inner_out, inner_in) / 2
            total += a * b + (inner_out * inner_in if full else rank * (inner_out + inner_in))
        return total

    target = budget * lora_unit(shapes)
    choices = [(factor, rank) for factor in (4, 8, 16, 32) for rank in range(1, 65)]
    # Of the choices within 2 % the one of the highest rank of ΔW: rank(A ⊗ B) = rank(A) · rank(B).
    near = [c for c in choices if abs(count(*c) / target - 1) < 0.02] or choices
    factor, rank = min(near, key=lambda c: (-c[0] * c[1] if len(near) < len(choices) else 0, abs(count(*c) - target)))
    return {"r": rank, "alpha": rank, "decompose_factor": factor}


def _miss_size(shapes: Shapes, budget: float) -> Settings:
    return {"r": max(1, round(budget * lora_unit(shapes) / sum(out for _, out in shapes.values())))}


def _gralora_size(shapes: Shapes, budget: float) -> Settings:
    rank = 2 * max(1, round(budget / 2))  # a multiple of the blocks on a side
    return {"r": rank, "alpha": 2 * rank, "gralora_k": 2}


def _c3a_size(shapes: Shapes, budget: float) -> Settings:
    largest = math.gcd(*(n for shape in shapes.values() for n in shape))
    sizes = [size for size in range(1, largest + 1) if largest % size == 0]
    entries = sum(n_in * n_out for n_in, n_out in shapes.values())
    block = min(sizes, key=lambda size: abs(entries / size - budget * lora_unit(shapes)))
    return {"block_size": block, "init_weights": True}  # zero, as the others start; PEFT's default is random


def _waveft_size(shapes: Shapes, budget: float) -> Settings:
    # `init_weights` starts at zero, as for FourierFT.
    return {"n_frequency": round(budget * lora_unit(shapes) / len(shapes)), "init_weights": True}


def _psoft_size(shapes: Shapes, budget: float) -> Settings:
    wanted = budget * lora_unit(shapes) / len(shapes)
    rank = max(1, round((-3 + math.sqrt(9 + 8 * wanted)) / 2))  # r (r - 1) / 2 + 2 r = wanted
    rank = min(rank, *(n for shape in shapes.values() for n in shape))
    return {"r": rank, "psoft_alpha": rank, "psoft_svd": "lowrank"}


def _peanut_size(shapes: Shapes, budget: float) -> Settings:
    outputs = sum(out for _, out in shapes.values())
    return {"r": max(1, round(budget * lora_unit(shapes) / (2 * outputs)))}


def _lily_size(shapes: Shapes, budget: float) -> Settings:
    # The shared B weigh little beside so many A.
    inputs = sum(n_in for n_in, _ in shapes.values())
    return {"r": max(1, round(0.9 * budget * lora_unit(shapes) / inputs)), "num_B": 4}


def _unilora_size(shapes: Shapes, budget: float) -> Settings:
    return {"r": 4, "theta_d_length": round(budget * lora_unit(shapes))}


# --- kinds of the library's protocol ----------------------------------------------------------------------------------


def _kind(
    config: Callable[[Settings], AdapterConfig], *, fused: bool = False
) -> Callable[[nn.Module, Settings, int], list[Group]]:
    """Inject a kind. The package's own is fused; those that are only compared here are left to autograd."""

    def apply(base: nn.Module, settings: Settings, seed: int) -> list[Group]:
        inject_adapters(base, config(settings), generator=torch.Generator().manual_seed(seed))
        set_fused(base, fused)
        return _groups(base, {})

    return apply


def _variant(base: nn.Module, settings: Settings, seed: int) -> list[Group]:
    rates = inject_variant(base, settings, seed)
    set_fused(base, False)
    return _groups(base, rates)


def _groups(base: nn.Module, rates: dict[str, float]) -> list[Group]:
    base.saved_bytes = _num_bytes(parameter for _, own in trained_by_role(base).values() for parameter in own)
    return [{"params": own, "factor": rates.get(name, 1.0)} for name, (_, own) in trained_by_role(base).items()]


def _genlora_size(shapes: Shapes, budget: float, **fixed: Any) -> Settings:
    """As many groups of B as the budget allows at the given rank, at least one, unless they are given."""
    config = GenLoRAConfig(**fixed)
    latents = sum(config.num_latents_a * n_in + config.num_latents_b * n_out for n_in, n_out in shapes.values())
    functions = config.rank * config.num_centers * len(shapes)
    of_a, of_b = config.num_latents_a * functions, config.num_latents_b * functions
    rest = of_a * config.num_groups_a + (of_a + of_b) * (config.learn_centers + config.learn_widths)
    spare = (budget * lora_unit(shapes) - latents - rest) / of_b
    groups = min(max(1, round(spare)), min(min(shape) for shape in shapes.values()))
    # All fields that decide the numbers are written down: defaults may change.
    plain = {key: value for key, value in config.to_dict().items() if key != "kind" and "modules" not in key}
    return {**plain, "num_groups_b": groups, **fixed}


def _sine_size(shapes: Shapes, budget: float) -> Settings:
    rank = max(1, round(budget))
    return {"r": rank, "alpha": 2.0 * rank, "omega": 200.0}


# --- others -----------------------------------------------------------------------------------------------------------


def _full(base: nn.Module, settings: Settings, seed: int) -> list[Group]:
    base.requires_grad_(True)
    base.saved_bytes = _num_bytes(base.parameters())
    return [{"params": list(base.parameters()), "factor": 1.0}]


def _nothing(shapes: Shapes, budget: float) -> Settings:
    return {}


METHODS: dict[str, Method] = {
    "frozen": Method(lambda base, settings, seed: [], _nothing),
    "full": Method(_full, _nothing, full=True),
    "lora": Method(_peft("lora"), _lora_size()),
    "rslora": Method(_peft("lora"), _lora_size(use_rslora=True)),
    "lora+": Method(_peft("lora"), _lora_size(b_rate=16.0)),  # the ratio the authors recommend
    "dora": Method(_peft("lora"), _dora_size),
    "vera": Method(_peft("vera"), _vera_size),
    "randlora": Method(_peft("randlora"), _randlora_size),
    "fourierft": Method(_peft("fourierft"), _fourierft_size),
    "vblora": Method(_peft("vblora"), _vblora_size),
    "lokr": Method(_peft("lokr"), _lokr_size),
    "hira": Method(_peft("hira"), lambda shapes, budget: {"r": max(1, round(budget))}),
    "shira": Method(_peft("shira"), lambda shapes, budget: {"r": max(1, round(budget))}),
    "gralora": Method(_peft("gralora"), _gralora_size),
    "miss": Method(_peft("miss"), _miss_size),
    "c3a": Method(_peft("c3a"), _c3a_size),
    "waveft": Method(_peft("waveft"), _waveft_size),
    "psoft": Method(_peft("psoft"), _psoft_size),
    "peanut": Method(_peft("peanut"), _peanut_size),
    "lily": Method(_peft("lily"), _lily_size),
    "unilora": Method(_peft("unilora"), _unilora_size),
    "polar": Method(
        _kind(lambda settings: PoLARConfig(rank=settings["r"])), lambda shapes, budget: {"r": max(1, round(budget))}
    ),
    "compacter": Method(
        _kind(lambda settings: CompacterConfig(rank=settings["r"], alpha=settings["r"])),  # the scaling is 1
        lambda shapes, budget: {"r": 16 * max(1, round(budget))},
    ),
    "stiefel": Method(
        _kind(lambda settings: StiefelConfig(rank=settings["r"])), lambda shapes, budget: {"r": max(1, round(budget))}
    ),
    "sine": Method(
        _kind(lambda settings: SineConfig(rank=settings["r"], alpha=settings["alpha"], omega=settings["omega"])),
        _sine_size,
    ),
    "genlora": Method(_kind(lambda settings: GenLoRAConfig(**settings), fused=True), _genlora_size),
    "started genlora": Method(  # at a mean gradient, by what runs it
        _kind(
            lambda settings: GenLoRAConfig(**{key: value for key, value in settings.items() if key != "start"}),
            fused=True,
        ),
        lambda shapes, budget, **fixed: {**_genlora_size(shapes, budget, **fixed), "start": "mean gradient"},
    ),
    "variant": Method(_variant, lambda shapes, budget, **spec: spec),
}


# --- what was learned -------------------------------------------------------------------------------------------------


@torch.no_grad()
def deltas(base: nn.Module, before: dict[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """ΔW of each adapted linear in float32.

    Args:
        base: A model that a method was put on.
        before: Of full fine-tuning: the weights as they were, by name of the linear.
    """
    if before is not None:
        for name, weight in before.items():
            yield name, base.get_submodule(name).weight.float() - weight
    elif layers := adapter_layers(base):
        for name, layer in layers.items():
            yield name, layer.delta_weight()
    else:
        yield from _peft_deltas(base)


def _peft_deltas(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in base.named_modules():
        if not hasattr(module, "get_delta_weight") or hasattr(
            module, "lily_A"
        ):  # Lily forms none: its B are mixed by inputs
            continue
        if hasattr(module, "miss_block"):  # whose function gives the weight that would be merged
            weight = module.get_base_layer().weight.float()
            delta = module.get_delta_weight_miss("default", weight).float() - weight
        else:
            delta = module.get_delta_weight("default").float()
        if delta.is_sparse:
            delta = delta.to_dense()
        if vectors := getattr(module, "lora_magnitude_vector", None):
            weight = module.get_base_layer().weight.float()
            changed = weight + delta
            scale = vectors["default"].weight / torch.linalg.norm(changed, dim=1)
            delta = scale.unsqueeze(1) * changed - weight
        yield name, delta
