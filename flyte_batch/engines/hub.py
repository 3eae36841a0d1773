"""Hugging Face ids, and the files that go with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flyte_batch.errors import BadInput, EngineError

_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, slots=True)
class HubModel:
    """``owner/name`` and the revision (branch, tag or commit); None is ``main``."""

    id: str
    revision: str | None

    @classmethod
    def parse(cls, name: str) -> HubModel | None:
        """From ``owner/name`` or ``owner/name@revision``; None for what is neither."""
        found = _ID.fullmatch(name)
        return cls(found["id"], found["revision"]) if found is not None else None

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id

    def download(self, patterns: Sequence[str]) -> Path:
        """Fetch the files that match into Hugging Face's cache, or find them there; blocks.

        Args:
            patterns: globs, ``*.json``.

        Raises:
            BadInput: there is no such model or revision, it is private, or huggingface_hub is missing.
            EngineError: it cannot be fetched now; trying again may help.
        """
        try:
            import huggingface_hub
            from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
        except ImportError as error:
            raise BadInput(
                f"to download {self}, huggingface_hub is missing: install flyte-batch with its extra 'hf'"
            ) from error
        try:
            return Path(
                huggingface_hub.snapshot_download(self.id, revision=self.revision, allow_patterns=list(patterns))
            )
        except RepositoryNotFoundError as error:
            raise BadInput(
                f"Hugging Face has no model {self.id}, or it is private: check the name, or set HF_TOKEN"
            ) from error
        except RevisionNotFoundError as error:
            raise BadInput(f"the model {self.id} has no revision {self.revision}") from error
        except Exception as error:  # many kinds, of several libraries: no network, no space, gated, ...
            first = str(error).strip().splitlines()[:1]
            raise EngineError(
                f"there is no folder {self} here, and as a model of Hugging Face it cannot be downloaded "
                f"({type(error).__name__}: {' '.join(first)}): check the name and the network, or download it "
                "beforehand and name its folder"
            ) from error
