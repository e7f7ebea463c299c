"""A served toy model that says what a test lets it say, and the tools that tests offer it."""

from __future__ import annotations

from openai import OpenAI

# In the manner of Qwen2.5's: tools in the system message, answers of tools as the user's.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
Answer with <tool_call> tags.<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "get_weather", "description": "Weather of a city.", "parameters": SCHEMA}
TIME = {"name": "get_time"}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, TIME)]
ASK = [{"role": "user", "content": "How is Paris?"}]
ARGUMENTS = '{"city": "Paris", "days": 2}'
CALL = {
    "hermes": f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
    "react": f"Action: get_weather\nAction Input: {ARGUMENTS}",
}
SAY = {"hermes": "I look.\n", "react": "Thought: I look.\n"}


class Talker:
    """A served toy model that says what it is told to; what it was asked is in `prompts`."""

    def __init__(self, server, llm, kind):
        self.server, self.llm, self.kind = server, llm, kind
        self.client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        self.prompts = []

    def ask(self, messages=ASK, **fields):
        fields = {"max_tokens": 200, **fields}
        return self.client.chat.completions.create(model="toy", messages=messages, **fields)

    def stream(self, **fields):
        """(content, calls by index, finish reason, chunks) of a streamed answer."""
        content, calls, reason, chunks = "", {}, None, list(self.ask(stream=True, **fields))
        for chunk in chunks:
            choice = chunk.choices[0]
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                known = calls.setdefault(call.index, {"name": None, "arguments": ""})
                if call.function.name:
                    assert call.id.startswith("call_")
                    assert known["name"] is None
                    known["name"] = call.function.name
                known["arguments"] += call.function.arguments
        return content, list(calls.values()), reason, chunks

    def closing(self, weight=60):
        """A bias that lets random weights end what a grammar lets them end."""
        return {self.llm.tokenizer.encode(text)[0]: weight for text in '"]}'}


def shown(message):
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


def schema_format(schema, **fields):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}
