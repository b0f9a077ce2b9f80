from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from genlora_lightning.backbone.pretrained import load_pretrained, load_tokenizer


def load(source: str, **options: object) -> torch.nn.Module:
    return load_pretrained("AutoModelForCausalLM", source, **options)[0]


def test_missing_folder_is_named_with_the_place_that_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for source in (str(tmp_path / "nothing"), "./nothing", "data/models/nothing", "~/nothing-of-this-name"):
        with pytest.raises(FileNotFoundError, match=r"The model folder '.*nothing.*' does not exist \(looked for /"):
            load(source)


def test_folder_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no Hugging Face model folder: it has no config.json \(it is empty\)"):
        load(str(tmp_path))
    (tmp_path / "adapter.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"\(it holds adapter.safetensors\). Give the folder of the base model"):
        load(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"adapter\.safetensors' is a file"):
        load(str(tmp_path / "adapter.safetensors"))


def test_name_that_is_neither_a_folder_nor_on_the_hub_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def unreachable() -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_session", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    message = r"'some/model' is neither a local folder \(looked for /.*\) nor reachable .* ConnectionError: Name or"
    with pytest.raises(OSError, match=message):
        load("some/model")
    with pytest.raises(OSError, match="nor reachable on the Hugging Face Hub"):
        load_tokenizer("some/model")


def test_name_is_left_to_transformers_where_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import transformers

    class Session:
        def head(self, url: str, timeout: float) -> None:
            assert url.startswith("http")

    def from_pretrained(source: str, **_: object) -> None:
        raise OSError(f"{source} is not a valid model identifier\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(
        OSError, match=r"'some/model' is neither .* OSError: some/model is not a valid model ident[a-z]*$"
    ):
        load("some/model")
    with pytest.raises(OSError, match=r"'some model' is neither a local folder .* Repo id must"):
        load("some model")


def test_offline_mode_asks_nobody_and_says_that_the_cache_lacks_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("the Hub was asked"))
    with pytest.raises(OSError, match="'some/model-that-nobody-has' is neither a local folder"):
        load("some/model-that-nobody-has")


def test_damaged_weights_are_an_error_of_one_sentence(model_folders: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(model_folders["llama"], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model in '.*cut' cannot be loaded .*AutoModelForCausalLM. .*Error: ") as cut:
        load(str(folder))
    assert "\n" not in str(cut.value)

    weights.unlink()
    with pytest.raises(ValueError, match=r"The model in '.*cut' cannot be loaded .* no file named"):
        load(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"The model in '.*cut' cannot be loaded"):
        load(str(folder))


def test_tokenizer_that_is_not_there_is_an_error_that_names_the_folder(
    model_folders: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(model_folders["llama"], folder, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(ValueError, match=r"The model in '.*bare' cannot be loaded with transformers' AutoTokenizer"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_asked_for_is_the_one_loaded_under_any_default(model_folders: dict[str, str], dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does with precision="bf16-true"
    try:
        model = load(model_folders["llama"], dtype=dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_names_of_absent_weights_come_back_and_nothing_is_logged(
    model_folders: dict[str, str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    _, absent = load_pretrained("AutoModelForSequenceClassification", model_folders["bert"], num_labels=3)
    assert absent == ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert load_pretrained("AutoModelForCausalLM", model_folders["llama"])[1] == []  # the tied head is not absent
    captured = capsys.readouterr()
    assert captured.out + captured.err + caplog.text == ""
