"""An application in a process of its own: run with `python -W error`, offline, against a hub cache.

Arguments: a repository, a revision of it, one that is not there, and the prompt's token ids. Prints JSON.
"""

import json
import sys

from flash_moe_mlx import CheckpointError, load, stream_generate

repository, revision, absent, *prompt = sys.argv[1:]
tokens = {}
for name, choice in (("main", None), ("revision", revision)):
    model, tokenizer, config = load(repository, memory_limit="1GB", revision=choice, return_config=True)
    with model.streaming:
        responses = stream_generate(model, tokenizer, [int(token) for token in prompt], 10)
        tokens[name] = [response.token for response in responses]
try:
    load(repository, memory_limit="1GB", revision=absent)
except CheckpointError as error:
    refused = str(error)
print(json.dumps({"tokens": tokens, "refused": refused, "model_type": config["model_type"]}))
