"""Files of a Hub repo, all of one commit, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def download(repo_id: str, names: Sequence[str], *, revision: str | None, **options: Any) -> tuple[list[Path], str]:
    """Paths of the files `names` in the Hub's cache, and the commit that they belong to.

    Args:
        revision: branch, tag or commit; None is main. The first file says which commit that is now.
        options: see `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: no such repo, revision or file, or not in the cache while the Hub is out of reach.
        PermissionError: the repo is gated.
    """
    place = f"{constants.ENDPOINT}/{repo_id}"
    at = f" at revision {revision!r}" if revision else ""
    paths: list[Path] = []
    commit = revision
    for name in names:
        try:
            paths.append(Path(hf_hub_download(repo_id, name, revision=commit, **options)))
        except HFValidationError as error:
            raise FileNotFoundError(f"{repo_id!r} is neither a folder nor a Hub repo id (owner/name)") from error
        except GatedRepoError as error:
            raise PermissionError(
                f"Hub repo {repo_id} is gated: accept its terms at {place}, then log in with `hf auth login` or pass "
                "token="
            ) from error
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"there is no Hub repo {repo_id} that you may read: check the name; if it is private, log in with "
                "`hf auth login` or pass token="
            ) from error
        except RevisionNotFoundError as error:
            raise FileNotFoundError(
                f"Hub repo {repo_id} has no revision {revision!r}: leave it out for main, or choose one of "
                f"{place}/commits/main"
            ) from error
        except LocalEntryNotFoundError as error:
            cache = options.get("cache_dir") or constants.HF_HUB_CACHE
            raise FileNotFoundError(
                f"{name} of Hub repo {repo_id}{at} is not in the cache {cache}, and the Hub is out of reach "
                "(HF_HUB_OFFLINE, local_files_only or no connection): load it once online"
            ) from error
        except EntryNotFoundError as error:
            raise FileNotFoundError(
                f"Hub repo {repo_id}{at} is no codebook, since it has no {name}: give one that "
                "AnTKVCodebook.push_to_hub made"
            ) from error
        commit = paths[0].parent.name  # .../snapshots/<commit>/<name>
    assert commit is not None
    return paths, commit
