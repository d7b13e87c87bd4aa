"""Certified robustness: lower bounds of margins that hold for every image of a ball."""

from .layers import RULES
from .margin import certified_margin
from .search_epsilon import certified_epsilon

__all__ = ["RULES", "certified_epsilon", "certified_margin"]
