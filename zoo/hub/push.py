"""Bundles published on the Hugging Face hub: a plan that says what a push would do, and the push, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zoo.bundle.bundle import CARD_FILE, README_FILE, Bundle
from zoo.bundle.card import Card
from zoo.bundle.readme import model_card
from zoo.errors import BadInput, BundleError
from zoo.hub.client import HUB_PREFIX, bars, endpoint, parse_repository, translated, waiting
from zoo.hub.fetch import fetch_card

_BLANK = frozenset({".gitattributes", README_FILE})
"""What a repository holds that nobody has put anything into."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """What a push will do, once `plan_push` has checked that it may."""

    bundle: Bundle
    repository: str
    branch: str
    creates_repository: bool
    creates_branch: bool
    private: bool
    pull_request: bool
    message: str
    parent: str | None
    """The commit that was looked at; the push is refused if there is a newer one. None in a new repository."""
    files: Mapping[str, bytes]
    """What is sent: exactly the bytes that were checked."""
    removed: tuple[str, ...]
    """Files of the previous version that this one no longer has."""

    def described(self) -> list[str]:
        """Return the plan as lines of text: what is created, the commit, and each file."""
        made = f"create the {'private' if self.private else 'public'} repository" if self.creates_repository else "use"
        place = f"{self.repository}, branch {self.branch}" + (" (created)" if self.creates_branch else "")
        how = "propose in a pull request" if self.pull_request else "commit"
        lines = [f"{made} {place}", f"{how}: {self.message}"]
        lines += [f"  {len(content):>12,} bytes  {name}" for name, content in self.files.items()]
        return [*lines, *(f"  {'remove':>12}        {name}" for name in self.removed)]


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push did."""

    source: str
    """`hf-hub:ORGANISATION/NAME@COMMIT`, which names exactly these files."""
    url: str
    """Of the commit, or of the pull request."""
    changed: bool
    """False if the hub held the same files already."""


def plan_push(
    bundle: Bundle,
    repository: str,
    *,
    branch: str | None = None,
    pull_request: bool = False,
    private: bool = False,
    message: str | None = None,
) -> Push:
    """Check that a bundle may be pushed, and say what that would do; nothing is written.

    Args:
        bundle: opened with all its files checked.
        repository: `organisation/name`; created if there is none.
        branch: None is the main one; created from it if there is none.
        pull_request: propose the change instead of making it.
        private: of a repository that is created.
        message: of the commit.

    Raises:
        BadInput: without a token or a network, and if the repository holds something else than this model.
    """
    name, revision = parse_repository(repository)
    if revision is not None:
        raise BadInput(f"{repository!r} names a revision, expected ORGANISATION/NAME; write --branch {revision}")
    _check_can_push(name)
    info, there = _target(name, branch, pull_request=pull_request, private=private)
    head = there if there is not None else info  # a new branch begins as the main one
    removed: tuple[str, ...] = ()
    if head is not None and head.sha is not None:
        present = {sibling.rfilename for sibling in head.siblings or ()}
        removed = _check_same_model(name, head.sha, present, bundle.card)
    card = bundle.card
    files = {file: bundle.read(file) for file in card.files}
    files[CARD_FILE] = (bundle.folder / CARD_FILE).read_bytes()
    files[README_FILE] = model_card(card, f"{HUB_PREFIX}{name}").encode()
    return Push(
        bundle=bundle,
        repository=name,
        branch=branch or "main",
        creates_repository=info is None,
        creates_branch=branch not in (None, "main") and there is None,
        private=private,
        pull_request=pull_request,
        message=message or f"{'Update' if removed or _holds_card(head) else 'Add'} {card.name}",
        parent=None if head is None else head.sha,
        files=files,
        removed=removed,
    )


def push(plan: Push) -> Pushed:
    """Do what a plan says, all files in one commit.

    Raises:
        BadInput: if the hub refuses, cannot be reached, or has a newer commit than the one that was looked at.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = huggingface_hub.HfApi()
    _check_can_push(plan.repository)
    doing = f"push to {plan.repository}"
    if plan.creates_repository:
        with translated(doing, plan.repository, refusals={403: "the token may not create a repository there"}):
            api.create_repo(plan.repository, private=plan.private)
        doing += ", which was created and is still empty"
    refusals = {403: "the token may not write there; use one that may, or propose the change with --create-pr"}
    if plan.creates_branch:
        with translated(doing, plan.repository, refusals=refusals):
            api.create_branch(plan.repository, branch=plan.branch)
        doing += f", whose branch {plan.branch} was created and is still as the main one"
    with translated(doing, plan.repository, plan.branch, refusals=refusals), bars():
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in plan.files.items()
        ]
        operations += [CommitOperationDelete(path_in_repo=name) for name in plan.removed]
        try:
            commit = api.create_commit(
                plan.repository,
                operations,
                commit_message=plan.message,
                revision=plan.branch,
                create_pr=plan.pull_request,
                parent_commit=plan.parent,
            )
        except RuntimeError as error:  # of one file; what it was is behind it
            raise error.__cause__ or error from error
    return Pushed(
        source=f"{HUB_PREFIX}{plan.repository}@{commit.oid}",
        url=commit.pr_url or commit.commit_url,
        changed=commit.oid != plan.parent,
    )


def _target(repository: str, branch: str | None, *, pull_request: bool, private: bool) -> tuple[Any, Any]:
    """Return what the hub says of the main branch and of the named one; None of what is not there.

    Raises:
        BadInput: a change is proposed to what is not there, or a public repository is to be private.
    """
    info = _head(repository, None)
    if info is None and pull_request:
        raise BadInput(
            f"there is no repository {repository} to propose a change to; push without --create-pr creates it"
        )
    if info is not None and private and not info.private:
        raise BadInput(
            f"{repository} exists and is public; --private is for a repository that is created, leave it out"
        )
    there = _head(repository, branch) if info is not None and branch is not None else None
    if pull_request and branch is not None and there is None:
        raise BadInput(
            f"{repository} has no branch {branch!r} to propose a change to; push without --create-pr creates it"
        )
    return info, there


def _head(repository: str, branch: str | None) -> Any:
    """Return what the hub says of a branch's newest commit; None if it has no such repository or branch."""
    import huggingface_hub
    from huggingface_hub import errors

    doing = f"push to {repository}"
    with translated(doing, repository), waiting(doing):
        try:
            return huggingface_hub.model_info(repository, revision=branch)
        except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError):
            return None


def _check_can_push(repository: str) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"cannot push to {repository}: HF_HUB_OFFLINE is set; unset it where there is a network")
    if huggingface_hub.get_token() is None:
        raise BadInput(
            f"cannot push to {repository}: there is no token for {endpoint()}; make one that may write at "
            f"{endpoint()}/settings/tokens and log in with `hf auth login`, or set HF_TOKEN"
        )


def _check_same_model(repository: str, commit: str, present: set[str], card: Card) -> tuple[str, ...]:
    """Check that a repository is empty or holds this model; returns the files that this version no longer has."""
    if CARD_FILE not in present:
        if strangers := sorted(present - _BLANK):
            raise BadInput(
                f"{repository} is no manygates bundle: it holds {', '.join(strangers[:3])}"
                f"{' and more' if len(strangers) > 3 else ''} and no {CARD_FILE}; push to a repository of its own"
            )
        return ()
    try:
        old = fetch_card(repository, commit).card
    except BundleError as error:
        raise BadInput(f"the card in {repository} cannot be read, so nothing is pushed over it ({error})") from error
    if old.name != card.name:
        raise BadInput(
            f"{repository} holds another model, {old.name!r}, expected {card.name!r}; push to a repository of its own, "
            f"or export this one with --name {old.name}"
        )
    return tuple(name for name in old.files if name in present and name not in card.files)


def _holds_card(info: Any) -> bool:
    return info is not None and any(sibling.rfilename == CARD_FILE for sibling in info.siblings or ())
