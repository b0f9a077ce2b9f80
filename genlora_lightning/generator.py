"""The generator: a module with the parameters from which radial basis functions make a low-rank matrix.

Shapes: R rank (basis vectors), Q latents (mostly one or two), G groups, K centres per basis function and latent, n
entries of a basis vector (in_features for A, out_features for B).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

from genlora_lightning.basis import generate, generate_matrices, is_ordinary, slope_at_zero
from genlora_lightning.config import Init, Kernel
from genlora_lightning.signs import entry_signs

PARTS = ("latent", "weight", "centers", "log_widths")


class RBFGenerator(nn.Module):
    r"""Generates a matrix of ``rank`` basis vectors of length ``num_entries`` from one latent vector, or a few.

    .. math::
        M_{rj} = \gamma \sum_q \sigma_{rqj} \sum_k w_{g(j)\,rqk} \; \psi_{rqk}(z_{jq}), \qquad
        \psi_{rqk}(x) = \varphi(x / h_{rqk} - c_{rqk}) - \varphi(-c_{rqk})

    with the latents z, cut into groups g of consecutive entries, the RBF weights w, the centres c (in units of the
    width), the widths h, fixed signs σ (:mod:`~genlora_lightning.signs`; 1 without a sign table) and a constant γ,
    the weights' gain. The idea (a latent vector per low-rank matrix, radial basis functions that make the basis
    vectors) is GenLoRA's (arXiv 2602.05709); the anchoring at zero, the groups' own weights, more than one latent and
    the initialisation are this library's reading of it.

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

    Note:
        The parameters are float32 and stay so: a cast of the module to bfloat16 or float16 moves it but leaves the
        dtype, because an optimizer's small steps are lost in 8 bits of mantissa. A cast to float64 is obeyed.
    """

    def __init__(
        self,
        num_entries: int,
        *,
        rank: int,
        num_latents: int = 1,
        num_groups: int = 1,
        num_centers: int = 1,
        width: float = 1.0,
        kernel: Kernel = "gaussian",
        learn_centers: bool = True,
        learn_widths: bool = True,
        sign_table: int | None = None,
        weight_gain: float = 1.0,
        zero_start: Init | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_groups > num_entries:
            raise ValueError(
                f"`num_groups` is {num_groups}, but the latent has only {num_entries} entries to divide into groups. "
                f"Give at most {num_entries} groups, or leave out such small layers with `exclude_modules`."
            )
        self.num_entries = num_entries
        self.rank = rank
        self.num_latents = num_latents
        self.num_groups = num_groups
        self.num_centers = num_centers
        self.width = width
        self.kernel: Kernel = kernel
        self.sign_table = sign_table
        self.weight_gain = weight_gain
        self.zero_start = zero_start
        # Counted up whenever the parameters change, so that whoever keeps a matrix knows that it is out of date.
        self.changes = 0

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

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new initial values; the class docstring says which. On the meta device there are none to draw."""
        if self.latent.is_meta:
            return
        self.changed()
        self.centers.uniform_(0.5, 2.0, generator=generator)
        self.centers.mul_(torch.empty_like(self.centers).bernoulli_(0.5, generator=generator).mul_(2).sub_(1))
        self.log_widths.fill_(math.log(self.width))
        bound = 1 / math.sqrt(self.num_entries)
        self.latent.uniform_(-bound, bound, generator=generator)
        slopes = self.weight_gain * slope_at_zero(self.centers, self.kernel) / self.width  # (R, Q, K), per unit weight
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

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The parameters in the order in which the functions of :mod:`~genlora_lightning.basis` take them."""
        # Hundreds of generators are asked in each forward, and a module's own lookup of a parameter is slow.
        own = self._parameters
        latent, weight, centers, log_widths = (own.get(name) for name in PARTS)
        if latent is None or weight is None or centers is None or log_widths is None:  # FSDP1 has put views there
            return self.latent, self.weight, self.centers, self.log_widths
        return latent, weight, centers, log_widths

    def signs(self) -> Tensor | None:
        """The fixed signs ``(R, Q, n)``, if there are any."""
        if self.sign_table is None:
            return None
        return entry_signs(self.sign_table, self.rank, self.num_latents, self.num_entries, self.latent.device)

    @property
    def is_whole(self) -> bool:
        """Whether the parameters are ordinary tensors here and now, and not pieces of what FSDP1 or FSDP2 have cut."""
        parts = self.parts()
        if parts[0].shape != (self.num_entries, self.num_latents):
            return False
        return all(is_ordinary(part) and not getattr(part, "_fsdp_flattened", False) for part in parts)

    def changed(self) -> None:
        """Say that the parameters have new values: for whoever writes to them past the module's methods."""
        self.changes += 1

    @override
    def forward(self, *, scale: float = 1.0, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        """The generated matrix ``M (rank, num_entries)``, computed in the parameters' dtype, also under autocast.

        Args:
            scale: A factor on it.
            dtype: Of the result; the parameters' if ``None``.
            plain: Leave the backward to autograd, which can differentiate it again but keeps much for it.
        """
        # No matrix product in it, and therefore nothing that autocast would turn into bfloat16. A compiler makes a
        # better backward than ours out of the formula.
        scale *= self.weight_gain
        if plain or torch.compiler.is_compiling() or not is_ordinary(self.latent):
            matrix = generate(*self.parts(), self.kernel, self.signs())
            matrix = matrix if scale == 1.0 else scale * matrix
            return matrix if dtype is None else matrix.to(dtype)
        return generate_matrices([self.parts()], self.kernel, scale=scale, signs=self.signs(), dtype=dtype)[0]

    @override
    def _load_from_state_dict(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.changed()
        super()._load_from_state_dict(*args, **kwargs)

    @override
    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # Every cast and move of a module (`.to`, `.half`, Lightning's precision plugins) goes through `_apply`.
        def keep_precision(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor)
            if result.dtype in (torch.bfloat16, torch.float16):
                return tensor.to(device=result.device)
            return result

        self.changed()
        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]

    @override
    def extra_repr(self) -> str:
        return (
            f"num_entries={self.num_entries}, rank={self.rank}, num_latents={self.num_latents}, "
            f"num_groups={self.num_groups}, num_centers={self.num_centers}, kernel={self.kernel!r}, "
            f"sign_table={self.sign_table}"
        )
