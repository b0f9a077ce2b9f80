"""Let vLLM serve adapter folders: a plug-in that expands an adapter when a request first names it.

vLLM calls :func:`register` in each of its processes (entry point group ``vllm.general_plugins``). It does nothing
unless ``GENLORA_VLLM_ADAPTERS`` is set; vLLM asks resolvers only with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``.

============================  =============================================================================
``GENLORA_VLLM_ADAPTERS``     folder that holds the adapter folders; a request's ``model`` names one of them
``GENLORA_VLLM_CACHE``        where expanded adapters go (``~/.cache/genlora-lightning/vllm``)
``GENLORA_VLLM_CACHE_GIB``    what they may take together, of those no server uses (20)
``GENLORA_VLLM_BASE_CHECK``   ``off``: do not compare the adapter's base with the served model (``error``)
============================  =============================================================================
"""

from __future__ import annotations

import asyncio
import logging
import os
import zlib
from pathlib import Path
from typing import Any

from genlora_lightning.interop.serving import AdapterServer

_NAME = "GenLoRA"


def register() -> None:
    """Register the resolver with vLLM, if a folder of adapters is named.

    Raises:
        ValueError: A variable says something that cannot be used; vLLM does not start then.
    """
    adapters = os.environ.get("GENLORA_VLLM_ADAPTERS")
    if not adapters:
        return
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    server = _server(adapters)

    class GenLoRAResolver(LoRAResolver):  # type: ignore[misc]  # vLLM need not be there when types are checked
        """Find an adapter folder by name, and give vLLM the LoRA adapter that it expands to."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """A request for the adapter; ``None``, which vLLM answers with "does not exist", if it cannot be had."""
            try:
                # Generating and writing take a while, and the server has others to answer.
                folder = await asyncio.to_thread(server.expand, lora_name, base_model_name)
            except (ValueError, OSError) as error:
                logging.getLogger(__name__).warning(" ".join(f"LoRA {lora_name!r} is not served: {error}".split()))
                return None
            if folder is None:
                return None
            # vLLM gives it a number of its own; any above 0 will do.
            return LoRARequest(
                lora_name=lora_name, lora_int_id=1 + zlib.crc32(lora_name.encode()), lora_path=str(folder)
            )

    LoRAResolverRegistry.register_resolver(_NAME, GenLoRAResolver())


def _server(adapters: str) -> AdapterServer:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = os.environ.get("GENLORA_VLLM_CACHE") or Path(home) / "genlora-lightning" / "vllm"
    gib = os.environ.get("GENLORA_VLLM_CACHE_GIB") or "20"
    try:
        limit = int(float(gib) * 2**30)
        return AdapterServer(
            adapters, cache, limit=limit, base_check=os.environ.get("GENLORA_VLLM_BASE_CHECK") or "error"
        )
    except (ValueError, OverflowError) as error:
        raise ValueError(f"The variables GENLORA_VLLM_… for vLLM cannot be used: {error}") from error
