"""Call a module with another tensor in the place of one of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def call_with(
    module: nn.Module,
    name: str,
    tensor: Tensor,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a module, or its ``forward``, while ``module.<name>`` is another tensor.

    Unlike ``torch.func.functional_call`` it also works where FSDP1 has put a view beside the parameters.

    Args:
        module: The module. Its ``name`` must be a parameter, and not computed by a property.
        name: The parameter's.
        tensor: To have in its place, of any shape.
        function: The module itself, or its ``forward``, which leaves its hooks out.
        args: The function's.
        kwargs: The function's.
    """
    own = vars(module)  # what is in it hides a parameter of the same name
    before = own.get(name)
    own[name] = tensor
    try:
        return function(*args, **kwargs)
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before
