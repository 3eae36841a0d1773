"""A run's settings as rows of a table, and what is too secret to be seen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from flyte_batch.report.formats import cut

MASK = "(masked: its name or its form is that of a secret)"
MOST_CHARACTERS = 2000
MOST_LEVELS = 20
"""Of mappings in mappings that are taken apart."""

_SECRET_NAME = re.compile(
    r"(^|[_.\-\s])((secrets?|passwords?|passwd|passphrase|credentials?|authorization|bearer|private_?key)($|[_.\-\s])|"
    r"(api_?key|access_?key|key|token|auth)$)",
    re.IGNORECASE,
)
"""``hf_token`` and ``secret_value``, but not ``max_tokens`` or ``stop_token_ids``."""
_SECRET_TEXT = re.compile(
    r"""
    (?<![A-Za-z0-9])
    (?: (?: sk- | github_pat_ | glpat- ) [\w-]{16,} | (?: hf_ | gh[pousr]_ ) [A-Za-z0-9]{16,}  # of known services
        | xox[abprs]- [\w-]{8,} | AKIA [0-9A-Z]{16} \b | eyJ [\w-]{8,} \. [\w-]{8,} \. [\w-]+ )
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY
    | :// [^/\s:@]* : [^/\s@]+ @  # a password in a URL
    """,
    re.VERBOSE,
)


def is_secret_name(name: str) -> bool:
    """Whether what has this name is likely to be a secret."""
    return _SECRET_NAME.search(name) is not None


def is_secret_text(text: str) -> bool:
    """Whether a text has the form of a secret, or holds one."""
    return _SECRET_TEXT.search(text) is not None


def flat(settings: Mapping[str, object], prefix: str = "", levels: int = MOST_LEVELS) -> Iterator[tuple[str, str]]:
    """(dotted name, value) of each entry, in their order; texts that hold JSON objects are taken apart."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        inside = value if isinstance(value, Mapping) else _object(value)
        if is_secret_name(str(key)):
            yield name, MASK
        elif inside and levels:
            yield from flat(inside, f"{name}.", levels - 1)
        else:
            text = value if isinstance(value, str) and not inside else _as_json(inside or value)
            yield name, MASK if is_secret_text(text) else cut(text, MOST_CHARACTERS)


def _as_json(value: object) -> str:
    try:
        return json.dumps(_masked(value), ensure_ascii=False, default=str)
    except RecursionError:
        return "(nested too deeply to be shown)"


def _masked(value: object) -> object:
    """A value in which entries with the names of secrets are masked, also in texts that hold JSON objects."""
    value = _object(value) or value
    if isinstance(value, Mapping):
        return {key: MASK if is_secret_name(str(key)) else _masked(each) for key, each in value.items()}
    return [_masked(each) for each in value] if isinstance(value, list | tuple) else value


def _object(value: object) -> Mapping[str, object] | None:
    """The JSON object that a text holds."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
