"""Where it matters in which order a weight lies in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from pe_fx.graph.operation import number
from pe_fx.graph.ops import KINDS, Kind, base_name, value_of
from pe_fx.graph.views import call

_PRODUCTS = (Kind.PROJECTION, Kind.CONV, Kind.MATMUL)


def outline(value: Any) -> Any:
    """What a graph records as the value of a node, without memory: shapes, strides and dtypes.

    >>> outline(torch.ones(4, 3).t()).stride()
    (1, 3)
    """
    return pytree.tree_map(_outline, value)


def _outline(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided([*map(number, value.shape)], [*map(number, value.stride())], dtype=value.dtype, device="meta")
    return number(value) if isinstance(value, torch.SymInt) else value


def is_viewed(node: fx.Node) -> bool:
    """Whether anything but a product reads a value: products take any strides."""
    return any(user.op.startswith("call") and not _is_product(user) for user in node.users)


def _is_product(node: fx.Node) -> bool:
    return KINDS.get(base_name(node)) in _PRODUCTS


def fails(node: fx.Node, other: Tensor) -> bool:
    """Whether an operation of the graph fails where `other`, of the same shape and without memory, is the value of `node`.

    >>> gm = fx.symbolic_trace(lambda w: w.view(-1).cos())
    >>> weight, flat, cosine, _ = gm.graph.nodes
    >>> weight.meta["val"], flat.meta["val"], cosine.meta["val"] = torch.ones(4, 3), torch.ones(12), torch.ones(12)
    >>> fails(weight, outline(torch.ones(3, 4).t())), fails(weight, outline(torch.ones(4, 3)))
    (True, False)

    What becomes of it is followed as long as strides are others than before, and no farther than to products, which take any.
    """
    others: dict[fx.Node, Any] = {node: other}
    waiting = deque(node.users)
    while waiting:
        user = waiting.popleft()
        if not user.op.startswith("call") or _is_product(user):
            continue
        now = _run(user, others)
        if now is not None and _strides(now) == _strides(others.get(user, value_of(user))):
            continue
        before = _run(user, {})
        if now is None and before is not None:
            return True
        if before is not None and _strides(now) != _strides(before):
            others[user] = now
            waiting += user.users
    return False


def _run(node: fx.Node, others: Mapping[fx.Node, Any]) -> Any:
    """What the operation makes without memory; None where it fails, or cannot be run so."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: outline(others.get(operand, value_of(operand))))
    try:
        return call(node.target, args, kwargs)
    except Exception:  # whatever an operation raises
        return None


def _strides(value: Any) -> list[tuple[int, ...]]:
    return [tuple(map(number, tensor.stride())) for tensor in pytree.tree_leaves(value) if isinstance(tensor, Tensor)]
