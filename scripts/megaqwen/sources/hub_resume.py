"""Goes on with the files that a killed download left unfinished.

The Hub's client resumes after a dropped connection, but not in a new process: it starts such a file
again under a new name. Its unfinished files carry the digest of the whole file in their names, so
they can be finished with the client's own HTTP function before it is asked for the rest.
"""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get, is_xet_available
from huggingface_hub.utils import build_hf_headers

from megaqwen.provenance import sha256_file
from megaqwen.words import readable_bytes

logger = logging.getLogger("megaqwen.download")

UNFINISHED = ".cache/huggingface/download/*.incomplete"


def finish_interrupted_files(
    partial: Path,
    names: Mapping[str, str],
    *,
    repo_id: str,
    commit: str,
    token: str | bool,
) -> None:
    """Finish or remove every unfinished file, so that none is left.

    Args:
        partial: The client's local directory.
        names: Names of the wanted files by SHA-256.
        repo_id: Owner and name.
        commit: What is being downloaded.
        token: As the client takes it.
    """
    largest: dict[str, Path] = {}
    for path in sorted(partial.glob(UNFINISHED), key=lambda path: path.stat().st_size):
        digest = path.name.split(".")[1]  # NAME'S DIGEST.CONTENT'S DIGEST.RANDOM.incomplete
        if earlier := largest.pop(digest, None):
            earlier.unlink()
        if digest in names and not (partial / names[digest]).exists() and path.stat().st_size:
            largest[digest] = path
        else:
            path.unlink()

    def finish(digest: str) -> None:
        url = hf_hub_url(repo_id, names[digest], revision=commit)
        finish_file(largest[digest], partial / names[digest], digest, url, token)

    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(finish, largest))


def finish_file(path: Path, target: Path, digest: str, url: str, token: str | bool) -> None:
    """Fetch the rest of one file and give it its name, or remove it where that cannot be done."""
    metadata = get_hf_file_metadata(url, token=token)
    if metadata.xet_file_data is not None and is_xet_available():
        path.unlink()  # written out of order: its length says nothing of what is in it
        return
    arrived = path.stat().st_size
    if metadata.size is None or arrived > metadata.size:
        path.unlink()
        return
    logger.info("%s: going on after %s", target.name, readable_bytes(arrived))
    with path.open("ab") as stream:
        http_get(
            url,
            stream,
            resume_size=arrived,
            headers=build_hf_headers(token=token),
            expected_size=metadata.size,
        )
    if sha256_file(path) == digest:
        path.replace(target)
    else:
        path.unlink()
