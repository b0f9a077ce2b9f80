from __future__ import annotations

from genlora_lightning import save_adapter
from genlora_lightning.cli.main import main
from tests.hub import Hub
from tests.interop.test_lora_export import adapted
from tests.models import tiny_llama


def test_adapter_is_pushed_and_used_by_its_name(hub: Hub, tmp_path, capsys):
    save_adapter(adapted("llama"), tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    assert main(["push", str(tmp_path / "adapter"), "me/reviews", "--private"]) == 0
    assert capsys.readouterr().out.startswith(f"The adapter is in me/reviews: {hub.address}/me/reviews/commit/")
    assert hub.private == {"me/reviews"}
    assert main(["push", str(tmp_path / "adapter"), "me/reviews", "--revision", "v1"]) == 0
    assert set(hub.repos["me/reviews"]) == {"main", "v1"}
    capsys.readouterr()
    assert main(["verify", "me/reviews@v1"]) == 0
    assert capsys.readouterr().out.startswith("me/reviews@v1 is complete and unchanged")
    for command, out in (("merge", "merged"), ("export-lora", "lora")):
        assert main([command, "me/reviews", str(tmp_path / "base"), str(tmp_path / out)]) == 0
        assert any((tmp_path / out).iterdir())
    capsys.readouterr()
    assert main(["inspect", "me/nothing"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        "genlora: error: There is no local checkpoint or adapter folder me/nothing, and me/nothing is not on the"
        in captured.err
    )
    assert captured.err.count("\n") == 1


def test_adapter_on_the_hub_answers(hub: Hub, talking, capsys):
    command = ["generate", "--max-new-tokens", "4", "w7 w8"]
    assert main(["push", str(talking / "first"), "me/talker"]) == 0
    capsys.readouterr()
    assert main([*command[:1], str(talking / "first"), *command[1:]]) == 0
    wanted = capsys.readouterr().out
    assert main([*command[:1], "me/talker", *command[1:]]) == 0
    assert capsys.readouterr().out == wanted
