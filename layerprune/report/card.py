"""The model card: README.md of an exported folder, from its plan, receipt and (once there is one) audit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from layerprune import formatting
from layerprune.artifacts import PRUNED, UNHEALED, Audit, Document, HealLog, Plan, Receipt, as_removal, not_looked_for
from layerprune.artifacts.base import write_atomically
from layerprune.checkpoint.companions import is_licence
from layerprune.errors import DocumentError
from layerprune.files import check_plain
from layerprune.parsing import parse_yaml, read_json, read_text

BEGIN = "<!-- layerprune: generated from here to the end mark; text outside the marks is kept -->"
END = "<!-- layerprune: end -->"
CARD = "README.md"
FRAGMENT = "card.md"  # of a checkpoint that layerprune did not export: for a person to put into its card
OURS = (CARD, *(f"layerprune/{kind.filename}" for kind in (Plan, Receipt, HealLog, Audit)))  # what a card is made from
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)

# How an entry of model-index is named that ``title`` made, whatever was removed: other entries are other people's.
OWN_ENTRY = re.compile(r", \d+ of \d+ layers removed(?: in \d+ rounds)?$")
STATED = re.compile(r"^\| (\w+\.json) \| `sha256:([0-9a-f]{64})` \|$", re.MULTILINE)  # rows of the card's last table

# Taken over from the base model's own card: a derived model stays under its licence.
INHERITED = ("license", "license_name", "license_link", "language")
FILTERS = (
    "points", "points_interval", "percent", "percent_change", "percent_interval", "accuracy", "p_value", "size",
    "number", "units",
)  # fmt: skip
# The Hub knows adapter, merge, quantized and finetune. Whether healed or not, finetune is the honest one of the four:
# it is what the Hub calls any full model made from one base. Merge would claim several models, quantized a lower
# precision.
RELATION = "finetune"


def write_card(
    folder: Path,
    base: Path | None = None,
    *,
    audit: Audit | None = None,
    into: Path | None = None,
    base_model: str | None = None,
    theirs: Path | None = None,
) -> Path:
    """Write or renew ``folder/README.md`` and return its path; the file is replaced whole or not at all.

    ``base`` is the base model's folder: its card's licence and language are taken over where the present card says
    nothing of them. Metadata keys this tool does not set are kept, and so is any text outside its marks, byte for byte.
    ``audit``: one that is about to be saved, in place of the folder's; ``into``: another folder for the new card;
    ``base_model``: the Hub id of a base that the documents know as a local folder; ``theirs``: another card that gets
    this folder's part and what its own metadata lack; its words give way only to a card of this folder that holds all
    of them. Raises ``DocumentError`` when the plan or receipt is missing, and for a card that ``read_card`` cannot
    read; ``CheckpointError`` where the card or a document is a link.
    """
    folder = Path(folder)
    path = folder / CARD
    check_plain(folder, OURS)
    front, present, body = _read(theirs or path)
    if theirs is not None and all(words in read_card(path)[1] for words in own_words(theirs)):
        body = read_card(path)[1]  # nothing of theirs is lost
    inherited = read_card(base / CARD)[0] if base is not None else {}
    kept = {key: inherited[key] for key in INHERITED if key in inherited}
    kept |= {**(read_card(path)[0] if theirs else {}), **present}
    kept |= {} if base_model is None else {"base_model": base_model, "base_model_relation": RELATION}
    metadata, text = render_card(folder, kept, audit)
    if metadata != present:
        front = f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=120)}---\n"
    path = (into or folder) / path.name
    write_atomically(path, (front + _placed(text, body, "\n")).encode())
    return path


def _placed(text: str, body: str, above: str = "") -> str:
    """Return ``body`` with the generated ``text`` between its marks, ``above`` and it on top where there are none."""
    below = "\n" if not body or body.startswith(("\n", "\r\n")) else "\n\n"
    before, _, after = _parted(body) or (above, "", below + body)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def own_words(path: Path) -> tuple[str, str]:
    """Return what a card says above and below the generated part, without the white space around it."""
    body = read_card(path)[1]
    before, _, after = _parted(body) or ("", "", body)
    return before.strip(), after.strip()


def render_card(folder: Path, kept: dict[str, Any], audit: Audit | None = None) -> tuple[dict[str, Any], str]:
    """Return the card's metadata (``kept`` keys joined in) and its generated text; ``audit``: see ``write_card``."""
    given = template_context(folder, audit)
    receipt, audit, log = given["receipt"], given["audit"], given["log"]
    metadata = {**kept, "model-index": [], **card_metadata(receipt, audit)}
    metadata["tags"] = list(dict.fromkeys([*_as_list(kept.get("tags")), *metadata["tags"]]))
    if results := [*metadata.pop("model-index", []), *_entries(kept, own=False)]:
        metadata["model-index"] = results
    text = render_template(
        "card.md.jinja",
        **given,
        code=own_code(folder),
        result=log.result if log else receipt.result,
        licence=metadata.get("license"),
        licence_files=sorted(entry.name for entry in folder.iterdir() if is_licence(entry.name)),
    )
    return metadata, text.strip()


def card_faults(folder: Path) -> Iterator[str]:
    """Yield what in the card is not what the documents say: metadata that this tool sets, and its generated part."""
    kept, body = read_card(folder / CARD)
    metadata, text = render_card(folder, kept)
    # a base that was a local folder has the Hub id that a person gave it
    bases = ("base_model", "base_model_relation") if "base_model" in metadata else ()
    faults = [key for key in (*bases, "pipeline_tag", "library_name") if kept.get(key) != metadata.get(key)]
    if _entries(kept) != _entries(metadata):  # without an audit there are none
        faults.append("model-index")
    yield from (f"the metadata's {key} is not what the documents say" for key in faults)
    parts = _parted(body)
    if parts is None or parts[1].strip("\n") != text:
        yield "the part between layerprune's marks is not what the documents say"


def unlike_the_card(folder: Path, *documents: Document | None, card: str = CARD) -> Iterator[str]:
    """Yield the documents that are not those the card was written from; no document has the hash of the last one."""
    parts = _parted(_text(folder / card))
    within = "layerprune/" if card == CARD else ""
    stated = {} if parts is None else dict(STATED.findall(parts[1]))  # sha256 by file name
    for document in documents:
        if document is not None and stated.get(document.filename, document.sha256()) != document.sha256():
            yield f"{within}{document.filename} is not the one that {card} names"


def card_metadata(receipt: Receipt, audit: Audit | None) -> dict[str, Any]:
    """Return the metadata the Hub reads: kind of model, base, tags, and the audit's figures as model-index."""
    parent = nearest_on_hub(receipt)
    metadata: dict[str, Any] = {} if parent is None else {"base_model": parent, "base_model_relation": RELATION}
    metadata |= {
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["layerprune", "layer-pruning", "pruned"],
    }
    if audit is not None:
        metadata["model-index"] = [{"name": title(receipt), "results": [_result(task) for task in audit.tasks]}]
    return metadata


def title(receipt: Receipt) -> str:
    """Return the model's name in words; an exported folder may be renamed, so its name is not used."""
    first, rounds = receipt.first_base, len(receipt.rounds) + 1
    count = first.layers - receipt.result.layers if receipt.rounds else len(receipt.removal)
    said = f"{base_name(first.id)}, {count} of {first.layers} layers removed"
    return said if rounds == 1 else f"{said} in {rounds} rounds"


def nearest_on_hub(receipt: Receipt) -> str | None:
    """Return the Hub id of the base, or of the nearest model before it that has one: as the Hub's model tree goes."""
    bases = [receipt.base, *(one.receipt.base for one in reversed(receipt.rounds))]
    return next((base.id for base in bases if base.revision is not None), None)


def layers_left(receipt: Receipt) -> str:
    """Return which layers of the first base are left after every round, 0-based: "0, 1, 4"."""
    left = list(range(receipt.first_base.layers))
    for one in (*(earlier.receipt for earlier in receipt.rounds), receipt):
        left = [left[layer] for layer in as_removal(one.removal).kept(one.base.layers)]
    return ", ".join(map(str, left))


def own_code(folder: Path) -> tuple[str, ...]:
    """Return the model's and tokenizer's own classes that its files name: they run only when they are trusted.

    Raises ``DocumentError`` for a file that is not JSON.
    """
    found: dict[str, None] = {}
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        if not path.is_file():
            continue
        try:
            content = read_json(path, finite=False)
        except (OSError, ValueError) as error:
            raise DocumentError(f"{path} cannot be read: {_one_line(error)}") from error
        named = content.get("auto_map") if isinstance(content, dict) else None
        for value in named.values() if isinstance(named, dict) else [named]:
            found |= dict.fromkeys(str(entry) for entry in _as_list(value) if entry)
    return tuple(found)


def base_name(model_id: str) -> str:
    """Return the last part of a Hub id, or a folder's name."""
    return Path(model_id).name or model_id


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """Return a card's metadata and text; ``({}, "")`` when there is none.

    Raises ``DocumentError`` for a card that is not UTF-8 and for metadata that is not YAML, ``CheckpointError`` for one
    that is a link or no regular file.
    """
    return _read(path)[1:]


def _text(path: Path) -> str:
    check_plain(path.parent, [path.name])
    if not path.exists():
        return ""
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise DocumentError(f"{path} cannot be read, a card is text in UTF-8: {_one_line(error)}") from error


def _read(path: Path) -> tuple[str, dict[str, Any], str]:
    """Return a card's metadata as they are written, as they are read, and its text."""
    text = _text(path)
    match = FRONT_MATTER.match(text)
    if match is None:
        return "", {}, text
    try:
        metadata = parse_yaml(match.group(1))[1] or {}
        if isinstance(metadata, dict) and metadata.get("language") is not None:
            # a bare no is Norwegian here, and false to YAML 1.1
            plain = parse_yaml(match.group(1), yaml.BaseLoader)[1]
            metadata["language"] = plain.get("language", metadata["language"])
    except (yaml.YAMLError, ValueError) as error:
        raise DocumentError(f"{path}: the metadata between the --- lines is not YAML: {_one_line(error)}") from error
    if not isinstance(metadata, dict):
        raise DocumentError(f"{path}: the metadata between the --- lines is a {type(metadata).__name__}, not a mapping")
    return match.group(), metadata, text[match.end() :]


def _result(task: Any) -> dict[str, Any]:
    """Return one task as an entry of the Hub's model-index."""
    pruned = task.models[PRUNED]
    shots = task.data.num_fewshot
    return {
        "task": {"type": "text-generation", "name": "Text generation"},
        "dataset": {"type": task.data.task, "name": f"{task.data.task} ({shots}-shot)", "split": task.data.split},
        "metrics": [
            {"type": task.data.metric, "name": task.data.metric, "value": round(pruned.accuracy, 4)},
        ],
    }


def _parted(body: str) -> tuple[str, str, str] | None:
    """Return the text before, between and after the marks; None for a card without them."""
    start = body.find(BEGIN)
    stop = body.find(END, start)
    if not 0 <= start < stop:
        return None
    return body[:start], body[start + len(BEGIN) : stop], body[stop + len(END) :]


def _entries(metadata: dict[str, Any], *, own: bool = True) -> list[Any]:
    """Return the entries of model-index that this tool made, or those that it did not."""
    every = _as_list(metadata.get("model-index"))
    return [one for one in every if own == (isinstance(one, dict) and bool(OWN_ENTRY.search(str(one.get("name")))))]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# The account of a checkpoint that layerprune did not export: no metadata, and no word on how it was made.


def write_fragment(folder: Path, audit: Audit, *, into: Path | None = None) -> Path:
    """Write or renew ``folder/card.md``, what an audit says of a foreign checkpoint, and return its path.

    Text outside the marks is kept; ``into``: another folder for the new file.
    """
    path = (into or folder) / FRAGMENT
    write_atomically(path, _placed(render_fragment(audit), _text(folder / FRAGMENT)).encode())
    return path


def fragment_is_current(folder: Path, audit: Audit) -> bool:
    """Whether the generated part of ``folder/card.md`` is what the audit gives."""
    parts = _parted(_text(folder / FRAGMENT))
    return parts is not None and parts[1].strip("\n") == render_fragment(audit)


def render_fragment(audit: Audit) -> str:
    """Return the Markdown; it follows from the audit alone."""
    return render_template("fragment.md.jinja", **foreign_context(audit)).strip()


def foreign_context(audit: Audit) -> dict[str, Any]:
    """Return what is known of a foreign checkpoint, under the names that ``template_context`` has."""
    base, candidate = base_name(audit.base.id), base_name(audit.pruned.id)
    return {
        "title": f"{candidate} beside {base}",
        "base": base,
        "candidate": candidate,
        "audit": audit,
        "plan": None,
        "receipt": None,
        "log": None,
        "unlooked": (),
        "rounds": (),
        "pruned": PRUNED,
        "unhealed": UNHEALED,
        "healed": False,
    }


# What the card and the report are made from, and one way to fill in the pages' templates.


def template_context(folder: Path, audit: Audit | None = None) -> dict[str, Any]:
    """Return what a folder's documents say, for the templates; ``audit``: see ``write_card``."""
    inside = folder / "layerprune"
    plan, receipt = Plan.load(inside / Plan.filename), Receipt.load(inside / Receipt.filename)
    if audit is None and (inside / Audit.filename).exists():
        audit = Audit.load(inside / Audit.filename)
    log = HealLog.load(inside / HealLog.filename) if (inside / HealLog.filename).exists() else None
    return {
        "title": title(receipt),
        "base": base_name(receipt.base.id),
        "plan": plan,
        "receipt": receipt,
        "audit": audit,
        "log": log,
        "unlooked": not_looked_for(receipt, log, (task.data.task for task in audit.tasks)) if audit else (),
        "rounds": receipt.rounds,
        "first": base_name(receipt.first_base.id),
        "left": layers_left(receipt),
        "pruned": PRUNED,
        "unhealed": UNHEALED,
        "healed": audit is not None and UNHEALED in audit.compared,
    }


def render_template(template: str, **given: Any) -> str:
    """Return one of this package's templates with what it shows; what it names must be given.

    Text for HTML is escaped. Text for Markdown is not: table cells go through the filter ``cell``.
    """
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("layerprune.report", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=template.endswith(".html.jinja"),
        # a name in a card that looked like the mark of its end would cut the card in two
        finalize=lambda value: value.replace("<!--", "&lt;!--") if type(value) is str else value,
    )
    made.filters |= {name: getattr(formatting, name) for name in FILTERS}
    made.filters |= {
        "base_name": base_name,
        "cell": lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    }
    return made.get_template(template).render(given)
