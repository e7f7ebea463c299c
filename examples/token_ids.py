"""Token ids in, token ids and log probabilities out: python examples/token_ids.py [MODEL]"""

import sys

from nybble import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "demo")

ids = llm.encode("The capital of France is")
answer = llm.generate(ids, SamplingParams(temperature=0, max_tokens=5, logprobs=2))
print("prompt", answer.prompt_token_ids)
print("answer", answer.token_ids, repr(answer.text))
for token in answer.logprobs or []:
    print(token)

# What the model predicts after every token of a text, in one pass.
logits = llm.logits(ids + answer.token_ids)
print("logits", tuple(logits.shape))
