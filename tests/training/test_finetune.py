from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from training import finetune as module
from training.finetune import finetune, finetune_recipe
from training.objectives import Standard
from training.recipes import from_resolved, resolved
from zoo.errors import BadInput, CheckpointError
from zoo.weights.checkpoint import Architecture


@pytest.fixture
def architecture(tiny_dataset: str) -> Architecture:
    return Architecture(network="resnet8", options={"width": 4}, dataset=tiny_dataset)


@pytest.fixture
def network(architecture: Architecture) -> nn.Module:
    return architecture.build().eval()


def state_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_the_recipe_is_that_of_the_released_code(architecture: Architecture) -> None:
    made = finetune_recipe(architecture, 3, seed=5)
    (phase,) = made.phases
    assert phase.objective == Standard()
    assert (phase.epochs, phase.learning_rate, phase.momentum, phase.weight_decay) == (3, 1e-3, 0.9, 1e-4)
    assert phase.milestones == ()
    assert (made.network, made.network_options, made.dataset) == ("resnet8", {"width": 4}, "tiny")
    assert (made.candidates, made.batch_size, made.held_out, made.seed, made.precision) == (1, 128, 0, 5, "fp32")
    assert from_resolved(resolved(made)) == made


def test_a_fine_tuned_network_is_another_one_in_evaluation_mode_on_the_cpu(
    architecture: Architecture, network: nn.Module
) -> None:
    before = state_of(network)
    tuned = finetune(network, architecture, 1)
    assert type(tuned) is type(network)
    assert not any(part.training for part in tuned.modules())
    assert {tensor.device.type for tensor in tuned.state_dict().values()} == {"cpu"}
    assert state_of(network).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(not torch.equal(tuned.state_dict()[name], before[name]) for name, _ in network.named_parameters())


def test_it_starts_from_the_network_that_it_is_given(architecture: Architecture, network: nn.Module) -> None:
    """One step of at most 0.001 * gradient moves no weight far; fresh weights would be elsewhere."""
    tuned = finetune(network, architecture, 1).state_dict()
    for name, parameter in network.named_parameters():
        assert float((tuned[name] - parameter.detach()).abs().max()) < 0.05, name


def test_all_training_images_are_used_and_the_last_epoch_is_kept(
    architecture: Architecture, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, Path]] = []
    honest = module.train

    def watched(recipe: object, run_dir: Path, **options: object) -> nn.Module:
        trained.append((recipe.epochs, run_dir))  # type: ignore[attr-defined]
        result = honest(recipe, run_dir, **options)  # type: ignore[arg-type]
        rows = (run_dir / "log.csv").read_text().splitlines()
        assert [row.split(",")[2] for row in rows[1:]] == ["1", "2"]  # 200 images: one whole batch of 128 per epoch
        assert not (run_dir / "best.safetensors").exists()
        return result

    monkeypatch.setattr(module, "train", watched)
    finetune(network, architecture, 2)
    ((epochs, run_dir),) = trained
    assert epochs == 2
    assert not run_dir.exists()  # nothing is left behind


def test_equal_seeds_give_equal_networks(architecture: Architecture, network: nn.Module) -> None:
    first, again, other = (finetune(network, architecture, 1, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("epochs", [0, -1])
def test_no_epochs_are_refused(epochs: int, architecture: Architecture, network: nn.Module) -> None:
    with pytest.raises(BadInput, match=f"epochs is {epochs}, expected"):
        finetune(network, architecture, epochs)


def test_a_network_of_another_architecture_is_refused(architecture: Architecture, network: nn.Module) -> None:
    other = Architecture(network="resnet8", options={"width": 5}, dataset=architecture.dataset)
    with pytest.raises(CheckpointError, match="these weights belong to another network"):
        finetune(network, other, 1)


def test_all_exits_of_a_multi_exit_network_are_tuned(tiny_dataset: str) -> None:
    options = {"exits": 2, "base": 1, "step": 1, "channels": 4, "growth": 2}
    architecture = Architecture(network="msdnet", options=options, dataset=tiny_dataset)
    network = architecture.build().eval()
    images = torch.rand(4, 3, 16, 16)
    before, after = network(images), finetune(network, architecture, 1)(images)
    assert len(before) == len(after) == 2
    assert all(not torch.allclose(old, new, atol=1e-4) for old, new in zip(before, after, strict=True))
