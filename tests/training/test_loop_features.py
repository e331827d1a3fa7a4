"""What the loop offers every method: averaged weights, early stopping, clipping, schedules, augmentation."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from training import loop
from training.loop import train
from training.objectives import Awp, Batch, Objective, PgdAt, Standard, Step
from training.recipes import Phase, Recipe
from training.run import load_run
from zoo.data import datasets
from zoo.errors import BadInput, UnknownName
from zoo.gates.derive import Ensemble
from zoo.weights import checkpoint
from zoo.weights.checkpoint import network_state

MakeRecipe = Callable[..., Recipe]
NAME = "standard-resnet20-cifar10-cpu"


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def tensors(run_dir: Path, name: str = "last.safetensors") -> dict[str, torch.Tensor]:
    return checkpoint.load(run_dir / name)[0]


@pytest.fixture
def make(make_recipe: MakeRecipe) -> MakeRecipe:
    return lambda *settings: make_recipe(NAME, "phases.0.epochs=2", "train_images=68", "validate_every=1", *settings)


# ---- averaged weights ------------------------------------------------------------------------------------------------


def test_the_average_of_one_step_is_the_weights_and_of_more_lies_between(make: MakeRecipe, tmp_path: Path) -> None:
    train(make("ema=0.5"), tmp_path / "run", device="cpu")
    stored = tensors(tmp_path / "run")
    plain = tensors_of_plain_run(make, tmp_path)
    assert {name for name in stored if name.startswith("ema/")} == {
        name.replace("model/", "ema/") for name in stored if name.startswith("model/")
    }
    for name, tensor in plain.items():
        assert torch.equal(stored[name], tensor), "the average is beside the training, not in it"
    assert not torch.equal(stored["ema/conv1.weight"], stored["model/conv1.weight"])


def tensors_of_plain_run(make: MakeRecipe, tmp_path: Path) -> dict[str, torch.Tensor]:
    train(make(), tmp_path / "plain", device="cpu")
    return {name: tensor for name, tensor in tensors(tmp_path / "plain").items() if name.startswith("model/")}


def test_the_average_follows_its_recursion(make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD, *arguments: Any) -> Any:
        result = step(self, *arguments)
        seen.append(self.param_groups[0]["params"][0].detach().clone())
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    network = train(make("ema=0.75"), tmp_path, device="cpu")
    expected = seen[0]
    for weights in seen[1:]:
        expected = 0.75 * expected + 0.25 * weights
    torch.testing.assert_close(next(network.parameters()).detach(), expected)


def test_what_is_returned_loaded_and_kept_as_best_is_the_average(make: MakeRecipe, tmp_path: Path) -> None:
    network = train(make("ema=0.9"), tmp_path, device="cpu")
    loaded, _, _ = load_run(tmp_path)
    best, _, _ = load_run(tmp_path, which="best")
    stored = tensors(tmp_path)
    assert torch.equal(network_state(network)["conv1.weight"], stored["ema/conv1.weight"])
    assert torch.equal(network_state(loaded)["conv1.weight"], stored["ema/conv1.weight"])
    assert network_state(best).keys() == network_state(loaded).keys()
    assert not any(name.startswith("ema/") for name in tensors(tmp_path, "best.safetensors"))


@pytest.mark.parametrize(
    "settings",
    [
        ("ema=0.9",),
        ("ema=0.9", "candidates=2"),
        ("phases.0.optimizer=adam", "phases.0.learning_rate=0.001"),
        ("members=2", "phases.0.clip=0.5", "phases.0.schedule=cyclic"),
        ("augmentation=autoaugment",),
        ("augmentation=augmix", "phases.0.objective.consistency=12"),
        ("patience=5",),
    ],
    ids=lambda settings: ",".join(settings),
)
def test_every_feature_of_the_loop_resumes_bit_for_bit(
    settings: tuple[str, ...], make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(*settings)
    train(recipe, tmp_path / "whole", device="cpu")
    calls, augmented = itertools.count(), loop.augmented

    class Killed(Exception):
        pass

    def dying(*arguments: Any, **options: Any) -> list[torch.Tensor]:
        if next(calls) == 7:  # a trial step, four steps of the first epoch, two of the second
            raise Killed
        return augmented(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "augmented", dying)
        with pytest.raises(Killed):
            train(recipe, tmp_path / "torn", device="cpu", checkpoint_seconds=0)
    train(recipe, tmp_path / "torn", resume=True, device="cpu")
    whole, torn = tensors(tmp_path / "whole"), tensors(tmp_path / "torn")
    assert whole.keys() == torn.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, torn[name]), name


# ---- early stopping --------------------------------------------------------------------------------------------------


@pytest.fixture
def held_out(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that fixes what the validations will find: clean and robust accuracy, None for an interrupt."""

    def fix(*found: tuple[float, float] | None) -> None:
        results = iter(found)

        def measured(*_: object) -> dict[str, float]:
            result = next(results)
            if result is None:
                raise KeyboardInterrupt
            return {"held_out_clean": result[0], "held_out_robust": result[1]}

        monkeypatch.setattr(loop, "held_out_accuracy", measured)

    return fix


def test_a_run_stops_when_patience_ends_and_keeps_the_best(
    make: MakeRecipe, held_out: Callable[..., None], tmp_path: Path
) -> None:
    held_out((0.2, 0.1), (0.6, 0.1), (0.5, 0.1), (0.6, 0.1), (0.9, 0.1))
    train(make("phases.0.epochs=5", "patience=2"), tmp_path, device="cpu")
    assert [row["held_out_clean"] for row in rows(tmp_path)] == ["0.2", "0.6", "0.5", "0.6"]
    _, header = checkpoint.load(tmp_path / "best.safetensors")
    assert header["position"]["best"] == 0.6
    assert header["position"]["epoch"] == 2


def test_a_stopped_run_is_finished_and_resuming_it_trains_no_further(
    make: MakeRecipe, held_out: Callable[..., None], tmp_path: Path
) -> None:
    held_out((0.5, 0.1), (0.4, 0.1))
    recipe = make("phases.0.epochs=5", "patience=1")
    train(recipe, tmp_path, device="cpu")
    before = (tmp_path / "last.safetensors").read_bytes()
    train(recipe, tmp_path, resume=True, device="cpu")
    assert (tmp_path / "last.safetensors").read_bytes() == before
    assert len(rows(tmp_path)) == 2


def test_patience_survives_an_interruption(make: MakeRecipe, held_out: Callable[..., None], tmp_path: Path) -> None:
    held_out((0.5, 0.1), (0.4, 0.1), None, (0.4, 0.1), (0.9, 0.1))
    recipe = make("phases.0.epochs=5", "patience=2")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path, device="cpu")
    train(recipe, tmp_path, resume=True, device="cpu")
    assert len(rows(tmp_path)) == 3, "one stale validation before the interruption, one after it"


def test_a_collapse_of_robust_accuracy_stops_the_run_at_once(
    make: MakeRecipe, held_out: Callable[..., None], tmp_path: Path
) -> None:
    held_out((0.5, 0.30), (0.5, 0.45), (0.6, 0.40), (0.9, 0.24), (0.9, 0.5))
    recipe = make("phases.0.epochs=5", "selection=robust", "collapse=0.2")
    train(recipe, tmp_path, device="cpu")
    assert [row["held_out_robust"] for row in rows(tmp_path)] == ["0.3", "0.45", "0.4", "0.24"]
    assert checkpoint.load(tmp_path / "best.safetensors")[1]["position"]["epoch"] == 2


def test_only_the_last_phase_is_judged(make: MakeRecipe, held_out: Callable[..., None], tmp_path: Path) -> None:
    held_out((0.9, 0.9), (0.5, 0.1), (0.6, 0.1))
    recipe = make("patience=2", "collapse=0.5")
    first = replace(recipe.phases[0], epochs=1)
    train(replace(recipe, phases=(first, replace(first, epochs=2))), tmp_path, device="cpu")
    assert len(rows(tmp_path)) == 3
    assert checkpoint.load(tmp_path / "best.safetensors")[1]["position"]["best"] == 0.6


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_gradients_are_scaled_down_to_the_clip_and_short_ones_left_alone(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD, *arguments: Any) -> Any:
        found = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(found)))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    train(make(), tmp_path / "free", device="cpu")
    free, norms[:] = list(norms), []
    limit = sorted(free)[len(free) // 2]
    train(make(f"phases.0.clip={limit}"), tmp_path / "clipped", device="cpu")
    assert max(free) > 1.05 * limit
    assert max(norms) <= 1.001 * limit
    assert norms[0] == pytest.approx(min(free[0], limit), rel=1e-3)


def test_adam_keeps_its_moments_and_counts_its_steps(make: MakeRecipe, tmp_path: Path) -> None:
    train(make("phases.0.optimizer=adam", "phases.0.learning_rate=0.001"), tmp_path, device="cpu")
    stored = tensors(tmp_path)
    assert float(stored["optimizer/step/conv1.weight"]) == 8  # 48 images in batches of 12, twice
    assert stored["optimizer/exp_avg_sq/conv1.weight"].shape == stored["model/conv1.weight"].shape


class Recording(Standard):
    """Standard training that remembers what it was shown."""

    seen: ClassVar[list[Batch]] = []

    def accumulate(self, model: torch.nn.Module, batches: list[Batch], step: Step) -> dict[str, torch.Tensor]:
        self.seen.extend(batches)
        return super().accumulate(model, batches, step)


@pytest.mark.parametrize("replays", [1, 3])
def test_a_replayed_batch_is_the_very_same_and_the_next_one_another(
    replays: int, make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recording, "replays", replays)
    Recording.seen.clear()
    recipe = replace(make(), phases=(Phase(objective=Recording(), epochs=1, milestones=()),))
    train(recipe, tmp_path, device="cpu")
    shown = [batch.images for batch in Recording.seen[1:]]  # without the trial step
    assert len(shown) == 4 * replays
    for first in range(0, len(shown), replays):
        assert all(torch.equal(shown[first], again) for again in shown[first : first + replays])
        assert first == 0 or not torch.equal(shown[first], shown[first - 1])


def test_the_augmentation_of_a_recipe_is_what_its_images_went_through(make: MakeRecipe, tmp_path: Path) -> None:
    for augmentation in ("none", "crop_flip", "augmix"):
        Recording.seen.clear()
        recipe = replace(
            make(f"augmentation={augmentation}"), phases=(Phase(objective=Recording(), epochs=1, milestones=()),)
        )
        train(recipe, tmp_path / augmentation, device="cpu")
        originals = {
            image.numpy().tobytes() for image in datasets.as_float(datasets.load(recipe.dataset, "train").pixels)
        }
        shown = [image.numpy().tobytes() for batch in Recording.seen for image in batch.images.contiguous()]
        untouched = sum(image in originals for image in shown) / len(shown)
        assert untouched == 1 if augmentation == "none" else untouched < 0.2


def test_members_are_trained_validated_and_loaded_as_an_ensemble(make: MakeRecipe, tmp_path: Path) -> None:
    network = train(make("members=3"), tmp_path, device="cpu")
    loaded, architecture, _ = load_run(tmp_path)
    assert isinstance(network, Ensemble)
    assert isinstance(loaded, Ensemble)
    assert len(loaded.members) == architecture.members == 3
    first, second = (network_state(member)["conv1.weight"] for member in list(loaded.members)[:2])
    assert not torch.equal(first, second)
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(network(images), loaded(images))


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("members=2", "candidates=2"), "members=2 and candidates=2"),
        (("ema=1",), "need 0 < ema < 1"),
        (("patience=0",), "patience is 0"),
        (("collapse=20",), "20 points of accuracy"),
        (("patience=2", "held_out=0"), "needs held-out images"),
        (("phases.0.clip=0",), "need clip > 0"),
        (("phases.0.schedule=linear",), "linear"),
        (("phases.0.objective.consistency=12",), "3 views come from augmix"),
        (("augmix_severity=11",), "severity is 1 to 10, got 11"),
        (("validation_eps=8",), "pixels are in"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_sentence(
    settings: tuple[str, ...], message: str, make: MakeRecipe
) -> None:
    with pytest.raises(BadInput, match=message) as refused:
        make(*settings)
    assert "\n" not in str(refused.value)


def test_an_unknown_augmentation_is_refused_with_the_known_ones(make: MakeRecipe) -> None:
    with pytest.raises(UnknownName, match=r"unknown augmentation 'augmax'; did you mean 'augmix'.*crop_flip"):
        make("augmentation=augmax")


def test_an_objective_is_chosen_by_its_name_or_described_in_full(make: MakeRecipe) -> None:
    def chosen(text: str) -> Objective:
        return make(f"phases.0.objective={text}").phases[0].objective

    assert chosen("pgd_at") == PgdAt()
    assert chosen(
        '{"method": "awp", "gamma": 0.02, "inner": {"method": "ews", "inner": {"method": "trades"}}}'
    ).name == ("trades+ews+awp")
    assert make("phases.0.objective=pgd_at", "phases.0.objective.attack.eps=0.1").phases[0].objective == PgdAt(
        attack=replace(PgdAt().attack, eps=0.1)
    )
    for text, message in {
        "magic": "unknown method 'magic'",
        '{"eps": 1}': "is no objective, expected a method",
        '{"method": "trades", "gamma": 1}': "field of Trades 'gamma'",
        '{"method": "awp", "inner": {"method": "adp"}}': "adp does not fit here",
    }.items():
        with pytest.raises((BadInput, UnknownName), match=message):
            chosen(text)


def test_weights_that_collapsed_are_never_the_best_however_accurate_on_clean_images(
    make: MakeRecipe, held_out: Callable[..., None], tmp_path: Path
) -> None:
    held_out((0.6, 0.35), (0.7, 0.4), (0.8, 0.0))
    train(make("phases.0.epochs=5", "collapse=0.2"), tmp_path, device="cpu")
    assert len(rows(tmp_path)) == 3
    assert checkpoint.load(tmp_path / "best.safetensors")[1]["position"]["best"] == 0.7


def test_a_wrapper_leaves_label_smoothing_to_what_is_within() -> None:
    with pytest.raises(BadInput, match=r"set inner\.label_smoothing instead"):
        Awp(label_smoothing=0.1)
