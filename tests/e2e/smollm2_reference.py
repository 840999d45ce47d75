"""The model smollm2, unpacked, and its greedy answers by transformers alone: chats as JSON on standard input."""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Arguments: cache directory, longest answer. Prints the path and (prompt ids, ids, text) of each chat."""
    cache, max_tokens = sys.argv[1], int(sys.argv[2])
    chats = json.load(sys.stdin)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from l4queue.smollm2 import convert_smollm2

    path = str(convert_smollm2(cache))
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    answers = []
    for chat in chats:
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=max_tokens, do_sample=False)
        prompt_ids = prompt["input_ids"][0].tolist()
        ids = output[0].tolist()[len(prompt_ids) :]
        answers.append((prompt_ids, ids, tokenizer.decode(ids, skip_special_tokens=True)))
    print(json.dumps({"path": path, "answers": answers}))


if __name__ == "__main__":
    main()
