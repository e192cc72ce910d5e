"""Text and images in one program: three quick types, whose images enter the stream in three ways."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import spinpass
from benchmarks.zoo import vision, vision_inputs
from benchmarks.zoo.export import export
from benchmarks.zoo.vision_inputs import IMAGE_TOKEN
from benchmarks.zoo.vision_overrides import NOT_EXPORTABLE

# llava writes rows at placeholders, git puts the image before the text, mllama attends to it.
QUICK = ("llava", "git", "mllama")


@pytest.fixture(scope="module", params=QUICK)
def built(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    return vision.build(request.param)


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(**copy.deepcopy(inputs)).logits
    return made


def test_the_logits_depend_on_the_image(built: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = built
    other = inputs | {
        "pixel_values": inputs["pixel_values"] + vision_inputs.noise(*inputs["pixel_values"].shape, seed=9)
    }
    assert (logits(model, inputs) - logits(model, other)).abs().max() > 0.05


def test_the_program_is_the_model_and_its_rotation_is_the_program(built: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = built
    program = export(model, inputs, ways=("static",)).program
    torch.testing.assert_close(program.module()(**copy.deepcopy(inputs)).logits, logits(model, inputs))
    rotated = spinpass.transform(program, spinpass.RotationConfig(verify=False))
    certificate = spinpass.verify(program, rotated, ((), inputs))
    certificate.raise_if_failed()


def test_towers_are_narrower_than_the_text() -> None:
    model, _ = vision.build("llava")
    assert model.config.vision_config.hidden_size == vision.TOWER_HIDDEN < model.config.text_config.hidden_size


def test_every_feature_has_a_placeholder() -> None:
    model, inputs = vision.build("llava")
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert int((inputs["input_ids"] == IMAGE_TOKEN).sum()) == sum(len(f) for f in features)


SINCE = {"apertus1p5", "hy_v4_vl", "inkling2_loop"}  # in transformers 5.24; the zoo is swept with the pinned one


def test_every_type_with_images_is_a_type_of_transformers() -> None:
    known = set(vision.image_text_types())
    assert {*vision_inputs.IMAGES, *vision_inputs.WHOLE} <= known
    assert set(NOT_EXPORTABLE) <= known
    assert known - SINCE == {*vision_inputs.IMAGES, *vision_inputs.WHOLE} | set(NOT_EXPORTABLE)


def test_a_type_without_images_is_not_built() -> None:
    with pytest.raises(KeyError, match="evolla"):
        vision.build("evolla")
