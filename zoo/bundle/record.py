"""What was measured goes into the card of a bundle; its weights and graphs stay as they are."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from zoo.bundle.bundle import Bundle
from zoo.bundle.card import Lint, Result
from zoo.vocabulary import MEASURED_VARIANTS

_TERMS = (
    *("protocol", "variant", "attack", "norm", "eps_fraction", "steps", "step_size"),
    *("restarts", "draws", "images", "seed"),
)


def record_results(folder: Path, results: Sequence[Result]) -> Bundle:
    """Put measured results into a bundle's card; a result measured before on the very same terms is replaced.

    The card is read again, because another evaluation may have written into it meanwhile.

    Raises:
        BundleError: as `Bundle.open`.
    """
    bundle = Bundle.open(folder, only=())
    measured = {_terms(result) for result in results}
    kept = [result for result in bundle.card.results if _terms(result) not in measured]
    ordered = sorted([*kept, *results], key=lambda r: (MEASURED_VARIANTS.index(r.variant), r.protocol, r.eps))
    return bundle.with_card(replace(bundle.card, results=tuple(ordered)))


def record_lint(folder: Path, lint: Lint) -> Bundle:
    """Put what the linter found on one variant into a bundle's card, in the place of what it found before.

    Raises:
        BundleError: as `Bundle.open`.
    """
    bundle = Bundle.open(folder, only=())
    kept = [other for other in bundle.card.lint if other.variant != lint.variant]
    ordered = sorted([*kept, lint], key=lambda entry: MEASURED_VARIANTS.index(entry.variant))
    return bundle.with_card(replace(bundle.card, lint=tuple(ordered)))


def _terms(result: Result) -> tuple[object, ...]:
    """Return what makes two results measurements of the same thing."""
    return tuple(getattr(result, name) for name in _TERMS)
