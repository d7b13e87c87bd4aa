"""Search spaces as data. A new space is one `Space` value in its own file, named in SPACES."""

from .darts import DARTS
from .dsara import DSARA
from .space import NUM_INPUTS, CellSpec, Space

SPACES = {space.name: space for space in (DARTS, DSARA)}

__all__ = ["DARTS", "DSARA", "NUM_INPUTS", "SPACES", "CellSpec", "Space", "get_space"]


def get_space(name: str) -> Space:
    """The space called `name`. Raises ValueError naming the known ones."""
    if name not in SPACES:
        raise ValueError(f"unknown search space {name!r}; known: {', '.join(SPACES)}")
    return SPACES[name]
