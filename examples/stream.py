"""An answer while it is being written: python examples/stream.py [MODEL]"""

import sys

from nybble import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "demo")
params = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=80)

stream = llm.stream("Tell me about the sea.", system="You are a poet.", sampling_params=params)
for piece in stream:
    print(piece, end="", flush=True)
print()

answer = stream.completion
print(f"{len(answer.token_ids)} tokens, ended by {answer.finish_reason}", file=sys.stderr)
