"""Feed-forward layers of few rows read their tied weight once."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from pe_fx.compiled.lowering import single_read_cpu, single_read_gpu
from pe_fx.compiled.lowering.nodes import CAST, aten, new_node
from pe_fx.compiled.lowering.single_read import OPERATION
from pe_fx.compiled.lowering.unit import FLOATS, NoUnit, unit_between
from pe_fx.tied.assembly import Mix

log = logging.getLogger(__name__)

MOVES = {
    *(aten.permute.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default),
    *(aten.clone.default, aten.slice.Tensor, aten.cat.default, aten.full.default, aten.mul.Tensor),
}
"""What a mix consists of: of a weight, these make nothing but its entries, moved and times a number."""


class Product(NamedTuple):
    """A node that is x times a matrix, and a bias."""

    node: fx.Node
    x: fx.Node
    matrix: fx.Node
    bias: fx.Node | None


class Back(NamedTuple):
    """How the second product's matrix is made of the weight of the first: its output channels mixed, and scaled."""

    weight: fx.Node
    mix: Mix | None = None
    gain: fx.Node | None = None


def read_once(graph: fx.Graph) -> None:
    """Makes one operation of both products of a tied layer, and of the elementwise functions between them.

    Where a gradient is needed, something else reads what is between, and all stays as it is; so it does where rows are many or not
    known, where the one operation takes longer.
    """
    known: dict[tuple[str, bool], Mix | None] = {}
    for node in list(graph.nodes):
        second = _product(node)
        if second is None:
            continue
        firsts = _firsts(second.x)
        back = _back(second, firsts, known)
        if back is not None:
            try:
                _rewrite(graph, second, _in_order(firsts, back), back)
            except NoUnit as reason:
                log.info("%s reads its weight twice: %s", node, reason)


def _product(node: fx.Node) -> Product | None:
    if node.kwargs:
        return None
    if node.target is aten.addmm.default:
        bias, x, matrix = map(_node, node.args)
        return Product(node, x, matrix, bias) if bias.meta["val"].shape == node.meta["val"].shape[1:] else None
    if node.target is aten.mm.default:
        x, matrix = map(_node, node.args)
        return Product(node, x, matrix, None)
    if node.target is aten.sum.dim_IntList and node.args[1:] == ([1],) and _node(node.args[0]).target is aten.mul.Tensor:
        rows, columns = _node(node.args[0]).args
        if _is_unsqueezed(rows, 2) and _is_unsqueezed(columns, 0):  # as Inductor writes the product of one row with coordinate descent
            x, matrix = _node(_node(rows).args[0]), _node(_node(columns).args[0])
            return Product(node, x, matrix, None) if _fit(x.meta["val"], matrix.meta["val"]) else None
    return None


def _fit(x: Tensor, matrix: Tensor) -> bool:
    """Whether they can be multiplied as they are: of elementwise products, one may be of another dtype, or expanded."""
    return x.dim() == matrix.dim() == 2 and x.shape[1] == matrix.shape[0] and x.dtype is matrix.dtype


def _is_unsqueezed(arg: Any, dim: int) -> bool:
    return isinstance(arg, fx.Node) and bool(arg.target is aten.unsqueeze.default and arg.args[1] == dim)


LARGEST = 256
"""Operations between two products, beyond which none is looked for: residuals lead from each layer back to the first."""


def _firsts(hidden: fx.Node) -> list[Product]:
    """The products from which the hidden value is made, by operations on one tensor or several."""
    found: list[Product] = []
    seen: set[fx.Node] = set()
    todo = [hidden]
    while todo and len(seen) < LARGEST:
        node = todo.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        product = _product(node)
        if product is None:
            todo += node.all_input_nodes
        else:
            found.append(product)
    return [] if todo else found


def _turned(node: fx.Node, dtype: torch.dtype | None = None) -> tuple[fx.Node, bool]:
    """What the matrix is a view of, and whether it is its transpose; casts to `dtype` count as views."""
    turned = False
    while node.target is aten.permute.default or _is_cast(node, dtype):
        if node.target is aten.permute.default:
            turned ^= node.args[1] in ([1, 0], [-1, 0], [1, -2], [-1, -2])
        node = _node(node.args[0])
    return node, turned


def _is_cast(node: fx.Node, dtype: torch.dtype | None) -> bool:
    """Casts to any other dtype than that of the product round the weight, or cut it off."""
    return node.target is CAST and node.args[1] is dtype


def _uncast(node: fx.Node) -> fx.Node:
    return _node(node.args[0]) if node.target is CAST else node


def _weight(product: Product) -> fx.Node | None:
    """The weight that a linear layer applies, (h, d)."""
    weight, turned = _turned(product.matrix)
    return weight if turned else None


def _back(second: Product, firsts: list[Product], known: dict[tuple[str, bool], Mix | None]) -> Back | None:
    """How the second product's matrix is made of a weight of `firsts`, where it is."""
    weights = {_uncast(weight): weight for weight in map(_weight, firsts) if weight is not None}
    dtype = second.node.meta["val"].dtype
    base, turned = _turned(second.matrix, dtype)
    base, gain = _scaled(base, turned)
    base, again = _turned(base, dtype)
    turned ^= again
    if base in weights:
        return None if turned else Back(weights[base], None, gain)
    chain = _chain(base, set(weights), dtype)
    origins = {node for node in chain if node in weights}
    if len(origins) != 1:
        return None
    (origin,) = origins
    key = _text(chain, origin), turned
    if key not in known:
        with _disable_current_modes():  # Inductor's passes run on fake tensors
            known[key] = _mix(chain, origin, turned)
    mix = known[key]
    return None if mix is None else Back(weights[origin], mix, gain)


def _scaled(matrix: fx.Node, turned: bool) -> tuple[fx.Node, fx.Node | None]:
    """The matrix before a learned factor for each output channel, and the factors; `turned`: it is (d, h), else (h, d)."""
    if matrix.target is aten.mul.Tensor and all(isinstance(arg, fx.Node) for arg in matrix.args):
        whole, factors = (_node(arg) for arg in matrix.args)
        channels = whole.meta["val"].shape[0 if turned else 1]
        if list(factors.meta["val"].shape) in ([[channels, 1]] if turned else [[channels], [1, channels]]):
            return whole, factors
    return matrix, None


def _node(arg: Any) -> fx.Node:
    assert isinstance(arg, fx.Node)
    return arg


def _chain(node: fx.Node, weights: set[fx.Node], dtype: torch.dtype) -> list[fx.Node]:
    """What the value is made of, in order, from weights and constants on; empty where anything but moves and signs makes it."""
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> bool:
        if node in found:
            return True
        fits = node in weights or ((node.target in MOVES or _is_cast(node, dtype)) and all(map(visit, node.all_input_nodes)))
        found[node] = None
        return fits

    return list(found) if visit(node) else []


def _text(chain: list[fx.Node], origin: fx.Node) -> str:
    """The same for all chains that compute the same, whatever their nodes are called."""
    place = {node: f"%{i}" for i, node in enumerate(chain)}

    def line(node: fx.Node) -> str:
        if node is origin:
            return str(list(node.meta["val"].shape))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), place.__getitem__)
        return f"{node.target}{args}{kwargs}"

    return "\n".join(map(line, chain))


def _mix(chain: list[fx.Node], origin: fx.Node, turned: bool) -> Mix | None:
    """The mix of the transposed weight that the chain computes, found by running it on the positions of a weight's entries.

    `turned`: it computes (d, h), else (h, d).
    """
    height, width = origin.meta["val"].shape
    # no 1: times an entry is no sign
    positions = torch.arange(2.0, height * width + 2, dtype=torch.float64, device="cpu").view(height, width)
    values: dict[fx.Node, Any] = {origin: positions}
    for node in chain:
        if node is not origin:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
            values[node] = args[0] if node.target is CAST else node.target(*args, **kwargs)  # type: ignore[operator]
    found = values[chain[-1]] if turned else values[chain[-1]].t()
    if found.shape != (width, height) or width < 2:
        return None
    mix = Mix(0, 1, int(found[1, 0].abs()) - 2, width, height)
    return mix if mix.hands > 0 and width % mix.hands == 0 and torch.equal(mix(positions.t()), found) else None


def _in_order(firsts: list[Product], back: Back) -> list[Product]:
    """The product with the weight that is read back comes last."""
    return sorted(firsts, key=lambda product: _weight(product) is back.weight)


def _rewrite(graph: fx.Graph, second: Product, firsts: list[Product], back: Back) -> None:
    weights = [_weight(first) for first in firsts]
    x = firsts[0].x
    if any(weight is None for weight in weights) or any(_plain(first.x) is not _plain(x) for first in firsts):
        raise NoUnit("the products before it are of several inputs")
    rows, width = x.meta["val"].shape
    shape, dtype, device = back.weight.meta["val"].shape, x.meta["val"].dtype, x.meta["val"].device
    if second.node.meta["val"].dtype is not dtype:
        raise NoUnit("the products are of two dtypes")
    if not all(isinstance(size, int) for size in (rows, *shape)) or any(weight.meta["val"].shape != shape for weight in weights):  # type: ignore[union-attr]
        raise NoUnit("a size is dynamic, or its weights differ in shape")
    if not all(weight.meta["val"].is_contiguous() for weight in weights):  # type: ignore[union-attr]
        raise NoUnit("a weight is stored the other way round")
    kernel = {"cpu": single_read_cpu, "cuda": single_read_gpu}.get(device.type)
    if kernel is None or dtype not in FLOATS or not kernel.pays(device, rows, width, shape[0], len(weights), dtype):
        raise NoUnit(f"with {rows} rows of {dtype} on {device.type}, two products take no longer")
    if len(second.x.users) > 1:
        raise NoUnit("its hidden values are read elsewhere, too")
    unit, _ = unit_between({first.node: name for first, name in zip(firsts, "abcdefgh", strict=False)}, second.x, shape[0])
    negated = 0 if back.mix is None else shape[0] // 2
    splits = kernel.splits_of(device, rows, width, len(weights), dtype)
    with graph.inserting_before(second.node):

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return new_node(graph, second.node, target, *args, **kwargs)

        parts = call(OPERATION, x, weights, [first.bias for first in firsts], negated, unit, splits)
        total = call(aten.sum.dim_IntList, parts, [0])
        if back.mix is not None:
            total = _mixed(call, total, back.mix.hands, device)
        if back.gain is not None:
            total = call(aten.mul.Tensor, total, call(aten.reshape.default, back.gain, [width]))
        if second.bias is not None:
            total = call(aten.add.Tensor, total, second.bias)
        result = call(CAST, total, dtype)
    second.node.replace_all_uses_with(result)


def _plain(x: fx.Node) -> fx.Node:
    """What rows are a view of: gated layers may each have their own."""
    return _node(x.args[0]) if x.target in (aten.view.default, aten.reshape.default) else x


def _mixed(call: Any, total: fx.Node, hands: int, device: torch.device) -> fx.Node:
    """The mix of the weight's output channels, done to the result's."""
    rows, width = total.meta["val"].shape
    dealt = call(aten.permute.default, call(aten.view.default, total, [rows, width // hands, hands]), [0, 2, 1])
    flat = call(aten.reshape.default, dealt, [rows, width])
    signs = [
        call(aten.full.default, [count], sign, dtype=torch.float32, device=device)
        for count, sign in ((width // 2, -1), (width - width // 2, 1))
    ]
    product: fx.Node = call(aten.mul.Tensor, flat, call(aten.cat.default, signs))
    return product
