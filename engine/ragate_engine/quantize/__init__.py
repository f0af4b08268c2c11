"""Our own quantizers: round to nearest, GPTQ and AWQ, from any checkpoint to a folder that others read too."""

from ragate_engine.quantize.calibrate import quantize

__all__ = ["quantize"]
