"""A weight and its views are cast to the dtype of autocast once."""

from __future__ import annotations

import logging
from typing import Any

from torch import fx

from pe_fx.compiled.lowering.nodes import CAST, PARTS, SAME_SIZE, aten, base_of, new_node

log = logging.getLogger(__name__)

CAT = aten.cat.default


def share_casts(graph: fx.Graph) -> None:
    """Casts a weight before its views are taken: cast(Wᵀ) becomes cast(W)ᵀ, which the uses of W itself read, too.

    A cast of a part becomes a part of the whole's cast where the whole, or a concatenation that holds the part, is cast anyway.
    Every number stays the same. A cast with which this fails is left as it was, and logged.
    """
    casts = [node for node in graph.find_nodes(op="call_function", target=CAST) if _is_of_weight(node.args[0])]
    if not casts:
        return
    sharing = _Sharing(graph)
    parts = [node for node in casts if base_of(node.args[0], SAME_SIZE).target in PARTS]
    for node in (*(node for node in casts if node not in parts), *parts):
        try:
            sharing.share(node)
        except Exception:
            log.exception("not shared, and left as it was: %s", node.format_node())


def _is_of_weight(node: Any) -> bool:
    base = base_of(node, SAME_SIZE | PARTS)
    return base.op == "placeholder" or (base.target is CAT and all(_is_of_weight(piece) for piece in base.args[0]))  # type: ignore[union-attr]


class _Sharing:
    """The casts made so far, by what is cast and the dtype."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.casts: dict[tuple[fx.Node, Any], fx.Node] = {}
        self.last_placeholder = graph.find_nodes(op="placeholder")[-1]
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def share(self, cast: fx.Node) -> None:
        source, dtype = cast.args
        assert isinstance(source, fx.Node)
        with self.graph.inserting_before(cast):
            found = self._cast_of(source, dtype, cast)
            if found is None:
                base = base_of(source, SAME_SIZE)
                with self.graph.inserting_after(self.last_placeholder if base.op == "placeholder" else base):
                    self.casts[base, dtype] = new_node(self.graph, cast, CAST, base, dtype)
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
            return None if base is None else new_node(self.graph, like, node.target, base, *node.args[1:], **node.kwargs)
        for user in node.users:
            if user.target is CAT and (user, dtype) in self.casts and self.order[user] < self.order[like]:
                pieces: Any = user.args[0]
                dim: Any = user.args[1] if len(user.args) > 1 else 0
                start = sum(piece.meta["val"].shape[dim] for piece in pieces[: pieces.index(node)])
                stop = start + node.meta["val"].shape[dim]
                return new_node(self.graph, like, aten.slice.Tensor, self.casts[user, dtype], dim, start, stop)
        return None
