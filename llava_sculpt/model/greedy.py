"""How an answer is decoded, in evaluation and in training's forgetting probe."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from llava_sculpt.data.tokenizer import LlavaTokenizer


def greedy_config(config: Any, tokenizer: LlavaTokenizer, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding.

    Every setting that could change the choice of a token is given, because generate() fills what is left out
    from the checkpoint's generation_config.json (LLaVA-1.5's asks for sampling). The rows behind the
    tokenizer's vocabulary (image mark, padding) exist only in this port of LLaVA and are never answers.
    """
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.vocab_size + 1,
        suppress_tokens=list(range(tokenizer.vocab_size, config.text_config.vocab_size)),
    )
