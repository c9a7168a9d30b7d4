"""Pushing an audited checkpoint to the Hub: verified first, resumed after a broken connection, refused in words."""

from __future__ import annotations

import fnmatch
import hashlib
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from layerprune.artifacts import HealLog, ModelRef, Receipt
from layerprune.auditor.inputs import ExportedFolder, short
from layerprune.auditor.verification import verify
from layerprune.checkpoint import Checkpoint
from layerprune.checkpoint.companions import companions, left_out
from layerprune.checkpoint.location import HUB_ID, lies_at
from layerprune.config import PushConfig
from layerprune.errors import DocumentError, LayerpruneError, UsageError, one_line
from layerprune.parsing import read_json
from layerprune.report.card import CARD, OURS, nearest_on_hub, own_words, read_card, write_card
from layerprune.report.page import REPORT
from layerprune.util import SILENT, Progress

ATTEMPTS = 4
FIRST_WAIT = 2.0  # seconds; doubled after each attempt, so 14 s in all before giving up
# What an earlier push left in the repo and this one replaces whole: weights that no index names would be downloaded by
# everybody, and documents beside others would make the folder fail its own verification. Of others these stop a push.
REPLACED = ("*.safetensors", "*.safetensors.index.json", *(name for name in OURS if name != CARD), REPORT)
MOVED = 412  # somebody has committed since the repo was looked at: it is looked at again
PASSING = (408, MOVED, 425, 429, 500, 502, 503, 504)
NOT_DONE = (MOVED, 425, 429)  # of these: the request was turned away, so whatever it asked for has not happened
MESSAGE = "Upload with layerprune"

T = TypeVar("T")


class PushError(LayerpruneError):
    """The Hub did not take the checkpoint; the message says why and what to do."""


@dataclass(frozen=True)
class Pushed:
    """What went to the Hub, or would go in a dry run."""

    repo: str
    files: dict[str, int]  # bytes by path in the repo
    url: str | None  # of the commit or pull request; None in a dry run

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def push(
    folder: Path,
    repo: str,
    *,
    progress: Progress = SILENT,
    wait: Callable[[float], None] = time.sleep,
    **options: Any,
) -> Pushed:
    """Create or update the Hub repo ``repo`` with a folder's weights, card, audit and report; see ``PushConfig``.

    The folder is verified before anything is sent; one that is not as export and audit left it, or has no audit
    (unless ``allow_unaudited``), raises ``UsageError``. Of a base that was a local folder the documents hold the name
    alone; ``base_model``, whose files must be the folder's, is the Hub id that the card gets for it, here, too.

    In the repo, weights and documents of an earlier push (``REPLACED``) that are not in the folder are deleted in the
    same commit. A README.md there keeps its text and its metadata, and gets the folder's part. Other files stay; where
    one of them is in the way, and is not as an earlier push left it, ``UsageError`` names it before anything is sent.
    The commit is made only on what was looked at (its parent). A dry run, which asks the Hub nothing, tells none of
    this. The token is found by huggingface_hub, and
    shown nowhere. ``create_pr`` opens a pull request instead of committing. A connection that breaks is taken up again:
    files that have arrived are not sent twice. What the Hub refuses raises ``PushError``.
    """
    folder, config = Path(folder), PushConfig.of(**options)
    base_model = config.base_model
    if not HUB_ID.fullmatch(repo):
        raise UsageError(f"{repo!r} is no name of a Hub repo; write owner/name")
    if config.create_pr and config.revision is not None:
        said = f"leave --revision {config.revision} or --create-pr out"
        raise UsageError(f"a pull request is always made to main; {said}")
    receipt = _check(folder, config.allow_unaudited, progress)
    if base_model is not None:
        check_name(receipt.base, base_model)
    names = _names(folder, receipt, progress)
    for one in (receipt, *(earlier.receipt for earlier in receipt.rounds)):
        if (place := lies_at(one.base)) is not None:
            check_no_path(folder, names, str(place))
    _check_card(folder / CARD)
    if not config.dry_run and base_model is not None:
        from huggingface_hub import HfApi

        api = HfApi(library_name="layerprune")
        known = _patiently(lambda: compare(receipt.base, base_model, api, progress), base_model, progress, wait)
        progress.note(f"base_model: {base_model} ({known})")
        write_card(folder, base_model=base_model)
    elif base_model is None and nearest_on_hub(receipt) is None and "base_model" not in read_card(folder / CARD)[0]:
        progress.note("the card names no base_model: give --base-model org/name if the base is on the Hub")
    files = {name: (folder / name).stat().st_size for name in names}
    url = None
    if not config.dry_run:
        url = _patiently(
            lambda: _send(folder, repo, [*files], config, progress), repo, progress, wait, opens=config.create_pr
        )
    return Pushed(repo, files, url)


def _names(folder: Path, receipt: Receipt, progress: Progress) -> list[str]:
    """Return the files to publish: weights, config, what belongs to them, what a method left, our documents."""
    log = folder / "layerprune" / HealLog.filename
    written = HealLog.load(log).files if log.exists() else receipt.files
    attached = {*written} - {*receipt.files}
    found = companions(folder, {*written} - attached, Checkpoint.open(folder).names)
    for note in found.notes:
        progress.note(note)
    if found.left:
        raise UsageError(f"{left_out(found.left)}: they have no part in a model; export again, nothing was sent")
    ours = [name for name in (*OURS, REPORT) if (folder / name).exists()]
    return sorted({*written, *ours})


def _check(folder: Path, allow_unaudited: bool, progress: Progress) -> Receipt:
    found = verify(folder, progress=progress)
    if not found.ok:
        raise UsageError(f"{folder} is not as export and audit left it: {found.first_problem}; nothing was sent")
    if not found.audited and not allow_unaudited:
        raise UsageError(
            f"{folder} has not been audited: nobody would know what it lost. Run layerprune audit {folder}, "
            "or push with --allow-unaudited"
        )
    return ExportedFolder.read(folder).receipt


def _check_card(card: Path) -> None:
    """Raise ``UsageError`` for metadata that the Hub's own client cannot read: the Hub would refuse the commit."""
    from huggingface_hub import ModelCard

    try:
        ModelCard.load(card, ignore_metadata_errors=False)
    except (ValueError, TypeError) as error:
        raise UsageError(f"README.md has metadata that the Hub does not take: {one_line(error)}") from error


def _send(folder: Path, repo: str, files: list[str], config: PushConfig, progress: Progress) -> str:
    """Upload everything, then commit it at once: where that opens a pull request, the last request alone does.

    ``upload_folder`` may open it long before the last file has arrived, and anew whenever it is called again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(library_name="layerprune")
    name = api.create_repo(repo, private=config.private, exist_ok=True).repo_id
    if config.revision is not None:
        api.create_branch(name, branch=config.revision, exist_ok=True)
    with TemporaryDirectory(prefix="layerprune-") as work:
        there = RemoteFiles.read(api, name, config.revision, Path(work))
        stale = there.stale(folder, files)
        sources = {file: folder / file for file in files}
        if CARD in there.ids:
            sources[CARD] = there.card(folder, progress)
        commit = api.create_commit(
            repo_id=name,
            operations=[
                *(CommitOperationDelete(path_in_repo=file) for file in stale),
                *(CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(path)) for file, path in sources.items()),
            ],
            commit_message=MESSAGE,
            revision=config.revision,
            create_pr=config.create_pr,
            parent_commit=there.commit,
        )
    return str(commit.pr_url or commit.commit_url)


def _patiently(
    send: Callable[[], T], repo: str, progress: Progress, wait: Callable[[float], None], *, opens: bool = False
) -> T:
    """Call ``send`` again while what goes wrong is passing: timeouts, cut connections, 429 and 5xx.

    With ``opens`` a commit opens a pull request: where its answer was lost, another would open a second one.
    """
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    for attempt in range(ATTEMPTS):
        try:
            return send()
        except HFValidationError as error:
            raise PushError(f"{repo!r} is not a repo name: {one_line(error)}") from error
        except LocalTokenNotFoundError as error:
            raise PushError("no Hugging Face token was found; run hf auth login, or set HF_TOKEN") from error
        except OfflineModeIsEnabled as error:
            raise PushError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from error
        except (HTTPError, ConnectionError, TimeoutError, RuntimeError, LocalEntryNotFoundError) as error:
            said = _passing(error, repo, last=attempt == ATTEMPTS - 1, opens=opens)
        except (ValueError, LookupError, TypeError) as error:  # what was sent is no JSON, or not what the Hub sends
            said = f"the answer is not the Hub's ({one_line(error)}); a proxy or a login page may stand in between"
            raise PushError(f"{repo}: {said}") from error
        pause = FIRST_WAIT * 2**attempt
        progress.note(f"{said}; trying again in {pause:.0f} s")
        wait(pause)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _passing(raised: BaseException, repo: str, *, last: bool, opens: bool) -> str:
    """Say what went wrong where it may go right the next time; raises ``PushError`` where it may not."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    error: Any = raised
    # huggingface_hub wraps what goes wrong with an LFS file in the former, with a download in the latter
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, f"the Hub answered {error.response.status_code}"
        refusal = _refusal(repo, error)
    elif isinstance(error, HTTPError | ConnectionError | TimeoutError) and not hasattr(error, "response"):
        status, said = None, f"the connection broke ({one_line(error)})"
        refusal = f"the connection to the Hub broke {ATTEMPTS} times: {one_line(error)}"
    else:
        raise PushError(f"{repo}: the Hub's client failed: {one_line(error)}") from raised
    passes = status is None or status in PASSING
    if passes and opens and status not in NOT_DONE and _is_commit(error):
        raise PushError(
            f"the answer to the commit was lost ({said}), so the pull request may be open: "
            f"look at the pull requests of {repo}, and push again only if it is not there"
        ) from raised
    if last or not passes:
        raise PushError(refusal) from raised
    return said


def _is_commit(error: Any) -> bool:
    """Whether the request that failed was the commit; an error that does not say which it was may be of it."""
    try:
        return "/commit/" in str(getattr(error, "response", error).request.url)
    except (AttributeError, RuntimeError):  # the HTTP client raises the latter for an error without its request
        return True


def _refusal(repo: str, error: Any) -> str:
    status, said = error.response.status_code, one_line(error.server_message or error)
    advice = {
        400: "the Hub does not accept the content",
        401: "the token is missing or not valid; run hf auth login",
        403: "the token may not write there; use one with write access to this namespace",
        404: "there is no such repo or revision, or the token may not see it",
        MOVED: "others commit to it at the same time; push again",
        413: "the upload is too large",
        429: "too many requests; wait some minutes and push again, what has arrived is not sent twice",
    }.get(status, "the Hub failed" if status >= 500 else "the Hub refused")
    return f"{repo}: the Hub answered HTTP {status}: {advice} ({said})"


# What lies in the repo already, at one commit: whose it is, and what becomes of it.


MOST_NAMED = 5  # files that a refusal names
SHA256 = 64  # hex digits; the id of a git blob has 40
THERE = "there"  # below the working folder: what was downloaded


@dataclass(frozen=True)
class RemoteFiles:
    """The files of a repo at one commit; those that have to be read are downloaded into ``work``."""

    api: Any
    repo: str
    commit: str
    ids: dict[str, str]  # by path: sha256 of a file kept by LFS, else the id of its git blob
    work: Path

    @classmethod
    def read(cls, api: Any, repo: str, revision: str | None, work: Path) -> RemoteFiles:
        info = api.model_info(repo, revision=revision, files_metadata=True)
        ids = {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id for one in info.siblings}
        return cls(api, repo, info.sha, ids, work)

    def stale(self, folder: Path, pushed: Sequence[str]) -> list[str]:
        """Return what an earlier push left and this one, of the files ``pushed``, deletes.

        Raises ``UsageError`` for files of others that would be overwritten, or loaded in the place of these.
        """
        own = _manifest(folder / "layerprune")
        left = [file for file in self.ids if any(fnmatch.fnmatchcase(file, one) for one in REPLACED)]
        left = [file for file in left if file not in pushed]
        met = [file for file in pushed if file in self.ids and file != CARD]
        differ = [file for file in met if not self._is(file, (folder / file).read_bytes, own.get(file, set()))]
        inside = [self._fetched(name) for name in OURS if name in self.ids and name != CARD] if left or differ else []
        earlier = _manifest(inside[0].parent) if inside else {}
        others = {file for file in (*left, *differ) if not self._was_pushed(file, earlier)}
        if stop := sorted(file for file in others if "/" not in file or file in (*differ, *REPLACED)):
            named = ", ".join(stop[:MOST_NAMED]) + (f" and {len(stop) - MOST_NAMED} more" * (len(stop) > MOST_NAMED))
            raise UsageError(
                f"{self.repo} holds files that no push of layerprune left there as they are, in the way of this one: "
                f"{named}; nothing was sent: move them away in the repo, or push to another one"
            )
        return sorted({*left} - others)

    def card(self, folder: Path, progress: Progress) -> Path:
        """Return the card to push: people's words and metadata in the repo are kept, our part is the folder's."""
        merged = self.work / "merged"
        merged.mkdir()
        try:
            path = write_card(folder, theirs=self._fetched(CARD), into=merged)
            _check_card(path)
        except (DocumentError, UsageError) as error:
            said = one_line(error).replace(f"{self.work / THERE}/", "")
            raise UsageError(f"the card in {self.repo} cannot be joined: {said}; nothing was sent") from error
        if not all(words in path.read_text(encoding="utf-8") for words in own_words(folder / CARD)):
            progress.note(f"{CARD}: the words of the card in {self.repo} are kept, those of {folder / CARD} do not go")
        return path

    def _is(self, file: str, content: Callable[[], bytes], digests: Collection[str]) -> bool:
        """Whether a file of the repo has this content; ``digests``: sha256 that are known of it."""
        if len(found := self.ids[file]) == SHA256:
            return found in (digests or {hashlib.sha256(content()).hexdigest()})
        data = content()
        return found == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    def _was_pushed(self, file: str, earlier: Mapping[str, Collection[str]]) -> bool:
        """Whether a file of the repo is as an earlier push left it: by the manifest there, a document by its form."""
        if file in OURS:
            return _document(self._fetched(file)) is not None
        if file == REPORT:
            return b"layerprune verify ." in self._fetched(file).read_bytes()
        if file not in earlier:
            return False
        if len(found := self.ids[file]) == SHA256:
            return found in earlier[file]
        return hashlib.sha256(self._fetched(file).read_bytes()).hexdigest() in earlier[file]

    def _fetched(self, file: str) -> Path:
        place = self.work / THERE
        return Path(self.api.hf_hub_download(self.repo, file, revision=self.commit, local_dir=str(place)))


def _document(path: Path) -> dict[str, Any] | None:
    """Return a document of any version of layerprune; None for a file that is none."""
    try:
        content = read_json(path)
    except ValueError:
        return None
    return content if isinstance(content, dict) and content.get("kind") == path.stem else None


def _manifest(inside: Path) -> dict[str, set[str]]:
    """Return the sha256 of the files that the receipt and the healing log in a folder name, by path."""
    found: dict[str, set[str]] = {}
    for kind in (Receipt, HealLog):
        content = _document(inside / kind.filename) if (inside / kind.filename).exists() else None
        files = content.get("files") if content else None
        for name, entry in files.items() if isinstance(files, dict) else ():
            if isinstance(entry, dict) and isinstance(entry.get("sha256"), str):
                found.setdefault(name, set()).add(entry["sha256"])
    return found


# What the Hub is told of the base: its Hub id, held against the base's files where they are at hand; never a path.


WRITTEN = (".json", ".md", ".html", ".txt", ".jinja", ".yaml", ".py")  # files that may hold a path in words


def check_name(base: ModelRef, base_model: str) -> None:
    """Raise ``UsageError`` unless ``base_model`` can name the base, a local folder that has not changed since."""
    if not HUB_ID.fullmatch(base_model):
        raise UsageError(f"--base-model {base_model!r} is not a Hub id; write org/name")
    if base.revision is not None:
        raise UsageError(f"the documents name the base as {base.id}; --base-model is for one that was a local folder")
    folder = lies_at(base)
    if folder is None:  # and nothing is compared
        return
    found = Checkpoint.open(folder).fingerprint()
    if found != base.fingerprint:
        raise UsageError(
            f"the folder {folder.name} no longer holds the base of this checkpoint: its weights' fingerprint is "
            f"{short(found)}, the receipt says {short(base.fingerprint)}; put the base back, or leave --base-model out"
        )


def compare(base: ModelRef, base_model: str, api: Any, progress: Progress = SILENT) -> str:
    """Return how it is known that ``base_model`` on the Hub is the base: by the sha256 of each weight file.

    Nothing is downloaded. Raises ``UsageError`` for another model; a base whose folder is not known here cannot be
    compared, and the answer says so.
    """
    info = api.model_info(base_model, files_metadata=True)
    there = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs is not None}
    folder = lies_at(base)
    if folder is None:
        return "not compared, the base's folder is not known here"
    files = Checkpoint.open(folder).files
    with progress.task(f"comparing the base with {base_model}", sum(f.stat().st_size for f in files), "B") as advance:
        for file in files:
            name = file.relative_to(folder).as_posix()
            with file.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
            if there.get(name) != digest:
                has = "has another file of that name" if name in there else "has no such file"
                raise UsageError(
                    f"{base_model} is not the base of this checkpoint, which was made with a {name} of sha256 "
                    f"{digest[:12]}...: the Hub's model {has}; name the right one, or leave --base-model out"
                )
            advance(file.stat().st_size)
    return f"sha256 of {len(files)} weight file{'s' * (len(files) > 1)} equal on the Hub"


def check_no_path(folder: Path, files: Sequence[str], path: str) -> None:
    """Raise ``UsageError`` when a file that is about to be published holds a local path in words.

    A path that only ends or begins like it is another one: ``some/model`` and ``/models`` are not ``/model``.
    """
    whole = re.compile(rb"(?<![\w.~*})-])" + re.escape(path.rstrip("/").encode()) + rb"(?![\w-]|\.\w)")
    for file in files:
        if file.endswith(WRITTEN) and whole.search((folder / file).read_bytes()):
            raise UsageError(f"{file} holds the path of the local folder {Path(path).name}; nothing was sent")
