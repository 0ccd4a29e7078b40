"""A byte-level BPE tokenizer that writes sentence ends into `tokenizer(text)` and leaves them out of `decode`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.utils import PaddingStrategy

from thoughtformer.errors import (
    ArgumentError,
    ConfigError,
    CorpusError,
    InputError,
    TokenizerError,
    UnsupportedError,
    nearest,
)
from thoughtformer.hub import TOKENIZER_AUTO_MAP, write_hub_file
from thoughtformer.text.sentences import insert_ends
from thoughtformer.text.splitting import NEWEST_RULE, SentenceSplitter, splitter_of

__all__ = ["END_OF_SENTENCE", "END_OF_TEXT", "PADDING", "TOKENIZER_SETTINGS", "SentenceTokenizer", "train_bpe"]

END_OF_TEXT = "<|endoftext|>"
END_OF_SENTENCE = "<|endofsentence|>"
PADDING = "<|padding|>"
SPECIAL_TOKENS = (END_OF_TEXT, END_OF_SENTENCE, PADDING)


def train_bpe(texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
    """A byte-level BPE over all 256 bytes, so that any text can be written, with the special tokens as ids 0 to 2.

    Raises:
        ConfigError: `vocab_size` leaves no room for the bytes and special tokens.
        CorpusError: `texts` hold nothing.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if not smallest <= vocab_size <= 1 << 16:
        raise ConfigError(
            f"vocab_size={vocab_size}: give {smallest} (256 bytes and {len(SPECIAL_TOKENS)} special tokens) to 65536."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not seen:
        raise CorpusError("the corpus holds no text to train a tokenizer on.")
    return tokenizer


def _first_surrogate(text: str) -> str:
    index = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), -1)
    return f"{text[index]!r} at character {index}" if index >= 0 else "unknown"


def check_sentence_lengths(shortest: int | None, longest: int | None) -> None:
    """Raises `ConfigError` where sentences can't be at least `shortest` and at most `longest` tokens."""
    if shortest is None:
        return
    if shortest < 1 or (longest is not None and shortest > longest):
        raise ConfigError(
            f"min_sentence_tokens={shortest} must be at least 1 and at most max_sentence_tokens={longest}, or None."
        )


#: Settings of a `SentenceTokenizer`, beside transformers' own.
TOKENIZER_SETTINGS = (
    "insert_sentence_ends",
    "max_sentence_tokens",
    "min_sentence_tokens",
    "language",
    "sentence_rule",
)
#: Arguments that transformers hands along, and the values that ask for nothing.
CALL_ARGUMENTS = {
    "verbose": (True, False),
    "split_special_tokens": (True, None),
    "return_token_type_ids": (False, None),
    "tokenizer_kwargs": (None,),
    "sanitize_control_tokens": (False, None),  # from apply_chat_template
}
DECODE_ARGUMENTS = {
    "clean_up_tokenization_spaces": (False, None),
    "spaces_between_special_tokens": (True, False, None),
    "use_source_tokenizer": (False, None),
}


def _refuse(kwargs: dict[str, Any], call: str, known: dict[str, tuple[Any, ...]]) -> None:
    """Raises `ArgumentError` for arguments that a call would ignore."""
    for name, value in kwargs.items():
        if name not in known:
            raise ArgumentError(f"SentenceTokenizer's {call} takes no argument {name!r}.{nearest(name, known)}")
        if value not in known[name]:
            raise UnsupportedError(f"{name}={value!r} was given, which SentenceTokenizer's {call} doesn't do.")


class SentenceTokenizer(PreTrainedTokenizerFast):
    """Text to ids and back, sentence ends included.

    `tokenizer(text)` starts with `<|endoftext|>` (unless `add_special_tokens=False`) and closes every sentence that
    more text follows; `decode` leaves special tokens out unless `skip_special_tokens=False`, so that
    `decode(encode(text)) == text` for any text. With the special tokens taken out, the ids are the plain BPE's.
    Special tokens written out in a text are text.

    Args:
        insert_sentence_ends: False for models that read text without sentence ends.
        max_sentence_tokens: as in the model's configuration.
        min_sentence_tokens: shorter sentences are joined with what follows; None keeps each apart.
        language: ISO 639 code, for the splitting rules.
        sentence_rule: by which sentences end; default: the newest, or the one that a folder was written with.

    Raises:
        ConfigError: a setting that can't be, or a name that one of these was meant by.
        TokenizerError: the special tokens aren't there.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012  transformers declares it so

    def __init__(
        self,
        *args: Any,
        insert_sentence_ends: bool = True,
        max_sentence_tokens: int | None = 256,
        min_sentence_tokens: int | None = None,
        language: str = "en",
        sentence_rule: int | None = None,
        **kwargs: Any,
    ) -> None:
        if sentence_rule is None:
            # Folders from before rules had numbers name none.
            sentence_rule = NEWEST_RULE if kwargs.get("name_or_path") is None else 1
        # Foreign names may come from a folder's file; one that is nearly one of ours is a slip.
        for name in kwargs:
            meant = difflib.get_close_matches(name, TOKENIZER_SETTINGS, n=1, cutoff=0.8)
            if meant:
                raise ConfigError(f"SentenceTokenizer has no setting {name!r}. Did you mean {meant[0]!r}?")
        splitter = splitter_of(sentence_rule, language)
        kwargs.setdefault("bos_token", END_OF_TEXT)
        kwargs.setdefault("eos_token", END_OF_TEXT)
        kwargs.setdefault("pad_token", PADDING)
        kwargs.setdefault("padding_side", "left")  # generation goes on from the right end
        kwargs["split_special_tokens"] = True  # special tokens written out in a text are text
        kwargs["clean_up_tokenization_spaces"] = False
        super().__init__(
            *args,
            insert_sentence_ends=insert_sentence_ends,
            max_sentence_tokens=max_sentence_tokens,
            min_sentence_tokens=min_sentence_tokens,
            language=language,
            sentence_rule=sentence_rule,
            **kwargs,
        )
        check_sentence_lengths(min_sentence_tokens, max_sentence_tokens)
        self.insert_sentence_ends = insert_sentence_ends
        self.max_sentence_tokens = max_sentence_tokens
        self.min_sentence_tokens = min_sentence_tokens
        self.sentence_rule = sentence_rule
        self.splitter: SentenceSplitter = splitter
        missing = [token for token in SPECIAL_TOKENS if self.backend_tokenizer.token_to_id(token) is None]
        if missing:
            raise TokenizerError(
                f"the tokenizer lacks {', '.join(missing)}. Train one with `thoughtformer tokenizer train`, which adds "
                "them, or add them as special tokens."
            )

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Arguments for the constructor: a tokenizer.json is taken whole.

        transformers would rebuild a subclass with a constructor of its own from vocabulary and merges alone, and lose
        the byte-level pre-tokenizer and decoder without a word.
        """
        file = kwargs.get("tokenizer_file")
        if file is not None and os.path.isfile(file):
            return dict(kwargs)
        return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; `AutoTokenizer` then takes the folder with `trust_remote_code=True` in any process."""
        self.init_kwargs["auto_map"] = TOKENIZER_AUTO_MAP
        try:
            saved = super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            del self.init_kwargs["auto_map"]
        write_hub_file(save_directory)
        return saved

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Nothing: transformers would copy this source into every folder that is saved."""

    @classmethod
    def from_backend(cls, backend: Tokenizer, **kwargs: Any) -> SentenceTokenizer:
        """Wraps a tokenizer of the `tokenizers` library."""
        return cls(tokenizer_object=backend, **kwargs)

    @property
    def sentence_end_token_id(self) -> int:
        """The id of `<|endofsentence|>`."""
        return self._id_of(END_OF_SENTENCE)

    @property
    def start_token_id(self) -> int:
        """The id of `<|endoftext|>`, which starts every document."""
        return self._id_of(END_OF_TEXT)

    def _id_of(self, token: str) -> int:
        token_id = self.backend_tokenizer.token_to_id(token)
        assert token_id is not None, "checked when the tokenizer was made"
        return token_id

    def encode_document(self, text: str, *, complete: bool, start: bool = True) -> np.ndarray:
        """The ids of one text; a `complete` document closes its last sentence, a prompt leaves it open."""
        return self._encode_text(text, add_start=start, close_last=complete)[0]

    def plain_ids(self, text: str) -> list[int]:
        """The ids without any special token."""
        return self._encode_plain(text).ids

    def _encode_plain(self, text: str) -> Encoding:
        backend = self.backend_tokenizer
        # Set each time: the flag is lost when a tokenizer is pickled for another process.
        backend.encode_special_tokens = True
        try:
            return backend.encode(text, add_special_tokens=False)
        except TypeError:
            raise InputError(f"text holds a lone surrogate, which is no character: {_first_surrogate(text)}.") from None

    def _encode_text(
        self, text: str, *, add_start: bool, close_last: bool = False
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        encoding = self._encode_plain(text)
        if not self.insert_sentence_ends:
            ids, offsets = np.asarray(encoding.ids, dtype=np.int64), encoding.offsets
        else:
            plain = encoding.offsets
            ids, index = insert_ends(
                encoding.ids,
                plain,
                self.splitter.decided(text, complete=close_last),
                sentence_end_token_id=self.sentence_end_token_id,
                max_sentence_tokens=self.max_sentence_tokens,
                min_sentence_tokens=self.min_sentence_tokens,
                close_last=close_last,
                last_ink=len(text.rstrip()) - 1 if close_last else -1,
            )
            offsets = [plain[i] if i >= 0 else (0, 0) for i in index.tolist()]
        if add_start:
            ids, offsets = np.insert(ids, 0, self.start_token_id), [(0, 0), *offsets]
        return ids, offsets

    # transformers' entry points.

    def _encode_plus(  # type: ignore[override]
        self,
        text: str | list[str],
        text_pair: object = None,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: Any = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        **kwargs: Any,
    ) -> BatchEncoding:
        _refuse(kwargs, "tokenizer(...)", CALL_ARGUMENTS)
        if text_pair is not None or is_split_into_words or return_overflowing_tokens or stride:
            raise UnsupportedError(
                "SentenceTokenizer takes whole texts: no pairs, no pre-split words, no overflow or stride."
            )
        is_batched = isinstance(text, (list, tuple))
        texts = list(text) if is_batched else [text]
        if not all(isinstance(one, str) for one in texts):
            raise TokenizerError(f"SentenceTokenizer takes a str or a list of str, not {type(text).__name__}.")
        strategy = getattr(truncation_strategy, "value", "do_not_truncate")
        limit = max_length if strategy != "do_not_truncate" else None
        data: dict[str, list[Any]] = {"input_ids": []}
        for one in texts:
            ids, offsets = self._encode_text(one, add_start=add_special_tokens)
            if limit is not None:
                part = slice(None, limit) if self.truncation_side == "right" else slice(-limit, None)
                ids, offsets = ids[part], offsets[part]
            data["input_ids"].append(ids.tolist())
            if return_special_tokens_mask:
                special = np.isin(ids, self.all_special_ids) | (ids == self.sentence_end_token_id)
                data.setdefault("special_tokens_mask", []).append(special.astype(int).tolist())
            if return_offsets_mapping:
                data.setdefault("offset_mapping", []).append(offsets)
            if return_length:
                data.setdefault("length", []).append(len(ids))
        if return_attention_mask is not False:
            data["attention_mask"] = [[1] * len(ids) for ids in data["input_ids"]]
        unwrap = not is_batched and return_tensors is None
        encoded = {name: values[0] if unwrap else values for name, values in data.items()}
        if padding_strategy == PaddingStrategy.DO_NOT_PAD:
            return BatchEncoding(encoded, tensor_type=return_tensors)
        return self.pad(
            encoded,
            padding=padding_strategy,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> Any:
        """The text of ids, or of each row of ids; special tokens are left out unless asked for."""
        _refuse(kwargs, "decode", DECODE_ARGUMENTS)
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(  # type: ignore[override]
        self, sequences: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> Any:
        """The text of each row of ids."""
        _refuse(kwargs, "batch_decode", DECODE_ARGUMENTS)
        return super().batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """The tokens of a text as strings, sentence ends among them."""
        if pair is not None:
            raise UnsupportedError("SentenceTokenizer takes no text pairs.")
        _refuse(kwargs, "tokenize", CALL_ARGUMENTS)
        ids, _ = self._encode_text(text, add_start=add_special_tokens)
        return list(self.convert_ids_to_tokens(ids.tolist()))
