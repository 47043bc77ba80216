"""What no rearrangement of the code may change: public names, identities of runs, committed
records, certificates to the last bit, and the refusal of layers that compute something else than
their bound is about.

`python tests/test_golden.py` writes tests/golden.json anew, after a change that was meant.
"""

import inspect
import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

import cll
from cll.experiment import reference
from cll.experiment.reference import names

GOLDEN = Path(__file__).with_name("golden.json")
ROOT = Path(__file__).resolve().parent.parent
NAMES = """
    aol_loss autoattack as_lipschitz_net binary_cll_loss build certificate_regularized_loss export
    certified_accuracy certified_radius certify cll_loss cll_scale cra_curve gloro_loss hinge_loss
    layer_bounds lipschitz_lower_bound lipschitz_matrix lipschitz_penalty load_params load_reference
    local_bcp_loss operator_norm outputs_dir pgd_attack polynomial_schedule run run_all
    GroupSort LipschitzNet MaxMin Normalize Residual
    bounds.register rounding.register data.load reference.names reference.images
    experiment.experiment_params experiment.load_model experiment.load_dataset experiment.run_dir
    experiment.finished experiment.sized_as
    layers.ClampedMaxMin layers.Householder layers.PadChannels layers.BatchNormalized
    layers.SOCConv2d layers.CPLLinear layers.CPLConv2d layers.SLLLinear layers.SLLConv2d
    layers.SandwichLinear layers.SandwichConv2d layers.NormalizedLinear layers.Truncation
    layers.load_official
""".split()
NETWORKS = {  # committed networks, with the data that they are certified on here
    "moons-CLL-p0.01-seed1": "two_moons",
    "moons-GloRo-eps0.15-seed1": "two_moons",
    "cifar10-4C3F-CLL-seed1": "images",
    "cifar10-4C3F-GloRo-seed1": "images",
}


def attribute(name):
    value = cll
    for part in name.split("."):
        value = getattr(value, part)
    return value


def signature(name):
    """The parameters of a public name; what it returns is another matter."""
    empty = inspect.Signature.empty
    text = str(inspect.signature(attribute(name)).replace(return_annotation=empty))
    return text.replace(str(ROOT), "ROOT")


def hashes():
    """{experiment/profile: {name-seed: hash of the resolved parameters}}."""
    experiments = sorted(folder.name for folder in (ROOT / "params").iterdir() if folder.is_dir())
    return {
        f"{experiment}/{profile}": {
            f"{run.name}-seed{run.seed}": run.hash()
            for run in cll.experiment.experiment_params(experiment, profile)
        }
        for experiment in experiments
        for profile in ("smoke", "quick", "paper")
    }


def samples(source):
    """A few test points, and targets: two moons of the committed runs, or made images."""
    if source == "two_moons":
        dataset = cll.data.load("two_moons", seed=1)
        return dataset.test_images[:200], dataset.test_targets[:200]
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
    images = torch.from_numpy(coarse.repeat(4, axis=2).repeat(4, axis=3))
    return images, torch.from_numpy(random.integers(0, 10, 6))


def certificates(name):
    """Radii, global and local, as hexadecimal floats, and the summary's constant."""
    net = cll.load_reference(name)
    images, targets = samples(NETWORKS[name])
    table = cll.certify(net, (images, targets), local=True, progress=False)
    columns = {key: [x.hex() for x in table[key]] for key in ("radius", "radius_local")}
    return {**columns, "K_f": table.attrs["summary"]["K_f"].hex()}


def machine():
    """What bits may depend on: the processor's instructions choose kernels."""
    return (
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"
    )


def golden():
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_public_names_keep_their_signatures(name):
    assert signature(name) == golden()["signatures"][name]


def test_every_resolved_run_keeps_its_identity():
    """Of every listed file, with all its seeds; a new parameter file is welcome."""
    today = hashes()
    for experiment, listed in golden()["hashes"].items():
        files = {run.rpartition("-seed")[0] for run in listed}
        runs = today[experiment].items()
        assert {run: h for run, h in runs if run.rpartition("-seed")[0] in files} == listed


@pytest.mark.parametrize("name", NETWORKS)
def test_committed_networks_are_certified_to_the_same_bits(name):
    """Elsewhere to 1e-9: other processors add in another order."""
    ours, theirs = certificates(name), golden()["certificates"][name]
    if machine() == golden()["machine"]:
        assert ours == theirs
    for key in ("radius", "radius_local"):
        numbers = [[float.fromhex(x) for x in values[key]] for values in (ours, theirs)]
        np.testing.assert_allclose(*numbers, rtol=1e-9, atol=1e-12)


def test_every_committed_record_loads_with_its_hash():
    records = reference.records()
    assert len(records) >= 103
    for folder, record in records.items():
        assert cll.experiment.Params(**record["params"]).hash()[:6] == folder.name[-6:], folder


def test_every_committed_network_loads():
    for folder in names().values():
        if (folder / "checkpoint.safetensors").exists():
            assert sum(p.numel() for p in cll.experiment.load_model(folder).parameters()) > 0


LAYERS = {
    "MaxMin": lambda kind: kind(),
    "GroupSort": lambda kind: kind(2),
    "Householder": lambda kind: kind(4),
    "ClampedMaxMin": lambda kind: kind((4, 8, 8)),
    "Normalize": lambda kind: kind(0.5, 0.5),
    "SOCConv2d": lambda kind: kind(4, 3),
    "CPLConv2d": lambda kind: kind((4, 8, 8), 4),
    "SLLConv2d": lambda kind: kind(4, 4),
    "SandwichConv2d": lambda kind: kind((4, 8, 8), 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_an_overridden_layer_of_ours_is_refused(name):
    """A subclass that computes something else must not inherit the bound."""
    known = getattr(cll.layers, name)

    class Doubled(known):
        def forward(self, x):
            return 2 * super().forward(x)

    shape = (4, 8, 8)
    cll.operator_norm(LAYERS[name](known).eval(), shape)
    with pytest.raises(TypeError, match="no Lipschitz bound known for"):
        cll.operator_norm(LAYERS[name](Doubled).eval(), shape)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_ours_with_a_replaced_method_is_refused(name):
    """Also where the forward of one instance is replaced."""
    layer = LAYERS[name](getattr(cll.layers, name)).eval()
    layer.forward = lambda x: 2 * x
    with pytest.raises(TypeError):
        cll.operator_norm(layer, (4, 8, 8))


if __name__ == "__main__":
    torch.set_num_threads(1)  # as tests/conftest.py does
    values = {
        "machine": machine(),
        "signatures": {name: signature(name) for name in NAMES},
        "hashes": hashes(),
        "certificates": {name: certificates(name) for name in NETWORKS},
    }
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")
