"""How exported files store weights. No torch: the command line reads it."""

from typing import Literal

WeightType = Literal["int8", "uint8"]
"""As int8, code and zero point less 128, for which runtimes have fast kernels; or as the uint8 codes themselves."""
