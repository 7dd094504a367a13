"""Images: padding, bad files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_sculpt.data.image_check import LARGEST_SIDE, check_images, image_problem, images_fingerprint, open_image
from llava_sculpt.data.images import ImagePreprocessor, load_rgb
from llava_sculpt.errors import UserError
from llava_sculpt.records import file_sha256


def test_the_image_is_padded_with_the_mean_colour_before_it_is_resized(preprocessor: ImagePreprocessor) -> None:
    pixels = preprocessor(Image.new("RGB", (96, 48), (255, 0, 0)))
    assert pixels.shape == (3, 48, 48) and pixels.dtype == torch.float32
    assert pixels[:, :10].abs().max() < 0.02  # the mean colour is zero after normalisation
    assert pixels[0, 24].min() > 1.9


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (48, 48), (47, 48)])
def test_every_size_gives_one_shape(preprocessor: ImagePreprocessor, size: tuple[int, int]) -> None:
    pixels = preprocessor(Image.new("RGB", size, (122, 116, 104)))
    assert pixels.shape == (3, 48, 48)
    assert pixels.abs().max() < 0.02


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp"])
def test_a_whole_image_has_no_problem_and_a_cut_one_has(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    Image.effect_noise((200, 150), 60).convert("RGB").save(path)
    assert image_problem(path) is None
    assert load_rgb(path).mode == "RGB"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert "image" in (image_problem(path) or "")
    with pytest.raises(UserError, match=name):
        load_rgb(path)


def test_a_png_cut_behind_its_last_pixel_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((60, 40), 60).save(path)
    path.write_bytes(path.read_bytes()[:-12])
    assert "cut short" in (image_problem(path) or "")


def test_each_bad_file_is_named_for_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "good.png")
    names = ["zero.png", "text.png", "folder.png", "missing.png", "nul\0.png", "good.png", "good.png"]
    problems, hashes = check_images([tmp_path / name for name in names])
    assert hashes == {tmp_path / "good.png": file_sha256(tmp_path / "good.png")}
    assert {path.name for path in problems} == set(names[:5])
    assert "0 bytes" in problems[tmp_path / "zero.png"]
    assert "not an image" in problems[tmp_path / "text.png"]
    assert "missing" in problems[tmp_path / "missing.png"]
    assert "folder" in problems[tmp_path / "folder.png"]


def test_only_the_formats_of_data_sets_are_opened_whatever_the_name(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert "not an image" in (image_problem(path) or "")
    Image.new("RGB", (3, 3)).save(path, "PPM")
    with pytest.raises(UserError, match="not an image"):
        load_rgb(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert image_problem(tmp_path / "a.png") == "a pipe or device, not a file"


def test_an_image_that_would_be_padded_to_more_than_pillow_opens_is_refused(tmp_path: Path) -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert LARGEST_SIDE**2 <= 2 * Image.MAX_IMAGE_PIXELS < (LARGEST_SIDE + 1) ** 2
    Image.new("1", (1, LARGEST_SIDE)).save(tmp_path / "a.png")
    open_image(tmp_path / "a.png").close()
    Image.new("1", (1, LARGEST_SIDE + 1)).save(tmp_path / "a.png")
    assert "too large to be padded" in (image_problem(tmp_path / "a.png") or "")


def test_the_fingerprint_of_images_depends_on_names_and_contents_alone() -> None:
    known = images_fingerprint({"a.png": "1", "b.png": "2"})
    assert known == images_fingerprint({"b.png": "2", "a.png": "1"})
    assert len({known, *(images_fingerprint(x) for x in ({"a.png": "2", "b.png": "1"}, {"a.png": "1"}, {}))}) == 4


def test_missing_or_broken_settings_are_told_with_their_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"preprocessor_config\.json: not found"):
        ImagePreprocessor.from_dir(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"preprocessor_config\.json: not the settings"):
        ImagePreprocessor.from_dir(tmp_path)
