"""Names data sets of a hub, and lists the shards of one at one commit.

    OWNER/NAME                                     all of its shards, of the newest revision
    OWNER/NAME@REVISION                            of a branch, a tag or a commit
    hf://datasets/OWNER/NAME@REVISION/PATTERN      those of a folder or pattern in it; the revision may be left out

A revision is resolved to its commit once, and a commit never changes: whoever lists it again, or fetches from it later,
meets the same bytes.

Knows names, and the hub by huggingface_hub's own client, which is imported when it is asked. Does not fetch shards.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote

from mllm.config.data import ReaderConfig
from mllm.data.shard_names import is_pattern, listed_shards
from mllm.data.table_files import chosen_tables

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
CONVERTED = "refs/convert/parquet"
"""Where the hub keeps a data set of another form as parquet."""
ADDRESS = "hf://datasets/"
# A revision with a slash that is none of the hub's own is written with %2F, as by HfFileSystem.
_IN_ADDRESS = re.compile(r"([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/@]+))?(?:/(.*))?")
_SUFFIX = {"webdataset": ".tar", "parquet": ".parquet", "datasets": ".parquet"}
SECONDS_BETWEEN_TRIES = (1.0, 2.0, 4.0, 8.0)
"""How long is waited behind each try but the last."""
SECONDS_TO_ANSWER = 30.0
"""How long the hub may take to say which commit a revision is; the client would wait for ever."""
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubName:
    """Names a data set of a hub, or some of its files; `revision` is the newest where None, `path` all where empty."""

    repo: str
    revision: str | None = None
    path: str = ""


@dataclass(frozen=True, slots=True)
class HubShard:
    """Names one file of a data set at a commit, and how many bytes it has."""

    repo: str
    commit: str
    path: str
    num_bytes: int

    @property
    def name(self) -> str:
        """Return what messages call it, which is its address as well."""
        return f"{ADDRESS}{self.repo}@{self.commit}/{self.path}"


@dataclass(frozen=True)
class HubListing:
    """Holds the shards that a name stands for: paths and bytes, of one commit.

    Raises:
        ValueError: a path that leads out of the data set.
    """

    repo: str
    commit: str
    files: list[tuple[str, int]]

    def __post_init__(self) -> None:
        for path, _ in self.files:
            if path.startswith("/") or "\\" in path or {"..", ".", ""} & set(path.split("/")):
                raise ValueError(f"the hub lists {path!r} of {self.repo}, which is no path in a data set")

    @property
    def shards(self) -> list[HubShard]:
        """Return them one by one, in order."""
        return [HubShard(self.repo, self.commit, path, num_bytes) for path, num_bytes in self.files]

    def plain(self) -> dict[str, Any]:
        """Return what `of_plain` makes it from, as JSON holds it."""
        return asdict(self)

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> "HubListing":
        """Make one from what `plain` returned."""
        return cls(values["repo"], values["commit"], [(path, num_bytes) for path, num_bytes in values["files"]])


def hub_name(name: str, reader: ReaderConfig) -> HubName | None:
    """Read the name of a hub's data set as a stream may name it; None where it is one of a disk.

    Raises:
        ValueError: an address of a hub that names no data set.
    """
    if name.startswith("hf://"):
        match = _IN_ADDRESS.fullmatch(name.removeprefix(ADDRESS)) if name.startswith(ADDRESS) else None
        if match is None:
            raise ValueError(
                f"data.train names {name!r}; data sets of a hub are {ADDRESS}OWNER/NAME[@REVISION][/PATTERN]"
            )
        return HubName(match[1], match[2] and unquote(match[2]), (match[3] or "").rstrip("/"))
    is_name = reader.format != "parquet" and HUB_NAME.fullmatch(name) is not None
    # What is called like a shard is one that is missing on the disk.
    if not is_name or os.path.exists(name) or name.endswith(_SUFFIX[reader.format]):
        return None
    repo, _, revision = name.partition("@")
    return HubName(repo, revision or None)


def list_shards(name: str, reader: ReaderConfig, commit: str | None = None) -> HubListing:
    """List the shards that a name stands for; of tables, those of `reader.split`.

    Where no revision is named and there is no parquet, the hub's own conversion is listed, which `read_datasets` reads
    then as well.

    Args:
        name: one that `hub_name` reads.
        commit: that of an earlier listing, in place of what the name's revision is now.

    Raises:
        ValueError: no name of a hub's data set, or a pattern that cannot be read.
        FileNotFoundError, PermissionError, ConnectionError: see `several_tries`; or there is no such shard.
    """
    parsed = hub_name(name, reader)
    if parsed is None:
        raise ValueError(f"data.train names {name!r}, which is no data set of a hub")
    suffix = _SUFFIX[reader.format]
    revisions = [commit or parsed.revision]
    if revisions == [None] and suffix == ".parquet":
        revisions.append(CONVERTED)
    found, files = "", {}
    for revision in revisions:
        found, files = _files(name, parsed.repo, revision, suffix)
        if files:
            break
    if not files:
        raise FileNotFoundError(f"data.train names {name}, and {parsed.repo} holds no *{suffix} at {found}")
    # As `sorted` puts paths of a disk, so that shards come in the order of a copy.
    paths = [str(path) for path in sorted(map(PurePosixPath, files))]
    chosen = listed_shards(parsed.path, paths)
    if suffix == ".parquet" and parsed.path not in files and not is_pattern(parsed.path):
        folder = Path(f"{parsed.repo}@{found}")
        tables = chosen_tables([folder / path for path in chosen], folder, reader.split)
        chosen = [table.relative_to(folder).as_posix() for table in tables]
    return HubListing(parsed.repo, found, [(path, files[path]) for path in chosen])


def _files(name: str, repo: str, revision: str | None, suffix: str) -> tuple[str, dict[str, int]]:
    """Return the commit of a revision, and the bytes of each of its files of a suffix, by path."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile

    if constants.is_offline_mode():
        return _cached_files(name, repo, revision, suffix)
    api = HfApi()

    def ask() -> tuple[str, dict[str, int]]:
        commit = api.dataset_info(repo, revision=revision, timeout=SECONDS_TO_ANSWER).sha
        assert commit is not None
        tree = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")
        return commit, {
            file.path: file.size for file in tree if isinstance(file, RepoFile) and file.path.endswith(suffix)
        }

    return several_tries(_called(name), repo, revision, ask)


def _called(name: str) -> str:
    """Return what messages call a name, which may be that of a folder as well."""
    here = "" if name.startswith(ADDRESS) else ", which is no file or folder here"
    return f"data.train names {name}{here}"


def _cached_files(name: str, repo: str, revision: str | None, suffix: str) -> tuple[str, dict[str, int]]:
    """Return what the cache holds of a revision, where the hub must not be asked."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=[f"*{suffix}"], local_files_only=True
            )
        )
    except OSError as error:
        raise ConnectionError(
            f"{_called(name)}: HF_HUB_OFFLINE is set, and the cache does not hold {repo} whole: {error}. Unset "
            f"HF_HUB_OFFLINE, or fetch it where there is a network: hf download --repo-type dataset {repo}"
        ) from error
    files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob(f"*{suffix}")}
    logger.warning(
        "HF_HUB_OFFLINE is set: the %d shards that the cache holds of %s at %s are taken for all there are",
        *(len(files), repo, folder.name),
    )
    return folder.name, files


def several_tries(
    what: str,
    repo: str,
    revision: str | None,
    ask: Callable[[], Result],
    wait: Callable[[float], object] = time.sleep,
) -> Result:
    """Ask the hub, and again where it fails for a reason that may pass.

    Args:
        what: begins every message.
        repo, revision: what is asked for.
        wait: waits so many seconds between two tries.

    Raises:
        FileNotFoundError: the hub has no such data set, revision or file.
        PermissionError: this account may not read it; says what to do.
        ConnectionError: the hub must not be asked (HF_HUB_OFFLINE), or did not answer at any try.
        ValueError: a name that no data set of a hub can have.
        OSError: of the disk.
    """
    for seconds in (*SECONDS_BETWEEN_TRIES, None):
        try:
            return ask()
        # Those of the client, of httpx or httpx2 below it, and of hf_xet have no class in common.
        except Exception as error:
            if (refusal := _refusal(what, repo, revision, error)) is not None:
                raise refusal from error
            said = " ".join(str(error.__cause__ or error).split())
            if seconds is None:
                tries = len(SECONDS_BETWEEN_TRIES) + 1
                raise ConnectionError(f"{what}: the hub did not give it at any of {tries} tries: {said}") from error
            logger.warning("%s: %s; trying again in %g s", what, said, seconds)
            wait(seconds)
    raise AssertionError("the last try returns or raises")


def _refusal(what: str, repo: str, revision: str | None, error: Exception) -> Exception | None:
    """Say what to do about an error that will not pass; None for others."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/datasets/{repo}"
    if isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return ConnectionError(f"{what}: HF_HUB_OFFLINE is set, and the cache does not hold it; unset it")
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{what}: {repo} is gated; ask for access on {page}, then {_LOGIN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{what}: the hub has no data set {repo}, or does not show it to this account; if it is private, {_LOGIN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{what}: {repo} has no revision {revision}; {page}/tree/main shows those it has")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return FileNotFoundError(f"{what}: {repo} holds no such file at {revision}")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return PermissionError(f"{what}: the hub refuses this account ({error.response.status_code}); {_LOGIN}")
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"{what}: {error}")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        return OSError(error.errno, f"{what}: {error.strerror}", error.filename)  # of the disk
    return None


def root_of_snapshot(snapshot: Path, files: Iterable[Path]) -> Path:
    """Return the folder of the hub's cache that a snapshot, and what some files of it link to, lie in.

    It is that of the data set; or the whole cache, where the client keeps what several data sets hold only once.

    Args:
        snapshot: `datasets--OWNER--NAME/snapshots/COMMIT` in it.
    """
    of_set = snapshot.parents[1]
    inside = of_set.resolve()
    return of_set if all(file.resolve().is_relative_to(inside) for file in files) else of_set.parent
