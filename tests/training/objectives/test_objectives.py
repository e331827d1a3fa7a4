"""What holds for every objective: a new one is tested by standing in the registry."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.loop import train
from training.objectives import OBJECTIVES, Batch, Memory, Objective, Standard, Step
from training.objectives.network import networks_of
from training.objectives.single import jensen_shannon
from training.recipes import Phase, Recipe
from zoo.data import datasets
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate
from zoo.networks import ImageFormat, build, num_exits
from zoo.weights import checkpoint

SMALL = ImageFormat(height=16, width=16)
STEP = Step(seed=0, number=3)

# What a recipe must say for a method that needs it: a small network of the tiny data set (16x16 pixels, 3 classes).
MEETS: dict[str, dict[str, Any]] = {
    "any network": {"network": "resnet8", "network_options": {"width": 4}, "candidates": 2},
    "gates": {"network": "resnet8", "network_options": {"width": 4}, "candidates": 2},
    "several members": {"network": "resnet8", "network_options": {"width": 4}, "members": 2},
    "dropout": {"network": "lenet", "network_options": {"dropout": 0.5}},
    "several exits": {"network": "msdnet", "network_options": {"exits": 2, "base": 2, "channels": 4, "growth": 2}},
    "residual blocks": {"network": "resnet8", "network_options": {"width": 4}},
}


def model_for(needs: str, width: int = 4) -> nn.Module:
    if needs == "several exits":
        return build("msdnet", images=SMALL, exits=2, base=2, channels=4, growth=2)
    if needs == "dropout":
        return build("lenet", images=SMALL, dropout=0.5)
    networks = [build("resnet8", images=SMALL, width=width) for _ in range(2)]
    if needs == "several members":
        return Ensemble(networks)
    if needs == "residual blocks":
        return networks[0]
    rgn = randomly_gate(networks[0], candidates=2)
    for gate in (0, 1):  # statistics that belong to images, for every candidate
        for _ in range(3):
            rgn.train()(torch.rand(8, 3, 16, 16), [gate] * rgn.num_gates)
    return rgn


def cheap(objective: Objective) -> Objective:
    """Return the same method with attacks and distillations of two steps."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(objective):
        value = getattr(objective, field.name)
        if isinstance(value, Objective):
            changes[field.name] = cheap(value)
        elif dataclasses.is_dataclass(value) and any(part.name == "steps" for part in dataclasses.fields(value)):
            changes[field.name] = dataclasses.replace(value, steps=min(2, value.steps))  # type: ignore[type-var,call-arg]
        elif field.name in ("steps", "distillation_steps"):
            changes[field.name] = 2
    return dataclasses.replace(objective, **changes)


@pytest.fixture(params=OBJECTIVES)
def objective(request: pytest.FixtureRequest) -> Objective:
    return cheap(OBJECTIVES[request.param]())


@pytest.fixture
def model(objective: Objective) -> nn.Module:
    return model_for(objective.needs).train()


def make_batches(objective: Objective | None = None, size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)

    def images() -> Tensor:
        return torch.rand(size, 3, 16, 16, generator=generator)

    streams, views = (1, 1) if objective is None else (objective.streams, objective.views)
    return [
        Batch(images(), torch.randint(0, 10, (size,), generator=generator), tuple(images() for _ in range(views - 1)))
        for _ in range(streams)
    ]


def accumulate(objective: Objective, model: nn.Module, batches: list[Batch], step: Step) -> dict[str, Tensor]:
    torch.manual_seed(step.number)  # what the loop does, for dropout
    return objective.accumulate(model, batches, step)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def clean_loss(model: nn.Module, batch: Batch) -> float:
    """Return the cross-entropy on clean images with batch statistics, the mean over networks and exits."""
    losses = []
    with torch.no_grad():
        for network in networks_of(model, STEP):
            several = num_exits(network.module) > 1
            with network.statistics("train_frozen"):
                said = network.exits(batch.images) if several else [network(batch.images)]
            losses += [F.cross_entropy(logits, batch.labels) for logits in said]
    return float(torch.stack(losses).mean())


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_batch_that_comes_again_and_again_is_learnt(objective: Objective, precision: torch.dtype) -> None:
    model = model_for(objective.needs, width=8).train()
    batches = make_batches(objective)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    memory = Memory()
    before = clean_loss(model, batches[0])
    for number in range(50):
        if number % 5 == 0 and clean_loss(model, batches[0]) < 0.6 * before:
            return
        optimizer.zero_grad(set_to_none=True)
        step = Step(seed=0, number=number, precision=precision, batch=number, memory=memory)
        measured = accumulate(objective, model, batches, step)
        assert torch.isfinite(measured["loss"])
        optimizer.step()
    pytest.fail(f"after 50 steps the loss is {clean_loss(model, batches[0]):.3f}, it was {before:.3f}")


def test_an_objective_is_a_function_of_its_step(objective: Objective, model: nn.Module) -> None:
    def run() -> tuple[dict[str, Tensor], float]:
        twin = copy.deepcopy(model)
        loss = accumulate(objective, twin, make_batches(objective), dataclasses.replace(STEP, memory=Memory()))["loss"]
        return gradients(twin), float(loss)

    (first, first_loss), (again, again_loss) = run(), run()
    assert first_loss == again_loss
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_gates_do_not_depend_on_the_rank(objective: Objective, model: nn.Module) -> None:
    touched = []
    for rank in (0, 1):
        twin = copy.deepcopy(model)
        accumulate(objective, twin, make_batches(objective), Step(seed=0, number=3, rank=rank))
        touched.append(gradients(twin).keys())
    assert touched[0] == touched[1]


def test_gradients_are_added_to_those_already_there(objective: Objective, model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    batches = make_batches(objective)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    accumulate(objective, model, batches, dataclasses.replace(STEP, memory=Memory()))
    once = gradients(model)
    assert once
    for parameter in twin.parameters():
        parameter.grad = torch.ones_like(parameter)
    accumulate(objective, twin, batches, dataclasses.replace(STEP, memory=Memory()))
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradient, once.get(name, torch.zeros_like(gradient)) + 1, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in twin.named_parameters()), "only the loop steps"


def test_measurements_are_detached_scalars_and_the_network_is_left_as_it_was(
    objective: Objective, model: nn.Module
) -> None:
    measured = accumulate(objective, model, make_batches(objective), STEP)
    assert "loss" in measured
    assert all(value.ndim == 0 and not value.requires_grad for value in measured.values())
    for module in model.modules():
        assert module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert getattr(module, "track_running_stats", True)


def test_an_objective_is_frozen_hashable_and_says_where_it_was_published(objective: Objective) -> None:
    assert hash(objective) == hash(dataclasses.replace(objective))
    field = dataclasses.fields(objective)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(objective, field, None)
    assert objective.published
    assert objective.forwards(3, 3) >= 3


def test_every_objective_smooths_labels_and_refuses_to_smooth_all_of_them(
    objective: Objective, model: nn.Module
) -> None:
    twin, batches = copy.deepcopy(model), make_batches(objective)
    inner = getattr(objective, "inner", None)
    smooth = dataclasses.replace(
        objective,
        **({"label_smoothing": 0.3} if inner is None else {"inner": dataclasses.replace(inner, label_smoothing=0.3)}),
    )
    accumulate(objective, model, batches, dataclasses.replace(STEP, memory=Memory()))
    accumulate(smooth, twin, batches, dataclasses.replace(STEP, memory=Memory()))
    plain, smoothed = gradients(model), gradients(twin)
    assert plain.keys() == smoothed.keys()
    assert any(not torch.allclose(plain[name], smoothed[name], rtol=1e-3) for name in plain)
    with pytest.raises(BadInput, match="label_smoothing"):
        dataclasses.replace(objective, label_smoothing=1.0)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_an_objective_has_a_page(method: str) -> None:
    page = Path(__file__).parents[3] / "docs/methods" / f"{method}.md"
    assert page.is_file()
    assert method in page.read_text(encoding="utf-8")


@pytest.fixture
def new_objects() -> Iterator[Callable[[], tuple[int, int]]]:
    """Return a function that counts the tensors and traced graphs that the test has made and that are still alive."""
    gc.collect()
    gc.freeze()  # what is there already is looked through no more

    def count() -> tuple[int, int]:
        gc.collect()
        kinds = [type(entry) for entry in gc.get_objects()]  # isinstance would wake lazy modules
        return tuple(sum(issubclass(one, kind) for one in kinds) for kind in (Tensor, torch.fx.GraphModule))  # type: ignore[return-value]

    yield count
    gc.unfreeze()


def test_no_objective_holds_on_to_tensors_from_step_to_step(
    objective: Objective, new_objects: Callable[[], tuple[int, int]]
) -> None:
    model = model_for(objective.needs, width=2).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    batches, memory = make_batches(objective, size=4), Memory()

    def steps() -> None:
        for number in range(6):
            optimizer.zero_grad(set_to_none=True)
            accumulate(objective, model, batches, Step(seed=0, number=number, batch=number, memory=memory))
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    steps()  # every memory is full
    tensors, graphs = new_objects()
    steps()  # with the same draws: what is kept per layer or path is there already
    after, graphs_after = new_objects()
    assert after <= tensors + 3
    assert graphs_after == graphs, "traced prefixes are kept, but not one per step"


# ---- in the loop -----------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tiny_dataset: str) -> Callable[..., Recipe]:
    def build_recipe(objective: Objective, *, meets: str | None = None, **changes: Any) -> Recipe:
        values: dict[str, Any] = {
            "name": "trial",
            "description": "a trial",
            "dataset": tiny_dataset,
            "phases": (Phase(objective=objective, epochs=2, learning_rate=0.02, schedule="cosine"),),
            "batch_size": 12,
            "train_images": 24,
            "held_out": 0,
            "precision": "fp32",
            **MEETS[meets or objective.needs],
            **changes,
        }
        return Recipe(**values)

    return build_recipe


class Killed(Exception):
    """Stands for a process that dies."""


@pytest.fixture
def dies_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Return a function that makes training die when it asks for the batch of this number."""
    augment = datasets.augment

    def arm(number: int) -> None:
        calls = itertools.count()

        def dying(*arguments: Any, **options: Any) -> Tensor:
            if next(calls) == number:
                monkeypatch.setattr(datasets, "augment", augment)
                raise Killed
            return augment(*arguments, **options)

        monkeypatch.setattr(datasets, "augment", dying)

    return arm


def test_a_run_of_every_objective_resumes_bit_for_bit_its_own_state_included(
    objective: Objective, make: Callable[..., Recipe], dies_after: Callable[[int], None], tmp_path: Path
) -> None:
    recipe = make(objective)
    train(recipe, tmp_path / "whole", device="cpu")
    steps = 2 * objective.replays  # 24 images in batches of 12, over two epochs
    dies_after((steps + 1) * objective.streams + objective.streams)  # in the second epoch, the trial step counted
    with pytest.raises(Killed):
        train(recipe, tmp_path / "torn", device="cpu", checkpoint_seconds=0)
    tensors, header = checkpoint.load(tmp_path / "torn/last.safetensors")
    assert header["position"]["epoch"] == 1
    assert header["position"]["batch"] >= 1
    train(recipe, tmp_path / "torn", resume=True, device="cpu")
    whole, torn = (checkpoint.load(tmp_path / name / "last.safetensors")[0] for name in ("whole", "torn"))
    assert whole.keys() == torn.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, torn[name]), name
    if objective.per_image_memory:
        assert any(name.startswith("memory/") for name in tensors)


@pytest.mark.parametrize("method", [name for name, kind in OBJECTIVES.items() if kind.needs != "any network"])
def test_a_network_that_lacks_what_a_method_needs_is_refused_before_anything_is_written(
    method: str, make: Callable[..., Recipe], tmp_path: Path
) -> None:
    lacking = {"network": "lenet", "network_options": {}, "members": 1, "candidates": 1}
    with pytest.raises(BadInput) as refused:
        train(make(OBJECTIVES[method](), **lacking), tmp_path / "run", device="cpu")
    assert method in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


# ---- standard --------------------------------------------------------------------------------------------------------


def test_standard_on_a_plain_network_is_its_cross_entropy() -> None:
    network = build("lenet", images=SMALL)
    (batch,) = make_batches()
    measured = Standard(label_smoothing=0.1).accumulate(network, [batch], STEP)
    found = gradients(network)
    network.zero_grad()
    logits = network(batch.images)
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=0.1)
    loss.backward()
    assert float(measured["loss"]) == float(loss.detach())
    assert float(measured["accuracy"]) == float((logits.argmax(1) == batch.labels).float().mean())
    assert all(torch.equal(gradient, found[name]) for name, gradient in gradients(network).items())


def test_standard_on_an_rgn_trains_one_path_per_step() -> None:
    rgn = model_for("gates").train()
    assert isinstance(rgn, RandomGatedNetwork)
    seen = set()
    for number in range(20):
        rgn.zero_grad(set_to_none=True)
        Standard().accumulate(rgn, make_batches(), Step(seed=0, number=number))
        active = [
            [gate for gate, candidate in enumerate(alternatives) if _has_gradient(candidate)]  # type: ignore[arg-type]
            for alternatives in rgn.bank
        ]
        assert all(len(gates) == 1 for gates in active)
        seen.add(tuple(gates[0] for gates in active))
    assert len(seen) > 15


def _has_gradient(module: nn.Module) -> bool:
    return any(parameter.grad is not None for parameter in module.parameters())


def test_the_jensen_shannon_divergence_of_equal_answers_is_0_and_of_opposite_certain_ones_ln_2() -> None:
    same = torch.randn(5, 4)
    assert float(jensen_shannon((same, same, same))) == pytest.approx(0, abs=1e-6)
    one = torch.tensor([[40.0, 0.0]])
    assert float(jensen_shannon((one, one.flip(1)))) == pytest.approx(math.log(2), rel=1e-5)


def test_consistency_adds_its_weight_times_the_divergence_of_the_views_and_they_share_a_batch() -> None:
    network = build("resnet8", images=SMALL, width=4).train()
    (batch,) = make_batches(Standard(consistency=12.0))
    measured = Standard(consistency=12.0).accumulate(copy.deepcopy(network), [batch], STEP)
    logits = network(torch.cat([batch.images, *batch.views]))
    parts = torch.split(logits, len(batch.labels))
    expected = F.cross_entropy(parts[0], batch.labels) + 12.0 * jensen_shannon(parts)
    assert float(measured["loss"]) == pytest.approx(float(expected.detach()), rel=1e-6)
