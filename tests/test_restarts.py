"""Restarts and radii that run as one batch: the examples are those of separate attacks, and nobody runs for nothing."""

from __future__ import annotations

import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from test_attacks import CLASSES, conv_net, images, losses, per_image_norm, predicted_images, seeded

from rnas import restarts
from rnas.attacks import frozen, pgd, pgd_sweep

AGREE = {"rtol": 0, "atol": 1e-9}  # float64: pixels of a larger batch differ by rounding alone
WEAK = {"step_size": 0.004, "steps": 8}  # some images fall, some stand
CASES = {
    "linf": {"epsilon": 0.1, "step_size": 0.03},
    "l2": {"epsilon": 0.6, "step_size": 0.2, "norm": "l2"},
    "targeted margin": {"epsilon": 0.1, "step_size": 0.03, "targeted": True, "loss": "margin"},
    "per image": {"epsilon": torch.linspace(0, 0.1, 12), "step_size": torch.linspace(0.01, 0.04, 12)},
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_norm = pytest.mark.parametrize("norm, radii", [("linf", [0.01, 0.03, 0.05, 0.1]), ("l2", [0.1, 0.2, 0.4, 0.7])])


def fresh_images(count=12):
    seed = torch.Generator().seed() % 2**31
    print("seed of the images:", seed)
    return images(count, seed=seed)


def counted(net):
    """The net as a function, and the list of the batch sizes that it is given."""
    sizes = []

    def model(x):
        sizes.append(len(x))
        return net(x)

    return model, sizes


def classes(net, x_adv):
    with torch.no_grad():
        return torch.stack([net(each).argmax(1) for each in x_adv])


# ---------------------------------------------------------------- restarts


def check_restarts(case, at_once=2):
    net = conv_net()
    x, y = fresh_images()
    settings = {**case, "steps": 4, "restarts": 5}
    one_by_one = pgd(net, x, y, **settings, generator=seeded(0))
    together = pgd(net, x, y, **settings, restarts_at_once=at_once, generator=seeded(0))
    torch.testing.assert_close(together, one_by_one, **AGREE)
    first = pgd(net, x, y, **{**settings, "restarts": 1}, generator=seeded(0))
    assert not torch.equal(first, one_by_one), "the test needs images for which another restart is the best"


@each_case
@pytest.mark.parametrize("at_once", [2, 5, 9])
def test_restarts_at_once_find_what_they_find_one_by_one(case, at_once):
    check_restarts(case, at_once)


def test_restarts_at_once_limits_the_batch():
    model, sizes = counted(conv_net())
    x, y = images()
    pgd(model, x, y, epsilon=0.1, step_size=0.03, steps=3, restarts=5, restarts_at_once=2)
    assert sizes == [24] * 4 + [24] * 4 + [12] * 4  # three steps, and the losses of what they found


def test_a_loss_that_is_nan_is_never_the_best():
    x, y = torch.full((1, 2), 0.5), torch.tensor([0])

    def loss(logits, y):
        return torch.where(torch.arange(len(y)) == 0, torch.nan, logits[:, 1])  # of the first copy

    settings = {"epsilon": 0.2, "step_size": 0.0, "steps": 1, "restarts": 3}
    together = pgd(lambda x: x, x, y, **settings, loss=loss, restarts_at_once=3, generator=seeded(0))
    starts = seeded(0)
    starts = torch.cat([pgd(lambda x: x, x, y, **{**settings, "restarts": 1}, generator=starts) for _ in range(3)])
    assert torch.equal(together[0], starts[1 + starts[1:, 1].argmax()])


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.025), ("l2", 0.2)])
@pytest.mark.parametrize("per_image", [False, True], ids=["one epsilon", "per image"])
def test_an_image_leaves_with_all_its_copies(norm, epsilon, per_image):
    net = conv_net()
    x, y = predicted_images(net)
    y[:4] = (y[:4] + 1) % CLASSES  # wrong before any attack
    if per_image:
        epsilon = torch.linspace(0.5 * epsilon, 1.5 * epsilon, len(x))
    settings = {"epsilon": epsilon, "step_size": 0.2 * epsilon, "steps": 6, "norm": norm, "restarts": 3}
    one_by_one = pgd(net, x, y, **settings, early_drop=True, generator=seeded(0))
    model, sizes = counted(net)
    together = pgd(model, x, y, **settings, early_drop=True, restarts_at_once=3, generator=seeded(0))
    right = net(together).argmax(1) == y
    assert torch.equal(right, net(one_by_one).argmax(1) == y)
    assert 0 < right.sum() < len(x) - 4, "the test needs images that fall and images that stand"
    torch.testing.assert_close(together[right], one_by_one[right], **AGREE)
    assert torch.equal(together[:4], x[:4])
    assert (per_image_norm(together - x, norm) <= epsilon + 1e-7).all()
    assert together.min() >= 0 and together.max() <= 1
    assert sizes[:2] == [len(x), 3 * 20] and sizes == [len(x)] + sorted(sizes[1:], reverse=True)
    assert all(size % 3 == 0 for size in sizes[1:]) and 3 * right.sum() <= sizes[-1] < 3 * 20


def test_nobody_fooled_is_seen_again_in_any_copy():
    net, seen = conv_net(), []
    x, y = predicted_images(net)

    def watched(batch):
        logits = net(batch)
        names = torch.cdist(batch.detach().flatten(1), x.flatten(1)).argmin(1)
        seen.append((names.tolist(), logits.argmax(1) != y[names]))
        return logits

    pgd(watched, x, y, epsilon=0.05, step_size=0.01, steps=5, restarts=4, restarts_at_once=4, early_drop=True)
    fooled = set()
    for names, now in seen:
        assert names and not fooled & set(names)
        fooled |= {name for name, is_fooled in zip(names, now.tolist()) if is_fooled}
    assert 0 < len(fooled) < len(x)


# ---------------------------------------------------------------- radii


def check_sweep(norm="linf", radii=(0.01, 0.03, 0.05, 0.1)):
    net = conv_net()
    x, y = fresh_images()
    settings = {"steps": 4, "norm": norm}
    swept = pgd_sweep(net, x, y, epsilons=radii, step_size=0.01, **settings, generator=seeded(0))
    generator = seeded(0)
    apart = [pgd(net, x, y, epsilon=each, step_size=0.01, **settings, generator=generator) for each in radii]
    torch.testing.assert_close(swept, torch.stack(apart), **AGREE)
    assert swept.shape == (len(radii), *x.shape)


@each_norm
def test_a_sweep_finds_what_separate_attacks_find(norm, radii):
    check_sweep(norm, radii)


@pytest.mark.parametrize("early_drop", [False, True], ids=["whole", "early-drop"])
def test_radii_and_steps_may_differ_between_images(early_drop):
    net = conv_net()
    x, y = predicted_images(net)
    radii = torch.rand(3, len(x), generator=seeded(1), dtype=torch.float64).mul(0.05).sort(dim=0).values
    settings = {"steps": 4, "random_start": False, "early_drop": early_drop}
    swept = pgd_sweep(net, x, y, epsilons=radii, step_size=radii / 3, **settings)
    apart = torch.stack([pgd(net, x, y, epsilon=each, step_size=each / 3, **settings) for each in radii])
    rows = classes(net, swept) == y
    assert 0 < rows.sum() < rows.numel(), "the test needs images that fall and images that stand"
    torch.testing.assert_close(swept[rows], apart[rows], **AGREE)
    if not early_drop:
        torch.testing.assert_close(swept, apart, **AGREE)
    assert all((per_image_norm(found - x, "linf") <= each + 1e-12).all() for found, each in zip(swept, radii))


@each_norm
@pytest.mark.parametrize("at_once", [1, 2])
def test_who_is_fooled_at_one_radius_is_fooled_at_every_larger_one(norm, radii, at_once):
    net = conv_net()
    x, y = predicted_images(net)
    y[:4] = (y[:4] + 1) % CLASSES
    radii = torch.tensor(radii) / 2
    settings = {"epsilons": radii, "step_size": radii / 4, "steps": 6, "norm": norm, "restarts": 2}
    model, sizes = counted(net)
    swept = pgd_sweep(model, x, y, **settings, early_drop=True, restarts_at_once=at_once, generator=seeded(0))
    plain = pgd_sweep(net, x, y, **settings, restarts_at_once=at_once, generator=seeded(0))
    right, right_plain = classes(net, swept) == y, classes(net, plain) == y
    assert (right.int().diff(dim=0) <= 0).all() and (right <= right_plain).all()
    assert right[-1].sum() < right[0].sum(), "the test needs images that fall at some radii and stand at others"
    torch.testing.assert_close(swept[right], plain[right], **AGREE)
    assert (swept[:, :4] == x[:4]).all()
    for found, radius in zip(swept, radii):
        assert per_image_norm(found - x, norm).max() <= radius + 1e-7
    assert swept.min() >= 0 and swept.max() <= 1
    assert sizes[:2] == [len(x), at_once * 4 * 20] and sizes[-1] < at_once * 4 * 20


def test_an_example_of_a_smaller_radius_serves_the_larger_ones():
    x, y = torch.full((1, 1), 0.2), torch.tensor([1])
    model, sizes = counted(lambda x: torch.cat([x, torch.full_like(x, 0.45)], dim=1))  # wrong above 0.45
    swept = pgd_sweep(
        model,
        x,
        y,
        epsilons=[0.1, 0.3, 0.5, 0.7],
        step_size=[0.1, 0.3, 0.01, 0.6],
        steps=4,
        random_start=False,
        early_drop=True,
    )
    torch.testing.assert_close(swept.flatten(), torch.tensor([0.3, 0.5, 0.5, 0.8]))
    assert sizes == [4, 4, 1, 1, 1]


def test_the_last_iterate_of_a_smaller_radius_serves_the_larger_ones():
    x, y = torch.full((1, 1), 0.2), torch.tensor([1])

    def model(x):
        return torch.cat([x, torch.full_like(x, 0.45)], dim=1)

    settings = {"steps": 1, "random_start": False, "early_drop": True}
    swept = pgd_sweep(model, x, y, epsilons=[0.3, 0.5], step_size=[0.3, 0.01], **settings)
    torch.testing.assert_close(swept.flatten(), torch.tensor([0.5, 0.5]))


def check_leaving():
    """_leaving beside plain loops over images, radii and copies."""
    numbers = seeded(torch.Generator().seed() % 2**31)
    for radii, count, copies in [(1, 7, 1), (1, 7, 3), (4, 1, 1), (4, 5, 3), (3, 17, 2)]:
        rows = radii * count
        index = (torch.rand(rows, generator=numbers) < 0.7).nonzero()[:, 0]
        fooled = torch.rand(copies, len(index), generator=numbers) < 0.25
        leaves, source = restarts._leaving(fooled, index, rows, radii)
        place = {row: i for i, row in enumerate(index.tolist())}
        for row, i in place.items():
            expected = None
            for other in range(row % count, row + 1, count):  # radius after radius up to the row's own
                for copy in reversed(range(copies)):
                    if other in place and fooled[copy, place[other]]:
                        expected = copy * len(index) + place[other]
            assert leaves[i] == (expected is not None)
            assert expected is None or source[i] == expected


def test_who_leaves_and_with_which_example():
    for _ in range(5):
        check_leaving()


# ---------------------------------------------------------------- errors in the code, and in the call

LEAVING = restarts._leaving
PLANTED = {
    "example of the next copy": (
        restarts,
        "_leaving",
        lambda fooled, *others: (lambda leaves, source: (leaves, (source + fooled.shape[1]) % fooled.numel()))(
            *LEAVING(fooled, *others)
        ),
        check_leaving,
    ),
    "larger radii stay": (restarts, "_leaving", lambda *others: LEAVING(*others[:3], 1), check_leaving),
    "noise of all radii at once": (
        restarts,
        "_start",
        lambda attack, whole, radii: attack.start(whole).flip(0),
        check_sweep,
    ),
    "copies beside one another": (
        restarts.Images,
        "repeat",
        lambda self, copies: self.take(torch.arange(self.count).repeat_interleave(copies)),
        lambda: check_restarts(CASES["per image"]),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_noticed(name, monkeypatch):
    owner, attribute, wrong, check = PLANTED[name]
    check()
    monkeypatch.setattr(owner, attribute, wrong)
    with pytest.raises(AssertionError):
        for _ in range(5):
            check()


BAD = [
    (
        {"epsilons": 0.1},
        TypeError,
        r"epsilons must be E numbers or a tensor .* got float: for one radius type \[8 / 255",
    ),
    ({"epsilons": torch.tensor(0.1)}, ValueError, r"epsilons must be .* got shape \(\)"),
    ({"epsilons": []}, ValueError, "epsilons must be .* at least one, got 0"),
    ({"epsilons": [0.1, 0.05]}, ValueError, r"must ascend.* type torch.as_tensor\(epsilons\).sort"),
    ({"epsilons": torch.tensor([[0.1] * 12, [0.2] * 12, [0.2] * 11 + [0.1]])}, ValueError, "ascend, for every image"),
    ({"epsilons": [0.1, -0.05]}, ValueError, r"epsilons\[1\] must be finite and not negative"),
    ({"epsilons": [0.1, 8]}, ValueError, r"epsilons\[1\] must not exceed the width of the box"),
    (
        {"epsilons": torch.full((2, 5), 0.1)},
        ValueError,
        r"epsilons\[0\] must be .* shape \(N,\) = \(12,\).* got shape \(5,\)",
    ),
    ({"step_size": [0.1, 0.1, 0.1]}, ValueError, r"step_size must be .* E = 2, got 3"),
    ({"step_size": "0.1"}, TypeError, "step_size must be .* got str"),
    ({"steps": 0}, ValueError, "steps must be an integer"),
    ({"restarts_at_once": 1.5}, ValueError, "restarts_at_once must be an integer"),
]


@pytest.mark.parametrize(
    "options, kind, message", BAD, ids=[" ".join(options) + f" {i}" for i, (options, *_) in enumerate(BAD)]
)
def test_bad_options_of_a_sweep_are_refused(options, kind, message):
    x, y = images()
    with pytest.raises(kind, match=message):
        pgd_sweep(conv_net(), x, y, **{"epsilons": [0.05, 0.1], "step_size": 0.01, "steps": 2, **options})


def test_a_sweep_of_no_images():
    assert pgd_sweep(conv_net(), *images(0), epsilons=[0, 0.1, 0.2], step_size=0.1, steps=2).shape == (3, 0, 3, 8, 8)


# ---------------------------------------------------------------- what the docstrings call equivalent


def equivalent(function) -> str:
    (block,) = re.findall(r"Equivalent to.*?::\n\n(.*?)\n\n", function.__doc__, flags=re.DOTALL)
    return textwrap.dedent(block)


def test_pgd_is_what_its_docstring_says():
    net = conv_net()
    x, y = fresh_images()
    settings = {"epsilon": 0.1, "step_size": 0.03, "steps": 4, "lower": 0.0, "upper": 1.0}
    names = {"torch": torch, "F": F, "model": net, "x": x, "y": y, "generator": seeded(0), **settings}
    torch.set_default_dtype(torch.float64)
    try:
        exec(equivalent(pgd), names)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(pgd(net, x, y, **settings, generator=seeded(0)), names["x_adv"], **AGREE)
    assert (losses(net, names["x_adv"], y) > losses(net, x, y)).all()


def test_a_sweep_is_what_its_docstring_says():
    net = conv_net()
    x, y = fresh_images()
    radii = torch.linspace(0, 0.1, 4, dtype=torch.float64)
    names = {"torch": torch, "pgd": pgd, "model": net, "x": x, "y": y, "epsilons": radii, "step_size": radii / 4}
    apart = eval(equivalent(pgd_sweep), {**names, "steps": 4, "generator": seeded(0)})
    swept = pgd_sweep(net, x, y, epsilons=radii, step_size=radii / 4, steps=4, generator=seeded(0))
    torch.testing.assert_close(swept, apart, **AGREE)
    (curve,) = re.findall(r"The curve::\n\n +right = (.*)\n", pgd_sweep.__doc__)
    right = eval(curve.partition("#")[0], {"torch": torch, "model": net, "y": y, "x_adv": swept})
    assert right.shape == (4,) and right[0] == (net(x).argmax(1) == y).float().mean()


def test_frozen_is_what_its_docstring_says():
    states = []

    def state(net):
        states.append([(module.training, *(p.requires_grad for p in module.parameters())) for module in net.modules()])

    for by_hand in (True, False):
        net = conv_net()
        net[1].train()
        net[0].weight.requires_grad_(False)
        if by_hand:
            exec(equivalent(frozen).replace("...", "state(model)"), {"model": net, "state": state})
        else:
            with frozen(net):
                state(net)
        state(net)
    assert states[:2] == states[2:] and states[0] != states[1]
