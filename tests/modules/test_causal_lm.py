from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from genlora_lightning import LoRAConfig
from genlora_lightning.injection.inject import adapter_parameters
from genlora_lightning.modules import CausalLMModule
from genlora_lightning.training.optim import OptimizerConfig
from tests.conftest import perturb, small_config
from tests.modules.conftest import EOS, PAD, loader, text_batch

# Most models here are asked before they are trained, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:The adapters of this .* are new and untrained")

MakeTrainer = Callable[..., Trainer]

# A text to be learnt: each question has its own answer.
ROWS = [([10 + index, 3], [20 + index, 30 - index, EOS][index % 2 :]) for index in range(6)]


def learnt_module(folder: str, **changes: Any) -> CausalLMModule:
    optimizer = OptimizerConfig(lr=0.03, schedule="constant")
    return CausalLMModule(folder, **{"adapter": small_config(rank=8), "optimizer": optimizer, **changes})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_toy_task_is_learnt(make_trainer: MakeTrainer, model_folders: dict[str, str], name: str) -> None:
    module = learnt_module(model_folders[name])
    data = loader([text_batch(ROWS)])
    trainer = make_trainer(max_steps=80, limit_val_batches=0)
    before = make_trainer().validate(module, data, verbose=False)[0]
    trainer.fit(module, data)
    after = make_trainer().validate(module, data, verbose=False)[0]
    assert after["val_loss"] < 0.6 * before["val_loss"]
    assert after["val_token_accuracy"] > before["val_token_accuracy"] + 0.3
    base = {n: p for n, p in module.model.named_parameters() if not p.requires_grad}
    assert base.keys().isdisjoint(adapter_parameters(module.model))


def loaded(folder: str) -> CausalLMModule:
    module = CausalLMModule(folder, adapter=small_config())
    module.configure_model()
    return module.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_of_the_answers_alone_equal_those_cut_from_all(model_folders: dict[str, str], name: str) -> None:
    module, batch = loaded(model_folders[name]), text_batch(ROWS, length=8)
    kept, labels = module.answer_logits(batch)
    assert module._takes_logits_to_keep
    module._takes_logits_to_keep = False
    full, same_labels = module.answer_logits(batch)
    assert torch.equal(labels, same_labels)
    torch.testing.assert_close(kept, full)
    assert kept.shape == (6, 3, 64)  # the answers' three positions, not all eight


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loss_is_the_one_that_transformers_computes(model_folders: dict[str, str], name: str) -> None:
    module, batch = loaded(model_folders[name]), text_batch(ROWS, length=8)
    torch.testing.assert_close(module.training_step(batch, 0), module.model(**batch).loss)


def test_padding_and_its_length_change_no_loss(model_folders: dict[str, str]) -> None:
    module = loaded(model_folders["llama"])
    short, long = (module.training_step(text_batch(ROWS, length), 0) for length in (5, 16))
    torch.testing.assert_close(short, long)


def test_metrics_are_weighted_by_tokens_over_the_whole_split(
    make_trainer: MakeTrainer, model_folders: dict[str, str]
) -> None:
    from torchmetrics.text import Perplexity

    module = learnt_module(model_folders["llama"])
    trainer = make_trainer(max_steps=10, limit_val_batches=0)
    trainer.fit(module, loader([text_batch(ROWS)]))

    split = [text_batch(ROWS[:1]), text_batch(ROWS[1:])]
    result = make_trainer().validate(module, loader(split), verbose=False)[0]
    tested = make_trainer().test(module, loader(split), verbose=False)[0]
    assert tested == {name.replace("val_", "test_"): value for name, value in result.items()}

    whole = text_batch(ROWS)
    module.eval()
    with torch.no_grad():
        logits = module.model(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"]).logits[:, :-1]
    labels = whole["labels"][:, 1:]
    perplexity = Perplexity(ignore_index=-100)(logits, labels)
    right = (logits.argmax(-1) == labels)[labels != -100].float()
    answers = [bool((logits[i].argmax(-1) == labels[i])[labels[i] != -100].all()) for i in range(len(ROWS))]
    assert 0 < right.mean() < 1  # or the comparison shows nothing
    assert 0 < sum(answers) < len(ROWS)
    assert result["val_loss"] == pytest.approx(math.log(perplexity), rel=1e-5)
    assert result["val_perplexity"] == pytest.approx(float(perplexity), rel=1e-5)
    assert result["val_token_accuracy"] == pytest.approx(float(right.mean()))
    assert result["val_answer_accuracy"] == pytest.approx(sum(answers) / len(ROWS))


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_batch_without_an_answer_is_an_error(
    make_trainer: MakeTrainer, model_folders: dict[str, str], stage: str
) -> None:
    batch = text_batch(ROWS)
    batch["labels"].fill_(-100)
    run = getattr(make_trainer(max_steps=1), stage)
    with pytest.raises(ValueError, match="This batch of 6 examples has no answer token: all its labels are -100"):
        run(learnt_module(model_folders["llama"]), loader([batch]))


def test_checkpoint_without_a_language_model_head_is_refused(model_folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"lacks 1 weights of a LlamaForCausalLM, lm_head.weight among them"):
        CausalLMModule(model_folders["llama_body"]).configure_model()


def prompt_batch(prompts: list[list[int]], **more: Any) -> dict[str, Any]:
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask, **more}


def test_prediction_generates_what_was_learnt(make_trainer: MakeTrainer, model_folders: dict[str, str]) -> None:
    rows = ROWS[:4]
    module = learnt_module(model_folders["llama"], generation={"max_new_tokens": 4})
    trainer = make_trainer(max_steps=120, limit_val_batches=0)
    trainer.fit(module, loader([text_batch(rows)]))
    questions = prompt_batch([prompt for prompt, _ in rows])
    completions = [" ".join(f"w{token}" for token in answer if token != EOS) for _, answer in rows]
    texts = [f"question {index}" for index in range(len(rows))]
    with_texts = {**questions, "prompt": texts, "completion": completions}
    (named,), (bare,) = (trainer.predict(module, loader([batch])) for batch in (with_texts, questions))
    assert [row["prompt"] for row in named] == texts
    assert [row["completion"] for row in named] == completions
    assert [row["generated"] for row in named] == completions
    assert bare[0] == {"prompt": "w10 w3", "generated": completions[0]}


def test_prompts_of_other_lengths_beside_it_change_no_completion(
    make_trainer: MakeTrainer, model_folders: dict[str, str]
) -> None:
    module = CausalLMModule(model_folders["llama"], adapter=small_config(), generation={"max_new_tokens": 3})
    alone, together = prompt_batch([[11, 12]]), prompt_batch([[11, 12], [13, 14, 15, 16, 17]])
    module.configure_model()
    results = make_trainer().predict(module, loader([alone, together]))
    assert results[0][0] == results[1][0]


def test_more_than_one_completion_for_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`generation.num_return_sequences` must be 1, got 2"):
        CausalLMModule("nowhere", generation={"num_return_sequences": 2})


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_base_of_16_bits_trains_adapters_of_32(
    make_trainer: MakeTrainer, model_folders: dict[str, str], precision: str
) -> None:
    module = learnt_module(model_folders["llama"], dtype="bfloat16", gradient_checkpointing=True)
    data = loader([text_batch(ROWS)])
    trainer = make_trainer(max_steps=30, limit_val_batches=0, precision=precision, gradient_clip_val=10.0)
    before = make_trainer(precision=precision).validate(module, data, verbose=False)[0]["val_loss"]
    trainer.fit(module, data)
    after = make_trainer(precision=precision).validate(module, data, verbose=False)[0]["val_loss"]
    assert after < 0.8 * before
    assert {p.dtype for p in module.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in module.model.parameters() if p.requires_grad} == {torch.float32}


def test_adapters_that_changed_something_change_the_metrics(
    make_trainer: MakeTrainer, model_folders: dict[str, str]
) -> None:
    module, data = learnt_module(model_folders["llama"]), loader([text_batch(ROWS)])
    fresh = make_trainer().validate(module, data, verbose=False)[0]["val_loss"]
    perturb(module.model)
    assert make_trainer().validate(module, data, verbose=False)[0]["val_loss"] != pytest.approx(fresh)


CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_step_that_knows_where_the_answers_are_has_the_loss_and_gradients_of_one_that_asks(
    model_folders: dict[str, str], name: str
) -> None:
    module, batch = learnt_module(model_folders[name]), text_batch(ROWS, length=8)
    module.configure_model()
    weight = next(module.eval().model.parameters())
    results = []
    for known in (False, True):
        if known:
            batch = module._apply_batch_transfer_handler(batch, device=CPU)
        assert (module.known_of(batch["labels"]) is not None) == known
        loss = module.training_step(batch, 0)
        results.append((loss, *torch.autograd.grad(loss, weight)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    # As the mean over the answers' tokens of all logits, without any choice of positions.
    logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(results[1][0], expected)


def test_labels_that_are_others_or_were_changed_are_looked_at_again(model_folders: dict[str, str]) -> None:
    module = loaded(model_folders["llama"])
    batch = module._apply_batch_transfer_handler(text_batch(ROWS, length=8), device=CPU)
    assert module.known_of(batch["labels"][:3]) is None
    assert module.known_of(batch["labels"].clone()) is None
    batch["labels"][:, 1] = 7  # a callback's doing
    assert module.known_of(batch["labels"]) is None
    assert module.answer_logits(batch)[0].shape == (6, 4, 64)


def test_labels_on_a_device_and_batches_of_other_kinds_are_not_looked_at() -> None:
    module = CausalLMModule("nowhere")
    on_device = {name: tensor.to("meta") for name, tensor in text_batch(ROWS).items()}
    for batch, device in ((on_device, "meta"), (prompt_batch([[11, 12]]), "cpu"), ([torch.zeros(2)], "cpu")):
        module._apply_batch_transfer_handler(text_batch(ROWS), device=CPU)
        assert module._known_labels is not None
        module._apply_batch_transfer_handler(batch, device=torch.device(device))
        assert module._known_labels is None


def test_strings_of_tokens_are_looked_up_in_the_tokenizer(model_folders: dict[str, str]) -> None:
    module = loaded(model_folders["llama"])
    word, number = next((word, number) for word, number in module.tokenizer.get_vocab().items() if number > 3)
    found = module.resolve_adapter_config(LoRAConfig(tokens_to_train=[word, 2]))
    assert found.tokens_to_train == [number, 2]
    found = module.resolve_adapter_config(LoRAConfig(tokens_to_train={"embed_tokens": [word]}))
    assert found.tokens_to_train == {"embed_tokens": [number]}
    with pytest.raises(ValueError, match=r"'<no such>', which is no token of .*resize_token_embeddings"):
        module.resolve_adapter_config(LoRAConfig(tokens_to_train=["<no such>"]))
