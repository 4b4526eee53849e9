"""``ReversibleSequence``: a drop-in for FrEIA's SequenceINN that keeps no activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fastflow_kernels.freia import InvertibleModule, adopt
from fastflow_kernels.reversible import ReversibleChain


class ReversibleSequence(ReversibleChain, InvertibleModule):
    """A chain of invertible modules whose training memory does not grow with its depth.

    A drop-in for FrEIA's SequenceINN, with the same methods, attributes and state dict. Where FrEIA
    is imported, it is an instance of it. The backward pass starts from the chain's output and
    reconstructs one input at a time. It does so for :class:`AllInOneBlock` only; other modules in
    between keep the activations that they keep anyway.

    The reconstruction loses digits. It is compared with the true input where that is in memory
    anyway: at the start of the chain and wherever an activation is kept. What happens then depends
    on the error relative to the input's norm:

    - Above 8e-6 (1e-10 in float64), later passes keep activations. They keep so many that the error
      stays below this if every block multiplies it alike.
    - Above 5e-4 there is a RuntimeWarning.
    - Above 2e-2 there is a RuntimeError.

    In half precision every activation is kept, and only the coefficients are not.

    A block's inverse multiplies errors of its active half by exp(-s) / scale, at most exp(clamp) /
    scale. It adds what the subnet makes of the errors of the passive half. That is the bound; a
    trained FastFlow of 32 blocks (clamp 2) is off by 3e-7 in all, 3 eps.

    Args:
        dims: The input's shape without the batch, C, *S.
        force_tuple_output: Return the result in a tuple, as other invertible modules do.
        checkpoint_every: Number of blocks between two activations that are kept. None means as many
            as the measured error allows, at first all.
        debug: Keep every activation and compare it; see :meth:`drift_report`. This takes the memory
            that is saved otherwise.

    Attributes:
        drift: Errors in the last backward pass, by the block's index. Each is that of the block's
            reconstructed input relative to its norm. Blocks that were not compared are left out.

    Raises:
        ValueError, TypeError: ``checkpoint_every`` is not a positive integer.

    Example:
        >>> import torch
        >>> from fastflow_kernels import AllInOneBlock, ReversibleSequence
        >>> def subnet(channels_in, channels_out):
        ...     return torch.nn.Conv2d(channels_in, channels_out, 3, padding=1)
        >>> flow = ReversibleSequence(4, 8, 8)
        >>> for _ in range(3):
        ...     flow.append(AllInOneBlock, subnet_constructor=subnet)
        >>> z, log_det = flow(torch.randn(2, 4, 8, 8))
        >>> (0.5 * z.square().sum() - log_det.sum()).backward()
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _adopt_freia()  # see InvertibleModule
        return super().__new__(cls)

    def __init__(
        self,
        *dims: int,
        force_tuple_output: bool = False,
        checkpoint_every: int | None = None,
        debug: bool = False,
    ) -> None:
        super().__init__([dims])
        self.shapes = [tuple(dims)]
        self.conditions: list[int | None] = []
        self.module_list = nn.ModuleList()
        self.force_tuple_output = force_tuple_output
        self.checkpoint_every = checkpoint_every
        self.debug = debug

    def append(
        self,
        module_class: Callable[..., nn.Module] | nn.Module,
        cond: int | None = None,
        cond_shape: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a module.

        Args:
            module_class: An invertible module's class, called as ``module_class([shape],
                **kwargs)``; or an instance.
            cond: Index of the module's condition among those that ``forward`` takes.
            cond_shape: That condition's shape without the batch. An instance knows it.
            kwargs: Arguments of the class.

        Raises:
            TypeError: An instance came with arguments (then it is a ValueError, too), or ``cond``
                came without ``cond_shape``.
            ValueError: The module has more than one output, or an instance was built for another
                shape.
        """
        dims_in = [self.shapes[-1]]
        if isinstance(module_class, nn.Module):
            if kwargs:
                raise _ArgumentError(
                    f"expected no arguments beside an instance, got {', '.join(kwargs)}"
                )
            module: Any = module_class
            expected = _shapes(module, "dims_in", dims_in)
            if expected != dims_in:
                raise ValueError(
                    f"expected a module for inputs of shape {dims_in}, got one for {expected}"
                )
        else:
            if cond is not None:
                if cond_shape is None:
                    raise TypeError(f"expected cond_shape, the shape of condition {cond}, got None")
                kwargs["dims_c"] = [cond_shape]
            module = module_class(dims_in, **kwargs)
        dims_out: list[tuple[int, ...]] = module.output_dims(dims_in)
        if len(dims_out) != 1:
            raise ValueError(
                f"expected a module with one output, got {len(dims_out)} of {type(module).__name__}"
            )
        self.conditions.append(cond)
        self.module_list.append(module)
        self.shapes.append(tuple(dims_out[0]))

    def __getitem__(self, item: int | slice) -> nn.Module:
        """Return a module, or for a slice a chain that shares the modules in it.

        If the slice runs backwards, the chain holds their inverses. Conditions are numbered anew,
        in the order in which the modules of the new chain first use them.
        """
        if not isinstance(item, slice):
            return self.module_list[item]
        places = range(len(self))[item]
        backwards = places.step < 0
        part = ReversibleSequence(
            *self.shapes[places.start + backwards],
            force_tuple_output=self.force_tuple_output,
            checkpoint_every=self.checkpoint_every,
            debug=self.debug,
        )
        renumbered: dict[int, int] = {}
        for place in places:
            module, cond = self.module_list[place], self.conditions[place]
            if cond is not None:
                cond = renumbered.setdefault(cond, len(renumbered))
            part.append(Inverse(module) if backwards else module, cond)
        return part

    def __setitem__(self, key: int, value: nn.Module) -> None:
        """Replace a module.

        Args:
            key: Index of the module.
            value: The new module.

        Raises:
            NotImplementedError: ``key`` is a slice.
            TypeError: The new module is not invertible.
            ValueError: Its inputs, outputs or conditions have other shapes than those of the module
                that it replaces.
        """
        if isinstance(key, slice):
            raise NotImplementedError("expected the index of one module, got a slice")
        before, place = self.module_list[key], range(len(self))[key]
        output_dims = getattr(value, "output_dims", None)
        if not isinstance(value, nn.Module) or output_dims is None:
            raise TypeError(f"expected an invertible module, got {type(value).__name__}")
        dims_in, dims_out = [self.shapes[place]], [self.shapes[place + 1]]
        for kind, expected, actual in (
            ("inputs", dims_in, _shapes(value, "dims_in", dims_in)),
            ("outputs", dims_out, [tuple(shape) for shape in output_dims(dims_in)]),
            ("conditions", _shapes(before, "dims_c", []), _shapes(value, "dims_c", [])),
        ):
            if actual != expected:
                raise ValueError(
                    f"expected a module with {kind} of shape {expected} at place {place}, got one "
                    f"with {actual}"
                )
        self.module_list[place] = value

    def __len__(self) -> int:
        return len(self.module_list)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.module_list)

    def output_dims(
        self, input_dims: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[int, ...]]:
        """Return the output's shape.

        Args:
            input_dims: ``[(C, *S)]``, the input's shape, or None. A container passes the shape, and
                needs a chain with ``force_tuple_output``.

        Returns:
            ``[(C, *S)]``.

        Raises:
            ValueError: ``input_dims`` is not the chain's input shape, or the chain was built
                without ``force_tuple_output``.
        """
        if input_dims is not None:
            if not self.force_tuple_output:
                raise ValueError(
                    "output_dims needs force_tuple_output=True, which makes the chain a module of "
                    "other containers"
                )
            expected = self.shapes[0]
            shapes: list[Any] = list(input_dims)
            if shapes != list(expected) and [tuple(shape) for shape in shapes] != [expected]:
                raise ValueError(
                    f"expected input_dims {[expected]}, the chain's input, got {input_dims}"
                )
        return [self.shapes[-1]]


class Inverse(InvertibleModule):
    """The inverse of an invertible module, for a slice of a chain that runs backwards.

    Its state dict is that of FrEIA's Inverse.

    Args:
        module: The module to invert.
    """

    module: Any  # an nn.Module of which no type tells the attributes

    def __init__(self, module: Any) -> None:
        super().__init__(module.output_dims(module.dims_in), getattr(module, "dims_c", None))
        self.module = module

    def forward(
        self, *args: Any, rev: bool = False, **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Evaluate the module in the other direction, with its own arguments."""
        results: tuple[tuple[Tensor, ...], Tensor] = self.module(*args, rev=not rev, **kwargs)
        return results

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shapes of the module's inputs."""
        return [tuple(shape) for shape in self.module.dims_in]


class _ArgumentError(TypeError, ValueError):
    """Unexpected arguments: a TypeError in Python, a ValueError in FrEIA."""


def _shapes(module: nn.Module, name: str, default: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return an invertible module's dims_in or dims_c."""
    return [tuple(shape) for shape in getattr(module, name, default)]


def _adopt_freia() -> None:
    adopt(ReversibleSequence, "FrEIA.framework.sequence_inn", "SequenceINN")


_adopt_freia()
