from __future__ import annotations

from genlora_lightning.injection.heads import NEW_HEAD
from genlora_lightning.injection.report import InjectionReport, InjectionRow


def row(name: str, shape: str = "(4, 4)") -> InjectionRow:
    return InjectionRow(module=name, kind="Linear", shape=shape, trainable_parameters=1000, lora_parameters=3000)


def report(*adapted: InjectionRow, **changes: object) -> InjectionReport:
    values = {
        "title": "GenLoRA",
        "adapted": adapted,
        "trained": (),
        "skipped": {},
        "trainable_parameters": 1000 * len(adapted),
        "total_parameters": 1_000_000,
        "lora_parameters": 3000 * len(adapted),
    }
    return InjectionReport(**{**values, **changes})


def test_layers_that_differ_in_their_number_share_a_line_and_their_sums():
    table = report(row("layers.0.q"), row("layers.10.q"), row("layers.0.v", "(2, 4)")).table()
    lines = [line.split() for line in table.splitlines()]
    assert ["layers.*.q", "Linear", "2", "(4,", "4)", "2,000", "6,000"] in lines
    assert ["layers.*.v", "Linear", "1", "(2,", "4)", "1,000", "3,000"] in lines


def test_numbers_inside_a_name_are_not_collapsed():
    assert "layer4.fc1" in report(row("layer4.fc1")).table()


def test_full_table_has_a_line_for_each_module():
    table = report(row("layers.0.q"), row("layers.1.q")).table(collapse=False)
    assert "layers.0.q" in table
    assert "layers.1.q" in table


def test_summary_gives_counts_and_share():
    head = InjectionRow(
        module="head", kind="Linear", shape="trained in full", trainable_parameters=50, lora_parameters=0
    )
    text = report(row("q"), trained=(head,), trainable_parameters=1050).summary()
    assert "adapts 1 linears with 1,000 parameters (LoRA of the same rank: 3,000)" in text
    assert "Trained in full: head (50)" in text
    assert "Trainable: 1,050 of 1,000,000 (0.105 %)" in text


def test_what_was_left_alone_is_listed_by_reason_and_long_lists_are_cut():
    skipped = {f"layers.{i}.x": "in `exclude_modules`" for i in range(5)} | {"head": NEW_HEAD, "tied": "tied"}
    table = report(row("q"), skipped=skipped).table()
    assert "left alone: layers.0.x, layers.1.x, layers.2.x and 2 more (in `exclude_modules`)" in table
    assert "left alone: tied (tied)" in table
    assert "Left alone: head (output head; if it is new, name it in `modules_to_train`)" in table
