"""Chat templates that write what those of published models write, in this project's own layout.

Names are those of the models. Quotes, spaces, line breaks and comments differ from the published
files, which makes no difference to what a template writes.
"""

_ROLES_ALTERNATE = """
{%- if (message.role == "user") != (loop.index0 % 2 == 0) -%}
    {{- raise_exception("the roles must alternate") -}}
{%- endif -%}
"""
_SYSTEM_MESSAGE = """
{%- if messages[0].role == "system" -%}
    {%- set loop_messages = messages[1:] -%}
    {%- set system_message = messages[0].content -%}
{%- else -%}
    {%- set loop_messages = messages -%}
    {%- set system_message = DEFAULT -%}
{%- endif -%}
"""

LLAMA2 = (
    "{# Llama 2 Chat and Code Llama Instruct #}"
    + _SYSTEM_MESSAGE.replace("DEFAULT", "false")
    + "{%- for message in loop_messages -%}"
    + _ROLES_ALTERNATE
    + r"""
    {%- if loop.index0 == 0 and system_message != false -%}
        {%- set content = "<<SYS>>\n" + system_message + "\n<</SYS>>\n\n" + message.content -%}
    {%- else -%}
        {%- set content = message.content -%}
    {%- endif -%}
    {%- if message.role == "user" -%}
        {{- bos_token + "[INST] " + content.strip() + " [/INST]" -}}
    {%- elif message.role == "system" -%}
        {{- "<<SYS>>\n" + content.strip() + "\n<</SYS>>\n\n" -}}
    {%- elif message.role == "assistant" -%}
        {{- " " + content.strip() + " " + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
)
LLAMA3 = r"""
{%- set loop_messages = messages -%}
{%- for message in loop_messages -%}
    {%- set content = "<|start_header_id|>" + message.role + "<|end_header_id|>\n\n"
        + message.content | trim + "<|eot_id|>" -%}
    {%- if loop.index0 == 0 -%}{%- set content = bos_token + content -%}{%- endif -%}
    {{- content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" -}}
{%- endif -%}
"""
LLAMA31 = r"""
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0].role == "system" %}
    {%- set system_message = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{#- Tools come between the header and the message of the system. #}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {{- "Functions: " + (tools | tojson) + "\n\n" }}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not "tool_calls" in message %}
        {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\n\n"
            + message.content | trim + "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" + (message.tool_calls | tojson) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}
{%- endif %}
"""
CHATML = r"""
{%- for message in messages -%}
    {{- "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>" + "\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\n" -}}
{%- endif -%}
"""
CHATML_WITH_BOS = "{{ bos_token }}" + CHATML
CHATML_WITH_DEFAULT = CHATML.replace(
    "{%- for message in messages -%}",
    r"""{%- for message in messages -%}
    {%- if loop.first and messages[0].role != "system" -%}
        {{- "<|im_start|>system\nIt's you: \"I\\O\".<|im_end|>\n" -}}
    {%- endif -%}""",
)
ZEPHYR = r"""{# TinyLlama Chat, too #}
{% for message in messages %}
    {% if message["role"] == "user" %}
{{ "<|user|>\n" + message["content"] + eos_token }}
    {% elif message["role"] == "system" %}
{{ "<|system|>\n" + message["content"] + eos_token }}
    {% elif message["role"] == "assistant" %}
{{ "<|assistant|>\n" + message["content"] + eos_token }}
    {% endif %}
    {% if loop.last and add_generation_prompt %}
{{ "<|assistant|>" }}
    {% endif %}
{% endfor %}
"""
VICUNA_SPACED = (
    _SYSTEM_MESSAGE.replace("DEFAULT", '"A chat with the assistant\'s user."')
    + "{%- for message in loop_messages -%}"
    + _ROLES_ALTERNATE
    + r"""
    {%- if loop.index0 == 0 -%}{{- system_message -}}{%- endif -%}
    {%- if message.role == "user" -%}
        {{- " USER: " + message.content.strip() -}}
    {%- elif message.role == "assistant" -%}
        {{- " ASSISTANT: " + message.content.strip() + eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- " ASSISTANT:" -}}{%- endif -%}
"""
)
_SYSTEM_FIRST = """
{%- if messages[0].role == "system" %}
    {%- set system_message = messages[0].content %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
"""
MISTRAL = (
    _SYSTEM_FIRST
    + "{{- bos_token }}{%- for message in loop_messages %}"
    + _ROLES_ALTERNATE
    + r"""
    {%- if message.role == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\n\n" + message.content + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message.content + " [/INST]" }}
        {%- endif %}
    {%- elif message.role == "assistant" %}
        {{- " " + message.content + eos_token }}
    {%- else %}
        {{- raise_exception("the role is unknown") }}
    {%- endif %}
{%- endfor %}
"""
)
OLD_MISTRAL = (
    "{{- bos_token -}}{%- for message in messages -%}"
    + _ROLES_ALTERNATE
    + r"""
    {%- if message.role == "user" -%}
        {{- "[INST] " + message.content + " [/INST]" -}}
    {%- elif message.role == "assistant" -%}
        {{- message.content + eos_token -}}
    {%- else -%}
        {{- raise_exception("the role is unknown") -}}
    {%- endif -%}
{%- endfor -%}
"""
)
OLDEST_MISTRAL = OLD_MISTRAL.replace("eos_token -", 'eos_token + " " -')
MISTRAL_V3 = (
    _SYSTEM_FIRST
    + r"""
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message.role == "user" %}
        {%- if tools is not none %}
            {{- "[AVAILABLE_TOOLS] " + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message.content + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message.content + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined %}
        {{- "[TOOL_CALLS] " + (message.tool_calls | tojson) + eos_token }}
    {%- elif message.role == "assistant" %}
        {{- " " + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
)
UNTRIMMED_MISTRAL_V3 = MISTRAL_V3.replace("content | trim + eos", "content + eos")
LLAMA_GUARD = """{{- "[INST] Task: Check if there is unsafe content in 'User' messages.

<BEGIN UNSAFE CONTENT CATEGORIES>
O1: Violence.
<END UNSAFE CONTENT CATEGORIES>

<BEGIN CONVERSATION>

" -}}
{%- for message in messages -%}{{- message.role + ": " + message.content + "\n\n" -}}{%- endfor -%}
{{- "<END CONVERSATION> [/INST]" -}}
"""

# The name of the format, by the name of the template.
FORMAT_NAMES = {
    "LLAMA2": "llama2",
    "LLAMA3": "llama3",
    "LLAMA31": "llama3.1",
    "CHATML": "chatml",
    "CHATML_WITH_BOS": "chatml",
    "CHATML_WITH_DEFAULT": "chatml",
    "ZEPHYR": "zephyr",
    "VICUNA_SPACED": "vicuna",
    "MISTRAL": "mistral",
    "OLD_MISTRAL": "mistral",
    "OLDEST_MISTRAL": "mistral",
    "MISTRAL_V3": "mistral-v3",
    "UNTRIMMED_MISTRAL_V3": "mistral-v3",
}
WITHOUT_SYSTEM = ("OLD_MISTRAL", "OLDEST_MISTRAL")  # these refuse a system message
