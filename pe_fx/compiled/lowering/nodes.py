"""New nodes in a joint graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten, prims = torch.ops.aten, torch.ops.prims

CAST = prims.convert_element_type.default
SAME_SIZE = {aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default, aten.reshape.default}
PARTS = {aten.slice.Tensor, aten.select.int}


def new_node(graph: fx.Graph, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call whose value is worked out from its arguments' fake values; the rest of its record is that of `like`."""
    node = graph.call_function(target, args, kwargs)
    node.meta = dict(like.meta)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda arg: arg.meta["val"]), **kwargs)
    return node


def base_of(node: Any, through: set[Any]) -> fx.Node:
    """What the node is a view of, by operations of these kinds."""
    while node.target in through:
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node
