from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from genlora_lightning.reports.curves import curve, join_curves, read_curves, thin


def metrics(folder: Path, text: str) -> Path:
    path = folder / "metrics.csv"
    path.write_text(text)
    return path


def test_every_figure_is_read_with_the_steps_at_which_it_was_logged(tmp_path):
    read = read_curves(metrics(tmp_path, "epoch,lr,step,val_loss\n0,0.1,4,\n0,0.2,9,\n0,,9,1.5\n"))
    assert {name: (one.steps, one.values) for name, one in read.items()} == {
        "lr": ((4, 9), (0.1, 0.2)),
        "val_loss": ((9,), (1.5,)),
    }
    assert read["lr"].lowest == (0.1, 4)
    assert read["lr"].highest == (0.2, 9)


def test_a_line_that_was_cut_off_is_no_figure(tmp_path):
    # 0.25 may have been 0.2599
    assert read_curves(metrics(tmp_path, "step,lr\n1,0.5\n2,0.25"))["lr"].steps == (1,)
    assert read_curves(metrics(tmp_path, "step,lr\n1,0.5\n2,x\n,1\n"))["lr"].values == (0.5,)
    assert read_curves(metrics(tmp_path, "")) == {}


def test_values_that_are_not_finite_are_told_and_not_drawn(tmp_path):
    one = read_curves(metrics(tmp_path, "step,loss\n1,2.0\n2,nan\n3,inf\n4,1.0\n"))["loss"]
    assert (one.steps, one.values, one.not_finite) == ((1, 4), (2.0, 1.0), (2, 3))


def test_a_file_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no column `step`"):
        read_curves(metrics(tmp_path, "time,loss\n1,2\n"))
    (tmp_path / "metrics.csv").write_bytes(b"step\n\xff\xfe\n")
    with pytest.raises(ValueError, match="it is no text"):
        read_curves(tmp_path / "metrics.csv")


def test_a_restart_replaces_what_was_trained_after_its_checkpoint():
    before = {"loss": curve([(1, 5.0), (2, 4.0), (3, math.nan), (4, 9.0)]), "lr": curve([(4, 0.1)])}
    after = {"loss": curve([(3, 3.0), (5, 2.0)]), "val_loss": curve([(5, 2.5)])}
    joined = join_curves([before, {}, after])
    assert {name: (one.steps, one.values, one.not_finite) for name, one in joined.items()} == {
        "loss": ((1, 2, 3, 5), (5.0, 4.0, 3.0, 2.0), ()),
        "val_loss": ((5,), (2.5,), ()),
    }


@pytest.mark.parametrize("count", [2000, 2001, 2999, 100_003])
def test_a_thinned_curve_keeps_its_ends_and_all_extremes_of_its_stretches(count):
    source = random.Random(count)
    values = [source.gauss(0, 1) for _ in range(count)]
    values[count // 3], values[count // 2] = 50.0, -50.0
    whole = curve([(3 * i, value) for i, value in enumerate(values)])
    kept = thin(whole)
    assert min(count, 1000) <= len(kept.values) <= 2000
    assert set(zip(kept.steps, kept.values, strict=True)) <= set(zip(whole.steps, whole.values, strict=True))
    assert list(kept.steps) == sorted(set(kept.steps))
    assert (kept.steps[0], kept.steps[-1]) == (whole.steps[0], whole.steps[-1])
    assert (kept.lowest, kept.highest) == (whole.lowest, whole.highest)


def test_a_spike_of_one_step_stays_visible():
    spikes = {777: 9.0, 31_415: -9.0, 99_998: 9.0}
    kept = thin(curve([(i, spikes.get(i, 0.0)) for i in range(100_000)]))
    assert spikes.items() <= dict(zip(kept.steps, kept.values, strict=True)).items()
