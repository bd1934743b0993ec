"""Uploading a run to the Hugging Face Hub, in one commit."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from genrec_dist.config.hub import SUFFIXES, TOKEN, HubName, hub_library, one_line_errors
from genrec_dist.sharing.card import About, model_card
from genrec_dist.sharing.public_files import write_public_files


def push(run: Path, name: HubName, about: About, *, private: bool = False) -> str:
    """Upload a run, and return the address of the commit.

    Files go up one by one and are seen together, in one commit at the end. What an interrupted
    push has uploaded is found by its hash and not sent again. Files of an earlier push that this
    one lacks are removed in the same commit; others in the repository stay.

    Args:
        run: Directory of `genrec train`.
        name: The repository, which is made if it is not there, and the branch.
        about: What the card says and the run does not know.
        private: Whether a new repository is private; False: as its owner's setting says.

    Raises:
        ValueError: There is no token, nothing to upload, or the hub refuses.
    """
    token = os.environ.get(TOKEN)
    if not token:
        raise ValueError(
            f"push: set {TOKEN} in the environment to a token that may write to {name}"
        )
    hub = hub_library()
    with TemporaryDirectory(prefix="genrec-push-") as temporary:
        folder = Path(temporary)
        write_public_files(run, folder)
        (folder / "README.md").write_text(model_card(run, name, about), encoding="utf-8")
        ours = {path.name: path for path in sorted(folder.iterdir())}
        api = hub.HfApi(token=token)
        with one_line_errors(name):
            api.create_repo(name.repo, private=private or None, exist_ok=True)
            if name.revision:
                api.create_branch(name.repo, branch=name.revision, exist_ok=True)
            there = api.list_repo_files(name.repo, revision=name.revision)
            stale = [file for file in there if file.endswith(SUFFIXES) and file not in ours]
            commit = api.create_commit(
                name.repo,
                [
                    *(hub.CommitOperationAdd(file, path) for file, path in ours.items()),
                    *(hub.CommitOperationDelete(file) for file in stale if "/" not in file),
                ],
                commit_message="A run of genrec train",
                revision=name.revision,
            )
    return str(commit.commit_url)
