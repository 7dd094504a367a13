"""Batched greedy generation: equal to one-by-one decoding without cache, whatever the batch."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LlavaConfig

from llava_sculpt.data.conversation import IMAGE_TOKEN_INDEX, encode_prompt
from llava_sculpt.data.images import load_rgb
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation import decode
from llava_sculpt.evaluation.batch_size import batch_that_fits, bytes_per_question
from llava_sculpt.evaluation.chat import Chat
from llava_sculpt.evaluation.decode import Decoder
from llava_sculpt.evaluation.generate import generate_answers
from llava_sculpt.memory.plan import read_checkpoint_config

QUESTIONS = [
    {"question_id": n, "image": f"{n % 5}.png", "text": "what is number " * (n % 4 + 1) + f"{n} in this picture ?"}
    for n in range(15)
]


def answers(world, pictures, questions=QUESTIONS, **options) -> list[str]:
    options = {"batch_size": 4, "max_new_tokens": 8, **options}
    parts = (world.model, world.tokenizer, world.preprocessor)
    found: dict[int, str] = {}
    for batch in generate_answers(*parts, questions, pictures, **options):
        assert not found.keys() & batch.keys()
        found |= batch
    return [found[place] for place in range(len(questions))]


@torch.inference_mode()
def one_by_one(world, folder: Path, question: dict, steps: int = 8) -> str:
    """Greedy decoding in the plainest way: no padding, no cache, a full forward pass for every token."""
    prompt = encode_prompt(question["text"], world.tokenizer, has_image="image" in question)
    at = prompt.index(IMAGE_TOKEN_INDEX) if "image" in question else 0
    ids = prompt[:at] + [world.model.config.image_token_id] * 4 + prompt[at + 1 :] if "image" in question else prompt
    pixels = {}
    if "image" in question:
        pixels["pixel_values"] = world.preprocessor(load_rgb(folder / question["image"]))[None]
    new: list[int] = []
    for _ in range(steps):
        logits = world.model(input_ids=torch.tensor([ids + new]), use_cache=False, **pixels).logits[0, -1]
        best = int(logits[: world.tokenizer.vocab_size].argmax())
        if best == world.tokenizer.eos_id:
            break
        new.append(best)
    return world.tokenizer.decode(new).strip()


def test_answers_are_those_of_plain_greedy_decoding(world, pictures):
    expected = [one_by_one(world, pictures, question) for question in QUESTIONS]
    assert len(set(expected)) > 5  # the random model does look at question and image
    assert answers(world, pictures) == expected


def test_logits_that_are_not_finite_are_no_answer(world, pictures):
    weight = world.model.lm_head.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(3e38)
        with pytest.raises(UserError, match="logits are NaN or infinite"):
            answers(world, pictures)
        talk = Chat(world)
        with pytest.raises(UserError, match="logits are NaN or infinite"):
            talk.ask("what is this ?")
        assert talk.rounds == []
    finally:
        weight.data.copy_(before)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_batch_size_changes_nothing(world, pictures, batch_size):
    assert answers(world, pictures, batch_size=batch_size) == answers(world, pictures)


def test_a_tie_is_broken_as_by_the_question_alone(world, pictures, monkeypatch):
    alone = []
    answer_alone = Decoder._answer_alone
    monkeypatch.setattr(Decoder, "_answer_alone", lambda self, p, i: alone.append(p.index) or answer_alone(self, p, i))
    assert answers(world, pictures) == [one_by_one(world, pictures, question) for question in QUESTIONS]
    few = len(alone)
    head = world.model.lm_head.weight
    before = head.detach().clone()
    try:
        with torch.no_grad():  # every token but the end now has a twin: the best two are always equal, up to rounding
            end = len(head) // 2 * 2
            head[4:end:2] = head[3 : end - 1 : 2]
        expected = [one_by_one(world, pictures, question) for question in QUESTIONS]
        for batch_size in (1, 4, 15):
            assert answers(world, pictures, batch_size=batch_size) == expected
        assert len(alone) > few + len(QUESTIONS)
    finally:
        with torch.no_grad():
            head.copy_(before)


@pytest.fixture(scope="module")
def half(world):
    """The same model in bfloat16, where most of its choices are near-ties."""
    return dataclasses.replace(world, model=copy.deepcopy(world.model).bfloat16())


def test_near_ties_in_16_bits_are_answered_alone_only_if_asked_for(half, pictures, monkeypatch):
    alone = []
    answer_alone = Decoder._answer_alone
    monkeypatch.setattr(Decoder, "_answer_alone", lambda self, p, i: alone.append(p.index) or answer_alone(self, p, i))
    found = answers(half, pictures, QUESTIONS[:6])
    assert alone == [] and len(set(found)) > 2
    exact = [answers(half, pictures, QUESTIONS[:6], batch_size=size, exact=True) for size in (1, 4)]
    assert exact[0] == exact[1] and alone


def test_out_of_memory_halves_the_batch_and_loses_nothing(world, pictures, monkeypatch, capsys):
    expected = answers(world, pictures)
    answer, select = Decoder.answer, DynamicCache.batch_select_indices
    selected = []

    def scarce(self, batch, images, may_put_off):
        if len(batch) > 6:
            raise torch.OutOfMemoryError
        return answer(self, batch, images, may_put_off)

    def later(self, indices):  # in the middle of some answers
        selected.append(indices)
        if len(selected) == 3:
            raise torch.OutOfMemoryError
        select(self, indices)

    monkeypatch.setattr(Decoder, "answer", scarce)
    monkeypatch.setattr(DynamicCache, "batch_select_indices", later)
    assert answers(world, pictures, batch_size=15) == expected
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "out of memory with 15 questions at a time: going on with 7" and len(told) == 3
    monkeypatch.setattr(Decoder, "answer", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(UserError, match="out of memory with a single question"):
        answers(world, pictures, QUESTIONS[:2])


def test_the_batch_follows_from_the_free_memory(world, pictures, monkeypatch):
    seven = LlavaConfig.from_dict(read_checkpoint_config("llava-hf/llava-1.5-7b-hf"))
    cache, working = bytes_per_question(seven, torch.float16, 800)
    assert cache == 800 * 512 * 1024  # 32 layers, keys and values of 4,096 numbers
    assert 0.1 < working / cache < 0.5
    sizes = [batch_that_fits(seven, torch.float16, 800, int(gib * 2**30)) for gib in (0.1, 8.5, 65)]
    assert sizes[0] == 1 and 10 <= sizes[1] <= 16 and sizes[2] == 64
    widths = []
    update = DynamicCache.update
    monkeypatch.setattr(
        DynamicCache,
        "update",
        lambda self, k, v, *a, **o: widths.append(k.nbytes + v.nbytes) or update(self, k, v, *a, **o),
    )
    answers(world, pictures, QUESTIONS[:1], max_new_tokens=1)
    monkeypatch.undo()
    prompt = encode_prompt(QUESTIONS[0]["text"], world.tokenizer, True)
    twice = prompt.index(IMAGE_TOKEN_INDEX)  # the text before the image is kept for all questions, and copied
    counted = bytes_per_question(world.model.config, torch.float32, len(prompt) - 1 + 4 + twice)[0]
    assert sum(widths) == counted


def test_long_answers_are_put_off_and_finished_together(world, pictures, monkeypatch):
    put_off = []
    answer = Decoder.answer

    def spy(self, batch, images, may_put_off):
        done, rest = answer(self, batch, images, may_put_off)
        put_off.extend(prompt.index for prompt in rest)
        return done, rest

    monkeypatch.setattr(Decoder, "answer", spy)
    monkeypatch.setattr(decode, "_PUT_OFF_AFTER", 1)
    monkeypatch.setattr(decode, "_PUT_OFF_SHARE", 1)
    found = answers(world, pictures, max_new_tokens=12)
    assert len(put_off) > 5
    assert found == [one_by_one(world, pictures, question, 12) for question in QUESTIONS]


def test_each_image_is_seen_once_by_questions_that_share_it(world, pictures, monkeypatch):
    seen = []
    features = world.model.model.get_image_features

    def count(pixel_values, **options):
        seen.append(len(pixel_values))
        return features(pixel_values, **options)

    monkeypatch.setattr(world.model.model, "get_image_features", count)
    monkeypatch.setattr(Decoder, "_answer_alone", None)
    answers(world, pictures, batch_size=15, max_new_tokens=1)
    assert seen == [5]


def test_order_of_questions_does_not_matter(world, pictures):
    assert answers(world, pictures, QUESTIONS[::-1]) == answers(world, pictures)[::-1]


def test_text_only_questions_mix_with_questions_about_images(world, pictures):
    mixed = [*QUESTIONS[:3], {"question_id": "t", "text": "what is red ?"}, *QUESTIONS[3:5]]
    assert answers(world, pictures, mixed) == [one_by_one(world, pictures, question) for question in mixed]
    assert answers(world, pictures, mixed[3:4]) == [one_by_one(world, pictures, mixed[3])]


def test_an_adapter_around_the_model_is_used(world, pictures):
    before = answers(world, pictures)
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(world.model, config)
    try:
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.mul_(20)
        wrapped = dataclasses.replace(world, model=adapted)
        after = answers(wrapped, pictures)
        assert after != before
        assert after == answers(wrapped, pictures, batch_size=1)
    finally:
        adapted.unload()
    assert answers(world, pictures) == before


def test_sampling_defaults_of_a_checkpoint_are_overruled(world, pictures):
    expected = answers(world, pictures)
    saved = world.model.generation_config
    try:
        world.model.generation_config = type(saved)(
            do_sample=True, temperature=3.0, top_p=0.6, repetition_penalty=5.0, no_repeat_ngram_size=1, max_length=4096
        )
        assert answers(world, pictures) == expected
    finally:
        world.model.generation_config = saved


def test_dropout_is_off_and_the_mode_restored(world, pictures):
    world.model.train()
    try:
        answers(world, pictures, QUESTIONS[:1])
        assert world.model.training
    finally:
        world.model.eval()


def test_no_questions_no_answers(world, pictures):
    assert answers(world, pictures, []) == []


def test_a_broken_image_is_a_user_error(world, tmp_path):
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0\.png"):
        answers(world, tmp_path, QUESTIONS[:1])
