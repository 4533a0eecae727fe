"""Why one result differs from another: per class, by image, in pictures, and whether it is more than luck."""
from replk_mm.bench.compare.run import compare, silent

__all__ = ['compare', 'silent']
