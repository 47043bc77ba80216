"""Files over their base: what is merged, replaced and refused; and the bases in params/."""

from pathlib import Path

import pytest
import yaml

import cll
from cll.experiment import parameter_file

ROOT = Path(__file__).resolve().parent.parent
BASE = """\
data: digits
model: 4C3F
input_shape: [1, 8, 8]
loss: {name: CLL, epsilon: 0.3, p: 0.3}
optimizer: {lr: 2e-3, milestones: [10, 20]}
epochs: 4
profiles:
  quick: {epochs: 3, seeds: [1, 2], loss: {p: 0.1}}
  smoke: {epochs: 2, optimizer: {milestones: [5]}}
"""


@pytest.fixture
def files(tmp_path):
    """Writes files, {path: text}, and returns the folder that holds them."""

    def write(texts):
        for name, text in texts.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


@pytest.fixture
def load(files):
    """Parameters of a profile from lines over BASE."""

    def read(lines, profile):
        folder = files({"base.yaml": BASE, "a/run.yaml": f"base: ../base.yaml\nname: x\n{lines}"})
        return cll.load_params(folder / "a" / "run.yaml", profile)

    return read


class TestAFileOverItsBase:
    def test_takes_what_it_does_not_say(self, load):
        params = load("", "paper")
        assert (params.name, params.model, params.epochs) == ("x", "4C3F", 4)
        assert params.optimizer.milestones == (10, 20)

    def test_changes_single_keys_of_a_mapping(self, load):
        loss = load("loss: {epsilon: 0.5}", "paper").loss
        assert (loss.name, loss.epsilon, loss.p) == ("CLL", 0.5, 0.3)

    def test_replaces_a_list(self, load):
        optimizer = load("optimizer: {milestones: [7]}", "paper").optimizer
        assert (optimizer.lr, optimizer.milestones) == (2e-3, (7,))

    def test_takes_a_key_back_with_null(self, load):
        assert load("tightness: null", "paper").tightness is None

    def test_merges_its_profiles(self, load):
        lines = "profiles: {quick: {loss: {epsilon: 0.5}}, smoke: {optimizer: {lr: 1}}}"
        quick, smoke = load(lines, "quick"), load(lines, "smoke")
        assert (quick.epochs, quick.loss.epsilon, quick.loss.p) == (3, 0.5, 0.1)
        assert (smoke.optimizer.lr, smoke.optimizer.milestones) == (1, (5,))

    def test_its_own_keys_stand_below_the_profiles_of_the_base(self, load):
        """A profile is applied last, whoever wrote it."""
        assert load("epochs: 9", "smoke").epochs == 2
        assert load("epochs: 9", "paper").epochs == 9

    def test_a_loss_of_another_name_replaces_it_in_all_profiles(self, load):
        for profile in ("paper", "quick"):
            loss = load("loss: {name: GloRo, epsilon: 0.2}", profile).loss
            assert loss.model_dump(exclude_defaults=True) == {"name": "GloRo", "epsilon": 0.2}

    def test_a_loss_of_the_same_name_changes_what_it_says(self, load):
        assert load("loss: {name: CLL, p: 0.2}", "paper").loss.epsilon == 0.3
        assert load("loss: {name: CLL, p: 0.2}", "quick").loss.p == 0.1

    def test_a_profile_and_an_override_replace_a_loss_too(self, load):
        assert load("profiles: {smoke: {loss: {name: CE}}}", "smoke").loss.name == "CE"
        source = {"base": "../moons-CLL.yaml", "name": "x", "loss": {"p": 0.1}}
        assert cll.load_params(source, "smoke", loss={"name": "CE"}).loss.name == "CE"

    def test_an_optimizer_of_another_name_keeps_rate_and_schedule(self, load):
        optimizer = load("optimizer: {name: SGD}", "paper").optimizer
        assert (optimizer.name, optimizer.lr, optimizer.milestones) == ("SGD", 2e-3, (10, 20))

    def test_a_base_has_a_base_relative_to_its_own_folder(self, files):
        folder = files(
            {
                "base.yaml": BASE,
                "b/middle.yaml": "base: ../base.yaml\nloss: {p: 0.2}\nepochs: 6",
                "a/run.yaml": "base: ../b/middle.yaml\nname: x\nloss: {epsilon: 0.1}",
            }
        )
        params = cll.load_params(folder / "a" / "run.yaml", "paper")
        assert (params.loss.epsilon, params.loss.p, params.epochs) == (0.1, 0.2, 6)

    def test_a_mapping_has_its_base_in_params(self):
        """`papermill -f FILE` hands over what a file says, not where it stands."""
        path = ROOT / "params" / "figure4" / "moons-CLL-eps0.15.yaml"
        assert cll.load_params(yaml.safe_load(path.read_text()), "smoke") == cll.load_params(
            path, "smoke"
        )


class TestABaseThatIsNone:
    @pytest.mark.parametrize(
        ("base", "message"),
        [
            (
                "nowhere.yaml",
                "base = 'nowhere.yaml': no file .*nowhere.yaml: write a path relative",
            ),
            ("''", "base = '': no file .*: write a path relative to the folder "),
            ("..", "base = '..': no file .*: write a path relative to the folder "),
            ("3", "base = 3 is not text: write the path of a parameter file"),
            ("null", "base = None is not text: write the path"),
            ("[a.yaml]", r"base = \['a.yaml'\] is not text: write the path"),
            ("run.yaml", "base = 'run.yaml' is a circle, .* stands on this file: leave one"),
        ],
    )
    def test_is_refused_in_one_line(self, files, base, message):
        folder = files({"run.yaml": f"base: {base}\nname: x"})
        with pytest.raises(ValueError, match=rf"^[^\n]*run\.yaml: {message}[^\n]*$"):
            cll.load_params(folder / "run.yaml")

    def test_a_circle_of_several_is_named_where_it_closes(self, files):
        texts = {"run.yaml": "base: a.yaml", "a.yaml": "base: b.yaml", "b.yaml": "base: ./a.yaml"}
        folder = files(texts)
        with pytest.raises(ValueError, match=r"^\S*b.yaml: base = './a.yaml' is a circle"):
            parameter_file.read(folder / "run.yaml")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("epochs: 010", "base.yaml, line 1: epochs = 010 would be misread"),
            ("epochs: 1\nepochs: 2", "base.yaml, line 2: the key epochs stands twice"),
            ("- 1", "base.yaml: a parameter file is a mapping"),
            ("a: [1", "base.yaml: not valid YAML"),
        ],
    )
    def test_is_read_as_strictly_as_the_file(self, files, text, message):
        folder = files({"base.yaml": text, "run.yaml": "base: base.yaml\nname: x"})
        with pytest.raises(ValueError, match=message):
            cll.load_params(folder / "run.yaml")


PROFILES = {"smoke.yaml", "quick.yaml", "paper.yaml"}
BASES = [p for p in sorted((ROOT / "params").glob("*.yaml")) if p.name not in PROFILES]
ALL_FILES = sorted((ROOT / "params").glob("**/*.yaml"))


def test_every_base_serves_at_least_two_files_and_is_no_run():
    named = []
    for path in ALL_FILES:
        if base := yaml.safe_load(path.read_text()).get("base"):
            named.append((path.parent / base).resolve())
    assert set(named) == {path.resolve() for path in BASES}
    for path in BASES:
        assert named.count(path.resolve()) >= 2, path
        assert not {"name", "row", "seed"} & parameter_file.read(path).keys(), path


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda p: p.stem)
def test_every_file_begins_with_what_it_is(path):
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", BASES, ids=lambda p: p.stem)
def test_every_base_says_how_it_is_used(path):
    assert f"`base: ../{path.name}`" in path.read_text().splitlines()[1]
