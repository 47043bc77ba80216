"""Parameters are checked, finished runs are kept, results say where they come from."""

import json
import subprocess
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_training import DIGITS, MOONS

import cll
from cll import ROOT, experiment
from cll.__main__ import numbers
from cll.experiment import experiment_params, load_model, parameter_file, run_dir
from cll.experiment.checkpoints import load_snapshots
from cll.experiment.schema import RETIRED
from cll.experiment.store import CERTIFIER

SHORT = MOONS | {"epochs": 3, "certify_train": True, "tightness": {"method": "pairs", "pairs": 50}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"epochss": 3}, "unknown key 'epochss'; nearest: 'epochs'"),
        ({"loss": SHORT["loss"] | {"epsilonn": 1}}, "'loss.epsilonn'; nearest: 'epsilon'"),
        ({"loss": SHORT["loss"] | {"lamda": 1}}, "'loss.lamda'; nearest: 'lambda'"),
        ({"loss": SHORT["loss"] | {"p": 0}}, "loss.p = 0"),
        ({"loss": SHORT["loss"] | {"p": 2}}, "loss.p = 2"),
        ({"loss": SHORT["loss"] | {"epsilon": -0.1}}, "loss.epsilon = -0.1"),
        ({"loss": {"name": "GloRo", "epsilon": 1, "p": 0.1}}, "'loss.p'"),
        ({"loss": {"name": "CLLL", "epsilon": 1}}, "loss"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr = 0"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr = 'fast'"),
        ({"augmentation": {"flop": True}}, "nearest: 'flip'"),
        ({"epochs": 0}, "epochs = 0"),
        ({"radii": ["a/b"]}, "radii.0"),
        ({"profile": "papre"}, "nearest: 'paper'"),
        ({"loss": {"name": "Hinge", "margn": 1}}, "'loss.margn'; nearest: 'margin'"),
        ({"loss": {"name": "AOL", "temprature": 1}}, "nearest: 'temperature'"),
        ({"loss": {"name": "SOC", "gama": 1}}, "nearest: 'gamma'"),
        ({"loss": {"name": "Local-Lip-B", "epsilon": 1, "rampp": 1}}, "'loss.rampp'; nearest: 'r"),
        ({"loss": {"name": "Local-Lip-B", "epsilon": -1}}, "loss.epsilon = -1"),
        (
            {"loss": {"name": "Local-Lip-B", "epsilon": 1, "warmup": 0.6}},
            "loss: warmup = 0.6 must be below rampup = 0.5",
        ),
        (
            {"loss": {"name": "Local-Lip-B", "epsilon": 1}, "model": "CPL-S"},
            "loss Local-Lip-B needs a model of plain layers (4C3F, 6C2F, 8C2F, MLP), not CPL-S",
        ),
        ({"local": True, "model": "SLL-S"}, "local: true needs a model of plain layers"),
        (
            {"loss": {"name": "GloRo", "epsilon": 1, "trades_start": 1}},
            "loss: trades_start needs trades",
        ),
        (
            {"loss": {"name": "GloRo", "epsilon": 1, "trades": 1, "trades_until": 0.5}},
            "loss: trades_until needs trades_start",
        ),
        (
            {"loss": {"name": "GloRo", "epsilon": 1, "gradient": "published"}, "head": "truncated"},
            "is about a linear head",
        ),
        ({"optimizer": {"betass": 1}}, "'optimizer.betass'; nearest: 'betas'"),
        ({"optimizer": {"name": "Adamm"}}, "optimizer.name = 'Adamm'"),
        ({"optimizer": {"momentum": 0.5}}, "optimizer: momentum is not used by AdamW"),
        ({"optimizer": {"name": "SGD", "betas": [0.5, 0.9]}}, "optimizer: betas is not used by"),
        (
            {"optimizer": {"schedule": "triangular", "milestones": [4]}},
            "milestones is not used by AdamW with schedule = 'triangular': leave it out",
        ),
        ({"optimizer": {"schedule": "exponential"}}, "schedule = 'exponential' needs final_lr"),
        ({"optimizer": {"power": 3}}, "power is not used by AdamW with schedule = 'milestones'"),
        ({"size": {"widht": 0.5}}, "'size.widht'; nearest: 'width'"),
        ({"size": {"width": 2}}, "size.width = 2"),
        ({"head": "lln"}, "head = 'lln'"),
        ({"precision": "float16"}, "precision = 'float16'"),
        ({"input_std": [0.2, 0.2, 0.2]}, "input_std has 3 values for 2 channels"),
        ({"input_std": 0}, "input_std = 0: Value error, give one finite number > 0, or a list"),
        ({"attack": {"image": 3}}, "unknown key 'attack.image'; nearest: 'images'"),
        ({"attack": {"version": "strong"}}, "attack.version = 'strong'"),
        ({"attack": {"images": 0}}, "attack.images = 0"),
        ({"attack": {}}, "attack needs images (C, H, W), not input_shape = [2]: leave it out"),
        ({"loss": {"name": ["CLL"]}}, "loss"),
        ({"loss": 3}, "loss = 3"),
        ({"loss": "CLL"}, "loss = 'CLL': write {name: ..., ...} with the name of a loss, nearest"),
        (
            {"loss": {"name": "GloRO"}},
            "loss.name = 'GloRO': write {name: ..., ...} with the name of",
        ),
        ({"model": "4C3"}, "model = '4C3': Value error, unknown network; nearest: '4C3F'"),
        ({"model": "4C3", "local": True}, "model = '4C3': Value error, unknown network; nearest"),
        ({"epochs": True}, "epochs = True: Value error, true or false is no number"),
        ({"loss": SHORT["loss"] | {"epsilon": True}}, "loss.epsilon = True: Value error, true or"),
        ({"loss": SHORT["loss"] | {"lambda": False}}, "loss.lambda = False: Value error, true or"),
        ({"optimizer": {"betas": [False, 0.9]}}, "optimizer.betas.0 = False: Value error, true"),
        ({"augmentation": {"crop": True}}, "augmentation: crop: true or false is no"),
        ({"augmentation": {"jitter": {"hue": True}}}, "augmentation: hue: true or false is no"),
        (
            {"input_std": [True, 0.5]},
            "input_std = [True, 0.5]: Value error, true or false is no number",
        ),
        ({"input_shape": [0]}, "input_shape.0 = 0"),
        ({"epochs": [3]}, "epochs = [3]"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"seed": True}, "seed = True: Value error, true or false is no number"),
        ({"seeds": "1-9"}, "seeds = '1-9': write a list of different numbers"),
        ({"seeds": [1, 1]}, "seeds = [1, 1]: write a list of different numbers"),
        ({"seeds": []}, "seeds = []: write a list of different numbers"),
        ({"profiles": {"smoke": {"seeds": [2**32]}}}, "seeds = [4294967296]: write a list"),
        ({"profiles": {"quick": {"seeds": 3}}}, "seeds = 3: write a list"),
        ({"profiles": None}, "profiles = None: write keys to change below the name of each"),
        ({"profiles": {"smoke": 3}}, "profiles = {'smoke': 3}: write keys to change below"),
        ({"compile": True}, "compile = True: this version knows False alone, leave the key out"),
        ({"checkpointing": "yes"}, "checkpointing = 'yes': this version knows False alone"),
        ({"variant": "abs-q"}, "variant = 'abs-q': this version knows 'sound' alone"),
    ],
)
def test_bad_parameters_are_named_in_one_line(change, message):
    with pytest.raises(ValueError) as caught:
        cll.load_params(SHORT | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no parameter file .*nowhere.yaml"):
        cll.load_params(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(ValueError, match="broken.yaml: not valid YAML"):
        cll.load_params(tmp_path / "broken.yaml")
    with pytest.raises(FileNotFoundError, match="known: .*table2"):
        experiment_params("table7")


@pytest.mark.parametrize(
    "radius",
    ["36/0", "0/255", "-1/255", "1/-255", -0.1, 0, float("inf"), float("nan"), "1e400", "1e-400"]
    + ["1e-999999999", "9" * 400 + "/1", "1/" + "9" * 400, "1_0/255", "36/255/2", True, [1], None],
    ids=lambda radius: str(radius)[:12],
)
def test_a_radius_is_a_finite_distance_above_0(radius):
    with pytest.raises(ValueError, match="(?s)^parameters: radii[^;]*$"):
        cll.load_params(SHORT | {"radii": ["36/255", radius]})


def test_seeds_reach_as_far_as_the_generators_that_take_them():
    """Two moons are drawn by NumPy, whose seeds end at 2^32 - 1; PyTorch's go further."""
    largest = cll.load_params(SHORT, seed=2**32 - 1).seed
    assert np.random.RandomState(largest) and torch.Generator().manual_seed(largest)
    with pytest.raises(ValueError, match="between 0 and 2"):
        np.random.RandomState(largest + 1)


FILE = """\
name: x
data: digits
model: 4C3F
input_shape: [1, 8, 8]
loss: {name: CLL, epsilon: 0.3, p: 0.3}
epochs: EPOCHS
profile: smoke
"""


class TestFilesAreReadAsTheyLook:
    """YAML 1.1 gives some texts another value than a person does: such files are refused."""

    @pytest.fixture
    def load(self, tmp_path):
        def read(text, encoding="utf-8"):
            path = tmp_path / "run.yaml"
            path.write_bytes(text.encode(encoding))
            return cll.load_params(path)

        return read

    @pytest.mark.parametrize(
        ("text", "otherwise"),
        [("010", 8), ("-010", -8), ("0x10", 16), ("0b11", 3), ("1:30", 90), ("1:30:00", 5400)]
        + [("1_000", 1000), ("yes", True), ("on", True), ("off", False), ("No", False)]
        + [("!!int '010'", 8), ("!!bool yes", True), ("0o10", "0o10"), ("08", "08")]
        + [("!!float 1:30", 90.0), ("1:30.5", 90.5), ("2_0.5", 20.5), ("", None)],
    )
    def test_a_value_that_yaml_takes_for_another_is_refused(self, load, text, otherwise):
        assert yaml.safe_load(f"epochs: {text}")["epochs"] == otherwise
        for file in (FILE.replace("EPOCHS", text), FILE.replace("EPOCHS", f"1\nlabel: {text}")):
            key = "label" if "label" in file else "epochs"
            message = rf"run.yaml, line [67]: {key} .*write (numbers as 10|a value)[^\n]*$"
            with pytest.raises(ValueError, match=message):
                load(file)
        if text and text[0] not in "!0":
            nested = FILE.replace("EPOCHS", f"1\nprofiles: {{quick: {{seeds: [1, {text}]}}}}")
            with pytest.raises(ValueError, match="line 7: profiles.quick.seeds.1 = "):
                load(nested)

    @pytest.mark.parametrize("text", ["2020-01-01", "!!set {a}", "!mine 3", "[1]", "true", ".inf"])
    def test_what_is_no_number_is_refused(self, load, text):
        with pytest.raises(ValueError, match="run.yaml.*: epochs = "):
            load(FILE.replace("EPOCHS", text))

    @pytest.mark.parametrize(
        ("lines", "key"),
        [
            ("epochs: 7", "epochs"),
            ('"epochs": 7', "epochs"),
            ("optimizer: {lr: 1e-3, lr: 1e-2}", "optimizer.lr"),
            ("profiles:\n  quick: {epochs: 2, epochs: 3}", "profiles.quick.epochs"),
            ("optimizer: &o {lr: 1, lr: 2}\nprofiles: {quick: {optimizer: *o}}", "optimizer.lr"),
            ("profiles:\n  quick: &q {}\n  smoke: {<<: *q, <<: *q}", "profiles.smoke.<<"),
        ],
    )
    def test_a_key_stands_once(self, load, lines, key):
        with pytest.raises(ValueError, match=rf"run.yaml, line \d+: the key {key} stands twice"):
            load(FILE.replace("EPOCHS", "1") + lines)

    def test_a_loss_weight_has_one_name(self, load):
        with pytest.raises(ValueError, match="unknown key 'loss.lam'; nearest: 'lambda'"):
            load(FILE.replace("EPOCHS", "1").replace("p: 0.3", "p: 0.3, lambda: 1, lam: 2"))

    @pytest.mark.parametrize("key", ["profiles", "seeds", "tightness", "attack", "optimizer"])
    def test_a_key_with_nothing_after_it_is_refused(self, load, key):
        with pytest.raises(ValueError, match=f"run.yaml, line 8: {key} has nothing after it: wri"):
            load(FILE.replace("EPOCHS", "1") + f"{key}:\n")

    @pytest.mark.parametrize("lines", ["1: 2", "on: 2", "? [a, b]\n: 3", "~: 1"])
    def test_keys_are_text(self, load, lines):
        with pytest.raises(ValueError, match="run.yaml, line 8: the key .* is not text: put it in"):
            load(FILE.replace("EPOCHS", "1") + lines)

    @pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32"])
    def test_another_encoding_is_named(self, load, encoding):
        with pytest.raises(ValueError, match="run.yaml: not plain UTF-8 text: save it"):
            load(FILE.replace("EPOCHS", "1") + "label: Universität\n", encoding)

    @pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029", "\0"])
    def test_lines_that_no_editor_shows_are_refused(self, load, end):
        """YAML 1.1 ends a line there, so that a comment or a text becomes a key."""
        with pytest.raises(ValueError, match="run.yaml: not plain UTF-8 text"):
            load(FILE.replace("EPOCHS", "1") + f"label: a{end}seed: 5\n")

    def test_a_merged_list_is_refused(self, load):
        """Versions of PyYAML differ in which of its mappings wins."""
        with pytest.raises(ValueError, match="line 8: optimizer.<< merges a list: merge one"):
            load(FILE.replace("EPOCHS", "1") + "optimizer: {<<: [{lr: 1}, {lr: 2}]}\n")

    def test_what_looks_like_its_value_is_read(self, load):
        """Merge keys, quotes, exponents without a point, a byte order mark, lines of Windows."""
        text = "\ufeff" + FILE.replace("EPOCHS", "3") + "label: 'Universität 010: yes'\n"
        text += "optimizer: &o {lr: 1e-3, betas: [.5, 0.9]}\naugmentation: {flip: true}\n"
        text += "tightness: ~\nradii: [36/255, 0.5, 1e-3]\nrow: '010'\n"
        text += "profiles:\n  smoke: {optimizer: {<<: *o, lr: 2e-3}, seeds: [4294967295]}\n"
        for encoding, end in (("utf-8", "\n"), ("utf-8", "\r\n")):
            params = load(text.replace("\n", end), encoding)
            assert (params.epochs, params.row, params.tightness) == (3, "010", None)
            assert params.optimizer.lr == 2e-3 and params.optimizer.betas == (0.5, 0.9)
            assert params.augmentation.flip and params.radii == ("36/255", "0.5", "1e-3")
            assert params.label == "Universität 010: yes"


ALL_FILES = sorted((ROOT / "params").glob("*/*.yaml"))


def with_bases(path):
    """The text of a parameter file and of its bases."""
    text = path.read_text()
    base = yaml.safe_load(text).get("base")
    return text + with_bases(path.parent / base) if base else text


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda p: p.stem)
def test_profiles_change_sizes_never_the_method(path):
    """Learning rate, Adam's memory, the TRADES weight and augmentation may follow the number of
    iterations where the head of the file, or of a base, says why."""
    paper = cll.load_params(path, "paper").model_dump()
    sizes = {"epochs", "batch_size", "train_size", "test_size", "tightness", "size"}
    sizes |= {"data", "input_shape", "profile", "attack", "snapshots", "precision"}
    for profile in ("smoke", "quick"):
        inside = {"optimizer": {"milestones"}, "augmentation": {"crop"}, "loss": set()}
        if any(f"\n# {said}:" in with_bases(path) for said in (profile, "smoke and quick")):
            inside["optimizer"] |= {"lr", "betas"}
            inside["loss"] |= {"trades"}
            inside["augmentation"] |= {"flip", "jitter", "rotation"}
        other = cll.load_params(path, profile).model_dump()
        changed = {k for k in paper if paper[k] != other[k]}
        if profile == "quick" and "recipe" in changed:  # a recipe of its own: loss and network stay
            changed -= {"recipe", "init"}
            inside["optimizer"] |= {"schedule", "decay_from", "final_lr"}  # and what goes with it
        assert changed <= sizes | inside.keys()
        for part, free in inside.items():
            keys = paper[part].keys() | other[part].keys()
            differ = {k for k in keys if paper[part].get(k) != other[part].get(k)}
            assert differ <= free, part
    assert path.stem == paper["name"]


IN_TRAINING = {"cifar10": 50_000, "cifar100": 50_000, "tiny-imagenet": 100_000, "digits": 1437}


def iterations(params, epochs):
    """Of a run with this many epochs."""
    n = params.train_size or IN_TRAINING[params.data]
    return epochs * (n // params.batch_size)


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda p: p.stem)
def test_milestones_keep_their_place_in_the_schedule(path):
    paper = cll.load_params(path, "paper")
    published = [m / iterations(paper, paper.epochs) for m in paper.optimizer.milestones]
    for profile in ("quick", "smoke"):
        short = cll.load_params(path, profile)
        if short.recipe != paper.recipe:  # whose rate falls in another way
            continue
        here = [m / iterations(short, short.epochs) for m in short.optimizer.milestones]
        assert here == pytest.approx(published, abs=0.02), profile


def test_identities_outlive_new_keys():
    """Results on disk stay results: the hash leaves out what equals its default."""
    known = {
        "MOONS": "4500c6a577e025fd",
        "table2/cifar10-4C3F-CLL": "990fae5f1f5d36eb",
        "table2/cifar10-6C2F-GloRo": "11b8751cba647464",
        "figure4/moons-CLL-eps0.15": "95bd1eff2317baa8",
    }
    for name, expected in known.items():
        source = MOONS if name == "MOONS" else f"params/{name}.yaml"
        params = cll.load_params(source, None if name == "MOONS" else "paper", local=False)
        assert params.hash().startswith(expected), name


def test_records_of_earlier_versions_are_read():
    """They hold all keys of their time, also those that are gone."""
    params = cll.load_params(SHORT)
    values = params.model_dump(mode="json", by_alias=True)
    assert not RETIRED.keys() & values.keys()
    assert cll.load_params(values | RETIRED) == params


ATTACKED = DIGITS | {
    "input_shape": [3, 8, 8],
    "size": {"width": 0.125},
    "augmentation": {},
    "optimizer": {"lr": 4e-3, "betas": [0.9, 0.9]},
    "train_size": 1437,
    "batch_size": 32,
    "test_size": 40,
    "local": True,
    "radii": ["108/255", "36/255"],
    "epochs": 4,
}


def test_an_attack_is_no_part_of_the_identity_and_completes_finished_runs(tmp_path, monkeypatch):
    plain = cll.load_params(ATTACKED)
    folder = run_dir(plain, tmp_path)
    first = cll.run(plain, folder, progress=False)
    assert "attack" not in first
    weights = (folder / "checkpoint.safetensors").read_bytes()
    monkeypatch.setattr(experiment.runs, "train", None)  # nothing is trained from here on
    asked = cll.load_params(ATTACKED | {"attack": {"images": 30, "version": "apgd-ce"}})
    assert asked.hash() == plain.hash()
    (record,) = cll.experiment.run_all([asked], tmp_path, progress=False)
    attack = record.pop("attack")
    assert record.pop("params") == first.pop("params") | {"attack": asked.attack.model_dump()}
    assert record == first and (folder / "checkpoint.safetensors").read_bytes() == weights
    assert attack["images"] == 30 and attack["version"] == "apgd-ce" and attack["broken"] == 0
    assert "AutoAttack apgd-ce" in attack["method"]
    radii = np.load(folder / "radii.npz")
    correct, radius = radii["correct"][:30], radii["radius"][:30]
    assert attack["clean"] == correct.mean()
    for name, distance in (("36/255", 36 / 255), ("108/255", 108 / 255)):
        assert attack["cra"][name] == np.mean(correct & (radius > distance))
        assert attack["cra"][name] <= attack["cra_local"][name] <= attack["accuracy"][name]
        assert attack["accuracy"][name] <= attack["clean"]
    assert 0 < attack["cra"]["36/255"] and attack["accuracy"]["108/255"] < attack["clean"]
    monkeypatch.setattr(experiment.evaluate, "autoattack_curve", None)  # nothing is attacked again
    for params in (asked, plain):
        assert cll.run(params, folder, progress=False)["attack"] == attack


def test_a_broken_certificate_is_an_error_and_no_result(tmp_path, monkeypatch):
    def all_broken(model, images, targets, radii, **options):
        return torch.zeros(len(radii), len(images), dtype=torch.bool)

    monkeypatch.setattr(experiment.evaluate, "autoattack_curve", all_broken)
    params = cll.load_params(ATTACKED | {"attack": {"images": 40}})
    with pytest.raises(RuntimeError, match="broke .* certificates, first that of test image [0-9]"):
        cll.run(params, tmp_path, progress=False)
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "radii.npz").exists()
    monkeypatch.undo()
    finished = cll.run(cll.load_params(ATTACKED), tmp_path, progress=False)
    monkeypatch.setattr(experiment.evaluate, "autoattack_curve", all_broken)
    with pytest.raises(RuntimeError, match="please report this bug"):
        cll.run(params, tmp_path, progress=False)
    assert json.loads((tmp_path / "result.json").read_text()) == finished


def test_without_the_attack_library_a_run_says_so_and_gains_the_attack_later(tmp_path, monkeypatch):
    params = cll.load_params(
        ATTACKED | {"epochs": 1, "attack": {"images": 5, "version": "apgd-ce"}}
    )
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyautoattack", None)
        with pytest.warns(UserWarning, match="digits was not attacked: .*pip install"):
            record = cll.run(params, tmp_path, progress=False)
    assert "attack" not in record
    assert cll.run(params, tmp_path, progress=False)["attack"]["images"] == 5


@pytest.mark.parametrize(
    "loss, K_hf",
    [
        ({"name": "CE"}, 1.0),
        ({"name": "Hinge"}, 1.0),
        ({"name": "AOL", "temperature": 0.5}, 2.0),
        ({"name": "GloRo", "epsilon": 0.1, "temperature": 4.0}, 0.25),
        ({"name": "SOC", "gamma": 0.1}, 1.0),
        ({"name": "Local-Lip-B", "epsilon": 0.1}, 1.0),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else None,
)
def test_losses_with_and_without_a_margin_leave_a_whole_result(loss, K_hf, tmp_path):
    p = cll.load_params(SHORT | {"loss": loss, "local": True, "train_size": 100, "test_size": 50})
    record = cll.run(p, tmp_path, progress=False)
    assert record["method"] == loss["name"] and record["epsilon"] == loss.get("epsilon")
    assert record["p"] is None and record["K_hf"] == pytest.approx(K_hf * record["K_f"])
    assert record["ranks"] == 1 and "size" not in record
    assert set(record["cra"]) == {"0.15"} | ({"0.1"} if "epsilon" in loss else set())
    for name, cra in record["cra_local"].items():
        assert cra >= record["cra"][name]
    radii = np.load(tmp_path / "radii.npz")
    assert (radii["radius_local"] >= radii["radius"]).all()
    curve = pd.read_csv(tmp_path / "curve.csv")
    assert curve["epsilon"].isna().all() == ("epsilon" not in loss)
    assert cll.lipschitz_matrix(load_model(tmp_path)).max().item() == record["K_f"]


def test_result_holds_both_columns_and_its_origin(tmp_path):
    record = cll.run(cll.load_params(SHORT, seed=4), tmp_path, progress=False)
    assert record == json.loads((tmp_path / "result.json").read_text())
    assert record["seed"] == 4 and record["data"] == "two_moons" and record["profile"] == "smoke"
    assert record["K_f"] >= record["K_f_paper_style"] > 0
    assert record["cra"]["0.15"] <= record["cra_paper_style"]["0.15"] <= record["clean"]
    assert record["K_hf"] == pytest.approx(np.log((2 - 0.01) / 0.01) / 0.15)
    assert 0 < record["tightness"] <= record["tightness_paper_style"] <= 1
    assert record["train_cra"]["0.15"] <= record["train_clean"]
    for key in ("device", "versions", "git_revision", "date", "seconds", "params_hash"):
        assert record[key] not in (None, "")
    radii = np.load(tmp_path / "radii.npz")
    cra = np.mean(radii["correct"] & (radii["radius"] > 0.15))
    assert cra == record["cra"]["0.15"]


def test_saved_network_certifies_to_the_saved_numbers(tmp_path):
    p = cll.load_params(SHORT)
    record = cll.run(p, tmp_path, progress=False)
    net = load_model(tmp_path)
    assert cll.lipschitz_matrix(net).max().item() == record["K_f"]
    frame = cll.certify(net, cll.experiment.load_dataset(p), radii=(0.15,))
    assert np.array_equal(frame["radius"], np.load(tmp_path / "radii.npz")["radius"])


def test_weights_of_version_0_2_are_read_in_their_order(tmp_path):
    """Also those of snapshots. The rows of each layer before MaxMin lay 2i beside 2i + 1."""
    p = cll.load_params(SHORT | {"snapshots": [2]})
    cll.run(p, tmp_path, progress=False)
    dataset, path = cll.experiment.load_dataset(p), tmp_path / "checkpoint.safetensors"
    net, tensors = load_model(tmp_path), load_file(path)
    for name in tensors:
        if name.startswith("body.") and name.endswith(("weight", "bias")):
            halves = tensors[name].chunk(2)
            tensors[name] = torch.stack(halves, 1).flatten(0, 1).contiguous()
    for old in (path, tmp_path / "snapshot-2.safetensors"):
        save_file(tensors, old)
    ((epoch, snapshot),) = load_snapshots(p, dataset, tmp_path)
    for other in (load_model(tmp_path), snapshot):
        for k, t in net.state_dict().items():
            assert torch.equal(other.state_dict()[k], t)
    assert epoch == 2


def test_finished_run_is_read_and_changed_parameters_are_kept_apart(tmp_path):
    first = cll.run(cll.load_params(SHORT), tmp_path, progress=False)
    assert cll.run(cll.load_params(SHORT), tmp_path, progress=False) == first  # same date
    other = cll.run(cll.load_params(SHORT | {"epochs": 4}), tmp_path, progress=False)
    assert other["params_hash"] != first["params_hash"]
    kept = list(tmp_path.glob("previous-*/result.json"))
    assert [json.loads(k.read_text()) for k in kept] == [first]


def test_run_all_puts_each_parameter_set_in_its_own_folder(tmp_path):
    runs = [cll.load_params(SHORT, seed=s) for s in (1, 2)]
    records = cll.experiment.run_all([*runs, runs[0]], tmp_path, progress=False)
    assert [r["seed"] for r in records] == [1, 2, 1]  # one asked for twice is run once
    assert "seed1" in run_dir(runs[0], tmp_path).name
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 2
    relabelled = cll.experiment.run_all(
        [cll.load_params(SHORT, seed=1, label="my moons")], tmp_path, progress=False
    )[0]
    assert relabelled["data"] == "my moons" and relabelled["date"] == records[0]["date"]
    on_disk = json.loads((run_dir(runs[0], tmp_path) / "result.json").read_text())
    assert on_disk == records[0]  # to read is not to write


def test_damaged_weights_and_results_are_named(tmp_path):
    cll.run(cll.load_params(SHORT), tmp_path, progress=False)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="damaged weights .*checkpoint.safetensors"):
        load_model(tmp_path)
    (tmp_path / "result.json").write_text('{"params_hash": ')
    with pytest.raises(ValueError, match="damaged result .*result.json"):
        cll.run(cll.load_params(SHORT), tmp_path, progress=False)


def test_experiment_params_multiply_files_by_seeds():
    files = [parameter_file.read(path) for path in sorted(ROOT.glob("params/table2/*.yaml"))]
    runs = experiment_params("table2", "paper")
    expected = [(f["name"], seed) for f in files for seed in f["profiles"]["paper"]["seeds"]]
    assert [(r.name, r.seed) for r in runs] == expected
    runs = experiment_params("table2", "quick", seeds=[3, 5], data="npz:x.npz", label="mine")
    assert len(runs) == 2 * len(files) and {r.seed for r in runs} == {3, 5}
    assert {(r.data, r.label) for r in runs} == {("npz:x.npz", "mine")}
    assert {r.data for r in experiment_params("table2", "smoke")} == {"digits"}


def test_a_base_alone_says_what_is_missing():
    with pytest.raises(ValueError, match=r"^params/moons.yaml: name, loss missing: write it, or"):
        cll.load_params("params/moons.yaml")


def test_a_file_has_a_run_for_each_of_its_seeds():
    file = "params/slack_sweep/moons-CLL-p0.01.yaml"
    runs = experiment.load_runs(file, "paper")
    assert [run.seed for run in runs] == [1, 2, 3, 4, 5]
    assert runs[0] == cll.load_params(file, "paper")
    assert [run.seed for run in experiment.load_runs(file, "paper", [7])] == [7]
    assert experiment.load_runs(MOONS, seed=3) == [cll.load_params(MOONS, seed=3)]
    assert [*numbers("4"), *numbers("1-3")] == [4, 1, 2, 3]
    for text in ("3-1", "x", "1-", ""):
        with pytest.raises(ValueError):
            numbers(text)


def test_command_line_trains_and_explains(tmp_path):
    path = tmp_path / "moons.yaml"
    path.write_text(yaml.safe_dump(SHORT))
    command = [sys.executable, "-m", "cll", str(path), "--outputs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "CRA 0.15:" in done.stdout
    path.write_text(yaml.safe_dump(SHORT | {"epochss": 3}))
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0 and "nearest: 'epochs'" in done.stderr


def test_network_and_data_must_fit(tmp_path):
    with pytest.raises(ValueError):
        cll.run(cll.load_params(DIGITS | {"input_shape": [2]}), tmp_path, progress=False)


def test_threads_do_not_change_a_certificate(tmp_path):
    """float64 logits differ by rounding only, far below the radii's printed digits."""
    p = cll.load_params(SHORT)
    cll.run(p, tmp_path, progress=False)
    dataset, net, threads = (
        cll.experiment.load_dataset(p),
        load_model(tmp_path),
        torch.get_num_threads(),
    )
    one = cll.certify(net, dataset)["radius"]
    torch.set_num_threads(2)
    two = cll.certify(net, dataset)["radius"]
    torch.set_num_threads(threads)
    assert np.allclose(one, two, rtol=1e-10)


def test_a_run_of_an_earlier_certifier_is_certified_anew_when_asked(tmp_path, monkeypatch):
    """From its weights, without training; where and when it was trained stays on record."""
    params = cll.load_params(SHORT)
    folder = run_dir(params, tmp_path)
    first = cll.run(params, folder, progress=False)
    path = folder / "result.json"
    old = json.loads(path.read_text()) | {"certifier": 1, "K_f": 1.0, "device": "a GPU"}
    del old["trained"]
    path.write_text(json.dumps(old))
    monkeypatch.setattr(experiment.runs, "train", lambda *a, **k: pytest.fail("trained again"))
    for read in (
        lambda: cll.run(params, folder, progress=False),
        lambda: cll.run_all([params], tmp_path, progress=False),
    ):
        with pytest.raises(ValueError, match="by an earlier version .* --recertify"):
            read()
    assert json.loads(path.read_text()) == old
    again = experiment.recertify(params, folder, progress=False)
    assert (again["K_f"], again["cra"]) == (first["K_f"], first["cra"])
    assert again["certifier"] == CERTIFIER and again["device"] == first["device"]
    assert again["trained"]["device"] == "a GPU"
    assert json.loads(path.read_text()) == again == cll.run(params, folder, progress=False)
    with pytest.raises(FileNotFoundError, match="no finished run of moons"):
        experiment.recertify(params, tmp_path / "nowhere")


def test_a_run_certified_elsewhere_says_where_it_trained(tmp_path, monkeypatch):
    """Trained on a GPU, and certified from its last checkpoint on a CPU."""
    params = cll.load_params(SHORT)
    with monkeypatch.context() as m:
        m.setattr(experiment.checkpoints, "device_name", lambda device: "a GPU")
        m.setattr(experiment.runs, "evaluate", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cll.run(params, tmp_path, progress=False)
    record = cll.run(params, tmp_path, progress=False)
    assert record["trained"]["device"] == "a GPU" and record["device"].startswith("cpu")


class TestSnapshots:
    """Weights of some epochs, certified when training is done."""

    RUN = SHORT | {"snapshots": [1, 3]}

    def test_the_last_one_is_the_result(self, tmp_path):
        params = experiment.load_params(self.RUN)
        result = experiment.run(params, tmp_path, progress=False)
        first, last = result["snapshots"]
        assert (first["epoch"], last["epoch"]) == (1, 3)
        for key in ("clean", "cra", "K_f", "K_lower", "tightness"):
            assert last[key] == result[key], key
        assert first["K_f"] != last["K_f"]
        assert not list(tmp_path.glob("snapshot*"))

    def test_they_do_not_change_the_training(self, tmp_path):
        runs = [experiment.load_params(self.RUN), experiment.load_params(SHORT)]
        with_them, without = (
            experiment.run(run, tmp_path / str(i), progress=False) for i, run in enumerate(runs)
        )
        assert with_them["K_f"] == without["K_f"] and with_them["cra"] == without["cra"]
        assert "snapshots" not in without and runs[0].hash() != runs[1].hash()

    def test_stacked_runs_keep_their_own(self, tmp_path):
        runs = [experiment.load_params(self.RUN, seed=s) for s in (1, 2)]
        for result in experiment.run_all(runs, tmp_path, progress=False, stack=2):
            assert result["trained_together"] == 2
            assert result["snapshots"][-1]["K_f"] == result["K_f"]

    def test_an_epoch_that_never_comes_is_an_error(self):
        with pytest.raises(ValueError, match="there is no epoch 4, epochs = 3"):
            experiment.load_params(SHORT | {"snapshots": [1, 4]})


def test_sized_as_another_keeps_the_loss_and_reads_finished_runs():
    small = experiment.load_params(DIGITS)
    table = experiment.load_params(DIGITS | {"attack": {"images": 10}, "name": "row"})
    (same,) = experiment.sized_as([small], [table])
    assert same.hash() == table.hash() and same.attack is None
    longer = table.model_copy(update={"epochs": 9, "seed": 3})
    (resized,) = experiment.sized_as([small], [longer])
    assert (resized.epochs, resized.seed, resized.name) == (small.epochs, 3, "row")


@pytest.mark.parametrize("name", ["figure5", "front", "lambda_sweep"])
def test_sweeps_share_the_finished_runs_of_table2(name):
    """In quick sweeps are shorter than tables, and a loss may have a rate of its own."""
    sweep = experiment.experiment_params(name, "paper")
    table = experiment.experiment_params("table2", "paper", seeds=[1])
    rows = [run for run in table if run.row in ("T2-03", "T2-05")]
    shared = experiment.sized_as(sweep, rows)
    assert [run.hash() for run in shared] == [run.hash() for run in rows]
    quick = experiment.experiment_params(name, "quick")
    sized = experiment.sized_as(quick, experiment.experiment_params("table2", "quick"))
    rates = {run.loss.name: run.optimizer.lr for run in quick}
    assert {run.optimizer.lr for run in sized if run.row == "T2-03"} == {
        rates.get("GloRo", rates["CLL"])
    }


def test_outputs_on_google_drive(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='outputs = "drive" is for Google Colab: name a folder'):
        experiment.outputs_dir("drive", "quick")
    mounted = []

    def mount(where):
        mounted.append(where)
        (tmp_path / "MyDrive").mkdir()

    colab = types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=mount)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(experiment.store, "DRIVE", tmp_path)
    for _ in range(2):  # asks once
        folder = experiment.outputs_dir("drive", "quick")
        assert folder == tmp_path.resolve() / "MyDrive" / "cll" / "quick"
    assert mounted == [str(tmp_path)]
    assert "drive" not in str(experiment.outputs_dir("", "quick"))  # opt-in


def test_a_K_that_two_inputs_refute_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.evaluate, "lipschitz_lower_bound", lambda *a, **k: 1e6)
    with pytest.raises(RuntimeError, match="moved apart .* times, but the guaranteed K"):
        cll.run(SHORT, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "result.json").exists()
