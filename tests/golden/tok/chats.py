# SPDX-License-Identifier: Apache-2.0
"""Chat templates against Jinja. Run by `make.py chats OUT_DIR`.

chats.jsonl: first line the conversations, then a line for each template: {"name", "tokenizer": of families/, "config": tokenizer_config.json,
"rows": [[conversation, add_generation_prompt, hash of the ids as families.py makes it of one run, or null: refused], ...]}. The ids are those of the
text that jinja2 renders, set up as Hugging Face transformers does. The templates have the shape of the families' own, with the branches about tools cut
down. Refused is what a template raises for, and what octet does not take: refused() lists it.
"""
import datetime
import json
import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from families import fnv

U, A, S = "user", "assistant", "system"
CONVERSATIONS = [
    [(U, "Hello there!")],
    [(S, "Be brief."), (U, "What's 12 x 12?")],
    [(U, "One"), (A, "Two"), (U, "Three")],
    [(S, "You count."), (U, "One"), (A, "Two"), (U, "Three"), (A, "Four"), (U, "Five?")],
    [(S, "  spaced \n"), (U, "\n\n  leading and trailing \t\n"), (A, " an answer \n\n"), (U, "\u00a0x\u3000")],
    [(U, "")],
    [(U, "caf\u00e9 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u4f60\u597d\n1234567 it's"), (A, "<b>ok</b> {{ x }} {% y %}"), (U, "'quoted' \"twice\" \\n")],
    [(U, "Think."), (A, "<th" + "ink>\nhm\n</th" + "ink>\n\nDone."), (U, "Good.")],
    [(U, "One"), (A, "Two")],
    [(U, "a"), (U, "b")],
    [(A, "first")],
    [(S, "alone")],
    [(U, "a"), (A, "b"), (S, "later"), (U, "c")],
    [(S, "x"), (U, "a"), (A, "b")],
]

CHATML = "{% for message in messages %}%s{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
DEFAULT_SYSTEM = "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n%s<|im_end|>\\n' }}{% endif %}"
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'tools' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "tool" %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3 = """{%- if tools %}
    {{- "# Tools" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA3 = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
LLAMA3_GEN = "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
LLAMA31 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
DATE
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system message comes first. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- "tools" }}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- "tools" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
DATE31 = "{%- if not date_string is defined %}\n    {%- set date_string = \"26 Jul 2024\" %}\n{%- endif %}"
DATE32 = "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n        {%- set date_string = strftime_now(\"%d %b %Y\") %}\n    {%- else %}\n        {%- set date_string = \"26 Jul 2024\" %}\n    {%- endif %}\n{%- endif %}"
ALTERNATE = "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
LLAMA2 = ("{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}" + ALTERNATE + "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
MISTRAL1 = ("{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}")
SYSTEM_APART = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
"""
MISTRAL2 = SYSTEM_APART + """
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token}}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported') }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL3 = SYSTEM_APART + """{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool") %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == loop_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] []" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]_" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]_" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "tools" }}
    {%- elif message["role"] == "assistant" %}
        {{- ANSWER + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- "tools" }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
S_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
B_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}}
I_TOKENS = {"eos_token": "<|im_end|>"}
TEMPLATES = [
    ("chatml", "smollm", I_TOKENS, CHATML.replace("%s", "")),
    ("chatml", "smollm", I_TOKENS, CHATML.replace("%s", DEFAULT_SYSTEM.replace("%s", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"))),
    ("chatml", "smollm", I_TOKENS, "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}" + CHATML.replace("%s", "").replace("message['content']", "message['content'] | trim")),
    ("chatml", "qwen", I_TOKENS, "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
    ("chatml", "qwen", I_TOKENS, QWEN25),
    ("qwen3", "qwen", I_TOKENS, QWEN3),
    ("llama3", "llama3", B_TOKENS, LLAMA3 + "{% if add_generation_prompt %}" + LLAMA3_GEN + "{% endif %}"),
    ("llama3", "llama3", B_TOKENS, LLAMA3 + LLAMA3_GEN),
    ("llama3", "llama3", B_TOKENS, LLAMA31.replace("DATE", DATE31)),
    ("llama3", "llama3", B_TOKENS, LLAMA31.replace("DATE", DATE32)),
    ("llama2", "llama2", S_TOKENS, LLAMA2),
    ("mistral", "llama2", S_TOKENS, MISTRAL1),
    ("mistral", "llama2", S_TOKENS, MISTRAL1.replace(" + ' ' }}", "}}")),
    ("mistral", "mistral", S_TOKENS, MISTRAL2),
    ("mistral", "mistral", S_TOKENS, MISTRAL3.replace("]_", "] ").replace("ANSWER", '" " + message["content"]|trim')),
    ("mistral", "tekken", S_TOKENS, MISTRAL3.replace("]_", "]").replace("ANSWER", 'message["content"]')),
    ("zephyr", "llama2", S_TOKENS, ZEPHYR),
]


def render(template, config, messages, generate):
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.datetime(2025, 3, 9).strftime}
    tokens = {k: v["content"] if isinstance(v, dict) else v for k, v in config.items()}
    return env.from_string(template).render(messages=[{"role": r, "content": c} for r, c in messages], add_generation_prompt=generate, **tokens)


def refused(name, template, messages):
    late = any(r == S for r, _ in messages[1:])
    return (name == "qwen3" and messages[-1][0] == A or late and (name in ("llama2", "mistral") or "Cutting" in template) or [r for r, _ in messages] == [S] and name in ("llama2", "mistral"))


def row(tok, name, config, template, i, generate):
    try:
        text = render(template, config, CONVERSATIONS[i], generate)
    except (jinja2.exceptions.TemplateError, TypeError):
        return [i, generate, None]
    h = fnv(0xcbf29ce484222325, b"".join(t.to_bytes(4, "little") for t in tok.encode(text, add_special_tokens=False).ids))
    return [i, generate, None if refused(name, template, CONVERSATIONS[i]) else "%08x" % (h >> 32 ^ h & 0xffffffff)]


def write(out):
    with open(out + "/chats.jsonl", "w", encoding="ascii") as f:
        f.write(json.dumps(CONVERSATIONS) + "\n")
        for name, tokenizer, config, template in TEMPLATES:
            tok = Tokenizer.from_file("%s/families/%s.json" % (out, tokenizer))
            rows = [row(tok, name, config, template, i, g) for i in range(len(CONVERSATIONS)) for g in (True, False)]
            f.write(json.dumps({"name": name, "tokenizer": tokenizer, "config": config | {"chat_template": template}, "rows": rows}, separators=(",", ":")) + "\n")
    print(out + "/chats.jsonl", len(TEMPLATES), "templates")
