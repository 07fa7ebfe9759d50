"""Files of strangers: nothing in them runs, unless --trust is given."""

from __future__ import annotations

import functools
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shell
import torch
from torch import nn

from pe_fx import PeFxError
from pe_fx.cli.specs import load

MARK = "code_ran"
CODE = f"__import__('pathlib').Path({MARK!r}).touch()"
IMPORTED = "brought_along"


class Payload:
    """Runs code when it is unpickled; what it then is does for a tensor, a state_dict or a tuple."""

    def __init__(self, then: str) -> None:
        self.then = then

    def __reduce__(self) -> Any:
        return eval, (f"{CODE} or {self.then}",)


def pickled(then: str) -> bytes:
    buffer = io.BytesIO()
    torch.save(Payload(then), buffer)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{IMPORTED}.py").write_text(f"{CODE}\nfactory = list\n")
    return tmp_path


def ran() -> bool:
    return Path(MARK).exists()


run = functools.partial(shell.run, code=None)


# ---- exported programs


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.steps = torch.arange(8.0)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.layers(x) + self.steps * mask}


def exported(name: str, change: Callable[[dict[str, bytes]], None]) -> None:
    """An exported program, its records changed."""
    batch = torch.export.Dim("batch", min=2, max=64)
    inputs = (torch.randn(4, 8),), {"mask": torch.ones(8)}
    torch.export.save(torch.export.export(Model(), *inputs, dynamic_shapes={"x": {0: batch}, "mask": None}), "plain.pt2")
    with zipfile.ZipFile("plain.pt2") as plain:
        root = plain.namelist()[0].partition("/")[0]
        records = {record.removeprefix(f"{root}/"): plain.read(record) for record in plain.namelist()}
    change(records)
    with zipfile.ZipFile(name, "w") as changed:
        for record, content in records.items():
            changed.writestr(f"{root}/{record}", content)


def in_json(record: str) -> Callable[[Callable[[Any], None]], Callable[[dict[str, bytes]], None]]:
    """Makes a change of a record's JSON one of the records."""

    def wrapped(change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
        def changed(records: dict[str, bytes]) -> None:
            body = json.loads(records[record])
            change(body)
            records[record] = json.dumps(body).encode()

        return changed

    return wrapped


def renamed(old: str, new: str) -> Callable[[dict[str, bytes]], None]:
    def change(records: dict[str, bytes]) -> None:
        for record, content in records.items():
            if record.endswith(".json"):
                records[record] = content.replace(json.dumps(old).encode(), json.dumps(new).encode())

    return change


WEIGHTS, CONSTANTS, GRAPH = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json", "models/model.json"


def a_pickled_weight(records: dict[str, bytes]) -> None:
    in_json(WEIGHTS)(lambda body: body["config"]["layers.0.weight"].update(use_pickle=True, path_name="weight_9"))(records)
    records["data/weights/weight_9"] = pickled("__import__('torch').nn.Parameter(__import__('torch').zeros(16, 8))")


def a_pickled_constant(records: dict[str, bytes]) -> None:
    in_json(CONSTANTS)(lambda body: body["config"]["steps"].update(use_pickle=True, path_name="tensor_9"))(records)
    records["data/constants/tensor_9"] = pickled("__import__('torch').zeros(8)")


def an_opaque_object(records: dict[str, bytes]) -> None:
    in_json(CONSTANTS)(lambda body: body["config"]["steps"].update(path_name="opaque_obj_0", tensor_meta=None, use_pickle=True))(records)
    records["data/constants/opaque_obj_0"] = pickle.dumps(Payload("{}"))


def pickled_weights_of_an_older_layout(records: dict[str, bytes]) -> None:
    records["data/weights/model.pt"] = pickled("{}")
    del records[WEIGHTS]


def pickled_inputs(records: dict[str, bytes]) -> None:
    records["data/sample_inputs/model.pt"] = pickled("((), {})")


@in_json(GRAPH)
def a_size_that_is_code(body: Any) -> None:
    values = body["graph_module"]["graph"]["tensor_values"]
    values["linear"]["sizes"][0] = {"as_expr": {"expr_str": f"{CODE} or Integer(4)", "hint": {"as_int": 4}}}


def with_tree(tree: dict[str, Any], field: str = "in_spec") -> Callable[[dict[str, bytes]], None]:
    @in_json(GRAPH)
    def change(body: Any) -> None:
        signature = body["graph_module"]["module_call_graph"][0]["signature"]
        protocol, spec = json.loads(signature[field])
        signature[field] = json.dumps([protocol, spec | tree])

    return change


FACTORY = {"default_factory_module": IMPORTED, "default_factory_name": "factory", "dict_context": []}

RUN = {
    "weight": (a_pickled_weight, "the values of layers.0.weight are pickled"),
    "constant": (a_pickled_constant, "the values of steps are pickled"),
    "inputs": (pickled_inputs, "its example inputs are more than tensors and plain values"),
    "older layout": (pickled_weights_of_an_older_layout, "it is not laid out as torch.export.save does today"),
    "size": (a_size_that_is_code, "its expr_str holds"),
    "type": (with_tree({"type": "collections.defaultdict", "context": FACTORY, "children_spec": []}), "takes or returns a collections.de"),
}
"""What torch.export.load runs."""


@pytest.mark.parametrize("way", RUN)
def test_what_an_exported_program_carries_does_not_run(way: str) -> None:
    change, why = RUN[way]
    exported("evil.pt2", change)
    for command in (["plan"], ["diff"], ["diff", "evil.pt2"], ["transform", "-o", "tied.safetensors"]):
        result = run(*command, "evil.pt2")
        assert result.exit_code == 2
        assert result.stderr.startswith("pe-fx: error: evil.pt2 may run code when it is loaded: ")
        assert why in result.stderr
        assert result.stderr.endswith("If you trust whoever made it, --trust loads it\n")
        assert not ran()
    run("plan", "evil.pt2", "--trust")
    assert ran(), "this is no attack"


@in_json(GRAPH)
def a_function(body: Any) -> None:
    node = body["graph_module"]["graph"]["nodes"][0]
    node.update(target="torch.os.system", inputs=[{"name": "", "arg": {"as_string": f"touch {MARK}"}, "kind": 1}])


def calling(target: str) -> Callable[[dict[str, bytes]], None]:
    return in_json(GRAPH)(lambda body: body["graph_module"]["graph"]["nodes"][0].update(target=target))


@in_json(GRAPH)
def an_operator_argument(body: Any) -> None:
    body["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = {"as_operator": "_operator.methodcaller"}


@in_json(GRAPH)
def an_argument_of_generated_code(body: Any) -> None:
    body["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [f"x={CODE}", "mask"]


@in_json(GRAPH)
def a_keyword(body: Any) -> None:
    body["graph_module"]["graph"]["nodes"][0]["inputs"][0]["name"] = f"input={CODE}, other"


ENUM = json.dumps([{"__enum__": True, "fqn": f"{IMPORTED}:factory", "name": "x"}])

REFUSED = {
    "opaque object": an_opaque_object,
    "function": a_function,
    "file to read": calling("torch.ops.aten.from_file.default"),
    "file to read into": calling("torch.ops.aten.from_file.out"),
    "file to write": calling("torch.ops.aten.save.default"),
    "library": calling("torch.ops.load_library"),
    "others' operator": calling("torch.ops.inductor._alloc_from_pool.default"),
    "operator": an_operator_argument,
    "argument": an_argument_of_generated_code,
    "keyword": a_keyword,
    "variable": renamed("linear", f"y = {CODE}\n    linear"),
    "dunder": renamed("linear", "__builtins__"),
    "parameter": renamed("layers.0.weight", f'layers.0.weight", {CODE}) or ("'),
    "class": renamed("layers.0.weight", "__class__.weight"),
    "key": renamed("mask", f"mask': {CODE}, 'y"),
    "enum": with_tree({"type": "builtins.dict", "context": ENUM, "children_spec": []}, "out_spec"),
}
"""What goes to eval, exec or import in some versions of torch, or might."""


@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_told_to_be_harmless_is_refused(way: str) -> None:
    exported("evil.pt2", REFUSED[way])
    with pytest.raises(PeFxError, match=r"evil.pt2 may run code when it is loaded: .*--trust loads it$"):
        load("evil.pt2")
    assert not ran()


@in_json(GRAPH)
def guards(body: Any) -> None:
    body["guards_code"] = [f"{CODE} or True"]


def compiled_code(records: dict[str, bytes]) -> None:
    records["data/aotinductor/model/model.so"] = b"\x7fELF"


@pytest.mark.parametrize("change", [guards, compiled_code])
def test_what_is_not_needed_is_left_out(change: Callable[[dict[str, bytes]], None]) -> None:
    exported("odd.pt2", change)
    assert load("odd.pt2").model(torch.ones(3, 8), mask=torch.ones(8))["y"].shape == (3, 8)
    assert not ran()


class Mixed(nn.Module):
    """Regions, sizes, text arguments, buffers."""

    def __init__(self, cast: bool) -> None:
        super().__init__()
        self.cast = cast
        self.first, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.second = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        with torch.no_grad():
            scale = x.sum() * 2
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cast):
            y = torch.einsum("bi,bi->bi", self.first(x), self.first(x))
        z = self.second(self.norm(y.float()))
        return z * scale, [torch.div(x, 2, rounding_mode="floor")], x.shape[0] * 2


@pytest.mark.parametrize("strict", [False, True])
def test_a_plain_program_is_what_it_was(strict: bool) -> None:
    x = torch.randn(4, 8)
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    torch.export.save(torch.export.export(Mixed(cast=not strict).eval(), (x,), dynamic_shapes=shapes, strict=strict), "plain.pt2")
    read, whole = load("plain.pt2"), load("plain.pt2", trust=True)
    torch.testing.assert_close(read.example_inputs, whole.example_inputs)
    torch.testing.assert_close(read.model(x[:3]), whole.model(x[:3]))
    assert run("diff", "plain.pt2", "--json").stdout == run("diff", "plain.pt2", "--trust", "--json").stdout


# ---- weights

NET = "from torch import nn\nbuild = lambda: nn.Linear(3, 3)\n"


@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.bin", "evil.ckpt"])
def test_weights_do_not_run(name: str) -> None:
    Path("net.py").write_text(NET)
    Path(name).write_bytes(pickled("{'weight': __import__('torch').zeros(3, 3), 'bias': __import__('torch').zeros(3)}"))
    arguments = ("transform", "net.py:build", "--checkpoint", name, "-o", "tied.safetensors")
    result = run(*arguments)
    assert result.exit_code == 2
    assert f"{name} is no checkpoint of weights alone" in result.stderr
    assert "--trust" in result.stderr
    assert not ran()
    assert run(*arguments, "--trust").exit_code == 0
    assert ran()


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_a_plan_is_no_pickle(name: str) -> None:
    Path("net.py").write_text(NET)
    Path(name).write_bytes(pickle.dumps(Payload("{}")))
    assert run("plan", "net.py:build", "--plan", name, "--trust").exit_code == 2
    assert not ran()


def test_a_file_that_an_option_names_does_not_run() -> None:
    Path("evil.pth").write_bytes(pickled("{}"))
    result = run("plan", "timm:resnet18,checkpoint_path=evil.pth")
    assert result.exit_code == 2
    assert not ran()


def test_the_help_says_what_runs() -> None:
    for command in ("plan", "diff", "transform"):
        shown = " ".join(run(command, "--help").stdout.split())
        assert "A callable is Python code, which runs" in shown
        assert "For files whose maker you trust." in shown
