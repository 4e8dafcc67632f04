"""Feature networks: against peers with the same weights, real weights on a real picture, and wrong files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection
from transformers import CLIPVisionConfig as TheirVision

from sfumato.evaluate.features import PACKAGES, Clip, facts_of, features_of, open_features
from sfumato.evaluate.resizing import resized
from sfumato.evaluate.statistics import Facts
from sfumato.models.clip import CLIP, CLIPTextConfig, CLIPVisionConfig
from sfumato.models.clip import CLIPConfig as OwnConfig
from sfumato.models.inception import CLASSES, Inception
from sfumato.models.mobilenet import EfficientNetLite0, MobileNetV2
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.weights.files import save_safetensors


def random_network(network, seed=0):
    """Random weights that keep the size of what passes, and means and deviations that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else None
            if noise is None:
                continue
            if tensor.ndim >= 2:
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
            elif name.endswith("running_var"):
                tensor.copy_(1 + 0.3 * noise.abs())
            else:
                tensor.copy_(0.1 * noise + (1 if name.endswith(("bn.weight", ".1.weight")) else 0))
    return network.eval()


def noise(count=2, side=40):
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(random_network(Inception()).state_dict(), path)
    return path


def test_inception_from_its_file(inception_file):
    features = open_features(f"inception:{inception_file}")
    found = features_of(features, noise(3), batch_size=2)
    assert found.shape == (3, features.dim) == (3, 2048) and found.std() > 0
    assert torch.allclose(found[2:], features_of(features, noise(3)[2:]), rtol=1e-4, atol=1e-6)  # each by itself
    assert features.to_logits(found).shape == (3, CLASSES)
    assert facts_of(features, "clean") == Facts("inception", features.hash, "clean", 299) and len(features.hash) == 16


def test_the_mean_leaves_the_padding_out(inception_file):
    """A map of ones stays ones, at the corners too."""
    from sfumato.models.inception import mean_pool

    assert torch.equal(mean_pool(torch.ones(1, 2, 5, 5)), torch.ones(1, 2, 5, 5))


@pytest.mark.parametrize("kind", ["truncated", "other", "missing", "shape", "script"])
def test_wrong_weights_are_one_line(tmp_path, kind):
    path = tmp_path / "weights.pth"
    state = Inception().state_dict()
    if kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    else:
        if kind == "other":
            state = MobileNetV2().state_dict()
        elif kind == "missing":
            del state["Mixed_7c.branch_pool.conv.weight"]
        else:
            state["fc.weight"] = torch.zeros(1000, 2048)
        torch.save(state, path)
    with pytest.raises(ValueError, match=r"weights\.pth") as caught:
        open_features(f"inception:{path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("vgg", "features='vgg': one of inception, clip"),
        ("inception", "features='inception': name its weights"),
        ("inception:/none/such.pth", "such.pth"),
    ],
)
def test_unknown_features_are_one_line(text, wanted):
    with pytest.raises(ValueError, match=wanted):
        open_features(text)


def test_pictures_of_a_wrong_range_are_refused(inception_file):
    features = open_features(f"inception:{inception_file}")
    with pytest.raises(ValueError, match=r"images=\(1, 3, 10, 10\): inception takes \(B, 3, 299, 299\)"):
        features(torch.zeros(1, 3, 10, 10))
    with pytest.raises(ValueError, match=r"\[0, 1\] is needed"):
        features(torch.full((1, 3, 299, 299), 255.0))


# --- the small ImageNet networks, with their real weights


def portrait():
    """A photograph of an officer in uniform, which matplotlib brings with it."""
    import matplotlib

    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as picture:
        return np.asarray(picture.convert("RGB"))[:512]


@pytest.mark.parametrize("name", PACKAGES)
def test_real_weights_know_a_uniform(name):
    """ImageNet's class 652, "military uniform": wrong padding, order or normalisation would not find it."""
    if importlib.util.find_spec(PACKAGES[name][0]) is None:
        pytest.skip(f"{PACKAGES[name][0]} is not installed")
    features = open_features(name)
    found = features_of(features, [portrait()])
    assert found.shape == (1, 1280)
    assert features.to_logits(found).argmax().item() == 652


def test_mobilenet_takes_transformers_weights():
    """Same random weights in another program's network: layer by layer in order, its padding set to PyTorch's."""
    from transformers import MobileNetV2Config, MobileNetV2Model

    config = MobileNetV2Config(tf_padding=False, finegrained_output=True, layer_norm_eps=1e-5)
    theirs = MobileNetV2Model(config).eval()
    ours = random_network(MobileNetV2())
    values = [value for name, value in ours.state_dict().items() if name.startswith("features.")]
    peer = theirs.state_dict()
    assert [value.shape for value in values] == [value.shape for value in peer.values()]
    theirs.load_state_dict(dict(zip(peer, values, strict=True)))
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted, found = theirs(x).pooler_output, ours(x)
    assert wanted.std() > 0.01 and (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_efficientnet_pads_as_tensorflow():
    from sfumato.models.mobilenet import pad_same

    x = torch.ones(1, 1, 7, 8)
    assert pad_same(x, 3, 2).shape == (1, 1, 9, 9)  # 7: one each side; 8: only right
    assert pad_same(x, 3, 2)[0, 0, 1].tolist() == [1.0] * 8 + [0.0]
    assert pad_same(x, 5, 1).shape == (1, 1, 11, 12)
    assert EfficientNetLite0()(torch.zeros(1, 3, 224, 224)).shape == (1, 1280)


# --- CLIP

LAYERS = {"num_hidden_layers": 2}
TEXT = LAYERS | {"vocab_size": 49408, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1,
                 "eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407}  # fmt: skip
VISION = LAYERS | {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "image_size": 32,
                   "patch_size": 8}  # fmt: skip


@pytest.mark.parametrize("name, act", [("clip", "quick_gelu"), ("openclip", "gelu")])
def test_clip_is_transformers(tmp_path, name, act):
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=TEXT | {"hidden_act": act}, vision_config=VISION | {"hidden_act": act}, projection_dim=48
    )
    theirs = CLIPModel(config).eval()
    path = tmp_path / "clip.safetensors"
    save_safetensors(path, theirs.state_dict(), {})
    features = open_features(f"{name}:{path}")
    assert isinstance(features, Clip) and (features.size, features.dim) == (32, 48)
    pictures = noise(2, 32)
    prepare = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images = prepare([Image.fromarray(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
    captions = ["a red apple", "two boats, at sea"]
    ids = [ClipTokenizer().pad(ClipTokenizer().encode(caption)) for caption in captions]
    with torch.inference_mode():
        wanted = theirs.visual_projection(theirs.vision_model(images).pooler_output)
        texts = theirs.text_projection(theirs.text_model(torch.tensor(ids)).pooler_output)
    assert torch.allclose(features_of(features, pictures), wanted, atol=1e-4 * float(wanted.abs().max()))
    assert torch.allclose(features.texts(captions), texts, atol=1e-4 * float(texts.abs().max()))


def test_an_image_tower_alone_has_no_texts(tmp_path):
    path = tmp_path / "vision.safetensors"
    tower = CLIPVisionModelWithProjection(TheirVision(**VISION, projection_dim=24))
    save_safetensors(path, tower.state_dict(), {})
    features = open_features(f"clip:{path}")
    assert features_of(features, noise()).shape == (2, 24)
    with pytest.raises(ValueError, match="no text tower"):
        features.texts(["a cat"])


def test_our_own_clip_from_a_training_state(tmp_path):
    """Small vocabularies are sfumato's own: four heads, pictures in [-1, 1], and the averaged weights of a run."""
    torch.manual_seed(0)
    own = CLIP(OwnConfig(CLIPTextConfig(1024, 32, 2, 4), CLIPVisionConfig(16, 8, 32, 2, 4), embed_dim=24)).eval()
    state = {f"ema.{name}": tensor for name, tensor in own.state_dict().items()}
    save_safetensors(tmp_path / "state.safetensors", state | {"model.other": torch.zeros(2)}, {"step": "3"})
    features = open_features(f"clip:{tmp_path / 'state.safetensors'}")
    images = resized(noise(2, 16), 16)
    ids = ClipTokenizer(1024).pad(ClipTokenizer(1024).encode("a cat"))
    with torch.inference_mode():
        wanted, text = own.image_features(2 * images - 1), own.text_features(torch.tensor([ids]))
    assert torch.allclose(torch.nn.functional.normalize(features(images)), wanted, atol=1e-5)
    assert torch.allclose(torch.nn.functional.normalize(features.texts(["a cat"])), text, atol=1e-5)


def test_a_file_that_is_no_clip_is_one_line(tmp_path, inception_file):
    with pytest.raises(ValueError, match="no tensor vision_model.*CLIPModel") as caught:
        open_features(f"clip:{inception_file}")
    assert "\n" not in str(caught.value)
