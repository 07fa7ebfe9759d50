"""Who holds a parameter, and what an earlier transform left there."""

import torch
import torch.nn.functional as F
from oracle import Net, linear, weight
from torch import nn

import pe_fx
from pe_fx.tied.owners import owners_in


def test_a_source_is_known_where_nothing_is_left_of_what_is_tied_to_it() -> None:
    bare = Net(lambda m, x: F.linear(x, m.w), w=weight(8, 16))
    owners = owners_in(pe_fx.transform(nn.Sequential(linear(8, 16), nn.ReLU(), bare), torch.randn(2, 8)))
    assert {name: owner.read_by for name, owner in owners.items()} == {"0.weight": "2.w", "0.bias": ""}


def test_one_parameter_in_two_places() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    assert {name: (owner.name, owner.places) for name, owner in owners_in(model).items()} == {
        "a.weight": ("a.weight", 2),
        "b.weight": ("a.weight", 2),
    }
