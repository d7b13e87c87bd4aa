"""FGSM and PGD: strength, agreement with an independent implementation, and an attacked model left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rnas.attacks import fgsm, frozen, perturb, pgd, pgd_sweep
from rnas.config import AttackConfig

CLASSES = 5
SETTINGS = {"epsilon": 0.1, "step_size": 0.03, "steps": 5}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]
ATTACKS = {
    "fgsm": lambda model, x, y: fgsm(model, x, y, epsilon=0.1),
    "fgsm-l2": lambda model, x, y: fgsm(model, x, y, epsilon=0.5, norm="l2"),
    "pgd": lambda model, x, y: pgd(model, x, y, **SETTINGS),
    "pgd-l2": lambda model, x, y: pgd(model, x, y, epsilon=0.5, step_size=0.2, steps=4, norm="l2"),
    "batch": lambda model, x, y: pgd(model, x, y, **SETTINGS, statistics="batch"),
    "restarts": lambda model, x, y: pgd(model, x, y, **SETTINGS, restarts=2),
    "restarts-at-once": lambda model, x, y: pgd(model, x, y, **SETTINGS, restarts=3, restarts_at_once=2),
    "sweep": lambda model, x, y: pgd_sweep(model, x, y, epsilons=[0.05, 0.1], step_size=0.03, steps=5)[-1],
    "early-drop": lambda model, x, y: pgd(model, x, y, **SETTINGS, restarts=2, early_drop=True),
    "targeted": lambda model, x, y: pgd(model, x, y, **SETTINGS, targeted=True, loss="margin"),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
on_each_device = pytest.mark.parametrize("device", DEVICES)


def instance_norms_stay() -> bool:
    """Whether PyTorch leaves their averages alone in eval mode; that of 2.10 moves them by a rounding."""
    norm = nn.InstanceNorm2d(64, track_running_stats=True).eval()
    before = norm.running_var.copy_(torch.linspace(0.9, 1.1, 64)).clone()
    norm(torch.ones(24, 64, 2, 2))
    return torch.equal(norm.running_var, before)


class Net(nn.Module):
    """Every kind of normalisation, one layer used twice, dropout, a frozen weight, and mixed training flags."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.BatchNorm2d(8)
        self.alias = self.shared
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norms = nn.Sequential(
            nn.BatchNorm2d(8, momentum=None),
            nn.SyncBatchNorm(8),
            nn.InstanceNorm2d(8, track_running_stats=instance_norms_stay()),
            nn.BatchNorm2d(8, track_running_stats=False),
            nn.GroupNorm(2, 8),
        )
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8 * 16, CLASSES)

    def forward(self, x):
        x = self.shared(self.conv(x)).relu()
        x = self.norms(self.second(self.alias(x))).relu()
        return self.head(self.dropout(x.flatten(1)))


def mixed_net(device="cpu"):
    torch.manual_seed(0)
    net = Net().to(device)
    if device == "cpu":  # SyncBatchNorm runs as plain batch normalisation there
        net(torch.rand(16, 3, 8, 8, device=device))
    net(torch.rand(16, 3, 8, 8, device=device)).square().sum().backward()
    net.second.bias.grad = None
    net.conv.weight.requires_grad_(False)
    net.norms.eval()
    net.norms[1].train()
    net.shared.eval()
    return net


def conv_net(dtype=torch.float64):
    """A smooth enough net in float64, where gradient signs of two implementations agree; with moved statistics."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, stride=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 9, CLASSES),
    ).to(dtype)
    for _ in range(10):
        net(torch.rand(32, 3, 8, 8, dtype=dtype))
    return net.eval()


def images(count=12, dtype=torch.float64, device="cpu", seed=2):
    numbers = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 8, 8, generator=numbers, dtype=dtype)
    return x.to(device), torch.randint(CLASSES, (count,), generator=numbers).to(device)


def predicted_images(net, count=24):
    """Images with the labels that the net gives them, so that an attack has something to change."""
    x, _ = images(count)
    return x, net(x).argmax(1)


def losses(net, x, y):
    with torch.no_grad():
        return F.cross_entropy(net(x), y, reduction="none")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def per_image_norm(delta, norm):
    return torch.linalg.vector_norm(delta.flatten(1), float("inf") if norm == "linf" else 2, dim=1)


def snapshot(net):
    tensors = {
        name: (id(value), value.data_ptr(), value.detach().clone())
        for name, value in [*net.named_parameters(), *net.named_buffers()]
    }
    gradients = {name: None if p.grad is None else (id(p.grad), p.grad.clone()) for name, p in net.named_parameters()}
    flags = {name: (m.training, getattr(m, "track_running_stats", None)) for name, m in net.named_modules()}
    wanted = {name: p.requires_grad for name, p in net.named_parameters()}
    random = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    return tensors, gradients, flags, wanted, random, list(net.state_dict()), torch.is_grad_enabled()


def assert_same(before, after):
    assert type(before) is type(after)
    if isinstance(before, dict):
        assert list(before) == list(after)
        before, after = list(before.values()), list(after.values())
    if isinstance(before, (tuple, list)):
        assert len(before) == len(after)
        for one, other in zip(before, after):
            assert_same(one, other)
    elif isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    else:
        assert before == after


# ---------------------------------------------------------------- the caller's state


@each_attack
@on_each_device
def test_attack_leaves_the_callers_state_alone(attack, device):
    net = mixed_net(device)
    x, y = images(dtype=torch.float32, device=device)
    x_before, y_before, before = x.clone(), y.clone(), snapshot(net)
    x_adv = attack(net, x, y)
    assert_same(before, snapshot(net))
    assert torch.equal(x, x_before) and torch.equal(y, y_before)
    assert not torch.equal(x_adv, x)
    assert not x_adv.requires_grad and x_adv.grad_fn is None


@each_attack
@pytest.mark.parametrize("failing_call", [1, 2])
def test_state_comes_back_after_an_exception_in_the_model(attack, failing_call):
    net, calls = mixed_net(), []

    def fail(*_):
        calls.append(1)
        torch.rand(3)
        if len(calls) == failing_call:
            raise KeyboardInterrupt

    net.dropout.register_forward_hook(fail)
    x, y = images(dtype=torch.float32)
    before = snapshot(net)
    try:
        attack(net, x, y)
    except KeyboardInterrupt:
        pass
    assert calls
    assert_same(before, snapshot(net))


def test_random_numbers_drawn_by_the_model_do_not_move_the_callers():
    class Noisy(nn.Module):
        def forward(self, x):
            return (x + torch.rand_like(x)).flatten(1)[:, :CLASSES]

    x, y = images()
    before = torch.get_rng_state()
    pgd(Noisy(), x, y, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_need_no_gradient_and_nothing_is_saved_for_them_during_the_attack():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.Linear(192, CLASSES))
    x, y = images(dtype=torch.float32)
    activations, saved = set(), []
    net[1].register_forward_hook(lambda module, args, out: activations.add(out.data_ptr()))

    def note(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        fgsm(net, x, y, epsilon=0.1)
    assert saved and activations and not activations & set(saved)


@each_attack
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients_get_the_same_images(attack, context):
    net = conv_net()
    x, y = images()
    expected = attack(net, x, y)
    with context():
        x_made_here, y_made_here = images()  # in inference mode: tensors that autograd refuses
        x_adv = attack(net, x_made_here, y_made_here)
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
    assert torch.equal(x_adv, expected)
    assert not x_adv.is_inference()


# ---------------------------------------------------------------- agreement and strength


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("name", ["fgsm", "linf", "l2"])
def test_agrees_with_torchattacks(name, targeted, monkeypatch):
    torchattacks = pytest.importorskip(
        "torchattacks", exc_type=ImportError, reason="needs torchattacks (installed without dependencies) and scipy"
    )
    net = conv_net()
    x, y = images()
    if name == "fgsm":
        theirs = torchattacks.FGSM(net, eps=0.1)
    elif name == "linf":
        theirs = torchattacks.PGD(net, eps=0.1, alpha=0.03, steps=6)
    else:
        theirs = torchattacks.PGDL2(net, eps=0.8, alpha=0.2, steps=6, eps_for_division=0)
    if targeted:
        theirs.set_mode_targeted_by_label(quiet=True)
    torch.manual_seed(5)
    expected = theirs(x, y)

    def same_start(x, *, epsilon, norm, **_):
        if norm == "linf":
            return (x + torch.empty_like(x).uniform_(-epsilon, epsilon)).clamp(0, 1)
        delta = torch.empty_like(x).normal_()
        length = delta.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        return (x + delta * torch.zeros_like(length).uniform_(0, 1) / length * epsilon).clamp(0, 1)

    monkeypatch.setattr("rnas.kernels.random_start", same_start)
    torch.manual_seed(5)
    if name == "fgsm":
        x_adv = fgsm(net, x, y, epsilon=0.1, targeted=targeted)
    elif name == "linf":
        x_adv = pgd(net, x, y, epsilon=0.1, step_size=0.03, steps=6, targeted=targeted)
    else:
        x_adv = pgd(net, x, y, epsilon=0.8, step_size=0.2, steps=6, norm="l2", targeted=targeted)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-9)


class Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return F.linear(x.flatten(1), self.weight)


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_finds_the_optimum_of_a_linear_model(norm, targeted, loss):
    # small weights: the gradient of a saturated cross-entropy is exactly zero
    weight = 0.1 * torch.randn(2, 192, generator=seeded(3), dtype=torch.float64)
    x, y = images()
    x = 0.3 + 0.4 * x  # the ball must lie inside the box for the L2 optimum
    y = y % 2
    uphill = (weight[1] - weight[0]) * torch.where(y == 0, 1, -1).unsqueeze(1) * (-1 if targeted else 1)
    step = uphill.sign() if norm == "linf" else uphill / uphill.norm(dim=1, keepdim=True)
    x_adv = pgd(Linear(weight), x, y, epsilon=0.25, step_size=0.05, steps=150, norm=norm, targeted=targeted, loss=loss)
    torch.testing.assert_close(x_adv, x + 0.25 * step.reshape(x.shape), rtol=0, atol=1e-3 if norm == "l2" else 1e-12)


def test_finds_the_linf_optimum_at_the_faces_of_the_box():
    weight = torch.randn(2, 192, generator=seeded(3), dtype=torch.float64)
    x, _ = images()
    y = torch.zeros(len(x), dtype=torch.long)
    x_adv = pgd(Linear(weight), x, y, epsilon=0.4, step_size=0.1, steps=20)
    optimum = (x + 0.4 * (weight[1] - weight[0]).sign().reshape(x.shape[1:])).clamp(0, 1)
    torch.testing.assert_close(x_adv, optimum, rtol=0, atol=1e-12)


def test_fgsm_is_one_full_step_along_the_gradient():
    net = conv_net()
    x, y = images()
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(net(leaf), y, reduction="sum"), leaf)
    expected = (x + 0.1 * grad.sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(net, x, y, epsilon=0.1), expected, rtol=0, atol=1e-12)
    length = torch.linalg.vector_norm(grad.flatten(1), dim=1).reshape(-1, 1, 1, 1)
    expected = (x + 0.5 * grad / length).clamp(0, 1)
    torch.testing.assert_close(fgsm(net, x, y, epsilon=0.5, norm="l2"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.1), ("l2", 0.7)])
@pytest.mark.parametrize("early_drop", [False, True], ids=["whole", "early-drop"])
def test_stays_inside_ball_and_box_and_uses_the_ball(norm, epsilon, early_drop):
    net = conv_net()
    x, y = predicted_images(net)
    x_adv = pgd(
        net, x, y, epsilon=epsilon, step_size=epsilon / 3, steps=6, norm=norm, restarts=2, early_drop=early_drop
    )
    reached = per_image_norm(x_adv - x, norm)
    assert reached.max() <= epsilon + 1e-12
    assert reached.max() > 0.9 * epsilon
    assert x_adv.min() >= 0 and x_adv.max() <= 1


def test_another_box_is_kept():
    net = conv_net()
    x, y = images()
    x_adv = pgd(net, 4 * x - 2, y, epsilon=1.0, step_size=0.4, steps=4, lower=-2.0, upper=2.0)
    assert -2 <= x_adv.min() < -1.9 and 1.9 < x_adv.max() <= 2


def test_ascends_the_loss_and_targeted_descends_it():
    net = conv_net()
    x, y = images()
    before = losses(net, x, y)
    assert (losses(net, pgd(net, x, y, **SETTINGS), y) > before).all()
    assert (losses(net, pgd(net, x, y, **SETTINGS, targeted=True), y) < before).all()


def test_margin_loss_is_the_best_other_logit_minus_the_own():
    net = conv_net()
    x, y = images()

    def by_hand(logits, y):
        rows = [torch.cat([row[:label], row[label + 1 :]]).max() - row[label] for row, label in zip(logits, y)]
        return torch.stack(rows)

    for targeted in (False, True):
        named = pgd(net, x, y, **SETTINGS, loss="margin", targeted=targeted, generator=seeded(0))
        own = pgd(net, x, y, **SETTINGS, loss=by_hand, targeted=targeted, generator=seeded(0))
        torch.testing.assert_close(named, own, rtol=0, atol=1e-12)
    assert not torch.equal(named, pgd(net, x, y, **SETTINGS, targeted=True, generator=seeded(0)))


def test_gradient_of_an_image_does_not_depend_on_the_batch():
    net = conv_net()
    x, y = images()
    whole = pgd(net, x, y, **SETTINGS, random_start=False)
    alone = torch.cat([pgd(net, x[i : i + 1], y[i : i + 1], **SETTINGS, random_start=False) for i in range(len(x))])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-12)
    grads = []

    def watched(logits, y):
        logits.register_hook(grads.append)
        return F.cross_entropy(logits, y, reduction="none")

    fgsm(net, x, y, epsilon=0.1, loss=watched)
    fgsm(net, x[:1], y[:1], epsilon=0.1, loss=watched)
    torch.testing.assert_close(grads[0][:1], grads[1], rtol=1e-12, atol=0)


# ---------------------------------------------------------------- restarts and early drop


def test_restarts_are_never_weaker_and_begin_with_the_single_attack():
    net = conv_net()
    x, y = images()
    one = losses(net, pgd(net, x, y, **SETTINGS, generator=seeded(0)), y)
    several = losses(net, pgd(net, x, y, **SETTINGS, restarts=4, generator=seeded(0)), y)
    assert (several >= one - 1e-12).all() and (several > one + 1e-9).any()
    one = losses(net, pgd(net, x, y, **SETTINGS, targeted=True, generator=seeded(0)), y)
    several = losses(net, pgd(net, x, y, **SETTINGS, targeted=True, restarts=4, generator=seeded(0)), y)
    assert (several <= one + 1e-12).all() and (several < one - 1e-9).any()


@pytest.mark.parametrize("restarts", [1, 3])
def test_early_drop_only_leaves_out_what_is_already_fooled(restarts):
    net = conv_net()
    x, y = predicted_images(net)
    y[:4] = (y[:4] + 1) % CLASSES  # wrong before any attack
    settings = {"epsilon": 0.025, "step_size": 0.004, "steps": 8, "restarts": restarts}
    plain = pgd(net, x, y, **settings, generator=seeded(0))
    dropped = pgd(net, x, y, **settings, early_drop=True, generator=seeded(0))
    right_plain, right_dropped = net(plain).argmax(1) == y, net(dropped).argmax(1) == y
    assert (right_dropped <= right_plain).all()
    assert 0 < right_dropped.sum() < len(x) - 4, "the test needs images that fall and images that stand"
    assert torch.equal(dropped[:4], x[:4])
    torch.testing.assert_close(dropped[right_dropped], plain[right_dropped], rtol=0, atol=1e-12)


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_fooled_images_are_never_seen_again(targeted):
    net = conv_net()
    x, y = predicted_images(net)
    if targeted:
        y = (y + 1) % CLASSES
    seen = []

    def watched(batch):
        logits = net(batch)
        names = torch.cdist(batch.detach().flatten(1), x.flatten(1)).argmin(1)
        seen.append((names.tolist(), (logits.argmax(1) == y[names]) == targeted))
        return logits

    x_adv = pgd(watched, x, y, epsilon=0.06, step_size=0.02, steps=4, restarts=2, early_drop=True, targeted=targeted)
    fooled = set()
    for names, now in seen:
        assert names and not fooled & set(names)
        fooled |= {name for name, is_fooled in zip(names, now.tolist()) if is_fooled}
    assert 0 < len(fooled) < len(x), "the test needs images that fall and images that stand"
    assert len({len(names) for names, _ in seen}) > 2
    assert set(((net(x_adv).argmax(1) == y) == targeted).nonzero()[:, 0].tolist()) == fooled


def test_early_drop_stops_when_every_image_is_fooled():
    net, calls = conv_net(), []
    x, y = predicted_images(net)
    net.register_forward_hook(lambda *_: calls.append(1))
    x_adv = pgd(net, x, (y + 1) % CLASSES, **SETTINGS, restarts=5, early_drop=True)
    assert torch.equal(x_adv, x) and len(calls) == 1


def test_an_example_that_fools_counts_more_than_one_with_a_larger_loss(monkeypatch):
    starts = iter([torch.tensor([[1.0, 0.8]]), torch.tensor([[0.5, 0.45]])])
    monkeypatch.setattr("rnas.kernels.random_start", lambda x, **_: next(starts))
    x_adv = pgd(
        nn.Identity(),
        torch.tensor([[0.75, 0.6]]),
        torch.tensor([0]),
        epsilon=0.3,
        step_size=0.1,
        steps=1,
        restarts=2,
        early_drop=True,
        loss=lambda logits, y: logits[:, 1],
    )
    torch.testing.assert_close(x_adv, torch.tensor([[0.5, 0.55]]))


# ---------------------------------------------------------------- epsilon and step size per image


def test_every_image_has_its_own_epsilon_and_step_size_when_others_leave():
    net = conv_net()
    x, y = predicted_images(net)
    epsilon = torch.linspace(0, 0.08, len(x), dtype=torch.float64)[torch.randperm(len(x), generator=seeded(1))]
    settings = {"steps": 6, "random_start": False, "early_drop": True}
    together = pgd(net, x, y, epsilon=epsilon, step_size=epsilon / 4, **settings)
    alone = [
        pgd(net, x[i : i + 1], y[i : i + 1], epsilon=float(e), step_size=float(e) / 4, **settings)
        for i, e in enumerate(epsilon)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)
    assert 0 < (net(together).argmax(1) == y).sum() < len(x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("early_drop", [False, True], ids=["whole", "early-drop"])
def test_epsilon_per_image_bounds_every_restart(norm, early_drop):
    net = conv_net()
    x, y = predicted_images(net)
    epsilon = torch.linspace(0, 0.1, len(x))
    x_adv = pgd(
        net, x, y, epsilon=epsilon, step_size=epsilon / 3, steps=5, norm=norm, restarts=3, early_drop=early_drop
    )
    assert (per_image_norm(x_adv - x, norm) <= epsilon * (1 + 1e-6)).all()
    assert torch.equal(x_adv[0], x[0])
    assert (per_image_norm(x_adv - x, norm)[1:] > 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0), torch.zeros(12)], ids=["int", "float", "0-d", "tensor"])
def test_epsilon_zero_changes_nothing(norm, zero):
    x, y = images()
    assert torch.equal(pgd(conv_net(), x, y, epsilon=zero, step_size=0.1, steps=3, norm=norm), x)
    assert torch.equal(fgsm(conv_net(), x, y, epsilon=zero, norm=norm), x)


def test_perturb_follows_every_setting_of_its_config():
    net = mixed_net()
    x, y = images(dtype=torch.float32)
    settings = {
        "norm": "l2",
        "epsilon": 0.5,
        "step_size": 0.1,
        "steps": 3,
        "random_start": True,
        "restarts": 2,
        "statistics": "batch",
    }
    x_adv = perturb(net, x, y, AttackConfig(**settings), generator=seeded(4))
    assert torch.equal(x_adv, pgd(net, x, y, **settings, generator=seeded(4)))
    other = {"norm": "linf", "epsilon": 0.4, "step_size": 0.2, "steps": 2, "restarts": 1, "statistics": "running"}
    for name, value in other.items():
        changed = perturb(net, x, y, AttackConfig(**{**settings, name: value}), generator=seeded(4))
        assert not torch.equal(changed, x_adv), name
    still = AttackConfig(epsilon=0.5, step_size=0.0, random_start=False)
    assert torch.equal(perturb(net, x, y, still), x)


# ---------------------------------------------------------------- statistics and frozen


def test_batch_statistics_are_those_of_the_batch():
    net = mixed_net()
    net.norms[3] = nn.Identity()
    x, y = images(dtype=torch.float32)
    by_hand = copy.deepcopy(net).train()
    by_hand.dropout.eval()
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(by_hand(leaf), y, reduction="sum"), leaf)
    grad = grad / torch.linalg.vector_norm(grad.flatten(1), dim=1).reshape(-1, 1, 1, 1)
    before = snapshot(net)
    batch = fgsm(net, x, y, epsilon=0.5, norm="l2", statistics="batch")
    torch.testing.assert_close(batch, (x + 0.5 * grad).clamp(0, 1), rtol=0, atol=1e-6)
    assert_same(before, snapshot(net))
    running = fgsm(net, x, y, epsilon=0.5, norm="l2", statistics="running")
    assert (running - batch).abs().max() > 1e-3
    with torch.no_grad():
        net.shared.running_mean.fill_(float("nan"))
        if net.norms[2].track_running_stats:
            net.norms[2].running_var.fill_(float("nan"))
    assert torch.equal(fgsm(net, x, y, epsilon=0.5, norm="l2", statistics="batch"), batch)


def test_running_statistics_are_those_of_eval_mode():
    net = mixed_net()
    x, y = images(dtype=torch.float32)
    expected = fgsm(copy.deepcopy(net).eval(), x, y, epsilon=0.5, norm="l2")
    assert torch.equal(fgsm(net, x, y, epsilon=0.5, norm="l2"), expected)


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_frozen_gives_the_model_back(statistics):
    net = mixed_net()
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="inside"), frozen(net, statistics) as same:
        assert same is net
        assert not any(parameter.requires_grad for parameter in net.parameters())
        assert not net.dropout.training
        with frozen(net):
            net(images(dtype=torch.float32)[0])
        assert net.shared.training == (statistics == "batch")
        net(images(dtype=torch.float32)[0])
        raise RuntimeError("inside")
    assert_same(before, snapshot(net))


def test_frozen_takes_functions_and_models_without_parameters():
    with frozen(torch.sin) as function:
        assert function is torch.sin
    with frozen(nn.Flatten()):
        pass
    with pytest.raises(ValueError, match="'running', 'batch', got 'eval'"), frozen(nn.Flatten(), "eval"):
        pass


def test_a_weight_computed_from_another_tensor_can_be_frozen():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    net = Linear(torch.randn(CLASSES, 192, dtype=torch.float64))
    del net.weight
    net.register_parameter("weight", None)
    net._parameters["weight"] = scale * torch.randn(CLASSES, 192, dtype=torch.float64)
    x, y = images()
    pgd(net, x, y, **SETTINGS)
    assert scale.grad is None and net.weight.requires_grad


# ---------------------------------------------------------------- inputs of every kind


@each_attack
def test_empty_batch(attack):
    net = mixed_net()
    before = snapshot(net)
    x_adv = attack(net, torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.long))
    assert x_adv.shape == (0, 3, 8, 8)
    assert_same(before, snapshot(net))


@each_attack
def test_memory_format_is_kept_and_does_not_matter(attack):
    net = conv_net()
    x, y = images()
    layouts = []
    net.register_forward_pre_hook(
        lambda _, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    x_adv = attack(net, x.to(memory_format=torch.channels_last), y)
    assert x_adv.is_contiguous(memory_format=torch.channels_last) and all(layouts)
    torch.testing.assert_close(x_adv, attack(net, x, y), rtol=0, atol=1e-9)


@each_attack
def test_strided_images_give_what_contiguous_ones_give(attack):
    net = conv_net()
    x, y = images()
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(attack(net, strided, y), attack(net, x, y))
    one = x[:1].expand(12, -1, -1, -1)
    assert torch.equal(attack(net, one, y), attack(net, one.contiguous(), y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm, epsilon", [("linf", 0.1), ("l2", 0.7)])
def test_half_precision(dtype, norm, epsilon):
    net = conv_net(torch.float32)
    x, y = images(dtype=torch.float32)
    x = x.to(dtype)
    x_adv = pgd(copy.deepcopy(net).to(dtype), x, y, epsilon=epsilon, step_size=epsilon / 3, steps=5, norm=norm)
    assert x_adv.dtype == dtype and x_adv.min() >= 0 and x_adv.max() <= 1
    # half a unit in the last place of a pixel near 1, in every pixel for L2
    slack = torch.finfo(dtype).eps / 2 * (1 if norm == "linf" else 192**0.5)
    assert per_image_norm(x_adv.double() - x.double(), norm).max() <= epsilon + slack
    assert (losses(net, x_adv.float(), y) > losses(net, x.float(), y)).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_labels_of_any_integer_type(dtype):
    net = conv_net()
    x, y = images()
    assert torch.equal(fgsm(net, x, y.to(dtype), epsilon=0.1), fgsm(net, x, y, epsilon=0.1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_labels_and_epsilon_may_lie_on_another_device():
    x, y = images(dtype=torch.float32, device="cuda")
    net = conv_net(torch.float32).cuda()
    assert torch.equal(fgsm(net, x, y.cpu(), epsilon=torch.full((12,), 0.1)), fgsm(net, x, y, epsilon=0.1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_steps_do_not_wait_for_the_device():
    net, calls = conv_net(torch.float32).cuda(), []
    x, y = images(dtype=torch.float32, device="cuda")

    def forward(batch):
        calls.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(calls) < 5 else "default")
        return net(batch)

    try:
        pgd(forward, x, y, **SETTINGS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 5


def test_images_that_require_a_gradient_get_none():
    x, y = images()
    x.requires_grad_()
    x_adv = pgd(conv_net(), x, y, **SETTINGS)
    assert x.grad is None and x.requires_grad and not x_adv.requires_grad


def test_images_need_not_be_pictures():
    x = torch.rand(7, 192, dtype=torch.float64)
    x_adv = pgd(
        Linear(torch.randn(CLASSES, 192, dtype=torch.float64)),
        x,
        torch.arange(7) % CLASSES,
        **SETTINGS,
        early_drop=True,
    )
    assert x_adv.shape == x.shape


# ---------------------------------------------------------------- random numbers


@each_attack
@on_each_device
def test_the_default_generator_reproduces_the_attack(attack, device):
    net = mixed_net(device)
    x, y = images(dtype=torch.float32, device=device)
    torch.manual_seed(3)
    first = attack(net, x, y)
    assert torch.equal(attack(net, x, y), first)
    torch.rand(10, device=device)
    attack(net, x, y)
    torch.manual_seed(3)
    assert torch.equal(attack(net, x, y), first)


def test_the_seed_decides_the_start():
    net = conv_net()
    x, y = images()
    settings = {"epsilon": 0.1, "step_size": 0.0, "steps": 1}
    first = pgd(net, x, y, **settings, generator=seeded(7))
    assert torch.equal(pgd(net, x, y, **settings, generator=seeded(7)), first)
    assert not torch.equal(pgd(net, x, y, **settings, generator=seeded(8)), first)
    torch.manual_seed(7)
    by_default = pgd(net, x, y, **settings)
    torch.manual_seed(8)
    assert not torch.equal(pgd(net, x, y, **settings), by_default)
    going_on = seeded(7)
    pgd(net, x, y, **settings, generator=going_on)
    assert not torch.equal(pgd(net, x, y, **settings, generator=going_on), first)


def test_without_random_start_the_attack_begins_at_the_image():
    x, y = images()
    assert torch.equal(pgd(conv_net(), x, y, epsilon=0.1, step_size=0.0, steps=3, random_start=False), x)


# ---------------------------------------------------------------- bad input


BAD_OPTIONS = [
    ({"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
    ({"steps": 2.0}, ValueError, "steps must be an integer of at least 1, got 2.0"),
    ({"restarts": 0}, ValueError, "restarts must be an integer of at least 1, got 0"),
    ({"restarts_at_once": 0}, ValueError, "restarts_at_once must be an integer of at least 1, got 0"),
    ({"epsilon": -0.1}, ValueError, "epsilon must be finite and not negative, in pixel units, got -0.1"),
    ({"epsilon": float("nan")}, ValueError, "epsilon must be finite"),
    ({"epsilon": torch.tensor([0.1] * 11 + [-0.5])}, ValueError, "epsilon must be finite and not negative.* -0.5"),
    ({"epsilon": torch.full((12,), float("nan"))}, ValueError, "epsilon must be finite"),
    ({"epsilon": float("inf"), "norm": "l2"}, ValueError, "epsilon must be finite"),
    ({"epsilon": 8}, ValueError, r"epsilon must not exceed the width of the box .* got 8.0.* type 8 / 255"),
    ({"epsilon": "8/255"}, TypeError, "epsilon must be a number .* got str"),
    ({"epsilon": torch.full((12, 1, 1, 1), 0.1)}, ValueError, r"got shape \(12, 1, 1, 1\): type epsilon.reshape"),
    ({"epsilon": torch.full((3,), 0.1)}, ValueError, r"epsilon must be .* shape \(N,\) = \(12,\).* got shape \(3,\)"),
    ({"step_size": -1}, ValueError, "step_size must be finite and not negative, in pixel units, got -1"),
    ({"step_size": torch.full((2, 6), 0.1)}, ValueError, "step_size must be a number or a tensor"),
    ({"norm": "l1"}, ValueError, "norm must be one of 'linf', 'l2', got 'l1'"),
    ({"loss": "dlr"}, ValueError, "loss must be one of 'cross_entropy', 'margin', got 'dlr'"),
    ({"loss": F.cross_entropy}, ValueError, r"one value per image, shape \(12,\), got \(\): type reduction='none'"),
    ({"statistics": "train"}, ValueError, "statistics must be one of 'running', 'batch', got 'train'"),
    ({"restarts": 2, "random_start": False}, ValueError, "would repeat the same attack: type random_start=True"),
    ({"early_drop": True, "statistics": "batch"}, ValueError, "early_drop changes the batch"),
    (
        {"restarts": 2, "restarts_at_once": 2, "statistics": "batch"},
        ValueError,
        "restarts_at_once=2 makes a larger batch.* type statistics='running' or restarts_at_once=1",
    ),
    ({"lower": 1.0, "upper": 0.0}, ValueError, "lower must not exceed upper"),
]


@pytest.mark.parametrize(
    "options, kind, message",
    BAD_OPTIONS,
    ids=[" ".join(map(str, options)) + f" {i}" for i, (options, *_) in enumerate(BAD_OPTIONS)],
)
def test_bad_options_are_refused(options, kind, message):
    net = mixed_net()
    x, y = images(dtype=torch.float32)
    before = snapshot(net)
    with pytest.raises(kind, match=message):
        pgd(net, x, y, **{**SETTINGS, **options})
    assert_same(before, snapshot(net))


def with_pixel(value):
    x, _ = images()
    x[5, 1, 2, 3] = value
    return x


BAD_INPUTS = {
    "above": (lambda: (with_pixel(1.01), images()[1]), ValueError, r"x must lie in .*\[0.0, 1.0\].* 1.01\]"),
    "below": (lambda: (with_pixel(-0.01), images()[1]), ValueError, "x must lie in"),
    "NaN": (lambda: (with_pixel(float("nan")), images()[1]), ValueError, "x must lie in .* nan"),
    "bytes": (lambda: ((images()[0] * 255).byte(), images()[1]), TypeError, r"torch.uint8: for bytes type x.float\(\)"),
    "one image": (lambda: (torch.rand(8), images()[1]), ValueError, "x must have shape"),
    "float labels": (lambda: (images()[0], images()[1].double()), TypeError, "integer labels, got .*float64.*y.long"),
    "one-hot": (lambda: (images()[0], F.one_hot(images()[1], 5)), ValueError, r"\(12,\).* got \(12, 5\)"),
    "few labels": (lambda: (images()[0], images()[1][:3]), ValueError, r"\(12,\).* got \(3,\)"),
    "negative label": (lambda: (images()[0], images()[1] - 9), ValueError, "labels must be at least 0, got -"),
    "high label": (lambda: (images()[0], images()[1] + 4), ValueError, "below the number of logits, 5, got "),
}


@pytest.mark.parametrize("make, kind, message", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_images_and_labels_are_refused(make, kind, message):
    x, y = make()
    with pytest.raises(kind, match=message):
        fgsm(conv_net(), x, y, epsilon=0.1)


BAD_MODELS = {
    "two outputs": (lambda x: (x.flatten(1), None), TypeError, "must return logits .* got a tuple: wrap it"),
    "a map": (lambda x: x, ValueError, r"must return logits .* = \(12, K\), got \(12, 3, 8, 8\)"),
    "flat": (lambda x: x.flatten(), ValueError, "must return logits"),
    "detached": (lambda x: x.detach().flatten(1), ValueError, "does not depend on the images"),
    "unrelated": (lambda x: torch.ones(12, CLASSES, requires_grad=True), ValueError, "does not depend on the images"),
}


@pytest.mark.parametrize("model, kind, message", BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_bad_models_are_refused(model, kind, message):
    x, y = images()
    with pytest.raises(kind, match=message):
        pgd(model, x, y, **SETTINGS)
