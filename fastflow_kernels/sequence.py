"""``ReversibleSequence``: a drop-in for FrEIA's SequenceINN that keeps no activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fastflow_kernels.freia import InvertibleModule, adopt
from fastflow_kernels.reversible import Reversible


class ReversibleSequence(Reversible, InvertibleModule):
    """A chain of invertible modules whose training memory does not grow with its depth.

    A drop-in for FrEIA's SequenceINN: same methods, attributes and state dict, and where FrEIA is
    imported an instance of it. The backward pass starts from the chain's output and reconstructs
    one input at a time. It does so for :class:`AllInOneBlock` only; other modules in between keep
    what they keep anyway.

    The reconstruction loses digits. Where its input is alive anyway, at the start of the chain and
    wherever an activation is kept, it is compared, relative to its norm: an error above 8e-6 (1e-10
    in float64) makes the passes to come keep activations, so many that it stays below if every
    block multiplies it alike; above 5e-4 there is a RuntimeWarning, above 2e-2 a RuntimeError. In
    half precision every activation is kept, and only the coefficients are not.

    A block's inverse multiplies errors of its active half by exp(-s) / scale, at most exp(clamp) /
    scale, and adds what the subnet makes of those of the passive half. That is the bound; a trained
    FastFlow of 32 blocks (clamp 2) is off by 3e-7 in all, 3 eps.

    Args:
        dims: The input's shape without the batch, C, *S.
        force_tuple_output: Return the result in a tuple, as other invertible modules do.
        checkpoint_every: Blocks between two activations that are kept. None: as many as the
            measured error allows, at first all.
        debug: Keep every activation and compare it; see :meth:`drift_report`. It takes the memory
            that is saved otherwise.

    Attributes:
        drift: Of the last backward pass, by block: the error of its reconstructed input relative to
            the norm, where it was compared.

    Raises:
        ValueError, TypeError: ``checkpoint_every`` is no positive integer.

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
            cond: Which of the conditions given to ``forward`` the module takes.
            cond_shape: That condition's shape without the batch; an instance knows it.
            kwargs: For the class.

        Raises:
            TypeError: Arguments for an instance (a ValueError, too), or a condition without a
                shape.
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
        """A module; or the chain of those in a slice, which shares them.

        Where the slice runs backwards, the chain holds their inverses. Conditions are numbered
        anew, in the order in which the modules of the new chain first ask for them.
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
        """Put another module in the place of one.

        Raises:
            NotImplementedError: ``key`` is a slice.
            TypeError: The module is not an invertible one.
            ValueError: Its inputs, outputs or conditions have other shapes than those of the module
                that it replaces.
        """
        if isinstance(key, slice):
            raise NotImplementedError("expected the place of one module, got a slice")
        before, place = self.module_list[key], range(len(self))[key]
        output_dims = getattr(value, "output_dims", None)
        if not isinstance(value, nn.Module) or output_dims is None:
            raise TypeError(f"expected an invertible module, got {type(value).__name__}")
        dims_in, dims_out = [self.shapes[place]], [self.shapes[place + 1]]
        for what, expected, actual in (
            ("inputs", dims_in, _shapes(value, "dims_in", dims_in)),
            ("outputs", dims_out, [tuple(shape) for shape in output_dims(dims_in)]),
            ("conditions", _shapes(before, "dims_c", []), _shapes(value, "dims_c", [])),
        ):
            if actual != expected:
                raise ValueError(
                    f"expected a module with {what} of shape {expected} at place {place}, got one "
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
        """The output's shape.

        Args:
            input_dims: ``[(C, *S)]``, the input's shape; or None.

        Raises:
            ValueError: Another input shape than the chain's; or one without ``force_tuple_output``,
                for then the chain is no module of another container.
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
    """The inverse of an invertible module, in the part of a chain that runs backwards; with the
    state dict of FrEIA's Inverse.

    Args:
        module: The other module.
    """

    module: Any  # an nn.Module of which no type tells the attributes

    def __init__(self, module: Any) -> None:
        super().__init__(module.output_dims(module.dims_in), getattr(module, "dims_c", None))
        self.module = module

    def forward(
        self, *args: Any, rev: bool = False, **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Evaluate the other module in the other direction; the arguments are its own."""
        results: tuple[tuple[Tensor, ...], Tensor] = self.module(*args, rev=not rev, **kwargs)
        return results

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes of the other module's inputs."""
        return [tuple(shape) for shape in self.module.dims_in]


class _ArgumentError(TypeError, ValueError):
    """Arguments that a call does not take, which FrEIA calls a ValueError."""


def _shapes(module: nn.Module, name: str, default: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """An invertible module's dims_in or dims_c."""
    return [tuple(shape) for shape in getattr(module, name, default)]


def _adopt_freia() -> None:
    adopt(ReversibleSequence, "FrEIA.framework.sequence_inn", "SequenceINN")


_adopt_freia()
