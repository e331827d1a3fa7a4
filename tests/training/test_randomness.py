from __future__ import annotations

import random

import torch

from training.randomness import gate_generator, seed_for, tensor_generator


def test_seeds_never_change_between_versions() -> None:
    # Golden: a run started before an upgrade resumes after it with the same draws.
    assert seed_for(0, "gates", 0) == 1950607690478494766
    assert seed_for(1, "order", 3, 1) == 2223589327948970607


def test_a_seed_depends_on_every_part_and_on_their_order() -> None:
    parts = [
        (0, "gates", 1),
        (1, "gates", 0),
        (0, "gates", 2),
        (0, "order", 1),
        ("gates", 0, 1),
        (0, "gates"),
        (0, "gates", 11),
    ]
    assert len({seed_for(*part) for part in parts}) == len(parts)


def test_seeds_of_many_positions_do_not_collide_and_fit_a_generator() -> None:
    seeds = {
        seed_for(seed, purpose, step) for seed in range(5) for purpose in ("gates", "augment") for step in range(500)
    }
    assert len(seeds) == 5000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_are_functions_of_their_position() -> None:
    first, again, other = (torch.rand(8, generator=tensor_generator(0, "augment", step)) for step in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert gate_generator(0, "gates", 5).random() == gate_generator(0, "gates", 5).random()
    assert gate_generator(0, "gates", 5).random() != gate_generator(0, "gates", 6).random()


def test_generators_leave_the_global_ones_alone() -> None:
    state, torch_state = random.getstate(), torch.get_rng_state()
    torch.rand(3, generator=tensor_generator(0))
    gate_generator(0).random()
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_gates_of_consecutive_steps_look_independent() -> None:
    bits = torch.tensor([gate_generator(0, "gates", step).randrange(2) for step in range(4000)], dtype=torch.float64)
    assert abs(float(bits.mean()) - 0.5) < 0.04
    assert abs(float(torch.corrcoef(torch.stack([bits[:-1], bits[1:]]))[0, 1])) < 0.08
