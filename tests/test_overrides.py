from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from genlora_lightning.overrides import forget, note, noted, put_on, take_off


class Thing:
    kept = 1

    def method(self) -> str:
        return "own"


def test_what_is_put_on_an_object_is_taken_off_without_a_trace():
    thing = Thing()
    thing.kept = 2
    before = dict(vars(thing))
    put_on(thing, method=lambda: "ours", kept=3, new=None)
    assert (thing.method(), thing.kept, thing.new) == ("ours", 3, None)
    take_off(thing, "method", "kept", "new", "never put on")
    assert (thing.method(), vars(thing)) == ("own", before)


def test_attribute_put_on_twice_goes_back_to_the_first():
    thing = Thing()
    put_on(thing, method=lambda: "first")
    put_on(thing, method=lambda: "second")
    take_off(thing, "method")
    assert thing.method() == "own"


def test_attributes_of_the_object_s_own_stay():
    thing = Thing()
    thing.kept = 5
    put_on(thing, method=lambda: "ours")
    take_off(thing, "kept")
    assert thing.kept == 5


@pytest.mark.parametrize(
    "target", [Thing(), nn.Linear(2, 2), nn.Parameter(torch.zeros(2))], ids=lambda t: type(t).__name__
)
def test_notes_stay_with_an_object_until_they_are_forgotten(target):
    names = set(vars(target))
    assert noted(target, "a") is None
    assert noted(target, "a", 4) == 4
    note(target, "a", 1)
    note(target, "b", 2)
    assert (noted(target, "a"), noted(target, "b")) == (1, 2)
    assert (forget(target, "a"), forget(target, "b"), forget(target, "c")) == (1, 2, None)
    assert set(vars(target)) == names


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_the_notes_and_can_be_put_right_by_themselves(duplicate):
    module = nn.Linear(2, 2)
    note(module, "a", [1])
    put_on(module, extra=5, in_features=9)
    other = duplicate(module)
    noted(other, "a").append(2)
    take_off(other, "extra", "in_features")
    assert (noted(other, "a"), other.in_features, hasattr(other, "extra")) == ([1, 2], 2, False)
    assert (noted(module, "a"), module.in_features, module.extra) == ([1], 9, 5)


def test_wrapper_passes_on_the_note_of_what_is_inside():
    class Wrapper(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def __getattr__(self, name: str) -> object:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inside"), name)

    module = nn.Linear(2, 2)
    note(module, "a", 1)
    assert noted(Wrapper(module), "a") == 1
