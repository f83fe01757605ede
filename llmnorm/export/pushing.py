"""Upload an exported folder to the Hugging Face hub."""

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.utils import HFValidationError, validate_repo_id

from llmnorm.errors import ConfigError, EnvironmentProblem


def check_push(repo: str) -> None:
    """Fail before the work if nothing could be uploaded afterwards.

    Raises:
        ConfigError: for what is no name of a repository.
        EnvironmentProblem: if nobody is logged in, or the hub is switched off.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--push {repo}: expected USER/NAME; {reason}") from error
    if is_offline_mode():
        raise EnvironmentProblem("--push: HF_HUB_OFFLINE is set; unset it to upload")
    if huggingface_hub.get_token() is None:
        raise EnvironmentProblem("--push: no token of the hub; run `hf auth login` first")


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder, its files as one commit, and return the address.

    Args:
        folder: what `llmnorm export` made.
        repo: made if it is not there.
        private: of a repository that is made.

    Raises:
        EnvironmentProblem: if the hub refuses or cannot be reached; the folder stays.
    """
    hub: Any = huggingface_hub.HfApi(library_name="llmnorm")
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from llmnorm")
    except Exception as error:  # of the client, of HTTP, of the network: many classes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EnvironmentProblem(
            f"--push {repo}: {reason:.300}; the folder {folder} is complete, upload it with"
            f" `hf upload {repo} {folder}`"
        ) from error
    return f"{hub.endpoint}/{repo}"
