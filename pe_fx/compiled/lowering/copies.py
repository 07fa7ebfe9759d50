"""A weight that convolutions read transposed is copied once for all of them."""

from __future__ import annotations

import torch
from torch import fx

from pe_fx.compiled.lowering.nodes import aten, new_node

CONVOLUTIONS = {aten.convolution.default: 1, aten.convolution_backward.default: 2}
"""The position of the weight among the arguments."""


def share_copies(graph: fx.Graph) -> None:
    """Copies each transposed weight that convolutions read.

    A convolution wants its weight contiguous: left alone, Inductor makes a copy for each use of a transposed one, and keeps them
    side by side. One copy was the fastest of four ways on the CPU: `conv2d` of the view 1.00 to 1.22 times its time,
    `conv_transpose2d` with W itself 0.81 to 1.52, a matrix product 0.72 to 2.17 (ResNet50's shapes, forward and backward).
    """
    for view in graph.find_nodes(op="call_function", target=aten.permute.default):
        readers = [user for user in view.users if user.target in CONVOLUTIONS and user.args[CONVOLUTIONS[user.target]] is view]
        if readers:
            with graph.inserting_after(view):
                copy = new_node(graph, view, aten.clone.default, view, memory_format=torch.contiguous_format)
            for reader in readers:
                reader.update_arg(CONVOLUTIONS[reader.target], copy)
