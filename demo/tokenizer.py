"""The demo models' tokenizer: byte-level BPE, trained until every word of the grammar is one token."""

import random
from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo import grammar
from demo.examples import TAGS, make_example

END, PADDING = "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (PADDING, END, "<|system|>", "<|user|>", "<|assistant|>")
MAX_LENGTH = 512
VOCABULARY_LIMIT = 2048

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _texts(seed: int, examples: int) -> Iterator[str]:
    source = random.Random(seed)
    for _ in range(examples):
        example = make_example(source)
        yield example.prompt
        yield example.answer
    for _ in range(100):
        yield " ".join((*grammar.NAMES, *grammar.ITEMS, *grammar.PROBLEMS, *grammar.ASKS, *grammar.NUMBERS))


def train_tokenizer(seed: int, examples: int = 4000) -> PreTrainedTokenizerFast:
    """Train a fast tokenizer with a chat template.

    The prompt set's tags are ordinary tokens, so decoding keeps them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False, lstrip=True, rstrip=True) for tag in TAGS])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_LIMIT,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, examples), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False, lstrip=True, rstrip=True) for tag in TAGS])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PADDING,
        eos_token=END,
        extra_special_tokens=list(SPECIAL_TOKENS[2:]),
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
