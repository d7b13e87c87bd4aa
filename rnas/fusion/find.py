"""Finds the mixed operations of a model and accelerates them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from .layers import Guess, Layers, kind_of
from .modules import (
    COUNTS,
    NODE,
    PLAN,
    POOL,
    Beside,
    Candidate,
    Holder,
    InFront,
    Pool,
    accelerate_module,
    restore_module,
)
from .plan import Plan, original_class
from .reads import Reads
from .recognise import recognise
from .report import Left, Replaced, Report
from .tree import FORWARDS, Tree

_LISTS = (nn.ModuleList, nn.ModuleDict)
_IN_FRONT = ("relu_conv_norm", "factorized_reduce")

Recognised = tuple[Guess, Layers, Reads]


def accelerate(model: nn.Module, *, strict: bool = False) -> Report:
    """Lets the mixed operations of any supernet run on the fused kernels. The model is changed in place.

    Args:
        model: any nn.Module. What is looked for are modules that hold several candidate operations, at least one of
            which is a primitive of `rnas.kernels.mixed_op`: by what they compute, whatever their classes and names.
            Modules of the same class that hold one, as pruning leaves them, count too.
        strict: raise where a module holds candidates and some of them were not recognised, and change nothing.

    Returns:
        A `Report`: what was replaced, and what was left as it is and why.

    The code around the candidates stays and runs as before. A recognised candidate hands it a tensor whose value is not
    computed yet; sums of such tensors, each times a number, are computed by one call of `rnas.kernels.mixed_op` or
    `mixed_cell`: for an edge, for a node with all its edges, or for a whole cell, as far as the code goes on adding.
    Partial channels with a shuffle and drop path are part of it. Whatever else the code does with a result (a norm, a
    hook), it gets the value, computed by the candidate's own forward. So weights may come as arguments or attributes,
    candidates may be dropped, sampled or switched off.

    Outputs, gradients, BN averages and second derivatives are those of before, up to rounding. Parameters, buffers,
    state_dict, optimizers, train() and eval(), hooks, deepcopy, pickle, checkpoints and DataParallel work as before;
    copies are accelerated too. Under torch.compile, vmap, forward mode and autocast, for other dtypes than the kernels
    take, and where a candidate has hooks or was changed since, the modules' own code runs.

    What raises, where plain PyTorch did not: a state, a weight of the sum or a candidate's weight that is written to
    between the call and the use of the result, or settings or averages of its norms that are replaced there; the
    gradient to a single result that is asked for after that was fused;
    an autograd.Function, a function compiled by torch.compile or torch.jit, or a transform of torch.func applied to a
    result inside the forward. What differs: `type(module)` is a subclass of the same name, and the class of a result
    that waits is a subclass of Tensor; the candidate none gives zeros where images are not finite; under a checkpoint
    that is not reentrant, averages move once and not twice. What cannot be seen: writes through `.data` in between.

    Equivalent to: nothing at all, but for the time and the memory.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: with `strict`, as said above.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if strict:
        left = _plan(model)[-1].left
        if left:
            raise ValueError(
                f"strict: these modules hold candidate operations that the kernels do not take:\n{Report(left=left)}"
            )
    restore(model)
    found, holders, nodes, report = _plan(model)
    for mixin, modules in found.items():
        for module, (guess, layers, reads) in modules.items():
            accelerate_module(module, mixin, PLAN, Plan(module, guess, layers, reads))
    for module in holders:
        accelerate_module(module, Holder, COUNTS, report.counts)
        for pool in _pools_beside(module):
            accelerate_module(pool, Pool, POOL, True)
    for module in nodes:
        module.__dict__[NODE] = True
    return report


def restore(model: nn.Module) -> int:
    """Undoes `accelerate`: every module is again of its class and holds what it held. Returns how many were changed.

    Raises TypeError where model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    return sum([restore_module(module) for module in model.modules()])


# ---- what there is ---------------------------------------------------------------------------------------------------


def _plan(model: nn.Module):
    """As `_looked_at`; candidates that draw random numbers are run for that, and leave them where they were."""
    with torch.random.fork_rng(devices=[]), _one_thread():
        return _looked_at(model)


@contextmanager
def _one_thread() -> Iterator[None]:
    """What candidates are tried on is so small that more threads would only wait, on a busy machine for seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _looked_at(model: nn.Module):
    """(modules to accelerate with what they are, by how; holders; nodes; report)."""
    memory: dict = {}
    report = Report()
    candidates: dict[nn.Module, Recognised] = {}
    besides: dict[nn.Module, Recognised] = {}
    holders: dict[nn.Module, str] = {}
    tree = Tree(model)
    names = {module: name for name, module in model.named_modules()}
    everything = list(_groups(model))
    # What stands in a cell beside its mixed operations are no candidates.
    cells = set(tree.above([owner for owner, groups in everything if any(map(_in_a_list, groups))]))
    inner: set[nn.Module] = set()  # what recognised candidates hold
    for owner, groups in chain(everything, _alone(model, everything, holders)):
        if owner in inner or owner in cells:
            continue
        found: dict[str, str] = {}
        reasons: list[str] = []
        for group in groups:
            recognised = {name: recognise(module, memory) for name, module in group.items()}
            known = {name: each for name, each in recognised.items() if _is_candidate(each)}
            if len(group) > 1 and not _is_worth_it(group, known):
                reasons += _resembling(group, recognised)
                continue
            for name, each in known.items():
                candidates[group[name]] = each
                found[name] = each[0].primitive
            reasons += [
                f"{name}: {_why(each)}"
                for name, each in recognised.items()
                if name not in known and (_in_a_list(group) or list(group[name].children()))
            ]
            inner.update(module for each in known for module in group[each].modules())
        if found:
            for name, module in _beside(owner):
                known = recognise(module, memory)
                if not isinstance(known, str) and known[0].primitive == "skip_connect":
                    besides[module] = known
                    found[name] = known[0].primitive
            holders[owner] = names[owner]
            report.replaced.append(Replaced(names[owner], original_class(owner).__name__, found))
        if reasons:
            report.left.append(Left(names[owner], original_class(owner).__name__, "; ".join(reasons)))
    nodes = tree.nodes([*holders, *tree.around(holders)], candidates)
    around = [each for each in tree.around([*holders, *nodes]) if each not in holders]
    fronts = _in_front(around, {*candidates, *besides}, memory)
    report.in_front = {names[module]: each[0].primitive for module, each in fronts.items()}
    return {Candidate: candidates, Beside: besides, InFront: fronts}, [*holders, *around], nodes, report


def _in_a_list(group: dict[str, nn.Module]) -> bool:
    """Whether the group is a list or dict of modules: their names have a dot."""
    return any("." in name for name in group)


def _is_candidate(found: Recognised | str) -> bool:
    return not isinstance(found, str) and found[0].primitive not in _IN_FRONT


def _is_worth_it(group: dict[str, nn.Module], known: dict[str, Recognised]) -> bool:
    """Whether there is something to compute among the candidates of a group.

    What is no list has to hold two that consist of layers: the layers of a block would look like candidates.
    """
    computing = {name for name, each in known.items() if each[0].primitive not in ("none", "skip_connect")}
    computing |= {name for name, each in known.items() if each[0].primitive == "skip_connect" and each[0].stride == 2}
    if _in_a_list(group):
        return bool(computing)
    return sum(bool(list(group[name].children())) for name in computing) > 1


def _why(found: Recognised | str) -> str:
    return found if isinstance(found, str) else "the number of channels changes"


def _groups(model: nn.Module) -> Iterator[tuple[nn.Module, list[dict[str, nn.Module]]]]:
    """Modules with a forward, and the groups of at least two modules that they hold side by side, by their names."""
    for owner in model.modules():
        if isinstance(owner, (*_LISTS, nn.Sequential)) and original_class(owner).forward in FORWARDS:
            continue
        groups = [group for group in _held(owner, "") if len(group) > 1]
        if groups:
            yield owner, groups


def _alone(model: nn.Module, groups, holders) -> Iterator[tuple[nn.Module, list[dict[str, nn.Module]]]]:
    """Modules with a single candidate, of a class that holds several elsewhere; to be asked when those are known."""
    known, several = {original_class(owner) for owner in holders}, {owner for owner, _ in groups}
    for owner in model.modules():
        if original_class(owner) in known and owner not in several:
            yield owner, [group for group in _held(owner, "") if group]


def _held(module: nn.Module, prefix: str) -> Iterator[dict[str, nn.Module]]:
    """What the module holds directly, and in lists and dicts of modules, those within them too."""
    yield {prefix + name: child for name, child in module.named_children() if not _is_list(child)}
    for name, child in module.named_children():
        if _is_list(child):
            yield from _held(child, f"{prefix}{name}.")


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, _LISTS) and original_class(module).forward in FORWARDS


def _resembling(group: dict[str, nn.Module], recognised: dict[str, Recognised | str]) -> list[str]:
    """Reasons for a group none of whose members is fused, where it looks like candidates: convolutions with norms."""
    unknown = {name: each for name, each in recognised.items() if isinstance(each, str)}
    if not all(_looks_like_one(group[name]) for name in unknown):
        return []
    if len(unknown) == len(group) and any(map(_has_groups, group.values())):
        return []  # the blocks of a network
    known = {each[0].primitive for each in recognised.values() if not isinstance(each, str)}
    if known and not _in_a_list(group) and known.isdisjoint({"none", "max_pool_3x3", "avg_pool_3x3"}):
        return []  # the layers of a residual block
    if known and sum(bool(list(group[name].children())) for name in unknown) < 2:
        return []
    return [f"{name}: {each}" for name, each in unknown.items()]


def _looks_like_one(module: nn.Module) -> bool:
    kinds = [type(each).__name__ for each in module.modules()]
    small = len(kinds) <= 16
    return small and any("Conv" in kind or "Pool" in kind for kind in kinds)


def _pools_beside(holder: nn.Module) -> list[nn.Module]:
    """The pools that stand beside candidates and are none."""
    kinds = (nn.MaxPool2d, nn.AvgPool2d)
    found = [each for each in holder.children() if kind_of(each) in kinds and original_class(each) is type(each)]
    return [each for each in found if not getattr(each, "return_indices", False)]


def _has_groups(module: nn.Module) -> bool:
    """Whether it is itself a holder of candidates rather than one."""
    return any(len(group) > 1 for each in module.modules() if not _is_list(each) for group in _held(each, ""))


def _beside(owner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module that stands beside the lists of candidates, where there is one: a skip connection of its own, say."""
    own = [(name, each) for name, each in owner.named_children() if not _is_list(each)]
    if len(own) == 1 and len(list(owner.children())) > 1:
        yield from own


def _in_front(cells: list[nn.Module], taken: set[nn.Module], memory: dict) -> dict[nn.Module, Recognised]:
    """The layers that stand in cells beside the mixed operations and that the kernels know."""
    found: dict[nn.Module, Recognised] = {}
    for cell in cells:
        for group in _held(cell, ""):
            for module in group.values():
                known = recognise(module, memory) if module not in taken else ""
                if not isinstance(known, str) and known[0].primitive in (*_IN_FRONT, "conv_1x1", "skip_connect"):
                    guess, layers, _ = known
                    one_by_one = guess.primitive != "conv_1x1" or guess.stride == 1
                    if layers.convolutions and one_by_one and not layers.biased:
                        found[module] = known
    return found
