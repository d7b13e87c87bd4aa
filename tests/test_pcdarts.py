"""PC-DARTS: the relaxation edge by edge, the edge weights, the genotype, the gradients, and a whole search."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from method_checks import (
    assert_gradients,
    assert_resumes_to_the_same_bits,
    assert_single_precision_agrees,
    assert_step_leaves_the_supernet_alone,
    problem,
    published_config,
)
from torch.nn import functional as F

from rnas import search
from rnas.config import SearchConfig
from rnas.methods import options_for
from rnas.methods.pcdarts import PcDarts, PcDartsOptions
from rnas.settings import set_value
from rnas.spaces import DARTS, DSARA, CellSpec
from rnas.supernet import MixedCell


@pytest.fixture
def config(search_config):
    def with_options(**options):
        return replace(search_config, method="pcdarts", channels=4, options=PcDartsOptions(**options))

    return with_options


def random_method(space, **options) -> PcDarts:
    method = PcDarts(PcDartsOptions(**options), space, 0).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.normal_(0, 1)
    return method


@pytest.mark.parametrize("space", [DARTS, DSARA, replace(DARTS, nodes=2)], ids=lambda s: f"{s.name}-{s.nodes}")
def test_edge_weights_are_a_softmax_over_the_edges_into_a_node(space):
    method = random_method(space)
    weights = method.edge_weights()
    assert set(weights) == set(space.cell_types)
    for cell_type, found in weights.items():
        beta = method.beta[cell_type]
        for index, (_, target) in enumerate(space.edges):
            into = [beta[other].exp() for other, (_, t) in enumerate(space.edges) if t == target]
            torch.testing.assert_close(found[index], beta[index].exp() / sum(into), rtol=1e-12, atol=0)
        assert found.sum().item() == pytest.approx(space.nodes)
    for weight in method.mixing().values():
        torch.testing.assert_close(weight.sum(dim=1), torch.ones(len(space.edges), dtype=torch.float64))


def test_parameters_start_small_random_and_reproducible():
    first, again, other = (PcDarts(PcDartsOptions(), DARTS, seed) for seed in (3, 3, 4))
    assert {name: tuple(p.shape) for name, p in first.named_parameters()} == {
        "alpha.normal": (14, 8), "alpha.reduction": (14, 8), "beta.normal": (14,), "beta.reduction": (14,)
    }  # fmt: skip
    betas = torch.cat([*first.beta.values()])
    assert 0.5e-3 < betas.std() < 1.6e-3
    assert len({round(v, 9) for v in betas.tolist()}) == 28, "no two cell types share their numbers"
    for p, q, r in zip(first.parameters(), again.parameters(), other.parameters()):
        assert torch.equal(p, q) and not torch.equal(p, r)


@pytest.mark.parametrize("reduces", [False, True])
@pytest.mark.parametrize("partial", [1, 4])
def test_a_cell_is_its_definition_edge_by_edge(reduces, partial):
    method = random_method(DARTS, partial=partial)
    cell = MixedCell(DARTS, CellSpec("normal", 8, reduces), (8, 8), False, partial).double().train()
    s0, s1 = (torch.randn(2, 8, 6, 6, dtype=torch.float64) for _ in range(2))
    alpha, beta = method.mixing()["normal"], method.edge_weights()["normal"]
    found = cell(s0, s1, alpha, beta)
    states = [cell.preprocess[0](s0), cell.preprocess[1](s1)]
    for target in DARTS.concat:
        node = 0
        for index, (source, into) in enumerate(DARTS.edges):
            if into != target:
                continue
            x = states[source]
            count = 8 // partial
            mixed = sum(w * candidate(x[:, :count]) for w, candidate in zip(alpha[index], cell.mixed[index].candidates))
            if partial > 1:
                around = x[:, count:]
                if reduces and source < 2:
                    around = F.max_pool2d(around, 2, 2)
                both = torch.cat([mixed, around], dim=1)
                # channel shuffle: the first channel of every group of C / K, then the second of every group
                mixed = both[:, [group * count + c for c in range(count) for group in range(partial)]]
            node = node + beta[index] * mixed
        states.append(node)
    torch.testing.assert_close(found, torch.cat(states[2:], dim=1), rtol=1e-10, atol=1e-10)


def test_the_genotype_keeps_the_edges_of_the_largest_product():
    method = random_method(DARTS)
    alpha, beta = method.mixing()["normal"].tolist(), method.edge_weights()["normal"].tolist()
    expected, by_alpha = [], []
    for target in DARTS.concat:
        edges = [index for index, (_, into) in enumerate(DARTS.edges) if into == target]
        best = {index: max(range(1, 8), key=lambda k, i=index: alpha[i][k]) for index in edges}
        for kept, strength in ((expected, beta), (by_alpha, [1.0] * 14)):
            strongest = sorted(edges, key=lambda i: alpha[i][best[i]] * strength[i], reverse=True)[:2]
            kept.append(tuple((DARTS.primitives[best[i]], DARTS.edges[i][0]) for i in sorted(strongest)))
    assert method.genotype().cells["normal"] == tuple(expected)
    assert tuple(expected) != tuple(by_alpha), "the draw must tell both rules apart"


def test_the_supernet_of_a_search_has_partial_channels(config):
    one = problem(config())
    assert {edge.partial for cell in one.supernet.cells for edge in cell.mixed} == {4}
    assert one.supernet.cells[0].mixed[0].norms[0].num_features == 1
    with pytest.raises(ValueError, match="partial channels need a number that divides the 4 channels; got 3"):
        problem(config(partial=3))


@pytest.mark.parametrize("partial", [1, 2, 4])
def test_the_gradients_of_alpha_and_beta_are_those_of_the_validation_loss(config, partial):
    one = problem(config(partial=partial))
    result = one.architecture_step()

    def loss() -> float:
        with torch.no_grad():  # in training mode: batch statistics
            return F.cross_entropy(
                one.supernet(one.valid[0], one.method.mixing(), one.method.edge_weights()), one.valid[1]
            ).item()

    assert result.loss == pytest.approx(loss(), rel=1e-10)
    assert_gradients(one.method, loss)


def test_the_weights_learn_under_the_edge_weights(config):
    one = problem(config())
    train, _ = one.prepared()
    loss, logits = one.method.weight_loss(one.supernet, train, one.step)
    with torch.no_grad():
        expected = one.supernet(train.x, one.method.mixing(), one.method.edge_weights())
        unweighted = one.supernet(train.x, one.method.mixing())
    torch.testing.assert_close(logits.detach(), expected)
    assert (expected - unweighted).norm() > 1e-3 * expected.norm()
    loss.backward()
    assert all(p.grad is None for p in one.method.parameters())


@pytest.mark.parametrize(
    ("adversarial", "levels"),
    [("both", (True, True)), ("weights", (True, False)), ("architecture", (False, True)), ("none", (False, False))],
)
def test_the_named_levels_see_pgd_examples(config, adversarial, levels):
    one = problem(config(adversarial=adversarial))
    for batch, attacked in zip(one.prepared(), levels):
        assert (batch.x_adv is not None) == attacked
        if attacked:
            assert 0 < (batch.x_adv - batch.x).abs().max() <= 8 / 255 + 1e-7


@pytest.mark.parametrize("adversarial", ["none", "both"])
def test_the_architecture_step_moves_nothing_else(config, adversarial):
    assert_step_leaves_the_supernet_alone(problem(config(adversarial=adversarial), dtype=torch.float32))


def test_single_precision_gives_the_same_gradient(config):
    assert_single_precision_agrees(config())


def test_a_stopped_search_resumes_to_the_same_bits(config, tmp_path, monkeypatch):
    assert_resumes_to_the_same_bits(config(adversarial="both"), tmp_path, monkeypatch, batches=4)


def test_alpha_and_beta_learn_after_the_warm_up_alone(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found, end_epoch = [], search.Loop.end_epoch

    def watched(loop, **extra):
        found.append({name: p.detach().clone() for name, p in loop.parts["method"].named_parameters()})
        return end_epoch(loop, **extra)

    monkeypatch.setattr(search.Loop, "end_epoch", watched)
    search.search(replace(config(), warmup_epochs=1, epochs=2, run=str(tmp_path / "run")))
    fresh = PcDarts(PcDartsOptions(), replace(DARTS, nodes=2), 0)
    for name, p in fresh.named_parameters():
        assert torch.equal(found[0][name], p) and not torch.equal(found[1][name], p), name


@pytest.mark.parametrize("value", ["0", "-4"])
def test_bad_options_are_named(value):
    with pytest.raises(ValueError, match=rf"options\.partial must be a finite number of at least 1; got {value}"):
        set_value(SearchConfig(options=options_for("pcdarts")), f"options.partial={value}")
    with pytest.raises(ValueError, match="options.adversarial must be"):
        set_value(SearchConfig(options=options_for("pcdarts")), "options.adversarial=sometimes")


def test_the_published_configuration_is_a_configuration():
    found = published_config("pcdarts")
    assert found.options == PcDartsOptions(partial=4, adversarial="none")
    assert (found.batch_size, found.warmup_epochs, found.weights.learning_rate_min) == (256, 15, 0.0)
