"""Load conversations for training on the answers only, and texts for training on all of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from typing_extensions import override

from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.data._base import FileDataModule
from genlora_lightning.data._chat import IGNORE_INDEX, ChatEncoder, Truncation
from genlora_lightning.data._documents import encode_document
from genlora_lightning.data._files import normalized, text_field
from genlora_lightning.data._formats import Record
from genlora_lightning.data._forms import DOCUMENT, parse_conversation
from genlora_lightning.data._hub import PREFIX, import_datasets, stream_hub_records
from genlora_lightning.data._loading import PadCollator, padding_id
from genlora_lightning.data._packing import PackedCollator, PackedRows, Packer, pack
from genlora_lightning.data._records import check_at_least_one
from genlora_lightning.data._stream import RecordStream, check_streamable, part_of
from genlora_lightning.training.resumable import EndlessLoader, ResumableDataLoader

_PACKED_AT_A_TIME = 8  # records of a stream that are packed together, for each row of a batch

_log = rank_zero_logger(__name__)


class InstructionDataModule(FileDataModule):
    """Instruction data from JSONL, JSON, CSV, Parquet or Arrow files, tokenized with the model's own chat template.

    A record has one of these forms, told by its fields; other fields are ignored. In a table a list may be JSON text.

    - ``messages``: a list of ``{"role": ..., "content": ...}``.
    - ``prompt`` and ``completion``.
    - ``instruction``, optional ``input``, and ``output`` (Alpaca): the prompt is the instruction, a blank line and the
      input.
    - ``conversations`` (ShareGPT): a list of ``{"from": ..., "value": ...}``, from ``human``, ``gpt``, ``system`` or
      ``tool``.
    - ``text``, to go on with pretraining: all of it is learned, and the end-of-text token after it, without a chat
      template. A long text becomes several windows of ``max_length`` tokens; nothing of it is cut.

    In conversations every answer of the assistant is learned, its end-of-turn token included (once, also where the
    answer's text ends with it), unless its message has ``"weight": 0``; all other tokens
    have the label -100. ``tools``, a list of JSON schemas, goes to the chat template.

    Batches are dictionaries of ``input_ids``, ``attention_mask`` and ``labels`` (batch, length), padded on the right to
    the longest of the batch. Batches for prediction are padded on the left and hold prompts only: the last message is
    left out where it is an answer. Beside ``input_ids`` and ``attention_mask`` they have ``prompt``, the texts of the
    last questions, and ``completion``, the expected answers, where all are known.

    With `packing` training batches have `position_ids`, too, which begin at 0 with each example: transformers keeps the
    examples of a row apart by them.

    Args:
        tokenizer: A Hugging Face id, a local folder, or a tokenizer.
        train_file: Training data: .jsonl, .jsonl.gz, .json (a list of records), .csv, .parquet or .arrow; or a data set
            on the Hugging Face Hub, ``hf://org/name``, ``hf://org/name:split`` or ``hf://org/name:config:split``
            (``@revision`` may follow the name), of which nothing is executed. The other files likewise. A list
            of such is one set; a mapping gives each a weight: 2.0 is seen twice in an epoch, 0.5 by half, drawn by
            ``seed``. What is held out for validation is not weighted.
        val_file: Validation data.
        test_file: Test data.
        predict_file: Prompts for prediction; ``completion`` is optional. Without it, those of ``test_file`` are taken.
        val_fraction: The share of ``train_file`` to hold out for validation when there is no ``val_file``. Examples
            whose prompts differ at most in case and white space stay on one side.
        batch_size: Examples in a training batch, per device.
        eval_batch_size: Examples in a batch of validation, test and prediction; ``batch_size`` if not given.
        max_length: The longest sequence, in tokens.
        truncation: What to do with longer ones. "left" cuts the start of the prompt, never the last answer (earlier
            answers that the cut reaches are not learned); an answer that leaves no room for any of its prompt is an
            error. "drop" leaves the example out. "error" stops. What was cut or dropped is counted and reported.
        chat_template: Replaces the tokenizer's chat template: a file or a template's text. "none" means plain text:
            prompt, completion and the end-of-sequence token, joined with nothing between.
        system_prompt: A system message for conversations that have none.
        train_on: Learn "all" answers of a conversation, or the "last" one only. Some templates (those that remove the
            reasoning of earlier turns) allow only "last".
        seed: Decides the split and the order of training examples.
        num_workers: Processes that make batches. The data are tokenized once, in memory, so 0 is rarely slow.
        pad_to_multiple_of: Batches are padded to a multiple of so many tokens.
        group_by_length: Make batches of examples of similar length, which saves padding; predictions keep their file's
            order. In training it has no effect where Lightning puts its distributed sampler in place.
        packing: Put several training examples into a row, up to ``max_length`` tokens of it, so that little is padding;
            none sees another. ``batch_size`` then counts rows. Which examples share a row stays the same in all epochs.
        streaming: Read the training data while they are used, again and again, and keep none of them: for what does not
            fit into memory. Each process and worker reads its own part of the records; a run goes on at the very batch.
            The trainer needs ``max_steps``, and with validation data ``val_check_interval`` in batches.
        shuffle_buffer: Records of a stream to draw the next one from: 1 keeps the order of the file.
        cache_dir: A folder in which tokenized data are kept for the next run. By default nothing is written.
        trust_remote_code: Run the Python code that comes with the tokenizer.
        revision: The tokenizer's branch, tag or commit on the Hub.
        adapter_field: The field of a record that names its adapter, where a run trains several
            (``GenLoRAFinetuning(adapters=…)``): batches have ``adapter`` then, a list of names. ``val_fraction`` holds
            out about the same share of each.

    Raises:
        ValueError: An argument is out of its range, or arguments exclude each other; the message names both.
    """

    def __init__(
        self,
        tokenizer: str | Any,
        train_file: str | list[str] | dict[str, float],
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        val_fraction: float = 0.0,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 1024,
        truncation: Literal["error", "drop", "left"] = "left",
        chat_template: str | None = None,
        system_prompt: str | None = None,
        train_on: Literal["all", "last"] = "all",
        seed: int = 42,
        num_workers: int = 0,
        pad_to_multiple_of: int = 8,
        group_by_length: bool = False,
        packing: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        cache_dir: str | None = None,
        trust_remote_code: bool | None = None,
        revision: str | None = None,
        adapter_field: str | None = None,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            files={"train": train_file, "val": val_file, "test": test_file, "predict": predict_file},
            val_fraction=val_fraction,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            max_length=max_length,
            seed=seed,
            num_workers=num_workers,
            pad_to_multiple_of=pad_to_multiple_of,
            group_by_length=group_by_length,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        for name, value, allowed in (
            ("truncation", truncation, ("error", "drop", "left")),
            ("train_on", train_on, ("all", "last")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if packing and group_by_length:
            raise ValueError("packing and group_by_length exclude each other: packed rows are all about as long")
        if packing and adapter_field is not None:
            raise ValueError("packing and adapter_field exclude each other: each row of a batch has one adapter")
        if chat_template == "none" and system_prompt is not None:
            raise ValueError("system_prompt needs a chat template, but chat_template='none' was set")
        check_at_least_one("shuffle_buffer", shuffle_buffer)
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        if streaming:
            self._check_streamable(group_by_length)
        self.adapter_field = adapter_field
        self.packing = packing
        self._packs: list[list[int]] | None = None
        self.truncation: Truncation = truncation
        self.chat_template = chat_template
        self.system_prompt = system_prompt
        self.train_on: Literal["all", "last"] = train_on
        self._chat: ChatEncoder | None = None
        self._has_chats = False

    @property
    def chat(self) -> ChatEncoder:
        """Renders and tokenizes conversations; made when it is first asked for."""
        if self._chat is None:
            self._chat = ChatEncoder(
                self.tokenizer, self.chat_template, self.max_length, self.truncation, self.train_on
            )
        return self._chat

    @override
    def prepare_data(self) -> None:
        """Checks on one process that files, tokenizer and chat template are there."""
        super().prepare_data()
        # Only texts need no template; what else a file holds is seen when it is read.
        if not all("text" in record.fields for record in self.first_records()):
            _ = self.chat

    @override
    def train_dataloader(self) -> Any:
        """Returns shuffled batches; the order depends on `seed` only and is a new one in each epoch."""
        if self.streaming:
            return self._endless_loader()
        if not self.packing:
            return super().train_dataloader()
        rows = self.rows("train")
        if self._packs is None:
            lengths = list(rows["length"])
            self._packs = pack(lengths, self.max_length)
            share = sum(lengths) / (len(self._packs) * self.max_length)
            _log.info(
                f"Packed {len(lengths):,} training examples into {len(self._packs):,} rows of {self.max_length}, "
                f"{share:.1%} full."
            )
        examples = rows.select_columns(["input_ids", "labels"])
        return ResumableDataLoader(
            PackedRows(examples, self._packs),
            batch_size=self.batch_size,
            collate_fn=PackedCollator(padding_id(self.tokenizer), self.pad_to_multiple_of),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _endless_loader(self) -> EndlessLoader:
        """Returns the batches of a stream."""
        rank, world_size = part_of(self.trainer, self.has_data("val"))
        fill, multiple = padding_id(self.tokenizer), self.pad_to_multiple_of
        collate: Any = PadCollator(self._batch_keys("train", None), fill, multiple)
        alone = copy.copy(self)  # for the workers, which may be given no trainer
        alone.trainer, alone._datasets = None, {}
        stream = RecordStream(
            list(self.files["train"]),
            "train_file",
            encode=alone._stream_rows,
            group=Packer(self.max_length) if self.packing else list,
            records_in_group=_PACKED_AT_A_TIME * self.batch_size if self.packing else 1,
            collate=PackedCollator(fill, multiple) if self.packing else collate,
            batch_size=self.batch_size,
            buffer_size=self.shuffle_buffer,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        _log.info(f"Training data are streamed from {' + '.join(self.files['train'])}.")
        return EndlessLoader(stream, self.num_workers, pin_memory=torch.cuda.is_available())

    def _stream_rows(self, record: Record) -> list[dict[str, Any]]:
        rows = self._encoder("train")(self._parse(record, "train"))
        return [{name: row[name] for name in self._batch_keys("train", rows)} for row in rows if row["input_ids"]]

    def _check_streamable(self, group_by_length: bool) -> None:
        refused = {"val_fraction": self.val_fraction > 0, "group_by_length": group_by_length}
        refused["cache_dir"] = self.cache_dir is not None
        for name, is_set in refused.items():
            if is_set:
                raise ValueError(f"streaming and {name} exclude each other: {name} needs all training data at once")
        weighted = {path: weight for path, weight in self.files["train"].items() if weight != 1}
        if weighted:
            raise ValueError(f"streaming takes files without weights, got {weighted}; name them in a list")
        check_streamable(list(self.files["train"]), "train_file")

    @override
    def _is_streamed(self, split: str) -> bool:
        return self.streaming and split == "train"

    @override
    def _check_source(self, path: str, argument: str) -> None:
        if self.streaming and argument == "train_file" and path.startswith(PREFIX):
            next(stream_hub_records(path, argument), None)
        else:
            super()._check_source(path, argument)

    @override
    def _read(self, path: str, argument: str) -> Iterator[Record]:
        if self.streaming and argument == "train_file" and path.startswith(PREFIX):
            return stream_hub_records(path, argument)
        return super()._read(path, argument)

    @override
    def _parse(self, record: Record, split: str) -> dict[str, Any]:
        messages, learned, tools = parse_conversation(
            record,
            plain=self.chat_template == "none",
            system_prompt=self.system_prompt,
            needs_answer=split != "predict",
        )
        self._has_chats |= messages[0]["role"] != DOCUMENT
        # As text: tools are of any structure, which a column of a table cannot be.
        example = {"where": record.where, "messages": messages, "tools": None if tools is None else json.dumps(tools)}
        if self.adapter_field is not None:
            example["adapter"] = text_field(record, self.adapter_field)
        if split != "predict":
            return {**example, "learned": learned}
        completion = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
        return {**example, "completion": completion}

    @override
    def _duplicate_key(self, example: dict[str, Any]) -> str:
        prompt = []
        for message in example["messages"]:
            if message["role"] == "assistant":
                break
            prompt.append(f"{message['role']} {normalized(message['content'])}")
        return "\n".join(prompt)

    @override
    def _stratum(self, example: dict[str, Any]) -> str:
        return str(example.get("adapter", ""))

    @override
    def _encoder(self, split: str) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
        def adapter_of(example: dict[str, Any]) -> dict[str, str]:
            return {name: example[name] for name in self._adapter_key}

        def encode(example: dict[str, Any]) -> list[dict[str, Any]]:
            messages, where = example["messages"], example["where"]
            if _is_document(example):
                rows = encode_document(self.tokenizer, messages[0]["content"], self.max_length, where)
            else:
                rows = [self.chat.encode(messages, where, example["learned"], _tools_of(example))]
            for row in rows:
                row["length"] = len(row["input_ids"])
                row["answer_tokens"] = sum(label != IGNORE_INDEX for label in row["labels"])
                row |= adapter_of(example)
            return rows

        def encode_prompt(example: dict[str, Any]) -> list[dict[str, Any]]:
            messages, completion = example["messages"], example["completion"]
            row = self.chat.encode_prompt(messages, example["where"], _tools_of(example))
            prompt = next(message["content"] for message in reversed(messages) if message["role"] != "assistant")
            texts = {"prompt": prompt, "completion": completion, **adapter_of(example)}
            return [{**row, "length": len(row["input_ids"]), **texts}]

        return encode_prompt if split == "predict" else encode

    @override
    def _features(self, split: str) -> tuple[dict[str, Any], dict[str, Any]]:
        datasets = import_datasets()
        text, number = datasets.Value("string"), datasets.Value("int64")
        tokens = datasets.Sequence(datasets.Value("int32"))
        own = dict.fromkeys(self._adapter_key, text)
        columns = {"where": text, "messages": [{"role": text, "content": text}], "tools": text, **own}
        outputs = {"input_ids": tokens, "length": number, "cut_tokens": number, **own}
        if split == "predict":
            return {**columns, "completion": text}, {**outputs, "prompt": text, "completion": text}
        columns["learned"] = datasets.Sequence(number)
        return columns, {**outputs, "labels": tokens, "answer_tokens": number, "lost_answers": number}

    @override
    def _identity(self) -> str:
        template = self.chat.template if self._has_chats else None
        return f"{template!r} {self.max_length} {self.truncation} {self.train_on}"

    @override
    def _finished(self, split: str, examples: list[dict[str, Any]]) -> None:
        if split != "train" or not self._has_chats:
            return
        chats = (example for example in examples if not _is_document(example))
        labels = (row["labels"] for example in chats for row in self._encoder(split)(example) if row["labels"])
        if next(labels, [IGNORE_INDEX])[-1] not in {*self.chat.control_ids, self.tokenizer.eos_token_id, IGNORE_INDEX}:
            _log.info(
                "The chat template ends answers with no special token: the model cannot learn where to stop. Let the "
                "template write the tokenizer's end-of-turn token after each answer."
            )

    @override
    def _batch_keys(self, split: str, rows: Any) -> tuple[str, ...]:
        if split != "predict":
            return "input_ids", "labels", *self._adapter_key
        known = all(completion is not None for completion in rows["completion"])
        return ("input_ids", "prompt", *(["completion"] if known else []), *self._adapter_key)

    @property
    def _adapter_key(self) -> tuple[str, ...]:
        return () if self.adapter_field is None else ("adapter",)


def _is_document(example: dict[str, Any]) -> bool:
    return bool(example["messages"][0]["role"] == DOCUMENT)


def _tools_of(example: dict[str, Any]) -> list[Any] | None:
    return None if example["tools"] is None else json.loads(example["tools"])
