from __future__ import annotations

import io
import shutil
import signal
from collections.abc import Callable, Iterator

import pytest

from genlora_lightning import save_adapter
from genlora_lightning.cli.main import main
from tests.interop.test_lora_export import adapted

SHORT = ("--max-new-tokens", "4")


@pytest.fixture
def chat(monkeypatch, capsys) -> Callable[..., list[str]]:
    """Gives lines to `genlora chat` that is no terminal, and returns the lines that it prints."""

    def run(model: object, *lines: str, options: tuple[str, ...] = ()) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        code = main(["chat", str(model), *SHORT, *options])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out.splitlines()

    return run


@pytest.fixture
def terminal(monkeypatch, capsys) -> Callable[..., str]:
    """The same on a terminal, where a line may be an exception: the key that was pressed instead."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def run(model: object, *lines: str | type[BaseException]) -> str:
        given: Iterator[str | type[BaseException]] = iter(lines)

        def read(prompt: str = "") -> str:
            line = next(given, EOFError)
            if not isinstance(line, str):
                raise line
            print(f"{prompt}{line}")
            return line

        monkeypatch.setattr("sys.stdin", Terminal())
        monkeypatch.setattr("builtins.input", read)
        capsys.readouterr()
        assert main(["chat", str(model), *SHORT]) == 0
        assert next(given, None) is None
        return str(capsys.readouterr().out)

    return run


def test_answers_without_a_terminal_are_lines_and_follow_the_conversation(talking, chat):
    first, second = chat(talking / "first", "w7 w8", "", "w9")
    (alone,) = chat(talking / "first", "w9")
    assert second != alone
    assert chat(talking / "first", "w7 w8", "/reset", "w9") == [first, "A new conversation.", alone]


def test_base_and_both_are_the_answers_of_base_and_adapter(talking, chat):
    (base,) = chat(talking / "base", "w7 w8")
    (adapter,) = chat(talking / "first", "w7 w8")
    assert base != adapter
    lines = chat(talking / "first", "/base", "w7 w8", "/base", "/reset", "w7 w8", "/reset", "/both", "w7 w8")
    answers = [line for line in lines if not line.startswith(("From now on", "A new"))]
    assert answers == [base, adapter, f"[base] {base}", f"[adapter] {adapter}"]


def test_other_adapter_takes_the_place_of_the_first(talking, chat):
    (wanted,) = chat(talking / "second", "w7 w8")
    assert chat(talking / "first", f"/adapter {talking / 'second'}", "w7 w8")[-1] == wanted
    assert chat(talking / "base", f"/adapter {talking / 'second'}", "w7 w8", "/quit", "w9")[-1] == wanted


def test_adapter_stays_if_the_other_cannot_be_loaded(talking, tmp_path, chat, terminal):
    save_adapter(adapted("llama"), tmp_path / "foreign")
    shutil.copytree(talking / "second", tmp_path / "damaged")
    (tmp_path / "damaged" / "manifest.json").write_text("{}")
    (wanted,) = chat(talking / "first", "w7 w8")
    for name, reason in (("foreign", "another base"), ("damaged", "format version"), ("none", "is no adapter folder")):
        out = terminal(talking / "first", f"/adapter {tmp_path / name}", "w7 w8")
        assert reason in out, out
        assert wanted in out.splitlines()


def test_terminal_shows_prompts_help_and_errors_and_goes_on(talking, chat, terminal):
    (answer,) = chat(talking / "first", "w7 w8")
    out = terminal(talking / "first", "/help", "/nonsense", " ".join(["w7"] * 70), "w7 w8", "/base")
    assert "/adapter PATH   load another adapter" in out
    assert "error: There is no command '/nonsense'; /help lists them." in out
    assert "error: The prompt has 73 tokens, and the model takes 64 with the answer. Shorten it." in out
    assert "adapter> w7 w8\n" in out
    assert answer in out.splitlines()  # the question that failed is forgotten
    assert "From now on answers come without the adapter." in out
    assert "error: There is no adapter here" in terminal(talking / "base", "/both")


def test_ctrl_c_twice_leaves_and_once_does_not(talking, terminal):
    out = terminal(talking / "first", KeyboardInterrupt, "w7", KeyboardInterrupt, KeyboardInterrupt)
    assert out.count("Ctrl-C again leaves") == 2


def interrupt_after(monkeypatch: pytest.MonkeyPatch, tokens: int, times: int) -> None:
    """Press Ctrl-C while an answer's n-th token is written."""
    from transformers import TextStreamer

    original, seen = TextStreamer.put, []

    def put(self: TextStreamer, value: object) -> None:
        original(self, value)
        seen.append(value)
        if len(seen) == 1 + tokens:  # the first is the prompt
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TextStreamer, "put", put)


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(talking, terminal, chat, monkeypatch):
    (whole,) = chat(talking / "first", "w7 w8")
    handler = signal.getsignal(signal.SIGINT)
    interrupt_after(monkeypatch, 2, times=1)
    out = terminal(talking / "first", "w7 w8", "/reset", "w7 w8").splitlines()
    stopped = out[out.index("[stopped]") - 1]
    assert whole.startswith(stopped)
    assert 2 <= len(stopped.split()) < len(whole.split())
    assert out[-2] == whole
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_after_a_stopped_answer_leaves_and_so_does_a_second_one_in_it(talking, terminal, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, times=1)
        terminal(talking / "first", "w7 w8", KeyboardInterrupt)
    interrupt_after(monkeypatch, 2, times=2)
    assert "[stopped]" not in terminal(talking / "first", "w7 w8")


def test_errors_without_a_terminal_end_the_command(talking, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/nonsense\nw7\n"))
    assert main(["chat", str(talking / "first"), *SHORT]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "genlora: error: There is no command '/nonsense'; /help lists them.\n"


def test_several_adapters_are_switched_by_name(talking, chat, terminal):
    (first,), (second,), (base,) = (chat(talking / name, "w7 w8") for name in ("first", "second", "base"))
    options = ("--adapter", f"b={talking / 'second'}")
    lines = ("w7 w8", "/adapter b", "/reset", "w7 w8", "/base", "/reset", "w7 w8", "/adapter first", "/reset", "w7 w8")
    given = [line for line in chat(talking / "first", *lines, options=options) if line in (first, second, base)]
    assert given == [first, second, base, first]
    given = chat(talking / "base", "w7 w8", f"/adapter {talking / 'first'}", "/reset", "w7 w8", options=options)
    assert given[0] == second
    assert given[-1] == first
