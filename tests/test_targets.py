from __future__ import annotations

import pytest
from torch import nn

from genlora_lightning.targets import match_modules


def model() -> nn.Module:
    return nn.ModuleDict(
        {"q_proj": nn.Linear(2, 2), "my_q_proj": nn.Linear(2, 2), "a": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})}
    )


def test_a_name_matches_whole_or_after_a_dot_never_inside_a_part():
    assert list(match_modules(model(), ["q_proj"], "exclude_modules")) == ["q_proj", "a.q_proj"]
    assert list(match_modules(model(), ["a.q_proj"], "exclude_modules")) == ["a.q_proj"]


def test_no_patterns_match_nothing():
    assert match_modules(model(), [], "exclude_modules") == {}


def test_a_pattern_without_a_match_is_an_error_with_the_names_that_are_near():
    with pytest.raises(
        ValueError, match=r"`exclude_modules` names 'q_prj', which no module matches. Near matches: q_p"
    ):
        match_modules(model(), ["a", "q_prj"], "exclude_modules")
