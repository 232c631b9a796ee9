"""What a model is called with: positional arguments, mappings, nested tensors; and batches taken apart."""

from __future__ import annotations

from collections import OrderedDict, UserDict

import pytest
import torch
from torch import nn

from gkt_fast.network.batch import inputs_of, take_apart
from gkt_fast.network.inputs import Keywords, call_model, first_rows, map_tensors, model_inputs, rows_in


class Named(nn.Module):
    def forward(self, image, scale=1.0, *, bias=0.0):
        return image * scale + bias


class Whole(nn.Module):
    def forward(self, batch):
        return batch["image"] * 2.0


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.linear.weight)

    def forward(self, x):
        return self.linear(x)


class AnyKeywords(nn.Module):
    def forward(self, **entries):
        return sum(entries.values())


X, Y = torch.randn(3, 2), torch.randn(3, 2)


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_a_mapping_is_passed_as_the_model_takes_it(kind):
    assert torch.equal(call_model(Named(), model_inputs(Named(), kind(image=X, bias=Y))), X + Y)
    whole, single = Whole(), Single()
    assert torch.equal(call_model(whole, model_inputs(whole, kind(image=X))), 2 * X)
    assert torch.equal(call_model(single, model_inputs(single, kind(pixel_values=X))), X)
    assert torch.equal(call_model(AnyKeywords(), model_inputs(AnyKeywords(), kind(a=X, b=Y))), X + Y)


def test_tuples_and_lists_are_positional_and_a_mapping_in_a_tuple_is_one_argument():
    for inputs in ((X, 2.0), [X, 2.0]):
        assert torch.equal(call_model(Named(), model_inputs(Named(), inputs)), 2 * X)
    assert model_inputs(Named(), ({"image": X},)) == ({"image": X},)
    assert model_inputs(Named(), X) == (X,)


def test_a_mapping_that_fits_in_part_is_refused_with_the_names():
    with pytest.raises(TypeError, match=r"'image', 'index'.*takes 'image', 'scale', 'bias'.*index"):
        model_inputs(Named(), {"image": X, "index": Y})
    with pytest.raises(TypeError, match="missing a required argument: 'image'"):
        model_inputs(Named(), {"scale": 2.0})
    with pytest.raises(TypeError, match=r"keys 'pixel_values', 'mask'.*takes none by name.*TypeError"):
        model_inputs(Single(), {"pixel_values": X, "mask": Y})


def test_which_of_the_two_a_model_takes_is_found_once_and_leaves_no_trace():
    calls = []

    class Noisy(Single):
        def forward(self, x):
            calls.append(x)
            self.last = x
            return torch.dropout(super().forward(x), 0.5, True)

    model = Noisy().train()
    state = torch.get_rng_state()
    for _ in range(3):
        assert model_inputs(model, {"pixel_values": X})[0] is X
    assert (
        len(calls) == 2
        and not hasattr(model, "last")
        and model.training
        and torch.equal(torch.get_rng_state(), state)
    )


def test_nested_tensors_are_mapped_counted_and_cut():
    nested = (UserDict(a=X, b=[Y, "text"]), Keywords(c=X[:, 0], d=None))
    doubled = map_tensors(lambda tensor: 2 * tensor, nested)
    assert type(doubled[0]) is UserDict and type(doubled[1]) is Keywords and doubled[1]["d"] is None
    assert torch.equal(doubled[0]["b"][0], 2 * Y) and torch.equal(nested[0]["a"], X)
    head = first_rows(nested, 2)
    assert rows_in(nested) == 3 and rows_in(head) == 2 and head[1]["c"].shape == (2,)
    assert rows_in(("text", torch.tensor(1.0))) is None


def test_batches_are_pairs_or_mappings():
    for batch in ((X, Y), [X, Y]):
        assert take_apart(batch).inputs is X and take_apart(batch).targets is Y
    for key in ("labels", "label", "targets", "target"):
        batch = take_apart(UserDict({"pixel_values": X, key: Y}))
        assert batch.inputs == {"pixel_values": X} and batch.targets is Y
    assert take_apart(((X, Y), X)).inputs == (X, Y)


def test_other_batches_are_refused_with_what_came():
    with pytest.raises(
        TypeError, match=r"a tuple of 3 \(Tensor, Tensor, int\); it must be a pair.*\(\(a, b\)"
    ):
        take_apart((X, Y, 1))
    with pytest.raises(TypeError, match=r"a tensor of shape \(3, 2\) alone"):
        take_apart(X)
    with pytest.raises(TypeError, match="of the class str"):
        take_apart("images")
    with pytest.raises(ValueError, match=r"keys 'pixel_values'; one of them.*'labels' or"):
        take_apart({"pixel_values": X})
    with pytest.raises(ValueError, match="one alone"):
        take_apart({"x": X, "labels": Y, "target": Y})
    with pytest.raises(ValueError, match="holds 'labels' alone"):
        take_apart({"labels": Y})


def test_batches_without_targets():
    assert inputs_of(X) is X and inputs_of((X,)) is X and inputs_of([X, Y, 1]) is X
    assert inputs_of({"image": X, "label": Y}) == {"image": X}
    with pytest.raises(ValueError, match="empty tuple"):
        inputs_of(())
