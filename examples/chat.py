"""A conversation of two turns: python examples/chat.py [MODEL]"""

import sys

from nybble import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "demo")
params = SamplingParams(temperature=0, max_tokens=60)

messages = [{"role": "user", "content": "What is the capital of France?"}]
answer = llm.chat(messages, sampling_params=params)
print(answer.text)

messages += [
    {"role": "assistant", "content": answer.text},
    {"role": "user", "content": "And of Italy?"},
]
answer = llm.chat(messages, sampling_params=params)
print(answer.text)
print(f"({answer.finish_reason}, {answer.timing.decode_rate:.0f} tokens/s)")
