from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from zoo.data import datasets
from zoo.data.datasets import DATASETS, DatasetSource, Images, augment, evaluation_subset, hold_out
from zoo.errors import BadInput, DataMissing, UnknownName
from zoo.networks import ImageFormat

TINY = DatasetSource(
    repository="nobody/tiny",
    folder="plain_text",
    image_column="img",
    label_column="label",
    format=ImageFormat(height=5, width=4),
    classes=("a", "b", "c"),
    sizes={"train": 6, "test": 2},
    flips=False,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(number: int, size: int = 2) -> Images:
    """Images whose label is their index."""
    labels = torch.arange(number)
    return Images(labels.view(-1, 1, 1, 1).expand(-1, 3, size, size).to(torch.uint8), labels)


def write(file: Path, pixels: np.ndarray, labels: list[int]) -> None:
    cells = []
    for image in pixels:
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "PNG")
        cells.append({"bytes": encoded.getvalue(), "path": None})
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"img": cells, "label": labels}), file)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Two training files in the hub's layout; returns their pixels (n, height, width, channel)."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
    folder = tmp_path / "nobody/tiny/plain_text"
    write(folder / "train-00000-of-00002.parquet", pixels[:4], [0, 1, 2, 0])
    write(folder / "train-00001-of-00002.parquet", pixels[4:], [1, 2])
    monkeypatch.setitem(DATASETS, "tiny", TINY)
    monkeypatch.setenv("MANYGATES_DATA", str(tmp_path))
    return pixels


def test_images_come_in_the_files_order_channels_first(tiny: np.ndarray) -> None:
    images = datasets.load("tiny", "train")
    assert images.pixels.dtype == torch.uint8
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(images.pixels, torch.from_numpy(tiny).permute(0, 3, 1, 2))


def test_a_missing_split_names_the_variable_and_the_expected_files(tiny: np.ndarray) -> None:
    with pytest.raises(DataMissing, match=r"MANYGATES_DATA=.* holds no nobody/tiny/plain_text/test-\*\.parquet"):
        datasets.load("tiny", "test")


def test_grey_images_that_are_stored_in_colour_are_read_as_grey(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grey = np.random.default_rng(1).integers(0, 256, (2, 5, 4, 1), np.uint8)
    write(tmp_path / "nobody/tiny/plain_text/test-00000-of-00001.parquet", grey.repeat(3, axis=3), [0, 1])
    image_format = ImageFormat(channels=1, height=5, width=4, mean=(0.5,), std=(0.5,))
    monkeypatch.setitem(DATASETS, "tiny", replace(TINY, format=image_format))
    monkeypatch.setenv("MANYGATES_DATA", str(tmp_path))
    assert torch.equal(datasets.load("tiny", "test").pixels, torch.from_numpy(grey).permute(0, 3, 1, 2))


@pytest.mark.usefixtures("tiny")
def test_images_of_another_size_are_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", replace(TINY, format=ImageFormat(height=5, width=5)))
    with pytest.raises(DataMissing, match="an image of 5x4 pixels, expected 5x5"):
        datasets.load("tiny", "train")


@pytest.mark.usefixtures("tiny")
def test_a_missing_file_is_noticed_by_the_number_of_images(tmp_path: Path) -> None:
    (tmp_path / "nobody/tiny/plain_text/train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataMissing, match="tiny train has 4 images, expected 6"):
        datasets.load("tiny", "train")


@pytest.mark.usefixtures("tiny")
def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "nobody/tiny/plain_text/train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataMissing, match=r"train-00001-of-00002.parquet is not a readable parquet file"):
        datasets.load("tiny", "train")


@pytest.mark.parametrize("name", DATASETS)
def test_data_that_are_not_there_are_missed_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYGATES_DATA", str(tmp_path))
    with pytest.raises(DataMissing, match=f"MANYGATES_DATA={tmp_path} holds no {DATASETS[name].repository}"):
        datasets.load(name, "train")


def test_without_a_local_copy_and_a_network_the_variable_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.delenv("MANYGATES_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(DATASETS, "tiny", TINY)
    with pytest.raises(DataMissing, match=r"cannot be fetched .*set MANYGATES_DATA to a folder that holds nobody/tiny"):
        datasets.load("tiny", "train")


def test_a_local_copy_beside_the_working_folder_is_found(
    tiny: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "nobody").rename(tmp_path / "moved")
    (tmp_path / "shared/data").mkdir()
    (tmp_path / "moved").rename(tmp_path / "shared/data/nobody")
    (tmp_path / "project").mkdir()
    monkeypatch.delenv("MANYGATES_DATA")
    monkeypatch.chdir(tmp_path / "project")
    assert len(datasets.load("tiny", "train")) == len(tiny)


def test_an_unknown_data_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"data set 'cifar'; did you mean 'cifar10'\? \(known: cifar10, mnist\)"):
        datasets.load("cifar", "train")


def test_an_unknown_split_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadInput, match="has the splits train, test, got 'validation'"):
        datasets.load("mnist", "validation")


def test_batches_are_in_order_complete_and_scaled() -> None:
    batches = list(numbered(7).batches(3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.arange(7))
    assert torch.equal(torch.cat([images for images, _ in batches])[:, 0, 0, 0], torch.arange(7) / 255)


@pytest.mark.parametrize(("dtype", "channels"), [(torch.uint8, 3), (torch.float32, 1)])
def test_augmenting_keeps_shape_and_type(dtype: torch.dtype, channels: int) -> None:
    pixels = torch.randint(0, 256, (5, channels, 8, 6)).to(dtype)
    augmented = augment(pixels, generator())
    assert augmented.shape == pixels.shape
    assert augmented.dtype == dtype


def test_augmenting_is_a_function_of_the_generator() -> None:
    pixels = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    state = torch.get_rng_state()
    assert torch.equal(augment(pixels, generator(1)), augment(pixels, generator(1)))
    assert not torch.equal(augment(pixels, generator(1)), augment(pixels, generator(2)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("flip", [False, True])
def test_augmenting_draws_every_crop_of_the_zero_padded_image_and_no_other(flip: bool) -> None:
    image = torch.arange(1, 13, dtype=torch.uint8).view(1, 1, 3, 4)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))[0, 0]
    crops = {tuple(padded[top : top + 3, left : left + 4].flatten().tolist()) for top in range(5) for left in range(5)}
    mirrored = {tuple(torch.tensor(crop).view(3, 4).flip(1).flatten().tolist()) for crop in crops}
    augmented = augment(image.expand(3000, 1, 3, 4), generator(), flip=flip, padding=2)
    drawn = {tuple(crop.flatten().tolist()) for crop in augmented}
    assert drawn == (crops | mirrored if flip else crops)
    assert tuple(image.flatten().tolist()) in drawn


def test_half_of_the_images_are_mirrored() -> None:
    image = torch.tensor([[[[1, 2]]]], dtype=torch.uint8).expand(4000, 3, 1, 2)
    augmented = augment(image, generator(), padding=0)
    assert abs(float((augmented[:, 0, 0, 0] == 2).float().mean()) - 0.5) < 0.04


def test_augmenting_leaves_the_given_images_alone() -> None:
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    before = pixels.clone()
    augment(pixels, generator()).zero_()
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("number", [0, 1, 30, 99])
def test_held_out_images_and_the_rest_are_disjoint_and_complete(number: int) -> None:
    rest, held_out = hold_out(numbered(100), number, seed=1)
    assert len(held_out) == number
    assert torch.equal(torch.cat([rest.labels, held_out.labels]).sort().values, torch.arange(100))
    assert torch.equal(rest.pixels[:, 0, 0, 0].long(), rest.labels)


def test_what_is_held_out_depends_on_the_seed_alone() -> None:
    first, again, other = (hold_out(numbered(100), 20, seed=seed)[1].labels.tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("number", [-1, 10, 11])
def test_holding_out_everything_is_refused(number: int) -> None:
    with pytest.raises(BadInput, match=f"cannot hold out {number} of 10 images; expected 0 to 9"):
        hold_out(numbered(10), number, seed=0)


def test_smaller_evaluation_subsets_are_the_start_of_larger_ones() -> None:
    small, large = (evaluation_subset(numbered(100), number).labels for number in (10, 50))
    assert torch.equal(small, large[:10])
    assert len(set(large.tolist())) == 50


def test_the_whole_test_set_keeps_its_order() -> None:
    assert torch.equal(evaluation_subset(numbered(20), 20).labels, torch.arange(20))


@pytest.mark.parametrize("number", [0, 21])
def test_an_evaluation_subset_larger_than_the_set_or_empty_is_refused(number: int) -> None:
    with pytest.raises(BadInput, match=f"cannot measure {number} images, expected 1 to 20"):
        evaluation_subset(numbered(20), number)


def balanced(histogram: list[int]) -> bool:
    return histogram == [sum(histogram) // 10] * 10


def like_mnist(histogram: list[int]) -> bool:
    return histogram == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "split", "mean", "expected"),
    [("cifar10", "test", 0.4734, balanced), ("mnist", "test", 0.1325, like_mnist)],
)
def test_the_real_data_are_whole(name: str, split: str, mean: float, expected: Callable[[list[int]], bool]) -> None:
    images = datasets.load(name, split)
    dataset = DATASETS[name]
    assert len(images) == dataset.sizes[split]
    assert images.pixels.shape[1:] == (dataset.format.channels, dataset.format.height, dataset.format.width)
    assert expected(images.labels.bincount(minlength=10).tolist())
    assert float(images.pixels.float().mean() / 255) == pytest.approx(mean, abs=0.01)


@pytest.mark.data
@pytest.mark.slow
def test_the_real_training_images_have_the_mean_that_networks_subtract() -> None:
    images = datasets.load("cifar10", "train")
    assert len(images) == 50_000
    assert images.labels.bincount().tolist() == [5000] * 10
    means = images.pixels.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor(DATASETS["cifar10"].format.mean).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("number", [-5, -1, 0, True, 2.0])
def test_images_are_not_counted_from_the_end(number: object) -> None:
    images = datasets.Images(torch.zeros(9, 1, 2, 2, dtype=torch.uint8), torch.arange(9))
    with pytest.raises(BadInput):
        datasets.drawn(images, number, 0)  # type: ignore[arg-type]
    assert len(datasets.drawn(images, 4, 0)) == 4
    assert len(datasets.drawn(images, 40, 0)) == 9
