from __future__ import annotations

import json

import pytest
import yaml

from genlora_lightning.adapters.genlora.config import GenLoRAConfig
from genlora_lightning.cli.main import main
from genlora_lightning.injection.inject import inject_adapters
from genlora_lightning.planning import plan
from genlora_lightning.planning.activations import StepMemory
from tests.counted import counted_once  # noqa: F401 - a fixture
from tests.models import give_own_code, tiny_llama

pytestmark = pytest.mark.usefixtures("counted_once")


@pytest.fixture
def uncounted(counted_once, monkeypatch):  # noqa: F811 - after it
    """What is asked is which matrices are adapted, and not what their step holds."""
    for name in ("count_generation", "count_step"):
        monkeypatch.setattr(plan, name, lambda *_, **__: StepMemory(activations=0, factors=0))


@pytest.fixture
def model(tmp_path):
    """A folder with a configuration and no weights."""
    config = tiny_llama().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_plan_prints_what_json_holds(model, capsys):
    arguments = ["plan", "--model", model, "--rank", "4", "--num-groups-b", "2", "--gpus", "4", "--seq", "16"]
    arguments += ["--strategy", "fsdp2"]
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert f"{plan['trainable_parameters']:,}" in text
    assert plan["overlay"] in text
    assert plan["setup"]["strategy"] == "fsdp2"
    assert "lora shard" in text


def test_plan_says_at_once_what_it_does_and_takes_ddp_where_it_fits(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["plan", "--model", model, "--num-groups-b", "2", "--gpus", "4", "--seq", "16"]) == 0
    found = capsys.readouterr()
    assert found.err.startswith(f"Counting what a step of {model} holds")
    assert "4 GPUs, ddp;" in found.out
    assert "add --config genlora:strategy/ddp" in found.out


@pytest.mark.usefixtures("uncounted")
def test_plan_takes_names_or_an_expression_as_targets(model, capsys):
    for targets, linears in ((["q_proj", "v_proj"], 4), (["q_proj"], 2), ([r".*\.mlp\..*"], 6), (["all-linear"], 14)):
        assert (
            main(
                ["plan", "--model", model, "--num-groups-b", "2", "--seq", "8", "--json", "--target-modules", *targets]
            )
            == 0
        )
        assert json.loads(capsys.readouterr().out)["linears"] == linears


@pytest.mark.parametrize("command", [["plan", "--seq", "8"], ["budget", "--like-lora-rank", "2"]])
def test_code_of_the_model_is_run_if_asked_and_nobody_is_asked_on_the_terminal(
    tmp_path, model, command, capsys, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    give_own_code(tmp_path)
    assert main([*command, "--model", model]) == 1
    assert "contains custom code" in capsys.readouterr().err
    assert main([*command, "--model", model, "--trust-remote-code", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["linears"] == 14


@pytest.mark.usefixtures("uncounted")
def test_plan_counts_ranks_by_name_and_layers_by_number(model, capsys):
    arguments = ["plan", "--model", model, "--kind", "lora", "--rank", "4", "--seq", "8", "--target-modules", "q_proj"]
    arguments += ["--json"]
    counts = []
    for more in ([], ["--layers-to-transform", "1"], ["--rank-pattern", "q_proj=2"], ["--rank-pattern", r".*0\..*=6"]):
        assert main([*arguments, *more]) == 0
        counts.append(json.loads(capsys.readouterr().out)["trainable_parameters"])
    assert [count / counts[0] for count in counts] == [1, 0.5, 0.5, 1.25]
    assert main([*arguments, "--rank-pattern", "q_proj"]) == 1
    assert "`--rank-pattern` must be NAME=RANK, such as down_proj=16, got 'q_proj'" in capsys.readouterr().err


def test_bad_plans_are_errors_of_one_line(model, capsys):
    for arguments, message in (
        (["--gpus", "2", "--strategy", "single"], "'single' is for one GPU"),
        (["--num-groups-b", "64"], "`num_groups_b` is 64"),
        (["--target-modules", "nonsense"], "no linear matches"),
    ):
        assert main(["plan", "--model", model, *arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error


@pytest.mark.parametrize("rank", [2, 4])
def test_budget_prints_a_section_that_gives_so_many_parameters(model, capsys, rank):
    assert main(["budget", "--model", model, "--like-lora-rank", str(rank)]) == 0
    text = capsys.readouterr().out
    config = GenLoRAConfig(**yaml.safe_load(text)["adapter"])
    adapted = tiny_llama()
    report = inject_adapters(adapted, config)
    assert f"# {report.adapter_parameters:,} parameters on 14 linears" in text
    assert report.adapter_parameters == pytest.approx(report.lora_parameters / config.rank * rank, rel=0.15)


def test_budget_of_parameters_and_its_errors(model, capsys):
    assert main(["budget", "--model", model, "--parameters", "900", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] <= 945
    assert main(["budget", "--model", model, "--parameters", "9"]) == 1
    assert "The smallest GenLoRA adapter on these 14 linears" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["budget", "--model", model])


def test_plan_and_budget_know_lora(model, capsys):
    assert main(["plan", "--model", model, "--kind", "lora", "--rank", "4", "--seq", "8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trainable_parameters"] == plan["lora_parameters"]
    assert main(["plan", "--model", model, "--kind", "lora", "--gpus", "2", "--strategy", "ddp", "--seq", "8"]) == 0
    text = capsys.readouterr().out
    assert "LoRA of rank 16 trains" in text
    assert "LoRA of that rank" not in text
    assert "lora replicate" in text
    assert "genlora" not in text.replace("genlora:strategy", "")
    assert main(["budget", "--model", model, "--kind", "lora", "--like-lora-rank", "3"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["adapter"] == {"kind": "lora", "rank": 3, "alpha": 6.0}
    assert "as many as LoRA of rank 3.00 has" in text
    assert main(["plan", "--model", model, "--kind", "lora", "--num-groups-b", "4"]) == 1
    assert "Unknown LoRAConfig fields ['num_groups_b']" in capsys.readouterr().err


def test_budget_knows_polar_and_compacter(model, capsys):
    found = {}
    for kind in ("polar", "compacter"):
        assert main(["budget", "--model", model, "--kind", kind, "--parameters", "1600"]) == 0
        found[kind] = yaml.safe_load(capsys.readouterr().out)["adapter"]
    assert found["polar"] == {"kind": "polar", "rank": 3, "alpha": 6.0}
    assert found["compacter"] == {"kind": "compacter", "rank": 16, "num_products": 4}
    sizes = ["--rank", "8", "--num-products", "2", "--seq", "8", "--json"]
    assert main(["plan", "--model", model, "--kind", "compacter", *sizes]) == 0
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] == 2 * 464 + 8


def test_plan_counts_a_quantized_base_as_it_is_stored_and_does_not_shard_it(model, capsys):
    arguments = ["plan", "--model", model, "--kind", "lora", "--seq", "8", "--dtype", "float32", "--gpus", "2"]
    plans = {}
    for name in (None, "nf4", "int8", "int8-weight-only", "float8"):
        assert main([*arguments, "--json", *(["--quantization", name] if name else [])]) == 0
        plans[name] = json.loads(capsys.readouterr().out)
        assert plans[name]["setup"]["strategy"] == "ddp"
        assert plans[name]["trainable_parameters"] == plans[None]["trainable_parameters"]
    shapes = [(16, 16)] * 2 + [(8, 16)] * 2 + [(24, 16)] * 2 + [(16, 24)]
    n, rows = 2 * sum(o * i for o, i in shapes), 2 * sum(o for o, _ in shapes)
    saved = {name: plans[None]["memory"]["base"] - plan["memory"]["base"] for name, plan in plans.items()}
    assert saved["int8"] == saved["float8"] == 4 * n - n - 4 * rows
    assert saved["int8-weight-only"] == 4 * n - n - 5 * rows
    scales = 2 * sum(-(-o * i // 64) for o, i in shapes)
    assert saved["nf4"] == 4 * n - n // 2 - scales - 14 * (4 + 4 * 273)
    assert main([*arguments, "--quantization", "nf4"]) == 0
    assert "base, quantized: nf4" in capsys.readouterr().out
    assert main([*arguments, "--quantization", "nf4", "--strategy", "fsdp2"]) == 1
    assert "`quantization` is 'nf4', and fsdp2 cannot shard a quantized base" in capsys.readouterr().err
    assert main([*arguments, "--quantization", "nf4", "--gpu-memory", "0.00001"]) == 0
    assert "A quantized base is whole on each GPU" in capsys.readouterr().out
