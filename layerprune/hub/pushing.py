"""Pushing an audited checkpoint to the Hub: verified first, resumed after a broken connection, refused in words."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from layerprune.audit.verify import NOT_LOOKED_AT, verify
from layerprune.documents import Receipt
from layerprune.errors import LayerpruneError, UsageError, one_line
from layerprune.hub.naming import Name, check_choice, check_folder, is_local, named, withheld
from layerprune.hub.published import check_no_path, publish
from layerprune.progress import SILENT, Progress

ATTEMPTS = 4
FIRST_WAIT = 2.0  # seconds; doubled after each attempt, so 14 s in all before giving up
# What an earlier push may have left in the repo and this one replaces whole: weights that no index names would be
# downloaded by everybody, and documents beside others would make the folder fail its own verification.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "layerprune/*", "report.html")
PASSING = (408, 425, 429, 500, 502, 503, 504)

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


@dataclass(frozen=True)
class Destination:
    """Where a folder goes, and how."""

    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    unnamed_base: bool = False,
    dry_run: bool = False,
    allow_unaudited: bool = False,
    progress: Progress = SILENT,
    wait: Callable[[float], None] = time.sleep,
) -> Pushed:
    """Create or update the Hub repo ``repo`` with a folder's weights, card, audit and report.

    The folder is verified before anything is sent; one that is not as export and audit left it, or has no audit
    (unless ``allow_unaudited``), raises ``UsageError``. A base that was a local folder goes by its Hub id
    ``base_model``, whose files must be the folder's, or by its folder's name alone (``unnamed_base``); its path is
    never published. Weights and documents that are in the repo and not in the folder (``REPLACED``) are deleted in the
    same commit; a dry run, which asks the Hub nothing, cannot list them. The token is found by huggingface_hub, and
    shown nowhere. ``create_pr`` opens a pull request instead of committing. A connection that breaks is taken up again: files
    that have arrived are not sent twice. What the Hub refuses raises ``PushError``.
    """
    folder, to = Path(folder), Destination(repo, private, revision, create_pr)
    if create_pr and revision is not None:
        raise UsageError(f"a pull request is always made to main; leave --revision {revision} or --create-pr out")
    receipt = _check(folder, allow_unaudited, progress)
    check_choice(receipt, base_model, unnamed_base)
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in NOT_LOOKED_AT
    }
    if not is_local(receipt):
        _check_card(folder)
        url = None if dry_run else _patiently(lambda: _send(folder, to, list(files)), repo, progress, wait)
        return Pushed(repo, files, url)
    name = _public_name(receipt, base_model, dry_run, repo, progress, wait)
    with tempfile.TemporaryDirectory(prefix="layerprune-push-") as place:
        out = Path(place)
        publish(folder, out, name, list(files))
        check_no_path(out, list(files), receipt.base.id)
        _check_card(out)
        files = {file: (out / file).stat().st_size for file in files}
        url = None if dry_run else _patiently(lambda: _send(out, to, list(files)), repo, progress, wait)
    return Pushed(repo, files, url)


def _public_name(
    receipt: Receipt,
    base_model: str | None,
    dry_run: bool,
    repo: str,
    progress: Progress,
    wait: Callable[[float], None],
) -> Name:
    from huggingface_hub import HfApi

    if base_model is None:
        return withheld(receipt)
    check_folder(receipt)
    if dry_run:
        return Name(base_model, None, "not compared: a dry run asks the Hub nothing")
    api = HfApi(library_name="layerprune")
    return _patiently(lambda: named(receipt, base_model, api, progress), base_model, progress, wait)


def _check(folder: Path, allow_unaudited: bool, progress: Progress) -> Receipt:
    found = verify(folder, progress=progress)
    if not found.ok:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise UsageError(f"{folder} is not as export and audit left it: {found.problems[0]}{more}; nothing was sent")
    if not found.audited and not allow_unaudited:
        raise UsageError(
            f"{folder} has not been audited: nobody would know what it lost. Run layerprune audit {folder}, "
            "or push with --allow-unaudited"
        )
    return Receipt.load(folder / "layerprune" / Receipt.filename)


def _check_card(folder: Path) -> None:
    """Raise ``UsageError`` for metadata that the Hub's own client cannot read: the Hub would refuse the commit."""
    from huggingface_hub import ModelCard

    try:
        ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    except (ValueError, TypeError) as error:
        raise UsageError(f"README.md has metadata that the Hub does not take: {one_line(error)}") from error


def _send(folder: Path, to: Destination, files: list[str]) -> str:
    from huggingface_hub import HfApi

    api = HfApi(library_name="layerprune")
    name = api.create_repo(to.repo, private=to.private, exist_ok=True).repo_id
    if to.revision is not None:
        api.create_branch(name, branch=to.revision, exist_ok=True)
    commit: Any = api.upload_folder(
        repo_id=name,
        folder_path=folder,
        revision=to.revision,
        create_pr=to.create_pr,
        allow_patterns=files,
        delete_patterns=list(REPLACED),
        commit_message="Upload with layerprune",
    )
    return str(commit.pr_url or commit.commit_url)


def _patiently(send: Callable[[], T], repo: str, progress: Progress, wait: Callable[[float], None]) -> T:
    """Call ``send`` again while what goes wrong is passing: timeouts, cut connections, 429 and 5xx."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    for attempt in range(ATTEMPTS):
        try:
            return send()
        except HFValidationError as error:
            raise PushError(f"{repo!r} is not a repo name: {one_line(error)}") from error
        except LocalTokenNotFoundError as error:
            raise PushError("no Hugging Face token was found; run hf auth login, or set HF_TOKEN") from error
        except OfflineModeIsEnabled as error:
            raise PushError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from error
        except HfHubHTTPError as error:
            if error.response.status_code not in PASSING or attempt == ATTEMPTS - 1:
                raise PushError(_refusal(repo, error)) from error
            said = f"the Hub answered {error.response.status_code}"
        except (httpx2.TransportError, ConnectionError, TimeoutError) as error:
            if attempt == ATTEMPTS - 1:
                raise PushError(f"the connection to the Hub broke {ATTEMPTS} times: {one_line(error)}") from error
            said = f"the connection broke ({one_line(error)})"
        pause = FIRST_WAIT * 2**attempt
        progress.note(f"{said}; trying again in {pause:.0f} s")
        wait(pause)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _refusal(repo: str, error: Any) -> str:
    status, said = error.response.status_code, one_line(error.server_message or error)
    advice = {
        400: "the Hub does not accept the content",
        401: "the token is missing or not valid; run hf auth login",
        403: "the token may not write there; use one with write access to this namespace",
        404: "there is no such repo or revision, or the token may not see it",
        413: "the upload is too large",
        429: "too many requests; wait some minutes and push again, what has arrived is not sent twice",
    }.get(status, "the Hub failed" if status >= 500 else "the Hub refused")
    return f"{repo}: the Hub answered HTTP {status}: {advice} ({said})"
