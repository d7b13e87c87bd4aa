"""Supernets in the styles of the field's code, for tests that must work on networks that `rnas` has not built.

| module | style |
| --- | --- |
| `darts` | a mixed operation per edge holds a list, weights come as an argument |
| `pcdarts` | the same on a part of the channels, with weights of the edges |
| `smooth` | candidates that differ from edge to edge, perturbed weights, drop path |
| `nasbench201` | no mixed operation: the cell mixes bare lists; all candidates, or one by a hard sample |
| `graph` | nodes and edges that hold operations; one tensor enters the first cell twice |
| `hooked` | weights are left on the module before the call, hooks look on |
| `lookalikes` | modules that resemble mixed operations and are none, or have candidates that are no primitives |
| `others` | networks without any |

Each but `lookalikes` has `build(channels, layers, classes, **options)`, which gives a network
(N, 3, H, W) -> logits (N, classes); the supernets list their architecture tensors in `arch_parameters()`.
"""

STYLES = ("darts", "pcdarts", "smooth", "nasbench201", "graph", "hooked")
"""The modules with supernets."""
