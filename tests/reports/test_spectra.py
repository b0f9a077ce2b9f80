"""The file of spectra, and what a page makes of it."""

from __future__ import annotations

import math
from base64 import b64decode
from pathlib import Path

import pytest

from genlora_lightning.reports.method import spectra_data
from genlora_lightning.reports.record import SPECTRA_FILE
from genlora_lightning.reports.spectra import (
    MOST_VALUES,
    Spectra,
    SpectrumPoint,
    header_line,
    kept_places,
    point_line,
    read_spectra,
)


def point(step: int, ranks: list[int], value: float = 0.5) -> SpectrumPoint:
    kept = [len(kept_places(rank)) for rank in ranks]
    return SpectrumPoint(
        step=step,
        effective=tuple(value * rank for rank in ranks),
        largest=tuple(float(1 + number) for number in range(len(ranks))),
        ratios=tuple(tuple(value**place for place in range(count)) for count in kept),
    )


def write(folder: Path, *parts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / SPECTRA_FILE).open("a") as file:
        file.writelines(parts)
    return folder


@pytest.mark.parametrize("rank", [1, 2, MOST_VALUES, MOST_VALUES + 1, 1000])
def test_kept_places_rise_from_the_first_to_the_last(rank):
    places = kept_places(rank)
    assert places == sorted(set(places))
    assert (places[0], places[-1], len(places)) == (0, rank - 1, min(rank, MOST_VALUES))


def test_points_are_read_as_they_were_written(tmp_path):
    ranks = [4, 100]
    written = [point(0, ranks), point(7, ranks, 0.25)]
    read = read_spectra([write(tmp_path, header_line(["a", "b"], ranks), *map(point_line, written))])
    assert read == Spectra(layers=("a", "b"), ranks=(4, 100), points=read.points)
    assert [one.step for one in read.points] == [0, 7]
    for one, other in zip(read.points, written, strict=True):
        assert (one.effective, one.largest) == (other.effective, other.largest)
        for mine, theirs in zip(one.ratios, other.ratios, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-7)


def test_a_layer_that_is_not_finite_is_told(tmp_path):
    broken = SpectrumPoint(step=1, effective=(math.nan,), largest=(math.nan,), ratios=((math.nan, math.nan),))
    read = read_spectra([write(tmp_path, header_line(["a"], [2]), point_line(broken))])
    assert math.isnan(read.points[0].effective[0])
    assert spectra_data(read)["effective"] == [[-1]]


def test_a_restart_replaces_what_came_after_its_checkpoint(tmp_path):
    head = header_line(["a"], [2])
    first = write(tmp_path / "0", head, *(point_line(point(step, [2])) for step in (0, 5, 9)))
    second = write(tmp_path / "1", head, *(point_line(point(step, [2], 0.25)) for step in (7, 11)))
    assert [one.step for one in read_spectra([first, second]).points] == [0, 5, 7, 11]
    again = write(first, head, point_line(point(5, [2], 0.125)))  # in the same folder
    assert [(one.step, one.effective) for one in read_spectra([again]).points] == [(0, (1.0,)), (5, (0.25,))]


def test_damaged_lines_are_left_out(tmp_path):
    good = point_line(point(3, [2]))
    folder = write(
        tmp_path, header_line(["a"], [2]), good[:-20] + "\n", '{"layers": 3}\n', "no\n", good.replace(":3", ":-3")
    )
    assert read_spectra([folder]) is None
    write(folder, good.replace('"ratios":"', '"ratios":"AAAA'), good)
    assert [one.step for one in read_spectra([folder]).points] == [3]
    assert read_spectra([tmp_path / "none"]) is None


def test_the_page_has_every_value_to_six_percent(tmp_path):
    names = ["m.layers.0.q", "m.layers.1.q", "head"]
    spectra = Spectra(
        layers=tuple(names), ranks=(4, 4, 3), points=(point(0, [4, 4, 3], 0.0), point(8, [4, 4, 3], 0.02))
    )
    data = spectra_data(spectra)
    assert data["groups"] == [{"name": "q", "members": [0, 1]}, {"name": "others", "members": [2]}]
    assert data["effective"] == [[0, 0, 0], [8, 8, 6]]
    values = b64decode(data["values"])
    assert len(values) == 2 * 11
    assert values[1] == 0  # of zeros
    for byte, ratio in zip(values[11:15], spectra.points[1].ratios[0], strict=True):
        assert 10 ** (data["decades"] * (byte / 255 - 1)) == pytest.approx(ratio, rel=0.06)


def test_many_points_and_layers_are_thinned_to_a_few_megabytes():
    ranks = [32] * 1000
    one = point(0, ranks)
    points = tuple(SpectrumPoint(**{**vars(one), "step": step}) for step in range(0, 1000, 10))
    data = spectra_data(Spectra(layers=tuple(f"l.{n}.q" for n in range(1000)), ranks=tuple(ranks), points=points))
    assert (data["steps"][0], data["steps"][-1]) == (0, 990)
    assert 40 <= len(data["steps"]) <= 47
    assert len(data["values"]) < 2_100_000
