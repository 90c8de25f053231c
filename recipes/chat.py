"""Conversations to tokens, by a model's chat template, with labels on what its assistant says.

Generation markers are neither needed nor read. A turn is what the template puts after the prompt that it would ask
that turn with, so what is learned follows the very tokens that generation starts from.
"""

from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
Turn = dict[str, Any]


class TokenSequence(NamedTuple):
    """Tokens to train on; `labels` are -100 where nothing is learned."""

    input_ids: list[int]
    labels: list[int]


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], num_given: int = 0, **template_arguments
) -> list[TokenSequence]:
    """Render a conversation, with labels on the assistant's turns up to the token that ends each.

    A turn continues the sequence of those before it, as long as the template leaves these as they were. Where it does
    not (some drop the thoughts of earlier turns), a new sequence begins with the turn's own prompt.

    Args:
        tokenizer: one with a chat template.
        turns (`list[dict]`): `role` and `content` of each.
        num_given (`int`): so many turns are a prompt, and not learned.
        **template_arguments: what else the template is given.

    Returns:
        `list[TokenSequence]`: one, or several, in order. A conversation without a turn to learn is one without labels.

    Raises:
        ValueError: the template refuses the turns, asks otherwise than it answers, or ends a turn with no token of
            its own.
    """
    places = [place for place in range(num_given, len(turns)) if turns[place]["role"] == "assistant"]
    if not places:
        input_ids = render(tokenizer, turns, **template_arguments)
        return [TokenSequence(input_ids, [IGNORED_LABEL] * len(input_ids))]
    sequences = [TokenSequence([], [])]
    for place in places:
        prompt = render(tokenizer, turns[:place], add_generation_prompt=True, **template_arguments)
        whole = render(tokenizer, turns[: place + 1], **template_arguments)
        answer = _answer(tokenizer, prompt, whole)
        before = sequences[-1]
        if prompt[: len(before.input_ids)] == before.input_ids:
            sequences.pop()
        else:
            before = TokenSequence([], [])
        gap = [IGNORED_LABEL] * (len(prompt) - len(before.labels))
        rest = [IGNORED_LABEL] * (len(whole) - len(prompt) - len(answer))
        sequences.append(TokenSequence(whole, [*before.labels, *gap, *answer, *rest]))
    return sequences


def render(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], **template_arguments) -> list[int]:
    """Render turns to tokens.

    Raises:
        ValueError: the template refuses them.
    """
    try:
        encoding: Any = tokenizer.apply_chat_template(turns, return_dict=True, **template_arguments)
    except TemplateError as error:
        raise ValueError(
            f"The chat template refuses a conversation of {', '.join(turn['role'] for turn in turns)}: {error}. "
            f"The conversation: {turns!r:.200}"
        ) from error
    return encoding["input_ids"]


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose chat template cannot train an assistant, before any row is read.

    Raises:
        ValueError: there is no template, or it leaves out what an assistant says.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{tokenizer.name_or_path} has no chat template, and conversations need one: take the instruction-tuned "
            "model or put a chat_template.jinja beside the tokenizer; or give rows that are no conversations, with "
            "apply_chat_template: false."
        )
    turns = [{"role": "user", "content": "Ask."}, {"role": "assistant", "content": "Answer."}]
    if "Answer." not in tokenizer.decode(render(tokenizer, turns)):
        raise ValueError(
            f"The chat template of {tokenizer.name_or_path} leaves out what an assistant says, so there is nothing to "
            "learn: take a template that renders the turns of the assistant."
        )


def _answer(tokenizer: PreTrainedTokenizerBase, prompt: list[int], whole: list[int]) -> list[int]:
    """The tokens of a turn after its prompt, up to the one that ends it; white space may follow."""
    if whole[: len(prompt)] != prompt:
        start = next((i for i, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(whole))
        raise ValueError(
            f"The chat template asks for a turn with {tokenizer.decode(prompt[start:])!r} where the conversation "
            f"itself has {tokenizer.decode(whole[start : start + 20])!r}: the model would learn after another prompt "
            "than it is asked with. Take a template whose generation prompt is the beginning of every turn, such as "
            "one without thoughts."
        )
    end = len(whole)
    while end > len(prompt) and str(tokenizer.decode(whole[end - 1])).isspace():
        end -= 1
    stops = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    if end == len(prompt) or whole[end - 1] not in stops:
        raise ValueError(
            f"The chat template ends a turn of the assistant with {tokenizer.decode(whole[len(prompt) :])[-20:]!r} "
            "and no special token, so the model would not learn to stop: let the template end it with {{ eos_token }}."
        )
    return whole[len(prompt) : end]
