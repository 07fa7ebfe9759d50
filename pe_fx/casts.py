"""A pass on the joint graph: a weight and its views are cast to the dtype of autocast once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pe_fx.errors import PeFxError

aten, prims = torch.ops.aten, torch.ops.prims

UUID = "pe_fx casts 1"
CAST = prims.convert_element_type.default
CAT = aten.cat.default
SAME_SIZE = {aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default, aten.reshape.default}
PARTS = {aten.slice.Tensor, aten.select.int}


def share_casts(graph: fx.Graph) -> None:
    """Casts a weight before its views are taken: cast(Wᵀ) becomes cast(W)ᵀ, which the uses of W itself read, too.

    A cast of a part becomes a part of the whole's cast where the whole, or a concatenation that holds the part, is cast anyway.
    Every number stays the same bit. Raises `PeFxError` that names the node where it fails.
    """
    sharing = _Sharing(graph)
    casts = [node for node in graph.find_nodes(op="call_function", target=CAST) if _is_of_weight(node.args[0])]
    parts = [node for node in casts if _base(node.args[0]).target in PARTS]
    for node in (*(node for node in casts if node not in parts), *parts):
        try:
            sharing.share(node)
        except Exception as error:
            raise PeFxError(f"the cast {node.format_node()} cannot be shared: {error}") from error
    graph.eliminate_dead_code()


def _base(node: Any, through: set[Any] = SAME_SIZE) -> fx.Node:
    """What the node is a view of, by views of these kinds."""
    while node.target in through:
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node


def _is_of_weight(node: Any) -> bool:
    base = _base(node, SAME_SIZE | PARTS)
    return base.op == "placeholder" or (base.target is CAT and all(_is_of_weight(piece) for piece in base.args[0]))  # type: ignore[union-attr]


class _Sharing:
    """The casts made so far, by what is cast and the dtype."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.casts: dict[tuple[fx.Node, Any], fx.Node] = {}
        self.first_call = next(node for node in graph.nodes if node.op != "placeholder")
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def share(self, cast: fx.Node) -> None:
        source, dtype = cast.args
        assert isinstance(source, fx.Node)
        with self.graph.inserting_before(cast):
            found = self._cast_of(source, dtype, cast)
            if found is None:
                base = _base(source)
                with self.graph.inserting_before(self.first_call if base.op == "placeholder" else base.next):
                    self.casts[base, dtype] = self._new(CAST, (base, dtype), cast)
                found = self._cast_of(source, dtype, cast)
        assert found is not None
        cast.replace_all_uses_with(found)
        self.graph.erase_node(cast)

    def _cast_of(self, node: fx.Node, dtype: Any, like: fx.Node) -> fx.Node | None:
        """The node's cast as a view of one that there is already."""
        if (node, dtype) in self.casts:
            return self.casts[node, dtype]
        if node.target in SAME_SIZE | PARTS:
            base = self._cast_of(node.args[0], dtype, like)  # type: ignore[arg-type]
            return None if base is None else self._new(node.target, (base, *node.args[1:]), like, node.kwargs)
        for user in node.users:
            if user.target is CAT and (user, dtype) in self.casts and self.order[user] < self.order[like]:
                pieces: Any = user.args[0]
                dim: Any = user.args[1] if len(user.args) > 1 else 0
                start = sum(piece.meta["val"].shape[dim] for piece in pieces[: pieces.index(node)])
                return self._new(aten.slice.Tensor, (self.casts[user, dtype], dim, start, start + node.meta["val"].shape[dim]), like)
        return None

    def _new(self, target: Any, args: tuple[Any, ...], like: fx.Node, kwargs: dict[str, Any] | None = None) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs or {})
        node.meta = dict(like.meta)
        node.meta["val"] = target(*fx.node.map_arg(args, lambda arg: arg.meta["val"]), **(kwargs or {}))
        return node
