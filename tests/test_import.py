"""`import rnas` costs nothing and needs nothing that may be missing."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def run(script: str) -> str:
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_reads_no_file_and_opens_no_device():
    out = run(
        """
        import sys, torch
        opened, before = [], set(sys.modules)
        def watch(event, arguments):
            if event == "open" and isinstance(arguments[0], str):
                opened.append(arguments[0])
        sys.addaudithook(watch)
        import rnas
        print("opened", [path for path in opened if not path.endswith((".py", ".pyc")) and not ".pyc." in path])
        print("cuda", torch.cuda.is_initialized())
        print("loaded", sorted(set(sys.modules) - before))
        """
    )
    assert out.splitlines() == ["opened []", "cuda False", "loaded ['rnas']"]


def test_everything_but_pictures_and_speed_works_without_optional_parts():
    """Without compiled modules, triton, matplotlib and tyro: the reference serves, and a search step runs."""
    run(
        """
        import sys
        for name in ("rnas._cpu", "rnas._cuda", "triton", "matplotlib", "tyro"):
            sys.modules[name] = None  # importing it now raises ImportError
        import torch, rnas
        from rnas import attacks, network, genotype, search, train, evaluate, plot
        net = network.Network(genotype.published()["RACL"], channels=2, layers=3, num_classes=4)
        x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
        x_adv = attacks.pgd(net, x, y, epsilon=8 / 255, step_size=2 / 255, steps=2)
        assert 0 < (x_adv - x).abs().max() <= 8 / 255 + 1e-6
        """
    )


def test_submodules_are_found_by_attribute():
    assert run("import rnas; print(rnas.genotype.published()['RACL'].concat)") == "(2, 3, 4, 5)\n"
    assert "no attribute 'serach'" in run(
        """
        import rnas
        try:
            rnas.serach
        except AttributeError as error:
            print(error)
        """
    )
