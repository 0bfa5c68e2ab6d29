"""Writes chat.json beside it: texts, ids and masks of conversations as transformers makes them, for templates with {% generation %}.

    python tests/golden/make_chat.py

needs transformers, which tests/data/chat/test_templates.py does not. chat.json holds the tokenizer (its tokenizer.json), each template and
each conversation under a name, and for every pair of them the text, the ids and `assistant_masks` of apply_chat_template.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import foreign_tokenizers  # noqa: E402

from jaxllm import registry  # noqa: E402

ADDED = ["<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
# As templates are found: the end of an answer outside of the mark, behind a newline; a newline inside of it; bos at each question.
OTHERS = {
    "end outside": "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{{ '\n' + eos_token }}{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}",
    "newline inside": """{% for m in messages %}
    {% if m.role == 'assistant' %}
        {%- generation %}
        {{- m.content }}{{ '<|im_end|>' }}{{ '\n' }}
        {%- endgeneration %}
    {% else %}
        {{- bos_token + m.content | trim + '\n' }}
    {% endif %}
{% endfor %}""",
}
ASK, ANSWER = {"role": "user", "content": "Is the cat\n\n here?"}, {"role": "assistant", "content": "No, the cat sat there."}
CONVERSATIONS = {
    "one turn": [ASK, ANSWER],
    "system": [{"role": "system", "content": "Be kind, the cat is."}, ASK, ANSWER],
    # How a user says that there is no message of the system, also not one of the template's own.
    "empty system": [{"role": "system", "content": ""}, ASK, ANSWER],
    "three turns": [
        ASK,
        ANSWER,
        ASK,
        {"role": "assistant", "content": "  naïve 日本 😀\n"},
        ASK,
        {"role": "assistant", "content": "\nthe cat"},
    ],
}


def tokenizer() -> Any:
    made = tokenizers.Tokenizer.from_str(
        foreign_tokenizers.tokenizer_json(foreign_tokenizers.after_bytes)["tokenizer.json"].decode()
    )
    made.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in ADDED])
    return made


def main() -> None:
    made = tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        made.save(str(Path(folder, "tokenizer.json")))
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(Path(folder, "tokenizer.json")), **NAMES)
    templates = {name: registry.resolve("chat_template", name)().text for name in registry.names("chat_template")} | OTHERS
    cases = []
    for template, program in templates.items():
        for conversation, messages in CONVERSATIONS.items():
            found = theirs.apply_chat_template(
                messages, chat_template=program, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
            )
            text = theirs.apply_chat_template(messages, chat_template=program, tokenize=False, add_generation_prompt=False)
            case = {"template": template, "conversation": conversation, "text": text}
            cases.append(case | {"ids": list(found["input_ids"]), "mask": list(found["assistant_masks"])})
    values = {
        "versions": {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__},
        "names": NAMES,
        "tokenizer": json.loads(made.to_str()),
        "templates": templates,
        "conversations": CONVERSATIONS,
        "cases": cases,
    }
    (HERE / "chat.json").write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
