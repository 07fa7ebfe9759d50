"""Two graphs side by side: what a transform changes, or how any two models differ."""

from pe_fx.diff.changes import Change, Diff, Edit, WeightChange, compare, diff_transform
from pe_fx.diff.graph import Graph, Node, Operand

__all__ = ["Change", "Diff", "Edit", "Graph", "Node", "Operand", "WeightChange", "compare", "diff_transform"]
