"""The DSARA space (arXiv 2212.14049; ARNAS, CVPR 2024): accurate cells first, robust cells last, widths C : 2C : 2C."""

from .darts import DARTS
from .space import Space

DSARA = Space(
    name="dsara",
    primitives=tuple(primitive for primitive in DARTS.primitives if primitive != "none"),
    section_types=("accurate", "accurate", "robust"),
    section_widths=(1, 2, 2),
)
