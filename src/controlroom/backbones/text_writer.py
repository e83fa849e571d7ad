"""A causal language model of transformers on this machine, which continues texts and answers in conversations.

Nothing is downloaded, no pickle is opened and no code of a folder is run; whatever such a folder has wrong with it is
one error that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from controlroom.core.errors import ModelError

Message = dict[str, str]
"""``role`` and ``content``, as chat models take them."""


class TextWriter:
    """A tokenizer and a network; see `load_text_writer`."""

    def __init__(self, name: str, tokenizer: Any, network: Any) -> None:
        self.name, self.tokenizer, self.network = name, tokenizer, network

    def write(self, text: str, new_tokens: int, sampled: bool = False) -> str:
        """What the model says after a text.

        Args:
            text: its end counts where the model cannot read all of it.
            new_tokens: at most.
            sampled: whether words are drawn, from torch's generator; False: the likeliest each time.

        Raises:
            ModelError: it does not write text.
        """
        try:
            ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            limit = getattr(self.network.config, "max_position_embeddings", None)
            if limit is not None:
                ids = ids[:, -max(1, limit - new_tokens) :]
                new_tokens = max(1, min(new_tokens, limit - ids.shape[1]))
            pad = self.tokenizer.pad_token_id
            with torch.no_grad():
                written = self.network.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=sampled,
                    max_new_tokens=new_tokens,
                    pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                )
            return str(self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
        except Exception as error:
            raise ModelError(f"{self.name!r} does not write text: {_reason(error)}") from error

    def as_text(self, messages: Sequence[Message]) -> str:
        """A conversation as the model reads it, up to where its answer begins.

        A template that refuses the system's part (Gemma's, for one) gets it at the head of the user's first.

        Raises:
            ModelError: the folder's template refuses the conversation, or is broken.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            return "\n\n".join(f"{one['role']}: {one['content']}" for one in messages) + "\n\nassistant: "
        try:
            return self._templated(messages)
        except Exception as error:
            first, *rest = messages
            if first["role"] == "system" and rest:
                joined = {**rest[0], "content": f"{first['content']}\n\n{rest[0]['content']}"}
                return self.as_text([joined, *rest[1:]])
            raise ModelError(f"{self.name!r} has a chat template that cannot be used: {_reason(error)}") from error

    def _templated(self, messages: Sequence[Message]) -> str:
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def load_text_writer(name: str, instead: str) -> TextWriter:
    """Load the model of a folder, or of the local cache by its name.

    Args:
        name: folder with tokenizer and safetensors, or the name of one.
        instead: what happens without a model, for the error: "sentences then come from rules".

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Said for code, since transformers would ask at the terminal otherwise.
    told: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **told)
        network = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **told).eval()
    except Exception as error:
        raise ModelError(
            f"{name!r} is no causal language model in safetensors on this machine ({_reason(error)}). Give the folder "
            f"of one, or leave it out: {instead}."
        ) from error
    return TextWriter(name, tokenizer, network)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
