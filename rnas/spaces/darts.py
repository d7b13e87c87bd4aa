"""The DARTS space (Liu, Simonyan, Yang, ICLR 2019): normal and reduction cells, eight primitives."""

from .space import Space

DARTS = Space(
    name="darts",
    primitives=(
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    ),
    section_types=("normal", "normal", "normal"),
    section_widths=(1, 2, 4),
)
