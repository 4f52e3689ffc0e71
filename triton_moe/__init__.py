"""Triton kernels for mixture-of-experts Transformers: sigma-MoE, SwitchHead and SwitchAll.

Importing this package imports no kernel and no Triton, so that ``TRITON_INTERPRET=1`` can still be set:

    from triton_moe import functional as F, nn
"""

__version__ = "0.1.0"
__all__ = ["functional", "nn", "testing"]


def __getattr__(name: str):
    if name in __all__:
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
