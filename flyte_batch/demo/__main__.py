"""``python -m flyte_batch.demo``: write problems, and score the answers to them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from flyte_batch.data.output import iter_output
from flyte_batch.demo.problems import Split, generate, is_right
from flyte_batch.errors import BadInput, FlyteBatchError


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
    score.add_argument("output", help="the finished output of a run")
    score.add_argument("--answer", default="answer", help="column of the reference answer (default answer)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "problems":
            lines = (problem.to_json() for problem in generate(options.count, options.seed, Split(options.split)))
            _write(lines, options.output)
        else:
            print(_score(options.output, options.answer))
            sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        # What is buffered still has somewhere to go when the interpreter flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FlyteBatchError, OSError) as error:
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


def _score(output: str, answer: str) -> str:
    """A failed row, with no response, counts as wrong: leaving it out would reward failing."""
    right = total = without = 0
    for part in iter_output(output, columns=["response", answer]):
        for response, expected in zip(part["response"].to_pylist(), part[answer].to_pylist(), strict=True):
            total += 1
            without += response is None
            right += is_right(response, str(expected))
    failed = f", {without:,} without a response" if without else ""
    return f"{right:,} of {total:,} right ({right / total:.2%}){failed}"


if __name__ == "__main__":
    sys.exit(main())
