import pytest

from zoo import evaluation, vocabulary
from zoo.attacks.registry import ATTACKS
from zoo.bundle.wording import PROTOCOL_ORDER


def test_every_protocol_and_attack_that_is_named_has_its_code_and_its_words() -> None:
    assert {*vocabulary.PROTOCOLS} == {*evaluation.PROTOCOLS}
    assert {*vocabulary.PROTOCOLS} == {*PROTOCOL_ORDER}
    assert {*vocabulary.ATTACKS} == {*ATTACKS}


def test_every_mode_is_served_by_a_variant_of_its_own() -> None:
    assert [*vocabulary.VARIANT_OF_MODE] == [*vocabulary.MODES]
    assert {*vocabulary.VARIANT_OF_MODE.values()} == {*vocabulary.VARIANTS}


@pytest.mark.parametrize("name", ["a", "eio-resnet20-cifar10", "A.b_c-9", "n" * 128])
def test_a_plain_name_is_a_name(name: str) -> None:
    assert vocabulary.NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a..b", ".a", "-a", "a/b", "a\\b", "a b", "a\n", "é", "n" * 129])
def test_what_would_leave_a_folder_or_confuse_a_shell_is_no_name(name: str) -> None:
    assert not vocabulary.NAME.fullmatch(name)
