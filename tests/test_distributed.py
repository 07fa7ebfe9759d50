"""Tied models on several processes: as one process, whatever the way. All in float64, where rounding hides no error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import timm
import torch
from models import gpt2
from oracle import linear
from ranks import STEPS, Case, Job, Run, on_ranks
from torch import Tensor, nn

import pe_fx
from pe_fx import PeFxError, Plan
from pe_fx.api import plan_of
from pe_fx.distributed import check, tensor_parallel_plan, units
from pe_fx.ties import Block, Site, Tie

TOLERANCE = 1e-9


def mlp(width: int = 8, between: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(linear(4, width), nn.GELU(), *([] if between is None else [between]), linear(width, 4))


class Net(nn.Module):
    """Blocks in a list, and a layer beside them."""

    def __init__(self, *blocks: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = head or linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


# ---- on several processes


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32, embed_dim=32, depth=2, num_heads=4)


def resnet() -> nn.Module:
    """In eval mode: in train mode each process would normalise by the statistics of its own images."""
    return timm.create_model("resnet50", num_classes=7, layers=(2, 2, 1, 1), channels=(4, 8, 8, 8), zero_init_last=False).eval()


def text() -> nn.Module:
    return gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


class Separate(nn.Module):
    """Attention by four layers, and a gated unit."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (linear(width, width) for _ in range(4))
        self.gate, self.up, self.down = linear(width, 24), linear(width, 24), linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


WORDS = torch.randn(4, 6, 16)
IMAGES = torch.randn(4, 3, 32, 32)
TOKENS = torch.arange(48).reshape(4, 12)


def case(dense: nn.Module, batch: Tensor, **options: Any) -> Case:
    plan = pe_fx.plan(dense, batch, **options)
    return Case(pe_fx.apply(dense, plan).double(), plan, batch.double() if batch.is_floating_point() else batch)


def apart() -> Case:
    """One W in two blocks that are no neighbours, and one in a block and the layer beside the blocks."""
    net = Net(mlp(4), mlp(), mlp(), mlp())
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}

    def tie(target: str, source: str, transposed: bool) -> Tie:
        return Tie(Block.whole(target, shapes[target]), Block.whole(source, shapes[source]), transposed)

    ties = (
        tie("blocks.3.0.weight", "blocks.1.0.weight", False),
        tie("blocks.3.2.weight", "blocks.1.0.weight", True),
        tie("head.weight", "blocks.0.0.weight", True),
    )
    plan = plan_of([Site("mlp", "", tuple(tie.target for tie in ties), ties)], shapes)
    return Case(pe_fx.apply(net, plan).double(), plan, torch.randn(4, 4, dtype=torch.float64))


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    net = resnet()
    stages = {name: case(net, IMAGES, entry=name.removeprefix("resnet, ")) for name in RESNETS}
    signed = {
        "vit, signed": case(vit(), IMAGES, **VARIANT),
        "attention, signed": case(Separate(), WORDS, **VARIANT),
        "attention, fitted": case(Separate(), WORDS, mix="fitted"),
        "resnet, expand, signed": case(net, IMAGES, entry="expand", **VARIANT),
    }
    dense = Case(mlp().double(), Plan(), torch.randn(4, 4, dtype=torch.float64))
    tied = {"vit": case(vit(), IMAGES), "gpt2": case(text(), TOKENS), "attention": case(Separate(), WORDS), "apart": apart()}
    tied["pairs"] = case(nn.Sequential(*(Separate() for _ in range(3))), WORDS, rules=["attention"], share={"attention": 2, "glu": 2})
    return tied | stages | signed | {"dense": dense, "dense vit": Case(vit().double(), Plan(), IMAGES.double())}


@pytest.fixture(scope="module")
def alone(cases: dict[str, Case]) -> dict[str, Run]:
    return {name: ranks.alone(case) for name, case in cases.items() if case.plan.sites}


VARIANT: dict[str, Any] = {"mix": "signed", "gain": 0.5}
RESNETS = ("resnet, keep", "resnet, slice", "resnet, expand")
WAYS = [(2, way, name, False) for way in (ranks.ddp, ranks.fsdp) for name in ("vit", "gpt2", *RESNETS)]
WAYS += [(2, ranks.fsdp, "apart", False), (4, ranks.fsdp, "resnet, expand", False)]
WAYS += [(4, way, "vit", False) for way in (ranks.ddp, ranks.fsdp)]
WAYS += [(world, ranks.tensor_parallel, name, False) for world in (2, 4) for name in ("vit", "gpt2", "attention")]
WAYS += [(4, ranks.two_dimensional, name, False) for name in ("vit", "gpt2")]
WAYS += [(2, way, name, True) for way in (ranks.ddp, ranks.fsdp, ranks.tensor_parallel) for name in ("vit", "gpt2")]
WAYS += [(2, ranks.fsdp, "resnet, expand", True)]
WAYS += [(2, way, "pairs", False) for way in (ranks.ddp, ranks.fsdp, ranks.tensor_parallel)]
WAYS += [(2, way, "vit, signed", False) for way in (ranks.ddp, ranks.fsdp, ranks.tensor_parallel)]
WAYS += [(2, ranks.tensor_parallel, "attention, signed", False), (2, ranks.fsdp, "resnet, expand, signed", False)]
WAYS += [(2, way, "attention, fitted", False) for way in (ranks.ddp, ranks.fsdp, ranks.tensor_parallel)]
"""How many processes, how, which model, whether with activation checkpointing."""


def name_of(way: Callable[..., Any], case: str, checkpointing: bool = False) -> str:
    return f"{way.__name__}, {case}{', checkpointing' * checkpointing}"


@pytest.fixture(scope="module")
def results(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the first of 2 and of 4 processes found, by the names of the jobs."""
    folder = tmp_path_factory.mktemp("ranks")
    checkpoint = (folder / "checkpoint",)
    extra: dict[int, dict[str, Job]] = {
        2: {
            "split": (ranks.split_by_hand, "resnet, keep", False, ()),
            "split and run": (ranks.split_and_run, "vit", False, ()),
            "dense vit": (ranks.ddp, "dense vit", False, ()),
            "compiled": (ranks.compiled, "dense", False, ()),
            "save": (ranks.save, "vit", False, checkpoint),
        },
        4: {"load": (ranks.load, "vit", False, checkpoint)},
    }
    found = {}
    for world, others in extra.items():
        jobs = {name_of(*way): (way[0], way[1], way[2], ()) for count, *way in WAYS if count == world}
        found[world] = on_ranks(world, jobs | others, cases, folder)
    return found


def assert_equal(run: Run | str, expected: Run) -> None:
    assert isinstance(run, Run), run
    torch.testing.assert_close(run.losses, expected.losses, rtol=TOLERANCE, atol=0)
    assert run.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        assert (run.state[name] - value).double().norm() <= TOLERANCE * value.double().norm(), name


@pytest.mark.parametrize(("world", "way", "name", "checkpointing"), WAYS, ids=lambda value: getattr(value, "__name__", None))
def test_as_one_process(
    results: dict[int, dict[str, Any]],
    cases: dict[str, Case],
    alone: dict[str, Run],
    world: int,
    way: Callable[..., Any],
    name: str,
    checkpointing: bool,
) -> None:
    run = results[world][name_of(way, name, checkpointing)]
    assert_equal(run, alone[name])
    before = cases[name].model.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in run.state.items())
    if way is not ranks.two_dimensional:
        assert run.calls == STEPS * (2 if checkpointing else 1)


def test_ddp_sends_what_the_plan_says(results: dict[int, dict[str, Any]], cases: dict[str, Case]) -> None:
    for name in ("vit", "gpt2", "resnet, slice"):
        assert results[2][name_of(ranks.ddp, name)].details == 8 * cases[name].plan.params_after
    assert results[2]["dense vit"].details == 8 * cases["vit"].plan.params_before


def test_tensor_parallel_holds_a_part_of_each_matrix(results: dict[int, dict[str, Any]]) -> None:
    for world in (2, 4):
        held = results[world][name_of(ranks.tensor_parallel, "vit")].details
        assert held["blocks.1.mlp.fc1.weight"] == (128 // world, 32)
        assert held["blocks.1.mlp.fc1.bias"] == (128 // world,)
        assert held["blocks.1.mlp.fc2.bias"] == (32,)
        held = results[world][name_of(ranks.tensor_parallel, "gpt2")].details
        assert held["transformer.h.1.mlp.c_fc.weight"] == (32, 128 // world)
        held = results[world][name_of(ranks.tensor_parallel, "attention")].details
        assert {name: held[f"{name}.weight"] for name in ("q", "k", "gate", "up")} == {
            "q": (16 // world, 16),
            "k": (16 // world, 16),
            "gate": (24 // world, 16),
            "up": (24 // world, 16),
        }


def test_dense_model_tied_by_its_compiled_graphs(results: dict[int, dict[str, Any]], cases: dict[str, Case]) -> None:
    dense = cases["dense"]
    tied = ranks.alone(case(dense.model, dense.batch))
    run = results[2]["compiled"]
    assert not isinstance(run, str), run
    last = run.state.pop("2.weight")
    assert torch.equal(last, dense.model.state_dict()["2.weight"])  # not read, no gradient
    assert_equal(run, tied)


def test_checkpoint_of_two_processes_is_loaded_by_four(results: dict[int, dict[str, Any]], cases: dict[str, Case]) -> None:
    saved = results[2]["save"]
    assert not isinstance(saved, str), saved
    assert not isinstance(results[4]["load"], str), results[4]["load"]
    loaded, after = results[4]["load"]
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    longer = ranks.alone(cases["vit"], STEPS + 1)
    assert_equal(after, Run(longer.losses[-1:], longer.state))  # the optimizer's state came along


def test_split_tie_is_named(results: dict[int, dict[str, Any]]) -> None:
    message = results[2]["split"]
    assert "layer1.1.conv1.weight is tied to layer1.0.conv3.weight, which another FSDP unit shards" in message
    assert "pe_fx.distributed.fully_shard(model)" in message


def test_split_tie_is_refused_where_it_is_read(results: dict[int, dict[str, Any]]) -> None:
    message = results[2]["split and run"]
    assert "weight ← blocks.1.mlp.fc1.weightᵀ) reads a shard" in message
    assert "pe_fx.distributed.check(model) names them" in message


# ---- units


def names(model: nn.Module, modules: list[nn.Module] | None = None) -> list[list[str]]:
    known = {module: name for name, module in model.named_modules()}
    return [[known[module] for module in unit] for unit in units(model, modules)]


def test_each_block_is_a_unit() -> None:
    net = pe_fx.transform(Net(mlp(), mlp()), torch.randn(2, 4))
    assert names(net) == [["blocks.0"], ["blocks.1"]]


def test_blocks_that_share_a_matrix_are_one_unit() -> None:
    net = pe_fx.transform(Net(mlp(), mlp(16), mlp(), mlp()), torch.randn(2, 4), share=["mlp"])
    assert names(net) == [["blocks.0"], ["blocks.1"], ["blocks.2", "blocks.3"]]


def test_groups_are_units() -> None:
    blocks = [mlp() for _ in range(5)]
    for rules in (["mlp"], ()):
        net = pe_fx.transform(Net(*blocks), torch.randn(2, 4), rules=rules, share={"mlp": 2})
        assert names(net) == [["blocks.0", "blocks.1"], ["blocks.2", "blocks.3"], ["blocks.4"]]


def test_stages_of_a_resnet_are_units(cases: dict[str, Case]) -> None:
    stages = [["layer1.0", "layer1.1"], ["layer2.0", "layer2.1"]]
    assert names(cases["resnet, keep"].model) == [*stages, ["layer3.0"], ["layer4.0"]]


def test_blocks_that_share_need_not_be_neighbours(cases: dict[str, Case]) -> None:
    """What shares with the root, here the first block, belongs to it."""
    assert names(cases["apart"].model) == [["blocks.1", "blocks.3"], ["blocks.2"]]


def test_a_parameter_in_two_places_is_shared_too() -> None:
    net = Net(mlp(), mlp(), mlp())
    net.blocks[2][0].weight = net.blocks[0][0].weight
    assert names(net) == [["blocks.0", "blocks.2"], ["blocks.1"]]


def test_inner_units_come_first() -> None:
    net = Net(Net(mlp(), mlp()), mlp())
    assert names(net) == [["blocks.0.blocks.0"], ["blocks.0.blocks.1"], ["blocks.0"], ["blocks.1"]]


def test_a_unit_that_shares_with_what_is_around_it_is_no_unit() -> None:
    net = Net(Net(mlp(4), mlp()), mlp())
    net.blocks[0].head.weight = net.blocks[0].blocks[0][0].weight
    assert names(net) == [["blocks.0.blocks.1"], ["blocks.0"], ["blocks.1"]]


def test_a_unit_across_two_levels_comes_before_what_holds_a_part_of_it() -> None:
    net = Net(Net(mlp(4), mlp()), mlp(), Net(mlp()))
    net.blocks[2].head.weight = net.blocks[0].blocks[0][0].weight
    order = names(net)
    assert ["blocks.0.blocks.0", "blocks.2"] in order
    assert order.index(["blocks.0.blocks.0", "blocks.2"]) < order.index(["blocks.0"])
    assert order.index(["blocks.2.blocks.0"]) < order.index(["blocks.0.blocks.0", "blocks.2"])


def test_units_of_chosen_modules() -> None:
    net = pe_fx.transform(Net(mlp(), mlp(), mlp()), torch.randn(2, 4), share=["mlp"])
    assert names(net, [net.blocks[0]]) == []  # the others are the root's
    assert names(net, [net.blocks[1][0], net.blocks[1][2], net.head]) == [["head"]]
    with pytest.raises(PeFxError, match="Linear is no module of this Net"):
        units(net, [linear(4, 4)])


def test_nothing_to_check_without_fsdp() -> None:
    check(pe_fx.transform(mlp(), torch.randn(2, 4)))


# ---- the plan of tensor parallel


def styles(net: nn.Module, inputs: Tensor, **options: Any) -> dict[str, str]:
    plan = pe_fx.plan(net, inputs, **options)
    return {name: repr(style) for name, style in tensor_parallel_plan(pe_fx.apply(net, plan), plan).items()}


def test_mlps_are_parallel() -> None:
    assert styles(Net(mlp()), torch.randn(2, 4)) == {"blocks.0.0": "TiedColwise(0)", "blocks.0.2": "TiedRowwise()"}


def test_layers_that_share_a_matrix_have_the_same_roles() -> None:
    found = styles(Net(mlp(), mlp()), torch.randn(2, 4), share=["mlp"])
    assert found == {f"blocks.{i}.{layer}": style for i in (0, 1) for layer, style in ((0, "TiedColwise(0)"), (2, "TiedRowwise()"))}


def test_what_is_shared_without_being_tied_is_replicated() -> None:
    assert styles(Net(mlp(), mlp()), torch.randn(2, 4), rules=(), share=["mlp"]) == {}


def test_a_norm_between_the_layers_keeps_an_mlp_replicated() -> None:
    assert styles(Net(mlp(between=nn.LayerNorm(8))), torch.randn(2, 4)) == {}


def test_what_shares_with_a_replicated_site_is_replicated() -> None:
    net = Net(mlp(), mlp(between=nn.LayerNorm(8)), mlp(16))
    inputs = torch.randn(2, 4)
    assert list(styles(net, inputs)) == ["blocks.0.0", "blocks.0.2", "blocks.2.0", "blocks.2.2"]
    assert list(styles(net, inputs, share=["mlp"])) == ["blocks.2.0", "blocks.2.2"]


def test_attention_of_one_weight_is_replicated(cases: dict[str, Case]) -> None:
    vit = cases["vit"]
    assert {site.kind for site in vit.plan.sites} == {"attention", "mlp"}
    assert all("mlp" in name for name in tensor_parallel_plan(vit.model, vit.plan))


def test_convolutions_are_replicated(cases: dict[str, Case]) -> None:
    resnet = cases["resnet, keep"]
    assert tensor_parallel_plan(resnet.model, resnet.plan) == {}


def test_plan_that_is_not_applied_is_refused() -> None:
    net = Net(mlp())
    with pytest.raises(PeFxError, match=r"blocks\.0\.2\.weight is not tied in this model: apply the plan first"):
        tensor_parallel_plan(net, pe_fx.plan(net, torch.randn(2, 4)))
