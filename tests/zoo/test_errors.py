import pytest

from zoo import errors


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    error = errors.UnknownName("resnet2O", ["vgg16", "resnet20"], kind="network")
    assert str(error) == "unknown network 'resnet2O'; did you mean 'resnet20'? (known: resnet20, vgg16)"
    assert error.name == "resnet2O"
    assert error.known == ("resnet20", "vgg16")


def test_an_unknown_name_far_from_all_others_suggests_none() -> None:
    assert str(errors.UnknownName("zzz", ["vgg16"])) == "unknown name 'zzz' (known: vgg16)"
    assert str(errors.UnknownName("zzz", [])) == "unknown name 'zzz' (none is known here)"


@pytest.mark.parametrize(
    ("child", "parent"),
    [
        (errors.UnknownName, errors.ManygatesError),
        (errors.BadInput, errors.ManygatesError),
        (errors.BadInput, ValueError),
        (errors.BadPath, errors.BadInput),
        (errors.BadImage, errors.BadInput),
        (errors.UnsupportedImage, errors.BadImage),
        (errors.BundleError, errors.ManygatesError),
        (errors.ChecksumMismatch, errors.BundleError),
        (errors.MissingFile, errors.BundleError),
        (errors.DataMissing, errors.ManygatesError),
        (errors.CheckpointError, errors.ManygatesError),
    ],
)
def test_the_tree_is_as_drawn(child: type[Exception], parent: type[Exception]) -> None:
    assert issubclass(child, parent)
    assert child.__name__ in (errors.__doc__ or "")
