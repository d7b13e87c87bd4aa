"""An attack as one CUDA graph: what of it stays between calls, and what each call brings along."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from .ascent import Ascent
from .attack_inputs import Images
from .freezing import frozen, random_states_kept
from .graphs import Graphs, Outputs, fingerprint
from .supernet import FixedMixture


def from_a_graph(graphs: Graphs, ascent: Ascent, images: Images, statistics: str) -> Tensor:
    """`ascent.climb(images)` from the start on; that is drawn here, as a graph would repeat its random numbers."""
    inputs = {"x": images.x, "y": images.y}
    constants: dict[str, float] = {}
    for name in ("epsilon", "step_size"):
        value = getattr(images, name)
        (inputs if isinstance(value, Tensor) else constants)[name] = value
    model, weights, rebuild = _opened(ascent.model)

    def climb(x: Tensor, y: Tensor, x_adv: Tensor, **others: Tensor) -> Outputs:
        sizes = {name: constants.get(name, others.get(name)) for name in ("epsilon", "step_size")}
        attack = dataclasses.replace(ascent, model=rebuild(others))
        with frozen(attack.model, statistics):
            classes = attack.ascend(x_adv, Images(x, y, index=y, **sizes))  # nobody leaves the batch: no index is read
        return {"x_adv": x_adv, "classes": classes}

    # id: the function holds on to the model, so it stays this model's. fingerprint: where its weights lie.
    settings = dataclasses.replace(ascent, model=None, generator=None, highest_label=-1)
    key = (type(ascent.model), id(model), settings, statistics, *constants.items())
    with random_states_kept(None, images.x.device):
        inputs["x_adv"] = ascent.start(images)
        found = graphs.run(
            "the attack",
            climb,
            inputs | weights,
            key=key,
            watch=partial(fingerprint, model),
            check=lambda outputs: ascent.check_labels(outputs["classes"]),
        )
    return found["x_adv"]


def _opened(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor], Callable[[Mapping[str, Tensor]], nn.Module]]:
    """What of a model stays between calls, its tensors that do not, and a function from those to the model."""
    if type(model) is not FixedMixture:
        return model, {}, lambda tensors: model
    supernet, edges = model.supernet, model.edge_weights
    weights = {f"mixing_{name}": tensor for name, tensor in model.mixing.items()}
    weights |= {f"edges_{name}": tensor for name, tensor in (edges or {}).items()}
    names = tuple(model.mixing)

    def rebuild(tensors: Mapping[str, Tensor]) -> FixedMixture:
        of_edges = None if edges is None else {name: tensors[f"edges_{name}"] for name in names}
        return FixedMixture(supernet, {name: tensors[f"mixing_{name}"] for name in names}, of_edges)

    return supernet, weights, rebuild
