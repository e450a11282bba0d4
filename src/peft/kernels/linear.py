"""Linear layer and low-rank updates in one step: y = W x + b + sum_i s_i B_i A_i drop_i(x).

The update is accumulated into the base layer's output, and its gradient into the gradient of the input, by the
products themselves. Kept for the backward pass are x, once for all layers that read it and not at all where its own
graph gives it back (:mod:`peft.kernels.remake`), and the ``[n, r]`` products A x. Adapters may be wider than the
activations: they are rounded for the products, and their gradients come in their own dtype.

:func:`composed` says the same in plain operations; compilers, function transforms and tensor subclasses get that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from peft.kernels.autocast import is_autocast
from peft.kernels.dropout import Dropped, draw_seed
from peft.kernels.few import is_few
from peft.kernels.products import accumulate, plus_product, product
from peft.kernels.remake import kept


@dataclass(slots=True)
class Factors:
    """An update dW = scale * up @ middle @ down of a linear layer, on an input with dropout.

    Attributes:
        down, up: A ``[r, in]`` and B ``[out, r]``, floating point.
        scale: a number. dropout: the probability with which entries of the input are dropped now.
        middle: M ``[r, r]``, or its diagonal ``[r]``; None where there is none. A step multiplies the ``[n, r]``
            products by it, which is less than a matrix B M and its gradient.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0
    dropout: float = 0.0
    middle: torch.Tensor | None = None

    @property
    def trains(self) -> bool:
        """Whether a gradient is asked for of A, of B or of M."""
        middle = self.middle is not None and self.middle.requires_grad
        return self.down.requires_grad or self.up.requires_grad or middle

    def whole(self) -> Factors:
        """The same as two matrices."""
        m = self.middle
        if m is None:
            return self
        return Factors(self.down, self.up @ m if m.dim() == 2 else self.up * m, self.scale, self.dropout)


class Joint:
    """What the backward passes of layers that read one input share: the gradient of it, as far as it is known.

    Attributes:
        x: the input, a weak reference.
        gradient: ``[n, in]``, summed in place by the layers in the backward pass with the number ``task``: another
            one, of a part of the graph, may have left something that nobody took.
    """

    __slots__ = ("gradient", "task", "x")

    def __init__(self, x: Callable[[], torch.Tensor | None]) -> None:
        self.x, self.task = x, -1
        self.gradient: torch.Tensor | None = None

    def known(self) -> torch.Tensor | None:
        """The gradient of this backward pass so far, to be changed in place."""
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task, self.gradient = task, None
        return self.gradient

    def take(self) -> torch.Tensor | None:
        """The same for good."""
        gradient = self.known()
        self.gradient = None
        return gradient


@dataclass(slots=True)
class Share:
    """What a layer gets that reads its input together with others, see :mod:`peft.kernels.joint`.

    Attributes:
        source: the input, which leads to the node that all of them share.
        hidden: by the id of A: A ``[r, in]``, and its product with the input, ``[n, r]``.
    """

    joint: Joint
    source: torch.Tensor
    hidden: dict[int, tuple[torch.Tensor, torch.Tensor]]

    def of(self, f: Factors, dtype: torch.dtype) -> torch.Tensor | None:
        """The product for an update, None where that has to make its own."""
        down, hidden = self.hidden.get(id(f.down), (None, None))
        return hidden if down is f.down and not f.dropout and hidden is not None and hidden.dtype == dtype else None


def low_rank_linear(
    base: nn.Module,
    x: torch.Tensor,
    factors: Sequence[Factors],
    weight: torch.Tensor | None = None,
    fresh: bool = False,
    share: Share | None = None,
) -> torch.Tensor:
    """The output of ``base`` with low-rank updates, ``[..., out]`` in the dtype that ``base`` gives.

    Args:
        base: a linear layer of any storage, called for its output unless ``weight`` is given.
        x: ``[..., in]``.
        factors: the updates.
        weight: W ``[out, in]`` where ``base`` may be passed by: it is ``W x + b`` and nothing else, frozen.
        fresh: nothing else holds or needs what ``base`` gives, so it may be changed in place.
        share: what other layers that read x have made of it for this one.
    """
    if not is_eager(x):
        return composed(base(x), x, factors)
    few = not is_autocast(x.device.type) and are_few(x, factors)
    own = weight is not None and x.dtype == weight.dtype and not is_autocast(x.device.type)
    if not (torch.is_grad_enabled() and _trains(x, factors)):
        return _infer(base, x, [f.whole() for f in factors], weight if own else None, fresh, few)
    if few:
        return with_few(x, weight, base.bias, factors) if own else composed(base(x), x, factors)
    if own:
        return _apply(x, None, weight, base.bias, factors, share)
    return _apply(x, base_output(base, x, None, fresh), None, None, factors, share)


def in_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Sequence[Factors],
    share: Callable[[], Share | None],
) -> torch.Tensor | None:
    """W x + b and low-rank updates of x ``[..., in]`` in a training step, without autocast; x has W's dtype.

    Args:
        share: asked where the layer reads x together with others, see :func:`low_rank_linear`.

    Returns:
        None where the layer's own tensors train, or nothing does: that is not for this function.
    """
    if are_few(x, factors):
        return with_few(x, weight, bias, factors)
    if weight.requires_grad or (bias is not None and bias.requires_grad) or not _trains(x, factors):
        return None
    return _apply(x, None, weight, bias, factors, share())


def base_output(
    base: nn.Module, x: torch.Tensor, weight: torch.Tensor | None = None, fresh: bool = False
) -> torch.Tensor:
    """The output of ``base`` as a contiguous tensor that may be changed in place.

    Args:
        weight, fresh: as in :func:`low_rank_linear`.
    """
    if weight is not None and weight.dtype == x.dtype and not is_autocast(x.device.type):
        return fresh_linear(x, weight, base.bias)
    y = base(x)
    free = fresh and y.is_contiguous() and not y._is_view()
    return y if free else y.clone(memory_format=torch.contiguous_format)


def composed(y: torch.Tensor, x: torch.Tensor, factors: Sequence[Factors]) -> torch.Tensor:
    """The same in plain operations: the updates of x ``[..., in]`` added to y ``[..., out]``."""
    dtype = product_dtype(y)
    # no add with alpha: Inductor (torch 2.13) makes one addmm of it and the product, and loses the alpha
    in_one = y.dim() == 2 and dtype == y.dtype and not torch.compiler.is_compiling() and not is_autocast(y.device.type)
    for f in factors:
        inner = F.dropout(x, f.dropout) if f.dropout else x
        hidden = _through(F.linear(in_dtype(dtype, inner), in_dtype(dtype, f.down)), f.middle)
        up = in_dtype(dtype, f.up)
        if in_one:
            y = torch.addmm(y, hidden, up.t(), alpha=f.scale)
        else:
            y = in_dtype(y.dtype, y + F.linear(hidden, up) * f.scale)
    return y


def are_few(x: torch.Tensor, factors: Sequence[Factors]) -> bool:
    """Whether a training step with this input is one for :func:`with_few`."""
    # autograd would hold what ZeRO-3 has gathered for the forward pass, under another name
    return is_few(x, any(f.dropout for f in factors)) and not any(hasattr(f.down, "ds_id") for f in factors)


def with_few(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, factors: Sequence[Factors]
) -> torch.Tensor:
    """W x + b and low-rank updates of x ``[..., in]``, which has W's dtype, by autograd's own operations."""
    rows = x.reshape(-1, x.shape[-1])
    y = composed(F.linear(rows, weight, bias), rows, factors)
    return y if x.dim() == 2 else shaped_as(x, y)


def is_eager(x: torch.Tensor) -> bool:
    """Whether the call is neither traced, transformed nor recorded, on an ordinary tensor."""
    if torch.compiler.is_compiling():
        return False
    if type(x) is not torch.Tensor and type(x) is not nn.Parameter:
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work (``grad``, ``vmap``), which knows no functions of ours."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def bare_weight(module: nn.Module | None) -> nn.Parameter | None:
    """The weight of a linear layer whose call is a product with it and nothing else: no hooks, no other class."""
    if type(module) is not nn.Linear:
        return None
    own = module.__dict__  # is_hooked as it is written out: each layer asks this twice for each token
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return None
    weight = own["_parameters"].get("weight")
    return weight if type(weight) is nn.Parameter and "forward" not in own else None


def active_rate(dropout: nn.Module) -> float | None:
    """The probability with which a dropout module drops entries now; None where it is another kind of module."""
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout or dropout.p >= 1 or is_hooked(dropout):
        return None
    return dropout.p if dropout.training else 0.0


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own


def product_dtype(y: torch.Tensor) -> torch.dtype:
    """The dtype of the small products: that of the activations, or float32 on processors that only emulate it."""
    dtype = y.dtype
    if dtype is not torch.float32 and dtype in _SIXTEEN and y.device.type == "cpu" and not _multiplies(dtype):
        return torch.float32
    return dtype


_SIXTEEN = (torch.bfloat16, torch.float16)
_NATIVE: dict[torch.dtype, bool] = {}


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions for products of 16-bit numbers."""
    if dtype not in _NATIVE:
        features = torch.backends.cpu.get_cpu_capability()
        native = dtype == torch.bfloat16 and "AVX512" in features and torch.cpu._is_avx512_bf16_supported()
        _NATIVE[dtype] = bool(native or features in ("SVE256", "SVE"))
    return _NATIVE[dtype]


def _trains(x: torch.Tensor, factors: Sequence[Factors]) -> bool:
    return x.requires_grad or any(f.trains for f in factors)


def _infer(
    base: nn.Module, x: torch.Tensor, factors: Sequence[Factors], weight: torch.Tensor | None, fresh: bool, few: bool
) -> torch.Tensor:
    """Without autograd: the updates go straight into the base layer's output."""
    if weight is not None:
        return inferred(x, weight, base.bias, factors, few)
    y = base_output(base, x, None, fresh)
    out, rows = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    with no_autocast(x):
        for f in factors:
            _add(out, rows, f, few)
    return y


def inferred(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Sequence[Factors],
    few: bool = False,
) -> torch.Tensor:
    """W x + b and low-rank updates of x ``[..., in]``, which has W's dtype, without autograd or autocast.

    All products are of matrices: for one token, a product of tensors with three axes costs twice as much.

    Args:
        few: entries are dropped as a training step with few of them does.
    """
    shape = x.shape
    rows = x.reshape(-1, shape[-1])
    y = F.linear(rows, weight, bias)
    for f in factors:
        if f.down.dtype is f.up.dtype is x.dtype is torch.float32 and not f.dropout:
            y.addmm_(F.linear(rows, f.down), f.up.t(), alpha=f.scale)  # as below, in fewer calls
        else:
            _add(y, rows, f, few)
    return y.resize_(*shape[:-1], y.shape[1])  # and no view: others may change it in place


def _add(y: torch.Tensor, x: torch.Tensor, f: Factors, few: bool) -> None:
    """Add an update of x ``[n, in]`` to y ``[n, out]``, in place."""
    dtype, inner, scale = product_dtype(y), x, f.scale
    # reentrant checkpointing comes here first and computes again with autograd: the masks have to be the same
    if f.dropout and few:
        inner = F.dropout(x, f.dropout)
    elif f.dropout:
        inner, scale = Dropped(f.dropout, draw_seed()).copy(x), f.scale / (1 - f.dropout)
    hidden = F.linear(in_dtype(dtype, inner), in_dtype(dtype, f.down))
    accumulate(y, hidden, in_dtype(dtype, f.up).t(), scale)


def in_dtype(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a dtype, itself where it has that already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def no_autocast(x: torch.Tensor) -> Any:
    """The products choose their dtypes themselves."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if is_autocast(kind) else NO_CONTEXT


NO_CONTEXT = nullcontext()


def _apply(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    factors: Sequence[Factors],
    share: Share | None = None,
) -> torch.Tensor:
    parts: list[torch.Tensor | None] = []
    scales, drops, joint = [], [], None
    dtype = product_dtype(x if y is None else y)
    for f in factors:
        rate, hidden = f.dropout, None if share is None else share.of(f, dtype)
        scales.append(f.scale / (1 - rate))
        drops.append((rate, draw_seed()) if rate else None)
        parts += (f.down if hidden is None else None, f.up, hidden, f.middle)
    if share is not None:
        x, joint = share.source, share.joint
    with no_autocast(x):
        return LowRankLinear.of(x, y, weight, bias, scales, drops, joint, *parts)


class Direct(Function):
    """A function that is never called within transforms of ``torch.func``: see :func:`is_eager`."""

    @classmethod
    def of(cls, *args: Any) -> Any:
        """The same as ``apply``, which first looks at each argument for what such transforms have left."""
        return super(Function, cls).apply(*args)


class LowRankLinear(Direct):
    """y = W x + b, or a given y which is changed in place, plus the low-rank updates of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        scales: list[float],
        drops: list[tuple[float, int] | None],
        joint: Joint | None,
        *parts: Any,
    ) -> torch.Tensor:
        # All but the product with W comes first: it pushes x, and Python's objects, out of the processor's cache.
        shape, dtype = x.shape, product_dtype(x if y is None else y)
        whole = x.reshape(-1, shape[-1])
        rows = in_dtype(dtype, whole)
        needed, adds, reads = [], [], False
        for i, drop in enumerate(drops):
            a, b, hidden, m = parts[4 * i : 4 * i + 4]
            dropped = None if drop is None else Dropped(*drop)
            if hidden is None:
                hidden = product(rows if dropped is None else dropped.copy(rows), in_dtype(dtype, a).t())
                reads |= a.requires_grad
            adds.append((_through(hidden, m), in_dtype(dtype, b).t(), scales[i]))
            keeps = b.requires_grad or (m is not None and m.requires_grad)
            needed += [a, b, hidden if keeps else None, m, dropped and dropped.few()]
        ctx.scales, ctx.drops, ctx.dtype, ctx.shape, ctx.given = scales, drops, dtype, shape, y is not None
        ctx.joint = joint
        ctx.kept, tensor = kept(x if joint is None else joint.x(), reads)
        ctx.save_for_backward(tensor, weight, *needed)
        if y is None:
            out = product(whole, weight.t(), bias=bias)  # type: ignore[union-attr]
        else:
            ctx.mark_dirty(y)
            out = y.view(-1, y.shape[-1])
        for h, up, scale in adds:
            accumulate(out, h, up, scale)
        return out.resize_(*shape[:-1], out.shape[1]) if y is None else y  # no view: others may change it in place

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        with no_autocast(gradient):
            return _backward(ctx, gradient)


def fresh_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """W x + b, never as a view: outputs of a layer may be changed in place."""
    rows = x.reshape(-1, x.shape[-1])
    out = product(rows, weight.t(), bias=bias)
    return shaped_as(x, out)


def shaped_as(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Outputs ``[n, out]`` of all rows of x ``[..., in]`` as ``[..., out]``, never as a view."""
    return torch.ops.aten._unsafe_view(rows, (*x.shape[:-1], rows.shape[-1]))


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved, weight, *rest = ctx.saved_tensors
    dtype = ctx.dtype
    twice = torch.is_grad_enabled()  # a gradient of the gradient will be asked for
    if twice and ctx.kept is None and any(a is not None for a in rest[::5]):
        raise RuntimeError(
            "second derivatives of a low-rank update with a frozen down-projection need its input, which is not kept. "
            "Compute them within `with peft.kernels.plain():`."
        )
    dy = gradient.reshape(-1, gradient.shape[-1])
    needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[7:]
    inner, grads = None, []
    if ctx.kept is not None and (twice or any(needs[::4])):
        inner = in_dtype(dtype, ctx.kept.get(saved).reshape(-1, ctx.shape[-1]))
    whole, dy, to_x = dy, in_dtype(dtype, dy), []
    for i, (scale, drawn) in enumerate(zip(ctx.scales, ctx.drops)):
        a, b, hidden, m, places = rest[5 * i : 5 * i + 5]
        needs_a, needs_b, needs_hidden, needs_m = needs[4 * i : 4 * i + 4]
        drop = None if drawn is None else Dropped(drawn[0], drawn[1], places)
        dropped = inner if drop is None or inner is None else drop.copy(inner)
        d_down = d_up = d_hidden = d_middle = None
        if twice and a is not None and (needs_b or needs_m):
            hidden = torch.mm(dropped, in_dtype(dtype, a).t())
        if needs_b:
            d_up = in_dtype(b.dtype, product(_through(hidden, m).t(), dy, scale).t())
        if (needs_x and a is not None) or needs_a or needs_hidden or needs_m:
            dh = product(dy, in_dtype(dtype, b), scale)
            if needs_m:
                d_middle = in_dtype(m.dtype, dh.t() @ hidden if m.dim() == 2 else (dh * hidden).sum(0))
            dh = _through(dh, m, back=True)
            d_hidden = dh if needs_hidden else None
            if needs_a:
                d_down = in_dtype(a.dtype, product(dh.t(), dropped))
            if needs_x and a is not None:
                to_x.append((dh, in_dtype(dtype, a), drop))
        grads += [d_down, d_up, d_hidden, d_middle]
    joint = ctx.joint if needs_x and not twice else None
    dx = None if joint is None else joint.known()
    if needs_x and weight is not None:  # last, as in the forward pass
        dx = product(whole, weight) if dx is None else plus_product(dx, whole, weight)
    for dh, a, drop in to_x:
        dx = into_gradient(dx, dh, a, drop, gradient.dtype)
    if joint is not None:
        joint.gradient, dx = dx, None  # the node that all layers of this input share gives it on
    dx = None if dx is None else dx.view(ctx.shape)
    return dx, (gradient if ctx.given else None), None, None, None, None, None, *grads


def _through(h: torch.Tensor, middle: torch.Tensor | None, back: bool = False) -> torch.Tensor:
    """M h of products ``[n, r]``, or M^T h."""
    if middle is None:
        return h
    m = in_dtype(h.dtype, middle)
    return h * m if m.dim() == 1 else h @ (m if back else m.t())


def into_gradient(
    dx: torch.Tensor | None, dh: torch.Tensor, a: torch.Tensor, drop: Dropped | None, dtype: torch.dtype
) -> torch.Tensor:
    """dx + drop(dh A), in place where there is a dx."""
    if dx is None:
        part = product(dh, a)
        return in_dtype(dtype, part if drop is None else drop.copy(part))
    return accumulate(dx, dh, a, 1.0) if drop is None else drop.add_product(dx, dh, a)
