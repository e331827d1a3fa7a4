from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from training.distributed import World
from training.loop import train
from training.randomness import seed_for
from training.recipes import Recipe, resolved
from zoo.errors import BadInput
from zoo.weights.checkpoint import network_state

MakeRecipe = Callable[..., Recipe]
Launch = Callable[..., "subprocess.Popen[str]"]

CHILD = """
import json, os, pathlib
import safetensors.torch
from training.loop import train
from training.randomness import seed_for
from training.recipes import from_resolved
from zoo.weights.checkpoint import network_state

for name, recipe, port in json.loads({jobs!r}):
    os.environ["MASTER_PORT"] = str(port)
    folder = pathlib.Path({folder!r}) / name
    model = train(from_resolved(recipe), folder / "run", device="cpu")
    weights = {{key: tensor.contiguous() for key, tensor in network_state(model).items()}}
    safetensors.torch.save_file(weights, folder / ("rank" + os.environ["RANK"]))
"""


@pytest.fixture(scope="module")
def recipes(make_recipe: MakeRecipe) -> dict[str, Recipe]:
    plain = make_recipe(
        "standard-resnet20-cifar10-cpu",
        "network=lenet",  # without BatchNorm, whose statistics would be those of half a batch
        "network_options={}",
        "phases.0.epochs=1",
        "phases.0.learning_rate=0.02",
        "precision=fp32",
        "channels_last=false",
    )
    short = ("phases.0.epochs=1", "phases.1.epochs=1", "phases.1.objective.distillation_steps=2")
    return {"plain": plain, "gated": make_recipe("smoke", *short)}


@pytest.fixture(scope="module")
def trained(recipes: dict[str, Recipe], launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train each recipe on two ranks, in the environment that `torchrun` sets; each rank leaves its weights."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = [(name, resolved(recipe), free_port()) for name, recipe in recipes.items()]
    code = CHILD.format(jobs=json.dumps(jobs), folder=str(folder))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    processes = [launch(code, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def weights_of_ranks(folder: Path) -> list[dict[str, Tensor]]:
    return [safetensors.torch.load_file(folder / f"rank{rank}") for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_train_as_one_process_on_the_whole_batch(
    recipes: dict[str, Recipe], trained: Path, tmp_path: Path
) -> None:
    first, second = weights_of_ranks(trained / "plain")
    alone = network_state(train(recipes["plain"], tmp_path / "alone", device="cpu"))
    assert first.keys() == alone.keys()
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-5)
    torch.manual_seed(seed_for(recipes["plain"].seed, "initialise"))
    start = network_state(recipes["plain"].architecture.build())
    assert not torch.allclose(alone["conv1.weight"], start["conv1.weight"], atol=1e-3), "the run must have moved"


@pytest.mark.slow
def test_two_ranks_keep_one_random_gated_network(trained: Path) -> None:
    first, second = weights_of_ranks(trained / "gated")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert tensor.isfinite().all()
    assert {file.name for file in (trained / "gated/run").iterdir()} >= {"recipe.json", "log.csv", "last.safetensors"}


def test_ranks_share_a_batch_without_gap_or_overlap() -> None:
    shares = [list(range(12)[World(rank, 3).share(12)]) for rank in range(3)]
    assert [index for share in shares for index in share] == list(range(12))
    assert {len(share) for share in shares} == {4}
    assert World().share(7) == slice(0, 7)


def test_a_batch_that_cannot_be_shared_evenly_is_refused_with_both_numbers() -> None:
    with pytest.raises(BadInput, match="batch_size 10 cannot be shared evenly by 3 processes; choose a multiple"):
        World(0, 3).share(10)


def test_without_torchrun_the_world_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.join("cpu")
    assert world == World(0, 1, 0)
    assert world.leads
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.grad.clone()
    world.average(model)
    world.wait()
    world.leave()
    assert torch.equal(model.weight.grad, before)


def test_only_the_first_rank_leads() -> None:
    assert [World(rank, 3).leads for rank in range(3)] == [True, False, False]
