"""One table from the operations of every dialect to the few kinds that passes know, and what a node of a graph tells of itself.

ATen overloads (`aten.add_.Tensor`), torch functions (`torch.add`, `operator.iadd`) and tensor methods (`"add_"`) share their
base names, so the table is keyed by those.
"""

from __future__ import annotations

import enum
import functools
from typing import Any

import torch
from torch import fx


class Kind(enum.Enum):
    """What an operation does to the channels of its operands."""

    INPUT = "a value that enters from outside"
    CONSTANT = "made from shapes alone, whatever its operands hold"
    PROJECTION = "a weight matrix applied along one axis: linear, 1x1 convolution, x @ W"
    CONV = "a convolution that is no projection"
    ATTEND = "fused softmax(q kᵀ) v"
    MATMUL = "a product of two matrices of values"
    SOFTMAX = "softmax along one axis"
    VIEW = "moves entries, changes none"
    POINTWISE = "elementwise and affine: add, scale, cast, dropout"
    NONLINEAR = "elementwise nonlinearity"
    PRODUCT = "elementwise product or quotient of two values"
    NORM = "normalisation"
    POOL = "spatial pooling or resampling, each channel by itself"
    REDUCE = "reduction over axes"
    LOOKUP = "rows of a table"
    WRITE = "replaces entries of its first operand by those of its last"
    OTHER = "anything else: what passes through it is not followed"

    __hash__ = object.__hash__  # in place of one in Python, since kinds are looked up in sets all the time


_NAMES: dict[Kind, str] = {
    Kind.CONSTANT: """
        arange empty empty_like eye full full_like linspace new_empty new_full new_ones new_zeros ones ones_like
        rand rand_like randint randn randn_like scalar_tensor size sym_size tensor zeros zeros_like tril_indices triu_indices
    """,
    Kind.PROJECTION: "linear addmm grouped_mm scaled_grouped_mm grouped_mm_fallback linear_by_group",
    Kind.CONV: "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d",
    Kind.ATTEND: "scaled_dot_product_attention",
    Kind.MATMUL: "matmul mm bmm baddbmm addbmm einsum tensordot mv",
    Kind.SOFTMAX: "softmax log_softmax",
    Kind.VIEW: """
        view reshape flatten unflatten permute transpose t numpy_t mt movedim moveaxis swapaxes swapdims squeeze unsqueeze expand
        expand_as view_as reshape_as unbind split split_with_sizes chunk tensor_split select slice narrow getitem cat concat stack
        hstack vstack roll flip repeat repeat_interleave tile pad constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle
        unfold im2col broadcast_to atleast_2d atleast_3d rot90 unsafe_view unsafe_split adjoint diagonal index index_select
        complex view_as_complex view_as_real real imag
    """,
    Kind.POINTWISE: """
        add sub rsub neg negative dropout native_dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d
        dropout3d contiguous clone alias detach to to_copy type type_as float half bfloat16 double lift_fresh lift_fresh_copy
        positive masked_fill add_relu iadd isub copy conj resolve_conj nan_to_num lerp
    """,
    Kind.NONLINEAR: """
        relu relu6 gelu silu mish sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu selu celu softplus prelu rrelu
        softsign tanhshrink softshrink hardshrink logsigmoid log_sigmoid threshold exp exp2 log log1p log2 expm1 sqrt rsqrt square
        pow ipow abs sign sin cos erf reciprocal clamp clamp_min clamp_max clip maximum minimum floor round where bernoulli
        tan atan atan2 sinh cosh asinh acosh atanh sinc frac trunc remainder fmod erfc log10 logaddexp hypot heaviside sgn
        gt ge lt le eq ne logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not isnan isinf isfinite
    """,
    Kind.PRODUCT: "mul multiply div divide true_divide truediv imul itruediv addcmul addcdiv",
    Kind.NORM: """
        layer_norm native_layer_norm rms_norm fused_rms_norm batch_norm native_batch_norm cudnn_batch_norm instance_norm
        group_norm native_group_norm local_response_norm
    """,
    Kind.POOL: """
        avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_avg_pool1d
        adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate
        upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d lp_pool2d
    """,
    Kind.REDUCE: "mean sum amax amin max min std var var_mean std_mean norm linalg_vector_norm logsumexp prod argmax argmin all any",
    Kind.LOOKUP: "embedding embedding_bag",
    Kind.WRITE: "overwritten index_put index_copy slice_scatter",
}

SHAPE_OF_SECOND = ("expand_as", "view_as", "reshape_as", "type_as")
"""Operations that take from their second operand its shape or type alone."""

RESHAPES = ("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "unsafe_view", "squeeze", "unsqueeze")
"""Operations that keep all entries in their order and change the shape alone."""

COPIES = ("alias", "clone", "contiguous", "detach", "lift_fresh", "lift_fresh_copy", "to", "to_copy")
"""Operations whose result holds their operand's values."""

GATHERS = ("index", "index_select")
"""Operations that take entries at positions that a tensor holds."""

KINDS: dict[str, Kind] = {name: kind for kind, names in _NAMES.items() for name in names.split()}


def value_of(node: fx.Node) -> Any:
    """What the node computes, as export or Dynamo recorded it: a fake tensor, or a tuple of them."""
    meta = node.meta
    return meta["val"] if "val" in meta else meta.get("example_value")


def base_name(node: fx.Node) -> str:
    """The operation's name without dialect, overload or in-place mark.

    >>> graph = fx.symbolic_trace(lambda x: (x + 1).relu_()).graph
    >>> [base_name(node) for node in graph.nodes if node.op.startswith("call")]
    ['add', 'relu']
    """
    return _base_name(node.target)


@functools.cache
def _base_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).split(".")[1].strip("_").lower()
    return (target if isinstance(target, str) else getattr(target, "__name__", str(target))).strip("_").lower()


def is_in_place(node: fx.Node) -> bool:
    """Whether the operation writes its result into its first operand."""
    return node.kwargs.get("inplace") is True or writes(node.target)


@functools.cache
def writes(target: Any) -> bool:
    """Whether a function or tensor method writes its result into its first operand."""
    if isinstance(target, torch._ops.OpOverload):
        arguments = target._schema.arguments
        alias = arguments[0].alias_info if arguments else None
        return alias is not None and alias.is_write
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name in ("iadd", "isub", "imul", "itruediv", "setitem") or (name.endswith("_") and not name.endswith("__"))


_SAME_ORDER = "view unflatten squeeze unsqueeze view_as unsafe_view alias detach"
_OTHER_ALIASES = """
    reshape reshape_as flatten contiguous permute transpose t numpy_t mt movedim moveaxis swapaxes swapdims expand expand_as unbind split
    split_with_sizes chunk tensor_split select slice narrow getitem unfold broadcast_to atleast_2d atleast_3d unsafe_split adjoint
    diagonal as_strided view_as_complex view_as_real real imag
"""
_KEEPING = frozenset(_SAME_ORDER.split())
_ALIASES = _KEEPING.union(_OTHER_ALIASES.split())


def may_alias(node: fx.Node) -> bool:
    """Whether the result may lie in its operand's memory, so that writing to one writes to the other."""
    return node.op.startswith("call") and base_name(node) in _ALIASES


def keeps_order(node: fx.Node) -> bool:
    """Whether the result lies in its operand's memory, with the same entries in the same order unless there are fewer."""
    return node.op.startswith("call") and base_name(node) in _KEEPING
