"""The three objectives: each term against a plain computation, options that do what they say, and bad input."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from recipes.smoke.train import Smoke, must_fall
from recipes.smoke.train import run as smoke
from sfumato.diffusion.denoiser import PREDICTIONS, Denoiser
from sfumato.diffusion.schedule import NoiseSchedule, ScheduleConfig
from sfumato.images import grid
from sfumato.models.autoencoder import Autoencoder
from sfumato.models.clip import CLIP, CLIPConfig, CLIPVisionConfig
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.models.unet import UNet
from sfumato.pipeline import Pipeline
from sfumato.train.alignment import Alignment, projector, teacher_of
from sfumato.train.autoencoder import (
    AutoencoderLoss,
    AutoencoderObjective,
    initialise,
    random_crops,
    shrunk_and_turned,
)
from sfumato.train.clip import MAX_LOGIT_SCALE, CLIPObjective, HardBatches, caption_numbers, contrastive
from sfumato.train.critic import CriticConfig, PatchCritic, adaptive_weight, critic_hinge
from sfumato.train.data import CaptionedBatch, LatentBatch
from sfumato.train.diffusion import DiffusionConfig, DiffusionObjective, draw_timesteps
from sfumato.train.loop import LoopConfig, fit
from sfumato.train.perceptual import LayerFeatures, Perceptual, clip_tower, load_lpips, lpips, unit
from sfumato.train.samples import Samples, Watched, live_model
from sfumato.train.stages import SD_V1, Stage, check_stages, run_stages, starting_weights
from sfumato.weights.checkpoint import build, save_checkpoint
from sfumato.weights.files import save_safetensors

from .conftest import TINY, randomise

VISION = CLIPVisionConfig(image_size=16, patch_size=4, width=16, num_layers=2, num_heads=2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 4, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Squares of one colour on another."""
    g = seeded(seed)
    images = torch.rand(count, 3, 1, 1, generator=g).expand(count, 3, size, size) * 2 - 1
    images = images.clone()
    images[:, :, size // 4 : size // 2, size // 4 : -size // 4] = torch.rand(count, 3, 1, 1, generator=g) * 2 - 1
    return images


def batch(count: int = 4, size: int = 16) -> CaptionedBatch:
    return CaptionedBatch(pictures(count, size), [f"picture {index}" for index in range(count)])


def autoencoder() -> Autoencoder:
    return randomise(initialise(Autoencoder(TINY.autoencoder), seed=0))


def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(CLIPConfig(TINY.texts[0].config, VISION, 8))


def gradient(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


# The perceptual term.

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


@pytest.fixture(scope="module")
def vgg():
    """Random weights under torchvision's names for VGG16, the classifier's too, and heads under LPIPS's."""
    g, state, channels, index = seeded(), {}, 3, 0
    for block in WIDTHS:
        for width in block:
            scale = (2 / (9 * channels)) ** 0.5
            state[f"features.{index}.weight"] = scale * torch.randn(width, channels, 3, 3, generator=g)
            state[f"features.{index}.bias"] = 0.1 * torch.randn(width, generator=g)
            channels, index = width, index + 2
        index += 1
    state["classifier.0.bias"] = torch.zeros(3)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, b[0], 1, 1, generator=g) for i, b in enumerate(WIDTHS)}
    return state, heads


def plain_lpips(state, heads, one, two):
    """Zhang et al. 2018, equation 1, written out."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    layers = []
    for x in (one, two):
        x, index, seen = (x - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1), 0, []
        for number, block in enumerate(WIDTHS):
            if number:
                x, index = F.max_pool2d(x, 2), index + 1
            for _ in block:
                x = F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1).relu()
                index += 2
            seen.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        layers.append(seen)
    total = torch.zeros(len(one))
    for number, (a, b) in enumerate(zip(*layers, strict=True)):
        total += (heads[f"lin{number}.model.1.weight"] * (a - b) ** 2).sum(dim=1).mean(dim=(1, 2))
    return total


def test_lpips_is_the_published_distance(vgg, tmp_path):
    state, heads = vgg
    one, two = pictures(2, 32), pictures(2, 32, seed=1)
    expected = plain_lpips(state, heads, one, two)
    assert expected.min() > 0.1
    torch.testing.assert_close(lpips(state, heads)(one, two), expected, rtol=1e-4, atol=1e-6)
    slices = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
    whole = {f"net.slice{slices[int(n.split('.')[1])]}.{n[9:]}": t for n, t in state.items() if n[0] == "f"} | heads
    torch.testing.assert_close(lpips(whole)(one, two), expected, rtol=1e-4, atol=1e-6)
    torch.save(heads, tmp_path / "vgg.pth")
    save_safetensors(tmp_path / "vgg16.safetensors", state, {})
    read = load_lpips(tmp_path / "vgg16.safetensors", tmp_path / "vgg.pth")
    torch.testing.assert_close(read(one, two), expected, rtol=1e-4, atol=1e-6)


def test_lpips_names_the_tensor_that_is_not_there(vgg):
    state, heads = vgg
    without = {name: tensor for name, tensor in state.items() if name != "features.14.bias"}
    with pytest.raises(ValueError, match=r"features\.14\.bias is missing"):
        lpips(without, heads)
    with pytest.raises(ValueError, match=r"lin2\.model\.1\.weight has shape \(1, 9, 1, 1\), not \(1, 256, 1, 1\)"):
        lpips(state, heads | {"lin2.model.1.weight": torch.zeros(1, 9, 1, 1)})


def test_any_frozen_network_gives_features():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 6, 3, stride=2))
    features = LayerFeatures(network, ["1", "2"], mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    images = pictures(2)
    x = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    first, second = features(images)
    assert torch.equal(first, network[:2](x)) and torch.equal(second, network(x))
    distance = Perceptual(features)
    other = pictures(2, seed=3).requires_grad_()
    angle = [
        1 - F.cosine_similarity(a, b, dim=1).mean(dim=(1, 2))
        for a, b in zip(features(other), features(images), strict=True)
    ]
    torch.testing.assert_close(distance(other, images), 2 * sum(angle), rtol=1e-4, atol=1e-5)
    assert distance(images, images).abs().max() == 0
    distance(other, images).sum().backward()
    assert other.grad.abs().sum() > 0 and all(p.grad is None for p in network.parameters())
    assert not distance.train().features.training
    with pytest.raises(ValueError, match="'7' is none"):
        LayerFeatures(network, ["1", "7"])
    with pytest.raises(ValueError, match="heads: 1 for 2 layers"):
        Perceptual(features, [torch.ones(4)])(images, images)


def test_dead_places_do_not_spoil_the_gradient():
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    unit(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_features_of_our_own_image_tower_are_its_patches():
    network = clip()
    images = pictures(2, 32)
    first, last = clip_tower(network)(images)
    small = F.interpolate(images, size=(16, 16), mode="bilinear", antialias=True)
    tower = network.vision_model
    x = tower.pre_layrnorm(tower.embeddings(small))
    for layer, found in zip(tower.encoder.layers, (first, last), strict=True):
        x = layer(x, False)
        assert found.shape == (2, 16, 4, 4)
        torch.testing.assert_close(found[:, :, 1, 2], x[:, 1 + 1 * 4 + 2])
    with pytest.raises(ValueError, match="layers=2: the image tower has 0 to 1"):
        clip_tower(network, [0, 2])


# The critic.


@pytest.mark.parametrize(("num_layers", "span"), [(2, 34), (3, 70)])
def test_a_patch_is_as_large_as_the_paper_says(num_layers, span):
    critic = PatchCritic(CriticConfig(channels=4, num_layers=num_layers, norm_groups=0)).initialise(0)
    images = torch.randn(1, 3, 128, 128, generator=seeded()).requires_grad_()
    answer = critic(images)
    answer[0, 0, answer.shape[2] // 2, answer.shape[3] // 2].backward()
    seen = images.grad.abs().sum(dim=(0, 1)) > 0
    assert seen.any(dim=0).sum() == seen.any(dim=1).sum() == span


@pytest.mark.parametrize("norm_groups", [0, 4])
def test_a_picture_is_judged_by_itself(norm_groups):
    critic = PatchCritic(CriticConfig(channels=8, num_layers=2, norm_groups=norm_groups)).initialise(0)
    images = pictures(3, 32)
    together = critic(images)
    torch.testing.assert_close(together[1:2], critic(images[1:2]), rtol=1e-4, atol=1e-6)
    assert together.std() > 0


def test_hinge_asks_for_a_margin_of_one():
    real, fake = torch.tensor([2.0, 1.0, 0.5, -1.0]), torch.tensor([-2.0, -1.0, 0.0, 0.5])
    assert critic_hinge(real, fake).item() == pytest.approx(0.5 * (2.5 / 4 + 2.5 / 4))


def test_adaptive_weight_is_the_ratio_of_gradients():
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    ours, theirs = (last * torch.tensor([3.0, 4.0])).sum(), (last * torch.tensor([0.0, 0.5])).sum()
    assert adaptive_weight(ours, theirs, last).item() == pytest.approx(5 / (0.5 + 1e-4))
    assert adaptive_weight(1e9 * ours, theirs, last).item() == 1e4
    assert last.grad is None


# The autoencoder.


def test_the_autoencoder_loss_is_the_sum_of_its_terms():
    network, critic = autoencoder(), PatchCritic(CriticConfig(channels=8, num_layers=2, norm_groups=4)).initialise(1)
    config = AutoencoderLoss(0.01, 0.3, 0.7, critic_weight=0.4, critic_start=5, logvar=0.2)
    objective = AutoencoderObjective(network, config, Perceptual(clip_tower(clip())), critic)
    data = batch(3, 32)
    objective.begin_step(5)
    total, figures = objective.loss(data, seeded(1))
    posterior = network.encode(data.pixels)
    output = network.decode(posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=seeded(1)))
    error = output - data.pixels
    edge = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    seen = objective.perceptual(output, data.pixels).mean()
    reconstruction = (error.abs().mean() + 0.3 * edge + 0.7 * seen) / math.exp(0.2)
    kl = 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).mean()
    against = -critic(output).mean()
    last = network.decoder.conv_out.weight
    sizes = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (reconstruction, against)]
    expected = reconstruction + 0.2 + 0.01 * kl + 0.4 * (sizes[0] / (sizes[1] + 1e-4)) * against
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    assert set(figures) == {"l1", "edge", "psnr", "perceptual", "adversarial", "adaptive_weight", "kl"}
    assert figures["adaptive_weight"] > 0 and not figures["adaptive_weight"].requires_grad


def test_the_critic_begins_when_it_is_told_to():
    critic = PatchCritic(CriticConfig(channels=8, num_layers=2, norm_groups=4)).initialise(0)
    network, data = autoencoder(), batch(2, 32)
    objective = AutoencoderObjective(network, AutoencoderLoss(critic_start=3), critic=critic)
    plain, _ = AutoencoderObjective(network, AutoencoderLoss()).loss(data, seeded())
    objective.begin_step(2)
    before, figures = objective.loss(data, seeded())
    assert torch.equal(before, plain) and "adversarial" not in figures
    early, _ = objective.critic_loss(data, seeded())
    early.backward()
    assert early.item() == 0 and all(not p.grad.any() for p in critic.parameters())
    critic.zero_grad()
    objective.begin_step(3)
    objective.loss(data, seeded())[0].backward()
    assert all(p.grad is None or not p.grad.any() for p in critic.parameters()), "the network's step moves the critic"
    network.zero_grad()
    loss, figures = objective.critic_loss(data, seeded())
    loss.backward()
    assert all(p.grad is not None for p in critic.parameters()) and gradient(critic)["main.0.weight"].any()
    assert not gradient(network), "the critic's step moves the network"
    with pytest.raises(ValueError, match="a call of loss before"):
        objective.critic_loss(data, seeded())


def test_a_critic_tells_what_was_made_from_what_is_real():
    """Against a network that does not move its margin grows."""
    critic = PatchCritic(CriticConfig(channels=8, num_layers=2, norm_groups=4)).initialise(0)
    objective = AutoencoderObjective(autoencoder(), AutoencoderLoss(critic_start=0), critic=critic)
    optimizer, losses = torch.optim.Adam(critic.parameters(), 2e-3), []
    for step in range(15):
        objective.begin_step(step)
        objective.loss(batch(4, 32), seeded(step))
        loss, figures = objective.critic_loss(batch(4, 32), seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and figures["critic_real"] > figures["critic_fake"] + 1


def test_latents_are_shrunk_and_turned_with_their_pictures():
    """A picture whose every cell is flat stays so: what becomes of a cell in the latents, becomes of its pixels."""
    latents = torch.rand(2, 3, 6, 6, generator=seeded())
    images = latents.repeat_interleave(4, 2).repeat_interleave(4, 3)
    sizes = set()
    for seed in range(40):
        small, target = shrunk_and_turned(latents, images, seeded(seed))
        assert target.shape[-1] == 4 * small.shape[-1] and small.shape[-2] == small.shape[-1]
        sizes.add(small.shape[-1])
        means = torch.nn.functional.avg_pool2d(target, 4)
        assert (means - small).abs().max() < 0.12, "the same places, up to what shrinking twice smooths otherwise"
        if small.shape[-1] == 6:
            assert any(torch.equal(small, torch.rot90(latents, turns, (2, 3))) for turns in range(4))
            assert torch.equal(means, small) or torch.allclose(means, small)
    assert sizes == {3, 4, 5, 6}
    with pytest.raises(ValueError, match="equivariance=1.5: 0 to 1 is allowed"):
        AutoencoderLoss(equivariance=1.5)
    objective = AutoencoderObjective(autoencoder(), AutoencoderLoss(equivariance=1.0))
    loss, _ = objective.loss(batch(2, 16), seeded())
    loss.backward()
    assert loss.isfinite() and objective.network.encoder.conv_in.weight.grad is not None


def test_crops_are_places_of_the_picture():
    images = torch.arange(4 * 3 * 12 * 16.0).reshape(4, 3, 12, 16)
    crops = random_crops(images, 8, seeded())
    corners = [(int(one[0, 0, 0]) - 3 * 192 * index) for index, one in enumerate(crops)]
    for index, (crop, corner) in enumerate(zip(crops, corners, strict=True)):
        top, left = divmod(corner, 16)
        assert torch.equal(crop, images[index, :, top : top + 8, left : left + 8])
    assert len(set(corners)) > 1
    assert torch.equal(
        random_crops(images, 12, seeded(3))[0, :, :, 0],
        images[0, :, :, int(random_crops(images, 12, seeded(3))[0, 0, 0, 0])],
    )
    with pytest.raises(ValueError, match="crop=13: pictures are 16 x 12 px"):
        random_crops(images, 13, seeded())
    objective = AutoencoderObjective(autoencoder(), AutoencoderLoss(crop=8))
    seen: list[torch.Size] = []
    objective.network.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    objective.loss(batch(2, 16), seeded())
    assert seen == [(2, 3, 8, 8)]
    with pytest.raises(ValueError, match="crop=7: a multiple of the autoencoder's factor 2"):
        AutoencoderObjective(autoencoder(), AutoencoderLoss(crop=7))
    with pytest.raises(ValueError, match="kl_weight=-1"):
        AutoencoderLoss(kl_weight=-1)


def test_the_decoder_alone_can_be_trained():
    network = autoencoder()
    objective = AutoencoderObjective(network, AutoencoderLoss(decoder_only=True))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer, losses = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 1e-3), []
    for _ in range(10):
        loss, _figures = objective.loss(batch(), seeded())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    changed = {name.split(".")[0] for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"decoder", "post_quant_conv"} and losses[-1] < losses[0]


# CLIP.


def objective_of(network: CLIP, **options) -> CLIPObjective:
    return CLIPObjective(network, ClipTokenizer(TINY.texts[0].config.vocab_size), **options)


def test_the_contrastive_loss_is_that_of_the_paper():
    logits = torch.randn(5, 5, generator=seeded())
    truth = torch.arange(5)
    expected = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
    torch.testing.assert_close(contrastive(logits, torch.eye(5, dtype=torch.bool)), expected)


def test_equal_captions_are_no_mistake():
    same = caption_numbers(["a", "b", "a"]) == caption_numbers(["a", "b", "a"]).T
    assert same.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    sure = 100.0 * same.float()  # as sure of one as of the other
    assert contrastive(sure, same).item() == pytest.approx(2 / 3 * math.log(2), abs=1e-4)
    data = CaptionedBatch(pictures(1).expand(3, -1, -1, -1), ["one thing"] * 3)
    assert objective_of(clip()).loss(data, seeded())[1]["found"] == 1


def test_two_ranks_see_the_whole_batch():
    """What each of two ranks sends back, added up, is the gradient of one rank with both halves."""
    data, network = batch(4), clip()
    whole, figures = objective_of(network).loss(data, seeded())
    whole.backward()
    expected = gradient(network)
    halves = [CaptionedBatch(data.pixels[part], data.captions[part]) for part in (slice(0, 2), slice(2, 4))]
    network.zero_grad()
    rows: list[list[torch.Tensor]] = []  # what every rank brings, in the order it is asked for
    for half in halves:
        rows.append([])
        with torch.no_grad():
            objective_of(network, gather=lambda own: rows[-1].append(own) or own).loss(half, seeded())
    for rank, half in enumerate(halves):
        asked = iter(range(3))

        def gather(own, rank=rank, asked=asked):
            number = next(asked)
            return torch.cat([own if other == rank else rows[other][number] for other in range(2)])

        loss, seen = objective_of(network, gather=gather).loss(half, seeded())
        torch.testing.assert_close(loss, whole)
        assert seen["found"] == figures["found"]
        loss.backward()
    expected["logit_scale"] *= 2  # both ranks have all of it
    for name, found in gradient(network).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_temperature_stays_in_bounds_and_comes_back():
    network = clip()
    objective = objective_of(network)
    for far, bound in ((9.0, MAX_LOGIT_SCALE), (-3.0, 0.0)):
        with torch.no_grad():
            network.logit_scale.fill_(far)
        network.zero_grad()
        loss, figures = objective.loss(batch(), seeded())
        loss.backward()
        assert figures["scale"].item() == pytest.approx(math.exp(bound), rel=1e-5)
        assert network.logit_scale.item() == pytest.approx(bound) and network.logit_scale.grad.abs() > 0


def test_hard_batches_share_a_group():
    class Numbers:
        def __len__(self):
            return 24

        def batch(self, indices):
            return list(indices)

    groups = [index % 3 for index in range(23)] + ["alone"]
    hard = HardBatches(Numbers(), groups, lot=4)
    chosen = hard.batch(range(16))
    assert len(hard) == 24 and chosen == hard.batch(range(16)) and chosen != hard.batch([0, *range(2, 17)])
    for start in range(0, 16, 4):
        lot = chosen[start : start + 4]
        assert lot[0] == start and len(set(lot)) == 4 and len({groups[index] for index in lot}) == 1
    assert hard.batch([23, 1, 2, 3]) == [23, 1, 2, 3]  # a group too small is left as it is
    plain = Counter(index for step in range(60) for index in hard.batch([step % 23, 0, 1, 2]))
    assert len(plain) == 23, "every example has its turn"
    with pytest.raises(ValueError, match="groups: 2 keys for 24 examples"):
        HardBatches(Numbers(), [1, 2], 4)
    with pytest.raises(ValueError, match="lot=1"):
        HardBatches(Numbers(), groups, 1)


# Diffusion.


def words(captions):
    return torch.stack([torch.randn(3, 16, generator=seeded(len(caption))) for caption in captions])


def diffusion(config=None, prediction="v", alignment=None, schedule=TINY.schedule, network=None):
    torch.manual_seed(0)
    unet = randomise(UNet(TINY.unet)) if network is None else network["unet"]
    denoiser = Denoiser(lambda x, t, c: unet(x, t, c), NoiseSchedule(schedule), prediction)
    return DiffusionObjective(
        network or nn.ModuleDict({"unet": unet}), denoiser, words, 0.7, config or DiffusionConfig(), alignment
    )


def latents(count: int = 8) -> LatentBatch:
    mean = torch.randn(count, 4, 8, 8, generator=seeded(5))
    return LatentBatch(mean, torch.full_like(mean, 0.1), ["red", "a blue one"] * (count // 2))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_is_learned(prediction):
    mean = torch.tensor([1.0, -1.0] * 4).view(8, 1, 1, 1).expand(8, 4, 8, 8)
    two_kinds = LatentBatch(mean, torch.full_like(mean, 0.1), ["red", "a blue one"] * 4)
    objective = diffusion(DiffusionConfig(min_snr_gamma=5.0), prediction)

    def mean_loss():
        with torch.no_grad():
            return sum(objective.loss(two_kinds, seeded(seed))[0].item() for seed in range(1000, 1016)) / 16

    optimizer, before = torch.optim.Adam(objective.network.parameters(), 5e-3), mean_loss()
    for step in range(50):
        loss, _ = objective.loss(two_kinds, seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mean_loss() < 0.6 * before, (prediction, before, mean_loss())


def test_a_loss_is_what_its_generator_says():
    config = DiffusionConfig(0.5, 5.0, offset_noise=0.1, input_perturbation=0.1, timesteps="logit-normal")
    objective = diffusion(config)
    first, second, other = (objective.loss(latents(), seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    state = torch.random.get_rng_state()
    objective.loss(latents(), seeded(1))
    assert torch.equal(state, torch.random.get_rng_state())


def test_states_kept_with_a_batch_are_taken_and_dropped_as_captions_are():
    given, kept = latents(), replace(latents(), context=words(latents().captions))
    for drop in (0.0, 0.5, 1.0):
        objective = diffusion(DiffusionConfig(drop))
        assert torch.equal(objective.loss(kept, seeded(3))[0], objective.loss(given, seeded(3))[0])
        objective.context = lambda captions: words(captions)[:, :2]
        if drop:
            with pytest.raises(ValueError, match=r"context: \(8, 3, 16\) with the batch"):
                objective.loss(kept, seeded(3))


class Listening(Denoiser):
    """Keeps what the loss is asked for."""

    def loss(self, x0, noise, t, cond, min_snr_gamma=None, shown_noise=None):
        self.asked = (x0, noise, t, shown_noise)
        return super().loss(x0, noise, t, cond, min_snr_gamma, shown_noise)


def asked_of(config: DiffusionConfig) -> tuple[torch.Tensor, ...]:
    objective = diffusion(config)
    listening = Listening(objective.denoiser.network, objective.denoiser.schedule, "v")
    objective.denoiser = listening
    objective.loss(latents(64), seeded(1))
    return listening.asked


def test_offset_noise_is_one_number_a_channel():
    plain, offset = (asked_of(DiffusionConfig(offset_noise=size))[1] for size in (0.0, 0.5))
    away = offset - plain
    assert away.std(dim=(2, 3)).max() < 1e-6 and 0.4 < away[:, :, 0, 0].std() < 0.6
    assert torch.equal(asked_of(DiffusionConfig(offset_noise=0.5))[2], asked_of(DiffusionConfig())[2])


def test_a_perturbed_input_is_noisier_than_its_target():
    _, noise, _, shown = asked_of(DiffusionConfig(input_perturbation=0.1))
    assert asked_of(DiffusionConfig())[3] is None
    assert 0.09 < (shown - noise).std() < 0.11
    assert torch.equal(noise, asked_of(DiffusionConfig())[1])


def test_timesteps_are_spread_as_asked():
    uniform = draw_timesteps(DiffusionConfig(), 1000, 20_000, seeded())
    counts = torch.histc(uniform.float(), 10, 0, 1000)
    assert counts.min() > 1800 and counts.max() < 2200 and (uniform.min(), uniform.max()) == (0, 999)
    config = DiffusionConfig(timesteps="logit-normal", logit_mean=0.5, logit_std=0.8)
    place = (draw_timesteps(config, 1000, 20_000, seeded()).double() + 0.5) / 1000
    logit = torch.log(place / (1 - place))
    assert abs(logit.mean() - 0.5) < 0.02 and abs(logit.std() - 0.8) < 0.02
    wide = draw_timesteps(replace(config, logit_std=50.0), 1000, 100, seeded())
    assert wide.min() == 0 and wide.max() == 999


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_drop_prob": 1.5}, "caption_drop_prob=1.5"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma=0.0"),
        ({"offset_noise": -0.1}, "offset_noise=-0.1"),
        ({"input_perturbation": float("nan")}, "input_perturbation=nan"),
        ({"timesteps": "sigmoid"}, "timesteps='sigmoid': one of uniform, logit-normal"),
        ({"logit_std": 0.0}, "logit_std=0.0"),
    ],
)
def test_a_bad_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**options)


def test_pure_noise_is_no_level_for_eps():
    schedule = ScheduleConfig(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="zero_terminal_snr needs v or sample"):
        diffusion(prediction="eps", schedule=schedule)
    for prediction in ("v", "sample"):
        objective = diffusion(prediction=prediction, schedule=schedule)
        last = torch.full((8,), 999)
        mean = latents().mean
        loss = objective.denoiser.loss(mean, torch.randn(mean.shape, generator=seeded()), last, words(["a"] * 8))
        assert torch.isfinite(loss).all()


def aligned(weight=0.5):
    torch.manual_seed(0)
    unet, head = randomise(UNet(TINY.unet)), projector(16, 5, hidden=12)
    network = nn.ModuleDict({"unet": unet, "projector": head})
    basis = torch.randn(5, 4, generator=seeded(9))

    def teacher(batch):
        return torch.einsum("dc,bchw->bdhw", basis, F.avg_pool2d(batch.mean, 2))

    return network, Alignment(unet, teacher, head, weight=weight)


def test_alignment_is_the_cosine_of_middle_features():
    network, alignment = aligned()
    objective = diffusion(alignment=alignment, network=network)
    kept = []
    hook = network["unet"].middle_block.register_forward_hook(lambda module, given, answer: kept.append(answer))
    total, figures = objective.loss(latents(), seeded())
    hook.remove()
    ours, theirs = network["projector"](kept[0]), alignment.teacher(latents())
    cosine = (F.normalize(ours, dim=1) * F.normalize(theirs, dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(figures["alignment"], -cosine)
    torch.testing.assert_close(total, figures["loss"] - 0.5 * cosine)
    plain, _ = diffusion(network=network).loss(latents(), seeded())
    assert torch.equal(figures["loss"], plain), "the error itself is left alone"
    assert not network["unet"].middle_block._forward_hooks


def test_alignment_is_learned():
    network, alignment = aligned(weight=1.0)
    objective = diffusion(alignment=alignment, network=network)
    optimizer, found = torch.optim.Adam(network.parameters(), 3e-3), []
    for step in range(60):
        loss, figures = objective.loss(latents(), seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(figures["alignment"].item())
    assert sum(found[-5:]) / 5 < sum(found[:5]) / 5 - 0.3


def test_an_alignment_that_cannot_learn_is_refused():
    network, alignment = aligned()
    with pytest.raises(ValueError, match="projector is not part of it"):
        diffusion(alignment=alignment, network=nn.ModuleDict({"unet": network["unet"]}))
    with pytest.raises(ValueError, match="block='middle'"):
        Alignment(network["unet"], alignment.teacher, network["projector"], block="middle")
    with pytest.raises(ValueError, match="while the alignment was listening"):
        alignment.loss(latents())


def test_a_teacher_is_the_last_map_of_frozen_features():
    network = clip().eval()
    features = clip_tower(network, [0, 1])
    found = teacher_of(features)(batch(2))
    assert found.shape == (2, 16, 4, 4) and not found.requires_grad
    torch.testing.assert_close(found, features(batch(2).pixels)[-1].detach())
    decoded = teacher_of(features, decode=lambda given: pictures(len(given.mean)))(latents(2))
    torch.testing.assert_close(decoded, found)


# Stages and samples.

TINY_STAGES = (
    Stage("small", 8, 4, "all", lr=1e-2, warmup=1, batch_size=4),
    Stage("large", 16, 6, "good", start="small", lr=5e-3, warmup=1, batch_size=2, caption_drop_prob=0.1),
    Stage("other", 16, 2, "good", start="small", weights="full", lr=5e-3, warmup=1, batch_size=2),
)


class Sized:
    """Latents for pictures of `size` px: their colour is in the caption."""

    def __init__(self, size):
        self.cells = size // 2

    def __len__(self):
        return 16

    def batch(self, indices):
        mean = torch.stack([torch.full((4, self.cells, self.cells), float(index % 2)) for index in indices])
        return LatentBatch(mean, torch.full_like(mean, 0.1), ["one" if index % 2 else "a zero" for index in indices])


def train_stage(stage, folder, weights, steps=None, seen=None):
    objective = diffusion(DiffusionConfig(stage.caption_drop_prob))
    if weights is not None:
        objective.network.load_state_dict(weights)
    if seen is not None:
        seen.append((stage.name, objective.network.state_dict()["unet.out.2.weight"].clone()))
    config = LoopConfig(steps or stage.steps, stage.batch_size, stage.lr, stage.warmup)
    return fit(objective, Sized(stage.size), config, folder)


def test_stages_start_from_one_another(tmp_path):
    seen: list[tuple[str, torch.Tensor]] = []
    folders = run_stages(TINY_STAGES, tmp_path, lambda *given: train_stage(*given, seen=seen))
    assert [name for name, _ in seen] == ["small", "large", "other"] and list(folders) == ["small", "large", "other"]
    averaged, last = (starting_weights(folders["small"], kind)["unet.out.2.weight"] for kind in ("ema", "full"))
    assert not torch.equal(averaged, last)
    assert torch.equal(seen[1][1], averaged) and torch.equal(seen[2][1], last)
    run_stages(TINY_STAGES, tmp_path, lambda *given: pytest.fail("a stage that is done is trained again"))


def test_an_interrupted_stage_goes_on(tmp_path):
    straight = run_stages(TINY_STAGES[:2], tmp_path / "straight", train_stage)
    asked: list[str] = []

    def stopped(stage, folder, weights):
        asked.append(stage.name)
        train_stage(stage, folder, weights, steps=4 if stage.name == "large" else None)
        if stage.name == "large":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stages(TINY_STAGES[:2], tmp_path / "stopped", stopped)
    resumed = run_stages(TINY_STAGES[:2], tmp_path / "stopped", train_stage)
    assert asked == ["small", "large"]
    for kind in ("ema", "full"):
        one, two = (starting_weights(folders["large"], kind) for folders in (straight, resumed))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_stages_that_cannot_work_are_refused(tmp_path):
    run_stages(TINY_STAGES[:1], tmp_path, train_stage)
    with pytest.raises(ValueError, match="steps=9: stage small has begun with 4"):
        run_stages([replace(TINY_STAGES[0], steps=9)], tmp_path, train_stage)
    (tmp_path / "small" / "stage.json").write_text("[]")
    with pytest.raises(ValueError, match="not a stage's record"):
        run_stages(TINY_STAGES[:1], tmp_path, train_stage)
    for stages, message in (
        ([], "one or more"),
        (TINY_STAGES[1:], "start='small': stage large can start from nothing yet"),
        ((TINY_STAGES[0], TINY_STAGES[0]), "name='small'"),
        ((replace(TINY_STAGES[0], name="../x"),), "name='../x'"),
    ):
        with pytest.raises(ValueError, match=message):
            run_stages(stages, tmp_path, train_stage)
    with pytest.raises(ValueError, match="weights='raw': one of ema, full"):
        Stage("x", 8, 1, "all", weights="raw")
    with pytest.raises(ValueError, match="steps=0"):
        Stage("x", 8, 0, "all")


def test_sd_v1_is_a_list_of_stages():
    check_stages(SD_V1)
    assert sum(stage.steps for stage in SD_V1 if stage.name in ("v1-1-256", "v1-1")) == 431_000
    assert {stage.batch_size for stage in SD_V1} == {2048} and [stage.size for stage in SD_V1] == [
        256,
        512,
        512,
        512,
        512,
    ]


def test_samples_are_what_the_averaged_weights_draw(tmp_path):
    objective = diffusion()
    torch.manual_seed(1)
    resting = {name: randomise(part) for name, part in build(TINY).items() if name != "unet"}
    unet = objective.network["unet"]
    watched = Watched(("a red thing", "a blue thing"), count=2, seed=7, steps=3, columns=2)
    samples = Samples(TINY, {"unet": unet, **resting}, watched, tmp_path)
    config = LoopConfig(4, 4, 1e-2, warmup=1, sample_every=2)
    state = fit(objective, Sized(16), config, tmp_path, on_sample=samples)
    assert [path.name for path in sorted(tmp_path.glob("samples-*.png"))] == [f"samples-{n:06}.png" for n in (0, 2, 4)]
    assert unet.training
    without = fit(diffusion(), Sized(16), replace(config, sample_every=0), tmp_path / "without")
    assert all(torch.equal(p, without.parameters[name]) for name, p in state.parameters.items()), "drawing trains"
    parts = {name: part.state_dict() for name, part in resting.items()}
    averaged = {name.removeprefix("unet."): value for name, value in state.ema.items()}
    save_checkpoint(tmp_path / "end.safetensors", TINY, parts | {"unet": averaged}, torch.float32)
    pipe = Pipeline.from_pretrained(tmp_path / "end.safetensors")
    expected = np.concatenate([pipe(prompt, count=2, seed=7, steps=3).images for prompt in watched.prompts])
    with Image.open(tmp_path / "samples-000004.png") as sheet:
        found = np.asarray(sheet)
    assert np.abs(found.astype(int) - grid(expected, 2)).max() <= 1 and found.std() > 0
    with pytest.raises(ValueError, match="autoencoder: the family tiny needs"):
        live_model(TINY, {"unet": unet}, "x")
    with pytest.raises(ValueError, match="prompts: one or more"):
        Watched(())


def test_the_smoke_recipe_trains_and_draws(tmp_path):
    """Smaller than `make train-smoke`: all three losses fall, and a picture comes out of a checkpoint."""
    small = Smoke(32, 12, 16, 16, clip_falls=0.05, autoencoder_falls=0.2, diffusion_falls=0.1)
    falls = smoke(tmp_path, small)
    assert set(falls) == {"clip", "autoencoder", "diffusion"} and min(falls.values()) >= 0.05
    with Image.open(tmp_path / "smoke.png") as sheet:
        assert np.asarray(sheet).std() > 5 and sheet.width > 4 * 32
    assert len(list((tmp_path / "diffusion").glob("samples-*.png"))) == 3
    lines = [json.loads(line) for line in (tmp_path / "autoencoder" / "log.jsonl").read_text().splitlines()]
    assert "critic_real" in lines[-1] and "critic_real" not in lines[0] and "perceptual" in lines[0]
    with pytest.raises(ValueError, match=r"clip: contrastive has fallen by .*, 99% or more was expected"):
        must_fall(tmp_path / "clip", "contrastive", 0.99)
