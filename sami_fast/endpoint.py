"""Chat completions from an OpenAI-compatible endpoint: a hosted model, or vLLM, llama.cpp and others behind a URL."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sami_fast.config import check_keys


class EndpointError(RuntimeError):
    """An endpoint gave no answer; the message names the model and the reason."""


class NoAnswerError(EndpointError):
    """An endpoint answered without text: a content filter, or all tokens spent on thoughts."""


class Endpoint:
    """One model behind an endpoint. Safe to share between threads.

    Busy (408, 409, 429), failing (5xx), unreachable and late endpoints are asked again, after a growing pause or after
    the one that they ask for.

    Args:
        model: name that the endpoint knows.
        base_url: the endpoint, such as `http://localhost:8000/v1`; None is what the `openai` package takes by default.
        api_key_env: environment variable with the key. It may be unset where `base_url` is given.
        timeout: seconds to wait for one answer.
        max_retries: how often to ask again.

    Raises:
        EndpointError: the package `openai` is not installed, or the key is missing.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        max_retries: int = 5,
    ) -> None:
        if not isinstance(model, str) or not model:
            raise ValueError(f"model: expected the name of a model, got {model!r}")
        if type(timeout) not in (int, float) or not timeout > 0:
            raise ValueError(f"timeout: expected more than 0 seconds, got {timeout!r}")
        if type(max_retries) is not int or max_retries < 0:
            raise ValueError(f"max_retries: expected an int of at least 0, got {max_retries!r}")
        try:
            import openai
        except ImportError:
            raise EndpointError(f"{model}: the package openai is not installed; run: pip install openai") from None
        key = os.environ.get(api_key_env)
        if not key and base_url is None:
            raise EndpointError(f"{model}: expected an API key in the environment variable {api_key_env}, got none")
        self.model = model
        self._client = openai.OpenAI(
            api_key=key or "none",  # servers of one's own mostly ask for none, the client insists on some text
            base_url=base_url,
            timeout=timeout,
            max_retries=max_retries,
        )
        # OpenAI's newer models refuse the older name, most other servers know no other.
        self._limit = "max_completion_tokens" if self._client.base_url.host == "api.openai.com" else "max_tokens"

    @classmethod
    def from_config(cls, section: str, values: Any) -> Endpoint:
        """From the section of a configuration with `model` and, if wanted, the other arguments of the class.

        Raises:
            ValueError: the section is no mapping, or has an unknown key or a wrong value.
            EndpointError: as in the class.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{section}: expected a section of keys, got {values!r}")
        check_keys(section, values, ("model", "base_url", "api_key_env", "timeout", "max_retries"))
        return cls(**{"model": "", **values})

    def complete(self, prompt: str, *, max_tokens: int, temperature: float, seed: int | None = None) -> str:
        """The answer to one user message.

        Raises:
            EndpointError: no answer after all retries, or a refusal (such as a bad key).
            NoAnswerError: an answer without text.
        """
        import openai

        options = {self._limit: max_tokens} | ({} if seed is None else {"seed": seed})
        try:
            answer = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=temperature,
                **options,
            )
        except openai.APIStatusError as error:
            raise self._error(f"answered {error.status_code}: {_short(error)}") from None
        except openai.APITimeoutError:
            raise self._error(f"gave no answer in {self._client.timeout} s") from None
        except openai.APIConnectionError as error:
            raise self._error(f"cannot be reached: {_short(error.__cause__ or error)}") from None
        except (openai.OpenAIError, ValueError) as error:
            raise self._error(f"gave an answer out of form: {_short(error)}") from None
        try:
            text = answer.choices[0].message.content
        except (AttributeError, IndexError, TypeError):
            raise self._error(f"gave an answer out of form: {_short(answer)}") from None
        if not isinstance(text, str) or not text.strip():
            raise self._error("gave an answer without text", NoAnswerError)
        return text

    def _error(self, reason: str, kind: type[EndpointError] = EndpointError) -> EndpointError:
        return kind(f"{self.model}: {str(self._client.base_url).rstrip('/')} {reason}")


def _short(value: object) -> str:
    return " ".join(str(value).split())[:200]
