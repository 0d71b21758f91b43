"""What the Hub's client raises, said as one message: what, where, and what to do."""

import contextlib
import json
import os
from collections.abc import Iterator

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from megaqwen.errors import InputError, is_disk_full

TRY_AGAIN = "what has arrived is kept: the same command goes on from there"
REFS_NAMED = 20


@contextlib.contextmanager
def clear_hub_errors(api: HfApi, repo_id: str, revision: str) -> Iterator[None]:
    """Turn what the client raises in the block into an InputError that names the remedy."""
    try:
        yield
    except Exception as error:
        message = explain(error, api, repo_id, revision)
        if message is None:
            raise
        raise InputError(message) from error


def explain(error: Exception, api: HfApi, repo_id: str, revision: str) -> str | None:
    """The message for an error of the client; None for one that says nothing about the Hub."""
    if isinstance(error, InputError) or is_disk_full(error):
        return None
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client's advice about its cache does not apply here
    match error:
        case OfflineModeIsEnabled():
            return (
                f"{repo_id} is to be downloaded, but HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is"
                " set: unset it, or give a model on disk (model.source: path)"
            )
        case GatedRepoError():
            return explain_gated(error, f"{api.endpoint}/{repo_id}", repo_id)
        case RevisionNotFoundError():
            return f"{repo_id} has no revision {revision!r}{existing_refs(api, repo_id)}"
        case DisabledRepoError():
            return f"{repo_id}: the Hub has disabled access to this repository"
        case RepositoryNotFoundError():
            words = "the token in HF_TOKEN may not see it"
            token = words if environment_token() else "HF_TOKEN is not set"
            return (
                f"there is no model {repo_id} at {api.endpoint}: check model.repo_id;"
                f" a private one needs a token ({token})"
            )
        case HfHubHTTPError():
            return explain_status(error, api.endpoint, repo_id)
        case httpx2.HTTPError() | httpx2.StreamError() | ConnectionError():
            return (
                f"the Hub at {api.endpoint} cannot be reached ({type(error).__name__}: {error});"
                f" check the network, the proxy and HF_ENDPOINT; {TRY_AGAIN}"
            )
        case FileMetadataError() | json.JSONDecodeError():
            return (
                f"{api.endpoint} does not answer as a Hugging Face Hub ({first_line(error)}): check"
                " HF_ENDPOINT, and whether a proxy wants a login"
            )
        case FileNotFoundError() if str(error.filename).endswith(".incomplete"):
            return f"{repo_id}: another download into the same place took {error.filename}"
        case HFValidationError():
            return f"model.repo_id: {first_line(error)}"
        case OSError() if "Consistency check failed" in str(error):
            return f"{repo_id}: a file did not arrive whole: {first_line(error)}; {TRY_AGAIN}"
    return None


def explain_gated(error: GatedRepoError, page: str, repo_id: str) -> str:
    """Access must be granted, or the token that shows it is missing."""
    if not environment_token():
        return (
            f"{repo_id} is gated and HF_TOKEN is not set: accept its terms at {page}, make a token"
            " at huggingface.co/settings/tokens, and set it as HF_TOKEN in the environment"
        )
    return (
        f"{repo_id} is gated and the account of the token in HF_TOKEN has no access: accept its"
        f" terms, or ask for access, at {page}, and check that the token may read gated models"
    )


def explain_status(error: HfHubHTTPError, endpoint: str, repo_id: str) -> str:
    """Any other status that is an error."""
    status = error.response.status_code
    if status == 401:
        return f"{repo_id}: the Hub refused the token in HF_TOKEN (401): it is wrong or has expired"
    if status == 403:
        return f"{repo_id}: the token in HF_TOKEN may not read it (403): {error.server_message}"
    return f"{repo_id}: {endpoint} answered {status}: {first_line(error)}; {TRY_AGAIN}"


def existing_refs(api: HfApi, repo_id: str) -> str:
    """The branches and tags that there are, as the end of a sentence."""
    try:
        refs = api.list_repo_refs(repo_id)
    except (HfHubHTTPError, httpx2.HTTPError):
        return ": give a branch, a tag or a full commit"
    branches = ", ".join(ref.name for ref in refs.branches[:REFS_NAMED]) or "none"
    tags = ", ".join(ref.name for ref in refs.tags[:REFS_NAMED]) or "none"
    return f"; branches: {branches}; tags: {tags}"


def environment_token() -> str:
    """HF_TOKEN without what a file leaves around it; empty where it is not set.

    Raises:
        InputError: No header can carry it. It is not quoted: a log is no place for it.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError(
            "HF_TOKEN holds a character that no token has, such as a line's end: set it again"
        )
    return token


def first_line(error: Exception) -> str:
    """The first line with text of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")
