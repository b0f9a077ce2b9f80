"""Say which of PEFT's adapters were tested under which strategy; refuse what cannot work, and warn of the rest."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn

from genlora_lightning.injection.peft_adapters import PeftAdapter
from genlora_lightning.training.strategies import FSDP_NAME, GenLoRAFSDPStrategy
from genlora_lightning.training.sync import AdapterSharding

ONE, DDP, FSDP1, FSDP2 = "one device", "DDP", f'"{FSDP_NAME}"', "ModelParallelStrategy"
#: By :func:`peft_name`: where an interrupted run was compared with an uninterrupted one, in every bit.
TESTED: dict[str, frozenset[str]] = {
    "LORA": frozenset({ONE, DDP, FSDP1, FSDP2}),
    "DORA": frozenset({ONE}),
    "IA3": frozenset({ONE}),
    "OFT": frozenset({ONE}),
    "VERA": frozenset({ONE, DDP, FSDP1, FSDP2}),
}


def peft_name(adapter: PeftAdapter) -> str:
    """PEFT's name of a kind; DoRA, which is an option of its LoRA, has its own here."""
    return "DORA" if adapter.values.get("use_dora") else adapter.peft_type


def strategy_name(strategy: Strategy) -> str:
    """What a strategy is called in :data:`TESTED`."""
    named = {GenLoRAFSDPStrategy: FSDP1, ModelParallelStrategy: FSDP2, DDPStrategy: DDP}
    return next((name for kind, name in named.items() if isinstance(strategy, kind)), ONE)


def check_support(adapter: PeftAdapter, strategy: Strategy, sharding: AdapterSharding, *, generate: str) -> None:
    """Find out, before anything is loaded, that a kind cannot work under a strategy.

    Raises:
        ValueError: It cannot; the message says what to use instead.

    Warns:
        UserWarning: It was not tested.
    """
    adapter.check()
    name, place = peft_name(adapter), strategy_name(strategy)
    if generate != "forward":
        raise ValueError(f'`generate="{generate}"` is for adapters that are generated, and {adapter.title} is not.')
    if place == FSDP1 and sharding == "shard":
        raise ValueError(
            f'`adapter_sharding="shard"` does not work for {adapter.title} with {place}, whose units would hold what '
            'is trained together with the frozen base: set "replicate", or use ModelParallelStrategy.'
        )
    if place not in TESTED.get(name, frozenset()):
        tested = ", ".join(known for known, places in TESTED.items() if place in places)
        rank_zero_warn(
            f"{adapter.title} was not tested here with {place} ({tested} were): compare a resumed run with one that "
            "was not interrupted before you rely on it."
        )


def check_not_shared(module: LightningModule) -> None:
    """Refuse to shard parameters that several of PEFT's layers share: each block would cut its own.

    Raises:
        ValueError: One is shared.
    """
    seen: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        if id(parameter) in seen:
            raise ValueError(
                f'`adapter_sharding="shard"` cannot cut {name}, which is also {seen[id(parameter)]}: set "replicate".'
            )
        seen[id(parameter)] = name
