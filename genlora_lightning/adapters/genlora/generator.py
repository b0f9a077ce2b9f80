"""Hold the parameters from which radial basis functions make a low-rank matrix.

Shapes: R rank (basis vectors), Q latents (mostly one or two), G groups, K centres per basis function and latent, n
entries of a basis vector (in_features for A, out_features for B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from genlora_lightning.adapters.autograd import is_ordinary
from genlora_lightning.adapters.base import Factor, Role
from genlora_lightning.adapters.genlora.generate import generate, generate_matrices, pass_gradients_on
from genlora_lightning.adapters.genlora.rbf import get_kernel
from genlora_lightning.adapters.genlora.signs import entry_signs

Init = Literal["zero_latent", "zero_weight"]
_Parts = tuple[Tensor, Tensor, Tensor, Tensor]


class RBFGenerator(Factor):
    r"""Generates a matrix of ``rank`` basis vectors of length ``num_entries`` from one latent vector, or a few.

    .. math::
        M_{rj} = \gamma \sum_q \sigma_{rqj} \sum_k w_{g(j)\,rqk} \; \psi_{rqk}(z_{jq}), \qquad
        \psi_{rqk}(x) = \varphi(x / h_{rqk} - c_{rqk}) - \varphi(-c_{rqk})

    with the latents z, cut into groups g of consecutive entries, the RBF weights w, the centres c (in units of the
    width), the widths h, fixed signs σ (:mod:`~genlora_lightning.adapters.genlora.signs`; 1 without a sign table) and a
    constant γ, the weights' gain. The idea (a latent vector per low-rank matrix, radial basis functions that make the
    basis vectors) is GenLoRA's (arXiv 2602.05709); the anchoring at zero, the groups' own weights, more than one latent
    and the initialisation are this library's reading of it.

    Initial values: centres of random sign, |c| spread over [0.5, 2] (where the functions have slope *and* curvature at
    zero); random weights, scaled for each group and latent so that the R slopes
    :math:`\partial M_{rj}/\partial z_{jq}` at zero have the root mean square 1 (exactly for K = 1, in expectation for
    more), or with signs weights that make each slope ±1, because the signs are random enough; latents uniform in ±1/√n,
    like the rows of LoRA's A. With ``zero_start`` the matrix is zero.

    Args:
        num_entries: Length n of a basis vector.
        rank: Number R of basis vectors.
        num_latents: Number Q of latent vectors; each has basis functions of its own, which are summed.
        num_groups: Number G of groups; at most ``num_entries``.
        num_centers: Number K of radial basis functions summed in one basis vector, for each latent.
        width: Initial width of all radial basis functions, in units of the latent.
        kernel: Name of the radial basis function.
        learn_centers: Whether the centres are trainable.
        learn_widths: Whether the widths are trainable.
        sign_table: Number of the table of fixed signs; ``None`` for no signs.
        weight_gain: γ. An optimizer that gives all parameters steps of one size, as Adam does, moves the weights γ
            times as fast.
        zero_start: ``None``: start at random; ``"zero_latent"`` or ``"zero_weight"``: start with this part at zero, so
            that the matrix is zero, exactly.
        device: Where the parameters are made.
        generator: Random number generator for the initial values; torch's default one if ``None``.

    Raises:
        ValueError: ``num_groups`` is greater than ``num_entries``.
    """

    # In the order in which the functions of :mod:`~genlora_lightning.adapters.genlora.generate` take them.
    ROLES: ClassVar[Mapping[str, Role]] = {
        "latent": Role("latents"),
        "weight": Role("rbf_weights"),
        "centers": Role("rbf_shapes", decayed=False),
        "log_widths": Role("rbf_shapes", decayed=False),
    }
    # Signs depend on the row's number alone, and all rows read the same latents.
    ROWS_ALONG: ClassVar[Mapping[str, int]] = {"weight": -3, "centers": -3, "log_widths": -3}

    def __init__(
        self,
        num_entries: int,
        *,
        rank: int,
        num_latents: int = 1,
        num_groups: int = 1,
        num_centers: int = 1,
        width: float = 1.0,
        kernel: str = "gaussian",
        learn_centers: bool = True,
        learn_widths: bool = True,
        sign_table: int | None = None,
        weight_gain: float = 1.0,
        zero_start: Init | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(rank, num_entries)
        if num_groups > num_entries:
            raise ValueError(
                f"`num_groups` is {num_groups}, but the latent has only {num_entries} entries to divide into groups. "
                f"Give at most {num_entries} groups, or leave out such small layers with `exclude_modules`."
            )
        self.num_latents = num_latents
        self.num_groups = num_groups
        self.num_centers = num_centers
        self.width = float(width)
        self.kernel = kernel
        self.sign_table = sign_table
        self.weight_gain = float(weight_gain)
        self.zero_start = zero_start
        self.learned = {"centers": learn_centers, "log_widths": learn_widths}

        def empty(*shape: int) -> Tensor:
            # dtype named: Lightning builds models under a default dtype of bfloat16 with precision "bf16-true"
            return torch.empty(*shape, dtype=torch.float32, device=device)

        # Entries first: sharding divides the first dimension, of which a latent's number would be one or two.
        self.latent = nn.Parameter(empty(num_entries, num_latents))
        self.weight = nn.Parameter(empty(num_groups, rank, num_latents, num_centers))
        shape = (rank, num_latents, num_centers)
        self.centers = nn.Parameter(empty(*shape), requires_grad=learn_centers)
        self.log_widths = nn.Parameter(empty(*shape), requires_grad=learn_widths)
        self.reset_parameters(generator)

    @override
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new initial values; the class docstring says which. On the meta device there are none to draw."""
        if self.latent.is_meta:
            return
        self.centers.uniform_(0.5, 2.0, generator=generator)
        self.centers.mul_(torch.empty_like(self.centers).bernoulli_(0.5, generator=generator).mul_(2).sub_(1))
        self.log_widths.fill_(math.log(self.width))
        bound = 1 / math.sqrt(self.num_entries)
        self.latent.uniform_(-bound, bound, generator=generator)
        # (R, Q, K), per unit weight
        slopes = self.weight_gain * get_kernel(self.kernel).slope_at_zero(self.centers) / self.width
        if self.sign_table is None:
            self.weight.normal_(generator=generator)
            # Of a basis function's K slopes the squares are summed, not the slopes: their sum may be nearly zero.
            squares = (self.weight * slopes).square().sum(3, keepdim=True).mean(1, keepdim=True)  # (G, 1, Q, 1)
            self.weight.div_(squares.sqrt())
        else:
            self.weight.copy_(1 / (slopes * self.num_centers))
        if self.zero_start == "zero_latent":
            self.latent.zero_()
        elif self.zero_start == "zero_weight":
            self.weight.zero_()

    def signs(self, device: torch.device | None = None) -> Tensor | None:
        """The fixed signs ``(R, Q, n)``, if there are any; on the parameters' device or another one."""
        if self.sign_table is None:
            return None
        return entry_signs(self.sign_table, self.rank, self.num_latents, self.num_entries, device or self.latent.device)

    @override
    def is_trained(self, name: str) -> bool:
        return self.learned.get(name, True)

    @property
    @override
    def first_shape(self) -> tuple[int, ...]:
        return self.num_entries, self.num_latents

    @override
    def batch_key(self) -> Hashable:
        return (
            self.num_entries,
            self.rank,
            self.num_latents,
            self.num_groups,
            self.num_centers,
            self.kernel,
            self.sign_table,
            self.weight_gain,
        )

    @property
    @override
    def cost(self) -> int:
        return self.num_entries * self.rank * self.num_latents * self.num_centers

    @classmethod
    @override
    def make_many(
        cls,
        factors: Sequence[Self],
        *,
        dtype: torch.dtype | None,
        when_differentiated: Callable[[], None] | None = None,
    ) -> Sequence[Tensor]:
        first = factors[0]
        return generate_matrices(
            [_parts(factor) for factor in factors],
            first.kernel,
            scale=first.weight_gain,
            signs=first.signs(),
            dtype=dtype,
            when_differentiated=when_differentiated,
        )

    @classmethod
    @override
    def pass_gradients(cls, factors: Sequence[Self], gradients: Sequence[Tensor]) -> None:
        first = factors[0]
        parameters = [_parts(factor) for factor in factors]
        pass_gradients_on(parameters, gradients, first.kernel, scale=first.weight_gain, signs=first.signs())

    @override
    def make_stack(self, parts: Sequence[Tensor], *, dtype: torch.dtype | None) -> Tensor:
        one, signs = cast(_Parts, tuple(parts)), self.signs(parts[0].device)
        return generate_matrices([one], self.kernel, scale=self.weight_gain, signs=signs, dtype=dtype)[0]

    @override
    def forward(self, *, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        # No matrix product in it, and therefore nothing that autocast would turn into bfloat16. A compiler makes a
        # better backward than ours out of the formula.
        gain = self.weight_gain
        if plain or torch.compiler.is_compiling() or not is_ordinary(self.latent):
            matrix = generate(*_parts(self), self.kernel, self.signs())
            matrix = matrix if gain == 1.0 else gain * matrix
            return matrix if dtype is None else matrix.to(dtype)
        return generate_matrices([_parts(self)], self.kernel, scale=gain, signs=self.signs(), dtype=dtype)[0]

    @override
    def extra_repr(self) -> str:
        return (
            f"num_entries={self.num_entries}, rank={self.rank}, num_latents={self.num_latents}, "
            f"num_groups={self.num_groups}, num_centers={self.num_centers}, kernel={self.kernel!r}, "
            f"sign_table={self.sign_table}"
        )


def _parts(generator: RBFGenerator) -> _Parts:
    return cast(_Parts, generator.parts())
