"""The generator: radial basis functions that turn a latent vector into the basis vectors of a low-rank matrix.

Shapes: R rank (basis vectors), Q latents (mostly one or two), G groups, K centres per basis function and latent, n
entries of a basis vector (in_features for A, out_features for B).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

from genlora_lightning.config import Init, Kernel

# exp(c²/2), which the Gaussian's expansion multiplies and divides by, overflows float32 at c = 13.3. A centre this many
# widths from zero contributes a slope of 1e-30 and is of no use to anyone.
_MAX_CENTER = 12.0


def anchored_rbf(t: Tensor, centers: Tensor, kernel: Kernel) -> Tensor:
    """Radial basis function that is exactly zero at zero: ``ψ(t) = φ(t − c) − φ(−c)``.

    It is computed without the subtraction of two nearly equal numbers, so that it is accurate to the last bits for the
    small ``t`` at the start of training, and zero to the last bit at ``t = 0``.

    Args:
        t: Input in units of the width, ``x/h``; any shape.
        centers: Centres ``c`` in units of the width; broadcastable with ``t``.
        kernel: Name of φ; see :class:`~genlora_lightning.GenLoRAConfig`.

    Returns:
        ψ, in the broadcast shape. |ψ| < 1, and so is its derivative for every kernel.
    """
    if kernel == "gaussian":
        centers = centers.clamp(-_MAX_CENTER, _MAX_CENTER)
        return torch.exp(-0.5 * centers.square()) * torch.expm1(t * (centers - 0.5 * t))
    # φ(u) = v^-½ or v^-1 with v = 1 + u²; v(−c) − v(t − c) = t·(2c − t), and the rest is the difference of fractions.
    at_zero = 1 + centers.square()
    at_t = 1 + (t - centers).square()
    difference = t * (2 * centers - t)
    if kernel == "inverse_quadratic":
        return difference / (at_t * at_zero)
    if kernel == "inverse_multiquadric":
        root_zero, root_t = at_zero.sqrt(), at_t.sqrt()
        return difference / (root_zero * root_t * (root_zero + root_t))
    raise ValueError(f"Unknown kernel {kernel!r}.")


def slope_at_zero(centers: Tensor, kernel: Kernel) -> Tensor:
    """Derivative ``ψ'(0) = φ'(−c)`` of :func:`anchored_rbf` by ``t``, for initialisation."""
    if kernel == "gaussian":
        return centers * torch.exp(-0.5 * centers.square())
    power = 1.5 if kernel == "inverse_multiquadric" else 2.0
    factor = 1.0 if kernel == "inverse_multiquadric" else 2.0
    return factor * centers / (1 + centers.square()) ** power


def generate(latent: Tensor, weight: Tensor, centers: Tensor, log_widths: Tensor, kernel: Kernel) -> Tensor:
    """Generate basis vectors: ``M[r, j] = Σ_q Σ_k w[g(j), r, q, k] · ψ(z[j, q] / h[r, q, k]; c[r, q, k])``.

    Entry j belongs to group ``g(j) = ⌊j·G/n⌋``: G runs of consecutive entries whose lengths differ by at most one.

    Args:
        latent: ``z (n, Q)``.
        weight: ``w (G, R, Q, K)``.
        centers: ``c (R, Q, K)``, in units of the width.
        log_widths: ``log h (R, Q, K)``.
        kernel: Name of the radial basis function.

    Returns:
        ``M (R, n)``, in the dtype of the inputs. A column is exactly zero where all its latents are.
    """
    num_entries, num_groups = latent.shape[0], weight.shape[0]
    rank = centers.shape[0]
    # Of one latent the transposed gradient would have strides that DDP warns about, though it is contiguous.
    by_latent = latent.view(1, num_entries) if latent.shape[1] == 1 else latent.T
    t = by_latent.unsqueeze(1) * torch.exp(-log_widths).unsqueeze(-1)  # (R, Q, K, n)
    psi = anchored_rbf(t, centers.unsqueeze(-1), kernel).flatten(1, 2)
    by_function = weight.permute(1, 2, 3, 0).flatten(1, 2)  # (R, Q·K, G)
    if num_entries % num_groups == 0:
        grouped = psi.view(rank, psi.shape[1], num_groups, num_entries // num_groups)
        return (grouped * by_function.unsqueeze(-1)).sum(1).view(rank, num_entries)
    group_of_entry = torch.arange(num_entries, device=latent.device) * num_groups // num_entries
    return (psi * by_function.index_select(2, group_of_entry)).sum(1)


class RBFGenerator(nn.Module):
    r"""Generates a matrix of ``rank`` basis vectors of length ``num_entries`` from one latent vector, or a few.

    .. math::
        M_{rj} = \sum_q \sum_k w_{g(j)\,rqk} \; \psi_{rqk}(z_{jq}), \qquad
        \psi_{rqk}(x) = \varphi(x / h_{rqk} - c_{rqk}) - \varphi(-c_{rqk})

    with the latents z, cut into groups g of consecutive entries, the RBF weights w, the centres c (in units of the
    width) and the widths h. The idea (a latent vector per low-rank matrix, radial basis functions that make the basis
    vectors) is GenLoRA's (arXiv 2602.05709); the anchoring at zero, the groups' own weights, more than one latent and
    the initialisation are this library's reading of it.

    Initial values: centres of random sign, |c| spread over [0.5, 2] (where the functions have slope *and* curvature at
    zero); random weights, scaled for each group and latent so that the R slopes
    :math:`\partial M_{rj}/\partial z_{jq}` at zero have the root mean square 1 (exactly for K = 1, in expectation for
    more); latents uniform in ±1/√n, like the rows of LoRA's A. With ``zero_start`` the matrix is zero.

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
        self.zero_start = zero_start

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
        self.centers.uniform_(0.5, 2.0, generator=generator)
        self.centers.mul_(torch.empty_like(self.centers).bernoulli_(0.5, generator=generator).mul_(2).sub_(1))
        self.log_widths.fill_(math.log(self.width))
        bound = 1 / math.sqrt(self.num_entries)
        self.latent.uniform_(-bound, bound, generator=generator)
        self.weight.normal_(generator=generator)
        slopes = self.weight * slope_at_zero(self.centers, self.kernel) / self.width  # (G, R, Q, K)
        # Of a basis function's K slopes the squares are summed, not the slopes: their sum may happen to be nearly zero.
        self.weight.div_(slopes.square().sum(3, keepdim=True).mean(1, keepdim=True).sqrt())
        if self.zero_start == "zero_latent":
            self.latent.zero_()
        elif self.zero_start == "zero_weight":
            self.weight.zero_()

    @override
    def forward(self) -> Tensor:
        """The generated matrix ``M (rank, num_entries)``, in the parameters' dtype, also under autocast."""
        # No matrix product in it, and therefore nothing that autocast would turn into bfloat16.
        return generate(self.latent, self.weight, self.centers, self.log_widths, self.kernel)

    @override
    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # Every cast and move of a module (`.to`, `.half`, Lightning's precision plugins) goes through `_apply`.
        def keep_precision(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor)
            if result.dtype in (torch.bfloat16, torch.float16):
                return tensor.to(device=result.device)
            return result

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]

    @override
    def extra_repr(self) -> str:
        return (
            f"num_entries={self.num_entries}, rank={self.rank}, num_latents={self.num_latents}, "
            f"num_groups={self.num_groups}, num_centers={self.num_centers}, kernel={self.kernel!r}"
        )
