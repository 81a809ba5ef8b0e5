"""Opens an export with transformers and continues a prompt (extra `parity`).

python docs/serve_transformers.py EXPORT --prompt TEXT
"""

import argparse
import json
import sys

import torch
from transformers import AutoTokenizer, DeepseekV4ForCausalLM


def open_export(directory: str):
    """(model, tokenizer) of an export, in float32 or bfloat16.

    Exits if a tensor is missing or unknown to transformers.
    """
    model, info = DeepseekV4ForCausalLM.from_pretrained(
        directory, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    if any(info.values()):
        sys.exit(f"{directory}: {info}")
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model, tokenizer = open_export(arguments.export)
    text = arguments.prompt.removeprefix(tokenizer.bos_token)
    ids = [tokenizer.bos_token_id] + tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=arguments.max_new_tokens
        )[0, len(ids) :].tolist()
    print(
        json.dumps({"tokens": out})
        if arguments.json
        else arguments.prompt + tokenizer.decode(out, skip_special_tokens=True)
    )


if __name__ == "__main__":
    main()
