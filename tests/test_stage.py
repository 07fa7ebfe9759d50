"""Consecutive blocks of one shape use one W; the first, whose input is narrower, by one of three treatments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import Net, assert_equals_twin, assert_hit, assert_idempotent, ties
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune

import pe_fx
from pe_fx import PeFxError
from pe_fx.tied.entry import Widen

hit = partial(assert_hit, kind="bottleneck")

IN, MID, OUT = 8, 4, 16
X = torch.randn(2, OUT, 6, 6)
NARROW = torch.randn(2, IN, 6, 6)

PARALLEL = ["0.f.2.weight ← 0.f.0.weightᵀ", "0.h.2.weight ← 0.h.0.weightᵀ"]
PARALLEL += [f"1.{name}.{tie}" for name in "fh" for tie in (f"0.weight ← 0.{name}.0.weight", f"2.weight ← 0.{name}.0.weightᵀ")]

SHARED = ["1.conv1.weight ← 0.conv3.weightᵀ", "1.conv3.weight ← 0.conv3.weight"]
SHARED += ["2.conv1.weight ← 0.conv3.weightᵀ", "2.conv3.weight ← 0.conv3.weight"]


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Block(nn.Module):
    """ResNet's bottleneck, with a projection shortcut where the shape changes."""

    def __init__(self, inputs: int = OUT, stride: int = 1, mid: int = MID, outputs: int = OUT) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, mid), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = conv(mid, mid, 3, stride), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = conv(mid, outputs), nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity()
        if inputs != outputs or stride > 1:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class SlicedEntry(Block):
    """What `entry="slice"` must make of the first block: option A of He et al. 2015 as shortcut."""

    def __init__(self, stride: int) -> None:
        super().__init__(IN, stride)
        self.downsample = nn.Identity()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        short = x[:, :, :: self.stride, :: self.stride]
        padding = torch.zeros(short.shape[0], OUT - IN, *short.shape[2:])
        return F.relu(self.bn3(self.conv3(y)) + torch.cat((short, padding), 1))


class ExpandedEntry(Block):
    """What `entry="expand"` must make of the first block: the input widened by a depthwise convolution."""

    def __init__(self, stride: int) -> None:
        super().__init__(OUT, 1)
        self.conv2 = conv(MID, MID, 3, stride)
        self.widen = nn.ModuleDict({"conv": conv(IN, OUT - IN, 3, groups=IN), "norm": nn.BatchNorm2d(OUT - IN)})
        if stride > 1:
            self.downsample = nn.Sequential(nn.Sequential(conv(OUT, OUT, 3, stride, OUT), nn.BatchNorm2d(OUT)), nn.BatchNorm2d(OUT))

    def forward(self, x: Tensor) -> Tensor:
        new = F.gelu(self.widen["norm"](self.widen["conv"](x)))
        return super().forward(torch.cat((new, x), 1))


def stage(stride: int = 2) -> nn.Sequential:
    return nn.Sequential(Block(IN, stride), Block(), Block())


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_equals_reference(reference: nn.Module, tied: nn.Module, plan: pe_fx.Plan) -> None:
    """The tied model computes what the reference architecture does with the tied model's weights."""
    keys = reference.load_state_dict(tied.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert set(keys.missing_keys) == {tie.target for tie in plan.ties}
    assert_equals_twin(reference, tied, plan, NARROW)


# ---- blocks of one shape


def test_three_blocks_share_one_weight() -> None:
    net = nn.Sequential(Block(), Block(), Block())
    tied = hit(
        net,
        X,
        "0.conv3.weight ← 0.conv1.weightᵀ",
        "1.conv1.weight ← 0.conv1.weight",
        "1.conv3.weight ← 0.conv1.weightᵀ",
        "2.conv1.weight ← 0.conv1.weight",
        "2.conv3.weight ← 0.conv1.weightᵀ",
    )
    kept = [name for name in tied.state_dict() if "conv1" in name or "conv3" in name]
    assert kept == ["0.conv1.weight"]
    made = pe_fx.plan(net, X)
    assert made.params_before - made.params_after == 5 * MID * OUT
    assert count(tied) == made.params_after
    assert {site.stage for site in made.sites} == {"0.conv1.weight"}


def test_norms_and_spatial_convolutions_stay_per_block() -> None:
    tied = pe_fx.transform(nn.Sequential(Block(), Block()), X)
    assert {f"{i}.{name}.weight" for i in range(2) for name in ("bn1", "conv2", "bn2", "bn3")} <= set(tied.state_dict())


def test_no_sharing() -> None:
    net = nn.Sequential(Block(), Block())
    hit(net, X, "0.conv3.weight ← 0.conv1.weightᵀ", "1.conv3.weight ← 1.conv1.weightᵀ", share=())


def test_other_shapes_end_a_stage() -> None:
    net = nn.Sequential(Block(), Block(), Block(mid=8), Block(mid=8))
    hit(
        net,
        X,
        "0.conv3.weight ← 0.conv1.weightᵀ",
        "1.conv1.weight ← 0.conv1.weight",
        "1.conv3.weight ← 0.conv1.weightᵀ",
        "2.conv3.weight ← 2.conv1.weightᵀ",
        "3.conv1.weight ← 2.conv1.weight",
        "3.conv3.weight ← 2.conv1.weightᵀ",
    )


def test_only_neighbours_share() -> None:
    net = nn.Sequential(Block(), Block(mid=8), Block())
    hit(net, X, *(f"{i}.conv3.weight ← {i}.conv1.weightᵀ" for i in range(3)))


def test_two_towers_do_not_share_with_each_other() -> None:
    net = Net(lambda m, x, y: m.a(x) + m.b(y), a=nn.Sequential(Block(), Block()), b=nn.Sequential(Block(), Block()))
    made = pe_fx.plan(net, (X, X))
    assert len(made.ties) == 6
    assert all(tie.source.split(".")[0] == tie.target.split(".")[0] for tie in made.ties)
    assert_equals_twin(net, pe_fx.apply(net, made), made, (X, X))


def test_two_towers_written_in_turns() -> None:
    net = Net(lambda m, x: m.a2(m.a1(x)) + m.b2(m.b1(x)), a1=Block(), b1=Block(), a2=Block(), b2=Block())
    turns = Net(lambda m, x: (lambda a, b: m.a2(a) + m.b2(b))(m.a1(x), m.b1(x)), a1=net.a1, b1=net.b1, a2=net.a2, b2=net.b2)
    made, straight = pe_fx.plan(turns, X), pe_fx.plan(net, X)
    assert set(ties(made)) == set(ties(straight))
    assert all(tie.source[0] == tie.target[0] for tie in made.ties)


def test_weight_read_by_both_towers() -> None:
    net = Net(lambda m, x, y: m.tower(x) + m.tower(y), tower=nn.Sequential(Block(), Block()))
    made = pe_fx.plan(net, (X, X))
    assert len(made.ties) == 3
    assert_equals_twin(net, pe_fx.apply(net, made), made, (X, X))


def test_include_limits_the_stage() -> None:
    net = nn.Sequential(Block(), Block(), Block())
    made = pe_fx.plan(net, X, include=["1.*", "2.*"])
    assert ties(made) == ["1.conv3.weight ← 1.conv1.weightᵀ", "2.conv1.weight ← 1.conv1.weight", "2.conv3.weight ← 1.conv1.weightᵀ"]


def test_init_mean_averages_the_whole_stage() -> None:
    net = nn.Sequential(Block(), Block())
    tied = pe_fx.transform(net, X, init="mean")
    expected = sum(block.conv1.weight + block.conv3.weight.transpose(0, 1) for block in net) / 4
    torch.testing.assert_close(tied[0].conv1.weight, expected)


def test_frozen_block_is_not_shared_with_trained_ones() -> None:
    net = nn.Sequential(Block(), Block(), Block())
    net[1].requires_grad_(False)
    made = pe_fx.plan(net, X)
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert not any((tie.source in frozen) != (tie.target in frozen) for tie in made.ties)
    assert "2.conv1.weight ← 0.conv1.weight" in ties(made)
    assert "1.conv3.weight ← 1.conv1.weightᵀ" in ties(made)  # frozen alike
    assert_equals_twin(net, pe_fx.apply(net, made), made, X)


def test_idempotent() -> None:
    assert_idempotent(nn.Sequential(Block(), Block(), Block()), X)


# ---- the entry block


@pytest.mark.parametrize("stride", [1, 2])
def test_keep(stride: int) -> None:
    net = stage(stride)
    tied = hit(net, NARROW, *SHARED)
    assert {"0.conv1.weight", "0.conv3.weight", "0.downsample.0.weight"} <= set(tied.state_dict())
    assert count(tied) == pe_fx.plan(net, NARROW).params_after == count(net) - 4 * MID * OUT


def test_keep_says_how_to_tie_the_entry() -> None:
    made = pe_fx.plan(stage(), NARROW)
    (miss,) = [miss for miss in made.misses if set(miss.weights) == {"0.conv1.weight", "0.conv3.weight"}]
    assert "(4, 8, 1, 1)" in miss.reason
    assert "not transposes" in miss.reason
    assert "entry='slice'" in miss.reason


@pytest.mark.parametrize("stride", [1, 2])
def test_slice(stride: int) -> None:
    net = stage(stride)
    made = pe_fx.plan(net, NARROW, entry="slice")
    assert sorted(ties(made)) == sorted(["0.conv1.weight ← 0.conv3.weight[0:8]ᵀ", *SHARED])
    tied = pe_fx.apply(net, made)
    assert count(tied) == made.params_after == count(net) - 4 * MID * OUT - MID * IN - IN * OUT - 2 * OUT
    assert_equals_reference(nn.Sequential(SlicedEntry(stride), Block(), Block()), tied, made)


@pytest.mark.parametrize("stride", [1, 2])
def test_expand(stride: int) -> None:
    net = stage(stride)
    made = pe_fx.plan(net, NARROW, entry="expand")
    assert sorted(ties(made)) == sorted(["0.conv1.weight ← 0.conv3.weightᵀ", *SHARED])
    tied = pe_fx.apply(net, made)
    added = 9 * (OUT - IN) + 2 * (OUT - IN) + (9 * OUT + 2 * OUT if stride > 1 else 0)
    removed = MID * IN + IN * OUT + (2 * OUT if stride == 1 else 0)
    assert count(tied) == made.params_after == count(net) - 4 * MID * OUT - removed + added
    assert_equals_reference(nn.Sequential(ExpandedEntry(stride), Block(), Block()), tied, made)


@pytest.mark.parametrize("entry", ["slice", "expand"])
def test_entry_treatment_leaves_the_model_itself_alone(entry: str) -> None:
    net = stage()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pe_fx.transform(net, NARROW, entry=entry)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("entry", ["keep", "slice", "expand"])
def test_entry_idempotent(entry: str) -> None:
    assert_idempotent(stage(), NARROW, entry=entry)


@pytest.mark.parametrize("entry", ["keep", "slice", "expand"])
def test_entry_of_every_stage(entry: str) -> None:
    net = nn.Sequential(Block(IN, 1), Block(), Block(OUT, 2, 8, 32), Block(32, 1, 8, 32))
    tied = pe_fx.transform(net, NARROW, entry=entry)
    assert [name for name in tied.state_dict() if "conv3" in name] == ["0.conv3.weight", "2.conv3.weight"]
    assert [name for name in tied.state_dict() if "conv1" in name] == (["0.conv1.weight", "2.conv1.weight"] if entry == "keep" else [])
    assert tied(NARROW).shape == (2, 32, 3, 3)
    assert count(tied) == pe_fx.plan(net, NARROW, entry=entry).params_after


@pytest.mark.parametrize("entry", ["slice", "expand"])
def test_entry_keeps_the_mode_and_training(entry: str) -> None:
    tied = pe_fx.transform(stage().eval(), NARROW, entry=entry)
    assert not any(module.training for module in tied.modules())
    tied.train()(NARROW).sum().backward()
    assert all(parameter.grad is not None for parameter in tied.parameters())


def test_entry_keeps_the_mode_of_what_it_replaces() -> None:
    net = stage()
    net[0].downsample.eval()
    tied = pe_fx.transform(net, NARROW, entry="expand")
    assert tied[0].widen.training
    assert not any(module.training for module in tied[0].downsample.modules())


class OnCuda(Tensor):
    """Says that it is."""

    is_cuda = True  # type: ignore[assignment]


def test_widening_on_cuda_is_the_same() -> None:
    widen = Widen(4, 12).eval()
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(widen(x.as_subclass(OnCuda)).as_subclass(Tensor), widen(x))


def test_widening_on_cuda_reads_a_weight_that_is_pruned_before() -> None:
    """As any convolution: pruning puts the weight together in a hook."""
    widen = Widen(4, 12)
    prune.random_unstructured(widen.conv, "weight", 0.5)
    with torch.no_grad():
        widen.conv.weight_orig.zero_()
    x = torch.randn(2, 4, 5, 5).as_subclass(OnCuda)
    assert not widen.eval()(x)[:, :8].any()


@pytest.mark.parametrize("through", [fx.symbolic_trace, torch.jit.script], ids=lambda through: through.__name__)
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_widening_is_traced_and_scripted(through: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> None:
    widen = Widen(4, 12).eval()
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(through(widen)(x), widen(x))


@pytest.mark.parametrize("entry", ["slice", "expand"])
def test_entry_module_of_another_name(entry: str) -> None:
    class Renamed(Block):
        def __init__(self) -> None:
            super().__init__(IN, 2)
            self.shortcut = self._modules.pop("downsample")

    net = nn.Sequential(Renamed(), Block(), Block())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(PeFxError, match=rf"entry='{entry}' does not apply: 0\.downsample\.0, a module that it treats, is missing"):
        pe_fx.apply(net, pe_fx.plan(stage(), NARROW, entry=entry), init="mean", inplace=True)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_pooled_shortcut_is_sliced() -> None:
    net = stage()
    net[0].downsample = nn.Sequential(nn.AvgPool2d(2), conv(IN, OUT), nn.BatchNorm2d(OUT))
    tied = pe_fx.transform(net, NARROW, entry="slice")
    assert not any("downsample" in name for name in tied.state_dict())
    x = NARROW
    y = tied[0].bn3(tied[0].conv3(F.relu(tied[0].bn2(tied[0].conv2(F.relu(tied[0].bn1(tied[0].conv1(x))))))))
    torch.testing.assert_close(tied[0](x), F.relu(y + F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, OUT - IN))))


def test_single_entry_block_is_treated_too() -> None:
    made = pe_fx.plan(nn.Sequential(Block(IN, 2)), NARROW, entry="slice")
    assert ties(made) == ["0.conv1.weight ← 0.conv3.weight[0:8]ᵀ"]


@pytest.mark.parametrize("entry", ["slice", "expand"])
def test_entry_without_shortcut_says_so(entry: str) -> None:
    net = nn.Sequential(nn.Sequential(conv(IN, MID), nn.ReLU(), conv(MID, MID, 3), nn.ReLU(), conv(MID, OUT)), Block(), Block())
    made = pe_fx.plan(net, NARROW, entry=entry)
    (miss,) = [miss for miss in made.misses if "0.0.weight" in miss.weights]
    assert "shortcut" in miss.reason
    assert entry in miss.reason
    assert not any(tie.target == "0.0.weight" for tie in made.ties)


def test_expand_where_the_widths_do_not_divide() -> None:
    net = nn.Sequential(Block(6, 2), Block(), Block())
    made = pe_fx.plan(net, torch.randn(2, 6, 6, 6), entry="expand")
    assert any("multiple" in miss.reason for miss in made.misses)
    assert ties(made) == SHARED


def test_entry_whose_input_is_a_constant() -> None:
    net = Net(lambda m, x: m.blocks(m.start) + x, blocks=nn.Sequential(Block(IN), Block()), start=torch.randn(NARROW.shape))
    made = pe_fx.plan(net, X, entry="slice")
    assert not any(tie.target == "blocks.0.conv1.weight" for tie in made.ties)
    assert "entry='slice' does not apply: its input is a constant" in made.explain()


def test_entry_frozen_beside_trained() -> None:
    net = stage()
    net[0].conv1.weight.requires_grad_(False)
    made = pe_fx.plan(net, NARROW, entry="slice")
    assert not any(tie.target == "0.conv1.weight" for tie in made.ties)
    assert any("0.conv1.weight is frozen" in miss.reason for miss in made.misses)
    tied = pe_fx.apply(net, made)
    assert tied(NARROW).shape == net(NARROW).shape
    assert count(tied) == made.params_after


class Mobile(nn.Module):
    """MobileNetV2's first blocks: no shortcut goes around the first."""

    def __init__(self) -> None:
        super().__init__()
        parts = [[conv(inputs, MID), nn.ReLU(), conv(MID, MID, 3, groups=MID), nn.ReLU(), conv(MID, OUT)] for inputs in (IN, OUT, OUT)]
        self.a, self.b, self.c = (nn.Sequential(*part) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.b(x)
        return x + self.c(x)


class Bare(nn.Module):
    """An entry block whose weights are its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"a": (MID, IN, 1, 1), "k": (MID, MID, 3, 3), "b": (OUT, MID, 1, 1), "short": (OUT, IN, 1, 1)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(F.conv2d(x, self.a).relu(), self.k, padding=1).relu()
        return F.conv2d(y, self.b) + F.conv2d(x, self.short)


class NotCalled(Block):
    """The shortcut's convolution is applied by its weight."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample[1](F.conv2d(x, self.downsample[0].weight)))


class CalledTwice(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.downsample(x + 1)


class Pooled(nn.Conv2d):
    """A convolution that also does what would go with it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.avg_pool2d(x, 2))


class ReadsItsInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.mean((1, 2, 3), keepdim=True)


class WithStem(Block):
    def __init__(self) -> None:
        super().__init__(IN)
        self.stem = conv(IN, IN, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(self.stem(x)))


def frozen_entry() -> nn.Module:
    net = stage()
    net[0].conv1.weight.requires_grad_(False)
    return net


def parametrized_entry() -> nn.Module:
    net = stage()
    parametrize.register_parametrization(net[0].conv1, "weight", nn.Identity())
    return net


def pooled_inside() -> nn.Module:
    net = stage()
    net[0].downsample = nn.Sequential(Pooled(IN, OUT, 1), nn.BatchNorm2d(OUT))
    return net


ENTRIES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "a stage": (stage, {"slice", "expand"}),
    "no shortcut": (Mobile, set()),
    "widths that do not divide": (lambda: nn.Sequential(conv(IN, 6), Block(6, 2), Block()), {"slice"}),
    "frozen": (frozen_entry, set()),
    "parametrized": (parametrized_entry, set()),
    "bare weights": (lambda: nn.Sequential(Bare(), Block()), set()),
    "the model itself": (Bare, set()),
    "not called": (lambda: nn.Sequential(NotCalled(IN), Block()), set()),
    "called twice": (lambda: CalledTwice(IN), set()),
    "pooled in the convolution": (pooled_inside, set()),
    "input read elsewhere": (lambda: nn.Sequential(ReadsItsInput(IN), Block()), {"slice"}),
    "stem in the block": (lambda: nn.Sequential(WithStem(), Block()), {"slice"}),
    "input not the model's": (lambda: nn.Sequential(conv(IN, IN, 3), nn.ReLU(), Block(IN)), {"slice", "expand"}),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_keep_names_the_treatments_that_tie_more(case: str) -> None:
    build, expected = ENTRIES[case]
    net = build()
    made = pe_fx.plan(net, NARROW)
    assert {entry for entry in ("slice", "expand") if f"{entry!r}" in made.explain()} == expected
    for entry in ("slice", "expand"):
        other = pe_fx.plan(net, NARROW, entry=entry)
        assert (len(other.ties) > len(made.ties)) == (entry in expected)
        assert entry in expected or f"entry={entry!r} does not apply: " in other.explain()
        tied = pe_fx.apply(net, other)
        assert count(tied) == other.params_after
        tied(NARROW)


def test_a_stage_whose_entry_cannot_share_its_weight() -> None:
    net = stage()
    parametrize.register_parametrization(net[0].conv3, "weight", nn.Identity())
    made = pe_fx.plan(net, NARROW)
    assert ties(made) == ["1.conv3.weight ← 1.conv1.weightᵀ", "2.conv1.weight ← 1.conv1.weight", "2.conv3.weight ← 1.conv1.weightᵀ"]
    assert_equals_twin(net, pe_fx.apply(net, made), made, NARROW)


def test_wider_input_than_output_stays_dense() -> None:
    net = nn.Sequential(Block(32, 1), Block(), Block())
    made = pe_fx.plan(net, torch.randn(2, 32, 6, 6), entry="slice")
    assert ties(made) == SHARED
    assert any("not narrower" in miss.reason for miss in made.misses)


# ---- sharing of other kinds, on request


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


TOKENS = torch.randn(2, 5, 8)


def kept(model: nn.Module, part: str) -> list[str]:
    return [name for name in model.state_dict() if name.endswith(("weight", "weight_kept")) and part in name]


def test_feed_forward_and_attention_are_not_shared_by_default() -> None:
    tied = pe_fx.transform(encoder(), TOKENS)
    assert len(kept(tied, "linear1")) == 3
    assert len(kept(tied, "in_proj")) == 3


@pytest.mark.parametrize(("share", "feed_forward", "attention"), [(("mlp",), 1, 3), (("attention",), 3, 1), (("mlp", "attention"), 1, 1)])
def test_share_on_request(share: tuple[str, ...], feed_forward: int, attention: int) -> None:
    net = encoder()
    made = pe_fx.plan(net, TOKENS, share=share)
    tied = pe_fx.apply(net, made)
    assert len(kept(tied, "linear1")) == feed_forward
    assert len(kept(tied, "in_proj")) == attention
    assert not kept(tied, "linear2")
    assert count(tied) == made.params_after
    assert_equals_twin(net, tied, made, TOKENS)


def test_share_on_request_leaves_bottlenecks_unshared() -> None:
    made = pe_fx.plan(nn.Sequential(Block(), Block()), X, share=("mlp",))
    assert ties(made) == ["0.conv3.weight ← 0.conv1.weightᵀ", "1.conv3.weight ← 1.conv1.weightᵀ"]


def test_parallel_layers_share_with_their_like() -> None:
    def block() -> Net:
        layers = {name: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for name in ("f", "h")}
        return Net(lambda m, x: x + m.f(x) + m.h(x), **layers)

    tied = assert_hit(nn.Sequential(block(), block()), torch.randn(3, 8), *PARALLEL, kind="mlp", share=("mlp",))
    assert tied[1].h[0].weight is tied[0].h[0].weight


@pytest.mark.parametrize("swapped", [False, True])
def test_parallel_layers_of_other_shapes_share_in_groups_with_their_like(swapped: bool) -> None:
    def block(names: str) -> Net:
        layers = {name: nn.Sequential(nn.Linear(8, wide), nn.GELU(), nn.Linear(wide, 8)) for name, wide in (("f", 16), ("h", 24))}
        return Net(lambda m, x: sum((m.get_submodule(name)(x) for name in names), x), **layers)

    made = pe_fx.plan(nn.Sequential(block("fh"), block("hf" if swapped else "fh")), torch.randn(3, 8), share={"mlp": 2})
    assert sorted(ties(made)) == sorted(PARALLEL)
    assert not made.misses


def test_block_of_another_kind_between_ends_the_stage() -> None:
    net = nn.Sequential(Block(), Block(), Block(OUT, stride=2), Block(), Block())
    made = pe_fx.plan(net, torch.randn(2, OUT, 8, 8))
    assert "4.conv1.weight ← 3.conv1.weight" in ties(made)
    assert not any(tie.source.startswith("0.") and tie.target.startswith(("2.", "3.", "4.")) for tie in made.ties)
