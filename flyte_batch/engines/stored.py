"""What a prefetched model's folder says of itself, so that nobody loads one that was copied by half.

`flyte_batch.model_store.prefetch` writes the list before the first file. A folder with a list is whole when every file
of it is there with its size; a folder without one was not made by prefetch, and nothing is known of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from flyte_batch.errors import BadInput

LIST_NAME = ".prefetch.json"
"""The dot keeps it out of a model's identity: a copy is the same model."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a model.

    Attributes:
        size: bytes.
        version: tells contents apart: a hash, or where the source is no disk, the time of its last change.
    """

    size: int
    version: str


@dataclass(frozen=True, slots=True)
class ModelList:
    """The files of a model.

    Attributes:
        source: where they came from.
        files: by their path in the folder.
    """

    source: str
    files: Mapping[str, StoredFile]

    def to_json(self) -> str:
        return json.dumps({"source": self.source, "files": {name: asdict(file) for name, file in self.files.items()}})

    @classmethod
    def parse(cls, text: str | bytes) -> ModelList:
        fields = json.loads(text)
        return cls(fields["source"], {name: StoredFile(**file) for name, file in fields["files"].items()})

    def lacking(self, sizes: Mapping[str, int]) -> list[str]:
        """The files that are not there, or not with their size.

        Args:
            sizes: bytes of what is there, by name.
        """
        return [name for name, file in self.files.items() if sizes.get(name) != file.size]

    def require_whole(self, sizes: Mapping[str, int], folder: object) -> None:
        """Refuse a folder in which something is missing.

        Raises:
            BadInput: says how much is missing, and what to do.
        """
        lacking = self.lacking(sizes)
        if lacking:
            raise BadInput(
                f"the model in {folder} is copied by half: of its {len(self.files)} files {len(lacking)} are missing "
                f"or cut, such as {lacking[0]}; wait for its prefetch to end, or run it again ({self.source})"
            )


def check_whole(folder: Path) -> None:
    """Refuse a model that is copied by half.

    Raises:
        BadInput: files of the folder's list are missing or have another size.
    """
    path = folder / LIST_NAME
    if not path.is_file():
        return
    listed = ModelList.parse(path.read_bytes())
    there = {name: folder / name for name in listed.files}
    listed.require_whole({name: path.stat().st_size for name, path in there.items() if path.is_file()}, folder)
