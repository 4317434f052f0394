"""The real llama.cpp: the server of the package xllamacpp, asked over HTTP on this machine."""

import importlib.util
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

INSTALL = "pip install xllamacpp==2026.10.11549"


def is_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaServer:
    """A GGUF file loaded by llama.cpp, which decodes greedily. Raises ValueError."""

    def __init__(self, file: Path, context: int):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel = context, 1
        settings.warmup, settings.verbosity = False, 0
        try:
            self.server = xllamacpp.Server(settings)
        except RuntimeError as error:
            raise ValueError(f"llama.cpp cannot load {file.name} ({error}).") from None

    def render(self, chat: list[dict]) -> str:
        """The prompt of a chat, by llama.cpp's Jinja and the file's own template."""
        return self._ask("apply-template", messages=chat)["prompt"]

    def tokenize(self, text: str) -> list[int]:
        return self._ask("tokenize", content=text, parse_special=True, add_special=True)["tokens"]

    def complete(self, prompt: str, cap: int) -> dict[str, Any]:
        """{"content", "tokens" with the stop, "logprobs" of each, "stopped" before the cap}.

        llama.cpp gives no log p for a token that ends inside a character; it is None.
        """
        found = self._ask(
            "completion",
            prompt=prompt,
            n_predict=cap,
            temperature=0,
            return_tokens=True,
            cache_prompt=False,  # a reused prefix is computed in another shape of batch
            n_probs=1,
        )
        steps, logprobs = found["completion_probabilities"], []
        for token in found["tokens"]:
            known = steps and steps[0]["id"] == token
            logprobs.append(steps.pop(0)["logprob"] if known else None)
        return {
            "content": found["content"],
            "tokens": found["tokens"],
            "logprobs": logprobs,
            "stopped": found["stop_type"] == "eos",
        }

    def _ask(self, endpoint: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.server.listening_address}/{endpoint}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            why = json.load(error)["error"]["message"]
            raise ValueError(f"llama.cpp's {endpoint} fails ({why}).") from None
