"""Packed pretraining rows are, to the model, the single-turn samples that training and evaluation use."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from llava_sculpt.data.collator import TrainCollator
from llava_sculpt.data.conversation import IGNORE_INDEX, encode_record
from llava_sculpt.data.images import ImagePreprocessor
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.tasks.questions import SHORT_ANSWER
from llava_sculpt.tiny.pretraining.language import answer_logits, exact_match
from llava_sculpt.tiny.pretraining.packing import Packer
from llava_sculpt.tiny.pretraining.pretrain import MEAN, STD, new_model, write_preprocessor
from llava_sculpt.tiny.pretraining.tower import normalise, patch_features, pictures_and_tags
from llava_sculpt.tiny.pretraining.vocabulary import write_tokenizer
from llava_sculpt.tiny.scenes import encoded
from llava_sculpt.tiny.sources import SOURCES


@torch.no_grad()
def test_packed_logits_are_those_of_single_samples(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    write_preprocessor(tmp_path)
    tokenizer = LlavaTokenizer.from_dir(tmp_path)
    preprocess = ImagePreprocessor.from_dir(tmp_path)
    torch.manual_seed(0)
    model = new_model().eval()
    rng = Random(0)
    samples = [make(rng) for make in SOURCES.values()]
    rows = [questions[:3] for _, questions in samples]
    pixels = normalise(pictures_and_tags([scene for scene, _ in samples])[0], MEAN, STD)
    batch = Packer(tokenizer, 36).pack(rows)
    packed, _, at = answer_logits(model, patch_features(model.model.vision_tower, pixels), batch)

    collate = TrainCollator(tokenizer.vocab_size + 1, tokenizer.vocab_size, 36, 48, 512)
    for i, (scene, _) in enumerate(samples):
        picture = preprocess(Image.open(io.BytesIO(encoded(scene))))
        assert torch.equal(picture, pixels[i])
        for n, question in enumerate(rows[i], 1):
            turns = [("human", f"<image>\n{question.text}{SHORT_ANSWER}"), ("gpt", question.answer)]
            record = {"image": "-", "conversations": [{"from": who, "value": text} for who, text in turns]}
            ids, labels = (torch.tensor(values) for values in encode_record(record, tokenizer))
            inputs = collate([{"input_ids": ids, "labels": labels, "pixel_values": picture}])
            single = model(**inputs).logits[0]  # where there is a label
            mine = [k for k, (row, column) in enumerate(at.tolist()) if row == i and batch.number[row, column] == n]
            assert torch.allclose(packed[mine], single, atol=1e-5)


def test_exact_match_counts_whole_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    packer = Packer(LlavaTokenizer.from_dir(tmp_path), 36)
    questions = [SOURCES["ocrvqa"](Random(1))[1]]
    model = new_model()

    def all_right_but_the_title(*args: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = packer.pack(questions)
        at = (batch.labels != IGNORE_INDEX).nonzero()
        gold = batch.labels[at[:, 0], at[:, 1]]
        logits = torch.nn.functional.one_hot(gold, 1000).float()
        logits[0] = -logits[0]  # the first token of the first answer
        return logits, gold, at

    monkeypatch.setattr("llava_sculpt.tiny.pretraining.language.answer_logits", all_right_but_the_title)
    scores = exact_match(model, packer, torch.zeros(1, 36, 128), questions)
    assert scores["all"] == 75.0
    assert scores["title"] == 0.0
    assert scores["author"] == 100.0
