"""Adaptor for lm-evaluation-harness, which takes models only from its own registry: importing this module enters one.

    python -m flash_moe_mlx.lab.harness run --model flash_moe_mlx --model_args pretrained=PATH --tasks NAME

runs lm_eval's own command line with the model registered. Nothing else in the package imports this module. Needs the
extra ``eval``.
"""

from collections.abc import Sequence
from typing import Any

from mlx_lm.sample_utils import make_sampler
from tqdm import tqdm

from .. import __version__
from ..errors import RequestError
from ..installation import install_command
from ..runtime.generation import stream_generate
from ..runtime.loading import load
from .scoring import ContinuationScorer, scratch_bytes

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise RequestError(f"[lm_eval] is not installed, and this needs it. Run: {install_command('eval')}") from error


@register_model("flash_moe_mlx")
class FlashMoELM(TemplateLM):  # type: ignore[misc]
    """A model with streamed experts, as lm_eval asks it."""

    def __init__(
        self,
        pretrained: str,
        memory_limit: int | str | None = None,
        max_length: int = 2048,
        max_gen_toks: int = 256,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        """Load the model.

        Args:
            pretrained: Local directory, or a repository on the hub.
            memory_limit: As in `load`.
            max_length: Maximum number of tokens of a context with its continuation or answer.
            max_gen_toks: Maximum number of tokens of an answer, if a task doesn't say.
            batch_size: Ignored: requests are run one by one.
            max_batch_size: Ignored.
            device: Ignored: MLX's default device is used.
            options: Other arguments of `load`.
        """
        super().__init__()
        self.max_length = max_length
        self.max_gen_toks = max_gen_toks
        self._model, self._wrapper = load(pretrained, memory_limit=memory_limit, max_context=max_length, **options)
        engine = self._model.streaming
        stats = engine.stats()
        limit = stats.gpu_memory_limit_bytes or stats.memory_limit_bytes
        engine.resize_slots(limit - scratch_bytes(self._model.vocabulary_size, max_length))
        self.tokenizer = self._wrapper._tokenizer
        self._scorer = ContinuationScorer(self._model)
        self._name = pretrained

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context follows."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Name for lm_eval's caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval writes into its results."""
        lossy = list(self._model.streaming.stats().lossy)
        return {"flash_moe_mlx": __version__, "checkpoint": self._name, "lossy": lossy}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt of a conversation."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Return a text's tokens; by default with those that the tokenizer begins texts with, unless they are there."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        answers = []
        for key, context, continuation in tqdm(requests, desc="Running loglikelihood requests", disable=disable_tqdm):
            room = self.max_length + 1 - len(continuation)  # the last token is not fed
            if room < 1:
                raise RequestError(
                    f"[max_length] must hold a continuation of {len(continuation)} tokens, got {self.max_length}. "
                    "Choose a larger one."
                )
            answer = self._scorer.score(context[-room:], continuation)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
            answers.append(answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows of ``max_length`` tokens."""
        totals = []
        for request in tqdm(requests, desc="Running rolling loglikelihood requests", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return an answer to each context, cut before the first of the texts that end it."""
        answers = []
        for request in tqdm(requests, desc="Running generate_until requests", disable=disable_tqdm):
            context, asked = request.args
            settings = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
            stops = [stop for stop in settings["until"] if stop]
            room = max(1, self.max_length - settings["max_gen_toks"])
            prompt = self.tok_encode(context)[-room:]
            sampler = make_sampler(
                temp=settings["temperature"] if settings["do_sample"] else 0.0,
                top_p=settings.get("top_p", 0.0),
                top_k=settings.get("top_k", 0),
                min_p=settings.get("min_p", 0.0),
            )
            text = ""
            for response in stream_generate(
                self._model, self._wrapper, prompt, settings["max_gen_toks"], sampler=sampler, progress=False
            ):
                text += response.text
                if any(stop in text for stop in stops):
                    break
            answers.append(postprocess_generated_text(text, stops, None))
            self.cache_hook.add_partial("generate_until", (context, asked), answers[-1])
        return answers


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
