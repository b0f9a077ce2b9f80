"""Fine-tune a causal language model on prompts and answers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.backbone.quantization import Quantization
from genlora_lightning.injection.peft_adapters import PeftConfigLike
from genlora_lightning.modules.apart import acting_by_row, sums_by_adapter
from genlora_lightning.modules.base import Dtype, GenLoRAModule, check_plain
from genlora_lightning.modules.intervals import Scores, ratio
from genlora_lightning.modules.metrics import Perplexity, WeightedMean
from genlora_lightning.training.optim import OptimizerConfig

IGNORED_LABEL = -100


class CausalLMModule(GenLoRAModule):
    """Fine-tune a causal language model; the loss is on the answers' tokens alone.

    Batches are dictionaries of ``input_ids``, ``attention_mask`` and ``labels``, each (examples, tokens); ``labels``
    are the input ids where an answer stands and -100 elsewhere. With ``position_ids`` (examples, tokens), which begin
    at 0 again where another text begins, a row is several texts that do not see each other; that the model keeps them
    apart is tried once, before the first step. Prediction takes prompts padded on the left, without
    labels, and optionally lists ``prompt`` and ``completion`` of texts.

    Logged for the training: ``train_loss``. For validation and test, over the whole split: ``val_loss`` (mean per
    answer token), ``val_perplexity`` (its exponential), ``val_token_accuracy`` (share of answer tokens that are most
    probable given the true text before them) and ``val_answer_accuracy`` (share of examples in which all answer tokens
    are); ``test_…`` alike.

    Args:
        model: Local folder or name on the Hugging Face Hub.
        adapter: What to adapt, and how; as a dictionary with ``kind`` for another kind than GenLoRA; GenLoRA's
            defaults if ``None``. Leave it out if the trainer has a GenLoRAFinetuning
            callback.
        optimizer: AdamW and its schedule; the defaults if ``None``.
        dtype: Dtype of the frozen base's weights; ``"auto"``: the one they are stored in, or float32 on a CPU without
            bfloat16 arithmetic. Adapters are always float32.
        revision: Branch, tag or commit on the Hub.
        attn_implementation: transformers' attention, such as ``"sdpa"`` or ``"eager"``; its choice if ``None``.
        trust_remote_code: Run the Python code that comes with the model.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        low_memory: Read the weights only once the model is sharded, each process what it keeps; for FSDP.
        quantization: Quantize the frozen base while it is loaded: ``"nf4"`` or ``"int8"`` by bitsandbytes,
            ``"int8-weight-only"`` or ``"float8"`` by torchao (extra ``quant``).
        model_kwargs: More arguments for ``from_pretrained``; plain values, because checkpoints hold them.
        generation: Arguments of transformers' ``generate`` for prediction, over ``max_new_tokens: 64`` and
            ``do_sample: false``.

    Raises:
        TypeError: An argument holds something else than plain values.
        ValueError: An argument is out of its range.
    """

    token_fields = ("input_ids", "labels")

    def __init__(
        self,
        model: str,
        *,
        adapter: dict[str, Any] | AdapterConfig | PeftConfigLike | None = None,
        optimizer: OptimizerConfig | dict[str, Any] | None = None,
        dtype: Dtype = "auto",
        revision: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
        low_memory: bool = False,
        quantization: Quantization | None = None,
        model_kwargs: dict[str, Any] | None = None,
        generation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            model,
            adapter=adapter,
            optimizer=optimizer,
            dtype=dtype,
            revision=revision,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            gradient_checkpointing=gradient_checkpointing,
            low_memory=low_memory,
            quantization=quantization,
            model_kwargs=model_kwargs,
        )
        check_plain("generation", generation)
        self.generation: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False, **(generation or {})}
        if self.generation.get("num_return_sequences", 1) != 1:
            raise ValueError(
                f"`generation.num_return_sequences` must be 1, got {self.generation['num_return_sequences']}: each "
                "prompt has one completion."
            )
        self._takes_logits_to_keep: bool | None = None
        self._keeps_packed_apart = False
        self.val_metrics, self.test_metrics = _metrics(), _metrics()

    @override
    def load_backbone(self) -> nn.Module:
        model, absent = self.load_with("AutoModelForCausalLM")
        if absent:
            raise ValueError(
                f"The checkpoint {self.source!r} lacks {len(absent)} weights of a {type(model).__name__}, "
                f"{', '.join(absent[:3])} among them; they would be random, and stay so. It was probably saved from "
                "another kind of model (an encoder, or a body without its language-model head)."
            )
        loaded: nn.Module = model
        return loaded

    @override
    def look_at_labels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Find where the answers are.

        Args:
            labels: Shape (examples, tokens).

        Returns:
            The positions (positions) that :meth:`answer_logits` computes, and the places of answer tokens (tokens)
            in its flattened labels.
        """
        positions = _answer_positions(labels)
        found = positions, _answer_tokens(labels[:, 1:][:, positions])
        # The copy of what is not pinned would wait.
        return (found[0].pin_memory(), found[1].pin_memory()) if labels.is_pinned() else found

    def answer_logits(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Compute the logits from which answer tokens are predicted, and only these.

        Args:
            batch: ``input_ids``, ``attention_mask``, ``labels``, each (examples, tokens).

        Returns:
            Logits (examples, positions, vocabulary) and the labels they are to predict (examples, positions), at the
            positions in which at least one example has an answer token; -100 where another one has none.

        Raises:
            ValueError: No label is an answer token.
        """
        labels = batch["labels"][:, 1:]  # the logits at t predict the token at t + 1
        known = self.known_of(batch["labels"])
        positions: Tensor = _answer_positions(batch["labels"]) if known is None else known[0]
        if positions.numel() == 0:
            raise ValueError(
                f"This batch of {len(labels)} examples has no answer token: all its labels are {IGNORED_LABEL}. The "
                "answers were probably cut away by truncation, or the loss mask does not fit the chat template."
            )
        model = self.adapter_root()
        if self._takes_logits_to_keep is None:
            self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        inputs = {"input_ids": batch["input_ids"], "use_cache": False}
        if "position_ids" in batch:  # without a mask transformers finds the texts of a row by their positions
            self._check_packing(batch["input_ids"])
            inputs["position_ids"] = batch["position_ids"]
        else:
            inputs["attention_mask"] = batch["attention_mask"]
        if self._takes_logits_to_keep:
            logits = model(**inputs, logits_to_keep=positions).logits
        else:
            logits = model(**inputs).logits[:, positions]
        return logits, labels.index_select(1, positions)

    @torch.no_grad()
    def _check_packing(self, like: Tensor) -> None:
        """Try once whether the model keeps the texts of a row apart: another first text must not change the second.

        Args:
            like: A batch's input ids (rows, tokens), for their number of rows and device.

        Raises:
            ValueError: It does not.
        """
        if self._keeps_packed_apart:
            return
        model: Any = self.adapter_root()
        half = 4
        tokens = torch.arange(3 * half, device=like.device).repeat(len(like), 1)
        tokens %= model.config.get_text_config().vocab_size
        ids, other = tokens[:, half:], torch.cat([tokens[:, :half], tokens[:, 2 * half :]], dim=1)
        positions = torch.arange(half, device=like.device).repeat(len(like), 2)
        found = []
        for tried in (ids, other):
            with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):  # the same dropout in both
                torch.manual_seed(0)
                found.append(model(input_ids=tried, position_ids=positions, use_cache=False).logits[:, half:].float())
        before, after = found
        if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * before.abs().max().item()):
            raise ValueError(
                f"This {type(model).__name__}, with its attention, does not keep the "
                "texts of a packed row apart: what stands before a text changes it. Set the data module's "
                "packing=false, or try the model's attn_implementation='sdpa' (flash attention needs batch_size=1)."
            )
        self._keeps_packed_apart = True

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        logits, labels = self.answer_logits(batch)
        adapters = acting_by_row(self)
        if adapters is not None:
            losses, tokens = self._losses(logits, labels, batch, "none")
            return self.training_loss(*sums_by_adapter(adapters, losses, tokens // labels.shape[1]))
        return self.training_loss(self._summed_loss(logits, labels, batch), (labels != IGNORED_LABEL).sum())

    def _summed_loss(self, logits: Tensor, labels: Tensor, batch: dict[str, Any]) -> Tensor:
        """Sum of the cross entropies of the answer tokens, in float32, from what :meth:`answer_logits` returns."""
        return self._losses(logits, labels, batch, "sum")[0]

    def _losses(self, logits: Tensor, labels: Tensor, batch: dict[str, Any], reduction: str) -> tuple[Tensor, Tensor]:
        """The cross entropies of the answer tokens, in float32, and their places in the flattened labels."""
        known = self.known_of(batch["labels"])
        tokens = _answer_tokens(labels) if known is None else known[1]
        chosen = logits.flatten(0, 1).index_select(0, tokens)
        return F.cross_entropy(chosen.float(), labels.flatten().index_select(0, tokens), reduction=reduction), tokens

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics)

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    def _evaluate(self, batch: dict[str, Any], split: Literal["val", "test"], metrics: nn.ModuleDict) -> None:
        logits, labels = self.answer_logits(batch)
        answer = labels != IGNORED_LABEL
        has_answer = answer.any(dim=1)
        correct = (logits.argmax(dim=-1) == labels) & answer
        whole = (correct | ~answer).all(dim=1) & has_answer
        loss, tokens = self._summed_loss(logits, labels, batch), answer.sum()
        sums = {
            "loss": (loss, tokens),
            "perplexity": (loss, tokens),
            "token_accuracy": (correct.sum(), tokens),
            "answer_accuracy": (whole.sum(), has_answer.sum()),
        }
        for name, (total, count) in sums.items():
            metric = metrics[name]
            assert isinstance(metric, WeightedMean)
            metric.update(total, count)
            self.log(f"{split}_{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "loss", batch_size=1)

    @torch.no_grad()
    def example_scores(self, batch: dict[str, Any]) -> Scores:
        """Compute loss, answer tokens, right answer tokens, and whether all are right, of each example of a batch."""
        logits, labels = self.answer_logits(batch)
        answer = labels != IGNORED_LABEL
        tokens = _answer_tokens(labels)
        chosen = logits.flatten(0, 1).index_select(0, tokens).float()
        losses = F.cross_entropy(chosen, labels.flatten().index_select(0, tokens), reduction="none").double()
        correct = (logits.argmax(dim=-1) == labels) & answer
        whole = (correct | ~answer).all(dim=1) & answer.any(dim=1)
        loss = losses.new_zeros(len(labels)).index_add_(0, tokens // labels.shape[1], losses)
        columns = [loss, answer.sum(1), correct.sum(1), whole, answer.any(dim=1)]
        return Scores(
            torch.stack([column.double() for column in columns], dim=1),
            {
                "loss": ratio(0, 1),
                "perplexity": lambda sums: (sums[..., 0] / sums[..., 1]).exp(),
                "token_accuracy": ratio(2, 1),
                "answer_accuracy": ratio(3, 4),
            },
        )

    @torch.no_grad()
    def answer_prompts(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, max_seconds: float | None = None
    ) -> list[str]:
        """Answer prompts in one batch, by the most probable token each time, whatever ``generation`` says of that.

        Args:
            prompts: The tokens of each.
            max_new_tokens: The most tokens of an answer; fewer where ``generation`` has fewer, or the context ends.
            max_seconds: No token is begun after them.

        Raises:
            ValueError: A prompt leaves no room for an answer.
        """
        model: Any = self.adapter_root()
        special = _special_tokens(model, self.tokenizer)
        longest = max(map(len, prompts))
        most: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        wanted = min(max_new_tokens, self.generation.get("max_new_tokens") or max_new_tokens)
        room = wanted if most is None else min(wanted, most - longest)
        if room < 1:
            raise ValueError(f"A prompt of {longest} tokens leaves no room in the model's {most}.")
        pad = special["pad_token_id"] or 0
        ids = torch.tensor([[pad] * (longest - len(one)) + list(one) for one in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=self.device)
        # What a model's own settings for sampling say would only be warned of.
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        limits = {"max_new_tokens": room, "max_time": max_seconds}
        tokens = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **limits, **greedy, **special)
        answers: list[str] = self.tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)
        return answers

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str]]:
        """Generate a completion for each prompt.

        Returns:
            For each example ``prompt`` and ``generated``, and ``completion`` (the reference) if the batch has it.
        """
        input_ids, tokenizer = batch["input_ids"], self.tokenizer
        model: Any = self.adapter_root()
        arguments = {**_special_tokens(model, tokenizer), **self.generation}
        with torch.no_grad():
            tokens = model.generate(input_ids=input_ids, attention_mask=batch["attention_mask"], **arguments)
        generated = tokenizer.batch_decode(tokens[:, input_ids.shape[1] :], skip_special_tokens=True)
        prompts = batch.get("prompt") or tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        results = [{"prompt": prompt, "generated": text} for prompt, text in zip(prompts, generated, strict=True)]
        for result, completion in zip(results, batch.get("completion") or [], strict=False):
            if completion is not None:
                result["completion"] = completion
        return results


def _metrics() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "loss": WeightedMean(),
            "perplexity": Perplexity(),
            "token_accuracy": WeightedMean(),
            "answer_accuracy": WeightedMean(),
        }
    )


def _special_tokens(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Where a completion ends: at the model's end-of-text tokens and at the tokenizer's, which need not be the same."""
    of_model = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, (list, tuple)) else [of_model])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=None)
    return {"eos_token_id": sorted(ends) or None, "pad_token_id": pad}


def _answer_positions(labels: Tensor) -> Tensor:
    """Positions (positions) whose logits predict an answer token of at least one example."""
    return (labels[:, 1:] != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)


def _answer_tokens(labels: Tensor) -> Tensor:
    """Places (tokens) of the answer tokens in flattened labels."""
    return (labels != IGNORED_LABEL).flatten().nonzero().squeeze(1)
