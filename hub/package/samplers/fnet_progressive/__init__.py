from .sampler import FnetProgressiveSampler

__all__ = ["FnetProgressiveSampler"]
