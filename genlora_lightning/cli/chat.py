"""Run ``genlora chat``: talk to what was trained, and to its base beside it."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from genlora_lightning.cli.generate import (
    Subject,
    add_model,
    add_sampling,
    answered,
    make_prompts,
    sampling,
)

if TYPE_CHECKING:
    from genlora_lightning.data.prompts import Prompts

_HELP = """\
/base           answer without the adapter, or with it again
/both           answer without the adapter and with it, or with it alone again
/adapter PATH   load another adapter of the same base; of several (--adapter), the name of one
/reset          begin a new conversation
/help           this
/quit           leave, as Ctrl-D and Ctrl-C twice do; Ctrl-C once stops an answer"""

Mode = Literal["adapter", "base", "both"]


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``genlora chat``."""
    add_model(parser)
    add_sampling(parser)


def run_chat(options: argparse.Namespace) -> None:
    """Talk, on a terminal; elsewhere each line of standard input is a message, and only the answers are printed.

    Raises:
        ValueError: Something that was given cannot be used; while talking on a terminal it is printed instead.
        OSError: A file or the base is not there.
    """
    settings = sampling(options)
    subject = Subject(options)
    prompts = make_prompts(subject, options)
    subject.load()
    talk = _Talk(subject, prompts, settings)
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        with_adapter = f" with {subject.adapter}" if subject.adapter else ""
        print(f"{subject.module.source}{with_adapter}. /help lists the commands; Ctrl-D leaves.")
        _edit_lines()
    pressed_before = False
    while True:
        try:
            line = input(f"{talk.mode}> " if on_terminal else "")
            pressed_before = False
            if line.strip() == "/quit":
                return
            pressed_before = talk.take(line.strip())
        except EOFError:
            if on_terminal:
                print()
            return
        except KeyboardInterrupt:
            if pressed_before or not on_terminal:
                print()
                return
            pressed_before = True
            print("\nCtrl-C again leaves, and so do Ctrl-D and /quit.")
        except _LeaveError:
            print()
            return
        except (ValueError, OSError) as error:
            if not on_terminal:
                raise
            print(f"error: {' '.join(str(error).split())}")


def _edit_lines() -> None:
    """Let the arrow keys work in ``input``, where Python has the library for it."""
    try:
        import readline  # noqa: F401 - the import does it
    except ImportError:
        return


class _LeaveError(Exception):
    """Ctrl-C was pressed twice while an answer was written."""


class _Talk:
    """A conversation with a model that has an adapter or none."""

    def __init__(self, subject: Subject, prompts: Prompts, settings: dict[str, Any]) -> None:
        self.subject = subject
        self.prompts = prompts
        self.settings = settings
        self.mode: Mode = "adapter" if subject.adapter else "base"
        self.messages = prompts.started()

    def take(self, line: str) -> bool:
        """Do what a line says, or answer it; returns whether Ctrl-C stopped the answer.

        Raises:
            ValueError: It cannot be done; the conversation is as it was.
        """
        command, _, argument = line.partition(" ")
        if not line:
            return False
        if not command.startswith("/"):
            return self._answer(line)
        if command == "/help":
            print(_HELP)
        elif command == "/reset":
            self.messages = self.prompts.started()
            print("A new conversation.")
        elif command == "/adapter":
            self._switch(argument.strip())
        elif command in ("/base", "/both"):
            self._choose("base" if command == "/base" else "both")
        else:
            raise ValueError(f"There is no command {command!r}; /help lists them.")
        return False

    def _choose(self, mode: Mode) -> None:
        if self.subject.adapter is None:
            raise ValueError("There is no adapter here to answer without; /adapter PATH loads one.")
        self.mode = "adapter" if self.mode == mode else mode
        words = {"adapter": "with the adapter", "base": "without the adapter", "both": "without the adapter, then with"}
        print(f"From now on answers come {words[self.mode]}.{self._trained_in_full()}")

    def _trained_in_full(self) -> str:
        from genlora_lightning.injection.full_training import trained_modules

        names = ", ".join(trained_modules(self.subject.module.adapter_root()))
        return f" ({names}: trained in full, and as trained there, too.)" if names and self.mode != "adapter" else ""

    def _switch(self, path: str) -> None:
        if not path:
            several = self.subject.adapters
            known = "" if several is None else f", of {', '.join(several.names)}"
            raise ValueError(f"/adapter needs a path or name; loaded is {self.subject.adapter or 'none'}{known}.")
        self.subject.switch(path)
        self.mode = "both" if self.mode == "both" else "adapter"
        print(f"Loaded {path}. The conversation goes on; /reset begins a new one.")

    def _answer(self, question: str) -> bool:
        before = list(self.messages)
        self.messages.append({"role": "user", "content": question})
        try:
            for side in ("base", "adapter") if self.mode == "both" else (self.mode,):
                if self.mode == "both":
                    print(f"[{side}] ", end="", flush=True)
                text, stopped = self._write(side)
        except BaseException:
            self.messages = before
            raise
        self.messages.append({"role": "assistant", "content": text})  # of both, the adapter's
        return stopped

    def _write(self, side: str) -> tuple[str, bool]:
        """Print an answer as it comes; returns it, and whether Ctrl-C stopped it."""
        from transformers import TextStreamer

        from genlora_lightning.injection.inject import adapters_disabled

        module = self.subject.module
        batch = self.prompts.batch([self.prompts.of_messages(self.messages)])
        streamer = TextStreamer(module.tokenizer, skip_prompt=True, skip_special_tokens=True)
        is_off = side == "base" and self.subject.adapter is not None
        with _first_interrupt_noted() as pressed, adapters_disabled(module.model) if is_off else nullcontext():
            written = answered(
                module,
                batch,
                {**self.settings, "streamer": streamer, "stopping_criteria": [_stops_when(pressed)]},
            )
        if pressed.is_set():
            print("[stopped]")
        return written[0]["generated"], pressed.is_set()


def _stops_when(pressed: threading.Event) -> Any:
    import torch

    def is_done(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), pressed.is_set(), dtype=torch.bool, device=input_ids.device)

    return is_done


@contextmanager
def _first_interrupt_noted() -> Iterator[threading.Event]:
    """Note the first Ctrl-C, so that an answer ends between two tokens and not inside the model; leave at the second.

    Raises:
        _LeaveError: At the second one.
    """
    pressed = threading.Event()

    def handle(*_: Any) -> None:
        if pressed.is_set():
            raise _LeaveError
        pressed.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)
