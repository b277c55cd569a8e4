"""What ends a response."""

from collections.abc import Sequence
from dataclasses import dataclass

from marlhf_mega.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class StopRule:
    """End tokens, and texts that end a response with the token that completes them."""

    end_ids: frozenset[int] = frozenset()
    texts: tuple[bytes, ...] = ()
    token_bytes: Sequence[bytes] = ()
    """What each token adds to the text; needed only with `texts`."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "StopRule":
        """Return the rule of a run: all that its tokenizer, model and `rollout.stop` declare."""
        return cls(
            end_ids=frozenset(tokenizer.end_ids),
            texts=tokenizer.stop_texts,
            token_bytes=tokenizer.token_bytes,
        )

    def is_met(self, tokens: Sequence[int]) -> bool:
        """Tell whether the last token ends the response; it was not over before."""
        return tokens[-1] in self.end_ids or any(
            self._completes(text, tokens) for text in self.texts
        )

    def _completes(self, text: bytes, tokens: Sequence[int]) -> bool:
        tail = b""
        last = self.token_bytes[tokens[-1]]
        for token in reversed(tokens):
            tail = self.token_bytes[token] + tail
            if len(tail) >= len(text) + len(last):
                break
        return bool(last) and text in tail
