"""``python -m flyte_batch.demo``: write problems, and score the answers to them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flyte_batch.demo.problems import Split, generate, is_right
from flyte_batch.errors import BadInput


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 for an error of the user's, or 2 for an unknown option."""
    parser = argparse.ArgumentParser(prog="python -m flyte_batch.demo", description="Arithmetic problems with answers.")
    commands = parser.add_subparsers(dest="command", required=True)
    problems = commands.add_parser("problems", help="write problems as JSONL with the columns question and answer")
    problems.add_argument("--count", type=_count, default=100, help="how many (default 100)")
    problems.add_argument("--seed", type=int, default=0, help="the same seed gives the same problems (default 0)")
    problems.add_argument(
        "--split", choices=[s.value for s in Split], default="test", help="test: never seen in training (default)"
    )
    problems.add_argument("--output", type=Path, help="file to write; without it, standard output")
    score = commands.add_parser("score", help="the share of right answers")
    score.add_argument("path", type=Path, help="JSONL or Parquet, a file or a folder of such files")
    score.add_argument("--response", default="response", help="column of what the model said (default response)")
    score.add_argument("--answer", default="answer", help="column of the reference answer (default answer)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "problems":
            lines = (problem.to_json() for problem in generate(options.count, options.seed, Split(options.split)))
            _write(lines, options.output)
        else:
            print(_score(_rows(options.path), options.response, options.answer))
            sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        # What is buffered still has somewhere to go when the interpreter flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if count < 0:
        raise argparse.ArgumentTypeError(f"{count} is negative")
    return count


def _write(lines: Iterable[str], output: Path | None) -> None:
    if output is None:
        for line in lines:
            print(line)
        sys.stdout.flush()
        return
    if output.is_dir():
        raise BadInput(f"{output} is a folder: name a file, for example {output / 'problems.jsonl'}")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: a run must not read half a dataset.
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        raise BadInput(f"{path} does not exist")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".parquet") and not p.name.startswith("."))
        if not files:
            raise BadInput(f"{path} holds no .jsonl or .parquet file")
    for file in files:
        if file.suffix == ".parquet":
            yield from _parquet_rows(file)
        else:
            yield from _jsonl_rows(file)


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with contextlib.closing(_open_parquet(pq, pa, file)) as parquet:
        for batch in parquet.iter_batches():
            yield from batch.to_pylist()


def _open_parquet(pq: Any, pa: Any, file: Path) -> Any:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise BadInput(f"{file} is no Parquet file: {error}") from error


def _jsonl_rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise BadInput(f"{file}, line {number}, is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise BadInput(f"{file}, line {number}, is a {type(row).__name__}, not an object with columns")
            yield row


def _score(rows: Iterable[dict[str, Any]], response: str, answer: str) -> str:
    """A failed row, with no response, counts as wrong: leaving it out would reward failing."""
    right = total = without = 0
    for row in rows:
        for option, column in (("--response", response), ("--answer", answer)):
            if column not in row:
                raise BadInput(
                    f"there is no column {column!r}, only {', '.join(map(repr, row))}: name it with {option}"
                )
        total += 1
        without += row[response] is None
        right += is_right(str(row[response]), str(row[answer]))
    if not total:
        raise BadInput("there are no rows to score")
    failed = f", {without:,} without a response" if without else ""
    return f"{right:,} of {total:,} right ({right / total:.2%}){failed}"


if __name__ == "__main__":
    sys.exit(main())
