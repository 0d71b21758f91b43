"""Chat templates of our own that do what Qwen2.5's, Qwen3's and QwQ's are known to do, for tests.

All: tools are listed in the system turn, calls are <tool_call> blocks with JSON, results of tools that
follow one another share a turn of the user. Qwen2.5's has a system message where none is given, and knows
no thinking. Qwen3's has none, and writes thinking only in turns after the last question of the user: an
empty block in the last turn where there is none, and nothing in earlier ones. A content is taken apart at
</think>, unless the thinking has a field of its own. QwQ's knows no such field, and writes the content of
the last message as it is and of earlier ones what follows the last </think>.
"""

TURNS = """\
{%- macro turn(role, text) %}<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro %}
{%- macro calls(message, words) %}
{%- for call in message.tool_calls or [] %}
{%- if words or not loop.first %}{{ '\\n' }}{% endif %}<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}
{%- endmacro %}
{%- macro result(index) %}
{%- if index == 0 or messages[index - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
<tool_response>
{{ messages[index].content }}
</tool_response>
{%- set next = messages[index + 1] if index < messages | length - 1 else {} %}
{%- if next.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endmacro %}
{%- macro system(text) %}
{%- if tools %}
{%- set listed %}{% for tool in tools %}
{{ tool | tojson }}{% endfor %}{% endset %}
{{- turn('system', (text ~ '\\n\\n' if text else '') ~ '# Tools' ~ listed) }}
{%- elif text %}{{ turn('system', text) }}
{%- endif %}
{%- endmacro %}
{%- set first = messages[0].content if messages[0].role == 'system' else none %}
"""
PROMPT = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
QWEN25 = (
    TURNS
    + """\
{{- system(first or 'You are a model of a test.') }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- turn('assistant', message.content ~ calls(message, message.content)) }}
{%- elif message.role == 'tool' %}{{ result(loop.index0) }}
{%- elif not (loop.first and message.role == 'system') %}{{ turn(message.role, message.content) }}
{%- endif %}
{%- endfor %}
"""
    + PROMPT
)
QWEN3 = (
    TURNS
    + """\
{{- system(first) }}
{%- set state = namespace(question=messages | length - 1, found=false) %}
{%- for message in messages | reverse %}
{%- if not state.found and message.role == 'user' %}
{%- set state.found = true %}
{%- set state.question = messages | length - 1 - loop.index0 %}
{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set apart = message.reasoning_content is string %}
{%- set parts = [message.content] if apart else message.content.split('</think>') %}
{%- set words = parts[-1].lstrip('\\n') %}
{%- set inline = parts[0].split('<think>')[-1] if parts | length > 1 else '' %}
{%- set thinking = (message.reasoning_content or inline or '').strip('\\n') %}
{%- set shown = loop.index0 > state.question and (loop.last or thinking) %}
{%- set block = '<think>\\n' ~ thinking ~ '\\n</think>\\n\\n' if shown else '' %}
{{- turn('assistant', block ~ words ~ calls(message, words)) }}
{%- elif message.role == 'tool' %}{{ result(loop.index0) }}
{%- elif not (loop.first and message.role == 'system') %}{{ turn(message.role, message.content) }}
{%- endif %}
{%- endfor %}
"""
    + PROMPT
)
QWQ = QWEN25.replace(
    "turn('assistant', message.content ~",
    "turn('assistant', (message.content if loop.last else message.content.split('</think>')[-1]) ~",
)
NO_THINKING = QWEN25.replace(
    "turn('assistant', message.content ~",
    "turn('assistant', message.content.split('</think>')[-1] ~",
)
