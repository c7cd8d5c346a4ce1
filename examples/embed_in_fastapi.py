"""A FastAPI application that streams a model's answers from a route of its own.

    pip install -e '.[server]' fastapi
    python examples/embed_in_fastapi.py [--port 8000] [path/to/checkpoint]
    curl -N "http://127.0.0.1:8000/ask?question=What+is+17+%2B+25%3F"

For OpenAI's routes there is `flash-moe serve`. Here the loop stays free while tokens are computed, and a client that
leaves ends its generation.
"""

import argparse
import contextlib
from collections.abc import AsyncIterator
from importlib.resources import files

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from flash_moe_mlx import PrefixCache, chat_prompt, load, stream_generate_async


def create_app(path: str) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        model, tokenizer = load(path, memory_limit="1GB", max_context=2048)
        with model.streaming, PrefixCache(model, "50MB") as prefix_cache:
            app.state.model, app.state.tokenizer, app.state.prefix_cache = model, tokenizer, prefix_cache
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/ask")
    async def ask(question: str, max_tokens: int = 100) -> StreamingResponse:
        state = app.state
        prompt, points = chat_prompt(state.tokenizer, [{"role": "user", "content": question}])

        async def answer() -> AsyncIterator[str]:
            responses = stream_generate_async(
                state.model, state.tokenizer, prompt, max_tokens, prefix_cache=state.prefix_cache, snapshot_at=points
            )
            async with contextlib.aclosing(responses):
                async for response in responses:
                    yield response.text

        return StreamingResponse(answer(), media_type="text/plain")

    @app.get("/stats")
    async def stats() -> dict[str, float]:
        figures = app.state.model.streaming.stats()
        return {"tokens": figures.tokens, "hit_rate": figures.hit_rate, "bytes_read": figures.bytes_read}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(files("flash_moe_mlx") / "demo"), help="checkpoint directory")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    uvicorn.run(create_app(arguments.model), port=arguments.port, log_level="warning")
