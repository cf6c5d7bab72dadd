"""LoRA and IP-Adapters refused, in one line, by networks that cannot take them.

Those that are quantized take no LoRA. A pipeline whose network is accelerated, and so kept as it was, takes no
IP-Adapter and no other scale of one (a LoRA the network itself refuses: `octavo.runtimes.edits`). A quantized network
that is not accelerated takes an IP-Adapter, whose layers run in float beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from octavo.checkpoint.wrapping import wrap
from octavo.errors import OctavoError

EXECUTOR = "octavo_executor"
"""The attribute in which an accelerated network keeps what executes it (`octavo.runtimes`)."""


def refuse_lora(module: Any) -> None:
    """For `diffusers.loaders.peft`."""

    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        def add(self: Any, *args: Any, **kwargs: Any) -> Any:
            from octavo.checkpoint.quantizer import quantizer_of

            if quantizer_of(self) is not None:
                raise OctavoError(
                    f"LoRA: this {type(self).__name__} is quantized, and takes none; load it into the full-precision "
                    "model, call fuse_lora(), then quantize"
                )
            return original(self, *args, **kwargs)

        return add

    wrap(module.PeftAdapterMixin, "load_lora_adapter", refusing)
    wrap(module.PeftAdapterMixin, "add_adapter", refusing)


def refuse_ip_adapter(module: Any) -> None:
    """For `diffusers.loaders.ip_adapter`."""

    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        def edit(self: Any, *args: Any, **kwargs: Any) -> Any:
            for name, part in self.components.items():
                if EXECUTOR in getattr(part, "__dict__", {}):
                    raise OctavoError(
                        f"IP-Adapter: {name} is accelerated as it was; load it, or change its scale, in the original "
                        "pipeline, then accelerate that"
                    )
            return original(self, *args, **kwargs)

        return edit

    for kind in (module.IPAdapterMixin, module.FluxIPAdapterMixin, module.SD3IPAdapterMixin):
        for name in ("load_ip_adapter", "set_ip_adapter_scale", "unload_ip_adapter"):
            wrap(kind, name, refusing)
