"""The input of a layer, kept for the backward pass at no cost where autograd keeps what it was made from.

The input of a linear layer is mostly the output of a norm (w * x_hat), of a gate (silu(g) * u) or of an activation,
and the node of that operation keeps its own operands. Such an input is computed again from them: one pass over it,
bit for bit the same for products and activations, instead of a copy of it in memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


Recipe = Callable[[], torch.Tensor]
Form = Callable[[torch.Tensor], torch.Tensor] | None
DEPTH = 4  # operations that are repeated at most

_CHANGED = (
    "a tensor that the backward pass needs has been modified by an in-place operation after the forward pass: "
    "it is at version {now} instead of {then}. Clone it before changing it."
)


def remade(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """``function(*inputs)``, which draws nothing; the backward pass calls it again, and keeps the inputs alone."""
    if not (torch.compiler.is_compiling() or torch._C._autograd._saved_tensors_hooks_is_enabled()):
        return function(*inputs)  # as within ``torch.func.grad``, which allows no such hooks
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Kept:
    """How the backward pass of a layer comes by the layer's input: see :func:`kept`.

    All layers that read the same input share one, and while their backward passes follow each other the input is made
    once.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self.recipe = recipe_of(x)
        self.users = self.left = 0
        self.made: dict[Form, torch.Tensor] = {}

    def get(self, saved: torch.Tensor | None, form: Form = None) -> torch.Tensor:
        """The input, or what ``form`` makes of it; ``saved`` is what the context kept."""
        if self.recipe is None:
            return saved if form is None else form(saved)
        value = self.read(form)
        self.left -= 1
        if self.left <= 0:
            self.made.clear()
            self.left = self.users  # another backward pass may follow, if the graph is retained
        return value

    def read(self, form: Form = None) -> torch.Tensor:
        """The same where there is a recipe, for one who is not counted among those that read the input."""
        value = self.made.get(form)
        if value is None:
            assert self.recipe is not None
            value = self.recipe() if None not in self.made else self.made[None]
            value = self.made[form] = value if form is None else form(value)
        return value


def kept(x: torch.Tensor, wanted: bool = True) -> tuple[Kept | None, torch.Tensor | None]:
    """What to keep of ``x`` for a backward pass that asks for it, made inside :meth:`torch.autograd.Function.forward`.

    Returns:
        What gives ``x`` then, None if it is not ``wanted``; and the tensor that it wants to have been kept, None where
        ``x`` is made again. The tensor goes through ``ctx.save_for_backward`` and must not be held in any other way:
        gradient checkpointing and offloading let go of what autograd keeps, and of nothing else.
    """
    if not wanted:
        return None, None
    found = _shared(x)
    return found, x if found.recipe is None else None


def _shared(x: torch.Tensor) -> Kept:
    """What gives ``x``, shared with the other layers that read it."""
    node = x.grad_fn
    if node is None:
        return Kept(x)
    shared = node.metadata.get("peft_kept")
    found = shared() if shared is not None else None
    if found is None or found.recipe is None:
        found = Kept(x)
        if found.recipe is not None:
            node.metadata["peft_kept"] = weakref.ref(found)
    found.users += 1
    found.left = found.users
    return found


def recipe_of(x: torch.Tensor) -> Recipe | None:
    """How to make ``x`` again from what its graph keeps, or None where it has to be kept."""
    if x.grad_fn is None or x._is_view():
        return None
    try:
        return None if is_recomputed() else _of_node(x.grad_fn, DEPTH)
    except (AttributeError, RuntimeError):  # an older torch that shows less of its graph, or a graph already freed
        return None


def is_held(x: torch.Tensor) -> bool:
    """Whether the operation that made ``x`` keeps its output, as ReLU and attention do: keeping x is free."""
    node = (x if x._base is None else x._base).grad_fn
    if node is None or is_recomputed():
        return False
    for name in ("result", "output"):
        if hasattr(node, f"_raw_saved_{name}"):
            found, _ = _saved_by(node, name)
            found = found.packed if isinstance(found, _Saved) else found
            if not isinstance(found, torch.Tensor) or found.device != x.device:
                return False
            return found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    return False


def is_recomputed() -> bool:
    """Whether gradient checkpointing is at work: it keeps nothing, and counts what is kept."""
    # a compiler decides for itself what to keep; torch 2.8 does not tell, so with it everything is kept
    if torch.compiler.is_compiling() or not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        return True
    hooks = _hooks()
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def _hooks() -> tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]] | None:
    """The hooks through which tensors pass now that autograd keeps; None if torch does not tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top and top(True)


@contextmanager
def recomputed(watch: Callable[[int], None] | None = None) -> Iterator[None]:
    """A context in which autograd keeps no tensor that can be made again from others that it keeps.

    The output of an activation between two products is one: autograd keeps its input too. Hooks of a context around
    this one see what is kept. Within gradient checkpointing, which keeps nothing, and within itself it does nothing.

    Args:
        watch: called with the bytes of each tensor that autograd is given to keep, and gets back.
    """
    outer = _hooks()
    itself = outer is not None and getattr(outer[0], "func", None) is _Saved
    if itself or is_recomputed() or not torch._C._autograd._saved_tensors_hooks_is_enabled():
        yield
        return
    with saved_tensors_hooks(partial(_Saved, outer, watch), _Saved.unpack):
        yield


class _Saved:
    """A tensor that a node of autograd keeps: how to make it, or itself as the hooks around give it back."""

    __slots__ = ("kept", "packed", "unpacks", "version", "view", "watch")

    def __init__(
        self, outer: tuple[Callable, Callable] | None, watch: Callable[[int], None] | None, x: torch.Tensor
    ) -> None:
        whole, self.view = x, None
        if x._is_view() and _is_plain_view(x, x._base):
            whole, self.view = x._base, (x.size(), x.stride(), x.storage_offset())
        found = _shared(whole) if whole.output_nr == 0 else None
        self.kept = found if found is not None and found.recipe is not None else None
        self.packed, self.unpacks, self.version = None, None if outer is None else outer[1], x._version
        if self.kept is None:
            # A node that kept its own output as it is would never be freed. A parameter stays itself: ZeRO-3 lets go
            # of what it has gathered into it, which another name for the memory would hold.
            itself = x if x.grad_fn is None else x.detach()
            self.packed = itself if outer is None else outer[0](x)
        self.watch = watch
        if watch is not None:
            watch(x.nbytes)

    def unpack(self) -> torch.Tensor:
        """The tensor, for the node."""
        tensor = self._found()
        if self.watch is not None:
            self.watch(tensor.nbytes)
        return tensor

    def _found(self) -> torch.Tensor:
        if self.kept is not None:
            return self._seen(self.kept.get(None))
        return self._checked() if self.unpacks is None else self.unpacks(self.packed)

    def reader(self) -> Recipe | None:
        """How recipes come by the tensor; None where hooks have put something else in its place."""
        if (made := self.kept) is not None:
            return lambda: self._seen(made.read())
        return self._checked if isinstance(self.packed, torch.Tensor) and _stays(self.packed) else None

    def _seen(self, whole: torch.Tensor) -> torch.Tensor:
        return whole if self.view is None else whole.as_strided(*self.view)

    def _checked(self) -> torch.Tensor:
        return unchanged(self.packed, self.version)


def _is_plain_view(x: torch.Tensor, base: torch.Tensor | None) -> bool:
    """Whether a view shows the very numbers of a base that lies in memory as it would if made again."""
    if base is None or x.dtype != base.dtype or x.is_conj() != base.is_conj() or x.is_neg() != base.is_neg():
        return False
    return base.is_contiguous() and not base.storage_offset() and x.layout == torch.strided


def _stays(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are always there; those of a parameter in parts are while its module is called."""
    of_fsdp = tensor.numel() and not tensor.untyped_storage().nbytes()
    return not of_fsdp and not hasattr(tensor, "ds_id")  # DeepSpeed ZeRO-3


def unchanged(tensor: torch.Tensor, version: int) -> torch.Tensor:
    """The tensor, as long as nothing has changed it in place since it had this version.

    Raises:
        RuntimeError: something has; the backward pass would be of other values.
    """
    if tensor._version != version:
        raise RuntimeError(_CHANGED.format(now=tensor._version, then=version))
    return tensor


def _of_node(node: Any, depth: int) -> Recipe | None:
    # functions of ours say themselves whether they give their output again
    maker = _MAKERS.get(node.name()) or getattr(getattr(node, "_forward_cls", None), "recipe", None)
    return maker(node, depth) if maker is not None and depth > 0 else None


def _operand(node: Any, name: str) -> Recipe | None:
    """A tensor that a node keeps; None where hooks have put something else in its place."""
    tensor, hooked = _saved_by(node, name)
    if isinstance(tensor, _Saved):
        return tensor.reader()
    if not isinstance(tensor, torch.Tensor):
        return None
    if not _stays(tensor):
        return None
    if not hooked:
        return lambda: _saved_by(node, name)[0]
    version = tensor._version
    return lambda: unchanged(_saved_by(node, name)[0], version)


def _saved_by(node: Any, name: str) -> tuple[Any, bool]:
    """What a node has saved under a name, and whether hooks have put it there."""
    raw = getattr(node, f"_raw_saved_{name}")
    hooked = raw.unpack_hook is not None
    # hooks may allow to unpack once only, so what they hold is read as it is
    return (raw.data if hooked else getattr(node, f"_saved_{name}")), hooked


def _product(node: Any, depth: int) -> Recipe | None:
    """a * b: a is kept where b requires grad, and the other way round; what is not kept is made by its own node."""
    left, right = node.next_functions
    if left[0] is not None and right[0] is not None:
        first, second = _operand(node, "self"), _operand(node, "other")
        return None if first is None or second is None else lambda: first() * second()
    kept_one, edge = ("self", right) if left[0] is None else ("other", left)
    factor, made = _operand(node, kept_one), _output_of(edge, depth)
    return None if factor is None or made is None else lambda: _times(made(), factor())


def _times(made: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """A product in the place of its first factor, which nobody else has, where it fits there."""
    fits = made.dtype == factor.dtype and (factor.shape in (made.shape, made.shape[-1:]))
    return made.mul_(factor) if fits else made * factor


def _output_of(edge: tuple[Any, int], depth: int) -> Recipe | None:
    node, index = edge
    return _of_node(node, depth - 1) if node is not None and index == 0 else None


def _cast(node: Any, depth: int) -> Recipe | None:
    (source,) = node.next_functions
    narrow = _output_of(source, depth)
    if narrow is None:
        return None
    # the node knows the metadata of its output, which is what its backward takes
    dtype = node._input_metadata[0].dtype
    return lambda: narrow().to(dtype)


def _activation(function: Callable[..., torch.Tensor], *options: str) -> Callable[[Any, int], Recipe | None]:
    def maker(node: Any, depth: int) -> Recipe | None:
        x = _operand(node, "self")
        given = {option: getattr(node, f"_saved_{option}") for option in options}
        return None if x is None else lambda: function(x(), **given)

    return maker


def _spectrum(node: Any, depth: int) -> Recipe | None:
    x = _operand(node, "self")
    options = node._saved_dim, node._saved_normalization, node._saved_onesided
    return None if x is None else lambda: torch.ops.aten._fft_r2c(x(), *options)


def _layer_norm(node: Any, depth: int) -> Recipe | None:
    parts = [_operand(node, name) for name in ("input", "result1", "result2")]
    affine = [_operand(node, name) for name in ("weight", "bias")]
    if None in parts or None in affine:
        return None

    def make() -> torch.Tensor:
        x, mean, rstd = (part() for part in parts)  # type: ignore[misc]
        weight, bias = (part() for part in affine)  # type: ignore[misc]
        return torch.addcmul(bias.to(rstd.dtype), (x - mean) * rstd, weight.to(rstd.dtype)).to(x.dtype)

    return make


_MAKERS: dict[str, Callable[[Any, int], Recipe | None]] = {
    "MulBackward0": _product,
    "ToCopyBackward0": _cast,
    "SiluBackward0": _activation(F.silu),
    "GeluBackward0": _activation(F.gelu, "approximate"),
    "NativeLayerNormBackward0": _layer_norm,
    "FftR2CBackward0": _spectrum,
}
