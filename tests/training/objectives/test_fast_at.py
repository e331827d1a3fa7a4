from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import Batch, FastAt, PgdAt, Step, TrainingAttack
from training.objectives.network import networks_of
from zoo.errors import BadInput
from zoo.networks import ImageFormat, build

EPS, LENGTH = 8 / 255, 10 / 255
SMALL = ImageFormat(height=16, width=16)
STEP = Step(seed=0, number=3)


@pytest.fixture
def network() -> nn.Module:
    return build("resnet8", images=SMALL, width=4).train()


def some_batch(size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, 16, 16, generator=generator)
    images[0], images[1] = 0, 1
    return Batch(images, torch.randint(0, 10, (size,), generator=generator))


def start_of(images: Tensor, step: Step) -> Tensor:
    noise = torch.rand(images.shape, generator=step.generator("attack", 0))
    return torch.clamp(images + EPS * (2 * noise - 1), 0, 1)


def test_its_examples_are_one_long_step_from_a_uniform_start(network: nn.Module) -> None:
    batch = some_batch()
    (examples,) = FastAt().prepare(networks_of(network, STEP), batch)

    start = start_of(batch.images, STEP).requires_grad_()
    (uphill,) = torch.autograd.grad(F.cross_entropy(network(start), batch.labels, reduction="sum"), start)
    moved = (start.detach() + LENGTH * uphill.sign() - batch.images).clamp(-EPS, EPS)
    torch.testing.assert_close(examples, (batch.images + moved).clamp(0, 1), rtol=0, atol=1e-6)


def test_a_step_longer_than_the_radius_need_not_end_in_a_corner() -> None:
    # from a start at -eps, 10/255 reach only 2/255: examples fill the ball, as the paper wants
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), some_batch()
    batch = Batch(batch.images.clamp(0.2, 0.8), batch.labels % 2)
    (examples,) = FastAt().prepare(networks_of(model, STEP), batch)
    moved = (examples - batch.images).abs()
    at_the_bound = float((moved > EPS - 1e-6).float().mean())
    # start u in [-8, 8] uniformly, then u + 10 >= 8 for u >= -2: 10/16 of all pixels
    assert at_the_bound == pytest.approx(10 / 16, abs=0.03)
    assert float(moved.max()) <= EPS + 1e-6


def test_it_is_pgd_training_with_that_one_step(network: nn.Module) -> None:
    same = PgdAt(attack=TrainingAttack(eps=EPS, steps=1, step_size=LENGTH))
    made = [objective.prepare(networks_of(network, STEP), some_batch())[0] for objective in (FastAt(), same)]
    assert torch.equal(*made)
    assert FastAt().name == "fast_at"


def test_it_runs_two_forward_passes_in_training_mode(network: nn.Module) -> None:
    FastAt().accumulate(network, [some_batch()], STEP)
    counters = {int(b) for name, b in network.named_buffers() if name.endswith("num_batches_tracked")}
    assert counters == {2}
    assert FastAt().forwards() == 5
    assert FastAt().forwards(networks=3) == 15


def test_more_steps_are_refused() -> None:
    with pytest.raises(BadInput, match="fast_at takes 1 attack step, got 10; train with pgd_at for more"):
        FastAt(attack=TrainingAttack())
    with pytest.raises(BadInput, match="label_smoothing"):
        FastAt(label_smoothing=-1)
