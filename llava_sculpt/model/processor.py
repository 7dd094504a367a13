"""What `AutoProcessor` (and through it vLLM and lmms-eval) needs beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AddedToken, LlamaTokenizer, LlavaImageProcessorPil, LlavaProcessor

from llava_sculpt.data.conversation import SYSTEM
from llava_sculpt.errors import UserError

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
# The v1 prompt LLaVA-1.5 was trained with: images in front of the text of their turn. No BOS: the tokenizer adds it.
# LLaVA tokenises the text behind an image on its own, which puts a space in front of it.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}" + SYSTEM + "{{ ' ' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] | replace('<image>\\n', '<image> \\n') }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image> \\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def write_processor(folder: Path, config: dict[str, Any]) -> None:
    """Write tokenizer and processor files for stock transformers into a model folder that has none.

    They make of a question and a picture what training and `llava-sculpt eval` make of them: LLaVA's prompt, images
    padded to a square. Made from tokenizer.model and preprocessor_config.json; `<image>` and `<pad>` get the ids of
    config.json.

    Raises:
        UserError: tokenizer.model does not fit config.json.
    """
    tokenizer = LlamaTokenizer.from_pretrained(
        folder, add_bos_token=True, padding_side="left", pad_token=None, local_files_only=True
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in (IMAGE_TOKEN, PAD_TOKEN)])
    tokenizer.pad_token = PAD_TOKEN
    ids = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, PAD_TOKEN])
    image = config.get("image_token_index", config.get("image_token_id"))
    if ids[0] != image:
        raise UserError(f"{folder}: tokenizer.model puts {IMAGE_TOKEN} at {ids[0]}, config.json at {image}")
    processor = LlavaProcessor(
        LlavaImageProcessorPil.from_pretrained(folder, do_pad=True, local_files_only=True),
        tokenizer,
        patch_size=config["vision_config"]["patch_size"],
        vision_feature_select_strategy=config.get("vision_feature_select_strategy", "default"),
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
