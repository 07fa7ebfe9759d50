"""Models that hold what cannot be copied, and modules that copy themselves: all of pe_fx works, or says what stands in the way."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Net, linear, ties
from torch import Tensor, nn

import pe_fx
from pe_fx import PeFxError
from pe_fx.graph.copies import copied
from pe_fx.tied.weight import TiedWeight, tied_weights_in

X = torch.randn(3, 5, 8)


def mlp(layer: Callable[[int, int], nn.Module] = linear) -> nn.Sequential:
    return nn.Sequential(layer(8, 16), nn.GELU(), layer(16, 8))


def assert_copies(dense: nn.Module) -> nn.Module:
    """What copies the model makes of it what it should, of modules and parameters of its own, and leaves it alone; the tied one."""
    before = copy.deepcopy(dense.state_dict())
    modes = {module: module.training for module in dense.modules()}
    assert ties(pe_fx.plan(dense, X))
    tied = pe_fx.transform(dense, X)
    assert pe_fx.verify(tied, X)
    untied = pe_fx.untie(tied)
    assert torch.allclose(untied.eval()(X), tied.eval()(X), atol=1e-6)
    assert list(untied.state_dict()) == list(before) != list(tied.state_dict())
    for first, second in ((dense, tied), (dense, untied), (tied, untied)):
        assert not {*first.modules()} & {*second.modules()}
        assert not {*map(id, first.parameters())} & {*map(id, second.parameters())}
    assert {module: module.training for module in dense.modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    return tied


# ---- what a model holds


def running() -> threading.Thread:
    thread = threading.Thread(target=threading.Event().wait, args=(0.01,))
    thread.start()
    return thread


class Around:
    """An object that holds another one, of which pytree knows nothing."""

    def __init__(self, held: object) -> None:
        self.held = held


SHARED: dict[str, Callable[[], object]] = {
    "lock": threading.Lock,
    "reentrant lock": threading.RLock,
    "condition": threading.Condition,
    "lock of processes": multiprocessing.get_context("spawn").Lock,
    "module": lambda: torch,
    "queue": queue.Queue,
    "generator of random numbers": torch.Generator,
}
REFUSED: dict[str, Callable[[], object]] = {
    "file": lambda: Path("/dev/null").open(),  # noqa: SIM115
    "iterator": lambda: (i for i in range(3)),
    "queue without an end": queue.SimpleQueue,
    "values of a thread": threading.local,
}


@pytest.mark.parametrize("where", [lambda held: held, lambda held: {"of": [held] * 2}, Around], ids=["itself", "in a list", "in an object"])
@pytest.mark.parametrize("name", SHARED | REFUSED)
def test_held(name: str, where: Callable[[object], Any]) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(mlp())
        model[0].held = where((SHARED | REFUSED)[name]())
        return model

    if name in SHARED:
        assert_copies(build())
        return
    model = build()
    for function in (pe_fx.transform, copied):
        with pytest.raises(PeFxError, match=r"0\.held .*cannot be copied.*inplace=True"):
            function(model)
    assert pe_fx.transform(model, X, inplace=True) is model
    for function in (pe_fx.untie, pe_fx.verify):
        with pytest.raises(PeFxError, match=r"0\.held .*cannot be copied"):
            function(model)
    assert pe_fx.untie(model, inplace=True) is model
    assert type(model[0][2]) is nn.Linear


def test_a_thread() -> None:
    model = mlp()
    model.thread = running()
    assert pe_fx.transform(model, X, inplace=True)(X).shape == X.shape


def test_locks_are_shared_and_queues_are_not() -> None:
    model = mlp()
    model.lock, model.queue = threading.Lock(), queue.Queue()
    tied = pe_fx.transform(model, X)
    assert tied.lock is model.lock
    tied.queue.put(1)
    assert model.queue.empty()


# ---- tensors with a history


@pytest.mark.parametrize("keep", [lambda m, h: setattr(m, "kept", h), lambda m, h: m.around.__setattr__("held", [h, h.relu()])])
def test_an_activation_that_was_kept(keep: Callable[[Net, Tensor], None]) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        hidden = m.a(x).relu()
        keep(m, hidden)
        return m.b(hidden)

    model = Net(forward, a=linear(8, 16), b=linear(16, 8))
    model.__dict__["around"] = Around(None)
    model(X)
    assert_copies(model)(X)


def test_an_activation_that_was_kept_is_copied_with_its_value() -> None:
    model = mlp()
    model.kept = model[0](X)
    tied = pe_fx.transform(model, X)
    assert torch.equal(tied.kept, model.kept)
    assert tied.kept.data_ptr() != model.kept.data_ptr()
    assert model.kept.grad_fn is not None


def test_old_weight_norm() -> None:
    norm = nn.utils.weight_norm(nn.Conv1d(5, 5, 3, padding=1))
    model = nn.Sequential(mlp(), norm)
    model(X)
    assert_copies(model)


def test_a_view_of_a_parameter_must_follow_it() -> None:
    model = mlp()
    model.first = model[0].weight[0]
    with pytest.raises(PeFxError, match="first cannot be copied"):
        pe_fx.transform(model, X)
    assert ties(pe_fx.plan(model, X)) == ["2.weight ← 0.weightᵀ"]


# ---- modules that copy themselves


class Rebuilt(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        new = type(self)(self.in_features, self.out_features)
        new.load_state_dict(self.state_dict())
        memo[id(self)] = new
        return new


class Itself(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return self


class Reduced(nn.Linear):
    def __reduce__(self) -> Any:
        return type(self), (self.in_features, self.out_features), dict(self.__dict__)


class OtherState(nn.Linear):
    def __getstate__(self) -> Any:
        return self.in_features, self.out_features, self.weight.detach().clone(), self.bias.detach().clone()

    def __setstate__(self, state: Any) -> None:
        self.__init__(*state[:2])  # type: ignore[misc]
        self.weight.data, self.bias.data = state[2:]


class Handled(nn.Linear):
    """What cannot be copied is left out, and made anew."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.handle = iter(lambda: 0, 1)

    def __getstate__(self) -> Any:
        return {name: value for name, value in self.__dict__.items() if name != "handle"}

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)
        self.handle = iter(lambda: 0, 1)


class Unpickled(nn.Linear):
    def __getstate__(self) -> Any:
        raise RuntimeError("save the state_dict")


LAYERS = [Rebuilt, Itself, Reduced, OtherState, Handled, Unpickled]


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer: type[nn.Linear]) -> None:
    model = mlp(layer)
    tied = assert_copies(model)
    assert vars(tied[0]).keys() >= vars(model[0]).keys()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_deep_copy_is_tied_in_itself(layer: type[nn.Linear]) -> None:
    tied = pe_fx.transform(nn.Sequential(linear(8, 16), nn.GELU(), layer(16, 8)), X)
    other = copy.deepcopy(tied)
    with torch.no_grad():
        other[0].weight.zero_()
    assert not other[2].weight.any()
    assert tied[2].weight.any()
    assert pe_fx.verify(tied, X)


@pytest.mark.parametrize("options", [{}, {"mix": "signed"}, {"mix": "signed", "gain": 0.5}, {"mix": "fitted"}], ids=str)
def test_a_layout_is_not_pickled_but_made_of_the_plan(options: dict[str, Any]) -> None:
    """Whatever the version that wrote the file made of it."""
    tied = pe_fx.transform(mlp(), X, **options)
    _, _, _, weight = next(tied_weights_in(tied))
    state = weight.__getstate__()
    again = object.__new__(TiedWeight)
    again.__setstate__(state | {"layout": "of another version"})
    assert "layout" not in state
    assert again.layout == weight.layout
    assert torch.equal(pickle.loads(pickle.dumps(tied))(X), tied(X))


def test_a_layer_that_pickles_something_else() -> None:
    tied = pe_fx.transform(mlp(OtherState), X)
    with pytest.raises(PeFxError, match=r"OtherState .* pickle pe_fx\.untie\(model\)"):
        pickle.dumps(tied)
    again = pickle.loads(pickle.dumps(pe_fx.untie(tied)))
    assert torch.equal(again[2].weight, tied[2].weight)
    assert pe_fx.verify(pickle.loads(pickle.dumps(pe_fx.transform(mlp(Handled), X))), X)


def test_a_layer_that_makes_itself_anew() -> None:
    class Anew(nn.Linear):
        def __setstate__(self, state: Any) -> None:
            self.__init__(state["in_features"], state["out_features"])  # type: ignore[misc]
            self.weight.data = state["_parameters"]["weight"].data

    tied = pe_fx.transform(mlp(Anew), X)
    for function in (copy.deepcopy, pe_fx.untie, pe_fx.verify):
        with pytest.raises(PeFxError, match=r"cannot be copied .*inplace=True"):
            function(tied)
    before = tied(X)
    assert torch.allclose(pe_fx.untie(tied, inplace=True)(X), before, atol=1e-6)
    assert type(copy.deepcopy(tied)[2]) is Anew


class Block(nn.Module):
    """Copied by building a new one, which takes what it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> Block:
        new = Block()
        new.load_state_dict(self.state_dict(), strict=False)
        return new


class Teacher(Block):
    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self


@pytest.mark.parametrize("block", [Block, Teacher])
def test_blocks(block: type[nn.Module]) -> None:
    assert_copies(nn.Sequential(block(), nn.LayerNorm(8), block()))


def test_a_module_that_must_not_be_copied() -> None:
    class Unique(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
            raise NotImplementedError("there is one of these")

    model = nn.Sequential(mlp(), Unique(8, 8))
    with pytest.raises(PeFxError, match=r"1 cannot be copied \(NotImplementedError: there is one of these\)"):
        copied(model)


def test_graph_modules_share_no_code() -> None:
    gm = torch.fx.symbolic_trace(nn.Sequential(mlp()))
    before = gm.code
    tied = pe_fx.transform(gm, X)
    tied.graph.erase_node(next(node for node in tied.graph.nodes if node.op == "output"))
    tied.graph.output(next(iter(tied.graph.nodes)))
    tied.recompile()
    assert torch.equal(tied(X), X)
    assert gm.code == before
    assert not torch.equal(gm(X), X)
    assert_copies(gm)
