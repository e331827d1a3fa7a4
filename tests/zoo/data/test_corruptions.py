from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from zoo.data.cifar10_c import find_official, official, official_labels
from zoo.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from zoo.errors import BadInput, DataMissing, UnknownName

RANDOM = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "glass_blur",
    "motion_blur",
    "snow",
    "frost",
    "fog",
    "elastic_transform",
)
FIXED = tuple(name for name in CORRUPTIONS if name not in RANDOM)


def by_severity(*constants: float) -> list[tuple[int, float]]:
    return list(zip(SEVERITIES, constants, strict=True))


def photographs(number: int = 8, channels: int = 3, height: int = 32, width: int = 32) -> Tensor:
    """Random images with large soft shapes, a hard edge and a little grain, as photographs have."""
    generator = torch.Generator().manual_seed(1)
    shapes = torch.rand(number, channels, 5, 5, generator=generator)
    images = torch.nn.functional.interpolate(shapes, (height, width), mode="bicubic", align_corners=False)
    images[:, :, height // 3 : height // 2, width // 4 : -width // 4] *= 0.4
    images += 0.02 * torch.randn(images.shape, generator=generator)
    return (images.clamp(0.02, 0.98) * 255).to(torch.uint8)


def flat(level: int, number: int = 4, channels: int = 3) -> Tensor:
    return torch.full((number, channels, 32, 32), level, dtype=torch.uint8)


def grey(level: int) -> Tensor:
    """Two hundred grey images, enough to measure a distribution."""
    return flat(level, number=200, channels=1)


def squared_distance(images: Tensor, others: Tensor) -> float:
    return float((images.double() - others.double()).square().mean())


def test_the_corruptions_are_the_fifteen_of_the_paper_in_its_order() -> None:
    noise = ["gaussian_noise", "shot_noise", "impulse_noise"]
    blur = ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur"]
    weather = ["snow", "frost", "fog", "brightness"]
    digital = ["contrast", "elastic_transform", "pixelate", "jpeg_compression"]
    assert list(CORRUPTIONS) == noise + blur + weather + digital
    assert SEVERITIES == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 8, 40), (1, 33, 17)], ids=str)
@pytest.mark.parametrize("severity", [1, 5])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_keeps_shape_and_type_and_changes_a_copy(
    name: str, severity: int, shape: tuple[int, int, int]
) -> None:
    images = photographs(2, *shape)
    before = images.clone()
    corrupted = corrupt(images, name, severity)
    assert corrupted.shape == images.shape
    assert corrupted.dtype == torch.uint8
    assert torch.equal(images, before)
    assert not torch.equal(corrupted, images)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_images_stay_no_images(name: str) -> None:
    assert corrupt(torch.empty(0, 3, 32, 32, dtype=torch.uint8), name, 1).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "elastic_transform"])
def test_severity_5_is_further_from_the_images_than_severity_1(name: str) -> None:
    images = photographs(16)
    mildest, strongest = (squared_distance(corrupt(images, name, severity), images) for severity in (1, 5))
    assert 0 < mildest < strongest


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_result_does_not_depend_on_the_batch(name: str) -> None:
    images = photographs(8)
    together = corrupt(images, name, 3, seed=5)
    halves = [corrupt(images[:4], name, 3, seed=5), corrupt(images[4:], name, 3, seed=5, first=4)]
    assert torch.equal(together, torch.cat(halves))
    alone = [corrupt(images[index : index + 1], name, 3, seed=5, first=index) for index in range(8)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", ["gaussian_noise", "contrast", "elastic_transform"])
def test_the_result_does_not_depend_on_how_images_are_grouped_inside(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = photographs(10)
    whole = corrupt(images, name, 4)
    monkeypatch.setattr("zoo.data.corruptions.CHUNK", 3)
    assert torch.equal(corrupt(images, name, 4), whole)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_result_does_not_depend_on_global_generators_or_the_layout_in_memory(name: str) -> None:
    images = photographs(3)
    once = corrupt(images, name, 2)
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    assert torch.equal(corrupt(images.contiguous(memory_format=torch.channels_last), name, 2), once)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", RANDOM)
def test_seed_and_index_each_pick_another_draw(name: str) -> None:
    images = photographs(1)
    once = corrupt(images, name, 5)
    assert not torch.equal(corrupt(images, name, 5, seed=1), once)
    assert not torch.equal(corrupt(images, name, 5, first=1), once)


@pytest.mark.parametrize("name", FIXED)
def test_corruptions_without_chance_ignore_the_seed(name: str) -> None:
    assert torch.equal(corrupt(photographs(2), name, 5, seed=1), corrupt(photographs(2), name, 5, seed=2))


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if "noise" not in name and name != "frost"])
def test_a_grey_image_is_corrupted_alike_with_one_channel_and_with_three(name: str) -> None:
    images = photographs(4, channels=1)
    one, three = corrupt(images, name, 4), corrupt(images.expand(-1, 3, -1, -1), name, 4)
    assert torch.equal(one.expand(-1, 3, -1, -1), three)


# --- noise ---


@pytest.mark.parametrize(("severity", "deviation"), by_severity(0.04, 0.06, 0.08, 0.09, 0.10))
def test_gaussian_noise_has_the_published_deviation_and_no_bias(severity: int, deviation: float) -> None:
    noise = corrupt(grey(128), "gaussian_noise", severity).double() - 128
    assert float(noise.std()) / 255 == pytest.approx(deviation, rel=0.01)
    assert float(noise.mean()) == pytest.approx(-0.5, abs=0.2)  # values are cut off, not rounded


@pytest.mark.parametrize(("severity", "photons"), by_severity(500, 250, 100, 75, 50))
@pytest.mark.parametrize("level", [51, 102])
def test_shot_noise_has_the_variance_of_counted_photons(severity: int, photons: int, level: int) -> None:
    values = corrupt(grey(level), "shot_noise", severity).double() / 255
    # a photon is not a whole number of levels, so that cutting off adds some percent
    assert float(values.var()) == pytest.approx(level / 255 / photons, rel=0.1)
    assert float(values.mean()) == pytest.approx(level / 255, abs=0.003)


def test_shot_noise_leaves_black_as_it_is() -> None:
    assert not corrupt(flat(0), "shot_noise", 5).any()


@pytest.mark.parametrize(("severity", "share"), by_severity(0.01, 0.02, 0.03, 0.05, 0.07))
def test_impulse_noise_turns_the_published_share_of_values_black_or_white(severity: int, share: float) -> None:
    corrupted = corrupt(grey(128), "impulse_noise", severity)
    assert set(corrupted.unique().tolist()) == {0, 128, 255}
    for extreme in (0, 255):
        assert float((corrupted == extreme).double().mean()) == pytest.approx(share / 2, rel=0.06)


def test_impulse_noise_strikes_each_channel_on_its_own() -> None:
    struck = corrupt(flat(128, number=50), "impulse_noise", 5) != 128
    assert float((struck.all(1)).double().mean()) < 0.07**2


# --- blur ---


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(
    "name",
    [
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "contrast",
        "elastic_transform",
        "pixelate",
    ],
)
@pytest.mark.parametrize("level", [0, 128, 255])
def test_what_moves_or_averages_pixels_leaves_a_flat_image_flat(name: str, severity: int, level: int) -> None:
    assert torch.equal(corrupt(flat(level), name, severity), flat(level))


def dot() -> Tensor:
    image = flat(0, number=20)
    image[:, :, 16, 16] = 255
    return image


def test_defocus_blur_at_severity_5_spreads_a_dot_over_the_nine_pixels_of_its_disk() -> None:
    blurred = corrupt(dot(), "defocus_blur", 5)
    assert (blurred[:, :, 15:18, 15:18] == 255 // 9).all()
    assert not (blurred.sum((2, 3)) > 9 * 28).any()


def test_defocus_blur_at_severity_4_spreads_a_dot_over_a_plus() -> None:
    neighbourhood = corrupt(dot(), "defocus_blur", 4)[0, 0, 15:18, 15:18]
    assert neighbourhood.tolist() == [[0, 50, 0], [50, 51, 50], [0, 50, 0]]  # the arms lose a little to their corners


def test_glass_blur_at_severity_1_only_copies_pixels_from_above_and_from_the_left() -> None:
    images = photographs(4)
    shattered = corrupt(images, "glass_blur", 1)
    assert torch.equal(shattered[:, :, :2], images[:, :, :2])
    assert torch.equal(shattered[:, :, :, :2], images[:, :, :, :2])
    windows = [images[:, :, 1 - up : 32 - up, 1 - left : 32 - left] for up in (0, 1) for left in (0, 1)]
    copied = torch.stack([(window == shattered[:, :, 1:, 1:]).all(1) for window in windows])
    assert copied.any(0).all()
    assert copied.double().mean((1, 2, 3)) == pytest.approx([0.25] * 4, abs=0.1)


@pytest.mark.parametrize(("severity", "length"), by_severity(13, 13, 13, 17, 19))
def test_motion_blur_smears_a_dot_along_half_a_line_within_45_degrees(severity: int, length: float) -> None:
    blurred = corrupt(dot(), "motion_blur", severity)[:, 0].double()
    assert blurred.sum((1, 2)).numpy() == pytest.approx(255, abs=length)
    rows, columns = torch.meshgrid(torch.arange(32) - 16, 16 - torch.arange(32), indexing="ij")
    reached = (blurred > 0).any(0)
    assert (columns[reached] >= 0).all()
    assert (columns[reached] < length).all()
    assert (rows[reached].abs() <= columns[reached]).all()
    assert (blurred[:, 16, 16] > 255 / length).all()


def test_zoom_blur_moves_the_rim_outwards_and_leaves_the_middle() -> None:
    image = flat(0)
    image[:, :, 10:22, 10:22] = 255
    zoomed = corrupt(image, "zoom_blur", 5)
    assert (zoomed[:, :, 12:20, 12:20] == 255).all()
    assert (zoomed[:, :, 9, 16] > 0).all()
    assert not zoomed[:, :, 6].any()


# --- weather ---


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_darkens_nothing(severity: int) -> None:
    images = photographs(16)
    assert (corrupt(images, "snow", severity) >= images).all()


@pytest.mark.parametrize(("severity", "kept"), by_severity(0.95, 0.9, 0.9, 0.85, 0.8))
def test_snow_on_black_is_a_half_turned_pattern_above_the_published_haze(severity: int, kept: float) -> None:
    snow = corrupt(flat(0, number=50), "snow", severity)
    assert torch.equal(snow, snow.flip(2, 3))
    assert int(snow.min()) == int((1 - kept) * 0.5 * 255 + 1e-6)
    assert int(snow.max()) > 150


@pytest.mark.parametrize(("severity", "added"), by_severity(0.2, 0.3, 0.4, 0.4, 0.45))
def test_frost_on_black_is_a_bluish_texture_of_the_published_strength(severity: int, added: float) -> None:
    ice = corrupt(flat(0, number=50), "frost", severity).double() / 255 / added
    red, green, blue = ice.unbind(1)
    assert float(ice.max()) <= 1
    assert (red <= green).all()
    assert (green <= blue).all()
    assert 0.4 < float(ice.mean()) < 0.7
    assert float(ice.std((1, 2, 3)).min()) > 0.05


@pytest.mark.parametrize(("severity", "kept"), by_severity(1, 1, 0.9, 0.85, 0.75))
def test_frost_keeps_the_published_part_of_the_image(severity: int, kept: float) -> None:
    black, grey = (corrupt(flat(level), "frost", severity).double() for level in (0, 100))
    assert ((grey - black - 100 * kept).abs() <= 1).all()


@pytest.mark.parametrize(("severity", "thickness"), by_severity(0.2, 0.5, 0.75, 1, 1.5))
def test_fog_on_white_reaches_from_white_down_by_its_published_thickness(severity: int, thickness: float) -> None:
    fog = corrupt(flat(255), "fog", severity).flatten(1)
    assert (fog.amax(1) == 255).all()
    assert (fog.amin(1) == int(255 / (1 + thickness))).all()


def test_fog_is_smoother_at_a_low_severity_where_its_detail_decays_faster() -> None:
    def roughness(severity: int) -> float:
        fog = corrupt(flat(255, number=32), "fog", severity)[:, 0].double()
        return float(fog.diff(dim=1).abs().mean() / fog.std())

    assert roughness(1) < roughness(5)


@pytest.mark.parametrize(("severity", "added"), by_severity(0.05, 0.1, 0.15, 0.2, 0.3))
def test_brightness_raises_the_value_and_keeps_hue_and_saturation(severity: int, added: float) -> None:
    image = torch.tensor([160, 80, 40], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    scale = (160 / 255 + added) / (160 / 255)
    expected = [int(level * scale + 1e-6) for level in (160, 80, 40)]
    brightened = corrupt(image, "brightness", severity)
    assert brightened[0, :, 0, 0].tolist() == expected
    assert (brightened == brightened[:, :, :1, :1]).all()


def test_brightness_turns_black_grey_and_keeps_white() -> None:
    assert torch.equal(corrupt(flat(0), "brightness", 4), flat(51))
    assert torch.equal(corrupt(flat(255), "brightness", 4), flat(255))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_raises_every_mean(severity: int) -> None:
    images = photographs()
    means = [pixels.double().mean((1, 2, 3)) for pixels in (images, corrupt(images, "brightness", severity))]
    assert (means[1] > means[0] + 5).all()


# --- digital ---


@pytest.mark.parametrize(("severity", "kept"), by_severity(0.75, 0.5, 0.4, 0.3, 0.15))
def test_contrast_shrinks_the_deviation_by_its_constant_around_the_mean(severity: int, kept: float) -> None:
    images = photographs()
    flattened = corrupt(images, "contrast", severity).double()
    deviation = flattened.std((2, 3)) / images.double().std((2, 3))
    torch.testing.assert_close(deviation, torch.full_like(deviation, kept), rtol=0.02, atol=0)
    means = images.double().mean((2, 3))
    torch.testing.assert_close(flattened.mean((2, 3)), means - 0.5, rtol=0, atol=0.4)


def ramp() -> Tensor:
    """Images whose level is 40 + 2 row + 3 column."""
    image = 40 + 2 * torch.arange(32)[:, None] + 3 * torch.arange(32)
    return image.to(torch.uint8).expand(20, 3, 32, 32)


def bend(images: Tensor) -> Tensor:
    """Largest second difference of each image, away from its borders: 0 for a plane, at most 2 once values are cut."""
    middle = images[:, :, 8:24, 8:24].double()
    return torch.stack([middle.diff(n=2, dim=dim).abs().amax((1, 2, 3)) for dim in (2, 3)]).amax(0)


def test_elastic_transform_moves_a_plane_as_a_plane_at_severity_1_and_bends_it_at_5() -> None:
    mild, strong = (corrupt(ramp(), "elastic_transform", severity) for severity in (1, 5))
    assert (bend(mild) <= 2).all()
    assert (bend(strong) > 3).all()
    assert squared_distance(mild, ramp()) > 1


@pytest.mark.parametrize(("severity", "jitter"), by_severity(2.56, 2.24, 1.92, 1.6, 0.96))
def test_elastic_transform_moves_the_middle_no_further_than_its_points(severity: int, jitter: float) -> None:
    # the middle is halfway between two of the points, so it moves by at most `jitter` each way, plus the field
    field = 0 if severity == 1 else 3
    levels = corrupt(ramp(), "elastic_transform", severity)[:, 0, 16, 16].double()
    assert ((levels - (40 + 5 * 16)).abs() <= 5 * (jitter + field) + 1).all()


@pytest.mark.parametrize(("severity", "blocks"), by_severity(30, 28, 27, 24, 20))
def test_pixelate_leaves_the_published_number_of_distinct_rows_and_columns(severity: int, blocks: int) -> None:
    image = corrupt(ramp()[:1], "pixelate", severity)[0]
    assert len({tuple(row.flatten().tolist()) for row in image.unbind(1)}) == blocks
    assert len({tuple(column.flatten().tolist()) for column in image.unbind(2)}) == blocks


@pytest.mark.parametrize(("severity", "quality"), by_severity(80, 65, 58, 50, 40))
def test_jpeg_compression_is_that_of_pillow_at_the_published_quality(severity: int, quality: int) -> None:
    images = photographs(1)
    file = io.BytesIO()
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert torch.equal(corrupt(images, "jpeg_compression", severity)[0], expected)


# --- what is refused ---


def test_an_unknown_corruption_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="unknown corruption 'gausian_noise'; did you mean 'gaussian_noise'"):
        corrupt(photographs(1), "gausian_noise", 1)


@pytest.mark.parametrize("severity", [0, 6, -1])
def test_a_severity_outside_1_to_5_is_refused(severity: int) -> None:
    with pytest.raises(BadInput, match=rf"severity {severity} does not exist; expected 1 \(mildest\) to 5"):
        corrupt(photographs(1), "fog", severity)


def test_scaled_images_are_refused() -> None:
    with pytest.raises(BadInput, match=r"pixels are torch.float32, expected torch.uint8"):
        corrupt(photographs(1) / 255, "fog", 1)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32, 3), (2, 4, 32, 32)], ids=str)
def test_images_of_another_layout_are_refused_with_their_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match=re.escape(f"the shape {shape}, expected (n, 1 or 3, height, width)")):
        corrupt(torch.zeros(shape, dtype=torch.uint8), "fog", 1)


def test_images_too_small_for_any_blur_are_refused() -> None:
    with pytest.raises(BadInput, match="images of 32x7 pixels are too small, expected sides of 8 or more"):
        corrupt(torch.zeros(1, 3, 32, 7, dtype=torch.uint8), "fog", 1)


@pytest.mark.parametrize(("seed", "first"), [(-1, 0), (0, -1)])
def test_negative_seeds_and_indices_are_refused(seed: int, first: int) -> None:
    with pytest.raises(BadInput, match=f"seed {seed} and first {first} must not be negative"):
        corrupt(photographs(1), "fog", 1, seed=seed, first=first)


# --- the authors' own files ---


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """CIFAR-10-C with one corruption, of full size but with holes: zero except for a few pixels."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    images = np.lib.format.open_memmap(folder / "fog.npy", "w+", np.uint8, (50_000, 32, 32, 3))
    for severity in SEVERITIES:
        images[(severity - 1) * 10_000, 2, 7] = (severity, 100, 200)
        images[severity * 10_000 - 1, 31, 31, 2] = 10 * severity
    del images
    np.save(folder / "labels.npy", np.tile(np.arange(10_000) % 10, 5).astype(np.uint8))
    return folder


@pytest.mark.parametrize("severity", SEVERITIES)
def test_a_published_file_holds_the_severities_one_after_another_channels_last(published: Path, severity: int) -> None:
    images = official(published, "fog", severity)
    assert images.dtype == torch.uint8
    assert images.shape == (10_000, 3, 32, 32)
    assert images.is_contiguous()
    assert images[0, :, 2, 7].tolist() == [severity, 100, 200]
    assert images[-1, :, 31, 31].tolist() == [0, 0, 10 * severity]
    assert int(images.count_nonzero()) == 4


def test_published_labels_are_those_of_one_severity(published: Path) -> None:
    labels = official_labels(published)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, torch.arange(10_000) % 10)


def test_a_corruption_that_was_not_unpacked_is_missed_by_name(published: Path) -> None:
    with pytest.raises(
        DataMissing, match=r"CIFAR-10-C holds no snow\.npy; unpack CIFAR-10-C again from https://zenodo"
    ):
        official(published, "snow", 1)


def test_unknown_corruptions_and_severities_are_refused_before_any_file_is_opened(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="unknown corruption 'labels'"):
        official(tmp_path, "labels", 1)
    with pytest.raises(BadInput, match="severity 0 does not exist"):
        official(tmp_path, "fog", 0)


def test_a_truncated_published_file_is_refused(published: Path) -> None:
    with (published / "fog.npy").open("r+b") as file:
        file.truncate(10**6)
    with pytest.raises(DataMissing, match=r"fog\.npy is not a whole \.npy file"):
        official(published, "fog", 1)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04N."], ids=["empty", "zip", "pickle"])
def test_a_published_file_of_another_kind_is_refused(published: Path, content: bytes) -> None:
    (published / "labels.npy").write_bytes(content)
    with pytest.raises(DataMissing, match=r"labels\.npy is not a whole \.npy file"):
        official_labels(published)


def test_a_published_file_with_pickled_objects_is_refused(published: Path) -> None:
    np.save(published / "labels.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataMissing, match="Python objects"):
        official_labels(published)


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((10_000, 32, 32, 1), np.uint8), r"uint8 \(10000, 32, 32, 1\)"),
        (np.zeros((5, 3), np.float32), r"float32 \(5, 3\)"),
    ],
    ids=["shape", "type"],
)
def test_a_published_file_of_another_shape_or_type_is_refused_with_both(
    published: Path, array: np.ndarray, found: str
) -> None:
    np.save(published / "fog.npy", array)
    with pytest.raises(DataMissing, match=rf"holds {found}, expected uint8 \(50000, 32, 32, 3\)"):
        official(published, "fog", 1)


@pytest.mark.parametrize("wrong", [np.arange(50_000) % 7, np.full(50_000, 10)], ids=["order", "range"])
def test_labels_that_differ_between_severities_or_name_no_class_are_refused(published: Path, wrong: np.ndarray) -> None:
    np.save(published / "labels.npy", wrong)
    with pytest.raises(DataMissing, match=r"expected 0 to 9 and the same 10,000 for each severity"):
        official_labels(published)


def test_the_published_folder_is_found_in_the_data_folder(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYGATES_DATA", str(published.parent))
    assert find_official() == published


def test_without_the_published_folder_none_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANYGATES_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert find_official() is None


def test_the_published_folder_is_found_beside_the_working_folder(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = published.parent / "project"
    data = published.parent / "shared/data"
    project.mkdir()
    data.mkdir(parents=True)
    published.rename(data / "CIFAR-10-C")
    monkeypatch.delenv("MANYGATES_DATA", raising=False)
    monkeypatch.chdir(project)
    found = find_official()
    assert found is not None
    assert found.resolve() == (data / "CIFAR-10-C").resolve()


@pytest.mark.parametrize("number", [3.0, 2.5, "3", None, torch.tensor(2.0)])
def test_a_corruption_counts_in_whole_numbers(number: Any) -> None:
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(BadInput):
        corrupt(pixels, "fog", number)
    with pytest.raises(BadInput):
        corrupt(pixels, "fog", 3, seed=number)
    with pytest.raises(BadInput):
        corrupt(pixels.numpy(), "fog", 3)  # type: ignore[arg-type]
