"""From a `Prompt` or a `Chat` to token ids: chat template, tokenizer and the limits of a model folder.

Kept apart from any engine: it needs ``tokenizers`` and jinja2, not the library that runs the model. Templates are
rendered the way transformers' ``apply_chat_template`` renders them
(https://huggingface.co/docs/transformers/chat_templating), so that a prompt reaches the model as its authors meant.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flyte_batch.engines.checks import require_text
from flyte_batch.engines.messages import messages_of
from flyte_batch.errors import BadInput, BadRecord, PromptTooLong
from flyte_batch.records import Chat, Prompt

if TYPE_CHECKING:
    from jinja2.parser import Parser
    from tokenizers import Tokenizer

# Written as model_max_length where a tokenizer's authors named no limit (transformers' VERY_LARGE_INTEGER is 1e30).
_NO_LIMIT = 1_000_000_000
# What ends a turn of the common chat formats. A converted folder often lacks generation_config.json, which names it.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>", "<turn|>")


@dataclass(frozen=True, slots=True)
class TokenisedPrompt:
    """A prompt as token ids, four bytes each, with what it may still generate.

    Attributes:
        ids: the prompt's tokens, template included.
        limit: most tokens to generate: ``max_tokens``, or what the context has left where that is less.
        seed: the prompt's own, for sampling; None for none.
    """

    ids: array[int]
    limit: int
    seed: int | None = None

    def estimate_cost(self) -> int:
        """Tokens of the prompt plus tokens it may generate: what it takes of the device's memory at most."""
        return len(self.ids) + self.limit


class _GenerationBlock(Extension):
    """Lets ``{% generation %}`` blocks through: transformers uses them to mark training targets, we only render."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own spelling

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


class ChatTemplate:
    """A model's chat template: messages in, one text out. Rendering is safe from several threads.

    Args:
        source: the template's text.
        special_tokens: what the template may refer to: ``bos_token``, ``eos_token``, ...

    Raises:
        BadInput: the template is not valid jinja2.
    """

    def __init__(self, source: str, special_tokens: dict[str, Any]) -> None:
        self.source = source
        self._special_tokens = special_tokens
        # A template comes with a downloaded model: it is not trusted, hence the sandbox.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise BadInput(f"the model's chat template is not valid jinja2: {error}; pass chat=False") from error

    def render(self, prompt: Prompt | Chat) -> str:
        """The text that asks the model for an answer to ``prompt``: to its text, or to the last of its messages.

        Raises:
            BadRecord: the template refuses these messages, for example a system text it knows no place for.
        """
        messages = messages_of(prompt)
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise BadRecord(f"the model's chat template refused the prompt: {error}") from error


class PromptTokeniser:
    """`Prompt` or `Chat` to `TokenisedPrompt` for one model folder, and ids back to text. Safe from several threads.

    Args:
        tokenizer: the model's tokenizer, without truncation and padding.
        template: the model's chat template; None feeds the plain text (a system text goes before it, one empty
            line between).
        context: most tokens of prompt and response together.
        max_tokens: most tokens to generate for a record.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, context: int, max_tokens: int) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.template = template
        self.context = context
        self._max_tokens = max_tokens
        # A token stands for no more characters than it is long: what is longer than this cannot fit.
        self._most_characters = context * max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)

    def prepare(self, prompt: Prompt | Chat) -> TokenisedPrompt:
        """Render and tokenise one prompt. Of images only their place in the text is tokenised.

        Raises:
            PromptTooLong: the prompt leaves no room for a single token of response.
            BadRecord: as `render`, or the tokenizer makes nothing of it.
        """
        text = self.render(prompt)
        if len(text) > self._most_characters:  # before tokenising, which takes seconds and gigabytes for megabytes
            raise PromptTooLong(
                f"the prompt has {len(text):,} characters, so more than {self.context} tokens, the model's context "
                f"holds {self.context} with the response: shorten it, or leave out rows like it"
            )
        try:
            # A template writes the special tokens itself; the tokenizer would write the first one twice.
            ids = self.tokenizer.encode(text, add_special_tokens=self.template is None).ids
        except Exception as error:
            raise BadRecord(f"the prompt cannot be tokenised: {error}") from error
        if not ids:
            raise BadRecord("the prompt has no tokens that the model knows")
        if len(ids) >= self.context:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens, the model's context holds {self.context} with the response: "
                "shorten it, or leave out rows like it"
            )
        return TokenisedPrompt(array("I", ids), min(self._max_tokens, self.context - len(ids)), prompt.seed)

    def render(self, prompt: Prompt | Chat) -> str:
        """The text that the model is fed, special tokens of the template included.

        Raises:
            BadRecord: as `require_text`; the chat template refuses the prompt; a conversation for a model that has no
                chat template.
        """
        require_text(prompt)
        if self.template is not None:
            return self.template.render(prompt)
        if isinstance(prompt, Chat):
            raise BadRecord(
                "the prompt is a conversation, and no chat template says how the model reads one: use a model that "
                "has a template ('instruct' or 'chat' in its name; not chat=False), or make one text of the messages"
            )
        return f"{prompt.system}\n\n{prompt.text}" if prompt.system else prompt.text


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What the files beside a model's weights say about prompts: read once, at an engine's start."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    context: int | None
    end_ids: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path) -> ModelFolder:
        """Read ``tokenizer.json`` and, where they exist, the files that go with it.

        Raises:
            BadInput: a file is missing or cannot be read; the message names it.
        """
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BadInput(f"{folder} holds no tokenizer.json: copy it from the model that was converted")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception
            raise BadInput(f"{path} cannot be read as a tokenizer: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        model = _read_json(folder / "config.json")
        generation = _read_json(folder / "generation_config.json")
        special = _special_tokens(_read_json(folder / "special_tokens_map.json") | config)
        source = _template_source(folder, config)
        template = ChatTemplate(source, special) if source is not None else None
        limits = [
            int(value)
            for value in (config.get("model_max_length"), model.get("max_position_embeddings"))
            if isinstance(value, int | float) and 0 < value < _NO_LIMIT
        ]
        ends = [special.get("eos_token"), model.get("eos_token"), *_as_list(generation.get("eos_token_id"))]
        ends += _as_list(model.get("eos_token_id"))
        ends += [token for token in _TURN_ENDS if source is not None and token in source]
        ids = [tokenizer.token_to_id(end) if isinstance(end, str) else end for end in ends]
        size = tokenizer.get_vocab_size()
        end_ids = tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and 0 <= i < size))
        return cls(tokenizer, template, min(limits, default=None), end_ids)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} must hold a JSON object, it holds a {type(content).__name__}")
    return content


def _special_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """``bos_token`` and the like as texts; transformers writes a token as a text or as an object with ``content``."""
    tokens: dict[str, Any] = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """The file ``chat_template.jinja`` wins over the configuration's text, as in transformers.

    Older vision models have theirs in ``chat_template.json`` only.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(source, list):  # several named ones, [{"name": "default", "template": ...}, ...]
        named = {entry["name"]: entry["template"] for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None
